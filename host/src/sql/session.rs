//! The one SessionContext of the server, and planning on top of it.
//!
//! A request takes nothing of the session's state but a reference: names come from its own catalog snapshot
//! ([`context`](super::context)), identity and snapshot travel in its task context. What is planned is kept as a template
//! ([`plans`](super::plans)); lookups and changes by key and rows of constants are not planned at all.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ::arrow::array::ArrayRef;
use ::arrow::record_batch::RecordBatch;
use datafusion::common::DataFusionError;
use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::execution::session_state::SessionStateBuilder;
use datafusion::execution::{SendableRecordBatchStream, SessionState, TaskContext};
use datafusion::logical_expr::{Explain, LogicalPlan};
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_optimizer::optimizer::PhysicalOptimizer;
use datafusion::physical_plan::{ExecutionPlan, execute_stream};
use datafusion::prelude::{SessionConfig, SessionContext};
use datafusion::sql::sqlparser::ast;
use futures::{FutureExt, StreamExt, TryStreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::context::{Names, bind, symbolic};
use super::dml::by_key;
use super::error::{from_datafusion, panicked};
use super::exact::exact;
use super::functions::with_caps;
use super::leaf::telling_wanted;
use super::mixed::marked;
use super::planner::{Planner, folding, on_fitting_stack};
use super::plans::{Key, Plans, Template, is_recursive};
use super::pool::StatementPool;
use super::provider::Providers;
use super::runner::{Batches, Runner};
use super::system::{SystemTable, SystemTables};
use super::yielding::YieldingJoins;
use super::{
    ChangeSet, DdlPlan, Load, OutputColumn, RequestEnv, Returned, RowConflict, RowFailure, RowStream, SqlError,
    SqlOptions, Statement,
};
use super::{arrow, ddl, dml, functions, gate, information, json, live, lookup, show, statement, times, values};
use crate::catalog::Table;

/// The SQL engine; one per server.
pub struct Sql {
    engine: Arc<Engine>,
    planner: Planner,
    runner: Runner,
    plans: Plans,
    /// One permit a heavy query that runs, one a heavy query that waits.
    heavy: Arc<Semaphore>,
    waiting: Semaphore,
    /// One permit a result that is read beyond its deadline.
    slow: Arc<Semaphore>,
}

type Permit = OwnedSemaphorePermit;

/// Of those that run plans: as many as a heavy query keeps busy, for each of them, and some for what is not heavy.
const THREADS_OF_A_QUERY: usize = 2;
const SPARE_THREADS: usize = 2;

/// What every request shares.
pub(crate) struct Engine {
    /// The session itself: nothing is registered in it, nothing is cloned from it after start.
    _context: SessionContext,
    pub(crate) state: Arc<SessionState>,
    /// The same with one partition, made once: what recurses runs its plan again and again, and operators that share rows
    /// out between partitions panic when they run twice.
    unshared: Arc<SessionState>,
    /// The same again, with the few rules that can change a plan which only filters, computes and cuts off.
    plain: Arc<SessionState>,
    pub(crate) providers: Providers,
    /// Of live queries.
    pub(crate) shapes: live::Shapes,
    options: SqlOptions,
    contexts_created: AtomicU64,
}

impl Sql {
    /// `tables`: the system tables that other modules fill.
    pub fn new(options: SqlOptions, tables: Vec<SystemTable>) -> Result<Sql, SqlError> {
        let tables = SystemTables::new(information::system_tables().into_iter().chain(tables));
        let plans = Plans::new(options.plan_cache_bytes);
        let (heavy, waiting) = (Semaphore::new(options.heavy_queries), Semaphore::new(options.heavy_queue));
        let runner = Runner::start(options.heavy_queries * THREADS_OF_A_QUERY + SPARE_THREADS)?;
        let engine = Arc::new(Engine::new(options, tables)?);
        let (heavy, slow) = (Arc::new(heavy), Arc::new(Semaphore::new(SLOW_READERS)));
        Ok(Sql { engine, planner: Planner::start()?, runner, plans, heavy, waiting, slow })
    }

    /// Token gate, then parse (on a thread with a large stack where it needs one), then the allow-list of statements.
    /// A text that came before is not parsed again.
    pub fn parse(&self, text: &str) -> Result<Arc<[Statement]>, SqlError> {
        if let Some(statements) = self.parsed(text) {
            return Ok(statements);
        }
        let statements: Arc<[Statement]> = statement::parse(text)?.into();
        if let Some(first) = statements.first() {
            self.plans.keep_statements(first.text.clone(), &statements);
        }
        Ok(statements)
    }

    /// The statements of a text that came before.
    pub fn parsed(&self, text: &str) -> Option<Arc<[Statement]>> {
        self.plans.statements(text)
    }

    /// Plans and starts a query; planning counts against the deadline. A lookup by key is done when this returns.
    ///
    /// `behind` others, whose results are read first, what needs a permit is only planned, and starts when it is read: it
    /// could wait for a permit that these others hold until they have been.
    pub async fn query(
        self: &Arc<Self>,
        statement: &Statement,
        env: RequestEnv,
        behind: bool,
    ) -> Result<RowStream, SqlError> {
        if let Some(lookup) = lookup::find(&statement.ast, &env) {
            return lookup.run(&env);
        }
        let asked = Instant::now();
        let template = self.template(asked, statement, &env, Engine::query_template).await?;
        if !(behind && template.heavy) {
            return self.start(asked, template, &statement.text, env).await;
        }
        let columns = arrow::output_columns(template.plan.schema().as_arrow());
        let (sql, text) = (self.clone(), statement.text.clone());
        let start = async move {
            let begun = Instant::now();
            if begun - asked > LONGEST_WAIT {
                return Err(SqlError::Deadline(sql.engine.options.deadline));
            }
            Ok(sql.start(begun, template, &text, env).await?.batches)
        };
        Ok(RowStream { columns, batches: Box::pin(futures::stream::once(start).try_flatten()) })
    }

    async fn start(
        &self,
        started: Instant,
        template: Arc<Template>,
        text: &Arc<str>,
        env: RequestEnv,
    ) -> Result<RowStream, SqlError> {
        let permit = self.admit(&template, started).await?;
        let plan = self.physical(started, &template, text, &env).await?;
        let columns = arrow::output_columns(&plan.schema());
        let longest = match (template.unhurried, permit.is_some()) {
            (true, _) => Duration::MAX,
            (false, true) => LONGEST_HELD,
            (false, false) => LONGEST_WAIT,
        };
        let clock = self.clock(started, longest);
        let batches = self.run(plan, env, text, permit, template.brief, &clock)?;
        Ok(self.engine.row_stream(columns, batches, clock))
    }

    /// The rows of RETURNING: to be read in time, as they hold memory that others wait for.
    pub fn returned(&self, returned: Returned) -> RowStream {
        let Returned { columns, batches, held } = returned;
        let batches = batches.into_iter().map(move |batch| {
            let _until_all_are_read = &held;
            Ok(batch)
        });
        let clock = self.clock(Instant::now(), LONGEST_WAIT);
        self.engine.row_stream(columns, futures::stream::iter(batches).boxed(), clock)
    }

    /// The table that a statement writes.
    pub fn written_table(&self, statement: &Statement, env: &RequestEnv) -> Result<Arc<Table>, SqlError> {
        dml::written_table(&statement.ast, env)
    }

    /// Plans INSERT, UPDATE or DELETE as a SELECT and turns its rows into a change set. Rows of constants, and the row of
    /// a whole key, are at hand without.
    pub async fn change_set(&self, statement: &Statement, env: RequestEnv) -> Result<ChangeSet, SqlError> {
        let started = Instant::now();
        let changes = |target: dml::Target| dml::Changes::new(target, &env, self.engine.state.runtime_env());
        let insert = dml::insert_of_values(statement, &env)?;
        if let Some((target, query)) = &insert
            && let Some(batch) = values::rows(query, &env)
        {
            let mut changes = changes(target.clone())?;
            changes.add(&batch)?;
            return changes.finish();
        }
        let row = by_key::row(statement, &env);
        if let Some(row) = &row
            && let Some((target, values)) = by_key::constants(statement, &env)?
        {
            let mut changes = changes(target)?;
            if let Some(stored) = row.read(&env)? {
                changes.add_row(stored, &values)?;
            }
            return changes.finish();
        }
        let make = move |engine: &Engine, statement: &Statement, env: &RequestEnv| {
            let target = match insert {
                Some(target) => target,
                None => dml::target(engine, statement, env)?,
            };
            engine.change_template(target, statement, env)
        };
        let template = self.template(started, statement, &env, make).await?;
        let Some(target) = template.target.clone() else {
            return Err(SqlError::Internal("a planned change has no target".to_owned()));
        };
        if let (Some(row), Some(plan)) = (&row, &template.row) {
            let mut changes = changes(target)?;
            if let Some(stored) = row.read(&env)? {
                let values = self.engine.new_values(plan, &stored.image, &env, &statement.text)?;
                changes.add_row(stored, &values)?;
            }
            return changes.finish();
        }
        let permit = self.admit(&template, started).await?;
        let plan = self.physical(started, &template, &statement.text, &env).await?;
        let mut changes = changes(target)?;
        let clock = self.clock(started, LONGEST_HELD);
        let mut batches = self.run(plan, env.clone(), &statement.text, permit, template.brief, &clock)?;
        let deadline = started + self.engine.options.deadline;
        while let Some(batch) = tokio::time::timeout_at(deadline.into(), batches.next())
            .await
            .map_err(|_| SqlError::Deadline(self.engine.options.deadline))?
        {
            changes.add(&batch?)?;
        }
        changes.finish()
    }

    /// The columns that rows of a bulk insert may name.
    pub fn insert_columns(&self, table: &Table) -> Vec<OutputColumn> {
        dml::given_columns(table).map(|column| OutputColumn { name: column.name.clone(), ty: column.ty }).collect()
    }

    /// Rows that are there already, their columns named as those of the table; all batches have the same. Blocks.
    pub fn insert_rows(
        &self,
        env: &RequestEnv,
        table: &str,
        conflict: RowConflict,
        batches: &[RecordBatch],
    ) -> Result<ChangeSet, RowFailure> {
        let Some(first) = batches.first() else { return Ok(ChangeSet::default()) };
        let changes = || -> Result<dml::Changes<'_>, SqlError> {
            let target = dml::rows_target(table, first.schema_ref(), conflict, env)?;
            dml::Changes::new(target, env, self.engine.state.runtime_env())
        };
        let whole = || -> Result<ChangeSet, SqlError> {
            let mut changes = changes()?;
            batches.iter().try_for_each(|batch| changes.add(batch))?;
            changes.finish()
        };
        whole().map_err(|error| {
            // Once more, row by row, to find the one it is about.
            let rows = batches.iter().flat_map(|batch| (0..batch.num_rows()).map(|row| batch.slice(row, 1)));
            let one_by_one = changes()
                .ok()
                .and_then(|mut changes| rows.enumerate().find_map(|(at, row)| Some((at, changes.add(&row).err()?))));
            match one_by_one {
                Some((row, error)) => RowFailure { error, row: Some(row) },
                None => RowFailure { error, row: None },
            }
        })
    }

    /// What a DDL statement would write to the catalog.
    pub fn ddl(&self, statement: &Statement, env: &RequestEnv) -> Result<DdlPlan, SqlError> {
        ddl::plan(statement, env)
    }

    /// Compiles a live query. Blocks.
    pub fn live(&self, text: &str, env: &RequestEnv) -> Result<live::Live, SqlError> {
        let gated = gate::check(text)?;
        super::all_used(gated.params, env.params.len())?;
        on_fitting_stack(gated.shallow, || live::compile(&self.engine, text, env))
    }

    /// Runs a compiled live query as a whole, at the snapshot and for the user of `env`.
    pub async fn rerun(
        &self,
        query: &Arc<live::requery::RequeryPlan>,
        env: RequestEnv,
        limit: usize,
    ) -> Result<live::requery::Rows, SqlError> {
        let started = Instant::now();
        let (engine, planned) = (self.engine.clone(), query.clone());
        // Planned anew each time: a physical plan keeps state from one execution to the next.
        let plan = self.planned(started, move || {
            let plan = engine.execution_plan(&planned.plan, is_recursive(&planned.plan), &planned.text);
            futures::executor::block_on(plan)
        });
        let plan = plan.await?;
        let columns = arrow::output_columns(&plan.schema());
        // How many run at once is bounded by whoever asks for them.
        let clock = self.clock(started, LONGEST_WAIT);
        let batches = self.run(plan, env, &query.text, None, false, &clock)?;
        query.collect(self.engine.row_stream(columns, batches, clock), limit).await
    }

    /// SessionContexts made since start: 1.
    pub fn contexts_created(&self) -> u64 {
        self.engine.contexts_created.load(Ordering::Relaxed)
    }

    /// What runs now.
    pub fn load(&self) -> Load {
        let options = &self.engine.options;
        Load {
            memory_bytes: self.engine.state.runtime_env().memory_pool.reserved(),
            heavy: options.heavy_queries.saturating_sub(self.heavy.available_permits()),
            waiting: options.heavy_queue.saturating_sub(self.waiting.available_permits()),
        }
    }

    /// Statements that found their plan, and those that had to be planned.
    pub fn plan_counts(&self) -> (u64, u64) {
        self.plans.counts()
    }

    /// The statement planned as far as it is the same for everybody: kept from before, or made now.
    async fn template(
        &self,
        started: Instant,
        statement: &Statement,
        env: &RequestEnv,
        make: impl FnOnce(&Engine, &Statement, &RequestEnv) -> Result<Template, SqlError> + Send + 'static,
    ) -> Result<Arc<Template>, SqlError> {
        let key = Key::new(statement, env);
        if let Some(template) = self.plans.template(&key) {
            return Ok(template);
        }
        let (engine, asked, asking) = (self.engine.clone(), statement.clone(), env.clone());
        let template = Arc::new(self.planned(started, move || make(&engine, &asked, &asking)).await?);
        self.plans.keep(key, &template);
        Ok(template)
    }

    /// A plan for one execution, and never for a second one.
    async fn physical(
        &self,
        started: Instant,
        template: &Arc<Template>,
        text: &Arc<str>,
        env: &RequestEnv,
    ) -> Result<Arc<dyn ExecutionPlan>, SqlError> {
        if template.quick {
            // Here and now: handing it to another thread would take longer than it.
            return self.engine.physical(template, env, text).await;
        }
        let (engine, template, env, text) = (self.engine.clone(), template.clone(), env.clone(), text.clone());
        self.planned(started, move || futures::executor::block_on(engine.physical(&template, &env, &text))).await
    }

    /// A permit for work that can take much more than it reads; what cannot needs none.
    async fn admit(&self, template: &Template, started: Instant) -> Result<Option<Permit>, SqlError> {
        if !template.heavy {
            return Ok(None);
        }
        if let Ok(permit) = self.heavy.clone().try_acquire_owned() {
            return Ok(Some(permit));
        }
        let options = &self.engine.options;
        let Ok(_place) = self.waiting.try_acquire() else {
            let waiting = options.heavy_queue;
            return Err(SqlError::Busy(format!("{waiting} queries wait for their turn already (sql.heavy_queue)")));
        };
        match tokio::time::timeout_at((started + options.deadline).into(), self.heavy.clone().acquire_owned()).await {
            Ok(permit) => permit.map(Some).map_err(|error| SqlError::Internal(error.to_string())),
            Err(_) => {
                Err(SqlError::Busy(format!("the query waited for its turn for {:?}; try again", options.deadline)))
            }
        }
    }

    fn clock(&self, started: Instant, longest: Duration) -> Clock {
        Clock::new(started, self.engine.options.deadline, longest, self.slow.clone())
    }

    /// Runs a plan on threads of its own, or, where it is `brief`, by whoever takes its batches. The permit is given back
    /// with the plan: at its end, at an error, when nobody wants the rest, or when the rest is taken too late.
    fn run(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        env: RequestEnv,
        text: &Arc<str>,
        permit: Option<Permit>,
        brief: bool,
        clock: &Clock,
    ) -> Result<Batches, SqlError> {
        if brief {
            return Ok(batches(self.engine.start(plan, env, text)?, text.clone(), permit));
        }
        let (engine, text) = (self.engine.clone(), text.clone());
        let deadline = self.engine.options.deadline;
        let left = clock.until.saturating_duration_since(Instant::now());
        let start = move || Ok(batches(engine.start(plan, env, &text)?, text, permit));
        Ok(self.runner.run(deadline, left, clock.latest(), start))
    }

    /// Runs a planning job; past the deadline the caller is told so, and the thread is given back when it ends.
    async fn planned<T: Send + 'static>(
        &self,
        started: Instant,
        job: impl FnOnce() -> Result<T, SqlError> + Send + 'static,
    ) -> Result<T, SqlError> {
        let deadline = self.engine.options.deadline;
        tokio::time::timeout_at((started + deadline).into(), self.planner.run(job))
            .await
            .map_err(|_| SqlError::Deadline(deadline))?
    }
}

