//! Live queries: the snapshot, every change after it, leaving and entering, resuming, and what ends a stream.

use serde_json::{Value, json};
use tests::fold::{State, canonical};
use tests::live::seq;
use tests::{Client, LiveQuery, Options, TestServer};

async fn flights(server: &TestServer) -> Client {
    let db = server.admin();
    db.sql("CREATE TABLE f (id BIGINT PRIMARY KEY, dest TEXT, delay DOUBLE, note TEXT)").await;
    db.sql("INSERT INTO f VALUES (1, 'JFK', 20, 'a'), (2, 'LGA', 5, 'b'), (3, 'EWR', NULL, 'c')").await;
    db
}

/// What the fold has to be: the same SELECT, by key `id`, which has to be among its columns.
async fn due(db: &Client, sql: &str) -> State {
    let rows = db.objects(sql).await;
    rows.into_iter().map(|row| (canonical([("id", &row["id"])].into_iter()), row)).collect()
}

#[tokio::test]
async fn snapshot_then_every_change() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    let sql = "SELECT id, dest, delay FROM f WHERE delay > 10";
    let mut live = db.live(sql).await;

    let start = live.next_event().await;
    assert_eq!(start.name, "start");
    assert_eq!(start.data["from"], "snapshot");
    assert_eq!(start.data["semantics"], "map");
    assert_eq!(start.data["mode"], "incremental");
    assert_eq!(start.data["key"], json!(["id"]));
    let names: Vec<&Value> = start.data["columns"].as_array().unwrap().iter().map(|column| &column["name"]).collect();
    assert_eq!(names, ["id", "dest", "delay"]);
    assert!(start.data["live_id"].is_string());
    let snapshot = live.until_uptodate().await;
    assert_eq!(snapshot.len(), 1);
    assert_eq!(
        snapshot[0].data,
        json!({"key": {"id": 1}, "row": {"id": 1, "dest": "JFK", "delay": 20.0}, "snapshot": true})
    );
    assert_eq!(snapshot[0].id, None);
    assert!(live.fold.last_id.is_some(), "the end of the snapshot is a place to resume from");
    assert!(live.retry.is_some());

    // Into the result by an insert and by an update; a NULL on the way.
    db.sql("INSERT INTO f VALUES (4, 'BOS', 30, NULL)").await;
    let event = live.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["row"]["delay"]), ("insert", &json!(30.0)));
    assert!(event.data.get("snapshot").is_none() && event.id.is_some());
    db.sql("UPDATE f SET delay = 11 WHERE id = 3").await;
    assert_eq!(live.next_change().await.name, "insert");

    // Within the result.
    db.sql("UPDATE f SET delay = 12 WHERE id = 3").await;
    let event = live.next_change().await;
    assert_eq!(event.name, "update");
    assert_eq!(event.data["row"], json!({"id": 3, "dest": "EWR", "delay": 12.0}));
    assert_eq!(event.data["old"], json!({"delay": 11.0}));
    db.sql("UPDATE f SET dest = NULL WHERE id = 3").await;
    assert_eq!(live.next_change().await.data["row"]["dest"], Value::Null);

    // What the result does not show is no event: the next one is the delete.
    db.sql("UPDATE f SET note = 'other' WHERE id = 3").await;
    db.sql("UPDATE f SET delay = delay WHERE id = 3").await;
    db.sql("INSERT INTO f VALUES (5, 'BOS', 1, NULL)").await;

    // Out of it.
    db.sql("UPDATE f SET delay = NULL WHERE id = 3").await;
    let event = live.next_change().await;
    assert_eq!(
        (event.name.as_str(), &event.data["reason"], &event.data["key"]),
        ("delete", &json!("moved_out"), &json!({"id": 3}))
    );
    db.sql("DELETE FROM f WHERE id = 4").await;
    let event = live.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["reason"]), ("delete", &json!("deleted")));
    assert_eq!(live.fold.rows, due(&db, sql).await);
}

#[tokio::test]
async fn a_commit_is_never_split_and_has_one_id() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    let mut live = db.live("SELECT * FROM f").await;
    live.until_uptodate().await;
    let answer = db
        .sql("INSERT INTO f VALUES (10, 'A', 1, NULL), (11, 'B', 2, NULL); UPDATE f SET delay = 9 WHERE id = 1; DELETE FROM f WHERE id = 2; INSERT INTO f VALUES (12, 'x', 0, NULL); DELETE FROM f WHERE id = 12")
        .await;
    let events = live.until_seq(seq(&answer)).await;
    let ids: Vec<bool> = events.iter().map(|event| event.id.is_some()).collect();
    assert_eq!(
        ids,
        [false, false, false, true],
        "two inserts, an update, a delete; nothing of the key that came and went: {events:?}"
    );
    assert_eq!(live.fold.rows, due(&db, "SELECT * FROM f").await);
}

