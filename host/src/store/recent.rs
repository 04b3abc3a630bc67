//! Who wrote which key last: the memory that first-committer-wins is decided by.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};

use super::Seq;

/// Remembers the last writer of the most recent keys, so many of them and no more.
///
/// Keys are kept as keyed 64-bit hashes: two keys that collide make a transaction plan again for nothing, never miss a
/// conflict.
pub(super) struct RecentWrites {
    hasher: RandomState,
    last: HashMap<u64, Seq>,
    /// In the order they were written; the front is forgotten first.
    order: VecDeque<(u64, Seq)>,
    capacity: usize,
    /// What was read before this seq cannot be judged any more.
    floor: Seq,
}

impl RecentWrites {
    /// Nothing before `floor` is remembered.
    pub fn new(floor: Seq, capacity: usize) -> Self {
        RecentWrites { hasher: RandomState::new(), last: HashMap::new(), order: VecDeque::new(), capacity, floor }
    }

    pub fn hash(&self, key: &[u8]) -> u64 {
        self.hasher.hash_one(key)
    }

    /// Whether reads at `base` are old enough that a conflict may have been forgotten.
    pub fn too_old(&self, base: Seq) -> bool {
        base < self.floor
    }

    /// Whether the key was written after `base`. Ask [`RecentWrites::too_old`] first.
    pub fn written_after(&self, hash: u64, base: Seq) -> bool {
        self.last.get(&hash).is_some_and(|seq| *seq > base)
    }

    pub fn record(&mut self, hash: u64, seq: Seq) {
        self.last.insert(hash, seq);
        self.order.push_back((hash, seq));
        while self.order.len() > self.capacity
            && let Some((oldest, seq)) = self.order.pop_front()
        {
            self.floor = self.floor.max(seq);
            if self.last.get(&oldest) == Some(&seq) {
                self.last.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a memory that forgets nothing: what is not `too_old` is answered exactly.
        #[test]
        fn exact_or_too_old(writes in proptest::collection::vec(0u64..12, 0..60), base in 0u64..70, capacity in 1usize..20) {
            let mut recent = RecentWrites::new(Seq(0), capacity);
            let mut all = BTreeMap::new();
            for (i, key) in writes.iter().enumerate() {
                let seq = Seq(i as u64 / 3 + 1);
                recent.record(*key, seq);
                all.insert(*key, seq);
            }
            prop_assert!(recent.order.len() <= capacity && recent.last.len() <= capacity);
            if !recent.too_old(Seq(base)) {
                for key in 0..12 {
                    let truth = all.get(&key).is_some_and(|seq| *seq > Seq(base));
                    prop_assert_eq!(recent.written_after(key, Seq(base)), truth);
                }
            }
        }
    }

    #[test]
    fn what_was_read_before_the_start_is_too_old() {
        let recent = RecentWrites::new(Seq(5), 10);
        assert!(recent.too_old(Seq(4)));
        assert!(!recent.too_old(Seq(5)));
    }
}
