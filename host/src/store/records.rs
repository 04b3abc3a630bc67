//! The catalog's records in the `default` family (their keys are in `store/meta.rs`): a version byte and postcard
//! messages of types that live here, so that the catalog's own types may change without changing what is on disk.
//!
//! A table's record is one message in version 1; in version 2 others follow (what ALTER TABLE needs to know of the
//! past, the life of a stream's rows). Both are read, the latter is written. A plugin's record says behind its message
//! what it restores, where it does.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use wire::abi::ManifestLine;
use wire::{Type, Value};

use super::StoreError;
use crate::catalog::{
    Catalog, Column, DefaultValue, Index, IndexId, IndexState, NamespaceId, Plugin, PluginKind, Table, TableId,
    TableKind,
};

const RECORD_VERSION: u8 = 1;
/// Of a table's record.
const TABLE_RECORD_VERSION: u8 = 2;

#[derive(Serialize, Deserialize)]
struct CatalogRecord {
    next_namespace: u32,
    next_table: u32,
}

#[derive(Serialize, Deserialize)]
struct NamespaceRecord {
    id: u32,
    name: String,
}

#[derive(Serialize, Deserialize)]
struct TableRecord {
    id: u32,
    namespace: u32,
    name: String,
    kind: TableKindRecord,
    schema_version: u32,
    columns: Vec<ColumnRecord>,
    key: Vec<u16>,
    generated_key: bool,
}

/// What follows a [`TableRecord`] from version 2 on, one message after the other; those at the end may be missing.
#[derive(Serialize, Deserialize)]
struct PastRecord {
    next_column: u16,
    images_since: u32,
    /// By column id: what rows have that are older than the column.
    fills: Vec<(u16, Value)>,
}

#[derive(Default, Serialize, Deserialize)]
struct StreamRecord {
    ttl_micros: Option<i64>,
}

#[derive(Serialize, Deserialize)]
struct IndexRecord {
    id: u32,
    table: u32,
    name: String,
    columns: Vec<u16>,
    unique: bool,
    state: IndexStateRecord,
}

#[derive(Serialize, Deserialize)]
enum IndexStateRecord {
    Building,
    Verifying,
    Ready,
}

#[derive(Serialize, Deserialize)]
enum TableKindRecord {
    Shared,
    User,
    Stream,
}

#[derive(Serialize, Deserialize)]
struct ColumnRecord {
    id: u16,
    name: String,
    ty: Type,
    nullable: bool,
    default: Option<DefaultRecord>,
}

#[derive(Serialize, Deserialize)]
enum DefaultRecord {
    Literal(Value),
    Now,
    Uuid,
    CurrentUser,
}

#[derive(Serialize, Deserialize)]
struct PluginRecord {
    namespace: u32,
    name: String,
    version: u32,
    sha256: String,
    kind: PluginKindRecord,
    abi: u32,
    /// JSON lines as in the module itself: the manifest's fields are optional by name, which postcard has no way to say.
    manifest: Vec<String>,
    size: u64,
    uploaded_at: i64,
    uploaded_by: String,
}

/// What follows a [`PluginRecord`] of a version that a rollback has made.
#[derive(Serialize, Deserialize)]
struct RestoredRecord {
    version: u32,
}

#[derive(Serialize, Deserialize)]
enum PluginKindRecord {
    RowFilter,
    RowTransform,
    ChangeFilter,
    ChangeTransform,
}

#[derive(Serialize, Deserialize)]
struct RetiredRecord {
    namespace: u32,
    name: String,
    version: u32,
}

pub(super) fn encode_catalog(catalog: &Catalog) -> Result<Vec<u8>, StoreError> {
    encode(&CatalogRecord { next_namespace: catalog.next_namespace, next_table: catalog.next_table })
}

pub(super) fn encode_namespace(id: NamespaceId, name: &str) -> Result<Vec<u8>, StoreError> {
    encode(&NamespaceRecord { id: id.0, name: name.to_owned() })
}

