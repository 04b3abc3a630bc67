//! What is known of a module's failures: rows that failed are remembered until the version changes, so that they are
//! not tried again and again; and parameter sets that keep losing instances rest for a while. [`Waste`] is a worker's: what
//! calls that came to nothing took of its time. Over their share, the modules that took it rest on that worker, with all
//! their parameter sets: each set would have five failures of its own, and everybody else on that worker waits for them.
//!
//! One [`Health`] per compiled module, shared by all workers. Plugins are pure, so a row that failed once fails always:
//! remembering it changes no result, only what it costs. Resting does not change a result either: a live query whose
//! plugin rests stops where it is and goes on from there.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::FaultCause;
use super::registry::Owner;

/// So many lost instances within the span, and the parameter set rests.
const FAILURES: usize = 5;
const SPAN: Duration = Duration::from_secs(60);

/// The first rest; each one that follows without a quiet span in between is twice as long.
const FIRST_REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(60);

/// The part of a worker's time that calls which come to nothing may take: one in so many, and so much at once.
const WASTE_SHARE: u32 = 5;
const WASTE: Duration = Duration::from_millis(200);
/// Less is not worth counting: a trap, a row that the guest refuses.
const WASTED: Duration = Duration::from_millis(1);
/// Who has taken so much of it is to blame.
const BLAME: Duration = Duration::from_millis(50);
/// Over the rows of so many owners, and it is the module.
const OWNERS: usize = 4;
/// How many may be to blame before those are forgotten whose time has come back.
const CULPRITS: usize = 256;

/// Failures remembered per module: about 1 MiB with messages. Beyond it the oldest is forgotten and costs its call again.
const REMEMBERED: usize = 4096;

/// Parameter sets of which failures are kept per module.
const SETS: usize = 1024;

/// What rests together: parameters for one input, over the rows of one owner. One user alone can never put to rest what runs
/// over rows that are not theirs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Set {
    /// The key of the setup.
    pub setup: [u8; 32],
    pub owner: Owner,
}

/// Of a row or change under a parameter set: a hash of both.
pub type UnitKey = [u8; 32];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub cause: FaultCause,
    pub message: String,
}

#[derive(Default)]
pub struct Health {
    inner: Mutex<Inner>,
    /// How many failures are remembered: with none, nobody computes a unit's key.
    remembered: AtomicUsize,
    /// How many parameter sets have failures.
    sets: AtomicUsize,
}

#[derive(Default)]
struct Inner {
    known: HashMap<UnitKey, Known>,
    order: VecDeque<UnitKey>,
    breakers: HashMap<Set, Breaker>,
}

#[derive(Debug, Default)]
struct Breaker {
    failures: VecDeque<Instant>,
    rest: Duration,
    open_until: Option<Instant>,
}

impl Health {
    pub fn remembers(&self) -> bool {
        self.remembered.load(Ordering::Acquire) > 0
    }

    pub fn known(&self, unit: &UnitKey) -> Option<Known> {
        self.inner().known.get(unit).cloned()
    }

    /// A unit failed alone.
    pub fn remember(&self, unit: UnitKey, cause: FaultCause, message: &str) {
        let mut inner = self.inner();
        if inner.known.insert(unit, Known { cause, message: message.to_owned() }).is_none() {
            inner.order.push_back(unit);
        }
        if inner.order.len() > REMEMBERED
            && let Some(oldest) = inner.order.pop_front()
        {
            inner.known.remove(&oldest);
        }
        self.remembered.store(inner.known.len(), Ordering::Release);
    }

    /// An instance was lost over the parameter set.
    pub fn lost_instance(&self, set: Set, now: Instant) {
        let mut inner = self.inner();
        if inner.breakers.len() >= SETS && !inner.breakers.contains_key(&set) {
            inner.breakers.retain(|_, breaker| breaker.failures.back().is_some_and(|last| now - *last < SPAN));
        }
        if inner.breakers.len() < SETS || inner.breakers.contains_key(&set) {
            inner.breakers.entry(set).or_default().failed(now);
        }
        self.sets.store(inner.breakers.len(), Ordering::Release);
    }

