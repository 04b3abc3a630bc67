//! `Idempotency-Key`: whoever does not know whether a write was done sends it again, and it is done once.

use reqwest::{Method, StatusCode, header};
use serde_json::{Value, json};
use tests::client::expect_problem;
use tests::{Client, TestServer};

fn request(db: &Client, key: &str, sql: &str) -> reqwest::RequestBuilder {
    let body = json!({"sql": sql});
    db.request(Method::POST, "/v1/sql").header("Idempotency-Key", key).json(&body)
}

/// Status, whether it was answered before, and the answer without its duration.
async fn send(db: &Client, key: &str, sql: &str) -> (StatusCode, bool, Value) {
    let answer = request(db, key, sql).send().await.expect("an answer");
    let replayed = answer.headers().get("idempotent-replayed").is_some_and(|value| value == "true");
    let status = answer.status();
    let mut body: Value = answer.json().await.expect("JSON");
    body["elapsed_ms"].take();
    (status, replayed, body)
}

#[tokio::test]
async fn a_write_that_is_sent_again_is_done_once() {
    let mut server = TestServer::start().await;
    let (db, robot) = (server.admin(), server.client("robot"));
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT)").await;
    db.sql("INSERT INTO t VALUES (1, 0)").await;
    let sql = "UPDATE t SET n = n + 1; INSERT INTO t SELECT max(id) + 1, 0 FROM t";
    let (status, replayed, first) = send(&db, "k1", sql).await;
    assert_eq!((status.as_u16(), replayed), (200, false));
    assert_eq!(first["results"], json!([{"affected": 1}, {"affected": 1}]));
    for life in 0..3 {
        for _ in 0..2 {
            let (status, replayed, again) = send(&db, "k1", sql).await;
            assert_eq!((status.as_u16(), replayed, &again), (200, true, &first), "life {life}");
        }
        if life == 0 {
            server.kill9()
        } else {
            assert!(server.sigterm().await.success())
        }
        server.restart().await;
    }
    assert_eq!(db.rows("SELECT id, n FROM t ORDER BY id").await, json!([[1, 1], [2, 0]]));

    // Another user's key is another key, and another key is another write.
    assert!(!send(&robot, "k1", sql).await.1);
    assert!(!send(&db, "k2", sql).await.1);
    assert_eq!(db.rows("SELECT count(*), max(n) FROM t").await, json!([[4, 3]]));

    // Another request under the same key is a mistake, whatever it is.
    for other in ["UPDATE t SET n = n + 2", "DELETE FROM t", "CREATE TABLE u (id INT)"] {
        expect_problem(request(&db, "k1", other), 422, "idempotency_key_reused").await;
    }
    let raw = db.request(Method::POST, "/v1/sql").header("Idempotency-Key", "k1");
    let raw = raw.header(header::CONTENT_TYPE, "application/sql").body(sql);
    expect_problem(raw, 422, "idempotency_key_reused").await;
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[4]]));
}

#[tokio::test]
async fn what_did_nothing_is_remembered_and_what_was_refused_is_not() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    // Nothing to delete the first time: nothing is deleted when it comes again.
    let sql = "DELETE FROM t";
    let (_, _, first) = send(&db, "none", sql).await;
    assert_eq!(first["results"], json!([{"affected": 0}]));
    db.sql("INSERT INTO t VALUES (1)").await;
    assert_eq!(send(&db, "none", sql).await, (StatusCode::OK, true, first));
    assert_eq!(db.rows("SELECT id FROM t").await, json!([[1]]));

    let sql = "INSERT INTO t VALUES (1)";
    expect_problem(request(&db, "refused", sql), 409, "duplicate_key").await;
    db.sql("DELETE FROM t").await;
    let (status, replayed, _) = send(&db, "refused", sql).await;
    assert_eq!((status.as_u16(), replayed), (200, false));

    // Schema changes as well.
    let sql = "CREATE TABLE u (id INT PRIMARY KEY); ALTER TABLE u ADD COLUMN n INT";
    let (_, _, first) = send(&db, "ddl", sql).await;
    assert_eq!(send(&db, "ddl", sql).await, (StatusCode::OK, true, first));
    // A query may be sent again anyway.
    let rows = send(&db, "query", "SELECT count(*) FROM t").await;
    assert_eq!((rows.1, &rows.2["results"][0]["rows"]), (false, &json!([[1]])));
    assert!(!send(&db, "query", "SELECT count(*) FROM u").await.1);

    for bad in ["", "a b", &"x".repeat(256)] {
        expect_problem(request(&db, bad, "DELETE FROM t"), 400, "bad_request").await;
    }
    let twice = request(&db, "one", "DELETE FROM t").header("Idempotency-Key", "two");
    expect_problem(twice, 400, "bad_request").await;
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[1]]));
}

#[tokio::test]
async fn many_at_once_are_one() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT)").await;
    db.sql("INSERT INTO t VALUES (1, 0)").await;
    for round in 1..4 {
        let key = format!("round {round}").replace(' ', "-");
        let answers = (0..8).map(|_| send(&db, &key, "UPDATE t SET n = n + 1 WHERE id = 1"));
        let answers = futures::future::join_all(answers).await;
        assert_eq!(answers.iter().filter(|answer| !answer.1).count(), 1, "{answers:?}");
        assert!(answers.iter().all(|answer| answer.0 == 200 && answer.2 == answers[0].2), "{answers:?}");
        assert_eq!(db.rows("SELECT n FROM t").await, json!([[round]]));
    }
}
