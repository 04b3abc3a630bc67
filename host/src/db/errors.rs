//! What plugins failed on while their live queries went on (`on_error=skip` or `pass`): noted in the store, newest
//! kept, shown by plugin, as `system.plugin_errors`, and run again ([`replay`]).

mod replay;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use ::arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use wire::image::ImageAt;
use wire::{ColumnDecl, ImageRef, Schema, Scope, Type, Value};

use super::{Db, DbError, Identity, now_micros, unknown_namespace};
use crate::catalog::{NamespaceId, Stage, Table};
use crate::config::Role;
use crate::plugins::UnitFault;
use crate::sql::RequestEnv;
use crate::sql::system::{SYSTEM, SystemRows, SystemTable, int, optional, text};
use crate::store::{Seq, Store, StoreError};

pub use replay::Replay;

/// Larger rows are noted without their values, and longer parameters left out: the list shall stay small.
const ROW_BYTES: usize = 16 * 1024;

/// Notes taken at once, and from one batch: a plugin that fails on everything fills the list, but not the disk's time.
const BATCH_ENTRIES: usize = 64;

/// Entries of one answer.
pub const LIST: usize = 1_000;

/// Text of rows in one reading of `system.plugin_errors`, which is held in memory as a whole: the newest come first,
/// and what is beyond is shown without its row.
const TABLE_ROW_BYTES: usize = 8 * 1024 * 1024;

/// What was noted is remembered for the newest so many: as many as the list has.
const REMEMBERED: usize = 10_000;

/// Where workers note failures.
#[derive(Clone)]
pub(super) struct PluginErrors {
    store: Store,
    noted: Arc<Mutex<Noted>>,
}

/// What was noted lately, by a hash. That a row is known to fail does not say that it is noted: the stream may have
/// stopped at it, or it was one of another table.
#[derive(Default)]
struct Noted {
    known: HashSet<NoteKey>,
    order: VecDeque<NoteKey>,
}

type NoteKey = [u8; 32];

impl Noted {
    fn add(&mut self, note: NoteKey) {
        if !self.known.insert(note) {
            return;
        }
        self.order.push_back(note);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }
}

/// One failure, as a worker knows it.
pub(super) struct Entry<'a> {
    /// Of a query over several the first.
    pub table: &'a Table,
    /// The columns of the images: the table's, or a result's.
    pub schema: &'a Schema,
    pub scope: &'a Scope,
    pub live_id: &'a str,
    pub stage: &'a Stage,
    /// The stages of the pipeline in front of it.
    pub before: &'a [Stage],
    pub fault: &'a UnitFault,
    /// Images of the batch's base. A map stream judges rows one by one: it has no old side.
    pub old: Option<ImageAt>,
    pub row: Option<ImageAt>,
}

/// The same in the store. Positional, so never changed: what came later stands in a message behind it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    namespace: u32,
    user: Option<String>,
    table: String,
    live_id: String,
    plugin: String,
    version: u32,
    sha256: String,
    cause: String,
    message: String,
    passed: bool,
    seq: u64,
    at: i64,
    /// The columns of the images; empty when they were too large.
    columns: Vec<ColumnDecl>,
    old: Option<Vec<u8>>,
    row: Option<Vec<u8>>,
}

/// Behind a record since version 2: what it takes to run the change again.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Run {
    /// Name and parameters of the stages up to the one that failed; empty when they were too long.
    stages: Vec<(String, String)>,
}

const RECORD_VERSION: u8 = 2;

/// Records of this one have nothing behind them.
const ALONE: u8 = 1;

impl PluginErrors {
    pub(super) fn new(store: Store) -> PluginErrors {
        PluginErrors { store, noted: Arc::default() }
    }

    /// Notes these; where they `come_again`, as in a replay, those that are not noted already.
    pub(super) fn append<'a>(&self, seq: Seq, base: &[u8], come_again: bool, entries: impl Iterator<Item = Entry<'a>>) {
        let started = Instant::now();
        let noted = || self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        let mut keys = Vec::new();
        let due = |entry: &Entry<'_>| {
            let key = note_key(base, entry);
            let due = !come_again || !noted().known.contains(&key);
            keys.extend(due.then_some(key));
            due
        };
        let entries = entries.filter(due).take(BATCH_ENTRIES);
        let records: Result<Vec<_>, _> =
            entries.map(|entry| encode(&record(seq, base, &entry), &run(&entry))).collect();
        let noted = records.and_then(|records| {
            self.store.append_faults(&records)?;
            // What could not be noted is to be noted the next time.
            let mut noted = noted();
            keys.drain(..).for_each(|key| noted.add(key));
            Ok(records.len())
        });
        match noted {
            Ok(0) => {}
            Ok(count) => tracing::debug!(count, elapsed_us = started.elapsed().as_micros() as u64, "failures noted"),
            // The stream goes on: a note is not worth its rows.
            Err(error) => tracing::error!(%error, "what a plugin failed on could not be noted"),
        }
    }
}

