//! A sub-query in the place of a value is NULL where it finds no row, whatever its column says of itself; a part of
//! [`exact`](super::exact).
//!
//! DataFusion asks the column alone: over one that is NOT NULL, `(SELECT id …) IS NULL` was false before anything was
//! looked for, and a result in which the NULL came up was refused.

use std::sync::{Arc, LazyLock};

use ::arrow::datatypes::{DataType, FieldRef};
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{Column, Result, internal_err};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::{
    ColumnarValue, Expr, LogicalPlan, LogicalPlanBuilder, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF,
    ScalarUDFImpl, Signature, Subquery, Volatility,
};

/// The plan, in which such sub-queries say that they may be NULL.
pub(super) fn empty_is_null(plan: LogicalPlan) -> Result<LogicalPlan> {
    let plan = plan.transform_up_with_subqueries(|plan| {
        let names = NamePreserver::new(&plan);
        plan.map_expressions(|expr| {
            let name = names.save(&expr);
            let said = expr.transform_up(|expr| match expr {
                Expr::ScalarSubquery(query) if says_too_much(&query.subquery) => {
                    let subquery = Arc::new(or_null(query.subquery.as_ref().clone())?);
                    Ok(Transformed::yes(Expr::ScalarSubquery(Subquery { subquery, ..query })))
                }
                expr => Ok(Transformed::no(expr)),
            })?;
            Ok(said.update_data(|expr| name.restore(expr)))
        })
    })?;
    if !plan.transformed {
        return Ok(plan.data);
    }
    // What is made of them may be NULL as well.
    let plan = plan.data.transform_up_with_subqueries(|plan| plan.recompute_schema().map(Transformed::yes))?;
    Ok(plan.data)
}

fn says_too_much(query: &LogicalPlan) -> bool {
    query.schema().fields().iter().all(|field| !field.is_nullable()) && may_be_empty(query)
}

fn may_be_empty(query: &LogicalPlan) -> bool {
    match query {
        LogicalPlan::Projection(node) => may_be_empty(&node.input),
        LogicalPlan::SubqueryAlias(node) => may_be_empty(&node.input),
        LogicalPlan::Sort(node) => may_be_empty(&node.input),
        LogicalPlan::Aggregate(node) => !node.group_expr.is_empty(),
        LogicalPlan::EmptyRelation(node) => !node.produce_one_row,
        _ => true,
    }
}

fn or_null(query: LogicalPlan) -> Result<LogicalPlan> {
    static FUNCTION: LazyLock<ScalarUDF> =
        LazyLock::new(|| ScalarUDF::new_from_impl(OrNull { signature: Signature::any(1, Volatility::Immutable) }));
    let columns: Vec<Expr> = query
        .schema()
        .iter()
        .map(|(relation, field)| {
            let column = Expr::Column(Column::from((relation, field)));
            FUNCTION.call(vec![column]).alias_qualified(relation.cloned(), field.name())
        })
        .collect();
    LogicalPlanBuilder::from(query).project(columns)?.build()
}

/// Its argument, of which nobody knows that it is never NULL.
#[derive(Debug, PartialEq, Eq, Hash)]
struct OrNull {
    signature: Signature,
}

impl ScalarUDFImpl for OrNull {
    fn name(&self) -> &str {
        "or_null"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _types: &[DataType]) -> Result<DataType> {
        internal_err!("or_null has its argument's field")
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> Result<FieldRef> {
        match args.arg_fields {
            [field] => Ok(Arc::new(field.as_ref().clone().with_nullable(true))),
            _ => internal_err!("or_null has one argument"),
        }
    }

    fn invoke_with_args(&self, mut args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        match args.args.pop() {
            Some(value) => Ok(value),
            None => internal_err!("or_null has one argument"),
        }
    }
}
