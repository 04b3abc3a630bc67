//! The audit log: what was done and what was refused, as the layers above say it. Newest last; the oldest go.
//!
//! ```text
//! a/{number u64}   format (1 byte) | time i64 | seq u64, 0 where no commit did it | what is said
//! ```
//!
//! What is said of a commit is in the batch of that commit ([`super::commit`]): neither is there without the other. The
//! rest is written beside commits, and may be written again under its number when there is more to say of the same.

use std::sync::atomic::{AtomicU64, Ordering};

use rocksdb::{DB, Direction, IteratorMode, WriteBatch, WriteOptions};

use super::{Inner, Seq, Store, StoreError, meta, read_error};

const RECORD_VERSION: u8 = 1;
/// Records removed for their age in one look of the retention thread.
const SWEPT: usize = 10_000;
/// The log is trimmed by its length when it is this much longer than asked for: range deletions cost readers.
const SLACK_RECORDS: u64 = 1_000;
/// And by age when its oldest record is older than asked for by such a part.
const AGE_PARTS: i64 = 16;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditRecord {
    /// From 1; rises, with gaps.
    pub number: u64,
    /// Microseconds since 1970.
    pub at: i64,
    /// Of the commit that it is about.
    pub seq: Option<Seq>,
    /// For the layers above to read.
    pub said: Vec<u8>,
}

/// Where the log begins and ends.
pub(super) struct Audit {
    /// The newest number that was given; 0 before the first.
    newest: AtomicU64,
    /// Records up to this one are gone.
    floor: AtomicU64,
}

impl Audit {
    pub(super) fn open(db: &DB) -> Result<Audit, StoreError> {
        let mut cursor = db.raw_iterator();
        cursor.seek_for_prev(meta::audit_key(u64::MAX));
        let newest = cursor.key().and_then(meta::read_audit_key).unwrap_or(0);
        cursor.status().map_err(read_error)?;
        cursor.seek(meta::audit_key(0));
        let oldest = cursor.key().and_then(meta::read_audit_key).unwrap_or(1);
        cursor.status().map_err(read_error)?;
        Ok(Audit { newest: AtomicU64::new(newest), floor: AtomicU64::new(oldest.saturating_sub(1)) })
    }

    fn number(&self) -> u64 {
        self.newest.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Key and value of a new record.
    pub(super) fn next(&self, at: i64, seq: Option<Seq>, said: &[u8]) -> (Vec<u8>, Vec<u8>) {
        (meta::audit_key(self.number()), encode(at, seq, said))
    }
}

fn encode(at: i64, seq: Option<Seq>, said: &[u8]) -> Vec<u8> {
    let seq = seq.map_or(0, |seq| seq.0);
    [&[RECORD_VERSION][..], &at.to_be_bytes(), &seq.to_be_bytes(), said].concat()
}

fn decode(number: u64, record: &[u8]) -> Result<AuditRecord, StoreError> {
    let damaged = || StoreError::Corrupt(format!("record {number} of the audit log cannot be read"));
    let rest = record.strip_prefix(&[RECORD_VERSION]).ok_or_else(damaged)?;
    let (at, rest) = rest.split_first_chunk().ok_or_else(damaged)?;
    let (seq, said) = rest.split_first_chunk().ok_or_else(damaged)?;
    let seq = Some(Seq(u64::from_be_bytes(*seq))).filter(|seq| seq.0 > 0);
    Ok(AuditRecord { number, at: i64::from_be_bytes(*at), seq, said: said.to_vec() })
}

impl Store {
    /// For a record that [`Store::leave_audit`] will write.
    pub fn next_audit_number(&self) -> u64 {
        self.inner.audit.number()
    }

    /// Writes records, all or none: they outlast a crash of this process, but a power cut may take the newest. A record
    /// under the same number is replaced; one that was trimmed stays gone.
    pub fn leave_audit(&self, records: &[AuditRecord]) -> Result<(), StoreError> {
        if self.failed() {
            return Err(self.inner.refusal());
        }
        let floor = self.inner.audit.floor.load(Ordering::Acquire);
        let mut batch = WriteBatch::default();
        for record in records.iter().filter(|record| record.number > floor) {
            batch.put(meta::audit_key(record.number), encode(record.at, record.seq, &record.said));
        }
        self.inner.db.write(batch).map_err(read_error)
    }

    /// Records before number `before`, newest first, `most` at most. What is beyond the number of records to be kept is
    /// not shown, removed or not.
    pub fn audit(&self, before: u64, most: usize) -> Result<Vec<AuditRecord>, StoreError> {
        let Inner { db, audit, audit_records, .. } = &*self.inner;
        let newest = audit.newest.load(Ordering::Acquire);
        let floor = audit.floor.load(Ordering::Acquire).max(newest.saturating_sub(*audit_records));
        let from = meta::audit_key(before.saturating_sub(1));
        let mut found = Vec::new();
        for entry in db.iterator(IteratorMode::From(&from, Direction::Reverse)) {
            let (key, record) = entry.map_err(read_error)?;
            let wanted = |number: &u64| *number > floor && found.len() < most;
            let Some(number) = meta::read_audit_key(&key).filter(wanted) else { break };
            found.push(decode(number, &record)?);
        }
        Ok(found)
    }
}

/// Removes the oldest records: those beyond the number to be kept, and those beyond their age. One range deletion, and
/// only when it is worth one.
pub(super) fn trim(inner: &Inner) -> Result<(), StoreError> {
    if inner.failure.get().is_some() {
        return Ok(());
    }
    let newest = inner.audit.newest.load(Ordering::Acquire);
    let floor = inner.audit.floor.load(Ordering::Acquire);
    let keep = inner.audit_records;
    let slack = (keep / 8).clamp(1, SLACK_RECORDS);
    let is_long = newest.saturating_sub(floor) >= keep.saturating_add(slack);
    let mut upto = if is_long { newest - keep } else { floor };
    let oldest = inner.clock.now().saturating_sub(inner.audit_age_micros);
    // The first has to be older than the others to make a beginning.
    let mut due = oldest.saturating_sub(inner.audit_age_micros / AGE_PARTS);
    let from = meta::audit_key(upto + 1);
    for entry in inner.db.iterator(IteratorMode::From(&from, Direction::Forward)).take(SWEPT) {
        let (key, record) = entry.map_err(read_error)?;
        // The newest stays: from it the next start knows which numbers were given.
        let Some(number) = meta::read_audit_key(&key).filter(|number| *number < newest) else { break };
        if decode(number, &record)?.at > due {
            break;
        }
        (upto, due) = (number, oldest);
    }
    if upto <= floor {
        return Ok(());
    }
    let mut batch = WriteBatch::default();
    // From the first number on: what a failed attempt left is in it.
    batch.delete_range(meta::audit_key(0), meta::audit_key(upto + 1));
    inner.audit.floor.fetch_max(upto, Ordering::AcqRel);
    inner.db.write_opt(batch, &WriteOptions::default()).map_err(read_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_pinned() {
        let bytes = encode(-2, Some(Seq(0x103)), b"x");
        assert_eq!(bytes, b"\x01\xff\xff\xff\xff\xff\xff\xff\xfe\0\0\0\0\0\0\x01\x03x");
        let record = AuditRecord { number: 9, at: -2, seq: Some(Seq(0x103)), said: b"x".to_vec() };
        assert_eq!(decode(9, &bytes).unwrap(), record);
        assert_eq!(decode(9, &encode(1, None, b"")).unwrap().seq, None);
        assert!(decode(9, &bytes[..16]).is_err() && decode(9, &bytes[1..]).is_err() && decode(9, b"").is_err());
    }
}
