//! Key ranges from predicates: equality, IN or IS NULL on leading columns of the key or of an index, then a range on the
//! next one.
//!
//! The ranges may hold more rows than the predicate, never fewer: the predicate itself still runs above the scan.

mod place;

use std::ops::Bound;
use std::sync::Arc;

use datafusion::common::ScalarValue;
use datafusion::common::tree_node::TreeNode;
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{Between, BinaryExpr, Expr, Operator};
use uuid::Uuid;
use wire::{Type, Value};

use self::place::{Place, place};
use super::arrow::arrow_type;
use crate::catalog::{Column, Index, Table};
use crate::store::index::{beyond_nulls, encode_values};
use crate::store::keys::{KeyRange, encode_key};

/// More IN values than this are read as one range from the least to the greatest.
const MAX_RANGES: usize = 1_000;

/// What a scan reads: ranges in key order that do not overlap, and how to say so in EXPLAIN.
#[derive(Clone, Debug)]
pub(crate) struct KeyRanges {
    /// The ranges are of this index's values; `None`: of the primary key.
    pub(crate) index: Option<Arc<Index>>,
    pub(crate) ranges: Vec<KeyRange>,
    pub(crate) shown: String,
    /// Leading columns that are said exactly.
    exact: usize,
    /// Whether the next one has a range.
    ranged: bool,
    /// Whether NULL is among what is said: a unique index may have many of it.
    nulls: bool,
}

/// What the predicate says of one key column.
#[derive(Default)]
struct Limits {
    /// Every value it may have (`=`, IN, IS NULL).
    among: Option<Vec<Value>>,
    least: Option<Value>,
    most: Option<Value>,
    /// `most` itself is excluded.
    below: bool,
}

/// The primary key or an index, as something that is read in order.
#[derive(Clone, Copy)]
struct Path<'a> {
    table: &'a Table,
    index: Option<&'a Arc<Index>>,
}

impl<'a> Path<'a> {
    fn columns(self) -> impl Iterator<Item = &'a Column> {
        let ids = self.index.map_or(&self.table.key, |index| &index.columns);
        ids.iter().map_while(|id| self.table.column_by_id(*id))
    }

    fn encode(self, values: &[Value]) -> Vec<u8> {
        match self.index {
            None => encode_key(self.table, values),
            Some(index) => encode_values(self.table, index, values),
        }
    }

    /// Everything that starts with these values and may meet a comparison with the next column: NULL never does.
    fn within(self, prefix: &[Value]) -> KeyRange {
        let range = if prefix.is_empty() { KeyRange::all() } else { KeyRange::prefix(self.encode(prefix)) };
        match self.index {
            None => range,
            Some(_) => KeyRange { start: Bound::Included(beyond_nulls(self.encode(prefix))), ..range },
        }
    }

    fn limits(self, column: &Column, conjuncts: &[&Expr]) -> Limits {
        // -0.0 and 0.0 compare equal but are two keys: floats in a key are left to the predicate. In an index they are one.
        if self.index.is_none() && matches!(column.ty, Type::Real | Type::Double) {
            return Limits::default();
        }
        let mut limits = limits(column, conjuncts);
        // A key has no NULL in it, and bytes for none.
        if let (None, Some(values)) = (self.index, &mut limits.among) {
            values.retain(|value| *value != Value::Null);
        }
        limits
    }

    fn ranges(self, conjuncts: &[&Expr]) -> KeyRanges {
        let mut prefixes: Vec<Vec<Value>> = vec![Vec::new()];
        let mut shown: Vec<String> = Vec::new();
        for column in self.columns() {
            let limits = self.limits(column, conjuncts);
            match limits.among {
                Some(values) if prefixes.len().saturating_mul(values.len()) <= MAX_RANGES => {
                    shown.push(show_all(column, &values));
                    prefixes = extend(&prefixes, &values);
                }
                _ if limits.least.is_some() || limits.most.is_some() => {
                    let exact = shown.len();
                    shown.push(show_range(column, &limits));
                    let nulls = has_nulls(&prefixes);
                    let ranges = prefixes.iter().map(|prefix| self.bounded(prefix, &limits));
                    return KeyRanges { nulls, ..self.sorted(ranges, &shown, exact, true) };
                }
                _ => break,
            }
        }
        if shown.is_empty() {
            return self.sorted([KeyRange::all()].into_iter(), &["all".to_owned()], 0, false);
        }
        let nulls = has_nulls(&prefixes);
        let ranges = prefixes.iter().map(|prefix| KeyRange::prefix(self.encode(prefix)));
        KeyRanges { nulls, ..self.sorted(ranges, &shown, shown.len(), false) }
    }

    fn bounded(self, prefix: &[Value], limits: &Limits) -> KeyRange {
        let encode = |value: &Value| {
            let mut values = prefix.to_vec();
            values.push(value.clone());
            self.encode(&values)
        };
        let within = self.within(prefix);
        let start = limits.least.as_ref().map_or(within.start, |least| Bound::Included(encode(least)));
        let end = match &limits.most {
            None => within.end,
            Some(most) if limits.below => Bound::Excluded(encode(most)),
            Some(most) => KeyRange::prefix(encode(most)).end,
        };
        KeyRange { start, end }
    }

    /// In key order, each once: a scan yields its rows in key order.
    fn sorted(self, ranges: impl Iterator<Item = KeyRange>, shown: &[String], exact: usize, ranged: bool) -> KeyRanges {
        let start = |range: &KeyRange| match &range.start {
            Bound::Unbounded => Vec::new(),
            Bound::Included(bytes) | Bound::Excluded(bytes) => bytes.clone(),
        };
        let mut ranges: Vec<KeyRange> = ranges.filter(|range| !is_empty(range)).collect();
        ranges.sort_by_key(start);
        ranges.dedup_by(|a, b| start(a) == start(b));
        KeyRanges { index: self.index.cloned(), ranges, shown: shown.join(" AND "), exact, ranged, nulls: false }
    }

    /// How good it is to read this way: one row a range is best; then whatever says more columns. The key comes before
    /// an index that is as good: an index costs a lookup for every row.
    fn rank(self, found: &KeyRanges) -> (bool, usize, bool, bool) {
        let unique = self.index.is_none_or(|index| index.unique);
        let single = unique && !found.nulls && found.exact == self.columns().count();
        (single, found.exact, found.ranged, self.index.is_none())
    }
}

