//! Key ranges from predicates: equality on leading key columns, then a range or IN on the next one.
//!
//! The ranges may hold more rows than the predicate, never fewer: the predicate itself still runs above the scan.

use std::ops::Bound;

use datafusion::common::ScalarValue;
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{Between, BinaryExpr, Expr, Operator};
use uuid::Uuid;
use wire::{Type, Value};

use super::arrow::arrow_type;
use crate::catalog::{Column, Table};
use crate::store::keys::{KeyRange, encode_key};

/// More IN values than this are read as one range from the least to the greatest.
const MAX_RANGES: usize = 1_000;

/// What a scan reads: ranges in key order that do not overlap, and how to say so in EXPLAIN.
#[derive(Clone, Debug)]
pub(crate) struct KeyRanges {
    pub(crate) ranges: Vec<KeyRange>,
    pub(crate) shown: String,
}

/// What the predicate says of one key column.
#[derive(Default)]
struct Limits {
    /// Every value it may have (`=`, IN).
    among: Option<Vec<Value>>,
    least: Option<Value>,
    most: Option<Value>,
    /// `most` itself is excluded.
    below: bool,
}

/// The ranges that hold every row for which all of `filters` are true.
pub(crate) fn key_ranges(table: &Table, filters: &[Expr]) -> KeyRanges {
    let conjuncts: Vec<&Expr> = filters.iter().flat_map(split_conjunction).collect();
    let mut prefixes: Vec<Vec<Value>> = vec![Vec::new()];
    let mut shown: Vec<String> = Vec::new();
    for id in &table.key {
        let Some(column) = table.column_by_id(*id) else { break };
        let limits = limits(column, &conjuncts);
        match limits.among {
            Some(values) if prefixes.len().saturating_mul(values.len()) <= MAX_RANGES => {
                shown.push(format!("{} = {}", column.name, show_all(&values)));
                prefixes = extend(&prefixes, &values);
            }
            _ if limits.least.is_some() || limits.most.is_some() => {
                shown.push(show_range(column, &limits));
                return sorted(table, prefixes.iter().map(|prefix| bounded(table, prefix, &limits)), &shown);
            }
            _ => break,
        }
    }
    if shown.is_empty() {
        return KeyRanges { ranges: vec![KeyRange::all()], shown: "all".to_owned() };
    }
    let ranges = prefixes.iter().map(|prefix| KeyRange::prefix(encode_key(table, prefix)));
    sorted(table, ranges, &shown)
}

/// Whether a filter can narrow the scan at all.
pub(crate) fn is_useful(table: &Table, filter: &Expr) -> bool {
    let keys = table.key.iter().filter_map(|id| table.column_by_id(*id));
    split_conjunction(filter).into_iter().any(|conjunct| {
        keys.clone().any(|column| {
            let limits = limits(column, &[conjunct]);
            limits.among.is_some() || limits.least.is_some() || limits.most.is_some()
        })
    })
}

/// One range that covers them all.
pub(crate) fn hull(ranges: &KeyRanges) -> KeyRange {
    match (ranges.ranges.first(), ranges.ranges.last()) {
        (Some(first), Some(last)) => KeyRange { start: first.start.clone(), end: last.end.clone() },
        // No key can match: an empty range.
        _ => KeyRange { start: Bound::Included(Vec::new()), end: Bound::Excluded(Vec::new()) },
    }
}

fn extend(prefixes: &[Vec<Value>], values: &[Value]) -> Vec<Vec<Value>> {
    let with = |prefix: &Vec<Value>, value: &Value| {
        let mut longer = prefix.clone();
        longer.push(value.clone());
        longer
    };
    prefixes.iter().flat_map(|prefix| values.iter().map(move |value| with(prefix, value))).collect()
}

