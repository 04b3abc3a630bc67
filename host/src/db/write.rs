//! The life of a write: gate, plan, commit, acknowledge, publish. Nothing else decides that order.

use std::collections::HashMap;
use std::sync::Arc;

use wire::Scope;

use super::audit::Event;
use super::{Db, DbError, Identity, SqlAnswer, SqlRequest, StatementResult, bulk, index};
use crate::catalog::{Catalog, NamespaceId, Table, TableId, TableKind};
use crate::config::Role;
use crate::sql::{
    ChangeSet, Held, Overlay, Param, Refusal, RequestEnv, Returned, SqlError, Statement, StatementKind, ddl,
};
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
    let work = Work::Statements(statements, &request);
    let outcome = transaction(db, who, request.namespace.as_deref(), &request.params, work).await;
    match outcome.map_err(|failed| failed.error)? {
        Outcome::Committed(planned, seq) => Ok(planned.answer(db, seq)),
        Outcome::Answered(answer) => Ok(answer),
    }
}

/// What a transaction is made of.
#[derive(Clone, Copy)]
pub(super) enum Work<'a> {
    /// Statements and the request they came with.
    Statements(&'a [Statement], &'a SqlRequest),
    /// Rows for a table.
    Rows(&'a bulk::Piece<'a>),
}

/// What became of it.
pub(super) enum Outcome {
    /// The seq of the commit, or of the snapshot when there was nothing to write.
    Committed(Planned, Seq),
    /// The same request was answered before; nothing was written now.
    Answered(SqlAnswer),
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

/// Plans at a snapshot and commits; when other commits came between, again.
pub(super) async fn transaction(
    db: &Db,
    who: &Identity,
    namespace: Option<&str>,
    params: &[Param],
    work: Work<'_>,
) -> Result<Outcome, Failed> {
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
        match work {
            Work::Statements(_, request) => {
                if let Some(answer) = answered(who, request, &snapshot)? {
                    return Ok(Outcome::Answered(answer));
                }
            }
            Work::Rows(piece) => piece.check(who, &snapshot)?,
        }
        let env = db.env(who, snapshot, namespace.map(str::to_owned), params.to_vec())?;
        let default = env.catalog.namespace(&env.namespace).map(|namespace| namespace.id);

        let (mut planned, receipt) = match work {
            Work::Statements(statements, request) => {
                let planned = plan(db, who, statements, env).await?;
                let receipt = receipt(who, request, &planned.affected(request)?)?;
                (planned, receipt)
            }
            Work::Rows(piece) => {
                let planned = bulk::plan(db, who, piece, env).await?;
                let receipt = piece.receipt(who, &planned)?;
                (planned, receipt)
            }
        };
        if planned.is_empty() && receipt.is_none() {
            return Ok(Outcome::Committed(planned, base));
        }
        let namespace = planned.namespace(default)?;
        // Lost to another commit, all of it is planned again: nothing needs these rows twice.
        let rows = std::mem::take(&mut planned.rows);
        let transaction = Transaction { namespace, base, rows, catalog: Vec::new(), receipt };
        // Validated, written, synced, visible, published to live queries, and only then acknowledged.
        match db.inner.store.commit(transaction).await {
            Ok(seq) => return Ok(Outcome::Committed(planned, seq)),
            Err(CommitError::Stale) => continue,
            Err(error) => return Err(DbError::Commit(error).into()),
        }
    }
    Err(DbError::Conflict.into())
}

/// What DDL comes to: done with its commit, or begun with it.
enum Made {
    Now(Seq),
    Later(index::Building),
}

