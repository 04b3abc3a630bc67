//! http::server
