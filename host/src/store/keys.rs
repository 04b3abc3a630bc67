//! Key bytes: `{namespace}:{table}:{user_id}:{row_id}` in order-preserving, collision-free encoding.
//!
//! ```text
//! namespace id   u32, big-endian
//! table id       u32, big-endian
//! user id        escaped text; empty for shared tables
//! key values     one after the other, in key order
//!
//! BOOLEAN          1 byte                           0 or 1
//! integers, times  8 bytes, big-endian              sign bit flipped
//! floats           8 bytes, big-endian              IEEE total order: negatives inverted, else sign bit flipped; -0.0 as 0.0
//! DECIMAL          16 bytes, big-endian             sign bit flipped; the scale is the column's, so unscaled order is right
//! UUID             16 bytes                         as printed
//! TEXT, BYTEA      0x00 → 0x00 0xff, end 0x00 0x01  so a text sorts before every longer text that starts with it
//! ```
//!
//! Every value says itself where it ends, so composite keys compare column by column and no key is the beginning of
//! another. Ids are assigned by whoever writes the catalog; row bytes are in [`super::rows`].

use std::ops::Bound;

use wire::{Kind, Scope, Value};

use crate::catalog::{NamespaceId, Table, TableId};

const ESCAPE: u8 = 0x00;
const ESCAPED_ZERO: u8 = 0xff;
/// Below [`ESCAPED_ZERO`], so that the end of a text sorts before its continuation with a zero byte.
const END: u8 = 0x01;

/// Bytes of namespace and table id.
const IDS: usize = 8;

/// Encodes key column values (in key order) so that bytes sort as the values do. Given fewer values than key columns,
/// the result is the common prefix of all keys that start with them.
///
/// # Panics
///
/// On NULL, on a value of another kind than its column's, and on more values than key columns: planning has refused or
/// coerced those, and a key made of them would hide a row.
pub fn encode_key(table: &Table, values: &[Value]) -> Vec<u8> {
    assert!(values.len() <= table.key.len(), "{} has {} key columns", table.name, table.key.len());
    let mut out = Vec::with_capacity(16 * values.len());
    for (id, value) in table.key.iter().zip(values) {
        let column = table.column_by_id(*id).expect("key columns exist");
        put_value(&mut out, column.ty.kind(), value)
            .unwrap_or_else(|| panic!("{value:?} cannot be in key column {}.{}", table.name, column.name));
    }
    out
}

/// A range of encoded keys within one table and scope.
///
/// A bound may be a whole key or the beginning of one ([`encode_key`] of leading key columns): an included bound takes
/// in every key that starts with it, an excluded one leaves them all out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRange {
    pub start: Bound<Vec<u8>>,
    pub end: Bound<Vec<u8>>,
}

impl KeyRange {
    pub fn all() -> Self {
        KeyRange { start: Bound::Unbounded, end: Bound::Unbounded }
    }

    /// All keys that start with `prefix` (an [`encode_key`] of leading key columns).
    pub fn prefix(prefix: Vec<u8>) -> Self {
        KeyRange { start: Bound::Included(prefix.clone()), end: Bound::Included(prefix) }
    }

    /// Whether a whole key lies in the range.
    pub fn contains(&self, key: &[u8]) -> bool {
        let after_start = match &self.start {
            Bound::Unbounded => true,
            Bound::Included(start) => key >= start.as_slice(),
            Bound::Excluded(start) => key > start.as_slice() && !key.starts_with(start),
        };
        let before_end = match &self.end {
            Bound::Unbounded => true,
            Bound::Included(end) => key <= end.as_slice() || key.starts_with(end),
            Bound::Excluded(end) => key < end.as_slice(),
        };
        after_start && before_end
    }

