//! What happens to rows that a plugin fails on: `on_error`, the list of errors, running them again, the breaker.

use reqwest::Method;
use serde_json::{Value, json};
use tests::client::expect_problem;
use tests::guest::{Guest, KEEP_ALL, filtering};
use tests::live::seq;
use tests::{Client, LiveQuery, Options, TestServer, plugin};

use crate::command_line::{said, tidegate};

async fn table(server: &TestServer) -> Client {
    let db = server.admin();
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY, v BIGINT)").await;
    db
}

/// A row filter in WebAssembly text that keeps every row but fails by `fault` on those whose `v` is below 0.
pub fn sour(fault: &str, pass: bool) -> Vec<u8> {
    sour_with(fault, &format!(",\"pass\":{pass}"), "")
}

fn sour_with(fault: &str, plugin: &str, lines: &str) -> Vec<u8> {
    let filter = filtering(&format!(
        r#"(local $i i32)
    (loop $row
      (if (i64.lt_s (i64.load offset=8 (i32.add (global.get $window)
            (i32.load offset=4 (i32.add (i32.add (global.get $window) (local.get $d)) (i32.shl (local.get $i) (i32.const 4))))))
          (i64.const 0))
        (then {fault}))
      (br_if $row (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (local.get $n))))
    {KEEP_ALL}"#
    ));
    Guest {
        plugin,
        lines: &format!("{{\"column\":{{\"name\":\"v\",\"type\":\"int\"}}}}\n{lines}"),
        fields: &format!("(data (i32.const 0) \"below zero\") {filter}"),
        ..Guest::default()
    }
    .bytes()
}

pub const TELL: &str = "(call $fail (local.get $i) (i32.const 0) (i32.const 10))";

pub async fn errors(db: &Client, plugin: &str) -> Vec<Value> {
    let response = db.get(&format!("/v1/plugins/main/{plugin}/errors")).send().await.unwrap();
    assert_eq!(response.status(), 200, "{plugin}");
    response.json::<Value>().await.unwrap()["errors"].as_array().unwrap().clone()
}

