//! What `live` and `plugins` ask for through their small traits, answered by the other modules.

use std::collections::HashMap;
use std::sync::Arc;

use ::arrow::record_batch::RecordBatch;
use bytes::Bytes;
use wire::image::ImageAt;
use wire::{FrameView, ImageRef, Schema, Scope};

use crate::live::{GroupSpec, Piped, PipelineFault, Pipelines, Program, ProgramError};
use crate::plugins::registry::{ModuleSource, PluginWorker, Plugins};
use crate::plugins::{PipelineId, PluginError, Rows, Stage};
use crate::sql::live::LivePlan;
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
        let rows = Rows { commit, base, places };
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
