//! Request bodies: read whole, within a size, a speed and a share of the server's memory.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, header};
use http_body_util::BodyExt;
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

/// Reads the whole body of at most `limit` bytes.
pub async fn receive(headers: &HeaderMap, body: Body, limit: usize, budget: &Budget) -> Result<Received, Problem> {
    refuse_encoded(headers)?;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > limit as u64) {
        return Err(too_large(limit));
    }
    let started = Instant::now();
    let mut body = std::pin::pin!(body);
    let mut received: Vec<u8> = Vec::new();
    let mut share: Option<OwnedSemaphorePermit> = None;
    loop {
        let earned = Duration::from_secs(received.len() as u64 / SLOWEST);
        let frame = timeout_at(started + GRACE + earned, body.frame()).await.map_err(|_| too_slow())?;
        let Some(frame) = frame else { break };
        let Ok(data) = frame.map_err(|_| cut())?.into_data() else { continue };
        if received.len() + data.len() > limit {
            return Err(too_large(limit));
        }
        let held = share.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = budget.take((received.len() + data.len()).div_ceil(KIB) - held)?;
        match &mut share {
            Some(share) => share.merge(more),
            None => share = Some(more),
        }
        received.extend_from_slice(&data);
    }
    Ok(Received { bytes: received.into(), _share: share })
}

fn refuse_encoded(headers: &HeaderMap) -> Result<(), Problem> {
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => Err(Problem::new(
            415,
            "unsupported_encoding",
            "compressed request bodies are not accepted; send it as it is",
        )),
        _ => Ok(()),
    }
}

fn too_large(limit: usize) -> Problem {
    Problem::new(413, "body_too_large", format!("the request body is larger than {limit} bytes; split it"))
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

    async fn status(headers: HeaderMap, body: Body, limit: usize, budget: &Budget) -> u16 {
        match receive(&headers, body, limit, budget).await {
            Ok(_) => 200,
            Err(problem) => problem.status().as_u16(),
        }
    }

    fn length(text: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(header::CONTENT_LENGTH, text.parse().unwrap())])
    }

    #[tokio::test]
    async fn size_and_memory_are_limited() {
        let budget = Budget::new(4 * KIB);
        let none = HeaderMap::new();
        assert_eq!(status(none.clone(), Body::from("12345"), 5, &budget).await, 200);
        assert_eq!(status(none.clone(), Body::from("123456"), 5, &budget).await, 413);
        assert_eq!(status(length("6"), Body::empty(), 5, &budget).await, 413);
        assert_eq!(status(none.clone(), Body::from(vec![0; 5 * KIB]), 10 * KIB, &budget).await, 503);
        let held = receive(&none, Body::from(vec![0; 4 * KIB]), 10 * KIB, &budget).await.ok();
        assert_eq!(status(none.clone(), Body::from("1"), 5, &budget).await, 503);
        drop(held);
        assert_eq!(status(none, Body::from("1"), 5, &budget).await, 200);
        let gzip = HeaderMap::from_iter([(header::CONTENT_ENCODING, "gzip".parse().unwrap())]);
        assert_eq!(status(gzip, Body::from("1"), 5, &budget).await, 415);
    }
}
