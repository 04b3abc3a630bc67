//! `Idempotency-Key`: whoever does not know whether a write was done sends it again, and it is done once.

use std::time::Duration;

use reqwest::{Method, StatusCode, header};
use serde_json::{Value, json};
use tests::client::expect_problem;
use tests::{Client, PATIENCE, TestServer};

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

fn bulk(db: &Client, key: &str, path: &str, body: impl Into<reqwest::Body>) -> reqwest::RequestBuilder {
    let request = db.request(Method::POST, &format!("/v1/tables/main/{path}")).header("Idempotency-Key", key);
    request.header(header::CONTENT_TYPE, "application/x-ndjson").body(body).timeout(PATIENCE)
}

/// Whether it was answered before, and the answer without its duration; once nobody else goes on with the key.
async fn send_bulk(db: &Client, key: &str, path: &str, body: &str) -> (bool, Value) {
    loop {
        let answer = bulk(db, key, path, body.to_owned()).send().await.expect("an answer");
        let replayed = answer.headers().get("idempotent-replayed").is_some_and(|value| value == "true");
        let status = answer.status();
        let mut answer: Value = answer.json().await.expect("JSON");
        if answer["code"] == "idempotency_key_in_use" {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        }
        assert_eq!(status, 200, "{answer}");
        answer["elapsed_ms"].take();
        return (replayed, answer);
    }
}

fn lines(ids: std::ops::Range<usize>) -> String {
    ids.map(|id| format!("{{\"id\": {id}, \"name\": \"row {id}\"}}\n")).collect()
}

#[tokio::test]
async fn rows_that_are_sent_again_are_inserted_once() {
    let mut server = TestServer::start().await;
    let (db, robot) = (server.admin(), server.client("robot"));
    for table in ["t", "u"] {
        db.sql(&format!("CREATE TABLE {table} (id INT PRIMARY KEY, name TEXT)")).await;
    }
    let few = lines(0..3);
    let (replayed, first) = send_bulk(&db, "few", "t/rows", &few).await;
    assert_eq!((replayed, &first["rows"], &first["affected"]), (false, &json!(3), &json!(3)));
    server.kill9();
    server.restart().await;
    // What happened to the rows since is no matter: the request was carried out.
    db.sql("DELETE FROM t WHERE id = 1").await;
    for _ in 0..2 {
        assert_eq!(send_bulk(&db, "few", "t/rows", &few).await, (true, first.clone()));
    }
    assert_eq!(db.rows("SELECT id FROM t ORDER BY id").await, json!([[0], [2]]));

    let longer = lines(0..4);
    let same_start = format!("{few} ");
    for (path, body) in [
        ("t/rows", longer.as_str()),
        ("t/rows", &few[..few.len() - 1]),
        ("t/rows", same_start.as_str()),
        ("t/rows", ""),
        ("u/rows", few.as_str()),
        ("t/rows?on_conflict=nothing", few.as_str()),
    ] {
        expect_problem(bulk(&db, "few", path, body.to_owned()), 422, "idempotency_key_reused").await;
    }
    let csv = db.request(Method::POST, "/v1/tables/main/t/rows").header("Idempotency-Key", "few");
    let csv = csv.header(header::CONTENT_TYPE, "text/csv").body(few.clone());
    expect_problem(csv, 422, "idempotency_key_reused").await;
    expect_problem(request(&db, "few", "DELETE FROM t"), 422, "idempotency_key_reused").await;
    expect_problem(bulk(&db, "not visible", "t/rows", few.clone()), 400, "bad_request").await;
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[2]]));

    // Another user's key is another key; what changed nothing is remembered as well; and so is nothing at all.
    let (replayed, left) = send_bulk(&robot, "few", "t/rows?on_conflict=nothing", &few).await;
    assert_eq!((replayed, &left["rows"], &left["affected"]), (false, &json!(3), &json!(1)));
    for body in [few.as_str(), ""] {
        let key = format!("nothing-{}", body.len());
        let (replayed, first) = send_bulk(&db, &key, "t/rows?on_conflict=nothing", body).await;
        assert_eq!((replayed, &first["affected"], &first["commits"]), (false, &json!(0), &json!(0)));
        db.sql("DELETE FROM t").await;
        assert_eq!(send_bulk(&db, &key, "t/rows?on_conflict=nothing", body).await, (true, first));
        assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[0]]));
        db.sql("INSERT INTO t VALUES (0, NULL), (1, NULL), (2, NULL)").await;
    }
}

/// The client is cut off in the middle of a long body, after some of it is committed, and the server dies as well. Rows
/// without a key of their own would show if one came twice.
#[tokio::test]
async fn a_body_that_was_cut_off_goes_on_where_it_was() {
    const ROWS: usize = 80_000;
    let mut server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT, name TEXT)").await;
    let whole = lines(0..ROWS);
    let (cut, cutting) = tokio::sync::oneshot::channel::<()>();
    let half = whole.as_bytes()[..whole.len() / 2 + 5].to_vec();
    let pieces: Vec<Result<Vec<u8>, std::io::Error>> = half.chunks(60_000).map(|piece| Ok(piece.to_vec())).collect();
    let end = futures::stream::once(async move {
        let _gone = cutting.await;
        Err(std::io::Error::other("cut off"))
    });
    let body = reqwest::Body::wrap_stream(futures::StreamExt::chain(futures::stream::iter(pieces), end));
    let sending = tokio::spawn(bulk(&db, "long", "t/rows", body).send());
    let committed = async || db.rows("SELECT count(*) FROM t").await[0][0].as_u64().unwrap();
    let begun = async {
        while committed().await == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, begun).await.expect("a first commit");
    let _gone = cut.send(());
    assert!(sending.await.unwrap().is_err(), "there is no answer to half a request");
    server.kill9();
    server.restart().await;
    let before = committed().await;
    assert!(before > 0 && before < ROWS as u64, "{before} rows");

    // Another body, as far as the first one came: nothing of it is written.
    let other = whole.replacen("row 0", "row 1", 1);
    expect_problem(bulk(&db, "long", "t/rows", other), 422, "idempotency_key_reused").await;
    assert_eq!(committed().await, before);

    let (replayed, answer) = send_bulk(&db, "long", "t/rows", &whole).await;
    assert_eq!((replayed, &answer["rows"], &answer["affected"]), (false, &json!(ROWS), &json!(ROWS)), "{answer}");
    assert_eq!(send_bulk(&db, "long", "t/rows", &whole).await, (true, answer));
    let found = db.rows("SELECT count(*), count(DISTINCT id), min(id), max(id) FROM t").await;
    assert_eq!(found, json!([[ROWS, ROWS, 0, ROWS - 1]]));
}

#[tokio::test]
async fn many_bodies_at_once_are_one() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT, name TEXT)").await;
    let body = lines(0..30_000);
    let answers = futures::future::join_all((0..6).map(|_| send_bulk(&db, "k", "t/rows", &body))).await;
    assert_eq!(answers.iter().filter(|(replayed, _)| !replayed).count(), 1, "{answers:?}");
    assert!(answers.iter().all(|(_, answer)| *answer == answers[0].1), "{answers:?}");
    assert_eq!(db.rows("SELECT count(*), count(DISTINCT id) FROM t").await, json!([[30_000, 30_000]]));
}
