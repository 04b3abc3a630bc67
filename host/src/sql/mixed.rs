//! Decimals beside DOUBLE and REAL; a part of [`exact`](super::exact).
//!
//! To compare them DataFusion makes decimals with 15 digits behind the point of both, inexactly, and fails where either
//! has more digits before the point than are left. Here a number that is spelled out (`1.5`, `1e20`) is the decimal that it
//! says, where there are digits enough for it beside the others; everything else is compared as DOUBLE. More than 17 digits
//! of such a number are lost before: the planner has read it as a DOUBLE, and the decimal is its shortest text.

use std::iter::once;
use std::sync::Arc;

use ::arrow::datatypes::{DECIMAL128_MAX_PRECISION, DataType};
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{DFSchema, Result, ScalarValue, internal_err};
use datafusion::logical_expr::expr::{InList, InSubquery, SetComparison};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::expr_schema::cast_subquery;
use datafusion::logical_expr::{
    Between, BinaryExpr, Case, Cast, Expr, ExprSchemable, LogicalPlan, Projection, Subquery,
};

use super::context::{is_comparison, schema_of_expressions};
use super::decimals::{kept, shortest};

/// As many digits behind the point has whatever a REAL or a DOUBLE is coerced to, or more.
const LEAST_SCALE: i8 = 7;

/// The plan before its types are coerced, with what SQL says as a cast told apart from the casts that will be added: those
/// are taken back here. The places of `round` are said as INT: with a cast around them that is added and folded again, its
/// type is another one in between.
pub(crate) fn marked(plan: LogicalPlan) -> Result<LogicalPlan> {
    let is_said = |expr: &Expr| {
        matches!(expr, Expr::Cast(Cast { field, .. })
            if matches!(field.data_type(), DataType::Decimal128(_, scale) if *scale >= LEAST_SCALE))
    };
    let marked = plan.transform_up_with_subqueries(|plan| {
        if !any_expression(&plan, |expr| is_said(expr) || places(expr).is_some())? {
            return Ok(Transformed::no(plan));
        }
        let names = NamePreserver::new(&plan);
        plan.map_expressions(|expr| {
            let name = names.save(&expr);
            let marked = expr.transform_up(|expr| {
                Ok(match places(&expr) {
                    Some(places) => Transformed::yes(with_places(expr, places)),
                    None if is_said(&expr) => Transformed::yes(kept(expr)),
                    None => Transformed::no(expr),
                })
            })?;
            Ok(marked.update_data(|expr| name.restore(expr)))
        })
    })?;
    Ok(marked.data)
}

/// Of a call of `round`, where they are spelled out as BIGINT.
fn places(expr: &Expr) -> Option<i32> {
    match expr {
        Expr::ScalarFunction(call) if call.func.name() == "round" => match call.args.as_slice() {
            [_, Expr::Literal(ScalarValue::Int64(Some(places)), _)] => i32::try_from(*places).ok(),
            _ => None,
        },
        _ => None,
    }
}

fn with_places(mut expr: Expr, places: i32) -> Expr {
    if let Expr::ScalarFunction(call) = &mut expr
        && let [_, said] = call.args.as_mut_slice()
    {
        *said = Expr::Literal(ScalarValue::Int32(Some(places)), None);
    }
    expr
}

/// The node with its comparisons said as above.
pub(super) fn agreed(plan: LogicalPlan) -> Result<Transformed<LogicalPlan>> {
    // What is no decimal has a cast around it, in this node or in a sub-query.
    let may_differ = |expr: &Expr| match expr {
        Expr::Cast(Cast { field, .. }) => matches!(field.data_type(), DataType::Decimal128(..)),
        expr => matches!(expr, Expr::ScalarSubquery(_) | Expr::InSubquery(_) | Expr::SetComparison(_)),
    };
    if !any_expression(&plan, may_differ)? {
        return Ok(Transformed::no(plan));
    }
    let schema = schema_of_expressions(&plan)?;
    let plan = join_keys(plan, &schema)?;
    let names = NamePreserver::new(&plan);
    plan.map_expressions(|expr| {
        let name = names.save(&expr);
        let agreed = expr.transform_up(|expr| compared(expr, &schema))?;
        Ok(agreed.update_data(|expr| name.restore(expr)))
    })
}

