//! Guests written in WAT against the whole plugin side: what honest ones compute, where their rows come from.

mod changes;
mod hostile;
mod memory;
mod upload;
mod users;
mod vectors;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use wire::abi::encode_schema;
use wire::frame::ChangeMeta;
use wire::image::ImageAt;
use wire::{ColumnDecl, FrameBuilder, FrameView, ImageBuilder, Kind, Schema, Scope, Type, Value};

use super::registry::{Owner, PluginWorker};
use super::window::Mapping;
use super::*;
use crate::catalog::{NamespaceId, OnError, Seq};
use crate::telemetry::{Labels, Metrics};

pub const NS: NamespaceId = NamespaceId(1);

/// The plugin side with a store of modules.
pub struct Fixture {
    pub plugins: Plugins,
    pub metrics: Arc<Metrics>,
    modules: Arc<Mutex<HashMap<String, Bytes>>>,
}

struct Modules(Arc<Mutex<HashMap<String, Bytes>>>);

impl ModuleSource for Modules {
    fn wasm(&self, sha256: &str) -> Result<Option<Bytes>, String> {
        Ok(self.0.lock().unwrap().get(sha256).cloned())
    }

    fn secret(&self) -> Result<[u8; 32], String> {
        Ok([7; 32])
    }
}

pub fn options() -> PluginOptions {
    PluginOptions {
        ring_bytes: 256 * 1024,
        worker_bytes: 64 * 1024,
        module_bytes: 4 << 20,
        memory_bytes: 4 << 20,
        stack_bytes: 512 * 1024,
        table_elements: 20_000,
        batch_time: Duration::from_millis(20),
        init_time: Duration::from_millis(100),
        output_bytes: 1 << 20,
        log_bytes: 16 * 1024,
        compile_time: Duration::from_secs(60),
        workers: 1,
        instances_per_worker: 8,
        drop_instances_seed: 0,
        compiler: None,
        cache_dir: None,
    }
}

impl Fixture {
    pub fn new(options: PluginOptions) -> Fixture {
        Fixture::with(options, Plugins::new)
    }

    pub fn copying(options: PluginOptions) -> Fixture {
        Fixture::with(options, |options, source, metrics| Plugins::mapped(options, source, metrics, Mapping::Copy))
    }

    fn with(
        options: PluginOptions,
        make: impl FnOnce(PluginOptions, Box<dyn ModuleSource>, Arc<Metrics>) -> Result<Plugins, PluginError>,
    ) -> Fixture {
        let modules = Arc::new(Mutex::new(HashMap::new()));
        let metrics = Arc::new(Metrics::default());
        let plugins = make(options, Box::new(Modules(modules.clone())), metrics.clone()).unwrap();
        Fixture { plugins, metrics, modules }
    }

    /// Uploads a guest, which has to pass the check, and makes a stage of it.
    pub fn stage(&self, name: &str, wat: &str, params: &str) -> Stage {
        let inspected = self.plugins.inspect(wat.as_bytes()).unwrap();
        self.put(name, inspected.wasm, params)
    }

    /// A stage of a module that was never checked by running it.
    pub fn unchecked(&self, name: &str, wat: &str) -> Stage {
        self.put(name, Bytes::from(wat::parse_str(wat).unwrap()), "")
    }

    pub fn put(&self, name: &str, wasm: Bytes, params: &str) -> Stage {
        use sha2::Digest;
        let sha256 = check::hex(&sha2::Sha256::digest(&wasm));
        self.modules.lock().unwrap().insert(sha256.clone(), wasm);
        Stage { name: name.to_owned(), version: 1, sha256, params: params.to_owned() }
    }
}

