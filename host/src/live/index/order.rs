//! Values as bytes that sort as the values compare, for one column's conditions.

use wire::{ImageRef, Kind, Value};

/// What a row has in a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cell<'a> {
    Null,
    Value(&'a [u8]),
    /// A value that has no place in the order, or damage: it may fit anything.
    Odd,
}

/// Reads a column of a row; `scratch` holds what is not in the image as it is.
pub(super) fn cell<'a>(row: &ImageRef<'a>, column: u16, kind: Kind, scratch: &'a mut Vec<u8>) -> Cell<'a> {
    if row.is_null(column) {
        return Cell::Null;
    }
    scratch.clear();
    let put = match kind {
        Kind::Bool => row.bool(column).map(|value| scratch.push(u8::from(value))),
        Kind::Int => row.int(column).map(|value| scratch.extend(int(value))),
        Kind::Float => row.float(column).and_then(float).map(|bytes| scratch.extend(bytes)),
        Kind::Decimal => row.decimal(column).map(|value| scratch.extend(decimal(value))),
        Kind::Text | Kind::Bytes | Kind::Uuid => return row.bytes(column).map_or(Cell::Odd, Cell::Value),
    };
    match put {
        Some(()) => Cell::Value(scratch),
        None => Cell::Odd,
    }
}

/// The bytes of a constant; `None` for NULL. NaN makes no condition (`sql` sees to that). `scratch` holds what is not in
/// the value as it is.
pub(super) fn sortable<'a>(value: &'a Value, scratch: &'a mut Vec<u8>) -> Option<&'a [u8]> {
    scratch.clear();
    match value {
        Value::Null => return None,
        Value::Bool(value) => scratch.push(u8::from(*value)),
        Value::Int(value) => scratch.extend(int(*value)),
        Value::Float(value) => scratch.extend(float(*value)?),
        Value::Decimal(value) => scratch.extend(decimal(*value)),
        Value::Text(text) => return Some(text.as_bytes()),
        Value::Bytes(bytes) => return Some(bytes),
        Value::Uuid(bytes) => return Some(bytes),
    }
    Some(scratch)
}

/// The same, to keep.
pub(super) fn sorted(value: &Value) -> Option<Box<[u8]>> {
    sortable(value, &mut Vec::new()).map(Box::from)
}

/// The greatest text that starts so, near enough: UTF-8 has no byte 0xff.
pub(super) fn last_with_prefix(start: &str) -> Option<Box<[u8]>> {
    let mut last = start.as_bytes().to_vec();
    last.push(0xff);
    Some(last.into())
}

fn int(value: i64) -> [u8; 8] {
    (value as u64 ^ 1 << 63).to_be_bytes()
}

fn decimal(value: i128) -> [u8; 16] {
    (value as u128 ^ 1 << 127).to_be_bytes()
}

/// Both zeros are one value here, so that it does not matter whether a predicate tells them apart.
fn float(value: f64) -> Option<[u8; 8]> {
    if value.is_nan() {
        return None;
    }
    let bits = (value + 0.0).to_bits();
    let negative = bits >> 63 == 1;
    Some((if negative { !bits } else { bits | 1 << 63 }).to_be_bytes())
}
