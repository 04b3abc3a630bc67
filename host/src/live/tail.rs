//! What is kept in memory, bounded by bytes: the recent commits for the workers, the recent events of one group for its
//! subscribers. What no longer fits is read from the change log; neither tail ever makes a writer wait.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::subscription::EndReason;
use crate::store::{Commit, Seq};

/// What an entry costs beside its bytes: queue slot, reference counts, the commit's own fields. Counted so that a flood
/// of tiny commits stays within the bound as well.
const ENTRY_OVERHEAD: usize = 160;

/// The recent commits of the server, oldest first.
pub(super) struct CommitTail {
    bound: usize,
    inner: Mutex<Commits>,
}

struct Commits {
    entries: VecDeque<Arc<Commit>>,
    bytes: usize,
    /// Every commit after this one is in `entries`.
    floor: Seq,
}

/// What a worker finds after its position.
pub(super) enum CommitsAfter {
    /// The next commits, in order; empty when there are none.
    Next(Vec<Arc<Commit>>),
    /// The tail no longer reaches back that far.
    Behind,
}

impl CommitTail {
    pub(super) fn new(bound: usize, applied: Seq) -> Self {
        let inner = Commits { entries: VecDeque::new(), bytes: 0, floor: applied };
        CommitTail { bound, inner: Mutex::new(inner) }
    }

    pub(super) fn push(&self, commit: &Arc<Commit>) {
        let mut inner = lock(&self.inner);
        inner.bytes += commit_cost(commit);
        inner.entries.push_back(Arc::clone(commit));
        while inner.bytes > self.bound {
            let Some(oldest) = inner.entries.pop_front() else { break };
            inner.bytes -= commit_cost(&oldest);
            inner.floor = oldest.seq;
        }
    }

    /// At most `count` commits after `seq`.
    pub(super) fn after(&self, seq: Seq, count: usize) -> CommitsAfter {
        let inner = lock(&self.inner);
        if seq < inner.floor {
            return CommitsAfter::Behind;
        }
        let start = inner.entries.partition_point(|commit| commit.seq <= seq);
        CommitsAfter::Next(inner.entries.range(start..).take(count).map(Arc::clone).collect())
    }
}

fn commit_cost(commit: &Commit) -> usize {
    commit.frame.len() + ENTRY_OVERHEAD
}

/// Why a group ended.
#[derive(Clone, Debug)]
pub(super) enum GroupEnd {
    Reason(EndReason),
    /// The worker fell behind the change log itself: what the group missed is gone.
    Expired,
}

/// The recent encoded events of one group, oldest first, one entry a commit.
pub(super) struct GroupTail {
    entries: VecDeque<(Seq, Bytes)>,
    bytes: usize,
    /// Events of every commit after this one (as far as the worker is) are in `entries`.
    floor: Seq,
    end: Option<GroupEnd>,
    appended: Instant,
}

/// What a subscriber finds after its cursor.
#[derive(Debug)]
pub(super) enum EventsAfter {
    /// Whole commits; `seq` is the cursor after them.
    Next {
        bytes: Bytes,
        seq: Seq,
    },
    Nothing,
    /// The tail no longer reaches back that far; replay from the log up to `floor`.
    Behind {
        floor: Seq,
    },
    /// The group ended, and there is nothing before the end that could still be had; `behind` when there was more.
    Ended {
        end: GroupEnd,
        behind: bool,
    },
}

impl GroupTail {
    pub(super) fn new() -> Self {
        GroupTail { entries: VecDeque::new(), bytes: 0, floor: Seq::default(), end: None, appended: Instant::now() }
    }

    /// The worker starts to append: everything after `seq` will come by here.
    pub(super) fn open(&mut self, seq: Seq) {
        self.floor = seq;
    }

    /// Appends the events of a commit; lets go of the oldest beyond `bound` bytes, be it this very one.
    pub(super) fn append(&mut self, seq: Seq, events: Bytes, bound: usize) {
        self.bytes += events.len() + ENTRY_OVERHEAD;
        self.entries.push_back((seq, events));
        self.appended = Instant::now();
        while self.bytes > bound && self.drop_oldest() {}
    }

    /// Lets go of everything when nothing was appended for `age`: whoever still needs it reads the log.
    pub(super) fn forget_older(&mut self, age: Duration) {
        if self.appended.elapsed() >= age {
            while self.drop_oldest() {}
        }
    }

    fn drop_oldest(&mut self) -> bool {
        let Some((seq, events)) = self.entries.pop_front() else { return false };
        self.bytes -= events.len() + ENTRY_OVERHEAD;
        self.floor = seq;
        true
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first end counts: what comes later is a consequence.
    pub(super) fn end(&mut self, end: GroupEnd) {
        self.end.get_or_insert(end);
    }

    pub(super) fn ended(&self) -> Option<&GroupEnd> {
        self.end.as_ref()
    }

    /// What waits for a subscriber at `cursor`, joined up to `limit` bytes: one commit as it is, several in one copy.
    pub(super) fn after(&self, cursor: Seq, limit: usize) -> EventsAfter {
        if cursor < self.floor {
            return match &self.end {
                Some(end) => EventsAfter::Ended { end: end.clone(), behind: true },
                None => EventsAfter::Behind { floor: self.floor },
            };
        }
        let start = self.entries.partition_point(|(seq, _)| *seq <= cursor);
        let mut waiting = self.entries.range(start..);
        let Some(&(mut last, ref first)) = waiting.next() else {
            let end = self.end.clone();
            return end.map_or(EventsAfter::Nothing, |end| EventsAfter::Ended { end, behind: false });
        };
        let mut joined = None::<BytesMut>;
        for (seq, events) in waiting {
            let so_far = joined.as_ref().map_or(first.len(), BytesMut::len);
            if so_far + events.len() > limit {
                break;
            }
            joined.get_or_insert_with(|| BytesMut::from(&first[..])).extend_from_slice(events);
            last = *seq;
        }
        EventsAfter::Next { bytes: joined.map_or_else(|| first.clone(), BytesMut::freeze), seq: last }
    }
}

/// A lock whose holder cannot leave half-made state behind: a panic elsewhere must not stop the commit thread.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
