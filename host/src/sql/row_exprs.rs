//! Expressions over rows in memory: what RETURNING shows of the rows a statement wrote, and what ON CONFLICT makes of
//! a stored row and the one proposed in its place.
//!
//! They are planned as the SELECT list of a query over the same tables, so names, types and functions are those of any
//! query; but nothing is scanned: the rows are images at hand. Only the columns that are named are decoded.

use std::collections::HashSet;
use std::sync::Arc;

use ::arrow::array::ArrayRef;
use ::arrow::datatypes::{Schema as ArrowSchema, SchemaRef};
use ::arrow::record_batch::RecordBatch;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{Column, DFSchema, DataFusionError};
use datafusion::execution::context::ExecutionProps;
use datafusion::logical_expr::utils::expr_to_columns;
use datafusion::logical_expr::{Expr, LogicalPlan, physical_planning_context::PhysicalPlanningContext};
use datafusion::physical_expr::{PhysicalExpr, create_physical_expr};
use datafusion::sql::sqlparser::ast::{self, SelectItem, TableWithJoins};
use wire::{ColumnDecl, ImageRef};

use super::arrow::{arrow_field, batch_of, output_array, output_schema, output_type, rows_batch, schema_of_columns};
use super::context::{bind_unoptimized, simplifier};
use super::dml::select_query;
use super::error::from_datafusion;
use super::planner::folding;
use super::session::Engine;
use super::{OutputColumn, RequestEnv, SqlError};
use crate::catalog::Table;

/// Compiled expressions over one row of each of some relations, which all are the same table. Parameters, time and user
/// of one request are in them: they are good for that request alone.
#[derive(Clone)]
pub(crate) struct RowExprs {
    pub(crate) columns: Vec<OutputColumn>,
    output: SchemaRef,
    /// Of each relation the columns that are read.
    read: Vec<Vec<ColumnDecl>>,
    schema: SchemaRef,
    exprs: Vec<Arc<dyn PhysicalExpr>>,
}

/// What is asked of the rows.
pub(crate) struct Asked<'a> {
    /// For messages: RETURNING, DO UPDATE.
    pub(crate) clause: &'static str,
    pub(crate) items: Vec<SelectItem>,
    pub(crate) table: &'a Table,
    /// One entry a relation, each naming the table, with aliases that differ.
    pub(crate) from: Vec<TableWithJoins>,
    /// The alias of each but the first, as columns are qualified.
    pub(crate) others: &'a [&'a str],
}

impl RowExprs {
    pub(crate) fn compile(engine: &Engine, env: &RequestEnv, text: &str, asked: Asked<'_>) -> Result<Self, SqlError> {
        let Asked { clause, items, table, from, others } = asked;
        let query = ast::Statement::Query(select_query(items, from, None)?);
        let plan = engine
            .logical(query, env)
            .and_then(|plan| bind_unoptimized(plan, env, &engine.state))
            .and_then(|plan| engine.analyze(plan));
        let exprs = projection(plan.map_err(|error| from_datafusion(error, text))?, clause)?;
        let simplified = |schema: &DFSchema, expr| {
            folding(|| simplifier(Arc::new(schema.clone()), env, &engine.state).simplify(expr))
        };
        Self::of(table, others, exprs, simplified).map_err(|error| from_datafusion(error, text))
    }

