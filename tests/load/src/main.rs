//! How many events a second reach how many subscribers, how late, and at what cost; beside [`peer`], a minimal program
//! that writes the same bytes to the same number of sockets. Both are read by the same [`reader`] in the same run, so
//! the ratios hold on a noisy machine where the figures do not. The program has no commits: what they cost is measured
//! apart ([`paced`]), and how late it is if it syncs what it tells is beside it. At the highest rate changes share commits,
//! ids and writes, which is what batching is for; the program writes (and syncs) each event by itself.
//!
//! ```text
//! cargo build && target/debug/load              every size, some minutes
//! target/debug/load 1000                        one size
//! SECONDS=10 target/debug/load 100 1000         longer windows
//! ```
//!
//! It needs 2 file descriptors a subscriber in two processes (`ulimit -n`). Nothing here is a test: `tests/run.sh` only
//! compiles it.

mod commits;
mod measure;
mod paced;
mod peer;
mod reader;

use std::time::{Duration, Instant};

use reqwest::Method;
use rustix::process::Pid;
use serde_json::json;
use tests::{Client, LiveQuery, Options, TestServer};

use commits::Commits;
use measure::{Cpu, Latencies, memory_bytes};
use paced::Told;
use peer::Peer;
use reader::{Reader, stamp};

/// Subscribers and changes a second: what is asked of every system of this kind, and the most that one address has ports
/// for with room to spare.
const SIZES: [(usize, u32); 4] = [(1, 50), (100, 50), (1_000, 50), (10_000, 5)];

/// Text of a row, such that an event that comes alone is 256 bytes on the wire.
const TEXT_BYTES: usize = 143;

/// Commits that a subscriber may be behind while the highest rate is looked for: more would measure the server's
/// memory, not its rate.
const MOST_BEHIND: u64 = 32;

/// Clients that write at once while the highest rate is looked for, each a row of its own. One that waits for its commit
/// before it makes the next would measure how long a commit takes.
const WRITERS: usize = 8;

/// Events of a commit, at least, while the highest rate is looked for: to few subscribers, commits of one change would
/// measure commits.
const LEAST_EVENTS: usize = 1_000;

/// Subscribers from which on their memory can be told from what else the server's memory does meanwhile.
const MANY: usize = 1_000;

/// Commits before anything is measured: what a server makes for its first ones is nobody's cost.
const FIRST_COMMITS: usize = 300;

fn main() {
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.peek().is_some_and(|first| first == "peer") {
        return peer::serve(arguments.skip(1));
    }
    let wanted: Vec<usize> =
        arguments.map(|text| text.parse().expect("a number of subscribers, such as 1000")).collect();
    let window = std::env::var("SECONDS").map_or(5, |text| text.parse().expect("SECONDS is a number"));
    let window = Duration::from_secs(window);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    for (subscribers, rate) in SIZES {
        if wanted.is_empty() || wanted.contains(&subscribers) {
            runtime.block_on(compare(subscribers, rate, window));
        }
    }
}

