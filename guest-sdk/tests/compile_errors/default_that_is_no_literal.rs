use guest_sdk::prelude::*;

#[derive(Params)]
pub struct Late {
    #[param(default = 10 + 5)] //~ a default is a literal
    pub minutes: i64,
}
