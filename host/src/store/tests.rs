//! The store as its users see it, on a real directory.

mod index;

use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::Path;
use std::sync::Mutex;

use futures::future::join_all;
use proptest::prelude::*;
use tempfile::TempDir;
use wire::{CatalogEvent, FrameView, ImageRef, Op, Value};

use super::fixtures::{MAIN, TTL_MICROS, image, plugin, stream_table, table, user_table};
use super::keys::{KeyRange, encode_key};
use super::snapshot::Snapshot;
use super::*;

fn options(path: &Path) -> StoreOptions {
    StoreOptions {
        path: path.to_owned(),
        write_buffer_size: 1 << 20,
        max_write_buffers: 2,
        block_cache_size: 8 << 20,
        max_background_jobs: 2,
        max_open_files: 64,
        max_commit_bytes: 1 << 20,
        log_commits: 1000,
        ..StoreOptions::new(path)
    }
}

fn open_with(options: &StoreOptions) -> Store {
    let store = Store::open(options).unwrap();
    store.start(Box::new(|_| {}));
    store
}

fn new_store() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(&options(dir.path()));
    (dir, store)
}

/// A store and one of its tables, made through a commit.
fn with_table(new: Table) -> (TempDir, Store, Arc<Table>) {
    let (dir, store) = new_store();
    let table = Arc::new(new);
    change_catalog(&store, CatalogWrite::PutTable(table.clone())).unwrap();
    (dir, store, table)
}

fn commit(store: &Store, base: Seq, rows: Vec<RowWrite>) -> Result<Seq, CommitError> {
    block_on(store.commit(Transaction { namespace: MAIN, base, rows, catalog: Vec::new(), receipt: None }))
}

fn change_catalog(store: &Store, write: CatalogWrite) -> Result<Seq, CommitError> {
    let base = store.snapshot().seq();
    block_on(store.commit(Transaction { namespace: MAIN, base, rows: Vec::new(), catalog: vec![write], receipt: None }))
}

/// A write of row `id`, its old image read at `snapshot`.
fn write(snapshot: &Snapshot, table: &Arc<Table>, scope: &Scope, id: i64, text: Option<&str>) -> RowWrite {
    let key = encode_key(table, &[Value::Int(id)]);
    let old = snapshot.get(table, scope, &key).unwrap();
    RowWrite { table: table.clone(), scope: scope.clone(), key, old, new: text.map(|text| image(id, Some(text))) }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// Commits one row at the present snapshot.
fn put(store: &Store, table: &Arc<Table>, id: i64, text: Option<&str>) -> Seq {
    let snapshot = store.snapshot();
    commit(store, snapshot.seq(), vec![write(&snapshot, table, &Scope::Shared, id, text)]).unwrap()
}

fn rows(snapshot: &Snapshot, table: &Arc<Table>, scope: &Scope, range: KeyRange) -> Vec<(i64, String)> {
    let mut scan = snapshot.scan(table, scope, range);
    let mut rows = Vec::new();
    while let Some((key, image)) = scan.next_row().unwrap() {
        let (image, ..) = ImageRef::parse(image).unwrap();
        let id = image.int(0).unwrap();
        assert_eq!(key, encode_key(table, &[Value::Int(id)]));
        rows.push((id, image.text(1).unwrap_or_default().to_owned()));
    }
    assert!(scan.next_row().unwrap().is_none(), "a scan stays at its end");
    rows
}

fn all(store: &Store, table: &Arc<Table>) -> Vec<(i64, String)> {
    rows(&store.snapshot(), table, &Scope::Shared, KeyRange::all())
}

fn log(snapshot: &Snapshot, after: Seq) -> Result<Vec<(Seq, Bytes)>, StoreError> {
    let mut scan = snapshot.log(MAIN, after);
    let mut found = Vec::new();
    while let Some(commit) = scan.next_commit()? {
        found.push(commit);
    }
    Ok(found)
}

/// What a crash leaves: the files as they are, without closing anything.
fn crash(path: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    std::fs::create_dir(copy.path().join("db")).unwrap();
    for name in ["", "db"] {
        for entry in std::fs::read_dir(path.join(name)).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() && entry.file_name() != "LOCK" {
                std::fs::copy(entry.path(), copy.path().join(name).join(entry.file_name())).unwrap();
            }
        }
    }
    copy
}

#[test]
fn rows_round_trip_in_key_order() {
    let (_dir, store, table) = with_table(table(1));
    let snapshot = store.snapshot();
    let writes = [5, -3, 0, i64::MAX, i64::MIN].map(|id| write(&snapshot, &table, &Scope::Shared, id, Some("x")));
    let seq = commit(&store, snapshot.seq(), writes.into()).unwrap();
    assert_eq!(store.applied(), seq);
    assert_eq!(rows(&snapshot, &table, &Scope::Shared, KeyRange::all()), []);

    let now = store.snapshot();
    assert_eq!(now.seq(), seq);
    let ids = |range| rows(&now, &table, &Scope::Shared, range).into_iter().map(|(id, _)| id).collect::<Vec<_>>();
    assert_eq!(ids(KeyRange::all()), [i64::MIN, -3, 0, 5, i64::MAX]);
    assert_eq!(ids(KeyRange::prefix(encode_key(&table, &[Value::Int(0)]))), [0]);
    let bound = |id| std::ops::Bound::Excluded(encode_key(&table, &[Value::Int(id)]));
    assert_eq!(ids(KeyRange { start: bound(-3), end: bound(i64::MAX) }), [0, 5]);
    assert_eq!(ids(KeyRange { start: bound(7), end: bound(3) }), [0i64; 0]);

    put(&store, &table, 0, None);
    put(&store, &table, 5, Some("y"));
    let key = encode_key(&table, &[Value::Int(5)]);
    assert_eq!(store.snapshot().get(&table, &Scope::Shared, &key).unwrap(), Some(image(5, Some("y"))));
    assert_eq!(now.get(&table, &Scope::Shared, &key).unwrap(), Some(image(5, Some("x"))));
    assert_eq!(all(&store, &table).len(), 4);
}

#[test]
fn users_and_tables_are_apart() {
    let (_dir, store, mine) = with_table(user_table(1));
    let other = Arc::new(user_table(2));
    change_catalog(&store, CatalogWrite::PutTable(other.clone())).unwrap();
    let users = ["", "al", "alice", "al:ice", "al\0"];
    for user in users {
        let (snapshot, scope) = (store.snapshot(), Scope::User(user.to_owned()));
        let rows =
            vec![write(&snapshot, &mine, &scope, 1, Some(user)), write(&snapshot, &other, &scope, 2, Some(user))];
        commit(&store, snapshot.seq(), rows).unwrap();
    }
    for user in users {
        let scope = Scope::User(user.to_owned());
        assert_eq!(rows(&store.snapshot(), &mine, &scope, KeyRange::all()), [(1, user.to_owned())]);
        assert_eq!(rows(&store.snapshot(), &other, &scope, KeyRange::all()), [(2, user.to_owned())]);
    }
}

