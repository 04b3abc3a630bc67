//! Key bytes: `{namespace}:{table}:{user_id}:{row_id}` in order-preserving, collision-free encoding.

use std::ops::Bound;

use wire::Value;

use crate::catalog::Table;

/// Encodes key column values (in key order) so that bytes sort as the values do. Given fewer values than key columns,
/// the result is the common prefix of all keys that start with them.
pub fn encode_key(_table: &Table, _values: &[Value]) -> Vec<u8> {
    todo!()
}

/// A range of encoded keys within one table and scope.
#[derive(Clone, Debug)]
pub struct KeyRange {
    pub start: Bound<Vec<u8>>,
    pub end: Bound<Vec<u8>>,
}

impl KeyRange {
    pub fn all() -> Self {
        KeyRange { start: Bound::Unbounded, end: Bound::Unbounded }
    }

    /// All keys that start with `prefix` (an [`encode_key`] of leading key columns).
    pub fn prefix(_prefix: Vec<u8>) -> Self {
        todo!()
    }
}
