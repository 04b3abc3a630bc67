//! Who may do what: tokens, roles, tickets.

use reqwest::{Method, header};
use serde_json::{Value, json};
use tests::client::expect_problem;
use tests::live::seq;
use tests::{LiveQuery, TestServer, plugin};

#[tokio::test]
async fn without_a_token_nothing_is_answered() {
    let server = TestServer::start().await;
    server.admin().sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let mut bodies = Vec::new();
    for token in [None, Some("the-token-of-nobody-in-these-tests-0123456789"), Some("x")] {
        let stranger = server.stranger(token);
        for (method, path) in [
            (Method::POST, "/v1/sql"),
            (Method::GET, "/v1/sql?sql=SELECT+1"),
            (Method::GET, "/v1/live?sql=SELECT+id+FROM+t"),
            (Method::GET, "/v1/plugins"),
            (Method::PUT, "/v1/plugins/late"),
            (Method::DELETE, "/v1/plugins/late"),
            (Method::POST, "/v1/auth/ticket"),
        ] {
            let request = stranger.request(method, path).json(&json!({"sql": "SELECT id FROM t"}));
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), 401, "{path}");
            assert!(response.headers().contains_key(header::WWW_AUTHENTICATE), "{path}");
            let problem: Value = response.json().await.unwrap();
            bodies.push(problem["detail"].clone());
        }
        // Whether it lives is nobody's secret.
        assert_eq!(stranger.get("/healthz").send().await.unwrap().status(), 200);
    }
    bodies.dedup();
    assert_eq!(bodies.len(), 1, "the answer does not say what was wrong: {bodies:?}");
    // A token belongs into a header: URLs are logged.
    let response = server.stranger(None).get("/v1/sql?sql=SELECT+1&token=x&access_token=x").send().await.unwrap();
    assert!(matches!(response.status().as_u16(), 400 | 401));
}

#[tokio::test]
async fn roles_bound_what_a_user_does() {
    let server = TestServer::start().await;
    let (admin, alice, robot) = (server.admin(), server.client("alice"), server.client("robot"));
    admin.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    for client in [&alice, &robot] {
        client.expect_error("CREATE TABLE mine (id INT PRIMARY KEY)", 403, "forbidden").await;
        client.expect_error("DROP TABLE t", 403, "forbidden").await;
        expect_problem(client.put_plugin_request("late", plugin("late.wasm")), 403, "forbidden").await;
        expect_problem(client.request(Method::DELETE, "/v1/plugins/late"), 403, "forbidden").await;
    }
    admin.sql("INSERT INTO t VALUES (1)").await;
}

#[tokio::test]
async fn a_ticket_opens_one_stream_and_its_reconnects() {
    let server = TestServer::start().await;
    server.admin().sql("CREATE TABLE notes (id INT PRIMARY KEY, text TEXT) WITH (type = 'user')").await;
    let alice = server.client("alice");
    alice.sql("INSERT INTO notes VALUES (1, 'mine')").await;
    let sql = "SELECT id, text FROM notes";
    let response = alice.request(Method::POST, "/v1/auth/ticket").json(&json!({"sql": sql})).send().await.unwrap();
    assert!(response.status().is_success(), "{}", response.status());
    let answer: Value = response.json().await.unwrap();
    assert!(answer["expires_in_ms"].is_number());
    let ticket = answer["ticket"].as_str().unwrap().to_owned();
    assert!(ticket.len() >= 32);

    // No header, as from an EventSource; as the user who asked for it.
    let browser = server.stranger(None);
    let mut live = browser.live(LiveQuery::new(sql).option("ticket", &ticket)).await;
    live.until_uptodate().await;
    assert_eq!(live.fold.rows.len(), 1);
    live.disconnect();
    let second = seq(&alice.sql("INSERT INTO notes VALUES (2, 'mine too')").await);
    live.reconnect().await;
    live.until_seq(second).await;
    assert_eq!(live.fold.rows.len(), 2);

    // For that stream only, and for nothing else.
    for query in [
        LiveQuery::new("SELECT id FROM notes").option("ticket", &ticket),
        LiveQuery::new(sql).option("ticket", "another"),
        LiveQuery::new(sql).option("ticket", &ticket[1..]),
    ] {
        let response = query.request(&browser, None).send().await.unwrap();
        assert!(matches!(response.status().as_u16(), 401 | 403), "{query:?}: {}", response.status());
    }
    let response = browser.get(&format!("/v1/sql?sql=SELECT+1&ticket={ticket}")).send().await.unwrap();
    assert!(matches!(response.status().as_u16(), 400 | 401), "{}", response.status());
}

/// An EventSource that comes back after a restart has nothing but its ticket.
#[tokio::test]
async fn a_ticket_outlasts_a_restart() {
    let mut server = TestServer::start().await;
    let admin = server.admin();
    admin.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let alice = server.client("alice");
    let request = alice.request(Method::POST, "/v1/auth/ticket").json(&json!({"sql": "SELECT id FROM t"}));
    let answer: Value = request.send().await.unwrap().json().await.unwrap();
    let ticket = answer["ticket"].as_str().unwrap();
    let mut live = server.stranger(None).live(LiveQuery::default().option("ticket", ticket)).await;
    live.until_uptodate().await;
    for kill in [true, false] {
        admin.sql(&format!("INSERT INTO t VALUES ({})", i32::from(kill))).await;
        live.next_change().await;
        if kill {
            server.kill9();
        } else {
            assert!(server.sigterm().await.success());
        }
        server.restart().await;
        live.reconnect().await;
        let events = live.until_uptodate().await;
        assert_eq!(events.len(), 1, "the start, and nothing twice: {events:?}");
        assert_ne!(events[0].data["from"], "snapshot");
    }
    assert_eq!((live.fold.rows.len(), live.fold.resyncs), (2, 0));
    let stolen = LiveQuery::default().option("ticket", &"0".repeat(64));
    assert_eq!(stolen.request(&server.stranger(None), None).send().await.unwrap().status(), 401);
}

#[tokio::test]
async fn foreign_origins_get_nothing() {
    let server = TestServer::start().await;
    let request = server.admin().get("/v1/sql?sql=SELECT+1").header(header::ORIGIN, "https://elsewhere.example");
    let response = request.send().await.unwrap();
    assert!(!response.headers().contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN));
}
