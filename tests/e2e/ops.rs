//! Seen from outside: health, metrics, settings, start and stop.

use std::process::Command;

use reqwest::Method;
use serde_json::{Value, json};
use tests::server::{command, run_to_end};
use tests::{Options, TestServer};

/// A server that is to refuse its settings: with this file, these flags and this environment.
async fn refused(file: &str, args: &[&str], env: &[(&str, &str)]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("tidegate.toml");
    std::fs::write(&config, file).unwrap();
    let mut command: Command = command(&config, &dir.path().join("data"));
    command.args(args).envs(env.iter().copied());
    let (status, output) = run_to_end(command).await;
    assert!(!status.success(), "it should have been refused:\n{output}");
    assert!(!output.contains("panicked"), "{output}");
    output
}

#[tokio::test]
async fn health_and_metrics() {
    let server = TestServer::start().await;
    let db = server.admin();
    assert_eq!(db.get("/healthz").send().await.unwrap().status(), 200);
    assert_eq!(db.get("/readyz").send().await.unwrap().status(), 200);
    let commits = db.metric("tidegate_commits_total").await;
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let mut live = db.live("SELECT id FROM t").await;
    live.until_uptodate().await;
    db.sql("INSERT INTO t VALUES (1)").await;
    // A commit is counted behind its answer, and in front of its events.
    live.next_change().await;
    assert_eq!(db.metric("tidegate_commits_total").await, commits + 2.0);
    assert_eq!(db.metric("tidegate_events_total").await, 1.0);
    assert_eq!(db.metric("tidegate_subscriptions").await, 1.0);
    for query in 0..20 {
        db.sql(&format!("SELECT {query} FROM t")).await;
    }
    assert_eq!(db.metric("tidegate_session_contexts_total").await, 1.0, "one context for the server's life");
    for name in [
        "tidegate_plugin_calls_total",
        "tidegate_plugin_seconds_total",
        "tidegate_plugin_failures_total",
        "tidegate_ring_bytes",
        "tidegate_guest_bytes_copied_total",
    ] {
        assert_eq!(db.metric(name).await, 0.0, "{name}");
    }
}

#[tokio::test]
async fn a_second_server_on_the_directory_is_refused() {
    let server = TestServer::start().await;
    let (status, output) = run_to_end(server.command()).await;
    assert!(!status.success());
    let directory = server.data_dir().display().to_string();
    assert!(output.contains(&directory), "the directory is named:\n{output}");
    server.admin().sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
}

#[tokio::test]
async fn term_ends_it_cleanly() {
    let mut server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let mut live = db.live("SELECT id FROM t").await;
    live.until_uptodate().await;
    // A stream has no end of its own: it must not keep the server.
    assert!(server.sigterm().await.success());
    let mut last = None;
    while let Some(event) = live.next_or_end().await {
        last = Some(event);
    }
    assert!(last.is_none_or(|event| event.name == "closed" || event.name == "uptodate"));
    server.restart().await;
    live.reconnect().await;
    db.sql("INSERT INTO t VALUES (1)").await;
    while live.fold.rows.is_empty() {
        live.next_event().await;
    }
    assert_eq!(live.fold.resyncs, 0);
}

#[tokio::test]
async fn settings_that_cannot_be_are_refused_by_name() {
    for (file, named) in [
        ("[server]\ncolour = \"red\"\n", "colour"),
        ("[storage.rocksdb]\nblock_cache = 1\n", "block_cache"),
        ("data_dirr = \"x\"\n", "data_dirr"),
        ("[live]\nheartbeat_ms = \"soon\"\n", "heartbeat_ms"),
        ("[[tokens]]\ntoken = \"short\"\nuser = \"a\"\nrole = \"user\"\n", "token"),
        ("[[tokens]]\ntoken = \"long-enough-to-be-a-token-of-somebody-1\"\nuser = \"a\"\nrole = \"king\"\n", "role"),
        ("this is no TOML", ""),
    ] {
        let output = refused(file, &[], &[]).await;
        assert!(output.contains(named), "{named} is not named:\n{output}");
    }
    let output = refused("", &[], &[("TIDEGATE_SERVER__COLOUR", "red")]).await;
    assert!(output.to_lowercase().contains("colour"), "{output}");
    let output = refused("", &[], &[("TIDEGATE_ADMIN_TOKEN", "short")]).await;
    assert!(output.contains("32"), "the needed length is said:\n{output}");
    let output = refused("", &["--colour"], &[]).await;
    assert!(output.contains("--colour"), "{output}");
    let output = refused("[server]\nbind = \"0.0.0.0:0\"\n", &["--bind", "0.0.0.0:0"], &[]).await;
    assert!(output.contains("--insecure-http"), "{output}");
}

