//! A row given as a JSON object, as an image: by the very conversions of an INSERT. And back, for tables that show rows
//! of any other table in one column.

use std::sync::Arc;

use ::arrow::array::{ArrayRef, BinaryArray, BooleanArray, Float64Array, Int64Array, StringArray};
use serde_json::{Map, Value as Json};
use wire::{ImageBuilder, ImageRef, Schema, Type, Value};

use super::SqlError;
use super::arrow::{CastTarget, bytes_of, cast_for, value_at};
use super::dml::show_value;

/// The image of the object's values in the schema's columns; columns that it does not name are NULL, and names that no
/// column has are refused.
pub fn image(schema: &Schema, object: &Map<String, Json>) -> Result<Vec<u8>, SqlError> {
    if let Some(name) = object.keys().find(|name| schema.column(name).is_none()) {
        let known: Vec<&str> = schema.columns.iter().map(|column| column.name.as_str()).collect();
        let message = format!("there is no column {name:?}; there are {}", known.join(", "));
        return Err(SqlError::invalid("unknown_column", message));
    }
    let mut image = ImageBuilder::new(schema.slots());
    for column in &schema.columns {
        let Some(value) = object.get(&column.name) else { continue };
        let array = match (column.ty, value) {
            (Type::Bytea, Json::Null) => continue,
            (Type::Bytea, value) => bytes(&column.name, value)?,
            _ => match array(value, column.ty) {
                Some(array) => array,
                None => continue,
            },
        };
        let cast = cast_for(&CastTarget { name: &column.name, ty: column.ty }, &array)?;
        image.set(column.id, &value_at(&cast, 0, column.ty));
    }
    Ok(image.finish())
}

fn bytes(column: &str, value: &Json) -> Result<ArrayRef, SqlError> {
    let bytes = value.as_str().and_then(bytes_of).ok_or_else(|| {
        let message = format!("column {column:?} is BYTEA: it is a string of base64, or of \\x and hexadecimal");
        SqlError::invalid("invalid_value", message)
    })?;
    Ok(Arc::new(BinaryArray::from_vec(vec![&bytes])))
}

/// `None` for null.
fn array(value: &Json, ty: Type) -> Option<ArrayRef> {
    // A JSON column takes any JSON as it is, a string among it only when it is written as one.
    let text = |text: String| -> ArrayRef { Arc::new(StringArray::from(vec![text])) };
    Some(match value {
        Json::Null => return None,
        Json::Bool(value) => Arc::new(BooleanArray::from(vec![*value])),
        Json::String(value) => text(value.clone()),
        Json::Number(number) if ty != Type::Json => match number.as_i64() {
            Some(int) => Arc::new(Int64Array::from(vec![int])),
            None => match number.as_f64() {
                Some(float) => Arc::new(Float64Array::from(vec![float])),
                None => text(number.to_string()),
            },
        },
        other => text(other.to_string()),
    })
}

/// The image as the text of such an object: numbers where JSON has them, else text that SQL reads as the same value.
pub fn text(schema: &Schema, image: ImageRef<'_>) -> Result<String, SqlError> {
    let mut object = Map::new();
    for column in &schema.columns {
        let value = image.value(column.id, column.ty).map_err(|error| SqlError::Internal(error.to_string()))?;
        object.insert(column.name.clone(), shown(value, column.ty)?);
    }
    Ok(Json::Object(object).to_string())
}

fn shown(value: Value, ty: Type) -> Result<Json, SqlError> {
    let plain = match (&value, ty) {
        (Value::Null, _) => Some(Json::Null),
        (Value::Bool(value), _) => Some(Json::Bool(*value)),
        // Larger ones are text: not every reader of JSON has integers of 64 bits.
        (Value::Int(value), Type::SmallInt | Type::Int | Type::BigInt) if value.unsigned_abs() <= EXACT => {
            Some(Json::from(*value))
        }
        (Value::Float(value), _) if value.is_finite() => Some(Json::from(*value)),
        // Checked when it was written; what is no JSON after all is shown as the text that it is.
        (Value::Text(text), Type::Json) => serde_json::from_str(text).ok(),
        _ => None,
    };
    match (plain, value) {
        (Some(plain), _) => Ok(plain),
        (None, Value::Text(text)) => Ok(Json::String(text)),
        (None, value) => show_value(&value, ty).map(Json::String),
    }
}

