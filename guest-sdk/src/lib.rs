//! Write Tidegate plugins: the user's own code between a commit and its subscribers.
//!
//! A plugin is one function in a crate of its own, compiled to WebAssembly. `tidegate plugin new NAME` makes one with its
//! test, `tidegate plugin test NAME` runs that on the server's own engine, `tidegate plugin push NAME` uploads it.
//!
//! A **filter** says whether a row goes on:
//!
//! ```
//! use guest_sdk::prelude::*;
//!
//! #[derive(Params)]
//! struct Late {
//!     /// From how many minutes on a departure is late.
//!     #[param(default = 15)]
//!     minutes: i64,
//! }
//!
//! #[derive(Row)]
//! struct Flight<'a> {
//!     dep_delay: Column<'a, Number>,
//! }
//!
//! #[filter]
//! fn late(params: &Late, flight: &Flight) -> bool {
//!     flight.dep_delay.get().is_some_and(|delay| delay >= params.minutes)
//! }
//! ```
//!
//! A **transform** makes another row of it, with columns of its own; the row keeps its key:
//!
//! ```
//! use guest_sdk::prelude::*;
//!
//! #[derive(Row)]
//! struct Flight<'a> {
//!     carrier: Column<'a, &'a str>,
//!     distance: Column<'a, Number>,
//! }
//!
//! #[derive(Output)]
//! struct Metric<'a> {
//!     carrier: Option<&'a str>,
//!     km: f64,
//! }
//!
//! #[transform]
//! fn metric<'a>(flight: &Flight<'a>) -> Result<Metric<'a>, IsNull> {
//!     Ok(Metric { carrier: flight.carrier.get(), km: flight.distance.required()?.to_f64() * 1.609344 })
//! }
//! ```
//!
//! A plugin whose function takes a [`Change`](change::Change) sees what happened to a row: both images, and which
//! columns differ. A **change filter** says whether the change goes on, a **change transform** makes any number of rows of
//! it. Live queries with one of them are *feeds*: every output once, in order, and nothing to fold.
//!
//! ```
//! use guest_sdk::prelude::*;
//!
//! #[derive(Row)]
//! struct Flight<'a> {
//!     dest: Column<'a, &'a str>,
//! }
//!
//! #[derive(Output)]
//! struct Diverted {
//!     from: String,
//!     to: String,
//! }
//!
//! #[transform]
//! fn diverted(change: &Change<Flight>) -> Option<Diverted> {
//!     let (old, new) = (change.old()?, change.new()?);
//!     let airport = |flight: &Flight| flight.dest.get().unwrap_or("?").to_string();
//!     change.changed(&new.dest).then(|| Diverted { from: airport(old), to: airport(new) })
//! }
//! ```
//!
//! - Rows are read in place, out of the buffer that all instances share. [`Column`](row::Column)s are lazy: a column
//!   that is not asked for costs nothing, and a filter allocates nothing. [`Row`](row::Row) finds columns by name.
//! - A plugin is pure: its answer depends on parameters and row alone. The host drops and makes instances as it likes.
//! - An `Err` fails that row, with its message, and costs no instance. A panic costs the instance.
//! - [`info!`], [`warn!`], [`error!`] and [`debug!`] write to the host's log (`tidegate plugin logs -f NAME` shows what
//!   one plugin says), [`metric!`] adds to its counters.
//! - The function itself stays as it was written: [`native`] runs it in ordinary tests. The crate `testkit` runs the
//!   compiled module, as the server does.
//!
//! Without the default feature `std` the SDK needs `alloc` only; allocator and panic handler are then the plugin's.
//! `ABI.md` beside this crate describes the bytes, for other languages.

#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

pub mod change;
pub mod log;
#[doc(hidden)]
pub mod manifest;
#[cfg(not(target_arch = "wasm32"))]
pub mod native;
pub mod number;
pub mod output;
pub mod params;
#[doc(hidden)]
pub mod plugin;
#[doc(hidden)]
pub mod raw;
pub mod row;

/// Makes a function this crate's row filter: `fn(&Params, &Row) -> bool`, or `fn(&Row) -> bool`. With a
/// [`Change`](change::Change) of rows in the row's place it is a change filter.
///
/// `Params` derives [`Params`](params::Params); the row is [`row::Row`] or derives `Row`; the answer is `bool` or
/// `Result<bool, E>` with an error that can be displayed. `#[filter(pass = false)]` forbids live queries with
/// `on_error=pass`, which would let through what the filter fails on. Anything else is refused where it stands:
///
/// ```compile_fail,E0277
/// use guest_sdk::prelude::*;
///
/// #[filter]
/// fn late(row: &Row) -> u32 {
///     15
/// }
/// ```
///
/// ```compile_fail
/// use guest_sdk::prelude::*;
///
/// #[filter]
/// fn late(row: Row) -> bool {
///     true
/// }
/// ```
///
/// One crate is one plugin:
///
/// ```compile_fail,E0428
/// use guest_sdk::prelude::*;
///
/// #[filter]
/// fn late(row: &Row) -> bool {
///     true
/// }
///
/// #[filter]
/// fn early(row: &Row) -> bool {
///     true
/// }
/// # fn main() {}
/// ```
pub use macros::filter;

/// Makes a function this crate's row transform: `fn(&Params, &Row) -> Out`, or `fn(&Row) -> Out`.
///
/// As [`filter`](macro@filter), but the answer is a struct that derives [`Output`](output::Output), or a `Result` of
/// it. A change transform, `fn(&Params, &Change<Row>)`, may also answer an `Option`, a `Vec` or an array of outputs.
pub use macros::transform;

/// What a plugin needs.
pub mod prelude {
    pub use crate::change::{Change, Op};
    pub use crate::number::{Decimal, Number};
    pub use crate::output::Output;
    pub use crate::params::Params;
    pub use crate::row::{Cell, Column, Date, FromRow, IsNull, Row, Time, Timestamp, Uuid};
    pub use crate::{debug, error, filter, info, metric, transform, warn};
    pub use macros::{Output, Params, Row};
}

/// What the macros' code names.
#[doc(hidden)]
pub mod __private {
    pub use alloc::string::String;
    pub use core::result::Result;
    pub use wire::{ImageBuilder, Type};
}
