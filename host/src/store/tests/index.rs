//! Indexes against the rows they are of: kept up by commits, built while others write, gone when they are dropped.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use super::super::fixtures::index;
use super::super::index::{BuildError, encode_values, index_values};
use super::*;
use crate::catalog::{Index, IndexId, IndexState};

fn never() -> bool {
    false
}

/// Commits another set of indexes for the table; the table as it is then.
fn with_indexes(store: &Store, table: &Arc<Table>, indexes: Vec<Arc<Index>>) -> Arc<Table> {
    let table = Arc::new(Table { indexes, ..Table::clone(table) });
    change_catalog(store, CatalogWrite::PutTable(table.clone())).unwrap();
    table
}

fn in_state(index: &Index, state: IndexState) -> Arc<Index> {
    Arc::new(Index { state, ..index.clone() })
}

/// All stored entries, told from the rows.
fn expected(snapshot: &Snapshot, table: &Arc<Table>, index: &Index) -> BTreeSet<Vec<u8>> {
    let mut rows = snapshot.scan_table(table, &[]);
    let mut entries = BTreeSet::new();
    while let Some((stored, image)) = rows.next_row().unwrap() {
        let (image, ..) = ImageRef::parse(image).unwrap();
        let values = index_values(table, index, &image).unwrap();
        let start = super::super::keys::row_prefix_len(stored).unwrap();
        let ids = [table.namespace.0.to_be_bytes(), index.id.0.to_be_bytes()].concat();
        entries.insert([&ids, &stored[8..start], &values.bytes, &stored[start..]].concat());
    }
    entries
}

fn stored(snapshot: &Snapshot, table: &Arc<Table>, index: &Index) -> BTreeSet<Vec<u8>> {
    let mut scan = snapshot.scan_entries(table, index);
    let mut entries = BTreeSet::new();
    while let Some(entry) = scan.next_key().unwrap() {
        assert!(entries.insert(entry.to_vec()));
    }
    entries
}

fn ids_by(snapshot: &Snapshot, table: &Arc<Table>, at: usize, scope: &Scope, range: &KeyRange) -> BTreeSet<i64> {
    let mut scan = snapshot.scan_index(table, &table.indexes[at], scope, range);
    let mut ids = BTreeSet::new();
    while let Some((key, image)) = scan.next_row().unwrap() {
        let (image, ..) = ImageRef::parse(image).unwrap();
        let id = image.int(0).unwrap();
        assert_eq!(key, encode_key(table, &[Value::Int(id)]));
        assert!(ids.insert(id), "{id} came twice");
    }
    ids
}

fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

#[test]
fn the_bytes_of_an_entry_are_pinned() {
    let (_dir, store, table) = with_table(user_table(1));
    let table = with_indexes(&store, &table, vec![index(0x0203, &[1, 2], false)]);
    let snapshot = store.snapshot();
    let scope = Scope::User("u".to_owned());
    commit(&store, snapshot.seq(), vec![write(&snapshot, &table, &scope, 5, Some("a"))]).unwrap();
    let entries: Vec<_> = stored(&store.snapshot(), &table, &table.indexes[0]).into_iter().collect();
    #[rustfmt::skip]
    assert_eq!(entries, [vec![
        0, 0, 0, 1, 0, 0, 2, 3, b'u', 0, 1, // namespace, index, user
        1, b'a', 0, 1, 0, // "a", NULL
        0x80, 0, 0, 0, 0, 0, 0, 5, // the row's key
    ]]);
    let zero = |value| encode_values(&table, &index(4, &[2], false), &[Value::Float(value)]);
    assert_eq!(zero(0.0), zero(-0.0));
    assert!(zero(-0.5) < zero(0.0) && zero(0.0) < zero(0.5));
}

#[test]
fn rows_are_found_by_ranges_of_their_values() {
    let (_dir, store, table) = with_table(table(1));
    let table = with_indexes(&store, &table, vec![index(2, &[1], false)]);
    for (id, value) in [(1, "b"), (2, "a"), (3, "b"), (4, "ab"), (5, "c"), (6, "")] {
        put(&store, &table, id, Some(value));
    }
    put(&store, &table, 5, Some("b"));
    put(&store, &table, 3, None);
    let snapshot = store.snapshot();
    let key = |value: &str| encode_values(&table, &table.indexes[0], &[text(value)]);
    let by = |range: KeyRange| ids_by(&snapshot, &table, 0, &Scope::Shared, &range).into_iter().collect::<Vec<_>>();
    assert_eq!(by(KeyRange::prefix(key("b"))), [1, 5]);
    assert_eq!(by(KeyRange::prefix(key("c"))), [0i64; 0]);
    assert_eq!(by(KeyRange::all()), [1, 2, 4, 5, 6]);
    let (start, end) = (std::ops::Bound::Included(key("a")), std::ops::Bound::Excluded(key("b")));
    assert_eq!(by(KeyRange { start, end }), [2, 4]);
    let find = |value| snapshot.find_in_index(&table, &table.indexes[0], &Scope::Shared, key(value)).unwrap();
    assert_eq!(find("ab"), Some(encode_key(&table, &[Value::Int(4)])));
    assert_eq!(find("zz"), None);
}

