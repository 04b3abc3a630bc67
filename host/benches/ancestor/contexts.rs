//! A SessionContext per query, as the ancestor had it; one that all share, as it has since; one per core, which it
//! thinks about; and ours, which shares one and clones nothing of it. The first three read a table in memory, which
//! is the best that can happen to them; ours reads its store.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use arrow::record_batch::RecordBatch;
use datafusion::datasource::MemTable;
use datafusion::prelude::{SessionConfig, SessionContext};
use futures::StreamExt;
use host::sql::session::Sql;
use tokio::runtime::{Builder, Runtime};

use crate::measure::{Table, bytes, cores, cpu_seconds, ever_allocated, held_by, median};
use crate::ours::batch;
use crate::world::World;

const ROWS: i64 = 1_000;
/// Contexts that are kept, to see what they hold: one second of the load that the ancestor's text speaks of.
const KEPT: usize = 1_000;
/// Queries of each measurement, on each thread.
const QUERIES: usize = 300;
/// Measurements of each way, in turns, so that whatever else the machine does falls on all.
const ROUNDS: usize = 5;
const QUERY: &str = "SELECT id, note FROM t WHERE id > 300 AND note <> 'row 7' LIMIT 20";
/// What it has to answer.
const ANSWERS: usize = 20;

type Query<'a> = dyn Fn(&Runtime, usize) -> usize + Sync + 'a;

/// One way to have contexts.
struct Way<'a> {
    name: &'static str,
    contexts: String,
    held: usize,
    /// Runs the query once, on the thread of this number; how many rows there were.
    query: Box<Query<'a>>,
}

/// What queries cost.
#[derive(Default)]
struct Costs {
    allocated: Vec<f64>,
    alone: Vec<f64>,
    together: Vec<f64>,
    rate: Vec<f64>,
}

pub fn run() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path());
    world.write("CREATE TABLE t (id BIGINT PRIMARY KEY, note TEXT)");
    world.insert("t", 0..ROWS, "a note");
    let table = memory_table();
    let ways = ways(&world, &table);
    let mut costs: Vec<Costs> = ways.iter().map(|_| Costs::default()).collect();
    for _ in 0..ROUNDS {
        for (way, costs) in ways.iter().zip(&mut costs) {
            measure(way, costs);
        }
    }
    print(&ways, &costs);
    drop(ways);
    world.store.close();
}

fn ways<'a>(world: &'a World, table: &'a Arc<MemTable>) -> Vec<Way<'a>> {
    let runtime = runtime();
    // What is made once in a process (the tables of functions, say) belongs to no context.
    black_box(plain(&runtime, &context(table)));
    let used = |context: SessionContext| {
        plain(&runtime, &context);
        context
    };
    let (kept, of_kept) = held_by(|| (0..KEPT).map(|_| used(context(table))).collect::<Vec<_>>());
    drop(kept);
    let (shared, of_shared) = held_by(|| used(context(table)));
    let (per_core, of_per_core) = held_by(|| (0..cores()).map(|_| used(context(table))).collect::<Vec<_>>());
    let engine = || {
        let sql = Arc::new(Sql::new(world.config.sql.clone(), Vec::new()).unwrap());
        ours(&runtime, world, &sql);
        sql
    };
    let (sql, of_sql) = held_by(engine);
    let (sqls, of_sqls) = held_by(|| (0..cores()).map(|_| engine()).collect::<Vec<_>>());
    vec![
        way("a context per query", KEPT, of_kept, move |runtime, _| plain(runtime, &context(table))),
        way("one shared", 1, of_shared, move |runtime, _| plain(runtime, &shared)),
        way("one per core", cores(), of_per_core, move |runtime, core| plain(runtime, &per_core[core])),
        way("ours: one shared", 1, of_sql, move |runtime, _| ours(runtime, world, &sql)),
        way("ours, one per core", cores(), of_sqls, move |runtime, core| ours(runtime, world, &sqls[core])),
    ]
}

fn way<'a>(
    name: &'static str,
    contexts: usize,
    held: usize,
    query: impl Fn(&Runtime, usize) -> usize + Sync + 'a,
) -> Way<'a> {
    Way { name, contexts: contexts.to_string(), held, query: Box::new(query) }
}

fn measure(way: &Way<'_>, costs: &mut Costs) {
    let per_query = |value: f64, threads: usize| value / (QUERIES * threads) as f64;
    let (cpu, allocated) = (cpu_seconds(), ever_allocated());
    queries(way, 0);
    costs.alone.push(per_query(cpu_seconds() - cpu, 1));
    costs.allocated.push(per_query((ever_allocated() - allocated) as f64, 1));
    let (cpu, began) = (cpu_seconds(), Instant::now());
    std::thread::scope(|scope| {
        (0..cores()).for_each(|core| {
            scope.spawn(move || queries(way, core));
        });
    });
    costs.together.push(per_query(cpu_seconds() - cpu, cores()));
    costs.rate.push((QUERIES * cores()) as f64 / began.elapsed().as_secs_f64());
}

fn queries(way: &Way<'_>, core: usize) {
    let runtime = runtime();
    for _ in 0..QUERIES {
        assert_eq!(black_box((way.query)(&runtime, core)), ANSWERS, "{}", way.name);
    }
}

fn print(ways: &[Way<'_>], costs: &[Costs]) {
    let title = format!(
        "contexts: {QUERY}, over {ROWS} rows; medians of {ROUNDS} rounds of {QUERIES} queries a thread; {} cores",
        cores()
    );
    let head = ["contexts", "held by them", "allocated a query", "CPU a query, alone", "all cores busy", "queries/s"];
    let mut table = Table::new(title, &head);
    for (way, costs) in ways.iter().zip(costs) {
        let micros = |seconds: &[f64]| format!("{:.0} µs", median(seconds) * 1e6);
        table.row(
            way.name,
            [
                way.contexts.clone(),
                bytes(way.held),
                bytes(median(&costs.allocated) as usize),
                micros(&costs.alone),
                micros(&costs.together),
                format!("{:.0}", median(&costs.rate)),
            ],
        );
    }
    table.print(&["1,000 contexts a second leak 50 to 200 MB a second; one shared: less than 1 MB in all"]);
    for (name, shared, per_core) in [("DataFusion", 1, 2), ("ours", 3, 4)] {
        let times = median(&costs[per_core].rate) / median(&costs[shared].rate);
        let held = bytes(ways[per_core].held.saturating_sub(ways[shared].held));
        println!("  One per core against one shared, {name}: {times:.2} × the queries a second, for {held} more");
    }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn memory_table() -> Arc<MemTable> {
    let batch = batch(0..ROWS, "a note");
    Arc::new(MemTable::try_new(batch.schema(), vec![vec![batch]]).unwrap())
}

/// As many partitions as ours has.
fn context(table: &Arc<MemTable>) -> SessionContext {
    let context = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(cores().min(8)));
    context.register_table("t", table.clone()).unwrap();
    context
}

fn plain(runtime: &Runtime, context: &SessionContext) -> usize {
    runtime.block_on(async {
        let batches = context.sql(QUERY).await.unwrap().collect().await.unwrap();
        batches.iter().map(RecordBatch::num_rows).sum()
    })
}

fn ours(runtime: &Runtime, world: &World, sql: &Arc<Sql>) -> usize {
    runtime.block_on(async {
        let statements = sql.parse(QUERY).unwrap();
        let mut stream = sql.query(&statements[0], world.env("bench"), false).await.unwrap();
        let mut rows = 0;
        while let Some(batch) = stream.batches.next().await {
            rows += batch.unwrap().num_rows();
        }
        rows
    })
}
