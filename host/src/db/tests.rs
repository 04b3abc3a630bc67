//! Moments that no client can hit by plan: futures that are dropped, commits that come in between.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tempfile::TempDir;

use super::subscribe::tests::{request, run, sql_request, who};
use super::*;
use crate::catalog::IndexState;
use crate::live::event::CommitEvents;
use crate::live::{Encoder, From, GroupSpec};
use crate::telemetry::Metrics;

struct Something;

impl Encoder for Something {
    fn encode(&self, _: &GroupSpec, _: &CommitEvents, bytes: &mut Vec<u8>) {
        bytes.push(b'.');
    }
}

fn open() -> (Db, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::open(&Config::new(dir.path()), Arc::new(Something), Arc::new(Metrics::default())).unwrap();
    (db, dir)
}

fn admin() -> Identity {
    who("admin", Role::Admin)
}

/// A request in which something went wrong between the commit of an index and its build left one that nobody built:
/// writes maintained it, no query used it, and it could not be created again.
#[tokio::test]
async fn an_index_is_built_whoever_goes_away() {
    let (db, _dir) = open();
    run(&db, "CREATE TABLE t (id INT PRIMARY KEY, room TEXT)").await;
    run(&db, "INSERT INTO t VALUES (1, 'a')").await;
    let admin = admin();
    let gone = db.execute(&admin, sql_request("CREATE INDEX i ON t (room)"));
    assert!(gone.now_or_never().is_none(), "its commit is on its way");
    let state = || db.inner.store.catalog().table("main", "t").and_then(|t| t.indexes.first().map(|index| index.state));
    let ready = async {
        while state() != Some(IndexState::Ready) {
            tokio::task::yield_now().await;
        }
    };
    let ready = tokio::time::timeout(Duration::from_secs(20), ready).await;
    assert!(ready.is_ok(), "{:?}", state());
    db.close();
}

/// `start` named the place before one commit, and the stream began behind it: what was between was told nowhere.
#[tokio::test]
async fn a_stream_without_a_snapshot_begins_where_it_says() {
    let (db, _dir) = open();
    run(&db, "CREATE TABLE t (id INT PRIMARY KEY)").await;
    let admin = admin();
    let asked = LiveRequest { snapshot: Some(false), ..request("SELECT id FROM t", None) };
    db.compile(&admin, &asked).await.unwrap();
    let mut joining = Box::pin(db.subscribe(&admin, asked));
    assert!(joining.as_mut().now_or_never().is_none(), "its seat is being taken");
    let other = db.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(run(&other, "INSERT INTO t VALUES (1)"));
    })
    .join()
    .unwrap();
    let mut stream = joining.await.unwrap();
    let Some(LiveOutput::Start { from: Some(_), .. }) = stream.next(None).await else { panic!("no place") };
    assert!(matches!(stream.next(None).await, Some(LiveOutput::Encoded(_))), "the row that came meanwhile");
    db.close();
}

/// A query that is run again looked for the very number that its plugin had had: bytes that came back under another one
/// were another plugin to it, for ever, and to all others who asked the same.
#[tokio::test]
async fn a_result_goes_through_the_same_bytes_under_another_number() {
    let (db, _dir) = open();
    let admin = admin();
    run(&db, "CREATE TABLE t (id INT PRIMARY KEY, distance BIGINT)").await;
    run(&db, "INSERT INTO t VALUES (1, 2000), (2, 3000)").await;
    let text = include_str!("../../../plugins/long_haul/long_haul.wat");
    let upload = |text: String| db.install(&admin, "main", "long_haul", text.into());
    upload(text.to_owned()).await.unwrap();
    let pipeline = vec![StageRequest { plugin: "long_haul".to_owned(), params: serde_json::json!({"miles": 2500}) }];
    let text_of_query = "SELECT id, max(distance) AS distance FROM t GROUP BY id";
    let compiled = db.compile(&admin, &LiveRequest { pipeline, ..request(text_of_query, None) }).await.unwrap();
    assert!(compiled.spec.requery.is_some());
    upload(text.replace("too many parameter sets", "too many parameter-sets")).await.unwrap();
    assert_eq!(db.roll_back(&admin, "main", "long_haul", None).await.unwrap().plugin.version, 3);
    let mut live = db.inner.live.subscribe(compiled.spec.clone(), From::Snapshot).await.unwrap();
    let first = tokio::time::timeout(Duration::from_secs(20), live.next(None)).await;
    assert!(first.is_ok(), "nothing was told");
    db.close();
}
