//! One subscriber under the oracle: what it asked for, what the answers should be, and what it saw.

use std::collections::VecDeque;
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;
use serde_json::Value;
use tests::fold::{State, canonical};
use tests::{Client, Event, Fold, Live, LiveQuery};

use super::random::Table;

type Filter = Box<dyn Fn(&Value) -> bool + Send + Sync>;
type Transform = Box<dyn Fn(&Value) -> Value + Send + Sync>;

/// A live query, and the same natively.
pub struct Query {
    sql: String,
    stages: Vec<String>,
    filter: Option<Filter>,
    transform: Option<Transform>,
    /// Of a query that is run again as a whole: the columns that tell its rows apart.
    key: Option<Vec<String>>,
    /// How old values are asked for.
    old: &'static str,
}

impl Query {
    pub fn plain(sql: String) -> Self {
        Query { sql, stages: Vec::new(), filter: None, transform: None, key: None, old: "changed" }
    }

    /// Any SELECT, which is run again as a whole: its key is among its columns.
    pub fn whole(sql: String, key: Vec<String>) -> Self {
        Query { key: Some(key), ..Query::plain(sql) }
    }

    pub fn old(mut self, old: &'static str) -> Self {
        self.old = old;
        self
    }

    /// What is asked of the server.
    fn subscription(&self) -> LiveQuery {
        let query = LiveQuery::new(&self.sql).option("old", self.old);
        self.stages.iter().fold(query, |query, stage| query.plugin(stage))
    }

    pub fn filtered(mut self, stage: &str, filter: Filter) -> Self {
        self.stages.push(stage.to_owned());
        self.filter = Some(filter);
        self
    }

    pub fn transformed(mut self, stage: &str, transform: Transform) -> Self {
        self.stages.push(stage.to_owned());
        self.transform = Some(transform);
        self
    }

    pub fn text(&self) -> String {
        format!("{} {}", self.sql, self.stages.join(" "))
    }

    /// `pipeline(SELECT)` now, by key.
    async fn answer(&self, db: &Client, table: &Table) -> State {
        if let Some(key) = &self.key {
            let by_key = |row: Value| (canonical(key.iter().map(|name| (name.as_str(), &row[name]))), row);
            let rows = db.objects(&self.sql).await;
            let count = rows.len();
            let state: State = rows.into_iter().map(by_key).collect();
            assert_eq!(state.len(), count, "two rows with one key");
            // The key is that of the query's own row.
            return state.into_iter().filter_map(|(key, row)| Some((key, self.piped(row)?))).collect();
        }
        // The key is read beside the query's own columns, under names that no table has.
        let keys: Vec<String> = table.key().enumerate().map(|(i, name)| format!("{name} AS key_{i}")).collect();
        let columns = self.sql.strip_prefix("SELECT ").expect("a SELECT");
        let rows = db.objects(&format!("SELECT {}, {columns}", keys.join(", "))).await;
        let mut state = State::new();
        for mut row in rows {
            let object = row.as_object_mut().expect("rows are objects");
            let values: Vec<Value> =
                (0..keys.len()).map(|i| object.shift_remove(&format!("key_{i}")).expect("its key")).collect();
            let key = canonical(table.key().zip(&values));
            if let Some(row) = self.piped(row) {
                assert!(state.insert(key, row).is_none(), "two rows with one key");
            }
        }
        state
    }

    /// What the pipeline makes of a row, natively.
    fn piped(&self, row: Value) -> Option<Value> {
        if self.filter.as_ref().is_some_and(|filter| !filter(&row)) {
            return None;
        }
        Some(self.transform.as_ref().map_or_else(|| row.clone(), |transform| transform(&row)))
    }
}

/// What happened to a subscriber, in order.
#[derive(Clone, Debug)]
pub enum Item {
    /// A transaction was acknowledged with this seq; the query's answer since then.
    Committed(u64, State),
    /// Connected without a position: a snapshot follows.
    Subscribed,
    Event(Event),
    /// The connection is gone; events of a commit that has not ended are void.
    Lost,
}

/// Follows events and answers and complains at the first that does not fit.
#[derive(Clone, Default)]
pub struct Checker {
    fold: Fold,
    /// The fold at the last id.
    settled: State,
    /// The fold at that position, numbers as they were written: what a client that lost its connection holds.
    held: State,
    /// Answers after that with their seqs, each different from the one before.
    due: VecDeque<(u64, State)>,
    /// The latest answer.
    latest: State,
    /// Whether there is a position: before the first, a snapshot is being read.
    positioned: bool,
    pub ids: usize,
    rules: Rules,
}

