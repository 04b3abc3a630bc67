//! Where DataFusion computes with decimals otherwise than SQL does; a part of [`exact`](super::exact).
//!
//! - `+ - * / %` may come to more digits than DECIMAL has, which its type then denies: that is an error.
//! - `CAST(d AS INT) = 1` is taken for `d = 1` there: what a cast drops is forgotten. Such a cast is hidden from the
//!   optimizer. So is TRY_CAST, whose NULLs it forgets.
//! - A DOUBLE constant that is cast to a decimal is multiplied out there, and comes to 99999999999999.991433 for `1e14`.
//!   Here it is what its shortest text says.

use std::sync::{Arc, LazyLock};

use ::arrow::array::AsArray;
use ::arrow::datatypes::{DECIMAL128_MAX_PRECISION, DataType, Decimal128Type, DecimalType, Field, FieldRef, TimeUnit};
use datafusion::common::tree_node::Transformed;
use datafusion::common::{DFSchema, Result, ScalarValue, exec_err, internal_err};
use datafusion::logical_expr::{
    Cast, ColumnarValue, Expr, ExprSchemable, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature,
    TryCast, Volatility,
};

/// A binary operation, with its digits counted if its type has all that there are.
pub(super) fn counted(expr: Expr, schema: &DFSchema) -> Transformed<Expr> {
    match expr.get_type(schema) {
        Ok(DataType::Decimal128(DECIMAL128_MAX_PRECISION, _)) => Transformed::yes(kept(expr)),
        _ => Transformed::no(expr),
    }
}

/// A cast, hidden if it drops something; a constant cast to a decimal, as that decimal.
pub(super) fn cast(expr: Expr, schema: &DFSchema) -> Transformed<Expr> {
    match &expr {
        Expr::Cast(Cast { expr: inner, .. }) | Expr::TryCast(TryCast { expr: inner, .. })
            if matches!(**inner, Expr::Literal(..)) =>
        {
            decimal_constant(expr)
        }
        Expr::Cast(Cast { expr: inner, field }) => {
            match inner.get_type(schema).is_ok_and(|from| drops(&from, field.data_type())) {
                true => Transformed::yes(kept(expr)),
                false => Transformed::no(expr),
            }
        }
        Expr::TryCast(_) => Transformed::yes(kept(expr)),
        _ => Transformed::no(expr),
    }
}

/// Whether two values of one type can become one of the other.
fn drops(from: &DataType, to: &DataType) -> bool {
    match (from, to) {
        (DataType::Decimal128(_, scale), to) if to.is_integer() => *scale > 0,
        (DataType::Decimal128(_, scale), DataType::Decimal128(_, left)) => left < scale,
        (DataType::Timestamp(from, _), DataType::Timestamp(to, _)) => parts(*to) < parts(*from),
        _ => false,
    }
}

/// Of a second.
fn parts(unit: TimeUnit) -> u32 {
    match unit {
        TimeUnit::Second => 1,
        TimeUnit::Millisecond => 1_000,
        TimeUnit::Microsecond => 1_000_000,
        TimeUnit::Nanosecond => 1_000_000_000,
    }
}

/// `CAST(1e14 AS DECIMAL(…))` as the decimal that it is.
pub(super) fn decimal_constant(expr: Expr) -> Transformed<Expr> {
    if let Expr::Cast(Cast { expr: inner, field }) = &expr
        && let Expr::Literal(ScalarValue::Float64(Some(value)), _) = **inner
        && let DataType::Decimal128(precision, scale) = *field.data_type()
        && let Some(unscaled) = unscaled(value, precision, scale)
    {
        return Transformed::yes(Expr::Literal(ScalarValue::Decimal128(Some(unscaled), precision, scale), None));
    }
    Transformed::no(expr)
}

/// The shortest digits that are this DOUBLE and no other, and the power of ten that they are multiplied by; `None` for
/// what has no digits.
pub(super) fn shortest(value: f64) -> Option<(i128, i32)> {
    if !value.is_finite() {
        return None;
    }
    // As `-1.25e3`.
    let text = format!("{value:e}");
    let (digits, exponent) = text.split_once('e')?;
    let behind = digits.split_once('.').map_or(0, |(_, behind)| behind.len());
    let exponent = exponent.parse::<i32>().ok()? - i32::try_from(behind).ok()?;
    Some((digits.replace('.', "").parse().ok()?, exponent))
}

/// The number in units of the last digit, rounded; `None` if it has more digits than that.
fn unscaled(value: f64, precision: u8, scale: i8) -> Option<i128> {
    let (digits, exponent) = shortest(value.abs())?;
    let shift = exponent + i32::from(scale);
    let size = 10i128.checked_pow(shift.unsigned_abs());
    let rounded = match size {
        Some(size) if shift >= 0 => digits.checked_mul(size)?,
        Some(size) => (digits + size / 2) / size,
        None if shift < 0 => 0,
        None => return None,
    };
    let end = 10i128.checked_pow(precision.into())?;
    (rounded < end).then_some(if value < 0.0 { -rounded } else { rounded })
}

pub(super) fn kept(expr: Expr) -> Expr {
    static KEPT: LazyLock<ScalarUDF> =
        LazyLock::new(|| ScalarUDF::new_from_impl(Kept { signature: Signature::any(1, Volatility::Immutable) }));
    KEPT.call(vec![expr])
}

/// Is its argument, which no rule of the optimizer looks into; an error if that has more digits than its type.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Kept {
    signature: Signature,
}

impl ScalarUDFImpl for Kept {
    fn name(&self) -> &str {
        "kept"
    }

    /// As the argument is called, so that columns of a result keep their names.
    fn schema_name(&self, args: &[Expr]) -> Result<String> {
        match args {
            [arg] => Ok(arg.schema_name().to_string()),
            _ => internal_err!("{} values are kept as one", args.len()),
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        match types {
            [ty] => Ok(ty.clone()),
            _ => internal_err!("{} values are kept as one", types.len()),
        }
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> Result<FieldRef> {
        match args.arg_fields {
            [field] => Ok(Arc::new(Field::new(self.name(), field.data_type().clone(), field.is_nullable()))),
            fields => internal_err!("{} values are kept as one", fields.len()),
        }
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let [value] = args.args.as_slice() else { return exec_err!("{} values are kept as one", args.args.len()) };
        match value {
            ColumnarValue::Scalar(ScalarValue::Decimal128(Some(value), precision, scale)) => {
                Decimal128Type::validate_decimal_precision(*value, *precision, *scale)?;
            }
            ColumnarValue::Array(array) => {
                if let DataType::Decimal128(precision, _) = array.data_type() {
                    array.as_primitive::<Decimal128Type>().validate_decimal_precision(*precision)?;
                }
            }
            ColumnarValue::Scalar(_) => {}
        }
        Ok(value.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_double_is_the_decimal_that_it_is_written_as() {
        assert_eq!(unscaled(1e14, 33, 15), Some(10i128.pow(29)));
        assert_eq!(unscaled(9.99, 30, 15), Some(9_990_000_000_000_000));
        assert_eq!(unscaled(-1.255, 10, 2), Some(-126));
        assert_eq!(unscaled(0.005, 10, 2), Some(1));
        assert_eq!(unscaled(1e-300, 38, 10), Some(0));
        assert_eq!(unscaled(0.0, 5, 2), Some(0));
        assert_eq!(unscaled(999.99, 5, 2), Some(99_999));
        assert_eq!(unscaled(1000.0, 5, 2), None);
        assert_eq!(unscaled(1e300, 38, 10), None);
        assert_eq!(unscaled(f64::NAN, 38, 10), None);
    }
}
