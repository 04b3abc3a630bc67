//! Casts to REAL and DOUBLE of what these do not reach; a part of [`exact`](super::exact).
//!
//! Arrow makes an infinity of it. Here it is an error, as with every other type, and NULL for TRY_CAST. What is infinite
//! already (or says so: `'inf'`) stays so.

use std::sync::{Arc, LazyLock};

use ::arrow::array::{Array, ArrayRef, ArrowPrimitiveType, AsArray, PrimitiveArray};
use ::arrow::compute::{CastOptions, cast_with_options};
use ::arrow::datatypes::{DataType, Field, FieldRef, Float32Type, Float64Type};
use ::arrow::util::display::array_value_to_string;
use datafusion::common::tree_node::Transformed;
use datafusion::common::{DFSchema, Result, ScalarValue, exec_err, internal_err};
use datafusion::logical_expr::{
    Cast, ColumnarValue, Expr, ExprSchemable, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature,
    TryCast, Volatility,
};

use super::SqlError;

/// The functions that stand for such casts.
pub(super) const NAMES: [&str; 4] = ["real", "double", "try_real", "try_double"];

/// The cast, as a function that looks at what comes out where that may be infinite.
pub(super) fn cast(expr: Expr, schema: &DFSchema) -> Transformed<Expr> {
    let (inner, to, trying) = match &expr {
        Expr::Cast(Cast { expr, field }) => (expr, field.data_type(), false),
        Expr::TryCast(TryCast { expr, field }) => (expr, field.data_type(), true),
        _ => return Transformed::no(expr),
    };
    let may_end = match to {
        DataType::Float32 => inner.get_type(schema).is_ok_and(|from| from == DataType::Float64 || from.is_string()),
        DataType::Float64 => inner.get_type(schema).is_ok_and(|from| from.is_string()),
        _ => false,
    };
    if !may_end {
        return Transformed::no(expr);
    }
    let function = Reaching::of(*to == DataType::Float64, trying);
    Transformed::yes(function.call(vec![inner.as_ref().clone()]))
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Reaching {
    name: &'static str,
    to: DataType,
    /// NULL instead of an error.
    trying: bool,
    signature: Signature,
}

impl Reaching {
    /// The functions are made once: planning is frequent.
    fn of(double: bool, trying: bool) -> &'static ScalarUDF {
        static FUNCTIONS: LazyLock<[ScalarUDF; 4]> = LazyLock::new(|| {
            let [real, double, try_real, try_double] = NAMES;
            let reals = [(real, DataType::Float32, false), (double, DataType::Float64, false)];
            let tried = [(try_real, DataType::Float32, true), (try_double, DataType::Float64, true)];
            let function = |(name, to, trying)| {
                let signature = Signature::any(1, Volatility::Immutable);
                ScalarUDF::new_from_impl(Reaching { name, to, trying, signature })
            };
            let ([real, double], [try_real, try_double]) = (reals.map(function), tried.map(function));
            [real, double, try_real, try_double]
        });
        &FUNCTIONS[usize::from(double) + 2 * usize::from(trying)]
    }

    fn cast(&self, array: &ArrayRef) -> Result<ArrayRef> {
        let options = CastOptions { safe: self.trying, ..CastOptions::default() };
        let made = cast_with_options(array, &self.to, &options)?;
        match self.to {
            DataType::Float32 => self.reached(array, made.as_primitive::<Float32Type>()),
            _ => self.reached(array, made.as_primitive::<Float64Type>()),
        }
    }

    fn reached<T>(&self, from: &ArrayRef, made: &PrimitiveArray<T>) -> Result<ArrayRef>
    where
        T: ArrowPrimitiveType,
        T::Native: Into<f64>,
    {
        let is_lost = |row: &usize| {
            let value: f64 = made.value(*row).into();
            value.is_infinite() && made.is_valid(*row) && is_finite(from, *row)
        };
        let Some(first) = (0..made.len()).find(is_lost) else { return Ok(Arc::new(made.clone())) };
        if self.trying {
            let kept = (0..made.len()).map(|row| (made.is_valid(row) && !is_lost(&row)).then(|| made.value(row)));
            return Ok(Arc::new(kept.collect::<PrimitiveArray<T>>()));
        }
        let ty = if self.to == DataType::Float32 { "REAL" } else { "DOUBLE" };
        let message = format!("{} is further from zero than any {ty}", array_value_to_string(from, first)?);
        Err(SqlError::constraint("out_of_range", message).into_datafusion())
    }
}

