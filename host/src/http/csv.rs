//! The dialect of CSV that goes out with results and comes in with bulk inserts: RFC 4180 with `\n` at the end of a
//! line, a header line, and NULL told from the empty text: NULL is nothing at all, the empty text is `""`.
//!
//! Values read as in JSON, without its quotes: exact integers, RFC 3339 instants, base64 for BYTEA.

use arrow::array::{Array, AsArray, StringArray};
use arrow::datatypes::DataType;
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;

use super::json::Rows;
use crate::sql::OutputColumn;

/// The header line.
pub fn header<'a>(columns: impl IntoIterator<Item = &'a OutputColumn>, out: &mut Vec<u8>) {
    for (index, column) in columns.into_iter().enumerate() {
        comma(index, out);
        text(&column.name, out);
    }
    out.push(b'\n');
}

/// The columns of one batch of SQL types, ready to write rows.
pub struct Lines<'a> {
    /// What is no text is written as JSON has it.
    rows: Rows<'a>,
    batch: &'a RecordBatch,
    texts: Vec<Option<&'a StringArray>>,
    /// Of one cell, to take its quotes off.
    cell: Vec<u8>,
}

impl<'a> Lines<'a> {
    pub fn new(batch: &'a RecordBatch) -> Result<Lines<'a>, ArrowError> {
        let texts = batch.columns().iter();
        let texts = texts.map(|column| (*column.data_type() == DataType::Utf8).then(|| column.as_string::<i32>()));
        Ok(Lines { rows: Rows::new(batch)?, batch, texts: texts.collect(), cell: Vec::new() })
    }

    pub fn row(&mut self, row: usize, out: &mut Vec<u8>) {
        for column in 0..self.texts.len() {
            comma(column, out);
            if self.batch.column(column).is_null(row) {
                continue;
            }
            match self.texts[column] {
                Some(texts) => text(texts.value(row), out),
                None => {
                    self.cell.clear();
                    self.rows.value(column, row, &mut self.cell);
                    let bare = self.cell.strip_prefix(b"\"").and_then(|cell| cell.strip_suffix(b"\""));
                    // No bytes at all are not NULL.
                    out.extend_from_slice(
                        bare.map_or(self.cell.as_slice(), |bare| if bare.is_empty() { b"\"\"" } else { bare }),
                    );
                }
            }
        }
        out.push(b'\n');
    }
}

fn comma(index: usize, out: &mut Vec<u8>) {
    if index > 0 {
        out.push(b',');
    }
}

fn text(value: &str, out: &mut Vec<u8>) {
    let special = |byte: u8| matches!(byte, b',' | b'"' | b'\n' | b'\r');
    if !value.is_empty() && !value.bytes().any(special) {
        return out.extend_from_slice(value.as_bytes());
    }
    out.push(b'"');
    for byte in value.bytes() {
        if byte == b'"' {
            out.push(b'"');
        }
        out.push(byte);
    }
    out.push(b'"');
}

/// Why a document is no CSV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// Something stands between a closing quote and the next comma.
    AfterQuote,
    /// A quote inside an unquoted cell.
    Quote,
    /// The document ends inside quotes.
    OpenQuote,
}

impl Broken {
    pub fn as_str(self) -> &'static str {
        match self {
            Broken::AfterQuote => "after a closing quote comes a comma or the end of the line",
            Broken::Quote => "a quote inside a cell: put the cell in quotes and double the quotes in it",
            Broken::OpenQuote => "the document ends inside quotes",
        }
    }
}

/// Splits bytes that come in pieces into records of cells.
#[derive(Default)]
pub struct Reader {
    state: State,
    /// The record being read: all its cells, one after the other, and where each ends.
    bytes: Vec<u8>,
    cells: Vec<Cell>,
    /// Of the cell being read.
    quoted: bool,
    /// Line breaks passed, also inside quotes.
    line_breaks: u64,
    /// Where the record being read began.
    started: u64,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum State {
    #[default]
    CellStart,
    Bare,
    Quoted,
    /// A quote inside quotes: the end of the cell, or half of a doubled one.
    QuoteInQuoted,
    /// `\r` outside of quotes: part of the line end that must follow.
    CarriageReturn,
}

#[derive(Clone, Copy)]
struct Cell {
    end: usize,
    quoted: bool,
}

/// A whole record, borrowed from the reader until the next call.
pub struct Record<'a> {
    bytes: &'a [u8],
    cells: &'a [Cell],
    /// From 1.
    pub line: u64,
}

impl<'a> Record<'a> {
    /// The cells in order; `None` is NULL.
    pub fn cells(&self) -> impl ExactSizeIterator<Item = Option<&'a [u8]>> {
        let (bytes, cells) = (self.bytes, self.cells);
        (0..cells.len()).map(move |at| {
            let start = if at == 0 { 0 } else { cells[at - 1].end };
            let cell = &bytes[start..cells[at].end];
            (cells[at].quoted || !cell.is_empty()).then_some(cell)
        })
    }

    /// Bytes of the cells and of what stands between them.
    pub fn size(&self) -> usize {
        self.bytes.len() + self.cells.len()
    }

    pub fn is_blank(&self) -> bool {
        self.bytes.is_empty() && matches!(self.cells, [Cell { quoted: false, .. }])
    }
}

impl Reader {
    /// Bytes of the unfinished record.
    pub fn held(&self) -> usize {
        self.bytes.len() + self.cells.len() * size_of::<Cell>()
    }

    /// The line that is being read, from 1.
    pub fn line(&self) -> u64 {
        self.line_breaks + 1
    }

