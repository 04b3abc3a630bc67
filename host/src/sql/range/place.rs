//! Where a constant lies among the values of a column, also where the two are compared in another type than the
//! column's own: `int_column > 1.5` is `CAST(int_column AS DOUBLE) > 1.5` to the planner.
//!
//! Only casts that keep the order of the values and fail for none of them are seen through. The comparison itself still
//! runs above the scan, as the planner wrote it.

use ::arrow::datatypes::DataType;
use datafusion::common::ScalarValue;
use datafusion::logical_expr::{Cast, Expr};
use wire::{Type, Value};

use super::{is_column, literal};
use crate::catalog::Column;

/// From here on not every integer is a DOUBLE.
const EXACT_DOUBLES: f64 = (1u64 << 53) as f64;
/// No BIGINT is further from its DOUBLE.
const DOUBLE_STEP: i128 = 1 << 10;
/// Its digits; a decimal may have more.
const BIGINT_DIGITS: u8 = 19;
/// Decimals of fewer digits than this one are each another DOUBLE: the one that is nearest.
const SHORT: i128 = 10i128.pow(15);
/// How far a decimal may be from its DOUBLE, as a part of it: to make one of the other takes a few operations, each of which
/// rounds by less than one part in 2^52.
const DECIMAL_SLACK: f64 = 1.0 / (1u64 << 44) as f64;

/// Where a constant lies among all values that a column can have.
#[derive(Debug, PartialEq)]
pub(super) enum Place {
    At(Value),
    /// Between two neighbours: it is equal to none. `None`: nothing lies on that side.
    Between {
        below: Option<Value>,
        above: Option<Value>,
    },
    /// Somewhere from one to the other: the comparison rounds.
    Near {
        least: Value,
        most: Value,
    },
}

/// The place of `constant`, if `side` is the column, or the column in the constant's type.
pub(super) fn place(side: &Expr, constant: &Expr, column: &Column) -> Option<Place> {
    if is_column(side, column) {
        return literal(constant, column).map(Place::At);
    }
    let (Expr::Cast(Cast { expr, field }), Expr::Literal(value, _)) = (side, constant) else { return None };
    if !is_column(expr, column) || value.data_type() != *field.data_type() {
        return None;
    }
    match (column.ty, value) {
        (Type::Real, ScalarValue::Float64(Some(constant))) if !constant.is_nan() => Some(among_reals(*constant)),
        (ty, value) => {
            let integers = Integers::of(ty).filter(|integers| integers.fit(field.data_type()))?;
            let (low, high) = integers.around(value)?;
            integers.place(low, high)
        }
    }
}

/// The neighbours of a DOUBLE among the REALs.
fn among_reals(constant: f64) -> Place {
    // Rounded to the nearest: it may lie on either side.
    let nearest = constant as f32;
    let value = |real: f32| Some(Value::Float(real.into()));
    match f64::from(nearest) {
        same if same == constant => Place::At(Value::Float(same)),
        less if less < constant => Place::Between { below: value(nearest), above: value(nearest.next_up()) },
        _ => Place::Between { below: value(nearest.next_down()), above: value(nearest) },
    }
}

/// A column of integers, or of decimals, which are integers of their last digit.
struct Integers {
    /// The ends of the type.
    least: i128,
    most: i128,
    /// Digits before the point, and behind it.
    digits: u8,
    scale: u8,
    value: fn(i128) -> Option<Value>,
}

impl Integers {
    fn of(ty: Type) -> Option<Integers> {
        let integers = |least: i64, most: i64, digits: u8| Integers {
            least: least.into(),
            most: most.into(),
            digits,
            scale: 0,
            value: |value| i64::try_from(value).ok().map(Value::Int),
        };
        match ty {
            Type::SmallInt => Some(integers(i16::MIN.into(), i16::MAX.into(), 5)),
            Type::Int => Some(integers(i32::MIN.into(), i32::MAX.into(), 10)),
            Type::BigInt => Some(integers(i64::MIN, i64::MAX, 19)),
            Type::Decimal { precision, scale } => {
                let scale = u8::try_from(scale).ok()?;
                let most = 10i128.checked_pow(precision.into())? - 1;
                let digits = precision.checked_sub(scale)?;
                Some(Integers { least: -most, most, digits, scale, value: |value| Some(Value::Decimal(value)) })
            }
            _ => None,
        }
    }

