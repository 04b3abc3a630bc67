//! Cuts connections whose client stops reading.
//!
//! A write that the socket does not take whole starts a clock; it stops when everything offered was taken. A client
//! that let the stall limit pass and took less than a trickle is cut: it costs its socket and nothing else, and a live
//! stream resumes from its last event id. This lies under HTTP, so it covers every kind of response. Only within an
//! HTTP/2 connection one stream can stall while the socket flows; [`paced`] is for those.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use http_body_util::{BodyExt, StreamBody};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep};

use crate::telemetry::Counter;

/// Bytes a second that keep a slow reader connected.
const TRICKLE: u64 = 1024;

pub struct Stalling<S> {
    inner: S,
    limit: Duration,
    waiting: Option<Waiting>,
    cut: Counter,
}

struct Waiting {
    until: Pin<Box<Sleep>>,
    /// Bytes taken since the clock started.
    taken: u64,
}

impl<S> Stalling<S> {
    /// `cut` counts the connections that were cut.
    pub fn new(inner: S, limit: Duration, cut: Counter) -> Stalling<S> {
        Stalling { inner, limit, waiting: None, cut }
    }

    /// Looks at what became of a write of `offered` bytes.
    fn judge(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<usize>>,
        offered: usize,
    ) -> Poll<io::Result<usize>> {
        let taken = match &result {
            Poll::Ready(Ok(taken)) if *taken >= offered => {
                self.waiting = None;
                return result;
            }
            Poll::Ready(Err(error)) => {
                // The kernel's clock (`Socket::give_up_after`) may have been the first to run out.
                if error.kind() == io::ErrorKind::TimedOut {
                    self.cut.inc();
                }
                return result;
            }
            Poll::Ready(Ok(taken)) => *taken as u64,
            Poll::Pending => 0,
        };
        let limit = self.limit;
        let start = || Waiting { until: Box::pin(tokio::time::sleep(limit)), taken: 0 };
        let waiting = self.waiting.get_or_insert_with(start);
        waiting.taken += taken;
        // Polled also when nothing is due, so that the clock wakes the connection.
        while waiting.until.as_mut().poll(cx).is_ready() {
            if waiting.taken < TRICKLE * limit.as_secs().max(1) {
                self.cut.inc();
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client stopped reading")));
            }
            waiting.taken = 0;
            waiting.until.as_mut().reset(Instant::now() + limit);
        }
        result
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Stalling<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Stalling<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.judge(cx, result, buf.len())
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.judge(cx, result, bufs.iter().map(|buf| buf.len()).sum())
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A streamed body that ends with an error when nobody takes its next frame within the limit. hyper does not look at a
/// body for which the client gives no HTTP/2 window, so a task of its own has to hold the body and the clock.
pub fn paced(mut body: Body, limit: Duration, cut: Counter) -> Body {
    let (sender, receiver) = mpsc::channel(1);
    let stalled = Arc::new(AtomicBool::new(false));
    let told = stalled.clone();
    tokio::spawn(async move {
        loop {
            let frame = tokio::select! {
                frame = body.frame() => frame,
                () = sender.closed() => return,
            };
            let Some(frame) = frame else { return };
            match tokio::time::timeout(limit, sender.send(frame)).await {
                Ok(Ok(())) => {}
                Ok(Err(_gone)) => return,
                Err(_elapsed) => {
                    told.store(true, Ordering::Release);
                    cut.inc();
                    return;
                }
            }
        }
    });
    let frames = futures::stream::unfold(Some(receiver), move |receiver| {
        let stalled = stalled.clone();
        async move {
            let mut receiver = receiver?;
            match receiver.recv().await {
                Some(frame) => Some((frame, Some(receiver))),
                // Without this a cut body would look like a whole one.
                None if stalled.load(Ordering::Acquire) => {
                    let error = io::Error::new(io::ErrorKind::TimedOut, "the client stopped reading");
                    Some((Err(axum::Error::new(error)), None))
                }
                None => None,
            }
        }
    });
    Body::new(StreamBody::new(frames))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const LIMIT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn a_reader_that_stops_is_cut() {
        let (ours, theirs) = tokio::io::duplex(16);
        let cut = Counter::default();
        let mut ours = Stalling::new(ours, LIMIT, cut.clone());
        let error = ours.write_all(&[0; 64]).await.unwrap_err();
        assert_eq!((error.kind(), cut.get()), (io::ErrorKind::TimedOut, 1));
        drop(theirs);
    }

    #[tokio::test]
    async fn a_body_that_nobody_takes_ends_with_an_error() {
        let pieces = || Body::from_stream(futures::stream::iter(["one", "two", "three"].map(Ok::<_, io::Error>)));
        let whole = paced(pieces(), LIMIT, Counter::default()).collect().await.unwrap().to_bytes();
        assert_eq!(whole, "onetwothree");

        let cut = Counter::default();
        let body = paced(pieces(), LIMIT, cut.clone());
        while cut.get() == 0 {
            tokio::task::yield_now().await;
        }
        assert!(body.collect().await.is_err());
    }

    #[tokio::test]
    async fn a_reader_that_goes_on_is_served() {
        let (ours, mut theirs) = tokio::io::duplex(16);
        // Longer than the machine forgets a reader.
        let mut ours = Stalling::new(ours, Duration::from_secs(60), Counter::default());
        let reader = tokio::spawn(async move {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).await.map(|_| all.len())
        });
        ours.write_all(&[0; 4096]).await.unwrap();
        ours.shutdown().await.unwrap();
        assert_eq!(reader.await.unwrap().unwrap(), 4096);
    }
}
