//! One SQL session for everybody: nobody sees another's rows through it, whatever is kept in it between queries.

use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tests::{Client, LiveQuery, Options, TestServer};

/// Rows of each user in the tests below; each says whose it is.
const ROWS: usize = 20;

/// Queries that keep much between their steps: what one user's run leaves behind must not show in the next one's.
const QUERIES: &[&str] = &[
    "SELECT id, text FROM notes ORDER BY id",
    "SELECT text FROM notes WHERE id = 7",
    "SELECT text FROM notes WHERE id > 3 AND id < 9 ORDER BY text DESC",
    "SELECT id, text FROM notes ORDER BY text LIMIT 1",
    "SELECT id, text FROM notes ORDER BY id DESC LIMIT 3 OFFSET 1",
    "SELECT count(*), min(text), max(text) FROM notes",
    "SELECT id % 3 AS g, count(*), min(text) FROM notes GROUP BY id % 3 ORDER BY g",
    "SELECT DISTINCT substr(text, 1, 5) AS whose FROM notes ORDER BY whose",
    "SELECT a.text, b.text FROM notes a JOIN notes b ON a.id = b.id + 1 ORDER BY a.id",
    "SELECT n.text, s.name FROM notes n JOIN shared s ON n.id = s.id ORDER BY n.id",
    "SELECT n.text, s.name FROM shared s LEFT JOIN notes n ON n.id = s.id ORDER BY s.id",
    "SELECT text FROM notes WHERE id IN (SELECT id FROM shared) ORDER BY id",
    "SELECT text FROM notes WHERE id = (SELECT max(id) FROM notes)",
    "SELECT name, (SELECT max(text) FROM notes) FROM shared ORDER BY id",
    "SELECT s.name FROM shared s WHERE EXISTS (SELECT 1 FROM notes n WHERE n.id = s.id AND n.text LIKE '%3') ORDER BY s.id",
    "SELECT id, row_number() OVER (ORDER BY text DESC) AS n, lag(text) OVER (ORDER BY id) FROM notes ORDER BY id",
    "WITH RECURSIVE r AS (SELECT min(id) AS id FROM notes UNION ALL SELECT r.id + 1 FROM r WHERE r.id < 5) \
     SELECT n.text FROM r JOIN notes n ON n.id = r.id ORDER BY n.id",
    "SELECT text FROM notes WHERE id < 3 UNION ALL SELECT text FROM notes WHERE id > 18 ORDER BY 1",
    "SELECT current_user, count(*) FROM notes WHERE text LIKE current_user || '%'",
    "SELECT text FROM notes WHERE text > current_user ORDER BY id LIMIT 2",
];

/// A user table with rows that say whose they are, and a shared one.
async fn tables(server: &TestServer, users: &[&str]) -> Vec<Client> {
    let admin = server.admin();
    admin.sql("CREATE TABLE notes (id INT PRIMARY KEY, text TEXT NOT NULL) WITH (type = 'user')").await;
    admin.sql("CREATE TABLE shared (id INT PRIMARY KEY, name TEXT)").await;
    admin.sql("INSERT INTO shared VALUES (1, 'one'), (3, 'three'), (40, 'forty')").await;
    let clients: Vec<Client> = users.iter().map(|user| server.client(user)).collect();
    for (user, client) in users.iter().zip(&clients) {
        let rows: Vec<String> = (1..=ROWS).map(|id| format!("({id}, '{user} {id}')")).collect();
        client.sql(&format!("INSERT INTO notes VALUES {}", rows.join(", "))).await;
    }
    clients
}

/// What each user gets from each query on a server where nobody asked before.
async fn alone(user: &str) -> Vec<Value> {
    let server = TestServer::start().await;
    let client = tables(&server, &[user]).await.remove(0);
    let mut answers = Vec::new();
    for sql in QUERIES {
        answers.push(client.rows(sql).await);
    }
    answers
}

