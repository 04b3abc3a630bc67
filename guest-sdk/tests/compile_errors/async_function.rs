use guest_sdk::prelude::*;

#[derive(Row)]
pub struct Flight<'a> {
    pub delay: Column<'a, Number>,
}

#[filter]
pub async fn late(flight: &Flight) -> bool { //~ cannot be async
    flight.delay.is_null()
}