    /// Only then can a parameter set rest: everybody else is spared the lock and the clock.
    pub fn has_lost_instances(&self) -> bool {
        self.sets.load(Ordering::Acquire) > 0
    }

    /// How much longer the parameter set is not to be called.
    pub fn rests(&self, set: &Set, now: Instant) -> Option<Duration> {
        self.inner().breakers.get(set)?.rests(now)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whose calls: of a compiled module, over the rows of one owner.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Culprit {
    pub module: u64,
    pub owner: Owner,
}

/// What calls that came to nothing have taken of a worker's time.
#[derive(Debug, Default)]
pub struct Waste {
    all: Level,
    by: HashMap<Culprit, Level>,
}

impl Waste {
    /// A call came to nothing, and took this long.
    pub fn add(&mut self, culprit: Culprit, took: Duration, now: Instant) {
        if took < WASTED {
            return;
        }
        if self.by.len() >= CULPRITS {
            self.by.retain(|_, level| level.at(now) > Duration::ZERO);
        }
        self.all.add(took, now);
        self.by.entry(culprit).or_default().add(took, now);
    }

    /// Only then does anybody rest.
    pub fn is_any(&self) -> bool {
        self.all.since.is_some()
    }

    /// How much longer this one is not to be called. Over the limit, whoever is to blame rests until it is so no more.
    pub fn rests(&self, culprit: &Culprit, now: Instant) -> Option<Duration> {
        let over = self.all.at(now).checked_sub(WASTE)?;
        let blamed = |level: &Level| level.at(now) >= BLAME;
        let owners = || self.by.iter().filter(|(of, level)| of.module == culprit.module && blamed(level)).count();
        let rests = self.by.get(culprit).is_some_and(blamed) || owners() >= OWNERS;
        rests.then(|| (over * WASTE_SHARE).clamp(FIRST_REST, LONGEST_REST))
    }
}

/// Time that was taken, less what has come back since.
#[derive(Debug, Default)]
struct Level {
    level: Duration,
    since: Option<Instant>,
}

impl Level {
    fn add(&mut self, took: Duration, now: Instant) {
        (self.level, self.since) = (self.at(now) + took, Some(now));
    }

    fn at(&self, now: Instant) -> Duration {
        let since = self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        self.level.saturating_sub(since / WASTE_SHARE)
    }
}

impl Breaker {
    fn failed(&mut self, now: Instant) {
        // A quiet span forgives.
        if self.failures.back().is_some_and(|last| now - *last >= SPAN + self.rest) {
            *self = Breaker::default();
        }
        self.failures.push_back(now);
        while self.failures.front().is_some_and(|first| now - *first >= SPAN) {
            self.failures.pop_front();
        }
        // After a rest the next failure is enough: it was a try.
        let tried = self.rest > Duration::ZERO;
        if self.rests(now).is_none() && (tried || self.failures.len() >= FAILURES) {
            self.rest = if tried { (self.rest * 2).min(LONGEST_REST) } else { FIRST_REST };
            self.open_until = Some(now + self.rest);
        }
    }

    fn rests(&self, now: Instant) -> Option<Duration> {
        self.open_until.and_then(|until| until.checked_duration_since(now)).filter(|rest| !rest.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::catalog::NamespaceId;

    fn owner(user: Option<&str>) -> Owner {
        Owner { namespace: NamespaceId(1), user: user.map(Arc::from) }
    }

    fn set(setup: u8, user: Option<&str>) -> Set {
        Set { setup: [setup; 32], owner: owner(user) }
    }

    fn secs(secs: f32) -> Duration {
        Duration::from_secs_f32(secs)
    }

    #[test]
    fn five_lost_instances_in_a_minute_rest_longer_and_longer() {
        let (health, start) = (Health::default(), Instant::now());
        let rests = |at: f32| health.rests(&set(1, None), start + secs(at));
        for at in [0.0, 20.0, 40.0, 59.0] {
            health.lost_instance(set(1, None), start + secs(at));
            assert_eq!(rests(at), None);
        }
        // The first one has left the span.
        health.lost_instance(set(1, None), start + secs(60.5));
        assert_eq!(rests(60.5), None);
        health.lost_instance(set(1, None), start + secs(61.0));
        assert_eq!(rests(61.5), Some(secs(0.5)));
        assert_eq!(health.rests(&set(2, None), start + secs(61.5)), None, "other parameters do not rest");
        assert_eq!(health.rests(&set(1, Some("alice")), start + secs(61.5)), None, "nor does it over others' rows");
        assert_eq!(rests(62.0), None);
        for (at, rest) in
            [(62.0, 2.0), (64.0, 4.0), (68.0, 8.0), (76.0, 16.0), (92.0, 32.0), (124.0, 60.0), (184.0, 60.0)]
        {
            health.lost_instance(set(1, None), start + secs(at));
            assert_eq!(rests(at), Some(secs(rest)), "at {at}");
        }
        // Two quiet minutes, and it starts afresh.
        health.lost_instance(set(1, None), start + secs(320.0));
        assert_eq!(rests(320.0), None);
    }

    #[test]
    fn what_wastes_a_workers_time_rests_with_all_its_parameters() {
        let (start, millis) = (Instant::now(), Duration::from_millis);
        let at = |after: u64| start + millis(after);
        let of = |module, user| Culprit { module, owner: owner(Some(user)) };
        let shared = |module| Culprit { module, owner: owner(None) };
        let (culprit, innocent) = (shared(1), shared(2));
        let mut waste = Waste::default();
        for _ in 0..9 {
            waste.add(culprit.clone(), millis(20), start);
            // What ends at once takes nothing away.
            waste.add(innocent.clone(), Duration::from_micros(500), start);
        }
        assert_eq!(waste.rests(&culprit, start), None, "180 ms of 200");
        waste.add(innocent.clone(), millis(20), start);
        assert_eq!(waste.rests(&culprit, start), Some(FIRST_REST));
        assert_eq!(waste.rests(&innocent, start), None, "whose part in it is small goes on");
        // A fifth of the time comes back: 100 ms in half a second.
        assert_eq!(waste.rests(&culprit, at(500)), None);
        waste.add(culprit.clone(), millis(100), at(500));
        assert_eq!(waste.rests(&culprit, at(500)), Some(FIRST_REST));
        waste.add(culprit.clone(), millis(1_000), at(500));
        assert_eq!(waste.rests(&culprit, at(500)), Some(millis(5_000)));
        assert_eq!(waste.rests(&culprit, at(3_500)), Some(millis(2_000)));
        assert_eq!(waste.rests(&culprit, at(5_600)), None);
        // Long ago it was to blame, and what is wasted now is another's.
        waste.add(innocent.clone(), millis(1_000), at(100_000));
        assert_eq!(waste.rests(&culprit, at(100_000)), None);
        assert!(waste.rests(&innocent, at(100_000)).is_some());

        // One user's rows are nobody else's business; those of several say that it is the plugin.
        let mut waste = Waste::default();
        let users = ["alice", "bob", "carol", "dora"];
        for (before, user) in users.into_iter().enumerate() {
            waste.add(of(1, user), millis(250), start);
            assert!(waste.rests(&of(1, user), start).is_some());
            assert_eq!(waste.rests(&of(1, "erin"), start).is_some(), before + 1 == OWNERS);
            assert_eq!(waste.rests(&of(2, user), start), None, "another plugin");
        }
    }

    #[test]
    fn failures_are_remembered_up_to_a_bound() {
        let health = Health::default();
        assert!(!health.remembers());
        let unit = |i: usize| {
            let mut unit = [0; 32];
            unit[..8].copy_from_slice(&i.to_le_bytes());
            unit
        };
        for i in 0..REMEMBERED + 2 {
            health.remember(unit(i), FaultCause::Trap, "unreachable");
            health.remember(unit(i), FaultCause::Trap, "unreachable");
        }
        assert!(health.remembers());
        assert_eq!(
            (health.known(&unit(1)), health.known(&unit(2)).map(|known| known.cause)),
            (None, Some(FaultCause::Trap))
        );
        assert_eq!(health.inner().order.len(), REMEMBERED);
    }
}
