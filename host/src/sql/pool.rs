//! The memory of all statements together.
//!
//! Queries share it fairly where they can spill; what cannot spill takes what is there. A part is kept from queries, for
//! what statements write: or one query that takes all it can get would make other people's writes fail.

use std::fmt;
use std::sync::Arc;

use datafusion::common::{DataFusionError, Result};
use datafusion::execution::memory_pool::{
    FairSpillPool, MemoryConsumer, MemoryLimit, MemoryPool, MemoryReservation, human_readable_size,
};

use super::SqlError;
use super::error::from_datafusion;

/// The consumer that changes wait in until they are committed.
const CHANGE_SET: &str = "change set";

/// Of the whole, for change sets alone.
const KEPT: usize = 8;

/// Memory of changes, given back when this is dropped.
#[derive(Debug)]
pub struct Held(MemoryReservation);

impl Held {
    pub(crate) fn none_yet(pool: &Arc<dyn MemoryPool>) -> Held {
        Held(MemoryConsumer::new(CHANGE_SET).register(pool))
    }

    /// Takes more, or says that there is no more.
    pub fn grow(&self, bytes: usize) -> std::result::Result<(), SqlError> {
        self.0.try_grow(bytes).map_err(|error| from_datafusion(error, ""))
    }

    /// As much again as nothing, in the same place.
    pub(crate) fn another(&self) -> Held {
        Held(self.0.new_empty())
    }
}

#[derive(Debug)]
pub(crate) struct StatementPool {
    pool: FairSpillPool,
    bytes: usize,
}

impl StatementPool {
    pub(crate) fn new(bytes: usize) -> StatementPool {
        StatementPool { pool: FairSpillPool::new(bytes), bytes }
    }
}

impl MemoryPool for StatementPool {
    fn name(&self) -> &str {
        "statements"
    }

    fn register(&self, consumer: &MemoryConsumer) {
        self.pool.register(consumer);
    }

    fn unregister(&self, consumer: &MemoryConsumer) {
        self.pool.unregister(consumer);
    }

    fn grow(&self, reservation: &MemoryReservation, additional: usize) {
        self.pool.grow(reservation, additional);
    }

    fn shrink(&self, reservation: &MemoryReservation, shrink: usize) {
        self.pool.shrink(reservation, shrink);
    }

    fn try_grow(&self, reservation: &MemoryReservation, additional: usize) -> Result<()> {
        let name = reservation.consumer().name();
        let left = (self.bytes - self.bytes / KEPT).saturating_sub(self.pool.reserved());
        if name != CHANGE_SET && additional > left {
            let [asked, left] = [additional, left].map(human_readable_size);
            let message = format!("{asked} more for {name}, {left} are left for queries");
            return Err(DataFusionError::ResourcesExhausted(message));
        }
        self.pool.try_grow(reservation, additional)
    }

    fn reserved(&self) -> usize {
        self.pool.reserved()
    }

    fn memory_limit(&self) -> MemoryLimit {
        MemoryLimit::Finite(self.bytes)
    }
}

impl fmt::Display for StatementPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "statements({})", human_readable_size(self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_leave_room_for_changes() {
        let pool: Arc<dyn MemoryPool> = Arc::new(StatementPool::new(800));
        let query = MemoryConsumer::new("a join").register(&pool);
        let sort = MemoryConsumer::new("a sort").with_can_spill(true).register(&pool);
        assert!(query.try_grow(701).is_err());
        query.try_grow(600).unwrap();
        assert!(sort.try_grow(101).is_err() && query.try_grow(101).is_err());
        sort.try_grow(100).unwrap();
        let changes = MemoryConsumer::new(CHANGE_SET).register(&pool);
        assert!(changes.try_grow(101).is_err(), "no more than there is");
        changes.try_grow(100).unwrap();
        drop((query, sort));
        changes.try_grow(700).unwrap();
        assert_eq!(pool.reserved(), 800);
    }
}
