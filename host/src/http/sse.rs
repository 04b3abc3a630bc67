//! Server-sent events: the text of live streams. Events of rows are encoded here once per group ([`Events`], what
//! `live` asks of its [`Encoder`]); what concerns one subscriber only (hello, start, uptodate, the end) is framed by
//! [`output`] and its neighbours.
//!
//! Every value goes through JSON, which escapes line breaks, so an event is always one `data:` line and no value can
//! start a field of its own. `open` and `error` are EventSource's own event names and are never used.

use std::io::Write;
use std::ops::Range;
use std::time::Duration;

use arrow::error::ArrowError;
use bytes::Bytes;
use rand::Rng;
use serde_json::{Value, json};

use super::error::Problem;
use super::json::{Rows, time};
use crate::db::{LiveOutput, ResyncReason};
use crate::live::event::{CommitEvents, EventOp, EventRow};
use crate::live::position::Position;
use crate::live::{Encoder, GroupSpec, OldMode, PipelineFault};
use crate::store::Seq;

/// Encodes the events of rows.
pub struct Events;

impl Encoder for Events {
    fn encode(&self, group: &GroupSpec, events: &CommitEvents, out: &mut Vec<u8>) {
        let start = out.len();
        let position = Position { epoch: group.epoch.0, seq: events.seq.0, fingerprint: group.fingerprint.clone() };
        if let Err(error) = encode(&position, group.old, events, out) {
            // Only an Arrow type without any text form ends here, and no column or plugin output has one.
            tracing::error!(live_id = %group.live_id, %error, "events could not be written; the stream says so");
            out.truncate(start);
            let problem = Problem::internal("a value of this result has no JSON form");
            frame("failed", None, &problem.body(), out);
        }
    }
}

/// The writers of the three batches of a commit, and what is kept between rows.
struct Batches<'a> {
    keys: Rows<'a>,
    new: Rows<'a>,
    old: Rows<'a>,
    mode: OldMode,
    /// Where each value of the new row stands in the output, so that the old one is compared with what is shown.
    shown: Vec<Range<usize>>,
    scratch: Vec<u8>,
}

fn encode(position: &Position, mode: OldMode, events: &CommitEvents, out: &mut Vec<u8>) -> Result<(), ArrowError> {
    let mut batches = Batches {
        keys: Rows::new(&events.keys)?,
        new: Rows::new(&events.new)?,
        old: Rows::new(&events.old)?,
        mode,
        shown: Vec::new(),
        scratch: Vec::new(),
    };
    let last = events.events.len().wrapping_sub(1);
    for (index, event) in events.events.iter().enumerate() {
        out.extend_from_slice(match event.op {
            EventOp::Insert => b"event: insert\n",
            EventOp::Update => b"event: update\n",
            EventOp::Deleted | EventOp::MovedOut => b"event: delete\n",
            EventOp::Change(_) => b"event: change\n",
        });
        // Only the last event of a commit has an id: a reconnect never lands inside a transaction.
        if index == last && !events.snapshot {
            writeln!(out, "id: {position}").expect("writing to memory cannot fail");
        }
        out.extend_from_slice(b"data: ");
        batches.data(event, events.snapshot, out);
        out.extend_from_slice(b"\n\n");
    }
    Ok(())
}

