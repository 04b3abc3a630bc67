//! The worker's queries that are run again as a whole: when, what is done with the answers, and the jobs that wait for
//! one. The runs themselves are done elsewhere; here nothing waits for them.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::{Worker, reason};
use crate::live::job::{Job, Piece, SnapshotScan, Work};
use crate::live::requery::{Answer, Piping, Progress, RequeryError, Rerun};
use crate::live::subscription::EndReason;
use crate::live::tail::GroupEnd;
use crate::store::Seq;

impl Worker {
    pub(super) fn touch(&mut self, id: u64, seq: Seq) {
        let Some(member) = self.members.get(&id) else { return };
        // An answer may be newer than the commits that have come by here.
        if member.runs.as_ref().is_some_and(|runs| seq > runs.last()) {
            member.group.touch(seq);
            self.plan_run(id);
        }
    }

    pub(super) fn plan_run(&mut self, id: u64) {
        let interval = self.shared.options.requery_interval;
        let runs = self.members.get_mut(&id).and_then(|member| member.runs.as_mut());
        if let Some(runs) = runs.filter(|runs| !runs.running) {
            let before = runs.due;
            let due = runs.plan(interval);
            if let Some(before) = before.filter(|before| *before != due) {
                self.due.remove(&(before, id));
            }
            self.due.insert((due, id));
        }
    }

    /// Starts the runs whose time has come.
    pub(super) fn run_due(&mut self) {
        let now = Instant::now();
        while let Some(&(due, id)) = self.due.first().filter(|(due, _)| *due <= now) {
            self.due.remove(&(due, id));
            let Some(member) = self.members.get_mut(&id) else { continue };
            let (Some(runs), Some(Rerun { runner, .. })) = (&mut member.runs, &member.group.spec.requery) else {
                continue;
            };
            runs.start();
            self.shared.metrics.live_requeries.inc();
            let mailbox = Arc::clone(&self.mailbox);
            runner.run(Box::new(move |answer| mailbox.answered(id, answer)));
        }
    }

    pub(super) fn answered(&mut self, id: u64, answer: Result<Answer, RequeryError>) {
        let Some(member) = self.members.get_mut(&id) else { return };
        let Some(runs) = &mut member.runs else { return };
        match (answer, member.pipeline) {
            (Ok(answer), None) => self.take_in(id, answer),
            (Ok(answer), Some(_)) => {
                runs.piping = Some(Piping::new(answer));
                self.piping.push_back(id);
            }
            // The commit that changed the table, or the plugin, ends the group at its place.
            (Err(RequeryError::Changed), _) => runs.running = false,
            (Err(RequeryError::Failed(message)), _) => {
                let seq = runs.last();
                self.end(id, GroupEnd::Reason(EndReason::Program { message, seq }));
            }
        }
    }

    /// The next piece of an answer through its group's pipeline.
    pub(super) fn pipe(&mut self, id: u64) {
        let Some(member) = self.members.get_mut(&id) else { return };
        let Some(runs) = &mut member.runs else { return };
        let (Some(piping), Some(pipeline)) = (runs.piping.take(), member.pipeline) else { return };
        let (spec, options) = (&member.group.spec, &self.shared.options);
        match piping.step(spec, &mut *self.pipelines, pipeline, options) {
            Ok(Progress::More(piping)) => {
                runs.piping = Some(piping);
                self.piping.push_back(id);
            }
            Ok(Progress::Done(answer)) => self.take_in(id, answer),
            // The answer before stands; nothing of this one was told.
            Err(fault) => {
                let seq = runs.last();
                self.end(id, GroupEnd::Reason(reason(fault, seq)));
            }
        }
    }

    /// An answer as subscribers get to see it: the group holds it from now on.
    fn take_in(&mut self, id: u64, answer: Answer) {
        let Some(member) = self.members.get_mut(&id) else { return };
        let Some(runs) = &mut member.runs else { return };
        runs.running = false;
        let (seq, first) = (answer.seq, runs.held.is_none());
        match runs.answered(answer) {
            Ok(events) => {
                if let Some(events) = events {
                    self.appended.append(&self.shared, &member.group, seq, &events);
                }
                member.group.ran(seq);
                self.appended.feed();
                if first {
                    member.group.open(seq);
                }
            }
            Err(error) => {
                let reason = EndReason::Program { message: error.to_string(), seq: runs.last() };
                return self.end(id, GroupEnd::Reason(reason));
            }
        }
        if member.group.touched_after(seq) {
            self.plan_run(id);
        }
        self.serve_waiting();
    }

    /// Jobs whose answer has become new enough are done now.
    pub(super) fn serve_waiting(&mut self) {
        for id in self.awaited.clone() {
            let Some(member) = self.members.get_mut(&id) else { continue };
            let Some(runs) = &mut member.runs else { continue };
            // Before the first answer nothing is known, whatever the commits say.
            if runs.held.is_none() {
                continue;
            }
            let settled = member.group.settled();
            let (ready, waiting): (Vec<_>, Vec<_>) = runs.waiting.drain(..).partition(|(_, need)| settled >= *need);
            runs.waiting = waiting;
            if runs.waiting.is_empty() {
                self.awaited.remove(&id);
            }
            self.jobs.extend(ready.into_iter().map(|(job, _)| job));
        }
    }

    /// A job of a query that is run again: done at once, or put by until there is an answer as of now.
    pub(super) fn work_again(&mut self, mut job: Job) {
        let asked = *job.asked.get_or_insert_with(|| self.shared.store.applied());
        let Some(member) = self.members.get_mut(&job.group) else { return };
        let Some(runs) = &mut member.runs else { return };
        let settled = member.group.settled();
        let need = match (&runs.held, &job.work) {
            (_, Work::Rows(_) | Work::Held { .. }) => return self.work_on(job),
            (Some(held), Work::Snapshot { last }) if settled >= asked => {
                let (scan, last) = (Box::new(SnapshotScan::held(Arc::clone(held), settled, *last)), *last);
                return self.work_on(Job { work: Work::Held { scan, last }, ..job });
            }
            (Some(_), Work::Replay { after, .. }) => {
                let piece = match *after >= member.group.floor() {
                    true => Piece::Commits { bytes: Bytes::new(), seq: *after },
                    // The change log knows no results.
                    false => Piece::Expired,
                };
                // Whoever asked may be gone.
                let _ = job.reply.send(piece);
                return;
            }
            (_, Work::Snapshot { .. }) => asked,
            (None, Work::Replay { .. }) => Seq::default(),
        };
        runs.waiting.push((job, need));
        let id = member.group.id;
        self.awaited.insert(id);
        // Where nothing has changed the commits on their way here will do.
        if self.members.get(&id).is_some_and(|member| member.group.stale()) {
            self.plan_run(id);
        }
    }
}
