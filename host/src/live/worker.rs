//! Worker threads: each owns some groups, takes commits in order, evaluates, runs pipelines, encodes.
//!
//! One loop over one closed set of events. In every turn the worker takes what its mailbox holds, then the commits that
//! wait (at most [`TURN_COMMITS`]), feeds the subscribers that only wait, then takes one piece of one job, and one of one
//! result that goes through plugins: live commits go before snapshots and replays, and a flood of either cannot starve the
//! other.
//!
//! The commit thread only ever pushes to the commit tail and wakes workers ([`Mailbox::published`]): a short lock, at most
//! one message per worker and nap, and none for a commit to tables that the worker has no groups on. A worker behind the
//! commit tail reads the change log for the namespaces it has groups in; one behind the log itself ends its groups as
//! expired, and their subscribers start afresh.

mod rerun;
mod together;

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::oneshot;
use wire::frame::SectionView;
use wire::{CatalogEvent, FrameView};

use super::evaluate::{Fault, Query, Rows, Source, evaluate};
use super::event::CommitEvents;
use super::group::{Group, Registry};
use super::index::Index;
use super::job::{Job, JobError, Piece, Replayed, Snapshot, SnapshotScan, Work, replay_piece, snapshot_piece};
use super::log::{LogPiece, read_piece};
use super::outlet::FEW;
use super::requery::{Answer, RequeryError, Runs};
use super::subscription::EndReason;
use super::tail::{CommitTail, CommitsAfter, GroupEnd, lock};
use super::{Encoder, GroupSpec, LiveOptions, Pass, PipelineFault, Pipelines};
use crate::catalog::{Catalog, NamespaceId, TableId};
use crate::store::{Commit, Seq, Store, StoreError};
use crate::telemetry::Metrics;
use together::Asked;

/// Commits taken before a job gets its turn.
const TURN_COMMITS: usize = 64;

/// Groups and bytes that are appended before what is appended leaves. Others' commits and a long turn are no reason to wait,
/// and what a tail drops before it was fed would have to be read again.
const FEED_GROUPS: usize = 64;
const FEED_BYTES: usize = 64 << 10;

/// Messages taken before commits get their turn.
const TURN_EVENTS: usize = 256;

/// Groups of a busy worker that keep a piece for others: they are of the same seconds, and memory is bounded.
const KEEPING_GROUPS: usize = 64;

/// The least age at which a quiet group's tail is let go of: a reader slower than this may as well read the log.
const LEAST_TAIL_AGE: Duration = Duration::from_secs(5);

/// Behind every commit there will be.
const NEVER: Seq = Seq(u64::MAX);

/// What all workers and subscriptions of one server have in common.
pub(super) struct Shared {
    pub store: Store,
    pub commits: CommitTail,
    pub registry: Arc<Registry>,
    pub encoder: Arc<dyn Encoder>,
    pub options: LiveOptions,
    pub metrics: Arc<Metrics>,
}

/// Everything that can happen to a worker.
pub(super) enum Event {
    /// The commit tail has grown.
    Commits,
    Join {
        group: Arc<Group>,
        reply: oneshot::Sender<Joined>,
    },
    /// The group's last subscription left.
    Leave(u64),
    Job(Job),
    /// A query has been run again.
    Answered {
        group: u64,
        answer: Result<Answer, RequeryError>,
    },
    Close,
}

pub(super) enum Joined {
    Ready,
    /// The group ended meanwhile; a fresh one has to be made.
    Ended,
    Fault(PipelineFault),
}

/// The outside of a worker.
pub(super) struct Mailbox {
    events: Sender<Event>,
    /// A wake-up is in the mailbox already: the mailbox holds one at most.
    woken: AtomicBool,
    processed: AtomicU64,
    /// The commit thread looks at it, and moves `processed` on past what concerns no group, under this lock; and the worker
    /// enters here what it waits for before it looks how far everything is.
    followed: Mutex<Followed>,
}