#[test]
fn the_first_committer_wins() {
    let (_dir, store, table) = with_table(table(1));
    put(&store, &table, 1, Some("a"));
    let old = store.snapshot();
    let winner = put(&store, &table, 1, Some("b"));
    let late = |id, text| commit(&store, old.seq(), vec![write(&old, &table, &Scope::Shared, id, text)]);
    assert!(matches!(late(1, Some("c")), Err(CommitError::Stale)));
    assert!(matches!(late(1, None), Err(CommitError::Stale)));
    // Even a write without effect was decided on what is no longer so.
    assert!(matches!(late(1, Some("a")), Err(CommitError::Stale)));
    assert!(late(2, Some("c")).unwrap() > winner);
    assert_eq!(all(&store, &table), [(1, "b".to_owned()), (2, "c".to_owned())]);
}

#[test]
fn of_many_at_once_one_wins_and_all_others_hear_of_it() {
    let (_dir, store, table) = with_table(table(1));
    let snapshot = store.snapshot();
    let rivals = (0..50).map(|i| {
        let shared = write(&snapshot, &table, &Scope::Shared, 0, Some("shared"));
        let own = write(&snapshot, &table, &Scope::Shared, 1 + i % 25, Some("own"));
        let rows = if i < 25 { vec![shared, own] } else { vec![own] };
        store.commit(Transaction { namespace: MAIN, base: snapshot.seq(), rows, catalog: Vec::new(), receipt: None })
    });
    let outcomes = block_on(join_all(rivals));
    assert_eq!(outcomes[..25].iter().filter(|outcome| outcome.is_ok()).count(), 1);
    let seqs: Vec<Seq> = outcomes.into_iter().filter_map(Result::ok).collect();
    assert!(seqs.is_sorted_by(|a, b| a < b), "{seqs:?}");
    assert_eq!(log(&store.snapshot(), snapshot.seq()).unwrap().len(), seqs.len());
    assert_eq!(all(&store, &table).len(), 26);
}

#[test]
fn without_effect_there_is_no_commit() {
    let (_dir, store, table) = with_table(table(1));
    let seq = put(&store, &table, 1, Some("a"));
    assert_eq!(put(&store, &table, 1, Some("a")), seq);
    assert_eq!(put(&store, &table, 2, None), seq);
    assert_eq!(commit(&store, seq, Vec::new()).unwrap(), seq);
    assert_eq!(store.applied(), seq);

    // Where only a part has effect, the frame holds that part.
    let snapshot = store.snapshot();
    let rows = [1, 3].map(|id| write(&snapshot, &table, &Scope::Shared, id, Some("a")));
    commit(&store, snapshot.seq(), rows.into()).unwrap();
    let log = log(&store.snapshot(), seq).unwrap();
    let frame = FrameView::parse(&log[0].1).unwrap();
    assert_eq!(frame.sections[0].changes.len(), 1);
}

#[test]
fn frames_tell_each_change_in_order() {
    let (_dir, store, table) = with_table(table(1));
    let first = store.applied();
    put(&store, &table, 1, Some("a"));
    put(&store, &table, 1, Some("b"));
    put(&store, &table, 1, None);
    let log = log(&store.snapshot(), first).unwrap();
    let told: Vec<_> = log
        .iter()
        .map(|(_, frame)| {
            let view = FrameView::parse(frame).unwrap();
            let change = view.sections[0].changes[0];
            let text = |image: Option<(ImageRef<'_>, _)>| image.map(|(image, _)| image.text(1).unwrap().to_owned());
            assert_eq!((view.namespace, change.header.table, view.commit_id[6] >> 4), (1, 1, 7));
            (change.op, text(change.old), text(change.new), change.is_changed(1))
        })
        .collect();
    let text = |text: &str| Some(text.to_owned());
    assert_eq!(
        told,
        [
            (Op::Insert, None, text("a"), true),
            (Op::Update, text("a"), text("b"), true),
            (Op::Delete, text("b"), None, true)
        ]
    );
}

type Seen = Arc<Mutex<Vec<Arc<Commit>>>>;

fn recorder() -> (Seen, CommitHook) {
    let seen = Seen::default();
    let into = seen.clone();
    (seen, Box::new(move |commit| into.lock().unwrap().push(commit.clone())))
}

#[test]
fn the_hook_sees_every_commit_once_behind_its_answer() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&options(dir.path())).unwrap();
    let (seen, hook) = recorder();
    let (go_on, waits) = std::sync::mpsc::channel();
    let waits = Mutex::new(waits);
    store.start(Box::new(move |commit| {
        waits.lock().unwrap().recv().unwrap();
        hook(commit);
    }));
    let table = Arc::new(table(1));
    change_catalog(&store, CatalogWrite::PutTable(table.clone())).unwrap();
    assert_eq!(
        (store.durable(), seen.lock().unwrap().len()),
        (store.applied(), 0),
        "answered, and nobody has heard of it"
    );
    go_on.send(()).unwrap();
    for id in 0..20 {
        put(&store, &table, id, Some("x"));
        go_on.send(()).unwrap();
    }
    store.close();
    assert_eq!(seen.lock().unwrap()[0].catalog.as_ref().unwrap().version, store.catalog().version);
    let told: Vec<_> = seen.lock().unwrap().iter().map(|commit| (commit.seq, commit.frame.clone())).collect();
    assert_eq!(told, log(&store.snapshot(), Seq(0)).unwrap());
}

#[test]
fn the_catalog_is_kept_and_ids_are_never_reused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(&options(dir.path()));
    assert_eq!(store.catalog().namespace("main").unwrap().id, MAIN);
    assert_eq!((store.catalog().next_namespace, store.catalog().next_table), (2, 1));
    change_catalog(&store, CatalogWrite::PutTable(Arc::new(table(1)))).unwrap();
    change_catalog(&store, CatalogWrite::PutTable(Arc::new(user_table(2)))).unwrap();
    change_catalog(&store, CatalogWrite::DropTable(TableId(2))).unwrap();
    change_catalog(&store, CatalogWrite::PutNamespace { id: NamespaceId(2), name: "shop".to_owned() }).unwrap();
    let version = store.catalog().version;
    store.close();
    drop(store);

    let store = open_with(&options(dir.path()));
    let catalog = store.catalog();
    assert_eq!(**catalog.table("main", "t1").unwrap(), table(1));
    assert!(catalog.table("main", "t2").is_none());
    assert_eq!((catalog.version, catalog.next_namespace, catalog.next_table), (version, 3, 3));
    let again = change_catalog(&store, CatalogWrite::PutTable(Arc::new(Table { name: "x".to_owned(), ..table(2) })));
    assert!(matches!(again, Err(CommitError::Invalid(_))), "{again:?}");

    change_catalog(&store, CatalogWrite::DropNamespace { name: "main".to_owned() }).unwrap();
    drop(store);
    let catalog = open_with(&options(dir.path())).catalog();
    assert_eq!(catalog.namespaces().map(|namespace| namespace.name.as_str()).collect::<Vec<_>>(), ["shop"]);
    assert!(catalog.table_by_id(TableId(1)).is_none());
}

