//! Consistent reads: rows and change log through one RocksDB snapshot, streamed.
//!
//! A [`Snapshot`] owns its RocksDB snapshot and its scans own a share of it, so all of them can be kept, sent to other
//! threads and outlive the request that made them. What RocksDB reports while reading fails the read: no scan ends early
//! in silence.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use rocksdb::{DB, DBRawIterator, ReadOptions};
use self_cell::self_cell;
use wire::Scope;

use super::clock::Clock;
use super::keys::{KeyRange, row_prefix, successor, table_prefix};
use super::meta::{self, State};
use super::open::decode_floor;
use super::receipts::{self, KeptReceipt, ReceiptId};
use super::{DEFAULT_FAMILY, Inner, Seq, StoreError, family, index, read_error, row_family, rows, synced};
use crate::catalog::{Catalog, Index, NamespaceId, Table, TableId};

/// Deleted rows that a brief scan passes over for one that is there: fewer than the rows of its batch.
const MOST_SKIPPED: u64 = 64;

type RocksSnapshot<'a> = rocksdb::Snapshot<'a>;
type RawIterator<'a> = DBRawIterator<'a>;

self_cell!(
    struct View {
        owner: Arc<DB>,
        #[covariant]
        dependent: RocksSnapshot,
    }
);

self_cell!(
    /// An iterator and the snapshot it reads through.
    struct Cursor {
        owner: Arc<Pinned>,
        #[covariant]
        dependent: RawIterator,
    }
);

/// What a RocksDB snapshot says of itself.
pub(super) struct Standing {
    /// RocksDB's own number: whoever has the same sees the same.
    number: u64,
    seq: Seq,
    log_floor: Seq,
    catalog: Arc<Catalog>,
}

struct Pinned {
    view: View,
    standing: Arc<Standing>,
    clock: Arc<Clock>,
    receipt_age_micros: i64,
    /// When this snapshot's reader looked: what had expired by then does not show. Set at the first reading of a stream
    /// table, so that all readings of one snapshot agree.
    looked: OnceLock<i64>,
    /// Why nothing can be read: the snapshot's own place could not be. Every read answers it.
    failure: Option<String>,
}

/// A consistent view of the store; cheap to clone, `Send + Sync + 'static`.
#[derive(Clone)]
pub struct Snapshot {
    pinned: Arc<Pinned>,
}

impl Snapshot {
    pub(super) fn take(inner: &Inner) -> Snapshot {
        loop {
            let view = View::new(inner.db.clone(), |db| db.snapshot());
            let (standing, failure) = match Standing::of(&view, inner) {
                Ok(Some(standing)) => (standing, None),
                // Two catalogs have come since: a newer snapshot is among the newest again.
                Ok(None) => continue,
                Err(error) => (Standing::unread(inner), Some(error.to_string())),
            };
            let (clock, looked) = (inner.clock.clone(), OnceLock::new());
            let receipt_age_micros = inner.receipt_age_micros;
            let pinned = Pinned { view, standing, clock, receipt_age_micros, looked, failure };
            return Snapshot { pinned: Arc::new(pinned) };
        }
    }

    /// `applied_seq`, read through the snapshot itself.
    pub fn seq(&self) -> Seq {
        self.pinned.standing.seq
    }

