//! An Arrow IPC stream in: its columns are named as the table's, their types are what assignment takes.

use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow::buffer::Buffer;
use arrow::datatypes::DataType;
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use arrow_ipc::reader::StreamDecoder;
use axum::body::Bytes;

use super::{Decoder, Refused};
use crate::db::BulkRows;
use crate::http::error::Problem;

/// The most that one message may have: it is decoded whole.
const MOST_MESSAGE: usize = 32 << 20;
/// The most rows of one batch: columns of NULLs take no bytes, so their number is bounded by itself.
const MOST_ROWS: usize = 1 << 20;
/// Rows are handed on in pieces of this many, so that a large batch does not become one commit.
const PIECE_ROWS: usize = 1_024;

#[derive(Default)]
pub struct Messages {
    decoder: StreamDecoder,
    /// Bytes since the last whole batch, an upper bound of what the decoder keeps.
    held: usize,
    rows: u64,
    checked: bool,
}

impl Messages {
    fn refuse(&self, detail: impl std::fmt::Display) -> Refused {
        let problem = Problem::new(400, "bad_arrow", format!("the Arrow stream cannot be read: {detail}"));
        Refused::at(problem, self.rows + 1, None)
    }

    /// The decoder trusts the offsets in a message and panics on some that lie: that is the sender's fault, not ours.
    fn guarded<T>(&self, result: std::thread::Result<Result<T, ArrowError>>) -> Result<T, Refused> {
        match result {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => Err(self.refuse(error)),
            Err(_) => Err(self.refuse("a message is damaged")),
        }
    }

    fn check_schema(&mut self) -> Result<(), Refused> {
        let Some(schema) = self.decoder.schema().filter(|_| !self.checked) else { return Ok(()) };
        self.checked = true;
        if schema.fields().is_empty() {
            return Err(self.refuse("it has no columns"));
        }
        // Dictionaries would be kept for as long as the stream lasts.
        match schema.fields().iter().find(|field| matches!(field.data_type(), DataType::Dictionary(..))) {
            Some(field) => {
                let detail =
                    format!("column {:?} is dictionary-encoded, which is not supported: send it plain", field.name());
                Err(Problem::new(400, "unsupported", detail).into())
            }
            None => Ok(()),
        }
    }

    fn take(&mut self, batch: &RecordBatch, out: &mut Vec<BulkRows>) -> Result<(), Refused> {
        let rows = batch.num_rows();
        if rows > MOST_ROWS {
            return Err(self.refuse(format!("a batch has {rows} rows, more than {MOST_ROWS}")));
        }
        let bytes = self.held / rows.max(1);
        for start in (0..rows).step_by(PIECE_ROWS) {
            let piece = batch.slice(start, PIECE_ROWS.min(rows - start));
            let bytes = bytes * piece.num_rows();
            out.push(BulkRows { batch: piece, lines: Vec::new(), bytes });
        }
        self.rows += rows as u64;
        Ok(())
    }
}

impl Decoder for Messages {
    fn push(&mut self, bytes: &Bytes, out: &mut Vec<BulkRows>) -> Result<(), Refused> {
        let mut buffer = Buffer::from(bytes.clone());
        self.held += bytes.len();
        while !buffer.is_empty() {
            let decoded = catch_unwind(AssertUnwindSafe(|| self.decoder.decode(&mut buffer)));
            let batch = self.guarded(decoded)?;
            self.check_schema()?;
            let unread = buffer.len();
            if self.held - unread > MOST_MESSAGE {
                let detail = format!("an Arrow message has more than {MOST_MESSAGE} bytes: send smaller batches");
                return Err(Refused::at(Problem::new(413, "row_too_large", detail), self.rows + 1, None));
            }
            if let Some(batch) = batch {
                self.take(&batch, out)?;
                self.held = unread;
            }
        }
        Ok(())
    }

    fn finish(&mut self, _out: &mut Vec<BulkRows>) -> Result<(), Refused> {
        let ended = self.decoder.finish();
        self.guarded(Ok(ended))?;
        if self.decoder.schema().is_none() {
            return Err(self.refuse("there is none"));
        }
        Ok(())
    }

    fn held(&self) -> usize {
        self.held
    }
}
