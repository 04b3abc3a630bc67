//! Live queries: groups, the workers that evaluate them, replay from the change log, subscriptions as cursors.
//!
//! Knows neither SQL text nor wasm nor SSE: what it needs from above it asks through small traits, which `db` and `http`
//! supply: [`Program`] (which rows match, what is shown), [`Pipelines`] (the plugins of one worker), [`Requery`] (a query
//! run as a whole), [`Encoder`] (the bytes a subscriber gets), [`Sink`] (where they go while it only waits).
//!
//! # From a commit to a subscriber
//!
//! The commit thread pushes each durable commit to one commit tail in memory and wakes the workers: a lock held for a
//! queue operation, and one message per worker that has groups and is not awake yet. It never waits for anybody. Every
//! group belongs to one worker, which evaluates each commit once per group, encodes the events once and appends them to
//! the group's tail. A subscription is a cursor: it takes what lies after it from its group's tail, else (too far
//! behind) asks the worker to replay the change log up to the tail, else (behind the log) ends as expired. Both tails
//! are bounded by bytes; what they let go of is in the log.
//!
//! # Why no commit is lost and none comes twice
//!
//! A group joins its worker when that worker has processed every commit up to some S0. From then on the events of every
//! later commit are appended to the group's tail, in order, and the tail knows its floor: the seq up to which it has let
//! go of events, S0 at first. So for any cursor c at or after the floor, the tail's entries with seq > c are *all* events
//! after c that the worker has made; for a cursor before the floor, replaying the log over (c, floor] through the same
//! evaluation gives the very events the tail no longer has, and ends exactly where the tail begins. A cursor only
//! advances over what was delivered, or over commits whose events, had there been any, would be in the tail: a
//! subscription reads how far the worker is *before* it looks at the tail.
//!
//! Present rows are read after the group has joined, through one store snapshot at N. Commits up to N are in the rows,
//! commits after N are not; the cursor starts at N, so events of commits up to N that the worker has still to make
//! (N ≥ S0) are skipped, and everything after N is in the tail or in the log. `After(seq)` is the same with N = seq.
//! The log answers for what it no longer has: its floor is asked after reading.
//!
//! A group whose pipeline (or predicate) fails at a commit appends nothing of that commit, ends there, and leaves the
//! registry, so that the next subscription makes a fresh group. A dropped table or another plugin version ends the group
//! at that commit's place in the order.

mod evaluate;
pub mod event;
mod group;
mod index;
mod job;
mod log;
mod outlet;
pub mod position;
pub mod requery;
pub mod subscription;
mod tail;
#[cfg(test)]
mod tests;
mod worker;

use std::any::Any;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use arrow::record_batch::RecordBatch;
use bytes::Bytes;
use wire::image::ImageAt;
use wire::{ChangeAt, ImageRef, Op, Schema, Scope};

use crate::catalog::{Anchors, OnError, Semantics, Stage, Table};
pub use crate::config::LiveOptions;
use crate::store::keys::KeyRange;
use crate::store::{Commit, Epoch, Seq, Store, StoreError};

use event::CommitEvents;
use group::Registry;
pub use index::admits;
pub use outlet::{AnyOutlet, Outlet, Sink};
pub use requery::{Answer, Images, Requery, RequeryError, Rerun};
pub use subscription::{Delivery, EndReason, Subscription};
use tail::{CommitTail, lock};
use worker::{Joined, Mailbox, Shared};

