//! INSERT, UPDATE and DELETE: planned as SELECTs, turned into change sets ([`Changes`]).
//!
//! DataFusion's own hooks for them are never used: they take the filters from the optimized plan, and a filter that
//! was optimized away means every row. Here a statement becomes a query whose rows are the keys to touch and the new
//! values, and nothing is written that the query did not return. RETURNING is evaluated over the rows written.

pub(crate) mod by_key;
mod changes;
mod unique;
mod upsert;

use std::collections::HashSet;
use std::sync::Arc;

use ::arrow::datatypes::{FieldRef, Schema};
use datafusion::logical_expr::{LogicalPlan, Projection};
use datafusion::sql::sqlparser::ast::{
    self, Assignment, AssignmentTarget, Delete, Expr, FromTable, Ident, Insert, ObjectName, Query, Select, SelectItem,
    SetExpr, TableFactor, TableObject, TableWithJoins, Update,
};
use wire::{ImageBuilder, ImageRef, Type, Value};

pub(crate) use self::changes::Changes;
use self::upsert::OnConflict;
use super::context::find_table;
use super::ddl::{Literal, fold, literal, table_name};
use super::row_exprs::{Asked, RowExprs};
use super::session::Engine;
use super::{RequestEnv, RowConflict, SqlError, Statement};
use crate::catalog::{Column, DefaultValue, GENERATED_KEY, Table};

/// What the rows of the planned query mean.
#[derive(Clone)]
pub(crate) struct Target {
    table: Arc<Table>,
    action: Action,
    returning: Option<RowExprs>,
}

#[derive(Clone)]
enum Action {
    /// Column n of the query is the value for this column of the table.
    Insert(Vec<Column>, Option<Box<OnConflict>>),
    /// First the key columns, then the new values of these columns.
    Update(Vec<Column>),
    /// The key columns.
    Delete,
}

impl Target {
    /// Columns that the query has to have.
    pub(crate) fn width(&self) -> usize {
        match &self.action {
            Action::Insert(columns, _) => columns.len(),
            Action::Update(columns) => self.table.key.len() + columns.len(),
            Action::Delete => self.table.key.len(),
        }
    }

    /// Whether there is something of one request in it (see [`RowExprs`]), so that it must not be kept for another one.
    pub(crate) fn is_bound(&self) -> bool {
        self.returning.is_some() || matches!(self.action, Action::Insert(_, Some(_)))
    }

    /// An INSERT's rows come from anywhere; other queries are of our own making.
    pub(crate) fn check_width(&self, found: usize) -> Result<(), SqlError> {
        if found == self.width() {
            return Ok(());
        }
        Err(SqlError::invalid("column_count", format!("{found} values for {} columns", self.width())))
    }

    /// Of UPDATE: that each row is in the plan once. (An `unnest` in what WHERE asks for is below the rows.)
    pub(crate) fn check_rows(&self, mut plan: &LogicalPlan) -> Result<(), SqlError> {
        if matches!(self.action, Action::Insert(..)) {
            return Ok(());
        }
        while let LogicalPlan::Projection(Projection { input, .. }) = plan {
            plan = input;
        }
        match plan {
            LogicalPlan::Unnest(_) => Err(SqlError::unsupported("unnest in SET", Some("it makes several rows of one"))),
            _ => Ok(()),
        }
    }
}

/// The statement as a query, and what its rows mean.
pub(crate) fn target(
    engine: &Engine,
    statement: &Statement,
    env: &RequestEnv,
) -> Result<(Target, ast::Statement), SqlError> {
    let returning = |items: &Option<Vec<SelectItem>>, table: &Table, from: &TableWithJoins| {
        let compile = |items: &Vec<SelectItem>| {
            let (items, from) = (items.clone(), vec![from.clone()]);
            let asked = Asked { clause: "RETURNING", items, table, from, others: &[] };
            RowExprs::compile(engine, env, &statement.text, asked)
        };
        items.as_ref().map(compile).transpose()
    };
    match &*statement.ast {
        ast::Statement::Insert(insert) => {
            let (table, columns, query) = insert_target(insert, env, &statement.text)?;
            let on_conflict = match &insert.on {
                None => None,
                Some(on) => {
                    Some(Box::new(OnConflict::compile(engine, env, &statement.text, on, &table, &insert.table)?))
                }
            };
            let returning = returning(&insert.returning, &table, &table_named(&insert.table, None)?)?;
            Ok((Target { table, action: Action::Insert(columns, on_conflict), returning }, query))
        }
        ast::Statement::Update(update) => {
            let (table, columns, values) = update_target(update, env, &statement.text)?;
            let query = rows_query(&table, values, &update.table, update.selection.clone())?;
            let returning = returning(&update.returning, &table, &update.table)?;
            Ok((Target { table, action: Action::Update(columns), returning }, query))
        }
        ast::Statement::Delete(delete) => {
            let (table, from) = delete_target(delete, env)?;
            let query = rows_query(&table, Vec::new(), from, delete.selection.clone())?;
            let returning = returning(&delete.returning, &table, from)?;
            Ok((Target { table, action: Action::Delete, returning }, query))
        }
        other => Err(not_dml(other)),
    }
}

