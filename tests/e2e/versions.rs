//! 50 changes of version while 20,000 changes flow. A feed gets each change once, in order, made by the version that it
//! was told of, also when it breaks off and resumes; a map's fold is right behind each `resync`.
//!
//! Every version of the two plugins stamps what it makes, so that each event says who made it. Some versions are
//! uploads, most are activations of earlier bytes. In each round, changes are written while both plugins change.
//!
//! The story behind the short heartbeat: what a stream does about another version is dropped half done when the
//! heartbeat comes, and taken up again. It once forgot by that that there was another version, and said neither
//! `pipeline` nor `resync`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use reqwest::Method;
use serde_json::{Value, json};
use tests::guest::Guest;
use tests::live::seq;
use tests::{Client, Event, Live, LiveQuery, Options, PATIENCE, PATIENT_WITH_PLUGINS, TestServer};
use tokio::sync::Mutex;

const SWITCHES: usize = 50;
const CHANGES: usize = 20_000;
/// All of it on a busy machine; reading goes on for ever where a change never comes.
const LONGEST: Duration = Duration::from_secs(600);
/// Key of the row that is written last.
const END: i64 = -1;

/// A transform in WebAssembly text: of each row (each change) it makes one row, of its stamp and the row's `v`.
fn stamping(kind: &str, stamp: i64) -> Vec<u8> {
    // Bytes of a descriptor, and of how many rows a change is made into; where the slots are.
    let (input, count, slots) = match kind {
        "change_transform" => (
            48,
            4,
            "(select (i32.load offset=36 (local.get $in)) (i32.load offset=20 (local.get $in)) (i32.load offset=44 (local.get $in)))",
        ),
        _ => (16, 0, "(i32.load offset=4 (local.get $in))"),
    };
    let one =
        if count > 0 { "(i32.store offset=4096 (i32.shl (local.get $i) (i32.const 2)) (i32.const 1))" } else { "" };
    let (heads, all) = (count + 16, count + 16 + 20);
    let transform = format!(
        r#"(data (i32.const 64) "\13\00\00\00\02\00\00\05stamp\03\00\00\01\00\01v\03\00\00")
  (func (export "tg_transform") (param $handle i32) (param $d i32) (param $n i32) (result i64)
    (local $i i32) (local $in i32) (local $head i32) (local $image i32)
    (loop $each
      (local.set $in (i32.add (i32.add (global.get $window) (local.get $d)) (i32.mul (local.get $i) (i32.const {input}))))
      {one}
      ;; The output begins at 4096, and offsets in it count from there.
      (local.set $head (i32.add (i32.mul (local.get $n) (i32.const {count})) (i32.mul (local.get $i) (i32.const 16))))
      (local.set $image (i32.add (i32.mul (local.get $n) (i32.const {heads})) (i32.mul (local.get $i) (i32.const 20))))
      (i32.store offset=4096 (local.get $head) (i32.add (local.get $image) (i32.const 1)))
      (i32.store offset=4100 (local.get $head) (i32.add (local.get $image) (i32.const 3)))
      (i32.store offset=4104 (local.get $head) (i32.add (local.get $image) (i32.const 20)))
      (i32.store offset=4108 (local.get $head) (i32.const 2))
      ;; One presence byte, both are present, two slots; behind them an empty heap.
      (i32.store offset=4096 (local.get $image) (i32.const 0x00020301))
      (i64.store offset=4099 (local.get $image) (i64.const {stamp}))
      (i64.store offset=4107 (local.get $image) (i64.load offset=8 (i32.add (global.get $window) {slots})))
      (i32.store8 offset=4115 (local.get $image) (i32.const 0))
      (br_if $each (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (local.get $n))))
    (i64.or (i64.const 4096) (i64.shl (i64.extend_i32_u (i32.mul (local.get $n) (i32.const {all}))) (i64.const 32))))"#
    );
    Guest {
        plugin: &format!(",\"kind\":\"{kind}\""),
        // The output schema: stamp BIGINT, v BIGINT.
        configure: "(return (i64.const 0x4000000001))",
        fields: &transform,
        ..Guest::default()
    }
    .bytes()
}

/// The versions of one plugin. Locked while another is on its way, so that whoever hears of it finds it here.
struct Versions {
    name: &'static str,
    kind: &'static str,
    /// Hash and stamp by number.
    known: BTreeMap<u64, (String, i64)>,
    stamps: i64,
}

impl Versions {
    fn new(name: &'static str, kind: &'static str) -> Versions {
        Versions { name, kind, known: BTreeMap::new(), stamps: 0 }
    }