impl Engine {
    fn new(options: SqlOptions, tables: SystemTables) -> Result<Engine, SqlError> {
        let failed = |error: DataFusionError| SqlError::Internal(format!("cannot start the SQL engine: {error}"));
        std::fs::create_dir_all(&options.spill_dir).map_err(|error| {
            SqlError::Internal(format!("cannot create the spill directory {:?}: {error}", options.spill_dir))
        })?;
        let disk = DiskManagerBuilder::default()
            .with_mode(DiskManagerMode::Directories(vec![options.spill_dir.clone()]))
            .with_max_temp_directory_size(options.spill_bytes);
        let runtime = RuntimeEnvBuilder::new()
            .with_memory_pool(Arc::new(StatementPool::new(options.memory_bytes)))
            .with_disk_manager_builder(disk)
            .build_arc()
            .map_err(failed)?;
        let builder = SessionStateBuilder::new()
            .with_config(session_config(&options))
            .with_physical_optimizer_rules(physical_rules())
            .with_runtime_env(runtime);
        let mut state = functions::install(builder).build();
        json::install(&mut state).map_err(failed)?;
        let context = SessionContext::new_with_state(state);
        let state = Arc::new(context.state());
        let mut unshared = context.state();
        unshared.config_mut().options_mut().execution.target_partitions = 1;
        let plain = SessionStateBuilder::new_from_existing(unshared.clone());
        let plain = plain.with_physical_optimizer_rules(plain_rules()).build();
        Ok(Engine {
            _context: context,
            state,
            unshared: Arc::new(unshared),
            plain: Arc::new(plain),
            providers: Providers::new(tables),
            shapes: live::Shapes::default(),
            options,
            contexts_created: AtomicU64::new(1),
        })
    }

