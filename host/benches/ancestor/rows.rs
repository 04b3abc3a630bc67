//! One changed row on its way to N subscribers: a map of JSON values cloned for each of them, as the ancestor sends it;
//! and ours, encoded once, which all of them share. Counted is all that is held when each has the change in hand.

use std::collections::HashMap;
use std::sync::Arc;

use ::bytes::Bytes;
use host::live::{self, Subscription};
use host::store::{Commit, Seq};
use serde_json::Value;
use wire::frame::ChangeMeta;
use wire::{FrameBuilder, ImageBuilder, Scope};

use crate::measure::{Table, bytes, held_by};
use crate::world::World;

const SUBSCRIBERS: [usize; 3] = [100, 1_000, 10_000];
/// Bytes of the row's text.
const SIZES: [usize; 3] = [100, 1_000, 10_000];

type Row = HashMap<String, Value>;

pub fn run() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path());
    world.write("CREATE TABLE t (id BIGINT PRIMARY KEY, note TEXT)");
    let mut table = Table::new(
        "rows: one row for N subscribers; bytes held when each has it (before and after the ancestor's fix alike: \
         cloning a map of JSON values copies them)",
        &["cloned for each", "shared: frame, event, N handles", "times"],
    );
    for subscribers in SUBSCRIBERS {
        for size in SIZES {
            let (theirs, ours) = (cloned(subscribers, size), shared(&world, subscribers, size));
            table.row(
                format!("{subscribers} subscribers, {} of text", bytes(size)),
                [bytes(theirs), bytes(ours), format!("{:.0} ×", theirs as f64 / ours as f64)],
            );
        }
    }
    table.print(&["100 subscribers of a row of 1 kB: 100 kB before its fix, after it 1 kB and references"]);
    world.store.close();
}

fn cloned(subscribers: usize, size: usize) -> usize {
    let row = Row::from([("id".to_owned(), Value::from(7)), ("note".to_owned(), Value::from("x".repeat(size)))]);
    let mut taken: Vec<Row> = Vec::with_capacity(subscribers);
    let (_, clones) = held_by(|| taken.extend((0..subscribers).map(|_| row.clone())));
    clones + taken.capacity() * size_of::<Row>()
}

/// Through the live side as it is: committed, matched, encoded, taken by each.
fn shared(world: &World, subscribers: usize, size: usize) -> usize {
    let side = world.live();
    let spec = world.spec("SELECT id, note FROM t", "admin");
    let mut open: Vec<Subscription> = Vec::with_capacity(subscribers);
    for _ in 0..subscribers {
        open.push(world.runtime.block_on(side.subscribe(spec.clone(), live::From::Now)).unwrap());
    }
    // What evaluating allocates once, for all the changes to come, is not this row's.
    let first = world.store.applied().0;
    side.published(&commit(world, first + 1, size));
    open.iter_mut().for_each(|subscription| drop(world.next_events(subscription)));
    let mut taken: Vec<Bytes> = Vec::with_capacity(subscribers);
    let (_, held) = held_by(|| {
        side.published(&commit(world, first + 2, size));
        taken.extend(open.iter_mut().map(|subscription| world.next_events(subscription)));
    });
    let handles = taken.capacity() * size_of::<Bytes>();
    assert!(taken.iter().all(|bytes| bytes.as_ptr() == taken[0].as_ptr()), "everybody has the same bytes");
    drop((taken, open));
    side.close();
    held + handles
}

fn commit(world: &World, seq: u64, size: usize) -> Arc<Commit> {
    let table = world.store.catalog().table("main", "t").unwrap().clone();
    let mut image = ImageBuilder::new(table.slots());
    image.set_int(0, seq as i64);
    image.set_bytes(1, "x".repeat(size).as_bytes());
    let kinds = table.kinds();
    let meta = ChangeMeta { table: table.id.0, schema_version: table.schema_version, kinds: &kinds };
    let mut frame = FrameBuilder::new(table.namespace.0, [0; 16], 0);
    frame.change(&Scope::Shared, meta, None, Some(&image.finish())).unwrap();
    let frame = frame.finish().unwrap().into();
    Arc::new(Commit { seq: Seq(seq), namespace: table.namespace, frame, tables: vec![table.id], catalog: None })
}
