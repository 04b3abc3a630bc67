//! hyper under axum: routes, JSON, SSE framing, identity, errors to status.

pub mod auth;
pub mod error;
pub mod json;
pub mod routes;
pub mod server;
pub mod sse;
