//! A live query compiled: one table, one predicate, projections, evaluated over row images.

use std::ops::Bound;
use std::sync::Arc;

use ::arrow::record_batch::RecordBatch;
use wire::{ImageRef, Scope};

use super::{OutputColumn, SqlError};
use crate::catalog::Table;
use crate::store::keys::KeyRange;

/// The compiled plan; shared by every subscription of the group.
pub struct LivePlan {
    pub table: Arc<Table>,
    pub scope: Scope,
    /// The output columns of the SELECT list.
    pub columns: Vec<OutputColumn>,
    /// The same for equal queries after normalisation (spelling, parameters, table id; not the user).
    pub fingerprint: u64,
    /// Key range that a snapshot has to scan.
    pub range: KeyRange,
    // compiled expressions: filled by the sql module's author
}

impl LivePlan {
    /// Which rows match: NULL is no match. Evaluation errors of matching-candidate rows fail the call.
    pub fn matches(&self, _rows: &[ImageRef<'_>]) -> Result<Vec<bool>, SqlError> {
        let _ = Bound::<()>::Unbounded;
        todo!()
    }

    /// The SELECT list over rows that matched.
    pub fn project(&self, _rows: &[ImageRef<'_>]) -> Result<RecordBatch, SqlError> {
        todo!()
    }
}
