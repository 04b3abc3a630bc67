//! Pipelines over the results of live queries that are run again as a whole: aggregates, joins, ORDER BY … LIMIT.

use serde_json::{Value, json};
use tests::fold::{State, canonical};
use tests::guest::{KEEP_ALL, filter};
use tests::live::seq;
use tests::{Client, Live, LiveQuery, Options, PATIENT_WITH_PLUGINS, TestServer, plugin};

use crate::failures::{TELL, errors, replay, sour};
use crate::oracle::{delay, local_units};

const COLUMNS: &str =
    "id BIGINT PRIMARY KEY, carrier TEXT NOT NULL, flight INT, origin TEXT, dest TEXT, distance INT, dep_delay DOUBLE";

async fn server() -> (TestServer, Client) {
    // Short, so that the tests do not wait for the coalescing that they do not test.
    let live = "requery_interval_ms = 20".to_owned();
    let config = PATIENT_WITH_PLUGINS.to_owned();
    let server = TestServer::with(Options { live, config, ..Options::default() }).await;
    let db = server.admin();
    (server, db)
}

async fn flights(db: &Client) {
    db.sql(&format!("CREATE TABLE flights ({COLUMNS})")).await;
    db.sql(
        "INSERT INTO flights VALUES (1, 'UA', 1545, 'EWR', 'IAH', 1400, 2), (2, 'AA', 1141, 'JFK', 'MIA', 1089, 33), \
         (3, 'B6', 725, 'JFK', 'BQN', 1576, NULL)",
    )
    .await;
    for name in ["late", "local_units", "worse"] {
        db.put_plugin(name, plugin(&format!("{name}.wasm"))).await;
    }
}

/// What the fold has to be: the same SELECT, what `pipeline` makes of its rows, by their key.
async fn due(db: &Client, sql: &str, key: &str, pipeline: impl Fn(&Value) -> Option<Value>) -> State {
    let rows = db.objects(sql).await;
    let piped = |row: &Value| Some((canonical([(key, &row[key])].into_iter()), pipeline(row)?));
    rows.iter().filter_map(piped).collect()
}

/// `late:{"minutes":30}`, natively.
fn late(row: &Value) -> Option<Value> {
    delay(row).filter(|minutes| *minutes >= 30.0).map(|_| row.clone())
}

/// Reads up to the end of the next fresh start; why there was one.
async fn until_resync(live: &mut Live) -> Vec<Value> {
    loop {
        let events = live.until_uptodate().await;
        let resyncs = events.iter().filter(|event| event.name == "resync");
        let reasons: Vec<Value> = resyncs.map(|event| event.data["reason"].clone()).collect();
        if !reasons.is_empty() {
            return reasons;
        }
    }
}

const WORST: &str = "SELECT carrier, max(dep_delay) AS dep_delay, count(*) AS n FROM flights GROUP BY carrier";
const SUMS: &str = "SELECT carrier, count(*) AS flight, min(origin) AS origin, max(dest) AS dest, \
                    sum(distance) AS distance, max(dep_delay) AS dep_delay FROM flights GROUP BY carrier";
const LATE: &str = r#"late:{"minutes":30}"#;
const UNITS: &str = r#"local_units:{"late_from":10,"very_late_from":40}"#;

