//! What `live` and `plugins` ask for through their small traits, answered by the other modules.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ::arrow::record_batch::RecordBatch;
use bytes::Bytes;
use wire::image::ImageAt;
use wire::{ChangeAt, FrameView, ImageRef, Schema, Scope};

use super::errors::{self, PluginErrors};
use crate::catalog::{NamespaceId, Table};
use crate::live::{
    Batch, ChangeOutput, GroupSpec, Pass, Piped, PipelineFault, Pipelines, Program, ProgramError, Question,
};
use crate::plugins::registry::{ModuleSource, Owner, PluginWorker, Plugins};
use crate::plugins::{Changes, FaultCause, Origin, PipelineId, PluginError, Rows, Stage, UnitFault};
use crate::sql::live::LivePlan;
use crate::store::{Commit, Seq, Store, StoreError};

/// After a fault of ours (no memory, no mappings left) a pipeline is tried again.
pub(super) const HOST_REST: Duration = Duration::from_secs(5);

/// The store's setting with the key of the compiled modules' MACs.
const CACHE_KEY: &str = "plugin_cache_key";

/// Module bytes for `plugins`, from the store.
pub(super) struct StoredModules(pub(super) Store);

impl ModuleSource for StoredModules {
    fn wasm(&self, sha256: &str) -> Result<Option<Bytes>, String> {
        self.0.plugin_wasm(sha256).map_err(|error| error.to_string())
    }

    fn namespace_name(&self, namespace: NamespaceId) -> Option<String> {
        let catalog = self.0.catalog();
        catalog.namespaces().find(|found| found.id == namespace).map(|found| found.name.clone())
    }

    fn secret(&self) -> Result<[u8; 32], String> {
        let told = |error: StoreError| error.to_string();
        if let Some(kept) = self.0.meta_get(CACHE_KEY).map_err(told)? {
            return kept.try_into().map_err(|_| format!("the setting {CACHE_KEY} has the wrong length"));
        }
        let secret: [u8; 32] = rand::random();
        self.0.meta_put(CACHE_KEY, &secret).map_err(told)?;
        Ok(secret)
    }
}

/// A compiled live query for `live`.
pub(super) struct PlanProgram(pub(super) LivePlan);