fn bounded(table: &Table, prefix: &[Value], limits: &Limits) -> KeyRange {
    let encode = |value: &Value| {
        let mut values = prefix.to_vec();
        values.push(value.clone());
        encode_key(table, &values)
    };
    let within = if prefix.is_empty() { KeyRange::all() } else { KeyRange::prefix(encode_key(table, prefix)) };
    let start = limits.least.as_ref().map_or(within.start, |least| Bound::Included(encode(least)));
    let end = match &limits.most {
        None => within.end,
        Some(most) if limits.below => Bound::Excluded(encode(most)),
        Some(most) => KeyRange::prefix(encode(most)).end,
    };
    KeyRange { start, end }
}

/// In key order, each once: a scan yields its rows in key order.
fn sorted(table: &Table, ranges: impl Iterator<Item = KeyRange>, shown: &[String]) -> KeyRanges {
    let start = |range: &KeyRange| match &range.start {
        Bound::Unbounded => Vec::new(),
        Bound::Included(bytes) | Bound::Excluded(bytes) => bytes.clone(),
    };
    let mut ranges: Vec<KeyRange> = ranges.filter(|range| !is_empty(range)).collect();
    ranges.sort_by_key(start);
    ranges.dedup_by(|a, b| start(a) == start(b));
    debug_assert!(!table.key.is_empty());
    KeyRanges { ranges, shown: shown.join(" AND ") }
}

/// Upside down, as of `id > 5 AND id < 3`.
fn is_empty(range: &KeyRange) -> bool {
    match (&range.start, &range.end) {
        (Bound::Included(start), Bound::Included(end)) => start > end,
        (Bound::Included(start) | Bound::Excluded(start), Bound::Included(end) | Bound::Excluded(end)) => start >= end,
        _ => false,
    }
}

fn limits(column: &Column, conjuncts: &[&Expr]) -> Limits {
    let mut limits = Limits::default();
    // -0.0 and 0.0 compare equal but are two keys: floats are left to the predicate.
    if matches!(column.ty, Type::Real | Type::Double) {
        return limits;
    }
    for conjunct in conjuncts {
        match conjunct {
            // The optimizer writes short IN lists as OR.
            Expr::BinaryExpr(BinaryExpr { op: Operator::Or, .. }) => limits.one_of(alternatives(conjunct, column)),
            Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
                if is_column(left, column)
                    && let Some(value) = literal(right, column)
                {
                    limits.compare(*op, value);
                } else if is_column(right, column)
                    && let (Some(value), Some(op)) = (literal(left, column), op.swap())
                {
                    limits.compare(op, value);
                }
            }
            Expr::InList(_) => limits.one_of(alternatives(conjunct, column)),
            Expr::Between(Between { expr, negated: false, low, high }) if is_column(expr, column) => {
                if let (Some(low), Some(high)) = (literal(low, column), literal(high, column)) {
                    limits.compare(Operator::GtEq, low);
                    limits.compare(Operator::LtEq, high);
                }
            }
            _ => {}
        }
    }
    limits
}

/// The values of `column = a OR column IN (b, c) …`; `None` when anything else is in it.
fn alternatives(expr: &Expr, column: &Column) -> Option<Vec<Value>> {
    match expr {
        Expr::BinaryExpr(BinaryExpr { left, op: Operator::Or, right }) => {
            let mut values = alternatives(left, column)?;
            values.extend(alternatives(right, column)?);
            Some(values)
        }
        Expr::BinaryExpr(BinaryExpr { left, op: Operator::Eq, right }) => {
            let other = match (is_column(left, column), is_column(right, column)) {
                (true, false) => right,
                (false, true) => left,
                _ => return None,
            };
            literal(other, column).map(|value| vec![value])
        }
        Expr::InList(list) if !list.negated && is_column(&list.expr, column) => {
            list.list.iter().map(|item| literal(item, column)).collect()
        }
        _ => None,
    }
}

