//! Modules of any kind through the whole load path: random guests and damaged samples are uploaded, and what is taken
//! runs in a live query and is deleted again. The server refuses them or runs them, and is none the worse for it:
//! another stream goes on after each, and memory, files, mappings and instances are back where they were.
//!
//! 96 modules, 12,000 in `make torture`, one in six a random guest; `MODULES=…` asks for another number. A failure says
//! where the module lies.

mod mutant;
mod program;

use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use reqwest::Method;
use serde_json::Value;
use tests::live::seq;
use tests::{Client, Live, LiveQuery, Options, PATIENCE, TestServer, optional_plugin, plugin};
use tokio::sync::Mutex;

/// Small, so that what the store holds does not hide what a module has left behind.
const STORE: &str = "[storage.rocksdb]\nwrite_buffer_size = 1048576\nmax_write_buffers = 2\nblock_cache_size = 4194304\n\
                     max_open_files = 64\n";
const TABLE: &str =
    "id BIGINT PRIMARY KEY, carrier TEXT, flight INT, origin TEXT, dest TEXT, distance INT, dep_delay DOUBLE";

/// At the same time; as many as the server compiles.
const LANES: usize = 2;
/// Modules between two looks at what the server takes.
const AT_MOST: usize = 500;
/// Compiling may take 15 seconds, and trying every hook of a guest a few more.
const UPLOAD: Duration = Duration::from_secs(60);

/// The neighbour's, on the one worker that has its query.
const INSTANCES: f64 = 1.0;

/// What may be more than after the first modules: the last ones' compiled code, buffers of the store, the allocator's.
const MEMORY: u64 = 64 << 20;
const FILES: usize = 128;
const MAPPINGS: usize = 512;

/// What came of the modules.
#[derive(Debug, Default)]
struct Tally {
    refused: usize,
    /// Uploaded, but for no live query over the table.
    unfit: usize,
    /// Ran, and failed at it.
    failed: usize,
    ran: usize,
}

/// A stream of somebody else, with a plugin of its own.
struct Neighbour {
    db: Client,
    live: Live,
    last: i64,
}

impl Neighbour {
    async fn new(db: &Client) -> Neighbour {
        db.sql("CREATE TABLE theirs (id INT PRIMARY KEY, dep_delay INT)").await;
        db.put_plugin("late", plugin("late.wasm")).await;
        let mut live = db.live(LiveQuery::new("SELECT id FROM theirs").plugin("late")).await;
        live.until_uptodate().await;
        Neighbour { db: db.clone(), live, last: 0 }
    }

    /// A row comes and one goes; both are told, and the server says that it is well.
    async fn goes_on(&mut self) {
        self.last += 1;
        let id = self.last;
        self.db.sql(&format!("INSERT INTO theirs VALUES ({id}, 99)")).await;
        self.db.sql(&format!("DELETE FROM theirs WHERE id = {id}")).await;
        for name in ["insert", "delete"] {
            let event = self.live.next_change().await;
            assert_eq!((event.name.as_str(), &event.data["key"]["id"]), (name, &Value::from(id)), "{event:?}");
        }
        let health = self.db.get("/healthz").timeout(PATIENCE).send().await.expect("/healthz answers");
        assert_eq!(health.status(), 200);
    }
}

/// What the server takes of the machine.
#[derive(Debug)]
struct Footprint {
    memory: u64,
    files: usize,
    mappings: usize,
}

impl Footprint {
    fn of(server: &TestServer) -> Footprint {
        let proc = std::path::PathBuf::from(format!("/proc/{}", server.pid().as_raw_nonzero()));
        let read = |file: &str| std::fs::read_to_string(proc.join(file)).expect("the server lives");
        let status = read("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS is among it");
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().expect("a number of kB");
        let files = std::fs::read_dir(proc.join("fd")).expect("the server lives").count();
        Footprint { memory: kib * 1024, files, mappings: read("maps").lines().count() }
    }

