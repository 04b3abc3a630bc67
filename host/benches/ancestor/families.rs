//! A column family per table, with RocksDB's own settings and with those of the ancestor's quick fix; and ours, where
//! all tables share four families. Each is filled by one process and opened by another, so that opening finds nothing
//! in memory. Ours keeps a change log beside the rows, which the others have not.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use host::config::Config;
use host::store::Store;
use rocksdb::{BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, Options, WriteBatch};

use crate::measure::{Resident, Table, bytes, resident, this_program};
use crate::world::World;

/// The first argument of a process that does one step of one way.
pub const COLUMN: &str = "families-column";

const TABLES: usize = 200;
const ROWS: i64 = 1_000;
/// Bytes of a row.
const TEXT: usize = 100;
const MIB: usize = 1 << 20;

const WAYS: [&str; 3] = ["default", "tuned", "ours"];

/// What one way costs.
struct Costs {
    /// With every table just filled.
    filled: Figures,
    /// After opening, and after one row of each table was read.
    open_seconds: f64,
    opened: Figures,
    /// After one row more was written to each table.
    written: Figures,
}

/// Memory of the process beyond what it had before; and what RocksDB says: write buffers, block cache, table readers.
#[derive(Clone, Copy)]
struct Figures {
    resident: usize,
    buffers: usize,
    cache: usize,
    readers: usize,
}

