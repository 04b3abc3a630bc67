//! What crosses, as postcard: rows of the same columns and values as `host/benches/plugins.rs` has. The guest declares
//! this module, the program beside it takes the same file.

use serde::{Deserialize, Serialize};

/// A row of `late`'s table.
#[derive(Serialize, Deserialize)]
pub struct Departure<'a> {
    pub id: Option<i64>,
    pub dep_delay: Option<f64>,
    pub pad: Option<&'a str>,
}

/// A row of `local_units`'s table.
#[derive(Serialize, Deserialize)]
pub struct Flight<'a> {
    pub id: Option<i64>,
    pub carrier: Option<&'a str>,
    pub flight: Option<i64>,
    pub origin: Option<&'a str>,
    pub dest: Option<&'a str>,
    pub distance: Option<f64>,
    pub dep_delay: Option<f64>,
    pub pad: Option<&'a str>,
}

/// What `local_units` makes of it.
#[derive(Serialize, Deserialize, Debug, PartialEq)]
pub struct Local<'a> {
    pub carrier: Option<&'a str>,
    pub flight: Option<i64>,
    pub origin: Option<&'a str>,
    pub dest: Option<&'a str>,
    pub km: Option<f64>,
    pub delay_class: &'a str,
    pub dep_delay_minutes: Option<f64>,
}