    /// The catalog at this snapshot (the catalog and the RocksDB snapshot are taken together).
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.pinned.standing.catalog
    }

    /// As [`super::Store::log_floor`], but exactly what [`Snapshot::log`] of this snapshot can serve.
    pub fn log_floor(&self) -> Seq {
        self.pinned.standing.log_floor
    }

    /// The row's image at `table`'s schema version.
    pub fn get(&self, table: &Table, scope: &Scope, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let mut stored_key = row_prefix(table, scope);
        stored_key.extend_from_slice(key);
        self.get_stored(table, &stored_key)
    }

    /// [`Snapshot::get`] by the stored key.
    pub(super) fn get_stored(&self, table: &Table, stored_key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.pinned.check()?;
        let view = &self.pinned.view;
        let family = row_family(view.borrow_owner(), table.kind);
        let stored = view
            .borrow_dependent()
            .get_pinned_cf_opt(family, stored_key, ReadOptions::default())
            .map_err(read_error)?;
        let Some(stored) = stored.filter(|stored| !self.pinned.is_expired(stored)) else { return Ok(None) };
        let mut buffer = Vec::new();
        let image = rows::open_row(table, &stored, &mut buffer)?;
        Ok(Some(image.to_vec()))
    }

    /// The receipt of a write, unless it is too old.
    pub fn receipt(&self, id: &ReceiptId) -> Result<Option<KeptReceipt>, StoreError> {
        self.pinned.check()?;
        let view = &self.pinned.view;
        let default = family(view.borrow_owner(), DEFAULT_FAMILY);
        let key = receipts::receipt_key(id);
        let record = view.borrow_dependent().get_pinned_cf(default, key).map_err(read_error)?;
        let kept = record.map(|record| receipts::decode(&record)).transpose()?;
        let oldest = self.pinned.clock.now().saturating_sub(self.pinned.receipt_age_micros);
        Ok(kept.filter(|kept| kept.committed_at > oldest))
    }

    /// Rows of one table and scope in key order.
    pub fn scan(&self, table: &Arc<Table>, scope: &Scope, range: KeyRange) -> RowScan {
        self.scan_rows(table, scope, &range, ReadOptions::default())
    }

    /// The same for a thread that must not be kept: an error where very many deleted rows lie before the next one.
    pub fn scan_briefly(&self, table: &Arc<Table>, scope: &Scope, range: &KeyRange) -> RowScan {
        let mut options = ReadOptions::default();
        options.set_max_skippable_internal_keys(MOST_SKIPPED);
        self.scan_rows(table, scope, range, options)
    }

    fn scan_rows(&self, table: &Arc<Table>, scope: &Scope, range: &KeyRange, options: ReadOptions) -> RowScan {
        let prefix = row_prefix(table, scope);
        let (cursor, place) = self.scan_range(table, &prefix, range, options);
        let (table, lifted) = (table.clone(), Vec::new());
        RowScan { cursor, place, table, prefix_len: prefix.len(), lifted, expires: None }
    }

    /// Rows of one table and scope by an index that is in use. Rows come in no order that anybody should rely on: some
    /// thousand entries at a time are read, and their rows fetched in key order, near ones together.
    pub fn scan_index(&self, table: &Arc<Table>, index: &Arc<Index>, scope: &Scope, range: &KeyRange) -> IndexScan {
        let rows = row_prefix(table, scope);
        let prefix = index::entry_prefix(table, index, &rows);
        let (cursor, place) = self.scan_range(table, &prefix, range, ReadOptions::default());
        IndexScan {
            cursor,
            place,
            snapshot: self.clone(),
            table: table.clone(),
            index: index.clone(),
            prefix_len: prefix.len(),
            rows,
            keys: Vec::new().into_iter(),
            entries: FIRST_ENTRIES,
            row: (Vec::new(), Vec::new()),
        }
    }

    /// A range of the keys behind one prefix of table (or index) and scope, and where in it to begin.
    fn scan_range(&self, table: &Table, prefix: &[u8], range: &KeyRange, mut options: ReadOptions) -> (Cursor, Place) {
        let (start, end) = range.stored(prefix);
        // The range never leaves the first three parts of the key: the prefix bloom may answer.
        options.set_prefix_same_as_start(true);
        options.set_iterate_upper_bound(end.clone());
        let cursor =
            Cursor::new(self.pinned.clone(), |pinned| pinned.iterate(row_family(pinned.db(), table.kind), options));
        let place = if start < end { Place::Before(start) } else { Place::End };
        (cursor, place)
    }

    /// The key of a row that has these values in a unique index; there is one at most.
    pub fn find_in_index(
        &self,
        table: &Arc<Table>,
        index: &Arc<Index>,
        scope: &Scope,
        values: Vec<u8>,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let mut scan = self.scan_index(table, index, scope, &KeyRange::prefix(values));
        scan.fill(1)?;
        Ok(scan.keys.next().map(|stored| stored[scan.rows.len()..].to_vec()))
    }

    /// The rows of all scopes, by their stored keys, after this one.
    pub(super) fn scan_table(&self, table: &Arc<Table>, after: &[u8]) -> RowScan {
        let prefix = table_prefix(table.namespace, table.id);
        let start = if after.is_empty() { prefix.clone() } else { [after, &[0]].concat() };
        let cursor = self.scan_ids(table, &prefix);
        // The whole key is given: all of it is stored, and nothing is cut off.
        let (table, lifted) = (table.clone(), Vec::new());
        RowScan { cursor, place: Place::Before(start), table, prefix_len: 0, lifted, expires: None }
    }

    /// The stored entries of an index, of all scopes.
    pub(super) fn scan_entries(&self, table: &Arc<Table>, index: &Index) -> EntryScan {
        let prefix = table_prefix(table.namespace, TableId(index.id.0));
        EntryScan { cursor: self.scan_ids(table, &prefix), place: Place::Before(prefix) }
    }

    /// Everything that starts with namespace and table (or index) id: wider than a prefix that the bloom filter knows.
    fn scan_ids(&self, table: &Table, prefix: &[u8]) -> Cursor {
        let mut options = ReadOptions::default();
        options.set_total_order_seek(true);
        if let Some(end) = successor(prefix) {
            options.set_iterate_upper_bound(end);
        }
        Cursor::new(self.pinned.clone(), |pinned| pinned.iterate(row_family(pinned.db(), table.kind), options))
    }

    /// The same rows, last first.
    pub fn scan_back(&self, table: &Arc<Table>, scope: &Scope, range: KeyRange) -> RowScan {
        let prefix = row_prefix(table, scope);
        let (start, end) = range.stored(&prefix);
        let mut options = ReadOptions::default();
        // Backwards the prefix bloom is of no use: both ends bound the scan instead.
        options.set_total_order_seek(true);
        options.set_iterate_lower_bound(start.clone());
        options.set_iterate_upper_bound(end.clone());
        let cursor =
            Cursor::new(self.pinned.clone(), |pinned| pinned.iterate(row_family(pinned.db(), table.kind), options));
        let place = if start < end { Place::BehindAll } else { Place::End };
        let (table, lifted) = (table.clone(), Vec::new());
        RowScan { cursor, place, table, prefix_len: prefix.len(), lifted, expires: None }
    }

    /// Commits of one namespace after `after`, in order, as far as this snapshot sees. Where the log does not reach
    /// back to `after` any more, the first read says [`StoreError::Expired`].
    pub fn log(&self, namespace: NamespaceId, after: Seq) -> LogScan {
        let mut options = ReadOptions::default();
        options.set_total_order_seek(true);
        if let Some(end) = successor(&meta::log_prefix(namespace)) {
            options.set_iterate_upper_bound(end);
        }
        let cursor =
            Cursor::new(self.pinned.clone(), |pinned| pinned.iterate(family(pinned.db(), DEFAULT_FAMILY), options));
        let place = match after.0.checked_add(1) {
            Some(first) => Place::Before(meta::log_key(namespace, Seq(first))),
            None => Place::End,
        };
        LogScan { cursor, place, after }
    }
}

