//! What plugins say through `log`: kept for a while, asked for, followed.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

use reqwest::Method;
use serde_json::{Value, json};
use tests::client::expect_problem;
use tests::guest::{Guest, KEEP_ALL, filtering};
use tests::live::seq;
use tests::{Client, LiveQuery, PATIENCE, TestServer, server};

use crate::command_line::{said, tidegate};

/// Keeps every row and says so, once a call.
fn chatty(words: &str) -> Vec<u8> {
    let log = "(call $log (i32.const 1) (i32.const 0) (i32.const 14))";
    let fields = format!("(data (i32.const 0) \"{words}\") {}", filtering(&format!("{log} {KEEP_ALL}")));
    Guest { fields: &fields, ..Guest::default() }.bytes()
}

async fn logs(db: &Client, query: &str) -> Value {
    let response = db.get(&format!("/v1/plugins/main/chatty/logs{query}")).send().await.unwrap();
    let status = response.status();
    let answer: Value = response.json().await.unwrap();
    assert_eq!(status, 200, "{answer}");
    answer
}

fn lines(answer: &Value) -> Vec<Value> {
    answer["lines"].as_array().unwrap_or_else(|| panic!("no lines in {answer}")).clone()
}

/// `tidegate plugin logs chatty --follow --json`, and the lines it prints.
struct Follower {
    child: Child,
    lines: Receiver<String>,
}

impl Follower {
    fn start(server: &TestServer) -> Follower {
        let mut command = Command::new(server::binary());
        command.args(["plugin", "logs", "chatty", "-f", "--json"]);
        command.env("TIDEGATE_URL", server.admin().url("")).env("TIDEGATE_TOKEN", server::ADMIN_TOKEN);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("tidegate starts");
        let (stdout, (send, lines)) = (child.stdout.take().expect("stdout is piped"), channel());
        // Ends with the process.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Follower { child, lines }
    }

    #[track_caller]
    fn next(&self) -> Value {
        let line = self.lines.recv_timeout(PATIENCE);
        let line = line.unwrap_or_else(|error| panic!("no further line came within {PATIENCE:?}: {error}"));
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error} in {line}"))
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // An error says that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn what_a_plugin_says_is_kept_and_followed() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    db.put_plugin("chatty", chatty("looked at rows")).await;
    let silent = logs(&db, "").await;
    assert_eq!((lines(&silent), &silent["missed"]), (vec![], &json!(false)), "a trial is not told");
    let mut live = db.live(LiveQuery::new("SELECT id FROM t").plugin("chatty")).await;
    live.until_uptodate().await;
    let mut ids = 0..;
    let mut say = async || {
        let sql = format!("INSERT INTO t VALUES ({})", ids.next().unwrap());
        live.until_seq(seq(&db.sql(&sql).await)).await;
    };
    say().await;
    let first = logs(&db, "").await;
    let line = &lines(&first)[0];
    assert_eq!((&line["level"], &line["message"]), (&json!("warn"), &json!("looked at rows")));
    assert_eq!((&line["version"], &line["user"]), (&json!(1), &Value::Null));
    let after = format!("?after={}", first["next"].as_str().unwrap());
    assert!(lines(&logs(&db, &after).await).is_empty());

    // Page by page the same as at once.
    for _ in 0..5 {
        say().await;
    }
    let all = lines(&logs(&db, "").await);
    let (mut found, mut query) = (lines(&first), format!("{after}&limit=2"));
    loop {
        let page = logs(&db, &query).await;
        found.extend(lines(&page));
        assert_eq!(page["missed"], false);
        query = format!("?limit=2&after={}", page["next"].as_str().unwrap());
        if page["more"] == false {
            break;
        }
        assert_eq!(lines(&page).len(), 2);
    }
    assert!(all.len() >= 6 && found == all, "{found:?}\n{all:?}");
    assert_eq!(lines(&logs(&db, "?limit=2").await)[..], all[all.len() - 2..], "the newest");

    // Followed: what is there already, then what comes, each line once.
    let mut follower = Follower::start(&server);
    let mut told = 0;
    for _ in 0..3 {
        let all = lines(&logs(&db, "").await);
        for line in &all[told..] {
            assert_eq!(&follower.next(), line);
        }
        told = all.len();
        say().await;
    }
    let all = lines(&logs(&db, "").await);
    all[told..].iter().for_each(|line| assert_eq!(&follower.next(), line));

    // Nothing to follow any more.
    drop(live);
    let gone = async {
        while !db.request(Method::DELETE, "/v1/plugins/chatty").send().await.unwrap().status().is_success() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("nobody uses it any more");
    assert_eq!(follower.lines.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected), "it ends");
    assert!(!follower.child.wait().unwrap().success());
    db.put_plugin("chatty", chatty("looked at rows")).await;
    assert!(lines(&logs(&db, "").await).is_empty(), "one that is made again begins with nothing");
}

/// What a guest says must not look like lines of the server, nor steer a terminal that shows them.
#[tokio::test]
async fn a_guest_cannot_forge_lines_or_steer_a_terminal() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    db.put_plugin("chatty", chatty("ok\\0a\\1b[31mforged")).await;
    let mut live = db.live(LiveQuery::new("SELECT id FROM t").plugin("chatty")).await;
    live.until_seq(seq(&db.sql("INSERT INTO t VALUES (1)").await)).await;
    assert_eq!(lines(&logs(&db, "").await)[0]["message"], "ok\n\u{1b}[31mforged", "as it was said");

    let told = r"ok\n\u{1b}[31mforged";
    let logged = async {
        while !server.output().lines().any(|line| line.contains(told)) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, logged).await.expect("the server's log has it");
    assert!(!server.output().contains('\u{1b}'), "{:?}", server.output());
    let folder = tempfile::tempdir().unwrap();
    let printed = said(tidegate(&server, folder.path(), &["plugin", "logs", "chatty"]));
    assert!(!printed.is_empty() && printed.lines().all(|line| line.ends_with(told)), "{printed:?}");
}

#[tokio::test]
async fn lines_over_a_users_rows_are_for_that_user_and_a_restart_is_told() {
    let mut server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY) WITH (type = 'user')").await;
    db.put_plugin("chatty", chatty("looked at rows")).await;
    let alice = server.client("alice");
    let mut live = alice.live(LiveQuery::new("SELECT id FROM t").plugin("chatty")).await;
    live.until_uptodate().await;
    live.until_seq(seq(&alice.sql("INSERT INTO t VALUES (1)").await)).await;
    let hers = logs(&alice, "").await;
    assert_eq!(lines(&hers)[0]["user"], "alice");
    for other in [&db, &server.client("bob")] {
        assert!(lines(&logs(other, "").await).is_empty());
    }
    let request = |query: &str| db.get(&format!("/v1/plugins/main/chatty/logs?{query}"));
    expect_problem(request("after=yesterday"), 400, "bad_request").await;
    expect_problem(request("limit=all"), 400, "bad_request").await;
    expect_problem(request("since=1"), 400, "unknown_parameter").await;
    expect_problem(db.get("/v1/plugins/main/nobody/logs"), 404, "not_found").await;
    expect_problem(db.get("/v1/plugins/main/chatty/songs"), 404, "not_found").await;

    drop(live);
    server.kill9();
    server.restart().await;
    let after = logs(&alice, &format!("?after={}", hers["next"].as_str().unwrap())).await;
    assert_eq!((lines(&after), &after["missed"]), (vec![], &json!(true)), "nothing outlives the server");
}
