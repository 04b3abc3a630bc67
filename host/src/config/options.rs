//! Checked settings of each module, made by [`super::Config`] and handed down by value.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// When a write is acknowledged. Events wait for the sync whatever it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// When it is on disk: it survives a power cut.
    Sync,
    /// When the operating system has it: it survives a crash of the server. On disk within the sync interval.
    Interval,
    /// The same, but on disk only about once a second: for disks that wear out by syncing.
    Os,
}

impl Durability {
    pub fn as_str(self) -> &'static str {
        match self {
            Durability::Sync => "sync",
            Durability::Interval => "interval",
            Durability::Os => "os",
        }
    }
}

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
    /// Commits, bytes and time kept in the change log for resume; positions before that answer `resync`.
    pub log_commits: u64,
    pub log_bytes: u64,
    pub log_age: Duration,
    /// How long a write's answer is kept for the case that it is sent again.
    pub idempotency_age: Duration,
    /// Records and time kept in the audit log; whichever is less.
    pub audit_records: u64,
    pub audit_age: Duration,
    pub durability: Durability,
    /// How long a write may be acknowledged and not on disk, where `durability` is not `sync`.
    pub sync_interval: Duration,
    /// Writes that may be under way or wait; more are told to come back.
    pub write_queue: usize,
}

impl StoreOptions {
    /// The defaults.
    pub fn new(path: &Path) -> StoreOptions {
        super::Config::new(path).store
    }
}

/// Checked limits of the SQL engine.
#[derive(Clone, Debug)]
pub struct SqlOptions {
    /// Bytes all running queries may hold together.
    pub memory_bytes: usize,
    /// Bytes all running queries may spill to disk together.
    pub spill_bytes: u64,
    pub spill_dir: PathBuf,
    pub deadline: Duration,
    pub batch_rows: usize,
    pub target_partitions: usize,
    /// About what kept statements and plans may take.
    pub plan_cache_bytes: u64,
    /// Queries with joins, sorts or aggregates that run at once, and how many may wait.
    pub heavy_queries: usize,
    pub heavy_queue: usize,
}

#[derive(Clone, Debug)]
pub struct LiveOptions {
    pub workers: usize,
    /// Bytes of recent commits kept in memory for workers, per server; older ones are read from the log.
    pub commit_tail_bytes: usize,
    /// Bytes of encoded events kept per group; a subscriber further behind reads the log.
    pub group_tail_bytes: usize,
    /// Rows or events made in one step for a snapshot or a replay.
    pub chunk_bytes: usize,
    pub heartbeat: Duration,
    pub max_subscriptions: usize,
    /// Live queries open at the same time of one user, and from one address.
    pub max_per_user: usize,
    pub max_per_address: usize,
    /// A live query that is run again as a whole runs at most once in this time.
    pub requery_interval: Duration,
    /// Bytes of one such query's result, which its group holds.
    pub requery_bytes: usize,
    /// Such runs at the same time.
    pub requery_runs: usize,
}

/// Checked limits of plugins.
#[derive(Clone, Debug)]
pub struct PluginOptions {
    /// Bytes of a namespace's ring; a power of two, ≥ 64 KiB.
    pub ring_bytes: u32,
    /// Bytes of the part of the window that one worker writes for itself.
    pub worker_bytes: u32,
    pub module_bytes: usize,
    /// Linear memory beside the window.
    pub memory_bytes: usize,
    pub stack_bytes: usize,
    pub table_elements: usize,
    /// CPU time of one batch; the wall limit is ten times it.
    pub batch_time: Duration,
    /// CPU time of instantiation, start, `_initialize`, configure (each).
    pub init_time: Duration,
    pub output_bytes: usize,
    pub log_bytes: usize,
    pub compile_time: Duration,
    pub workers: usize,
    pub instances_per_worker: usize,
    /// For tests: from the start on, instances are dropped at random between calls. 0: they are not.
    pub drop_instances_seed: u64,
    /// The program that compiles modules in a process of its own: a `tidegate`, asked by `compile-module`. Without one
    /// they are compiled on a thread of this process, which no limit but its patience holds.
    pub compiler: Option<PathBuf>,
    /// Where compiled modules are kept over restarts.
    pub cache_dir: Option<PathBuf>,
}

#[derive(Clone)]
pub struct HttpOptions {
    pub bind: SocketAddr,
    pub body_bytes: usize,
    pub plugin_body_bytes: usize,
    /// Bytes of request bodies held in memory at the same time, over all connections.
    pub body_total_bytes: usize,
    pub max_connections: usize,
    pub header_timeout: Duration,
    /// A subscriber that takes nothing for this long is disconnected.
    pub stall_limit: Duration,
    pub insecure_http: bool,
    pub ticket_ttl: Duration,
}
