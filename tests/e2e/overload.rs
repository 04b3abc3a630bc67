//! Many streams at once: idle ones, a crowd on one query, readers that stop or crawl, a crowd that comes back after a
//! crash, an orderly end under load; and more connections than there are files. Fewer than a server has to bear
//! (`many_streams` and tests/load take as many), but by the same paths; `CROWD=5000` makes the crowds larger.

use std::collections::BTreeSet;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::json;
use tests::live::seq;
use tests::process::{cpu_seconds, status_bytes};
use tests::raw::address;
use tests::server::ADMIN_TOKEN;
use tests::{Client, Live, Options, PATIENCE, TestServer, size};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

const SQL: &str = "SELECT id, v FROM t";

async fn table(server: &TestServer) -> Client {
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, v TEXT)").await;
    db.sql("INSERT INTO t VALUES (0, 'there before')").await;
    db
}

/// So many streams that have read their snapshot; opened a hundred at a time.
async fn crowd(db: &Client, count: usize) -> Vec<Live> {
    let mut streams = Vec::new();
    while streams.len() < count {
        let hundred = (0..(count - streams.len()).min(100)).map(|_| async {
            let mut live = db.live(SQL).await;
            live.until_uptodate().await;
            live
        });
        streams.extend(join_all(hundred).await);
    }
    streams
}

/// Runs one future a stream, all at once, and gives what they give.
async fn each<T, F>(streams: Vec<Live>, work: impl Fn(Live) -> F) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let running: Vec<_> = streams.into_iter().map(|live| tokio::spawn(work(live))).collect();
    join_all(running).await.into_iter().map(|done| done.expect("a subscriber ends well")).collect()
}

/// The ids of the next `count` inserts, which have to come one a commit.
async fn inserts(live: &mut Live, count: usize) -> Vec<i64> {
    let mut ids = Vec::new();
    while ids.len() < count {
        let event = live.next_change().await;
        assert_eq!((event.name.as_str(), event.id.is_some()), ("insert", true), "{event:?}");
        ids.push(event.data["key"]["id"].as_i64().expect("a key"));
    }
    ids
}

async fn insert(db: &Client, id: i64, value: &str) -> u64 {
    seq(&db.sql_params("INSERT INTO t VALUES ($1, $2)", json!([id, value])).await)
}

