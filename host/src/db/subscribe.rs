//! A live stream from request to end: compile, find or make the group, and what follows when the group ends.
//!
//! [`LiveStream`] keeps the request, because a resync compiles it again: a plugin may have another version, a position
//! may be older than the log. Between two deliveries the stream is a cursor; rows and encoded events belong to the group,
//! and the request and what it was compiled to are one for all who asked the same. The heartbeat belongs to
//! whoever sends: they ask for the [`progress`](LiveStream::progress) at each beat.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use wire::{Schema, Scope};

use super::adapters::{PlanProgram, unfit};
use super::compiled::{Compiled, Whose};
use super::fingerprint::{Fingerprint, Same};
use super::install::stored_version;
use super::rerun::{QueryRunner, WholeProgram};
use super::streams::{Common, Listed, Shown, mode};
use super::uses::InUse;
use super::{
    Db, DbError, Identity, LiveOutput, LiveRequest, ResyncReason, SqlAnswer, SqlRequest, StageRequest, StatementResult,
    blocking,
};
use crate::catalog::{Anchors, Catalog, OnError, Semantics, Table};
use crate::live::position::Position;
use crate::live::{
    AnyOutlet, Delivery, EndReason, From, GroupSpec, OldMode, PipelineFault, Rerun, SubscribeError, Subscription,
};
use crate::plugins::{Opened, PluginError, Stage};
use crate::sql::live::requery::RequeryPlan;
use crate::sql::live::{Live, LiveCommand, LivePlan, describe};
use crate::sql::{OutputColumn, RequestEnv, RowStream, SqlError};
use crate::store::keys::KeyRange;
use crate::store::{Seq, StoreError};

/// A wait without an end, for timers that need one.
const FAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// The most stages of one pipeline.
const MAX_STAGES: usize = 8;

/// A running live query.
pub struct LiveStream {
    db: Db,
    who: Identity,
    /// What the client holds was made by this.
    spec: Arc<GroupSpec>,
    /// The version of the catalog that it was compiled against.
    catalog_version: u64,
    state: State,
    /// Where it was joined, until it is known that no plugin was activated meanwhile.
    unchecked: Option<From>,
    /// The request being compiled again, against a catalog of this version or a newer one.
    compiling: Option<(u64, JoinHandle<Result<Compiled, DbError>>)>,
    /// A seat being taken.
    seating: Option<Box<Seating>>,
    /// Why it waits, until it runs again: what the client knows is not told twice.
    told: Option<Box<PipelineFault>>,
    /// What is to be said before the state is asked again.
    queue: VecDeque<LiveOutput>,
    _uses: Option<Box<InUse>>,
    listed: Listed,
}

enum State {
    Running(Subscription),
    /// To be compiled and joined again; the next event says why.
    Rejoin(Rejoin),
    /// The pipeline failed: until another version of one of its plugins is active, or the plugin has rested.
    AwaitPlugin {
        catalog: watch::Receiver<u64>,
        /// How it goes on.
        then: Rejoin,
        rested: Option<Instant>,
        /// The catalog has changed, and nobody has looked yet whether that is the version waited for.
        changed: bool,
        /// On a row, which the same bytes would again. What did not fit may come to.
        failed: bool,
    },
    Done,
}

struct Seating {
    spec: Arc<GroupSpec>,
    asked: From,
    /// What that means for the spec.
    from: From,
    task: JoinHandle<Result<Subscription, SubscribeError>>,
}

#[derive(Clone, Copy)]
enum Rejoin {
    /// What the client holds is void.
    Resync(ResyncReason),
    /// A plugin of the pipeline changed at this position: void only if this stream follows that change.
    Plugin(Seq),
}

/// What a stream says before its events.
enum Opening {
    Plain,
    Resync(ResyncReason),
    /// A feed that goes on with other versions than it had.
    OtherVersions,
}

impl Db {
    /// Opens a live query. Everything that can be wrong with the request is said here, before the stream starts.
    ///
    /// Who comes back with a position ran through a version that fit: it is the active one that does not, and the next
    /// may. So that client is to try again; an open stream waits in its place.
    pub async fn subscribe(&self, who: &Identity, request: LiveRequest) -> Result<LiveStream, DbError> {
        self.check_open()?;
        let follows: Vec<String> = match &request.position {
            Some(_) => request.pipeline.iter().map(|stage| stage.plugin.clone()).collect(),
            None => Vec::new(),
        };
        self.open_live(who, request).await.map_err(|error| match error {
            // One that is pinned has its name and more.
            DbError::Stage { stage, error } if follows.contains(&stage.name) => DbError::Busy(format!(
                "{error}; version {} of plugin \"{}\" is active, and the stream goes on with one that fits",
                stage.version, stage.name
            )),
            error => error,
        })
    }

    async fn open_live(&self, who: &Identity, mut request: LiveRequest) -> Result<LiveStream, DbError> {
        let Compiled { spec, shown, catalog_version, .. } = self.compile(who, &request).await?;
        if spec.semantics == Semantics::Feed && (request.snapshot == Some(true) || request.last_rows.is_some()) {
            return Err(DbError::BadRequest(
                "a pipeline that sees changes has no snapshot: leave `snapshot` and `last_rows` out, or say \
                 `snapshot=false`"
                    .into(),
            ));
        }
        // (Who comes back may have had rows when that was said, and a version of the plugin that sees none.)
        let anew = request.position.is_none();
        if spec.semantics == Semantics::Feed && anew && request.old != OldMode::default() {
            return Err(DbError::BadRequest(
                "a pipeline that sees changes tells no old values: leave `old` out".into(),
            ));
        }
        // Not in what streams have in common: with it hardly two requests would be the same.
        let position = request.position.take();
        // Before it is asked whether it was killed: from here on a kill finds it.
        let listed = Listed::new(self, who, Common { spec: spec.clone(), shown, request });
        let (from, opening) = self.resolve_position(who, &listed, position)?;
        // Whatever is compiled later, the request names the same plugins.
        let plugin = |stage: &Stage| (spec.table.namespace_name.clone(), stage.name.clone());
        let uses = self.inner.plugin_uses.enter(spec.stages.iter().map(plugin).collect())?;
        let mut stream = LiveStream {
            db: self.clone(),
            who: who.clone(),
            spec,
            catalog_version,
            _uses: uses,
            listed,
            state: State::Done,
            unchecked: None,
            compiling: None,
            seating: None,
            told: None,
            queue: VecDeque::new(),
        };
        stream.join(from, opening).await.map_err(subscribe_error)?;
        stream.check_activation().await?;
        Ok(stream)
    }

