//! What happens when on the replayed day: one transaction for every minute in which something does.
//!
//! A flight is announced an hour ahead. While it has not left, what is known of its delay (at least 15 minutes by now,
//! at least an hour, …) is posted; then it leaves with its true delay, and lands. All of it follows from the record.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::Result;
use crate::api::Statement;
use crate::data::{self, Flight};

/// Delays at which a flight that has not left yet is posted as so late.
const POSTED: [f64; 4] = [15.0, 60.0, 120.0, 240.0];
const ANNOUNCED_AHEAD: i64 = 60;
/// From the wheels' touch-down to the gate, roughly; the record has the time in the air only.
const TAXI: i64 = 20;

pub struct Day {
    /// Minutes since midnight in New York → the statements of that minute.
    steps: BTreeMap<i64, Vec<Statement>>,
    flights: Vec<Flight>,
}

impl Day {
    pub fn from_slice() -> Result<Self> {
        let flights = data::day()?;
        let mut announced: BTreeMap<i64, Vec<Vec<Value>>> = BTreeMap::new();
        let mut updates: BTreeMap<i64, Vec<Statement>> = BTreeMap::new();
        for flight in &flights {
            let scheduled = minute_in_new_york(&flight.sched_dep)?;
            announced.entry(scheduled - ANNOUNCED_AHEAD).or_default().push(flight.values("scheduled", false));
            for (minute, update) in updates_of(flight, scheduled) {
                updates.entry(minute).or_default().push(update);
            }
        }
        let mut steps: BTreeMap<i64, Vec<Statement>> =
            announced.into_iter().map(|(minute, rows)| (minute, vec![data::insert("flights", "", &rows)])).collect();
        for (minute, updates) in updates {
            steps.entry(minute).or_default().extend(updates);
        }
        Ok(Day { steps, flights })
    }

    pub fn minutes(&self) -> impl Iterator<Item = (i64, &[Statement])> {
        self.steps.iter().map(|(minute, statements)| (*minute, statements.as_slice()))
    }

    pub fn first_minute(&self) -> i64 {
        self.steps.keys().next().copied().unwrap_or(0)
    }

    pub fn flights(&self) -> &[Flight] {
        &self.flights
    }
}

/// Every value that `dep_delay` of a flight has, one after the other.
pub fn posted_delays(flight: &Flight) -> Vec<f64> {
    let Some(delay) = flight.dep_delay else { return Vec::new() };
    POSTED.into_iter().filter(|&posted| posted < delay).chain([delay]).collect()
}

fn updates_of(flight: &Flight, scheduled: i64) -> Vec<(i64, Statement)> {
    let Some(delay) = flight.dep_delay else {
        return vec![(scheduled, update("status = 'cancelled'", &[], flight.id))];
    };
    let mut updates: Vec<(i64, Statement)> = posted_delays(flight)
        .into_iter()
        .map(|posted| {
            let set = if posted < delay { "status = 'delayed'" } else { "status = 'departed'" };
            (scheduled + posted as i64, update(&format!("{set}, dep_delay = $1"), &[json!(posted)], flight.id))
        })
        .collect();
    let departed = scheduled + delay as i64;
    updates.push(match flight.air_time {
        Some(air_time) => (
            departed + air_time as i64 + TAXI,
            update(
                "status = 'arrived', arr_delay = $1, air_time = $2",
                &[json!(flight.arr_delay), json!(air_time)],
                flight.id,
            ),
        ),
        None => (departed + TAXI, update("status = 'diverted'", &[], flight.id)),
    });
    updates
}

fn update(set: &str, params: &[Value], id: i64) -> Statement {
    let key = params.len() + 1;
    Statement {
        sql: format!("UPDATE flights SET {set} WHERE id = ${key}"),
        params: params.iter().cloned().chain([json!(id)]).collect(),
    }
}

/// Minutes since midnight in New York (five hours behind UTC in winter) on the replayed day.
fn minute_in_new_york(sched_dep: &str) -> Result<i64> {
    let part = |range: std::ops::Range<usize>| -> Result<i64> {
        let digits = sched_dep.get(range).ok_or_else(|| format!("not a time: {sched_dep}"))?;
        Ok(digits.parse()?)
    };
    Ok((part(8..10)? - 8) * 24 * 60 + (part(11..13)? - 5) * 60 + part(14..16)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_day_is_in_new_yorks_time() {
        assert_eq!(minute_in_new_york("2013-03-08T10:15Z").unwrap(), 5 * 60 + 15);
        assert_eq!(minute_in_new_york("2013-03-09T04:59Z").unwrap(), 24 * 60 - 1);
        assert!(minute_in_new_york("soon").is_err());
    }

    #[test]
    fn every_flight_is_announced_first_and_ends() {
        let day = Day::from_slice().unwrap();
        let all: Vec<&Statement> = day.minutes().flat_map(|(_, statements)| statements).collect();
        let inserted: usize = all.iter().filter(|s| s.sql.starts_with("INSERT")).map(|s| s.params.len() / 12).sum();
        let ended = |status: &str| all.iter().filter(|s| s.sql.contains(&format!("'{status}'"))).count();
        assert_eq!(inserted, 979);
        assert_eq!((ended("cancelled"), ended("arrived") + ended("diverted")), (180, 799));
        // A request may have 1,000 parameters.
        let params = |statements: &[Statement]| statements.iter().map(|s| s.params.len()).sum::<usize>();
        assert!(day.minutes().all(|(_, statements)| params(statements) <= 1_000));
    }

    #[test]
    fn delays_are_posted_as_they_grow() {
        let mut flight = data::day().unwrap().remove(0);
        flight.dep_delay = Some(75.0);
        assert_eq!(posted_delays(&flight), [15.0, 60.0, 75.0]);
        flight.dep_delay = Some(-4.0);
        assert_eq!(posted_delays(&flight), [-4.0]);
    }
}
