//! End to end: a real server process, spoken to over HTTP. One test program; a module for each part.

mod auth;
mod durability;
mod live;
mod ops;
mod oracle;
mod plugins;
mod requery;
mod sql;
mod streams;
mod tidy;
