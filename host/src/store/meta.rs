//! What the `default` family keeps beside user rows: the keys of the store's own data, and its records of fixed length.
//!
//! ```text
//! m/format               store format, u32
//! m/epoch                u64
//! m/state                applied seq, catalog version, log floor, commit time, bytes logged: u64 each; written with
//!                        every commit
//! m/floor                the highest seq no longer in the change log, u64; written with what trims it
//! m/clock                up to where time may have been read, i64 (see `store/clock.rs`)
//! m/catalog              next ids
//! n/{namespace u32}      a namespace
//! t/{table u32}          a table
//! i/{index u32}          an index
//! p/{namespace u32}{version u32}{name}   one version of a plugin
//! w/{sha256}             the bytes of a plugin
//! v/{namespace u32}{name}                the highest version of a deleted plugin
//! l/{namespace u32}{seq u64}             the change log: a wire::Frame
//! f/{number u64}         what a plugin failed on: a bounded list of records of the layers above
//! a/{number u64}         the audit log, see `store/audit.rs`
//! k/{seq u64}                            a mark in the change log: commit time and bytes logged so far, u64 each
//! r/… e/…                receipts of writes, see `store/receipts.rs`
//! s/{key}                settings of the layers above
//! h/{kind}/{key}         what the layers above hold for a while, see `store/notes.rs`
//! ```
//!
//! Integers in keys and fixed records are big-endian. What catalog records look like is in `store/records.rs`.

use super::{Seq, StoreError};
use crate::catalog::{IndexId, NamespaceId, TableId};

/// The store format this build writes, and the newest it reads. 1 had no altered tables; a directory of format 1 is
/// taken over as it is and marked as 2, so that an older build, which would misread it from then on, refuses it.
pub(super) const FORMAT: u32 = 2;
pub(super) const OLDEST_FORMAT: u32 = 1;

pub(super) const FORMAT_KEY: &[u8] = b"m/format";
pub(super) const EPOCH_KEY: &[u8] = b"m/epoch";
pub(super) const STATE_KEY: &[u8] = b"m/state";
pub(super) const CLOCK_KEY: &[u8] = b"m/clock";
pub(super) const FLOOR_KEY: &[u8] = b"m/floor";
pub(super) const CATALOG_KEY: &[u8] = b"m/catalog";
pub(super) const NAMESPACES: &[u8] = b"n/";
pub(super) const TABLES: &[u8] = b"t/";
pub(super) const INDEXES: &[u8] = b"i/";
pub(super) const PLUGINS: &[u8] = b"p/";
pub(super) const RETIRED: &[u8] = b"v/";
pub(super) const LOGS: &[u8] = b"l/";
const MARKS: &[u8] = b"k/";

pub(super) fn namespace_key(id: NamespaceId) -> Vec<u8> {
    [NAMESPACES, &id.0.to_be_bytes()].concat()
}

pub(super) fn table_key(id: TableId) -> Vec<u8> {
    [TABLES, &id.0.to_be_bytes()].concat()
}

pub(super) fn index_key(id: IndexId) -> Vec<u8> {
    [INDEXES, &id.0.to_be_bytes()].concat()
}

/// The name comes last, so that no name can be mistaken for another with something behind it.
pub(super) fn plugin_key(namespace: NamespaceId, version: u32, name: &str) -> Vec<u8> {
    [PLUGINS, &namespace.0.to_be_bytes(), &version.to_be_bytes(), name.as_bytes()].concat()
}

pub(super) fn retired_key(namespace: NamespaceId, name: &str) -> Vec<u8> {
    [RETIRED, &namespace.0.to_be_bytes(), name.as_bytes()].concat()
}

pub(super) fn wasm_key(sha256: &str) -> Vec<u8> {
    [b"w/", sha256.as_bytes()].concat()
}

pub(super) fn fault_key(number: u64) -> Vec<u8> {
    [&b"f/"[..], &number.to_be_bytes()].concat()
}

pub(super) fn read_fault_key(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.strip_prefix(b"f/")?.try_into().ok()?))
}

pub(super) fn audit_key(number: u64) -> Vec<u8> {
    [&b"a/"[..], &number.to_be_bytes()].concat()
}

pub(super) fn read_audit_key(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.strip_prefix(b"a/")?.try_into().ok()?))
}

pub(super) fn setting_key(key: &str) -> Vec<u8> {
    [b"s/", key.as_bytes()].concat()
}

pub(super) fn note_key(kind: &str, key: &[u8]) -> Vec<u8> {
    [b"h/", kind.as_bytes(), b"/", key].concat()
}

pub(super) fn log_prefix(namespace: NamespaceId) -> Vec<u8> {
    [LOGS, &namespace.0.to_be_bytes()].concat()
}

pub(super) fn log_key(namespace: NamespaceId, seq: Seq) -> Vec<u8> {
    [LOGS, &namespace.0.to_be_bytes(), &seq.0.to_be_bytes()].concat()
}

/// The inverse of [`log_key`].
pub(super) fn read_log_key(key: &[u8]) -> Option<(NamespaceId, Seq)> {
    let (namespace, seq) = key.strip_prefix(LOGS)?.split_at_checked(4)?;
    Some((NamespaceId(u32::from_be_bytes(namespace.try_into().ok()?)), Seq(u64::from_be_bytes(seq.try_into().ok()?))))
}