impl Batches<'_> {
    fn data(&mut self, event: &EventRow, snapshot: bool, out: &mut Vec<u8>) {
        out.push(b'{');
        if let EventOp::Change(op) = event.op {
            write!(out, "\"op\":\"{}\",", op.as_str()).expect("writing to memory cannot fail");
        }
        out.extend_from_slice(b"\"key\":");
        self.keys.object(event.key, out);
        match (event.op, event.new, event.old) {
            (EventOp::Insert, Some(new), _) => {
                out.extend_from_slice(b",\"row\":");
                self.new.object(new, out);
                if snapshot {
                    out.extend_from_slice(b",\"snapshot\":true");
                }
                expires(event, out);
            }
            (EventOp::Update, Some(new), Some(old)) => {
                out.extend_from_slice(b",\"row\":");
                self.row(new, out);
                self.changed(old, out);
                expires(event, out);
            }
            (EventOp::Update, Some(new), None) | (EventOp::Change(_), Some(new), _) => {
                out.extend_from_slice(b",\"row\":");
                self.new.object(new, out);
                expires(event, out);
            }
            (op, _, old) => {
                self.whole(old, out);
                let reason: &[u8] = if op == EventOp::MovedOut { b"moved_out" } else { b"deleted" };
                out.extend_from_slice(b",\"reason\":\"");
                out.extend_from_slice(reason);
                out.push(b'"');
            }
        }
        out.push(b'}');
    }

    /// The new row, remembering where its values are.
    fn row(&mut self, row: usize, out: &mut Vec<u8>) {
        self.shown.clear();
        out.push(b'{');
        for column in 0..self.new.columns() {
            if column > 0 {
                out.push(b',');
            }
            out.extend_from_slice(self.new.label(column));
            let start = out.len();
            self.new.value(column, row, out);
            self.shown.push(start..out.len());
        }
        out.push(b'}');
    }

    /// `,"old":{…}` of an update: the columns that are shown differently now.
    fn changed(&mut self, row: usize, out: &mut Vec<u8>) {
        if self.mode != OldMode::Changed {
            return self.whole(Some(row), out);
        }
        out.extend_from_slice(b",\"old\":{");
        let mut first = true;
        for column in 0..self.old.columns() {
            self.scratch.clear();
            self.old.value(column, row, &mut self.scratch);
            if self.shown.get(column).is_some_and(|range| out[range.clone()] == *self.scratch) {
                continue;
            }
            if !std::mem::take(&mut first) {
                out.push(b',');
            }
            out.extend_from_slice(self.old.label(column));
            out.extend_from_slice(&self.scratch);
        }
        out.push(b'}');
    }

    /// `,"old":{…}` with every column: what a deleted row was, or `old=full`.
    fn whole(&self, row: Option<usize>, out: &mut Vec<u8>) {
        if let Some(row) = row.filter(|_| self.mode != OldMode::None) {
            out.extend_from_slice(b",\"old\":");
            self.old.object(row, out);
        }
    }
}

/// One event with a JSON document as data.
fn frame(event: &str, id: Option<&str>, data: &Value, out: &mut Vec<u8>) {
    writeln!(out, "event: {event}").expect("writing to memory cannot fail");
    if let Some(id) = id {
        writeln!(out, "id: {id}").expect("writing to memory cannot fail");
    }
    write!(out, "data: {data}\n\n").expect("writing to memory cannot fail");
}

/// The heartbeat of a stream that has no position to tell: proxies keep the connection.
pub const COMMENT: Bytes = Bytes::from_static(b":\n\n");

/// After an ordinary end clients come back within this; spread, so that they do not come all at once.
pub const RETRY: Duration = Duration::from_millis(1_500);
/// After an end by overload.
pub const RETRY_BUSY: Duration = Duration::from_secs(10);

/// What a stream starts with: flushed at once, so that clients and proxies see the stream open.
pub fn hello(retry: Duration) -> Bytes {
    let millis = retry.as_millis() as u64;
    let spread = rand::rng().random_range(0..=millis / 3);
    Bytes::from(format!(": hello\nretry: {}\n\n", millis + spread))
}

/// Why the server ends the stream, as its last event.
pub fn closed(problem: &Problem) -> Bytes {
    let mut out = Vec::new();
    frame("closed", None, &problem.body(), &mut out);
    Bytes::from(out)
}

/// `,"expires":"…"` where the row does.
fn expires(event: &EventRow, out: &mut Vec<u8>) {
    if let Some(micros) = event.expires {
        out.extend_from_slice(b",\"expires\":");
        time::timestamp(micros.div_euclid(1_000_000), micros.rem_euclid(1_000_000) * 1_000, out);
    }
}

