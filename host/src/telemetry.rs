//! Logs (text or JSON through `tracing`) and the metric registry. Knows no domain type.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
pub use prometheus_client::metrics::counter::Counter;
pub use prometheus_client::metrics::family::Family;
pub use prometheus_client::metrics::gauge::Gauge;
pub use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::histogram::exponential_buckets;
use prometheus_client::registry::Registry;
use rustix::time::{ClockId, clock_gettime};
use tracing_subscriber::EnvFilter;

/// CPU time of the calling thread so far. A system call: too dear for every call of a guest or a predicate.
pub fn thread_cpu() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// Names and values.
pub type Labels = Vec<(&'static str, String)>;

/// All metrics of one server; no globals, so many servers fit in one test process. Names in `/metrics` start with `tidegate_`.
#[derive(Default)]
pub struct Metrics {
    pub commits: Counter,
    pub commit_bytes: Counter,
    /// Events encoded (once per group).
    pub events: Counter,
    /// Groups whose predicates were asked about a commit: those that the index could not rule out.
    pub live_candidates: Counter,
    /// Live queries compiled: of equal ones one is.
    pub live_compiles: Counter,
    /// Runs of live queries that are run again as a whole.
    pub live_requeries: Counter,
    /// Bytes written to subscribers.
    pub event_bytes_sent: Counter,
    pub plugin_calls: Counter,
    pub plugin_rows: Counter,
    /// CPU nanoseconds in guests.
    pub plugin_nanos: Counter,
    pub plugin_failures: Counter,
    pub plugin_instances: Gauge,
    /// What live queries cost and get in one plugin. These have the labels `namespace` and `plugin`, and the ones named.
    /// `source`: from calls for live commits, for a replay of the log, for present rows. Their count is that of the calls.
    pub plugin_call_seconds: CallSeconds,
    /// `source`: rows and changes that a plugin answered for.
    pub plugin_changes: Family<Labels, Counter>,
    /// `verdict`: of those, what went on and what did not.
    pub plugin_verdicts: Family<Labels, Counter>,
    /// `cause`: failed calls.
    pub plugin_failure_causes: Family<Labels, Counter>,
    /// Bytes that transforms answered.
    pub plugin_output_bytes: Family<Labels, Counter>,
    /// Linear memory of instances beside their windows.
    pub plugin_memory_bytes: Family<Labels, Gauge>,
    /// Counters that plugins keep themselves, by plugin and name.
    pub plugin_metrics: Family<Labels, Counter<f64>>,
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
    /// Statements whose plan was kept from before, and those that had to be planned; brought up to date as gauges are.
    pub plan_cache_hits: Counter,
    pub plan_cache_misses: Counter,
    /// Bytes that running queries hold in the memory pool, and how many heavy ones run and wait; as gauges are.
    pub sql_memory_bytes: Gauge,
    pub heavy_queries: Gauge,
    pub heavy_waiting: Gauge,
    /// Refusals, tickets and the like that the audit log could not take.
    pub audit_dropped: Counter,
    pub http_requests: Counter,
    pub http_connections: Gauge,
    /// Connections turned away because `server.max_connections` were open.
    pub http_refused: Counter,
    /// Connections cut because the client took nothing within the stall limit.
    pub http_stalled: Counter,
    /// What RocksDB holds, brought up to date before `/metrics` is printed.
    pub store_write_buffer_bytes: Gauge,
    pub store_block_cache_bytes: Gauge,
    pub store_table_reader_bytes: Gauge,
}

impl Metrics {
    /// The metrics and what prints them.
    pub fn new() -> (Arc<Metrics>, Exposition) {
        let metrics = Arc::new(Metrics::default());
        let mut registry = Registry::with_prefix("tidegate");
        for (name, help, counter) in metrics.counters() {
            registry.register(name, help, counter.clone());
        }
        for (name, help, gauge) in metrics.gauges() {
            registry.register(name, help, gauge.clone());
        }
        let seconds = metrics.plugin_call_seconds.0.clone();
        registry.register("plugin_call_seconds", "Time of calls into a plugin, failed ones too", seconds);
        let changes = metrics.plugin_changes.clone();
        registry.register("plugin_changes", "Rows and changes that a plugin answered for", changes);
        let verdicts = metrics.plugin_verdicts.clone();
        registry.register("plugin_verdicts", "What a plugin let go on, and what it did not", verdicts);
        registry.register("plugin_faults", "Failures of plugins by cause", metrics.plugin_failure_causes.clone());
        let bytes = metrics.plugin_output_bytes.clone();
        registry.register("plugin_output_bytes", "Bytes that a transform answered", bytes);
        let memory = metrics.plugin_memory_bytes.clone();
        registry.register("plugin_memory_bytes", "Memory of a plugin's instances beside their windows", memory);
        registry.register("plugin_metric", "Counters that plugins keep themselves", metrics.plugin_metrics.clone());
        registry.register_collector(Box::new(PluginSeconds(metrics.plugin_nanos.clone())));
        (metrics, Exposition(registry))
    }

    /// Name, help and value of every counter and gauge that has no labels.
    pub fn values(&self) -> Vec<(&'static str, &'static str, f64)> {
        let counters = self.counters().into_iter().map(|(name, help, counter)| (name, help, counter.get() as f64));
        let gauges = self.gauges().into_iter().map(|(name, help, gauge)| (name, help, gauge.get() as f64));
        let seconds = ("plugin_seconds", PLUGIN_SECONDS, self.plugin_nanos.get() as f64 / 1e9);
        counters.chain(gauges).chain([seconds]).collect()
    }

    fn counters(&self) -> Vec<(&'static str, &'static str, &Counter)> {
        vec![
            ("commits", "Durable commits", &self.commits),
            ("commit_bytes", "Bytes of the frames of durable commits", &self.commit_bytes),
            ("events", "Live events encoded, once per group", &self.events),
            ("live_candidates", "Groups asked about a commit, by commit", &self.live_candidates),
            ("live_compiles", "Live queries compiled; equal ones share that", &self.live_compiles),
            ("live_requeries", "Runs of live queries that are run again", &self.live_requeries),
            ("event_sent_bytes", "Bytes of live events handed to connections", &self.event_bytes_sent),
            ("plugin_calls", "Calls into plugins", &self.plugin_calls),
            ("plugin_rows", "Rows handed to plugins", &self.plugin_rows),
            ("plugin_failures", "Plugin calls that failed", &self.plugin_failures),
            ("ring_misses", "Frames taken from the change log instead of the ring", &self.ring_misses),
            ("guest_bytes_copied", "Change bytes copied into guest memory", &self.guest_bytes_copied),
            ("worker_part_bytes", "Bytes of rows written to a worker part", &self.worker_part_bytes),
            ("session_contexts", "SQL session contexts created since start", &self.session_contexts),
            ("queries", "SQL requests", &self.queries),
            ("plan_cache_hits", "Statements whose plan was kept from before", &self.plan_cache_hits),
            ("plan_cache_misses", "Statements that had to be planned", &self.plan_cache_misses),
            ("audit_dropped", "Events that could not be written to the audit log", &self.audit_dropped),
            ("http_requests", "HTTP requests", &self.http_requests),
            ("http_refused", "Connections turned away at the connection limit", &self.http_refused),
            ("http_stalled", "Connections cut because the client stopped reading or is gone", &self.http_stalled),
        ]
    }

    fn gauges(&self) -> Vec<(&'static str, &'static str, &Gauge)> {
        vec![
            ("plugin_instances", "Plugin instances alive", &self.plugin_instances),
            ("subscriptions", "Open live subscriptions", &self.subscriptions),
            ("groups", "Groups of equal live queries", &self.groups),
            ("ring_bytes", "Bytes of frames in the rings", &self.ring_bytes),
            ("sql_memory_bytes", "Bytes that running queries hold in the memory pool", &self.sql_memory_bytes),
            ("heavy_queries", "Queries with joins, sorts or aggregates that run", &self.heavy_queries),
            ("heavy_waiting", "Queries with joins, sorts or aggregates that wait for their turn", &self.heavy_waiting),
            ("http_connections", "Open HTTP connections", &self.http_connections),
            ("store_write_buffer_bytes", "Bytes in RocksDB's write buffers", &self.store_write_buffer_bytes),
            ("store_block_cache_bytes", "Bytes in RocksDB's block cache", &self.store_block_cache_bytes),
            ("store_table_reader_bytes", "Bytes in RocksDB's table readers", &self.store_table_reader_bytes),
        ]
    }
}

/// Times of calls.
pub struct CallSeconds(pub Family<Labels, Histogram>);

impl Default for CallSeconds {
    fn default() -> CallSeconds {
        let make: fn() -> Histogram = call_seconds;
        CallSeconds(Family::new_with_constructor(make))
    }
}

/// From 1 µs (a small filter, one row) by fours to 0.26 s, more than a batch may take.
fn call_seconds() -> Histogram {
    Histogram::new(exponential_buckets(1e-6, 4.0, 10))
}

const PLUGIN_SECONDS: &str = "Seconds spent in calls of plugins";

/// Counted in nanoseconds (an integer add on the hot path), shown in seconds.
#[derive(Debug)]
struct PluginSeconds(Counter);

impl Collector for PluginSeconds {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let seconds = ConstCounter::new(self.0.get() as f64 / 1e9);
        let metric = encoder.encode_descriptor("plugin_seconds", PLUGIN_SECONDS, None, seconds.metric_type())?;
        seconds.encode(metric)
    }
}

