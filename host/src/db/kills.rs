//! KILL LIVE QUERY, remembered: a client that comes back by itself to a stream that was killed is told to stop, also by
//! a server that was started again since.
//!
//! A kill is a note in the store, written before it is acknowledged. What is added to one later (up to where its
//! streams had got, who has subscribed anew) follows within moments; a crash in between may let a killed stream that
//! had just been told more come back, or turn away one that was just subscribed anew.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::store::{NoteWrite, Seq, Store, StoreError};

/// Kills that are remembered. Clients come back within seconds, a laptop the next morning; this many outlast them.
const REMEMBERED: usize = 1_000;

/// Of the notes in the store; their keys are the numbers.
pub(super) const KIND: &str = "kill";
const RECORD_VERSION: u8 = 1;

#[derive(Default)]
pub(super) struct Kills {
    /// The number of the newest.
    count: u64,
    recent: VecDeque<Kill>,
    /// Numbers of kills that the store does not have as they are here, or still has though they are forgotten.
    unsaved: BTreeSet<u64>,
    /// What the audit log is to say of those, when the store is told.
    pub(super) audit: Vec<Vec<u8>>,
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

/// A kill as the store keeps it.
#[derive(Serialize, Deserialize)]
struct Record {
    live_id: String,
    user: Option<String>,
    seq: u64,
    anew: Vec<String>,
}

impl Kills {
    pub(super) fn load(store: &Store) -> Result<Kills, StoreError> {
        let mut kills = Kills::default();
        for (key, value) in store.notes(KIND)? {
            let number = u64::from_be_bytes(key.try_into().map_err(|_| damaged())?);
            kills.recent.push_back(Kill::decode(number, &value)?);
            kills.count = number;
        }
        Ok(kills)
    }

    /// The number of the newest.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Notes a kill; its number.
    pub(super) fn note(&mut self, live_id: &str, user: Option<Arc<str>>, seq: Seq) -> u64 {
        self.count += 1;
        let (number, live_id) = (self.count, live_id.to_owned());
        self.recent.push_back(Kill { number, live_id, user, seq, anew: HashSet::new() });
        self.unsaved.insert(number);
        if self.recent.len() > REMEMBERED {
            self.unsaved.extend(self.recent.pop_front().map(|oldest| oldest.number));
        }
        number
    }

    /// Whether a stream at this position has been killed and must not go on.
    pub(super) fn hold_back(&self, live_id: &str, user: &Arc<str>, position: Seq) -> bool {
        let mut concerned = self.recent.iter().filter(|kill| kill.concerns(live_id, user));
        concerned.any(|kill| position <= kill.seq && !kill.anew.contains(user))
    }

    /// A user subscribes without a position, after kill number `since`. Whether there is something to be saved.
    pub(super) fn anew(&mut self, live_id: &str, user: &Arc<str>, since: u64) -> bool {
        let mut changed = false;
        let before = self.recent.iter_mut().filter(|kill| kill.number <= since);
        for kill in before.filter(|kill| kill.concerns(live_id, user)) {
            if kill.anew.insert(user.clone()) {
                changed = self.unsaved.insert(kill.number) || changed;
            }
        }
        changed
    }

    /// Whether a kill after number `since` ends this stream, which has been told everything up to `told`: that shall
    /// not be a way around it. The second: whether there is something to be saved.
    pub(super) fn ends(&mut self, since: u64, live_id: &str, user: &Arc<str>, told: Seq) -> (bool, bool) {
        let mut later = self.recent.iter_mut().filter(|kill| kill.number > since);
        let Some(kill) = later.find(|kill| kill.concerns(live_id, user)) else { return (false, false) };
        if told <= kill.seq {
            return (true, false);
        }
        kill.seq = told;
        (true, self.unsaved.insert(kill.number))
    }

    /// What the store has to be told, by number; from here on it counts as told.
    pub(super) fn take_unsaved(&mut self) -> (BTreeSet<u64>, Vec<NoteWrite>) {
        let numbers = std::mem::take(&mut self.unsaved);
        let record = |number: u64| self.recent.iter().find(|kill| kill.number == number).map(Kill::encode);
        let notes = numbers.iter().map(|&number| (number.to_be_bytes().to_vec(), record(number))).collect();
        (numbers, notes)
    }

