//! `sum()` that is exact, or an error where the result leaves the range of its type.
//!
//! DataFusion adds integers in 64 bits and the longest decimals in 128, and both wrap around there. Here sums are twice
//! as wide until the result is asked for: in one group, between partial sums, and in a frame that slides over a window.
//! So a sum that leaves the range on its way and comes back is right, whatever the order of its rows. The adding itself
//! is still DataFusion's, in the wider type.
//!
//! One exception: beside `count(DISTINCT x)` the optimizer makes a sum of the sums for each `x`, and each of those has to
//! be in the range as well.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use ::arrow::array::{ArrayRef, AsArray, BooleanArray};
use ::arrow::datatypes::{
    DECIMAL128_MAX_PRECISION, DECIMAL256_MAX_PRECISION, DataType, Decimal128Type, Decimal256Type, Field, FieldRef,
    Int64Type, UInt64Type, i256,
};
use ::arrow::error::ArrowError;
use datafusion::common::{Result, ScalarValue, internal_err};
use datafusion::functions_aggregate::sum::Sum;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::utils::AggregateOrderSensitivity;
use datafusion::logical_expr::{
    Accumulator, AggregateUDF, AggregateUDFImpl, Documentation, EmitTo, GroupsAccumulator, ReversedUDAF, Signature,
};

/// The least number that a decimal of the greatest precision cannot hold.
const DECIMAL_END: u128 = 10u128.pow(DECIMAL128_MAX_PRECISION as u32);

/// In the place of DataFusion's, under the same name: its optimizer knows some things of `sum`.
pub(crate) fn exact_sum() -> AggregateUDF {
    AggregateUDF::new_from_impl(ExactSum { inner: Sum::new() })
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct ExactSum {
    inner: Sum,
}

impl AggregateUDFImpl for ExactSum {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn signature(&self) -> &Signature {
        self.inner.signature()
    }

    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        self.inner.return_type(arg_types)
    }

    fn accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn Accumulator>> {
        let Some(wide) = Wide::of(args.return_type()) else { return self.inner.accumulator(args) };
        let inner = self.inner.accumulator(wide.args(args))?;
        Ok(Box::new(WideSum { inner, wide }))
    }

    fn create_sliding_accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn Accumulator>> {
        match Wide::of(args.return_type()) {
            None => self.inner.create_sliding_accumulator(args),
            Some(Wide::Signed) if args.is_distinct => Ok(Box::new(SlidingDistinct::default())),
            Some(wide) => {
                let inner = self.inner.create_sliding_accumulator(wide.args(args))?;
                Ok(Box::new(WideSum { inner, wide }))
            }
        }
    }

    fn state_fields(&self, args: StateFieldsArgs<'_>) -> Result<Vec<FieldRef>> {
        let Some(wide) = Wide::of(args.return_type()) else { return self.inner.state_fields(args) };
        self.inner.state_fields(StateFieldsArgs { return_field: wide.field(&args.return_field), ..args })
    }

    fn groups_accumulator_supported(&self, args: AccumulatorArgs<'_>) -> bool {
        self.inner.groups_accumulator_supported(args)
    }

    fn create_groups_accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn GroupsAccumulator>> {
        let Some(wide) = Wide::of(args.return_type()) else { return self.inner.create_groups_accumulator(args) };
        let inner = self.inner.create_groups_accumulator(wide.args(args))?;
        Ok(Box::new(WideGroups { inner, wide }))
    }

    fn order_sensitivity(&self) -> AggregateOrderSensitivity {
        self.inner.order_sensitivity()
    }

    fn reverse_expr(&self) -> ReversedUDAF {
        self.inner.reverse_expr()
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.inner.documentation()
    }
}

/// What kind of numbers are added in a type wider than their own.
#[derive(Clone, Copy, Debug)]
enum Wide {
    /// BIGINT: what smaller integers are added in as well.
    Signed,
    /// What some functions count in.
    Unsigned,
    /// Decimals whose sums have every digit there is, of this scale.
    Decimal(i8),
}

