//! The index against the plain question asked of every group, on random conditions and rows of every type.

use std::sync::Arc;

use proptest::prelude::*;
use wire::{ImageBuilder, Type, Value};

use super::super::evaluate::Rows;
use super::intervals::Intervals;
use super::*;
use crate::catalog::{Column, TableKind};

const TYPES: [Type; 8] = [
    Type::Boolean,
    Type::BigInt,
    Type::Double,
    Type::Decimal { precision: 38, scale: 2 },
    Type::Text,
    Type::Bytea,
    Type::Uuid,
    Type::Date,
];

fn table() -> Table {
    let column = |(id, ty): (usize, &Type)| Column {
        id: id as u16,
        name: format!("c{id}"),
        ty: *ty,
        nullable: true,
        default: None,
        fill: None,
    };
    Table {
        id: TableId(1),
        namespace: NamespaceId(1),
        namespace_name: "main".to_owned(),
        name: "t".to_owned(),
        kind: TableKind::Shared,
        schema_version: 1,
        columns: TYPES.iter().enumerate().map(column).collect(),
        key: vec![0],
        generated_key: false,
        next_column: TYPES.len() as u16,
        images_since: 1,
        ttl_micros: None,
        indexes: Vec::new(),
    }
}

/// Few different ones, and all that are next to each other somewhere.
fn value(ty: Type) -> BoxedStrategy<Value> {
    let ints = prop::sample::select(vec![i64::MIN, -1, 0, 1, 2, (1 << 53) - 1, 1 << 53, (1 << 53) + 1, i64::MAX]);
    match ty {
        Type::Boolean => any::<bool>().prop_map(Value::Bool).boxed(),
        Type::Double => {
            prop::sample::select(vec![-0.0, 0.0, 1.5, -1.5, f64::INFINITY, f64::NEG_INFINITY, f64::MIN, 5e-324])
                .prop_map(Value::Float)
                .boxed()
        }
        Type::Decimal { .. } => ints.prop_map(|v| Value::Decimal(i128::from(v) * 3)).boxed(),
        Type::Text => prop::sample::select(vec!["", "a", "ab", "abc", "b", "ä", "\u{10ffff}"])
            .prop_map(|v| Value::Text(v.into()))
            .boxed(),
        Type::Bytea => {
            prop::collection::vec(prop::sample::select(vec![0u8, 1, 255]), 0..3).prop_map(Value::Bytes).boxed()
        }
        Type::Uuid => prop::sample::select(vec![0u8, 1, 255]).prop_map(|v| Value::Uuid([v; 16])).boxed(),
        _ => ints.prop_map(Value::Int).boxed(),
    }
}

fn anchor() -> impl Strategy<Value = Anchor> {
    (0..TYPES.len()).prop_flat_map(|at| {
        let value = || value(TYPES[at]);
        let text = TYPES[at] == Type::Text;
        let holds = prop_oneof![
            4 => value().prop_map(Holds::Value),
            1 => Just(Holds::Value(Value::Null)),
            3 => (prop::option::of(value()), prop::option::of(value()))
                .prop_map(|(least, most)| Holds::Range { least, most }),
            2 => prop::sample::select(vec!["a", "ab", "ä"]).prop_map(|start| Holds::Prefix(start.to_owned())),
        ];
        let fits = move |holds: &Holds| match holds {
            Holds::Prefix(_) => text,
            // Without both ends it would let everything through; `sql` makes no such condition.
            Holds::Range { least, most } => least.is_some() || most.is_some(),
            Holds::Value(_) => true,
        };
        holds.prop_filter("of the column's type", fits).prop_map(move |holds| Anchor { column: at as u16, holds })
    })
}

fn row() -> impl Strategy<Value = Vec<u8>> {
    let cells: Vec<_> = TYPES
        .iter()
        .map(|ty| {
            let nan = if *ty == Type::Double { 1 } else { 0 };
            prop_oneof![5 => value(*ty), 1 => Just(Value::Null), nan => Just(Value::Float(f64::NAN))]
        })
        .collect();
    cells.prop_map(|cells| {
        let mut image = ImageBuilder::new(cells.len() as u16);
        cells.iter().enumerate().for_each(|(at, cell)| image.set(at as u16, cell));
        image.finish()
    })
}

fn anchors() -> impl Strategy<Value = Anchors> {
    prop_oneof![
        1 => Just(Anchors::Any),
        8 => prop::collection::vec(anchor(), 0..4).prop_map(Anchors::OneOf),
    ]
}

