//! What one change costs in a one-column filter and in a transform: read in place out of the ring, through the copying
//! fallback, by the same Rust function natively on rows of the same bytes, and by the same logic in Extism. All of these
//! read the same rows again and again, out of their own caches; the filter is also measured on rows that another core has
//! just written, as a commit's are.
//!
//!   sh host/benches/run.sh plugins     builds the plugins and Extism's side first (`extism` beside this file)
//!
//! By itself, without Extism where its program was not built:
//!
//!   sh tests/run.sh plugins            builds the plugins, once
//!   cargo bench --profile dev --workspace --bench plugins
//!
//! with `-- late 1024 64` only that plugin, rows of so many bytes, and batches of so many; any of the three may be left out.
//!
//! (The release profile is for guests; another profile here would compile every dependency again.)

use std::collections::VecDeque;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use guest_sdk::native::{TestRow, TestTable};
use guest_sdk::output::Output;
use guest_sdk::row::FromRow;
use host::catalog::{NamespaceId, OnError, Seq, Stage};
use host::config::Config;
use host::plugins::registry::{Owner, PluginWorker};
use host::plugins::window::Mapping;
use host::plugins::{ModuleSource, Origin, PipelineId, Plugins, Rows};
use host::telemetry::Metrics;
use late::{Late, late};
use local_units::{Local, LocalUnits, local_units};
use wire::frame::ChangeMeta;
use wire::image::ImageAt;
use wire::{ColumnDecl, FrameBuilder, FrameView, ImageBuilder, Kind, Schema, Scope, Type, Value};

/// As the server.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const NS: NamespaceId = NamespaceId(1);

/// Each figure is that of the best of many windows: what else runs on the machine only ever adds to one. Long enough for a
/// steady figure, short enough for all 64 of them.
const MEASURED: Duration = Duration::from_millis(300);
const WINDOW: Duration = Duration::from_millis(10);

/// Bytes of a row's long text.
const SIZES: [usize; 4] = [256, 1024, 16 * 1024, 64 * 1024];
/// Rows of a batch.
const BATCHES: [usize; 2] = [1, 64];

/// Room for 64 rows of 64 KiB, some commits of them. What is freshly written goes into a ring as large as the server's.
const RING_BYTES: u32 = 16 << 20;

/// What another core has just written: bytes of a row's long text, and rows of a batch.
const FRESH_SIZES: [usize; 2] = [1024, 16 * 1024];
const FRESH_BATCH: usize = 64;
/// How often ours and natively written rows are measured in turns.
const FRESH_TURNS: usize = 4;
/// Rounds of a turn that do not count: the ring goes round once, and every page of it has been touched.
const FRESH_WARM: usize = 300;
const FRESH_ROUNDS: usize = 1000;

