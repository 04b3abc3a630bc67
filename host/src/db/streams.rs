//! Which live queries are open and whose, for `system.live_queries`; and KILL, which ends them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::kills::{KIND, Kills};
use super::{Db, DbError, Identity, blocking};
use crate::catalog::Stage;
use crate::config::Role;
use crate::live::{GroupSpec, Live};
use crate::store::{Seq, Store, StoreError};

/// The live queries of this server.
pub(super) struct Streams {
    open: Mutex<HashMap<String, Open>>,
    kills: Mutex<Kills>,
    /// Rises with every kill.
    bell: watch::Sender<u64>,
    store: Store,
    /// Held while kills are written, so that an older state never comes after a newer one.
    saving: Mutex<()>,
}

/// One live query: what all its streams have in common, once.
struct Open {
    spec: Arc<GroupSpec>,
    sql: Arc<str>,
    users: HashMap<Arc<str>, usize>,
}

/// An open live query as it is shown.
#[derive(Clone, Debug)]
pub(super) struct LiveQueryInfo {
    pub live_id: String,
    pub namespace: String,
    pub sql: String,
    pub mode: &'static str,
    pub index: String,
    /// Plugins with their versions and parameters, in order; empty without.
    pub pipeline: String,
    /// Of the user who asks; of an administrator everybody's.
    pub subscribers: u64,
    pub events: u64,
    pub bytes: u64,
    /// Commits that are durable and not yet told.
    pub lag: u64,
    pub users: Vec<String>,
}

impl Streams {
    /// With the kills that the store remembers.
    pub(super) fn load(store: Store) -> Result<Self, StoreError> {
        let kills = Kills::load(&store)?;
        let bell = watch::channel(kills.count()).0;
        Ok(Streams { open: Mutex::default(), kills: Mutex::new(kills), bell, store, saving: Mutex::default() })
    }

    fn open(&self) -> MutexGuard<'_, HashMap<String, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kills(&self) -> MutexGuard<'_, Kills> {
        self.kills.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a stream at this position has been killed and must not go on.
    pub(super) fn killed(&self, live_id: &str, user: &Arc<str>, position: Seq) -> bool {
        self.kills().hold_back(live_id, user, position)
    }

    /// A user subscribes without a position.
    pub(super) fn anew(self: &Arc<Self>, live_id: &str, user: &Arc<str>) {
        let changed = self.kills().anew(live_id, user);
        if changed {
            self.save_soon();
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
                    pipeline: pipeline(&open.spec),
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

    /// Open streams of a live query: of everybody, or of one user.
    fn count(&self, live_id: &str, user: Option<&Arc<str>>) -> usize {
        let open = self.open();
        let users = open.get(live_id).map(|open| &open.users);
        match (users, user) {
            (None, _) => 0,
            (Some(users), None) => users.values().sum(),
            (Some(users), Some(user)) => users.get(user).copied().unwrap_or_default(),
        }
    }

    fn note(&self, live_id: &str, user: Option<Arc<str>>, seq: Seq) {
        let number = self.kills().note(live_id, user, seq);
        self.bell.send_replace(number);
    }

    /// Tells the store of kills what it does not know yet. Blocks.
    fn save(&self) -> Result<(), StoreError> {
        let _one = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let (numbers, notes) = self.kills().take_unsaved();
        if notes.is_empty() {
            return Ok(());
        }
        self.store.put_notes(KIND, &notes).inspect_err(|_| self.kills().not_saved(numbers))
    }

    /// The same for what nobody waits for.
    fn save_soon(self: &Arc<Self>) {
        let streams = self.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = streams.save() {
                tracing::warn!(%error, "what became of a KILL LIVE QUERY could not be noted; the next one tries again");
            }
        });
    }
}

impl Db {
    /// Ends the streams of a live query: an administrator everybody's, others their own. How many there were.
    pub(super) async fn kill(&self, who: &Identity, live_id: &str) -> Result<u64, DbError> {
        let streams = &self.inner.streams;
        let user = (who.role != Role::Admin).then_some(&who.user);
        let count = streams.count(live_id, user);
        // Somebody else's is as unknown as none.
        if count == 0 {
            return Err(DbError::NotFound(format!(
                "there is no live query {live_id:?}; system.live_queries has those that are open"
            )));
        }
        streams.note(live_id, user.cloned(), self.inner.store.applied());
        let noted = streams.clone();
        blocking(move || noted.save()).await??;
        tracing::info!(live_id, by = %who.user, streams = count, "live query killed");
        Ok(count as u64)
    }
}

pub(super) fn mode(spec: &GroupSpec) -> &'static str {
    if spec.requery.is_some() { "requery" } else { "incremental" }
}

/// As a request says it, with the versions that run.
fn pipeline(spec: &GroupSpec) -> String {
    let stage = |stage: &Stage| format!("{}@{}:{}", stage.name, stage.version, stage.params);
    spec.stages.iter().map(stage).collect::<Vec<_>>().join(" ")
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
            let (streams, now) = (&self.db.inner.streams, self.db.inner.store.applied());
            let (ended, changed) = streams.kills().ends(self.since, &self.spec.live_id, &self.user, now);
            if changed {
                streams.save_soon();
            }
            if ended {
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
