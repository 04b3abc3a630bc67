//! What belongs to streams rather than to results: several queries on one, limits, positions that cannot be resumed,
//! KILL, EXPLAIN LIVE.

use std::collections::BTreeMap;

use reqwest::Method;
use serde_json::{Value, json};
use tests::fold::{Fold, State, canonical};
use tests::live::seq;
use tests::{Client, Event, Live, LiveQuery, Options, TestServer};

use crate::failures::{TELL, sour};

async fn tables(server: &TestServer) -> Client {
    let db = server.admin();
    db.sql("CREATE TABLE a (id INT PRIMARY KEY, n INT); CREATE TABLE b (id INT PRIMARY KEY, x TEXT)").await;
    db.sql("INSERT INTO a VALUES (1, 10), (2, 20)").await;
    db.sql("INSERT INTO b VALUES (1, 'one')").await;
    db
}

/// The folds of a stream of several queries, by name.
#[derive(Default)]
struct Folds {
    by_name: BTreeMap<String, Fold>,
    last_id: Option<String>,
}

impl Folds {
    fn apply(&mut self, event: &Event) {
        let name = event.data["q"].to_string();
        assert_ne!(name, "null", "an event that does not say its query: {event:?}");
        self.by_name.entry(name).or_default().apply(event).unwrap();
        self.last_id = event.id.clone().or(self.last_id.take());
    }

    fn rows(&self, name: &str) -> &State {
        &self.by_name[name].rows
    }
}

async fn due(db: &Client, sql: &str) -> State {
    let rows = db.objects(sql).await;
    rows.into_iter().map(|row| (canonical([("id", &row["id"])].into_iter()), row)).collect()
}

/// Reads until every query has said that it is past `seq`.
async fn until(live: &mut Live, folds: &mut Folds, names: &[&str], seq: u64) {
    let mut waiting: Vec<&str> = names.to_vec();
    while !waiting.is_empty() {
        let event = live.read(tests::PATIENCE).await.expect("an event in time").expect("the stream goes on");
        folds.apply(&event);
        if event.name == "uptodate" && event.data["seq"].as_u64().is_some_and(|reached| reached >= seq) {
            let past = event.data["q"].to_string();
            waiting.retain(|name| *name != past);
        }
    }
}

/// It has no position to tell, so it says at its heartbeat no more than that it lives.
#[tokio::test]
async fn a_stream_that_waits_for_its_plugin_shows_that_it_lives() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY, v BIGINT)").await;
    db.sql("INSERT INTO t VALUES (1, -5)").await;
    db.put_plugin("sour", sour(TELL, true)).await;
    let query = LiveQuery::new("SELECT id FROM t").plugin("sour");
    let mut stream = query.request(&db, None).send().await.unwrap();
    let mut text = String::new();
    let mut until = async |mark: &str, count: usize| {
        let reading = async {
            while text.split_once("event: plugin-error").is_none_or(|(_, after)| after.matches(mark).count() < count) {
                let piece = stream.chunk().await.unwrap().expect("the stream goes on");
                text.push_str(std::str::from_utf8(&piece).unwrap());
            }
        };
        tokio::time::timeout(tests::PATIENCE, reading).await.unwrap_or_else(|_| panic!("no {mark:?} in time"));
    };
    until("\n:\n", 3).await;
    db.put_plugin("sour", sour("(nop)", true)).await;
    until("event: uptodate", 2).await;
}

const A: &str = "SELECT id, n FROM a WHERE n > 5";
const B: &str = "SELECT id, x FROM b";
const SUM: &str = "SELECT id % 2 AS id, sum(n) AS s FROM a GROUP BY id % 2";

