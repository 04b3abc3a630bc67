//! The one place that joins store, sql, plugins and live: execute, subscribe, install a plugin.
//!
//! Plain owned values in and out; no status codes, no bytes on disk, no guest memory. The order of a write is decided
//! in [`write`] and nowhere else; what a live stream does across resync, plugin failures and table drops in
//! [`subscribe`]; what an upload goes through in [`install`].

mod adapters;
mod audit;
mod bulk;
mod compiled;
mod errors;
mod fingerprint;
mod idempotency;
mod index;
mod install;
mod kills;
mod logs;
#[cfg(test)]
mod matching;
mod rerun;
mod sample;
mod streams;
mod subscribe;
mod system;
#[cfg(test)]
mod tests;
pub mod trial;
mod uses;
mod write;

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::{RwLock, Semaphore, watch};

use crate::catalog::{DEFAULT_NAMESPACE, OnError, Plugin, Semantics, Stage};
use crate::config::{Config, Role};
use crate::live::{Encoder, Live, OldMode, PipelineFault, Pipelines};
use crate::plugins::registry::Plugins;
use crate::plugins::{Measured, PluginError, PluginOptions};
use crate::sql::session::Sql;
use crate::sql::system::SystemTables;
use crate::sql::{OutputColumn, Overlay, Param, Refusal, RequestEnv, RowStream, SqlError, StatementKind};
use crate::store::snapshot::Snapshot;
use crate::store::{Commit, CommitError, Seq, Store, StoreError};
use crate::telemetry::Metrics;

pub use crate::live::{AnyOutlet, Outlet, Sink};
pub use crate::store::{Note, NoteWrite};
pub use bulk::{BulkFailure, BulkInsert, BulkOptions, BulkReport, BulkRows};
pub use errors::{PluginErrorEntry, Replay};
pub use idempotency::Idempotency;
pub use logs::PluginLogs;
pub use subscribe::LiveStream;
pub use trial::{Trial, TrialRequest, TrialResult};

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub user: Arc<str>,
    pub role: Role,
    /// Where from, where that is known: for the audit log alone.
    pub address: Option<IpAddr>,
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
    /// This stage does not fit the live query: it may in another version.
    #[error("{error}")]
    Stage { stage: Box<Stage>, error: Box<PluginError> },
    /// The plugin or version is in use or stands in the way: nothing was changed.
    #[error("{0}")]
    InUse(String),
    #[error("this Idempotency-Key came with another request before; take a new key for each new write")]
    KeyReused,
    #[error("another request with this Idempotency-Key is being carried out; send this one again when that has ended")]
    KeyInUse,
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    BadRequest(String),
    /// More statements than the format of the answer can hold: nothing was run.
    #[error(
        "the format asked for carries the result of one statement, and there are {0}; send them one by one, or accept \
         application/json"
    )]
    SeveralResults(usize),
    #[error("{0}")]
    Forbidden(Box<Refusal>),
    /// It was ended on purpose and shall not come back by itself.
    #[error("{0}")]
    Gone(String),
    #[error("{0}")]
    TooMany(String),
    /// It may well go another time.
    #[error("{0}")]
    Busy(String),
    #[error("the server is shutting down")]
    Closed,
    /// Our own bug: the details go to the log.
    #[error("internal error: {0}")]
    Internal(String),
}

pub struct SqlRequest {
    pub sql: String,
    pub params: Vec<Param>,
    pub namespace: Option<String>,
    /// Refuse everything but queries (GET).
    pub read_only: bool,
    /// A write that may be sent again. Queries may be anyway.
    pub idempotency: Option<Idempotency>,
    /// Refuse several statements: the format of the answer holds one result.
    pub one_result: bool,
}

pub enum StatementResult {
    Rows(RowStream),
    /// With the rows of RETURNING, where a statement has it.
    Affected {
        affected: u64,
        returned: Option<RowStream>,
    },
}

pub struct SqlAnswer {
    pub results: Vec<StatementResult>,
    /// The commit of the writes, or the snapshot the queries saw.
    pub seq: Seq,
    /// It was answered before, and nothing was done now.
    pub replayed: bool,
}

/// One stage as asked for: `name`, `name@version` or `name@sha256:…`, and JSON object parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct StageRequest {
    pub plugin: String,
    pub params: serde_json::Value,
}

#[derive(Clone, Debug, PartialEq)]
pub struct LiveRequest {
    pub sql: String,
    pub params: Vec<Param>,
    pub namespace: Option<String>,
    pub pipeline: Vec<StageRequest>,
    pub on_error: OnError,
    /// Present rows first; where nothing is said, as the stream's semantics have it.
    pub snapshot: Option<bool>,
    /// Of the present rows only the last so many in key order.
    pub last_rows: Option<u64>,
    pub old: OldMode,
    /// `Last-Event-ID`.
    pub position: Option<String>,
}