#[tokio::test]
async fn a_busy_port_is_named() {
    let server = TestServer::start().await;
    let address = server.admin().url("").trim_start_matches("http://").to_owned();
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("tidegate.toml");
    std::fs::write(&config, format!("[server]\nbind = \"{address}\"\n")).unwrap();
    let command = command(&config, &dir.path().join("data"));
    let (status, output) = run_to_end(command).await;
    assert!(!status.success());
    let port = address.rsplit(':').next().unwrap();
    assert!(output.contains(port), "the port is named:\n{output}");
}

#[tokio::test]
async fn flags_win_over_environment_over_file() {
    // Every server of these tests has --bind and the environment of its options over this file.
    let file = "[server]\nbind = \"127.0.0.1:1\"\n[log]\nformat = \"text\"\n";
    let env = vec![
        ("TIDEGATE_LOG__FORMAT".to_owned(), "json".to_owned()),
        ("TIDEGATE_LOG__FILTER".to_owned(), "debug".to_owned()),
    ];
    let server = TestServer::with(Options { config: file.to_owned(), env, ..Options::default() }).await;
    server.admin().sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let output = server.output();
    let lines: Vec<&str> = output.lines().filter_map(|line| line.strip_prefix("! ")).collect();
    assert!(!lines.is_empty(), "there are log lines on stderr:\n{output}");
    for line in lines {
        assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "the environment's format wins: {line}");
    }
    assert!(!output.contains("the-administrators-token"), "no secret in the log");
}

#[tokio::test]
async fn bodies_are_bounded() {
    let server = TestServer::start().await;
    let db = server.admin();
    let sql = format!("SELECT '{}'", "x".repeat(2 << 20));
    let request = db.request(reqwest::Method::POST, "/v1/sql").header("content-type", "application/sql").body(sql);
    assert_eq!(request.send().await.unwrap().status(), 413);
    let request = db.put_plugin_request("big", vec![0; 20 << 20]);
    // The server may answer and close before it has read all of it.
    if let Ok(response) = request.send().await {
        assert_eq!(response.status(), 413);
    }
    assert_eq!(db.get("/healthz").send().await.unwrap().status(), 200);
}

/// Far more writers than may be under way: those turned away are told when to come back, and whoever was told that it is
/// written is right.
#[tokio::test]
async fn writes_beyond_capacity_are_turned_away_and_none_is_lost() {
    let server =
        TestServer::with(Options { config: "[storage]\nwrite_queue = 2\n".to_owned(), ..Options::default() }).await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let mut live = db.live("SELECT id FROM t").await;
    live.until_uptodate().await;
    let (mut acknowledged, mut turned_away) = (Vec::new(), 0);
    let mut next = 0;
    while turned_away == 0 || acknowledged.len() < 50 {
        assert!(next < 20_000, "{turned_away} of {next} writes were turned away");
        let writes = (next..next + 40).map(|id| {
            let db = db.clone();
            async move {
                let body = json!({"sql": format!("INSERT INTO t VALUES ({id})")});
                let answer = db.request(Method::POST, "/v1/sql").json(&body).send().await.expect("an answer");
                (id, answer)
            }
        });
        next += 40;
        for (id, answer) in futures::future::join_all(writes).await {
            if answer.status() == 200 {
                acknowledged.push(id);
                continue;
            }
            assert_eq!(answer.status(), 503);
            assert_eq!(answer.headers()["retry-after"], "1");
            assert_eq!(answer.json::<Value>().await.unwrap()["code"], "busy");
            turned_away += 1;
        }
    }
    let answer = db.sql("SELECT id FROM t ORDER BY id").await;
    acknowledged.sort();
    let due: Vec<Value> = acknowledged.iter().map(|id| json!([id])).collect();
    assert_eq!(answer["results"][0]["rows"], json!(due), "exactly what was acknowledged");
    live.until_seq(tests::live::seq(&answer)).await;
    assert_eq!(live.fold.rows.len(), acknowledged.len());
}