#[tokio::test]
async fn skipped_rows_are_out_of_the_result_and_noted() {
    let mut server = TestServer::start().await;
    let db = table(&server).await;
    db.put_plugin("sour", sour(TELL, true)).await;
    db.sql("INSERT INTO t VALUES (1, 5), (2, -5)").await;
    let mut live = db.live(LiveQuery::new("SELECT id, v FROM t").plugin("sour").option("on_error", "skip")).await;
    live.until_uptodate().await;
    assert_eq!(live.fold.rows.keys().collect::<Vec<_>>(), [r#"{"id":1}"#]);

    let bad = seq(&db.sql("UPDATE t SET v = -7 WHERE id = 1").await);
    let event = live.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["reason"]), ("delete", &json!("moved_out")));
    let back = seq(&db.sql("UPDATE t SET v = 8").await);
    live.until_seq(back).await;
    assert_eq!(live.fold.rows.len(), 2, "the fold holds what the pipeline gives");

    let noted = errors(&db, "sour").await;
    let shown =
        |entry: &Value| json!([entry["row"], entry["cause"], entry["message"], entry["action"], entry["version"]]);
    assert_eq!(noted[0]["seq"], json!(back), "the row before the last update had failed, too");
    let updated = noted.iter().find(|entry| entry["seq"] == json!(bad)).unwrap();
    assert_eq!(shown(updated), json!([{"id": 1, "v": -7}, "failed", "below zero", "skipped", 1]));
    let present = noted.last().unwrap();
    assert_eq!((&present["row"], &present["table"]), (&json!({"id": 2, "v": -5}), &json!("t")));
    let faults =
        |cause: &str| format!(r#"tidegate_plugin_faults_total{{namespace="main",plugin="sour",cause="{cause}"}}"#);
    assert!(db.metric(&faults("failed")).await >= 3.0);
    assert_eq!(db.metric(&faults("trap")).await, 0.0);

    server.kill9();
    server.restart().await;
    assert_eq!(errors(&db, "sour").await, noted, "the list is on disk");
    let other = db.get("/v1/plugins/main/other/errors").send().await.unwrap();
    assert_eq!(other.status(), 404, "there is no such plugin");
}

#[tokio::test]
async fn a_filter_may_let_through_what_it_fails_on_unless_it_forbids_that() {
    let server = TestServer::start().await;
    let db = table(&server).await;
    db.put_plugin("sour", sour("unreachable", true)).await;
    db.put_plugin("strict", sour("unreachable", false)).await;
    db.sql("INSERT INTO t VALUES (1, 5), (2, -5)").await;
    let query = |plugin: &str, mode: &str| LiveQuery::new("SELECT id FROM t").plugin(plugin).option("on_error", mode);
    let mut live = db.live(query("sour", "pass")).await;
    live.until_uptodate().await;
    assert_eq!(live.fold.rows.len(), 2);
    assert_eq!(errors(&db, "sour").await[0]["action"], "passed");
    let problem = db.expect_no_live(query("strict", "pass"), 400, "plugin_params").await;
    assert!(problem["detail"].as_str().unwrap().contains("forbids"), "{problem}");
    db.live(query("strict", "skip")).await.until_uptodate().await;
    db.expect_no_live(query("sour", "hope"), 400, "bad_request").await;
    let without = LiveQuery::new("SELECT id FROM t").option("on_error", "skip");
    db.expect_no_live(without, 400, "bad_request").await;
}

pub async fn replay(db: &Client, plugin: &str, number: u64) -> Value {
    let request = db.request(Method::POST, &format!("/v1/plugins/main/{plugin}/replay"));
    let response = request.json(&json!({"number": number})).send().await.unwrap();
    let status = response.status();
    let answer: Value = response.json().await.unwrap();
    assert_eq!(status, 200, "{answer}");
    answer
}

#[tokio::test]
async fn noted_failures_are_a_table_and_are_run_again() {
    let mut server = TestServer::start().await;
    let db = table(&server).await;
    db.put_plugin("sour", sour(TELL, true)).await;
    let mut live = db.live(LiveQuery::new("SELECT id, v FROM t").plugin("sour").option("on_error", "skip")).await;
    live.until_uptodate().await;
    let bad = seq(&db.sql("INSERT INTO t VALUES (1, -5), (2, 5)").await);
    live.until_seq(bad).await;
    let sql = "SELECT namespace, plugin, version, table_name, user_name, seq, cause, message, action, old_row, new_row, \
               live_id <> '', noted_at IS NOT NULL FROM system.plugin_errors";
    let row = json!({"id": 1, "v": -5});
    let expected =
        json!([["main", "sour", 1, "t", null, bad, "failed", "below zero", "skipped", null, row, true, true]]);
    assert_eq!(db.rows(sql).await, expected);
    assert_eq!(server.client("bob").rows(sql).await, expected, "whoever may read the table");

    let number = db.rows("SELECT number FROM system.plugin_errors").await[0][0].as_u64().unwrap();
    assert_eq!(json!(number), errors(&db, "sour").await[0]["number"]);
    let answer = replay(&db, "sour", number).await;
    assert_eq!(answer["result"], json!({"error": {"cause": "failed", "message": "below zero"}}));
    drop(live);
    // A mended version, and the note from before a restart.
    db.put_plugin("sour", sour("(nop)", true)).await;
    server.kill9();
    server.restart().await;
    let answer = replay(&db, "sour", number).await;
    assert_eq!((&answer["version"], &answer["result"]), (&json!(2), &json!({"keep": true})), "{answer}");
    assert_eq!((&answer["noted"]["version"], &answer["noted"]["row"]), (&json!(1), &row), "{answer}");
    let folder = tempfile::tempdir().unwrap();
    let told = said(tidegate(&server, folder.path(), &["plugin", "replay", "sour", &number.to_string()]));
    assert!(told.contains("failed: below zero") && told.contains(r#"version 2 now: {"keep":true}"#), "{told}");
    assert_eq!(errors(&db, "sour").await.len(), 1, "nothing was noted, nothing taken away");

    let request = |path: &str| db.request(Method::POST, &format!("/v1/plugins/{path}/replay"));
    expect_problem(request("sour").json(&json!({"number": 99})), 404, "not_found").await;
    expect_problem(request("main/other").json(&json!({"number": number})), 404, "not_found").await;
    expect_problem(request("nowhere/sour").json(&json!({"number": number})), 404, "not_found").await;
    expect_problem(request("main/sour").json(&json!({})), 400, "bad_json").await;
}

/// What is run again went through other plugins, with parameters; both are as they were.
#[tokio::test]
async fn a_failure_behind_other_plugins_is_run_again_behind_them() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY, v BIGINT, dep_delay INT)").await;
    db.put_plugin("late", plugin("late.wasm")).await;
    db.put_plugin("sour", sour(TELL, true)).await;
    let query = LiveQuery::new("SELECT id FROM t").plugin(r#"late:{"minutes":10}"#).plugin("sour");
    let mut live = db.live(query.option("on_error", "skip")).await;
    live.until_uptodate().await;
    // Late by 10 minutes, not by the default of 15.
    let bad = seq(&db.sql("INSERT INTO t VALUES (1, -5, 12)").await);
    live.until_seq(bad).await;
    let number = errors(&db, "sour").await[0]["number"].as_u64().unwrap();
    db.put_plugin("sour", sour("(nop)", true)).await;
    assert_eq!(replay(&db, "sour", number).await["result"], json!({"keep": true}));
}

#[tokio::test]
async fn a_failure_on_a_users_row_is_for_that_user() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY, v BIGINT) WITH (type = 'user')").await;
    db.put_plugin("sour", sour(TELL, true)).await;
    let (alice, bob) = (server.client("alice"), server.client("bob"));
    let mut live = alice.live(LiveQuery::new("SELECT id FROM t").plugin("sour").option("on_error", "skip")).await;
    live.until_uptodate().await;
    let bad = seq(&alice.sql("INSERT INTO t VALUES (1, -5)").await);
    live.until_seq(bad).await;
    let sql = "SELECT user_name, cause, message, new_row FROM system.plugin_errors";
    assert_eq!(alice.rows(sql).await, json!([["alice", "failed", "below zero", {"id": 1, "v": -5}]]));
    assert_eq!(db.rows(sql).await, json!([["alice", "failed", "", null]]), "that there was one, and no more");
    assert_eq!(bob.rows(sql).await, json!([]));
    let number = errors(&alice, "sour").await[0]["number"].as_u64().unwrap();
    assert!(replay(&alice, "sour", number).await["result"]["error"].is_object());
    let request =
        |client: &Client| client.request(Method::POST, "/v1/plugins/main/sour/replay").json(&json!({"number": number}));
    expect_problem(request(&db), 403, "forbidden").await;
    expect_problem(request(&bob), 404, "not_found").await;
}

