//! Schema changes: what ALTER TABLE does to rows that are there, to live queries, to positions; and that no mixture of
//! schema changes, row changes and restarts shows anything but what a simple model says.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};
use tests::fold::State;
use tests::live::seq;
use tests::{Client, Live, Options, TestServer};

#[tokio::test]
async fn columns_come_and_go_and_no_row_is_rewritten() {
    let mut server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, a TEXT, b INT)").await;
    db.sql("INSERT INTO t VALUES (1, 'one', 10), (2, NULL, 20)").await;
    db.sql("ALTER TABLE t ADD COLUMN c INT NOT NULL DEFAULT 7, ADD d TEXT, ADD COLUMN e TIMESTAMP DEFAULT now()").await;
    assert_eq!(
        db.rows("SELECT id, a, b, c, d FROM t ORDER BY id").await,
        json!([[1, "one", 10, 7, null], [2, null, 20, 7, null]])
    );
    // now() was evaluated once, for all rows alike.
    assert_eq!(db.rows("SELECT count(DISTINCT e), count(e) FROM t").await, json!([[1, 2]]));
    db.sql("INSERT INTO t (id) VALUES (3)").await;
    db.sql("UPDATE t SET c = 8, d = 'new' WHERE id = 1").await;
    // A filter finds what older rows are said to have.
    assert_eq!(db.rows("SELECT id FROM t WHERE c = 7 ORDER BY id").await, json!([[2], [3]]));

    db.sql("ALTER TABLE t DROP COLUMN b, DROP COLUMN IF EXISTS never").await;
    db.expect_error("SELECT b FROM t", 400, "unknown_column").await;
    // The name comes back; the values do not.
    db.sql("ALTER TABLE t ADD COLUMN b INT; ALTER TABLE t RENAME COLUMN a TO \"A b\"").await;
    let due = json!([[1, "one", 8, "new", null], [2, null, 7, null, null], [3, null, 7, null, null],]);
    let sql = "SELECT id, \"A b\", c, d, b FROM t ORDER BY id";
    assert_eq!(db.rows(sql).await, due);
    server.kill9();
    server.restart().await;
    assert_eq!(db.rows(sql).await, due);

    db.sql("ALTER TABLE t RENAME TO u").await;
    assert_eq!(db.rows("SELECT count(*) FROM u").await, json!([[3]]));
    db.expect_error("SELECT count(*) FROM t", 400, "unknown_table").await;
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[0]]));
    // Names are swapped in one commit.
    db.sql("ALTER TABLE t RENAME TO x; ALTER TABLE u RENAME TO t; ALTER TABLE x RENAME TO u").await;
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[3]]));
    assert_eq!(db.rows("SELECT count(*) FROM u").await, json!([[0]]));
    server.kill9();
    server.restart().await;
    assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[3]]));
    let columns = "SELECT column_name FROM information_schema.columns WHERE table_name = 't' ORDER BY ordinal_position";
    assert_eq!(db.rows(columns).await, json!([["id"], ["A b"], ["c"], ["d"], ["e"], ["b"]]));
}