    fn query_template(&self, statement: &Statement, env: &RequestEnv) -> Result<Template, SqlError> {
        let shown = show::as_query(statement, env, &self.providers.system)?;
        let query = shown.unwrap_or_else(|| ast::Statement::clone(&statement.ast));
        self.templated(None, query, statement, env)
    }

    fn change_template(
        &self,
        (target, query): (dml::Target, ast::Statement),
        statement: &Statement,
        env: &RequestEnv,
    ) -> Result<Template, SqlError> {
        let template = self.templated(Some(target.clone()), query, statement, env)?;
        target.check_width(template.plan.schema().fields().len())?;
        target.check_rows(&template.plan)?;
        Ok(template)
    }

    fn templated(
        &self,
        target: Option<dml::Target>,
        query: ast::Statement,
        statement: &Statement,
        env: &RequestEnv,
    ) -> Result<Template, SqlError> {
        let began = Instant::now();
        let planned = self.logical(query, env).and_then(|plan| {
            let (plan, symbolic) = symbolic(plan, env)?;
            Template::new(target, self.optimize(plan)?, symbolic, statement.small, began.elapsed())
        });
        planned.map_err(|error| from_datafusion(error, &statement.text))
    }

    /// A template's plan for one execution by one user.
    async fn physical(
        &self,
        template: &Template,
        env: &RequestEnv,
        text: &str,
    ) -> Result<Arc<dyn ExecutionPlan>, SqlError> {
        let bound;
        let plan = if template.symbolic {
            let plan = bind(template.plan.clone(), env, &self.state);
            bound = plan.map_err(|error| from_datafusion(error, text))?;
            &bound
        } else {
            &template.plan
        };
        // What only filters and computes as it reads gains nothing from sharing its rows out between threads.
        let state = match template {
            Template { plain: true, .. } => &self.plain,
            Template { recursive: true, .. } | Template { heavy: false, .. } => &self.unshared,
            _ => &self.state,
        };
        planned_by(state, plan, text).await
    }

