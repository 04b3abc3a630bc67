//! Made-up rows, to see how long a plugin takes for a change: always the same, so that two versions can be compared.

use wire::abi::PluginKind;
use wire::{ImageBuilder, Schema, Type, Value};

use super::trial::Images;

/// As many as the host hands over in one call.
const ROWS: i64 = wire::abi::MAX_BATCH as i64;

/// One row in so many has NULL in a column that may have it.
const NULLS: i64 = 16;

const DAY_MICROS: i64 = 86_400_000_000;

/// Rows with these columns, with NULL here and there or nowhere; for a plugin that sees changes, updates of them.
pub(super) fn images(kind: PluginKind, schema: &Schema, nulls: bool) -> Images {
    let image = |row| image(schema, row, nulls);
    (0..ROWS).map(|row| (kind.sees_changes().then(|| image(row)), Some(image(row + 1)))).collect()
}

fn image(schema: &Schema, row: i64, nulls: bool) -> Vec<u8> {
    let mut image = ImageBuilder::new(schema.slots());
    for column in &schema.columns {
        let null = nulls && column.nullable && (row + i64::from(column.id)) % NULLS == 0;
        if !null {
            image.set(column.id, &value(column.ty, row));
        }
    }
    image.finish()
}

fn value(ty: Type, row: i64) -> Value {
    match ty {
        Type::Boolean => Value::Bool(row % 2 == 0),
        Type::SmallInt | Type::Int | Type::BigInt => Value::Int(row * 7),
        Type::Real | Type::Double => Value::Float(row as f64 * 1.5),
        Type::Decimal { precision, .. } => Value::Decimal(i128::from(row) * 125 % 10_i128.pow(u32::from(precision))),
        Type::Text => Value::Text(format!("text {row}")),
        Type::Json => Value::Text(format!("{{\"number\":{row}}}")),
        Type::Bytea => Value::Bytes(row.to_be_bytes().to_vec()),
        // From 2020 on, a day each.
        Type::Date => Value::Int(18_262 + row),
        Type::Time => Value::Int(row * 1_000_000),
        Type::Timestamp => Value::Int((18_262 + row) * DAY_MICROS),
        Type::Uuid => Value::Uuid([row as u8; 16]),
    }
}

#[cfg(test)]
mod tests {
    use wire::{ColumnDecl, ImageRef};

    use super::*;

    #[test]
    fn rows_are_whole_whatever_the_columns() {
        let decimals = [Type::Decimal { precision: 1, scale: 0 }, Type::Decimal { precision: 38, scale: 10 }];
        let types = Type::PLAIN.into_iter().chain(decimals);
        let column = |(id, ty): (usize, Type)| ColumnDecl {
            // Ids with gaps, as after DROP COLUMN.
            id: id as u16 * 2,
            name: ty.to_string(),
            ty,
            nullable: id > 0,
            key: id == 0,
        };
        let schema = Schema { columns: types.enumerate().map(column).collect() };
        for kind in [PluginKind::RowFilter, PluginKind::ChangeTransform] {
            let images = images(kind, &schema, true);
            assert_eq!(images.len(), ROWS as usize);
            assert!(images.iter().all(|(old, new)| old.is_some() == kind.sees_changes() && old != new));
            let rows: Vec<_> = images.iter().flat_map(|(_, new)| new).collect();
            let rows: Vec<_> = rows.into_iter().map(|image| ImageRef::parse(image).unwrap().0).collect();
            let batch = crate::sql::arrow::to_batch(&schema, &rows).unwrap();
            assert_eq!((batch.num_rows(), batch.num_columns()), (64, schema.columns.len()));
            assert_eq!(batch.column(0).null_count(), 0);
            assert!(batch.column(1).null_count() > 0);

            let whole = super::images(kind, &schema, false);
            let rows: Vec<_> = whole.iter().flat_map(|(_, new)| new).collect();
            let rows: Vec<_> = rows.into_iter().map(|image| ImageRef::parse(image).unwrap().0).collect();
            let batch = crate::sql::arrow::to_batch(&schema, &rows).unwrap();
            assert!(batch.columns().iter().all(|column| column.null_count() == 0));
        }
    }
}
