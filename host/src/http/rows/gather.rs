//! Cells that come as text, gathered into batches: a batch names the columns that all of its rows name.

use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryBuilder, StringBuilder};
use arrow::datatypes::{DataType, Field, Schema};
use arrow::record_batch::{RecordBatch, RecordBatchOptions};
use wire::Type;

use super::Refused;
use crate::db::BulkRows;
use crate::http::error::Problem;
use crate::sql::OutputColumn;
use crate::sql::arrow::bytes_of;

/// Rows and bytes of a batch: enough to be cheap by the row, little enough to wait for the rest of a commit.
const BATCH_ROWS: usize = 1_024;
const BATCH_BYTES: usize = 256 << 10;

/// What a row says of a column.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Said {
    /// Nothing: the column's default.
    #[default]
    Nothing,
    Null,
    Text(String),
}

pub struct Gather {
    columns: Arc<[OutputColumn]>,
    /// The columns that the rows of the present batch name.
    named: Vec<bool>,
    cells: Vec<Cells>,
    lines: Vec<u64>,
    bytes: usize,
    /// Rows of all batches before.
    rows: u64,
}

enum Cells {
    Text(StringBuilder),
    Bytes(BinaryBuilder),
}

impl Gather {
    pub fn new(columns: Arc<[OutputColumn]>) -> Gather {
        let cells = columns.iter().map(|column| match column.ty {
            Type::Bytea => Cells::Bytes(BinaryBuilder::new()),
            _ => Cells::Text(StringBuilder::new()),
        });
        let cells = cells.collect();
        Gather { named: vec![false; columns.len()], cells, columns, lines: Vec::new(), bytes: 0, rows: 0 }
    }

    /// The column of this name.
    pub fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }

    pub fn columns(&self) -> &[OutputColumn] {
        &self.columns
    }

    /// The number of the next row, from 1.
    pub fn next_row(&self) -> u64 {
        self.rows + self.lines.len() as u64 + 1
    }

    /// Takes a row, one entry a column.
    pub fn add(&mut self, row: &[Said], line: u64, out: &mut Vec<BulkRows>) -> Result<(), Refused> {
        let same = row.iter().zip(&self.named).all(|(said, named)| (*said != Said::Nothing) == *named);
        if !same || self.lines.len() >= BATCH_ROWS || self.bytes >= BATCH_BYTES {
            self.flush(out)?;
            self.named = row.iter().map(|said| *said != Said::Nothing).collect();
        }
        let number = self.next_row();
        // Before anything is appended: a refused row leaves no half of it.
        let mut decoded = Vec::new();
        for (said, column) in row.iter().zip(self.columns.iter()).filter(|(_, column)| column.ty == Type::Bytea) {
            let Said::Text(text) = said else { continue };
            decoded.push(bytes_of(text).ok_or_else(|| {
                let detail = format!("column {:?} is BYTEA: its text is base64, or \\x and hexadecimal", column.name);
                Refused::at(Problem::new(400, "invalid_value", detail), number, Some(line))
            })?);
        }
        let mut decoded = decoded.into_iter();
        for (said, cells) in row.iter().zip(&mut self.cells) {
            match (said, cells) {
                (Said::Nothing, _) => {}
                (Said::Null, Cells::Text(cells)) => cells.append_null(),
                (Said::Null, Cells::Bytes(cells)) => cells.append_null(),
                (Said::Text(text), Cells::Text(cells)) => {
                    self.bytes += text.len();
                    cells.append_value(text);
                }
                (Said::Text(_), Cells::Bytes(cells)) => {
                    let bytes = decoded.next().unwrap_or_default();
                    self.bytes += bytes.len();
                    cells.append_value(bytes);
                }
            }
        }
        self.lines.push(line);
        Ok(())
    }

    /// Hands out what there is.
    pub fn flush(&mut self, out: &mut Vec<BulkRows>) -> Result<(), Refused> {
        let rows = self.lines.len();
        if rows == 0 {
            return Ok(());
        }
        let (mut fields, mut arrays) = (Vec::new(), Vec::<ArrayRef>::new());
        for ((column, cells), _) in
            self.columns.iter().zip(&mut self.cells).zip(&self.named).filter(|(_, named)| **named)
        {
            let ty = if column.ty == Type::Bytea { DataType::Binary } else { DataType::Utf8 };
            fields.push(Field::new(&column.name, ty, true));
            arrays.push(match cells {
                Cells::Text(cells) => Arc::new(cells.finish()),
                Cells::Bytes(cells) => Arc::new(cells.finish()),
            });
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        let batch = RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), arrays, &options);
        let batch = batch.map_err(|error| {
            tracing::error!(%error, "gathered rows make no batch");
            Problem::internal("the rows could not be gathered")
        })?;
        out.push(BulkRows { batch, lines: std::mem::take(&mut self.lines), bytes: std::mem::take(&mut self.bytes) });
        self.rows += rows as u64;
        Ok(())
    }
}
