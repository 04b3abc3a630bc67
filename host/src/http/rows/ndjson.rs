//! NDJSON in: a line is an object, a member is a column; a column without a member gets its default.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use axum::body::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use wire::Type;

use super::gather::{Gather, Said};
use super::{Decoder, Refused, check_size};
use crate::db::BulkRows;
use crate::http::error::Problem;
use crate::http::request::{JSON_DEPTH, json_words, too_deep};
use crate::sql::OutputColumn;

pub struct Lines {
    gather: Gather,
    row: Vec<Said>,
    /// The beginning of a line whose end has not come yet.
    partial: Vec<u8>,
    line: u64,
    /// The most bytes of a line.
    most: usize,
}

/// The members of an object in their order, also those named twice.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object, its members named as columns")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(Name(name)) = map.next_key()? {
                    members.push((name, map.next_value()?));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// Borrowed where it has no escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl Lines {
    pub fn new(columns: Arc<[OutputColumn]>, most: usize) -> Lines {
        let row = vec![Said::Nothing; columns.len()];
        Lines { gather: Gather::new(columns), row, partial: Vec::new(), line: 0, most }
    }

    fn line(&mut self, text: &[u8], out: &mut Vec<BulkRows>) -> Result<(), Refused> {
        self.line += 1;
        if text.iter().all(u8::is_ascii_whitespace) {
            return Ok(());
        }
        let (line, number) = (self.line, self.gather.next_row());
        let read = check_size(text.len(), self.most).and_then(|()| self.read(text));
        read.map_err(|problem| Refused::at(problem, number, Some(line)))?;
        self.gather.add(&self.row, line, out)
    }

    fn read(&mut self, text: &[u8]) -> Result<(), Problem> {
        let bad = |detail: String| Problem::new(400, "bad_json", detail);
        let text = std::str::from_utf8(text).map_err(|_| bad("the line is not UTF-8".to_owned()))?;
        if too_deep(text).is_some() {
            return Err(bad(format!("the line is nested deeper than {JSON_DEPTH}")));
        }
        let Members(members) = serde_json::from_str(text)
            .map_err(|error| bad(format!("a line is one row as JSON: {}", json_words(&error.to_string()))))?;
        self.row.fill(Said::Nothing);
        for (name, value) in members {
            let Some(at) = self.gather.column(&name) else {
                let known: Vec<&str> = self.gather.columns().iter().map(|column| column.name.as_str()).collect();
                let detail = format!("the table has no column {name:?} to fill; it has: {}", known.join(", "));
                return Err(Problem::new(400, "unknown_column", detail));
            };
            if self.row[at] != Said::Nothing {
                let detail = format!("the row names column {name:?} twice");
                return Err(Problem::new(400, "duplicate_column", detail));
            }
            self.row[at] = said(&self.gather.columns()[at], value.get())?;
        }
        Ok(())
    }
}

/// A value as the text that assignment takes for the column's type.
fn said(column: &OutputColumn, value: &str) -> Result<Said, Problem> {
    let value = value.trim();
    Ok(match value.as_bytes().first() {
        Some(b'n') => Said::Null,
        _ if column.ty == Type::Json => Said::Text(value.to_owned()),
        Some(b'"') => Said::Text(
            serde_json::from_str(value)
                .map_err(|error| Problem::new(400, "bad_json", format!("column {:?}: {error}", column.name)))?,
        ),
        Some(b'{' | b'[') => {
            let detail = format!("column {:?} is {}, and the value is an object or array", column.name, column.ty);
            return Err(Problem::new(400, "type_mismatch", detail));
        }
        // Numbers keep all their digits, true and false are spelled as SQL spells them.
        _ => Said::Text(value.to_owned()),
    })
}

impl Decoder for Lines {
    fn push(&mut self, bytes: &Bytes, out: &mut Vec<BulkRows>) -> Result<(), Refused> {
        let mut rest: &[u8] = bytes;
        let mut outcome = Ok(());
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (line, after) = (&rest[..end], &rest[end + 1..]);
            outcome = if self.partial.is_empty() {
                self.line(line, out)
            } else {
                let mut whole = std::mem::take(&mut self.partial);
                whole.extend_from_slice(line);
                self.line(&whole, out)
            };
            if outcome.is_err() {
                break;
            }
            rest = after;
        }
        self.gather.flush(out)?;
        self.partial.extend_from_slice(rest);
        outcome?;
        check_size(self.partial.len(), self.most)
            .map_err(|problem| Refused::at(problem, self.gather.next_row(), Some(self.line + 1)))
    }

    fn finish(&mut self, out: &mut Vec<BulkRows>) -> Result<(), Refused> {
        let last = std::mem::take(&mut self.partial);
        let outcome = if last.is_empty() { Ok(()) } else { self.line(&last, out) };
        self.gather.flush(out)?;
        outcome
    }

    fn held(&self) -> usize {
        self.partial.len()
    }
}
