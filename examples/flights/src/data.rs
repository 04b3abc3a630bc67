//! The committed slice of real data (see `data/SOURCE.md`) and its way into the tables.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::Result;
use crate::api::{Api, Statement};

/// Ids of the replayed day start above this; the week before lies below.
pub const DAY_BASE: i64 = 100_000;

const DAY: &str = include_str!("../data/day.csv");
const WEEK: &str = include_str!("../data/week.csv");
const AIRLINES: &str = include_str!("../data/airlines.csv");
const AIRPORTS: &str = include_str!("../data/airports.csv");

const CREATE: [&str; 3] = [
    "CREATE TABLE IF NOT EXISTS airlines (carrier TEXT PRIMARY KEY, name TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS airports (faa TEXT PRIMARY KEY, name TEXT NOT NULL, lat DOUBLE, lon DOUBLE, alt INT, \
     tz INT, dst TEXT, tzone TEXT)",
    "CREATE TABLE IF NOT EXISTS flights (id BIGINT PRIMARY KEY, carrier TEXT NOT NULL, flight INT, tailnum TEXT, \
     origin TEXT, dest TEXT, sched_dep TIMESTAMP, dep_delay DOUBLE, arr_delay DOUBLE, air_time DOUBLE, distance INT, \
     status TEXT)",
];

/// Parameters a request may have; the server's limit is 1,000.
const MAX_PARAMS: usize = 960;

/// One row of `week.csv` or `day.csv`.
#[derive(Clone, Debug)]
pub struct Flight {
    pub id: i64,
    pub carrier: String,
    pub flight: i64,
    pub tailnum: Option<String>,
    pub origin: String,
    pub dest: String,
    /// UTC, to the minute: `2013-03-08T10:00Z`.
    pub sched_dep: String,
    /// Minutes; `None`: cancelled.
    pub dep_delay: Option<f64>,
    pub arr_delay: Option<f64>,
    pub air_time: Option<f64>,
    /// Miles.
    pub distance: i64,
}

pub fn day() -> Result<Vec<Flight>> {
    flights(DAY)
}

/// Makes the tables and fills them where they are not full yet, so that a second run starts at once; takes away the
/// replayed day of an earlier run. Returns the airlines' names.
pub async fn load(api: &Api) -> Result<HashMap<String, String>> {
    for statement in CREATE {
        api.sql(statement, Vec::new()).await?;
    }
    let airlines = records(AIRLINES)?;
    let names = airlines.iter().map(|row| (row[0].to_owned(), row[1].to_owned())).collect();
    fill(api, "airlines", "", airlines.iter().map(|row| row.iter().map(|cell| json!(cell)).collect()).collect())
        .await?;
    fill(api, "airports", "", records(AIRPORTS)?.iter().map(|row| airport(row)).collect::<Result<_>>()?).await?;
    let week = flights(WEEK)?.iter().map(|flight| flight.values(flight.final_status(), true)).collect();
    fill(api, "flights", &format!(" WHERE id <= {DAY_BASE}"), week).await?;
    api.sql(&format!("DELETE FROM flights WHERE id > {DAY_BASE}"), Vec::new()).await?;
    Ok(names)
}

/// Loads `rows` into `table` unless they are there. A load that was interrupted is started anew.
async fn fill(api: &Api, table: &str, filter: &str, rows: Vec<Vec<Value>>) -> Result<()> {
    let present = api.count(&format!("SELECT count(*) FROM {table}{filter}")).await?;
    if present == rows.len() as i64 {
        println!("table    {table}: {present} rows are there");
        return Ok(());
    }
    if present > 0 {
        api.sql(&format!("DELETE FROM {table}{filter}"), Vec::new()).await?;
    }
    let width = rows.first().map_or(1, Vec::len);
    for rows in rows.chunks(MAX_PARAMS / width) {
        let statement = insert(table, "", rows);
        api.sql(&statement.sql, statement.params).await?;
    }
    println!("table    {table}: {} rows loaded", rows.len());
    Ok(())
}