    pub(super) async fn compile(&self, who: &Identity, request: &LiveRequest) -> Result<Compiled, DbError> {
        let catalog = self.inner.store.catalog().version;
        self.inner.compiled.get(catalog, who, request, self.compile_anew(who, request)).await
    }

    async fn compile_anew(&self, who: &Identity, request: &LiveRequest) -> Result<Compiled, DbError> {
        let permit = self.inner.compilers.clone().acquire_owned().await;
        let permit = permit.map_err(|error| DbError::Internal(error.to_string()))?;
        let snapshot = self.inner.store.snapshot();
        let env = self.env(who, snapshot, request.namespace.clone(), request.params.clone())?;
        let (db, request, runtime) = (self.clone(), request.clone(), Handle::current());
        blocking(move || {
            // Held by the work itself, which goes on if nobody waits for it any more.
            let _permit = permit;
            db.inner.metrics.live_compiles.inc();
            match db.inner.sql.live(&request.sql, &env)? {
                Live::Incremental(plan) => db.incremental(plan, &request, &env),
                Live::Requery(plan) => db.requery(plan, &request, &env, runtime),
            }
        })
        .await?
    }

    fn incremental(&self, plan: LivePlan, request: &LiveRequest, env: &RequestEnv) -> Result<Compiled, DbError> {
        let table = plan.table.clone();
        may_read(&env.namespace, &table, &request.pipeline)?;
        let stages = resolve_stages(&env.catalog, &env.namespace, &request.pipeline)?;
        let (output, semantics) = match stages.is_empty() {
            true if request.on_error != OnError::Stop => return Err(no_plugin()),
            true => (None, Semantics::Map),
            false => {
                let checked = self.check_pipeline(&table, &stages, &table.schema(), request.on_error)?;
                (checked.output, checked.semantics)
            }
        };
        let key = table.key_schema().columns.into_iter().map(|column| column.name).collect();
        let shown = Shown { columns: shown(&plan.columns, output.as_ref()), key };
        let sources = [(&plan.table, &plan.scope)].into_iter();
        let fingerprint = Fingerprint::new(plan.fingerprint, sources, &stages, request, semantics);
        let of_plan = plan.fingerprint;
        let whose = match (plan.names_user, &plan.scope) {
            (true, _) => Whose::User,
            (false, Scope::User(_)) => Whose::OwnRows,
            (false, Scope::Shared) => Whose::Everybody,
        };
        let spec = GroupSpec {
            key: fingerprint.key(),
            live_id: fingerprint.live_id(),
            fingerprint: fingerprint.text(),
            epoch: self.inner.store.epoch(),
            table,
            scope: plan.scope.clone(),
            requery: None,
            range: plan.range.clone(),
            index: describe(&plan.table, &plan.anchors),
            anchors: plan.anchors.clone(),
            program: Arc::new(PlanProgram(plan)),
            stages,
            semantics,
            on_error: request.on_error,
            output,
            old: request.old,
        };
        Ok(compiled(spec, shown, env, of_plan, whose))
    }

    /// A query that is run again as a whole.
    fn requery(
        &self,
        plan: RequeryPlan,
        request: &LiveRequest,
        env: &RequestEnv,
        runtime: Handle,
    ) -> Result<Compiled, DbError> {
        if request.last_rows.is_some() {
            let hint = "its rows are in no table's key order; say ORDER BY … LIMIT in the query";
            return Err(unsupported("last_rows on a query that is run again as a whole", hint));
        }
        let Some((table, scope)) = plan.tables.first().cloned() else {
            return Err(DbError::Internal("a live query without a table".into()));
        };
        for (table, _) in &plan.tables {
            may_read(&env.namespace, table, &request.pipeline)?;
        }
        let stages = resolve_stages(&env.catalog, &env.namespace, &request.pipeline)?;
        let (input, output) = match stages.is_empty() {
            true if request.on_error != OnError::Stop => return Err(no_plugin()),
            true => (Schema::default(), None),
            false => self.over_results(&plan, &table, &stages, request, env)?,
        };
        let sources = plan.tables.iter().map(|(table, scope)| (table, scope));
        let fingerprint = Fingerprint::new(plan.fingerprint, sources, &stages, request, Semantics::Map);
        let fingerprint = fingerprint.asked_as(&request.pipeline);
        let of_plan = plan.fingerprint;
        let of_user = plan.names_user || plan.tables.iter().any(|(_, scope)| *scope != Scope::Shared);
        let whose = if of_user { Whose::User } else { Whose::Everybody };
        let shown = Shown { columns: shown(&plan.columns, output.as_ref()), key: plan.key.clone() };
        let plan = Arc::new(plan);
        let runner = QueryRunner {
            store: self.inner.store.clone(),
            sql: self.inner.sql.clone(),
            plan: plan.clone(),
            columns: input,
            pipeline: request.pipeline.clone(),
            stages: stages.clone(),
            namespace: env.namespace.clone(),
            user: env.user.clone(),
            role: env.role,
            limit: self.inner.live_options.requery_bytes,
            permits: self.inner.requeries.clone(),
            runtime,
        };
        let spec = GroupSpec {
            key: fingerprint.key(),
            live_id: fingerprint.live_id(),
            fingerprint: fingerprint.text(),
            epoch: self.inner.store.epoch(),
            table,
            scope,
            requery: Some(Rerun { runner: Arc::new(runner), sources: plan.tables.clone() }),
            range: KeyRange::all(),
            index: "changes of its tables".to_owned(),
            anchors: Anchors::Any,
            program: Arc::new(WholeProgram),
            stages,
            semantics: Semantics::Map,
            on_error: request.on_error,
            output,
            old: request.old,
        };
        Ok(compiled(spec, shown, env, of_plan, whose))
    }

