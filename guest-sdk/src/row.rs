//! Rows as a plugin reads them: borrowed and lazy. Making a row loads nothing; asking a column loads its eight bytes.
//!
//! [`Row`] finds columns by name, any of them. A struct with `#[derive(Row)]` names the columns it reads in the
//! manifest, so the host checks them before the first call, and finds them by position. [`Cell`] is one value of
//! either, not yet loaded.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;

use wire::Schema;
use wire::abi::{ColumnType, DESCRIPTOR_BYTES, Descriptor, Read};
use wire::image::SLOT_BYTES;
use wire::value::{Kind, Type};

use crate::manifest::column_type;
use crate::number::{Decimal, Number};
use crate::raw::Window;

/// What rows of one handle have in common: the columns the manifest named, found in the input, and the input itself.
#[derive(Debug, Default)]
pub struct Input {
    pub(crate) reads: Vec<Read>,
    pub(crate) schema: Schema,
}

/// A row with all its columns, by name.
///
/// ```
/// use guest_sdk::prelude::*;
///
/// fn delayed(row: &Row) -> bool {
///     row.get("dep_delay").and_then(|cell| cell.number()).is_some_and(|minutes| minutes > 0)
/// }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    window: Window<'a>,
    at: Descriptor,
    input: &'a Input,
}

impl<'a> Row<'a> {
    /// The row whose descriptor lies at an offset of the window.
    #[inline]
    pub(crate) fn at(window: Window<'a>, descriptor: u32, input: &'a Input) -> Self {
        Row::described(window, Descriptor::from_bytes(window.load::<DESCRIPTOR_BYTES>(descriptor)), input)
    }

    #[inline]
    pub(crate) fn described(window: Window<'a>, at: Descriptor, input: &'a Input) -> Self {
        Row { window, at, input }
    }

    /// The column of that name; `None` when the input has no such column.
    pub fn get(&self, name: &str) -> Option<Cell<'a>> {
        self.input.schema.column(name).map(|column| self.cell(read_of(column.id, column.ty)))
    }

    /// All columns of the input, in its order.
    pub fn columns(&self) -> impl Iterator<Item = (&'a str, Cell<'a>)> {
        let row = *self;
        row.input
            .schema
            .columns
            .iter()
            .map(move |column| (column.name.as_str(), row.cell(read_of(column.id, column.ty))))
    }

    #[inline]
    pub(crate) fn cell(&self, read: Read) -> Cell<'a> {
        Cell { window: self.window, at: self.at, read }
    }
}

/// How a column of that type is read.
pub(crate) fn read_of(id: u16, ty: Type) -> Read {
    let scale = if let Type::Decimal { scale, .. } = ty { scale } else { 0 };
    Read::new(id, ty.kind(), scale)
}

/// One value, not yet loaded. Each reader answers `None` for NULL, and for a column of another kind.
#[derive(Clone, Copy, Debug)]
pub struct Cell<'a> {
    window: Window<'a>,
    at: Descriptor,
    read: Read,
}

impl<'a> Cell<'a> {
    #[inline]
    pub fn is_null(&self) -> bool {
        self.slot().is_none()
    }

    #[inline]
    pub fn bool(&self) -> Option<bool> {
        self.slot_of(Kind::Bool).map(|slot| slot != 0)
    }

    /// SMALLINT, INT, BIGINT; the days of a DATE, the microseconds of a TIME or TIMESTAMP.
    #[inline]
    pub fn int(&self) -> Option<i64> {
        self.slot_of(Kind::Int).map(|slot| slot as i64)
    }

    /// REAL and DOUBLE.
    #[inline]
    pub fn float(&self) -> Option<f64> {
        self.slot_of(Kind::Float).map(f64::from_bits)
    }

    #[inline]
    pub fn decimal(&self) -> Option<Decimal> {
        let unscaled = i128::from_le_bytes(self.heap16(Kind::Decimal)?);
        Some(Decimal { unscaled, scale: self.read.scale })
    }

    /// Any integer, float or decimal.
    #[inline]
    pub fn number(&self) -> Option<Number> {
        match self.read.kind {
            kind if kind == Kind::Int as u8 => self.int().map(Number::Int),
            kind if kind == Kind::Float as u8 => self.float().map(Number::Float),
            _ => self.decimal().map(Number::Decimal),
        }
    }

