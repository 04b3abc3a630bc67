//! From row images to the events of one group: predicate, pipeline, SELECT list, and what that means for whoever holds
//! the earlier result.
//!
//! Pure but for the plugins it calls: knows no tail, thread or subscriber. Live commits, catch-up and snapshots all go
//! through [`evaluate`], so a replayed commit gives the very events it gave when it was new.

use arrow::array::{Array, AsArray, make_comparator};
use arrow::compute::SortOptions;
use arrow::datatypes::{DataType, Float32Type, Float64Type};
use arrow::record_batch::RecordBatch;
use bytes::Bytes;
use wire::frame::SectionView;
use wire::image::ImageAt;
use wire::{ChangeAt, ImageRef, Op, Schema};

use super::event::{CommitEvents, EventOp, EventRow};
use super::{Batch, GroupSpec, Pass, Piped, PipelineFault, Pipelines, ProgramError, Question};
use crate::catalog::{Semantics, TableId};
use crate::store::Seq;

/// Why a commit or a piece could not be evaluated.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error(transparent)]
    Pipeline(#[from] PipelineFault),
    #[error(transparent)]
    Program(#[from] ProgramError),
}

/// The images of one table in one section (or in one piece of a snapshot), gathered once for all groups on it.
#[derive(Default)]
pub(super) struct Rows<'a> {
    images: Vec<ImageRef<'a>>,
    /// Where the images lie, counted from the section's (the piece's) first byte.
    places: Vec<ImageAt>,
    changes: Vec<RowChange>,
    committed_at: i64,
    schema_version: Option<u32>,
}

/// Old and new image of a change, as bytes.
#[cfg(test)]
pub(super) type Pair = (Option<Vec<u8>>, Option<Vec<u8>>);

/// One change: its images as indices of [`Rows::images`], and where its bitmap of changed columns lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RowChange {
    old: Option<usize>,
    new: Option<usize>,
    changed: u32,
    columns: u16,
    /// Of a row of a snapshot; those of a commit expire with the commit.
    expires: Option<i64>,
}

impl<'a> Rows<'a> {
    pub(super) fn of_section(section: &SectionView<'a>, table: TableId, committed_at: i64) -> Self {
        let mut rows = Rows { committed_at, ..Rows::default() };
        for change in section.changes.iter().filter(|change| change.header.table == table.0) {
            let old = change.old.map(|(image, at)| rows.push(image, at));
            let new = change.new.map(|(image, at)| rows.push(image, at));
            let ChangeAt { changed, columns, .. } = change.at();
            rows.changes.push(RowChange { old, new, changed, columns, expires: None });
            rows.schema_version = Some(change.header.schema_version);
        }
        rows
    }

    /// Of the changes of a section: one commit knows one version of a table. `None` where there are none.
    pub(super) fn schema_version(&self) -> Option<u32> {
        self.schema_version
    }

    /// Present rows: as if each had just been inserted.
    pub(super) fn present(images: impl IntoIterator<Item = (ImageRef<'a>, ImageAt, Option<i64>)>) -> Self {
        let mut rows = Rows::default();
        for (image, at, expires) in images {
            let new = Some(rows.push(image, at));
            rows.changes.push(RowChange { old: None, new, changed: 0, columns: 0, expires });
        }
        rows
    }

    /// How many there are to be looked at.
    pub(super) fn count(&self) -> usize {
        self.images.len()
    }

    /// Old and new image of every change.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (Option<ImageRef<'a>>, Option<ImageRef<'a>>)> {
        let image = |at: Option<usize>| at.map(|at| self.images[at]);
        self.changes.iter().map(move |change| (image(change.old), image(change.new)))
    }