impl Pinned {
    fn db(&self) -> &DB {
        self.view.borrow_owner()
    }

    fn iterate<'a>(&'a self, family: &rocksdb::ColumnFamily, options: ReadOptions) -> RawIterator<'a> {
        self.view.borrow_dependent().raw_iterator_cf_opt(family, options)
    }

    fn is_expired(&self, stored: &[u8]) -> bool {
        rows::expires(stored).is_some_and(|expires| expires <= *self.looked.get_or_init(|| self.look()))
    }

    fn look(&self) -> i64 {
        let keep = |mark: i64| match self.db().put_opt(meta::CLOCK_KEY, mark.to_be_bytes(), &synced()) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "the time that rows expire by cannot be kept; if the clock is set back, a restart \
                                        may show expired rows again");
                false
            }
        };
        self.clock.read(keep)
    }

    fn check(&self) -> Result<(), StoreError> {
        match &self.failure {
            None => Ok(()),
            Some(why) => Err(StoreError::Io(std::io::Error::other(why.clone()))),
        }
    }
}

impl Standing {
    /// Read through the snapshot, unless the one before it was at the same place. `None`: its catalog is known no more.
    fn of(view: &View, inner: &Inner) -> Result<Option<Arc<Standing>>, StoreError> {
        let number = view.borrow_dependent().sequence_number();
        let newest = inner.standing.load();
        if let Some(newest) = newest.as_ref().filter(|newest| newest.number == number) {
            return Ok(Some(newest.clone()));
        }
        let state = read_state(view)?;
        // Loaded after the snapshot was taken: the committer announces a catalog before it writes it, so the snapshot's
        // own is among the announced, unless two more have come since.
        let announced = inner.catalogs.load();
        let catalog = announced.iter().find(|catalog| catalog.version == state.catalog_version).cloned();
        let Some(catalog) = catalog else { return Ok(None) };
        let standing = Arc::new(Standing { number, seq: state.applied, log_floor: state.log_floor, catalog });
        inner.standing.store(Some(standing.clone()));
        Ok(Some(standing))
    }

