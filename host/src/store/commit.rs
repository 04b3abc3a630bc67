//! The committer: one thread that validates, orders, writes and syncs waiting transactions as a group.
//!
//! Transactions wait in a bounded [`Queue`]. The thread takes all that wait (up to a limit of bytes) and, one after the
//! other, checks each against the catalog and against what was committed since it read, those before it in the group
//! included; gives it the next seq; and adds its rows, its frame and its catalog records to one batch. The batch is
//! written and synced once. Then, in this order: the new catalog and applied seq become visible, the hook sees every
//! commit, the transactions are answered. A refusal is answered then too, so that a retry reads what it lost against.
//!
//! A write that fails may or may not be on disk, and trying again could acknowledge what a failed sync has thrown away:
//! the store then takes no more writes, and a restart recovers what is really there.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use bytes::Bytes;
use rocksdb::WriteBatch;
use tokio::sync::oneshot;
use wire::frame::ChangeMeta;
use wire::{FrameBuilder, FrameError, Kind, Scope};

use super::keys::row_prefix;
use super::meta::{self, State};
use super::recent::RecentWrites;
use super::{
    CatalogWrite, Commit, CommitError, CommitHook, DEFAULT_FAMILY, Inner, Seq, StoreError, Transaction, ddl, family,
    high_water, open, row_family, rows, synced,
};
use crate::catalog::{Catalog, NamespaceId, Table, TableKind};

/// Transactions that may wait; more are told to try again.
const QUEUE_TRANSACTIONS: usize = 1024;
/// Bytes that may wait, in largest commits.
const QUEUE_COMMITS: usize = 4;
/// Written keys remembered to find conflicts with, 6 MiB: some 80 s of 3,000 single-row commits a second.
const RECENT_KEYS: usize = 1 << 18;
/// Commits between two writings of the high-water file, which costs a sync of its own.
const HIGH_WATER_COMMITS: u64 = 1000;
/// The change log is trimmed when it is this much longer than asked for: a range deletion every so many commits.
const TRIM_COMMITS: u64 = 1000;
/// Room a commit must find on the disk, in largest commits: the batch holds rows and frame, then the memtables follow.
const ROOM_COMMITS: u64 = 4;

type Answer = Result<Seq, CommitError>;

/// The newest commit in the change log of each namespace that has any there.
type Logs = BTreeMap<NamespaceId, Seq>;

struct Waiting {
    transaction: Transaction,
    bytes: usize,
    answer: oneshot::Sender<Answer>,
}

