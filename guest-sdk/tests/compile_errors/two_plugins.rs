use guest_sdk::prelude::*;

#[derive(Row)]
pub struct Flight<'a> {
    pub delay: Column<'a, i64>,
}

#[filter]
pub fn late(flight: &Flight) -> bool {
    flight.delay.get() > Some(15)
}

#[filter] //~ __TidegatePlugin
pub fn early(flight: &Flight) -> bool {
    flight.delay.get() < Some(0)
}
