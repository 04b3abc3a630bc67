//! Tidegate: a WebAssembly-pluggable edge database.
//!
//! The modules, in the order to read them; each may use only those before it (and `wire`, the contract with plugins):
//!
//! - [`config`], [`telemetry`]: checked settings; logs and metrics.
//! - [`catalog`]: namespaces, tables, columns, plugins: an immutable snapshot with a version.
//! - [`store`]: RocksDB. Keys, rows, the committer, the change log.
//! - [`sql`]: DataFusion. Gate, planning, scans, DML as change sets, compiled live predicates.
//! - [`plugins`]: wasmtime. The window, instances, limits, pipelines.
//! - [`live`]: who listens to what; groups, workers, replay, cursors.
//! - [`db`]: joins the four above: execute, subscribe, install a plugin. The write path is one function there.
//! - [`http`]: hyper. Routes, JSON, server-sent events, identity, errors to status.
//! - [`cli`]: the commands beside `serve`.
//!
//! Arrow's `RecordBatch` is the vocabulary for rows in columns from `sql` upwards; DataFusion's own types stay in `sql`.

pub mod catalog;
pub mod cli;
pub mod config;
pub mod db;
pub mod http;
pub mod live;
pub mod plugins;
pub mod sql;
pub mod store;
pub mod telemetry;