/// What a worker wants to hear of.
#[derive(Default)]
struct Followed {
    /// What its groups read, and how many of them each table.
    tables: HashMap<TableId, usize>,
    /// Some job waits until everything is known up to a commit, whatever that is about.
    all: bool,
}

impl Mailbox {
    pub(super) fn new() -> (Arc<Self>, Receiver<Event>) {
        let (events, receiver) = mpsc::channel();
        let mailbox =
            Mailbox { events, woken: AtomicBool::new(false), processed: AtomicU64::new(0), followed: Mutex::default() };
        (Arc::new(mailbox), receiver)
    }

    /// After a push to the commit tail. A worker without groups sleeps on; it looks at the tail after its first join. So
    /// does one whose groups have nothing to do with the commit.
    pub(super) fn published(&self, commit: &Commit) {
        let followed = lock(&self.followed);
        if followed.tables.is_empty() {
            return;
        }
        if commit.catalog.is_none() && !commit.tables.iter().any(|table| followed.tables.contains_key(table)) {
            // With all that was before, the worker is through with this one as well. Else it is at work, and comes by it.
            let (before, seq) = (commit.seq.0 - 1, commit.seq.0);
            let passed = self.processed.compare_exchange(before, seq, Ordering::AcqRel, Ordering::Relaxed).is_ok();
            if !passed || !followed.all {
                return;
            }
        }
        drop(followed);
        if !self.woken.swap(true, Ordering::AcqRel) {
            self.send(Event::Commits);
        }
    }

    pub(super) fn follow(&self, spec: &GroupSpec) {
        let mut followed = lock(&self.followed);
        for (table, _) in spec.sources() {
            *followed.tables.entry(table.id).or_default() += 1;
        }
    }

    pub(super) fn unfollow(&self, spec: &GroupSpec) {
        let mut followed = lock(&self.followed);
        for (table, _) in spec.sources() {
            if let Entry::Occupied(mut groups) = followed.tables.entry(table.id) {
                *groups.get_mut() -= 1;
                if *groups.get() == 0 {
                    groups.remove();
                }
            }
        }
    }

    /// How many tables the worker's groups read.
    #[cfg(test)]
    pub(super) fn follows(&self) -> usize {
        lock(&self.followed).tables.len()
    }

    /// From here on every commit wakes the worker, or only those to what its groups read.
    pub(super) fn follow_all(&self, all: bool) {
        lock(&self.followed).all = all;
    }

    pub(super) async fn join(&self, group: Arc<Group>) -> Option<Joined> {
        let (reply, answer) = oneshot::channel();
        self.send(Event::Join { group, reply });
        answer.await.ok()
    }

    pub(super) fn leave(&self, group: u64) {
        self.send(Event::Leave(group));
    }

    pub(super) fn ask(&self, group: u64, work: Work) -> oneshot::Receiver<Piece> {
        let (reply, answer) = oneshot::channel();
        self.send(Event::Job(Job { group, work, asked: None, reply }));
        answer
    }

    pub(super) fn answered(&self, group: u64, answer: Result<Answer, RequeryError>) {
        self.send(Event::Answered { group, answer });
    }

    pub(super) fn close(&self) {
        self.send(Event::Close);
    }