#[tokio::test]
async fn several_queries_share_a_stream_and_resume_together() {
    let mut server = TestServer::start().await;
    let db = tables(&server).await;
    let list = json!([{"sql": A}, {"q": "b", "sql": B}, {"q": "sum", "sql": SUM}]);
    let names = ["0", "\"b\"", "\"sum\""];
    let query = LiveQuery::several(&list);
    let mut live = db.live(query.clone()).await;
    let mut folds = Folds::default();
    until(&mut live, &mut folds, &names, 0).await;

    let answer = db.sql("INSERT INTO a VALUES (3, 30); UPDATE a SET n = 0 WHERE id = 1").await;
    let answer = seq(&answer).max(seq(&db.sql("UPDATE b SET x = 'two'").await));
    until(&mut live, &mut folds, &names, answer).await;
    for (name, sql) in names.iter().zip([A, B, SUM]) {
        assert_eq!(folds.rows(name), &due(&db, sql).await, "{sql}");
    }

    // Missed by all: each goes on from its own place. The aggregate's group is gone with the server and starts afresh.
    live.disconnect();
    db.sql("DELETE FROM a WHERE id = 2; INSERT INTO a VALUES (4, 40)").await;
    let answer = seq(&db.sql("INSERT INTO b VALUES (2, 'new')").await);
    server.kill9();
    server.restart().await;
    let id = folds.last_id.clone().unwrap();
    assert_eq!(id.split('~').count(), 3, "{id}");
    live.fold.last_id = Some(id);
    live.reconnect().await;
    until(&mut live, &mut folds, &names, answer).await;
    for (name, sql) in names.iter().zip([A, B, SUM]) {
        assert_eq!(folds.rows(name), &due(&db, sql).await, "{sql}");
    }
    let resyncs: Vec<usize> = names.iter().map(|name| folds.by_name[*name].resyncs).collect();
    assert_eq!(resyncs, [0, 0, 1]);

    // One ends, the others go on; the stream ends with the last.
    db.sql("DROP TABLE b").await;
    let answer = seq(&db.sql("INSERT INTO a VALUES (5, 50)").await);
    until(&mut live, &mut folds, &["0", "\"sum\""], answer).await;
    db.sql("DROP TABLE a").await;
    let mut closed = 0;
    while let Some(Some(event)) = live.read(tests::PATIENCE).await {
        closed += usize::from(event.name == "closed");
    }
    assert!(closed >= 2, "{closed} of the last two said that they are closed");
    assert!(!live.connected());
}

#[tokio::test]
async fn several_queries_by_post_and_by_ticket() {
    let server = TestServer::start().await;
    let db = tables(&server).await;
    let body = json!({"queries": [{"sql": A}, {"sql": B, "snapshot": false}]});
    let response = db.request(Method::POST, "/v1/live").json(&body).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let mut live = db.attached(response);
    let mut folds = Folds::default();
    until(&mut live, &mut folds, &["0", "1"], 0).await;
    assert_eq!((folds.rows("0").len(), folds.rows("1").len()), (2, 0));

    let response = db.request(Method::POST, "/v1/auth/ticket").json(&body).send().await.unwrap();
    let ticket: Value = response.json().await.unwrap();
    let path = format!("/v1/live?ticket={}", ticket["ticket"].as_str().unwrap());
    let mut live = db.attached(server.stranger(None).get(&path).send().await.unwrap());
    until(&mut live, &mut Folds::default(), &["0", "1"], 0).await;

    for (body, named) in [
        (json!({"queries": []}), "1 to 32"),
        (json!({"queries": [{"sql": A}, {"sql": "SELECT id FROM nowhere"}]}), "queries[1]"),
        (json!({"queries": [{"sql": A}], "last_event_id": "1~2"}), "Last-Event-ID"),
    ] {
        let response = db.request(Method::POST, "/v1/live").json(&body).send().await.unwrap();
        assert_eq!(response.status(), 400, "{body}");
        assert!(response.text().await.unwrap().contains(named), "{body}");
    }
}

#[tokio::test]
async fn the_last_rows_alone() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE m (id INT PRIMARY KEY, n INT)").await;
    let values: Vec<String> = (0..3_000).map(|id| format!("({id}, {})", id % 10)).collect();
    db.sql(&format!("INSERT INTO m VALUES {}", values.join(", "))).await;
    let mut live = db.live(LiveQuery::new("SELECT id FROM m WHERE n < 2").option("last_rows", "5")).await;
    let events = live.until_uptodate().await;
    let ids: Vec<i64> = events[1..].iter().map(|event| event.data["row"]["id"].as_i64().unwrap()).collect();
    assert_eq!(ids, [2991, 2990, 2981, 2980, 2971], "in key order, the last first");
    db.sql("INSERT INTO m VALUES (5000, 0)").await;
    assert_eq!(live.next_change().await.data["row"], json!({"id": 5000}));

    // More than there are; and so many that they come in several pieces.
    for (last, found) in [("700", 600), ("599", 599)] {
        let mut live =
            db.live(LiveQuery::new("SELECT id FROM m WHERE n < 2 AND id < 3000").option("last_rows", last)).await;
        live.until_uptodate().await;
        assert_eq!(live.fold.rows.len(), found, "{last}");
    }
    for (options, named) in [
        (&[("last_rows", "0")][..], "last_rows"),
        (&[("last_rows", "x")], "last_rows"),
        (&[("last_rows", "2"), ("snapshot", "false")], "contradict"),
    ] {
        let query = options.iter().fold(LiveQuery::new("SELECT id FROM m"), |query, (k, v)| query.option(k, v));
        let problem = db.expect_no_live(query, 400, "bad_request").await;
        assert!(problem["detail"].as_str().unwrap().contains(named), "{problem}");
    }
}

