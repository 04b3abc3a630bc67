//! Operators that read something themselves: without inputs, in one partition, for whoever runs them. What they read is
//! a [`Reader`]; the rest of what DataFusion wants of an operator is the same for all and stands here.

use std::fmt;
use std::sync::Arc;

use super::RequestEnv;
use ::arrow::datatypes::SchemaRef;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Result, internal_datafusion_err, internal_err};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::{EquivalenceProperties, PhysicalExpr};
use datafusion::physical_plan::coop::CooperativeExec;
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion::physical_plan::filter::FilterExec;
use datafusion::physical_plan::limit::{GlobalLimitExec, LocalLimitExec};
use datafusion::physical_plan::projection::ProjectionExec;
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, Partitioning, PlanProperties};
use datafusion::prelude::SessionConfig;

pub(super) trait Reader: fmt::Debug + Send + Sync + 'static {
    const NAME: &'static str;

    /// As EXPLAIN shows it.
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result;

    /// Starts to read, for this request.
    fn read(&self, env: Arc<RequestEnv>, schema: &SchemaRef, rows: RowsAsked) -> Result<SendableRecordBatchStream>;
}

/// How many rows a reader is asked for at a time.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowsAsked {
    pub(super) batch: usize,
    /// After how many rows the plan has enough, as far as it says so; those that it drops are not among them.
    pub(super) wanted: Option<usize>,
}

/// What a plan says in its task context of the rows that it wants.
struct Wanted(usize);

/// Tells the readers of a plan when it has a LIMIT and nothing between that and a reader keeps rows back.
pub(super) fn telling_wanted(config: SessionConfig, plan: &Arc<dyn ExecutionPlan>) -> SessionConfig {
    match wanted(plan) {
        Some(rows) => config.with_extension(Arc::new(Wanted(rows))),
        None => config,
    }
}

fn wanted(plan: &Arc<dyn ExecutionPlan>) -> Option<usize> {
    let (mut plan, mut rows) = (plan, None);
    loop {
        rows = plan.fetch().or(rows);
        match plan.children()[..] {
            [] => return rows,
            [child] if passes_on(plan) => plan = child,
            _ => return None,
        }
    }
}

/// Whether it needs no more rows of its input than it is asked for, but for those that it drops.
fn passes_on(plan: &Arc<dyn ExecutionPlan>) -> bool {
    plan.is::<FilterExec>()
        || plan.is::<ProjectionExec>()
        || plan.is::<GlobalLimitExec>()
        || plan.is::<LocalLimitExec>()
        || plan.is::<CooperativeExec>()
}

#[derive(Debug)]
pub(super) struct Leaf<R> {
    reader: R,
    properties: Arc<PlanProperties>,
}

impl<R: Reader> Leaf<R> {
    /// `equivalences` has the columns of the rows, and says in which order these come, if in any.
    pub(super) fn plan(reader: R, equivalences: EquivalenceProperties) -> Arc<dyn ExecutionPlan> {
        let properties = PlanProperties::new(
            equivalences,
            Partitioning::UnknownPartitioning(1),
            EmissionType::Incremental,
            Boundedness::Bounded,
        );
        Arc::new(Leaf { reader, properties: Arc::new(properties) })
    }
}

impl<R: Reader> DisplayAs for Leaf<R> {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter) -> fmt::Result {
        self.reader.show(f)
    }
}

impl<R: Reader> ExecutionPlan for Leaf<R> {
    fn name(&self) -> &str {
        R::NAME
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        Vec::new()
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    // What `replace_children` comes down to.
    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        if children.is_empty() { Ok(self) } else { internal_err!("{} has no children", R::NAME) }
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        if partition != 0 {
            return internal_err!("{} has one partition, not {partition}", R::NAME);
        }
        let config = context.session_config();
        let env = config
            .get_extension::<RequestEnv>()
            .ok_or_else(|| internal_datafusion_err!("{} was started outside of a request", R::NAME))?;
        let wanted = config.get_extension::<Wanted>().map(|wanted| wanted.0);
        self.reader.read(env, &self.schema(), RowsAsked { batch: config.batch_size(), wanted })
    }
}