    /// Never blocks. To a worker that has stopped it says nothing: whoever waits for a reply sees its sender dropped,
    /// and the groups have been ended.
    fn send(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// Events of all commits up to here are in the tails of the worker's groups, or were.
    pub(super) fn processed(&self) -> Seq {
        Seq(self.processed.load(Ordering::Acquire))
    }
}

/// A group on its worker.
struct Member {
    group: Arc<Group>,
    pipeline: Option<u64>,
    replayed: Option<Replayed>,
    snapshot: Option<Snapshot>,
    /// Where the query is run again as a whole.
    runs: Option<Runs>,
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox>,
    events: Receiver<Event>,
    pipelines: Box<dyn Pipelines>,
    members: HashMap<u64, Member>,
    index: Index,
    appended: Appended,
    jobs: VecDeque<Job>,
    /// Groups that keep a replayed piece or a snapshot, some of the last that did: let go of when there is nothing else
    /// to do, or too many.
    keeping: VecDeque<u64>,
    /// Groups to be run again, and when.
    due: BTreeSet<(Instant, u64)>,
    /// Groups with jobs that wait for a newer answer.
    awaited: BTreeSet<u64>,
    /// The commit thread was told that there are such.
    follows_all: bool,
    /// Groups whose answer is on its way through their pipeline; some may have ended.
    piping: VecDeque<u64>,
    processed: Seq,
}

/// The thread of one worker, until it is closed. However it ends, its groups end with it: no subscriber waits for ever.
pub(super) fn run(shared: Arc<Shared>, mailbox: Arc<Mailbox>, events: Receiver<Event>, pipelines: Box<dyn Pipelines>) {
    let _ender = GroupEnder { registry: Arc::clone(&shared.registry), mailbox: Arc::clone(&mailbox) };
    let mut worker = Worker {
        processed: Seq::default(),
        shared,
        mailbox,
        events,
        pipelines,
        members: HashMap::new(),
        index: Index::default(),
        appended: Appended::default(),
        jobs: VecDeque::new(),
        keeping: VecDeque::new(),
        due: BTreeSet::new(),
        awaited: BTreeSet::new(),
        follows_all: false,
        piping: VecDeque::new(),
    };
    worker.jump();
    worker.main_loop();
}

struct GroupEnder {
    registry: Arc<Registry>,
    mailbox: Arc<Mailbox>,
}

impl Drop for GroupEnder {
    fn drop(&mut self) {
        let reason = if std::thread::panicking() {
            EndReason::Store { message: "a live worker stopped because of a bug; see the server's log".to_owned() }
        } else {
            EndReason::Shutdown
        };
        self.registry.end_all(&self.mailbox, &GroupEnd::Reason(reason));
    }
}

impl Worker {
    fn main_loop(&mut self) {
        let heartbeat = self.shared.options.heartbeat;
        let mut sweep = Instant::now() + heartbeat;
        loop {
            for _ in 0..TURN_EVENTS {
                let taken = match self.events.try_recv() {
                    Ok(event) => self.take(event),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                };
                if taken.is_break() {
                    return;
                }
            }
            let more_commits = self.follow();
            self.appended.feed();
            if !self.awaited.is_empty() {
                self.serve_waiting();
            }
            if let Some(job) = self.jobs.pop_front() {
                self.work(job);
            }
            if let Some(id) = self.piping.pop_front() {
                self.pipe(id);
            }
            self.run_due();
            if Instant::now() >= sweep {
                self.members.values().for_each(|member| member.group.forget_older(heartbeat.max(LEAST_TAIL_AGE)));
                sweep = Instant::now() + heartbeat;
            }
            if more_commits || !self.jobs.is_empty() || !self.piping.is_empty() {
                continue;
            }
            let waits = !self.awaited.is_empty();
            if waits != self.follows_all {
                self.follows_all = waits;
                self.mailbox.follow_all(waits);
                // What came before that was known was passed over in silence.
                continue;
            }
            self.let_go(0);
            let until = self.due.first().map_or(sweep, |(due, _)| sweep.min(*due));
            let taken = match self.events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(event) => self.take(event),
                Err(RecvTimeoutError::Timeout) => ControlFlow::Continue(()),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if taken.is_break() {
                return;
            }
        }
    }

