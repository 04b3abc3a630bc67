//! The life of a write: gate, plan, commit, acknowledge, publish. Nothing else decides that order.

use std::collections::HashMap;
use std::sync::Arc;

use wire::Scope;

use super::{Db, DbError, Identity, SqlAnswer, SqlRequest, StatementResult};
use crate::catalog::{Catalog, NamespaceId, TableId, TableKind};
use crate::config::Role;
use crate::sql::{Overlay, RequestEnv, SqlError, Statement, StatementKind};
use crate::store::snapshot::Snapshot;
use crate::store::{CommitError, Receipt, RowWrite, Seq, Transaction};

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
    // Refused at once rather than queued without end: the client knows best how long it wants to wait.
    let _under_way = db.inner.writes.try_acquire().map_err(|_| DbError::Commit(CommitError::Busy))?;
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
        if let Some(answer) = answered(who, &request, &snapshot)? {
            return Ok(answer);
        }
        let env = db.env(who, snapshot, request.namespace.clone(), request.params.clone())?;
        let default = env.catalog.namespace(&env.namespace).map(|namespace| namespace.id);

        let planned = plan(db, who, statements, env).await?;
        let receipt = receipt(who, &request, &planned.affected)?;
        if planned.rows.is_empty() && receipt.is_none() {
            return Ok(planned.answer(base));
        }
        let namespace = planned.namespace(default)?;
        let transaction = Transaction { namespace, base, rows: planned.rows.to_vec(), catalog: Vec::new(), receipt };
        // Validated, written, synced, visible, published to live queries, and only then acknowledged.
        match db.inner.store.commit(transaction).await {
            Ok(seq) => return Ok(planned.answer(seq)),
            Err(CommitError::Stale) => continue,
            Err(error) => return Err(DbError::Commit(error)),
        }
    }
    Err(DbError::Conflict)
}

/// CREATE, ALTER and DROP: all statements of the request are one commit.
pub(super) async fn ddl(
    db: &Db,
    who: &Identity,
    statements: &[Statement],
    request: SqlRequest,
) -> Result<SqlAnswer, DbError> {
    if who.role != Role::Admin {
        return Err(DbError::Forbidden("CREATE, ALTER and DROP need the role admin".into()));
    }
    for _ in 0..TRIES {
        let _alone = db.inner.turn.write().await;
        let snapshot = db.inner.store.snapshot();
        let base = snapshot.seq();
        if let Some(answer) = answered(who, &request, &snapshot)? {
            return Ok(answer);
        }
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
        let receipt = receipt(who, &request, &vec![0; statements.len()])?;
        if namespace.is_none() && receipt.is_some() {
            namespace = env.catalog.namespace(&env.namespace).map(|namespace| namespace.id);
        }
        let Some(namespace) = namespace else {
            return Ok(SqlAnswer { results: results(), seq: base, replayed: false });
        };
        let transaction = Transaction { namespace, base, rows: Vec::new(), catalog: writes, receipt };
        match db.inner.store.commit(transaction).await {
            Ok(seq) => return Ok(SqlAnswer { results: results(), seq, replayed: false }),
            Err(CommitError::Stale) => continue,
            Err(error) => return Err(DbError::Commit(error)),
        }
    }
    Err(DbError::Conflict)
}

/// What the same request was answered before, if it says that it may be sent twice.
fn answered(who: &Identity, request: &SqlRequest, snapshot: &Snapshot) -> Result<Option<SqlAnswer>, DbError> {
    request.idempotency.as_ref().map_or(Ok(None), |idempotency| idempotency.answered(who, snapshot))
}

fn receipt(who: &Identity, request: &SqlRequest, affected: &[u64]) -> Result<Option<Receipt>, DbError> {
    request.idempotency.as_ref().map(|idempotency| idempotency.receipt(who, affected)).transpose()
}

/// What a transaction does: its net effect by key, in the order the keys were first touched.
#[derive(Default)]
struct Planned {
    rows: Vec<RowWrite>,
    affected: Vec<u64>,
}

impl Planned {
    fn answer(&self, seq: Seq) -> SqlAnswer {
        let results = self.affected.iter().map(|&affected| StatementResult::Affected { affected }).collect();
        SqlAnswer { results, seq, replayed: false }
    }

    /// `default` where nothing is written.
    fn namespace(&self, default: Option<NamespaceId>) -> Result<NamespaceId, DbError> {
        let first = self.rows.first().map(|row| row.table.namespace).or(default);
        let first = first.ok_or_else(|| DbError::Internal("a write in no namespace".into()))?;
        if self.rows.iter().all(|row| row.table.namespace == first) { Ok(first) } else { Err(two_namespaces()) }
    }
}

async fn plan(db: &Db, who: &Identity, statements: &[Statement], mut env: RequestEnv) -> Result<Planned, DbError> {
    let mut planned = Planned::default();
    let mut index: HashMap<(TableId, Scope, Vec<u8>), usize> = HashMap::new();
    for statement in statements {
        let changes = db.inner.sql.change_set(statement, env.clone()).await?;
        planned.affected.push(changes.affected);
        let overlay = Arc::make_mut(&mut env.overlay);
        for write in changes.writes {
            may_write(who, &write)?;
            overlay.put(&write);
            let key = (write.table.id, write.scope.clone(), write.key.clone());
            match index.get(&key) {
                // The first statement saw the row as it is stored; the last one says what it shall be.
                Some(&at) => planned.rows[at].new = write.new,
                None => {
                    index.insert(key, planned.rows.len());
                    planned.rows.push(write);
                }
            }
        }
    }
    planned.rows.retain(|row| row.old != row.new);
    Ok(planned)
}

/// Own rows of user tables belong to everybody; shared and stream tables are written by services and admins.
fn may_write(who: &Identity, write: &RowWrite) -> Result<(), DbError> {
    if write.table.kind == TableKind::User || who.role != Role::User {
        return Ok(());
    }
    Err(DbError::Forbidden(format!(
        "the role user may not write the {} table \"{}\"; use a token of role service or admin",
        write.table.kind.as_str(),
        write.table.name
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
