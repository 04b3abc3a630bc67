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
    /// Of a query that is run again: the last commit that touched its tables, and the place of its last result.
    touched: Seq,
    ran: Seq,
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
        GroupTail {
            entries: VecDeque::new(),
            bytes: 0,
            floor: Seq::default(),
            end: None,
            appended: Instant::now(),
            touched: Seq::default(),
            ran: Seq::default(),
        }
    }

    /// The worker starts to append: everything after `seq` will come by here.
    pub(super) fn open(&mut self, seq: Seq) {
        self.floor = seq;
    }

    /// A commit at `seq` may have changed the result.
    pub(super) fn touch(&mut self, seq: Seq) {
        self.touched = self.touched.max(seq);
    }

    pub(super) fn touched(&self) -> Seq {
        self.touched
    }

    /// The result was looked at as of `seq`; what that brought has been appended.
    pub(super) fn ran(&mut self, seq: Seq) {
        self.ran = seq;
    }

    /// How far the result is known, when the worker has seen the commits up to `processed`: while a touched query waits
    /// to be run again, no further than its last result.
    pub(super) fn settled(&self, processed: Seq) -> Seq {
        if self.stale() { self.ran } else { processed.max(self.ran) }
    }

    pub(super) fn stale(&self) -> bool {
        self.touched > self.ran
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

    pub(super) fn floor(&self) -> Seq {
        self.floor
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

    /// Bytes of the events after `seq`, unless some of them are not here any more.
    pub(super) fn since(&self, seq: Seq) -> Option<usize> {
        let start = self.entries.partition_point(|(of, _)| *of <= seq);
        (seq >= self.floor).then(|| self.entries.range(start..).map(|(_, events)| events.len()).sum())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::NamespaceId;

    fn commit(seq: u64, bytes: usize) -> Arc<Commit> {
        let (namespace, frame) = (NamespaceId(1), vec![0; bytes].into());
        Arc::new(Commit { seq: Seq(seq), namespace, frame, tables: Vec::new(), catalog: None })
    }

    fn seqs(after: CommitsAfter) -> Option<Vec<u64>> {
        match after {
            CommitsAfter::Next(commits) => Some(commits.iter().map(|commit| commit.seq.0).collect()),
            CommitsAfter::Behind => None,
        }
    }

    #[test]
    fn the_commit_tail_keeps_what_fits_and_knows_what_it_lost() {
        let tail = CommitTail::new(3 * (ENTRY_OVERHEAD + 10), Seq(5));
        assert_eq!(seqs(tail.after(Seq(5), 9)), Some(vec![]));
        assert_eq!(seqs(tail.after(Seq(4), 9)), None);
        // Gaps are allowed.
        for seq in [6, 8, 9] {
            tail.push(&commit(seq, 10));
        }
        assert_eq!(seqs(tail.after(Seq(5), 9)), Some(vec![6, 8, 9]));
        assert_eq!(seqs(tail.after(Seq(7), 1)), Some(vec![8]));
        tail.push(&commit(10, 10));
        assert_eq!(seqs(tail.after(Seq(5), 9)), None);
        assert_eq!(seqs(tail.after(Seq(6), 9)), Some(vec![8, 9, 10]));
        // One that does not fit at all goes to the log alone, with everything before it.
        tail.push(&commit(11, 10_000));
        assert_eq!(seqs(tail.after(Seq(10), 9)), None);
        assert_eq!(seqs(tail.after(Seq(11), 9)), Some(vec![]));
    }

    fn group_tail(texts: &[(u64, &'static str)], bound: usize) -> GroupTail {
        let mut tail = GroupTail::new();
        tail.open(Seq(10));
        for (seq, text) in texts {
            tail.append(Seq(*seq), Bytes::from_static(text.as_bytes()), bound);
        }
        tail
    }

    /// What a subscriber gets, as text: `seq:bytes`, or a word.
    fn told(tail: &GroupTail, cursor: u64, limit: usize) -> String {
        match tail.after(Seq(cursor), limit) {
            EventsAfter::Next { bytes, seq } => format!("{}:{}", seq.0, std::str::from_utf8(&bytes).unwrap()),
            EventsAfter::Nothing => "nothing".to_owned(),
            EventsAfter::Behind { floor } => format!("behind {}", floor.0),
            EventsAfter::Ended { behind, .. } => format!("ended, behind: {behind}"),
        }
    }

    #[test]
    fn a_subscriber_gets_whole_commits_joined_up_to_the_limit() {
        let tail = group_tail(&[(11, "aa"), (13, "bb"), (14, "cc")], 1 << 20);
        for (cursor, limit, expected) in [
            (9, 100, "behind 10"),
            (10, 100, "14:aabbcc"),
            (10, 5, "13:aabb"),
            // The first commit goes out whole however large it is.
            (10, 0, "11:aa"),
            (11, 100, "14:bbcc"),
            (12, 100, "14:bbcc"),
            (13, 100, "14:cc"),
            (14, 100, "nothing"),
            (99, 100, "nothing"),
        ] {
            assert_eq!(told(&tail, cursor, limit), expected, "at {cursor}, {limit} bytes");
        }
    }

    #[test]
    fn the_group_tail_is_bounded_and_forgets_when_quiet() {
        let mut tail = group_tail(&[(11, "aa"), (12, "bb"), (13, "cc")], 2 * (ENTRY_OVERHEAD + 2));
        assert_eq!(told(&tail, 10, 100), "behind 11");
        assert_eq!(told(&tail, 11, 100), "13:bbcc");
        tail.forget_older(Duration::from_secs(3600));
        assert_eq!(told(&tail, 11, 100), "13:bbcc");
        tail.forget_older(Duration::ZERO);
        assert_eq!((tail.bytes(), told(&tail, 12, 100)), (0, "behind 13".to_owned()));
        assert_eq!(told(&tail, 13, 100), "nothing");
    }

    #[test]
    fn the_end_comes_after_what_was_before_it() {
        let mut tail = group_tail(&[(11, "aa")], 1 << 20);
        tail.end(GroupEnd::Expired);
        tail.end(GroupEnd::Reason(EndReason::Shutdown));
        assert_eq!(told(&tail, 10, 100), "11:aa");
        assert_eq!(told(&tail, 11, 100), "ended, behind: false");
        assert_eq!(told(&tail, 9, 100), "ended, behind: true");
        assert!(matches!(tail.ended(), Some(GroupEnd::Expired)), "the first end counts");
    }
}
