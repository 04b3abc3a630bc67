//! wasmtime: engine, upload checks, instances with their window, pipelines, limits.
//!
//! Read in this order: [`registry`] (what the rest of the server calls), [`pipeline`] (batches and stages),
//! [`instance`] (one guest and its calls), [`window`] (the shared bytes, and why they are safe), [`engine`] (compiling,
//! interrupting), [`check`] (uploads), then [`guest`], [`abi`] and [`params`] for the details.
//!
//! Plugins are pure: instances are dropped and made again whenever that is convenient. User tables, compiling in a child
//! process and a cache of compiled code are not here.

pub mod abi;
pub mod check;
pub mod engine;
pub mod guest;
pub mod instance;
pub mod params;
pub mod pipeline;
pub mod registry;
mod selftest;
pub mod window;

pub use registry::{ModuleSource, PluginWorker, Plugins};

use bytes::Bytes;
use wire::abi::ManifestLine;
use wire::{ImageRef, Schema};

pub use crate::catalog::Stage;
use crate::catalog::{PluginKind, Seq};
pub use crate::config::PluginOptions;

#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// The module is refused at upload: why, and what to do. 422.
    #[error("{0}")]
    Refused(String),
    /// Parameters or columns do not fit. 400.
    #[error("{0}")]
    Params(String),
    /// The guest failed while running: `index` is the row of the batch where known.
    #[error("plugin {plugin}: {message}")]
    Fault { plugin: String, cause: FaultCause, index: Option<usize>, message: String },
    /// Our side: memory, mapping, a poisoned worker.
    #[error("plugin host: {0}")]
    Host(String),
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
}

/// The rows of one call, where they lie, and whether the ring has them.
pub struct Rows<'a> {
    /// Set for live changes: the commit whose shared section `base` is; the ring may hold the same bytes.
    pub commit: Option<Seq>,
    /// Bytes that the places count from.
    pub base: &'a [u8],
    pub places: &'a [wire::image::ImageAt],
}

/// What came out of a pipeline, one entry per row that went in.
#[derive(Debug, Default)]
pub struct Piped {
    pub keep: Vec<bool>,
    /// With a transform: for every row that was kept, in order, its output image; else the input stands.
    pub output: Option<Vec<Vec<u8>>>,
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
}

#[cfg(test)]
mod tests;
