//! CSV in: the header names the columns; nothing is NULL, `""` the empty text.

use std::sync::Arc;

use axum::body::Bytes;

use super::gather::{Gather, Said};
use super::{Decoder, Refused, check_size};
use crate::db::BulkRows;
use crate::http::csv::{Broken, Reader, Record};
use crate::http::error::Problem;
use crate::sql::OutputColumn;

pub struct Records {
    reader: Reader,
    body: Body,
    /// Of the byte order mark that some programs put in front.
    skipped: usize,
}

/// What the records mean.
struct Body {
    gather: Gather,
    /// For each cell of a record, the column; `None` until the header has come.
    header: Option<Vec<usize>>,
    row: Vec<Said>,
    /// The most bytes of a record.
    most: usize,
}

enum Stop {
    Broken(Broken),
    Refused(Refused),
}

impl From<Broken> for Stop {
    fn from(broken: Broken) -> Stop {
        Stop::Broken(broken)
    }
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

impl Records {
    pub fn new(columns: Arc<[OutputColumn]>, most: usize) -> Records {
        let row = vec![Said::Nothing; columns.len()];
        let body = Body { gather: Gather::new(columns), header: None, row, most };
        Records { reader: Reader::default(), body, skipped: 0 }
    }

    fn refused(&self, stop: Stop) -> Refused {
        match stop {
            Stop::Refused(refused) => refused,
            Stop::Broken(broken) => {
                let problem = Problem::new(400, "bad_csv", broken.as_str());
                Refused::at(problem, self.body.gather.next_row(), Some(self.reader.line()))
            }
        }
    }
}

impl Decoder for Records {
    fn push(&mut self, bytes: &Bytes, out: &mut Vec<BulkRows>) -> Result<(), Refused> {
        let mut bytes: &[u8] = bytes;
        while self.skipped < BYTE_ORDER_MARK.len() && bytes.first() == Some(&BYTE_ORDER_MARK[self.skipped]) {
            self.skipped += 1;
            bytes = &bytes[1..];
        }
        if !bytes.is_empty() {
            self.skipped = BYTE_ORDER_MARK.len();
        }
        let body = &mut self.body;
        let read = self.reader.push(bytes, |record| body.record(record, out).map_err(Stop::Refused));
        self.body.gather.flush(out)?;
        read.map_err(|stop| self.refused(stop))?;
        self.body.check_size(&self.reader.record())
    }

    fn finish(&mut self, out: &mut Vec<BulkRows>) -> Result<(), Refused> {
        let body = &mut self.body;
        let read = self.reader.finish(|record| body.record(record, out).map_err(Stop::Refused));
        self.body.gather.flush(out)?;
        read.map_err(|stop| self.refused(stop))?;
        if self.body.header.is_none() {
            return Err(Problem::new(400, "bad_csv", "the first line names the columns; there is none").into());
        }
        Ok(())
    }

    fn held(&self) -> usize {
        self.reader.held()
    }
}

impl Body {
    fn check_size(&self, record: &Record<'_>) -> Result<(), Refused> {
        let row = self.header.is_some().then(|| self.gather.next_row());
        check_size(record.size(), self.most).map_err(|problem| Refused { problem, row, line: Some(record.line) })
    }

    fn record(&mut self, record: Record<'_>, out: &mut Vec<BulkRows>) -> Result<(), Refused> {
        self.check_size(&record)?;
        let Some(header) = &self.header else {
            self.header = Some(self.names(&record)?);
            return Ok(());
        };
        // An empty line is a row only where a row is one cell.
        if record.is_blank() && header.len() != 1 {
            return Ok(());
        }
        let number = self.gather.next_row();
        let refuse = |problem| Refused::at(problem, number, Some(record.line));
        let cells = record.cells();
        if cells.len() != header.len() {
            let detail = format!("the row has {} cells, the header names {} columns", cells.len(), header.len());
            return Err(refuse(Problem::new(400, "column_count", detail)));
        }
        for (cell, column) in cells.zip(header) {
            self.row[*column] = match cell {
                None => Said::Null,
                Some(bytes) => match std::str::from_utf8(bytes) {
                    Ok(text) => Said::Text(text.to_owned()),
                    Err(_) => return Err(refuse(Problem::new(400, "bad_csv", "a cell is not UTF-8"))),
                },
            };
        }
        self.gather.add(&self.row, record.line, out)
    }

    fn names(&self, record: &Record<'_>) -> Result<Vec<usize>, Refused> {
        let refuse =
            |code, detail| Refused { problem: Problem::new(400, code, detail), row: None, line: Some(record.line) };
        let mut header = Vec::new();
        for cell in record.cells() {
            let name = std::str::from_utf8(cell.unwrap_or_default()).unwrap_or_default();
            let column = self.gather.column(name).ok_or_else(|| {
                let known: Vec<&str> = self.gather.columns().iter().map(|column| column.name.as_str()).collect();
                refuse(
                    "unknown_column",
                    format!("the table has no column {name:?} to fill; it has: {}", known.join(", ")),
                )
            })?;
            if header.contains(&column) {
                return Err(refuse("duplicate_column", format!("the header names column {name:?} twice")));
            }
            header.push(column);
        }
        Ok(header)
    }
}
