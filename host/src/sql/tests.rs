//! SQL against a real store, one line a statement: what it answers, or the error's message.

use std::sync::Arc;
use std::time::Duration;

use ::arrow::util::display::array_value_to_string;
use futures::StreamExt;
use tempfile::TempDir;
use wire::ImageRef;

use super::session::Sql;
use super::*;
use crate::store::{Store, StoreOptions, Transaction};

/// 2026-01-02T03:04:05Z
const NOW: i64 = 1_767_323_045_000_000;

struct Bench {
    sql: Arc<Sql>,
    store: Store,
    _dir: TempDir,
}

fn bench_with(change: impl FnOnce(&mut SqlOptions)) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&StoreOptions {
        path: dir.path().join("store"),
        write_buffer_size: 1 << 20,
        max_write_buffers: 2,
        block_cache_size: 8 << 20,
        max_background_jobs: 2,
        max_open_files: 64,
        max_commit_bytes: 16 << 20,
        log_commits: 1000,
        ..StoreOptions::new(dir.path())
    })
    .unwrap();
    store.start(Box::new(|_| {}));
    let mut options = SqlOptions {
        memory_bytes: 64 << 20,
        spill_bytes: 64 << 20,
        spill_dir: dir.path().join("spill"),
        deadline: Duration::from_secs(30),
        batch_rows: 8192,
        target_partitions: 2,
        plan_cache_bytes: 1 << 20,
        heavy_queries: 2,
        heavy_queue: 4,
    };
    change(&mut options);
    Bench { sql: Arc::new(Sql::new(options, Vec::new()).unwrap()), store, _dir: dir }
}

fn bench() -> Bench {
    bench_with(|_| {})
}

impl Bench {
    fn env(&self, user: &str, params: &[Param]) -> RequestEnv {
        let env = RequestEnv::new(self.store.snapshot(), user, Role::Admin);
        RequestEnv { params: Arc::new(params.to_vec()), now: NOW, ..env }
    }

    /// Every statement of `text` on its own, the last one's answer.
    async fn run_as(&self, user: &str, text: &str, params: &[Param]) -> Result<String, SqlError> {
        let mut answer = String::new();
        for statement in self.sql.parse(text)?.iter() {
            let env = self.env(user, params);
            let base = env.snapshot.seq();
            answer = match statement.kind {
                StatementKind::Query => show(self.sql.query(statement, env, false).await?).await?,
                StatementKind::Dml => {
                    let namespace = env.catalog.namespace("main").unwrap().id;
                    let changes = self.sql.change_set(statement, env).await?;
                    let affected = changes.affected;
                    let rows = changes.writes;
                    self.store
                        .commit(Transaction { namespace, base, rows, catalog: Vec::new(), receipt: None })
                        .await
                        .unwrap();
                    match changes.returned {
                        Some(returned) => format!("affected {affected}: {}", show(self.sql.returned(returned)).await?),
                        None => format!("affected {affected}"),
                    }
                }
                StatementKind::Ddl => {
                    let plan = self.sql.ddl(statement, &env)?;
                    if let Some(namespace) = plan.namespace.filter(|_| !plan.writes.is_empty()) {
                        let catalog = plan.writes;
                        self.store
                            .commit(Transaction { namespace, base, rows: Vec::new(), catalog, receipt: None })
                            .await
                            .unwrap();
                    }
                    plan.summary
                }
            };
        }
        Ok(answer)
    }

    async fn run(&self, text: &str) -> String {
        self.run_as("alice", text, &[]).await.unwrap_or_else(|error| format!("ERROR {error}"))
    }

    async fn with(&self, text: &str, params: &[Param]) -> String {
        self.run_as("alice", text, params).await.unwrap_or_else(|error| format!("ERROR {error}"))
    }

    /// Whether a statement is one by key; and what it would write and return, or why not. Nothing is committed.
    async fn outcome(&self, text: &str, params: &[Param]) -> (bool, String) {
        let env = self.env("alice", params);
        let statement = self.sql.parse(text).unwrap()[0].clone();
        let by_key = dml::by_key::row(&statement, &env).is_some();
        let outcome = match self.sql.change_set(&statement, env).await {
            Err(error) => format!("ERROR {error}"),
            Ok(changes) => {
                let writes = changes.writes.iter().map(|write| (&write.scope, &write.key, &write.old, &write.new));
                let writes = format!("{} {:?}", changes.affected, writes.collect::<Vec<_>>());
                match changes.returned {
                    Some(returned) => writes + &show(self.sql.returned(returned)).await.unwrap(),
                    None => writes,
                }
            }
        };
        (by_key, outcome)
    }

    async fn script(&self, lines: &[(&str, &str)]) {
        for (text, expected) in lines {
            assert_eq!(self.run(text).await, *expected, "{text}");
        }
    }
}

/// Rows as `a|b` lines; checks that batches are what their columns say.
async fn show(mut stream: RowStream) -> Result<String, SqlError> {
    let mut rows = Vec::new();
    while let Some(batch) = stream.batches.next().await {
        let batch = batch?;
        for (array, column) in batch.columns().iter().zip(&stream.columns) {
            assert_eq!(*array.data_type(), arrow::arrow_type(column.ty), "{}", column.name);
        }
        for row in 0..batch.num_rows() {
            let cells = batch.columns().iter().map(|array| match array.is_null(row) {
                true => "NULL".to_owned(),
                false => array_value_to_string(array, row).unwrap(),
            });
            rows.push(cells.collect::<Vec<_>>().join("|"));
        }
    }
    Ok(rows.join(" "))
}

const FLIGHTS: &str = "CREATE TABLE flights (id INT PRIMARY KEY, carrier TEXT NOT NULL, dep_delay INT, dist DOUBLE)";
const SOME: &str =
    "INSERT INTO flights VALUES (1, 'AA', 5, 100), (2, 'UA', NULL, 250.5), (3, 'AA', -3, 900), (4, 'B6', 61, 1)";

async fn some_flights() -> Bench {
    let bench = bench();
    bench.run(FLIGHTS).await;
    bench.run(SOME).await;
    bench
}