impl LiveRequest {
    /// The query as it is when nothing else is said.
    pub fn new(sql: impl Into<String>) -> LiveRequest {
        LiveRequest {
            sql: sql.into(),
            params: Vec::new(),
            namespace: None,
            pipeline: Vec::new(),
            on_error: OnError::default(),
            snapshot: None,
            last_rows: None,
            old: OldMode::default(),
            position: None,
        }
    }
}

/// Why what the client holds is void.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResyncReason {
    Expired,
    Epoch,
    Schema,
    Plugin,
    /// A query that is run again as a whole goes on only from what its group still holds in memory.
    Requery,
}

/// The next thing of a live stream, to be framed by `http`.
#[derive(Debug)]
pub enum LiveOutput {
    Start {
        live_id: String,
        columns: Vec<OutputColumn>,
        key: Vec<String>,
        semantics: Semantics,
        /// At most once in this time the query is run again; `None`: it is not, changes are told one by one.
        requery: Option<std::time::Duration>,
        from: Option<String>,
    },
    /// Framed by the [`Encoder`] already.
    Encoded(Bytes),
    UpToDate {
        position: String,
        seq: Seq,
    },
    Resync(ResyncReason),
    /// Feed streams: another version of a plugin from here on.
    Pipeline {
        plugin: String,
        version: u32,
        sha256: String,
    },
    /// The pipeline failed after `seq`; the stream waits for another version of the plugin, or for it to be tried again.
    PluginError {
        fault: PipelineFault,
        seq: Seq,
    },
    /// A row could not be evaluated: the stream ends.
    Failed {
        message: String,
    },
    /// The stream ends, and why.
    Closed {
        code: &'static str,
        message: String,
    },
    /// The stream ends: what it asks for is refused by now.
    Refused(Box<DbError>),
}

/// What a plugin upload answers.
#[derive(Debug)]
pub struct Installed {
    pub plugin: Arc<Plugin>,
    pub seq: Seq,
    /// The same bytes were active already: nothing changed.
    pub unchanged: bool,
    /// What the module cost when it was tried; `None`: nothing was tried.
    pub measured: Option<Measured>,
}

/// The database; clones share it.
#[derive(Clone)]
pub struct Db {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    sql: Arc<Sql>,
    plugins: Arc<Plugins>,
    live: Live,
    streams: Arc<streams::Streams>,
    metrics: Arc<Metrics>,
    live_options: crate::config::LiveOptions,
    /// Live queries that are run as a whole, at the same time.
    requeries: Arc<Semaphore>,
    /// Live queries compiled at once. Ten thousand that come back together would else be compiled on as many threads as
    /// the runtime has for blocking work, and each of those keeps the memory it once used.
    compilers: Arc<Semaphore>,
    /// Those that were compiled lately: of ten thousand that ask the same one is.
    compiled: compiled::CompiledQueries,
    sources: system::Sources,
    audit: Arc<audit::Audit>,
    /// Writers hold it shared; one that lost three times in a row takes it alone and so must win.
    turn: RwLock<()>,
    /// Writes under way, from their planning to their acknowledgement: each holds its rows in memory.
    writes: Semaphore,
    /// The catalog's version, sent after every catalog commit: wakes streams that wait for a plugin.
    catalog_version: watch::Sender<u64>,
    plugin_uses: Arc<uses::PluginUses>,
    refreshing: Mutex<()>,
    closing: AtomicBool,
}