/// CREATE, ALTER and DROP: all statements of the request are one commit.
pub(super) async fn ddl(
    db: &Db,
    who: &Identity,
    statements: &[Statement],
    request: SqlRequest,
) -> Result<SqlAnswer, DbError> {
    if who.role != Role::Admin {
        let (what, object) = statements.first().map(ddl::named).unwrap_or_default();
        let message = "CREATE, ALTER and DROP need the role admin".to_owned();
        return Err(DbError::Forbidden(Box::new(Refusal { what, object, message })));
    }
    for _ in 0..TRIES {
        let alone = db.inner.turn.write().await;
        let snapshot = db.inner.store.snapshot();
        let base = snapshot.seq();
        if let Some(answer) = answered(who, &request, &snapshot)? {
            return Ok(answer);
        }
        let mut env = db.env(who, snapshot, request.namespace.clone(), request.params.clone())?;
        let (mut writes, mut namespace, mut build) = (Vec::new(), None, None);
        let mut said = Vec::new();
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
            let (what, object) = plan.named();
            said.push(Event::done(Some(who), "ddl", what, object).record());
            writes.extend(plan.writes);
            if plan.build.is_some() && statements.len() > 1 {
                return Err(build_beside_others());
            }
            build = build.or(plan.build);
        }
        let results = || statements.iter().map(|_| StatementResult::Affected { affected: 0, returned: None }).collect();
        if build.is_some() && request.idempotency.is_some() {
            return Err(no_receipt("CREATE INDEX", "say CREATE INDEX IF NOT EXISTS: it may be sent again as it is"));
        }
        let receipt = receipt(who, &request, &vec![0; statements.len()])?;
        if namespace.is_none() && receipt.is_some() {
            namespace = env.catalog.namespace(&env.namespace).map(|namespace| namespace.id);
        }
        let Some(namespace) = namespace else {
            return Ok(SqlAnswer { results: results(), seq: base, replayed: false });
        };
        let transaction = Transaction { namespace, base, rows: Vec::new(), catalog: writes, receipt };
        let committed = match build {
            None => {
                let committed = db.inner.store.commit_audited(transaction, said).await;
                committed.map(Made::Now).map_err(DbError::Commit)
            }
            // An index is said to be made when it is: until then it may still be taken away again.
            Some(index) => index::create(db, transaction, index, said).await.map(Made::Later),
        };
        // Writes go on while an index is built.
        drop(alone);
        let seq = match committed {
            Ok(Made::Now(seq)) => seq,
            Ok(Made::Later(building)) => building.await.map_err(|error| DbError::Internal(error.to_string()))??,
            Err(DbError::Commit(CommitError::Stale)) => continue,
            Err(error) => return Err(error),
        };
        return Ok(SqlAnswer { results: results(), seq, replayed: false });
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
pub(super) struct Planned {
    rows: Vec<RowWrite>,
    /// Whether there are any, or were before they went to the store.
    writes: bool,
    /// Of each statement.
    done: Vec<Done>,
    /// The memory of the rows: until their commit is answered, other statements have to do without it.
    held: Vec<Held>,
}

/// What one statement does, beside its rows.
struct Done {
    affected: u64,
    returned: Option<Returned>,
}

impl Planned {
    /// Whether there is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        !self.writes
    }

    /// Only now does the time begin in which what was returned has to be read: a commit that is made is no less made for
    /// having taken long.
    fn answer(self, db: &Db, seq: Seq) -> SqlAnswer {
        let result = |done: Done| StatementResult::Affected {
            affected: done.affected,
            returned: done.returned.map(|returned| db.inner.sql.returned(returned)),
        };
        SqlAnswer { results: self.done.into_iter().map(result).collect(), seq, replayed: false }
    }

    /// Of each statement, for the receipt, which has no room for rows.
    fn affected(&self, request: &SqlRequest) -> Result<Vec<u64>, DbError> {
        if request.idempotency.is_some() && self.done.iter().any(|done| done.returned.is_some()) {
            return Err(no_receipt("RETURNING", "read the rows with a query of its own"));
        }
        Ok(self.done.iter().map(|done| done.affected).collect())
    }

    /// Of all statements together.
    pub(super) fn all_affected(&self) -> u64 {
        self.done.iter().map(|done| done.affected).sum()
    }

    /// `default` where nothing is written.
    fn namespace(&self, default: Option<NamespaceId>) -> Result<NamespaceId, DbError> {
        let first = self.rows.first().map(|row| row.table.namespace).or(default);
        let first = first.ok_or_else(|| DbError::Internal("a write in no namespace".into()))?;
        if self.rows.iter().all(|row| row.table.namespace == first) { Ok(first) } else { Err(two_namespaces()) }
    }
}

