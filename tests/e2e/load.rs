//! Heavy queries: how many run at once, what the others get, that they end with their client or their deadline, and what
//! they do where they need more memory than there is.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde_json::json;
use tests::client::expect_problem;
use tests::{Client, Options, PATIENCE, TestServer};
use tokio::task::JoinHandle;

/// Never ends, and needs no memory.
const ENDLESS: &str = "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r) SELECT max(n) FROM r";

async fn server(sql: &str) -> TestServer {
    let server = TestServer::with(Options { config: format!("[sql]\n{sql}\n"), ..Options::default() }).await;
    let admin = server.admin();
    admin.sql("CREATE TABLE t (id INT PRIMARY KEY, name TEXT)").await;
    let rows: Vec<String> = (0..2_000).map(|id| format!("({id}, 'n{}')", id % 7)).collect();
    admin.sql(&format!("INSERT INTO t VALUES {}", rows.join(", "))).await;
    server
}

fn start(client: Client, sql: &'static str) -> JoinHandle<Result<serde_json::Value, tests::Failure>> {
    tokio::spawn(async move { client.try_sql(sql, json!([])).await })
}

/// Waits until a metric is in a range, for less than [`ENDLESS`] takes until its deadline where nobody stops it.
async fn until(client: &Client, metric: &str, range: RangeInclusive<f64>) {
    let there = async {
        while !range.contains(&client.metric(metric).await) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, there).await.unwrap_or_else(|_| panic!("{metric} never was in {range:?}"));
}

#[tokio::test]
async fn heavy_queries_take_turns_and_end_with_their_clients() {
    let server = server("heavy_queries = 1\nheavy_queue = 1\ndeadline_ms = 30000").await;
    let db = server.admin();
    let first = start(db.clone(), ENDLESS);
    until(&db, "tidegate_heavy_queries", 1.0..=1.0).await;
    let second = start(db.clone(), "SELECT name, count(*) FROM t GROUP BY name ORDER BY name");
    until(&db, "tidegate_heavy_waiting", 1.0..=1.0).await;
    // No room for a third; what is light goes on.
    let request = db.request(reqwest::Method::POST, "/v1/sql").json(&json!({"sql": "SELECT max(id) FROM t"}));
    let refused = request.try_clone().unwrap().send().await.unwrap();
    assert!(refused.headers().contains_key("retry-after"));
    expect_problem(request, 503, "busy").await;
    assert_eq!(db.rows("SELECT name FROM t WHERE id = 8").await, json!([["n1"]]));
    assert_eq!(db.rows("SELECT id FROM t WHERE name = 'n3' LIMIT 1").await, json!([[3]]));
    db.sql("INSERT INTO t VALUES (-5, 'new')").await;
    // The client goes, and its query with it: the next one has its turn long before the deadline.
    first.abort();
    let answer = second.await.unwrap().expect("the second query has its turn");
    assert_eq!(answer["results"][0]["row_count"], 7);
    until(&db, "tidegate_heavy_queries", 0.0..=0.0).await;
    until(&db, "tidegate_sql_memory_bytes", 0.0..=0.0).await;
    assert_eq!(db.rows("SELECT max(id) FROM t").await, json!([[1_999]]));
}

/// All of a request's queries were started before the first result was read, and each kept its permit until its own was:
/// the last one waited for those before it, until its deadline.
#[tokio::test]
async fn a_request_does_not_wait_for_itself() {
    let server = server("heavy_queries = 1\ndeadline_ms = 15000").await;
    let db = server.admin();
    // More than one batch each.
    let sorted = "SELECT l.id FROM t l JOIN t r ON l.name = r.name ORDER BY l.id DESC LIMIT 20000";
    let sql = format!("{sorted}; SELECT count(*) FROM t; {sorted}; SELECT name FROM t WHERE id = 8; {sorted}");
    let answer = db.try_sql(&sql, json!([])).await.expect("one after the other");
    let counts = answer["results"].as_array().unwrap().iter().map(|result| result["row_count"].as_u64().unwrap());
    assert_eq!(counts.collect::<Vec<_>>(), [20_000, 1, 20_000, 1, 20_000]);
    until(&db, "tidegate_heavy_queries", 0.0..=0.0).await;
}