    fn take(&mut self, event: Event) -> ControlFlow<()> {
        match event {
            // Cleared before the tail is read: a commit pushed later finds the flag down and wakes again.
            Event::Commits => self.mailbox.woken.store(false, Ordering::Release),
            Event::Join { group, reply } => {
                let joined = self.join(&group);
                // Whoever asked may be gone; their seat has sent a `Leave` then.
                let _ = reply.send(joined);
            }
            Event::Leave(id) => drop(self.remove(id)),
            Event::Job(job) => self.jobs.push_back(job),
            Event::Answered { group, answer } => self.answered(group, answer),
            Event::Close => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    // ---- groups ----

    fn join(&mut self, group: &Arc<Group>) -> Joined {
        if group.ended().is_some() {
            return Joined::Ended;
        }
        if self.members.contains_key(&group.id) {
            return Joined::Ready;
        }
        if self.members.is_empty() {
            self.jump();
        }
        let spec = &group.spec;
        let pipeline = match (!spec.stages.is_empty()).then(|| self.pipelines.open(spec)).transpose() {
            Ok(pipeline) => pipeline,
            Err(fault) => return Joined::Fault(fault),
        };
        // From here on no commit to these tables is passed over.
        self.mailbox.follow(spec);
        self.pass_over();
        // A query that is run again has no events before its first answer, and nothing before it can be replayed.
        let runs = spec.requery.as_ref().map(|_| Runs::new());
        group.open(if runs.is_some() { NEVER } else { self.processed });
        self.index.insert(group.id, spec);
        self.members
            .insert(group.id, Member { group: Arc::clone(group), pipeline, replayed: None, snapshot: None, runs });
        // A drop or an ALTER before `processed` will not come by any more, so it is looked for; a later one will.
        if let Some(reason) = outdated(&self.shared.store.catalog(), spec) {
            self.end(group.id, GroupEnd::Reason(reason));
        } else if spec.requery.is_some() {
            self.plan_run(group.id);
        }
        Joined::Ready
    }

    fn remove(&mut self, id: u64) -> Option<Member> {
        let member = self.members.remove(&id)?;
        self.index.remove(id, &member.group.spec);
        self.awaited.remove(&id);
        if let Some(due) = member.runs.as_ref().and_then(|runs| runs.due) {
            self.due.remove(&(due, id));
        }
        if let Some(pipeline) = member.pipeline {
            self.pipelines.close(pipeline);
        }
        self.mailbox.unfollow(&member.group.spec);
        Some(member)
    }

    fn end(&mut self, id: u64, end: GroupEnd) {
        if let Some(member) = self.remove(id) {
            self.shared.registry.end(&member.group, end);
        }
    }

    fn end_where(&mut self, end: &GroupEnd, which: impl Fn(&GroupSpec) -> bool) {
        let chosen = self.members.iter().filter(|(_, member)| which(&member.group.spec));
        for id in chosen.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.end(id, end.clone());
        }
    }

    // ---- commits ----

    /// Takes the next commits; whether there may be more.
    fn follow(&mut self) -> bool {
        if self.members.is_empty() {
            return false;
        }
        self.pass_over();
        match self.shared.commits.after(self.processed, TURN_COMMITS) {
            CommitsAfter::Next(commits) => {
                for commit in &commits {
                    self.commit(commit.seq, commit.namespace, &commit.frame);
                }
                !commits.is_empty()
            }
            CommitsAfter::Behind => self.catch_up(),
        }
    }

    /// The next piece of the change log, when the commit tail no longer reaches back to this worker.
    fn catch_up(&mut self) -> bool {
        let namespaces = self.index.namespaces();
        let bytes = self.shared.options.chunk_bytes;
        match read_piece(&self.shared.store, namespaces, self.processed, None, bytes) {
            Ok(LogPiece { commits, end }) => {
                for commit in &commits {
                    self.commit(commit.seq, commit.namespace, &commit.frame);
                }
                self.advance(end);
            }
            Err(StoreError::Expired { .. }) => {
                tracing::warn!(seq = self.processed.0, "a live worker fell behind the change log; its streams resync");
                self.end_where(&GroupEnd::Expired, |_| true);
            }
            Err(error) => {
                tracing::error!(%error, "a live worker cannot read the change log; its streams end");
                self.end_where(&GroupEnd::Reason(unreadable()), |_| true);
            }
        }
        true
    }

    fn commit(&mut self, seq: Seq, namespace: NamespaceId, frame: &[u8]) {
        if self.index.has_namespace(namespace) {
            match FrameView::parse(frame) {
                Ok(view) => self.frame(seq, namespace, &view),
                Err(error) => {
                    tracing::error!(seq = seq.0, %error, "a commit cannot be read; live queries on its namespace end");
                    self.end_where(&GroupEnd::Reason(unreadable()), |spec| spec.table.namespace == namespace);
                }
            }
        }
        self.advance(seq);
    }

    fn frame(&mut self, seq: Seq, namespace: NamespaceId, view: &FrameView<'_>) {
        for event in &view.catalog {
            self.catalog_event(namespace, event);
        }
        for section in &view.sections {
            self.section(seq, view.committed_at, section);
        }
    }

    fn section(&mut self, seq: Seq, committed_at: i64, section: &SectionView<'_>) {
        let source = Source { seq, pass: Pass::Live, base: section.bytes };
        let mut tables: Vec<TableId> = Vec::new();
        for table in section.changes.iter().map(|change| TableId(change.header.table)) {
            if !tables.contains(&table) {
                tables.push(table);
            }
        }
        for table in tables {
            if !self.index.concerns(table, &section.scope) {
                continue;
            }
            let rows = Rc::new(Rows::of_section(section, table, committed_at));
            let candidates = self.index.candidates(table, &section.scope, &rows);
            let mut asked: Vec<Asked<'_>> = candidates.any.iter().map(|id| Asked::new(*id, rows.clone())).collect();
            for of_group in candidates.some.chunk_by(|(one, _), (other, _)| one == other) {
                let changes = of_group.iter().map(|(_, change)| *change);
                asked.push(Asked::new(of_group[0].0, Rc::new(rows.some(changes))));
            }
            self.shared.metrics.live_candidates.inc_by(asked.len() as u64);
            self.ask_together(&mut asked);
            for group in asked.into_iter().filter(Asked::may_match) {
                self.deliver(group, source);
            }
            for id in candidates.requery {
                self.touch(id, seq);
            }
        }
    }

    fn deliver(&mut self, Asked { id, rows, known }: Asked<'_>, source: Source<'_>) {
        let Some(member) = self.members.get(&id).filter(|member| member.knows(&rows)) else { return };
        // A plugin may take its time.
        if member.pipeline.is_some() {
            self.appended.feed();
        }
        let query = member.query(&mut *self.pipelines);
        let evaluated = evaluate(&mut Query { known, ..query }, source, &rows);
        match evaluated {
            Ok(None) => {}
            Ok(Some(events)) => self.appended.append(&self.shared, &member.group, source.seq, &events),
            // Everything up to `processed` is in the tail; nothing of this commit is.
            Err(fault) => self.end(id, GroupEnd::Reason(reason(fault, self.processed))),
        }
    }

    // ---- the catalog ----

    fn catalog_event(&mut self, namespace: NamespaceId, event: &CatalogEvent) {
        match event {
            CatalogEvent::TableCreated { .. } => {}
            CatalogEvent::TableDropped { table } => {
                for id in self.index.on_table(TableId(*table)) {
                    self.end(id, GroupEnd::Reason(EndReason::TableDropped));
                }
            }
            CatalogEvent::TableAltered { table, schema_version } => {
                // A group of this very version was planned after the ALTER, by a faster thread.
                let end = GroupEnd::Reason(EndReason::TableAltered);
                let table = TableId(*table);
                self.end_where(&end, |spec| {
                    spec.sources().any(|(known, _)| known.id == table && known.schema_version < *schema_version)
                });
            }
            CatalogEvent::PluginActivated { name, version } => {
                let end = GroupEnd::Reason(EndReason::PluginChanged { name: name.clone(), seq: self.processed });
                // A group opened with this very version was planned after the activation, by a faster thread.
                self.end_where(&end, |spec| {
                    let stages = spec.stages.iter().filter(|_| spec.table.namespace == namespace);
                    stages.clone().any(|stage| stage.name == *name && stage.version != *version)
                });
            }
            CatalogEvent::PluginDropped { name } => {
                let end = GroupEnd::Reason(EndReason::PluginDropped { name: name.clone() });
                let catalog = self.shared.store.catalog();
                // Versions are never reused: one that exists now was uploaded after this drop.
                let exists = |spec: &GroupSpec, version: u32| {
                    let versions = catalog.namespace(&spec.table.namespace_name).and_then(|ns| ns.plugins.get(name));
                    versions.is_some_and(|versions| versions.iter().any(|plugin| plugin.version == version))
                };
                self.end_where(&end, |spec| {
                    let stages = spec.stages.iter().filter(|_| spec.table.namespace == namespace);
                    stages.clone().any(|stage| stage.name == *name && !exists(spec, stage.version))
                });
            }
        }
    }

    /// To the present: what happened before concerns nobody here. Read before the catalog is (see `join`).
    fn jump(&mut self) {
        self.advance(self.shared.store.durable());
    }

    fn advance(&mut self, seq: Seq) {
        self.processed = self.processed.max(seq);
        self.mailbox.processed.fetch_max(self.processed.0, Ordering::AcqRel);
    }

    /// Goes as far as the commit thread has seen that nothing concerns this worker.
    fn pass_over(&mut self) {
        self.processed = self.processed.max(self.mailbox.processed());
    }

    // ---- jobs ----

    fn work(&mut self, job: Job) {
        // A dropped reply is the answer where the group is gone: the subscription finds the end in the group.
        let Some(member) = self.members.get(&job.group) else { return };
        if job.reply.is_closed() {
            return;
        }
        match member.runs {
            Some(_) => self.work_again(job),
            None => self.work_on(job),
        }
    }

    fn work_on(&mut self, job: Job) {
        let Some(member) = self.members.get_mut(&job.group) else { return };
        let piece = match job.work {
            Work::Snapshot { last } => {
                // What is acknowledged has to be in it, be it not synced yet.
                let now = self.processed >= self.shared.store.applied();
                match member.kept(last).filter(|_| now) {
                    Some(piece) => Ok(piece),
                    None => SnapshotScan::start(&self.shared.store, &member.group.spec, last)
                        .and_then(|scan| member.begin(&self.shared, &mut *self.pipelines, scan, last)),
                }
            }
            Work::Held { scan, last } => match member.kept(last) {
                Some(piece) => Ok(piece),
                None => member.begin(&self.shared, &mut *self.pipelines, *scan, last),
            },
            Work::Rows(scan) => snapshot_piece(&self.shared, &mut member.query(&mut *self.pipelines), scan),
            Work::Replay { after, until } => replay(&self.shared, &mut *self.pipelines, member, after, until),
        };
        if (member.replayed.is_some() || member.snapshot.is_some()) && self.keeping.back() != Some(&job.group) {
            self.keeping.push_back(job.group);
        }
        let piece = piece.unwrap_or_else(|error| match error {
            JobError::Store(StoreError::Expired { .. }) => Piece::Expired,
            JobError::Fault(fault) => Piece::Failed(reason(fault, Seq::default())),
            JobError::Outdated(reason) => Piece::Failed(reason),
            JobError::Store(error) => {
                tracing::error!(%error, "a live stream cannot be served");
                Piece::Failed(unreadable())
            }
        });
        // Whoever asked may be gone.
        let _ = job.reply.send(piece);
        self.let_go(KEEPING_GROUPS);
    }

    /// All but so many groups keep nothing any more.
    fn let_go(&mut self, most: usize) {
        while self.keeping.len() > most
            && let Some(id) = self.keeping.pop_front()
        {
            if let Some(member) = self.members.get_mut(&id) {
                (member.replayed, member.snapshot) = (None, None);
            }
        }
    }
}

/// Groups with events that subscribers who only wait have not been fed: those with few of them, so that several commits
/// leave in one write.
#[derive(Default)]
struct Appended {
    groups: Vec<Arc<Group>>,
    bytes: usize,
}

impl Appended {
    fn append(&mut self, shared: &Shared, group: &Arc<Group>, seq: Seq, events: &CommitEvents) {
        shared.metrics.events.inc_by(events.events.len() as u64);
        let mut out = Vec::new();
        shared.encoder.encode(&group.spec, events, &mut out);
        // The tail outlives this commit: it shall not hold the encoder's spare capacity.
        out.shrink_to_fit();
        self.bytes += out.len();
        group.append(seq, events.events.len(), Bytes::from(out));
        if !group.feed_many() && self.groups.last().is_none_or(|last| last.id != group.id) {
            self.groups.push(Arc::clone(group));
        }
        if self.groups.len() >= FEED_GROUPS || self.bytes >= FEED_BYTES {
            self.feed();
        }
    }

