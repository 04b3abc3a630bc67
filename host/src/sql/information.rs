//! `information_schema.tables` and `.columns`, made from the request's catalog snapshot when a query names them.

use std::sync::Arc;

use ::arrow::array::{ArrayRef, Int32Array, StringArray};
use ::arrow::datatypes::{DataType, Field, Schema};
use ::arrow::record_batch::RecordBatch;
use datafusion::common::Result;
use datafusion::datasource::{MemTable, provider_as_source};
use datafusion::logical_expr::TableSource;

use wire::{Type, Value};

use super::dml::show_value;
use crate::catalog::{Catalog, Column, DefaultValue, Table};

pub(crate) const INFORMATION_SCHEMA: &str = "information_schema";
pub(crate) const CATALOG_NAME: &str = "tidegate";

/// The table of this name, if there is one.
pub(crate) fn source(catalog: &Catalog, name: &str) -> Option<Result<Arc<dyn TableSource>>> {
    match name {
        "tables" => Some(tables(catalog)),
        "columns" => Some(columns(catalog)),
        _ => None,
    }
}

fn all_tables(catalog: &Catalog) -> Vec<&Arc<Table>> {
    catalog.namespaces().flat_map(|namespace| namespace.tables.values()).collect()
}

fn tables(catalog: &Catalog) -> Result<Arc<dyn TableSource>> {
    let tables = all_tables(catalog);
    in_memory(vec![
        text("table_catalog", tables.iter().map(|_| Some(CATALOG_NAME.to_owned()))),
        text("table_schema", tables.iter().map(|table| Some(table.namespace_name.clone()))),
        text("table_name", tables.iter().map(|table| Some(table.name.clone()))),
        text("table_type", tables.iter().map(|table| Some(table.kind.as_str().to_owned()))),
    ])
}

fn columns(catalog: &Catalog) -> Result<Arc<dyn TableSource>> {
    let rows: Vec<(&Table, usize, &Column)> = all_tables(catalog)
        .into_iter()
        .flat_map(|table| table.columns.iter().enumerate().map(move |(at, column)| (&**table, at, column)))
        .collect();
    let yes = |yes: bool| Some(if yes { "YES" } else { "NO" }.to_owned());
    let positions = rows.iter().map(|(_, at, _)| i32::try_from(at + 1).ok());
    in_memory(vec![
        text("table_catalog", rows.iter().map(|_| Some(CATALOG_NAME.to_owned()))),
        text("table_schema", rows.iter().map(|(table, ..)| Some(table.namespace_name.clone()))),
        text("table_name", rows.iter().map(|(table, ..)| Some(table.name.clone()))),
        text("column_name", rows.iter().map(|(.., column)| Some(column.name.clone()))),
        ("ordinal_position", Arc::new(Int32Array::from_iter(positions)) as ArrayRef),
        text("data_type", rows.iter().map(|(.., column)| Some(column.ty.to_string()))),
        text("is_nullable", rows.iter().map(|(.., column)| yes(column.nullable))),
        text(
            "column_default",
            rows.iter().map(|(.., column)| column.default.as_ref().map(|default| show_default(default, column.ty))),
        ),
        text("is_key", rows.iter().map(|(table, _, column)| yes(table.is_key(column.id)))),
    ])
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

fn text(name: &'static str, cells: impl Iterator<Item = Option<String>>) -> (&'static str, ArrayRef) {
    (name, Arc::new(StringArray::from_iter(cells)))
}

fn in_memory(columns: Vec<(&'static str, ArrayRef)>) -> Result<Arc<dyn TableSource>> {
    let field = |(name, array): &(&str, ArrayRef)| {
        let ty = if *name == "ordinal_position" { DataType::Int32 } else { DataType::Utf8 };
        debug_assert_eq!(&ty, array.data_type());
        Field::new(*name, ty, true)
    };
    let schema = Arc::new(Schema::new(columns.iter().map(field).collect::<Vec<_>>()));
    let batch = RecordBatch::try_new(schema.clone(), columns.into_iter().map(|(_, array)| array).collect())?;
    Ok(provider_as_source(Arc::new(MemTable::try_new(schema, vec![vec![batch]])?)))
}
