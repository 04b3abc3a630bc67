//! The audit log: who did what, and who was refused what. `system.audit_log` shows it to administrators.
//!
//! A record holds names alone: no SQL, no value, no parameter, no credential. What is a commit is told in the batch of
//! that commit, by [`Event::record`]: DDL, plugins that come and go, a KILL. The rest is counted ([`Audit::count`]) and
//! written behind whoever it is about, because nobody may fill the disk, or slow the server, by being refused: equal
//! events within a minute are one record with a count, and there are only so many different ones ([`window`]). Whoever
//! reads the log has what is counted written first. A crash takes the last second of it.

mod settings;
mod window;

use std::iter;
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use wire::{Type, Value};

use self::settings::Seen;
use self::window::Window;
use super::{Identity, now_micros};
use crate::config::{Config, Role};
use crate::sql::SqlError;
use crate::sql::system::{Pieces, SYSTEM, SystemRows, SystemTable, int, optional, text};
use crate::store::{AuditRecord, Store, StoreError};
use crate::telemetry::{Metrics, one_line};

/// Of a name in a record: callers choose names, and some choose long ones.
const NAME_BYTES: usize = 256;
/// Of the list of settings that are others now.
const LIST_BYTES: usize = 4 * 1024;
/// How long counted events wait for more of their kind before they are written.
const BEHIND: Duration = Duration::from_secs(1);
/// Records held at once by one who reads all.
const PAGE: usize = 1_000;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Of the notes in the store: the settings of the last start.
const SEEN: &str = "settings";
const SEEN_KEY: &[u8] = b"seen";

/// What happened, in names. Positional in the store, so never changed: what comes later stands in a message behind it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Event {
    /// `None`: the server itself, or somebody without a valid credential.
    actor: Option<String>,
    role: Option<String>,
    address: Option<String>,
    action: String,
    what: String,
    object: Option<String>,
    outcome: String,
}

const RECORD_VERSION: u8 = 1;

impl Event {
    /// Something was done, by somebody or by the server itself.
    pub(super) fn done(who: Option<&Identity>, action: &str, what: &str, object: &str) -> Event {
        Event::new(who, who.and_then(|who| who.address), action, what, object, "ok")
    }

    /// Something was refused.
    pub(super) fn denied(who: Option<&Identity>, address: Option<IpAddr>, what: &str, object: &str) -> Event {
        Event::new(who, address, "denial", what, object, "denied")
    }

    fn new(
        who: Option<&Identity>,
        address: Option<IpAddr>,
        action: &str,
        what: &str,
        object: &str,
        outcome: &str,
    ) -> Event {
        Event {
            actor: who.map(|who| clean(&who.user, NAME_BYTES)),
            role: who.map(|who| who.role.as_str().to_owned()),
            address: address.map(|address| address.to_string()),
            action: action.to_owned(),
            what: what.to_owned(),
            object: (!object.is_empty()).then(|| clean(object, NAME_BYTES)),
            outcome: outcome.to_owned(),
        }
    }

    /// What the store keeps of it, to be given to whatever writes it.
    pub(super) fn record(&self) -> Vec<u8> {
        self.counted(1)
    }

    fn counted(&self, count: u64) -> Vec<u8> {
        let whole = postcard::to_extend(&(self, count), vec![RECORD_VERSION]);
        whole.expect("text and numbers have bytes")
    }

    fn decode(said: &[u8]) -> Result<(Event, u64), StoreError> {
        let damaged = || StoreError::Corrupt("a record of the audit log cannot be read".to_owned());
        let bytes = said.strip_prefix(&[RECORD_VERSION]).ok_or_else(damaged)?;
        postcard::from_bytes(bytes).map_err(|_| damaged())
    }
}

/// A name of somebody else's choice: bounded, and nothing in it that ends a line or steers a terminal.
fn clean(name: &str, most: usize) -> String {
    let shown = one_line(cut(name, most));
    let kept = cut(&shown, most);
    let is_whole = name.len() <= most && kept.len() == shown.len();
    if is_whole { kept.to_owned() } else { format!("{kept}…") }
}

