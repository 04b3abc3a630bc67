//! The answer to SQL: JSON with all results, or NDJSON, CSV or an Arrow stream with the rows of one, written as batches
//! arrive.
//!
//! Nothing is answered before the first piece is made, so an error in it has its true status. An error later can only
//! be told in the body: NDJSON ends with an `{"error":…}` line, everything else is cut off (a connection that breaks is
//! the one thing no client takes for a whole answer).

use std::io::Write;
use std::time::Instant;

use arrow::array::Int64Array;
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use arrow_ipc::writer::StreamWriter;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use serde_json::json;

use wire::Type;

use super::csv;
use super::denials::Reader;
use super::error::Problem;
use super::json::{Rows, text};
use crate::db::{SqlAnswer, StatementResult};
use crate::sql::arrow::output_schema;
use crate::sql::{OutputColumn, RowStream};
use crate::store::Seq;

/// A piece leaves when it has this many bytes: large enough to be cheap, small against a result.
const PIECE: usize = 64 * 1024;
/// Rows written between two looks at the size.
const STRIDE: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Ndjson,
    Csv,
    Arrow,
}

/// The formats by their names in `Accept`; of equals the first is taken.
const MEDIA_TYPES: [(&str, Format); 4] = [
    ("application/json", Format::Json),
    ("application/x-ndjson", Format::Ndjson),
    ("text/csv", Format::Csv),
    ("application/vnd.apache.arrow.stream", Format::Arrow),
];

impl Format {
    /// The one with the greatest weight, of equals the one that the client names first (RFC 9110, section 12.5.1).
    pub fn accepted(headers: &HeaderMap) -> Result<Format, Problem> {
        let accept: Vec<&str> =
            headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
        if accept.is_empty() {
            return Ok(Format::Json);
        }
        let accept = accept.join(",");
        let ranges: Vec<Range> = accept.split(',').map(Range::new).collect();
        let mut wishes: Vec<(f32, usize, Format)> = MEDIA_TYPES
            .iter()
            .filter_map(|(name, format)| wish(&ranges, name).map(|(q, at)| (q, at, *format)))
            .collect();
        wishes.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        wishes.first().map(|(_, _, format)| *format).ok_or_else(|| {
            let detail = "SQL is answered as application/json, application/x-ndjson, text/csv or \
                          application/vnd.apache.arrow.stream; accept one of them";
            Problem::new(406, "not_acceptable", detail)
        })
    }

    /// Whether the format has no way to say where one result ends and the next begins.
    pub fn holds_one_result(self) -> bool {
        self != Format::Json
    }

    fn content_type(self) -> &'static str {
        match self {
            Format::Json => "application/json",
            Format::Ndjson => "application/x-ndjson",
            Format::Csv => "text/csv; charset=utf-8; header=present",
            Format::Arrow => "application/vnd.apache.arrow.stream",
        }
    }
}

/// One of the ranges of `Accept`, such as `text/*;q=0.5`.
struct Range {
    name: String,
    weight: f32,
}

impl Range {
    fn new(text: &str) -> Range {
        let text = text.to_ascii_lowercase();
        let mut parts = text.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default().to_owned();
        let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse().ok()).unwrap_or(1.0);
        Range { name, weight }
    }

    /// How exactly it names a media type; `None` where it does not.
    fn names(&self, media_type: &str) -> Option<u8> {
        match self.name.strip_suffix("/*") {
            Some("*") => Some(0),
            Some(kind) => media_type.strip_prefix(kind)?.starts_with('/').then_some(1),
            None => (self.name == media_type).then_some(2),
        }
    }
}

/// The weight that the most exact range gives to a media type, and where that stands; `None`: it is not wanted.
fn wish(ranges: &[Range], media_type: &str) -> Option<(f32, usize)> {
    let named = ranges.iter().enumerate().filter_map(|(at, range)| Some((range.names(media_type)?, at)));
    // Of equals the first.
    let (_, at) = named.max_by_key(|(exactness, at)| (*exactness, std::cmp::Reverse(*at)))?;
    let weight = ranges[at].weight;
    (weight > 0.0).then_some((weight, at))
}