#[tokio::test]
async fn limits_of_one_user_and_one_address() {
    let live = "max_per_user = 3\nmax_per_address = 4".to_owned();
    let server = TestServer::with(Options { live, ..Options::default() }).await;
    let db = tables(&server).await;
    server.admin().sql("CREATE TABLE own (id INT PRIMARY KEY) WITH (type = 'user')").await;
    let (alice, bob) = (server.client("alice"), server.client("bob"));
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut live = alice.live("SELECT id FROM own").await;
        live.until_uptodate().await;
        open.push(live);
    }
    let query = LiveQuery::new("SELECT id FROM own");
    let refused = query.request(&alice, None).send().await.unwrap();
    assert_eq!(refused.status(), 429);
    assert!(refused.headers().contains_key("retry-after"));
    assert!(refused.text().await.unwrap().contains("max_per_user"));
    // Two on one stream count as two.
    let body = json!({"queries": [{"sql": A}, {"sql": B}]});
    let refused = db.request(Method::POST, "/v1/live").json(&body).send().await.unwrap();
    assert_eq!(refused.status(), 429);
    assert!(refused.text().await.unwrap().contains("max_per_address"));
    let mut bobs = bob.live("SELECT id FROM own").await;
    bobs.until_uptodate().await;

    // Who comes back is told by a stream that says when: browsers take any other status as final.
    let id = open[0].fold.last_id.clone().unwrap();
    let busy = query.request(&alice, Some(&id)).send().await.unwrap();
    assert_eq!(busy.status(), 200);
    let text = busy.text().await.unwrap();
    assert!(text.contains("retry:") && text.contains("event: closed") && text.contains("too_many"), "{text}");

    // What closes makes room.
    open.pop();
    let again = async {
        loop {
            let response = query.request(&alice, None).send().await.unwrap();
            if response.status() == 200 {
                return;
            }
        }
    };
    tokio::time::timeout(tests::PATIENCE, again).await.expect("room after a stream has closed");
}

