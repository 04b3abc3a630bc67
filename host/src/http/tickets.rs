//! Tickets: how EventSource, which cannot send headers, opens a live stream.
//!
//! A ticket is 256 random bits for one identity and one exact live query. It opens the stream once, within its
//! time-to-live; from then on it is good for reconnects of that very stream, which end the connection they replace.
//! So a ticket that leaks from a URL log shows at most a stream that its owner sees break.
//!
//! Kept in memory, and over restarts in the store, both times hashed: an EventSource that comes back after a restart
//! has nothing but its ticket, and would stop for good at a 401. A ticket ends with the credentials of who asked for it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::auth::{Auth, hash, random_token};
use super::error::Problem;
use super::keeper::Keeper;
use super::limits::Counted;
use super::request::{Asked, live_from_json};
use crate::config::Role;
use crate::db::{Db, Identity, NoteWrite};

/// Streams of one user that may wait for their reconnect; a browser keeps a handful.
const PER_USER: usize = 256;
/// Tickets of all users: about a kilobyte each.
const TOTAL: usize = 20_000;
/// Of what a ticket is asked for: the longest SQL text and its parameters.
const REQUEST_BYTES: usize = 128 * 1024;
/// How long a closed stream may be taken up again: a laptop's night.
const IDLE: Duration = Duration::from_secs(24 * 3600);

/// Of the notes in the store. A ticket has two, under its hash and one of these bytes: what never changes, and when it
/// ends (i64 microseconds since 1970, big-endian; 0: its stream runs).
const KIND: &str = "ticket";
const REQUEST: u8 = 0;
const UNTIL: u8 = 1;

#[derive(Clone)]
pub struct Tickets {
    ttl: Duration,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    entries: Mutex<Entries>,
    /// None: nothing outlasts this process.
    keeper: Option<Keeper>,
}

type Entries = HashMap<[u8; 32], Entry>;

/// What a ticket stands for, as the store keeps it.
#[derive(Serialize, Deserialize)]
struct Kept {
    user: String,
    role: String,
    /// Of the user's credentials, see [`Auth::stamp`].
    stamp: String,
    /// The request's JSON as it came.
    request: String,
}

struct Entry {
    who: Identity,
    request: Asked,
    /// When it ends; `None` while a stream runs.
    until: Option<Instant>,
    /// The connection that has the stream now, and what it counts as.
    current: CancellationToken,
    counted: Weak<Counted>,
    /// Counts connections, so that an old one that ends does not count as the stream's end.
    opened: u64,
}

/// A ticket that was presented and fits.
#[derive(Debug)]
pub struct Redeemed {
    pub who: Identity,
    pub request: Asked,
    key: [u8; 32],
}

/// Held by the connection that has a ticket's stream.
pub struct TicketUse {
    tickets: Tickets,
    key: [u8; 32],
    opened: u64,
    replaced: CancellationToken,
}

impl Tickets {
    /// With the tickets of the server's life before.
    pub fn load(ttl: Duration, db: &Db, auth: &Auth) -> Tickets {
        let keeper = Keeper::start(db.clone(), KIND)
            .inspect_err(|error| tracing::error!(%error, "no thread for tickets: they will not outlast a restart"));
        let notes = db.notes(KIND).unwrap_or_else(|error| {
            tracing::error!(%error, "tickets could not be read; their clients have to ask for new ones");
            Vec::new()
        });
        let (entries, over) = read(notes, auth);
        let tickets = Tickets { ttl, shared: Arc::new(Shared { entries: Mutex::new(entries), keeper: keeper.ok() }) };
        over.iter().for_each(|key| tickets.forget(key));
        tickets
    }

    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // Entries are whole after every statement, so a panic elsewhere leaves them usable.
        self.shared.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called while the entries are locked, so that the store learns of changes in their order.
    fn keep(&self, notes: Vec<NoteWrite>) {
        if let Some(keeper) = &self.shared.keeper {
            keeper.keep(notes);
        }
    }

