//! What the index in front of live queries rests on: a row that a predicate matches is never ruled out by what `sql`
//! found in the predicate, for random predicates and rows of every type.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use wire::{ImageBuilder, ImageRef, Type, Value};

use crate::catalog::{Anchors, Table};
use crate::live::admits;
use crate::sql::live::{Live, LivePlan};
use crate::sql::session::Sql;
use crate::sql::{RequestEnv, SqlOptions, StatementKind};
use crate::store::{Store, StoreOptions, Transaction};

const CREATE: &str = "CREATE TABLE t (k BIGINT PRIMARY KEY, b BOOLEAN, s SMALLINT, i INT, l BIGINT, r REAL, d DOUBLE, \
                      n DECIMAL(18, 2), x TEXT, y BYTEA, da DATE, ti TIME, ts TIMESTAMP, u UUID, j JSON)";
const COLUMNS: [&str; 15] = ["k", "b", "s", "i", "l", "r", "d", "n", "x", "y", "da", "ti", "ts", "u", "j"];

/// A constant and the value a row would have for it.
fn constant(random: &mut StdRng, ty: Type) -> (String, Value) {
    let mut int = |of: &[i64]| {
        let value = *of.choose(random).expect("there are some");
        (value.to_string(), Value::Int(value))
    };
    match ty {
        Type::Boolean => {
            let value = random.random();
            (format!("{value}"), Value::Bool(value))
        }
        Type::SmallInt => int(&[-32768, -1, 0, 1, 2, 32767]),
        Type::Int => int(&[-2147483648, -1, 0, 1, 2, 2147483647]),
        Type::BigInt => {
            int(&[-9223372036854775807, -1, 0, 1, 2, 9007199254740991, 9007199254740992, 9007199254740993, i64::MAX])
        }
        Type::Real => {
            let value = *[-1.5f32, -0.0, 0.0, 0.1, 0.5, 16777216.0].choose(random).expect("there are some");
            (format!("{value:?}"), Value::Float(value.into()))
        }
        Type::Double => {
            let value = *[-1.5f64, -0.0, 0.0, 0.1, 0.5, 1e300].choose(random).expect("there are some");
            (format!("{value:?}"), Value::Float(value))
        }
        Type::Decimal { .. } => {
            let value = *[-1001i128, -50, 0, 7, 9999].choose(random).expect("there are some");
            let (sign, digits) = (if value < 0 { "-" } else { "" }, value.abs());
            (format!("{sign}{}.{:02}", digits / 100, digits % 100), Value::Decimal(value))
        }
        Type::Text => {
            let value =
                *["", "a", "ab", "abc", "a%", "a_c", "A", "ä", "z\u{10ffff}"].choose(random).expect("there are some");
            (format!("'{value}'"), Value::Text(value.to_owned()))
        }
        Type::Bytea => {
            let value = *[&[][..], &[0], &[0, 255], &[255]].choose(random).expect("there are some");
            let hex: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
            (format!("X'{hex}'"), Value::Bytes(value.to_vec()))
        }
        Type::Date => {
            let day = random.random_range(-2..3);
            let text = ["1969-12-30", "1969-12-31", "1970-01-01", "1970-01-02", "1970-01-03"][(day + 2) as usize];
            (format!("DATE '{text}'"), Value::Int(day))
        }
        Type::Time => {
            let second = random.random_range(0..3);
            (format!("TIME '00:00:0{second}'"), Value::Int(second * 1_000_000))
        }
        Type::Timestamp => {
            let second = random.random_range(0..3);
            (format!("TIMESTAMP '1970-01-01T00:00:0{second}.000001'"), Value::Int(second * 1_000_000 + 1))
        }
        Type::Uuid => {
            let last = random.random_range(0..3u8);
            let mut bytes = [0; 16];
            bytes[15] = last;
            let case = if random.random() {
                "abcdef00-0000-0000-0000-00000000000"
            } else {
                "ABCDEF00-0000-0000-0000-00000000000"
            };
            bytes[..3].copy_from_slice(&[0xab, 0xcd, 0xef]);
            (format!("'{case}{last}'"), Value::Uuid(bytes))
        }
        Type::Json => ("'{}'".to_owned(), Value::Text("{}".to_owned())),
    }
}

