//! Rows in many: committed in pieces of a bounded size, each a transaction of its own.

mod progress;

use std::collections::VecDeque;
use std::sync::Arc;

use arrow::record_batch::RecordBatch;

use self::progress::{Kept, Progress};
use super::write::{self, Failed, Merge, Outcome, Planned, Work};
use super::{Db, DbError, Idempotency, Identity, blocking};
use crate::sql::{OutputColumn, RequestEnv, RowConflict, RowFailure};
use crate::store::snapshot::Snapshot;
use crate::store::{Receipt, Seq};

/// Bytes of a commit: large enough that its sync costs little by the row, small enough to be held many times over.
const COMMIT_BYTES: usize = 2 << 20;
/// What a row takes besides its values: key, headers, one place a column.
const ROW_BYTES: usize = 64;
const CELL_BYTES: usize = 8;

/// Rows that are held back until the body has proved to be the one that its key began with. An honest one has proved it
/// with what one more read brings; another one must not fill the memory.
const UNPROVEN_BYTES: usize = 32 << 20;
/// What a row takes of that besides its values.
const UNPROVEN_ROW_BYTES: usize = 16;

/// Some rows, their columns named as the table's.
pub struct BulkRows {
    pub batch: RecordBatch,
    /// Where each row stands in what the client sent; empty where there are no lines.
    pub lines: Vec<u64>,
    /// About what the values take.
    pub bytes: usize,
}

/// How rows are taken.
#[derive(Clone, Debug, Default)]
pub struct BulkOptions {
    pub conflict: RowConflict,
    /// It may be sent again, from its start.
    pub idempotency: Option<Idempotency>,
}

/// What is committed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BulkReport {
    /// Taken, from the first on.
    pub rows: u64,
    /// Those of them that were inserted or updated.
    pub affected: u64,
    pub commits: u64,
    /// Of the last commit.
    pub seq: Option<Seq>,
    /// All of it was done before, and nothing now.
    pub replayed: bool,
}

/// Why it went no further: the commits before stay.
#[derive(Debug)]
pub struct BulkFailure {
    pub error: DbError,
    /// From 1, of all rows.
    pub row: Option<u64>,
    pub line: Option<u64>,
}

impl From<DbError> for BulkFailure {
    fn from(error: DbError) -> BulkFailure {
        BulkFailure { error, row: None, line: None }
    }
}

/// A bulk insert under way. What was not committed when it is dropped never was.
pub struct BulkInsert {
    db: Db,
    who: Identity,
    namespace: String,
    table: String,
    conflict: RowConflict,
    columns: Vec<OutputColumn>,
    /// What each weighs stands in `bytes`.
    waiting: VecDeque<BulkRows>,
    waiting_bytes: usize,
    unproven_bytes: usize,
    commit_bytes: usize,
    /// Rows still to be left out: an earlier request has committed them.
    skip: u64,
    progress: Option<Progress>,
    /// No row comes any more.
    ended: bool,
    report: BulkReport,
}

impl Db {
    /// Begins a bulk insert; who may not write the table is told so before a byte is read.
    pub fn bulk_insert(
        &self,
        who: &Identity,
        namespace: &str,
        table: &str,
        options: BulkOptions,
    ) -> Result<BulkInsert, DbError> {
        self.check_open()?;
        let env = self.env(who, self.inner.store.snapshot(), Some(namespace.to_owned()), Vec::new())?;
        let Some(found) = env.catalog.table(namespace, table) else {
            return Err(DbError::NotFound(format!(
                "there is no table {table:?} in namespace {namespace:?}; SHOW TABLES lists those that there are"
            )));
        };
        write::may_write(who, found)?;
        if options.conflict == RowConflict::Update && found.generated_key {
            return Err(DbError::BadRequest(format!(
                "table {table:?} has no primary key of its own, so no row is there already: leave out on_conflict=update"
            )));
        }
        let (progress, report) = match options.idempotency {
            None => (None, BulkReport::default()),
            Some(idempotency) => {
                let (progress, report) = Progress::find(idempotency, who, &env.snapshot)?;
                (Some(progress), report)
            }
        };
        Ok(BulkInsert {
            db: self.clone(),
            who: who.clone(),
            namespace: namespace.to_owned(),
            table: table.to_owned(),
            conflict: options.conflict,
            columns: self.inner.sql.insert_columns(found),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            unproven_bytes: 0,
            commit_bytes: COMMIT_BYTES.min(self.inner.store.max_commit_bytes() / 4),
            skip: report.rows,
            progress,
            ended: false,
            report,
        })
    }
}

impl BulkInsert {
    /// The columns that rows may name.
    pub fn columns(&self) -> &[OutputColumn] {
        &self.columns
    }

    pub fn report(&self) -> BulkReport {
        self.report
    }

    /// The next bytes of the body, before the rows in them: a body that is sent again has to be the same.
    pub fn read(&mut self, bytes: &[u8]) -> Result<(), BulkFailure> {
        match &mut self.progress {
            Some(progress) => Ok(progress.read(bytes)?),
            None => Ok(()),
        }
    }

