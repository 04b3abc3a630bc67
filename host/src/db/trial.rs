//! Trying a plugin on rows that are given: on a throw-away instance, with every limit, and nothing stored.

use std::time::{Duration, Instant};

use ::arrow::record_batch::RecordBatch;
use serde_json::{Map, Value as Json};
use wire::abi::PluginKind;
use wire::frame::ChangeMeta;
use wire::{FrameBuilder, FrameView, ImageRef, Kind, Schema, Scope};

use super::install::{may_install, stored_version};
use super::{Db, DbError, Identity, blocking, unknown_namespace};
use crate::catalog::{NamespaceId, OnError, Semantics, Stage};
use crate::plugins::registry::{Owner, Plugins};
use crate::plugins::{Changes, FaultCause, Rows, UnitFault};

/// The most rows of one trial: each may take its whole time limit.
const MAX_ROWS: usize = 256;

pub struct TrialRequest {
    /// `name`, `name@3` or `name@sha256:…`.
    pub plugin: String,
    pub params: Json,
    /// Whose columns the rows have; without one, the columns that the plugin declares.
    pub table: Option<String>,
    pub rows: Vec<Option<Map<String, Json>>>,
    /// The rows before the changes, for plugins that see changes.
    pub old: Vec<Option<Map<String, Json>>>,
}

#[derive(Debug)]
pub struct Trial {
    pub plugin: String,
    pub version: u32,
    pub kind: PluginKind,
    pub output: Option<Schema>,
    pub results: Vec<TrialResult>,
    pub elapsed: Duration,
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
        may_install(who)?;
        let catalog = self.inner.store.catalog();
        let found = catalog.namespace(namespace).ok_or_else(|| unknown_namespace(namespace))?.id;
        let plugin = stored_version(&catalog, namespace, &request.plugin)?;
        let schema = match &request.table {
            None => crate::plugins::params::declared_schema(&plugin.manifest),
            Some(name) => match catalog.table(namespace, name) {
                Some(table) => table.schema(),
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
        blocking(move || run(&plugins, found, &stage, plugin.kind, &schema, &request)).await?
    }
}

/// Runs the given rows through one plugin.
pub fn run(
    plugins: &Plugins,
    namespace: NamespaceId,
    stage: &Stage,
    kind: PluginKind,
    schema: &Schema,
    request: &TrialRequest,
) -> Result<Trial, DbError> {
    let images = images(request, kind, schema)?;
    let mut worker = plugins.throw_away();
    let opened = worker.open(Owner::shared(namespace), std::slice::from_ref(stage), schema, OnError::Skip);
    let opened = opened.map_err(|error| DbError::Plugin(error.error))?;
    let frame = frame(schema, &images)?;
    let view = FrameView::parse(&frame).map_err(|error| DbError::Internal(error.to_string()))?;
    let section = view.section(&Scope::Shared);
    let (base, changes) = section.map_or((&[][..], &[][..]), |found| (found.bytes, &found.changes[..]));
    let started = Instant::now();
    let (made, faults) = match opened.semantics {
        Semantics::Map => {
            let places: Vec<_> = changes.iter().filter_map(|change| Some(change.new?.1)).collect();
            let piped = worker.run(opened.id, Rows { commit: None, base, places: &places })?;
            let kept = piped.keep.iter().enumerate().filter(|(_, keep)| **keep).map(|(index, _)| index);
            let mut images = piped.output.unwrap_or_default().into_iter();
            (kept.map(|index| (index, images.next())).collect::<Vec<_>>(), piped.faults)
        }
        Semantics::Feed => {
            let places: Vec<_> = changes.iter().map(|change| change.at()).collect();
            let piped = worker.run_changes(opened.id, Changes { commit: None, base, places: &places })?;
            let outputs = piped.outputs.into_iter().map(|output| (output.index, output.image));
            (outputs.collect(), piped.faults)
        }
    };
    let elapsed = started.elapsed();
    let results = results(kind, images.len(), opened.output.as_ref(), made, faults)?;
    let Stage { name, version, .. } = stage.clone();
    Ok(Trial { plugin: name, version, kind, output: opened.output, results, elapsed })
}

type Images = Vec<(Option<Vec<u8>>, Option<Vec<u8>>)>;

/// Old and new image of each change; of a plugin that sees rows the new one alone.
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

fn results(
    kind: PluginKind,
    count: usize,
    output: Option<&Schema>,
    made: Vec<(usize, Option<Vec<u8>>)>,
    faults: Vec<UnitFault>,
) -> Result<Vec<TrialResult>, DbError> {
    let mut results = Vec::with_capacity(count);
    for index in 0..count {
        if let Some(fault) = faults.iter().find(|fault| fault.index == index) {
            results.push(TrialResult::Failed { cause: fault.cause, message: fault.message.clone() });
            continue;
        }
        let mine = made.iter().filter(|(of, _)| *of == index);
        let Some(schema) = output.filter(|_| !kind.is_filter()) else {
            results.push(TrialResult::Kept(mine.count() > 0));
            continue;
        };
        let images: Vec<_> = mine.filter_map(|(_, image)| Some(ImageRef::parse(image.as_ref()?).ok()?.0)).collect();
        let batch = (!images.is_empty()).then(|| crate::sql::arrow::to_batch(schema, &images)).transpose()?;
        results.push(TrialResult::Made(batch));
    }
    Ok(results)
}
