//! Names as one request sees them, for DataFusion's SQL planner; and a plan bound to that request.
//!
//! Planning reads the shared session's functions and settings and the request's own catalog snapshot. What depends on
//! the request (`$1`, `now()`, `current_user`) is a symbol in the logical plan ([`symbolic`]), which is optimized with
//! the symbols in it and kept, until an execution binds them ([`bind`]).

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use ::arrow::datatypes::{DataType, Field, FieldRef, SchemaRef, TimeUnit};
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{
    DFSchema, DFSchemaRef, DataFusionError, Result, ScalarValue, TableReference, internal_datafusion_err,
};
use datafusion::datasource::cte_worktable::CteWorkTable;
use datafusion::datasource::provider_as_source;
use datafusion::execution::SessionState;
use datafusion::logical_expr::expr::{Placeholder, ScalarFunction};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::planner::{ContextProvider, ExprPlanner, TypePlanner};
use datafusion::logical_expr::simplify::{ExprSimplifyResult, SimplifyContext};
use datafusion::logical_expr::utils::merge_schema;
use datafusion::logical_expr::{
    AggregateUDF, Expr, ExprSchemable, HigherOrderUDF, LogicalPlan, LogicalPlanBuilder, Operator, ScalarUDF,
    TableSource, Values, Volatility, WindowUDF,
};
use datafusion::optimizer::simplify_expressions::ExprSimplifier;
use datafusion::sql::planner::{ParserOptions, PlannerContext, SqlToRel};
use datafusion::sql::sqlparser::ast;
use uuid::Uuid;
use wire::Type;

use super::arrow::{UTC, output_type};
use super::decimals::decimal_constant;
use super::exact::bounded_pattern;
use super::functions::{CURRENT_USER, current_user_literal};
use super::information::CATALOG_NAME;
use super::planner::folding;
use super::provider::Providers;
use super::system::SystemTables;
use super::times::Microseconds;
use super::{Param, RequestEnv, SqlError};
use crate::catalog::Table;

/// The names of one request.
pub(crate) struct Names<'a> {
    pub(crate) state: &'a SessionState,
    pub(crate) providers: &'a Providers,
    pub(crate) env: &'a RequestEnv,
}

impl Names<'_> {
    /// The statement as a logical plan, parameters and request functions still symbolic.
    pub(crate) fn plan(&self, statement: ast::Statement) -> Result<LogicalPlan> {
        let types = self.env.params.iter().map(|param| Some(param_field(param))).collect();
        let mut context = PlannerContext::new().with_prepare_param_data_types(types);
        self.sql_to_rel().sql_statement_to_plan_with_context(statement, &mut context)
    }

    fn sql_to_rel(&self) -> SqlToRel<'_, Self> {
        let options = ParserOptions::from(&self.state.config_options().sql_parser);
        SqlToRel::new_with_options(self, options)
    }

    fn table(&self, name: &TableReference) -> Result<&Arc<Table>, SqlError> {
        let namespace = name.schema().unwrap_or(&self.env.namespace);
        find_table(self.env, Some(namespace), name.table())
    }
}

/// The table of a request's catalog, or the error that says what is there instead.
pub(crate) fn find_table<'a>(
    env: &'a RequestEnv,
    namespace: Option<&str>,
    name: &str,
) -> Result<&'a Arc<Table>, SqlError> {
    let namespace = namespace.unwrap_or(&env.namespace);
    if SystemTables::is_home(namespace) {
        let what = format!("anything but SELECT from {namespace}.{name}");
        return Err(SqlError::unsupported(what, Some("it is no stored table")));
    }
    if env.catalog.namespace(namespace).is_none() {
        return Err(SqlError::invalid("unknown_namespace", format!("there is no namespace {namespace:?}")));
    }
    env.catalog.table(namespace, name).ok_or_else(|| {
        let message =
            format!("there is no table {name:?} in namespace {namespace:?}; SHOW TABLES lists those that there are");
        SqlError::invalid("unknown_table", message)
    })
}

