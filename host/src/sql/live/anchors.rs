//! Finds in a predicate what single columns have to be ([`Anchors`]): of AND the part that tells most, of OR both.
//!
//! Whatever is not understood lets every row through; the predicate itself runs afterwards.

use ::arrow::datatypes::DataType;
use datafusion::common::{Column, ScalarValue};
use datafusion::logical_expr::expr::{InList, Like, ScalarFunction};
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{Between, BinaryExpr, Cast, Expr, Operator};
use wire::{Type, Value};

use crate::catalog::{Anchor, Anchors, Column as TableColumn, Holds, Table};
use crate::sql::dml::show_value;
use crate::sql::range::literal;

/// More conditions than this cost the index more than evaluating the predicate; an IN list has at most as many values.
const MAX_ANCHORS: usize = 1_000;

pub(super) fn of(table: &Table, predicate: Option<&Expr>) -> Anchors {
    match predicate.and_then(|predicate| Finder { table }.find(predicate)) {
        Some(anchors) => Anchors::OneOf(anchors),
        None => Anchors::Any,
    }
}

/// In words, for people who ask why a query is cheap or dear.
pub fn describe(table: &Table, anchors: &Anchors) -> String {
    const SHOWN: usize = 8;
    let Anchors::OneOf(anchors) = anchors else { return "none: asked about every change of the table".to_owned() };
    let say = |anchor: &Anchor| {
        let column = table.column_by_id(anchor.column);
        let name = column.map_or("?", |column| &column.name);
        let show = |value: &Value| {
            let shown = column.and_then(|column| show_value(value, column.ty).ok());
            shown.unwrap_or_else(|| "NULL".to_owned())
        };
        match &anchor.holds {
            Holds::Value(Value::Null) => format!("{name} IS NULL"),
            Holds::Value(value) => format!("{name} = {}", show(value)),
            Holds::Range { least: Some(least), most: Some(most) } => {
                format!("{name} from {} to {}", show(least), show(most))
            }
            Holds::Range { least: Some(least), most: None } => format!("{name} from {}", show(least)),
            Holds::Range { least: None, most: Some(most) } => format!("{name} to {}", show(most)),
            Holds::Range { least: None, most: None } => format!("{name} of any value"),
            Holds::Prefix(start) => format!("{name} starts with {start:?}"),
        }
    };
    match anchors.len() {
        0 => "nothing can match".to_owned(),
        count if count > SHOWN => {
            let shown: Vec<String> = anchors[..SHOWN].iter().map(say).collect();
            format!("{} or {} more", shown.join(" or "), count - SHOWN)
        }
        _ => anchors.iter().map(say).collect::<Vec<_>>().join(" or "),
    }
}

struct Finder<'a> {
    table: &'a Table,
}

/// `None`: any row may fit.
type Found = Option<Vec<Anchor>>;

impl<'a> Finder<'a> {
    fn find(&self, predicate: &Expr) -> Found {
        let parts: Vec<Vec<Anchor>> =
            split_conjunction(predicate).into_iter().filter_map(|part| self.part(part)).collect();
        closed(parts).into_iter().min_by_key(|anchors| anchors.iter().map(weight).sum::<usize>())
    }

    fn part(&self, expr: &Expr) -> Found {
        match expr {
            Expr::Literal(ScalarValue::Boolean(Some(false) | None) | ScalarValue::Null, _) => Some(Vec::new()),
            Expr::BinaryExpr(BinaryExpr { left, op: Operator::Or, right }) => {
                let (mut left, right) = (self.find(left)?, self.find(right)?);
                left.extend(right);
                (left.len() <= MAX_ANCHORS).then_some(left)
            }
            Expr::BinaryExpr(BinaryExpr { left, op, right }) => match (self.column(left), self.column(right)) {
                (Some(column), None) => compared(column, *op, constant(right, column)?),
                (None, Some(column)) => compared(column, op.swap()?, constant(left, column)?),
                _ => None,
            },
            Expr::InList(InList { expr, list, negated: false }) if list.len() <= MAX_ANCHORS => {
                let column = self.column(expr)?;
                // NULL in the list equals nothing.
                let values = list.iter().filter(|item| !matches!(item, Expr::Literal(value, _) if value.is_null()));
                values.map(|item| Some(anchor(column, Holds::Value(constant(item, column)?)))).collect()
            }
            Expr::Between(Between { expr, negated: false, low, high }) => {
                let column = self.column(expr)?;
                let (least, most) = (Some(constant(low, column)?), Some(constant(high, column)?));
                Some(vec![anchor(column, Holds::Range { least, most })])
            }
            Expr::IsNull(expr) => Some(vec![anchor(self.column(expr)?, Holds::Value(Value::Null))]),
            Expr::Like(Like { negated: false, expr, pattern, escape_char: None, case_insensitive: false }) => {
                let column = self.column(expr)?;
                prefix(column, text(pattern)?.split(['%', '_', '\\']).next()?)
            }
            Expr::ScalarFunction(ScalarFunction { func, args }) if func.name() == "starts_with" => {
                let [expr, start] = args.as_slice() else { return None };
                prefix(self.column(expr)?, text(start)?)
            }
            Expr::Column(_) => self.truth(expr, true),
            Expr::IsTrue(expr) => self.truth(expr, true),
            Expr::IsFalse(expr) | Expr::Not(expr) => self.truth(expr, false),
            _ => None,
        }
    }