    /// Changes that lie nowhere, for tests of the index.
    #[cfg(test)]
    pub(super) fn of_pairs(pairs: &'a [Pair]) -> Self {
        let mut rows = Rows::default();
        for (old, new) in pairs {
            let mut push = |image: &'a Option<Vec<u8>>| {
                let (image, at, _) = ImageRef::parse(image.as_ref()?).expect("an image");
                Some(rows.push(image, at))
            };
            let (old, new) = (push(old), push(new));
            rows.changes.push(RowChange { old, new, changed: 0, columns: 0, expires: None });
        }
        rows
    }

    /// Some of the changes, by their numbers.
    pub(super) fn some(&self, changes: impl Iterator<Item = usize>) -> Self {
        let mut rows = Rows { committed_at: self.committed_at, schema_version: self.schema_version, ..Rows::default() };
        for change in changes.map(|at| self.changes[at]) {
            let mut copy = |at: Option<usize>| at.map(|at| rows.push(self.images[at], self.places[at]));
            let (old, new) = (copy(change.old), copy(change.new));
            rows.changes.push(RowChange { old, new, ..change });
        }
        rows
    }

    fn push(&mut self, image: ImageRef<'a>, at: ImageAt) -> usize {
        self.images.push(image);
        self.places.push(at);
        self.images.len() - 1
    }
}

/// Where rows come from.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub seq: Seq,
    pub pass: Pass,
    /// What the places of [`Rows`] count from: the commit's section, or a buffer of the snapshot's own.
    pub base: &'a [u8],
}

impl<'a> Source<'a> {
    fn batch(self) -> Batch<'a> {
        Batch { seq: self.seq, pass: self.pass, base: self.base }
    }
}

/// A group's query on one worker: its programs and, where it has plugins, the opened pipeline.
pub(super) struct Query<'a> {
    pub spec: &'a GroupSpec,
    pub pipeline: Option<(&'a mut dyn Pipelines, u64)>,
    /// Which images the predicate takes, where it has been asked already (see [`matching_each`]).
    pub known: Option<Vec<bool>>,
}

impl Query<'_> {
    fn matching(&mut self, rows: &Rows<'_>) -> Result<Vec<bool>, ProgramError> {
        self.known.take().map_or_else(|| matching(self.spec, rows), Ok)
    }
}

/// The events of `rows` for one group, or `None` when they do not concern it.
pub(super) fn evaluate(
    query: &mut Query<'_>,
    source: Source<'_>,
    rows: &Rows<'_>,
) -> Result<Option<CommitEvents>, Fault> {
    if query.spec.semantics == Semantics::Feed {
        return outputs(query, source, rows);
    }
    let Some(shown) = show(query, source, rows)? else { return Ok(None) };
    let expire = query.spec.table.expires(rows.committed_at);
    let mut same = RowEquality::new(&shown.batch);
    let (mut events, mut key_images) = (Vec::new(), Vec::new());
    for change in &rows.changes {
        let row = |image: Option<usize>| image.and_then(|image| shown.rows[image]);
        let Some(op) = decide(row(change.old), row(change.new), change.new.is_some(), &mut same)? else { continue };
        let expires = row(change.new).and(if source.pass == Pass::Snapshot { change.expires } else { expire });
        events.push(EventRow { op, key: key_images.len(), new: row(change.new), old: row(change.old), expires });
        key_images.extend(change.new.or(change.old).map(|image| rows.images[image]));
    }
    if events.is_empty() {
        return Ok(None);
    }
    let keys = query.spec.program.keys(&key_images)?;
    // Both sides are rows of one batch; a clone of it shares its columns.
    let (new, old) = (shown.batch.clone(), shown.batch.clone());
    let snapshot = source.pass == Pass::Snapshot;
    Ok(Some(CommitEvents { seq: source.seq, snapshot, events, keys, new, old }))
}

