//! A live stream as a response: hello at once, then what `db` delivers, until one side ends it.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use rand::Rng;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::error::Problem;
use super::limits::Counted;
use super::several::Streams;
use super::sse;
use super::tickets::TicketUse;
use crate::db::DbError;
use crate::telemetry::Metrics;

/// When the server goes down, streams end over this long, so that their clients do not all come back at once.
pub const CLOSE_SPREAD: Duration = Duration::from_secs(2);

/// One subscriber's connection to its stream.
pub struct Subscriber {
    pub streams: Streams,
    /// Something is sent at least this often.
    pub idle: Duration,
    pub draining: CancellationToken,
    pub ticket: Option<TicketUse>,
    pub metrics: Arc<Metrics>,
    /// Counted until dropped, so that shutdown can wait for streams.
    pub open: TaskTrackerToken,
    pub counted: Counted,
}

/// What to do next.
enum Step {
    Send(Bytes),
    /// A last word, then the end.
    Close(Problem),
    End,
}

pub fn respond(subscriber: Subscriber) -> Response {
    let hello = sse::hello(sse::RETRY);
    let state = Some((subscriber, Some(hello), None));
    let events = futures::stream::unfold(state, |state| async move {
        let (mut subscriber, hello, mut end_at) = state?;
        let step = match hello {
            Some(hello) => Step::Send(hello),
            None => subscriber.step(&mut end_at).await,
        };
        let (bytes, state) = match step {
            Step::Send(bytes) => (bytes, Some((subscriber, None, end_at))),
            Step::Close(problem) => (sse::closed(&problem), None),
            Step::End => return None,
        };
        if let Some((subscriber, ..)) = &state {
            subscriber.metrics.event_bytes_sent.inc_by(bytes.len() as u64);
        }
        Some((Ok::<_, std::convert::Infallible>(bytes), state))
    });
    event_stream(Body::from_stream(events))
}

impl Subscriber {
    async fn step(&mut self, end_at: &mut Option<Instant>) -> Step {
        loop {
            let replaced = self.ticket.as_ref().map(|ticket| ticket.replaced().clone());
            tokio::select! {
                biased;
                () = at(*end_at) => return Step::Close(closing()),
                () = cancelled(replaced) => {
                    return Step::Close(Problem::new(409, "replaced", "another connection took this stream over"));
                }
                () = self.draining.cancelled(), if end_at.is_none() => {
                    let spread = rand::rng().random_range(0..CLOSE_SPREAD.as_millis() as u64);
                    *end_at = Some(Instant::now() + Duration::from_millis(spread));
                }
                output = tokio::time::timeout(self.idle, self.streams.next()) => return match output {
                    Ok(Some(bytes)) => Step::Send(bytes),
                    Ok(None) => Step::End,
                    Err(_) => Step::Send(sse::COMMENT),
                },
            }
        }
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

async fn cancelled(token: Option<CancellationToken>) {
    match token {
        Some(token) => token.cancelled_owned().await,
        None => std::future::pending().await,
    }
}

fn closing() -> Problem {
    DbError::Closed.into()
}

/// A stream that cannot be opened now but should be tried again. Browsers take any status but 200 as final, so an
/// overloaded reconnect gets a stream that says when to come back, and ends.
pub fn busy(problem: &Problem) -> Response {
    let mut body = sse::hello(sse::RETRY_BUSY).to_vec();
    body.extend_from_slice(&sse::closed(problem));
    event_stream(Body::from(body))
}

fn event_stream(body: Body) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache, no-store")),
        // nginx would hold events back until its buffer is full.
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, body).into_response()
}
