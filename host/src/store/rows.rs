//! Stored row bytes: schema version and row image; lifting images of older schema versions.
//!
//! ```text
//! format          1 byte: 1, or 2 in stream tables
//! schema version  varint (u32): the table's when the row was written
//! expires         8 bytes, little-endian, format 2 only: microseconds since 1970, from when on the row does not show
//! image           wire::image
//! ```
//!
//! ADD and DROP COLUMN rewrite no row: a row of another schema version is re-encoded when it is read. Column ids are
//! never reused, so a slot means the same in every version that has it, and an image has a slot for every column there
//! was when it was written: a column beyond its slots was added later, and reads as what ALTER said for older rows.

use wire::{ImageBuilder, ImageRef, Kind};

use super::StoreError;
use crate::catalog::Table;

const ROW_FORMAT: u8 = 1;
const EXPIRING_ROW_FORMAT: u8 = 2;
const EXPIRES_BYTES: usize = 8;

/// The bytes to store for `image`, which is at `table`'s schema version.
pub(super) fn encode_row(table: &Table, image: &[u8], expires: Option<i64>) -> Result<Vec<u8>, StoreError> {
    let mut out = Vec::with_capacity(6 + EXPIRES_BYTES + image.len());
    out.push(if expires.is_some() { EXPIRING_ROW_FORMAT } else { ROW_FORMAT });
    let mut out = postcard::to_extend(&table.schema_version, out)
        .map_err(|error| StoreError::Corrupt(format!("a schema version cannot be encoded: {error}")))?;
    if let Some(expires) = expires {
        out.extend_from_slice(&expires.to_le_bytes());
    }
    out.extend_from_slice(image);
    Ok(out)
}

/// When the stored row stops showing; `None`: never. What cannot be read never does: [`open_row`] is to say so.
pub(super) fn expires(stored: &[u8]) -> Option<i64> {
    let (&EXPIRING_ROW_FORMAT, rest) = stored.split_first()? else { return None };
    let (_, rest) = postcard::take_from_bytes::<u32>(rest).ok()?;
    rest.first_chunk().map(|bytes| i64::from_le_bytes(*bytes))
}

/// The image in stored bytes, at `table`'s schema version; `buffer` holds it where it had to be lifted.
pub(super) fn open_row<'a>(table: &Table, stored: &'a [u8], buffer: &'a mut Vec<u8>) -> Result<&'a [u8], StoreError> {
    let (version, image) = match stored.split_first() {
        Some((&ROW_FORMAT, rest)) => postcard::take_from_bytes::<u32>(rest).map_err(|_| damaged(table))?,
        Some((&EXPIRING_ROW_FORMAT, rest)) => {
            let (version, rest) = postcard::take_from_bytes::<u32>(rest).map_err(|_| damaged(table))?;
            (version, rest.get(EXPIRES_BYTES..).ok_or_else(|| damaged(table))?)
        }
        Some((format, _)) => {
            return Err(StoreError::Corrupt(format!(
                "a row of {}.{} has format {format}; this tidegate knows formats up to {EXPIRING_ROW_FORMAT}",
                table.namespace_name, table.name
            )));
        }
        None => return Err(damaged(table)),
    };
    // Between the two only names changed.
    if (table.images_since..=table.schema_version).contains(&version) {
        return Ok(image);
    }
    buffer.clear();
    lift(table, image, buffer)?;
    Ok(buffer)
}

/// Whether two images of `table` hold the same values, whatever the order of their heaps.
pub(super) fn same_row(kinds: &[Kind], old: &[u8], new: &[u8]) -> bool {
    if old == new {
        return true;
    }
    match (ImageRef::parse(old), ImageRef::parse(new)) {
        (Ok((old, ..)), Ok((new, ..))) => kinds.iter().enumerate().all(|(id, kind)| old.same(&new, id as u16, *kind)),
        // Not for this function to say: the frame refuses a malformed image.
        _ => false,
    }
}

/// Re-encodes an image of another schema version: columns that came later have their fill, dropped ones are gone.
fn lift(table: &Table, image: &[u8], out: &mut Vec<u8>) -> Result<(), StoreError> {
    let (image, ..) = ImageRef::parse(image).map_err(|_| damaged(table))?;
    let mut builder = ImageBuilder::new(table.slots());
    for column in &table.columns {
        if column.id >= image.columns() {
            if let Some(fill) = &column.fill {
                builder.set(column.id, fill);
            }
            continue;
        }
        let Some(slot) = image.slot(column.id) else { continue };
        match column.ty.kind() {
            Kind::Bool => builder.set_bool(column.id, slot != 0),
            Kind::Int => builder.set_int(column.id, slot as i64),
            Kind::Float => builder.set_float(column.id, f64::from_bits(slot)),
            Kind::Decimal | Kind::Text | Kind::Bytes | Kind::Uuid => {
                builder.set_bytes(column.id, image.bytes(column.id).ok_or_else(|| damaged(table))?);
            }
        }
    }
    builder.finish_into(out);
    Ok(())
}

