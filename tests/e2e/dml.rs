//! Writes and what keeps them right: RETURNING, ON CONFLICT, unique keys, one winner, all or nothing, indexes.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::join_all;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tests::live::seq;
use tests::{Client, Failure, Options, TestServer};
use tokio::sync::watch;

async fn with_table(server: &TestServer, columns: &str) -> Client {
    let admin = server.admin();
    admin.sql(&format!("CREATE TABLE t ({columns})")).await;
    admin
}

async fn explain(db: &Client, sql: &str) -> String {
    let rows = db.rows(&format!("EXPLAIN {sql}")).await;
    rows.as_array().into_iter().flatten().filter_map(|row| row[1].as_str()).collect::<Vec<_>>().join("\n")
}

fn refused(outcome: Result<Value, Failure>, code: &str) -> String {
    let failure = outcome.expect_err(code);
    assert_eq!((failure.status, &failure.body["code"]), (Some(409), &json!(code)), "{failure:?}");
    failure.body["detail"].as_str().unwrap_or_default().to_owned()
}

/// Plans are kept by text, and what RETURNING and DO UPDATE compile to holds one request's parameters and user: such a
/// statement, kept once, would answer everybody with the first one's.
#[tokio::test]
async fn the_same_text_again_is_the_new_request() {
    let server = TestServer::start().await;
    let admin = server.admin();
    admin.sql("CREATE TABLE t (id BIGINT PRIMARY KEY, who TEXT, n BIGINT) WITH (type = 'user')").await;
    let text = "INSERT INTO t VALUES (1, current_user, $1) ON CONFLICT (id) DO UPDATE SET who = current_user, n = t.n + $1 \
                RETURNING who, n, $1 AS given";
    for round in 1..=3_i64 {
        for (user, step) in [("alice", 10), ("bob", 100)] {
            let answer = server.client(user).sql_params(text, json!([step])).await;
            assert_eq!(answer["results"][0]["rows"], json!([[user, round * step, step]]), "round {round}");
        }
    }
    for user in ["alice", "bob", "alice"] {
        let answer = server.client(user).sql("DELETE FROM t WHERE id = 2 - 1 RETURNING who, current_user AS me").await;
        let rows = answer["results"][0]["rows"].as_array().unwrap().clone();
        assert!(rows.iter().all(|row| row == &json!([user, user])), "{user}: {rows:?}");
    }
}

/// By the whole key a row is found without a scan: what earlier statements of the transaction did to it has to be seen
/// all the same, and what belongs to the request is of the request.
#[tokio::test]
async fn changes_by_key_see_the_transaction_and_the_user() {
    let server = TestServer::start().await;
    let admin = server.admin();
    admin.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT NOT NULL, who TEXT) WITH (type = 'user')").await;
    let (alice, bob) = (server.client("alice"), server.client("bob"));
    let answer = alice
        .sql(
            "INSERT INTO t VALUES (1, 1, NULL), (2, 2, NULL); UPDATE t SET n = 10 WHERE id = 1; UPDATE t SET n = n + 5 WHERE id = 1; \
             DELETE FROM t WHERE id = 2; UPDATE t SET n = 0 WHERE id = 2; DELETE FROM t WHERE id = 2; \
             INSERT INTO t VALUES (2, 20, NULL); UPDATE t SET id = 3 WHERE id = 2; UPDATE t SET n = n * 2 WHERE id = 3",
        )
        .await;
    let affected: Vec<i64> =
        answer["results"].as_array().unwrap().iter().map(|result| result["affected"].as_i64().unwrap()).collect();
    assert_eq!(affected, [2, 1, 1, 1, 0, 0, 1, 1, 1]);
    assert_eq!(alice.rows("SELECT id, n FROM t ORDER BY id").await, json!([[1, 15], [3, 40]]));
    // One of them refused, none done.
    for (sql, code) in [
        ("UPDATE t SET n = 0 WHERE id = 1; UPDATE t SET n = NULL WHERE id = 3", "not_null"),
        ("DELETE FROM t WHERE id = 1; UPDATE t SET n = 3000000000 WHERE id = 3", "out_of_range"),
        ("DELETE FROM t WHERE id = 1; UPDATE t SET n = n / 0 WHERE id = 3", "division_by_zero"),
        ("DELETE FROM t WHERE id = 1; UPDATE t SET n = $1 WHERE id = 3", "parameters"),
        ("DELETE FROM t WHERE id = 1; UPDATE t SET m = 1 WHERE id = 3", "unknown_column"),
    ] {
        alice.expect_error(sql, 400, code).await;
    }
    refused(alice.try_sql("UPDATE t SET id = 3 WHERE id = 1", json!([])).await, "duplicate_key");
    assert_eq!(alice.rows("SELECT id, n FROM t ORDER BY id").await, json!([[1, 15], [3, 40]]));

    // Nobody reaches another's row, whoever sent the text first.
    for text in ["UPDATE t SET n = $1 WHERE id = 1", "UPDATE t SET n = n + $1, who = current_user WHERE id = 1"] {
        for (client, step, due) in [(&alice, 7, 1), (&bob, 1000, 0), (&alice, 8, 1)] {
            assert_eq!(client.sql_params(text, json!([step])).await["results"][0]["affected"], due, "{text}");
        }
    }
    assert_eq!(alice.rows("SELECT n, who FROM t WHERE id = 1").await, json!([[23, "alice"]]));
    assert_eq!(bob.sql("DELETE FROM t WHERE id = 1").await["results"][0]["affected"], 0);
    assert_eq!(alice.sql("DELETE FROM t WHERE id = 1").await["results"][0]["affected"], 1);
}

