//! Converting between host types and what a guest answers (`wire::abi`). Nothing a guest says is believed: every
//! offset, length and value is checked, and rows are encoded anew, so that an image made here is as good as the store's.

use std::ops::Range;

use bytes::Bytes;
use wire::abi::{DESCRIPTOR_BYTES, Descriptor};
use wire::image::{ImageAt, MAX_COLUMNS, SLOT_BYTES};
use wire::{ColumnDecl, ImageBuilder, Kind, Schema, Type};

/// Bytes of how many rows one change was made into.
const COUNT_BYTES: usize = 4;

/// What all batches of one run may answer together, in outputs of one batch: a commit of many small rows cannot be
/// blown up without end.
pub const RUN_OUTPUTS: usize = 64;

/// Longest schema message that a guest may answer.
pub const SCHEMA_BYTES: u32 = 256 * 1024;
const MAX_NAME_BYTES: usize = 128;
const MAX_DECIMAL_DIGITS: u8 = 38;
const MICROS_PER_DAY: i64 = 86_400_000_000;

/// A transform's output schema. Ids are positions.
pub fn output_schema(message: &[u8]) -> Result<Schema, String> {
    let (schema, rest) =
        wire::abi::take_schema(message).map_err(|error| format!("the output schema is no schema: {error}"))?;
    if !rest.is_empty() {
        return Err(format!("{} bytes are left behind the output schema: is its length right?", rest.len()));
    }
    if schema.columns.is_empty() || schema.columns.len() > usize::from(MAX_COLUMNS) {
        return Err(format!("the output schema has {} columns; 1 to {MAX_COLUMNS} are allowed", schema.columns.len()));
    }
    for (i, column) in schema.columns.iter().enumerate() {
        check_column(i, column)?;
        if schema.columns[..i].iter().any(|other| other.name == column.name) {
            return Err(format!("the output schema has two columns `{}`", column.name));
        }
    }
    Ok(schema)
}

fn check_column(i: usize, column: &ColumnDecl) -> Result<(), String> {
    if usize::from(column.id) != i {
        return Err(format!("output column {i} has id {}; ids are positions", column.id));
    }
    if column.name.is_empty() || column.name.len() > MAX_NAME_BYTES || column.name.contains(char::is_control) {
        return Err(format!("the name of output column {i} is not 1 to {MAX_NAME_BYTES} bytes of text"));
    }
    if column.key {
        return Err(format!("output column `{}` is said to be a key: `key` is 0 in an output schema", column.name));
    }
    match column.ty {
        Type::Decimal { precision, scale }
            if !(1..=MAX_DECIMAL_DIGITS).contains(&precision) || scale.unsigned_abs() > precision =>
        {
            Err(format!("output column `{}` is DECIMAL({precision}, {scale}), which does not exist", column.name))
        }
        _ => Ok(()),
    }
}

/// The images that one call made, in one piece: to allocate each by itself would cost more than to check it.
#[derive(Debug)]
pub struct Made {
    bytes: Bytes,
    places: Vec<Place>,
}

/// Where an image lies, and its parts from its own start.
type Place = (Range<u32>, ImageAt);

impl Made {
    /// How many images.
    pub fn count(&self) -> usize {
        self.places.len()
    }

    /// Bytes of all images.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    pub fn image(&self, i: u32) -> (&[u8], ImageAt) {
        let (range, at) = &self.places[i as usize];
        (&self.bytes[range.start as usize..range.end as usize], *at)
    }

    /// The image's bytes by themselves; they keep those of the others in memory.
    pub fn shared(&self, i: u32) -> Bytes {
        let (range, _) = &self.places[i as usize];
        self.bytes.slice(range.start as usize..range.end as usize)
    }
}

/// [`Made`] on its way.
struct Making<'a> {
    output: &'a [u8],
    schema: &'a Schema,
    image: ImageBuilder,
    bytes: Vec<u8>,
    places: Vec<Place>,
    /// Bytes that the rows may have together, and may still have: descriptors and slots may point to the same ones again
    /// and again, so the output's own limit is none.
    most: usize,
    room: usize,
}

