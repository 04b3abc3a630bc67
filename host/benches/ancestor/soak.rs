//! The load that the ancestor's text speaks of: 1,000 users with 10 queries a second each, and 10,000 subscriptions;
//! and what memory grows by in a minute of it.
//!
//! In one process, through `db` (`execute`, `subscribe`), not over HTTP: clients on the same cores would take most of
//! them, and their memory would have to be told apart. What HTTP costs a connection is `tests/load`'s matter.
//!
//! Everything that is a cache is set small, so that it is full when the warm-up ends; with the defaults it would fill
//! for an hour, and that would look like growth. `MINUTES` (1; the claim takes 10) and `WARM_UP` (seconds, 60) say
//! how long.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use host::config::{Config, Role};
use host::db::{Db, DbError, Identity, LiveOutput, LiveStream, SqlRequest, StatementResult};
use host::http::sse::Events;
use host::sql::Param;
use host::telemetry::Metrics;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use crate::measure::{Table, bytes, cores, cpu_seconds, held, resident};
use crate::ours::{live_request, sql_request};

const USERS: u64 = 1_000;
/// Ten queries a second of each user.
const PAUSE: Duration = Duration::from_millis(100);
/// Of each user: half over its own rows, half over a room that it shares with others.
const SUBSCRIPTIONS: u64 = 10;
const ROOMS: u64 = 100;
/// Rows of the shared table.
const READINGS: u64 = 1_000;
/// Rows of each user's own.
const NOTES: u64 = 10;
/// One query in so many is a write.
const WRITE_EVERY: u64 = 100;
const SAMPLE: Duration = Duration::from_secs(30);
/// Bytes a minute.
const LIMIT: f64 = 1e6;
/// Minutes that a verdict takes.
const LONG: u64 = 10;
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// What has been done so far.
#[derive(Default)]
struct Counts {
    queries: AtomicU64,
    writes: AtomicU64,
    deliveries: AtomicU64,
    failures: AtomicU64,
}

impl Counts {
    fn now(&self) -> [u64; 3] {
        [&self.queries, &self.writes, &self.deliveries].map(|count| count.load(Ordering::Relaxed))
    }
}

pub fn run() {
    let dir = tempfile::tempdir().unwrap();
    let config = settings(dir.path());
    let (metrics, _) = Metrics::new();
    let runtime = Runtime::new().unwrap();
    let _entered = runtime.enter();
    let db = Db::open(&config, Arc::new(Events), metrics.clone()).unwrap();
    runtime.block_on(soak(&db, &metrics));
    db.close();
}

fn settings(dir: &Path) -> Config {
    let mut config = Config::new(dir);
    config.store.write_buffer_size = 256 * KIB;
    config.store.block_cache_size = 8 * MIB;
    config.live.commit_tail_bytes = MIB;
    config.live.group_tail_bytes = 16 * KIB;
    config
}

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

async fn soak(db: &Db, metrics: &Metrics) {
    let (minutes, warm_up) = (from_environment("MINUTES", 1).max(1), from_environment("WARM_UP", 60));
    println!(
        "\nsoak: {USERS} users × 10 queries a second, {} subscriptions, {minutes} minutes after {warm_up} s of \
         warm-up; {} cores; in process (db.execute, db.subscribe), not over HTTP",
        USERS * SUBSCRIPTIONS,
        cores()
    );
    fill(db).await;
    let counts = Arc::new(Counts::default());
    let mut tasks = JoinSet::new();
    let began = Instant::now();
    for stream in open_streams(db).await {
        tasks.spawn(read(stream, counts.clone()));
    }
    println!("  subscribed within {:.1} s", began.elapsed().as_secs_f64());
    for number in 0..USERS {
        tasks.spawn(user(db.clone(), number, counts.clone()));
    }
    tokio::time::sleep(Duration::from_secs(warm_up)).await;
    let samples = samples(db, metrics, &counts, minutes).await;
    tasks.shutdown().await;
    judge(&samples, minutes);
    assert_eq!(counts.failures.load(Ordering::Relaxed), 0, "no query fails");
}

fn identity(user: impl Into<Arc<str>>, role: Role) -> Identity {
    Identity { user: user.into(), role, address: None }
}

fn user_name(number: u64) -> String {
    format!("user {number}")
}

/// Runs one request and takes all of its rows.
async fn execute(db: &Db, who: &Identity, request: SqlRequest) -> Result<(), DbError> {
    for result in db.execute(who, request).await?.results {
        let rows = match result {
            StatementResult::Rows(rows) => Some(rows),
            StatementResult::Affected { returned, .. } => returned,
        };
        let Some(mut rows) = rows else { continue };
        while let Some(batch) = rows.batches.next().await {
            batch?;
        }
    }
    Ok(())
}

