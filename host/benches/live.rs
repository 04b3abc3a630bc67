//! What a change costs the live side as live queries become many, at an equal number of matches; and what a
//! subscription and a group cost in memory.
//!
//! ```text
//! cargo bench --profile dev --workspace --bench live
//! ```
//!
//! `--profile dev` and `--workspace` take the crates that are compiled already. `MOST=10000` makes it shorter.
//!
//! A commit has ten rows, each of which one query matches. Measured is the time from handing the commit to the live side
//! until those ten subscribers have their events: matching, evaluating, encoding and waking up.

#[path = "common/world.rs"]
mod world;

use std::alloc::{GlobalAlloc, Layout, System};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use futures::future::join_all;
use host::catalog::Table;
use host::live::{From, GroupSpec, Subscription};
use host::store::{Commit, Seq};
use wire::frame::ChangeMeta;
use wire::{FrameBuilder, ImageBuilder, Scope, Value};

use world::World;

/// Counts the bytes that are allocated now.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came; only a number is kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const SIZES: [usize; 4] = [100, 1_000, 10_000, 100_000];
const MATCHES: usize = 10;
/// Commits measured of each size, after as many that are not.
const COMMITS: u64 = 200;
/// Live queries opened together.
const AT_ONCE: usize = 1_000;
/// What 100,000 may cost, of what 100 cost.
const LIMIT: f64 = 1.5;
/// Bytes that a subscription may hold.
const SUBSCRIPTION_LIMIT: f64 = 50.0;

/// One kind of live query: the text and the user of number `n`, and the row that it matches.
struct Kind {
    name: &'static str,
    table: &'static str,
    query: fn(usize) -> (String, String),
    row: fn(usize) -> (String, f64),
}

fn admin(text: String) -> (String, String) {
    (text, "admin".to_owned())
}

const KINDS: [Kind; 4] = [
    Kind {
        name: "equality",
        table: "t",
        query: |n| admin(format!("SELECT id, room FROM t WHERE room = 'r{n}'")),
        row: |n| (format!("r{n}"), -1.0),
    },
    Kind {
        name: "range",
        table: "t",
        query: |n| admin(format!("SELECT id, heat FROM t WHERE heat BETWEEN {n} AND {n}.5")),
        row: |n| (String::new(), n as f64 + 0.25),
    },
    Kind {
        name: "mixed",
        table: "t",
        query: |n| {
            admin(match n % 4 {
                0 => format!("SELECT id FROM t WHERE room = 'r{n}' AND heat > 0"),
                1 => format!("SELECT id FROM t WHERE room IN ('r{n}', 'q{n}') OR heat < -1000000"),
                2 => format!("SELECT id FROM t WHERE room LIKE 'r{n}-%' AND heat IS NOT NULL"),
                _ => format!("SELECT id FROM t WHERE heat >= {n} AND heat < {n}.5 AND room <> 'x'"),
            })
        },
        row: |n| match n % 4 {
            2 => (format!("r{n}-x"), 0.75),
            3 => (String::new(), n as f64 + 0.25),
            _ => (format!("r{n}"), 0.75),
        },
    },
    Kind {
        name: "user scope",
        table: "u",
        query: |n| ("SELECT id, room FROM u WHERE heat > 0".to_owned(), format!("user {n}")),
        row: |_| ("room".to_owned(), 1.0),
    },
];

/// A commit of ten rows, each for one of the first ten queries.
fn commit(kind: &Kind, table: &Table, seq: u64) -> Arc<Commit> {
    let mut frame = FrameBuilder::new(table.namespace.0, [0; 16], 0);
    let kinds = table.kinds();
    for n in 0..MATCHES {
        let (room, heat) = (kind.row)(n);
        let mut image = ImageBuilder::new(table.slots());
        image.set_int(0, (seq * 100 + n as u64) as i64);
        image.set(1, &Value::Text(room));
        image.set_float(2, heat);
        let scope = match kind.table {
            "u" => Scope::User(format!("user {n}")),
            _ => Scope::Shared,
        };
        let meta = ChangeMeta { table: table.id.0, schema_version: table.schema_version, kinds: &kinds };
        frame.change(&scope, meta, None, Some(&image.finish())).unwrap();
    }
    let frame = frame.finish().unwrap().into();
    Arc::new(Commit { seq: Seq(seq), namespace: table.namespace, frame, tables: vec![table.id], catalog: None })
}