/// Makes the response, with the first piece of the body already there.
pub async fn respond(answer: SqlAnswer, format: Format, started: Instant, reader: Option<Reader>) -> Response {
    let mut writer = Writer::new(answer, format, started);
    let mut first = Vec::new();
    let body = match writer.fill(&mut first).await {
        Err(problem) => return problem.into_response(),
        Ok(false) => Body::from(first),
        Ok(true) => streamed(writer, first, reader),
    };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn streamed(writer: Writer, first: Vec<u8>, reader: Option<Reader>) -> Body {
    let pieces = futures::stream::unfold((Some(writer), Some(first), reader), |(writer, first, reader)| async move {
        if let Some(first) = first {
            return Some((Ok(Bytes::from(first)), (writer, None, reader)));
        }
        let mut writer = writer?;
        let mut piece = Vec::with_capacity(PIECE + PIECE / 4);
        let filled = writer.fill(&mut piece).await;
        if let (Err(problem), Some(reader)) = (&filled, &reader) {
            reader.ends_with(problem);
        }
        match filled {
            Ok(true) => Some((Ok(Bytes::from(piece)), (Some(writer), None, reader))),
            Ok(false) => Some((Ok(Bytes::from(piece)), (None, None, None))),
            Err(problem) if writer.format == Format::Ndjson => {
                let line = json!({"error": problem.body()});
                writeln!(piece, "{line}").expect("writing to memory cannot fail");
                Some((Ok(Bytes::from(piece)), (None, None, None)))
            }
            Err(problem) => {
                let cut = std::io::Error::other(format!("the result failed midway: {}", problem.code()));
                Some((Err(cut), (None, None, None)))
            }
        }
    });
    Body::from_stream(pieces)
}

/// Writes an answer piece by piece.
struct Writer {
    format: Format,
    results: std::vec::IntoIter<StatementResult>,
    running: Option<Running>,
    /// Results begun so far.
    begun: usize,
    seq: Seq,
    started: Instant,
}

/// The rows of one statement.
struct Running {
    rows: RowStream,
    /// The batch being written and its next row.
    batch: Option<(RecordBatch, usize)>,
    written: u64,
    /// RETURNING's rows are counted as `affected` already.
    counted: bool,
    /// Frames batches as Arrow messages; what it writes is taken out at once.
    arrow: Option<StreamWriter<Vec<u8>>>,
}

impl Writer {
    fn new(answer: SqlAnswer, format: Format, started: Instant) -> Writer {
        let SqlAnswer { results, seq, .. } = answer;
        debug_assert!(results.len() <= 1 || !format.holds_one_result());
        Writer { format, results: results.into_iter(), running: None, begun: 0, seq, started }
    }

    /// Appends up to about a piece; false when everything is written.
    async fn fill(&mut self, out: &mut Vec<u8>) -> Result<bool, Problem> {
        while out.len() < PIECE {
            match &mut self.running {
                Some(running) => {
                    if !running.advance(self.format, out).await? {
                        self.end_rows(out)?;
                    }
                }
                None => match self.results.next() {
                    Some(result) => self.begin(result, out)?,
                    None => {
                        self.end(out);
                        return Ok(false);
                    }
                },
            }
        }
        Ok(true)
    }

    fn begin(&mut self, result: StatementResult, out: &mut Vec<u8>) -> Result<(), Problem> {
        if self.format == Format::Json {
            out.extend_from_slice(if self.begun == 0 { b"{\"results\":[" } else { b"," });
        }
        self.begun += 1;
        let (rows, counted) = match result {
            StatementResult::Rows(rows) => {
                if self.format == Format::Json {
                    out.push(b'{');
                }
                (rows, true)
            }
            StatementResult::Affected { affected, returned: Some(rows) } => {
                if self.format == Format::Json {
                    write!(out, "{{\"affected\":{affected},").expect("writing to memory cannot fail");
                }
                (rows, false)
            }
            StatementResult::Affected { affected, returned: None } if self.format == Format::Json => {
                write!(out, "{{\"affected\":{affected}}}").expect("writing to memory cannot fail");
                return Ok(());
            }
            StatementResult::Affected { affected, returned: None } => (affected_row(affected, self.seq)?, true),
        };
        let mut arrow = None;
        match self.format {
            Format::Json => columns(&rows, out),
            Format::Ndjson => {}
            Format::Csv => csv::header(&rows.columns, out),
            Format::Arrow => {
                let schema = output_schema(&rows.columns);
                arrow = Some(StreamWriter::try_new(Vec::new(), &schema).map_err(unwritable)?);
            }
        }
        self.running = Some(Running { rows, batch: None, written: 0, counted, arrow });
        Ok(())
    }

    fn end_rows(&mut self, out: &mut Vec<u8>) -> Result<(), Problem> {
        let Some(mut running) = self.running.take() else { return Ok(()) };
        if self.format == Format::Json {
            match running.counted {
                true => write!(out, "],\"row_count\":{}}}", running.written),
                false => write!(out, "]}}"),
            }
            .expect("writing to memory cannot fail");
        }
        if let Some(arrow) = &mut running.arrow {
            arrow.finish().map_err(unwritable)?;
            out.append(arrow.get_mut());
        }
        Ok(())
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        if self.format == Format::Json {
            if self.begun == 0 {
                out.extend_from_slice(b"{\"results\":[");
            }
            let elapsed_ms = self.started.elapsed().as_micros() as f64 / 1000.0;
            writeln!(out, "],\"seq\":{},\"elapsed_ms\":{elapsed_ms}}}", self.seq.0)
                .expect("writing to memory cannot fail");
        }
    }
}

/// What a statement without rows did, as the one row of its result.
fn affected_row(affected: u64, seq: Seq) -> Result<RowStream, Problem> {
    let column = |name: &str| OutputColumn { name: name.to_owned(), ty: Type::BigInt };
    let columns = vec![column("affected"), column("seq")];
    let cell = |value: u64| std::sync::Arc::new(Int64Array::from_iter([i64::try_from(value).ok()]));
    let batch = RecordBatch::try_new(output_schema(&columns), vec![cell(affected), cell(seq.0)]).map_err(unwritable)?;
    Ok(RowStream { columns, batches: Box::pin(futures::stream::iter([Ok(batch)])) })
}

fn columns(rows: &RowStream, out: &mut Vec<u8>) {
    out.extend_from_slice(b"\"columns\":[");
    for (index, column) in rows.columns.iter().enumerate() {
        out.extend_from_slice(if index == 0 { b"{\"name\":" } else { b",{\"name\":" });
        text(&column.name, out);
        out.extend_from_slice(b",\"type\":");
        text(&column.ty.to_string(), out);
        out.push(b'}');
    }
    out.extend_from_slice(b"],\"rows\":[");
}

/// Our own bug: results have SQL types only, and every format can say those.
fn unwritable(error: ArrowError) -> Problem {
    tracing::error!(%error, "a result cannot be written");
    Problem::internal("a column of this result cannot be written; cast it to TEXT")
}

impl Running {
    /// Writes rows of the present batch, or takes the next one; false when there is none.
    async fn advance(&mut self, format: Format, out: &mut Vec<u8>) -> Result<bool, Problem> {
        let (batch, start) = match self.batch.take() {
            Some(batch) => batch,
            None => match self.rows.batches.next().await {
                Some(batch) => (batch?, 0),
                None => return Ok(false),
            },
        };
        let next = self.rows(&batch, start, format, out).map_err(unwritable)?;
        if next < batch.num_rows() {
            self.batch = Some((batch, next));
        }
        Ok(true)
    }

    /// Writes rows from `start` until the piece is full; the next row to write.
    fn rows(
        &mut self,
        batch: &RecordBatch,
        start: usize,
        format: Format,
        out: &mut Vec<u8>,
    ) -> Result<usize, ArrowError> {
        let mut written = self.written;
        let next = match format {
            Format::Arrow => {
                if let Some(arrow) = &mut self.arrow {
                    arrow.write(batch)?;
                    out.append(arrow.get_mut());
                }
                batch.num_rows()
            }
            Format::Csv => {
                let mut lines = csv::Lines::new(batch)?;
                pieces(batch, start, out, |row, out| lines.row(row, out))
            }
            Format::Ndjson => {
                let rows = Rows::new(batch)?;
                pieces(batch, start, out, |row, out| {
                    rows.object(row, out);
                    out.push(b'\n');
                })
            }
            Format::Json => {
                let rows = Rows::new(batch)?;
                pieces(batch, start, out, |row, out| {
                    if written > 0 {
                        out.push(b',');
                    }
                    written += 1;
                    rows.array(row, out);
                })
            }
        };
        self.written = written;
        Ok(next)
    }
}

/// Writes rows until the piece is full; the next row to write.
fn pieces(batch: &RecordBatch, start: usize, out: &mut Vec<u8>, mut write: impl FnMut(usize, &mut Vec<u8>)) -> usize {
    let mut row = start;
    while row < batch.num_rows() && out.len() < PIECE {
        let end = batch.num_rows().min(row + STRIDE);
        (row..end).for_each(|row| write(row, out));
        row = end;
    }
    row
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::datatypes::{DataType, Field, Schema};
    use axum::http::StatusCode;
    use http_body_util::BodyExt;

    use super::*;
    use crate::sql::SqlError;

    fn batch(values: std::ops::Range<i64>) -> RecordBatch {
        let schema = Schema::new(vec![Field::new("n", DataType::Int64, false)]);
        RecordBatch::try_new(Arc::new(schema), vec![Arc::new(Int64Array::from_iter_values(values))]).unwrap()
    }

    fn rows(batches: Vec<Result<RecordBatch, SqlError>>) -> StatementResult {
        let columns = vec![OutputColumn { name: "n".to_owned(), ty: Type::BigInt }];
        StatementResult::Rows(RowStream { columns, batches: Box::pin(futures::stream::iter(batches)) })
    }

    async fn answer(results: Vec<StatementResult>, format: Format) -> (StatusCode, Option<String>) {
        let answer = SqlAnswer { results, seq: Seq(7), replayed: false };
        let response = respond(answer, format, Instant::now(), None).await;
        let status = response.status();
        let body = response.into_body().collect().await.ok();
        (status, body.map(|body| String::from_utf8(body.to_bytes().to_vec()).unwrap()))
    }

    fn answer_of(result: StatementResult) -> SqlAnswer {
        SqlAnswer { results: vec![result], seq: Seq(7), replayed: false }
    }

    fn late_error() -> Vec<Result<RecordBatch, SqlError>> {
        vec![Ok(batch(0..50_000)), Err(SqlError::Limit("too much".to_owned()))]
    }

    #[tokio::test]
    async fn json_has_all_results() {
        let results = vec![
            rows(vec![Ok(batch(1..3)), Ok(batch(3..4))]),
            StatementResult::Affected { affected: 2, returned: None },
            rows(vec![]),
        ];
        let (status, body) = answer(results, Format::Json).await;
        let body = body.unwrap();
        assert!(body.ends_with("}\n"), "it ends its line");
        let mut body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(status, 200);
        assert!(body["elapsed_ms"].take().is_number());
        let columns = json!([{"name": "n", "type": "BIGINT"}]);
        let expect = json!({"results": [
            {"columns": columns, "rows": [[1], [2], [3]], "row_count": 3},
            {"affected": 2},
            {"columns": columns, "rows": [], "row_count": 0},
        ], "seq": 7, "elapsed_ms": null});
        assert_eq!(body, expect);
    }

    #[tokio::test]
    async fn large_results_are_whole() {
        let (_, body) = answer(vec![rows(vec![Ok(batch(0..30_000)), Ok(batch(30_000..60_000))])], Format::Json).await;
        let body: serde_json::Value = serde_json::from_str(&body.unwrap()).unwrap();
        let found = body["results"][0]["rows"].as_array().unwrap();
        assert!(found.iter().enumerate().all(|(index, row)| row[0] == index) && found.len() == 60_000);
        let (_, body) = answer(vec![rows(vec![Ok(batch(0..60_000))])], Format::Ndjson).await;
        assert!(body.unwrap().lines().enumerate().all(|(index, line)| line == format!("{{\"n\":{index}}}")));
    }

    #[tokio::test]
    async fn errors_are_never_taken_for_an_end() {
        let early = || vec![rows(vec![Err(SqlError::Limit("too much".to_owned()))])];
        assert_eq!(answer(early(), Format::Json).await.0, 400);
        assert_eq!(answer(early(), Format::Ndjson).await.0, 400);
        assert_eq!(answer(early(), Format::Csv).await.0, 400);
        for format in [Format::Json, Format::Csv, Format::Arrow] {
            let response = respond(answer_of(rows(late_error())), format, Instant::now(), None);
            let response = response.await;
            assert_eq!(response.status(), 200);
            assert!(response.into_body().collect().await.is_err(), "the body is cut off");
        }
        let body = answer(vec![rows(late_error())], Format::Ndjson).await.1.unwrap();
        let last: serde_json::Value = serde_json::from_str(body.lines().last().unwrap()).unwrap();
        assert_eq!(last["error"]["code"], "limit");
    }

    #[tokio::test]
    async fn a_write_is_one_row_where_there_are_only_rows() {
        let affected = || vec![StatementResult::Affected { affected: 3, returned: None }];
        let one = answer(affected(), Format::Ndjson).await.1;
        assert_eq!(one.as_deref(), Some("{\"affected\":3,\"seq\":7}\n"));
        assert_eq!(answer(affected(), Format::Csv).await.1.as_deref(), Some("affected,seq\n3,7\n"));
    }

    #[tokio::test]
    async fn an_arrow_stream_has_its_schema_also_without_rows() {
        for (results, expected) in [(rows(vec![]), 0), (rows(vec![Ok(batch(0..20_000)), Ok(batch(0..1))]), 20_001)] {
            let response = respond(answer_of(results), Format::Arrow, Instant::now(), None);
            let body = response.await.into_body().collect().await.unwrap().to_bytes();
            let reader = arrow_ipc::reader::StreamReader::try_new(std::io::Cursor::new(body), None).unwrap();
            assert_eq!(reader.schema().field(0).name(), "n");
            assert_eq!(reader.map(|batch| batch.unwrap().num_rows()).sum::<usize>(), expected);
        }
    }

    #[test]
    fn accept() {
        for (accept, expect) in [
            ("*/*", Some(Format::Json)),
            ("application/x-ndjson", Some(Format::Ndjson)),
            ("application/json;q=0.5, application/x-ndjson", Some(Format::Ndjson)),
            ("text/html, */*;q=0.8", Some(Format::Json)),
            ("text/csv", Some(Format::Csv)),
            ("application/vnd.apache.arrow.stream", Some(Format::Arrow)),
            ("text/plain", None),
            ("application/json;q=0", None),
            ("application/json;Q=0", None),
            // The most exact range decides, wherever it stands.
            ("application/json;q=0, */*", Some(Format::Ndjson)),
            ("*/*, application/json;q=0", Some(Format::Ndjson)),
            ("application/*;q=0, text/*;q=0.1", Some(Format::Csv)),
            ("*/*;q=0.9, text/csv;q=0.1", Some(Format::Json)),
            ("application/*, application/json;q=0.5", Some(Format::Ndjson)),
            ("*/*;q=0", None),
            // Of equals the first that is named.
            ("text/csv, application/json", Some(Format::Csv)),
            ("*/*, text/csv", Some(Format::Json)),
        ] {
            let headers = HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_str(accept).unwrap())]);
            assert_eq!(Format::accepted(&headers).ok(), expect, "{accept}");
        }
        assert_eq!(Format::accepted(&HeaderMap::new()).ok(), Some(Format::Json));
    }
}