pub fn run() {
    let costs = WAYS.map(measure);
    let title =
        format!("families: {TABLES} tables of {ROWS} rows of {TEXT} B; anonymous memory (PSS) beyond the start's");
    let head = ["one per table, defaults", "one per table, tuned", "ours: all in four"];
    let mut table = Table::new(title, &head);
    let mut row = |name: &str, cell: &dyn Fn(&Costs) -> String| table.row(name, costs.each_ref().map(cell));
    type Moment = (&'static str, fn(&Costs) -> Figures);
    let moments: [Moment; 3] = [
        ("tables filled", |costs| costs.filled),
        ("opened, a row of each read", |costs| costs.opened),
        ("a row more in each", |costs| costs.written),
    ];
    row("time to open", &|costs| format!("{:.0} ms", costs.open_seconds * 1e3));
    for (name, of) in moments {
        row(name, &|costs| bytes(of(costs).resident));
        row("  RocksDB says: write buffers", &|costs| bytes(of(costs).buffers));
        row("  block cache", &|costs| bytes(of(costs).cache));
        row("  table readers", &|costs| bytes(of(costs).readers));
    }
    table.print(&[
        "50 tables with RocksDB's defaults take 10 GB, tuned 1 GB",
        "1,000 families take 16 GB, three 48 MB (both counted with full write buffers)",
    ]);
    println!(
        "  What write buffers may grow to by the settings (not measured): {} with the defaults, {} tuned, {} ours",
        bytes(2 * 64 * MIB * TABLES),
        bytes(2 * 8 * MIB * TABLES),
        bytes(2 * 8 * MIB * 4),
    );
}

fn measure(way: &str) -> Costs {
    let dir = tempfile::tempdir().unwrap();
    let fill = step(way, dir.path(), "fill");
    let open = step(way, dir.path(), "open");
    Costs { filled: figures(&fill), open_seconds: open[0], opened: figures(&open[1..5]), written: figures(&open[5..]) }
}

fn figures(numbers: &[f64]) -> Figures {
    let at = |index: usize| numbers[index] as usize;
    Figures { resident: at(0), buffers: at(1), cache: at(2), readers: at(3) }
}

/// One step in a process of its own; the numbers it says.
fn step(way: &str, dir: &Path, step: &str) -> Vec<f64> {
    let mut command = Command::new(this_program());
    command.args([COLUMN, way, step]).arg(dir).stderr(Stdio::inherit());
    let output = command.output().expect("this program starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{way}, {step}: {text}");
    text.split_whitespace().map(|number| number.parse().unwrap_or_else(|_| panic!("a number in {text}"))).collect()
}

/// What [`step`] starts.
pub fn column(arguments: &[String]) {
    let [way, step, dir] = arguments else { panic!("way, step and directory: {arguments:?}") };
    let numbers = match (way.as_str(), step.as_str()) {
        ("ours", "fill") => ours_fill(Path::new(dir)),
        ("ours", _) => ours_open(Path::new(dir)),
        (way, "fill") => theirs_fill(&Theirs::new(way), Path::new(dir)),
        (way, _) => theirs_open(&Theirs::new(way), Path::new(dir)),
    };
    let numbers: Vec<String> = numbers.iter().map(f64::to_string).collect();
    println!("{}", numbers.join(" "));
}

fn text() -> String {
    "x".repeat(TEXT)
}

fn beyond(before: Resident, (buffers, cache, readers): (u64, u64, u64)) -> [f64; 4] {
    let resident = resident().anonymous.saturating_sub(before.anonymous);
    [resident as f64, buffers as f64, cache as f64, readers as f64]
}

fn ours_fill(dir: &Path) -> Vec<f64> {
    let before = resident();
    let world = World::new(dir);
    for table in 0..TABLES {
        world.write(&format!("CREATE TABLE t{table} (id BIGINT PRIMARY KEY, note TEXT)"));
        world.insert(&format!("t{table}"), 0..ROWS, &text());
    }
    let said = beyond(before, world.store.memory());
    world.store.close();
    said.to_vec()
}

/// The memory is that of the SQL engine and its threads as well, which the other ways have not.
fn ours_open(dir: &Path) -> Vec<f64> {
    let before = resident();
    let config = Config::new(dir);
    let began = Instant::now();
    let store = Store::open(&config.store).unwrap();
    let opening = began.elapsed().as_secs_f64();
    let world = World::over(store, config);
    for table in 0..TABLES {
        let mut found = 0;
        world.each_batch(&format!("SELECT note FROM t{table} WHERE id = 7"), |batch| found += batch.num_rows());
        assert_eq!(found, 1, "t{table}");
    }
    let opened = beyond(before, world.store.memory());
    for table in 0..TABLES {
        world.insert(&format!("t{table}"), ROWS..ROWS + 1, &text());
    }
    let written = beyond(before, world.store.memory());
    world.store.close();
    [&[opening][..], &opened, &written].concat()
}

/// The ancestor's way: RocksDB itself, without anything around it.
struct Theirs {
    database: Options,
    /// Of the tuned way, for all families. With the defaults each family has one of its own.
    cache: Option<Cache>,
}

impl Theirs {
    /// The values of the quick fix are our defaults as well.
    fn new(way: &str) -> Theirs {
        let mut database = Options::default();
        database.create_if_missing(true);
        if way == "default" {
            return Theirs { database, cache: None };
        }
        database.set_max_background_jobs(2);
        database.set_max_open_files(256);
        Theirs { database, cache: Some(Cache::new_lru_cache(128 * MIB)) }
    }

    /// Made anew for each family: a copy would share the cache.
    fn family(&self) -> Options {
        let mut family = Options::default();
        if let Some(cache) = &self.cache {
            let mut blocks = BlockBasedOptions::default();
            blocks.set_block_cache(cache);
            family.set_block_based_table_factory(&blocks);
            family.set_write_buffer_size(8 * MIB);
            family.set_max_write_buffer_number(2);
        }
        family
    }

    fn memory(&self, db: &DB) -> (u64, u64, u64) {
        let cache: Vec<&Cache> = self.cache.iter().collect();
        let stats = rocksdb::perf::get_memory_usage_stats(Some(&[db]), Some(cache.as_slice())).unwrap();
        let cached = match self.cache {
            Some(_) => stats.cache_total,
            None => (0..TABLES).map(|table| own_cache(db, table)).sum::<u64>(),
        };
        (stats.mem_table_total, cached, stats.mem_table_readers_total)
    }
}

/// What a family's own cache holds.
fn own_cache(db: &DB, table: usize) -> u64 {
    let family = db.cf_handle(&name(table)).unwrap();
    db.property_int_value_cf(family, "rocksdb.block-cache-usage").unwrap().unwrap_or_default()
}

fn name(table: usize) -> String {
    format!("t{table}")
}

fn theirs_fill(theirs: &Theirs, dir: &Path) -> Vec<f64> {
    let before = resident();
    let mut db = DB::open(&theirs.database, dir).unwrap();
    for table in 0..TABLES {
        db.create_cf(name(table), &theirs.family()).unwrap();
        let family = db.cf_handle(&name(table)).unwrap();
        let mut batch = WriteBatch::default();
        for id in 0..ROWS {
            batch.put_cf(family, id.to_be_bytes(), text());
        }
        db.write(batch).unwrap();
    }
    let said = beyond(before, theirs.memory(&db));
    for table in 0..TABLES {
        db.flush_cf(db.cf_handle(&name(table)).unwrap()).unwrap();
    }
    said.to_vec()
}

fn theirs_open(theirs: &Theirs, dir: &Path) -> Vec<f64> {
    let before = resident();
    let began = Instant::now();
    let names = (0..TABLES).map(name).chain([rocksdb::DEFAULT_COLUMN_FAMILY_NAME.to_owned()]);
    let families = names.map(|name| ColumnFamilyDescriptor::new(name, theirs.family()));
    let db = DB::open_cf_descriptors(&theirs.database, dir, families).unwrap();
    let opening = began.elapsed().as_secs_f64();
    for table in 0..TABLES {
        let family = db.cf_handle(&name(table)).unwrap();
        assert!(db.get_cf(family, 7_i64.to_be_bytes()).unwrap().is_some(), "t{table}");
    }
    let opened = beyond(before, theirs.memory(&db));
    for table in 0..TABLES {
        let family = db.cf_handle(&name(table)).unwrap();
        db.put_cf(family, ROWS.to_be_bytes(), text()).unwrap();
    }
    let written = beyond(before, theirs.memory(&db));
    [&[opening][..], &opened, &written].concat()
}
