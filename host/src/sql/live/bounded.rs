//! What a live query computes happens on a thread that it shares with the live queries of other people: a panic in one of
//! DataFusion's functions must not end that thread, nor may one query keep it for long.
//!
//! Nothing can interrupt a function; so whether there is time left is asked before each one that may take long. What is
//! compared and added up without functions takes no time to speak of, and is not asked.

use std::cell::Cell;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use ::arrow::datatypes::{DataType, FieldRef, Schema};
use ::arrow::record_batch::RecordBatch;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{DataFusionError, Result};
use datafusion::logical_expr::{ColumnarValue, Operator};
use datafusion::physical_expr::expressions::{BinaryExpr, LikeExpr};
use datafusion::physical_expr::{PhysicalExpr, ScalarFunctionExpr};

use crate::sql::SqlError;
use crate::sql::error::panicked;
use crate::telemetry::thread_cpu;

/// CPU time for the rows of one call, and more for each of them; the last function may take as much as it takes.
const LIMIT: Duration = Duration::from_secs(1);
const LIMIT_OF_A_ROW: Duration = Duration::from_micros(50);

thread_local! {
    /// The thread's CPU time at which what runs now has had its share.
    static END: Cell<Option<Duration>> = const { Cell::new(None) };
}

/// Evaluates expressions over so many rows; with `limited` ones among them, within a time. A panic is an error.
pub(super) fn evaluated<T>(
    limited: bool,
    rows: usize,
    evaluate: impl FnOnce() -> Result<T, SqlError>,
) -> Result<T, SqlError> {
    if limited {
        END.set(Some(thread_cpu() + LIMIT + LIMIT_OF_A_ROW * u32::try_from(rows).unwrap_or(u32::MAX)));
    }
    let evaluated = catch_unwind(AssertUnwindSafe(evaluate));
    END.set(None);
    evaluated.unwrap_or_else(|cause| Err(panicked(cause)))
}

/// The expression with its functions limited, and whether there are any.
pub(super) fn limited(expr: Arc<dyn PhysicalExpr>) -> Result<(Arc<dyn PhysicalExpr>, bool)> {
    let limited = expr.transform_up(|expr| {
        let long = expr.is::<ScalarFunctionExpr>()
            || expr.is::<LikeExpr>()
            || expr.downcast_ref::<BinaryExpr>().is_some_and(|binary| is_long(*binary.op()));
        Ok(if long { Transformed::yes(Arc::new(Limited(expr)) as _) } else { Transformed::no(expr) })
    })?;
    Ok((limited.data, limited.transformed))
}

fn is_long(op: Operator) -> bool {
    use Operator::{RegexIMatch, RegexMatch, RegexNotIMatch, RegexNotMatch, StringConcat};
    matches!(op, RegexMatch | RegexIMatch | RegexNotMatch | RegexNotIMatch | StringConcat)
}

/// An expression that is evaluated while there is time.
#[derive(Debug, Eq)]
struct Limited(Arc<dyn PhysicalExpr>);

impl PartialEq for Limited {
    fn eq(&self, other: &Limited) -> bool {
        *self.0 == *other.0
    }
}

impl Hash for Limited {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl fmt::Display for Limited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl PhysicalExpr for Limited {
    fn data_type(&self, schema: &Schema) -> Result<DataType> {
        self.0.data_type(schema)
    }

    fn nullable(&self, schema: &Schema) -> Result<bool> {
        self.0.nullable(schema)
    }

    fn return_field(&self, schema: &Schema) -> Result<FieldRef> {
        self.0.return_field(schema)
    }

    fn evaluate(&self, batch: &RecordBatch) -> Result<ColumnarValue> {
        if END.get().is_some_and(|end| thread_cpu() > end) {
            return Err(too_long());
        }
        self.0.evaluate(batch)
    }

    fn children(&self) -> Vec<&Arc<dyn PhysicalExpr>> {
        vec![&self.0]
    }

    fn with_new_children(self: Arc<Self>, mut children: Vec<Arc<dyn PhysicalExpr>>) -> Result<Arc<dyn PhysicalExpr>> {
        match children.pop() {
            Some(inner) if children.is_empty() => Ok(Arc::new(Limited(inner))),
            _ => Err(DataFusionError::Internal("what is limited is one expression".to_owned())),
        }
    }

    fn fmt_sql(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt_sql(f)
    }
}

fn too_long() -> DataFusionError {
    let message =
        format!("the live query's functions took longer than {LIMIT:?} of CPU time over the rows of a commit");
    SqlError::Limit(message).into_datafusion()
}
