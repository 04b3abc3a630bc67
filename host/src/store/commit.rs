//! The committer: one thread that validates, orders, writes and syncs waiting transactions as a group.
//!
//! Transactions wait in a bounded [`Queue`]. The thread takes all that wait (up to a limit of bytes) and, one after the
//! other, checks each against the catalog and against what was committed since it read, those before it in the group
//! included ([`stage`]); gives it the next seq; and adds its rows, its frame and its catalog records to one batch. The
//! batch is written and synced once. Then, in this order: the new catalog and applied seq become visible, the transactions
//! are answered, the hook sees every commit: whoever writes does not wait for what others make of it. A refusal is
//! answered then too, so that a retry reads what it lost against.
//!
//! With another `durability` than `sync` the batch is written without a sync and answered; a sync follows within the sync
//! interval, and only then the hook sees the commits: an event is never of a commit that a power cut could undo.
//!
//! A write that fails may or may not be on disk, and trying again could acknowledge what a failed sync has thrown away:
//! the store then takes no more writes, and a restart recovers what is really there.

mod stage;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use bytes::Bytes;
use rocksdb::{WriteBatch, WriteOptions};
use tokio::sync::oneshot;

use super::index::{Piece, PieceEntry};
use super::meta::{self, Mark, State};
use super::recent::RecentWrites;
use super::{
    CatalogWrite, Commit, CommitError, CommitHook, DEFAULT_FAMILY, Durability, Inner, RowWrite, Seq, StoreError,
    Transaction, ddl, family, high_water, open, receipts, retention, row_family, synced,
};
use crate::catalog::{Catalog, IndexState, TableId};

/// Transactions written together at most: the first of them waits for the last to be checked.
const GROUP_TRANSACTIONS: usize = 1024;
/// Bytes that may wait, in largest commits.
const QUEUE_COMMITS: usize = 4;
/// Written keys remembered to find conflicts with, 6 MiB: some 80 s of 3,000 single-row commits a second.
const RECENT_KEYS: usize = 1 << 18;
/// Commits between two writings of the high-water file, which costs a sync of its own.
const HIGH_WATER_COMMITS: u64 = 1000;
/// A mark is left in the change log (`store/retention.rs`) after so many commits, so many bytes, and so many parts of the
/// age that the log is kept for: by these steps it is cut.
const MARK_COMMITS: u64 = 64;
const MARK_BYTES: u64 = 256 << 10;
const MARK_AGES: i64 = 16;
/// Room a commit must find on the disk, in largest commits: the batch holds rows and frame, then the memtables follow.
const ROOM_COMMITS: u64 = 4;

type Answer = Result<Seq, CommitError>;

struct Waiting {
    work: Work,
    bytes: usize,
    answer: oneshot::Sender<Answer>,
}

enum Work {
    /// With what the audit log is to say of it.
    Transaction(Transaction, Vec<Vec<u8>>),
    /// Entries for an index that is being built: derived from what is committed, so no commit of its own.
    Piece(Piece),
}

