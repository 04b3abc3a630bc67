use guest_sdk::prelude::*;

#[derive(Params)]
pub struct Late {
    #[param(default = "many")] //~ mismatched types
    pub minutes: i64,
}
