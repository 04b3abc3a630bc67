//! Arrow to JSON, the one way values leave over HTTP: query results, NDJSON and live events.
//!
//! What JSON numbers cannot hold becomes text: integers beyond ±2^53, DECIMAL, UUID, DATE, TIME, NaN and infinities.
//! TIMESTAMP is RFC 3339 in UTC with microseconds, BYTEA is base64, JSON columns are nested. No output holds a raw
//! line break, so a value never ends an SSE or NDJSON line.

pub(super) mod time;

use std::io::Write;

use arrow::array::{Array, ArrayRef, AsArray, FixedSizeBinaryArray, StructArray};
use arrow::datatypes::*;
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::de::IgnoredAny;
use serde_json::Value;

/// Field metadata that names the SQL type where the Arrow type leaves it open (JSON and TEXT are both strings).
const SQL_TYPE: &str = "tg.type";

/// Integers up to here are exact in every JSON reader.
const EXACT: u64 = 1 << 53;

/// An answer that is one JSON document.
pub struct Json(pub Value);

impl IntoResponse for Json {
    fn into_response(self) -> Response {
        let json = HeaderValue::from_static("application/json");
        ([(header::CONTENT_TYPE, json)], document(&self.0)).into_response()
    }
}

/// The bytes of a document. It ends its line, or the prompt of a shell would stick to it.
pub fn document(value: &Value) -> String {
    format!("{value}\n")
}

/// Writes one value of a column; made once per batch, so that nothing is decided per row.
type Cell<'a> = Box<dyn Fn(usize, &mut Vec<u8>) + 'a>;

/// The columns of one batch, ready to write rows.
pub struct Rows<'a> {
    /// `"name":`, escaped once.
    labels: Vec<Vec<u8>>,
    cells: Vec<Cell<'a>>,
}

impl<'a> Rows<'a> {
    pub fn new(batch: &'a RecordBatch) -> Result<Rows<'a>, ArrowError> {
        let schema = batch.schema_ref();
        let labels = schema.fields().iter().map(|field| label(field.name())).collect();
        let fields = schema.fields().iter().zip(batch.columns());
        let cells = fields.map(|(field, column)| cell(field, column)).collect::<Result<_, _>>()?;
        Ok(Rows { labels, cells })
    }

    pub fn columns(&self) -> usize {
        self.cells.len()
    }

    /// `"name":` of a column.
    pub fn label(&self, column: usize) -> &[u8] {
        &self.labels[column]
    }

    pub fn value(&self, column: usize, row: usize, out: &mut Vec<u8>) {
        (self.cells[column])(row, out);
    }

    /// `[1,"a"]`
    pub fn array(&self, row: usize, out: &mut Vec<u8>) {
        out.push(b'[');
        for (column, cell) in self.cells.iter().enumerate() {
            comma(column, out);
            cell(row, out);
        }
        out.push(b']');
    }

    /// `{"id":1,"name":"a"}`
    pub fn object(&self, row: usize, out: &mut Vec<u8>) {
        out.push(b'{');
        for (column, cell) in self.cells.iter().enumerate() {
            comma(column, out);
            out.extend_from_slice(&self.labels[column]);
            cell(row, out);
        }
        out.push(b'}');
    }
}

fn comma(index: usize, out: &mut Vec<u8>) {
    if index > 0 {
        out.push(b',');
    }
}

fn label(name: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len() + 3);
    text(name, &mut out);
    out.push(b':');
    out
}

/// A JSON string, quoted and escaped.
pub fn text(value: &str, out: &mut Vec<u8>) {
    serde_json::to_writer(out, value).expect("writing a string to memory cannot fail");
}

