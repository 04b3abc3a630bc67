//! Groups: subscriptions with the same plan, parameters, scope and pipeline; evaluated and encoded once. Here is what
//! subscribers and the group's worker share, and the registry that says which groups there are.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use super::outlet::{AnyOutlet, FEW, Feeding, Feeds, Lent, Outlets, feed};
use super::tail::{EventsAfter, GroupEnd, GroupTail, lock};
use super::worker::Mailbox;
use super::{GroupSpec, SubscribeError};
use crate::store::Seq;
use crate::telemetry::Metrics;

pub(super) struct Group {
    /// Never reused; a group made anew under the same key is another one.
    pub id: u64,
    pub spec: Arc<GroupSpec>,
    pub worker: Arc<Mailbox>,
    tail: Mutex<GroupTail>,
    changed: Notify,
    /// Of those who wait without listening for `changed`.
    pub(super) outlets: Mutex<Outlets>,
    /// Which has the group only while there are seats, so neither keeps the other for ever.
    registry: Arc<Registry>,
    events: AtomicU64,
    bytes: AtomicU64,
}

impl Group {
    /// The worker starts to append: everything after `seq` will come by in the tail.
    pub(super) fn open(&self, seq: Seq) {
        lock(&self.tail).open(seq);
    }

    /// `count` events of one commit. [`feed_many`](Group::feed_many) comes after it.
    pub(super) fn append(&self, seq: Seq, count: usize, events: Bytes) {
        self.events.fetch_add(count as u64, Ordering::Relaxed);
        self.bytes.fetch_add(events.len() as u64, Ordering::Relaxed);
        let mut tail = lock(&self.tail);
        let before = tail.bytes();
        tail.append(seq, events, self.registry.budget.group);
        if !self.registry.budget.replace(before, tail.bytes()) {
            let before = tail.bytes();
            tail.forget_older(Duration::ZERO);
            self.registry.budget.replace(before, tail.bytes());
        }
        drop(tail);
        self.changed.notify_waiters();
    }

    /// After appending: whether those who only wait are many, and are being fed now. A few can be fed once for several
    /// commits ([`feed_few`](Group::feed_few)).
    pub(super) fn feed_many(self: &Arc<Self>) -> bool {
        let mut outlets = lock(&self.outlets);
        let many = !outlets.are_few(FEW);
        if many {
            self.start_feeding(&mut outlets);
        }
        many
    }

    /// What was appended goes to those who only wait for it: from here, the worker's thread, if they are no more than
    /// `most`, which is done sooner than others are woken to do it. Returns how many were fed from here.
    pub(super) fn feed_few(self: &Arc<Self>, most: usize) -> usize {
        // Whoever enters later finds what was appended.
        let mut outlets = lock(&self.outlets);
        if !outlets.are_few(most) {
            self.start_feeding(&mut outlets);
            return 0;
        }
        let few = outlets.all.clone();
        drop(outlets);
        feed(self, &few);
        few.len()
    }

    /// By tasks: to write to thousands of sockets takes as long as hundreds of commits. A feeding that is due finds what
    /// was appended.
    fn start_feeding(self: &Arc<Self>, outlets: &mut Outlets) {
        let before = std::mem::replace(&mut outlets.feeding, Feeds::Again);
        if before == Feeds::No {
            match self.registry.runtime.get() {
                Some(runtime) => drop(runtime.spawn(Feeding::start(Arc::clone(self)))),
                None => outlets.feeding = Feeds::No,
            }
        }
    }

    /// The outlets that are there now, if there is something to feed them since the last time.
    pub(super) fn next_feeding(&self) -> Option<Vec<AnyOutlet>> {
        let mut outlets = lock(&self.outlets);
        match outlets.feeding {
            Feeds::Again => {
                outlets.feeding = Feeds::Yes;
                Some(outlets.all.clone())
            }
            Feeds::Yes | Feeds::No => {
                outlets.feeding = Feeds::No;
                None
            }
        }
    }

