//! Opening the data directory: RocksDB's options, what a new directory gets, what an old one is held to, the catalog.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rocksdb::compaction_filter::Decision as CompactionDecision;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DBCompressionType, DBRecoveryMode, Direction, IteratorMode,
    LruCacheOptions, Options, SliceTransform, WriteBatch, WriteBufferManager,
};

use super::clock::Clock;
use super::keys::row_prefix_len;
use super::meta::{self, State};
use super::records::{self, CatalogLoader};
use super::{
    Epoch, FAMILIES, ROW_FAMILIES, STREAM_FAMILY, Seq, StoreError, StoreOptions, ddl, high_water, read_error, rows,
    synced,
};
use crate::catalog::{Catalog, DEFAULT_NAMESPACE, NamespaceId, Table};

/// What was found in the directory, or put there.
pub(super) struct Opened {
    pub db: DB,
    pub cache: Cache,
    pub clock: Arc<Clock>,
    pub epoch: Epoch,
    pub state: State,
    pub catalog: Catalog,
}

pub(super) fn open(options: &StoreOptions) -> Result<Opened, StoreError> {
    let path = database_path(&options.path);
    std::fs::create_dir_all(&path).map_err(|error| StoreError::Open {
        path: options.path.clone(),
        reason: format!("the directory cannot be made: {error}"),
    })?;
    let cache = block_cache(options);
    let clock = Clock::new();
    let db = open_database(options, &path, &cache, &clock)?;

    if !is_set_up(&db, &options.path)? {
        if high_water::read(&options.path)?.is_some() {
            return Err(StoreError::Corrupt(format!(
                "the database in {} is empty, but {} says it held commits. Put its files back; or, to begin anew, \
                 remove that file",
                options.path.display(),
                high_water::path(&options.path).display(),
            )));
        }
        set_up(&db)?;
    }
    let epoch = read_epoch(&db)?;
    let mut state = State::decode(&required(&db, meta::STATE_KEY)?)?;
    state.log_floor = state.log_floor.max(decode_floor(read(&db, meta::FLOOR_KEY)?.as_deref())?);
    high_water::check(&options.path, epoch, state.applied)?;
    high_water::write(&options.path, epoch, state.applied)?;
    let mut catalog = load_catalog(&db, state.catalog_version)?;
    remove_unfinished_indexes(&db, &mut catalog)?;
    clock.resume(read_mark(&db)?, state.committed_at);
    Ok(Opened { db, cache, clock, epoch, state, catalog })
}

pub(super) fn database_path(directory: &Path) -> PathBuf {
    directory.join("db")
}

/// One cache for all families, with index and filter blocks in it: what tables there are does not change the bound.
fn block_cache(options: &StoreOptions) -> Cache {
    let mut cache = LruCacheOptions::default();
    cache.set_capacity(options.block_cache_size);
    Cache::new_lru_cache_opts(&cache)
}

fn open_database(options: &StoreOptions, path: &Path, cache: &Cache, clock: &Arc<Clock>) -> Result<DB, StoreError> {
    let families = FAMILIES.map(|name| {
        let mut family = family_options(options, cache, name);
        if name == STREAM_FAMILY {
            sweep_expired(&mut family, clock.clone());
        }
        ColumnFamilyDescriptor::new(name, family)
    });
    DB::open_cf_descriptors(&database_options(options), path, families).map_err(|error| {
        let message = error.into_string();
        // The two ways RocksDB says it: held by another process, or by this one.
        if message.contains("While lock file") || message.contains("lock hold by current process") {
            StoreError::Locked(options.path.clone())
        } else if message.starts_with("Corruption") {
            StoreError::Corrupt(format!("the database in {} does not open: {message}", path.display()))
        } else {
            StoreError::Open { path: options.path.clone(), reason: message }
        }
    })
}