    /// The store could not be told.
    pub(super) fn not_saved(&mut self, numbers: BTreeSet<u64>) {
        self.unsaved.extend(numbers);
    }
}

impl Kill {
    fn concerns(&self, live_id: &str, user: &Arc<str>) -> bool {
        self.live_id == live_id && self.user.as_ref().is_none_or(|of| of == user)
    }

    fn encode(&self) -> Vec<u8> {
        let mut anew: Vec<String> = self.anew.iter().map(|user| user.to_string()).collect();
        anew.sort();
        let user = self.user.as_ref().map(|user| user.to_string());
        let record = Record { live_id: self.live_id.clone(), user, seq: self.seq.0, anew };
        postcard::to_extend(&record, vec![RECORD_VERSION]).expect("text and numbers have bytes")
    }

    fn decode(number: u64, bytes: &[u8]) -> Result<Kill, StoreError> {
        let bytes = bytes.strip_prefix(&[RECORD_VERSION]).ok_or_else(damaged)?;
        let record: Record = postcard::from_bytes(bytes).map_err(|_| damaged())?;
        Ok(Kill {
            number,
            live_id: record.live_id,
            user: record.user.map(Arc::from),
            seq: Seq(record.seq),
            anew: record.anew.into_iter().map(Arc::from).collect(),
        })
    }
}

fn damaged() -> StoreError {
    StoreError::Corrupt("the note of a KILL LIVE QUERY cannot be read".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> Arc<str> {
        Arc::from(name)
    }

    #[test]
    fn who_was_killed_stays_away_until_subscribing_anew() {
        let (alice, bob) = (user("alice"), user("bob"));
        let mut kills = Kills::default();
        let first = kills.note("x", Some(alice.clone()), Seq(5));
        assert!(kills.hold_back("x", &alice, Seq(5)) && !kills.hold_back("x", &alice, Seq(6)));
        assert!(!kills.hold_back("x", &bob, Seq(5)) && !kills.hold_back("y", &alice, Seq(5)));
        assert_eq!(kills.ends(first - 1, "x", &alice, Seq(8)), (true, false), "the kill itself is not saved yet");
        assert_eq!(kills.ends(first, "x", &alice, Seq(9)), (false, false), "it came after the kill");
        assert!(kills.hold_back("x", &alice, Seq(8)) && !kills.hold_back("x", &alice, Seq(9)));
        kills.take_unsaved();
        assert!(
            kills.anew("x", &alice, u64::MAX) && !kills.anew("x", &alice, u64::MAX) && !kills.anew("x", &bob, u64::MAX)
        );
        assert!(!kills.hold_back("x", &alice, Seq(5)));
        // Another kill is for the new one as well.
        kills.note("x", None, Seq(9));
        assert!(kills.hold_back("x", &alice, Seq(9)) && kills.hold_back("x", &bob, Seq(1)));
    }

    #[test]
    fn the_store_is_told_what_changed_and_what_is_forgotten() {
        let alice = user("alice");
        let mut kills = Kills::default();
        for _ in 0..=REMEMBERED {
            kills.note("x", None, Seq(300));
        }
        let (numbers, notes) = kills.take_unsaved();
        assert_eq!(notes.len(), REMEMBERED + 1);
        assert_eq!(notes[0], (1_u64.to_be_bytes().to_vec(), None));
        assert!(notes[1..].iter().all(|(_, record)| record.is_some()));
        assert!(kills.take_unsaved().1.is_empty());
        kills.not_saved(numbers);
        assert_eq!(kills.take_unsaved().1.len(), REMEMBERED + 1);
        kills.anew("x", &alice, u64::MAX);
        let (_, notes) = kills.take_unsaved();
        let (key, record) = &notes[0];
        assert_eq!(record.as_deref(), Some(&b"\x01\x01x\x00\xac\x02\x01\x05alice"[..]), "the bytes are pinned");
        let number = u64::from_be_bytes(key.clone().try_into().unwrap());
        let kill = Kill::decode(number, record.as_deref().unwrap()).unwrap();
        assert_eq!((kill.number, kill.seq, kill.anew.contains(&alice)), (2, Seq(300), true));
        assert!(Kill::decode(1, b"").is_err() && Kill::decode(1, b"\x02").is_err());
    }
}