    /// Events and bytes appended so far.
    pub(super) fn told(&self) -> (u64, u64) {
        (self.events.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }

    pub(super) fn forget_older(&self, age: Duration) {
        let mut tail = lock(&self.tail);
        let before = tail.bytes();
        tail.forget_older(age);
        self.registry.budget.replace(before, tail.bytes());
    }

    pub(super) fn end(&self, end: GroupEnd) {
        lock(&self.tail).end(end);
        self.changed.notify_waiters();
        lock(&self.outlets).all.iter().for_each(|outlet| outlet.wake());
    }

    pub(super) fn ended(&self) -> Option<GroupEnd> {
        lock(&self.tail).ended().cloned()
    }

    /// A query that is run again: a commit at `seq` may have changed its result.
    pub(super) fn touch(&self, seq: Seq) {
        lock(&self.tail).touch(seq);
    }

    pub(super) fn ran(&self, seq: Seq) {
        lock(&self.tail).ran(seq);
    }

    /// Whether the last answer of a query that is run again is older than a commit that touched its tables.
    pub(super) fn stale(&self) -> bool {
        lock(&self.tail).stale()
    }

    /// Whether a commit after `seq` touched the tables of a query that is run again.
    pub(super) fn touched_after(&self, seq: Seq) -> bool {
        lock(&self.tail).touched() > seq
    }

    /// How far everything is known (see [`GroupTail::settled`]).
    pub(super) fn settled(&self) -> Seq {
        let processed = self.worker.processed();
        lock(&self.tail).settled(processed)
    }

    /// Where the tail begins.
    pub(super) fn floor(&self) -> Seq {
        lock(&self.tail).floor()
    }

    /// Bytes of all that was told after `seq`; `None`: the tail no longer reaches back that far.
    pub(super) fn told_since(&self, seq: Seq) -> Option<usize> {
        lock(&self.tail).since(seq)
    }

    /// What waits after `cursor`, and how far the group was at that time.
    pub(super) fn after(&self, cursor: Seq, limit: usize) -> (EventsAfter, Seq) {
        // In this order: what the tail does not show up to `processed` has not happened. The other way round, a commit
        // between the two would be passed over unseen.
        let processed = self.worker.processed();
        let tail = lock(&self.tail);
        (tail.after(cursor, limit), tail.settled(processed))
    }

    /// The subscriber waits and its outlet is used, until what is returned is dropped. Within a runtime.
    pub(super) fn lend<'a>(&'a self, outlet: &'a AnyOutlet, cursor: &'a mut Seq) -> Lent<'a> {
        self.registry.runtime.get_or_init(Handle::current);
        Lent::new(self, outlet, cursor)
    }

    /// Resolves when something is appended, or the group ends, after this call (not after the first poll).
    pub(super) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.registry.budget.replace(lock(&self.tail).bytes(), 0);
    }
}

/// Bytes that the tails of all groups keep together. Many groups with full tails would else cost as much as there are
/// groups; over the bound a group keeps nothing and its laggards read the log.
pub(super) struct TailBudget {
    group: usize,
    all: usize,
    used: AtomicUsize,
}

/// Full tails that fit in memory at the same time. A tail serves the seconds between a commit and the slowest healthy
/// reader; far fewer groups than exist are busy in the same seconds.
const FULL_TAILS: usize = 64;

impl TailBudget {
    pub(super) fn new(group_tail_bytes: usize) -> Self {
        let all = group_tail_bytes.saturating_mul(FULL_TAILS);
        TailBudget { group: group_tail_bytes, all, used: AtomicUsize::new(0) }
    }

    /// Whether everything fits now.
    fn replace(&self, before: usize, after: usize) -> bool {
        let used = self.used.fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
        used.wrapping_add(after).wrapping_sub(before) <= self.all
    }
}

/// Which groups there are and how many subscriptions each has.
pub(super) struct Registry {
    groups: Mutex<Groups>,
    budget: TailBudget,
    max_subscriptions: usize,
    next_id: AtomicU64,
    metrics: Arc<Metrics>,
    /// Where subscribers run: known with the first that lends an outlet.
    runtime: OnceLock<Handle>,
}

#[derive(Default)]
struct Groups {
    by_key: HashMap<Vec<u8>, (Arc<Group>, usize)>,
    subscriptions: usize,
    closed: bool,
}