    /// The range as stored keys under `prefix` ([`row_prefix`]): from the first (included) to the second (excluded).
    pub(super) fn stored(&self, prefix: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let start = match &self.start {
            Bound::Unbounded => prefix.to_vec(),
            Bound::Included(key) => [prefix, key].concat(),
            Bound::Excluded(key) => after(&[prefix, key].concat()),
        };
        let end = match &self.end {
            Bound::Unbounded => after(prefix),
            Bound::Included(key) => after(&[prefix, key].concat()),
            Bound::Excluded(key) => [prefix, key].concat(),
        };
        (start, end)
    }
}

/// The smallest bytes above everything that starts with `prefix`; `None` if there are none (all bytes 0xff).
pub fn successor(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|byte| *byte != 0xff)?;
    let mut next = prefix[..=last].to_vec();
    next[last] += 1;
    Some(next)
}

/// The first two parts of all keys of a table.
pub(super) fn table_prefix(namespace: NamespaceId, table: TableId) -> Vec<u8> {
    let mut out = Vec::with_capacity(IDS);
    out.extend_from_slice(&namespace.0.to_be_bytes());
    out.extend_from_slice(&table.0.to_be_bytes());
    out
}

/// The first three parts: all rows of one table and scope, and of nobody else.
pub(super) fn row_prefix(table: &Table, scope: &Scope) -> Vec<u8> {
    let mut out = table_prefix(table.namespace, table.id);
    match scope {
        Scope::Shared => put_escaped(&mut out, b""),
        Scope::User(user) => put_escaped(&mut out, user.as_bytes()),
    }
    out
}

/// Where the first three parts of a stored key end; `None` if these bytes do not have them (a bound wider than a user).
pub(super) fn row_prefix_len(key: &[u8]) -> Option<usize> {
    let user = key.get(IDS..)?;
    let end = user.windows(2).position(|pair| pair == [ESCAPE, END])?;
    Some(IDS + end + 2)
}

/// [`successor`] of bytes that start with a [`row_prefix`].
fn after(bytes: &[u8]) -> Vec<u8> {
    successor(bytes).expect("a row prefix ends in 0x01")
}

/// `None`: the value is NULL or of another kind.
pub(super) fn put_value(out: &mut Vec<u8>, kind: Kind, value: &Value) -> Option<()> {
    match (kind, value) {
        (Kind::Bool, Value::Bool(v)) => out.push(u8::from(*v)),
        (Kind::Int, Value::Int(v)) => out.extend_from_slice(&(*v as u64 ^ 1 << 63).to_be_bytes()),
        (Kind::Float, Value::Float(v)) => out.extend_from_slice(&float_order(*v).to_be_bytes()),
        (Kind::Decimal, Value::Decimal(v)) => out.extend_from_slice(&(*v as u128 ^ 1 << 127).to_be_bytes()),
        (Kind::Text, Value::Text(v)) => put_escaped(out, v.as_bytes()),
        (Kind::Bytes, Value::Bytes(v)) => put_escaped(out, v),
        (Kind::Uuid, Value::Uuid(v)) => out.extend_from_slice(v),
        _ => return None,
    }
    Some(())
}

/// How many bytes a value of this kind has at the beginning of `bytes`; `None` if they end before it does.
pub(super) fn value_len(kind: Kind, bytes: &[u8]) -> Option<usize> {
    let len = match kind {
        Kind::Bool => 1,
        Kind::Int | Kind::Float => 8,
        Kind::Decimal | Kind::Uuid => 16,
        Kind::Text | Kind::Bytes => bytes.windows(2).position(|pair| pair == [ESCAPE, END])? + 2,
    };
    (len <= bytes.len()).then_some(len)
}

fn float_order(value: f64) -> u64 {
    // The two zeros are equal numbers: one key.
    let bits = if value == 0.0 { 0 } else { value.to_bits() };
    if bits >> 63 == 1 { !bits } else { bits | 1 << 63 }
}