/// The registry behind `/metrics`.
pub struct Exposition(Registry);

impl Exposition {
    /// Everything, as OpenMetrics text.
    pub fn openmetrics(&self) -> Result<String, std::fmt::Error> {
        let mut out = String::new();
        prometheus_client::encoding::text::encode(&mut out, &self.0)?;
        Ok(out)
    }
}

/// Starts logging to stderr; once per process. `filter` is in `RUST_LOG` syntax.
pub fn init(json: bool, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("setting `log.filter`: {error}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let done = if json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init()
    };
    done.map_err(|error| format!("logging cannot start: {error}"))
}

/// A text of somebody else, fit for a log or a terminal: what would end the line, steer the terminal or turn the writing
/// direction is written out, such as `\n` and `\u{1b}`. Without that a guest could forge lines of other plugins.
pub fn one_line(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_unsafe_to_show) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_unsafe_to_show(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

fn is_unsafe_to_show(c: char) -> bool {
    // Beside the control characters: line and paragraph separators, and what overrides the direction.
    c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_shown_ends_its_line_or_steers_a_terminal() {
        for (text, shown) in [
            ("", ""),
            ("late: 15 → 30 min, C:\\temp, \"ü\"", "late: 15 → 30 min, C:\\temp, \"ü\""),
            ("one\r\ntwo\tthree\0", "one\\r\\ntwo\\tthree\\u{0}"),
            ("\u{1b}[2J\u{9b}31m\u{7f}", "\\u{1b}[2J\\u{9b}31m\\u{7f}"),
            ("a\u{2028}b\u{202e}c\u{2066}d", "a\\u{2028}b\\u{202e}c\\u{2066}d"),
        ] {
            assert_eq!(one_line(text), shown);
            assert_eq!(one_line(shown), shown, "what is written out stays as it is");
        }
        assert!(matches!(one_line("plain"), Cow::Borrowed(_)));
    }

    #[test]
    fn names_are_the_documented_ones() {
        let (metrics, exposition) = Metrics::new();
        metrics.commits.inc();
        metrics.plugin_nanos.inc_by(1_500_000_000);
        let text = exposition.openmetrics().unwrap();
        for line in [
            "tidegate_commits_total 1",
            "tidegate_events_total 0",
            "tidegate_plugin_calls_total 0",
            "tidegate_plugin_rows_total 0",
            "tidegate_plugin_seconds_total 1.5",
            "tidegate_plugin_failures_total 0",
            "tidegate_plugin_instances 0",
            "tidegate_subscriptions 0",
            "tidegate_groups 0",
            "tidegate_ring_bytes 0",
            "tidegate_ring_misses_total 0",
            "tidegate_guest_bytes_copied_total 0",
            "tidegate_worker_part_bytes_total 0",
            "tidegate_session_contexts_total 0",
            "tidegate_audit_dropped_total 0",
            "tidegate_http_requests_total 0",
            "tidegate_queries_total 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
        }
    }
}
