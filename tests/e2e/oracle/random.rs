//! Random tables, values, predicates, projections and transactions. All of it follows from the seed and the answers.

use std::collections::{BTreeSet, HashMap};

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, IteratorRandom};
use serde_json::Value;
use tests::Client;

/// Few keys, so that transactions meet on them.
const KEYS: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ty {
    Boolean,
    SmallInt,
    Int,
    BigInt,
    Double,
    Decimal,
    Text,
    Date,
    Timestamp,
    Uuid,
    Json,
}

const TYPES: [Ty; 11] = [
    Ty::Boolean,
    Ty::SmallInt,
    Ty::Int,
    Ty::BigInt,
    Ty::Double,
    Ty::Decimal,
    Ty::Text,
    Ty::Date,
    Ty::Timestamp,
    Ty::Uuid,
    Ty::Json,
];

#[derive(Clone, Debug)]
struct Column {
    name: String,
    ty: Ty,
    not_null: bool,
}

#[derive(Clone, Debug)]
pub struct Table {
    key: Vec<Column>,
    columns: Vec<Column>,
    pub user_table: bool,
    /// Its rows outlive the run, so that it is as a shared table, but for the times in its events.
    pub stream: bool,
}

impl Table {
    pub fn random(random: &mut StdRng, user_table: bool) -> Self {
        let kinds: [&[Ty]; 5] =
            [&[Ty::Int], &[Ty::BigInt], &[Ty::Text], &[Ty::Int, Ty::Text], &[Ty::Date, Ty::SmallInt]];
        let key = kinds.choose(random).expect("there are kinds");
        let key = key.iter().enumerate().map(|(i, &ty)| Column { name: format!("k{i}"), ty, not_null: true }).collect();
        let columns = (0..random.random_range(1..6))
            .map(|i| Column {
                name: format!("c{i}"),
                ty: *TYPES.choose(random).expect("there are types"),
                not_null: random.random_bool(0.2),
            })
            .collect();
        let stream = !user_table && random.random_bool(0.3);
        Table { key, columns, user_table, stream }
    }

    /// One that the sample plugins fit; the delay in any of the numeric types.
    pub fn flights(random: &mut StdRng) -> Self {
        let delay = *[Ty::Int, Ty::Double, Ty::Decimal, Ty::BigInt].choose(random).expect("there are types");
        let column = |name: &str, ty: Ty| Column { name: name.to_owned(), ty, not_null: name == "carrier" };
        let columns = vec![
            column("carrier", Ty::Text),
            column("flight", Ty::Int),
            column("origin", Ty::Text),
            column("dest", Ty::Text),
            column("distance", Ty::Int),
            column("dep_delay", delay),
            column("note", Ty::Text),
        ];
        Table {
            key: vec![Column { name: "id".to_owned(), ty: Ty::BigInt, not_null: true }],
            columns,
            user_table: false,
            stream: random.random_bool(0.3),
        }
    }

    pub fn create(&self) -> String {
        let mut parts: Vec<String> = self.all().map(Column::definition).collect();
        parts.push(format!("PRIMARY KEY ({})", self.key().collect::<Vec<_>>().join(", ")));
        let kind = match (self.user_table, self.stream) {
            (true, _) => "type = 'user'",
            (_, true) => "type = 'stream', ttl = '1h'",
            _ => "type = 'shared'",
        };
        format!("CREATE TABLE t ({}) WITH ({kind})", parts.join(", "))
    }

    pub fn key(&self) -> impl Iterator<Item = &str> {
        self.key.iter().map(|column| column.name.as_str())
    }

    fn all(&self) -> impl Iterator<Item = &Column> {
        self.key.iter().chain(&self.columns)
    }

    /// `SELECT … FROM t [WHERE …]`, as a live query may have it.
    pub fn live_query(&self, random: &mut StdRng) -> String {
        let filter = if random.random_bool(0.8) { format!(" WHERE {}", self.predicate(random)) } else { String::new() };
        format!("SELECT {} FROM t{filter}", self.projection(random))
    }