    /// An optimized plan of constants only, for one execution.
    /// An optimized plan to be executed once.
    pub(crate) async fn execution_plan(
        &self,
        plan: &LogicalPlan,
        unshared: bool,
        text: &str,
    ) -> Result<Arc<dyn ExecutionPlan>, SqlError> {
        planned_by(if unshared { &self.unshared } else { &self.state }, plan, text).await
    }

    /// An analyzed plan, optimized.
    pub(crate) fn optimized(&self, plan: LogicalPlan) -> Result<LogicalPlan, DataFusionError> {
        folding(|| self.state.optimizer().optimize(plan, &*self.state, |_, _| {}))
    }

    /// The plan as the SQL says it: parameters, time and user still symbolic.
    pub(crate) fn logical(&self, query: ast::Statement, env: &RequestEnv) -> Result<LogicalPlan, DataFusionError> {
        Names { state: &self.state, providers: &self.providers, env }.plan(query)
    }

    fn optimize(&self, plan: LogicalPlan) -> Result<LogicalPlan, DataFusionError> {
        match plan {
            LogicalPlan::Explain(explain) => {
                let plan = self.optimize(explain.plan.as_ref().clone())?;
                Ok(LogicalPlan::Explain(Explain {
                    plan: Arc::new(plan),
                    logical_optimization_succeeded: true,
                    ..explain
                }))
            }
            plan => {
                let analyzed = self.analyze(plan)?;
                self.optimized(analyzed)
            }
        }
    }

