//! What `live` and `plugins` ask for through their small traits, answered by the other modules.

use std::collections::HashMap;
use std::sync::Arc;

use ::arrow::record_batch::RecordBatch;
use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use wire::image::ImageAt;
use wire::{FrameView, ImageRef, Schema, Scope};

use super::{blocking, now_micros};
use crate::catalog::Table;
use crate::config::Role;
use crate::live::requery::Done;
use crate::live::{Answer, Requery, RequeryError};
use crate::live::{GroupSpec, Piped, PipelineFault, Pipelines, Program, ProgramError};
use crate::plugins::registry::{ModuleSource, PluginWorker, Plugins};
use crate::plugins::{PipelineId, PluginError, Stage};
use crate::sql::RequestEnv;
use crate::sql::live::LivePlan;
use crate::sql::live::requery::{RequeryPlan, Rows};
use crate::sql::session::Sql;
use crate::store::{Commit, Seq, Store};

/// Module bytes for `plugins`, from the store.
pub(super) struct StoredModules(pub(super) Store);

impl ModuleSource for StoredModules {
    fn wasm(&self, sha256: &str) -> Result<Option<Bytes>, String> {
        self.0.plugin_wasm(sha256).map_err(|error| error.to_string())
    }
}

/// A compiled live query for `live`.
pub(super) struct PlanProgram(pub(super) LivePlan);

impl Program for PlanProgram {
    fn matches(&self, rows: &[ImageRef<'_>]) -> Result<Vec<bool>, ProgramError> {
        self.0.matches(rows).map_err(|error| ProgramError(error.to_string()))
    }

    fn project(&self, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        self.0.project(rows).map_err(|error| ProgramError(error.to_string()))
    }

    fn batch(&self, schema: &Schema, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        crate::sql::arrow::to_batch(schema, rows).map_err(|error| ProgramError(error.to_string()))
    }
}

/// For queries that have no program because they are run as a whole. Never asked.
pub(super) struct NoProgram;

impl Program for NoProgram {
    fn matches(&self, _: &[ImageRef<'_>]) -> Result<Vec<bool>, ProgramError> {
        Err(no_program())
    }

    fn project(&self, _: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        Err(no_program())
    }

    fn batch(&self, _: &Schema, _: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        Err(no_program())
    }
}

fn no_program() -> ProgramError {
    ProgramError("a query that is run as a whole was asked about single rows; this is a bug of the server".to_owned())
}

/// A live query that is run as a whole, for `live`.
pub(super) struct QueryRunner {
    pub store: Store,
    pub sql: Arc<Sql>,
    pub plan: Arc<RequeryPlan>,
    /// Namespace and user of whoever asked; all of a group see the same rows.
    pub namespace: String,
    pub user: Arc<str>,
    pub role: Role,
    pub limit: usize,
    /// How many may run at the same time, in the whole server.
    pub permits: Arc<Semaphore>,
    pub runtime: Handle,
}

impl Requery for QueryRunner {
    fn run(&self, done: Done) {
        let (store, sql, plan, limit) = (self.store.clone(), self.sql.clone(), self.plan.clone(), self.limit);
        let (namespace, user, permits) = (self.namespace.clone(), self.user.clone(), self.permits.clone());
        let role = self.role;
        self.runtime.spawn(async move {
            // Never closed.
            let _permit = permits.acquire_owned().await;
            // Taken only now, so that a run that waited sees what was written meanwhile; and nothing is told of it that a
            // power cut could take back.
            let durable = blocking(move || {
                let snapshot = store.snapshot();
                store.make_durable(&snapshot).map(|()| snapshot)
            });
            let snapshot = match durable.await {
                Ok(Ok(snapshot)) => snapshot,
                Ok(Err(error)) => return done(Err(RequeryError::Failed(error.to_string()))),
                Err(error) => return done(Err(RequeryError::Failed(error.to_string()))),
            };
            let seq = snapshot.seq();
            let catalog = snapshot.catalog().clone();
            let same = |table: &Table| {
                catalog.table_by_id(table.id).is_some_and(|now| now.schema_version == table.schema_version)
            };
            if !plan.tables.iter().all(|(table, _)| same(table)) {
                return done(Err(RequeryError::Changed));
            }
            let env = RequestEnv {
                catalog,
                snapshot,
                namespace,
                user,
                role,
                params: Arc::default(),
                overlay: Arc::default(),
                now: now_micros(),
            };
            let rows = sql.rerun(&plan, env, limit).await;
            done(match rows {
                Ok(Rows { rows, keys }) => Ok(Answer { seq, rows, keys }),
                Err(error) => Err(RequeryError::Failed(error.to_string())),
            });
        });
    }
}

/// One worker's plugins for `live`.
pub(super) struct WorkerPipelines {
    worker: PluginWorker,
    /// What the open pipelines consist of, to name the stage that failed.
    stages: HashMap<u64, Vec<Stage>>,
}

impl WorkerPipelines {
    pub(super) fn new(worker: PluginWorker) -> Self {
        WorkerPipelines { worker, stages: HashMap::new() }
    }
}

impl Pipelines for WorkerPipelines {
    fn open(&mut self, group: &GroupSpec) -> Result<u64, PipelineFault> {
        let input = group.table.schema();
        let opened = self.worker.open(group.table.namespace, &group.stages, &input);
        let id = opened.map_err(|error| fault(error, &group.stages))?.id.0;
        self.stages.insert(id, group.stages.clone());
        Ok(id)
    }

    fn run(&mut self, id: u64, commit: Option<Seq>, base: &[u8], places: &[ImageAt]) -> Result<Piped, PipelineFault> {
        let rows = crate::plugins::Rows { commit, base, places };
        let stages = self.stages.get(&id).map_or(&[][..], Vec::as_slice);
        let piped = self.worker.run(PipelineId(id), rows).map_err(|error| fault(error, stages))?;
        Ok(Piped { keep: piped.keep, output: piped.output })
    }

    fn close(&mut self, id: u64) {
        self.stages.remove(&id);
        self.worker.close(PipelineId(id));
    }
}

/// Puts a commit's shared section into its namespace's ring.
pub(super) fn publish_section(plugins: &Plugins, commit: &Arc<Commit>) {
    match FrameView::parse(&commit.frame) {
        Ok(frame) => {
            if let Some(section) = frame.section(&Scope::Shared) {
                plugins.publish(commit.namespace, commit.seq, section.bytes);
            }
        }
        // Workers read the log instead and fail there, where it can be told to a stream.
        Err(error) => tracing::error!(seq = commit.seq.0, %error, "a frame that was just written cannot be read"),
    }
}

fn fault(error: PluginError, stages: &[Stage]) -> PipelineFault {
    let (name, cause, message) = match error {
        PluginError::Fault { plugin, cause, message, .. } => (Some(plugin), cause.as_str(), message),
        PluginError::Params(message) | PluginError::Refused(message) => (None, "configure", message),
        PluginError::Host(message) => (None, "host", message),
    };
    let stage = stages.iter().find(|stage| Some(&stage.name) == name.as_ref()).or(stages.first());
    PipelineFault {
        plugin: name.or_else(|| stage.map(|stage| stage.name.clone())).unwrap_or_default(),
        version: stage.map_or(0, |stage| stage.version),
        sha256: stage.map_or_else(String::new, |stage| stage.sha256.clone()),
        cause,
        message,
    }
}
