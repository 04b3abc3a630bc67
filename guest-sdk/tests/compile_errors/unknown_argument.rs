use guest_sdk::prelude::*;

#[derive(Row)]
pub struct Flight<'a> {
    pub delay: Column<'a, i64>,
}

#[filter(fail = true)] //~ only `pass = false`
pub fn late(flight: &Flight) -> bool {
    flight.delay.get() > Some(15)
}
