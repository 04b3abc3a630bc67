//! The accept loop: bounded connections, timers against slow clients, an orderly end.
//!
//! Order of the end: not ready and no new calls at once; streams close over a short spread while connections are still
//! accepted (so that probes see why); then no new connections, requests finish, and whatever is left after the deadline
//! is dropped.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Version};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::routes::{App, Peer, handle, router};
use super::socket::Socket;
use super::stall::Stalling;
use super::stream::{self, CLOSE_SPREAD, Handover, Sender};
use crate::telemetry::Metrics;

/// After the streams' spread, how long running requests may take to finish; longer than the default query deadline.
const FINISH: Duration = Duration::from_secs(8);
/// Longer than the spread itself: a closing stream still has to leave its socket.
const DRAIN: Duration = CLOSE_SPREAD.saturating_add(Duration::from_secs(1));

/// 64 header lines in 16 KiB are plenty for any client; more is an attack.
pub(super) const MAX_HEADERS: usize = 64;
const HEADER_BYTES: usize = 16 * 1024;
/// Streams of one HTTP/2 connection.
const H2_STREAMS: u32 = 200;
/// Reset streams that may wait for us: the rapid-reset attack lives from this.
const H2_RESETS: usize = 20;
const H2_PING: Duration = Duration::from_secs(20);

/// Waits between failed accepts: out of descriptors, the loop must not spin.
const BACK_OFF: Duration = Duration::from_millis(10);
const BACK_OFF_MAX: Duration = Duration::from_secs(1);

/// Descriptors that stay free for the store and the logs.
const RESERVED_FILES: u64 = 200;

/// Serves until `shutdown` resolves and everything is finished.
pub async fn run(listener: TcpListener, app: App, shutdown: impl Future<Output = ()>) {
    let server = Server::new(app);
    let mut shutdown = std::pin::pin!(shutdown);
    tokio::select! {
        () = &mut shutdown => {}
        () = server.accept(&listener) => {}
    }
    tracing::info!("shutting down");
    server.app.draining.cancel();
    server.app.streams.close();
    tokio::select! {
        () = server.accept(&listener) => {}
        drained = tokio::time::timeout(DRAIN, server.app.streams.wait()) => {
            if drained.is_err() {
                tracing::warn!(streams = server.app.streams.len(), "some streams did not close in time");
            }
        }
    }
    drop(listener);
    // Whatever stream is left ends now.
    server.app.db.start_closing();
    server.closing.cancel();
    server.connections.close();
    if tokio::time::timeout(FINISH, server.connections.wait()).await.is_err() {
        tracing::warn!(connections = server.connections.len(), "requests did not finish in time and are dropped");
    }
    server.aborting.cancel();
    server.connections.wait().await;
}

struct Server {
    app: App,
    router: Router,
    builder: Arc<auto::Builder<TokioExecutor>>,
    free: Arc<Semaphore>,
    connections: TaskTracker,
    /// Connections finish what they have and end.
    closing: CancellationToken,
    /// Connections end as they are.
    aborting: CancellationToken,
}

impl Server {
    fn new(app: App) -> Server {
        let max_connections = affordable(app.options.max_connections);
        Server {
            router: router(app.clone()),
            builder: Arc::new(builder(app.options.header_timeout)),
            free: Arc::new(Semaphore::new(max_connections)),
            connections: TaskTracker::new(),
            closing: CancellationToken::new(),
            aborting: CancellationToken::new(),
            app,
        }
    }

    /// Accepts for ever.
    async fn accept(&self, listener: &TcpListener) {
        let mut back_off = BACK_OFF;
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    back_off = BACK_OFF;
                    self.admit(stream, peer);
                }
                // The client's own hurry: the next one is waiting already.
                Err(error) if is_connection_error(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, wait_ms = back_off.as_millis() as u64, "accepting connections fails");
                    tokio::time::sleep(back_off).await;
                    back_off = (back_off * 2).min(BACK_OFF_MAX);
                }
            }
        }
    }

    fn admit(&self, stream: TcpStream, peer: SocketAddr) {
        let Ok(permit) = self.free.clone().try_acquire_owned() else {
            self.app.metrics.http_refused.inc();
            return turn_away(&stream);
        };
        let connection = Connection {
            app: self.app.clone(),
            router: self.router.clone(),
            builder: self.builder.clone(),
            closing: self.closing.clone(),
            aborting: self.aborting.clone(),
        };
        let open = Open::new(permit, &self.app.metrics);
        let (connections, aborting) = (self.connections.clone(), self.aborting.clone());
        let stall_limit = self.app.options.stall_limit;
        self.connections.spawn(async move {
            // Events are small and each is worth its own packet.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "TCP_NODELAY");
            }
            let socket = Socket::new(stream);
            let Some(sender) = connection.serve(socket.clone(), peer).await else { return };
            // A task of its own: this one has hyper's connection in its frame, for as long as it lives.
            connections.spawn(async move {
                let _open = open;
                aborting.run_until_cancelled(stream::run(sender, socket, stall_limit)).await;
            });
        });
    }
}

