//! ON CONFLICT: which stored row is in the way of a proposed one, and what is done about it.
//!
//! What is in the way is judged as the transaction sees it at its snapshot. Two requests that insert the same new key
//! at once write that key both, so the committer lets one of them win; the other plans again and finds the row.

use std::collections::HashSet;
use std::ops::ControlFlow;

use ::arrow::array::{Array, AsArray};
use datafusion::sql::sqlparser::ast::{
    ConflictTarget, DoUpdate, Expr, Ident, OnConflictAction, OnInsert, TableObject, visit_expressions_mut,
};
use wire::{ImageRef, Type, Value};

use super::{Changes, assignments, cast_columns, numbered, parse_image, table_named};
use crate::catalog::{Column, Table};
use crate::sql::ddl::fold;
use crate::sql::error::from_datafusion;
use crate::sql::row_exprs::{Asked, RowExprs};
use crate::sql::session::Engine;
use crate::sql::{RequestEnv, SqlError};
use crate::store::keys::encode_key;

/// What the proposed row is called in DO UPDATE.
const PROPOSED: &str = "excluded";

pub(super) struct OnConflict {
    /// `None`: DO NOTHING.
    update: Option<Update>,
}

struct Update {
    /// What is set, in the order of `set`.
    columns: Vec<Column>,
    set: RowExprs,
    condition: Option<RowExprs>,
}

/// Stored rows that proposed ones ran into; evaluated many at a time.
#[derive(Default)]
pub(super) struct Rivals {
    rows: Vec<Rival>,
    keys: HashSet<Vec<u8>>,
}

struct Rival {
    key: Vec<u8>,
    stored: Vec<u8>,
    proposed: Vec<u8>,
}

impl OnConflict {
    pub(super) fn compile(
        engine: &Engine,
        env: &RequestEnv,
        text: &str,
        on: &OnInsert,
        table: &Table,
        named: &TableObject,
    ) -> Result<OnConflict, SqlError> {
        let OnInsert::OnConflict(on) = on else {
            let hint = Some("say ON CONFLICT (key) DO UPDATE SET …");
            return Err(SqlError::unsupported("ON DUPLICATE KEY UPDATE", hint));
        };
        match &on.conflict_target {
            None => {}
            Some(ConflictTarget::Columns(columns)) => check_target(columns, table, text)?,
            Some(ConflictTarget::OnConstraint(_)) => {
                return Err(SqlError::unsupported("ON CONFLICT ON CONSTRAINT", Some("name the columns")));
            }
        }
        let update = match &on.action {
            OnConflictAction::DoNothing => None,
            OnConflictAction::DoUpdate(_) if on.conflict_target.is_none() => {
                let message = format!("say which key: ON CONFLICT ({}) DO UPDATE …", key_names(table).join(", "));
                return Err(SqlError::invalid("conflict_target", message));
            }
            OnConflictAction::DoUpdate(update) => Some(Update::compile(engine, env, text, update, table, named)?),
        };
        Ok(OnConflict { update })
    }
}

impl Update {
    fn compile(
        engine: &Engine,
        env: &RequestEnv,
        text: &str,
        update: &DoUpdate,
        table: &Table,
        named: &TableObject,
    ) -> Result<Update, SqlError> {
        if table.name == PROPOSED {
            return Err(SqlError::unsupported(format!("DO UPDATE on a table that is called {PROPOSED}"), None));
        }
        let from = vec![table_named(named, None)?, table_named(named, Some(PROPOSED))?];
        let compile = |exprs: Vec<Expr>| {
            let exprs = exprs.into_iter().map(|expr| of_stored_row(expr, table));
            let items = numbered(exprs);
            let asked = Asked { clause: "DO UPDATE", items, table, from: from.clone(), others: &[PROPOSED] };
            RowExprs::compile(engine, env, text, asked)
        };
        let (columns, values) = assignments(&update.assignments, table, text)?;
        let set = compile(values)?;
        let condition = update.selection.clone().map(|selection| compile(vec![selection])).transpose()?;
        if let Some(found) = condition.as_ref().map(|condition| condition.columns[0].ty)
            && found != Type::Boolean
        {
            let message = format!("WHERE in DO UPDATE is {found}, not BOOLEAN");
            return Err(SqlError::invalid("type_mismatch", message));
        }
        Ok(Update { columns, set, condition })
    }
}

