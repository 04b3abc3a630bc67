//! Parameters: what a live query gives its plugin once, at configure. They are copied out of the window, so a plugin
//! holds them like any struct of its own.

use alloc::string::{String, ToString};

use wire::abi::Read;
use wire::value::Kind;

use crate::row::{Cell, Input, Row};

/// A plugin's parameters. Derive it on a struct of `bool`, `i64`, `f64`, `String` and `Option`s of them:
///
/// ```
/// use guest_sdk::prelude::*;
///
/// #[derive(Params)]
/// struct Late {
///     /// From how many minutes on a departure is late.
///     #[param(default = 15)]
///     minutes: i64,
///     /// Only this carrier.
///     carrier: Option<String>,
/// }
/// ```
///
/// A parameter without a default is required; an `Option` without one is NULL. A default has its parameter's type:
///
/// ```compile_fail,E0308
/// use guest_sdk::prelude::*;
///
/// #[derive(Params)]
/// struct Late {
///     #[param(default = "15")]
///     minutes: i64,
/// }
/// ```
///
/// and a parameter one of the types above:
///
/// ```compile_fail,E0277
/// use guest_sdk::prelude::*;
///
/// #[derive(Params)]
/// struct Late {
///     minutes: u8,
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a plugin's parameters",
    label = "not parameters",
    note = "take a reference to a struct with `#[derive(Params)]`, or leave the argument out"
)]
pub trait Params: Sized + 'static {
    /// The parameters, as parts of manifest lines.
    const MANIFEST: &'static [&'static str];
    fn from_values(values: &ParamValues<'_>) -> Result<Self, String>;
}

impl Params for () {
    const MANIFEST: &'static [&'static str] = &[];

    fn from_values(_: &ParamValues<'_>) -> Result<Self, String> {
        Ok(())
    }
}

/// The image of the parameters: column i is the i-th `param` line of the manifest.
pub struct ParamValues<'a>(Row<'a>);

impl<'a> ParamValues<'a> {
    /// Runs `read` over the parameters whose descriptor lies at `descriptor`.
    pub(crate) fn read<P: Params>(window: crate::raw::Window<'_>, descriptor: u32) -> Result<P, String> {
        let input = Input::default();
        P::from_values(&ParamValues(Row::at(window, descriptor, &input)))
    }

    /// Parameter `index`, called `name`.
    pub fn get<T: ParamValue>(&self, index: u16, name: &str) -> Result<T, String> {
        let cell = self.0.cell(Read::new(index, T::KIND, 0));
        T::read(&cell).ok_or_else(|| "parameter `".to_string() + name + "` is required")
    }
}

/// A type that a parameter can have.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a parameter's type",
    label = "not a parameter's type",
    note = "parameters are bool, i64, f64, String, and Options of them"
)]
pub trait ParamValue: Sized {
    /// Its name in the manifest.
    const TYPE: &'static str;
    const KIND: Kind;
    /// What the manifest says of a parameter that names no default itself.
    const NO_DEFAULT: &'static str = "";
    /// What a default is written as.
    type Literal;
    fn read(cell: &Cell<'_>) -> Option<Self>;
}

macro_rules! param_values {
    ($($ty:ty: $name:literal, $kind:ident, $literal:ty, $read:expr;)*) => {$(
        impl ParamValue for $ty {
            const TYPE: &'static str = $name;
            const KIND: Kind = Kind::$kind;
            type Literal = $literal;
            fn read(cell: &Cell<'_>) -> Option<Self> {
                $read(cell)
            }
        }
    )*};
}

param_values! {
    bool: "bool", Bool, bool, Cell::bool;
    i64: "int", Int, i64, Cell::int;
    f64: "float", Float, f64, Cell::float;
    String: "text", Text, &'static str, |cell: &Cell<'_>| cell.text().map(String::from);
}

impl<T: ParamValue> ParamValue for Option<T> {
    const TYPE: &'static str = T::TYPE;
    const KIND: Kind = T::KIND;
    const NO_DEFAULT: &'static str = ",\"default\":\"null\"";
    type Literal = T::Literal;

    fn read(cell: &Cell<'_>) -> Option<Self> {
        Some(T::read(cell))
    }
}
