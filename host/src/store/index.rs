//! Indexes: the bytes of their entries, what a change does to them, building one while writes go on.
//!
//! ```text
//! namespace id   u32, big-endian
//! index id       u32, big-endian; from the same numbers as table ids, so an index lies beside the tables
//! user id        as in a row's key: an index of a user table is one index for each user
//! values         for each column 0x00 (NULL) or 0x01 and the value as in a key
//! row key        the key columns of the row
//! ```
//!
//! An entry's value is empty: the row is found by its key. Values sort as they do in keys, NULL before all.
//!
//! A new index is *building*: every commit keeps it up, and [`Store::fill_index`] adds the rows that were there before, a
//! bounded piece at a time, through the committer. The committer leaves out rows that were written since a piece was
//! read: their writers have made the entries. Then [`Store::verify_index`] compares the whole index with the whole table
//! at one snapshot. A unique index is *verifying* in between, when commits are held to it already: a duplicate that was
//! not there before cannot come any more. An index that a crash left half built is taken away when the store opens.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;

use wire::{ImageRef, Value};

use super::keys::{put_value, row_prefix_len, table_prefix, value_len};
use super::snapshot::Snapshot;
use super::{CommitError, Seq, Store, StoreError};
use crate::catalog::{Index, IndexId, IndexState, Table, TableId};

const NULL: u8 = 0;
const VALUE: u8 = 1;

/// A piece of a build: so many rows, or so many bytes of entries. A sync is then shared by some thousand rows, and other
/// commits wait for no more than one piece.
const PIECE_ROWS: usize = 2_048;
const PIECE_BYTES: usize = 1 << 20;
/// Rows between two looks at whether the build shall go on.
const STRIDE: u64 = 1_024;

/// What is to be added to an index that is being built.
#[derive(Debug)]
pub(super) struct Piece {
    pub table: TableId,
    pub index: IndexId,
    /// The seq that the rows were read at.
    pub base: Seq,
    pub entries: Vec<PieceEntry>,
}

/// Stored keys, both.
#[derive(Debug)]
pub(super) struct PieceEntry {
    pub row: Vec<u8>,
    pub entry: Vec<u8>,
}

/// Why an index could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Two rows of one scope have these values (in the order of the index's columns).
    #[error("two rows have the same values")]
    Duplicate(Vec<Value>),
    #[error("the index or its table was dropped while it was built")]
    Gone,
    #[error("the build was given up")]
    Stopped,
    /// Our own bug: the index does not hold what the table does.
    #[error("the index does not hold what the table does: {0}")]
    Wrong(String),
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Encodes leading column values of an index: what all entries with these values start with, in any scope.
///
/// # Panics
///
/// On a value of another kind than its column's, and on more values than columns, as [`super::keys::encode_key`] does.
pub fn encode_values(table: &Table, index: &Index, values: &[Value]) -> Vec<u8> {
    assert!(values.len() <= index.columns.len(), "{} has {} columns", index.name, index.columns.len());
    let mut out = Vec::with_capacity(16 * values.len());
    for (id, value) in index.columns.iter().zip(values) {
        let column = table.column_by_id(*id).expect("indexed columns exist");
        put(&mut out, column.ty.kind(), value)
            .unwrap_or_else(|| panic!("{value:?} cannot be in column {}.{}", table.name, column.name));
    }
    out
}

/// The smallest bytes of entries that have these leading values and then something that is not NULL.
pub fn beyond_nulls(mut values: Vec<u8>) -> Vec<u8> {
    values.push(VALUE);
    values
}

/// What a row of `table` has in an index.
pub struct IndexValues {
    /// Without the row's key.
    pub bytes: Vec<u8>,
    /// NULL is not equal to NULL: such a row is in nobody's way in a unique index.
    pub has_null: bool,
}

pub fn index_values(table: &Table, index: &Index, image: &ImageRef<'_>) -> Result<IndexValues, StoreError> {
    let mut values = IndexValues { bytes: Vec::with_capacity(16 * index.columns.len()), has_null: false };
    for value in column_values(table, index, image) {
        let (kind, value) = value?;
        values.has_null |= value == Value::Null;
        put(&mut values.bytes, kind, &value).ok_or_else(|| damaged(table))?;
    }
    Ok(values)
}

fn column_values<'a>(
    table: &'a Table,
    index: &'a Index,
    image: &'a ImageRef<'_>,
) -> impl Iterator<Item = Result<(wire::Kind, Value), StoreError>> {
    index.columns.iter().map(|id| {
        let column = table.column_by_id(*id).ok_or_else(|| damaged(table))?;
        let value = image.value(*id, column.ty).map_err(|_| damaged(table))?;
        Ok((column.ty.kind(), value))
    })
}

