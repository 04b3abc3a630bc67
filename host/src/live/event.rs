//! What happened to a group's result at one commit: rows in columns, to be encoded once.

use arrow::record_batch::RecordBatch;
use wire::Op;

use crate::store::Seq;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventOp {
    Insert,
    Update,
    /// The row is gone from the table.
    Deleted,
    /// The row is still there but no longer in the result.
    MovedOut,
    /// Feed semantics: one output of a change, in `new`.
    Change(Op),
}

/// One event; the numbers are rows of the batches in [`CommitEvents`].
#[derive(Clone, Copy, Debug)]
pub struct EventRow {
    pub op: EventOp,
    pub key: usize,
    /// Row of `new` (insert, update, change).
    pub new: Option<usize>,
    /// Row of `old` (update, delete).
    pub old: Option<usize>,
    /// When the new row of a stream table stops showing, microseconds since 1970: no event will say so.
    pub expires: Option<i64>,
}

/// All events of one commit for one group, or a piece of a snapshot.
pub struct CommitEvents {
    pub seq: Seq,
    /// Snapshot rows: no ids, `"snapshot":true`.
    pub snapshot: bool,
    pub events: Vec<EventRow>,
    /// Key columns, named as in the table.
    pub keys: RecordBatch,
    /// Output rows as they are after the commit, and as they were before it.
    pub new: RecordBatch,
    pub old: RecordBatch,
}
