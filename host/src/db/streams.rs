//! Which live queries are open and whose, for `system.live_queries`; and KILL, which ends them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::audit::Event;
use super::kills::{KIND, Kills};
use super::{Db, DbError, Identity, LiveRequest, blocking};
use crate::catalog::Stage;
use crate::config::Role;
use crate::live::{GroupSpec, Live};
use crate::sql::OutputColumn;
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

/// One live query.
struct Open {
    common: Arc<Common>,
    users: HashMap<Arc<str>, Mine>,
}

/// A user's streams of one live query.
struct Mine {
    count: usize,
    /// In the words of the first of them: what others wrote, be it in a comment, is nobody else's.
    common: Arc<Common>,
}

/// What the streams of one live query have in common, once for all of them who asked in the same words.
pub(super) struct Common {
    pub spec: Arc<GroupSpec>,
    pub shown: Arc<Shown>,
    /// Without a position: that is the stream's own.
    pub request: LiveRequest,
}

/// What streams say of their rows.
#[derive(PartialEq)]
pub(super) struct Shown {
    pub columns: Vec<OutputColumn>,
    /// Names of the key's parts.
    pub key: Vec<String>,
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
    pub(super) fn anew(self: &Arc<Self>, live_id: &str, user: &Arc<str>, since: u64) {
        let changed = self.kills().anew(live_id, user, since);
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
                let spec = &open.common.spec;
                let counters = live.counters(spec);
                let mine = |(of, mine): (&Arc<str>, &Mine)| (all || of == user).then(|| (of.to_string(), mine.count));
                let (mut users, counts): (Vec<String>, Vec<usize>) = open.users.iter().filter_map(mine).unzip();
                users.sort();
                let asked = open.users.get(user).map_or(&open.common, |mine| &mine.common);
                LiveQueryInfo {
                    live_id: live_id.clone(),
                    namespace: spec.table.namespace_name.clone(),
                    sql: asked.request.sql.clone(),
                    mode: mode(spec),
                    index: spec.index.clone(),
                    pipeline: pipeline(spec),
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

    /// Counts a stream in. What it has in common with those that are open already it is given in the place of its own.
    fn enter(&self, who: &Identity, mut common: Common) -> Arc<Common> {
        match self.open().entry(common.spec.live_id.clone()) {
            Entry::Occupied(mut entry) => {
                let open = entry.get_mut();
                let known = &open.common;
                let common = match known.request == common.request && known.shown == common.shown {
                    true => known.clone(),
                    false => {
                        common.spec = known.spec.clone();
                        Arc::new(common)
                    }
                };
                let mine = open.users.entry(who.user.clone());
                mine.or_insert_with(|| Mine { count: 0, common: common.clone() }).count += 1;
                common
            }
            Entry::Vacant(entry) => {
                let common = Arc::new(common);
                let mine = Mine { count: 1, common: common.clone() };
                entry.insert(Open { common: common.clone(), users: HashMap::from([(who.user.clone(), mine)]) });
                common
            }
        }
    }

    /// Ends the open streams of a live query, of everybody or of one user. How many there were; without any it was no
    /// kill. Counted and noted in one step: a stream that was counted finds the note when it has left (`Listed::leave`).
    fn end(&self, live_id: &str, user: Option<&Arc<str>>, said: &Event) -> usize {
        let open = self.open();
        let users = open.get(live_id).map(|open| &open.users);
        let count = match (users, user) {
            (None, _) => 0,
            (Some(users), None) => users.values().map(|mine| mine.count).sum(),
            (Some(users), Some(user)) => users.get(user).map_or(0, |mine| mine.count),
        };
        if count > 0 {
            let mut kills = self.kills();
            let number = kills.note(live_id, user.cloned(), self.store.applied());
            kills.audit.push(said.record());
            drop(kills);
            self.bell.send_replace(number);
        }
        count
    }

    /// Whether a kill after number `since` ends this stream.
    fn ends(self: &Arc<Self>, since: u64, live_id: &str, user: &Arc<str>) -> bool {
        // What was told since the kill shall not be a way around it.
        let (ended, changed) = self.kills().ends(since, live_id, user, self.store.applied());
        if changed {
            self.save_soon();
        }
        ended
    }

    /// Tells the store of kills what it does not know yet. Blocks.
    fn save(&self) -> Result<(), StoreError> {
        let _one = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kills = self.kills();
        let ((numbers, notes), audit) = (kills.take_unsaved(), std::mem::take(&mut kills.audit));
        drop(kills);
        if notes.is_empty() {
            return Ok(());
        }
        self.store.put_notes(KIND, &notes, &audit).inspect_err(|_| {
            let mut kills = self.kills();
            kills.not_saved(numbers);
            kills.audit.extend(audit.iter().cloned());
        })
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
        let said = Event::done(Some(who), "kill", "KILL LIVE QUERY", live_id);
        let count = streams.end(live_id, user, &said);
        // Somebody else's is as unknown as none.
        if count == 0 {
            return Err(DbError::NotFound(format!(
                "there is no live query {live_id:?}; system.live_queries has those that are open"
            )));
        }
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
    pub common: Arc<Common>,
    user: Arc<str>,
    bell: watch::Receiver<u64>,
    /// Kills up to this one came before the stream.
    pub since: u64,
}

impl Listed {
    pub(super) fn new(db: &Db, who: &Identity, common: Common) -> Self {
        let streams = &db.inner.streams;
        let bell = streams.bell.subscribe();
        let since = *bell.borrow();
        let common = streams.enter(who, common);
        Listed { db: db.clone(), common, user: who.user.clone(), bell, since }
    }

    /// Resolves when the stream has been killed. Cancel-safe.
    pub(super) async fn killed(&mut self) {
        loop {
            // The sender lives as long as the database, which this holds.
            if self.bell.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
            if self.is_killed() {
                return;
            }
        }
    }

    /// Whether it has been killed by now.
    pub(super) fn is_killed(&self) -> bool {
        self.db.inner.streams.ends(self.since, &self.common.spec.live_id, &self.user)
    }

    /// Takes it out. Whether it was killed before: from here on no kill counts it.
    pub(super) fn leave(self) -> bool {
        let (db, common, user, since) = (self.db.clone(), self.common.clone(), self.user.clone(), self.since);
        drop(self);
        db.inner.streams.ends(since, &common.spec.live_id, &user)
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut streams = self.db.inner.streams.open();
        let Some(open) = streams.get_mut(&self.common.spec.live_id) else { return };
        if let Some(mine) = open.users.get_mut(&self.user) {
            mine.count -= 1;
            if mine.count == 0 {
                open.users.remove(&self.user);
            }
        }
        if open.users.is_empty() {
            streams.remove(&self.common.spec.live_id);
        }
    }
}
