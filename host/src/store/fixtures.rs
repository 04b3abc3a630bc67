//! Tables, rows and plugins for the store's tests.

use wire::abi::{ColumnType, ManifestLine, ParamType};
use wire::{ImageBuilder, Type, Value};

use super::*;
use crate::catalog::{Column, Index, IndexId, IndexState, PluginKind};

pub const MAIN: NamespaceId = NamespaceId(1);

pub fn column(id: u16, name: &str, ty: Type, nullable: bool) -> Column {
    Column { id, name: name.to_owned(), ty, nullable, default: None, fill: None }
}

/// `main.t{id}(id BIGINT PRIMARY KEY, text TEXT, score DOUBLE)`, shared.
pub fn table(id: u32) -> Table {
    Table {
        id: TableId(id),
        namespace: MAIN,
        namespace_name: "main".to_owned(),
        name: format!("t{id}"),
        kind: TableKind::Shared,
        schema_version: 1,
        columns: vec![
            column(0, "id", Type::BigInt, false),
            column(1, "text", Type::Text, true),
            column(2, "score", Type::Double, true),
        ],
        key: vec![0],
        generated_key: false,
        indexes: Vec::new(),
        next_column: 3,
        images_since: 1,
        ttl_micros: None,
    }
}

pub fn user_table(id: u32) -> Table {
    Table { kind: TableKind::User, ..table(id) }
}

/// Rows live for this long.
pub const TTL_MICROS: i64 = 3_600_000_000;

pub fn stream_table(id: u32) -> Table {
    Table { kind: TableKind::Stream, ttl_micros: Some(TTL_MICROS), ..table(id) }
}

/// `i{id}` over these columns, in use.
pub fn index(id: u32, columns: &[u16], unique: bool) -> Arc<Index> {
    let name = format!("i{id}");
    Arc::new(Index { id: IndexId(id), name, columns: columns.to_vec(), unique, state: IndexState::Ready })
}

pub fn table_with_key(id: u32, types: &[Type]) -> Table {
    let columns = types.iter().enumerate().map(|(i, ty)| column(i as u16, &format!("c{i}"), *ty, false)).collect();
    let slots = types.len() as u16;
    Table { columns, key: (0..slots).collect(), next_column: slots, ..table(id) }
}

/// An image of [`table`].
pub fn image(id: i64, text: Option<&str>) -> Vec<u8> {
    let mut builder = ImageBuilder::new(3);
    builder.set_int(0, id);
    if let Some(text) = text {
        builder.set(1, &Value::Text(text.to_owned()));
    }
    builder.finish()
}

pub fn plugin(name: &str, version: u32) -> Plugin {
    Plugin {
        namespace: MAIN,
        namespace_name: "main".to_owned(),
        name: name.to_owned(),
        version,
        sha256: format!("{name}-{version}"),
        kind: PluginKind::RowFilter,
        abi: 1,
        manifest: vec![
            ManifestLine::Plugin {
                abi: 1,
                kind: None,
                pass: None,
                name: None,
                doc: Some("keeps late ones".to_owned()),
            },
            ManifestLine::Param { name: "minutes".to_owned(), r#type: ParamType::Int, default: None, doc: None },
            ManifestLine::Column { name: "dep_delay".to_owned(), r#type: ColumnType::Number, optional: true },
        ],
        size: 3,
        uploaded_at: 1_700_000_000_000_000,
        uploaded_by: "admin".to_owned(),
        restored: None,
    }
}
