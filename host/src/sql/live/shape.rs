//! What live queries of one shape share: expressions compiled once, whoever asks and whatever constants columns are
//! compared with. A group then keeps a few constants, where it kept a compiled predicate and SELECT list of its own.
//!
//! A constant leaves the shape where something of its own type is compared with it, and is a column of its own when
//! rows are evaluated. Anywhere else it stays: what an expression is compiled to may depend on it (a pattern, a list, a
//! unit of time).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ::arrow::array::ArrayRef;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::common::{Column, DFSchema, DataFusionError, ScalarValue};
use datafusion::logical_expr::{Between, BinaryExpr, Expr, ExprSchemable, Operator};
use wire::ImageRef;

use super::Compiled;
use super::digest::Digest;
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
        self.shape.evaluate(rows, &self.constants)
    }

    pub(super) fn shape(&self) -> &Compiled {
        &self.shape
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