fn put_escaped(out: &mut Vec<u8>, bytes: &[u8]) {
    for byte in bytes {
        out.push(*byte);
        if *byte == ESCAPE {
            out.push(ESCAPED_ZERO);
        }
    }
    out.extend_from_slice(&[ESCAPE, END]);
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;

    use proptest::prelude::*;
    use wire::Type;

    use super::super::fixtures;
    use super::*;

    /// A table whose key is one column of each type.
    fn wide() -> Table {
        let types = [
            Type::Boolean,
            Type::BigInt,
            Type::Double,
            Type::Decimal { precision: 38, scale: 2 },
            Type::Text,
            Type::Bytea,
            Type::Uuid,
        ];
        fixtures::table_with_key(1, &types)
    }

    /// Few letters, so that equal beginnings, zero bytes and 0xff come up all the time.
    fn tricky_bytes() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(0xfe), Just(0xff), any::<u8>()], 0..6)
    }

    fn tricky_text() -> impl Strategy<Value = String> {
        prop_oneof!["[\\x00\\x01a:é]{0,5}", any::<String>()]
    }

    fn wide_key() -> impl Strategy<Value = Vec<Value>> {
        (
            any::<bool>().prop_map(Value::Bool),
            prop_oneof![-2i64..3, any::<i64>()].prop_map(Value::Int),
            prop_oneof![Just(0.0), Just(-0.0), Just(f64::NAN), any::<f64>()].prop_map(Value::Float),
            prop_oneof![-2i128..3, any::<i128>()].prop_map(Value::Decimal),
            tricky_text().prop_map(Value::Text),
            tricky_bytes().prop_map(Value::Bytes),
            any::<[u8; 16]>().prop_map(Value::Uuid),
        )
            .prop_map(|(a, b, c, d, e, f, g)| vec![a, b, c, d, e, f, g])
    }

    /// The length of a whole key, value by value.
    fn measured(table: &Table, key: &[u8]) -> Option<usize> {
        table.columns.iter().try_fold(0, |at, column| Some(at + value_len(column.ty.kind(), &key[at..])?))
    }

    fn order(a: &Value, b: &Value) -> Ordering {
        match (a, b) {
            (Value::Bool(a), Value::Bool(b)) => a.cmp(b),
            (Value::Int(a), Value::Int(b)) => a.cmp(b),
            (Value::Float(a), Value::Float(b)) if a == b => Ordering::Equal,
            (Value::Float(a), Value::Float(b)) => a.total_cmp(b),
            (Value::Decimal(a), Value::Decimal(b)) => a.cmp(b),
            (Value::Text(a), Value::Text(b)) => a.as_bytes().cmp(b.as_bytes()),
            (Value::Bytes(a), Value::Bytes(b)) => a.cmp(b),
            (Value::Uuid(a), Value::Uuid(b)) => a.cmp(b),
            _ => panic!("{a:?} and {b:?} are of different kinds"),
        }
    }

    fn key_order(a: &[Value], b: &[Value]) -> Ordering {
        a.iter().zip(b).map(|(a, b)| order(a, b)).find(|o| o.is_ne()).unwrap_or(Ordering::Equal)
    }

    proptest! {
        #[test]
        fn bytes_sort_as_values_do(a in wide_key(), mut b in wide_key(), shared in 0usize..8) {
            b[..shared.min(7)].clone_from_slice(&a[..shared.min(7)]);
            let table = wide();
            let (x, y) = (encode_key(&table, &a), encode_key(&table, &b));
            prop_assert_eq!(x.cmp(&y), key_order(&a, &b));
            prop_assert_eq!(measured(&table, &x), Some(x.len()));
            // No key is the beginning of another.
            prop_assert!(x == y || !(x.starts_with(&y) || y.starts_with(&x)));
        }

        #[test]
        fn leading_values_are_the_prefix_of_their_keys_only(a in wide_key(), b in wide_key(), n in 0usize..8) {
            let table = wide();
            let n = n.min(7);
            let prefix = encode_key(&table, &a[..n]);
            prop_assert!(encode_key(&table, &a).starts_with(&prefix));
            let same = key_order(&a[..n], &b[..n]).is_eq();
            prop_assert_eq!(KeyRange::prefix(prefix).contains(&encode_key(&table, &b)), same);
        }

        #[test]
        fn a_range_and_its_stored_bounds_agree(
            keys in proptest::collection::vec(wide_key(), 3),
            parts in (0usize..8, 0usize..8),
            kinds in (0u8..3, 0u8..3),
            user in tricky_text(),
        ) {
            let table = wide();
            let bound = |key: &[Value], part: usize, kind: u8| match kind {
                0 => Bound::Unbounded,
                1 => Bound::Included(encode_key(&table, &key[..part.min(7)])),
                _ => Bound::Excluded(encode_key(&table, &key[..part.min(7)])),
            };
            let range = KeyRange { start: bound(&keys[0], parts.0, kinds.0), end: bound(&keys[1], parts.1, kinds.1) };
            let prefix = row_prefix(&table, &Scope::User(user));
            let key = encode_key(&table, &keys[2]);
            let stored = [prefix.as_slice(), &key].concat();
            let (start, end) = range.stored(&prefix);
            prop_assert_eq!(range.contains(&key), start <= stored && stored < end);
        }

        #[test]
        fn users_never_share_a_range(a in tricky_text(), b in tricky_text(), rest in tricky_bytes()) {
            let table = wide();
            let x = row_prefix(&table, &Scope::User(a.clone()));
            let y = row_prefix(&table, &Scope::User(b.clone()));
            let stored = [x.as_slice(), &rest].concat();
            prop_assert_eq!(stored.starts_with(&y), a == b);
            prop_assert_eq!(row_prefix_len(&stored), Some(x.len()));
        }
    }

    #[test]
    fn lookalike_users_have_ranges_of_their_own() {
        let table = fixtures::table(1);
        let users = ["", "al", "alice", "al:ice", "al\0", "al\0\u{1}"];
        for a in users {
            let (start, end) = KeyRange::all().stored(&row_prefix(&table, &Scope::User(a.to_owned())));
            for b in users {
                let mut row = row_prefix(&table, &Scope::User(b.to_owned()));
                row.extend(encode_key(&table, &[Value::Int(-1)]));
                assert_eq!(start <= row && row < end, a == b, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn the_bytes_are_pinned() {
        let table = fixtures::table_with_key(0x0102, &[Type::BigInt, Type::Text, Type::Double, Type::Boolean]);
        let mut key = row_prefix(&table, &Scope::User("a\0b".to_owned()));
        key.extend(encode_key(
            &table,
            &[Value::Int(-1), Value::Text("é".to_owned()), Value::Float(1.0), Value::Bool(true)],
        ));
        #[rustfmt::skip]
        assert_eq!(key, [
            0, 0, 0, 1, 0, 0, 1, 2, // namespace 1, table 0x0102
            b'a', 0, 0xff, b'b', 0, 1, // user
            0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, // -1
            0xc3, 0xa9, 0, 1, // é
            0xbf, 0xf0, 0, 0, 0, 0, 0, 0, // 1.0
            1,
        ]);
        assert_eq!(row_prefix(&table, &Scope::Shared), [0, 0, 0, 1, 0, 0, 1, 2, 0, 1]);
    }

    #[test]
    fn successors() {
        assert_eq!(successor(&[1, 0xff, 0xff]), Some(vec![2]));
        assert_eq!(successor(&[1, 2]), Some(vec![1, 3]));
        assert_eq!(successor(&[0xff]), None);
        assert_eq!(successor(&[]), None);
    }

    #[test]
    #[should_panic(expected = "cannot be in key column")]
    fn null_in_a_key_is_a_bug() {
        encode_key(&fixtures::table(1), &[Value::Null]);
    }
}
