//! How many live queries one user, and one address, may have open at the same time: the rest are told to come again.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use super::error::Problem;

/// When a client that was turned away should try again.
const RETRY_AFTER_SECONDS: u32 = 10;

#[derive(Clone)]
pub struct Limits {
    per_user: usize,
    per_address: usize,
    open: Arc<Mutex<Open>>,
}

/// Only those who have something open are in here.
#[derive(Default)]
struct Open {
    users: HashMap<Arc<str>, usize>,
    addresses: HashMap<IpAddr, usize>,
}

/// Live queries counted as open until dropped.
pub struct Counted {
    limits: Limits,
    user: Arc<str>,
    address: Option<IpAddr>,
    count: usize,
}

impl Limits {
    pub fn new(per_user: usize, per_address: usize) -> Limits {
        Limits { per_user, per_address, open: Arc::default() }
    }

    /// Counts `count` more, or says which limit is in the way.
    pub fn open(&self, user: &Arc<str>, address: Option<IpAddr>, count: usize) -> Result<Counted, Problem> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let of_user = open.users.get(user).copied().unwrap_or_default();
        if of_user + count > self.per_user {
            return Err(too_many("this user has", "live.max_per_user", self.per_user));
        }
        let of_address = address.and_then(|address| open.addresses.get(&address).copied()).unwrap_or_default();
        if of_address + count > self.per_address {
            return Err(too_many("this address has", "live.max_per_address", self.per_address));
        }
        *open.users.entry(user.clone()).or_default() += count;
        if let Some(address) = address {
            *open.addresses.entry(address).or_default() += count;
        }
        drop(open);
        Ok(Counted { limits: self.clone(), user: user.clone(), address, count })
    }
}

fn too_many(who: &str, setting: &str, limit: usize) -> Problem {
    let detail = format!("{who} too many live queries open (at most {limit}); close some, or raise {setting}");
    Problem::new(429, "too_many", detail).retry_after(RETRY_AFTER_SECONDS)
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut open = self.limits.open.lock().unwrap_or_else(PoisonError::into_inner);
        less(&mut open.users, &self.user, self.count);
        if let Some(address) = &self.address {
            less(&mut open.addresses, address, self.count);
        }
    }
}

fn less<K: Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K, count: usize) {
    if let Some(open) = counts.get_mut(key) {
        *open -= count;
        if *open == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_closed_makes_room() {
        let limits = Limits::new(3, 4);
        let (alice, bob) = (Arc::<str>::from("alice"), Arc::<str>::from("bob"));
        let address = Some(IpAddr::from([127, 0, 0, 1]));
        let code = |result: Result<Counted, Problem>| result.err().map(|problem| problem.body()["detail"].to_string());
        let two = limits.open(&alice, address, 2).ok().unwrap();
        assert!(code(limits.open(&alice, address, 2)).unwrap().contains("max_per_user"));
        let one = limits.open(&alice, address, 1).ok().unwrap();
        assert!(code(limits.open(&bob, address, 2)).unwrap().contains("max_per_address"));
        assert!(limits.open(&bob, Some(IpAddr::from([127, 0, 0, 2])), 2).is_ok());
        drop(two);
        drop((limits.open(&bob, address, 3).ok().unwrap(), one));
        let open = limits.open.lock().unwrap();
        assert!(open.users.is_empty() && open.addresses.is_empty());
    }
}