    fn active(&self) -> i64 {
        self.known.last_key_value().expect("there is a version").1.1
    }

    async fn upload(&mut self, db: &Client) {
        self.stamps += 1;
        let answer = db.put_plugin(self.name, stamping(self.kind, self.stamps)).await;
        self.note(&answer, self.stamps);
    }

    /// Another version becomes active: a new one, or one that was active before.
    async fn switch(&mut self, db: &Client, random: &mut StdRng) {
        let active = self.active();
        let earlier: Vec<(u64, i64)> = self
            .known
            .iter()
            .map(|(number, (_, stamp))| (*number, *stamp))
            .filter(|(_, stamp)| *stamp != active)
            .collect();
        match earlier.choose(random) {
            Some((number, stamp)) if random.random_bool(0.7) => {
                let request = db.request(Method::POST, &format!("/v1/plugins/{}/rollback", self.name));
                let response =
                    request.json(&json!({"version": number})).timeout(PATIENCE).send().await.expect("an answer");
                assert_eq!(response.status(), 200);
                self.note(&response.json().await.expect("JSON"), *stamp);
            }
            _ => self.upload(db).await,
        }
    }

    fn note(&mut self, answer: &Value, stamp: i64) {
        let number = answer["version"].as_u64().expect("a number");
        let hash = answer["sha256"].as_str().expect("a hash").to_owned();
        assert!(self.known.insert(number, (hash, stamp)).is_none(), "a number that was used before: {answer}");
    }

    /// The stamp of the version that a `pipeline` event announces.
    fn announced(&self, event: &Event) -> i64 {
        let number = event.data["version"].as_u64().expect("a number");
        let (hash, stamp) = self.known.get(&number).unwrap_or_else(|| panic!("nobody made this version: {event:?}"));
        assert_eq!((&event.data["plugin"], &event.data["sha256"]), (&json!(self.name), &json!(hash)), "{event:?}");
        *stamp
    }
}

/// What one commit did to one row: `v` afterwards, or before where the row is gone.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Change {
    op: &'static str,
    id: i64,
    v: i64,
}

/// What was written. Locked while a commit is on its way, so that whoever is told of it finds it here.
#[derive(Default)]
struct History {
    rows: BTreeMap<i64, i64>,
    next: i64,
    /// By seq; the changes of each by key.
    commits: Vec<(u64, Vec<Change>)>,
}

impl History {
    /// One to three statements, and what they do together.
    fn transaction(&mut self, random: &mut StdRng) -> (String, Vec<Change>) {
        let mut before = HashMap::new();
        let mut sql = Vec::new();
        for _ in 0..random.random_range(1..=3) {
            let some = if random.random_bool(0.1) { random.random_range(65..200) } else { random.random_range(1..12) };
            let from = random.random_range(0..=self.next);
            let hit: Vec<i64> = self.rows.range(from..from + some).map(|(id, _)| *id).collect();
            sql.push(match random.random_range(0..10) {
                0..5 => {
                    let ids = self.next..self.next + some;
                    self.next += some;
                    let values = ids.map(|id| {
                        before.insert(id, None);
                        self.rows.insert(id, id * 10);
                        format!("({id}, {})", id * 10)
                    });
                    format!("INSERT INTO t VALUES {}", values.collect::<Vec<_>>().join(", "))
                }
                5..9 => {
                    for id in hit {
                        let v = self.rows[&id];
                        before.entry(id).or_insert(Some(v));
                        self.rows.insert(id, v + 1);
                    }
                    format!("UPDATE t SET v = v + 1 WHERE id >= {from} AND id < {}", from + some)
                }
                _ => {
                    for id in hit {
                        let v = self.rows.remove(&id);
                        before.entry(id).or_insert(v);
                    }
                    format!("DELETE FROM t WHERE id >= {from} AND id < {}", from + some)
                }
            });
        }
        (sql.join("; "), self.net(before))
    }

    /// By key, what differs from `before`.
    fn net(&self, before: HashMap<i64, Option<i64>>) -> Vec<Change> {
        let mut changes: Vec<Change> = before
            .into_iter()
            .filter_map(|(id, old)| match (old, self.rows.get(&id).copied()) {
                (None, Some(v)) => Some(Change { op: "insert", id, v }),
                (Some(old), Some(v)) if old != v => Some(Change { op: "update", id, v }),
                (Some(v), None) => Some(Change { op: "delete", id, v }),
                _ => None,
            })
            .collect();
        changes.sort_by_key(|change| change.id);
        changes
    }
}

