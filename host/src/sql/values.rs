//! `VALUES` of constants and parameters as a batch, around the planner: what an application's INSERT sends, and what
//! its UPDATE sets.
//!
//! Only what DataFusion would type the same way goes this way: every column's cells have one type, or are NULL.

use std::sync::Arc;

use ::arrow::array::{ArrayRef, new_null_array};
use ::arrow::datatypes::{DataType, Field, Schema};
use ::arrow::record_batch::RecordBatch;
use datafusion::common::ScalarValue;
use datafusion::sql::sqlparser::ast::{self, Expr, SetExpr, Statement as Ast, UnaryOperator};

use super::RequestEnv;
use super::context::param_value;

/// The rows of the query, if they are constants.
pub(crate) fn rows(query: &Ast, env: &RequestEnv) -> Option<RecordBatch> {
    let Ast::Query(query) = query else { return None };
    let SetExpr::Values(values) = &*query.body else { return None };
    let bare = query.with.is_none() && query.order_by.is_none() && query.limit_clause.is_none();
    if !bare {
        return None;
    }
    let width = values.rows.first()?.content.len();
    let mut columns: Vec<Vec<ScalarValue>> = vec![Vec::with_capacity(values.rows.len()); width];
    for row in &values.rows {
        if row.content.len() != width {
            return None;
        }
        for (cell, column) in row.content.iter().zip(&mut columns) {
            column.push(constant(cell, env)?);
        }
    }
    let arrays: Vec<ArrayRef> = columns.into_iter().map(array).collect::<Option<_>>()?;
    let field =
        |(at, array): (usize, &ArrayRef)| Field::new(format!("column{}", at + 1), array.data_type().clone(), true);
    let schema = Schema::new(arrays.iter().enumerate().map(field).collect::<Vec<_>>());
    RecordBatch::try_new(Arc::new(schema), arrays).ok()
}

/// The cells of one row, if they are constants.
pub(crate) fn row(cells: &[Expr], env: &RequestEnv) -> Option<Vec<ArrayRef>> {
    cells.iter().map(|cell| array(vec![constant(cell, env)?])).collect()
}

fn constant(cell: &Expr, env: &RequestEnv) -> Option<ScalarValue> {
    match cell {
        Expr::Value(value) => match &value.value {
            ast::Value::Number(digits, _) => number(digits, false),
            ast::Value::SingleQuotedString(text) => Some(ScalarValue::Utf8(Some(text.clone()))),
            ast::Value::Boolean(value) => Some(ScalarValue::Boolean(Some(*value))),
            ast::Value::Null => Some(ScalarValue::Null),
            ast::Value::Placeholder(name) => {
                let number: usize = name.strip_prefix('$')?.parse().ok()?;
                env.params.get(number.checked_sub(1)?).map(param_value)
            }
            _ => None,
        },
        Expr::UnaryOp { op: UnaryOperator::Minus, expr } => match &**expr {
            Expr::Value(value) => match &value.value {
                ast::Value::Number(digits, _) => number(digits, true),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    }
}

/// As DataFusion types numbers: BIGINT where it fits, DOUBLE where it has a point or an exponent.
fn number(digits: &str, negative: bool) -> Option<ScalarValue> {
    if digits.bytes().all(|byte| byte.is_ascii_digit()) {
        let value: i64 = digits.parse().ok()?;
        return Some(ScalarValue::Int64(Some(if negative { -value } else { value })));
    }
    let value: f64 = digits.parse().ok()?;
    Some(ScalarValue::Float64(Some(if negative { -value } else { value })))
}

/// Cells of one type; NULLs take the type of the others.
fn array(cells: Vec<ScalarValue>) -> Option<ArrayRef> {
    let rows = cells.len();
    let Some(ty) = cells.iter().map(ScalarValue::data_type).find(|ty| *ty != DataType::Null) else {
        return Some(new_null_array(&DataType::Null, rows));
    };
    let null = ScalarValue::try_from(&ty).ok()?;
    let cells = cells.into_iter().map(|cell| match cell {
        ScalarValue::Null => Some(null.clone()),
        cell => (cell.data_type() == ty).then_some(cell),
    });
    ScalarValue::iter_to_array(cells.collect::<Option<Vec<_>>>()?).ok()
}