impl Program for PlanProgram {
    fn matches(&self, rows: &[ImageRef<'_>]) -> Result<Vec<bool>, ProgramError> {
        self.0.matches(rows).map_err(|error| ProgramError(error.to_string()))
    }

    fn shape(&self) -> Option<usize> {
        self.0.shape()
    }

    fn matches_each(&self, asked: &[Question<'_>]) -> Result<Vec<bool>, ProgramError> {
        let Some(asked) = asked.iter().map(plan).collect::<Option<Vec<_>>>() else {
            return Err(ProgramError("programs of several kinds were asked together".to_owned()));
        };
        LivePlan::matches_each(&asked).map_err(|error| ProgramError(error.to_string()))
    }

    fn project(&self, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        self.0.project(rows).map_err(|error| ProgramError(error.to_string()))
    }

    fn keys(&self, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        self.0.keys(rows).map_err(|error| ProgramError(error.to_string()))
    }

    fn batch(&self, schema: &Schema, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        crate::sql::arrow::to_batch(schema, rows).map_err(|error| ProgramError(error.to_string()))
    }
}

fn plan<'a>(asked: &Question<'a>) -> Option<(&'a LivePlan, &'a [ImageRef<'a>])> {
    let program: &dyn Any = &**asked.program;
    program.downcast_ref::<PlanProgram>().map(|program| (&program.0, asked.rows))
}

/// One worker's plugins for `live`.
pub(super) struct WorkerPipelines {
    worker: PluginWorker,
    errors: PluginErrors,
    open: HashMap<u64, OpenGroup>,
}

/// What is known of an open pipeline's group, to name the stage that failed and to note what it failed on.
struct OpenGroup {
    stages: Vec<Stage>,
    /// Of a query over several the first.
    table: Arc<Table>,
    scope: Scope,
    /// The columns of its rows, where they are rows of a result; else they are the table's.
    result: Option<Schema>,
    live_id: String,
}

impl WorkerPipelines {
    pub(super) fn new(worker: PluginWorker, errors: PluginErrors) -> Self {
        WorkerPipelines { worker, errors, open: HashMap::new() }
    }

    fn group(&self, id: u64) -> Result<&OpenGroup, PipelineFault> {
        let closed = || PluginError::Host(format!("pipeline {id} is not open"));
        self.open.get(&id).ok_or_else(|| fault(closed(), &[]))
    }
}

impl OpenGroup {
    /// Only the shared section of a commit can lie in a ring; everything else is handed over as bytes.
    fn in_ring(&self, batch: Batch<'_>) -> Option<Seq> {
        (batch.pass != Pass::Snapshot && self.scope == Scope::Shared).then_some(batch.seq)
    }

    /// Notes what failed while the pipeline went on: in a commit that is new each unit, in present rows, a replay and
    /// results, where the same units come again and again, those that are not noted yet.
    fn note<At>(
        &self,
        errors: &PluginErrors,
        batch: Batch<'_>,
        faults: &[UnitFault],
        images: impl Fn(&At) -> (Option<ImageAt>, Option<ImageAt>),
        places: &[At],
    ) {
        if faults.is_empty() {
            return;
        }
        let schema = self.result.clone().unwrap_or_else(|| self.table.schema());
        let entries = faults.iter().filter_map(|fault| {
            let (before, stage) = (self.stages.get(..fault.stage)?, self.stages.get(fault.stage)?);
            let (old, row) = images(places.get(fault.index)?);
            Some(errors::Entry {
                table: &self.table,
                schema: &schema,
                scope: &self.scope,
                live_id: &self.live_id,
                stage,
                before,
                fault,
                old,
                row,
            })
        });
        errors.append(batch.seq, batch.base, batch.pass != Pass::Live, entries);
    }
}

impl Pipelines for WorkerPipelines {
    fn open(&mut self, group: &GroupSpec) -> Result<u64, PipelineFault> {
        let input = group.input();
        let owner = match group.whose() {
            Scope::Shared => Owner::shared(group.table.namespace),
            Scope::User(user) => Owner::user(group.table.namespace, user),
        };
        let opened = self.worker.open(owner, &group.stages, &input, group.on_error);
        let id = opened.map_err(|error| fault_at(Some(error.stage), error.error, &group.stages))?.id.0;
        let open = OpenGroup {
            stages: group.stages.clone(),
            table: group.table.clone(),
            scope: group.whose().clone(),
            result: group.requery.is_some().then_some(input),
            live_id: group.live_id.clone(),
        };
        self.open.insert(id, open);
        Ok(id)
    }

    fn run(&mut self, id: u64, batch: Batch<'_>, places: &[ImageAt]) -> Result<Piped, PipelineFault> {
        let commit = self.group(id)?.in_ring(batch);
        let rows = Rows { origin: origin(batch.pass), commit, base: batch.base, places };
        let piped = self.worker.run(PipelineId(id), rows);
        let group = self.group(id)?;
        let faults = piped.as_ref().map_or_else(|cut| &cut.faults, |piped| &piped.faults);
        group.note(&self.errors, batch, faults, |at| (None, Some(*at)), places);
        let piped = piped.map_err(|cut| fault(cut.error, &group.stages))?;
        Ok(Piped { keep: piped.keep, output: piped.output })
    }

    fn run_changes(
        &mut self,
        id: u64,
        batch: Batch<'_>,
        changes: &[ChangeAt],
    ) -> Result<Vec<ChangeOutput>, PipelineFault> {
        let commit = self.group(id)?.in_ring(batch);
        let input = Changes { origin: origin(batch.pass), commit, base: batch.base, places: changes };
        let piped = self.worker.run_changes(PipelineId(id), input);
        let group = self.group(id)?;
        let faults = piped.as_ref().map_or_else(|cut| &cut.faults, |piped| &piped.faults);
        group.note(&self.errors, batch, faults, |at| (at.old, at.new), changes);
        let piped = piped.map_err(|cut| fault(cut.error, &group.stages))?;
        let output = |output: crate::plugins::ChangeOutput| ChangeOutput {
            index: output.index,
            op: output.op,
            image: output.image,
        };
        Ok(piped.outputs.into_iter().map(output).collect())
    }

    fn close(&mut self, id: u64) {
        self.open.remove(&id);
        self.worker.close(PipelineId(id));
    }
}

fn origin(pass: Pass) -> Origin {
    match pass {
        Pass::Live => Origin::Live,
        Pass::Replay => Origin::Replay,
        Pass::Snapshot => Origin::Snapshot,
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
    fault_at(None, error, stages)
}

/// A stage that does not fit its live query, told like one that failed while it ran.
pub(super) fn unfit(stage: &Stage, error: PluginError) -> PipelineFault {
    let error = match error {
        PluginError::Fault { plugin, cause, index, message, .. } => {
            PluginError::Fault { plugin, stage: Some(0), cause, index, message }
        }
        PluginError::Resting { plugin, rest, .. } => PluginError::Resting { plugin, stage: 0, rest },
        error => error,
    };
    // Of a busy moment as well as of the guest.
    let again = matches!(error, PluginError::Fault { cause: FaultCause::Deadline, .. }).then_some(HOST_REST);
    let fault = fault_at(Some(0), error, std::slice::from_ref(stage));
    PipelineFault { retry_after: fault.retry_after.or(again), ..fault }
}

/// The fault with the plugin that is to blame, where the error says which stage it was, or the caller knows.
fn fault_at(known: Option<usize>, error: PluginError, stages: &[Stage]) -> PipelineFault {
    let (stage, cause, message, retry_after) = match error {
        PluginError::Fault { stage, cause, message, .. } => (stage, cause.as_str(), message, None),
        PluginError::Resting { stage, rest, .. } => {
            let message = format!("it failed too often and rests for {} s", rest.as_secs_f32().ceil());
            (Some(stage), "breaker", message, Some(rest))
        }
        PluginError::Params(message) | PluginError::Unsupported(message) => (None, "configure", message, None),
        // Its module was good when it was uploaded: other modules kept it from being compiled again.
        PluginError::Refused(message) => (None, "configure", message, Some(HOST_REST)),
        // No plugin's doing, wherever it happened: another version would not help, another time may.
        PluginError::Host(message) => {
            return PipelineFault { plugin: None, cause: "host", message, retry_after: Some(HOST_REST) };
        }
    };
    let plugin = stage.or(known).and_then(|stage| stages.get(stage)).cloned().map(Box::new);
    // The fault names the plugin itself.
    let named = plugin.as_ref().and_then(|plugin| message.strip_prefix(&format!("plugin {}", plugin.name)));
    let message = named.map_or(message.as_str(), |rest| rest.trim_start_matches([':', ' '])).to_owned();
    PipelineFault { plugin, cause, message, retry_after }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_fault_names_the_plugin_that_failed_or_none() {
        let stage =
            |version| Stage { name: "twice".to_owned(), version, sha256: version.to_string(), params: String::new() };
        let stages = [stage(1), stage(2)];
        let version = |fault: PipelineFault| fault.plugin.map(|plugin| plugin.version);
        let failed = |stage| PluginError::Fault {
            plugin: "twice".to_owned(),
            stage,
            cause: FaultCause::Trap,
            index: None,
            message: String::new(),
        };
        assert_eq!(version(fault(failed(Some(1)), &stages)), Some(2), "the same plugin in two versions");
        assert_eq!(version(fault(failed(None), &stages)), None);
        assert_eq!(version(fault(PluginError::Host("no memory".to_owned()), &stages)), None);
        assert_eq!(version(fault_at(Some(1), PluginError::Params("no".to_owned()), &stages)), Some(2));
        let rest = Duration::from_secs(2);
        let resting = fault(PluginError::Resting { plugin: "twice".to_owned(), stage: 0, rest }, &stages);
        assert_eq!((resting.cause, resting.retry_after, version(resting)), ("breaker", Some(rest), Some(1)));
    }
}