    /// Types coerced, and where DataFusion would answer wrongly, said otherwise; nothing else changed.
    pub(crate) fn analyze(&self, plan: LogicalPlan) -> Result<LogicalPlan, DataFusionError> {
        let plan = marked(times::agreed(with_caps(plan)?)?)?;
        exact(self.state.analyzer().execute_and_check(plan, self.state.config_options(), |_, _| {})?)
    }

    fn start(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        env: RequestEnv,
        text: &str,
    ) -> Result<SendableRecordBatchStream, SqlError> {
        let config = self.state.config().clone().with_extension(Arc::new(env));
        // Functions are in the plan already: the context's tables of them stay empty.
        let context = TaskContext::new(
            None,
            String::new(),
            telling_wanted(config, &plan),
            HashMap::new(),
            HashMap::new(),
            HashMap::new(),
            HashMap::new(),
            self.state.runtime_env().clone(),
        );
        let started = catch_unwind(AssertUnwindSafe(|| execute_stream(plan, Arc::new(context))));
        started.map_err(panicked)?.map_err(|error| from_datafusion(error, text))
    }

    /// What an UPDATE sets in the row at hand. A panic in a function ends the statement, as it does in a running plan.
    fn new_values(
        &self,
        plan: &by_key::RowPlan,
        image: &[u8],
        env: &RequestEnv,
        text: &str,
    ) -> Result<Vec<ArrayRef>, SqlError> {
        let values = catch_unwind(AssertUnwindSafe(|| plan.evaluate(image, env, &self.state, text)));
        values.map_err(panicked)?
    }