impl Registry {
    pub(super) fn new(group_tail_bytes: usize, max_subscriptions: usize, metrics: Arc<Metrics>) -> Self {
        Registry {
            groups: Mutex::default(),
            budget: TailBudget::new(group_tail_bytes),
            max_subscriptions,
            next_id: AtomicU64::new(1),
            metrics,
            runtime: OnceLock::new(),
        }
    }

    /// Takes a seat in the group of `spec`, made on `worker` if there is none.
    pub(super) fn enter(
        self: &Arc<Self>,
        spec: &Arc<GroupSpec>,
        worker: &Arc<Mailbox>,
    ) -> Result<Seat, SubscribeError> {
        let mut groups = lock(&self.groups);
        if groups.closed {
            return Err(SubscribeError::Closed);
        }
        if groups.subscriptions >= self.max_subscriptions {
            return Err(SubscribeError::TooMany(self.max_subscriptions));
        }
        groups.subscriptions += 1;
        self.metrics.subscriptions.inc();
        let group = match groups.by_key.entry(spec.key.clone()) {
            Entry::Occupied(mut entry) => {
                entry.get_mut().1 += 1;
                Arc::clone(&entry.get().0)
            }
            Entry::Vacant(entry) => {
                self.metrics.groups.inc();
                Arc::clone(&entry.insert((self.make(spec, worker), 1)).0)
            }
        };
        Ok(Seat { group })
    }

    fn make(self: &Arc<Self>, spec: &Arc<GroupSpec>, worker: &Arc<Mailbox>) -> Arc<Group> {
        Arc::new(Group {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            spec: Arc::clone(spec),
            worker: Arc::clone(worker),
            tail: Mutex::new(GroupTail::new()),
            changed: Notify::new(),
            outlets: Mutex::default(),
            registry: Arc::clone(self),
            events: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        })
    }

    /// Whether the last subscription of the group left with this one.
    fn leave(&self, group: &Arc<Group>) -> bool {
        let mut groups = lock(&self.groups);
        groups.subscriptions -= 1;
        self.metrics.subscriptions.dec();
        let Some((current, seats)) = groups.by_key.get_mut(&group.spec.key) else { return false };
        if !Arc::ptr_eq(current, group) {
            return false;
        }
        *seats -= 1;
        let last = *seats == 0;
        if last {
            groups.by_key.remove(&group.spec.key);
            self.metrics.groups.dec();
        }
        last
    }

    /// Ends a group for all its subscriptions. It leaves the registry first, so that whoever sees the end and
    /// subscribes again gets a fresh group.
    pub(super) fn end(&self, group: &Arc<Group>, end: GroupEnd) {
        let mut groups = lock(&self.groups);
        if groups.by_key.get(&group.spec.key).is_some_and(|(current, _)| Arc::ptr_eq(current, group)) {
            groups.by_key.remove(&group.spec.key);
            self.metrics.groups.dec();
        }
        drop(groups);
        group.end(end);
    }

    /// Ends all groups of a worker that stops.
    pub(super) fn end_all(&self, worker: &Arc<Mailbox>, end: &GroupEnd) {
        let all = lock(&self.groups).by_key.values().map(|(group, _)| Arc::clone(group)).collect::<Vec<_>>();
        for group in all.iter().filter(|group| Arc::ptr_eq(&group.worker, worker)) {
            self.end(group, end.clone());
        }
    }

    /// The group of this key.
    pub(super) fn group(&self, key: &[u8]) -> Option<Arc<Group>> {
        lock(&self.groups).by_key.get(key).map(|(group, _)| Arc::clone(group))
    }

    /// No more subscriptions.
    pub(super) fn close(&self) {
        lock(&self.groups).closed = true;
    }

    /// Subscriptions, groups.
    pub(super) fn counts(&self) -> (usize, usize) {
        let groups = lock(&self.groups);
        (groups.subscriptions, groups.by_key.len())
    }
}

/// One subscription's place in its group; dropping it leaves. One pointer: everything else the group knows.
pub(super) struct Seat {
    pub group: Arc<Group>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.group.registry.leave(&self.group) {
            self.group.worker.leave(self.group.id);
        }
    }
}
