//! Small things that the layers above hold for a while, by kind and key, beside the commits: what must outlast this
//! process without being anybody's data.

use rocksdb::{Direction, IteratorMode, WriteBatch, WriteOptions};

use super::{Store, StoreError, meta, read_error, synced};

/// Key and value of a note.
pub type Note = (Vec<u8>, Vec<u8>);

/// A note to be put, or removed where there is no value.
pub type NoteWrite = (Vec<u8>, Option<Vec<u8>>);

impl Store {
    /// All notes of a kind, key and value, in the order of their keys.
    pub fn notes(&self, kind: &str) -> Result<Vec<Note>, StoreError> {
        let prefix = meta::note_key(kind, b"");
        let mut found = Vec::new();
        for entry in self.inner.db.iterator(IteratorMode::From(&prefix, Direction::Forward)) {
            let (key, value) = entry.map_err(read_error)?;
            let Some(key) = key.strip_prefix(prefix.as_slice()) else { break };
            found.push((key.to_vec(), value.into_vec()));
        }
        Ok(found)
    }

    /// All or none, and so is what the audit log is to say of it; durable when it returns.
    pub fn put_notes(&self, kind: &str, notes: &[NoteWrite], audit: &[Vec<u8>]) -> Result<(), StoreError> {
        self.write_notes(kind, notes, audit, &synced())
    }

    /// All or none, there after a crash of this process: a power cut may take the newest.
    pub fn leave_notes(&self, kind: &str, notes: &[NoteWrite]) -> Result<(), StoreError> {
        self.write_notes(kind, notes, &[], &WriteOptions::default())
    }

    fn write_notes(
        &self,
        kind: &str,
        notes: &[NoteWrite],
        audit: &[Vec<u8>],
        options: &WriteOptions,
    ) -> Result<(), StoreError> {
        if self.failed() {
            return Err(self.inner.refusal());
        }
        let mut batch = WriteBatch::default();
        for (key, value) in notes {
            let key = meta::note_key(kind, key);
            match value {
                Some(value) => batch.put(key, value),
                None => batch.delete(key),
            }
        }
        for said in audit {
            let (key, record) = self.inner.audit.next(self.inner.clock.now(), None, said);
            batch.put(key, record);
        }
        self.inner.db.write_opt(batch, options).map_err(read_error)
    }
}
