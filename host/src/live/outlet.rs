//! The short way of events: to where subscribers that only wait want them, without waking each.
//!
//! A subscriber that was told everything has nothing to do before the next commit. To wake its task for that, only for it
//! to send the same bytes as all the others and to wait again, costs half as much as the sending. So it may lend an
//! [`Outlet`] while it waits. What is appended to the group is put into all outlets by its worker, or, where they are many,
//! by a few tasks ([`Feeding`]), and the subscriber sleeps on. It wakes when that does not do: its sink has not taken
//! everything, there is more than one delivery takes, the tail no longer reaches back to it, the group has ended.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::group::Group;
use super::subscription::DELIVERY_BYTES;
use super::tail::{EventsAfter, lock};
use crate::store::Seq;

/// Where the bytes of a subscriber go.
pub trait Sink: Send + Sync {
    /// Takes all of these events, behind what it took before; never waits. `false`: it could not send everything, and
    /// keeps what is left for the subscriber, which is woken to see to that.
    fn take(&self, events: &Bytes) -> bool;
}

/// A sink, and how far its subscriber was told while it is lent. Made once for all that its connection does.
pub struct Outlet<S: ?Sized> {
    place: Mutex<Place>,
    woken: Notify,
    /// Where it stands among those that wait in its group; read and written under the lock of these.
    index: AtomicUsize,
    pub sink: S,
}

#[derive(Default)]
struct Place {
    /// While it is lent: to which group, and what the subscriber was told of it.
    cursor: Option<(u64, Seq)>,
    /// The sink has something left.
    left: bool,
}

impl<S> Outlet<S> {
    pub fn new(sink: S) -> Self {
        Outlet { place: Mutex::default(), woken: Notify::new(), index: AtomicUsize::new(0), sink }
    }
}

/// As groups know them.
pub type AnyOutlet = Arc<Outlet<dyn Sink>>;

/// Outlets fed in one piece, before others on the same thread have their turn: some 0.2 ms of writing.
const PIECE: usize = 16;

/// Outlets that a worker feeds itself at a time. The tests of this module have small groups, and are to meet both ways.
pub(super) const FEW: usize = if cfg!(test) { 1 } else { PIECE };

/// One time through all outlets that a group has.
///
/// Whoever wrote the commit waits for an answer on the same threads, so pieces are small, and no more tasks share them
/// than there are threads: a queue of a hundred pieces would be in front of every answer. For the same reason a group has
/// one feeding at a time. What is appended meanwhile is fed by the next, to each outlet in one write.
pub(super) struct Feeding {
    group: Arc<Group>,
    outlets: Vec<AnyOutlet>,
    next: AtomicUsize,
}

impl Feeding {
    /// Feeds the group's outlets from some tasks, again and again until nothing was appended meanwhile.
    pub(super) async fn start(group: Arc<Group>) {
        while let Some(outlets) = group.next_feeding() {
            let tasks = Handle::current().metrics().num_workers().min(outlets.len().div_ceil(PIECE));
            let feeding = Arc::new(Feeding { group: Arc::clone(&group), outlets, next: AtomicUsize::new(0) });
            let tasks: Vec<_> = (0..tasks).map(|_| tokio::spawn(feeding.clone().run())).collect();
            for task in tasks {
                // A panic is told by the runtime; what was not fed for it is fed by the next one.
                let _ = task.await;
            }
        }
    }

    async fn run(self: Arc<Self>) {
        loop {
            let from = self.next.fetch_add(PIECE, Ordering::Relaxed);
            let Some(rest) = self.outlets.get(from..).filter(|rest| !rest.is_empty()) else { return };
            feed(&self.group, &rest[..rest.len().min(PIECE)]);
            tokio::task::yield_now().await;
        }
    }
}

/// Puts into these outlets what their subscribers have not been told of the group.
pub(super) fn feed(group: &Group, outlets: &[AnyOutlet]) {
    let mut round = Round { group, known: None };
    outlets.iter().for_each(|outlet| outlet.feed(&mut round));
}

/// What those who were told the same are told next, found once for a round.
struct Round<'g> {
    group: &'g Group,
    known: Option<Known>,
}

/// What comes after a cursor.
enum Next {
    Events(Known),
    Nothing,
    /// Something that only the subscriber can see to.
    Woken,
}

