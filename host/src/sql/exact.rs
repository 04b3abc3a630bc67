//! Where DataFusion answers something else than SQL says, the plan is changed before it is optimized.
//!
//! - `+ - *` and `-x` of integers wrap around there; here leaving the range of their type is an error.
//! - `x IN (a, b)` and `x NOT IN (c, NULL)` are joined there as sets of constants, though a column is among them, or
//!   NULL; such a list becomes comparisons.
//! - Decimals, and casts that drop something: [`decimals`](super::decimals). A decimal beside a DOUBLE:
//!   [`mixed`](super::mixed).
//! - Casts to REAL and DOUBLE make infinities there: [`narrow`](super::narrow).
//! - A sub-query that finds no row is NULL: [`or_null`](super::or_null).
//! - `x [NOT] IN (sub-query)` inside another expression is true or false there, never NULL: it becomes a mark join.
//!
//! Patterns of LIKE are bounded on the way.

use std::sync::{Arc, LazyLock};

use ::arrow::array::{ArrayRef, Datum};
use ::arrow::compute::kernels::numeric::{add, mul, sub};
use ::arrow::datatypes::{DataType, Field, FieldRef};
use ::arrow::error::ArrowError;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, DFSchema, Result, ScalarValue, exec_err, internal_err};
use datafusion::logical_expr::expr::{Cast, InList, InSubquery, Like, TryCast};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{
    BinaryExpr, ColumnarValue, Expr, ExprSchemable, LogicalPlan, LogicalPlanBuilder, Operator, ReturnFieldArgs,
    ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility, binary_expr, exists, lit, when,
};
use datafusion::physical_expr_common::datum::apply;

use super::SqlError;
use super::context::schema_of_expressions;
use super::{decimals, mixed, narrow, or_null};

/// The plan, which has its types already, so that it means what SQL says.
pub(crate) fn exact(plan: LogicalPlan) -> Result<LogicalPlan> {
    let plan = plan.transform_up_with_subqueries(|plan| {
        let plan = mixed::agreed(plan)?.transform_data(in_three_values)?;
        plan.transform_data(expressions)
    })?;
    or_null::empty_is_null(plan.data)
}

fn expressions(plan: LogicalPlan) -> Result<Transformed<LogicalPlan>> {
    // Most nodes have nothing of the kind, and need no look at the types of their columns.
    if !may_differ(&plan)? {
        return Ok(Transformed::no(plan));
    }
    let schema = schema_of_expressions(&plan)?;
    let names = NamePreserver::new(&plan);
    plan.map_expressions(|expr| {
        let name = names.save(&expr);
        let exact = expr.transform_up(|expr| match expr {
            Expr::BinaryExpr(_) => Ok(checked_operation(expr, &schema)),
            Expr::Negative(inner) => negated(inner, &schema),
            Expr::InList(list) => listed(list),
            Expr::Cast(_) | Expr::TryCast(_) => {
                narrow::cast(expr, &schema).transform_data(|expr| Ok(decimals::cast(expr, &schema)))
            }
            Expr::Like(_) => bounded_pattern(&expr).map(|()| Transformed::no(expr)),
            expr => Ok(Transformed::no(expr)),
        })?;
        Ok(exact.update_data(|expr| name.restore(expr)))
    })
}

