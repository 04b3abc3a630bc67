//! `SELECT columns FROM table WHERE key = constant`: one read of the store, around the planner and around DataFusion.
//!
//! Only what is exactly this, and compares exactly as keys do, goes this way; for everything else [`find`] says nothing
//! and the statement is planned, with the same answer. UPDATE and DELETE find their row by the same rule
//! ([`KeyedRow`]).

use std::sync::Arc;

use datafusion::sql::sqlparser::ast::{
    self, BinaryOperator, Expr, GroupByExpr, SelectItem, SetExpr, Statement as Ast, TableFactor, TableWithJoins,
    UnaryOperator,
};
use uuid::Uuid;
use wire::{ColumnDecl, ImageRef, Type, Value};

use super::arrow::{RowBatchBuilder, output_schema};
use super::ddl::{fold, table_name};
use super::provider::scope_of;
use super::{OutputColumn, Param, RequestEnv, RowStream, SqlError};
use crate::catalog::{Column, Table, TableKind};
use crate::store::StoreError;
use crate::store::keys::encode_key;

pub(crate) struct Lookup {
    row: KeyedRow,
    columns: Vec<ColumnDecl>,
}

/// The row of a table that a condition names by the whole key.
pub(crate) struct KeyedRow {
    table: Arc<Table>,
    /// `None`: no key can be equal to the constant.
    key: Option<Vec<Value>>,
}

/// A row as it is stored.
pub(crate) struct StoredRow {
    /// Encoded.
    pub(crate) key: Vec<u8>,
    pub(crate) image: Vec<u8>,
}

/// The statement as a lookup by the whole key, if it is one.
pub(crate) fn find(statement: &Ast, env: &RequestEnv) -> Option<Lookup> {
    let Ast::Query(query) = statement else { return None };
    let SetExpr::Select(select) = &*query.body else { return None };
    let bare = query.with.is_none() && query.order_by.is_none() && query.limit_clause.is_none();
    let ungrouped = matches!(&select.group_by, GroupByExpr::Expressions(by, with) if by.is_empty() && with.is_empty());
    if !bare || !ungrouped || select.distinct.is_some() || select.having.is_some() || select.qualify.is_some() {
        return None;
    }
    let [from] = select.from.as_slice() else { return None };
    let row = KeyedRow::find(from, select.selection.as_ref()?, env)?;
    let columns = columns(&row.table, &select.projection)?;
    Some(Lookup { row, columns })
}

impl KeyedRow {
    /// The row, if `from` is one table and `condition` says its whole key and nothing else.
    pub(crate) fn find(from: &TableWithJoins, condition: &Expr, env: &RequestEnv) -> Option<KeyedRow> {
        let TableFactor::Table { name, alias: None, args: None, .. } = &from.relation else { return None };
        if !from.joins.is_empty() {
            return None;
        }
        let (namespace, name) = table_name(name).ok()?;
        let table = env.catalog.table(namespace.as_deref().unwrap_or(&env.namespace), &name)?;
        // Rows of other kinds may be there and not be shown.
        if !matches!(table.kind, TableKind::Shared | TableKind::User) {
            return None;
        }
        Some(KeyedRow { table: table.clone(), key: key(table, condition, env)? })
    }

    /// Reads the row, as the request may see it.
    pub(crate) fn read(&self, env: &RequestEnv) -> Result<Option<StoredRow>, SqlError> {
        let Some(key) = &self.key else { return Ok(None) };
        let (key, scope) = (encode_key(&self.table, key), scope_of(&self.table, &env.user));
        if !env.overlay.rows.is_empty()
            && let Some(rows) = env.overlay.rows.get(&(self.table.id, scope.clone()))
            && let Some(change) = rows.get(&key)
        {
            return Ok(change.clone().map(|image| StoredRow { key, image }));
        }
        let image = env.snapshot.get(&self.table, &scope, &key)?;
        Ok(image.map(|image| StoredRow { key, image }))
    }
}

