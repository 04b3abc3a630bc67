//! A bounded list of records beside the commits: what plugins failed on, kept for whoever looks. Newest last; the oldest
//! go when there are too many. Written without a sync of its own: a record that a power cut takes costs nobody data.

use std::sync::atomic::{AtomicU64, Ordering};

use rocksdb::{DB, Direction, IteratorMode, WriteBatch};

use super::{DEFAULT_FAMILY, Store, StoreError, family, meta, read_error};

/// Records kept.
const KEPT: u64 = 10_000;

/// The number of the newest record; 0 before the first.
pub(super) struct Faults(AtomicU64);

impl Faults {
    pub(super) fn open(db: &DB) -> Faults {
        let mut cursor = db.raw_iterator_cf(family(db, DEFAULT_FAMILY));
        cursor.seek_for_prev(meta::fault_key(u64::MAX));
        let newest = cursor.key().and_then(meta::read_fault_key).unwrap_or(0);
        Faults(AtomicU64::new(newest))
    }
}

impl Store {
    /// Appends records.
    pub fn append_faults(&self, records: &[Vec<u8>]) -> Result<(), StoreError> {
        if records.is_empty() || self.failed() {
            return Ok(());
        }
        let first = self.inner.faults.0.fetch_add(records.len() as u64, Ordering::Relaxed) + 1;
        let newest = first + records.len() as u64 - 1;
        let mut batch = WriteBatch::default();
        for (number, record) in (first..).zip(records) {
            batch.put(meta::fault_key(number), record);
        }
        if newest > KEPT {
            let default = family(&self.inner.db, DEFAULT_FAMILY);
            batch.delete_range_cf(default, meta::fault_key(0), meta::fault_key(newest - KEPT + 1));
        }
        self.inner.db.write(batch).map_err(read_error)
    }

    /// The record of a number, while it is kept.
    pub fn fault(&self, number: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.inner.db.get(meta::fault_key(number)).map_err(read_error)
    }

    /// The newest records with their numbers, newest first, up to `limit` that `take` wants.
    pub fn faults<T>(
        &self,
        limit: usize,
        mut take: impl FnMut(u64, &[u8]) -> Result<Option<T>, StoreError>,
    ) -> Result<Vec<T>, StoreError> {
        let mut found = Vec::new();
        let from = meta::fault_key(u64::MAX);
        for entry in self.inner.db.iterator(IteratorMode::From(&from, Direction::Reverse)) {
            let (key, value) = entry.map_err(read_error)?;
            let Some(number) = meta::read_fault_key(&key).filter(|_| found.len() < limit) else { break };
            found.extend(take(number, &value)?);
        }
        Ok(found)
    }
}