    /// Checks a pipeline over the rows of results: what goes into it, and what a transform makes of that.
    ///
    /// Rows only. What differs between two results depends on which commits fell between two runs, so a feed of that
    /// would be another one after each reconnect.
    fn over_results(
        &self,
        plan: &RequeryPlan,
        table: &Table,
        stages: &[Stage],
        request: &LiveRequest,
        env: &RequestEnv,
    ) -> Result<(Schema, Option<Schema>), DbError> {
        for (asked, stage) in request.pipeline.iter().zip(stages) {
            if stored_version(&env.catalog, &env.namespace, &asked.plugin)?.kind.sees_changes() {
                let what =
                    format!("plugin {}, which sees changes, on a query that is run again as a whole", asked.plugin);
                let hint = "its results have rows and no changes of their own: take a plugin for rows, or filter and \
                            project one table";
                let error = SqlError::unsupported(what, Some(hint));
                return Err(unfit_stage(stage, PluginError::Unsupported(error.to_string())));
            }
        }
        let input = plan.schema()?;
        let checked = self.check_pipeline(table, stages, &input, request.on_error)?;
        Ok((input, checked.output))
    }

    fn check_pipeline(
        &self,
        table: &Table,
        stages: &[Stage],
        input: &Schema,
        on_error: OnError,
    ) -> Result<Opened, DbError> {
        self.inner
            .plugins
            .check(table.namespace, stages, input, on_error)
            .map_err(|error| unfit_stage(&stages[error.stage], error.error))
    }

    /// Where to start, and what to say first.
    fn resolve_position(
        &self,
        who: &Identity,
        listed: &Listed,
        position: Option<String>,
    ) -> Result<(From, Opening), DbError> {
        let (streams, request, spec) = (&self.inner.streams, &listed.common.request, &listed.common.spec);
        let Some(text) = position else {
            streams.anew(&spec.live_id, &who.user, listed.since);
            let snapshot = request.snapshot.unwrap_or(true);
            return Ok((if snapshot { present(request) } else { From::Now }, Opening::Plain));
        };
        let position: Position = text.parse().map_err(|_| {
            DbError::BadRequest(
                "the position (Last-Event-ID) is not one that this server gave; start without it".into(),
            )
        })?;
        if streams.killed(&spec.live_id, &who.user, Seq(position.seq)) {
            return Err(DbError::Gone(
                "this live query was ended by KILL LIVE QUERY; to start it anew, leave out the position".into(),
            ));
        }
        let resync = |reason| Ok((present(request), Opening::Resync(reason)));
        if position.epoch != spec.epoch.0 {
            return resync(ResyncReason::Epoch);
        }
        let same_versions = match Fingerprint::compare(&position.fingerprint, &spec.fingerprint) {
            Same::All => true,
            Same::OtherQuery => {
                return Err(DbError::BadRequest(
                    "the position (Last-Event-ID) belongs to another live query; start this one without it".into(),
                ));
            }
            Same::OtherSchema => return resync(ResyncReason::Schema),
            Same::OtherPipeline if spec.semantics == Semantics::Feed => false,
            Same::OtherPipeline => return resync(ResyncReason::Plugin),
        };
        let seq = Seq(position.seq);
        if seq > self.inner.store.applied() {
            return resync(ResyncReason::Epoch);
        }
        // A query that is run again looks at its own tail.
        if spec.requery.is_none() && seq < self.inner.store.log_floor() {
            return resync(ResyncReason::Expired);
        }
        Ok((From::After(seq), if same_versions { Opening::Plain } else { Opening::OtherVersions }))
    }
}

impl Db {
    /// EXPLAIN LIVE and KILL LIVE QUERY.
    pub(super) async fn live_command(
        &self,
        who: &Identity,
        command: LiveCommand,
        request: SqlRequest,
    ) -> Result<SqlAnswer, DbError> {
        let seq = self.inner.store.applied();
        let result = match command {
            LiveCommand::Kill(_) if request.read_only => {
                return Err(DbError::BadRequest("GET only reads; send KILL LIVE QUERY by POST".into()));
            }
            LiveCommand::Kill(live_id) => {
                crate::sql::check_params(&[], &request.params)?;
                StatementResult::Affected { affected: self.kill(who, &live_id).await?, returned: None }
            }
            LiveCommand::Explain(sql) => {
                let live =
                    LiveRequest { params: request.params, namespace: request.namespace, ..LiveRequest::new(sql) };
                StatementResult::Rows(self.explain_live(who, &live).await?)
            }
        };
        Ok(SqlAnswer { results: vec![result], seq, replayed: false })
    }

