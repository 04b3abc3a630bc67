//! What plugins failed on while their live queries went on (`on_error=skip` or `pass`): noted in the store, newest kept.

use std::time::Instant;

use ::arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use wire::image::ImageAt;
use wire::{ColumnDecl, ImageRef, Schema, Scope};

use super::{Db, DbError, Identity, now_micros, unknown_namespace};
use crate::catalog::{NamespaceId, Stage, Table};
use crate::config::Role;
use crate::plugins::UnitFault;
use crate::store::{Seq, Store, StoreError};

/// Larger rows are noted without their values: the list shall stay small.
const ROW_BYTES: usize = 16 * 1024;

/// Notes taken at once, and from one batch: a plugin that fails on everything fills the list, but not the disk's time.
const BATCH_ENTRIES: usize = 64;

/// Entries of one answer.
pub const LIST: usize = 1_000;

/// Where workers note failures.
#[derive(Clone)]
pub(super) struct PluginErrors(pub(super) Store);

/// One failure, as a worker knows it.
pub(super) struct Entry<'a> {
    pub table: &'a Table,
    pub scope: &'a Scope,
    pub live_id: &'a str,
    pub stage: &'a Stage,
    pub fault: &'a UnitFault,
    /// Images of the batch's base. A map stream judges rows one by one: it has no old side.
    pub old: Option<ImageAt>,
    pub row: Option<ImageAt>,
}

/// The same in the store. Positional: append only, under a new version.
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

const RECORD_VERSION: u8 = 1;

impl PluginErrors {
    pub(super) fn append<'a>(&self, seq: Seq, base: &[u8], entries: impl Iterator<Item = Entry<'a>>) {
        let started = Instant::now();
        let records: Result<Vec<_>, _> =
            entries.take(BATCH_ENTRIES).map(|entry| encode(&record(seq, base, &entry))).collect();
        let noted = records.and_then(|records| {
            self.0.append_faults(&records)?;
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

fn record(seq: Seq, base: &[u8], entry: &Entry<'_>) -> Record {
    let image = |at: Option<ImageAt>| at.and_then(|at| whole_image(base, at)).filter(|image| image.len() <= ROW_BYTES);
    let (old, row) = (image(entry.old), image(entry.row));
    let columns = if old.is_some() || row.is_some() { entry.table.schema().columns } else { Vec::new() };
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

/// The image whose parts lie at `at`, from the length in front of its bitmap on.
fn whole_image(base: &[u8], at: ImageAt) -> Option<Vec<u8>> {
    let varint = if usize::from(at.columns).div_ceil(8) < 0x80 { 1 } else { 2 };
    let rest = base.get((at.present as usize).checked_sub(varint)?..)?;
    let (_, _, used) = ImageRef::parse(rest).ok()?;
    Some(rest[..used].to_vec())
}

fn encode(record: &Record) -> Result<Vec<u8>, StoreError> {
    postcard::to_extend(record, vec![RECORD_VERSION])
        .map_err(|error| StoreError::Corrupt(format!("a plugin's failure cannot be encoded: {error}")))
}

fn decode(bytes: &[u8]) -> Result<Record, StoreError> {
    match bytes.split_first() {
        Some((&RECORD_VERSION, rest)) => postcard::from_bytes(rest)
            .map_err(|error| StoreError::Corrupt(format!("a plugin's failure cannot be read: {error}"))),
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
    /// One row each, with the columns of the table.
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
            let record = decode(bytes)?;
            let wanted = NamespaceId(record.namespace) == found.id
                && plugin.is_none_or(|plugin| plugin == record.plugin)
                && may_see(who, &record);
            Ok(if wanted { Some(shown(who, namespace, number, record)?) } else { None })
        })?;
        Ok(entries)
    }
}

/// Failures on shared tables concern whoever reads those; on a user's rows that user, and that there were some an
/// administrator.
fn may_see(who: &Identity, record: &Record) -> bool {
    who.role == Role::Admin || record.user.as_deref().is_none_or(|user| user == &*who.user)
}

fn shown(who: &Identity, namespace: &str, number: u64, record: Record) -> Result<PluginErrorEntry, StoreError> {
    let theirs = record.user.as_deref().is_some_and(|user| user != &*who.user);
    let schema = Schema { columns: record.columns };
    let values = |image: Option<Vec<u8>>| match image.filter(|_| !theirs) {
        None => Ok(None),
        Some(image) => values(&schema, &image).map(Some),
    };
    Ok(PluginErrorEntry {
        number,
        namespace: namespace.to_owned(),
        table: record.table,
        live_id: record.live_id,
        plugin: record.plugin,
        version: record.version,
        sha256: record.sha256,
        cause: record.cause,
        // A message is the plugin's own words, and may repeat what was in the row.
        message: if theirs { String::new() } else { record.message },
        action: if record.passed { "passed" } else { "skipped" },
        seq: Seq(record.seq),
        at: record.at,
        old: values(record.old)?,
        row: values(record.row)?,
        user: record.user,
    })
}

fn values(schema: &Schema, image: &[u8]) -> Result<RecordBatch, StoreError> {
    let damaged = |error: String| StoreError::Corrupt(format!("the row of a noted failure: {error}"));
    let (image, ..) = ImageRef::parse(image).map_err(|error| damaged(error.to_string()))?;
    crate::sql::arrow::to_batch(schema, &[image]).map_err(|error| damaged(error.to_string()))
}