/// Counted as an open connection until it is dropped.
struct Open {
    _permit: OwnedSemaphorePermit,
    metrics: Arc<Metrics>,
}

impl Open {
    fn new(permit: OwnedSemaphorePermit, metrics: &Arc<Metrics>) -> Open {
        metrics.http_connections.inc();
        Open { _permit: permit, metrics: metrics.clone() }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.metrics.http_connections.dec();
    }
}

fn is_connection_error(error: &io::Error) -> bool {
    use io::ErrorKind::*;
    matches!(error.kind(), ConnectionRefused | ConnectionAborted | ConnectionReset | Interrupted)
}

/// A word to a client for whom there is no room; whatever the socket does not take at once is not worth waiting for.
fn turn_away(stream: &TcpStream) {
    const BODY: &str = r#"{"type":"urn:tidegate:problem:too_many","title":"Service Unavailable","status":503,"detail":"too many connections are open; try again","code":"too_many"}"#;
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 2\r\n\
         Connection: close\r\nContent-Length: {}\r\n\r\n{BODY}\n",
        BODY.len() + 1
    );
    let _ = stream.try_write(answer.as_bytes());
}

/// As many connections as asked for, but never so many that the store runs out of file descriptors.
fn affordable(max_connections: usize) -> usize {
    let Some(files) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current else {
        return max_connections;
    };
    let room = usize::try_from((files / 10 * 9).saturating_sub(RESERVED_FILES).max(8)).unwrap_or(usize::MAX);
    if room < max_connections {
        tracing::warn!(
            room,
            asked = max_connections,
            "the limit of open files ({files}) allows fewer connections than server.max_connections; raise it (ulimit -n)"
        );
    }
    room.min(max_connections)
}

fn builder(header_timeout: Duration) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS)
        .max_pending_accept_reset_streams(H2_RESETS)
        .max_local_error_reset_streams(H2_RESETS)
        .max_header_list_size(HEADER_BYTES as u32)
        .max_send_buf_size(64 * 1024)
        .keep_alive_interval(H2_PING)
        .keep_alive_timeout(H2_PING);
    builder
}

struct Connection {
    app: App,
    router: Router,
    builder: Arc<auto::Builder<TokioExecutor>>,
    closing: CancellationToken,
    aborting: CancellationToken,
}

impl Connection {
    /// Until the connection ends, or a live stream takes it over.
    async fn serve(&self, socket: Socket, peer: SocketAddr) -> Option<Box<Sender>> {
        let options = &self.app.options;
        let stalling = Stalling::new(socket.clone(), options.stall_limit, self.app.metrics.http_stalled.clone());
        let io = TokioIo::new(stalling);
        let handover = Handover::default();
        let spoke = Arc::new(AtomicBool::new(false));
        let (app, router, heard, offered) = (self.app.clone(), self.router.clone(), spoke.clone(), handover.clone());
        let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            heard.store(true, Ordering::Relaxed);
            let mut request = request.map(Body::new);
            // What hyper still has of an earlier response is not to be overtaken. It flushes a response before it reads
            // the next request, unless a body was left unread: then throwing that away is the end, flushed or not.
            let alone =
                request.version() == Version::HTTP_11 && request.method() != Method::HEAD && !socket.is_blocked();
            let handover = alone.then(|| offered.clone());
            request.extensions_mut().insert(Peer { address: peer, handover });
            // Owned, as HTTP/2 runs each request as a task.
            let (app, router, offered) = (app.clone(), router.clone(), offered.clone());
            async move { offered.answered(handle(&app, &router, request).await) }
        });
        let mut connection = std::pin::pin!(self.builder.serve_connection(io, service));
        // hyper's own timer starts when it knows the protocol; until then a silent client is ours to cut.
        let mut silence = std::pin::pin!(tokio::time::sleep(options.header_timeout));
        let (mut listening, mut closing) = (true, false);
        loop {
            tokio::select! {
                result = connection.as_mut() => {
                    let stream = handover.take();
                    if let (Err(error), None) = (result, &stream) {
                        tracing::debug!(%error, "connection ended");
                    }
                    return stream;
                }
                () = self.closing.cancelled(), if !closing => {
                    closing = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = silence.as_mut(), if listening => {
                    listening = false;
                    if !spoke.load(Ordering::Relaxed) {
                        return None;
                    }
                }
                () = self.aborting.cancelled() => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_fit_together() {
        // Everything must be over within 15 seconds, with time left to close the database.
        assert!(DRAIN + FINISH < Duration::from_secs(12));
        assert!(affordable(1) == 1);
        assert!(affordable(usize::MAX) < usize::MAX);
    }
}
