//! db::subscribe
