//! The live side against a real store, with a predicate, a pipeline and an encoder simple enough to be their own model:
//! whatever a subscriber folds must be the query's result at every position it was given.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, AsArray, Int64Array, StringArray};
use arrow::datatypes::{DataType, Field, Int64Type};
use arrow::record_batch::RecordBatch;
use arrow::util::display::array_value_to_string;
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use wire::image::ImageAt;
use wire::{ChangeAt, ColumnDecl, ImageBuilder, ImageRef, Kind, Schema, Scope, Type, Value};

use super::evaluate::Fault;
use super::event::{CommitEvents, EventOp};
use super::requery::{Done, Piping, Progress};
use super::*;
use crate::catalog::Stage;
use crate::catalog::{Column, NamespaceId, Plugin, PluginKind, Table, TableId, TableKind};
use crate::store::keys::{KeyRange, encode_key};
use crate::store::{CatalogWrite, RowWrite, StoreOptions, Transaction};
use crate::telemetry::Metrics;

// ---- the table: id BIGINT PRIMARY KEY, a BIGINT, name TEXT ----

type Row = (Option<i64>, String);
type Model = BTreeMap<i64, Row>;

fn table(id: TableId, namespace: NamespaceId, name: &str) -> Arc<Table> {
    let column =
        |id, name: &str, ty, nullable| Column { id, name: name.to_owned(), ty, nullable, default: None, fill: None };
    Arc::new(Table {
        id,
        namespace,
        namespace_name: "main".to_owned(),
        name: name.to_owned(),
        kind: TableKind::Shared,
        schema_version: 1,
        columns: vec![
            column(0, "id", Type::BigInt, false),
            column(1, "a", Type::BigInt, true),
            column(2, "name", Type::Text, false),
        ],
        key: vec![0],
        generated_key: false,
        indexes: Vec::new(),
        next_column: 3,
        images_since: 1,
        ttl_micros: None,
    })
}

fn image(id: i64, (a, name): &Row) -> Vec<u8> {
    let mut builder = ImageBuilder::new(3);
    builder.set_int(0, id);
    if let Some(a) = a {
        builder.set_int(1, *a);
    }
    builder.set_bytes(2, name.as_bytes());
    builder.finish()
}

// ---- SELECT a, name FROM t WHERE a >= least ----

struct Least(i64);

/// Rows with this value cannot be evaluated, or panic: faults of the predicate.
const BAD_VALUE: i64 = 999;
const PANIC_VALUE: i64 = 998;

impl Program for Least {
    fn matches(&self, rows: &[ImageRef<'_>]) -> Result<Vec<bool>, ProgramError> {
        let values: Vec<Option<i64>> = rows.iter().map(|row| row.int(1)).collect();
        assert!(!values.contains(&Some(PANIC_VALUE)), "a bug in the predicate");
        if values.contains(&Some(BAD_VALUE)) {
            return Err(ProgramError("division by zero".to_owned()));
        }
        Ok(values.into_iter().map(|a| a.is_some_and(|a| a >= self.0)).collect())
    }

    /// One for all, so that they are asked together: the trait's own way, which fails where one of them does.
    fn shape(&self) -> Option<usize> {
        Some(1)
    }

    fn project(&self, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        let table = table(TableId(1), NamespaceId(1), "any");
        let columns = table.schema().columns.split_off(1);
        self.batch(&Schema { columns }, rows)
    }

    fn keys(&self, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        self.batch(&table(TableId(1), NamespaceId(1), "any").key_schema(), rows)
    }

    fn batch(&self, schema: &Schema, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        let columns = schema.columns.iter().map(|column| {
            let (ty, values): (_, ArrayRef) = match column.ty.kind() {
                Kind::Int => {
                    (DataType::Int64, Arc::new(rows.iter().map(|row| row.int(column.id)).collect::<Int64Array>()))
                }
                _ => (DataType::Utf8, Arc::new(rows.iter().map(|row| row.text(column.id)).collect::<StringArray>())),
            };
            (Field::new(&column.name, ty, true), values)
        });
        let (fields, columns): (Vec<_>, Vec<_>) = columns.unzip();
        RecordBatch::try_new(Arc::new(arrow::datatypes::Schema::new(fields)), columns)
            .map_err(|error| ProgramError(error.to_string()))
    }
}

/// For groups that are never evaluated.
pub(super) struct Nothing;

impl Program for Nothing {
    fn matches(&self, _: &[ImageRef<'_>]) -> Result<Vec<bool>, ProgramError> {
        Err(ProgramError("asked".to_owned()))
    }

    fn project(&self, _: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        Err(ProgramError("asked".to_owned()))
    }

    fn keys(&self, _: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        Err(ProgramError("asked".to_owned()))
    }

    fn batch(&self, _: &Schema, _: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        Err(ProgramError("asked".to_owned()))
    }
}

// ---- a pipeline: drop multiples of 3, show a * 2 ----

const FAULT_VALUE: i64 = 666;

#[derive(Clone, Default)]
struct Doubler {
    open: Arc<AtomicUsize>,
}

fn doubled() -> Schema {
    let twice = ColumnDecl { id: 0, name: "twice".to_owned(), ty: Type::BigInt, nullable: true, key: false };
    Schema { columns: vec![twice] }
}

/// As a plugin reads it: by offsets alone.
fn int_at(base: &[u8], at: &ImageAt, column: usize) -> i64 {
    let slot = at.slots as usize + 8 * column;
    assert_eq!(base[at.present as usize] >> column & 1, 1, "only rows that matched come here");
    i64::from_le_bytes(base[slot..slot + 8].try_into().unwrap())
}

impl Pipelines for Doubler {
    fn open(&mut self, group: &GroupSpec) -> Result<u64, PipelineFault> {
        if group.stages[0].params == "bad" {
            return Err(fault());
        }
        self.open.fetch_add(1, Ordering::Relaxed);
        Ok(7)
    }

    fn run(&mut self, id: u64, batch: Batch<'_>, places: &[ImageAt]) -> Result<Piped, PipelineFault> {
        assert_eq!(id, 7);
        let values: Vec<i64> = places.iter().map(|at| int_at(batch.base, at, 1)).collect();
        if values.contains(&FAULT_VALUE) {
            return Err(fault());
        }
        let keep: Vec<bool> = values.iter().map(|a| a % 3 != 0).collect();
        let output = values.iter().filter(|a| *a % 3 != 0).map(|a| {
            let mut builder = ImageBuilder::new(1);
            builder.set_int(0, a * 2);
            builder.finish().into()
        });
        Ok(Piped { output: Some(output.collect()), keep })
    }

