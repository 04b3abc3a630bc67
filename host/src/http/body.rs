//! Request bodies: read whole or piece by piece, within a size, a speed and a share of the server's memory.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use http_body_util::BodyExt;
use hyper::body::Frame;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::error::Problem;

/// Bytes a second that a body must have on average, once the grace is over; slower ones are attacks or broken.
const SLOWEST: u64 = 1024;
const GRACE: Duration = Duration::from_secs(10);

const KIB: usize = 1024;

/// The memory that all request bodies together may take.
#[derive(Clone)]
pub struct Budget(Arc<Semaphore>);

/// A body in memory, with its share of the budget.
pub struct Received {
    pub bytes: Bytes,
    _share: Option<OwnedSemaphorePermit>,
}

impl Budget {
    pub fn new(bytes: usize) -> Budget {
        Budget(Arc::new(Semaphore::new((bytes / KIB).min(Semaphore::MAX_PERMITS))))
    }

    fn take(&self, kib: usize) -> Result<OwnedSemaphorePermit, Problem> {
        let kib = u32::try_from(kib).unwrap_or(u32::MAX);
        let busy = || Problem::new(503, "busy", "too many request bodies are being received; try again").retry_after(1);
        self.0.clone().try_acquire_many_owned(kib).map_err(|_| busy())
    }
}

/// The most bytes of one body, and which setting says so.
#[derive(Clone, Copy)]
pub struct Limit {
    pub bytes: usize,
    pub setting: &'static str,
}

/// Reads the whole body.
pub async fn receive(headers: &HeaderMap, body: Body, limit: Limit, budget: &Budget) -> Result<Received, Problem> {
    let mut incoming = Incoming::new(headers, body, budget)?;
    if announced(headers).is_some_and(|bytes| bytes > limit.bytes as u64) {
        return Err(limit.exceeded());
    }
    let mut received: Vec<u8> = Vec::new();
    while let Some(data) = incoming.next().await? {
        if received.len() + data.len() > limit.bytes {
            return Err(limit.exceeded());
        }
        incoming.hold(received.len() + data.len())?;
        received.extend_from_slice(&data);
    }
    Ok(Received { bytes: received.into(), _share: incoming.share })
}

/// The bytes that the body will have, where the client says so; no more of them are read.
pub fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// A body read piece by piece, as slow as [`SLOWEST`] at the most, with what is held of it taken from the budget.
pub struct Incoming<'a> {
    body: Body,
    budget: &'a Budget,
    share: Option<OwnedSemaphorePermit>,
    received: u64,
    /// Spent waiting for the client; what is done between two pieces is not its fault.
    waited: Duration,
}

impl Incoming<'_> {
    pub fn new<'a>(headers: &HeaderMap, body: Body, budget: &'a Budget) -> Result<Incoming<'a>, Problem> {
        refuse_encoded(headers)?;
        Ok(Incoming { body, budget, share: None, received: 0, waited: Duration::ZERO })
    }

    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Problem> {
        loop {
            let earned = GRACE + Duration::from_secs(self.received / SLOWEST);
            let began = Instant::now();
            let frame = timeout_at(began + earned.saturating_sub(self.waited), self.body.frame()).await;
            let frame = frame.map_err(|_| too_slow())?;
            self.waited += began.elapsed();
            let Some(frame) = frame else { return Ok(None) };
            let Ok(data) = frame.map_err(|_| cut())?.into_data() else { continue };
            self.received += data.len() as u64;
            return Ok(Some(data));
        }
    }

    /// Takes from the budget what is missing to hold this many bytes; nothing is given back before the end.
    pub fn hold(&mut self, bytes: usize) -> Result<(), Problem> {
        let held = self.share.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = self.budget.take(bytes.div_ceil(KIB).saturating_sub(held))?;
        match &mut self.share {
            Some(share) => share.merge(more),
            None => self.share = Some(more),
        }
        Ok(())
    }
}

/// The body of a refused request is read and thrown away up to here: a socket that is closed with unread bytes in it
/// takes the answer with it, and the client sees a broken connection instead of the reason.
const DISCARD: usize = 8 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(2);

/// What a handler left of a body.
pub struct Unread(Arc<Mutex<Option<Body>>>);

/// A body that comes back when it is dropped before its end.
struct Lent {
    body: Option<Body>,
    back: Arc<Mutex<Option<Body>>>,
}