#[tokio::test]
async fn a_stream_resumes_after_a_disconnect_and_after_a_restart() {
    let mut server = TestServer::start().await;
    let db = flights(&server).await;
    let sql = "SELECT id, delay FROM f WHERE delay > 10";
    let mut live = db.live(sql).await;
    live.until_uptodate().await;
    for way in ["disconnect", "stop", "kill"] {
        live.disconnect();
        db.sql("INSERT INTO f VALUES (100, 'X', 50, NULL)").await;
        db.sql("UPDATE f SET delay = 60 WHERE id = 100").await;
        let last = seq(&db.sql("UPDATE f SET delay = 0 WHERE id = 1").await);
        match way {
            "stop" => assert!(server.sigterm().await.success()),
            "kill" => server.kill9(),
            _ => {}
        }
        if way != "disconnect" {
            server.restart().await;
        }
        live.reconnect().await;
        let events = live.until_seq(last).await;
        assert_eq!(events[0].name, "start");
        assert_ne!(events[0].data["from"], "snapshot", "{way}: a position the log still has is resumed");
        let names: Vec<&str> = events[1..].iter().map(|event| event.name.as_str()).collect();
        assert_eq!(names, ["insert", "update", "delete"], "{way}");
        assert_eq!(live.fold.rows, due(&db, sql).await, "{way}");
        db.sql("DELETE FROM f WHERE id = 100; UPDATE f SET delay = 20 WHERE id = 1").await;
        for _ in 0..2 {
            live.next_change().await;
        }
        assert_eq!(live.fold.rows, due(&db, sql).await, "{way}: live again");
    }
    assert_eq!(live.fold.resyncs, 0);
}

#[tokio::test]
async fn the_position_of_a_quiet_stream_moves_on() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    let mut live = db.live("SELECT id FROM f WHERE delay > 1000").await;
    live.until_uptodate().await;
    let before = live.fold.last_id.clone();
    let answer = db.sql("INSERT INTO f VALUES (7, 'X', 1, NULL)").await;
    assert!(live.until_seq(seq(&answer)).await.is_empty());
    assert_ne!(live.fold.last_id, before);
}

#[tokio::test]
async fn a_position_that_cannot_be_resumed_is_said() {
    let server =
        TestServer::with(Options { config: "[storage]\nlog_commits = 64\n".to_owned(), ..Options::default() }).await;
    let db = flights(&server).await;
    let sql = "SELECT id, note FROM f";
    let mut live = db.live(sql).await;
    live.until_uptodate().await;
    let first = live.fold.clone();
    live.disconnect();

    // Garbage, another query's, and one of another history: 400 or a resync, never silence.
    let id = first.last_id.clone().unwrap();
    for bad in ["garbage".to_owned(), format!("{id}x"), "x".repeat(5_000)] {
        let response = LiveQuery::new(sql).request(&db, Some(&bad)).send().await.unwrap();
        assert!(matches!(response.status().as_u16(), 400 | 431), "{bad}: {}", response.status());
    }
    let response = LiveQuery::new("SELECT id FROM f").request(&db, Some(&id)).send().await.unwrap();
    assert_eq!(response.status(), 400, "another query's position");

    // Too old: the log keeps 64 commits; it is trimmed in the background, so look until it has been.
    let mut rounds = 0;
    loop {
        let mut last = 0;
        for _ in 0..100 {
            last = seq(&db.sql("UPDATE f SET note = note || '.' WHERE id = 1").await);
        }
        live.fold = first.clone();
        live.reconnect().await;
        live.until_seq(last).await;
        assert_eq!(live.fold.rows, due(&db, sql).await);
        if live.fold.resyncs > 0 {
            break;
        }
        rounds += 1;
        assert!(rounds < 30, "the log is not trimmed");
    }
}

#[tokio::test]
async fn a_dropped_table_ends_its_streams() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    let mut live = db.live("SELECT id FROM f").await;
    live.until_uptodate().await;
    db.sql("INSERT INTO f VALUES (9, 'X', 1, NULL)").await;
    db.sql("DROP TABLE f").await;
    assert_eq!(live.next_change().await.name, "insert", "first what happened before");
    assert_eq!(live.next_change().await.name, "closed");
    assert_eq!(live.next_or_end().await, None);
    // Not a 2xx, which is what stops an EventSource.
    assert!(live.try_reconnect().await.unwrap().status().as_u16() >= 400);
}