fn database_options(options: &StoreOptions) -> Options {
    let buffers = write_buffer_budget(options);
    let mut db = Options::default();
    db.create_if_missing(true);
    db.create_missing_column_families(true);
    db.set_paranoid_checks(true);
    // A torn last record is a write nobody was told of. Damage before it is not: then we refuse to open.
    db.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    db.set_track_and_verify_wals_in_manifest(true);
    // Counted beside the block cache, not inside it: memtables would push every index block out. No stall: one commit
    // may be larger than the budget, and each family stops at its own buffers anyway.
    db.set_write_buffer_manager(&WriteBufferManager::new_write_buffer_manager(buffers, false));
    // A quiet family must not keep the log of a busy one alive, or a restart would replay all of it.
    db.set_max_total_wal_size(2 * buffers as u64);
    db.set_max_background_jobs(options.max_background_jobs);
    db.set_max_open_files(options.max_open_files);
    // RocksDB's own text log, bounded: 4 MiB.
    db.set_max_log_file_size(1 << 20);
    db.set_keep_log_file_num(4);
    db.set_stats_dump_period_sec(0);
    db
}

/// All memtables together.
fn write_buffer_budget(options: &StoreOptions) -> usize {
    options.write_buffer_size * options.max_write_buffers.max(1) as usize * FAMILIES.len()
}

fn family_options(options: &StoreOptions, cache: &Cache, name: &str) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_cache_index_and_filter_blocks_with_high_priority(true);
    blocks.set_pin_l0_filter_and_index_blocks_in_cache(true);
    // 10 bits a key: one in a hundred absent keys costs a block read.
    blocks.set_bloom_filter(10.0, false);

    let mut family = Options::default();
    family.set_block_based_table_factory(&blocks);
    family.set_write_buffer_size(options.write_buffer_size);
    family.set_max_write_buffer_number(options.max_write_buffers);
    family.set_compression_type(DBCompressionType::Lz4);
    if ROW_FAMILIES.contains(&name) {
        family.set_prefix_extractor(SliceTransform::create(
            "tidegate.namespace-table-user.1",
            |key| &key[..row_prefix_len(key).unwrap_or(key.len())],
            Some(|key| row_prefix_len(key).is_some()),
        ));
    }
    family
}

/// Compaction drops what has long expired. Compaction does not look at snapshots, so a row stays for the longest time
/// that somebody may read through one: no query runs that long, and a live query's snapshot may do without what is past
/// its expiry.
fn sweep_expired(family: &mut Options, clock: Arc<Clock>) {
    family.set_compaction_filter("tidegate.expired.1", move |_: u32, _: &[u8], stored: &[u8]| {
        let gone = rows::expires(stored).is_some_and(|expires| expires.saturating_add(KEPT_EXPIRED) < clock.now());
        if gone { CompactionDecision::Remove } else { CompactionDecision::Keep }
    });
    // Files that no write touches any more are looked at again after this long.
    family.set_periodic_compaction_seconds(SWEEP_SECONDS);
}

/// Ten times the longest deadline a query may be given, in microseconds.
const KEPT_EXPIRED: i64 = 300_000_000;
/// An hour: what has expired costs disk for so long, and every file is rewritten at most so often.
const SWEEP_SECONDS: u64 = 3_600;

/// False for a directory nobody has written to yet.
fn is_set_up(db: &DB, directory: &Path) -> Result<bool, StoreError> {
    let Some(format) = read(db, meta::FORMAT_KEY)? else {
        return match db.iterator(IteratorMode::Start).next() {
            None => Ok(false),
            Some(Err(error)) => Err(read_error(error)),
            Some(Ok(_)) => Err(StoreError::Corrupt(format!(
                "{} is a RocksDB database but not one of tidegate's: it says no format",
                directory.display()
            ))),
        };
    };
    let format = format.try_into().map(u32::from_be_bytes);
    match format {
        Ok(meta::FORMAT) => Ok(true),
        Ok(meta::OLDEST_FORMAT..meta::FORMAT) => {
            db.put_opt(meta::FORMAT_KEY, meta::FORMAT.to_be_bytes(), &synced()).map_err(read_error)?;
            Ok(true)
        }
        Ok(found) => Err(StoreError::Open {
            path: directory.to_owned(),
            reason: format!(
                "it has store format {found}; this tidegate reads formats up to {}. Use the tidegate that wrote it, or a newer one",
                meta::FORMAT
            ),
        }),
        Err(_) => Err(StoreError::Corrupt("the record m/format has the wrong length".to_owned())),
    }
}

