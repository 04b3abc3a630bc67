//! The subscriber: reads the event stream, folds it by key, prints a line an event, and notices what must not be.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use reqwest::Response;
use serde_json::Value;
use sse_stream::{Sse, SseByteStream};
use tokio::sync::watch;

use crate::Result;
use crate::api::Api;

/// How long the next expected event may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A handle on the fold, which a task of its own keeps up to date.
pub struct Board {
    fold: Arc<Mutex<Fold>>,
    /// Ticks after every event, and once at the end.
    changed: watch::Receiver<u64>,
}

/// The present rows, as the events tell them.
#[derive(Default)]
pub struct Fold {
    /// Key id → row.
    pub rows: BTreeMap<i64, Value>,
    pub counts: Counts,
    /// An event that cannot follow what came before, or the stream's end.
    pub fault: Option<String>,
    up_to_date: bool,
    airlines: HashMap<String, String>,
    print: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Counts {
    pub insert: usize,
    pub update: usize,
    pub moved_out: usize,
    pub deleted: usize,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { insert, update, moved_out, deleted } = self;
        write!(f, "{insert} inserts, {update} updates, {moved_out} moved out, {deleted} deleted")
    }
}

impl Board {
    /// Subscribes and returns once the snapshot is complete.
    pub async fn open(
        api: &Api,
        sql: &str,
        pipeline: &[String],
        airlines: HashMap<String, String>,
        print: bool,
    ) -> Result<Self> {
        let response = api.live(sql, pipeline).await?;
        let fold = Arc::new(Mutex::new(Fold { airlines, print, ..Fold::default() }));
        let (tick, changed) = watch::channel(0);
        tokio::spawn(follow(response, Arc::clone(&fold), tick));
        let board = Board { fold, changed };
        board.wait_for("the end of the snapshot", |fold| fold.up_to_date).await?;
        Ok(board)
    }

    /// Waits until the fold satisfies `reached`; a fault or too long a wait is an error.
    pub async fn wait_for(&self, what: &str, reached: impl Fn(&Fold) -> bool) -> Result<()> {
        let mut changed = self.changed.clone();
        loop {
            {
                let fold = self.fold();
                if reached(&fold) {
                    return Ok(());
                }
                if let Some(fault) = &fold.fault {
                    return Err(format!("waiting for {what}: {fault}").into());
                }
            }
            tokio::time::timeout(PATIENCE, changed.changed())
                .await
                .map_err(|_| format!("{what} did not come within {} seconds", PATIENCE.as_secs()))?
                .map_err(|_| "the task that reads the events is gone")?;
        }
    }

    /// Waits until the stream ends, however long that takes; says why.
    pub async fn ended(&self) -> String {
        let mut changed = self.changed.clone();
        loop {
            if let Some(fault) = &self.fold().fault {
                return fault.clone();
            }
            if changed.changed().await.is_err() {
                return "the task that reads the events is gone".to_owned();
            }
        }
    }

    pub fn fold(&self) -> MutexGuard<'_, Fold> {
        self.fold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn counts(&self) -> Counts {
        self.fold().counts
    }
}

async fn follow(response: Response, fold: Arc<Mutex<Fold>>, tick: watch::Sender<u64>) {
    let mut events = SseByteStream::new(response.bytes_stream());
    loop {
        let outcome = match events.next().await {
            Some(Ok(event)) => fold.lock().unwrap_or_else(PoisonError::into_inner).apply(&event),
            Some(Err(error)) => Err(format!("the event stream broke: {error}").into()),
            None => Err("the server ended the event stream".into()),
        };
        let fault = outcome.err().map(|error| error.to_string());
        let stop = fault.is_some();
        if stop {
            fold.lock().unwrap_or_else(PoisonError::into_inner).fault = fault;
        }
        tick.send_modify(|n| *n += 1);
        if stop {
            return;
        }
    }
}

