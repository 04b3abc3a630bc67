//! Random queries: the same answers as SQLite on what both have (differential), a predicate's three ways add up to
//! everything (TLP), and what a filter keeps is what the predicate says of each row (NoREC).
//!
//! `QUERIES=5000` runs more of them, `SEED` others.

use std::fmt::Write as _;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::types::ValueRef;
use serde_json::Value;
use tests::{Client, TestServer};

/// Enough to meet every construct some times, few enough for every run of the tests.
const QUERIES: usize = 250;

/// A column of the tables, by the type its expressions have.
const INTS: &[&str] = &["id", "a", "b"];
const TEXTS: &[&str] = &["s", "u"];

struct Random {
    rng: StdRng,
}

/// Which columns an expression may use: of one table, or of two under their names.
#[derive(Clone, Copy)]
enum From {
    One,
    Two,
}

impl Random {
    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.rng.random_range(0..from.len())]
    }

    fn column(&mut self, names: &[&str], from: From) -> String {
        let name = self.pick(names);
        match from {
            From::One => name.to_owned(),
            From::Two => format!("{}.{name}", self.pick(&["l", "r"])),
        }
    }

    /// No overflow, no division by zero: those are errors here and not there.
    fn int(&mut self, depth: u32, from: From) -> String {
        if depth == 0 {
            return match self.rng.random_range(0..6) {
                0 => self.rng.random_range(-5..20).to_string(),
                1 => "CAST(NULL AS BIGINT)".to_owned(),
                _ => self.column(INTS, from),
            };
        }
        let below = depth - 1;
        match self.rng.random_range(0..9) {
            0 | 1 => format!("({} {} {})", self.int(below, from), self.pick(&["+", "-"]), self.int(below, from)),
            2 => format!("({} * {})", self.int(0, from), self.rng.random_range(-3..4)),
            3 => {
                format!("({} {} {})", self.int(below, from), self.pick(&["/", "%"]), self.pick(&["2", "3", "-4", "7"]))
            }
            4 => format!("coalesce({}, {})", self.int(below, from), self.int(below, from)),
            5 => format!("nullif({}, {})", self.int(below, from), self.int(0, from)),
            6 => format!("length({})", self.text(below, from)),
            7 => format!(
                "CASE WHEN {} THEN {} ELSE {} END",
                self.predicate(below, from),
                self.int(below, from),
                self.int(below, from)
            ),
            _ => format!("abs({})", self.int(below, from)),
        }
    }

    fn text(&mut self, depth: u32, from: From) -> String {
        if depth == 0 {
            return match self.rng.random_range(0..5) {
                0 => self.pick(&["'a'", "''", "'ab'", "'B'", "'ba'"]).to_owned(),
                _ => self.column(TEXTS, from),
            };
        }
        let below = depth - 1;
        match self.rng.random_range(0..7) {
            0 => format!("({} || {})", self.text(below, from), self.text(0, from)),
            1 => format!("{}({})", self.pick(&["upper", "lower", "trim"]), self.text(below, from)),
            2 => format!(
                "substr({}, {}, {})",
                self.text(below, from),
                self.pick(&["1", "2"]),
                self.pick(&["1", "2", "5"])
            ),
            3 => format!("replace({}, 'a', {})", self.text(below, from), self.pick(&["'b'", "''", "'xy'"])),
            4 => format!("coalesce({}, {})", self.text(below, from), self.text(0, from)),
            5 => format!("CAST({} AS TEXT)", self.int(below, from)),
            _ => format!(
                "CASE WHEN {} THEN {} ELSE {} END",
                self.predicate(below, from),
                self.text(below, from),
                self.text(0, from)
            ),
        }
    }

    fn predicate(&mut self, depth: u32, from: From) -> String {
        let below = depth.saturating_sub(1);
        let op = self.pick(&["=", "<>", "<", "<=", ">", ">="]);
        let not = self.pick(&["", " NOT"]);
        match self.rng.random_range(0..if depth == 0 { 7 } else { 10 }) {
            0 | 1 => format!("{} {op} {}", self.int(below, from), self.int(0, from)),
            2 => format!("{} {op} {}", self.text(below, from), self.text(0, from)),
            3 => format!("{} IS{not} NULL", self.int(below, from)),
            4 => format!("{}{not} IN ({}, {}, {})", self.int(below, from), self.int(0, from), 3, self.int(0, from)),
            5 => format!("{}{not} BETWEEN {} AND {}", self.int(below, from), self.int(0, from), self.int(0, from)),
            6 => format!("{}{not} LIKE {}", self.text(below, from), self.pick(&["'a%'", "'%b'", "'%a%'", "'_'", "''"])),
            7 | 8 => {
                format!(
                    "({} {} {})",
                    self.predicate(below, from),
                    self.pick(&["AND", "OR"]),
                    self.predicate(below, from)
                )
            }
            _ => format!("NOT ({})", self.predicate(below, from)),
        }
    }

    /// `AND`, `OR` something with a sub-query, sometimes.
    fn subquery(&mut self, from: From) -> String {
        let not = self.pick(&["", " NOT"]);
        let (column, other) = match from {
            From::One => ("a", "y"),
            From::Two => ("l.a", "x"),
        };
        let and = self.pick(&["AND", "AND", "OR", "AND NOT", "OR NOT"]);
        match self.rng.random_range(0..4) {
            0 => format!(" {and} {column}{not} IN (SELECT b FROM {other} WHERE {})", self.predicate(1, From::One)),
            1 => format!(" AND{not} EXISTS (SELECT 1 FROM {other} o WHERE o.id = {column})"),
            _ => String::new(),
        }
    }

    /// A table expression and which columns it has.
    fn from(&mut self) -> (String, From) {
        if self.rng.random_bool(0.5) {
            return (self.pick(&["x", "y"]).to_owned(), From::One);
        }
        let kind = self.pick(&["JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN"]);
        // A full join needs an equality first, in both.
        let more = if kind != "FULL JOIN" && self.rng.random_bool(0.4) {
            format!(" AND {}", self.predicate(1, From::Two))
        } else {
            String::new()
        };
        let on = self.pick(&["l.a = r.b", "l.id = r.id", "l.s = r.u"]);
        (format!("x l {kind} y r ON {on}{more}"), From::Two)
    }

    /// A query and its columns' types, `I` or `T`.
    fn query(&mut self) -> String {
        let (table, from) = self.from();
        let predicate = format!("({}){}", self.predicate(3, from), self.subquery(from));
        match self.rng.random_range(0..6) {
            0 | 1 => {
                let (int, text) = (self.int(2, from), self.text(2, from));
                format!("SELECT {int}, {text} FROM {table} WHERE {predicate}")
            }
            2 => {
                let (key, int) = (self.int(1, from), self.int(2, from));
                let having = self.pick(&["", " HAVING count(*) > 1", " HAVING max(2) = 2"]);
                format!(
                    "SELECT k, count(*), sum(v), min(v), max(w) FROM (SELECT {key} AS k, {int} AS v, {} AS w FROM {table} \
                     WHERE {predicate}) t GROUP BY k{having}",
                    self.text(1, from)
                )
            }
            3 => {
                let (int, text) = (self.int(2, from), self.text(1, from));
                format!("SELECT DISTINCT {int}, {text} FROM {table} WHERE {predicate}")
            }
            4 => {
                let (a, b) = (self.int(2, From::One), self.int(2, From::One));
                let op = self.pick(&["UNION", "UNION ALL", "INTERSECT", "EXCEPT"]);
                let other = self.predicate(2, From::One);
                format!("SELECT {a} FROM x WHERE {other} {op} SELECT {b} FROM y")
            }
            _ => format!(
                "SELECT count(*), count(v), sum(v), count(DISTINCT v) FROM (SELECT {} AS v FROM {table} WHERE {predicate}) t",
                self.int(2, from)
            ),
        }
    }

    fn rows(&mut self, count: usize) -> String {
        let mut out = String::new();
        for id in 0..count {
            let int = |rng: &mut StdRng| match rng.random_range(0..5) {
                0 => "NULL".to_owned(),
                _ => rng.random_range(-3..12).to_string(),
            };
            let (a, b) = (int(&mut self.rng), int(&mut self.rng));
            let mut text = || self.pick(&["'a'", "'b'", "'ab'", "'Ba'", "''", "' a'", "NULL"]).to_owned();
            let (s, u) = (text(), text());
            write!(out, "{}({id}, {a}, {b}, {s}, {u})", if id > 0 { ", " } else { "" }).unwrap();
        }
        out
    }
}

