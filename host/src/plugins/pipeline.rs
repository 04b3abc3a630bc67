//! Stages in order: batches, leases, outputs copied once into the worker part for the next stage.
