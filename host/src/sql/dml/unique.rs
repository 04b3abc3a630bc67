//! Unique indexes: whether what a statement writes keeps them unique.
//!
//! Judged by what there is when the statement has ended, so values may be swapped between rows. Only the writer's own
//! scope is looked at: rows of other users are in nobody's way and in no message. What others commit meanwhile is found
//! by the committer, which is told the values that a transaction claims.

use std::collections::HashMap;
use std::sync::Arc;

use wire::Scope;

use super::changes::{Changes, parse_image};
use super::show_columns;
use crate::catalog::{Index, IndexId, Table};
use crate::sql::{RequestEnv, SqlError};
use crate::store::index::index_values;

/// The unique indexes of a table, as the earlier statements of the transaction have left them.
pub(super) struct Uniques {
    pub(super) indexes: Vec<Arc<Index>>,
    /// By index and values, the key of the row that an earlier statement gave them to.
    pending: HashMap<(IndexId, Vec<u8>), Vec<u8>>,
}

impl Uniques {
    pub(super) fn new(env: &RequestEnv, table: &Table, scope: &Scope) -> Result<Uniques, SqlError> {
        let indexes: Vec<_> = table.indexes.iter().filter(|index| index.is_enforced()).cloned().collect();
        let mut pending = HashMap::new();
        let rows = env.overlay.rows.get(&(table.id, scope.clone())).filter(|_| !indexes.is_empty());
        for (key, image) in rows.into_iter().flatten() {
            let Some(image) = image else { continue };
            for index in &indexes {
                if let Some(values) = claimed(table, index, image)? {
                    pending.insert((index.id, values), key.clone());
                }
            }
        }
        Ok(Uniques { indexes, pending })
    }
}

/// The values of a row that no other may have; `None` where one of them is NULL.
pub(super) fn claimed(table: &Table, index: &Index, image: &[u8]) -> Result<Option<Vec<u8>>, SqlError> {
    let values = index_values(table, index, &parse_image(image)?)?;
    Ok((!values.has_null).then_some(values.bytes))
}

impl Changes<'_> {
    /// Refuses what would be there twice.
    pub(super) fn check_unique(&mut self) -> Result<(), SqlError> {
        for index in self.uniques.indexes.clone() {
            let mut holders: HashMap<Vec<u8>, usize> = HashMap::new();
            for (at, write) in self.writes.iter().enumerate() {
                let Some(new) = &write.new else { continue };
                let Some(values) = claimed(&self.table, &index, new)? else { continue };
                self.held.grow(values.len() + size_of::<(Vec<u8>, usize)>())?;
                if holders.insert(values, at).is_some() {
                    return Err(self.not_unique(&index, at));
                }
            }
            for (values, at) in holders {
                let old = self.writes[at].old.as_deref();
                let kept = old.map(|old| claimed(&self.table, &index, old)).transpose()?.flatten();
                if kept.as_ref() != Some(&values) && self.holder(&index, values)?.is_some() {
                    return Err(self.not_unique(&index, at));
                }
            }
        }
        Ok(())
    }

    /// The key of the row that has these values and that this statement leaves as it is.
    pub(super) fn holder(&self, index: &Arc<Index>, values: Vec<u8>) -> Result<Option<Vec<u8>>, SqlError> {
        let claim = (index.id, values);
        let key = match self.uniques.pending.get(&claim) {
            Some(key) => Some(key.clone()),
            None => {
                let found = self.env.snapshot.find_in_index(&self.table, index, &self.scope, claim.1)?;
                // What an earlier statement wrote anew has other values now, or it would be among the pending ones.
                let pending = self.env.overlay.rows.get(&(self.table.id, self.scope.clone()));
                found.filter(|key| pending.is_none_or(|rows| !rows.contains_key(key)))
            }
        };
        Ok(key.filter(|key| !self.by_key.contains_key(key)))
    }

    fn not_unique(&self, index: &Index, at: usize) -> SqlError {
        let image = self.writes[at].new.as_deref().and_then(|image| parse_image(image).ok());
        let columns = index.columns.iter().filter_map(|id| self.table.column_by_id(*id));
        let values = columns.filter_map(|column| image?.value(column.id, column.ty).ok());
        let shown = show_columns(&self.table, &index.columns, &values.collect::<Vec<_>>());
        let message =
            format!("table {:?} has a row with {shown} already, and index {:?} is unique", self.table.name, index.name);
        SqlError::constraint("duplicate_key", message)
    }
}