impl Db {
    /// Opens the store, recovers, starts the committer and the live workers. Blocks.
    pub fn open(config: &Config, encoder: Arc<dyn Encoder>, metrics: Arc<Metrics>) -> Result<Db, DbError> {
        let store = Store::open(&config.store)?;
        let source = Box::new(adapters::StoredModules(store.clone()));
        let options = PluginOptions { cache_dir: Some(config.data_dir.join("compiled")), ..config.plugins.clone() };
        let plugins = Arc::new(Plugins::new(options, source, metrics.clone())?);
        let catalog = store.catalog();
        let known = |sha256: &str| {
            let plugins = catalog.namespaces().flat_map(|namespace| namespace.plugins.values().flatten());
            plugins.into_iter().any(|plugin| plugin.sha256 == sha256)
        };
        plugins.sweep_cache(known);
        let pipelines = (0..config.live.workers)
            .map(|index| {
                let errors = errors::PluginErrors::new(store.clone());
                Box::new(adapters::WorkerPipelines::new(plugins.worker(index), errors)) as Box<dyn Pipelines>
            })
            .collect();
        let live = Live::start(store.clone(), pipelines, encoder, config.live.clone(), metrics.clone());
        let streams = Arc::new(streams::Streams::load(store.clone())?);
        let audit = audit::Audit::start(store.clone(), metrics.clone())?;
        let sources = || system::Sources {
            store: store.clone(),
            live: live.clone(),
            streams: streams.clone(),
            metrics: metrics.clone(),
            audit: audit.clone(),
        };
        let sql = Arc::new(Sql::new(config.sql.clone(), system::tables(config, sources()))?);
        metrics.session_contexts.inc_by(sql.contexts_created());
        let sources = sources();
        let (catalog_version, _) = watch::channel(store.catalog().version);

        let inner = Arc::new(Inner {
            store: store.clone(),
            sql,
            plugins,
            live,
            streams,
            metrics,
            live_options: config.live.clone(),
            audit: audit.clone(),
            requeries: Arc::new(Semaphore::new(config.live.requery_runs)),
            compilers: Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(2, usize::from) * 2)),
            compiled: compiled::CompiledQueries::new(),
            sources,
            turn: RwLock::new(()),
            writes: Semaphore::new(config.store.write_queue),
            catalog_version,
            plugin_uses: Arc::default(),
            refreshing: Mutex::default(),
            closing: AtomicBool::new(false),
        });
        // Weak, because the committer thread (which owns the hook) is itself owned through `inner.store`.
        let weak = Arc::downgrade(&inner);
        store.start(Box::new(move |commit| {
            if let Some(inner) = weak.upgrade() {
                inner.publish(commit);
            }
        }));
        audit.started(config);
        Ok(Db { inner })
    }

    /// Runs one request: queries at one snapshot, or DML as one transaction, or DDL as one commit.
    pub async fn execute(&self, who: &Identity, request: SqlRequest) -> Result<SqlAnswer, DbError> {
        self.check_open()?;
        if let Some(command) = crate::sql::live::command(&request.sql)? {
            return self.live_command(who, command, request).await;
        }
        let statements = self.parse(&request.sql).await?;
        let kind = write::one_kind(&statements)?;
        if request.read_only && kind != StatementKind::Query {
            return Err(DbError::BadRequest("GET only reads; send INSERT, UPDATE, DELETE and DDL by POST".into()));
        }
        if request.one_result && statements.len() > 1 {
            return Err(DbError::SeveralResults(statements.len()));
        }
        crate::sql::check_params(&statements, &request.params)?;
        match kind {
            StatementKind::Query => self.query(who, &statements, request).await,
            StatementKind::Dml => write::dml(self, who, &statements, request).await,
            StatementKind::Ddl => write::ddl(self, who, &statements, request).await,
        }
    }

    /// Whether it takes requests: `false` while it closes, and for good when the store or a live worker has failed.
    pub fn ready(&self) -> bool {
        !self.inner.closing.load(Ordering::Acquire) && !self.inner.store.failed() && !self.inner.live.is_broken()
    }

    /// Whether the store took a failed write: the process should end and recover at its next start.
    pub fn failed(&self) -> bool {
        self.inner.store.failed()
    }

    /// What the layers above keep over restarts, by kind: keys and values in order. Blocks.
    pub fn notes(&self, kind: &str) -> Result<Vec<Note>, DbError> {
        Ok(self.inner.store.notes(kind)?)
    }

    /// Puts or removes such notes, all or none: they outlast a crash, but not always a power cut. Blocks.
    pub fn leave_notes(&self, kind: &str, notes: &[NoteWrite]) -> Result<(), DbError> {
        Ok(self.inner.store.leave_notes(kind, notes)?)
    }

    /// Counts something that was done and is no commit in the audit log: names alone, never a value. Nothing waits for it.
    pub fn audit(&self, who: &Identity, action: &'static str, what: &'static str, object: &str) {
        self.inner.audit.count(audit::Event::done(Some(who), action, what, object));
    }

    /// The same for something that was refused, to somebody whose name may not be known.
    pub fn audit_denial(&self, who: Option<&Identity>, address: Option<IpAddr>, what: &'static str, object: &str) {
        self.inner.audit.count(audit::Event::denied(who, address, what, object));
    }

    /// Brings gauges up to date before `/metrics` is printed.
    pub fn refresh_metrics(&self) {
        system::refresh_gauges(&self.inner.sources);
        let metrics = &self.inner.metrics;
        let load = self.inner.sql.load();
        metrics.sql_memory_bytes.set(load.memory_bytes as i64);
        metrics.heavy_queries.set(load.heavy as i64);
        metrics.heavy_waiting.set(load.waiting as i64);
        // One at a time: two that find the same difference would both add it.
        let _one = self.inner.refreshing.lock().unwrap_or_else(PoisonError::into_inner);
        let (hits, misses) = self.inner.sql.plan_counts();
        for (counter, now) in [(&metrics.plan_cache_hits, hits), (&metrics.plan_cache_misses, misses)] {
            counter.inc_by(now.saturating_sub(counter.get()));
        }
    }

    /// From now on [`Db::ready`] is false, new requests are refused and live streams say why they end. Requests that
    /// run already still finish.
    pub fn start_closing(&self) {
        self.inner.closing.store(true, Ordering::Release);
        self.inner.live.close();
    }

    /// Finishes waiting writes and closes the store. Blocks.
    pub fn close(&self) {
        self.start_closing();
        self.inner.audit.stopped();
        self.inner.store.close();
    }

    async fn query(
        &self,
        who: &Identity,
        statements: &[crate::sql::Statement],
        request: SqlRequest,
    ) -> Result<SqlAnswer, DbError> {
        let env = self.env(who, self.inner.store.snapshot(), request.namespace, request.params)?;
        let seq = env.snapshot.seq();
        let mut results = Vec::with_capacity(statements.len());
        for statement in statements {
            self.inner.metrics.queries.inc();
            let rows = self.inner.sql.query(statement, env.clone(), !results.is_empty()).await?;
            results.push(StatementResult::Rows(rows));
        }
        Ok(SqlAnswer { results, seq, replayed: false })
    }

    /// Parsing is bounded by the gate, but needs a large stack and some time: not on the async threads.
    async fn parse(&self, text: &str) -> Result<Arc<[crate::sql::Statement]>, DbError> {
        if let Some(statements) = self.inner.sql.parsed(text) {
            return Ok(statements);
        }
        // What takes less time than handing it over is done here.
        if text.len() <= SHORT_TEXT {
            return Ok(self.inner.sql.parse(text)?);
        }
        let (sql, text) = (self.inner.sql.clone(), text.to_owned());
        Ok(blocking(move || sql.parse(&text)).await??)
    }

    fn env(
        &self,
        who: &Identity,
        snapshot: Snapshot,
        namespace: Option<String>,
        params: Vec<Param>,
    ) -> Result<RequestEnv, DbError> {
        let catalog = snapshot.catalog().clone();
        let namespace = namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned());
        if catalog.namespace(&namespace).is_none() {
            return Err(unknown_namespace(&namespace));
        }
        Ok(RequestEnv {
            catalog,
            snapshot,
            namespace,
            user: who.user.clone(),
            role: who.role,
            params: Arc::new(params),
            overlay: Arc::new(Overlay::default()),
            now: now_micros(),
        })
    }

    fn check_open(&self) -> Result<(), DbError> {
        if self.inner.closing.load(Ordering::Acquire) { Err(DbError::Closed) } else { Ok(()) }
    }
}

