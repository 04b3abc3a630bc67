//! Results as CSV, NDJSON and Arrow streams, and the same three into tables: every type, and back exactly.

use std::sync::Arc;

use futures::StreamExt;
use reqwest::{Method, RequestBuilder, header};
use serde_json::{Value, json};
use tests::client::expect_problem;
use tests::{Client, PATIENCE, TestServer};
use tokio::sync::Barrier;

const CSV: &str = "text/csv";
const NDJSON: &str = "application/x-ndjson";
const ARROW: &str = "application/vnd.apache.arrow.stream";

const EVERY_TYPE: &str = "id INT PRIMARY KEY, b BOOLEAN, s SMALLINT, i INT, l BIGINT, r REAL, d DOUBLE, m DECIMAL(38, 4), \
                          t TEXT, y BYTEA, a DATE, c TIME, p TIMESTAMP, u UUID, j JSON";

/// Ends of ranges, what needs quotes, and what looks like something else.
const ROWS: &[&str] = &[
    "1, true, -32768, -2147483648, -9223372036854775808, 1.5, -2.25, '-9999999999999999999999999999999999.9999', 'plain', \
     'bytes', '0001-01-01', '00:00:00', '0001-01-01T00:00:00Z', '00000000-0000-0000-0000-000000000000', '{}'",
    "2, false, 32767, 2147483647, 9223372036854775807, 3.4028235e38, 1.7976931348623157e308, \
     '9999999999999999999999999999999999.9999', '', '', '9999-12-31', '23:59:59.999999', '9999-12-31T23:59:59.999999Z', \
     'ffffffff-ffff-ffff-ffff-ffffffffffff', '[1, null, {\"a\": \"b,\\\"c\\\"\"}]'",
    "3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL",
    "4, true, 0, 0, 9007199254740993, 1.4e-45, 5e-324, '0.0001', 'a,b \"c\" d', '\\x00ff0a2c22', '1970-01-01', '12:34:56', \
     '1969-12-31T23:59:59.999999Z', '6f2b1c1e-8a55-4b6f-9d3e-0123456789ab', '\"text\"'",
    "5, false, 1, 1, 1, 'NaN', 'Infinity', '1', 'NULL', '\\x', '2024-02-29', '00:00:00.000001', '2024-02-29T12:00:00Z', \
     '01234567-89ab-cdef-0123-456789abcdef', '0.1'",
    "6, true, -1, -1, -1, '-Infinity', -0.0, '-1.5', ' spaces and ü\u{2028} ', '\\x80', '1600-01-01', '23:00:00', \
     '1600-01-01T00:00:00.5Z', 'abcdefab-cdef-abcd-efab-cdefabcdefab', 'true'",
];

async fn fill(db: &Client, table: &str) {
    db.sql(&format!("CREATE TABLE {table} ({EVERY_TYPE})")).await;
    for row in ROWS {
        db.sql(&format!("INSERT INTO {table} VALUES ({row})")).await;
    }
    // A line break inside a value.
    db.sql_params(&format!("INSERT INTO {table} (id, t) VALUES (7, $1)"), json!(["one\ntwo\r\n\"three\""])).await;
}

fn query(db: &Client, sql: &str, accept: &str) -> RequestBuilder {
    db.request(Method::POST, "/v1/sql").header(header::ACCEPT, accept).json(&json!({"sql": sql})).timeout(PATIENCE)
}

async fn body(db: &Client, sql: &str, accept: &str) -> Vec<u8> {
    let response = query(db, sql, accept).send().await.unwrap();
    assert_eq!(response.status(), 200, "{sql} as {accept}");
    let content_type = response.headers()[header::CONTENT_TYPE].to_str().unwrap().to_owned();
    assert!(content_type.starts_with(accept), "{content_type}");
    response.bytes().await.unwrap().to_vec()
}

fn rows(db: &Client, table: &str, content_type: &str, body: impl Into<reqwest::Body>) -> RequestBuilder {
    let request = db.request(Method::POST, &format!("/v1/tables/main/{table}/rows"));
    request.header(header::CONTENT_TYPE, content_type).body(body).timeout(PATIENCE)
}

fn resolving(db: &Client, table: &str, conflict: &str, content_type: &str, body: &str) -> RequestBuilder {
    let path = format!("/v1/tables/main/{table}/rows?on_conflict={conflict}");
    let request = db.request(Method::POST, &path).header(header::CONTENT_TYPE, content_type);
    request.body(body.to_owned()).timeout(PATIENCE)
}

