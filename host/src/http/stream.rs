//! A live stream as a response: hello at once, then what `db` delivers, until one side ends it.

use std::future::Future;
use std::io::{self, IoSlice, Write};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use axum::body::{Body, Bytes};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use rand::Rng;
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::error::Problem;
use super::limits::Counted;
use super::several::Streams;
use super::socket::Socket;
use super::sse;
use super::stall::Stalling;
use super::tickets::TicketUse;
use crate::db::{AnyOutlet, DbError, Outlet, Sink};
use crate::telemetry::Metrics;

/// When the server goes down, streams end over this long, so that their clients do not all come back at once.
pub const CLOSE_SPREAD: Duration = Duration::from_secs(2);

/// One subscriber's connection to its stream.
pub struct Subscriber {
    pub streams: Streams,
    /// Something is sent at least this often.
    pub heartbeat: Duration,
    pub draining: CancellationToken,
    pub ticket: Option<TicketUse>,
    pub metrics: Arc<Metrics>,
    /// Counted until dropped, so that shutdown can wait for streams.
    pub open: TaskTrackerToken,
    pub counted: Arc<Counted>,
}

/// What to do next.
enum Step {
    Send(Bytes),
    /// A last word, then the end.
    Close(Problem),
    End,
}

/// The stream as a response. Over HTTP/1.1 its connection takes it, where it offers to: see [`Handover`].
pub fn respond(subscriber: Subscriber, handover: Option<Handover>) -> Response {
    let sender = Sender::new(subscriber);
    if let Some(handover) = handover {
        handover.give(sender);
        return event_stream(Body::empty());
    }
    let events = futures::stream::unfold(Some(sender), |sender| async move {
        let mut sender = sender?;
        match sender.step(None).await {
            Step::Send(bytes) => Some((Ok::<_, std::convert::Infallible>(bytes), Some(sender))),
            Step::Close(problem) => Some((Ok(sse::closed(&problem)), None)),
            Step::End => None,
        }
    });
    event_stream(Body::from_stream(events))
}

/// Where a connection over HTTP/1.1 finds the stream that it shall send from now on.
///
/// Such a connection has nothing else to do until it closes, and hyper is made for those that do: its buffers, and the
/// way of every event through body, encoder and queue, cost more than the event. So [`run`] writes to the socket itself.
///
/// One for a connection, whose requests come one after the other: what was given ends hyper's part of it ([`TakenOver`]).
#[derive(Clone, Default)]
pub struct Handover(Arc<Mutex<Option<Box<Sender>>>>);

impl Handover {
    fn slot(&self) -> MutexGuard<'_, Option<Box<Sender>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(&self, sender: Sender) {
        *self.slot() = Some(Box::new(sender));
    }

    /// What hyper is told when a request was answered.
    pub fn answered(&self, response: Response) -> Result<Response, TakenOver> {
        if self.slot().is_some() { Err(TakenOver) } else { Ok(response) }
    }

    pub fn take(&self) -> Option<Box<Sender>> {
        self.slot().take()
    }
}

/// For hyper, which ends a connection at an error without sending anything more: a live stream has it from here on.
#[derive(Debug, thiserror::Error)]
#[error("a live stream has taken the connection over")]
pub struct TakenOver;

/// Sends a stream in chunks of HTTP/1.1 until it ends, the client goes, or stops reading.
pub async fn run(mut sender: Box<Sender>, socket: Socket, stall_limit: Duration) {
    // After the limit for readers that stop: those are told, and counted.
    if let Err(error) = socket.give_up_after(2 * stall_limit) {
        tracing::debug!(%error, "TCP_USER_TIMEOUT");
    }
    let cut = sender.subscriber.metrics.http_stalled.clone();
    let mut to = Stalling::new(socket.clone(), stall_limit, cut.clone());
    let mut before = head(&event_stream(Body::empty()));
    let lent = Lent::new(socket.clone(), sender.subscriber.metrics.clone());
    loop {
        let step = tokio::select! {
            biased;
            step = sender.step(Some(&lent)) => step,
            closed = socket.closed() => {
                if closed.is_err_and(|error| error.kind() == io::ErrorKind::TimedOut) {
                    cut.inc();
                }
                return;
            }
        };
        // From here on nobody else sends.
        let left = lent.chunks.sink.take_left();
        let (bytes, last) = match step {
            Step::Send(bytes) => (bytes, false),
            Step::Close(problem) => (sse::closed(&problem), true),
            Step::End => (Bytes::new(), true),
        };
        // An empty chunk would be the last.
        let (line, len) = if bytes.is_empty() { Default::default() } else { size_line(bytes.len()) };
        let after: &[u8] = match (bytes.is_empty(), last) {
            (false, false) => b"\r\n",
            (false, true) => b"\r\n0\r\n\r\n",
            (true, false) => b"",
            (true, true) => b"0\r\n\r\n",
        };
        let parts = [&before[..], &left[0], &left[1], &left[2], &line[..len], &bytes, after];
        let written = write_whole(&mut to, parts).await;
        if last || written.is_err() {
            // Whoever has gone does not care.
            let _ = to.shutdown().await;
            return;
        }
        // Not kept for the stream's life.
        before = Vec::new();
    }
}

/// What a stream lends while it waits for events.
struct Lent {
    chunks: Arc<Outlet<Chunks>>,
    /// The same, as it is lent.
    outlet: AnyOutlet,
}

impl Lent {
    fn new(socket: Socket, metrics: Arc<Metrics>) -> Lent {
        let chunks = Chunks { socket, metrics, left: Mutex::default() };
        let chunks = Arc::new(Outlet::new(chunks));
        Lent { outlet: chunks.clone(), chunks }
    }
}