    /// The batches as the caller sees them: SQL types only, ended at the deadline.
    fn row_stream(&self, columns: Vec<OutputColumn>, batches: Batches, clock: Clock) -> RowStream {
        let schema = arrow::output_schema(&columns);
        let limit = self.options.deadline;
        let shown = columns.clone();
        let batches = futures::stream::unfold(Some((batches, clock)), move |running| {
            let (columns, schema) = (shown.clone(), schema.clone());
            async move {
                let (mut batches, mut clock) = running?;
                let now = Instant::now();
                let until = clock.asked(now);
                // A batch that is ready is given whatever the time: who reads slowly always finds one.
                if now >= until {
                    return Some((Err(SqlError::Deadline(limit)), None));
                }
                let batch = match tokio::time::timeout_at(until.into(), batches.next()).await {
                    Err(_) => return Some((Err(SqlError::Deadline(limit)), None)),
                    Ok(None) => return None,
                    Ok(Some(batch)) => batch,
                };
                match batch.and_then(|batch| arrow::to_output(&columns, &schema, batch)) {
                    Ok(batch) => {
                        clock.given(batch.get_array_memory_size(), Instant::now());
                        Some((Ok(batch), Some((batches, clock))))
                    }
                    // An error is the end: what follows it would be rows of a broken result.
                    Err(error) => Some((Err(error), None)),
                }
            }
        });
        RowStream { columns, batches: Box::pin(batches) }
    }
}

/// Bytes a second that a reader takes at least, on average, whose waiting is not counted: a scan holds a thread meanwhile.
const READING_RATE: u64 = 16 * 1024;
/// The longest that is not counted of what holds a permit, which others wait for.
const LONGEST_HELD: Duration = Duration::from_secs(30);
/// The longest that is not counted of what begins to read as late as it is asked to: with any deadline it is shorter than
/// rows of stream tables are kept after they have expired, so what is read late is there still.
const LONGEST_WAIT: Duration = Duration::from_secs(240);

/// How many results are read beyond their deadline at the same time: each may hold a thread and some batches.
const SLOW_READERS: usize = 32;

/// Until when the rows of a result may be computed. What they wait for a reader that takes enough of them is not counted,
/// or a large result would never end over a slow line. For more than [`SLOW_READERS`] at once it is.
struct Clock {
    /// The same with everything counted.
    due: Instant,
    until: Instant,
    /// When the reader was given what there was.
    given_at: Instant,
    /// How long the waiting may be altogether that is not counted.
    longest: Duration,
    /// How long it was until somebody asked at all: other results of the request were read meanwhile.
    late: Option<Duration>,
    forgiven: Duration,
    bytes: u64,
    slow: Arc<Semaphore>,
    /// Among the slow readers, beyond what is due.
    place: Option<Permit>,
}

impl Clock {
    fn new(started: Instant, deadline: Duration, longest: Duration, slow: Arc<Semaphore>) -> Clock {
        let (due, given_at) = (started + deadline, Instant::now());
        let (late, forgiven, bytes, place) = (None, Duration::ZERO, 0, None);
        Clock { due, until: due, given_at, longest, late, forgiven, bytes, slow, place }
    }

    /// Until when a reader may take more at all; `None` where it has as long as it likes.
    fn latest(&self) -> Option<Instant> {
        self.due.checked_add(self.longest)
    }

    /// The reader wants more: until when it may have to wait for that.
    fn asked(&mut self, now: Instant) -> Instant {
        let waited = now.saturating_duration_since(self.given_at);
        let late = *self.late.get_or_insert(waited);
        let earned = (late + Duration::from_millis(self.bytes * 1_000 / READING_RATE)).min(self.longest);
        let free = waited.min(earned.saturating_sub(self.forgiven));
        self.forgiven += free;
        self.until += free;
        if now < self.due {
            return self.until;
        }
        if self.place.is_none() {
            self.place = self.slow.clone().try_acquire_owned().ok();
        }
        if self.place.is_some() { self.until } else { self.due }
    }