/// What makes a note the same as another: whose row of what it is, what failed on it, and what became of it.
fn note_key(base: &[u8], entry: &Entry<'_>) -> NoteKey {
    let Entry { table, schema, scope, stage, fault, .. } = entry;
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(&table.id.0.to_le_bytes());
    part(format!("{scope:?} {}", fault.passed).as_bytes());
    [&stage.name, &stage.sha256, &stage.params].into_iter().for_each(|text| part(text.as_bytes()));
    // Results of several queries may begin with one table.
    schema.columns.iter().for_each(|column| part(column.name.as_bytes()));
    for at in [entry.old, entry.row] {
        part(&at.and_then(|at| whole_image(base, at)).unwrap_or_default());
    }
    hash.finalize().into()
}

fn record(seq: Seq, base: &[u8], entry: &Entry<'_>) -> Record {
    let image = |at: Option<ImageAt>| at.and_then(|at| whole_image(base, at)).filter(|image| image.len() <= ROW_BYTES);
    let (old, row) = (image(entry.old), image(entry.row));
    let columns = if old.is_some() || row.is_some() { entry.schema.columns.clone() } else { Vec::new() };
    Record {
        namespace: entry.table.namespace.0,
        user: match entry.scope {
            Scope::Shared => None,
            Scope::User(user) => Some(user.clone()),
        },
        table: entry.table.name.clone(),
        live_id: entry.live_id.to_owned(),
        plugin: entry.stage.name.clone(),
        version: entry.stage.version,
        sha256: entry.stage.sha256.clone(),
        cause: entry.fault.cause.as_str().to_owned(),
        message: entry.fault.message.clone(),
        passed: entry.fault.passed,
        seq: seq.0,
        at: now_micros(),
        columns,
        old,
        row,
    }
}

fn run(entry: &Entry<'_>) -> Run {
    let stages = || entry.before.iter().chain([entry.stage]);
    let bytes: usize = stages().map(|stage| stage.name.len() + stage.params.len()).sum();
    let kept = stages().filter(|_| bytes <= ROW_BYTES).map(|stage| (stage.name.clone(), stage.params.clone()));
    Run { stages: kept.collect() }
}

/// The image whose parts lie at `at`, from the length in front of its bitmap on.
fn whole_image(base: &[u8], at: ImageAt) -> Option<Vec<u8>> {
    let varint = if (at.columns as usize).div_ceil(8) < 0x80 { 1 } else { 2 };
    let rest = base.get((at.present as usize).checked_sub(varint)?..)?;
    let (_, _, used) = ImageRef::parse(rest).ok()?;
    Some(rest[..used].to_vec())
}

fn encode(record: &Record, run: &Run) -> Result<Vec<u8>, StoreError> {
    let whole = postcard::to_extend(record, vec![RECORD_VERSION]).and_then(|bytes| postcard::to_extend(run, bytes));
    whole.map_err(|error| StoreError::Corrupt(format!("a plugin's failure cannot be encoded: {error}")))
}

fn decode(bytes: &[u8]) -> Result<(Record, Run), StoreError> {
    let damaged = |error: postcard::Error| StoreError::Corrupt(format!("a plugin's failure cannot be read: {error}"));
    match bytes.split_first() {
        Some((&ALONE, rest)) => Ok((postcard::from_bytes(rest).map_err(damaged)?, Run::default())),
        Some((&RECORD_VERSION, rest)) => {
            let (record, rest) = postcard::take_from_bytes(rest).map_err(damaged)?;
            Ok((record, postcard::from_bytes(rest).map_err(damaged)?))
        }
        _ => Err(StoreError::Corrupt("a plugin's failure was noted by a newer tidegate".to_owned())),
    }
}