/// What differs from query to query.
#[derive(Clone, Copy, Default)]
pub struct Rules {
    /// Several commits may come as one event, and a stream may start afresh: the query is run again as a whole.
    pub coalesced: bool,
    /// Rows are of a stream table: each says when it stops showing.
    pub expiring: bool,
}

impl Checker {
    pub fn apply(&mut self, item: &Item) -> Result<(), String> {
        match item {
            Item::Committed(seq, state) => {
                if *state != self.latest {
                    self.latest = state.clone();
                    self.due.push_back((*seq, state.clone()));
                }
                Ok(())
            }
            Item::Subscribed => {
                // The snapshot is of now; what was due before it is not seen step by step.
                self.positioned = false;
                self.settled = self.latest.clone();
                self.due.clear();
                Ok(())
            }
            Item::Lost => {
                self.fold.rows = if self.positioned { self.held.clone() } else { State::new() };
                Ok(())
            }
            Item::Event(event) => {
                let row = matches!(event.name.as_str(), "insert" | "update");
                if self.rules.expiring && row && event.data.get("expires").is_none() {
                    return Err(format!("a row of a stream table that does not say when it expires: {event:?}"));
                }
                self.fold.apply(event)?;
                match (&event.id, event.name.as_str()) {
                    (Some(_), "uptodate") => self.up_to_date(event),
                    (Some(_), _) => self.commit(event),
                    // What was due stays due: the rows that follow are of some commit from now on.
                    (None, "resync") if self.rules.coalesced && event.data["reason"] == "requery" => {
                        self.positioned = false;
                        Ok(())
                    }
                    (None, "resync" | "failed" | "plugin-error" | "closed") => Err(format!("not due here: {event:?}")),
                    (None, _) => Ok(()),
                }
            }
        }
    }

    /// A commit's last event: the fold is the next answer, no earlier and no later one.
    fn commit(&mut self, event: &Event) -> Result<(), String> {
        self.ids += 1;
        let rows = normal(&self.fold.rows);
        if self.rules.coalesced {
            return self.commits(event, rows);
        }
        if !self.positioned {
            // The first commit after a snapshot. The snapshot itself may be newer than the answer at its request.
            let skipped = self.due.iter().position(|(_, due)| *due == rows).unwrap_or(0);
            self.due.drain(..skipped);
            self.positioned = true;
        }
        let (_, due) =
            self.due.pop_front().ok_or_else(|| format!("an event of a commit that was not made: {event:?}"))?;
        if rows != due {
            return Err(format!("at {event:?}\nthe fold is {rows:?}\nthe SELECT was {due:?}"));
        }
        self.settled = due;
        self.held = self.fold.rows.clone();
        Ok(())
    }

    /// The last event of a result: the fold is the answer at its place, and another one than before.
    fn commits(&mut self, event: &Event, rows: State) -> Result<(), String> {
        let id = event.id.as_deref().unwrap_or_default();
        let place: u64 =
            id.split('-').nth(1).and_then(|seq| seq.parse().ok()).ok_or_else(|| format!("no place in {id}"))?;
        let due =
            self.answer_at(place).ok_or_else(|| format!("an event of commits that changed nothing: {event:?}"))?;
        if rows != due {
            return Err(format!("at {event:?}\nthe fold is {rows:?}\nthe SELECT was {due:?}"));
        }
        self.settled = due;
        self.positioned = true;
        self.held = self.fold.rows.clone();
        Ok(())
    }

    /// What was due up to `place`: the last of it.
    fn answer_at(&mut self, place: u64) -> Option<State> {
        let mut last = None;
        while self.due.front().is_some_and(|(due, _)| *due <= place) {
            last = self.due.pop_front().map(|(_, state)| state);
        }
        last
    }

    /// A sign of life: every commit up to its seq has passed. Only the one that ends a snapshot may bring something.
    fn up_to_date(&mut self, event: &Event) -> Result<(), String> {
        let seq = event.data["seq"].as_u64().ok_or_else(|| format!("no seq in {event:?}"))?;
        if self.rules.coalesced
            && let Some(state) = self.answer_at(seq)
        {
            // There and back again is no change.
            if self.positioned && state != self.settled {
                return Err(format!("{event:?} passed commits that had to bring {state:?}"));
            }
            self.settled = state;
        }
        while self.due.front().is_some_and(|(due, _)| *due <= seq) {
            let (due, state) = self.due.pop_front().expect("there is one");
            if self.positioned {
                return Err(format!("{event:?} passed the commit {due}, which had to bring {state:?}"));
            }
            self.settled = state;
        }
        self.positioned = true;
        let rows = normal(&self.fold.rows);
        if rows == self.settled {
            self.held = self.fold.rows.clone();
            return Ok(());
        }
        Err(format!("at {event:?}\nthe fold is {rows:?}\nthe SELECT was {:?}", self.settled))
    }

