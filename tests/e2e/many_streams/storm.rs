//! A storm: the server dies with all its streams and comes back where it was, and so do they, at once, each behind the
//! id that it saw last, while others go on writing. A quarter ask the same, the others a hundred things, as the clients
//! of one application do. `STORM=10000 sh tests/run.sh storm` is what a server has to bear (`make torture`).

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::{Value, json};
use tests::raw::address;
use tests::server::ADMIN_TOKEN;
use tests::{Client, Failure, size};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{AT_ONCE, PATIENCE, TO_TELL, connect, each, server};

/// Different queries, beside the one that a quarter of all ask.
const ROOMS: i64 = 100;
/// Between two writes while everybody comes back: each is an event for a quarter of the streams.
const PACE: Duration = Duration::from_millis(100);
/// Until all are live again, where there are so many that it can be told from a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// One client: a socket while it is connected, and what it has been told.
struct Follower {
    number: usize,
    /// None: every row.
    room: Option<i64>,
    socket: Option<TcpStream>,
    /// As it came: the head of the answer, then chunks.
    raw: Vec<u8>,
    has_head: bool,
    /// Out of the chunks: events.
    text: Vec<u8>,
    last_id: Option<String>,
    /// Whether this connection has said so.
    up_to_date: bool,
    rows: Vec<i64>,
}

impl Follower {
    fn new(number: usize) -> Follower {
        let room = match number % 4 {
            0 => None,
            _ => Some((number - number / 4 - 1) as i64 % ROOMS),
        };
        Follower {
            number,
            room,
            socket: None,
            raw: Vec::new(),
            has_head: false,
            text: Vec::new(),
            last_id: None,
            up_to_date: false,
            rows: Vec::new(),
        }
    }

    fn path(&self) -> String {
        match self.room {
            None => "/v1/live?sql=SELECT+id,+room+FROM+lines".to_owned(),
            Some(room) => format!("/v1/live?sql=SELECT+id,+text+FROM+lines+WHERE+room+%3D+{room}"),
        }
    }

    /// Connects, behind what was seen last; half an event is forgotten.
    async fn connect(&mut self, server: SocketAddr) {
        // Closed first: two of each would be more files than there may be.
        self.socket = None;
        (self.has_head, self.up_to_date) = (false, false);
        self.raw.clear();
        self.text.clear();
        let mut socket = connect(server, self.number).await;
        let last = self.last_id.as_ref().map_or_else(String::new, |id| format!("Last-Event-ID: {id}\r\n"));
        let path = self.path();
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {server}\r\nAuthorization: Bearer {ADMIN_TOKEN}\r\n{last}\r\n");
        socket.write_all(request.as_bytes()).await.expect("the request is taken");
        self.socket = Some(socket);
    }

    /// After the server died. What had reached this client before is still read.
    async fn come_back(&mut self, server: SocketAddr) {
        while timeout(PATIENCE, self.read()).await.expect("the connection ends with its server") {}
        self.connect(server).await;
        self.until(|follower| follower.up_to_date).await;
    }

    async fn until(&mut self, done: impl Fn(&Follower) -> bool) {
        while !done(self) {
            let read = timeout(PATIENCE, self.read()).await;
            let read = read.unwrap_or_else(|_| panic!("nothing more on {}; rows: {:?}", self.path(), self.rows));
            assert!(read, "the stream of {} ended; rows: {:?}", self.path(), self.rows);
        }
    }

    /// What is there next; false at the end.
    async fn read(&mut self) -> bool {
        let socket = self.socket.as_mut().expect("a connection");
        self.raw.reserve(4_096);
        // A reset is an end as well.
        let len = socket.read_buf(&mut self.raw).await.unwrap_or(0);
        self.take_chunks();
        let mut text = std::mem::take(&mut self.text);
        let mut at = 0;
        while let Some(len) = find(&text[at..], b"\n\n") {
            self.take(std::str::from_utf8(&text[at..at + len]).expect("events are UTF-8"));
            at += len + 2;
        }
        text.drain(..at);
        self.text = text;
        len > 0
    }

    fn take_chunks(&mut self) {
        if !self.has_head {
            let Some(end) = find(&self.raw, b"\r\n\r\n") else { return };
            let head = String::from_utf8_lossy(&self.raw[..end]);
            assert!(head.starts_with("HTTP/1.1 200 "), "{} was answered {head}", self.path());
            self.raw.drain(..end + 4);
            self.has_head = true;
        }
        while let Some(line) = find(&self.raw, b"\r\n") {
            let size = std::str::from_utf8(&self.raw[..line]).ok();
            let size = size.and_then(|size| usize::from_str_radix(size, 16).ok()).expect("the size of a chunk");
            let (from, to) = (line + 2, line + 2 + size);
            if self.raw.len() < to + 2 {
                return;
            }
            self.text.extend_from_slice(&self.raw[from..to]);
            self.raw.drain(..to + 2);
        }
    }

