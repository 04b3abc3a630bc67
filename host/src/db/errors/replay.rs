//! A noted failure run again, by the versions that are active now: what would become of that change today. Nothing is
//! stored and nobody is told but who asks; a live query gets the row again when it is opened anew, or when its plugin's
//! next version makes it resync.

use std::sync::Arc;

use wire::{ImageBuilder, ImageRef, Schema};

use super::{PluginErrorEntry, Record, Run, damaged_row, decode, is_theirs, may_see, shown};
use crate::catalog::{Catalog, NamespaceId, Plugin, Stage};
use crate::db::trial::{Job, Trial};
use crate::db::{Db, DbError, Identity, blocking, unknown_namespace};
use crate::plugins::registry::Owner;
use crate::sql::Refusal;
use crate::store::StoreError;

/// What was noted, and what becomes of it now.
#[derive(Debug)]
pub struct Replay {
    pub noted: PluginErrorEntry,
    pub trial: Trial,
}

impl Db {
    /// Runs the change of a noted failure through the pipeline up to the plugin that failed. Whoever sees the row may.
    pub async fn replay_plugin_error(
        &self,
        who: &Identity,
        namespace: &str,
        plugin: &str,
        number: u64,
    ) -> Result<Replay, DbError> {
        self.check_open()?;
        let catalog = self.inner.store.catalog();
        let found = catalog.namespace(namespace).ok_or_else(|| unknown_namespace(namespace))?.id;
        let noted = self.inner.store.fault(number)?.map(|bytes| decode(&bytes)).transpose()?;
        let mine =
            |record: &Record| NamespaceId(record.namespace) == found && record.plugin == plugin && may_see(who, record);
        let Some((record, run)) = noted.filter(|(record, _)| mine(record)) else {
            return Err(DbError::NotFound(format!(
                "plugin \"{plugin}\" has no noted failure {number}: the oldest go when there are many; \
                 GET /v1/plugins/{namespace}/{plugin}/errors lists those that are kept"
            )));
        };
        if is_theirs(who, &record) {
            let message = "what it failed on is a row of another user, who alone may run it again".to_owned();
            let object = format!("{namespace}.{plugin}");
            return Err(DbError::Forbidden(Box::new(Refusal { what: "replay", object, message })));
        }
        let stages = stages(&catalog, namespace, &run)?;
        let Some((last, _)) = stages.last() else { return Err(not_kept(number, "the parameters of its live query")) };
        if record.old.is_none() && record.row.is_none() {
            return Err(not_kept(number, "its row, which was too large to be noted"));
        }
        let kind = last.kind;
        let owner = match &record.user {
            None => Owner::shared(found),
            Some(user) => Owner::user(found, user),
        };
        let schema = Schema { columns: record.columns.clone() };
        let images = vec![(image(&schema, record.old.as_deref())?, image(&schema, record.row.as_deref())?)];
        let noted = shown(who, namespace, number, record)?;
        let stages: Vec<Stage> = stages.into_iter().map(|(_, stage)| stage).collect();
        let plugins = self.inner.plugins.clone();
        let job = move || Job { owner, stages: &stages, kind, schema: &schema, images, measure: false }.run(&plugins);
        let trial = blocking(job).await??;
        self.audit(who, "plugin", "replay", &format!("{namespace}.{plugin}"));
        Ok(Replay { noted, trial })
    }
}

fn not_kept(number: u64, what: &str) -> DbError {
    DbError::NotFound(format!(
        "failure {number} cannot be run again: {what} cannot be had any more; try rows like it with POST …/try"
    ))
}

/// The active version of each plugin, with the parameters of then.
fn stages(catalog: &Catalog, namespace: &str, run: &Run) -> Result<Vec<(Arc<Plugin>, Stage)>, DbError> {
    let stage = |(name, params): &(String, String)| {
        let plugin = catalog.plugin(namespace, name).cloned().ok_or_else(|| {
            DbError::NotFound(format!("plugin \"{name}\", through which the change went, is not there any more"))
        })?;
        let stage = Stage {
            name: name.clone(),
            version: plugin.version,
            sha256: plugin.sha256.clone(),
            params: params.clone(),
        };
        Ok::<_, DbError>((plugin, stage))
    };
    run.stages.iter().map(stage).collect()
}

/// The noted image with exactly the slots of the noted columns: a row that was stored before an ALTER may have fewer.
fn image(schema: &Schema, noted: Option<&[u8]>) -> Result<Option<Vec<u8>>, StoreError> {
    let Some(noted) = noted else { return Ok(None) };
    let (noted, ..) = ImageRef::parse(noted).map_err(|error| damaged_row(&error))?;
    let mut image = ImageBuilder::new(schema.slots());
    for column in &schema.columns {
        image.set(column.id, &noted.value(column.id, column.ty).map_err(|error| damaged_row(&error))?);
    }
    Ok(Some(image.finish()))
}
