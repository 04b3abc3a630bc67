//! Queries that are no filter over one table: run again as a whole when one of their tables changed, once per group, and
//! compared with the result before.
//!
//! A worker notes the commits that touch such a group's tables and asks for a run ([`Requery`]), at once if there was
//! none for an interval, else when the interval is over: a burst of commits costs one run. The run takes a snapshot
//! when it really starts, and its answer carries that snapshot's seq. The difference to the answer before is what a
//! subscriber needs who holds that one, so it is appended under the new seq; until then nothing says that the group has
//! got further than its last answer ([`GroupTail::settled`](super::tail::GroupTail::settled)).
//!
//! The change log knows no results, so a subscriber older than the group's tail starts afresh.
//!
//! Where the group has plugins, an answer goes through them before it is compared ([`pipe`]).

mod pipe;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::compute::concat_batches;
use arrow::record_batch::RecordBatch;
use arrow::row::{RowConverter, SortField};
use wire::image::ImageAt;
use wire::{Schema, Scope};

use super::ProgramError;
use super::evaluate::RowEquality;
use super::event::{CommitEvents, EventOp, EventRow};
use super::job::Job;
use crate::catalog::Table;
use crate::store::Seq;

pub(super) use pipe::{Piping, Progress};

/// Runs one query as a whole.
pub trait Requery: Send + Sync {
    /// Starts a run at a snapshot of its own and returns at once; `done` is called once, from anywhere.
    fn run(&self, done: Done);

    /// The columns of its results as plugins see them; none where there are no plugins.
    fn columns(&self) -> &Schema;

    /// Rows of a result as plugins read them: of `some` as many as make about `bytes`, but one at least.
    fn images(&self, rows: &RecordBatch, some: Range<usize>, bytes: usize) -> Result<Images, ProgramError>;
}

/// Rows as bytes, and where in them each lies.
pub struct Images {
    pub base: Vec<u8>,
    pub places: Vec<ImageAt>,
}

pub type Done = Box<dyn FnOnce(Result<Answer, RequeryError>) + Send>;

/// A result: as many keys as rows, no two keys alike.
pub struct Answer {
    pub seq: Seq,
    pub rows: RecordBatch,
    pub keys: RecordBatch,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum RequeryError {
    /// A table is gone or is another one: the commit that says so is on its way to the worker.
    #[error("a table of the query has changed")]
    Changed,
    #[error("{0}")]
    Failed(String),
}

/// How a group's query is run again.
#[derive(Clone)]
pub struct Rerun {
    pub runner: Arc<dyn Requery>,
    /// Every table that is read, and whose rows of it.
    pub sources: Vec<(Arc<Table>, Scope)>,
}

/// The answer a group holds.
pub(super) struct Held {
    seq: Seq,
    rows: RecordBatch,
    keys: RecordBatch,
}

impl Held {
    pub(super) fn len(&self) -> usize {
        self.rows.num_rows()
    }

    /// Some of the rows, as present at `seq`.
    pub(super) fn present(&self, seq: Seq, rows: Range<usize>) -> Option<CommitEvents> {
        let event = |row| EventRow { op: EventOp::Insert, key: row, new: Some(row), old: None, expires: None };
        let events: Vec<EventRow> = rows.map(event).collect();
        (!events.is_empty()).then(|| CommitEvents {
            seq,
            snapshot: true,
            events,
            keys: self.keys.clone(),
            new: self.rows.clone(),
            old: self.rows.clone(),
        })
    }
}

/// What a worker knows of one such group.
pub(super) struct Runs {
    pub held: Option<Arc<Held>>,
    /// From its start until the group holds its answer, or there is none.
    pub running: bool,
    /// The answer of that run, on its way through the pipeline.
    pub piping: Option<Piping>,
    started: Option<Instant>,
    /// When the next run is due, once something changed.
    pub due: Option<Instant>,
    /// Jobs for which the answer is not new enough, with the seq that would be.
    pub waiting: Vec<(Job, Seq)>,
}

impl Runs {
    pub(super) fn new() -> Self {
        Runs { held: None, running: false, piping: None, started: None, due: None, waiting: Vec::new() }
    }