async fn insert(db: &Client, table: &str, content_type: &str, body: impl Into<reqwest::Body>) -> Value {
    let response = rows(db, table, content_type, body).send().await.unwrap();
    let (status, text) = (response.status(), response.text().await.unwrap());
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

#[tokio::test]
async fn every_type_through_every_format_and_back() {
    let server = TestServer::start().await;
    let db = server.admin();
    fill(&db, "t").await;
    let due = db.rows("SELECT * FROM t ORDER BY id").await;
    assert_eq!(due.as_array().unwrap().len(), ROWS.len() + 1);
    for (copy, format) in [("csv", CSV), ("ndjson", NDJSON), ("arrow", ARROW)] {
        db.sql(&format!("CREATE TABLE {copy} ({EVERY_TYPE})")).await;
        let sent = body(&db, "SELECT * FROM t ORDER BY id", format).await;
        let answer = insert(&db, copy, format, sent.clone()).await;
        assert_eq!((&answer["rows"], &answer["commits"]), (&json!(ROWS.len() + 1), &json!(1)), "{format}");
        assert_eq!(db.rows(&format!("SELECT * FROM {copy} ORDER BY id")).await, due, "{format}");
        // What JSON says may hide a difference; the bytes of the format itself must not.
        assert_eq!(body(&db, &format!("SELECT * FROM {copy} ORDER BY id"), format).await, sent, "{format}");
        // NULL and the empty text are two things.
        let empty = db.rows(&format!("SELECT id FROM {copy} WHERE t = '' OR t IS NULL ORDER BY id")).await;
        assert_eq!(empty, json!([[2], [3]]), "{format}");
    }
}

#[tokio::test]
async fn csv_is_what_spreadsheets_read() {
    let server = TestServer::start().await;
    let db = server.admin();
    fill(&db, "t").await;
    let text =
        String::from_utf8(body(&db, "SELECT id, b, l, m, t, p FROM t WHERE id IN (1, 3, 4) ORDER BY id", CSV).await);
    let due = "id,b,l,m,t,p\n\
               1,true,-9223372036854775808,-9999999999999999999999999999999999.9999,plain,0001-01-01T00:00:00.000000Z\n\
               3,,,,,\n\
               4,true,9007199254740993,0.0001,\"a,b \"\"c\"\" d\",1969-12-31T23:59:59.999999Z\n";
    assert_eq!(text.unwrap(), due);
    let header = body(&db, "SELECT id AS \"a,b\", t FROM t WHERE false", CSV).await;
    assert_eq!(String::from_utf8(header).unwrap(), "\"a,b\",t\n");
    let affected = String::from_utf8(body(&db, "DELETE FROM t WHERE id < 3", CSV).await).unwrap();
    assert!(affected.starts_with("affected,seq\n2,"), "{affected}");
}

#[tokio::test]
async fn several_statements_need_a_format_for_several_results() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    for format in [CSV, NDJSON, ARROW] {
        expect_problem(query(&db, "SELECT 1; SELECT 2", format), 406, "several_results").await;
        let writes = "INSERT INTO t VALUES (1); INSERT INTO t VALUES (2)";
        expect_problem(query(&db, writes, format), 406, "several_results").await;
    }
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[0]]), "nothing was run");
    expect_problem(query(&db, "SELECT 1", "image/png"), 406, "not_acceptable").await;
    // An error is a problem in every format.
    for format in [CSV, NDJSON, ARROW] {
        let problem = expect_problem(query(&db, "SELECT nothing FROM t", format), 400, "unknown_column").await;
        assert_eq!(problem["position"], 7);
    }
}

#[tokio::test]
async fn large_results_come_whole_in_every_format() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, name TEXT)").await;
    let lines: String = (0..30_000).map(|n| format!("{{\"id\": {n}, \"name\": \"row {n}\"}}\n")).collect();
    let answer = insert(&db, "t", NDJSON, lines).await;
    assert_eq!(answer["rows"], 30_000);
    assert!(answer["commits"].as_u64().unwrap() > 1, "{answer}");
    let csv = String::from_utf8(body(&db, "SELECT * FROM t ORDER BY id", CSV).await).unwrap();
    let due: String =
        std::iter::once("id,name\n".to_owned()).chain((0..30_000).map(|n| format!("{n},row {n}\n"))).collect();
    assert!(csv == due, "{} bytes, {} expected", csv.len(), due.len());
    // Out as Arrow, in pieces that end anywhere, into another table.
    db.sql("CREATE TABLE copy (id INT PRIMARY KEY, name TEXT)").await;
    let arrow = body(&db, "SELECT * FROM t", ARROW).await;
    let pieces: Vec<Result<Vec<u8>, std::io::Error>> = arrow.chunks(7_777).map(|piece| Ok(piece.to_vec())).collect();
    let streamed = reqwest::Body::wrap_stream(futures::stream::iter(pieces));
    assert_eq!(insert(&db, "copy", ARROW, streamed).await["rows"], 30_000);
    let same = "SELECT count(*) FROM t JOIN copy ON t.id = copy.id AND t.name = copy.name";
    assert_eq!(db.rows(same).await, json!([[30_000]]));
}