impl Wide {
    /// `None`: what DataFusion does is enough. The sum of a decimal with few digits has ten more: it is full after more
    /// rows than a query comes to before its deadline.
    fn of(result: &DataType) -> Option<Wide> {
        match result {
            DataType::Int64 => Some(Wide::Signed),
            DataType::UInt64 => Some(Wide::Unsigned),
            DataType::Decimal128(DECIMAL128_MAX_PRECISION, scale) => Some(Wide::Decimal(*scale)),
            _ => None,
        }
    }

    fn data_type(self) -> DataType {
        match self {
            Wide::Signed | Wide::Unsigned => DataType::Decimal128(DECIMAL128_MAX_PRECISION, 0),
            Wide::Decimal(scale) => DataType::Decimal256(DECIMAL256_MAX_PRECISION, scale),
        }
    }

    fn field(self, field: &FieldRef) -> FieldRef {
        Arc::new(Field::new(field.name(), self.data_type(), true))
    }

    /// The arguments of an accumulator, as if the result were wide.
    fn args(self, args: AccumulatorArgs<'_>) -> AccumulatorArgs<'_> {
        AccumulatorArgs { return_field: self.field(&args.return_field), ..args }
    }

    fn widened(self, values: &[ArrayRef]) -> Result<Vec<ArrayRef>> {
        let [values] = values else { return internal_err!("sum() of {} arguments", values.len()) };
        let ty = self.data_type();
        let wide: ArrayRef = match self {
            Wide::Signed => {
                let values = values.as_primitive::<Int64Type>();
                Arc::new(values.unary::<_, Decimal128Type>(i128::from).with_data_type(ty))
            }
            Wide::Unsigned => {
                let values = values.as_primitive::<UInt64Type>();
                Arc::new(values.unary::<_, Decimal128Type>(i128::from).with_data_type(ty))
            }
            Wide::Decimal(_) => {
                let values = values.as_primitive::<Decimal128Type>();
                Arc::new(values.unary::<_, Decimal256Type>(i256::from_i128).with_data_type(ty))
            }
        };
        Ok(vec![wide])
    }

    /// The results of groups.
    fn narrowed(self, sums: &ArrayRef) -> Result<ArrayRef> {
        let narrow: ArrayRef = match self {
            Wide::Signed => {
                let sums = sums.as_primitive::<Decimal128Type>();
                Arc::new(sums.try_unary::<_, Int64Type, _>(signed)?)
            }
            Wide::Unsigned => {
                let sums = sums.as_primitive::<Decimal128Type>();
                Arc::new(sums.try_unary::<_, UInt64Type, _>(unsigned)?)
            }
            Wide::Decimal(scale) => {
                let sums = sums.as_primitive::<Decimal256Type>().try_unary::<_, Decimal128Type, _>(decimal)?;
                Arc::new(sums.with_data_type(DataType::Decimal128(DECIMAL128_MAX_PRECISION, scale)))
            }
        };
        Ok(narrow)
    }

    /// The result of one group or frame.
    fn narrowed_one(self, sum: ScalarValue) -> Result<ScalarValue> {
        match (self, sum) {
            (Wide::Signed, ScalarValue::Decimal128(sum, ..)) => Ok(ScalarValue::Int64(sum.map(signed).transpose()?)),
            (Wide::Unsigned, ScalarValue::Decimal128(sum, ..)) => {
                Ok(ScalarValue::UInt64(sum.map(unsigned).transpose()?))
            }
            (Wide::Decimal(scale), ScalarValue::Decimal256(sum, ..)) => {
                Ok(ScalarValue::Decimal128(sum.map(decimal).transpose()?, DECIMAL128_MAX_PRECISION, scale))
            }
            (_, sum) => internal_err!("a wide sum came as {}", sum.data_type()),
        }
    }
}

fn signed(sum: i128) -> Result<i64, ArrowError> {
    i64::try_from(sum).map_err(|_| beyond(sum))
}

fn unsigned(sum: i128) -> Result<u64, ArrowError> {
    u64::try_from(sum).map_err(|_| beyond(sum))
}

fn decimal(sum: i256) -> Result<i128, ArrowError> {
    let narrow = sum.to_i128().filter(|sum| sum.unsigned_abs() < DECIMAL_END);
    narrow.ok_or_else(|| {
        ArrowError::ArithmeticOverflow(format!("the sum has more than {DECIMAL128_MAX_PRECISION} digits"))
    })
}

/// As arithmetic that leaves its range says it.
fn beyond(sum: i128) -> ArrowError {
    ArrowError::ArithmeticOverflow(format!("the sum {sum} is beyond BIGINT"))
}

/// Adds the values of one group, or of a frame of a window.
#[derive(Debug)]
struct WideSum {
    inner: Box<dyn Accumulator>,
    wide: Wide,
}

impl Accumulator for WideSum {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.inner.update_batch(&self.wide.widened(values)?)
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        self.wide.narrowed_one(self.inner.evaluate()?)
    }