    async fn explain_live(&self, who: &Identity, request: &LiveRequest) -> Result<RowStream, DbError> {
        let compiled = self.compile(who, request).await?;
        let spec = &compiled.spec;
        let source = |(table, scope): (&Arc<Table>, &Scope)| {
            let whose = match scope {
                Scope::Shared => "shared".to_owned(),
                Scope::User(user) => format!("rows of {user}"),
            };
            format!("{}.{} ({whose})", table.namespace_name, table.name)
        };
        let plugins_see = match spec.requery {
            None => "rows of the table, or their changes",
            Some(_) => "rows of the result",
        };
        let mut said = vec![
            ("mode", mode(spec).to_owned()),
            ("semantics", spec.semantics.as_str().to_owned()),
            ("key", compiled.shown.key.join(", ")),
            ("index", spec.index.clone()),
            ("plugins_see", plugins_see.to_owned()),
            ("group", spec.live_id.clone()),
            ("scope", spec.sources().map(source).collect::<Vec<_>>().join(", ")),
        ];
        if spec.requery.is_some() {
            said.push(("interval_ms", self.inner.live_options.requery_interval.as_millis().to_string()));
        }
        Ok(crate::sql::text_rows(["property", "value"], said)?)
    }
}

impl LiveStream {
    /// `None` after the stream's end. Cancel-safe: what is under way is in the stream, not in this future. It is
    /// dropped all the time, by a stream of several queries whenever another of them has something to say.
    ///
    /// With an outlet, encoded events may go there while this waits; [`LiveOutput::Encoded`] without bytes says that its
    /// sink has something left.
    pub async fn next(&mut self, outlet: Option<&AnyOutlet>) -> Option<LiveOutput> {
        loop {
            if let Some(output) = self.queue.pop_front() {
                // Its room is that of several events, and what comes all the time never lies here.
                if self.queue.is_empty() {
                    self.queue = VecDeque::new();
                }
                return Some(output);
            }
            if let Some(from) = self.unchecked {
                let catalog = self.db.inner.catalog_version.subscribe();
                let checked = self.check_activation().await;
                // Nothing was told since it was joined.
                let then = match from {
                    From::After(seq) => Rejoin::Plugin(seq),
                    _ => Rejoin::Resync(ResyncReason::Plugin),
                };
                if let Err(error) = self.or_wait(checked, then, catalog) {
                    self.end(closed_by(error));
                }
                continue;
            }
            match &mut self.state {
                State::Done => return None,
                State::Running(subscription) => {
                    let delivery = tokio::select! {
                        biased;
                        () = self.listed.killed() => None,
                        delivery = subscription.next(outlet) => Some(delivery),
                    };
                    match delivery {
                        None => {
                            // The outlet is back: what went out of it since the kill was seen has been told as well.
                            self.listed.is_killed();
                            self.end(killed());
                        }
                        Some(Delivery::Events { bytes, .. }) => return Some(LiveOutput::Encoded(bytes)),
                        Some(Delivery::UpToDate(seq)) => {
                            return Some(LiveOutput::UpToDate { position: self.position(seq), seq });
                        }
                        Some(Delivery::Expired) => self.expired(),
                        Some(Delivery::End(reason)) => self.ended(reason),
                    }
                }
                State::Rejoin(rejoin) => {
                    let rejoin = *rejoin;
                    // In a box: it is seldom, and its locals would be a part of every stream that waits.
                    if let Err(error) = Box::pin(self.rejoin(rejoin)).await {
                        self.end(match rejoin {
                            Rejoin::Resync(ResyncReason::Schema) if no_longer_fits(&error) => {
                                self.closed_by_schema(&error)
                            }
                            _ => closed_by(error),
                        });
                    }
                }
                State::AwaitPlugin { catalog, then, changed: true, .. } => {
                    let (catalog, then) = (catalog.clone(), *then);
                    self.retry_plugin(then, catalog).await;
                }
                State::AwaitPlugin { catalog, then, rested, changed, .. } => {
                    let then = *then;
                    let rested = rested.map_or_else(|| Instant::now() + FAR, |rested| rested);
                    tokio::select! {
                        biased;
                        () = self.listed.killed() => self.end(killed()),
                        seen = catalog.changed() => match seen {
                            Err(_closed) => self.end(closed_by(DbError::Closed)),
                            Ok(()) => *changed = true,
                        },
                        () = tokio::time::sleep_until(rested) => self.state = State::Rejoin(then),
                    }
                }
            }
        }
    }

    /// How far a stream is that only waits for commits: what it says at its heartbeat. `None`: it has something to say or
    /// to do first, or holds no position.
    pub fn progress(&mut self) -> Option<LiveOutput> {
        if !self.queue.is_empty() || self.unchecked.is_some() {
            return None;
        }
        let State::Running(subscription) = &mut self.state else { return None };
        let seq = subscription.progress()?;
        Some(LiveOutput::UpToDate { position: self.position(seq), seq })
    }

    /// The request again, against the catalog as it is now. In a task: who is dropped while waiting finds it further on
    /// the next time. A query beside one that always has something to say would else begin anew for ever.
    async fn compile(&mut self) -> Result<Compiled, DbError> {
        loop {
            let begun_before = self.compiling.is_some();
            let (against, task) = self.compiling.get_or_insert_with(|| {
                let (db, who, common) = (self.db.clone(), self.who.clone(), self.listed.common.clone());
                let against = db.inner.store.catalog().version;
                (against, tokio::spawn(async move { db.compile(&who, &common.request).await }))
            });
            let against = *against;
            let joined = task.await;
            self.compiling = None;
            let compiled = joined.map_err(|error| DbError::Internal(format!("compiling a live query: {error}")))?;
            let against = compiled.as_ref().map_or(against, |compiled| compiled.catalog_version);
            if !begun_before || against == self.db.inner.store.catalog().version {
                return compiled;
            }
        }
    }

    /// A seat in the group of `spec`, and where it starts. In a task, for the same reason: what
    /// takes longer than one beat of the stream's timer would begin anew at each.
    async fn seat(&mut self, spec: &Arc<GroupSpec>, asked: From) -> Result<(Subscription, From), SubscribeError> {
        let begun = self.seating.take().filter(|begun| begun.spec.key == spec.key && begun.asked == asked);
        let seating = begun.unwrap_or_else(|| {
            let from = self.start(spec, asked);
            let (live, to) = (self.db.inner.live.clone(), spec.clone());
            let task = tokio::spawn(async move { live.subscribe(to, from).await });
            Box::new(Seating { spec: spec.clone(), asked, from, task })
        });
        let seating = self.seating.insert(seating);
        let joined = (&mut seating.task).await;
        let from = seating.from;
        self.seating = None;
        // A task that panicked has told so; only a server that goes down ends one otherwise.
        Ok((joined.map_err(|_| SubscribeError::Closed)??, from))
    }

