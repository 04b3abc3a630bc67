//! Results, exports and snapshots of tables that are larger than the server's memory may grow: read as streams, held in
//! pieces.
//!
//! `ROWS=10000000 sh tests/run.sh large` takes a table of that many (`make torture` does).

use std::time::{Duration, Instant};

use futures::StreamExt;
use reqwest::{Method, Response, header};
use serde_json::json;
use tests::process::{forget_peak, status_bytes};
use tests::{Client, LiveQuery, Options, TestServer, size};
use tokio::time::timeout;

/// For loading and reading all of a table; a large one takes minutes.
const PATIENCE: Duration = Duration::from_secs(1_800);
/// What reading a table may add to the memory of a server that has read others. What is read is several times that, and
/// as rows in memory more still. Most of it is what the allocator keeps for the next time: a scan holds some megabytes.
const GROWTH: u64 = 40 << 20;

/// So many rows, and so large ones that the table is larger than what the server may grow by.
fn table() -> (usize, usize) {
    let rows = size("ROWS", 90_000);
    (rows, if rows > 1_000_000 { 100 } else { 1_000 })
}

fn settings() -> Options {
    let config = "[sql]\ndeadline_ms = 30000\nmemory_bytes = \"32 MiB\"\n\
                  [storage.rocksdb]\nblock_cache_size = \"8 MiB\"\n";
    Options { config: config.to_owned(), ..Options::default() }
}

/// Loads rows as a stream, piece by piece: this process does not hold them either.
async fn load(db: &Client, table: &str, rows: usize, text: usize) {
    const PIECE: usize = 500;
    let text = "x".repeat(text);
    let pieces = (0..rows).step_by(PIECE).map(move |first| {
        let lines = (first..(first + PIECE).min(rows)).map(|id| format!("{{\"id\":{id},\"text\":\"{id} {text}\"}}\n"));
        Ok::<_, std::io::Error>(lines.collect::<String>())
    });
    let request = db.request(Method::POST, &format!("/v1/tables/main/{table}/rows")).timeout(PATIENCE);
    let request = request.header(header::CONTENT_TYPE, "application/x-ndjson");
    let body = reqwest::Body::wrap_stream(futures::stream::iter(pieces));
    let response = request.body(body).send().await.expect("an answer");
    let (status, answer) = (response.status(), response.text().await.expect("a body"));
    assert_eq!(status, 200, "{answer}");
    let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
    assert_eq!(answer["rows"], json!(rows));
}

async fn select(db: &Client, sql: &str, accept: &str) -> Response {
    let request = db.request(Method::POST, "/v1/sql").header(header::ACCEPT, accept).timeout(PATIENCE);
    let response = request.json(&json!({"sql": sql})).send().await.expect("an answer");
    assert_eq!(response.status(), 200, "{sql} as {accept}");
    response
}

/// Reads a response until `end` has come (or to its end, where that is empty) and gives its length.
async fn drain(response: Response, end: &[u8]) -> usize {
    let mut pieces = response.bytes_stream().boxed();
    let (mut length, mut tail) = (0, Vec::new());
    while let Some(piece) = timeout(PATIENCE, pieces.next()).await.expect("the response goes on") {
        let piece = piece.expect("the response is whole");
        length += piece.len();
        if end.is_empty() {
            continue;
        }
        tail.extend_from_slice(&piece);
        if tail.windows(end.len()).any(|window| window == end) {
            return length;
        }
        tail.drain(..tail.len().saturating_sub(end.len()));
    }
    assert!(end.is_empty(), "the stream ended early");
    length
}

/// Every way in which a whole table leaves the server; how many bytes each was.
async fn read(server: &TestServer, sql: &str, peaks: Option<u64>) -> Vec<usize> {
    let db = server.admin();
    let mut lengths = Vec::new();
    for way in ["application/x-ndjson", "text/csv", "application/vnd.apache.arrow.stream", "application/json", "live"] {
        forget_peak(server.pid());
        let (start, before) = (Instant::now(), status_bytes(server.pid(), "VmRSS"));
        let length = if way == "live" {
            let response = LiveQuery::new(sql).request(&db, None).send().await.expect("an answer");
            assert_eq!(response.status(), 200);
            drain(response, b"event: uptodate").await
        } else {
            drain(select(&db, sql, way).await, b"").await
        };
        let grown = status_bytes(server.pid(), "VmHWM").saturating_sub(before);
        if let Some(most) = peaks {
            eprintln!("{way}: {} MiB in {:?}, +{} MiB", length >> 20, start.elapsed(), grown >> 20);
            assert!(grown < most, "{way}: {grown} bytes of memory for {length} that were sent");
        }
        lengths.push(length);
    }
    lengths
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_leaves_in_pieces_and_never_as_a_whole() {
    let (rows, text) = table();
    let server = TestServer::with(settings()).await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, text TEXT)").await;
    let start = Instant::now();
    load(&db, "t", rows, text).await;
    eprintln!("loaded in {:?}", start.elapsed());
    // A part of the table first, so that what every query needs is there already.
    for _ in 0..2 {
        read(&server, "SELECT id, text FROM t WHERE id < 10000", None).await;
    }
    let lengths = read(&server, "SELECT id, text FROM t", Some(GROWTH)).await;
    let least = rows * text;
    assert!(least as u64 > 2 * GROWTH, "a table that is too small to tell");
    assert!(lengths.iter().all(|length| *length > least), "{lengths:?} bytes of {rows} rows");
}

