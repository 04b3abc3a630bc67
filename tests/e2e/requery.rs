//! Live queries that are run again as a whole: aggregates, joins, ORDER BY … LIMIT, sub-queries.

use std::time::Duration;

use serde_json::{Value, json};
use tests::fold::{State, canonical};
use tests::live::seq;
use tests::{Client, LiveQuery, Options, TestServer};

const RUNS: &str = "tidegate_live_requeries_total";

async fn shop() -> (TestServer, Client) {
    shop_beating(Options::default().heartbeat_ms).await
}

async fn shop_beating(heartbeat_ms: u64) -> (TestServer, Client) {
    // Short, so that the tests do not wait for the coalescing that they do not test.
    let live = "requery_interval_ms = 20".to_owned();
    let server = TestServer::with(Options { live, heartbeat_ms, ..Options::default() }).await;
    let db = server.admin();
    db.sql(
        "CREATE TABLE orders (id BIGINT PRIMARY KEY, customer INT, total DECIMAL(10, 2)); \
         CREATE TABLE customers (id INT PRIMARY KEY, name TEXT, city TEXT); \
         CREATE TABLE elsewhere (id INT PRIMARY KEY)",
    )
    .await;
    db.sql("INSERT INTO customers VALUES (1, 'ann', 'Bern'), (2, 'bob', 'Bern'), (3, 'cid', NULL)").await;
    db.sql("INSERT INTO orders VALUES (1, 1, 10.00), (2, 1, 5.50), (3, 2, 1.00)").await;
    (server, db)
}

/// What the fold has to be: the same SELECT, by key.
async fn due(db: &Client, sql: &str, key: &[&str]) -> State {
    let rows = db.objects(sql).await;
    rows.into_iter().map(|row| (canonical(key.iter().map(|name| (*name, &row[*name]))), row)).collect()
}

#[tokio::test]
async fn an_aggregate_follows_its_table() {
    let (_server, db) = shop().await;
    let sql = "SELECT customer, count(*) AS n, sum(total) AS total FROM orders GROUP BY customer";
    let mut live = db.live(sql).await;
    let start = live.next_event().await;
    assert_eq!((start.data["mode"].as_str(), &start.data["key"]), (Some("requery"), &json!(["customer"])));
    assert_eq!((&start.data["interval_ms"], &start.data["semantics"]), (&json!(20), &json!("map")));
    let snapshot = live.until_uptodate().await;
    assert_eq!(snapshot.len(), 2);
    assert!(snapshot.iter().all(|event| event.data["snapshot"] == true && event.id.is_none()));

    let answer = db.sql("INSERT INTO orders VALUES (4, 2, 2.25)").await;
    let event = live.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["key"]), ("update", &json!({"customer": 2})));
    assert_eq!(event.data["row"], json!({"customer": 2, "n": 2, "total": "3.25"}));
    assert_eq!(event.data["old"], json!({"n": 1, "total": "1.00"}));
    // The id is the place of the snapshot that the result is of.
    let id = event.id.unwrap();
    let place: u64 = id.split('-').nth(1).unwrap().parse().unwrap();
    assert!(place >= seq(&answer), "{id}");

    let answer = db.sql("INSERT INTO orders VALUES (5, 3, 7.00); DELETE FROM orders WHERE customer = 1").await;
    let events = live.until_seq(seq(&answer)).await;
    let ops: Vec<(&str, bool)> = events.iter().map(|event| (event.name.as_str(), event.id.is_some())).collect();
    assert_eq!(ops, [("delete", false), ("insert", true)], "{events:?}");
    assert_eq!(events[0].data["reason"], "moved_out");
    assert_eq!(live.fold.rows, due(&db, sql, &["customer"]).await);

    // A commit that leaves the result as it is brings no event, and another table's not even a run.
    let answer = db.sql("UPDATE orders SET id = 50 WHERE id = 5").await;
    assert!(live.until_seq(seq(&answer)).await.is_empty());
    let runs = db.metric(RUNS).await;
    let answer = db.sql("INSERT INTO elsewhere VALUES (1)").await;
    assert!(live.until_seq(seq(&answer)).await.is_empty());
    assert_eq!(db.metric(RUNS).await, runs);
}