    fn forget(&self, key: &[u8; 32]) {
        self.keep(vec![(note_key(key, REQUEST), None), (note_key(key, UNTIL), None)]);
    }

    /// A ticket for what `body`, read as `request`, asks for; and what tells that it will outlast a restart. Whoever has it
    /// has nothing else to come back with.
    pub fn issue(
        &self,
        auth: &Auth,
        who: Identity,
        request: Asked,
        body: &[u8],
    ) -> Result<(String, Option<oneshot::Receiver<()>>), Problem> {
        if body.len() > REQUEST_BYTES {
            let detail = format!("a ticket stands for a request of at most {REQUEST_BYTES} bytes");
            return Err(Problem::new(413, "body_too_large", detail));
        }
        let now = Instant::now();
        let mut entries = self.entries();
        let over = entries.extract_if(|_, entry| entry.until.is_some_and(|until| until <= now));
        over.for_each(|(key, _)| self.forget(&key));
        let mine = entries.values().filter(|entry| entry.who.user == who.user).count();
        if mine >= PER_USER || entries.len() >= TOTAL {
            // The stream that has been closed for the longest makes room: every page that was left has some.
            let closed = entries.iter().filter(|(_, entry)| mine < PER_USER || entry.who.user == who.user);
            let closed = closed.filter(|(_, entry)| entry.is_closed(now + self.ttl));
            let Some(key) = closed.min_by_key(|(_, entry)| entry.until).map(|(key, _)| *key) else {
                let detail = format!(
                    "too many tickets are out, at most {PER_USER} for one user and {TOTAL} for all; close streams that were opened \
                     by one, or wait until unused ones end"
                );
                return Err(Problem::new(429, "too_many", detail).retry_after(self.ttl.as_secs().clamp(1, 600) as u32));
            };
            entries.remove(&key);
            self.forget(&key);
        }
        let (ticket, until) = (random_token(), Some(now + self.ttl));
        let key = hash(&ticket);
        let written = kept(auth, &who, body).zip(self.shared.keeper.as_ref()).map(|(kept, keeper)| {
            let until = (note_key(&key, UNTIL), Some(until_note(until)));
            keeper.keep_surely(vec![(note_key(&key, REQUEST), Some(kept)), until])
        });
        entries.insert(key, Entry::new(who, request, until));
        Ok((ticket, written))
    }

    /// The stream a ticket stands for. A query that comes with it must be the very same one.
    pub fn redeem(&self, ticket: &str, given: Option<&Asked>) -> Result<Redeemed, Problem> {
        let key = hash(ticket);
        let mut entries = self.entries();
        let entry = entries
            .get_mut(&key)
            .filter(|entry| entry.until.is_none_or(|until| until > Instant::now()))
            .filter(|entry| given.is_none_or(|given| same(given, &entry.request)))
            .ok_or_else(no_ticket)?;
        // It is about to be used: not the one that has been closed for the longest.
        if entry.opened > 0 && entry.until.is_some() {
            entry.until = Some(Instant::now() + IDLE);
        }
        Ok(Redeemed { who: entry.who.clone(), request: entry.request.clone(), key })
    }

    /// What the stream counts as already, while a connection has it: one that takes its place is no more than that. (A
    /// client whose network has changed is back long before anybody knows that its old connection is dead.)
    pub fn counted(&self, redeemed: &Redeemed) -> Option<Arc<Counted>> {
        let entries = self.entries();
        let counted = entries.get(&redeemed.key)?.counted.upgrade()?;
        // One that has ended and one that begins: more at a time are more connections than it counts as.
        (Arc::strong_count(&counted) <= 2).then_some(counted)
    }