type Column = (&'static str, Type);

/// How long each round takes of the plugin's own function over rows that another core has just written; so many rounds'
/// rows are kept.
type Fresh = fn(&[Column], &[Vec<Value>], usize) -> Vec<Duration>;

/// A plugin with the table it reads.
struct Work {
    /// The name of its module, and of Extism's function.
    plugin: &'static str,
    /// The key first; the last one only makes the row long.
    columns: &'static [Column],
    row: fn(i64, String) -> Vec<Value>,
    /// Nanoseconds a change of the plugin's own function over rows of these columns.
    native: fn(&[Column], &[Vec<Value>]) -> f64,
    fresh: Option<Fresh>,
}

/// Extism's program has the same rows.
static WORKS: [Work; 2] = [
    Work {
        plugin: "late",
        columns: &[("id", Type::BigInt), ("dep_delay", Type::Double), ("pad", Type::Text)],
        row: |id, pad| vec![Value::Int(id), delay(id), Value::Text(pad)],
        native: late_natively,
        fresh: Some(late_freshly),
    },
    Work {
        plugin: "local_units",
        columns: &[
            ("id", Type::BigInt),
            ("carrier", Type::Text),
            ("flight", Type::Int),
            ("origin", Type::Text),
            ("dest", Type::Text),
            ("distance", Type::Double),
            ("dep_delay", Type::Double),
            ("pad", Type::Text),
        ],
        row: |id, pad| {
            let text = |text: &str| Value::Text(text.to_owned());
            let [carrier, origin, dest] = ["UA", "EWR", "IAH"].map(text);
            let (flight, distance) = (Value::Int(1545), Value::Float(1400.0));
            vec![Value::Int(id), carrier, flight, origin, dest, distance, delay(id), Value::Text(pad)]
        },
        native: local_units_natively,
        fresh: None,
    },
];

fn delay(id: i64) -> Value {
    Value::Float((id % 40) as f64)
}

fn main() {
    let extism = extism_program();
    let wanted = Wanted::named(std::env::args().skip(1).filter(|argument| !argument.starts_with('-')));
    for work in WORKS.iter().filter(|work| includes(&wanted.plugins, work.plugin)) {
        work.measure(extism.as_deref(), &wanted);
    }
    if extism.is_none() {
        println!("Extism was not measured; `sh host/benches/run.sh plugins` builds it.");
    }
}

/// What the command line names; of a kind that it does not name, all.
#[derive(Default)]
struct Wanted {
    plugins: Vec<&'static str>,
    sizes: Vec<usize>,
    batches: Vec<usize>,
}

impl Wanted {
    fn named(arguments: impl Iterator<Item = String>) -> Wanted {
        let mut wanted = Wanted::default();
        for argument in arguments {
            let number = argument.parse::<usize>().ok();
            if let Some(work) = WORKS.iter().find(|work| work.plugin == argument) {
                wanted.plugins.push(work.plugin);
            } else if let Some(size) = number.filter(|number| SIZES.contains(number)) {
                wanted.sizes.push(size);
            } else if let Some(batch) = number.filter(|number| BATCHES.contains(number)) {
                wanted.batches.push(batch);
            } else {
                let plugins = WORKS.each_ref().map(|work| work.plugin);
                panic!("{argument} is no plugin of {plugins:?}, no bytes of {SIZES:?} and no batch of {BATCHES:?}");
            }
        }
        wanted
    }
}

fn includes<T: PartialEq>(named: &[T], one: T) -> bool {
    named.is_empty() || named.contains(&one)
}

impl Work {
    fn measure(&self, extism: Option<&Path>, wanted: &Wanted) {
        let wasm = module(self.plugin);
        let side = |way| Side::new(self, &wasm, way, Some(RING_BYTES));
        let [mut in_place, mut copying] = [Mapping::InPlace, Mapping::Copy].map(side);
        println!("{}", self.plugin);
        println!(
            "{:>8} {:>6} {:>14} {:>14} {:>14} {:>14} {:>10} {:>10} {:>10}",
            "bytes", "batch", "in place", "copying", "native", "extism", "in/native", "copy/in", "extism/in"
        );
        for size in SIZES.into_iter().filter(|size| includes(&wanted.sizes, *size)) {
            for batch in BATCHES.into_iter().filter(|batch| includes(&wanted.batches, *batch)) {
                let rows = self.rows(size, batch);
                let section = Section::new(self, &rows);
                let [in_place, copying] = [in_place.nanos(&section), copying.nanos(&section)];
                let native = (self.native)(self.columns, &rows);
                let extism = extism.map(|program| in_extism(program, self.plugin, size, rows.len()));
                let [nanos, ratio] = match extism {
                    Some(extism) => [format!("{extism:.1} ns"), format!("{:.2}", extism / in_place)],
                    None => ["-", "-"].map(str::to_owned),
                };
                println!(
                    "{size:>8} {batch:>6} {in_place:>11.1} ns {copying:>11.1} ns {native:>11.1} ns {nanos:>14} \
                     {:>10.2} {:>10.2} {ratio:>10}",
                    in_place / native,
                    copying / in_place
                );
            }
        }
        if let Some(natively) = self.fresh {
            self.measure_fresh(&mut Side::new(self, &wasm, Mapping::InPlace, None), natively, wanted);
        }
    }

    /// Each commit is written by another core just before it is read: its rows have to come over from there.
    fn measure_fresh(&self, side: &mut Side, natively: Fresh, wanted: &Wanted) {
        let sizes: Vec<_> = FRESH_SIZES.into_iter().filter(|size| includes(&wanted.sizes, *size)).collect();
        if sizes.is_empty() || !includes(&wanted.batches, FRESH_BATCH) {
            return;
        }
        println!("{}, freshly written by another core", self.plugin);
        println!("{:>8} {:>6} {:>14} {:>14} {:>10}", "bytes", "batch", "in place", "native", "in/native");
        for size in sizes {
            let rows = self.rows(size, FRESH_BATCH);
            let section = Section::new(self, &rows);
            // As many as the ring has of ours: neither side finds its memory nearer than the other does.
            let kept = side.ring_bytes as usize / section.bytes.len();
            let (mut in_place, mut native) = (Vec::new(), Vec::new());
            for _ in 0..FRESH_TURNS {
                in_place.extend(side.fresh(&section));
                native.extend(natively(self.columns, &rows, kept));
            }
            let [in_place, native] = [in_place, native].map(|rounds| median_per_row(rounds, FRESH_BATCH));
            println!("{size:>8} {FRESH_BATCH:>6} {in_place:>11.1} ns {native:>11.1} ns {:>10.2}", in_place / native);
        }
    }

    fn rows(&self, size: usize, batch: usize) -> Vec<Vec<Value>> {
        (0..batch as i64).map(|id| (self.row)(id, "x".repeat(size))).collect()
    }
}

struct Module(Bytes);

impl ModuleSource for Module {
    fn wasm(&self, _: &str) -> Result<Option<Bytes>, String> {
        Ok(Some(self.0.clone()))
    }

    fn secret(&self) -> Result<[u8; 32], String> {
        Err("nothing is kept here".to_owned())
    }
}

/// The folder that cargo builds into.
fn target() -> PathBuf {
    let this = std::env::current_exe().expect("this program has a path");
    this.ancestors().nth(3).expect("benches lie in deps/ of the profile's folder").to_owned()
}

fn module(plugin: &str) -> Bytes {
    let folder = std::env::var_os("TIDEGATE_PLUGINS").map_or_else(|| target().join("plugins"), PathBuf::from);
    let path = folder.join(plugin).with_extension("wasm");
    let bytes = std::fs::read(&path).unwrap_or_else(|error| {
        panic!("{}: {error}; `sh tests/run.sh plugins` builds it", path.display());
    });
    bytes.into()
}

/// Extism's side, where it was built: a program of its own, since Extism brings a wasmtime of its own.
fn extism_program() -> Option<PathBuf> {
    match std::env::var_os("TIDEGATE_EXTISM_BENCH") {
        Some(path) => Some(path.into()),
        None => Some(target().join("extism/debug/extism-bench")).filter(|path| path.exists()),
    }
}

/// Nanoseconds a change. Started for each figure, so that all figures of a line are measured one after another.
fn in_extism(program: &Path, plugin: &str, size: usize, batch: usize) -> f64 {
    let output = Command::new(program).args([plugin, &size.to_string(), &batch.to_string()]).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert!(output.status.success(), "{}: {err}", program.display());
    let nanos = out.split_whitespace().nth(3).and_then(|nanos| nanos.parse().ok());
    nanos.unwrap_or_else(|| panic!("{} said: {out}", program.display()))
}

/// Rows as one commit's shared section.
struct Section {
    bytes: Vec<u8>,
    places: Vec<ImageAt>,
}

impl Section {
    fn new(work: &Work, rows: &[Vec<Value>]) -> Section {
        let kinds: Vec<Kind> = work.columns.iter().map(|(_, ty)| ty.kind()).collect();
        let mut frame = FrameBuilder::new(NS.0, [1; 16], 0);
        for row in rows {
            let mut image = ImageBuilder::new(kinds.len() as u16);
            for (column, value) in row.iter().enumerate() {
                image.set(column as u16, value);
            }
            let meta = ChangeMeta { table: 1, schema_version: 1, kinds: &kinds };
            frame.change(&Scope::Shared, meta, None, Some(&image.finish())).expect("an image just built");
        }
        let frame = frame.finish().expect("a frame just built");
        let view = FrameView::parse(&frame).expect("a frame just built");
        let section = view.section(&Scope::Shared).expect("it has rows");
        let places = section.changes.iter().filter_map(|change| Some(change.new?.1)).collect();
        Section { bytes: section.bytes.to_vec(), places }
    }
}

/// One engine with an open pipeline.
struct Side {
    plugins: Plugins,
    worker: PluginWorker,
    pipeline: PipelineId,
    metrics: Arc<Metrics>,
    seq: u64,
    ring_bytes: u32,
}

impl Side {
    /// Without `ring_bytes` the ring is as large as the server's.
    fn new(work: &Work, wasm: &Bytes, mapping: Mapping, ring_bytes: Option<u32>) -> Side {
        let mut options = Config::new(Path::new(".")).plugins;
        let ring_bytes = ring_bytes.unwrap_or(options.ring_bytes);
        // 64 rows of 64 KiB have room in the worker part, too.
        (options.ring_bytes, options.worker_bytes) = (ring_bytes, 8 << 20);
        let source = Box::new(Module(wasm.clone()));
        let metrics = Arc::new(Metrics::default());
        let plugins = Plugins::mapped(options, source, metrics.clone(), mapping).expect("an engine");
        let sha256 = plugins.inspect(wasm).expect("a module of plugins/").sha256;
        let stage = Stage { name: work.plugin.to_owned(), version: 1, sha256, params: String::new() };
        let column = |(id, (name, ty)): (usize, &(&str, Type))| ColumnDecl {
            id: id as u16,
            name: (*name).to_owned(),
            ty: *ty,
            nullable: true,
            key: id == 0,
        };
        let columns = work.columns.iter().enumerate().map(column).collect();
        let mut worker = plugins.worker(0);
        let opened = worker.open(Owner::shared(NS), &[stage], &Schema { columns }, OnError::Stop);
        Side { plugins, worker, pipeline: opened.expect("the pipeline opens").id, metrics, seq: 0, ring_bytes }
    }

    /// Nanoseconds a change, of the whole way through `run`.
    fn nanos(&mut self, rows: &Section) -> f64 {
        self.seq += 1;
        let commit = Some(Seq(self.seq));
        self.plugins.publish(NS, Seq(self.seq), &rows.bytes);
        per_row(rows.places.len(), || {
            let rows = Rows { origin: Origin::Live, commit, base: &rows.bytes, places: &rows.places };
            black_box(self.worker.run(self.pipeline, rows).expect("an honest plugin"));
        })
    }

    /// How long each round takes, of the whole way through `run`, over a commit that another core has just written: its
    /// frame, and the ring's copy of that.
    fn fresh(&mut self, rows: &Section) -> Vec<Duration> {
        let (plugins, missed) = (&self.plugins, self.metrics.ring_misses.get());
        let first = (Seq(self.seq), Vec::new());
        let write = |(last, mut base): (Seq, Vec<u8>)| {
            let seq = Seq(last.0 + 1);
            base.clear();
            base.extend_from_slice(&rows.bytes);
            plugins.publish(NS, seq, &base);
            (seq, base)
        };
        let rounds = handed_over(first, write, |(seq, base)| {
            self.seq = seq.0;
            let rows = Rows { origin: Origin::Live, commit: Some(*seq), base, places: &rows.places };
            black_box(self.worker.run(self.pipeline, rows).expect("an honest plugin"));
        });
        assert_eq!(self.metrics.ring_misses.get(), missed, "the ring has what was just published");
        rounds
    }
}

fn late_natively(columns: &[Column], rows: &[Vec<Value>]) -> f64 {
    let table = TestTable::new::<late::Flight>(columns).expect("the columns fit");
    let rows: Vec<_> = rows.iter().map(|row| table.row(row)).collect();
    let params = Late { minutes: 15 };
    per_row(rows.len(), || {
        for row in &rows {
            black_box(row.read(|row| late(&params, &FromRow::from_row(row))));
        }
    })
}

fn late_freshly(columns: &[Column], rows: &[Vec<Value>], kept: usize) -> Vec<Duration> {
    let table = TestTable::new::<late::Flight>(columns).expect("the columns fit");
    let params = Late { minutes: 15 };
    let first: Vec<TestRow<'_>> = Vec::new();
    let mut earlier = VecDeque::new();
    let write = |last: Vec<_>| {
        earlier.push_back(last);
        if earlier.len() > kept {
            earlier.pop_front();
        }
        rows.iter().map(|row| table.row(row)).collect()
    };
    handed_over(first, write, |fresh| {
        for row in fresh {
            black_box(row.read(|row| late(&params, &FromRow::from_row(row))));
        }
    })
}

/// With the output as bytes: what it borrows ends with the row, so whoever passes it on has to write it somewhere.
fn local_units_natively(columns: &[Column], rows: &[Vec<Value>]) -> f64 {
    let table = TestTable::new::<local_units::Flight>(columns).expect("the columns fit");
    let rows: Vec<_> = rows.iter().map(|row| table.row(row)).collect();
    let params = LocalUnits { late_from: 15, very_late_from: 60 };
    let mut image = ImageBuilder::new(Local::COLUMNS.len() as u16);
    let mut output = Vec::new();
    per_row(rows.len(), || {
        for row in &rows {
            image.clear();
            output.clear();
            row.read(|row| local_units(&params, &FromRow::from_row(row)).write(&mut image));
            image.finish_into(&mut output);
            black_box(&output);
        }
    })
}

fn per_row(rows: usize, mut run: impl FnMut()) -> f64 {
    // Warm: the first calls make instances and fill caches.
    (0..100).for_each(|_| run());
    let (started, mut best) = (Instant::now(), f64::INFINITY);
    while started.elapsed() < MEASURED {
        let (began, mut rounds) = (Instant::now(), 0u64);
        while began.elapsed() < WINDOW {
            (0..16).for_each(|_| run());
            rounds += 16;
        }
        best = best.min(began.elapsed().as_nanos() as f64 / (rounds * rows as u64) as f64);
    }
    best
}

/// Has another thread write anew and this one read, in turns; how long each reading took. Both spin until it is their turn:
/// nobody is woken in what is timed, and what was written is still where the other core wrote it.
fn handed_over<T: Send>(first: T, mut write: impl FnMut(T) -> T + Send, mut read: impl FnMut(&T)) -> Vec<Duration> {
    let (to_writer, old) = sync_channel(1);
    let (to_reader, new) = sync_channel(1);
    // Whatever ends one thread drops its ends of the channels, which ends the other.
    std::thread::scope(move |scope| {
        scope.spawn(move || {
            while let Some(last) = spin(&old) {
                if to_reader.send(write(last)).is_err() {
                    return;
                }
            }
        });
        let (mut last, mut rounds) = (first, Vec::with_capacity(FRESH_ROUNDS));
        for round in 0..FRESH_WARM + FRESH_ROUNDS {
            to_writer.send(last).expect("the writing thread lives");
            let fresh = spin(&new).expect("the writing thread lives");
            let started = Instant::now();
            read(&fresh);
            let took = started.elapsed();
            if round >= FRESH_WARM {
                rounds.push(took);
            }
            last = fresh;
        }
        rounds
    })
}

/// What comes next; `None` when nobody is there any more to send it.
fn spin<T>(from: &Receiver<T>) -> Option<T> {
    loop {
        match from.try_recv() {
            Ok(value) => return Some(value),
            Err(TryRecvError::Empty) => std::hint::spin_loop(),
            Err(TryRecvError::Disconnected) => return None,
        }
    }
}

/// Nanoseconds. Rounds in which a core was taken away are far longer than the rest.
fn median_per_row(mut rounds: Vec<Duration>, rows: usize) -> f64 {
    rounds.sort_unstable();
    rounds[rounds.len() / 2].as_nanos() as f64 / rows as f64
}
