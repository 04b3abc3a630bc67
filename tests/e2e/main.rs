//! End to end: a real server process, spoken to over HTTP. One test program; a module for each part.

mod auth;
mod command_line;
mod durability;
mod failures;
mod feeds;
mod idempotency;
mod live;
mod ops;
mod oracle;
mod plugin_users;
mod plugins;
mod schema;
mod sql;
mod stream;
mod tidy;
mod uploads;