    /// The stream is open: a connection that had it before ends.
    pub fn open(&self, redeemed: &Redeemed, counted: &Arc<Counted>) -> Result<TicketUse, Problem> {
        let mut entries = self.entries();
        let entry = entries.get_mut(&redeemed.key).ok_or_else(no_ticket)?;
        entry.current.cancel();
        entry.current = CancellationToken::new();
        entry.counted = Arc::downgrade(counted);
        entry.until = None;
        entry.opened += 1;
        self.keep(vec![(note_key(&redeemed.key, UNTIL), Some(until_note(None)))]);
        let (opened, replaced) = (entry.opened, entry.current.clone());
        Ok(TicketUse { tickets: self.clone(), key: redeemed.key, opened, replaced })
    }
}

/// One answer for all: whoever guesses learns nothing by it.
fn no_ticket() -> Problem {
    let detail = "the ticket is not known, was not used in time, or is for another query than the one beside it; \
                  POST /v1/auth/ticket gives another";
    Problem::new(401, "unauthorized", detail)
}

impl Entry {
    fn new(who: Identity, request: Asked, until: Option<Instant>) -> Entry {
        let request = Asked { position: None, ..request };
        Entry { who, request, until, current: CancellationToken::new(), counted: Weak::new(), opened: 0 }
    }

    /// Whether its stream was open once (in this life or, as its end is later than that of new ones, in the one before)
    /// and is no more.
    fn is_closed(&self, new_ones: Instant) -> bool {
        self.until.is_some_and(|until| self.opened > 0 || until > new_ones)
    }
}

fn note_key(key: &[u8; 32], part: u8) -> Vec<u8> {
    [&key[..], &[part]].concat()
}

fn until_note(until: Option<Instant>) -> Vec<u8> {
    let until = until.map_or(0, |until| {
        let left = until.saturating_duration_since(Instant::now());
        wall().saturating_add(i64::try_from(left.as_micros()).unwrap_or(i64::MAX))
    });
    until.to_be_bytes().to_vec()
}

/// Microseconds since 1970.
fn wall() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as i64)
}

/// `None`: nobody could tell later whether the credentials are still good.
fn kept(auth: &Auth, who: &Identity, body: &[u8]) -> Option<Vec<u8>> {
    let (user, role) = (who.user.to_string(), who.role.as_str().to_owned());
    let request = std::str::from_utf8(body).ok()?.to_owned();
    serde_json::to_vec(&Kept { user, role, stamp: auth.stamp(who)?, request }).ok()
}

/// The tickets that are still good, and the hashes of those that are not.
fn read(notes: Vec<(Vec<u8>, Vec<u8>)>, auth: &Auth) -> (Entries, Vec<[u8; 32]>) {
    let (mut entries, mut over) = (Entries::new(), Vec::new());
    let mut requests = HashMap::new();
    for (key, value) in notes {
        let Some((hash, part)) = key.split_first_chunk::<32>() else { continue };
        match part {
            [REQUEST] => {
                requests.insert(*hash, value);
            }
            [UNTIL] => match requests.remove(hash).and_then(|kept| entry(&kept, &value, auth)) {
                Some(entry) => {
                    entries.insert(*hash, entry);
                }
                None => over.push(*hash),
            },
            _ => {}
        }
    }
    over.extend(requests.into_keys());
    (entries, over)
}

fn entry(kept: &[u8], until: &[u8], auth: &Auth) -> Option<Entry> {
    let kept: Kept = serde_json::from_slice(kept).ok()?;
    let role = [Role::User, Role::Service, Role::Admin].into_iter().find(|role| role.as_str() == kept.role)?;
    let who = Identity { user: Arc::from(kept.user), role, address: None };
    if auth.stamp(&who)? != kept.stamp {
        return None;
    }
    let left = match i64::from_be_bytes(until.try_into().ok()?) {
        // Its stream ran until the server ended.
        0 => IDLE,
        until => {
            let left = u64::try_from(until.saturating_sub(wall())).ok().filter(|left| *left > 0)?;
            Duration::from_micros(left).min(IDLE)
        }
    };
    let request = live_from_json(kept.request.as_bytes()).ok()?;
    Some(Entry::new(who, request, Some(Instant::now() + left)))
}