/// A large result over a slow line ended at the deadline, however quickly it was computed: what it waited for its reader
/// was counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_result_that_waits_for_its_reader_is_read_to_its_end() {
    const ROWS: usize = 60_000;
    let config = "[sql]\ndeadline_ms = 6000\n".to_owned();
    let server = TestServer::with(Options { config, ..Options::default() }).await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, text TEXT)").await;
    // More than all sockets and buffers on the way hold, in many batches.
    load(&db, "t", ROWS, 1_000).await;
    db.sql("CREATE TABLE s (id INT PRIMARY KEY)").await;
    db.sql("INSERT INTO s SELECT id FROM t WHERE id < 1000").await;
    // Computed on a thread of its own, which has nothing ready when the reader comes back for more.
    let mut response = select(&db, "SELECT id, upper(text) AS text FROM t", "application/x-ndjson").await;
    let first = response.chunk().await.expect("it arrives").expect("a first piece").len();
    // As long as this takes, nobody reads: it ends at the deadline, which is then over for the other as well.
    let endless = "SELECT count(*) FROM s a, s b, t c WHERE a.id + b.id + c.id = -1";
    let failure = db.try_sql(endless, json!([])).await.expect_err("it would run for days");
    assert_eq!(failure.body["code"], "deadline", "{failure:?}");
    let rest = response.text().await.expect("the rest of it");
    assert!(first + rest.len() > ROWS * 1_000, "{first} and {} bytes", rest.len());
    let last: serde_json::Value = serde_json::from_str(rest.lines().last().unwrap_or_default()).expect("a row");
    assert_eq!(last["id"], json!(ROWS - 1), "{last}");
}

/// A few rows that are as large as a commit may be: no batch of them may be a thousand times that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn very_long_texts_are_taken_a_few_at_a_time() {
    const TEXT: usize = 900_000;
    const ROWS: usize = 60;
    /// As for any one statement.
    const SORTING: u64 = 256 << 20;
    let server = TestServer::with(settings()).await;
    let db = server.admin();
    db.sql("CREATE TABLE wide (id INT PRIMARY KEY, text TEXT)").await;
    load(&db, "wide", ROWS, TEXT).await;
    // Several megabytes each, made where they are: no request could bring them.
    db.sql("CREATE TABLE wider (id INT PRIMARY KEY, text TEXT)").await;
    for id in 0..6 {
        db.sql(&format!(
            "INSERT INTO wider SELECT id, concat(text, text, text, text, text, text) FROM wide WHERE id = {id}"
        ))
        .await;
    }
    for _ in 0..2 {
        read(&server, "SELECT id, text FROM wide WHERE id < 10", None).await;
        read(&server, "SELECT id, text FROM wider WHERE id < 2", None).await;
    }
    let lengths = read(&server, "SELECT id, text FROM wide", Some(GROWTH)).await;
    assert!(lengths.iter().all(|length| *length > ROWS * TEXT), "{lengths:?}");
    let lengths = read(&server, "SELECT id, text FROM wider", Some(GROWTH)).await;
    assert!(lengths.iter().all(|length| *length > 6 * 6 * TEXT), "{lengths:?}");

    // Sorted by what is long: beyond the pool it goes to disk or is refused, by the setting's name.
    forget_peak(server.pid());
    let before = status_bytes(server.pid(), "VmRSS");
    let sorted = db.try_sql("SELECT id, length(text) FROM wide ORDER BY text DESC, id", json!([])).await;
    let grown = status_bytes(server.pid(), "VmHWM").saturating_sub(before);
    match sorted {
        Ok(answer) => assert_eq!(answer["results"][0]["row_count"], ROWS),
        Err(failure) => assert!(failure.status == Some(400) && failure.body["code"] == "limit", "{failure:?}"),
    }
    assert!(grown < SORTING, "{grown} bytes to sort {} of text", ROWS * TEXT);
}
