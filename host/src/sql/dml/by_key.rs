//! UPDATE and DELETE of the one row that a whole key names: one read of the store, no scan and no physical plan.
//!
//! New values that are constants and parameters need no plan at all ([`constants`]). Others are expressions of the row;
//! they are taken from the statement's template, which was planned and optimized as for any row ([`RowPlan`]), and are
//! bound for each execution. What comes after is the same for every statement ([`super::Changes`]), so the only
//! difference is how the row was found. Whatever is not exactly this takes the way of all statements.

use ::arrow::array::ArrayRef;
use datafusion::common::{DFSchemaRef, DataFusionError};
use datafusion::execution::SessionState;
use datafusion::logical_expr::{Expr, LogicalPlan, physical_planning_context::PhysicalPlanningContext};
use datafusion::physical_expr::create_physical_expr;
use datafusion::sql::sqlparser::ast::{self, Assignment};
use wire::ColumnDecl;

use super::changes::parse_image;
use super::{Action, Target, delete_target, deleted_from, update_target};
use crate::sql::arrow::RowBatchBuilder;
use crate::sql::context::bind_exprs;
use crate::sql::error::from_datafusion;
use crate::sql::lookup::KeyedRow;
use crate::sql::row_exprs::has_sub_query;
use crate::sql::{RequestEnv, SqlError, Statement, values};

/// The row that an UPDATE or DELETE is about, if it names it by the whole key.
pub(crate) fn row(statement: &Statement, env: &RequestEnv) -> Option<KeyedRow> {
    let (from, condition) = match &*statement.ast {
        ast::Statement::Update(update) => (&update.table, &update.selection),
        ast::Statement::Delete(delete) => (deleted_from(delete).ok()?, &delete.selection),
        _ => return None,
    };
    KeyedRow::find(from, condition.as_ref()?, env)
}

/// What is to be done with the row, and the new values, where no plan is needed to know them.
pub(crate) fn constants(statement: &Statement, env: &RequestEnv) -> Result<Option<(Target, Vec<ArrayRef>)>, SqlError> {
    match &*statement.ast {
        ast::Statement::Update(update) if update.returning.is_none() && update.assignments.iter().all(is_plain) => {
            let (table, columns, exprs) = update_target(update, env, &statement.text)?;
            let target = Target { table, action: Action::Update(columns), returning: None };
            Ok(values::row(&exprs, env).map(|values| (target, values)))
        }
        ast::Statement::Delete(delete) if delete.returning.is_none() => {
            let (table, _) = delete_target(delete, env)?;
            Ok(Some((Target { table, action: Action::Delete, returning: None }, Vec::new())))
        }
        _ => Ok(None),
    }
}

/// Whether it may turn out to be a constant: a literal, a parameter, a sign before one, DEFAULT.
fn is_plain(assignment: &Assignment) -> bool {
    matches!(assignment.value, ast::Expr::Value(_) | ast::Expr::UnaryOp { .. } | ast::Expr::Identifier(_))
}

/// The new values of an UPDATE as expressions of the row, for every execution: parameters, time and user are symbols.
pub(crate) struct RowPlan {
    /// What is read of the row.
    columns: Vec<ColumnDecl>,
    schema: DFSchemaRef,
    exprs: Vec<Expr>,
}

impl RowPlan {
    /// From the statement's optimized query, if all that it does is to filter the rows of the table and to compute from
    /// each what is asked: a sub-query, or an expression that is computed once and used twice, is more than that.
    pub(crate) fn of(target: &Target, plan: &LogicalPlan) -> Option<RowPlan> {
        if let Action::Insert(..) = target.action {
            return None;
        }
        let LogicalPlan::Projection(projection) = plan else { return None };
        let input = match &*projection.input {
            LogicalPlan::Filter(filter) => &*filter.input,
            input => input,
        };
        let LogicalPlan::TableScan(scan) = input else { return None };
        // The key columns come first.
        let exprs = projection.expr.get(target.table.key.len()..)?;
        if exprs.iter().any(|expr| has_sub_query(expr).unwrap_or(true)) {
            return None;
        }
        let all = target.table.schema().columns;
        let columns = match &scan.projection {
            None => all,
            Some(picked) => picked.iter().map(|at| all.get(*at).cloned()).collect::<Option<_>>()?,
        };
        Some(RowPlan { columns, schema: scan.projected_schema.clone(), exprs: exprs.to_vec() })
    }

    /// Of one row: an array of one cell for each column that is set.
    pub(crate) fn evaluate(
        &self,
        image: &[u8],
        env: &RequestEnv,
        state: &SessionState,
        text: &str,
    ) -> Result<Vec<ArrayRef>, SqlError> {
        let mut builder = RowBatchBuilder::with_schema(self.schema.inner().clone(), &self.columns, 1);
        builder.push(&parse_image(image)?)?;
        let batch = builder.finish()?;
        let value = |expr: &Expr| {
            let planning = PhysicalPlanningContext::default();
            let expr = create_physical_expr(expr, &self.schema, state.execution_props(), &planning)?;
            expr.evaluate(&batch)?.into_array(1)
        };
        let values = bind_exprs(&self.exprs, &self.schema, env, state)
            .and_then(|exprs| exprs.iter().map(value).collect::<Result<Vec<_>, DataFusionError>>());
        values.map_err(|error| from_datafusion(error, text))
    }
}