/// A module of ABI 1 around `body`: its run function and whatever else it brings. `$w` is the window's address;
/// handles are addresses of 16 bytes: +0 the column of the first read, +8 the first parameter.
pub fn guest(manifest: &[&str], body: &str) -> String {
    let manifest: String =
        manifest.iter().map(|line| format!("{}\\n", line.replace('\\', "\\\\").replace('"', "\\\""))).collect();
    format!(
        r#"(module
  (import "tidegate" "log" (func $log (param i32 i32 i32)))
  (import "tidegate" "metric" (func $metric (param i32 i32 f64)))
  (import "tidegate" "fail" (func $fail (param i32 i32 i32)))
  (memory (export "memory") 2)
  (global $w (mut i32) (i32.const 0))
  (global $next (mut i32) (i32.const 1024))
  (global $calls (mut i32) (i32.const 0))
  (func (export "tg_abi") (result i32) (i32.const 1))
  (func (export "tg_window") (param i32) (result i32)
    (global.set $w (i32.shl (memory.grow (i32.shr_u (local.get 0) (i32.const 16))) (i32.const 16)))
    (global.get $w))
  (func (export "tg_release") (param i32))
  (func $setup (param $c i32) (result i32) (local $h i32)
    (local.set $h (global.get $next))
    (global.set $next (i32.add (local.get $h) (i32.const 16)))
    (local.set $c (i32.add (local.get $c) (global.get $w)))
    (if (i32.load offset=20 (local.get $c)) (then
      (i32.store (local.get $h) (i32.load16_u (i32.add (global.get $w) (i32.load offset=16 (local.get $c)))))))
    (if (i32.load offset=12 (local.get $c)) (then
      (i64.store offset=8 (local.get $h) (i64.load (i32.add (global.get $w) (i32.load offset=4 (local.get $c)))))))
    (local.get $h))
  ;; The int in the handle's column of row i, NULL as the smallest.
  (func $value (param $h i32) (param $d i32) (param $i i32) (result i64) (local $col i32)
    (local.set $col (i32.load (local.get $h)))
    (local.set $d (i32.add (i32.add (global.get $w) (local.get $d)) (i32.shl (local.get $i) (i32.const 4))))
    (if (i32.eqz (i32.and (i32.const 1) (i32.shr_u
          (i32.load8_u (i32.add (i32.add (global.get $w) (i32.load (local.get $d))) (i32.shr_u (local.get $col) (i32.const 3))))
          (i32.and (local.get $col) (i32.const 7)))))
      (then (return (i64.const 0x8000000000000000))))
    (i64.load (i32.add (i32.add (global.get $w) (i32.load offset=4 (local.get $d))) (i32.shl (local.get $col) (i32.const 3)))))
  (func $param (param $h i32) (result i64) (i64.load offset=8 (local.get $h)))
  {body}
  (@custom "tidegate" "{manifest}"))"#
    )
}

pub const READS_V: &str = r#"{"column":{"name":"v","type":"int"}}"#;
pub const MIN: &str = r#"{"param":{"name":"min","type":"int","default":"10"}}"#;
pub const CONFIGURE: &str =
    r#"(func (export "tg_configure") (param i32) (result i64) (i64.extend_i32_u (call $setup (local.get 0))))"#;

/// A filter whose `$keep (handle, descriptors, i) -> i32` is `keep`.
pub fn filter(manifest: &[&str], keep: &str) -> String {
    let body = format!(
        r#"{CONFIGURE}
  (func (export "tg_filter") (param $h i32) (param $d i32) (param $n i32) (result i64) (local $i i32) (local $bits i64)
    (block $end (loop $row
      (br_if $end (i32.ge_u (local.get $i) (local.get $n)))
      (local.set $bits (i64.or (local.get $bits)
        (i64.shl (i64.extend_i32_u (call $keep (local.get $h) (local.get $d) (local.get $i))) (i64.extend_i32_u (local.get $i)))))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br $row)))
    (local.get $bits))
  (func $keep (param $h i32) (param $d i32) (param $i i32) (result i32) {keep})"#
    );
    guest(manifest, &body)
}

