//! Stages in order: batches of rows or changes, described in place where the ring has them, else put into the worker part
//! once; a failing batch is taken apart to find what fails alone.
//!
//! A pipeline is given rows, or changes: two images with what is different between them. Row kinds before a change kind
//! look at both images of a change: a filter takes the image it does not keep out of the change, a transform makes
//! both anew. A change transform turns changes into rows, which only row kinds can follow.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use wire::abi::{CHANGE_DESCRIPTOR_BYTES, ChangeDescriptor, DESCRIPTOR_BYTES, Descriptor, MAX_BATCH, PluginKind};
use wire::frame::changed_columns;
use wire::image::ImageAt;
use wire::{ChangeAt, ImageError, ImageRef, Kind, Op};

use super::abi::{Made, RUN_OUTPUTS};
use super::health::{Culprit, Set, UnitKey};
use super::instance::{Batch, CallFault, Instances, Setup, Space};
use super::registry::{Owner, Shared};
use super::window::{Lease, PART_ROWS_AT, WorkerPart};
use super::{FaultCause, Origin, PluginError, UnitFault};
use crate::catalog::OnError;

/// One stage of an open pipeline.
pub struct OpenStage {
    pub setup: Setup,
    /// Of a transform: the kinds of its output columns, by id.
    pub kinds: Vec<Kind>,
}

/// What goes through the stages.
pub enum Unit {
    Row(Row),
    /// Boxed: units are moved from stage to stage, and nearly all of them are rows.
    Change(Box<Change>),
}

pub struct Row {
    /// Its place (its change's place) among what went into the run.
    index: u32,
    /// While the row is one image of a change: which, to put them together again.
    side: u32,
    /// Its place among what went into the stage.
    turn: u32,
    /// Of the change it was made of.
    op: Op,
    source: Source,
}

pub struct Change {
    index: u32,
    turn: u32,
    old: Option<Source>,
    new: Option<Source>,
    changed: Changed,
}

/// Where an image is.
enum Source {
    /// In the ring, from the window's first byte.
    Ring(Descriptor),
    /// Bytes of the run's base, and where the image's parts lie in them.
    Base(Range<u32>, ImageAt),
    /// Made by a transform: one of the images of its call.
    Made(Rc<Made>, u32),
}

/// The bitmap of changed columns of an update. With one image alone, that image's own bitmap says the same: a missing
/// image counts as NULLs.
enum Changed {
    Ring(u32, u16),
    Bytes(Vec<u8>, u16),
}

impl Unit {
    pub fn index(&self) -> usize {
        match self {
            Unit::Row(row) => row.index as usize,
            Unit::Change(change) => change.index as usize,
        }
    }

    /// What happened, and the image, where a transform made it.
    pub fn into_made(self) -> Option<(Op, Option<Bytes>)> {
        let made = |source: Source| match source {
            Source::Made(made, image) => Some(made.shared(image)),
            Source::Ring(_) | Source::Base(..) => None,
        };
        match self {
            Unit::Row(row) => Some((row.op, made(row.source))),
            Unit::Change(change) => {
                let op = change.op()?;
                Some((op, change.new.or(change.old).and_then(made)))
            }
        }
    }
}

impl Change {
    fn op(&self) -> Option<Op> {
        match (&self.old, &self.new) {
            (None, Some(_)) => Some(Op::Insert),
            (Some(_), Some(_)) => Some(Op::Update),
            (Some(_), None) => Some(Op::Delete),
            (None, None) => None,
        }
    }
}

/// What is left of rows behind the last stage.
pub enum Left {
    /// Of each row, whether it is.
    Kept(Vec<bool>),
    Units(Vec<Unit>),
}

/// What one call told.
enum Answer {
    Kept(u64),
    Images(Made),
    /// How many images each change was made into, and these.
    Expanded(Vec<u32>, Made),
}

