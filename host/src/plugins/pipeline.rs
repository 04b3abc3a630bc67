//! Stages in order: batches of rows, described in place where the ring has them, else put into the worker part once;
//! a failing batch is taken apart to find the row that fails alone.

use std::ops::Range;
use std::sync::Arc;

use wire::abi::{DESCRIPTOR_BYTES, Descriptor, MAX_BATCH};
use wire::image::ImageAt;
use wire::{ImageError, ImageRef};

use super::instance::{CallFault, Instances, Setup, Space};
use super::registry::Shared;
use super::window::{Lease, PART_ROWS_AT, WorkerPart};
use super::{FaultCause, PluginError};
use crate::catalog::PluginKind;

/// What all batches of one run may answer together, in outputs of one batch: a commit of many small rows cannot be
/// blown up without end.
const RUN_OUTPUTS: usize = 64;

/// One row on its way through the stages.
pub struct Row {
    /// Its place among the rows of the run.
    index: usize,
    source: Source,
}

enum Source {
    /// In the ring, from the window's first byte.
    Ring(Descriptor),
    /// Bytes of the run's base, and where the image's parts lie in them.
    Base(Range<usize>, ImageAt),
    /// Made by a transform.
    Made(Vec<u8>, ImageAt),
}

impl Row {
    pub fn index(&self) -> usize {
        self.index
    }

    /// The image, where a transform made one.
    pub fn into_made(self) -> Option<Vec<u8>> {
        match self.source {
            Source::Made(image, _) => Some(image),
            Source::Ring(_) | Source::Base(..) => None,
        }
    }
}

/// What one call told.
enum Answer {
    Kept(u64),
    Images(Vec<Vec<u8>>),
}

/// Runs the stages of one pipeline over the rows of one commit or piece.
pub struct Runner<'a> {
    pub shared: &'a Arc<Shared>,
    pub space: &'a mut Space,
    pub instances: &'a mut Instances,
    /// Bytes that input places count from.
    pub base: &'a [u8],
    /// Set while the ring holds those same bytes.
    pub lease: Option<Lease>,
    /// Bytes of output so far.
    pub answered: usize,
}

impl Runner<'_> {
    pub fn run(&mut self, stages: &[Arc<Setup>], places: &[ImageAt]) -> Result<Vec<Row>, PluginError> {
        let mut live = Vec::with_capacity(places.len());
        for (index, at) in places.iter().enumerate() {
            let source =
                self.source(*at).map_err(|error| PluginError::Host(format!("row {index} is damaged: {error}")))?;
            live.push(Row { index, source });
        }
        for setup in stages {
            live = self.stage(setup, live)?;
        }
        Ok(live)
    }

    fn source(&self, at: ImageAt) -> Result<Source, ImageError> {
        let Some(lease) = &self.lease else {
            let range = image_range(self.base, at)?;
            let (_, inner, _) = ImageRef::parse(&self.base[range.clone()])?;
            return Ok(Source::Base(range, inner));
        };
        let inside = [at.present, at.slots, at.heap].iter().all(|offset| *offset <= lease.len);
        if inside { Ok(Source::Ring(Descriptor::new(at, lease.offset))) } else { Err(ImageError::Truncated) }
    }

    fn stage(&mut self, setup: &Setup, rows: Vec<Row>) -> Result<Vec<Row>, PluginError> {
        let mut out = Vec::with_capacity(rows.len());
        let mut rest = rows.into_iter();
        let mut batch: Vec<Row> = rest.by_ref().take(MAX_BATCH).collect();
        while !batch.is_empty() {
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
        Ok(out)
    }

    /// A batch failed: the row that also fails alone, on a fresh instance, is the one. If none does, the rows' own
    /// results stand.
    fn singly(
        &mut self,
        setup: &Setup,
        batch: Vec<Row>,
        fault: CallFault,
        out: &mut Vec<Row>,
    ) -> Result<(), PluginError> {
        if fault.row.is_some() || fault.host {
            let index = fault.row.and_then(|row| batch.get(row)).map(Row::index);
            return Err(self.fail(setup, fault, index));
        }
        self.shared.metrics.plugin_failures.inc();
        tracing::debug!(
            plugin = &*setup.plugin,
            cause = fault.cause.as_str(),
            rows = batch.len(),
            "batch failed: {}",
            fault.message
        );
        self.instances.forget(setup, self.space.namespace);
        for row in batch {
            let row = vec![row];
            match self.call(setup, &row).1 {
                Ok(answer) => self.take(setup, row, answer, out)?,
                Err(fault) => {
                    let index = row.first().map(Row::index);
                    return Err(self.fail(setup, fault, index));
                }
            }
        }
        Ok(())
    }

    fn fail(&mut self, setup: &Setup, fault: CallFault, index: Option<usize>) -> PluginError {
        self.shared.metrics.plugin_failures.inc();
        // What a guest says through `fail` costs no instance.
        if fault.cause != FaultCause::Failed {
            self.instances.forget(setup, self.space.namespace);
        }
        fault.of(&setup.plugin, index)
    }

    /// One call with as many rows as the worker part takes; how many those were.
    fn call(&mut self, setup: &Setup, rows: &[Row]) -> (usize, Result<Answer, CallFault>) {
        // First the instance: configuring it goes through the worker part too.
        let instance = match self.instances.get(setup, self.space) {
            Ok((instance, _)) => instance,
            Err(fault) => return (rows.len(), Err(fault)),
        };
        let part = &mut self.space.part;
        let placed = match place(part, instance.part_at(), self.base, rows) {
            Ok(placed) => placed,
            Err(fault) => return (rows.len(), Err(fault)),
        };
        self.shared.metrics.worker_part_bytes.inc_by(placed.row_bytes as u64);
        let answer = match setup.module.kind {
            PluginKind::RowFilter => instance.filter(setup, placed.rows, part, placed.used).map(Answer::Kept),
            PluginKind::RowTransform => instance.transform(setup, placed.rows, part, placed.used).map(Answer::Images),
        };
        (placed.rows, answer)
    }

    fn take(&mut self, setup: &Setup, batch: Vec<Row>, answer: Answer, out: &mut Vec<Row>) -> Result<(), PluginError> {
        match answer {
            Answer::Kept(kept) => {
                out.extend(batch.into_iter().enumerate().filter(|(i, _)| kept >> i & 1 == 1).map(|(_, row)| row));
            }
            Answer::Images(images) => {
                self.answered += images.iter().map(Vec::len).sum::<usize>();
                let most = self.shared.options.output_bytes * RUN_OUTPUTS;
                if self.answered > most {
                    let message = format!(
                        "its output for one commit exceeds {most} bytes ({RUN_OUTPUTS} × plugins.output_bytes)"
                    );
                    let index = batch.first().map(Row::index);
                    return Err(self.fail(setup, CallFault::new(FaultCause::Output, message), index));
                }
                for (row, image) in batch.into_iter().zip(images) {
                    let (_, at, _) = ImageRef::parse(&image)
                        .map_err(|error| PluginError::Host(format!("an output was encoded wrongly: {error}")))?;
                    out.push(Row { index: row.index, source: Source::Made(image, at) });
                }
            }
        }
        Ok(())
    }
}