fn put(out: &mut Vec<u8>, kind: wire::Kind, value: &Value) -> Option<()> {
    match value {
        Value::Null => {
            out.push(NULL);
            Some(())
        }
        value => {
            out.push(VALUE);
            put_value(out, kind, value)
        }
    }
}

/// The values at the beginning of an entry (without its prefix): how many bytes they are, and whether one is NULL. The
/// row's key follows.
pub(super) fn split(table: &Table, index: &Index, entry: &[u8]) -> Option<(usize, bool)> {
    let (mut at, mut has_null) = (0, false);
    for id in &index.columns {
        let kind = table.column_by_id(*id)?.ty.kind();
        let marker = *entry.get(at)?;
        has_null |= marker == NULL;
        at += 1;
        if marker != NULL {
            at += value_len(kind, entry.get(at..)?)?;
        }
    }
    Some((at, has_null))
}

/// What all entries of an index start with that are in the scope of a row with this stored key.
pub(super) fn entry_prefix(table: &Table, index: &Index, row_prefix: &[u8]) -> Vec<u8> {
    let mut out = table_prefix(table.namespace, TableId(index.id.0));
    let user = row_prefix.get(out.len()..).unwrap_or_default();
    out.extend_from_slice(user);
    out
}

/// What a change of one row does to one index: stored keys.
pub(super) struct EntryChange {
    pub delete: Option<Vec<u8>>,
    pub put: Option<Vec<u8>>,
    /// Values that the row claims for itself alone, in its scope: a key that conflicts are found by.
    pub claim: Option<Vec<u8>>,
}

/// `None`: the change leaves the index as it is. `key` is the row's own, without `row_prefix`.
pub(super) fn entry_change(
    table: &Table,
    index: &Index,
    row_prefix: &[u8],
    key: &[u8],
    old: Option<&[u8]>,
    new: Option<&[u8]>,
) -> Result<Option<EntryChange>, StoreError> {
    let values = |image: &[u8]| {
        let (image, ..) = ImageRef::parse(image).map_err(|_| damaged(table))?;
        index_values(table, index, &image)
    };
    let (old, new) = (old.map(values).transpose()?, new.map(values).transpose()?);
    let same = old.as_ref().zip(new.as_ref()).is_some_and(|(old, new)| old.bytes == new.bytes);
    // While an index is being built, the entry of the old row may not be there yet, and the build leaves out every row
    // that is written meanwhile: so the writer makes it, also where nothing about it changes.
    if same && index.state != IndexState::Building {
        return Ok(None);
    }
    let prefix = entry_prefix(table, index, row_prefix);
    let entry = |values: &IndexValues| [prefix.as_slice(), &values.bytes, key].concat();
    let claimed = new.as_ref().filter(|new| index.is_enforced() && !new.has_null);
    Ok(Some(EntryChange {
        delete: old.as_ref().filter(|_| !same).map(entry),
        claim: claimed.map(|new| [prefix.as_slice(), &new.bytes].concat()),
        put: new.as_ref().map(entry),
    }))
}

fn damaged(table: &Table) -> StoreError {
    StoreError::Corrupt(format!("a row of {}.{} cannot be read", table.namespace_name, table.name))
}

