//! What a request says is done or refused by name: nothing of it is passed over, nothing is read as something else.

use reqwest::{Method, RequestBuilder, header};
use serde_json::{Value, json};
use tests::client::expect_problem;
use tests::guest::{Guest, KEEP_ALL, filtering};
use tests::raw::exchange;
use tests::{Client, LiveQuery, Options, PATIENCE, TestServer, plugin};

const CSV: &str = "text/csv";
const NDJSON: &str = "application/x-ndjson";

fn post(db: &Client, path: &str, content_type: &str, body: impl Into<reqwest::Body>) -> RequestBuilder {
    db.request(Method::POST, path).header(header::CONTENT_TYPE, content_type).body(body)
}

/// The detail of a problem, for its words.
async fn detail(request: RequestBuilder, status: u16, code: &str) -> String {
    expect_problem(request, status, code).await["detail"].as_str().unwrap().to_owned()
}

/// Refused bodies say what is expected in the words of JSON, not of Rust.
#[tokio::test]
async fn a_body_is_an_object_whose_fields_have_names() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.put_plugin("late", plugin("late.wasm")).await;
    for (path, body, due) in [
        ("/v1/sql", r#"["SELECT 1",null,null]"#, "expected an object"),
        ("/v1/live", r#"[null,"SELECT 1",null,null,null,null,null,null,null,null]"#, "expected an object"),
        ("/v1/auth/ticket", r#"["SELECT 1"]"#, "expected an object"),
        ("/v1/live", r#"{"sql":"SELECT 1","pipeline":[["late",null,{}]]}"#, "expected an object"),
        ("/v1/live", r#"{"sql":"SELECT 1","pipeline":["late"]}"#, "expected an object"),
        ("/v1/live", r#"{"queries":[["a","SELECT 1"]]}"#, "expected an object"),
        ("/v1/live", r#"{"queries":{"sql":"SELECT 1"}}"#, "expected an array"),
        ("/v1/live", r#"{"sql":"SELECT 1","pipeline":[{"plugin":"late","version":[3]}]}"#, "`version` is its number"),
        ("/v1/live", r#"{"sql":"SELECT 1","pipeline":[{"plugin":"late","params":[1]}]}"#, "expected an object"),
        ("/v1/live", r#"{"sql":"SELECT 1","last_rows":-1}"#, "a whole number from 0 on"),
        (
            "/v1/live",
            r#"{"sql":"SELECT 1","pipeline":[{"plugin":"late","params":{"a":1,"a":2}}]}"#,
            "`a` is there twice",
        ),
        ("/v1/plugins/late/rollback", "[1]", "expected an object"),
        ("/v1/plugins/late/rollback", r#"{"version":"1"}"#, "a whole number from 0 on"),
        ("/v1/plugins/late/try", r#"[{},null,[]]"#, "expected an object"),
        ("/v1/plugins/late/try", r#"{"rows":[{"dep_delay":1,"dep_delay":40}]}"#, "`dep_delay` is there twice"),
    ] {
        let said = detail(post(&db, path, "application/json", body), 400, "bad_json").await;
        assert!(said.contains(due), "{path} {body}: {said}");
        for word in ["struct", "enum", "Raw", "u32", "u64", "sequence", "map"] {
            assert!(!said.contains(word), "{path} {body}: {said}");
        }
    }
    let twice = LiveQuery::new("SELECT 1").plugin(r#"late:{"minutes":1,"minutes":40}"#);
    let problem = db.expect_no_live(twice, 400, "bad_json").await;
    assert!(problem["detail"].as_str().unwrap().contains("`minutes` is there twice"), "{problem}");
}

#[tokio::test]
async fn what_may_be_said_once_is_refused_twice() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let said = detail(db.get("/v1/sql?sql=SELECT+$1&params=[1]&params=[2]"), 400, "bad_request").await;
    assert!(said.contains("`params` is given twice"), "{said}");
    let types = post(&db, "/v1/sql", "application/json", r#"{"sql":"SELECT 1"}"#);
    let said = detail(types.header(header::CONTENT_TYPE, "application/sql"), 400, "bad_request").await;
    assert!(said.contains("Content-Type is there twice"), "{said}");
    let ids = db.get("/v1/live?sql=SELECT+id+FROM+t").header("Last-Event-ID", "a").header("Last-Event-ID", "b");
    let said = detail(ids, 400, "bad_request").await;
    assert!(said.contains("Last-Event-ID is there twice"), "{said}");
    let encodings = post(&db, "/v1/sql", "application/sql", "SELECT 1").header(header::CONTENT_ENCODING, "identity");
    expect_problem(encodings.header(header::CONTENT_ENCODING, "gzip"), 415, "unsupported_encoding").await;
    // None at all, as an empty header says it.
    for query in [
        db.get("/v1/live?sql=SELECT+id+FROM+t&last_event_id="),
        post(&db, "/v1/live", "application/json", r#"{"sql":"SELECT id FROM t","last_event_id":""}"#),
    ] {
        let mut live = db.attached(query.send().await.unwrap());
        live.until_uptodate().await;
    }
}

/// A list that is one off, or a parameter that was forgotten in the text, went through without a word; and so did what a
/// feed has no use for.
#[tokio::test]
async fn what_is_sent_and_not_used_is_refused() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    for (sql, params, due) in [
        ("INSERT INTO t VALUES ($1)", json!([1, 2]), "2 parameters were sent, but $1 is the last that is used"),
        ("INSERT INTO t VALUES (3); INSERT INTO t VALUES (4)", json!([1]), "none is used"),
        ("SELECT $2", json!([1, 2, 3]), "$2 is the last"),
        ("SELECT '$1' -- $2", json!([1]), "none is used"),
        ("CREATE TABLE u (id INT PRIMARY KEY)", json!([1]), "none is used"),
        ("EXPLAIN LIVE SELECT id FROM t", json!([1]), "none is used"),
        ("KILL LIVE QUERY 'x'", json!([1]), "none is used"),
    ] {
        // Also of a text that is known by then.
        for _ in 0..2 {
            let request = db.request(Method::POST, "/v1/sql").json(&json!({"sql": sql, "params": params}));
            let said = detail(request, 400, "parameters").await;
            assert!(said.contains(due), "{sql}: {said}");
        }
    }
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[0]]));
    assert_eq!(db.sql_params("SELECT $1; SELECT $2", json!([1, 2])).await["results"][1]["rows"], json!([[2]]));
    let said = detail(db.get("/v1/sql?sql=SELECT+1&params=[1]"), 400, "parameters").await;
    assert!(said.contains("none is used"), "{said}");
    let said = detail(db.get("/v1/live?sql=SELECT+id+FROM+t&params=[1]"), 400, "parameters").await;
    assert!(said.contains("none is used"), "{said}");

    let feed = Guest { plugin: ",\"kind\":\"change_filter\"", fields: &filtering(KEEP_ALL), ..Guest::default() };
    db.put_plugin("feed", feed.bytes()).await;
    let query = |old: &str| LiveQuery::new("SELECT id FROM t").plugin("feed").option("old", old);
    for old in ["full", "none"] {
        let problem = db.expect_no_live(query(old), 400, "bad_request").await;
        assert!(problem["detail"].as_str().unwrap().contains("`old`"), "{problem}");
    }
    db.live(query("changed")).await.until_uptodate().await;
}

#[tokio::test]
async fn media_types_are_taken_with_what_they_say() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let rows = "/v1/tables/main/t/rows";
    for (path, content_type, body, due) in [
        (rows, "text/csv; header=absent", "id\n1\n", "header"),
        (rows, "text/csv; charset=ISO-8859-1", "id\n1\n", "UTF-8"),
        (rows, "application/x-ndjson;charset=utf-16", "{\"id\":1}\n", "UTF-8"),
        ("/v1/sql", "application/sql; charset=latin1", "INSERT INTO t VALUES (1)", "UTF-8"),
    ] {
        let said = detail(post(&db, path, content_type, body), 415, "unsupported_media_type").await;
        assert!(said.contains(due), "{content_type}: {said}");
    }
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[0]]));
    let sent = post(&db, rows, "text/csv; header=present; charset=\"UTF-8\"", "id\n1\n").send().await.unwrap();
    assert_eq!(sent.status(), 200);
    // The most exact range of Accept decides.
    for (accept, due) in [("application/json;q=0, */*", NDJSON), ("application/json;Q=0.1, text/*", CSV)] {
        let answer = post(&db, "/v1/sql", "application/sql", "SELECT 1").header(header::ACCEPT, accept);
        let answer = answer.send().await.unwrap();
        assert!(answer.headers()[header::CONTENT_TYPE].to_str().unwrap().starts_with(due), "{accept}: {answer:?}");
    }
}

/// The whole row came with its end: only the unfinished rest was held against the limit.
#[tokio::test]
async fn a_row_is_no_longer_than_the_setting_allows() {
    let config = "[server]\nbody_bytes = 2048\n".to_owned();
    let server = TestServer::with(Options { config, ..Options::default() }).await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, v TEXT)").await;
    let long = "x".repeat(3_000);
    for (format, body) in [
        (NDJSON, format!("{{\"id\":1}}\n\n{{\"id\":2,\"v\":\"{long}\"}}\n")),
        (NDJSON, format!("{{\"id\":1}}\n\n{{\"id\":2,\"v\":\"{long}")),
        (CSV, format!("id,v\n1,\n2,\"{long}\"\n")),
        (CSV, format!("id,v\n1,\n2,\"{long}")),
    ] {
        let request = post(&db, "/v1/tables/main/t/rows", format, body);
        let problem = expect_problem(request, 413, "row_too_large").await;
        assert_eq!((&problem["row"], &problem["line"]), (&json!(2), &json!(3)), "{format}: {problem}");
        assert!(problem["detail"].as_str().unwrap().contains("server.body_bytes"), "{problem}");
        assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[0]]));
    }
    let fits = format!("{{\"id\":1,\"v\":\"{}\"}}\n", "x".repeat(2_000));
    assert_eq!(post(&db, "/v1/tables/main/t/rows", NDJSON, fits).send().await.unwrap().status(), 200);
    let said = detail(post(&db, "/v1/sql", "application/sql", long), 413, "body_too_large").await;
    assert!(said.contains("server.body_bytes"), "{said}");
}

#[tokio::test]
async fn an_upload_that_is_too_large_says_which_setting() {
    let config = "[server]\nplugin_body_bytes = 1024\n".to_owned();
    let server = TestServer::with(Options { config, ..Options::default() }).await;
    let said = detail(server.admin().put_plugin_request("late", vec![0; 2_000]), 413, "body_too_large").await;
    assert!(said.contains("server.plugin_body_bytes") && !said.contains("split"), "{said}");
}

/// HEAD opened the ticket's stream, and so ended the connection that had it.
#[tokio::test]
async fn head_does_not_touch_a_stream() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let ticket = db.request(Method::POST, "/v1/auth/ticket").json(&json!({"sql": "SELECT id FROM t"}));
    let ticket: Value = ticket.send().await.unwrap().json().await.unwrap();
    let path = format!("/v1/live?ticket={}", ticket["ticket"].as_str().unwrap());
    let browser = server.stranger(None);
    let mut live = browser.attached(browser.get(&path).send().await.unwrap());
    live.until_uptodate().await;
    let head = browser.request(Method::HEAD, &path).timeout(PATIENCE).send().await.unwrap();
    assert_eq!((head.status().as_u16(), head.headers()[header::ALLOW].as_bytes()), (405, &b"GET,POST"[..]));
    db.sql("INSERT INTO t VALUES (1)").await;
    assert_eq!(live.next_change().await.name, "insert", "the stream goes on");
    let put = db.request(Method::PUT, "/v1/live").send().await.unwrap();
    assert_eq!((put.status().as_u16(), put.headers()[header::ALLOW].as_bytes()), (405, &b"GET,POST"[..]));
}

#[tokio::test]
async fn paths_and_parameters_are_looked_at_as_a_whole() {
    let server = TestServer::start().await;
    let db = server.admin();
    // A parameter that looks like another one.
    expect_problem(server.stranger(None).get("/v1/live?foo=ticket="), 401, "unauthorized").await;
    for path in ["/v1/plugins/%ff", "/v1/plugins/main/%ff/logs", "/v1/tables/main/%c3%28/rows"] {
        let method = if path.ends_with("rows") { Method::POST } else { Method::GET };
        expect_problem(db.request(method, path), 400, "bad_request").await;
    }
    // It does not fit into what is read of a head.
    let long = format!("GET /v1/sql?sql={} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(60_000));
    assert_eq!(exchange(&db, long.as_bytes(), PATIENCE).await.statuses(), [431]);
}

#[tokio::test]
async fn plugins_are_looked_at_by_the_short_path_and_within_limits() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.put_plugin("late", plugin("late.wasm")).await;
    for (path, field) in [("/v1/plugins/late/errors", "errors"), ("/v1/plugins/late/logs?limit=0", "lines")] {
        let answer: Value = db.get(path).send().await.unwrap().json().await.unwrap();
        assert_eq!(answer[field], json!([]), "{path}: {answer}");
    }
    for path in ["logs?limit=1001", "errors?limit=99999999999", "errors?limit=0", "logs?limit=-1"] {
        for plugin in ["late", "main/late"] {
            let said = detail(db.get(&format!("/v1/plugins/{plugin}/{path}")), 400, "bad_request").await;
            assert!(said.contains("to 1000"), "{path}: {said}");
        }
    }
}

#[tokio::test]
async fn what_is_not_there_is_told_with_something_that_can_be_done() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    for (namespace, due, not) in [
        ("system", "system tables", "CREATE"),
        ("information_schema", "system tables", "CREATE"),
        ("", "leave the name out", "CREATE"),
        ("a b", "CREATE NAMESPACE \"a b\"", "CREATE NAMESPACE a"),
        ("shop", "CREATE NAMESPACE shop", "\"shop\"; create it with CREATE NAMESPACE \""),
    ] {
        let request = db.request(Method::POST, "/v1/sql").json(&json!({"sql": "SELECT 1", "namespace": namespace}));
        let said = detail(request, 404, "not_found").await;
        assert!(said.contains(due) && !said.contains(not), "{namespace:?}: {said}");
    }
    for (stage, due) in [("other/late", "say late alone"), ("NB", "a-z"), ("nb", "PUT /v1/plugins/main/nb")] {
        let problem = db.expect_no_live(LiveQuery::new("SELECT id FROM t").plugin(stage), 404, "not_found").await;
        let said = problem["detail"].as_str().unwrap();
        assert!(said.contains(due) && said.contains("PUT") == (stage == "nb"), "{stage}: {said}");
    }
}

/// A `closed` says what whoever comes back is told.
#[tokio::test]
async fn a_closed_stream_has_the_status_of_a_reconnect() {
    let server = TestServer::start().await;
    let db = server.admin();
    for table in ["a", "b"] {
        db.sql(&format!("CREATE TABLE {table} (id INT PRIMARY KEY)")).await;
    }
    let mut dropped = db.live("SELECT id FROM a").await;
    let mut killed = db.live("SELECT id FROM b").await;
    dropped.until_uptodate().await;
    let start = killed.until_uptodate().await;
    let live_id =
        start.iter().find(|event| event.name == "start").unwrap().data["live_id"].as_str().unwrap().to_owned();
    db.sql("DROP TABLE a").await;
    db.sql(&format!("KILL LIVE QUERY '{live_id}'")).await;
    for (live, code) in [(&mut dropped, "table_dropped"), (&mut killed, "killed")] {
        let event = live.next_change().await;
        assert_eq!((event.name.as_str(), &event.data["code"]), ("closed", &json!(code)));
        let again = live.try_reconnect().await.unwrap().status().as_u16();
        assert_eq!(event.data["status"], again, "{code}");
    }
}
