//! Consistent reads: rows and change log through one RocksDB snapshot, streamed.

use std::sync::Arc;

use bytes::Bytes;
use wire::Scope;

use super::keys::KeyRange;
use super::{Seq, StoreError};
use crate::catalog::{Catalog, NamespaceId, Table};

/// A consistent view of the store; cheap to clone, `Send + Sync + 'static`.
#[derive(Clone)]
pub struct Snapshot {
    // filled by the store module's author
}

impl Snapshot {
    /// `applied_seq`, read through the snapshot itself.
    pub fn seq(&self) -> Seq {
        todo!()
    }

    /// The catalog at this snapshot (the catalog and the RocksDB snapshot are taken together).
    pub fn catalog(&self) -> &Arc<Catalog> {
        todo!()
    }

    /// The row's image at `table`'s schema version.
    pub fn get(&self, _table: &Table, _scope: &Scope, _key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        todo!()
    }

    /// Rows of one table and scope in key order.
    pub fn scan(&self, _table: &Arc<Table>, _scope: &Scope, _range: KeyRange) -> RowScan {
        todo!()
    }

    /// Commits of one namespace after `after`, in order, as far as this snapshot sees.
    pub fn log(&self, _namespace: NamespaceId, _after: Seq) -> LogScan {
        todo!()
    }
}

/// An owned, streaming row iterator (`Send`). Not a std `Iterator`: rows are borrowed from RocksDB's block.
pub struct RowScan {
    // filled by the store module's author
}

impl RowScan {
    /// The next row: its encoded key (as [`super::keys::encode_key`]) and its image at the table's schema version.
    pub fn next_row(&mut self) -> Result<Option<(&[u8], &[u8])>, StoreError> {
        todo!()
    }
}

/// An owned, streaming iterator over the change log (`Send`).
pub struct LogScan {
    // filled by the store module's author
}

impl LogScan {
    pub fn next_commit(&mut self) -> Result<Option<(Seq, Bytes)>, StoreError> {
        todo!()
    }
}
