//! The committer: one thread that validates, orders, writes and syncs waiting transactions as a group.
