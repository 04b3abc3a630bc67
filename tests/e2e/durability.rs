//! Eight writers, four subscribers, and a server that is killed three times.
//!
//! Writers note every attempt before they send it and every acknowledgement with its seq; subscribers note every event
//! over all their connections. All of that lives in this process, which is never killed. At the end [`check`] compares
//! it with the table. The checker is tried too: on the same history with one thing wrong, it has to say so.
//! [`power_cut`](super::power_cut) does the same with a disk that loses what was not synced.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use tests::live::seq;
use tests::{Client, Live, Options, TestServer};
use tokio::sync::watch;

const WRITERS: i64 = 8;
const SUBSCRIBERS: usize = 4;
const KILLS: usize = 3;
/// Acknowledged writes between two kills.
const WRITES_PER_LIFE: usize = 80;
const PATIENCE: Duration = Duration::from_secs(60);

/// A writer and the number of its write.
type Write = (i64, i64);

/// One commit as a subscriber saw it.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    id: String,
    /// Writer, number, part; in the order of the events.
    rows: Vec<(i64, i64, i64)>,
    /// Whether all of it had been attempted when it arrived.
    attempted: bool,
}

/// What clients know of a server that dies again and again, and what its tables hold at the end.
#[derive(Clone, Default)]
pub(crate) struct History {
    attempts: BTreeSet<Write>,
    /// Write → seq of its acknowledgement, for each writer in order.
    acks: Vec<(Write, u64)>,
    streams: Vec<Vec<Seen>>,
    /// Writer, number, part of the rows in the table.
    table: BTreeSet<(i64, i64, i64)>,
    /// Writer → number of its last write, kept by the same transactions in another table.
    counters: BTreeMap<i64, i64>,
}

#[derive(Default)]
struct Log {
    attempts: BTreeSet<Write>,
    acks: Vec<(Write, u64)>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_nine_loses_nothing_and_invents_nothing() {
    // No seed here: what is random is when the server dies.
    for _ in tests::seeds(1) {
        kill_nine(Options::default(), KILLS).await;
    }
}

/// What the operating system has been given survives the death of a process, if not a power cut.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_nine_loses_nothing_that_waits_for_its_sync_either() {
    kill_nine(Options { config: "[storage]\ndurability = \"interval\"\n".to_owned(), ..Options::default() }, 1).await;
}

async fn kill_nine(options: Options, kills: usize) {
    let server = TestServer::with(options).await;
    prepare(&server).await;
    let history = lived(server, &vec![WRITES_PER_LIFE; kills], || {}).await;
    check(&history).unwrap();
    controls(&history);
}

/// The tables that are written to.
pub(crate) async fn prepare(server: &TestServer) {
    let db = server.admin();
    db.sql("CREATE TABLE log (id BIGINT PRIMARY KEY, writer INT, n INT, part INT)").await;
    db.sql("CREATE TABLE counters (writer INT PRIMARY KEY, n INT)").await;
    for writer in 0..WRITERS {
        db.sql(&format!("INSERT INTO counters VALUES ({writer}, 0)")).await;
    }
}

/// Lets writers and subscribers work on a server that is killed after so many acknowledged writes of each of its lives
/// but the last; `died` comes before it starts again.
pub(crate) async fn lived(mut server: TestServer, lives: &[usize], mut died: impl FnMut()) -> History {
    let db = server.admin();
    let log = Arc::new(Mutex::new(Log::default()));
    let (stop, stopped) = watch::channel(false);
    let (finish, finished) = watch::channel(u64::MAX);
    let mut subscribers = Vec::new();
    for _ in 0..SUBSCRIBERS {
        let mut live = db.live("SELECT writer, n, part FROM log").await;
        live.until_uptodate().await;
        subscribers.push(tokio::spawn(subscribe(live, Arc::clone(&log), finished.clone())));
    }
    let writers: Vec<_> =
        (0..WRITERS).map(|writer| tokio::spawn(write(db.clone(), writer, Arc::clone(&log), stopped.clone()))).collect();

    for writes in lives {
        until_acks(&log, *writes).await;
        server.kill9();
        died();
        server.restart().await;
    }
    until_acks(&log, WRITES_PER_LIFE).await;
    stop.send_replace(true);
    for writer in writers {
        writer.await.expect("a writer ends well");
    }

    let mut history = History::default();
    let rows = db.sql("SELECT writer, n, part FROM log").await;
    finish.send_replace(seq(&rows));
    for subscriber in subscribers {
        history.streams.push(subscriber.await.expect("a subscriber ends well"));
    }
    for row in rows["results"][0]["rows"].as_array().unwrap() {
        let part = |i: usize| row[i].as_i64().unwrap();
        history.table.insert((part(0), part(1), part(2)));
    }
    for row in db.rows("SELECT writer, n FROM counters").await.as_array().unwrap() {
        history.counters.insert(row[0].as_i64().unwrap(), row[1].as_i64().unwrap());
    }
    {
        let log = log.lock().unwrap();
        (history.attempts, history.acks) = (log.attempts.clone(), log.acks.clone());
    }
    eprintln!(
        "{} attempts, {} acknowledged, {} in the table",
        history.attempts.len(),
        history.acks.len(),
        history.table.len() / 2
    );
    history
}

