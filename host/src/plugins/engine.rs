//! The engine, compiled modules, and one store per instance with its limits.
