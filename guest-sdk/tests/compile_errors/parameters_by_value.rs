use guest_sdk::prelude::*;

#[derive(Params)]
pub struct Late {
    pub minutes: i64,
}

#[derive(Row)]
pub struct Flight<'a> {
    pub delay: Column<'a, i64>,
}

#[filter]
pub fn late(params: Late, flight: &Flight) -> bool { //~ a plugin borrows its arguments
    flight.delay.get() > Some(params.minutes)
}