    /// Of a snapshot that cannot be read: the store's, as it is known without.
    fn unread(inner: &Inner) -> Arc<Standing> {
        let state = inner.state();
        let (seq, log_floor, catalog) = (state.applied, state.log_floor, inner.catalog.load_full());
        Arc::new(Standing { number: 0, seq, log_floor, catalog })
    }
}

fn read_state(view: &View) -> Result<State, StoreError> {
    let family = family(view.borrow_owner(), DEFAULT_FAMILY);
    let read = |key| view.borrow_dependent().get_pinned_cf(family, key).map_err(read_error);
    let Some(state) = read(meta::STATE_KEY)? else {
        return Err(StoreError::Corrupt("the record m/state is missing".to_owned()));
    };
    let state = State::decode(&state)?;
    let floor = decode_floor(read(meta::FLOOR_KEY)?.as_deref())?;
    Ok(State { log_floor: state.log_floor.max(floor), ..state })
}

/// Where a scan stands. Creating a scan touches no data; its first read does.
enum Place {
    /// Not started: seek there first.
    Before(Vec<u8>),
    On,
    /// As the first two, for a scan from the end.
    BehindAll,
    OnBack,
    End,
}

impl Cursor {
    /// Moves to the next entry. False at the end; then, and only then, the iterator's status was good.
    fn advance(&mut self, place: &mut Place) -> Result<bool, StoreError> {
        self.borrow_owner().check()?;
        let from = std::mem::replace(place, Place::End);
        let back = matches!(from, Place::BehindAll | Place::OnBack);
        let status = self.with_dependent_mut(|_, iterator| {
            match from {
                Place::Before(key) => iterator.seek(key),
                Place::On => iterator.next(),
                Place::BehindAll => iterator.seek_to_last(),
                Place::OnBack => iterator.prev(),
                Place::End => return Ok(false),
            }
            if iterator.valid() { Ok(true) } else { iterator.status().map(|()| false) }
        });
        if matches!(status, Ok(true)) {
            *place = if back { Place::OnBack } else { Place::On };
        }
        status.map_err(read_error)
    }
}

/// An encoded key and a row image.
pub type KeyAndImage<'a> = (&'a [u8], &'a [u8]);

/// An owned, streaming row iterator (`Send`). Not a std `Iterator`: rows are borrowed from RocksDB's block.
pub struct RowScan {
    cursor: Cursor,
    place: Place,
    table: Arc<Table>,
    prefix_len: usize,
    /// The current row, where it was stored at another schema version.
    lifted: Vec<u8>,
    /// Of the current row.
    expires: Option<i64>,
}

impl RowScan {
    /// The next row: its encoded key (as [`super::keys::encode_key`]) and its image at the table's schema version.
    pub fn next_row(&mut self) -> Result<Option<KeyAndImage<'_>>, StoreError> {
        loop {
            if !self.cursor.advance(&mut self.place)? {
                return Ok(None);
            }
            let Some((_, stored)) = self.cursor.borrow_dependent().item() else { return Ok(None) };
            if !self.cursor.borrow_owner().is_expired(stored) {
                self.expires = rows::expires(stored);
                break;
            }
        }
        let Some((key, stored)) = self.cursor.borrow_dependent().item() else { return Ok(None) };
        let image = rows::open_row(&self.table, stored, &mut self.lifted)?;
        Ok(Some((&key[self.prefix_len..], image)))
    }

    /// When the row that was read last stops showing (microseconds since 1970); `None`: never.
    pub fn expires(&self) -> Option<i64> {
        self.expires
    }
}