    fn size(&self) -> usize {
        size_of::<Self>() + self.inner.size()
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        self.inner.state()
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        self.inner.merge_batch(states)
    }

    fn retract_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.inner.retract_batch(&self.wide.widened(values)?)
    }

    fn supports_retract_batch(&self) -> bool {
        self.inner.supports_retract_batch()
    }
}

/// Adds the values of many groups at once.
struct WideGroups {
    inner: Box<dyn GroupsAccumulator>,
    wide: Wide,
}

impl GroupsAccumulator for WideGroups {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        group_indices: &[usize],
        opt_filter: Option<&BooleanArray>,
        total_num_groups: usize,
    ) -> Result<()> {
        self.inner.update_batch(&self.wide.widened(values)?, group_indices, opt_filter, total_num_groups)
    }

    fn evaluate(&mut self, emit_to: EmitTo) -> Result<ArrayRef> {
        self.wide.narrowed(&self.inner.evaluate(emit_to)?)
    }

    fn state(&mut self, emit_to: EmitTo) -> Result<Vec<ArrayRef>> {
        self.inner.state(emit_to)
    }

    fn merge_batch(&mut self, values: &[ArrayRef], group_indices: &[usize], total_num_groups: usize) -> Result<()> {
        self.inner.merge_batch(values, group_indices, total_num_groups)
    }

    fn convert_to_state(&self, values: &[ArrayRef], opt_filter: Option<&BooleanArray>) -> Result<Vec<ArrayRef>> {
        self.inner.convert_to_state(&self.wide.widened(values)?, opt_filter)
    }

    fn size(&self) -> usize {
        size_of::<Self>() + self.inner.size()
    }
}

/// `sum(DISTINCT x)` of integers in a sliding frame: how often each value is in it. DataFusion has no such sum of decimals.
#[derive(Debug, Default)]
struct SlidingDistinct {
    counts: HashMap<i64, usize>,
    sum: i128,
}

impl Accumulator for SlidingDistinct {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        for value in integers(values) {
            let count = self.counts.entry(value).or_default();
            if *count == 0 {
                self.sum += i128::from(value);
            }
            *count += 1;
        }
        Ok(())
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        let sum = (!self.counts.is_empty()).then_some(self.sum);
        Ok(ScalarValue::Int64(sum.map(signed).transpose()?))
    }

    fn size(&self) -> usize {
        size_of::<Self>() + self.counts.capacity() * size_of::<(i64, usize)>()
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        internal_err!("a frame of a window is not put together of parts")
    }

    fn merge_batch(&mut self, _states: &[ArrayRef]) -> Result<()> {
        internal_err!("a frame of a window is not put together of parts")
    }

    fn retract_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        for value in integers(values) {
            let Entry::Occupied(mut count) = self.counts.entry(value) else { continue };
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
                self.sum -= i128::from(value);
            }
        }
        Ok(())
    }

    fn supports_retract_batch(&self) -> bool {
        true
    }
}

fn integers(values: &[ArrayRef]) -> impl Iterator<Item = i64> {
    values.iter().flat_map(|values| values.as_primitive::<Int64Type>().iter().flatten())
}
