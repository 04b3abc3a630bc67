//! `system.audit_log`: what was done and what was refused, by whom, in names alone.

use reqwest::{Method, header};
use serde_json::{Value, json};
use tests::live::seq;
use tests::{Client, LiveQuery, Options, TestServer};

use crate::failures::{TELL, errors, replay, sour};

/// A secret in all places where clients have secrets.
const CANARY: &str = "canary-0123456789-abcdef-0123456789";

/// Actor, what, object, outcome and count of the records of an action, oldest first.
async fn records(db: &Client, action: &str) -> Value {
    let columns = "actor, what, object, outcome, count";
    db.rows(&format!("SELECT {columns} FROM system.audit_log WHERE action = '{action}' ORDER BY number")).await
}

/// All of it as one text.
async fn everything(db: &Client) -> String {
    db.rows("SELECT * FROM system.audit_log").await.to_string()
}

async fn status(request: reqwest::RequestBuilder) -> u16 {
    request.send().await.expect("an answer").status().as_u16()
}

fn statement(client: &Client, sql: &str) -> reqwest::RequestBuilder {
    client.request(Method::POST, "/v1/sql").json(&json!({"sql": sql}))
}

#[tokio::test]
async fn what_ddl_did_is_in_its_commit_and_what_it_did_not_is_nowhere() {
    let mut server = TestServer::start().await;
    let db = server.admin();
    let first = db.sql("CREATE NAMESPACE shop; CREATE TABLE shop.u (a INT PRIMARY KEY)").await;
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    db.sql("ALTER TABLE t ADD COLUMN n INT").await;
    db.sql("INSERT INTO t VALUES (1, 1), (2, 1)").await;
    for (sql, status, code) in [
        ("CREATE TABLE t (id INT PRIMARY KEY)", 400, "duplicate_table"),
        ("CREATE TABLE v (id INT PRIMARY KEY); DROP TABLE nothing", 400, "unknown_table"),
        ("CREATE UNIQUE INDEX twice ON t (n)", 409, "duplicate_key"),
    ] {
        db.expect_error(sql, status, code).await;
    }
    db.sql("CREATE TABLE IF NOT EXISTS t (id INT PRIMARY KEY)").await;
    let index = db.sql("CREATE INDEX by_n ON t (n)").await;
    db.sql("DROP INDEX by_n").await;
    db.sql("DROP TABLE shop.u; DROP NAMESPACE shop").await;
    server.kill9();
    server.restart().await;
    let due = json!([
        ["admin", "CREATE NAMESPACE", "shop", "ok", 1],
        ["admin", "CREATE TABLE", "shop.u", "ok", 1],
        ["admin", "CREATE TABLE", "main.t", "ok", 1],
        ["admin", "ALTER TABLE", "main.t", "ok", 1],
        ["admin", "CREATE INDEX", "main.by_n", "ok", 1],
        ["admin", "DROP INDEX", "main.by_n", "ok", 1],
        ["admin", "DROP TABLE", "shop.u", "ok", 1],
        ["admin", "DROP NAMESPACE", "shop", "ok", 1],
    ]);
    assert_eq!(records(&db, "ddl").await, due);
    let sql = "SELECT seq FROM system.audit_log WHERE what = 'CREATE INDEX' OR object LIKE 'shop%' ORDER BY number";
    let seqs = db.rows(sql).await;
    assert_eq!(json!([seqs[0][0], seqs[1][0], seqs[2][0]]), json!([seq(&first), seq(&first), seq(&index)]));
    let sql =
        "SELECT DISTINCT role, address, at > now() - INTERVAL '1 hour' FROM system.audit_log WHERE action = 'ddl'";
    assert_eq!(db.rows(sql).await, json!([["admin", "127.0.0.1", true]]));
}