#[test]
fn of_two_that_claim_a_value_at_once_one_comes_first() {
    let (_dir, store, table) = with_table(user_table(1));
    let table = with_indexes(&store, &table, vec![index(2, &[1], true), index(3, &[2], true)]);
    let snapshot = store.snapshot();
    let insert = |user: &str, id, value| {
        let scope = Scope::User(user.to_owned());
        commit(&store, snapshot.seq(), vec![write(&snapshot, &table, &scope, id, Some(value))])
    };
    insert("al", 1, "x").unwrap();
    assert!(matches!(insert("al", 2, "x"), Err(CommitError::Stale)));
    insert("al", 3, "y").unwrap();
    // Another user's values, and NULLs (score is one in all rows), are in nobody's way.
    insert("alice", 2, "x").unwrap();
    // Planned when there was another index.
    let other = with_indexes(&store, &table, vec![table.indexes[0].clone()]);
    assert!(matches!(insert("al", 4, "z"), Err(CommitError::Stale)));
    let snapshot = store.snapshot();
    let scope = Scope::User("al".to_owned());
    commit(&store, snapshot.seq(), vec![write(&snapshot, &other, &scope, 4, Some("z"))]).unwrap();
}

#[test]
fn an_index_is_built_while_others_write() {
    let (_dir, store, table) = with_table(user_table(1));
    let users: Vec<Scope> = ["", "al", "alice"].map(|user| Scope::User(user.to_owned())).into();
    for scope in &users {
        let snapshot = store.snapshot();
        // More than a piece.
        let rows = (0..3_000).map(|id| write(&snapshot, &table, scope, id, Some("old"))).collect();
        commit(&store, snapshot.seq(), rows).unwrap();
    }
    let building = in_state(&index(2, &[1], false), IndexState::Building);
    let table = with_indexes(&store, &table, vec![building.clone()]);
    let (done, begun) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let writer = {
        let (store, table, users) = (store.clone(), table.clone(), users.clone());
        let (done, begun) = (done.clone(), begun.clone());
        std::thread::spawn(move || {
            let mut written = 0i64;
            while !done.load(Ordering::Acquire) {
                let (snapshot, scope) = (store.snapshot(), &users[written as usize % 3]);
                let text = [Some("new"), None, Some("other")][written as usize / 3 % 3];
                let ids: BTreeSet<i64> = [7, 1_013, 5_003].into_iter().map(|step| written * step % 6_000).collect();
                let writes = ids.into_iter().map(|id| write(&snapshot, &table, scope, id, text)).collect();
                commit(&store, snapshot.seq(), writes).unwrap();
                written += 1;
                begun.store(true, Ordering::Release);
            }
        })
    };
    while !begun.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
    store.fill_index(TableId(1), IndexId(2), &never).unwrap();
    store.verify_index(TableId(1), IndexId(2), &never).unwrap();
    done.store(true, Ordering::Release);
    writer.join().unwrap();
    let table = with_indexes(&store, &table, vec![in_state(&building, IndexState::Ready)]);
    let snapshot = store.snapshot();
    assert_eq!(stored(&snapshot, &table, &table.indexes[0]), expected(&snapshot, &table, &table.indexes[0]));
    for scope in &users {
        let all = rows(&snapshot, &table, scope, KeyRange::all()).into_iter().map(|(id, _)| id).collect();
        assert_eq!(ids_by(&snapshot, &table, 0, scope, &KeyRange::all()), all);
    }
}

#[test]
fn what_was_written_since_a_piece_was_read_is_left_to_its_writer() {
    let (_dir, store, table) = with_table(table(1));
    put(&store, &table, 1, Some("old"));
    put(&store, &table, 2, Some("old"));
    put(&store, &table, 3, Some("old"));
    let building = [(2, 1), (3, 2)].map(|(id, column)| in_state(&index(id, &[column], false), IndexState::Building));
    let table = with_indexes(&store, &table, building.to_vec());
    let pieces = building.each_ref().map(|index| store.read_piece(TableId(1), index.id, &[]).unwrap());
    // One row changes in the first index and not in the second, one goes, one stays.
    put(&store, &table, 1, Some("new"));
    put(&store, &table, 2, None);
    for (piece, last) in pieces {
        assert!(last.is_some());
        block_on(store.queue.push_piece(piece).unwrap()).unwrap().unwrap();
    }
    let snapshot = store.snapshot();
    for index in &building {
        assert_eq!(stored(&snapshot, &table, index), expected(&snapshot, &table, index));
        assert_eq!(stored(&snapshot, &table, index).len(), 2);
    }
}

