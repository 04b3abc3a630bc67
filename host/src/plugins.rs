//! wasmtime: engine, upload checks, instances with their window, pipelines, limits.
//!
//! Read in this order: [`registry`] (what the rest of the server calls), [`pipeline`] (batches and stages),
//! [`instance`] (one guest and its calls), [`window`] (the shared bytes, and why they are safe), [`engine`] (compiling,
//! interrupting), [`compiler`] (the child that compiles), [`check`] (uploads), then [`guest`], [`abi`] and [`params`] for the details.
//!
//! Plugins are pure: instances are dropped and made again whenever that is convenient. What failed is remembered, and
//! what fails too often rests: [`health`]. What they log is kept for a while: [`logs`]. What they do is counted: [`meters`].

pub mod abi;
mod cache;
pub mod check;
pub mod compiler;
pub mod engine;
pub mod guest;
pub mod health;
pub mod instance;
pub mod logs;
pub mod meters;
pub mod params;
pub mod pipeline;
pub mod registry;
mod selftest;
pub mod window;

pub use registry::{ModuleSource, PluginWorker, Plugins};

use std::time::Duration;

use bytes::Bytes;
use wire::abi::ManifestLine;
use wire::{ChangeAt, ImageRef, Op, Schema};

pub use crate::catalog::Stage;
use crate::catalog::{PluginKind, Semantics, Seq};
pub use crate::config::PluginOptions;

#[derive(Clone, Debug, thiserror::Error)]
pub enum PluginError {
    /// The module is refused at upload: why, and what to do. 422.
    #[error("{0}")]
    Refused(String),
    /// Parameters or columns do not fit. 400.
    #[error("{0}")]
    Params(String),
    /// What plugins of its kind cannot do. 400.
    #[error("{0}")]
    Unsupported(String),
    /// The guest failed while running: `index` is the row (or change) of the run, `stage` the place in the pipeline,
    /// where known.
    #[error("plugin {plugin}: {message}")]
    Fault { plugin: String, stage: Option<usize>, cause: FaultCause, index: Option<usize>, message: String },
    /// It failed too often and is not called for this long.
    #[error("plugin {plugin} failed too often; it is tried again in {} s", .rest.as_secs_f32().ceil())]
    Resting { plugin: String, stage: usize, rest: Duration },
    /// Our side: memory, mapping, a poisoned worker.
    #[error("plugin host: {0}")]
    Host(String),
}

/// An error of one stage of a pipeline.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct StageError {
    pub stage: usize,
    pub error: PluginError,
}

impl From<StageError> for PluginError {
    fn from(error: StageError) -> PluginError {
        error.error
    }
}

/// Why a guest failed; also the label in metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultCause {
    Trap,
    Deadline,
    Memory,
    Output,
    WindowWrite,
    Failed,
    Abi,
}

impl FaultCause {
    /// In the order of their numbers.
    pub const ALL: [FaultCause; 7] = [
        FaultCause::Trap,
        FaultCause::Deadline,
        FaultCause::Memory,
        FaultCause::Output,
        FaultCause::WindowWrite,
        FaultCause::Failed,
        FaultCause::Abi,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            FaultCause::Trap => "trap",
            FaultCause::Deadline => "deadline",
            FaultCause::Memory => "memory",
            FaultCause::Output => "output",
            FaultCause::WindowWrite => "window_write",
            FaultCause::Failed => "failed",
            FaultCause::Abi => "abi",
        }
    }
}

/// What an upload turned out to be.
#[derive(Clone, Debug)]
pub struct Inspected {
    /// The module as wasm (WAT already translated).
    pub wasm: Bytes,
    pub sha256: String,
    pub kind: PluginKind,
    pub abi: u32,
    pub manifest: Vec<ManifestLine>,
    pub measured: Measured,
}

/// What an upload cost when it was tried.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// `None`: it was compiled before, and is kept.
    pub compile_time: Option<Duration>,
    /// Linear memory of an instance beside its window: configured where every parameter has a default, else started.
    pub instance_bytes: usize,
}

/// Why something is run through a pipeline: the label `source` in metrics, and of no meaning to the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A commit, when it is new.
    Live,
    /// A commit out of the change log.
    Replay,
    /// Present rows, or those of a result.
    Snapshot,
}

impl Origin {
    /// In the order of their numbers.
    pub const ALL: [Origin; 3] = [Origin::Live, Origin::Replay, Origin::Snapshot];

    pub fn as_str(self) -> &'static str {
        match self {
            Origin::Live => "live",
            Origin::Replay => "replay",
            Origin::Snapshot => "snapshot",
        }
    }
}

/// What is to be run through a pipeline: where it lies, and whether the ring has it.
pub struct Input<'a, At> {
    pub origin: Origin,
    /// Set for commits: the one whose shared section `base` is; the ring may hold the same bytes.
    pub commit: Option<Seq>,
    /// Bytes that the places count from.
    pub base: &'a [u8],
    pub places: &'a [At],
}

pub type Rows<'a> = Input<'a, wire::image::ImageAt>;
pub type Changes<'a> = Input<'a, ChangeAt>;

/// One row or change that failed while the pipeline went on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitFault {
    /// Its place among what went in.
    pub index: usize,
    pub stage: usize,
    pub cause: FaultCause,
    pub message: String,
    /// A filter let it through unjudged; else it was left out.
    pub passed: bool,
}

/// What came out of a pipeline, one entry per row that went in.
#[derive(Debug, Default)]
pub struct Piped {
    pub keep: Vec<bool>,
    /// With a transform: for every row that was kept, in order, its output image; else the input stands.
    pub output: Option<Vec<Bytes>>,
    pub faults: Vec<UnitFault>,
}

/// A run that came to no end, and what had failed in it before and was passed over: that is noted as well.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Cut {
    pub error: PluginError,
    pub faults: Vec<UnitFault>,
}

/// What came out of a pipeline with changes.
#[derive(Debug, Default)]
pub struct PipedChanges {
    /// In the order of the changes that went in; a change may have several, or none.
    pub outputs: Vec<ChangeOutput>,
    pub faults: Vec<UnitFault>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeOutput {
    /// The change it was made of.
    pub index: usize,
    pub op: Op,
    /// `None` without a transform: the change's own new row, or of a delete the old one.
    pub image: Option<Bytes>,
}

impl Piped {
    /// The kept output rows as images.
    pub fn images(&self) -> Vec<ImageRef<'_>> {
        self.output.iter().flatten().filter_map(|bytes| ImageRef::parse(bytes).ok()).map(|(image, ..)| image).collect()
    }
}

/// A configured pipeline of one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PipelineId(pub u64);

/// What opening a pipeline told.
#[derive(Clone, Debug)]
pub struct Opened {
    pub id: PipelineId,
    /// The output columns of the last transform; `None` when all stages are filters.
    pub output: Option<Schema>,
    /// Feed where a stage sees changes: then [`PluginWorker::run_changes`] runs it, else [`PluginWorker::run`].
    pub semantics: Semantics,
}

#[cfg(test)]
mod tests;
