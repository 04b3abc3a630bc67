//! Which functions there are: DataFusion's, without those that make values of any size from nothing, the rest of
//! that kind with a cap; `sum()` without its wrapping around; and `current_user`.
//!
//! Constants are folded while planning, where no memory pool and no deadline reach: so the caps are on the function
//! itself, before it allocates.

use std::sync::Arc;

use ::arrow::array::{Array, ArrayRef, AsArray, Int64Array};
use ::arrow::datatypes::{DataType, Field, FieldRef};
use datafusion::common::{Result, ScalarValue, internal_err};
use datafusion::execution::SessionStateDefaults;
use datafusion::execution::session_state::SessionStateBuilder;
use datafusion::logical_expr::simplify::{ExprSimplifyResult, SimplifyContext};
use datafusion::logical_expr::{
    AggregateUDF, ColumnarValue, Expr, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature,
    Volatility,
};

use super::SqlError;
use super::arrow::string_at;
use super::concat::ConcatPlanner;
use super::planner::is_folding;
use super::sum::exact_sum;

/// The most one call may make, for one row and for all rows of a batch.
const MAX_VALUE: usize = 1024 * 1024;
const MAX_BATCH: usize = 16 * 1024 * 1024;
/// The most pairs of characters that one call may compare, for all rows of a batch: about half a second of work, which
/// nothing interrupts.
const MAX_PAIRS: usize = 256 * 1024 * 1024;
/// The most a constant made while planning: a larger one is left to the execution.
pub(crate) const MAX_FOLDED: usize = 4 * 1024;

/// Not there, and what to do instead.
const REFUSED: &[(&str, &str)] = &[
    ("array_repeat", "it makes values of any size"),
    ("list_repeat", "it makes values of any size"),
    ("array_resize", "it makes values of any size"),
    ("list_resize", "it makes values of any size"),
    ("range", "it makes values of any size"),
    ("generate_series", "it makes values of any size"),
    ("string_agg", "it makes values of any size; use array_agg"),
];

/// The hint for a function that is refused by name.
pub(crate) fn refused_function(name: &str) -> Option<&'static str> {
    REFUSED.iter().find(|(refused, _)| *refused == name).map(|(_, hint)| *hint)
}

/// Adds every function the server has.
pub(crate) fn install(builder: SessionStateBuilder) -> SessionStateBuilder {
    let mut scalars: Vec<Arc<ScalarUDF>> = SessionStateDefaults::default_scalar_functions()
        .into_iter()
        .filter(|function| refused_function(function.name()).is_none())
        .map(capped)
        .collect();
    scalars.push(Arc::new(ScalarUDF::new_from_impl(CurrentUser::new())));
    let aggregates: Vec<Arc<AggregateUDF>> = SessionStateDefaults::default_aggregate_functions()
        .into_iter()
        .filter(|function| refused_function(function.name()).is_none())
        .map(|function| if function.name() == "sum" { Arc::new(exact_sum()) } else { function })
        .collect();
    // After DataFusion's planners: they take `||` of lists.
    let mut planners = SessionStateDefaults::default_expr_planners();
    planners.push(Arc::new(ConcatPlanner::new()));
    builder
        .with_expr_planners(planners)
        .with_scalar_functions(scalars)
        .with_aggregate_functions(aggregates)
        .with_window_functions(SessionStateDefaults::default_window_functions())
}

fn capped(inner: Arc<ScalarUDF>) -> Arc<ScalarUDF> {
    let growth = match inner.name() {
        "repeat" => Growth::Repeat,
        "lpad" | "rpad" => Growth::Pad,
        "replace" | "regexp_replace" => Growth::Replace,
        "encode" => Growth::Encode,
        "concat" | "concat_ws" => Growth::Sum,
        "levenshtein" => Growth::Pairs,
        _ => return inner,
    };
    Arc::new(ScalarUDF::new_from_impl(Capped { inner, growth }))
}

/// How a function's result can outgrow its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Growth {
    /// length × count
    Repeat,
    /// the asked length, in characters of up to four bytes
    Pad,
    /// every character replaced by the replacement
    Replace,
    /// two characters a byte
    Encode,
    /// all arguments, and the first between the others
    Sum,
    /// not the result but the work: every character compared with every other
    Pairs,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Capped {
    inner: Arc<ScalarUDF>,
    growth: Growth,
}

