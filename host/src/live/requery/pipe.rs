//! An answer on its way through its group's pipeline, a piece at a time: between two pieces the worker does what else
//! there is to do, as it does between the pieces of a snapshot.
//!
//! The keys were found before, on the query's own rows. A row keeps its key whatever the pipeline makes of it, so two
//! piped answers are compared by key like any others.

use arrow::array::BooleanArray;
use arrow::compute::{concat_batches, filter_record_batch};
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;

use super::{Answer, Rerun};
use crate::live::evaluate::{Fault, keep, parse_all};
use crate::live::job::PIECE_ROWS;
use crate::live::{Batch, GroupSpec, LiveOptions, Pass, Piped, Pipelines, ProgramError};

pub(in crate::live) struct Piping {
    answer: Answer,
    /// Whether each row is left, as far as the rows have gone through.
    kept: Vec<bool>,
    /// What a transform made of those that are.
    made: Vec<RecordBatch>,
    bytes: usize,
}

pub(in crate::live) enum Progress {
    More(Piping),
    Done(Answer),
}

impl Piping {
    pub(in crate::live) fn new(answer: Answer) -> Self {
        Piping { kept: Vec::with_capacity(answer.rows.num_rows()), answer, made: Vec::new(), bytes: 0 }
    }

    pub(in crate::live) fn step(
        mut self,
        spec: &GroupSpec,
        pipelines: &mut dyn Pipelines,
        pipeline: u64,
        options: &LiveOptions,
    ) -> Result<Progress, Fault> {
        let (from, all) = (self.kept.len(), self.answer.rows.num_rows());
        if from < all {
            let Some(Rerun { runner, .. }) = &spec.requery else {
                return Err(ProgramError("a result of a query that is not run again".to_owned()).into());
            };
            let some = from..all.min(from + PIECE_ROWS);
            let images = runner.images(&self.answer.rows, some, options.chunk_bytes)?;
            // No commit: the ring has rows of tables, not of results.
            let batch = Batch { seq: self.answer.seq, pass: Pass::Snapshot, base: &images.base };
            let piped = pipelines.run(pipeline, batch, &images.places)?;
            self.take(spec, images.places.len(), piped, options.requery_bytes)?;
        }
        if self.kept.len() < all {
            return Ok(Progress::More(self));
        }
        Ok(Progress::Done(self.finish(spec)?))
    }

    /// What came out of a piece of so many rows.
    fn take(&mut self, spec: &GroupSpec, rows: usize, piped: Piped, limit: usize) -> Result<(), Fault> {
        let (kept, made) = keep(spec, (0..rows).collect(), piped)?;
        let start = self.kept.len();
        self.kept.resize(start + rows, false);
        for row in &kept {
            self.kept[start + row] = true;
        }
        let Some((schema, images)) = made else { return Ok(()) };
        let made = spec.program.batch(schema, &parse_all(&images)?)?;
        if made.num_rows() != kept.len() {
            return Err(ProgramError("the transform's rows could not all be read".to_owned()).into());
        }
        self.bytes += made.get_array_memory_size();
        if self.bytes > limit {
            let message = format!(
                "what the pipeline makes of this live query's result is larger than {limit} bytes, and it is held in \
                 memory; narrow the query, or raise live.requery_bytes"
            );
            return Err(ProgramError(message).into());
        }
        self.made.push(made);
        Ok(())
    }

    fn finish(self, spec: &GroupSpec) -> Result<Answer, ProgramError> {
        let failed = |error: ArrowError| ProgramError(format!("a piped result cannot be put together: {error}"));
        let kept = BooleanArray::from(self.kept);
        let Answer { seq, rows, keys } = self.answer;
        let keys = filter_record_batch(&keys, &kept).map_err(failed)?;
        let rows = match &spec.output {
            None => filter_record_batch(&rows, &kept).map_err(failed)?,
            Some(schema) => {
                // Its columns, also where no row is left.
                let none = spec.program.batch(schema, &[])?;
                concat_batches(&none.schema(), &self.made).map_err(failed)?
            }
        };
        Ok(Answer { seq, rows, keys })
    }
}