fn condition(random: &mut StdRng, table: &Table) -> String {
    let name = *COLUMNS.choose(random).expect("there are columns");
    let ty = table.column(name).expect("a column").ty;
    let (one, two) = (constant(random, ty).0, constant(random, ty).0);
    if ty == Type::Json || random.random_bool(0.1) {
        return format!("{name} IS {}NULL", if random.random() { "" } else { "NOT " });
    }
    let operator =
        *["=", "<>", "<", "<=", ">", ">=", "IS DISTINCT FROM", "IS NOT DISTINCT FROM"].choose(random).expect("some");
    match (random.random_range(0..8), ty) {
        (0, _) => format!("{name} IN ({one}, {two})"),
        (1, _) => format!("{name} NOT IN ({one}, NULL)"),
        (2, _) => format!("{name} BETWEEN {one} AND {two}"),
        (3, _) => format!("({one} {operator} {name})"),
        (4, Type::Boolean) => name.to_owned(),
        (5, Type::Boolean) => {
            format!("{name} IS {}", ["TRUE", "FALSE", "UNKNOWN", "NOT TRUE"].choose(random).expect("some"))
        }
        (4 | 5, Type::Text) => {
            let pattern = *["a%", "a_c", "%b", "ab%c%", "a\\%%", "abc", ""].choose(random).expect("some");
            let not = if random.random_bool(0.2) { "NOT " } else { "" };
            let like = if random.random_bool(0.2) { "ILIKE" } else { "LIKE" };
            format!("{name} {not}{like} '{pattern}'")
        }
        (6, Type::Text) => format!("starts_with({name}, {one})"),
        // Wider constants: the planner casts one side or the other.
        (4, Type::SmallInt | Type::Int) => format!("({name} {operator} 4000000000)"),
        (5, Type::SmallInt | Type::Int | Type::BigInt) => format!("({name} {operator} 0.5)"),
        (6, Type::Int | Type::SmallInt) => format!("({name} {operator} CAST({one} AS BIGINT))"),
        (6, Type::Real) => format!("({name} {operator} CAST(0.1 AS DOUBLE))"),
        (6, Type::Date) => format!("({name} {operator} TIMESTAMP '1970-01-01T00:00:01')"),
        (7, Type::BigInt) => format!("({name} + 1 {operator} {one})"),
        // In brackets: what follows IS DISTINCT FROM would else be taken as a part of it.
        _ => format!("({name} {operator} {one})"),
    }
}

fn predicate(random: &mut StdRng, table: &Table, depth: usize) -> String {
    if depth == 0 || random.random_bool(0.3) {
        return condition(random, table);
    }
    let (left, right) = (predicate(random, table, depth - 1), predicate(random, table, depth - 1));
    match random.random_range(0..7) {
        0..=2 => format!("({left} AND {right})"),
        3 | 4 => format!("({left} OR {right})"),
        5 => format!("NOT ({left})"),
        _ => format!("CASE WHEN {left} THEN {right} ELSE false END"),
    }
}

fn row(random: &mut StdRng, table: &Table) -> Vec<u8> {
    let mut image = ImageBuilder::new(table.slots());
    for column in &table.columns {
        let value = match (random.random_range(0..10), column.ty) {
            (0, _) if column.nullable => Value::Null,
            (1, Type::Real | Type::Double) => {
                Value::Float([f64::NAN, -f64::NAN, f64::INFINITY][random.random_range(0..3)])
            }
            (_, ty) => constant(random, ty).1,
        };
        image.set(column.id, &value);
    }
    image.finish()
}

