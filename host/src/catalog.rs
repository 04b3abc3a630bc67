//! What exists: namespaces, tables with their columns, plugins. An immutable snapshot with a version.
//!
//! No I/O here: `store` persists it and hands out a new [`Catalog`] with every catalog commit; `sql` plans against one
//! snapshot from start to end.

mod anchors;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

pub use anchors::{Anchor, Anchors, Holds};

use wire::abi::ManifestLine;
pub use wire::abi::PluginKind;
use wire::{ColumnDecl, Kind, Schema, Type, Value};

pub const DEFAULT_NAMESPACE: &str = "main";

/// A namespace's short id in keys and frames; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceId(pub u32);

/// A table's short id in keys and frames; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(pub u32);

/// An index's short id in keys; never reused, and from the same numbers as table ids: neither meets the other's keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IndexId(pub u32);

/// A commit's place in the one order. Strictly rises; gaps are allowed; nobody computes seq + 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Seq(pub u64);

/// Random id of this history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TableKind {
    /// One set of rows.
    Shared,
    /// Each user has only their own rows.
    User,
    /// One set of rows, each gone when its time to live has passed.
    Stream,
}

impl TableKind {
    pub fn as_str(self) -> &'static str {
        match self {
            TableKind::Shared => "shared",
            TableKind::User => "user",
            TableKind::Stream => "stream",
        }
    }
}

/// What a column gets when an INSERT does not name it.
#[derive(Clone, Debug, PartialEq)]
pub enum DefaultValue {
    Literal(Value),
    Now,
    Uuid,
    CurrentUser,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Column {
    /// The slot in row images; never reused within the table.
    pub id: u16,
    pub name: String,
    pub ty: Type,
    pub nullable: bool,
    pub default: Option<DefaultValue>,
    /// What rows have in this column that were stored before it was added; `None`: NULL.
    pub fill: Option<Value>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexState {
    /// Commits keep it up; rows that were there before are being added; nobody reads it.
    Building,
    /// It has every row, and unique values are kept unique; whether they all are is being looked at.
    Verifying,
    /// In use.
    Ready,
}

impl IndexState {
    pub fn as_str(self) -> &'static str {
        match self {
            IndexState::Building => "building",
            IndexState::Verifying => "verifying",
            IndexState::Ready => "ready",
        }
    }
}

/// A secondary index: the rows by the values of some columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Index {
    pub id: IndexId,
    /// One of its kind in the namespace.
    pub name: String,
    /// Column ids, in index order; never empty.
    pub columns: Vec<u16>,
    /// No two rows of a scope have the same values, unless one of them is NULL.
    pub unique: bool,
    pub state: IndexState,
}

impl Index {
    /// Whether commits are held to its being unique.
    pub fn is_enforced(&self) -> bool {
        self.unique && self.state != IndexState::Building
    }

    pub fn is_ready(&self) -> bool {
        self.state == IndexState::Ready
    }
}

/// One table at one schema version.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    pub id: TableId,
    pub namespace: NamespaceId,
    pub namespace_name: String,
    pub name: String,
    pub kind: TableKind,
    pub schema_version: u32,
    /// In the order they are shown.
    pub columns: Vec<Column>,
    /// Column ids of the primary key, in key order; never empty.
    pub key: Vec<u16>,
    /// The key is the hidden-from-INSERT column `_id` (time-ordered UUID), because none was declared.
    pub generated_key: bool,
    /// In the order they were made. Another set of indexes is no other schema version: rows stay as they are.
    pub indexes: Vec<Arc<Index>>,
    /// The id of the next column; kept so that a dropped one never comes back: old rows still hold its values.
    pub next_column: u16,
    /// Row images of this schema version and later ones have the present columns: what came after were new names.
    pub images_since: u32,
    /// How long a row of a stream table lives after its commit, in microseconds; `None` for other kinds.
    pub ttl_micros: Option<i64>,
}

/// The name of the key column of a table without a declared primary key.
pub const GENERATED_KEY: &str = "_id";

impl Table {
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    pub fn column_by_id(&self, id: u16) -> Option<&Column> {
        self.columns.iter().find(|column| column.id == id)
    }

