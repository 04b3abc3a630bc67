//! The one place that joins store, sql, plugins and live: execute, subscribe, install a plugin.

pub mod install;
pub mod subscribe;
pub mod write;

use std::sync::Arc;

use bytes::Bytes;

use crate::catalog::Plugin;
use crate::config::{Config, Role};
use crate::live::{Encoder, OldMode};
use crate::plugins::PluginError;
use crate::sql::{OutputColumn, Param, RowStream, SqlError};
use crate::store::{CommitError, Seq, StoreError};
use crate::telemetry::Metrics;

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub user: Arc<str>,
    pub role: Role,
}

#[derive(Debug, thiserror::Error)]
pub enum DbError {
    #[error(transparent)]
    Sql(#[from] SqlError),
    /// Still in conflict after all retries.
    #[error("the rows were changed by other commits at the same time; try again")]
    Conflict,
    #[error(transparent)]
    Commit(CommitError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Plugin(#[from] PluginError),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    BadRequest(String),
    #[error("{0}")]
    Forbidden(String),
    #[error("{0}")]
    TooMany(String),
    #[error("the server is shutting down")]
    Closed,
}

pub struct SqlRequest {
    pub sql: String,
    pub params: Vec<Param>,
    pub namespace: Option<String>,
    /// Refuse everything but queries (GET).
    pub read_only: bool,
}

pub enum StatementResult {
    Rows(RowStream),
    Affected { affected: u64 },
}

pub struct SqlAnswer {
    pub results: Vec<StatementResult>,
    /// The commit of the writes, or the snapshot the queries saw.
    pub seq: Seq,
}

/// One stage as asked for: `name`, `name@version` or `name@sha256:…`, and JSON object parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct StageRequest {
    pub plugin: String,
    pub params: serde_json::Value,
}

#[derive(Clone, Debug)]
pub struct LiveRequest {
    pub sql: String,
    pub params: Vec<Param>,
    pub namespace: Option<String>,
    pub pipeline: Vec<StageRequest>,
    pub snapshot: bool,
    pub old: OldMode,
    /// `Last-Event-ID`.
    pub position: Option<String>,
}

/// Why what the client holds is void.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResyncReason {
    Expired,
    Epoch,
    Schema,
    Plugin,
}

/// The next thing of a live stream, to be framed by `http`.
pub enum LiveOutput {
    Start {
        live_id: String,
        columns: Vec<OutputColumn>,
        key: Vec<String>,
        from: Option<String>,
    },
    /// Framed by the [`Encoder`] already.
    Encoded(Bytes),
    UpToDate {
        position: String,
        seq: Seq,
    },
    Resync(ResyncReason),
    /// The pipeline failed; the stream waits for another version of the plugin.
    PluginError {
        plugin: String,
        version: u32,
        cause: String,
        message: String,
        seq: Seq,
    },
    /// A row could not be evaluated: the stream ends.
    Failed {
        message: String,
    },
    /// The stream ends, and why; `retry` says whether a reconnect makes sense.
    Closed {
        code: &'static str,
        message: String,
    },
}

/// A running live query.
pub struct LiveStream {
    // filled by db's author
}

impl LiveStream {
    /// `None` after the stream's end. Cancel-safe.
    pub async fn next(&mut self) -> Option<LiveOutput> {
        todo!()
    }
}

/// What a plugin upload answers.
pub struct Installed {
    pub plugin: Arc<Plugin>,
    pub seq: Seq,
    /// The same bytes were active already: nothing changed.
    pub unchanged: bool,
}

/// The database; clones share it.
#[derive(Clone)]
pub struct Db {
    // filled by db's author
}

impl Db {
    pub fn open(_config: &Config, _encoder: Arc<dyn Encoder>, _metrics: Arc<Metrics>) -> Result<Db, DbError> {
        todo!()
    }

    pub async fn execute(&self, _who: &Identity, _request: SqlRequest) -> Result<SqlAnswer, DbError> {
        todo!()
    }

    pub async fn subscribe(&self, _who: &Identity, _request: LiveRequest) -> Result<LiveStream, DbError> {
        todo!()
    }

    pub async fn install(
        &self,
        _who: &Identity,
        _namespace: &str,
        _name: &str,
        _body: Bytes,
    ) -> Result<Installed, DbError> {
        todo!()
    }

    /// All versions of all plugins the caller may see.
    pub fn plugins(&self, _who: &Identity, _namespace: Option<&str>) -> Result<Vec<Arc<Plugin>>, DbError> {
        todo!()
    }

    pub async fn uninstall(&self, _who: &Identity, _namespace: &str, _name: &str) -> Result<Seq, DbError> {
        todo!()
    }

    pub fn ready(&self) -> bool {
        todo!()
    }

    /// Brings gauges up to date before `/metrics` is printed.
    pub fn refresh_metrics(&self) {
        todo!()
    }

    /// Ends streams, finishes writes, closes the store.
    pub async fn close(&self) {
        todo!()
    }
}