/// What of a batch lies ready in the worker part.
struct Placed {
    rows: usize,
    /// Bytes of the part in use, from its start.
    used: usize,
    row_bytes: usize,
}

/// Writes descriptors, and the rows that are not in the ring, once. Stops where the part is full.
fn place(part: &mut WorkerPart, part_at: u32, base: &[u8], rows: &[Row]) -> Result<Placed, CallFault> {
    let mut placed = Placed { rows: 0, used: PART_ROWS_AT, row_bytes: 0 };
    for (i, row) in rows.iter().enumerate().take(MAX_BATCH) {
        let (bytes, at) = match &row.source {
            Source::Ring(descriptor) => {
                part.write(i * DESCRIPTOR_BYTES, &descriptor.to_bytes());
                placed.rows += 1;
                continue;
            }
            Source::Base(range, at) => (&base[range.clone()], at),
            Source::Made(image, at) => (&image[..], at),
        };
        if bytes.len() > part.bytes() as usize - placed.used {
            if i > 0 {
                break;
            }
            let most = part.bytes() as usize - PART_ROWS_AT;
            let message = format!(
                "a row of {} bytes does not fit the worker part ({most}; raise plugins.worker_bytes)",
                bytes.len()
            );
            return Err(CallFault::at(FaultCause::Memory, Some(0), message));
        }
        part.write(placed.used, bytes);
        let descriptor = Descriptor::new(*at, part_at + placed.used as u32);
        part.write(i * DESCRIPTOR_BYTES, &descriptor.to_bytes());
        placed.rows += 1;
        placed.used += bytes.len();
        placed.row_bytes += bytes.len();
    }
    Ok(placed)
}

/// The whole image that has its parts at `at`, found from the length in front of its bitmap.
fn image_range(base: &[u8], at: ImageAt) -> Result<Range<usize>, ImageError> {
    let bitmap = usize::from(at.columns).div_ceil(8);
    let start = (at.present as usize).checked_sub(if bitmap < 0x80 { 1 } else { 2 }).ok_or(ImageError::Malformed)?;
    let (_, found, used) = ImageRef::parse(base.get(start..).ok_or(ImageError::Truncated)?)?;
    let shift = start as u32;
    let same = (found.present + shift, found.slots + shift, found.heap + shift) == (at.present, at.slots, at.heap);
    if same && found.columns == at.columns { Ok(start..start + used) } else { Err(ImageError::Malformed) }
}
