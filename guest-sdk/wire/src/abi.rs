//! What host and guest say to each other: names, packed results, descriptors, the configure message, the manifest.
//!
//! `guest-sdk/ABI.md` describes the same byte by byte for other languages; the tests of both read the same vectors.

use alloc::{string::String, vec::Vec};
use serde::{Deserialize, Serialize};

use crate::image::ImageAt;
use crate::value::{Kind, Schema};

/// The ABI version this crate speaks.
pub const ABI: u32 = 1;

/// Exports of a guest.
pub mod export {
    /// `() -> i32`: the ABI version the guest was built for.
    pub const ABI: &str = "tg_abi";
    /// `(len: i32) -> i32`: sets `len` bytes aside, aligned to [`super::WINDOW_ALIGN`], for the window; its address.
    pub const WINDOW: &str = "tg_window";
    /// `(configure: i32) -> i64`: window offset of a [`super::Configure`]; see [`super::Configured`].
    pub const CONFIGURE: &str = "tg_configure";
    /// `(handle: i32)`: the parameters are not used any more.
    pub const RELEASE: &str = "tg_release";
    /// `(handle: i32, descriptors: i32, n: i32) -> i64`: bit i set = row (or change) i is kept; bits ≥ n must be 0.
    pub const FILTER: &str = "tg_filter";
    /// `(handle: i32, descriptors: i32, n: i32) -> i64`: address (low 32 bits) and length (high) of the output.
    pub const TRANSFORM: &str = "tg_transform";
    /// `()`: optional; run once after instantiation.
    pub const INITIALIZE: &str = "_initialize";
    pub const MEMORY: &str = "memory";
}

/// Imports a guest may use, all from [`MODULE`](import::MODULE).
pub mod import {
    pub const MODULE: &str = "tidegate";
    /// `(level: i32, ptr: i32, len: i32)`: 0 error, 1 warn, 2 info, 3 debug.
    pub const LOG: &str = "log";
    /// `(ptr: i32, len: i32, value: f64)`: adds to the plugin's counter of that name.
    pub const METRIC: &str = "metric";
    /// `(index: i32, ptr: i32, len: i32)`: row `index` of the batch failed (or -1: the call), with a message.
    pub const FAIL: &str = "fail";
}

/// The window's address in guest memory is a multiple of this.
pub const WINDOW_ALIGN: u32 = 64 * 1024;

/// The most rows of one call.
pub const MAX_BATCH: usize = 64;

/// Bytes of a [`Descriptor`].
pub const DESCRIPTOR_BYTES: usize = 16;

/// One row of a batch: where the parts of its image are, as byte offsets from the window's first byte (in a
/// transform's output: from the output's first byte). Four little-endian u32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    pub present: u32,
    pub slots: u32,
    pub heap: u32,
    /// How many columns the image has; a column with a higher id is NULL.
    pub columns: u32,
}

impl Descriptor {
    /// Of an image whose places count from `base`. Whoever knows where its bytes end checks that it lies before that: here
    /// a sum that is too large wraps.
    #[inline]
    pub fn new(at: ImageAt, base: u32) -> Self {
        Descriptor {
            present: base.wrapping_add(at.present),
            slots: base.wrapping_add(at.slots),
            heap: base.wrapping_add(at.heap),
            columns: at.columns,
        }
    }

    #[inline]
    pub fn to_bytes(self) -> [u8; DESCRIPTOR_BYTES] {
        // As one number: a loop over four pieces costs as much as the guest's look at the row.
        let low = u64::from(self.present) | u64::from(self.slots) << 32;
        let high = u64::from(self.heap) | u64::from(self.columns) << 32;
        (u128::from(low) | u128::from(high) << 64).to_le_bytes()
    }

    /// [`Descriptor::to_bytes`] as four numbers.
    #[inline]
    pub fn numbers(self) -> [u32; 4] {
        [self.present.to_le(), self.slots.to_le(), self.heap.to_le(), self.columns.to_le()]
    }

    #[inline]
    pub fn from_bytes(bytes: [u8; DESCRIPTOR_BYTES]) -> Self {
        let part = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        Descriptor { present: part(0), slots: part(4), heap: part(8), columns: part(12) }
    }
}

/// Bytes of a [`ChangeDescriptor`].
pub const CHANGE_DESCRIPTOR_BYTES: usize = 48;

