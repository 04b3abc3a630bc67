//! http::routes
