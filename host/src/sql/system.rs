//! Tables that are not stored: `information_schema` and `system`. Their rows are made when a query runs, from its own
//! catalog snapshot or from whatever module knows them.
//!
//! One [`SystemTable`] each. Those that the catalog alone can answer are in [`super::information`]; the others are
//! handed to [`super::session::Sql::new`] by `db` (`db/system.rs`), which is the one place to add one.
//!
//! Who may read a table is decided when it is read, not when the query is planned: a plan may be kept and run again
//! for somebody else.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use ::arrow::datatypes::SchemaRef;
use ::arrow::record_batch::RecordBatch;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::Result;
use datafusion::datasource::provider_as_source;
use datafusion::execution::SendableRecordBatchStream;
use datafusion::logical_expr::{Expr, TableSource, TableType};
use datafusion::physical_expr::EquivalenceProperties;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use futures::future::BoxFuture;
use wire::{ColumnDecl, ImageBuilder, ImageRef, Schema, Type, Value};

use super::arrow::{arrow_schema, to_batch};
use super::information::INFORMATION_SCHEMA;
use super::leaf::{Leaf, Reader, RowsAsked};
use super::{Refusal, RequestEnv, SqlError};
use crate::config::Role;

/// The namespace of the server's own tables.
pub const SYSTEM: &str = "system";

/// Rows of a system table: one value a column, in order.
pub type Rows = Vec<Vec<Value>>;

/// Some rows, then more, for as long as somebody wants them.
pub type Pieces = Box<dyn Iterator<Item = Result<Rows, SqlError>> + Send>;

type AllRows = dyn Fn(&RequestEnv) -> Result<Rows, SqlError> + Send + Sync;

/// What a system table shows to the caller.
pub enum SystemRows {
    /// There are few.
    All(Box<AllRows>),
    /// There may be more than one wants to hold in memory.
    Pieces(Box<dyn Fn() -> Pieces + Send + Sync>),
}

/// One table that is not stored.
pub struct SystemTable {
    pub namespace: &'static str,
    pub name: &'static str,
    pub columns: &'static [(&'static str, Type)],
    /// Lower roles are refused.
    pub least: Role,
    pub rows: SystemRows,
}

impl SystemTable {
    fn schema(&self) -> Schema {
        let column = |(id, (name, ty)): (usize, &(&str, Type))| ColumnDecl {
            id: id as u16,
            name: (*name).to_owned(),
            ty: *ty,
            nullable: true,
            key: false,
        };
        Schema { columns: self.columns.iter().enumerate().map(column).collect() }
    }

    /// For whoever may read it.
    fn read(&self, env: &RequestEnv) -> Result<Pieces, SqlError> {
        if env.role < self.least {
            let object = format!("{}.{}", self.namespace, self.name);
            let message = format!("reading {object} needs the role {}", self.least.as_str());
            return Err(SqlError::Forbidden(Box::new(Refusal { what: "read", object, message })));
        }
        match &self.rows {
            SystemRows::All(rows) => Ok(Box::new(std::iter::once(rows(env)))),
            SystemRows::Pieces(pieces) => Ok(pieces()),
        }
    }

    fn batch(&self, rows: Rows) -> Result<RecordBatch, SqlError> {
        let image = |row: Vec<Value>| {
            let mut image = ImageBuilder::new(self.columns.len() as u16);
            row.iter().enumerate().for_each(|(id, value)| image.set(id as u16, value));
            image.finish()
        };
        let images: Vec<Vec<u8>> = rows.into_iter().map(image).collect();
        let parsed = images.iter().map(|bytes| ImageRef::parse(bytes).map(|(image, ..)| image));
        let rows = parsed.collect::<Result<Vec<_>, _>>().map_err(|error| SqlError::Internal(error.to_string()))?;
        to_batch(&self.schema(), &rows)
    }
}

/// Every system table, by namespace and name.
pub(crate) struct SystemTables {
    sources: HashMap<(&'static str, &'static str), Arc<dyn TableSource>>,
    tables: Vec<Arc<SystemTable>>,
}