impl ContextProvider for Names<'_> {
    fn get_table_source(&self, name: TableReference) -> Result<Arc<dyn TableSource>> {
        if name.catalog().is_some_and(|catalog| catalog != CATALOG_NAME) {
            let message = format!("there is no catalog {:?}", name.catalog().unwrap_or_default());
            return Err(SqlError::invalid("unknown_table", message).into_datafusion());
        }
        match name.schema() {
            Some(namespace) if SystemTables::is_home(namespace) => {
                self.providers.system.source(namespace, name.table()).map_err(SqlError::into_datafusion)
            }
            _ => Ok(self.providers.source(self.table(&name).map_err(SqlError::into_datafusion)?)),
        }
    }

    fn get_table_function_source(&self, name: &str, _args: Vec<Expr>) -> Result<Arc<dyn TableSource>> {
        Err(SqlError::unsupported(format!("the table function {name}"), None).into_datafusion())
    }

    fn create_cte_work_table(&self, name: &str, schema: SchemaRef) -> Result<Arc<dyn TableSource>> {
        Ok(provider_as_source(Arc::new(CteWorkTable::new(name, schema))))
    }

    fn get_expr_planners(&self) -> &[Arc<dyn ExprPlanner>] {
        self.state.expr_planners()
    }

    fn get_type_planner(&self) -> Option<Arc<dyn TypePlanner>> {
        Some(Arc::new(Microseconds))
    }

    fn get_function_meta(&self, name: &str) -> Option<Arc<ScalarUDF>> {
        self.state.scalar_functions().get(name).cloned()
    }

    fn get_higher_order_meta(&self, name: &str) -> Option<Arc<HigherOrderUDF>> {
        self.state.higher_order_functions().get(name).cloned()
    }

    fn get_aggregate_meta(&self, name: &str) -> Option<Arc<AggregateUDF>> {
        self.state.aggregate_functions().get(name).cloned()
    }

    fn get_window_meta(&self, name: &str) -> Option<Arc<WindowUDF>> {
        self.state.window_functions().get(name).cloned()
    }

    fn get_variable_type(&self, _variable_names: &[String]) -> Option<DataType> {
        None
    }

    fn options(&self) -> &ConfigOptions {
        self.state.config_options()
    }

    fn udf_names(&self) -> Vec<String> {
        self.state.scalar_functions().keys().cloned().collect()
    }

    fn higher_order_function_names(&self) -> Vec<String> {
        self.state.higher_order_functions().keys().cloned().collect()
    }

    fn udaf_names(&self) -> Vec<String> {
        self.state.aggregate_functions().keys().cloned().collect()
    }

    fn udwf_names(&self) -> Vec<String> {
        self.state.window_functions().keys().cloned().collect()
    }
}

pub(crate) fn param_value(param: &Param) -> ScalarValue {
    match param {
        Param::Null => ScalarValue::Null,
        Param::Bool(v) => ScalarValue::Boolean(Some(*v)),
        Param::Int(v) => ScalarValue::Int64(Some(*v)),
        Param::Float(v) => ScalarValue::Float64(Some(*v)),
        Param::Text(v) => ScalarValue::Utf8(Some(v.clone())),
    }
}

fn param_field(param: &Param) -> FieldRef {
    Arc::new(Field::new("", param_value(param).data_type(), true))
}

/// What stands for `now()`, `current_user` and their like in a plan that is kept.
const NOW: &str = "$now";
const USER: &str = "$user";
/// Before the name of another function of the request, as `current_date`.
const FUNCTION: &str = "$fn:";

/// Puts symbols in the place of what differs between requests; says whether there are any, parameters included. Symbols
/// are typed as the values will be, and no optimizer can see through them.
pub(crate) fn symbolic(plan: LogicalPlan, env: &RequestEnv) -> Result<(LogicalPlan, bool)> {
    let params = plan.get_parameter_names()?;
    let highest = params.iter().filter_map(|name| name[1..].parse::<usize>().ok()).max();
    if let Some(missing) = highest.filter(|highest| *highest > env.params.len()) {
        let message = format!("parameter ${missing} is used, but {} were sent", env.params.len());
        return Err(SqlError::invalid("parameters", message).into_datafusion());
    }
    let plan = plan.transform_up_with_subqueries(|plan| {
        let names = NamePreserver::new(&plan);
        let replaced = plan.map_expressions(|expr| {
            if !expr.exists(|expr| Ok(is_request_function(expr) || matches!(expr, Expr::Placeholder(_))))? {
                return Ok(Transformed::no(expr));
            }
            let name = names.save(&expr);
            Ok(expr.transform_up(|expr| symbol(expr, env))?.update_data(|expr| name.restore(expr)))
        })?;
        if replaced.transformed { replaced.map_data(with_new_types) } else { Ok(replaced) }
    })?;
    let symbolic = plan.transformed || highest.is_some();
    Ok((canonical_uuids(plan.data)?, symbolic))
}