/// Feed semantics: what the pipeline makes of the changes, one event each.
fn outputs(query: &mut Query<'_>, source: Source<'_>, rows: &Rows<'_>) -> Result<Option<CommitEvents>, Fault> {
    let spec = query.spec;
    let matching = query.matching(rows)?;
    let Some((pipelines, id)) = &mut query.pipeline else {
        return Err(ProgramError("a feed without a pipeline".to_owned()).into());
    };
    let (mut changes, mut places) = (Vec::new(), Vec::new());
    for change in &rows.changes {
        // The predicate speaks of rows: an image that does not match is no part of the change.
        let matched = |image: Option<usize>| image.filter(|image| matching[*image]);
        let change = RowChange { old: matched(change.old), new: matched(change.new), ..*change };
        let place = |image: Option<usize>| image.map(|image| rows.places[image]);
        let RowChange { old, new, changed, columns, .. } = change;
        let at = ChangeAt { changed, columns, old: place(old), new: place(new) };
        if at.op().is_some() {
            changes.push(change);
            places.push(at);
        }
    }
    if places.is_empty() {
        return Ok(None);
    }
    let outputs = pipelines.run_changes(*id, source.batch(), &places)?;
    if outputs.is_empty() {
        return Ok(None);
    }
    let expire = spec.table.expires(rows.committed_at);
    let (mut events, mut keys, mut own, mut made) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for output in outputs {
        let change = changes.get(output.index).ok_or_else(|| answer("named a change that it was not given"))?;
        let key = change.new.or(change.old).ok_or_else(|| answer("named a change without rows"))?;
        let shown = if output.op == Op::Delete { change.old } else { change.new };
        let (row, expires) = (keys.len(), if output.op == Op::Delete { None } else { expire });
        events.push(EventRow { op: EventOp::Change(output.op), key: row, new: Some(row), old: None, expires });
        keys.push(rows.images[key]);
        match output.image {
            Some(image) => made.push(image),
            None => own.push(rows.images[shown.ok_or_else(|| answer("kept a row that is not there"))?]),
        }
    }
    let new = match &spec.output {
        Some(schema) => spec.program.batch(schema, &parse_all(&made)?)?,
        None => spec.program.project(&own)?,
    };
    if new.num_rows() != events.len() {
        return Err(answer("made rows for some of its outputs only").into());
    }
    let keys = spec.program.keys(&keys)?;
    let old = new.clone();
    Ok(Some(CommitEvents { seq: source.seq, snapshot: false, events, keys, new, old }))
}

fn answer(what: &str) -> ProgramError {
    ProgramError(format!("the pipeline {what}"))
}

/// Which images the predicate takes.
///
/// Rows that cannot match are not asked about on any path, so that a predicate that fails on one of them fails neither
/// live (where the index keeps it away) nor in a replay.
fn matching(spec: &GroupSpec, rows: &Rows<'_>) -> Result<Vec<bool>, ProgramError> {
    let mut taken: Vec<bool> = rows.images.iter().map(|image| spec.admits(image)).collect();
    let fit: Vec<usize> = (0..taken.len()).filter(|image| taken[*image]).collect();
    if fit.is_empty() {
        return Ok(taken);
    }
    let matching = spec.program.matches(&fit.iter().map(|image| rows.images[*image]).collect::<Vec<_>>())?;
    if matching.len() != fit.len() {
        return Err(ProgramError("the predicate did not answer for every row".to_owned()));
    }
    for (image, matches) in fit.into_iter().zip(matching) {
        taken[image] = matches;
    }
    Ok(taken)
}

