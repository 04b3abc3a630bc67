//! One predicate in five ways over many changes: SQL, a Rust row filter, and the samples in WAT, C and AssemblyScript
//! where their compilers are. All streams have to tell the same events in the same order, and the ids on the same ones.
//!
//! The changes are made of the example's flights, again and again under new keys: inserts and updates of delays in
//! bulk, transactions of several statements, deletes. 20,000 of them, a million in `make torture`; `CHANGES=…` asks for
//! another number. The streams are read in step, one event of each at a time: nothing is kept but two rounds' flights.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use reqwest::Method;
use reqwest::header::CONTENT_TYPE;
use serde_json::Value;
use tests::{
    Client, Event, Live, LiveQuery, Options, PATIENCE, PATIENT_WITH_PLUGINS, TestServer, optional_plugin, plugin,
};

use crate::command_line::{said, tidegate};

const FILES: [&str; 2] =
    [include_str!("../../examples/flights/data/week.csv"), include_str!("../../examples/flights/data/day.csv")];

const TABLE: &str = "CREATE TABLE flights (id BIGINT PRIMARY KEY, carrier TEXT, flight INT, origin TEXT, dest TEXT, \
                     dep_delay INT, distance INT)";
const COLUMNS: &str = "id, carrier, flight, dep_delay";

/// Keys of one round: more than there are flights, and some for rows of its own.
const ROUND: i64 = 10_000;
/// From here on, in a round's keys, for INSERTs by SQL.
const OWN: i64 = 8_000;
const TRANSACTIONS: i64 = 40;

/// Another manifest makes the same filter of another column: a guest knows columns by what the host tells it.
const MANIFEST: &str = r#"{"plugin":{"abi":1,"kind":"row_filter"}}
{"param":{"name":"minutes","type":"int","default":"1000"}}
{"column":{"name":"dep_delay","type":"int"}}
"#;

