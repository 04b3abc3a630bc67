//! End to end: a real server process, spoken to over HTTP. One test program; a module for each part.

mod auth;
mod durability;
mod idempotency;
mod live;
mod ops;
mod oracle;
mod plugins;
mod requery;
mod schema;
mod sql;
mod stream;
mod streams;
mod tidy;