/// Every query as A, then as B, then both at once over and over: contents are compared with those of a server that
/// holds only that user's rows. A cached physical plan fails here: joins and sub-queries show A's rows to B.
#[tokio::test]
async fn concurrent_user_isolation_with_shared_session() {
    let users = ["alice", "bob"];
    let due = [alone("alice").await, alone("bob").await];
    let server = TestServer::start().await;
    let clients = tables(&server, &users).await;
    for (at, sql) in QUERIES.iter().enumerate() {
        for (user, client) in clients.iter().enumerate() {
            assert_eq!(client.rows(sql).await, due[user][at], "{sql} as {}", users[user]);
        }
        let both = (0..8).map(|n| {
            let (client, due) = (&clients[n % 2], &due[n % 2][at]);
            async move { assert_eq!(client.rows(sql).await, *due, "{sql} as {} of many", ["alice", "bob"][n % 2]) }
        });
        join_all(both).await;
    }
    // The plans were found again, or this has tested nothing.
    let hits = server.admin().metric("tidegate_plan_cache_hits_total").await;
    // The lookup by key needs none, and what recurses through a table of its own is planned each time.
    assert!(hits >= (9 * (QUERIES.len() - 2)) as f64, "{hits} hits");
}

/// `now()`, `current_user`, `random()` and `uuid()` are of the execution, not of the plan.
#[tokio::test]
async fn functions_of_the_request_are_fresh_each_time() {
    let server = TestServer::start().await;
    let (alice, bob) = (server.client("alice"), server.client("bob"));
    let sql = "SELECT current_user, now(), random(), CAST(uuid() AS TEXT), current_date, $1 FROM (VALUES (1)) v";
    let mut seen: Vec<Value> = Vec::new();
    for (client, name) in [(&alice, "alice"), (&bob, "bob"), (&alice, "alice")] {
        let answer = client.sql_params(sql, json!([name])).await["results"][0]["rows"][0].take();
        assert_eq!((&answer[0], &answer[5]), (&json!(name), &json!(name)));
        for before in &seen {
            for at in [1, 2, 3] {
                assert_ne!(answer[at], before[at], "{answer} and {before}");
            }
        }
        seen.push(answer);
    }
    assert!(seen.windows(2).all(|pair| pair[0][1].as_str() < pair[1][1].as_str()), "time goes on: {seen:?}");
}

/// Each way in works on the one context: its number never moves.
#[tokio::test]
async fn every_entry_point_uses_the_one_context() {
    let server = TestServer::start().await;
    let client = tables(&server, &["alice"]).await.remove(0);
    let contexts = || async { server.admin().metric("tidegate_session_contexts_total").await };
    assert_eq!(contexts().await, 1.0);
    client.sql("SELECT count(*) FROM notes").await;
    client.sql_params("SELECT text FROM notes WHERE id = $1", json!([1])).await;
    let by_get = client.get("/v1/sql?sql=SELECT+count(*)+FROM+notes").send().await.unwrap();
    assert_eq!(by_get.status(), 200);
    let raw = client.request(Method::POST, "/v1/sql").header("content-type", "application/sql").body("SELECT 1");
    assert_eq!(raw.send().await.unwrap().status(), 200);
    client.sql("INSERT INTO notes VALUES (100, 'alice 100')").await;
    client.sql("UPDATE notes SET text = text || '!' WHERE id = 100").await;
    client.sql("DELETE FROM notes WHERE id = 100").await;
    let rows = client.request(Method::POST, "/v1/tables/main/notes/rows").header("content-type", "text/csv");
    assert_eq!(rows.body("id,text\n101,alice 101\n").send().await.unwrap().status(), 200);
    client.sql("EXPLAIN SELECT text FROM notes").await;
    client.sql("DESCRIBE notes").await;
    client.expect_error("SELECT nothing FROM notes", 400, "unknown_column").await;
    let mut live = client.live(LiveQuery::new("SELECT id, text FROM notes")).await;
    live.until_uptodate().await;
    assert_eq!(live.fold.rows.len(), ROWS + 1);
    assert_eq!(contexts().await, 1.0);
}

