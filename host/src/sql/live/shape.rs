//! What live queries of one shape share: expressions compiled once, whoever asks and whatever constants columns are
//! compared with. A group then keeps a few constants, where it kept a compiled predicate and SELECT list of its own.
//!
//! A constant leaves the shape where something of its own type is compared with it, and is a column of its own when
//! rows are evaluated. Anywhere else it stays: what an expression is compiled to may depend on it (a pattern, a list, a
//! unit of time).

use std::collections::HashMap;
use std::iter::repeat_n;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ::arrow::array::ArrayRef;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{Column, DFSchema, DataFusionError, ScalarValue};
use datafusion::logical_expr::{Between, BinaryExpr, Expr, ExprSchemable, Operator};
use wire::ImageRef;

use super::digest::Digest;
use super::{Compiled, failed};
use crate::catalog::Table;
use crate::sql::SqlError;
use crate::sql::arrow::arrow_schema;

/// The shapes in use.
#[derive(Default)]
pub(crate) struct Shapes(Mutex<HashMap<[u8; 32], Weak<Compiled>>>);

/// Expressions of one live query: what it shares with others, and the constants that are its own.
pub(super) struct Bound {
    shape: Arc<Compiled>,
    constants: Vec<ScalarValue>,
}

impl Bound {
    pub(super) fn evaluate(&self, rows: &[ImageRef<'_>]) -> Result<Vec<ArrayRef>, SqlError> {
        let constants = self.constants.iter().map(|constant| constant.to_array_of_size(rows.len()));
        self.shape.evaluate(rows, constants.collect::<Result<_, _>>().map_err(failed)?)
    }

    /// Of several that share their shape, each over rows of its own; the values one behind the other.
    pub(super) fn evaluate_each(asked: &[(&Bound, &[ImageRef<'_>])]) -> Result<Vec<ArrayRef>, SqlError> {
        let Some((Bound { shape, constants }, _)) = asked.first() else { return Ok(Vec::new()) };
        if asked.iter().any(|(bound, _)| !Arc::ptr_eq(&bound.shape, shape)) {
            return Err(SqlError::Internal("live queries of several shapes were asked together".into()));
        }
        let rows: Vec<ImageRef<'_>> = asked.iter().flat_map(|(_, rows)| rows.iter().copied()).collect();
        let of_rows = |at: usize| {
            let values = asked.iter().flat_map(|(bound, rows)| repeat_n(&bound.constants[at], rows.len()));
            ScalarValue::iter_to_array(values.cloned())
        };
        let constants = (0..constants.len()).map(of_rows).collect::<Result<Vec<ArrayRef>, _>>().map_err(failed)?;
        shape.evaluate(&rows, constants)
    }

    pub(super) fn shape(&self) -> &Compiled {
        &self.shape
    }

    /// The same for all that share a shape, as long as one of them is there.
    pub(super) fn number(&self) -> usize {
        Arc::as_ptr(&self.shape).addr()
    }

    #[cfg(test)]
    pub(super) fn shares_with(&self, other: &Bound) -> bool {
        Arc::ptr_eq(&self.shape, &other.shape)
    }
}

impl Shapes {
    /// Compiled now, unless a live query of the same shape is open.
    pub(super) fn bind(&self, table: &Table, exprs: Vec<Expr>) -> Result<Bound, DataFusionError> {
        let (exprs, constants) = split(table, exprs)?;
        let key = key(table, &exprs, &constants)?;
        if let Some(shape) = self.find(&key) {
            return Ok(Bound { shape, constants });
        }
        // Not under the lock: of two that come at once both compile, and one is found by those that follow.
        let shape = Arc::new(Compiled::new(table, &exprs, &constants)?);
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() == known.capacity() {
            known.retain(|_, shape| shape.strong_count() > 0);
        }
        known.insert(key, Arc::downgrade(&shape));
        Ok(Bound { shape, constants })
    }

    fn find(&self, key: &[u8; 32]) -> Option<Arc<Compiled>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key).and_then(Weak::upgrade)
    }
}

/// The name of a constant's column. A table that has such a column keeps its constants in the shape.
pub(super) fn constant_name(at: usize) -> String {
    format!("${at}")
}

/// Takes the constants out.
fn split(table: &Table, exprs: Vec<Expr>) -> Result<(Vec<Expr>, Vec<ScalarValue>), DataFusionError> {
    let schema = arrow_schema(&table.schema());
    let mut constants = Vec::new();
    if schema.fields().iter().any(|field| field.name().starts_with('$')) {
        return Ok((exprs, constants));
    }
    let names = DFSchema::try_from(schema)?;
    let mut take = |other: &Expr, side: Expr| match side {
        Expr::Literal(value, _)
            if !value.is_null()
                && !matches!(other, Expr::Literal(..))
                && other.get_type(&names).is_ok_and(|ty| ty == value.data_type()) =>
        {
            constants.push(value);
            Expr::Column(Column::new_unqualified(constant_name(constants.len() - 1)))
        }
        side => side,
    };
    let mut parts = Vec::with_capacity(exprs.len());
    for expr in exprs {
        let expr = expr.transform(|expr| {
            Ok(match expr {
                Expr::BinaryExpr(BinaryExpr { left, op, right }) if is_comparison(op) => {
                    let right = take(left.as_ref(), *right);
                    let left = take(&right, *left);
                    Transformed::yes(Expr::BinaryExpr(BinaryExpr::new(Box::new(left), op, Box::new(right))))
                }
                Expr::Between(Between { expr, negated, low, high }) => {
                    let (low, high) = (take(expr.as_ref(), *low), take(expr.as_ref(), *high));
                    Transformed::yes(Expr::Between(Between::new(expr, negated, Box::new(low), Box::new(high))))
                }
                expr => Transformed::no(expr),
            })
        })?;
        parts.push(expr.data);
    }
    Ok((parts, constants))
}

fn is_comparison(op: Operator) -> bool {
    matches!(op, Operator::Eq | Operator::NotEq | Operator::Lt | Operator::LtEq | Operator::Gt | Operator::GtEq)
}

/// Equal only for equal shapes over one version of a table.
fn key(table: &Table, exprs: &[Expr], constants: &[ScalarValue]) -> Result<[u8; 32], DataFusionError> {
    let mut digest = Digest::new();
    digest.text(&format!("{} {} {}", table.id.0, table.schema_version, exprs.len()));
    for constant in constants {
        digest.text(&constant.data_type().to_string());
    }
    for expr in exprs {
        digest.expr(expr)?;
    }
    Ok(digest.whole())
}