/// The ranges of the primary key that hold every row for which all of `filters` are true.
pub(crate) fn key_ranges(table: &Table, filters: &[Expr]) -> KeyRanges {
    let conjuncts: Vec<&Expr> = filters.iter().flat_map(split_conjunction).collect();
    Path { table, index: None }.ranges(&conjuncts)
}

/// The same by the primary key or by one of the indexes, whichever is narrowest as far as the predicate tells.
pub(crate) fn best_ranges(table: &Table, filters: &[Expr]) -> KeyRanges {
    let conjuncts: Vec<&Expr> = filters.iter().flat_map(split_conjunction).collect();
    let found = paths(table).map(|path| {
        let ranges = path.ranges(&conjuncts);
        (path.rank(&ranges), ranges)
    });
    // Of equals the last: so the key, which comes last.
    let best = found.max_by_key(|(rank, _)| *rank);
    best.map_or_else(|| key_ranges(table, filters), |(_, ranges)| ranges)
}

fn paths(table: &Table) -> impl Iterator<Item = Path<'_>> {
    let ready = table.indexes.iter().filter(|index| index.is_ready());
    ready.map(|index| Path { table, index: Some(index) }).chain([Path { table, index: None }])
}

/// Whether a filter can narrow the scan at all, perhaps only when its parameters have values.
pub(crate) fn is_useful(table: &Table, filter: &Expr) -> bool {
    let symbolic = filter.exists(|expr| Ok(matches!(expr, Expr::Placeholder(_)))).unwrap_or(false);
    let named = |column: &Column| filter.column_refs().iter().any(|found| found.name == column.name);
    if symbolic && paths(table).any(|path| path.columns().any(named)) {
        return true;
    }
    split_conjunction(filter).into_iter().any(|conjunct| {
        paths(table).any(|path| {
            path.columns().any(|column| {
                let limits = path.limits(column, &[conjunct]);
                limits.among.is_some() || limits.least.is_some() || limits.most.is_some()
            })
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

fn has_nulls(prefixes: &[Vec<Value>]) -> bool {
    prefixes.iter().flatten().any(|value| *value == Value::Null)
}

fn extend(prefixes: &[Vec<Value>], values: &[Value]) -> Vec<Vec<Value>> {
    let with = |prefix: &Vec<Value>, value: &Value| {
        let mut longer = prefix.clone();
        longer.push(value.clone());
        longer
    };
    prefixes.iter().flat_map(|prefix| values.iter().map(move |value| with(prefix, value))).collect()
}

/// Upside down, as of `id > 5 AND id < 3`. An included end takes in every longer key that starts with it.
fn is_empty(range: &KeyRange) -> bool {
    match (&range.start, &range.end) {
        (Bound::Included(start) | Bound::Excluded(start), Bound::Included(end)) => {
            start > end && !start.starts_with(end)
        }
        (Bound::Included(start) | Bound::Excluded(start), Bound::Excluded(end)) => start >= end,
        _ => false,
    }
}

fn limits(column: &Column, conjuncts: &[&Expr]) -> Limits {
    let mut limits = Limits::default();
    for conjunct in conjuncts {
        match conjunct {
            // The optimizer writes short IN lists as OR.
            Expr::BinaryExpr(BinaryExpr { op: Operator::Or, .. }) => limits.one_of(alternatives(conjunct, column)),
            Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
                if let Some(place) = place(left, right, column) {
                    limits.compare(*op, place);
                } else if let (Some(place), Some(op)) = (place(right, left, column), op.swap()) {
                    limits.compare(op, place);
                }
            }
            Expr::Between(Between { expr, negated: false, low, high }) => {
                if let (Some(low), Some(high)) = (place(expr, low, column), place(expr, high, column)) {
                    limits.compare(Operator::GtEq, low);
                    limits.compare(Operator::LtEq, high);
                }
            }
            _ => limits.one_of(alternatives(conjunct, column)),
        }
    }
    limits
}

/// The values of `column = a OR column IN (b, c) OR column IS NULL …`; `None` when anything else is in it.
fn alternatives(expr: &Expr, column: &Column) -> Option<Vec<Value>> {
    let is_boolean = |expr: &Expr| column.ty == Type::Boolean && is_column(expr, column);
    match expr {
        Expr::BinaryExpr(BinaryExpr { left, op: Operator::Or, right }) => {
            let mut values = alternatives(left, column)?;
            values.extend(alternatives(right, column)?);
            Some(values)
        }
        Expr::BinaryExpr(BinaryExpr { left, op: Operator::Eq, right }) => {
            place(left, right, column).or_else(|| place(right, left, column))?.equal()
        }
        Expr::InList(list) if !list.negated => {
            let places = list.list.iter().map(|item| place(&list.expr, item, column)?.equal());
            Some(places.collect::<Option<Vec<_>>>()?.concat())
        }
        Expr::IsNull(inner) if is_column(inner, column) => Some(vec![Value::Null]),
        // The optimizer writes `x = true` and `x = false` like this.
        expr if is_boolean(expr) => Some(vec![Value::Bool(true)]),
        Expr::IsTrue(inner) if is_boolean(inner) => Some(vec![Value::Bool(true)]),
        Expr::Not(inner) | Expr::IsFalse(inner) if is_boolean(inner) => Some(vec![Value::Bool(false)]),
        // What is never true adds nothing, as the NULL of `x IN (1, NULL)`.
        Expr::Literal(value, _) if value.is_null() => Some(Vec::new()),
        _ => None,
    }
}

impl Place {
    /// Every value that may be equal to the constant; `None` if they are too many to name.
    fn equal(self) -> Option<Vec<Value>> {
        match self {
            Place::At(value) => Some(vec![value]),
            Place::Between { .. } => Some(Vec::new()),
            Place::Near { .. } => None,
        }
    }
}

impl Limits {
    /// What a comparison with the constant at this place says.
    fn compare(&mut self, op: Operator, place: Place) {
        match (op, place) {
            (Operator::Eq, Place::Near { least, most }) => {
                self.at_least(least);
                self.at_most(most, false);
            }
            (Operator::Eq, place) => self.one_of(place.equal()),
            // `>` as `>=`: the one value more is filtered out above.
            (Operator::Gt | Operator::GtEq, Place::At(least) | Place::Near { least, .. }) => self.at_least(least),
            (Operator::Lt | Operator::LtEq, Place::At(most)) => self.at_most(most, op == Operator::Lt),
            (Operator::Lt | Operator::LtEq, Place::Near { most, .. }) => self.at_most(most, false),
            (Operator::Gt | Operator::GtEq, Place::Between { below, above }) => match (below, above) {
                (_, None) => self.one_of(Some(Vec::new())),
                (Some(_), Some(above)) => self.at_least(above),
                // Every value is greater.
                (None, Some(_)) => {}
            },
            (Operator::Lt | Operator::LtEq, Place::Between { below, above }) => match (below, above) {
                (None, _) => self.one_of(Some(Vec::new())),
                (Some(below), Some(_)) => self.at_most(below, false),
                (Some(_), None) => {}
            },
            _ => {}
        }
    }

    /// The first bound of a kind is kept: any single one is right, the predicate does the rest.
    fn at_least(&mut self, value: Value) {
        self.least.get_or_insert(value);
    }

    fn at_most(&mut self, value: Value, below: bool) {
        if self.most.is_none() {
            (self.most, self.below) = (Some(value), below);
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
        // NaN compares with nothing as its place among the values would say.
        (ScalarValue::Float32(Some(v)), Type::Real) if !v.is_nan() => Some(Value::Float((*v).into())),
        (ScalarValue::Float64(Some(v)), Type::Double) if !v.is_nan() => Some(Value::Float(*v)),
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

fn show_all(column: &Column, values: &[Value]) -> String {
    let name = &column.name;
    match values {
        [Value::Null] => format!("{name} IS NULL"),
        [value] => format!("{name} = {}", show(value)),
        [first, ..] => format!("{name} = one of {} ({}, …)", values.len(), show(first)),
        [] => format!("{name} = nothing"),
    }
}

fn show_range(column: &Column, limits: &Limits) -> String {
    let least = limits.least.as_ref().map(|value| format!("{} >= {}", column.name, show(value)));
    let sign = if limits.below { "<" } else { "<=" };
    let most = limits.most.as_ref().map(|value| format!("{} {sign} {}", column.name, show(value)));
    least.into_iter().chain(most).collect::<Vec<_>>().join(" AND ")
}