#[tokio::test]
async fn what_alter_does_not_do_is_refused_by_name() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, a INT); CREATE TABLE u (a INT) WITH (type = 'user')").await;
    for (sql, code, named) in [
        ("ALTER TABLE t DROP COLUMN id", "unsupported", "primary key"),
        ("ALTER TABLE u DROP COLUMN _id", "unsupported", "primary key"),
        ("ALTER TABLE u DROP COLUMN a", "last_column", "last"),
        ("ALTER TABLE t DROP COLUMN nothing", "unknown_column", "there are: id, a"),
        ("ALTER TABLE t DROP COLUMN a CASCADE", "unsupported", "CASCADE"),
        ("ALTER TABLE t ADD COLUMN a INT", "duplicate_column", "already"),
        ("ALTER TABLE t ADD COLUMN b INT NOT NULL", "not_null", "DEFAULT"),
        ("ALTER TABLE t ADD COLUMN b INT PRIMARY KEY", "unsupported", "PRIMARY KEY in ADD COLUMN"),
        ("ALTER TABLE t ADD COLUMN b INT UNIQUE", "unsupported", "UNIQUE in ADD COLUMN"),
        ("ALTER TABLE t ADD COLUMN b UUID DEFAULT uuid()", "unsupported", "uuid()"),
        ("ALTER TABLE u ADD COLUMN b TEXT DEFAULT current_user", "unsupported", "current_user"),
        ("ALTER TABLE t ADD COLUMN b INT DEFAULT 'x'", "invalid_value", "b"),
        ("ALTER TABLE t ADD COLUMN b BLUB", "unsupported", "BLUB"),
        ("ALTER TABLE t ADD COLUMN b INT FIRST", "unsupported", "FIRST"),
        ("ALTER TABLE t ADD COLUMN _id INT", "name", "reserved"),
        ("ALTER TABLE t RENAME COLUMN a TO id", "duplicate_column", "already"),
        ("ALTER TABLE t RENAME COLUMN b TO c", "unknown_column", "b"),
        ("ALTER TABLE u RENAME COLUMN _id TO x", "name", "reserved"),
        ("ALTER TABLE t RENAME TO u", "duplicate_table", "u"),
        ("ALTER TABLE t RENAME TO elsewhere.t", "unsupported", "another namespace"),
        ("ALTER TABLE nothing ADD COLUMN a INT", "unknown_table", "nothing"),
        ("ALTER TABLE t ALTER COLUMN a SET NOT NULL", "unsupported", "ALTER COLUMN"),
        ("ALTER TABLE t ADD CONSTRAINT c CHECK (a > 0)", "unsupported", "ADD CONSTRAINT"),
        ("ALTER TABLE t ADD COLUMN b INT, DROP COLUMN id", "unsupported", "primary key"),
    ] {
        let problem = db.expect_error(sql, 400, code).await;
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(named), "{sql}: {detail}");
    }
    let problem = db.expect_error("ALTER TABLE t DROP COLUMN id", 400, "unsupported").await;
    assert_eq!(problem["position"], 26);
    // Nothing of all that was done.
    let columns = "SELECT table_name, column_name FROM information_schema.columns ORDER BY 1, 2";
    assert_eq!(db.rows(columns).await, json!([["t", "a"], ["t", "id"], ["u", "_id"], ["u", "a"]]));
    db.sql("ALTER TABLE IF EXISTS nothing ADD COLUMN a INT; ALTER TABLE t ADD COLUMN IF NOT EXISTS a TEXT").await;
    for user in ["alice", "robot"] {
        server.client(user).expect_error("ALTER TABLE t ADD COLUMN b INT", 403, "forbidden").await;
    }
}

#[tokio::test]
async fn a_live_query_over_an_altered_table_goes_on_or_says_why_not() {
    let mut server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, a INT, b INT)").await;
    db.sql("INSERT INTO t VALUES (1, 1, 1), (2, 2, 2)").await;
    let mut all = db.live("SELECT * FROM t").await;
    let mut some = db.live("SELECT id, a FROM t WHERE b > 0").await;
    all.until_uptodate().await;
    some.until_uptodate().await;

    let altered = seq(&db.sql("ALTER TABLE t ADD COLUMN c INT DEFAULT 5").await);
    for live in [&mut all, &mut some] {
        let start = live.next_change().await;
        assert_eq!((start.name.as_str(), &start.data["from"]), ("start", &json!("snapshot")));
        let resync = live.next_change().await;
        assert_eq!((resync.name.as_str(), &resync.data["reason"]), ("resync", &json!("schema")));
        live.until_seq(altered).await;
    }
    let expected =
        state(&[(1, json!({"id": 1, "a": 1, "b": 1, "c": 5})), (2, json!({"id": 2, "a": 2, "b": 2, "c": 5}))]);
    assert_eq!(all.fold.rows, expected);
    assert_eq!(some.fold.rows, state(&[(1, json!({"id": 1, "a": 1})), (2, json!({"id": 2, "a": 2}))]));

    // Rows of the older version change: the old image has what it was said to have, so this is no change of `c`.
    db.sql("UPDATE t SET a = 10, c = 5 WHERE id = 1").await;
    let event = all.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["old"]), ("update", &json!({"a": 1})));
    assert_eq!(some.next_change().await.data["row"], json!({"id": 1, "a": 10}));

    // Away while the table is altered: the position is one of another schema.
    all.disconnect();
    let renamed = seq(&db.sql("ALTER TABLE t RENAME COLUMN c TO d").await);
    let names = some.until_seq(renamed).await;
    assert!(names.iter().any(|event| event.name == "resync"), "{names:?}");
    server.kill9();
    server.restart().await;
    all.reconnect().await;
    let events = all.until_uptodate().await;
    let resync = events.iter().find(|event| event.name == "resync").expect("an explicit resync");
    assert_eq!(resync.data["reason"], "schema");
    let expected =
        state(&[(1, json!({"id": 1, "a": 10, "b": 1, "d": 5})), (2, json!({"id": 2, "a": 2, "b": 2, "d": 5}))]);
    assert_eq!(all.fold.rows, expected);

    // The SQL no longer compiles.
    some.reconnect().await;
    some.until_uptodate().await;
    db.sql("ALTER TABLE t DROP COLUMN b").await;
    let event = until_closed(&mut some).await;
    assert_eq!(event["code"], "schema");
    let detail = event["detail"].as_str().unwrap();
    assert!(detail.contains("\"t\" was altered") && detail.contains("\"b\""), "{detail}");
    assert_eq!(some.try_reconnect().await.unwrap().status(), 400, "which stops an EventSource");
    all.until_uptodate().await;
    db.sql("ALTER TABLE t RENAME TO renamed").await;
    let event = until_closed(&mut all).await;
    assert_eq!(event["code"], "schema");
}

