//! Batches without columns, with their weight.
//!
//! `SELECT count(*)` over a join needs no columns, only how many rows there are. A join that keeps one side keeps its
//! batches, and asks the memory pool for what their columns take: nothing. So millions of them were gigabytes that nobody
//! had counted.

use std::fmt;
use std::sync::Arc;

use ::arrow::record_batch::RecordBatch;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Result, internal_err};
use datafusion::execution::memory_pool::MemoryConsumer;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, PlanProperties};
use futures::StreamExt;

/// Of a batch in a list that grows by doubling, and is copied for that.
const BATCH_BYTES: usize = 3 * size_of::<RecordBatch>();

/// Passes on what it reads, and holds memory of the pool for each batch until it has passed on all.
#[derive(Debug)]
pub(crate) struct WeighedExec {
    input: Arc<dyn ExecutionPlan>,
    properties: Arc<PlanProperties>,
}

impl WeighedExec {
    pub(crate) fn new(input: Arc<dyn ExecutionPlan>) -> WeighedExec {
        let properties = input.properties().clone();
        WeighedExec { input, properties }
    }
}

impl DisplayAs for WeighedExec {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("WeighedExec")
    }
}

impl ExecutionPlan for WeighedExec {
    fn name(&self) -> &str {
        "WeighedExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn maintains_input_order(&self) -> Vec<bool> {
        vec![true]
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    // What `replace_children` comes down to.
    fn with_new_children(self: Arc<Self>, mut children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        match children.pop() {
            Some(input) if children.is_empty() => Ok(Arc::new(WeighedExec::new(input))),
            _ => internal_err!("what is weighed is one input"),
        }
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let held = MemoryConsumer::new("batches without columns").register(context.memory_pool());
        let batches = self.input.execute(partition, context)?.map(move |batch| {
            held.try_grow(BATCH_BYTES)?;
            batch
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(self.input.schema(), batches)))
    }
}
