//! `POST /v1/tables/{namespace}/{table}/rows`: NDJSON, CSV or an Arrow stream into a table, read and committed piece by
//! piece, so that a body of any length takes little memory.
//!
//! A piece that is committed stays: the answer, also a problem, says how many rows those are, and which row and line
//! was the trouble. With an `Idempotency-Key` the same body, sent again, goes on behind them.

mod arrow;
mod csv;
mod gather;
mod ndjson;

use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::auth::Caller;
use super::body::{self, Incoming};
use super::error::Problem;
use super::json::Json;
use super::request::{self, InPath};
use super::routes::{App, mark_replayed, media_type, wrong_type};
use crate::db::{BulkFailure, BulkInsert, BulkOptions, BulkReport, BulkRows};
use crate::sql::{OutputColumn, RowConflict};

/// What a bulk insert may hold besides the piece it reads: rows that wait for their commit, their images, the frame.
const SHARE: usize = 8 << 20;
/// The most that a byte of text becomes on its way into the table: a line of one digit is a row, its image, its key.
const GROWTH: u64 = 128;

const ARROW: &str = "application/vnd.apache.arrow.stream";

/// What to do about rows that are there already.
const RESOLVE: &str = "with ?on_conflict=nothing in the URL rows that are there already are passed over, with \
                       ?on_conflict=update those with the same primary key are changed";

/// Where the body is no rows of this table.
#[derive(Debug)]
struct Refused {
    problem: Problem,
    /// From 1, of the rows of the body.
    row: Option<u64>,
    line: Option<u64>,
}

/// Turns a body's bytes into rows.
trait Decoder: Send {
    fn push(&mut self, bytes: &Bytes, out: &mut Vec<BulkRows>) -> Result<(), Refused>;
    fn finish(&mut self, out: &mut Vec<BulkRows>) -> Result<(), Refused>;
    /// Bytes of what is not a whole row (or batch of rows) yet.
    fn held(&self) -> usize;
}

pub async fn post(
    State(app): State<App>,
    Caller(who): Caller,
    InPath((namespace, table)): InPath<(String, String)>,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let started = Instant::now();
    let conflict = on_conflict(&uri)?;
    let key = request::idempotency_key(&headers)?;
    let format = media_type(&headers)?;
    let decoder: fn(Arc<[OutputColumn]>, usize) -> Box<dyn Decoder> = match format.as_str() {
        "application/x-ndjson" => |columns, most| Box::new(ndjson::Lines::new(columns, most)),
        "text/csv" => |columns, most| Box::new(csv::Records::new(columns, most)),
        ARROW => |_, _| Box::new(arrow::Messages::default()),
        other => {
            return Err(wrong_type(other, &format!("application/x-ndjson, text/csv or {ARROW}")));
        }
    };
    let said = [namespace.as_str(), &table, &format, conflict.as_str()];
    let idempotency = key.map(|key| request::rows_idempotency(key, &said));
    let mut insert = app.db.bulk_insert(&who, &namespace, &table, BulkOptions { conflict, idempotency })?;
    let decoder = decoder(insert.columns().into(), app.options.body_bytes);
    let mut body = Incoming::new(&headers, body, &app.budget)?;
    // Many small bodies at once take what they need. (A byte of an Arrow message can be any number of rows.)
    let share = match body::announced(&headers) {
        Some(bytes) if format != ARROW => usize::try_from(bytes.saturating_mul(GROWTH)).unwrap_or(SHARE).min(SHARE),
        _ => SHARE,
    };
    match run(&mut insert, decoder, &mut body, share).await {
        Ok(report) => {
            let elapsed_ms = started.elapsed().as_micros() as f64 / 1000.0;
            let BulkReport { rows, affected, commits, .. } = report;
            let mut answer = json!({"rows": rows, "affected": affected, "commits": commits, "elapsed_ms": elapsed_ms});
            if let Some(seq) = report.seq {
                answer["seq"] = json!(seq.0);
            }
            let mut response = Json(answer).into_response();
            if report.replayed {
                mark_replayed(&mut response);
            }
            Ok(response)
        }
        Err(refused) => Err(refused.told(conflict, insert.report())),
    }
}

/// What becomes of rows that are there already.
fn on_conflict(uri: &Uri) -> Result<RowConflict, Problem> {
    let mut said = None;
    for (name, value) in request::pairs(uri)? {
        match name.as_str() {
            "on_conflict" => request::once(&mut said, &name, value)?,
            _ => return Err(request::unknown_parameter(&name, "on_conflict")),
        }
    }
    let known = [RowConflict::Error, RowConflict::Nothing, RowConflict::Update];
    match said {
        None => Ok(RowConflict::default()),
        Some(said) => known.into_iter().find(|conflict| conflict.as_str() == said).ok_or_else(|| {
            Problem::bad_request(format!("on_conflict is `{said}`; it can be error, nothing or update"))
        }),
    }
}

async fn run(
    insert: &mut BulkInsert,
    mut decoder: Box<dyn Decoder>,
    body: &mut Incoming<'_>,
    share: usize,
) -> Result<BulkReport, Refused> {
    body.hold(share)?;
    loop {
        let bytes = body.next().await?;
        let last = bytes.is_none();
        if let Some(bytes) = &bytes {
            insert.read(bytes)?;
        }
        // Off the async threads: a piece can be a batch of many megabytes.
        let decoded = tokio::task::spawn_blocking(move || {
            let mut rows = Vec::new();
            let decoded = match bytes {
                Some(bytes) => decoder.push(&bytes, &mut rows),
                None => decoder.finish(&mut rows),
            };
            (decoder, rows, decoded)
        });
        let (back, rows, decoded) = decoded.await.map_err(|_| Problem::internal("decoding the body failed"))?;
        decoder = back;
        // Rows before a refused one are looked at first: the earliest trouble is the one to tell.
        for rows in rows {
            insert.add(rows).await?;
        }
        decoded?;
        if last {
            return Ok(insert.finish().await?);
        }
        body.hold(share + decoder.held())?;
    }
}

/// A row of text of more than `most` bytes, whole or not.
fn check_size(bytes: usize, most: usize) -> Result<(), Problem> {
    if bytes <= most {
        return Ok(());
    }
    let detail = format!("the row has more than {most} bytes, the most that server.body_bytes allows: raise that");
    Err(Problem::new(413, "row_too_large", detail))
}

impl Refused {
    fn at(problem: Problem, row: u64, line: Option<u64>) -> Refused {
        Refused { problem, row: Some(row), line }
    }

    fn told(self, conflict: RowConflict, report: BulkReport) -> Problem {
        let mut problem = self.problem;
        if problem.code() == "duplicate_key" && conflict == RowConflict::Error {
            problem = problem.hinting(RESOLVE);
        }
        for (name, place) in [("row", self.row), ("line", self.line)] {
            if let Some(place) = place {
                problem = problem.with(name, json!(place));
            }
        }
        problem = problem.with("committed_rows", json!(report.rows)).with("commits", json!(report.commits));
        match report.seq {
            Some(seq) => problem.with("seq", json!(seq.0)),
            None => problem,
        }
    }
}

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Refused {
        Refused { problem, row: None, line: None }
    }
}

impl From<BulkFailure> for Refused {
    fn from(failure: BulkFailure) -> Refused {
        Refused { problem: failure.error.into(), row: failure.row, line: failure.line }
    }
}