    /// Whether every value has one of this type, and none two.
    fn fit(&self, ty: &DataType) -> bool {
        match ty {
            DataType::Int16 => self.scale == 0 && self.digits <= 5,
            DataType::Int32 => self.scale == 0 && self.digits <= 10,
            DataType::Int64 => self.scale == 0 && self.digits <= 19,
            // Some are rounded: `around` knows.
            DataType::Float64 => true,
            DataType::Decimal128(precision, scale) => u8::try_from(*scale).is_ok_and(|scale| {
                self.scale <= scale && precision.checked_sub(scale).is_some_and(|digits| self.digits <= digits)
            }),
            _ => false,
        }
    }

    /// The least integer that may be equal to the constant or greater, and the greatest that may be equal or less.
    fn around(&self, constant: &ScalarValue) -> Option<(i128, i128)> {
        match constant {
            ScalarValue::Int16(Some(value)) => Some(((*value).into(), (*value).into())),
            ScalarValue::Int32(Some(value)) => Some(((*value).into(), (*value).into())),
            ScalarValue::Int64(Some(value)) => Some(((*value).into(), (*value).into())),
            ScalarValue::Decimal128(Some(value), _, scale) => {
                let more = u8::try_from(*scale).ok()?.checked_sub(self.scale)?;
                let unit = 10i128.checked_pow(more.into())?;
                let low = value.div_euclid(unit) + i128::from(value.rem_euclid(unit) != 0);
                Some((low, value.div_euclid(unit)))
            }
            ScalarValue::Float64(Some(value)) if value.is_nan() => None,
            ScalarValue::Float64(Some(value)) if self.scale > 0 && self.most < SHORT && value.abs() < SHORT as f64 => {
                let unit = 10f64.powi(self.scale.into());
                // As the column is cast.
                let double = |units: i128| units as f64 / unit;
                let mut high = (value * unit).floor() as i128;
                if double(high + 1) <= *value {
                    high += 1;
                } else if double(high) > *value {
                    high -= 1;
                }
                let low = if double(high) == *value { high } else { high + 1 };
                Some((low, high))
            }
            ScalarValue::Float64(Some(value)) if self.scale > 0 || self.digits > BIGINT_DIGITS => {
                let units = value * 10f64.powi(self.scale.into());
                // What is infinite has no neighbours.
                let slack = if units.is_finite() { units.abs() * DECIMAL_SLACK + 1.0 } else { 0.0 };
                Some(((units - slack).floor() as i128, (units + slack).ceil() as i128))
            }
            ScalarValue::Float64(Some(value)) => {
                // Casts to integers end where the type does: beyond every column.
                let (low, high) = (value.ceil() as i128, value.floor() as i128);
                let exact = value.abs() < EXACT_DOUBLES || self.digits < 16;
                let step = if exact { 0 } else { DOUBLE_STEP };
                Some((low.saturating_sub(step), high.saturating_add(step)))
            }
            _ => None,
        }
    }