#[tokio::test]
async fn rows_get_defaults_for_what_they_do_not_say() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT DEFAULT 7, who TEXT DEFAULT current_user)").await;
    let lines = "{\"id\": 1}\n\n{\"n\": null, \"id\": 2}\r\n{\"id\": 3, \"n\": 1, \"who\": \"x\"}\n{\"id\":4}";
    assert_eq!(insert(&db, "t", NDJSON, lines).await["rows"], 4);
    let due = json!([[1, 7, "admin"], [2, null, "admin"], [3, 1, "x"], [4, 7, "admin"]]);
    assert_eq!(db.rows("SELECT * FROM t ORDER BY id").await, due);
    assert_eq!(insert(&db, "t", CSV, "\u{feff}n,id\n,5\n8,6\r\n").await["rows"], 2);
    assert_eq!(db.rows("SELECT id, n FROM t WHERE id > 4 ORDER BY id").await, json!([[5, null], [6, 8]]));
    // A table without a key of its own.
    db.sql("CREATE TABLE log (line TEXT)").await;
    assert_eq!(insert(&db, "log", CSV, "line\none\n\n\"\"\n").await["rows"], 3);
    assert_eq!(db.rows("SELECT line FROM log ORDER BY line").await, json!([[""], ["one"], [null]]));
    assert_eq!(insert(&db, "log", NDJSON, "").await["rows"], 0);
}

#[tokio::test]
async fn a_refused_row_is_named_and_what_was_committed_stays() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, name TEXT NOT NULL)").await;
    let line = |n: usize| format!("{{\"id\": {n}, \"name\": \"row number {n}\"}}\n");
    let mut lines: String = (1..=40_000).map(line).collect();
    lines.push_str(&line(20_000));
    let problem = expect_problem(rows(&db, "t", NDJSON, lines), 409, "duplicate_key").await;
    assert_eq!((&problem["row"], &problem["line"]), (&json!(40_001), &json!(40_001)), "{problem}");
    let committed = problem["committed_rows"].as_i64().unwrap();
    assert!(committed > 0 && committed <= 40_000, "{problem}");
    assert_eq!(db.rows("SELECT count(*), max(id) FROM t").await, json!([[committed, committed]]));

    db.sql("DELETE FROM t").await;
    for (format, sent, status, code, row, line) in [
        (NDJSON, "{\"id\": 1, \"name\": \"a\"}\n\n{\"id\": 2, \"name\": null}\n", 400, "not_null", 2, Some(3)),
        (NDJSON, "{\"id\": 1, \"name\": \"a\"}\n{\"id\": 1, \"name\": \"b\"}\n", 409, "duplicate_key", 2, Some(2)),
        (NDJSON, "{\"id\": 1, \"name\": \"a\"}\n{\"id\": 2, \"nome\": \"b\"}\n", 400, "unknown_column", 2, Some(2)),
        (NDJSON, "{\"id\": 1, \"name\": \"a\"}\n[1]\n", 400, "bad_json", 2, Some(2)),
        (NDJSON, "{\"id\": 2147483648, \"name\": \"a\"}\n", 400, "invalid_value", 1, Some(1)),
        (NDJSON, "{\"id\": 1, \"name\": {\"a\": 1}}\n", 400, "type_mismatch", 1, Some(1)),
        (CSV, "id,name\n1,a\n2\n", 400, "column_count", 2, Some(3)),
        (CSV, "id,name\n1,\"a\nb\"\nx,c\n", 400, "invalid_value", 2, Some(4)),
        (CSV, "id,name\n1,a\"b\n", 400, "bad_csv", 1, Some(2)),
        (ARROW, "this is no Arrow stream at all", 400, "bad_arrow", 1, None),
    ] {
        let problem = expect_problem(rows(&db, "t", format, sent), status, code).await;
        assert_eq!((&problem["row"], problem["line"].as_u64()), (&json!(row), line), "{sent}: {problem}");
        // They belong to the commit that was not made.
        assert_eq!(problem["committed_rows"], 0, "{problem}");
        assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[0]]), "{sent}");
    }
}