#[tokio::test(flavor = "multi_thread")]
async fn write_and_read() {
    let bench = bench();
    bench
        .script(&[
            (FLIGHTS, "CREATE TABLE main.flights"),
            (SOME, "affected 4"),
            ("SELECT * FROM flights", "1|AA|5|100.0 2|UA|NULL|250.5 3|AA|-3|900.0 4|B6|61|1.0"),
            ("SELECT id FROM flights WHERE dep_delay > 0 ORDER BY id DESC", "4 1"),
            (
                "SELECT carrier, count(*), sum(dist) FROM flights GROUP BY carrier ORDER BY 1",
                "AA|2|1000.0 B6|1|1.0 UA|1|250.5",
            ),
            ("SELECT a.id FROM flights a JOIN flights b ON a.id = b.id + 1 WHERE b.carrier = 'AA' ORDER BY 1", "2 4"),
            ("SELECT id FROM flights WHERE dist = (SELECT max(dist) FROM flights)", "3"),
            ("SELECT DISTINCT ON (carrier) carrier, id FROM flights ORDER BY carrier, id", "AA|1 B6|4 UA|2"),
            (
                "UPDATE flights SET dep_delay = dep_delay + 10, carrier = lower(carrier) WHERE carrier = 'AA'",
                "affected 2",
            ),
            ("SELECT id, carrier, dep_delay FROM flights", "1|aa|15 2|UA|NULL 3|aa|7 4|B6|61"),
            ("UPDATE flights AS f SET dist = DEFAULT WHERE f.id = 4", "affected 1"),
            ("SELECT dist FROM flights WHERE id = 4", "NULL"),
            ("DELETE FROM flights WHERE 1 = 0", "affected 0"),
            ("DELETE FROM flights WHERE id IN (SELECT id FROM flights WHERE dep_delay > 60)", "affected 1"),
            ("INSERT INTO flights (carrier, id) SELECT 'ZZ', id + 10 FROM flights", "affected 3"),
            ("SELECT id, carrier FROM flights WHERE id > 3", "11|ZZ 12|ZZ 13|ZZ"),
            ("SELECT count(*) FROM flights", "6"),
            ("SELECT 1 FROM flights LIMIT 2", "1 1"),
            ("SELECT id FROM flights ORDER BY id LIMIT 1 OFFSET 1", "2"),
            ("DELETE FROM flights", "affected 6"),
            ("SELECT * FROM flights", ""),
            ("DROP TABLE flights", "DROP TABLE main.flights"),
            (
                "SELECT * FROM flights",
                "ERROR there is no table \"flights\" in namespace \"main\"; SHOW TABLES lists those that there are",
            ),
        ])
        .await;
    assert_eq!(bench.sql.contexts_created(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn key_changes_and_constraints() {
    let bench = bench();
    bench
        .script(&[
            (FLIGHTS, "CREATE TABLE main.flights"),
            (SOME, "affected 4"),
            (
                "INSERT INTO flights VALUES (4, 'XX', 1, 1)",
                "ERROR table \"flights\" has a row with the key (id) = (4) already",
            ),
            (
                "INSERT INTO flights VALUES (9, 'XX', 1, 1), (9, 'YY', 1, 1)",
                "ERROR table \"flights\" has a row with the key (id) = (9) already",
            ),
            (
                "INSERT INTO flights VALUES (9, NULL, 1, 1)",
                "ERROR column \"carrier\" of table \"flights\" must not be NULL",
            ),
            ("UPDATE flights SET id = NULL WHERE id = 1", "ERROR column \"id\" of table \"flights\" must not be NULL"),
            ("INSERT INTO flights (id) VALUES (9)", "ERROR column \"carrier\" of table \"flights\" must not be NULL"),
            ("INSERT INTO flights VALUES (9, 'XX')", "ERROR 2 values for 4 columns"),
            ("INSERT INTO flights (id, nope) VALUES (9, 'XX')", "ERROR table \"flights\" has no column \"nope\""),
            (
                "INSERT INTO flights VALUES (3000000000, 'XX', 1, 1)",
                "ERROR \"3000000000\" does not fit into column \"id\" (INT)",
            ),
            ("INSERT INTO flights VALUES (1.5, 'XX', 1, 1)", "ERROR \"1.5\" does not fit into column \"id\" (INT)"),
            ("INSERT INTO flights VALUES ('x', 'XX', 1, 1)", "ERROR \"x\" does not fit into column \"id\" (INT)"),
            ("INSERT INTO flights VALUES (true, 'XX', 1, 1)", "ERROR column \"id\" is INT, but the value is BOOLEAN"),
            (
                "UPDATE flights SET dep_delay = 99999999999 WHERE id = 1",
                "ERROR \"99999999999\" does not fit into column \"dep_delay\" (INT)",
            ),
            // Every key moves onto its neighbour: the old keys are gone before the new ones are checked.
            ("UPDATE flights SET id = id + 1", "affected 4"),
            ("SELECT id, carrier FROM flights", "2|AA 3|UA 4|AA 5|B6"),
            (
                "UPDATE flights SET id = 5 WHERE id = 2",
                "ERROR table \"flights\" has a row with the key (id) = (5) already",
            ),
            ("UPDATE flights SET id = 7", "ERROR table \"flights\" has a row with the key (id) = (7) already"),
            ("UPDATE flights SET dist = b.id FROM flights b", "ERROR UPDATE … FROM is not supported"),
            ("DELETE FROM flights USING flights b WHERE true", "ERROR DELETE … USING is not supported"),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn returning_shows_what_was_written() {
    let bench = bench();
    bench
        .script(&[
            (FLIGHTS, "CREATE TABLE main.flights"),
            (
                "INSERT INTO flights VALUES (1, 'AA', 5, 100), (2, 'UA', NULL, 250.5) RETURNING *",
                "affected 2: 1|AA|5|100.0 2|UA|NULL|250.5",
            ),
            (
                "INSERT INTO flights (id, carrier) SELECT id + 2, 'AA' FROM flights RETURNING id * 10 AS tens, current_user, now()",
                "affected 2: 30|alice|2026-01-02T03:04:05Z 40|alice|2026-01-02T03:04:05Z",
            ),
            (
                "UPDATE flights SET dist = coalesce(dist, 0) + 1, id = id + 1 RETURNING id, dist, flights.carrier || '!' AS c",
                "affected 4: 2|101.0|AA! 3|251.5|UA! 4|1.0|AA! 5|1.0|AA!",
            ),
            // What is written as it was is returned too.
            ("UPDATE main.flights AS f SET carrier = 'AA' WHERE f.id = 4 RETURNING f.id, f.carrier", "affected 1: 4|AA"),
            ("UPDATE flights SET carrier = 'X' WHERE false RETURNING id", "affected 0: "),
            ("DELETE FROM flights WHERE dist > 200 RETURNING id, dist", "affected 1: 3|251.5"),
            ("DELETE FROM flights AS f WHERE f.id = (SELECT max(id) FROM flights) RETURNING f.*", "affected 1: 5|AA|NULL|1.0"),
            ("DELETE FROM flights WHERE id = 2 RETURNING 1 + 1", "affected 1: 2"),
            ("SELECT id FROM flights", "4"),
            ("DELETE FROM flights RETURNING (SELECT 1)", "ERROR a sub-query in RETURNING is not supported"),
            ("DELETE FROM flights RETURNING count(*)", "ERROR an aggregate function in RETURNING is not supported"),
            ("DELETE FROM flights RETURNING row_number() OVER ()", "ERROR a window function in RETURNING is not supported"),
            ("DELETE FROM flights RETURNING 1 / (id - 4)", "ERROR division by zero"),
            ("SELECT id FROM flights", "4"),
            ("CREATE TABLE log (at TIMESTAMP DEFAULT now(), n INT)", "CREATE TABLE main.log"),
            ("INSERT INTO log (n) VALUES (7) RETURNING at, n, _id IS NULL", "affected 1: 2026-01-02T03:04:05Z|7|false"),
            ("INSERT INTO log DEFAULT VALUES RETURNING at, n", "affected 1: 2026-01-02T03:04:05Z|NULL"),
        ])
        .await;
    let unknown = bench.run_as("alice", "DELETE FROM flights RETURNING nope", &[]).await;
    assert!(
        matches!(unknown, Err(SqlError::Invalid { code: "unknown_column", position: Some(30), .. })),
        "{unknown:?}"
    );
    // A column keeps its type: a UUID is one, not TEXT.
    let env = bench.env("alice", &[Param::Int(5)]);
    let statement = bench.sql.parse("INSERT INTO log (n) VALUES ($1) RETURNING _id, n + $1 AS sum").unwrap()[0].clone();
    let returned = bench.sql.change_set(&statement, env).await.unwrap().returned.unwrap();
    let types: Vec<wire::Type> = returned.columns.iter().map(|column| column.ty).collect();
    assert_eq!(types, [wire::Type::Uuid, wire::Type::BigInt]);
    assert_eq!(returned.columns[1].name, "sum");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_conflict_does_nothing_or_updates() {
    let bench = bench();
    bench
        .script(&[
            ("CREATE TABLE t (a TEXT, b INT, n INT NOT NULL DEFAULT 1, at TIMESTAMP, PRIMARY KEY (a, b))", "CREATE TABLE main.t"),
            ("INSERT INTO t VALUES ('x', 1, 10, NULL) ON CONFLICT DO NOTHING RETURNING n", "affected 1: 10"),
            ("INSERT INTO t VALUES ('x', 1, 11, NULL), ('x', 2, 20, NULL), ('x', 2, 21, NULL) ON CONFLICT DO NOTHING RETURNING n",
             "affected 1: 20"),
            ("INSERT INTO t (a, b) VALUES ('x', 1) ON CONFLICT (b, a) DO NOTHING", "affected 0"),
            // The stored row by its bare names or the table's, the proposed one as excluded, defaults in it.
            ("INSERT INTO t (a, b) VALUES ('x', 1), ('y', 1) ON CONFLICT (a, b) DO UPDATE SET n = n + excluded.n, at = now() RETURNING a, b, n, at",
             "affected 2: y|1|1|NULL x|1|11|2026-01-02T03:04:05Z"),
            ("INSERT INTO t SELECT a, b, n * 100, NULL FROM t ON CONFLICT (a, b) DO UPDATE SET n = excluded.n - t.n, at = DEFAULT WHERE t.n < 20",
             "affected 2"),
            ("SELECT a, b, n FROM t", "x|1|1089 x|2|20 y|1|99"),
            // What the condition leaves alone may not even be possible to evaluate.
            ("INSERT INTO t VALUES ('x', 1, 0, NULL), ('y', 1, 3, NULL) ON CONFLICT (a, b) DO UPDATE SET n = 300 / excluded.n WHERE excluded.n > 0",
             "affected 1"),
            ("SELECT n FROM t WHERE a = 'y'", "100"),
            ("INSERT INTO t VALUES ('z', 1, 1, NULL), ('z', 1, 2, NULL) ON CONFLICT (a, b) DO UPDATE SET n = 0",
             "ERROR DO UPDATE meets the same row twice in one statement: give each key once"),
            ("INSERT INTO t VALUES ('x', 2, 1, NULL), ('x', 2, 2, NULL) ON CONFLICT (a, b) DO UPDATE SET n = 0",
             "ERROR DO UPDATE meets the same row twice in one statement: give each key once"),
            // A key may be changed by it.
            ("INSERT INTO t VALUES ('x', 2, 1, NULL) ON CONFLICT (a, b) DO UPDATE SET b = 5 RETURNING b, n", "affected 1: 5|20"),
            ("INSERT INTO t VALUES ('x', 5, 1, NULL) ON CONFLICT (a, b) DO UPDATE SET b = 1",
             "ERROR table \"t\" has a row with the key (a, b) = (x, 1) already"),
            ("SELECT a, b FROM t", "x|1 x|5 y|1"),
            ("INSERT INTO t VALUES ('x', 1, NULL, NULL) ON CONFLICT DO NOTHING", "ERROR column \"n\" of table \"t\" must not be NULL"),
            ("INSERT INTO t VALUES ('x', 1, 1, NULL) ON CONFLICT (a, b) DO UPDATE SET n = NULL",
             "ERROR column \"n\" of table \"t\" must not be NULL"),
            ("INSERT INTO t VALUES ('x', 1, 1, NULL) ON CONFLICT (a) DO NOTHING",
             "ERROR no key of \"t\" has exactly these columns; unique there are (a, b)"),
            ("INSERT INTO t VALUES ('x', 1, 1, NULL) ON CONFLICT DO UPDATE SET n = 1",
             "ERROR say which key: ON CONFLICT (a, b) DO UPDATE …"),
            ("INSERT INTO t VALUES ('x', 1, 1, NULL) ON CONFLICT (a, b) DO UPDATE SET n = (SELECT 1)",
             "ERROR a sub-query in DO UPDATE is not supported"),
            ("INSERT INTO t VALUES ('x', 1, 1, NULL) ON CONFLICT (a, b) DO UPDATE SET n = 1 WHERE n",
             "ERROR WHERE in DO UPDATE is INT, not BOOLEAN"),
            ("INSERT INTO t VALUES ('x', 1, 1, NULL) ON DUPLICATE KEY UPDATE n = 1",
             "ERROR ON DUPLICATE KEY UPDATE is not supported: say ON CONFLICT (key) DO UPDATE SET …"),
            ("INSERT INTO t SELECT 1, 2 WHERE false", "ERROR 2 values for 4 columns"),
        ])
        .await;
    let unknown = "INSERT INTO t (a, b) VALUES ('x', 1) ON CONFLICT (a, nope) DO NOTHING";
    let outcome = bench.run_as("alice", unknown, &[]).await;
    assert!(
        matches!(outcome, Err(SqlError::Invalid { code: "unknown_column", position: Some(53), .. })),
        "{outcome:?}"
    );
    let typed = "INSERT INTO t (a, b) VALUES ($1, $2) ON CONFLICT (a, b) DO UPDATE SET n = $3 + t.n RETURNING n";
    assert_eq!(
        bench.with(typed, &[Param::Text("x".to_owned()), Param::Int(1), Param::Int(1)]).await,
        "affected 1: 1090"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_there_and_back() {
    let bench = bench();
    bench.run(
        "CREATE TABLE t (k SMALLINT PRIMARY KEY, b BOOLEAN, i INT, l BIGINT, r REAL, d DOUBLE PRECISION, n DECIMAL(20,4), \
         s TEXT, y BYTEA, dt DATE, tm TIME, ts TIMESTAMP, u UUID, j JSON)",
    )
    .await;
    let row = "INSERT INTO t VALUES (1, true, -5, 9007199254740993, 1.5, 2.25, 1234567890123456.7891, 'hé', '\\x00ff', \
               '2013-01-31', '23:59:59.000001', '2013-01-01T05:00:00-05:00', '67E55044-10B1-426F-9247-BB680E5FE0C8', \
               '{\"a\": [1, 2]}')";
    let shown = "1|true|-5|9007199254740993|1.5|2.25|1234567890123456.7891|hé|00ff|2013-01-31|23:59:59.000001|\
                 2013-01-01T10:00:00Z|67e55044-10b1-426f-9247-bb680e5fe0c8|{\"a\": [1, 2]}";
    bench
        .script(&[
            (row, "affected 1"),
            ("SELECT * FROM t", shown),
            ("INSERT INTO t (k) VALUES (2)", "affected 1"),
            ("SELECT * FROM t WHERE k = 2", &("2".to_owned() + &"|NULL".repeat(13))),
            ("SELECT k FROM t WHERE ts = '2013-01-01 10:00:00' AND dt < now() AND ts < now()", "1"),
            ("SELECT k FROM t WHERE ts = TIMESTAMP '2013-01-01 10:00:00'", "1"),
            ("SELECT k FROM t WHERE u = '67e55044-10b1-426f-9247-bb680e5fe0c8' AND dt = DATE '2013-01-31'", "1"),
            (
                "SELECT date_trunc('day', ts), extract(hour FROM ts), ts + INTERVAL '1 day' FROM t WHERE k = 1",
                "2013-01-01T00:00:00Z|10|2013-01-02T10:00:00Z",
            ),
            ("SELECT now(), current_user, current_date", "2026-01-02T03:04:05Z|alice|2026-01-02"),
            ("UPDATE t SET ts = now() WHERE k = 2", "affected 1"),
            ("SELECT ts FROM t WHERE k = 2", "2026-01-02T03:04:05Z"),
            ("INSERT INTO t (k, u) VALUES (3, 'x')", "ERROR \"x\" does not fit into column \"u\" (UUID)"),
            ("INSERT INTO t (k, j) VALUES (3, '{')", "ERROR \"{\" does not fit into column \"j\" (JSON)"),
            (
                "INSERT INTO t (k, dt) VALUES (3, '2013-02-30')",
                "ERROR \"2013-02-30\" does not fit into column \"dt\" (DATE)",
            ),
            ("INSERT INTO t (k, r) VALUES (3, 1e300)", "ERROR \"1e300\" does not fit into column \"r\" (REAL)"),
            ("INSERT INTO t (k, n) VALUES (3, 1e30)", "ERROR \"1e30\" does not fit into column \"n\" (DECIMAL(20,4))"),
            ("SELECT [1, 2], {a: 1.5, b: 'x'}, CAST(5 AS BIGINT UNSIGNED)", "[1,2]|{\"a\":1.5,\"b\":\"x\"}|5"),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters() {
    let bench = some_flights().await;
    bench.run("CREATE TABLE t (id UUID PRIMARY KEY, at TIMESTAMP, n DECIMAL(10,2))").await;
    let (int, text) = (Param::Int, |text: &str| Param::Text(text.to_owned()));
    let id = "67e55044-10b1-426f-9247-bb680e5fe0c8";
    let cases: Vec<(&str, Vec<Param>, &str)> = vec![
        ("SELECT id FROM flights WHERE id = $1", vec![int(3)], "3"),
        ("SELECT id FROM flights WHERE id = $1", vec![text("3")], "3"),
        ("SELECT id FROM flights WHERE dist > $1 AND carrier = $2", vec![Param::Float(200.0), text("AA")], "3"),
        ("SELECT $1 + 1, $2, $3", vec![int(1), text("x"), Param::Null], "2|x|NULL"),
        ("SELECT id FROM flights LIMIT $1", vec![int(1)], "1"),
        ("SELECT id FROM flights WHERE carrier = $1", vec![text("' OR 1=1 --")], ""),
        (
            "INSERT INTO t VALUES ($1, $2, $3)",
            vec![text(id), text("2020-01-01T00:00:00Z"), text("12.345")],
            "affected 1",
        ),
        ("INSERT INTO t VALUES (uuid(), $1, $2)", vec![Param::Null, Param::Float(0.1)], "affected 1"),
        (
            "SELECT at, n FROM t WHERE id = $1 AND at <= $2",
            vec![text(id), text("2020-01-01")],
            "2020-01-01T00:00:00Z|12.35",
        ),
        ("UPDATE t SET n = $1 WHERE id = $2", vec![int(7), text(id)], "affected 1"),
        ("SELECT n FROM t WHERE id = $1", vec![text(id)], "7.00"),
        ("SELECT $2", vec![int(1)], "ERROR parameter $2 is used, but 1 were sent"),
    ];
    for (query, params, expected) in cases {
        assert_eq!(bench.with(query, &params).await, expected, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn users_see_their_own_rows_only() {
    let bench = bench();
    bench.run("CREATE TABLE notes (id INT PRIMARY KEY, text TEXT) WITH (type = 'user')").await;
    for user in ["al", "alice", "al:ice"] {
        let insert = "INSERT INTO notes SELECT 1, current_user";
        assert_eq!(bench.run_as(user, insert, &[]).await.unwrap(), "affected 1");
    }
    for user in ["al", "alice", "al:ice"] {
        let all = "SELECT text, (SELECT count(*) FROM notes) FROM notes JOIN (SELECT id AS i FROM notes) ON i = id";
        assert_eq!(bench.run_as(user, all, &[]).await.unwrap(), format!("{user}|1"));
    }
    assert_eq!(bench.run_as("al", "DELETE FROM notes", &[]).await.unwrap(), "affected 1");
    assert_eq!(bench.run("SELECT count(*) FROM notes").await, "1");
    assert_eq!(bench.run_as("nobody", "SELECT * FROM notes", &[]).await.unwrap(), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn generated_keys_and_defaults() {
    let bench = bench();
    bench
        .script(&[
            ("CREATE TABLE log (at TIMESTAMP NOT NULL DEFAULT now(), who TEXT DEFAULT current_user, n DECIMAL(6,2) DEFAULT -1.25, \
              id UUID DEFAULT uuid(), s TEXT DEFAULT 'it''s')", "CREATE TABLE main.log"),
            ("INSERT INTO log (s) VALUES ('a'), ('b')", "affected 2"),
            ("INSERT INTO log VALUES (DEFAULT, DEFAULT, DEFAULT, DEFAULT, DEFAULT)", "affected 1"),
            ("SELECT at, who, n, s FROM log", "2026-01-02T03:04:05Z|alice|-1.25|a 2026-01-02T03:04:05Z|alice|-1.25|b 2026-01-02T03:04:05Z|alice|-1.25|it's"),
            ("SELECT count(DISTINCT _id), count(DISTINCT id) FROM log", "3|3"),
            ("INSERT INTO log (_id) VALUES ('67e55044-10b1-426f-9247-bb680e5fe0c8')", "ERROR column \"_id\" is filled by the server"),
            ("DESCRIBE log",
             "_id|UUID|NO|NULL|YES at|TIMESTAMP|NO|now()|NO who|TEXT|YES|current_user|NO n|DECIMAL(6,2)|YES|-1.25|NO id|UUID|YES|uuid()|NO s|TEXT|YES|'it''s'|NO"),
            ("CREATE NAMESPACE logs", "CREATE NAMESPACE logs"),
            ("CREATE TABLE logs.a (x INT)", "CREATE TABLE logs.a"),
            ("SHOW TABLES", "main|log|shared logs|a|shared"),
            ("SELECT table_schema, count(*) FROM information_schema.columns GROUP BY 1 ORDER BY 1", "logs|2 main|6"),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ddl_takes_and_refuses_by_name() {
    let bench = bench();
    let long = format!("CREATE TABLE {} (a INT)", "t".repeat(64));
    bench
        .script(&[
            (
                "CREATE TABLE IF NOT EXISTS t (a INT, B TEXT, PRIMARY KEY (b, a)) WITH (type = 'shared')",
                "CREATE TABLE main.t",
            ),
            ("CREATE TABLE IF NOT EXISTS t (a INT)", "table \"t\" exists already in namespace \"main\""),
            ("CREATE TABLE t (a INT)", "ERROR table \"t\" exists already in namespace \"main\""),
            ("CREATE TABLE nope.t (a INT)", "ERROR there is no namespace \"nope\""),
            ("CREATE TABLE u (a INT, a TEXT)", "ERROR column \"a\" is there twice"),
            ("CREATE TABLE u (a INT, PRIMARY KEY (b))", "ERROR the primary key names \"b\", which is no column"),
            (
                "CREATE TABLE u (a INT PRIMARY KEY, b INT PRIMARY KEY)",
                "ERROR a table has one primary key: for several columns, PRIMARY KEY (a, b)",
            ),
            ("CREATE TABLE u (a VARCHAR(20))", "ERROR the type VARCHAR(20) is not supported: TEXT has no length limit"),
            (
                "CREATE TABLE u (a DECIMAL(39, 2))",
                "ERROR DECIMAL(precision, scale): 1 to 38 digits, the scale at most as many",
            ),
            ("CREATE TABLE u (a INT UNIQUE DEFERRABLE)", "ERROR DEFERRABLE is not supported"),
            ("CREATE TABLE u (a JSON UNIQUE)", "ERROR a JSON column in an index is not supported"),
            ("CREATE TABLE u (a INT, UNIQUE (a, b))", "ERROR table \"u\" has no column \"b\""),
            ("CREATE TABLE u (a INT, UNIQUE (a, a))", "ERROR the index names \"a\" twice"),
            ("CREATE TABLE u (a INT UNIQUE, CONSTRAINT x UNIQUE (a), UNIQUE (a))", "CREATE TABLE main.u"),
            (
                "CREATE TABLE v (a INT, CONSTRAINT x UNIQUE (a))",
                "ERROR index \"x\" exists already in namespace \"main\"",
            ),
            ("DROP INDEX u_a_key", "DROP INDEX main.u_a_key"),
            ("DROP INDEX main.u_a_key1", "DROP INDEX main.u_a_key1"),
            ("DROP INDEX IF EXISTS u_a_key", "there is no index \"u_a_key\" in namespace \"main\""),
            ("DROP TABLE u", "DROP TABLE main.u"),
            ("DROP INDEX x", "ERROR there is no index \"x\" in namespace \"main\""),
            ("CREATE TABLE u (a INT CHECK (a > 0))", "ERROR CHECK is not supported"),
            ("CREATE TABLE u (a INT REFERENCES t (a))", "ERROR REFERENCES is not supported"),
            (
                "CREATE TABLE u (a INT) WITH (type = 'stream')",
                "ERROR a stream table needs a time to live: WITH (type = 'stream', ttl = '1h')",
            ),
            (
                "CREATE TABLE u (a INT) WITH (ttl = '1h')",
                "ERROR only rows of stream tables have a time to live: say type = 'stream', or leave ttl out",
            ),
            (
                "CREATE TABLE u (a INT) WITH (type = 'stream', ttl = '1 fortnight')",
                "ERROR ttl is how long a row lives, up to a hundred years: a number and ms, s, m, h or d, as in '90s', '1h', '7d'",
            ),
            ("CREATE TABLE s (a INT PRIMARY KEY) WITH (type = stream, ttl = '1 h')", "CREATE TABLE main.s"),
            ("SELECT name, type, ttl_ms FROM system.tables WHERE name = 's'", "s|stream|3600000"),
            ("INSERT INTO s VALUES (1), (2)", "affected 2"),
            ("UPDATE s SET a = a + 10", "affected 2"),
            ("SELECT a FROM s", "11 12"),
            ("DROP TABLE s", "DROP TABLE main.s"),
            (
                "CREATE TABLE u (a INT) WITH (size = 3)",
                "ERROR the table option size is not supported: there are type and ttl",
            ),
            ("CREATE TABLE u AS SELECT 1", "ERROR CREATE TABLE … AS SELECT is not supported"),
            ("CREATE TEMPORARY TABLE u (a INT)", "ERROR CREATE TEMPORARY is not supported"),
            ("CREATE TABLE u (a INT DEFAULT 'x')", "ERROR \"x\" does not fit into column \"a\" (INT)"),
            ("CREATE TABLE u (a INT DEFAULT now())", "ERROR DEFAULT now() does not fit column \"a\" (INT)"),
            (
                "CREATE TABLE u (a INT DEFAULT (1 + 1))",
                "ERROR DEFAULT (1 + 1) is not supported: there are literals, now(), uuid() and current_user",
            ),
            ("CREATE TABLE u (_id INT)", "ERROR the column name \"_id\" is reserved"),
            (
                &long,
                &format!("ERROR {:?} cannot name a table: 1 to 63 bytes without control characters", "t".repeat(64)),
            ),
            ("CREATE SCHEMA system", "ERROR the namespace \"system\" is reserved"),
            ("CREATE SCHEMA x", "CREATE NAMESPACE x"),
            ("CREATE SCHEMA IF NOT EXISTS x", "namespace x exists already"),
            ("CREATE TABLE x.t (a INT)", "CREATE TABLE x.t"),
            ("DROP SCHEMA x", "ERROR namespace \"x\" is not empty (1 tables, 0 plugins): drop those first"),
            ("DROP SCHEMA x CASCADE", "ERROR CASCADE is not supported"),
            ("DROP TABLE x.t", "DROP TABLE x.t"),
            ("DROP NAMESPACE x", "DROP NAMESPACE x"),
            ("DROP NAMESPACE IF EXISTS x", "there is no namespace x"),
            ("DROP NAMESPACE main", "ERROR the namespace \"main\" cannot be dropped"),
            ("DROP TABLE IF EXISTS nope", "there is no table nope"),
            (
                "DROP TABLE nope",
                "ERROR there is no table \"nope\" in namespace \"main\"; SHOW TABLES lists those that there are",
            ),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn key_ranges_reach_the_scan() {
    let bench = bench();
    bench.run("CREATE TABLE t (a TEXT, b INT, c INT, PRIMARY KEY (a, b))").await;
    bench
        .run("INSERT INTO t VALUES ('x', 1, 1), ('x', 2, 2), ('x', 3, 3), ('xy', 1, 4), ('y', -1, 5), ('y', 2, 6)")
        .await;
    let cases = [
        ("a = 'x'", "keys=[a = \"x\"]", "1 2 3"),
        ("a = 'x' AND b = 2", "keys=[a = \"x\" AND b = 2]", "2"),
        ("a = 'x' AND b > 1 AND b <= 3", "keys=[a = \"x\" AND b >= 1 AND b <= 3]", "2 3"),
        // Without an upper bound the range ends where the beginning of the key does.
        ("a = 'x' AND b > 1", "keys=[a = \"x\" AND b >= 1]", "2 3"),
        ("a = 'y' AND b < 0", "keys=[a = \"y\" AND b < 0]", "5"),
        ("a IN ('y', 'x') AND b BETWEEN 2 AND 9", "b >= 2 AND b <= 9]", "2 3 6"),
        ("a > 'x'", "keys=[a >= \"x\"]", "4 5 6"),
        ("a = 'x' AND b > 3 AND b < 2", "", ""),
        ("b = 1", "keys=[all]", "1 4"),
        ("c = 4", "keys=[all]", "4"),
        ("a = 'x' OR c = 6", "keys=[all]", "1 2 3 6"),
    ];
    for (filter, keys, rows) in cases {
        assert_eq!(bench.run(&format!("SELECT c FROM t WHERE {filter}")).await, rows, "{filter}");
        let plan = bench.run(&format!("EXPLAIN SELECT c FROM t WHERE {filter}")).await;
        assert!(plan.contains(keys), "{filter}: {plan}");
    }
    let plan = bench.run("EXPLAIN SELECT c FROM t LIMIT 2").await;
    assert!(plan.contains("limit=2"), "{plan}");
    // The scan's order is the key's: nothing is sorted.
    let plan = bench.run("EXPLAIN SELECT * FROM t ORDER BY a, b").await;
    assert!(!plan.contains("SortExec"), "{plan}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_sees_its_own_writes() {
    let bench = some_flights().await;
    let mut env = bench.env("alice", &[]);
    for text in [
        "INSERT INTO flights VALUES (0, 'NEW', 1, 1), (10, 'NEW', 1, 1)",
        "DELETE FROM flights WHERE id IN (1, 4)",
        "UPDATE flights SET carrier = 'UP' WHERE id IN (0, 2)",
    ] {
        let statement = bench.sql.parse(text).unwrap()[0].clone();
        let changes = bench.sql.change_set(&statement, env.clone()).await.unwrap();
        let mut overlay = (*env.overlay).clone();
        for write in changes.writes {
            overlay.rows.entry((write.table.id, write.scope)).or_default().insert(write.key, write.new);
        }
        env.overlay = Arc::new(overlay);
    }
    let query = async |text: &str| {
        let statement = bench.sql.parse(text).unwrap()[0].clone();
        show(bench.sql.query(&statement, env.clone(), false).await.unwrap()).await.unwrap()
    };
    assert_eq!(query("SELECT id, carrier FROM flights").await, "0|UP 2|UP 3|AA 10|NEW");
    assert_eq!(query("SELECT id FROM flights WHERE id > 1 AND id < 10").await, "2 3");
    assert_eq!(query("SELECT id FROM flights LIMIT 2").await, "0 2");
    assert_eq!(bench.run("SELECT count(*) FROM flights").await, "4");
}

/// The first rows are read in place, the others by a thread: together they are all rows, each once and in order.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_rows_and_the_rest_are_all_rows() {
    let bench = bench();
    bench.run("CREATE TABLE t (id INT PRIMARY KEY, n INT)").await;
    let ids = |ids: &mut dyn Iterator<Item = usize>| ids.map(|id| id.to_string()).collect::<Vec<_>>();
    assert_eq!(bench.run("SELECT id FROM t").await, "");
    let mut there = 0;
    for rows in [1, 127, 128, 129, 700, 2_000] {
        let new: Vec<String> = (there..rows).map(|id| format!("({id}, {})", id % 3)).collect();
        bench.run(&format!("INSERT INTO t VALUES {}", new.join(", "))).await;
        there = rows;
        assert_eq!(bench.run("SELECT id FROM t").await, ids(&mut (0..rows)).join(" "), "{rows} rows");
        for limit in [0, 1, 127, 128, 129, 640] {
            let limited = bench.run(&format!("SELECT id FROM t LIMIT {limit}")).await;
            assert_eq!(limited, ids(&mut (0..rows.min(limit))).join(" "), "{limit} of {rows} rows");
        }
        let third = bench.run("SELECT id FROM t WHERE n = 1").await;
        assert_eq!(third, ids(&mut (0..rows).filter(|id| id % 3 == 1)).join(" "), "of {rows} rows");
    }
    // More ranges than are searched in place; and rows behind many that were deleted.
    let keys = ids(&mut (0..2_000).step_by(50));
    let listed = bench.run(&format!("SELECT id FROM t WHERE id IN ({})", keys.join(", "))).await;
    assert_eq!(listed, keys.join(" "));
    bench.run("DELETE FROM t WHERE id BETWEEN 10 AND 1899").await;
    assert_eq!(bench.run("SELECT id FROM t").await, ids(&mut (0..10).chain(1_900..2_000)).join(" "));
    assert_eq!(bench.run("SELECT id FROM t WHERE id > 50 LIMIT 2").await, "1900 1901");
}

#[tokio::test(flavor = "multi_thread")]
async fn index_ranges_reach_the_scan_and_find_the_transactions_own_rows() {
    let bench = bench();
    bench
        .script(&[
            (
                "CREATE TABLE t (id INT PRIMARY KEY, a INT, b TEXT, c DOUBLE, UNIQUE (a, b), CONSTRAINT ci UNIQUE (c))",
                "CREATE TABLE main.t",
            ),
            (
                "INSERT INTO t VALUES (1, 1, 'x', 0.0), (2, 1, 'y', -1.5), (3, 2, 'x', 2.5), (4, NULL, 'x', NULL), (5, 3, NULL, 4)",
                "affected 5",
            ),
        ])
        .await;
    let cases = [
        ("a = 1", "index=t_a_b_key, keys=[a = 1]", "1 2"),
        ("a = 1 AND b = 'y'", "index=t_a_b_key, keys=[a = 1 AND b = \"y\"]", "2"),
        ("a = 1 AND b > 'x'", "index=t_a_b_key, keys=[a = 1 AND b >= \"x\"]", "2"),
        ("a IN (1, 2) AND b = 'x'", "index=t_a_b_key, keys=[a = one of 2", "1 3"),
        ("a < 3", "index=t_a_b_key, keys=[a < 3]", "1 2 3"),
        ("a >= 2", "index=t_a_b_key, keys=[a >= 2]", "3 5"),
        ("c = 0", "index=ci, keys=[c = 0]", "1"),
        ("c < 2.5", "index=ci", "1 2"),
        ("a = 1 AND c > 100", "index=t_a_b_key, keys=[a = 1]", ""),
        ("a > 0 AND id = 3", ": main.t, keys=[id = 3]", "3"),
        ("id < 3 AND a > 1", ": main.t, keys=[id < 3]", ""),
        ("b = 'x'", "keys=[all]", "1 3 4"),
        ("a IS NULL", "index=t_a_b_key, keys=[a IS NULL]", "4"),
        ("a = 1 OR b = 'x'", "keys=[all]", "1 2 3 4"),
    ];
    for (filter, plan, rows) in cases {
        let explained = bench.run(&format!("EXPLAIN SELECT id FROM t WHERE {filter}")).await;
        assert!(explained.contains(plan), "{filter}: {explained}");
        assert_eq!(bench.run(&format!("SELECT id FROM t WHERE {filter} ORDER BY id")).await, rows, "{filter}");
    }
    // Rows in key order need no sort; rows by an index do.
    let sorts = async |sql: &str| bench.run(&format!("EXPLAIN {sql} ORDER BY id")).await.contains("SortExec");
    assert!(!sorts("SELECT id FROM t WHERE id > 2").await);
    assert!(sorts("SELECT id FROM t WHERE a > 1").await);

    let mut env = bench.env("alice", &[]);
    for text in [
        "INSERT INTO t VALUES (10, 1, 'z', 7)",
        "UPDATE t SET a = 1 WHERE a = 2",
        "DELETE FROM t WHERE a = 1 AND b = 'y'",
        "INSERT INTO t VALUES (11, 2, 'x', 2.5) ON CONFLICT (c) DO UPDATE SET c = 9",
    ] {
        let statement = bench.sql.parse(text).unwrap()[0].clone();
        match bench.sql.change_set(&statement, env.clone()).await {
            Ok(changes) => {
                let mut overlay = (*env.overlay).clone();
                for write in changes.writes {
                    overlay.rows.entry((write.table.id, write.scope)).or_default().insert(write.key, write.new);
                }
                env.overlay = Arc::new(overlay);
            }
            // Row 3 would be a second (1, 'x').
            Err(error) => {
                assert!(error.to_string().contains("(a, b) = (1, x)") && text.starts_with("UPDATE"), "{error}")
            }
        }
    }
    let query = async |text: &str| {
        let statement = bench.sql.parse(text).unwrap()[0].clone();
        show(bench.sql.query(&statement, env.clone(), false).await.unwrap()).await.unwrap()
    };
    assert_eq!(query("SELECT id FROM t WHERE a = 1 ORDER BY id").await, "1 10");
    assert_eq!(query("SELECT id, c FROM t WHERE c > 5 ORDER BY id").await, "3|9.0 10|7.0");
    assert_eq!(query("SELECT id FROM t WHERE a = 1 AND b = 'y'").await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_say_what_and_where() {
    let bench = bench();
    bench.run(FLIGHTS).await;
    let cases = [
        ("SELECT nope FROM flights", "unknown_column", Some(7)),
        ("SELECT * FROM nope", "unknown_table", None),
        ("SELECT * FROM x.nope", "unknown_namespace", None),
        ("SELECT * FROM '/etc/passwd'", "unknown_table", None),
        ("SELECT nope(1)", "unknown_function", None),
        ("SELECT id + carrier FROM flights", "type_mismatch", None),
        ("SELECT * FROM flights WHERE", "syntax", None),
        ("SELECT 1 / 0", "division_by_zero", None),
        ("UPDATE flights SET nope = 1", "unknown_column", Some(19)),
    ];
    for (text, expected, at) in cases {
        match bench.run_as("alice", text, &[]).await {
            Err(SqlError::Invalid { code, position, .. }) => {
                assert_eq!(code, expected, "{text}");
                assert!(at.is_none() || position == at, "{text}: {position:?}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold() {
    let roomy = bench();
    let bench = bench_with(|options| {
        // Enough for `SELECT 1` on the busiest machine.
        options.deadline = Duration::from_secs(3);
        options.memory_bytes = 1 << 20;
        options.spill_bytes = 1 << 20;
    });
    for text in [
        "SELECT repeat('x', 2147483647)",
        "SELECT length(lpad('x', 2147483647))",
        "SELECT repeat(repeat('x', 1000000), 1000000)",
        &format!("SELECT {}", vec!["repeat('x', 1000000)"; 60].join(" || ")),
        &format!("SELECT concat({})", vec!["repeat('x', 1000000)"; 30].join(", ")),
        "SELECT replace(repeat('a', 1000000), 'a', repeat('b', 1000000))",
    ] {
        let started = std::time::Instant::now();
        let outcome = roomy.run_as("alice", text, &[]).await;
        println!("{:?} for {}", started.elapsed(), text.chars().take(60).collect::<String>());
        assert!(
            matches!(outcome, Err(SqlError::Limit(_))),
            "{}: {outcome:.200?}",
            text.chars().take(60).collect::<String>()
        );
    }
    assert_eq!(roomy.run("SELECT repeat('ab', 3), lpad('7', 3, '0')").await, "ababab|007");
    assert_eq!(
        roomy.run("SELECT length(repeat('x', 1000000)) + length(x) FROM (VALUES (repeat('y', 10000))) AS t(x)").await,
        "1010000"
    );
    let joined = "SELECT 'a' || 1 || NULL, 'a' || x || 'c', [1] || 2 FROM (VALUES ('b'), ('d')) AS t(x)";
    assert_eq!(roomy.run(joined).await, "NULL|abc|[1,2] NULL|adc|[1,2]");
    // A million rows from nothing: the memory pool or the deadline ends what is heavy.
    let ten = "(VALUES (0),(1),(2),(3),(4),(5),(6),(7),(8),(9))";
    let product: Vec<String> = (0..8).map(|at| format!("{ten} AS t{at}(c{at})")).collect();
    let heavy = format!("SELECT count(DISTINCT c0 + c1 * 10 + c2 * 100 + c3 * random()) FROM {}", product.join(", "));
    let outcome = bench.run_as("alice", &heavy, &[]).await;
    assert!(matches!(outcome, Err(SqlError::Limit(_) | SqlError::Deadline(_))), "{outcome:?}");
    assert_eq!(bench.run("SELECT 1").await, "1");
}

/// A parameter is no number yet when the plan is made that all executions share; a live query has its value.
#[tokio::test(flavor = "multi_thread")]
async fn decimals_beside_parameters_that_are_doubles() {
    let bench = bench();
    bench.run("CREATE TABLE t (id INT PRIMARY KEY, d DECIMAL(20,2), p DECIMAL(38,0))").await;
    let rows = "(1, 1.25, 99999999999999999999999999999999999999), (2, 100000000000000, 5), (3, NULL, NULL)";
    bench.run(&format!("INSERT INTO t VALUES {rows}")).await;
    let images = images(&bench, "t");
    let rows = parsed(&images);
    for (filter, value, ids) in [
        ("d = $1", 1e14, "2"),
        ("d = $1", 1.25, "1"),
        ("d = $1", 1.255, ""),
        ("d < $1", 1e20, "1 2"),
        ("d IN ($1, 7)", 1.25, "1"),
        ("d BETWEEN $1 AND 1e14", -1e300, "1 2"),
        ("p > $1", 5.5, "1"),
        ("p <> $1", 1e300, "1 2"),
        ("NOT d > $1", 1e-30, ""),
    ] {
        let params = [Param::Float(value)];
        let found = bench.with(&format!("SELECT id FROM t WHERE {filter} ORDER BY id"), &params).await;
        assert_eq!(found, ids, "{filter}, {value}");
        let plan = bench.incremental(&format!("SELECT id FROM t WHERE {filter}"), &bench.env("alice", &params));
        let live = plan.matches(&rows).unwrap().into_iter().zip(1..).filter_map(|(hit, id)| hit.then_some(id));
        let live: Vec<String> = live.map(|id: i64| id.to_string()).collect();
        assert_eq!(live.join(" "), ids, "{filter}, {value}: live");
    }
    // Without a cast around the column, a change asks only the live queries that it can concern.
    let plan = bench.incremental("SELECT id FROM t WHERE d = $1", &bench.env("alice", &[Param::Float(1.25)]));
    assert!(matches!(plan.anchors, crate::catalog::Anchors::OneOf(_)));
}

/// A LIMIT over a filter reads as many rows at first as it may need, then more where they are, and the rest on a thread:
/// none twice, none passed over.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_over_a_filter_reads_on_until_it_has_enough() {
    for batch_rows in [8_192, 50] {
        let bench = bench_with(|options| options.batch_rows = batch_rows);
        bench.run("CREATE TABLE t (id INT PRIMARY KEY)").await;
        let rows: Vec<String> = (0..2_000).map(|id| format!("({id})")).collect();
        bench.run(&format!("INSERT INTO t VALUES {}", rows.join(", "))).await;
        for every in [1, 2, 7, 130, 999] {
            for (limit, skip) in [(1, 0), (8, 0), (20, 3), (63, 0), (64, 1), (65, 0), (200, 5), (3_000, 0)] {
                let shown = format!("SELECT id FROM t WHERE id % {every} = 0 LIMIT {limit} OFFSET {skip}");
                let wanted = (0..2_000).step_by(every).skip(skip).take(limit).map(|id| id.to_string());
                assert_eq!(bench.run(&shown).await, wanted.collect::<Vec<_>>().join(" "), "{shown}");
            }
        }
    }
}

/// A join keeps the batches of its left side. Where they have no columns they seemed to weigh nothing, and millions of
/// them were gigabytes outside of the pool.
#[tokio::test(flavor = "multi_thread")]
async fn batches_without_columns_weigh_something() {
    let bench = bench_with(|options| {
        options.deadline = Duration::from_secs(10);
        options.memory_bytes = 1 << 20;
        options.batch_rows = 64;
    });
    bench.run("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let rows: Vec<String> = (0..1_000).map(|id| format!("({id})")).collect();
    assert_eq!(bench.run(&format!("INSERT INTO t VALUES {}", rows.join(", "))).await, "affected 1000");
    // What the second join keeps are the 16,000 batches of the first.
    let outcome = bench.run_as("alice", "SELECT count(*) FROM t a, t b, t c", &[]).await;
    assert!(matches!(outcome, Err(SqlError::Limit(_))), "{outcome:?}");
    // The first join keeps 16.
    assert_eq!(bench.run("SELECT count(*) FROM t a, t b").await, "1000000");
}

/// Expressions print columns by their bare names (and a comparison of two columns with the later one in front): who asked
/// for either got what was compiled for whoever had come first.
#[tokio::test]
async fn a_column_that_is_called_like_an_expression_is_not_taken_for_it() {
    let bench = bench();
    bench.run("CREATE TABLE t (a INT, b INT, \"b > a\" BOOLEAN PRIMARY KEY); INSERT INTO t VALUES (1, 2, false)").await;
    let images = images(&bench, "t");
    let rows = parsed(&images);
    let env = bench.env("alice", &[]);
    let more = bench.incremental("SELECT a < b AS x FROM t", &env);
    let column = bench.incremental("SELECT \"b > a\" AS x FROM t", &env);
    for (plan, x) in [(&more, "true"), (&column, "false")] {
        let shown = |batch: RecordBatch| array_value_to_string(batch.column(0), 0).unwrap();
        assert_eq!(shown(plan.project(&rows).unwrap()), x);
        assert_eq!(shown(plan.keys(&rows).unwrap()), "false");
    }
    assert_ne!(more.fingerprint, column.fingerprint);
}

/// DataFusion's functions panic now and then; this one does where its stride leaves the range of its index. On a thread
/// that many live queries share that ended all of them, and every one that came later.
#[tokio::test(flavor = "multi_thread")]
async fn a_function_that_panics_is_an_error_of_its_live_query() {
    let bench = some_flights().await;
    let images = images(&bench, "flights");
    let rows = parsed(&images);
    let env = bench.env("alice", &[]);
    let panics = "array_length(array_slice(make_array(id, id, id), 2, 3, 2147483647))";
    let plan = bench.incremental(&format!("SELECT id FROM flights WHERE {panics} = 1"), &env);
    let told = |error: SqlError| error.to_string();
    assert!(told(plan.matches(&rows).unwrap_err()).contains("panicked"));
    assert!(told(live::LivePlan::matches_each(&[(&plan, &rows)]).unwrap_err()).contains("panicked"));
    let plan = bench.incremental(&format!("SELECT id, {panics} AS x FROM flights"), &env);
    assert!(told(plan.project(&rows).unwrap_err()).contains("panicked"));
}

/// A hundred calls, each as long as one may take: a minute of a thread that others wait for, for each row.
#[tokio::test(flavor = "multi_thread")]
async fn the_functions_of_a_live_query_have_to_end() {
    let bench = some_flights().await;
    let images = images(&bench, "flights");
    let rows = parsed(&images[..1]);
    let long = Param::Text("x".repeat(15_000));
    let env = bench.env("alice", &[long.clone(), long]);
    let calls: Vec<String> = (0..100).map(|n| format!("levenshtein(carrier || $1 || '{n}', $2) > 0")).collect();
    let plan = bench.incremental(&format!("SELECT id FROM flights WHERE {}", calls.join(" AND ")), &env);
    let before = crate::telemetry::thread_cpu();
    let error = plan.matches(&rows).unwrap_err().to_string();
    let took = crate::telemetry::thread_cpu() - before;
    assert!(error.contains("took longer than 1s of CPU time"), "{error}");
    // The limit, and the call that was under way. All of them would take a minute.
    assert!(took < Duration::from_secs(20), "{took:?}");
}

/// It made two rows of one, without a word.
#[tokio::test(flavor = "multi_thread")]
async fn an_update_makes_one_row_of_one() {
    let bench = bench();
    bench.run("CREATE TABLE t (id BIGINT PRIMARY KEY, v BIGINT); INSERT INTO t VALUES (1, 7)").await;
    for set in ["id = unnest(make_array(5, 6))", "v = 1 + unnest(make_array(1, 2))", "v = unnest(make_array(1))"] {
        let answer = bench.run(&format!("UPDATE t SET {set} WHERE id = 1")).await;
        assert!(answer.contains("unnest in SET is not supported"), "{set}: {answer}");
    }
    let chosen = "UPDATE t SET v = 8 WHERE id IN (SELECT unnest(make_array(1, 2)))";
    assert_eq!(bench.run(chosen).await, "affected 1");
    assert_eq!(bench.run("SELECT * FROM t").await, bench.run("SELECT 1 AS id, 8 AS v").await);
}

/// 0.0 = -0.0: they were two rows with one primary key.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_has_one_zero() {
    let bench = bench();
    bench.run("CREATE TABLE t (d DOUBLE PRIMARY KEY, v INT); INSERT INTO t VALUES (-0.0, 1)").await;
    assert!(bench.run("INSERT INTO t VALUES (0.0, 2)").await.contains("has a row with the key"));
    assert_eq!(
        bench.run("INSERT INTO t VALUES (0.0, 3) ON CONFLICT (d) DO UPDATE SET v = excluded.v").await,
        "affected 1"
    );
    let only = bench.run("SELECT CAST(0.0 AS DOUBLE) AS d, 3 AS v").await;
    for filter in ["", "WHERE d = 0.0", "WHERE d = -0.0", "WHERE d >= 0.0", "WHERE d <= -0.0"] {
        assert_eq!(bench.run(&format!("SELECT * FROM t {filter}")).await, only, "{filter}");
    }
    assert_eq!(bench.run("UPDATE t SET d = -0.0").await, "affected 1");
    assert_eq!(bench.run("SELECT * FROM t").await, only);
    assert_eq!(bench.run("UPDATE t SET d = 1.5; UPDATE t SET d = -0.0; SELECT * FROM t").await, only);
}

/// It was said to be there, and then a duplicate was found and it was not.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_being_built_is_not_there_yet() {
    let bench = bench();
    bench.run("CREATE TABLE t (id INT PRIMARY KEY, v INT); INSERT INTO t VALUES (1, 7), (2, 7)").await;
    // Nobody builds it here.
    bench.run("CREATE UNIQUE INDEX u ON t (v)").await;
    let statements = bench.sql.parse("CREATE UNIQUE INDEX IF NOT EXISTS u ON t (v)").unwrap();
    let answer = bench.sql.ddl(&statements[0], &bench.env("alice", &[]));
    assert!(matches!(&answer, Err(SqlError::Busy(told)) if told.contains("being built")), "{:?}", answer.err());
}

/// Constants that something is compared with are no part of what is compiled; all others are.
#[tokio::test(flavor = "multi_thread")]
async fn live_queries_of_one_shape_share_what_is_compiled() {
    let bench = some_flights().await;
    let images = images(&bench, "flights");
    let rows = parsed(&images);
    let env = bench.env("alice", &[]);
    for (one, other, shared) in [
        ("id = 1", "3 = id", true),
        ("id = 1", "id <> 1", false),
        ("id = 1", "id = 1", true),
        ("carrier = 'AA'", "carrier = 'UA'", true),
        ("carrier = 'AA' AND id < 3", "carrier = 'UA' AND id < 4", true),
        ("dist BETWEEN 1.0 AND 200.0", "dist BETWEEN 90.0 AND 1000.0", true),
        ("dist BETWEEN 1.0 AND 200.0", "dist NOT BETWEEN 1.0 AND 200.0", false),
        ("carrier LIKE '%A'", "carrier LIKE '%6'", false),
        ("id % 2 = 0", "id % 2 = 1", true),
        ("id % 2 = 0", "id % 3 = 0", false),
    ] {
        let plan = |filter: &str| bench.incremental(&format!("SELECT id, carrier FROM flights WHERE {filter}"), &env);
        let (one_plan, other_plan) = (plan(one), plan(other));
        assert_eq!(one_plan.shares_with(&other_plan), (shared, true), "{one} / {other}");
        let some = &rows[1..];
        let together = live::LivePlan::matches_each(&[(&one_plan, &rows[..]), (&other_plan, some)]).ok();
        let alone = [one_plan.matches(&rows).unwrap(), other_plan.matches(some).unwrap()].concat();
        assert_eq!(together, shared.then_some(alone), "{one} / {other}: asked together only where they share");
        for (plan, filter) in [(&one_plan, one), (&other_plan, other)] {
            let found: Vec<i64> =
                plan.matches(&rows).unwrap().into_iter().zip(1..).filter_map(|(hit, id)| hit.then_some(id)).collect();
            let ids: Vec<String> = found.iter().map(i64::to_string).collect();
            let due = bench.run(&format!("SELECT id FROM flights WHERE {filter} ORDER BY id")).await;
            assert_eq!(ids.join(" "), due, "{filter}");
        }
    }
}

fn parsed(images: &[Vec<u8>]) -> Vec<ImageRef<'_>> {
    images.iter().map(|image| ImageRef::parse(image).unwrap().0).collect()
}

fn images(bench: &Bench, table: &str) -> Vec<Vec<u8>> {
    let env = bench.env("alice", &[]);
    let table = env.catalog.table("main", table).unwrap();
    let mut scan = env.snapshot.scan(table, &Scope::Shared, crate::store::keys::KeyRange::all());
    let mut rows = Vec::new();
    while let Some((_, image)) = scan.next_row().unwrap() {
        rows.push(image.to_vec());
    }
    rows
}

#[tokio::test(flavor = "multi_thread")]
async fn live_queries_compile_and_match() {
    let bench = some_flights().await;
    let images = images(&bench, "flights");
    let rows = parsed(&images);
    let env = bench.env("alice", &[Param::Int(0), Param::Text("AA".to_owned())]);
    let cases = [
        ("SELECT * FROM flights", "1111", "id,carrier,dep_delay,dist"),
        ("SELECT id, dist * 2 AS twice FROM flights f WHERE f.dep_delay > $1", "1001", "id,twice"),
        ("SELECT upper(carrier) AS c FROM main.flights WHERE carrier = $2 AND dep_delay < 10", "1010", "c"),
        ("SELECT id FROM flights WHERE dep_delay IS NULL OR dep_delay IN (61, 62)", "0101", "id"),
        ("SELECT id FROM flights WHERE NOT (dep_delay > 0)", "0010", "id"),
        ("SELECT 1 AS one FROM flights WHERE false", "0000", "one"),
        ("SELECT id FROM flights WHERE carrier LIKE '%A' AND id BETWEEN 2 AND 3", "0110", "id"),
    ];
    for (text, matching, names) in cases {
        let plan = bench.incremental(text, &env);
        let verdicts: String = plan.matches(&rows).unwrap().iter().map(|hit| if *hit { '1' } else { '0' }).collect();
        assert_eq!(verdicts, matching, "{text}");
        let batch = plan.project(&rows).unwrap();
        assert_eq!(batch.num_rows(), 4);
        assert_eq!(plan.columns.iter().map(|column| column.name.as_str()).collect::<Vec<_>>().join(","), names);
        for (array, column) in batch.columns().iter().zip(&plan.columns) {
            assert_eq!(*array.data_type(), arrow::arrow_type(column.ty), "{text}");
        }
        assert!(plan.matches(&[]).unwrap().is_empty());
    }
    let same = [
        "SELECT id FROM flights WHERE dep_delay > 0",
        "select  f.id from main.flights as f where (0 < dep_delay)",
        "SELECT id FROM flights WHERE dep_delay > $1",
    ];
    let prints: Vec<u64> = same.iter().map(|text| bench.incremental(text, &env).fingerprint).collect();
    assert!(prints.windows(2).all(|pair| pair[0] == pair[1]), "{prints:?}");
    let other = bench.incremental("SELECT id FROM flights WHERE dep_delay > 1", &env).fingerprint;
    assert_ne!(prints[0], other);
    let error = bench.incremental("SELECT id FROM flights WHERE 1 / (dep_delay - 5) > 0", &env).matches(&rows);
    assert!(matches!(error, Err(SqlError::Invalid { code: "division_by_zero", .. })), "{error:?}");
}

impl Bench {
    /// With the first parameters, as many as the text uses.
    fn live(&self, text: &str, env: &RequestEnv) -> Result<live::Live, SqlError> {
        let used = (1..=env.params.len()).rev().find(|number| text.contains(&format!("${number}"))).unwrap_or(0);
        self.sql.live(text, &RequestEnv { params: Arc::new(env.params[..used].to_vec()), ..env.clone() })
    }

    fn incremental(&self, text: &str, env: &RequestEnv) -> live::LivePlan {
        match self.live(text, env).unwrap() {
            live::Live::Incremental(plan) => plan,
            live::Live::Requery(_) => panic!("{text} is run again as a whole"),
        }
    }

    /// What a live query that is run again gives: `key → row`, sorted.
    async fn requery(&self, text: &str) -> String {
        let env = self.env("alice", &[]);
        let live::Live::Requery(plan) = self.sql.live(text, &env).unwrap() else { panic!("{text} is incremental") };
        let result = self.sql.rerun(&Arc::new(plan), env, 1 << 20).await.unwrap();
        let shown = |batch: &RecordBatch, row: usize| {
            let cell = |at: usize| array_value_to_string(batch.column(at), row).unwrap();
            let named = |at: usize| format!("{}={}", batch.schema().field(at).name(), cell(at));
            (0..batch.num_columns()).map(named).collect::<Vec<_>>().join(",")
        };
        assert_eq!(result.keys.num_rows(), result.rows.num_rows());
        let rows = 0..result.rows.num_rows();
        let mut lines: Vec<String> =
            rows.map(|row| format!("{} → {}", shown(&result.keys, row), shown(&result.rows, row))).collect();
        lines.sort();
        lines.join("; ")
    }
}

/// What tells the rows of any SELECT apart.
#[tokio::test(flavor = "multi_thread")]
async fn queries_that_are_run_again_have_keys() {
    let bench = bench();
    bench.run("CREATE TABLE a (id INT PRIMARY KEY, x TEXT, n INT); CREATE TABLE b (id INT, k INT, of INT, PRIMARY KEY (id, k))").await;
    bench.run("INSERT INTO a VALUES (1, 'p', 10), (2, 'p', 20), (3, 'q', NULL)").await;
    bench.run("INSERT INTO b VALUES (1, 1, 1), (1, 2, 1), (2, 1, 3)").await;
    for (text, expected) in [
        // GROUP BY columns, also where the SELECT list has other names for them, or none.
        ("SELECT x, count(*) AS n FROM a GROUP BY x", "x=p → x=p,n=2; x=q → x=q,n=1"),
        ("SELECT x AS y, sum(n) AS s FROM a GROUP BY x HAVING count(*) > 1", "y=p → y=p,s=30"),
        ("SELECT count(*) AS n FROM a GROUP BY x", "x=p → n=2; x=q → n=1"),
        ("SELECT count(*) AS n FROM a", " → n=3"),
        ("SELECT count(*) AS c FROM a GROUP BY n % 20 ORDER BY n % 20 LIMIT 1", "a.n % Int64(20)=0 → c=1"),
        // Keys of tables, carried along.
        ("SELECT x FROM a ORDER BY n DESC NULLS LAST LIMIT 2", "id=1 → x=p; id=2 → x=p"),
        ("SELECT id AS i, row_number() OVER (ORDER BY id DESC) AS r FROM a ORDER BY i LIMIT 1", "i=1 → i=1,r=3"),
        ("SELECT x FROM a WHERE id IN (SELECT of FROM b)", "id=1 → x=p; id=3 → x=q"),
        ("SELECT x FROM (SELECT x, id FROM a WHERE n > 10) AS s WHERE x = 'p' LIMIT 9", "id=2 → x=p"),
        (
            "SELECT a.x, b.k FROM a JOIN b ON b.of = a.id",
            "a.id=1,b.id=1,k=1 → x=p,k=1; a.id=1,b.id=1,k=2 → x=p,k=2; a.id=3,b.id=2,k=1 → x=q,k=1",
        ),
        (
            "SELECT l.id, r.x FROM a l LEFT JOIN a r ON r.id = l.id + 1",
            "l.id=1,r.id=2 → id=1,x=p; l.id=2,r.id=3 → id=2,x=q; l.id=3,r.id= → id=3,x=",
        ),
        ("SELECT DISTINCT x FROM a", "x=p → x=p; x=q → x=q"),
        ("WITH s AS (SELECT x, max(n) AS m FROM a GROUP BY x) SELECT m FROM s WHERE m IS NOT NULL", "x=p → m=20"),
        ("SELECT x, (SELECT count(*) FROM b WHERE b.of = a.id) AS n FROM a WHERE id = 1", "id=1 → x=p,n=2"),
    ] {
        assert_eq!(bench.requery(text).await, expected, "{text}");
    }
    // Nothing proves a key: the row itself, and a number for rows that are equal.
    let union = bench.requery("SELECT x FROM a UNION ALL SELECT 'z' FROM b WHERE id = 2").await;
    let parts: Vec<&str> = union.split("; ").collect();
    assert_eq!(parts.len(), 4, "{union}");
    for (ending, times) in [("_n=0 → x=p", 1), ("_n=1 → x=p", 1), ("_n=0 → x=q", 1), ("_n=0 → x=z", 1)] {
        assert_eq!(parts.iter().filter(|part| part.ends_with(ending)).count(), times, "{ending} in {union}");
    }
    // The same plan said in other words has another text, but parameters and values tell queries apart.
    let env = bench.env("alice", &[Param::Int(1)]);
    let print = |text: &str| match bench.live(text, &env).unwrap() {
        live::Live::Requery(plan) => plan.fingerprint,
        live::Live::Incremental(_) => panic!("{text} is incremental"),
    };
    assert_eq!(print("SELECT count(*) AS n FROM a WHERE n > $1"), print("select COUNT(*) as n from a where (n>1)"));
    assert_ne!(print("SELECT count(*) AS n FROM a WHERE n > $1"), print("SELECT count(*) AS n FROM a WHERE n > 2"));
    assert_ne!(
        print("SELECT count(*) AS n FROM a WHERE x = 'a' OR x = 'b'"),
        print("SELECT count(*) AS n FROM a WHERE x = 'a'' OR x = ''b'")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_alone_does_not_matter_to_a_live_query() {
    let bench = bench();
    bench.run(FLIGHTS).await;
    let env = bench.env("alice", &[]);
    let prints = ["SELECT id FROM flights", "SELECT id FROM flights ORDER BY id DESC"]
        .map(|text| bench.incremental(text, &env).fingerprint);
    assert_eq!(prints[0], prints[1]);
}

/// On a quarter of what a thread for blocking work has. What does not fit ends this process.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_compiled_on_the_callers_thread_fits_its_stack() {
    let bench = bench();
    bench.run("CREATE TABLE t (id INT PRIMARY KEY, a INT)").await;
    let env = bench.env("alice", &[]);
    let derived = (0..3).fold("t".to_owned(), |from, at| {
        format!("(SELECT s{at}.id, max(s{at}.a) AS a FROM {from} s{at} GROUP BY s{at}.id ORDER BY a LIMIT {at})")
    });
    let link = |at: usize| format!(", c{at} AS (SELECT id, a + 1 AS a FROM c{} WHERE a > {at})", at - 1);
    let join = |at: usize| format!(" JOIN t t{at} ON t{at}.id = t{}.a", at - 1);
    for text in [
        format!("SELECT id FROM t WHERE a{} = 1", "+a".repeat(28)),
        format!("SELECT id FROM t WHERE {}a = 1", "NOT ".repeat(28)),
        format!("SELECT id FROM t WHERE a = 1{}", " OR a = 1".repeat(28)),
        format!("SELECT id FROM {derived} s"),
        format!("WITH c0 AS (SELECT * FROM t){} SELECT id FROM c10", (1..=10).map(link).collect::<String>()),
        format!("SELECT count(*) AS n FROM t t0{}", (1..=8).map(join).collect::<String>()),
        ["SELECT id FROM t"; 16].join(" UNION "),
        ["SELECT id FROM t"; 16].join(" EXCEPT "),
    ] {
        assert!(gate::check(&text).unwrap().shallow, "{text}");
        std::thread::scope(|scope| {
            let small = std::thread::Builder::new().stack_size(512 << 10);
            let compiling = small.spawn_scoped(scope, || bench.sql.live(&text, &env).map(|_| ())).unwrap();
            compiling.join().unwrap().unwrap_or_else(|error| panic!("{error} for {text}"));
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_live_is_refused_by_name() {
    let bench = bench();
    bench.run(FLIGHTS).await;
    let env = bench.env("alice", &[]);
    let cases = [
        ("VALUES (1)", "a query without a table as a live query is not supported: nothing could change it"),
        ("SELECT 1", "a query without a table as a live query is not supported: nothing could change it"),
        (
            "SELECT id FROM flights WHERE random() > 0.5",
            "random() in a live query is not supported: its rows must depend on the tables alone",
        ),
        (
            "SELECT id FROM flights WHERE now() > '2020-01-01'",
            "now() in a live query is not supported: its rows must depend on the tables alone",
        ),
        (
            "SELECT id, dist, carrier AS id FROM flights",
            "a live query's columns need different names, \"id\" is there twice: use AS",
        ),
        ("DELETE FROM flights", "anything but SELECT as a live query is not supported"),
        ("SELECT id FROM flights; SELECT 1", "a live query is one SELECT"),
        (
            "SELECT count(*) FROM flights WHERE EXISTS (SELECT 1 FROM flights WHERE random() > 0.5)",
            "random() in a live query is not supported: its rows must depend on the tables alone",
        ),
        (
            "SELECT table_name FROM information_schema.tables",
            "a live query over information_schema.tables is not supported: it is no stored table; query it",
        ),
        (
            "SELECT count(*) AS n FROM flights, information_schema.tables",
            "a live query over information_schema.tables is not supported: it is no stored table; query it",
        ),
        (
            "SELECT a.id, b.id FROM flights a, flights b",
            "a live query's columns need different names, \"id\" is there twice: use AS",
        ),
    ];
    for (text, expected) in cases {
        let error = bench.sql.live(text, &env).map(|_| ()).unwrap_err();
        assert_eq!(error.to_string(), expected, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_narrow_the_scan_of_a_kept_plan() {
    let bench = some_flights().await;
    let explain = |filter: &str| format!("EXPLAIN SELECT carrier FROM flights WHERE {filter}");
    for (filter, params, keys) in [
        ("id = $1 AND dist > 0", vec![Param::Int(3)], "keys=[id = 3]"),
        ("id >= $1 AND id < $2", vec![Param::Int(2), Param::Int(4)], "keys=[id >= 2 AND id < 4]"),
        ("id IN ($1, $2)", vec![Param::Int(4), Param::Int(1)], "keys=[id = one of 2"),
        ("dist > $1", vec![Param::Int(4)], "keys=[all]"),
    ] {
        let plan = bench.with(&explain(filter), &params).await;
        assert!(plan.contains(keys), "{filter}: {plan}");
    }
    let before = bench.sql.plan_counts();
    // The same text again and again, each time with values of its own.
    let sql = "SELECT id FROM flights WHERE id >= $1 AND carrier <> $2 ORDER BY id";
    for (least, carrier, rows) in [(1, "UA", "1 3 4"), (3, "UA", "3 4"), (1, "AA", "2 4"), (9, "", "")] {
        assert_eq!(bench.with(sql, &[Param::Int(least), Param::Text(carrier.to_owned())]).await, rows);
    }
    // Another type of a parameter is another plan.
    assert_eq!(bench.with(sql, &[Param::Float(2.5), Param::Text("AA".to_owned())]).await, "4");
    assert_eq!(bench.with(sql, &[Param::Null, Param::Text("AA".to_owned())]).await, "");
    let (hits, misses) = bench.sql.plan_counts();
    assert_eq!((hits - before.0, misses - before.1), (3, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lookup_is_what_the_planner_says() {
    let bench = bench();
    bench.run("CREATE TABLE k (a INT, b TEXT, u UUID, n INT, PRIMARY KEY (a, b, u))").await;
    let uuid = "6f2b1c1e-8a55-4b6f-9d3e-0123456789ab";
    bench.run(&format!("INSERT INTO k VALUES (1, 'x', '{uuid}', 10), (-1, '', '{uuid}', 20)")).await;
    let planned = |sql: &str| sql.replacen("WHERE", "WHERE true AND", 1);
    for condition in [
        format!("a = 1 AND b = 'x' AND u = '{uuid}'"),
        format!("a = -1 AND b = '' AND u = '{}'", uuid.to_uppercase()),
        format!("u = '{uuid}' AND (b = 'x' AND a = 1)"),
        "a = 1 AND b = 'x' AND u = 'no uuid'".to_owned(),
        format!("a = 4294967297 AND b = 'x' AND u = '{uuid}'"),
        format!("a = 1 AND b = 'y' AND u = '{uuid}'"),
    ] {
        for columns in ["*", "n", "n AS \"N\", b, u"] {
            let sql = format!("SELECT {columns} FROM k WHERE {condition}");
            let statement = bench.sql.parse(&sql).unwrap()[0].clone();
            assert!(lookup::find(&statement.ast, &bench.env("alice", &[])).is_some(), "{sql}");
            assert_eq!(bench.run(&sql).await, bench.run(&planned(&sql)).await, "{sql}");
        }
    }
    for sql in ["SELECT n FROM k WHERE a = 1", "SELECT n + 1 FROM k WHERE a = 1 AND b = 'x' AND u = ''", "SELECT 1"] {
        let statement = bench.sql.parse(sql).unwrap()[0].clone();
        assert!(lookup::find(&statement.ast, &bench.env("alice", &[])).is_none(), "{sql}");
    }
}

/// An UPDATE or DELETE by the whole key, and the same one with a condition that only the planner sees through: the same
/// writes to the byte, the same rows returned, the same errors.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_by_key_is_what_the_planner_says() {
    let bench = bench();
    let one = "6f2b1c1e-8a55-4b6f-9d3e-0123456789ab";
    bench
        .script(&[
            (
                "CREATE TABLE k (a INT, b TEXT, n INT NOT NULL DEFAULT 7, d DECIMAL(10, 2), at TIMESTAMP DEFAULT now(), \
                 u UUID UNIQUE, flag BOOLEAN, j JSON, who TEXT DEFAULT current_user, PRIMARY KEY (a, b))",
                "CREATE TABLE main.k",
            ),
            (
                "INSERT INTO k VALUES (1, 'x', 10, 1.5, NULL, '6f2b1c1e-8a55-4b6f-9d3e-0123456789ab', true, '{}', 'x'), \
                 (2, 'y', 20, NULL, '2024-02-29T12:00:00Z', '01234567-89ab-cdef-0123-456789abcdef', NULL, NULL, NULL)",
                "affected 2",
            ),
        ])
        .await;
    let taken = format!("u = '{one}'");
    let sets = [
        "n = 5",
        "n = -5",
        "n = 1.5",
        "n = '12'",
        "n = NULL",
        "n = 99999999999",
        "n = 9223372036854775808",
        "n = DEFAULT",
        "n = $1",
        "n = -$1",
        "n = n + 1",
        "n = n + $1",
        "n = 1 / 0",
        "n = n / (a - 1)",
        "n = CASE a WHEN 1 THEN 1 ELSE 1 / 0 END",
        "n = coalesce(n, 0) + length(b), b = upper(b)",
        "n = n * 2 + 1, d = n * 2 + 1",
        "n = (SELECT max(n) FROM k)",
        "n = count(*)",
        "n = nope",
        "n = nope(1)",
        "n = $3",
        "n = 1, n = 2",
        "n = b",
        "nope = 1",
        "d = 12345678.905",
        "d = 1e3",
        "d = d * 2",
        "at = DEFAULT",
        "at = now()",
        "at = current_date",
        "at = '2024-02-29 12:00:00+01:00'",
        "at = 5",
        "u = NULL",
        "u = 'no uuid'",
        taken.as_str(),
        "flag = NOT flag",
        "flag = 5",
        "j = '{\"a\": [1]}'",
        "j = 'no json'",
        "who = current_user",
        "who = DEFAULT, n = DEFAULT, d = DEFAULT",
        "who = b || $1",
        "a = 2, b = 'y'",
        "a = a + 10",
        "b = b || '!'",
        "b = NULL",
        "b = $1",
    ];
    let params = [Param::Int(3), Param::Float(2.5), Param::Text("4".to_owned()), Param::Bool(true), Param::Null];
    let changes = sets.iter().map(|set| format!("UPDATE k SET {set}")).chain(["DELETE FROM k".to_owned()]);
    for change in changes {
        let params = if change.contains('$') { &params[..] } else { &params[..1] };
        for condition in ["a = 1 AND b = 'x'", "b = 'y' AND (a = $2)", "a = 1 AND b = 'y'", "a = 5000000000 AND b = ''"]
        {
            for returning in ["", " RETURNING a, b, n, who"] {
                let fast = format!("{change} WHERE {condition}{returning}");
                let slow = format!("{change} WHERE true AND ({condition}){returning}");
                for param in params {
                    let params = [param.clone(), Param::Int(2)];
                    let (by_key, planned) = (bench.outcome(&fast, &params).await, bench.outcome(&slow, &params).await);
                    assert_eq!(by_key, (true, planned.1), "{fast} with {params:?}");
                    assert!(!planned.0, "{slow} was to be planned");
                }
            }
        }
    }
    // What is not the whole key, or not it alone, or not compared as keys are.
    for condition in [
        "a = 1",
        "a = 1 OR b = 'x'",
        "a = 1 AND b = 'x' AND n = 10",
        "a = 1 AND a = 1 AND b = 'x'",
        "a = '1' AND b = 'x'",
        "a = 1.0 AND b = 'x'",
        "a = 0 + 1 AND b = 'x'",
        "a >= 1 AND b = 'x'",
        "a = 1 AND NOT b = 'y'",
        "a = 1 AND b IN ('x')",
        "a = n AND b = 'x'",
    ] {
        assert!(!bench.outcome(&format!("DELETE FROM k WHERE {condition}"), &[]).await.0, "{condition}");
    }
    assert!(!bench.outcome("DELETE FROM k AS o WHERE a = 1 AND b = 'x'", &[]).await.0);
    assert!(!bench.outcome("DELETE FROM k", &[]).await.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_by_key_are_planned_once_or_not_at_all() {
    let bench = bench();
    bench.run("CREATE TABLE t (id INT PRIMARY KEY, n INT, who TEXT) WITH (type = 'user')").await;
    for user in ["alice", "bob"] {
        bench.run_as(user, "INSERT INTO t VALUES (1, 0, NULL), (2, 0, NULL)", &[]).await.unwrap();
    }
    let before = bench.sql.plan_counts();
    for id in 1..=9 {
        bench.with("UPDATE t SET n = $2, who = 'x' WHERE id = $1", &[Param::Int(id), Param::Int(id)]).await;
        bench.with("DELETE FROM t WHERE id = $1", &[Param::Int(id + 1)]).await;
    }
    assert_eq!(bench.sql.plan_counts(), before);
    assert_eq!(bench.run("SELECT * FROM t").await, "1|1|x");
    // Parameters, user and row are those of each execution, and a plan serves all.
    let text = "UPDATE t SET n = n * 10 + $2, who = current_user || $3 WHERE id = $1";
    let before = bench.sql.plan_counts();
    for (user, step) in [("alice", 1), ("bob", 2), ("alice", 3), ("bob", 4)] {
        let params = [Param::Int(1), Param::Int(step), Param::Text(format!(" {step}"))];
        assert_eq!(bench.run_as(user, text, &params).await.unwrap(), "affected 1");
    }
    assert_eq!(bench.sql.plan_counts(), (before.0 + 3, before.1 + 1));
    for (user, due) in [("alice", "1|113|alice 3"), ("bob", "1|24|bob 4 2|0|NULL")] {
        assert_eq!(bench.run_as(user, "SELECT * FROM t ORDER BY id", &[]).await.unwrap(), due);
    }
    // Another type of a parameter is another plan, and so is another table of the name.
    bench.with(text, &[Param::Int(1), Param::Text("5".to_owned()), Param::Null]).await;
    bench.run("DROP TABLE t; CREATE TABLE t (who TEXT, n BIGINT, id INT PRIMARY KEY)").await;
    bench.run("INSERT INTO t VALUES ('z', 5000000000, 1)").await;
    bench.with(text, &[Param::Int(1), Param::Int(9), Param::Text("!".to_owned())]).await;
    assert_eq!(bench.run("SELECT * FROM t").await, "alice!|50000000009|1");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_be_refused_is_known_without_planning() {
    let bench = bench();
    bench.run(FLIGHTS).await;
    let env = bench.env("alice", &[]);
    for (text, table) in [
        ("INSERT INTO flights SELECT * FROM nowhere", "flights"),
        ("UPDATE main.flights AS f SET nope = 1", "flights"),
        ("DELETE FROM flights WHERE false", "flights"),
        (
            "DELETE FROM nowhere",
            "ERROR there is no table \"nowhere\" in namespace \"main\"; SHOW TABLES lists those that there are",
        ),
    ] {
        let statement = bench.sql.parse(text).unwrap()[0].clone();
        let found = bench.sql.written_table(&statement, &env);
        let found = found.map_or_else(|error| format!("ERROR {error}"), |table| table.name.clone());
        assert_eq!(found, table, "{text}");
    }
}
