//! Makes a row of every threshold that a delay crosses at one change: none, one or several.

use guest_sdk::prelude::*;

/// Minutes at which somebody wants to know.
const THRESHOLDS: [i64; 3] = [15, 60, 180];

#[derive(Row)]
pub struct Flight<'a> {
    pub carrier: Column<'a, &'a str>,
    pub flight: Column<'a, i64>,
    pub dep_delay: Column<'a, Number>,
}

#[derive(Output, Debug, PartialEq)]
pub struct Crossing<'a> {
    pub carrier: Option<&'a str>,
    pub flight: Option<i64>,
    pub minutes: i64,
    /// `true`: the flight is now later than that; `false`: it is no longer.
    pub over: bool,
}

/// The thresholds (15, 60, 180 minutes) that a departure's delay crossed.
#[transform]
pub fn crossings<'a>(change: &Change<'_, Flight<'a>>) -> Vec<Crossing<'a>> {
    let over = |flight: Option<&Flight>, minutes: i64| {
        flight.and_then(|flight| flight.dep_delay.get()).is_some_and(|delay| delay >= minutes)
    };
    let Some(flight) = change.new().or(change.old()) else { return Vec::new() };
    let crossed = THRESHOLDS.into_iter().filter(|minutes| over(change.old(), *minutes) != over(change.new(), *minutes));
    crossed
        .map(|minutes| Crossing {
            carrier: flight.carrier.get(),
            flight: flight.flight.get(),
            minutes,
            over: over(change.new(), minutes),
        })
        .collect()
}