/// Keeps `v >= min`.
pub fn at_least() -> String {
    filter(
        &[r#"{"plugin":{"abi":1}}"#, MIN, READS_V],
        "(i64.ge_s (call $value (local.get $h) (local.get $d) (local.get $i)) (call $param (local.get $h)))",
    )
}

/// A filter that runs `body` once a call (locals: `$h $d $n`) and then keeps everything.
pub fn once(body: &str) -> String {
    let function = format!(
        r#"{CONFIGURE}
  (func (export "tg_filter") (param $h i32) (param $d i32) (param $n i32) (result i64)
    {body}
    (i64.shr_u (i64.const -1) (i64.extend_i32_u (i32.sub (i32.const 64) (local.get $n)))))"#
    );
    guest(&[READS_V], &function)
}

fn schema_data(schema: &Schema) -> String {
    let message = encode_schema(schema).unwrap();
    let len = (message.len() as u32).to_le_bytes();
    len.iter().chain(&message).map(|byte| format!("\\{byte:02x}")).collect()
}

pub fn column(id: u16, name: &str, ty: Type) -> ColumnDecl {
    ColumnDecl { id, name: name.to_owned(), ty, nullable: true, key: name == "id" }
}

/// A transform to the one column `v` = the input's `v` + the parameter `min`, written at 32 KiB. `answer` replaces what
/// it returns.
pub fn plus(answer: Option<&str>) -> String {
    let output = Schema { columns: vec![column(0, "v", Type::BigInt)] };
    let answer = answer.unwrap_or(
        "(i64.or (i64.const 32768) (i64.shl (i64.extend_i32_u (i32.mul (local.get $n) (i32.const 32))) (i64.const 32)))",
    );
    let body = format!(
        r#"(data (i32.const 64) "{schema}")
  (func (export "tg_configure") (param i32) (result i64)
    (i64.or (i64.extend_i32_u (call $setup (local.get 0))) (i64.const {schema_at})))
  (func (export "tg_transform") (param $h i32) (param $d i32) (param $n i32) (result i64)
      (local $i i32) (local $out i32) (local $at i32)
    (block $end (loop $row
      (br_if $end (i32.ge_u (local.get $i) (local.get $n)))
      (local.set $out (i32.add (i32.const 32768) (i32.shl (local.get $i) (i32.const 4))))
      ;; 16 bytes behind the descriptors: the bitmap, at +8 the slot.
      (local.set $at (i32.add (i32.shl (local.get $n) (i32.const 4)) (i32.shl (local.get $i) (i32.const 4))))
      (i32.store (local.get $out) (local.get $at))
      (i32.store offset=4 (local.get $out) (i32.add (local.get $at) (i32.const 8)))
      (i32.store offset=8 (local.get $out) (i32.add (local.get $at) (i32.const 16)))
      (i32.store offset=12 (local.get $out) (i32.const 1))
      (i32.store8 (i32.add (i32.const 32768) (local.get $at)) (i32.const 1))
      (i64.store offset=8 (i32.add (i32.const 32768) (local.get $at))
        (i64.add (call $value (local.get $h) (local.get $d) (local.get $i)) (call $param (local.get $h))))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br $row)))
    {answer})"#,
        schema = schema_data(&output),
        schema_at = 64u64 << 32,
    );
    guest(&[MIN, READS_V], &body)
}

/// The table all these tests read: `id`, `v`, `name`; `v` does not have the first id.
pub fn table() -> Schema {
    Schema { columns: vec![column(0, "id", Type::BigInt), column(2, "v", Type::Int), column(1, "name", Type::Text)] }
}

/// One commit's shared section, and where its new images lie.
pub fn commit(rows: &[(Option<i64>, String)]) -> (Vec<u8>, Vec<ImageAt>) {
    let mut frame = FrameBuilder::new(NS.0, [1; 16], 0);
    let kinds = [Kind::Int, Kind::Text, Kind::Int];
    for (i, (v, name)) in rows.iter().enumerate() {
        let mut image = ImageBuilder::new(3);
        image.set_int(0, i as i64);
        image.set_bytes(1, name.as_bytes());
        image.set(2, &v.map_or(Value::Null, Value::Int));
        let meta = ChangeMeta { table: 1, schema_version: 1, kinds: &kinds };
        frame.change(&Scope::Shared, meta, None, Some(&image.finish())).unwrap();
    }
    let frame = frame.finish().unwrap();
    let view = FrameView::parse(&frame).unwrap();
    let section = view.section(&Scope::Shared).unwrap();
    let places = section.changes.iter().map(|change| change.new.unwrap().1).collect();
    (section.bytes.to_vec(), places)
}

pub fn values(values: &[i64]) -> (Vec<u8>, Vec<ImageAt>) {
    commit(&values.iter().map(|v| (Some(*v), "x".to_owned())).collect::<Vec<_>>())
}

/// Opens a pipeline on shared tables that stops at a failure.
pub fn open(worker: &mut PluginWorker, stages: &[Stage]) -> Result<Opened, StageError> {
    worker.open(Owner::shared(NS), stages, &table(), OnError::Stop)
}