pub(super) fn any_expression(plan: &LogicalPlan, wanted: impl Fn(&Expr) -> bool) -> Result<bool> {
    let mut found = false;
    plan.apply_expressions(|expr| {
        found |= expr.exists(|expr| Ok(wanted(expr)))?;
        Ok(if found { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
    })?;
    Ok(found)
}

/// Keys of a join are compared in pairs, which are no expressions.
fn join_keys(plan: LogicalPlan, schema: &DFSchema) -> Result<LogicalPlan> {
    match plan {
        LogicalPlan::Join(mut join) => {
            for (left, right) in &mut join.on {
                agree(&mut [left, right], schema)?;
            }
            Ok(LogicalPlan::Join(join))
        }
        plan => Ok(plan),
    }
}

fn compared(mut expr: Expr, schema: &DFSchema) -> Result<Transformed<Expr>> {
    let changed = match &mut expr {
        Expr::InSubquery(InSubquery { expr, subquery, .. })
        | Expr::SetComparison(SetComparison { expr, subquery, .. }) => agree_with_rows(expr, subquery, schema)?,
        expr => agree(&mut sides(expr), schema)?,
    };
    Ok(Transformed::new_transformed(expr, changed))
}

/// What is compared with each other.
fn sides(expr: &mut Expr) -> Vec<&mut Expr> {
    match expr {
        Expr::BinaryExpr(BinaryExpr { left, op, right }) if is_comparison(*op) => vec![left.as_mut(), right.as_mut()],
        Expr::Between(Between { expr, low, high, .. }) => vec![expr.as_mut(), low.as_mut(), high.as_mut()],
        Expr::InList(InList { expr, list, .. }) => once(expr.as_mut()).chain(list.iter_mut()).collect(),
        Expr::Case(Case { expr: Some(expr), when_then_expr, .. }) => {
            once(expr.as_mut()).chain(when_then_expr.iter_mut().map(|(when, _)| when.as_mut())).collect()
        }
        _ => Vec::new(),
    }
}

/// One side without the cast that coercion has added.
struct Side {
    expr: Expr,
    ty: DataType,
}

impl Side {
    fn of(side: &Expr, common: &DataType, schema: &DFSchema) -> Result<Side> {
        let expr = match side {
            Expr::Cast(Cast { expr, field }) if field.data_type() == common => expr.as_ref().clone(),
            Expr::ScalarSubquery(rows) => Expr::ScalarSubquery(bare_rows(rows, common)?),
            side => side.clone(),
        };
        let ty = expr.get_type(schema)?;
        Ok(Side { expr, ty })
    }

    /// Of a number that is spelled out: its digits, and the power of ten that they are multiplied by.
    fn spelled(&self) -> Option<(i128, i32)> {
        match &self.expr {
            Expr::Literal(ScalarValue::Float64(Some(value)), _) => shortest(*value),
            Expr::Literal(ScalarValue::Int64(Some(value)), _) => Some(((*value).into(), 0)),
            _ => None,
        }
    }

    /// How many digits it may have before the point and behind it, as a decimal; `None` for what is better none.
    fn digits(&self) -> Option<(i32, i32)> {
        if let Some((digits, exponent)) = self.spelled() {
            let count = digits.unsigned_abs().checked_ilog10().map_or(0, |log| log as i32 + 1);
            return Some(((count + exponent).max(0), (-exponent).max(0)));
        }
        match self.ty {
            DataType::Decimal128(precision, scale) => Some((i32::from(precision) - i32::from(scale), scale.into())),
            DataType::Int16 => Some((5, 0)),
            DataType::Int32 => Some((10, 0)),
            DataType::Int64 => Some((19, 0)),
            DataType::Null => Some((0, 0)),
            _ => None,
        }
    }
}

/// Gives what is compared one type, if there are decimals and DOUBLEs among it; says whether there were.
fn agree(places: &mut [&mut Expr], schema: &DFSchema) -> Result<bool> {
    if !places.iter().any(|place| matches!(&**place, Expr::Cast(_) | Expr::ScalarSubquery(_))) {
        return Ok(false);
    }
    // What has no type here (a parameter whose type nothing says) is no number yet.
    let common = places.first().and_then(|place| place.get_type(schema).ok());
    // With fewer digits behind the point nothing was coerced to it: such a cast is one that SQL says.
    let Some(common @ DataType::Decimal128(_, LEAST_SCALE..)) = common else { return Ok(false) };
    let sides = places.iter().map(|place| Side::of(place, &common, schema)).collect::<Result<Vec<_>>>()?;
    if !sides.iter().any(|side| side.ty.is_floating()) {
        return Ok(false);
    }
    let agreed = match as_decimals(&sides, schema)? {
        Some(decimals) => decimals,
        None => sides.into_iter().map(|side| side.expr.cast_to(&DataType::Float64, schema)).collect::<Result<_>>()?,
    };
    for (place, side) in places.iter_mut().zip(agreed) {
        **place = side;
    }
    Ok(true)
}

/// The same of a value and the rows of a sub-query.
fn agree_with_rows(side: &mut Expr, rows: &mut Subquery, schema: &DFSchema) -> Result<bool> {
    let Ok(common @ DataType::Decimal128(_, LEAST_SCALE..)) = side.get_type(schema) else { return Ok(false) };
    let (bare, members) = (Side::of(side, &common, schema)?, bare_rows(rows, &common)?);
    if !bare.ty.is_floating() && !members.subquery.schema().field(0).data_type().is_floating() {
        return Ok(false);
    }
    *side = bare.expr.cast_to(&DataType::Float64, schema)?;
    *rows = cast_subquery(members, &DataType::Float64)?;
    Ok(true)
}

/// All of them as decimals that lose nothing; `None` where no type has digits enough, or where a DOUBLE is not spelled out.
fn as_decimals(sides: &[Side], schema: &DFSchema) -> Result<Option<Vec<Expr>>> {
    let Some(digits) = sides.iter().map(Side::digits).collect::<Option<Vec<_>>>() else { return Ok(None) };
    let before = digits.iter().map(|(before, _)| *before).max().unwrap_or(0);
    let behind = digits.iter().map(|(_, behind)| *behind).max().unwrap_or(0);
    let precision = u8::try_from((before + behind).max(1)).ok().filter(|all| *all <= DECIMAL128_MAX_PRECISION);
    let (Some(precision), Ok(scale)) = (precision, i8::try_from(behind)) else { return Ok(None) };
    let ty = DataType::Decimal128(precision, scale);
    let as_decimal = |side: &Side| match side.spelled() {
        Some((digits, exponent)) => {
            let unit = u32::try_from(exponent + behind).ok().and_then(|zeros| 10i128.checked_pow(zeros));
            match unit.and_then(|unit| digits.checked_mul(unit)) {
                Some(value) => Ok(Expr::Literal(ScalarValue::Decimal128(Some(value), precision, scale), None)),
                None => internal_err!("{digits}e{exponent} was counted as one of {precision} digits"),
            }
        }
        None => side.expr.clone().cast_to(&ty, schema),
    };
    sides.iter().map(as_decimal).collect::<Result<Vec<_>>>().map(Some)
}

/// The rows of a sub-query without the cast that coercion has added inside.
fn bare_rows(rows: &Subquery, common: &DataType) -> Result<Subquery> {
    let LogicalPlan::Projection(projection) = rows.subquery.as_ref() else { return Ok(rows.clone()) };
    let [Expr::Cast(Cast { expr, field })] = projection.expr.as_slice() else { return Ok(rows.clone()) };
    if field.data_type() != common {
        return Ok(rows.clone());
    }
    let bare = Projection::try_new(vec![expr.as_ref().clone()], projection.input.clone())?;
    Ok(Subquery { subquery: Arc::new(LogicalPlan::Projection(bare)), ..rows.clone() })
}
