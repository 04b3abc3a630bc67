//! Groups: subscriptions with the same plan, parameters, scope and pipeline; evaluated and encoded once.