impl<'a> Making<'a> {
    fn new(output: &'a [u8], schema: &'a Schema, images: usize, most: usize) -> Making<'a> {
        let (image, bytes) = (ImageBuilder::new(schema.slots()), Vec::with_capacity(output.len()));
        Making { output, schema, image, bytes, places: Vec::with_capacity(images), most, room: most }
    }

    /// The row that a descriptor of the output says.
    fn row(&mut self, descriptor: &[u8]) -> Result<(), String> {
        let mut fixed = [0; DESCRIPTOR_BYTES];
        fixed.copy_from_slice(descriptor);
        self.image.clear();
        let Making { output, schema, image, room, .. } = self;
        let copied = copy_row(output, Descriptor::from_bytes(fixed), schema, image, room);
        if !copied.map_err(|error| format!("output row {}: {error}", self.places.len()))? {
            return Err(format!("its rows have over {} bytes together", self.most));
        }
        let start = self.bytes.len() as u32;
        let at = self.image.finish_into(&mut self.bytes);
        self.places.push((start..self.bytes.len() as u32, at));
        Ok(())
    }

    fn end(self) -> Made {
        Made { bytes: self.bytes.into(), places: self.places }
    }
}

/// The images of a transform's output, one per row of the batch: `n` descriptors, then what they point to.
/// `most` bounds them together.
pub fn output_images(output: &[u8], n: usize, schema: &Schema, most: usize) -> Result<Made, String> {
    let descriptors = output
        .get(..n * DESCRIPTOR_BYTES)
        .ok_or_else(|| format!("the output has {} bytes, too few for {n} descriptors", output.len()))?;
    let mut made = Making::new(output, schema, n, most);
    descriptors.chunks_exact(DESCRIPTOR_BYTES).try_for_each(|descriptor| made.row(descriptor))?;
    Ok(made.end())
}

/// The images of a change transform's output, for each change of the batch any number: `n` counts (u32), then as many
/// descriptors as they add up to, then what those point to. Answers the counts, too. `most` as above.
pub fn output_changes(output: &[u8], n: usize, schema: &Schema, most: usize) -> Result<(Vec<u32>, Made), String> {
    let short = |what: &str| format!("the output has {} bytes, too few for {what}", output.len());
    let counts = output.get(..n * COUNT_BYTES).ok_or_else(|| short(&format!("{n} counts")))?;
    let mut descriptors = output[n * COUNT_BYTES..].chunks_exact(DESCRIPTOR_BYTES);
    let counts =
        counts.chunks_exact(COUNT_BYTES).map(|count| u32::from_le_bytes([count[0], count[1], count[2], count[3]]));
    let counts: Vec<u32> = counts.collect();
    let mut made = Making::new(output, schema, n, most);
    for _ in counts.iter().flat_map(|count| 0..*count) {
        made.row(descriptors.next().ok_or_else(|| short("as many descriptors as it counts"))?)?;
    }
    Ok((counts, made.end()))
}

/// `false`: there is no room for it.
fn copy_row(
    output: &[u8],
    at: Descriptor,
    schema: &Schema,
    builder: &mut ImageBuilder,
    room: &mut usize,
) -> Result<bool, String> {
    let columns = at.columns as usize;
    if columns != schema.columns.len() {
        return Err(format!("it has {columns} columns, the output schema {}", schema.columns.len()));
    }
    let fixed = columns.div_ceil(8) + columns * SLOT_BYTES;
    let mut left = room.checked_sub(fixed);
    let present = part(output, at.present, columns.div_ceil(8)).ok_or("its bitmap lies outside the output")?;
    let slots = part(output, at.slots, columns * SLOT_BYTES).ok_or("its slots lie outside the output")?;
    let heap = output.get(at.heap as usize..).ok_or("its heap lies outside the output")?;
    for (column, slot) in schema.columns.iter().zip(slots.chunks_exact(SLOT_BYTES)) {
        let i = usize::from(column.id);
        if present[i / 8] >> (i % 8) & 1 == 0 {
            if !column.nullable {
                return Err(format!("column `{}` is NULL, but not nullable", column.name));
            }
            continue;
        }
        let mut fixed = [0; SLOT_BYTES];
        fixed.copy_from_slice(slot);
        let slot = u64::from_le_bytes(fixed);
        if let Kind::Text | Kind::Bytes | Kind::Decimal | Kind::Uuid = column.ty.kind() {
            let len = (slot >> 32) as usize;
            // Before it is counted: of what is not there no amount is too much.
            if part(heap, slot as u32, len).is_none() {
                return Err(format!("column `{}` points outside the output", column.name));
            }
            left = left.and_then(|left| left.checked_sub(len));
        }
        if left.is_none() {
            return Ok(false);
        }
        copy_value(slot, heap, column, builder).map_err(|error| format!("column `{}` {error}", column.name))?;
    }
    *room = left.unwrap_or_default();
    Ok(left.is_some())
}