async fn plan(db: &Db, who: &Identity, statements: &[Statement], env: RequestEnv) -> Result<Planned, DbError> {
    let mut merge = Merge::new(env);
    for statement in statements {
        // Before anything is read: whether rows match must make no difference to who may not write them.
        let env = merge.env()?.clone();
        may_write(who, &*db.inner.sql.written_table(statement, &env)?)?;
        merge.add(db.inner.sql.change_set(statement, env).await?);
    }
    Ok(merge.finish())
}

/// The statements of a transaction, one after the other: each sees what those before it do.
pub(super) struct Merge {
    env: RequestEnv,
    planned: Planned,
    /// Where in `planned` a key is, of those that the next statement sees.
    places: HashMap<(TableId, Scope, Vec<u8>), usize>,
    /// Where in `planned` is what it does not see yet: the last statement's is not looked at by anybody.
    unseen: Vec<usize>,
}

impl Merge {
    pub(super) fn new(env: RequestEnv) -> Merge {
        Merge { env, planned: Planned::default(), places: HashMap::new(), unseen: Vec::new() }
    }

    /// What the next statement sees.
    pub(super) fn env(&mut self) -> Result<&RequestEnv, DbError> {
        let overlay = Arc::make_mut(&mut self.env.overlay);
        for at in self.unseen.drain(..) {
            let write = &self.planned.rows[at];
            if let Some(held) = self.planned.held.last() {
                let image = write.new.as_ref().map_or(0, Vec::len);
                held.grow(2 * (write.key.len() + size_of::<Scope>()) + image)?;
            }
            overlay.put(write);
            self.places.insert((write.table.id, write.scope.clone(), write.key.clone()), at);
        }
        Ok(&self.env)
    }

    /// What the next statement does; it has been looked at whether it may.
    pub(super) fn add(&mut self, changes: ChangeSet) {
        self.planned.done.push(Done { affected: changes.affected, returned: changes.returned });
        self.planned.held.extend(changes.held);
        for write in changes.writes {
            let place = match self.places.is_empty() {
                true => None,
                false => self.places.get(&(write.table.id, write.scope.clone(), write.key.clone())),
            };
            match place {
                // The first statement saw the row as it is stored; the last one says what it shall be.
                Some(&at) => {
                    self.planned.rows[at].new = write.new;
                    self.unseen.push(at);
                }
                None => {
                    self.unseen.push(self.planned.rows.len());
                    self.planned.rows.push(write);
                }
            }
        }
    }

    pub(super) fn finish(mut self) -> Planned {
        self.planned.rows.retain(|row| row.old != row.new);
        self.planned.writes = !self.planned.rows.is_empty();
        self.planned
    }
}

/// Own rows of user tables belong to everybody; shared and stream tables are written by services and admins.
pub(super) fn may_write(who: &Identity, table: &Table) -> Result<(), DbError> {
    if table.kind == TableKind::User || who.role != Role::User {
        return Ok(());
    }
    let message = format!(
        "the role user may not write the {} table \"{}\"; use a token of role service or admin",
        table.kind.as_str(),
        table.name
    );
    let object = format!("{}.{}", table.namespace_name, table.name);
    Err(DbError::Forbidden(Box::new(Refusal { what: "write", object, message })))
}

/// Building takes several commits and may fail: then the others would stand alone.
fn build_beside_others() -> DbError {
    DbError::Sql(SqlError::Unsupported {
        what: "CREATE INDEX on a table that may have rows, beside other statements".into(),
        hint: Some("send it as a request of its own".into()),
        position: None,
    })
}

/// What cannot be answered a second time from what is kept of the first.
fn no_receipt(what: &str, hint: &str) -> DbError {
    DbError::Sql(SqlError::Unsupported {
        what: format!("{what} in a request with an Idempotency-Key"),
        hint: Some(hint.into()),
        position: None,
    })
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
