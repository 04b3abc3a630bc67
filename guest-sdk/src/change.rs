//! Changes as a plugin reads them: the row before and after, borrowed and lazy as every row, and which columns differ.
//!
//! Which rows are there is what the live query makes of the change: a row that its predicate does not match is no part of
//! it, so an update into the result is an insert here, and one out of it a delete.

use wire::abi::{CHANGE_DESCRIPTOR_BYTES, ChangeDescriptor, Read};

pub use wire::Op;

use crate::raw::Window;
use crate::row::{Column, FromRow, Input, Row};

/// One change of a row. `R` is how its rows are read: [`Row`], or a struct with `#[derive(Row)]`.
///
/// ```
/// use guest_sdk::prelude::*;
///
/// #[derive(Row)]
/// struct Flight<'a> {
///     dep_delay: Column<'a, Number>,
/// }
///
/// /// Updates that make a departure five minutes later, or more.
/// #[filter]
/// fn worse(change: &Change<Flight>) -> bool {
///     let (Some(old), Some(new)) = (change.old(), change.new()) else { return false };
///     let minutes = |flight: &Flight| flight.dep_delay.get().map_or(0.0, Number::to_f64);
///     change.changed(&new.dep_delay) && minutes(new) - minutes(old) >= 5.0
/// }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Change<'a, R = Row<'a>> {
    bits: Bits<'a>,
    op: Op,
    old: Option<R>,
    new: Option<R>,
}

impl<'a, R> Change<'a, R> {
    #[inline]
    pub fn op(&self) -> Op {
        self.op
    }

    /// The row as it was; `None` for an insert.
    #[inline]
    pub fn old(&self) -> Option<&R> {
        self.old.as_ref()
    }

    /// The row as it is; `None` for a delete.
    // A pair with `old`, and nothing that makes a `Change`.
    #[allow(clippy::new_ret_no_self)]
    #[inline]
    pub fn new(&self) -> Option<&R> {
        self.new.as_ref()
    }

    /// The row that there is: the new one, or of a delete the old one.
    #[inline]
    pub fn row(&self) -> &R {
        self.new.as_ref().or(self.old.as_ref()).expect("a change has a row")
    }

    /// Whether the column differs between old and new; take it of either. A missing row counts as NULLs.
    #[inline]
    pub fn changed<T>(&self, column: &Column<'_, T>) -> bool {
        self.bits.is_set(column.id())
    }

    /// The same by name; `false` when there is no such column.
    pub fn changed_named(&self, name: &str) -> bool {
        self.bits.input.schema.column(name).is_some_and(|column| self.bits.is_set(column.id))
    }
}

/// The bitmap of changed columns, where it lies.
#[derive(Clone, Copy, Debug)]
struct Bits<'a> {
    window: Window<'a>,
    at: u32,
    columns: u32,
    input: &'a Input,
}

impl Bits<'_> {
    #[inline]
    fn is_set(&self, column: u16) -> bool {
        let column = u32::from(column);
        if column == u32::from(Read::MISSING) || column >= self.columns {
            return false;
        }
        let [byte] = self.window.load(self.at.wrapping_add(column / 8));
        byte >> (column % 8) & 1 == 1
    }
}

/// A change whose rows are not read as anything yet.
#[derive(Clone, Copy, Debug)]
pub struct RawChange<'a> {
    bits: Bits<'a>,
    op: Op,
    old: Option<Row<'a>>,
    new: Option<Row<'a>>,
}

impl<'a> RawChange<'a> {
    /// The change whose descriptor lies at an offset of the window.
    #[inline]
    pub(crate) fn at(window: Window<'a>, descriptor: u32, input: &'a Input) -> Self {
        let at = ChangeDescriptor::from_bytes(window.load::<CHANGE_DESCRIPTOR_BYTES>(descriptor));
        let op = match at.op {
            1 => Op::Insert,
            2 => Op::Update,
            _ => Op::Delete,
        };
        let row = |there: bool, at| there.then(|| Row::described(window, at, input));
        RawChange {
            bits: Bits { window, at: at.changed, columns: at.columns, input },
            op,
            old: row(op != Op::Insert, at.old),
            new: row(op != Op::Delete, at.new),
        }
    }

    /// Its rows read as `R`.
    #[inline]
    pub fn read<R: FromRow<'a>>(&'a self) -> Change<'a, R> {
        Change {
            bits: self.bits,
            op: self.op,
            old: self.old.as_ref().map(R::from_row),
            new: self.new.as_ref().map(R::from_row),
        }
    }
}