#[test]
fn a_dropped_table_leaves_nothing() {
    let (_dir, store, first) = with_table(user_table(1));
    let neighbour = Arc::new(user_table(2));
    change_catalog(&store, CatalogWrite::PutTable(neighbour.clone())).unwrap();
    for table in [&first, &neighbour] {
        for user in ["a", "b"] {
            let (snapshot, scope) = (store.snapshot(), Scope::User(user.to_owned()));
            commit(&store, snapshot.seq(), vec![write(&snapshot, table, &scope, 1, Some("x"))]).unwrap();
        }
    }
    let before = store.snapshot();
    let seq = change_catalog(&store, CatalogWrite::DropTable(TableId(1))).unwrap();
    let scope = Scope::User("a".to_owned());
    let left = store.inner.db.iterator_cf(family(&store.inner.db, USER_FAMILY), rocksdb::IteratorMode::Start).count();
    assert_eq!(left, 2, "the neighbour's rows and no others");
    assert_eq!(rows(&store.snapshot(), &neighbour, &scope, KeyRange::all()).len(), 1);
    // A snapshot from before still has table and rows.
    assert!(before.catalog().table_by_id(TableId(1)).is_some());
    assert_eq!(rows(&before, &first, &scope, KeyRange::all()).len(), 1);
    // A write planned before the drop comes too late.
    let late = commit(&store, before.seq(), vec![write(&before, &first, &scope, 9, Some("x"))]);
    assert!(matches!(late, Err(CommitError::Stale)), "{late:?}");
    let log = log(&store.snapshot(), before.seq()).unwrap();
    assert_eq!(log[0].0, seq);
    assert_eq!(FrameView::parse(&log[0].1).unwrap().catalog, [CatalogEvent::TableDropped { table: 1 }]);
}

#[test]
fn catalog_changes_planned_on_an_old_catalog_are_stale() {
    let (_dir, store) = new_store();
    let base = store.snapshot().seq();
    change_catalog(&store, CatalogWrite::PutTable(Arc::new(table(1)))).unwrap();
    let rival = CatalogWrite::PutTable(Arc::new(Table { name: "other".to_owned(), ..table(1) }));
    let late = block_on(store.commit(Transaction {
        namespace: MAIN,
        base,
        rows: Vec::new(),
        catalog: vec![rival.clone()],
        receipt: None,
    }));
    assert!(matches!(late, Err(CommitError::Stale)), "{late:?}");
    assert!(matches!(change_catalog(&store, rival), Err(CommitError::Invalid(_))));
}

#[test]
fn plugins_are_kept_as_long_as_something_names_their_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(&options(dir.path()));
    let upload = |name: &str, version, sha: &str| {
        let plugin = Arc::new(Plugin { sha256: sha.to_owned(), ..plugin(name, version) });
        change_catalog(&store, CatalogWrite::PutPlugin { plugin, wasm: Bytes::copy_from_slice(sha.as_bytes()) })
            .unwrap();
    };
    upload("late", 1, "aa");
    upload("late", 2, "bb");
    upload("copy", 1, "aa");
    drop(store);

    let store = open_with(&options(dir.path()));
    let catalog = store.catalog();
    assert_eq!(catalog.plugin("main", "late").unwrap().version, 2);
    assert_eq!(catalog.namespace("main").unwrap().plugins["late"].len(), 2);
    assert_eq!(store.plugin_wasm("aa").unwrap().as_deref(), Some(&b"aa"[..]));
    let drop_it = CatalogWrite::DropPlugin { namespace: "main".to_owned(), name: "late".to_owned() };
    change_catalog(&store, drop_it).unwrap();
    assert!(store.catalog().plugin("main", "late").is_none());
    assert_eq!(store.plugin_wasm("bb").unwrap(), None);
    assert_eq!(store.plugin_wasm("aa").unwrap().as_deref(), Some(&b"aa"[..]));
    // A version's number is never used again, also after another start.
    assert_eq!(store.catalog().next_plugin_version("main", "late"), 3);
    drop(store);
    let store = open_with(&options(dir.path()));
    assert_eq!(store.catalog().next_plugin_version("main", "late"), 3);
    assert_eq!(store.catalog().next_plugin_version("main", "copy"), 2);
}

#[test]
fn faults_are_a_bounded_list_newest_first() {
    let dir = tempfile::tempdir().unwrap();
    let all = |store: &Store, limit| {
        store.faults(limit, |number, bytes| Ok((number % 2 == 1).then(|| (number, bytes.to_vec())))).unwrap()
    };
    let store = open_with(&options(dir.path()));
    assert!(all(&store, 9).is_empty());
    store.append_faults(&[b"a".to_vec(), b"b".to_vec(), b"c".to_vec()]).unwrap();
    drop(store);
    let store = open_with(&options(dir.path()));
    store.append_faults(&[b"d".to_vec(), b"e".to_vec()]).unwrap();
    assert_eq!(all(&store, 9), [(5, b"e".to_vec()), (3, b"c".to_vec()), (1, b"a".to_vec())]);
    assert_eq!(all(&store, 1), [(5, b"e".to_vec())]);
    for _ in 0..10 {
        store.append_faults(&vec![b"x".to_vec(); 1_000]).unwrap();
    }
    let numbers = store.faults(usize::MAX, |number, _| Ok(Some(number))).unwrap();
    assert_eq!((numbers.len(), numbers[0], numbers[9_999]), (10_000, 10_005, 6));
}

#[test]
fn notes_are_kept_by_kind_and_key() {
    let (dir, store, _table) = with_table(table(1));
    let note = |key: &[u8], value: Option<&[u8]>| (key.to_vec(), value.map(<[u8]>::to_vec));
    store.put_notes("b", &[note(b"2", Some(b"two")), note(b"1", Some(b"one"))], &[]).unwrap();
    store.leave_notes("bc", &[note(b"1", Some(b"other"))]).unwrap();
    store.leave_notes("b", &[note(b"2", None), note(b"3", Some(b""))]).unwrap();
    let crashed = crash(dir.path());
    let due = [(b"1".to_vec(), b"one".to_vec()), (b"3".to_vec(), Vec::new())];
    assert_eq!(store.notes("b").unwrap(), due);
    assert!(store.notes("a").unwrap().is_empty());
    store.close();
    drop(store);
    for dir in [&dir, &crashed] {
        let store = open_with(&options(dir.path()));
        assert_eq!(store.notes("b").unwrap(), due);
        assert_eq!(store.notes("bc").unwrap().len(), 1);
    }
}