/// One failure as it is shown.
#[derive(Debug)]
pub struct PluginErrorEntry {
    pub number: u64,
    pub namespace: String,
    pub table: String,
    pub user: Option<String>,
    pub live_id: String,
    pub plugin: String,
    pub version: u32,
    pub sha256: String,
    pub cause: String,
    pub message: String,
    /// `skipped` or `passed`.
    pub action: &'static str,
    pub seq: Seq,
    /// Microseconds since 1970.
    pub at: i64,
    /// One row each, with the columns of the table, or of the result of a live query that is run again.
    pub old: Option<RecordBatch>,
    pub row: Option<RecordBatch>,
}

impl Db {
    /// The newest failures of a namespace's plugins, of all or of one, newest first. Rows of user tables are shown to
    /// their user alone.
    pub fn plugin_errors(
        &self,
        who: &Identity,
        namespace: &str,
        plugin: Option<&str>,
        limit: usize,
    ) -> Result<Vec<PluginErrorEntry>, DbError> {
        let catalog = self.inner.store.catalog();
        let found = catalog.namespace(namespace).ok_or_else(|| unknown_namespace(namespace))?;
        let entries = self.inner.store.faults(limit.min(LIST), |number, bytes| {
            let (record, _) = decode(bytes)?;
            let wanted = NamespaceId(record.namespace) == found.id
                && plugin.is_none_or(|plugin| plugin == record.plugin)
                && may_see(who, &record);
            Ok(if wanted { Some(shown(who, namespace, number, record)?) } else { None })
        })?;
        // What one that was removed failed on stays; of one that never was, "none" would hide a misspelled name.
        if let Some(name) = plugin.filter(|name| entries.is_empty() && catalog.plugin(namespace, name).is_none()) {
            return Err(DbError::NotFound(format!("namespace \"{namespace}\" has no plugin \"{name}\"")));
        }
        Ok(entries)
    }
}

/// `system.plugin_errors`: the same of all namespaces, for SQL. Names that SQL keeps for itself are others here.
pub(super) fn system_table(store: Store) -> SystemTable {
    SystemTable {
        namespace: SYSTEM,
        name: "plugin_errors",
        columns: &[
            ("number", Type::BigInt),
            ("noted_at", Type::Timestamp),
            ("namespace", Type::Text),
            ("plugin", Type::Text),
            ("version", Type::BigInt),
            ("sha256", Type::Text),
            ("table_name", Type::Text),
            ("user_name", Type::Text),
            ("live_id", Type::Text),
            ("seq", Type::BigInt),
            ("cause", Type::Text),
            ("message", Type::Text),
            ("action", Type::Text),
            ("old_row", Type::Json),
            ("new_row", Type::Json),
        ],
        least: Role::User,
        rows: SystemRows::All(Box::new(move |env| Ok(system_rows(&store, env)?))),
    }
}

fn system_rows(store: &Store, env: &RequestEnv) -> Result<Vec<Vec<Value>>, StoreError> {
    let who = Identity { user: env.user.clone(), role: env.role, address: None };
    let names: HashMap<u32, &str> = env.catalog.namespaces().map(|found| (found.id.0, found.name.as_str())).collect();
    let mut room = TABLE_ROW_BYTES;
    store.faults(usize::MAX, |number, bytes| {
        let (record, _) = decode(bytes)?;
        // Of a namespace that is gone nobody can say any more who might see it.
        let Some(namespace) = names.get(&record.namespace).filter(|_| may_see(&who, &record)) else { return Ok(None) };
        let record = seen_by(&who, record);
        let schema = Schema { columns: record.columns };
        let mut row = |image: Option<Vec<u8>>| -> Result<Value, StoreError> {
            let Some(image) = image.filter(|_| room > 0) else { return Ok(Value::Null) };
            let shown = row_text(&schema, &image)?;
            room = room.saturating_sub(shown.len());
            Ok(text(shown))
        };
        let (old, new) = (row(record.old)?, row(record.row)?);
        Ok(Some(vec![
            int(number),
            Value::Int(record.at),
            text(*namespace),
            text(record.plugin),
            int(record.version),
            text(record.sha256),
            text(record.table),
            optional(record.user.map(text)),
            text(record.live_id),
            int(record.seq),
            text(record.cause),
            text(record.message),
            text(action(record.passed)),
            old,
            new,
        ]))
    })
}

fn row_text(schema: &Schema, image: &[u8]) -> Result<String, StoreError> {
    let (image, ..) = ImageRef::parse(image).map_err(|error| damaged_row(&error))?;
    crate::sql::json_row::text(schema, image).map_err(|error| damaged_row(&error))
}

fn damaged_row(error: &dyn std::fmt::Display) -> StoreError {
    StoreError::Corrupt(format!("the row of a noted failure: {error}"))
}