/// A plugin that traps on everything: its stream waits and goes on where it was, its neighbours do not notice.
#[tokio::test]
async fn a_plugin_that_keeps_failing_rests_and_loses_nothing() {
    let server = TestServer::start().await;
    let db = table(&server).await;
    db.put_plugin("sour", sour("unreachable", true)).await;
    let query = || LiveQuery::new("SELECT id FROM t").plugin("sour").option("on_error", "skip");
    let mut live = db.live(query()).await;
    let mut plain = db.live("SELECT id FROM t").await;
    live.until_uptodate().await;
    plain.until_uptodate().await;
    for id in 1..=6 {
        db.sql_params("INSERT INTO t VALUES ($1, -$1)", json!([id])).await;
    }
    let last = seq(&db.sql("INSERT INTO t VALUES (7, 7), (8, -8)").await);
    plain.until_seq(last).await;
    assert_eq!(plain.fold.rows.len(), 8);
    let error = live.next_change().await;
    assert_eq!(error.name, "plugin-error", "every row so far was to be skipped");
    assert_eq!((&error.data["cause"], &error.data["plugin"]), (&json!("breaker"), &json!("sour")));
    assert!(error.data["retry_after_ms"].as_u64().is_some_and(|rest| rest > 0), "{error:?}");
    // It is tried again by itself, and goes on from that very commit.
    loop {
        let event = live.next_change().await;
        match event.name.as_str() {
            "insert" => break assert_eq!(event.data["key"]["id"], 7),
            "plugin-error" => {}
            other => panic!("{other}"),
        }
    }
    assert_eq!((live.fold.rows.len(), live.fold.resyncs), (1, 0));
}

