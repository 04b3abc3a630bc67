//! Events of the present minute, counted: equal ones together, and only so many different ones of one action by one actor.
//! Those beyond are one record of the actor, `others`: whoever is refused again and again hides nobody else.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::Event;
use crate::store::AuditRecord;

const MINUTE: Duration = Duration::from_secs(60);
/// Of one action by one actor: somebody who is refused under ever other names makes no more records a minute. There are as
/// many actors as there are tokens, and one more, who has none.
const DIFFERENT: usize = 20;

#[derive(Default)]
pub(super) struct Window {
    events: HashMap<Event, Counted>,
    /// When the first of them came.
    since: Option<Instant>,
}

struct Counted {
    number: u64,
    /// Of the first.
    at: i64,
    count: u64,
    written: u64,
}

impl Window {
    pub(super) fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Counts an event; `number` gives that of a new record.
    pub(super) fn count(&mut self, event: Event, at: i64, now: Instant, number: impl FnOnce() -> u64) {
        self.since.get_or_insert(now);
        let is_like = |known: &Event| known.action == event.action && known.actor == event.actor;
        let different = || self.events.keys().filter(|known| is_like(known)).count();
        let event = match self.events.contains_key(&event) || different() < DIFFERENT {
            true => event,
            false => others(event),
        };
        let new = || Counted { number: number(), at, count: 0, written: 0 };
        self.events.entry(event).or_insert_with(new).count += 1;
    }

    /// The records that are not written as they are now, and how many events are new in them. With the minute over, all
    /// begins anew.
    pub(super) fn take(&mut self, now: Instant) -> (Vec<AuditRecord>, u64) {
        let (mut records, mut new) = (Vec::new(), 0);
        for (event, counted) in self.events.iter_mut().filter(|(_, counted)| counted.written < counted.count) {
            let Counted { number, at, count, written } = counted;
            records.push(AuditRecord { number: *number, at: *at, seq: None, said: event.counted(*count) });
            new += *count - *written;
            *written = *count;
        }
        if self.since.is_some_and(|since| now.saturating_duration_since(since) >= MINUTE) {
            *self = Window::default();
        }
        (records, new)
    }
}

/// From wherever it was and whatever about.
fn others(event: Event) -> Event {
    Event { address: None, what: "others".to_owned(), object: None, ..event }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Role;
    use crate::db::Identity;

    fn denied(object: &str) -> Event {
        Event::denied(None, None, "invalid token", object)
    }

    /// Number, object and count of what is written now.
    fn taken(window: &mut Window, now: Instant) -> (Vec<(u64, Option<String>, u64)>, u64) {
        let (records, new) = window.take(now);
        let shown = records.into_iter().map(|record| {
            let (event, count) = Event::decode(&record.said).unwrap();
            (record.number, event.object, count)
        });
        let mut shown: Vec<_> = shown.collect();
        shown.sort();
        (shown, new)
    }

    #[test]
    fn equal_ones_of_a_minute_are_one_record() {
        let (mut window, now) = (Window::default(), Instant::now());
        let a = |number, count| (number, Some("a".to_owned()), count);
        (0..1_000).for_each(|_| window.count(denied("a"), 5, now, || 1));
        assert_eq!(taken(&mut window, now), (vec![a(1, 1_000)], 1_000));
        assert_eq!(taken(&mut window, now), (vec![], 0));
        window.count(denied("a"), 6, now, || 2);
        window.count(denied("b"), 6, now, || 3);
        let over = now + MINUTE;
        assert_eq!(taken(&mut window, over), (vec![a(1, 1_001), (3, Some("b".to_owned()), 1)], 2));
        assert!(window.is_empty());
        window.count(denied("a"), 7, over, || 4);
        assert_eq!(taken(&mut window, over), (vec![a(4, 1)], 1));
    }

    #[test]
    fn different_ones_are_bounded_and_all_are_counted() {
        let (mut window, now) = (Window::default(), Instant::now());
        let mut number = 0;
        for name in 0..10_000 {
            window.count(denied(&name.to_string()), 5, now, || {
                number += 1;
                number
            });
        }
        // Those that are known go on, and another action has room of its own.
        window.count(denied("7"), 5, now, || panic!("it has a number"));
        window.count(Event::done(None, "ticket", "issue", "a"), 5, now, || 1_000);
        let (records, new) = taken(&mut window, now);
        assert_eq!((records.len(), new), (DIFFERENT + 2, 10_002));
        let others = (DIFFERENT as u64 + 1, None, 10_000 - DIFFERENT as u64);
        assert!(records.contains(&others), "{records:?}");
        assert!(records.contains(&(8, Some("7".to_owned()), 2)));
        assert!(records.contains(&(1_000, Some("a".to_owned()), 1)));
    }

    #[test]
    fn nobody_is_hidden_by_what_another_does() {
        let (mut window, now) = (Window::default(), Instant::now());
        let by = |user: &str, object: &str| {
            let who = Identity { user: user.into(), role: Role::User, address: None };
            Event::denied(Some(&who), None, "write", object)
        };
        let mut number = 0;
        let mut next = || {
            number += 1;
            number
        };
        for name in 0..1_000 {
            window.count(denied(&name.to_string()), 5, now, &mut next);
            window.count(by("al", &name.to_string()), 5, now, &mut next);
        }
        window.count(by("bo", "secret"), 5, now, &mut next);
        let (records, new) = window.take(now);
        let records: Vec<_> = records.into_iter().map(|record| Event::decode(&record.said).unwrap()).collect();
        assert_eq!((records.len(), new), (2 * (DIFFERENT + 1) + 1, 2_001));
        assert!(records.contains(&(by("bo", "secret"), 1)), "{records:?}");
        let beyond = 1_000 - DIFFERENT as u64;
        assert!(records.contains(&(others(by("al", "")), beyond)), "{records:?}");
        assert!(records.contains(&(others(denied("")), beyond)), "{records:?}");
    }
}
