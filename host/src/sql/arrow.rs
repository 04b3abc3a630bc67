//! Row images to Arrow and back; SQL types to Arrow types and back.
//!
//! UUID and JSON are text in Arrow: their fields' metadata names the SQL type. Every other type is told by the Arrow
//! type alone. What queries compute in Arrow types of no SQL type is cast to one that has ([`output_type`]).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use ::arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, AsArray, BinaryArray, BinaryBuilder, BooleanBuilder, Date32Builder,
    Decimal128Builder, Float32Builder, Float64Builder, Int16Builder, Int32Builder, Int64Builder, StringArray,
    StringBuilder, Time64MicrosecondBuilder, TimestampMicrosecondBuilder, new_null_array,
};
use ::arrow::compute::{CastOptions, cast_with_options};
use ::arrow::datatypes::{
    DataType, Date32Type, Decimal128Type, Field, Float32Type, Float64Type, Int16Type, Int32Type, Int64Type,
    Schema as ArrowSchema, SchemaRef, Time64MicrosecondType, TimeUnit, TimestampMicrosecondType,
};
use ::arrow::record_batch::{RecordBatch, RecordBatchOptions};
use ::arrow::util::display::{ArrayFormatter, FormatOptions};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use uuid::Uuid;
use wire::image::ImageAt;
use wire::{ColumnDecl, ImageBuilder, ImageRef, Schema, Type, Value};

use super::error::from_arrow;
use super::{OutputColumn, SqlError};
use crate::store::StoreError;

/// The metadata key that tells UUID and JSON from TEXT.
pub const TYPE_KEY: &str = "tg.type";
pub(crate) const UTC: &str = "+00:00";

pub fn arrow_type(ty: Type) -> DataType {
    match ty {
        Type::Boolean => DataType::Boolean,
        Type::SmallInt => DataType::Int16,
        Type::Int => DataType::Int32,
        Type::BigInt => DataType::Int64,
        Type::Real => DataType::Float32,
        Type::Double => DataType::Float64,
        Type::Decimal { precision, scale } => DataType::Decimal128(precision, scale),
        Type::Text | Type::Uuid | Type::Json => DataType::Utf8,
        Type::Bytea => DataType::Binary,
        Type::Date => DataType::Date32,
        Type::Time => DataType::Time64(TimeUnit::Microsecond),
        Type::Timestamp => DataType::Timestamp(TimeUnit::Microsecond, Some(UTC.into())),
    }
}

pub(crate) fn arrow_field(name: &str, ty: Type, nullable: bool) -> Field {
    let field = Field::new(name, arrow_type(ty), nullable);
    match ty {
        Type::Uuid => field.with_metadata(HashMap::from([(TYPE_KEY.to_owned(), "uuid".to_owned())])),
        Type::Json => field.with_metadata(HashMap::from([(TYPE_KEY.to_owned(), "json".to_owned())])),
        _ => field,
    }
}

/// The Arrow schema of a wire schema; metadata keeps UUID and JSON apart from TEXT.
pub fn arrow_schema(schema: &Schema) -> SchemaRef {
    schema_of_columns(&schema.columns)
}

pub(crate) fn schema_of_columns(columns: &[ColumnDecl]) -> SchemaRef {
    let fields: Vec<Field> =
        columns.iter().map(|column| arrow_field(&column.name, column.ty, column.nullable)).collect();
    Arc::new(ArrowSchema::new(fields))
}

