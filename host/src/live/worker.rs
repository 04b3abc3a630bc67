//! Worker threads: each owns some groups, takes commits in order, evaluates, runs pipelines, encodes.