pub(super) fn encode_table(table: &Table) -> Result<Vec<u8>, StoreError> {
    let columns = table.columns.iter().map(|column| ColumnRecord {
        id: column.id,
        name: column.name.clone(),
        ty: column.ty,
        nullable: column.nullable,
        default: column.default.as_ref().map(|default| match default {
            DefaultValue::Literal(value) => DefaultRecord::Literal(value.clone()),
            DefaultValue::Now => DefaultRecord::Now,
            DefaultValue::Uuid => DefaultRecord::Uuid,
            DefaultValue::CurrentUser => DefaultRecord::CurrentUser,
        }),
    });
    let record = TableRecord {
        id: table.id.0,
        namespace: table.namespace.0,
        name: table.name.clone(),
        kind: match table.kind {
            TableKind::Shared => TableKindRecord::Shared,
            TableKind::User => TableKindRecord::User,
            TableKind::Stream => TableKindRecord::Stream,
        },
        schema_version: table.schema_version,
        columns: columns.collect(),
        key: table.key.clone(),
        generated_key: table.generated_key,
    };
    let fills = table.columns.iter().filter_map(|column| Some((column.id, column.fill.clone()?)));
    let past = PastRecord { next_column: table.next_column, images_since: table.images_since, fills: fills.collect() };
    let out = encode_to(&record, vec![TABLE_RECORD_VERSION])?;
    let out = encode_to(&past, out)?;
    encode_to(&StreamRecord { ttl_micros: table.ttl_micros }, out)
}

pub(super) fn encode_index(table: TableId, index: &Index) -> Result<Vec<u8>, StoreError> {
    encode(&IndexRecord {
        id: index.id.0,
        table: table.0,
        name: index.name.clone(),
        columns: index.columns.clone(),
        unique: index.unique,
        state: match index.state {
            IndexState::Building => IndexStateRecord::Building,
            IndexState::Verifying => IndexStateRecord::Verifying,
            IndexState::Ready => IndexStateRecord::Ready,
        },
    })
}

pub(super) fn encode_plugin(plugin: &Plugin) -> Result<Vec<u8>, StoreError> {
    let manifest = plugin.manifest.iter().map(serde_json::to_string).collect::<Result<_, _>>();
    let record = encode(&PluginRecord {
        namespace: plugin.namespace.0,
        name: plugin.name.clone(),
        version: plugin.version,
        sha256: plugin.sha256.clone(),
        kind: match plugin.kind {
            PluginKind::RowFilter => PluginKindRecord::RowFilter,
            PluginKind::RowTransform => PluginKindRecord::RowTransform,
            PluginKind::ChangeFilter => PluginKindRecord::ChangeFilter,
            PluginKind::ChangeTransform => PluginKindRecord::ChangeTransform,
        },
        abi: plugin.abi,
        manifest: manifest.map_err(|error| StoreError::Corrupt(format!("a manifest cannot be encoded: {error}")))?,
        size: plugin.size,
        uploaded_at: plugin.uploaded_at,
        uploaded_by: plugin.uploaded_by.clone(),
    })?;
    match plugin.restored {
        Some(version) => encode_to(&RestoredRecord { version }, record),
        None => Ok(record),
    }
}

pub(super) fn encode_retired(namespace: NamespaceId, name: &str, version: u32) -> Result<Vec<u8>, StoreError> {
    encode(&RetiredRecord { namespace: namespace.0, name: name.to_owned(), version })
}

/// The catalog out of its records, given in this order: namespaces, tables, indexes, plugins, deleted plugins.
pub(super) struct CatalogLoader {
    catalog: Catalog,
}

impl CatalogLoader {
    pub fn new(version: u64) -> Self {
        let mut catalog = Catalog::default();
        catalog.version = version;
        CatalogLoader { catalog }
    }

