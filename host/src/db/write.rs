//! The life of a write: gate, plan, commit, acknowledge, publish. Nothing else decides that order.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::record_batch::RecordBatch;
use wire::Scope;

use super::{Db, DbError, Identity, SqlAnswer, SqlRequest, StatementResult, bulk};
use crate::catalog::{Catalog, Table, TableId, TableKind};
use crate::config::Role;
use crate::sql::{ChangeSet, Overlay, Param, RequestEnv, SqlError, Statement, StatementKind};
use crate::store::{CommitError, RowWrite, Seq, Transaction};

/// A writer that lost this often takes its turn alone, and then cannot lose.
const SHARED_TRIES: u32 = 3;

/// Alone, only DDL and plugin commits of the same moment can be in the way.
const TRIES: u32 = 8;

/// All statements of a request are of one kind; a mixture is refused by name.
pub(super) fn one_kind(statements: &[Statement]) -> Result<StatementKind, DbError> {
    let Some(first) = statements.first() else {
        return Err(DbError::BadRequest("the request has no SQL statement".into()));
    };
    if statements.iter().all(|statement| statement.kind == first.kind) {
        return Ok(first.kind);
    }
    Err(DbError::Sql(SqlError::Unsupported {
        what: "mixing queries, data changes and DDL in one request".into(),
        hint: Some("send them as separate requests".into()),
        position: None,
    }))
}

/// INSERT, UPDATE, DELETE: all statements are one transaction, one commit, at most one change per key.
pub(super) async fn dml(
    db: &Db,
    who: &Identity,
    statements: &[Statement],
    request: SqlRequest,
) -> Result<SqlAnswer, DbError> {
    let work = Work::Statements(statements);
    let (planned, seq) = transaction(db, who, request.namespace.as_deref(), &request.params, work)
        .await
        .map_err(|failed| failed.error)?;
    Ok(planned.answer(seq))
}

/// What a transaction is made of.
#[derive(Clone, Copy)]
pub(super) enum Work<'a> {
    Statements(&'a [Statement]),
    /// Rows for a table.
    Rows(&'a str, &'a Arc<[RecordBatch]>),
}

/// Why there is no transaction, and which of its rows (from 0) is to blame, where it is about rows.
pub(super) struct Failed {
    pub(super) error: DbError,
    pub(super) row: Option<usize>,
}

impl From<DbError> for Failed {
    fn from(error: DbError) -> Failed {
        Failed { error, row: None }
    }
}

/// Plans at a snapshot and commits; when other commits came between, again. Answers the seq of the commit, or of the
/// snapshot when there was nothing to write.
pub(super) async fn transaction(
    db: &Db,
    who: &Identity,
    namespace: Option<&str>,
    params: &[Param],
    work: Work<'_>,
) -> Result<(Planned, Seq), Failed> {
    for attempt in 0..TRIES {
        // Held from the snapshot to the commit. Alone, no other transaction is in flight and this one must win.
        let (_shared, _alone);
        if attempt < SHARED_TRIES {
            _shared = db.inner.turn.read().await;
        } else {
            _alone = db.inner.turn.write().await;
        }
        let snapshot = db.inner.store.snapshot();
        let base = snapshot.seq();
        let env = db.env(who, snapshot, namespace.map(str::to_owned), params.to_vec())?;

        let planned = match work {
            Work::Statements(statements) => plan(db, who, statements, env).await?,
            Work::Rows(table, batches) => bulk::plan(db, who, table, batches, env).await?,
        };
        if planned.rows.is_empty() {
            return Ok((planned, base));
        }
        let namespace = planned.namespace()?;
        let transaction = Transaction { namespace, base, rows: planned.rows.to_vec(), catalog: Vec::new() };
        // Validated, written, synced, visible, published to live queries, and only then acknowledged.
        match db.inner.store.commit(transaction).await {
            Ok(seq) => return Ok((planned, seq)),
            Err(CommitError::Stale) => continue,
            Err(error) => return Err(DbError::Commit(error).into()),
        }
    }
    Err(DbError::Conflict.into())
}

