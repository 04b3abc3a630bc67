//! Which functions there are: DataFusion's, without those that make values of any size from nothing, the rest of
//! that kind with a cap; `sum()` without its wrapping around; and `current_user`.
//!
//! Constants are folded while planning, where no memory pool and no deadline reach: so the caps are on the function
//! itself, before it allocates.

use std::any::Any;
use std::sync::Arc;

use ::arrow::array::{Array, ArrayRef, AsArray, Int64Array, OffsetSizeTrait};
use ::arrow::datatypes::{DataType, Field, FieldRef};
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{Result, ScalarValue, internal_err};
use datafusion::execution::SessionStateDefaults;
use datafusion::execution::session_state::SessionStateBuilder;
use datafusion::logical_expr::simplify::{ExprSimplifyResult, SimplifyContext};
use datafusion::logical_expr::{
    AggregateUDF, ColumnarValue, Expr, LogicalPlan, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl,
    Signature, Volatility,
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
/// The deepest type that may be named in a text: what is read and handled with one call a level overflows a stack.
const MAX_TYPE_LEVELS: usize = 16;
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
    match growth(inner.name()) {
        Some(growth) => Arc::new(ScalarUDF::new_from_impl(Capped { inner, growth })),
        None => inner,
    }
}

fn growth(function: &str) -> Option<Growth> {
    Some(match function {
        "make_array" | "array_append" | "array_prepend" | "array_concat" | "array_insert" | "array_union"
        | "array_replace" | "array_zip" | "arrays_zip" | "string_to_array" | "map" | "map_from_arrays"
        | "named_struct" | "struct" => Growth::Lists,
        "array_to_string" | "array_replace_n" | "array_replace_all" => Growth::Elements,
        "repeat" => Growth::Repeat,
        "lpad" | "rpad" => Growth::Pad,
        "replace" | "regexp_replace" => Growth::Replace,
        "encode" => Growth::Encode,
        "concat" | "concat_ws" => Growth::Sum,
        "levenshtein" => Growth::Pairs,
        "arrow_cast" | "arrow_try_cast" => Growth::Levels,
        _ => return None,
    })
}

/// The plan with the caps on what it was planned with as well: `[x, y]`, `{a: x}` and `||` of lists are functions that
/// nobody named.
pub(crate) fn with_caps(plan: LogicalPlan) -> Result<LogicalPlan> {
    let plan = plan.transform_up_with_subqueries(|plan| {
        plan.map_expressions(|expr| {
            expr.transform_up(|expr| match expr {
                Expr::ScalarFunction(mut call) if growth(call.func.name()).is_some() && !is_capped(&call.func) => {
                    call.func = capped(call.func);
                    Ok(Transformed::yes(Expr::ScalarFunction(call)))
                }
                expr => Ok(Transformed::no(expr)),
            })
        })
    })?;
    Ok(plan.data)
}

fn is_capped(function: &ScalarUDF) -> bool {
    let inner: &dyn Any = function.inner().as_ref();
    inner.is::<Capped>()
}

/// How what a function makes, or what that takes, can outgrow its arguments.
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
    /// all arguments, lists among them
    Lists,
    /// of each element of a list it may make another, or put one beside it
    Elements,
    /// not the result but the work: every character compared with every other
    Pairs,
    /// not the result but its type, which is told by name: every level a list or record in another
    Levels,
}

