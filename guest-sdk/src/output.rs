//! What a transform answers: rows with columns of its own, written as images behind their descriptors.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Display;

use wire::abi::{DESCRIPTOR_BYTES, Descriptor};
use wire::{ColumnDecl, ImageBuilder, Schema, Type};

use crate::row::{Date, Time, Timestamp, Uuid};

/// A transform's output row. Derive it on a struct of values:
///
/// ```
/// use guest_sdk::prelude::*;
///
/// #[derive(Output)]
/// struct Local<'a> {
///     carrier: Option<&'a str>,
///     km: f64,
/// }
/// ```
///
/// Each field is a value that a column can hold:
///
/// ```compile_fail,E0277
/// use guest_sdk::prelude::*;
///
/// #[derive(Output)]
/// struct Local {
///     km: u64,
/// }
/// ```
pub trait Output {
    /// Name, type and nullability of each column; ids are positions.
    const COLUMNS: &'static [(&'static str, Type, bool)];
    fn write(&self, image: &mut ImageBuilder);
}

/// The columns of an output as the host gets them.
pub(crate) fn schema(columns: &[(&str, Type, bool)]) -> Schema {
    let declare = |(id, (name, ty, nullable)): (usize, &(&str, Type, bool))| ColumnDecl {
        id: id as u16,
        name: name.to_string(),
        ty: *ty,
        nullable: *nullable,
        key: false,
    };
    Schema { columns: columns.iter().enumerate().map(declare).collect() }
}

/// A value that an output column can hold.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an output column's value",
    label = "not an output column's value",
    note = "output columns are bool, i16, i32, i64, f32, f64, &str, String, &[u8], Vec<u8>, Uuid, Date, Time, Timestamp, \
            and Options of them"
)]
pub trait OutputValue {
    const TYPE: Type;
    const NULLABLE: bool = false;
    fn write(&self, image: &mut ImageBuilder, column: u16);
}

macro_rules! output_values {
    ($($ty:ty: $column:ident, $set:ident, $value:expr;)*) => {$(
        impl OutputValue for $ty {
            const TYPE: Type = Type::$column;
            #[inline]
            fn write(&self, image: &mut ImageBuilder, column: u16) {
                image.$set(column, $value(self));
            }
        }
    )*};
}

output_values! {
    bool: Boolean, set_bool, |value: &bool| *value;
    i16: SmallInt, set_int, |value: &i16| i64::from(*value);
    i32: Int, set_int, |value: &i32| i64::from(*value);
    i64: BigInt, set_int, |value: &i64| *value;
    f32: Real, set_float, |value: &f32| f64::from(*value);
    f64: Double, set_float, |value: &f64| *value;
    &str: Text, set_bytes, str::as_bytes;
    String: Text, set_bytes, String::as_bytes;
    &[u8]: Bytea, set_bytes, |value| value;
    Vec<u8>: Bytea, set_bytes, Vec::as_slice;
    Uuid: Uuid, set_bytes, Uuid::as_bytes;
    Date: Date, set_int, |value: &Date| i64::from(value.0);
    Time: Time, set_int, |value: &Time| value.0;
    Timestamp: Timestamp, set_int, |value: &Timestamp| value.0;
}

impl<T: OutputValue> OutputValue for Option<T> {
    const TYPE: Type = T::TYPE;
    const NULLABLE: bool = true;

    #[inline]
    fn write(&self, image: &mut ImageBuilder, column: u16) {
        if let Some(value) = self {
            value.write(image, column);
        }
    }
}

/// What a transform may return: its output, or a `Result` of it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a transform's answer",
    label = "not a transform's answer",
    note = "return a struct with `#[derive(Output)]`, or `Result` of it and an error that can be displayed"
)]
pub trait Transformed {
    const COLUMNS: &'static [(&'static str, Type, bool)];
    fn write(self, image: &mut ImageBuilder) -> Result<(), String>;
}

impl<T: Output> Transformed for T {
    const COLUMNS: &'static [(&'static str, Type, bool)] = T::COLUMNS;

    #[inline]
    fn write(self, image: &mut ImageBuilder) -> Result<(), String> {
        Output::write(&self, image);
        Ok(())
    }
}

impl<T: Output, E: Display> Transformed for Result<T, E> {
    const COLUMNS: &'static [(&'static str, Type, bool)] = T::COLUMNS;

    #[inline]
    fn write(self, image: &mut ImageBuilder) -> Result<(), String> {
        match self {
            Ok(output) => {
                Output::write(&output, image);
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Takes each output row, as what fills its image.
pub type EachRow<'r> = &'r mut dyn FnMut(&dyn Fn(&mut ImageBuilder));

/// What a change transform may return: any number of outputs (`Option`, `Vec`, an array), one, or a `Result` of these.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a change transform's answer",
    label = "not a change transform's answer",
    note = "return a struct with `#[derive(Output)]`, `Option`, `Vec` or an array of it, or `Result` of these and an error \
            that can be displayed"
)]
pub trait Expanded {
    const COLUMNS: &'static [(&'static str, Type, bool)];
    /// Hands each output to `row`.
    fn each(self, row: EachRow<'_>) -> Result<(), String>;
}