fn symbol(mut expr: Expr, env: &RequestEnv) -> Result<Transformed<Expr>> {
    // The planner has guessed the type from what the parameter is compared with; it has the type of its value.
    if let Expr::Placeholder(placeholder) = &mut expr {
        let number = placeholder.id[1..].parse::<usize>().ok().and_then(|number| number.checked_sub(1));
        if let Some(param) = number.and_then(|at| env.params.get(at)) {
            placeholder.field = Some(param_field(param));
        }
        return Ok(Transformed::yes(expr));
    }
    if !is_request_function(&expr) {
        return Ok(Transformed::no(expr));
    }
    let Expr::ScalarFunction(ScalarFunction { func, .. }) = &expr else { return Ok(Transformed::no(expr)) };
    let (id, ty) = match func.name() {
        CURRENT_USER => (USER.to_owned(), DataType::Utf8),
        // Microseconds, as every TIMESTAMP column has: nanoseconds would overflow when compared with far years.
        "now" => (NOW.to_owned(), DataType::Timestamp(TimeUnit::Microsecond, Some(UTC.into()))),
        name => (format!("{FUNCTION}{name}"), expr.get_type(&DFSchema::empty())?),
    };
    let field = Some(Arc::new(Field::new("", ty, false)));
    Ok(Transformed::yes(Expr::Placeholder(Placeholder { id, field })))
}

/// Puts parameters, the user and the time of the request in their places, in a plan that is optimized already; what
/// becomes constant by that is folded, so that key ranges are seen.
pub(crate) fn bind(plan: LogicalPlan, env: &RequestEnv, state: &SessionState) -> Result<LogicalPlan> {
    replace(plan, env, state, true)
}

/// Puts parameters, the user and the time of the request in their places, in a plan as the SQL says it.
pub(crate) fn bind_unoptimized(plan: LogicalPlan, env: &RequestEnv, state: &SessionState) -> Result<LogicalPlan> {
    let (plan, _) = symbolic(plan, env)?;
    replace(plan, env, state, false)
}

/// [`bind`] for single expressions over the columns of one relation.
pub(crate) fn bind_exprs(
    exprs: &[Expr],
    schema: &DFSchemaRef,
    env: &RequestEnv,
    state: &SessionState,
) -> Result<Vec<Expr>> {
    let simplifier = simplifier(schema.clone(), env, state);
    let bound = exprs.iter().map(|expr| match is_symbolic(expr)? {
        true => {
            let bound = with_values(expr.clone(), schema, env, state)?;
            folding(|| simplifier.simplify(bound))
        }
        false => Ok(expr.clone()),
    });
    bound.collect()
}

fn replace(plan: LogicalPlan, env: &RequestEnv, state: &SessionState, fold: bool) -> Result<LogicalPlan> {
    let plan = plan.transform_up_with_subqueries(|plan| {
        if !has_symbols(&plan)? {
            return Ok(Transformed::no(plan));
        }
        let schema = Arc::new(schema_of_expressions(&plan)?);
        // Both sides of a join's condition stay where they are: the planner relies on it.
        let canonicalize = !matches!(plan, LogicalPlan::Join(_));
        let simplifier = simplifier(schema.clone(), env, state).with_canonicalize(canonicalize);
        let names = NamePreserver::new(&plan);
        plan.map_expressions(|expr| {
            if !is_symbolic(&expr)? {
                return Ok(Transformed::no(expr));
            }
            let name = names.save(&expr);
            let bound = with_values(expr, &schema, env, state)?;
            // The members of a grouping set are columns by their place.
            let fold = fold && !matches!(bound, Expr::GroupingSet(_));
            let bound = if fold { folding(|| simplifier.simplify(bound))? } else { bound };
            Ok(Transformed::yes(name.restore(bound)))
        })
    })?;
    Ok(plan.data)
}

