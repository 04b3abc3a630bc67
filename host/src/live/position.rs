//! A place in a live stream as clients see it: the `id:` of events and `Last-Event-ID`. Opaque to them.
//!
//! The one place that makes and reads its text: `{epoch}-{seq}-{fingerprint}`.

use std::fmt;
use std::str::FromStr;

/// Where a subscriber is, and of what: the history, the last commit it has whole, and the plan, schema version and
/// pipeline it was made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    pub epoch: u64,
    pub seq: u64,
    /// Plan, schema version, pipeline; hexadecimal parts joined by dots.
    pub fingerprint: String,
}

/// Longer texts were not made here.
const MAX_BYTES: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the event id was not made by this kind of server; send the last `id:` as it came, or none")]
pub struct NotAPosition;

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{}-{}", self.epoch, self.seq, self.fingerprint)
    }
}

impl FromStr for Position {
    type Err = NotAPosition;

    fn from_str(text: &str) -> Result<Position, NotAPosition> {
        if text.len() > MAX_BYTES {
            return Err(NotAPosition);
        }
        let mut parts = text.splitn(3, '-');
        let mut part = || parts.next().filter(|part| !part.is_empty() && !part.starts_with('+')).ok_or(NotAPosition);
        let epoch = u64::from_str_radix(part()?, 16).map_err(|_| NotAPosition)?;
        let seq = part()?.parse().map_err(|_| NotAPosition)?;
        let fingerprint = part()?;
        if !fingerprint.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'.') {
            return Err(NotAPosition);
        }
        Ok(Position { epoch, seq, fingerprint: fingerprint.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_pinned_and_comes_back() {
        let position = Position { epoch: 0xbeef, seq: 42, fingerprint: "a1.2.ff".to_owned() };
        assert_eq!(position.to_string(), "beef-42-a1.2.ff");
        assert_eq!("beef-42-a1.2.ff".parse(), Ok(position));
        let last = Position { epoch: u64::MAX, seq: u64::MAX, fingerprint: "0.0.0".to_owned() };
        assert_eq!(last.to_string().parse(), Ok(last));
    }

    #[test]
    fn garbage_is_refused() {
        let long = format!("1-1-{}", "a".repeat(1_000_000));
        for text in ["", "-", "1", "1-2", "1-2-", "x-2-a", "1-x-a", "1-+2-a", "1--2-a", "1-2-a\nid: 3", "1-2-ä", &long]
        {
            assert_eq!(text.parse::<Position>(), Err(NotAPosition), "{text:.20}");
        }
    }
}