    pub fn namespace(&mut self, record: &[u8]) -> Result<(), StoreError> {
        let record: NamespaceRecord = decode("namespace", record)?;
        self.catalog.put_namespace(NamespaceId(record.id), &record.name);
        Ok(())
    }

    pub fn table(&mut self, record: &[u8]) -> Result<(), StoreError> {
        let (record, past, stream) = decode_table(record)?;
        let mut fills: BTreeMap<u16, Value> = past.fills.into_iter().collect();
        let columns = record.columns.into_iter().map(|column| Column {
            id: column.id,
            name: column.name,
            ty: column.ty,
            nullable: column.nullable,
            fill: fills.remove(&column.id),
            default: column.default.map(|default| match default {
                DefaultRecord::Literal(value) => DefaultValue::Literal(value),
                DefaultRecord::Now => DefaultValue::Now,
                DefaultRecord::Uuid => DefaultValue::Uuid,
                DefaultRecord::CurrentUser => DefaultValue::CurrentUser,
            }),
        });
        let table = Table {
            id: TableId(record.id),
            namespace: NamespaceId(record.namespace),
            namespace_name: self.namespace_name(record.namespace)?,
            name: record.name,
            kind: match record.kind {
                TableKindRecord::Shared => TableKind::Shared,
                TableKindRecord::User => TableKind::User,
                TableKindRecord::Stream => TableKind::Stream,
            },
            schema_version: record.schema_version,
            columns: columns.collect(),
            key: record.key,
            generated_key: record.generated_key,
            indexes: Vec::new(),
            next_column: past.next_column,
            images_since: past.images_since,
            ttl_micros: stream.ttl_micros,
        };
        self.catalog.put_table(Arc::new(table));
        Ok(())
    }

    pub fn index(&mut self, record: &[u8]) -> Result<(), StoreError> {
        let record: IndexRecord = decode("index", record)?;
        let Some(table) = self.catalog.table_by_id(TableId(record.table)) else {
            let message = format!("index {} is of table {}, which does not exist", record.name, record.table);
            return Err(StoreError::Corrupt(message));
        };
        let mut table = Table::clone(table);
        table.indexes.push(Arc::new(Index {
            id: IndexId(record.id),
            name: record.name,
            columns: record.columns,
            unique: record.unique,
            state: match record.state {
                IndexStateRecord::Building => IndexState::Building,
                IndexStateRecord::Verifying => IndexState::Verifying,
                IndexStateRecord::Ready => IndexState::Ready,
            },
        }));
        self.catalog.put_table(Arc::new(table));
        Ok(())
    }

    pub fn plugin(&mut self, record: &[u8]) -> Result<(), StoreError> {
        let (record, restored) = decode_plugin(record)?;
        let manifest = record.manifest.iter().map(|line| serde_json::from_str::<ManifestLine>(line));
        let manifest = manifest
            .collect::<Result<_, _>>()
            .map_err(|error| StoreError::Corrupt(format!("the manifest of plugin {}: {error}", record.name)))?;
        self.catalog.put_plugin(Arc::new(Plugin {
            namespace: NamespaceId(record.namespace),
            namespace_name: self.namespace_name(record.namespace)?,
            name: record.name,
            version: record.version,
            sha256: record.sha256,
            kind: match record.kind {
                PluginKindRecord::RowFilter => PluginKind::RowFilter,
                PluginKindRecord::RowTransform => PluginKind::RowTransform,
                PluginKindRecord::ChangeFilter => PluginKind::ChangeFilter,
                PluginKindRecord::ChangeTransform => PluginKind::ChangeTransform,
            },
            abi: record.abi,
            manifest,
            size: record.size,
            uploaded_at: record.uploaded_at,
            uploaded_by: record.uploaded_by,
            restored,
        }));
        Ok(())
    }

    pub fn retired(&mut self, record: &[u8]) -> Result<(), StoreError> {
        let RetiredRecord { namespace, name, version } = decode("deleted plugin", record)?;
        self.catalog.retire_plugin(NamespaceId(namespace), &name, version);
        Ok(())
    }

