//! Work a worker does for one subscription, a piece at a time and only when asked: present rows of a snapshot, commits
//! replayed from the change log. Nothing is made ahead of its client, so a stalled reader costs one piece.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;
use wire::image::ImageAt;
use wire::{FrameView, ImageRef};

use super::evaluate::{Fault, Query, Rows, Source, evaluate};
use super::event::CommitEvents;
use super::log::read_piece;
use super::requery::Held;
use super::subscription::EndReason;
use super::worker::{Shared, outdated};
use super::{Encoder, GroupSpec, Pass};
use crate::store::snapshot::RowScan;
use crate::store::{Seq, Store, StoreError};

/// Rows of one piece of a snapshot, or of a result on its way through plugins: one evaluation, a millisecond or so.
pub(super) const PIECE_ROWS: usize = 1000;

pub(super) struct Job {
    pub group: u64,
    pub work: Work,
    /// The newest commit when the worker took the job: an answer must not be older.
    pub asked: Option<Seq>,
    pub reply: oneshot::Sender<Piece>,
}

pub(super) enum Work {
    /// Takes a snapshot; of its rows all, or the last so many.
    Snapshot { last: Option<u64> },
    /// The same of a result that is held.
    Held { scan: Box<SnapshotScan>, last: Option<u64> },
    /// The next rows of a snapshot.
    Rows(Box<SnapshotScan>),
    /// Commits after `after`, up to `until`.
    Replay { after: Seq, until: Seq },
}

/// What a job gave. An empty piece is an answer too: nothing matched so far.
pub(super) enum Piece {
    Rows { bytes: Bytes, seq: Seq, rest: Option<Box<SnapshotScan>> },
    Commits { bytes: Bytes, seq: Seq },
    Expired,
    Failed(EndReason),
}

/// Why a job failed; only its own subscription ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum JobError {
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The table is another one by now, and the group will hear of it.
    #[error("the table was altered or dropped")]
    Outdated(EndReason),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Where a row starts in the buffer of its piece, and when it expires.
type RowStart = (usize, Option<i64>);

/// A snapshot half sent: its position and the rows to come.
pub(super) struct SnapshotScan {
    seq: Seq,
    rows: Present,
    /// How many rows are wanted still; `None`: all.
    left: Option<u64>,
}

enum Present {
    Stored(RowScan),
    /// The result of a query that is run again, and the next row of it.
    Held(Arc<Held>, usize),
}

/// A snapshot as it was sent to somebody, in one piece. When many subscribe at the same time the first pays and all share
/// the bytes; what has happened since is in the group's tail. Larger ones are read by each, at their own pace.
pub(super) struct Snapshot {
    pub seq: Seq,
    pub last: Option<u64>,
    pub bytes: Bytes,
}

impl SnapshotScan {
    pub(super) fn start(store: &Store, spec: &GroupSpec, last: Option<u64>) -> Result<Self, JobError> {
        let snapshot = store.snapshot();
        // Rows of the next version do not have this one's columns any more: nothing true could be said of them.
        if let Some(reason) = outdated(snapshot.catalog(), spec) {
            return Err(JobError::Outdated(reason));
        }
        store.make_durable(&snapshot)?;
        let rows = match last {
            None => snapshot.scan(&spec.table, &spec.scope, spec.range.clone()),
            Some(_) => snapshot.scan_back(&spec.table, &spec.scope, spec.range.clone()),
        };
        Ok(SnapshotScan { seq: snapshot.seq(), rows: Present::Stored(rows), left: last })
    }

    /// A result as it is known at `seq`.
    pub(super) fn held(held: Arc<Held>, seq: Seq, last: Option<u64>) -> Self {
        SnapshotScan { seq, rows: Present::Held(held, 0), left: last }
    }
}

/// The next rows copied one after the other, where each starts and when it expires, and whether there may be more.
fn read(rows: &mut RowScan, bytes: usize) -> Result<(Vec<u8>, Vec<RowStart>, bool), StoreError> {
    let (mut base, mut starts) = (Vec::new(), Vec::new());
    while starts.len() < PIECE_ROWS && base.len() < bytes {
        let Some((_, image)) = rows.next_row()? else { return Ok((base, starts, false)) };
        let start = base.len();
        base.extend_from_slice(image);
        starts.push((start, rows.expires()));
    }
    Ok((base, starts, true))
}