/// The columns are those of the primary key, in any order.
fn check_target(columns: &[Ident], table: &Table, text: &str) -> Result<(), SqlError> {
    let mut ids = Vec::with_capacity(columns.len());
    for ident in columns {
        let name = fold(ident);
        let column = table.column(&name).ok_or_else(|| {
            let message = format!("table {:?} has no column {name:?}", table.name);
            SqlError::invalid("unknown_column", message).at_span(text, ident.span)
        })?;
        ids.push(column.id);
    }
    let mut key = table.key.clone();
    key.sort_unstable();
    ids.sort_unstable();
    if ids == key {
        return Ok(());
    }
    let message = format!(
        "there is no key over exactly these columns; the primary key of {:?} is ({})",
        table.name,
        key_names(table).join(", ")
    );
    let error = SqlError::invalid("conflict_target", message);
    match columns.first() {
        Some(first) => Err(error.at_span(text, first.span)),
        None => Err(error),
    }
}

fn key_names(table: &Table) -> Vec<&str> {
    table.key.iter().filter_map(|id| table.column_by_id(*id)).map(|column| column.name.as_str()).collect()
}

/// A bare column name means the stored row's: the proposed one's is said with `excluded.`.
fn of_stored_row(mut expr: Expr, table: &Table) -> Expr {
    let stored = Ident::with_quote('"', &table.name);
    let _: ControlFlow<()> = visit_expressions_mut(&mut expr, |expr| {
        if let Expr::Identifier(ident) = expr
            && table.column(&fold(ident)).is_some()
        {
            *expr = Expr::CompoundIdentifier(vec![stored.clone(), ident.clone()]);
        }
        ControlFlow::Continue(())
    });
    expr
}

impl Changes<'_> {
    /// A proposed row: written where nothing is in its way, else left out or kept for [`Changes::resolve`].
    pub(super) fn put_or_resolve(
        &mut self,
        on_conflict: &OnConflict,
        key: &[Value],
        proposed: Vec<u8>,
        rivals: &mut Rivals,
    ) -> Result<(), SqlError> {
        let encoded = encode_key(&self.table, key);
        let Some(stored) = self.present(&encoded)? else {
            self.put_new(key, proposed)?;
            self.affected += 1;
            return Ok(());
        };
        if on_conflict.update.is_none() {
            return Ok(());
        }
        if rivals.keys.contains(&encoded) {
            self.resolve(on_conflict, rivals)?;
        }
        if self.by_key.contains_key(&encoded) {
            let message = "DO UPDATE meets the same row twice in one statement: give each key once";
            return Err(SqlError::constraint("conflict_twice", message));
        }
        let bytes = 2 * encoded.len() + stored.len() + proposed.len() + size_of::<Rival>();
        self.memory.try_grow(bytes).map_err(|error| from_datafusion(error, ""))?;
        rivals.keys.insert(encoded.clone());
        rivals.rows.push(Rival { key: encoded, stored, proposed });
        Ok(())
    }

    /// DO UPDATE of the rows gathered so far.
    pub(super) fn resolve(&mut self, on_conflict: &OnConflict, rivals: &mut Rivals) -> Result<(), SqlError> {
        let Some(update) = &on_conflict.update else { return Ok(()) };
        let mut rows = std::mem::take(rivals).rows;
        if let Some(condition) = &update.condition {
            let verdicts = condition.evaluate(&pairs(&rows)?.each_ref().map(Vec::as_slice))?;
            let verdicts = verdicts[0]
                .as_boolean_opt()
                .ok_or_else(|| SqlError::Internal("the condition of DO UPDATE is no BOOLEAN".to_owned()))?;
            let mut met = (0..rows.len()).map(|row| verdicts.is_valid(row) && verdicts.value(row));
            // In order, one verdict a row. Only what is updated is evaluated below: the rest may not even fit.
            rows.retain(|_| met.next() == Some(true));
        }
        if rows.is_empty() {
            return Ok(());
        }
        let values = update.set.evaluate(&pairs(&rows)?.each_ref().map(Vec::as_slice))?;
        let values = cast_columns(&values, &update.columns)?;
        for (row, rival) in rows.into_iter().enumerate() {
            self.replace(rival.key, rival.stored, &update.columns, &values, row)?;
        }
        Ok(())
    }

    /// The row under this key as the statement has left it so far.
    fn present(&self, key: &[u8]) -> Result<Option<Vec<u8>>, SqlError> {
        match self.by_key.get(key) {
            Some(at) => Ok(self.writes[*at].new.clone()),
            None => self.lookup(key),
        }
    }
}

/// The stored rows, and the proposed ones.
fn pairs(rows: &[Rival]) -> Result<[Vec<ImageRef<'_>>; 2], SqlError> {
    let images = |of: fn(&Rival) -> &[u8]| rows.iter().map(|rival| parse_image(of(rival))).collect::<Result<_, _>>();
    Ok([images(|rival| &rival.stored)?, images(|rival| &rival.proposed)?])
}