    fn given(&mut self, bytes: usize, now: Instant) {
        self.bytes += bytes as u64;
        self.given_at = now;
    }
}

async fn planned_by(state: &SessionState, plan: &LogicalPlan, text: &str) -> Result<Arc<dyn ExecutionPlan>, SqlError> {
    let planned = state.query_planner().create_physical_plan(plan, state).await;
    planned.map_err(|error| from_datafusion(error, text))
}

/// The batches of a running plan, with our errors; an error is the last. What it was permitted ends with it.
fn batches(stream: SendableRecordBatchStream, text: Arc<str>, permit: Option<Permit>) -> Batches {
    let running = Some((stream, text, permit));
    let batches = futures::stream::unfold(running, |running| async move {
        let (mut stream, text, permit) = running?;
        match next(&mut stream, &text).await? {
            Ok(batch) => Some((Ok(batch), Some((stream, text, permit)))),
            Err(error) => Some((Err(error), None)),
        }
    });
    batches.boxed()
}

/// The next batch. A panic in one of DataFusion's operators is the end of that statement, not of the connection.
async fn next(stream: &mut SendableRecordBatchStream, text: &str) -> Option<Result<RecordBatch, SqlError>> {
    match AssertUnwindSafe(stream.next()).catch_unwind().await {
        Ok(batch) => batch.map(|batch| batch.map_err(|error| from_datafusion(error, text))),
        Err(cause) => Some(Err(panicked(cause))),
    }
}

/// DataFusion's, without the two that push filters down in physical plans: through a join whose sides have columns of
/// one name they took `l.id <> r.id` for `id <> id`. Filters are pushed down before, in the logical plan. One of our own
/// comes last.
fn physical_rules() -> Vec<Arc<dyn PhysicalOptimizerRule + Send + Sync>> {
    let rules = PhysicalOptimizer::new().rules;
    let rules = rules.into_iter().filter(|rule| !rule.name().starts_with("FilterPushdown"));
    rules.chain([Arc::new(YieldingJoins) as Arc<dyn PhysicalOptimizerRule + Send + Sync>]).collect()
}

/// Of those, the rules that find something to do in one partition of filters, projections and limits over a table. The
/// others look for joins, aggregates, sorts, windows, or partitions to share rows out between; each of them walks the
/// whole plan and is checked afterwards, for every execution.
fn plain_rules() -> Vec<Arc<dyn PhysicalOptimizerRule + Send + Sync>> {
    let needed = |name: &str| ["ProjectionPushdown", "LimitPushdown", "EnsureCooperative"].contains(&name);
    physical_rules().into_iter().filter(|rule| needed(rule.name())).collect()
}

