//! Keeps the rows that are late: whose `dep_delay` is at least so many minutes. NULL (not departed yet) is not late.

use guest_sdk::prelude::*;

#[derive(Params)]
pub struct Late {
    /// From how many minutes on a departure is late.
    #[param(default = 15)]
    pub minutes: i64,
}

#[derive(Row)]
pub struct Flight<'a> {
    pub dep_delay: Column<'a, Number>,
}

/// Keeps departures that are late by a number of minutes.
#[filter]
pub fn late(params: &Late, flight: &Flight) -> bool {
    flight.dep_delay.get().is_some_and(|delay| delay >= params.minutes)
}
