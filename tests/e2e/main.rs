//! End to end: a real server process, spoken to over HTTP. One test program; a module for each part.

mod auth;
mod command_line;
mod differential;
mod dml;
mod durability;
mod failures;
mod feeds;
mod formats;
mod idempotency;
mod live;
mod load;
mod ops;
mod oracle;
mod overload;
mod plugin_users;
mod plugins;
mod requery;
mod schema;
mod session_sharing_isolation;
mod slt;
mod smoke;
mod sql;
mod stream;
mod streams;
mod tidy;
mod uploads;
