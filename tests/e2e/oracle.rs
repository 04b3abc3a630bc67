//! The oracle: folding the events by key gives exactly `pipeline(SELECT)` at every id.
//!
//! Random tables, predicates, projections and multi-statement transactions; subscribers that come late, break off and
//! resume; servers that stop and are killed. One writer does one transaction at a time and notes what the same SELECT
//! answers right after it. A subscriber's fold has to be, at each id, the next of these answers that differs from the
//! one before: none skipped (a hole), none twice, none in between (a commit torn apart).
//!
//! Seeds are fixed unless `SEED=random` asks for new ones. A failure prints its seed; `SEED=… sh tests/run.sh oracle`
//! repeats the run. `MINUTES=… sh tests/torture.sh` goes on with new ones for so long.

mod follower;
mod random;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tests::live::seq;
use tests::{Client, Options, TestServer, plugin};

use follower::{Follower, Item, Query, Rules, replay};
use random::{Table, Transactions};

const TRANSACTIONS: usize = 60;

/// What a run is made of.
struct Plan {
    table: Table,
    queries: Vec<Query>,
    /// Whose rows: other users write as well where the table is a user table.
    user: &'static str,
}

#[tokio::test]
async fn folded_events_are_the_select_at_every_id() {
    for seed in tests::seeds(4) {
        run_seeded(seed, plain_plan).await;
    }
}

#[tokio::test]
async fn folded_events_are_the_pipeline_of_the_select_at_every_id() {
    for seed in tests::seeds(2) {
        run_seeded(seed, piped_plan).await;
    }
}

/// A random table, user's or shared, with random predicates and projections.
fn plain_plan(random: &mut StdRng) -> Plan {
    let user_table = random.random_bool(0.3);
    let table = Table::random(random, user_table);
    let mut queries: Vec<Query> = (0..2)
        .map(|_| {
            let old = *["changed", "full", "none"].choose(random).expect("there are ways");
            Query::plain(table.live_query(random)).old(old)
        })
        .collect();
    for _ in 0..2 {
        let (sql, key) = table.whole_query(random);
        // Over a stream table it is refused: rows expire without a commit.
        if !table.stream {
            queries.push(Query::whole(sql, key));
        }
    }
    Plan { table, queries, user: if user_table { "alice" } else { "admin" } }
}

/// A table that the sample plugins fit, through a filter, a transform, and both.
fn piped_plan(random: &mut StdRng) -> Plan {
    let table = Table::flights(random);
    let minutes = random.random_range(0..60);
    let late = format!("late:{}", json!({"minutes": minutes}));
    let units = format!("local_units:{}", json!({"late_from": 10, "very_late_from": 40}));
    let keep = Box::new(move |row: &Value| delay(row).is_some_and(|delay| delay >= f64::from(minutes)));
    let all = "SELECT * FROM t".to_owned();
    let some = format!("SELECT * FROM t WHERE {}", table.predicate(random));
    let mut queries = vec![
        Query::plain(all.clone()).filtered(&late, keep.clone()),
        Query::plain(some).transformed(&units, Box::new(local_units)),
        Query::plain(all).filtered(&late, keep.clone()).transformed(&units, Box::new(local_units)),
    ];
    // Results that are run again go through plugins as well. Over a stream table they are refused.
    if !table.stream {
        let (limit, few) = (random.random_range(1..8), random.random_range(1..4));
        let first = format!("SELECT * FROM t WHERE {} ORDER BY id LIMIT {limit}", table.predicate(random));
        let first = Query::whole(first, vec!["id".to_owned()]);
        queries.push(first.filtered(&late, keep).transformed(&units, Box::new(local_units)));
        let carrier = || vec!["carrier".to_owned()];
        let counts = "SELECT carrier, count(*) AS dep_delay FROM t GROUP BY carrier".to_owned();
        let many = Box::new(move |row: &Value| delay(row).is_some_and(|count| count >= f64::from(few)));
        queries.push(Query::whole(counts, carrier()).filtered(&format!("late:{{\"minutes\":{few}}}"), many));
        let sums = "SELECT carrier, count(*) AS flight, min(origin) AS origin, max(dest) AS dest, \
                    sum(distance) AS distance, count(dep_delay) AS dep_delay FROM t GROUP BY carrier";
        queries.push(Query::whole(sums.to_owned(), carrier()).transformed(&units, Box::new(local_units)));
    }
    Plan { table, queries, user: "admin" }
}

/// A DECIMAL is a string.
pub fn delay(row: &Value) -> Option<f64> {
    let delay = &row["dep_delay"];
    delay.as_f64().or_else(|| delay.as_str()?.parse().ok())
}

/// The transform, natively, with its parameters as they are here.
pub fn local_units(row: &Value) -> Value {
    let delay = delay(row);
    let class = match delay {
        None => "unknown",
        Some(delay) if delay >= 40.0 => "very late",
        Some(delay) if delay >= 10.0 => "late",
        Some(_) => "on time",
    };
    let km = row["distance"].as_f64().map(|miles| (miles * 1.609_344 * 10.0).round() / 10.0);
    json!({
        "carrier": row["carrier"], "flight": row["flight"], "origin": row["origin"], "dest": row["dest"],
        "km": km, "delay_class": class, "dep_delay_minutes": delay,
    })
}

async fn run_seeded(seed: u64, plan: fn(&mut StdRng) -> Plan) {
    let mut random = StdRng::seed_from_u64(seed);
    let plan = plan(&mut random);
    tests::seeded(seed, run(&mut random, plan)).await;
}

