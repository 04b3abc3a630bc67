//! The candidates of a commit, and predicates of one shape asked in one evaluation.
//!
//! The index looks at one condition of a predicate. What it lets through may be thousands of groups that differ in a
//! constant of another one (`room = 'a' AND heat > …`), and asked by itself each costs a batch of its own.

use std::collections::HashMap;
use std::rc::Rc;

use super::Worker;
use crate::live::evaluate::{Rows, matching_each};

/// Images of one evaluation: enough that what it costs by itself no longer counts, and some megabytes at most.
const TOGETHER: usize = 4_096;

/// A group that a commit may concern, and with which rows.
pub(super) struct Asked<'a> {
    pub id: u64,
    pub rows: Rc<Rows<'a>>,
    /// Which of them its predicate takes, if it was asked together with others.
    pub known: Option<Vec<bool>>,
}

impl<'a> Asked<'a> {
    pub(super) fn new(id: u64, rows: Rc<Rows<'a>>) -> Self {
        Asked { id, rows, known: None }
    }

    pub(super) fn may_match(&self) -> bool {
        self.known.as_ref().is_none_or(|known| known.contains(&true))
    }
}

impl Worker {
    pub(super) fn ask_together(&self, asked: &mut [Asked<'_>]) {
        let mut shapes: HashMap<usize, Vec<usize>> = HashMap::new();
        for (at, Asked { id, rows, .. }) in asked.iter().enumerate() {
            let member = self.members.get(id).filter(|member| member.knows(rows));
            if let Some(shape) = member.and_then(|member| member.group.spec.program.shape()) {
                shapes.entry(shape).or_default().push(at);
            }
        }
        for same in shapes.values() {
            let mut left = same.as_slice();
            while left.len() > 1 {
                let mut images = 0;
                let fitting = left.iter().take_while(|at| {
                    images += asked[**at].rows.count();
                    images <= TOGETHER
                });
                // One that is too large for all is asked by itself.
                let (some, later) = left.split_at(fitting.count().max(1));
                left = later;
                self.ask_some(asked, some);
            }
        }
    }

    fn ask_some(&self, asked: &mut [Asked<'_>], some: &[usize]) {
        if some.len() < 2 {
            return;
        }
        let question = |at: &usize| {
            let Asked { id, rows, .. } = &asked[*at];
            self.members.get(id).map(|member| (&*member.group.spec, &**rows))
        };
        let Some(questions) = some.iter().map(question).collect::<Option<Vec<_>>>() else { return };
        let Some(verdicts) = matching_each(&questions) else { return };
        for (at, verdict) in some.iter().zip(verdicts) {
            asked[*at].known = Some(verdict);
        }
    }
}
