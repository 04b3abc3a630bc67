//! A live query that is run again as a whole, for `live`.

use std::ops::Range;
use std::sync::Arc;

use ::arrow::record_batch::RecordBatch;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use wire::{ImageRef, Schema};

use super::subscribe::resolve_stages;
use super::{StageRequest, blocking, now_micros};
use crate::catalog::{Stage, Table};
use crate::config::Role;
use crate::live::requery::Done;
use crate::live::{Answer, Images, Program, ProgramError, Requery, RequeryError};
use crate::sql::RequestEnv;
use crate::sql::arrow::{to_batch, to_images};
use crate::sql::live::requery::{RequeryPlan, Rows};
use crate::sql::session::Sql;
use crate::store::Store;

/// For queries that are run as a whole: there is nothing to be asked about a row but what a transform made of it.
pub(super) struct WholeProgram;

impl Program for WholeProgram {
    fn matches(&self, _: &[ImageRef<'_>]) -> Result<Vec<bool>, ProgramError> {
        Err(no_program())
    }

    fn project(&self, _: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        Err(no_program())
    }

    fn keys(&self, _: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        Err(no_program())
    }

    fn batch(&self, schema: &Schema, rows: &[ImageRef<'_>]) -> Result<RecordBatch, ProgramError> {
        to_batch(schema, rows).map_err(|error| ProgramError(error.to_string()))
    }
}

fn no_program() -> ProgramError {
    ProgramError("a query that is run as a whole was asked about single rows; this is a bug of the server".to_owned())
}

/// The query, and what it needs to run.
pub(super) struct QueryRunner {
    pub store: Store,
    pub sql: Arc<Sql>,
    pub plan: Arc<RequeryPlan>,
    /// The columns of the result, where there are plugins.
    pub columns: Schema,
    /// The pipeline as it was asked for, and what that was when the query was compiled.
    pub pipeline: Vec<StageRequest>,
    pub stages: Vec<Stage>,
    /// Namespace and user of whoever asked; all of a group see the same rows.
    pub namespace: String,
    pub user: Arc<str>,
    pub role: Role,
    pub limit: usize,
    /// How many may run at the same time, in the whole server.
    pub permits: Arc<Semaphore>,
    pub runtime: Handle,
}

impl Requery for QueryRunner {
    fn run(&self, done: Done) {
        let (store, sql, plan, limit) = (self.store.clone(), self.sql.clone(), self.plan.clone(), self.limit);
        let (namespace, user, permits) = (self.namespace.clone(), self.user.clone(), self.permits.clone());
        let (role, pipeline, stages) = (self.role, self.pipeline.clone(), self.stages.clone());
        self.runtime.spawn(async move {
            // Never closed.
            let _permit = permits.acquire_owned().await;
            // Taken only now, so that a run that waited sees what was written meanwhile; and nothing is told of it that a
            // power cut could take back.
            let durable = blocking(move || {
                let snapshot = store.snapshot();
                store.make_durable(&snapshot).map(|()| snapshot)
            });
            let snapshot = match durable.await {
                Ok(Ok(snapshot)) => snapshot,
                Ok(Err(error)) => return done(Err(RequeryError::Failed(error.to_string()))),
                Err(error) => return done(Err(RequeryError::Failed(error.to_string()))),
            };
            let seq = snapshot.seq();
            let catalog = snapshot.catalog().clone();
            let same = |table: &Table| {
                catalog.table_by_id(table.id).is_some_and(|now| now.schema_version == table.schema_version)
            };
            // A result from behind the activation of another version is for that version to judge.
            let versions = resolve_stages(&catalog, &namespace, &pipeline)
                .is_ok_and(|now| now.iter().map(Stage::runs).eq(stages.iter().map(Stage::runs)));
            if !versions || !plan.tables.iter().all(|(table, _)| same(table)) {
                return done(Err(RequeryError::Changed));
            }
            let env = RequestEnv {
                catalog,
                snapshot,
                namespace,
                user,
                role,
                params: Arc::default(),
                overlay: Arc::default(),
                now: now_micros(),
            };
            let rows = sql.rerun(&plan, env, limit).await;
            done(match rows {
                Ok(Rows { rows, keys }) => Ok(Answer { seq, rows, keys }),
                Err(error) => Err(RequeryError::Failed(error.to_string())),
            });
        });
    }

    fn columns(&self) -> &Schema {
        &self.columns
    }

    fn images(&self, rows: &RecordBatch, some: Range<usize>, bytes: usize) -> Result<Images, ProgramError> {
        let images = to_images(&self.columns, rows, some, bytes);
        let (base, places) = images.map_err(|error| ProgramError(error.to_string()))?;
        Ok(Images { base, places })
    }
}