fn session_config(options: &SqlOptions) -> SessionConfig {
    let mut config = SessionConfig::new()
        .with_batch_size(options.batch_rows)
        .with_target_partitions(options.target_partitions)
        .with_create_default_catalog_and_schema(false)
        // Rows come from one ordered scan a table: splitting them costs more than it gains on two cores.
        .with_round_robin_repartition(options.target_partitions > 1)
        .with_information_schema(true);
    let settings = config.options_mut();
    settings.execution.time_zone = Some("+00:00".to_owned());
    // One text type in and out: images are plain UTF-8.
    settings.sql_parser.map_string_types_to_utf8view = false;
    settings.sql_parser.collect_spans = true;
    // The check fails on queries that are right: the optimizer and the physical planner judge differently which
    // expressions can be NULL. That the answers are right is held by comparing with another database.
    settings.execution.skip_physical_aggregate_schema_check = true;
    // Set aside by each part of a sort before its first row, to merge with what it spills. DataFusion's 10 MB are more than
    // a small pool has altogether: there nothing was ever sorted, however much could be spilled.
    settings.execution.sort_spill_reservation_bytes = (options.memory_bytes / 8).min(10 << 20);
    settings.catalog.default_catalog = super::information::CATALOG_NAME.to_owned();
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_for_a_reader_that_takes_enough_is_not_counted() {
        let started = Instant::now();
        let at = |seconds: u64| started + Duration::from_secs(seconds);
        let deadline = Duration::from_secs(5);
        let clock = |longest| {
            let slow = Arc::new(Semaphore::new(1));
            Clock { given_at: started, ..Clock::new(started, deadline, longest, slow) }
        };
        let second = READING_RATE as usize;
        let mut short = clock(LONGEST_WAIT);
        assert_eq!(short.asked(started), at(5), "nothing was taken yet");
        short.given(10 * second, at(3));
        assert_eq!(short.asked(at(9)), at(11), "six seconds, of ten that the bytes are worth");
        short.given(0, at(10));
        assert_eq!(short.asked(at(100)), at(15), "four more");
        short.given(100_000 * second, at(100));
        assert_eq!(short.asked(at(10_000)), at(5) + LONGEST_WAIT, "no longer, whatever was taken");

        let mut late = clock(LONGEST_WAIT);
        assert_eq!(late.asked(at(60)), at(65), "another result was read before");
        late.given(10 * second, at(60));
        assert_eq!(late.asked(at(90)), at(75), "ten seconds more");

        let mut long = clock(Duration::MAX);
        assert_eq!(long.asked(started), at(5));
        long.given(100_000 * second, at(3));
        assert_eq!(long.asked(at(10_000)), at(10_002), "two seconds are left of five");
        long.given(0, at(10_001));
        assert_eq!(long.asked(at(900_000)), at(100_005));
    }

    #[test]
    fn only_so_many_read_on_beyond_the_deadline() {
        let started = Instant::now();
        let at = |seconds: u64| started + Duration::from_secs(seconds);
        let slow = Arc::new(Semaphore::new(1));
        let reading = || {
            let clock = Clock::new(started, Duration::from_secs(5), Duration::MAX, slow.clone());
            let mut clock = Clock { given_at: started, ..clock };
            assert_eq!(clock.asked(started), at(5));
            clock.given(100 * READING_RATE as usize, at(1));
            clock
        };
        let (mut first, mut second) = (reading(), reading());
        assert_eq!(second.asked(at(4)), at(8), "before the deadline there is room for all");
        second.given(0, at(4));
        assert_eq!(first.asked(at(9)), at(13));
        assert_eq!(second.asked(at(9)), at(5), "no place is left");
        first.given(0, at(9));
        assert_eq!(first.asked(at(20)), at(24), "it keeps its own");
        drop(first);
        assert_eq!(reading().asked(at(9)), at(13));
    }

    #[tokio::test]
    async fn what_is_ready_is_not_given_beyond_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spill");
        let deadline = Duration::ZERO;
        let options = SqlOptions { spill_dir: path, deadline, ..crate::config::Config::new(dir.path()).sql };
        let sql = Sql::new(options, Vec::new()).unwrap();
        let schema = Arc::new(::arrow::datatypes::Schema::empty());
        let ready = futures::stream::repeat_with(move || Ok(RecordBatch::new_empty(schema.clone())));
        let clock = sql.clock(Instant::now(), LONGEST_HELD);
        let mut rows = sql.engine.row_stream(Vec::new(), ready.boxed(), clock);
        assert!(matches!(rows.batches.next().await, Some(Err(SqlError::Deadline(_)))));
        assert!(rows.batches.next().await.is_none());
    }

    #[test]
    fn a_reader_has_its_time_and_no_more() {
        let (started, deadline) = (Instant::now(), Duration::from_secs(5));
        let latest = |longest| Clock::new(started, deadline, longest, Arc::new(Semaphore::new(1))).latest();
        assert_eq!(latest(LONGEST_HELD), Some(started + deadline + LONGEST_HELD));
        assert_eq!(latest(Duration::MAX), None);
    }

    fn names(rules: &[Arc<dyn PhysicalOptimizerRule + Send + Sync>]) -> Vec<&str> {
        rules.iter().map(|rule| rule.name()).collect()
    }

    /// They are chosen by name, so one that is renamed by an upgrade of DataFusion would come back, or be gone, in silence;
    /// and one that is new is to be looked at before it is let in.
    #[test]
    fn the_physical_rules_are_those_that_were_looked_at() {
        let all = [
            "OutputRequirements",
            "aggregate_statistics",
            "join_selection",
            "LimitedDistinctAggregation",
            "WindowTopN",
            "EnsureRequirements",
            "CombinePartialFinalAggregate",
            "OptimizeAggregateOrder",
            "ProjectionPushdown",
            "OutputRequirements",
            "LimitAggregation",
            "LimitPushPastWindows",
            "HashJoinBuffering",
            "LimitPushdown",
            "TopKRepartition",
            "ProjectionPushdown",
            "PushdownSort",
            "EnsureCooperative",
            "SanityCheckPlan",
            "YieldingJoins",
        ];
        assert_eq!(names(&physical_rules()), all);
        let plain = ["ProjectionPushdown", "LimitPushdown", "ProjectionPushdown", "EnsureCooperative"];
        assert_eq!(names(&plain_rules()), plain);
        let left_out = PhysicalOptimizer::new().rules;
        let left_out = names(&left_out).into_iter().filter(|name| !all.contains(name)).collect::<Vec<_>>();
        assert_eq!(left_out, ["FilterPushdown", "FilterPushdown(Post)"]);
    }
}