#[test]
fn everything_is_there_after_closing_and_after_a_crash() {
    let (dir, store, table) = with_table(table(1));
    let epoch = store.epoch();
    store.meta_put("secret", b"s").unwrap();
    let seq = put(&store, &table, 1, Some("a"));
    let crashed = crash(dir.path());
    store.close();
    assert!(matches!(commit(&store, seq, Vec::new()), Err(CommitError::Store(StoreError::Failed(_)))));
    drop(store);
    for dir in [&dir, &crashed] {
        let store = open_with(&options(dir.path()));
        assert_eq!((store.epoch(), store.applied(), store.failed()), (epoch, seq, false));
        assert_eq!(all(&store, &table), [(1, "a".to_owned())]);
        assert_eq!(store.meta_get("secret").unwrap().as_deref(), Some(&b"s"[..]));
        assert_eq!(store.meta_get("applied").unwrap(), None);
        assert!(put(&store, &table, 2, Some("b")) > seq);
        assert_eq!(log(&store.snapshot(), Seq(0)).unwrap().len(), 3);
    }
}

#[test]
fn rows_survive_flushes_and_compaction_behind_the_prefix_bloom() {
    let (_dir, store, table) = with_table(user_table(1));
    let users: Vec<Scope> = (0..40).map(|i| Scope::User(format!("user{i}"))).collect();
    for (i, scope) in users.iter().enumerate() {
        let snapshot = store.snapshot();
        let writes = (0..5).map(|id| write(&snapshot, &table, scope, id, Some("x"))).collect();
        commit(&store, snapshot.seq(), writes).unwrap();
        if i % 10 == 0 {
            store.inner.flush().unwrap();
        }
    }
    let snapshot = store.snapshot();
    let check = || {
        for scope in &users {
            assert_eq!(rows(&snapshot, &table, scope, KeyRange::all()).len(), 5, "{scope:?}");
            let range =
                KeyRange { start: std::ops::Bound::Excluded(encode_key(&table, &[Value::Int(2)])), ..KeyRange::all() };
            assert_eq!(rows(&snapshot, &table, scope, range).len(), 2, "{scope:?}");
        }
        assert_eq!(rows(&snapshot, &table, &Scope::User("nobody".to_owned()), KeyRange::all()), []);
    };
    check();
    store.inner.flush().unwrap();
    let db = &store.inner.db;
    db.compact_range_cf(family(db, USER_FAMILY), None::<&[u8]>, None::<&[u8]>);
    check();
    let (_, cache, _) = store.memory();
    assert!(cache > 0, "blocks are read through the shared cache");
}

/// The write-ahead log with commits in it.
fn write_ahead_log(path: &Path) -> std::path::PathBuf {
    let logs = std::fs::read_dir(path.join("db")).unwrap().map(|entry| entry.unwrap().path());
    logs.filter(|path| path.extension().is_some_and(|end| end == "log")).max().unwrap()
}

#[test]
fn a_torn_end_is_forgiven_and_damage_before_it_is_not() {
    let (dir, store, table) = with_table(table(1));
    for id in 0..10 {
        put(&store, &table, id, Some("x"));
    }
    let applied = store.applied();

    let torn = crash(dir.path());
    let path = write_ahead_log(torn.path());
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 3).unwrap();
    let reopened = open_with(&options(torn.path()));
    assert_eq!(reopened.applied(), Seq(applied.0 - 1));
    assert_eq!((all(&reopened, &table).len(), log(&reopened.snapshot(), Seq(0)).unwrap().len()), (9, 10));

    let damaged = crash(dir.path());
    let path = write_ahead_log(damaged.path());
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x55;
    std::fs::write(&path, bytes).unwrap();
    let error = Store::open(&options(damaged.path())).err().unwrap();
    assert!(matches!(error, StoreError::Corrupt(_)), "{error}");
}

#[test]
fn a_failed_store_refuses_writes_and_still_reads() {
    let (dir, store, table) = with_table(table(1));
    let seq = put(&store, &table, 1, Some("a"));
    store.inner.fail("a commit could not be written: on purpose".to_owned());
    assert!(store.failed());
    let refused = commit(&store, seq, vec![write(&store.snapshot(), &table, &Scope::Shared, 2, Some("b"))]);
    let told = refused.unwrap_err().to_string();
    assert!(told.contains("on purpose") && told.contains("restart"), "{told}");
    assert!(store.meta_put("k", b"v").is_err());
    assert_eq!(all(&store, &table), [(1, "a".to_owned())]);
    store.close();
    drop(store);
    assert_eq!(all(&open_with(&options(dir.path())), &table), [(1, "a".to_owned())]);
}

const HELD: &str = "TIDEGATE_TEST_HELD_DIRECTORY";

/// The other process of the next test: holds the directory until its standard input ends.
#[test]
fn holds_a_directory_for_another_test() {
    let Some(path) = std::env::var_os(HELD) else { return };
    let _store = Store::open(&options(Path::new(&path))).unwrap();
    println!("{HELD}");
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

#[test]
fn the_directory_belongs_to_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let mut other = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "store::tests::holds_a_directory_for_another_test", "--nocapture"])
        .env(HELD, dir.path())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = std::io::BufReader::new(other.stdout.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains(HELD)));
    let refused = Store::open(&options(dir.path())).err().unwrap();
    assert!(matches!(refused, StoreError::Locked(_)), "{refused}");
    // As after kill -9.
    other.kill().unwrap();
    other.wait().unwrap();
    Store::open(&options(dir.path())).unwrap();
}

#[test]
fn the_directory_belongs_to_one() {
    let (dir, store) = new_store();
    let second = Store::open(&options(dir.path())).err().unwrap();
    assert!(matches!(second, StoreError::Locked(_)), "{second}");
    drop(store);
    Store::open(&options(dir.path())).unwrap();
}

#[test]
fn a_directory_of_a_newer_format_is_refused_with_both_versions() {
    let (dir, store) = new_store();
    store.inner.db.put(meta::FORMAT_KEY, 7u32.to_be_bytes()).unwrap();
    drop(store);
    let error = Store::open(&options(dir.path())).err().unwrap().to_string();
    assert!(error.contains("format 7") && error.contains("up to 2"), "{error}");
}

