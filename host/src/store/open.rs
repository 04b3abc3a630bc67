//! Opening the data directory: RocksDB's options, what a new directory gets, what an old one is held to, the catalog.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DBCompressionType, DBRecoveryMode, Direction, IteratorMode,
    LruCacheOptions, Options, SliceTransform, WriteBatch, WriteBufferManager,
};

use super::keys::{row_prefix_len, successor};
use super::meta::{self, CatalogLoader, State};
use super::{
    DEFAULT_FAMILY, Epoch, FAMILIES, ROW_FAMILIES, Seq, StoreError, StoreOptions, family, high_water, read_error,
    synced,
};
use crate::catalog::{Catalog, DEFAULT_NAMESPACE, NamespaceId};

/// What was found in the directory, or put there.
pub(super) struct Opened {
    pub db: DB,
    pub cache: Cache,
    pub epoch: Epoch,
    pub state: State,
    pub catalog: Catalog,
    /// The newest commit in the change log of each namespace that has any there.
    pub logs: BTreeMap<NamespaceId, Seq>,
}

pub(super) fn open(options: &StoreOptions) -> Result<Opened, StoreError> {
    let path = database_path(&options.path);
    std::fs::create_dir_all(&path).map_err(|error| StoreError::Open {
        path: options.path.clone(),
        reason: format!("the directory cannot be made: {error}"),
    })?;
    let cache = block_cache(options);
    let db = open_database(options, &path, &cache)?;

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
    let state = State::decode(&required(&db, meta::STATE_KEY)?)?;
    high_water::check(&options.path, epoch, state.applied)?;
    high_water::write(&options.path, epoch, state.applied)?;
    let catalog = load_catalog(&db, state.catalog_version)?;
    let logs = find_logs(&db)?;
    Ok(Opened { db, cache, epoch, state, catalog, logs })
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

fn open_database(options: &StoreOptions, path: &Path, cache: &Cache) -> Result<DB, StoreError> {
    let families = FAMILIES.map(|name| ColumnFamilyDescriptor::new(name, family_options(options, cache, name)));
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
        Ok(found) => Err(StoreError::Open {
            path: directory.to_owned(),
            reason: format!(
                "it has store format {found}; this tidegate reads format {}. Use the tidegate that wrote it, or a newer one",
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
    let state = State { applied: Seq(0), catalog_version: catalog.version, log_floor: Seq(0) };
    let mut batch = WriteBatch::default();
    batch.put(meta::FORMAT_KEY, meta::FORMAT.to_be_bytes());
    batch.put(meta::EPOCH_KEY, rand::random::<u64>().to_be_bytes());
    batch.put(meta::STATE_KEY, state.encode());
    batch.put(meta::CATALOG_KEY, meta::encode_catalog(&catalog)?);
    batch.put(meta::namespace_key(main), meta::encode_namespace(main, DEFAULT_NAMESPACE)?);
    db.write_opt(batch, &synced()).map_err(read_error)
}

fn read_epoch(db: &DB) -> Result<Epoch, StoreError> {
    let bytes = required(db, meta::EPOCH_KEY)?;
    match bytes.try_into() {
        Ok(bytes) => Ok(Epoch(u64::from_be_bytes(bytes))),
        Err(_) => Err(StoreError::Corrupt("the record m/epoch has the wrong length".to_owned())),
    }
}

fn load_catalog(db: &DB, version: u64) -> Result<Catalog, StoreError> {
    let mut loader = CatalogLoader::new(version);
    for_each(db, meta::NAMESPACES, |record| loader.namespace(record))?;
    for_each(db, meta::TABLES, |record| loader.table(record))?;
    for_each(db, meta::PLUGINS, |record| loader.plugin(record))?;
    for_each(db, meta::RETIRED, |record| loader.retired(record))?;
    loader.finish(&required(db, meta::CATALOG_KEY)?)
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

/// Two seeks a namespace, however long its log is.
fn find_logs(db: &DB) -> Result<BTreeMap<NamespaceId, Seq>, StoreError> {
    let mut logs = BTreeMap::new();
    let mut cursor = db.raw_iterator_cf(family(db, DEFAULT_FAMILY));
    cursor.seek(meta::LOGS);
    while let Some((namespace, _)) = cursor.key().and_then(meta::read_log_key) {
        cursor.seek_for_prev(meta::log_key(namespace, Seq(u64::MAX)));
        if let Some((_, newest)) = cursor.key().and_then(meta::read_log_key) {
            logs.insert(namespace, newest);
        }
        match successor(&meta::log_prefix(namespace)) {
            Some(next) => cursor.seek(next),
            None => break,
        }
    }
    cursor.status().map_err(read_error)?;
    Ok(logs)
}

fn read(db: &DB, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
    db.get(key).map_err(read_error)
}

fn required(db: &DB, key: &[u8]) -> Result<Vec<u8>, StoreError> {
    read(db, key)?.ok_or_else(|| StoreError::Corrupt(format!("the record {} is missing", String::from_utf8_lossy(key))))
}
