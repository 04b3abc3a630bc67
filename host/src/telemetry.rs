//! Logs (text or JSON through `tracing`) and the metric registry. Knows no domain type.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

/// All metrics of one server; no globals, so many servers fit in one test process. Names in `/metrics` start with `tidegate_`.
#[derive(Default)]
pub struct Metrics {
    pub commits: Counter,
    pub commit_bytes: Counter,
    /// Events encoded (once per group).
    pub events: Counter,
    /// Bytes written to subscribers.
    pub event_bytes_sent: Counter,
    pub plugin_calls: Counter,
    pub plugin_rows: Counter,
    /// CPU nanoseconds in guests.
    pub plugin_nanos: Counter,
    pub plugin_failures: Counter,
    pub plugin_instances: Gauge,
    /// Counters that plugins keep themselves, by plugin and name.
    pub plugin_metrics: Family<Vec<(&'static str, String)>, Counter<f64>>,
    pub subscriptions: Gauge,
    pub groups: Gauge,
    /// Bytes of frames the rings hold now.
    pub ring_bytes: Gauge,
    /// Frames that were read from the change log because the ring could not take them.
    pub ring_misses: Counter,
    /// Change bytes copied into a guest's memory: stays 0.
    pub guest_bytes_copied: Counter,
    /// Bytes of rows put into a worker part (catch-up, snapshots, later stages): written once, read in place.
    pub worker_part_bytes: Counter,
    pub session_contexts: Counter,
    pub queries: Counter,
    pub http_requests: Counter,
}
