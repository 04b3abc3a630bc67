//! RocksDB: column families, key and row bytes, the committer, the change log, snapshots.

pub mod commit;
pub mod keys;
pub mod rows;
pub mod snapshot;

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use wire::Scope;

use crate::catalog::{Catalog, NamespaceId, Plugin, Table, TableId};

/// A commit's place in the one order. Strictly rises; gaps are allowed; nobody computes seq + 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Seq(pub u64);

/// Random id of this history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch(pub u64);

/// Checked settings of the store.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    pub path: PathBuf,
    pub write_buffer_size: usize,
    pub max_write_buffers: i32,
    pub block_cache_size: usize,
    pub max_background_jobs: i32,
    pub max_open_files: i32,
    pub max_commit_bytes: usize,
    /// Commits kept in the change log for resume; older ones answer `resync`.
    pub log_commits: u64,
}

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

/// What is to be written, all or nothing, as one commit.
#[derive(Clone, Debug)]
pub struct Transaction {
    pub namespace: NamespaceId,
    /// The seq of the snapshot everything was read at.
    pub base: Seq,
    pub rows: Vec<RowWrite>,
    pub catalog: Vec<CatalogWrite>,
}

/// A durable commit, as subscribers of the store see it.
#[derive(Clone, Debug)]
pub struct Commit {
    pub seq: Seq,
    pub namespace: NamespaceId,
    /// A `wire::Frame`.
    pub frame: Bytes,
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
    /// Too many transactions wait: try again later.
    #[error("too many writes are waiting; try again")]
    Busy,
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Called on the commit thread for every durable commit, in seq order, before it is acknowledged. Must not block.
pub type CommitHook = Box<dyn Fn(&Arc<Commit>) + Send + Sync>;

/// Handle to the open store; clones share it.
#[derive(Clone)]
pub struct Store {
    // filled by the store module's author
}

impl Store {
    /// Opens or creates the store, recovers, loads the catalog. A second process on the directory is refused.
    pub fn open(_options: &StoreOptions) -> Result<Store, StoreError> {
        todo!()
    }

    /// Starts the committer thread; `hook` sees every commit. Called once.
    pub fn start(&self, _hook: CommitHook) {
        todo!()
    }

    pub fn epoch(&self) -> Epoch {
        todo!()
    }

    /// The newest durable commit.
    pub fn applied(&self) -> Seq {
        todo!()
    }

    /// The catalog as of the newest durable commit.
    pub fn catalog(&self) -> Arc<Catalog> {
        todo!()
    }

    /// A consistent view: rows, log and catalog at one seq.
    pub fn snapshot(&self) -> snapshot::Snapshot {
        todo!()
    }

    /// Hands the transaction to the committer; resolves when it is durable (or refused).
    pub async fn commit(&self, _transaction: Transaction) -> Result<Seq, CommitError> {
        todo!()
    }

    /// The module bytes of an uploaded plugin.
    pub fn plugin_wasm(&self, _sha256: &str) -> Result<Option<Bytes>, StoreError> {
        todo!()
    }

    /// Positions before this seq cannot be resumed: the log no longer has what follows them.
    pub fn log_floor(&self) -> Seq {
        todo!()
    }

    /// A value of the store's own settings (`default` family), e.g. a secret made once.
    pub fn meta_get(&self, _key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        todo!()
    }

    pub fn meta_put(&self, _key: &str, _value: &[u8]) -> Result<(), StoreError> {
        todo!()
    }

    /// Bytes RocksDB holds: (write buffers, block cache, table readers).
    pub fn memory(&self) -> (u64, u64, u64) {
        todo!()
    }

    /// Finishes waiting transactions, flushes, stops the committer.
    pub fn close(&self) {
        todo!()
    }
}