    /// Takes over the next ids, which may lie above every id still in use.
    pub fn finish(mut self, record: &[u8]) -> Result<Catalog, StoreError> {
        let record: CatalogRecord = decode("catalog", record)?;
        self.catalog.next_namespace = self.catalog.next_namespace.max(record.next_namespace);
        self.catalog.next_table = self.catalog.next_table.max(record.next_table);
        Ok(self.catalog)
    }

    fn namespace_name(&self, id: u32) -> Result<String, StoreError> {
        let namespace = self.catalog.namespaces().find(|namespace| namespace.id.0 == id);
        namespace
            .map(|namespace| namespace.name.clone())
            .ok_or_else(|| StoreError::Corrupt(format!("a catalog record names namespace {id}, which does not exist")))
    }
}

fn encode<T: Serialize>(record: &T) -> Result<Vec<u8>, StoreError> {
    encode_to(record, vec![RECORD_VERSION])
}

fn encode_to<T: Serialize>(record: &T, out: Vec<u8>) -> Result<Vec<u8>, StoreError> {
    postcard::to_extend(record, out)
        .map_err(|error| StoreError::Corrupt(format!("a catalog record cannot be encoded: {error}")))
}

fn decode_table(record: &[u8]) -> Result<(TableRecord, PastRecord, StreamRecord), StoreError> {
    let Some((&TABLE_RECORD_VERSION, bytes)) = record.split_first() else {
        let record: TableRecord = decode("table", record)?;
        let next_column = record.columns.iter().map(|column| column.id + 1).max().unwrap_or(0);
        let past = PastRecord { next_column, images_since: record.schema_version, fills: Vec::new() };
        return Ok((record, past, StreamRecord::default()));
    };
    let unreadable = |error| StoreError::Corrupt(format!("a table record cannot be read: {error}"));
    let (record, rest) = postcard::take_from_bytes(bytes).map_err(unreadable)?;
    let (past, rest) = postcard::take_from_bytes(rest).map_err(unreadable)?;
    let stream =
        if rest.is_empty() { StreamRecord::default() } else { postcard::from_bytes(rest).map_err(unreadable)? };
    Ok((record, past, stream))
}

fn decode_plugin(record: &[u8]) -> Result<(PluginRecord, Option<u32>), StoreError> {
    let Some((&RECORD_VERSION, bytes)) = record.split_first() else { return Ok((decode("plugin", record)?, None)) };
    let unreadable = |error| StoreError::Corrupt(format!("a plugin record cannot be read: {error}"));
    let (record, rest) = postcard::take_from_bytes(bytes).map_err(unreadable)?;
    let restored: Option<RestoredRecord> =
        if rest.is_empty() { None } else { Some(postcard::from_bytes(rest).map_err(unreadable)?) };
    Ok((record, restored.map(|restored| restored.version)))
}

