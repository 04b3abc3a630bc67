//! From the rows of a planned statement to its change set: each row becomes a write, at most one a key, as the earlier
//! statements of the transaction have left what is stored.

use std::collections::HashMap;
use std::sync::Arc;

use ::arrow::array::ArrayRef;
use ::arrow::record_batch::RecordBatch;
use datafusion::execution::runtime_env::RuntimeEnv;
use uuid::Uuid;
use wire::{ImageBuilder, ImageRef, Scope, Type, Value};

use super::unique::Uniques;
use super::upsert::{OnConflict, Rivals};
use super::{Action, Target, is_generated, show_columns};
use crate::catalog::{Column, DefaultValue, IndexId, Table};
use crate::sql::arrow::{CastTarget, cast_for, value_at};
use crate::sql::lookup::StoredRow;
use crate::sql::pool::Held;
use crate::sql::provider::scope_of;
use crate::sql::row_exprs::RowExprs;
use crate::sql::{ChangeSet, RequestEnv, Returned, SqlError};
use crate::store::keys::encode_key;
use crate::store::{RowWrite, StoreError};

/// Rows of RETURNING that are evaluated at a time.
const RETURNED_ROWS: usize = 8_192;

/// Turns the query's rows into writes; everything it holds is counted against the memory pool.
pub(crate) struct Changes<'a> {
    pub(super) env: &'a RequestEnv,
    pub(super) table: Arc<Table>,
    pub(super) scope: Scope,
    action: Arc<Action>,
    returning: Option<RowExprs>,
    pub(super) writes: Vec<RowWrite>,
    /// Where in `writes` a key is: at most one write a key.
    pub(super) by_key: HashMap<Vec<u8>, usize>,
    /// Rows whose key changes: taken away at once, put back when all old keys are gone.
    moved: Vec<(Vec<Value>, Vec<u8>)>,
    pub(super) affected: u64,
    pub(super) uniques: Uniques,
    /// What rows written so far have in unique indexes; kept for ON CONFLICT alone.
    pub(super) claims: HashMap<(IndexId, Vec<u8>), Vec<u8>>,
    pub(super) held: Held,
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
            held: Held::none_yet(&runtime.memory_pool),
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
        Ok(ChangeSet { writes: self.writes, affected: self.affected, returned, held: Some(self.held) })
    }

    /// RETURNING of what was inserted and updated, or deleted: the writes, because there is one for each such row. (A key
    /// change has a second one, which takes the old row away and has no new one.)
    fn returned(&self) -> Result<Option<Returned>, SqlError> {
        let Some(returning) = &self.returning else { return Ok(None) };
        let (mut batches, held) = (Vec::new(), self.held.another());
        let images: Vec<&[u8]> = self.writes.iter().filter_map(|write| shown_image(&self.action, write)).collect();
        for images in images.chunks(RETURNED_ROWS) {
            let images = images.iter().map(|image| parse_image(image)).collect::<Result<Vec<_>, _>>()?;
            let batch = returning.batch(&images)?;
            held.grow(batch.get_array_memory_size())?;
            batches.push(batch);
        }
        Ok(Some(Returned { columns: returning.columns.clone(), batches, held }))
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
                if table.key.contains(&column.id) {
                    one_zero(value);
                }
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
    pub(super) fn replace(
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
                    let mut value = value_at(&values[at], row, column.ty);
                    check_null(&table, column, &value)?;
                    if table.key.contains(&column.id) {
                        one_zero(&mut value);
                    }
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
    pub(super) fn lookup(&self, key: &[u8]) -> Result<Option<Vec<u8>>, SqlError> {
        let pending = self.env.overlay.rows.get(&(self.table.id, self.scope.clone()));
        match pending.and_then(|rows| rows.get(key)) {
            Some(change) => Ok(change.clone()),
            None => Ok(self.env.snapshot.get(&self.table, &self.scope, key)?),
        }
    }

    /// A row under a key that must be free.
    pub(super) fn put_new(&mut self, key: &[Value], image: Vec<u8>) -> Result<(), SqlError> {
        let encoded = encode_key(&self.table, key);
        if let Some(at) = self.by_key.get(&encoded) {
            let write = &mut self.writes[*at];
            if write.new.is_some() {
                return Err(self.duplicate(key));
            }
            self.held.grow(image.len())?;
            write.new = Some(image);
            return Ok(());
        }
        if self.lookup(&encoded)?.is_some() {
            return Err(self.duplicate(key));
        }
        self.put(encoded, None, Some(image))
    }

    pub(super) fn put(&mut self, key: Vec<u8>, old: Option<Vec<u8>>, new: Option<Vec<u8>>) -> Result<(), SqlError> {
        let size = |image: &Option<Vec<u8>>| image.as_ref().map_or(0, Vec::len);
        let bytes = 2 * key.len() + size(&old) + size(&new) + size_of::<RowWrite>();
        self.held.grow(bytes)?;
        if self.by_key.insert(key.clone(), self.writes.len()).is_some() {
            return Err(SqlError::Internal(format!("two writes of one row of table {:?}", self.table.name)));
        }
        self.writes.push(RowWrite { table: self.table.clone(), scope: self.scope.clone(), key, old, new });
        Ok(())
    }

    fn duplicate(&self, key: &[Value]) -> SqlError {
        let shown = show_columns(&self.table, &self.table.key, key);
        let message = format!("table {:?} has a row with the key {shown} already", self.table.name);
        SqlError::constraint("duplicate_key", message)
    }
}

/// The row that RETURNING shows of a write, if any.
fn shown_image<'a>(action: &Action, write: &'a RowWrite) -> Option<&'a [u8]> {
    match action {
        Action::Delete => write.old.as_deref(),
        Action::Insert(..) | Action::Update(_) => write.new.as_deref(),
    }
}

pub(super) fn parse_image(image: &[u8]) -> Result<ImageRef<'_>, SqlError> {
    ImageRef::parse(image).map(|(image, ..)| image).map_err(|error| StoreError::Corrupt(error.to_string()).into())
}

pub(super) fn cast_columns(arrays: &[ArrayRef], columns: &[Column]) -> Result<Vec<ArrayRef>, SqlError> {
    let cast =
        |(array, column): (&ArrayRef, &Column)| cast_for(&CastTarget { name: &column.name, ty: column.ty }, array);
    arrays.iter().zip(columns).map(cast).collect()
}

fn key_at(table: &Table, arrays: &[ArrayRef], row: usize) -> Vec<Value> {
    let columns = table.key.iter().filter_map(|id| table.column_by_id(*id));
    columns.zip(arrays).map(|(column, array)| value_at(array, row, column.ty)).collect()
}

/// In a key -0.0 and 0.0 are one value, and it is shown as one.
fn one_zero(value: &mut Value) {
    if *value == Value::Float(0.0) {
        *value = Value::Float(0.0);
    }
}

fn check_null(table: &Table, column: &Column, value: &Value) -> Result<(), SqlError> {
    if *value == Value::Null && !column.nullable {
        let message = format!("column {:?} of table {:?} must not be NULL", column.name, table.name);
        return Err(SqlError::constraint("not_null", message));
    }
    Ok(())
}
