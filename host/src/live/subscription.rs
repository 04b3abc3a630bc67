//! One client's cursor into a group.
//!
//! A subscription owns no queue: a cursor, its seat in the group, and at most one piece under way. The states: present
//! rows (if asked for), then whatever lies after the cursor: from the group's tail where that reaches back far enough,
//! else replayed from the change log until it does.
//!
//! Its struct is all that the live side keeps of a client, 40 bytes, and one that only waits holds no memory elsewhere.
//! What a connection has anyway it does not have again: the task that waits, and the timer of the heartbeat, at which
//! whoever has it asks for the [`progress`](Subscription::progress).

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::group::Seat;
use super::job::{Piece, SnapshotScan, Work};
use super::outlet::AnyOutlet;
use super::tail::{EventsAfter, GroupEnd};
use super::{GroupSpec, PipelineFault};
use crate::store::Seq;

/// Why a subscription ended.
#[derive(Clone, Debug)]
pub enum EndReason {
    /// The pipeline failed at a commit; nothing of that commit was sent. `seq` is the last position before it (0 where
    /// the snapshot was not complete: nothing is held that could be continued).
    Pipeline {
        fault: PipelineFault,
        seq: Seq,
    },
    /// A row could not be evaluated; `seq` as above.
    Program {
        message: String,
        seq: Seq,
    },
    TableDropped,
    /// The table has another schema: what follows is another query's.
    TableAltered,
    /// A plugin of the pipeline has another active version; `seq` as above.
    PluginChanged {
        name: String,
        seq: Seq,
    },
    PluginDropped {
        name: String,
    },
    /// Our side failed: stored data cannot be read, or a worker stopped. Details are in the server's log.
    Store {
        message: String,
    },
    Shutdown,
}

impl EndReason {
    /// The same for a subscriber whose cursor is at `cursor`: a laggard continues from there, not from where the group
    /// was.
    fn at(self, cursor: Seq) -> Self {
        match self {
            EndReason::Pipeline { fault, .. } => EndReason::Pipeline { fault, seq: cursor },
            EndReason::Program { message, .. } => EndReason::Program { message, seq: cursor },
            EndReason::PluginChanged { name, .. } => EndReason::PluginChanged { name, seq: cursor },
            other => other,
        }
    }

    /// The same, but no earlier than what was told already: a query that is run again fails after its last result, and
    /// commits that left that result as it is may have passed since. And a snapshot is of a moment that the group may not
    /// have come to yet, when a plugin changes on the way to it.
    fn not_before(self, cursor: Seq) -> Self {
        match self {
            EndReason::Pipeline { seq, .. } | EndReason::Program { seq, .. } | EndReason::PluginChanged { seq, .. }
                if seq < cursor =>
            {
                self.at(cursor)
            }
            other => other,
        }
    }
}

/// The next thing for the subscriber.
#[derive(Clone, Debug)]
pub enum Delivery {
    /// Encoded events, whole commits (or pieces of the snapshot); `seq` is the cursor after them.
    Events {
        bytes: Bytes,
        seq: Seq,
    },
    /// Snapshot or catch-up complete at this seq.
    UpToDate(Seq),
    /// The cursor fell behind the log: a snapshot has to follow (`resync`, reason expired).
    Expired,
    End(EndReason),
}

/// Bytes of one delivery, when several commits wait. One write of this size keeps a socket busy, and a stalled reader
/// holds no more than one.
pub(super) const DELIVERY_BYTES: usize = 256 << 10;

/// One client's cursor. Dropping it leaves the group.
pub struct Subscription {
    seat: Seat,
    cursor: Seq,
    state: State,
}

enum State {
    /// Present rows are to be sent: all, or the last so many.
    Start {
        last: Option<u64>,
    },
    /// They are being sent; `None` only while the next piece is being asked for.
    Snapshot(Option<Box<SnapshotScan>>),
    /// A piece is under way. Kept here so that dropping a `next()` half-way loses nothing; `caught_up` as below.
    Asked {
        piece: oneshot::Receiver<Piece>,
        caught_up: bool,
    },
    /// Commits after the cursor; `caught_up` once the subscriber was told so.
    Commits {
        caught_up: bool,
    },
    Ended(Box<Delivery>),
}

impl Subscription {
    /// From the present rows on.
    pub(super) fn snapshot(seat: Seat, last: Option<u64>) -> Self {
        Subscription { seat, cursor: Seq::default(), state: State::Start { last } }
    }

    /// Commits after `cursor`.
    pub(super) fn after(seat: Seat, cursor: Seq) -> Self {
        Subscription { seat, cursor, state: State::Commits { caught_up: false } }
    }

    /// What the group is, as its first subscriber brought it.
    pub fn spec(&self) -> &Arc<GroupSpec> {
        &self.seat.group.spec
    }

