//! Commits at a given rate, and what telling one to its subscribers costs beside the commit itself: as many commits of the
//! same kind go to the table that nobody follows, at the same rate, on the same server with the same subscribers connected.
//! In turns of a second, because shared cores are now faster and now slower.

use std::time::{Duration, Instant};

use tests::TestServer;

use crate::measure::{Cpu, Latencies};
use crate::reader::Reader;
use crate::{pause_until, write_to};

const TURN: Duration = Duration::from_secs(1);

/// Of a normal distribution: from the median distance to the standard deviation (1.48), and from the standard error of a
/// mean to that of a median (1.25).
const ERRORS: f64 = 1.48 * 1.25;

/// Commits of one kind, in some turns.
#[derive(Default)]
struct Paced {
    /// How long each took whoever wrote it.
    writes: Latencies,
    /// Seconds of the server's CPU in each turn, until all had heard of it and the next commit would be due.
    cpu: Vec<f64>,
}

impl Paced {
    /// `heard`: events that reach the reader for each.
    async fn turn(&mut self, server: &TestServer, table: &str, rate: u32, (reader, heard): (&Reader, u64)) {
        let db = server.admin();
        let count = rate * TURN.as_secs() as u32;
        let all = reader.events() + u64::from(count) * heard;
        let (before, started) = (Cpu::of(server.pid()), Instant::now());
        for made in 1..=count {
            let asked = Instant::now();
            write_to(&db, table, 1).await;
            self.writes.add(asked.elapsed());
            pause_until(started + TURN * made / count).await;
        }
        reader.until(all).await;
        self.cpu.push(Cpu::of(server.pid()).since(&before));
    }
}

/// Commits that everybody follows, beside those that nobody follows.
pub struct Told {
    /// Seconds of the server's CPU for each event, with what the commits cost: their requests and syncs.
    pub with_commits: f64,
    /// Without that: the median of what the turns say, because some have other work of the server's in them.
    pub cpu: f64,
    /// By how much `cpu` may be wrong: two standard errors of that.
    pub uncertain: f64,
    /// How long who writes waits where nobody follows, and where everybody does.
    pub writes: [Latencies; 2],
}

impl Told {
    pub async fn measure(server: &TestServer, reader: &Reader, subscribers: u64, rate: u32, window: Duration) -> Told {
        let [mut unfollowed, mut told] = [Paced::default(), Paced::default()];
        let turns = window.as_secs().max(2);
        for turn in 0..turns {
            // The other way round every second time, so that neither always comes first.
            if turn % 2 == 0 {
                unfollowed.turn(server, "other", rate, (reader, 0)).await;
            }
            told.turn(server, "ticker", rate, (reader, subscribers)).await;
            if turn % 2 == 1 {
                unfollowed.turn(server, "other", rate, (reader, 0)).await;
            }
        }
        let events = TURN.as_secs_f64() * f64::from(rate) * subscribers as f64;
        let beside: Vec<f64> =
            told.cpu.iter().zip(&unfollowed.cpu).map(|(told, bare)| (told - bare) / events).collect();
        let cpu = median(&beside);
        let off: Vec<f64> = beside.iter().map(|one| (one - cpu).abs()).collect();
        Told {
            with_commits: told.cpu.iter().sum::<f64>() / events / turns as f64,
            cpu,
            uncertain: 2.0 * ERRORS * median(&off) / (turns as f64).sqrt(),
            writes: [unfollowed.writes, told.writes],
        }
    }
}

fn median(of: &[f64]) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    (sorted[half] + sorted[(sorted.len() - 1) / 2]) / 2.0
}
