//! Numbers of any numeric column, compared exactly.

use core::cmp::Ordering;

/// A DECIMAL: `unscaled` ÷ 10^`scale`.
#[derive(Clone, Copy, Debug)]
pub struct Decimal {
    pub unscaled: i128,
    pub scale: i8,
}

impl Decimal {
    /// The nearest float, or one beside it.
    pub fn to_f64(self) -> f64 {
        // One division by an exact power (up to 10^22) rounds once; dividing by ten again and again would drift.
        let mut power = 1.0f64;
        for _ in 0..self.scale.unsigned_abs() {
            power *= 10.0;
        }
        if self.scale < 0 { self.unscaled as f64 * power } else { self.unscaled as f64 / power }
    }

    /// Kept out of line: 128-bit division is long, and most columns are no decimals.
    #[inline(never)]
    fn compare(self, other: i64) -> Ordering {
        match self.floor() {
            Some((whole, rest)) => whole.cmp(&i128::from(other)).then(rest.cmp(&false)),
            None => self.unscaled.cmp(&0),
        }
    }

    /// Whole part (rounded down) and whether anything is left of it; `None` when it is over every i128.
    fn floor(self) -> Option<(i128, bool)> {
        let power = 10i128.checked_pow(u32::from(self.scale.unsigned_abs()));
        if self.scale < 0 {
            let whole = power.and_then(|power| self.unscaled.checked_mul(power));
            return if self.unscaled == 0 { Some((0, false)) } else { whole.map(|whole| (whole, false)) };
        }
        Some(match power {
            Some(power) => (self.unscaled.div_euclid(power), self.unscaled.rem_euclid(power) != 0),
            // 10^39 and more is over every i128: only the sign is left.
            None => (if self.unscaled < 0 { -1 } else { 0 }, self.unscaled != 0),
        })
    }
}

/// The value of an integer, float or decimal column. Compares with `i64` (exactly) and `f64`.
///
/// ```
/// use guest_sdk::prelude::*;
/// assert!(Number::Int(20) >= 15);
/// assert!(Number::Decimal(Decimal { unscaled: 1499, scale: 2 }) < 15);
/// assert!(Number::Float(f64::NAN).partial_cmp(&15).is_none());
/// ```
#[derive(Clone, Copy, Debug)]
pub enum Number {
    Int(i64),
    Float(f64),
    Decimal(Decimal),
}

impl Number {
    /// The nearest float, or one beside it.
    #[inline]
    pub fn to_f64(self) -> f64 {
        match self {
            Number::Int(value) => value as f64,
            Number::Float(value) => value,
            Number::Decimal(value) => value.to_f64(),
        }
    }
}

impl PartialEq<i64> for Number {
    #[inline]
    fn eq(&self, other: &i64) -> bool {
        self.partial_cmp(other) == Some(Ordering::Equal)
    }
}

impl PartialOrd<i64> for Number {
    #[inline]
    fn partial_cmp(&self, other: &i64) -> Option<Ordering> {
        match *self {
            Number::Int(value) => Some(value.cmp(other)),
            Number::Float(value) => float_to_int(value, *other),
            Number::Decimal(value) => Some(value.compare(*other)),
        }
    }
}

impl PartialEq<f64> for Number {
    #[inline]
    fn eq(&self, other: &f64) -> bool {
        self.partial_cmp(other) == Some(Ordering::Equal)
    }
}

impl PartialOrd<f64> for Number {
    #[inline]
    fn partial_cmp(&self, other: &f64) -> Option<Ordering> {
        match *self {
            Number::Int(value) => float_to_int(*other, value).map(Ordering::reverse),
            Number::Float(value) => value.partial_cmp(other),
            Number::Decimal(value) => value.to_f64().partial_cmp(other),
        }
    }
}

/// Converting the integer to a float first would call 2^53 and 2^53 + 1 equal.
#[inline]
fn float_to_int(float: f64, int: i64) -> Option<Ordering> {
    // Up to here every integer is a float. A parameter nearly always is, and is looked at once for a whole batch.
    if int.unsigned_abs() <= 1 << f64::MANTISSA_DIGITS {
        return float.partial_cmp(&(int as f64));
    }
    whole_float_to_int(float, int)
}

#[cold]
fn whole_float_to_int(float: f64, int: i64) -> Option<Ordering> {
    // 2^63, the first float over every i64.
    const LIMIT: f64 = 9_223_372_036_854_775_808.0;
    if float.is_nan() {
        None
    } else if float >= LIMIT {
        Some(Ordering::Greater)
    } else if float < -LIMIT {
        Some(Ordering::Less)
    } else {
        let whole = float as i64;
        // Below 2^53 the cast back is exact; above it a float has no fraction.
        Some(whole.cmp(&int).then(float.partial_cmp(&(whole as f64))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Divided by ten twice, 49.49 became 49.489999999999995, and a transform's output differed from what SQL shows.
    #[test]
    fn a_decimal_is_the_float_its_text_reads_as() {
        for (unscaled, scale) in [(4949, 2), (7445, 2), (-1, 1), (9_007_199_254_740_991, 15), (123, 22)] {
            let text = format!("{unscaled}e-{scale}");
            assert_eq!(Decimal { unscaled, scale }.to_f64(), text.parse::<f64>().unwrap(), "{text}");
        }
    }

    #[test]
    fn edges() {
        const MAX: i64 = i64::MAX;
        assert!(Number::Float(9_223_372_036_854_775_808.0) > MAX);
        assert!(Number::Float(-9_223_372_036_854_775_808.0) == i64::MIN);
        assert!(Number::Float(9_007_199_254_740_992.0) < 9_007_199_254_740_993);
        assert!(Number::Int(9_007_199_254_740_993) > 9_007_199_254_740_992.0);
        assert!(Number::Float(-0.5) < 0 && Number::Float(-0.5) > -1 && Number::Float(-0.0) == 0);
        assert!(Number::Decimal(Decimal { unscaled: -1, scale: 100 }) < 0);
        assert!(Number::Decimal(Decimal { unscaled: -1, scale: 100 }) > -1);
        assert!(Number::Decimal(Decimal { unscaled: 2, scale: -100 }) > MAX);
        assert!(Number::Decimal(Decimal { unscaled: -2, scale: -100 }) < i64::MIN);
        assert!(Number::Decimal(Decimal { unscaled: 0, scale: -100 }) == 0);
    }

    proptest! {
        #[test]
        fn decimals_compare_as_integers_do(a in any::<i64>(), b in any::<i64>(), scale in 0i8..19, rest in 0i128..10) {
            let unscaled = i128::from(a) * 10i128.pow(scale as u32);
            let number = Number::Decimal(Decimal { unscaled, scale });
            prop_assert_eq!(number.partial_cmp(&b), Some(a.cmp(&b)));
            if scale > 0 && rest > 0 {
                let more = Number::Decimal(Decimal { unscaled: unscaled + rest, scale });
                prop_assert!(more > a);
            }
        }

        #[test]
        fn floats_and_integers_agree_both_ways(float in any::<f64>(), near in any::<i64>()) {
            let int = (float as i64).saturating_add(near % 3);
            let there = Number::Float(float).partial_cmp(&int);
            let back = Number::Int(int).partial_cmp(&float).map(Ordering::reverse);
            prop_assert_eq!(there, back);
            if float.abs() < 4e15 {
                prop_assert_eq!(there, float.partial_cmp(&(int as f64)));
            }
        }
    }
}
