//! `||` on text, with a cap.
//!
//! DataFusion's own operator makes values of any size: a few hundred `||` of a large constant are folded while
//! planning, where nothing else bounds memory. Lists and bytes are left to DataFusion.

use std::sync::Arc;

use ::arrow::array::{Array, ArrayRef, StringBuilder};
use ::arrow::datatypes::DataType;
use datafusion::common::{DFSchema, Result, ScalarValue, exec_err, plan_err};
use datafusion::logical_expr::planner::{ExprPlanner, PlannerResult, RawBinaryExpr};
use datafusion::logical_expr::{
    ColumnarValue, Expr, ExprSchemable, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use datafusion::sql::sqlparser::ast::BinaryOperator;

use super::SqlError;
use super::arrow::string_at;

/// The most one row's value may have, and all values of a batch.
const MAX_VALUE: usize = 16 * 1024 * 1024;
const MAX_BATCH: usize = 4 * MAX_VALUE;

/// Puts [`Concat`] in the place of `||` where both sides are text or become text.
#[derive(Debug)]
pub(crate) struct ConcatPlanner {
    concat: Arc<ScalarUDF>,
}

impl ConcatPlanner {
    pub(crate) fn new() -> ConcatPlanner {
        let concat = Concat { signature: Signature::user_defined(Volatility::Immutable) };
        ConcatPlanner { concat: Arc::new(ScalarUDF::new_from_impl(concat)) }
    }
}

impl ExprPlanner for ConcatPlanner {
    fn plan_binary_op(&self, expr: RawBinaryExpr, schema: &DFSchema) -> Result<PlannerResult<RawBinaryExpr>> {
        if expr.op != BinaryOperator::StringConcat {
            return Ok(PlannerResult::Original(expr));
        }
        if !is_texty(&expr.left.get_type(schema)?) || !is_texty(&expr.right.get_type(schema)?) {
            return Ok(PlannerResult::Original(expr));
        }
        Ok(PlannerResult::Planned(self.concat.call(vec![expr.left, expr.right])))
    }
}

fn is_texty(ty: &DataType) -> bool {
    ty.is_string() || ty.is_primitive() || matches!(ty, DataType::Null | DataType::Boolean)
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Concat {
    signature: Signature,
}

impl ScalarUDFImpl for Concat {
    fn name(&self) -> &str {
        "||"
    }

    fn schema_name(&self, args: &[Expr]) -> Result<String> {
        match args {
            [left, right] => Ok(format!("{} || {}", left.schema_name(), right.schema_name())),
            _ => plan_err!("|| has two sides"),
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        Ok(vec![DataType::Utf8; arg_types.len()])
    }

    fn return_type(&self, _arg_types: &[DataType]) -> Result<DataType> {
        Ok(DataType::Utf8)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let [left, right] = args.args.as_slice() else { return exec_err!("|| has two sides") };
        if let (ColumnarValue::Scalar(left), ColumnarValue::Scalar(right)) = (left, right) {
            let joined = concat(&left.to_array()?, &right.to_array()?, 1)?;
            return Ok(ColumnarValue::Scalar(ScalarValue::try_from_array(&joined, 0)?));
        }
        let joined = concat(&one_or_all(left)?, &one_or_all(right)?, args.number_rows)?;
        Ok(ColumnarValue::Array(joined))
    }
}

/// A constant stays one cell: it is not repeated for every row.
fn one_or_all(value: &ColumnarValue) -> Result<ArrayRef> {
    match value {
        ColumnarValue::Array(array) => Ok(array.clone()),
        ColumnarValue::Scalar(value) => value.to_array(),
    }
}

fn concat(left: &ArrayRef, right: &ArrayRef, rows: usize) -> Result<ArrayRef> {
    let cell = |array: &ArrayRef, row: usize| if array.len() == 1 { 0 } else { row };
    let mut builder = StringBuilder::with_capacity(rows, rows * 16);
    let (mut joined, mut total) = (String::new(), 0);
    for row in 0..rows {
        let (at_left, at_right) = (cell(left, row), cell(right, row));
        let sides = (string_at(left, at_left), string_at(right, at_right));
        let (Some(first), Some(second)) = sides else { return exec_err!("|| takes text") };
        if left.is_null(at_left) || right.is_null(at_right) {
            builder.append_null();
            continue;
        }
        total += first.len() + second.len();
        if first.len() + second.len() > MAX_VALUE || total > MAX_BATCH {
            let message = format!("|| would make {total} bytes; a value may have {MAX_VALUE}");
            return Err(SqlError::Limit(message).into_datafusion());
        }
        joined.clear();
        joined.push_str(first);
        joined.push_str(second);
        builder.append_value(&joined);
    }
    Ok(Arc::new(builder.finish()))
}