/// The next piece of a snapshot.
pub(super) fn snapshot_piece(
    shared: &Shared,
    query: &mut Query<'_>,
    mut scan: Box<SnapshotScan>,
) -> Result<Piece, JobError> {
    let (events, mut more) = match &mut scan.rows {
        Present::Stored(rows) => stored_piece(shared, query, scan.seq, rows)?,
        Present::Held(held, next) => {
            let from = *next;
            *next = (from + PIECE_ROWS).min(held.len());
            (held.present(scan.seq, from..*next), *next < held.len())
        }
    };
    let (mut out, seq) = (Vec::new(), scan.seq);
    if let Some(mut events) = events {
        if let Some(left) = &mut scan.left {
            events.events.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= events.events.len() as u64;
            more &= *left > 0;
        }
        shared.encoder.encode(query.spec, &events, &mut out);
    }
    Ok(Piece::Rows { bytes: out.into(), seq, rest: more.then_some(scan) })
}

fn stored_piece(
    shared: &Shared,
    query: &mut Query<'_>,
    seq: Seq,
    rows: &mut RowScan,
) -> Result<(Option<CommitEvents>, bool), JobError> {
    let (base, starts, more) = read(rows, shared.options.chunk_bytes)?;
    let mut images = Vec::with_capacity(starts.len());
    for (start, expires) in starts {
        let (image, place, _) = ImageRef::parse(&base[start..]).map_err(|error| damaged("a stored row", error))?;
        images.push((image, shifted(place, start), expires));
    }
    let source = Source { seq, pass: Pass::Snapshot, base: &base };
    Ok((evaluate(query, source, &Rows::present(images))?, more))
}

/// The place of an image that starts `start` bytes into the buffer. A piece is far smaller than 4 GiB.
fn shifted(at: ImageAt, start: usize) -> ImageAt {
    let start = start as u32;
    ImageAt { present: at.present + start, slots: at.slots + start, heap: at.heap + start, columns: at.columns }
}

/// Events of whole commits after `after`; the cursor after them, which is `until` at most.
pub(super) fn replay_piece(
    shared: &Shared,
    query: &mut Query<'_>,
    after: Seq,
    until: Seq,
) -> Result<(Bytes, Seq), JobError> {
    let (spec, bound) = (query.spec, shared.options.chunk_bytes);
    let piece = read_piece(&shared.store, [spec.table.namespace], after, Some(until), bound)?;
    let (mut out, mut cursor) = (Vec::new(), after);
    for commit in &piece.commits {
        match replay_commit(&*shared.encoder, query, commit.seq, &commit.frame, &mut out) {
            Ok(()) => cursor = commit.seq,
            // What comes before the commit that fails is delivered first; asked again, it fails again.
            Err(_) if cursor > after => return Ok((out.into(), cursor)),
            Err(error) => return Err(error),
        }
        if out.len() >= bound {
            return Ok((out.into(), cursor));
        }
    }
    Ok((out.into(), piece.end))
}

fn replay_commit(
    encoder: &dyn Encoder,
    query: &mut Query<'_>,
    seq: Seq,
    frame: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), JobError> {
    let view = FrameView::parse(frame).map_err(|error| damaged("the change log", error))?;
    let Some(section) = view.section(&query.spec.scope) else { return Ok(()) };
    let rows = Rows::of_section(section, query.spec.table.id, view.committed_at);
    if rows.schema_version() != Some(query.spec.table.schema_version) {
        return Ok(());
    }
    let source = Source { seq, pass: Pass::Replay, base: section.bytes };
    if let Some(events) = evaluate(query, source, &rows)? {
        encoder.encode(query.spec, &events, out);
    }
    Ok(())
}

fn damaged(what: &str, error: impl std::fmt::Display) -> StoreError {
    StoreError::Corrupt(format!("{what}: {error}"))
}

/// The last replayed piece of a group. When many subscribers come back at the same position (after a restart, or a
/// commit larger than the tail) the first pays and all share the bytes.
pub(super) struct Replayed {
    pub after: Seq,
    pub bytes: Bytes,
    pub end: Seq,
}
