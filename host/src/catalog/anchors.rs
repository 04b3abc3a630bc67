//! What a row has to be like for a live query to concern it, said by single columns. `sql` finds it in a predicate, the
//! index of `live` is made of it.

use wire::Value;

/// Which rows a predicate can match at all. More rows may be let through than match, never fewer.
#[derive(Clone, Debug, PartialEq)]
pub enum Anchors {
    /// Any row may match.
    Any,
    /// A row that matches fits one of these at least; none: nothing matches.
    OneOf(Vec<Anchor>),
}

/// A condition on one column.
#[derive(Clone, Debug, PartialEq)]
pub struct Anchor {
    pub column: u16,
    pub holds: Holds,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Holds {
    /// This value; NULL: no value.
    Value(Value),
    /// Both ends included.
    Range { least: Option<Value>, most: Option<Value> },
    /// Text that starts so.
    Prefix(String),
}