impl Inner {
    /// The commit hook: a durable commit becomes visible to live queries. On the commit thread, so only bookkeeping
    /// and at most one copy of the shared section into the namespace's ring.
    fn publish(&self, commit: &Arc<Commit>) {
        self.metrics.commits.inc();
        self.metrics.commit_bytes.inc_by(commit.frame.len() as u64);
        // Ring before tail: a worker that sees the commit finds its bytes in the window.
        if self.plugins.has_ring(commit.namespace) {
            adapters::publish_section(&self.plugins, commit);
        }
        self.live.published(commit);
        if let Some(catalog) = &commit.catalog {
            self.catalog_version.send_replace(catalog.version);
        }
    }
}

fn unknown_namespace(name: &str) -> DbError {
    if SystemTables::is_home(name) {
        let what = "holds system tables alone, to be read with SQL by their full names";
        return DbError::NotFound(format!("namespace \"{name}\" {what}: say another one"));
    }
    let bare = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    let hint = match name {
        "" => "leave the name out for main".to_owned(),
        _ if bare => format!("create it with CREATE NAMESPACE {name}"),
        _ => format!("create it with CREATE NAMESPACE \"{}\"", name.replace('"', "\"\"")),
    };
    DbError::NotFound(format!("namespace \"{name}\" does not exist; {hint}"))
}

fn now_micros() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as i64)
}

/// Parsed in some tens of microseconds.
const SHORT_TEXT: usize = 1024;

/// Runs blocking work off the async threads. A panic there is our own bug and ends this request only.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, DbError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| DbError::Internal(error.to_string()))
}