    /// TEXT and JSON.
    #[inline]
    pub fn text(&self) -> Option<&'a str> {
        self.heap(Kind::Text).map(|(start, len)| self.window.text(start, len))
    }

    /// BYTEA.
    #[inline]
    pub fn bytes(&self) -> Option<&'a [u8]> {
        self.heap(Kind::Bytes).map(|(start, len)| self.window.bytes(start, len))
    }

    #[inline]
    pub fn uuid(&self) -> Option<Uuid> {
        self.heap16(Kind::Uuid).map(Uuid)
    }

    #[inline]
    fn heap16(&self, kind: Kind) -> Option<[u8; 16]> {
        self.heap(kind).map(|(start, _)| self.window.load(start))
    }

    /// Offset in the window and length of the heap bytes.
    #[inline]
    fn heap(&self, kind: Kind) -> Option<(u32, u32)> {
        self.slot_of(kind).map(|slot| (self.at.heap.wrapping_add(slot as u32), (slot >> 32) as u32))
    }

    #[inline]
    fn slot_of(&self, kind: Kind) -> Option<u64> {
        if self.read.kind == kind as u8 { self.slot() } else { None }
    }

    /// Offsets wrap instead of overflowing: whatever they are, the window checks them.
    #[inline]
    fn slot(&self) -> Option<u64> {
        let column = u32::from(self.read.column);
        if column >= self.at.columns {
            return None;
        }
        let [present] = self.window.load(self.at.present.wrapping_add(column / 8));
        if present >> (column % 8) & 1 == 0 {
            return None;
        }
        let at = self.at.slots.wrapping_add(column * SLOT_BYTES as u32);
        Some(u64::from_le_bytes(self.window.load(at)))
    }
}

/// A column of a `#[derive(Row)]` struct: loaded when asked for, and only then.
#[derive(Clone, Copy, Debug)]
pub struct Column<'a, T> {
    row: &'a Row<'a>,
    index: usize,
    name: &'static str,
    value: PhantomData<fn() -> T>,
}

impl<T> Column<'_, T> {
    /// The column's id in the input.
    #[inline]
    pub(crate) fn id(&self) -> u16 {
        self.row.input.reads[self.index].column
    }
}

impl<'a, T: ColumnValue<'a>> Column<'a, T> {
    /// The value, or `None` for NULL.
    #[inline]
    pub fn get(&self) -> Option<T> {
        T::read(&self.cell())
    }

    /// The value, or for `?` an error that says which column is NULL.
    #[inline]
    pub fn required(&self) -> Result<T, IsNull> {
        self.get().ok_or(IsNull(self.name))
    }

    #[inline]
    pub fn is_null(&self) -> bool {
        self.cell().is_null()
    }

    /// Whether the input has this column at all; `false` only for `#[column(optional)]`.
    pub fn exists(&self) -> bool {
        self.read().column != Read::MISSING
    }

    #[inline]
    fn cell(&self) -> Cell<'a> {
        self.row.cell(self.read())
    }

    #[inline]
    fn read(&self) -> Read {
        self.row.input.reads[self.index]
    }
}

/// A required column was NULL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsNull(&'static str);

impl fmt::Display for IsNull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "column `{}` is NULL", self.0)
    }
}

impl core::error::Error for IsNull {}

/// A value that a [`Column`] can hold.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a column value",
    label = "not a column value",
    note = "columns are: bool, i64, f64, Number, Decimal, &str, &[u8], Uuid, Date, Time, Timestamp, or Cell for any type",
    note = "NULL needs no Option: `Column::get` answers one"
)]
pub trait ColumnValue<'a>: Sized {
    /// What the manifest says of the column; the host refuses a table whose column does not fit.
    const TYPE: ColumnType;
    fn read(cell: &Cell<'a>) -> Option<Self>;
}

macro_rules! column_values {
    ($($ty:ty: $column:ident, $read:expr;)*) => {$(
        impl<'a> ColumnValue<'a> for $ty {
            const TYPE: ColumnType = ColumnType::$column;
            #[inline]
            fn read(cell: &Cell<'a>) -> Option<Self> {
                $read(cell)
            }
        }
    )*};
}

