//! What is known of a module's failures: rows that failed are remembered until the version changes, so that they are
//! not tried again and again; and parameter sets that keep losing instances rest for a while. [`Waste`] is a worker's: what
//! calls that came to nothing took of its time. Over its share, the modules that took it rest on that worker, with all
//! their parameter sets: each set would have five failures of its own, and everybody else on that worker waits for them.
//!
//! One [`Health`] per compiled module, shared by all workers. Plugins are pure, so a row that failed once fails always:
//! remembering it changes no result, only what it costs. Resting does not change a result either: a live query whose
//! plugin rests stops where it is and goes on from there.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::FaultCause;
use crate::catalog::NamespaceId;

/// So many lost instances within the span, and the parameter set rests.
const FAILURES: usize = 5;
const SPAN: Duration = Duration::from_secs(60);

/// The first rest; each one that follows without a quiet span in between is twice as long.
const FIRST_REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(60);

/// The part of a worker's time that calls which come to nothing may take: one in so many, and so much at once.
const WASTE_SHARE: u32 = 5;
const WASTE: Duration = Duration::from_millis(200);
/// Less is not worth a look at the clock: a trap, a row that the guest refuses.
const WASTED: Duration = Duration::from_millis(1);

/// Failures remembered per module: about 1 MiB with messages. Beyond it the oldest is forgotten and costs its call again.
const REMEMBERED: usize = 4096;

/// Parameter sets of which failures are kept per module.
const SETS: usize = 1024;

/// What rests together: parameters for one input, over the rows of one owner. Nobody can put to rest what runs over rows
/// that are not theirs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Set {
    /// The key of the setup.
    pub setup: [u8; 32],
    pub namespace: NamespaceId,
    /// Of a user table.
    pub user: Option<Arc<str>>,
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
    /// Whether any parameter set has failures, or any time was wasted.
    ails: AtomicBool,
}

#[derive(Default)]
struct Inner {
    known: HashMap<UnitKey, Known>,
    order: VecDeque<UnitKey>,
    breakers: HashMap<Set, Breaker>,
    /// When time was wasted on it for the last time.
    wasted: Option<Instant>,
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
        self.ails.store(true, Ordering::Release);
    }

    /// A call came to nothing that took so much of a worker's time.
    pub fn wasted(&self, took: Duration, waste: &mut Waste, now: Instant) {
        if took < WASTED {
            return;
        }
        waste.add(took, now);
        self.inner().wasted = Some(now);
        self.ails.store(true, Ordering::Release);
    }

    /// Only then can anything rest: everybody else is spared the lock and the clock.
    pub fn ails(&self) -> bool {
        self.ails.load(Ordering::Acquire)
    }

    /// How much longer the parameter set is not to be called.
    pub fn rests(&self, set: &Set, now: Instant) -> Option<Duration> {
        self.inner().breakers.get(set)?.rests(now)
    }

    /// How much longer no parameter set is to be called on a worker, where this module is one of those to blame.
    pub fn rests_all(&self, waste: &Waste, now: Instant) -> Option<Duration> {
        let rest = waste.rest(now)?;
        self.inner().wasted.is_some_and(|wasted| now - wasted < SPAN).then_some(rest)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What calls that came to nothing have taken of a worker's time, less its share since.
#[derive(Debug, Default)]
pub struct Waste {
    level: Duration,
    at: Option<Instant>,
}

impl Waste {
    fn add(&mut self, took: Duration, now: Instant) {
        (self.level, self.at) = (self.level(now) + took, Some(now));
    }

    fn level(&self, now: Instant) -> Duration {
        let since = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.level.saturating_sub(since / WASTE_SHARE)
    }

    /// Over the limit: until it is so no more, and at least for a first rest.
    fn rest(&self, now: Instant) -> Option<Duration> {
        let over = self.level(now).checked_sub(WASTE)?;
        Some((over * WASTE_SHARE).clamp(FIRST_REST, LONGEST_REST))
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
    use super::*;

    fn set(setup: u8, user: Option<&str>) -> Set {
        Set { setup: [setup; 32], namespace: NamespaceId(1), user: user.map(Arc::from) }
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
        let (health, innocent, start) = (Health::default(), Health::default(), Instant::now());
        let mut waste = Waste::default();
        let at = |millis: u64| start + Duration::from_millis(millis);
        let millis = Duration::from_millis;
        assert!(!health.ails());
        for _ in 0..9 {
            health.wasted(millis(20), &mut waste, start);
            // What ends at once takes nothing away.
            health.wasted(Duration::from_micros(500), &mut waste, start);
        }
        assert!(health.ails());
        assert_eq!(health.rests_all(&waste, start), None, "180 ms of 200");
        health.wasted(millis(20), &mut waste, start);
        assert_eq!(health.rests_all(&waste, start), Some(FIRST_REST));
        assert_eq!(innocent.rests_all(&waste, start), None, "who has wasted nothing goes on");
        assert_eq!(health.rests_all(&Waste::default(), start), None, "on another worker, too");
        // A fifth of the time comes back: 100 ms in half a second.
        assert_eq!(health.rests_all(&waste, at(500)), None);
        health.wasted(millis(100), &mut waste, at(500));
        assert_eq!(health.rests_all(&waste, at(500)), Some(FIRST_REST));
        health.wasted(millis(1_000), &mut waste, at(500));
        assert_eq!(health.rests_all(&waste, at(500)), Some(millis(5_000)));
        assert_eq!(health.rests_all(&waste, at(3_500)), Some(millis(2_000)));
        assert_eq!(health.rests_all(&waste, at(5_600)), None);
        // Long ago it was to blame, and what is wasted now is another's.
        let mut another = Waste::default();
        innocent.wasted(millis(1_000), &mut another, at(100_000));
        assert_eq!(health.rests_all(&another, at(100_000)), None);
        assert!(innocent.rests_all(&another, at(100_000)).is_some());
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
