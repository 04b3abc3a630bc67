//! All plugins of the server: compiled modules by hash, rings by namespace, workers.

use super::{Inspected, Opened, Piped, PipelineId, PluginError, PluginOptions, Rows, Stage};
use crate::catalog::NamespaceId;
use crate::store::Seq;
use wire::Schema;

/// Where module bytes come from when a hash is not compiled yet.
pub trait ModuleSource: Send + Sync {
    fn wasm(&self, sha256: &str) -> Result<Option<bytes::Bytes>, String>;
}

pub struct Plugins {
    // filled by the plugins module's author
}

impl Plugins {
    pub fn new(
        _options: PluginOptions,
        _source: Box<dyn ModuleSource>,
        _metrics: std::sync::Arc<crate::telemetry::Metrics>,
    ) -> Result<Plugins, PluginError> {
        todo!()
    }

    /// Checks an upload: size, wasmparser limits, manifest, ABI, imports, exports, compiles, and tries an instance (window,
    /// configure with defaults where there are no required parameters).
    pub fn inspect(&self, _body: &[u8]) -> Result<Inspected, PluginError> {
        todo!()
    }

    /// The commit side: appends a commit's shared section to the namespace's ring, if that namespace has one.
    /// Never waits for a plugin; an occupied slot leaves the ring alone.
    pub fn publish(&self, _namespace: NamespaceId, _seq: Seq, _section: &[u8]) {
        todo!()
    }

    /// Tries a pipeline on a throw-away instance: parameter errors, missing columns, output schema.
    pub fn check(
        &self,
        _namespace: NamespaceId,
        _stages: &[Stage],
        _input: &Schema,
    ) -> Result<Option<Schema>, PluginError> {
        todo!()
    }

    /// The plugin side of one worker thread.
    pub fn worker(&self, _index: usize) -> PluginWorker {
        todo!()
    }
}

/// Owned by one worker thread: its instances, its part of the windows.
pub struct PluginWorker {
    // filled by the plugins module's author
}

impl PluginWorker {
    pub fn open(&mut self, _namespace: NamespaceId, _stages: &[Stage], _input: &Schema) -> Result<Opened, PluginError> {
        todo!()
    }

    /// Runs any number of rows (in batches of ≤ 64 per call) through the pipeline. A fault names the first row that fails alone.
    pub fn run(&mut self, _pipeline: PipelineId, _rows: Rows<'_>) -> Result<Piped, PluginError> {
        todo!()
    }

    pub fn close(&mut self, _pipeline: PipelineId) {
        todo!()
    }
}
