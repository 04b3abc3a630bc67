//! Times and timestamps have microseconds here, as they are stored: DataFusion's own have nanoseconds, in which a
//! timestamp ends in 2262, and a TIME that is not like a column's.

use ::arrow::datatypes::{DataType, FieldRef, TimeUnit};
use datafusion::common::datatype::DataTypeExt;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{DFSchema, Result};
use datafusion::logical_expr::expr::InList;
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::planner::TypePlanner;
use datafusion::logical_expr::{Between, BinaryExpr, Cast, Expr, ExprSchemable, LogicalPlan, cast};
use datafusion::sql::sqlparser::ast::{self, TimezoneInfo};

use super::arrow::UTC;
use super::context::{is_comparison, schema_of_expressions};
use super::mixed::any_expression;

/// What TIME and TIMESTAMP say in a query.
#[derive(Debug)]
pub(crate) struct Microseconds;

impl TypePlanner for Microseconds {
    fn plan_type_field(&self, ty: &ast::DataType) -> Result<Option<FieldRef>> {
        let ty = match ty {
            ast::DataType::Time(None, TimezoneInfo::None | TimezoneInfo::WithoutTimeZone) => {
                DataType::Time64(TimeUnit::Microsecond)
            }
            ast::DataType::Timestamp(None, TimezoneInfo::None | TimezoneInfo::WithoutTimeZone) => {
                DataType::Timestamp(TimeUnit::Microsecond, None)
            }
            ast::DataType::Timestamp(None, TimezoneInfo::Tz | TimezoneInfo::WithTimeZone) => {
                DataType::Timestamp(TimeUnit::Microsecond, Some(UTC.into()))
            }
            _ => return Ok(None),
        };
        Ok(Some(ty.into_nullable_field_ref()))
    }
}

/// The plan before its types are coerced: a text that is compared with a timestamp is one of the same kind, and an integer
/// that is cast to one is seconds since 1970.
pub(crate) fn agreed(plan: LogicalPlan) -> Result<LogicalPlan> {
    let plan = plan.transform_up_with_subqueries(|plan| {
        if !any_expression(&plan, is_candidate)? {
            return Ok(Transformed::no(plan));
        }
        let schema = schema_of_expressions(&plan)?;
        let names = NamePreserver::new(&plan);
        plan.map_expressions(|expr| {
            let name = names.save(&expr);
            let agreed = expr.transform_up(|expr| Ok(compared(expr, &schema)))?;
            Ok(agreed.update_data(|expr| name.restore(expr)))
        })
    })?;
    Ok(plan.data)
}

fn is_candidate(expr: &Expr) -> bool {
    match expr {
        Expr::BinaryExpr(BinaryExpr { op, .. }) => is_comparison(*op),
        expr => matches!(expr, Expr::Between(_) | Expr::InList(_) | Expr::Cast(_)),
    }
}

fn compared(mut expr: Expr, schema: &DFSchema) -> Transformed<Expr> {
    let changed = match &mut expr {
        Expr::BinaryExpr(BinaryExpr { left, op, right }) if is_comparison(*op) => agree(vec![left, right], schema),
        Expr::Between(Between { expr, low, high, .. }) => agree(vec![expr, low, high], schema),
        Expr::InList(InList { expr, list, .. }) => {
            agree(std::iter::once(expr.as_mut()).chain(list.iter_mut()).collect(), schema)
        }
        Expr::Cast(Cast { expr, field }) => match field.data_type() {
            DataType::Timestamp(TimeUnit::Microsecond, zone)
                if expr.get_type(schema).is_ok_and(|ty| ty.is_integer()) =>
            {
                let seconds = DataType::Timestamp(TimeUnit::Second, zone.clone());
                **expr = cast(std::mem::take(expr.as_mut()), seconds);
                true
            }
            _ => false,
        },
        _ => false,
    };
    if changed { Transformed::yes(expr) } else { Transformed::no(expr) }
}

fn agree(sides: Vec<&mut Expr>, schema: &DFSchema) -> bool {
    let types: Vec<Option<DataType>> = sides.iter().map(|side| side.get_type(schema).ok()).collect();
    let is_stored = |ty: &&DataType| matches!(ty, DataType::Timestamp(TimeUnit::Microsecond, _));
    let Some(stored) = types.iter().flatten().find(is_stored) else { return false };
    let mut changed = false;
    for (side, ty) in sides.into_iter().zip(&types) {
        if ty.as_ref().is_some_and(DataType::is_string) {
            *side = cast(std::mem::take(side), stored.clone());
            changed = true;
        }
    }
    changed
}