impl Fold {
    fn apply(&mut self, event: &Sse) -> Result<()> {
        let Some(name) = event.event.as_deref() else { return Ok(()) };
        let data: Value = serde_json::from_str(event.data.as_deref().unwrap_or("null"))?;
        match name {
            "insert" => self.insert(&data),
            "update" => self.update(&data),
            "delete" => self.delete(&data),
            "uptodate" => {
                self.up_to_date = true;
                Ok(())
            }
            // A snapshot follows: what is held is void.
            "start" | "resync" => {
                self.rows.clear();
                if self.print && name == "resync" {
                    println!("resync  ({}): the present rows again", text(&data, "reason"));
                }
                Ok(())
            }
            // Whoever watches may be trying a plugin out: the stream goes on with the next version.
            "plugin-error" if self.print => {
                println!("plugin-error  {}; upload a mended version", data["detail"]);
                Ok(())
            }
            "plugin-error" | "failed" | "closed" => Err(format!("the stream said {name}: {data}").into()),
            _ => Ok(()),
        }
    }

    fn insert(&mut self, data: &Value) -> Result<()> {
        let (key, row) = (key(data)?, data["row"].clone());
        self.counts.insert += 1;
        self.say("insert", &row, &minutes(&row), text(&row, "delay_class"));
        match self.rows.insert(key, row) {
            None => Ok(()),
            Some(_) => Err(format!("an insert of key {key}, which is there already: {data}").into()),
        }
    }

    fn update(&mut self, data: &Value) -> Result<()> {
        let (key, row) = (key(data)?, data["row"].clone());
        self.counts.update += 1;
        let before = data["old"].get("dep_delay_minutes").map(|_| minutes(&data["old"]));
        let delay = before.map_or_else(|| minutes(&row), |before| format!("{before} → {}", minutes(&row)));
        self.say("update", &row, &delay, text(&row, "delay_class"));
        match self.rows.insert(key, row) {
            Some(_) => Ok(()),
            None => Err(format!("an update of key {key}, which is not there: {data}").into()),
        }
    }

    fn delete(&mut self, data: &Value) -> Result<()> {
        let key = key(data)?;
        let reason = text(data, "reason");
        match reason {
            "moved_out" => self.counts.moved_out += 1,
            _ => self.counts.deleted += 1,
        }
        match self.rows.remove(&key) {
            Some(row) => {
                self.say("delete", &row, "", reason);
                Ok(())
            }
            None => Err(format!("a delete of key {key}, which is not there: {data}").into()),
        }
    }

    fn say(&self, event: &str, row: &Value, delay: &str, class: &str) {
        if !self.print {
            return;
        }
        let carrier = text(row, "carrier");
        println!(
            "{event:<6}  {carrier:>2} {:<5} {} → {}  {:>7.1} km  {delay:>17}  {class:<10}  {}",
            row["flight"].to_string(),
            text(row, "origin"),
            text(row, "dest"),
            row["km"].as_f64().unwrap_or(0.0),
            self.airlines.get(carrier).map_or("", String::as_str),
        );
    }
}

fn key(data: &Value) -> Result<i64> {
    data["key"]["id"].as_i64().ok_or_else(|| format!("an event without the key's id: {data}").into())
}

fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object[field].as_str().unwrap_or("?")
}

fn minutes(row: &Value) -> String {
    row["dep_delay_minutes"].as_f64().map_or_else(|| "?".to_owned(), |minutes| format!("{minutes:.0} min"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, data: &str) -> Sse {
        Sse::default().event(name).data(data)
    }

    #[test]
    fn events_fold_and_faults_are_seen() {
        let mut fold = Fold::default();
        fold.apply(&event("insert", r#"{"key":{"id":7},"row":{"km":1.0}}"#)).unwrap();
        fold.apply(&event("update", r#"{"key":{"id":7},"row":{"km":2.0},"old":{"km":1.0}}"#)).unwrap();
        assert_eq!(fold.rows[&7]["km"], 2.0);
        assert!(fold.apply(&event("insert", r#"{"key":{"id":7},"row":{}}"#)).is_err());
        fold.apply(&event("delete", r#"{"key":{"id":7},"reason":"moved_out"}"#)).unwrap();
        assert!(fold.apply(&event("delete", r#"{"key":{"id":7},"reason":"moved_out"}"#)).is_err());
        assert!(fold.apply(&event("update", r#"{"key":{"id":7},"row":{}}"#)).is_err());
        assert!(fold.apply(&event("plugin-error", "{}")).is_err());
    }
}
