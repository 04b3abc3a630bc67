use guest_sdk::prelude::*;

#[derive(Row)]
pub struct Flight<'a> {
    pub delay: Column<'a, i64>,
}

#[filter]
pub fn late(flight: &Flight) -> i64 { //~ i64
    flight.delay.get().unwrap_or(0)
}
