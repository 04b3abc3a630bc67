//! Many streams that only listen: over a connection each, from several addresses, and over few HTTP/2 connections. By
//! sockets, without a client library, so that thousands of them cost this process little.
//!
//! `STREAMS=15000 sh tests/run.sh many_streams` and `H2_STREAMS=50000 …` are what a server has to bear (`make torture`);
//! both take an `ulimit -n` of 20,000. How they come back when the server has died is [`storm`]'s.

mod storm;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use futures::future::join_all;
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::json;
use tests::process::{cpu_seconds, status_bytes};
use tests::raw::address;
use tests::server::ADMIN_TOKEN;
use tests::{Client, Options, TestServer, size};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

/// For one event of one stream, while thousands are opened on two cores.
const PATIENCE: Duration = Duration::from_secs(60);
/// Opened at the same time.
const AT_ONCE: usize = 100;
/// What a connection and its stream may cost, where there are so many that it can be told from everything else.
const STREAM_BYTES: u64 = 12_000;
const TO_TELL: usize = 2_000;
/// Streams of one HTTP/2 connection, as many as the server allows.
const A_CONNECTION: usize = 200;

const PATH: &str = "/v1/live?sql=SELECT+id,+v+FROM+t";

enum Source {
    Http1(TcpStream),
    Http2(Incoming),
}

impl Source {
    /// What has arrived; nothing at the end.
    async fn piece(&mut self) -> Vec<u8> {
        match self {
            Source::Http1(stream) => {
                let mut buffer = vec![0; 2_048];
                let len = stream.read(&mut buffer).await.expect("the connection lives");
                buffer.truncate(len);
                buffer
            }
            Source::Http2(body) => match body.frame().await {
                Some(frame) => {
                    frame.expect("the stream lives").into_data().map(|data| data.to_vec()).unwrap_or_default()
                }
                None => Vec::new(),
            },
        }
    }
}

struct Listener {
    source: Source,
    unread: Vec<u8>,
}

impl Listener {
    fn new(source: Source) -> Listener {
        Listener { source, unread: Vec::new() }
    }

    /// Reads on until behind the next `mark`.
    async fn until(&mut self, mark: &str) {
        loop {
            if let Some(at) = self.unread.windows(mark.len()).position(|window| window == mark.as_bytes()) {
                self.unread.drain(..at + mark.len());
                return;
            }
            let piece = timeout(PATIENCE, self.source.piece()).await.unwrap_or_else(|_| panic!("no {mark:?} in time"));
            assert!(!piece.is_empty(), "the stream ended before {mark:?}: {}", String::from_utf8_lossy(&self.unread));
            self.unread.extend(piece);
        }
    }
}

/// As many open files as may be: each stream of HTTP/1.1 is one.
fn raise_open_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("up to the maximum it may be raised");
}

async fn server(streams: usize, heartbeat: Duration) -> TestServer {
    raise_open_files();
    let room = streams + 1_000;
    let live = format!("max_per_user = {room}\nmax_per_address = {room}\nmax_subscriptions = {room}");
    let config = format!("[server]\nmax_connections = {room}\n");
    let heartbeat_ms = heartbeat.as_millis() as u64;
    let server = TestServer::with(Options { heartbeat_ms, live, config, ..Options::default() }).await;
    server.admin().sql("CREATE TABLE t (id INT PRIMARY KEY, v TEXT)").await;
    server.admin().sql("INSERT INTO t VALUES (0, 'there before')").await;
    server
}

/// Opens so many, a hundred at a time, and reads each up to the end of its snapshot.
async fn crowd<F: Future<Output = Source>>(count: usize, open: impl Fn(usize) -> F) -> Vec<Listener> {
    let mut listeners = Vec::with_capacity(count);
    while listeners.len() < count {
        let first = listeners.len();
        let some = (first..count.min(first + AT_ONCE)).map(|number| {
            let opened = open(number);
            async {
                let mut listener = Listener::new(opened.await);
                listener.until("event: uptodate").await;
                listener
            }
        });
        listeners.extend(join_all(some).await);
    }
    listeners
}

/// Runs one future a listener, all at once, and gives what they give.
async fn each<L, T: Send + 'static, F>(listeners: Vec<L>, work: impl Fn(L) -> F) -> Vec<T>
where
    F: Future<Output = T> + Send + 'static,
{
    let running: Vec<_> = listeners.into_iter().map(|listener| tokio::spawn(work(listener))).collect();
    join_all(running).await.into_iter().map(|done| done.expect("a listener ends well")).collect()
}

/// A connection of its own, from one of four addresses of this machine.
async fn connect(server: SocketAddr, number: usize) -> TcpStream {
    let from = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 1 + (number % 4) as u8));
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::new(from, 0)).expect("an address of this machine");
    socket.connect(server).await.expect("a connection")
}