    fn take(&mut self, event: &str) {
        let (mut name, mut id, mut data) = ("", None, "");
        for line in event.lines() {
            match line.split_once(": ") {
                Some(("event", value)) => name = value,
                Some(("id", value)) => id = Some(value),
                Some(("data", value)) => data = value,
                _ => {}
            }
        }
        match name {
            "insert" => {
                let data: Value = serde_json::from_str(data).unwrap_or_else(|error| panic!("{error} in {event}"));
                let row = data["key"]["id"].as_i64().expect("a key");
                let last = self.rows.last();
                assert!(last.is_none_or(|last| *last < row), "{}: row {row} after {last:?}", self.path());
                assert!(id.is_some(), "a commit of one row without an id: {event}");
                self.rows.push(row);
            }
            "uptodate" => self.up_to_date = true,
            // Hello and signs of life have no name.
            "start" | "" => {}
            // Nothing here is a reason to start afresh.
            _ => panic!("{}: {event}", self.path()),
        }
        if let Some(id) = id {
            self.last_id = Some(id.to_owned());
        }
    }
}

fn find(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    bytes.windows(mark.len()).position(|window| window == mark)
}

/// Opens so many, a hundred at a time, and reads each up to the end of its snapshot, which is empty.
async fn followers(server: SocketAddr, count: usize) -> Vec<Follower> {
    let mut followers = Vec::with_capacity(count);
    while followers.len() < count {
        let first = followers.len();
        let some = (first..count.min(first + AT_ONCE)).map(|number| async move {
            let mut follower = Follower::new(number);
            follower.connect(server).await;
            follower.until(|follower| follower.up_to_date).await;
            follower
        });
        followers.extend(join_all(some).await);
    }
    followers
}

async fn insert(db: &Client, id: i64) -> Result<Value, Failure> {
    db.try_sql("INSERT INTO lines VALUES ($1, $2, 'a line')", json!([id, id % ROOMS])).await
}

/// Writes one row after the other, the first `quick` without a pause, until it is enough or the server is gone: the id
/// that was not tried yet, and what went wrong.
async fn write_on(db: Client, first: i64, quick: i64, enough: Arc<AtomicBool>) -> (i64, Option<Failure>) {
    let mut pace = tokio::time::interval(PACE);
    let mut id = first;
    while !enough.load(Ordering::Relaxed) {
        if id >= first + quick {
            pace.tick().await;
        }
        if let Err(failure) = insert(&db, id).await {
            return (id + 1, Some(failure));
        }
        id += 1;
    }
    (id, None)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_reconnects_ends_soon_without_gap_or_double() {
    let count = size("STORM", 500);
    let mut server = server(count, Duration::from_secs(15)).await;
    let db = server.admin();
    db.sql("CREATE TABLE lines (id INT PRIMARY KEY, room INT, text TEXT)").await;
    let to = address(&db);
    let followers = followers(to, count).await;
    let queries = followers.iter().map(Follower::path).collect::<HashSet<_>>().len();

    // Each has seen a row when the server dies, with others on their way and a write as well.
    let enough = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn(write_on(db.clone(), 0, 2 * ROOMS, enough.clone()));
    let followers = each(followers, |mut follower| async move {
        follower.until(|follower| !follower.rows.is_empty()).await;
        follower
    })
    .await;
    let dead = Instant::now();
    server.kill9();
    let (next, failure) = writing.await.expect("the writer ends well");
    assert!(failure.is_some(), "it was to be writing");
    server.restart_in_place().await;
    assert_eq!(address(&db), to);

    let back = Instant::now();
    let writing = tokio::spawn(write_on(db.clone(), next, 0, enough.clone()));
    let followers = each(followers, move |mut follower| async move {
        follower.come_back(to).await;
        (back.elapsed(), follower)
    })
    .await;
    let since_death = dead.elapsed();
    let compiled = db.metric("tidegate_live_compiles_total").await;
    let (mut times, followers): (Vec<Duration>, Vec<Follower>) = followers.into_iter().unzip();
    times.sort_unstable();
    let (half, all) = (times[count / 2], times[count - 1]);
    eprintln!("{count} streams of {queries} queries: half of them live after {half:?}, all after {all:?}");
    eprintln!("{since_death:?} after the server died; {compiled} queries compiled");
    assert!(count < TO_TELL || all < SOON, "all were live after {all:?}");
    assert_eq!(compiled, queries as f64, "equal ones share what the first of them was compiled to");

    enough.store(true, Ordering::Relaxed);
    let (next, failure) = writing.await.expect("the writer ends well");
    assert!(failure.is_none(), "nobody can write while streams come back: {failure:?}");
    // The last row of each room: who has seen theirs has seen everything.
    let last = next + ROOMS - 1;
    for id in next..=last {
        insert(&db, id).await.expect("a write");
    }
    let followers = each(followers, move |mut follower| async move {
        let due = if follower.room.is_some() { next } else { last };
        follower.until(|follower| follower.rows.last().is_some_and(|row| *row >= due)).await;
        follower
    })
    .await;
    // Whether the write that met the end was done is for the table to say.
    let rows = db.rows("SELECT id FROM lines ORDER BY id").await;
    let rows: Vec<i64> = rows.as_array().expect("rows").iter().filter_map(|row| row[0].as_i64()).collect();
    for follower in &followers {
        let theirs = |id: &i64| follower.room.is_none_or(|room| id % ROOMS == room);
        let due: Vec<i64> = rows.iter().copied().filter(theirs).collect();
        assert_eq!(follower.rows, due, "{}", follower.path());
    }
}