fn cell<'a>(field: &Field, column: &'a ArrayRef) -> Result<Cell<'a>, ArrowError> {
    let write = present(field, column)?;
    let column: &'a dyn Array = column.as_ref();
    if column.logical_null_count() == 0 {
        return Ok(write);
    }
    // Logical nulls: a dictionary or run-end array keeps them in its values, not in its own bitmap.
    let nulls = column.logical_nulls();
    Ok(Box::new(move |row, out| match &nulls {
        Some(nulls) if nulls.is_null(row) => out.extend_from_slice(b"null"),
        _ => write(row, out),
    }))
}

macro_rules! primitive {
    ($column:expr, $ty:ty, |$value:ident, $out:ident| $body:expr) => {{
        let array = $column.as_primitive::<$ty>();
        Ok(Box::new(move |row, $out: &mut Vec<u8>| {
            let $value = array.value(row);
            $body
        }))
    }};
}

/// The writer of a column's values that are not NULL.
fn present<'a>(field: &Field, column: &'a ArrayRef) -> Result<Cell<'a>, ArrowError> {
    match column.data_type() {
        DataType::Null => Ok(Box::new(|_, out| out.extend_from_slice(b"null"))),
        DataType::Boolean => {
            let array = column.as_boolean();
            Ok(Box::new(move |row, out| out.extend_from_slice(if array.value(row) { b"true" } else { b"false" })))
        }
        DataType::Int8 => primitive!(column, Int8Type, |v, out| signed(v.into(), out)),
        DataType::Int16 => primitive!(column, Int16Type, |v, out| signed(v.into(), out)),
        DataType::Int32 => primitive!(column, Int32Type, |v, out| signed(v.into(), out)),
        DataType::Int64 => primitive!(column, Int64Type, |v, out| signed(v, out)),
        DataType::UInt8 => primitive!(column, UInt8Type, |v, out| unsigned(v.into(), out)),
        DataType::UInt16 => primitive!(column, UInt16Type, |v, out| unsigned(v.into(), out)),
        DataType::UInt32 => primitive!(column, UInt32Type, |v, out| unsigned(v.into(), out)),
        DataType::UInt64 => primitive!(column, UInt64Type, |v, out| unsigned(v, out)),
        DataType::Float16 => primitive!(column, Float16Type, |v, out| float(v.to_f32(), v.to_f32().into(), out)),
        DataType::Float32 => primitive!(column, Float32Type, |v, out| float(v, v.into(), out)),
        DataType::Float64 => primitive!(column, Float64Type, |v, out| float(v, v, out)),
        DataType::Date32 => primitive!(column, Date32Type, |v, out| quoted(out, |out| time::date(v.into(), out))),
        DataType::Time32(_) | DataType::Time64(_) | DataType::Timestamp(..) => temporal(column),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => strings(field, column),
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => {
            binaries(field, column)
        }
        DataType::Dictionary(..) | DataType::RunEndEncoded(..) => encoded(field, column),
        _ => nested(column),
    }
}

fn signed(value: i64, out: &mut Vec<u8>) {
    let quote = value.unsigned_abs() > EXACT;
    number(quote, value, out);
}

fn unsigned(value: u64, out: &mut Vec<u8>) {
    number(value > EXACT, value, out);
}

fn number(quote: bool, value: impl std::fmt::Display, out: &mut Vec<u8>) {
    let written = if quote { write!(out, "\"{value}\"") } else { write!(out, "{value}") };
    written.expect("writing to memory cannot fail");
}

/// The shortest text that reads back as the same float; `wide` is the same value for the questions.
fn float(value: impl serde::Serialize, wide: f64, out: &mut Vec<u8>) {
    if wide.is_finite() {
        serde_json::to_writer(out, &value).expect("writing a float to memory cannot fail");
    } else if wide.is_nan() {
        out.extend_from_slice(b"\"NaN\"");
    } else {
        out.extend_from_slice(if wide > 0.0 { b"\"Infinity\"" } else { b"\"-Infinity\"" });
    }
}

fn quoted(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    out.push(b'"');
    write(out);
    out.push(b'"');
}