/// [`target`] of INSERT … VALUES with nothing that has to be compiled: its rows may be constants.
pub(crate) fn insert_of_values(
    statement: &Statement,
    env: &RequestEnv,
) -> Result<Option<(Target, ast::Statement)>, SqlError> {
    let ast::Statement::Insert(insert) = &*statement.ast else { return Ok(None) };
    let of_values = insert.source.as_ref().is_none_or(|source| matches!(&*source.body, SetExpr::Values(_)));
    if !of_values || insert.on.is_some() || insert.returning.is_some() {
        return Ok(None);
    }
    let (table, columns, query) = insert_target(insert, env, &statement.text)?;
    Ok(Some((Target { table, action: Action::Insert(columns, None), returning: None }, query)))
}

/// The table that a statement writes, whatever else may be wrong with it.
pub(crate) fn written_table(statement: &ast::Statement, env: &RequestEnv) -> Result<Arc<Table>, SqlError> {
    match statement {
        ast::Statement::Insert(insert) => inserted_table(insert, env),
        ast::Statement::Update(update) => only_table(&update.table, "UPDATE", env),
        ast::Statement::Delete(delete) => only_table(deleted_from(delete)?, "DELETE", env),
        other => Err(not_dml(other)),
    }
}

fn not_dml(statement: &ast::Statement) -> SqlError {
    SqlError::Internal(format!("not DML: {statement}"))
}

/// A table, and which of its columns get which values.
type Assigned = (Arc<Table>, Vec<Column>, Vec<Expr>);

/// The table, and what is set to what.
fn update_target(update: &Update, env: &RequestEnv, text: &str) -> Result<Assigned, SqlError> {
    refuse(&[
        (update.from.is_some(), "UPDATE … FROM"),
        (update.output.is_some(), "OUTPUT"),
        (update.or.is_some(), "UPDATE OR …"),
        (!update.order_by.is_empty(), "ORDER BY in UPDATE"),
        (update.limit.is_some(), "LIMIT in UPDATE"),
        (!update.optimizer_hints.is_empty(), "optimizer hints"),
    ])?;
    let table = only_table(&update.table, "UPDATE", env)?;
    let (columns, values) = assignments(&update.assignments, &table, text)?;
    Ok((table, columns, values))
}

fn delete_target<'a>(delete: &'a Delete, env: &RequestEnv) -> Result<(Arc<Table>, &'a TableWithJoins), SqlError> {
    refuse(&[
        (!delete.tables.is_empty(), "DELETE from several tables"),
        (delete.using.is_some(), "DELETE … USING"),
        (delete.output.is_some(), "OUTPUT"),
        (!delete.order_by.is_empty(), "ORDER BY in DELETE"),
        (delete.limit.is_some(), "LIMIT in DELETE"),
        (!delete.optimizer_hints.is_empty(), "optimizer hints"),
    ])?;
    let from = deleted_from(delete)?;
    Ok((only_table(from, "DELETE", env)?, from))
}

fn deleted_from(delete: &Delete) -> Result<&TableWithJoins, SqlError> {
    let FromTable::WithFromKeyword(from) = &delete.from else {
        return Err(SqlError::unsupported("DELETE without FROM", None));
    };
    match from.as_slice() {
        [from] => Ok(from),
        _ => Err(SqlError::unsupported("DELETE from several tables", None)),
    }
}

fn refuse(found: &[(bool, &str)]) -> Result<(), SqlError> {
    match found.iter().find(|(there, _)| *there) {
        Some((_, what)) => Err(SqlError::unsupported(*what, None)),
        None => Ok(()),
    }
}

