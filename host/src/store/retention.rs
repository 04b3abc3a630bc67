//! What is kept for a while only: the change log (by commits, bytes and age), the receipts of writes (by age) and the
//! audit log (by number and age). A thread of its own looks about once a second, and when the committer says that there
//! is much; nothing of it is on the commit path.
//!
//! The committer leaves a *mark* every so often: the seq, time and bytes of the log so far. So the oldest commit to be
//! kept is found among a few marks, and what lies before it goes by one range deletion a namespace, together with the
//! record that says from where on the log is whole.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rocksdb::{Direction, IteratorMode, WriteBatch, WriteOptions};

use super::keys::successor;
use super::{Inner, Seq, StoreError, audit, meta, read_error, receipts};

/// Nothing here is urgent, and a look costs two reads.
const TICK: Duration = Duration::from_secs(1);
/// The log is trimmed by its length when it is this much longer than asked for: range deletions cost readers.
const SLACK_COMMITS: u64 = 1000;

/// Wakes the thread early, or ends it.
#[derive(Default)]
pub(super) struct Signal {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    woken: bool,
    stopped: bool,
}

impl Signal {
    pub(super) fn wake(&self) {
        self.set(|state| state.woken = true);
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Until the next look; false: there is none.
    fn wait(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = |state: &mut State| !state.woken && !state.stopped;
        let waited = self.changed.wait_timeout_while(state, TICK, waiting);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.woken = false;
        !state.stopped
    }
}

/// The thread, ended and awaited when this is dropped.
pub(super) struct Retention {
    signal: Arc<Signal>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Retention {
    pub(super) fn new(inner: &Inner) -> Retention {
        Retention { signal: inner.retention.clone(), thread: Mutex::new(None) }
    }

    pub(super) fn start(&self, inner: Arc<Inner>) {
        let work = move || {
            while inner.retention.wait() {
                let looked = trim(&inner).and_then(|()| sweep_receipts(&inner)).and_then(|()| audit::trim(&inner));
                if let Err(error) = looked {
                    tracing::warn!(%error, "what is too old could not be removed; the next look tries again");
                }
            }
        };
        match thread::Builder::new().name("retention".to_owned()).spawn(work) {
            Ok(thread) => *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread),
            Err(error) => tracing::error!(%error, "the change log is not trimmed: no thread can be started for it"),
        }
    }

    pub(super) fn stop(&self) {
        self.signal.set(|state| state.stopped = true);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the retention thread panicked");
        }
    }
}

impl Drop for Retention {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Whether the log has grown so long that it should be trimmed soon.
pub(super) fn is_long(inner: &Inner, applied: Seq) -> bool {
    let keep = inner.log_commits;
    let slack = (keep / 8).clamp(1, SLACK_COMMITS);
    applied.0.saturating_sub(inner.log_floor().0) >= keep.saturating_add(slack)
}

/// Deletes from the logs of all namespaces what need not be kept.
pub(super) fn trim(inner: &Inner) -> Result<(), StoreError> {
    let _one_at_a_time = inner.trimming.lock().unwrap_or_else(PoisonError::into_inner);
    if inner.failure.get().is_some() {
        return Ok(());
    }
    let floor = wanted_floor(inner)?;
    if floor <= inner.log_floor() {
        return Ok(());
    }
    let mut batch = WriteBatch::default();
    delete_logs(inner, floor, &mut batch)?;
    batch.delete_range(meta::mark_key(Seq(0)), meta::mark_key(Seq(floor.0 + 1)));
    batch.put(meta::FLOOR_KEY, floor.0.to_be_bytes());
    // Before it is written: who asks now must not rely on what is about to go.
    inner.log_floor.fetch_max(floor.0, Ordering::AcqRel);
    inner.db.write_opt(batch, &WriteOptions::default()).map_err(read_error)
}

/// Removes receipts that are too old to be answered with.
pub(super) fn sweep_receipts(inner: &Inner) -> Result<(), StoreError> {
    if inner.failure.get().is_some() {
        return Ok(());
    }
    let _none_written = inner.receipts.lock().unwrap_or_else(PoisonError::into_inner);
    let mut batch = WriteBatch::default();
    receipts::sweep(&inner.db, inner.clock.now().saturating_sub(inner.receipt_age_micros), &mut batch)?;
    if batch.is_empty() {
        return Ok(());
    }
    inner.db.write_opt(batch, &WriteOptions::default()).map_err(read_error)
}

/// The newest commit that need not be kept, by any of the three measures.
fn wanted_floor(inner: &Inner) -> Result<Seq, StoreError> {
    let applied = inner.applied();
    let mut floor = if is_long(inner, applied) { Seq(applied.0 - inner.log_commits) } else { inner.log_floor() };
    let logged = inner.logged.load(Ordering::Acquire);
    let oldest = inner.clock.now().saturating_sub(inner.log_age_micros);
    let from = meta::mark_key(floor);
    for entry in inner.db.iterator(IteratorMode::From(&from, Direction::Forward)) {
        let (key, value) = entry.map_err(read_error)?;
        let Some(mark) = meta::Mark::decode(&key, &value)? else { break };
        // Times and bytes rise with the marks: the first that has to stay is followed by no other that may go.
        if mark.committed_at > oldest && logged.saturating_sub(mark.logged) < inner.log_bytes {
            break;
        }
        floor = floor.max(mark.seq);
    }
    Ok(floor.min(applied))
}

/// One range a namespace that has something to delete; a seek for each that has a log.
fn delete_logs(inner: &Inner, floor: Seq, batch: &mut WriteBatch) -> Result<(), StoreError> {
    let mut cursor = inner.db.raw_iterator();
    cursor.seek(meta::LOGS);
    while let Some((namespace, oldest)) = cursor.key().and_then(meta::read_log_key) {
        if oldest <= floor {
            batch.delete_range(meta::log_key(namespace, Seq(0)), meta::log_key(namespace, Seq(floor.0 + 1)));
        }
        match successor(&meta::log_prefix(namespace)) {
            Some(next) => cursor.seek(next),
            None => break,
        }
    }
    cursor.status().map_err(read_error)
}
