//! The time that commits are stamped with and that rows of stream tables expire by. It never goes back: not when
//! somebody sets the wall clock back, and not over a restart, whatever the wall says then. A row that was gone stays
//! gone.
//!
//! For that, every reading is covered by a mark on disk before it is used: the mark runs ahead of the readings, so that
//! one write serves all readings of the next [`AHEAD`]. After a crash time goes on from the mark, at most that much
//! early; a store that was closed leaves the mark where time was.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How far the mark runs ahead: a synced write at most so often while stream tables are read.
const AHEAD: Duration = Duration::from_secs(1);

/// Microseconds since 1970.
pub(super) type Micros = i64;

pub(super) struct Clock {
    wall: Box<dyn Fn() -> Micros + Send + Sync>,
    started: Instant,
    /// Where time stood when it was started; goes on from there even when the wall is behind it.
    origin: AtomicI64,
    newest: AtomicI64,
    /// The mark on disk.
    mark: Mutex<Micros>,
}

impl Clock {
    pub(super) fn new() -> Arc<Clock> {
        Self::with(Box::new(wall))
    }

    fn with(wall: Box<dyn Fn() -> Micros + Send + Sync>) -> Arc<Clock> {
        let started = Instant::now();
        let mark = Mutex::new(Micros::MIN);
        Arc::new(Clock { wall, started, origin: AtomicI64::new(0), newest: AtomicI64::new(0), mark })
    }

    /// Goes on from what was on disk: the mark, and the time of the last commit.
    pub(super) fn resume(&self, mark: Micros, committed_at: Micros) {
        let now = mark.max(committed_at).max((self.wall)());
        // Opening the store took a while already: counted once more, it would put time ahead of the wall for good.
        self.origin.store(now.saturating_sub(self.elapsed()), Ordering::Release);
        *self.mark.lock().unwrap_or_else(PoisonError::into_inner) = mark;
    }

    fn elapsed(&self) -> Micros {
        Micros::try_from(self.started.elapsed().as_micros()).unwrap_or(Micros::MAX)
    }

    /// For commits, whose times are on disk with them.
    pub(super) fn now(&self) -> Micros {
        let gone_on = self.origin.load(Ordering::Acquire).saturating_add(self.elapsed());
        let now = gone_on.max((self.wall)());
        self.newest.fetch_max(now, Ordering::AcqRel).max(now)
    }

    /// For tests: much later.
    #[cfg(test)]
    pub(super) fn leap(&self, micros: Micros) {
        self.origin.fetch_add(micros, Ordering::AcqRel);
    }

    /// For readers, who decide by it what is expired. `keep` makes a new mark durable, or says that it could not: then
    /// the next reading tries again, and reading goes on.
    pub(super) fn read(&self, keep: impl FnOnce(Micros) -> bool) -> Micros {
        let mut mark = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.now();
        let next = now.saturating_add(AHEAD.as_micros() as Micros);
        if now > *mark && keep(next) {
            *mark = next;
        }
        now
    }
}

fn wall() -> Micros {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as Micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(wall: &Arc<AtomicI64>) -> Arc<Clock> {
        let wall = Arc::clone(wall);
        Clock::with(Box::new(move || wall.load(Ordering::Relaxed)))
    }

    #[test]
    fn time_never_goes_back() {
        let wall = Arc::new(AtomicI64::new(5_000_000_000));
        let clock = at(&wall);
        clock.resume(0, 0);
        let mut kept = Vec::new();
        let read = |kept: &mut Vec<Micros>| {
            clock.read(|mark| {
                kept.push(mark);
                true
            })
        };
        let first = read(&mut kept);
        assert!(first >= 5_000_000_000);
        assert_eq!(kept, [first + AHEAD.as_micros() as i64]);
        // Covered by the mark already.
        read(&mut kept);
        assert_eq!(kept.len(), 1);
        // The wall leaps, and is set back.
        wall.store(9_000_000_000, Ordering::Relaxed);
        let leapt = read(&mut kept);
        assert_eq!(kept.len(), 2);
        wall.store(1, Ordering::Relaxed);
        assert!(clock.now() >= leapt);

        // A restart with the wall far behind: from the mark on, and on.
        let mark = kept[1];
        let clock = at(&wall);
        clock.resume(mark, 17);
        let (one, other) = (clock.now(), clock.now());
        assert!(mark <= one && one <= other);
        let clock = at(&wall);
        clock.resume(17, mark);
        assert!(clock.now() >= mark);
    }

    #[test]
    fn a_mark_that_could_not_be_kept_is_tried_again() {
        let clock = at(&Arc::new(AtomicI64::new(7)));
        clock.resume(0, 0);
        let mut tries = 0;
        for kept in [false, true, true] {
            clock.read(|_| {
                tries += 1;
                kept
            });
        }
        assert_eq!(tries, 2);
    }
}
