//! SQL that is sent to hurt: shapes that break parsers, plans that never end, values of any size, spill files without
//! end. Each is ended at its limit, says which, and nobody else notices.

use std::time::{Duration, Instant};

use reqwest::{Method, header};
use serde_json::{Value, json};
use tests::process::{forget_peak, status_bytes};
use tests::{Bystander, Client, Options, PATIENCE, TestServer};

const DEADLINE: Duration = Duration::from_secs(1);
/// What is refused before it is planned is refused in milliseconds; this is for machines that are busy with other tests.
const AT_ONCE: Duration = Duration::from_secs(1);
/// More than the server may ever need for one statement.
const MEMORY: u64 = 256 << 20;
/// Where it is not the deadline that is to end a query.
const LONG: Duration = Duration::from_secs(15);
/// Of the table that everything is joined with.
const ROWS: usize = 2_000;

/// A server with small limits, and somebody at work on it.
struct Bench {
    server: TestServer,
    db: Client,
    bystander: Bystander,
}

impl Bench {
    async fn new() -> Bench {
        Bench::with(DEADLINE).await
    }

    async fn with(deadline: Duration) -> Bench {
        let config = format!(
            "[sql]\ndeadline_ms = {}\nmemory_bytes = \"64 MiB\"\nspill_bytes = \"4 MiB\"\n",
            deadline.as_millis()
        );
        let server = TestServer::with(Options { config, ..Options::default() }).await;
        let db = server.admin();
        db.sql("CREATE TABLE t (id INT PRIMARY KEY, name TEXT)").await;
        let rows: Vec<String> = (0..ROWS).map(|id| format!("({id}, 'n{}')", id % 7)).collect();
        db.sql(&format!("INSERT INTO t VALUES {}", rows.join(", "))).await;
        let bystander = Bystander::at(&server).await;
        Bench { server, db, bystander }
    }

    /// Runs what has to be refused in time, for one of the reasons, without much memory.
    async fn refused(&self, what: &str, sql: &str, within: Duration, reasons: &[(u16, &str)]) {
        self.ends(what, sql, json!([]), within, reasons, false).await;
    }

    /// The same of what may be answered as well, where it is quick.
    async fn ended(&self, what: &str, sql: &str, params: Value, reasons: &[(u16, &str)]) {
        self.ends(what, sql, params, DEADLINE + Duration::from_secs(1), reasons, true).await;
    }

    async fn ends(
        &self,
        what: &str,
        sql: &str,
        params: Value,
        within: Duration,
        reasons: &[(u16, &str)],
        may_be_answered: bool,
    ) {
        // One that was stopped may run on for a moment, with the permit that this one needs.
        until_idle(&self.db).await;
        forget_peak(self.server.pid());
        let before = status_bytes(self.server.pid(), "VmRSS");
        let start = Instant::now();
        let outcome = self.db.try_sql(sql, params).await;
        let took = start.elapsed();
        let grown = status_bytes(self.server.pid(), "VmHWM").saturating_sub(before);
        match &outcome {
            Ok(_) => assert!(may_be_answered, "{what} was answered"),
            Err(failure) => {
                let found = (failure.status.unwrap_or_default(), failure.body["code"].as_str().unwrap_or_default());
                assert!(reasons.contains(&found), "{what}: {failure:?}");
            }
        }
        assert!(took < within, "{what} took {took:?}");
        assert!(grown < MEMORY, "{what} took {grown} bytes");
        eprintln!("{what}: {took:?}, {} MiB", grown >> 20);
    }

    /// Nothing is left of what was stopped, and the others have noticed nothing.
    async fn end(self) {
        until_idle(&self.db).await;
        let rounds = self.bystander.unhurt(&self.server).await;
        eprintln!("meanwhile: {rounds:?}");
        assert_eq!(self.db.rows("SELECT count(*) FROM t").await, json!([[ROWS]]));
    }
}

