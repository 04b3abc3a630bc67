//! A whole table read: collected into a vector of rows, as the ancestor's `scan_all` does it; collected into batches,
//! as DataFusion's `collect` does; and streamed, each batch let go before the next. Counted is the most that is held
//! at a time. The block cache is the same for all three, and bounded.

use std::collections::HashMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use arrow::array::{Array, Int64Array, StringArray};
use arrow::record_batch::RecordBatch;
use host::config::Config;
use serde_json::Value;

use crate::measure::{Table, bytes, most_held};
use crate::world::World;

const ROWS: i64 = 300_000;
/// Rows of one commit.
const COMMIT: i64 = 10_000;
/// Bytes of a row's text.
const TEXT: usize = 100;

const ALL: &str = "SELECT id, note FROM t";

type Row = HashMap<String, Value>;

pub fn run() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::new(dir.path());
    // On a busy machine the slowest way takes its time.
    config.sql.deadline = Duration::from_secs(30);
    let world = World::with(config);
    world.write("CREATE TABLE t (id BIGINT PRIMARY KEY, note TEXT)");
    let note = "n".repeat(TEXT);
    for first in (0..ROWS).step_by(COMMIT as usize) {
        world.insert("t", first..first + COMMIT, &note);
    }
    // Once before: what is made at the first query is not the scan's.
    assert_eq!(streamed(&world), ROWS as usize);
    let title = format!("scan: all of a table of {ROWS} rows of {TEXT} B of text; the most held at a time");
    let mut table = Table::new(title, &["most held", "time"]);
    type Way = (&'static str, fn(&World) -> usize);
    let ways: [Way; 3] = [
        ("collected rows (maps of JSON values)", collected_rows),
        ("collected batches", collected_batches),
        ("streamed", streamed),
    ];
    for (name, way) in ways {
        let began = Instant::now();
        let (rows, most) = most_held(|| way(&world));
        assert_eq!(rows, ROWS as usize, "{name}");
        table.row(name, [bytes(most), format!("{:.2} s", began.elapsed().as_secs_f64())]);
    }
    table.print(&["100,000 rows collected take 10 GB"]);
    world.store.close();
}

fn streamed(world: &World) -> usize {
    let mut rows = 0;
    world.each_batch(ALL, |batch| rows += black_box(batch).num_rows());
    rows
}

fn collected_batches(world: &World) -> usize {
    let mut batches = Vec::new();
    world.each_batch(ALL, |batch| batches.push(batch));
    black_box(batches).iter().map(RecordBatch::num_rows).sum()
}

fn collected_rows(world: &World) -> usize {
    let mut rows: Vec<Row> = Vec::new();
    world.each_batch(ALL, |batch| rows.extend(rows_of(&batch)));
    black_box(rows).len()
}

fn rows_of(batch: &RecordBatch) -> impl Iterator<Item = Row> {
    let ids = batch.column(0).as_any().downcast_ref::<Int64Array>().unwrap();
    let notes = batch.column(1).as_any().downcast_ref::<StringArray>().unwrap();
    ids.values().iter().zip(notes).map(|(id, note)| {
        let note = note.map_or(Value::Null, Value::from);
        Row::from([("id".to_owned(), Value::from(*id)), ("note".to_owned(), note)])
    })
}
