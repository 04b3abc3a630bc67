//! A transaction's catalog writes: checked, applied to the catalog, told in the frame, put into and taken out of the
//! batch. When and in which order is the committer's ([`super::commit`]); keys are in [`super::meta`], the records'
//! bytes in [`super::records`].

use std::sync::Arc;

use rocksdb::{DB, WriteBatch};
use wire::{CatalogEvent, FrameBuilder};

use super::keys::{successor, table_prefix};
use super::records::{encode_catalog, encode_index, encode_namespace, encode_plugin, encode_retired, encode_table};
use super::{CatalogWrite, CommitError, DEFAULT_FAMILY, StoreError, Transaction, family, meta, row_family};
use crate::catalog::{Catalog, Index, Plugin, Table, TableId, TableKind};

/// Key and value in the `default` family.
type Record = (Vec<u8>, Vec<u8>);

pub(super) struct StagedCatalog {
    pub after: Arc<Catalog>,
    pub records: Vec<Record>,
}

/// The catalog after the transaction's catalog writes with its records, and their events in the frame; `None` if there
/// are none.
pub(super) fn stage(
    before: &Catalog,
    transaction: &Transaction,
    frame: &mut FrameBuilder,
) -> Result<Option<StagedCatalog>, CommitError> {
    if transaction.catalog.is_empty() {
        return Ok(None);
    }
    let mut catalog = before.clone();
    catalog.version += 1;
    for write in &transaction.catalog {
        check_catalog_write(&catalog, write)?;
        catalog_events(&catalog, write, frame);
        write.apply(&mut catalog);
    }
    let records = catalog_records(transaction, &catalog)?;
    Ok(Some(StagedCatalog { after: Arc::new(catalog), records }))
}

/// Ids are never reused: a new thing has an id nobody had, and what is dropped or replaced is there.
fn check_catalog_write(catalog: &Catalog, write: &CatalogWrite) -> Result<(), CommitError> {
    let fine = match write {
        CatalogWrite::PutNamespace { id, name } => {
            id.0 >= catalog.next_namespace && id.0 > 0 && catalog.namespace(name).is_none()
        }
        CatalogWrite::DropNamespace { name } => catalog.namespace(name).is_some(),
        CatalogWrite::PutTable(table) => {
            let place = catalog.namespace(&table.namespace_name).is_some_and(|found| found.id == table.namespace);
            place && !table.key.is_empty() && admits_table(catalog, table)
        }
        CatalogWrite::DropTable(id) => catalog.table_by_id(*id).is_some(),
        CatalogWrite::PutPlugin { plugin, .. } => {
            catalog.namespace(&plugin.namespace_name).is_some_and(|found| found.id == plugin.namespace)
        }
        CatalogWrite::DropPlugin { namespace, name } => catalog.plugin(namespace, name).is_some(),
    };
    if fine { Ok(()) } else { Err(CommitError::Invalid(format!("the catalog does not admit {}", describe(write)))) }
}

/// A new table has a new id; another version of a table stays in its place and has a higher schema version, or other
/// indexes and nothing else. Either way the name is its own or free.
fn admits_table(catalog: &Catalog, table: &Table) -> bool {
    let name = catalog.table(&table.namespace_name, &table.name);
    let id = match catalog.table_by_id(table.id) {
        Some(found) => {
            found.namespace == table.namespace
                && found.kind == table.kind
                && found.key == table.key
                && found.ttl_micros == table.ttl_micros
                && (found.schema_version < table.schema_version || same_rows(found, table))
                && found.next_column <= table.next_column
        }
        None => table.id.0 >= catalog.next_table,
    };
    let ttl = (table.kind == TableKind::Stream) == table.ttl_micros.is_some();
    let place = id && ttl && name.is_none_or(|found| found.id == table.id) && table.slots() <= table.next_column;
    place && table.indexes.iter().all(|index| admits_index(catalog, table, index))
}

/// Whether two versions of a table differ in nothing but their indexes.
fn same_rows(one: &Table, other: &Table) -> bool {
    *one == Table { indexes: one.indexes.clone(), ..other.clone() }
}

/// A new index has a new id; one that was there keeps what it indexes. Either way its columns are there, and its entries
/// stay as long as its rows: those of a stream table go by themselves.
fn admits_index(catalog: &Catalog, table: &Table, index: &Index) -> bool {
    let before = catalog.table_by_id(table.id).and_then(|table| table.indexes.iter().find(|old| old.id == index.id));
    let identity = match before {
        Some(before) => *index == Index { state: index.state, name: index.name.clone(), ..Index::clone(before) },
        None => index.id.0 >= catalog.next_table && index.id.0 != table.id.0,
    };
    identity
        && table.kind != TableKind::Stream
        && !index.columns.is_empty()
        && index.columns.iter().all(|id| table.column_by_id(*id).is_some())
}

fn describe(write: &CatalogWrite) -> String {
    match write {
        CatalogWrite::PutNamespace { id, name } => format!("namespace {name} with id {}", id.0),
        CatalogWrite::DropNamespace { name } => format!("dropping namespace {name}"),
        CatalogWrite::PutTable(table) => {
            format!("table {}.{} with id {}", table.namespace_name, table.name, table.id.0)
        }
        CatalogWrite::DropTable(id) => format!("dropping the table with id {}", id.0),
        CatalogWrite::PutPlugin { plugin, .. } => format!("plugin {}.{}", plugin.namespace_name, plugin.name),
        CatalogWrite::DropPlugin { namespace, name } => format!("dropping plugin {namespace}.{name}"),
    }
}