/// CREATE and DROP: all statements of the request are one commit.
pub(super) async fn ddl(
    db: &Db,
    who: &Identity,
    statements: &[Statement],
    request: SqlRequest,
) -> Result<SqlAnswer, DbError> {
    if who.role != Role::Admin {
        return Err(DbError::Forbidden("CREATE and DROP need the role admin".into()));
    }
    for _ in 0..TRIES {
        let _alone = db.inner.turn.write().await;
        let snapshot = db.inner.store.snapshot();
        let base = snapshot.seq();
        let mut env = db.env(who, snapshot, request.namespace.clone(), request.params.clone())?;
        let (mut writes, mut namespace) = (Vec::new(), None);
        for statement in statements {
            let plan = db.inner.sql.ddl(statement, &env)?;
            // The next statement sees what this one made.
            let mut catalog = Catalog::clone(&env.catalog);
            plan.writes.iter().for_each(|write| write.apply(&mut catalog));
            env.catalog = Arc::new(catalog);
            if plan.writes.is_empty() {
                continue;
            }
            if namespace.is_some() && namespace != plan.namespace {
                return Err(two_namespaces());
            }
            namespace = plan.namespace;
            writes.extend(plan.writes);
        }
        let results = || statements.iter().map(|_| StatementResult::Affected { affected: 0 }).collect();
        let Some(namespace) = namespace else {
            return Ok(SqlAnswer { results: results(), seq: base });
        };
        let transaction = Transaction { namespace, base, rows: Vec::new(), catalog: writes };
        match db.inner.store.commit(transaction).await {
            Ok(seq) => return Ok(SqlAnswer { results: results(), seq }),
            Err(CommitError::Stale) => continue,
            Err(error) => return Err(DbError::Commit(error)),
        }
    }
    Err(DbError::Conflict)
}

/// What a transaction does: its net effect by key, in the order the keys were first touched.
#[derive(Default)]
pub(super) struct Planned {
    rows: Vec<RowWrite>,
    affected: Vec<u64>,
}

impl Planned {
    /// Whether there is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    fn answer(&self, seq: Seq) -> SqlAnswer {
        let results = self.affected.iter().map(|&affected| StatementResult::Affected { affected }).collect();
        SqlAnswer { results, seq }
    }

    fn namespace(&self) -> Result<crate::catalog::NamespaceId, DbError> {
        let first = self.rows[0].table.namespace;
        if self.rows.iter().all(|row| row.table.namespace == first) { Ok(first) } else { Err(two_namespaces()) }
    }
}

async fn plan(db: &Db, who: &Identity, statements: &[Statement], env: RequestEnv) -> Result<Planned, DbError> {
    let mut merge = Merge::new(env);
    for statement in statements {
        let changes = db.inner.sql.change_set(statement, merge.env().clone()).await?;
        merge.add(who, changes)?;
    }
    Ok(merge.finish())
}

/// The statements of a transaction, one after the other: each sees what those before it do.
pub(super) struct Merge {
    env: RequestEnv,
    planned: Planned,
    /// Where in `planned` a key is.
    index: HashMap<(TableId, Scope, Vec<u8>), usize>,
}

impl Merge {
    pub(super) fn new(env: RequestEnv) -> Merge {
        Merge { env, planned: Planned::default(), index: HashMap::new() }
    }

    /// What the next statement sees.
    pub(super) fn env(&self) -> &RequestEnv {
        &self.env
    }

    pub(super) fn add(&mut self, who: &Identity, changes: ChangeSet) -> Result<(), DbError> {
        self.planned.affected.push(changes.affected);
        let overlay = Arc::make_mut(&mut self.env.overlay);
        for write in changes.writes {
            may_write(who, &write.table)?;
            overlay.put(&write);
            let key = (write.table.id, write.scope.clone(), write.key.clone());
            match self.index.get(&key) {
                // The first statement saw the row as it is stored; the last one says what it shall be.
                Some(&at) => self.planned.rows[at].new = write.new,
                None => {
                    self.index.insert(key, self.planned.rows.len());
                    self.planned.rows.push(write);
                }
            }
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> Planned {
        self.planned.rows.retain(|row| row.old != row.new);
        self.planned
    }
}

/// Own rows of user tables belong to everybody; shared tables are written by services and admins.
pub(super) fn may_write(who: &Identity, table: &Table) -> Result<(), DbError> {
    if table.kind == TableKind::User || who.role != Role::User {
        return Ok(());
    }
    Err(DbError::Forbidden(format!(
        "the role user may not write the shared table \"{}\"; use a token of role service or admin",
        table.name
    )))
}

fn two_namespaces() -> DbError {
    DbError::Sql(SqlError::Unsupported {
        what: "one transaction over two namespaces".into(),
        hint: Some("send one request per namespace".into()),
        position: None,
    })
}

impl Overlay {
    fn put(&mut self, write: &RowWrite) {
        let rows = self.rows.entry((write.table.id, write.scope.clone())).or_default();
        rows.insert(write.key.clone(), write.new.clone());
    }
}
