//! hyper under axum: routes, JSON, SSE framing, identity, errors to status.
//!
//! - [`server`]: connections. [`stall`] cuts those whose client stops reading. [`socket`]: what they write to.
//! - [`routes`]: which call does what; [`plugins`] are the calls about plugins.
//! - [`auth`], [`tickets`] (kept by [`keeper`]): who asks. [`request`], [`body`]: what they ask for. [`rows`]: rows in many.
//! - [`json`], [`csv`], [`results`]: rows out. [`sse`], [`stream`], [`several`]: live events. [`error`]: problems;
//!   [`denials`]: those that the audit log hears of.
//! - [`limits`]: how many live queries one user and one address may have.
//! - [`client`]: the other side, for the command line.

pub mod auth;
pub mod body;
pub mod client;
pub mod csv;
pub mod denials;
pub mod error;
pub mod json;
pub mod keeper;
pub mod limits;
pub mod plugins;
pub mod request;
pub mod results;
pub mod routes;
pub mod rows;
pub mod server;
pub mod several;
pub mod socket;
pub mod sse;
pub mod stall;
pub mod stream;
pub mod tickets;