    pub fn caught_up(&self) -> bool {
        self.positioned && self.due.is_empty()
    }
}

/// The same rows with every number as a float: natively computed ones need not be written as the server writes them.
fn normal(state: &State) -> State {
    fn floats(value: &Value) -> Value {
        match value {
            // Kept apart from 0.0, which it equals as a number: SQL shows which of them is stored.
            Value::Number(number) if number.as_f64().is_some_and(|v| v == 0.0 && v.is_sign_negative()) => "-0.0".into(),
            Value::Number(number) => number.as_f64().map_or_else(|| value.clone(), Value::from),
            Value::Array(values) => values.iter().map(floats).collect(),
            Value::Object(object) => object.iter().map(|(name, value)| (name.clone(), floats(value))).collect(),
            _ => value.clone(),
        }
    }
    state.iter().map(|(key, row)| (key.clone(), floats(row))).collect()
}

/// Runs a recorded history through a fresh checker. All that is due has to have arrived at its end.
pub fn replay(history: &[Item], rules: Rules) -> Result<(), String> {
    let mut checker = Checker { rules, ..Checker::default() };
    for item in history {
        checker.apply(item)?;
    }
    if checker.caught_up() { Ok(()) } else { Err(format!("{} commits are missing", checker.due.len())) }
}

/// A subscriber that reads when it likes.
pub struct Follower {
    query: Query,
    db: Client,
    table: Table,
    live: Option<Live>,
    checker: Checker,
    history: Vec<Item>,
    losses: usize,
}

impl Follower {
    pub fn new(query: Query, db: Client, table: &Table) -> Self {
        let rules = Rules { coalesced: query.key.is_some(), expiring: table.stream };
        Follower {
            checker: Checker { rules, ..Checker::default() },
            query,
            db,
            table: table.clone(),
            live: None,
            history: Vec::new(),
            losses: 0,
        }
    }

    pub fn history(&self) -> &[Item] {
        &self.history
    }

    pub fn rules(&self) -> Rules {
        self.checker.rules
    }

    pub fn summary(&self) -> String {
        format!("{} ids over {} connections: {}", self.checker.ids, self.losses + 1, self.query.text())
    }

    /// Notes what the query answers now.
    pub async fn committed(&mut self, seq: u64) {
        let state = self.query.answer(&self.db, &self.table).await;
        self.note(Item::Committed(seq, normal(&state)));
    }

    /// Does one of the things a subscriber does: subscribe, read on, break off, come back.
    pub async fn move_on(&mut self, random: &mut StdRng) {
        match random.random_range(0..10) {
            0 => self.lost(),
            1..=4 => {
                self.connect().await;
                self.catch_up().await;
            }
            // Something, not all: so that a break finds it in the middle.
            5..=7 if self.live.is_some() => {
                for _ in 0..random.random_range(0..6) {
                    self.read(Duration::from_millis(1)).await;
                }
            }
            _ => {}
        }
    }

    pub fn lost(&mut self) {
        if let Some(live) = &mut self.live
            && live.connected()
        {
            live.disconnect();
            self.losses += 1;
            self.note(Item::Lost);
        }
    }

    /// Everything that is due arrives, and nothing more does.
    pub async fn finish(&mut self) {
        self.connect().await;
        self.catch_up().await;
        // A fresh connection says what there is behind its position: nothing.
        self.lost();
        self.connect().await;
        loop {
            if self.read(tests::PATIENCE).await.is_some_and(|event| event.name == "uptodate") {
                break;
            }
        }
        assert!(self.checker.caught_up());
    }

    async fn connect(&mut self) {
        match &mut self.live {
            Some(live) if live.connected() => {}
            Some(live) => {
                // The events are folded by the checker here; the subscription only has to know where to resume.
                live.fold.last_id = self.checker.fold.last_id.clone();
                let fresh = live.fold.last_id.is_none();
                live.reconnect().await;
                if fresh {
                    self.note(Item::Subscribed);
                }
            }
            None => {
                self.live = Some(self.db.live(self.query.subscription()).await);
                self.note(Item::Subscribed);
            }
        }
    }

    /// Reads until nothing is due. That something does not come shows at the next `uptodate`.
    async fn catch_up(&mut self) {
        while !self.checker.caught_up() {
            self.read(tests::PATIENCE).await;
        }
    }