fn catalog_events(before: &Catalog, write: &CatalogWrite, frame: &mut FrameBuilder) {
    match write {
        CatalogWrite::PutNamespace { .. } => {}
        CatalogWrite::DropNamespace { name } => {
            let Some(namespace) = before.namespace(name) else { return };
            for table in namespace.tables.values() {
                frame.catalog(CatalogEvent::TableDropped { table: table.id.0 });
            }
            for name in namespace.plugins.keys() {
                frame.catalog(CatalogEvent::PluginDropped { name: name.clone() });
            }
        }
        CatalogWrite::PutTable(table) => {
            let (table, schema_version) = (table.id.0, table.schema_version);
            match before.table_by_id(TableId(table)) {
                None => frame.catalog(CatalogEvent::TableCreated { table }),
                // Other indexes are no affair of those who follow its rows.
                Some(before) if before.schema_version == schema_version => {}
                Some(_) => frame.catalog(CatalogEvent::TableAltered { table, schema_version }),
            }
        }
        CatalogWrite::DropTable(id) => frame.catalog(CatalogEvent::TableDropped { table: id.0 }),
        CatalogWrite::PutPlugin { plugin, .. } => {
            frame.catalog(CatalogEvent::PluginActivated { name: plugin.name.clone(), version: plugin.version });
        }
        CatalogWrite::DropPlugin { name, .. } => frame.catalog(CatalogEvent::PluginDropped { name: name.clone() }),
    }
}

/// The records of what the transaction put and did not drop again; `after` is the catalog after it.
fn catalog_records(transaction: &Transaction, after: &Catalog) -> Result<Vec<Record>, StoreError> {
    let mut records = vec![(meta::CATALOG_KEY.to_vec(), encode_catalog(after)?)];
    for write in &transaction.catalog {
        match write {
            CatalogWrite::PutNamespace { id, name } if after.namespace(name).is_some_and(|found| found.id == *id) => {
                records.push((meta::namespace_key(*id), encode_namespace(*id, name)?));
            }
            CatalogWrite::PutTable(table) if after.table_by_id(table.id).is_some() => {
                records.push((meta::table_key(table.id), encode_table(table)?));
            }
            CatalogWrite::PutPlugin { plugin, wasm } if plugins(after).any(|found| same_plugin(found, plugin)) => {
                let key = meta::plugin_key(plugin.namespace, plugin.version, &plugin.name);
                records.push((key, encode_plugin(plugin)?));
                records.push((meta::wasm_key(&plugin.sha256), wasm.to_vec()));
            }
            CatalogWrite::DropPlugin { namespace, name } => {
                let found = after.namespace(namespace);
                if let Some((found, version)) = found.and_then(|found| Some((found, *found.retired.get(name)?))) {
                    records.push((meta::retired_key(found.id, name), encode_retired(found.id, name, version)?));
                }
            }
            _ => {}
        }
    }
    for table in put_tables(transaction, after) {
        for index in &table.indexes {
            records.push((meta::index_key(index.id), encode_index(table.id, index)?));
        }
    }
    Ok(records)
}

/// The tables that the transaction put, as they are after it.
fn put_tables<'a>(transaction: &'a Transaction, after: &'a Catalog) -> impl Iterator<Item = &'a Arc<Table>> {
    transaction.catalog.iter().filter_map(|write| match write {
        CatalogWrite::PutTable(table) => after.table_by_id(table.id),
        _ => None,
    })
}

/// Removes the records, rows and index entries of everything that `before` has and `after` has not.
pub(super) fn delete_dropped(db: &DB, batch: &mut WriteBatch, before: &Catalog, after: &Catalog) {
    let default = family(db, DEFAULT_FAMILY);
    for namespace in before.namespaces() {
        if after.namespace(&namespace.name).is_none_or(|found| found.id != namespace.id) {
            batch.delete_cf(default, meta::namespace_key(namespace.id));
            for name in namespace.retired.keys() {
                batch.delete_cf(default, meta::retired_key(namespace.id, name));
            }
        }
        for table in namespace.tables.values() {
            let kept = after.table_by_id(table.id);
            if kept.is_none() {
                batch.delete_cf(default, meta::table_key(table.id));
                delete_ids(db, batch, table, table.id);
            }
            let is_kept = |index: &Index| kept.is_some_and(|kept| kept.indexes.iter().any(|kept| kept.id == index.id));
            for index in table.indexes.iter().filter(|index| !is_kept(index)) {
                delete_index(db, batch, table, index);
            }
        }
    }
    for plugin in plugins(before) {
        if !plugins(after).any(|other| same_plugin(other, plugin)) {
            batch.delete_cf(default, meta::plugin_key(plugin.namespace, plugin.version, &plugin.name));
            // Another plugin, or another namespace, may have been given the same bytes.
            if !plugins(after).any(|other| other.sha256 == plugin.sha256) {
                batch.delete_cf(default, meta::wasm_key(&plugin.sha256));
            }
        }
    }
}

fn plugins(catalog: &Catalog) -> impl Iterator<Item = &Arc<Plugin>> {
    catalog.namespaces().flat_map(|namespace| namespace.plugins.values().flatten())
}

fn same_plugin(a: &Plugin, b: &Plugin) -> bool {
    (a.namespace, a.version, &a.name) == (b.namespace, b.version, &b.name)
}

/// The record of an index, and its entries.
pub(super) fn delete_index(db: &DB, batch: &mut WriteBatch, table: &Table, index: &Index) {
    batch.delete_cf(family(db, DEFAULT_FAMILY), meta::index_key(index.id));
    delete_ids(db, batch, table, TableId(index.id.0));
}

/// One range for the rows (or entries) of all users.
fn delete_ids(db: &DB, batch: &mut WriteBatch, table: &Table, id: TableId) {
    let from = table_prefix(table.namespace, id);
    if let Some(to) = successor(&from) {
        batch.delete_range_cf(row_family(db, table.kind), from, to);
    }
}
