//! INSERT, UPDATE and DELETE: planned as SELECTs, turned into change sets.
//!
//! DataFusion's own hooks for them are never used: they take the filters from the optimized plan, and a filter that
//! was optimized away means every row. Here a statement becomes a query whose rows are the keys to touch and the new
//! values, and nothing is written that the query did not return. RETURNING is evaluated over the rows written.

pub(crate) mod by_key;
mod unique;
mod upsert;

use std::collections::HashMap;
use std::sync::Arc;

use ::arrow::array::ArrayRef;
use ::arrow::datatypes::{FieldRef, Schema};
use ::arrow::record_batch::RecordBatch;
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::runtime_env::RuntimeEnv;
use datafusion::sql::sqlparser::ast::{
    self, Assignment, AssignmentTarget, Delete, Expr, FromTable, Ident, Insert, ObjectName, Query, Select, SelectItem,
    SetExpr, TableFactor, TableObject, TableWithJoins, Update,
};
use uuid::Uuid;
use wire::{ImageBuilder, ImageRef, Scope, Type, Value};

use self::unique::Uniques;
use self::upsert::{OnConflict, Rivals};
use super::arrow::{CastTarget, cast_for, value_at};
use super::context::find_table;
use super::ddl::{Literal, fold, literal, table_name};
use super::error::from_datafusion;
use super::lookup::StoredRow;
use super::provider::scope_of;
use super::row_exprs::{Asked, RowExprs};
use super::session::Engine;
use super::{ChangeSet, RequestEnv, Returned, RowConflict, SqlError, Statement};
use crate::catalog::{Column, DefaultValue, GENERATED_KEY, IndexId, Table};
use crate::store::keys::encode_key;
use crate::store::{RowWrite, StoreError};

/// Rows of RETURNING that are evaluated at a time.
const RETURNED_ROWS: usize = 8_192;

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
    Ok((table, columns, ast::Statement::Query(source)))
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

/// A stored literal as text that [`cast_for`] reads back as the same value.
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

/// Turns the query's rows into writes; everything it holds is counted against the memory pool.
pub(crate) struct Changes<'a> {
    env: &'a RequestEnv,
    table: Arc<Table>,
    scope: Scope,
    action: Arc<Action>,
    returning: Option<RowExprs>,
    writes: Vec<RowWrite>,
    /// Where in `writes` a key is: at most one write a key.
    by_key: HashMap<Vec<u8>, usize>,
    /// Rows whose key changes: taken away at once, put back when all old keys are gone.
    moved: Vec<(Vec<Value>, Vec<u8>)>,
    affected: u64,
    uniques: Uniques,
    /// What rows written so far have in unique indexes; kept for ON CONFLICT alone.
    claims: HashMap<(IndexId, Vec<u8>), Vec<u8>>,
    memory: MemoryReservation,
}

