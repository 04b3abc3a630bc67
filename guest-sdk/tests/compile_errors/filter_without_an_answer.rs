use guest_sdk::prelude::*;

#[derive(Row)]
pub struct Flight<'a> {
    pub delay: Column<'a, i64>,
}

#[filter]
pub fn late(flight: &Flight) { //~ a filter answers `bool`
    let _ = flight;
}
