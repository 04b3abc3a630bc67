//! Pipelines that see changes: every output once, in order, over reconnects, failures and versions.

use serde_json::{Value, json};
use tests::guest::{Guest, KEEP_ALL, filtering};
use tests::live::seq;
use tests::{Client, Live, LiveQuery, Options, TestServer, plugin};

pub const COLUMNS: &str = "id BIGINT PRIMARY KEY, carrier TEXT, flight INT, dep_delay DOUBLE";

async fn flights(server: &TestServer) -> Client {
    let db = server.admin();
    db.sql(&format!("CREATE TABLE flights ({COLUMNS})")).await;
    db.sql("INSERT INTO flights VALUES (1, 'UA', 10, 2), (2, 'AA', 20, 30), (3, 'B6', 30, NULL)").await;
    db
}

/// Op, key and row of each change up to the commit `until`.
async fn changes(live: &mut Live, until: u64) -> Vec<Value> {
    let events = live.until_seq(until).await;
    let changes = events.iter().filter(|event| event.name == "change");
    changes.map(|event| json!([event.data["op"], event.data["key"]["id"], event.data["row"]])).collect()
}

/// A change filter in WebAssembly text that keeps every change, unless the new row's id, its first column, is `bad`: then
/// `fault`.
fn feed(bad: i64, fault: &str) -> Vec<u8> {
    let filter = filtering(&format!(
        r#"(local $i i32) (local $c i32)
    (loop $change
      (local.set $c (i32.add (i32.add (global.get $window) (local.get $d)) (i32.mul (local.get $i) (i32.const 48))))
      (if (i32.load offset=44 (local.get $c)) (then
        (if (i64.eq (i64.load (i32.add (global.get $window) (i32.load offset=36 (local.get $c)))) (i64.const {bad}))
          (then {fault}))))
      (br_if $change (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (local.get $n))))
    {KEEP_ALL}"#
    ));
    Guest { plugin: ",\"kind\":\"change_filter\"", fields: &filter, ..Guest::default() }.bytes()
}

