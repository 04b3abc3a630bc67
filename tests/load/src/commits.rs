//! What subscribers cost whoever writes: the same commit to a server that has none, to one whose subscribers follow another
//! table, and to the table that they follow. In turns of a few commits, because shared cores are now faster and now
//! slower; and beside the time that a writer waits what the committer's thread used, and how long it was ready and had no
//! core, so that a busy machine is not taken for more work. Here the next commit waits until all have heard of the one
//! before; [`paced`](crate::paced) has them at a given rate.

use std::time::{Duration, Instant};

use tests::{Client, TestServer};

use crate::measure::{Latencies, thread_seconds};
use crate::reader::Reader;
use crate::write_to;

/// Turns of each, after one that does not count.
const TURNS: usize = 20;
/// Commits of a turn that nobody hears of.
const QUIET: usize = 15;
/// Commits of a turn that everybody hears of, each once the one before has reached all.
const TOLD: usize = 3;

/// After a turn that everybody hears of: the kernel still acknowledges what they read, some 40 ms later, which would be
/// taken for what the next turn costs.
const SETTLED: Duration = Duration::from_millis(200);

/// The thread's name.
const COMMITTER: &str = "committer";

/// Commits of one kind.
#[derive(Default)]
pub struct Commits {
    times: Latencies,
    count: usize,
    /// Of the committer's thread, for all of them.
    on_core: f64,
    ready: f64,
}

impl Commits {
    pub fn p50_ms(&self) -> f64 {
        self.times.ms(0.5)
    }

    /// Microseconds that the committer worked for one; not a number where the kernel does not say.
    pub fn on_core_us(&self) -> f64 {
        self.on_core / self.count as f64 * 1e6
    }

    /// Microseconds that it was ready and had no core.
    pub fn ready_us(&self) -> f64 {
        self.ready / self.count as f64 * 1e6
    }
}

/// One of those that take turns.
struct Side<'a> {
    server: &'a TestServer,
    db: Client,
    table: &'static str,
    /// Who hears of it, and how many they are.
    told: Option<(&'a Reader, u64)>,
    commits: Commits,
}

impl<'a> Side<'a> {
    fn new(server: &'a TestServer, table: &'static str, told: Option<(&'a Reader, u64)>) -> Side<'a> {
        Side { server, db: server.admin(), table, told, commits: Commits::default() }
    }

    async fn turn(&mut self) {
        let before = self.used();
        let count = if self.told.is_some() { TOLD } else { QUIET };
        for _ in 0..count {
            let heard = self.told.map(|(reader, subscribers)| (reader, reader.events() + subscribers));
            let started = Instant::now();
            write_to(&self.db, self.table, 1).await;
            self.commits.times.add(started.elapsed());
            if let Some((reader, events)) = heard {
                reader.until(events).await;
            }
        }
        let now = self.used();
        if self.told.is_some() {
            tokio::time::sleep(SETTLED).await;
        }
        self.commits.count += count;
        self.commits.on_core += now.0 - before.0;
        self.commits.ready += now.1 - before.1;
    }

    fn used(&self) -> (f64, f64) {
        thread_seconds(self.server.pid(), COMMITTER).unwrap_or((f64::NAN, f64::NAN))
    }
}

/// Commits without subscribers, with `subscribers` that follow another table, and to the table that they follow.
pub async fn measure(bare: &TestServer, crowded: &TestServer, reader: &Reader, subscribers: u64) -> [Commits; 3] {
    let mut sides = [
        Side::new(bare, "other", None),
        Side::new(crowded, "other", None),
        Side::new(crowded, "ticker", Some((reader, subscribers))),
    ];
    for turn in 0..=TURNS {
        // The other way round every second time, so that nobody always comes first.
        let order = if turn.is_multiple_of(2) { [0, 1, 2] } else { [2, 1, 0] };
        for at in order {
            sides[at].turn().await;
            if turn == 0 {
                sides[at].commits = Commits::default();
            }
        }
    }
    sides.map(|side| side.commits)
}
