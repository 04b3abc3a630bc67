//! Which live queries are open and whose, for `system.live_queries`; and KILL, which ends them.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::{Db, DbError, Identity};
use crate::config::Role;
use crate::live::{GroupSpec, Live};
use crate::store::Seq;

/// Kills that are remembered, so that a client that comes back by itself is told to stop. Clients come back within
/// seconds; this many outlast them.
const REMEMBERED: usize = 1_000;

/// The live queries of this server.
pub(super) struct Streams {
    open: Mutex<HashMap<String, Open>>,
    kills: Mutex<Kills>,
    /// Rises with every kill.
    bell: watch::Sender<u64>,
}

/// One live query: what all its streams have in common, once.
struct Open {
    spec: Arc<GroupSpec>,
    sql: Arc<str>,
    users: HashMap<Arc<str>, usize>,
}

#[derive(Default)]
struct Kills {
    count: u64,
    recent: VecDeque<Kill>,
}

struct Kill {
    number: u64,
    live_id: String,
    /// Whose streams; `None`: everybody's.
    user: Option<Arc<str>>,
    /// Positions up to here are of streams that were killed.
    seq: Seq,
    /// Who has subscribed anew since: what they hold now is theirs to go on with.
    anew: HashSet<Arc<str>>,
}

impl Kill {
    fn concerns(&self, live_id: &str, user: &Arc<str>) -> bool {
        self.live_id == live_id && self.user.as_ref().is_none_or(|of| of == user)
    }
}

/// An open live query as it is shown.
#[derive(Clone, Debug)]
pub(super) struct LiveQueryInfo {
    pub live_id: String,
    pub namespace: String,
    pub sql: String,
    pub mode: &'static str,
    pub index: String,
    /// Of the user who asks; of an administrator everybody's.
    pub subscribers: u64,
    pub events: u64,
    pub bytes: u64,
    /// Commits that are durable and not yet told.
    pub lag: u64,
    pub users: Vec<String>,
}

impl Streams {
    pub(super) fn new() -> Self {
        Streams { open: Mutex::default(), kills: Mutex::default(), bell: watch::channel(0).0 }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<String, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kills(&self) -> MutexGuard<'_, Kills> {
        self.kills.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a stream at this position has been killed and must not go on.
    pub(super) fn killed(&self, live_id: &str, user: &Arc<str>, position: Seq) -> bool {
        let kills = self.kills();
        let mut concerned = kills.recent.iter().filter(|kill| kill.concerns(live_id, user));
        concerned.any(|kill| position <= kill.seq && !kill.anew.contains(user))
    }

    /// A user subscribes without a position.
    pub(super) fn anew(&self, live_id: &str, user: &Arc<str>) {
        for kill in self.kills().recent.iter_mut().filter(|kill| kill.concerns(live_id, user)) {
            kill.anew.insert(user.clone());
        }
    }

    /// The open live queries that this user may see: an administrator all, others their own.
    pub(super) fn visible(&self, live: &Live, user: &Arc<str>, role: Role) -> Vec<LiveQueryInfo> {
        let all = role == Role::Admin;
        let open = self.open();
        let mut found: Vec<LiveQueryInfo> = open
            .iter()
            .filter(|(_, open)| all || open.users.contains_key(user))
            .map(|(live_id, open)| {
                let counters = live.counters(&open.spec);
                let mine = |(of, count): (&Arc<str>, &usize)| (all || of == user).then(|| (of.to_string(), *count));
                let (mut users, counts): (Vec<String>, Vec<usize>) = open.users.iter().filter_map(mine).unzip();
                users.sort();
                LiveQueryInfo {
                    live_id: live_id.clone(),
                    namespace: open.spec.table.namespace_name.clone(),
                    sql: open.sql.to_string(),
                    mode: mode(&open.spec),
                    index: open.spec.index.clone(),
                    users,
                    subscribers: counts.iter().sum::<usize>() as u64,
                    events: counters.events,
                    bytes: counters.bytes,
                    lag: counters.lag,
                }
            })
            .collect();
        found.sort_by(|one, other| one.live_id.cmp(&other.live_id));
        found
    }

    fn note(&self, live_id: &str, user: Option<Arc<str>>, seq: Seq) {
        let mut kills = self.kills();
        kills.count += 1;
        let (number, live_id) = (kills.count, live_id.to_owned());
        kills.recent.push_back(Kill { number, live_id, user, seq, anew: HashSet::new() });
        if kills.recent.len() > REMEMBERED {
            kills.recent.pop_front();
        }
        drop(kills);
        self.bell.send_replace(number);
    }
}

impl Db {
    /// Ends the streams of a live query: an administrator everybody's, others their own. How many there were.
    pub(super) fn kill(&self, who: &Identity, live_id: &str) -> Result<u64, DbError> {
        let streams = &self.inner.streams;
        let all = who.role == Role::Admin;
        let open = streams.open();
        let users = open.get(live_id).map(|open| &open.users);
        let count = match (users, all) {
            (None, _) => 0,
            (Some(users), true) => users.values().sum(),
            (Some(users), false) => users.get(&who.user).copied().unwrap_or_default(),
        };
        drop(open);
        // Somebody else's is as unknown as none.
        if count == 0 {
            return Err(DbError::NotFound(format!(
                "there is no live query {live_id:?}; system.live_queries has those that are open"
            )));
        }
        streams.note(live_id, (!all).then(|| who.user.clone()), self.inner.store.applied());
        tracing::info!(live_id, by = %who.user, streams = count, "live query killed");
        Ok(count as u64)
    }
}

pub(super) fn mode(spec: &GroupSpec) -> &'static str {
    if spec.requery.is_some() { "requery" } else { "incremental" }
}

/// One stream's entry; dropping it takes it out.
pub(super) struct Listed {
    db: Db,
    spec: Arc<GroupSpec>,
    user: Arc<str>,
    bell: watch::Receiver<u64>,
    /// Kills up to this one came before the stream.
    since: u64,
}

impl Listed {
    pub(super) fn new(db: &Db, who: &Identity, spec: &Arc<GroupSpec>, sql: &str) -> Self {
        let streams = &db.inner.streams;
        let bell = streams.bell.subscribe();
        let since = *bell.borrow();
        let mut open = streams.open();
        let entry = open.entry(spec.live_id.clone()).or_insert_with(|| Open {
            spec: spec.clone(),
            sql: sql.into(),
            users: HashMap::new(),
        });
        *entry.users.entry(who.user.clone()).or_default() += 1;
        drop(open);
        Listed { db: db.clone(), spec: spec.clone(), user: who.user.clone(), bell, since }
    }

    /// Resolves when the stream has been killed. Cancel-safe.
    pub(super) async fn killed(&mut self) {
        loop {
            // The sender lives as long as the database, which this holds.
            if self.bell.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
            // What was told since the kill shall not be a way around it.
            let now = self.db.inner.store.applied();
            let mut kills = self.db.inner.streams.kills();
            let mut later = kills.recent.iter_mut().filter(|kill| kill.number > self.since);
            if let Some(kill) = later.find(|kill| kill.concerns(&self.spec.live_id, &self.user)) {
                kill.seq = kill.seq.max(now);
                return;
            }
        }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut streams = self.db.inner.streams.open();
        let Some(open) = streams.get_mut(&self.spec.live_id) else { return };
        if let Some(count) = open.users.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                open.users.remove(&self.user);
            }
        }
        if open.users.is_empty() {
            streams.remove(&self.spec.live_id);
        }
    }
}
