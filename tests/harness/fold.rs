//! What the events of a map stream say the result is now.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::live::Event;

/// The rows of a result by their key, whose text is canonical: columns in alphabetic order.
pub type State = BTreeMap<String, Value>;

/// Folds events; refuses those that cannot follow what came before, because a double or a hole shows there first.
#[derive(Clone, Debug, Default)]
pub struct Fold {
    pub rows: State,
    /// When rows of a stream table stop showing, in microseconds since 1970: no event says so.
    pub expires: BTreeMap<String, i64>,
    /// The id of the last event that had one: where to resume.
    pub last_id: Option<String>,
    /// Whether an `uptodate` has closed the snapshot or the catch-up of this connection.
    pub up_to_date: bool,
    pub resyncs: usize,
    /// What the rows touched since the last id were before, in order.
    unsettled: Vec<(String, Option<Value>, Option<i64>)>,
}

impl Fold {
    pub fn apply(&mut self, event: &Event) -> Result<(), String> {
        match event.name.as_str() {
            "start" => self.start(event),
            "insert" => self.insert(event)?,
            "update" => self.update(event)?,
            "delete" => self.delete(event)?,
            "uptodate" => self.up_to_date = true,
            "resync" => {
                self.resyncs += 1;
                self.void();
            }
            "change" | "pipeline" | "plugin-error" | "failed" | "closed" => {}
            other => return Err(format!("an event of a name that nobody knows: {other}")),
        }
        if let Some(id) = &event.id {
            self.last_id = Some(id.clone());
            self.unsettled.clear();
        }
        Ok(())
    }

    /// The connection broke. What came after the last id is half a commit, and comes again as a whole.
    pub fn lost(&mut self) {
        while let Some((key, before, expires)) = self.unsettled.pop() {
            match expires {
                Some(expires) => self.expires.insert(key.clone(), expires),
                None => self.expires.remove(&key),
            };
            match before {
                Some(row) => self.rows.insert(key, row),
                None => self.rows.remove(&key),
            };
        }
    }

    fn start(&mut self, event: &Event) {
        self.up_to_date = false;
        if event.data["from"] == "snapshot" {
            self.void();
        }
    }

    /// The rows that have not expired.
    pub fn alive(&self) -> State {
        let now = now();
        let alive = |key: &String| self.expires.get(key).is_none_or(|expires| *expires > now);
        self.rows.iter().filter(|(key, _)| alive(key)).map(|(key, row)| (key.clone(), row.clone())).collect()
    }

    /// Notes when the event's row expires; forgets when the one before it did.
    fn expire(&mut self, key: String, event: &Event) -> Result<(), String> {
        match event.data.get("expires") {
            None => self.expires.remove(&key),
            Some(text) => {
                let micros = text.as_str().and_then(micros).ok_or_else(|| format!("expires is no time: {event:?}"))?;
                self.expires.insert(key, micros)
            }
        };
        Ok(())
    }

    /// A snapshot follows. An id from before would resume into rows that are gone from here.
    fn void(&mut self) {
        self.rows.clear();
        self.expires.clear();
        self.unsettled.clear();
        self.last_id = None;
        self.up_to_date = false;
    }

    fn insert(&mut self, event: &Event) -> Result<(), String> {
        let (key, row) = (key_of(event)?, event.data["row"].clone());
        let expired = self.expires.get(&key).is_some_and(|expires| *expires <= now());
        let before = self.rows.get(&key).cloned();
        self.note(&key, before.clone());
        match before {
            Some(before) if !expired => {
                return Err(format!("an insert of a key that is there, as {before}: {event:?}"));
            }
            _ => self.rows.insert(key.clone(), row),
        };
        self.expire(key, event)
    }

    /// So that it can be taken back with the commit it is a part of.
    fn note(&mut self, key: &str, before: Option<Value>) {
        let expires = self.expires.get(key).copied();
        self.unsettled.push((key.to_owned(), before, expires));
    }

    fn update(&mut self, event: &Event) -> Result<(), String> {
        let row = &event.data["row"];
        let key = key_of(event)?;
        let held = self.rows.get_mut(&key);
        let held = held.ok_or_else(|| format!("an update of a key that is not there: {event:?}"))?;
        let before = std::mem::replace(held, row.clone());
        self.note(&key, Some(before.clone()));
        self.expire(key, event)?;
        // By their text: 0.0 and -0.0 are equal numbers, but another value was stored and is shown.
        let shown = [before.to_string(), row.to_string()];
        if shown[0] == shown[1] {
            return Err(format!("an update that changes nothing: {event:?}"));
        }
        // `old` has the changed columns as they were. It may have columns of the table that are not in the result.
        for (column, old) in event.data["old"].as_object().into_iter().flatten() {
            if before.get(column).is_some_and(|held| held != old) {
                return Err(format!("column {column} was {} before, the event says {old}: {event:?}", before[column]));
            }
        }
        Ok(())
    }

    fn delete(&mut self, event: &Event) -> Result<(), String> {
        let reason = &event.data["reason"];
        if reason != "deleted" && reason != "moved_out" {
            return Err(format!("a delete without its reason: {event:?}"));
        }
        let key = key_of(event)?;
        match self.rows.remove(&key) {
            Some(before) => {
                self.note(&key, Some(before));
                self.expires.remove(&key);
                Ok(())
            }
            None => Err(format!("a delete of a key that is not there: {event:?}")),
        }
    }
}

pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970").as_micros() as i64
}

/// `2026-01-02T03:04:05.000006Z` in microseconds since 1970.
pub fn micros(text: &str) -> Option<i64> {
    let number = |from: usize, to: usize| text.get(from..to)?.parse::<i64>().ok();
    let shape: String = text.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    if shape != "0000-00-00T00:00:00.000000Z" {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    // The year begins in March, so that the leap day is its last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 719_469;
    let seconds = number(11, 13)? * 3_600 + number(14, 16)? * 60 + number(17, 19)?;
    Some((days * 86_400 + seconds) * 1_000_000 + number(20, 26)?)
}

fn key_of(event: &Event) -> Result<String, String> {
    let key = event.data["key"].as_object().ok_or_else(|| format!("an event without a key: {event:?}"))?;
    Ok(canonical(key.iter().map(|(name, value)| (name.as_str(), value))))
}

/// The canonical text of a key.
pub fn canonical<'a>(columns: impl Iterator<Item = (&'a str, &'a Value)>) -> String {
    let sorted: BTreeMap<&str, &Value> = columns.collect();
    serde_json::to_string(&sorted).expect("strings and values are JSON")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(name: &str, data: Value) -> Event {
        Event { name: name.to_owned(), id: None, data }
    }

    #[test]
    fn times() {
        assert_eq!(micros("1970-01-01T00:00:00.000001Z"), Some(1));
        assert_eq!(micros("2026-01-02T03:04:05.000006Z"), Some(1_767_323_045_000_006));
        assert_eq!(micros("2024-02-29T00:00:00.000000Z"), Some(1_709_164_800_000_000));
        assert_eq!(micros("2026-01-02T03:04:05Z"), None);
    }

    #[test]
    fn an_expired_row_makes_room() {
        let insert = |expires: &str| event("insert", json!({"key": {"k": 1}, "row": {"a": 1}, "expires": expires}));
        let mut fold = Fold::default();
        fold.apply(&insert("2001-01-01T00:00:00.000000Z")).unwrap();
        assert!(fold.alive().is_empty() && fold.rows.len() == 1);
        fold.apply(&insert("2999-01-01T00:00:00.000000Z")).unwrap();
        assert_eq!(fold.alive().len(), 1);
        assert!(fold.apply(&insert("2999-01-01T00:00:00.000000Z")).is_err());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let insert = event("insert", json!({"key": {"k": 1}, "row": {"a": 1}}));
        let update = event("update", json!({"key": {"k": 1}, "row": {"a": 2}, "old": {"a": 1}}));
        let delete = event("delete", json!({"key": {"k": 1}, "old": {}, "reason": "moved_out"}));
        let mut fold = Fold::default();
        assert!(fold.apply(&update).is_err());
        assert!(fold.apply(&delete).is_err());
        let mut fold = Fold::default();
        fold.apply(&insert).unwrap();
        assert!(fold.clone().apply(&insert).is_err(), "a double");
        fold.apply(&update).unwrap();
        assert!(fold.clone().apply(&update).is_err(), "a double");
        assert!(
            fold.clone().apply(&event("update", json!({"key": {"k": 1}, "row": {"a": 3}, "old": {"a": 9}}))).is_err()
        );
        fold.apply(&delete).unwrap();
        assert!(fold.apply(&delete).is_err(), "a double");
    }

    #[test]
    fn a_start_from_a_snapshot_voids_and_one_from_a_position_keeps() {
        let mut fold = Fold::default();
        fold.apply(&event("insert", json!({"key": {"k": 1}, "row": {}}))).unwrap();
        fold.apply(&event("start", json!({"from": "some-position"}))).unwrap();
        assert_eq!(fold.rows.len(), 1);
        fold.apply(&event("start", json!({"from": "snapshot"}))).unwrap();
        assert!(fold.rows.is_empty());
    }

    #[test]
    fn half_a_commit_is_taken_back_when_the_connection_breaks() {
        let insert = |k: i64| event("insert", json!({"key": {"k": k}, "row": {"a": k}}));
        let mut fold = Fold::default();
        fold.apply(&insert(1)).unwrap();
        fold.apply(&Event { id: Some("one".to_owned()), ..insert(2) }).unwrap();
        let settled = fold.rows.clone();
        fold.apply(&event("delete", json!({"key": {"k": 1}, "old": {}, "reason": "deleted"}))).unwrap();
        fold.apply(&insert(1)).unwrap();
        fold.apply(&event("update", json!({"key": {"k": 2}, "row": {"a": 9}, "old": {"a": 2}}))).unwrap();
        fold.apply(&insert(3)).unwrap();
        assert_ne!(fold.rows, settled);
        fold.lost();
        assert_eq!((fold.rows, fold.last_id.as_deref()), (settled, Some("one")));
    }

    #[test]
    fn the_order_of_key_columns_does_not_matter() {
        let (one, two) = (json!(1), json!("x"));
        assert_eq!(
            canonical([("a", &one), ("b", &two)].into_iter()),
            canonical([("b", &two), ("a", &one)].into_iter())
        );
    }
}
