//! The system tables that more than the catalog is needed for. This list is the one place to add one.

use std::sync::Arc;

use wire::{Type, Value};

use super::audit::{self, Audit};
use super::errors;
use super::streams::{LiveQueryInfo, Streams};
use crate::config::{Config, Role};
use crate::live::Live;
use crate::sql::SqlError;
use crate::sql::system::{Rows, SYSTEM, SystemRows, SystemTable, int, text};
use crate::store::Store;
use crate::telemetry::Metrics;

/// What the tables' rows are made from; kept by them, so nothing in here may hold the SQL engine.
pub(super) struct Sources {
    pub store: Store,
    pub live: Live,
    pub streams: Arc<Streams>,
    pub metrics: Arc<Metrics>,
    pub audit: Arc<Audit>,
}

pub(super) fn tables(config: &Config, sources: Sources) -> Vec<SystemTable> {
    let (streams, live) = (sources.streams.clone(), sources.live.clone());
    let errors = errors::system_table(sources.store.clone());
    let audit = audit::system_table(sources.audit.clone());
    vec![settings(config), users(config), stats(sources), live_queries(streams, live), errors, audit]
}

/// Brings the gauges up to date that nobody counts as they change.
pub(super) fn refresh_gauges(sources: &Sources) {
    let metrics = &sources.metrics;
    let (subscriptions, groups) = sources.live.counts();
    metrics.subscriptions.set(subscriptions as i64);
    metrics.groups.set(groups as i64);
    let (write_buffers, block_cache, table_readers) = sources.store.memory();
    metrics.store_write_buffer_bytes.set(write_buffers as i64);
    metrics.store_block_cache_bytes.set(block_cache as i64);
    metrics.store_table_reader_bytes.set(table_readers as i64);
}

/// The live queries that are open: one's own, or an administrator's view of all. Counters are read from the groups,
/// which tell every event once whatever the number of their subscribers.
fn live_queries(streams: Arc<Streams>, live: Live) -> SystemTable {
    SystemTable {
        namespace: SYSTEM,
        name: "live_queries",
        columns: &[
            ("live_id", Type::Text),
            ("namespace", Type::Text),
            ("sql", Type::Text),
            ("mode", Type::Text),
            ("index", Type::Text),
            ("pipeline", Type::Text),
            ("users", Type::Text),
            ("subscribers", Type::BigInt),
            ("events", Type::BigInt),
            ("bytes", Type::BigInt),
            ("lag", Type::BigInt),
        ],
        least: Role::User,
        rows: SystemRows::All(Box::new(move |env| {
            let row = |query: LiveQueryInfo| {
                vec![
                    text(query.live_id),
                    text(query.namespace),
                    text(query.sql),
                    text(query.mode),
                    text(query.index),
                    text(query.pipeline),
                    text(query.users.join(", ")),
                    int(query.subscribers),
                    int(query.events),
                    int(query.bytes),
                    int(query.lag),
                ]
            };
            Ok(streams.visible(&live, &env.user, env.role).into_iter().map(row).collect())
        })),
    }
}

/// What the server runs with. Secrets are not in the list; that there is one is.
fn settings(config: &Config) -> SystemTable {
    let settings = config.settings();
    let rows = move || settings.iter().map(|(name, value)| vec![text(name.as_str()), text(value.as_str())]).collect();
    SystemTable {
        namespace: SYSTEM,
        name: "settings",
        columns: &[("name", Type::Text), ("value", Type::Text)],
        least: Role::Admin,
        rows: SystemRows::All(Box::new(move |_| Ok::<Rows, SqlError>(rows()))),
    }
}

/// Who may come in, and as what; never with what.
fn users(config: &Config) -> SystemTable {
    let mut users = vec![("admin".to_owned(), Role::Admin, 1)];
    for token in &config.tokens {
        match users.iter_mut().find(|(user, role, _)| *user == token.user && *role == token.role) {
            Some((.., tokens)) => *tokens += 1,
            None => users.push((token.user.clone(), token.role, 1)),
        }
    }
    users.sort();
    let rows = move || {
        let row = |(user, role, tokens): &(String, Role, i64)| vec![text(user), text(role.as_str()), int(*tokens)];
        users.iter().map(row).collect()
    };
    SystemTable {
        namespace: SYSTEM,
        name: "users",
        columns: &[("name", Type::Text), ("role", Type::Text), ("tokens", Type::BigInt)],
        least: Role::Admin,
        rows: SystemRows::All(Box::new(move |_| Ok(rows()))),
    }
}

/// The server's counters and gauges, as in `/metrics`.
fn stats(sources: Sources) -> SystemTable {
    let rows = move || {
        refresh_gauges(&sources);
        let stats = sources.metrics.values().into_iter();
        stats.map(|(name, help, value)| vec![text(name), Value::Float(value), text(help)]).collect()
    };
    SystemTable {
        namespace: SYSTEM,
        name: "stats",
        columns: &[("name", Type::Text), ("value", Type::Double), ("help", Type::Text)],
        least: Role::Admin,
        rows: SystemRows::All(Box::new(move |_| Ok(rows()))),
    }
}