#[test]
fn verifying_finds_duplicates_and_what_is_wrong() {
    let (_dir, store, table) = with_table(table(1));
    let unique = index(2, &[1], true);
    let table = with_indexes(&store, &table, vec![unique.clone()]);
    let verify = || store.verify_index(TableId(1), IndexId(2), &never);
    for (id, value) in [(1, "a"), (2, "aa"), (3, "b")] {
        put(&store, &table, id, Some(value));
    }
    verify().unwrap();
    // The store itself takes what it is given; only what is claimed at once is its affair.
    put(&store, &table, 4, Some("aa"));
    assert!(matches!(verify(), Err(BuildError::Duplicate(values)) if values == [text("aa")]));
    put(&store, &table, 4, Some("c"));
    verify().unwrap();
    assert!(matches!(store.verify_index(TableId(1), IndexId(9), &never), Err(BuildError::Gone)));

    let entry = stored(&store.snapshot(), &table, &unique).pop_last().unwrap();
    let family = family(&store.inner.db, SHARED_FAMILY);
    store.inner.db.delete_cf(family, &entry).unwrap();
    assert!(matches!(verify(), Err(BuildError::Wrong(_))));
    let mut stray = entry.clone();
    *stray.last_mut().unwrap() = 99;
    store.inner.db.put_cf(family, &stray, b"").unwrap();
    assert!(matches!(verify(), Err(BuildError::Wrong(_))), "as many, but not the same");
    let snapshot = store.snapshot();
    let mut scan = snapshot.scan_index(&table, &table.indexes[0], &Scope::Shared, &KeyRange::all());
    let read = std::iter::from_fn(|| scan.next_row().map(|row| row.map(|_| ())).transpose()).find(Result::is_err);
    assert!(matches!(read, Some(Err(StoreError::Corrupt(_)))), "an entry without a row is damage");
}

#[test]
fn a_half_built_index_is_gone_after_a_crash_and_its_id_too() {
    let (dir, store, table) = with_table(user_table(1));
    let scope = Scope::User("u".to_owned());
    let snapshot = store.snapshot();
    let rows = (0..3_000).map(|id| write(&snapshot, &table, &scope, id, Some("x"))).collect();
    commit(&store, snapshot.seq(), rows).unwrap();
    let ready = index(2, &[1], false);
    let table = with_indexes(&store, &table, vec![in_state(&ready, IndexState::Building)]);
    store.fill_index(TableId(1), IndexId(2), &never).unwrap();
    let building = in_state(&index(3, &[2], false), IndexState::Building);
    let table = with_indexes(&store, &table, vec![ready.clone(), building]);
    let (piece, _) = store.read_piece(TableId(1), IndexId(3), &[]).unwrap();
    block_on(store.queue.push_piece(piece).unwrap()).unwrap().unwrap();

    let crashed = crash(dir.path());
    let reopened = open_with(&options(crashed.path()));
    let found = reopened.catalog().table("main", "t1").unwrap().clone();
    assert_eq!(found.indexes, std::slice::from_ref(&ready));
    assert_eq!(reopened.catalog().next_table, 4);
    let snapshot = reopened.snapshot();
    assert_eq!(stored(&snapshot, &found, &table.indexes[1]).len(), 0);
    assert_eq!(stored(&snapshot, &found, &ready), expected(&snapshot, &found, &ready));
    // A build that goes on after that is told that there is nothing to build.
    assert!(matches!(reopened.fill_index(TableId(1), IndexId(3), &never), Err(BuildError::Gone)));
    let again = Arc::new(Table { indexes: vec![ready, index(3, &[1], false)], ..Table::clone(&found) });
    let refused = change_catalog(&reopened, CatalogWrite::PutTable(again));
    assert!(matches!(refused, Err(CommitError::Invalid(_))), "{refused:?}");
}