    fn feed(&mut self) {
        self.bytes = 0;
        let mut most = FEW;
        for group in self.groups.drain(..) {
            most -= group.feed_few(most);
        }
    }
}

fn replay(
    shared: &Shared,
    pipelines: &mut dyn Pipelines,
    member: &mut Member,
    after: Seq,
    until: Seq,
) -> Result<Piece, JobError> {
    let kept = member.replayed.as_ref().filter(|kept| kept.after == after && kept.end <= until);
    if let Some(kept) = kept {
        return Ok(Piece::Commits { bytes: kept.bytes.clone(), seq: kept.end });
    }
    let (bytes, end) = replay_piece(shared, &mut member.query(pipelines), after, until)?;
    member.replayed = Some(Replayed { after, bytes: bytes.clone(), end });
    Ok(Piece::Commits { bytes, seq: end })
}

impl Member {
    /// The snapshot that was sent to somebody, if that and what the group has told since is what is present now, and not
    /// much more to send than a new one would be.
    fn kept(&self, last: Option<u64>) -> Option<Piece> {
        let kept = self.snapshot.as_ref().filter(|kept| kept.last == last)?;
        let since = self.group.told_since(kept.seq)?;
        (since <= kept.bytes.len()).then(|| Piece::Rows { bytes: kept.bytes.clone(), seq: kept.seq, rest: None })
    }