impl Growth {
    /// An upper bound of what a function makes of lists for all rows together; `None` for others.
    fn of_lists(self, args: &[ColumnarValue], arrays: &[ArrayRef], rows: usize) -> Option<usize> {
        let times = |arg: &ColumnarValue| if matches!(arg, ColumnarValue::Scalar(_)) { rows } else { 1 };
        let sizes = args.iter().zip(arrays).map(|(arg, array)| bytes(array).saturating_mul(times(arg)));
        let all = sizes.fold(0, usize::saturating_add);
        match self {
            Growth::Lists => Some(all),
            Growth::Elements => {
                let mut pairs = args.iter().zip(arrays);
                let elements = pairs.next().map_or(0, |(arg, list)| elements(list).saturating_mul(times(arg)));
                // An argument of so many bytes for all rows may have them all in one.
                let largest = pairs.map(|(_, array)| bytes(array)).max().unwrap_or(0);
                Some(all.saturating_add(elements.saturating_mul(largest)))
            }
            _ => None,
        }
    }
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Capped {
    inner: Arc<ScalarUDF>,
    growth: Growth,
}

impl Capped {
    fn check(&self, args: &ScalarFunctionArgs) -> Result<()> {
        if self.growth == Growth::Levels {
            return Ok(());
        }
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
        if let Some(size) = self.growth.of_lists(&args.args, &arrays, rows) {
            return self.bounded(size, 4 * MAX_BATCH);
        }
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
                _ => (MAX_VALUE, MAX_BATCH),
            };
            self.bounded(size, most)?;
            self.bounded(total, most_together)?;
        }
        Ok(())
    }

    fn bounded(&self, size: usize, most: usize) -> Result<()> {
        let most = if is_folding() { MAX_FOLDED.min(most) } else { most };
        if size <= most {
            return Ok(());
        }
        let name = self.inner.name();
        Err(SqlError::Limit(format!("{name}() would make {size} bytes; it may make {most}")).into_datafusion())
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
            _ => {
                let parts = args.iter().filter_map(|array| text_length(array, row));
                parts.fold(length.saturating_mul(args.len()), usize::saturating_add)
            }
        }
    }
}

/// What an array holds, without what else lies in its buffers.
fn bytes(array: &ArrayRef) -> usize {
    let own = match inner(array) {
        Some(parts) => return parts.iter().map(bytes).fold(8 * array.len(), usize::saturating_add),
        None => array.to_data().get_slice_memory_size(),
    };
    own.unwrap_or_else(|_| array.get_array_memory_size())
}

/// All elements of the lists of an array, and of lists in those.
fn elements(array: &ArrayRef) -> usize {
    match inner(array) {
        Some(parts) => parts.iter().map(elements).fold(0, usize::saturating_add),
        None => array.len(),
    }
}

/// What the rows of an array of lists or structs are made of.
fn inner(array: &ArrayRef) -> Option<Vec<ArrayRef>> {
    fn between<O: OffsetSizeTrait>(offsets: &[O], values: &ArrayRef) -> Option<Vec<ArrayRef>> {
        let (first, last) = (offsets.first()?.as_usize(), offsets.last()?.as_usize());
        Some(vec![values.slice(first, last - first)])
    }
    match array.data_type() {
        DataType::List(_) => between(array.as_list::<i32>().offsets(), array.as_list::<i32>().values()),
        DataType::LargeList(_) => between(array.as_list::<i64>().offsets(), array.as_list::<i64>().values()),
        DataType::FixedSizeList(..) => Some(vec![array.as_fixed_size_list().values().clone()]),
        DataType::Map(..) => {
            let map = array.as_map();
            between(map.offsets(), &(Arc::new(map.entries().clone()) as ArrayRef))
        }
        DataType::Struct(_) => Some(array.as_struct().columns().to_vec()),
        _ => None,
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
        if self.growth == Growth::Levels {
            let name = args.scalar_arguments.get(1).copied().flatten();
            let levels = name.and_then(|name| name.try_as_str().flatten()).map_or(0, |name| name.matches('(').count());
            if levels > MAX_TYPE_LEVELS {
                let message = format!("a type of {levels} levels in {}(), more than {MAX_TYPE_LEVELS}", self.name());
                return Err(SqlError::Limit(message).into_datafusion());
            }
        }
        self.inner.return_field_from_args(args)
    }

    fn simplify(&self, args: Vec<Expr>, info: &SimplifyContext) -> Result<ExprSimplifyResult> {
        match self.growth {
            Growth::Levels => self.inner.simplify(args, info),
            // The inner function's own simplification could put itself, without a cap, in our place.
            _ => Ok(ExprSimplifyResult::Original(args)),
        }
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