/// Whether rows match says something about them to whoever may not write, and an honest mistake would go unseen.
#[tokio::test]
async fn who_may_not_write_is_told_also_when_no_row_matches() {
    let server = TestServer::start().await;
    let (admin, alice) = (server.admin(), server.client("alice"));
    admin.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT)").await;
    admin.sql("CREATE TABLE s (id INT PRIMARY KEY, n INT) WITH (type = 'stream', ttl = '1h')").await;
    admin.sql("CREATE TABLE mine (id INT PRIMARY KEY, n INT) WITH (type = 'user')").await;
    for table in ["t", "s", "main.t"] {
        for sql in [
            format!("DELETE FROM {table}"),
            format!("DELETE FROM {table} WHERE id = 1"),
            format!("DELETE FROM {table} WHERE 1 = 0"),
            format!("UPDATE {table} SET n = 1 WHERE id = 1"),
            format!("UPDATE {table} SET n = 1 WHERE id > 1 RETURNING id"),
            format!("UPDATE {table} SET nope = 1"),
            format!("INSERT INTO {table} SELECT * FROM {table}"),
            format!("INSERT INTO {table} VALUES (1, 1) ON CONFLICT DO NOTHING"),
            format!("INSERT INTO mine VALUES (1, 1); DELETE FROM {table} WHERE id = 1"),
        ] {
            alice.expect_error(&sql, 403, "forbidden").await;
        }
    }
    for sql in ["DELETE FROM mine WHERE id = 1", "DELETE FROM mine", "UPDATE mine SET n = 1"] {
        assert_eq!(alice.sql(sql).await["results"][0]["affected"], 0, "{sql}");
    }
    // A service may, and a table that is not there is not there for anybody.
    assert_eq!(server.client("robot").sql("DELETE FROM t WHERE id = 1").await["results"][0]["affected"], 0);
    alice.expect_error("DELETE FROM nowhere", 400, "unknown_table").await;
}

#[tokio::test]
async fn returning_answers_the_rows_that_were_written() {
    let server = TestServer::start().await;
    let db = with_table(&server, "id BIGINT PRIMARY KEY, name TEXT, n INT DEFAULT 7, at TIMESTAMP DEFAULT now()").await;
    let answer =
        db.sql("INSERT INTO t (id, name) VALUES (1, 'a'), (2, 'b') RETURNING id, upper(name) AS big, n * 2").await;
    let result = &answer["results"][0];
    assert_eq!(result["affected"], 2);
    assert_eq!(result["columns"][1], json!({"name": "big", "type": "TEXT"}));
    assert_eq!(result["rows"], json!([[1, "A", 14], [2, "B", 14]]));
    assert!(result.get("row_count").is_none(), "{result}");

    // Of several statements each has its own, and the later ones see what the earlier ones wrote.
    let answer = db
        .sql("UPDATE t SET n = n + 1 WHERE id = 1 RETURNING n; UPDATE t SET n = n + 1; DELETE FROM t WHERE id = 1 RETURNING *")
        .await;
    let results = &answer["results"];
    assert_eq!((&results[0]["rows"], &results[1]["rows"]), (&json!([[8]]), &Value::Null));
    assert_eq!(results[1], json!({"affected": 2}));
    assert_eq!(results[2]["rows"][0].as_array().unwrap()[..3], [json!(1), json!("a"), json!(9)]);
    let none = db.sql("DELETE FROM t WHERE id = 99 RETURNING id").await;
    assert_eq!(none["results"][0]["rows"], json!([]));
    assert_eq!(none["results"][0]["affected"], 0);

    let lines = db
        .request(reqwest::Method::POST, "/v1/sql")
        .header("content-type", "application/sql")
        .header("accept", "application/x-ndjson")
        .body("INSERT INTO t (id, name) VALUES (5, 'e'), (6, NULL) RETURNING id, name");
    let text = lines.send().await.unwrap().text().await.unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines, [json!({"id": 5, "name": "e"}), json!({"id": 6, "name": null})]);
    // A shared table stays closed to those who may only read it.
    let outcome = server.client("alice").try_sql("UPDATE t SET n = 1 RETURNING id", json!([])).await;
    assert_eq!(outcome.expect_err("alice may not").status, Some(403));
}

#[tokio::test]
async fn an_upsert_counts_and_nothing_is_done_twice() {
    let server = TestServer::start().await;
    let db = with_table(&server, "word TEXT PRIMARY KEY, n INT NOT NULL DEFAULT 1").await;
    let count = "INSERT INTO t (word) VALUES ($1) ON CONFLICT (word) DO UPDATE SET n = t.n + excluded.n RETURNING n";
    for due in 1..4 {
        assert_eq!(db.sql_params(count, json!(["a"])).await["results"][0]["rows"], json!([[due]]));
    }
    let counted = join_all((0..20).map(|_| db.sql_params(count, json!(["b"])))).await;
    let seen: BTreeSet<i64> = counted.iter().filter_map(|answer| answer["results"][0]["rows"][0][0].as_i64()).collect();
    assert_eq!(seen, (1..=20).collect(), "each of them saw another number");

    let nothing = db.sql("INSERT INTO t VALUES ('a', 100), ('c', 5) ON CONFLICT DO NOTHING RETURNING word").await;
    assert_eq!(
        nothing["results"][0],
        json!({"affected": 1, "columns": [{"name": "word", "type": "TEXT"}], "rows": [["c"]]})
    );
    assert_eq!(db.rows("SELECT * FROM t ORDER BY word").await, json!([["a", 3], ["b", 20], ["c", 5]]));
    db.expect_error("INSERT INTO t VALUES ('a', 1) ON CONFLICT (n) DO NOTHING", 400, "conflict_target").await;
}