#[test]
fn a_directory_of_the_first_format_is_taken_over() {
    let (dir, store, table) = with_table(table(1));
    put(&store, &table, 1, Some("kept"));
    store.inner.db.put(meta::FORMAT_KEY, 1u32.to_be_bytes()).unwrap();
    drop(store);
    let store = open_with(&options(dir.path()));
    assert_eq!(all(&store, &table), [(1, "kept".to_owned())]);
    assert_eq!(store.inner.read(meta::FORMAT_KEY).unwrap().unwrap(), meta::FORMAT.to_be_bytes());
}

#[test]
fn a_directory_that_was_rolled_back_is_refused() {
    let (dir, store, table) = with_table(table(1));
    put(&store, &table, 1, Some("a"));
    let old = crash(dir.path());
    put(&store, &table, 2, Some("b"));
    store.close();
    drop(store);
    std::fs::copy(dir.path().join("high-water"), old.path().join("high-water")).unwrap();
    let error = Store::open(&options(old.path())).err().unwrap();
    assert!(matches!(&error, StoreError::Corrupt(why) if why.contains("rolled back")), "{error}");

    std::fs::remove_dir_all(dir.path().join("db")).unwrap();
    let error = Store::open(&options(dir.path())).err().unwrap();
    assert!(matches!(&error, StoreError::Corrupt(why) if why.contains("empty")), "{error}");
}

#[test]
fn the_log_is_trimmed_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path());
    options.log_commits = 16;
    let store = open_with(&options);
    let table = Arc::new(table(1));
    change_catalog(&store, CatalogWrite::PutTable(table.clone())).unwrap();
    let other = NamespaceId(2);
    change_catalog(&store, CatalogWrite::PutNamespace { id: other, name: "other".to_owned() }).unwrap();
    let in_other = |write| {
        let base = store.snapshot().seq();
        let transaction = Transaction { namespace: other, base, rows: Vec::new(), catalog: vec![write], receipt: None };
        block_on(store.commit(transaction)).unwrap()
    };
    let quiet = in_other(CatalogWrite::PutNamespace { id: NamespaceId(3), name: "third".to_owned() });
    let early = store.snapshot();
    assert_eq!(early.log_floor(), Seq(0));
    let mut newest = early.seq();
    for id in 0..40 {
        newest = put(&store, &table, id, Some("x"));
        store.trim_log();
    }
    let now = store.snapshot();
    let floor = now.log_floor();
    assert_eq!(store.log_floor(), floor);
    assert!(floor > quiet && newest.0 - floor.0 >= 16 && newest.0 - floor.0 < 16 + 2, "{floor:?} {newest:?}");
    let kept = log(&now, floor).unwrap();
    assert_eq!(kept.len() as u64, newest.0 - floor.0);
    assert_eq!(kept.first().unwrap().0, Seq(floor.0 + 1));
    let error = log(&now, Seq(floor.0 - 1)).unwrap_err();
    assert!(matches!(error, StoreError::Expired { .. }), "{error}");
    // The older snapshot still has what it had, and the quiet namespace has nothing left.
    assert_eq!(log(&early, Seq(0)).unwrap().len(), 2);
    assert!(now.log(other, floor).next_commit().unwrap().is_none());

    drop((early, now));
    store.close();
    drop(store);
    let store = open_with(&options);
    assert_eq!(store.log_floor(), floor);
    assert_eq!(log(&store.snapshot(), floor).unwrap(), kept);
}

#[test]
fn the_log_is_kept_by_bytes_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions { log_commits: 100_000, log_bytes: 60_000, ..options(dir.path()) };
    let store = open_with(&options);
    let table = Arc::new(table(1));
    change_catalog(&store, CatalogWrite::PutTable(table.clone())).unwrap();
    let text = "x".repeat(100);
    for round in 0..3 {
        for id in 0..300 {
            put(&store, &table, 1000 * round + id, Some(&text));
        }
        store.trim_log();
        let floor = store.log_floor();
        let kept = log(&store.snapshot(), floor).unwrap();
        let bytes: usize = kept.iter().map(|(_, frame)| frame.len()).sum();
        let largest = kept.iter().map(|(_, frame)| frame.len()).max().unwrap();
        // It is cut at marks, which come every 64 commits.
        let (least, most) = (60_000, 60_000 + 64 * largest);
        assert!((least..=most).contains(&bytes), "{bytes} bytes after {floor:?}");
        assert!(round == 0 || floor > Seq(0));
    }
    // What was counted is known again after a restart.
    store.close();
    drop(store);
    let store = open_with(&options);
    let floor = store.log_floor();
    for id in 0..200 {
        put(&store, &table, 10_000 + id, Some(&text));
    }
    store.trim_log();
    assert!(store.log_floor() > floor);
    let left = store.inner.db.iterator(rocksdb::IteratorMode::From(b"k/", rocksdb::Direction::Forward));
    let marks = left.take_while(|entry| entry.as_ref().unwrap().0.starts_with(b"k/")).count();
    assert!(marks < 12, "marks go with what they mark: {marks}");
}

#[test]
fn the_log_is_kept_by_age_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let hour = Duration::from_secs(3_600);
    let store = open_with(&StoreOptions { log_age: hour, ..options(dir.path()) });
    let table = Arc::new(table(1));
    change_catalog(&store, CatalogWrite::PutTable(table.clone())).unwrap();
    let mut first = Seq(0);
    for id in 0..100 {
        first = put(&store, &table, id, Some("x"));
    }
    store.inner.clock.leap(hour.as_micros() as i64 / 2);
    let second = put(&store, &table, 200, Some("x"));
    store.trim_log();
    assert_eq!(store.log_floor(), Seq(0));
    store.inner.clock.leap(hour.as_micros() as i64 * 2 / 3);
    store.trim_log();
    let floor = store.log_floor();
    assert!(floor > Seq(60) && floor <= first, "{floor:?}, {first:?}");
    let kept = log(&store.snapshot(), floor).unwrap();
    assert_eq!(kept.last().unwrap().0, second);
    store.inner.clock.leap(hour.as_micros() as i64);
    store.trim_log();
    assert_eq!(store.log_floor(), second, "a mark is left after a pause");
}