    pub(super) fn last(&self) -> Seq {
        self.held.as_ref().map_or(Seq::default(), |held| held.seq)
    }

    /// When a run may start, if one is to: not before the interval after the last is over, but at once where somebody
    /// who has come anew waits for it.
    pub(super) fn plan(&mut self, interval: Duration) -> Instant {
        let now = Instant::now();
        let started = self.started.filter(|_| self.waiting.is_empty());
        let due = started.map_or(now, |started| now.max(started + interval));
        *self.due.insert(self.due.map_or(due, |planned| planned.min(due)))
    }

    pub(super) fn start(&mut self) {
        self.due = None;
        self.running = true;
        self.started = Some(Instant::now());
    }

    /// Takes an answer in: the events that lead to it from the one before, if there was one and they differ.
    pub(super) fn answered(&mut self, answer: Answer) -> Result<Option<CommitEvents>, ProgramError> {
        let next = Held { seq: answer.seq, rows: answer.rows, keys: answer.keys };
        let empty = Held { seq: answer.seq, rows: next.rows.slice(0, 0), keys: next.keys.slice(0, 0) };
        let events = difference(self.held.as_deref().unwrap_or(&empty), &next)?;
        let first = self.held.is_none();
        self.held = Some(Arc::new(next));
        // Nobody holds anything before the first answer.
        Ok(events.filter(|_| !first))
    }
}

/// From one result to another: rows of both in one batch, so that one event can speak of both.
fn difference(before: &Held, after: &Held) -> Result<Option<CommitEvents>, ProgramError> {
    let join = |one: &RecordBatch, two: &RecordBatch| {
        concat_batches(&two.schema(), [one, two]).map_err(|error| ProgramError(format!("results do not fit: {error}")))
    };
    let (rows, keys) = (join(&before.rows, &after.rows)?, join(&before.keys, &after.keys)?);
    let keyed = Keyed::new(&keys)?;
    let (olds, all) = (before.len(), before.len() + after.len());
    let mut held: HashMap<&[u8], usize> = (0..olds).map(|row| (keyed.key(row), row)).collect();
    let mut seen: HashMap<&[u8], usize> = HashMap::with_capacity(after.len());
    let (mut events, mut same) = (Vec::new(), RowEquality::new(&rows));
    for row in olds..all {
        if seen.insert(keyed.key(row), row).is_some() {
            // Rather no stream than one whose fold is wrong.
            return Err(ProgramError("two rows of the result have one key; this is a bug of the server".to_owned()));
        }
        match held.remove(keyed.key(row)) {
            None => events.push(EventRow { op: EventOp::Insert, key: row, new: Some(row), old: None, expires: None }),
            Some(old) if same.rows(old, row)? => {}
            Some(old) => {
                events.push(EventRow { op: EventOp::Update, key: row, new: Some(row), old: Some(old), expires: None })
            }
        }
    }
    let mut gone: Vec<usize> = held.into_values().collect();
    gone.sort_unstable();
    let left = |row| EventRow { op: EventOp::MovedOut, key: row, new: None, old: Some(row), expires: None };
    let events: Vec<EventRow> = gone.into_iter().map(left).chain(events).collect();
    if events.is_empty() {
        return Ok(None);
    }
    drop(same);
    Ok(Some(CommitEvents { seq: after.seq, snapshot: false, events, keys: keys.clone(), new: rows.clone(), old: rows }))
}

/// Keys as bytes.
struct Keyed(Option<arrow::row::Rows>);

impl Keyed {
    fn new(keys: &RecordBatch) -> Result<Self, ProgramError> {
        // Without parts (an aggregate over everything) there is one key.
        if keys.num_columns() == 0 {
            return Ok(Keyed(None));
        }
        let fields = keys.columns().iter().map(|column| SortField::new(column.data_type().clone())).collect();
        let rows = RowConverter::new(fields).and_then(|converter| converter.convert_columns(keys.columns()));
        rows.map(|rows| Keyed(Some(rows))).map_err(|error| ProgramError(format!("keys cannot be compared: {error}")))
    }

    fn key(&self, row: usize) -> &[u8] {
        self.0.as_ref().map_or(&[], |rows| rows.row(row).data())
    }
}