#[tokio::test]
async fn a_feed_has_each_output_once_and_in_order() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    let worse = db.put_plugin("worse", plugin("worse.wasm")).await;
    assert_eq!(worse["kinds"], json!(["change_filter"]));
    db.put_plugin("crossings", plugin("crossings.wasm")).await;
    db.put_plugin("late", plugin("late.wasm")).await;

    let sql = "SELECT id, dep_delay FROM flights WHERE carrier <> 'B6'";
    let mut worse = db.live(LiveQuery::new(sql).plugin(r#"worse:{"minutes":10}"#)).await;
    let mut crossings = db.live(LiveQuery::new(sql).plugin("crossings")).await;
    let mut late = db.live(LiveQuery::new(sql).plugin(r#"late:{"minutes":20}"#).plugin("crossings")).await;
    for live in [&mut worse, &mut crossings, &mut late] {
        let start = live.next_event().await;
        assert_eq!((start.name.as_str(), &start.data["semantics"]), ("start", &json!("feed")));
        assert_ne!(start.data["from"], "snapshot", "there are no present rows");
        assert!(live.until_uptodate().await.is_empty());
    }
    db.sql("UPDATE flights SET dep_delay = dep_delay + 12").await;
    db.sql("UPDATE flights SET dep_delay = dep_delay + 9, carrier = 'AA'").await;
    db.sql("UPDATE flights SET dep_delay = 70 WHERE id = 1; DELETE FROM flights WHERE id = 2").await;
    let last = seq(&db.sql("INSERT INTO flights VALUES (4, 'UA', 40, 200)").await);
    assert_eq!(
        changes(&mut worse, last).await,
        [
            json!(["update", 1, {"id": 1, "dep_delay": 14.0}]),
            json!(["update", 2, {"id": 2, "dep_delay": 42.0}]),
            json!(["update", 1, {"id": 1, "dep_delay": 70.0}]),
        ]
    );
    let row = |flight: i64, carrier: &str, minutes: i64, over: bool| json!({"carrier": carrier, "flight": flight, "minutes": minutes, "over": over});
    let all = [
        json!(["update", 1, row(10, "AA", 15, true)]),
        json!(["update", 1, row(10, "AA", 60, true)]),
        json!(["delete", 2, row(20, "AA", 15, false)]),
        json!(["insert", 4, row(40, "UA", 15, true)]),
        json!(["insert", 4, row(40, "UA", 60, true)]),
        json!(["insert", 4, row(40, "UA", 180, true)]),
    ];
    assert_eq!(changes(&mut crossings, last).await, all);
    // The row filter in front takes rows below 20 minutes out of the changes.
    assert_eq!(changes(&mut late, last).await, {
        let mut all = all.to_vec();
        all[0] = json!(["insert", 1, row(10, "AA", 15, true)]);
        all
    });
}

/// Commits that were acknowledged and not synced yet were told to be in the past, and a feed could not be opened behind
/// them; to others a snapshot was given that had been read before them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_that_are_not_synced_yet_are_in_a_snapshot_and_no_trouble_to_a_feed() {
    let config = "[storage]\ndurability = \"interval\"\nsync_interval_ms = 1000\n".to_owned();
    let server = TestServer::with(Options { config, ..Options::default() }).await;
    let db = server.admin();
    db.put_plugin("feed", feed(-1, "unreachable")).await;
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY)").await;
    for id in 0..8 {
        // Somebody else's snapshot is kept, while the worker has so much to do.
        let before = futures::future::join_all((0..4).map(|_| db.live("SELECT id FROM t"))).await;
        db.sql(&format!("INSERT INTO t VALUES ({id})")).await;
        let mut fed = db.live(LiveQuery::new("SELECT id FROM t").plugin("feed")).await;
        assert_eq!(fed.next_event().await.data["semantics"], json!("feed"));
        let rows = db.live("SELECT id FROM t").await.until_uptodate().await;
        let rows = rows.iter().filter(|event| event.name == "insert").count();
        assert_eq!(rows, id + 1, "what was acknowledged is there");
        drop(before);
    }
}

/// A snapshot is told when it is on disk, whoever waits for the sync of what is in it: its place was taken for one that
/// is not there yet, and everything was told again.
#[tokio::test]
async fn a_place_that_was_given_is_good_before_the_next_sync() {
    let config = "[storage]\ndurability = \"interval\"\nsync_interval_ms = 10000\n".to_owned();
    let server = TestServer::with(Options { config, ..Options::default() }).await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY); ").await;
    db.sql("INSERT INTO t VALUES (1)").await;
    let mut live = db.live("SELECT id FROM t").await;
    live.until_uptodate().await;
    live.disconnect();
    live.reconnect().await;
    assert_ne!(live.next_event().await.data["from"], "snapshot");
    assert_eq!(live.fold.resyncs, 0);
}

#[tokio::test]
async fn a_feed_resumes_over_restarts_and_versions() {
    let mut server = TestServer::start().await;
    let db = flights(&server).await;
    db.put_plugin("feed", feed(-1, "unreachable")).await;
    let mut live = db.live(LiveQuery::new("SELECT id FROM flights").plugin("feed")).await;
    live.until_uptodate().await;
    let one = seq(&db.sql("INSERT INTO flights (id) VALUES (10), (11)").await);
    let ids = |changes: Vec<Value>| changes.iter().map(|change| change[1].as_i64().unwrap()).collect::<Vec<_>>();
    assert_eq!(ids(changes(&mut live, one).await), [10, 11]);
    live.disconnect();
    db.sql("INSERT INTO flights (id) VALUES (12)").await;
    server.kill9();
    server.restart().await;
    // Another version while nobody looks: it takes what is to come, and the stream says so.
    let other = db.put_plugin("feed", feed(-2, "unreachable")).await;
    let two = seq(&db.sql("INSERT INTO flights (id) VALUES (13)").await);
    live.reconnect().await;
    let start = live.next_event().await;
    assert_eq!((start.name.as_str(), start.data["from"] == "snapshot"), ("start", false));
    let pipeline = live.next_event().await;
    let expected = json!({"plugin": "feed", "version": 2, "sha256": other["sha256"]});
    assert_eq!((pipeline.name.as_str(), &pipeline.data), ("pipeline", &expected));
    assert_eq!(ids(changes(&mut live, two).await), [12, 13]);
    assert_eq!(live.fold.resyncs, 0);

    // Without a position a feed starts now; one with a snapshot is refused.
    let mut fresh = db.live(LiveQuery::new("SELECT id FROM flights").plugin("feed")).await;
    fresh.until_uptodate().await;
    let three = seq(&db.sql("DELETE FROM flights WHERE id < 12").await);
    assert_eq!(ids(changes(&mut fresh, three).await), [1, 2, 3, 10, 11]);
    let snapshot = LiveQuery::new("SELECT id FROM flights").plugin("feed").option("snapshot", "true");
    db.expect_no_live(snapshot, 400, "bad_request").await;
    let other_parameters = LiveQuery::new("SELECT id FROM flights").plugin("feed").plugin("feed@1");
    let response = other_parameters.request(&db, fresh.fold.last_id.as_deref()).send().await.unwrap();
    assert_eq!(response.status(), 400, "another pipeline is another live query");
}