#[tokio::test]
async fn a_user_table_is_live_for_each_user_alone() {
    let server = TestServer::start().await;
    server.admin().sql("CREATE TABLE notes (id INT PRIMARY KEY, text TEXT) WITH (type = 'user')").await;
    let (alice, bob) = (server.client("alice"), server.client("bob"));
    bob.sql("INSERT INTO notes VALUES (1, 'of bob')").await;
    let mut live = alice.live("SELECT * FROM notes").await;
    assert_eq!(live.until_uptodate().await.len(), 1, "only the start");
    bob.sql("INSERT INTO notes VALUES (2, 'of bob')").await;
    bob.sql("UPDATE notes SET text = 'still of bob'").await;
    let answer = alice.sql("INSERT INTO notes VALUES (1, 'of alice')").await;
    let events = live.until_seq(seq(&answer)).await;
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0].data["row"], json!({"id": 1, "text": "of alice"}));
}

#[tokio::test]
async fn parameters_expressions_and_odd_values() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    let sql = "SELECT id, upper(dest) AS place, delay * 2 AS twice, delay IS NULL AS none FROM f WHERE dest LIKE $1 OR id >= $2";
    let query = LiveQuery::new(sql).params(&json!(["J%", 90]));
    let mut live = db.live(query).await;
    live.until_uptodate().await;
    assert_eq!(live.fold.rows.len(), 1);
    let answer = db
        .sql_params(
            "INSERT INTO f VALUES ($1, $2, NULL, 'x')",
            json!([91, "line\r\nbreak \u{2028} \u{1F6EB} \"q\" \\ \u{0}"]),
        )
        .await;
    let events = live.until_seq(seq(&answer)).await;
    assert_eq!(events[0].data["row"]["place"], "LINE\r\nBREAK \u{2028} \u{1F6EB} \"Q\" \\ \u{0}");
    assert_eq!(events[0].data["row"]["twice"], Value::Null);
    assert_eq!(events[0].data["row"]["none"], true);
}

#[tokio::test]
async fn what_cannot_be_live_is_refused_when_asked_for() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    for (sql, named) in [
        ("SELECT id FROM f WHERE now() > '2013-01-01T00:00:00Z'", "now"),
        ("SELECT id, id FROM f", "id"),
        ("DELETE FROM f", ""),
    ] {
        let response = LiveQuery::new(sql).request(&db, None).send().await.unwrap();
        assert_eq!(response.status(), 400, "{sql}");
        let problem: Value = response.json().await.unwrap();
        let detail = problem["detail"].as_str().unwrap_or_default().to_lowercase();
        assert!(detail.contains(&named.to_lowercase()), "{sql}: {problem}");
    }
    for (name, value) in [("colour", "red"), ("last_rows", "some"), ("on_error", "skip"), ("snapshot", "perhaps")] {
        let response = LiveQuery::new("SELECT id FROM f").option(name, value).request(&db, None).send().await.unwrap();
        assert!(matches!(response.status().as_u16(), 400 | 501), "{name}: {}", response.status());
        assert!(response.text().await.unwrap().contains(name), "{name} is named");
    }
}

#[tokio::test]
async fn options_of_a_stream() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    let mut changes = db.live(LiveQuery::new("SELECT id, delay FROM f").option("snapshot", "false")).await;
    let mut full = db.live(LiveQuery::new("SELECT id, delay FROM f").option("old", "full")).await;
    let mut none = db.live(LiveQuery::new("SELECT id, delay FROM f").option("old", "none")).await;
    for live in [&mut changes, &mut full, &mut none] {
        live.until_uptodate().await;
    }
    assert!(changes.fold.rows.is_empty());
    db.sql("INSERT INTO f VALUES (20, 'X', 1, NULL)").await;
    assert_eq!(changes.next_change().await.data["key"], json!({"id": 20}));
    for live in [&mut full, &mut none] {
        live.next_change().await;
    }
    db.sql("UPDATE f SET delay = 2 WHERE id = 20").await;
    assert_eq!(full.next_change().await.data["old"], json!({"id": 20, "delay": 1.0}));
    assert!(none.next_change().await.data.get("old").is_none());
}

#[tokio::test]
async fn many_rows_and_many_subscribers_of_one_query() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    for chunk in 0..6 {
        let values: Vec<String> =
            (0..500).map(|n| format!("({}, 'D{}', {}, 'some text')", 1_000 + chunk * 500 + n, n % 7, n)).collect();
        db.sql(&format!("INSERT INTO f VALUES {}", values.join(", "))).await;
    }
    let sql = "SELECT id, dest, delay FROM f WHERE delay >= 100";
    let mut all = Vec::new();
    for _ in 0..10 {
        all.push(db.live(sql).await);
    }
    let answer = db.sql("UPDATE f SET delay = delay - 50 WHERE id >= 1000").await;
    let due = due(&db, sql).await;
    for live in &mut all {
        live.until_seq(seq(&answer)).await;
        assert_eq!(live.fold.rows, due);
    }
    assert_eq!(db.metric("tidegate_subscriptions").await, 10.0);
    assert_eq!(db.metric("tidegate_groups").await, 1.0, "evaluated and encoded once");
}