/// Writes so many changes, in commits of any size.
async fn write(db: &Client, history: &Mutex<History>, random: &mut StdRng, changes: usize) {
    let mut written = 0;
    while written < changes {
        let mut history = history.lock().await;
        let (sql, changes) = history.transaction(random);
        let answer = db.sql(&sql).await;
        if !changes.is_empty() {
            written += changes.len();
            history.commits.push((seq(&answer), changes));
        }
    }
}

async fn write_end(db: &Client, history: &Mutex<History>) {
    let mut history = history.lock().await;
    let answer = db.sql(&format!("INSERT INTO t VALUES ({END}, 0)")).await;
    history.commits.push((seq(&answer), vec![Change { op: "insert", id: END, v: 0 }]));
}

/// Reads a feed to its end, each commit against the history. `hops`: it breaks off now and then, wherever it is. How
/// many versions it was told of.
async fn follow_feed(
    live: &mut Live,
    history: &Mutex<History>,
    versions: &Mutex<Versions>,
    mut hops: Option<StdRng>,
) -> usize {
    let mut told = 0;
    // Who has just connected knows the version only when it is another one than before.
    let mut announced = None;
    let (mut commits, mut commit) = (0, Vec::new());
    loop {
        let event = live.next_event().await;
        match event.name.as_str() {
            "change" => {
                let ends = event.id.is_some();
                commit.push(event);
                if ends {
                    let stamp = check_commit(&commit, &history.lock().await.commits[commits].1);
                    assert_eq!(
                        *announced.get_or_insert(stamp),
                        stamp,
                        "commit {commits}: of another version than told"
                    );
                    commits += 1;
                    if commit.iter().any(|event| event.data["key"]["id"] == END) {
                        assert_eq!(commits, history.lock().await.commits.len(), "the end is the last commit");
                        return told;
                    }
                    commit.clear();
                }
            }
            "pipeline" => {
                assert!(commit.is_empty(), "in the middle of a commit: {event:?}");
                announced = Some(versions.lock().await.announced(&event));
                told += 1;
            }
            "start" | "uptodate" => {}
            _ => panic!("{event:?}"),
        }
        if let Some(random) = &mut hops
            && random.random_bool(0.003)
        {
            // What was read of a commit that has not ended comes again.
            commit.clear();
            announced = None;
            live.reconnect().await;
        }
    }
}

/// The events of one commit, whatever their order in it, are its changes, and of one version. Its stamp.
fn check_commit(events: &[Event], changes: &[Change]) -> i64 {
    let number = |value: &Value| value.as_i64().unwrap_or_else(|| panic!("no number in {events:?}"));
    let mut told: Vec<(&str, i64, i64)> = events
        .iter()
        .map(|event| {
            let op = event.data["op"].as_str().expect("an op");
            (op, number(&event.data["key"]["id"]), number(&event.data["row"]["v"]))
        })
        .collect();
    told.sort_by_key(|(_, id, _)| *id);
    let due: Vec<(&str, i64, i64)> = changes.iter().map(|change| (change.op, change.id, change.v)).collect();
    assert_eq!(told, due, "each change of the commit, once");
    let stamps: BTreeSet<i64> = events.iter().map(|event| number(&event.data["row"]["stamp"])).collect();
    assert_eq!(stamps.len(), 1, "one commit, one version");
    stamps.into_iter().next().expect("there is one")
}

/// Reads a map to its end; at each `uptodate` its fold is every row as of that commit, made by one version. How many
/// snapshots a version has made necessary.
async fn follow_map(live: &mut Live, history: &Mutex<History>, versions: &Mutex<Versions>) -> usize {
    let (mut rows, mut commits) = (BTreeMap::new(), 0);
    loop {
        let event = live.next_event().await;
        match event.name.as_str() {
            "resync" => assert_eq!(event.data["reason"], "plugin", "{event:?}"),
            "uptodate" => {
                let reached = event.data["seq"].as_u64().expect("a seq");
                let history = history.lock().await;
                for (_, changes) in history.commits[commits..].iter().take_while(|(seq, _)| *seq <= reached) {
                    changes.iter().for_each(|change| apply(&mut rows, *change));
                    commits += 1;
                }
                let stamp = check_fold(live, &rows);
                let versions = versions.lock().await;
                assert!(stamp.is_none_or(|stamp| versions.known.values().any(|(_, known)| *known == stamp)));
                // All versions were active before the end was written.
                if rows.contains_key(&END) && stamp == Some(versions.active()) {
                    return live.fold.resyncs;
                }
            }
            "start" | "insert" | "update" | "delete" => {}
            _ => panic!("{event:?}"),
        }
    }
}

