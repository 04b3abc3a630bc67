//! http::auth