    /// A SELECT that is no filter and projection of one table, and the names of its key.
    pub fn whole_query(&self, random: &mut StdRng) -> (String, Vec<String>) {
        let key: Vec<String> = self.key().map(str::to_owned).collect();
        let (keys, filter) = (key.join(", "), self.predicate(random));
        let column = self.all().choose(random).expect("a table has columns");
        let (name, shown) = (&column.name, self.columns.choose(random).expect("a table has columns"));
        match random.random_range(0..7) {
            0 => (format!("SELECT count(*) AS n, count({name}) AS some FROM t WHERE {filter}"), Vec::new()),
            1 => {
                let sql = format!("SELECT {name}, count(*) AS n FROM t WHERE {filter} GROUP BY {name}");
                (sql, vec![name.clone()])
            }
            2 => {
                let limit = random.random_range(1..6);
                let sql =
                    format!("SELECT {keys}, {} AS c FROM t WHERE {filter} ORDER BY {keys} LIMIT {limit}", shown.name);
                (sql, key)
            }
            3 => (format!("SELECT DISTINCT {name} FROM t WHERE {filter}"), vec![name.clone()]),
            4 => {
                let sql = format!(
                    "SELECT {keys}, row_number() OVER (PARTITION BY {} IS NULL ORDER BY {keys}) AS r FROM t WHERE {filter}",
                    shown.name
                );
                (sql, key)
            }
            5 => {
                let on: Vec<String> = key.iter().map(|name| format!("a.{name} = b.{name}")).collect();
                let left: Vec<String> = key.iter().map(|name| format!("a.{name}")).collect();
                let right: Vec<String> = key.iter().map(|name| format!("b.{name} AS other_{name}")).collect();
                let join = ["JOIN", "LEFT JOIN"].choose(random).expect("there are joins");
                let sql = format!(
                    "SELECT {}, {}, b.{} AS c FROM t a {join} (SELECT * FROM t WHERE {filter}) b ON {}",
                    left.join(", "),
                    right.join(", "),
                    shown.name,
                    on.join(" AND ")
                );
                (sql, key.iter().cloned().chain(key.iter().map(|name| format!("other_{name}"))).collect())
            }
            _ => {
                let first = &key[0];
                (format!("SELECT {keys} FROM t WHERE {first} IN (SELECT {first} FROM t WHERE {filter})"), key)
            }
        }
    }

    fn projection(&self, random: &mut StdRng) -> String {
        if random.random_bool(0.3) {
            return "*".to_owned();
        }
        let many = random.random_range(1..=self.all().count());
        let mut columns: Vec<String> = self.all().map(|column| column.name.clone()).choose_multiple(random, many);
        for i in 0..random.random_range(0..3) {
            let column = self.all().choose(random).expect("a table has columns");
            columns.push(format!("{} AS x{i}", column.expression(random)));
        }
        columns.join(", ")
    }

    pub fn predicate(&self, random: &mut StdRng) -> String {
        self.predicate_to(random, 2)
    }

    fn predicate_to(&self, random: &mut StdRng, depth: usize) -> String {
        if depth == 0 || random.random_bool(0.4) {
            return self.all().choose(random).expect("a table has columns").condition(random);
        }
        let mut part = || self.predicate_to(random, depth - 1);
        let (left, right) = (part(), part());
        match random.random_range(0..5) {
            0 | 1 => format!("({left} AND {right})"),
            2 | 3 => format!("({left} OR {right})"),
            _ => format!("NOT ({left})"),
        }
    }

    /// The literals of key number `n`, and what they are in an answer.
    fn key_values(&self, n: usize) -> (Vec<String>, Vec<Value>) {
        let single = self.key.len() == 1;
        let place = |i: usize| if single { n } else { [n / 5, n % 5][i] };
        self.key.iter().enumerate().map(|(i, column)| column.ty.key_value(place(i))).unzip()
    }

    fn insert(&self, random: &mut StdRng, keys: &[usize]) -> String {
        let names: Vec<&str> = self.all().map(|column| column.name.as_str()).collect();
        let rows: Vec<String> = keys
            .iter()
            .map(|&n| {
                let (mut values, _) = self.key_values(n);
                values.extend(self.columns.iter().map(|column| column.value(random)));
                format!("({})", values.join(", "))
            })
            .collect();
        format!("INSERT INTO t ({}) VALUES {}", names.join(", "), rows.join(", "))
    }

    /// A row with any of the keys.
    pub fn insert_anything(&self, random: &mut StdRng, key: usize) -> String {
        self.insert(random, &[key % KEYS])
    }

    fn where_key(&self, n: usize) -> String {
        let (literals, _) = self.key_values(n);
        let parts: Vec<String> =
            self.key().zip(&literals).map(|(name, literal)| format!("{name} = {literal}")).collect();
        parts.join(" AND ")
    }

    fn assignments(&self, random: &mut StdRng) -> String {
        let many = random.random_range(1..=self.columns.len().min(3));
        let chosen = self.columns.iter().choose_multiple(random, many);
        let parts: Vec<String> =
            chosen.into_iter().map(|column| format!("{} = {}", column.name, column.new_value(random))).collect();
        parts.join(", ")
    }
}