/// Runs the stages of one pipeline over what one commit or piece brings.
pub struct Runner<'a> {
    pub shared: &'a Arc<Shared>,
    pub space: &'a mut Space,
    pub instances: &'a mut Instances,
    pub origin: Origin,
    /// Bytes that input places count from.
    pub base: &'a [u8],
    /// Set while the ring holds those same bytes.
    pub lease: Option<Lease>,
    pub on_error: OnError,
    /// Whether failures are remembered, and make the plugin rest: those of a trial are nobody else's business.
    pub counts: bool,
    /// Bytes of output so far.
    pub answered: usize,
    /// The stage at work.
    pub stage: usize,
    /// What failed while the pipeline went on.
    pub faults: Vec<UnitFault>,
}

impl Runner<'_> {
    pub fn rows(&mut self, stages: &[OpenStage], places: &[ImageAt]) -> Result<Left, PluginError> {
        if let Some((first, rest)) = stages.split_first()
            && first.setup.module.kind == PluginKind::RowFilter
            && !first.setup.module.health.remembers()
            && let Some(lease) = &self.lease
        {
            let (offset, len) = (lease.offset, lease.len);
            let kept = self.first_filter(&first.setup, places, offset, len)?;
            if rest.is_empty() {
                return Ok(Left::Kept(kept));
            }
            let kept = places.iter().enumerate().zip(kept).filter(|(_, kept)| *kept);
            let units = kept.map(|((index, at), _)| self.row(index, *at)).collect::<Result<_, _>>()?;
            return self.run(rest, 1, units).map(Left::Units);
        }
        let units = places.iter().enumerate().map(|(index, at)| self.row(index, *at)).collect::<Result<_, _>>()?;
        self.run(stages, 0, units).map(Left::Units)
    }

    /// Rows of the ring through a filter that comes first: which are kept. Most fall out here, or are not looked at any
    /// further, so none becomes a unit.
    fn first_filter(
        &mut self,
        setup: &Setup,
        places: &[ImageAt],
        offset: u32,
        len: u32,
    ) -> Result<Vec<bool>, PluginError> {
        let mut out = vec![false; places.len()];
        for (number, batch) in places.chunks(MAX_BATCH).enumerate() {
            self.rests(setup)?;
            let first = number * MAX_BATCH;
            // The heap comes last in an image: where it begins inside, so do the other parts. The guest takes hardly longer
            // for a row than three comparisons do.
            if let Some(i) = batch.iter().position(|at| at.heap > len) {
                return Err(damaged("row", first + i, ImageError::Truncated));
            }
            self.space.part.describe(batch.iter().map(move |at| Descriptor::new(*at, offset)));
            match self.judge(setup, batch.len()) {
                Ok(kept) => {
                    for (i, row) in out[first..first + batch.len()].iter_mut().enumerate() {
                        *row = kept >> i & 1 == 1;
                    }
                }
                Err(fault) => {
                    let units = batch.iter().enumerate().map(|(i, at)| self.row(first + i, *at));
                    let (units, mut kept) = (units.collect::<Result<_, _>>()?, Vec::new());
                    self.singly(setup, units, fault, &mut kept)?;
                    kept.iter().for_each(|unit: &Unit| out[unit.index()] = true);
                }
            }
        }
        Ok(out)
    }

    /// One call with rows that are described. The instance may have to be configured first, which leaves descriptors alone.
    fn judge(&mut self, setup: &Setup, rows: usize) -> Result<u64, CallFault> {
        let (instance, handle) = self.instances.get(setup, self.space)?;
        let batch = Batch { setup, origin: self.origin, handle, rows, used: PART_ROWS_AT };
        instance.filter(&batch, &self.space.part)
    }

    fn row(&self, index: usize, at: ImageAt) -> Result<Unit, PluginError> {
        let source = self.source(at).map_err(|error| damaged("row", index, error))?;
        Ok(Unit::Row(Row { index: index as u32, op: Op::Insert, side: 0, turn: 0, source }))
    }

    pub fn changes(&mut self, stages: &[OpenStage], places: &[ChangeAt]) -> Result<Vec<Unit>, PluginError> {
        let mut units = Vec::with_capacity(places.len());
        for (index, at) in places.iter().enumerate() {
            let change = self.change(index, at).map_err(|error| damaged("change", index, error))?;
            units.push(Unit::Change(Box::new(change)));
        }
        self.run(stages, 0, units)
    }

    /// Through the stages, the first of which is the pipeline's `first`.
    fn run(&mut self, stages: &[OpenStage], first: usize, mut units: Vec<Unit>) -> Result<Vec<Unit>, PluginError> {
        for (number, stage) in stages.iter().enumerate() {
            self.stage = first + number;
            let changes = matches!(units.first(), Some(Unit::Change(_)));
            units = match stage.setup.module.kind.sees_changes() {
                false if changes => self.both_images(stage, units)?,
                true if !changes && !units.is_empty() => {
                    return Err(PluginError::Host("a stage for changes behind one that makes rows".to_owned()));
                }
                _ => self.stage(&stage.setup, units)?,
            };
        }
        Ok(units)
    }

    fn source(&self, at: ImageAt) -> Result<Source, ImageError> {
        let Some(lease) = &self.lease else {
            let (range, inner) = image_range(self.base, at)?;
            return Ok(Source::Base(range.start as u32..range.end as u32, inner));
        };
        if inside(&at, lease.len) {
            Ok(Source::Ring(Descriptor::new(at, lease.offset)))
        } else {
            Err(ImageError::Truncated)
        }
    }

    fn change(&self, index: usize, at: &ChangeAt) -> Result<Change, ImageError> {
        let old = at.old.map(|at| self.source(at)).transpose()?;
        let new = at.new.map(|at| self.source(at)).transpose()?;
        let changed = match &self.lease {
            Some(lease) if at.changed <= lease.len => Changed::Ring(lease.offset + at.changed, at.columns),
            Some(_) => return Err(ImageError::Truncated),
            None => {
                let (from, len) = (at.changed as usize, usize::from(at.columns).div_ceil(8));
                let bytes = self.base.get(from..).and_then(|rest| rest.get(..len)).ok_or(ImageError::Truncated)?;
                Changed::Bytes(bytes.to_vec(), at.columns)
            }
        };
        Ok(Change { index: index as u32, turn: 0, old, new, changed })
    }

    /// A stage for rows over changes: its images one by one, then put together again.
    fn both_images(&mut self, stage: &OpenStage, units: Vec<Unit>) -> Result<Vec<Unit>, PluginError> {
        let (mut rows, mut rest) = (Vec::with_capacity(units.len() * 2), Vec::with_capacity(units.len()));
        for unit in units {
            let Unit::Change(change) = unit else { continue };
            let Change { index, old, new, changed, .. } = *change;
            let side = rest.len() as u32 * 2;
            for (side, source) in [(side, old), (side + 1, new)] {
                let row = source.map(|source| Unit::Row(Row { index, op: Op::Update, side, turn: 0, source }));
                rows.extend(row);
            }
            rest.push((index, changed));
        }
        let transforms = !stage.setup.module.kind.is_filter();
        let mut rows = self.stage(&stage.setup, rows)?.into_iter().peekable();
        let mut changes = Vec::with_capacity(rest.len());
        for ((index, mut changed), side) in rest.into_iter().zip((0..).step_by(2)) {
            let mut image = |wanted: u32| match rows.next_if(|row| matches!(row, Unit::Row(row) if row.side == wanted))
            {
                Some(Unit::Row(row)) => Some(row.source),
                _ => None,
            };
            let (old, new) = (image(side), image(side + 1));
            if old.is_none() && new.is_none() {
                continue;
            }
            if transforms && let (Some(Source::Made(olds, old)), Some(Source::Made(news, new))) = (&old, &new) {
                let compared = compared(&stage.kinds, olds.image(*old).0, news.image(*new).0);
                changed = compared.map_err(|error| damaged("output", index as usize, error))?;
            }
            changes.push(Unit::Change(Box::new(Change { index, turn: 0, old, new, changed })));
        }
        Ok(changes)
    }

    fn stage(&mut self, setup: &Setup, units: Vec<Unit>) -> Result<Vec<Unit>, PluginError> {
        let mut out = Vec::with_capacity(units.len());
        let units = self.without_known(setup, units, &mut out)?;
        // What is known to fail and passed comes first; its place is among the others.
        let passed = out.len();
        let mut rest = units.into_iter();
        let mut batch: Vec<Unit> = rest.by_ref().take(MAX_BATCH).collect();
        while !batch.is_empty() {
            self.rests(setup)?;
            let (called, answer) = self.call(setup, &batch);
            // What did not fit the worker part waits for the next call.
            let mut next = batch.split_off(called);
            match answer {
                Ok(answer) => self.take(setup, batch, answer, &mut out)?,
                Err(fault) => self.singly(setup, batch, fault, &mut out)?,
            }
            next.extend(rest.by_ref().take(MAX_BATCH - next.len()));
            batch = next;
        }
        if passed > 0 {
            out.sort_by_key(|unit| match unit {
                Unit::Row(row) => row.turn,
                Unit::Change(change) => change.turn,
            });
        }
        Ok(out)
    }

    /// What rests together.
    fn set(&self, setup: &Setup) -> Set {
        Set { setup: setup.key, owner: self.owner() }
    }

    /// An error while the plugin rests, with these parameters or with all.
    fn rests(&self, setup: &Setup) -> Result<(), PluginError> {
        let health = &setup.module.health;
        if self.counts
            && health.has_lost_instances()
            && let Some(rest) = health.rests(&self.set(setup), Instant::now())
        {
            return Err(self.resting(setup, rest));
        }
        self.rests_all(setup)
    }

    /// An error while it rests with all parameters, because it has taken too much of this worker's time for nothing.
    fn rests_all(&self, setup: &Setup) -> Result<(), PluginError> {
        let waste = &self.instances.waste;
        if self.counts
            && waste.is_any()
            && let Some(rest) = waste.rests(&self.culprit(setup), Instant::now())
        {
            return Err(self.resting(setup, rest));
        }
        Ok(())
    }

    fn culprit(&self, setup: &Setup) -> Culprit {
        Culprit { module: setup.module.id, owner: self.owner() }
    }

    /// Whose rows are at work.
    fn owner(&self) -> Owner {
        Owner { namespace: self.space.namespace, user: self.space.owner().cloned() }
    }

    /// So much of the worker's time was for nothing. (For want of memory of ours it is nobody's doing.)
    fn waste(&mut self, setup: &Setup, fault: &CallFault, took: Duration) {
        if self.counts && !fault.host {
            let culprit = self.culprit(setup);
            self.instances.waste.add(culprit, took, Instant::now());
        }
    }

    fn resting(&self, setup: &Setup, rest: Duration) -> PluginError {
        PluginError::Resting { plugin: setup.plugin.to_string(), stage: self.stage, rest }
    }

    /// Takes out what is known to fail, so that it costs no call again.
    fn without_known(
        &mut self,
        setup: &Setup,
        units: Vec<Unit>,
        out: &mut Vec<Unit>,
    ) -> Result<Vec<Unit>, PluginError> {
        let health = &setup.module.health;
        if !health.remembers() {
            return Ok(units);
        }
        let mut left = Vec::with_capacity(units.len());
        for (turn, mut unit) in (0..).zip(units) {
            match &mut unit {
                Unit::Row(row) => row.turn = turn,
                Unit::Change(change) => change.turn = turn,
            }
            match self.key_of(setup, &unit).and_then(|key| health.known(&key)) {
                None => left.push(unit),
                Some(known) => {
                    let fault = CallFault::new(known.cause, known.message);
                    self.failed(setup, unit, fault, true, out)?;
                }
            }
        }
        Ok(left)
    }

    /// A batch failed: what also fails alone, on a fresh instance, is to blame. If nothing does, the single results stand,
    /// and the batch was too large for one call: no time was wasted. Nor is the plugin put to rest before something has
    /// failed, which is remembered: each try comes further than the one before.
    fn singly(
        &mut self,
        setup: &Setup,
        mut batch: Vec<Unit>,
        fault: CallFault,
        out: &mut Vec<Unit>,
    ) -> Result<(), PluginError> {
        if fault.whole {
            let first = batch.first().map(Unit::index);
            self.waste(setup, &fault, fault.took);
            return Err(self.fail(setup, fault, first));
        }
        // Told by the guest itself, and all that matters where the pipeline stops: the rows before it were judged.
        if self.on_error == OnError::Stop
            && let Some(row) = fault.row.filter(|row| *row < batch.len())
        {
            self.waste(setup, &fault, fault.took);
            return self.failed(setup, batch.swap_remove(row), fault, false, out);
        }
        self.count_failure(setup, &fault);
        tracing::debug!(
            plugin = &*setup.plugin,
            cause = fault.cause.as_str(),
            units = batch.len(),
            "batch failed: {}",
            fault.message
        );
        if fault.costs_instance() {
            self.instances.forget(setup, self.space);
        }
        let mut took = fault.took;
        for unit in batch {
            let unit = [unit];
            let answer = self.call(setup, &unit).1;
            let [unit] = unit;
            match answer {
                Ok(answer) => self.take(setup, vec![unit], answer, out)?,
                Err(fault) if fault.whole => {
                    let index = unit.index();
                    self.waste(setup, &fault, fault.took);
                    return Err(self.fail(setup, fault, Some(index)));
                }
                Err(fault) => {
                    self.waste(setup, &fault, std::mem::take(&mut took) + fault.took);
                    self.failed(setup, unit, fault, false, out)?;
                    self.rests_all(setup)?;
                }
            }
        }
        Ok(())
    }

    /// One unit failed alone: what becomes of it, and of the pipeline.
    fn failed(
        &mut self,
        setup: &Setup,
        unit: Unit,
        fault: CallFault,
        known: bool,
        out: &mut Vec<Unit>,
    ) -> Result<(), PluginError> {
        let index = unit.index();
        if !known && self.counts {
            // What lies in the ring fits, wherever else it does not.
            if !fault.unplaced
                && let Some(key) = self.key_of(setup, &unit)
            {
                setup.module.health.remember(key, fault.cause, &fault.message);
            }
            if fault.costs_instance() {
                setup.module.health.lost_instance(self.set(setup), Instant::now());
            }
        }
        let filter = setup.module.kind.is_filter();
        let passed = match self.on_error {
            OnError::Pass if filter => true,
            OnError::Skip => false,
            OnError::Stop | OnError::Pass if known => {
                return Err(fault.of(&setup.plugin, Some(self.stage), Some(index)));
            }
            OnError::Stop | OnError::Pass => return Err(self.fail(setup, fault, Some(index))),
        };
        if !known {
            self.count_failure(setup, &fault);
            if fault.costs_instance() {
                self.instances.forget(setup, self.space);
            }
        }
        self.faults.push(UnitFault { index, stage: self.stage, cause: fault.cause, message: fault.message, passed });
        if passed {
            out.push(unit);
        }
        Ok(())
    }

    fn fail(&mut self, setup: &Setup, fault: CallFault, index: Option<usize>) -> PluginError {
        self.count_failure(setup, &fault);
        if fault.costs_instance() {
            self.instances.forget(setup, self.space);
        }
        fault.of(&setup.plugin, Some(self.stage), index)
    }

    fn count_failure(&self, setup: &Setup, fault: &CallFault) {
        self.shared.metrics.plugin_failures.inc();
        setup.meter.failed(fault.cause);
    }

    /// One call with as many units as the worker part takes; how many those were.
    fn call(&mut self, setup: &Setup, units: &[Unit]) -> (usize, Result<Answer, CallFault>) {
        // First the instance: configuring it goes through the worker part too.
        let (instance, handle) = match self.instances.get(setup, self.space) {
            Ok(found) => found,
            Err(fault) => return (units.len(), Err(fault)),
        };
        let part = &mut self.space.part;
        let mut place = Place { part_at: instance.part_at(), part, base: self.base, used: PART_ROWS_AT, row_bytes: 0 };
        let placed = match place.units(units) {
            Ok(placed) => placed,
            Err(fault) => return (1, Err(fault)),
        };
        let Place { used, row_bytes, .. } = place;
        self.shared.metrics.worker_part_bytes.inc_by(row_bytes as u64);
        let (part, batch) = (&self.space.part, Batch { setup, origin: self.origin, handle, rows: placed, used });
        let answer = match setup.module.kind {
            PluginKind::RowFilter | PluginKind::ChangeFilter => instance.filter(&batch, part).map(Answer::Kept),
            PluginKind::RowTransform => instance.transform(&batch, part).map(Answer::Images),
            PluginKind::ChangeTransform => {
                instance.expand(&batch, part).map(|(counts, made)| Answer::Expanded(counts, made))
            }
        };
        (placed, answer)
    }

    fn take(
        &mut self,
        setup: &Setup,
        batch: Vec<Unit>,
        answer: Answer,
        out: &mut Vec<Unit>,
    ) -> Result<(), PluginError> {
        match answer {
            Answer::Kept(kept) => {
                out.extend(batch.into_iter().enumerate().filter(|(i, _)| kept >> i & 1 == 1).map(|(_, unit)| unit));
            }
            Answer::Images(made) => {
                self.bound(setup, &batch, &made)?;
                let made = Rc::new(made);
                for (unit, image) in batch.into_iter().zip(0..) {
                    let Unit::Row(row) = unit else { continue };
                    out.push(Unit::Row(Row { source: Source::Made(Rc::clone(&made), image), ..row }));
                }
            }
            Answer::Expanded(counts, made) => {
                self.bound(setup, &batch, &made)?;
                let (made, mut next) = (Rc::new(made), 0);
                for (unit, count) in batch.into_iter().zip(counts) {
                    let images = next..next + count;
                    next = images.end;
                    let Unit::Change(change) = unit else { continue };
                    let (Change { index, turn, .. }, Some(op)) = (&*change, change.op()) else { continue };
                    out.extend(images.map(|image| {
                        let source = Source::Made(Rc::clone(&made), image);
                        Unit::Row(Row { index: *index, op, side: 0, turn: *turn, source })
                    }));
                }
            }
        }
        Ok(())
    }

    /// Holds the outputs of one run to their limit.
    fn bound(&mut self, setup: &Setup, batch: &[Unit], made: &Made) -> Result<(), PluginError> {
        self.answered += made.size();
        let most = self.shared.options.output_bytes * RUN_OUTPUTS;
        if self.answered <= most {
            return Ok(());
        }
        let message = format!("its output for one commit exceeds {most} bytes ({RUN_OUTPUTS} × plugins.output_bytes)");
        let index = batch.first().map(Unit::index);
        Err(self.fail(setup, CallFault::new(FaultCause::Output, message), index))
    }

    /// What tells this unit, under these parameters, from every other. `None`: damaged bytes, which nobody calls with.
    fn key_of(&self, setup: &Setup, unit: &Unit) -> Option<UnitKey> {
        let mut hash = Sha256::new();
        hash.update(setup.key);
        let mut add = |source: Option<&Source>| -> Option<()> {
            let bytes = match source {
                None => &[][..],
                Some(Source::Made(made, image)) => made.image(*image).0,
                Some(Source::Base(range, _)) => bytes_of(self.base, range),
                Some(Source::Ring(at)) => {
                    let shift = self.lease.as_ref()?.offset;
                    let at = ImageAt {
                        present: at.present - shift,
                        slots: at.slots - shift,
                        heap: at.heap - shift,
                        columns: at.columns,
                    };
                    &self.base[image_range(self.base, at).ok()?.0]
                }
            };
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
            Some(())
        };
        match unit {
            Unit::Row(row) => add(Some(&row.source))?,
            Unit::Change(change) => {
                add(change.old.as_ref())?;
                add(change.new.as_ref())?;
            }
        }
        Some(hash.finalize().into())
    }
}