fn damaged(table: &Table) -> StoreError {
    StoreError::Corrupt(format!("a row of {}.{} cannot be read", table.namespace_name, table.name))
}

#[cfg(test)]
mod tests {
    use wire::{Type, Value};

    use super::super::fixtures;
    use super::*;
    use crate::catalog::Column;

    #[test]
    fn the_bytes_are_pinned() {
        let mut table = fixtures::table(1);
        table.schema_version = 300;
        assert_eq!(encode_row(&table, &[9, 8], None).unwrap(), [1, 0xac, 0x02, 9, 8]);
        let expiring = [2, 0xac, 0x02, 3, 1, 0, 0, 0, 0, 0, 0, 9, 8];
        assert_eq!(encode_row(&table, &[9, 8], Some(0x103)).unwrap(), expiring);
        assert_eq!((expires(&expiring), expires(&[1, 0xac, 0x02, 9, 8])), (Some(0x103), None));
        let mut buffer = Vec::new();
        assert_eq!(open_row(&table, &expiring[..11], &mut buffer).unwrap(), [0u8; 0]);
        assert!(open_row(&table, &expiring[..10], &mut buffer).is_err());
    }

    #[test]
    fn a_row_of_its_own_version_is_read_in_place() {
        let table = fixtures::table(1);
        let image = fixtures::image(7, Some("x"));
        let stored = encode_row(&table, &image, None).unwrap();
        let mut buffer = Vec::new();
        assert_eq!(open_row(&table, &stored, &mut buffer).unwrap(), image);
        assert!(buffer.is_empty());
    }

    #[test]
    fn older_rows_are_lifted() {
        let old = fixtures::table(1);
        let stored = encode_row(&old, &fixtures::image(7, Some("x")), None).unwrap();

        let mut added = old.clone();
        added.schema_version += 1;
        added.images_since = added.schema_version;
        added.columns.push(fixtures::column(4, "later", Type::Text, true));
        added.columns.push(Column { fill: Some(Value::Int(9)), ..fixtures::column(5, "filled", Type::Int, true) });
        let mut buffer = Vec::new();
        let image = open_row(&added, &stored, &mut buffer).unwrap();
        let (image, ..) = ImageRef::parse(image).unwrap();
        assert_eq!(image.columns(), 6);
        assert_eq!((image.int(0), image.text(1), image.is_null(4), image.int(5)), (Some(7), Some("x"), true, Some(9)));

        // NULL in a row that had the column is NULL, whatever the fill.
        let mut null = old.clone();
        null.columns[1].fill = Some(Value::Text("fill".to_owned()));
        null.schema_version += 1;
        null.images_since = null.schema_version;
        let stored_null = encode_row(&old, &fixtures::image(7, None), None).unwrap();
        let mut buffer = Vec::new();
        let image = open_row(&null, &stored_null, &mut buffer).unwrap();
        assert!(ImageRef::parse(image).unwrap().0.is_null(1));

        let mut dropped = old.clone();
        dropped.schema_version += 1;
        dropped.images_since = dropped.schema_version;
        dropped.columns.truncate(1);
        let mut buffer = Vec::new();
        let image = open_row(&dropped, &stored, &mut buffer).unwrap();
        let (image, ..) = ImageRef::parse(image).unwrap();
        assert_eq!((image.columns(), image.int(0)), (1, Some(7)));
    }

    #[test]
    fn after_a_new_name_rows_are_read_in_place() {
        let old = fixtures::table(1);
        let image = fixtures::image(7, Some("x"));
        let stored = encode_row(&old, &image, None).unwrap();
        let mut renamed = old;
        renamed.schema_version += 1;
        renamed.columns[1].name = "other".to_owned();
        let mut buffer = Vec::new();
        assert_eq!(open_row(&renamed, &stored, &mut buffer).unwrap(), image);
        assert!(buffer.is_empty());
    }

    #[test]
    fn unknown_and_damaged_rows_are_refused() {
        let table = fixtures::table(1);
        let mut buffer = Vec::new();
        for bytes in [&[][..], &[3, 1, 0], &[2, 1, 0], &[1], &[1, 99, 0xff]] {
            assert!(matches!(open_row(&table, bytes, &mut buffer), Err(StoreError::Corrupt(_))), "{bytes:?}");
        }
    }

    #[test]
    fn the_same_values_in_another_heap_order_are_the_same_row() {
        let kinds = [Kind::Text, Kind::Text];
        let (mut one, mut other) = (ImageBuilder::new(2), ImageBuilder::new(2));
        one.set(0, &Value::Text("a".into()));
        one.set(1, &Value::Text("b".into()));
        other.set(1, &Value::Text("b".into()));
        other.set(0, &Value::Text("a".into()));
        let (one, other) = (one.finish(), other.finish());
        assert_ne!(one, other);
        assert!(same_row(&kinds, &one, &other));
        assert!(!same_row(&kinds, &one, &ImageBuilder::new(2).finish()));
    }
}