/// The columns to show, each once.
fn columns(table: &Table, items: &[SelectItem]) -> Option<Vec<ColumnDecl>> {
    if let [SelectItem::Wildcard(options)] = items {
        return (*options == ast::WildcardAdditionalOptions::default()).then(|| table.schema().columns);
    }
    let mut columns: Vec<ColumnDecl> = Vec::with_capacity(items.len());
    for item in items {
        let (expr, alias) = match item {
            SelectItem::UnnamedExpr(expr) => (expr, None),
            SelectItem::ExprWithAlias { expr, alias } => (expr, Some(fold(alias))),
            _ => return None,
        };
        let column = named(table, expr)?;
        let name = alias.unwrap_or_else(|| column.name.clone());
        if columns.iter().any(|known| known.name == name || known.id == column.id) {
            return None;
        }
        columns.push(ColumnDecl {
            id: column.id,
            name,
            ty: column.ty,
            nullable: column.nullable,
            key: table.is_key(column.id),
        });
    }
    Some(columns)
}

fn named<'a>(table: &'a Table, expr: &Expr) -> Option<&'a Column> {
    match expr {
        Expr::Identifier(ident) => table.column(&fold(ident)),
        _ => None,
    }
}

/// The key's values; the inner `None` when no row can have them.
fn key(table: &Table, selection: &Expr, env: &RequestEnv) -> Option<Option<Vec<Value>>> {
    let mut found: Vec<Option<Option<Value>>> = vec![None; table.key.len()];
    let mut rest = vec![selection];
    while let Some(expr) = rest.pop() {
        match expr {
            Expr::Nested(inner) => rest.push(inner),
            Expr::BinaryOp { left, op: BinaryOperator::And, right } => rest.extend([&**left, &**right]),
            Expr::BinaryOp { left, op: BinaryOperator::Eq, right } => {
                let column = named(table, left)?;
                let at = table.key.iter().position(|id| *id == column.id)?;
                // Twice the same column: for the planner to see whether it is twice the same value.
                if found[at].replace(constant(right, column.ty, env)?).is_some() {
                    return None;
                }
            }
            _ => return None,
        }
    }
    // Every part of the key is said, or it is no lookup.
    let values: Vec<Option<Value>> = found.into_iter().collect::<Option<_>>()?;
    Some(values.into_iter().collect())
}

/// A constant as a key value of the type; the inner `None` when it equals none. Nothing where the comparison is one of
/// other types than the key's own.
fn constant(expr: &Expr, ty: Type, env: &RequestEnv) -> Option<Option<Value>> {
    let param = match expr {
        Expr::Value(value) => match &value.value {
            ast::Value::Number(digits, _) => Param::Int(digits.parse().ok()?),
            ast::Value::SingleQuotedString(text) => Param::Text(text.clone()),
            ast::Value::Boolean(value) => Param::Bool(*value),
            ast::Value::Placeholder(name) => {
                let number: usize = name.strip_prefix('$')?.parse().ok()?;
                env.params.get(number.checked_sub(1)?)?.clone()
            }
            _ => return None,
        },
        Expr::UnaryOp { op: UnaryOperator::Minus, expr } => match &**expr {
            Expr::Value(value) => match &value.value {
                ast::Value::Number(digits, _) => Param::Int(digits.parse::<i64>().ok()?.checked_neg()?),
                _ => return None,
            },
            _ => return None,
        },
        _ => return None,
    };
    match (param, ty) {
        (Param::Int(value), Type::SmallInt) => Some(i16::try_from(value).ok().map(|_| Value::Int(value))),
        (Param::Int(value), Type::Int) => Some(i32::try_from(value).ok().map(|_| Value::Int(value))),
        (Param::Int(value), Type::BigInt) => Some(Some(Value::Int(value))),
        (Param::Bool(value), Type::Boolean) => Some(Some(Value::Bool(value))),
        (Param::Text(text), Type::Text) => Some(Some(Value::Text(text))),
        (Param::Text(text), Type::Uuid) => Some(Uuid::parse_str(&text).ok().map(|uuid| Value::Uuid(uuid.into_bytes()))),
        _ => None,
    }
}

impl Lookup {
    /// Reads the row, as the request may see it.
    pub(crate) fn run(self, env: &RequestEnv) -> Result<RowStream, SqlError> {
        let columns: Vec<OutputColumn> =
            self.columns.iter().map(|column| OutputColumn { name: column.name.clone(), ty: column.ty }).collect();
        let mut batch = None;
        if let Some(row) = self.row.read(env)? {
            let (image, ..) = ImageRef::parse(&row.image).map_err(|error| StoreError::Corrupt(error.to_string()))?;
            let mut builder = RowBatchBuilder::with_schema(output_schema(&columns), &self.columns, 1);
            builder.push(&image)?;
            batch = Some(Ok(builder.finish()?));
        }
        Ok(RowStream { columns, batches: Box::pin(futures::stream::iter(batch)) })
    }
}