    /// Every change that is there twice: once as it is, once with its `a` doubled.
    fn run_changes(
        &mut self,
        _: u64,
        batch: Batch<'_>,
        changes: &[ChangeAt],
    ) -> Result<Vec<ChangeOutput>, PipelineFault> {
        let mut outputs = Vec::new();
        for (index, change) in changes.iter().enumerate() {
            let op = change.op().expect("only changes with a row that matched come here");
            let shown = change.new.or(change.old).expect("just looked at");
            let a = int_at(batch.base, &shown, 1);
            if a == FAULT_VALUE {
                return Err(fault());
            }
            for times in [1, 2] {
                let mut builder = ImageBuilder::new(1);
                builder.set_int(0, a * times);
                outputs.push(ChangeOutput { index, op, image: Some(builder.finish().into()) });
            }
        }
        Ok(outputs)
    }

    fn close(&mut self, _: u64) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

fn stage() -> Stage {
    Stage { name: "doubler".to_owned(), version: 1, sha256: "00".to_owned(), params: "{}".to_owned() }
}

fn fault() -> PipelineFault {
    PipelineFault { plugin: Some(Box::new(stage())), cause: "failed", message: "no".to_owned(), retry_after: None }
}

// ---- an encoder: one line an event ----

#[derive(Default)]
struct Lines {
    encoded: AtomicUsize,
}

impl Encoder for Lines {
    fn encode(&self, _: &GroupSpec, events: &CommitEvents, out: &mut Vec<u8>) {
        self.encoded.fetch_add(1, Ordering::Relaxed);
        let text = |batch: &RecordBatch, row: Option<usize>| {
            let Some(row) = row else { return "-".to_owned() };
            let cells = batch.columns().iter().map(|column| array_value_to_string(column, row).unwrap());
            cells.collect::<Vec<_>>().join("|")
        };
        for event in &events.events {
            let op = match event.op {
                EventOp::Insert if events.snapshot => "present",
                EventOp::Insert => "insert",
                EventOp::Update => "update",
                EventOp::Deleted => "deleted",
                EventOp::MovedOut => "moved_out",
                EventOp::Change(op) => op.as_str(),
            };
            let key = text(&events.keys, Some(event.key));
            let line = format!(
                "{} {op} {key} {} {}\n",
                events.seq.0,
                text(&events.new, event.new),
                text(&events.old, event.old)
            );
            out.extend_from_slice(line.as_bytes());
        }
    }
}

// ---- the world ----

struct World {
    store: Store,
    live: Live,
    table: Arc<Table>,
    other: Arc<Table>,
    model: Model,
    /// The model after every commit.
    history: BTreeMap<Seq, Model>,
    encoder: Arc<Lines>,
    metrics: Arc<Metrics>,
    pipelines: Arc<AtomicUsize>,
    _dir: tempfile::TempDir,
}

const HEARTBEAT: Duration = Duration::from_millis(3);

fn options() -> LiveOptions {
    LiveOptions {
        workers: 2,
        commit_tail_bytes: 1 << 20,
        group_tail_bytes: 1 << 20,
        chunk_bytes: 1 << 16,
        heartbeat: HEARTBEAT,
        max_subscriptions: 1000,
        max_per_user: 1000,
        max_per_address: 1000,
        requery_interval: Duration::from_millis(1),
        requery_bytes: 1 << 20,
        requery_runs: 2,
    }
}

/// Tails are not let go of for their age while the test runs, however slow the disk is.
fn unhurried() -> LiveOptions {
    LiveOptions { heartbeat: Duration::from_secs(3600), ..options() }
}

impl World {
    async fn new(options: LiveOptions, log_commits: u64) -> World {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&StoreOptions {
            path: dir.path().to_owned(),
            write_buffer_size: 1 << 20,
            max_write_buffers: 2,
            block_cache_size: 1 << 20,
            max_background_jobs: 2,
            max_open_files: 64,
            max_commit_bytes: 1 << 20,
            log_commits,
            ..StoreOptions::new(dir.path())
        })
        .unwrap();
        let doubler = Doubler::default();
        let (encoder, metrics) = (Arc::new(Lines::default()), Arc::new(Metrics::default()));
        let pipelines =
            (0..options.workers).map(|_| Box::new(doubler.clone()) as Box<dyn Pipelines>).collect::<Vec<_>>();
        let live = Live::start(store.clone(), pipelines, encoder.clone(), options, metrics.clone());
        let hooked = live.clone();
        store.start(Box::new(move |commit| hooked.published(commit)));
        let catalog = store.catalog();
        let (namespace, next) = (catalog.namespace("main").unwrap().id, catalog.next_table);
        let mut world = World {
            store,
            live,
            table: table(TableId(next), namespace, "t"),
            other: table(TableId(next + 1), namespace, "other"),
            model: Model::new(),
            history: BTreeMap::new(),
            encoder,
            metrics,
            pipelines: doubler.open,
            _dir: dir,
        };
        for table in [world.table.clone(), world.other.clone()] {
            world.ddl(CatalogWrite::PutTable(table)).await;
        }
        world
    }

    async fn ddl(&mut self, write: CatalogWrite) -> Seq {
        self.transact(Vec::new(), vec![write]).await
    }

    async fn transact(&mut self, rows: Vec<RowWrite>, catalog: Vec<CatalogWrite>) -> Seq {
        let base = self.store.applied();
        let transaction = Transaction { namespace: self.table.namespace, base, rows, catalog, receipt: None };
        let seq = self.store.commit(transaction).await.unwrap();
        self.history.insert(seq, self.model.clone());
        self.store.trim_log();
        seq
    }

    /// One commit: rows to be put, or to be deleted.
    async fn write(&mut self, rows: &[(i64, Option<Row>)]) -> Seq {
        let rows = rows.iter().map(|(id, row)| {
            let old = self.model.get(id).map(|old| image(*id, old));
            let new = row.as_ref().map(|row| image(*id, row));
            match row {
                Some(row) => self.model.insert(*id, row.clone()),
                None => self.model.remove(id),
            };
            let key = encode_key(&self.table, &[Value::Int(*id)]);
            RowWrite { table: self.table.clone(), scope: Scope::Shared, key, old, new }
        });
        let rows = rows.collect();
        self.transact(rows, Vec::new()).await
    }

    async fn put(&mut self, id: i64, a: i64) -> Seq {
        self.write(&[(id, Some((Some(a), "x".to_owned())))]).await
    }

    async fn write_elsewhere(&mut self, id: i64) -> Seq {
        let key = encode_key(&self.other, &[Value::Int(id)]);
        let new = Some(image(id, &(Some(1), "elsewhere".to_owned())));
        let row = RowWrite { table: self.other.clone(), scope: Scope::Shared, key, old: None, new };
        self.transact(vec![row], Vec::new()).await
    }

