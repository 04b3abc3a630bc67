//! The short way of events: to where subscribers that only wait want them, without waking each.
//!
//! A subscriber that was told everything has nothing to do before the next commit. To wake its task for that, only for it
//! to send the same bytes as all the others and to wait again, costs half as much as the sending. So it may lend an
//! [`Outlet`] while it waits. What is appended to the group is put into all outlets by a few tasks
//! ([`Group::append`]), and the subscriber sleeps on. It wakes when that does not do: its sink has not taken everything, the
//! tail no longer reaches back to it, the group has ended.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
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
    /// While it is lent: what the subscriber was told.
    cursor: Option<Seq>,
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

/// What those who were told the same are told next, found once for a round.
pub(super) struct Round<'g> {
    group: &'g Group,
    known: Option<(Seq, Bytes, Seq)>,
}

impl<'g> Round<'g> {
    pub(super) fn new(group: &'g Group) -> Self {
        Round { group, known: None }
    }

    /// What lies after a cursor, and the cursor behind that; else whether there is something that does not go this way.
    fn after(&mut self, cursor: Seq) -> Result<(Bytes, Seq), bool> {
        if let Some((of, bytes, seq)) = &self.known
            && *of == cursor
        {
            return Ok((bytes.clone(), *seq));
        }
        match self.group.after(cursor, DELIVERY_BYTES).0 {
            EventsAfter::Next { bytes, seq } => {
                self.known = Some((cursor, bytes.clone(), seq));
                Ok((bytes, seq))
            }
            EventsAfter::Nothing => Err(false),
            EventsAfter::Behind { .. } | EventsAfter::Ended { .. } => Err(true),
        }
    }
}

impl Outlet<dyn Sink> {
    /// Puts into the sink what its subscriber has not been told.
    pub(super) fn feed(&self, round: &mut Round<'_>) {
        let mut place = lock(&self.place);
        // Its subscriber may have woken meanwhile, and what is left comes first.
        let Some(cursor) = place.cursor.filter(|_| !place.left) else { return };
        match round.after(cursor) {
            Ok((bytes, seq)) => {
                place.cursor = Some(seq);
                place.left = !self.sink.take(&bytes);
                if place.left {
                    self.woken.notify_one();
                }
            }
            Err(true) => self.woken.notify_one(),
            Err(false) => {}
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

/// Outlets of the subscribers that wait in one group.
#[derive(Default)]
pub(super) struct Outlets(Vec<AnyOutlet>);

impl Outlets {
    /// In pieces, each for a task: enough that making it costs little, few enough that others get their turn.
    pub(super) fn pieces(&self) -> Vec<Vec<AnyOutlet>> {
        const PIECE: usize = 64;
        self.0.chunks(PIECE).map(<[_]>::to_vec).collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &AnyOutlet> {
        self.0.iter()
    }

    fn enter(&mut self, outlet: &AnyOutlet) {
        outlet.index.store(self.0.len(), Ordering::Relaxed);
        self.0.push(Arc::clone(outlet));
    }

    fn leave(&mut self, outlet: &AnyOutlet) {
        let index = outlet.index.load(Ordering::Relaxed);
        self.0.swap_remove(index);
        if let Some(moved) = self.0.get(index) {
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
        lock(&outlet.place).cursor = Some(*cursor);
        lock(&group.outlets).enter(outlet);
        Lent { group, outlet, cursor }
    }

    /// Resolves when there is something for the subscriber itself.
    pub(super) async fn woken(&self) {
        // What was appended before the outlet was lent has woken nobody.
        let cursor = lock(&self.outlet.place).cursor.unwrap_or_default();
        if matches!(self.group.after(cursor, 0).0, EventsAfter::Nothing) {
            self.outlet.woken.notified().await;
        }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some(cursor) = lock(&self.outlet.place).cursor.take() {
            *self.cursor = cursor;
        }
        lock(&self.group.outlets).leave(self.outlet);
    }
}