impl<T: Output> Expanded for T {
    const COLUMNS: &'static [(&'static str, Type, bool)] = T::COLUMNS;

    #[inline]
    fn each(self, row: EachRow<'_>) -> Result<(), String> {
        row(&|image| Output::write(&self, image));
        Ok(())
    }
}

macro_rules! expanded_collections {
    ($($(const $n:ident)? $ty:ty),*) => {$(
        impl<T: Output $(, const $n: usize)?> Expanded for $ty {
            const COLUMNS: &'static [(&'static str, Type, bool)] = T::COLUMNS;

            #[inline]
            fn each(self, row: EachRow<'_>) -> Result<(), String> {
                self.into_iter().for_each(|output| row(&|image| Output::write(&output, image)));
                Ok(())
            }
        }
    )*};
}

expanded_collections!(Option<T>, Vec<T>, const N [T; N]);

impl<T: Expanded, E: Display> Expanded for Result<T, E> {
    const COLUMNS: &'static [(&'static str, Type, bool)] = T::COLUMNS;

    #[inline]
    fn each(self, row: EachRow<'_>) -> Result<(), String> {
        self.map_err(|error| error.to_string())?.each(row)
    }
}

/// What a filter may return: `bool`, or a `Result` of it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a filter's answer",
    label = "not a filter's answer",
    note = "return `bool`, or `Result<bool, E>` with an error that can be displayed"
)]
pub trait Verdict {
    fn verdict(self) -> Result<bool, String>;
}

impl Verdict for bool {
    #[inline]
    fn verdict(self) -> Result<bool, String> {
        Ok(self)
    }
}

impl<E: Display> Verdict for Result<bool, E> {
    #[inline]
    fn verdict(self) -> Result<bool, String> {
        self.map_err(|error| error.to_string())
    }
}

/// The output of one batch of changes: how many rows each became, a descriptor a row, then the images. Its memory is
/// reused from call to call.
#[derive(Debug)]
pub(crate) struct Expansion {
    pub(crate) bytes: Vec<u8>,
    descriptors: Vec<Descriptor>,
    images: Vec<u8>,
    image: ImageBuilder,
}

impl Expansion {
    pub(crate) fn new(columns: u16) -> Self {
        Expansion { bytes: Vec::new(), descriptors: Vec::new(), images: Vec::new(), image: ImageBuilder::new(columns) }
    }

    pub(crate) fn begin(&mut self) {
        self.bytes.clear();
        self.descriptors.clear();
        self.images.clear();
    }

    /// Writes the rows of the next change. One that fails becomes no rows.
    pub(crate) fn change(&mut self, write: impl FnOnce(EachRow<'_>) -> Result<(), String>) -> Result<(), String> {
        let before = (self.descriptors.len(), self.images.len());
        let Expansion { descriptors, images, image, .. } = self;
        let result = write(&mut |fill| {
            image.clear();
            fill(image);
            let base = images.len() as u32;
            descriptors.push(Descriptor::new(image.finish_into(images), base));
        });
        if result.is_err() {
            self.descriptors.truncate(before.0);
            self.images.truncate(before.1);
        }
        let count = (self.descriptors.len() - before.0) as u32;
        self.bytes.extend_from_slice(&count.to_le_bytes());
        result
    }

    /// Puts the parts behind one another.
    pub(crate) fn end(&mut self) {
        let images_at = (self.bytes.len() + self.descriptors.len() * DESCRIPTOR_BYTES) as u32;
        for at in &self.descriptors {
            let moved = Descriptor {
                present: at.present + images_at,
                slots: at.slots + images_at,
                heap: at.heap + images_at,
                columns: at.columns,
            };
            self.bytes.extend_from_slice(&moved.to_bytes());
        }
        self.bytes.extend_from_slice(&self.images);
    }
}

/// The output of one batch: a descriptor a row, then the images. Its memory is reused from call to call.
#[derive(Debug)]
pub(crate) struct Rows {
    pub(crate) bytes: Vec<u8>,
    image: ImageBuilder,
}

impl Rows {
    pub(crate) fn new(columns: u16) -> Self {
        Rows { bytes: Vec::new(), image: ImageBuilder::new(columns) }
    }

    /// Starts a batch of `n` rows.
    pub(crate) fn begin(&mut self, n: usize) {
        self.bytes.clear();
        self.bytes.resize(n * DESCRIPTOR_BYTES, 0);
    }

    /// Writes row `i`. A row that fails is written as all NULL, so that every descriptor names an image.
    pub(crate) fn row(
        &mut self,
        i: usize,
        write: impl FnOnce(&mut ImageBuilder) -> Result<(), String>,
    ) -> Result<(), String> {
        self.image.clear();
        let result = write(&mut self.image);
        if result.is_err() {
            self.image.clear();
        }
        let base = self.bytes.len();
        let at = self.image.finish_into(&mut self.bytes);
        let descriptor = Descriptor::new(at, base as u32).to_bytes();
        self.bytes[i * DESCRIPTOR_BYTES..(i + 1) * DESCRIPTOR_BYTES].copy_from_slice(&descriptor);
        result
    }
}
