//! What SQL costs before and beside its work, against plain `ctx.sql().collect()` in the same run.
//!
//! ```text
//! cargo bench --profile dev --workspace --bench sql
//! ```
//!
//! `--profile dev` and `--workspace` take the crates that are compiled already; the bench profile would compile
//! DataFusion and RocksDB once more, and by other flags than the server runs with.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{Int32Array, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use arrow::record_batch::RecordBatch;
use criterion::Criterion;
use datafusion::datasource::MemTable;
use datafusion::prelude::SessionContext;
use futures::StreamExt;
use host::config::Role;
use host::sql::session::Sql;
use host::sql::{Param, RequestEnv, SqlOptions, StatementKind};
use host::store::{Store, StoreOptions, Transaction};
use tokio::runtime::Runtime;

/// As the server.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROWS: i32 = 1_000;
/// Interleaved pairs of a comparison: enough for a steady median on a machine that does other things as well.
const PAIRS: usize = 2_000;

const LOOKUP: &str = "SELECT name, n FROM t WHERE id = $1";
const PLAIN_LOOKUP: &str = "SELECT name, n FROM t WHERE id = 500";
const REPEATED: &str = "SELECT name, n FROM t WHERE n > $1 AND name <> $2 LIMIT 20";
const PLAIN_REPEATED: &str = "SELECT name, n FROM t WHERE n > 3 AND name <> 'row 7' LIMIT 20";
const GROUPED: &str = "SELECT n, count(*), max(name) FROM t WHERE id < $1 GROUP BY n ORDER BY n";
const PLAIN_GROUPED: &str = "SELECT n, count(*), max(name) FROM t WHERE id < 100 GROUP BY n ORDER BY n";
const UPDATE: &str = "UPDATE t SET n = n + $2 WHERE id = $1";
/// The same change; that it is by key is for the planner to find out.
const PLANNED_UPDATE: &str = "UPDATE t SET n = n + $2 WHERE id = $1 AND true";
const CONSTANT_UPDATE: &str = "UPDATE t SET n = $2 WHERE id = $1";
/// What any planner has to do for it at least: find the row and compute the new value.
const PLAIN_UPDATE: &str = "SELECT id, n + 1 FROM t WHERE id = 500";

struct Bench {
    runtime: Runtime,
    sql: Arc<Sql>,
    store: Store,
    plain: SessionContext,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        let runtime = Runtime::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&StoreOptions::new(&dir.path().join("store"))).unwrap();
        store.start(Box::new(|_| {}));
        let options = SqlOptions {
            memory_bytes: 256 << 20,
            spill_bytes: 1 << 30,
            spill_dir: dir.path().join("spill"),
            deadline: Duration::from_secs(30),
            batch_rows: 8_192,
            target_partitions: 2,
            plan_cache_bytes: 16 << 20,
            heavy_queries: 2,
            heavy_queue: 256,
        };
        let sql = Sql::new(options, Vec::new());
        let bench = Bench { runtime, sql: Arc::new(sql.unwrap()), store, plain: plain(), _dir: dir };
        bench.write("CREATE TABLE t (id INT PRIMARY KEY, name TEXT, n INT)", &[]);
        bench.write("CREATE TABLE w (id INT PRIMARY KEY, name TEXT, n INT)", &[]);
        let rows: Vec<String> = (0..ROWS).map(|id| format!("({id}, 'row {id}', {})", id % 10)).collect();
        bench.write(&format!("INSERT INTO t VALUES {}", rows.join(", ")), &[]);
        bench
    }

    fn env(&self, params: &[Param]) -> RequestEnv {
        let env = RequestEnv::new(self.store.snapshot(), "bench", Role::Admin);
        RequestEnv { params: Arc::new(params.to_vec()), ..env }
    }

    /// Everything between the text and its rows, as a request does it.
    fn query(&self, text: &str, params: &[Param]) -> usize {
        self.runtime.block_on(async {
            let statements = self.sql.parse(text).unwrap();
            let mut stream = self.sql.query(&statements[0], self.env(params), false).await.unwrap();
            let mut rows = 0;
            while let Some(batch) = stream.batches.next().await {
                rows += batch.unwrap().num_rows();
            }
            rows
        })
    }

    /// Until the first batch is there.
    fn first(&self, text: &str, params: &[Param]) -> usize {
        self.runtime.block_on(async {
            let statements = self.sql.parse(text).unwrap();
            let mut stream = self.sql.query(&statements[0], self.env(params), false).await.unwrap();
            stream.batches.next().await.unwrap().unwrap().num_rows()
        })
    }

    fn plain(&self, text: &str) -> usize {
        self.runtime.block_on(async {
            let batches = self.plain.sql(text).await.unwrap().collect().await.unwrap();
            batches.iter().map(RecordBatch::num_rows).sum()
        })
    }

    fn plain_first(&self, text: &str) -> usize {
        self.runtime.block_on(async {
            let mut stream = self.plain.sql(text).await.unwrap().execute_stream().await.unwrap();
            stream.next().await.unwrap().unwrap().num_rows()
        })
    }

    /// The change set alone: planned, not committed.
    fn plan_write(&self, text: &str, params: &[Param]) -> Transaction {
        self.runtime.block_on(async {
            let statements = self.sql.parse(text).unwrap();
            let env = self.env(params);
            let (base, catalog) = (env.snapshot.seq(), env.catalog.clone());
            let namespace = catalog.namespace("main").unwrap().id;
            match statements[0].kind {
                StatementKind::Ddl => {
                    let plan = self.sql.ddl(&statements[0], &env).unwrap();
                    Transaction { namespace, base, rows: Vec::new(), catalog: plan.writes, receipt: None }
                }
                _ => {
                    let changes = self.sql.change_set(&statements[0], env).await.unwrap();
                    Transaction { namespace, base, rows: changes.writes, catalog: Vec::new(), receipt: None }
                }
            }
        })
    }

    fn write(&self, text: &str, params: &[Param]) {
        let transaction = self.plan_write(text, params);
        self.runtime.block_on(self.store.commit(transaction)).unwrap();
    }
}

