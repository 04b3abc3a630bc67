//! What the HTTP side holds over restarts, written behind the requests that change it: a queue, and a thread that
//! empties it in batches. No request waits for the disk but those that promise something by their answer; of the others
//! a crash costs the last moments, which must not matter to anybody.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};

use tokio::sync::oneshot;

use crate::db::{Db, NoteWrite};

/// Changes that may wait: more than a reconnect storm makes while the disk takes its time.
const WAITING: usize = 50_000;
/// Of the queue in one batch.
const BATCH: usize = 1_000;

/// Notes that are put or removed together, and who waits for it.
struct Change {
    notes: Vec<NoteWrite>,
    written: Option<oneshot::Sender<()>>,
}

/// Notes of one kind. Dropped, it writes what waits and ends its thread.
pub struct Keeper {
    kind: &'static str,
    queue: Option<SyncSender<Change>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    pub fn start(db: Db, kind: &'static str) -> std::io::Result<Keeper> {
        let (queue, waiting) = sync_channel(WAITING);
        let thread = thread::Builder::new().name(format!("keep-{kind}")).spawn(move || write(&db, kind, &waiting))?;
        Ok(Keeper { kind, queue: Some(queue), thread: Some(thread) })
    }

    /// Puts (or removes) notes, all or none, soon and in the order of the calls.
    pub fn keep(&self, notes: Vec<NoteWrite>) {
        self.send(Change { notes, written: None });
    }

    /// The same for what somebody is promised: resolves when it is written, with an error where it could not be.
    pub fn keep_surely(&self, notes: Vec<NoteWrite>) -> oneshot::Receiver<()> {
        let (written, told) = oneshot::channel();
        self.send(Change { notes, written: Some(written) });
        told
    }

    fn send(&self, change: Change) {
        let sent = self.queue.as_ref().map(|queue| queue.try_send(change));
        if let Some(Err(TrySendError::Full(_))) = sent {
            tracing::warn!(kind = self.kind, "the disk is too slow to keep this over a restart; it is left out");
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // The thread ends when the queue has no sender and is empty.
        drop(self.queue.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(kind = self.kind, "the thread that keeps notes panicked");
        }
    }
}

fn write(db: &Db, kind: &str, waiting: &Receiver<Change>) {
    while let Ok(first) = waiting.recv() {
        let (mut notes, mut told) = (first.notes, Vec::from_iter(first.written));
        for change in waiting.try_iter().take(BATCH) {
            notes.extend(change.notes);
            told.extend(change.written);
        }
        match db.leave_notes(kind, &notes) {
            // Whoever waited may be gone.
            Ok(()) => told.into_iter().for_each(|written| {
                let _ = written.send(());
            }),
            Err(error) => tracing::warn!(%error, kind, "what was to be kept over a restart could not be written"),
        }
    }
}
