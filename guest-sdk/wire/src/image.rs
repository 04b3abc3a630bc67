//! A row as bytes.
//!
//! ```text
//! varint(p) present[p]     bit i of byte i/8: column i has a value (else NULL); p = ceil(n / 8)
//! varint(n) slot[n]        8 bytes each, little-endian: the value itself, or heap offset (u32) and length (u32)
//! varint(h) heap[h]
//! ```
//!
//! This is a postcard message ([`Image`]); the varints are its `Vec` lengths. Columns are found by their id, so any
//! column is one load away once the three starts are known, and the writer of a frame says them ([`ImageAt`]).

use alloc::vec::Vec;
use core::fmt;
use serde::{Deserialize, Serialize};

use crate::value::{Kind, Type, Value};

/// Bytes of one slot.
pub const SLOT_BYTES: usize = 8;

/// The most columns a table may have, dropped ones included.
pub const MAX_COLUMNS: u16 = 1024;

/// A 64-bit slot, fixed-width in postcard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(#[serde(with = "postcard::fixint::le")] pub u64);

/// The image as postcard sees it. Reading goes through [`ImageRef`]; this is the proof that the bytes are postcard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    pub present: Vec<u8>,
    pub slots: Vec<Slot>,
    pub heap: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageError {
    /// The bytes end before the image does.
    Truncated,
    /// A length, offset or bitmap does not fit the others.
    Malformed,
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ImageError::Truncated => "row image is truncated",
            ImageError::Malformed => "row image is malformed",
        })
    }
}

impl core::error::Error for ImageError {}

/// Where the parts of an image start, relative to some base, and how many columns it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageAt {
    pub present: u32,
    pub slots: u32,
    pub heap: u32,
    pub columns: u32,
}

/// A borrowed image. Reading allocates nothing and never panics on bytes that [`ImageRef::parse`] took.
#[derive(Clone, Copy, Debug)]
pub struct ImageRef<'a> {
    present: &'a [u8],
    slots: &'a [u8],
    heap: &'a [u8],
}

impl<'a> ImageRef<'a> {
    /// Takes one image from the front of `bytes`; returns it, where its parts lie, and how many bytes it used.
    pub fn parse(bytes: &'a [u8]) -> Result<(Self, ImageAt, usize), ImageError> {
        let mut at = 0;
        let present_len = take_varint(bytes, &mut at)?;
        let present_at = at;
        let present = take(bytes, &mut at, present_len)?;
        let columns = take_varint(bytes, &mut at)?;
        if columns > usize::from(MAX_COLUMNS) || present_len != columns.div_ceil(8) {
            return Err(ImageError::Malformed);
        }
        let slots_at = at;
        let slots = take(bytes, &mut at, columns * SLOT_BYTES)?;
        let heap_len = take_varint(bytes, &mut at)?;
        let heap_at = at;
        let heap = take(bytes, &mut at, heap_len)?;
        let place = ImageAt {
            present: present_at as u32,
            slots: slots_at as u32,
            heap: heap_at as u32,
            columns: columns as u32,
        };
        Ok((ImageRef { present, slots, heap }, place, at))
    }

    /// How many columns the image has; a higher id reads as NULL.
    pub fn columns(&self) -> u16 {
        (self.slots.len() / SLOT_BYTES) as u16
    }

    pub fn is_null(&self, column: u16) -> bool {
        let i = usize::from(column);
        self.present.get(i / 8).is_none_or(|byte| byte >> (i % 8) & 1 == 0) || column >= self.columns()
    }

    /// The raw slot of a column that is not NULL.
    pub fn slot(&self, column: u16) -> Option<u64> {
        if self.is_null(column) {
            return None;
        }
        let at = usize::from(column) * SLOT_BYTES;
        let bytes = self.slots.get(at..at + SLOT_BYTES)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    pub fn bool(&self, column: u16) -> Option<bool> {
        self.slot(column).map(|slot| slot != 0)
    }

    pub fn int(&self, column: u16) -> Option<i64> {
        self.slot(column).map(|slot| slot as i64)
    }

    pub fn float(&self, column: u16) -> Option<f64> {
        self.slot(column).map(f64::from_bits)
    }

    /// The heap bytes of a text, bytes, decimal or uuid column; `None` for NULL or a slot that points outside.
    pub fn bytes(&self, column: u16) -> Option<&'a [u8]> {
        let slot = self.slot(column)?;
        let (start, len) = ((slot & 0xffff_ffff) as usize, (slot >> 32) as usize);
        self.heap.get(start..start.checked_add(len)?)
    }