/// DataFusion as it comes, over the same rows in memory.
fn plain() -> SessionContext {
    let context = SessionContext::new();
    let schema = Arc::new(Schema::new(vec![
        Field::new("id", DataType::Int32, false),
        Field::new("name", DataType::Utf8, true),
        Field::new("n", DataType::Int32, true),
    ]));
    let names: StringArray = (0..ROWS).map(|id| Some(format!("row {id}"))).collect();
    let columns: Vec<arrow::array::ArrayRef> = vec![
        Arc::new(Int32Array::from_iter_values(0..ROWS)),
        Arc::new(names),
        Arc::new(Int32Array::from_iter_values((0..ROWS).map(|id| id % 10))),
    ];
    let batch = RecordBatch::try_new(schema.clone(), columns).unwrap();
    context.register_table("t", Arc::new(MemTable::try_new(schema, vec![vec![batch]]).unwrap())).unwrap();
    context
}

/// Medians of two things done in turns, so that whatever else the machine does falls on both.
fn compare(name: &str, mut ours: impl FnMut() -> usize, mut plain: impl FnMut() -> usize) {
    let mut times = [Vec::with_capacity(PAIRS), Vec::with_capacity(PAIRS)];
    for _ in 0..PAIRS {
        for (times, work) in times.iter_mut().zip([&mut ours as &mut dyn FnMut() -> usize, &mut plain]) {
            let began = Instant::now();
            black_box(work());
            times.push(began.elapsed());
        }
    }
    let [ours, plain] = times.map(|mut times| {
        times.sort();
        times[times.len() / 2]
    });
    let ratio = plain.as_secs_f64() / ours.as_secs_f64();
    println!("{name:<44} {:>8.1} µs  plain {:>8.1} µs  {ratio:>5.1} ×", micros(ours), micros(plain));
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn main() {
    let bench = Bench::new();
    let lookup = [Param::Int(500)];
    let repeated = [Param::Int(3), Param::Text("row 7".to_owned())];
    let grouped = [Param::Int(100)];
    let changed = [Param::Int(500), Param::Int(1)];
    assert_eq!((bench.query(LOOKUP, &lookup), bench.plain(PLAIN_LOOKUP)), (1, 1));
    assert_eq!((bench.query(REPEATED, &repeated), bench.plain(PLAIN_REPEATED)), (20, 20));
    assert_eq!((bench.query(GROUPED, &grouped), bench.plain(PLAIN_GROUPED)), (10, 10));
    for update in [UPDATE, PLANNED_UPDATE, CONSTANT_UPDATE] {
        assert_eq!((bench.plan_write(update, &changed).rows.len(), bench.plain(PLAIN_UPDATE)), (1, 1));
    }

    println!("in turns, median of {PAIRS}:");
    compare("key lookup", || bench.query(LOOKUP, &lookup), || bench.plain(PLAIN_LOOKUP));
    compare(
        "repeated query, until its first rows",
        || bench.first(REPEATED, &repeated),
        || bench.plain_first(PLAIN_REPEATED),
    );
    compare(
        "grouped query, until its first rows",
        || bench.first(GROUPED, &grouped),
        || bench.plain_first(PLAIN_GROUPED),
    );

    let update = |text: &'static str| bench.plan_write(text, &changed).rows.len();
    compare("update by key", || update(UPDATE), || bench.plain(PLAIN_UPDATE));
    compare("update by key to a constant", || update(CONSTANT_UPDATE), || bench.plain(PLAIN_UPDATE));
    compare("update by key, planned physically", || update(PLANNED_UPDATE), || bench.plain(PLAIN_UPDATE));

    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("query");
    group.bench_function("key lookup", |b| b.iter(|| bench.query(LOOKUP, &lookup)));
    group.bench_function("key lookup, plain", |b| b.iter(|| bench.plain(PLAIN_LOOKUP)));
    group.bench_function("repeated", |b| b.iter(|| bench.query(REPEATED, &repeated)));
    group.bench_function("repeated, plain", |b| b.iter(|| bench.plain(PLAIN_REPEATED)));
    group.bench_function("grouped", |b| b.iter(|| bench.query(GROUPED, &grouped)));
    group.bench_function("grouped, plain", |b| b.iter(|| bench.plain(PLAIN_GROUPED)));
    group.finish();

    // What a lookup is made of.
    let mut group = criterion.benchmark_group("step");
    group.bench_function("statements kept from before", |b| b.iter(|| bench.sql.parse(LOOKUP).unwrap()));
    let mut number = 0;
    group.bench_function("parse of a new text", |b| {
        b.iter(|| {
            number += 1;
            bench.sql.parse(&format!("SELECT name, n FROM t WHERE id = {number}")).unwrap()
        })
    });
    group.bench_function("snapshot and request", |b| b.iter(|| bench.env(&lookup)));
    group.finish();

    let mut group = criterion.benchmark_group("write");
    let insert = "INSERT INTO w VALUES ($1, $2, $3)";
    let row = |id: i64| [Param::Int(id), Param::Text(format!("row {id}")), Param::Int(id % 10)];
    group.bench_function("insert, planned", |b| b.iter(|| bench.plan_write(insert, &row(-1))));
    let mut id = 0;
    group.bench_function("insert, planned and durable", |b| {
        b.iter(|| {
            id += 1;
            bench.write(insert, &row(id));
        })
    });
    let values = |from: i64| -> String {
        let rows: Vec<String> = (from..from + 500).map(|id| format!("({id}, 'row {id}', {})", id % 10)).collect();
        format!("INSERT INTO w VALUES {}", rows.join(", "))
    };
    group.bench_function("500 rows, planned", |b| b.iter(|| bench.plan_write(&values(-1_000), &[])));
    let mut from = 100_000_000;
    group.bench_function("500 rows, planned and durable", |b| {
        b.iter(|| {
            from += 500;
            bench.write(&values(from), &[]);
        })
    });
    group.bench_function("update by key", |b| b.iter(|| bench.plan_write(UPDATE, &changed)));
    group.bench_function("update by key to a constant", |b| b.iter(|| bench.plan_write(CONSTANT_UPDATE, &changed)));
    group
        .bench_function("update by key, planned physically", |b| b.iter(|| bench.plan_write(PLANNED_UPDATE, &changed)));
    group.bench_function("delete by key", |b| b.iter(|| bench.plan_write("DELETE FROM t WHERE id = $1", &lookup)));
    group.finish();
    criterion.final_summary();
}