/// Reads a stream to its end; the problem it ended with.
async fn until_closed(live: &mut Live) -> Value {
    loop {
        let event = live.next_event().await;
        if event.name == "closed" {
            assert!(live.next_or_end().await.is_none(), "nothing comes after closed");
            return event.data;
        }
    }
}

fn state(rows: &[(i64, Value)]) -> State {
    rows.iter().map(|(id, row)| (format!("{{\"id\":{id}}}"), row.clone())).collect()
}

// ---- the model ----

const STEPS: usize = 70;

/// Few, so that dropped names come back.
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

#[derive(Clone, Copy, PartialEq, Debug)]
enum Ty {
    Int,
    Text,
    Boolean,
}

#[derive(Clone, Debug)]
struct Column {
    name: &'static str,
    ty: Ty,
    not_null: bool,
    default: Value,
}

struct Model {
    table: &'static str,
    columns: Vec<Column>,
    rows: BTreeMap<i64, BTreeMap<&'static str, Value>>,
}

impl Ty {
    fn value(self, random: &mut StdRng) -> Value {
        match self {
            Ty::Int => json!(random.random_range(-3..4)),
            Ty::Text => json!(["", "x", "it's", "ä"].choose(random)),
            Ty::Boolean => json!(random.random_bool(0.5)),
        }
    }
}

fn literal(value: &Value) -> String {
    match value {
        Value::String(text) => format!("'{}'", text.replace('\'', "''")),
        other => other.to_string(),
    }
}

impl Column {
    fn value(&self, random: &mut StdRng) -> Value {
        if !self.not_null && random.random_bool(0.3) { Value::Null } else { self.ty.value(random) }
    }
}

impl Model {
    /// The rows as `SELECT *` shows them, by key.
    fn state(&self) -> State {
        let shown = |(id, row): (&i64, &BTreeMap<&str, Value>)| {
            let mut object = Map::from_iter([("id".to_owned(), json!(id))]);
            object.extend(self.columns.iter().map(|column| (column.name.to_owned(), row[column.name].clone())));
            (format!("{{\"id\":{id}}}"), Value::Object(object))
        };
        self.rows.iter().map(shown).collect()
    }

    /// A random statement, done to the model.
    fn step(&mut self, random: &mut StdRng) -> String {
        match random.random_range(0..14) {
            0..=2 => self.add(random),
            3 => self.drop(random),
            4 => self.rename(random),
            5 if random.random_bool(0.5) => {
                let to = if self.table == "t" { "u" } else { "t" };
                format!("ALTER TABLE {} RENAME TO {to}", std::mem::replace(&mut self.table, to))
            }
            5..=8 => self.insert(random),
            9..=12 => self.update(random),
            _ => {
                let id = random.random_range(0..12);
                self.rows.remove(&id);
                format!("DELETE FROM {} WHERE id = {id}", self.table)
            }
        }
    }

