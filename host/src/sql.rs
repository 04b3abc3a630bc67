//! DataFusion: the token gate, planning, streaming scans, DML as change sets, compiled live predicates.

pub mod arrow;
pub mod concat;
pub mod context;
pub mod ddl;
mod decimals;
mod dialect;
pub mod dml;
pub mod error;
mod exact;
pub mod functions;
pub mod gate;
pub mod information;
pub mod json;
pub mod json_row;
mod leaf;
pub mod live;
pub mod lookup;
mod mixed;
mod narrow;
mod or_null;
pub mod planner;
pub mod plans;
mod pool;
pub mod provider;
pub mod range;
mod row_exprs;
mod runner;
pub mod session;
mod show;
pub mod statement;
mod sum;
pub mod system;
#[cfg(test)]
mod tests;
mod times;
pub mod values;
mod weighed;
mod yielding;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use ::arrow::record_batch::RecordBatch;
use futures::Stream;
use wire::{Scope, Type, Value};

use crate::catalog::{Catalog, DEFAULT_NAMESPACE, IndexId, TableId};
use crate::config::Role;
pub use crate::config::SqlOptions;
use crate::store::snapshot::Snapshot;
use crate::store::{CatalogWrite, RowWrite, StoreError};
pub use pool::Held;

#[derive(Debug, thiserror::Error)]
pub enum SqlError {
    /// Not SQL, or a name that does not exist, or types that do not fit: `position` is a byte offset where known.
    #[error("{message}")]
    Invalid { code: &'static str, message: String, position: Option<usize> },
    /// Valid SQL that Tidegate does not do: refused by name.
    #[error("{what} is not supported{}", hint.as_deref().map(|h| format!(": {h}")).unwrap_or_default())]
    Unsupported { what: String, hint: Option<String>, position: Option<usize> },
    /// NOT NULL, duplicate key, value out of range…
    #[error("{message}")]
    Constraint { code: &'static str, message: String },
    #[error("{0}")]
    Forbidden(Box<Refusal>),
    /// A limit was reached: which, and how to stay under it.
    #[error("{0}")]
    Limit(String),
    /// Too much runs or waits already: worth another try.
    #[error("{0}")]
    Busy(String),
    #[error("the query ran longer than {0:?} (sql.deadline_ms) and was stopped")]
    Deadline(Duration),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Our own bug: the details go to the log.
    #[error("internal error: {0}")]
    Internal(String),
}

/// What a caller may not do: words for the caller, and names for the audit log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// As in `CREATE TABLE`, `write`, `read`.
    pub what: &'static str,
    /// Its name, as in `main.flights`.
    pub object: String,
    pub message: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// A column of a result or live stream, with its SQL type.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputColumn {
    pub name: String,
    pub ty: Type,
}

/// Everything one request brings: identity, snapshot, parameters. Travels to scans as an extension of the task context.
#[derive(Clone)]
pub struct RequestEnv {
    pub catalog: Arc<Catalog>,
    pub snapshot: Snapshot,
    /// Default namespace of unqualified names.
    pub namespace: String,
    pub user: Arc<str>,
    pub role: Role,
    pub params: Arc<Vec<Param>>,
    /// Writes of earlier statements of the same transaction, seen by later ones.
    pub overlay: Arc<Overlay>,
    /// `now()` for the whole request, microseconds since 1970.
    pub now: i64,
}

impl RequestEnv {
    /// In the default namespace, without parameters, at the beginning of 1970: what a caller has more of, it puts in.
    pub fn new(snapshot: Snapshot, user: impl Into<Arc<str>>, role: Role) -> RequestEnv {
        RequestEnv {
            catalog: snapshot.catalog().clone(),
            snapshot,
            namespace: DEFAULT_NAMESPACE.to_owned(),
            user: user.into(),
            role,
            params: Arc::default(),
            overlay: Arc::default(),
            now: 0,
        }
    }
}

/// A parameter as it came over HTTP; typed by what it is compared with or stored into.
#[derive(Clone, Debug, PartialEq)]
pub enum Param {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
}

/// Uncommitted rows of a running transaction: new image, or `None` for a deleted row; by encoded key.
#[derive(Clone, Debug, Default)]
pub struct Overlay {
    pub rows: BTreeMap<(TableId, Scope), OverlayRows>,
}

/// By encoded key.
pub type OverlayRows = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// A parsed, classified statement. Construct with [`session::Sql::parse`].
#[derive(Debug, Clone)]
pub struct Statement {
    pub kind: StatementKind,
    pub(crate) ast: Box<datafusion::sql::sqlparser::ast::Statement>,
    /// The whole text it came in: positions in errors count from its start.
    pub(crate) text: Arc<str>,
    /// Which of the text's statements it is, from 0.
    pub(crate) index: usize,
    /// Whether the text is too small to trouble an ordinary thread's stack.
    pub(crate) small: bool,
    /// The highest parameter of the whole text; 0 where there is none.
    params: usize,
}

/// The most parameters of a request.
const MAX_PARAMS: usize = 1_000;

/// A parameter that no statement of a text uses is a mistake: a list that is one too long, or a `$2` that was forgotten.
pub fn check_params(statements: &[Statement], params: &[Param]) -> Result<(), SqlError> {
    all_used(statements.first().map_or(0, |statement| statement.params), params.len())
}

fn all_used(highest: usize, sent: usize) -> Result<(), SqlError> {
    if sent > MAX_PARAMS {
        return Err(SqlError::Limit(format!("{sent} parameters, more than {MAX_PARAMS}")));
    }
    if sent <= highest {
        return Ok(());
    }
    let used = match highest {
        0 => "none is used".to_owned(),
        highest => format!("${highest} is the last that is used"),
    };
    Err(SqlError::invalid("parameters", format!("{sent} parameters were sent, but {used}")))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatementKind {
    Query,
    Dml,
    Ddl,
}

/// What all running queries take together.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub memory_bytes: usize,
    pub heavy: usize,
    pub waiting: usize,
}

/// A running query. Every column of a batch has exactly the Arrow type of its [`OutputColumn`] ([`arrow::arrow_type`]).
pub struct RowStream {
    pub columns: Vec<OutputColumn>,
    pub batches: Batches,
}

/// The rows of a query as they are made; an error is the last item.
pub type Batches = Pin<Box<dyn Stream<Item = Result<RecordBatch, SqlError>> + Send>>;

/// What a DML statement does: the rows to write, in order; at most one per key.
#[derive(Debug, Default)]
pub struct ChangeSet {
    pub writes: Vec<RowWrite>,
    /// Rows inserted, updated or deleted.
    pub affected: u64,
    /// What RETURNING asked for.
    pub returned: Option<Returned>,
    /// The memory of the writes: to be kept as long as they are.
    pub held: Option<Held>,
}

/// The rows of RETURNING; [`session::Sql::returned`] makes a [`RowStream`] of them.
#[derive(Debug)]
pub struct Returned {
    columns: Vec<OutputColumn>,
    batches: Vec<RecordBatch>,
    held: Held,
}

/// What becomes of a row of a bulk insert that is there already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowConflict {
    #[default]
    Error,
    /// The stored row stays as it is.
    Nothing,
    /// The stored row with the same primary key gets the columns that the new one says.
    Update,
}