/// An acknowledgement may come before the sync; an event may not.
#[test]
fn events_wait_for_the_sync_in_every_mode() {
    for durability in [Durability::Interval, Durability::Os] {
        let dir = tempfile::tempdir().unwrap();
        // Longer than the test.
        let options = StoreOptions { durability, sync_interval: Duration::from_secs(600), ..options(dir.path()) };
        let store = Store::open(&options).unwrap();
        let (seen, hook) = recorder();
        store.start(hook);
        let table = Arc::new(table(1));
        change_catalog(&store, CatalogWrite::PutTable(table.clone())).unwrap();
        let seq = put(&store, &table, 1, Some("x"));
        assert_eq!((store.applied(), store.durable()), (seq, Seq(0)));
        assert_eq!(all(&store, &table), [(1, "x".to_owned())], "who wrote sees it");
        assert!(seen.lock().unwrap().is_empty());
        // What a killed server leaves behind has it.
        let left = crash(dir.path());
        assert_eq!(all(&open_with(&self::options(left.path())), &table), [(1, "x".to_owned())]);
        // A live query's snapshot is made durable before it is shown.
        store.make_durable(&store.snapshot()).unwrap();
        store.close();
        assert_eq!((store.durable(), seen.lock().unwrap().len()), (seq, 2));
    }
    let dir = tempfile::tempdir().unwrap();
    let soon = Duration::from_millis(1);
    let options = StoreOptions { durability: Durability::Interval, sync_interval: soon, ..options(dir.path()) };
    let store = Store::open(&options).unwrap();
    let (told, seen) = std::sync::mpsc::channel();
    store.start(Box::new(move |commit| {
        let _ = told.send(commit.seq);
    }));
    let table = Arc::new(table(1));
    change_catalog(&store, CatalogWrite::PutTable(table.clone())).unwrap();
    let seq = put(&store, &table, 1, Some("x"));
    for due in 1..=seq.0 {
        assert_eq!(seen.recv_timeout(Duration::from_secs(20)), Ok(Seq(due)), "the sync follows by itself");
    }
    assert_eq!(store.durable(), seq);
}

#[test]
fn a_receipt_is_kept_with_its_write_and_for_its_time() {
    let (dir, store, table) = with_table(table(1));
    let hour = 3_600_000_000;
    let transaction = |snapshot: &Snapshot, id: i64, outcome: u8| Transaction {
        namespace: MAIN,
        base: snapshot.seq(),
        rows: vec![write(snapshot, &table, &Scope::Shared, id, Some("x"))],
        catalog: Vec::new(),
        receipt: Some(Receipt { id: [7; 32], request: [8; 32], outcome: vec![outcome] }),
    };
    let before = store.snapshot();
    let seq = block_on(store.commit(transaction(&before, 1, 1))).unwrap();
    let kept = store.snapshot().receipt(&[7; 32]).unwrap().unwrap();
    assert_eq!((kept.seq, kept.request, kept.outcome), (seq, [8; 32], vec![1]));
    assert_eq!(before.receipt(&[7; 32]).unwrap(), None);
    // Who looked before it was there comes too late, whatever rows it writes.
    let late = block_on(store.commit(transaction(&before, 2, 2)));
    assert!(matches!(late, Err(CommitError::Stale)), "{late:?}");
    // Nothing changes, and it is a commit all the same.
    let now = store.snapshot();
    let empty = Transaction {
        rows: Vec::new(),
        receipt: Some(Receipt { id: [9; 32], request: [8; 32], outcome: vec![] }),
        ..transaction(&now, 3, 3)
    };
    assert!(block_on(store.commit(empty)).unwrap() > seq);
    drop((before, now));
    drop(store);

    let records = |store: &Store| {
        let of = |prefix: &'static [u8]| {
            let entries = store.inner.db.iterator(rocksdb::IteratorMode::From(prefix, rocksdb::Direction::Forward));
            entries.take_while(|entry| entry.as_ref().unwrap().0.starts_with(prefix)).count()
        };
        (of(b"r/"), of(b"e/"))
    };
    let store = open_with(&options(dir.path()));
    assert!(store.snapshot().receipt(&[7; 32]).unwrap().is_some());
    store.inner.clock.leap(23 * hour);
    retention::sweep_receipts(&store.inner).unwrap();
    assert_eq!(records(&store), (2, 2));
    // Too old: as none; and one in its place is not taken for it.
    store.inner.clock.leap(2 * hour);
    assert_eq!(store.snapshot().receipt(&[7; 32]).unwrap(), None);
    block_on(store.commit(transaction(&store.snapshot(), 4, 4))).unwrap();
    retention::sweep_receipts(&store.inner).unwrap();
    assert_eq!(records(&store), (1, 1));
    assert_eq!(store.snapshot().receipt(&[7; 32]).unwrap().unwrap().outcome, [4]);
}

/// Numbers, seqs and what is said, newest first.
fn audited(store: &Store) -> Vec<(u64, Option<Seq>, Vec<u8>)> {
    let records = store.audit(u64::MAX, 1_000).unwrap().into_iter();
    records.map(|record| (record.number, record.seq, record.said)).collect()
}

#[test]
fn what_the_audit_log_says_of_a_commit_is_there_with_it() {
    let (dir, store) = new_store();
    let transaction = |catalog| Transaction {
        namespace: MAIN,
        base: store.snapshot().seq(),
        rows: Vec::new(),
        catalog,
        receipt: None,
    };
    let put = |id: u32| vec![CatalogWrite::PutTable(Arc::new(table(id)))];
    let both = vec![b"one".to_vec(), b"two".to_vec()];
    let first = block_on(store.commit_audited(transaction(put(1)), both)).unwrap();
    // What is refused, or changes nothing, is not said.
    let unknown = vec![CatalogWrite::DropTable(TableId(99))];
    let refused = block_on(store.commit_audited(transaction(unknown), vec![b"refused".to_vec()]));
    assert!(refused.is_err(), "{refused:?}");
    block_on(store.commit_audited(transaction(Vec::new()), vec![b"nothing".to_vec()])).unwrap();
    store.put_notes("a", &[(b"1".to_vec(), None)], &[b"note".to_vec()]).unwrap();
    let number = store.next_audit_number();
    let counted = |said: &[u8]| AuditRecord { number, at: 5, seq: None, said: said.to_vec() };
    store.leave_audit(&[counted(b"x 1")]).unwrap();
    store.leave_audit(&[counted(b"x 2")]).unwrap();
    let due = vec![
        (4, None, b"x 2".to_vec()),
        (3, None, b"note".to_vec()),
        (2, Some(first), b"two".to_vec()),
        (1, Some(first), b"one".to_vec()),
    ];
    assert_eq!(audited(&store), due);
    let page = store.audit(4, 2).unwrap();
    assert_eq!(page.iter().map(|record| record.number).collect::<Vec<_>>(), [3, 2]);
    let crashed = crash(dir.path());
    drop(store);
    for dir in [&dir, &crashed] {
        let store = open_with(&options(dir.path()));
        assert_eq!(audited(&store), due);
        assert_eq!(store.next_audit_number(), 5);
    }
}