#[tokio::test]
async fn who_may_not_write_is_told_before_the_rows_are_read() {
    let server = TestServer::start().await;
    let (admin, alice) = (server.admin(), server.client("alice"));
    admin.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    admin.sql("CREATE TABLE mine (id INT PRIMARY KEY) WITH (type = 'user')").await;
    expect_problem(rows(&alice, "t", CSV, "id\n1\n"), 403, "forbidden").await;
    expect_problem(rows(&server.stranger(None), "t", CSV, "id\n1\n"), 401, "unauthorized").await;
    expect_problem(rows(&admin, "nowhere", CSV, "id\n1\n"), 404, "not_found").await;
    expect_problem(rows(&admin, "t", "application/json", "{}"), 415, "unsupported_media_type").await;
    let merge = admin.request(Method::POST, "/v1/tables/main/t/rows?on_conflict=replace").header("content-type", CSV);
    expect_problem(merge.body("id\n1\n"), 400, "bad_request").await;
    let unknown = admin.request(Method::POST, "/v1/tables/main/t/rows?upsert=1").header("content-type", CSV);
    expect_problem(unknown.body("id\n1\n"), 400, "unknown_parameter").await;
    assert_eq!(admin.rows("SELECT count(*) FROM t").await, json!([[0]]));
    // Rows of a user table are the user's own.
    insert(&alice, "mine", CSV, "id\n1\n2\n").await;
    assert_eq!(alice.rows("SELECT count(*) FROM mine").await, json!([[2]]));
    assert_eq!(server.client("bob").rows("SELECT count(*) FROM mine").await, json!([[0]]));
}

#[tokio::test]
async fn rows_that_are_there_already_are_refused_left_or_updated() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT DEFAULT 7, name TEXT UNIQUE)").await;
    db.sql("INSERT INTO t VALUES (1, 10, 'a'), (2, 20, 'b')").await;
    let stored = async || db.rows("SELECT * FROM t ORDER BY id").await;
    let taken = async |conflict: &str, format: &str, body: &str| -> (Value, Value) {
        let response = resolving(&db, "t", conflict, format, body).send().await.unwrap();
        let (status, text) = (response.status(), response.text().await.unwrap());
        assert_eq!(status, 200, "{conflict}: {text}");
        let mut answer: Value = serde_json::from_str(&text).unwrap();
        (answer["rows"].take(), answer["affected"].take())
    };
    let refused = "{\"id\": 3, \"name\": \"c\"}\n{\"id\": 1, \"name\": \"d\"}\n";
    for request in [rows(&db, "t", NDJSON, refused), resolving(&db, "t", "error", NDJSON, refused)] {
        let problem = expect_problem(request, 409, "duplicate_key").await;
        assert_eq!((&problem["row"], &problem["committed_rows"]), (&json!(2), &json!(0)), "{problem}");
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains("?on_conflict=nothing") && detail.contains("?on_conflict=update"), "{detail}");
    }

    // Whatever is in the way: the key, a unique value, a row of the same body.
    let lines = r#"
        {"id": 1, "n": 99}
        {"id": 4, "name": "b"}
        {"id": 3, "n": 30}
        {"id": 3, "n": 31}
    "#;
    assert_eq!(taken("nothing", NDJSON, lines).await, (json!(4), json!(1)));
    assert_eq!(stored().await, json!([[1, 10, "a"], [2, 20, "b"], [3, 30, null]]));

    // What a row does not say stays as it is; of the same row twice, the last counts; a new row gets its defaults.
    let lines = r#"
        {"id": 1, "n": 11}
        {"id": 2, "name": null}
        {"id": 5}
        {"id": 5, "n": 1}
        {"id": 5, "n": 2}
        {"id": 3}
    "#;
    assert_eq!(taken("update", NDJSON, lines).await, (json!(6), json!(6)));
    assert_eq!(stored().await, json!([[1, 11, "a"], [2, 20, null], [3, 30, null], [5, 2, null]]));
    assert_eq!(taken("update", CSV, "n,id\n12,1\n,2\n40,4\n").await, (json!(3), json!(3)));
    assert_eq!(stored().await, json!([[1, 12, "a"], [2, null, null], [3, 30, null], [4, 40, null], [5, 2, null]]));
    // A table that is sent back whole is the same table.
    let whole = String::from_utf8(body(&db, "SELECT * FROM t", CSV).await).unwrap();
    let before = stored().await;
    assert_eq!(taken("update", CSV, &whole).await, (json!(5), json!(5)));
    assert_eq!(stored().await, before);

    // By the key alone: another row's unique value is in the way, and no value is taken where none may be.
    let problem = expect_problem(resolving(&db, "t", "update", CSV, "id,name\n2,a\n"), 409, "duplicate_key").await;
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("is unique") && !detail.contains("?on_conflict"), "it was said already: {detail}");
    expect_problem(resolving(&db, "t", "update", CSV, "id,n\n1,x\n"), 400, "invalid_value").await;
    expect_problem(resolving(&db, "t", "update", CSV, "n\n1\n"), 400, "not_null").await;
    db.sql("CREATE TABLE log (line TEXT)").await;
    let problem = expect_problem(resolving(&db, "log", "update", CSV, "line\nx\n"), 400, "bad_request").await;
    assert!(problem["detail"].as_str().unwrap().contains("no primary key"), "{problem}");
    expect_problem(resolving(&db, "t", "nothing&on_conflict=update", CSV, "id\n9\n"), 400, "bad_request").await;
    assert_eq!(stored().await, before);
}