/// The SQL type a result column of this field is given; its batches are cast to [`arrow_type`] of it.
pub(crate) fn output_type(field: &Field) -> Type {
    match (field.data_type(), field.metadata().get(TYPE_KEY).map(String::as_str)) {
        (DataType::Utf8, Some("uuid")) => return Type::Uuid,
        (DataType::Utf8, Some("json")) => return Type::Json,
        _ => {}
    }
    match field.data_type() {
        DataType::Boolean => Type::Boolean,
        DataType::Int8 | DataType::Int16 | DataType::UInt8 => Type::SmallInt,
        DataType::Int32 | DataType::UInt16 => Type::Int,
        // Counts and ranks come unsigned; one beyond BIGINT is out of range, and said so.
        DataType::Int64 | DataType::UInt32 | DataType::UInt64 => Type::BigInt,
        DataType::Float16 | DataType::Float32 => Type::Real,
        DataType::Float64 => Type::Double,
        DataType::Decimal32(precision, scale)
        | DataType::Decimal64(precision, scale)
        | DataType::Decimal128(precision, scale) => Type::Decimal { precision: *precision, scale: *scale },
        DataType::Decimal256(precision, scale) if *precision <= 38 => {
            Type::Decimal { precision: *precision, scale: *scale }
        }
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => Type::Bytea,
        DataType::Date32 | DataType::Date64 => Type::Date,
        DataType::Time32(_) | DataType::Time64(_) => Type::Time,
        DataType::Timestamp(..) => Type::Timestamp,
        DataType::Dictionary(_, value) => output_type(&Field::new(field.name(), (**value).clone(), true)),
        // Lists, structs, maps, and what JSON functions find.
        ty if ty.is_nested() => Type::Json,
        _ => Type::Text,
    }
}

pub(crate) fn output_columns(schema: &ArrowSchema) -> Vec<OutputColumn> {
    schema.fields().iter().map(|field| OutputColumn { name: field.name().clone(), ty: output_type(field) }).collect()
}

/// The schema of a result's batches: one column after the other, names may repeat.
pub fn output_schema(columns: &[OutputColumn]) -> SchemaRef {
    let fields: Vec<Field> = columns.iter().map(|column| arrow_field(&column.name, column.ty, true)).collect();
    Arc::new(ArrowSchema::new(fields))
}

/// A result batch with exactly the Arrow types of its output columns.
pub(crate) fn to_output(
    columns: &[OutputColumn],
    schema: &SchemaRef,
    batch: RecordBatch,
) -> Result<RecordBatch, SqlError> {
    let rows = batch.num_rows();
    let arrays = batch.columns().iter().zip(columns).map(|(array, column)| output_array(array, column.ty));
    batch_of(schema, arrays.collect::<Result<_, SqlError>>()?, rows)
}

pub(crate) fn output_array(array: &ArrayRef, ty: Type) -> Result<ArrayRef, SqlError> {
    let wanted = arrow_type(ty);
    if *array.data_type() == wanted {
        return Ok(array.clone());
    }
    if let Some(texts) = super::json::union_to_text(array) {
        return Ok(texts);
    }
    if array.data_type().is_nested() {
        return nested_to_json(array);
    }
    let options = CastOptions { safe: false, ..CastOptions::default() };
    cast_with_options(array, &wanted, &options).map_err(from_arrow)
}

pub(crate) fn batch_of(schema: &SchemaRef, arrays: Vec<ArrayRef>, rows: usize) -> Result<RecordBatch, SqlError> {
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    RecordBatch::try_new_with_options(schema.clone(), arrays, &options).map_err(from_arrow)
}

/// Lists, structs and maps as JSON text, for want of a SQL type.
fn nested_to_json(array: &ArrayRef) -> Result<ArrayRef, SqlError> {
    let mut builder = StringBuilder::new();
    for row in 0..array.len() {
        if array.is_null(row) {
            builder.append_null();
        } else {
            builder.append_value(json_at(array, row)?.to_string());
        }
    }
    Ok(Arc::new(builder.finish()))
}

fn json_at(array: &ArrayRef, row: usize) -> Result<serde_json::Value, SqlError> {
    use serde_json::Value as Json;
    if array.is_null(row) {
        return Ok(Json::Null);
    }
    let list = |items: ArrayRef| -> Result<Json, SqlError> {
        (0..items.len()).map(|at| json_at(&items, at)).collect::<Result<Vec<_>, _>>().map(Json::Array)
    };
    match array.data_type() {
        DataType::Null => Ok(Json::Null),
        DataType::Boolean => Ok(Json::Bool(array.as_boolean().value(row))),
        DataType::List(_) => list(array.as_list::<i32>().value(row)),
        DataType::LargeList(_) => list(array.as_list::<i64>().value(row)),
        DataType::FixedSizeList(..) => list(array.as_fixed_size_list().value(row)),
        DataType::Map(..) => list(Arc::new(array.as_map().value(row))),
        DataType::Struct(fields) => {
            let columns = array.as_struct().columns();
            let members =
                fields.iter().zip(columns).map(|(field, column)| Ok((field.name().clone(), json_at(column, row)?)));
            members.collect::<Result<serde_json::Map<_, _>, SqlError>>().map(Json::Object)
        }
        ty => {
            let formatter = ArrayFormatter::try_new(array, &FormatOptions::default()).map_err(from_arrow)?;
            let text = formatter.value(row).try_to_string().map_err(from_arrow)?;
            // Numbers stay numbers where JSON can say them (not NaN, not infinite).
            let number = if ty.is_integer() || ty.is_floating() { serde_json::from_str(&text).ok() } else { None };
            Ok(number.unwrap_or(Json::String(text)))
        }
    }
}

