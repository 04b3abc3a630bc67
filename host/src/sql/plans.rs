//! Statements and logical plans kept between executions.
//!
//! What is kept holds nothing of a user or an execution: a [`Template`] is an optimized *logical* plan in which
//! parameters, `now()` and `current_user` are still symbols. Every execution binds them and plans physically anew. A
//! physical plan is never run twice: its operators keep state, and showed one user's rows to the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use datafusion::common::Result;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::datasource::cte_worktable::CteWorkTable;
use datafusion::datasource::source_as_provider;
use datafusion::logical_expr::{Expr, LogicalPlan, Operator};
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::dml::by_key::RowPlan;
use super::provider::Rows;
use super::{Param, RequestEnv, Statement, dml, narrow};

/// What is kept of a statement besides its text, roughly: syntax tree or plan.
const ENTRY_BYTES: u64 = 4 * 1024;
/// Trees of this many bytes come from one byte of SQL, roughly.
const BYTES_PER_BYTE: u64 = 24;
/// Longer texts are hardly sent twice: rows spelled out.
const LONGEST_TEXT: usize = 16 * 1024;
/// What took longer to plan logically is planned physically on a planning thread, not on an async one.
const QUICK: Duration = Duration::from_millis(5);

/// Texts to statements, and statements to templates; each bounded, the least used go first.
pub(crate) struct Plans {
    statements: Cache<Arc<str>, Arc<[Statement]>, ByText>,
    templates: Cache<Key, Arc<Template>, ByText>,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// All that a template depends on. The settings are those of the server and never change while it runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    text: Arc<str>,
    /// Which statement of the text.
    index: usize,
    namespace: String,
    params: Box<[u8]>,
    catalog: u64,
}

/// A statement planned as far as it is the same for every execution.
pub(crate) struct Template {
    /// What the rows of the plan mean, where it is no query.
    pub(crate) target: Option<dml::Target>,
    pub(crate) plan: LogicalPlan,
    /// The same for a row at hand, where that is possible.
    pub(crate) row: Option<RowPlan>,
    /// Whether there is anything to bind.
    pub(crate) symbolic: bool,
    /// Joins, sorts, aggregates: work that can take much more than it reads.
    pub(crate) heavy: bool,
    /// Rows of one table, filtered, computed with, cut off: nothing else.
    pub(crate) plain: bool,
    /// May be read for as long as its reader likes: it holds nothing that others wait for, and no row that it has not read
    /// yet goes away.
    pub(crate) unhurried: bool,
    /// Runs a part of itself again and again.
    pub(crate) recursive: bool,
    /// Small enough to be planned physically where it is asked for.
    pub(crate) quick: bool,
    /// Computes nothing that could take long between two batches: it may run on any thread.
    pub(crate) brief: bool,
    /// Whether it may be used again.
    kept: bool,
}

#[derive(Clone)]
struct ByText;

impl Weighter<Arc<str>, Arc<[Statement]>> for ByText {
    fn weight(&self, text: &Arc<str>, _: &Arc<[Statement]>) -> u64 {
        weight(text)
    }
}

impl Weighter<Key, Arc<Template>> for ByText {
    fn weight(&self, key: &Key, _: &Arc<Template>) -> u64 {
        weight(&key.text)
    }
}

fn weight(text: &str) -> u64 {
    ENTRY_BYTES + BYTES_PER_BYTE * text.len() as u64
}