/// Whether the parts of an image begin within a section of so many bytes.
fn inside(at: &ImageAt, len: u32) -> bool {
    at.present <= len && at.slots <= len && at.heap <= len
}

fn damaged(what: &str, index: usize, error: ImageError) -> PluginError {
    PluginError::Host(format!("{what} {index} is damaged: {error}"))
}

fn compared(kinds: &[Kind], old: &[u8], new: &[u8]) -> Result<Changed, ImageError> {
    let (old, ..) = ImageRef::parse(old)?;
    let (new, ..) = ImageRef::parse(new)?;
    Ok(Changed::Bytes(changed_columns(kinds, Some(old), Some(new)), kinds.len() as u16))
}

/// Puts a batch into the worker part: descriptors, and what is not in the ring, once.
struct Place<'a> {
    part: &'a mut WorkerPart,
    part_at: u32,
    base: &'a [u8],
    /// Bytes of the part in use, from its start.
    used: usize,
    row_bytes: usize,
}

impl Place<'_> {
    /// How many units have found their place. Stops where the part is full.
    fn units(&mut self, units: &[Unit]) -> Result<usize, CallFault> {
        for (i, unit) in units.iter().enumerate().take(MAX_BATCH) {
            let need = need(unit);
            if need > self.part.bytes() as usize - self.used {
                if i > 0 {
                    return Ok(i);
                }
                let most = self.part.bytes() as usize - PART_ROWS_AT;
                let message = format!(
                    "a row or change of {need} bytes does not fit the worker part ({most}; raise plugins.worker_bytes)"
                );
                return Err(CallFault::unplaced(message));
            }
            match unit {
                Unit::Row(row) => {
                    let descriptor = self.image(&row.source);
                    self.part.write(i * DESCRIPTOR_BYTES, &descriptor.to_bytes());
                }
                Unit::Change(change) => {
                    let descriptor = self.change(change);
                    self.part.write(i * CHANGE_DESCRIPTOR_BYTES, &descriptor.to_bytes());
                }
            }
        }
        Ok(units.len().min(MAX_BATCH))
    }

    fn image(&mut self, source: &Source) -> Descriptor {
        match source {
            Source::Ring(descriptor) => *descriptor,
            Source::Base(range, at) => Descriptor::new(*at, self.put(bytes_of(self.base, range))),
            Source::Made(made, image) => {
                let (bytes, at) = made.image(*image);
                Descriptor::new(at, self.put(bytes))
            }
        }
    }

    fn change(&mut self, change: &Change) -> ChangeDescriptor {
        let [old, new] = [&change.old, &change.new].map(|source| source.as_ref().map(|source| self.image(source)));
        let (op, changed, columns) = match (old, new) {
            (None, None) => (Op::Update, 0, 0),
            (Some(one), None) => (Op::Delete, one.present, one.columns),
            (None, Some(one)) => (Op::Insert, one.present, one.columns),
            (Some(_), Some(_)) => match &change.changed {
                Changed::Ring(at, columns) => (Op::Update, *at, u32::from(*columns)),
                Changed::Bytes(bytes, columns) => (Op::Update, self.put(bytes), u32::from(*columns)),
            },
        };
        let (old, new) = (old.unwrap_or_default(), new.unwrap_or_default());
        ChangeDescriptor { op: op as u32, changed, columns, old, new }
    }

    /// The offset of the bytes from the window's first one.
    fn put(&mut self, bytes: &[u8]) -> u32 {
        let at = self.used;
        self.part.write(at, bytes);
        self.used += bytes.len();
        self.row_bytes += bytes.len();
        self.part_at + at as u32
    }
}