/// A compiled live query over row images of one table.
pub trait Program: Any + Send + Sync {
    fn matches(&self, rows: &[ImageRef<'_>]) -> Result<Vec<bool>, ProgramError>;
    /// The same for programs that can be asked together, `None` for one that is asked by itself.
    fn shape(&self) -> Option<usize> {
        None
    }
    /// What [`matches`](Program::matches) of each program answers, one behind the other. All are of this one's shape, and
    /// none is asked about no rows. Where it fails they are asked one by one.
    fn matches_each(&self, asked: &[Question<'_>]) -> Result<Vec<bool>, ProgramError> {
        let answers = asked.iter().map(|Question { program, rows }| program.matches(rows));
        Ok(answers.collect::<Result<Vec<_>, _>>()?.concat())
    }
    /// The SELECT list over rows that matched.
    fn project(&self, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError>;
    /// The key columns of rows, named as in the table.
    fn keys(&self, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError>;
    /// Rows that a transform made, of these columns.
    fn batch(&self, schema: &Schema, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError>;
}

/// Which of these rows does it match?
pub struct Question<'a> {
    pub program: &'a Arc<dyn Program>,
    pub rows: &'a [ImageRef<'a>],
}

/// Evaluating a row failed (say, a cast or a division by zero): the stream fails with this message.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct ProgramError(pub String);

/// A pipeline failed: which plugin, why. Shown to the subscriber in a `plugin-error` event.
#[derive(Clone, Debug, PartialEq)]
pub struct PipelineFault {
    /// `None`: no plugin is to blame, or none is known to be.
    pub plugin: Option<Box<Stage>>,
    pub cause: &'static str,
    pub message: String,
    /// It may be tried again after this long; else another version has to come.
    pub retry_after: Option<Duration>,
}

impl fmt::Display for PipelineFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.plugin {
            Some(plugin) => write!(f, "plugin {}: {}", plugin.name, self.message),
            None => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for PipelineFault {}

/// On which way something comes through a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// A commit, when it is new.
    Live,
    /// A commit out of the change log.
    Replay,
    /// Present rows, or those of a result.
    Snapshot,
}

/// What a pipeline is run over: bytes, and what they are.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    pub seq: Seq,
    pub pass: Pass,
    /// What places count from: the commit's section of the group's scope, or a buffer of its own.
    pub base: &'a [u8],
}

/// The plugins of one worker thread.
pub trait Pipelines: Send {
    /// Configures the group's pipeline; an id for `run`.
    fn open(&mut self, group: &GroupSpec) -> Result<u64, PipelineFault>;
    /// Of a group with map semantics: rows.
    fn run(&mut self, id: u64, batch: Batch<'_>, places: &[ImageAt]) -> Result<Piped, PipelineFault>;
    /// Of a group with feed semantics: changes.
    fn run_changes(
        &mut self,
        id: u64,
        batch: Batch<'_>,
        changes: &[ChangeAt],
    ) -> Result<Vec<ChangeOutput>, PipelineFault>;
    fn close(&mut self, id: u64);
}

/// One entry of `keep` per row in; `output` (with a transform) one image per kept row.
#[derive(Debug, Default)]
pub struct Piped {
    pub keep: Vec<bool>,
    pub output: Option<Vec<Bytes>>,
}

/// One row that a change gave; `index` is the change's place among those that went in.
#[derive(Debug)]
pub struct ChangeOutput {
    pub index: usize,
    pub op: Op,
    /// `None` without a transform: the change's own new row, or of a delete the old one.
    pub image: Option<Bytes>,
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
#[derive(Clone)]
pub struct GroupSpec {
    /// Plan, parameters, scope, schema version, pipeline with versions, options.
    pub key: Vec<u8>,
    pub live_id: String,
    /// The table that is read; of several the first.
    pub table: Arc<Table>,
    pub scope: Scope,
    /// How a query that is no filter of one table is run again; its program is asked for what a transform makes of its
    /// rows, and for nothing else.
    pub requery: Option<Rerun>,
    pub range: KeyRange,
    /// Which rows can match, and that in words.
    pub anchors: Anchors,
    pub index: String,
    pub program: Arc<dyn Program>,
    /// Stages of the pipeline; empty without plugins. Opaque to this module.
    pub stages: Vec<Stage>,
    pub semantics: Semantics,
    pub on_error: OnError,
    /// The output schema of the pipeline's last transform.
    pub output: Option<Schema>,
    pub old: OldMode,
    /// Suffix of a position after `epoch` and `seq`: plan, schema version, pipeline.
    pub fingerprint: String,
    /// The history that positions of this group belong to.
    pub epoch: Epoch,
}

impl GroupSpec {
    /// Every table that is read, and whose rows of it.
    pub fn sources(&self) -> impl Iterator<Item = (&Arc<Table>, &Scope)> {
        let one = self.requery.is_none().then_some((&self.table, &self.scope));
        let several = self.requery.iter().flat_map(|rerun| &rerun.sources);
        one.into_iter().chain(several.map(|(table, scope)| (table, scope)))
    }

    /// The columns of the rows that go into the pipeline: the table's, or the result's.
    pub fn input(&self) -> Schema {
        match &self.requery {
            None => self.table.schema(),
            Some(rerun) => rerun.runner.columns().clone(),
        }
    }

    /// Whose rows go into the pipeline. What is made of one user's rows, be it together with shared ones, is theirs.
    pub fn whose(&self) -> &Scope {
        let mut scopes = self.sources().map(|(_, scope)| scope);
        scopes.find(|scope| matches!(scope, Scope::User(_))).unwrap_or(&self.scope)
    }

    fn admits(&self, row: &ImageRef<'_>) -> bool {
        index::admits(&self.anchors, &self.table, row)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// Present rows first, then every later commit.
    Snapshot,
    /// The last so many present rows in key order, the last of them first; then every later commit.
    Last(u64),
    /// Only commits after the position.
    After(Seq),
    /// Only commits after now.
    Now,
}

/// What is known of a group's work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Events and bytes made since the group began, once for all its subscribers.
    pub events: u64,
    pub bytes: u64,
    /// Commits that are durable and not yet told.
    pub lag: u64,
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

/// Handle to the live side; clones share it. When the last one goes, the workers stop.
#[derive(Clone)]
pub struct Live {
    workers: Arc<Workers>,
}

struct Workers {
    shared: Arc<Shared>,
    mailboxes: Vec<Arc<Mailbox>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Stack of a worker: plugins run on it (their own limit is far lower), and compiled predicates recurse on it. Pages
/// are only taken when touched.
const WORKER_STACK_BYTES: usize = 8 << 20;

impl Live {
    /// Starts one thread per entry of `pipelines`. To be called before the store's commit hook can be.
    pub fn start(
        store: Store,
        pipelines: Vec<Box<dyn Pipelines>>,
        encoder: Arc<dyn Encoder>,
        options: LiveOptions,
        metrics: Arc<crate::telemetry::Metrics>,
    ) -> Live {
        assert!(!pipelines.is_empty(), "live queries need a worker");
        let registry = Registry::new(options.group_tail_bytes, options.max_subscriptions, Arc::clone(&metrics));
        let commits = CommitTail::new(options.commit_tail_bytes, store.durable());
        let shared = Arc::new(Shared { store, commits, registry: Arc::new(registry), encoder, options, metrics });
        let (mut mailboxes, mut threads) = (Vec::new(), Vec::new());
        for (index, pipelines) in pipelines.into_iter().enumerate() {
            let (mailbox, events) = Mailbox::new();
            let (of_worker, shared) = (Arc::clone(&mailbox), Arc::clone(&shared));
            let thread = std::thread::Builder::new()
                .name(format!("live-{index}"))
                .stack_size(WORKER_STACK_BYTES)
                .spawn(move || worker::run(shared, of_worker, events, pipelines))
                .expect("the system gives a thread at start-up");
            mailboxes.push(mailbox);
            threads.push(thread);
        }
        Live { workers: Arc::new(Workers { shared, mailboxes, threads: Mutex::new(threads) }) }
    }

    /// Called by the commit hook for every durable commit, in order; never blocks on workers or subscribers.
    pub fn published(&self, commit: &Arc<Commit>) {
        self.workers.shared.commits.push(commit);
        self.workers.mailboxes.iter().for_each(|mailbox| mailbox.published(commit));
    }

    /// Joins (or makes) the group. What the caller planned against (active plugin versions) is to be looked up again
    /// afterwards: a change before the group joined does not end it.
    pub async fn subscribe(&self, spec: Arc<GroupSpec>, from: From) -> Result<Subscription, SubscribeError> {
        let shared = &self.workers.shared;
        let in_log = |seq| spec.requery.is_some() || seq >= shared.store.log_floor();
        if let From::After(seq) = from
            && (!in_log(seq) || seq > shared.store.applied())
        {
            return Err(SubscribeError::Expired);
        }
        let (worker, now) = (self.worker_of(&spec.key), shared.store.durable());
        loop {
            // The seat is taken before anything is awaited: a dropped call leaves the group again.
            let seat = shared.registry.enter(&spec, worker)?;
            match worker.join(Arc::clone(&seat.group)).await {
                Some(Joined::Ready) => {
                    return Ok(match from {
                        From::Snapshot => Subscription::snapshot(seat, None),
                        From::Last(rows) => Subscription::snapshot(seat, Some(rows)),
                        From::After(seq) => Subscription::after(seat, seq),
                        // Where a result begins is known when it has been looked at: a snapshot of no rows says it.
                        From::Now if spec.requery.is_some() => Subscription::snapshot(seat, Some(0)),
                        // What is not on disk yet is nobody's past: its events are still to come.
                        From::Now => Subscription::after(seat, now),
                    });
                }
                Some(Joined::Ended) => {}
                Some(Joined::Fault(fault)) => return Err(fault.into()),
                None => return Err(SubscribeError::Closed),
            }
        }
    }

    /// What a group has told so far, and how far behind it is; zeros where there is none.
    pub fn counters(&self, spec: &GroupSpec) -> Counters {
        let shared = &self.workers.shared;
        let Some(group) = shared.registry.group(&spec.key) else { return Counters::default() };
        let (events, bytes) = group.told();
        Counters { events, bytes, lag: shared.store.applied().0.saturating_sub(group.settled().0) }
    }

    /// Number of open subscriptions, groups.
    pub fn counts(&self) -> (usize, usize) {
        self.workers.shared.registry.counts()
    }

    /// Whether a worker is gone before its time, by a bug: the live queries that would be its own are refused.
    pub fn is_broken(&self) -> bool {
        lock(&self.workers.threads).iter().any(JoinHandle::is_finished)
    }

    /// Ends all subscriptions with [`EndReason::Shutdown`] and stops the workers.
    pub fn close(&self) {
        self.workers.close();
    }

    fn worker_of(&self, key: &[u8]) -> &Arc<Mailbox> {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let mailboxes = &self.workers.mailboxes;
        &mailboxes[(hasher.finish() % mailboxes.len() as u64) as usize]
    }
}

impl Workers {
    fn close(&self) {
        self.shared.registry.close();
        self.mailboxes.iter().for_each(|mailbox| mailbox.close());
        for thread in lock(&self.threads).drain(..) {
            // A worker that panicked has said so and has ended its groups.
            let _ = thread.join();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.close();
    }
}