    fn add(&mut self, random: &mut StdRng) -> String {
        let free: Vec<&str> = NAMES.into_iter().filter(|name| self.columns.iter().all(|c| c.name != *name)).collect();
        let Some(&name) = free.choose(random) else { return self.drop(random) };
        let ty = *[Ty::Int, Ty::Text, Ty::Boolean].choose(random).unwrap();
        let default = if random.random_bool(0.6) { ty.value(random) } else { Value::Null };
        let not_null = !default.is_null() && random.random_bool(0.5);
        for row in self.rows.values_mut() {
            row.insert(name, default.clone());
        }
        let mut sql = format!("ALTER TABLE {} ADD COLUMN {name} {ty:?}", self.table);
        if not_null {
            sql.push_str(" NOT NULL");
        }
        if !default.is_null() {
            sql.push_str(&format!(" DEFAULT {}", literal(&default)));
        }
        self.columns.push(Column { name, ty, not_null, default });
        sql
    }

    fn drop(&mut self, random: &mut StdRng) -> String {
        if self.columns.is_empty() {
            return self.insert(random);
        }
        let column = self.columns.remove(random.random_range(0..self.columns.len()));
        self.rows.values_mut().for_each(|row| drop(row.remove(column.name)));
        format!("ALTER TABLE {} DROP COLUMN {}", self.table, column.name)
    }

    fn rename(&mut self, random: &mut StdRng) -> String {
        let free: Vec<&str> = NAMES.into_iter().filter(|name| self.columns.iter().all(|c| c.name != *name)).collect();
        let (Some(&to), false) = (free.choose(random), self.columns.is_empty()) else { return self.insert(random) };
        let at = random.random_range(0..self.columns.len());
        let from = std::mem::replace(&mut self.columns[at].name, to);
        for row in self.rows.values_mut() {
            let value = row.remove(from).unwrap();
            row.insert(to, value);
        }
        format!("ALTER TABLE {} RENAME COLUMN {from} TO {to}", self.table)
    }

    fn insert(&mut self, random: &mut StdRng) -> String {
        let Some(id) = (0..12).find(|id| !self.rows.contains_key(id)) else { return self.update(random) };
        let (mut names, mut values) = (vec!["id"], vec![id.to_string()]);
        let mut row = BTreeMap::new();
        for column in &self.columns {
            let value = if random.random_bool(0.6) {
                let value = column.value(random);
                names.push(column.name);
                values.push(literal(&value));
                value
            } else {
                column.default.clone()
            };
            row.insert(column.name, value);
        }
        self.rows.insert(id, row);
        format!("INSERT INTO {} ({}) VALUES ({})", self.table, names.join(", "), values.join(", "))
    }

    /// One row, or half of them by the value of a column.
    fn update(&mut self, random: &mut StdRng) -> String {
        let Some(column) = self.columns.choose(random).cloned() else { return self.add(random) };
        let value = column.value(random);
        let filter = self.columns.choose(random).unwrap().clone();
        let (condition, wanted) = if random.random_bool(0.5) {
            let id = random.random_range(0..12);
            (format!("id = {id}"), Err(id))
        } else {
            let wanted = filter.value(random);
            let condition = match &wanted {
                Value::Null => format!("{} IS NULL", filter.name),
                value => format!("{} = {}", filter.name, literal(value)),
            };
            (condition, Ok(wanted))
        };
        for (id, row) in &mut self.rows {
            let hit = match &wanted {
                Ok(wanted) => row[filter.name] == *wanted,
                Err(wanted) => id == wanted,
            };
            if hit {
                row.insert(column.name, value.clone());
            }
        }
        format!("UPDATE {} SET {} = {} WHERE {condition}", self.table, column.name, literal(&value))
    }
}

#[tokio::test]
async fn random_schema_changes_agree_with_a_model() {
    for seed in tests::seeds(3) {
        tests::seeded(seed, run(StdRng::seed_from_u64(seed))).await;
    }
}