impl<'a> Changes<'a> {
    pub(crate) fn new(target: Target, env: &'a RequestEnv, runtime: &RuntimeEnv) -> Result<Changes<'a>, SqlError> {
        let scope = scope_of(&target.table, &env.user);
        Ok(Changes {
            env,
            uniques: Uniques::new(env, &target.table, &scope)?,
            scope,
            table: target.table,
            action: Arc::new(target.action),
            returning: target.returning,
            writes: Vec::new(),
            by_key: HashMap::new(),
            moved: Vec::new(),
            affected: 0,
            claims: HashMap::new(),
            memory: MemoryConsumer::new("change set").register(&runtime.memory_pool),
        })
    }

    pub(crate) fn add(&mut self, batch: &RecordBatch) -> Result<(), SqlError> {
        match &*self.action.clone() {
            Action::Insert(columns, on_conflict) => self.insert(batch, columns, on_conflict.as_deref()),
            Action::Update(columns) => self.update(batch, columns),
            Action::Delete => self.delete(batch),
        }
    }

    /// UPDATE or DELETE of a row at hand: `values` has one cell for each column that is set.
    pub(crate) fn add_row(&mut self, row: StoredRow, values: &[ArrayRef]) -> Result<(), SqlError> {
        match &*self.action.clone() {
            Action::Insert(..) => Err(SqlError::Internal("an INSERT of a stored row".to_owned())),
            Action::Update(columns) => {
                let values = cast_columns(values, columns)?;
                self.replace(row.key, row.image, columns, &values, 0)
            }
            Action::Delete => {
                self.affected += 1;
                self.put(row.key, Some(row.image), None)
            }
        }
    }

    pub(crate) fn finish(mut self) -> Result<ChangeSet, SqlError> {
        for (key, image) in std::mem::take(&mut self.moved) {
            self.put_new(&key, image)?;
        }
        self.check_unique()?;
        let returned = self.returned()?;
        Ok(ChangeSet { writes: self.writes, affected: self.affected, returned })
    }

    /// RETURNING of what was inserted and updated, or deleted: the writes, because there is one for each such row. (A key
    /// change has a second one, which takes the old row away and has no new one.)
    fn returned(&mut self) -> Result<Option<Returned>, SqlError> {
        let Some(returning) = &self.returning else { return Ok(None) };
        let mut batches = Vec::new();
        let images: Vec<&[u8]> = self.writes.iter().filter_map(|write| shown_image(&self.action, write)).collect();
        for images in images.chunks(RETURNED_ROWS) {
            let images = images.iter().map(|image| parse_image(image)).collect::<Result<Vec<_>, _>>()?;
            let batch = returning.batch(&images)?;
            self.memory.try_grow(batch.get_array_memory_size()).map_err(|error| from_datafusion(error, ""))?;
            batches.push(batch);
        }
        Ok(Some(Returned { columns: returning.columns.clone(), batches }))
    }

    fn insert(
        &mut self,
        batch: &RecordBatch,
        columns: &[Column],
        on_conflict: Option<&OnConflict>,
    ) -> Result<(), SqlError> {
        let cells = cast_columns(batch.columns(), columns)?;
        let table = self.table.clone();
        let mut rivals = Rivals::default();
        for row in 0..batch.num_rows() {
            let mut values = HashMap::with_capacity(table.columns.len());
            for (column, cells) in columns.iter().zip(&cells) {
                values.insert(column.id, value_at(cells, row, column.ty));
            }
            for column in &table.columns {
                let value = values.entry(column.id).or_insert_with(|| self.default(column));
                check_null(&table, column, value)?;
            }
            let mut image = ImageBuilder::new(table.slots());
            for (id, value) in &values {
                image.set(*id, value);
            }
            let key: Vec<Value> = table.key.iter().map(|id| values.remove(id).unwrap_or(Value::Null)).collect();
            match on_conflict {
                Some(on_conflict) => self.put_or_resolve(on_conflict, &key, image.finish(), &mut rivals)?,
                None => {
                    self.put_new(&key, image.finish())?;
                    self.affected += 1;
                }
            }
        }
        match on_conflict {
            Some(on_conflict) => self.resolve(on_conflict, &mut rivals),
            None => Ok(()),
        }
    }

    fn default(&self, column: &Column) -> Value {
        let uuid = |uuid: Uuid| match column.ty {
            Type::Uuid => Value::Uuid(uuid.into_bytes()),
            _ => Value::Text(uuid.hyphenated().to_string()),
        };
        match &column.default {
            // Time-ordered, so that rows lie in the order they came.
            _ if is_generated(&self.table, column) => uuid(Uuid::now_v7()),
            None => Value::Null,
            Some(DefaultValue::Literal(value)) => value.clone(),
            Some(DefaultValue::Now) => Value::Int(self.env.now),
            Some(DefaultValue::Uuid) => uuid(Uuid::new_v4()),
            Some(DefaultValue::CurrentUser) => Value::Text(self.env.user.to_string()),
        }
    }

    fn update(&mut self, batch: &RecordBatch, columns: &[Column]) -> Result<(), SqlError> {
        let table = self.table.clone();
        let (keys, values) = batch.columns().split_at(table.key.len());
        let values = cast_columns(values, columns)?;
        for row in 0..batch.num_rows() {
            let key = key_at(&table, keys, row);
            let old = self.stored(&key)?;
            self.replace(encode_key(&table, &key), old, columns, &values, row)?;
        }
        Ok(())
    }

    /// Writes a row anew with `columns` set to row `row` of `values`. If that changes its key, the row is taken away now
    /// and put back under the new key when all old keys are gone.
    fn replace(
        &mut self,
        key: Vec<u8>,
        old: Vec<u8>,
        columns: &[Column],
        values: &[ArrayRef],
        row: usize,
    ) -> Result<(), SqlError> {
        let table = self.table.clone();
        let image = parse_image(&old)?;
        let mut new = ImageBuilder::new(table.slots());
        let mut new_key = vec![Value::Null; table.key.len()];
        for column in &table.columns {
            let value = match columns.iter().position(|set| set.id == column.id) {
                Some(at) => {
                    let value = value_at(&values[at], row, column.ty);
                    check_null(&table, column, &value)?;
                    value
                }
                None => image.value(column.id, column.ty).map_err(|error| StoreError::Corrupt(error.to_string()))?,
            };
            new.set(column.id, &value);
            if let Some(at) = table.key.iter().position(|id| *id == column.id) {
                new_key[at] = value;
            }
        }
        self.affected += 1;
        if encode_key(&table, &new_key) == key {
            return self.put(key, Some(old), Some(new.finish()));
        }
        self.put(key, Some(old), None)?;
        self.moved.push((new_key, new.finish()));
        Ok(())
    }

    fn delete(&mut self, batch: &RecordBatch) -> Result<(), SqlError> {
        let table = self.table.clone();
        for row in 0..batch.num_rows() {
            let key = key_at(&table, batch.columns(), row);
            let old = self.stored(&key)?;
            self.put(encode_key(&table, &key), Some(old), None)?;
            self.affected += 1;
        }
        Ok(())
    }

    /// The image of a row that the query has just returned.
    fn stored(&self, key: &[Value]) -> Result<Vec<u8>, SqlError> {
        self.lookup(&encode_key(&self.table, key))?.ok_or_else(|| {
            SqlError::Internal(format!("a row of table {:?} was read but cannot be found by its key", self.table.name))
        })
    }

    /// The row as this transaction sees it.
    fn lookup(&self, key: &[u8]) -> Result<Option<Vec<u8>>, SqlError> {
        let pending = self.env.overlay.rows.get(&(self.table.id, self.scope.clone()));
        match pending.and_then(|rows| rows.get(key)) {
            Some(change) => Ok(change.clone()),
            None => Ok(self.env.snapshot.get(&self.table, &self.scope, key)?),
        }
    }

    /// A row under a key that must be free.
    fn put_new(&mut self, key: &[Value], image: Vec<u8>) -> Result<(), SqlError> {
        let encoded = encode_key(&self.table, key);
        if let Some(at) = self.by_key.get(&encoded) {
            let write = &mut self.writes[*at];
            if write.new.is_some() {
                return Err(self.duplicate(key));
            }
            self.memory.try_grow(image.len()).map_err(|error| from_datafusion(error, ""))?;
            write.new = Some(image);
            return Ok(());
        }
        if self.lookup(&encoded)?.is_some() {
            return Err(self.duplicate(key));
        }
        self.put(encoded, None, Some(image))
    }

    fn put(&mut self, key: Vec<u8>, old: Option<Vec<u8>>, new: Option<Vec<u8>>) -> Result<(), SqlError> {
        let size = |image: &Option<Vec<u8>>| image.as_ref().map_or(0, Vec::len);
        let bytes = 2 * key.len() + size(&old) + size(&new) + size_of::<RowWrite>();
        self.memory.try_grow(bytes).map_err(|error| from_datafusion(error, ""))?;
        self.by_key.insert(key.clone(), self.writes.len());
        self.writes.push(RowWrite { table: self.table.clone(), scope: self.scope.clone(), key, old, new });
        Ok(())
    }

    fn duplicate(&self, key: &[Value]) -> SqlError {
        let shown = show_columns(&self.table, &self.table.key, key);
        let message = format!("table {:?} has a row with the key {shown} already", self.table.name);
        SqlError::constraint("duplicate_key", message)
    }
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

/// The row that RETURNING shows of a write, if any.
fn shown_image<'a>(action: &Action, write: &'a RowWrite) -> Option<&'a [u8]> {
    match action {
        Action::Delete => write.old.as_deref(),
        Action::Insert(..) | Action::Update(_) => write.new.as_deref(),
    }
}

fn parse_image(image: &[u8]) -> Result<ImageRef<'_>, SqlError> {
    ImageRef::parse(image).map(|(image, ..)| image).map_err(|error| StoreError::Corrupt(error.to_string()).into())
}

fn cast_columns(arrays: &[ArrayRef], columns: &[Column]) -> Result<Vec<ArrayRef>, SqlError> {
    let cast =
        |(array, column): (&ArrayRef, &Column)| cast_for(&CastTarget { name: &column.name, ty: column.ty }, array);
    arrays.iter().zip(columns).map(cast).collect()
}

fn key_at(table: &Table, arrays: &[ArrayRef], row: usize) -> Vec<Value> {
    let columns = table.key.iter().filter_map(|id| table.column_by_id(*id));
    columns.zip(arrays).map(|(column, array)| value_at(array, row, column.ty)).collect()
}

fn check_null(table: &Table, column: &Column, value: &Value) -> Result<(), SqlError> {
    if *value == Value::Null && !column.nullable {
        let message = format!("column {:?} of table {:?} must not be NULL", column.name, table.name);
        return Err(SqlError::constraint("not_null", message));
    }
    Ok(())
}