pub fn run(
    worker: &mut PluginWorker,
    id: PipelineId,
    seq: Option<u64>,
    (base, places): &(Vec<u8>, Vec<ImageAt>),
) -> Result<Piped, PluginError> {
    worker.run(id, Rows { origin: Origin::Live, commit: seq.map(Seq), base, places }).map_err(|cut| cut.error)
}

/// Of a plugin's series. The fixture's store has no names for namespaces.
pub fn labels(plugin: &str) -> Labels {
    vec![("namespace", NS.0.to_string()), ("plugin", plugin.to_owned())]
}

/// The `v`s that a pipeline with a transform gave.
fn ints(piped: &Piped) -> Vec<i64> {
    piped.images().iter().map(|image| image.int(0).unwrap()).collect()
}

#[test]
fn a_filter_keeps_by_its_parameter_wherever_the_rows_are() {
    let fixture = Fixture::new(options());
    let stage = fixture.stage("at_least", &at_least(), r#"{"min": 20}"#);
    let mut worker = fixture.plugins.worker(0);
    let opened = open(&mut worker, &[stage]).unwrap();
    assert_eq!(opened.output, None);

    let rows = commit(&[(Some(19), "a".into()), (Some(20), "b".into()), (None, "c".into()), (Some(21), "d".into())]);
    fixture.plugins.publish(NS, Seq(7), &rows.0);
    let expected = [false, true, false, true];
    assert_eq!(run(&mut worker, opened.id, Some(7), &rows).unwrap().keep, expected);
    assert_eq!(fixture.metrics.worker_part_bytes.get(), 0, "the ring has the rows");
    assert_eq!(fixture.metrics.ring_bytes.get(), rows.0.len() as i64);

    for seq in [Some(6), None] {
        assert_eq!(run(&mut worker, opened.id, seq, &rows).unwrap().keep, expected);
    }
    assert_eq!(fixture.metrics.ring_misses.get(), 1, "only a commit can be missed");
    assert!(fixture.metrics.worker_part_bytes.get() > 0);
    assert_eq!(fixture.metrics.guest_bytes_copied.get(), 0);
    assert_eq!((fixture.metrics.plugin_calls.get(), fixture.metrics.plugin_rows.get()), (3, 12));
    assert!(fixture.metrics.plugin_nanos.get() > 0);
    let memory = || fixture.metrics.plugin_memory_bytes.get_or_create(&labels("at_least")).get();
    assert_eq!(memory(), 2 * 65_536, "its two pages, and not the window");

    worker.close(opened.id);
    assert_eq!(memory(), 0);
    assert_eq!((fixture.metrics.plugin_instances.get(), fixture.metrics.ring_bytes.get()), (0, 0), "all is given back");
}

#[test]
fn the_window_is_mapped_here_and_workers_move_to_their_threads() {
    fn is_send<T: Send>() {}
    is_send::<PluginWorker>();
    fn is_shared<T: Send + Sync>() {}
    is_shared::<Plugins>();
    let engine = engine::Engine::new(&options(), || Ok([0; 32])).unwrap();
    assert_eq!(selftest::window(&engine), Ok(()));
}

#[test]
fn one_instance_serves_many_parameter_sets() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let rows = values(&[5, 15, 25]);
    let mut open_with = |min: i64| {
        let stage = fixture.stage("at_least", &at_least(), &format!("{{\"min\":{min}}}"));
        open(&mut worker, &[stage]).unwrap().id
    };
    let (low, high) = (open_with(10), open_with(20));
    assert_eq!(fixture.metrics.plugin_instances.get(), 1);
    assert_eq!(run(&mut worker, low, None, &rows).unwrap().keep, [false, true, true]);
    assert_eq!(run(&mut worker, high, None, &rows).unwrap().keep, [false, false, true]);
    worker.close(low);
    assert_eq!(run(&mut worker, high, None, &rows).unwrap().keep, [false, false, true]);
    assert!(matches!(run(&mut worker, low, None, &rows), Err(PluginError::Host(_))));
}

