//! http::json