/// Bytes of memory that the server has.
fn resident(server: &TestServer) -> u64 {
    status_bytes(server.pid(), "VmRSS")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_streams_beat_apart() {
    const STREAMS: usize = 600;
    const BEAT: Duration = Duration::from_millis(1_000);
    let server = TestServer::with(Options { heartbeat_ms: BEAT.as_millis() as u64, ..Options::default() }).await;
    let db = table(&server).await;
    let streams = crowd(&db, STREAMS).await;
    // While they are there: the last that has heard its beat takes the group with it.
    assert_eq!(db.metric("tidegate_groups").await, 1.0, "evaluated and encoded once");

    // Each says by itself that it lives, and not all at the same time. When a beat is read says when it was sent only
    // where this process has nothing else to do, so one look at all is not enough.
    insert(&db, 1, "to all").await;
    let start = Instant::now();
    let mut streams = each(streams, |mut live| async move {
        inserts(&mut live, 1).await;
        live
    })
    .await;
    let mut seen = Vec::new();
    let spread = async {
        loop {
            let beats = each(streams, |mut live| async move {
                let before = Instant::now();
                let event = live.next_event().await;
                assert_eq!((event.name.as_str(), event.id.is_some()), ("uptodate", true), "{event:?}");
                assert!(before.elapsed() < 10 * BEAT, "a heartbeat of {BEAT:?} came after {:?}", before.elapsed());
                (live, Instant::now())
            });
            let mut quarters = [0_usize; 4];
            streams = Vec::new();
            for (live, at) in beats.await {
                quarters[((at - start).as_millis() * 4 / BEAT.as_millis()) as usize % 4] += 1;
                streams.push(live);
            }
            seen.push(quarters);
            if quarters.iter().all(|beats| *beats >= STREAMS / 20) {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, spread).await.unwrap_or_else(|_| panic!("heartbeats are not spread: {seen:?}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_on_one_query_gets_every_event_in_order() {
    const WRITES: i64 = 25;
    let server = TestServer::start().await;
    let db = table(&server).await;
    let streams = crowd(&db, size("CROWD", 400)).await;
    let reading = tokio::spawn(each(streams, |mut live| async move {
        let ids = inserts(&mut live, WRITES as usize).await;
        (ids, live.fold.resyncs)
    }));
    for id in 1..=WRITES {
        insert(&db, id, "to all").await;
    }
    let due: Vec<i64> = (1..=WRITES).collect();
    for (ids, resyncs) in reading.await.expect("the crowd reads on") {
        assert_eq!((ids, resyncs), (due.clone(), 0));
    }
}

/// Some stop reading; the others notice nothing, the server's memory stays where it is, and who was cut goes on where
/// they were.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_stop_are_cut_and_lose_nothing() {
    const STALLED: usize = 20;
    // More than the sockets between the two take: 24 MB a stream.
    const WRITES: i64 = 60;
    const BYTES: usize = 400_000;
    const AT_MOST: u64 = 240 << 20;
    let live = "stall_limit_ms = 4000".to_owned();
    let server = TestServer::with(Options { live, ..Options::default() }).await;
    let db = table(&server).await;
    let mut stalled = crowd(&db, STALLED).await;
    let good = crowd(&db, 2).await;
    let before = resident(&server);
    let reading = tokio::spawn(each(good, |mut live| async move { inserts(&mut live, WRITES as usize).await }));

    let value = "x".repeat(BYTES);
    let mut last = 0;
    for id in 1..=WRITES {
        last = insert(&db, id, &value).await;
    }
    let due: Vec<i64> = (1..=WRITES).collect();
    for ids in reading.await.expect("the others read on") {
        assert_eq!(ids, due);
    }
    let cut = async {
        while db.metric("tidegate_http_stalled_total").await < STALLED as f64 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, cut).await.expect("who stops reading is cut");
    let grown = resident(&server).saturating_sub(before);
    assert!(grown < AT_MOST, "{grown} bytes for {STALLED} readers that are {} bytes behind", WRITES as usize * BYTES);

    // What had reached them, then the end; the fold refuses doubles and the last look finds holes.
    for live in &mut stalled {
        while live.next_or_end().await.is_some() {}
        assert!((live.fold.rows.len() as i64) < WRITES, "it was to be behind");
        live.reconnect().await;
        live.until_seq(last).await;
        assert_eq!((live.fold.rows.len() as i64, live.fold.resyncs), (WRITES + 1, 0));
    }
}

/// Reads a byte, waits, reads a byte, until the server has cut the connection.
async fn crawl(to: std::net::SocketAddr) {
    let socket = TcpSocket::new_v4().expect("a socket");
    // So that what waits, waits at the server.
    socket.set_recv_buffer_size(4_096).expect("a small buffer");
    let mut stream = socket.connect(to).await.expect("a connection");
    let request = format!(
        "GET /v1/live?sql=SELECT+id,+v+FROM+t HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN_TOKEN}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.expect("the request is taken");
    let mut pace = tokio::time::interval(Duration::from_secs(1));
    let mut byte = [0];
    while stream.read_exact(&mut byte).await.is_ok() {
        pace.tick().await;
    }
}

/// Slow enough is stopped: who takes a byte a second holds as much as who takes none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_crawl_are_cut_and_nobody_waits_for_them() {
    const CRAWLERS: usize = 20;
    const WRITES: i64 = 30;
    const BYTES: usize = 400_000;
    const AT_MOST: u64 = 240 << 20;
    let live = "stall_limit_ms = 4000".to_owned();
    let server = TestServer::with(Options { live, ..Options::default() }).await;
    let db = table(&server).await;
    let crawling: Vec<_> = (0..CRAWLERS).map(|_| tokio::spawn(crawl(address(&db)))).collect();
    let open = async { while db.metric("tidegate_subscriptions").await < CRAWLERS as f64 {} };
    tokio::time::timeout(PATIENCE, open).await.expect("they are served at first");
    let good = crowd(&db, 2).await;
    let before = resident(&server);
    let reading = tokio::spawn(each(good, |mut live| async move { inserts(&mut live, WRITES as usize).await }));
    let value = "x".repeat(BYTES);
    for id in 1..=WRITES {
        insert(&db, id, &value).await;
    }
    let due: Vec<i64> = (1..=WRITES).collect();
    for ids in reading.await.expect("the others read on") {
        assert_eq!(ids, due);
    }
    let cut = async {
        while db.metric("tidegate_http_stalled_total").await < CRAWLERS as f64 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, cut).await.expect("who crawls is cut");
    let grown = resident(&server).saturating_sub(before);
    assert!(grown < AT_MOST, "{grown} bytes for {CRAWLERS} readers that crawl");
    // They are left with what their sockets hold; it is not worth waiting until they have read it.
    crawling.iter().for_each(tokio::task::JoinHandle::abort);
}

/// Far more connections than files: the rest is told so, the store keeps its own, nothing spins, and all is well after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_connections_than_files_are_turned_away() {
    const FILES: u64 = 256;
    const CONNECTIONS: usize = 300;
    // Of 256 files, 200 are kept for the store and the logs, and a tenth for nobody.
    const ADMITTED: usize = 25;
    const BEATS: usize = 5;
    // Who says nothing is not sent away by another limit meanwhile.
    let config = "[server]\nheader_timeout_ms = 60000\n".to_owned();
    let server = TestServer::with(Options { open_files: Some(FILES), config, ..Options::default() }).await;
    let db = table(&server).await;
    let mut live = db.live(SQL).await;
    live.until_uptodate().await;
    // A connection beside the stream's, which is there before the flood is.
    assert_eq!(db.metric("tidegate_http_refused_total").await, 0.0);
    let mut flood = Vec::new();
    for _ in 0..CONNECTIONS {
        flood.push(TcpStream::connect(address(&db)).await.expect("the kernel takes it"));
    }
    // Asked of the kernel itself: what lies there is seen whether or not anybody was woken for it.
    let mut flood: Vec<_> = flood.into_iter().map(|stream| stream.into_std().expect("a socket")).collect();
    let turned_away = async {
        let mut told = BTreeSet::new();
        while told.len() < CONNECTIONS - ADMITTED {
            for (at, stream) in flood.iter_mut().enumerate().filter(|(at, _)| !told.contains(at)).collect::<Vec<_>>() {
                let mut answer = [0; 1_024];
                if let Ok(len) = stream.read(&mut answer) {
                    let answer = String::from_utf8_lossy(&answer[..len]);
                    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("Retry-After:"), "{answer}");
                    told.insert(at);
                }
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, turned_away).await.expect("those for whom there is no room are told so");

    // On a connection that was there before: a write, its event, and no work while nothing happens.
    insert(&db, 1, "meanwhile").await;
    assert_eq!(inserts(&mut live, 1).await, [1]);
    let (start, used) = (Instant::now(), cpu_seconds(server.pid()));
    for _ in 0..BEATS {
        live.until_uptodate().await;
    }
    let used = cpu_seconds(server.pid()) - used;
    assert!(used < start.elapsed().as_secs_f64() / 4.0, "{used} s of CPU in {:?} of silence", start.elapsed());

    drop(flood);
    let gone = async { while db.metric("tidegate_http_connections").await > (ADMITTED / 2) as f64 {} };
    tokio::time::timeout(PATIENCE, gone).await.expect("who leaves makes room");
    let mut streams = crowd(&db, ADMITTED / 3).await;
    insert(&db, 2, "after").await;
    for live in &mut streams {
        assert_eq!(inserts(live, 1).await, [2]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_comes_back_after_a_crash_without_gap_or_double() {
    const SOON: Duration = Duration::from_secs(30);
    let mut server = TestServer::start().await;
    let db = table(&server).await;
    let mut streams = crowd(&db, size("CROWD", 300)).await;
    // A third has read on, a third has half of it, a third nothing, when the server dies.
    for id in 1..=10 {
        insert(&db, id, "before").await;
    }
    for (at, live) in streams.iter_mut().enumerate() {
        inserts(live, [10, 5, 0][at % 3]).await;
    }
    server.kill9();
    server.restart().await;
    for id in 11..=20 {
        insert(&db, id, "after").await;
    }
    let last = insert(&db, 21, "the last").await;
    let back = Instant::now();
    let found = each(streams, move |mut live| async move {
        // What had reached the client before the crash is still read.
        while live.connected() && live.next_or_end().await.is_some() {}
        live.reconnect().await;
        live.until_seq(last).await;
        (live.fold.rows.len(), live.fold.resyncs)
    })
    .await;
    assert!(back.elapsed() < SOON, "all were back after {:?}", back.elapsed());
    assert!(found.iter().all(|found| *found == (22, 0)), "{found:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn term_under_load_ends_in_order() {
    const WRITERS: i64 = 50;
    let mut server = TestServer::start().await;
    let db = table(&server).await;
    let streams = crowd(&db, size("CROWD", 200)).await;
    let ends = tokio::spawn(each(streams, |mut live| async move {
        let mut closed = None;
        while let Some(event) = live.next_or_end().await {
            if event.name == "closed" {
                closed = Some(event.data["code"].clone());
            }
        }
        (Instant::now(), closed)
    }));
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (1..=WRITERS)
        .map(|writer| tokio::spawn(write_until_refused(db.clone(), writer * 1_000_000, stop.clone())))
        .collect();
    until_rows(&db, 4 * WRITERS).await;

    let asked = Instant::now();
    let (status, not_ready) = tokio::join!(server.sigterm(), until_not_ready(&db));
    let ended = asked.elapsed();
    assert!(status.success(), "{status}");
    assert!(ended < Duration::from_secs(15), "it ended after {ended:?}");
    assert!(not_ready < Duration::from_secs(5), "/readyz said so after {not_ready:?}");
    stop.store(true, Ordering::Relaxed);

    let ends = ends.await.expect("the streams end");
    assert!(ends.iter().all(|(_, closed)| closed.is_some()), "each stream says that it is closed: {ends:?}");
    let times = || ends.iter().map(|(at, _)| *at);
    let spread = times().max().expect("there are streams") - times().min().expect("there are streams");
    assert!(spread > Duration::from_millis(500), "all closed within {spread:?}: they will all come back together");

    // Every write that was acknowledged is there, of those that were not whatever had begun.
    let acknowledged: Vec<i64> =
        join_all(writers).await.into_iter().flat_map(|writer| writer.expect("a writer ends well")).collect();
    server.restart().await;
    let rows = db.rows(SQL).await;
    let there: Vec<i64> = rows.as_array().expect("rows").iter().filter_map(|row| row[0].as_i64()).collect();
    let lost: Vec<&i64> = acknowledged.iter().filter(|id| !there.contains(id)).collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    assert!(there.len() as i64 <= acknowledged.len() as i64 + WRITERS + 1, "rows that nobody wrote");
}

/// Writes one row after the other until the server takes no more; the ids that were acknowledged.
async fn write_until_refused(db: Client, first: i64, stop: Arc<AtomicBool>) -> Vec<i64> {
    let mut acknowledged = Vec::new();
    for id in first.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        match db.try_sql("INSERT INTO t VALUES ($1, 'w')", json!([id])).await {
            Ok(_) => acknowledged.push(id),
            Err(failure) if failure.status.is_none_or(|status| status == 503) => break,
            Err(failure) => panic!("{failure:?}"),
        }
    }
    acknowledged
}

async fn until_rows(db: &Client, count: i64) {
    let there =
        async { while db.rows("SELECT count(*) FROM t").await[0][0].as_i64().is_none_or(|rows| rows < count) {} };
    tokio::time::timeout(PATIENCE, there).await.expect("the writers get on");
}

/// How long it took until the server said that it takes no more requests.
async fn until_not_ready(db: &Client) -> Duration {
    let start = Instant::now();
    let said = async {
        loop {
            match db.get("/readyz").send().await {
                Ok(response) if response.status() == 503 => return,
                Ok(_) => {}
                Err(error) => panic!("the server was gone before /readyz said anything: {error}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, said).await.expect("/readyz says 503");
    start.elapsed()
}