/// `INSERT INTO table columns VALUES ($1, …), …`
pub fn insert(table: &str, columns: &str, rows: &[Vec<Value>]) -> Statement {
    let mut number = 0;
    let tuples: Vec<String> = rows
        .iter()
        .map(|row| {
            let places: Vec<String> = row.iter().zip(number + 1..).map(|(_, n)| format!("${n}")).collect();
            number += row.len();
            format!("({})", places.join(", "))
        })
        .collect();
    Statement {
        sql: format!("INSERT INTO {table}{columns} VALUES {}", tuples.join(", ")),
        params: rows.iter().flatten().cloned().collect(),
    }
}

impl Flight {
    fn final_status(&self) -> &'static str {
        match (self.dep_delay, self.air_time) {
            (None, _) => "cancelled",
            (_, None) => "diverted",
            _ => "arrived",
        }
    }

    /// The row of the table; before the flight nothing is known of how it went.
    pub fn values(&self, status: &str, flown: bool) -> Vec<Value> {
        let known = |value: Option<f64>| if flown { json!(value) } else { Value::Null };
        vec![
            json!(self.id),
            json!(self.carrier),
            json!(self.flight),
            json!(self.tailnum),
            json!(self.origin),
            json!(self.dest),
            json!(self.sched_dep.replace('Z', ":00Z")),
            known(self.dep_delay),
            known(self.arr_delay),
            known(self.air_time),
            json!(self.distance),
            json!(status),
        ]
    }
}

fn flights(csv: &str) -> Result<Vec<Flight>> {
    records(csv)?
        .into_iter()
        .map(|row| {
            Ok(Flight {
                id: row[0].parse()?,
                carrier: row[1].to_owned(),
                flight: row[2].parse()?,
                tailnum: Some(row[3].to_owned()).filter(|tailnum| !tailnum.is_empty()),
                origin: row[4].to_owned(),
                dest: row[5].to_owned(),
                sched_dep: row[6].to_owned(),
                dep_delay: number(row[7])?,
                arr_delay: number(row[8])?,
                air_time: number(row[9])?,
                distance: row[10].parse()?,
            })
        })
        .collect()
}

fn airport(row: &[&str]) -> Result<Vec<Value>> {
    let text = |i: usize| if row[i].is_empty() { Value::Null } else { json!(row[i]) };
    let whole = |i: usize| number(row[i]).map(|value| json!(value.map(|value| value as i64)));
    Ok(vec![text(0), text(1), json!(number(row[2])?), json!(number(row[3])?), whole(4)?, whole(5)?, text(6), text(7)])
}

fn number(cell: &str) -> Result<Option<f64>> {
    if cell.is_empty() { Ok(None) } else { Ok(Some(cell.parse()?)) }
}

/// The rows of a committed file, without its header. The files have no quotes (a test says so), so a comma is a comma.
fn records(csv: &str) -> Result<Vec<Vec<&str>>> {
    let mut lines = csv.lines();
    let width = lines.next().map_or(0, |header| header.split(',').count());
    lines
        .map(|line| {
            let cells: Vec<&str> = line.split(',').collect();
            if cells.len() == width { Ok(cells) } else { Err(format!("not {width} cells: {line}").into()) }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slice_is_whole() {
        assert!([DAY, WEEK, AIRLINES, AIRPORTS].iter().all(|csv| !csv.contains('"')));
        let (week, day) = (flights(WEEK).unwrap(), flights(DAY).unwrap());
        assert_eq!((week.len(), day.len()), (6_099, 979));
        assert!(week.iter().all(|flight| flight.id <= DAY_BASE) && day.iter().all(|flight| flight.id > DAY_BASE));
        assert_eq!(day.iter().filter(|flight| flight.dep_delay.is_none()).count(), 180);
        assert_eq!((records(AIRLINES).unwrap().len(), records(AIRPORTS).unwrap().len()), (16, 1_458));
    }

    #[test]
    fn inserts_number_their_parameters_through() {
        let statement = insert("t", " (a, b)", &[vec![json!(1), json!("x")], vec![json!(2), Value::Null]]);
        assert_eq!(statement.sql, "INSERT INTO t (a, b) VALUES ($1, $2), ($3, $4)");
        assert_eq!(statement.params, [json!(1), json!("x"), json!(2), Value::Null]);
    }
}
