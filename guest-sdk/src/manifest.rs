//! The manifest's lines, joined at compile time: they are read from the module without running it, so they have to
//! be constants.

use wire::abi::{ColumnType, MANIFEST_MAX_BYTES};

/// Bytes of all parts together.
pub const fn len(parts: &[&[&str]]) -> usize {
    let (mut total, mut i) = (0, 0);
    while i < parts.len() {
        let mut j = 0;
        while j < parts[i].len() {
            total += parts[i][j].len();
            j += 1;
        }
        i += 1;
    }
    assert!(total <= MANIFEST_MAX_BYTES, "the plugin's manifest is over 64 KiB: shorten the doc comments");
    total
}

/// All parts, one after another. `N` is their [`len`].
pub const fn join<const N: usize>(parts: &[&[&str]]) -> [u8; N] {
    let mut out = [0; N];
    let (mut at, mut i) = (0, 0);
    while i < parts.len() {
        let mut j = 0;
        while j < parts[i].len() {
            let part = parts[i][j].as_bytes();
            let mut k = 0;
            while k < part.len() {
                out[at] = part[k];
                at += 1;
                k += 1;
            }
            j += 1;
        }
        i += 1;
    }
    out
}

/// The name of a column type in a manifest.
pub const fn column_type(ty: ColumnType) -> &'static str {
    match ty {
        ColumnType::Bool => "bool",
        ColumnType::Int => "int",
        ColumnType::Float => "float",
        ColumnType::Number => "number",
        ColumnType::Decimal => "decimal",
        ColumnType::Text => "text",
        ColumnType::Bytes => "bytes",
        ColumnType::Uuid => "uuid",
        ColumnType::Any => "any",
    }
}