/// The transactions on their way to the committer, and the thread's handle.
pub(super) struct Queue {
    inner: Arc<Inner>,
    waiting_bytes: Arc<AtomicUsize>,
    /// `None` after closing: the thread ends when it has finished what still waits.
    sender: Mutex<Option<SyncSender<Waiting>>>,
    /// What [`Queue::start`] gives to the thread.
    idle: Mutex<Option<(Receiver<Waiting>, Logs)>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Queue {
    pub fn new(inner: Arc<Inner>, logs: Logs) -> Self {
        let (sender, receiver) = sync_channel(QUEUE_TRANSACTIONS);
        Queue {
            inner,
            waiting_bytes: Arc::new(AtomicUsize::new(0)),
            sender: Mutex::new(Some(sender)),
            idle: Mutex::new(Some((receiver, logs))),
            thread: Mutex::new(None),
        }
    }

    pub fn start(&self, hook: CommitHook) {
        let (receiver, logs) = locked(&self.idle).take().expect("the committer is started once");
        let committer = Committer::new(self.inner.clone(), hook, logs, self.waiting_bytes.clone());
        let thread = thread::Builder::new().name("committer".to_owned()).spawn(move || committer.run(&receiver));
        match thread {
            Ok(thread) => *locked(&self.thread) = Some(thread),
            Err(error) => self.inner.fail(format!("the commit thread cannot be started: {error}")),
        }
    }

    pub fn push(&self, transaction: Transaction) -> Result<oneshot::Receiver<Answer>, CommitError> {
        let bytes = weight(&transaction);
        let (answer, outcome) = oneshot::channel();
        let sender = locked(&self.sender);
        let Some(sender) = sender.as_ref() else { return Err(self.inner.refusal().into()) };
        // One transaction may always wait, however large: its bytes exist already.
        let waiting = self.waiting_bytes.load(Ordering::Relaxed);
        if waiting > 0 && waiting + bytes > QUEUE_COMMITS * self.inner.max_commit_bytes {
            return Err(CommitError::Busy);
        }
        self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        sender.try_send(Waiting { transaction, bytes, answer }).map_err(|error| {
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

/// Bytes a transaction holds while it waits, near enough.
fn weight(transaction: &Transaction) -> usize {
    let image = |image: &Option<Vec<u8>>| image.as_ref().map_or(0, Vec::len);
    let rows = transaction.rows.iter().map(|row| row.key.len() + image(&row.old) + image(&row.new) + 96);
    let catalog = transaction.catalog.iter().map(|write| match write {
        CatalogWrite::PutPlugin { wasm, .. } => wasm.len() + 256,
        _ => 256,
    });
    rows.sum::<usize>() + catalog.sum::<usize>()
}

struct Committer {
    inner: Arc<Inner>,
    hook: CommitHook,
    waiting_bytes: Arc<AtomicUsize>,
    recent: RecentWrites,
    catalog: Arc<Catalog>,
    catalog_changed: Seq,
    logs: Logs,
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
    /// In the order they came, commits and refusals.
    answers: Vec<(oneshot::Sender<Answer>, Answer)>,
    catalog: Arc<Catalog>,
}

impl Group {
    fn is_full(&self, max_bytes: usize, before: &Arc<Catalog>) -> bool {
        // At most one catalog a group: snapshots look for theirs among the last two.
        self.batch.size_in_bytes() >= max_bytes
            || self.answers.len() >= QUEUE_TRANSACTIONS
            || !Arc::ptr_eq(&self.catalog, before)
    }
}

/// What is to be written for one transaction: checked and encoded, so that adding it to the batch cannot fail half-way.
struct Staged {
    rows: Vec<StagedRow>,
    frame: Vec<u8>,
    catalog: Option<ddl::StagedCatalog>,
}

struct StagedRow {
    kind: TableKind,
    key: Vec<u8>,
    /// `None`: the row goes.
    stored: Option<Vec<u8>>,
    hash: u64,
}

impl Committer {
    fn new(inner: Arc<Inner>, hook: CommitHook, logs: Logs, waiting_bytes: Arc<AtomicUsize>) -> Self {
        let applied = inner.applied();
        Committer {
            recent: RecentWrites::new(applied, RECENT_KEYS),
            catalog: inner.catalog.load_full(),
            catalog_changed: applied,
            committed_at: inner.committed_at.load(Ordering::Acquire),
            high_water: applied,
            inner,
            hook,
            waiting_bytes,
            logs,
        }
    }

    fn run(mut self, queue: &Receiver<Waiting>) {
        let _guard = FailOnPanic(self.inner.clone());
        while let Ok(first) = queue.recv() {
            let mut group = Group {
                batch: WriteBatch::default(),
                seq: self.inner.applied(),
                commits: Vec::new(),
                answers: Vec::new(),
                catalog: self.catalog.clone(),
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
        }
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
            None => self.add(group, &waiting.transaction),
        };
        group.answers.push((waiting.answer, answer));
    }

    /// Adds one transaction to the group, whole or not at all.
    fn add(&mut self, group: &mut Group, transaction: &Transaction) -> Answer {
        let Some(staged) = self.stage(group, transaction)? else { return Ok(transaction.base) };
        let seq = Seq(group.seq.0 + 1);
        for row in &staged.rows {
            let family = row_family(&self.inner.db, row.kind);
            match &row.stored {
                Some(stored) => group.batch.put_cf(family, &row.key, stored),
                None => group.batch.delete_cf(family, &row.key),
            }
            self.recent.record(row.hash, seq);
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
        self.logs.insert(transaction.namespace, seq);
        group.seq = seq;
        group.commits.push(Arc::new(Commit {
            seq,
            namespace: transaction.namespace,
            frame: Bytes::from(staged.frame),
            catalog: staged.catalog.map(|catalog| catalog.after),
        }));
        Ok(seq)
    }

    /// Checks a transaction and builds its frame. `None`: it changes nothing.
    fn stage(&mut self, group: &Group, transaction: &Transaction) -> Result<Option<Staged>, CommitError> {
        if self.recent.too_old(transaction.base)
            || (!transaction.catalog.is_empty() && transaction.base < self.catalog_changed)
        {
            return Err(CommitError::Stale);
        }
        self.committed_at = self.committed_at.max(self.inner.clock.now());
        let mut frame = FrameBuilder::new(transaction.namespace.0, commit_id(self.committed_at), self.committed_at);
        let rows = self.stage_rows(&group.catalog, transaction, &mut frame)?;
        let catalog = ddl::stage(&group.catalog, transaction, &mut frame)?;
        if rows.is_empty() && catalog.is_none() {
            return Ok(None);
        }
        let frame = frame.finish().map_err(invalid_frame)?;
        self.check_size(frame.len())?;
        Ok(Some(Staged { rows, frame, catalog }))
    }

    /// The rows that really change, each checked against catalog and conflicts and put into the frame.
    fn stage_rows(
        &self,
        catalog: &Catalog,
        transaction: &Transaction,
        frame: &mut FrameBuilder,
    ) -> Result<Vec<StagedRow>, CommitError> {
        let mut rows = Vec::with_capacity(transaction.rows.len());
        let mut checked: Option<(&Arc<Table>, Vec<Kind>)> = None;
        for write in &transaction.rows {
            let table = &*write.table;
            // Rows of one table come together: it is looked up, and its slots are listed, once.
            let kinds = match &checked {
                Some((known, kinds)) if Arc::ptr_eq(known, &write.table) => kinds,
                _ => {
                    check_table(catalog, transaction, table)?;
                    &checked.insert((&write.table, table.kinds())).1
                }
            };
            check_scope(table, &write.scope)?;
            let mut key = row_prefix(table, &write.scope);
            key.extend_from_slice(&write.key);
            let hash = self.recent.hash(&key);
            if self.recent.written_after(hash, transaction.base) {
                return Err(CommitError::Stale);
            }
            // What has expired meanwhile was there for nobody any more: the reader has to look again.
            if table.kind == TableKind::Stream && write.old.is_some() && self.is_expired(table, &key)? {
                return Err(CommitError::Stale);
            }
            let unchanged = match (&write.old, &write.new) {
                (None, None) => true,
                (Some(old), Some(new)) => rows::same_row(kinds, old, new),
                _ => false,
            };
            if unchanged {
                continue;
            }
            let meta = ChangeMeta { table: table.id.0, schema_version: table.schema_version, kinds };
            frame.change(&write.scope, meta, write.old.as_deref(), write.new.as_deref()).map_err(invalid_frame)?;
            self.check_size(frame.len())?;
            let expires = table.expires(self.committed_at);
            let stored = write.new.as_deref().map(|image| rows::encode_row(table, image, expires)).transpose()?;
            rows.push(StagedRow { kind: table.kind, key, stored, hash });
        }
        debug_assert!(distinct(&rows), "a transaction has at most one change for a key: its net effect");
        Ok(rows)
    }

    /// Nobody has written the key since it was read, or this would not be asked: what is stored is what was read.
    fn is_expired(&self, table: &Table, key: &[u8]) -> Result<bool, StoreError> {
        let family = row_family(&self.inner.db, table.kind);
        let stored = self.inner.db.get_pinned_cf(family, key).map_err(super::read_error)?;
        // Swept already.
        let Some(stored) = stored else { return Ok(true) };
        Ok(rows::expires(&stored).is_some_and(|expires| expires <= self.committed_at))
    }

    fn check_size(&self, size: usize) -> Result<(), CommitError> {
        let limit = self.inner.max_commit_bytes;
        if size > limit { Err(CommitError::TooLarge { size, limit }) } else { Ok(()) }
    }

    fn finish(&mut self, mut group: Group) {
        if !group.commits.is_empty()
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
        if group.seq.0 - self.high_water.0 >= HIGH_WATER_COMMITS {
            self.high_water = group.seq;
            if let Err(error) = high_water::write(&self.inner.path, self.inner.epoch, group.seq) {
                tracing::warn!(%error, "the high-water file could not be written");
            }
        }
    }

    /// Makes the group durable, then visible, then known.
    fn write(&mut self, group: &mut Group) -> Result<(), StoreError> {
        self.trim_log(group);
        let log_floor = self.inner.log_floor();
        let (catalog_version, committed_at) = (group.catalog.version, self.committed_at);
        let state = State { applied: group.seq, catalog_version, log_floor, committed_at };
        group.batch.put_cf(family(&self.inner.db, DEFAULT_FAMILY), meta::STATE_KEY, state.encode());
        let new_catalog = !Arc::ptr_eq(&group.catalog, &self.catalog);
        if new_catalog {
            self.inner.catalogs.store(Arc::new([self.catalog.clone(), group.catalog.clone()]));
        }
        let batch = std::mem::take(&mut group.batch);
        self.inner.db.write_opt(batch, &synced()).map_err(super::read_error)?;

        if new_catalog {
            self.catalog = group.catalog.clone();
            self.inner.catalog.store(group.catalog.clone());
        }
        self.inner.committed_at.store(self.committed_at, Ordering::Release);
        self.inner.applied.store(group.seq.0, Ordering::Release);
        for commit in &group.commits {
            (self.hook)(commit);
        }
        Ok(())
    }

    /// Deletes what is older than the log's length from the logs of all namespaces, now and then, in the group's batch.
    fn trim_log(&mut self, group: &mut Group) {
        let keep = self.inner.log_commits;
        let slack = (keep / 8).clamp(1, TRIM_COMMITS);
        if group.seq.0.saturating_sub(self.inner.log_floor().0) < keep.saturating_add(slack) {
            return;
        }
        let floor = Seq(group.seq.0 - keep);
        let default = family(&self.inner.db, DEFAULT_FAMILY);
        for namespace in self.logs.keys() {
            let (from, to) = (meta::log_key(*namespace, Seq(0)), meta::log_key(*namespace, Seq(floor.0 + 1)));
            group.batch.delete_range_cf(default, from, to);
        }
        // A namespace without commits since has no log left, and costs no range the next time.
        self.logs.retain(|_, newest| *newest > floor);
        // Before it is written: who asks now must not rely on what is about to go.
        self.inner.log_floor.store(floor.0, Ordering::Release);
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

fn check_table(catalog: &Catalog, transaction: &Transaction, table: &Table) -> Result<(), CommitError> {
    if table.namespace != transaction.namespace {
        return Err(CommitError::Invalid(format!("{}.{} is not in its namespace", table.namespace_name, table.name)));
    }
    match catalog.table_by_id(table.id) {
        Some(current) if current.schema_version == table.schema_version => Ok(()),
        _ => Err(CommitError::Stale),
    }
}

fn check_scope(table: &Table, scope: &Scope) -> Result<(), CommitError> {
    match (table.kind, scope) {
        (TableKind::Shared | TableKind::Stream, Scope::Shared) | (TableKind::User, Scope::User(_)) => Ok(()),
        _ => Err(CommitError::Invalid(format!(
            "a row of the {} table {} has another scope",
            table.kind.as_str(),
            table.name
        ))),
    }
}

fn distinct(rows: &[StagedRow]) -> bool {
    let mut keys = std::collections::HashSet::new();
    rows.iter().all(|row| keys.insert(&row.key))
}

/// A UUID of version 7: the commit's time in milliseconds, then random bits.
fn commit_id(committed_at: i64) -> [u8; 16] {
    let mut id: [u8; 16] = rand::random();
    id[..6].copy_from_slice(&(committed_at / 1000).to_be_bytes()[2..]);
    id[6] = 0x70 | id[6] & 0x0f;
    id[8] = 0x80 | id[8] & 0x3f;
    id
}

fn invalid_frame(error: FrameError) -> CommitError {
    CommitError::Invalid(error.to_string())
}
