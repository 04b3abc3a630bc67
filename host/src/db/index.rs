//! Building an index after its CREATE is committed: filled and verified while writes go on, then put to use; taken away
//! again when it cannot be.
//!
//! It runs as a task of its own, with the commit of its CREATE: a client that goes away does not leave an index half built. A server that goes away
//! does, and takes it away at its next start.

use std::sync::Arc;

use tokio::task::JoinHandle;

use super::{Db, DbError, blocking};
use crate::catalog::{Index, IndexId, IndexState, Table, TableId, TableKind};
use crate::sql::{SqlError, dml};
use crate::store::index::BuildError;
use crate::store::{CatalogWrite, CommitError, Seq, Store, Transaction};

/// Only other catalog changes of the same moment can be in the way of a new state.
const TRIES: u32 = 32;

/// A build under way: the seq from which queries use the index. That commit is the one that the audit log tells of.
pub(super) type Building = JoinHandle<Result<Seq, DbError>>;

/// Commits the CREATE and begins to build, as one: an index that nobody builds would be in the way for ever.
pub(super) async fn create(
    db: &Db,
    create: Transaction,
    (table, index): (TableId, IndexId),
    said: Vec<Vec<u8>>,
) -> Result<Building, DbError> {
    let db = db.clone();
    let task = tokio::spawn(async move {
        db.inner.store.commit(create).await.map_err(DbError::Commit)?;
        Ok(tokio::spawn(async move { build(&db, table, index, said).await }))
    });
    task.await.map_err(|error| DbError::Internal(error.to_string()))?
}

async fn build(db: &Db, table: TableId, index: IndexId, said: Vec<Vec<u8>>) -> Result<Seq, DbError> {
    match steps(db, table, index, &said).await {
        Ok(seq) => Ok(seq),
        Err(BuildError::Gone) => {
            Err(DbError::InUse("the index or its table was dropped while the index was built".to_owned()))
        }
        // The next start takes it away.
        Err(BuildError::Stopped) => Err(DbError::Closed),
        Err(error) => Err(give_up(db, table, index, error).await),
    }
}

async fn steps(db: &Db, table: TableId, index: IndexId, said: &[Vec<u8>]) -> Result<Seq, BuildError> {
    let unique = find(db, table, index)?.1.unique;
    in_store(db, move |store, stopped| store.fill_index(table, index, stopped)).await?;
    if unique {
        // Before others are held to it: duplicates that are there already are the index's own failure, not theirs.
        in_store(db, move |store, stopped| store.verify_index(table, index, stopped)).await?;
        set_state(db, table, index, IndexState::Verifying, &[]).await?;
    }
    in_store(db, move |store, stopped| store.verify_index(table, index, stopped)).await?;
    set_state(db, table, index, IndexState::Ready, said).await
}

async fn in_store(
    db: &Db,
    work: impl FnOnce(&Store, &dyn Fn() -> bool) -> Result<(), BuildError> + Send + 'static,
) -> Result<(), BuildError> {
    let db = db.clone();
    let work = blocking(move || work(&db.inner.store, &|| db.check_open().is_err()));
    work.await.map_err(|error| BuildError::Wrong(error.to_string()))?
}

fn find(db: &Db, table: TableId, index: IndexId) -> Result<(Arc<Table>, Arc<Index>), BuildError> {
    let catalog = db.inner.store.catalog();
    let table = catalog.table_by_id(table).ok_or(BuildError::Gone)?;
    let index = table.indexes.iter().find(|found| found.id == index).ok_or(BuildError::Gone)?;
    Ok((table.clone(), index.clone()))
}

async fn set_state(
    db: &Db,
    table: TableId,
    index: IndexId,
    state: IndexState,
    said: &[Vec<u8>],
) -> Result<Seq, BuildError> {
    change(db, table, index, said, |index| Some(Index { state, ..Index::clone(index) })).await
}

/// Commits another version of the index, or the table without it.
async fn change(
    db: &Db,
    table: TableId,
    index: IndexId,
    said: &[Vec<u8>],
    to: impl Fn(&Index) -> Option<Index>,
) -> Result<Seq, BuildError> {
    for _ in 0..TRIES {
        // Alone, as other DDL: a write that is planned at this moment would have to be planned again.
        let _alone = db.inner.turn.write().await;
        let snapshot = db.inner.store.snapshot();
        let found = snapshot.catalog().table_by_id(table).ok_or(BuildError::Gone)?;
        let at = found.indexes.iter().position(|found| found.id == index).ok_or(BuildError::Gone)?;
        let mut table = Table::clone(found);
        match to(&table.indexes[at]) {
            Some(index) => table.indexes[at] = Arc::new(index),
            None => drop(table.indexes.remove(at)),
        }
        let (namespace, base) = (table.namespace, snapshot.seq());
        let catalog = vec![CatalogWrite::PutTable(Arc::new(table))];
        let transaction = Transaction { namespace, base, rows: Vec::new(), catalog, receipt: None };
        match db.inner.store.commit_audited(transaction, said.to_vec()).await {
            Err(CommitError::Stale) => {}
            outcome => return outcome.map_err(BuildError::Commit),
        }
    }
    Err(BuildError::Commit(CommitError::Stale))
}

/// Takes away an index that could not be built; what to say about it.
async fn give_up(db: &Db, table: TableId, index: IndexId, error: BuildError) -> DbError {
    let found = find(db, table, index);
    if let Err(left) = change(db, table, index, &[], |_| None).await {
        tracing::warn!(error = %left, index = index.0, "an index that could not be built is left until the next start");
    }
    match (error, found) {
        (BuildError::Duplicate(values), Ok((table, index))) => {
            // Whoever builds an index over the rows of all users still sees none of them.
            let shown = match table.kind {
                TableKind::User => "two rows of one user".to_owned(),
                _ => format!("two rows with {}", dml::show_columns(&table, &index.columns, &values)),
            };
            let message = format!(
                "index {:?} cannot be unique: table {:?} has {shown}. Nothing was made",
                index.name, table.name
            );
            DbError::Sql(SqlError::Constraint { code: "duplicate_key", message })
        }
        (BuildError::Commit(error), _) => DbError::Commit(error),
        (BuildError::Store(error), _) => DbError::Store(error),
        (error, _) => DbError::Internal(error.to_string()),
    }
}