/// One synced batch: a crash leaves the directory new or whole.
fn set_up(db: &DB) -> Result<(), StoreError> {
    let main = NamespaceId(1);
    let mut catalog = Catalog::default();
    (catalog.version, catalog.next_table) = (1, 1);
    catalog.put_namespace(main, DEFAULT_NAMESPACE);
    let state =
        State { applied: Seq(0), catalog_version: catalog.version, log_floor: Seq(0), committed_at: 0, logged: 0 };
    let mut batch = WriteBatch::default();
    batch.put(meta::FORMAT_KEY, meta::FORMAT.to_be_bytes());
    batch.put(meta::EPOCH_KEY, rand::random::<u64>().to_be_bytes());
    batch.put(meta::STATE_KEY, state.encode());
    batch.put(meta::CATALOG_KEY, records::encode_catalog(&catalog)?);
    batch.put(meta::namespace_key(main), records::encode_namespace(main, DEFAULT_NAMESPACE)?);
    db.write_opt(batch, &synced()).map_err(read_error)
}

fn read_epoch(db: &DB) -> Result<Epoch, StoreError> {
    let bytes = required(db, meta::EPOCH_KEY)?;
    match bytes.try_into() {
        Ok(bytes) => Ok(Epoch(u64::from_be_bytes(bytes))),
        Err(_) => Err(StoreError::Corrupt("the record m/epoch has the wrong length".to_owned())),
    }
}

fn read_mark(db: &DB) -> Result<i64, StoreError> {
    let Some(mark) = read(db, meta::CLOCK_KEY)? else { return Ok(0) };
    let mark = mark.try_into().map(i64::from_be_bytes);
    mark.map_err(|_| StoreError::Corrupt("the record m/clock has the wrong length".to_owned()))
}

fn load_catalog(db: &DB, version: u64) -> Result<Catalog, StoreError> {
    let mut loader = CatalogLoader::new(version);
    for_each(db, meta::NAMESPACES, |record| loader.namespace(record))?;
    for_each(db, meta::TABLES, |record| loader.table(record))?;
    for_each(db, meta::INDEXES, |record| loader.index(record))?;
    for_each(db, meta::PLUGINS, |record| loader.plugin(record))?;
    for_each(db, meta::RETIRED, |record| loader.retired(record))?;
    loader.finish(&required(db, meta::CATALOG_KEY)?)
}

/// Whoever asked for an index that a crash left half built was never told that it is there.
fn remove_unfinished_indexes(db: &DB, catalog: &mut Catalog) -> Result<(), StoreError> {
    let tables = catalog.namespaces().flat_map(|namespace| namespace.tables.values());
    let tables: Vec<_> = tables.filter(|table| !table.indexes.iter().all(|index| index.is_ready())).cloned().collect();
    if tables.is_empty() {
        return Ok(());
    }
    let mut batch = WriteBatch::default();
    for table in tables {
        let mut finished = Table::clone(&table);
        finished.indexes.retain(|index| index.is_ready());
        for index in table.indexes.iter().filter(|index| !index.is_ready()) {
            let (table, index) = (format!("{}.{}", table.namespace_name, table.name), &index.name);
            tracing::warn!(table, index, "an index was not built to its end and is removed; create it again");
        }
        table.indexes.iter().filter(|index| !index.is_ready()).for_each(|index| {
            ddl::delete_index(db, &mut batch, &table, index);
        });
        catalog.put_table(Arc::new(finished));
    }
    db.write_opt(batch, &synced()).map_err(read_error)
}

fn for_each(db: &DB, prefix: &[u8], mut each: impl FnMut(&[u8]) -> Result<(), StoreError>) -> Result<(), StoreError> {
    for entry in db.iterator(IteratorMode::From(prefix, Direction::Forward)) {
        let (key, value) = entry.map_err(read_error)?;
        if !key.starts_with(prefix) {
            break;
        }
        each(&value)?;
    }
    Ok(())
}

/// What the record `m/floor` says; where there is none, nothing was trimmed by it.
pub(super) fn decode_floor(record: Option<&[u8]>) -> Result<Seq, StoreError> {
    let Some(record) = record else { return Ok(Seq(0)) };
    let floor = record.try_into().map(u64::from_be_bytes).map(Seq);
    floor.map_err(|_| StoreError::Corrupt("the record m/floor has the wrong length".to_owned()))
}

fn read(db: &DB, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
    db.get(key).map_err(read_error)
}

fn required(db: &DB, key: &[u8]) -> Result<Vec<u8>, StoreError> {
    read(db, key)?.ok_or_else(|| StoreError::Corrupt(format!("the record {} is missing", String::from_utf8_lossy(key))))
}
