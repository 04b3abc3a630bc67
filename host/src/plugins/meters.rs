//! What is counted of each plugin that live queries run through, for `/metrics`.
//!
//! A plugin's series are looked up when a pipeline is opened, and kept with its setup: a call only adds to them. They
//! begin with the first live query through the plugin and end when it is deleted, so there are never more than plugins.
//! Uploads and trials add to a meter that nobody sees.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{FaultCause, Origin};
use crate::catalog::NamespaceId;
use crate::telemetry::{Counter, Family, Gauge, Histogram, Labels, Metrics};

/// Counters that one plugin keeps through `metric`: more would make `/metrics` its own to flood.
const GUEST_METRICS: usize = 64;

/// The meters of all plugins.
pub struct Meters {
    metrics: Arc<Metrics>,
    known: Mutex<HashMap<Key, Arc<Meter>>>,
    unseen: Arc<Meter>,
}

/// A plugin: its namespace and name.
type Key = (NamespaceId, String);

/// The series of one plugin, over all its versions.
pub struct Meter {
    /// Namespace and name: the labels of every series.
    own: Labels,
    /// By [`Origin`].
    origins: [FromOrigin; Origin::ALL.len()],
    kept: Counter,
    dropped: Counter,
    output_bytes: Counter,
    /// By [`FaultCause`].
    faults: [Counter; FaultCause::ALL.len()],
    /// Linear memory of its instances beside their windows.
    pub memory: Gauge,
    /// What it counts itself, as series and by name.
    guest_family: Family<Labels, Counter<f64>>,
    guest: Mutex<GuestMetrics>,
}

// Their numbers are places in these arrays.
const _: () = {
    let mut i = 0;
    while i < Origin::ALL.len() {
        assert!(Origin::ALL[i] as usize == i);
        i += 1;
    }
    i = 0;
    while i < FaultCause::ALL.len() {
        assert!(FaultCause::ALL[i] as usize == i);
        i += 1;
    }
};

struct FromOrigin {
    seconds: Histogram,
    changes: Counter,
}

#[derive(Default)]
struct GuestMetrics {
    /// With the newest version that counted it. A name that only older versions used makes room for one of a newer one:
    /// what a version invented without end goes with that version.
    counters: HashMap<String, (u32, Counter<f64>)>,
    /// The newest version that was told of the limit: once is enough.
    warned: u32,
    /// The plugin was deleted.
    gone: bool,
}

impl Meters {
    pub fn new(metrics: Arc<Metrics>) -> Meters {
        let unseen = Arc::new(Meter::new(&Metrics::default(), Labels::new()));
        Meters { metrics, known: Mutex::default(), unseen }
    }

    /// The plugin's meter, made now where there is none. `namespace_name` is the label.
    pub fn of(&self, namespace: NamespaceId, plugin: &str, namespace_name: impl FnOnce() -> String) -> Arc<Meter> {
        let make = || {
            let own = vec![("namespace", namespace_name()), ("plugin", plugin.to_owned())];
            Arc::new(Meter::new(&self.metrics, own))
        };
        self.known().entry((namespace, plugin.to_owned())).or_insert_with(make).clone()
    }

    /// What uploads and trials are counted in.
    pub fn unseen(&self) -> Arc<Meter> {
        self.unseen.clone()
    }

