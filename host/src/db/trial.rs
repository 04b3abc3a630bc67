//! Trying a plugin on rows that are given, or made up to see how long it takes: on a throw-away instance, with every
//! limit, and nothing stored. A [`Job`] is what is run, whoever asks for it.

use std::time::{Duration, Instant};

use ::arrow::record_batch::RecordBatch;
use bytes::Bytes;
use serde_json::{Map, Value as Json};
use wire::abi::{ManifestLine, PluginKind};
use wire::frame::ChangeMeta;
use wire::{FrameBuilder, FrameView, ImageRef, Kind, Schema, Scope};

use super::install::{may_install, stored_version};
use super::{Db, DbError, Identity, blocking, sample, unknown_namespace};
use crate::catalog::{NamespaceId, OnError, Semantics, Stage};
use crate::plugins::params::declared_schema;
use crate::plugins::registry::{Owner, Plugins};
use crate::plugins::{Changes, FaultCause, Origin, PluginError, Rows, UnitFault};

/// The most rows of one trial: each may take its whole time limit.
const MAX_ROWS: usize = 256;

/// A measurement ends after so long, or so many rounds: enough for a median that the next push gives again.
const MEASURE_TIME: Duration = Duration::from_millis(50);
const MEASURE_ROUNDS: usize = 1_000;

pub struct TrialRequest {
    /// `name`, `name@3` or `name@sha256:…`.
    pub plugin: String,
    pub params: Json,
    /// Whose columns the rows have; without one, the columns that the plugin declares.
    pub table: Option<String>,
    pub rows: Vec<Option<Map<String, Json>>>,
    /// The rows before the changes, for plugins that see changes.
    pub old: Vec<Option<Map<String, Json>>>,
    /// Find out how long a change takes; where no rows are given, on rows that are made up.
    pub measure: bool,
}

#[derive(Debug)]
pub struct Trial {
    pub plugin: String,
    pub version: u32,
    pub kind: PluginKind,
    pub output: Option<Schema>,
    pub results: Vec<TrialResult>,
    pub elapsed: Duration,
    /// The median of many rounds, where it was asked for and nothing failed. The server's own work is in it.
    pub nanos_per_change: Option<f64>,
}

/// What became of one row, or of one change.
#[derive(Debug)]
pub enum TrialResult {
    Kept(bool),
    /// One of a row transform, any number of a change transform.
    Made(Option<RecordBatch>),
    Failed {
        cause: FaultCause,
        message: String,
    },
}

impl Db {
    pub async fn try_plugin(&self, who: &Identity, namespace: &str, request: TrialRequest) -> Result<Trial, DbError> {
        self.check_open()?;
        may_install(who, "try", namespace, &request.plugin)?;
        let catalog = self.inner.store.catalog();
        let found = catalog.namespace(namespace).ok_or_else(|| unknown_namespace(namespace))?.id;
        let plugin = stored_version(&catalog, namespace, &request.plugin)?;
        let schema = match &request.table {
            None => Input::Declared("name a table that has them (`table`; --table)"),
            Some(name) => match catalog.table(namespace, name) {
                Some(table) => Input::Columns(table.schema()),
                None => {
                    return Err(DbError::NotFound(format!("namespace \"{namespace}\" has no table \"{name}\"")));
                }
            },
        };
        let stage = Stage {
            name: plugin.name.clone(),
            version: plugin.version,
            sha256: plugin.sha256.clone(),
            params: request.params.to_string(),
        };
        let plugins = self.inner.plugins.clone();
        blocking(move || run(&plugins, found, &stage, &plugin.manifest, plugin.kind, schema, &request)).await?
    }
}