#[test]
fn the_audit_log_is_kept_by_number_and_age() {
    let dir = tempfile::tempdir().unwrap();
    let hour = Duration::from_secs(3_600);
    let options = StoreOptions { audit_records: 80, audit_age: hour, ..options(dir.path()) };
    // Not started: it is trimmed here alone.
    let store = Store::open(&options).unwrap();
    let say = |count: usize| (0..count).for_each(|_| store.put_notes("a", &[], &[b"said".to_vec()]).unwrap());
    let on_disk = || {
        let entries = store.inner.db.iterator(rocksdb::IteratorMode::From(b"a/", rocksdb::Direction::Forward));
        entries.take_while(|entry| entry.as_ref().unwrap().0.starts_with(b"a/")).count()
    };
    say(85);
    audit::trim(&store.inner).unwrap();
    assert_eq!((audited(&store).len(), on_disk()), (80, 85), "cut in steps, and not shown");
    say(15);
    audit::trim(&store.inner).unwrap();
    assert_eq!((audited(&store).len(), on_disk()), (80, 80));
    // What is counted on after it was removed does not come back.
    store.leave_audit(&[AuditRecord { number: 7, at: 5, seq: None, said: b"late".to_vec() }]).unwrap();
    assert_eq!(on_disk(), 80);

    store.inner.clock.leap(hour.as_micros() as i64 * 3 / 4);
    say(3);
    audit::trim(&store.inner).unwrap();
    store.inner.clock.leap(hour.as_micros() as i64 / 2);
    audit::trim(&store.inner).unwrap();
    assert_eq!(audited(&store).iter().map(|record| record.0).collect::<Vec<_>>(), [103, 102, 101]);
    // The newest stays: numbers are not given twice.
    store.inner.clock.leap(hour.as_micros() as i64 * 2);
    audit::trim(&store.inner).unwrap();
    assert_eq!((audited(&store).len(), on_disk()), (1, 1));
    drop(store);
    assert_eq!(Store::open(&options).unwrap().next_audit_number(), 104);
}

#[test]
fn too_large_a_commit_is_refused_whole() {
    let (_dir, store, table) = with_table(table(1));
    let snapshot = store.snapshot();
    let text = "x".repeat(600 << 10);
    let rows: Vec<_> = (0..2).map(|id| write(&snapshot, &table, &Scope::Shared, id, Some(&text))).collect();
    let refused = commit(&store, snapshot.seq(), rows.clone());
    assert!(matches!(refused, Err(CommitError::TooLarge { limit, size }) if limit == 1 << 20 && size > limit));
    assert_eq!(all(&store, &table), []);
    assert!(commit(&store, snapshot.seq(), rows[..1].to_vec()).is_ok());
}

#[test]
fn the_queue_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&options(dir.path())).unwrap();
    let table = Arc::new(table(1));
    let snapshot = store.snapshot();
    let text = "x".repeat(900 << 10);
    // Not started: everything waits.
    let waiting: Vec<_> = (0..9)
        .map(|id| {
            let rows = vec![write(&snapshot, &table, &Scope::Shared, id, Some(&text))];
            let (base, catalog) = (snapshot.seq(), Vec::new());
            store.queue.push(Transaction { namespace: MAIN, base, rows, catalog, receipt: None }, Vec::new())
        })
        .collect();
    assert_eq!(waiting.iter().filter(|outcome| outcome.is_ok()).count(), 4);
    assert!(waiting.iter().skip(4).all(|outcome| matches!(outcome, Err(CommitError::Busy))));
    drop(waiting);
    let small = || Transaction { namespace: MAIN, base: Seq(0), rows: Vec::new(), catalog: Vec::new(), receipt: None };
    let outcomes: Vec<_> = (0..1100).map(|_| store.queue.push(small(), Vec::new())).collect();
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1020);

    // Once started, what waited is answered.
    store.start(Box::new(|_| {}));
    for outcome in outcomes.into_iter().flatten() {
        assert_eq!(block_on(outcome).unwrap().unwrap(), Seq(0));
    }
}

#[test]
fn a_transaction_that_contradicts_the_catalog_is_refused() {
    let (_dir, store, known) = with_table(table(1));
    let snapshot = store.snapshot();
    let row = |table: Table, scope: &Scope| RowWrite {
        table: Arc::new(table),
        scope: scope.clone(),
        key: encode_key(&known, &[Value::Int(1)]),
        old: None,
        new: Some(image(1, None)),
    };
    let user = Scope::User("u".to_owned());
    let attempt = |row| commit(&store, snapshot.seq(), vec![row]);
    let newer = Table { schema_version: 2, ..table(1) };
    assert!(matches!(attempt(row(newer, &Scope::Shared)), Err(CommitError::Stale)));
    assert!(matches!(attempt(row(table(7), &Scope::Shared)), Err(CommitError::Stale)));
    assert!(matches!(attempt(row(table(1), &user)), Err(CommitError::Invalid(_))));
    let elsewhere = Table { namespace: NamespaceId(9), ..table(1) };
    assert!(matches!(attempt(row(elsewhere, &Scope::Shared)), Err(CommitError::Invalid(_))));
    let broken = RowWrite { new: Some(vec![1, 2, 3]), ..row(table(1), &Scope::Shared) };
    assert!(matches!(attempt(broken), Err(CommitError::Invalid(_))));
    assert_eq!((all(&store, &known), store.applied()), (Vec::new(), snapshot.seq()));
}

#[test]
fn after_a_panic_on_the_commit_thread_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&options(dir.path())).unwrap();
    store.start(Box::new(|_| panic!("on purpose")));
    change_catalog(&store, CatalogWrite::PutTable(Arc::new(table(1)))).unwrap();
    assert!(matches!(commit(&store, Seq(0), Vec::new()), Err(CommitError::Store(StoreError::Failed(_)))));
    store.close();
    assert!(store.failed());
    assert!(store.meta_put("k", b"v").is_err());
    drop(store);
    // It was durable, and answered, before the hook saw it.
    assert!(open_with(&options(dir.path())).catalog().table("main", "t1").is_some());
}