fn apply(rows: &mut BTreeMap<i64, i64>, change: Change) {
    if change.op == "delete" {
        rows.remove(&change.id);
    } else {
        rows.insert(change.id, change.v);
    }
}

/// The stamp of the fold, which has to be these rows; none where there are none.
fn check_fold(live: &Live, rows: &BTreeMap<i64, i64>) -> Option<i64> {
    let held = &live.fold.rows;
    assert_eq!(held.len(), rows.len(), "rows in the fold, and rows there are");
    for (id, v) in rows {
        let row = held.get(&format!("{{\"id\":{id}}}")).unwrap_or_else(|| panic!("row {id} is missing"));
        assert_eq!(row["v"], *v, "row {id}: {row}");
    }
    let stamps: BTreeSet<i64> = held.values().filter_map(|row| row["stamp"].as_i64()).collect();
    assert!(stamps.len() <= 1, "rows of several versions: {stamps:?}");
    stamps.into_iter().next()
}

/// A long run found it: bytes that come back under another number were told as `pipeline`, which is a word for feeds.
#[tokio::test]
async fn a_map_is_not_told_that_its_bytes_have_another_number() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY, v BIGINT NOT NULL)").await;
    let mut map = Versions::new("map", "row_transform");
    map.upload(&db).await;
    let (first, (hash, stamp)) = map.known.first_key_value().map(|(number, known)| (*number, known.clone())).unwrap();
    let mut live = db.live(LiveQuery::new("SELECT * FROM t").plugin(&format!("map@sha256:{hash}"))).await;
    live.until_uptodate().await;
    map.upload(&db).await;
    let request = db.request(Method::POST, "/v1/plugins/map/rollback").json(&json!({"version": first}));
    assert_eq!(request.send().await.expect("an answer").status(), 200);
    db.sql("INSERT INTO t VALUES (1, 10)").await;
    let event = live.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["row"]["stamp"]), ("insert", &json!(stamp)), "{event:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_change_while_changes_flow() {
    for seed in tests::seeds(1) {
        let run = tokio::time::timeout(LONGEST, run(StdRng::seed_from_u64(seed)));
        tests::seeded(seed, async { run.await.expect("at its end in time") }).await;
    }
}

async fn run(mut random: StdRng) {
    let config = PATIENT_WITH_PLUGINS.to_owned();
    let server = TestServer::with(Options { heartbeat_ms: 50, config, ..Options::default() }).await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY, v BIGINT NOT NULL)").await;
    let [feed, map] =
        [("feed", "change_transform"), ("map", "row_transform")].map(|(name, kind)| Versions::new(name, kind));
    let (feed, map) = (Mutex::new(feed), Mutex::new(map));
    feed.lock().await.upload(&db).await;
    map.lock().await.upload(&db).await;

    let feeds = || LiveQuery::new("SELECT * FROM t").plugin("feed");
    let (mut staying, mut hopping) = (db.live(feeds()).await, db.live(feeds()).await);
    let mut mapped = db.live(LiveQuery::new("SELECT * FROM t").plugin("map")).await;
    for live in [&mut staying, &mut hopping, &mut mapped] {
        live.until_uptodate().await;
    }

    let history = Mutex::new(History::default());
    let hops = StdRng::seed_from_u64(random.random());
    let mut chooser = StdRng::seed_from_u64(random.random());
    let rounds = async {
        for _ in 0..SWITCHES {
            let switch = async {
                feed.lock().await.switch(&db, &mut chooser).await;
                map.lock().await.switch(&db, &mut chooser).await;
            };
            tokio::join!(write(&db, &history, &mut random, CHANGES / SWITCHES), switch);
        }
        write_end(&db, &history).await;
    };
    let ((), told, told_hopping, resyncs) = tokio::join!(
        rounds,
        follow_feed(&mut staying, &history, &feed, None),
        follow_feed(&mut hopping, &history, &feed, Some(hops)),
        follow_map(&mut mapped, &history, &map),
    );
    let changes: usize = history.lock().await.commits.iter().map(|(_, changes)| changes.len()).sum();
    eprintln!("{changes} changes; versions told {told} and {told_hopping} times, {resyncs} resyncs");
    assert!(changes > CHANGES, "{changes} changes");
    assert!(told > SWITCHES / 10 && resyncs > SWITCHES / 10, "versions changed while they were read");
    assert_eq!((staying.fold.resyncs, hopping.fold.resyncs), (0, 0), "a feed never starts afresh");
}
