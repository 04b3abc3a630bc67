//! Plugins in ordinary tests: rows made of values, read through the very code that reads the host's window.
//!
//! ```
//! use guest_sdk::native::{TestTable, Value, Type};
//! use guest_sdk::prelude::*;
//!
//! #[derive(Row)]
//! struct Flight<'a> {
//!     dep_delay: Column<'a, Number>,
//! }
//!
//! #[filter]
//! fn late(row: &Flight) -> bool {
//!     row.dep_delay.get().is_some_and(|minutes| minutes >= 15)
//! }
//!
//! let flights = TestTable::new::<Flight>(&[("dep_delay", Type::Int)]).unwrap();
//! assert!(flights.row(&[Value::Int(20)]).read(|row| late(&Flight::from_row(row))));
//! assert!(!flights.row(&[Value::Null]).read(|row| late(&Flight::from_row(row))));
//! ```

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use wire::abi::{CHANGE_DESCRIPTOR_BYTES, ChangeDescriptor, DESCRIPTOR_BYTES, Descriptor, Read};
use wire::frame::changed_columns;
use wire::{ColumnDecl, ImageBuilder, ImageRef, Kind, Schema};

pub use wire::{Type, Value};

use crate::change::{Op, RawChange};
use crate::output::Output;
use crate::raw::Window;
use crate::row::{FromRow, Input, Row, read_of};

/// A table's columns, with those that a row struct reads found in them, as the host finds them.
#[derive(Debug)]
pub struct TestTable {
    input: Input,
}

impl TestTable {
    /// A table of these columns, all nullable; an error says which column of `T` does not fit.
    pub fn new<'a, T: FromRow<'a>>(columns: &[(&str, Type)]) -> Result<Self, String> {
        let declare = |(id, (name, ty)): (usize, &(&str, Type))| ColumnDecl {
            id: id as u16,
            name: (*name).to_string(),
            ty: *ty,
            nullable: true,
            key: false,
        };
        let schema = Schema { columns: columns.iter().enumerate().map(declare).collect() };
        let mut reads = Vec::new();
        for spec in T::COLUMNS {
            let missing = Read { column: Read::MISSING, kind: 0, scale: 0 };
            let read = schema.column(spec.name).map_or(missing, |column| read_of(column.id, column.ty));
            spec.check(read)?;
            reads.push(read);
        }
        Ok(TestTable { input: Input { reads, schema } })
    }

    /// A row of values, in the table's order.
    ///
    /// # Panics
    ///
    /// When there are more values than columns, or a value has not its column's kind.
    pub fn row(&self, values: &[Value]) -> TestRow<'_> {
        let mut bytes = alloc::vec![0; DESCRIPTOR_BYTES];
        let descriptor = self.image(values, &mut bytes);
        bytes[..DESCRIPTOR_BYTES].copy_from_slice(&descriptor.to_bytes());
        TestRow { bytes, table: self }
    }

    /// A change of a row: without `old` an insert, without `new` a delete.
    ///
    /// # Panics
    ///
    /// As [`row`](Self::row), and when there is neither.
    pub fn change(&self, old: Option<&[Value]>, new: Option<&[Value]>) -> TestChange<'_> {
        let op = match (old, new) {
            (None, Some(_)) => Op::Insert,
            (Some(_), Some(_)) => Op::Update,
            (Some(_), None) => Op::Delete,
            (None, None) => panic!("a change has a row"),
        };
        let mut bytes = alloc::vec![0; CHANGE_DESCRIPTOR_BYTES];
        let mut images = Vec::new();
        let [old, new] = [old, new].map(|values| {
            let at = bytes.len();
            let descriptor = values.map(|values| self.image(values, &mut bytes));
            images.push(bytes[at..].to_vec());
            descriptor
        });
        let image = |i: usize| ImageRef::parse(&images[i]).ok().map(|(image, ..)| image);
        let mut kinds = alloc::vec![Kind::Int; usize::from(self.input.schema.slots())];
        for column in &self.input.schema.columns {
            kinds[usize::from(column.id)] = column.ty.kind();
        }
        let changed = changed_columns(&kinds, image(0), image(1));
        let descriptor = ChangeDescriptor {
            op: op as u32,
            changed: bytes.len() as u32,
            columns: kinds.len() as u32,
            old: old.unwrap_or_default(),
            new: new.unwrap_or_default(),
        };
        bytes.extend_from_slice(&changed);
        bytes[..CHANGE_DESCRIPTOR_BYTES].copy_from_slice(&descriptor.to_bytes());
        TestChange { bytes, table: self }
    }

    fn image(&self, values: &[Value], bytes: &mut Vec<u8>) -> Descriptor {
        let columns = &self.input.schema.columns;
        assert!(values.len() <= columns.len(), "{} values for {} columns", values.len(), columns.len());
        let mut image = ImageBuilder::new(columns.len() as u16);
        for (column, value) in columns.iter().zip(values) {
            assert!(fits(value, column.ty), "{value:?} in column `{}`, which is {:?}", column.name, column.ty);
            image.set(column.id, value);
        }
        let base = bytes.len() as u32;
        Descriptor::new(image.finish_into(bytes), base)
    }
}

fn fits(value: &Value, ty: Type) -> bool {
    let kind = match value {
        Value::Null => return true,
        Value::Bool(_) => Kind::Bool,
        Value::Int(_) => Kind::Int,
        Value::Float(_) => Kind::Float,
        Value::Decimal(_) => Kind::Decimal,
        Value::Text(_) => Kind::Text,
        Value::Bytes(_) => Kind::Bytes,
        Value::Uuid(_) => Kind::Uuid,
    };
    kind == ty.kind()
}

/// One row of a [`TestTable`].
#[derive(Debug)]
pub struct TestRow<'t> {
    bytes: Vec<u8>,
    table: &'t TestTable,
}

impl TestRow<'_> {
    /// Lends the row to `read`, as a batch would.
    pub fn read<R>(&self, read: impl for<'a> FnOnce(&'a Row<'a>) -> R) -> R {
        read(&Row::at(Window::over(&self.bytes), 0, &self.table.input))
    }
}

/// One change of a row of a [`TestTable`].
#[derive(Debug)]
pub struct TestChange<'t> {
    bytes: Vec<u8>,
    table: &'t TestTable,
}

impl TestChange<'_> {
    /// Lends the change to `read`, as a batch would: `change.read(|raw| worse(&raw.read()))`.
    pub fn read<R>(&self, read: impl for<'a> FnOnce(&'a RawChange<'a>) -> R) -> R {
        read(&RawChange::at(Window::over(&self.bytes), 0, &self.table.input))
    }
}

/// The values of an output row, through the image that the host would get.
pub fn values<T: Output>(output: &T) -> Vec<Value> {
    let mut image = ImageBuilder::new(T::COLUMNS.len() as u16);
    output.write(&mut image);
    let bytes = image.finish();
    let (image, ..) = ImageRef::parse(&bytes).expect("an image just built");
    let value =
        |(id, (_, ty, _)): (usize, &(&str, Type, bool))| image.value(id as u16, *ty).expect("an image just built");
    T::COLUMNS.iter().enumerate().map(value).collect()
}
