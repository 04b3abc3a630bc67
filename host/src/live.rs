//! Live queries: groups, the workers that evaluate them, replay from the change log, subscriptions as cursors.
//!
//! Knows neither SQL text nor wasm nor SSE: what it needs from above it asks through three small traits, which `db`
//! supplies: [`Program`] (which rows match, what is shown), [`Pipelines`] (the plugins of one worker), [`Encoder`]
//! (the bytes a subscriber gets).

pub mod event;
pub mod group;
pub mod position;
pub mod subscription;
pub mod tail;
pub mod worker;

use std::sync::Arc;
use std::time::Duration;

use arrow::record_batch::RecordBatch;
use bytes::Bytes;
use wire::image::ImageAt;
use wire::{ImageRef, Schema, Scope};

use crate::catalog::Table;
use crate::store::keys::KeyRange;
use crate::store::{Commit, Seq, Store, StoreError};

use event::CommitEvents;
pub use subscription::{Delivery, EndReason, Subscription};

#[derive(Clone, Debug)]
pub struct LiveOptions {
    pub workers: usize,
    /// Bytes of recent commits kept in memory for workers, per server; older ones are read from the log.
    pub commit_tail_bytes: usize,
    /// Bytes of encoded events kept per group; a subscriber further behind reads the log.
    pub group_tail_bytes: usize,
    /// Rows or events made in one step for a snapshot or a replay.
    pub chunk_bytes: usize,
    pub heartbeat: Duration,
    pub max_subscriptions: usize,
}

/// A compiled live query over row images of one table.
pub trait Program: Send + Sync {
    fn matches(&self, rows: &[ImageRef<'_>]) -> Result<Vec<bool>, ProgramError>;
    /// The SELECT list over rows that matched.
    fn project(&self, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError>;
    /// Columns of `schema` (the key, or a transform's output) as a batch.
    fn batch(&self, schema: &Schema, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError>;
}

/// Evaluating a row failed (say, a cast or a division by zero): the stream fails with this message.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct ProgramError(pub String);

/// A pipeline failed: on which row, why. Shown to the subscriber in a `plugin-error` event.
#[derive(Clone, Debug, thiserror::Error)]
#[error("plugin {plugin}: {message}")]
pub struct PipelineFault {
    pub plugin: String,
    pub version: u32,
    pub sha256: String,
    pub cause: &'static str,
    pub message: String,
}

/// The plugins of one worker thread.
pub trait Pipelines: Send {
    /// Configures the group's pipeline; an id for `run`.
    fn open(&mut self, group: &GroupSpec) -> Result<u64, PipelineFault>;
    /// Rows lie at `places` from the start of `base`; `commit` is set when `base` is that commit's shared section.
    fn run(&mut self, id: u64, commit: Option<Seq>, base: &[u8], places: &[ImageAt]) -> Result<Piped, PipelineFault>;
    fn close(&mut self, id: u64);
}

/// One entry of `keep` per row in; `output` (with a transform) one image per kept row.
#[derive(Debug, Default)]
pub struct Piped {
    pub keep: Vec<bool>,
    pub output: Option<Vec<Vec<u8>>>,
}

/// Turns the events of one commit (or a piece of a snapshot) into the bytes that every subscriber of the group gets.
pub trait Encoder: Send + Sync {
    fn encode(&self, group: &GroupSpec, events: &CommitEvents, out: &mut Vec<u8>);
}

/// How old values are shown in update and delete events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OldMode {
    #[default]
    Changed,
    Full,
    None,
}

/// What all subscriptions of a group have in common. Equal `key`s are one group.
pub struct GroupSpec {
    /// Plan, parameters, scope, schema version, pipeline with versions, options.
    pub key: Vec<u8>,
    pub live_id: String,
    pub table: Arc<Table>,
    pub scope: Scope,
    pub range: KeyRange,
    pub program: Arc<dyn Program>,
    /// Stages of the pipeline; empty without plugins. Opaque to this module.
    pub stages: Vec<crate::plugins::Stage>,
    /// The output schema of the pipeline's last transform.
    pub output: Option<Schema>,
    pub old: OldMode,
    /// The history that positions of this group belong to.
    pub epoch: crate::store::Epoch,
    /// Suffix of a position after `epoch` and `seq`: plan, schema version, pipeline.
    pub fingerprint: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// Present rows first, then every later commit.
    Snapshot,
    /// Only commits after the position.
    After(Seq),
    /// Only commits after now.
    Now,
}

#[derive(Debug, thiserror::Error)]
pub enum SubscribeError {
    #[error("too many live streams are open; close some or raise live.max_subscriptions ({0})")]
    TooMany(usize),
    /// The log no longer reaches back to the position.
    #[error("the position is no longer in the change log")]
    Expired,
    #[error(transparent)]
    Pipeline(#[from] PipelineFault),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the server is shutting down")]
    Closed,
}

/// Handle to the live side; clones share it.
#[derive(Clone)]
pub struct Live {
    // filled by the live module's author
}

impl Live {
    /// Starts one thread per entry of `pipelines`.
    pub fn start(
        _store: Store,
        _pipelines: Vec<Box<dyn Pipelines>>,
        _encoder: Arc<dyn Encoder>,
        _options: LiveOptions,
        _metrics: Arc<crate::telemetry::Metrics>,
    ) -> Live {
        todo!()
    }

    /// Called by the commit hook for every durable commit, in order; never blocks on workers or subscribers.
    pub fn published(&self, _commit: &Arc<Commit>) {
        todo!()
    }

    /// Joins (or makes) the group.
    pub async fn subscribe(&self, _spec: Arc<GroupSpec>, _from: From) -> Result<Subscription, SubscribeError> {
        todo!()
    }

    /// Number of open subscriptions, groups.
    pub fn counts(&self) -> (usize, usize) {
        todo!()
    }

    /// Ends all subscriptions with [`EndReason::Shutdown`] and stops the workers.
    pub fn close(&self) {
        todo!()
    }
}

/// Alias kept short in signatures.
pub type Encoded = Bytes;