    fn is_about(&self, first: &Footprint) -> bool {
        self.memory < first.memory + MEMORY
            && self.files < first.files + FILES
            && self.mappings < first.mappings + MAPPINGS
    }
}

/// One module after the other under one name, over one table.
struct Lane {
    db: Client,
    random: StdRng,
    name: String,
    count: usize,
    tally: Tally,
}

impl Lane {
    async fn new(db: &Client, number: usize, seed: u64) -> Lane {
        let name = format!("lane{number}");
        db.sql(&format!("CREATE TABLE {name} ({TABLE})")).await;
        let row = "'UA', 1, 'EWR', 'IAH', 1400, NULL";
        db.sql(&format!("INSERT INTO {name} VALUES (1, {row}), (2, {row}), (3, {row})")).await;
        // A lane's modules are the same however the lanes take turns.
        let random = StdRng::seed_from_u64(seed.wrapping_mul(LANES as u64).wrapping_add(number as u64));
        Lane { db: db.clone(), random, name, count: 0, tally: Tally::default() }
    }

    async fn run(&mut self, modules: usize, samples: &[Vec<u8>], neighbour: &Mutex<Neighbour>) {
        for _ in 0..modules {
            self.count += 1;
            let module = if self.count.is_multiple_of(6) {
                program::guest(&mut self.random)
            } else {
                mutant::module(&mut self.random, samples)
            };
            let kept = std::env::temp_dir().join(format!("tidegate-fuzz-{}-{}", std::process::id(), self.name));
            std::fs::write(&kept, &module).expect("the module is kept, should it be the one");
            self.load(module, &format!("module {} of {}, kept in {}", self.count, self.name, kept.display())).await;
            neighbour.lock().await.goes_on().await;
            std::fs::remove_file(&kept).expect("it was written");
        }
    }

    /// Uploads the module, and uses it where it is taken.
    async fn load(&mut self, module: Vec<u8>, what: &str) {
        let request = self.db.put_plugin_request(&self.name, module).timeout(UPLOAD);
        let response = request.send().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        let (status, body) = (response.status().as_u16(), response.text().await.unwrap_or_default());
        match status {
            200 | 201 => {}
            422 => {
                let problem: Value = serde_json::from_str(&body).unwrap_or_default();
                assert!(
                    problem["detail"].as_str().is_some_and(|detail| !detail.is_empty()),
                    "{what}: no reason: {body}"
                );
                self.tally.refused += 1;
                return;
            }
            _ => panic!("{what}: {status} {body}"),
        }
        self.listen(what).await;
        self.delete(what).await;
    }

    /// A live query through the plugin, with a change: rows, outputs or a failure come of it, not silence.
    async fn listen(&mut self, what: &str) {
        let on_error = *["stop", "stop", "skip", "pass"].choose(&mut self.random).expect("there are some");
        let query =
            LiveQuery::new(format!("SELECT * FROM {}", self.name)).plugin(&self.name).option("on_error", on_error);
        let request = query.request(&self.db, None).send();
        // The bound is for the head only: the body has no end.
        let response =
            tokio::time::timeout(UPLOAD, request).await.unwrap_or_else(|_| panic!("{what}: no stream, no refusal"));
        let response = response.unwrap_or_else(|error| panic!("{what}: {error}"));
        match response.status().as_u16() {
            200 => {}
            // 503: the same module was here before, and rests from what it did then.
            400 | 422 | 503 => {
                self.tally.unfit += 1;
                return;
            }
            status => panic!("{what}: {status} {}", response.text().await.unwrap_or_default()),
        }
        let mut live = self.db.attached(response);
        let well = until_told(&mut live, 0, what).await && {
            let update = format!("UPDATE {} SET dep_delay = {}, distance = {1}", self.name, self.count);
            let answer = self.db.sql(&update).await;
            until_told(&mut live, seq(&answer), what).await
        };
        if well {
            self.tally.ran += 1;
        } else {
            self.tally.failed += 1;
        }
    }