#[tokio::test]
async fn defaults_fill_what_an_insert_leaves_out() {
    let server = TestServer::start().await;
    let admin = server.admin();
    admin
        .sql(
            "CREATE TABLE t (id INT PRIMARY KEY, a INT DEFAULT -4, b DECIMAL(20, 4) DEFAULT 1234567890123456.7891, \
              c TEXT DEFAULT 'it''s', d BOOLEAN DEFAULT true, e TIMESTAMP DEFAULT now(), f UUID DEFAULT uuid(), \
              g TEXT DEFAULT current_user, h DATE DEFAULT '2013-01-31', i DOUBLE DEFAULT 2.5, j TEXT NOT NULL) \
              WITH (type = 'user')",
        )
        .await;
    let alice = server.client("alice");
    let shown = "a, b, c, d, e IS NOT NULL, f IS NOT NULL, g, h, i, j";
    let due = json!([-4, "1234567890123456.7891", "it's", true, true, true, "alice", "2013-01-31", 2.5, "x"]);
    for (id, insert) in [
        "INSERT INTO t (id, j) VALUES (0, 'x')",
        "INSERT INTO t (j, id, a) VALUES ('x', 1, DEFAULT)",
        "INSERT INTO t VALUES (2, DEFAULT, DEFAULT, DEFAULT, DEFAULT, DEFAULT, DEFAULT, DEFAULT, DEFAULT, DEFAULT, 'x')",
        "INSERT INTO t (id, j) SELECT id + 3, j FROM t WHERE id = 0",
        "INSERT INTO t (id, j) VALUES (4, 'y') ON CONFLICT (id) DO UPDATE SET j = 'z'; UPDATE t SET j = 'x' WHERE id = 4",
    ]
    .into_iter()
    .enumerate()
    {
        alice.sql(insert).await;
        assert_eq!(alice.rows(&format!("SELECT {shown} FROM t WHERE id = {id}")).await, json!([due]), "{insert}");
    }
    assert_eq!(alice.rows("SELECT count(DISTINCT f) FROM t").await, json!([[5]]), "each row has its own");
    alice.sql("UPDATE t SET a = 1, b = 2, c = '', g = 'bob', i = DEFAULT, d = DEFAULT").await;
    alice.sql("UPDATE t SET a = DEFAULT, b = DEFAULT, c = DEFAULT, g = DEFAULT").await;
    assert_eq!(alice.rows(&format!("SELECT DISTINCT {shown} FROM t")).await, json!([due]));
    for (sql, code) in [
        ("INSERT INTO t (id) VALUES (9)", "not_null"),
        ("INSERT INTO t (id, j) VALUES (9, NULL)", "not_null"),
        ("INSERT INTO t (id, j) VALUES (9, DEFAULT)", "not_null"),
        ("INSERT INTO t (id, j) SELECT 9, NULL", "not_null"),
        ("INSERT INTO t (j) VALUES ('x')", "not_null"),
        ("UPDATE t SET j = DEFAULT WHERE id = 1", "not_null"),
        ("INSERT INTO t (id, j) VALUES (0, 'y') ON CONFLICT (id) DO UPDATE SET j = NULL", "not_null"),
        ("INSERT INTO t (id, j) SELECT 9", "column_count"),
        ("INSERT INTO t (id, j) SELECT 9, 'x', 3 WHERE false", "column_count"),
    ] {
        alice.expect_error(sql, 400, code).await;
    }
    assert_eq!(alice.rows("SELECT count(*) FROM t").await, json!([[5]]));
    // An INSERT that reads what it writes sees the table as it was.
    alice.sql("INSERT INTO t (id, j) SELECT id + 10, j FROM t").await;
    assert_eq!(alice.rows("SELECT count(*), max(id) FROM t").await, json!([[10, 14]]));
}

#[tokio::test]
async fn unique_values_are_unique() {
    let server = TestServer::start().await;
    let db = with_table(&server, "id INT PRIMARY KEY, email TEXT UNIQUE, a INT, b INT, UNIQUE (a, b)").await;
    db.sql("INSERT INTO t VALUES (1, 'x', 1, 1), (2, 'y', 1, 2), (3, NULL, 1, NULL), (4, NULL, 1, NULL)").await;
    for taken in [
        "INSERT INTO t VALUES (5, 'x', 5, 5)",
        "INSERT INTO t VALUES (5, 'z', 5, 5), (6, 'z', 6, 6)",
        "INSERT INTO t VALUES (5, 'z', 1, 2)",
        "UPDATE t SET email = 'y' WHERE id = 1",
        "UPDATE t SET email = 'same'",
        "INSERT INTO t VALUES (5, 'z', 5, 5); INSERT INTO t VALUES (6, 'z', 6, 6)",
        "UPDATE t SET email = 'free' WHERE id = 1; INSERT INTO t VALUES (5, 'free', 5, 5)",
        "UPDATE t SET id = 9, email = 'y' WHERE id = 1",
        "INSERT INTO t VALUES (9, 'x', 9, 9) ON CONFLICT (id) DO NOTHING",
        "INSERT INTO t VALUES (1, 'new', 9, 9) ON CONFLICT (id) DO UPDATE SET email = 'y'",
    ] {
        let detail = refused(db.try_sql(taken, json!([])).await, "duplicate_key");
        assert!(detail.contains("is unique"), "{detail}");
        assert_eq!(db.rows("SELECT count(*), count(email) FROM t").await, json!([[4, 2]]), "{taken}");
    }
    for free in [
        // By the end of the statement, or of those before it, nothing is there twice.
        "UPDATE t SET email = CASE email WHEN 'x' THEN 'y' ELSE 'x' END WHERE id <= 2",
        "UPDATE t SET b = b + 1 WHERE a = 1",
        "DELETE FROM t WHERE email = 'x'; INSERT INTO t VALUES (2, 'x', 1, 3)",
        "UPDATE t SET email = 'moved' WHERE email = 'y'; INSERT INTO t VALUES (7, 'y', 7, 7); DELETE FROM t WHERE id = 7",
        "UPDATE t SET id = id + 100",
        "UPDATE t SET id = id - 100, email = email || ''",
    ] {
        db.sql(free).await;
    }
    assert_eq!(
        db.rows("SELECT * FROM t ORDER BY id").await,
        json!([[1, "moved", 1, 2], [2, "x", 1, 3], [3, null, 1, null], [4, null, 1, null]])
    );
    let upsert = "INSERT INTO t VALUES (50, 'x', 8, 8) ON CONFLICT (email) DO UPDATE SET a = excluded.a, b = t.b + 1 RETURNING id, a, b";
    assert_eq!(db.sql(upsert).await["results"][0]["rows"], json!([[2, 8, 4]]));
    let nothing = "INSERT INTO t VALUES (50, 'x', 9, 9), (51, 'q', 9, 9), (52, 'r', 9, 9), (51, 's', 10, 10) ON CONFLICT DO NOTHING RETURNING id";
    assert_eq!(db.sql(nothing).await["results"][0]["rows"], json!([[51]]));
    db.expect_error("INSERT INTO t VALUES (50, 'x', 9, 9) ON CONFLICT (a) DO NOTHING", 400, "conflict_target").await;
}