    /// Waits for the next delivery. Cancel-safe. After the end it gives the end again.
    ///
    /// With an outlet, events of commits may go there instead of being returned, as long as this waits. Events of no
    /// bytes say that the outlet's sink has something left.
    pub async fn next(&mut self, outlet: Option<&AnyOutlet>) -> Delivery {
        loop {
            let delivery = match &mut self.state {
                State::Ended(delivery) => return Delivery::clone(delivery),
                State::Asked { piece, caught_up } => {
                    let caught_up = *caught_up;
                    let piece = piece.await.ok();
                    self.received(piece, caught_up)
                }
                State::Start { last } => {
                    let work = Work::Snapshot { last: *last };
                    self.ask(work, false)
                }
                State::Snapshot(scan) => {
                    // Only taken together with asking: what was taken and not asked for would be lost.
                    let Some(scan) = scan.take() else { unreachable!("what takes the scan asks for a piece") };
                    self.ask(Work::Rows(scan), false)
                }
                State::Commits { caught_up } => {
                    let caught_up = *caught_up;
                    self.commits(caught_up, outlet).await
                }
            };
            if let Some(delivery) = delivery {
                return delivery;
            }
        }
    }

    /// Asks the worker for a piece, unless the group has ended.
    fn ask(&mut self, work: Work, caught_up: bool) -> Option<Delivery> {
        let group = &self.seat.group;
        match group.ended() {
            Some(end) => Some(self.end(end, true)),
            None => {
                self.state = State::Asked { piece: group.worker.ask(group.id, work), caught_up };
                None
            }
        }
    }

    /// Takes a piece in; `None`: the worker no longer has the group.
    fn received(&mut self, piece: Option<Piece>, caught_up: bool) -> Option<Delivery> {
        match piece {
            Some(Piece::Rows { bytes, seq, rest: Some(scan) }) => {
                self.state = State::Snapshot(Some(scan));
                (!bytes.is_empty()).then_some(Delivery::Events { bytes, seq })
            }
            Some(Piece::Rows { bytes, seq, rest: None } | Piece::Commits { bytes, seq }) => {
                self.cursor = seq;
                self.state = State::Commits { caught_up };
                (!bytes.is_empty()).then_some(Delivery::Events { bytes, seq })
            }
            Some(Piece::Expired) => Some(self.end(GroupEnd::Expired, true)),
            Some(Piece::Failed(reason)) => Some(self.end(GroupEnd::Reason(reason), true)),
            None => {
                // Where the group says no reason, the worker has stopped.
                let end = self.seat.group.ended().unwrap_or(GroupEnd::Reason(EndReason::Shutdown));
                Some(self.end(end, true))
            }
        }
    }

    /// What lies after the cursor; waits while there is nothing. `None`: look again.
    async fn commits(&mut self, caught_up: bool, outlet: Option<&AnyOutlet>) -> Option<Delivery> {
        if outlet.is_some_and(|outlet| outlet.take_left()) {
            return Some(Delivery::Events { bytes: Bytes::new(), seq: self.cursor });
        }
        let group = &self.seat.group;
        // Before looking: what is appended between looking and waiting wakes all the same.
        let changed = group.changed();
        let (waiting, processed) = group.after(self.cursor, DELIVERY_BYTES);
        match waiting {
            EventsAfter::Next { bytes, seq } => {
                self.cursor = seq;
                return Some(Delivery::Events { bytes, seq });
            }
            EventsAfter::Behind { floor } => {
                drop(changed);
                return self.ask(Work::Replay { after: self.cursor, until: floor }, caught_up);
            }
            EventsAfter::Ended { end, behind } => {
                drop(changed);
                return Some(self.end(end, behind));
            }
            EventsAfter::Nothing => {}
        }
        self.cursor = self.cursor.max(processed);
        if !caught_up {
            self.state = State::Commits { caught_up: true };
            return Some(Delivery::UpToDate(self.cursor));
        }
        match outlet {
            None => changed.await,
            Some(outlet) => group.lend(outlet, &mut self.cursor).woken().await,
        }
        None
    }

    /// How far a subscriber is that was told everything: the worker may have passed many commits without events. `None`
    /// while there is something to tell, or present rows and replays are under way.
    pub fn progress(&mut self) -> Option<Seq> {
        let State::Commits { caught_up: true } = self.state else { return None };
        let (waiting, processed) = self.seat.group.after(self.cursor, 0);
        if !matches!(waiting, EventsAfter::Nothing) {
            return None;
        }
        self.cursor = self.cursor.max(processed);
        Some(self.cursor)
    }

    /// The last delivery. `behind`: the group was further than this subscription.
    fn end(&mut self, end: GroupEnd, behind: bool) -> Delivery {
        let delivery = match end {
            GroupEnd::Expired => Delivery::Expired,
            GroupEnd::Reason(reason) if behind => Delivery::End(reason.at(self.cursor)),
            GroupEnd::Reason(reason) => Delivery::End(reason.not_before(self.cursor)),
        };
        self.state = State::Ended(Box::new(delivery.clone()));
        delivery
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A snapshot was of a later moment than the group had come to; the plugin changed on the way, and what the snapshot
    /// had was told once more.
    #[test]
    fn a_stream_goes_on_behind_what_it_was_told() {
        let changed = |seq| EndReason::PluginChanged { name: "p".to_owned(), seq: Seq(seq) };
        for (at, expect) in [(5, 9), (9, 9), (12, 12)] {
            let EndReason::PluginChanged { seq, .. } = changed(at).not_before(Seq(9)) else { panic!("another reason") };
            assert_eq!(seq, Seq(expect));
        }
    }
}