fn part(bytes: &[u8], at: u32, len: usize) -> Option<&[u8]> {
    bytes.get(at as usize..)?.get(..len)
}

fn copy_value(slot: u64, heap: &[u8], column: &ColumnDecl, builder: &mut ImageBuilder) -> Result<(), String> {
    match column.ty.kind() {
        Kind::Bool if slot <= 1 => builder.set_bool(column.id, slot == 1),
        Kind::Bool => return Err(format!("is {slot}, no bool")),
        Kind::Int => builder.set_int(column.id, check_int(slot as i64, column.ty)?),
        Kind::Float => builder.set_float(column.id, check_float(f64::from_bits(slot), column.ty)?),
        kind => {
            let bytes = part(heap, slot as u32, (slot >> 32) as usize).ok_or("points outside the output")?;
            check_bytes(bytes, kind, column.ty)?;
            builder.set_bytes(column.id, bytes);
        }
    }
    Ok(())
}

fn check_int(value: i64, ty: Type) -> Result<i64, String> {
    let fits = match ty {
        Type::SmallInt => i16::try_from(value).is_ok(),
        Type::Int | Type::Date => i32::try_from(value).is_ok(),
        Type::Time => (0..MICROS_PER_DAY).contains(&value),
        _ => true,
    };
    if fits { Ok(value) } else { Err(format!("is {value}, out of range for {ty:?}")) }
}

/// NaN gets one bit pattern, so that equal rows have equal bytes.
fn check_float(value: f64, ty: Type) -> Result<f64, String> {
    if value.is_nan() {
        return Ok(f64::NAN);
    }
    if ty == Type::Real && f64::from(value as f32) != value {
        return Err(format!("is {value}, which a REAL cannot hold exactly"));
    }
    Ok(value)
}

fn check_bytes(bytes: &[u8], kind: Kind, ty: Type) -> Result<(), String> {
    match kind {
        Kind::Text => {
            let text = std::str::from_utf8(bytes).map_err(|_| "is not UTF-8")?;
            if ty == Type::Json {
                serde_json::from_str::<serde::de::IgnoredAny>(text).map_err(|error| format!("is not JSON: {error}"))?;
            }
            Ok(())
        }
        Kind::Uuid if bytes.len() != 16 => Err(format!("is a UUID of {} bytes", bytes.len())),
        Kind::Decimal => check_decimal(bytes, ty),
        _ => Ok(()),
    }
}