/// A flight as the fields of a line, without its id: carrier, flight, origin, dest, dep_delay, distance.
type Flight = [&'static str; 6];

fn flights() -> Vec<Flight> {
    let lines = FILES.iter().flat_map(|file| file.lines().skip(1));
    lines
        .map(|line| {
            let field: Vec<&str> = line.split(',').collect();
            [field[1], field[2], field[4], field[5], field[7], field[10]]
        })
        .collect()
}

/// Writes rounds of changes and counts them.
struct Writer {
    db: Client,
    random: StdRng,
    flights: Vec<Flight>,
    round: i64,
    changes: usize,
}

impl Writer {
    fn new(db: Client, random: StdRng) -> Writer {
        Writer { db, random, flights: flights(), round: 0, changes: 0 }
    }

    /// The key of the row that ends the round: no other row has it, and every stream tells of it.
    fn end(&self) -> i64 {
        -1 - self.round
    }

    async fn write_round(&mut self) {
        self.insert_flights().await;
        self.update_delays().await;
        for transaction in 0..TRANSACTIONS {
            let sql = self.transaction(transaction);
            self.sql(&sql).await;
        }
        // The round before, and its end.
        self.sql(&format!("DELETE FROM flights WHERE id < {}", self.round * ROUND)).await;
        self.sql(&format!("INSERT INTO flights (id, dep_delay) VALUES ({}, 99)", self.end())).await;
        self.round += 1;
    }

    /// The end of a piece of the flights from `at` on: commits of every size, so that some have several batches and
    /// some not a full one.
    fn cut(&mut self, at: usize) -> usize {
        (at + self.random.random_range(1..1_500)).min(self.flights.len())
    }

    async fn insert_flights(&mut self) {
        let base = self.round * ROUND;
        let mut at = 0;
        while at < self.flights.len() {
            let next = self.cut(at);
            let mut body = "id,carrier,flight,origin,dest,dep_delay,distance\n".to_owned();
            for i in at..next {
                body.push_str(&format!("{},{}\n", base + i as i64, self.flights[i].join(",")));
            }
            self.bulk("", body).await;
            at = next;
        }
    }

    /// Delays as they become known: most later, some earlier, some taken back.
    async fn update_delays(&mut self) {
        let base = self.round * ROUND;
        let mut at = 0;
        while at < self.flights.len() {
            let next = self.cut(at);
            let mut body = "id,dep_delay\n".to_owned();
            for i in at..next {
                let known: i64 = self.flights[i][4].parse().unwrap_or(0);
                match self.random.random_range(0..20) {
                    0..8 => {}
                    8 => body.push_str(&format!("{},\n", base + i as i64)),
                    _ => body.push_str(&format!("{},{}\n", base + i as i64, known + self.random.random_range(-30..60))),
                }
            }
            self.bulk("?on_conflict=update", body).await;
            at = next;
        }
    }

    /// Over the limit and back, exactly to it, to NULL, away, and new rows: several statements, one commit.
    fn transaction(&mut self, number: i64) -> String {
        let base = self.round * ROUND;
        let mut id = || base + self.random.random_range(0..7_000);
        let (from, exact, unknown, gone) = (id(), id(), id(), id());
        let by = self.random.random_range(-20..20);
        let own: Vec<String> = (0..10)
            .map(|i| {
                let delay = self.random.random_range(10..20);
                format!("({}, 'XX', {i}, 'JFK', 'BOS', {delay}, 187)", base + OWN + number * 10 + i)
            })
            .collect();
        format!(
            "UPDATE flights SET dep_delay = dep_delay + {by} WHERE id >= {from} AND id < {from} + 60; \
             UPDATE flights SET dep_delay = 15 WHERE id = {exact}; \
             UPDATE flights SET dep_delay = NULL WHERE id = {unknown}; \
             DELETE FROM flights WHERE id = {gone}; \
             INSERT INTO flights VALUES {}",
            own.join(", ")
        )
    }

    async fn sql(&mut self, sql: &str) {
        let answer = self.db.sql(sql).await;
        let results = answer["results"].as_array().expect("a result for each statement");
        let affected = results.iter().filter_map(|result| result["affected"].as_u64());
        self.changes += affected.sum::<u64>() as usize;
    }

    async fn bulk(&mut self, options: &str, body: String) {
        let path = format!("/v1/tables/main/flights/rows{options}");
        let request = self.db.request(Method::POST, &path).header(CONTENT_TYPE, "text/csv").body(body);
        let response = request.timeout(PATIENCE).send().await.expect("an answer");
        let (status, text) = (response.status(), response.text().await.expect("a body"));
        assert_eq!(status, 200, "{text}");
        let answer: Value = serde_json::from_str(&text).expect("JSON");
        self.changes += answer["affected"].as_u64().expect("how many rows were changed") as usize;
    }
}

/// One way to ask, and what its stream has told.
struct Way {
    name: &'static str,
    live: Live,
    hash: DefaultHasher,
}

impl Way {
    async fn open(db: &Client, name: &'static str, query: LiveQuery) -> Way {
        let mut live = db.live(query).await;
        assert_eq!(live.until_uptodate().await.len(), 1, "there are no rows yet, only the start");
        Way { name, live, hash: DefaultHasher::new() }
    }

    /// The next event, and all of it that does not belong to this stream alone.
    async fn next(&mut self) -> (Event, String) {
        let event = self.live.next_change().await;
        let ends = if event.id.is_some() { "; its commit ends" } else { "" };
        let told = format!("{} {}{ends}", event.name, event.data);
        told.hash(&mut self.hash);
        (event, told)
    }
}

/// Reads the ways in step up to the row of key `end`; how many events that were, or what differed first.
async fn in_step(ways: &mut [Way], end: i64) -> Result<usize, String> {
    let (first, others) = ways.split_first_mut().expect("there are ways");
    let mut read = 0;
    loop {
        let (event, told) = first.next().await;
        read += 1;
        for other in &mut *others {
            let (_, also) = other.next().await;
            if also != told {
                let (one, two) = (first.name, other.name);
                return Err(format!("event {read} before the row {end}:\n{one}: {told}\n{two}: {also}"));
            }
        }
        if event.name == "insert" && event.data["key"]["id"] == end {
            return Ok(read);
        }
    }
}

/// Uploads the sample in each language; the names of those that are here.
async fn samples(server: &TestServer, db: &Client) -> Vec<&'static str> {
    db.put_plugin("late", plugin("late.wasm")).await;
    let text = String::from_utf8(plugin("long_haul.wat")).expect("WAT is text");
    let text = text.replace(r#"\"name\":\"distance\""#, r#"\"name\":\"dep_delay\""#);
    db.put_plugin("wat", text.replace(r#"\"name\":\"miles\""#, r#"\"name\":\"minutes\""#).into_bytes()).await;
    let mut names = vec!["late", "wat"];
    let folder = tempfile::tempdir().expect("a temporary directory");
    for (name, file) in [("c", "long_haul_c.wasm"), ("assemblyscript", "long_haul_as.wasm")] {
        let Some(module) = optional_plugin(file) else { continue };
        db.put_plugin(name, with_manifest(server, folder.path(), &module)).await;
        names.push(name);
    }
    names
}

fn with_manifest(server: &TestServer, folder: &Path, module: &[u8]) -> Vec<u8> {
    std::fs::write(folder.join("sample.wasm"), module).expect("the module is written");
    std::fs::write(folder.join("manifest.jsonl"), MANIFEST).expect("the manifest is written");
    said(tidegate(server, folder, &["plugin", "attach", "sample.wasm", "--manifest", "manifest.jsonl"]));
    std::fs::read(folder.join("sample.wasm")).expect("the module is there")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_predicate_gives_one_stream_over_many_changes() {
    let due = tests::amount("CHANGES", 20_000, 1_000_000);
    let seed = tests::seed();
    let config = PATIENT_WITH_PLUGINS.to_owned();
    let server = TestServer::with(Options { config, ..Options::default() }).await;
    let db = server.admin();
    db.sql(TABLE).await;
    let sql = format!("SELECT {COLUMNS} FROM flights WHERE dep_delay >= 15");
    let mut ways = vec![Way::open(&db, "SQL", LiveQuery::new(&sql)).await];
    for name in samples(&server, &db).await {
        let query = LiveQuery::new(format!("SELECT {COLUMNS} FROM flights"));
        ways.push(Way::open(&db, name, query.plugin(&format!("{name}:{{\"minutes\":15}}"))).await);
    }

    let mut writer = Writer::new(db.clone(), StdRng::seed_from_u64(seed));
    let mut events = 0;
    while writer.changes < due {
        let end = writer.end();
        let ((), told) = tokio::join!(writer.write_round(), in_step(&mut ways, end));
        events += told.unwrap_or_else(|difference| panic!("SEED={seed} failed: {difference}"));
    }
    let hashes: Vec<u64> = ways.iter().map(|way| way.hash.finish()).collect();
    eprintln!("{} changes, {events} events of {} ways, hash {:016x}", writer.changes, ways.len(), hashes[0]);
    assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:x?}");
    assert!(events > writer.changes / 10, "{events} events of {} changes", writer.changes);
    assert_eq!(db.metric("tidegate_plugin_failures_total").await, 0.0);
    // And it is the right stream.
    let rows = db.objects(&sql).await;
    assert!(rows.len() > 100, "{} rows", rows.len());
    for way in &ways {
        let held = &way.live.fold.rows;
        assert_eq!((held.len(), way.live.fold.resyncs), (rows.len(), 0), "{}", way.name);
        assert!(rows.iter().all(|row| held.get(&format!("{{\"id\":{}}}", row["id"])) == Some(row)), "{}", way.name);
    }
}

/// A filter that is off by one minute is found, and the event by which.
#[tokio::test]
async fn a_predicate_that_differs_is_noticed() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql(TABLE).await;
    db.put_plugin("late", plugin("late.wasm")).await;
    let sql = format!("SELECT {COLUMNS} FROM flights");
    let mut ways = Vec::new();
    for (name, minutes) in [("as it is", 15), ("off by one", 16)] {
        let query = LiveQuery::new(&sql).plugin(&format!("late:{{\"minutes\":{minutes}}}"));
        ways.push(Way::open(&db, name, query).await);
    }
    for (id, delay) in [(1, 16), (2, 15), (-1, 99)] {
        db.sql(&format!("INSERT INTO flights (id, dep_delay) VALUES ({id}, {delay})")).await;
    }
    let difference = in_step(&mut ways, -1).await.expect_err("row 2 is in one of them");
    assert!(difference.starts_with("event 2 ") && difference.contains(r#""dep_delay":15"#), "{difference}");
}