/// One size: Tidegate, then the peer with as many bytes an event.
async fn compare(subscribers: usize, rate: u32, window: Duration) {
    let plural = if subscribers == 1 { "" } else { "s" };
    println!("\n{subscribers} subscriber{plural}, {rate} changes a second for {} s", window.as_secs());
    let ours = tidegate(subscribers, rate, window).await;
    let peer = minimal(subscribers, rate, window, ours.event_bytes, false).await;
    let syncing = minimal(subscribers, rate, window, ours.event_bytes, true).await;
    println!("{:>26}{:>12}{:>12}{:>8}{:>12}{:>8}", "", "tidegate", "minimal", "ratio", "with sync", "ratio");
    let row = |what: &str, of: fn(&Figures) -> f64, digits: usize| {
        let [ours, peer, syncing] = [&ours, &peer, &syncing].map(of);
        let (one, other) = (ours / peer, ours / syncing);
        println!("{what:>26}{ours:>12.digits$}{peer:>12.digits$}{one:>8.2}{syncing:>12.digits$}{other:>8.2}");
    };
    row("p50 ms", |of| of.paced.ms(0.50), 2);
    row("p99 ms", |of| of.paced.ms(0.99), 2);
    row("CPU µs an event, paced", |of| of.paced_cpu * 1e6, 2);
    if let Some(told) = &ours.told {
        let [cpu, limit, uncertain] = [told.cpu, peer.paced_cpu, told.uncertain].map(|seconds| seconds * 1e6);
        // Where the commits vary by more than delivering costs, there is no ratio to tell.
        let ratio = if cpu > uncertain { format!("{:.2}", cpu / limit) } else { "-".to_owned() };
        println!("{:>26}{cpu:>12.2}{limit:>12.2}{ratio:>8}  ± {uncertain:.2}", "beside the commits");
    }
    row("highest events/s", |of| of.rate, 0);
    row("CPU µs an event, highest", |of| of.cpu * 1e6, 2);
    println!("{:>26}{:>12}", "bytes an event", ours.event_bytes);
    if let Some(idle) = ours.idle {
        if subscribers >= MANY {
            println!("{:>26}{:>12.0}", "bytes a subscriber, idle", idle.bytes);
        }
        println!(
            "{:>26}{:>12}{:>12}{:>8}{:>12}{:>8}",
            "a commit, subscribers", "none", "idle", "ratio", "told", "ratio"
        );
        let row = |what: &str, of: fn(&Commits) -> f64, digits: usize| {
            let [none, quiet, told] = idle.commits.each_ref().map(of);
            let (one, other) = (quiet / none, told / none);
            println!("{what:>26}{none:>12.digits$}{quiet:>12.digits$}{one:>8.2}{told:>12.digits$}{other:>8.2}");
        };
        row("p50 ms", Commits::p50_ms, 3);
        row("committer µs on a core", Commits::on_core_us, 1);
        row("committer µs without one", Commits::ready_us, 1);
    }
    if let Some(told) = ours.told {
        println!("{:>26}{:>12}{:>12}{:>8}", "a write ms, paced", "unfollowed", "told", "ratio");
        let [unfollowed, told] = told.writes.map(|writes| writes.ms(0.50));
        println!("{:>26}{unfollowed:>12.3}{told:>12.3}{:>8.2}", "p50", told / unfollowed);
    }
}

struct Figures {
    event_bytes: usize,
    /// From the moment a change was made to its arrival, at the given rate.
    paced: Latencies,
    /// Seconds of the writing process's CPU for each event. Of the server's, that has the commits in it, with their
    /// requests and syncs: they happen whether anybody listens or not.
    paced_cpu: f64,
    /// Without the commits. The peer has none.
    told: Option<Told>,
    /// Events a second at the highest rate.
    rate: f64,
    cpu: f64,
    idle: Option<Idle>,
}

/// What subscribers cost while nothing happens.
struct Idle {
    bytes: f64,
    /// Without them, with them, and told to them.
    commits: [Commits; 3],
}

/// A server for so many, with a table that they follow and one like it that they do not.
async fn server(subscribers: usize) -> TestServer {
    let config = format!("[server]\nmax_connections = {}\n", subscribers + 100);
    let options = Options { heartbeat_ms: 15_000, config, ..Options::default() };
    let server = TestServer::with(options).await;
    let db = server.admin();
    db.sql("CREATE TABLE ticker (id INT PRIMARY KEY, text TEXT)").await;
    db.sql("CREATE TABLE other (id INT PRIMARY KEY, text TEXT)").await;
    db.sql("INSERT INTO ticker VALUES (1, '')").await;
    db.sql("INSERT INTO other VALUES (1, '')").await;
    for _ in 0..FIRST_COMMITS {
        write_to(&db, "other", 1).await;
    }
    server
}

async fn tidegate(subscribers: usize, rate: u32, window: Duration) -> Figures {
    let server = server(subscribers).await;
    let db = server.admin();
    let before = memory_bytes(server.pid());
    let query = LiveQuery::new("SELECT id, text FROM ticker").option("old", "none").option("snapshot", "false");
    let request = query.request(&db, None).build().expect("a request");
    let mut reader = Reader::default();
    reader.connect(subscribers, &request_bytes(&request)).await;
    // A write may come before a subscription that was asked for earlier. The first ones also fill buffers that stay.
    loop {
        let before = reader.events();
        write(&db, 1).await;
        let all = reader.until(before + subscribers as u64);
        if tokio::time::timeout(Duration::from_millis(500), all).await.is_ok() {
            break;
        }
    }
    let bytes = memory_bytes(server.pid()).saturating_sub(before) as f64 / subscribers as f64;
    let bare = self::server(0).await;
    let commits = commits::measure(&bare, &server, &reader, subscribers as u64).await;
    drop(bare);
    let idle = Idle { bytes, commits };

    reader.latencies();
    let (events, bytes) = (reader.events(), reader.bytes());
    let told = Told::measure(&server, &reader, subscribers as u64, rate, window).await;
    let paced = reader.latencies();
    let event_bytes = (reader.bytes() - bytes) / (reader.events() - events);

    let measured = Measured::start(&reader, server.pid());
    let (mut commits, events_each) = (0u64, (changes(subscribers) * subscribers) as u64);
    while measured.started.elapsed() < window {
        futures::future::join_all((0..WRITERS).map(|writer| write_some(&db, writer, changes(subscribers)))).await;
        commits += WRITERS as u64;
        reader.until(measured.events + commits.saturating_sub(MOST_BEHIND) * events_each).await;
    }
    reader.until(measured.events + commits * events_each).await;
    Figures {
        event_bytes: event_bytes as usize,
        paced,
        paced_cpu: told.with_commits,
        told: Some(told),
        rate: measured.rate(&reader),
        cpu: measured.cpu_each(&reader),
        idle: Some(idle),
    }
}