/// Live queries of one kind, by their numbers. Compiling them is most of what this bench does, so every core does its part.
fn specs(world: &World, kind: &Kind, numbers: Range<usize>) -> Vec<Arc<GroupSpec>> {
    if kind.table == "u" {
        // As the server has it: one query over a user's own rows is one plan for all users.
        let (text, user) = (kind.query)(numbers.start);
        let theirs = world.spec(&text, &user);
        let of_user = |n| {
            let (text, user) = (kind.query)(n);
            let key = format!("{text} {user}").into_bytes();
            Arc::new(GroupSpec { key, scope: Scope::User(user), ..GroupSpec::clone(&theirs) })
        };
        return numbers.map(of_user).collect();
    }
    let compile = |numbers: Range<usize>| -> Vec<Arc<GroupSpec>> {
        let spec = |n| {
            let (text, user) = (kind.query)(n);
            world.spec(&text, &user)
        };
        numbers.map(spec).collect()
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let part = numbers.len().div_ceil(cores).max(1);
    std::thread::scope(|scope| {
        let (compile, end) = (&compile, numbers.end);
        let parts = numbers.step_by(part).map(|from| from..end.min(from + part));
        let threads: Vec<_> = parts.map(|part| scope.spawn(move || compile(part))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

/// Median microseconds of a commit with so many live queries open, by size; and bytes of memory a query, of the most. Those
/// of one size stay open for the next.
fn matching(world: &World, kind: &Kind, sizes: &[usize]) -> (Vec<f64>, usize) {
    let live = world.live();
    let most = sizes.last().copied().unwrap_or_default();
    let mut open: Vec<Subscription> = Vec::with_capacity(most);
    let before = HELD.load(Ordering::Relaxed);
    let table = world.store.catalog().table("main", kind.table).unwrap().clone();
    let mut seq = world.store.applied().0;
    let (mut medians, mut bytes) = (Vec::new(), 0);
    for size in sizes {
        while open.len() < *size {
            let some = specs(world, kind, open.len()..(*size).min(open.len() + AT_ONCE));
            let joining = some.into_iter().map(|spec| live.subscribe(spec, From::Now));
            let joined = world.runtime.block_on(join_all(joining));
            open.extend(joined.into_iter().map(|subscription| subscription.ok().unwrap()));
        }
        bytes = HELD.load(Ordering::Relaxed).saturating_sub(before) / open.len();
        let mut times = Vec::new();
        for number in 1..=2 * COMMITS {
            seq += 1;
            let commit = commit(kind, &table, seq);
            let started = Instant::now();
            live.published(&commit);
            for subscription in &mut open[..MATCHES] {
                world.next_events(subscription);
            }
            if number > COMMITS {
                times.push(started.elapsed().as_nanos() as f64 / 1e3);
            }
        }
        times.sort_by(f64::total_cmp);
        medians.push(times[times.len() / 2]);
    }
    drop(open);
    live.close();
    (medians, bytes)
}

/// Bytes that one more subscription of a group costs: its struct, and what the allocator gave for anything beside it. A
/// connection brings the rest: its request, its socket, and the timer that a quiet stream beats by.
fn subscription_bytes(world: &World, count: usize) -> f64 {
    let live = world.live();
    let spec = world.spec("SELECT id FROM t", "admin");
    let _keeper = world.runtime.block_on(live.subscribe(spec.clone(), From::Now)).ok().unwrap();
    let before = HELD.load(Ordering::Relaxed);
    let mut open: Vec<Subscription> = Vec::with_capacity(count);
    for _ in 0..count {
        open.push(world.runtime.block_on(live.subscribe(spec.clone(), From::Now)).ok().unwrap());
    }
    let bytes = HELD.load(Ordering::Relaxed).saturating_sub(before) as f64 / count as f64;
    drop(open);
    live.close();
    bytes
}

fn main() {
    let most = std::env::var("MOST").ok().map_or(SIZES[3], |most| most.parse().expect("MOST is a number"));
    let sizes: Vec<usize> = SIZES.into_iter().filter(|size| *size <= most).collect();
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path());
    world.write("CREATE TABLE t (id BIGINT PRIMARY KEY, room TEXT, heat DOUBLE)");
    world.write("CREATE TABLE u (id BIGINT PRIMARY KEY, room TEXT, heat DOUBLE) WITH (type = 'user')");
    println!("a commit of {MATCHES} rows with {MATCHES} matches, microseconds (median of {COMMITS}); bytes a group");
    let (mut over, mut large) = (0, 0);
    for kind in &KINDS {
        let (medians, bytes) = matching(&world, kind, &sizes);
        let by_size = sizes.iter().zip(&medians).map(|(size, median)| format!("  {size:>7}: {median:>8.1}"));
        let line: String = by_size.collect();
        let ratio = medians[medians.len() - 1] / medians[0];
        over += usize::from(ratio > LIMIT);
        let said = if ratio <= LIMIT { "ok" } else { "OVER" };
        println!("{:>10}{line}  ratio {ratio:.2} (limit {LIMIT}: {said})  {bytes} bytes a group", kind.name);
    }
    for count in sizes.iter().filter(|size| **size >= 10_000) {
        let bytes = subscription_bytes(&world, *count);
        println!("{count} subscriptions of one group: {bytes:.1} bytes each (limit {SUBSCRIPTION_LIMIT})");
        large += usize::from(bytes > SUBSCRIPTION_LIMIT);
    }
    world.store.close();
    assert_eq!(over, 0, "{over} kinds of live queries cost more as there are more of them");
    assert_eq!(large, 0, "a subscription holds more than {SUBSCRIPTION_LIMIT} bytes");
}
