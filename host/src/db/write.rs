//! db::write