/// One change of a batch for the kinds that see changes: twelve little-endian u32, offsets as in [`Descriptor`]. An
/// image that is not there has 0 columns, so that each of its columns reads as NULL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChangeDescriptor {
    /// An [`Op`](crate::Op) as a number.
    pub op: u32,
    /// Offset of the bitmap of changed columns: bit i of byte i/8 = column i differs (a missing image counts as NULLs).
    pub changed: u32,
    /// How many columns the bitmap speaks of; a higher one did not change.
    pub columns: u32,
    pub old: Descriptor,
    pub new: Descriptor,
}

impl ChangeDescriptor {
    #[inline]
    pub fn to_bytes(self) -> [u8; CHANGE_DESCRIPTOR_BYTES] {
        let mut out = [0; CHANGE_DESCRIPTOR_BYTES];
        for (chunk, part) in out.chunks_exact_mut(4).zip([self.op, self.changed, self.columns]) {
            chunk.copy_from_slice(&part.to_le_bytes());
        }
        out[16..32].copy_from_slice(&self.old.to_bytes());
        out[32..].copy_from_slice(&self.new.to_bytes());
        out
    }

    #[inline]
    pub fn from_bytes(bytes: [u8; CHANGE_DESCRIPTOR_BYTES]) -> Self {
        let part = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let image =
            |i: usize| Descriptor { present: part(i), slots: part(i + 4), heap: part(i + 8), columns: part(i + 12) };
        ChangeDescriptor { op: part(0), changed: part(4), columns: part(8), old: image(16), new: image(32) }
    }
}

/// Bytes of a [`Configure`].
pub const CONFIGURE_BYTES: usize = 32;

/// What `tg_configure` is given: eight little-endian u32 at the offset it gets, every offset counted from the window's
/// first byte. The bytes stay valid only during the call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Configure {
    /// The parameters as a row image: column i is the i-th `param` of the manifest, defaults filled in.
    pub params: Descriptor,
    /// Offset of `reads` entries of 4 bytes: the columns of the manifest, in its order (see [`Read`]).
    pub reads: u32,
    pub reads_len: u32,
    /// Offset and length of the input [`Schema`] as postcard.
    pub schema: u32,
    pub schema_len: u32,
}

impl Configure {
    pub fn to_bytes(self) -> [u8; CONFIGURE_BYTES] {
        let mut out = [0; CONFIGURE_BYTES];
        out[..DESCRIPTOR_BYTES].copy_from_slice(&self.params.to_bytes());
        let rest = [self.reads, self.reads_len, self.schema, self.schema_len];
        for (chunk, part) in out[DESCRIPTOR_BYTES..].chunks_exact_mut(4).zip(rest) {
            chunk.copy_from_slice(&part.to_le_bytes());
        }
        out
    }

    pub fn from_bytes(bytes: [u8; CONFIGURE_BYTES]) -> Self {
        let part = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        Configure {
            params: Descriptor { present: part(0), slots: part(4), heap: part(8), columns: part(12) },
            reads: part(16),
            reads_len: part(20),
            schema: part(24),
            schema_len: part(28),
        }
    }
}

/// One column that a plugin reads, resolved against the input: 4 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Column id (u16), or [`Read::MISSING`] for an optional column that the input lacks.
    pub column: u16,
    /// A [`Kind`].
    pub kind: u8,
    /// Digits after the point of a DECIMAL, else 0.
    pub scale: i8,
}

impl Read {
    pub const MISSING: u16 = u16::MAX;

    pub fn new(column: u16, kind: Kind, scale: i8) -> Self {
        Read { column, kind: kind as u8, scale }
    }

    pub fn to_bytes(self) -> [u8; 4] {
        let id = self.column.to_le_bytes();
        [id[0], id[1], self.kind, self.scale as u8]
    }

    pub fn from_bytes(bytes: [u8; 4]) -> Self {
        Read { column: u16::from_le_bytes([bytes[0], bytes[1]]), kind: bytes[2], scale: bytes[3] as i8 }
    }
}

/// What `tg_configure` returns: low 32 bits the handle, high 32 bits the address of the output schema (0 for a filter):
/// a little-endian u32 length and then a postcard [`Schema`]. All bits set: it failed, and `fail` said why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Configured {
    pub handle: u32,
    pub schema: u32,
}

impl Configured {
    pub const FAILED: u64 = u64::MAX;

    pub fn pack(self) -> u64 {
        u64::from(self.handle) | u64::from(self.schema) << 32
    }

    pub fn unpack(packed: u64) -> Option<Self> {
        (packed != Self::FAILED).then_some(Configured { handle: packed as u32, schema: (packed >> 32) as u32 })
    }
}

/// The custom section that holds the manifest: JSON lines, one [`ManifestLine`] each, ≤ [`MANIFEST_MAX_BYTES`].
pub const MANIFEST_SECTION: &str = "tidegate";
pub const MANIFEST_MAX_BYTES: usize = 64 * 1024;