async fn run(mut random: StdRng) {
    let mut server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY)").await;
    let mut model = Model { table: "t", columns: Vec::new(), rows: BTreeMap::new() };
    let mut live = db.live("SELECT * FROM t").await;
    for step in 0..STEPS {
        let table = model.table;
        let sql = model.step(&mut random);
        let answer =
            db.try_sql(&sql, json!([])).await.unwrap_or_else(|failure| panic!("step {step}: {failure:?}\n{sql}"));
        eprintln!("{step}: {sql}");
        let due = model.state();
        assert_eq!(answer_of(&db, model.table).await, due, "after step {step}: {sql}");
        if table != model.table {
            if live.connected() {
                assert_eq!(until_closed(&mut live).await["code"], "schema");
            }
            live = db.live(format!("SELECT * FROM {}", model.table)).await;
        }
        match random.random_range(0..10) {
            0 => live.disconnect(),
            1 => {
                live.disconnect();
                if random.random_bool(0.5) {
                    server.kill9()
                } else {
                    assert!(server.sigterm().await.success())
                }
                server.restart().await;
                assert_eq!(answer_of(&db, model.table).await, due, "after a restart behind step {step}: {sql}");
            }
            2..=7 => {
                if !live.connected() {
                    live.reconnect().await;
                }
                live.until_seq(seq(&answer)).await;
                assert_eq!(live.fold.rows, due, "the fold after step {step}: {sql}");
            }
            _ => {}
        }
    }
}

async fn answer_of(db: &Client, table: &str) -> State {
    let rows = db.objects(&format!("SELECT * FROM {table}")).await;
    rows.into_iter().map(|row| (format!("{{\"id\":{}}}", row["id"]), row)).collect()
}

// ---- older data directories ----

/// What the first store format holds is there and goes on. `data/format-1` was written by the last build of that format.
#[tokio::test]
async fn a_data_directory_of_the_first_format_is_taken_over() {
    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("data/format-1");
    let mut server = TestServer::with(Options { data: Some(data), ..Options::default() }).await;
    let (db, alice) = (server.admin(), server.client("alice"));
    let rows = json!([[1, "one", "2026-01-02T03:04:05.000006Z", "1.25"], [2, "zwei", null, null]]);
    assert_eq!(db.rows("SELECT * FROM t ORDER BY id").await, rows);
    assert_eq!(db.rows("SELECT v FROM log ORDER BY v").await, json!([[0.5], [1.5]]));
    assert_eq!(alice.rows("SELECT id, text FROM notes").await, json!([[7, "hers"]]));
    assert_eq!(db.rows("SELECT count(*) FROM notes").await, json!([[0]]));
    let mut live = db.live("SELECT id, name FROM t").await;
    assert_eq!(live.until_uptodate().await.iter().filter(|event| event.name == "insert").count(), 2);

    let answer = db.sql("INSERT INTO t (id) VALUES (3)").await;
    assert_eq!(seq(&answer), 8, "the history goes on");
    assert_eq!(live.next_change().await.data["row"], json!({"id": 3, "name": "x"}));
    db.sql("ALTER TABLE t ADD COLUMN n INT DEFAULT 4, DROP COLUMN m").await;
    db.sql("DROP TABLE gone; CREATE TABLE s (id INT PRIMARY KEY) WITH (type = 'stream', ttl = '1h')").await;
    db.sql("CREATE TABLE gone (id INT)").await;
    server.kill9();
    server.restart().await;
    assert_eq!(db.rows("SELECT id, n FROM t ORDER BY id").await, json!([[1, 4], [2, 4], [3, 4]]));
    assert_eq!(db.rows("SELECT name FROM system.tables WHERE id <= 4").await, json!([["log"], ["notes"], ["t"]]));
}

// ---- system tables ----