#[tokio::test]
async fn any_select_is_live() {
    let (server, db) = shop().await;
    server.admin().sql("CREATE TABLE notes (id INT PRIMARY KEY, stars INT) WITH (type = 'user')").await;
    let queries: [(&str, &[&str]); 9] = [
        ("SELECT count(*) AS n, max(total) AS most FROM orders", &[]),
        ("SELECT id, total FROM orders ORDER BY total DESC, id LIMIT 2", &["id"]),
        (
            "SELECT o.id, c.id AS of, c.name, o.total FROM orders o JOIN customers c ON c.id = o.customer WHERE c.city = 'Bern'",
            &["id", "of"],
        ),
        (
            "SELECT c.id, o.id AS number, c.name FROM customers c LEFT JOIN orders o ON o.customer = c.id",
            &["id", "number"],
        ),
        ("SELECT DISTINCT city FROM customers", &["city"]),
        ("SELECT id FROM customers WHERE id NOT IN (SELECT customer FROM orders WHERE customer IS NOT NULL)", &["id"]),
        ("SELECT id, rank() OVER (PARTITION BY customer ORDER BY total DESC, id) AS place FROM orders", &["id"]),
        (
            "WITH spent AS (SELECT customer, sum(total) AS s FROM orders GROUP BY customer) SELECT customer, s FROM spent WHERE s > 2",
            &["customer"],
        ),
        ("SELECT stars, count(*) AS n FROM notes GROUP BY stars", &["stars"]),
    ];
    let mut all = Vec::new();
    for (sql, _) in queries {
        let mut live = db.live(sql).await;
        live.until_uptodate().await;
        all.push(live);
    }
    let mut last = 0;
    for step in [
        "INSERT INTO orders VALUES (10, 3, 99.00), (11, 1, 0.10)",
        "UPDATE customers SET city = 'Rome' WHERE id = 1",
        "INSERT INTO notes VALUES (1, 5), (2, 5), (3, 1)",
        "UPDATE orders SET customer = 2 WHERE customer = 1; DELETE FROM orders WHERE id = 10",
        "DELETE FROM notes WHERE id = 1; UPDATE customers SET city = 'Bern'",
        "INSERT INTO customers VALUES (4, 'dot', 'Oslo'); DELETE FROM customers WHERE id = 3",
    ] {
        last = seq(&db.sql(step).await);
        // Of somebody else: not to be seen.
        server.client("bob").try_sql(&format!("INSERT INTO notes VALUES ({last}, 3)"), json!([])).await.unwrap();
        for (live, (sql, key)) in all.iter_mut().zip(queries) {
            live.until_seq(last).await;
            assert_eq!(live.fold.rows, due(&db, sql, key).await, "{sql}\nafter {step}");
        }
    }
    assert!(all.iter().all(|live| live.fold.resyncs == 0), "{last}");
}

#[tokio::test]
async fn rows_without_a_key_are_told_apart_by_their_values() {
    let (_server, db) = shop().await;
    let mut live = db.live("SELECT city FROM customers UNION ALL SELECT 'Bern' FROM orders WHERE total < 2").await;
    assert_eq!(live.next_event().await.data["key"], json!(["_row", "_n"]));
    live.until_uptodate().await;
    let held = |live: &tests::Live| {
        let mut cities: Vec<Value> = live.fold.rows.values().map(|row| row["city"].clone()).collect();
        cities.sort_by_key(Value::to_string);
        json!(cities)
    };
    assert_eq!(held(&live), json!(["Bern", "Bern", "Bern", null]));
    let answer = db.sql("UPDATE customers SET city = 'Rome' WHERE id <> 3").await;
    live.until_seq(seq(&answer)).await;
    assert_eq!(held(&live), json!(["Bern", "Rome", "Rome", null]));
}