/// What a plugin is given and what it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PluginKind {
    /// Row → keep it or not.
    RowFilter,
    /// Row → row with other columns.
    RowTransform,
    /// Change → keep it or not.
    ChangeFilter,
    /// Change → any number of rows.
    ChangeTransform,
}

impl PluginKind {
    pub fn as_str(self) -> &'static str {
        match self {
            PluginKind::RowFilter => "row_filter",
            PluginKind::RowTransform => "row_transform",
            PluginKind::ChangeFilter => "change_filter",
            PluginKind::ChangeTransform => "change_transform",
        }
    }

    pub fn is_filter(self) -> bool {
        matches!(self, PluginKind::RowFilter | PluginKind::ChangeFilter)
    }

    /// Whether it is given whole changes; else rows.
    pub fn sees_changes(self) -> bool {
        matches!(self, PluginKind::ChangeFilter | PluginKind::ChangeTransform)
    }
}

/// One line of the manifest. Unknown fields and kinds are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ManifestLine {
    /// `{"plugin":{"abi":1,"kind":"change_filter"}}`; without a kind it is the row kind of its export.
    Plugin {
        abi: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        kind: Option<PluginKind>,
        /// `false`: a filter whose failures must not let rows through unjudged (`on_error=pass` is refused).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pass: Option<bool>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        doc: Option<String>,
    },
    /// `{"param":{"name":"minutes","type":"int","default":"15"}}`: parameter i of the image that configure gets.
    Param {
        name: String,
        r#type: ParamType,
        /// JSON text of the default; without one the parameter is required.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        default: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        doc: Option<String>,
    },
    /// `{"column":{"name":"dep_delay","type":"number"}}`: entry i of the reads that configure gets.
    Column {
        name: String,
        r#type: ColumnType,
        #[serde(default)]
        optional: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParamType {
    Bool,
    Int,
    Float,
    Text,
}

/// What a plugin expects of a column. The host refuses a table whose column does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColumnType {
    Bool,
    /// SMALLINT, INT, BIGINT, DATE, TIME, TIMESTAMP.
    Int,
    /// REAL, DOUBLE.
    Float,
    /// `Int`, `Float` or DECIMAL: the guest looks at the read's kind.
    Number,
    Decimal,
    /// TEXT, JSON.
    Text,
    Bytes,
    Uuid,
    Any,
}

/// Decodes the schema a guest answered or was given.
pub fn decode_schema(bytes: &[u8]) -> Result<Schema, postcard::Error> {
    postcard::from_bytes(bytes)
}

/// A schema at the start of these bytes, and what is left behind it.
pub fn take_schema(bytes: &[u8]) -> Result<(Schema, &[u8]), postcard::Error> {
    postcard::take_from_bytes(bytes)
}

pub fn encode_schema(schema: &Schema) -> Result<Vec<u8>, postcard::Error> {
    postcard::to_allocvec(schema)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_messages_round_trip_and_are_pinned() {
        let descriptor = Descriptor { present: 1, slots: 2, heap: 0x0304, columns: 5 };
        assert_eq!(descriptor.to_bytes(), [1, 0, 0, 0, 2, 0, 0, 0, 4, 3, 0, 0, 5, 0, 0, 0]);
        assert_eq!(Descriptor::from_bytes(descriptor.to_bytes()), descriptor);

        let old = Descriptor::default();
        let change = ChangeDescriptor { op: 1, changed: 0x0102, columns: 3, old, new: descriptor };
        assert_eq!(change.to_bytes()[..16], [1, 0, 0, 0, 2, 1, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((&change.to_bytes()[16..32], &change.to_bytes()[32..]), (&[0; 16][..], &descriptor.to_bytes()[..]));
        assert_eq!(ChangeDescriptor::from_bytes(change.to_bytes()), change);

        let configure = Configure { params: descriptor, reads: 6, reads_len: 7, schema: 8, schema_len: 9 };
        assert_eq!(configure.to_bytes()[16..], [6, 0, 0, 0, 7, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0]);
        assert_eq!(Configure::from_bytes(configure.to_bytes()), configure);

        let read = Read::new(0x0102, Kind::Decimal, -3);
        assert_eq!(read.to_bytes(), [2, 1, 3, 0xfd]);
        assert_eq!(Read::from_bytes(read.to_bytes()), read);

        let configured = Configured { handle: 3, schema: 9 };
        assert_eq!(Configured::unpack(configured.pack()), Some(configured));
        assert_eq!(Configured::unpack(Configured::FAILED), None);
    }
}