fn temporal<'a>(column: &'a ArrayRef) -> Result<Cell<'a>, ArrowError> {
    use TimeUnit::*;
    const NANOS: i64 = 1_000_000_000;
    match column.data_type() {
        DataType::Time32(Second) => {
            primitive!(column, Time32SecondType, |v, out| time::of_day(i64::from(v) * NANOS, out))
        }
        DataType::Time32(_) => {
            primitive!(column, Time32MillisecondType, |v, out| time::of_day(i64::from(v) * 1_000_000, out))
        }
        DataType::Time64(Microsecond) => {
            primitive!(column, Time64MicrosecondType, |v, out| time::of_day(v.saturating_mul(1_000), out))
        }
        DataType::Time64(_) => primitive!(column, Time64NanosecondType, |v, out| time::of_day(v, out)),
        DataType::Timestamp(Second, _) => primitive!(column, TimestampSecondType, |v, out| time::timestamp(v, 0, out)),
        DataType::Timestamp(Millisecond, _) => primitive!(column, TimestampMillisecondType, |v, out| {
            time::timestamp(v.div_euclid(1_000), v.rem_euclid(1_000) * 1_000_000, out)
        }),
        DataType::Timestamp(Microsecond, _) => primitive!(column, TimestampMicrosecondType, |v, out| {
            time::timestamp(v.div_euclid(1_000_000), v.rem_euclid(1_000_000) * 1_000, out)
        }),
        _ => primitive!(column, TimestampNanosecondType, |v, out| {
            time::timestamp(v.div_euclid(NANOS), v.rem_euclid(NANOS), out)
        }),
    }
}

fn is_sql_type(field: &Field, name: &str) -> bool {
    field.metadata().get(SQL_TYPE).is_some_and(|ty| ty.eq_ignore_ascii_case(name))
}

fn strings<'a>(field: &Field, column: &'a ArrayRef) -> Result<Cell<'a>, ArrowError> {
    let write: fn(&str, &mut Vec<u8>) = if is_sql_type(field, "json") { json_text } else { text };
    match column.data_type() {
        DataType::Utf8 => {
            let array = column.as_string::<i32>();
            Ok(Box::new(move |row, out| write(array.value(row), out)))
        }
        DataType::LargeUtf8 => {
            let array = column.as_string::<i64>();
            Ok(Box::new(move |row, out| write(array.value(row), out)))
        }
        _ => {
            let array = column.as_string_view();
            Ok(Box::new(move |row, out| write(array.value(row), out)))
        }
    }
}

/// A JSON value as it stands. Text that is not JSON (a computed column can claim the type) must not break the document
/// around it, so it becomes a string.
fn json_text(value: &str, out: &mut Vec<u8>) {
    if serde_json::from_str::<IgnoredAny>(value).is_err() {
        return text(value, out);
    }
    // Inside strings JSON has no raw line breaks; between tokens one is as good as a space.
    out.extend(value.bytes().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { byte }));
}

fn binaries<'a>(field: &Field, column: &'a ArrayRef) -> Result<Cell<'a>, ArrowError> {
    match column.data_type() {
        DataType::Binary => {
            let array = column.as_binary::<i32>();
            Ok(Box::new(move |row, out| base64(array.value(row), out)))
        }
        DataType::LargeBinary => {
            let array = column.as_binary::<i64>();
            Ok(Box::new(move |row, out| base64(array.value(row), out)))
        }
        DataType::BinaryView => {
            let array = column.as_binary_view();
            Ok(Box::new(move |row, out| base64(array.value(row), out)))
        }
        _ => {
            let array: &FixedSizeBinaryArray = column.as_fixed_size_binary();
            let uuid = is_sql_type(field, "uuid") && array.value_length() == 16;
            Ok(Box::new(move |row, out| match uuid::Uuid::from_slice(array.value(row)) {
                Ok(id) if uuid => number(true, id.hyphenated(), out),
                _ => base64(array.value(row), out),
            }))
        }
    }
}