/// Failures on shared tables concern whoever reads those; on a user's rows that user, and that there were some an
/// administrator.
fn may_see(who: &Identity, record: &Record) -> bool {
    who.role == Role::Admin || record.user.as_deref().is_none_or(|user| user == &*who.user)
}

/// It is about a row of somebody else.
fn is_theirs(who: &Identity, record: &Record) -> bool {
    record.user.as_deref().is_some_and(|user| user != &*who.user)
}

/// What this caller may see of it.
fn seen_by(who: &Identity, record: Record) -> Record {
    if !is_theirs(who, &record) {
        return record;
    }
    // A message is the plugin's own words, and may repeat what was in the row.
    Record { message: String::new(), old: None, row: None, ..record }
}

fn action(passed: bool) -> &'static str {
    if passed { "passed" } else { "skipped" }
}

fn shown(who: &Identity, namespace: &str, number: u64, record: Record) -> Result<PluginErrorEntry, StoreError> {
    let record = seen_by(who, record);
    let schema = Schema { columns: record.columns };
    let values = |image: Option<Vec<u8>>| image.map(|image| values(&schema, &image)).transpose();
    Ok(PluginErrorEntry {
        number,
        namespace: namespace.to_owned(),
        table: record.table,
        live_id: record.live_id,
        plugin: record.plugin,
        version: record.version,
        sha256: record.sha256,
        cause: record.cause,
        message: record.message,
        action: action(record.passed),
        seq: Seq(record.seq),
        at: record.at,
        old: values(record.old)?,
        row: values(record.row)?,
        user: record.user,
    })
}

fn values(schema: &Schema, image: &[u8]) -> Result<RecordBatch, StoreError> {
    let (image, ..) = ImageRef::parse(image).map_err(|error| damaged_row(&error))?;
    crate::sql::arrow::to_batch(schema, &[image]).map_err(|error| damaged_row(&error))
}

#[cfg(test)]
mod tests {
    use wire::ImageBuilder;

    use super::*;

    fn noted() -> Record {
        let column = ColumnDecl { id: 0, name: "id".to_owned(), ty: Type::Int, nullable: false, key: true };
        let mut row = ImageBuilder::new(1);
        row.set(0, &Value::Int(7));
        Record {
            namespace: 1,
            user: Some("alice".to_owned()),
            table: "t".to_owned(),
            live_id: "l".to_owned(),
            plugin: "p".to_owned(),
            version: 3,
            sha256: "ab".to_owned(),
            cause: "failed".to_owned(),
            message: "id is 7".to_owned(),
            passed: false,
            seq: 9,
            at: 10,
            columns: vec![column],
            old: None,
            row: Some(row.finish()),
        }
    }

    #[test]
    fn records_of_the_first_version_are_still_read() {
        let run = Run { stages: vec![("a".to_owned(), String::new()), ("p".to_owned(), "{}".to_owned())] };
        assert_eq!(decode(&encode(&noted(), &run).unwrap()).unwrap(), (noted(), run));
        let first = postcard::to_extend(&noted(), vec![ALONE]).unwrap();
        assert_eq!(decode(&first).unwrap(), (noted(), Run::default()));
        for damaged in [&first[..first.len() - 1], &[], &[9]] {
            assert!(decode(damaged).is_err());
        }
    }

    #[test]
    fn a_users_row_and_what_was_said_of_it_are_for_that_user() {
        let who = |user: &str, role| Identity { user: user.into(), role, address: None };
        let (alice, bob, admin) = (who("alice", Role::User), who("bob", Role::User), who("admin", Role::Admin));
        assert!(may_see(&alice, &noted()) && may_see(&admin, &noted()) && !may_see(&bob, &noted()));
        assert_eq!(seen_by(&alice, noted()), noted());
        let hidden = seen_by(&admin, noted());
        assert_eq!((hidden.message.as_str(), hidden.row, hidden.cause.as_str()), ("", None, "failed"));
        let shared = || Record { user: None, ..noted() };
        assert!(may_see(&bob, &shared()) && seen_by(&bob, shared()) == shared());
        let entry = shown(&alice, "main", 1, noted()).unwrap();
        assert_eq!((entry.message.as_str(), entry.row.unwrap().num_rows()), ("id is 7", 1));
        let row = noted();
        assert_eq!(row_text(&Schema { columns: row.columns }, &row.row.unwrap()).unwrap(), r#"{"id":7}"#);
    }
}