    fn spec(&self, least: i64, piped: bool) -> Arc<GroupSpec> {
        Arc::new(GroupSpec {
            key: format!("{} {piped}", least).into_bytes(),
            live_id: "l".to_owned(),
            table: self.table.clone(),
            scope: Scope::Shared,
            requery: None,
            range: KeyRange::all(),
            anchors: Anchors::Any,
            index: String::new(),
            program: Arc::new(Least(least)),
            stages: if piped { vec![stage()] } else { Vec::new() },
            semantics: Semantics::Map,
            on_error: OnError::Stop,
            output: piped.then(doubled),
            old: OldMode::Changed,
            fingerprint: "f".to_owned(),
            epoch: self.store.epoch(),
        })
    }

    /// The same query as a feed.
    fn feed(&self, least: i64) -> Arc<GroupSpec> {
        let map = self.spec(least, true);
        Arc::new(GroupSpec {
            key: format!("{least} feed").into_bytes(),
            live_id: map.live_id.clone(),
            table: map.table.clone(),
            scope: map.scope.clone(),
            requery: None,
            range: map.range.clone(),
            anchors: map.anchors.clone(),
            index: map.index.clone(),
            program: map.program.clone(),
            stages: map.stages.clone(),
            semantics: Semantics::Feed,
            on_error: OnError::Stop,
            output: map.output.clone(),
            old: map.old,
            fingerprint: map.fingerprint.clone(),
            epoch: map.epoch,
        })
    }

    /// What a feed gives after a position, up to a commit.
    async fn fed(&self, least: i64, after: Seq, until: Seq) -> Vec<String> {
        // The worker may not have come by `until` yet, and of a commit without events nothing is told: then asked anew.
        loop {
            let mut subscription = self.live.subscribe(self.feed(least), From::After(after)).await.unwrap();
            let mut lines = Vec::new();
            let reached = loop {
                match subscription.next(None).await {
                    Delivery::Events { bytes, .. } => {
                        lines.extend(std::str::from_utf8(&bytes).unwrap().lines().map(|line| {
                            // Without the seq, and without the old side, which a feed has not.
                            line.split(' ').skip(1).take(3).collect::<Vec<_>>().join(" ")
                        }));
                    }
                    Delivery::UpToDate(seq) => break seq,
                    other => panic!("{other:?}"),
                }
            };
            if reached >= until {
                return lines;
            }
        }
    }

    /// What the query gives at a position.
    fn expected(&self, seq: Seq, least: i64, piped: bool) -> BTreeMap<i64, String> {
        let Some((_, model)) = self.history.range(..=seq).next_back() else { return BTreeMap::new() };
        let rows = model.iter().filter_map(|(id, (a, name))| {
            let a = a.filter(|a| *a >= least)?;
            match piped {
                true if a % 3 == 0 => None,
                true => Some((*id, (a * 2).to_string())),
                false => Some((*id, format!("{a}|{name}"))),
            }
        });
        rows.collect()
    }
}

/// Where events go without waking whoever waits: sends all, or now and then a part.
struct Wire {
    sent: Mutex<Vec<u8>>,
    /// What is left has to be seen to before anything else is put here.
    left: AtomicBool,
    /// Of so many that come, one is not sent whole.
    fails: usize,
    came: AtomicUsize,
}

impl Sink for Wire {
    fn take(&self, events: &Bytes) -> bool {
        assert!(!self.left.load(Ordering::Relaxed), "events in front of what was left");
        lock(&self.sent).extend_from_slice(events);
        let whole = !self.came.fetch_add(1, Ordering::Relaxed).is_multiple_of(self.fails);
        self.left.store(!whole, Ordering::Relaxed);
        whole
    }
}

fn outlet(fails: usize) -> Arc<Outlet<Wire>> {
    let (sent, left, came) = (Mutex::default(), AtomicBool::new(false), AtomicUsize::new(1));
    Arc::new(Outlet::new(Wire { sent, left, fails, came }))
}

impl Wire {
    /// What came by here. Only while nobody waits.
    fn sent(&self) -> String {
        self.left.store(false, Ordering::Relaxed);
        String::from_utf8(std::mem::take(&mut *lock(&self.sent))).unwrap()
    }
}

/// What a stream would say next: a delivery, else at its heartbeat how far it is.
async fn told(subscription: &mut Subscription, outlet: Option<&AnyOutlet>) -> Delivery {
    loop {
        if let Ok(delivery) = tokio::time::timeout(HEARTBEAT, subscription.next(outlet)).await {
            return delivery;
        }
        if let Some(seq) = subscription.progress() {
            return Delivery::UpToDate(seq);
        }
    }
}

/// A subscriber that holds what it was told, and objects to what makes no sense.
struct Client {
    least: i64,
    piped: bool,
    subscription: Subscription,
    outlet: Arc<Outlet<Wire>>,
    held: BTreeMap<i64, String>,
    position: Option<Seq>,
    newest_event: Seq,
}

impl Client {
    async fn open(world: &World, least: i64, piped: bool, from: From) -> Result<Client, SubscribeError> {
        let subscription = world.live.subscribe(world.spec(least, piped), from).await?;
        let (held, position) = match from {
            From::After(seq) => (world.expected(seq, least, piped), Some(seq)),
            // No commit runs meanwhile in these tests.
            From::Now => (world.expected(world.store.applied(), least, piped), None),
            From::Snapshot | From::Last(_) => (BTreeMap::new(), None),
        };
        let outlet = outlet(3);
        Ok(Client { least, piped, subscription, outlet, held, position, newest_event: Seq(0) })
    }

    /// Open, and everything present taken in.
    async fn settled(world: &World, least: i64, piped: bool) -> Client {
        let mut client = Client::open(world, least, piped, From::Snapshot).await.unwrap();
        assert!(matches!(client.until(world, Seq(0)).await, Delivery::UpToDate(_)));
        client
    }

    /// Takes one delivery in; what it means for the position.
    fn take(&mut self, world: &World, delivery: Delivery) -> Delivery {
        self.take_sent(world);
        match &delivery {
            Delivery::Events { bytes, seq } => {
                for line in std::str::from_utf8(bytes).unwrap().lines() {
                    self.fold(line);
                }
                assert!(self.newest_event <= *seq);
                if self.position.is_some() {
                    self.check(world, *seq);
                }
            }
            Delivery::UpToDate(seq) => self.check(world, *seq),
            Delivery::Expired | Delivery::End(_) => {}
        }
        delivery
    }

    /// What came through its outlet, always whole commits.
    fn take_sent(&mut self, world: &World) {
        let sent = self.outlet.sink.sent();
        sent.lines().for_each(|line| self.fold(line));
        if !sent.is_empty() && self.position.is_some() {
            self.check(world, self.newest_event);
        }
    }

    fn check(&mut self, world: &World, seq: Seq) {
        assert!(self.position <= Some(seq), "positions only rise: {:?} then {seq:?}", self.position);
        self.position = Some(seq);
        assert_eq!(self.held, world.expected(seq, self.least, self.piped), "at {seq:?}");
    }