impl Column {
    fn definition(&self) -> String {
        let ty = match self.ty {
            Ty::Boolean => "BOOLEAN",
            Ty::SmallInt => "SMALLINT",
            Ty::Int => "INT",
            Ty::BigInt => "BIGINT",
            Ty::Double => "DOUBLE",
            Ty::Decimal => "DECIMAL(10, 2)",
            Ty::Text => "TEXT",
            Ty::Date => "DATE",
            Ty::Timestamp => "TIMESTAMP",
            Ty::Uuid => "UUID",
            Ty::Json => "JSON",
        };
        format!("{} {ty}{}", self.name, if self.not_null { " NOT NULL" } else { "" })
    }

    /// A literal that may be NULL where the column allows it.
    fn value(&self, random: &mut StdRng) -> String {
        if !self.not_null && random.random_bool(0.25) { "NULL".to_owned() } else { self.literal(random) }
    }

    /// What an UPDATE sets: mostly a value, sometimes made of the old one.
    fn new_value(&self, random: &mut StdRng) -> String {
        if random.random_bool(0.7) {
            return self.value(random);
        }
        let name = &self.name;
        match self.ty {
            Ty::SmallInt | Ty::Int | Ty::BigInt => format!("{name} + 1"),
            Ty::Double => format!("-{name}"),
            Ty::Boolean => format!("NOT {name}"),
            Ty::Text => format!("upper({name})"),
            _ => name.clone(),
        }
    }

    fn literal(&self, random: &mut StdRng) -> String {
        match (self.name.as_str(), self.ty) {
            ("dep_delay", Ty::Double) => format!("{}", f64::from(random.random_range(-20..160)) / 2.0),
            ("dep_delay", Ty::Decimal) => format!("{}.{:02}", random.random_range(0..90), random.random_range(0..100)),
            ("dep_delay", _) => random.random_range(-10..90).to_string(),
            ("distance", _) => random.random_range(50..3_000).to_string(),
            (_, ty) => ty.literal(random),
        }
    }

    /// Something to select that is made of the column.
    fn expression(&self, random: &mut StdRng) -> String {
        let name = &self.name;
        match (self.ty, random.random_range(0..3)) {
            (_, 0) => format!("{name} IS NULL"),
            (Ty::SmallInt | Ty::Int | Ty::BigInt | Ty::Double, 1) => format!("{name} * 2"),
            (Ty::Text, 1) => format!("coalesce({name}, 'none') || '!'"),
            (Ty::Text, _) => format!("length({name})"),
            _ => format!("CASE WHEN {} THEN 1 ELSE 0 END", self.condition(random)),
        }
    }

    fn condition(&self, random: &mut StdRng) -> String {
        let name = &self.name;
        if self.ty == Ty::Json || random.random_bool(0.15) {
            return format!("{name} IS {}NULL", if random.random_bool(0.5) { "NOT " } else { "" });
        }
        let operator = *["=", "<>", "<", "<=", ">", ">="].choose(random).expect("there are operators");
        let (one, two) = (self.literal(random), self.literal(random));
        match (self.ty, random.random_range(0..6)) {
            (Ty::Boolean, 0..3) => name.clone(),
            (Ty::Boolean, _) => format!("{name} = {one}"),
            (Ty::Uuid, 0..4) => format!("{name} = {one}"),
            (Ty::Text, 0) => format!("{name} LIKE 'a%'"),
            (Ty::Text, 1) => format!("length({name}) > 1"),
            (Ty::SmallInt | Ty::Int | Ty::BigInt, 0) => format!("{name} % 2 = 0"),
            (_, 1) => format!("{name} IN ({one}, {two})"),
            (Ty::Uuid, _) => format!("{name} <> {one}"),
            (_, 2) => format!("{name} BETWEEN {one} AND {two}"),
            _ => format!("{name} {operator} {one}"),
        }
    }
}