/// Images to a batch of the columns of `schema`, in its order.
pub fn to_batch(schema: &Schema, images: &[ImageRef<'_>]) -> Result<RecordBatch, SqlError> {
    rows_batch(schema_of_columns(&schema.columns), &schema.columns, images)
}

/// The same with a schema said by the caller, so that it is made once for many batches: of as many columns with the same
/// types, whatever their names.
pub(crate) fn rows_batch(
    schema: SchemaRef,
    columns: &[ColumnDecl],
    images: &[ImageRef<'_>],
) -> Result<RecordBatch, SqlError> {
    let mut builder = RowBatchBuilder::with_schema(schema, columns, images.len());
    images.iter().try_for_each(|image| builder.push(image))?;
    builder.finish()
}

/// Rows of a batch as images, one behind the other, and where each lies: those of `rows`, until they make about `bytes`,
/// but one at least. The batch has the columns of `schema`, in its order.
pub fn to_images(
    schema: &Schema,
    batch: &RecordBatch,
    rows: Range<usize>,
    bytes: usize,
) -> Result<(Vec<u8>, Vec<ImageAt>), SqlError> {
    for (column, array) in schema.columns.iter().zip(batch.columns()) {
        if *array.data_type() != arrow_type(column.ty) {
            let message = format!("column {:?} is {}, and comes as {}", column.name, column.ty, array.data_type());
            return Err(SqlError::Internal(message));
        }
    }
    let (mut base, mut places) = (Vec::new(), Vec::new());
    let mut image = ImageBuilder::new(schema.slots());
    for row in rows {
        if !places.is_empty() && base.len() >= bytes {
            break;
        }
        image.clear();
        for (column, array) in schema.columns.iter().zip(batch.columns()) {
            set_cell(&mut image, column, array, row)?;
        }
        // Whoever asks for less than 4 GiB gets no more than that.
        let start = base.len() as u32;
        let ImageAt { present, slots, heap, columns } = image.finish_into(&mut base);
        places.push(ImageAt { present: present + start, slots: slots + start, heap: heap + start, columns });
    }
    Ok((base, places))
}

fn set_cell(image: &mut ImageBuilder, column: &ColumnDecl, array: &ArrayRef, row: usize) -> Result<(), SqlError> {
    if array.is_null(row) {
        return Ok(());
    }
    match column.ty {
        // These without a copy of their own.
        Type::Text | Type::Json => image.set_bytes(column.id, array.as_string::<i32>().value(row).as_bytes()),
        Type::Bytea => image.set_bytes(column.id, array.as_binary::<i32>().value(row)),
        ty => match value_at(array, row, ty) {
            // A text that is called a UUID and is none: rather no row than one that says NULL.
            Value::Null => return Err(SqlError::Internal(format!("column {:?} holds no {ty}", column.name))),
            value => image.set(column.id, &value),
        },
    }
    Ok(())
}

/// Gathers row images into a batch of some of their columns.
pub(crate) struct RowBatchBuilder {
    schema: SchemaRef,
    columns: Vec<(u16, ColumnBuilder)>,
    rows: usize,
    /// Of the texts and bytes so far: what makes a batch large.
    bytes: usize,
}

impl RowBatchBuilder {
    /// The schema is said by the caller, so that it is made once for many batches.
    pub(crate) fn with_schema(schema: SchemaRef, columns: &[ColumnDecl], capacity: usize) -> RowBatchBuilder {
        let columns = columns.iter().map(|column| (column.id, ColumnBuilder::new(column.ty, capacity))).collect();
        RowBatchBuilder { schema, columns, rows: 0, bytes: 0 }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn push(&mut self, image: &ImageRef<'_>) -> Result<(), SqlError> {
        for (id, builder) in &mut self.columns {
            if let ColumnBuilder::Text(_) | ColumnBuilder::Bytea(_) = builder {
                self.bytes += image.bytes(*id).map_or(0, <[u8]>::len);
            }
            builder.push(image, *id).ok_or_else(|| {
                SqlError::Store(StoreError::Corrupt(format!("column {id} of a row image cannot be read")))
            })?;
        }
        self.rows += 1;
        Ok(())
    }

    pub(crate) fn finish(&mut self) -> Result<RecordBatch, SqlError> {
        let arrays = self.columns.iter_mut().map(|(_, builder)| builder.finish()).collect();
        let rows = std::mem::take(&mut self.rows);
        self.bytes = 0;
        batch_of(&self.schema, arrays, rows)
    }
}

enum ColumnBuilder {
    Boolean(BooleanBuilder),
    SmallInt(Int16Builder),
    Int(Int32Builder),
    BigInt(Int64Builder),
    Real(Float32Builder),
    Double(Float64Builder),
    Decimal(Decimal128Builder, DataType),
    Text(StringBuilder),
    Bytea(BinaryBuilder),
    Date(Date32Builder),
    Time(Time64MicrosecondBuilder),
    Timestamp(TimestampMicrosecondBuilder),
    Uuid(StringBuilder),
}

impl ColumnBuilder {
    fn new(ty: Type, rows: usize) -> ColumnBuilder {
        match ty {
            Type::Boolean => ColumnBuilder::Boolean(BooleanBuilder::with_capacity(rows)),
            Type::SmallInt => ColumnBuilder::SmallInt(Int16Builder::with_capacity(rows)),
            Type::Int => ColumnBuilder::Int(Int32Builder::with_capacity(rows)),
            Type::BigInt => ColumnBuilder::BigInt(Int64Builder::with_capacity(rows)),
            Type::Real => ColumnBuilder::Real(Float32Builder::with_capacity(rows)),
            Type::Double => ColumnBuilder::Double(Float64Builder::with_capacity(rows)),
            Type::Decimal { .. } => {
                let builder = Decimal128Builder::with_capacity(rows).with_data_type(arrow_type(ty));
                ColumnBuilder::Decimal(builder, arrow_type(ty))
            }
            Type::Text | Type::Json => ColumnBuilder::Text(StringBuilder::with_capacity(rows, rows * 16)),
            Type::Bytea => ColumnBuilder::Bytea(BinaryBuilder::with_capacity(rows, rows * 16)),
            Type::Date => ColumnBuilder::Date(Date32Builder::with_capacity(rows)),
            Type::Time => ColumnBuilder::Time(Time64MicrosecondBuilder::with_capacity(rows)),
            Type::Timestamp => {
                let builder = TimestampMicrosecondBuilder::with_capacity(rows).with_timezone(UTC);
                ColumnBuilder::Timestamp(builder)
            }
            Type::Uuid => ColumnBuilder::Uuid(StringBuilder::with_capacity(rows, rows * 36)),
        }
    }

    /// `None` when the image's slot does not hold a value of this type.
    fn push(&mut self, image: &ImageRef<'_>, id: u16) -> Option<()> {
        let null = image.is_null(id);
        // The value, NULL, or damage.
        macro_rules! append {
            ($builder:expr, $value:expr) => {
                if null { $builder.append_null() } else { $builder.append_value($value?) }
            };
        }
        match self {
            ColumnBuilder::Boolean(builder) => append!(builder, image.bool(id)),
            ColumnBuilder::SmallInt(builder) => append!(builder, image.int(id).and_then(|v| i16::try_from(v).ok())),
            ColumnBuilder::Int(builder) => append!(builder, image.int(id).and_then(|v| i32::try_from(v).ok())),
            ColumnBuilder::BigInt(builder) => append!(builder, image.int(id)),
            ColumnBuilder::Real(builder) => append!(builder, image.float(id).map(|v| v as f32)),
            ColumnBuilder::Double(builder) => append!(builder, image.float(id)),
            ColumnBuilder::Decimal(builder, _) => append!(builder, image.decimal(id)),
            ColumnBuilder::Text(builder) => append!(builder, image.text(id)),
            ColumnBuilder::Bytea(builder) => append!(builder, image.bytes(id)),
            ColumnBuilder::Date(builder) => append!(builder, image.int(id).and_then(|v| i32::try_from(v).ok())),
            ColumnBuilder::Time(builder) => append!(builder, image.int(id)),
            ColumnBuilder::Timestamp(builder) => append!(builder, image.int(id)),
            ColumnBuilder::Uuid(builder) => {
                if null {
                    builder.append_null();
                } else {
                    let mut text = [0; 36];
                    builder.append_value(Uuid::from_bytes(image.uuid(id)?).hyphenated().encode_lower(&mut text));
                }
            }
        }
        Some(())
    }

    fn finish(&mut self) -> ArrayRef {
        match self {
            ColumnBuilder::Boolean(builder) => Arc::new(builder.finish()),
            ColumnBuilder::SmallInt(builder) => Arc::new(builder.finish()),
            ColumnBuilder::Int(builder) => Arc::new(builder.finish()),
            ColumnBuilder::BigInt(builder) => Arc::new(builder.finish()),
            ColumnBuilder::Real(builder) => Arc::new(builder.finish()),
            ColumnBuilder::Double(builder) => Arc::new(builder.finish()),
            ColumnBuilder::Decimal(builder, ty) => Arc::new(builder.finish().with_data_type(ty.clone())),
            ColumnBuilder::Text(builder) | ColumnBuilder::Uuid(builder) => Arc::new(builder.finish()),
            ColumnBuilder::Bytea(builder) => Arc::new(builder.finish()),
            ColumnBuilder::Date(builder) => Arc::new(builder.finish()),
            ColumnBuilder::Time(builder) => Arc::new(builder.finish()),
            ColumnBuilder::Timestamp(builder) => Arc::new(builder.finish()),
        }
    }
}

/// The value of one cell of an array that has exactly the Arrow type of `ty`.
pub(crate) fn value_at(array: &ArrayRef, row: usize, ty: Type) -> Value {
    if array.is_null(row) {
        return Value::Null;
    }
    fn native<T: ArrowPrimitiveType>(array: &ArrayRef, row: usize) -> T::Native {
        array.as_primitive::<T>().value(row)
    }
    match ty {
        Type::Boolean => Value::Bool(array.as_boolean().value(row)),
        Type::SmallInt => Value::Int(native::<Int16Type>(array, row).into()),
        Type::Int => Value::Int(native::<Int32Type>(array, row).into()),
        Type::BigInt => Value::Int(native::<Int64Type>(array, row)),
        Type::Real => Value::Float(native::<Float32Type>(array, row).into()),
        Type::Double => Value::Float(native::<Float64Type>(array, row)),
        Type::Decimal { .. } => Value::Decimal(native::<Decimal128Type>(array, row)),
        Type::Text | Type::Json => Value::Text(array.as_string::<i32>().value(row).to_owned()),
        Type::Bytea => Value::Bytes(array.as_binary::<i32>().value(row).to_owned()),
        Type::Date => Value::Int(native::<Date32Type>(array, row).into()),
        Type::Time => Value::Int(native::<Time64MicrosecondType>(array, row)),
        Type::Timestamp => Value::Int(native::<TimestampMicrosecondType>(array, row)),
        // Canonical text is checked where it is cast; anything else would be ours to fix.
        Type::Uuid => Uuid::parse_str(array.as_string::<i32>().value(row))
            .map_or(Value::Null, |uuid| Value::Uuid(uuid.into_bytes())),
    }
}

/// A text cell of any of Arrow's text types.
pub(crate) fn string_at(array: &ArrayRef, row: usize) -> Option<&str> {
    match array.data_type() {
        DataType::Utf8 => Some(array.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => Some(array.as_string::<i64>().value(row)),
        DataType::Utf8View => Some(array.as_string_view().value(row)),
        _ => None,
    }
}

/// What assignment to a column may fail on.
pub(crate) struct CastTarget<'a> {
    pub(crate) name: &'a str,
    pub(crate) ty: Type,
}

/// Casts what a statement computed to a column's type: never silently to NULL, never with a fraction lost.
pub(crate) fn cast_for(target: &CastTarget<'_>, array: &ArrayRef) -> Result<ArrayRef, SqlError> {
    let from = array.data_type();
    if *from == DataType::Null {
        return Ok(new_null_array(&arrow_type(target.ty), array.len()));
    }
    if !assignable(from, target.ty) {
        let message = format!("column {:?} is {}, but the value is {}", target.name, target.ty, plain_type(from));
        return Err(SqlError::invalid("type_mismatch", message));
    }
    let text = matches!(from, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View);
    match target.ty {
        Type::Uuid if text => {
            cast_text(target, array, |text| Uuid::parse_str(text).ok().map(|uuid| uuid.hyphenated().to_string()))
        }
        Type::Json if text => cast_text(target, array, |text| {
            serde_json::from_str::<serde::de::IgnoredAny>(text).ok().map(|_| text.to_owned())
        }),
        Type::Bytea if text => cast_bytes(target, array),
        _ => cast_plain(target, array),
    }
}

/// Implicit conversions on assignment; the rest needs a CAST.
fn assignable(from: &DataType, to: Type) -> bool {
    use DataType::*;
    let numeric = from.is_numeric();
    match from {
        Utf8 | LargeUtf8 | Utf8View => true,
        Dictionary(_, value) => assignable(value, to),
        Boolean => matches!(to, Type::Boolean | Type::Text),
        Binary | LargeBinary | BinaryView | FixedSizeBinary(_) => to == Type::Bytea,
        Date32 | Date64 => matches!(to, Type::Date | Type::Timestamp | Type::Text),
        Timestamp(..) => matches!(to, Type::Date | Type::Timestamp | Type::Text),
        Time32(_) | Time64(_) => matches!(to, Type::Time | Type::Text),
        _ if numeric => matches!(
            to,
            Type::SmallInt | Type::Int | Type::BigInt | Type::Real | Type::Double | Type::Decimal { .. } | Type::Text
        ),
        _ => false,
    }
}

fn plain_type(from: &DataType) -> String {
    output_type(&Field::new("", from.clone(), true)).to_string()
}

fn cast_plain(target: &CastTarget<'_>, array: &ArrayRef) -> Result<ArrayRef, SqlError> {
    let wanted = arrow_type(target.ty);
    let array = if matches!(array.data_type(), DataType::Utf8 | DataType::Utf8View | DataType::LargeUtf8) {
        trimmed(target.ty, array)
    } else {
        array.clone()
    };
    // `safe` makes what does not fit NULL: then the first such cell is the one to name.
    let cast = cast_with_options(&array, &wanted, &CastOptions { safe: true, ..CastOptions::default() });
    let cast = cast.map_err(from_arrow)?;
    if let Some(row) = (0..array.len()).find(|row| lost(&array, &cast, *row, target.ty)) {
        return Err(does_not_fit(target, &array, row));
    }
    Ok(cast)
}

/// Spaces around numbers and dates in text mean nothing; in TEXT they do.
fn trimmed(ty: Type, array: &ArrayRef) -> ArrayRef {
    if ty == Type::Text {
        return array.clone();
    }
    let texts: StringArray = (0..array.len())
        .map(|row| if array.is_null(row) { None } else { string_at(array, row).map(str::trim) })
        .collect();
    Arc::new(texts)
}

/// Whether the cast changed more than the type of the cell.
fn lost(from: &ArrayRef, to: &ArrayRef, row: usize, ty: Type) -> bool {
    if from.is_null(row) {
        return false;
    }
    if to.is_null(row) {
        return true;
    }
    let float = match from.data_type() {
        DataType::Float64 => Some(from.as_primitive::<Float64Type>().value(row)),
        DataType::Float32 => Some(from.as_primitive::<Float32Type>().value(row).into()),
        _ => None,
    };
    match (ty, float) {
        // A fraction would be cut off.
        (Type::SmallInt | Type::Int | Type::BigInt, Some(float)) => float.fract() != 0.0,
        (Type::SmallInt | Type::Int | Type::BigInt, None) => fraction_lost(from, row),
        // A finite number must not become infinite.
        (Type::Real, Some(float)) => float.is_finite() && to.as_primitive::<Float32Type>().value(row).is_infinite(),
        _ => false,
    }
}

fn fraction_lost(from: &ArrayRef, row: usize) -> bool {
    match from.data_type() {
        DataType::Decimal128(_, scale) if *scale > 0 => {
            let unit = 10i128.checked_pow(u32::from(scale.unsigned_abs()));
            unit.is_none_or(|unit| from.as_primitive::<Decimal128Type>().value(row) % unit != 0)
        }
        _ => false,
    }
}

fn does_not_fit(target: &CastTarget<'_>, array: &ArrayRef, row: usize) -> SqlError {
    let shown = ArrayFormatter::try_new(array, &FormatOptions::default())
        .ok()
        .and_then(|formatter| formatter.value(row).try_to_string().ok())
        .unwrap_or_default();
    // Enough to recognise it by.
    let shown: String = shown.chars().take(80).collect();
    let message = format!("{shown:?} does not fit into column {:?} ({})", target.name, target.ty);
    let code = if string_at_type(array) { "invalid_value" } else { "out_of_range" };
    SqlError::constraint(code, message)
}

fn string_at_type(array: &ArrayRef) -> bool {
    matches!(array.data_type(), DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View)
}

fn cast_text(
    target: &CastTarget<'_>,
    array: &ArrayRef,
    check: impl Fn(&str) -> Option<String>,
) -> Result<ArrayRef, SqlError> {
    let mut builder = StringBuilder::with_capacity(array.len(), array.len() * 16);
    for row in 0..array.len() {
        match string_at(array, row).filter(|_| array.is_valid(row)) {
            None => builder.append_null(),
            Some(text) => builder.append_value(check(text).ok_or_else(|| does_not_fit(target, array, row))?),
        }
    }
    Ok(Arc::new(builder.finish()))
}

/// Text into BYTEA: `\x…` is hexadecimal, anything else its own UTF-8 bytes.
fn cast_bytes(target: &CastTarget<'_>, array: &ArrayRef) -> Result<ArrayRef, SqlError> {
    let mut cells: Vec<Option<Vec<u8>>> = Vec::with_capacity(array.len());
    for row in 0..array.len() {
        let Some(text) = string_at(array, row).filter(|_| array.is_valid(row)) else {
            cells.push(None);
            continue;
        };
        cells.push(Some(match text.strip_prefix("\\x") {
            Some(hex) => unhex(hex).ok_or_else(|| does_not_fit(target, array, row))?,
            None => text.as_bytes().to_vec(),
        }));
    }
    Ok(Arc::new(BinaryArray::from_iter(cells)))
}

/// The bytes that a text means where JSON or CSV say a BYTEA: base64, or \x and hexadecimal.
pub fn bytes_of(text: &str) -> Option<Vec<u8>> {
    match text.strip_prefix("\\x") {
        Some(hex) => unhex(hex),
        None => BASE64_STANDARD.decode(text).ok(),
    }
}

pub fn unhex(hex: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        hex.chars().map(|digit| digit.to_digit(16).and_then(|digit| u8::try_from(digit).ok())).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    Some(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_cell() -> impl Strategy<Value = (Type, Value)> {
        let int = |ty: Type, value: i64| (ty, Value::Int(value));
        prop_oneof![
            any::<bool>().prop_map(|v| (Type::Boolean, Value::Bool(v))),
            any::<i16>().prop_map(move |v| int(Type::SmallInt, v.into())),
            any::<i32>().prop_map(move |v| int(Type::Int, v.into())),
            any::<i64>().prop_map(move |v| int(Type::BigInt, v)),
            any::<f32>().prop_map(|v| (Type::Real, Value::Float(v.into()))),
            any::<f64>().prop_map(|v| (Type::Double, Value::Float(v))),
            any::<i64>().prop_map(|v| (Type::Decimal { precision: 38, scale: 3 }, Value::Decimal(v.into()))),
            any::<String>().prop_map(|v| (Type::Text, Value::Text(v))),
            any::<Vec<u8>>().prop_map(|v| (Type::Bytea, Value::Bytes(v))),
            any::<i32>().prop_map(move |v| int(Type::Date, v.into())),
            (0..86_400_000_000i64).prop_map(move |v| int(Type::Time, v)),
            any::<i64>().prop_map(move |v| int(Type::Timestamp, v)),
            any::<[u8; 16]>().prop_map(|v| (Type::Uuid, Value::Uuid(v))),
            any::<String>().prop_map(|v| (Type::Json, Value::Text(v))),
            Just((Type::Uuid, Value::Null)),
            Just((Type::BigInt, Value::Null)),
        ]
    }

    fn schema_of(row: &[(Type, Value)]) -> Schema {
        let column = |(at, (ty, _)): (usize, &(Type, Value))| ColumnDecl {
            id: at as u16,
            name: format!("c{at}"),
            ty: *ty,
            nullable: true,
            key: false,
        };
        Schema { columns: row.iter().enumerate().map(column).collect() }
    }

    proptest! {
        #[test]
        fn images_come_back_from_arrow(row in proptest::collection::vec(any_cell(), 0..30)) {
            let mut image = ImageBuilder::new(row.len() as u16);
            for (at, (_, value)) in row.iter().enumerate() {
                image.set(at as u16, value);
            }
            let bytes = image.finish();
            let (image, ..) = ImageRef::parse(&bytes).unwrap();
            let batch = to_batch(&schema_of(&row), &[image, image]).unwrap();
            prop_assert_eq!(batch.num_rows(), 2);
            for (at, (ty, value)) in row.iter().enumerate() {
                prop_assert_eq!(batch.column(at).data_type(), &arrow_type(*ty));
                prop_assert_eq!(output_type(batch.schema().field(at)), *ty);
                let back = value_at(batch.column(at), 1, *ty);
                let same_nan = matches!((&back, value), (Value::Float(a), Value::Float(b)) if a.is_nan() && b.is_nan());
                prop_assert!(same_nan || back == *value, "{:?} became {:?}", value, back);
            }

            let schema = schema_of(&row);
            let (base, places) = to_images(&schema, &batch, 0..2, usize::MAX).unwrap();
            let (one, first, used) = ImageRef::parse(&base).unwrap();
            let (two, at, rest) = ImageRef::parse(&base[used..]).unwrap();
            let shift = used as u32;
            let second = ImageAt {
                present: at.present + shift,
                slots: at.slots + shift,
                heap: at.heap + shift,
                columns: at.columns,
            };
            prop_assert_eq!((places, used + rest), (vec![first, second], base.len()));
            prop_assert_eq!(to_batch(&schema, &[one, two]).unwrap(), batch.clone());
            let (part, places) = to_images(&schema, &batch, 1..2, 0).unwrap();
            prop_assert_eq!((&part[..], places), (&base[used..], vec![at]));
        }
    }

    #[test]
    fn a_cell_of_another_type_is_damage_not_null() {
        let row = [(Type::Int, Value::Int(i64::MAX))];
        let mut image = ImageBuilder::new(1);
        image.set(0, &row[0].1);
        let bytes = image.finish();
        let (image, ..) = ImageRef::parse(&bytes).unwrap();
        let error = to_batch(&schema_of(&row), &[image]).unwrap_err();
        assert!(matches!(error, SqlError::Store(StoreError::Corrupt(_))), "{error}");
    }

    #[test]
    fn a_result_that_is_not_what_it_says_makes_no_images() {
        let batch = |array: ArrayRef| RecordBatch::try_from_iter_with_nullable([("c0", array, true)]).unwrap();
        let texts = batch(Arc::new(StringArray::from(vec!["00000000-0000-4000-8000-000000000001", "none"])));
        let uuids = schema_of(&[(Type::Uuid, Value::Null)]);
        assert_eq!(to_images(&uuids, &texts, 0..2, 0).unwrap().1.len(), 1, "one however little is asked for");
        assert!(to_images(&uuids, &texts, 0..2, usize::MAX).is_err());
        assert!(to_images(&schema_of(&[(Type::Int, Value::Null)]), &texts, 0..1, 0).is_err());
    }
}