impl Store {
    /// Adds every row to an index that is building; commits go on meanwhile. Blocks. What is `stopped` stays half built.
    pub fn fill_index(&self, table: TableId, index: IndexId, stopped: &dyn Fn() -> bool) -> Result<(), BuildError> {
        let mut after = Vec::new();
        loop {
            if stopped() {
                return Err(BuildError::Stopped);
            }
            let (piece, last) = self.read_piece(table, index, &after)?;
            let Some(last) = last else { return Ok(()) };
            let outcome = match self.queue.push_piece(piece) {
                Ok(outcome) => outcome.blocking_recv().unwrap_or_else(|_| Err(self.inner.refusal().into())),
                Err(error) => Err(error),
            };
            match outcome {
                Ok(_) => after = last,
                // So much was written meanwhile that nobody knows any more which rows: read the piece again.
                Err(CommitError::Stale) => {}
                Err(CommitError::Invalid(_)) => return Err(BuildError::Gone),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next rows, and the stored key of the last one.
    pub(super) fn read_piece(
        &self,
        table: TableId,
        index: IndexId,
        after: &[u8],
    ) -> Result<(Piece, Option<Vec<u8>>), BuildError> {
        let snapshot = self.snapshot();
        let (table, index) = find(snapshot.catalog(), table, index)?;
        let mut piece = Piece { table: table.id, index: index.id, base: snapshot.seq(), entries: Vec::new() };
        let mut rows = snapshot.scan_table(&table, after);
        let mut bytes = 0;
        while piece.entries.len() < PIECE_ROWS
            && bytes < PIECE_BYTES
            && let Some((stored, image)) = rows.next_row()?
        {
            let entry = entry_of(&table, &index, stored, image)?;
            bytes += stored.len() + entry.len();
            piece.entries.push(PieceEntry { row: stored.to_vec(), entry });
        }
        let last = piece.entries.last().map(|last| last.row.clone());
        Ok((piece, last))
    }

    /// Compares the index with the table at one snapshot, and looks for duplicates if it is unique. Blocks.
    pub fn verify_index(&self, table: TableId, index: IndexId, stopped: &dyn Fn() -> bool) -> Result<(), BuildError> {
        let snapshot = self.snapshot();
        let (table, index) = find(snapshot.catalog(), table, index)?;
        let hasher = RandomState::new();
        let (mut expected, mut found) = (Digest::default(), Digest::default());

        let mut entries = snapshot.scan_entries(&table, &index);
        let mut before: Vec<u8> = Vec::new();
        while let Some(entry) = entries.next_key()? {
            found.add(&hasher, entry, stopped)?;
            if !index.unique {
                continue;
            }
            let start = row_prefix_len(entry).ok_or_else(|| damaged(&table))?;
            let (len, has_null) = split(&table, &index, &entry[start..]).ok_or_else(|| damaged(&table))?;
            if !has_null && before.starts_with(&entry[..start + len]) {
                return Err(duplicate(&snapshot, &table, &index, entry, start, len)?);
            }
            before.clear();
            before.extend_from_slice(entry);
        }
        let mut rows = snapshot.scan_table(&table, &[]);
        while let Some((stored, image)) = rows.next_row()? {
            expected.add(&hasher, &entry_of(&table, &index, stored, image)?, stopped)?;
        }
        if expected != found {
            let message = format!("{} rows, {} entries in {}", expected.count, found.count, index.name);
            return Err(BuildError::Wrong(message));
        }
        Ok(())
    }
}

/// A sum that is the same for the same entries in any order.
#[derive(Default, PartialEq)]
struct Digest {
    count: u64,
    sum: u64,
}

impl Digest {
    fn add(&mut self, hasher: &RandomState, entry: &[u8], stopped: &dyn Fn() -> bool) -> Result<(), BuildError> {
        self.count += 1;
        self.sum = self.sum.wrapping_add(hasher.hash_one(entry));
        if self.count.is_multiple_of(STRIDE) && stopped() { Err(BuildError::Stopped) } else { Ok(()) }
    }
}

fn find(
    catalog: &crate::catalog::Catalog,
    table: TableId,
    index: IndexId,
) -> Result<(Arc<Table>, Arc<Index>), BuildError> {
    let table = catalog.table_by_id(table).ok_or(BuildError::Gone)?;
    let index = table.indexes.iter().find(|found| found.id == index).ok_or(BuildError::Gone)?;
    Ok((table.clone(), index.clone()))
}

/// The stored entry of a stored row.
fn entry_of(table: &Table, index: &Index, stored: &[u8], image: &[u8]) -> Result<Vec<u8>, StoreError> {
    let prefix = row_prefix_len(stored).ok_or_else(|| damaged(table))?;
    let (image, ..) = ImageRef::parse(image).map_err(|_| damaged(table))?;
    let mut entry = entry_prefix(table, index, &stored[..prefix]);
    entry.extend_from_slice(&index_values(table, index, &image)?.bytes);
    entry.extend_from_slice(&stored[prefix..]);
    Ok(entry)
}

/// The values of the row that an entry is about.
fn duplicate(
    snapshot: &Snapshot,
    table: &Table,
    index: &Index,
    entry: &[u8],
    start: usize,
    len: usize,
) -> Result<BuildError, StoreError> {
    let mut stored = table_prefix(table.namespace, table.id);
    let ids = stored.len();
    stored.extend_from_slice(&entry[ids..start]);
    stored.extend_from_slice(&entry[start + len..]);
    let image = snapshot.get_stored(table, &stored)?.ok_or_else(|| damaged(table))?;
    let (image, ..) = ImageRef::parse(&image).map_err(|_| damaged(table))?;
    let values = column_values(table, index, &image).map(|value| value.map(|(_, value)| value));
    Ok(BuildError::Duplicate(values.collect::<Result<_, _>>()?))
}
