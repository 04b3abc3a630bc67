//! Keeps the updates that make a departure later by so many minutes: a question about both rows of a change.

use guest_sdk::prelude::*;

#[derive(Params)]
pub struct Worse {
    /// By how many minutes the delay has to rise.
    #[param(default = 5)]
    pub minutes: i64,
}

#[derive(Row)]
pub struct Flight<'a> {
    pub dep_delay: Column<'a, Number>,
}

/// Keeps changes by which a delay rose by a number of minutes.
#[filter]
pub fn worse(params: &Worse, change: &Change<Flight>) -> bool {
    let (Some(old), Some(new)) = (change.old(), change.new()) else { return false };
    if !change.changed(&new.dep_delay) {
        return false;
    }
    let minutes = |flight: &Flight| flight.dep_delay.get().map_or(0.0, Number::to_f64);
    minutes(new) - minutes(old) >= params.minutes as f64
}