/// The transactions on their way to the committer, and the thread's handle.
pub(super) struct Queue {
    inner: Arc<Inner>,
    waiting_bytes: Arc<AtomicUsize>,
    /// `None` after closing: the thread ends when it has finished what still waits.
    sender: Mutex<Option<SyncSender<Waiting>>>,
    /// What [`Queue::start`] gives to the thread.
    idle: Mutex<Option<Receiver<Waiting>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Queue {
    pub fn new(inner: Arc<Inner>) -> Self {
        let (sender, receiver) = sync_channel(inner.write_queue);
        Queue {
            inner,
            waiting_bytes: Arc::new(AtomicUsize::new(0)),
            sender: Mutex::new(Some(sender)),
            idle: Mutex::new(Some(receiver)),
            thread: Mutex::new(None),
        }
    }

    pub fn start(&self, hook: CommitHook) {
        let receiver = locked(&self.idle).take().expect("the committer is started once");
        let committer = Committer::new(self.inner.clone(), hook, self.waiting_bytes.clone());
        let thread = thread::Builder::new().name("committer".to_owned()).spawn(move || committer.run(&receiver));
        match thread {
            Ok(thread) => *locked(&self.thread) = Some(thread),
            Err(error) => self.inner.fail(format!("the commit thread cannot be started: {error}")),
        }
    }

    pub fn push(
        &self,
        transaction: Transaction,
        audit: Vec<Vec<u8>>,
    ) -> Result<oneshot::Receiver<Answer>, CommitError> {
        let bytes = weight(&transaction) + audit.iter().map(Vec::len).sum::<usize>();
        self.push_work(Work::Transaction(transaction, audit), bytes)
    }

    pub fn push_piece(&self, piece: Piece) -> Result<oneshot::Receiver<Answer>, CommitError> {
        let bytes = piece.entries.iter().map(|entry| entry.row.len() + entry.entry.len() + 48).sum();
        self.push_work(Work::Piece(piece), bytes)
    }

    fn push_work(&self, work: Work, bytes: usize) -> Result<oneshot::Receiver<Answer>, CommitError> {
        let (answer, outcome) = oneshot::channel();
        let sender = locked(&self.sender);
        let Some(sender) = sender.as_ref() else { return Err(self.inner.refusal().into()) };
        // One transaction may always wait, however large: its bytes exist already. So may a piece: it is small, and a
        // build has one at a time.
        let waiting = self.waiting_bytes.load(Ordering::Relaxed);
        if matches!(work, Work::Transaction(..))
            && waiting > 0
            && waiting + bytes > QUEUE_COMMITS * self.inner.max_commit_bytes
        {
            return Err(CommitError::Busy);
        }
        self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        sender.try_send(Waiting { work, bytes, answer }).map_err(|error| {
            self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            match error {
                TrySendError::Full(_) => CommitError::Busy,
                TrySendError::Disconnected(_) => self.inner.refusal().into(),
            }
        })?;
        Ok(outcome)
    }

    /// Waits until everything handed over is answered. Transactions of a committer that was never started are refused.
    pub fn close(&self) {
        drop(locked(&self.sender).take());
        drop(locked(&self.idle).take());
        let Some(thread) = locked(&self.thread).take() else { return };
        // The hook may hold the last handle of the store: then this runs on the commit thread, which cannot await itself.
        if thread.thread().id() != thread::current().id() && thread.join().is_err() {
            tracing::error!("the commit thread panicked");
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.close();
    }
}

/// The short sections under these locks cannot panic half-way.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Each table once.
fn tables(rows: &[RowWrite]) -> Vec<TableId> {
    let mut tables: Vec<TableId> = Vec::new();
    for row in rows {
        // Mostly many rows of one table are behind one another.
        if tables.last() != Some(&row.table.id) {
            tables.push(row.table.id);
        }
    }
    tables.sort_unstable();
    tables.dedup();
    tables
}

/// Bytes a transaction holds while it waits, near enough.
fn weight(transaction: &Transaction) -> usize {
    let image = |image: &Option<Vec<u8>>| image.as_ref().map_or(0, Vec::len);
    let rows = transaction.rows.iter().map(|row| row.key.len() + image(&row.old) + image(&row.new) + 96);
    let catalog = transaction.catalog.iter().map(|write| match write {
        CatalogWrite::PutPlugin { wasm, .. } => wasm.len() + 256,
        _ => 256,
    });
    let receipt = transaction.receipt.as_ref().map_or(0, |receipt| receipt.outcome.len() + 256);
    rows.sum::<usize>() + catalog.sum::<usize>() + receipt
}

struct Committer {
    inner: Arc<Inner>,
    hook: CommitHook,
    waiting_bytes: Arc<AtomicUsize>,
    recent: RecentWrites,
    catalog: Arc<Catalog>,
    catalog_changed: Seq,
    /// Of the newest mark in the change log.
    marked: Mark,
    /// Written, but perhaps not on disk yet: nobody has been told. Empty where `durability` is `sync`.
    unpublished: Vec<Arc<Commit>>,
    synced_at: Instant,
    /// Commit times never go back, whatever the clock does.
    committed_at: i64,
    high_water: Seq,
}

/// Transactions that are written together.
struct Group {
    batch: WriteBatch,
    /// Of the last commit in it.
    seq: Seq,
    commits: Vec<Arc<Commit>>,
    /// Whether there is anything else in it.
    pieces: bool,
    /// In the order they came, commits and refusals.
    answers: Vec<(oneshot::Sender<Answer>, Answer)>,
    catalog: Arc<Catalog>,
    /// Whether there are receipts in it.
    receipts: bool,
}

impl Group {
    fn is_full(&self, max_bytes: usize, before: &Arc<Catalog>) -> bool {
        // At most one catalog a group: snapshots look for theirs among the last two.
        self.batch.size_in_bytes() >= max_bytes
            || self.answers.len() >= GROUP_TRANSACTIONS
            || !Arc::ptr_eq(&self.catalog, before)
    }
}

impl Committer {
    fn new(inner: Arc<Inner>, hook: CommitHook, waiting_bytes: Arc<AtomicUsize>) -> Self {
        let applied = inner.applied();
        let (committed_at, logged) = (inner.committed_at.load(Ordering::Acquire), inner.logged.load(Ordering::Acquire));
        let marked = Mark { seq: applied, committed_at, logged };
        Committer {
            recent: RecentWrites::new(applied, RECENT_KEYS),
            catalog: inner.catalog.load_full(),
            catalog_changed: applied,
            committed_at,
            high_water: applied,
            inner,
            hook,
            waiting_bytes,
            marked,
            unpublished: Vec::new(),
            synced_at: Instant::now(),
        }
    }

    fn run(mut self, queue: &Receiver<Waiting>) {
        let _guard = FailOnPanic(self.inner.clone());
        while let Some(first) = self.next(queue) {
            let mut group = Group {
                batch: WriteBatch::default(),
                seq: self.inner.applied(),
                commits: Vec::new(),
                pieces: false,
                answers: Vec::new(),
                catalog: self.catalog.clone(),
                receipts: false,
            };
            // Before anything is staged: what is refused here leaves no trace.
            let refused = self.refused();
            self.take(&mut group, first, refused);
            while !group.is_full(self.inner.max_commit_bytes, &self.catalog)
                && let Ok(next) = queue.try_recv()
            {
                self.take(&mut group, next, refused);
            }
            self.finish(group);
            if self.synced_at.elapsed() >= self.inner.sync_interval {
                self.publish_synced();
            }
        }
        self.publish_synced();
    }

    /// The next transaction; meanwhile, what was written without a sync is synced when its time has come. `None`: the
    /// queue was closed and is empty.
    fn next(&mut self, queue: &Receiver<Waiting>) -> Option<Waiting> {
        while !self.unpublished.is_empty() {
            let left = self.inner.sync_interval.saturating_sub(self.synced_at.elapsed());
            match queue.recv_timeout(left) {
                Ok(waiting) => return Some(waiting),
                Err(RecvTimeoutError::Timeout) => self.publish_synced(),
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        // The interval begins with the first write after a pause.
        let waiting = queue.recv().ok();
        self.synced_at = Instant::now();
        waiting
    }

    /// Whether, and how, everything is refused at present.
    fn refused(&self) -> Option<fn(&Inner) -> StoreError> {
        if self.inner.failure.get().is_some() {
            Some(Inner::refusal)
        } else if !has_room(&self.inner.path, ROOM_COMMITS * self.inner.max_commit_bytes as u64) {
            Some(|_| StoreError::DiskFull)
        } else {
            None
        }
    }

    fn take(&mut self, group: &mut Group, waiting: Waiting, refused: Option<fn(&Inner) -> StoreError>) {
        self.waiting_bytes.fetch_sub(waiting.bytes, Ordering::Relaxed);
        let answer = match refused {
            Some(refused) => Err(refused(&self.inner).into()),
            None => match &waiting.work {
                Work::Transaction(transaction, audit) => self.add(group, transaction, audit),
                Work::Piece(piece) => self.add_piece(group, piece),
            },
        };
        group.answers.push((waiting.answer, answer));
    }

    /// Adds one transaction to the group, whole or not at all.
    fn add(&mut self, group: &mut Group, transaction: &Transaction, audit: &[Vec<u8>]) -> Answer {
        let Some(staged) = self.stage(group, transaction)? else { return Ok(transaction.base) };
        let seq = Seq(group.seq.0 + 1);
        // First, because it is the one part that could still fail.
        if let (Some(hash), Some(receipt)) = (staged.receipt, &transaction.receipt) {
            receipts::put(&mut group.batch, receipt, seq, self.committed_at)?;
            self.recent.record(hash, seq);
            group.receipts = true;
        }
        for row in &staged.rows {
            let family = row_family(&self.inner.db, row.kind);
            match &row.stored {
                Some(stored) => group.batch.put_cf(family, &row.key, stored),
                None => group.batch.delete_cf(family, &row.key),
            }
            for change in &row.entries {
                if let Some(entry) = &change.delete {
                    group.batch.delete_cf(family, entry);
                }
                if let Some(entry) = &change.put {
                    group.batch.put_cf(family, entry, b"");
                }
            }
            for hash in row.claims.iter().chain([&row.hash]) {
                self.recent.record(*hash, seq);
            }
        }
        let default = family(&self.inner.db, DEFAULT_FAMILY);
        group.batch.put_cf(default, meta::log_key(transaction.namespace, seq), &staged.frame);
        if let Some(catalog) = &staged.catalog {
            for (key, record) in &catalog.records {
                group.batch.put_cf(default, key, record);
            }
            ddl::delete_dropped(&self.inner.db, &mut group.batch, &group.catalog, &catalog.after);
            group.catalog = catalog.after.clone();
            self.catalog_changed = seq;
        }
        for said in audit {
            let (key, record) = self.inner.audit.next(self.committed_at, Some(seq), said);
            group.batch.put_cf(default, key, record);
        }
        self.mark(group, seq, staged.frame.len());
        group.seq = seq;
        group.commits.push(Arc::new(Commit {
            seq,
            namespace: transaction.namespace,
            frame: Bytes::from(staged.frame),
            tables: tables(&transaction.rows),
            catalog: staged.catalog.map(|catalog| catalog.after),
        }));
        Ok(seq)
    }

    /// Adds what an index that is being built lacks. Rows that were written since the piece was read are left out: the
    /// index was there for their writers already.
    fn add_piece(&mut self, group: &mut Group, piece: &Piece) -> Answer {
        if self.recent.too_old(piece.base) {
            return Err(CommitError::Stale);
        }
        let table = group.catalog.table_by_id(piece.table);
        let index = table.and_then(|table| table.indexes.iter().find(|index| index.id == piece.index));
        let (Some(table), Some(IndexState::Building)) = (table, index.map(|index| index.state)) else {
            return Err(CommitError::Invalid("the index is not being built any more".to_owned()));
        };
        let family = row_family(&self.inner.db, table.kind);
        for PieceEntry { row, entry } in &piece.entries {
            if !self.recent.written_after(self.recent.hash(row), piece.base) {
                group.batch.put_cf(family, entry, b"");
                group.pieces = true;
            }
        }
        Ok(piece.base)
    }

    fn finish(&mut self, mut group: Group) {
        if (!group.commits.is_empty() || group.pieces)
            && let Err(error) = self.write(&mut group)
        {
            // Whether any of it is on disk is not known, and refusals were decided against it: all hear of the failure.
            let full = matches!(error, StoreError::DiskFull);
            self.inner.fail(format!("a commit could not be written: {error}"));
            for (answer, _) in group.answers {
                let error = if full { StoreError::DiskFull } else { self.inner.refusal() };
                let _ = answer.send(Err(error.into()));
            }
            return;
        }
        for (answer, outcome) in group.answers {
            // Whoever asked may have gone away.
            let _ = answer.send(outcome);
        }
        if self.inner.durability == Durability::Sync {
            self.publish();
        }
        let durable = Seq(self.inner.durable.load(Ordering::Acquire));
        if durable.0.saturating_sub(self.high_water.0) >= HIGH_WATER_COMMITS {
            self.high_water = durable;
            if let Err(error) = high_water::write(&self.inner.path, self.inner.epoch, durable) {
                tracing::warn!(%error, "the high-water file could not be written");
            }
        }
    }

    /// Makes the group durable, then visible. Where `durability` is not `sync`, visible comes first: the group is
    /// acknowledged, and made durable and known within the sync interval.
    fn write(&mut self, group: &mut Group) -> Result<(), StoreError> {
        let (catalog_version, committed_at) = (group.catalog.version, self.committed_at);
        let (log_floor, logged) = (self.inner.log_floor(), self.inner.logged.load(Ordering::Acquire));
        let state = State { applied: group.seq, catalog_version, log_floor, committed_at, logged };
        group.batch.put_cf(family(&self.inner.db, DEFAULT_FAMILY), meta::STATE_KEY, state.encode());
        let new_catalog = !Arc::ptr_eq(&group.catalog, &self.catalog);
        if new_catalog {
            self.inner.catalogs.store(Arc::new([self.catalog.clone(), group.catalog.clone()]));
        }
        let batch = std::mem::take(&mut group.batch);
        let sync = self.inner.durability == Durability::Sync;
        let options = if sync { synced() } else { WriteOptions::default() };
        let none_swept = group.receipts.then(|| locked(&self.inner.receipts));
        self.inner.db.write_opt(batch, &options).map_err(super::read_error)?;
        drop(none_swept);

        if new_catalog {
            self.catalog = group.catalog.clone();
            self.inner.catalog.store(group.catalog.clone());
        }
        self.inner.committed_at.store(self.committed_at, Ordering::Release);
        self.inner.applied.store(group.seq.0, Ordering::Release);
        if sync {
            self.inner.durable.store(group.seq.0, Ordering::Release);
        }
        self.unpublished.append(&mut group.commits);
        if retention::is_long(&self.inner, group.seq) {
            self.inner.retention.wake();
        }
        Ok(())
    }

    /// Syncs what was written without, and makes it known.
    fn publish_synced(&mut self) {
        self.synced_at = Instant::now();
        if self.unpublished.is_empty() || self.inner.failure.get().is_some() {
            return;
        }
        // A failure is told by the store itself. Nobody hears of these commits: whether they are on disk only the next
        // start finds out.
        if self.inner.sync().is_ok() {
            self.publish();
        }
    }

    /// What is on disk becomes known.
    fn publish(&mut self) {
        let Some(newest) = self.unpublished.last() else { return };
        self.inner.durable.store(newest.seq.0, Ordering::Release);
        for commit in self.unpublished.drain(..) {
            (self.hook)(&commit);
        }
    }

    /// Counts the frame of commit `seq`, and leaves a mark behind it where one is due.
    fn mark(&mut self, group: &mut Group, seq: Seq, frame: usize) {
        let logged = self.inner.logged.fetch_add(frame as u64, Ordering::AcqRel) + frame as u64;
        let mark = Mark { seq, committed_at: self.committed_at, logged };
        let age = mark.committed_at.saturating_sub(self.marked.committed_at);
        let due = seq.0 - self.marked.seq.0 >= MARK_COMMITS
            || logged - self.marked.logged >= MARK_BYTES
            || age >= self.inner.log_age_micros / MARK_AGES;
        if due {
            group.batch.put_cf(family(&self.inner.db, DEFAULT_FAMILY), meta::mark_key(seq), mark.encode());
            self.marked = mark;
        }
    }
}

/// A panic on the commit thread (in the hook, or a bug of ours) leaves commits unanswered: refuse whatever follows.
struct FailOnPanic(Arc<Inner>);

impl Drop for FailOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail("the commit thread panicked".to_owned());
        }
    }
}

/// Refuses while there is still room to say so: a write that hits the end of the disk half-way costs a restart.
fn has_room(directory: &Path, needed: u64) -> bool {
    match rustix::fs::statvfs(open::database_path(directory)) {
        Ok(disk) => disk.f_bavail.saturating_mul(disk.f_frsize) >= needed,
        // A file system that does not say is found out by writing.
        Err(_) => true,
    }
}