async fn table_of(sql: &Sql, store: &Store) -> Arc<Table> {
    for statement in sql.parse(CREATE).unwrap().iter() {
        assert_eq!(statement.kind, StatementKind::Ddl);
        let env = env(store);
        let plan = sql.ddl(statement, &env).unwrap();
        let (namespace, base) = (plan.namespace.unwrap(), env.snapshot.seq());
        store
            .commit(Transaction { namespace, base, rows: Vec::new(), catalog: plan.writes, receipt: None })
            .await
            .unwrap();
    }
    store.catalog().table("main", "t").unwrap().clone()
}

fn env(store: &Store) -> RequestEnv {
    RequestEnv::new(store.snapshot(), "alice", crate::config::Role::User)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_matches_is_never_ruled_out() {
    let dir = tempfile::tempdir().unwrap();
    let config = crate::config::Config::new(dir.path());
    let store = Store::open(&StoreOptions { block_cache_size: 1 << 20, ..config.store }).unwrap();
    store.start(Box::new(|_| {}));
    let sql = Sql::new(SqlOptions { deadline: Duration::from_secs(30), ..config.sql }, Vec::new()).unwrap();
    let table = table_of(&sql, &store).await;
    let seed = std::env::var("SEED").ok().map_or(1, |seed| seed.parse().unwrap());
    eprintln!("SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let images: Vec<Vec<u8>> = (0..120).map(|_| row(&mut random, &table)).collect();
    let rows: Vec<ImageRef<'_>> = images.iter().map(|image| ImageRef::parse(image).unwrap().0).collect();
    let env = env(&store);
    let (mut narrow, mut ruled_out, mut matched) = (0, 0, 0);
    let mut shapes: HashMap<usize, Vec<(LivePlan, Vec<bool>)>> = HashMap::new();
    for _ in 0..600 {
        let text = format!("SELECT k FROM t WHERE {}", predicate(&mut random, &table, 3));
        // Some types do not compare with each other: such a query is refused.
        let plan = match sql.live(&text, &env) {
            Ok(Live::Incremental(plan)) => plan,
            Ok(Live::Requery(_)) => panic!("{text}"),
            Err(_) => continue,
        };
        // An overflow in one row says nothing of the others.
        let Ok(verdicts) = plan.matches(&rows) else { continue };
        narrow += usize::from(plan.anchors != Anchors::Any);
        for (row, matches) in rows.iter().zip(&verdicts) {
            let admitted = admits(&plan.anchors, &table, row);
            assert!(admitted || !matches, "SEED={seed}\n{text}\n{:?}\nrules out {row:?}", plan.anchors);
            matched += usize::from(*matches);
            ruled_out += usize::from(!admitted);
        }
        if let Some(shape) = plan.shape() {
            shapes.entry(shape).or_default().push((plan, verdicts));
        }
    }
    let together = asked_together(shapes.into_values().collect(), &rows);
    eprintln!("{narrow} of 600 narrow, {ruled_out} ruled out, {matched} matched, {together} asked together");
    assert!(narrow > 150 && ruled_out > 10_000 && matched > 5_000 && together > 0, "a test of nothing");
    store.close();
}

/// Plans of one shape answer together what each answered by itself, each here over other rows than the one before.
fn asked_together(shapes: Vec<Vec<(LivePlan, Vec<bool>)>>, rows: &[ImageRef<'_>]) -> usize {
    let mut together = 0;
    for same in shapes.iter().filter(|same| same.len() > 1) {
        let from = |at: usize| at % rows.len();
        let asked: Vec<_> = same.iter().enumerate().map(|(at, (plan, _))| (plan, &rows[from(at)..])).collect();
        // What a part of AND or CASE is not asked about alone it may be asked about here, and overflow.
        let Ok(answers) = LivePlan::matches_each(&asked) else { continue };
        let alone = same.iter().enumerate().flat_map(|(at, (_, verdicts))| &verdicts[from(at)..]);
        assert!(answers.iter().eq(alone), "{} plans of one shape", same.len());
        together += same.len();
    }
    together
}