/// Every kind of position that a client might send: never silence.
#[tokio::test]
async fn positions_of_all_kinds() {
    let mut server = TestServer::start().await;
    let db = tables(&server).await;
    let mut live = db.live(A).await;
    live.until_uptodate().await;
    let id = live.fold.last_id.clone().unwrap();
    let [epoch, seq, fingerprint] = id.split('-').collect::<Vec<_>>()[..] else { panic!("{id}") };
    let parts: Vec<&str> = fingerprint.split('.').collect();

    // Not made here, of another query, of several queries, far too long: refused.
    let huge = "9".repeat(1 << 20);
    let query = LiveQuery::new(A);
    let mut refused: Vec<String> = ["garbage", "1-2", "é", "-1-2-3", "0x1-2-3"].map(str::to_owned).to_vec();
    refused.push(format!("{id}~{id}"));
    refused.push(format!("{epoch}-{seq}-00000000.{}.{}.{}", parts[1], parts[2], parts[3]));
    refused.push(format!("{epoch}-99999999999999999999999-{fingerprint}"));
    for position in &refused {
        // A header cannot hold everything; the query string can.
        let response = LiveQuery::new(A).option("last_event_id", position).request(&db, None).send().await.unwrap();
        assert_eq!(response.status(), 400, "{position}");
        let problem: Value = response.json().await.unwrap();
        assert!(problem["detail"].as_str().unwrap().contains("Last-Event-ID"), "{problem}");
    }
    let response = query.request(&db, Some(&huge)).send().await;
    assert!(response.is_err() || matches!(response.unwrap().status().as_u16(), 400 | 431));
    let body = json!({"sql": A, "last_event_id": "9".repeat(900_000)});
    let response = db.request(Method::POST, "/v1/live").json(&body).send().await.unwrap();
    assert_eq!(response.status(), 400);

    // Of another history, of the future, of another schema: what the client holds is void, and it is told why.
    let schema = format!("{epoch}-{seq}-{}.{}.ffff.{}", parts[0], parts[1], parts[3]);
    for (position, reason) in [
        (format!("dead-{seq}-{fingerprint}"), "epoch"),
        (format!("{epoch}-{}-{fingerprint}", u64::MAX), "epoch"),
        (schema, "schema"),
        (format!("{epoch}-{seq}-{}.{}.{}.00000000", parts[0], parts[1], parts[2]), "plugin"),
    ] {
        live.fold.last_id = Some(position.clone());
        live.reconnect().await;
        let events = live.until_uptodate().await;
        let reasons: Vec<&Value> = events.iter().filter(|e| e.name == "resync").map(|e| &e.data["reason"]).collect();
        assert_eq!(reasons, [reason], "{position}");
        assert_eq!(live.fold.rows, due(&db, A).await);
    }

    // A store that was put back to an older copy has another history; one that was only restarted has not.
    live.fold.last_id = Some(id);
    server.kill9();
    server.restart().await;
    live.reconnect().await;
    assert_ne!(live.next_event().await.data["from"], "snapshot");
    live.until_uptodate().await;
    // An empty one is what an EventSource has before its first.
    let response = LiveQuery::new(A).request(&db, Some("")).send().await.unwrap();
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn a_killed_query_ends_and_stays_away() {
    let mut server = TestServer::start().await;
    let db = tables(&server).await;
    db.sql("CREATE TABLE c (id INT PRIMARY KEY)").await;
    let (alice, bob) = (server.client("alice"), server.client("bob"));
    let mut streams = Vec::new();
    for client in [&alice, &bob] {
        let mut live = client.live("SELECT id FROM c").await;
        let live_id = live.next_event().await.data["live_id"].as_str().unwrap().to_owned();
        live.until_uptodate().await;
        streams.push((live, live_id));
    }
    let mut other = alice.live("SELECT id FROM c WHERE id > 5").await;
    other.until_uptodate().await;
    assert_eq!(streams[0].1, streams[1].1, "one query, whoever asks");
    let kill = format!("KILL LIVE QUERY '{}'", streams[0].1);

    // A user ends only what is theirs.
    let answer = alice.sql(&kill).await;
    assert_eq!(answer["results"][0]["affected"], 1);
    let (live, _) = &mut streams[0];
    let event = live.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["code"]), ("closed", &json!("killed")));
    assert_eq!(live.next_or_end().await, None);
    // An EventSource comes back by itself, and anything but 200 stops it.
    assert_eq!(live.try_reconnect().await.unwrap().status(), 410);
    assert_eq!(live.try_reconnect().await.unwrap().status(), 410);
    db.sql("INSERT INTO c VALUES (1)").await;
    assert_eq!(streams[1].0.next_change().await.name, "insert", "bob's goes on");

    // Who asks anew gets it anew, and may come back to it.
    let mut again = alice.live("SELECT id FROM c").await;
    again.until_uptodate().await;
    again.disconnect();
    again.reconnect().await;
    again.until_uptodate().await;
    // The server sees in its own time that the connection before is closed, and counts it until then.
    let open = format!("SELECT subscribers FROM system.live_queries WHERE live_id = '{}'", streams[0].1);
    until_rows(&db, &open, json!([[2]])).await;

    // An administrator ends everybody's, and no other query's.
    let answer = db.sql(&kill).await;
    assert_eq!(answer["results"][0]["affected"], 2);
    for live in [&mut streams[1].0, &mut again] {
        assert_eq!(live.next_change().await.data["code"], "killed");
        assert_eq!(live.next_or_end().await, None);
        assert_eq!(live.try_reconnect().await.unwrap().status(), 410);
    }
    db.sql("INSERT INTO c VALUES (9)").await;
    assert_eq!(other.next_change().await.name, "insert");

    // The server dies and forgets nothing of it: neither who shall stay away nor who has it anew.
    let mut anew = alice.live("SELECT id FROM c").await;
    anew.until_uptodate().await;
    assert!(server.sigterm().await.success());
    server.restart().await;
    server.kill9();
    server.restart().await;
    assert_eq!(streams[1].0.try_reconnect().await.unwrap().status(), 410);
    anew.disconnect();
    for live in [&mut anew, &mut other] {
        live.reconnect().await;
        live.until_uptodate().await;
        assert_eq!(live.fold.resyncs, 0);
    }
    drop(anew);
    other.disconnect();
    until_rows(&db, "SELECT live_id FROM system.live_queries", json!([])).await;
    db.expect_error(&kill, 404, "not_found").await;
    bob.expect_error("KILL LIVE QUERY 'nothing'", 404, "not_found").await;
    db.expect_error("KILL LIVE QUERY nothing", 400, "syntax").await;
}