    /// Reads one event, if one comes in time.
    async fn read(&mut self, patience: Duration) -> Option<Event> {
        let live = self.live.as_mut()?;
        if !live.connected() {
            return None;
        }
        match live.read(patience).await {
            None => {
                assert!(patience < tests::PATIENCE, "no event within {patience:?} on {}", self.query.text());
                None
            }
            Some(None) => panic!("the stream of {} ended", self.query.text()),
            Some(Some(event)) => {
                self.note(Item::Event(event.clone()));
                Some(event)
            }
        }
    }

    fn note(&mut self, item: Item) {
        self.history.push(item.clone());
        if let Err(fault) = self.checker.apply(&item) {
            let from = self.history.len().saturating_sub(12);
            panic!("{fault}\non {}\nlast: {:#?}", self.query.text(), &self.history[from..]);
        }
    }
}

#[cfg(test)]
mod checker {
    use serde_json::json;

    use super::*;

    const COALESCED: Rules = Rules { coalesced: true, expiring: false };

    fn event(name: &str, id: Option<&str>, key: i64) -> Item {
        // For an `uptodate`, `key` is the seq.
        let data = json!({"key": {"k": key}, "row": {"k": key}, "reason": "moved_out", "from": "snapshot", "seq": key});
        Item::Event(Event { name: name.to_owned(), id: id.map(str::to_owned), data })
    }

    fn committed(seq: u64, keys: &[i64]) -> Item {
        let state = keys.iter().map(|key| (format!("{{\"k\":{key}}}"), json!({"k": key}))).collect();
        Item::Committed(seq, normal(&state))
    }

    fn right() -> Vec<Item> {
        vec![
            committed(1, &[1]),
            Item::Subscribed,
            event("start", None, 0),
            event("insert", None, 1),
            event("uptodate", Some("a"), 1),
            committed(2, &[1, 2, 3]),
            event("insert", None, 2),
            Item::Lost,
            event("insert", None, 2),
            event("insert", Some("b"), 3),
            committed(3, &[1, 2, 3]),
            event("uptodate", Some("c"), 3),
            committed(4, &[2, 3]),
            event("delete", Some("d"), 1),
        ]
    }

    #[test]
    fn the_checker_takes_what_is_right_and_nothing_else() {
        replay(&right(), Rules::default()).unwrap();
        for leave_out in [3, 6, 8, 9, 13] {
            let mut wrong = right();
            wrong.remove(leave_out);
            // Left out before the loss it does not matter: it came again.
            assert_eq!(replay(&wrong, Rules::default()).is_err(), leave_out != 6, "without {leave_out}");
        }
        let mut early = right();
        early.swap(12, 13);
        assert!(replay(&early, Rules::default()).is_err());
        let mut doubled = right();
        doubled.push(doubled[13].clone());
        assert!(replay(&doubled, Rules::default()).is_err());
        let mut passed = right();
        passed[13] = event("uptodate", Some("e"), 4);
        assert!(replay(&passed, Rules::default()).is_err());
    }

    /// One result for several commits; a fresh start in between.
    fn coalesced() -> Vec<Item> {
        vec![
            committed(1, &[1]),
            Item::Subscribed,
            event("start", None, 0),
            event("insert", None, 1),
            event("uptodate", Some("e-1-f"), 1),
            committed(2, &[1, 2]),
            committed(3, &[1, 2, 3]),
            event("insert", None, 2),
            event("insert", Some("e-3-f"), 3),
            committed(4, &[3]),
            committed(5, &[1, 2, 3]),
            event("uptodate", Some("e-5-f"), 5),
            committed(6, &[2]),
            Item::Lost,
            event("start", None, 0),
            Item::Event(Event { name: "resync".to_owned(), id: None, data: json!({"reason": "requery"}) }),
            event("insert", None, 2),
            event("uptodate", Some("e-6-f"), 6),
        ]
    }

    #[test]
    fn coalesced_results_have_to_be_those_of_their_place() {
        replay(&coalesced(), COALESCED).unwrap();
        assert!(replay(&coalesced(), Rules::default()).is_err());
        for leave_out in [3, 7, 8, 16] {
            let mut wrong = coalesced();
            wrong.remove(leave_out);
            assert!(replay(&wrong, COALESCED).is_err(), "without {leave_out}");
        }
        for (at, instead) in [
            // The place says that the second commit is not in it.
            (8, event("insert", Some("e-2-f"), 3)),
            // Further than what has come.
            (8, event("uptodate", Some("e-3-f"), 3)),
        ] {
            let mut wrong = coalesced();
            wrong[at] = instead;
            assert!(replay(&wrong, COALESCED).is_err(), "another {at}");
        }
    }
}
