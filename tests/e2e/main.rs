//! End to end: a real server process, spoken to over HTTP. One test program; a module for each part.

mod auth;
mod differential;
mod durability;
mod formats;
mod live;
mod load;
mod ops;
mod oracle;
mod plugins;
mod session_sharing_isolation;
mod slt;
mod smoke;
mod sql;
mod tidy;
