//! Stream tables: rows that are gone when their time has come, in queries, for writers, and for live queries without
//! any event that says so.

use serde_json::{Value, json};
use tests::fold::{canonical, micros, now};
use tests::live::seq;
use tests::{Client, TestServer};

/// Clocks of one machine, read by two programs.
const TOLERANCE: i64 = 50_000;

/// Asks until the row is gone; it has to be there before its time and gone after it.
async fn until_expired(db: &Client, sql: &str, expires: i64) {
    let patience = now() + 20_000_000;
    loop {
        let before = now();
        assert!(before < patience, "{sql} still shows what expired at {expires}");
        let rows = db.rows(sql).await;
        match rows.as_array().unwrap().len() {
            0 => return assert!(now() + TOLERANCE >= expires, "gone before its time"),
            1 => assert!(before < expires + TOLERANCE, "there after its time: {rows}"),
            _ => panic!("{sql}: {rows}"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

fn expires(data: &Value) -> i64 {
    micros(data["expires"].as_str().unwrap_or_else(|| panic!("no expires in {data}"))).expect("a time")
}

#[tokio::test]
async fn a_row_is_gone_at_its_time_and_stays_gone() {
    let mut server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE s (id INT PRIMARY KEY, v TEXT) WITH (type = 'stream', ttl = '400ms')").await;
    let mut live = db.live("SELECT * FROM s").await;
    live.until_uptodate().await;

    let sent = now();
    db.sql("INSERT INTO s VALUES (1, 'a')").await;
    let event = live.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["row"]), ("insert", &json!({"id": 1, "v": "a"})));
    let due = expires(&event.data);
    assert!((sent + 400_000 - TOLERANCE..now() + 400_000 + TOLERANCE).contains(&due), "{sent} {due}");
    until_expired(&db, "SELECT * FROM s WHERE id = 1", due).await;
    assert_eq!(db.sql("UPDATE s SET v = 'x' WHERE id = 1").await["results"][0]["affected"], 0);
    assert_eq!(db.sql("DELETE FROM s").await["results"][0]["affected"], 0);
    assert!(live.fold.alive().is_empty());

    // The key is free again. The stream has said nothing of the end of the first row.
    db.sql("INSERT INTO s VALUES (1, 'b')").await;
    let event = live.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["row"]["v"]), ("insert", &json!("b")));
    let due = expires(&event.data);
    until_expired(&db, "SELECT * FROM s", due).await;
    server.kill9();
    server.restart().await;
    assert_eq!(db.rows("SELECT * FROM s").await, json!([]));
    live.reconnect().await;
    assert_eq!(live.until_uptodate().await.len(), 1, "the start, and nothing else");
    assert_eq!(db.rows("SELECT type, ttl_ms FROM system.tables").await, json!([["stream", 400]]));
}

#[tokio::test]
async fn the_fold_without_what_expired_is_the_select() {
    let mut server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE s (id INT PRIMARY KEY, v INT) WITH (type = 'stream', ttl = '1h')").await;
    db.sql("CREATE TABLE brief (id INT PRIMARY KEY, v INT) WITH (type = 'stream', ttl = '500ms')").await;
    db.sql("INSERT INTO s VALUES (1, 1), (2, 2)").await;
    let mut live = db.live("SELECT id, v FROM s WHERE v > 0").await;
    let mut brief = db.live("SELECT id, v FROM brief WHERE v > 0").await;
    let snapshot = live.until_uptodate().await;
    assert_eq!(snapshot.iter().filter(|event| event.data["snapshot"] == true).count(), 2);
    let first = expires(&snapshot.last().unwrap().data);

    // A change renews the row.
    db.sql("UPDATE s SET v = 20 WHERE id = 2").await;
    let event = live.next_change().await;
    assert_eq!(event.name, "update");
    assert!(expires(&event.data) > first);
    db.sql("UPDATE s SET v = 0 WHERE id = 1").await;
    let event = live.next_change().await;
    assert_eq!((event.name.as_str(), event.data.get("expires")), ("delete", None));
    db.sql("DELETE FROM s WHERE id = 2").await;
    assert_eq!(live.next_change().await.data["reason"], "deleted");

    // Away while rows come, expire and come again.
    brief.until_uptodate().await;
    brief.disconnect();
    for round in 1..3 {
        let answer = db.sql(&format!("INSERT INTO brief VALUES (1, {round}), (2, {round}), (3, 0)")).await;
        if round == 2 {
            brief.reconnect().await;
            let events = brief.until_seq(seq(&answer)).await;
            let inserts = events.iter().filter(|event| event.name == "insert");
            assert!(inserts.clone().all(|event| event.data["expires"].is_string()));
            assert_eq!(inserts.count(), 4, "both lives of both rows: {events:?}");
            break;
        }
        until_none(&db).await;
        server.kill9();
        server.restart().await;
    }
    until_none(&db).await;
    // After a crash the server's time is up to a second ahead of the wall, so that it never goes back.
    let patience = now() + 5_000_000;
    while !brief.fold.alive().is_empty() {
        assert!(now() < patience, "{:?}", brief.fold);
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    db.sql("INSERT INTO brief VALUES (7, 7)").await;
    assert_eq!(brief.next_change().await.data["key"], json!({"id": 7}));
    let key = canonical([("id", &json!(7))].into_iter());
    assert!(brief.fold.rows.contains_key(&key));
    // The snapshot of a new stream has none of the expired ones.
    let mut fresh = db.live("SELECT id FROM brief").await;
    assert!(fresh.until_uptodate().await.iter().filter(|event| event.name == "insert").count() <= 1);
}

async fn until_none(db: &Client) {
    let patience = now() + 20_000_000;
    while db.rows("SELECT count(*) FROM brief").await != json!([[0]]) {
        assert!(now() < patience, "rows do not expire");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}