#[tokio::test]
async fn a_feed_that_stops_goes_on_from_the_very_commit() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    db.put_plugin("feed", feed(13, "unreachable")).await;
    let mut live = db.live(LiveQuery::new("SELECT id FROM flights").plugin("feed")).await;
    live.until_uptodate().await;
    let good = seq(&db.sql("INSERT INTO flights (id) VALUES (10)").await);
    db.sql("INSERT INTO flights (id) VALUES (12), (13), (14)").await;
    db.sql("INSERT INTO flights (id) VALUES (15)").await;
    let mut ids = Vec::new();
    let error = loop {
        let event = live.next_change().await;
        match event.name.as_str() {
            "change" => ids.push(event.data["key"]["id"].as_i64().unwrap()),
            "plugin-error" => break event,
            _ => panic!("{event:?}"),
        }
    };
    assert_eq!(ids, [10], "nothing of the commit that failed");
    assert_eq!((&error.data["seq"], &error.data["cause"]), (&json!(good), &json!("trap")));
    assert_eq!((&error.data["plugin"], &error.data["version"]), (&json!("feed"), &json!(1)));
    db.put_plugin("feed", feed(-1, "unreachable")).await;
    assert_eq!(live.next_change().await.name, "pipeline");
    let last = seq(&db.sql("INSERT INTO flights (id) VALUES (16)").await);
    let rest = changes(&mut live, last).await;
    assert_eq!(rest.iter().map(|change| change[1].as_i64().unwrap()).collect::<Vec<_>>(), [12, 13, 14, 15, 16]);
    assert_eq!(live.fold.resyncs, 0);
}

/// Versions change while changes flow, and clients come and go: each change once, in order, by one of the versions.
#[tokio::test]
async fn no_change_is_lost_or_doubled_by_versions() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    db.put_plugin("feed", feed(-1, "unreachable")).await;
    let mut live = db.live(LiveQuery::new("SELECT id FROM flights").plugin("feed")).await;
    let mut hopper = db.live(LiveQuery::new("SELECT id FROM flights").plugin("feed")).await;
    live.until_uptodate().await;
    hopper.until_uptodate().await;
    const ROUNDS: i64 = 12;
    const ROWS: i64 = 20;
    let writer = tokio::spawn({
        let db = db.clone();
        async move {
            let mut last = 0;
            for id in 0..ROUNDS * ROWS {
                last = seq(&db.sql_params("INSERT INTO flights (id) VALUES ($1)", json!([1000 + id])).await);
            }
            last
        }
    });
    for version in 0..ROUNDS {
        db.put_plugin("feed", feed(-2 - version, "unreachable")).await;
    }
    // One stays, the other reconnects in the middle of whatever it is told.
    let expected: Vec<i64> = (1000..1000 + ROUNDS * ROWS).collect();
    let mut ids = Vec::new();
    while ids.len() < expected.len() {
        let event = hopper.next_event().await;
        match event.name.as_str() {
            "change" => {
                ids.push(event.data["key"]["id"].as_i64().unwrap());
                if ids.len() % 7 == 3 {
                    hopper.reconnect().await;
                }
            }
            "uptodate" | "pipeline" | "start" => {}
            _ => panic!("{event:?}"),
        }
    }
    assert_eq!(ids, expected, "over reconnects");
    let last = writer.await.unwrap();
    let ids = changes(&mut live, last).await.iter().map(|change| change[1].as_i64().unwrap()).collect::<Vec<_>>();
    assert_eq!(ids, expected);
}