/// One output of a live stream as SSE text.
pub fn output(output: LiveOutput) -> Bytes {
    let mut out = Vec::new();
    match output {
        LiveOutput::Encoded(bytes) => return bytes,
        LiveOutput::Start { live_id, columns, key, semantics, requery, from } => {
            let columns: Vec<Value> =
                columns.iter().map(|c| json!({"name": c.name, "type": c.ty.to_string()})).collect();
            let from = from.unwrap_or_else(|| "snapshot".to_owned());
            let mode = if requery.is_some() { "requery" } else { "incremental" };
            let mut data = json!({"live_id": live_id, "columns": columns, "key": key, "semantics": semantics.as_str(),
                                  "mode": mode, "from": from});
            if let Some(interval) = requery {
                data["interval_ms"] = json!(interval.as_millis() as u64);
            }
            frame("start", None, &data, &mut out);
        }
        LiveOutput::UpToDate { position, seq } => frame("uptodate", Some(&position), &json!({"seq": seq.0}), &mut out),
        LiveOutput::Resync(reason) => frame("resync", None, &json!({"reason": reason_name(reason)}), &mut out),
        LiveOutput::Pipeline { plugin, version, sha256 } => {
            frame("pipeline", None, &json!({"plugin": plugin, "version": version, "sha256": sha256}), &mut out);
        }
        LiveOutput::PluginError { fault, seq } => {
            frame("plugin-error", None, &plugin_error(fault, seq).body(), &mut out)
        }
        LiveOutput::Failed { message } => {
            frame("failed", None, &Problem::new(422, "row_failed", message).body(), &mut out);
        }
        LiveOutput::Closed { code, message } => {
            frame("closed", None, &Problem::new(closed_status(code), code, message).body(), &mut out);
        }
        LiveOutput::Refused(error) => frame("closed", None, &Problem::from(*error).body(), &mut out),
    }
    Bytes::from(out)
}

/// What whoever comes back is answered with: 503 alone is worth it.
fn closed_status(code: &str) -> u16 {
    match code {
        "killed" => 410,
        "plugin_dropped" => 404,
        "table_dropped" | "schema" => 400,
        _ => 503,
    }
}

fn plugin_error(fault: PipelineFault, seq: Seq) -> Problem {
    let mut problem = Problem::new(422, "plugin_failed", fault.to_string());
    if let Some(plugin) = &fault.plugin {
        problem = problem.with("plugin", json!(plugin.name)).with("version", json!(plugin.version));
    }
    if let Some(rest) = fault.retry_after {
        problem = problem.with("retry_after_ms", json!(rest.as_millis() as u64));
    }
    problem.with("cause", json!(fault.cause)).with("seq", json!(seq.0))
}