    /// `simplified`: some functions are only there to be said in other words.
    fn of(
        table: &Table,
        others: &[&str],
        exprs: Vec<Expr>,
        simplified: impl Fn(&DFSchema, Expr) -> Result<Expr, DataFusionError>,
    ) -> Result<Self, DataFusionError> {
        let names: Vec<String> = exprs.iter().map(|expr| expr.qualified_name().1).collect();
        let relation = |column: &Column| {
            let of = |alias: &&str| column.relation.as_ref().is_some_and(|relation| relation.table() == *alias);
            others.iter().position(of).map_or(0, |at| at + 1)
        };
        let mut named: HashSet<Column> = HashSet::new();
        for expr in &exprs {
            expr_to_columns(expr, &mut named)?;
        }
        let read: Vec<Vec<ColumnDecl>> = (0..=others.len())
            .map(|at| {
                let is_read = |declared: &ColumnDecl| {
                    named.iter().any(|column| relation(column) == at && column.name == declared.name)
                };
                table.schema().columns.into_iter().filter(is_read).collect()
            })
            .collect();
        let field =
            |(at, column): (usize, &ColumnDecl)| arrow_field(&place(at, &column.name), column.ty, column.nullable);
        let fields = read.iter().enumerate().flat_map(|(at, columns)| columns.iter().map(move |column| (at, column)));
        let schema: SchemaRef = Arc::new(ArrowSchema::new(fields.map(field).collect::<Vec<_>>()));

        let known = DFSchema::try_from(schema.clone())?;
        let physical = |expr: Expr| {
            let placed = expr.transform(|expr| match expr {
                Expr::Column(column) => {
                    let name = place(relation(&column), &column.name);
                    Ok(Transformed::yes(Expr::Column(Column::new_unqualified(name))))
                }
                expr => Ok(Transformed::no(expr)),
            })?;
            let simple = simplified(&known, placed.data)?;
            create_physical_expr(&simple, &known, &ExecutionProps::new(), &PhysicalPlanningContext::default())
        };
        let exprs = exprs.into_iter().map(physical).collect::<Result<Vec<_>, DataFusionError>>()?;
        let typed = |(expr, name): (&Arc<dyn PhysicalExpr>, String)| {
            Ok(OutputColumn { name, ty: output_type(expr.return_field(&schema)?.as_ref()) })
        };
        let columns = exprs.iter().zip(names).map(typed).collect::<Result<Vec<_>, DataFusionError>>()?;
        Ok(RowExprs { output: output_schema(&columns), columns, read, schema, exprs })
    }

    /// One array an expression, in the types that it has. `rows` has the images of each relation, as many of each.
    pub(crate) fn evaluate(&self, rows: &[&[ImageRef<'_>]]) -> Result<Vec<ArrayRef>, SqlError> {
        let count = rows.first().map_or(0, |images| images.len());
        let mut arrays = Vec::with_capacity(self.schema.fields().len());
        for (columns, images) in self.read.iter().zip(rows) {
            arrays.extend_from_slice(rows_batch(schema_of_columns(columns), columns, images)?.columns());
        }
        let batch = batch_of(&self.schema, arrays, count)?;
        let value = |expr: &Arc<dyn PhysicalExpr>| expr.evaluate(&batch)?.into_array(count);
        self.exprs.iter().map(value).collect::<Result<_, DataFusionError>>().map_err(|error| from_datafusion(error, ""))
    }

    /// The rows of a result.
    pub(crate) fn batch(&self, images: &[ImageRef<'_>]) -> Result<RecordBatch, SqlError> {
        let arrays = self.evaluate(&[images])?;
        let arrays = arrays.iter().zip(&self.columns).map(|(array, column)| output_array(array, column.ty));
        batch_of(&self.output, arrays.collect::<Result<_, SqlError>>()?, images.len())
    }
}

/// The name of a column in the batch that expressions are evaluated over: both relations have all names.
fn place(relation: usize, name: &str) -> String {
    format!("{relation}.{name}")
}

/// The expressions of a plan that is nothing but a SELECT list over tables.
fn projection(plan: LogicalPlan, clause: &str) -> Result<Vec<Expr>, SqlError> {
    let refused = |what: &str| Err(SqlError::unsupported(format!("{what} in {clause}"), None));
    let LogicalPlan::Projection(projection) = plan else { return refused("anything but expressions of a row") };
    for expr in &projection.expr {
        if has_sub_query(expr).map_err(|error| from_datafusion(error, ""))? {
            return refused("a sub-query");
        }
    }
    let mut inputs = vec![projection.input.as_ref()];
    while let Some(input) = inputs.pop() {
        match input {
            LogicalPlan::TableScan(_) => {}
            LogicalPlan::SubqueryAlias(_) | LogicalPlan::Join(_) => inputs.extend(input.inputs()),
            LogicalPlan::Aggregate(_) => return refused("an aggregate function"),
            LogicalPlan::Window(_) => return refused("a window function"),
            LogicalPlan::Unnest(_) => return refused("unnest"),
            _ => return refused("anything but expressions of a row"),
        }
    }
    Ok(projection.expr)
}

pub(crate) fn has_sub_query(expr: &Expr) -> Result<bool, DataFusionError> {
    expr.exists(|expr| {
        let found =
            matches!(expr, Expr::ScalarSubquery(_) | Expr::InSubquery(_) | Expr::Exists(_) | Expr::SetComparison(_));
        Ok(found)
    })
}