fn base64(bytes: &[u8], out: &mut Vec<u8>) {
    quoted(out, |out| out.extend_from_slice(BASE64_STANDARD.encode(bytes).as_bytes()));
}

/// Dictionaries and runs: written as their values are.
fn encoded<'a>(field: &Field, column: &'a ArrayRef) -> Result<Cell<'a>, ArrowError> {
    if let Some(dictionary) = column.as_any_dictionary_opt() {
        if dictionary.values().is_empty() {
            // Every row is NULL, and the keys point nowhere.
            return Ok(Box::new(|_, out| out.extend_from_slice(b"null")));
        }
        let values = present(field, dictionary.values())?;
        let keys = dictionary.normalized_keys();
        return Ok(Box::new(move |row, out| values(keys[row], out)));
    }
    displayed(column)
}

fn nested<'a>(column: &'a ArrayRef) -> Result<Cell<'a>, ArrowError> {
    match column.data_type() {
        DataType::List(item) => {
            let array = column.as_list::<i32>();
            let offsets = array.value_offsets();
            list(item, array.values(), move |row| (offsets[row] as usize, offsets[row + 1] as usize))
        }
        DataType::LargeList(item) => {
            let array = column.as_list::<i64>();
            let offsets = array.value_offsets();
            list(item, array.values(), move |row| (offsets[row] as usize, offsets[row + 1] as usize))
        }
        DataType::FixedSizeList(item, size) => {
            let size = *size as usize;
            list(item, column.as_fixed_size_list().values(), move |row| (row * size, (row + 1) * size))
        }
        DataType::Struct(fields) => object(fields, column.as_struct()),
        DataType::Map(entry, _) => {
            let array = column.as_map();
            let offsets = array.value_offsets();
            let entries = array.entries();
            let DataType::Struct(fields) = entry.data_type() else { return displayed(column) };
            let entry = object(fields, entries)?;
            Ok(Box::new(move |row, out| elements(&entry, (offsets[row] as usize, offsets[row + 1] as usize), out)))
        }
        // DECIMAL has Arrow's exact text; intervals and durations have no JSON form of their own.
        _ => displayed(column),
    }
}

fn list<'a>(
    item: &Field,
    values: &'a ArrayRef,
    range: impl Fn(usize) -> (usize, usize) + 'a,
) -> Result<Cell<'a>, ArrowError> {
    let item = cell(item, values)?;
    Ok(Box::new(move |row, out| elements(&item, range(row), out)))
}

fn elements(item: &Cell<'_>, (start, end): (usize, usize), out: &mut Vec<u8>) {
    out.push(b'[');
    for index in start..end {
        comma(index - start, out);
        item(index, out);
    }
    out.push(b']');
}

fn object<'a>(fields: &Fields, array: &'a StructArray) -> Result<Cell<'a>, ArrowError> {
    let columns = fields.iter().zip(array.columns());
    let cells = columns.map(|(field, column)| cell(field, column)).collect::<Result<Vec<_>, _>>()?;
    let labels: Vec<Vec<u8>> = fields.iter().map(|field| label(field.name())).collect();
    Ok(Box::new(move |row, out| {
        out.push(b'{');
        for (index, (label, cell)) in labels.iter().zip(&cells).enumerate() {
            comma(index, out);
            out.extend_from_slice(label);
            cell(row, out);
        }
        out.push(b'}');
    }))
}

/// As Arrow prints it, as a string.
fn displayed<'a>(column: &'a ArrayRef) -> Result<Cell<'a>, ArrowError> {
    const OPTIONS: FormatOptions<'static> = FormatOptions::new();
    let formatter = ArrayFormatter::try_new(column.as_ref(), &OPTIONS)?;
    Ok(Box::new(move |row, out| text(&formatter.value(row).to_string(), out)))
}

#[cfg(test)]
mod tests;