/// The request with its body on loan.
pub fn lend(request: Request) -> (Request, Unread) {
    // A client that waits for a word before it sends must not be told to go on.
    let waits = request.headers().contains_key(header::EXPECT);
    if waits || request.body().is_end_stream() {
        return (request, Unread(Arc::default()));
    }
    let back = Arc::default();
    let unread = Unread(Arc::clone(&back));
    (request.map(|body| Body::new(Lent { body: Some(body), back })), unread)
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(cx);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.body = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        *self.back.lock().unwrap_or_else(PoisonError::into_inner) = self.body.take();
    }
}

impl Unread {
    /// Reads on to the end of the body, within bounds.
    pub async fn discard(self) {
        let Some(mut body) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let mut left = DISCARD;
        let read = async {
            while let Some(Ok(frame)) = body.frame().await {
                let bytes = frame.data_ref().map_or(0, Bytes::len);
                left = left.saturating_sub(bytes);
                if left == 0 {
                    return;
                }
            }
        };
        // Cut short, the client sees what it would have seen without this.
        let _ = tokio::time::timeout(DISCARD_TIME, read).await;
    }
}

fn refuse_encoded(headers: &HeaderMap) -> Result<(), Problem> {
    if headers.get_all(header::CONTENT_ENCODING).iter().all(|encoding| encoding == "identity") {
        return Ok(());
    }
    let detail = "compressed request bodies are not accepted; send it as it is";
    Err(Problem::new(415, "unsupported_encoding", detail))
}

impl Limit {
    fn exceeded(self) -> Problem {
        let Limit { bytes, setting } = self;
        let detail = format!("the request body is larger than {bytes} bytes, the most that {setting} allows");
        Problem::new(413, "body_too_large", detail)
    }
}

fn too_slow() -> Problem {
    Problem::new(408, "body_too_slow", format!("the request body came slower than {SLOWEST} bytes a second"))
}

fn cut() -> Problem {
    Problem::bad_request("the request body ended early")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(bytes: usize) -> Limit {
        Limit { bytes, setting: "server.body_bytes" }
    }

    async fn status(headers: HeaderMap, body: Body, bytes: usize, budget: &Budget) -> u16 {
        match receive(&headers, body, limit(bytes), budget).await {
            Ok(_) => 200,
            Err(problem) => problem.status().as_u16(),
        }
    }

    fn length(text: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(header::CONTENT_LENGTH, text.parse().unwrap())])
    }

    #[tokio::test]
    async fn what_a_refusal_leaves_is_read_to_its_end() {
        let pieces = || futures::stream::iter([Ok::<_, std::io::Error>("one"), Ok("two"), Ok("three")]);
        let (request, unread) = lend(Request::new(Body::from_stream(pieces())));
        let mut body = request.into_body();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "one");
        drop(body);
        let rest = unread.0.lock().unwrap().take().unwrap();
        assert_eq!(rest.collect().await.unwrap().to_bytes(), "twothree");

        let (request, unread) = lend(Request::new(Body::from_stream(pieces())));
        assert_eq!(request.into_body().collect().await.unwrap().to_bytes(), "onetwothree");
        assert!(unread.0.lock().unwrap().is_none());
        unread.discard().await;
    }

    #[tokio::test]
    async fn size_and_memory_are_limited() {
        let budget = Budget::new(4 * KIB);
        let none = HeaderMap::new();
        assert_eq!(status(none.clone(), Body::from("12345"), 5, &budget).await, 200);
        assert_eq!(status(none.clone(), Body::from("123456"), 5, &budget).await, 413);
        assert_eq!(status(length("6"), Body::empty(), 5, &budget).await, 413);
        assert_eq!(status(none.clone(), Body::from(vec![0; 5 * KIB]), 10 * KIB, &budget).await, 503);
        let held = receive(&none, Body::from(vec![0; 4 * KIB]), limit(10 * KIB), &budget).await.ok();
        assert_eq!(status(none.clone(), Body::from("1"), 5, &budget).await, 503);
        drop(held);
        assert_eq!(status(none, Body::from("1"), 5, &budget).await, 200);
        let gzip = HeaderMap::from_iter([(header::CONTENT_ENCODING, "gzip".parse().unwrap())]);
        assert_eq!(status(gzip, Body::from("1"), 5, &budget).await, 415);
    }
}