async fn fill(db: &Db) {
    let admin = identity("admin", Role::Admin);
    for sql in [
        "CREATE TABLE readings (id BIGINT PRIMARY KEY, room TEXT, heat DOUBLE)",
        "CREATE TABLE notes (id BIGINT PRIMARY KEY, note TEXT) WITH (type = 'user')",
    ] {
        execute(db, &admin, sql_request(sql, Vec::new())).await.unwrap();
    }
    let rows: Vec<String> = (0..READINGS).map(|id| format!("({id}, 'room {}', 20.5)", id % ROOMS)).collect();
    let readings = format!("INSERT INTO readings VALUES {}", rows.join(", "));
    execute(db, &admin, sql_request(readings, Vec::new())).await.unwrap();
    let rows: Vec<String> = (0..NOTES).map(|id| format!("({id}, 'a note of some length, as notes are')")).collect();
    let notes = format!("INSERT INTO notes VALUES {}", rows.join(", "));
    let mut tasks = JoinSet::new();
    for number in 0..USERS {
        let (db, who, notes) = (db.clone(), identity(user_name(number), Role::User), notes.clone());
        tasks.spawn(async move { execute(&db, &who, sql_request(notes, Vec::new())).await.unwrap() });
    }
    tasks.join_all().await;
}

/// All subscriptions, those of one user after each other.
async fn open_streams(db: &Db) -> Vec<LiveStream> {
    let mut tasks = JoinSet::new();
    for number in 0..USERS {
        let db = db.clone();
        tasks.spawn(async move {
            let who = identity(user_name(number), Role::User);
            let room = format!("SELECT id, heat FROM readings WHERE room = 'room {}'", number % ROOMS);
            let mut streams = Vec::new();
            for which in 0..SUBSCRIPTIONS {
                let sql = if which % 2 == 0 { "SELECT id, note FROM notes".to_owned() } else { room.clone() };
                streams.push(db.subscribe(&who, live_request(sql, None)).await.unwrap());
            }
            streams
        });
    }
    tasks.join_all().await.into_iter().flatten().collect()
}