    /// Slots of a row image: one more than the highest column id.
    pub fn slots(&self) -> u16 {
        self.columns.iter().map(|column| column.id + 1).max().unwrap_or(0)
    }

    /// The physical kind of every slot, by column id.
    pub fn kinds(&self) -> Vec<Kind> {
        let mut kinds = vec![Kind::Int; usize::from(self.slots())];
        for column in &self.columns {
            kinds[usize::from(column.id)] = column.ty.kind();
        }
        kinds
    }

    /// When a row that is committed at this time stops showing (microseconds since 1970).
    pub fn expires(&self, committed_at: i64) -> Option<i64> {
        self.ttl_micros.map(|ttl| committed_at.saturating_add(ttl))
    }

    pub fn is_key(&self, id: u16) -> bool {
        self.key.contains(&id)
    }

    /// What plugins and clients are told of the table.
    pub fn schema(&self) -> Schema {
        let columns = self.columns.iter().map(|column| self.declare(column)).collect();
        Schema { columns }
    }

    /// The key columns alone, in key order.
    pub fn key_schema(&self) -> Schema {
        let columns =
            self.key.iter().filter_map(|id| self.column_by_id(*id)).map(|column| self.declare(column)).collect();
        Schema { columns }
    }

    fn declare(&self, column: &Column) -> ColumnDecl {
        ColumnDecl {
            id: column.id,
            name: column.name.clone(),
            ty: column.ty,
            nullable: column.nullable,
            key: self.is_key(column.id),
        }
    }
}

/// What happens to a row or change that a plugin fails on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnError {
    /// The stream says so and waits for another version.
    #[default]
    Stop,
    /// It is left out and noted.
    Skip,
    /// A filter lets it through, and it is noted.
    Pass,
}

impl OnError {
    pub fn as_str(self) -> &'static str {
        match self {
            OnError::Stop => "stop",
            OnError::Skip => "skip",
            OnError::Pass => "pass",
        }
    }
}

/// What the events of a live query are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Semantics {
    /// Folded by key they give the result.
    #[default]
    Map,
    /// Each commit's outputs once, in order; nothing to fold. What pipelines with a change filter or change transform
    /// give.
    Feed,
}

impl Semantics {
    pub fn as_str(self) -> &'static str {
        match self {
            Semantics::Map => "map",
            Semantics::Feed => "feed",
        }
    }
}

/// One uploaded version of a plugin. Its bytes are in the store, under the hash.
#[derive(Clone, Debug, PartialEq)]
pub struct Plugin {
    pub namespace: NamespaceId,
    pub namespace_name: String,
    pub name: String,
    /// 1, 2, … per name; never reused.
    pub version: u32,
    /// Lower-case hex of the uploaded bytes (after WAT is turned into wasm).
    pub sha256: String,
    pub kind: PluginKind,
    pub abi: u32,
    pub manifest: Vec<ManifestLine>,
    /// Bytes of the module.
    pub size: u64,
    /// Microseconds since 1970.
    pub uploaded_at: i64,
    pub uploaded_by: String,
    /// Made by a rollback: the upload whose module it is again.
    pub restored: Option<u32>,
}

impl Plugin {
    /// The upload that its module comes from.
    pub fn upload(&self) -> u32 {
        self.restored.unwrap_or(self.version)
    }
}

/// One stage of a pipeline: which module with which parameters (JSON object text).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Stage {
    pub name: String,
    pub version: u32,
    pub sha256: String,
    pub params: String,
}

impl Stage {
    /// What its results depend on: under another number the same bytes are the same plugin.
    pub fn runs(&self) -> [&str; 3] {
        [&self.name, &self.sha256, &self.params]
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Namespace {
    pub id: NamespaceId,
    pub name: String,
    /// By table name.
    pub tables: BTreeMap<String, Arc<Table>>,
    /// By plugin name: the versions in ascending order; the last is active.
    pub plugins: BTreeMap<String, Vec<Arc<Plugin>>>,
    /// The highest version that a deleted plugin of this name had: a number once given never means other bytes.
    pub retired: BTreeMap<String, u32>,
}

/// One immutable snapshot.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    /// Rises with every change of the catalog.
    pub version: u64,
    namespaces: BTreeMap<String, Namespace>,
    tables: HashMap<TableId, Arc<Table>>,
    /// The next id of a namespace, of a table or index; kept so that a dropped id never comes back.
    pub next_namespace: u32,
    pub next_table: u32,
}

impl Catalog {
    pub fn namespace(&self, name: &str) -> Option<&Namespace> {
        self.namespaces.get(name)
    }

