//! The system tables that the catalog alone can answer: `information_schema.schemata`, `.tables` and `.columns`,
//! `system.tables`, `.columns`, `.indexes` and `.plugins`.
//!
//! Everybody may read them: what there is, is no secret among a server's users; whose rows are whose, is.

use std::sync::Arc;

use wire::{Type, Value};

use super::dml::show_value;
use super::system::{Rows, SYSTEM, SystemRows, SystemTable, int, optional, text};
use super::{RequestEnv, SqlError};
use crate::catalog::{Catalog, Column, DefaultValue, Index, Plugin, Table};
use crate::config::Role;

pub(crate) const INFORMATION_SCHEMA: &str = "information_schema";
pub(crate) const CATALOG_NAME: &str = "tidegate";

type Columns = &'static [(&'static str, Type)];

pub(crate) fn system_tables() -> Vec<SystemTable> {
    let of = |namespace, name, columns: Columns, rows: fn(&Catalog) -> Rows| SystemTable {
        namespace,
        name,
        columns,
        least: Role::User,
        rows: SystemRows::All(Box::new(move |env: &RequestEnv| Ok::<_, SqlError>(rows(&env.catalog)))),
    };
    vec![
        of(INFORMATION_SCHEMA, "schemata", SCHEMATA, schemata),
        of(INFORMATION_SCHEMA, "tables", TABLES, tables),
        of(INFORMATION_SCHEMA, "columns", COLUMNS, columns),
        of(SYSTEM, "tables", SYSTEM_TABLES, own_tables),
        of(SYSTEM, "columns", SYSTEM_COLUMNS, own_columns),
        of(SYSTEM, "indexes", INDEXES, indexes),
        of(SYSTEM, "plugins", PLUGINS, plugins),
    ]
}

const SCHEMATA: Columns = &[("catalog_name", Type::Text), ("schema_name", Type::Text)];
const TABLES: Columns = &[
    ("table_catalog", Type::Text),
    ("table_schema", Type::Text),
    ("table_name", Type::Text),
    ("table_type", Type::Text),
];
const COLUMNS: Columns = &[
    ("table_catalog", Type::Text),
    ("table_schema", Type::Text),
    ("table_name", Type::Text),
    ("column_name", Type::Text),
    ("ordinal_position", Type::Int),
    ("data_type", Type::Text),
    ("is_nullable", Type::Text),
    ("column_default", Type::Text),
    ("is_key", Type::Text),
];
const SYSTEM_TABLES: Columns = &[
    ("namespace", Type::Text),
    ("name", Type::Text),
    ("type", Type::Text),
    ("id", Type::BigInt),
    ("schema_version", Type::BigInt),
    ("columns", Type::Int),
    ("key", Type::Text),
    ("ttl_ms", Type::BigInt),
];
const SYSTEM_COLUMNS: Columns = &[
    ("namespace", Type::Text),
    ("table_name", Type::Text),
    ("name", Type::Text),
    ("position", Type::Int),
    ("id", Type::Int),
    ("type", Type::Text),
    ("nullable", Type::Boolean),
    ("default", Type::Text),
    ("key_position", Type::Int),
];
const INDEXES: Columns = &[
    ("namespace", Type::Text),
    ("table_name", Type::Text),
    ("name", Type::Text),
    ("id", Type::BigInt),
    ("columns", Type::Text),
    ("unique", Type::Boolean),
    ("state", Type::Text),
];
const PLUGINS: Columns = &[
    ("namespace", Type::Text),
    ("name", Type::Text),
    ("version", Type::BigInt),
    ("active", Type::Boolean),
    ("kind", Type::Text),
    ("abi", Type::Int),
    ("sha256", Type::Text),
    ("size", Type::BigInt),
    ("uploaded_at", Type::Timestamp),
    ("uploaded_by", Type::Text),
];

fn all_tables(catalog: &Catalog) -> impl Iterator<Item = &Arc<Table>> {
    catalog.namespaces().flat_map(|namespace| namespace.tables.values())
}

/// Every column with its table and its place there, from 1.
fn all_columns(catalog: &Catalog) -> impl Iterator<Item = (&Table, usize, &Column)> {
    all_tables(catalog)
        .flat_map(|table| table.columns.iter().enumerate().map(move |(at, column)| (&**table, at + 1, column)))
}

fn schemata(catalog: &Catalog) -> Rows {
    catalog.namespaces().map(|namespace| vec![text(CATALOG_NAME), text(&namespace.name)]).collect()
}