impl TicketUse {
    /// Another connection took the stream over.
    pub fn replaced(&self) -> &CancellationToken {
        &self.replaced
    }
}

impl Drop for TicketUse {
    fn drop(&mut self) {
        let mut entries = self.tickets.entries();
        if let Some(entry) = entries.get_mut(&self.key)
            && entry.opened == self.opened
        {
            entry.until = Some(Instant::now() + IDLE);
            self.tickets.keep(vec![(note_key(&self.key, UNTIL), Some(until_note(entry.until)))]);
        }
    }
}

/// Equal in everything but the position.
fn same(a: &Asked, b: &Asked) -> bool {
    (&a.queries, &a.names) == (&b.queries, &b.names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Token;
    use crate::db::LiveRequest;
    use crate::http::limits::Limits;

    fn auth(token: &str) -> Auth {
        let token = Token { token: token.to_owned(), user: "alice".to_owned(), role: Role::User };
        Auth::new(&[token], "the-administrators-token-0123456789")
    }

    /// Kept nowhere.
    fn forgetful(ttl: Duration) -> Tickets {
        Tickets { ttl, shared: Arc::default() }
    }

    fn issue(tickets: &Tickets, user: &str, sql: &str) -> Result<String, Problem> {
        tickets.issue(&auth("t"), who(user), request(sql), b"{}").map(|(ticket, _)| ticket)
    }

    fn counted(user: &str) -> Arc<Counted> {
        Arc::new(Limits::new(1, 1).open(&Arc::from(user), None, 1).unwrap())
    }

    fn who(user: &str) -> Identity {
        Identity { user: Arc::from(user), role: Role::User, address: None }
    }

    fn request(sql: &str) -> Asked {
        Asked { queries: vec![LiveRequest::new(sql)], names: None, position: Some("1-2-3".to_owned()) }
    }

    #[test]
    fn a_ticket_is_for_one_query_of_one_user() {
        let tickets = forgetful(Duration::from_secs(60));
        let ticket = issue(&tickets, "alice", "SELECT 1").unwrap();
        assert_eq!(&*tickets.redeem(&ticket, None).unwrap().who.user, "alice");
        assert!(tickets.redeem(&ticket, Some(&request("SELECT 1"))).is_ok());
        assert!(tickets.redeem(&ticket, Some(&request("SELECT 2"))).is_err());
        assert!(tickets.redeem("guess", None).is_err());
        assert_eq!(tickets.redeem(&ticket, None).unwrap().request.position, None);
    }

    #[test]
    fn an_unused_ticket_ends_and_an_opened_one_stays() {
        let tickets = forgetful(Duration::ZERO);
        let ticket = issue(&tickets, "alice", "SELECT 1").unwrap();
        assert!(tickets.redeem(&ticket, None).is_err());

        let tickets = forgetful(Duration::from_secs(60));
        let ticket = issue(&tickets, "alice", "SELECT 1").unwrap();
        let counted = counted("alice");
        let first = tickets.open(&tickets.redeem(&ticket, None).unwrap(), &counted).unwrap();
        let second = tickets.open(&tickets.redeem(&ticket, None).unwrap(), &counted).unwrap();
        assert!(first.replaced().is_cancelled() && !second.replaced().is_cancelled());
        drop(first);
        assert!(tickets.entries().values().all(|entry| entry.until.is_none()), "the stream still runs");
        drop(second);
        assert!(tickets.redeem(&ticket, None).is_ok(), "good for a reconnect");
    }

    #[test]
    fn tickets_are_bounded_per_user() {
        let tickets = forgetful(Duration::from_secs(60));
        for _ in 0..PER_USER {
            issue(&tickets, "alice", "SELECT 1").unwrap();
        }
        assert_eq!(issue(&tickets, "alice", "SELECT 1").unwrap_err().status(), 429);
        assert!(issue(&tickets, "bob", "SELECT 1").is_ok());
    }

    /// Each page that is left leaves its tickets behind, for a day: 256 of them and there were no new ones.
    #[test]
    fn what_was_closed_longest_makes_room() {
        let tickets = forgetful(Duration::from_secs(60));
        let all: Vec<String> = (0..PER_USER).map(|_| issue(&tickets, "alice", "SELECT 1").unwrap()).collect();
        let open = |ticket: &str| tickets.open(&tickets.redeem(ticket, None).unwrap(), &counted("alice")).unwrap();
        let _running = open(&all[0]);
        drop((open(&all[1]), open(&all[2])));
        for gone in [1, 2] {
            let is_there = |at: usize| tickets.entries().contains_key(&hash(&all[at]));
            assert!(is_there(gone));
            issue(&tickets, "alice", "SELECT 1").unwrap();
            assert!(!is_there(gone) && is_there(0) && is_there(3));
        }
        assert_eq!(issue(&tickets, "alice", "SELECT 1").unwrap_err().status(), 429);
    }

    #[test]
    fn who_takes_its_own_stream_over_counts_once() {
        let (tickets, limits) = (forgetful(Duration::from_secs(60)), Limits::new(1, 1));
        let ticket = issue(&tickets, "alice", "SELECT 1").unwrap();
        let redeemed = tickets.redeem(&ticket, None).unwrap();
        assert!(tickets.counted(&redeemed).is_none());
        let counted = Arc::new(limits.open(&Arc::from("alice"), None, 1).unwrap());
        let dead = tickets.open(&redeemed, &counted).unwrap();
        drop(counted);
        assert!(tickets.counted(&redeemed).is_none(), "closed");
        let counted = Arc::new(limits.open(&Arc::from("alice"), None, 1).unwrap());
        let _alive = tickets.open(&redeemed, &counted).unwrap();
        let again = tickets.counted(&redeemed).unwrap();
        assert!(tickets.counted(&redeemed).is_none(), "two at once count as two");
        drop((dead, counted));
        assert!(limits.open(&Arc::from("alice"), None, 1).is_err(), "it still counts");
        drop(again);
        assert!(limits.open(&Arc::from("alice"), None, 1).is_ok());
    }

    #[test]
    fn tickets_outlast_a_restart_with_the_credentials_of_their_user() {
        let body = br#"{"sql":"SELECT 2","last_event_id":"1-2-3"}"#;
        let kept = kept(&auth("t"), &who("alice"), body).unwrap();
        let notes = |number: u8, until: Vec<u8>| {
            let key = [number; 32];
            [(note_key(&key, REQUEST), kept.clone()), (note_key(&key, UNTIL), until)]
        };
        let in_a_minute = until_note(Some(Instant::now() + Duration::from_secs(60)));
        let long_ago = 1_i64.to_be_bytes().to_vec();
        let all = [notes(1, until_note(None)), notes(2, in_a_minute), notes(3, long_ago), notes(4, vec![7])];
        let mut all: Vec<_> = all.concat();
        all.push((note_key(&[5; 32], REQUEST), kept.clone()));
        all.push((note_key(&[6; 32], UNTIL), until_note(None)));

        let (entries, mut over) = read(all.clone(), &auth("t"));
        over.sort();
        assert_eq!(over, [[3; 32], [4; 32], [5; 32], [6; 32]]);
        let left = |number: u8| {
            let entry = &entries[&[number; 32]];
            assert_eq!((&*entry.who.user, entry.who.role, &entry.request.position), ("alice", Role::User, &None));
            assert_eq!(entry.request.queries[0].sql, "SELECT 2");
            entry.until.unwrap() - Instant::now()
        };
        assert!(left(1) > Duration::from_secs(3600) && left(1) <= IDLE);
        assert!(left(2) > Duration::from_secs(50) && left(2) <= Duration::from_secs(60));

        let (entries, over) = read(all, &auth("another"));
        assert!(entries.is_empty() && over.len() == 6, "whoever lost the token lost its tickets");
    }
}