#[derive(Clone)]
struct Known {
    after: Seq,
    bytes: Bytes,
    seq: Seq,
    /// There is more than one delivery takes.
    more: bool,
}

impl Round<'_> {
    fn after(&mut self, cursor: Seq) -> Next {
        if let Some(known) = self.known.as_ref().filter(|known| known.after == cursor) {
            return Next::Events(known.clone());
        }
        match self.group.after(cursor, DELIVERY_BYTES).0 {
            EventsAfter::Next { bytes, seq } => {
                let more = !matches!(self.group.after(seq, 0).0, EventsAfter::Nothing);
                let known = Known { after: cursor, bytes, seq, more };
                self.known = Some(known.clone());
                Next::Events(known)
            }
            EventsAfter::Nothing => Next::Nothing,
            EventsAfter::Behind { .. } | EventsAfter::Ended { .. } => Next::Woken,
        }
    }
}

impl Outlet<dyn Sink> {
    /// Puts into the sink what its subscriber has not been told.
    fn feed(&self, round: &mut Round<'_>) {
        let mut place = lock(&self.place);
        // Its subscriber may have woken meanwhile, be in another group by now, and what is left comes first.
        let Some((group, cursor)) = place.cursor.filter(|_| !place.left) else { return };
        if group != round.group.id {
            return;
        }
        match round.after(cursor) {
            Next::Events(Known { bytes, seq, more, .. }) => {
                place.cursor = Some((group, seq));
                place.left = !self.sink.take(&bytes);
                // A subscriber that is far behind goes on by itself.
                if place.left || more {
                    self.woken.notify_one();
                }
            }
            Next::Nothing => {}
            Next::Woken => self.woken.notify_one(),
        }
    }

    pub(super) fn wake(&self) {
        self.woken.notify_one();
    }

    /// Whether the sink has something left. Says so once.
    pub(super) fn take_left(&self) -> bool {
        std::mem::take(&mut lock(&self.place).left)
    }
}

/// Whether a group's [`Feeding`] is under way.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Feeds {
    #[default]
    No,
    Yes,
    /// And something was appended since it began, or none has begun yet.
    Again,
}

/// Outlets of the subscribers that wait in one group.
#[derive(Default)]
pub(super) struct Outlets {
    pub(super) all: Vec<AnyOutlet>,
    pub(super) feeding: Feeds,
}

impl Outlets {
    /// No more than `most`, and no task feeds them.
    pub(super) fn are_few(&self, most: usize) -> bool {
        self.feeding == Feeds::No && self.all.len() <= most
    }

    fn enter(&mut self, outlet: &AnyOutlet) {
        outlet.index.store(self.all.len(), Ordering::Relaxed);
        self.all.push(Arc::clone(outlet));
    }

    fn leave(&mut self, outlet: &AnyOutlet) {
        let index = outlet.index.load(Ordering::Relaxed);
        self.all.swap_remove(index);
        if let Some(moved) = self.all.get(index) {
            moved.index.store(index, Ordering::Relaxed);
        }
    }
}

/// A subscriber waits, and has lent its outlet until this is dropped. Then its cursor is where the outlet's was, and
/// nobody uses the sink any more.
pub(super) struct Lent<'a> {
    group: &'a Group,
    outlet: &'a AnyOutlet,
    cursor: &'a mut Seq,
}

impl<'a> Lent<'a> {
    pub(super) fn new(group: &'a Group, outlet: &'a AnyOutlet, cursor: &'a mut Seq) -> Self {
        lock(&outlet.place).cursor = Some((group.id, *cursor));
        lock(&group.outlets).enter(outlet);
        Lent { group, outlet, cursor }
    }

    /// Resolves when there is something for the subscriber itself.
    pub(super) async fn woken(&self) {
        // What was appended before the outlet was lent has woken nobody.
        let cursor = lock(&self.outlet.place).cursor.map_or(*self.cursor, |(_, cursor)| cursor);
        if matches!(self.group.after(cursor, 0).0, EventsAfter::Nothing) {
            self.outlet.woken.notified().await;
        }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some((_, cursor)) = lock(&self.outlet.place).cursor.take() {
            *self.cursor = cursor;
        }
        lock(&self.group.outlets).leave(self.outlet);
    }
}