/// Rights are looked up for each request; what an administrator's plan left in the session helps nobody else.
#[tokio::test]
async fn rbac_with_shared_session() {
    let server = TestServer::start().await;
    let clients = tables(&server, &["alice", "bob"]).await;
    let admin = server.admin();
    for sql in ["INSERT INTO shared VALUES (50, 'fifty')", "UPDATE shared SET name = 'x' WHERE id = 50"] {
        for client in &clients {
            client.expect_error(sql, 403, "forbidden").await;
        }
        admin.sql(sql).await;
    }
    let delete = "DELETE FROM shared WHERE id = 50";
    clients[0].expect_error(delete, 403, "forbidden").await;
    assert_eq!(admin.sql(delete).await["results"][0]["affected"], 1);
    // A write as one user stays that user's, through one and the same kept plan.
    let update = "UPDATE notes SET text = text || ' changed' WHERE id IN (SELECT id FROM shared)";
    assert_eq!(clients[0].sql(update).await["results"][0]["affected"], 2);
    assert_eq!(admin.sql(update).await["results"][0]["affected"], 0, "administrators have rows of their own, none");
    let changed = "SELECT count(*) FROM notes WHERE text LIKE '%changed'";
    assert_eq!(clients[0].rows(changed).await, json!([[2]]));
    assert_eq!(clients[1].rows(changed).await, json!([[0]]));
    assert_eq!(clients[1].sql("DELETE FROM notes WHERE id > 10").await["results"][0]["affected"], 10);
    assert_eq!(clients[0].sql("DELETE FROM notes WHERE id > 10").await["results"][0]["affected"], 10);
}

/// A hundred users at once, the same text from all of them.
#[tokio::test]
async fn high_concurrency_session_sharing() {
    const USERS: usize = 100;
    let token = |user: usize| format!("the-token-of-user-{user}-in-these-tests-0123456789");
    let tokens =
        (0..USERS).map(|n| format!("[[tokens]]\ntoken = \"{}\"\nuser = \"user{n}\"\nrole = \"user\"\n", token(n)));
    // On a busy machine the last of them waits for many others.
    let config = tokens.chain(["[sql]\ndeadline_ms = 30000\n".to_owned()]).collect();
    let options = Options { config, ..Options::default() };
    let server = TestServer::with(options).await;
    server.admin().sql("CREATE TABLE notes (id INT PRIMARY KEY, text TEXT) WITH (type = 'user')").await;
    let users = (0..USERS).map(|user| {
        let client = server.stranger(Some(&token(user)));
        async move {
            let rows: Vec<String> = (0..=user).map(|id| format!("({id}, 'user{user}')")).collect();
            client.sql(&format!("INSERT INTO notes VALUES {}", rows.join(", "))).await;
            for _ in 0..3 {
                let found = client.rows("SELECT current_user, count(*), min(text), max(text) FROM notes").await;
                let name = format!("user{user}");
                assert_eq!(found, json!([[name, user + 1, name, name]]));
                let last = client.rows("SELECT id, text FROM notes ORDER BY id DESC LIMIT 1").await;
                assert_eq!(last, json!([[user, name]]));
                let joined = client.rows("SELECT count(*) FROM notes a JOIN notes b ON a.text = b.text").await;
                assert_eq!(joined, json!([[(user + 1) * (user + 1)]]));
            }
        }
    });
    join_all(users).await;
    assert_eq!(server.admin().metric("tidegate_session_contexts_total").await, 1.0);
}

/// A thousand queries, as many texts as users, and neither contexts nor kept plans grow with them.
#[tokio::test]
async fn no_session_proliferation() {
    // They come all at once and wait for each other.
    let config = "[sql]\ndeadline_ms = 30000\n".to_owned();
    let server = TestServer::with(Options { config, ..Options::default() }).await;
    let clients = tables(&server, &["alice", "bob", "al"]).await;
    let admin = server.admin();
    let planned = || async { admin.metric("tidegate_plan_cache_misses_total").await };
    for client in &clients {
        client.sql("SELECT count(*) FROM notes WHERE id > 5").await;
    }
    let before = planned().await;
    for round in 0..10 {
        let calls = (0..100).map(|n| {
            let client = &clients[(round + n) % clients.len()];
            async move { client.rows("SELECT count(*) FROM notes WHERE id > 5").await }
        });
        for answer in join_all(calls).await {
            assert_eq!(answer, json!([[ROWS - 5]]));
        }
    }
    assert_eq!(planned().await, before, "one plan serves all");
    assert_eq!(admin.metric("tidegate_session_contexts_total").await, 1.0);
    // Another catalog, another plan: the new column is there.
    admin.sql("CREATE TABLE later (id INT PRIMARY KEY)").await;
    assert_eq!(clients[0].rows("SELECT count(*) FROM notes WHERE id > 5").await, json!([[ROWS - 5]]));
    assert_eq!(planned().await, before + 1.0);
}
