//! Hashes of what a live query says: in positions that clients hold (so what is fed here, and how, stays as it is over
//! versions and restarts), and as the key of what is compiled.

use datafusion::common::DataFusionError;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::logical_expr::Expr;
use sha2::{Digest as _, Sha256};

/// A hash of parts, each with its length, so that no two lists of parts are the same bytes.
pub(super) struct Digest(Sha256);

impl Digest {
    pub(super) fn new() -> Digest {
        Digest(Sha256::new())
    }

    pub(super) fn text(&mut self, text: &str) {
        self.0.update((text.len() as u64).to_le_bytes());
        self.0.update(text.as_bytes());
    }

    pub(super) fn expr(&mut self, expr: &Expr) -> Result<(), DataFusionError> {
        self.text(&expr.to_string());
        self.printed_bare(expr)
    }

    /// What an expression that is printed already could hide. It prints text literals without escapes, so that one that
    /// holds a quote could pass for two: their own lengths tell them apart. And it prints the names of columns as they
    /// are: one that is called `b > a` could pass for a comparison. (Plain names stay out: positions have been without them.)
    pub(super) fn printed_bare(&mut self, expr: &Expr) -> Result<(), DataFusionError> {
        expr.apply(|expr| {
            match expr {
                Expr::Literal(value, _) => self.text(&format!("{} {value}", value.data_type())),
                Expr::Column(column) if column.name.contains(|one: char| one != '_' && !one.is_alphanumeric()) => {
                    self.text(&format!("column {}", column.name));
                }
                _ => {}
            }
            Ok(TreeNodeRecursion::Continue)
        })?;
        Ok(())
    }

    pub(super) fn whole(self) -> [u8; 32] {
        self.0.finalize().into()
    }

    /// A part of it that is short enough for positions.
    pub(super) fn fingerprint(self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.whole();
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
}
