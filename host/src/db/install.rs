//! db::install