async fn until_rows(db: &Client, sql: &str, expected: Value) {
    let same = async { while db.rows(sql).await != expected {} };
    tokio::time::timeout(tests::PATIENCE, same).await.unwrap_or_else(|_| panic!("{sql} never gave {expected}"));
}

#[tokio::test]
async fn open_live_queries_are_listed_with_what_they_have_told() {
    let server = TestServer::start().await;
    let db = tables(&server).await;
    let (alice, bob) = (server.client("alice"), server.client("bob"));
    let mut streams = vec![alice.live(A).await, alice.live(A).await, bob.live(A).await, bob.live(SUM).await];
    for live in &mut streams {
        live.until_uptodate().await;
    }
    let answer = seq(&db.sql("INSERT INTO a VALUES (3, 30), (4, 40)").await);
    for live in &mut streams {
        live.until_seq(answer).await;
    }
    const LISTED: &str =
        "SELECT sql, mode, users, subscribers, events, bytes > 0 AS told, lag FROM system.live_queries ORDER BY mode";
    let incremental = |users: &str, subscribers: i64| json!([A, "incremental", users, subscribers, 2, true, 0]);
    assert_eq!(alice.rows(LISTED).await, json!([incremental("alice", 2)]));
    let requery = |users: &str| json!([SUM, "requery", users, 1, 2, true, 0]);
    assert_eq!(bob.rows(LISTED).await, json!([incremental("bob", 1), requery("bob")]));
    assert_eq!(db.rows(LISTED).await, json!([incremental("alice, bob", 3), requery("bob")]));
    // What it lists can be ended.
    let id = alice.rows("SELECT live_id FROM system.live_queries").await[0][0].as_str().unwrap().to_owned();
    assert_eq!(alice.sql(&format!("KILL LIVE QUERY '{id}'")).await["results"][0]["affected"], 2);
}

#[tokio::test]
async fn explain_live_says_how_a_query_is_kept() {
    let server = TestServer::start().await;
    let db = tables(&server).await;
    server.admin().sql("CREATE TABLE own (id INT PRIMARY KEY, n INT, name TEXT) WITH (type = 'user')").await;
    let alice = server.client("alice");
    for (sql, expected) in [
        (
            "EXPLAIN LIVE SELECT name FROM own WHERE n = 7 AND id > 3",
            json!({"mode": "incremental", "semantics": "map", "key": "id", "index": "n = 7", "scope": "main.own (rows of alice)"}),
        ),
        (
            "explain live select id from own where name like 'ab%' or id between -2 and 5",
            json!({"index": "name starts with \"ab\" or id from -2 to 5"}),
        ),
        (
            "EXPLAIN LIVE SELECT id FROM own WHERE n % 2 = 0",
            json!({"index": "none: asked about every change of the table"}),
        ),
        (
            "EXPLAIN LIVE SELECT x, count(*) AS c FROM b JOIN a ON a.id = b.id GROUP BY x",
            json!({"mode": "requery", "key": "x", "scope": "main.b (shared), main.a (shared)", "interval_ms": "250", "plugins_see": "rows of the result"}),
        ),
    ] {
        let rows = alice.objects(sql).await;
        let said: serde_json::Map<String, Value> =
            rows.into_iter().map(|row| (row["property"].as_str().unwrap().to_owned(), row["value"].clone())).collect();
        for (property, value) in expected.as_object().unwrap() {
            assert_eq!(said.get(property), Some(value), "{property} of {sql}: {said:?}");
        }
        assert!(said["group"].as_str().is_some_and(|group| !group.is_empty()));
    }
    let problem = alice.expect_error("EXPLAIN LIVE SELECT nothing FROM own", 400, "unknown_column").await;
    assert_eq!(problem["position"], 20, "{problem}");
    // The group it says is the one that a stream then has.
    let rows = db.objects(&format!("EXPLAIN LIVE {A}")).await;
    let group = rows.iter().find(|row| row["property"] == "group").unwrap();
    assert_eq!(db.live(A).await.next_event().await.data["live_id"], group["value"]);
}