fn tables(catalog: &Catalog) -> Rows {
    let row = |table: &Arc<Table>| {
        vec![text(CATALOG_NAME), text(&table.namespace_name), text(&table.name), text(table.kind.as_str())]
    };
    all_tables(catalog).map(row).collect()
}

fn columns(catalog: &Catalog) -> Rows {
    let yes = |yes: bool| text(if yes { "YES" } else { "NO" });
    let row = |(table, at, column): (&Table, usize, &Column)| {
        vec![
            text(CATALOG_NAME),
            text(&table.namespace_name),
            text(&table.name),
            text(&column.name),
            int(at),
            text(column.ty.to_string()),
            yes(column.nullable),
            optional(default_of(column)),
            yes(table.is_key(column.id)),
        ]
    };
    all_columns(catalog).map(row).collect()
}

fn own_tables(catalog: &Catalog) -> Rows {
    let row = |table: &Arc<Table>| {
        let key = table.key.iter().filter_map(|id| table.column_by_id(*id));
        let key: Vec<&str> = key.map(|column| column.name.as_str()).collect();
        vec![
            text(&table.namespace_name),
            text(&table.name),
            text(table.kind.as_str()),
            int(table.id.0),
            int(table.schema_version),
            int(table.columns.len()),
            text(key.join(", ")),
            optional(table.ttl_micros.map(|micros| int(micros / 1_000))),
        ]
    };
    all_tables(catalog).map(row).collect()
}

fn indexes(catalog: &Catalog) -> Rows {
    let row = |(table, index): (&Arc<Table>, &Arc<Index>)| {
        let columns = index.columns.iter().filter_map(|id| table.column_by_id(*id));
        let columns: Vec<&str> = columns.map(|column| column.name.as_str()).collect();
        vec![
            text(&table.namespace_name),
            text(&table.name),
            text(&index.name),
            int(index.id.0),
            text(columns.join(", ")),
            Value::Bool(index.unique),
            text(index.state.as_str()),
        ]
    };
    all_tables(catalog).flat_map(|table| table.indexes.iter().map(move |index| (table, index))).map(row).collect()
}

fn own_columns(catalog: &Catalog) -> Rows {
    let row = |(table, at, column): (&Table, usize, &Column)| {
        vec![
            text(&table.namespace_name),
            text(&table.name),
            text(&column.name),
            int(at),
            int(column.id),
            text(column.ty.to_string()),
            Value::Bool(column.nullable),
            optional(default_of(column)),
            optional(table.key.iter().position(|id| *id == column.id).map(|at| int(at + 1))),
        ]
    };
    all_columns(catalog).map(row).collect()
}

fn plugins(catalog: &Catalog) -> Rows {
    let row = |plugin: &Arc<Plugin>, active: bool| {
        vec![
            text(&plugin.namespace_name),
            text(&plugin.name),
            int(plugin.version),
            Value::Bool(active),
            text(plugin.kind.as_str()),
            int(plugin.abi),
            text(&plugin.sha256),
            int(plugin.size),
            Value::Int(plugin.uploaded_at),
            text(&plugin.uploaded_by),
        ]
    };
    let versions = catalog.namespaces().flat_map(|namespace| namespace.plugins.values());
    let rows = |versions: &Vec<Arc<Plugin>>| {
        let last = versions.len().saturating_sub(1);
        versions.iter().enumerate().map(|(at, plugin)| row(plugin, at == last)).collect::<Vec<_>>()
    };
    versions.flat_map(rows).collect()
}

fn default_of(column: &Column) -> Option<Value> {
    column.default.as_ref().map(|default| text(show_default(default, column.ty)))
}

/// As it could be written in CREATE TABLE.
fn show_default(default: &DefaultValue, ty: Type) -> String {
    match default {
        DefaultValue::Literal(value) => {
            let text = show_value(value, ty).unwrap_or_default();
            let bare = matches!(value, Value::Bool(_) | Value::Decimal(_) | Value::Float(_))
                || matches!(ty, Type::SmallInt | Type::Int | Type::BigInt);
            if bare { text } else { format!("'{}'", text.replace('\'', "''")) }
        }
        DefaultValue::Now => "now()".to_owned(),
        DefaultValue::Uuid => "uuid()".to_owned(),
        DefaultValue::CurrentUser => "current_user".to_owned(),
    }
}
