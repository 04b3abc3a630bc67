use guest_sdk::prelude::*;

#[derive(Row)]
pub struct Flight<'a> {
    pub delay: Column<'a, i64>,
    #[column(name = "delay")]
    pub late: Column<'a, i64>, //~ another field reads column `delay` already
}