#[tokio::test]
async fn one_run_serves_all_subscribers_of_a_query() {
    let (_server, db) = shop().await;
    let sql = "SELECT count(*) AS n FROM orders";
    let mut all = Vec::new();
    for _ in 0..8 {
        let mut live = db.live(sql).await;
        live.until_uptodate().await;
        all.push(live);
    }
    assert_eq!(db.metric(RUNS).await, 1.0, "joiners share the group's result");
    let answer = db.sql("DELETE FROM orders").await;
    for live in &mut all {
        live.until_seq(seq(&answer)).await;
        assert_eq!(live.fold.rows.values().collect::<Vec<_>>(), [&json!({"n": 0})]);
    }
    assert_eq!(db.metric(RUNS).await, 2.0);
    assert_eq!(db.metric("tidegate_groups").await, 1.0);
}

#[tokio::test]
async fn a_burst_of_commits_is_one_run() {
    let live = "requery_interval_ms = 60000".to_owned();
    let server = TestServer::with(Options { live, ..Options::default() }).await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let mut live = db.live("SELECT count(*) AS n FROM t").await;
    live.until_uptodate().await;
    for id in 0..20 {
        db.sql(&format!("INSERT INTO t VALUES ({id})")).await;
    }
    // Within the interval after the first run there is none, and nothing says that the stream has got further.
    assert_eq!(db.metric(RUNS).await, 1.0);
    // Who comes anew does not wait for the interval; the others get the same result, in one event.
    let mut other = db.live("SELECT count(*) AS n FROM t").await;
    let snapshot = other.until_uptodate().await;
    assert_eq!(snapshot[1].data["row"], json!({"n": 20}));
    let event = live.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["row"]), ("update", &json!({"n": 20})));
    assert_eq!(db.metric(RUNS).await, 2.0);
}

/// Who comes while a commit to another table is on its way waits for that to be known, and nobody told the worker of it: such
/// a stream began with the next heartbeat.
#[tokio::test]
async fn who_waits_for_a_commit_to_another_table_hears_of_it() {
    let config = "[storage]\ndurability = \"interval\"\nsync_interval_ms = 200\n".to_owned();
    let options = Options { config, heartbeat_ms: 60_000, ..Options::default() };
    let server = TestServer::with(options).await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY); CREATE TABLE elsewhere (id INT PRIMARY KEY)").await;
    let mut first = db.live("SELECT count(*) AS n FROM t").await;
    first.until_uptodate().await;
    for id in 0..5 {
        // Acknowledged, and not told to the live side before it is synced.
        db.sql(&format!("INSERT INTO elsewhere VALUES ({id})")).await;
        let mut live = db.live("SELECT count(*) AS n FROM t").await;
        let begun = tokio::time::timeout(Duration::from_secs(20), live.until_uptodate()).await;
        assert_eq!(begun.expect("it begins long before a heartbeat")[1].data["row"], json!({"n": 0}));
    }
}

#[tokio::test]
async fn a_stream_goes_on_from_its_groups_tail_or_starts_afresh() {
    // A group that is quiet forgets its tail after some seconds, or heartbeats.
    let (mut server, db) = shop_beating(60_000).await;
    let sql = "SELECT customer, sum(total) AS s FROM orders GROUP BY customer";
    let mut keeper = db.live(sql).await;
    keeper.until_uptodate().await;
    let mut live = db.live(sql).await;
    live.until_uptodate().await;

    // The group lives on: its tail has what was missed.
    live.disconnect();
    db.sql("UPDATE orders SET total = total + 1; ").await;
    for _ in 0..2 {
        keeper.next_change().await;
    }
    live.reconnect().await;
    let events = live.until_uptodate().await;
    assert_ne!(events[0].data["from"], "snapshot");
    assert_eq!(events.len(), 3, "start and two updates: {events:?}");
    assert_eq!((live.fold.resyncs, &live.fold.rows), (0, &due(&db, sql, &["customer"]).await));

    // Nobody kept the group, but nothing has changed either: also after a restart.
    keeper.disconnect();
    live.disconnect();
    server.kill9();
    server.restart().await;
    live.reconnect().await;
    assert_ne!(live.next_event().await.data["from"], "snapshot");
    assert!(live.until_uptodate().await.is_empty());
    assert_eq!(live.fold.resyncs, 0);

    // Nobody kept the group, and something has changed.
    live.disconnect();
    db.sql("DELETE FROM orders WHERE customer = 2").await;
    server.kill9();
    server.restart().await;
    live.reconnect().await;
    let events = live.until_uptodate().await;
    let resync: Vec<&Value> = events.iter().filter(|e| e.name == "resync").map(|e| &e.data["reason"]).collect();
    assert_eq!(resync, ["requery"], "{events:?}");
    assert_eq!(live.fold.rows, due(&db, sql, &["customer"]).await);
}