    /// Takes rows, and commits when enough of them wait.
    pub async fn add(&mut self, rows: BulkRows) -> Result<(), BulkFailure> {
        let count = rows.batch.num_rows();
        let weight = ROW_BYTES + CELL_BYTES * self.columns.len() + rows.bytes / count.max(1);
        // At least one: a row too large for a commit is refused by the commit.
        let piece = (self.commit_bytes / weight).max(1);
        let done = usize::try_from(self.skip).unwrap_or(usize::MAX).min(count);
        self.skip -= done as u64;
        if !self.may_commit() {
            if self.unproven_bytes > UNPROVEN_BYTES {
                return Err(DbError::KeyReused.into());
            }
            self.unproven_bytes += (rows.bytes / count.max(1) + UNPROVEN_ROW_BYTES) * (count - done);
        }
        for start in (done..count).step_by(piece) {
            let length = piece.min(count - start);
            let lines = rows.lines.get(start..start + length).unwrap_or_default().to_vec();
            let batch = rows.batch.slice(start, length);
            self.waiting.push_back(BulkRows { batch, lines, bytes: weight * length });
            self.waiting_bytes += weight * length;
            while self.waiting_bytes >= self.commit_bytes && self.may_commit() {
                self.commit().await?;
            }
        }
        Ok(())
    }

    /// Nothing is written for a body that is not known to be the one that was begun under its key.
    fn may_commit(&self) -> bool {
        self.progress.as_ref().is_none_or(Progress::is_proven)
    }

    /// Commits the rest.
    pub async fn finish(&mut self) -> Result<BulkReport, BulkFailure> {
        if let Some(progress) = &mut self.progress {
            progress.end()?;
            if progress.is_complete() {
                self.report.replayed = true;
                return Ok(self.report);
            }
        }
        self.ended = true;
        // Also with no row left, where a key is to be told that all was done.
        while !self.waiting.is_empty() || self.progress.as_ref().is_some_and(|progress| !progress.is_complete()) {
            self.commit().await?;
        }
        Ok(self.report)
    }

    /// Commits what waits, or as much of it as fits one commit.
    async fn commit(&mut self) -> Result<(), BulkFailure> {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while bytes < self.commit_bytes
            && let Some(rows) = self.waiting.pop_front()
        {
            bytes += rows.bytes;
            taken.push(rows);
        }
        self.waiting_bytes -= bytes;
        // A body may be long: the server does not wait for its end when it goes down.
        self.db.check_open()?;
        let piece = Piece {
            table: &self.table,
            conflict: self.conflict,
            batches: taken.iter().map(|rows| rows.batch.clone()).collect(),
            before: self.report,
            progress: self.progress.as_ref(),
            last: self.ended && self.waiting.is_empty(),
        };
        match write::transaction(&self.db, &self.who, Some(&self.namespace), &[], Work::Rows(&piece)).await {
            // Only requests of statements are answered from before.
            Ok(Outcome::Answered(_)) => Err(DbError::Internal("rows were answered as statements".into()).into()),
            Ok(Outcome::Committed(planned, seq)) => {
                let kept = piece.left(&planned);
                self.report = BulkReport { seq: Some(seq), ..piece.after(&planned) };
                if let (Some(progress), Some(kept)) = (&mut self.progress, kept) {
                    progress.goes_on_from(kept);
                }
                Ok(())
            }
            Err(Failed { error, row }) => {
                let mut lines = taken.iter().flat_map(|rows| &rows.lines);
                let line = row.and_then(|row| lines.nth(row).copied());
                let row = row.map(|row| self.report.rows + row as u64 + 1);
                Err(BulkFailure { error, row, line })
            }
        }
    }
}

/// Rows that are one transaction.
pub(super) struct Piece<'a> {
    table: &'a str,
    conflict: RowConflict,
    batches: Arc<[RecordBatch]>,
    before: BulkReport,
    progress: Option<&'a Progress>,
    /// Nothing comes behind it.
    last: bool,
}

impl Piece<'_> {
    /// Refuses to go on where another request with the same key has gone on meanwhile.
    pub(super) fn check(&self, who: &Identity, snapshot: &Snapshot) -> Result<(), DbError> {
        self.progress.map_or(Ok(()), |progress| progress.check(who, snapshot))
    }

    /// What it leaves behind beside its rows.
    pub(super) fn receipt(&self, who: &Identity, planned: &Planned) -> Result<Option<Receipt>, DbError> {
        let left = self.progress.zip(self.left(planned));
        left.map(|(progress, kept)| progress.receipt(who, &kept)).transpose()
    }

    fn left(&self, planned: &Planned) -> Option<Kept> {
        self.progress.map(|progress| progress.left(&self.after(planned), self.last))
    }

    fn after(&self, planned: &Planned) -> BulkReport {
        let rows: usize = self.batches.iter().map(RecordBatch::num_rows).sum();
        BulkReport {
            rows: self.before.rows + rows as u64,
            affected: self.before.affected + planned.all_affected(),
            commits: self.before.commits + u64::from(!planned.is_empty()),
            ..self.before
        }
    }
}

/// Off the async threads: each row is looked up in the store.
pub(super) async fn plan(db: &Db, who: &Identity, piece: &Piece<'_>, env: RequestEnv) -> Result<Planned, Failed> {
    if let Some(table) = env.catalog.table(&env.namespace, piece.table) {
        // Another one than at the beginning may have its name now.
        write::may_write(who, table)?;
    }
    let (sql, table, conflict) = (db.inner.sql.clone(), piece.table.to_owned(), piece.conflict);
    let batches = piece.batches.clone();
    blocking(move || {
        let mut merge = Merge::new(env);
        let mut before = 0;
        // Batches of other columns are another statement: it sees the rows of those before it.
        for group in batches.chunk_by(|a, b| a.schema_ref().fields() == b.schema_ref().fields()) {
            let changes = sql.insert_rows(merge.env()?, &table, conflict, group);
            let changes = changes.map_err(|failure: RowFailure| Failed {
                error: failure.error.into(),
                row: failure.row.map(|row| before + row),
            })?;
            merge.add(changes);
            before += group.iter().map(RecordBatch::num_rows).sum::<usize>();
        }
        Ok(merge.finish())
    })
    .await?
}
