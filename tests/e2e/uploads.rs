//! What happens to a plugin between upload and use: versions, trials, the compiling child, compiled code on disk.

use std::path::PathBuf;

use reqwest::Method;
use serde_json::{Value, json};
use tests::client::expect_problem;
use tests::guest::{Guest, KEEP_ALL, filter, filtering};
use tests::{Client, LiveQuery, PATIENCE, TestServer, plugin};

/// Keeps rows or not.
fn constant(keep: bool) -> Vec<u8> {
    filter(if keep { KEEP_ALL } else { "(i64.const 0)" })
}

async fn act(db: &Client, path: &str, body: Value) -> (u16, Value) {
    let response = db.request(Method::POST, &format!("/v1/plugins/{path}")).json(&body).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

/// The second of two rollbacks went to the version before the first one's, by number: to what had turned out wrong.
#[tokio::test]
async fn rollbacks_go_further_back_and_never_to_what_they_left() {
    let mut server = TestServer::start().await;
    let db = server.admin();
    let module = |count: usize| {
        let more = "(drop (i32.const 1))".repeat(count);
        filter(&format!("{more} (i64.const 0)"))
    };
    let mut hashes = Vec::new();
    for count in 1..=3 {
        hashes.push(db.put_plugin("p", module(count)).await["sha256"].clone());
    }
    let (status, back) = act(&db, "p/rollback", json!({})).await;
    assert_eq!((status, &back["version"], &back["sha256"]), (200, &json!(4), &hashes[1]));
    // What was gone back from is known after a restart as well.
    server.kill9();
    server.restart().await;
    let (status, back) = act(&db, "p/rollback", json!({})).await;
    assert_eq!((status, &back["version"], &back["sha256"]), (200, &json!(5), &hashes[0]));
    let (status, refused) = act(&db, "p/rollback", json!({})).await;
    let detail = refused["detail"].as_str().unwrap();
    assert!(status == 404 && detail.contains("no earlier version than 1") && detail.contains("upload"), "{refused}");

    // By number, everything is in reach; from there it goes on.
    let (status, back) = act(&db, "p/rollback", json!({"version": 3})).await;
    assert_eq!((status, &back["sha256"]), (200, &hashes[2]));
    assert_eq!(act(&db, "p/rollback", json!({})).await.1["sha256"], hashes[1]);
    // A new upload comes from what was active before it, not from a number that is less by one.
    let mended = db.put_plugin("p", module(4)).await;
    assert_eq!(mended["version"], 8);
    assert_eq!(act(&db, "p/rollback", json!({})).await.1["sha256"], hashes[1]);
    assert_eq!(act(&db, "p/rollback", json!({})).await.1["sha256"], hashes[0]);
    // The same module once more is an upload like any other, and is gone back from like any other.
    db.put_plugin("p", module(2)).await;
    assert_eq!(act(&db, "p/rollback", json!({})).await.1["sha256"], hashes[0]);
    assert_eq!(act(&db, "p/rollback", json!({})).await.0, 404);
}

#[tokio::test]
async fn a_rollback_is_an_activation_and_numbers_are_never_used_again() {
    let mut server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    db.sql("INSERT INTO t VALUES (1)").await;
    let one = db.put_plugin("p", constant(true)).await;
    db.put_plugin("p", constant(false)).await;
    let mut live = db.live(LiveQuery::new("SELECT id FROM t").plugin("p")).await;
    let mut pinned = db.live(LiveQuery::new("SELECT id FROM t").plugin("p@2")).await;
    live.until_uptodate().await;
    pinned.until_uptodate().await;
    assert!(live.fold.rows.is_empty());

    let (status, back) = act(&db, "p/rollback", json!({})).await;
    assert_eq!((status, &back["version"], &back["sha256"]), (200, &json!(3), &one["sha256"]));
    while live.fold.resyncs == 0 {
        live.next_event().await;
    }
    live.until_uptodate().await;
    assert_eq!((live.fold.rows.len(), pinned.fold.resyncs), (1, 0));
    let (status, again) = act(&db, "main/p/rollback", json!({"version": 1})).await;
    assert_eq!((status, &again["unchanged"]), (200, &json!(true)), "the same bytes are active");
    assert_eq!(act(&db, "p/rollback", json!({"version": 9})).await.0, 404);
    assert_eq!(act(&db, "nobody/rollback", json!({})).await.0, 404);
    let by_hash = LiveQuery::new("SELECT id FROM t").plugin(&format!("p@sha256:{}", one["sha256"].as_str().unwrap()));
    let mut by_hash = db.live(by_hash).await;
    by_hash.until_uptodate().await;
    assert_eq!(by_hash.fold.rows.len(), 1);
    expect_problem(server.client("alice").request(Method::POST, "/v1/plugins/p/rollback"), 403, "forbidden").await;

    // Deleted, and made again: another number, also after a restart.
    expect_problem(db.request(Method::DELETE, "/v1/plugins/p"), 409, "in_use|conflict").await;
    drop((live, pinned, by_hash));
    let gone = async {
        while !db.request(Method::DELETE, "/v1/plugins/p").send().await.unwrap().status().is_success() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(tests::PATIENCE, gone).await.expect("nobody uses it any more");
    server.kill9();
    server.restart().await;
    assert_eq!(db.put_plugin("p", constant(true)).await["version"], 4);
}

#[tokio::test]
async fn a_plugin_is_tried_on_rows_and_nothing_is_stored() {
    let server = TestServer::start().await;
    let db = server.admin();
    for name in ["late", "local_units", "worse", "crossings"] {
        db.put_plugin(name, plugin(&format!("{name}.wasm"))).await;
    }
    db.sql("CREATE TABLE flights (id BIGINT PRIMARY KEY, dep_delay SMALLINT, raw BYTEA, at TIMESTAMP)").await;
    let (status, answer) = act(
        &db,
        "late/try",
        json!({"params": {"minutes": 30}, "table": "flights", "rows": [{"id": 1, "dep_delay": 30, "raw": "AP8=", "at": "2013-01-01T05:00:00Z"}, {"dep_delay": null}]}),
    )
    .await;
    assert_eq!((status, &answer["results"]), (200, &json!([{"keep": true}, {"keep": false}])), "{answer}");
    assert_eq!(answer["kind"], "row_filter");
    let row = json!({"carrier": "AA", "flight": 1, "origin": "JFK", "dest": "MIA", "distance": 100, "dep_delay": 99});
    let (_, answer) = act(&db, "main/local_units/try", json!({"rows": [row]})).await;
    assert_eq!(answer["results"][0]["row"]["delay_class"], "very late", "{answer}");
    assert_eq!(answer["columns"][4], json!({"name": "km", "type": "DOUBLE"}));
    let (old, new) =
        (json!([{"dep_delay": 1}, null, {"dep_delay": 1}]), json!([{"dep_delay": 70}, {"dep_delay": 20}, null]));
    let (_, answer) = act(&db, "worse/try", json!({"old": old, "rows": new})).await;
    assert_eq!(answer["results"], json!([{"keep": true}, {"keep": false}, {"keep": false}]));
    let (_, answer) = act(&db, "crossings/try", json!({"old": old, "rows": new})).await;
    let made = answer["results"].as_array().unwrap().iter().map(|result| result["rows"].as_array().unwrap().len());
    assert_eq!(made.collect::<Vec<_>>(), [2, 1, 0], "{answer}");

    for (path, body, status, named) in [
        ("late/try", json!({"rows": [{"delay": 1}]}), 400, "delay"),
        ("late/try", json!({"rows": [{"dep_delay": "soon"}]}), 400, "dep_delay"),
        ("late/try", json!({"rows": [{"dep_delay": "soon"}]}), 400, "--table"),
        ("late/try", json!({"table": "flights", "rows": [{"raw": "no base64"}]}), 400, "\"raw\" is BYTEA"),
        ("late/try", json!({"table": "flights", "rows": [{"raw": [1, 2]}]}), 400, "\"raw\" is BYTEA"),
        ("late/try", json!({"rows": [], "params": {"hours": 1}}), 400, "hours"),
        ("late/try", json!({"rows": [], "old": [{"dep_delay": 1}]}), 400, "row_filter"),
        ("late/try", json!({"rows": [null]}), 400, "change 0"),
        ("late/try", json!({"rows": [], "table": "nowhere"}), 404, "nowhere"),
        ("late/try", json!({"row": []}), 400, "row"),
        ("nobody/try", json!({"rows": []}), 404, "nobody"),
        ("late/sing", json!({}), 405, "POST"),
    ] {
        let (found, answer) = act(&db, path, body.clone()).await;
        assert_eq!(found, status, "{path} {body}: {answer}");
        assert!(answer["detail"].as_str().unwrap().contains(named), "{path} {body}: {answer}");
    }
    db.put_plugin("sour", filter("unreachable")).await;
    for _ in 0..3 {
        let (_, answer) = act(&db, "sour/try", json!({"rows": [{}, {}, {}]})).await;
        assert_eq!(answer["results"][2]["error"]["cause"], "trap", "a trial makes no plugin rest: {answer}");
    }
    assert!(db.rows("SELECT * FROM flights").await.as_array().unwrap().is_empty());
}

/// Modules are compiled by children of the server, and what came of it is on disk under a MAC.
#[tokio::test]
async fn compiled_code_is_kept_and_touched_code_is_never_loaded() {
    let mut server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, dep_delay INT)").await;
    db.sql("INSERT INTO t VALUES (1, 99), (2, 1)").await;
    db.put_plugin("late", plugin("late.wasm")).await;
    let folder = server.data_dir().join("compiled");
    let files = || -> Vec<PathBuf> { std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect() };
    let [file] = &files()[..] else { panic!("{:?}", files()) };
    let whole = std::fs::read(file).unwrap();
    let works = async |server: &mut TestServer| {
        server.kill9();
        server.restart().await;
        let mut live = db.live(LiveQuery::new("SELECT id FROM t").plugin("late")).await;
        live.until_uptodate().await;
        assert_eq!(live.fold.rows.len(), 1);
    };
    works(&mut server).await;
    assert_eq!(std::fs::read(file).unwrap(), whole);
    assert!(!server.output().contains("compiled plugin"), "{}", server.output());

    let mut touched = whole.clone();
    let middle = touched.len() / 2;
    touched[middle] ^= 1;
    std::fs::write(file, &touched).unwrap();
    works(&mut server).await;
    server.until_said("is not as this server wrote it").await;
    assert_ne!(std::fs::read(file).unwrap(), touched, "it was compiled again");

    // A server with another key believes none of it.
    let mut other = TestServer::start().await;
    other.admin().put_plugin("late", plugin("late.wasm")).await;
    let theirs = other.data_dir().join("compiled").join(file.file_name().unwrap());
    std::fs::copy(file, &theirs).unwrap();
    other.kill9();
    other.restart().await;
    let client = other.admin();
    client.sql("CREATE TABLE t (id INT PRIMARY KEY, dep_delay INT)").await;
    client.live(LiveQuery::new("SELECT id FROM t").plugin("late")).await.until_uptodate().await;
    other.until_said("is not as this server wrote it").await;

    // A module that is gone takes its code with it, at the next start.
    let deleted = async {
        // In use until the server has seen that the stream's client has gone.
        while db.request(Method::DELETE, "/v1/plugins/late").send().await.unwrap().error_for_status().is_err() {}
    };
    tokio::time::timeout(PATIENCE, deleted).await.expect("nobody uses it any more");
    server.kill9();
    server.restart().await;
    assert!(files().is_empty());
}

#[tokio::test]
async fn a_refused_upload_leaves_the_version_before_at_work() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    db.put_plugin("p", constant(true)).await;
    let mut live = db.live(LiveQuery::new("SELECT id FROM t").plugin("p")).await;
    live.until_uptodate().await;
    let whole = plugin("late.wasm");
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xff;
        bytes
    };
    let huge = vec![b' '; 100 << 20];
    for (what, module, status) in [
        ("truncated", whole[..whole.len() - 9].to_vec(), 422),
        ("flipped in its head", flipped(5), 422),
        ("flipped in a section's length", flipped(9), 422),
        ("empty", Vec::new(), 422),
        ("100 MiB", huge, 413),
    ] {
        // The server may answer and close before it has read all of it.
        match db.put_plugin_request("p", module).send().await {
            Ok(response) => assert_eq!(response.status(), status, "{what}"),
            Err(error) => assert!(status == 413, "{what}: {error}"),
        }
    }
    let shown: Value = db.get("/v1/plugins/p").send().await.unwrap().json().await.unwrap();
    assert_eq!((&shown["active"], shown["versions"].as_array().unwrap().len()), (&json!(1), 1));
    db.sql("INSERT INTO t VALUES (1)").await;
    assert_eq!(live.next_change().await.name, "insert");
}