    pub fn text(&self, column: u16) -> Option<&'a str> {
        core::str::from_utf8(self.bytes(column)?).ok()
    }

    pub fn decimal(&self, column: u16) -> Option<i128> {
        Some(i128::from_le_bytes(self.bytes(column)?.try_into().ok()?))
    }

    pub fn uuid(&self, column: u16) -> Option<[u8; 16]> {
        self.bytes(column)?.try_into().ok()
    }

    /// The value of a column of type `ty`. A damaged slot reads as an error, never as NULL.
    pub fn value(&self, column: u16, ty: Type) -> Result<Value, ImageError> {
        if self.is_null(column) {
            return Ok(Value::Null);
        }
        match ty.kind() {
            Kind::Bool => self.bool(column).map(Value::Bool),
            Kind::Int => self.int(column).map(Value::Int),
            Kind::Float => self.float(column).map(Value::Float),
            Kind::Decimal => self.decimal(column).map(Value::Decimal),
            Kind::Text => self.text(column).map(|text| Value::Text(text.into())),
            Kind::Bytes => self.bytes(column).map(|bytes| Value::Bytes(bytes.into())),
            Kind::Uuid => self.uuid(column).map(Value::Uuid),
        }
        .ok_or(ImageError::Malformed)
    }

    /// Whether a column is the same in both images, bit for bit (a float's NaN equals itself).
    pub fn same(&self, other: &ImageRef<'_>, column: u16, kind: Kind) -> bool {
        match (self.is_null(column), other.is_null(column)) {
            (true, true) => true,
            (false, false) => match kind {
                Kind::Bool | Kind::Int | Kind::Float => self.slot(column) == other.slot(column),
                _ => self.bytes(column) == other.bytes(column),
            },
            _ => false,
        }
    }
}

/// Builds one image. Columns not set are NULL.
#[derive(Clone, Debug)]
pub struct ImageBuilder {
    present: Vec<u8>,
    slots: Vec<u64>,
    heap: Vec<u8>,
}

impl ImageBuilder {
    /// An image of `columns` NULLs.
    pub fn new(columns: u16) -> Self {
        ImageBuilder {
            present: alloc::vec![0; usize::from(columns).div_ceil(8)],
            slots: alloc::vec![0; usize::from(columns)],
            heap: Vec::new(),
        }
    }

    /// Back to all NULL, keeping the memory.
    #[inline]
    pub fn clear(&mut self) {
        self.present.fill(0);
        self.slots.fill(0);
        self.heap.clear();
    }

    #[inline]
    pub fn set_bool(&mut self, column: u16, value: bool) {
        self.set_slot(column, u64::from(value));
    }

    #[inline]
    pub fn set_int(&mut self, column: u16, value: i64) {
        self.set_slot(column, value as u64);
    }

    #[inline]
    pub fn set_float(&mut self, column: u16, value: f64) {
        self.set_slot(column, value.to_bits());
    }

    /// Text, bytes, decimal (16 bytes, little-endian) and uuid values.
    #[inline]
    pub fn set_bytes(&mut self, column: u16, value: &[u8]) {
        let start = self.heap.len() as u64;
        self.heap.extend_from_slice(value);
        self.set_slot(column, start | (value.len() as u64) << 32);
    }

    pub fn set(&mut self, column: u16, value: &Value) {
        match value {
            Value::Null => {}
            Value::Bool(v) => self.set_bool(column, *v),
            Value::Int(v) => self.set_int(column, *v),
            Value::Float(v) => self.set_float(column, *v),
            Value::Decimal(v) => self.set_bytes(column, &v.to_le_bytes()),
            Value::Text(v) => self.set_bytes(column, v.as_bytes()),
            Value::Bytes(v) => self.set_bytes(column, v),
            Value::Uuid(v) => self.set_bytes(column, v),
        }
    }