#[test]
fn rows_of_a_stream_table_stop_showing_at_their_time() {
    let (dir, store, table) = with_table(stream_table(1));
    put(&store, &table, 1, Some("a"));
    store.inner.clock.leap(TTL_MICROS / 2);
    put(&store, &table, 2, Some("b"));
    let key = encode_key(&table, &[Value::Int(1)]);
    let before = store.snapshot();
    let overdue = write(&before, &table, &Scope::Shared, 1, Some("late"));
    assert_eq!(all(&store, &table).len(), 2);
    assert_eq!(rows(&before, &table, &Scope::Shared, KeyRange::all()).len(), 2);
    store.inner.clock.leap(TTL_MICROS / 2);
    assert_eq!(all(&store, &table), [(2, "b".to_owned())]);
    assert_eq!(store.snapshot().get(&table, &Scope::Shared, &key).unwrap(), None);
    // One snapshot is looked at at one time.
    assert_eq!(rows(&before, &table, &Scope::Shared, KeyRange::all()).len(), 2);
    // What was read alive is expired when it is to be written: the writer looks again, and finds the key free.
    let late = commit(&store, before.seq(), vec![overdue]);
    assert!(matches!(late, Err(CommitError::Stale)), "{late:?}");
    let seq = put(&store, &table, 1, Some("again"));
    let frame = log(&store.snapshot(), Seq(seq.0 - 1)).unwrap().remove(0).1;
    assert_eq!(FrameView::parse(&frame).unwrap().sections[0].changes[0].op, Op::Insert);
    assert_eq!(all(&store, &table).len(), 2);
    // What is alive is renewed by a change.
    store.inner.clock.leap(TTL_MICROS / 4);
    put(&store, &table, 2, Some("renewed"));
    store.inner.clock.leap(TTL_MICROS / 2);
    assert_eq!(all(&store, &table).len(), 2);

    // Over an orderly end and over a crash, with a wall clock that knows nothing of all this.
    store.inner.clock.leap(TTL_MICROS / 3);
    assert_eq!(all(&store, &table), [(2, "renewed".to_owned())]);
    let left = crash(dir.path());
    assert_eq!(all(&open_with(&options(left.path())), &table), [(2, "renewed".to_owned())]);
    store.close();
    drop((store, before));
    let store = open_with(&options(dir.path()));
    assert_eq!(all(&store, &table), [(2, "renewed".to_owned())]);
}

#[test]
fn compaction_sweeps_what_expired_long_ago() {
    let (_dir, store, table) = with_table(stream_table(1));
    put(&store, &table, 1, Some("a"));
    let stored = || {
        store.inner.flush().unwrap();
        let family = family(&store.inner.db, STREAM_FAMILY);
        store.inner.db.compact_range_cf(family, None::<&[u8]>, None::<&[u8]>);
        store.inner.db.iterator_cf(family, rocksdb::IteratorMode::Start).count()
    };
    assert_eq!(stored(), 1);
    store.inner.clock.leap(TTL_MICROS + 60_000_000);
    put(&store, &table, 2, Some("b"));
    assert_eq!(all(&store, &table), [(2, "b".to_owned())]);
    assert_eq!(stored(), 2, "somebody may still read it through a snapshot");
    store.inner.clock.leap(600_000_000);
    put(&store, &table, 3, Some("c"));
    assert_eq!(stored(), 2, "the first row is gone");
    assert_eq!(all(&store, &table).len(), 2);
}

#[test]
fn commit_times_never_go_back_over_a_restart() {
    let (dir, store, table) = with_table(table(1));
    let time = |store: &Store, seq: Seq| {
        let frame = log(&store.snapshot(), Seq(seq.0 - 1)).unwrap().remove(0).1;
        FrameView::parse(&frame).unwrap().committed_at
    };
    store.inner.clock.leap(TTL_MICROS);
    let first = time(&store, put(&store, &table, 1, Some("a")));
    drop(store);
    let store = open_with(&options(dir.path()));
    assert!(time(&store, put(&store, &table, 2, Some("b"))) >= first);
}

/// Snapshots taken while catalog and rows change are each consistent in themselves.
#[test]
fn catalog_rows_and_log_of_a_snapshot_belong_together() {
    let (_dir, store) = new_store();
    let writer = {
        let store = store.clone();
        std::thread::spawn(move || {
            for id in 1..60 {
                let table = Arc::new(table(id));
                change_catalog(&store, CatalogWrite::PutTable(table.clone())).unwrap();
                put(&store, &table, i64::from(id), Some("x"));
            }
        })
    };
    loop {
        let done = writer.is_finished();
        let snapshot = store.snapshot();
        let tables = snapshot.catalog().namespace("main").unwrap().tables.len() as u64;
        assert_eq!(tables, snapshot.seq().0.div_ceil(2));
        assert_eq!(log(&snapshot, Seq(0)).unwrap().len() as u64, snapshot.seq().0);
        let newest = snapshot.catalog().table_by_id(TableId(tables as u32));
        if let Some(table) = newest {
            let expected = if snapshot.seq().0 % 2 == 0 { 1 } else { 0 };
            assert_eq!(rows(&snapshot, table, &Scope::Shared, KeyRange::all()).len(), expected);
        }
        if done {
            break;
        }
    }
    writer.join().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Random transactions of random age against a map: what is answered, what is stored and what is logged agree, over
    /// restarts too.
    #[test]
    fn the_store_is_a_map(steps in proptest::collection::vec(
        (0usize..3, proptest::collection::btree_map(0i64..12, proptest::option::of("[a-c]"), 1..4), 0u8..20), 1..40))
    {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open_with(&options(dir.path()));
        let table = Arc::new(table(1));
        change_catalog(&store, CatalogWrite::PutTable(table.clone())).unwrap();
        let mut snapshots = vec![store.snapshot()];
        let mut model: BTreeMap<i64, String> = BTreeMap::new();
        let mut written: BTreeMap<i64, Seq> = BTreeMap::new();
        for (age, rows, restart) in steps {
            let snapshot = snapshots[snapshots.len().saturating_sub(1 + age)].clone();
            let writes = rows.iter().map(|(id, text)| write(&snapshot, &table, &Scope::Shared, *id, text.as_deref()));
            let outcome = commit(&store, snapshot.seq(), writes.collect());
            let stale = rows.keys().any(|id| written.get(id).is_some_and(|seq| *seq > snapshot.seq()));
            prop_assert_eq!(outcome.is_err(), stale);
            if let Ok(seq) = outcome {
                for (id, text) in rows {
                    if model.get(&id) != text.as_ref() {
                        written.insert(id, seq);
                    }
                    match text {
                        Some(text) => model.insert(id, text),
                        None => model.remove(&id),
                    };
                }
            }
            drop(snapshot);
            if restart == 0 {
                snapshots.clear();
                store.close();
                drop(store);
                store = open_with(&options(dir.path()));
            }
            snapshots.push(store.snapshot());
            prop_assert_eq!(all(&store, &table), model.clone().into_iter().collect::<Vec<_>>());
        }
        // The log alone tells the same rows.
        let mut folded = BTreeMap::new();
        for (_, frame) in log(&store.snapshot(), Seq(0)).unwrap() {
            for change in FrameView::parse(&frame).unwrap().sections.iter().flat_map(|section| section.changes.clone()) {
                let (image, _) = change.new.or(change.old).unwrap();
                let id = image.int(0).unwrap();
                match change.op {
                    Op::Delete => folded.remove(&id),
                    Op::Insert | Op::Update => folded.insert(id, image.text(1).unwrap().to_owned()),
                };
            }
        }
        prop_assert_eq!(folded, model);
    }
}
