//! What a subscription holds. The ancestor's: a struct with the strings it was asked with, its filter as an
//! expression, and a channel, in a map; since its fix without the query's text and the counter. Ours: a cursor into a
//! group, and the group once.
//!
//! Counted by the allocator is all of it, the structs themselves included. A connection's own part is counted with whole
//! streams alone: its request, its place in the list of open streams, and the timer by which it says that it is quiet,
//! which a subscription borrows while it waits. The socket and what HTTP holds of it are counted nowhere here.

use std::collections::HashMap;
use std::sync::Arc;

use datafusion::logical_expr::Expr;
use datafusion::prelude::{col, lit};
use host::config::{Config, Role};
use host::db::{Db, Identity, LiveStream};
use host::http::sse::Events;
use host::live::{self, Subscription};
use host::telemetry::Metrics;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use crate::measure::{Table, held_by};
use crate::ours::{live_request, sql_request};
use crate::world::World;

const COUNTS: [usize; 2] = [10_000, 100_000];
/// Of those that take a compilation each.
const COMPILED: usize = 10_000;
const USERS: usize = 1_000;
const CREATE: &str = "CREATE TABLE readings (id BIGINT PRIMARY KEY, room TEXT, heat DOUBLE)";

pub fn run() {
    let mut table = Table::new("subscriptions: bytes each, everything counted", &["10,000 of them", "100,000 of them"]);
    let each = |bytes: usize, count: usize| format!("{:.1}", bytes as f64 / count as f64);
    let theirs = |text: Option<&str>| COUNTS.map(|count| each(ancestors(text, count), count));
    table.row("the ancestor's: text, filter, counter, channel", theirs(Some(query(7).as_str())));
    table.row("the ancestor's, after its fix: filter, channel", theirs(None));
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path());
    world.write(CREATE);
    table.row("ours, all with one query", COUNTS.map(|count| each(of_one_query(&world, count), count)));
    table.row("ours, each with a query of its own", [each(of_own_queries(&world), COMPILED)]);
    world.store.close();
    table.row("ours, a whole stream: with its request, compiled", [each(streams(), COMPILED)]);
    table.print(&["500 B a subscription, 50 B after its fix"]);
    println!("  A cursor alone, as a struct: {} B (Subscription)", size_of::<Subscription>());
}

fn query(room: usize) -> String {
    format!("SELECT id, room, heat FROM readings WHERE room = 'room {room}' AND heat > 20.5")
}

/// What the ancestor keeps of one subscription.
#[allow(dead_code, reason = "kept for the memory it takes")]
struct LiveQuery {
    live_id: String,
    connection: String,
    user: String,
    table: String,
    text: Option<String>,
    filter: Expr,
    changes: u64,
    sender: mpsc::UnboundedSender<HashMap<String, Value>>,
}

fn ancestors(text: Option<&str>, count: usize) -> usize {
    let filter = col("room").eq(lit("room 7")).and(col("heat").gt(lit(20.5)));
    // Its connections hold the other ends.
    let make = || {
        let (mut queries, mut receivers) = (HashMap::new(), Vec::new());
        for number in 0..count {
            let (sender, receiver) = mpsc::unbounded_channel();
            let live_id = format!("user {}-connection {number}-readings-{number}", number % USERS);
            let query = LiveQuery {
                live_id: live_id.clone(),
                connection: format!("connection {number}"),
                user: format!("user {}", number % USERS),
                table: "readings".to_owned(),
                text: text.map(str::to_owned),
                filter: filter.clone(),
                changes: 0,
                sender,
            };
            queries.insert(live_id, query);
            receivers.push(receiver);
        }
        (queries, receivers)
    };
    let (kept, bytes) = held_by(make);
    assert_eq!((kept.0.len(), kept.1.len()), (count, count));
    bytes
}

fn of_one_query(world: &World, count: usize) -> usize {
    let side = world.live();
    let spec = world.spec(&query(7), "admin");
    let subscribe = || world.runtime.block_on(side.subscribe(spec.clone(), live::From::Now)).unwrap();
    let first = subscribe();
    let (open, bytes) = held_by(|| (0..count).map(|_| subscribe()).collect::<Vec<Subscription>>());
    drop((open, first));
    side.close();
    bytes
}

fn of_own_queries(world: &World) -> usize {
    let side = world.live();
    let subscribe = |number: usize| {
        let spec = world.spec(&query(number), "admin");
        world.runtime.block_on(side.subscribe(spec, live::From::Now)).unwrap()
    };
    let first = subscribe(COMPILED);
    let (open, bytes) = held_by(|| (0..COMPILED).map(subscribe).collect::<Vec<Subscription>>());
    drop((open, first));
    side.close();
    bytes
}

/// As `http` holds them: the request (it is compiled again after a change of the schema), who asked, and the cursor.
fn streams() -> usize {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::new(dir.path());
    let runtime = Runtime::new().unwrap();
    let _entered = runtime.enter();
    let db = Db::open(&config, Arc::new(Events), Arc::new(Metrics::default())).unwrap();
    let admin = Identity { user: "admin".into(), role: Role::Admin, address: None };
    runtime.block_on(db.execute(&admin, sql_request(CREATE, Vec::new()))).unwrap();
    let users: Vec<Identity> = (0..USERS)
        .map(|number| Identity { user: format!("user {number}").into(), role: Role::User, address: None })
        .collect();
    // Changes from now on, and no present rows.
    let request = || live_request(query(7), Some(false));
    let open = |number: usize| runtime.block_on(db.subscribe(&users[number % USERS], request())).unwrap();
    let first = open(0);
    let (streams, bytes) = held_by(|| (0..COMPILED).map(open).collect::<Vec<LiveStream>>());
    drop((streams, first));
    db.close();
    bytes
}
