//! Commits at a given rate, and what telling one to its subscribers costs beside the commit itself: as many commits of the
//! same kind go to the table that nobody follows, at the same rate, on the same server with the same subscribers connected.

use std::time::{Duration, Instant};

use tests::TestServer;

use crate::measure::{Cpu, Latencies};
use crate::{pause_until, write_to};

/// Commits to one table at a given rate.
pub struct Paced {
    count: u64,
    /// How long each took whoever wrote it.
    writes: Latencies,
    /// Seconds of the server's, until the next commit would be due.
    cpu: f64,
}

impl Paced {
    pub async fn run(server: &TestServer, table: &str, rate: u32, count: u64) -> Paced {
        let db = server.admin();
        let mut writes = Latencies::default();
        let (before, started) = (Cpu::of(server.pid()), Instant::now());
        for made in 1..=count {
            let asked = Instant::now();
            write_to(&db, table, 1).await;
            writes.add(asked.elapsed());
            pause_until(started + Duration::from_secs(made) / rate).await;
        }
        Paced { count, writes, cpu: Cpu::of(server.pid()).since(&before) }
    }

    fn cpu_each(&self) -> f64 {
        self.cpu / self.count as f64
    }
}

/// Commits that everybody follows, beside those that nobody follows.
pub struct Told {
    /// Seconds of the server's CPU for each event, without what the commits cost.
    pub cpu: f64,
    /// By how much that may be wrong: half of what those before and those after differ by.
    pub uncertain: f64,
    /// How long who writes waits where nobody follows, and where everybody does.
    pub writes: [Latencies; 2],
}

impl Told {
    /// `cpu`: seconds for each event of `told`, all included. Of as many commits that nobody hears of, half were made
    /// before and half after, so that a machine that becomes slower or faster meanwhile is in both alike.
    pub fn new(told: Paced, cpu: f64, subscribers: usize, [before, after]: [Paced; 2]) -> Told {
        let subscribers = subscribers as f64;
        let events = told.count as f64 * subscribers;
        let uncertain = (before.cpu_each() - after.cpu_each()).abs() / 2.0 / subscribers;
        let cpu = cpu - (before.cpu + after.cpu) / events;
        let mut unfollowed = before.writes;
        unfollowed.append(after.writes);
        Told { cpu, uncertain, writes: [unfollowed, told.writes] }
    }
}