/// The table, the columns that are given, and the query that gives them.
fn insert_target(
    insert: &Insert,
    env: &RequestEnv,
    text: &str,
) -> Result<(Arc<Table>, Vec<Column>, ast::Statement), SqlError> {
    refuse(&[
        (insert.output.is_some(), "OUTPUT"),
        (insert.or.is_some() || insert.replace_into, "INSERT OR REPLACE"),
        (insert.ignore, "INSERT IGNORE"),
        (insert.overwrite, "INSERT OVERWRITE"),
        (insert.table_alias.is_some() || insert.insert_alias.is_some(), "an alias in INSERT"),
        (!insert.assignments.is_empty(), "INSERT … SET"),
        (insert.partitioned.is_some() || !insert.after_columns.is_empty(), "PARTITION in INSERT"),
        (insert.settings.is_some() || insert.format_clause.is_some(), "FORMAT and SETTINGS in INSERT"),
        (insert.priority.is_some(), "a priority in INSERT"),
        (insert.multi_table_insert_type.is_some(), "INSERT into several tables"),
        (!insert.optimizer_hints.is_empty(), "optimizer hints"),
    ])?;
    let table = inserted_table(insert, env)?;
    let columns = insert_columns(&insert.columns, &table, text)?;
    let mut source = match &insert.source {
        Some(source) => source.clone(),
        // One row of nothing but defaults.
        None => query_of(&format!("VALUES ({})", vec!["DEFAULT"; columns.len()].join(", ")))?,
    };
    if let SetExpr::Values(values) = &mut *source.body {
        for row in &mut values.rows {
            if row.content.len() != columns.len() {
                let message = format!("{} values for {} columns", row.content.len(), columns.len());
                return Err(SqlError::invalid("column_count", message));
            }
            for (cell, column) in row.content.iter_mut().zip(&columns) {
                prepare_value(cell, column)?;
            }
        }
    }
    if let SetExpr::Select(select) = &mut *source.body {
        tell_apart(&mut select.projection);
    }
    Ok((table, columns, ast::Statement::Query(source)))
}

/// Nobody sees what the columns of an inserted SELECT are called, but the planner wants each name once.
fn tell_apart(items: &mut [SelectItem]) {
    let mut seen = HashSet::new();
    for (at, item) in items.iter_mut().enumerate() {
        if let SelectItem::UnnamedExpr(expr) = item
            && !seen.insert(expr.to_string())
        {
            let (expr, alias) = (expr.clone(), Ident::with_quote('"', format!("{expr} ({at})")));
            *item = SelectItem::ExprWithAlias { expr, alias };
        }
    }
}

fn inserted_table(insert: &Insert, env: &RequestEnv) -> Result<Arc<Table>, SqlError> {
    let TableObject::TableName(name) = &insert.table else {
        return Err(SqlError::unsupported("INSERT into anything but a table", None));
    };
    let (namespace, name) = table_name(name)?;
    Ok(find_table(env, namespace.as_deref(), &name)?.clone())
}

/// The table of an INSERT as it would stand in FROM.
fn table_named(table: &TableObject, alias: Option<&str>) -> Result<TableWithJoins, SqlError> {
    let TableObject::TableName(name) = table else {
        return Err(SqlError::unsupported("INSERT into anything but a table", None));
    };
    let alias = alias.map(|alias| format!(" AS {}", Ident::with_quote('"', alias))).unwrap_or_default();
    match select_template(&format!("1 FROM {name}{alias}"))?.from.pop() {
        Some(from) => Ok(from),
        None => Err(SqlError::Internal(format!("{name} is no table in FROM"))),
    }
}

/// Rows that come without a statement: what their columns are called says where they go.
pub(crate) fn rows_target(
    table: &str,
    schema: &Schema,
    conflict: RowConflict,
    env: &RequestEnv,
) -> Result<Target, SqlError> {
    let table = find_table(env, None, table)?.clone();
    let column = |field: &FieldRef| {
        given_columns(&table).find(|column| column.name == *field.name()).cloned().ok_or_else(|| {
            let known: Vec<&str> = given_columns(&table).map(|column| column.name.as_str()).collect();
            let message = format!("the table has no column {:?} to fill; it has: {}", field.name(), known.join(", "));
            SqlError::invalid("unknown_column", message)
        })
    };
    let columns: Vec<Column> = schema.fields().iter().map(column).collect::<Result<_, _>>()?;
    if let Some(twice) = columns.iter().enumerate().find(|(at, column)| columns[..*at].contains(column)) {
        return Err(SqlError::invalid("duplicate_column", format!("column {:?} is named twice", twice.1.name)));
    }
    let on_conflict = match conflict {
        RowConflict::Error => None,
        RowConflict::Nothing => Some(Box::new(OnConflict::nothing())),
        RowConflict::Update => Some(Box::new(OnConflict::take(&columns))),
    };
    Ok(Target { table, action: Action::Insert(columns, on_conflict), returning: None })
}

