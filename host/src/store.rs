//! RocksDB: column families, key and row bytes, the committer, the change log, snapshots.
//!
//! What is written goes through [`Store::commit`] to one thread ([`commit`]) and becomes one atomic, synced batch; what
//! is read goes through a [`snapshot::Snapshot`]. The data directory holds `db`, the RocksDB database, and `high-water`
//! (see [`high_water`]). What a row means, who may see it and who listens is for the layers above.

pub mod audit;
mod clock;
pub mod commit;
mod ddl;
mod faults;
#[cfg(test)]
mod fixtures;
mod high_water;
pub mod index;
pub mod keys;
mod meta;
mod notes;
mod open;
pub mod receipts;
mod recent;
mod records;
mod retention;
pub mod rows;
pub mod snapshot;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use rocksdb::{Cache, ColumnFamily, DB, WriteOptions};
use wire::Scope;

use crate::catalog::{Catalog, NamespaceId, Plugin, Table, TableId, TableKind};
pub use crate::catalog::{Epoch, Seq};
pub use crate::config::{Durability, StoreOptions};
pub use audit::AuditRecord;
pub use notes::{Note, NoteWrite};
pub use receipts::{KeptReceipt, Receipt};
use retention::{Retention, Signal};

const USER_FAMILY: &str = "user_tables";
const SHARED_FAMILY: &str = "shared_tables";
const STREAM_FAMILY: &str = "stream_tables";
const DEFAULT_FAMILY: &str = rocksdb::DEFAULT_COLUMN_FAMILY_NAME;
/// Families whose keys have the first three parts of a row key.
const ROW_FAMILIES: [&str; 3] = [USER_FAMILY, SHARED_FAMILY, STREAM_FAMILY];
const FAMILIES: [&str; 4] = [USER_FAMILY, SHARED_FAMILY, STREAM_FAMILY, DEFAULT_FAMILY];

/// One row of a transaction: what was read and what shall be.
#[derive(Clone, Debug)]
pub struct RowWrite {
    pub table: Arc<Table>,
    pub scope: Scope,
    /// The encoded key columns (`keys::encode_key`).
    pub key: Vec<u8>,
    /// Row images (`wire::image`) at `table`'s schema version.
    pub old: Option<Vec<u8>>,
    pub new: Option<Vec<u8>>,
}

#[derive(Clone, Debug)]
pub enum CatalogWrite {
    PutNamespace { id: NamespaceId, name: String },
    DropNamespace { name: String },
    PutTable(Arc<Table>),
    DropTable(TableId),
    PutPlugin { plugin: Arc<Plugin>, wasm: Bytes },
    DropPlugin { namespace: String, name: String },
}

impl CatalogWrite {
    /// Makes the write's change to a catalog in memory.
    pub fn apply(&self, catalog: &mut Catalog) {
        match self {
            CatalogWrite::PutNamespace { id, name } => catalog.put_namespace(*id, name),
            CatalogWrite::DropNamespace { name } => catalog.drop_namespace(name),
            CatalogWrite::PutTable(table) => catalog.put_table(table.clone()),
            CatalogWrite::DropTable(id) => catalog.drop_table(*id),
            CatalogWrite::PutPlugin { plugin, .. } => catalog.put_plugin(plugin.clone()),
            CatalogWrite::DropPlugin { namespace, name } => catalog.drop_plugin(namespace, name),
        }
    }
}

/// What is to be written, all or nothing, as one commit.
#[derive(Clone, Debug)]
pub struct Transaction {
    pub namespace: NamespaceId,
    /// The seq of the snapshot everything was read at.
    pub base: Seq,
    pub rows: Vec<RowWrite>,
    pub catalog: Vec<CatalogWrite>,
    /// Makes a commit also of what changes nothing.
    pub receipt: Option<Receipt>,
}