    /// The plugin is gone, and its series with it. A call that is still under way adds to what nobody sees.
    pub fn forget(&self, namespace: NamespaceId, plugin: &str) {
        let mut known = self.known();
        if let Some(meter) = known.remove(&(namespace, plugin.to_owned())) {
            meter.remove_from(&self.metrics);
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Key, Arc<Meter>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Meter {
    /// Every series is there from the start, at 0: what begins at 1 has no rate.
    fn new(metrics: &Metrics, own: Labels) -> Meter {
        let origins = Origin::ALL.map(|origin| {
            let labels = with(&own, "source", origin.as_str());
            FromOrigin {
                seconds: metrics.plugin_call_seconds.0.get_or_create_owned(&labels),
                changes: metrics.plugin_changes.get_or_create_owned(&labels),
            }
        });
        let verdict = |verdict| metrics.plugin_verdicts.get_or_create_owned(&with(&own, "verdict", verdict));
        let faults = &metrics.plugin_failure_causes;
        let fault = |cause: FaultCause| faults.get_or_create_owned(&with(&own, "cause", cause.as_str()));
        Meter {
            origins,
            kept: verdict("kept"),
            dropped: verdict("dropped"),
            output_bytes: metrics.plugin_output_bytes.get_or_create_owned(&own),
            faults: FaultCause::ALL.map(fault),
            memory: metrics.plugin_memory_bytes.get_or_create_owned(&own),
            guest_family: metrics.plugin_metrics.clone(),
            guest: Mutex::default(),
            own,
        }
    }

    /// How long calls take, failed ones too.
    pub fn seconds(&self, origin: Origin) -> &Histogram {
        &self.origins[origin as usize].seconds
    }

    /// A call answered for so many rows or changes: so many went on, the others ended there.
    pub fn judged(&self, origin: Origin, changes: usize, kept: usize) {
        self.origins[origin as usize].changes.inc_by(changes as u64);
        self.kept.inc_by(kept as u64);
        self.dropped.inc_by(changes.saturating_sub(kept) as u64);
    }

    /// A transform answered so many bytes.
    pub fn answered(&self, bytes: usize) {
        self.output_bytes.inc_by(bytes as u64);
    }

    pub fn failed(&self, cause: FaultCause) {
        self.faults[cause as usize].inc();
    }

    /// Adds what a call of that version counted by itself, and empties it.
    pub fn count(&self, version: u32, counted: &mut Vec<(String, f64)>) {
        if counted.is_empty() {
            return;
        }
        let mut guard = self.guest();
        let guest = &mut *guard;
        for (name, value) in counted.drain(..) {
            if let Some((newest, counter)) = guest.counters.get_mut(&name) {
                *newest = version.max(*newest);
                counter.inc_by(value);
            } else if guest.gone {
                // Nobody would see it, and nobody would take it away.
            } else if self.has_room(guest, version) {
                let counter = self.guest_family.get_or_create_owned(&with(&self.own, "name", &name));
                counter.inc_by(value);
                guest.counters.insert(name, (version, counter));
            } else if guest.warned < version {
                guest.warned = version;
                let plugin = self.own.iter().map(|(_, value)| value.as_str()).collect::<Vec<_>>().join(".");
                tracing::warn!(
                    target: "plugin", plugin = plugin.as_str(), version,
                    "metric `{name}` is not counted, nor are others that are new: a plugin has at most {GUEST_METRICS}"
                );
            }
        }
    }

    /// Whether another name may be counted; one of an older version goes where that is needed.
    fn has_room(&self, guest: &mut GuestMetrics, version: u32) -> bool {
        if guest.counters.len() < GUEST_METRICS {
            return true;
        }
        let older = guest.counters.iter().find(|(_, (newest, _))| *newest < version);
        let Some(name) = older.map(|(name, _)| name.clone()) else { return false };
        guest.counters.remove(&name);
        self.guest_family.remove(&with(&self.own, "name", &name));
        true
    }

    fn guest(&self) -> MutexGuard<'_, GuestMetrics> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove_from(&self, metrics: &Metrics) {
        let mut guest = self.guest();
        guest.gone = true;
        for (name, _) in guest.counters.drain() {
            self.guest_family.remove(&with(&self.own, "name", &name));
        }
        let own = &self.own;
        for origin in Origin::ALL {
            let labels = with(own, "source", origin.as_str());
            metrics.plugin_call_seconds.0.remove(&labels);
            metrics.plugin_changes.remove(&labels);
        }
        for verdict in ["kept", "dropped"] {
            metrics.plugin_verdicts.remove(&with(own, "verdict", verdict));
        }
        for cause in FaultCause::ALL {
            metrics.plugin_failure_causes.remove(&with(own, "cause", cause.as_str()));
        }
        metrics.plugin_output_bytes.remove(own);
        metrics.plugin_memory_bytes.remove(own);
    }
}

/// The labels and one more.
fn with(own: &[(&'static str, String)], name: &'static str, value: &str) -> Labels {
    let mut labels = own.to_vec();
    labels.push((name, value.to_owned()));
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    const NS: NamespaceId = NamespaceId(1);

    /// The lines that are about the plugin `p`.
    fn lines(text: &str) -> Vec<&str> {
        text.lines().filter(|line| line.contains("plugin=\"p\"")).collect()
    }

    #[test]
    fn series_begin_at_nought_and_end_with_the_plugin() {
        let (metrics, exposition) = Metrics::new();
        let meters = Meters::new(metrics);
        meters.unseen().judged(Origin::Live, 1, 1);
        assert!(!exposition.openmetrics().unwrap().contains("plugin_changes_total"), "nobody sees a trial");

        let meter = meters.of(NS, "p", || "main".to_owned());
        let again = meters.of(NS, "p", || panic!("it is known"));
        assert!(Arc::ptr_eq(&meter, &again));
        meters.of(NamespaceId(2), "p", || "other".to_owned()).judged(Origin::Live, 9, 9);
        meter.judged(Origin::Live, 64, 3);
        meter.judged(Origin::Replay, 2, 0);
        meter.seconds(Origin::Live).observe(0.5);
        meter.answered(100);
        meter.failed(FaultCause::Abi);
        meter.memory.inc_by(65_536);
        let text = exposition.openmetrics().unwrap();
        let ours = r#"{namespace="main",plugin="p""#;
        for line in [
            format!(r#"tidegate_plugin_changes_total{ours},source="live"}} 64"#),
            format!(r#"tidegate_plugin_changes_total{ours},source="replay"}} 2"#),
            format!(r#"tidegate_plugin_changes_total{ours},source="snapshot"}} 0"#),
            format!(r#"tidegate_plugin_verdicts_total{ours},verdict="kept"}} 3"#),
            format!(r#"tidegate_plugin_verdicts_total{ours},verdict="dropped"}} 63"#),
            format!(r#"tidegate_plugin_faults_total{ours},cause="abi"}} 1"#),
            format!(r#"tidegate_plugin_faults_total{ours},cause="trap"}} 0"#),
            format!("tidegate_plugin_output_bytes_total{ours}}} 100"),
            format!("tidegate_plugin_memory_bytes{ours}}} 65536"),
            r#"tidegate_plugin_changes_total{namespace="other",plugin="p",source="live"} 9"#.to_owned(),
        ] {
            assert!(lines(&text).contains(&line.as_str()), "{line} is missing in\n{text}");
        }
        let counts = |origin: &str, count: u64| {
            let start = "tidegate_plugin_call_seconds_count{";
            let found = lines(&text).into_iter().find(|line| {
                line.starts_with(start)
                    && line.contains(r#"namespace="main""#)
                    && line.contains(&format!("source=\"{origin}\""))
            });
            found.is_some_and(|line| line.ends_with(&format!("}} {count}")))
        };
        assert!(counts("live", 1) && counts("snapshot", 0), "{text}");

        meters.forget(NS, "p");
        meter.judged(Origin::Live, 1, 1);
        let text = exposition.openmetrics().unwrap();
        assert!(lines(&text).iter().all(|line| line.contains(r#"namespace="other""#)), "{text}");
        assert!(!lines(&text).is_empty());
        assert!(!Arc::ptr_eq(&meter, &meters.of(NS, "p", || "main".to_owned())), "one that is made again starts anew");
    }

    /// So many names that nobody has had yet, each counted once by this version.
    fn invent(meter: &Meter, version: u32, names: std::ops::Range<usize>) {
        let mut counted: Vec<(String, f64)> = names.map(|name| (format!("n{name}"), 1.0)).collect();
        meter.count(version, &mut counted);
        assert!(counted.is_empty());
    }

    /// One plugin with names made at random took the places of all others, for ever.
    #[test]
    fn what_guests_count_is_bounded_by_plugin_and_older_versions_make_room() {
        let (metrics, exposition) = Metrics::new();
        let meters = Meters::new(metrics);
        let names = |plugin: &str| {
            let text = exposition.openmetrics().unwrap();
            let start = format!(r#"tidegate_plugin_metric_total{{namespace="main",plugin="{plugin}",name=""#);
            let name = |line: &str| Some(line.strip_prefix(&start)?.replace("\"}", " ="));
            let mut names: Vec<String> = text.lines().filter_map(name).collect();
            names.sort();
            names
        };
        let [flood, other] = ["flood", "p"].map(|plugin| meters.of(NS, plugin, || "main".to_owned()));
        invent(&flood, 1, 0..1_000);
        invent(&flood, 1, 63..65);
        assert_eq!(names("flood").len(), GUEST_METRICS);
        assert!(names("flood").contains(&"n63 = 2.0".to_owned()), "those it has go on");
        assert_eq!(flood.guest().warned, 1);
        invent(&other, 1, 0..1);
        assert_eq!(names("p"), ["n0 = 1.0"], "another plugin has its own");

        // Another version, which uses one of the names and has few of its own.
        invent(&flood, 2, 5..6);
        invent(&flood, 2, 2_000..2_003);
        assert_eq!(names("flood").len(), GUEST_METRICS);
        for kept in ["n5 = 2.0", "n2000 = 1.0", "n2001 = 1.0", "n2002 = 1.0"] {
            assert!(names("flood").contains(&kept.to_owned()), "{kept}: {:?}", names("flood"));
        }
        // A stream that is pinned to the older one takes nothing away from it.
        invent(&flood, 1, 3_000..3_100);
        assert!(!names("flood").iter().any(|name| name.starts_with("n300")), "{:?}", names("flood"));
        invent(&flood, 2, 4_000..5_000);
        assert!(names("flood").contains(&"n5 = 2.0".to_owned()));
        assert!(names("flood").contains(&"n4059 = 1.0".to_owned()), "the places of the older one, and no more");
        assert!(!names("flood").contains(&"n4060 = 1.0".to_owned()));

        meters.forget(NS, "flood");
        invent(&flood, 2, 0..3);
        assert!(names("flood").is_empty(), "{:?}", names("flood"));
        assert_eq!(names("p"), ["n0 = 1.0"]);
    }
}
