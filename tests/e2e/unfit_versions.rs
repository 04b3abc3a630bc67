//! A version is uploaded that does not fit the queries that run: it asks for a parameter, for a column that is not there,
//! refuses, or fails when it is configured. Their streams say so and wait, and go on with one that fits.

use serde_json::{Value, json};
use tests::guest::{Guest, KEEP_ALL, filtering};
use tests::live::seq;
use tests::{Client, Live, LiveQuery, TestServer};

/// Keeps everything. `lines` are more lines of its manifest, `configure` is done before a handle is answered, and `n`
/// tells versions apart.
fn keeps_all(kind: &str, lines: &str, configure: &str, n: u32) -> Vec<u8> {
    let plugin = format!(",\"kind\":\"{kind}\"");
    let number = format!("(data (i32.const 0) \"not this table\") (global (export \"n\") i32 (i32.const {n}))");
    let fields = filtering(KEEP_ALL) + &number;
    Guest { plugin: &plugin, lines, configure, fields: &fields, ..Guest::default() }.bytes()
}

const REQUIRED: &str = "{\"param\":{\"name\":\"minutes\",\"type\":\"int\"}}\n";
const MISSING: &str = "{\"column\":{\"name\":\"nowhere\",\"type\":\"int\"}}\n";
const REFUSES: &str = "(call $fail (i32.const -1) (i32.const 0) (i32.const 14)) (return (i64.const -1))";
/// Not at the upload, where the input has no columns: their schema is one byte.
const TRAPS: &str = "(if (i32.gt_u (i32.load offset=28 (i32.add (global.get $window) (local.get $at))) (i32.const 1)) (then unreachable))";

/// What does not fit: manifest, configure, the cause that is told, and words of its detail; what a new client is told.
const UNFIT: [(&str, &str, &str, &str, u16); 4] = [
    (REQUIRED, "", "configure", "parameter `minutes` (an int) is required", 400),
    (MISSING, "", "configure", "column `nowhere`", 400),
    ("", REFUSES, "configure", "not this table", 400),
    ("", TRAPS, "trap", "unreachable", 422),
];

/// The `plugin-error` that comes next.
async fn waits(live: &mut Live, version: &Value, cause: &str, detail: &str) -> Value {
    let error = live.next_change().await;
    assert_eq!((error.name.as_str(), &error.data["cause"]), ("plugin-error", &json!(cause)), "{error:?}");
    assert_eq!((&error.data["plugin"], &error.data["version"]), (&json!("p"), version), "{error:?}");
    let told = error.data["detail"].as_str().unwrap();
    assert!(told.starts_with("plugin p: ") && told.contains(detail) && told.matches("plugin p").count() == 1, "{told}");
    error.data
}

async fn insert(db: &Client, id: i64) -> u64 {
    seq(&db.sql_params("INSERT INTO t VALUES ($1)", json!([id])).await)
}

/// What a client is told that comes back with the place of `live`.
async fn back_meanwhile(live: &Live, query: &LiveQuery, db: &Client) {
    let response = query.request(db, live.fold.last_id.as_deref()).send().await.unwrap();
    assert_eq!(response.status(), 200, "a browser takes anything else as final");
    let mut back = db.attached(response);
    let closed = back.next_event().await;
    assert_eq!((closed.name.as_str(), &closed.data["code"]), ("closed", &json!("busy")), "{closed:?}");
    assert!(closed.data["detail"].as_str().unwrap().contains("is active"), "{closed:?}");
    assert!(back.retry.is_some_and(|retry| retry >= 5_000), "{:?}", back.retry);
}

async fn with_versions_that_do_not_fit(kind: &str) {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY)").await;
    let good = |n| keeps_all(kind, "", "", n);
    let feed = kind == "change_filter";
    let (query, pinned) =
        (LiveQuery::new("SELECT * FROM t").plugin("p"), LiveQuery::new("SELECT * FROM t").plugin("p@1"));
    db.put_plugin("p", good(0)).await;
    let (mut live, mut pinned) = (db.live(query.clone()).await, db.live(pinned).await);
    live.until_uptodate().await;
    pinned.until_uptodate().await;
    let mut id = 0;
    for (n, (lines, configure, cause, detail, status)) in (1..).zip(UNFIT) {
        id += 10;
        let told = insert(&db, id).await;
        live.until_seq(told).await;
        let bad = db.put_plugin("p", keeps_all(kind, lines, configure, n)).await;
        let error = waits(&mut live, &bad["version"], cause, detail).await;
        assert!(error["seq"].as_u64().unwrap() >= told, "{error}");
        let code = if status == 400 { "plugin_params" } else { "plugin_failed" };
        db.expect_no_live(query.clone(), status, code).await;
        back_meanwhile(&live, &query, &db).await;
        // Nothing to be told again.
        db.sql(&format!("CREATE TABLE other{id} (id BIGINT PRIMARY KEY)")).await;
        insert(&db, id + 1).await;
        // The very bytes that the client's rows were made by, under another number.
        let same = db.put_plugin("p", good(n - 1)).await;
        if feed {
            let pipeline = live.next_change().await;
            assert_eq!((pipeline.name.as_str(), &pipeline.data["version"]), ("pipeline", &same["version"]));
        }
        let event = live.next_change().await;
        assert_eq!(
            (event.name.as_str(), &event.data["key"]["id"]),
            (if feed { "change" } else { "insert" }, &json!(id + 1))
        );

        // And another one; between the two, a second that does not fit.
        let bad = db.put_plugin("p", keeps_all(kind, lines, configure, n + 100)).await;
        waits(&mut live, &bad["version"], cause, detail).await;
        insert(&db, id + 2).await;
        let bad = db.put_plugin("p", keeps_all(kind, REQUIRED, "", n + 200)).await;
        waits(&mut live, &bad["version"], "configure", "minutes").await;
        let other = db.put_plugin("p", good(n)).await;
        let event = live.next_change().await;
        if feed {
            assert_eq!((event.name.as_str(), &event.data["version"]), ("pipeline", &other["version"]), "{event:?}");
            let event = live.next_change().await;
            assert_eq!((event.name.as_str(), &event.data["key"]["id"]), ("change", &json!(id + 2)), "{event:?}");
        } else {
            assert_eq!(event.name, "start", "{event:?}");
            let event = live.next_change().await;
            assert_eq!((event.name.as_str(), &event.data["reason"]), ("resync", &json!("plugin")), "{event:?}");
            live.until_seq(insert(&db, id + 3).await).await;
            assert_eq!(live.fold.rows.len() as i64, id / 10 * 4);
        }
        live.until_seq(insert(&db, id + 4).await).await;
        db.sql_params("DELETE FROM t WHERE id = $1", json!([id + 4])).await;
    }
    assert_eq!(live.fold.resyncs, if feed { 0 } else { UNFIT.len() });
    // Whoever is pinned has noticed nothing.
    let last = insert(&db, 1000).await;
    let events = pinned.until_seq(last).await;
    assert!(events.iter().all(|event| ["insert", "delete", "change"].contains(&event.name.as_str())), "{events:?}");
}

