//! Live queries compiled. A filter and a projection over one table is *incremental* ([`LivePlan`]): evaluated over the
//! row images of each change. Every other SELECT is run again when its tables changed ([`requery`]).
//!
//! Only the columns that the predicate (or the SELECT list) names are ever decoded.

mod anchors;
mod bounded;
mod command;
mod digest;
mod key;
pub mod requery;
mod shape;

pub use anchors::describe;
pub use command::{LiveCommand, command};
pub(crate) use shape::Shapes;

use std::collections::HashSet;
use std::sync::Arc;

use ::arrow::array::{Array, ArrayRef, AsArray};
use ::arrow::datatypes::{Field, Schema, SchemaRef};
use ::arrow::record_batch::RecordBatch;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{Column, DFSchema, DataFusionError, ScalarValue};
use datafusion::execution::context::ExecutionProps;
use datafusion::logical_expr::simplify::SimplifyContext;
use datafusion::logical_expr::utils::expr_to_columns;
use datafusion::logical_expr::{Expr, LogicalPlan, physical_planning_context::PhysicalPlanningContext};
use datafusion::optimizer::simplify_expressions::ExprSimplifier;
use datafusion::physical_expr::{PhysicalExpr, create_physical_expr};
use datafusion::sql::sqlparser::ast::{self, Query, SelectItem, SetExpr};
use wire::{ColumnDecl, ImageRef, Scope};

use super::arrow::{arrow_schema, batch_of, output_array, output_schema, output_type, rows_batch};
use super::context::{bind_unoptimized, impure_function, names_user};
use super::ddl::fold;
use super::error::from_datafusion;
use super::planner::folding;
use super::provider::scope_of;
use super::range::{hull, key_ranges};
use super::session::Engine;
use super::statement::parse;
use super::{OutputColumn, RequestEnv, SqlError};
use crate::catalog::{Anchors, Table, TableKind};
use crate::store::keys::KeyRange;
use bounded::{evaluated, limited};
use digest::Digest;
use requery::RequeryPlan;
use shape::{Bound, constant_name};

/// A live query, as it will be kept up to date.
pub enum Live {
    Incremental(LivePlan),
    Requery(RequeryPlan),
}

impl Live {
    pub fn columns(&self) -> &[OutputColumn] {
        match self {
            Live::Incremental(plan) => &plan.columns,
            Live::Requery(plan) => &plan.columns,
        }
    }
}

/// The compiled plan; shared by every subscription of the group.
pub struct LivePlan {
    pub table: Arc<Table>,
    pub scope: Scope,
    /// The output columns of the SELECT list.
    pub columns: Vec<OutputColumn>,
    /// The same for equal queries after normalisation (spelling, parameters, table id; not the user).
    pub fingerprint: u64,
    /// Whether `current_user` is bound in it. Where it is not, users' plans differ in the scope alone.
    pub names_user: bool,
    /// Key range that a snapshot has to scan.
    pub range: KeyRange,
    /// Which rows can match at all, for the index in front of the groups.
    pub anchors: Anchors,
    /// `None`: every row matches.
    predicate: Option<Bound>,
    projection: Bound,
    output: SchemaRef,
    key: Vec<ColumnDecl>,
    key_schema: SchemaRef,
}

/// Expressions over some columns of the table, and over constants, which are columns behind those.
struct Compiled {
    columns: Vec<ColumnDecl>,
    /// Of the table's columns.
    stored: SchemaRef,
    /// Of those and the constants.
    schema: SchemaRef,
    exprs: Vec<Arc<dyn PhysicalExpr>>,
    /// Whether some of them may take long.
    limited: bool,
    /// The expressions, where each is a column as it stands: those need not be evaluated.
    plain: Option<Vec<ColumnDecl>>,
}