/// Whether the value is a number, and not an infinity.
fn is_finite(array: &ArrayRef, row: usize) -> bool {
    let has_digit = |text: &str| text.bytes().any(|byte| byte.is_ascii_digit());
    match array.data_type() {
        DataType::Float64 => array.as_primitive::<Float64Type>().value(row).is_finite(),
        DataType::Utf8 => has_digit(array.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => has_digit(array.as_string::<i64>().value(row)),
        DataType::Utf8View => has_digit(array.as_string_view().value(row)),
        _ => true,
    }
}

impl ScalarUDFImpl for Reaching {
    fn name(&self) -> &str {
        self.name
    }

    /// As the argument is called, as a cast is, so that columns of a result keep their names.
    fn schema_name(&self, args: &[Expr]) -> Result<String> {
        match args {
            [arg] => Ok(arg.schema_name().to_string()),
            _ => internal_err!("{} values are cast as one", args.len()),
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _types: &[DataType]) -> Result<DataType> {
        Ok(self.to.clone())
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> Result<FieldRef> {
        let nullable = self.trying || args.arg_fields.iter().any(|field| field.is_nullable());
        Ok(Arc::new(Field::new(self.name, self.to.clone(), nullable)))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let [value] = args.args.as_slice() else { return exec_err!("{} values are cast as one", args.args.len()) };
        match value {
            ColumnarValue::Array(array) => Ok(ColumnarValue::Array(self.cast(array)?)),
            ColumnarValue::Scalar(scalar) => {
                let made = self.cast(&scalar.to_array()?)?;
                Ok(ColumnarValue::Scalar(ScalarValue::try_from_array(&made, 0)?))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ::arrow::array::{Float64Array, StringArray};

    use super::*;

    fn made(to: DataType, trying: bool, from: ArrayRef) -> Result<Vec<Option<f64>>, String> {
        let signature = Signature::any(1, Volatility::Immutable);
        let made = Reaching { name: "", to, trying, signature }.cast(&from).map_err(|error| error.to_string())?;
        let made = cast_with_options(&made, &DataType::Float64, &CastOptions::default()).unwrap();
        Ok(made.as_primitive::<Float64Type>().iter().collect())
    }

    #[test]
    fn only_what_was_finite_is_lost() {
        let (real, double, infinite) = (DataType::Float32, DataType::Float64, Some(f64::INFINITY));
        let numbers: ArrayRef = Arc::new(Float64Array::from(vec![Some(0.5), None, infinite]));
        assert_eq!(made(real.clone(), false, numbers).unwrap(), [Some(0.5), None, infinite]);
        let large: ArrayRef = Arc::new(Float64Array::from(vec![infinite, Some(-1e300)]));
        assert!(made(real.clone(), false, large.clone()).unwrap_err().contains("any REAL"));
        assert_eq!(made(real.clone(), true, large).unwrap(), [infinite, None]);
        let texts: ArrayRef = Arc::new(StringArray::from(vec!["1e39", "inf", "x", "1.5"]));
        assert_eq!(made(real, true, texts).unwrap(), [None, infinite, None, Some(1.5)]);
        let beyond: ArrayRef = Arc::new(StringArray::from(vec!["inf", "1e400"]));
        assert!(made(double.clone(), false, beyond.clone()).unwrap_err().contains("1e400"));
        assert_eq!(made(double, true, beyond).unwrap(), [infinite, None]);
    }
}