    fn fold(&mut self, line: &str) {
        let parts: Vec<&str> = line.split(' ').collect();
        let [seq, op, key, new, old] = parts[..] else { panic!("{line}") };
        let (seq, key) = (Seq(seq.parse().unwrap()), key.parse().unwrap());
        assert!(self.newest_event <= seq, "events go back: {line}");
        self.newest_event = seq;
        let held = self.held.get(&key).map(String::as_str);
        match op {
            "present" | "insert" => assert_eq!(held, None, "{line}"),
            "update" => assert!(held == Some(old) && old != new, "{line}, held {held:?}"),
            _ => assert_eq!(held, Some(old), "{line}"),
        }
        match op {
            "deleted" | "moved_out" => self.held.remove(&key),
            _ => self.held.insert(key, new.to_owned()),
        };
    }

    async fn next(&mut self, world: &World) -> Delivery {
        let delivery = told(&mut self.subscription, None).await;
        self.take(world, delivery)
    }

    /// Until this position is reached, or the end.
    async fn until(&mut self, world: &World, seq: Seq) -> Delivery {
        loop {
            match self.next(world).await {
                Delivery::UpToDate(reached) if reached < seq => {}
                Delivery::Events { .. } => {}
                delivery => return delivery,
            }
        }
    }

    /// Until this many rows are held.
    async fn holds(&mut self, world: &World, rows: usize) {
        while self.held.len() < rows {
            let delivery = self.next(world).await;
            assert!(!matches!(delivery, Delivery::Expired | Delivery::End(_)), "{delivery:?}");
        }
    }

    async fn end(&mut self, world: &World) -> EndReason {
        match self.until(world, Seq(u64::MAX)).await {
            Delivery::End(reason) => reason,
            delivery => panic!("{delivery:?}"),
        }
    }
}

fn random_rows(random: &mut StdRng) -> Vec<(i64, Option<Row>)> {
    let mut rows = HashMap::new();
    for _ in 0..random.random_range(1..6) {
        let a = random.random_bool(0.8).then(|| random.random_range(0..30));
        let row = random.random_bool(0.7).then(|| (a, format!("n{}", random.random_range(0..3))));
        rows.insert(random.random_range(0..20), row);
    }
    rows.into_iter().collect()
}

/// Random commits; subscribers that join, lag, give up waiting half-way, leave and come back at random.
async fn random_run(seed: u64, options: LiveOptions, log_commits: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut world = World::new(options, log_commits).await;
    let mut clients: Vec<Client> = Vec::new();
    for _ in 0..150 {
        match random.random_range(0..10) {
            0..4 => {
                let rows = random_rows(&mut random).into_iter();
                let real: Vec<_> = rows.filter(|(id, row)| row.is_some() || world.model.contains_key(id)).collect();
                if !real.is_empty() {
                    world.write(&real).await;
                }
            }
            4 => {
                world.write_elsewhere(random.random()).await;
            }
            5 if clients.len() < 8 => {
                let position = world.history.keys().nth(random.random_range(0..world.history.len())).copied();
                let from = [From::Snapshot, From::Now, From::After(position.unwrap())][random.random_range(0..3)];
                let (least, piped) = (random.random_range(0..3) * 8, random.random_bool(0.5));
                match Client::open(&world, least, piped, from).await {
                    Ok(client) => clients.push(client),
                    Err(SubscribeError::Expired) => assert!(matches!(from, From::After(_))),
                    Err(error) => panic!("{error}"),
                }
            }
            6 if !clients.is_empty() => {
                let client = clients.swap_remove(random.random_range(0..clients.len()));
                if let (Some(position), true) = (client.position, random.random_bool(0.7)) {
                    let (least, piped) = (client.least, client.piped);
                    drop(client);
                    match Client::open(&world, least, piped, From::After(position)).await {
                        Ok(client) => clients.push(client),
                        Err(error) => assert!(matches!(error, SubscribeError::Expired), "{error}"),
                    }
                }
            }
            _ if !clients.is_empty() => {
                let index = random.random_range(0..clients.len());
                let patience = random.random_range(0..200);
                let client = &mut clients[index];
                let outlet: Option<AnyOutlet> = random.random_bool(0.5).then(|| client.outlet.clone() as _);
                let delivery = tokio::select! {
                    biased;
                    delivery = client.subscription.next(outlet.as_ref()) => Some(delivery),
                    () = async { for _ in 0..patience { tokio::task::yield_now().await } } => None,
                };
                let beats = random.random_bool(0.5);
                let delivery =
                    delivery.or_else(|| client.subscription.progress().filter(|_| beats).map(Delivery::UpToDate));
                if let Some(delivery) = delivery
                    && let Delivery::Expired = client.take(&world, delivery)
                {
                    clients.swap_remove(index);
                }
            }
            _ => {}
        }
    }
    for client in &mut clients {
        let last = client.until(&world, world.store.applied()).await;
        assert!(matches!(last, Delivery::UpToDate(_) | Delivery::Expired), "{last:?}");
    }
    drop(clients);
    world.finish();
}

impl World {
    fn finish(self) {
        self.live.close();
        self.store.close();
        assert_eq!(self.live.counts(), (0, 0));
        assert_eq!(self.metrics.subscriptions.get(), 0);
        assert_eq!(self.metrics.groups.get(), 0);
    }
}

/// Histories per test; each takes some milliseconds. `SEED=n` runs one of them.
const RUNS: u64 = 6;

fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let first = std::env::var("SEED").ok().map(|seed| seed.parse().unwrap());
    first.map_or(0..count, |seed| seed..seed + 1).inspect(|seed| eprintln!("SEED={seed}"))
}

#[tokio::test]
async fn what_is_folded_is_the_result_at_every_position() {
    for seed in seeds(RUNS) {
        random_run(seed, options(), 1_000_000).await;
    }
}

#[tokio::test]
async fn small_tails_fall_back_to_the_log() {
    let small = LiveOptions { commit_tail_bytes: 700, group_tail_bytes: 500, chunk_bytes: 300, ..options() };
    for seed in seeds(RUNS) {
        random_run(seed, small.clone(), 1_000_000).await;
    }
}

#[tokio::test]
async fn a_short_log_expires_but_never_leaves_a_hole() {
    let small = LiveOptions { commit_tail_bytes: 700, group_tail_bytes: 300, chunk_bytes: 300, ..options() };
    for seed in seeds(RUNS) {
        random_run(seed, small.clone(), 8).await;
    }
}

/// A busy writer, and readers that look at the tail and go to sleep all the time, each on a thread of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn nothing_is_lost_between_looking_and_waiting() {
    let mut world = World::new(options(), 1_000_000).await;
    let mut readers = tokio::task::JoinSet::new();
    // Some wake for each commit, others lend an outlet.
    for (least, lends) in [(0, false), (0, true), (0, true), (1, false), (1, true)] {
        let wire = outlet(7);
        let lent: Option<AnyOutlet> = lends.then(|| wire.clone() as _);
        let mut subscription = world.live.subscribe(world.spec(least, false), From::Now).await.unwrap();
        readers.spawn(async move {
            let mut ids = Vec::new();
            loop {
                let delivery = told(&mut subscription, lent.as_ref()).await;
                let mut lines = wire.sink.sent();
                if let Delivery::Events { bytes, .. } = &delivery {
                    lines.push_str(std::str::from_utf8(bytes).unwrap());
                }
                ids.extend(lines.lines().map(|line| line.split(' ').nth(2).unwrap().parse::<i64>().unwrap()));
                match delivery {
                    Delivery::Events { .. } | Delivery::UpToDate(_) => {}
                    Delivery::End(EndReason::TableDropped) => {
                        return (ids, lends, wire.sink.came.load(Ordering::Relaxed) > 1);
                    }
                    delivery => panic!("{delivery:?}"),
                }
            }
        });
    }
    for id in 0..400 {
        world.put(id, 5).await;
    }
    world.ddl(CatalogWrite::DropTable(world.table.id)).await;
    while let Some(reader) = readers.join_next().await {
        let (ids, lends, lent) = reader.unwrap();
        assert_eq!(ids, (0..400).collect::<Vec<_>>());
        assert_eq!(lent, lends, "events went past the reader's task");
    }
    world.finish();
}