/// Entries read before their rows are fetched: that many keys, or bytes of them. Fewer at first, four times as many each
/// time: whoever wants a few rows does not wait for a thousand entries.
const FIRST_ENTRIES: usize = 64;
const ENTRIES: usize = 1_024;
const ENTRY_BYTES: usize = 256 << 10;

/// An owned, streaming iterator over the rows that an index names (`Send`).
pub struct IndexScan {
    cursor: Cursor,
    place: Place,
    snapshot: Snapshot,
    table: Arc<Table>,
    index: Arc<Index>,
    prefix_len: usize,
    /// What the stored keys of the rows start with.
    rows: Vec<u8>,
    /// Stored keys of rows still to be fetched.
    keys: std::vec::IntoIter<Vec<u8>>,
    /// Entries to read next.
    entries: usize,
    /// The current row: its key and image.
    row: (Vec<u8>, Vec<u8>),
}

impl IndexScan {
    /// The next row: its encoded key and its image at the table's schema version.
    pub fn next_row(&mut self) -> Result<Option<KeyAndImage<'_>>, StoreError> {
        if self.keys.len() == 0 {
            self.fill(self.entries)?;
            self.entries = (self.entries * 4).min(ENTRIES);
        }
        let Some(stored) = self.keys.next() else { return Ok(None) };
        let image = self.snapshot.get_stored(&self.table, &stored)?.ok_or_else(|| {
            StoreError::Corrupt(format!("index {} names a row that table {} has not", self.index.name, self.table.name))
        })?;
        self.row = (stored[self.rows.len()..].to_vec(), image);
        Ok(Some((&self.row.0, &self.row.1)))
    }

    fn fill(&mut self, most: usize) -> Result<(), StoreError> {
        let (mut keys, mut bytes) = (Vec::new(), 0);
        while keys.len() < most && bytes < ENTRY_BYTES && self.cursor.advance(&mut self.place)? {
            let Some(entry) = self.cursor.borrow_dependent().key() else { break };
            let entry = &entry[self.prefix_len..];
            let (values, _) = index::split(&self.table, &self.index, entry)
                .ok_or_else(|| StoreError::Corrupt(format!("an entry of index {} cannot be read", self.index.name)))?;
            let stored = [&self.rows, &entry[values..]].concat();
            bytes += stored.len();
            keys.push(stored);
        }
        keys.sort_unstable();
        self.keys = keys.into_iter();
        Ok(())
    }
}

pub(super) struct EntryScan {
    cursor: Cursor,
    place: Place,
}

impl EntryScan {
    pub fn next_key(&mut self) -> Result<Option<&[u8]>, StoreError> {
        if !self.cursor.advance(&mut self.place)? {
            return Ok(None);
        }
        Ok(self.cursor.borrow_dependent().key())
    }
}

/// An owned, streaming iterator over the change log (`Send`).
pub struct LogScan {
    cursor: Cursor,
    place: Place,
    after: Seq,
}

impl LogScan {
    pub fn next_commit(&mut self) -> Result<Option<(Seq, Bytes)>, StoreError> {
        let floor = self.cursor.borrow_owner().standing.log_floor;
        if self.after < floor {
            return Err(StoreError::Expired { position: self.after, floor });
        }
        if !self.cursor.advance(&mut self.place)? {
            return Ok(None);
        }
        let Some((key, frame)) = self.cursor.borrow_dependent().item() else { return Ok(None) };
        match meta::read_log_key(key) {
            Some((_, seq)) => Ok(Some((seq, Bytes::copy_from_slice(frame)))),
            None => Err(StoreError::Corrupt("the change log has a key that is none of its own".to_owned())),
        }
    }
}