#[tokio::test]
async fn plugins_kills_and_tickets_are_told() {
    let server = TestServer::start().await;
    let (db, alice) = (server.admin(), server.client("alice"));
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY, v BIGINT)").await;
    for module in [sour(TELL, true), sour(TELL, true), sour("(nop)", true)] {
        db.put_plugin("sour", module).await;
    }
    assert_eq!(status(db.put_plugin_request("sour", b"no module".to_vec())).await, 422);
    let rollback = || db.request(Method::POST, "/v1/plugins/main/sour/rollback");
    assert_eq!(status(rollback().json(&json!({"version": 1}))).await, 200);
    assert_eq!(status(rollback().json(&json!({"version": 9}))).await, 404);

    let mut live = db.live(LiveQuery::new("SELECT id, v FROM t").plugin("sour").option("on_error", "skip")).await;
    let live_id = live.next_event().await.data["live_id"].as_str().unwrap().to_owned();
    live.until_uptodate().await;
    let bad = seq(&db.sql("INSERT INTO t VALUES (1, -5)").await);
    live.until_seq(bad).await;
    assert_eq!(status(db.request(Method::DELETE, "/v1/plugins/sour")).await, 409, "it is in use");
    let number = errors(&db, "sour").await[0]["number"].as_u64().unwrap();
    replay(&db, "sour", number).await;
    db.sql(&format!("KILL LIVE QUERY '{live_id}'")).await;
    db.expect_error("KILL LIVE QUERY 'another'", 404, "not_found").await;
    while live.next_or_end().await.is_some() {}
    // The stream's end has been told; that it is not in use any more follows.
    let gone = async { while status(db.request(Method::DELETE, "/v1/plugins/sour")).await != 200 {} };
    tokio::time::timeout(tests::PATIENCE, gone).await.expect("the plugin is free again");
    let due = json!([
        ["admin", "upload", "main.sour@1", "ok", 1],
        ["admin", "upload", "main.sour@2", "ok", 1],
        ["admin", "rollback", "main.sour@3", "ok", 1],
        ["admin", "replay", "main.sour", "ok", 1],
        ["admin", "delete", "main.sour", "ok", 1],
    ]);
    assert_eq!(records(&db, "plugin").await, due);
    assert_eq!(records(&db, "kill").await, json!([["admin", "KILL LIVE QUERY", live_id, "ok", 1]]));

    for _ in 0..3 {
        let ticket = alice.request(Method::POST, "/v1/auth/ticket").json(&json!({"sql": "SELECT id FROM t"}));
        assert_eq!(status(ticket).await, 200);
    }
    assert_eq!(records(&db, "ticket").await, json!([["alice", "issue", null, "ok", 3]]));
}

#[tokio::test]
async fn a_thousand_denials_are_one_record() {
    let server = TestServer::start().await;
    let (db, thief) = (server.admin(), server.stranger(Some(CANARY)));
    for _ in 0..20 {
        let tries = (0..50).map(|_| status(statement(&thief, "SELECT 1")));
        assert!(futures::future::join_all(tries).await.iter().all(|status| *status == 401));
    }
    assert_eq!(records(&db, "denial").await, json!([[null, "invalid token", "/v1/sql", "denied", 1000]]));
    // What is read is on disk, and is counted on there.
    assert_eq!(status(statement(&thief, "SELECT 1")).await, 401);
    assert_eq!(records(&db, "denial").await, json!([[null, "invalid token", "/v1/sql", "denied", 1001]]));
    let sql = "SELECT role, address FROM system.audit_log WHERE action = 'denial'";
    assert_eq!(db.rows(sql).await, json!([[null, "127.0.0.1"]]));
    assert_eq!(db.metric("tidegate_audit_dropped_total").await, 0.0);
}