/// A durable commit, as subscribers of the store see it.
#[derive(Clone, Debug)]
pub struct Commit {
    pub seq: Seq,
    pub namespace: NamespaceId,
    /// A `wire::Frame`.
    pub frame: Bytes,
    /// Whose rows are in the frame.
    pub tables: Vec<TableId>,
    /// The catalog from this commit on, where it changed.
    pub catalog: Option<Arc<Catalog>>,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot open the store in {path}: {reason}")]
    Open { path: PathBuf, reason: String },
    #[error("the data directory {0} is in use by another tidegate; stop that one, or give this one its own --data-dir")]
    Locked(PathBuf),
    #[error("the disk is full; writes are refused until there is room")]
    DiskFull,
    #[error("stored data is damaged: {0}")]
    Corrupt(String),
    #[error("the store failed and takes no writes until restart: {0}")]
    Failed(String),
    /// The change log no longer holds all commits after this position.
    #[error("the change log begins after seq {}, so what followed seq {} is gone; read the present rows instead", .floor.0, .position.0)]
    Expired { position: Seq, floor: Seq },
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Somebody else committed to what this transaction read or writes: plan again at a newer snapshot.
    #[error("the rows were changed by another commit")]
    Stale,
    #[error("the commit has {size} bytes, more than max_commit_bytes = {limit}; split it")]
    TooLarge { size: usize, limit: usize },
    /// The transaction contradicts itself or the catalog: a bug of whoever made it. Nothing was written.
    #[error("the transaction is malformed: {0}")]
    Invalid(String),
    /// Too many transactions wait: try again later.
    #[error("too many writes are waiting; try again")]
    Busy,
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Called on the commit thread for every durable commit, in seq order, once it is acknowledged. Must not block.
pub type CommitHook = Box<dyn Fn(&Arc<Commit>) + Send + Sync>;

/// Handle to the open store; clones share it. When the last one is dropped, the committer finishes what waits and ends.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
    queue: Arc<commit::Queue>,
    retention: Arc<Retention>,
}

/// What readers, the committer and the handle share.
struct Inner {
    db: Arc<DB>,
    cache: Cache,
    path: PathBuf,
    epoch: Epoch,
    max_commit_bytes: usize,
    log_commits: u64,
    log_bytes: u64,
    log_age_micros: i64,
    receipt_age_micros: i64,
    audit_records: u64,
    audit_age_micros: i64,
    durability: Durability,
    sync_interval: Duration,
    write_queue: usize,
    applied: AtomicU64,
    /// The newest commit that is on disk whatever happens, and so may be told in events.
    durable: AtomicU64,
    /// Bytes of all frames ever logged.
    logged: AtomicU64,
    log_floor: AtomicU64,
    clock: Arc<clock::Clock>,
    /// Of the newest commit.
    committed_at: AtomicI64,
    /// As of the newest durable commit.
    catalog: ArcSwap<Catalog>,
    /// The two newest, in this order; the second may be that of a commit still being written. Snapshots find theirs here.
    catalogs: ArcSwap<[Arc<Catalog>; 2]>,
    /// Where the newest snapshot stands.
    standing: ArcSwapOption<snapshot::Standing>,
    failure: OnceLock<String>,
    faults: faults::Faults,
    audit: audit::Audit,
    retention: Arc<Signal>,
    trimming: Mutex<()>,
    /// Held while receipts are written or swept.
    receipts: Mutex<()>,
}

impl Store {
    /// Opens or creates the store, recovers, loads the catalog. A second process on the directory is refused.
    pub fn open(options: &StoreOptions) -> Result<Store, StoreError> {
        let opened = open::open(options)?;
        let catalog = Arc::new(opened.catalog);
        let inner = Arc::new(Inner {
            faults: faults::Faults::open(&opened.db),
            audit: audit::Audit::open(&opened.db)?,
            db: Arc::new(opened.db),
            cache: opened.cache,
            path: options.path.clone(),
            epoch: opened.epoch,
            max_commit_bytes: options.max_commit_bytes,
            log_commits: options.log_commits,
            log_bytes: options.log_bytes,
            log_age_micros: i64::try_from(options.log_age.as_micros()).unwrap_or(i64::MAX),
            receipt_age_micros: i64::try_from(options.idempotency_age.as_micros()).unwrap_or(i64::MAX),
            audit_records: options.audit_records,
            audit_age_micros: i64::try_from(options.audit_age.as_micros()).unwrap_or(i64::MAX),
            durability: options.durability,
            sync_interval: options.sync_interval,
            write_queue: options.write_queue,
            durable: AtomicU64::new(opened.state.applied.0),
            logged: AtomicU64::new(opened.state.logged),
            applied: AtomicU64::new(opened.state.applied.0),
            log_floor: AtomicU64::new(opened.state.log_floor.0),
            clock: opened.clock,
            committed_at: AtomicI64::new(opened.state.committed_at),
            catalogs: ArcSwap::from_pointee([catalog.clone(), catalog.clone()]),
            standing: ArcSwapOption::empty(),
            catalog: ArcSwap::new(catalog),
            failure: OnceLock::new(),
            retention: Arc::default(),
            trimming: Mutex::new(()),
            receipts: Mutex::new(()),
        });
        let queue = Arc::new(commit::Queue::new(inner.clone()));
        let retention = Arc::new(Retention::new(&inner));
        Ok(Store { inner, queue, retention })
    }