#[tokio::test]
async fn equal_queries_are_evaluated_once() {
    let mut world = World::new(unhurried(), 1000).await;
    let mut clients = Vec::new();
    for _ in 0..5 {
        clients.push(Client::open(&world, 0, true, From::Now).await.unwrap());
    }
    assert_eq!(world.live.counts(), (5, 1));
    world.put(1, 20).await;
    for client in &mut clients {
        client.holds(&world, 1).await;
        assert_eq!(client.held, BTreeMap::from([(1, "40".to_owned())]));
    }
    assert_eq!(world.encoder.encoded.load(Ordering::Relaxed), 1);
    assert_eq!(world.metrics.events.get(), 1);
    assert_eq!(world.pipelines.load(Ordering::Relaxed), 1);
    drop(clients);
    assert_eq!(world.live.counts(), (0, 0));
    world.finish();
}

#[tokio::test]
async fn what_waits_leaves_in_one_delivery() {
    let mut world = World::new(unhurried(), 1000).await;
    let mut slow = Client::open(&world, 0, false, From::Now).await.unwrap();
    let mut quick = Client::open(&world, 0, false, From::Now).await.unwrap();
    for id in 0..5 {
        world.put(id, 1).await;
    }
    let seq = world.put(9, 1).await;
    quick.holds(&world, 6).await;
    let Delivery::Events { bytes, seq: cursor } = slow.next(&world).await else { panic!("events wait") };
    assert_eq!((cursor, bytes.iter().filter(|byte| **byte == b'\n').count()), (seq, 6));
    world.finish_with(vec![slow, quick]);
}

impl World {
    fn finish_with(self, clients: Vec<Client>) {
        drop(clients);
        self.finish();
    }
}

#[tokio::test]
async fn a_quiet_stream_moves_on() {
    let mut world = World::new(options(), 1000).await;
    let mut client = Client::open(&world, 0, false, From::Snapshot).await.unwrap();
    let start = world.store.applied();
    assert!(matches!(client.next(&world).await, Delivery::UpToDate(seq) if seq == start));
    let seq = world.write_elsewhere(1).await;
    assert!(matches!(client.until(&world, seq).await, Delivery::UpToDate(reached) if reached == seq));
    world.finish_with(vec![client]);
}