#[tokio::test]
async fn a_map_waits_for_a_version_that_fits() {
    with_versions_that_do_not_fit("row_filter").await;
}

#[tokio::test]
async fn a_feed_waits_for_a_version_that_fits() {
    with_versions_that_do_not_fit("change_filter").await;
}

/// A query that is run again as a whole has no use for a plugin that has come to see changes.
#[tokio::test]
async fn a_query_that_is_run_again_waits_as_well() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY)").await;
    db.put_plugin("p", keeps_all("row_filter", "", "", 0)).await;
    let sql = "SELECT id, count(*) AS n FROM t GROUP BY id";
    let mut live = db.live(LiveQuery::new(sql).plugin("p")).await;
    live.until_uptodate().await;
    let bad = db.put_plugin("p", keeps_all("change_filter", "", "", 0)).await;
    waits(&mut live, &bad["version"], "configure", "sees changes").await;
    insert(&db, 1).await;
    db.put_plugin("p", keeps_all("row_filter", "", "", 1)).await;
    while live.fold.rows.is_empty() {
        live.next_event().await;
    }
    assert_eq!(live.fold.resyncs, 1);
}

/// The missing column may come, too. An altered table that no longer fits ends the stream, as ever.
#[tokio::test]
async fn a_column_that_is_added_mends_a_version() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY)").await;
    db.put_plugin("p", keeps_all("row_filter", "", "", 0)).await;
    let mut live = db.live(LiveQuery::new("SELECT id FROM t").plugin("p")).await;
    live.until_uptodate().await;
    let bad = db.put_plugin("p", keeps_all("row_filter", MISSING, "", 1)).await;
    waits(&mut live, &bad["version"], "configure", "nowhere").await;
    db.sql("ALTER TABLE t ADD COLUMN nowhere INT").await;
    let events = live.until_uptodate().await;
    assert!(events.iter().any(|event| event.name == "resync"), "{events:?}");
    db.sql("ALTER TABLE t DROP COLUMN nowhere").await;
    let closed = live.next_change().await;
    assert_eq!((closed.name.as_str(), &closed.data["code"]), ("closed", &json!("schema")), "{closed:?}");
}

/// All streams of a plugin come at once when a version does not fit, and at each change of the catalog from then on: each
/// of them compiled the query and configured the plugin for itself.
#[tokio::test]
async fn what_does_not_fit_is_looked_at_once_for_all() {
    const STREAMS: usize = 40;
    const COMPILED: &str = "tidegate_live_compiles_total";
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY)").await;
    db.put_plugin("p", keeps_all("row_filter", "", "", 0)).await;
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let mut live = db.live(LiveQuery::new("SELECT id FROM t").plugin("p")).await;
        live.until_uptodate().await;
        streams.push(live);
    }
    let before = db.metric(COMPILED).await;
    let bad = db.put_plugin("p", keeps_all("row_filter", "", TRAPS, 1)).await;
    for live in &mut streams {
        waits(live, &bad["version"], "trap", "unreachable").await;
    }
    db.sql("CREATE TABLE other (id BIGINT PRIMARY KEY)").await;
    db.put_plugin("p", keeps_all("row_filter", "", "", 2)).await;
    for live in &mut streams {
        let events = live.until_uptodate().await;
        assert!(events.iter().any(|event| event.name == "resync"), "{events:?}");
        assert!(events.iter().all(|event| event.name != "plugin-error"), "{events:?}");
    }
    // Once for each of the three catalogs, and again where that took more than a few seconds.
    let compiled = db.metric(COMPILED).await - before;
    assert!(compiled < STREAMS as f64 / 2.0, "{compiled} times for {STREAMS} streams");
}