impl Ty {
    /// From a small domain, so that rows go in and out of results.
    fn literal(self, random: &mut StdRng) -> String {
        match self {
            Ty::Boolean => ["true", "false"][random.random_range(0..2)].to_owned(),
            Ty::SmallInt | Ty::Int => random.random_range(-5..6).to_string(),
            Ty::BigInt => {
                ["-9007199254740995", "-1", "0", "1", "2", "9007199254740995"][random.random_range(0..6)].to_owned()
            }
            Ty::Double => ["-2.5", "-0.5", "0.0", "0.5", "1e300", "3.25"][random.random_range(0..6)].to_owned(),
            Ty::Decimal => ["-10.01", "-0.5", "0", "0.07", "99.99"][random.random_range(0..5)].to_owned(),
            Ty::Text => ["''", "'a'", "'ab'", "'it''s'", "'ä:b'", "'z\u{1F6EB}'"][random.random_range(0..6)].to_owned(),
            Ty::Date => format!("DATE '2013-0{}-0{}'", random.random_range(1..4), random.random_range(1..4)),
            Ty::Timestamp => {
                format!("TIMESTAMP '2013-03-0{}T12:00:00.{}'", random.random_range(1..5), random.random_range(0..3))
            }
            Ty::Uuid => format!("'00000000-0000-4000-8000-00000000000{}'", random.random_range(0..5)),
            Ty::Json => {
                // No JSON null: in an event it looks as NULL does, and a change from one to the other as none.
                ["'{\"a\":1}'", "'[1,null,\"x\"]'", "'\"text\"'"][random.random_range(0..3)].to_owned()
            }
        }
    }

    /// The literal of a key's part, all different for different `n`, and its value in an answer.
    fn key_value(self, n: usize) -> (String, Value) {
        let number = n as i64 - KEYS as i64 / 2;
        match self {
            Ty::Text => {
                let odd = ["", "a:b", "a", "ä", "it's", "a\u{1}", "al", "alice"];
                let text = odd.get(n).map_or_else(|| format!("key {n}"), |text| (*text).to_owned());
                (format!("'{}'", text.replace('\'', "''")), Value::from(text))
            }
            Ty::Date => {
                let day = format!("20{:02}-01-01", n + 10);
                (format!("DATE '{day}'"), Value::from(day))
            }
            _ => (number.to_string(), Value::from(number)),
        }
    }
}

/// Makes one transaction after the other, each of one to four statements.
pub struct Transactions {
    table: Table,
    /// What a key is in an answer → its number.
    numbers: HashMap<String, usize>,
}

impl Transactions {
    pub fn new(table: &Table) -> Self {
        let text = |n: usize| Value::from(table.key_values(n).1).to_string();
        Transactions { table: table.clone(), numbers: (0..KEYS).map(|n| (text(n), n)).collect() }
    }

    pub async fn next(&mut self, random: &mut StdRng, db: &Client) -> String {
        let mut present = self.present(db).await;
        let mut statements = Vec::new();
        for _ in 0..random.random_range(1..5) {
            statements.push(self.statement(random, &mut present));
        }
        statements.join(";\n")
    }

    async fn present(&self, db: &Client) -> BTreeSet<usize> {
        let rows = db.rows(&format!("SELECT {} FROM t", self.table.key().collect::<Vec<_>>().join(", "))).await;
        let rows = rows.as_array().expect("rows are an array");
        rows.iter().map(|row| self.numbers[&row.to_string()]).collect()
    }

    /// `present` are the keys that may be there, whatever the statements before this one did: no others are inserted.
    fn statement(&self, random: &mut StdRng, present: &mut BTreeSet<usize>) -> String {
        let table = &self.table;
        let absent: Vec<usize> = (0..KEYS).filter(|n| !present.contains(n)).collect();
        let any = random.random_range(0..KEYS);
        match random.random_range(0..12) {
            0..=4 if !absent.is_empty() => {
                let many = random.random_range(1..5).min(absent.len());
                let keys: Vec<usize> = absent.choose_multiple(random, many).copied().collect();
                present.extend(&keys);
                table.insert(random, &keys)
            }
            5 if !absent.is_empty() => self.key_change(random, present, &absent),
            6 => {
                present.remove(&any);
                format!("DELETE FROM t WHERE {}", table.where_key(any))
            }
            7 => format!("DELETE FROM t WHERE {} AND {}", table.predicate(random), table.predicate(random)),
            8 | 9 => format!("UPDATE t SET {} WHERE {}", table.assignments(random), table.predicate(random)),
            _ => format!("UPDATE t SET {} WHERE {}", table.assignments(random), table.where_key(any)),
        }
    }

    /// A row moves to another key: a delete and an insert.
    fn key_change(&self, random: &mut StdRng, present: &mut BTreeSet<usize>, absent: &[usize]) -> String {
        let Some(&from) = present.iter().choose(random) else {
            present.insert(absent[0]);
            return self.table.insert_anything(random, absent[0]);
        };
        let to = *absent.choose(random).expect("the caller has looked");
        present.remove(&from);
        present.insert(to);
        let (literals, _) = self.table.key_values(to);
        let sets: Vec<String> =
            self.table.key().zip(&literals).map(|(name, literal)| format!("{name} = {literal}")).collect();
        format!("UPDATE t SET {} WHERE {}", sets.join(", "), self.table.where_key(from))
    }
}