/// Bytes that a unit takes in the worker part beside its descriptor.
fn need(unit: &Unit) -> usize {
    let image = |source: &Source| match source {
        Source::Ring(_) => 0,
        Source::Base(range, _) => range.len(),
        Source::Made(made, image) => made.image(*image).0.len(),
    };
    match unit {
        Unit::Row(row) => image(&row.source),
        Unit::Change(change) => {
            let changed = match &change.changed {
                Changed::Bytes(bytes, _) => bytes.len(),
                Changed::Ring(..) => 0,
            };
            [&change.old, &change.new].into_iter().flatten().map(image).sum::<usize>() + changed
        }
    }
}

fn bytes_of<'b>(base: &'b [u8], range: &Range<u32>) -> &'b [u8] {
    &base[range.start as usize..range.end as usize]
}

/// The whole image that has its parts at `at`, found from the length in front of its bitmap; and where they lie in it.
fn image_range(base: &[u8], at: ImageAt) -> Result<(Range<usize>, ImageAt), ImageError> {
    let bitmap = (at.columns as usize).div_ceil(8);
    let start = (at.present as usize).checked_sub(if bitmap < 0x80 { 1 } else { 2 }).ok_or(ImageError::Malformed)?;
    let (_, found, used) = ImageRef::parse(base.get(start..).ok_or(ImageError::Truncated)?)?;
    let shift = start as u32;
    let same = (found.present + shift, found.slots + shift, found.heap + shift) == (at.present, at.slots, at.heap);
    if same && found.columns == at.columns { Ok((start..start + used, found)) } else { Err(ImageError::Malformed) }
}
