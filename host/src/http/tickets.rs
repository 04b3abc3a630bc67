//! Tickets: how EventSource, which cannot send headers, opens a live stream.
//!
//! A ticket is 256 random bits for one identity and one exact live query. It opens the stream once, within its
//! time-to-live; from then on it is good for reconnects of that very stream, which end the connection they replace.
//! So a ticket that leaks from a URL log shows at most a stream that its owner sees break. Kept in memory, hashed: a
//! restart voids tickets, and a client then asks for a new one and goes on from its last event id.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::auth::{hash, random_token, unauthorized};
use super::error::Problem;
use super::request::Asked;
use crate::db::Identity;

/// Streams of one user that may wait for their reconnect; a browser keeps a handful.
const PER_USER: usize = 256;
/// Tickets of all users: about a kilobyte each.
const TOTAL: usize = 20_000;
/// How long a closed stream may be taken up again: a laptop's night.
const IDLE: Duration = Duration::from_secs(24 * 3600);

#[derive(Clone)]
pub struct Tickets {
    ttl: Duration,
    entries: Arc<Mutex<HashMap<[u8; 32], Entry>>>,
}

struct Entry {
    who: Identity,
    request: Asked,
    /// When it ends; `None` while a stream runs.
    until: Option<Instant>,
    /// The connection that has the stream now.
    current: CancellationToken,
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
    pub fn new(ttl: Duration) -> Tickets {
        Tickets { ttl, entries: Arc::default() }
    }

    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<[u8; 32], Entry>> {
        // Entries are whole after every statement, so a panic elsewhere leaves them usable.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn issue(&self, who: Identity, request: Asked) -> Result<String, Problem> {
        let now = Instant::now();
        let mut entries = self.entries();
        entries.retain(|_, entry| entry.until.is_none_or(|until| until > now));
        let mine = entries.values().filter(|entry| entry.who.user == who.user).count();
        if mine >= PER_USER || entries.len() >= TOTAL {
            let detail = format!("too many tickets are out (at most {PER_USER} for one user); use or drop some first");
            return Err(Problem::new(429, "too_many", detail).retry_after(self.ttl.as_secs().clamp(1, 600) as u32));
        }
        let ticket = random_token();
        let request = Asked { position: None, ..request };
        let entry = Entry { who, request, until: Some(now + self.ttl), current: CancellationToken::new(), opened: 0 };
        entries.insert(hash(&ticket), entry);
        Ok(ticket)
    }

    /// The stream a ticket stands for. A query that comes with it must be the very same one.
    pub fn redeem(&self, ticket: &str, given: Option<&Asked>) -> Result<Redeemed, Problem> {
        let key = hash(ticket);
        let entries = self.entries();
        let entry = entries
            .get(&key)
            .filter(|entry| entry.until.is_none_or(|until| until > Instant::now()))
            .filter(|entry| given.is_none_or(|given| same(given, &entry.request)))
            .ok_or_else(unauthorized)?;
        Ok(Redeemed { who: entry.who.clone(), request: entry.request.clone(), key })
    }

    /// The stream is open: a connection that had it before ends.
    pub fn open(&self, redeemed: &Redeemed) -> Result<TicketUse, Problem> {
        let mut entries = self.entries();
        let entry = entries.get_mut(&redeemed.key).ok_or_else(unauthorized)?;
        entry.current.cancel();
        entry.current = CancellationToken::new();
        entry.until = None;
        entry.opened += 1;
        let (opened, replaced) = (entry.opened, entry.current.clone());
        Ok(TicketUse { tickets: self.clone(), key: redeemed.key, opened, replaced })
    }
}

impl TicketUse {
    /// Another connection took the stream over.
    pub fn replaced(&self) -> &CancellationToken {
        &self.replaced
    }
}

impl Drop for TicketUse {
    fn drop(&mut self) {
        if let Some(entry) = self.tickets.entries().get_mut(&self.key)
            && entry.opened == self.opened
        {
            entry.until = Some(Instant::now() + IDLE);
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
    use crate::catalog::OnError;
    use crate::config::Role;
    use crate::db::LiveRequest;
    use crate::live::OldMode;

    fn who(user: &str) -> Identity {
        Identity { user: Arc::from(user), role: Role::User }
    }

    fn request(sql: &str) -> Asked {
        let query = LiveRequest {
            sql: sql.to_owned(),
            params: Vec::new(),
            namespace: None,
            pipeline: Vec::new(),
            on_error: OnError::Stop,
            snapshot: None,
            last_rows: None,
            old: OldMode::Changed,
            position: None,
        };
        Asked { queries: vec![query], names: None, position: Some("1-2-3".to_owned()) }
    }

    #[test]
    fn a_ticket_is_for_one_query_of_one_user() {
        let tickets = Tickets::new(Duration::from_secs(60));
        let ticket = tickets.issue(who("alice"), request("SELECT 1")).unwrap();
        assert_eq!(&*tickets.redeem(&ticket, None).unwrap().who.user, "alice");
        assert!(tickets.redeem(&ticket, Some(&request("SELECT 1"))).is_ok());
        assert!(tickets.redeem(&ticket, Some(&request("SELECT 2"))).is_err());
        assert!(tickets.redeem("guess", None).is_err());
        assert_eq!(tickets.redeem(&ticket, None).unwrap().request.position, None);
    }

    #[test]
    fn an_unused_ticket_ends_and_an_opened_one_stays() {
        let tickets = Tickets::new(Duration::ZERO);
        let ticket = tickets.issue(who("alice"), request("SELECT 1")).unwrap();
        assert!(tickets.redeem(&ticket, None).is_err());

        let tickets = Tickets::new(Duration::from_secs(60));
        let ticket = tickets.issue(who("alice"), request("SELECT 1")).unwrap();
        let first = tickets.open(&tickets.redeem(&ticket, None).unwrap()).unwrap();
        let second = tickets.open(&tickets.redeem(&ticket, None).unwrap()).unwrap();
        assert!(first.replaced().is_cancelled() && !second.replaced().is_cancelled());
        drop(first);
        assert!(tickets.entries().values().all(|entry| entry.until.is_none()), "the stream still runs");
        drop(second);
        assert!(tickets.redeem(&ticket, None).is_ok(), "good for a reconnect");
    }

    #[test]
    fn tickets_are_bounded_per_user() {
        let tickets = Tickets::new(Duration::from_secs(60));
        for _ in 0..PER_USER {
            tickets.issue(who("alice"), request("SELECT 1")).unwrap();
        }
        assert_eq!(tickets.issue(who("alice"), request("SELECT 1")).unwrap_err().status(), 429);
        assert!(tickets.issue(who("bob"), request("SELECT 1")).is_ok());
    }
}