/// A change asks only the queries it can concern.
#[tokio::test]
async fn a_change_touches_only_queries_it_can_concern() {
    const ASKED: &str = "tidegate_live_candidates_total";
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, room TEXT, heat DOUBLE)").await;
    let mut streams = Vec::new();
    for room in 0..40 {
        let (low, high) = (room * 10, room * 10 + 9);
        for sql in [
            format!("SELECT id FROM t WHERE room = 'r{room}'"),
            format!("SELECT id FROM t WHERE heat BETWEEN {low} AND {high} AND id > -1"),
            format!("SELECT id FROM t WHERE room LIKE 'x{room}-%' OR id IN (-{room}, -100)"),
        ] {
            let mut live = db.live(sql).await;
            live.until_uptodate().await;
            streams.push(live);
        }
    }
    let before = db.metric(ASKED).await;
    let answer = db.sql("INSERT INTO t VALUES (1, 'r7', 123.5)").await;
    for (at, live) in streams.iter_mut().enumerate() {
        let events = live.until_seq(seq(&answer)).await;
        assert_eq!(events.len(), usize::from(at == 3 * 7 || at == 3 * 12 + 1), "query {at}");
    }
    assert_eq!(db.metric(ASKED).await - before, 2.0);
    // Out of one and into another: both are asked, with the old row and with the new one.
    let answer = db.sql("UPDATE t SET room = 'x3-y', heat = 'NaN' WHERE id = 1").await;
    let mut names = Vec::new();
    for (at, live) in streams.iter_mut().enumerate() {
        names.extend(live.until_seq(seq(&answer)).await.into_iter().map(|event| (at, event.name)));
    }
    let expected = [(11, "insert"), (21, "delete"), (37, "delete")].map(|(at, name)| (at, name.to_owned()));
    assert_eq!(names, expected);
}

/// A comment is as much a part of it as anything.
#[tokio::test]
async fn nobody_is_shown_the_words_of_somebody_else() {
    let server = TestServer::start().await;
    let db = tables(&server).await;
    db.sql("CREATE TABLE c (id INT PRIMARY KEY)").await;
    let (alice, bob) = (server.client("alice"), server.client("bob"));
    let words = ["SELECT id FROM c WHERE id = 1 /* the Smith case */", "SELECT id FROM c WHERE 1 = id"];
    let mut streams = Vec::new();
    for (client, sql) in [&alice, &bob].into_iter().zip(words) {
        let mut live = client.live(sql).await;
        let live_id = live.next_event().await.data["live_id"].clone();
        live.until_uptodate().await;
        assert_eq!(client.rows("SELECT sql, subscribers FROM system.live_queries").await, json!([[sql, 1]]));
        streams.push((live_id, live));
    }
    assert_eq!(streams[0].0, streams[1].0, "they share it");
}

/// While it was compiled anew, a stream could be killed under the id that it had, with success, and went on under another.
#[tokio::test]
async fn a_kill_finds_a_stream_that_is_being_compiled_anew() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE c (id INT PRIMARY KEY)").await;
    let mut found = 0;
    for round in 0..100 {
        // Another query each time: the stream of the round before may not have been missed yet.
        let mut live = db.live(format!("SELECT id FROM c WHERE id <> {round}")).await;
        let live_id = live.next_event().await.data["live_id"].as_str().unwrap().to_owned();
        live.until_uptodate().await;
        db.sql(&format!("ALTER TABLE c ADD COLUMN x{round} INT")).await;
        let Ok(_) = db.try_sql(&format!("KILL LIVE QUERY '{live_id}'"), json!([])).await else { continue };
        found += 1;
        let last = loop {
            match live.next_or_end().await {
                Some(event) if event.name == "closed" => break event.data["code"].clone(),
                // Under another id. (An `uptodate` may have been on its way.)
                Some(event) if event.name == "resync" => panic!("round {round}: it goes on"),
                Some(_) => {}
                None => panic!("round {round}: without a last word"),
            }
        };
        assert_eq!(last, "killed");
    }
    eprintln!("{found} of 100 kills came in between");
}