    /// Starts the committer thread; `hook` sees every commit. Called once; transactions handed over before wait.
    pub fn start(&self, hook: CommitHook) {
        self.queue.start(hook);
        self.retention.start(self.inner.clone());
    }

    pub fn epoch(&self) -> Epoch {
        self.inner.epoch
    }

    /// The newest commit: what a query sees.
    pub fn applied(&self) -> Seq {
        self.inner.applied()
    }

    /// The newest commit that is on disk, whatever happens. Behind [`Store::applied`] only where `durability` is not
    /// `sync`. Nothing after it may be told to a subscriber; the hook may not have seen it yet.
    pub fn durable(&self) -> Seq {
        Seq(self.inner.durable.load(Ordering::Acquire))
    }

    /// Waits until everything the snapshot shows is on disk. Blocks.
    pub fn make_durable(&self, snapshot: &snapshot::Snapshot) -> Result<(), StoreError> {
        if snapshot.seq() <= self.durable() { Ok(()) } else { self.inner.sync() }
    }

    /// For tests: trims the change log now, instead of within a second.
    #[cfg(test)]
    pub fn trim_log(&self) {
        retention::trim(&self.inner).unwrap();
    }

    /// The catalog as of the newest durable commit.
    pub fn catalog(&self) -> Arc<Catalog> {
        self.inner.catalog.load_full()
    }

    /// A consistent view: rows, log and catalog at one seq.
    pub fn snapshot(&self) -> snapshot::Snapshot {
        snapshot::Snapshot::take(&self.inner)
    }

    /// Hands the transaction to the committer; resolves when it is durable (or refused). Dropping the future does not
    /// take the transaction back. One without effect is no commit and answers its base.
    pub async fn commit(&self, transaction: Transaction) -> Result<Seq, CommitError> {
        self.commit_audited(transaction, Vec::new()).await
    }

    /// The same with what the audit log is to say of it, in the commit's own batch: neither is there without the other.
    pub async fn commit_audited(&self, transaction: Transaction, audit: Vec<Vec<u8>>) -> Result<Seq, CommitError> {
        let outcome = self.queue.push(transaction, audit)?;
        match outcome.await {
            Ok(outcome) => outcome,
            Err(_) => Err(self.inner.refusal().into()),
        }
    }

    /// Larger commits are refused.
    pub fn max_commit_bytes(&self) -> usize {
        self.inner.max_commit_bytes
    }

    /// The module bytes of an uploaded plugin.
    pub fn plugin_wasm(&self, sha256: &str) -> Result<Option<Bytes>, StoreError> {
        self.inner.read(&meta::wasm_key(sha256)).map(|bytes| bytes.map(Bytes::from))
    }

    /// Positions before this seq cannot be resumed: the log no longer has what follows them. A snapshot taken earlier
    /// may still serve them, see [`snapshot::Snapshot::log_floor`].
    pub fn log_floor(&self) -> Seq {
        self.inner.log_floor()
    }