fn may_differ(plan: &LogicalPlan) -> Result<bool> {
    let one = |expr: &Expr| {
        Ok(match expr {
            Expr::BinaryExpr(BinaryExpr { op, .. }) => op.is_numerical_operators(),
            Expr::Negative(_) | Expr::InList(_) | Expr::Cast(_) | Expr::TryCast(_) | Expr::Like(_) => true,
            _ => false,
        })
    };
    let mut found = false;
    plan.apply_expressions(|expr| {
        found |= expr.exists(one)?;
        Ok(if found { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
    })?;
    Ok(found)
}

// ---- LIKE ----

/// The most `%` and `_` of a pattern that is known while planning, where it is compared with constants at once: the work
/// grows by their number and by the length of the text, and nothing interrupts it.
const MAX_WILDCARDS: usize = 1_000;

/// Refuses a pattern that could keep a planning thread for long.
pub(crate) fn bounded_pattern(expr: &Expr) -> Result<()> {
    let Expr::Like(Like { pattern, .. }) = expr else { return Ok(()) };
    let mut pattern = pattern.as_ref();
    while let Expr::Cast(Cast { expr, .. }) | Expr::TryCast(TryCast { expr, .. }) = pattern {
        pattern = expr;
    }
    let Expr::Literal(value, _) = pattern else { return Ok(()) };
    let text = value.try_as_str().flatten().unwrap_or_default();
    let wildcards = text.bytes().filter(|byte| matches!(byte, b'%' | b'_')).count();
    if wildcards > MAX_WILDCARDS {
        let message = format!("a LIKE pattern has {wildcards} wildcards, more than {MAX_WILDCARDS}");
        return Err(SqlError::Limit(message).into_datafusion());
    }
    Ok(())
}

// ---- IN lists ----

fn listed(list: InList) -> Result<Transformed<Expr>> {
    let is_constant = |expr: &Expr| matches!(expr, Expr::Literal(value, _) if !value.is_null());
    if list.list.iter().all(is_constant) || list.expr.is_volatile() {
        return Ok(Transformed::no(Expr::InList(list)));
    }
    let InList { expr, list, negated } = list;
    let (compare, join) = if negated { (Operator::NotEq, Operator::And) } else { (Operator::Eq, Operator::Or) };
    let mut parts: Vec<Expr> = list.into_iter().map(|member| binary_expr(*expr.clone(), compare, member)).collect();
    // Joined in pairs, so that a long list is no deep expression.
    while parts.len() > 1 {
        let mut pairs = parts.into_iter();
        parts = std::iter::from_fn(|| match (pairs.next(), pairs.next()) {
            (Some(one), Some(other)) => Some(binary_expr(one, join, other)),
            (one, _) => one,
        })
        .collect();
    }
    parts.pop().map_or_else(|| internal_err!("an IN list without members"), |expr| Ok(Transformed::yes(expr)))
}

// ---- arithmetic that stays in its range ----

fn checked_operation(expr: Expr, schema: &DFSchema) -> Transformed<Expr> {
    let Expr::BinaryExpr(BinaryExpr { left, op, right }) = &expr else { return Transformed::no(expr) };
    if op.is_numerical_operators() && left.get_type(schema).is_ok_and(|ty| ty.is_decimal()) {
        return decimals::counted(expr, schema);
    }
    let Some(function) = Checked::of(*op) else { return Transformed::no(expr) };
    // What has no type here (a parameter whose type nothing says) is no number yet.
    let is_integer = |side: &Expr| side.get_type(schema).is_ok_and(|ty| ty.is_integer());
    if !is_integer(left) || !is_integer(right) {
        return Transformed::no(expr);
    }
    Transformed::yes(function.call(vec![left.as_ref().clone(), right.as_ref().clone()]))
}

/// `-x` of an integer is `0 - x`; a constant keeps its sign, by which it is known as one.
fn negated(inner: Box<Expr>, schema: &DFSchema) -> Result<Transformed<Expr>> {
    let is_constant = matches!(*inner, Expr::Literal(..));
    let ty = inner.get_type(schema).ok().filter(|ty| ty.is_integer() && !is_constant);
    let Some((ty, minus)) = ty.zip(Checked::of(Operator::Minus)) else {
        return Ok(Transformed::no(Expr::Negative(inner)));
    };
    Ok(Transformed::yes(minus.call(vec![lit(ScalarValue::new_zero(&ty)?), *inner])))
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Checked {
    op: Operator,
    name: &'static str,
    signature: Signature,
}

impl Checked {
    /// The functions are made once: planning is frequent.
    fn of(op: Operator) -> Option<&'static ScalarUDF> {
        static FUNCTIONS: LazyLock<[ScalarUDF; 3]> = LazyLock::new(|| {
            [(Operator::Plus, "+"), (Operator::Minus, "-"), (Operator::Multiply, "*")].map(|(op, name)| {
                let signature = Signature::any(2, Volatility::Immutable);
                ScalarUDF::new_from_impl(Checked { op, name, signature })
            })
        });
        let at = match op {
            Operator::Plus => 0,
            Operator::Minus => 1,
            Operator::Multiply => 2,
            _ => return None,
        };
        Some(&FUNCTIONS[at])
    }
}

impl ScalarUDFImpl for Checked {
    fn name(&self) -> &str {
        self.name
    }

    /// As the operator is called, so that columns of a result keep their names.
    fn schema_name(&self, args: &[Expr]) -> Result<String> {
        match args {
            [left, right] => Ok(format!("{} {} {}", left.schema_name(), self.name, right.schema_name())),
            _ => internal_err!("{} has two sides", self.name),
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        match types {
            [left, right] if left == right => Ok(left.clone()),
            _ => internal_err!("the sides of {} differ in type: {types:?}", self.name),
        }
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> Result<FieldRef> {
        let types: Vec<DataType> = args.arg_fields.iter().map(|field| field.data_type().clone()).collect();
        let nullable = args.arg_fields.iter().any(|field| field.is_nullable());
        Ok(Arc::new(Field::new(self.name, self.return_type(&types)?, nullable)))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let [left, right] = args.args.as_slice() else { return exec_err!("{} has two sides", self.name) };
        let kernel: fn(&dyn Datum, &dyn Datum) -> Result<ArrayRef, ArrowError> = match self.op {
            Operator::Plus => add,
            Operator::Minus => sub,
            _ => mul,
        };
        apply(left, right, kernel)
    }
}

// ---- IN (sub-query) in three values ----

/// A conjunct that is nothing but `x [NOT] IN (…)` becomes a semi or an anti join, which know of NULL. One inside
/// another expression becomes a column of marks, which does not: there the cases in which it is unknown are spelled out.
fn in_three_values(plan: LogicalPlan) -> Result<Transformed<LogicalPlan>> {
    let LogicalPlan::Filter(filter) = &plan else { return Ok(Transformed::no(plan)) };
    if !split_conjunction(&filter.predicate).into_iter().any(has_inner_membership) {
        return Ok(Transformed::no(plan));
    }
    let schema = filter.input.schema().clone();
    plan.map_expressions(|predicate| {
        let conjuncts =
            split_conjunction(&predicate).into_iter().map(|conjunct| match has_inner_membership(conjunct) {
                false => Ok(conjunct.clone()),
                true => conjunct.clone().transform_up(|expr| with_unknown(expr, &schema)).map(|done| done.data),
            });
        let together = conjuncts.reduce(|all, next| Ok(all?.and(next?)));
        Ok(Transformed::yes(together.unwrap_or(Ok(predicate))?))
    })
}

fn has_inner_membership(conjunct: &Expr) -> bool {
    let whole = match conjunct {
        Expr::Not(negated) => negated.as_ref(),
        whole => whole,
    };
    let is_membership = |expr: &Expr| Ok(matches!(expr, Expr::InSubquery(_)));
    !matches!(whole, Expr::InSubquery(_)) && conjunct.exists(is_membership).unwrap_or(false)
}

/// `x IN (S)` is true where a row equals, else unknown where x is NULL and S has rows, or S has a NULL; else false.
fn with_unknown(expr: Expr, schema: &DFSchema) -> Result<Transformed<Expr>> {
    let Expr::InSubquery(InSubquery { expr: x, subquery, negated }) = &expr else { return Ok(Transformed::no(expr)) };
    let rows = subquery.subquery.as_ref();
    let y = Expr::Column(Column::from(rows.schema().qualified_field(0)));
    let one_of = |rows: LogicalPlanBuilder| -> Result<Expr> {
        // One row is as good as all, and joined faster; where each row of the outer query has its own, all are needed.
        let alone = subquery.outer_ref_columns.is_empty();
        let rows = if alone { rows.limit(0, Some(1))? } else { rows };
        Ok(exists(Arc::new(rows.build()?)))
    };
    let mut unknown = Vec::new();
    if x.nullable(schema)? {
        unknown.push(x.as_ref().clone().is_null().and(one_of(LogicalPlanBuilder::from(rows.clone()))?));
    }
    if rows.schema().field(0).is_nullable() {
        unknown.push(one_of(LogicalPlanBuilder::from(rows.clone()).filter(y.is_null())?)?);
    }
    let Some(unknown) = unknown.into_iter().reduce(Expr::or) else { return Ok(Transformed::no(expr)) };
    let found = Expr::InSubquery(InSubquery { expr: x.clone(), subquery: subquery.clone(), negated: false });
    let null = lit(ScalarValue::Boolean(None));
    let value = when(found, lit(!negated)).when(unknown, null).otherwise(lit(*negated))?;
    Ok(Transformed::yes(value))
}
