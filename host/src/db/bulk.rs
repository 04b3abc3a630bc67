//! Rows in many: committed in pieces of a bounded size, each a transaction of its own.

use std::sync::Arc;

use arrow::record_batch::RecordBatch;

use super::write::{self, Failed, Merge, Outcome, Planned, Work};
use super::{Db, DbError, Identity, blocking};
use crate::sql::{OutputColumn, RequestEnv, RowFailure};
use crate::store::Seq;

/// Bytes of a commit: large enough that its sync costs little by the row, small enough to be held many times over.
const COMMIT_BYTES: usize = 2 << 20;
/// What a row takes besides its values: key, headers, one place a column.
const ROW_BYTES: usize = 64;
const CELL_BYTES: usize = 8;

/// Some rows, their columns named as the table's.
pub struct BulkRows {
    pub batch: RecordBatch,
    /// Where each row stands in what the client sent; empty where there are no lines.
    pub lines: Vec<u64>,
    /// About what the values take.
    pub bytes: usize,
}

/// What is committed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BulkReport {
    pub rows: u64,
    pub commits: u64,
    /// Of the last commit.
    pub seq: Option<Seq>,
}

/// Why it went no further: the commits before stay.
#[derive(Debug)]
pub struct BulkFailure {
    pub error: DbError,
    /// From 1, of all rows.
    pub row: Option<u64>,
    pub line: Option<u64>,
}

/// A bulk insert under way. What was not committed when it is dropped never was.
pub struct BulkInsert {
    db: Db,
    who: Identity,
    namespace: String,
    table: String,
    columns: Vec<OutputColumn>,
    waiting: Vec<BulkRows>,
    waiting_bytes: usize,
    commit_bytes: usize,
    report: BulkReport,
}

impl Db {
    /// Begins a bulk insert; who may not write the table is told so before a byte is read.
    pub fn bulk_insert(&self, who: &Identity, namespace: &str, table: &str) -> Result<BulkInsert, DbError> {
        self.check_open()?;
        let env = self.env(who, self.inner.store.snapshot(), Some(namespace.to_owned()), Vec::new())?;
        let Some(found) = env.catalog.table(namespace, table) else {
            return Err(DbError::NotFound(format!("there is no table {table:?} in namespace {namespace:?}")));
        };
        write::may_write(who, found)?;
        Ok(BulkInsert {
            db: self.clone(),
            who: who.clone(),
            namespace: namespace.to_owned(),
            table: table.to_owned(),
            columns: self.inner.sql.insert_columns(found),
            waiting: Vec::new(),
            waiting_bytes: 0,
            commit_bytes: COMMIT_BYTES.min(self.inner.store.max_commit_bytes() / 4),
            report: BulkReport::default(),
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

    /// Takes rows, and commits when enough of them wait.
    pub async fn add(&mut self, rows: BulkRows) -> Result<(), BulkFailure> {
        let weight = ROW_BYTES + CELL_BYTES * self.columns.len() + rows.bytes / rows.batch.num_rows().max(1);
        // At least one: a row too large for a commit is refused by the commit.
        let piece = (self.commit_bytes / weight).max(1);
        for start in (0..rows.batch.num_rows()).step_by(piece) {
            let length = piece.min(rows.batch.num_rows() - start);
            let lines = rows.lines.get(start..start + length).unwrap_or_default().to_vec();
            self.waiting.push(BulkRows { batch: rows.batch.slice(start, length), lines, bytes: 0 });
            self.waiting_bytes += weight * length;
            if self.waiting_bytes >= self.commit_bytes {
                self.commit().await?;
            }
        }
        Ok(())
    }

    /// Commits the rest.
    pub async fn finish(&mut self) -> Result<BulkReport, BulkFailure> {
        self.commit().await?;
        Ok(self.report)
    }

    async fn commit(&mut self) -> Result<(), BulkFailure> {
        let waiting = std::mem::take(&mut self.waiting);
        self.waiting_bytes = 0;
        if waiting.is_empty() {
            return Ok(());
        }
        // A body may be long: the server does not wait for its end when it goes down.
        self.db.check_open().map_err(|error| BulkFailure { error, row: None, line: None })?;
        let batches: Arc<[RecordBatch]> = waiting.iter().map(|rows| rows.batch.clone()).collect();
        let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
        let work = Work::Rows(&self.table, &batches);
        match write::transaction(&self.db, &self.who, Some(&self.namespace), &[], work).await {
            // Rows come without a request that could have been answered before.
            Ok(Outcome::Answered(answer)) => {
                self.report.seq = Some(answer.seq);
                Ok(())
            }
            Ok(Outcome::Committed(planned, seq)) => {
                self.report.rows += rows as u64;
                self.report.commits += u64::from(!planned.is_empty());
                self.report.seq = Some(seq);
                Ok(())
            }
            Err(Failed { error, row }) => {
                let mut lines = waiting.iter().flat_map(|rows| &rows.lines);
                let line = row.and_then(|row| lines.nth(row).copied());
                let row = row.map(|row| self.report.rows + row as u64 + 1);
                Err(BulkFailure { error, row, line })
            }
        }
    }
}

/// Off the async threads: each row is looked up in the store.
pub(super) async fn plan(
    db: &Db,
    who: &Identity,
    table: &str,
    batches: &Arc<[RecordBatch]>,
    env: RequestEnv,
) -> Result<Planned, Failed> {
    let (sql, who, table, batches) = (db.inner.sql.clone(), who.clone(), table.to_owned(), batches.clone());
    blocking(move || {
        let mut merge = Merge::new(env);
        let mut before = 0;
        // Batches of other columns are another statement: it sees the rows of those before it.
        for group in batches.chunk_by(|a, b| a.schema_ref().fields() == b.schema_ref().fields()) {
            let changes = sql.insert_rows(merge.env(), &table, group).map_err(|failure: RowFailure| Failed {
                error: failure.error.into(),
                row: failure.row.map(|row| before + row),
            })?;
            merge.add(&who, changes)?;
            before += group.iter().map(RecordBatch::num_rows).sum::<usize>();
        }
        Ok(merge.finish())
    })
    .await?
}