#[tokio::test]
async fn a_unique_value_of_another_user_is_nobodys_business() {
    let server = TestServer::start().await;
    let admin = server.admin();
    admin.sql("CREATE TABLE notes (id INT PRIMARY KEY, slug TEXT) WITH (type = 'user')").await;
    let (alice, al) = (server.client("alice"), server.client("al"));
    alice.sql("INSERT INTO notes VALUES (1, 'secret'), (2, 'secret')").await;
    al.sql("INSERT INTO notes VALUES (1, 'secret')").await;
    let detail = refused(admin.try_sql("CREATE UNIQUE INDEX slugs ON notes (slug)", json!([])).await, "duplicate_key");
    assert!(!detail.contains("secret") && !detail.contains("alice"), "{detail}");
    alice.sql("DELETE FROM notes WHERE id = 2").await;
    // The same value with two users is no duplicate.
    admin.sql("CREATE UNIQUE INDEX slugs ON notes (slug)").await;
    refused(alice.try_sql("INSERT INTO notes VALUES (3, 'secret')", json!([])).await, "duplicate_key");
    // Whether another user has a value makes no difference to the answer.
    for (id, slug) in [(10, "only bob's"), (11, "nobody's")] {
        if id == 10 {
            server.client("bob").sql("INSERT INTO notes VALUES (1, 'only bob''s')").await;
        }
        let answer = al.sql_params("INSERT INTO notes VALUES ($1, $2) RETURNING id", json!([id, slug])).await;
        assert_eq!(answer["results"][0]["rows"], json!([[id]]));
    }
    for user in [&alice, &al] {
        let plan = explain(user, "SELECT id FROM notes WHERE slug = 'secret'").await;
        assert!(plan.contains("index=slugs"), "{plan}");
        assert_eq!(user.rows("SELECT id FROM notes WHERE slug = 'secret'").await, json!([[1]]));
    }
    assert_eq!(alice.rows("SELECT id FROM notes WHERE slug >= 'a'").await, json!([[1]]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_clients_add_one() {
    const CLIENTS: i64 = 100;
    const EACH: i64 = 2;
    // All plan at once.
    let options = Options { config: "[sql]\ndeadline_ms = 30000\n".into(), ..Options::default() };
    let server = TestServer::with(options).await;
    let db = with_table(&server, "id INT PRIMARY KEY, x INT").await;
    db.sql("INSERT INTO t VALUES (1, 0)").await;
    let clients = (0..CLIENTS).map(|_| {
        let db = db.clone();
        async move {
            let mut seen = Vec::new();
            for _ in 0..EACH {
                let answer = insist(&db, "UPDATE t SET x = x + 1 WHERE id = 1 RETURNING x").await;
                seen.push((seq(&answer), answer["results"][0]["rows"][0][0].as_i64().unwrap()));
            }
            seen
        }
    });
    let mut seen: Vec<(u64, i64)> = join_all(clients).await.into_iter().flatten().collect();
    assert_eq!(db.rows("SELECT x FROM t").await, json!([[CLIENTS * EACH]]));
    // Each saw its own number, and commit order is the order of the numbers.
    seen.sort_unstable();
    assert_eq!(seen.iter().map(|(_, x)| *x).collect::<Vec<_>>(), (1..=CLIENTS * EACH).collect::<Vec<_>>());
}

/// Somebody always wins, and who lost often enough takes a turn alone: nobody is told of a conflict. But more may come at
/// once than are let in, and are told to try again.
async fn insist(db: &Client, sql: &str) -> Value {
    loop {
        match db.try_sql(sql, json!([])).await {
            Ok(answer) => return answer,
            Err(failure) => {
                let told = failure.body["detail"].as_str().unwrap_or_default();
                assert!(told.contains("try again") && failure.body["code"] != "conflict", "{failure:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_that_insert_one_key_one_wins() {
    const RIVALS: usize = 24;
    let server = TestServer::start().await;
    let db = with_table(&server, "id INT PRIMARY KEY, slug TEXT UNIQUE, who INT").await;
    for round in 0..4 {
        let insert = |rival: usize| {
            let db = db.clone();
            // The same primary key; or keys of their own and the same unique value.
            let (id, slug) = match round % 2 {
                0 => (round, format!("{round}-{rival}")),
                _ => (round * 1000 + rival, format!("{round}")),
            };
            async move { db.try_sql("INSERT INTO t VALUES ($1, $2, $3)", json!([id, slug, rival])).await }
        };
        let outcomes = join_all((0..RIVALS).map(insert)).await;
        let winners: Vec<usize> = (0..RIVALS).filter(|rival| outcomes[*rival].is_ok()).collect();
        assert_eq!(winners.len(), 1, "{outcomes:?}");
        for outcome in outcomes.into_iter().filter(Result::is_err) {
            refused(outcome, "duplicate_key");
        }
        let there = if round % 2 == 0 { format!("id = {round}") } else { format!("slug = '{round}'") };
        assert_eq!(db.rows(&format!("SELECT who FROM t WHERE {there}")).await, json!([[winners[0]]]));
    }
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[4]]));
}

/// Money moves between accounts, and new accounts are opened with some of another's: whoever looks, by whatever way,
/// sees all of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_are_seen_whole_or_not_at_all() {
    const ACCOUNTS: i64 = 6;
    const ALL: i64 = 100 * ACCOUNTS;
    let server = TestServer::start().await;
    let db = with_table(&server, "id INT PRIMARY KEY, owner INT, money INT").await;
    db.sql("CREATE INDEX owners ON t (owner)").await;
    let rows: Vec<String> = (0..ACCOUNTS).map(|id| format!("({id}, {}, 100)", id % 3)).collect();
    db.sql(&format!("INSERT INTO t VALUES {}", rows.join(", "))).await;
    let mut live = db.live("SELECT id, money FROM t").await;
    live.until_uptodate().await;
    let (stop, stopped) = watch::channel(false);
    let readers: Vec<_> = [
        "SELECT sum(money) FROM t",
        "SELECT sum(money) FROM t WHERE owner IN (0, 1, 2)",
        "SELECT (SELECT sum(money) FROM t WHERE id < 3) + (SELECT sum(money) FROM t WHERE id >= 3)",
    ]
    .into_iter()
    .map(|sql| {
        let (db, stopped) = (db.clone(), stopped.clone());
        tokio::spawn(async move {
            let mut looks = 0;
            while !*stopped.borrow() {
                assert_eq!(db.rows(sql).await, json!([[ALL]]), "{sql}");
                looks += 1;
            }
            looks
        })
    })
    .collect();
    let writers = (0..4).map(|writer: i64| {
        let db = db.clone();
        async move {
            for n in 0..15 {
                let (from, to) = ((writer + n) % ACCOUNTS, (writer * 2 + n * 5 + 1) % ACCOUNTS);
                let opened = 1_000 + writer * 100 + n;
                let sql = "UPDATE t SET money = money - 7 WHERE id = $1; UPDATE t SET money = money + 5 WHERE id = $2; \
                           INSERT INTO t VALUES ($3, $4, 2)";
                db.sql_params(sql, json!([from, to, opened, opened % 3])).await;
                if n % 5 == 4 {
                    let close = "DELETE FROM t WHERE id = $1; UPDATE t SET money = money + 2 WHERE id = $2";
                    db.sql_params(close, json!([opened, to])).await;
                }
            }
        }
    });
    join_all(writers).await;
    stop.send_replace(true);
    for reader in readers {
        assert!(reader.await.expect("a reader sees whole transactions") > 0);
    }
    // The stream says its position after whole transactions only.
    let last = seq(&db.sql("SELECT 1").await);
    loop {
        let event = live.next_event().await;
        if event.id.is_some() {
            let sum: i64 = live.fold.rows.values().filter_map(|row| row["money"].as_i64()).sum();
            assert_eq!(sum, ALL, "at {:?}", event.id);
        }
        if event.name == "uptodate" && event.data["seq"].as_u64().is_some_and(|seq| seq >= last) {
            break;
        }
    }
}

#[tokio::test]
async fn a_delete_removes_exactly_what_the_select_shows() {
    let server = TestServer::start().await;
    let db = with_table(&server, "id INT PRIMARY KEY, grp INT, v INT").await;
    db.sql("CREATE TABLE other (id INT PRIMARY KEY, grp INT)").await;
    db.sql("CREATE INDEX groups ON t (grp, v)").await;
    db.sql("INSERT INTO other VALUES (1, 1), (2, 3), (3, NULL), (40, 1)").await;
    let rows: Vec<String> = (0..40)
        .map(|id| {
            format!("({id}, {}, {})", if id % 7 == 0 { "NULL".to_owned() } else { (id % 5).to_string() }, id * 3 % 11)
        })
        .collect();
    let fill = format!("INSERT INTO t VALUES {}", rows.join(", "));
    for filter in [
        "true",
        "false",
        "1 = 0",
        "NULL",
        "1 = 1 AND id >= 20",
        "id > 10 AND id < 5",
        "id IN (SELECT id FROM other)",
        "id NOT IN (SELECT id FROM other)",
        "grp IN (SELECT grp FROM other)",
        "grp NOT IN (SELECT grp FROM other)",
        "grp NOT IN (SELECT grp FROM other WHERE grp IS NOT NULL)",
        "EXISTS (SELECT 1 FROM other WHERE other.grp = t.grp)",
        "NOT EXISTS (SELECT 1 FROM other WHERE other.grp = t.grp)",
        "EXISTS (SELECT 1 FROM other WHERE false)",
        "v = (SELECT max(v) FROM t)",
        "v > (SELECT avg(v) FROM t AS u WHERE u.grp = t.grp)",
        "id IN (SELECT id FROM t ORDER BY v DESC, id LIMIT 3)",
        "id IN (SELECT id FROM t LIMIT 0)",
        "grp = 2",
        "grp = 2 AND v > 4",
        "grp IN (1, 3) AND v BETWEEN 2 AND 8",
        "grp = 2 OR v = 1",
        "grp IS NULL",
        "grp > 3",
        "grp < 1 AND v <> 5",
        "CASE WHEN grp = 1 THEN v > 3 ELSE id < 4 END",
    ] {
        db.sql("DELETE FROM t").await;
        db.sql(&fill).await;
        let ids = |rows: Value| -> BTreeSet<i64> {
            rows.as_array().unwrap().iter().map(|row| row[0].as_i64().unwrap()).collect()
        };
        let shown = ids(db.rows(&format!("SELECT id FROM t WHERE {filter}")).await);
        let deleted = db.sql(&format!("DELETE FROM t WHERE {filter} RETURNING id")).await["results"][0].take();
        assert_eq!(deleted["affected"], shown.len(), "{filter}");
        assert_eq!(ids(deleted["rows"].clone()), shown, "{filter}");
        let left = ids(db.rows("SELECT id FROM t").await);
        assert_eq!(left, &(0..40).collect() - &shown, "{filter}");
    }
}

#[tokio::test]
async fn indexes_come_serve_and_go() {
    let mut server = TestServer::start().await;
    let db = with_table(&server, "id INT PRIMARY KEY, carrier TEXT, delay INT, dist DOUBLE, at TIMESTAMP").await;
    let values: Vec<String> = (0..300)
        .map(|id| {
            format!(
                "({id}, 'c{}', {}, {}.5, '2013-01-{:02}T00:00:00Z')",
                id % 7,
                id % 50 - 10,
                id % 90 - 45,
                id % 28 + 1
            )
        })
        .collect();
    db.sql(&format!("INSERT INTO t VALUES {}", values.join(", "))).await;
    db.sql("CREATE INDEX by_carrier ON t (carrier, delay)").await;
    db.sql("CREATE INDEX ON t (dist)").await;
    db.sql("CREATE INDEX IF NOT EXISTS by_time ON t (at)").await;
    db.sql("CREATE INDEX IF NOT EXISTS by_time ON t (at)").await;
    let cases = [
        ("carrier = 'c3'", "index=by_carrier, keys=[carrier = \"c3\"]"),
        ("carrier = 'c3' AND delay > 30", "index=by_carrier"),
        ("carrier IN ('c1', 'c5') AND delay = 7", "index=by_carrier"),
        ("carrier > 'c5'", "index=by_carrier"),
        ("dist > 40", "index=t_dist_idx"),
        ("dist = 0.5 OR dist = -0.5", "index=t_dist_idx"),
        ("dist BETWEEN -1 AND 1 AND carrier = 'c2'", "index=by_carrier"),
        ("at = '2013-01-07T00:00:00Z'", "index=by_time"),
        ("at < '2013-01-03T00:00:00Z' AND id < 100", "keys=[id < 100]"),
        ("id = 7 AND carrier = 'c0'", "keys=[id = 7]"),
        ("delay = 7", "keys=[all]"),
    ];
    // The same question so that no index helps: each column behind an expression.
    let hidden = |filter: &str| {
        filter
            .replace("carrier", "nullif(carrier, 'never')")
            .replace("delay", "nullif(delay, -999)")
            .replace("dist", "nullif(dist, -999)")
            .replace("at ", "nullif(at, TIMESTAMP '1900-01-01') ")
            .replace("id ", "nullif(id, -999) ")
    };
    for restarts in 0..2 {
        for (filter, plan) in cases {
            let sql = format!("SELECT id FROM t WHERE {filter} ORDER BY id");
            let full = format!("SELECT id FROM t WHERE {} ORDER BY id", hidden(filter));
            let explained = explain(&db, &sql).await;
            assert!(explained.contains(plan), "{filter}: {explained}");
            assert!(!explain(&db, &full).await.contains("index="));
            let rows = db.rows(&sql).await;
            assert_eq!(rows, db.rows(&full).await, "{filter}");
            assert_ne!(rows, json!([]), "{filter} shows something");
        }
        if restarts == 0 {
            server.kill9();
            server.restart().await;
        }
    }
    db.expect_error("CREATE INDEX by_time ON t (id)", 400, "duplicate_index").await;
    db.expect_error("CREATE INDEX ON t (nope)", 400, "unknown_column").await;
    db.expect_error("DROP INDEX nope", 400, "unknown_index").await;
    for refused in [
        "CREATE INDEX ON t (delay DESC)",
        "CREATE INDEX ON t (delay + 1)",
        "CREATE INDEX ON t (delay) WHERE delay > 0",
        "CREATE INDEX ON t USING hash (delay)",
        "CREATE INDEX ON t (delay) INCLUDE (dist)",
        "CREATE INDEX a ON t (delay); CREATE INDEX b ON t (delay)",
    ] {
        db.expect_error(refused, 400, "unsupported").await;
    }
    db.sql("DROP INDEX IF EXISTS nope").await;
    db.sql("DROP INDEX by_carrier").await;
    let plan = explain(&db, "SELECT id FROM t WHERE carrier = 'c3'").await;
    assert!(plan.contains("keys=[all]"), "{plan}");
    assert_eq!(db.rows("SELECT count(*) FROM t WHERE carrier = 'c3'").await, json!([[43]]));
    // A table and its indexes in one request; the name is free again.
    db.sql("CREATE TABLE u (id INT PRIMARY KEY, n INT); CREATE UNIQUE INDEX by_carrier ON u (n)").await;
    db.sql("INSERT INTO u VALUES (1, 1)").await;
    db.expect_error("INSERT INTO u VALUES (2, 1)", 409, "duplicate_key").await;
    db.sql("DROP TABLE u; CREATE TABLE u (id INT PRIMARY KEY, n INT UNIQUE)").await;
    assert_eq!(db.rows("SELECT * FROM u WHERE n = 1").await, json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_is_built_while_writes_go_on() {
    let server = TestServer::start().await;
    let db = with_table(&server, "id BIGINT PRIMARY KEY, a INT, b BIGINT").await;
    fill(&db, 6_000).await;
    let (stop, stopped) = watch::channel(false);
    let writers: Vec<_> = (0..3)
        .map(|writer: i64| {
            let (db, stopped) = (db.clone(), stopped.clone());
            tokio::spawn(async move {
                let mut n = 0;
                while !*stopped.borrow() {
                    n += 1;
                    let id = (n * 997 + writer * 3) % 6_000;
                    let sql = [
                        "UPDATE t SET a = a + 1 WHERE id = $1",
                        "DELETE FROM t WHERE id = $1",
                        "INSERT INTO t VALUES ($1, 3, $1) ON CONFLICT (id) DO UPDATE SET a = 3",
                    ][n as usize % 3];
                    db.sql_params(sql, json!([id])).await;
                }
                n
            })
        })
        .collect();
    for index in 0..3 {
        db.sql(&format!("CREATE INDEX i{index} ON t (a)")).await;
        db.sql(&format!("CREATE UNIQUE INDEX u{index} ON t (b)")).await;
        if index < 2 {
            db.sql(&format!("DROP INDEX i{index}")).await;
            db.sql(&format!("DROP INDEX u{index}")).await;
        }
    }
    stop.send_replace(true);
    for writer in writers {
        assert!(writer.await.expect("a writer ends well") > 0, "writes went on");
    }
    same_by_index(&db, "a").await;
    same_by_index(&db, "b").await;
}

#[tokio::test]
async fn a_duplicate_fails_the_build_and_nothing_is_left() {
    let server = TestServer::start().await;
    let db = with_table(&server, "id BIGINT PRIMARY KEY, a INT, b BIGINT").await;
    fill(&db, 3_000).await;
    db.sql("UPDATE t SET b = 17 WHERE id = 2999").await;
    let detail = refused(db.try_sql("CREATE UNIQUE INDEX once ON t (b)", json!([])).await, "duplicate_key");
    assert!(detail.contains("(b) = (17)"), "{detail}");
    let plan = explain(&db, "SELECT id FROM t WHERE b = 17").await;
    assert!(plan.contains("keys=[all]"), "{plan}");
    // Nothing is held to it any more.
    db.sql("INSERT INTO t VALUES (5000, 1, 17); DELETE FROM t WHERE b = 17 AND id > 17").await;
    db.sql("CREATE UNIQUE INDEX once ON t (b)").await;
    same_by_index(&db, "b").await;
    db.expect_error("INSERT INTO t VALUES (5000, 1, 17)", 409, "duplicate_key").await;
}

/// Killed at some moment of the build, whichever that is: afterwards the index is there and right, or not there at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_that_is_killed_leaves_all_or_nothing() {
    let mut server = TestServer::start().await;
    let db = with_table(&server, "id BIGINT PRIMARY KEY, a INT, b BIGINT").await;
    fill(&db, 6_000).await;
    let mut left = 0;
    for round in 0..4 {
        let build = {
            let db = db.clone();
            tokio::spawn(async move { db.try_sql(&format!("CREATE UNIQUE INDEX k{round} ON t (b)"), json!([])).await })
        };
        // As many writes later: the build is on its way, or not yet, or done.
        for n in 0..round * 3 {
            db.sql_params("UPDATE t SET a = a + 1 WHERE id = $1", json!([n])).await;
        }
        server.kill9();
        let acknowledged = build.await.expect("the request ends").is_ok();
        server.restart().await;
        let plan = explain(&db, "SELECT id FROM t WHERE b = 5").await;
        let there = plan.contains(&format!("index=k{round}"));
        assert!(there || !acknowledged, "an acknowledged index is there: {plan}");
        left += i32::from(there);
        db.sql(&format!("CREATE UNIQUE INDEX IF NOT EXISTS k{round} ON t (b)")).await;
        same_by_index(&db, "b").await;
        db.expect_error("INSERT INTO t VALUES (9000, 1, 5)", 409, "duplicate_key").await;
        db.sql(&format!("DROP INDEX k{round}")).await;
    }
    eprintln!("{left} of 4 builds were done when the server was killed");
}

/// Rows `(id, id % 100, id)`.
async fn fill(db: &Client, rows: i64) {
    for start in (0..rows).step_by(1_000) {
        let values: Vec<String> =
            (start..(start + 1_000).min(rows)).map(|id| format!("({id},{},{id})", id % 100)).collect();
        db.sql(&format!("INSERT INTO t VALUES {}", values.join(","))).await;
    }
}

/// Every value by an index on the column, and by reading the whole table.
async fn same_by_index(db: &Client, column: &str) {
    let plan = explain(db, &format!("SELECT id FROM t WHERE {column} >= -5")).await;
    assert!(plan.contains("index="), "{plan}");
    let answer = db
        .sql(&format!(
            "SELECT id, {column} FROM t WHERE {column} >= -5 ORDER BY id; SELECT id, {column} FROM t ORDER BY id"
        ))
        .await;
    let results = &answer["results"];
    assert_eq!(results[0]["row_count"], results[1]["row_count"]);
    assert_eq!(results[0]["rows"], results[1]["rows"]);
}

/// Random writes, indexes and restarts against a model: every query by an index is what the model and a query that
/// cannot use one say.
#[tokio::test]
async fn an_index_shows_what_a_full_scan_shows() {
    for seed in tests::seeds(1) {
        tests::seeded(seed, index_against_scan(StdRng::seed_from_u64(seed))).await;
    }
}

async fn index_against_scan(mut random: StdRng) {
    const STEPS: usize = 80;
    let mut server = TestServer::start().await;
    let admin = server.admin();
    admin.sql("CREATE TABLE t (id INT PRIMARY KEY, a INT, b TEXT, c DOUBLE) WITH (type = 'user')").await;
    let clients = [server.client("alice"), server.client("al")];
    type Row = (Option<i64>, Option<String>, Option<f64>);
    let mut models: [BTreeMap<i64, Row>; 2] = Default::default();
    let mut indexes: Vec<(usize, &str)> = Vec::new();
    let texts = ["", "a", "ab", "b", "a\u{0}b", "é"];
    for step in 0..STEPS {
        let user = random.random_range(0..2);
        let (db, model) = (&clients[user], &mut models[user]);
        match random.random_range(0..12) {
            0..6 => {
                let count = random.random_range(1..8);
                let ids: BTreeSet<i64> = (0..count).map(|_| random.random_range(0..40)).collect();
                let (mut rows, mut params) = (Vec::new(), Vec::new());
                for id in ids {
                    let a = random.random_bool(0.8).then(|| random.random_range(-3..4i64));
                    let b = random.random_bool(0.8).then(|| (*texts.choose(&mut random).unwrap()).to_owned());
                    let c = random.random_bool(0.8).then(|| *[-1.5, -0.0, 0.0, 2.0, 1e9].choose(&mut random).unwrap());
                    let show = |value: &Option<i64>| value.map_or("NULL".to_owned(), |value| value.to_string());
                    let number = c.map_or("NULL".to_owned(), |c: f64| format!("{c:?}e0"));
                    params.push(json!(b));
                    rows.push(format!("({id}, {}, ${}, {})", show(&a), params.len(), number.replace("e9e0", "e9")));
                    model.insert(id, (a, b, c));
                }
                let set = "a = excluded.a, b = excluded.b, c = excluded.c";
                let sql = format!("INSERT INTO t VALUES {} ON CONFLICT (id) DO UPDATE SET {set}", rows.join(", "));
                db.sql_params(&sql, Value::Array(params)).await;
            }
            6 => {
                let a = random.random_range(-3..4i64);
                db.sql_params("UPDATE t SET a = a + 1, b = b || 'x' WHERE a = $1", json!([a])).await;
                for row in model.values_mut().filter(|row| row.0 == Some(a)) {
                    (row.0, row.1) = (row.0.map(|a| a + 1), row.1.take().map(|b| b + "x"));
                }
            }
            7 => {
                let a = random.random_range(-3..4i64);
                // Two statements of one transaction: the second finds what the first has moved.
                let sql = "UPDATE t SET a = $1 WHERE a > $1; DELETE FROM t WHERE a = $1 AND id < 20";
                db.sql_params(sql, json!([a])).await;
                model.values_mut().filter(|row| row.0 > Some(a)).for_each(|row| row.0 = Some(a));
                model.retain(|id, row| row.0 != Some(a) || *id >= 20);
            }
            8 => {
                let b = *texts.choose(&mut random).unwrap();
                db.sql_params("DELETE FROM t WHERE b = $1", json!([b])).await;
                model.retain(|_, row| row.1.as_deref() != Some(b));
            }
            9 if indexes.len() < 4 => {
                let columns = *["a", "b", "c", "a, b", "b, a", "b, c, a"].choose(&mut random).unwrap();
                admin.sql(&format!("CREATE INDEX i{step} ON t ({columns})")).await;
                indexes.push((step, columns));
            }
            10 if !indexes.is_empty() => {
                let (name, _) = indexes.remove(random.random_range(0..indexes.len()));
                admin.sql(&format!("DROP INDEX i{name}")).await;
            }
            11 if step % 4 == 0 => {
                server.kill9();
                server.restart().await;
            }
            _ => {}
        }
        for (db, model) in clients.iter().zip(&models) {
            let (a, b) = (random.random_range(-3..4i64), *texts.choose(&mut random).unwrap());
            type Is<'a> = Box<dyn Fn(&Row) -> bool + 'a>;
            let is_b = |row: &Row| row.1.as_deref() == Some(b);
            let cases: [(&str, &str, Is<'_>); 8] = [
                ("a = $1", "nullif(a, -99) = $1", Box::new(|row| row.0 == Some(a))),
                ("a > $1", "nullif(a, -99) > $1", Box::new(|row| row.0 > Some(a))),
                ("a <= $1", "nullif(a, -99) <= $1", Box::new(|row| row.0.is_some_and(|found| found <= a))),
                (
                    "a IN ($1, 2, -2)",
                    "nullif(a, -99) IN ($1, 2, -2)",
                    Box::new(|row| [a, 2, -2].map(Some).contains(&row.0)),
                ),
                ("b = $2", "nullif(b, 'never') = $2", Box::new(is_b)),
                (
                    "b >= $2 AND a = $1",
                    "nullif(b, 'never') >= $2 AND nullif(a, -99) = $1",
                    Box::new(|row| row.1.as_deref() >= Some(b) && row.0 == Some(a)),
                ),
                (
                    "b = $2 AND a < $1",
                    "nullif(b, 'never') = $2 AND nullif(a, -99) < $1",
                    Box::new(|row| is_b(row) && row.0.is_some_and(|found| found < a)),
                ),
                ("c > 1.0", "nullif(c, -99) > 1.0", Box::new(|row| row.2 > Some(1.0))),
            ];
            for (filter, hidden, is_shown) in cases {
                let params = json!([a, b]);
                // `$1` and `$2` are both used, whatever the filter is.
                let sql = |filter: &str| {
                    format!("SELECT id FROM t WHERE {filter} AND ($1 IS NOT NULL OR $2 = '') ORDER BY id")
                };
                let due: Vec<i64> = model.iter().filter(|(_, row)| is_shown(row)).map(|(id, _)| *id).collect();
                let due = json!(due.iter().map(|id| [id]).collect::<Vec<_>>());
                let shown = db.sql_params(&sql(filter), params.clone()).await["results"][0]["rows"].take();
                assert_eq!(shown, due, "step {step}: {filter} with {params}, indexes {indexes:?}");
                if step % 8 == 0 {
                    let full = db.sql_params(&sql(hidden), params).await["results"][0]["rows"].take();
                    assert_eq!(full, due, "step {step}: {hidden}");
                }
            }
        }
    }
}