column_values! {
    bool: Bool, Cell::bool;
    i64: Int, Cell::int;
    f64: Float, Cell::float;
    Number: Number, Cell::number;
    Decimal: Decimal, Cell::decimal;
    &'a str: Text, Cell::text;
    &'a [u8]: Bytes, Cell::bytes;
    Uuid: Uuid, Cell::uuid;
    Date: Int, |cell: &Cell<'a>| cell.int().map(|days| Date(days as i32));
    Time: Int, |cell: &Cell<'a>| cell.int().map(Time);
    Timestamp: Int, |cell: &Cell<'a>| cell.int().map(Timestamp);
    Cell<'a>: Any, |cell: &Cell<'a>| (!cell.is_null()).then_some(*cell);
}

/// Sixteen bytes, in the order they are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Days since 1970-01-01.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Date(pub i32);

/// Microseconds since midnight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Time(pub i64);

/// Microseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Timestamp(pub i64);

/// What a plugin's function may take as its row: [`Row`] itself, or a struct with `#[derive(Row)]`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a row",
    label = "not a row",
    note = "take `&Row`, a reference to a struct with `#[derive(Row)]`, or a `&Change` of one of them"
)]
pub trait FromRow<'a>: Sized {
    /// The columns it reads, as parts of manifest lines.
    const MANIFEST: &'static [&'static str];
    /// The same for the check of what the host resolved, in order.
    const COLUMNS: &'static [ColumnSpec];
    fn from_row(row: &'a Row<'a>) -> Self;
}

impl<'a> FromRow<'a> for Row<'a> {
    const MANIFEST: &'static [&'static str] = &[];
    const COLUMNS: &'static [ColumnSpec] = &[];

    #[inline]
    fn from_row(row: &'a Row<'a>) -> Self {
        *row
    }
}

/// One column that a row struct reads.
#[derive(Clone, Copy, Debug)]
pub struct ColumnSpec {
    pub name: &'static str,
    pub ty: ColumnType,
    pub optional: bool,
}

impl ColumnSpec {
    /// Whether values of that kind can be read as this column; the host checks the same before it configures.
    pub(crate) fn check(&self, read: Read) -> Result<(), String> {
        if read.column == Read::MISSING {
            return if self.optional { Ok(()) } else { Err(alloc::format!("column `{}` is missing", self.name)) };
        }
        let is = |kinds: &[Kind]| kinds.iter().any(|kind| *kind as u8 == read.kind);
        let fits = match self.ty {
            ColumnType::Bool => is(&[Kind::Bool]),
            ColumnType::Int => is(&[Kind::Int]),
            ColumnType::Float => is(&[Kind::Float]),
            ColumnType::Number => is(&[Kind::Int, Kind::Float, Kind::Decimal]),
            ColumnType::Decimal => is(&[Kind::Decimal]),
            ColumnType::Text => is(&[Kind::Text]),
            ColumnType::Bytes => is(&[Kind::Bytes]),
            ColumnType::Uuid => is(&[Kind::Uuid]),
            ColumnType::Any => usize::from(read.kind) < KINDS.len(),
        };
        if fits { Ok(()) } else { Err(self.refuse(read)) }
    }

    fn refuse(&self, read: Read) -> String {
        let found = KINDS.get(usize::from(read.kind)).unwrap_or(&"of an unknown kind");
        alloc::format!("column `{}` is {found}, and the plugin reads {}", self.name, column_type(self.ty))
    }
}

/// Names of the [`Kind`]s, by number.
const KINDS: [&str; 7] = ["bool", "int", "float", "decimal", "text", "bytes", "uuid"];

/// A field of a `#[derive(Row)]` struct; only [`Column`] is one.
#[diagnostic::on_unimplemented(
    message = "a row's field must be a `Column`, not `{Self}`",
    label = "wrap it: `Column<'a, …>`"
)]
pub trait RowField<'a> {
    const TYPE: ColumnType;
    fn field(row: &'a Row<'a>, index: usize, name: &'static str) -> Self;
}

impl<'a, T: ColumnValue<'a>> RowField<'a> for Column<'a, T> {
    const TYPE: ColumnType = T::TYPE;

    #[inline]
    fn field(row: &'a Row<'a>, index: usize, name: &'static str) -> Self {
        Column { row, index, name, value: PhantomData }
    }
}