    /// Start, where necessary a resync, and then the group's events.
    async fn join(&mut self, from: From, opening: Opening) -> Result<(), SubscribeError> {
        let spec = self.spec.clone();
        let (seat, opening) = match self.seat(&spec, from).await {
            // The log was trimmed between our look at it and the group's.
            Err(SubscribeError::Expired) => {
                let from = present(&self.listed.common.request);
                (self.seat(&spec, from).await, Opening::Resync(ResyncReason::Expired))
            }
            seat => (seat, opening),
        };
        let (subscription, from) = seat?;
        self.say_start(from);
        match opening {
            Opening::Plain => {}
            Opening::Resync(reason) => self.queue.push_back(LiveOutput::Resync(reason)),
            Opening::OtherVersions => self.queue.extend(self.spec.stages.iter().map(another_version)),
        }
        self.run(subscription, from);
        Ok(())
    }

    /// The group's spec takes the place of the one that was compiled to find the group by: they say the same, and one of
    /// its own would be most of what a stream holds. (A group may know another version of a plugin, with the same bytes;
    /// then the stream keeps its own.)
    fn run(&mut self, subscription: Subscription, from: From) {
        if subscription.spec().stages == self.spec.stages {
            self.spec = subscription.spec().clone();
        }
        self.state = State::Running(subscription);
        self.told = None;
        self.unchecked = Some(from);
    }

    /// Without present rows it starts with the next commit, and that place is fixed here: the client is told of it. What
    /// is not on disk yet is still to come as events. A feed never has present rows. (Where a result begins is known only
    /// when it has been looked at.)
    fn start(&self, spec: &GroupSpec, from: From) -> From {
        let without = spec.semantics == Semantics::Feed || (from == From::Now && spec.requery.is_none());
        match from {
            From::Snapshot | From::Last(_) | From::Now if without => From::After(self.db.inner.store.durable()),
            from => from,
        }
    }

    fn say_start(&mut self, from: From) {
        let from = match from {
            From::After(seq) => Some(self.position(seq)),
            // Of a result: its first `uptodate` says where it is.
            From::Snapshot | From::Last(_) | From::Now => None,
        };
        let spec = &self.spec;
        self.queue.push_back(LiveOutput::Start {
            live_id: spec.live_id.clone(),
            columns: self.listed.common.shown.columns.clone(),
            key: self.listed.common.shown.key.clone(),
            semantics: spec.semantics,
            requery: spec.requery.as_ref().map(|_| self.db.inner.live_options.requery_interval),
            from,
        });
    }

    /// A plugin may have been activated between compiling and joining, and the worker may have passed that commit
    /// already: then nobody would tell this stream. Seen here, it compiles again.
    async fn check_activation(&mut self) -> Result<(), DbError> {
        let Some(from) = self.unchecked else { return Ok(()) };
        let same = self.db.inner.store.catalog().version == self.catalog_version;
        if !same && !self.spec.stages.is_empty() {
            let now = self.compile().await?;
            if now.spec.fingerprint != self.spec.fingerprint {
                // A feed has delivered nothing since `from`: it goes on from there.
                self.state = State::Rejoin(match from {
                    From::After(seq) if self.spec.semantics == Semantics::Feed => Rejoin::Plugin(seq),
                    _ => Rejoin::Resync(ResyncReason::Plugin),
                });
            }
        }
        self.unchecked = None;
        Ok(())
    }

    /// What the client holds was made by `self.spec`, so that is replaced in the very step that also notes what the
    /// client has to be told. Were there an `await` between the two, a stream dropped there would compare the new one
    /// with itself when it is asked again, and tell nobody of the version.
    async fn rejoin(&mut self, rejoin: Rejoin) -> Result<(), DbError> {
        // From before anything is looked at, so that no version slips between that and the waiting for it.
        let catalog = self.db.inner.catalog_version.subscribe();
        let compiled = self.compile().await;
        // An altered table that no longer fits ends a stream, but one that was told that it waits.
        let ends = matches!(rejoin, Rejoin::Resync(ResyncReason::Schema)) && self.told.is_none();
        let compiled = match compiled {
            Err(error) if ends && no_longer_fits(&error) => return Err(error),
            compiled => self.or_wait(compiled, rejoin, catalog.clone())?,
        };
        let Some(compiled) = compiled else { return Ok(()) };
        let reason = match rejoin {
            Rejoin::Plugin(seq) if self.goes_on(&compiled, seq) => {
                match self.seat(&compiled.spec, From::After(seq)).await {
                    Ok((subscription, ..)) => {
                        self.go_on(compiled, subscription, seq);
                        return Ok(());
                    }
                    Err(SubscribeError::Expired) => ResyncReason::Expired,
                    Err(SubscribeError::Pipeline(fault)) => {
                        self.wait(fault, rejoin, catalog, false);
                        return Ok(());
                    }
                    Err(error) => return Err(subscribe_error(error)),
                }
            }
            Rejoin::Plugin(_) => ResyncReason::Plugin,
            Rejoin::Resync(reason) => reason,
        };
        if !self.replace(compiled) {
            return Ok(());
        }
        let rejoin = Rejoin::Resync(reason);
        self.state = State::Rejoin(rejoin);
        match self.join(present(&self.listed.common.request), Opening::Resync(reason)).await {
            Err(SubscribeError::Pipeline(fault)) => {
                self.wait(fault, rejoin, catalog, false);
                Ok(())
            }
            joined => joined.map_err(subscribe_error),
        }
    }