/// What takes the compiler too long ends with its child, is refused, and nobody else waits for it.
#[tokio::test]
async fn a_module_that_takes_too_long_to_compile_is_ended() {
    let config = "[plugins]\ncompile_ms = 100\n".to_owned();
    let server = TestServer::with(tests::Options { config, ..Default::default() }).await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let mut live = db.live("SELECT id FROM t").await;
    live.until_uptodate().await;
    // Many functions of many blocks whose values all meet: much work within every limit of form.
    let body = "(local.set 0 (i32.mul (local.get 0) (i32.add (local.get 1) (i32.const 7)))) (if (local.get 0) (then (local.set 1 (local.get 0))))".repeat(300);
    let functions: String =
        (0..100).map(|_| format!("(func (param i32 i32) (result i32) {body} (local.get 1))")).collect();
    let bomb = Guest { fields: &(functions + &filtering("(i64.const 0)")), ..Guest::default() }.bytes();
    let problem = expect_problem(db.put_plugin_request("bomb", bomb), 422, "plugin_refused").await;
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("compile") || detail.contains("limit"), "{detail}");
    db.sql("INSERT INTO t VALUES (1)").await;
    assert_eq!(live.next_change().await.name, "insert");
    assert_eq!(db.get("/v1/plugins/bomb").send().await.unwrap().status(), 404);
}