impl SystemTables {
    pub(crate) fn new(tables: impl IntoIterator<Item = SystemTable>) -> SystemTables {
        let tables: Vec<Arc<SystemTable>> = tables.into_iter().map(Arc::new).collect();
        let source = |table: &Arc<SystemTable>| {
            let provider = Provider { schema: arrow_schema(&table.schema()), table: table.clone() };
            ((table.namespace, table.name), provider_as_source(Arc::new(provider)))
        };
        SystemTables { sources: tables.iter().map(source).collect(), tables }
    }

    /// Whether names in this namespace are looked for here.
    pub(crate) fn is_home(namespace: &str) -> bool {
        [SYSTEM, INFORMATION_SCHEMA].contains(&namespace)
    }

    pub(crate) fn source(&self, namespace: &str, name: &str) -> Result<Arc<dyn TableSource>, SqlError> {
        let found = self.sources.iter().find(|((home, known), _)| *home == namespace && *known == name);
        found.map(|(_, source)| source.clone()).ok_or_else(|| self.unknown(namespace, name))
    }

    pub(crate) fn columns(&self, namespace: &str, name: &str) -> Result<&'static [(&'static str, Type)], SqlError> {
        let found = self.tables.iter().find(|table| table.namespace == namespace && table.name == name);
        found.map(|table| table.columns).ok_or_else(|| self.unknown(namespace, name))
    }

    fn unknown(&self, namespace: &str, name: &str) -> SqlError {
        let known = self.tables.iter().filter(|table| table.namespace == namespace).map(|table| table.name);
        let known: Vec<&str> = known.collect();
        SqlError::invalid(
            "unknown_table",
            format!("there is no table {namespace}.{name}; there are: {}", known.join(", ")),
        )
    }
}

struct Provider {
    table: Arc<SystemTable>,
    schema: SchemaRef,
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.table.namespace, self.table.name)
    }
}

impl Provider {
    fn plan(&self, projection: Option<&Vec<usize>>) -> Result<Arc<dyn ExecutionPlan>> {
        let schema = match projection {
            Some(picked) => Arc::new(self.schema.project(picked)?),
            None => self.schema.clone(),
        };
        let reader = SystemReader { table: self.table.clone(), projection: projection.cloned() };
        Ok(Leaf::plan(reader, EquivalenceProperties::new(schema)))
    }
}

impl TableProvider for Provider {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn table_type(&self) -> TableType {
        TableType::View
    }

    fn scan<'a, 'b, 'c, 'd, 'r>(
        &'a self,
        _state: &'b dyn Session,
        projection: Option<&'c Vec<usize>>,
        _filters: &'d [Expr],
        _limit: Option<usize>,
    ) -> BoxFuture<'r, Result<Arc<dyn ExecutionPlan>>>
    where
        'a: 'r,
        'b: 'r,
        'c: 'r,
        'd: 'r,
        Self: 'r,
    {
        Box::pin(std::future::ready(self.plan(projection)))
    }
}

/// Asks for the rows when it is run.
struct SystemReader {
    table: Arc<SystemTable>,
    projection: Option<Vec<usize>>,
}

impl fmt::Debug for SystemReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.show(f)
    }
}

impl Reader for SystemReader {
    const NAME: &'static str = "SystemTable";

    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SystemTable: {}.{}", self.table.namespace, self.table.name)
    }

    fn read(&self, env: Arc<RequestEnv>, schema: &SchemaRef, _rows: RowsAsked) -> Result<SendableRecordBatchStream> {
        let pieces = self.table.read(&env).map_err(SqlError::into_datafusion)?;
        let (table, projection) = (self.table.clone(), self.projection.clone());
        let batches = pieces.map(move |rows| -> Result<RecordBatch> {
            let batch = rows.and_then(|rows| table.batch(rows)).map_err(SqlError::into_datafusion)?;
            match &projection {
                Some(picked) => Ok(batch.project(picked)?),
                None => Ok(batch),
            }
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema.clone(), futures::stream::iter(batches))))
    }
}

/// Shorthands for the rows of system tables.
pub fn text(value: impl Into<String>) -> Value {
    Value::Text(value.into())
}

pub fn int(value: impl TryInto<i64>) -> Value {
    value.try_into().map_or(Value::Int(i64::MAX), Value::Int)
}

pub fn optional(value: Option<Value>) -> Value {
    value.unwrap_or(Value::Null)
}