fn check_decimal(bytes: &[u8], ty: Type) -> Result<(), String> {
    let fixed: [u8; 16] = bytes.try_into().map_err(|_| format!("is a DECIMAL of {} bytes", bytes.len()))?;
    let value = i128::from_le_bytes(fixed);
    match ty {
        Type::Decimal { precision, .. } if value.unsigned_abs() >= 10u128.pow(u32::from(precision)) => {
            Err(format!("has more than {precision} digits"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use wire::{ImageRef, Value};

    fn schema() -> Schema {
        let column = |id, name: &str, ty| ColumnDecl { id, name: name.to_owned(), ty, nullable: id > 0, key: false };
        Schema {
            columns: vec![
                column(0, "id", Type::BigInt),
                column(1, "name", Type::Text),
                column(2, "km", Type::Double),
                column(3, "price", Type::Decimal { precision: 4, scale: 2 }),
            ],
        }
    }

    fn output(rows: &[[Value; 4]]) -> Vec<u8> {
        let (mut heads, mut tail) = (Vec::new(), Vec::new());
        for row in rows {
            let mut builder = ImageBuilder::new(4);
            for (i, value) in row.iter().enumerate() {
                builder.set(i as u16, value);
            }
            let base = rows.len() * DESCRIPTOR_BYTES + tail.len();
            let at = builder.finish_into(&mut tail);
            heads.extend_from_slice(&Descriptor::new(at, base as u32).to_bytes());
        }
        heads.extend_from_slice(&tail);
        heads
    }

    /// Read anew, as whoever gets their bytes does.
    fn images(made: &Made) -> impl Iterator<Item = ImageRef<'_>> {
        (0..made.count() as u32).map(|i| {
            let (bytes, at) = made.image(i);
            let (image, found, used) = ImageRef::parse(bytes).unwrap();
            assert_eq!((found, used), (at, bytes.len()));
            image
        })
    }

    fn row(id: i64, name: &str) -> [Value; 4] {
        [Value::Int(id), Value::Text(name.to_owned()), Value::Float(1.5), Value::Decimal(-9999)]
    }

    #[test]
    fn good_rows_are_copied_and_bad_ones_named() {
        let images = output_images(&output(&[row(1, "a"), row(2, "ü")]), 2, &schema(), 10_000).unwrap();
        let (image, ..) = ImageRef::parse(images.image(1).0).unwrap();
        assert_eq!((image.int(0), image.text(1), image.float(2)), (Some(2), Some("ü"), Some(1.5)));

        let null = [Value::Null, Value::Null, Value::Null, Value::Null];
        let digits = [Value::Int(1), Value::Null, Value::Null, Value::Decimal(10_000)];
        for (rows, n, expected) in [
            (vec![row(1, "a")], 2, "output row 1: it has"),
            (vec![row(1, "a"), null], 2, "output row 1: column `id` is NULL, but not nullable"),
            (vec![digits], 1, "output row 0: column `price` has more than 4 digits"),
        ] {
            let error = output_images(&output(&rows), n, &schema(), 10_000).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let mut bytes = output(&[row(1, "a")]);
        let last = bytes.len() - 1;
        bytes.truncate(last);
        assert!(output_images(&bytes, 1, &schema(), 10_000).unwrap_err().contains("points outside the output"));
        assert!(output_images(&[0; 15], 1, &schema(), 10_000).unwrap_err().contains("too few for 1 descriptors"));
    }

    /// 64 rows of eight columns that all point to one text of 1 MB took 900 MB before anybody looked.
    #[test]
    fn rows_that_share_their_bytes_are_bounded_together() {
        let one = output(&[row(1, &"x".repeat(100))]);
        let (descriptor, shift) = (&one[..DESCRIPTOR_BYTES], 4 * DESCRIPTOR_BYTES as u32);
        let mut at = Descriptor::from_bytes(descriptor.try_into().unwrap());
        (at.present, at.slots, at.heap) = (at.present + shift, at.slots + shift, at.heap + shift);
        let mut bytes = at.to_bytes().repeat(4);
        bytes.extend_from_slice(&[0; DESCRIPTOR_BYTES]);
        bytes.extend_from_slice(&one[DESCRIPTOR_BYTES..]);
        let of = |most| output_images(&bytes, 4, &schema(), most);
        assert_eq!(of(4 * 149).unwrap().count(), 4);
        assert!(of(4 * 149 - 1).unwrap_err().contains("its rows have over 595 bytes together"));
        // A length that is out of all bounds is not counted first. The text's slot is the second of the four.
        let mut wild = one.clone();
        let at = DESCRIPTOR_BYTES + 3 + SLOT_BYTES + 4;
        wild[at..at + 4].fill(0xff);
        assert_eq!(
            output_images(&wild, 1, &schema(), 10_000).unwrap_err(),
            "output row 0: column `name` points outside the output"
        );
    }

    #[test]
    fn schemas_are_checked() {
        let encode = |schema: &Schema| wire::abi::encode_schema(schema).unwrap();
        assert_eq!(output_schema(&encode(&schema())).unwrap(), schema());
        let mut twice = schema();
        twice.columns[1].name = "id".to_owned();
        assert!(output_schema(&encode(&twice)).unwrap_err().contains("two columns `id`"));
        let mut key = schema();
        key.columns[0].key = true;
        assert!(output_schema(&encode(&key)).unwrap_err().contains("column `id` is said to be a key"));
        let longer = [encode(&schema()), vec![0; 3]].concat();
        assert!(output_schema(&longer).unwrap_err().contains("3 bytes are left behind the output schema"));
        let mut far = schema();
        far.columns[3].id = u16::MAX;
        assert!(output_schema(&encode(&far)).unwrap_err().contains("ids are positions"));
        assert!(output_schema(&encode(&Schema::default())).unwrap_err().contains("0 columns"));
    }

    #[test]
    fn a_change_may_become_any_number_of_rows() {
        let rows = output(&[row(1, "a"), row(2, "b")]);
        let with_counts = |counts: &[u32]| {
            let shift = (counts.len() * COUNT_BYTES) as u32;
            let mut bytes: Vec<u8> = counts.iter().flat_map(|count| count.to_le_bytes()).collect();
            for descriptor in rows[..2 * DESCRIPTOR_BYTES].chunks_exact(DESCRIPTOR_BYTES) {
                let mut at = Descriptor::from_bytes(descriptor.try_into().unwrap());
                (at.present, at.slots, at.heap) = (at.present + shift, at.slots + shift, at.heap + shift);
                bytes.extend_from_slice(&at.to_bytes());
            }
            bytes.extend_from_slice(&rows[2 * DESCRIPTOR_BYTES..]);
            bytes
        };
        let (counts, made) = output_changes(&with_counts(&[0, 2, 0]), 3, &schema(), 1000).unwrap();
        let ids: Vec<_> = images(&made).map(|image| image.int(0).unwrap()).collect();
        assert_eq!((counts, ids), (vec![0, 2, 0], vec![1, 2]));
        for (bytes, n, most, expected) in [
            (with_counts(&[1, 1]), 4, 1000, "output row"),
            (with_counts(&[u32::MAX]), 1, 1000, "output row 2"),
            (with_counts(&[1, 1]), 2, 60, "over 60 bytes together"),
            (vec![0; 7], 2, 1000, "too few for 2 counts"),
            (vec![1, 0, 0, 0], 1, 1000, "as many descriptors as it counts"),
        ] {
            let error = output_changes(&bytes, n, &schema(), most).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_output_of_changes_is_taken_or_refused_without_panic(bytes in any::<Vec<u8>>(), n in 0usize..4) {
            if let Ok((counts, made)) = output_changes(&bytes, n, &schema(), 10_000) {
                prop_assert_eq!(counts.iter().sum::<u32>() as usize, images(&made).count());
            }
        }

        #[test]
        fn any_output_is_taken_or_refused_without_panic(bytes in any::<Vec<u8>>(), n in 0usize..4) {
            if let Ok(made) = output_images(&bytes, n, &schema(), 10_000) {
                prop_assert_eq!(images(&made).count(), n);
            }
        }

        #[test]
        fn damaged_output_never_makes_a_damaged_image(flip in 0usize..200, bit in 0u8..8) {
            let mut bytes = output(&[row(1, "abc"), row(-2, "")]);
            let len = bytes.len();
            bytes[flip % len] ^= 1 << bit;
            if let Ok(made) = output_images(&bytes, 2, &schema(), 10_000) {
                for image in images(&made) {
                    for column in &schema().columns {
                        prop_assert!(image.value(column.id, column.ty).is_ok());
                    }
                }
            }
        }

        #[test]
        fn any_schema_message_is_taken_or_refused_without_panic(bytes in any::<Vec<u8>>()) {
            if let Ok(schema) = output_schema(&bytes) {
                prop_assert_eq!(usize::from(schema.slots()), schema.columns.len());
            }
        }
    }
}