impl Plans {
    pub(crate) fn new(bytes: u64) -> Plans {
        let half = bytes / 2;
        let items = (half / ENTRY_BYTES) as usize;
        Plans {
            statements: Cache::with_weighter(items, half, ByText),
            templates: Cache::with_weighter(items, half, ByText),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    pub(crate) fn statements(&self, text: &str) -> Option<Arc<[Statement]>> {
        self.statements.get(text)
    }

    pub(crate) fn keep_statements(&self, text: Arc<str>, statements: &Arc<[Statement]>) {
        if text.len() <= LONGEST_TEXT {
            self.statements.insert(text, statements.clone());
        }
    }

    pub(crate) fn template(&self, key: &Key) -> Option<Arc<Template>> {
        let found = self.templates.get(key);
        let counter = if found.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
        found
    }

    pub(crate) fn keep(&self, key: Key, template: &Arc<Template>) {
        if template.kept && key.text.len() <= LONGEST_TEXT {
            self.templates.insert(key, template.clone());
        }
    }

    /// Statements that found their plan, and those that had to be planned.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.hits.load(Ordering::Relaxed), self.misses.load(Ordering::Relaxed))
    }
}

impl Key {
    pub(crate) fn new(statement: &Statement, env: &RequestEnv) -> Key {
        Key {
            text: statement.text.clone(),
            index: statement.index,
            namespace: env.namespace.clone(),
            params: env.params.iter().map(param_type).collect(),
            catalog: env.catalog.version,
        }
    }
}

fn param_type(param: &Param) -> u8 {
    match param {
        Param::Null => 0,
        Param::Bool(_) => 1,
        Param::Int(_) => 2,
        Param::Float(_) => 3,
        Param::Text(_) => 4,
    }
}

/// Whether some part of it runs again and again.
pub(crate) fn is_recursive(plan: &LogicalPlan) -> bool {
    let recursive = |node: &LogicalPlan| Ok(matches!(node, LogicalPlan::RecursiveQuery(_)));
    // Looking cannot fail, and a plan taken for recursive by mistake is only a slower one.
    plan.exists(recursive).unwrap_or(true)
}

impl Template {
    /// `plan` is optimized; `took` says how long that was.
    pub(crate) fn new(
        target: Option<dml::Target>,
        plan: LogicalPlan,
        symbolic: bool,
        small: bool,
        took: Duration,
    ) -> Result<Template> {
        let (mut heavy, mut recursive, mut plain, mut brief) = (false, false, true, true);
        let mut expires = false;
        let mut kept = target.as_ref().is_none_or(|target| !target.is_bound());
        plan.apply_with_subqueries(|node| {
            match node {
                // Anything but rows of tables was made for this one request: the catalog as it was, what is running.
                LogicalPlan::TableScan(scan) => {
                    let provider = source_as_provider(&scan.source);
                    let rows = provider.as_ref().ok().and_then(|provider| provider.downcast_ref::<Rows>());
                    let is_table = rows.is_some();
                    expires |= rows.is_some_and(Rows::expires);
                    plain &= is_table;
                    kept &= is_table || provider.is_ok_and(|provider| provider.is::<CteWorkTable>());
                }
                // Says how its plan would run: so it is planned in the same way.
                LogicalPlan::Explain(_) | LogicalPlan::Analyze(_) => kept = false,
                LogicalPlan::Projection(_)
                | LogicalPlan::Filter(_)
                | LogicalPlan::Limit(_)
                | LogicalPlan::SubqueryAlias(_) => {}
                LogicalPlan::RecursiveQuery(_) => (heavy, recursive) = (true, true),
                LogicalPlan::Aggregate(_)
                | LogicalPlan::Distinct(_)
                | LogicalPlan::Join(_)
                | LogicalPlan::Sort(_)
                | LogicalPlan::Subquery(_)
                | LogicalPlan::Unnest(_)
                | LogicalPlan::Window(_) => heavy = true,
                _ => plain = false,
            }
            node.apply_expressions(|expr| {
                brief &= !expr.exists(|expr| Ok(!is_brief(expr)))?;
                Ok(TreeNodeRecursion::Continue)
            })
        })?;
        // What is not small wants a thread with a large stack.
        let row = target.as_ref().filter(|_| small).and_then(|target| RowPlan::of(target, &plan));
        let (plain, quick) = (plain && !heavy, small && took <= QUICK);
        let brief = quick && brief && !heavy;
        let unhurried = plain && !expires;
        Ok(Template { target, plan, row, symbolic, heavy, plain, unhurried, recursive, quick, brief, kept })
    }
}

/// Takes about as long for any value. Functions, patterns and their like do not: a few kilobytes of text and a pattern
/// can be minutes of work.
fn is_brief(expr: &Expr) -> bool {
    match expr {
        Expr::Column(_)
        | Expr::Literal(..)
        | Expr::Placeholder(_)
        | Expr::Alias(_)
        | Expr::Not(_)
        | Expr::IsNull(_)
        | Expr::IsNotNull(_)
        | Expr::IsTrue(_)
        | Expr::IsFalse(_)
        | Expr::IsUnknown(_)
        | Expr::IsNotTrue(_)
        | Expr::IsNotFalse(_)
        | Expr::IsNotUnknown(_)
        | Expr::Negative(_)
        | Expr::Between(_)
        | Expr::InList(_)
        | Expr::Case(_)
        | Expr::Cast(_)
        | Expr::TryCast(_) => true,
        Expr::BinaryExpr(binary) => {
            binary.op.is_logic_operator()
                || binary.op.is_numerical_operators()
                || matches!(
                    binary.op,
                    Operator::Eq
                        | Operator::NotEq
                        | Operator::Lt
                        | Operator::LtEq
                        | Operator::Gt
                        | Operator::GtEq
                        | Operator::IsDistinctFrom
                        | Operator::IsNotDistinctFrom
                )
        }
        // Arithmetic and casts that are checked (`exact.rs`, `decimals.rs`, `narrow.rs`).
        Expr::ScalarFunction(call) => {
            matches!(call.func.name(), "+" | "-" | "*" | "kept") || narrow::NAMES.contains(&call.func.name())
        }
        _ => false,
    }
}
