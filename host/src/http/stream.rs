//! A live stream as a response: hello at once, then what `db` delivers, until one side ends it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use rand::Rng;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
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
    let sender = Sender {
        hello: Some(sse::hello(sse::RETRY)),
        quiet: Box::pin(tokio::time::sleep(subscriber.idle)),
        sent: Instant::now(),
        draining: Box::pin(subscriber.draining.clone().cancelled_owned()),
        replaced: match &subscriber.ticket {
            Some(ticket) => Box::pin(ticket.replaced().clone().cancelled_owned()),
            None => Box::pin(std::future::pending()),
        },
        end: None,
        subscriber,
    };
    let events = futures::stream::unfold(Some(sender), |sender| async move {
        let mut sender = sender?;
        let (bytes, sender) = match sender.step().await {
            Step::Send(bytes) => (bytes, Some(sender)),
            Step::Close(problem) => (sse::closed(&problem), None),
            Step::End => return None,
        };
        if let Some(sender) = &sender {
            sender.subscriber.metrics.event_bytes_sent.inc_by(bytes.len() as u64);
        }
        Some((Ok::<_, std::convert::Infallible>(bytes), sender))
    });
    event_stream(Body::from_stream(events))
}

/// What waits beside the events is made once a stream: registering it again for every event would cost more than the event.
struct Sender {
    subscriber: Subscriber,
    hello: Option<Bytes>,
    /// Rings when the stream may have been quiet for long; whether it was is seen by `sent`.
    quiet: Pin<Box<Sleep>>,
    sent: Instant,
    draining: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Another connection took the stream over.
    replaced: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// While the server goes down: when this stream ends.
    end: Option<Pin<Box<Sleep>>>,
}

impl Sender {
    async fn step(&mut self) -> Step {
        if let Some(hello) = self.hello.take() {
            return Step::Send(hello);
        }
        loop {
            let draining = self.end.is_none();
            tokio::select! {
                biased;
                () = at(&mut self.end) => return Step::Close(closing()),
                () = self.replaced.as_mut() => {
                    return Step::Close(Problem::new(409, "replaced", "another connection took this stream over"));
                }
                () = self.draining.as_mut(), if draining => {
                    let spread = rand::rng().random_range(0..CLOSE_SPREAD.as_millis() as u64);
                    self.end = Some(Box::pin(tokio::time::sleep(Duration::from_millis(spread))));
                }
                output = self.subscriber.streams.next() => {
                    self.sent = Instant::now();
                    return output.map_or(Step::End, Step::Send);
                }
                () = self.quiet.as_mut() => {
                    let due = self.sent + self.subscriber.idle;
                    if due <= Instant::now() {
                        self.sent = Instant::now();
                        self.quiet.as_mut().reset(self.sent + self.subscriber.idle);
                        return Step::Send(sse::COMMENT);
                    }
                    self.quiet.as_mut().reset(due);
                }
            }
        }
    }
}

async fn at(end: &mut Option<Pin<Box<Sleep>>>) {
    match end {
        Some(end) => end.as_mut().await,
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