    pub fn namespaces(&self) -> impl Iterator<Item = &Namespace> {
        self.namespaces.values()
    }

    pub fn table(&self, namespace: &str, name: &str) -> Option<&Arc<Table>> {
        self.namespaces.get(namespace)?.tables.get(name)
    }

    pub fn table_by_id(&self, id: TableId) -> Option<&Arc<Table>> {
        self.tables.get(&id)
    }

    /// The index of this name and its table.
    pub fn index(&self, namespace: &str, name: &str) -> Option<(&Arc<Table>, &Arc<Index>)> {
        let mut tables = self.namespaces.get(namespace)?.tables.values();
        tables.find_map(|table| Some((table, table.indexes.iter().find(|index| index.name == name)?)))
    }

    /// The active version of a plugin.
    pub fn plugin(&self, namespace: &str, name: &str) -> Option<&Arc<Plugin>> {
        self.namespaces.get(namespace)?.plugins.get(name)?.last()
    }

    pub fn put_namespace(&mut self, id: NamespaceId, name: &str) {
        let namespace = Namespace {
            id,
            name: name.to_owned(),
            tables: BTreeMap::new(),
            plugins: BTreeMap::new(),
            retired: BTreeMap::new(),
        };
        self.namespaces.entry(name.to_owned()).or_insert(namespace);
        self.next_namespace = self.next_namespace.max(id.0 + 1);
    }

    pub fn drop_namespace(&mut self, name: &str) {
        if let Some(namespace) = self.namespaces.remove(name) {
            for table in namespace.tables.values() {
                self.tables.remove(&table.id);
            }
        }
    }

    /// A new table, or another version of one, which may have another name.
    pub fn put_table(&mut self, table: Arc<Table>) {
        let ids = table.indexes.iter().map(|index| index.id.0).chain([table.id.0]);
        self.next_table = ids.fold(self.next_table, |next, id| next.max(id + 1));
        if let Some(namespace) = self.namespaces.get_mut(&table.namespace_name) {
            if let Some(before) = self.tables.get(&table.id) {
                namespace.tables.remove(&before.name);
            }
            namespace.tables.insert(table.name.clone(), table.clone());
            self.tables.insert(table.id, table);
        }
    }

    pub fn drop_table(&mut self, id: TableId) {
        if let Some(table) = self.tables.remove(&id)
            && let Some(namespace) = self.namespaces.get_mut(&table.namespace_name)
        {
            namespace.tables.remove(&table.name);
        }
    }

    pub fn put_plugin(&mut self, plugin: Arc<Plugin>) {
        if let Some(namespace) = self.namespaces.get_mut(&plugin.namespace_name) {
            let versions = namespace.plugins.entry(plugin.name.clone()).or_default();
            versions.retain(|version| version.version != plugin.version);
            versions.push(plugin);
            versions.sort_by_key(|version| version.version);
        }
    }

    pub fn drop_plugin(&mut self, namespace: &str, name: &str) {
        if let Some(namespace) = self.namespaces.get_mut(namespace)
            && let Some(last) = namespace.plugins.remove(name).and_then(|versions| versions.last().cloned())
        {
            namespace.retired.insert(name.to_owned(), last.version);
        }
    }

    pub fn retire_plugin(&mut self, namespace: NamespaceId, name: &str, version: u32) {
        if let Some(namespace) = self.namespaces.values_mut().find(|found| found.id == namespace) {
            namespace.retired.insert(name.to_owned(), version);
        }
    }

    /// The number for the next version of a plugin.
    pub fn next_plugin_version(&self, namespace: &str, name: &str) -> u32 {
        let retired = self.namespaces.get(namespace).and_then(|found| found.retired.get(name)).copied();
        let active = self.plugin(namespace, name).map(|plugin| plugin.version);
        active.max(retired).map_or(1, |version| version + 1)
    }
}
