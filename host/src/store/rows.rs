//! Stored row bytes: schema version and row image; lifting images of older schema versions.
