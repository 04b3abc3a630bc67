//! Our side, as a library: a store, the SQL engine, and live queries over them. In a folder of its own, because cargo
//! takes every file beside the benches for one; each bench that needs it names it by its path.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::record_batch::RecordBatch;
use host::catalog::{OnError, Semantics};
use host::config::{Config, Role};
use host::http::sse::Events;
use host::live::{
    Batch, ChangeOutput, Delivery, GroupSpec, Live, OldMode, Piped, PipelineFault, Pipelines, Program, ProgramError,
    Question, Subscription,
};
use host::sql::live::{Live as Compiled, LivePlan};
use host::sql::session::Sql;
use host::sql::{RequestEnv, StatementKind};
use host::store::{Store, Transaction};
use host::telemetry::Metrics;
use tokio::runtime::Runtime;
use wire::image::ImageAt;
use wire::{ChangeAt, ImageRef, Schema};

pub struct World {
    pub runtime: Runtime,
    pub sql: Arc<Sql>,
    pub store: Store,
    pub config: Config,
}

impl World {
    pub fn new(dir: &Path) -> World {
        Self::with(Config::new(dir))
    }

    pub fn with(config: Config) -> World {
        let store = Store::open(&config.store).unwrap();
        Self::over(store, config)
    }

    /// Over a store that was just opened.
    pub fn over(store: Store, config: Config) -> World {
        store.start(Box::new(|_| {}));
        let sql = Arc::new(Sql::new(config.sql.clone(), Vec::new()).unwrap());
        World { runtime: Runtime::new().unwrap(), sql, store, config }
    }

    pub fn env(&self, user: &str) -> RequestEnv {
        RequestEnv::new(self.store.snapshot(), user, Role::Admin)
    }

    /// Statements of one kind, each in a commit of its own.
    pub fn write(&self, text: &str) {
        for statement in self.sql.parse(text).unwrap().iter() {
            let env = self.env("admin");
            let base = env.snapshot.seq();
            let namespace = env.catalog.namespace("main").unwrap().id;
            let (rows, catalog) = match statement.kind {
                StatementKind::Ddl => (Vec::new(), self.sql.ddl(statement, &env).unwrap().writes),
                _ => (self.runtime.block_on(self.sql.change_set(statement, env)).unwrap().writes, Vec::new()),
            };
            self.commit(Transaction { namespace, base, rows, catalog, receipt: None });
        }
    }

    pub fn commit(&self, transaction: Transaction) {
        self.runtime.block_on(self.store.commit(transaction)).unwrap();
    }

    pub fn live(&self) -> Live {
        let pipelines: Vec<Box<dyn Pipelines>> = vec![Box::new(NoPlugins)];
        let mut options = self.config.live.clone();
        options.workers = 1;
        options.max_subscriptions = 1_000_000;
        options.heartbeat = Duration::from_secs(60);
        Live::start(self.store.clone(), pipelines, Arc::new(Events), options, Arc::new(Metrics::default()))
    }

    /// A live query of this user that filters one table.
    pub fn spec(&self, text: &str, user: &str) -> Arc<GroupSpec> {
        let plan = match self.sql.live(text, &self.env(user)).unwrap() {
            Compiled::Incremental(plan) => plan,
            Compiled::Requery(_) => panic!("{text}"),
        };
        Arc::new(GroupSpec {
            key: format!("{text} {user}").into_bytes(),
            live_id: String::new(),
            table: plan.table.clone(),
            scope: plan.scope.clone(),
            requery: None,
            range: plan.range.clone(),
            anchors: plan.anchors.clone(),
            index: String::new(),
            program: Arc::new(Query(plan)),
            stages: Vec::new(),
            semantics: Semantics::Map,
            on_error: OnError::Stop,
            output: None,
            old: OldMode::Changed,
            fingerprint: "f".to_owned(),
            epoch: self.store.epoch(),
        })
    }

    /// The bytes that a subscriber is given next.
    pub fn next_events(&self, subscription: &mut Subscription) -> bytes::Bytes {
        loop {
            match self.runtime.block_on(subscription.next(None)) {
                Delivery::Events { bytes, .. } => return bytes,
                Delivery::UpToDate(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

struct Query(LivePlan);

fn plan<'a>(asked: &Question<'a>) -> (&'a LivePlan, &'a [ImageRef<'a>]) {
    let program: &dyn Any = &**asked.program;
    (&program.downcast_ref::<Query>().expect("all are of this kind").0, asked.rows)
}

fn failed(error: impl std::fmt::Display) -> ProgramError {
    ProgramError(error.to_string())
}

impl Program for Query {
    fn matches(&self, rows: &[ImageRef<'_>]) -> Result<Vec<bool>, ProgramError> {
        self.0.matches(rows).map_err(failed)
    }

    fn shape(&self) -> Option<usize> {
        self.0.shape()
    }

    fn matches_each(&self, asked: &[Question<'_>]) -> Result<Vec<bool>, ProgramError> {
        let plans: Vec<_> = asked.iter().map(plan).collect();
        LivePlan::matches_each(&plans).map_err(failed)
    }

    fn project(&self, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        self.0.project(rows).map_err(failed)
    }

    fn keys(&self, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        self.0.keys(rows).map_err(failed)
    }

    fn batch(&self, schema: &Schema, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        host::sql::arrow::to_batch(schema, rows).map_err(failed)
    }
}

struct NoPlugins;

impl Pipelines for NoPlugins {
    fn open(&mut self, _: &GroupSpec) -> Result<u64, PipelineFault> {
        unreachable!("no query here has a pipeline")
    }

    fn run(&mut self, _: u64, _: Batch<'_>, _: &[ImageAt]) -> Result<Piped, PipelineFault> {
        unreachable!("no query here has a pipeline")
    }

    fn run_changes(&mut self, _: u64, _: Batch<'_>, _: &[ChangeAt]) -> Result<Vec<ChangeOutput>, PipelineFault> {
        unreachable!("no query here has a pipeline")
    }

    fn close(&mut self, _: u64) {}
}