proptest! {
    #[test]
    fn the_index_names_exactly_the_groups_that_a_change_fits(
        specs in prop::collection::vec(anchors(), 1..30),
        gone in prop::collection::vec(any::<bool>(), 30),
        changes in prop::collection::vec((prop::option::of(row()), prop::option::of(row())), 1..6),
    ) {
        let table = Arc::new(table());
        let mut groups = Groups::default();
        let specs: Vec<GroupSpec> = specs.into_iter().map(|anchors| spec(&table, anchors)).collect();
        for (id, spec) in specs.iter().enumerate() {
            groups.insert(id as u64, spec, &table);
        }
        for (id, spec) in specs.iter().enumerate().filter(|(id, _)| gone[*id]) {
            groups.remove(id as u64, spec);
        }
        let refs: Vec<_> = changes.iter().map(|(old, new)| (parsed(old), parsed(new))).collect();
        let found = groups.candidates(&Rows::of_pairs(&changes));
        for (id, spec) in specs.iter().enumerate() {
            let fits = |row: &Option<ImageRef<'_>>| row.is_some_and(|row| spec.admits(&row));
            let expected: Vec<usize> =
                refs.iter().enumerate().filter(|(_, (old, new))| fits(old) || fits(new)).map(|(at, _)| at).collect();
            let of_group = found.some.iter().filter(|(group, _)| *group == id as u64);
            let named: Vec<usize> = of_group.map(|(_, change)| *change).collect();
            match (&spec.anchors, gone[id]) {
                (Anchors::Any, gone) => prop_assert_eq!(found.any.contains(&(id as u64)), !gone),
                (_, true) => prop_assert!(named.is_empty()),
                (_, false) => prop_assert_eq!(named, expected, "{:?}", spec.anchors),
            }
        }
        for (id, spec) in specs.iter().enumerate().filter(|(id, _)| !gone[*id]) {
            groups.remove(id as u64, spec);
        }
        prop_assert!(groups.is_empty() && groups.columns.is_empty() && groups.any.is_empty());
    }

    #[test]
    fn ranges_around_a_point(
        ranges in prop::collection::vec((0u8..20, prop::option::of(0u8..20)), 0..80),
        gone in prop::collection::vec(any::<bool>(), 80),
        // Eight bytes are what steps compare: with as many before the byte that matters they are all alike.
        alike in prop::sample::select(vec![Vec::<u8>::new(), vec![0; 8], vec![255; 8]]),
    ) {
        let text = |last: u8| -> Box<[u8]> { alike.iter().copied().chain([last]).collect() };
        let ends = |(low, high): (u8, Option<u8>)| (text(low), high.map(text));
        let mut tree = Intervals::default();
        for (id, range) in ranges.iter().enumerate() {
            let (low, high) = ends(*range);
            tree.insert(low, high, id as u64);
        }
        for (id, range) in ranges.iter().enumerate().filter(|(id, _)| gone[*id]) {
            let (low, high) = ends(*range);
            tree.remove(&low, high.as_deref(), id as u64);
            tree.remove(&low, high.as_deref(), id as u64);
        }
        let held = |id: &usize| !gone[*id];
        for point in 0..21u8 {
            let mut found = Vec::new();
            tree.around(&text(point), &mut found);
            found.sort_unstable();
            let around = |id: &usize| ranges[*id].0 <= point && ranges[*id].1.is_none_or(|high| point <= high);
            let expected: Vec<u64> = (0..ranges.len()).filter(held).filter(around).map(|id| id as u64).collect();
            prop_assert_eq!(found, expected, "around {}", point);
        }
        let mut all = Vec::new();
        tree.all(&mut all);
        prop_assert_eq!(all.len(), (0..ranges.len()).filter(held).count());
        prop_assert_eq!(tree.is_empty(), all.is_empty());
    }
}

fn parsed(image: &Option<Vec<u8>>) -> Option<ImageRef<'_>> {
    image.as_ref().map(|image| ImageRef::parse(image).unwrap().0)
}

fn spec(table: &Arc<Table>, anchors: Anchors) -> GroupSpec {
    GroupSpec {
        key: Vec::new(),
        live_id: String::new(),
        table: table.clone(),
        scope: Scope::Shared,
        requery: None,
        range: crate::store::keys::KeyRange::all(),
        anchors,
        index: String::new(),
        program: Arc::new(super::super::tests::Nothing),
        stages: Vec::new(),
        semantics: crate::catalog::Semantics::Map,
        on_error: crate::catalog::OnError::Stop,
        output: None,
        old: super::super::OldMode::Changed,
        fingerprint: String::new(),
        epoch: crate::store::Epoch(1),
    }
}
