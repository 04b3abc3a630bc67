//! What RocksDB may hold is what the settings say, however many tables there are and however much is written: as
//! `/metrics` shows it.

use std::pin::pin;
use std::time::Duration;

use futures::future::join_all;
use serde_json::json;
use tests::{Client, Options, TestServer};

const TABLES: usize = 1_000;
/// Statements of one request: as many as one may have.
const STATEMENTS: usize = 100;
const BUFFER: usize = 1 << 20;
/// Two buffers in each of the four families.
const BUFFERS: usize = 2 * 4 * BUFFER;
const CACHE: usize = 4 << 20;
const OPEN_FILES: usize = 64;
/// An open file's reader, without its index and filter, which are in the cache: some kilobytes.
const READER: usize = 32 << 10;
const WRITERS: usize = 4;
/// Of all writers together. Each goes to a table of its own.
const COMMITS: usize = 400;
/// Of one commit: some 60 kB, which is as much text as a request may have.
const ROWS: usize = 30;
const TEXT: usize = 1_950;

/// The most that was seen.
#[derive(Debug, Default)]
struct Most {
    buffers: f64,
    cache: f64,
    readers: f64,
}

impl Most {
    async fn look(&mut self, db: &Client) {
        self.buffers = self.buffers.max(db.metric("tidegate_store_write_buffer_bytes").await);
        self.cache = self.cache.max(db.metric("tidegate_store_block_cache_bytes").await);
        self.readers = self.readers.max(db.metric("tidegate_store_table_reader_bytes").await);
        assert!(self.buffers <= BUFFERS as f64, "more than {BUFFERS} B of write buffers: {self:?}");
        assert!(self.cache <= CACHE as f64, "more than {CACHE} B of cache: {self:?}");
        assert!(self.readers <= (OPEN_FILES * READER) as f64, "more than {OPEN_FILES} open files: {self:?}");
    }
}

/// One statement for each table, many in a request.
async fn for_each_table(db: &Client, statement: impl Fn(usize) -> String) {
    for first in (0..TABLES).step_by(STATEMENTS) {
        let statements: Vec<String> = (first..first + STATEMENTS).map(&statement).collect();
        db.sql(&statements.join("; ")).await;
    }
}

fn table_of(commit: usize) -> usize {
    commit * TABLES / COMMITS
}

/// The commits of one writer.
async fn write(db: &Client, writer: usize) {
    let text = "x".repeat(TEXT);
    for commit in (writer..COMMITS).step_by(WRITERS) {
        let rows: Vec<String> = (1..=ROWS).map(|id| format!("({id}, '{text}')")).collect();
        db.sql(&format!("INSERT INTO t{} VALUES {}", table_of(commit), rows.join(", "))).await;
    }
}

#[tokio::test]
async fn a_thousand_tables_and_a_flood_stay_inside_the_configured_memory() {
    let config = format!(
        "[storage.rocksdb]\nwrite_buffer_size = {BUFFER}\nmax_write_buffers = 2\nblock_cache_size = {CACHE}\n\
         max_open_files = {OPEN_FILES}\n"
    );
    let server = TestServer::with(Options { config, ..Options::default() }).await;
    let db = server.admin();
    let mut most = Most::default();
    for_each_table(&db, |table| format!("CREATE TABLE t{table} (id INT PRIMARY KEY, text TEXT)")).await;
    for_each_table(&db, |table| format!("INSERT INTO t{table} VALUES (0, 'one')")).await;
    most.look(&db).await;

    let mut flood = pin!(join_all((0..WRITERS).map(|writer| write(&db, writer))));
    loop {
        tokio::select! {
            _ = &mut flood => break,
            () = tokio::time::sleep(Duration::from_millis(20)) => most.look(&db).await,
        }
    }
    // Rows and change log: several times what may be held, or this has tested nothing.
    assert!(db.metric("tidegate_commit_bytes_total").await > (2 * BUFFERS) as f64);
    assert!(most.buffers > BUFFER as f64, "the buffers were filled: {most:?}");

    for commit in (0..COMMITS).step_by(2) {
        let count = db.rows(&format!("SELECT count(text) FROM t{}", table_of(commit))).await;
        assert_eq!(count, json!([[ROWS + 1]]));
        if commit % 20 == 0 {
            most.look(&db).await;
        }
    }
    most.look(&db).await;
    assert!(most.cache > (CACHE / 2) as f64, "the cache was filled: {most:?}");
}