/// What the rows of a trial have.
pub enum Input {
    Columns(Schema),
    /// The columns that the plugin's manifest declares. It knows kinds of types alone, a TIMESTAMP is an integer to it;
    /// and how to say more.
    Declared(&'static str),
}

/// Runs the given rows through one plugin.
pub fn run(
    plugins: &Plugins,
    namespace: NamespaceId,
    stage: &Stage,
    manifest: &[ManifestLine],
    kind: PluginKind,
    input: Input,
    request: &TrialRequest,
) -> Result<Trial, DbError> {
    let (schema, more) = match input {
        Input::Columns(schema) => (schema, None),
        Input::Declared(more) => (declared_schema(manifest), Some(more)),
    };
    let schema = &schema;
    let made_up = request.measure && request.rows.is_empty() && request.old.is_empty();
    let stages = std::slice::from_ref(stage);
    let tried = |images| {
        let owner = Owner::shared(namespace);
        Job { owner, stages, kind, schema, images, measure: request.measure }.run(plugins)
    };
    if !made_up {
        let images = images(request, kind, schema).map_err(|error| match (error, more) {
            (DbError::Sql(error), Some(more)) => DbError::BadRequest(format!(
                "{error}; the rows have the columns that the plugin declares, a DATE, TIME or TIMESTAMP as BIGINT: for \
                 others {more}"
            )),
            (error, _) => error,
        })?;
        return tried(images);
    }
    let trial = tried(sample::images(kind, schema, true))?;
    // A plugin that requires its columns fails on NULLs, rightly; it has a time nevertheless.
    if trial.results.iter().any(|result| matches!(result, TrialResult::Failed { .. })) {
        return tried(sample::images(kind, schema, false));
    }
    Ok(trial)
}

/// Images and the pipeline that they are run through.
pub(super) struct Job<'a> {
    pub owner: Owner,
    pub stages: &'a [Stage],
    /// Of the last stage.
    pub kind: PluginKind,
    pub schema: &'a Schema,
    pub images: Images,
    pub measure: bool,
}

/// Old and new image of each change; of a plugin that sees rows the new one alone.
pub(super) type Images = Vec<(Option<Vec<u8>>, Option<Vec<u8>>)>;

/// What came out: by the place of the change, with the image that a transform made.
type Made = Vec<(usize, Option<Bytes>)>;

impl Job<'_> {
    pub(super) fn run(&self, plugins: &Plugins) -> Result<Trial, DbError> {
        let mut worker = plugins.throw_away();
        let opened = worker.open(self.owner.clone(), self.stages, self.schema, OnError::Skip);
        let opened = opened.map_err(|error| DbError::Plugin(error.error))?;
        if opened.semantics == Semantics::Map && self.images.iter().any(|(_, new)| new.is_none()) {
            let message = "the plugin sees rows as they are after a change, and there is none after a delete";
            return Err(DbError::BadRequest(message.to_owned()));
        }
        let frame = frame(self.schema, &self.images)?;
        let view = FrameView::parse(&frame).map_err(|error| DbError::Internal(error.to_string()))?;
        let section = view.section(&Scope::Shared);
        let (base, changes) = section.map_or((&[][..], &[][..]), |found| (found.bytes, &found.changes[..]));
        let rows: Vec<_> = changes.iter().filter_map(|change| Some(change.new?.1)).collect();
        let changes: Vec<_> = changes.iter().map(|change| change.at()).collect();
        let origin = Origin::Snapshot;
        let mut once = || -> Result<(Made, Vec<UnitFault>), PluginError> {
            if opened.semantics == Semantics::Map {
                let piped = worker.run(opened.id, Rows { origin, commit: None, base, places: &rows });
                let piped = piped.map_err(|cut| cut.error)?;
                let kept = piped.keep.iter().enumerate().filter(|(_, keep)| **keep).map(|(index, _)| index);
                let mut images = piped.output.unwrap_or_default().into_iter();
                return Ok((kept.map(|index| (index, images.next())).collect(), piped.faults));
            }
            let piped = worker.run_changes(opened.id, Changes { origin, commit: None, base, places: &changes });
            let piped = piped.map_err(|cut| cut.error)?;
            let outputs = piped.outputs.into_iter().map(|output| (output.index, output.image));
            Ok((outputs.collect(), piped.faults))
        };
        let started = Instant::now();
        let (made, faults) = once()?;
        let elapsed = started.elapsed();
        let count = self.images.len();
        let measure = self.measure && faults.is_empty() && count > 0;
        let round = measure.then(|| median(|| once().map(drop))).transpose()?;
        let results = self.results(opened.output.as_ref(), made, &faults)?;
        let Some(Stage { name, version, .. }) = self.stages.last().cloned() else {
            return Err(DbError::Internal("a trial without a plugin".to_owned()));
        };
        Ok(Trial {
            plugin: name,
            version,
            kind: self.kind,
            output: opened.output,
            results,
            elapsed,
            nanos_per_change: round.map(|round| round.as_nanos() as f64 / count as f64),
        })
    }

    fn results(&self, output: Option<&Schema>, made: Made, faults: &[UnitFault]) -> Result<Vec<TrialResult>, DbError> {
        let mut results = Vec::with_capacity(self.images.len());
        for index in 0..self.images.len() {
            if let Some(fault) = faults.iter().find(|fault| fault.index == index) {
                results.push(self.failed(fault));
                continue;
            }
            let mine = made.iter().filter(|(of, _)| *of == index);
            let Some(schema) = output.filter(|_| !self.kind.is_filter()) else {
                results.push(TrialResult::Kept(mine.count() > 0));
                continue;
            };
            let images: Vec<_> = mine.filter_map(|(_, image)| Some(ImageRef::parse(image.as_ref()?).ok()?.0)).collect();
            let batch = (!images.is_empty()).then(|| crate::sql::arrow::to_batch(schema, &images)).transpose()?;
            results.push(TrialResult::Made(batch));
        }
        Ok(results)
    }

    fn failed(&self, fault: &UnitFault) -> TrialResult {
        // The last one is who was asked about; what another says has to bear its name.
        let before = self.stages.get(fault.stage).filter(|_| fault.stage + 1 < self.stages.len());
        let message = match before {
            Some(stage) => format!("plugin {}, which stands before it: {}", stage.name, fault.message),
            None => fault.message.clone(),
        };
        TrialResult::Failed { cause: fault.cause, message }
    }
}