#[test]
fn stages_feed_each_other() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let stages = [
        fixture.stage("at_least", &at_least(), ""),
        fixture.stage("plus", &plus(None), r#"{"min":100}"#),
        fixture.stage("at_least", &at_least(), r#"{"min":120}"#),
        fixture.stage("plus", &plus(None), r#"{"min":-1}"#),
    ];
    let checked = fixture.plugins.check(NS, &stages, &table(), OnError::Stop).unwrap().output;
    let opened = open(&mut worker, &stages).unwrap();
    assert_eq!(opened.output, checked);
    assert_eq!(opened.output.unwrap().columns[0].name, "v");

    let rows = values(&(0..200).collect::<Vec<_>>());
    fixture.plugins.publish(NS, Seq(1), &rows.0);
    for seq in [Some(1), None] {
        let piped = run(&mut worker, opened.id, seq, &rows).unwrap();
        assert_eq!(ints(&piped), (20..200).map(|v| v + 99).collect::<Vec<_>>());
        assert_eq!(piped.keep, (0..200).map(|v| v >= 20).collect::<Vec<_>>());
    }
    // Two runs of 200 rows: 190 are left by the first stage, 180 by the third.
    let answered = fixture.metrics.plugin_output_bytes.get_or_create(&labels("plus")).get();
    assert_eq!(answered, 2 * (190 + 180) * 32);
    let verdicts = |verdict: &str| {
        let mut labels = labels("at_least");
        labels.push(("verdict", verdict.to_owned()));
        fixture.metrics.plugin_verdicts.get_or_create(&labels).get()
    };
    assert_eq!((verdicts("kept"), verdicts("dropped")), (2 * (190 + 180), 2 * (10 + 10)));
}

#[test]
fn instances_are_bounded_and_come_back() {
    let fixture = Fixture::new(PluginOptions { instances_per_worker: 2, ..options() });
    let mut worker = fixture.plugins.worker(0);
    let rows = values(&[3]);
    let pipelines: Vec<_> = (0..5)
        .map(|i| {
            let body = format!("(i64.ge_s (call $value (local.get $h) (local.get $d) (local.get $i)) (i64.const {i}))");
            let stage = fixture.stage("distinct", &filter(&[READS_V], &body), "");
            open(&mut worker, &[stage]).unwrap().id
        })
        .collect();
    for _ in 0..2 {
        for (i, id) in pipelines.iter().enumerate() {
            assert_eq!(run(&mut worker, *id, None, &rows).unwrap().keep, [i <= 3]);
            assert!(fixture.metrics.plugin_instances.get() <= 2);
        }
    }
}

#[test]
fn the_ring_leaves_leased_frames_alone_and_takes_new_ones_later() {
    let fixture = Fixture::new(PluginOptions { ring_bytes: 64 * 1024, ..options() });
    let mut worker = fixture.plugins.worker(0);
    let id = open(&mut worker, &[fixture.stage("at_least", &at_least(), "")]).unwrap().id;
    let big = |seq: i64| commit(&[(Some(seq), "x".repeat(20_000))]);
    for seq in 1..=30 {
        let rows = big(seq);
        fixture.plugins.publish(NS, Seq(seq as u64), &rows.0);
        assert_eq!(run(&mut worker, id, Some(seq as u64), &rows).unwrap().keep, [seq >= 10]);
    }
    assert_eq!((fixture.metrics.ring_misses.get(), fixture.metrics.worker_part_bytes.get()), (0, 0));
    assert!(fixture.metrics.ring_bytes.get() <= 64 * 1024);
    // Overwritten: the worker part has to do, with the same result. Larger than the ring: likewise, and too large
    // for the worker part is said by name.
    assert_eq!(run(&mut worker, id, Some(2), &big(12)).unwrap().keep, [true]);
    assert_eq!(fixture.metrics.ring_misses.get(), 1);
    let huge = commit(&[(Some(40), "x".repeat(70_000))]);
    fixture.plugins.publish(NS, Seq(40), &huge.0);
    match run(&mut worker, id, Some(40), &huge) {
        Err(PluginError::Fault { cause: FaultCause::Memory, index: Some(0), message, .. }) => {
            assert!(message.contains("plugins.worker_bytes"), "{message}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn publishing_without_listeners_costs_nothing() {
    let fixture = Fixture::new(options());
    fixture.plugins.publish(NS, Seq(1), b"section");
    assert_eq!(fixture.metrics.ring_bytes.get(), 0);
}

#[test]
fn what_plugins_say_is_counted_and_capped() {
    let fixture = Fixture::new(options());
    let body = r#"(call $metric (i32.const 8) (i32.const 4) (f64.const 2.5))
      (call $metric (i32.const 8) (i32.const 4) (f64.const nan))
      (loop $l (call $log (i32.const 2) (i32.const 8) (i32.const 4))
        (global.set $calls (i32.add (global.get $calls) (i32.const 1)))
        (br_if $l (i32.lt_u (global.get $calls) (i32.const 1000))))
      (data (i32.const 8) "seen")"#;
    let wat = once(&body.replace(r#"(data (i32.const 8) "seen")"#, ""))
        .replace("(func (export \"tg_abi\")", "(data (i32.const 8) \"seen\") (func (export \"tg_abi\")");
    let mut worker = fixture.plugins.worker(0);
    let stage = fixture.stage("chatty", &wat, "");
    let id = open(&mut worker, std::slice::from_ref(&stage)).unwrap().id;
    for _ in 0..2 {
        assert_eq!(run(&mut worker, id, None, &values(&[1])).unwrap().keep, [true]);
    }
    let said = || fixture.plugins.logs().read(NS, "chatty", None, usize::MAX, |_| true).lines;
    let last = said().pop().unwrap();
    assert_eq!((last.level, last.message.as_str(), &*last.sha256, last.user), ("info", "seen", &*stage.sha256, None));
    let limits = said().iter().filter(|line| line.level == "warn" && line.message.contains("log limit")).count();
    assert_eq!(limits, 1, "the first of the two calls said too much");
    // A trial is nobody else's business; what is said over a user's rows is that user's.
    let before = said().len();
    let mut trial = fixture.plugins.throw_away();
    let id = open(&mut trial, std::slice::from_ref(&stage)).unwrap().id;
    run(&mut trial, id, None, &values(&[1])).unwrap();
    assert_eq!(said().len(), before);
    let id = worker.open(Owner::user(NS, "ann"), &[stage], &table(), OnError::Stop).unwrap().id;
    run(&mut worker, id, None, &values(&[1])).unwrap();
    assert_eq!(said().pop().unwrap().user.as_deref(), Some("ann"));
    let mut labels = labels("chatty");
    labels.push(("name", "seen".to_owned()));
    assert_eq!(fixture.metrics.plugin_metrics.get_or_create(&labels).get(), 7.5, "three calls");
}

fn any_rows() -> impl Strategy<Value = Vec<(Option<i64>, String)>> {
    proptest::collection::vec((proptest::option::of(-30i64..60), "[a-zü]{0,40}"), 0..200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Ring, worker part, copied window, instances lost at random: one answer.
    #[test]
    fn every_way_to_the_guest_gives_the_same(
        commits in proptest::collection::vec(any_rows(), 1..6), min in -5i64..30, plus_by in -9i64..9, seed in 1u64..,
    ) {
        let small = PluginOptions { ring_bytes: 64 * 1024, ..options() };
        let mut fixtures = [Fixture::new(small.clone()), Fixture::new(small.clone()), Fixture::copying(small)];
        fixtures[1].plugins.drop_instances_at_random(seed);
        for fixture in &mut fixtures {
            let mut worker = fixture.plugins.worker(0);
            let stages = [
                fixture.stage("at_least", &at_least(), &format!("{{\"min\":{min}}}")),
                fixture.stage("plus", &plus(None), &format!("{{\"min\":{plus_by}}}")),
            ];
            let id = open(&mut worker, &stages).unwrap().id;
            for (i, rows) in commits.iter().enumerate() {
                let expected: Vec<bool> = rows.iter().map(|(v, _)| v.is_some_and(|v| v >= min)).collect();
                let sums: Vec<i64> = rows.iter().filter_map(|(v, _)| v.filter(|v| *v >= min)).map(|v| v + plus_by).collect();
                let commit = if rows.is_empty() { (Vec::new(), Vec::new()) } else { commit(rows) };
                let seq = i as u64 * 3 + 1;
                fixture.plugins.publish(NS, Seq(seq), &commit.0);
                for seq in [Some(seq), None, Some(seq + 1)] {
                    let piped = run(&mut worker, id, seq, &commit).unwrap();
                    prop_assert_eq!(&piped.keep, &expected);
                    prop_assert_eq!(&ints(&piped), &sums);
                }
            }
        }
        prop_assert_eq!(fixtures[0].metrics.guest_bytes_copied.get(), 0);
        prop_assert!(fixtures[2].metrics.guest_bytes_copied.get() > 0);
    }
}
