//! http::error