    /// Appends the image's bytes to `out` and says where its parts lie, relative to the old end of `out`.
    pub fn finish_into(&self, out: &mut Vec<u8>) -> ImageAt {
        let start = out.len();
        put_varint(out, self.present.len());
        let present = out.len() - start;
        out.extend_from_slice(&self.present);
        put_varint(out, self.slots.len());
        let slots = out.len() - start;
        // In one piece: growing by a slot would ask for room at each.
        let mut at = out.len();
        out.resize(at + self.slots.len() * SLOT_BYTES, 0);
        for slot in &self.slots {
            out[at..at + SLOT_BYTES].copy_from_slice(&slot.to_le_bytes());
            at += SLOT_BYTES;
        }
        put_varint(out, self.heap.len());
        let heap = out.len() - start;
        out.extend_from_slice(&self.heap);
        ImageAt { present: present as u32, slots: slots as u32, heap: heap as u32, columns: self.slots.len() as u32 }
    }

    pub fn finish(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.present.len() + self.slots.len() * SLOT_BYTES + self.heap.len() + 12);
        self.finish_into(&mut out);
        out
    }

    #[inline]
    fn set_slot(&mut self, column: u16, slot: u64) {
        let i = usize::from(column);
        self.present[i / 8] |= 1 << (i % 8);
        self.slots[i] = slot;
    }
}

/// postcard's unsigned varint.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn take_varint(bytes: &[u8], at: &mut usize) -> Result<usize, ImageError> {
    let mut value = 0u64;
    // Lengths are u32 everywhere: five bytes at the most.
    for shift in (0..35).step_by(7) {
        let byte = *bytes.get(*at).ok_or(ImageError::Truncated)?;
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return if value <= u64::from(u32::MAX) { Ok(value as usize) } else { Err(ImageError::Malformed) };
        }
    }
    Err(ImageError::Malformed)
}

pub(crate) fn take<'a>(bytes: &'a [u8], at: &mut usize, len: usize) -> Result<&'a [u8], ImageError> {
    let end = at.checked_add(len).ok_or(ImageError::Malformed)?;
    let part = bytes.get(*at..end).ok_or(ImageError::Truncated)?;
    *at = end;
    Ok(part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use proptest::prelude::*;

    fn any_value() -> impl Strategy<Value = (Type, Value)> {
        prop_oneof![
            any::<bool>().prop_map(|v| (Type::Boolean, Value::Bool(v))),
            any::<i64>().prop_map(|v| (Type::BigInt, Value::Int(v))),
            any::<f64>().prop_map(|v| (Type::Double, Value::Float(v))),
            any::<i128>().prop_map(|v| (Type::Decimal { precision: 38, scale: 3 }, Value::Decimal(v))),
            any::<String>().prop_map(|v| (Type::Text, Value::Text(v))),
            any::<Vec<u8>>().prop_map(|v| (Type::Bytea, Value::Bytes(v))),
            any::<[u8; 16]>().prop_map(|v| (Type::Uuid, Value::Uuid(v))),
            Just((Type::Int, Value::Null)),
        ]
    }

    proptest! {
        #[test]
        fn round_trip_and_postcard_agree(row in proptest::collection::vec(any_value(), 0..200)) {
            let mut builder = ImageBuilder::new(row.len() as u16);
            for (i, (_, value)) in row.iter().enumerate() {
                builder.set(i as u16, value);
            }
            let bytes = builder.finish();
            let (image, _, used) = ImageRef::parse(&bytes).unwrap();
            prop_assert_eq!(used, bytes.len());
            for (i, (ty, value)) in row.iter().enumerate() {
                prop_assert_eq!(&image.value(i as u16, *ty).unwrap(), value);
            }
            let typed: Image = postcard::from_bytes(&bytes).unwrap();
            prop_assert_eq!(postcard::to_allocvec(&typed).unwrap(), bytes);
        }

        #[test]
        fn any_bytes_are_taken_or_refused_without_panic(bytes in any::<Vec<u8>>()) {
            if let Ok((image, ..)) = ImageRef::parse(&bytes) {
                for column in 0..image.columns() + 2 {
                    let _ = (image.int(column), image.text(column), image.uuid(column));
                }
            }
        }
    }

    #[test]
    fn the_bytes_are_pinned() {
        let mut builder = ImageBuilder::new(3);
        builder.set_int(0, -2);
        builder.set_bytes(2, b"hi");
        assert_eq!(
            builder.finish(),
            [
                1, 0b101, // present
                3, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2,
                b'h', b'i', // heap
            ]
        );
    }
}