/// What a statement was about to write stopped counting when the next one began, and what it returned, when the commit was
/// made: a request could take any amount of memory, and so could clients that do not read.
#[tokio::test]
async fn changes_and_what_they_return_count_for_as_long_as_they_are_held() {
    let server = server("memory_bytes = \"16 MiB\"\ndeadline_ms = 30000").await;
    let db = server.admin();
    db.sql("CREATE TABLE u (id INT PRIMARY KEY, pad TEXT)").await;
    let insert = |from: u32| format!("INSERT INTO u SELECT id + {from}, lpad('x', 1000, 'x') FROM t");
    db.sql(&insert(0)).await;
    let many: Vec<String> = (1..8).map(|statement| insert(statement * 10_000)).collect();
    db.expect_error(&many.join("; "), 400, "limit").await;
    until(&db, "tidegate_sql_memory_bytes", 0.0..=0.0).await;
    assert_eq!(db.rows("SELECT count(*) FROM u").await, json!([[2_000]]));

    // Larger than what the sockets take.
    let sql = "UPDATE u SET pad = lpad('y', 3000, 'y') WHERE id < 1500 RETURNING *";
    let request = db.request(reqwest::Method::POST, "/v1/sql").json(&json!({"sql": sql}));
    let unread = request.send().await.unwrap();
    assert_eq!(unread.status(), 200);
    until(&db, "tidegate_sql_memory_bytes", 1_000_000.0..=f64::MAX).await;
    drop(unread);
    until(&db, "tidegate_sql_memory_bytes", 0.0..=0.0).await;
    assert_eq!(db.rows("SELECT count(*) FROM u WHERE length(pad) = 3000").await, json!([[1_500]]));
}

#[tokio::test]
async fn clients_that_go_leave_nothing_behind() {
    let server = server("deadline_ms = 30000\nheavy_queue = 1000").await;
    let db = server.admin();
    for round in 0..10 {
        let gone: Vec<_> = (0..20).map(|_| start(db.clone(), ENDLESS)).collect();
        if round % 2 == 0 {
            until(&db, "tidegate_heavy_queries", 1.0..=f64::MAX).await;
        }
        gone.iter().for_each(JoinHandle::abort);
    }
    until(&db, "tidegate_heavy_queries", 0.0..=0.0).await;
    until(&db, "tidegate_heavy_waiting", 0.0..=0.0).await;
    until(&db, "tidegate_sql_memory_bytes", 0.0..=0.0).await;
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[2_000]]));
}

#[tokio::test]
async fn the_deadline_ends_what_takes_too_long() {
    let server = server("deadline_ms = 500").await;
    let db = server.admin();
    db.expect_error(ENDLESS, 504, "deadline").await;
    let delete = "DELETE FROM t WHERE id IN (WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r) \
                  SELECT max(n) FROM r)";
    db.expect_error(delete, 504, "deadline").await;
    // Days of work in the memory of a pool: whichever limit it meets first.
    let cross = "SELECT count(*) FROM t a, t b, t c, t d WHERE a.id + b.id + c.id + d.id = -1";
    let failure = db.try_sql(cross, json!([])).await.expect_err("a cross join of billions of rows");
    let code = failure.body["code"].as_str().unwrap_or_default();
    assert!(matches!((failure.status, code), (Some(504), "deadline") | (Some(400), "limit")), "{failure:?}");
    until(&db, "tidegate_sql_memory_bytes", 0.0..=0.0).await;
    until(&db, "tidegate_heavy_queries", 0.0..=0.0).await;
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[2_000]]));
}

/// 200,000 rows of 200 characters, sorted by these: 40 MB that are spilled also where the pool has 64 MiB, because a sort
/// holds its rows twice.
const LARGE_SORT: &str = "SELECT n FROM (SELECT l.id * 100 + r.id AS n, lpad(CAST(l.id * 100 + r.id AS TEXT), 200, '0') AS pad \
                          FROM t l JOIN t r ON r.id < 100) AS wide ORDER BY pad DESC";

#[tokio::test]
async fn what_does_not_fit_into_memory_goes_to_disk() {
    let server = server("memory_bytes = \"64 MiB\"\nspill_bytes = \"1 GiB\"\ndeadline_ms = 30000").await;
    let db = server.admin();
    let rows = db.rows(LARGE_SORT).await;
    let numbers: Vec<i64> = rows.as_array().unwrap().iter().map(|row| row[0].as_i64().unwrap()).collect();
    assert!(numbers.iter().copied().eq((0..200_000).rev()), "{} rows, in another order", numbers.len());
    until(&db, "tidegate_sql_memory_bytes", 0.0..=0.0).await;
}

#[tokio::test]
async fn what_does_not_fit_onto_disk_either_is_refused_by_name() {
    let server = server("memory_bytes = \"32 MiB\"\nspill_bytes = \"1 MiB\"\ndeadline_ms = 30000").await;
    let db = server.admin();
    // The sort fails, and so does what holds the failure of one part in several places.
    for sql in [
        LARGE_SORT,
        "SELECT count(DISTINCT repeat(CAST(l.id * 100 + r.id AS TEXT), 40)) FROM t l JOIN t r ON r.id < 100",
    ] {
        let problem = db.expect_error(sql, 400, "limit").await;
        let detail = problem["detail"].as_str().unwrap_or_default();
        assert!(detail.contains("sql.spill_bytes"), "{detail}");
    }
    until(&db, "tidegate_sql_memory_bytes", 0.0..=0.0).await;
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[2_000]]));
}