async fn run(random: &mut StdRng, plan: Plan) {
    let live = "requery_interval_ms = 10".to_owned();
    let mut server = TestServer::with(Options { live, ..Options::default() }).await;
    let admin = server.admin();
    for name in ["late", "local_units"] {
        admin.put_plugin(name, plugin(&format!("{name}.wasm"))).await;
    }
    admin.sql(&plan.table.create()).await;
    let db = server.client(plan.user);
    let mut transactions = Transactions::new(&plan.table);
    let mut followers: Vec<Follower> = Vec::new();
    for query in plan.queries {
        followers.push(Follower::new(query, db.clone(), &plan.table));
    }

    for step in 0..TRANSACTIONS {
        let sql = transactions.next(random, &db).await;
        let answer = db.try_sql(&sql, json!([])).await;
        let answer = answer.unwrap_or_else(|failure| panic!("step {step}: {failure:?}\n{sql}"));
        if plan.table.user_table {
            disturb(random, &server.client("bob"), &plan.table).await;
        }
        for follower in &mut followers {
            follower.committed(seq(&answer)).await;
            follower.move_on(random).await;
        }
        match random.random_range(0..60) {
            0 => {
                server.kill9();
                server.restart().await;
                followers.iter_mut().for_each(Follower::lost);
            }
            1 => {
                assert!(server.sigterm().await.success());
                server.restart().await;
                followers.iter_mut().for_each(Follower::lost);
            }
            _ => {}
        }
    }
    for follower in &mut followers {
        follower.finish().await;
        eprintln!("{}", follower.summary());
        controls(follower.history(), follower.rules());
    }
}

/// Another user writes into the same user table: nothing of it may show.
async fn disturb(random: &mut StdRng, other: &Client, table: &Table) {
    let key = random.random_range(0..1_000_000);
    // A key of the disturber's own that may be there already: then the statement is refused, which is as good.
    let _ = other.try_sql(&table.insert_anything(random, key), json!([])).await;
}

/// The same history with one thing wrong has to be refused; each control applies where the history has such an event.
fn controls(history: &[Item], rules: Rules) {
    replay(history, rules).expect("the history itself is right");
    let refused = |history: &[Item], what: &str| {
        assert!(replay(history, rules).is_err(), "{what} was not noticed in {history:#?}");
    };
    // A fresh start makes good what was wrong before it. (One that broke off before it said `resync` shows as another
    // subscription without a position.)
    let is_fresh = |item: &Item| match item {
        Item::Subscribed => true,
        Item::Event(event) => event.name == "resync",
        _ => false,
    };
    let from = history.iter().rposition(is_fresh).unwrap_or_default();
    let last_of_commit =
        |item: &Item| matches!(item, Item::Event(event) if event.id.is_some() && event.name != "uptodate");
    let moved_out = |item: &Item| matches!(item, Item::Event(event) if event.data["reason"] == "moved_out");
    let first = |from: usize, wanted: &dyn Fn(&Item) -> bool| {
        history.iter().enumerate().skip(from).find(|(_, item)| wanted(item)).map(|(at, _)| at)
    };
    if let Some(at) = first(from, &|item| last_of_commit(item) && moved_out(item)) {
        let mut dropped = history.to_vec();
        dropped.remove(at);
        refused(&dropped, "a dropped moved_out");
    }
    if let Some(at) = first(from, &last_of_commit) {
        let mut doubled = history.to_vec();
        doubled.insert(at, history[at].clone());
        refused(&doubled, "a doubled event");

        // Every event before its commit.
        if !history[..from].iter().any(|item| matches!(item, Item::Event(_))) {
            let (commits, others): (Vec<Item>, Vec<Item>) =
                history.iter().cloned().partition(|item| matches!(item, Item::Committed(..)));
            refused(&[others, commits].concat(), "events before their commits");
        }
    }
    // A row of a stream table that nobody would know when to drop.
    let row = |item: &Item| matches!(item, Item::Event(event) if event.data.get("expires").is_some());
    if rules.expiring
        && let Some(at) = first(from, &row)
    {
        let mut lost = history.to_vec();
        if let Item::Event(event) = &mut lost[at] {
            event.data.as_object_mut().expect("data is an object").remove("expires");
        }
        refused(&lost, "a lost expiry");
    }
    // The id on an event before the last of its commit: who breaks off there would resume past the rest.
    let mid_commit = |at: usize| match (&history[at], history.get(at + 1)) {
        (Item::Event(one), Some(next @ Item::Event(_))) => {
            one.id.is_none() && one.data.get("key").is_some() && one.data["snapshot"] != true && last_of_commit(next)
        }
        _ => false,
    };
    if let Some(at) = (from..history.len()).find(|at| mid_commit(*at)) {
        let mut early = history.to_vec();
        if let [Item::Event(one), Item::Event(last)] = &mut early[at..at + 2] {
            one.id = last.id.take();
        }
        refused(&early, "an id in mid-commit");
    }
    // Two commits in the wrong order; of one result there is nothing to swap.
    let ends: Vec<usize> = (from..history.len()).filter(|at| last_of_commit(&history[*at])).collect();
    if let Some(pair) = ends.windows(2).find(|pair| pair[0] + 1 == pair[1]) {
        let mut swapped = history.to_vec();
        swapped.swap(pair[0], pair[1]);
        refused(&swapped, "a swapped order");
    }
}