impl Limits {
    /// The first bound of a kind is kept: any single one is right, the predicate does the rest.
    fn compare(&mut self, op: Operator, value: Value) {
        match op {
            Operator::Eq => self.one_of(Some(vec![value])),
            // `>` as `>=`: the one value more is filtered out above.
            Operator::Gt | Operator::GtEq if self.least.is_none() => self.least = Some(value),
            Operator::Lt | Operator::LtEq if self.most.is_none() => {
                self.most = Some(value);
                self.below = op == Operator::Lt;
            }
            _ => {}
        }
    }

    fn one_of(&mut self, values: Option<Vec<Value>>) {
        let shorter = |values: &Vec<Value>| self.among.as_ref().is_none_or(|among| values.len() < among.len());
        if let Some(values) = values.filter(shorter) {
            self.among = Some(values);
        }
    }
}

fn is_column(expr: &Expr, column: &Column) -> bool {
    matches!(expr, Expr::Column(found) if found.name == column.name)
}

/// A constant that compares with the column exactly as its key value does.
pub(crate) fn literal(expr: &Expr, column: &Column) -> Option<Value> {
    let Expr::Literal(value, _) = expr else { return None };
    if value.is_null() || !matches!(column.ty, Type::Text | Type::Uuid) && value.data_type() != arrow_type(column.ty) {
        return None;
    }
    match (value, column.ty) {
        (ScalarValue::Boolean(Some(v)), Type::Boolean) => Some(Value::Bool(*v)),
        (ScalarValue::Int16(Some(v)), _) => Some(Value::Int((*v).into())),
        (ScalarValue::Int32(Some(v)), Type::Int) => Some(Value::Int((*v).into())),
        (ScalarValue::Int64(Some(v)), _) => Some(Value::Int(*v)),
        (ScalarValue::Decimal128(Some(v), ..), _) => Some(Value::Decimal(*v)),
        (ScalarValue::Binary(Some(v)), Type::Bytea) => Some(Value::Bytes(v.clone())),
        (ScalarValue::Date32(Some(v)), Type::Date) => Some(Value::Int((*v).into())),
        (ScalarValue::Time64Microsecond(Some(v)), _) => Some(Value::Int(*v)),
        (ScalarValue::TimestampMicrosecond(Some(v), _), _) => Some(Value::Int(*v)),
        (ScalarValue::Utf8(Some(v)) | ScalarValue::LargeUtf8(Some(v)) | ScalarValue::Utf8View(Some(v)), ty) => {
            text_literal(v, ty)
        }
        _ => None,
    }
}

fn text_literal(text: &str, ty: Type) -> Option<Value> {
    match ty {
        Type::Text => Some(Value::Text(text.to_owned())),
        // Compared as text, so only the canonical spelling is the same value.
        Type::Uuid => {
            let uuid = Uuid::parse_str(text).ok()?;
            (uuid.hyphenated().to_string() == text).then(|| Value::Uuid(uuid.into_bytes()))
        }
        _ => None,
    }
}

fn show(value: &Value) -> String {
    match value {
        Value::Null => "NULL".to_owned(),
        Value::Bool(v) => v.to_string(),
        Value::Int(v) => v.to_string(),
        Value::Float(v) => v.to_string(),
        Value::Decimal(v) => v.to_string(),
        Value::Text(v) => format!("{v:?}"),
        Value::Bytes(v) => format!("{} bytes", v.len()),
        Value::Uuid(v) => Uuid::from_bytes(*v).to_string(),
    }
}

fn show_all(values: &[Value]) -> String {
    match values {
        [value] => show(value),
        [first, ..] => format!("one of {} ({}, …)", values.len(), show(first)),
        [] => "nothing".to_owned(),
    }
}

fn show_range(column: &Column, limits: &Limits) -> String {
    let least = limits.least.as_ref().map(|value| format!("{} >= {}", column.name, show(value)));
    let sign = if limits.below { "<" } else { "<=" };
    let most = limits.most.as_ref().map(|value| format!("{} {sign} {}", column.name, show(value)));
    least.into_iter().chain(most).collect::<Vec<_>>().join(" AND ")
}