#[tokio::test]
async fn a_filter_and_a_transform_over_an_aggregate() {
    let (_server, db) = server().await;
    flights(&db).await;
    let mut filtered = db.live(LiveQuery::new(WORST).plugin(LATE)).await;
    let mut made = db.live(LiveQuery::new(SUMS).plugin(UNITS)).await;
    let mut both = db.live(LiveQuery::new(SUMS).plugin(LATE).plugin(UNITS)).await;
    let start = filtered.next_event().await;
    assert_eq!((&start.data["mode"], &start.data["semantics"]), (&json!("requery"), &json!("map")));
    let start = both.next_event().await;
    let columns = start.data["columns"].as_array().unwrap();
    let names: Vec<&str> = columns.iter().filter_map(|column| column["name"].as_str()).collect();
    assert_eq!(names, ["carrier", "flight", "origin", "dest", "km", "delay_class", "dep_delay_minutes"]);
    assert_eq!(start.data["key"], json!(["carrier"]));
    for live in [&mut filtered, &mut made, &mut both] {
        live.until_uptodate().await;
    }
    let listed = db.rows("SELECT mode, pipeline FROM system.live_queries ORDER BY pipeline").await;
    assert_eq!(listed[0], json!(["requery", r#"late@1:{"minutes":30}"#]), "{listed}");

    for step in [
        "INSERT INTO flights VALUES (10, 'UA', 1, 'EWR', 'ORD', 700, 45), (11, 'DL', 2, 'LGA', 'ATL', 760, 31)",
        "UPDATE flights SET dep_delay = dep_delay + 10 WHERE carrier = 'AA'",
        // Out of the result by the filter, though the SQL has the row; and into it.
        "UPDATE flights SET dep_delay = 29 WHERE id = 10; UPDATE flights SET dep_delay = 30 WHERE id = 3",
        "DELETE FROM flights WHERE carrier = 'DL'; INSERT INTO flights VALUES (12, 'DL', 3, NULL, NULL, NULL, 99)",
        "DELETE FROM flights",
        "INSERT INTO flights VALUES (20, 'WN', 4, 'LGA', 'MDW', 725, 300)",
    ] {
        let last = seq(&db.sql(step).await);
        for live in [&mut filtered, &mut made, &mut both] {
            live.until_seq(last).await;
        }
        let transformed = |row: &Value| Some(local_units(row));
        assert_eq!(filtered.fold.rows, due(&db, WORST, "carrier", late).await, "{step}");
        assert_eq!(made.fold.rows, due(&db, SUMS, "carrier", transformed).await, "{step}");
        let late_and_made = |row: &Value| late(row).as_ref().map(local_units);
        assert_eq!(both.fold.rows, due(&db, SUMS, "carrier", late_and_made).await, "{step}");
    }
    // What the filter decides is told as any other way out of the result.
    db.sql("UPDATE flights SET dep_delay = 29").await;
    let event = filtered.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["reason"]), ("delete", &json!("moved_out")));
    assert_eq!(event.data["key"], json!({"carrier": "WN"}));

    // A commit that leaves the result as it is brings no event.
    let answer = db.sql("UPDATE flights SET id = 21").await;
    assert!(filtered.until_seq(seq(&answer)).await.is_empty());

    // The tail of the group is there while somebody keeps it.
    let mut keeper = db.live(LiveQuery::new(WORST).plugin(LATE)).await;
    keeper.until_uptodate().await;
    filtered.disconnect();
    let answer = db.sql("UPDATE flights SET dep_delay = 77").await;
    keeper.until_seq(seq(&answer)).await;
    filtered.reconnect().await;
    filtered.until_seq(seq(&answer)).await;
    assert_eq!((filtered.fold.resyncs, &filtered.fold.rows), (0, &keeper.fold.rows));
    assert_eq!(db.metric("tidegate_guest_bytes_copied_total").await, 0.0);
    assert_eq!(db.metric("tidegate_plugin_failures_total").await, 0.0);
}

/// Results go through in pieces of a thousand rows or so.
#[tokio::test]
async fn a_large_result_goes_through_in_pieces() {
    let (_server, db) = server().await;
    flights(&db).await;
    let sql = "SELECT flight, max(dep_delay) AS dep_delay FROM flights GROUP BY flight";
    // Told apart by their values: the numbers of rows that are equal are given before the filter.
    let twice = "SELECT dep_delay FROM flights UNION ALL SELECT dep_delay FROM flights WHERE dep_delay >= 2400";
    let mut live = db.live(LiveQuery::new(sql).plugin(r#"late:{"minutes":1000}"#)).await;
    let mut doubled = db.live(LiveQuery::new(twice).plugin(r#"late:{"minutes":2000}"#)).await;
    live.until_uptodate().await;
    assert_eq!(doubled.next_event().await.data["key"], json!(["_row", "_n"]));
    doubled.until_uptodate().await;
    for first in (10_000..12_500).step_by(500) {
        let row = |id: i32| format!("({id}, 'UA', {id}, {})", id - 10_000);
        let rows: Vec<String> = (first..first + 500).map(row).collect();
        db.sql(&format!("INSERT INTO flights (id, carrier, flight, dep_delay) VALUES {}", rows.join(", "))).await;
    }
    let last = seq(&db.sql("DELETE FROM flights WHERE id < 10000").await);
    live.until_seq(last).await;
    doubled.until_seq(last).await;
    assert_eq!((live.fold.rows.len(), doubled.fold.rows.len()), (1_500, 500 + 100));
    let last = seq(&db.sql("UPDATE flights SET dep_delay = dep_delay + 1").await);
    live.until_seq(last).await;
    doubled.until_seq(last).await;
    assert_eq!((live.fold.rows.len(), doubled.fold.rows.len()), (1_501, 501 + 101));
    let minutes = |row: &Value| delay(row).filter(|minutes| *minutes >= 1_000.0).map(|_| row.clone());
    assert_eq!(live.fold.rows, due(&db, sql, "flight", minutes).await);
    // Who comes anew is given the result as it went through.
    let mut other = db.live(LiveQuery::new(sql).plugin(r#"late:{"minutes":1000}"#)).await;
    other.until_uptodate().await;
    assert_eq!(other.fold.rows, live.fold.rows);
}

#[tokio::test]
async fn a_join_with_a_user_table_is_the_users() {
    let (server, db) = server().await;
    db.sql("CREATE TABLE trips (id INT PRIMARY KEY, carrier TEXT, dep_delay INT) WITH (type = 'user')").await;
    db.sql("CREATE TABLE airlines (carrier TEXT PRIMARY KEY, name TEXT)").await;
    db.sql("INSERT INTO airlines VALUES ('UA', 'United'), ('B6', 'JetBlue')").await;
    db.put_plugin("late", plugin("late.wasm")).await;
    let (alice, bob) = (server.client("alice"), server.client("bob"));
    alice.sql("INSERT INTO trips VALUES (1, 'UA', 20), (2, 'B6', 3)").await;
    bob.sql("INSERT INTO trips VALUES (1, 'UA', 50), (3, 'B6', 60), (4, 'AA', 70)").await;
    // The shared table first: whose rows they are is not a matter of order.
    let sql = "SELECT t.id, a.name, t.dep_delay FROM airlines a JOIN trips t ON a.carrier = t.carrier";
    let query = || LiveQuery::new(sql).plugin("late");
    let (mut alices, mut bobs) = (alice.live(query()).await, bob.live(query()).await);
    alices.until_uptodate().await;
    bobs.until_uptodate().await;
    let held = |live: &Live| {
        let mut rows: Vec<Value> = live.fold.rows.values().cloned().collect();
        rows.sort_by_key(|row| row["id"].as_i64());
        json!(rows)
    };
    let row = |id: i64, name: &str, delay: i64| json!({"id": id, "name": name, "dep_delay": delay});
    assert_eq!(held(&alices), json!([row(1, "United", 20)]));
    assert_eq!(held(&bobs), json!([row(1, "United", 50), row(3, "JetBlue", 60)]));
    for round in 0..3 {
        alice.sql(&format!("UPDATE trips SET dep_delay = {} WHERE id = 2", 100 + round)).await;
        bob.sql("UPDATE trips SET dep_delay = dep_delay + 10 WHERE id = 3").await;
    }
    let last = seq(&db.sql("UPDATE airlines SET name = 'Blue' WHERE carrier = 'B6'").await);
    alices.until_seq(last).await;
    bobs.until_seq(last).await;
    assert_eq!(held(&alices), json!([row(1, "United", 20), row(2, "Blue", 102)]));
    assert_eq!(held(&bobs), json!([row(1, "United", 50), row(3, "Blue", 90)]));
}

#[tokio::test]
async fn a_failure_on_a_users_result_is_for_that_user() {
    let (server, db) = server().await;
    db.sql("CREATE TABLE own (id INT PRIMARY KEY, k TEXT, v BIGINT) WITH (type = 'user')").await;
    db.put_plugin("sour", sour(TELL, true)).await;
    let (alice, bob) = (server.client("alice"), server.client("bob"));
    let sql = "SELECT k, sum(v) AS v FROM own GROUP BY k";
    let mut live = alice.live(LiveQuery::new(sql).plugin("sour").option("on_error", "skip")).await;
    live.until_uptodate().await;
    let bad = seq(&alice.sql("INSERT INTO own VALUES (1, 'a', 2), (2, 'a', -7), (3, 'b', 1)").await);
    live.until_seq(bad).await;
    assert_eq!(live.fold.rows.values().collect::<Vec<_>>(), [&json!({"k": "b", "v": 1})]);
    let noted = "SELECT user_name, table_name, message, new_row FROM system.plugin_errors";
    assert_eq!(alice.rows(noted).await, json!([["alice", "own", "below zero", {"k": "a", "v": -5}]]));
    assert_eq!(db.rows(noted).await, json!([["alice", "own", "", null]]), "that there was one, and no more");
    assert_eq!(bob.rows(noted).await, json!([]));
    let number = errors(&alice, "sour").await[0]["number"].as_u64().unwrap();
    assert!(replay(&alice, "sour", number).await["result"]["error"].is_object());
}

#[tokio::test]
async fn a_row_of_a_result_that_fails_is_skipped_noted_and_run_again() {
    let (_server, db) = server().await;
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY, k TEXT, v BIGINT)").await;
    db.put_plugin("sour", sour(TELL, true)).await;
    let sql = "SELECT k, sum(v) AS v FROM t GROUP BY k";
    let query = |on_error: &str| LiveQuery::new(sql).plugin("sour").option("on_error", on_error);
    let (mut live, mut passing) = (db.live(query("skip")).await, db.live(query("pass")).await);
    live.until_uptodate().await;
    passing.until_uptodate().await;
    db.sql("INSERT INTO t VALUES (1, 'a', 5), (2, 'b', 6)").await;
    let bad = seq(&db.sql("UPDATE t SET v = -5 WHERE id = 1").await);
    live.until_seq(bad).await;
    passing.until_seq(bad).await;
    assert_eq!(live.fold.rows.keys().collect::<Vec<_>>(), [r#"{"k":"b"}"#]);
    assert_eq!(passing.fold.rows[r#"{"k":"a"}"#], json!({"k": "a", "v": -5}));
    // It is in every result from now on, and noted by whichever of the two streams met it first.
    for value in 10..13 {
        let last = seq(&db.sql_params("UPDATE t SET v = $1 WHERE id = 2", json!([value])).await);
        live.until_seq(last).await;
        passing.until_seq(last).await;
    }
    let noted = errors(&db, "sour").await;
    assert!((1..=2).contains(&noted.len()), "{noted:?}");
    assert_eq!((&noted[0]["row"], &noted[0]["table"]), (&json!({"k": "a", "v": -5}), &json!("t")));
    let number = noted[0]["number"].as_u64().unwrap();
    let failed = json!({"error": {"cause": "failed", "message": "below zero"}});
    assert_eq!(replay(&db, "sour", number).await["result"], failed);
    db.put_plugin("sour", sour("(nop)", true)).await;
    assert_eq!(until_resync(&mut live).await, ["plugin"]);
    assert_eq!(live.fold.rows, due(&db, sql, "k", |row| Some(row.clone())).await);
    assert_eq!(replay(&db, "sour", number).await["result"], json!({"keep": true}));
}

#[tokio::test]
async fn a_plugin_that_fails_on_a_result_stops_its_streams_until_it_is_mended() {
    let (_server, db) = server().await;
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY, k TEXT, v BIGINT); CREATE TABLE other (id INT PRIMARY KEY)").await;
    db.put_plugin("sour", sour("unreachable", true)).await;
    let sql = "SELECT k, sum(v) AS v FROM t GROUP BY k";
    let query = || LiveQuery::new(sql).plugin("sour");
    let mut live = db.live(query()).await;
    let mut plain = db.live(sql).await;
    live.until_uptodate().await;
    plain.until_uptodate().await;
    let good = seq(&db.sql("INSERT INTO t VALUES (1, 'a', 5), (2, 'b', 6)").await);
    // A commit that is none of the query's: the stream has got further than its last result.
    let passed = seq(&db.sql("INSERT INTO other VALUES (1)").await);
    assert!(passed > good);
    live.until_seq(passed).await;
    let bad = seq(&db.sql("UPDATE t SET v = -5 WHERE id = 1; UPDATE t SET v = 7 WHERE id = 2").await);
    let error = live.next_change().await;
    assert_eq!(error.name, "plugin-error", "nothing of that result is told: {error:?}");
    assert_eq!((&error.data["plugin"], &error.data["version"]), (&json!("sour"), &json!(1)));
    assert_eq!(error.data["cause"], "trap");
    let place = error.data["seq"].as_u64().unwrap();
    assert!((passed..bad).contains(&place), "{passed} {place} {bad}");
    plain.until_seq(bad).await;
    assert_eq!(plain.fold.rows, due(&db, sql, "k", |row| Some(row.clone())).await, "others do not notice");
    // Who comes now waits as well.
    let mut newcomer = db.live(query()).await;
    assert_eq!(newcomer.next_change().await.name, "start");
    let error = newcomer.next_change().await;
    assert_eq!((error.name.as_str(), &error.data["seq"]), ("plugin-error", &json!(0)));

    let meanwhile = seq(&db.sql("INSERT INTO t VALUES (3, 'c', 8)").await);
    db.put_plugin("sour", sour("(nop)", true)).await;
    for stream in [&mut live, &mut newcomer] {
        assert_eq!(until_resync(stream).await, ["plugin"]);
    }
    plain.until_seq(meanwhile).await;
    let last = seq(&db.sql("UPDATE t SET v = v - 100").await);
    for stream in [&mut live, &mut newcomer, &mut plain] {
        stream.until_seq(last).await;
        assert_eq!(stream.fold.rows, due(&db, sql, "k", |row| Some(row.clone())).await);
    }
    assert_eq!((live.fold.resyncs, live.fold.rows.len()), (1, 3));
}

#[tokio::test]
async fn another_version_resyncs_and_a_pinned_stream_keeps_its_own() {
    let (_server, db) = server().await;
    flights(&db).await;
    db.put_plugin("p", filter("(i64.const 0)")).await;
    // A result of one row, whose key has no parts.
    let sql = "SELECT count(*) AS n FROM flights";
    let mut live = db.live(LiveQuery::new(sql).plugin("p")).await;
    let mut pinned = db.live(LiveQuery::new(sql).plugin("p@1")).await;
    live.until_uptodate().await;
    pinned.until_uptodate().await;
    assert!(live.fold.rows.is_empty() && pinned.fold.rows.is_empty());
    db.put_plugin("p", filter(KEEP_ALL)).await;
    assert_eq!(until_resync(&mut live).await, ["plugin"]);
    assert_eq!(live.fold.rows.values().collect::<Vec<_>>(), [&json!({"n": 3})]);
    let last = seq(&db.sql("INSERT INTO flights (id, carrier) VALUES (10, 'UA')").await);
    live.until_seq(last).await;
    pinned.until_seq(last).await;
    assert_eq!(live.fold.rows.values().collect::<Vec<_>>(), [&json!({"n": 4})]);
    assert!(pinned.fold.rows.is_empty());

    // While nobody looked: the same.
    live.disconnect();
    db.put_plugin("p", filter("(i64.and (i64.const 1) (i64.const 2))")).await;
    live.reconnect().await;
    let events = live.until_uptodate().await;
    assert!(events.iter().any(|event| event.name == "resync" && event.data["reason"] == "plugin"), "{events:?}");
    assert!(live.fold.rows.is_empty());
}

#[tokio::test]
async fn what_does_not_fit_is_refused_by_name() {
    let (_server, db) = server().await;
    flights(&db).await;
    db.sql("CREATE NAMESPACE elsewhere; CREATE TABLE elsewhere.names (carrier TEXT PRIMARY KEY, name TEXT)").await;
    let count = "SELECT carrier, count(*) AS n FROM flights GROUP BY carrier";
    let away = "SELECT f.id, n.name, f.dep_delay FROM flights f JOIN elsewhere.names n ON n.carrier = f.carrier";
    for (query, code, named) in [
        (LiveQuery::new(WORST).plugin("worse"), "unsupported", "plugin worse, which sees changes"),
        (LiveQuery::new(WORST).plugin("late").plugin("worse@1"), "unsupported", "plugin worse@1, which sees changes"),
        (LiveQuery::new(WORST).plugin("late").option("last_rows", "3"), "unsupported", "last_rows"),
        (LiveQuery::new(count).plugin("late"), "plugin_params", "dep_delay"),
        (LiveQuery::new(WORST).plugin(r#"late:{"hours":1}"#), "plugin_params", "hours"),
        (LiveQuery::new(count).option("on_error", "skip"), "bad_request", "name one"),
        (LiveQuery::new(away).plugin("late"), "bad_request", "cannot read tables of"),
    ] {
        let problem = db.expect_no_live(query, 400, code).await;
        assert!(problem["detail"].as_str().unwrap().contains(named), "{problem}");
    }
    db.live(away).await.until_uptodate().await;
}