    /// The first piece of a snapshot. Where it is all of it, it is kept for others.
    fn begin(
        &mut self,
        shared: &Shared,
        pipelines: &mut dyn Pipelines,
        scan: SnapshotScan,
        last: Option<u64>,
    ) -> Result<Piece, JobError> {
        let piece = snapshot_piece(shared, &mut self.query(pipelines), Box::new(scan))?;
        // Rows that expire are shown until then, and not a moment longer.
        if let Piece::Rows { bytes, seq, rest: None } = &piece
            && self.group.spec.table.ttl_micros.is_none()
        {
            self.snapshot = Some(Snapshot { seq: *seq, last, bytes: bytes.clone() });
        }
        Ok(piece)
    }

    fn query<'a>(&'a self, pipelines: &'a mut dyn Pipelines) -> Query<'a> {
        let pipeline = self.pipeline.map(|id| (pipelines, id));
        Query { spec: &self.group.spec, pipeline, known: None }
    }

    /// A group planned after an ALTER starts behind it: commits before that are none of its own, and their rows have
    /// other columns.
    fn knows(&self, rows: &Rows<'_>) -> bool {
        rows.schema_version() == Some(self.group.spec.table.schema_version)
    }
}

/// Why a query over the table as `spec` knows it cannot go on with this catalog.
pub(super) fn outdated(catalog: &Catalog, spec: &GroupSpec) -> Option<EndReason> {
    let mut reasons = spec.sources().filter_map(|(known, _)| match catalog.table_by_id(known.id) {
        None => Some(EndReason::TableDropped),
        Some(table) if table.schema_version != known.schema_version => Some(EndReason::TableAltered),
        Some(_) => None,
    });
    reasons.next()
}

fn reason(fault: Fault, seq: Seq) -> EndReason {
    match fault {
        Fault::Pipeline(fault) => EndReason::Pipeline { fault, seq },
        Fault::Program(error) => EndReason::Program { message: error.to_string(), seq },
    }
}

/// Details are in the log: clients cannot do anything with them.
fn unreadable() -> EndReason {
    EndReason::Store { message: "the server cannot read its change log; see the server's log".to_owned() }
}
