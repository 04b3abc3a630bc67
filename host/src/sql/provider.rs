//! Table providers: scans with projection, key ranges, filters and LIMIT pushed down; rows stream from the store.