/// [`matching`] of several groups of one shape, each with rows of its own, in one evaluation. `None`: they have to be
/// asked one by one, be it because only that can say which of them fails.
pub(super) fn matching_each(asked: &[(&GroupSpec, &Rows<'_>)]) -> Option<Vec<Vec<bool>>> {
    let mut taken: Vec<Vec<bool>> = Vec::with_capacity(asked.len());
    let mut fit: Vec<Vec<ImageRef<'_>>> = Vec::with_capacity(asked.len());
    for (spec, rows) in asked {
        let admitted: Vec<bool> = rows.images.iter().map(|image| spec.admits(image)).collect();
        fit.push(rows.images.iter().zip(&admitted).filter(|(_, fits)| **fits).map(|(image, _)| *image).collect());
        taken.push(admitted);
    }
    let questions = asked.iter().zip(&fit).filter(|(_, rows)| !rows.is_empty());
    let questions: Vec<Question<'_>> =
        questions.map(|((spec, _), rows)| Question { program: &spec.program, rows }).collect();
    let Some(first) = questions.first() else { return Some(taken) };
    let answers = first.program.matches_each(&questions).ok()?;
    if answers.len() != fit.iter().map(Vec::len).sum::<usize>() {
        return None;
    }
    for (image, matches) in taken.iter_mut().flatten().filter(|image| **image).zip(answers) {
        *image = matches;
    }
    Some(taken)
}

/// What a change is to somebody who holds the earlier result. `old` and `new` are the output rows before and after, if
/// the row was (is) in the result; `present` says whether the row is still in the table.
fn decide(
    old: Option<usize>,
    new: Option<usize>,
    present: bool,
    same: &mut RowEquality<'_>,
) -> Result<Option<EventOp>, ProgramError> {
    Ok(match (old, new) {
        (None, None) => None,
        (None, Some(_)) => Some(EventOp::Insert),
        (Some(old), Some(new)) => (!same.rows(old, new)?).then_some(EventOp::Update),
        (Some(_), None) if present => Some(EventOp::MovedOut),
        (Some(_), None) => Some(EventOp::Deleted),
    })
}

/// Output rows: for every image the row of `batch` that shows it, or `None` when it is not in the result.
struct Shown {
    rows: Vec<Option<usize>>,
    batch: RecordBatch,
}

/// `None`: no image is in the result, which is the answer for most commits of a table with many groups.
fn show(query: &mut Query<'_>, source: Source<'_>, rows: &Rows<'_>) -> Result<Option<Shown>, Fault> {
    let spec = query.spec;
    let matching = query.matching(rows)?;
    let mut kept: Vec<usize> = (0..rows.images.len()).filter(|image| matching[*image]).collect();
    let mut output = None;
    if let Some((pipelines, id)) = &mut query.pipeline
        && !kept.is_empty()
    {
        let places: Vec<ImageAt> = kept.iter().map(|image| rows.places[*image]).collect();
        let piped = pipelines.run(*id, source.batch(), &places)?;
        (kept, output) = keep(spec, kept, piped)?;
    }
    if kept.is_empty() {
        return Ok(None);
    }
    let batch = match &output {
        Some((schema, bytes)) => spec.program.batch(schema, &parse_all(bytes)?)?,
        None => spec.program.project(&kept.iter().map(|image| rows.images[*image]).collect::<Vec<_>>())?,
    };
    if batch.num_rows() != kept.len() {
        return Err(ProgramError("the SELECT list did not answer for every row".to_owned()).into());
    }
    let mut shown = vec![None; rows.images.len()];
    for (row, image) in kept.into_iter().enumerate() {
        shown[image] = Some(row);
    }
    Ok(Some(Shown { rows: shown, batch }))
}

/// What a transform put in the place of the kept rows.
pub(super) type Transformed<'a> = Option<(&'a Schema, Vec<Bytes>)>;

/// The images that a pipeline let through, and what it made of them.
pub(super) fn keep(spec: &GroupSpec, kept: Vec<usize>, piped: Piped) -> Result<(Vec<usize>, Transformed<'_>), Fault> {
    if piped.keep.len() != kept.len() {
        return Err(ProgramError("the pipeline did not answer for every row".to_owned()).into());
    }
    let kept: Vec<usize> = kept.into_iter().zip(piped.keep).filter_map(|(image, keep)| keep.then_some(image)).collect();
    let Some(schema) = &spec.output else { return Ok((kept, None)) };
    let output = piped.output.unwrap_or_default();
    if output.len() != kept.len() {
        return Err(ProgramError("the pipeline's transform did not answer for every row".to_owned()).into());
    }
    Ok((kept, Some((schema, output))))
}

pub(super) fn parse_all(images: &[Bytes]) -> Result<Vec<ImageRef<'_>>, ProgramError> {
    images
        .iter()
        .map(|bytes| ImageRef::parse(bytes).map(|(image, ..)| image))
        .collect::<Result<_, _>>()
        .map_err(|error| ProgramError(format!("a transformed row cannot be read: {error}")))
}

/// Whether two rows of a batch show the same in every column: NULL equals NULL, NaN equals NaN. Comparators are made at
/// the first question, because most commits only insert or delete.
pub(super) struct RowEquality<'a> {
    batch: &'a RecordBatch,
    columns: Option<Vec<SameInColumn<'a>>>,
}

type SameInColumn<'a> = Box<dyn Fn(usize, usize) -> bool + 'a>;

impl<'a> RowEquality<'a> {
    pub(super) fn new(batch: &'a RecordBatch) -> Self {
        RowEquality { batch, columns: None }
    }