async fn over_http1(server: SocketAddr, number: usize) -> Source {
    let mut stream = connect(server, number).await;
    let request = format!("GET {PATH} HTTP/1.1\r\nHost: {server}\r\nAuthorization: Bearer {ADMIN_TOKEN}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("the request is taken");
    Source::Http1(stream)
}

async fn connect_http2(server: SocketAddr) -> http2::SendRequest<Empty<Bytes>> {
    let stream = TcpStream::connect(server).await.expect("a connection");
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (sender, connection) = handshake.expect("the server speaks HTTP/2");
    // It ends with the last of its streams.
    tokio::spawn(connection);
    sender
}

async fn over_http2(mut sender: http2::SendRequest<Empty<Bytes>>, server: SocketAddr) -> Source {
    let request =
        Request::get(format!("http://{server}{PATH}")).header("authorization", format!("Bearer {ADMIN_TOKEN}"));
    sender.ready().await.expect("the connection lives");
    let response = sender.send_request(request.body(Empty::new()).expect("a request")).await.expect("an answer");
    assert_eq!(response.status(), 200);
    Source::Http2(response.into_body())
}

/// What each of so many has cost the server; within the bound, where that can be told.
fn cost(server: &TestServer, before: u64, count: usize) {
    let each = status_bytes(server.pid(), "VmRSS").saturating_sub(before) / count as u64;
    eprintln!("{count} streams, {each} bytes each; {:.1} s of CPU", cpu_seconds(server.pid()));
    assert!(count < TO_TELL || each <= STREAM_BYTES, "{each} bytes a stream");
}

/// A write reaches all of them; how long it took until it had.
async fn told(db: &Client, listeners: Vec<Listener>, id: i64) -> (Duration, Vec<Listener>) {
    let mark = format!("to all {id}");
    let start = Instant::now();
    let reading = tokio::spawn(each(listeners, {
        let mark = mark.clone();
        move |mut listener: Listener| {
            let mark = mark.clone();
            async move {
                listener.until(&mark).await;
                listener
            }
        }
    }));
    db.sql_params("INSERT INTO t VALUES ($1, $2)", json!([id, mark])).await;
    let listeners = reading.await.expect("they read on");
    (start.elapsed(), listeners)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_streams_from_several_addresses_beat_on_time_and_apart() {
    let count = size("STREAMS", 300);
    // As configured by default where there are thousands: a beat of each a second would be a load, not idleness.
    let beat = if count < TO_TELL { Duration::from_secs(1) } else { Duration::from_secs(15) };
    let server = server(count, beat).await;
    let db = server.admin();
    let before = status_bytes(server.pid(), "VmRSS");
    let to = address(&db);
    let listeners = crowd(count, |number| over_http1(to, number)).await;
    cost(&server, before, count);
    assert_eq!(db.metric("tidegate_subscriptions").await, count as f64);
    assert_eq!(db.metric("tidegate_groups").await, 1.0);

    let (all, listeners) = told(&db, listeners, 1).await;
    eprintln!("an event reached all after {all:?}");
    // A beat is read late where this process was busy, and shows another quarter: more of them than one are looked at.
    let beats = each(listeners, move |mut listener: Listener| async move {
        let mut at = Vec::new();
        for _ in 0..6 {
            listener.until("event: uptodate").await;
            at.push(Instant::now());
        }
        at
    })
    .await;
    let first = beats.iter().map(|at| at[0]).min().expect("there are streams");
    let gaps = beats.iter().flat_map(|at| at.windows(2).map(|pair| pair[1] - pair[0]));
    let longest = gaps.max().expect("there are streams");
    // This process has delays of its own, which are as long as a beat of a second.
    let late = if count < TO_TELL { 10 } else { 2 };
    assert!(longest < late * beat, "a heartbeat of {beat:?} came after {longest:?}");
    let quarters: Vec<[usize; 4]> = (0..6)
        .map(|turn| {
            let mut quarters = [0_usize; 4];
            for at in &beats {
                quarters[((at[turn] - first).as_millis() * 4 / beat.as_millis()) as usize % 4] += 1;
            }
            quarters
        })
        .collect();
    eprintln!("beats by quarters of {beat:?}: {quarters:?}");
    let spread = |quarters: &[usize; 4]| quarters.iter().all(|beats| *beats >= count / 20);
    assert!(quarters.iter().any(spread), "heartbeats are not spread: {quarters:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_share_http2_connections_and_leave_room_for_others() {
    let count = size("H2_STREAMS", 400);
    let server = server(count, Duration::from_secs(15)).await;
    let db = server.admin();
    let before = status_bytes(server.pid(), "VmRSS");
    let to = address(&db);
    let connections = join_all((0..count.div_ceil(A_CONNECTION)).map(|_| connect_http2(to))).await;
    let listeners = crowd(count, |number| over_http2(connections[number / A_CONNECTION].clone(), to)).await;
    cost(&server, before, count);
    assert_eq!(db.metric("tidegate_subscriptions").await, count as f64);
    let mut listening = listeners;
    for id in 1..=3 {
        let (all, listeners) = told(&db, listening, id).await;
        listening = listeners;
        eprintln!("event {id} reached all after {all:?}");
    }
    // Over HTTP/1.1, which the others leave alone.
    let mut one = db.live("SELECT id FROM t").await;
    one.until_uptodate().await;
    assert_eq!(one.fold.rows.len(), 4);
    // Streams that are closed on a connection that stays make room on it.
    listening.truncate(count / 2);
    let fewer = async {
        while db.metric("tidegate_subscriptions").await > (count / 2 + 1) as f64 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, fewer).await.expect("closed streams are gone");
    let again = over_http2(connections[count.div_ceil(A_CONNECTION) - 1].clone(), to).await;
    Listener::new(again).until("event: uptodate").await;
}