fn decode<T: DeserializeOwned>(what: &str, record: &[u8]) -> Result<T, StoreError> {
    match record.split_first() {
        Some((&RECORD_VERSION, bytes)) => postcard::from_bytes(bytes)
            .map_err(|error| StoreError::Corrupt(format!("a {what} record cannot be read: {error}"))),
        Some((version, _)) => Err(StoreError::Corrupt(format!(
            "a {what} record has version {version}; this tidegate reads version {RECORD_VERSION}"
        ))),
        None => Err(StoreError::Corrupt(format!("a {what} record is empty"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures;
    use super::*;

    #[test]
    fn a_table_record_is_pinned() {
        // If these bytes change, directories written before cannot be read: give the record a new version instead.
        let table = fixtures::table(2);
        assert_eq!(
            encode_table(&table).unwrap(),
            [
                2, 2, 1, 2, b't', b'2', 0, 1, // version, id, namespace, name, kind, schema version
                3, 0, 2, b'i', b'd', 3, 0, 0, 1, 4, b't', b'e', b'x', b't', 7, 1, 0, // id, text
                2, 5, b's', b'c', b'o', b'r', b'e', 5, 1, 0, // score
                1, 0, 0, // key, generated
                3, 1, 0, // next column, images since, no fills
                0, // no time to live
            ]
        );
    }

    #[test]
    fn an_index_record_is_pinned() {
        let index = fixtures::index(5, &[2, 1], true);
        // Version, id, table, name, columns, unique, ready.
        assert_eq!(encode_index(TableId(2), &index).unwrap(), [1, 5, 2, 2, b'i', b'5', 2, 2, 1, 1, 2]);
    }

    #[test]
    fn a_table_record_of_version_1_is_read() {
        let record = [
            1, 2, 1, 2, b't', b'2', 0, 1, // version, id, namespace, name, kind, schema version
            3, 0, 2, b'i', b'd', 3, 0, 0, 1, 4, b't', b'e', b'x', b't', 7, 1, 0, // id, text
            2, 5, b's', b'c', b'o', b'r', b'e', 5, 1, 0, // score
            1, 0, 0, // key, generated
        ];
        let mut loader = CatalogLoader::new(5);
        loader.namespace(&encode_namespace(NamespaceId(1), "main").unwrap()).unwrap();
        loader.table(&record).unwrap();
        let catalog = loader.finish(&encode_catalog(&Catalog::default()).unwrap()).unwrap();
        assert_eq!(**catalog.table("main", "t2").unwrap(), fixtures::table(2));
    }

    #[test]
    fn a_catalog_comes_back_whole() {
        let (first, mut plugin) = (fixtures::plugin("late", 1), fixtures::plugin("late", 3));
        plugin.restored = Some(1);
        let mut table = fixtures::table(9);
        table.columns[1].default = Some(DefaultValue::Literal(Value::Decimal(i128::MIN)));
        table.columns[2].default = Some(DefaultValue::Literal(Value::Float(f64::INFINITY)));
        table.columns[2].fill = Some(Value::Float(0.5));
        (table.schema_version, table.images_since, table.next_column) = (7, 4, 12);
        (table.kind, table.ttl_micros) = (TableKind::Stream, Some(5_000_000));
        table.indexes = vec![fixtures::index(11, &[1], true), fixtures::index(12, &[2, 1], false)];
        let mut loader = CatalogLoader::new(5);
        loader.namespace(&encode_namespace(NamespaceId(1), "main").unwrap()).unwrap();
        loader.table(&encode_table(&table).unwrap()).unwrap();
        for index in &table.indexes {
            loader.index(&encode_index(table.id, index).unwrap()).unwrap();
        }
        for version in [&first, &plugin] {
            loader.plugin(&encode_plugin(version).unwrap()).unwrap();
        }
        loader.retired(&encode_retired(NamespaceId(1), "gone", 7).unwrap()).unwrap();
        let mut saved = Catalog::default();
        (saved.next_namespace, saved.next_table) = (4, 20);
        let catalog = loader.finish(&encode_catalog(&saved).unwrap()).unwrap();
        assert_eq!((catalog.version, catalog.next_namespace, catalog.next_table), (5, 4, 20));
        assert_eq!(**catalog.table("main", "t9").unwrap(), table);
        assert_eq!(**catalog.plugin("main", "late").unwrap(), plugin);
        assert_eq!(*catalog.namespace("main").unwrap().plugins["late"][0], first);
        let next = |name| catalog.next_plugin_version("main", name);
        assert_eq!((next("late"), next("gone"), next("new")), (4, 8, 1));
    }

    #[test]
    fn a_record_of_another_version_is_refused_with_both_versions() {
        let error = CatalogLoader::new(1).namespace(&[7, 0]).unwrap_err().to_string();
        assert!(error.contains("version 7") && error.contains("version 1"), "{error}");
    }
}
