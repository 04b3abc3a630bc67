//! Joins that come back now and then.
//!
//! DataFusion makes its scans cooperative: after some batches they let others have the thread, which is also when a
//! query notices that nobody wants it any more. But a join makes any number of batches out of one that it has read, and an
//! aggregate above it takes them all before it comes back. So joins count as well. What a join keeps of its left side is
//! weighed where the batches themselves seem to weigh nothing ([`weighed`](super::weighed)).

use std::sync::Arc;

use datafusion::common::Result;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::coop::CooperativeExec;
use datafusion::physical_plan::execution_plan::{ChildrenPropertiesMode, ReplaceChildrenOptions};
use datafusion::physical_plan::joins::{CrossJoinExec, HashJoinExec, NestedLoopJoinExec};
use datafusion::physical_plan::unnest::UnnestExec;

use super::weighed::WeighedExec;

/// To come last: it looks at the operators as they will run.
#[derive(Debug)]
pub(crate) struct YieldingJoins;

impl PhysicalOptimizerRule for YieldingJoins {
    fn optimize(&self, plan: Arc<dyn ExecutionPlan>, _config: &ConfigOptions) -> Result<Arc<dyn ExecutionPlan>> {
        plan.transform_up(|plan| {
            if !multiplies(&plan) {
                return Ok(Transformed::no(plan));
            }
            let plan = with_weighed_side(plan)?;
            Ok(Transformed::yes(Arc::new(CooperativeExec::new(plan)) as Arc<dyn ExecutionPlan>))
        })
        .data()
    }

    fn name(&self) -> &str {
        "YieldingJoins"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

/// The join with its left side, which it keeps, weighed where that has no columns.
fn with_weighed_side(plan: Arc<dyn ExecutionPlan>) -> Result<Arc<dyn ExecutionPlan>> {
    let mut children: Vec<Arc<dyn ExecutionPlan>> = plan.children().into_iter().cloned().collect();
    match children.first_mut() {
        Some(kept) if kept.schema().fields().is_empty() => *kept = Arc::new(WeighedExec::new(kept.clone())),
        _ => return Ok(plan),
    }
    plan.replace_children(children, ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute))
}

/// Whether it makes many batches out of one.
fn multiplies(plan: &Arc<dyn ExecutionPlan>) -> bool {
    plan.is::<CrossJoinExec>()
        || plan.is::<HashJoinExec>()
        || plan.is::<NestedLoopJoinExec>()
        || plan.is::<UnnestExec>()
}