    /// Calls `each` for every record that ends in `input`.
    pub fn push<E: From<Broken>>(
        &mut self,
        input: &[u8],
        mut each: impl FnMut(Record<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        for &byte in input {
            if self.take(byte)? {
                each(self.record())?;
                self.next_record();
            }
        }
        Ok(())
    }

    /// The last record, where the document does not end in a line break.
    pub fn finish<E: From<Broken>>(&mut self, mut each: impl FnMut(Record<'_>) -> Result<(), E>) -> Result<(), E> {
        match self.state {
            State::Quoted => return Err(Broken::OpenQuote.into()),
            State::CellStart if self.cells.is_empty() => return Ok(()),
            _ => self.end_cell(),
        }
        each(self.record())?;
        self.next_record();
        Ok(())
    }

    /// Whether the record ends here.
    fn take(&mut self, byte: u8) -> Result<bool, Broken> {
        let line_break = byte == b'\n';
        if line_break {
            self.line_breaks += 1;
        }
        match (self.state, byte) {
            (State::Quoted, b'"') => self.state = State::QuoteInQuoted,
            (State::Quoted, _) => self.bytes.push(byte),
            (State::CellStart, b'"') => (self.state, self.quoted) = (State::Quoted, true),
            (State::QuoteInQuoted, b'"') => {
                self.state = State::Quoted;
                self.bytes.push(byte);
            }
            (_, b'\n') => {
                self.end_cell();
                return Ok(true);
            }
            // A lone `\r` is content of a bare cell.
            (State::CarriageReturn, _) if self.quoted => return Err(Broken::AfterQuote),
            (State::CarriageReturn, _) => {
                self.bytes.push(b'\r');
                self.state = State::Bare;
                return self.take(byte);
            }
            (State::QuoteInQuoted, b'\r') | (State::CellStart | State::Bare, b'\r') => {
                self.state = State::CarriageReturn;
            }
            (_, b',') => self.end_cell(),
            (State::QuoteInQuoted, _) => return Err(Broken::AfterQuote),
            (State::Bare, b'"') => return Err(Broken::Quote),
            (State::CellStart | State::Bare, _) => {
                self.state = State::Bare;
                self.bytes.push(byte);
            }
        }
        Ok(false)
    }

    fn end_cell(&mut self) {
        self.cells.push(Cell { end: self.bytes.len(), quoted: self.quoted });
        (self.state, self.quoted) = (State::CellStart, false);
    }

    /// What there is of the present record.
    pub fn record(&self) -> Record<'_> {
        Record { bytes: &self.bytes, cells: &self.cells, line: self.started + 1 }
    }

    fn next_record(&mut self) {
        self.bytes.clear();
        self.cells.clear();
        self.started = self.line_breaks;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Records as `a|b` with `~` for NULL, and the lines they start at; whatever the pieces are.
    fn read(text: &str, piece: usize) -> Result<Vec<(u64, String)>, Broken> {
        let mut reader = Reader::default();
        let mut records = Vec::new();
        let mut keep = |record: Record<'_>| {
            let cells = record.cells().map(|cell| cell.map_or("~", |cell| std::str::from_utf8(cell).unwrap()));
            records.push((record.line, cells.collect::<Vec<_>>().join("|")));
            Ok::<(), Broken>(())
        };
        for piece in text.as_bytes().chunks(piece) {
            reader.push(piece, &mut keep)?;
        }
        reader.finish(&mut keep)?;
        Ok(records)
    }

    #[test]
    fn records_cells_and_nulls() {
        let cases: &[(&str, &[(u64, &str)])] = &[
            ("a,b\n1,2\n", &[(1, "a|b"), (2, "1|2")]),
            ("a,b\r\n1,2", &[(1, "a|b"), (2, "1|2")]),
            (",\"\"\n", &[(1, "~|")]),
            ("\"a\n\"\"b\"\"\",c\nd,", &[(1, "a\n\"b\"|c"), (3, "d|~")]),
            ("\"a\"\r\nb\rc\r\n", &[(1, "a"), (2, "b\rc")]),
            ("a\n\nb\n", &[(1, "a"), (2, "~"), (3, "b")]),
            ("", &[]),
            ("\n", &[(1, "~")]),
        ];
        for (text, expected) in cases {
            let expected: Vec<(u64, String)> = expected.iter().map(|(at, cells)| (*at, (*cells).to_owned())).collect();
            for piece in [1, 2, 3, 1000] {
                assert_eq!(read(text, piece).as_ref(), Ok(&expected), "{text:?}");
            }
        }
        assert_eq!(read("a\"b\n", 10), Err(Broken::Quote));
        assert_eq!(read("\"a\"b\n", 10), Err(Broken::AfterQuote));
        assert_eq!(read("\"a\nb", 10), Err(Broken::OpenQuote));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            rows in proptest::collection::vec(proptest::collection::vec("[a,\"\n\r é]{0,4}", 2), 1..5),
            piece in 1usize..20,
        ) {
            let mut out = Vec::new();
            for row in &rows {
                for (index, cell) in row.iter().enumerate() {
                    comma(index, &mut out);
                    text(cell, &mut out);
                }
                out.push(b'\n');
            }
            let expected: Vec<String> = rows.iter().map(|row| row.join("|")).collect();
            let found = read(&String::from_utf8(out).unwrap(), piece).unwrap();
            prop_assert_eq!(found.into_iter().map(|(_, row)| row).collect::<Vec<_>>(), expected);
        }
    }
}
