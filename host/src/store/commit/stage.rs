//! What a transaction comes to: held to the catalog and to what was committed since it read, then encoded. Nothing is
//! written here, and nothing of a transaction that is refused is left behind.

use std::sync::Arc;

use wire::frame::ChangeMeta;
use wire::{FrameBuilder, FrameError, Kind, Scope};

use super::{Committer, Group};
use crate::catalog::{Catalog, Table, TableKind};
use crate::store::index::{EntryChange, entry_change};
use crate::store::keys::row_prefix;
use crate::store::{CommitError, RowWrite, Seq, StoreError, Transaction, ddl, read_error, receipts, row_family, rows};

/// What is to be written for one transaction: checked and encoded, so that adding it to the batch cannot fail half-way.
pub(super) struct Staged {
    pub rows: Vec<StagedRow>,
    pub frame: Vec<u8>,
    pub catalog: Option<ddl::StagedCatalog>,
    /// The hash of the receipt's id.
    pub receipt: Option<u64>,
}

pub(super) struct StagedRow {
    pub kind: TableKind,
    pub key: Vec<u8>,
    /// `None`: the row goes.
    pub stored: Option<Vec<u8>>,
    pub hash: u64,
    /// What it does to the table's indexes.
    pub entries: Vec<EntryChange>,
    /// The hashes of the values it claims in unique ones.
    pub claims: Vec<u64>,
}

impl Committer {
    /// Checks a transaction and builds its frame. `None`: it changes nothing.
    pub(super) fn stage(&mut self, group: &Group, transaction: &Transaction) -> Result<Option<Staged>, CommitError> {
        if self.recent.too_old(transaction.base)
            || (!transaction.catalog.is_empty() && transaction.base < self.catalog_changed)
        {
            return Err(CommitError::Stale);
        }
        self.committed_at = self.committed_at.max(self.inner.clock.now());
        let receipt = transaction.receipt.as_ref().map(|receipt| self.recent.hash(&receipts::receipt_key(&receipt.id)));
        // Somebody else came first with the same key: their answer is this one's as well.
        if receipt.is_some_and(|hash| self.recent.written_after(hash, transaction.base)) {
            return Err(CommitError::Stale);
        }
        let mut frame = FrameBuilder::new(transaction.namespace.0, commit_id(self.committed_at), self.committed_at);
        let rows = self.stage_rows(&group.catalog, transaction, &mut frame)?;
        let catalog = ddl::stage(&group.catalog, transaction, &mut frame)?;
        if rows.is_empty() && catalog.is_none() && receipt.is_none() {
            return Ok(None);
        }
        let frame = frame.finish().map_err(invalid_frame)?;
        self.check_size(frame.len())?;
        Ok(Some(Staged { rows, frame, catalog, receipt }))
    }

    /// The rows that really change, each checked against catalog and conflicts and put into the frame.
    fn stage_rows(
        &self,
        catalog: &Catalog,
        transaction: &Transaction,
        frame: &mut FrameBuilder,
    ) -> Result<Vec<StagedRow>, CommitError> {
        let mut rows = Vec::with_capacity(transaction.rows.len());
        let mut checked: Option<(&Arc<Table>, Vec<Kind>)> = None;
        for write in &transaction.rows {
            let table = &*write.table;
            // Rows of one table come together: it is looked up, and its slots are listed, once.
            let kinds = match &checked {
                Some((known, kinds)) if Arc::ptr_eq(known, &write.table) => kinds,
                _ => {
                    check_table(catalog, transaction, table)?;
                    &checked.insert((&write.table, table.kinds())).1
                }
            };
            check_scope(table, &write.scope)?;
            let mut key = row_prefix(table, &write.scope);
            key.extend_from_slice(&write.key);
            let hash = self.recent.hash(&key);
            if self.recent.written_after(hash, transaction.base) {
                return Err(CommitError::Stale);
            }
            // What has expired meanwhile was there for nobody any more: the reader has to look again.
            if table.kind == TableKind::Stream && write.old.is_some() && self.is_expired(table, &key)? {
                return Err(CommitError::Stale);
            }
            let unchanged = match (&write.old, &write.new) {
                (None, None) => true,
                (Some(old), Some(new)) => rows::same_row(kinds, old, new),
                _ => false,
            };
            if unchanged {
                continue;
            }
            let meta = ChangeMeta { table: table.id.0, schema_version: table.schema_version, kinds };
            frame.change(&write.scope, meta, write.old.as_deref(), write.new.as_deref()).map_err(invalid_frame)?;
            self.check_size(frame.len())?;
            let expires = table.expires(self.committed_at);
            let stored = write.new.as_deref().map(|image| rows::encode_row(table, image, expires)).transpose()?;
            let (entries, claims) = self.stage_entries(transaction.base, write, &key)?;
            rows.push(StagedRow { kind: table.kind, key, stored, hash, entries, claims });
        }
        debug_assert!(distinct(&rows), "a transaction has at most one change for a key: its net effect");
        Ok(rows)
    }

