//! The plugins `late` and `local_units` for Extism, for one row a call and for many.
//!
//! Made as fast as its SDK lets one without leaving it: the input is taken as bytes, which copies it once where a typed
//! argument copies it twice; postcard borrows text from it (with JSON, batches of short rows took two to three times as
//! long); the settings are parsed once.

mod rows;

use std::sync::OnceLock;

use extism_pdk::{FnResult, config, input_bytes, plugin_fn};
use rows::{Departure, Flight, Local};

const KM_PER_MILE: f64 = 1.609_344;

struct Settings {
    /// From how many minutes on a departure is late.
    late_from: f64,
    very_late_from: f64,
}

/// Whether the row is kept.
#[plugin_fn]
pub fn late() -> FnResult<bool> {
    let bytes = input_bytes();
    Ok(is_late(settings(), &postcard::from_bytes(&bytes)?))
}

/// Up to 64 rows; bit i of the answer says whether row i is kept.
#[plugin_fn]
pub fn late_batch() -> FnResult<u64> {
    let bytes = input_bytes();
    let rows: Vec<Departure> = postcard::from_bytes(&bytes)?;
    let settings = settings();
    Ok(rows.iter().enumerate().fold(0, |kept, (i, row)| kept | u64::from(is_late(settings, row)) << i))
}

/// A row for a row.
#[plugin_fn]
pub fn local_units() -> FnResult<Vec<u8>> {
    let bytes = input_bytes();
    let flight: Flight = postcard::from_bytes(&bytes)?;
    Ok(postcard::to_stdvec(&local(settings(), &flight))?)
}

/// Rows for rows.
#[plugin_fn]
pub fn local_units_batch() -> FnResult<Vec<u8>> {
    let bytes = input_bytes();
    let flights: Vec<Flight> = postcard::from_bytes(&bytes)?;
    let settings = settings();
    let made: Vec<_> = flights.iter().map(|flight| local(settings, flight)).collect();
    Ok(postcard::to_stdvec(&made)?)
}

fn is_late(settings: &Settings, row: &Departure) -> bool {
    row.dep_delay.is_some_and(|delay| delay >= settings.late_from)
}

fn local<'a>(settings: &Settings, flight: &Flight<'a>) -> Local<'a> {
    Local {
        carrier: flight.carrier,
        flight: flight.flight,
        origin: flight.origin,
        dest: flight.dest,
        km: flight.distance.map(|miles| (miles * KM_PER_MILE * 10.0).round() / 10.0),
        delay_class: delay_class(settings, flight.dep_delay),
        dep_delay_minutes: flight.dep_delay,
    }
}

fn delay_class(settings: &Settings, delay: Option<f64>) -> &'static str {
    match delay {
        None => "unknown",
        Some(delay) if delay >= settings.very_late_from => "very late",
        Some(delay) if delay >= settings.late_from => "late",
        Some(_) => "on time",
    }
}

/// Asked of the host once an instance.
fn settings() -> &'static Settings {
    static SETTINGS: OnceLock<Settings> = OnceLock::new();
    SETTINGS.get_or_init(|| {
        let setting = |name, default| {
            let text = config::get(name).ok().flatten();
            text.map_or(default, |text| text.parse().expect("minutes"))
        };
        Settings { late_from: setting("late_from", 15.0), very_late_from: setting("very_late_from", 60.0) }
    })
}