    fn place(&self, low: i128, high: i128) -> Option<Place> {
        let value = self.value;
        // On a side where the column has no values there is nothing.
        let above = if low <= self.most { Some(value(low.max(self.least))?) } else { None };
        let below = if high >= self.least { Some(value(high.min(self.most))?) } else { None };
        Some(match (above, below) {
            (Some(above), Some(_)) if low == high => Place::At(above),
            (Some(least), Some(most)) if low < high => Place::Near { least, most },
            (above, below) => Place::Between { below, above },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ty: Type, constant: ScalarValue) -> Option<Place> {
        let integers = Integers::of(ty)?;
        let (low, high) = integers.around(&constant)?;
        integers.place(low, high)
    }

    fn between(below: Option<i64>, above: Option<i64>) -> Option<Place> {
        Some(Place::Between { below: below.map(Value::Int), above: above.map(Value::Int) })
    }

    #[test]
    fn doubles_among_integers() {
        let double = |value: f64| ScalarValue::Float64(Some(value));
        assert_eq!(at(Type::Int, double(2.0)), Some(Place::At(Value::Int(2))));
        assert_eq!(at(Type::Int, double(-0.0)), Some(Place::At(Value::Int(0))));
        assert_eq!(at(Type::Int, double(1.5)), between(Some(1), Some(2)));
        assert_eq!(at(Type::Int, double(-1.5)), between(Some(-2), Some(-1)));
        assert_eq!(at(Type::Int, double(3e9)), between(Some(i32::MAX.into()), None));
        assert_eq!(at(Type::Int, double(2_147_483_647.5)), between(Some(i32::MAX.into()), None));
        assert_eq!(at(Type::Int, double(f64::NEG_INFINITY)), between(None, Some(i32::MIN.into())));
        assert_eq!(at(Type::BigInt, double(f64::INFINITY)), between(Some(i64::MAX), None));
        assert_eq!(at(Type::Int, double(f64::NAN)), None);
        let (least, most) = (Value::Int((1 << 53) - 1024), Value::Int((1 << 53) + 1024));
        assert_eq!(at(Type::BigInt, double(EXACT_DOUBLES)), Some(Place::Near { least, most }));
    }

    #[test]
    fn decimals_and_larger_integers_among_integers_and_decimals() {
        let decimal = |value: i128, scale: i8| ScalarValue::Decimal128(Some(value), 38, scale);
        let price = Type::Decimal { precision: 10, scale: 2 };
        assert_eq!(at(Type::SmallInt, ScalarValue::Int64(Some(70_000))), between(Some(32_767), None));
        assert_eq!(at(Type::SmallInt, ScalarValue::Int64(Some(-70_000))), between(None, Some(-32_768)));
        assert_eq!(at(Type::Int, decimal(150, 2)), between(Some(1), Some(2)));
        assert_eq!(at(Type::Int, decimal(-150, 2)), between(Some(-2), Some(-1)));
        assert_eq!(at(Type::Int, decimal(200, 2)), Some(Place::At(Value::Int(2))));
        assert_eq!(at(price, decimal(1_250, 3)), Some(Place::At(Value::Decimal(125))));
        let neighbours = Place::Between { below: Some(Value::Decimal(125)), above: Some(Value::Decimal(126)) };
        assert_eq!(at(price, decimal(1_255, 3)), Some(neighbours));
    }

    #[test]
    fn doubles_among_decimals() {
        let double = |ty: Type, value: f64| at(ty, ScalarValue::Float64(Some(value)));
        let near =
            |least: i128, most: i128| Some(Place::Near { least: Value::Decimal(least), most: Value::Decimal(most) });
        let price = Type::Decimal { precision: 10, scale: 2 };
        let between = |below: i128, above: i128| {
            Some(Place::Between { below: Some(Value::Decimal(below)), above: Some(Value::Decimal(above)) })
        };
        // 0.29 * 100 is less than 29.
        for (value, place) in [(1.25, 125), (0.29, 29), (-0.29, -29), (-0.0, 0), (99_999_999.99, 9_999_999_999)] {
            assert_eq!(double(price, value), Some(Place::At(Value::Decimal(place))), "{value}");
        }
        assert_eq!(double(price, 1.255), between(125, 126));
        assert_eq!(double(price, -1.255), between(-126, -125));
        let long = Type::Decimal { precision: 20, scale: 2 };
        assert_eq!(double(long, 1.25), near(123, 127));
        assert_eq!(double(long, 0.0), near(-1, 1));
        let most = Some(Value::Decimal(9_999_999_999));
        assert_eq!(double(price, 1e300), Some(Place::Between { below: most.clone(), above: None }));
        assert_eq!(double(price, f64::INFINITY), Some(Place::Between { below: most, above: None }));
        assert_eq!(double(price, f64::NAN), None);
        // 4e37 is no power of two: its DOUBLE is another number, which the decimal's cast comes to as well.
        let wide = Type::Decimal { precision: 38, scale: 0 };
        let Some(Place::Near { least: Value::Decimal(least), most: Value::Decimal(most) }) = double(wide, 4e37) else {
            panic!("no range")
        };
        let exact = 4 * 10i128.pow(37);
        assert!(least < exact && exact < most && most - least < exact >> 40);
    }

    #[test]
    fn doubles_among_reals() {
        assert_eq!(among_reals(0.5), Place::At(Value::Float(0.5)));
        let Place::Between { below: Some(Value::Float(below)), above: Some(Value::Float(above)) } = among_reals(0.1)
        else {
            panic!("0.1 is no REAL")
        };
        assert!(below < 0.1 && 0.1 < above && (below as f32).next_up() == above as f32);
        let most = Some(Value::Float(f32::MAX.into()));
        assert_eq!(among_reals(1e300), Place::Between { below: most, above: Some(Value::Float(f64::INFINITY)) });
    }

    #[test]
    fn only_casts_that_lose_nothing_are_seen_through() {
        let fits = |ty: Type, target: DataType| Integers::of(ty).is_some_and(|integers| integers.fit(&target));
        assert!(fits(Type::SmallInt, DataType::Int64) && fits(Type::Int, DataType::Float64));
        assert!(!fits(Type::BigInt, DataType::Int32) && !fits(Type::Int, DataType::Float32));
        assert!(fits(Type::Int, DataType::Decimal128(12, 2)) && !fits(Type::Int, DataType::Decimal128(10, 2)));
        let price = Type::Decimal { precision: 10, scale: 2 };
        assert!(fits(price, DataType::Decimal128(11, 3)) && !fits(price, DataType::Decimal128(11, 1)));
        assert!(fits(price, DataType::Float64) && !fits(price, DataType::Int64));
    }
}