#[tokio::test]
async fn every_refusal_says_to_whom_and_of_what() {
    let server = TestServer::start().await;
    let (db, alice, robot) = (server.admin(), server.client("alice"), server.client("robot"));
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let nobody = server.stranger(None);
    assert_eq!(status(nobody.get("/v1/plugins/main/late/errors")).await, 401);
    assert_eq!(status(nobody.get("/v1/live?ticket=guess")).await, 401);
    for sql in [
        "SELECT number FROM system.audit_log",
        "SELECT max(number) FROM system.audit_log",
        "DROP TABLE t",
        "INSERT INTO t VALUES (1)",
        "DELETE FROM t",
    ] {
        alice.expect_error(sql, 403, "forbidden").await;
    }
    let rows = alice.request(Method::POST, "/v1/tables/main/t/rows").header(header::CONTENT_TYPE, "text/csv");
    assert_eq!(status(rows.body("id\n1\n")).await, 403);
    assert_eq!(status(alice.put_plugin_request("late", Vec::new())).await, 403);
    robot.expect_error("SELECT count(*) FROM system.audit_log", 403, "forbidden").await;
    robot.expect_error("CREATE INDEX i ON main.t (id); DROP TABLE t", 403, "forbidden").await;
    // Refused when the result had begun.
    let late =
        json!({"sql": "SELECT CAST($1 AS TEXT); SELECT count(*) FROM system.users", "params": ["x".repeat(70_000)]});
    let begun = robot.request(Method::POST, "/v1/sql").json(&late).send().await.unwrap();
    assert_eq!(begun.status(), 200);
    assert!(begun.text().await.is_err(), "it was cut off");
    let due = json!([
        [null, "no token", "/v1/plugins", "denied", 1],
        [null, "invalid ticket", "/v1/live", "denied", 1],
        ["alice", "read", "system.audit_log", "denied", 2],
        ["alice", "DROP TABLE", "t", "denied", 1],
        ["alice", "write", "main.t", "denied", 3],
        ["alice", "upload", "main.late", "denied", 1],
        ["robot", "read", "system.audit_log", "denied", 1],
        ["robot", "CREATE INDEX", "main.t", "denied", 1],
        ["robot", "read", "system.users", "denied", 1],
    ]);
    assert_eq!(records(&db, "denial").await, due);
    let sql = "SELECT DISTINCT actor, role FROM system.audit_log WHERE actor <> 'admin' ORDER BY actor";
    assert_eq!(db.rows(sql).await, json!([["alice", "user"], ["robot", "service"]]));
}

/// Whoever is refused under ever other names fills neither the disk nor a line.
#[tokio::test]
async fn hostile_names_are_bounded() {
    let server = TestServer::start().await;
    let (db, alice) = (server.admin(), server.client("alice"));
    alice.expect_error(&format!("DROP TABLE \"x\n\u{1b}{}\"", "y".repeat(5_000)), 403, "forbidden").await;
    let shown = records(&db, "denial").await[0][2].as_str().unwrap().to_owned();
    assert!(shown.starts_with("x\\n\\u{1b}yyy") && shown.ends_with("y…") && shown.len() < 300, "{shown}");

    for round in 0..12 {
        let tries = (0..50).map(|name| {
            let request = statement(&alice, &format!("DROP TABLE t{round}_{name}"));
            async move { assert_eq!(status(request).await, 403) }
        });
        futures::future::join_all(tries).await;
    }
    let sql = "SELECT count(*), sum(count) FROM system.audit_log WHERE action = 'denial'";
    assert_eq!(db.rows(sql).await, json!([[21, 601]]));
    let sql = "SELECT actor, object, count FROM system.audit_log WHERE what = 'others'";
    assert_eq!(db.rows(sql).await, json!([["alice", null, 581]]));
}