pub(crate) fn simplifier(schema: DFSchemaRef, env: &RequestEnv, state: &SessionState) -> ExprSimplifier {
    let info = SimplifyContext::builder()
        .with_schema(schema)
        .with_config_options(state.config_options().clone())
        .with_query_execution_start_time(Some(start_time(env).into()))
        .build();
    ExprSimplifier::new(info)
}

fn is_symbolic(expr: &Expr) -> Result<bool> {
    expr.exists(|expr| Ok(matches!(expr, Expr::Placeholder(_))))
}

/// The expression with values in the place of its symbols.
fn with_values(expr: Expr, schema: &DFSchema, env: &RequestEnv, state: &SessionState) -> Result<Expr> {
    let bound = expr.transform_up(|expr| match expr {
        // Its argument has its value already.
        Expr::Cast(_) => Ok(decimal_constant(expr)),
        expr => value(expr, env, state),
    });
    let bound = bound?.data;
    bound.apply(|expr| bounded_pattern(expr).map(|()| TreeNodeRecursion::Continue))?;
    Ok(bound.transform_up(|expr| canonical_comparison(expr, schema))?.data)
}

fn has_symbols(plan: &LogicalPlan) -> Result<bool> {
    let mut found = false;
    plan.apply_expressions(|expr| {
        found |= is_symbolic(expr)?;
        Ok(if found { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
    })?;
    Ok(found)
}

/// What the columns in a node's expressions are. Filters of a scan see all columns of its table.
pub(crate) fn schema_of_expressions(plan: &LogicalPlan) -> Result<DFSchema> {
    match plan {
        LogicalPlan::TableScan(scan) => {
            DFSchema::try_from_qualified_schema(scan.table_name.clone(), &scan.source.schema())
        }
        plan => Ok(merge_schema(&plan.inputs())),
    }
}

/// The value of a symbol.
fn value(expr: Expr, env: &RequestEnv, state: &SessionState) -> Result<Transformed<Expr>> {
    let Expr::Placeholder(Placeholder { id, .. }) = &expr else { return Ok(Transformed::no(expr)) };
    let literal = match id.as_str() {
        USER => current_user_literal(&env.user),
        NOW => Expr::Literal(ScalarValue::TimestampMicrosecond(Some(env.now), Some(UTC.into())), None),
        id => match id.strip_prefix(FUNCTION) {
            Some(name) => function_value(name, env, state)?,
            None => {
                let number = id[1..].parse::<usize>().ok().and_then(|number| number.checked_sub(1));
                let param = number.and_then(|at| env.params.get(at));
                let param =
                    param.ok_or_else(|| internal_datafusion_err!("the parameter {id} was checked and is gone"))?;
                Expr::Literal(param_value(param), None)
            }
        },
    };
    Ok(Transformed::yes(literal))
}

fn function_value(name: &str, env: &RequestEnv, state: &SessionState) -> Result<Expr> {
    let missing = || internal_datafusion_err!("the function {name} has no value for a request");
    let func = state.scalar_functions().get(name).ok_or_else(missing)?;
    let info = SimplifyContext::builder()
        .with_schema(Arc::new(DFSchema::empty()))
        .with_config_options(state.config_options().clone())
        .with_query_execution_start_time(Some(start_time(env).into()))
        .build();
    match func.simplify(Vec::new(), &info)? {
        ExprSimplifyResult::Simplified(expr) => Ok(expr),
        ExprSimplifyResult::Original(_) => Err(missing()),
    }
}

/// UUIDs are compared as text: constants beside a UUID column get the spelling that columns have.
fn canonical_uuids(plan: LogicalPlan) -> Result<LogicalPlan> {
    let plan = plan.transform_up_with_subqueries(|plan| {
        let schema = schema_of_expressions(&plan)?;
        if !schema.fields().iter().any(|field| output_type(field) == Type::Uuid) {
            return Ok(Transformed::no(plan));
        }
        let names = NamePreserver::new(&plan);
        plan.map_expressions(|expr| {
            let name = names.save(&expr);
            let canonical = expr.transform_up(|expr| canonical_comparison(expr, &schema))?;
            Ok(canonical.update_data(|expr| name.restore(expr)))
        })
    })?;
    Ok(plan.data)
}

fn canonical_comparison(expr: Expr, schema: &DFSchema) -> Result<Transformed<Expr>> {
    let is_uuid = |expr: &Expr| {
        matches!(expr, Expr::Column(column)
            if schema.qualified_field_from_column(column).is_ok_and(|(_, field)| output_type(field) == Type::Uuid))
    };
    Ok(match expr {
        Expr::BinaryExpr(mut comparison) if is_comparison(comparison.op) => {
            if is_uuid(&comparison.left) {
                canonical(&mut comparison.right);
            } else if is_uuid(&comparison.right) {
                canonical(&mut comparison.left);
            }
            Transformed::yes(Expr::BinaryExpr(comparison))
        }
        Expr::InList(mut list) if is_uuid(&list.expr) => {
            list.list.iter_mut().for_each(canonical);
            Transformed::yes(Expr::InList(list))
        }
        Expr::Between(mut between) if is_uuid(&between.expr) => {
            canonical(&mut between.low);
            canonical(&mut between.high);
            Transformed::yes(Expr::Between(between))
        }
        expr => Transformed::no(expr),
    })
}

pub(crate) fn is_comparison(op: Operator) -> bool {
    use Operator::{Eq, Gt, GtEq, IsDistinctFrom, IsNotDistinctFrom, Lt, LtEq, NotEq};
    matches!(op, Eq | NotEq | Lt | LtEq | Gt | GtEq | IsDistinctFrom | IsNotDistinctFrom)
}

/// What is no UUID stays as it is, and equals none.
fn canonical(expr: &mut Expr) {
    if let Expr::Literal(ScalarValue::Utf8(Some(text)), _) = expr
        && let Ok(uuid) = Uuid::parse_str(text)
    {
        *text = uuid.hyphenated().to_string();
    }
}

/// VALUES takes its column types from its cells; every other node from its children.
fn with_new_types(plan: LogicalPlan) -> Result<LogicalPlan> {
    match plan {
        LogicalPlan::Values(Values { values, .. }) => LogicalPlanBuilder::values(values)?.build(),
        plan => plan.recompute_schema(),
    }
}

/// Functions that are the same for one request and differ between requests.
fn is_request_function(expr: &Expr) -> bool {
    matches!(expr, Expr::ScalarFunction(call)
        if call.args.is_empty() && call.func.signature().volatility == Volatility::Stable)
}

fn start_time(env: &RequestEnv) -> std::time::SystemTime {
    let since = Duration::from_micros(env.now.unsigned_abs());
    if env.now >= 0 { UNIX_EPOCH + since } else { UNIX_EPOCH - since }
}

/// Whether it says `current_user`: then what it is bound to is one user's.
pub(crate) fn names_user(plan: &LogicalPlan) -> Result<bool> {
    let is_user = |expr: &Expr| Ok(matches!(expr, Expr::ScalarFunction(call) if call.func.name() == CURRENT_USER));
    let mut found = false;
    plan.apply_with_subqueries(|plan| {
        plan.apply_expressions(|expr| {
            found |= expr.exists(is_user)?;
            Ok(if found { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
        })
    })?;
    Ok(found)
}

/// The first call of a function that makes a live query's rows depend on more than the row, by name.
pub(crate) fn impure_function(plan: &LogicalPlan) -> Result<Option<String>, DataFusionError> {
    let mut found = None;
    plan.apply_with_subqueries(|plan| {
        plan.apply_expressions(|expr| {
            expr.apply(|expr| {
                if let Expr::ScalarFunction(call) = expr
                    && call.func.signature().volatility != Volatility::Immutable
                    && call.func.name() != CURRENT_USER
                {
                    found = Some(call.func.name().to_owned());
                    return Ok(TreeNodeRecursion::Stop);
                }
                Ok(TreeNodeRecursion::Continue)
            })
        })
    })?;
    Ok(found)
}