impl RowConflict {
    pub fn as_str(self) -> &'static str {
        match self {
            RowConflict::Error => "error",
            RowConflict::Nothing => "nothing",
            RowConflict::Update => "update",
        }
    }
}

/// Why rows cannot be inserted, and which of them (from 0) is the first that cannot.
#[derive(Debug)]
pub struct RowFailure {
    pub error: SqlError,
    pub row: Option<usize>,
}

/// What a DDL statement does; empty when IF [NOT] EXISTS made it a no-op.
#[derive(Debug, Default)]
pub struct DdlPlan {
    pub writes: Vec<CatalogWrite>,
    /// The namespace the commit belongs to.
    pub namespace: Option<crate::catalog::NamespaceId>,
    /// For the audit log: the two words of the statement, and the name of what it is about.
    pub summary: String,
    /// An index that is to be built once the writes are committed: the table may have rows.
    pub build: Option<(TableId, IndexId)>,
}

impl DdlPlan {
    /// Kind of statement and name, as in `CREATE TABLE` and `main.flights`.
    pub fn named(&self) -> (&str, &str) {
        match self.summary.match_indices(' ').nth(1) {
            Some((at, _)) => (&self.summary[..at], &self.summary[at + 1..]),
            None => (&self.summary, ""),
        }
    }
}

/// A result of our own making: two columns of text.
pub fn text_rows(names: [&str; 2], rows: Vec<(&str, String)>) -> Result<RowStream, SqlError> {
    use ::arrow::array::{ArrayRef, StringArray};
    let columns: Vec<OutputColumn> =
        names.iter().map(|name| OutputColumn { name: (*name).to_owned(), ty: Type::Text }).collect();
    let count = rows.len();
    let (left, right): (Vec<&str>, Vec<String>) = rows.into_iter().unzip();
    let arrays: Vec<ArrayRef> = vec![Arc::new(StringArray::from(left)), Arc::new(StringArray::from(right))];
    let batch = arrow::batch_of(&arrow::output_schema(&columns), arrays, count)?;
    Ok(RowStream { columns, batches: Box::pin(futures::stream::once(async { Ok(batch) })) })
}

/// Alias kept short in signatures.
pub type Values = Vec<Value>;