    fn truth(&self, expr: &Expr, value: bool) -> Found {
        let column = self.column(expr).filter(|column| column.ty == Type::Boolean)?;
        Some(vec![anchor(column, Holds::Value(Value::Bool(value)))])
    }

    /// A column of the table, also inside of a cast that keeps every value and its order.
    fn column(&self, expr: &Expr) -> Option<&'a TableColumn> {
        match expr {
            Expr::Column(Column { name, .. }) => self.table.column(name),
            Expr::Cast(Cast { expr, field }) => {
                let column = self.column(expr)?;
                let wider = match column.ty {
                    Type::SmallInt => matches!(field.data_type(), DataType::Int32 | DataType::Int64),
                    Type::Int => *field.data_type() == DataType::Int64,
                    Type::Real => *field.data_type() == DataType::Float64,
                    _ => false,
                };
                wider.then_some(column)
            }
            _ => None,
        }
    }
}

fn anchor(column: &TableColumn, holds: Holds) -> Anchor {
    Anchor { column: column.id, holds }
}

fn compared(column: &TableColumn, op: Operator, value: Value) -> Found {
    let holds = match op {
        Operator::Eq => Holds::Value(value),
        Operator::Lt | Operator::LtEq => Holds::Range { least: None, most: Some(value) },
        Operator::Gt | Operator::GtEq => Holds::Range { least: Some(value), most: None },
        _ => return None,
    };
    Some(vec![anchor(column, holds)])
}

fn prefix(column: &TableColumn, start: &str) -> Found {
    let found = column.ty == Type::Text && !start.is_empty();
    found.then(|| vec![anchor(column, Holds::Prefix(start.to_owned()))])
}

fn text(expr: &Expr) -> Option<&str> {
    match expr {
        Expr::Literal(
            ScalarValue::Utf8(Some(text)) | ScalarValue::LargeUtf8(Some(text)) | ScalarValue::Utf8View(Some(text)),
            _,
        ) => Some(text),
        _ => None,
    }
}

/// A constant that compares with the column as values of its type do.
fn constant(expr: &Expr, column: &TableColumn) -> Option<Value> {
    let Expr::Literal(value, _) = expr else { return None };
    match (value, column.ty) {
        (ScalarValue::Int16(Some(v)), Type::SmallInt | Type::Int | Type::BigInt) => Some(Value::Int((*v).into())),
        (ScalarValue::Int32(Some(v)), Type::SmallInt | Type::Int | Type::BigInt) => Some(Value::Int((*v).into())),
        (ScalarValue::Int64(Some(v)), Type::SmallInt | Type::Int | Type::BigInt) => Some(Value::Int(*v)),
        (ScalarValue::Float32(Some(v)), Type::Real | Type::Double) if !v.is_nan() => Some(Value::Float((*v).into())),
        (ScalarValue::Float64(Some(v)), Type::Real | Type::Double) if !v.is_nan() => Some(Value::Float(*v)),
        _ => literal(expr, column),
    }
}

/// `a >= 1` and `a <= 9`, said apart, are one range.
fn closed(mut parts: Vec<Vec<Anchor>>) -> Vec<Vec<Anchor>> {
    let open = |part: &[Anchor], lower: bool| match part {
        [Anchor { column, holds: Holds::Range { least: Some(least), most: None } }] if lower => {
            Some((*column, least.clone()))
        }
        [Anchor { column, holds: Holds::Range { least: None, most: Some(most) } }] if !lower => {
            Some((*column, most.clone()))
        }
        _ => None,
    };
    let lows: Vec<(u16, Value)> = parts.iter().filter_map(|part| open(part, true)).collect();
    let highs: Vec<(u16, Value)> = parts.iter().filter_map(|part| open(part, false)).collect();
    for (column, least) in &lows {
        // The first will do: the predicate knows the others.
        if let Some((_, most)) = highs.iter().find(|(other, _)| other == column) {
            let holds = Holds::Range { least: Some(least.clone()), most: Some(most.clone()) };
            parts.push(vec![Anchor { column: *column, holds }]);
        }
    }
    parts
}

/// How many rows a condition lets through, by rule of thumb: of several the least is taken.
fn weight(anchor: &Anchor) -> usize {
    match &anchor.holds {
        Holds::Value(Value::Bool(_) | Value::Null) => 1_000,
        Holds::Value(_) => 1,
        Holds::Prefix(start) => 64 / start.len().clamp(1, 16),
        Holds::Range { least: Some(_), most: Some(_) } => 100,
        Holds::Range { .. } => 2_000,
    }
}
