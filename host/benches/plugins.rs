//! What one change costs in a one-column filter: read in place out of the ring, through the copying fallback, and by the
//! same Rust function natively on rows of the same bytes.
//!
//!   sh tests/run.sh plugins            builds the plugins, once
//!   cargo bench --profile dev --workspace --bench plugins
//!
//! (The release profile is for guests; another profile here would compile every dependency again.)

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use guest_sdk::native::{TestTable, Type as NativeType, Value as NativeValue};
use guest_sdk::row::FromRow;
use host::catalog::{NamespaceId, OnError, Seq, Stage};
use host::config::Config;
use host::plugins::registry::{Owner, PluginWorker};
use host::plugins::window::Mapping;
use host::plugins::{ModuleSource, Origin, PipelineId, Plugins, Rows};
use host::telemetry::Metrics;
use late::{Late, late};
use wire::frame::ChangeMeta;
use wire::image::ImageAt;
use wire::{ColumnDecl, FrameBuilder, FrameView, ImageBuilder, Kind, Schema, Scope, Type};

const NS: NamespaceId = NamespaceId(1);
const KINDS: [Kind; 3] = [Kind::Int, Kind::Float, Kind::Text];

/// Long enough for a steady figure, short enough for all 24 of them.
const MEASURED: Duration = Duration::from_millis(300);

struct Module(Bytes);

impl ModuleSource for Module {
    fn wasm(&self, _: &str) -> Result<Option<Bytes>, String> {
        Ok(Some(self.0.clone()))
    }

    fn secret(&self) -> Result<[u8; 32], String> {
        Err("nothing is kept here".to_owned())
    }
}

fn main() {
    let wasm = module();
    let sides = [Mapping::InPlace, Mapping::Copy].map(|mapping| Side::new(&wasm, mapping));
    let [mut in_place, mut copying] = sides;
    println!(
        "{:>8} {:>6} {:>14} {:>14} {:>14} {:>10} {:>10}",
        "bytes", "batch", "in place", "copying", "native", "in/native", "copy/in"
    );
    for size in [256, 1024, 16 * 1024, 64 * 1024] {
        for batch in [1, 64] {
            let rows = Section::new(size, batch);
            let [in_place, copying] = [in_place.nanos(&rows), copying.nanos(&rows)];
            let native = native(size, batch);
            println!(
                "{size:>8} {batch:>6} {:>11.1} ns {:>11.1} ns {:>11.1} ns {:>10.2} {:>10.2}",
                in_place,
                copying,
                native,
                in_place / native,
                copying / in_place
            );
        }
    }
}

fn module() -> Bytes {
    let folder = std::env::var_os("TIDEGATE_PLUGINS").map(PathBuf::from).unwrap_or_else(|| {
        let this = std::env::current_exe().expect("this program has a path");
        this.ancestors().nth(3).expect("benches lie in deps/ of the profile's folder").join("plugins")
    });
    let path = folder.join("late.wasm");
    let bytes = std::fs::read(&path).unwrap_or_else(|error| {
        panic!("{}: {error}; `sh tests/run.sh plugins` builds it", path.display());
    });
    bytes.into()
}

/// Rows of about so many bytes as one commit's shared section.
struct Section {
    bytes: Vec<u8>,
    places: Vec<ImageAt>,
}

impl Section {
    fn new(size: usize, rows: usize) -> Section {
        let mut frame = FrameBuilder::new(NS.0, [1; 16], 0);
        for id in 0..rows {
            let mut image = ImageBuilder::new(3);
            image.set_int(0, id as i64);
            image.set_float(1, (id % 40) as f64);
            image.set_bytes(2, &vec![b'x'; size]);
            let meta = ChangeMeta { table: 1, schema_version: 1, kinds: &KINDS };
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
    seq: u64,
}

impl Side {
    fn new(wasm: &Bytes, mapping: Mapping) -> Side {
        let mut options = Config::new(std::path::Path::new(".")).plugins;
        // Room for 64 rows of 64 KiB, in the ring and in the worker part.
        (options.ring_bytes, options.worker_bytes) = (16 << 20, 8 << 20);
        let source = Box::new(Module(wasm.clone()));
        let plugins = Plugins::mapped(options, source, Arc::new(Metrics::default()), mapping).expect("an engine");
        let sha256 = plugins.inspect(wasm).expect("late.wasm is a plugin").sha256;
        let stage = Stage { name: "late".to_owned(), version: 1, sha256, params: String::new() };
        let column = |id, name: &str, ty| ColumnDecl { id, name: name.to_owned(), ty, nullable: true, key: id == 0 };
        let columns =
            vec![column(0, "id", Type::BigInt), column(1, "dep_delay", Type::Double), column(2, "pad", Type::Text)];
        let mut worker = plugins.worker(0);
        let opened = worker.open(Owner::shared(NS), &[stage], &Schema { columns }, OnError::Stop);
        Side { plugins, worker, pipeline: opened.expect("the pipeline opens").id, seq: 0 }
    }

    /// Nanoseconds a change, of the whole way through `run`.
    fn nanos(&mut self, rows: &Section) -> f64 {
        self.seq += 1;
        let commit = Some(Seq(self.seq));
        self.plugins.publish(NS, Seq(self.seq), &rows.bytes);
        per_row(rows.places.len(), || {
            let rows = Rows { origin: Origin::Live, commit, base: &rows.bytes, places: &rows.places };
            black_box(self.worker.run(self.pipeline, rows).expect("an honest filter"));
        })
    }
}

fn native(size: usize, batch: usize) -> f64 {
    let columns = [("id", NativeType::BigInt), ("dep_delay", NativeType::Double), ("pad", NativeType::Text)];
    let table = TestTable::new::<late::Flight>(&columns).expect("the columns fit");
    let pad = NativeValue::Text("x".repeat(size));
    let rows: Vec<_> = (0..batch)
        .map(|id| table.row(&[NativeValue::Int(id as i64), NativeValue::Float((id % 40) as f64), pad.clone()]))
        .collect();
    let params = Late { minutes: 15 };
    per_row(batch, || {
        for row in &rows {
            black_box(row.read(|row| late(&params, &FromRow::from_row(row))));
        }
    })
}

fn per_row(rows: usize, mut run: impl FnMut()) -> f64 {
    // Warm: the first calls make instances and fill caches.
    (0..100).for_each(|_| run());
    let (started, mut rounds) = (Instant::now(), 0u64);
    while started.elapsed() < MEASURED {
        (0..16).for_each(|_| run());
        rounds += 16;
    }
    started.elapsed().as_nanos() as f64 / (rounds * rows as u64) as f64
}