    /// From a position on with other versions, which a feed is told of. A map goes on only with the same bytes: whatever
    /// number they have now, its rows are what they were.
    fn go_on(&mut self, compiled: Compiled, subscription: Subscription, seq: Seq) {
        let (spec, common) = (self.spec.clone(), self.listed.common.clone());
        if !self.replace(compiled) {
            return;
        }
        if self.spec.semantics == Semantics::Feed {
            let stages = spec.stages.iter().zip(&self.spec.stages);
            let other = stages.filter(|(before, now)| before != now).map(|(_, now)| another_version(now));
            self.queue.extend(other.collect::<Vec<_>>());
        }
        let from = From::After(seq);
        if common.shown != self.listed.common.shown {
            self.say_start(from);
        }
        self.run(subscription, from);
    }

    /// Whether the stream goes on: it may have been killed while it was compiled, under the id that it had.
    fn replace(&mut self, compiled: Compiled) -> bool {
        let Compiled { spec, shown, catalog_version, .. } = compiled;
        if spec.live_id != self.spec.live_id {
            let request = self.listed.common.request.clone();
            let listed = Listed::new(&self.db, &self.who, Common { spec: spec.clone(), shown, request });
            if std::mem::replace(&mut self.listed, listed).leave() {
                self.end(killed());
                return false;
            }
        }
        (self.spec, self.catalog_version) = (spec, catalog_version);
        true
    }

    /// Whether what the client holds at a position is still good.
    fn goes_on(&self, now: &Compiled, seq: Seq) -> bool {
        let (before, now) = (&self.spec, &now.spec);
        match (before.semantics, now.semantics) {
            // A feed holds nothing: it goes on with the other version, each change through one of the two. What was
            // logged before the table was altered the new plan cannot read.
            // (Seq 0: it was to begin anew, and has not.)
            (Semantics::Feed, Semantics::Feed) => {
                before.table.schema_version == now.table.schema_version && seq > Seq(0)
            }
            // Pinned to a version that is still there, or tried again: the change was none of ours (seq 0: the snapshot
            // was not complete, so nothing is held that could go on).
            (Semantics::Map, Semantics::Map) => before.fingerprint == now.fingerprint && seq > Seq(0),
            _ => false,
        }
    }

    /// After a failure: goes on once the pipeline would be another one, or fits again.
    async fn retry_plugin(&mut self, then: Rejoin, seen: watch::Receiver<u64>) {
        let compiled = self.compile().await;
        let compiled = match self.or_wait(compiled, then, seen) {
            Ok(compiled) => compiled,
            Err(error) => return self.end(closed_by(error)),
        };
        let (Some(compiled), State::AwaitPlugin { changed, failed, .. }) = (compiled, &mut self.state) else {
            return;
        };
        match *failed && compiled.spec.fingerprint == self.spec.fingerprint {
            true => *changed = false,
            false => self.state = State::Rejoin(then),
        }
    }

