//! Column types, the few physical kinds they are stored as, and values.

use alloc::{string::String, vec::Vec};
use core::fmt;
use serde::{Deserialize, Serialize};

/// A SQL column type. Positional in postcard: append variants only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Type {
    Boolean,
    SmallInt,
    Int,
    BigInt,
    Real,
    Double,
    Decimal {
        precision: u8,
        scale: i8,
    },
    Text,
    Bytea,
    /// Days since 1970-01-01.
    Date,
    /// Microseconds since midnight.
    Time,
    /// Microseconds since 1970-01-01T00:00:00Z.
    Timestamp,
    Uuid,
    /// JSON text, checked when written.
    Json,
}

/// How a value lies in an image. The numbers are ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Slot: 0 or 1.
    Bool = 0,
    /// Slot: a sign-extended 64-bit integer (SMALLINT, INT, BIGINT, DATE, TIME, TIMESTAMP).
    Int = 1,
    /// Slot: the bits of a 64-bit float (REAL is widened, which is exact).
    Float = 2,
    /// Heap: 16 bytes, little-endian two's complement, unscaled.
    Decimal = 3,
    /// Heap: UTF-8 (TEXT, JSON).
    Text = 4,
    /// Heap: any bytes.
    Bytes = 5,
    /// Heap: 16 bytes, in the order they are printed.
    Uuid = 6,
}

/// The SQL name, as results, messages and `information_schema` show it.
impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Type::Boolean => "BOOLEAN",
            Type::SmallInt => "SMALLINT",
            Type::Int => "INT",
            Type::BigInt => "BIGINT",
            Type::Real => "REAL",
            Type::Double => "DOUBLE",
            Type::Decimal { precision, scale } => return write!(f, "DECIMAL({precision},{scale})"),
            Type::Text => "TEXT",
            Type::Bytea => "BYTEA",
            Type::Date => "DATE",
            Type::Time => "TIME",
            Type::Timestamp => "TIMESTAMP",
            Type::Uuid => "UUID",
            Type::Json => "JSON",
        })
    }
}

impl Type {
    /// Every type that has no parameters: all but DECIMAL.
    pub const PLAIN: [Type; 13] = [
        Type::Boolean,
        Type::SmallInt,
        Type::Int,
        Type::BigInt,
        Type::Real,
        Type::Double,
        Type::Text,
        Type::Bytea,
        Type::Date,
        Type::Time,
        Type::Timestamp,
        Type::Uuid,
        Type::Json,
    ];

    /// The physical kind of values of this type.
    pub const fn kind(self) -> Kind {
        match self {
            Type::Boolean => Kind::Bool,
            Type::SmallInt | Type::Int | Type::BigInt | Type::Date | Type::Time | Type::Timestamp => Kind::Int,
            Type::Real | Type::Double => Kind::Float,
            Type::Decimal { .. } => Kind::Decimal,
            Type::Text | Type::Json => Kind::Text,
            Type::Bytea => Kind::Bytes,
            Type::Uuid => Kind::Uuid,
        }
    }
}

/// A value by its physical kind. What it means is said by the column's [`Type`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Value {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Decimal(i128),
    Text(String),
    Bytes(Vec<u8>),
    Uuid([u8; 16]),
}

/// One column of a [`Schema`]. `id` is the slot in every image of the table, never reused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnDecl {
    #[serde(with = "postcard::fixint::le")]
    pub id: u16,
    pub name: String,
    pub ty: Type,
    pub nullable: bool,
    pub key: bool,
}

/// The columns of a table or of a transform's output, in the order they are shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schema {
    pub columns: Vec<ColumnDecl>,
}

impl Schema {
    /// How many slots an image of this schema has: one more than the highest id.
    pub fn slots(&self) -> u16 {
        self.columns.iter().map(|c| c.id + 1).max().unwrap_or(0)
    }

    pub fn column(&self, name: &str) -> Option<&ColumnDecl> {
        self.columns.iter().find(|c| c.name == name)
    }
}
