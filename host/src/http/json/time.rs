//! Dates and times as text: ISO 8601 days, times of day, RFC 3339 instants in UTC.

use std::io::Write;

const DAY_SECONDS: i64 = 86_400;

/// Days since 1970-01-01 in the Gregorian calendar as (year, month, day), for every day that fits an i64 of seconds.
fn civil(days: i64) -> (i64, u32, u32) {
    // Years counted from March, so that the leap day is a year's last: 146,097 days are 400 such years.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month as u32, day as u32)
}

/// `2013-01-31`; years outside 0000 to 9999 carry a sign, as ISO 8601 has it.
pub fn date(days: i64, out: &mut Vec<u8>) {
    let (year, month, day) = civil(days);
    let written = if (0..=9999).contains(&year) {
        write!(out, "{year:04}-{month:02}-{day:02}")
    } else {
        write!(out, "{year:+05}-{month:02}-{day:02}")
    };
    written.expect("writing to memory cannot fail");
}

/// `"05:15:00.000000"` with its quotes.
pub fn of_day(nanos: i64, out: &mut Vec<u8>) {
    out.push(b'"');
    clock(nanos.div_euclid(1_000_000_000), nanos.rem_euclid(1_000_000_000), out);
    out.push(b'"');
}

/// `"2013-01-01T05:15:00.000000Z"` with its quotes; nanoseconds only where there are any.
pub fn timestamp(seconds: i64, nanos: i64, out: &mut Vec<u8>) {
    out.push(b'"');
    date(seconds.div_euclid(DAY_SECONDS), out);
    out.push(b'T');
    clock(seconds.rem_euclid(DAY_SECONDS), nanos, out);
    out.extend_from_slice(b"Z\"");
}

fn clock(seconds: i64, nanos: i64, out: &mut Vec<u8>) {
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    let written = if nanos % 1_000 == 0 {
        write!(out, "{hour:02}:{minute:02}:{second:02}.{:06}", nanos / 1_000)
    } else {
        write!(out, "{hour:02}:{minute:02}:{second:02}.{nanos:09}")
    };
    written.expect("writing to memory cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn known_days() {
        for (days, text) in [
            (0, "1970-01-01"),
            (-1, "1969-12-31"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (15_706, "2013-01-01"),
            (-719_468, "0000-03-01"),
            (-719_529, "-0001-12-31"),
            (2_932_896, "9999-12-31"),
            (2_932_897, "+10000-01-01"),
        ] {
            assert_eq!(shown(|out| date(days, out)), text, "{days}");
        }
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let mut last = civil(-800_000);
        for days in -799_999..800_000 {
            let next = civil(days);
            let same_month = next.0 == last.0 && next.1 == last.1 && next.2 == last.2 + 1;
            let new_month = next.2 == 1 && last.2 >= 28 && (next.1 == last.1 + 1 || (next.1 == 1 && last.1 == 12));
            assert!(same_month || new_month, "{last:?} then {next:?}");
            last = next;
        }
    }

    #[test]
    fn instants() {
        assert_eq!(shown(|out| timestamp(1_357_017_300, 0, out)), "\"2013-01-01T05:15:00.000000Z\"");
        assert_eq!(shown(|out| timestamp(-1, 999_999_000, out)), "\"1969-12-31T23:59:59.999999Z\"");
        assert_eq!(shown(|out| timestamp(0, 1, out)), "\"1970-01-01T00:00:00.000000001Z\"");
        assert_eq!(shown(|out| of_day(86_399_999_999_000, out)), "\"23:59:59.999999\"");
        // The ends of the range must not panic.
        shown(|out| timestamp(i64::MIN, 0, out));
        shown(|out| timestamp(i64::MAX, 0, out));
    }
}
