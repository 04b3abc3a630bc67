//! The recent commits in memory, bounded by bytes, for the workers; older ones are in the change log.
