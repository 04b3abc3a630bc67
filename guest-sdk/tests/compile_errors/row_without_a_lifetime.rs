use guest_sdk::prelude::*;

#[derive(Row)]
pub struct Flight { //~ a row borrows its columns
    pub delay: i64,
}
