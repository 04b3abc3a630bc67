//! Converting between host types and what a guest is given and answers (`wire::abi`): one checked view of guest memory.