/// Rows as text, sorted: the order is nobody's promise.
fn sorted(mut rows: Vec<String>) -> Vec<String> {
    rows.sort();
    rows
}

async fn ours(db: &Client, sql: &str) -> Vec<String> {
    let rows = db.rows(sql).await;
    let show = |cell: &Value| match cell {
        Value::Null => "NULL".to_owned(),
        Value::String(text) => format!("{text:?}"),
        other => other.to_string(),
    };
    let rows = rows.as_array().unwrap().iter();
    sorted(rows.map(|row| row.as_array().unwrap().iter().map(show).collect::<Vec<_>>().join("|")).collect())
}

fn theirs(db: &rusqlite::Connection, sql: &str) -> Vec<String> {
    let mut statement = db.prepare(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
    let columns = statement.column_count();
    let rows = statement.query_map([], |row| {
        let cells = (0..columns).map(|at| match row.get_ref(at)? {
            ValueRef::Null => Ok("NULL".to_owned()),
            ValueRef::Integer(value) => Ok(value.to_string()),
            ValueRef::Real(value) => Ok(value.to_string()),
            ValueRef::Text(text) => Ok(format!("{:?}", String::from_utf8_lossy(text))),
            ValueRef::Blob(_) => Ok("blob".to_owned()),
        });
        Ok(cells.collect::<rusqlite::Result<Vec<_>>>()?.join("|"))
    });
    sorted(rows.unwrap().map(|row| row.unwrap_or_else(|error| panic!("{sql}: {error}"))).collect())
}

#[tokio::test]
async fn random_queries_agree() {
    let seed = tests::seed();
    let queries = std::env::var("QUERIES").map_or(QUERIES, |count| count.parse().expect("QUERIES is a number"));
    let mut random = Random { rng: StdRng::seed_from_u64(seed) };
    let server = TestServer::start().await;
    let db = server.admin();
    let sqlite = rusqlite::Connection::open_in_memory().unwrap();
    sqlite.execute_batch("PRAGMA case_sensitive_like = ON").unwrap();
    for (table, rows) in [("x", 24), ("y", 15)] {
        let statements = [
            format!("CREATE TABLE {table} (id BIGINT PRIMARY KEY, a BIGINT, b BIGINT, s TEXT, u TEXT)"),
            format!("INSERT INTO {table} VALUES {}", random.rows(rows)),
        ];
        for sql in statements {
            db.sql(&sql).await;
            sqlite.execute_batch(&sql).unwrap();
        }
    }
    for number in 0..queries {
        let sql = random.query();
        assert_eq!(ours(&db, &sql).await, theirs(&sqlite, &sql), "query {number}, seed {seed}: {sql}");

        let (table, from) = random.from();
        let predicate = random.predicate(3, from);
        let columns = match from {
            From::One => "id, a, s",
            From::Two => "l.id, r.id, l.s",
        };
        let all = ours(&db, &format!("SELECT {columns} FROM {table}")).await;
        let mut parts = Vec::new();
        for part in [format!("({predicate})"), format!("NOT ({predicate})"), format!("({predicate}) IS NULL")] {
            parts.extend(ours(&db, &format!("SELECT {columns} FROM {table} WHERE {part}")).await);
        }
        assert_eq!(sorted(parts), all, "the three ways of a predicate, seed {seed}: {table} WHERE {predicate}");

        let kept = ours(&db, &format!("SELECT count(*) FROM {table} WHERE {predicate}")).await;
        let said = format!("SELECT coalesce(sum(CASE WHEN {predicate} THEN 1 ELSE 0 END), 0) FROM {table}");
        assert_eq!(kept, ours(&db, &said).await, "filter and value, seed {seed}: {table} WHERE {predicate}");
    }
}
