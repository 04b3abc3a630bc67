//! `ONCE=1`: the day as fast as the server takes it, and at every stop the folded events compared with what the table
//! says: a SELECT of the same rows, with filter and transform computed here, in plain Rust.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::api::{Api, Statement};
use crate::board::{Board, Counts};
use crate::data::Flight;
use crate::day::{Day, posted_delays};
use crate::{LIVE_SQL, Result};

/// Compare after every so many minutes of the day.
const STOP_EVERY: i64 = 120;

/// A row of no flight that marks a stop. Events come in commit order: when it shows, all before it has.
const MARKER: i64 = 999_999;

/// What the transform makes of a flight.
#[derive(Debug, PartialEq)]
struct Shown {
    carrier: String,
    flight: i64,
    origin: String,
    dest: String,
    km: f64,
    delay_class: &'static str,
    dep_delay_minutes: f64,
}

pub async fn replay(api: &Api, day: &Day, board: &Board, minutes: i64) -> Result<()> {
    let mut next_stop = day.first_minute() + STOP_EVERY;
    let mut stops = 0;
    for (minute, statements) in day.minutes() {
        if minute >= next_stop {
            compare(api, board, minutes).await.map_err(|error| format!("at minute {minute} of the day: {error}"))?;
            stops += 1;
            next_stop += STOP_EVERY;
        }
        api.transaction(statements).await?;
    }
    compare(api, board, minutes).await.map_err(|error| format!("at the end of the day: {error}"))?;
    stops += 1;
    let (seen, expected) = (board.counts(), expected(day.flights(), minutes, stops));
    if seen == expected { Ok(()) } else { Err(format!("events differ: {seen} arrived; due were {expected}").into()) }
}

async fn compare(api: &Api, board: &Board, minutes: i64) -> Result<()> {
    // Later than any flight can be, so that the filter lets it through whatever MINUTES is.
    let marker = Statement {
        sql: "INSERT INTO flights (id, carrier, flight, origin, dest, sched_dep, dep_delay, distance, status) VALUES \
              ($1, '--', 0, 'JFK', 'JFK', '2013-03-09T05:00:00Z', $2, 0, 'marker')"
            .to_owned(),
        params: vec![json!(MARKER), json!(1e9)],
    };
    api.transaction(&[marker]).await?;
    board.wait_for("the marker's insert", |fold| fold.rows.contains_key(&MARKER)).await?;
    let due = select(api, minutes).await?;
    differences(&due, &board.fold().rows)?;
    api.sql(&format!("DELETE FROM flights WHERE id = {MARKER}"), Vec::new()).await?;
    board.wait_for("the marker's delete", |fold| !fold.rows.contains_key(&MARKER)).await
}

/// The rows of the live query by a plain SELECT, then filter and transform natively.
async fn select(api: &Api, minutes: i64) -> Result<BTreeMap<i64, Shown>> {
    let columns = "SELECT id, carrier, flight, origin, dest, distance, dep_delay";
    let rows = api.rows(&LIVE_SQL.replacen("SELECT *", columns, 1)).await?;
    let mut due = BTreeMap::new();
    for row in rows {
        let whole = |i: usize| row[i].as_i64().ok_or_else(|| format!("column {} of {row:?} is no integer", i + 1));
        let text = |i: usize| row[i].as_str().unwrap_or_default().to_owned();
        let Some(delay) = row[6].as_f64().filter(|&delay| delay >= minutes as f64) else { continue };
        due.insert(
            whole(0)?,
            Shown {
                carrier: text(1),
                flight: whole(2)?,
                origin: text(3),
                dest: text(4),
                km: kilometres(whole(5)?),
                delay_class: delay_class(delay),
                dep_delay_minutes: delay,
            },
        );
    }
    Ok(due)
}

fn kilometres(miles: i64) -> f64 {
    (miles as f64 * 1.609344 * 10.0).round() / 10.0
}

fn delay_class(minutes: f64) -> &'static str {
    match minutes {
        ..15.0 => "on time",
        ..60.0 => "late",
        _ => "very late",
    }
}

fn differences(due: &BTreeMap<i64, Shown>, seen: &BTreeMap<i64, Value>) -> Result<()> {
    let mut wrong: Vec<String> = due
        .iter()
        .filter_map(|(key, due)| match seen.get(key) {
            None => Some(format!("{key} is missing: {due:?}")),
            Some(row) if !same(due, row) => Some(format!("{key} is {row}, due is {due:?}")),
            Some(_) => None,
        })
        .collect();
    wrong.extend(
        seen.iter().filter(|(key, _)| !due.contains_key(key)).map(|(key, row)| format!("{key} is extra: {row}")),
    );
    if wrong.is_empty() {
        return Ok(());
    }
    let some = wrong.iter().take(10).map(String::as_str).collect::<Vec<_>>().join("\n  ");
    Err(format!("{} rows differ between events and table:\n  {some}", wrong.len()).into())
}

fn same(due: &Shown, row: &Value) -> bool {
    let near = |field: &str, value: f64| row[field].as_f64().is_some_and(|seen| (seen - value).abs() < 1e-6);
    row.as_object().is_some_and(|columns| columns.len() == 7)
        && row["carrier"] == due.carrier
        && row["flight"] == due.flight
        && row["origin"] == due.origin
        && row["dest"] == due.dest
        && row["delay_class"] == due.delay_class
        && near("km", due.km)
        && near("dep_delay_minutes", due.dep_delay_minutes)
}

/// How many events of which kind the day makes, from the record alone. Every stop adds the marker's two.
fn expected(flights: &[Flight], minutes: i64, stops: usize) -> Counts {
    let mut counts = Counts { insert: stops, deleted: stops, ..Counts::default() };
    for flight in flights.iter().filter(|flight| flight.origin == "JFK") {
        let shown = posted_delays(flight).iter().filter(|&&delay| delay >= minutes as f64).count();
        if shown > 0 {
            counts.insert += 1;
            counts.update += shown - 1;
            counts.moved_out += usize::from(flight.air_time.is_some());
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown() -> Shown {
        Shown {
            carrier: "UA".to_owned(),
            flight: 1545,
            origin: "JFK".to_owned(),
            dest: "IAH".to_owned(),
            km: kilometres(1400),
            delay_class: "late",
            dep_delay_minutes: 17.0,
        }
    }

    #[test]
    fn a_missing_an_extra_and_a_different_row_are_found() {
        let row = json!({"carrier": "UA", "flight": 1545, "origin": "JFK", "dest": "IAH", "km": 2253.1,
                         "delay_class": "late", "dep_delay_minutes": 17});
        let due = BTreeMap::from([(1, shown())]);
        let seen = |key: i64, row: &Value| BTreeMap::from([(key, row.clone())]);
        assert!(differences(&due, &seen(1, &row)).is_ok());
        assert!(differences(&due, &BTreeMap::new()).is_err());
        assert!(differences(&BTreeMap::new(), &seen(1, &row)).is_err());
        let mut other = row;
        other["km"] = json!(1400.0);
        assert!(differences(&due, &seen(1, &other)).is_err());
    }

    #[test]
    fn the_day_has_plenty_of_late_departures() {
        let counts = expected(Day::from_slice().unwrap().flights(), 15, 0);
        assert_eq!((counts.insert, counts.moved_out), (188, 188));
        assert!(counts.update > 300);
    }
}