/// Writes one transaction after the other until stopped: two rows and a counter, all or nothing.
async fn write(db: Client, writer: i64, log: Arc<Mutex<Log>>, stopped: watch::Receiver<bool>) {
    let mut n = 0;
    while !*stopped.borrow() {
        n += 1;
        let id = writer * 1_000_000 + n * 10;
        log.lock().unwrap().attempts.insert((writer, n));
        let sql =
            "INSERT INTO log VALUES ($1, $3, $4, 0), ($2, $3, $4, 1); UPDATE counters SET n = $4 WHERE writer = $3";
        match db.try_sql(sql, json!([id, id + 1, writer, n])).await {
            Ok(answer) => log.lock().unwrap().acks.push(((writer, n), seq(&answer))),
            // Killed in between: the outcome is unknown, and this number is never tried again.
            Err(failure) if failure.status.is_none_or(|status| status >= 500) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(failure) => panic!("writer {writer}: {failure:?}"),
        }
    }
}

/// Reads until everything up to the seq in `finished` has passed; reconnects as often as it has to.
async fn subscribe(mut live: Live, log: Arc<Mutex<Log>>, finished: watch::Receiver<u64>) -> Vec<Seen> {
    let (mut seen, mut open) = (Vec::new(), Vec::new());
    loop {
        if !live.connected() {
            // Half a commit can arrive before the connection breaks; after the reconnect it comes again, whole.
            open.clear();
            match live.try_reconnect().await {
                Ok(response) if response.status() == 200 => live.attach(response),
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
            continue;
        }
        let Some(event) = live.next_or_end().await else { continue };
        match event.name.as_str() {
            "insert" => {
                let part = |name: &str| event.data["row"][name].as_i64().unwrap();
                open.push((part("writer"), part("n"), part("part")));
            }
            "uptodate" => {
                if event.data["seq"].as_u64().is_some_and(|seq| seq >= *finished.borrow()) {
                    assert!(open.is_empty(), "a commit without an id: {open:?}");
                    assert_eq!(live.fold.resyncs, 0);
                    return seen;
                }
                continue;
            }
            "start" | "closed" => continue,
            _ => panic!("not expected here: {event:?}"),
        }
        if let Some(id) = event.id {
            let attempts = &log.lock().unwrap().attempts;
            let attempted = open.iter().all(|(writer, n, _)| attempts.contains(&(*writer, *n)));
            seen.push(Seen { id, rows: std::mem::take(&mut open), attempted });
        }
    }
}

async fn until_acks(log: &Mutex<Log>, more: usize) {
    let due = log.lock().unwrap().acks.len() + more;
    let reached = async {
        while log.lock().unwrap().acks.len() < due {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, reached).await.expect("the writers get on");
}

/// Compares all of it.
pub(crate) fn check(history: &History) -> Result<(), String> {
    let writes: BTreeSet<Write> = history.table.iter().map(|(writer, n, _)| (*writer, *n)).collect();
    for (write, _) in &history.acks {
        if !writes.contains(write) {
            return Err(format!("the acknowledged write {write:?} is lost"));
        }
    }
    for &(writer, n) in &writes {
        if !history.attempts.contains(&(writer, n)) {
            return Err(format!("nobody attempted ({writer}, {n})"));
        }
        if (0..2).any(|part| !history.table.contains(&(writer, n, part))) {
            return Err(format!("half of ({writer}, {n}) is there"));
        }
    }
    for (writer, counter) in &history.counters {
        let last = writes.iter().filter(|write| write.0 == *writer).map(|write| write.1).max().unwrap_or(0);
        if last != *counter {
            return Err(format!("writer {writer}: rows up to {last}, the counter of the same commits says {counter}"));
        }
    }
    check_seqs(&history.acks)?;
    for stream in &history.streams {
        check_stream(stream, &writes, &history.acks)?;
    }
    match history.streams.windows(2).find(|pair| pair[0] != pair[1]) {
        Some(_) => Err("two subscribers saw different histories".to_owned()),
        None => Ok(()),
    }
}

fn check_seqs(acks: &[(Write, u64)]) -> Result<(), String> {
    let mut last: BTreeMap<i64, u64> = BTreeMap::new();
    let mut all = BTreeSet::new();
    for ((writer, n), seq) in acks {
        if last.insert(*writer, *seq).is_some_and(|before| before >= *seq) || !all.insert(*seq) {
            return Err(format!("seq {seq} of ({writer}, {n}) does not rise, or was given twice"));
        }
    }
    Ok(())
}

fn check_stream(stream: &[Seen], writes: &BTreeSet<Write>, acks: &[(Write, u64)]) -> Result<(), String> {
    let seqs: BTreeMap<Write, u64> = acks.iter().copied().collect();
    let (mut ids, mut seen, mut last_seq) = (BTreeSet::new(), BTreeSet::new(), 0);
    for commit in stream {
        let &[(writer, n, 0), (same_writer, same_n, 1)] = commit.rows.as_slice() else {
            return Err(format!("not one whole write: {commit:?}"));
        };
        let write = (writer, n);
        if write != (same_writer, same_n) {
            return Err(format!("two writes under one id: {commit:?}"));
        }
        if !commit.attempted {
            return Err(format!("the event came before the write: {commit:?}"));
        }
        if !writes.contains(&write) {
            return Err(format!("an event of a write that is not there: {commit:?}"));
        }
        if !ids.insert(commit.id.as_str()) || !seen.insert(write) {
            return Err(format!("twice: {commit:?}"));
        }
        if let Some(&seq) = seqs.get(&write) {
            if seq <= last_seq {
                return Err(format!("out of commit order: {commit:?}"));
            }
            last_seq = seq;
        }
    }
    match writes.difference(&seen).next() {
        Some(missing) => Err(format!("no event of {missing:?}")),
        None => Ok(()),
    }
}

/// A checker that never complains proves nothing: each of these histories is wrong in one way, and it has to say so.
pub(crate) fn controls(history: &History) {
    let wrong = |what: &str, change: &dyn Fn(&mut History)| {
        let mut history = history.clone();
        change(&mut history);
        let verdict = check(&history);
        assert!(verdict.is_err(), "not noticed: {what}");
        eprintln!("control, {what}: {}", verdict.unwrap_err());
    };
    let acked = history.acks[history.acks.len() / 2].0;
    wrong("an acknowledged write is lost", &|history| history.table.retain(|(writer, n, _)| (*writer, *n) != acked));
    wrong("half a write", &|history| {
        history.table.remove(&(acked.0, acked.1, 1));
    });
    wrong("a row that nobody wrote", &|history| {
        history.table.extend([(99, 1, 0), (99, 1, 1)]);
    });
    wrong("a counter that another commit kept", &|history| *history.counters.get_mut(&0).unwrap() += 1);
    wrong("a seq given twice", &|history| history.acks[1].1 = history.acks[0].1);
    wrong("a gap", &|history| {
        history.streams.iter_mut().for_each(|stream| drop(stream.remove(3)));
    });
    wrong("a duplicate", &|history| {
        history.streams.iter_mut().for_each(|stream| stream.insert(5, stream[4].clone()));
    });
    wrong("a split commit", &|history| {
        history.streams.iter_mut().for_each(|stream| stream[2].rows.truncate(1));
    });
    wrong("an event before its write", &|history| {
        history.streams.iter_mut().for_each(|stream| stream[2].attempted = false);
    });
    wrong("an event of a commit that a kill undid", &|history| {
        let write = *history.attempts.iter().next_back().unwrap();
        history.table.retain(|(writer, n, _)| (*writer, *n) != write);
        history.acks.retain(|(acked, _)| *acked != write);
        history.counters.insert(write.0, write.1 - 1);
    });
    wrong("two subscribers disagree", &|history| history.streams[1].swap(0, 1));
}
