//! The sample plugins' own functions, run natively over images.

use crossings::{Crossing, crossings};
use guest_sdk::native::{TestTable, Type, Value, values};
use guest_sdk::prelude::*;
use late::{Late, late};
use local_units::{Local, LocalUnits, local_units};
use worse::{Worse, worse};

#[test]
fn late_takes_any_numeric_column() {
    let params = Late { minutes: 15 };
    let decimal = Type::Decimal { precision: 10, scale: 2 };
    let cases = [
        (Type::Int, Value::Int(15), true),
        (Type::BigInt, Value::Int(14), false),
        (Type::SmallInt, Value::Null, false),
        (Type::Double, Value::Float(15.0), true),
        (Type::Double, Value::Float(14.99), false),
        (Type::Double, Value::Float(f64::NAN), false),
        (Type::Real, Value::Float(1e30), true),
        (decimal, Value::Decimal(1500), true),
        (decimal, Value::Decimal(1499), false),
        (decimal, Value::Decimal(-99_999), false),
    ];
    for (ty, value, expected) in cases {
        let table = TestTable::new::<late::Flight>(&[("id", Type::Int), ("dep_delay", ty)]).unwrap();
        let row = table.row(&[Value::Int(1), value.clone()]);
        let kept = row.read(|row| late(&params, &FromRow::from_row(row)));
        assert_eq!(kept, expected, "{value:?} of {ty:?}");
    }
}

#[test]
fn late_refuses_a_table_that_does_not_fit() {
    let error = |columns: &[(&str, Type)]| TestTable::new::<late::Flight>(columns).unwrap_err();
    assert_eq!(error(&[("id", Type::Int)]), "column `dep_delay` is missing");
    assert_eq!(error(&[("dep_delay", Type::Text)]), "column `dep_delay` is text, and the plugin reads number");
}

fn flights() -> TestTable {
    TestTable::new::<local_units::Flight>(&[
        ("id", Type::BigInt),
        ("carrier", Type::Text),
        ("flight", Type::Int),
        ("origin", Type::Text),
        ("dest", Type::Text),
        ("distance", Type::Int),
        ("dep_delay", Type::Double),
    ])
    .unwrap()
}

fn flight(distance: i64, delay: Value) -> [Value; 7] {
    let text = |text: &str| Value::Text(text.into());
    [Value::Int(1), text("AA"), Value::Int(1545), text("JFK"), text("MIA"), Value::Int(distance), delay]
}

#[test]
fn local_units_converts_and_classifies() {
    let params = LocalUnits { late_from: 15, very_late_from: 60 };
    let flights = flights();
    for (delay, class) in [(-4.0, "on time"), (14.9, "on time"), (15.0, "late"), (59.9, "late"), (60.0, "very late")] {
        let row = flights.row(&flight(1089, Value::Float(delay)));
        let expected = Local {
            carrier: Some("AA"),
            flight: Some(1545),
            origin: Some("JFK"),
            dest: Some("MIA"),
            km: Some(1752.6),
            delay_class: class,
            dep_delay_minutes: Some(delay),
        };
        row.read(|row| assert_eq!(local_units(&params, &FromRow::from_row(row)), expected));
    }
}

#[test]
fn local_units_keeps_nulls() {
    let params = LocalUnits { late_from: 15, very_late_from: 60 };
    let flights = flights();
    let row = flights.row(&[Value::Int(1)]);
    let output = row.read(|row| values(&local_units(&params, &FromRow::from_row(row))));
    let unknown = Value::Text("unknown".into());
    assert_eq!(output, [Value::Null, Value::Null, Value::Null, Value::Null, Value::Null, unknown, Value::Null]);
}

#[test]
fn worse_compares_both_rows() {
    let table = TestTable::new::<worse::Flight>(&[("id", Type::Int), ("dep_delay", Type::Double)]).unwrap();
    let row = |delay: Value| [Value::Int(1), delay];
    let kept = |old: Option<Value>, new: Option<Value>| {
        let (old, new) = (old.map(row), new.map(row));
        let change = table.change(old.as_ref().map(|old| &old[..]), new.as_ref().map(|new| &new[..]));
        change.read(|raw| worse(&Worse { minutes: 5 }, &raw.read()))
    };
    let float = |minutes| Some(Value::Float(minutes));
    assert!(kept(float(1.0), float(6.0)) && kept(Some(Value::Null), float(5.0)));
    assert!(!kept(float(1.0), float(5.9)) && !kept(float(9.0), float(1.0)) && !kept(float(9.0), float(9.0)));
    assert!(!kept(None, float(99.0)) && !kept(float(99.0), None));
}

#[test]
fn crossings_makes_a_row_of_each_threshold() {
    let columns = [("carrier", Type::Text), ("flight", Type::Int), ("dep_delay", Type::Int)];
    let table = TestTable::new::<crossings::Flight>(&columns).unwrap();
    let row = |delay| [Value::Text("AA".into()), Value::Int(7), Value::Int(delay)];
    let crossed = |old: Option<i64>, new: Option<i64>| -> Vec<(i64, bool)> {
        let (old, new) = (old.map(row), new.map(row));
        let change = table.change(old.as_ref().map(|old| &old[..]), new.as_ref().map(|new| &new[..]));
        change.read(|raw| {
            let made = crossings(&raw.read());
            assert!(made.iter().all(|Crossing { carrier, flight, .. }| (*carrier, *flight) == (Some("AA"), Some(7))));
            made.iter().map(|crossing| (crossing.minutes, crossing.over)).collect()
        })
    };
    assert_eq!(crossed(Some(3), Some(100)), [(15, true), (60, true)]);
    assert_eq!(crossed(Some(200), Some(59)), [(60, false), (180, false)]);
    assert_eq!(crossed(None, Some(15)), [(15, true)]);
    assert_eq!(crossed(Some(61), None), [(15, false), (60, false)]);
    assert_eq!(crossed(Some(20), Some(21)), []);
}