/// How long a round takes.
fn median(mut round: impl FnMut() -> Result<(), PluginError>) -> Result<Duration, PluginError> {
    let (started, mut rounds) = (Instant::now(), Vec::new());
    while rounds.is_empty() || (rounds.len() < MEASURE_ROUNDS && started.elapsed() < MEASURE_TIME) {
        let before = Instant::now();
        round()?;
        rounds.push(before.elapsed());
    }
    rounds.sort_unstable();
    Ok(rounds[rounds.len() / 2])
}

/// What a request gives, as images.
fn images(request: &TrialRequest, kind: PluginKind, schema: &Schema) -> Result<Images, DbError> {
    let (rows, old) = (&request.rows, &request.old);
    let refuse = |message: String| Err(DbError::BadRequest(message));
    if rows.len().max(old.len()) > MAX_ROWS {
        return refuse(format!("a trial has at most {MAX_ROWS} rows"));
    }
    if !kind.sees_changes() && !old.is_empty() {
        return refuse(format!("`old` is for plugins that see changes; this one is a {}", kind.as_str()));
    }
    let image = |row: Option<&Option<Map<String, Json>>>| match row.and_then(Option::as_ref) {
        None => Ok(None),
        Some(row) => crate::sql::json_row::image(schema, row).map(Some),
    };
    (0..rows.len().max(old.len()))
        .map(|i| match (image(old.get(i))?, image(rows.get(i))?) {
            (None, None) => Err(DbError::BadRequest(format!("change {i} has neither an old row nor a new one"))),
            (old, new) => Ok((old, new)),
        })
        .collect()
}

fn frame(schema: &Schema, images: &Images) -> Result<Vec<u8>, DbError> {
    let mut kinds = vec![Kind::Int; usize::from(schema.slots())];
    for column in &schema.columns {
        kinds[usize::from(column.id)] = column.ty.kind();
    }
    let internal = |error: wire::FrameError| DbError::Internal(error.to_string());
    let mut frame = FrameBuilder::new(0, [0; 16], 0);
    for (old, new) in images {
        let meta = ChangeMeta { table: 0, schema_version: 0, kinds: &kinds };
        frame.change(&Scope::Shared, meta, old.as_deref(), new.as_deref()).map_err(internal)?;
    }
    frame.finish().map_err(internal)
}
