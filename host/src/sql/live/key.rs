//! What tells the rows of any SELECT apart: the columns of GROUP BY, else keys that the plan proves (a table's primary
//! key, both sides' keys after a join), carried through the plan even where the SELECT list leaves them out.

use std::cell::Cell;
use std::sync::Arc;

use datafusion::common::{Column, DataFusionError};
use datafusion::logical_expr::{Distinct, Expr, JoinType, LogicalPlan, Projection, SubqueryAlias};

use crate::catalog::Table;
use crate::sql::RequestEnv;
use crate::sql::context::find_table;

/// One part of a key: a column of the plan's output, and how it is called in events.
#[derive(Clone, Debug)]
pub(super) struct KeyColumn {
    pub column: Column,
    pub name: String,
    /// The table (as the query calls it) that the part comes from.
    of: Option<String>,
}

/// A plan whose output holds every part of its key.
type Keyed = Option<(LogicalPlan, Vec<KeyColumn>)>;

pub(super) struct Keys<'a> {
    env: &'a RequestEnv,
    /// Columns added so far: their names are unique in the whole plan.
    added: Cell<usize>,
}

impl<'a> Keys<'a> {
    pub(super) fn new(env: &'a RequestEnv) -> Self {
        Keys { env, added: Cell::new(0) }
    }

    /// The plan with its key in its output; `None` where nothing proves that rows differ.
    pub(super) fn of(&self, plan: &LogicalPlan) -> Result<Keyed, DataFusionError> {
        Ok(self.keyed(plan)?.map(|(plan, mut key)| {
            name_apart(&mut key);
            (plan, key)
        }))
    }

    fn keyed(&self, plan: &LogicalPlan) -> Result<Keyed, DataFusionError> {
        match plan {
            LogicalPlan::TableScan(scan) => {
                let Ok(table) = find_table(self.env, scan.table_name.schema(), scan.table_name.table()) else {
                    return Ok(None);
                };
                let of = Some(scan.table_name.table().to_owned());
                let column = |name: &str| Column::new(Some(scan.table_name.clone()), name);
                let part = |name: String| KeyColumn { column: column(&name), name, of: of.clone() };
                Ok(Some((plan.clone(), key_names(table).map(part).collect())))
            }
            LogicalPlan::SubqueryAlias(alias) => self.alias(alias),
            // Fewer rows, another order, more columns: the key holds.
            LogicalPlan::Filter(_) | LogicalPlan::Sort(_) | LogicalPlan::Limit(_) | LogicalPlan::Window(_) => {
                let inputs = plan.inputs();
                let [input] = inputs.as_slice() else { return Ok(None) };
                let Some((input, key)) = self.keyed(input)? else { return Ok(None) };
                Ok(Some((plan.with_new_exprs(plan.expressions(), vec![input])?, key)))
            }
            LogicalPlan::Projection(projection) => self.projection(projection),
            LogicalPlan::Join(join) => {
                let (left, right) = (self.keyed(&join.left)?, self.keyed(&join.right)?);
                let (Some((left, mut key)), Some((right, of_right))) = (left, right) else { return Ok(None) };
                match join.join_type {
                    JoinType::Inner | JoinType::Left | JoinType::Right | JoinType::Full => key.extend(of_right),
                    JoinType::LeftSemi | JoinType::LeftAnti => {}
                    JoinType::RightSemi | JoinType::RightAnti => key = of_right,
                    _ => return Ok(None),
                }
                Ok(Some((plan.with_new_exprs(plan.expressions(), vec![left, right])?, key)))
            }
            LogicalPlan::Aggregate(aggregate) => {
                if aggregate.group_expr.iter().any(|expr| matches!(expr, Expr::GroupingSet(_))) {
                    return Ok(None);
                }
                Ok(Some((plan.clone(), output(plan, aggregate.group_expr.len()))))
            }
            LogicalPlan::Distinct(Distinct::All(_)) => {
                Ok(Some((plan.clone(), output(plan, plan.schema().fields().len()))))
            }
            _ => Ok(None),
        }
    }

    /// Other qualifiers, sometimes other names: columns keep their places.
    fn alias(&self, alias: &SubqueryAlias) -> Result<Keyed, DataFusionError> {
        let Some((input, key)) = self.keyed(&alias.input)? else { return Ok(None) };
        let places: Option<Vec<usize>> =
            key.iter().map(|part| input.schema().maybe_index_of_column(&part.column)).collect();
        let Some(places) = places else { return Ok(None) };
        let plan = LogicalPlan::SubqueryAlias(SubqueryAlias::try_new(Arc::new(input), alias.alias.clone())?);
        let of = Some(alias.alias.table().to_owned());
        let part = |(part, at): (KeyColumn, usize)| KeyColumn {
            column: column_at(&plan, at),
            name: part.name,
            of: of.clone(),
        };
        let key = key.into_iter().zip(places).map(part).collect();
        Ok(Some((plan, key)))
    }

    fn projection(&self, projection: &Projection) -> Result<Keyed, DataFusionError> {
        let Some((input, key)) = self.keyed(&projection.input)? else { return Ok(None) };
        let mut exprs = projection.expr.clone();
        let mut places = Vec::new();
        for part in &key {
            let wanted = Expr::Column(part.column.clone());
            let shown = exprs.iter().position(|expr| match expr {
                Expr::Alias(alias) => *alias.expr == wanted,
                expr => *expr == wanted,
            });
            places.push((shown.unwrap_or(exprs.len()), shown.is_some()));
            if shown.is_none() {
                self.added.set(self.added.get() + 1);
                exprs.push(wanted.alias(format!("__part_{}", self.added.get())));
            }
        }
        let plan = LogicalPlan::Projection(Projection::try_new(exprs, Arc::new(input))?);
        let part = |(part, (at, shown)): (KeyColumn, (usize, bool))| {
            let column = column_at(&plan, at);
            // What is shown is called as it is shown.
            let name = if shown { column.name.clone() } else { part.name };
            KeyColumn { column, name, of: part.of }
        };
        let key = key.into_iter().zip(places).map(part).collect();
        Ok(Some((plan, key)))
    }
}

fn key_names(table: &Table) -> impl Iterator<Item = String> {
    table.key_schema().columns.into_iter().map(|column| column.name)
}

/// The first `count` columns of the output.
fn output(plan: &LogicalPlan, count: usize) -> Vec<KeyColumn> {
    let part = |at| {
        let column = column_at(plan, at);
        KeyColumn { name: column.name.clone(), of: column.relation.as_ref().map(|of| of.table().to_owned()), column }
    };
    (0..count).map(part).collect()
}

fn column_at(plan: &LogicalPlan, at: usize) -> Column {
    Column::from(plan.schema().qualified_field(at))
}

/// Keys are JSON objects: parts of one name get their table's before it, then a number.
fn name_apart(key: &mut [KeyColumn]) {
    let twice = |key: &[KeyColumn], at: usize| key.iter().filter(|part| part.name == key[at].name).count() > 1;
    let shared: Vec<bool> = (0..key.len()).map(|at| twice(key, at)).collect();
    for (part, shared) in key.iter_mut().zip(shared) {
        if let (true, Some(of)) = (shared, &part.of) {
            part.name = format!("{of}.{}", part.name);
        }
    }
    for at in 0..key.len() {
        if twice(key, at) {
            key[at].name = format!("{}.{}", at + 1, key[at].name);
        }
    }
}