    /// What was made against the catalog, or, where the active version of a plugin does not fit, none: then the stream
    /// waits. `seen` is the catalog that was looked at.
    fn or_wait<T>(
        &mut self,
        made: Result<T, DbError>,
        then: Rejoin,
        seen: watch::Receiver<u64>,
    ) -> Result<Option<T>, DbError> {
        match made {
            Ok(made) => Ok(Some(made)),
            Err(DbError::Stage { stage, error }) => {
                self.wait(unfit(&stage, *error), then, seen, false);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Until another version is active, which has to be of other bytes where these `failed` on a row.
    fn wait(&mut self, fault: PipelineFault, then: Rejoin, catalog: watch::Receiver<u64>, failed: bool) {
        self.unchecked = None;
        self.state = State::AwaitPlugin {
            catalog,
            then,
            rested: fault.retry_after.map(|rest| Instant::now() + rest),
            // Looked at once: another version may be active already when a slow reader hears of this.
            changed: failed,
            failed,
        };
        if self.told.as_deref() == Some(&fault) {
            return;
        }
        // Of a resync that has not begun, nothing.
        let seq = if let Rejoin::Plugin(seq) = then { seq } else { Seq(0) };
        tracing::warn!(cause = fault.cause, seq = seq.0, "{fault}; its live stream waits");
        self.told = Some(Box::new(fault.clone()));
        self.queue.push_back(LiveOutput::PluginError { fault, seq });
    }

    fn expired(&mut self) {
        let reason = match self.spec.requery {
            None => ResyncReason::Expired,
            Some(_) => ResyncReason::Requery,
        };
        self.state = State::Rejoin(Rejoin::Resync(reason));
    }

    fn ended(&mut self, reason: EndReason) {
        match reason {
            EndReason::PluginChanged { seq, .. } => self.state = State::Rejoin(Rejoin::Plugin(seq)),
            EndReason::Pipeline { fault, seq } => {
                // Subscribed before the event is told, so that an upload right after it is not missed.
                let catalog = self.db.inner.catalog_version.subscribe();
                self.wait(fault, Rejoin::Plugin(seq), catalog, true);
            }
            EndReason::Program { message, .. } => self.end(LiveOutput::Failed { message }),
            EndReason::TableDropped => self.end(LiveOutput::Closed {
                code: "table_dropped",
                message: format!("table \"{}\" was dropped", self.spec.table.name),
            }),
            EndReason::TableAltered => self.state = State::Rejoin(Rejoin::Resync(ResyncReason::Schema)),
            EndReason::PluginDropped { name } => self
                .end(LiveOutput::Closed { code: "plugin_dropped", message: format!("plugin \"{name}\" was deleted") }),
            EndReason::Store { message } => self.end(LiveOutput::Failed { message }),
            EndReason::Shutdown => self.end(LiveOutput::Closed {
                code: "shutdown",
                message: "the server is shutting down; connect again with the last id".into(),
            }),
        }
    }

    /// The altered table and the query no longer fit together.
    fn closed_by_schema(&self, error: &DbError) -> LiveOutput {
        let table = &self.spec.table.name;
        let message = format!("table \"{table}\" was altered, and the live query no longer fits it: {error}");
        LiveOutput::Closed { code: "schema", message }
    }

    fn end(&mut self, last: LiveOutput) {
        self.queue.push_back(last);
        self.state = State::Done;
        self.unchecked = None;
    }

    fn position(&self, seq: Seq) -> String {
        let spec = &self.spec;
        Position { epoch: spec.epoch.0, seq: seq.0, fingerprint: spec.fingerprint.clone() }.to_string()
    }
}

fn another_version(stage: &Stage) -> LiveOutput {
    LiveOutput::Pipeline { plugin: stage.name.clone(), version: stage.version, sha256: stage.sha256.clone() }
}

fn compiled(spec: GroupSpec, shown: Shown, env: &RequestEnv, plan: u64, whose: Whose) -> Compiled {
    Compiled { spec: Arc::new(spec), shown: Arc::new(shown), catalog_version: env.catalog.version, plan, whose }
}

/// Where a stream without a position starts, and one whose position is void.
fn present(request: &LiveRequest) -> From {
    request.last_rows.map_or(From::Snapshot, From::Last)
}

fn unfit_stage(stage: &Stage, error: PluginError) -> DbError {
    DbError::Stage { stage: Box::new(stage.clone()), error: Box::new(error) }
}

fn no_plugin() -> DbError {
    DbError::BadRequest("`on_error` says what happens when a plugin fails: name one".into())
}

fn unsupported(what: &str, hint: &str) -> DbError {
    DbError::Sql(SqlError::Unsupported { what: what.into(), hint: Some(hint.into()), position: None })
}

fn killed() -> LiveOutput {
    LiveOutput::Closed { code: "killed", message: "this live query was ended by KILL LIVE QUERY".into() }
}

fn closed_by(error: DbError) -> LiveOutput {
    match error {
        DbError::Closed => LiveOutput::Closed { code: "shutdown", message: error.to_string() },
        error => LiveOutput::Refused(Box::new(error)),
    }
}

/// Whether it is the query that is refused, or its plugin; not by a server that is full or fails.
fn no_longer_fits(error: &DbError) -> bool {
    use SqlError::{Invalid, Unsupported};
    match error {
        DbError::Stage { error, .. } => !matches!(**error, PluginError::Host(_) | PluginError::Refused(_)),
        error => matches!(error, DbError::Sql(Invalid { .. } | Unsupported { .. }) | DbError::BadRequest(_)),
    }
}

fn subscribe_error(error: SubscribeError) -> DbError {
    match error {
        SubscribeError::TooMany(_) => DbError::TooMany(error.to_string()),
        SubscribeError::Pipeline(fault) if fault.cause == "configure" => DbError::BadRequest(fault.to_string()),
        // The same pipeline was found good when the request came: it may be again.
        SubscribeError::Pipeline(fault) => DbError::Busy(fault.to_string()),
        SubscribeError::Store(error) => DbError::Store(error),
        SubscribeError::Closed => DbError::Closed,
        SubscribeError::Expired => DbError::Store(StoreError::Corrupt("a fresh snapshot is older than the log".into())),
    }
}

/// What a stream shows: the SELECT list, or what the last transform makes in its place.
fn shown(selected: &[OutputColumn], output: Option<&Schema>) -> Vec<OutputColumn> {
    match output {
        Some(schema) => schema.columns.iter().map(|c| OutputColumn { name: c.name.clone(), ty: c.ty }).collect(),
        None => selected.to_vec(),
    }
}

/// The window carries one namespace, so it is that one's plugins that may read its tables.
fn may_read(namespace: &str, table: &Table, pipeline: &[StageRequest]) -> Result<(), DbError> {
    let home = &table.namespace_name;
    if pipeline.is_empty() || namespace == home {
        return Ok(());
    }
    Err(DbError::BadRequest(format!(
        "plugins of namespace \"{namespace}\" cannot read tables of \"{home}\"; set namespace={home}"
    )))
}

/// `name`, `name@3` or `name@sha256:…` → the version that runs.
pub(super) fn resolve_stages(
    catalog: &Catalog,
    namespace: &str,
    pipeline: &[StageRequest],
) -> Result<Vec<Stage>, DbError> {
    if pipeline.len() > MAX_STAGES {
        return Err(DbError::BadRequest(format!("a pipeline has at most {MAX_STAGES} plugins")));
    }
    pipeline.iter().map(|stage| resolve_stage(catalog, namespace, stage)).collect()
}

fn resolve_stage(catalog: &Catalog, namespace: &str, stage: &StageRequest) -> Result<Stage, DbError> {
    let plugin = stored_version(catalog, namespace, &stage.plugin)?;
    Ok(Stage {
        name: plugin.name.clone(),
        version: plugin.version,
        sha256: plugin.sha256.clone(),
        params: stage.params.to_string(),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use futures::future::join_all;

    use super::*;
    use crate::config::{Config, Role};
    use crate::live::Encoder;
    use crate::live::event::CommitEvents;
    use crate::sql::Param;
    use crate::telemetry::Metrics;

    struct Silent;

    impl Encoder for Silent {
        fn encode(&self, _: &GroupSpec, _: &CommitEvents, _: &mut Vec<u8>) {}
    }

    pub(in crate::db) fn request(sql: &str, position: Option<String>) -> LiveRequest {
        LiveRequest { position, ..LiveRequest::new(sql) }
    }

    pub(in crate::db) fn who(user: &str, role: Role) -> Identity {
        Identity { user: user.into(), role, address: None }
    }

    pub(in crate::db) async fn run(db: &Db, sql: &str) {
        db.execute(&who("admin", Role::Admin), sql_request(sql)).await.unwrap();
    }

    pub(in crate::db) fn sql_request(sql: &str) -> SqlRequest {
        SqlRequest {
            sql: sql.to_owned(),
            params: Vec::new(),
            namespace: None,
            read_only: false,
            idempotency: None,
            one_result: false,
        }
    }

    async fn compiled(db: &Db, who: &Identity, sql: &str) -> Compiled {
        db.compile(who, &request(sql, None)).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn equal_live_queries_are_compiled_once() {
        let dir = tempfile::tempdir().unwrap();
        let metrics = Arc::new(Metrics::default());
        let db = Db::open(&Config::new(dir.path()), Arc::new(Silent), metrics.clone()).unwrap();
        run(&db, "CREATE TABLE t (id BIGINT PRIMARY KEY, room TEXT)").await;
        run(&db, "CREATE TABLE own (id BIGINT PRIMARY KEY, room TEXT) WITH (type = 'user')").await;
        let (alice, bob, admin) = (who("alice", Role::User), who("bob", Role::User), who("admin", Role::Admin));
        let mut before = 0;
        let mut compiles = || {
            let now = metrics.live_compiles.get();
            now - std::mem::replace(&mut before, now)
        };

        let in_a = "SELECT id FROM t WHERE room = 'a'";
        let storm = join_all((0..50).map(|_| compiled(&db, &alice, in_a))).await;
        assert_eq!(compiles(), 1, "they wait for the first");
        assert!(storm.iter().all(|one| Arc::ptr_eq(&one.spec, &storm[0].spec)));
        assert!(Arc::ptr_eq(&compiled(&db, &bob, in_a).await.spec, &storm[0].spec));
        assert_eq!(compiles(), 0);
        compiled(&db, &admin, in_a).await;
        assert_eq!(compiles(), 1, "another role");
        for id in [1, 2] {
            let params = vec![Param::Int(id)];
            let request = LiveRequest { params, ..request("SELECT id FROM t WHERE id > $1", None) };
            db.compile(&alice, &request).await.unwrap();
        }
        assert_eq!(compiles(), 2, "other parameters");

        // Everybody's own rows: one plan, each in a group of their own.
        let own = "SELECT id FROM own WHERE room = 'a'";
        let (hers, his) = (compiled(&db, &alice, own).await, compiled(&db, &bob, own).await);
        assert_eq!(compiles(), 1);
        assert_eq!((&hers.spec.scope, &his.spec.scope), (&Scope::User("alice".into()), &Scope::User("bob".into())));
        assert!(Arc::ptr_eq(&hers.spec.program, &his.spec.program));
        let anew = db.compile_anew(&bob, &request(own, None)).await.unwrap();
        let names = |of: &Compiled| (of.spec.key.clone(), of.spec.live_id.clone(), of.spec.fingerprint.clone());
        assert_eq!(names(&his), names(&anew), "as if it had been compiled for him");
        assert_ne!(names(&his), names(&hers));
        compiles();

        // What says who asks, or is run for whoever asks, is theirs alone.
        for sql in ["SELECT id FROM t WHERE room = current_user", "SELECT count(*) AS n FROM own"] {
            let (hers, his) = (compiled(&db, &alice, sql).await, compiled(&db, &bob, sql).await);
            assert_eq!(compiles(), 2, "{sql}");
            assert_ne!(hers.spec.key, his.spec.key, "{sql}");
            assert!(Arc::ptr_eq(&compiled(&db, &bob, sql).await.spec, &his.spec), "{sql}");
            assert_eq!(compiles(), 0, "{sql}");
        }

        run(&db, "ALTER TABLE t ADD COLUMN more TEXT").await;
        let altered = compiled(&db, &alice, in_a).await;
        assert_eq!(compiles(), 1, "another catalog");
        assert!(altered.spec.table.schema_version > storm[0].spec.table.schema_version);
        // A mistake is told to everybody who makes it, and not kept.
        let wrong = request("SELECT id FROM nowhere", None);
        for _ in 0..2 {
            assert!(db.compile(&alice, &wrong).await.is_err());
        }
        assert_eq!(compiles(), 2);
        db.close();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn streams_hold_once_what_they_have_in_common() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(&Config::new(dir.path()), Arc::new(Silent), Arc::new(Metrics::default())).unwrap();
        let (admin, user) = (who("admin", Role::Admin), who("alice", Role::User));
        run(&db, "CREATE TABLE t (id BIGINT PRIMARY KEY, room TEXT)").await;
        let text = "SELECT id, room FROM t WHERE room = 'a'";
        let mut first = db.subscribe(&admin, request(text, None)).await.unwrap();
        let position = first.position(db.inner.store.applied());
        let again = db.subscribe(&user, request(text, Some(position))).await.unwrap();
        let in_other_words = db.subscribe(&user, request("select id, room from t where room='a'", None)).await.unwrap();
        for other in [&again, &in_other_words] {
            assert!(Arc::ptr_eq(&first.spec, &other.spec), "one group, one spec");
        }
        assert!(Arc::ptr_eq(&first.listed.common, &again.listed.common), "the position is no part of what was asked");
        let (one, two) = (&first.listed.common, &in_other_words.listed.common);
        assert!(!Arc::ptr_eq(one, two) && Arc::ptr_eq(&one.spec, &two.spec), "each its own words");
        assert!(size_of::<LiveStream>() <= 304, "{} bytes", size_of::<LiveStream>());

        assert!(matches!(first.next(None).await, Some(LiveOutput::Start { .. })));
        assert_eq!(first.queue.capacity(), 0, "what was said leaves no room behind");
        drop((first, again, in_other_words));
        assert!(db.inner.streams.visible(&db.inner.live, &admin.user, Role::Admin).is_empty());
        db.close();
    }
}