/// The columns that an INSERT may name, and fills in this order when it names none.
pub(crate) fn given_columns(table: &Table) -> impl Iterator<Item = &Column> {
    table.columns.iter().filter(|column| !is_generated(table, column))
}

fn insert_columns(named: &[ObjectName], table: &Table, text: &str) -> Result<Vec<Column>, SqlError> {
    if named.is_empty() {
        return Ok(given_columns(table).cloned().collect());
    }
    let mut columns: Vec<Column> = Vec::with_capacity(named.len());
    for name in named {
        let column = settable(name, table, text)?;
        if columns.iter().any(|known| known.id == column.id) {
            return Err(SqlError::invalid("duplicate_column", format!("column {:?} is named twice", column.name)));
        }
        columns.push(column);
    }
    Ok(columns)
}

fn is_generated(table: &Table, column: &Column) -> bool {
    table.generated_key && column.name == GENERATED_KEY
}

/// The column that a statement wants to write.
fn settable(name: &ObjectName, table: &Table, text: &str) -> Result<Column, SqlError> {
    let [part] = name.0.as_slice() else {
        return Err(SqlError::invalid("syntax", format!("{name}: name the column alone")));
    };
    let ident = part.as_ident().ok_or_else(|| SqlError::invalid("syntax", format!("{name} is no column name")))?;
    let folded = fold(ident);
    let column = table.column(&folded).ok_or_else(|| {
        SqlError::invalid("unknown_column", format!("table {:?} has no column {folded:?}", table.name))
            .at_span(text, ident.span)
    })?;
    if is_generated(table, column) {
        let message = format!("column {GENERATED_KEY:?} is filled by the server");
        return Err(SqlError::invalid("generated_column", message).at_span(text, ident.span));
    }
    Ok(column.clone())
}

fn assignments(assignments: &[Assignment], table: &Table, text: &str) -> Result<(Vec<Column>, Vec<Expr>), SqlError> {
    let mut columns: Vec<Column> = Vec::new();
    let mut values = Vec::new();
    for assignment in assignments {
        let AssignmentTarget::ColumnName(name) = &assignment.target else {
            return Err(SqlError::unsupported("SET (a, b) = …", Some("assign one column at a time")));
        };
        let column = settable(name, table, text)?;
        if columns.iter().any(|known| known.id == column.id) {
            return Err(SqlError::invalid("duplicate_column", format!("column {:?} is set twice", column.name)));
        }
        let mut value = assignment.value.clone();
        prepare_value(&mut value, &column)?;
        columns.push(column);
        values.push(value);
    }
    Ok((columns, values))
}

/// `DEFAULT` as the column's default; digits meant for a DECIMAL as text, so that none is lost on the way through
/// DOUBLE.
fn prepare_value(value: &mut Expr, column: &Column) -> Result<(), SqlError> {
    if let Expr::Identifier(ident) = value
        && ident.quote_style.is_none()
        && ident.value.eq_ignore_ascii_case("default")
    {
        *value = default_expr(column)?;
    }
    if matches!(column.ty, Type::Decimal { .. })
        && let Some(Literal::Number(digits)) = literal(value)
        && !digits.contains(['e', 'E'])
    {
        *value = text_expr(&digits);
    }
    Ok(())
}

fn default_expr(column: &Column) -> Result<Expr, SqlError> {
    Ok(match &column.default {
        None => Expr::value(ast::Value::Null),
        Some(DefaultValue::Now) => call("now()")?,
        Some(DefaultValue::Uuid) => call("uuid()")?,
        Some(DefaultValue::CurrentUser) => call("current_user")?,
        Some(DefaultValue::Literal(value)) => match value {
            Value::Null => Expr::value(ast::Value::Null),
            Value::Bool(value) => Expr::value(ast::Value::Boolean(*value)),
            // As the text that assignment takes for the column's type.
            _ => text_expr(&show_value(value, column.ty)?),
        },
    })
}

fn text_expr(text: &str) -> Expr {
    Expr::value(ast::Value::SingleQuotedString(text.to_owned()))
}