fn reason_name(reason: ResyncReason) -> &'static str {
    match reason {
        ResyncReason::Expired => "expired",
        ResyncReason::Epoch => "epoch",
        ResyncReason::Schema => "schema",
        ResyncReason::Plugin => "plugin",
        ResyncReason::Requery => "requery",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int64Array, StringArray};
    use arrow::datatypes::{DataType, Field, Schema};
    use arrow::record_batch::RecordBatch;
    use wire::Op;

    use super::*;
    use crate::catalog::{Semantics, Stage};
    use crate::db::DbError;
    use crate::sql::OutputColumn;

    fn keys(ids: &[i64]) -> RecordBatch {
        let schema = Schema::new(vec![Field::new("id", DataType::Int64, false)]);
        RecordBatch::try_new(Arc::new(schema), vec![Arc::new(Int64Array::from(ids.to_vec())) as ArrayRef]).unwrap()
    }

    fn rows(rows: &[(i64, Option<&str>)]) -> RecordBatch {
        let schema =
            Schema::new(vec![Field::new("id", DataType::Int64, false), Field::new("name", DataType::Utf8, true)]);
        let ids = Int64Array::from(rows.iter().map(|row| row.0).collect::<Vec<_>>());
        let names = StringArray::from(rows.iter().map(|row| row.1).collect::<Vec<_>>());
        RecordBatch::try_new(Arc::new(schema), vec![Arc::new(ids) as ArrayRef, Arc::new(names)]).unwrap()
    }

    fn event(op: EventOp, key: usize, new: Option<usize>, old: Option<usize>) -> EventRow {
        EventRow { op, key, new, old, expires: None }
    }

    fn commit(snapshot: bool, events: Vec<EventRow>) -> CommitEvents {
        CommitEvents {
            seq: Seq(42),
            snapshot,
            events,
            keys: keys(&[1, 2, 3]),
            new: rows(&[(1, Some("b\r\nid: 9")), (2, None)]),
            old: rows(&[(1, Some("a")), (3, Some("c"))]),
        }
    }

    fn encoded(mode: OldMode, events: &CommitEvents) -> String {
        let position = Position { epoch: 0xbeef, seq: events.seq.0, fingerprint: "1.2.3".to_owned() };
        let mut out = Vec::new();
        encode(&position, mode, events, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn all() -> CommitEvents {
        let events = vec![
            event(EventOp::Update, 0, Some(0), Some(0)),
            event(EventOp::Insert, 1, Some(1), None),
            event(EventOp::MovedOut, 0, None, Some(0)),
            event(EventOp::Deleted, 2, None, Some(1)),
        ];
        commit(false, events)
    }

    #[test]
    fn a_commit_has_its_id_on_the_last_event_only() {
        let expect = "event: update\n\
            data: {\"key\":{\"id\":1},\"row\":{\"id\":1,\"name\":\"b\\r\\nid: 9\"},\"old\":{\"name\":\"a\"}}\n\n\
            event: insert\n\
            data: {\"key\":{\"id\":2},\"row\":{\"id\":2,\"name\":null}}\n\n\
            event: delete\n\
            data: {\"key\":{\"id\":1},\"old\":{\"id\":1,\"name\":\"a\"},\"reason\":\"moved_out\"}\n\n\
            event: delete\n\
            id: beef-42-1.2.3\n\
            data: {\"key\":{\"id\":3},\"old\":{\"id\":3,\"name\":\"c\"},\"reason\":\"deleted\"}\n\n";
        assert_eq!(encoded(OldMode::Changed, &all()), expect);
    }

    #[test]
    fn old_values_as_asked_for() {
        let full = encoded(OldMode::Full, &all());
        assert!(full.contains("\"old\":{\"id\":1,\"name\":\"a\"}}\n"), "{full}");
        let none = encoded(OldMode::None, &all());
        assert!(!none.contains("\"old\""), "{none}");
        assert!(none.contains("data: {\"key\":{\"id\":3},\"reason\":\"deleted\"}\n"), "{none}");
    }

    #[test]
    fn snapshot_rows_have_no_id() {
        let events = commit(true, vec![event(EventOp::Insert, 1, Some(1), None)]);
        let expect = "event: insert\ndata: {\"key\":{\"id\":2},\"row\":{\"id\":2,\"name\":null},\"snapshot\":true}\n\n";
        assert_eq!(encoded(OldMode::Changed, &events), expect);
    }

    /// All of them were `cannot_continue` with 400, whatever a reconnect got, and in words for the log.
    #[test]
    fn who_is_refused_is_told_what_a_reconnect_would_be() {
        for (error, status, code) in [
            (DbError::TooMany("a group more than there may be".into()), 429, "too_many"),
            (DbError::Busy("not now".into()), 503, "busy"),
            (DbError::NotFound("no such table".into()), 404, "not_found"),
            (DbError::Internal("secrets".into()), 500, "internal"),
        ] {
            let said = output(LiveOutput::Refused(Box::new(error)));
            let said = std::str::from_utf8(&said).unwrap();
            assert!(said.starts_with("event: closed\ndata: {"), "{said}");
            assert!(said.contains(&format!("\"status\":{status}")) && said.contains(&format!("\"code\":\"{code}\"")));
            assert!(!said.contains("secrets"), "{said}");
        }
    }

    #[test]
    fn outputs_of_changes() {
        let events = vec![
            event(EventOp::Change(Op::Delete), 0, Some(0), None),
            event(EventOp::Change(Op::Update), 1, Some(1), None),
        ];
        let expect = "event: change\n\
            data: {\"op\":\"delete\",\"key\":{\"id\":1},\"row\":{\"id\":1,\"name\":\"b\\r\\nid: 9\"}}\n\n\
            event: change\n\
            id: beef-42-1.2.3\n\
            data: {\"op\":\"update\",\"key\":{\"id\":2},\"row\":{\"id\":2,\"name\":null}}\n\n";
        assert_eq!(encoded(OldMode::Changed, &commit(false, events)), expect);
    }

    #[test]
    fn rows_of_stream_tables_say_when_they_expire() {
        let expires = Some(1_767_323_045_000_001);
        let insert = EventRow { expires, ..event(EventOp::Insert, 1, Some(1), None) };
        let update = EventRow { expires, ..event(EventOp::Update, 0, Some(0), Some(0)) };
        let said = ",\"expires\":\"2026-01-02T03:04:05.000001Z\"}\n";
        for (snapshot, row, before) in [
            (true, insert, "\"snapshot\":true"),
            (false, insert, "\"name\":null}"),
            (false, update, "\"old\":{\"name\":\"a\"}"),
        ] {
            let text = encoded(OldMode::Changed, &commit(snapshot, vec![row]));
            assert!(text.contains(&format!("{before}{said}")), "{text}");
        }
    }

    #[test]
    fn control_events() {
        let text = |of: LiveOutput| String::from_utf8(output(of).to_vec()).unwrap();
        let columns = vec![OutputColumn { name: "id".to_owned(), ty: wire::Type::BigInt }];
        let start = LiveOutput::Start {
            live_id: "l1".to_owned(),
            columns,
            key: vec!["id".to_owned()],
            semantics: Semantics::Map,
            requery: None,
            from: None,
        };
        assert_eq!(
            text(start),
            "event: start\ndata: {\"live_id\":\"l1\",\"columns\":[{\"name\":\"id\",\"type\":\"BIGINT\"}],\
             \"key\":[\"id\"],\"semantics\":\"map\",\"mode\":\"incremental\",\"from\":\"snapshot\"}\n\n"
        );
        let uptodate = LiveOutput::UpToDate { position: "a-1-b".to_owned(), seq: Seq(1) };
        assert_eq!(text(uptodate), "event: uptodate\nid: a-1-b\ndata: {\"seq\":1}\n\n");
        assert_eq!(text(LiveOutput::Resync(ResyncReason::Epoch)), "event: resync\ndata: {\"reason\":\"epoch\"}\n\n");
        let stage = Stage { name: "late".to_owned(), version: 2, sha256: "ab".to_owned(), params: String::new() };
        let pipeline = LiveOutput::Pipeline { plugin: "late".to_owned(), version: 2, sha256: "ab".to_owned() };
        assert_eq!(text(pipeline), "event: pipeline\ndata: {\"plugin\":\"late\",\"version\":2,\"sha256\":\"ab\"}\n\n");
        let fault = PipelineFault {
            plugin: Some(Box::new(stage)),
            cause: "trap",
            message: "one\ntwo".to_owned(),
            retry_after: None,
        };
        let nobody = PipelineFault { plugin: None, retry_after: Some(Duration::from_secs(2)), ..fault.clone() };
        let nobody = text(LiveOutput::PluginError { fault: nobody, seq: Seq(9) });
        assert!(!nobody.contains("\"plugin\"") && nobody.contains("\"retry_after_ms\":2000"), "{nobody}");
        let fault = LiveOutput::PluginError { fault, seq: Seq(9) };
        let fault = text(fault);
        assert!(fault.starts_with("event: plugin-error\ndata: {") && fault.ends_with("}\n\n"), "{fault}");
        assert!(fault.contains("\"cause\":\"trap\"") && fault.contains("\"seq\":9"), "{fault}");
        assert_eq!(fault.lines().count(), 3, "{fault}");
    }

    #[test]
    fn hello_spreads_the_retry() {
        for _ in 0..100 {
            let text = String::from_utf8(hello(RETRY).to_vec()).unwrap();
            let millis: u64 = text.strip_prefix(": hello\nretry: ").unwrap().trim().parse().unwrap();
            assert!((1_500..=2_000).contains(&millis), "{text}");
        }
    }
}