fn cut(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

/// The log's writing side, with the thread that writes what is counted. Dropped, it writes what it has.
pub(super) struct Audit {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    store: Store,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
    changed: Condvar,
    /// Held while counts are written, so that an older one never takes the place of a newer.
    writing: Mutex<()>,
}

#[derive(Default)]
struct State {
    window: Window,
    stopped: bool,
}

impl Audit {
    pub(super) fn start(store: Store, metrics: Arc<Metrics>) -> Result<Arc<Audit>, StoreError> {
        let (state, changed, writing) = (Mutex::default(), Condvar::new(), Mutex::default());
        let shared = Arc::new(Shared { store, metrics, state, changed, writing });
        let writer = shared.clone();
        let thread = thread::Builder::new().name("audit".to_owned()).spawn(move || write_behind(&writer))?;
        Ok(Arc::new(Audit { shared, thread: Mutex::new(Some(thread)) }))
    }

    /// Counts an event that is no commit. It is written within moments; nobody waits for it.
    pub(super) fn count(&self, event: Event) {
        let shared = &*self.shared;
        let mut state = shared.state();
        let first = state.window.is_empty();
        state.window.count(event, now_micros(), Instant::now(), || shared.store.next_audit_number());
        drop(state);
        if first {
            shared.changed.notify_all();
        }
    }

    /// The server has started: which version, and what settings are others than at its last start. Blocks. What cannot
    /// be written is no reason not to start: a full disk can still be read.
    pub(super) fn started(&self, config: &Config) {
        let Shared { store, metrics, .. } = &*self.shared;
        let last = store.notes(SEEN).unwrap_or_else(|error| {
            tracing::warn!(%error, "the settings of the last start cannot be read");
            Vec::new()
        });
        let last = last.iter().find(|(key, _)| key == SEEN_KEY).and_then(|(_, value)| Seen::decode(value));
        let seen = Seen::of(config, last.as_ref().map_or_else(rand::random, |last| last.salt));
        let changed = last.as_ref().map(|last| last.changed(&seen).join(", ")).filter(|names| !names.is_empty());
        let changed = changed.map(|names| {
            let event = Event::done(None, "configuration", "changed", "");
            Event { object: Some(clean(&names, LIST_BYTES)), ..event }.record()
        });
        let start = Event::done(None, "server", "start", VERSION).record();
        let said: Vec<Vec<u8>> = iter::once(start).chain(changed).collect();
        if let Err(error) = store.put_notes(SEEN, &[(SEEN_KEY.to_vec(), Some(seen.encode()))], &said) {
            metrics.audit_dropped.inc_by(said.len() as u64);
            tracing::error!(%error, "the audit log could not take that the server has started");
        }
    }

    /// The server ends in order. What is counted is written first.
    pub(super) fn stopped(&self) {
        self.end();
        let Shared { store, metrics, .. } = &*self.shared;
        let said = Event::done(None, "server", "stop", VERSION).record();
        let stop = AuditRecord { number: store.next_audit_number(), at: now_micros(), seq: None, said };
        if let Err(error) = store.leave_audit(&[stop]) {
            metrics.audit_dropped.inc();
            tracing::warn!(%error, "the audit log could not take that the server ends");
        }
    }

    fn end(&self) {
        self.shared.state().stopped = true;
        self.shared.changed.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the thread of the audit log panicked");
        }
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is counted and not written yet.
    fn write(&self) {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let (records, events) = self.state().window.take(Instant::now());
        if records.is_empty() {
            return;
        }
        if let Err(error) = self.store.leave_audit(&records) {
            self.metrics.audit_dropped.inc_by(events);
            tracing::warn!(%error, events, "the audit log could not be written");
        }
    }
}

fn write_behind(shared: &Shared) {
    loop {
        let idle = |state: &mut State| state.window.is_empty() && !state.stopped;
        let state = shared.changed.wait_while(shared.state(), idle).unwrap_or_else(PoisonError::into_inner);
        // For as long, more of the same is counted and not written.
        let waited = shared.changed.wait_timeout_while(state, BEHIND, |state| !state.stopped);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let stopped = state.stopped;
        drop(state);
        shared.write();
        if stopped {
            return;
        }
    }
}

pub(super) fn system_table(audit: Arc<Audit>) -> SystemTable {
    SystemTable {
        namespace: SYSTEM,
        name: "audit_log",
        columns: &[
            ("at", Type::Timestamp),
            ("number", Type::BigInt),
            ("seq", Type::BigInt),
            ("actor", Type::Text),
            ("role", Type::Text),
            ("address", Type::Text),
            ("action", Type::Text),
            ("what", Type::Text),
            ("object", Type::Text),
            ("outcome", Type::Text),
            ("count", Type::BigInt),
        ],
        least: Role::Admin,
        rows: SystemRows::Pieces(Box::new(move || pieces(audit.shared.clone()))),
    }
}

/// All records, newest first.
fn pieces(shared: Arc<Shared>) -> Pieces {
    shared.write();
    let mut before = Some(u64::MAX);
    let page = move || {
        let page = shared.store.audit(before?, PAGE);
        before = page.as_ref().ok().and_then(|records| Some(records.last()?.number));
        match page {
            Ok(records) if records.is_empty() => None,
            Ok(records) => Some(records.into_iter().map(row).collect()),
            Err(error) => Some(Err(error.into())),
        }
    };
    Box::new(iter::from_fn(page))
}

fn row(record: AuditRecord) -> Result<Vec<Value>, SqlError> {
    let (event, count) = Event::decode(&record.said)?;
    Ok(vec![
        Value::Int(record.at),
        int(record.number),
        optional(record.seq.map(|seq| int(seq.0))),
        optional(event.actor.map(text)),
        optional(event.role.map(text)),
        optional(event.address.map(text)),
        text(event.action),
        text(event.what),
        optional(event.object.map(text)),
        text(event.outcome),
        int(count),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_pinned() {
        let who = Identity { user: "al".into(), role: Role::User, address: Some("::1".parse().unwrap()) };
        let event = Event::done(Some(&who), "ddl", "DROP TABLE", "main.t");
        let bytes = event.counted(300);
        let due = b"\x01\x01\x02al\x01\x04user\x01\x03::1\x03ddl\x0aDROP TABLE\x01\x06main.t\x02ok\xac\x02";
        assert_eq!(bytes, due);
        assert_eq!(Event::decode(&bytes).unwrap(), (event, 300));
        let nobody = Event::denied(None, None, "no token", "");
        assert_eq!(Event::decode(&nobody.record()).unwrap(), (nobody, 1));
        for damaged in [&bytes[..bytes.len() - 1], &bytes[1..], &[]] {
            assert!(Event::decode(damaged).is_err());
        }
    }

    #[test]
    fn names_are_bounded_and_stay_on_their_line() {
        for (name, shown) in [
            ("main.flights", "main.flights".to_owned()),
            ("a\nb\u{1b}[2J", "a\\nb\\u{1b}[2J".to_owned()),
            ("12345678901234567890", "1234567890123456…".to_owned()),
            ("123456789012345ü", "123456789012345…".to_owned()),
            ("\u{1b}\u{1b}\u{1b}", "\\u{1b}\\u{1b}\\u{1…".to_owned()),
            ("", String::new()),
        ] {
            assert_eq!(clean(name, 16), shown, "{name:?}");
        }
    }
}