async fn minimal(subscribers: usize, rate: u32, window: Duration, event_bytes: usize, sync: bool) -> Figures {
    let mut peer = Peer::start(event_bytes, sync);
    let mut reader = Reader::connect_to(peer.address());
    peer.accept(subscribers);
    reader.connect(subscribers, b"").await;
    peer.ready();

    let mut measured = Measured::start(&reader, peer.pid());
    let mut changes = 0u64;
    while measured.started.elapsed() < window {
        peer.round();
        changes += 1;
        pause_until(measured.started + Duration::from_secs(changes) / rate).await;
    }
    reader.until(measured.events + changes * subscribers as u64).await;
    let (paced, paced_cpu) = (reader.latencies(), measured.cpu_each(&reader));

    measured = Measured::start(&reader, peer.pid());
    let mut changes = 0u64;
    while measured.started.elapsed() < window {
        peer.round();
        changes += 1;
        reader.until(measured.events + changes.saturating_sub(MOST_BEHIND) * subscribers as u64).await;
    }
    reader.until(measured.events + changes * subscribers as u64).await;
    let (rate, cpu) = (measured.rate(&reader), measured.cpu_each(&reader));
    Figures { event_bytes, paced, paced_cpu, told: None, rate, cpu, idle: None }
}

/// The start of a window.
struct Measured {
    started: Instant,
    events: u64,
    /// The writing process, and what it had used.
    pid: Pid,
    cpu: Cpu,
}

impl Measured {
    fn start(reader: &Reader, pid: Pid) -> Measured {
        reader.latencies();
        let cpu = Cpu::of(pid);
        Measured { started: Instant::now(), events: reader.events(), pid, cpu }
    }

    fn rate(&self, reader: &Reader) -> f64 {
        (reader.events() - self.events) as f64 / self.started.elapsed().as_secs_f64()
    }

    fn cpu_each(&self, reader: &Reader) -> f64 {
        Cpu::of(self.pid).since(&self.cpu) / (reader.events() - self.events) as f64
    }
}

/// One change of a row that everybody follows, marked with the time.
async fn write(db: &Client, id: i32) {
    write_to(db, "ticker", id).await;
}

async fn write_to(db: &Client, table: &str, id: i32) {
    db.sql_params(&format!("UPDATE {table} SET text = $1 WHERE id = $2"), json!([text(), id])).await;
}

fn text() -> String {
    let mut text = stamp();
    text.push_str(&"x".repeat(TEXT_BYTES - text.len()));
    text
}

/// A commit of the rows of one writer, the way that is meant for many of them.
async fn write_some(db: &Client, writer: usize, rows: usize) {
    let mut body = "id,text\n".to_owned();
    for id in writer * rows..(writer + 1) * rows {
        body.push_str(&format!("{id},{}\n", text()));
    }
    let request = db.request(Method::POST, "/v1/tables/main/ticker/rows?on_conflict=update");
    let answer = request.header("content-type", "text/csv").body(body).send().await.expect("an answer");
    let (status, text) = (answer.status(), answer.text().await.unwrap_or_default());
    assert!(status.is_success() && text.contains("\"commits\":1,"), "{status} {text}");
}

/// Changes of a commit at the highest rate.
fn changes(subscribers: usize) -> usize {
    (LEAST_EVENTS / subscribers).max(1)
}

async fn pause_until(due: Instant) {
    tokio::time::sleep_until(due.into()).await;
}

/// The request as it goes over the wire, with the address to connect to in front.
fn request_bytes(request: &reqwest::Request) -> Vec<u8> {
    let url = request.url();
    let query = url.query().map_or_else(String::new, |query| format!("?{query}"));
    let host = format!("{}:{}", url.host_str().expect("a host"), url.port().expect("a port"));
    let mut text = format!("GET {}{query} HTTP/1.1\r\nhost: {host}\r\n", url.path());
    for (name, value) in request.headers() {
        text.push_str(&format!("{name}: {}\r\n", value.to_str().expect("plain headers")));
    }
    text.push_str("\r\n");
    text.into_bytes()
}