    pub(super) fn rows(&mut self, one: usize, other: usize) -> Result<bool, ProgramError> {
        let columns = match &mut self.columns {
            Some(columns) => columns,
            empty => {
                let columns = self.batch.columns().iter().map(|column| same_in_column(column.as_ref()));
                empty.insert(columns.collect::<Result<_, _>>()?)
            }
        };
        Ok(columns.iter().all(|same| same(one, other)))
    }
}

fn same_in_column(column: &dyn Array) -> Result<SameInColumn<'_>, ProgramError> {
    // The total order tells NaNs apart by their bits, which nobody sees.
    match column.data_type() {
        DataType::Float32 => {
            let floats = column.as_primitive::<Float32Type>();
            Ok(same_or_null(column, |i, j| {
                let (one, other) = (floats.value(i), floats.value(j));
                one.to_bits() == other.to_bits() || one.is_nan() && other.is_nan()
            }))
        }
        DataType::Float64 => {
            let floats = column.as_primitive::<Float64Type>();
            Ok(same_or_null(column, |i, j| {
                let (one, other) = (floats.value(i), floats.value(j));
                one.to_bits() == other.to_bits() || one.is_nan() && other.is_nan()
            }))
        }
        _ => {
            let compare = make_comparator(column, column, SortOptions::default())
                .map_err(|error| ProgramError(format!("output rows cannot be compared: {error}")))?;
            Ok(Box::new(move |i, j| compare(i, j).is_eq()))
        }
    }
}

fn same_or_null<'a>(column: &'a dyn Array, same: impl Fn(usize, usize) -> bool + 'a) -> SameInColumn<'a> {
    Box::new(move |i, j| match (column.is_null(i), column.is_null(j)) {
        (false, false) => same(i, j),
        (one, other) => one == other,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Float32Array, Float64Array, Int64Array, StringArray};

    use super::*;

    fn batch(columns: Vec<ArrayRef>) -> RecordBatch {
        let named = columns.into_iter().enumerate().map(|(i, column)| (i.to_string(), column, true));
        RecordBatch::try_from_iter_with_nullable(named).unwrap()
    }

    #[test]
    fn rows_are_the_same_when_nobody_sees_a_difference() {
        let nan = f64::NAN;
        let other_nan = f64::from_bits(nan.to_bits() ^ 1);
        let floats = batch(vec![Arc::new(Float64Array::from(vec![
            Some(nan),
            Some(other_nan),
            Some(0.0),
            Some(-0.0),
            None,
            None,
            Some(1.0),
        ]))]);
        let mut same = RowEquality::new(&floats);
        for (one, other, expected) in
            [(0, 1, true), (2, 3, false), (4, 5, true), (0, 4, false), (4, 6, false), (2, 6, false), (6, 6, true)]
        {
            assert_eq!(same.rows(one, other).unwrap(), expected, "{one} and {other}");
        }

        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(vec![Some("a"), Some("a"), None, Some(""), Some("a")])),
            Arc::new(Int64Array::from(vec![1, 1, 1, 1, 2])),
            Arc::new(Float32Array::from(vec![f32::NAN; 5])),
        ];
        let mixed = batch(columns);
        let mut same = RowEquality::new(&mixed);
        for (one, other, expected) in [(0, 1, true), (2, 3, false), (0, 4, false), (0, 2, false)] {
            assert_eq!(same.rows(one, other).unwrap(), expected, "{one} and {other}");
        }
    }

    #[test]
    fn a_change_is_what_it_is_to_the_result() {
        let rows = batch(vec![Arc::new(Int64Array::from(vec![5, 5, 6]))]);
        let mut same = RowEquality::new(&rows);
        for (old, new, present, expected) in [
            (None, None, true, None),
            (None, None, false, None),
            (None, Some(0), true, Some(EventOp::Insert)),
            (Some(0), Some(1), true, None),
            (Some(0), Some(2), true, Some(EventOp::Update)),
            (Some(0), None, true, Some(EventOp::MovedOut)),
            (Some(0), None, false, Some(EventOp::Deleted)),
        ] {
            let op = decide(old, new, present, &mut same).unwrap();
            assert_eq!(op, expected, "{old:?} to {new:?}, present: {present}");
        }
    }
}
