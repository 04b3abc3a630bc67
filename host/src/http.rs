//! hyper under axum: routes, JSON, SSE framing, identity, errors to status.
//!
//! - [`server`]: connections. [`stall`] cuts those whose client stops reading.
//! - [`routes`]: which call does what; [`plugins`] are the calls about plugins.
//! - [`auth`], [`tickets`]: who asks. [`request`], [`body`]: what they ask for.
//! - [`json`], [`results`]: rows as JSON. [`sse`], [`stream`]: live events. [`error`]: problems.
//! - [`client`]: the other side, for the command line.

pub mod auth;
pub mod body;
pub mod client;
pub mod error;
pub mod json;
pub mod plugins;
pub mod request;
pub mod results;
pub mod routes;
pub mod server;
pub mod sse;
pub mod stall;
pub mod stream;
pub mod tickets;