#[tokio::test]
async fn the_server_describes_itself_and_keeps_its_secrets() {
    let server = TestServer::start().await;
    let (db, alice) = (server.admin(), server.client("alice"));
    db.sql("CREATE TABLE t (id INT, part TEXT NOT NULL DEFAULT 'x', PRIMARY KEY (part, id))").await;
    db.sql("CREATE NAMESPACE shop; CREATE TABLE shop.u (a INT) WITH (type = 'user')").await;
    db.sql("ALTER TABLE t ADD COLUMN n DECIMAL(6, 2) DEFAULT 1.5").await;

    let due = json!([
        ["id", "INT", "NO", null, "YES"],
        ["part", "TEXT", "NO", "'x'", "YES"],
        ["n", "DECIMAL(6,2)", "YES", "1.50", "NO"]
    ]);
    assert_eq!(alice.rows("DESCRIBE t").await, due);
    assert_eq!(alice.rows("SHOW COLUMNS FROM main.t").await, due);
    assert_eq!(alice.rows("SHOW NAMESPACES").await, json!([["main"], ["shop"]]));
    assert_eq!(alice.rows("SHOW SCHEMAS").await, json!([["main"], ["shop"]]));
    assert_eq!(alice.rows("SHOW TABLES").await, json!([["main", "t", "shared"], ["shop", "u", "user"]]));
    assert_eq!(alice.rows("SELECT schema_name FROM information_schema.schemata").await, json!([["main"], ["shop"]]));
    let sql = "SELECT namespace, name, type, schema_version, columns, key FROM system.tables ORDER BY name";
    assert_eq!(
        alice.rows(sql).await,
        json!([["main", "t", "shared", 2, 3, "part, id"], ["shop", "u", "user", 1, 2, "_id"]])
    );
    let sql = "SELECT name, key_position FROM system.columns WHERE table_name = 't' AND key_position IS NOT NULL ORDER BY key_position";
    assert_eq!(alice.rows(sql).await, json!([["part", 1], ["id", 2]]));
    assert_eq!(alice.rows("SELECT count(*) FROM system.plugins").await, json!([[0]]));
    db.put_plugin("late", tests::plugin("late.wasm")).await;
    let sql = "SELECT name, version, active, kind, uploaded_by FROM system.plugins";
    assert_eq!(alice.rows(sql).await, json!([["late", 1, true, "row_filter", "admin"]]));

    // For administrators; by whatever way it is asked.
    db.sql("INSERT INTO t VALUES (1, 'commits', 0)").await;
    for table in ["settings", "stats", "users"] {
        for sql in [
            format!("SELECT * FROM system.{table}"),
            format!("SELECT count(*) FROM t WHERE part IN (SELECT name FROM system.{table})"),
        ] {
            db.sql(&sql).await;
            alice.expect_error(&sql, 403, "forbidden").await;
            server.client("robot").expect_error(&sql, 403, "forbidden").await;
        }
    }
    assert_eq!(db.rows("SELECT value FROM system.settings WHERE name = 'live.heartbeat_ms'").await, json!([["300"]]));
    let users = db.rows("SELECT name, role, tokens FROM system.users ORDER BY name").await;
    let due = json!([
        ["admin", "admin", 1],
        ["al", "user", 1],
        ["alice", "user", 1],
        ["bob", "user", 1],
        ["robot", "service", 1]
    ]);
    assert_eq!(users, due);
    let stats = db.rows("SELECT value FROM system.stats WHERE name = 'commits'").await;
    assert!(stats[0][0].as_f64().is_some_and(|commits| commits >= 4.0), "{stats}");
    for table in ["settings", "stats", "users"] {
        let all = db.rows(&format!("SELECT * FROM system.{table}")).await.to_string();
        assert!(!all.contains("the-token-of") && !all.contains("administrators-token"), "{all}");
    }
    assert_eq!(db.rows("DESCRIBE system.users").await[0], json!(["name", "TEXT", "YES", null, "NO"]));

    for (sql, code, named) in [
        ("SELECT * FROM system.nothing", "unknown_table", "settings"),
        ("DESCRIBE nothing", "unknown_table", "nothing"),
        ("INSERT INTO system.users VALUES ('x', 'admin', 1)", "unsupported", "system.users"),
        ("DROP TABLE system.users", "unsupported", "system.users"),
        ("SHOW COLUMNS FROM t LIKE 'x'", "unsupported", "SHOW COLUMNS"),
    ] {
        let problem = db.expect_error(sql, 400, code).await;
        assert!(problem["detail"].as_str().unwrap().contains(named), "{sql}: {problem}");
    }
    db.expect_no_live("SELECT name FROM system.users", 400, "unsupported").await;
}