/// 2^53: up to here a double has every integer.
const EXACT: u64 = 1 << 53;

#[cfg(test)]
mod tests {
    use serde_json::json;
    use wire::ColumnDecl;

    use super::*;

    fn schema() -> Schema {
        let types = [
            ("id", Type::BigInt),
            ("small", Type::SmallInt),
            ("price", Type::Decimal { precision: 8, scale: 2 }),
            ("ratio", Type::Double),
            ("at", Type::Timestamp),
            ("doc", Type::Json),
            ("name", Type::Text),
            ("ok", Type::Boolean),
            ("raw", Type::Bytea),
        ];
        let column = |(id, (name, ty)): (usize, (&str, Type))| ColumnDecl {
            id: id as u16,
            name: name.to_owned(),
            ty,
            nullable: true,
            key: id == 0,
        };
        Schema { columns: types.into_iter().enumerate().map(column).collect() }
    }

    fn values(object: Json) -> Result<Vec<Value>, SqlError> {
        let schema = schema();
        let bytes = image(&schema, object.as_object().unwrap())?;
        let (image, ..) = ImageRef::parse(&bytes).unwrap();
        Ok(schema.columns.iter().map(|column| image.value(column.id, column.ty).unwrap()).collect())
    }

    #[test]
    fn json_becomes_what_an_insert_would_store() {
        let found = values(json!({
            "id": "9007199254740993", "small": 7, "price": "12.50", "ratio": 3, "at": "1970-01-01T00:00:01Z",
            "doc": {"a": [1]}, "name": "x", "ok": true, "raw": "AA==",
        }));
        let expected = [
            Value::Int(9_007_199_254_740_993),
            Value::Int(7),
            Value::Decimal(1250),
            Value::Float(3.0),
            Value::Int(1_000_000),
            Value::Text(r#"{"a":[1]}"#.to_owned()),
            Value::Text("x".to_owned()),
            Value::Bool(true),
            Value::Bytes(vec![0]),
        ];
        assert_eq!(found.unwrap(), expected);
        assert_eq!(values(json!({"name": null})).unwrap(), vec![Value::Null; 9]);
        // And back: what is shown gives the same row.
        let schema = schema();
        let given = json!({
            "id": "9007199254740993", "small": 7, "price": "12.50", "ratio": 3.0, "at": "1970-01-01T00:00:01Z",
            "doc": {"a": [1]}, "name": "x", "ok": true, "raw": "AP8=",
        });
        let bytes = image(&schema, given.as_object().unwrap()).unwrap();
        let shown = text(&schema, ImageRef::parse(&bytes).unwrap().0).unwrap();
        let shown: Json = serde_json::from_str(&shown).unwrap();
        assert_eq!((&shown["id"], &shown["small"], &shown["doc"]), (&given["id"], &json!(7), &given["doc"]));
        assert_eq!(image(&schema, shown.as_object().unwrap()).unwrap(), bytes, "{shown}");
        for (object, expected) in [
            (json!({"nam": 1}), "there is no column \"nam\"; there are id, small"),
            (json!({"small": 70_000}), "small"),
            (json!({"ok": 1}), "ok"),
            (json!({"at": "soon"}), "at"),
            (json!({"raw": "no base64"}), "column \"raw\" is BYTEA"),
            (json!({"raw": [1, 2]}), "column \"raw\" is BYTEA"),
        ] {
            let error = values(object).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
