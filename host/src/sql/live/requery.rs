//! Live queries that are no filter over one table: planned once, run again at a snapshot when one of their tables
//! changed. Here is what one run needs and what it gives: rows, and the key of each.

use std::sync::Arc;

use ::arrow::array::{ArrayRef, Int64Array, StringArray};
use ::arrow::compute::concat_batches;
use ::arrow::datatypes::SchemaRef;
use ::arrow::record_batch::RecordBatch;
use ::arrow::row::{RowConverter, SortField};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{DataFusionError, TableReference};
use datafusion::logical_expr::{Expr, LogicalPlan, Projection};
use futures::StreamExt;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use wire::image::MAX_COLUMNS;
use wire::{ColumnDecl, Schema, Scope, Type};

use super::digest::Digest;
use super::key::{KeyColumn, Keys};
use crate::catalog::{Table, TableKind};
use crate::sql::arrow::{arrow_schema, batch_of, output_columns, output_schema};
use crate::sql::context::find_table;
use crate::sql::error::{from_arrow, from_datafusion};
use crate::sql::information::CATALOG_NAME;
use crate::sql::plans::is_recursive;
use crate::sql::provider::scope_of;
use crate::sql::session::Engine;
use crate::sql::system::SystemTables;
use crate::sql::{OutputColumn, RequestEnv, RowStream, SqlError};

/// A query to be run again and again.
pub struct RequeryPlan {
    /// What it reads, and whose rows of it; the first is the one that errors and plugins speak of.
    pub tables: Vec<(Arc<Table>, Scope)>,
    pub columns: Vec<OutputColumn>,
    /// Names of the key's parts.
    pub key: Vec<String>,
    /// The same for equal queries (text of the plan, parameters, tables and their versions; not the user).
    pub fingerprint: u64,
    /// Whether `current_user` is bound in it.
    pub names_user: bool,
    pub(crate) text: Arc<str>,
    /// The output columns, then the parts of the key that are not among them. Optimized.
    pub(crate) plan: LogicalPlan,
    /// Where the parts of the key are in the plan's output; `None`: nothing proves a key, rows are told apart by their
    /// own bytes.
    key_at: Option<Vec<usize>>,
}

/// One result: as many keys as rows.
pub struct Rows {
    pub rows: RecordBatch,
    pub keys: RecordBatch,
}

/// The names of a key that is the row itself: a hash of it, and a number for rows that are equal.
const ROW_KEY: [&str; 2] = ["_row", "_n"];

pub(crate) fn compile(
    engine: &Engine,
    plan: LogicalPlan,
    tables: Vec<(Arc<Table>, Scope)>,
    env: &RequestEnv,
    text: &str,
    names_user: bool,
) -> Result<RequeryPlan, SqlError> {
    let in_text = |error| from_datafusion(error, text);
    if tables.is_empty() {
        return Err(SqlError::unsupported("a query without a table as a live query", Some("nothing could change it")));
    }
    if let Some((table, _)) = tables.iter().find(|(table, _)| table.kind == TableKind::Stream) {
        let what = format!("the stream table {} in a live query that is run again", table.name);
        return Err(SqlError::unsupported(what, Some("its rows expire without a commit: filter and project it alone")));
    }
    let columns = output_columns(plan.schema().as_arrow());
    let visible: Vec<Expr> = plan.schema().columns().into_iter().map(Expr::Column).collect();
    let (plan, key) = match Keys::new(env).of(&plan).map_err(in_text)? {
        Some((plan, key)) => with_key(plan, visible, key).map_err(in_text)?,
        None => (plan, None),
    };
    let fingerprint = fingerprint(&plan, &tables).map_err(in_text)?;
    let plan = engine.optimized(plan).map_err(in_text)?;
    // Thrown away: what cannot be run is refused now, not in a stream that is open.
    futures::executor::block_on(engine.execution_plan(&plan, is_recursive(&plan), text))?;
    let (key, key_at) = match key {
        Some((names, at)) => (names, Some(at)),
        None => (ROW_KEY.map(str::to_owned).to_vec(), None),
    };
    Ok(RequeryPlan { tables, columns, key, fingerprint, names_user, text: text.into(), plan, key_at })
}

/// The output columns, then those parts of the key that are not among them; names of the parts, and where they are.
type WithKey = (LogicalPlan, Option<(Vec<String>, Vec<usize>)>);

fn with_key(plan: LogicalPlan, mut exprs: Vec<Expr>, key: Vec<KeyColumn>) -> Result<WithKey, DataFusionError> {
    let (mut names, mut at) = (Vec::new(), Vec::new());
    for part in key {
        let expr = Expr::Column(part.column);
        let found = exprs.iter().position(|visible| *visible == expr);
        at.push(found.unwrap_or(exprs.len()));
        if found.is_none() {
            // A name of its own: two tables' keys may be called the same.
            exprs.push(expr.alias(format!("__key_{}", exprs.len())));
        }
        names.push(part.name);
    }
    let plan = Projection::try_new(exprs, Arc::new(plan)).map(LogicalPlan::Projection)?;
    Ok((plan, Some((names, at))))
}

