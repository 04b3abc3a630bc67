//! One stream, one or several live queries.
//!
//! With several every event says which query it is of (`"q"`), and every id carries the positions of all: what a client
//! sends back brings each query to where it was. Positions are joined by `~`; a query that has none yet is `_`, and
//! starts afresh. The events of a query are encoded once for all its subscribers, so the marks are put in here, on the
//! way out.

use bytes::Bytes;
use futures::future::select_all;
use serde_json::Value;

use super::sse;
use crate::db::{AnyOutlet, LiveOutput, LiveStream};

/// Between the positions of an id.
const JOINT: char = '~';
/// In the place of a position that is not there yet.
const NONE: &str = "_";

/// The streams of one connection.
pub struct Streams {
    queries: Vec<Query>,
    /// Who is asked first: a busy query shall not starve the others.
    turn: usize,
    /// `None`: one query, its events as they are.
    marks: Option<Vec<Mark>>,
}

struct Query {
    stream: LiveStream,
    ended: bool,
}

struct Mark {
    /// The query's name as JSON.
    name: String,
    position: Option<String>,
}

impl Streams {
    pub fn one(stream: LiveStream) -> Streams {
        Streams { queries: vec![Query { stream, ended: false }], turn: 0, marks: None }
    }

    /// Each with its name and the position it was opened with.
    pub fn several(streams: Vec<(LiveStream, Value, Option<String>)>) -> Streams {
        let (mut queries, mut marks) = (Vec::new(), Vec::new());
        for (stream, name, position) in streams {
            queries.push(Query { stream, ended: false });
            marks.push(Mark { name: name.to_string(), position });
        }
        Streams { queries, turn: 0, marks: Some(marks) }
    }

    /// The next thing to send; `None` after the end of the last query. Cancel-safe, as its streams are.
    /// With an outlet, events of one query may go there while this waits, as they are.
    pub async fn next(&mut self, outlet: Option<&AnyOutlet>) -> Option<Bytes> {
        let outlet = outlet.filter(|_| self.marks.is_none());
        loop {
            let (at, output) = self.any(outlet).await?;
            let Some(output) = output else {
                self.queries[at].ended = true;
                continue;
            };
            return Some(self.framed(at, output));
        }
    }

    /// What is said at the heartbeat, between two calls of `next`: how far those queries are that only wait; a comment
    /// where none does.
    pub fn progress(&mut self) -> Bytes {
        let mut said = Vec::new();
        for at in 0..self.queries.len() {
            if let Some(output) = self.queries[at].stream.progress() {
                said.extend_from_slice(&self.framed(at, output));
            }
        }
        if said.is_empty() { sse::COMMENT } else { said.into() }
    }

    fn framed(&mut self, at: usize, output: LiveOutput) -> Bytes {
        let Some(marks) = &mut self.marks else { return sse::output(output) };
        // What the client holds of the query is void, and so is where it was.
        if matches!(output, LiveOutput::Resync(_) | LiveOutput::Start { from: None, .. }) {
            marks[at].position = None;
        }
        mark(marks, at, &sse::output(output))
    }

    /// From whichever query has something first.
    async fn any(&mut self, outlet: Option<&AnyOutlet>) -> Option<(usize, Option<LiveOutput>)> {
        let count = self.queries.len();
        if let [query] = self.queries.as_mut_slice() {
            return if query.ended { None } else { Some((0, query.stream.next(outlet).await)) };
        }
        let mut waiting: Vec<_> = self.queries.iter_mut().enumerate().filter(|(_, query)| !query.ended).collect();
        if waiting.is_empty() {
            return None;
        }
        let first = waiting.partition_point(|(at, _)| *at < self.turn);
        waiting.rotate_left(first);
        let next = waiting.into_iter().map(|(at, query)| Box::pin(async move { (at, query.stream.next(None).await) }));
        let ((at, output), ..) = select_all(next).await;
        self.turn = (at + 1) % count;
        Some((at, output))
    }
}

/// Says in every event of `text` which query it is of, and in every id where all of them are.
fn mark(marks: &mut [Mark], at: usize, text: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(text.len() + 64);
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        if let Some(id) = line.strip_prefix(b"id: ") {
            marks[at].position = Some(String::from_utf8_lossy(id).trim_end().to_owned());
            out.extend_from_slice(b"id: ");
            out.extend_from_slice(join(marks).as_bytes());
            out.push(b'\n');
        } else if let Some(rest) = line.strip_prefix(b"data: {") {
            out.extend_from_slice(b"data: {\"q\":");
            out.extend_from_slice(marks[at].name.as_bytes());
            if !rest.starts_with(b"}") {
                out.push(b',');
            }
            out.extend_from_slice(rest);
        } else {
            out.extend_from_slice(line);
        }
    }
    out.into()
}

fn join(marks: &[Mark]) -> String {
    let mut id = String::new();
    for (at, mark) in marks.iter().enumerate() {
        if at > 0 {
            id.push(JOINT);
        }
        id.push_str(mark.position.as_deref().unwrap_or(NONE));
    }
    id
}

/// The positions of an id, one for each of `count` queries; `None`: not an id of so many.
pub fn split(id: &str, count: usize) -> Option<Vec<Option<String>>> {
    let positions: Vec<Option<String>> =
        id.split(JOINT).map(|position| (position != NONE).then(|| position.to_owned())).collect();
    (positions.len() == count).then_some(positions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_say_of_which_query_they_are_and_ids_carry_all() {
        let mut marks =
            [("0", None), ("\"b\"", Some("e-7-f")), ("2", None)].map(|(name, position): (&str, Option<&str>)| Mark {
                name: name.to_owned(),
                position: position.map(str::to_owned),
            });
        let text = b"event: insert\ndata: {\"key\":{}}\n\nevent: delete\nid: e-9-g\ndata: {}\n\n:\n\n";
        let marked = mark(&mut marks, 0, text);
        let expected = "event: insert\ndata: {\"q\":0,\"key\":{}}\n\n\
                        event: delete\nid: e-9-g~e-7-f~_\ndata: {\"q\":0}\n\n:\n\n";
        assert_eq!(std::str::from_utf8(&marked).unwrap(), expected);
        let marked = mark(&mut marks, 1, b"event: uptodate\nid: e-10-f\ndata: {\"seq\":10}\n\n");
        let expected = "event: uptodate\nid: e-9-g~e-10-f~_\ndata: {\"q\":\"b\",\"seq\":10}\n\n";
        assert_eq!(std::str::from_utf8(&marked).unwrap(), expected);

        let positions = split("e-9-g~e-10-f~_", 3).unwrap();
        assert_eq!(positions, [Some("e-9-g".to_owned()), Some("e-10-f".to_owned()), None]);
        assert_eq!(split("e-9-g~e-10-f", 3), None);
        assert_eq!(split("e-9-g", 1), Some(vec![Some("e-9-g".to_owned())]));
    }
}
