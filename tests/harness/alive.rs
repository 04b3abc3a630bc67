//! A user who goes on working while somebody else does their worst: writes a row, waits for its event on a stream, asks
//! whether the server lives.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::json;
use tokio::task::JoinHandle;

use crate::client::Client;
use crate::live::Live;
use crate::server::TestServer;
use crate::{PATIENCE, process};

/// The longest that one round may take: a commit to disk, an event and a probe, on a machine whose cores and disk are all
/// busy with other things as well.
const ROUND: Duration = Duration::from_secs(10);
/// Between two rounds: the bystander is to notice, not to be the load.
const PAUSE: Duration = Duration::from_millis(10);

pub struct Bystander {
    pid: rustix::process::Pid,
    stop: Arc<AtomicBool>,
    working: JoinHandle<Rounds>,
}

/// What there was of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rounds {
    pub count: usize,
    pub slowest: Duration,
}

impl Bystander {
    /// Begins to work, in a table of its own.
    pub async fn at(server: &TestServer) -> Bystander {
        server.admin().sql("CREATE TABLE bystander (id BIGINT PRIMARY KEY)").await;
        let db = server.client("robot");
        let mut live = db.live("SELECT id FROM bystander").await;
        live.until_uptodate().await;
        let stop = Arc::new(AtomicBool::new(false));
        let working = tokio::spawn(work(db, live, Arc::clone(&stop)));
        Bystander { pid: server.pid(), stop, working }
    }

    /// Stops; fails the test where any round took too long, or where the process is another one by now.
    pub async fn unhurt(self, server: &TestServer) -> Rounds {
        self.stop.store(true, Ordering::Relaxed);
        let rounds = self.working.await.expect("the bystander's work never fails");
        assert!(rounds.count > 0, "the bystander never came to anything");
        assert!(rounds.slowest < ROUND, "a bystander waited for {:?}: {rounds:?}", rounds.slowest);
        assert_eq!(server.pid(), self.pid);
        // Reading the status fails when the process is gone.
        process::status_bytes(self.pid, "VmRSS");
        rounds
    }
}

async fn work(db: Client, mut live: Live, stop: Arc<AtomicBool>) -> Rounds {
    let mut rounds = Rounds::default();
    // At least one, after whatever there was.
    loop {
        let last = stop.load(Ordering::Relaxed);
        let (start, id) = (Instant::now(), rounds.count as i64);
        db.sql_params("INSERT INTO bystander VALUES ($1)", json!([id])).await;
        let event = live.next_change().await;
        assert_eq!(event.data["key"]["id"], id, "{event:?}");
        let health = db.get("/healthz").timeout(PATIENCE).send().await.expect("/healthz answers");
        assert_eq!(health.status(), StatusCode::OK);
        rounds.count += 1;
        rounds.slowest = rounds.slowest.max(start.elapsed());
        if last {
            return rounds;
        }
        tokio::time::sleep(PAUSE).await;
    }
}