/// A commit elsewhere moves the worker's place on by itself: never past one that the worker has yet to see.
#[tokio::test]
async fn a_commit_elsewhere_hides_none_that_it_is_written_together_with() {
    let world = World::new(unhurried(), 1 << 20).await;
    let mut subscription = world.live.subscribe(world.spec(0, false), From::Now).await.unwrap();
    for round in 0..40 {
        // The committer takes the first alone; the others come while it syncs, and are published one right after the other.
        let commits = (0..8).map(|i| {
            let (id, table) = (round * 8 + i, if i % 2 == 0 { &world.table } else { &world.other });
            let new = Some(image(id, &(Some(1), "x".to_owned())));
            let key = encode_key(table, &[Value::Int(id)]);
            let rows = vec![RowWrite { table: table.clone(), scope: Scope::Shared, key, old: None, new }];
            let (namespace, base) = (table.namespace, world.store.applied());
            world.store.commit(Transaction { namespace, base, rows, catalog: Vec::new(), receipt: None })
        });
        let committed = futures::future::join_all(commits).await;
        let committed: Vec<Seq> = committed.into_iter().map(Result::unwrap).collect();
        let last = *committed.iter().max().unwrap();
        let mut told_of = BTreeSet::new();
        loop {
            match told(&mut subscription, None).await {
                Delivery::Events { bytes, .. } => {
                    let lines = std::str::from_utf8(&bytes).unwrap().lines();
                    told_of.extend(lines.map(|line| Seq(line.split(' ').next().unwrap().parse().unwrap())));
                }
                Delivery::UpToDate(reached) => {
                    let followed = committed.iter().step_by(2).filter(|seq| **seq <= reached);
                    assert_eq!(followed.filter(|seq| !told_of.contains(seq)).count(), 0, "up to date at {reached:?}");
                    if reached >= last {
                        break;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }
    drop(subscription);
    world.finish();
}

#[tokio::test]
async fn a_commit_to_tables_that_no_group_reads_wakes_no_worker() {
    let world = World::new(unhurried(), 1 << 20).await;
    let (mailbox, events) = Mailbox::new();
    let published = |seq, table: &Table, catalog| {
        let (namespace, frame, tables) = (table.namespace, Bytes::new(), vec![table.id]);
        mailbox.published(&Commit { seq: Seq(seq), namespace, frame, tables, catalog });
        (events.try_iter().count(), mailbox.processed().0)
    };
    assert_eq!(published(1, &world.table, None), (0, 0), "it has no groups: it looks when it has one");

    let spec = world.spec(0, false);
    mailbox.follow(&spec);
    assert_eq!(published(1, &world.other, None), (0, 1), "everything is known up to there");
    assert_eq!(published(3, &world.other, None), (0, 1), "not while the worker has yet to see what came before");
    assert_eq!(published(4, &world.table, None), (1, 1));
    assert_eq!(published(5, &world.table, None), (0, 1), "one is enough until the worker has looked");

    let (mailbox, events) = Mailbox::new();
    mailbox.follow(&spec);
    let elsewhere = |seq| {
        let (namespace, tables) = (spec.table.namespace, vec![world.other.id]);
        mailbox.published(&Commit { seq: Seq(seq), namespace, frame: Bytes::new(), tables, catalog: None });
        (events.try_iter().count(), mailbox.processed().0)
    };
    mailbox.follow_all(true);
    assert_eq!(elsewhere(1), (1, 1), "a job waits until so much is known");

    let (mailbox, events) = Mailbox::new();
    mailbox.follow(&spec);
    mailbox.follow(&spec);
    let catalog = Some(world.store.catalog());
    let commit = Commit { seq: Seq(1), namespace: spec.table.namespace, frame: Bytes::new(), tables: vec![], catalog };
    mailbox.published(&commit);
    assert_eq!(events.try_iter().count(), 1, "any change of the catalog may concern a group");
    mailbox.unfollow(&spec);
    assert_eq!(mailbox.follows(), 1, "another group reads it still");
    mailbox.unfollow(&spec);
    assert_eq!(mailbox.follows(), 0);
    world.finish();
}

#[tokio::test]
async fn a_failing_pipeline_ends_its_group_and_no_other() {
    let mut world = World::new(options(), 1000).await;
    let mut piped = Client::settled(&world, 0, true).await;
    let mut plain = Client::settled(&world, 0, false).await;
    let good = world.put(1, 10).await;
    let bad = world.write(&[(2, Some((Some(FAULT_VALUE), "x".into()))), (3, Some((Some(4), "x".into())))]).await;
    let last = world.put(4, 20).await;

    let EndReason::Pipeline { fault, seq } = piped.end(&world).await else { panic!("the pipeline failed") };
    assert_eq!((fault.plugin.unwrap().name.as_str(), seq), ("doubler", good));
    assert_eq!(piped.held, BTreeMap::from([(1, "20".to_owned())]), "all before the commit, nothing of it");
    assert!(matches!(piped.next(&world).await, Delivery::End(_)), "it stays ended");
    plain.until(&world, last).await;
    assert!(plain.held.contains_key(&2));

    // A fresh group fails at the same place: when it replays, only the one who asked ends.
    let mut again = Client::open(&world, 0, true, From::After(good)).await.unwrap();
    assert!(matches!(again.end(&world).await, EndReason::Pipeline { seq, .. } if seq == good));
    let mut after = Client::open(&world, 0, true, From::After(bad)).await.unwrap();
    let next = world.put(5, 1).await;
    assert!(matches!(after.until(&world, next).await, Delivery::UpToDate(_)));
    drop((piped, plain, again, after));
    world.write(&[(2, None)]).await;
    // Workers take their mail in order: the leaving comes before this joining.
    let one = Client::settled(&world, 0, true).await;
    assert_eq!(world.pipelines.load(Ordering::Relaxed), 1, "pipelines of ended and left groups are closed");
    world.finish_with(vec![one]);
}

#[tokio::test]
async fn a_feed_gives_what_the_pipeline_makes_of_each_change() {
    let mut world = World::new(unhurried(), 1000).await;
    let start = world.store.applied();
    let mut early = world.live.subscribe(world.feed(10), From::After(start)).await.unwrap();
    world.put(1, 5).await;
    world.put(1, 12).await;
    let middle = world.put(1, 13).await;
    world.write(&[(2, Some((Some(20), "x".into()))), (1, Some((Some(3), "x".into())))]).await;
    world.write(&[(2, None)]).await;
    let end = world.put(3, 9).await;
    // A row that does not match is no part of a change: into the result is an insert, out of it a delete.
    let all = [
        "insert 1 12",
        "insert 1 24",
        "update 1 13",
        "update 1 26",
        "insert 2 20",
        "insert 2 40",
        "delete 1 13",
        "delete 1 26",
        "delete 2 20",
        "delete 2 40",
    ];
    assert_eq!(world.fed(10, start, end).await, all, "replayed");
    assert_eq!(world.fed(10, middle, end).await, all[4..], "from a position on");
    let mut live = String::new();
    while live.lines().count() < all.len() {
        match early.next(None).await {
            Delivery::Events { bytes, .. } => live.push_str(std::str::from_utf8(&bytes).unwrap()),
            Delivery::UpToDate(_) => {}
            other => panic!("{other:?}"),
        }
    }
    let bad = world.put(4, FAULT_VALUE).await;
    world.put(5, 30).await;
    loop {
        match early.next(None).await {
            Delivery::UpToDate(_) => {}
            Delivery::End(EndReason::Pipeline { seq, .. }) => {
                assert_eq!(seq, end, "nothing of the commit that failed, and everything before it");
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    drop(early);
    assert_eq!(world.fed(10, bad, bad).await, ["insert 5 30", "insert 5 60"]);
}

#[tokio::test]
async fn a_snapshot_that_fails_holds_no_position() {
    let mut world = World::new(options(), 1000).await;
    world.put(1, FAULT_VALUE).await;
    let mut client = Client::open(&world, 0, true, From::Snapshot).await.unwrap();
    assert!(matches!(client.end(&world).await, EndReason::Pipeline { seq: Seq(0), .. }));
    world.finish_with(vec![client]);
}

#[tokio::test]
async fn a_row_that_cannot_be_evaluated_ends_the_stream() {
    let mut world = World::new(options(), 1000).await;
    let mut client = Client::settled(&world, 0, false).await;
    let good = world.put(1, 10).await;
    world.put(2, BAD_VALUE).await;
    let EndReason::Program { message, seq } = client.end(&world).await else { panic!("the predicate failed") };
    assert_eq!((message.as_str(), seq), ("division by zero", good));
    world.finish_with(vec![client]);
}

#[tokio::test]
async fn a_bug_ends_streams_instead_of_leaving_them_waiting() {
    let mut world = World::new(LiveOptions { workers: 1, ..options() }, 1000).await;
    let mut client = Client::settled(&world, 0, false).await;
    assert!(!world.live.is_broken());
    world.put(1, PANIC_VALUE).await;
    assert!(matches!(client.end(&world).await, EndReason::Store { .. }));
    assert!(matches!(Client::open(&world, 0, false, From::Now).await, Err(SubscribeError::Closed)));
    // Whoever watches the server has to know: its last breath ends the groups, and then the thread ends.
    while !world.live.is_broken() {
        std::thread::yield_now();
    }
    world.finish_with(vec![client]);
}

#[tokio::test]
async fn a_dropped_table_ends_its_streams_after_what_came_before() {
    let mut world = World::new(options(), 1000).await;
    let mut client = Client::settled(&world, 0, false).await;
    world.put(1, 10).await;
    world.ddl(CatalogWrite::DropTable(world.table.id)).await;
    assert!(matches!(client.end(&world).await, EndReason::TableDropped));
    assert_eq!(client.held.len(), 1);
    let mut late = Client::open(&world, 0, false, From::Snapshot).await.unwrap();
    assert!(matches!(late.end(&world).await, EndReason::TableDropped));
    world.finish_with(vec![client, late]);
}

fn plugin(world: &World, version: u32) -> CatalogWrite {
    let plugin = Plugin {
        namespace: world.table.namespace,
        namespace_name: "main".to_owned(),
        name: "doubler".to_owned(),
        version,
        sha256: format!("{version:064}"),
        kind: PluginKind::RowTransform,
        abi: 1,
        manifest: Vec::new(),
        size: 1,
        uploaded_at: 0,
        uploaded_by: "admin".to_owned(),
        restored: None,
    };
    CatalogWrite::PutPlugin { plugin: Arc::new(plugin), wasm: Bytes::from_static(b"\0asm") }
}

#[tokio::test]
async fn another_plugin_version_ends_the_group_at_its_place() {
    let mut world = World::new(options(), 1000).await;
    let (first, second) = (plugin(&world, 1), plugin(&world, 2));
    world.ddl(first.clone()).await;
    let mut piped = Client::settled(&world, 0, true).await;
    let mut plain = Client::settled(&world, 0, false).await;
    let good = world.put(1, 10).await;
    world.ddl(second).await;
    let last = world.put(2, 20).await;
    let EndReason::PluginChanged { name, seq } = piped.end(&world).await else { panic!("another version is active") };
    assert_eq!((name.as_str(), seq), ("doubler", good));
    assert_eq!(piped.held, BTreeMap::from([(1, "20".to_owned())]));
    plain.until(&world, last).await;

    let mut pinned = Client::settled(&world, 0, true).await;
    let drop_plugin = CatalogWrite::DropPlugin { namespace: "main".to_owned(), name: "doubler".to_owned() };
    world.ddl(drop_plugin).await;
    assert!(matches!(pinned.end(&world).await, EndReason::PluginDropped { name } if name == "doubler"));
    world.finish_with(vec![piped, plain, pinned]);
}

#[tokio::test]
async fn subscribing_is_refused_with_a_reason() {
    let mut world = World::new(LiveOptions { max_subscriptions: 1, ..options() }, 4).await;
    let first = world.put(0, 0).await;
    for id in 1..30 {
        world.put(id, id).await;
    }
    let refused = async |from| Client::open(&world, 0, false, from).await.err();
    assert!(matches!(refused(From::After(first)).await, Some(SubscribeError::Expired)));
    assert!(matches!(refused(From::After(Seq(u64::MAX))).await, Some(SubscribeError::Expired)));
    let client = Client::open(&world, 0, false, From::Snapshot).await.unwrap();
    assert!(matches!(refused(From::Now).await, Some(SubscribeError::TooMany(1))));
    drop(client);

    let mut spec = world.spec(0, true);
    Arc::get_mut(&mut spec).unwrap().stages[0].params = "bad".to_owned();
    assert!(matches!(world.live.subscribe(spec, From::Now).await.err(), Some(SubscribeError::Pipeline(_))));
    assert_eq!(world.live.counts(), (0, 0));
    world.finish();
}

#[tokio::test]
async fn closing_ends_everything() {
    let world = World::new(options(), 1000).await;
    let mut client = Client::open(&world, 0, false, From::Snapshot).await.unwrap();
    world.live.close();
    assert!(matches!(client.end(&world).await, EndReason::Shutdown));
    let refused = Client::open(&world, 0, false, From::Snapshot).await.err();
    assert!(matches!(refused, Some(SubscribeError::Closed)));
    world.finish_with(vec![client]);
}

/// What was appended before its feeding began lay in the tail until the next commit, or heartbeat, where it was more than
/// one delivery takes.
#[tokio::test]
async fn more_than_one_delivery_goes_on_by_itself() {
    const COMMITS: i64 = 8;
    let large = LiveOptions { workers: 1, group_tail_bytes: 8 << 20, ..options() };
    let mut world = World::new(large, 1000).await;
    let mut subscription = world.live.subscribe(world.spec(0, false), From::Now).await.unwrap();
    let wire = outlet(usize::MAX);
    let lent: AnyOutlet = wire.clone();
    assert!(matches!(subscription.next(Some(&lent)).await, Delivery::UpToDate(_)));
    // Another one, so that they are fed by a task.
    let mut other = world.live.subscribe(world.spec(0, false), From::Now).await.unwrap();
    let other = tokio::spawn(async move {
        let lent: AnyOutlet = outlet(usize::MAX);
        loop {
            other.next(Some(&lent)).await;
        }
    });
    let reader = tokio::spawn(async move {
        let mut ids = Vec::new();
        while ids.len() < COMMITS as usize {
            let delivery = subscription.next(Some(&lent)).await;
            let mut lines = wire.sink.sent();
            if let Delivery::Events { bytes, .. } = &delivery {
                lines.push_str(std::str::from_utf8(bytes).unwrap());
            }
            ids.extend(lines.lines().map(|line| line.split(' ').nth(2).unwrap().parse::<i64>().unwrap()));
        }
        ids
    });
    // It waits now; and while this thread stands still nothing is fed.
    tokio::task::yield_now().await;
    for id in 0..COMMITS {
        futures::executor::block_on(world.write(&[(id, Some((Some(5), "n".repeat(60_000))))]));
    }
    while world.metrics.events.get() < COMMITS as u64 {
        std::thread::yield_now();
    }
    let ids = tokio::time::timeout(Duration::from_secs(60), reader).await.expect("all of it comes").unwrap();
    assert_eq!(ids, (0..COMMITS).collect::<Vec<_>>());
    other.abort();
    assert!(other.await.unwrap_err().is_cancelled());
    world.finish();
}

/// To wake a task for one socket costs as much as the sending.
#[tokio::test]
async fn a_subscriber_that_waits_alone_is_fed_by_the_worker() {
    let mut world = World::new(unhurried(), 1000).await;
    let mut subscription = world.live.subscribe(world.spec(0, false), From::Now).await.unwrap();
    let wire = outlet(usize::MAX);
    let lent: AnyOutlet = wire.clone();
    assert!(matches!(subscription.next(Some(&lent)).await, Delivery::UpToDate(_)));
    let reader = tokio::spawn(async move { subscription.next(Some(&lent)).await });
    // It waits now; and this thread, which all tasks are on, stands still.
    tokio::task::yield_now().await;
    for id in 0..3 {
        futures::executor::block_on(world.put(id, 5));
    }
    let (began, mut sent) = (Instant::now(), String::new());
    while sent.lines().count() < 3 {
        assert!(began.elapsed() < Duration::from_secs(60), "all that came: {sent:?}");
        std::thread::yield_now();
        sent.push_str(&wire.sink.sent());
    }
    tokio::task::yield_now().await;
    assert!(!reader.is_finished(), "it was woken for that");
    reader.abort();
    assert!(reader.await.unwrap_err().is_cancelled());
    world.finish();
}

#[tokio::test]
async fn those_who_subscribe_together_share_one_snapshot() {
    let one = LiveOptions { workers: 1, ..options() };
    let mut world = World::new(one, 1000).await;
    for id in 0..20 {
        world.put(id, id).await;
    }
    let first = Client::settled(&world, 0, false).await;
    let encoded = || world.encoder.encoded.load(Ordering::Relaxed);
    let before = encoded();
    let mut clients = Vec::new();
    for _ in 0..50 {
        clients.push(Client::open(&world, 0, false, From::Snapshot).await.unwrap());
    }
    // One that wants less of it, and one that wants something else.
    let few = Client::open(&world, 0, false, From::Last(3)).await.unwrap();
    let other = Client::open(&world, 8, false, From::Snapshot).await.unwrap();
    let end = world.store.applied();
    let told = clients.iter_mut().map(|client| client.until(&world, end));
    for delivery in futures::future::join_all(told).await {
        assert!(matches!(delivery, Delivery::UpToDate(_)), "{delivery:?}");
    }
    let snapshots = encoded() - before;
    assert!(snapshots < 25, "{snapshots} encodings for 50 snapshots of the same");
    clients.extend([first, few, other]);
    world.finish_with(clients);
}

#[tokio::test]
async fn those_who_come_back_together_share_one_replay() {
    let small = LiveOptions { workers: 1, group_tail_bytes: 1, ..options() };
    let mut world = World::new(small, 1000).await;
    let start = world.store.applied();
    for id in 0..20 {
        world.put(id, id).await;
    }
    let mut clients = Vec::new();
    for _ in 0..10 {
        clients.push(Client::open(&world, 0, false, From::After(start)).await.unwrap());
    }
    let end = world.store.applied();
    let all = futures::future::join_all(clients.iter_mut().map(|client| client.until(&world, end))).await;
    for (client, delivery) in all.into_iter().enumerate() {
        assert!(matches!(delivery, Delivery::UpToDate(_)), "{client}: {delivery:?}");
    }
    let encoded = world.encoder.encoded.load(Ordering::Relaxed);
    assert!(encoded < 20 * 10, "{encoded} encodings for 20 commits and 10 subscribers");
    world.finish_with(clients);
}

#[test]
fn a_subscription_is_small() {
    // Idle it holds nothing beside this: what the benches count by the allocator.
    assert!(size_of::<Subscription>() <= 40, "{} bytes", size_of::<Subscription>());
}

// ---- results on their way through a pipeline ----

/// A query whose results have the columns `id` and `a`.
struct Results(Schema);

impl Requery for Results {
    fn run(&self, _: Done) {}

    fn columns(&self) -> &Schema {
        &self.0
    }

    fn images(&self, rows: &RecordBatch, some: Range<usize>, bytes: usize) -> Result<Images, ProgramError> {
        let values = rows.column(1).as_primitive::<Int64Type>();
        let mut images = Images { base: Vec::new(), places: Vec::new() };
        for row in some {
            if !images.places.is_empty() && images.base.len() >= bytes {
                break;
            }
            let mut builder = ImageBuilder::new(2);
            builder.set_int(1, values.value(row));
            let start = images.base.len() as u32;
            let ImageAt { present, slots, heap, columns } = builder.finish_into(&mut images.base);
            let at = ImageAt { present: present + start, slots: slots + start, heap: heap + start, columns };
            images.places.push(at);
        }
        Ok(images)
    }
}

#[test]
fn a_result_goes_through_its_pipeline_in_pieces_and_within_its_limit() {
    let table = table(TableId(1), NamespaceId(1), "any");
    let mut schema = table.schema();
    schema.columns.truncate(2);
    let runner = Arc::new(Results(schema));
    let spec = GroupSpec {
        key: Vec::new(),
        live_id: "l".to_owned(),
        table: table.clone(),
        scope: Scope::Shared,
        requery: Some(Rerun { runner, sources: vec![(table, Scope::Shared)] }),
        range: KeyRange::all(),
        anchors: Anchors::Any,
        index: String::new(),
        program: Arc::new(Least(0)),
        stages: vec![stage()],
        semantics: Semantics::Map,
        on_error: OnError::Stop,
        output: Some(doubled()),
        old: OldMode::Changed,
        fingerprint: "f".to_owned(),
        epoch: Epoch(1),
    };
    assert_eq!((spec.whose(), spec.input().columns.len()), (&Scope::Shared, 2));
    let piped = |values: Range<i64>, options: LiveOptions| -> Result<(RecordBatch, RecordBatch, usize), Fault> {
        let ids: ArrayRef = Arc::new((0..values.end - values.start).collect::<Int64Array>());
        let keys = RecordBatch::try_from_iter([("id", ids.clone())]).unwrap();
        let values: ArrayRef = Arc::new(values.collect::<Int64Array>());
        let rows = RecordBatch::try_from_iter([("id", ids), ("a", values)]).unwrap();
        let (mut piping, mut steps) = (Piping::new(Answer { seq: Seq(9), rows, keys }), 0);
        loop {
            steps += 1;
            match piping.step(&spec, &mut Doubler::default(), 7, &options)? {
                Progress::More(more) => piping = more,
                Progress::Done(answer) => return Ok((answer.rows, answer.keys, steps)),
            }
        }
    };
    let numbers = |batch: &RecordBatch| batch.column(0).as_primitive::<Int64Type>().values().to_vec();
    let kept: Vec<i64> = (0..2_500).filter(|id| (10_000 + id) % 3 != 0).collect();
    let twice: Vec<i64> = kept.iter().map(|id| (10_000 + id) * 2).collect();
    for (chunk_bytes, expected) in [(1 << 20, 3), (1, 2_500)] {
        let (rows, keys, steps) = piped(10_000..12_500, LiveOptions { chunk_bytes, ..options() }).unwrap();
        assert_eq!((numbers(&rows), numbers(&keys), steps), (twice.clone(), kept.clone(), expected));
    }
    // Nothing is left: the columns are the transform's all the same.
    let (rows, keys, steps) = piped(3..4, options()).unwrap();
    assert_eq!((rows.num_rows(), rows.schema().field(0).name().as_str(), keys.num_rows(), steps), (0, "twice", 0, 1));
    let (rows, ..) = piped(0..0, options()).unwrap();
    assert_eq!((rows.num_rows(), rows.num_columns()), (0, 1));
    // What a transform makes is bounded, and a plugin's fault is its own.
    let small = LiveOptions { requery_bytes: 4_096, ..options() };
    let Err(Fault::Program(error)) = piped(10_000..12_500, small) else { panic!("over the limit") };
    assert!(error.to_string().contains("live.requery_bytes"), "{error}");
    assert!(matches!(piped(665..668, options()), Err(Fault::Pipeline(_))));
}