/// A subscriber that takes what comes.
async fn read(mut stream: LiveStream, counts: Arc<Counts>) {
    while let Some(output) = stream.next(None).await {
        match output {
            LiveOutput::Encoded(_) => count(&counts.deliveries),
            LiveOutput::Failed { message } | LiveOutput::Closed { message, .. } => {
                eprintln!("a stream ended: {message}");
                count(&counts.failures);
            }
            _ => {}
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// One user: a query every tenth of a second, or as soon as the one before is answered where that takes longer.
async fn user(db: Db, number: u64, counts: Arc<Counts>) {
    let who = identity(user_name(number), Role::User);
    // Users do not all ask at the same time.
    let phase = PAUSE.mul_f64(number as f64 / USERS as f64);
    let mut ticks = interval_at(Instant::now() + phase, PAUSE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for turn in number.. {
        ticks.tick().await;
        let done = if turn.is_multiple_of(WRITE_EVERY) {
            count(&counts.writes);
            write(&db, &who, number, turn).await
        } else {
            execute(&db, &who, query(number, turn)).await
        };
        count(&counts.queries);
        if let Err(error) = done {
            eprintln!("{}, turn {turn}: {error}", who.user);
            count(&counts.failures);
        }
    }
}

/// Of ten reads nine are by key, as those of applications are.
fn query(number: u64, turn: u64) -> SqlRequest {
    let int = |value: u64| vec![Param::Int(value as i64)];
    match turn % 10 {
        9 => sql_request("SELECT id, note FROM notes WHERE id >= $1 LIMIT 5", int(turn % NOTES)),
        6..9 => sql_request("SELECT room, heat FROM readings WHERE id = $1", int((number + turn) % READINGS)),
        _ => sql_request("SELECT note FROM notes WHERE id = $1", int(turn % NOTES)),
    }
}

/// By turns a row of the user's own, which its five streams are told, and a reading, which those of its room are.
/// Rows are replaced, never added: what grows is not the data.
async fn write(db: &Db, who: &Identity, number: u64, turn: u64) -> Result<(), DbError> {
    let writes = turn / WRITE_EVERY;
    if writes.is_multiple_of(2) {
        let note = format!("a note of turn {turn}, some longer");
        let params = vec![Param::Text(note), Param::Int((writes % NOTES) as i64)];
        execute(db, who, sql_request("UPDATE notes SET note = $1 WHERE id = $2", params)).await
    } else {
        let params = vec![Param::Float(turn as f64), Param::Int((number % READINGS) as i64)];
        let service = identity("service", Role::Service);
        execute(db, &service, sql_request("UPDATE readings SET heat = $1 WHERE id = $2", params)).await
    }
}

/// Memory at one time, in bytes.
#[derive(Clone, Copy)]
struct Sample {
    minute: f64,
    /// PSS.
    resident: usize,
    anonymous: usize,
    /// By the counting allocator: all but RocksDB.
    held: usize,
    /// What RocksDB says.
    buffers: usize,
    cache: usize,
    readers: usize,
}

impl Sample {
    fn take(db: &Db, metrics: &Metrics, minute: f64) -> Sample {
        db.refresh_metrics();
        let said = |gauge: &host::telemetry::Gauge| usize::try_from(gauge.get()).unwrap_or_default();
        let resident = resident();
        Sample {
            minute,
            resident: resident.all,
            anonymous: resident.anonymous,
            held: held(),
            buffers: said(&metrics.store_write_buffer_bytes),
            cache: said(&metrics.store_block_cache_bytes),
            readers: said(&metrics.store_table_reader_bytes),
        }
    }
}

async fn samples(db: &Db, metrics: &Metrics, counts: &Counts, minutes: u64) -> Vec<Sample> {
    let head = ["PSS", "of it anonymous", "allocated, but RocksDB", "write buffers", "block cache", "table readers"];
    let head = [&head[..], &["queries/s", "writes/s", "deliveries/s", "CPU"]].concat();
    let mut table = Table::new("soak: samples after the warm-up", &head);
    let began = Instant::now();
    let (mut before, mut cpu) = (counts.now(), cpu_seconds());
    let mut samples = vec![Sample::take(db, metrics, 0.0)];
    table.row("0.0 min", memory_cells(&samples[0]));
    let mut due = began;
    for _ in 0..minutes * 60 / SAMPLE.as_secs() {
        due += SAMPLE;
        sleep_until(due).await;
        let sample = Sample::take(db, metrics, began.elapsed().as_secs_f64() / 60.0);
        let now = counts.now();
        let rate = |at: usize| format!("{:.0}", (now[at] - before[at]) as f64 / SAMPLE.as_secs_f64());
        let busy = format!("{:.0} %", (cpu_seconds() - cpu) / SAMPLE.as_secs_f64() * 100.0);
        // The table comes at the end: until then this says that it goes on.
        eprintln!("  {:.1} min: PSS {}, {} queries/s", sample.minute, bytes(sample.resident), rate(0));
        let cells = memory_cells(&sample).into_iter().chain((0..3).map(rate)).chain([busy]);
        table.row(format!("{:.1} min", sample.minute), cells);
        (before, cpu) = (now, cpu_seconds());
        samples.push(sample);
    }
    table.print(&["less than 5 MB a minute at this load, about 10 MB an hour"]);
    samples
}

fn memory_cells(sample: &Sample) -> [String; 6] {
    [sample.resident, sample.anonymous, sample.held, sample.buffers, sample.cache, sample.readers].map(bytes)
}

fn judge(samples: &[Sample], minutes: u64) {
    let slope = slope(samples, |sample| sample.resident);
    let of = |name: &str, bytes: f64| println!("  growth of {name}: {:+.3} MB a minute", bytes / 1e6);
    of("PSS", slope);
    of("what is allocated, but RocksDB", self::slope(samples, |sample| sample.held));
    if minutes < LONG {
        println!("  A try: the verdict (less than {} MB a minute) takes MINUTES={LONG}", LIMIT / 1e6);
        return;
    }
    let verdict = if slope < LIMIT { "ok" } else { "OVER" };
    println!("  PSS, limit {} MB a minute: {verdict}", LIMIT / 1e6);
    assert!(slope < LIMIT, "memory grows");
}

/// Bytes a minute, by least squares.
fn slope(samples: &[Sample], of: impl Fn(&Sample) -> usize) -> f64 {
    let count = samples.len() as f64;
    let minute = samples.iter().map(|sample| sample.minute).sum::<f64>() / count;
    let bytes = samples.iter().map(|sample| of(sample) as f64).sum::<f64>() / count;
    let (mut rise, mut run) = (0.0, 0.0);
    for sample in samples {
        rise += (sample.minute - minute) * (of(sample) as f64 - bytes);
        run += (sample.minute - minute).powi(2);
    }
    rise / run
}