    /// What a change does to the table's indexes. Values that a unique one must have once were looked for at the
    /// transaction's snapshot: whoever claimed them since comes first.
    fn stage_entries(
        &self,
        base: Seq,
        write: &RowWrite,
        stored_key: &[u8],
    ) -> Result<(Vec<EntryChange>, Vec<u64>), CommitError> {
        let (mut entries, mut claims) = (Vec::new(), Vec::new());
        let prefix = &stored_key[..stored_key.len() - write.key.len()];
        for index in &write.table.indexes {
            let (old, new) = (write.old.as_deref(), write.new.as_deref());
            let Some(change) = entry_change(&write.table, index, prefix, &write.key, old, new)? else { continue };
            if let Some(claim) = &change.claim {
                let hash = self.recent.hash(claim);
                if self.recent.written_after(hash, base) {
                    return Err(CommitError::Stale);
                }
                claims.push(hash);
            }
            entries.push(change);
        }
        Ok((entries, claims))
    }

    /// Nobody has written the key since it was read, or this would not be asked: what is stored is what was read.
    fn is_expired(&self, table: &Table, key: &[u8]) -> Result<bool, StoreError> {
        let family = row_family(&self.inner.db, table.kind);
        let stored = self.inner.db.get_pinned_cf(family, key).map_err(read_error)?;
        // Swept already.
        let Some(stored) = stored else { return Ok(true) };
        Ok(rows::expires(&stored).is_some_and(|expires| expires <= self.committed_at))
    }

    fn check_size(&self, size: usize) -> Result<(), CommitError> {
        let limit = self.inner.max_commit_bytes;
        if size > limit { Err(CommitError::TooLarge { size, limit }) } else { Ok(()) }
    }
}

fn check_table(catalog: &Catalog, transaction: &Transaction, table: &Table) -> Result<(), CommitError> {
    if table.namespace != transaction.namespace {
        return Err(CommitError::Invalid(format!("{}.{} is not in its namespace", table.namespace_name, table.name)));
    }
    match catalog.table_by_id(table.id) {
        // The very set of indexes, too: a row must have its entry in each, and be held to those that are unique.
        Some(current) if current.schema_version == table.schema_version && current.indexes == table.indexes => Ok(()),
        _ => Err(CommitError::Stale),
    }
}

fn check_scope(table: &Table, scope: &Scope) -> Result<(), CommitError> {
    match (table.kind, scope) {
        (TableKind::Shared | TableKind::Stream, Scope::Shared) | (TableKind::User, Scope::User(_)) => Ok(()),
        _ => Err(CommitError::Invalid(format!(
            "a row of the {} table {} has another scope",
            table.kind.as_str(),
            table.name
        ))),
    }
}

fn distinct(rows: &[StagedRow]) -> bool {
    let mut keys = std::collections::HashSet::new();
    rows.iter().all(|row| keys.insert(&row.key))
}

/// A UUID of version 7: the commit's time in milliseconds, then random bits.
fn commit_id(committed_at: i64) -> [u8; 16] {
    let mut id: [u8; 16] = rand::random();
    id[..6].copy_from_slice(&(committed_at / 1000).to_be_bytes()[2..]);
    id[6] = 0x70 | id[6] & 0x0f;
    id[8] = 0x80 | id[8] & 0x3f;
    id
}

fn invalid_frame(error: FrameError) -> CommitError {
    CommitError::Invalid(error.to_string())
}