    /// A value of the store's own settings (`default` family), e.g. a secret made once.
    pub fn meta_get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.inner.read(&meta::setting_key(key))
    }

    /// Durable when it returns.
    pub fn meta_put(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        if self.failed() {
            return Err(self.inner.refusal());
        }
        self.inner.db.put_opt(meta::setting_key(key), value, &synced()).map_err(read_error)
    }

    /// Bytes RocksDB holds: (write buffers, block cache, table readers).
    pub fn memory(&self) -> (u64, u64, u64) {
        let db: &DB = &self.inner.db;
        match rocksdb::perf::get_memory_usage_stats(Some(&[db]), Some(&[&self.inner.cache])) {
            Ok(stats) => (stats.mem_table_total, stats.cache_total, stats.mem_table_readers_total),
            Err(error) => {
                tracing::warn!(%error, "RocksDB does not say how much memory it holds");
                (0, 0, 0)
            }
        }
    }

    /// Whether a write failed: the outcome of commits is not certain any more, nothing more is written, and the process
    /// should end with an error, so that a restart recovers what is on disk.
    pub fn failed(&self) -> bool {
        self.inner.failure.get().is_some()
    }

    /// Finishes waiting transactions, flushes, stops the committer. Blocks; commits afterwards are refused. The
    /// directory is released when the last handle and snapshot are gone.
    pub fn close(&self) {
        self.queue.close();
        self.retention.stop();
        if self.failed() {
            return;
        }
        if let Err(error) = self.inner.flush() {
            tracing::error!(%error, "the store could not be flushed; its log is replayed at the next start");
        }
    }
}

impl Inner {
    fn applied(&self) -> Seq {
        Seq(self.applied.load(Ordering::Acquire))
    }

    fn log_floor(&self) -> Seq {
        Seq(self.log_floor.load(Ordering::Acquire))
    }

    /// Everything written so far is on disk when this returns. After a failure nothing is: see [`commit`].
    fn sync(&self) -> Result<(), StoreError> {
        self.db.flush_wal(true).map_err(read_error).inspect_err(|error| {
            self.fail(format!("the write-ahead log could not be synced: {error}"));
        })
    }

    /// As in memory; for what is on disk at one point, see [`snapshot::Snapshot`].
    fn state(&self) -> meta::State {
        let catalog_version = self.catalog.load().version;
        let committed_at = self.committed_at.load(Ordering::Acquire);
        let (applied, log_floor) = (self.applied(), self.log_floor());
        meta::State { applied, catalog_version, log_floor, committed_at, logged: self.logged.load(Ordering::Acquire) }
    }

    fn read(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.db.get(key).map_err(read_error)
    }

    /// From here on nothing is written. The first reason stays.
    fn fail(&self, reason: String) {
        tracing::error!(reason, "the store failed and takes no more writes");
        let _ = self.failure.set(reason);
    }

    fn refusal(&self) -> StoreError {
        StoreError::Failed(self.failure.get().cloned().unwrap_or_else(|| "it was closed".to_owned()))
    }

    fn flush(&self) -> Result<(), StoreError> {
        // Exact: no row expires early after an orderly end.
        let mark = self.clock.now().to_be_bytes();
        self.db.put_opt(meta::CLOCK_KEY, mark, &synced()).map_err(read_error)?;
        for name in FAMILIES {
            self.db.flush_cf(family(&self.db, name)).map_err(read_error)?;
        }
        high_water::write(&self.path, self.epoch, self.applied())?;
        Ok(())
    }
}

fn family<'a>(db: &'a DB, name: &str) -> &'a ColumnFamily {
    db.cf_handle(name).expect("every family is made when the database is opened")
}

fn row_family(db: &DB, kind: TableKind) -> &ColumnFamily {
    match kind {
        TableKind::Shared => family(db, SHARED_FAMILY),
        TableKind::User => family(db, USER_FAMILY),
        TableKind::Stream => family(db, STREAM_FAMILY),
    }
}

fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

/// What RocksDB reports, for people.
fn read_error(error: rocksdb::Error) -> StoreError {
    let message = error.into_string();
    if message.contains("No space left on device") {
        StoreError::DiskFull
    } else if message.starts_with("Corruption") {
        StoreError::Corrupt(message)
    } else {
        StoreError::Io(std::io::Error::other(message))
    }
}