impl Capped {
    fn check(&self, args: &ScalarFunctionArgs) -> Result<()> {
        let rows = args.number_rows;
        let arrays: Vec<ArrayRef> = args
            .args
            .iter()
            .map(|arg| match arg {
                ColumnarValue::Array(array) => Ok(array.clone()),
                ColumnarValue::Scalar(value) => value.to_array_of_size(1),
            })
            .collect::<Result<_>>()?;
        // Scalars alone are one value, whatever the number of rows says.
        let rows = if args.args.iter().all(|arg| matches!(arg, ColumnarValue::Scalar(_))) { 1 } else { rows };
        let mut total = 0usize;
        for row in 0..rows {
            let size = self.size(&arrays, row);
            total = total.saturating_add(size);
            if self.growth == Growth::Pairs {
                if total > MAX_PAIRS {
                    return Err(SqlError::Limit(format!(
                        "{}() would compare {total} pairs of characters; a batch of rows may take {MAX_PAIRS}",
                        self.inner.name(),
                    ))
                    .into_datafusion());
                }
                continue;
            }
            // What only joins or rewrites stored text may be larger than what is made from nothing.
            let (most, most_together) = match self.growth {
                Growth::Replace | Growth::Sum => (MAX_BATCH, 4 * MAX_BATCH),
                Growth::Repeat | Growth::Pad | Growth::Encode | Growth::Pairs => (MAX_VALUE, MAX_BATCH),
            };
            let most = if is_folding() { MAX_FOLDED } else { most };
            if size > most || total > most_together {
                return Err(SqlError::Limit(format!(
                    "{}() would make {} bytes; a value may have {most}",
                    self.inner.name(),
                    size.max(total)
                ))
                .into_datafusion());
            }
        }
        Ok(())
    }

    /// An upper bound of the result's bytes.
    fn size(&self, args: &[ArrayRef], row: usize) -> usize {
        let length = args.first().and_then(|array| text_length(array, row)).unwrap_or(0);
        match self.growth {
            Growth::Repeat => length.saturating_mul(args.get(1).and_then(|array| count_at(array, row)).unwrap_or(0)),
            Growth::Pad => {
                length.max(args.get(1).and_then(|array| count_at(array, row)).unwrap_or(0).saturating_mul(4))
            }
            Growth::Replace => {
                let by = args.get(2).and_then(|array| text_length(array, row)).unwrap_or(0);
                length.saturating_add((length + 1).saturating_mul(by))
            }
            Growth::Encode => length.saturating_mul(2),
            Growth::Pairs => length.saturating_mul(args.get(1).and_then(|array| text_length(array, row)).unwrap_or(0)),
            Growth::Sum => {
                let parts = args.iter().filter_map(|array| text_length(array, row));
                parts.fold(length.saturating_mul(args.len()), usize::saturating_add)
            }
        }
    }
}

/// The row of an array, or the only one of a constant.
fn pick(array: &ArrayRef, row: usize) -> Option<usize> {
    let row = if array.len() == 1 { 0 } else { row };
    (row < array.len() && array.is_valid(row)).then_some(row)
}

fn text_length(array: &ArrayRef, row: usize) -> Option<usize> {
    let row = pick(array, row)?;
    match array.data_type() {
        DataType::Binary => Some(array.as_binary::<i32>().value(row).len()),
        DataType::LargeBinary => Some(array.as_binary::<i64>().value(row).len()),
        DataType::BinaryView => Some(array.as_binary_view().value(row).len()),
        _ => string_at(array, row).map(str::len),
    }
}

fn count_at(array: &ArrayRef, row: usize) -> Option<usize> {
    let row = pick(array, row)?;
    let counts = array.as_any().downcast_ref::<Int64Array>();
    // A count in any other type would be a new signature: then the cap must not be blind.
    counts.map_or(Some(usize::MAX), |counts| usize::try_from(counts.value(row)).ok())
}

impl ScalarUDFImpl for Capped {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn aliases(&self) -> &[String] {
        self.inner.aliases()
    }

    fn signature(&self) -> &Signature {
        self.inner.signature()
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        self.inner.coerce_types(arg_types)
    }

    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        self.inner.return_type(arg_types)
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> Result<FieldRef> {
        self.inner.return_field_from_args(args)
    }

    fn simplify(&self, args: Vec<Expr>, _info: &SimplifyContext) -> Result<ExprSimplifyResult> {
        // The inner function's own simplification could put itself, without a cap, in our place.
        Ok(ExprSimplifyResult::Original(args))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        self.check(&args)?;
        self.inner.invoke_with_args(args)
    }
}

pub(crate) const CURRENT_USER: &str = "current_user";

/// Stands for the user until the plan is bound to a request (`context::bind`).
#[derive(Debug, PartialEq, Eq, Hash)]
struct CurrentUser {
    signature: Signature,
}

impl CurrentUser {
    fn new() -> Self {
        CurrentUser { signature: Signature::nullary(Volatility::Stable) }
    }
}

impl ScalarUDFImpl for CurrentUser {
    fn name(&self) -> &str {
        CURRENT_USER
    }

    fn schema_name(&self, _args: &[Expr]) -> Result<String> {
        Ok(CURRENT_USER.to_owned())
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _arg_types: &[DataType]) -> Result<DataType> {
        Ok(DataType::Utf8)
    }

    fn return_field_from_args(&self, _args: ReturnFieldArgs) -> Result<FieldRef> {
        Ok(Arc::new(Field::new(CURRENT_USER, DataType::Utf8, false)))
    }

    fn invoke_with_args(&self, _args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        internal_err!("current_user is bound before a plan runs")
    }
}

/// What `current_user` is replaced by.
pub(crate) fn current_user_literal(user: &str) -> Expr {
    Expr::Literal(ScalarValue::Utf8(Some(user.to_owned())), None)
}