#[tokio::test]
async fn changes_alone() {
    let (_server, db) = shop().await;
    let query = LiveQuery::new("SELECT count(*) AS n FROM orders").option("snapshot", "false");
    let mut live = db.live(query).await;
    let start = live.next_event().await;
    // Where it begins its first `uptodate` says: a place named here could be before what was counted.
    assert_eq!((start.name.as_str(), &start.data["from"]), ("start", &json!("snapshot")));
    assert!(live.until_uptodate().await.is_empty());
    db.sql("DELETE FROM orders WHERE id = 1").await;
    // The fold of this client holds no row that could be updated: read past it, and past signs of life.
    let mut event = live.read(tests::PATIENCE).await.unwrap().unwrap();
    while event.name == "uptodate" {
        event = live.read(tests::PATIENCE).await.unwrap().unwrap();
    }
    assert_eq!((event.name.as_str(), &event.data["row"]), ("update", &json!({"n": 2})));
}

#[tokio::test]
async fn what_cannot_be_run_is_refused_before_there_is_a_stream() {
    let (_server, db) = shop().await;
    let query = LiveQuery::new("SELECT id, EXISTS (SELECT 1 FROM orders) AS any FROM customers ORDER BY id LIMIT 3");
    let response = query.request(&db, None).send().await.unwrap();
    assert_eq!(response.status(), 400);
    let problem: Value = response.json().await.unwrap();
    assert_eq!(problem["code"], "unsupported", "{problem}");
}

#[tokio::test]
async fn what_ends_it() {
    let (_server, db) = shop().await;
    let mut live = db.live("SELECT c.id FROM orders o JOIN customers c ON c.id = o.customer").await;
    live.until_uptodate().await;
    db.sql("DROP TABLE customers").await;
    let event = live.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["code"]), ("closed", &json!("table_dropped")));
    assert_eq!(live.next_or_end().await, None);
    assert!(live.try_reconnect().await.unwrap().status().as_u16() >= 400);

    // A run that fails says so.
    let mut live = db.live("SELECT sum(1 / (id - 77)) AS s FROM orders").await;
    live.until_uptodate().await;
    db.sql("INSERT INTO orders VALUES (77, 1, 1)").await;
    let event = live.next_change().await;
    assert_eq!(event.name, "failed", "{event:?}");
    assert_eq!(live.next_or_end().await, None);
}

#[tokio::test]
async fn what_does_not_fit_is_refused_by_name() {
    let (_server, db) = shop().await;
    db.sql("CREATE TABLE ticks (id INT PRIMARY KEY) WITH (type = 'stream', ttl = '1h')").await;
    for (query, named) in [
        (LiveQuery::new("SELECT count(*) AS n FROM ticks"), "the stream table ticks"),
        (LiveQuery::new("SELECT count(*) AS n FROM orders").option("last_rows", "3"), "last_rows"),
        (LiveQuery::new("SELECT count(*) AS n FROM orders WHERE total > random()"), "random()"),
        (LiveQuery::new("SELECT count(*) AS n FROM information_schema.tables"), "information_schema.tables"),
        (LiveQuery::new("SELECT 1 AS one"), "without a table"),
    ] {
        let problem = db.expect_no_live(query, 400, "unsupported").await;
        assert!(problem["detail"].as_str().unwrap().contains(named), "{problem}");
    }
}