/// Every table that the plan reads, sub-queries included.
pub(super) fn tables(plan: &LogicalPlan, env: &RequestEnv) -> Result<Vec<(Arc<Table>, Scope)>, SqlError> {
    let (mut scanned, mut recursive) = (Vec::<TableReference>::new(), Vec::<String>::new());
    let walked = plan.apply_with_subqueries(|plan| {
        match plan {
            LogicalPlan::TableScan(scan) => scanned.push(scan.table_name.clone()),
            LogicalPlan::RecursiveQuery(query) => recursive.push(query.name.clone()),
            _ => {}
        }
        Ok(TreeNodeRecursion::Continue)
    });
    walked.map_err(|error| from_datafusion(error, ""))?;
    let mut tables: Vec<(Arc<Table>, Scope)> = Vec::new();
    for name in scanned {
        let home = name.schema().unwrap_or(&env.namespace);
        if SystemTables::is_home(home) {
            let what = format!("a live query over {home}.{}", name.table());
            return Err(SqlError::unsupported(what, Some("it is no stored table; query it")));
        }
        debug_assert!(name.catalog().is_none_or(|catalog| catalog == CATALOG_NAME));
        let table = match find_table(env, name.schema(), name.table()) {
            Ok(table) => table.clone(),
            // The working table of WITH RECURSIVE: its rows come from the others.
            Err(_) if name.schema().is_none() && recursive.iter().any(|query| query == name.table()) => continue,
            Err(error) => return Err(error),
        };
        if !tables.iter().any(|(known, _)| known.id == table.id) {
            let scope = scope_of(&table, &env.user);
            tables.push((table, scope));
        }
    }
    Ok(tables)
}

/// Stable over restarts: it is part of positions that clients hold.
fn fingerprint(plan: &LogicalPlan, tables: &[(Arc<Table>, Scope)]) -> Result<u64, DataFusionError> {
    let mut digest = Digest::new();
    digest.text("requery 1");
    for (table, _) in tables {
        let scope = if table.kind == TableKind::User { "user" } else { "shared" };
        digest.text(&format!("table {}, version {}, {scope}", table.id.0, table.schema_version));
    }
    digest.text(&plan.display_indent_schema().to_string());
    plan.apply_with_subqueries(|plan| {
        plan.apply_expressions(|expr| {
            digest.printed_bare(expr)?;
            Ok(TreeNodeRecursion::Continue)
        })
    })?;
    Ok(digest.fingerprint())
}

impl RequeryPlan {
    /// The columns of the result as plugins see them. Every one has a SQL type (`output_type` finds it), so there is none
    /// that an image cannot hold; only their number has a limit.
    pub fn schema(&self) -> Result<Schema, SqlError> {
        if self.columns.len() > usize::from(MAX_COLUMNS) {
            let what = format!("a pipeline over a result of more than {MAX_COLUMNS} columns");
            return Err(SqlError::unsupported(what, Some("select fewer")));
        }
        let key_at = self.key_at.as_deref().unwrap_or_default();
        let column = |(at, column): (usize, &OutputColumn)| ColumnDecl {
            id: at as u16,
            name: column.name.clone(),
            ty: column.ty,
            nullable: true,
            key: key_at.contains(&at),
        };
        Ok(Schema { columns: self.columns.iter().enumerate().map(column).collect() })
    }

    /// Takes a whole result in, up to `limit` bytes.
    pub(crate) async fn collect(&self, mut stream: RowStream, limit: usize) -> Result<Rows, SqlError> {
        let schema = output_schema(&stream.columns);
        let (mut batches, mut bytes) = (Vec::new(), 0);
        while let Some(batch) = stream.batches.next().await {
            let batch = batch?;
            bytes += batch.get_array_memory_size();
            if bytes > limit {
                return Err(SqlError::Limit(format!(
                    "the result of this live query is larger than {limit} bytes, and a query that is run again is held \
                     in memory; narrow it, or raise live.requery_bytes"
                )));
            }
            batches.push(batch);
        }
        let all = concat_batches(&schema, &batches).map_err(from_arrow)?;
        self.split(&stream.columns, &all)
    }

    fn split(&self, columns: &[OutputColumn], all: &RecordBatch) -> Result<Rows, SqlError> {
        let shown = output_schema(&columns[..self.columns.len()]);
        let rows = batch_of(&shown, all.columns()[..self.columns.len()].to_vec(), all.num_rows())?;
        let keys = match &self.key_at {
            Some(at) => {
                let part = |(at, name): (&usize, &String)| OutputColumn { name: name.clone(), ty: columns[*at].ty };
                let parts: Vec<OutputColumn> = at.iter().zip(&self.key).map(part).collect();
                let arrays = at.iter().map(|at| all.column(*at).clone()).collect();
                batch_of(&output_schema(&parts), arrays, all.num_rows())?
            }
            None => row_keys(&rows)?,
        };
        Ok(Rows { rows, keys })
    }
}

/// A hash of each row, and a number that tells equal rows apart.
fn row_keys(rows: &RecordBatch) -> Result<RecordBatch, SqlError> {
    let fields = rows.schema().fields().iter().map(|field| SortField::new(field.data_type().clone())).collect();
    let bytes = RowConverter::new(fields).and_then(|converter| converter.convert_columns(rows.columns()));
    let bytes = bytes.map_err(from_arrow)?;
    let mut seen: HashMap<String, i64> = HashMap::new();
    let (mut hashes, mut numbers) = (Vec::new(), Vec::new());
    for row in 0..rows.num_rows() {
        let digest = Sha256::digest(bytes.row(row).as_ref());
        let hash: String = digest[..12].iter().map(|byte| format!("{byte:02x}")).collect();
        let number = seen.entry(hash.clone()).or_default();
        numbers.push(*number);
        *number += 1;
        hashes.push(hash);
    }
    let schema: SchemaRef = arrow_schema(&Schema {
        columns: ROW_KEY
            .iter()
            .zip([Type::Text, Type::BigInt])
            .map(|(name, ty)| ColumnDecl { id: 0, name: (*name).to_owned(), ty, nullable: false, key: true })
            .collect(),
    });
    let arrays: Vec<ArrayRef> = vec![Arc::new(StringArray::from(hashes)), Arc::new(Int64Array::from(numbers))];
    batch_of(&schema, arrays, rows.num_rows())
}