/// Under each of its parameters a plugin that never ends had its own failures to make before it rested, and whoever shared
/// its worker waited for all of them.
#[tokio::test]
async fn endless_loops_leave_the_worker_to_others() {
    const SETS: usize = 40;
    const ROWS: usize = 20;
    const NUMBER: &str = "{\"param\":{\"name\":\"n\",\"type\":\"int\"}}\n";
    let config = "[plugins]\nworkers = 1\n".to_owned();
    let server = TestServer::with(Options { config, ..Options::default() }).await;
    let db = table(&server).await;
    db.put_plugin("endless", sour_with("(loop $l (br $l))", "", NUMBER)).await;
    let mut streams = Vec::new();
    for n in 0..SETS {
        let query = LiveQuery::new("SELECT id FROM t").plugin(&format!("endless:{{\"n\":{n}}}"));
        let mut live = db.live(query.option("on_error", "skip")).await;
        live.until_uptodate().await;
        streams.push(live);
    }
    let mut plain = db.live("SELECT id FROM t").await;
    plain.until_uptodate().await;
    let rows: Vec<String> = (0..ROWS).map(|id| format!("({id}, -1)")).collect();
    db.sql(&format!("INSERT INTO t VALUES {}", rows.join(", "))).await;
    let last = seq(&db.sql("INSERT INTO t VALUES (100, 1)").await);
    plain.until_seq(last).await;
    let failures = db.metric("tidegate_plugin_failures_total").await;
    assert!(failures < (SETS * ROWS / 4) as f64, "{failures} calls were lost before the others had their turn");
    // They wait, and nothing of theirs is lost.
    db.put_plugin("endless", sour_with("(call $fail (i32.const -1) (i32.const 0) (i32.const 10))", "", NUMBER)).await;
    db.sql("DELETE FROM t WHERE v < 0").await;
    let last = seq(&db.sql("INSERT INTO t VALUES (101, 1)").await);
    for live in &mut streams {
        live.until_seq(last).await;
        assert_eq!(live.fold.rows.keys().collect::<Vec<_>>(), [r#"{"id":100}"#, r#"{"id":101}"#]);
    }
}

/// That a row is known to fail does not say that it is noted: a stream may have stopped at it, or skipped it in another
/// table. Those were left out without a word.
#[tokio::test]
async fn every_row_that_is_skipped_is_noted_once_for_its_table_and_user() {
    let server = TestServer::start().await;
    let db = table(&server).await;
    db.sql("CREATE TABLE u (id BIGINT PRIMARY KEY, v BIGINT)").await;
    db.sql("CREATE TABLE own (id BIGINT PRIMARY KEY, v BIGINT) WITH (type = 'user')").await;
    db.put_plugin("sour", sour(TELL, true)).await;
    let row = "VALUES (1, -5)";
    db.sql(&format!("INSERT INTO t {row}; INSERT INTO u {row}")).await;
    let (alice, bob) = (server.client("alice"), server.client("bob"));
    alice.sql(&format!("INSERT INTO own {row}")).await;
    bob.sql(&format!("INSERT INTO own {row}")).await;
    let mut stopped = db.live(LiveQuery::new("SELECT id FROM t").plugin("sour")).await;
    assert_eq!(stopped.next_change().await.name, "start");
    assert_eq!(stopped.next_change().await.name, "plugin-error");
    let sql = "SELECT table_name, user_name, action FROM system.plugin_errors ORDER BY number";
    assert_eq!(db.rows(sql).await, json!([]), "`stop` notes nothing");
    let of = |who: &Client, table: &str, mode: &str| {
        let query = LiveQuery::new(format!("SELECT id FROM {table}")).plugin("sour").option("on_error", mode);
        let who = who.clone();
        async move { who.live(query).await.until_uptodate().await }
    };
    // Twice: the same present rows are nothing new.
    for _ in 0..2 {
        for (who, table, mode) in
            [(&db, "t", "skip"), (&db, "u", "skip"), (&alice, "own", "skip"), (&bob, "own", "skip"), (&db, "t", "pass")]
        {
            of(who, table, mode).await;
        }
    }
    let noted = json!([
        ["t", null, "skipped"],
        ["u", null, "skipped"],
        ["own", "alice", "skipped"],
        ["own", "bob", "skipped"],
        ["t", null, "passed"],
    ]);
    assert_eq!(db.rows(sql).await, noted);
}

/// A user could put to rest, over rows of their own, what others ran over theirs.
#[tokio::test]
async fn a_plugin_rests_over_the_rows_of_whom_it_failed_on() {
    let server = TestServer::start().await;
    let db = table(&server).await;
    db.sql("CREATE TABLE own (id BIGINT PRIMARY KEY, v BIGINT) WITH (type = 'user')").await;
    db.put_plugin("sour", sour("unreachable", true)).await;
    let alice = server.client("alice");
    let mut healthy = db.live(LiveQuery::new("SELECT id FROM t").plugin("sour")).await;
    healthy.until_uptodate().await;
    let mut resting = alice.live(LiveQuery::new("SELECT id FROM own").plugin("sour").option("on_error", "skip")).await;
    resting.until_uptodate().await;
    for id in 1..=6 {
        alice.sql_params("INSERT INTO own VALUES ($1, -$1)", json!([id])).await;
    }
    alice.sql("INSERT INTO own VALUES (7, 7)").await;
    let error = resting.next_change().await;
    assert_eq!((error.name.as_str(), &error.data["cause"]), ("plugin-error", &json!("breaker")), "{error:?}");
    let last = seq(&db.sql("INSERT INTO t VALUES (1, 1)").await);
    let events = healthy.until_seq(last).await;
    assert_eq!(events.iter().map(|event| event.name.as_str()).collect::<Vec<_>>(), ["insert"], "{events:?}");
}