/// Waits until no query runs and none holds memory; how long that was.
async fn until_idle(db: &Client) -> Duration {
    let start = Instant::now();
    let idle = async {
        for metric in ["tidegate_heavy_queries", "tidegate_heavy_waiting", "tidegate_sql_memory_bytes"] {
            while db.metric(metric).await != 0.0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    };
    tokio::time::timeout(PATIENCE, idle).await.expect("what was stopped gives back what it had");
    start.elapsed()
}

const LIMIT: &[(u16, &str)] = &[(400, "limit")];
const STOPPED: &[(u16, &str)] = &[(504, "deadline"), (400, "limit")];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statements_of_monstrous_shape_are_refused_at_once() {
    let bench = Bench::new().await;
    let chain = |count: usize, operator: &str| format!("SELECT 1{}", format!("{operator}1").repeat(count));
    let numbered = |count: usize, part: &dyn Fn(usize) -> String| -> String { (0..count).map(part).collect() };
    // Each as large as the text may be, and as large as attackers like it.
    for (what, sql) in [
        ("30,000 +", chain(30_000, "+")),
        ("100,000 +", chain(100_000, "+")),
        ("8,000 OR", chain(8_000, " OR ")),
        ("20,000 OR", chain(20_000, " OR ")),
        ("10,000 NOT", format!("SELECT {}true", "NOT ".repeat(10_000))),
        ("5,000 brackets", format!("SELECT {}1{}", "(".repeat(5_000), ")".repeat(5_000))),
        ("60,000 open brackets", format!("SELECT {}", "(".repeat(60_000))),
        ("5,000 lists", format!("SELECT {}1{}", "[".repeat(5_000), "]".repeat(5_000))),
        ("3,000 UNION", vec!["SELECT 1"; 3_000].join(" UNION ALL ")),
        ("5,000 UNION", vec!["SELECT 1"; 5_000].join(" UNION ALL ")),
        ("500 sub-queries", format!("SELECT {}1{}", "(SELECT ".repeat(500), ")".repeat(500))),
        ("500 CASE", format!("SELECT {}1{}", "CASE WHEN true THEN ".repeat(500), " END".repeat(500))),
        (
            "200 WITH",
            format!(
                "WITH c AS (SELECT 1 AS x){} SELECT * FROM c199",
                numbered(200, &|n| format!(", c{n} AS (SELECT CASE WHEN x = {n} THEN 1 ELSE 2 END AS x FROM c)"))
            ),
        ),
        (
            "30 joins",
            format!("SELECT count(*) FROM t t0{}", numbered(30, &|n| format!(" JOIN t x{n} ON x{n}.id = t0.id"))),
        ),
        ("IN with 9,000", format!("SELECT id FROM t WHERE id IN ({})", vec!["1"; 9_000].join(","))),
        ("IN with 100,000", format!("SELECT id FROM t WHERE id IN ({})", vec!["1"; 100_000].join(","))),
        ("200 statements", "SELECT 1;".repeat(200)),
    ] {
        bench.refused(what, &sql, AT_ONCE, LIMIT).await;
    }
    // What one level of the parser, or of whoever handles a type, calls for the next: each ended the whole server.
    let types = |levels| format!("SELECT arrow_cast(1, '{}Int64{}')", "List(".repeat(levels), ")".repeat(levels));
    for (what, sql) in [
        ("100 EXPLAIN", format!("{}SELECT 1", "EXPLAIN ".repeat(100))),
        ("8,000 EXPLAIN", format!("{}SELECT 1", "EXPLAIN ".repeat(8_000))),
        ("250 DESC", format!("{}SELECT 1", "DESC ".repeat(250))),
        ("2,500 EXPLAIN ANALYZE VERBOSE", format!("{}SELECT 1", "EXPLAIN ANALYZE VERBOSE ".repeat(2_500))),
        ("DESCRIBE behind another", format!("SELECT 1; {}t", "DESCRIBE ".repeat(7_000))),
        ("a type of 2,000 levels", types(2_000)),
        ("a type of 8,000 levels", types(8_000)),
        ("the same, tried", types(4_000).replace("arrow_cast", "arrow_try_cast")),
    ] {
        bench.refused(what, &sql, AT_ONCE, &[(400, "unsupported"), (400, "limit")]).await;
    }
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queries_without_end_are_stopped_and_nobody_notices() {
    let bench = Bench::new().await;
    let doubling: String = (1..8).map(|n| format!(", c{n} AS (SELECT a.id FROM c{0} a, c{0} b)", n - 1)).collect();
    let within = DEADLINE + Duration::from_secs(1);
    for (what, sql) in [
        ("four tables crossed", "SELECT count(*) FROM t a, t b, t c, t d WHERE a.id + b.id + c.id + d.id = -1".to_owned()),
        // The aggregate takes all that the join makes: what comes back too seldom stops whoever shares its thread.
        ("an array of a cross join", "SELECT array_length(array_agg(a.id)) FROM t a, t b, t c".to_owned()),
        ("a join that finds nothing", "SELECT count(*) FROM t a JOIN t b ON a.id + b.id < -a.id JOIN t c ON c.id < -b.id".to_owned()),
        ("crosses of crosses", format!("WITH c0 AS (SELECT id FROM t){doubling} SELECT count(*) FROM c7")),
        ("a recursion", "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r) SELECT count(*) FROM r".to_owned()),
        ("a recursion that grows", "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r, t) SELECT count(*) FROM r".to_owned()),
        ("a recursion that is sorted", "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r) SELECT n FROM r ORDER BY n DESC".to_owned()),
        ("a frame over all rows for each", "SELECT sum(b.id) OVER (ORDER BY a.id ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING) FROM t a, t b".to_owned()),
    ] {
        // What finds nothing may be quick enough.
        if what == "a join that finds nothing" {
            bench.ended(what, &sql, json!([]), STOPPED).await;
        } else {
            bench.refused(what, &sql, within, STOPPED).await;
        }
    }
    for series in ["SELECT * FROM generate_series(1, 1000000000000)", "SELECT range(1, 1000000000000)"] {
        bench.refused(series, series, AT_ONCE, &[(400, "unsupported")]).await;
    }
    // The same inside a write, which changes nothing.
    let write = "DELETE FROM t WHERE id IN (WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r) \
                 SELECT max(n) FROM r)";
    bench.refused("a recursion in a DELETE", write, within, STOPPED).await;
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn functions_that_make_or_take_much_are_bounded() {
    const HERE: &[(u16, &str)] =
        &[(400, "limit"), (400, "unsupported"), (400, "evaluation"), (400, "out_of_range"), (504, "deadline")];
    let bench = Bench::new().await;
    let doubling = |make: &str| -> String {
        let steps: String = (1..9).map(|n| format!(", c{n} AS (SELECT {make} AS x FROM c{})", n - 1)).collect();
        format!("WITH c0 AS (SELECT string_to_array(repeat('a,', 100000), ',') AS x){steps} SELECT x IS NULL FROM c8")
    };
    let (lists, joined, records) =
        (doubling("[x, x, x, x]"), doubling("array_concat(x, x, x, x)"), doubling("{a: x, b: x, c: x, d: x}"));
    let appended = format!("SELECT length({}) FROM t", ["repeat(name, 500000)"; 40].join(" || "));
    for (what, sql) in [
        ("repeat", "SELECT length(repeat('x', 2147483647))"),
        ("repeat of rows", "SELECT length(repeat(name, 2147483647)) FROM t"),
        ("repeat of repeat", "SELECT length(repeat(repeat(repeat('x', 4000), 4000), 4000))"),
        ("lpad", "SELECT length(lpad('x', 2147483647))"),
        ("rpad of rows", "SELECT sum(length(rpad(name, 1000000))) FROM t"),
        ("array_repeat", "SELECT array_repeat(1, 1000000000)"),
        ("string_agg", "SELECT string_agg(name, repeat(',', 1000)) FROM t"),
        ("replace", "SELECT length(replace(repeat('a', 1000000), 'a', repeat('b', 1000000)))"),
        ("regexp_replace", "SELECT length(regexp_replace(repeat('a', 1000000), '', repeat('b', 1000000), 'g'))"),
        ("||", appended.as_str()),
        (
            "array_to_string",
            "SELECT length(array_to_string(string_to_array(repeat('a,', 500000), ','), repeat('b', 1000)))",
        ),
        (
            "array_replace_all",
            "SELECT cardinality(array_replace_all(string_to_array(repeat('a,', 500000), ','), 'a', repeat('b', 2000)))",
        ),
        ("lists of lists", lists.as_str()),
        ("lists joined", joined.as_str()),
        ("records of records", records.as_str()),
        ("a pattern too large", "SELECT 'a' ~ '((a{1,1000}){1,1000}){1,1000}'"),
        ("the same for rows", "SELECT name ~ '((a{1,1000}){1,1000}){1,1000}' FROM t"),
        ("a pattern that others backtrack on", "SELECT repeat('a', 30000) ~ '(a*)*(a*)*(a*)*b$'"),
        ("levenshtein", "SELECT levenshtein(repeat('a', 100000), repeat('b', 100000))"),
        ("levenshtein of rows", "SELECT levenshtein(repeat(name, 10000), repeat(name, 10001)) FROM t"),
        ("long texts sorted", "SELECT repeat(a.name, 2000) AS x FROM t a, t b ORDER BY x LIMIT 1000000"),
        ("long texts gathered", "SELECT array_agg(repeat(a.name, 100)) FROM t a, t b"),
        ("a power", "SELECT power(10, 100000), exp(100000)"),
        ("a factorial", "SELECT factorial(1000)"),
    ] {
        bench.ended(what, sql, json!([]), HERE).await;
    }
    bench.end().await;
}

/// The work of a pattern grows by its wildcards and by the length of the text, and nothing interrupts it: so they are
/// counted before anything is compared, and a deadline is no answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn patterns_of_many_wildcards_are_refused_at_once() {
    let bench = Bench::new().await;
    for (what, sql) in [
        ("a pattern of wildcards", format!("SELECT '{}' LIKE '{}b'", "a".repeat(20_000), "%a".repeat(10_000))),
        ("the same for rows", format!("SELECT count(*) FROM t WHERE name LIKE '{}b'", "%n".repeat(10_000))),
    ] {
        bench.refused(what, &sql, AT_ONCE, LIMIT).await;
    }
    let params = json!(["a".repeat(400_000), format!("{}b", "%a".repeat(100_000))]);
    bench.ends("a pattern that is a parameter", "SELECT $1 LIKE $2", params, AT_ONCE, LIMIT, false).await;
    bench.end().await;
}

/// No file is looked at: one that is there is answered as one that is not.
#[tokio::test]
async fn files_are_out_of_reach() {
    let bench = Bench::new().await;
    let folder = tempfile::tempdir().unwrap();
    let (there, target) = (folder.path().join("there.csv"), folder.path().join("target.csv"));
    std::fs::write(&there, "a\n1\n").unwrap();
    let mut told = Vec::new();
    for path in [there.clone(), folder.path().join("not-there.csv"), "/etc/passwd".into(), "file:///etc/passwd".into()]
    {
        let path = path.display().to_string();
        let failure = bench.db.try_sql(&format!("SELECT * FROM '{path}'"), json!([])).await.expect_err(&path);
        let detail = failure.body["detail"].as_str().unwrap_or_default().replace(&path, "…");
        told.push((failure.status, failure.body["code"].clone(), detail));
    }
    told.dedup();
    assert_eq!(told.len(), 1, "{told:?}");
    for sql in [
        format!("COPY t TO '{}'", target.display()),
        format!("COPY (SELECT 1) TO '{}' STORED AS CSV", target.display()),
        format!("CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '{}'", there.display()),
        "SET datafusion.execution.batch_size = 1".to_owned(),
        "PREPARE p AS SELECT 1".to_owned(),
        format!("SELECT * FROM read_csv('{}')", there.display()),
    ] {
        bench.refused(&sql, &sql, AT_ONCE, &[(400, "unsupported")]).await;
    }
    assert!(!target.exists());
    bench.end().await;
}

/// Sorting and grouping more than their share goes to disk, and more than the disk's share fails, by name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_query_that_fills_its_spill_space_fails_alone() {
    let bench = Bench::with(LONG).await;
    let spill = bench.server.data_dir().join("spill");
    let mut named = 0;
    for sql in [
        "SELECT a.id, b.name FROM t a, t b ORDER BY b.name, a.id",
        "SELECT a.id * 2000 + b.id AS x, count(*) FROM t a, t b GROUP BY x",
        "SELECT count(*) OVER (PARTITION BY b.id ORDER BY a.id) FROM t a, t b",
    ] {
        let failure = bench.db.try_sql(sql, json!([])).await.expect_err("four million rows do not fit");
        let detail = failure.body["detail"].as_str().unwrap_or_default();
        let expected = failure.status == Some(400) && failure.body["code"] == "limit";
        assert!(expected && detail.contains("sql."), "{sql}: {failure:?}");
        named += usize::from(detail.contains("sql.spill_bytes"));
        // At once: the bystander's writes go on all the time.
        bench.db.sql("UPDATE t SET name = name WHERE id = 1").await;
    }
    assert!(named > 0, "none of them came as far as the disk");
    until_idle(&bench.db).await;
    assert_eq!(files_in(&spill), Vec::<String>::new(), "spill files that nobody needs any more");
    // What fits is done, also after that.
    let fits = "SELECT count(*) FROM (SELECT a.id AS x FROM t a JOIN t b ON a.id % 100 = b.id GROUP BY a.id) y";
    assert_eq!(bench.db.rows(fits).await, json!([[ROWS]]));
    bench.end().await;
}

fn files_in(folder: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_in(&path));
        } else {
            found.push(path.display().to_string());
        }
    }
    found
}

/// In the middle of the result, in every format: nothing goes on for those who have left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_go_mid_result_leave_nothing_behind() {
    const TIMES: usize = 50;
    // A result that nobody takes is given up half a minute after the deadline.
    const SOON: Duration = Duration::from_secs(20);
    let bench = Bench::with(LONG).await;
    let formats = ["application/json", "application/x-ndjson", "text/csv", "application/vnd.apache.arrow.stream"];
    for round in 0..TIMES {
        let request = bench.db.request(Method::POST, "/v1/sql").header(header::ACCEPT, formats[round % formats.len()]);
        let body = json!({"sql": "SELECT a.id, b.name FROM t a, t b"});
        let mut response = request.json(&body).timeout(PATIENCE).send().await.expect("an answer");
        assert_eq!(response.status(), 200);
        let first = response.chunk().await.expect("it arrives").expect("a first piece");
        assert!(!first.is_empty());
    }
    let idle = until_idle(&bench.db).await;
    assert!(idle < SOON, "it took {idle:?} to notice that nobody listens");
    bench.end().await;
}