impl LivePlan {
    /// Which rows match: NULL is no match. Evaluation errors of matching-candidate rows fail the call.
    pub fn matches(&self, rows: &[ImageRef<'_>]) -> Result<Vec<bool>, SqlError> {
        let Some(predicate) = &self.predicate else { return Ok(vec![true; rows.len()]) };
        verdicts(&predicate.evaluate(rows)?)
    }

    /// The same for plans whose predicates differ in constants alone; `None`: no predicate.
    pub fn shape(&self) -> Option<usize> {
        self.predicate.as_ref().map(Bound::number)
    }

    /// [`matches`](LivePlan::matches) of several plans of one shape, each over rows of its own, in one evaluation: their
    /// answers one behind the other.
    ///
    /// An error may be one that none of them would meet by itself: whether AND has to look at its right side is decided
    /// for all rows at once.
    pub fn matches_each(asked: &[(&LivePlan, &[ImageRef<'_>])]) -> Result<Vec<bool>, SqlError> {
        let predicates = asked.iter().map(|(plan, rows)| Some((plan.predicate.as_ref()?, *rows)));
        let Some(predicates) = predicates.collect::<Option<Vec<_>>>() else {
            return Err(SqlError::Internal("live queries without a predicate were asked together".into()));
        };
        verdicts(&Bound::evaluate_each(&predicates)?)
    }

    /// Whether predicates and SELECT lists are compiled once for both.
    #[cfg(test)]
    pub(crate) fn shares_with(&self, other: &LivePlan) -> (bool, bool) {
        let (one, two) = (self.predicate.as_ref(), other.predicate.as_ref());
        (one.zip(two).is_some_and(|(one, two)| one.shares_with(two)), self.projection.shares_with(&other.projection))
    }

    /// The SELECT list over rows that matched.
    pub fn project(&self, rows: &[ImageRef<'_>]) -> Result<RecordBatch, SqlError> {
        if let Some(plain) = &self.projection.shape().plain {
            return rows_batch(self.output.clone(), plain, rows);
        }
        let arrays = self.projection.evaluate(rows)?;
        evaluated(false, rows.len(), || {
            let arrays = arrays.iter().zip(&self.columns).map(|(array, column)| output_array(array, column.ty));
            batch_of(&self.output, arrays.collect::<Result<_, SqlError>>()?, rows.len())
        })
    }

    /// The key columns of rows, named as in the table.
    pub fn keys(&self, rows: &[ImageRef<'_>]) -> Result<RecordBatch, SqlError> {
        rows_batch(self.key_schema.clone(), &self.key, rows)
    }
}

impl Compiled {
    fn new(table: &Table, exprs: &[Expr], constants: &[ScalarValue]) -> Result<Compiled, DataFusionError> {
        let mut named: HashSet<Column> = HashSet::new();
        for expr in exprs {
            expr_to_columns(expr, &mut named)?;
        }
        let mut table = table.schema();
        table.columns.retain(|column| named.iter().any(|used| used.name == column.name));
        let plain = |expr: &Expr| match expr {
            Expr::Column(named) => table.columns.iter().find(|column| column.name == named.name).cloned(),
            _ => None,
        };
        let plain = exprs.iter().map(plain).collect();
        let stored = arrow_schema(&table);
        let constant = |(at, value): (usize, &ScalarValue)| Field::new(constant_name(at), value.data_type(), true);
        let constants = constants.iter().enumerate().map(constant).map(Arc::new);
        let schema = Arc::new(Schema::new(stored.fields().iter().cloned().chain(constants).collect::<Vec<_>>()));
        let names = DFSchema::try_from(schema.clone())?;
        let physical = |expr: &Expr| {
            create_physical_expr(expr, &names, &ExecutionProps::new(), &PhysicalPlanningContext::default())
        };
        let exprs = exprs.iter().map(|expr| limited(physical(expr)?)).collect::<Result<Vec<_>, _>>()?;
        let (exprs, long): (Vec<_>, Vec<bool>) = exprs.into_iter().unzip();
        Ok(Compiled { columns: table.columns, stored, schema, exprs, limited: long.contains(&true), plain })
    }

    /// `constants`: as many values of each as there are rows.
    fn evaluate(&self, rows: &[ImageRef<'_>], constants: Vec<ArrayRef>) -> Result<Vec<ArrayRef>, SqlError> {
        let mut batch = rows_batch(self.stored.clone(), &self.columns, rows)?;
        if !constants.is_empty() {
            let arrays = batch.columns().iter().cloned().chain(constants).collect();
            batch = batch_of(&self.schema, arrays, rows.len())?;
        }
        let value = |expr: &Arc<dyn PhysicalExpr>| expr.evaluate(&batch)?.into_array(rows.len());
        evaluated(self.limited, rows.len(), || {
            self.exprs.iter().map(value).collect::<Result<_, DataFusionError>>().map_err(failed)
        })
    }
}

/// Of rows that have no text to show a place in.
fn failed(error: DataFusionError) -> SqlError {
    from_datafusion(error, "")
}

/// What a predicate says: NULL is no match.
fn verdicts(arrays: &[ArrayRef]) -> Result<Vec<bool>, SqlError> {
    let [verdicts] = arrays else {
        return Err(SqlError::Internal("one predicate, many results".into()));
    };
    let verdicts = verdicts
        .as_boolean_opt()
        .ok_or_else(|| SqlError::Internal(format!("a predicate of type {}", verdicts.data_type())))?;
    Ok((0..verdicts.len()).map(|row| verdicts.is_valid(row) && verdicts.value(row)).collect())
}

pub(crate) fn compile(engine: &Engine, text: &str, env: &RequestEnv) -> Result<Live, SqlError> {
    let mut statements = parse(text)?;
    let (Some(statement), true) = (statements.pop(), statements.is_empty()) else {
        return Err(SqlError::invalid("syntax", "a live query is one SELECT"));
    };
    let ast::Statement::Query(query) = *statement.ast else {
        return Err(SqlError::unsupported("anything but SELECT as a live query", None));
    };
    if let SetExpr::Select(select) = &*query.body {
        unique(select.projection.iter().filter_map(item_name))?;
    }
    let in_text = |error| from_datafusion(error, text);
    let sorted = is_sorted(&query);
    let plan = engine.logical(ast::Statement::Query(query), env).map_err(in_text)?;
    if let Some(function) = impure_function(&plan).map_err(in_text)? {
        let hint = "its rows must depend on the tables alone";
        return Err(SqlError::unsupported(format!("{function}() in a live query"), Some(hint)));
    }
    let names_user = names_user(&plan).map_err(in_text)?;
    let plan = bind_unoptimized(plan, env, &engine.state).and_then(|plan| engine.analyze(plan)).map_err(in_text)?;
    let plan = if sorted { unordered(plan) } else { plan };
    unique(plan.schema().fields().iter().map(|field| field.name().clone()))?;
    let tables = requery::tables(&plan, env)?;
    match (Parts::of(&plan).map_err(in_text)?, tables.as_slice()) {
        (Some(parts), [(table, _)]) => {
            let table = table.clone();
            parts.compile(engine, table, env, names_user).map(Live::Incremental).map_err(in_text)
        }
        _ => requery::compile(engine, plan, tables, env, text, names_user).map(Live::Requery),
    }
}

/// Whether the query ends in an ORDER BY that chooses no rows.
fn is_sorted(query: &Query) -> bool {
    query.order_by.is_some() && query.limit_clause.is_none()
}

/// Events have no order among rows, so an outermost ORDER BY without LIMIT has nothing to say.
fn unordered(plan: LogicalPlan) -> LogicalPlan {
    match plan {
        LogicalPlan::Sort(sort) if sort.fetch.is_none() => sort.input.as_ref().clone(),
        plan => plan,
    }
}

/// A plan of the one shape that is incremental.
struct Parts {
    predicate: Option<Expr>,
    projection: Vec<Expr>,
}

impl Parts {
    /// `None`: of any other shape.
    fn of(plan: &LogicalPlan) -> Result<Option<Parts>, DataFusionError> {
        let LogicalPlan::Projection(projection) = plan else { return Ok(None) };
        let (predicate, mut input) = match projection.input.as_ref() {
            LogicalPlan::Filter(filter) => (Some(filter.predicate.clone()), filter.input.clone()),
            _ => (None, projection.input.clone()),
        };
        while let LogicalPlan::SubqueryAlias(alias) = input.as_ref() {
            input = alias.input.clone();
        }
        let LogicalPlan::TableScan(_) = input.as_ref() else { return Ok(None) };
        let parts = Parts { predicate, projection: projection.expr.clone() };
        let whole_rows = |expr: &Expr| {
            Ok(matches!(expr, Expr::ScalarSubquery(_) | Expr::InSubquery(_) | Expr::Exists(_) | Expr::SetComparison(_)))
        };
        for expr in parts.predicate.iter().chain(&parts.projection) {
            if expr.exists(whole_rows)? {
                return Ok(None);
            }
        }
        Ok(Some(parts))
    }

    fn compile(
        self,
        engine: &Engine,
        table: Arc<Table>,
        env: &RequestEnv,
        names_user: bool,
    ) -> Result<LivePlan, DataFusionError> {
        let names: Vec<String> = self.projection.iter().map(|expr| expr.qualified_name().1).collect();
        unique(names.iter().cloned()).map_err(SqlError::into_datafusion)?;
        let schema = Arc::new(DFSchema::try_from(arrow_schema(&table.schema()))?);
        let context = SimplifyContext::builder()
            .with_schema(schema.clone())
            .with_config_options(engine.state.config_options().clone())
            .build();
        let simplifier = ExprSimplifier::new(context);
        let simplify = |expr: Expr| folding(|| simplifier.simplify(unqualified(expr.unalias_nested().data)?));
        let predicate = self.predicate.map(simplify).transpose()?;
        let projection = self.projection.into_iter().map(simplify).collect::<Result<Vec<_>, _>>()?;
        let shown = engine.shapes.bind(&table, projection.clone())?;
        let key = table.key_schema();
        let columns = output_types(shown.shape(), names)?;
        Ok(LivePlan {
            scope: scope_of(&table, &env.user),
            fingerprint: fingerprint(&table, predicate.as_ref(), &projection, &columns)?,
            names_user,
            range: hull(&key_ranges(&table, predicate.as_slice())),
            anchors: anchors::of(&table, predicate.as_ref()),
            predicate: predicate.map(|predicate| engine.shapes.bind(&table, vec![predicate])).transpose()?,
            projection: shown,
            output: output_schema(&columns),
            columns,
            key_schema: arrow_schema(&key),
            key: key.columns,
            table,
        })
    }
}

/// The name that a SELECT item says for its column, where it says one.
fn item_name(item: &SelectItem) -> Option<String> {
    match item {
        SelectItem::ExprWithAlias { alias, .. } => Some(fold(alias)),
        SelectItem::UnnamedExpr(ast::Expr::Identifier(ident)) => Some(fold(ident)),
        SelectItem::UnnamedExpr(ast::Expr::CompoundIdentifier(parts)) => parts.last().map(fold),
        _ => None,
    }
}

/// Events are JSON objects: one member a name.
fn unique(names: impl Iterator<Item = String>) -> Result<(), SqlError> {
    let mut seen = HashSet::new();
    match names.into_iter().find(|name| !seen.insert(name.clone())) {
        Some(name) => {
            let message = format!("a live query's columns need different names, {name:?} is there twice: use AS");
            Err(SqlError::invalid("duplicate_column", message))
        }
        None => Ok(()),
    }
}

/// There is one table: its columns need no qualifier, and no alias makes two queries differ.
fn unqualified(expr: Expr) -> Result<Expr, DataFusionError> {
    let expr = expr.transform(|expr| match expr {
        Expr::Column(column) if column.relation.is_some() => {
            Ok(Transformed::yes(Expr::Column(Column::new_unqualified(column.name))))
        }
        expr => Ok(Transformed::no(expr)),
    })?;
    Ok(expr.data)
}

fn output_types(compiled: &Compiled, names: Vec<String>) -> Result<Vec<OutputColumn>, DataFusionError> {
    let typed = |(expr, name): (&Arc<dyn PhysicalExpr>, String)| {
        Ok(OutputColumn { name, ty: output_type(expr.return_field(&compiled.schema)?.as_ref()) })
    };
    compiled.exprs.iter().zip(names).map(typed).collect()
}

/// Stable over restarts: it is part of positions that clients hold.
fn fingerprint(
    table: &Table,
    predicate: Option<&Expr>,
    projection: &[Expr],
    columns: &[OutputColumn],
) -> Result<u64, DataFusionError> {
    let mut digest = Digest::new();
    let scope = if table.kind == TableKind::User { "user" } else { "shared" };
    digest.text(&format!("live 1, table {}, version {}, {scope}", table.id.0, table.schema_version));
    digest.text(if predicate.is_some() { "where" } else { "all" });
    for expr in predicate.into_iter().chain(projection) {
        digest.expr(expr)?;
    }
    for column in columns {
        digest.text(&format!("{:?}", column.ty));
        digest.text(&column.name);
    }
    Ok(digest.fingerprint())
}
