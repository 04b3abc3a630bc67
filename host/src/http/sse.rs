//! http::sse
