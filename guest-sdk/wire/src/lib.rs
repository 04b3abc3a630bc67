//! The contract between the Tidegate host and its plugins, and the bytes of the change log.
//!
//! Read in this order:
//!
//! - [`value`]: column types, values, and the schema messages that name them.
//! - [`image`]: one row as bytes: a presence bitmap, one 8-byte slot a column, a heap. Stored rows, rows in a
//!   frame, plugin parameters and plugin outputs are all images.
//! - [`frame`]: one commit as one postcard message, made of images, with offsets so that any column is one load away.
//! - [`abi`]: what host and guest say to each other: exports, imports, descriptors, manifest.
//!
//! No I/O, no allocation on any reading path, no dependency but serde and postcard. Everything here is pinned by
//! tests on the bytes: changing a layout is a new ABI or a new log format.

#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

pub mod abi;
pub mod frame;
pub mod image;
pub mod value;

pub use frame::{CatalogEvent, ChangeAt, ChangeView, Frame, FrameBuilder, FrameError, FrameView, Op, Scope};
pub use image::{ImageBuilder, ImageError, ImageRef};
pub use value::{ColumnDecl, Kind, Schema, Type, Value};