/// A row that comes again in another commit, or in the same one: nothing must depend on where the body is cut.
#[tokio::test]
async fn an_update_in_bulk_does_not_depend_on_its_commits() {
    const IDS: usize = 7_000;
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT)").await;
    let lines: String = (0..9 * IDS).map(|n| format!("{{\"id\": {}, \"n\": {n}}}\n", n % IDS)).collect();
    let response = resolving(&db, "t", "update", NDJSON, &lines).send().await.unwrap();
    let answer: Value = response.json().await.unwrap();
    assert_eq!((&answer["rows"], &answer["affected"]), (&json!(9 * IDS), &json!(9 * IDS)), "{answer}");
    assert!(answer["commits"].as_u64().unwrap() > 1, "{answer}");
    let last = format!("SELECT count(*), count(*) FILTER (WHERE n = id + {}) FROM t", 8 * IDS);
    assert_eq!(db.rows(&last).await, json!([[IDS, IDS]]));
}

/// Each took as much of the memory for bodies as the largest one: of 17 clients that sent a few rows at once one got 503.
#[tokio::test]
async fn many_small_bodies_have_room_at_once() {
    const WRITERS: usize = 64;
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let all_have_begun = Arc::new(Barrier::new(WRITERS));
    let insert = async |writer: usize| {
        let (begin, end) = (format!("{{\"id\": {}}}\n", 2 * writer), format!("{{\"id\": {}}}\n", 2 * writer + 1));
        let length = begin.len() + end.len();
        let all_have_begun = all_have_begun.clone();
        let end = async move {
            all_have_begun.wait().await;
            Ok::<_, std::io::Error>(end)
        };
        let body = futures::stream::iter([Ok(begin)]).chain(futures::stream::once(end));
        let request = rows(&db, "t", NDJSON, reqwest::Body::wrap_stream(body)).header(header::CONTENT_LENGTH, length);
        let response = request.send().await.unwrap();
        (response.status(), response.text().await.unwrap())
    };
    for (status, text) in futures::future::join_all((0..WRITERS).map(insert)).await {
        assert_eq!(status, 200, "{text}");
    }
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[2 * WRITERS]]));
}

/// The prompt of a shell stuck to what curl printed.
#[tokio::test]
async fn a_json_document_ends_its_line() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    for request in [
        query(&db, "SELECT * FROM t", "application/json"),
        query(&db, "SELECT nothing FROM t", "application/json"),
        rows(&db, "t", NDJSON, "{\"id\": 1}\n"),
        db.get("/v1/plugins"),
        db.request(Method::POST, "/v1/auth/ticket").json(&json!({"sql": "SELECT * FROM t"})),
    ] {
        let response = request.send().await.unwrap();
        let announced = response.content_length();
        let text = response.text().await.unwrap();
        assert!(text.ends_with("}\n"), "{text:?}");
        assert_eq!(announced, Some(text.len() as u64), "{text:?}");
    }
}