/// Events as chunks of HTTP/1.1, sent by others while the stream's task waits.
struct Chunks {
    socket: Socket,
    metrics: Arc<Metrics>,
    /// The rest of a chunk that the socket did not take whole; its events are everybody's.
    left: Mutex<[Bytes; 3]>,
}

impl Sink for Chunks {
    fn take(&self, events: &Bytes) -> bool {
        self.metrics.event_bytes_sent.inc_by(events.len() as u64);
        let (head, len) = size_line(events.len());
        let parts: [&[u8]; 3] = [&head[..len], events, b"\r\n"];
        // A connection that broke is found by the stream's own task, when it sends what is left.
        let mut taken = self.socket.try_write(&parts.map(IoSlice::new)).unwrap_or(0);
        let whole = taken == parts.iter().map(|part| part.len()).sum::<usize>();
        if !whole {
            let chunk = [Bytes::copy_from_slice(&head[..len]), events.clone(), Bytes::from_static(b"\r\n")];
            let left = chunk.map(|part| {
                let sent = taken.min(part.len());
                taken -= sent;
                part.slice(sent..)
            });
            *self.left.lock().unwrap_or_else(PoisonError::into_inner) = left;
        }
        whole
    }
}

impl Chunks {
    fn take_left(&self) -> [Bytes; 3] {
        std::mem::take(&mut *self.left.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The line in front of a chunk of so many bytes, and its length.
fn size_line(bytes: usize) -> ([u8; 18], usize) {
    let mut line = [0; 18];
    let mut rest = &mut line[..];
    write!(rest, "{bytes:x}\r\n").expect("sixteen digits and two bytes are the most");
    let left = rest.len();
    (line, 18 - left)
}

async fn write_whole<const N: usize>(to: &mut Stalling<Socket>, parts: [&[u8]; N]) -> io::Result<()> {
    let mut slices = parts.map(IoSlice::new);
    let mut left = &mut slices[..];
    while left.iter().any(|slice| !slice.is_empty()) {
        let taken = to.write_vectored(left).await?;
        if taken == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut left, taken);
    }
    Ok(())
}

/// The head of the response, as hyper would write it.
fn head(response: &Response) -> Vec<u8> {
    let mut head = format!("HTTP/1.1 {}\r\n", response.status()).into_bytes();
    for (name, value) in response.headers() {
        // The body that is sent is not the response's own.
        if *name != header::CONTENT_LENGTH {
            head.extend_from_slice(name.as_ref());
            head.extend_from_slice(b": ");
            head.extend_from_slice(value.as_bytes());
            head.extend_from_slice(b"\r\n");
        }
    }
    let date = httpdate::fmt_http_date(SystemTime::now());
    let rest = format!("transfer-encoding: chunked\r\nconnection: close\r\ndate: {date}\r\n\r\n");
    head.extend_from_slice(rest.as_bytes());
    head
}

/// What waits beside the events is made once a stream: registering it again for every event would cost more than the event.
pub struct Sender {
    subscriber: Subscriber,
    hello: Option<Bytes>,
    heartbeat: Heartbeat,
    draining: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Another connection took the stream over.
    replaced: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// While the server goes down: when this stream ends.
    end: Option<Pin<Box<Sleep>>>,
}

impl Sender {
    fn new(subscriber: Subscriber) -> Sender {
        Sender {
            hello: Some(sse::hello(sse::RETRY)),
            heartbeat: Heartbeat::every(subscriber.heartbeat),
            draining: Box::pin(subscriber.draining.clone().cancelled_owned()),
            replaced: match &subscriber.ticket {
                Some(ticket) => Box::pin(ticket.replaced().clone().cancelled_owned()),
                None => Box::pin(std::future::pending()),
            },
            end: None,
            subscriber,
        }
    }

    /// Cancel-safe.
    async fn step(&mut self, lent: Option<&Lent>) -> Step {
        let step = match self.hello.take() {
            Some(hello) => Step::Send(hello),
            None => self.next(lent).await,
        };
        if let Step::Send(bytes) = &step {
            self.subscriber.metrics.event_bytes_sent.inc_by(bytes.len() as u64);
        }
        step
    }

    async fn next(&mut self, lent: Option<&Lent>) -> Step {
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
                // Before what comes: one query that always has something to say shall not hide how far the others are.
                () = self.heartbeat.beat() => return Step::Send(self.subscriber.streams.progress()),
                output = self.subscriber.streams.next(lent.map(|lent| &lent.outlet)) => {
                    return output.map_or(Step::End, Step::Send);
                }
            }
        }
    }
}

/// When a stream says how far it is, or at least that it lives: whatever it waits for and whatever else it has sent, so
/// that one timer is all there is to it.
struct Heartbeat {
    period: Duration,
    next: Pin<Box<Sleep>>,
}

impl Heartbeat {
    fn every(period: Duration) -> Heartbeat {
        // A random phase: streams that were opened together shall not beat together.
        Heartbeat { period, next: Box::pin(tokio::time::sleep(period.mul_f64(rand::random()))) }
    }

    /// Resolves when it is time. Cancel-safe: a beat that nobody waited for comes at the next call.
    async fn beat(&mut self) {
        self.next.as_mut().await;
        // The next one keeps the phase, however late this one was.
        let (now, mut next) = (Instant::now(), self.next.deadline());
        while next <= now {
            next += self.period;
        }
        self.next.as_mut().reset(next);
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