#[tokio::test]
async fn no_secret_is_in_it() {
    let mut server = TestServer::start().await;
    let (db, alice, thief) = (server.admin(), server.client("alice"), server.stranger(Some(CANARY)));
    db.sql(&format!("CREATE TABLE t (id INT PRIMARY KEY, s TEXT DEFAULT '{CANARY}')")).await;
    db.sql_params("INSERT INTO t VALUES (1, $1)", json!([CANARY])).await;
    for request in [
        thief.get("/v1/sql?sql=SELECT+1"),
        thief.get(&format!("/v1/plugins/{CANARY}")),
        server.stranger(None).get(&format!("/v1/sql?sql=SELECT+1&token={CANARY}")),
        server.stranger(None).get(&format!("/v1/live?ticket={CANARY}")),
        statement(&thief, &format!("SELECT '{CANARY}'")),
        statement(&alice, &format!("UPDATE t SET s = '{CANARY}' WHERE s = '{CANARY}'")),
        statement(&alice, &format!("SELECT '{CANARY}' FROM system.users WHERE name = '{CANARY}'")),
        statement(&alice, &format!("CREATE TABLE u (id INT PRIMARY KEY, s TEXT DEFAULT '{CANARY}')")),
    ] {
        assert!(matches!(status(request).await, 401 | 403));
    }
    let sql = format!("SELECT id FROM t WHERE s = '{CANARY}'");
    let ticket = alice.request(Method::POST, "/v1/auth/ticket").json(&json!({"sql": sql}));
    let ticket: Value = ticket.send().await.unwrap().json().await.unwrap();
    assert!(server.sigterm().await.success());
    server.restart().await;
    let all = everything(&db).await;
    assert!(all.contains("main.t") && all.contains("invalid token") && all.contains("ticket"), "{all}");
    for secret in [CANARY, "-in-these-tests-0123456789", "administrators-token", ticket["ticket"].as_str().unwrap()] {
        assert!(!all.contains(secret), "{secret} in {all}");
    }
}

#[tokio::test]
async fn the_log_is_kept_by_number() {
    let config = "[audit]\nkeep_records = 5\n".to_owned();
    let mut server = TestServer::with(Options { config, ..Options::default() }).await;
    let db = server.admin();
    for table in 0..12 {
        db.sql(&format!("CREATE TABLE t{table} (id INT PRIMARY KEY)")).await;
    }
    let sql = "SELECT object FROM system.audit_log ORDER BY number";
    let due = json!([["main.t7"], ["main.t8"], ["main.t9"], ["main.t10"], ["main.t11"]]);
    assert_eq!(db.rows(sql).await, due);
    server.kill9();
    server.restart().await;
    let due = json!([["main.t8"], ["main.t9"], ["main.t10"], ["main.t11"], [env!("CARGO_PKG_VERSION")]]);
    assert_eq!(db.rows(sql).await, due, "and that it has started");
}

#[tokio::test]
async fn starts_ends_and_other_settings_are_told() {
    let config = "[sql]\ndeadline_ms = 4000\n".to_owned();
    let mut server = TestServer::with(Options { config, ..Options::default() }).await;
    let db = server.admin();
    let version = env!("CARGO_PKG_VERSION");
    let (start, stop) = (json!([null, "start", version, "ok", 1]), json!([null, "stop", version, "ok", 1]));
    assert!(server.sigterm().await.success());
    server.restart().await;
    server.kill9();
    assert_eq!(server_settings(&server).matches("4000").count(), 1);
    let other = server_settings(&server).replace("4000", "4001").replace("the-token-of-bob", "another-token-of-bob");
    std::fs::write(settings_path(&server), other).unwrap();
    server.restart().await;
    assert_eq!(records(&db, "server").await, json!([start, stop, start, start]));
    let changed = json!([[null, "changed", "tokens, sql.deadline_ms", "ok", 1]]);
    assert_eq!(records(&db, "configuration").await, changed);
    server.kill9();
    server.restart().await;
    assert_eq!(records(&db, "configuration").await, changed, "nothing has changed since");
}

fn settings_path(server: &TestServer) -> std::path::PathBuf {
    server.data_dir().parent().unwrap().join("tidegate.toml")
}

fn server_settings(server: &TestServer) -> String {
    std::fs::read_to_string(settings_path(server)).unwrap()
}
