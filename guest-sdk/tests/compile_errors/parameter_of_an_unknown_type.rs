use guest_sdk::prelude::*;

#[derive(Params)]
pub struct Late {
    pub minutes: std::time::Duration, //~ ParamValue
}
