//! Flights for people who think in kilometres: distance converted, the delay also as a word.

use guest_sdk::prelude::*;

const KM_PER_MILE: f64 = 1.609_344;

#[derive(Params)]
pub struct LocalUnits {
    /// From how many minutes on a departure is late.
    #[param(default = 15)]
    pub late_from: i64,
    /// From how many minutes on it is very late.
    #[param(default = 60)]
    pub very_late_from: i64,
}

#[derive(Row)]
pub struct Flight<'a> {
    pub carrier: Column<'a, &'a str>,
    pub flight: Column<'a, i64>,
    pub origin: Column<'a, &'a str>,
    pub dest: Column<'a, &'a str>,
    /// Miles.
    pub distance: Column<'a, Number>,
    /// Minutes; NULL until the departure.
    pub dep_delay: Column<'a, Number>,
}

#[derive(Output, Debug, PartialEq)]
pub struct Local<'a> {
    pub carrier: Option<&'a str>,
    pub flight: Option<i64>,
    pub origin: Option<&'a str>,
    pub dest: Option<&'a str>,
    pub km: Option<f64>,
    pub delay_class: &'static str,
    pub dep_delay_minutes: Option<f64>,
}

/// Flights with kilometres and a word for the delay.
#[transform]
pub fn local_units<'a>(params: &LocalUnits, flight: &Flight<'a>) -> Local<'a> {
    let delay = flight.dep_delay.get();
    Local {
        carrier: flight.carrier.get(),
        flight: flight.flight.get(),
        origin: flight.origin.get(),
        dest: flight.dest.get(),
        km: flight.distance.get().map(|miles| round_to_tenths(miles.to_f64() * KM_PER_MILE)),
        delay_class: delay_class(params, delay),
        dep_delay_minutes: delay.map(Number::to_f64),
    }
}

fn delay_class(params: &LocalUnits, delay: Option<Number>) -> &'static str {
    match delay {
        None => "unknown",
        Some(delay) if delay >= params.very_late_from => "very late",
        Some(delay) if delay >= params.late_from => "late",
        Some(_) => "on time",
    }
}

fn round_to_tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}