/// What every commit rewrites, in one record, so that one read through a snapshot says where the snapshot stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub applied: Seq,
    pub catalog_version: u64,
    /// The highest seq no longer in the change log.
    pub log_floor: Seq,
    /// Of the commit `applied`: the next one is not earlier.
    pub committed_at: i64,
    /// Bytes of all frames ever logged.
    pub logged: u64,
}

impl State {
    pub fn encode(self) -> [u8; 40] {
        let mut out = [0; 40];
        out[..8].copy_from_slice(&self.applied.0.to_be_bytes());
        out[8..16].copy_from_slice(&self.catalog_version.to_be_bytes());
        out[16..24].copy_from_slice(&self.log_floor.0.to_be_bytes());
        out[24..32].copy_from_slice(&self.committed_at.to_be_bytes());
        out[32..].copy_from_slice(&self.logged.to_be_bytes());
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<State, StoreError> {
        let word = |i: usize| Some(u64::from_be_bytes(bytes.get(i * 8..i * 8 + 8)?.try_into().ok()?));
        match (bytes.len(), word(0), word(1), word(2)) {
            // Format 1 said no time and counted no bytes.
            (24 | 40, Some(applied), Some(catalog_version), Some(log_floor)) => {
                let committed_at = word(3).map_or(0, |word| word as i64);
                let (applied, log_floor, logged) = (Seq(applied), Seq(log_floor), word(4).unwrap_or(0));
                Ok(State { applied, catalog_version, log_floor, committed_at, logged })
            }
            _ => Err(StoreError::Corrupt("the record m/state has the wrong length".to_owned())),
        }
    }
}

/// A place in the change log, left every so often: where it may be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub seq: Seq,
    pub committed_at: i64,
    /// Bytes of all frames up to here.
    pub logged: u64,
}

impl Mark {
    pub fn encode(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.committed_at.to_be_bytes());
        out[8..].copy_from_slice(&self.logged.to_be_bytes());
        out
    }

    /// `None`: the key is none of a mark.
    pub fn decode(key: &[u8], value: &[u8]) -> Result<Option<Mark>, StoreError> {
        let Some(seq) = key.strip_prefix(MARKS) else { return Ok(None) };
        match (seq.try_into(), value.split_first_chunk()) {
            (Ok(seq), Some((committed_at, logged))) if logged.len() == 8 => Ok(Some(Mark {
                seq: Seq(u64::from_be_bytes(seq)),
                committed_at: i64::from_be_bytes(*committed_at),
                logged: logged.iter().fold(0, |logged, byte| logged << 8 | u64::from(*byte)),
            })),
            _ => Err(StoreError::Corrupt("a mark of the change log has the wrong length".to_owned())),
        }
    }
}

pub(super) fn mark_key(seq: Seq) -> Vec<u8> {
    [MARKS, &seq.0.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_are_pinned() {
        assert_eq!(namespace_key(NamespaceId(1)), b"n/\0\0\0\x01");
        assert_eq!(table_key(TableId(0x102)), b"t/\0\0\x01\x02");
        assert_eq!(index_key(IndexId(0x102)), b"i/\0\0\x01\x02");
        assert_eq!(plugin_key(NamespaceId(1), 2, "late"), b"p/\0\0\0\x01\0\0\0\x02late");
        assert_eq!(retired_key(NamespaceId(1), "late"), b"v/\0\0\0\x01late");
        assert_eq!(wasm_key("ab"), b"w/ab");
        assert_eq!(setting_key("k"), b"s/k");
        assert_eq!(fault_key(0x102), b"f/\0\0\0\0\0\0\x01\x02");
        assert_eq!(read_fault_key(&fault_key(7)), Some(7));
        assert_eq!(audit_key(0x102), b"a/\0\0\0\0\0\0\x01\x02");
        assert_eq!((read_audit_key(&audit_key(7)), read_audit_key(&fault_key(7))), (Some(7), None));
        assert_eq!(log_key(NamespaceId(3), Seq(4)), b"l/\0\0\0\x03\0\0\0\0\0\0\0\x04");
        assert_eq!(read_log_key(&log_key(NamespaceId(3), Seq(4))), Some((NamespaceId(3), Seq(4))));
        assert_eq!(read_log_key(b"l/\0\0\0\x03\0"), None);
    }

    #[test]
    fn the_state_is_pinned() {
        let state = State { applied: Seq(1), catalog_version: 2, log_floor: Seq(3), committed_at: 4, logged: 5 };
        let bytes = state.encode();
        let first = [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3];
        assert_eq!(bytes[..24], first);
        assert_eq!(bytes[24..], [0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 5]);
        assert_eq!(State::decode(&bytes).unwrap(), state);
        assert_eq!(State::decode(&first).unwrap(), State { committed_at: 0, logged: 0, ..state });
        assert!(State::decode(&bytes[..23]).is_err() && State::decode(&bytes[..39]).is_err());
    }

    #[test]
    fn a_mark_is_pinned() {
        let mark = Mark { seq: Seq(3), committed_at: 4, logged: 0x105 };
        let bytes = [0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 1, 5];
        assert_eq!((mark_key(Seq(3)).as_slice(), mark.encode()), (&b"k/\0\0\0\0\0\0\0\x03"[..], bytes));
        assert_eq!(Mark::decode(&mark_key(Seq(3)), &bytes).unwrap(), Some(mark));
        assert_eq!(Mark::decode(b"l/", &bytes).unwrap(), None);
        assert!(Mark::decode(&mark_key(Seq(3)), &bytes[1..]).is_err());
    }
}