#[test]
fn a_dropped_index_leaves_nothing_and_a_late_piece_adds_nothing() {
    let (_dir, store, table) = with_table(table(1));
    put(&store, &table, 1, Some("a"));
    let building = in_state(&index(2, &[1], false), IndexState::Building);
    let indexed = with_indexes(&store, &table, vec![building, index(3, &[2], false)]);
    put(&store, &indexed, 2, Some("b"));
    let (piece, _) = store.read_piece(TableId(1), IndexId(2), &[]).unwrap();
    let stopped = || true;
    assert!(matches!(store.fill_index(TableId(1), IndexId(2), &stopped), Err(BuildError::Stopped)));
    let keys = || {
        let family = family(&store.inner.db, SHARED_FAMILY);
        store.inner.db.iterator_cf(family, rocksdb::IteratorMode::Start).count()
    };
    assert_eq!(keys(), 2 + 1 + 1);
    with_indexes(&store, &table, vec![indexed.indexes[1].clone()]);
    assert_eq!(keys(), 2 + 1);
    let late = block_on(store.queue.push_piece(piece).unwrap()).unwrap();
    assert!(matches!(late, Err(CommitError::Invalid(_))), "{late:?}");
    assert!(matches!(store.fill_index(TableId(1), IndexId(2), &never), Err(BuildError::Gone)));
    change_catalog(&store, CatalogWrite::DropTable(TableId(1))).unwrap();
    assert_eq!(keys(), 0);
}

#[test]
fn another_version_of_a_table_may_differ_in_its_indexes_alone() {
    let (_dir, store, table) = with_table(table(1));
    let attempt = |table: Table| change_catalog(&store, CatalogWrite::PutTable(Arc::new(table)));
    let refused = |table: Table| assert!(matches!(attempt(table), Err(CommitError::Invalid(_))));
    refused(Table { indexes: vec![index(1, &[1], false)], ..Table::clone(&table) });
    refused(Table { indexes: vec![index(2, &[7], false)], ..Table::clone(&table) });
    refused(Table { indexes: vec![index(2, &[], false)], ..Table::clone(&table) });
    let mut other = Table { indexes: vec![index(2, &[1], false)], ..Table::clone(&table) };
    other.columns.pop();
    refused(other);
    attempt(Table { indexes: vec![index(2, &[1], false)], ..Table::clone(&table) }).unwrap();
    refused(Table { indexes: vec![index(2, &[2], false)], ..Table::clone(&table) });
    refused(Table { indexes: vec![index(2, &[1], true)], ..Table::clone(&table) });
    let log = log(&store.snapshot(), Seq(1)).unwrap();
    let events = log.iter().flat_map(|(_, frame)| FrameView::parse(frame).unwrap().catalog).collect::<Vec<_>>();
    assert_eq!(events, [], "rows are as they were: streams of the table go on");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Random writes, indexes that come (built over what is there), go, and restarts: every index is what the rows say.
    #[test]
    fn indexes_are_what_the_rows_say(steps in proptest::collection::vec(
        (proptest::collection::btree_map(0i64..12, proptest::option::of("[a-c]{0,2}"), 0..5), 0u8..10, 0usize..2), 1..40))
    {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open_with(&options(dir.path()));
        let mut table = Arc::new(user_table(1));
        change_catalog(&store, CatalogWrite::PutTable(table.clone())).unwrap();
        let users = [Scope::User("a".to_owned()), Scope::User("a\0".to_owned())];
        for (rows, what, user) in steps {
            let snapshot = store.snapshot();
            let scope = &users[user];
            let rows = rows.iter().map(|(id, text)| write(&snapshot, &table, scope, *id, text.as_deref()));
            commit(&store, snapshot.seq(), rows.collect()).unwrap();
            drop(snapshot);
            match what {
                0 | 1 if table.indexes.len() < 3 => {
                    let id = IndexId(store.catalog().next_table);
                    let new = index(id.0, [&[1][..], &[2, 1]][usize::from(what)], false);
                    let mut indexes = table.indexes.clone();
                    indexes.push(in_state(&new, IndexState::Building));
                    table = with_indexes(&store, &table, indexes.clone());
                    store.fill_index(TableId(1), id, &never).unwrap();
                    store.verify_index(TableId(1), id, &never).unwrap();
                    *indexes.last_mut().unwrap() = new;
                    table = with_indexes(&store, &table, indexes);
                }
                2 if !table.indexes.is_empty() => {
                    table = with_indexes(&store, &table, table.indexes[1..].to_vec());
                }
                3 => {
                    store.close();
                    drop(store);
                    store = open_with(&options(dir.path()));
                    let catalog = store.catalog();
                    prop_assert_eq!(&**catalog.table("main", "t1").unwrap(), &*table);
                }
                _ => {}
            }
            let snapshot = store.snapshot();
            for (at, index) in table.indexes.iter().enumerate() {
                prop_assert_eq!(stored(&snapshot, &table, index), expected(&snapshot, &table, index));
                for scope in &users {
                    let all = super::rows(&snapshot, &table, scope, KeyRange::all());
                    let by_key: BTreeSet<i64> = all.iter().map(|(id, _)| *id).collect();
                    prop_assert_eq!(ids_by(&snapshot, &table, at, scope, &KeyRange::all()), by_key);
                }
            }
        }
    }
}