    /// Deletes the plugin, as soon as the server has noticed that nobody listens any more.
    async fn delete(&self, what: &str) {
        let path = format!("/v1/plugins/{}", self.name);
        let gone = async {
            loop {
                let response = self.db.request(Method::DELETE, &path).send().await.expect("an answer");
                match response.status().as_u16() {
                    200 => return,
                    409 => tokio::task::yield_now().await,
                    status => panic!("{what}: deleting it: {status}"),
                }
            }
        };
        tokio::time::timeout(PATIENCE, gone).await.unwrap_or_else(|_| panic!("{what}: it stays in use"));
    }
}

/// Reads, without folding (a damaged filter need not be pure), until the stream has passed `until`; false when it has
/// failed before.
async fn until_told(live: &mut Live, until: u64, what: &str) -> bool {
    while live.connected() {
        match live.read(PATIENCE).await {
            None => panic!("{what}: no sign of life within {PATIENCE:?}"),
            Some(None) => return false,
            Some(Some(event)) => match event.name.as_str() {
                "uptodate" if event.data["seq"].as_u64().is_some_and(|reached| reached >= until) => return true,
                "plugin-error" | "failed" | "closed" => return false,
                _ => {}
            },
        }
    }
    false
}

/// Waits until there are no more instances than the neighbour's.
async fn until_given_back(db: &Client) {
    let given_back = async { while db.metric("tidegate_plugin_instances").await > INSTANCES {} };
    tokio::time::timeout(PATIENCE, given_back).await.expect("instances of plugins that are gone are given back");
}

/// Compiled code of plugins that are gone stays on disk until the next start: thousands would fill a small one.
fn clear_compiled(server: &TestServer) {
    for entry in std::fs::read_dir(server.data_dir().join("compiled")).expect("the folder is there") {
        std::fs::remove_file(entry.expect("an entry").path()).expect("nobody compiles now");
    }
}

fn samples() -> Vec<Vec<u8>> {
    let built = ["late.wasm", "local_units.wasm", "worse.wasm", "crossings.wasm", "long_haul.wat"].map(plugin);
    let others = ["long_haul_c.wasm", "long_haul_as.wasm"].into_iter().filter_map(optional_plugin);
    built.into_iter().chain(others).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn modules_of_any_kind_harm_nobody() {
    let modules = tests::amount("MODULES", 96, 12_000);
    let (seed, samples) = (tests::seed(), samples());
    let config = STORE.to_owned();
    let server = TestServer::with(Options { heartbeat_ms: 50, config, ..Options::default() }).await;
    let db = server.admin();
    let mut neighbour = Neighbour::new(&db).await;
    neighbour.goes_on().await;
    let neighbour = Mutex::new(neighbour);
    let [mut one, mut two] = [Lane::new(&db, 0, seed).await, Lane::new(&db, 1, seed).await];

    let each = (modules / 4).clamp(LANES, AT_MOST) / LANES;
    let (mut loaded, mut first) = (0, None);
    while loaded < modules {
        tokio::join!(one.run(each, &samples, &neighbour), two.run(each, &samples, &neighbour));
        loaded += each * LANES;
        until_given_back(&db).await;
        clear_compiled(&server);
        let now = Footprint::of(&server);
        eprintln!("{loaded} modules: {now:?}; {:?} {:?}", one.tally, two.tally);
        // What the first ones bring stays: threads, buffers, the allocator's reserves.
        let first = first.get_or_insert_with(|| Footprint::of(&server));
        assert!(now.is_about(first), "SEED={seed} failed: {first:?} after the first modules, now {now:?}");
    }
    let tallies = [one.tally, two.tally];
    let (taken, refused): (Vec<usize>, Vec<usize>) =
        tallies.iter().map(|tally| (tally.unfit + tally.failed + tally.ran, tally.refused)).unzip();
    let both = taken.iter().chain(&refused).all(|count| *count > 0);
    assert!(both || modules < 50, "some are taken and some are not: {tallies:?}");
}