/// A stored literal as text that [`super::arrow::cast_for`] reads back as the same value.
pub(crate) fn show_value(value: &Value, ty: Type) -> Result<String, SqlError> {
    if let (Value::Bytes(bytes), Type::Bytea) = (value, ty) {
        return Ok(bytes.iter().fold("\\x".to_owned(), |text, byte| text + &format!("{byte:02x}")));
    }
    let mut image = ImageBuilder::new(1);
    image.set(0, value);
    let bytes = image.finish();
    let (image, ..) = ImageRef::parse(&bytes).map_err(|error| SqlError::Internal(error.to_string()))?;
    let column = wire::ColumnDecl { id: 0, name: String::new(), ty, nullable: true, key: false };
    let batch = super::arrow::to_batch(&wire::Schema { columns: vec![column] }, &[image])?;
    ::arrow::util::display::array_value_to_string(batch.column(0), 0).map_err(super::error::from_arrow)
}

fn call(text: &str) -> Result<Expr, SqlError> {
    match select_template(text)?.projection.pop() {
        Some(SelectItem::UnnamedExpr(expr)) => Ok(expr),
        _ => Err(SqlError::Internal(format!("{text} is no expression"))),
    }
}

/// `SELECT <text>` as a syntax tree, to be filled.
fn select_template(text: &str) -> Result<Select, SqlError> {
    match *query_of(&format!("SELECT {text}"))?.body {
        SetExpr::Select(select) => Ok(*select),
        _ => Err(SqlError::Internal("the template is no SELECT".to_owned())),
    }
}

/// SQL of our own making as a syntax tree.
fn query_of(text: &str) -> Result<Box<Query>, SqlError> {
    let mut statements = super::statement::parse(text)?;
    match statements.pop().map(|statement| *statement.ast) {
        Some(ast::Statement::Query(query)) => Ok(query),
        _ => Err(SqlError::Internal("the template is no query".to_owned())),
    }
}

/// `SELECT items FROM from WHERE selection`.
pub(crate) fn select_query(
    items: Vec<SelectItem>,
    from: Vec<TableWithJoins>,
    selection: Option<Expr>,
) -> Result<Box<Query>, SqlError> {
    let mut query = query_of("SELECT 1")?;
    if let SetExpr::Select(select) = &mut *query.body {
        (select.projection, select.from, select.selection) = (items, from, selection);
    }
    Ok(query)
}

/// Numbered names: two expressions may spell the same.
fn numbered(exprs: impl Iterator<Item = Expr>) -> Vec<SelectItem> {
    let item = |(at, expr): (usize, Expr)| {
        let alias = Ident::with_quote('"', format!("{at}"));
        SelectItem::ExprWithAlias { expr, alias }
    };
    exprs.enumerate().map(item).collect()
}

fn only_table(from: &TableWithJoins, what: &str, env: &RequestEnv) -> Result<Arc<Table>, SqlError> {
    refuse(&[(!from.joins.is_empty(), &format!("a join in {what}"))])?;
    let TableFactor::Table { name, alias, .. } = &from.relation else {
        return Err(SqlError::unsupported(format!("{what} of anything but a table"), None));
    };
    let renamed = alias.as_ref().is_some_and(|alias| !alias.columns.is_empty());
    refuse(&[(renamed, &format!("other names for the columns in {what}"))])?;
    let (namespace, name) = table_name(name)?;
    Ok(find_table(env, namespace.as_deref(), &name)?.clone())
}

/// `SELECT key columns, values FROM table WHERE selection`.
fn rows_query(
    table: &Table,
    values: Vec<Expr>,
    from: &TableWithJoins,
    selection: Option<Expr>,
) -> Result<ast::Statement, SqlError> {
    let keys = table.key.iter().filter_map(|id| table.column_by_id(*id));
    let keys = keys.map(|column| Expr::Identifier(Ident::with_quote('"', &column.name)));
    let query = select_query(numbered(keys.chain(values)), vec![from.clone()], selection)?;
    Ok(ast::Statement::Query(query))
}

/// `(a, b) = (1, x)`, long values cut.
pub(crate) fn show_columns(table: &Table, ids: &[u16], values: &[Value]) -> String {
    let columns: Vec<&Column> = ids.iter().filter_map(|id| table.column_by_id(*id)).collect();
    let names: Vec<&str> = columns.iter().map(|column| column.name.as_str()).collect();
    let shown: Vec<String> = columns
        .iter()
        .zip(values)
        .map(|(column, value)| show_value(value, column.ty).unwrap_or_default().chars().take(80).collect())
        .collect();
    format!("({}) = ({})", names.join(", "), shown.join(", "))
}
