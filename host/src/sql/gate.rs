//! The token gate before any parsing: bounds on length, nesting, chains; the allow-list of statements.
