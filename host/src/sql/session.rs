//! The one SessionContext of the server, and planning on top of it.
//!
//! A request takes nothing of the session's state but a reference: names come from its own catalog snapshot
//! ([`context`](super::context)), identity and snapshot travel in its task context.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use datafusion::common::DataFusionError;
use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::FairSpillPool;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::execution::session_state::SessionStateBuilder;
use datafusion::execution::{SendableRecordBatchStream, SessionState, TaskContext};
use datafusion::logical_expr::{Explain, LogicalPlan};
use datafusion::physical_plan::{ExecutionPlan, execute_stream};
use datafusion::prelude::{SessionConfig, SessionContext};
use datafusion::sql::sqlparser::ast;
use futures::StreamExt;
use wire::Type;

use super::context::{Names, bind};
use super::error::from_datafusion;
use super::planner::{Planner, folding, on_large_stack};
use super::provider::Providers;
use super::system::{SystemTable, SystemTables};
use super::{ChangeSet, DdlPlan, RequestEnv, RowStream, SqlError, SqlOptions, Statement};
use super::{arrow, ddl, dml, functions, information, live, statement};
use crate::catalog::Table;

/// The SQL engine; one per server.
pub struct Sql {
    engine: Arc<Engine>,
    planner: Planner,
}

/// What every request shares.
pub(crate) struct Engine {
    /// The session itself: nothing is registered in it, nothing is cloned from it after start.
    _context: SessionContext,
    pub(crate) state: Arc<SessionState>,
    pub(crate) providers: Providers,
    options: SqlOptions,
    contexts_created: AtomicU64,
}

impl Sql {
    /// `tables`: the system tables that other modules fill.
    pub fn new(options: SqlOptions, tables: Vec<SystemTable>) -> Result<Sql, SqlError> {
        let tables = SystemTables::new(information::system_tables().into_iter().chain(tables));
        let engine = Engine::new(options, tables)?;
        Ok(Sql { engine: Arc::new(engine), planner: Planner::start()? })
    }

    /// Token gate, then parse (on a thread with a large stack), then the allow-list of statements.
    pub fn parse(&self, text: &str) -> Result<Vec<Statement>, SqlError> {
        statement::parse(text)
    }

    /// Plans and starts a query; planning runs off the async threads and counts against the deadline.
    pub async fn query(&self, statement: &Statement, env: RequestEnv) -> Result<RowStream, SqlError> {
        let started = Instant::now();
        let (engine, planned, asked) = (self.engine.clone(), env.clone(), statement.clone());
        let plan = self.planned(started, move || engine.plan_query(&asked, &planned)).await?;
        let stream = self.engine.start(plan, env, &statement.text)?;
        Ok(self.engine.row_stream(stream, started, statement.text.clone()))
    }

    /// Plans INSERT, UPDATE or DELETE as a SELECT and turns its rows into a change set.
    pub async fn change_set(&self, statement: &Statement, env: RequestEnv) -> Result<ChangeSet, SqlError> {
        let started = Instant::now();
        let (engine, planned, asked) = (self.engine.clone(), env.clone(), statement.clone());
        let (target, plan) = self
            .planned(started, move || {
                let (target, select) = dml::target(&asked, &planned)?;
                Ok((target, engine.plan(select, &planned, &asked.text)?))
            })
            .await?;
        let mut changes = dml::Changes::new(target, &env, self.engine.state.runtime_env());
        let mut stream = self.engine.start(plan, env.clone(), &statement.text)?;
        let deadline = started + self.engine.options.deadline;
        while let Some(batch) = tokio::time::timeout_at(deadline.into(), stream.next())
            .await
            .map_err(|_| SqlError::Deadline(self.engine.options.deadline))?
        {
            changes.add(&batch.map_err(|error| from_datafusion(error, &statement.text))?)?;
        }
        changes.finish()
    }

    /// What a DDL statement would write to the catalog.
    pub fn ddl(&self, statement: &Statement, env: &RequestEnv) -> Result<DdlPlan, SqlError> {
        ddl::plan(statement, env)
    }

    /// Compiles a live query.
    pub fn live(&self, text: &str, env: &RequestEnv) -> Result<live::Live, SqlError> {
        on_large_stack(|| live::compile(&self.engine, text, env))?
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
        let plan = self.planned(started, move || engine.physical(&planned.plan, &planned.text)).await?;
        let stream = self.engine.start(plan, env, &query.text)?;
        query.collect(self.engine.row_stream(stream, started, query.text.clone()), limit).await
    }

    /// SessionContexts made since start: 1.
    pub fn contexts_created(&self) -> u64 {
        self.engine.contexts_created.load(Ordering::Relaxed)
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
            .with_memory_pool(Arc::new(FairSpillPool::new(options.memory_bytes)))
            .with_disk_manager_builder(disk)
            .build_arc()
            .map_err(failed)?;
        let builder = SessionStateBuilder::new().with_config(session_config(&options)).with_runtime_env(runtime);
        let context = SessionContext::new_with_state(functions::install(builder).build());
        let state = Arc::new(context.state());
        Ok(Engine {
            _context: context,
            state,
            providers: Providers::new(tables),
            options,
            contexts_created: AtomicU64::new(1),
        })
    }

    fn plan_query(&self, statement: &Statement, env: &RequestEnv) -> Result<Arc<dyn ExecutionPlan>, SqlError> {
        let query = match &*statement.ast {
            ast::Statement::ShowTables { .. } => show_tables(&env.namespace)?,
            ast::Statement::ShowSchemas { .. } => show_namespaces()?,
            ast::Statement::ShowColumns { show_options, .. } => match shown_table(show_options) {
                Some(name) => self.describe(name, env, &statement.text)?,
                None => return Err(SqlError::Internal("SHOW COLUMNS of no table".to_owned())),
            },
            ast::Statement::ExplainTable { table_name, .. } => self.describe(table_name, env, &statement.text)?,
            query => query.clone(),
        };
        self.plan(query, env, &statement.text)
    }

    fn describe(&self, name: &ast::ObjectName, env: &RequestEnv, text: &str) -> Result<ast::Statement, SqlError> {
        let (namespace, table) = ddl::table_name(name)?;
        let home = namespace.as_deref().unwrap_or(&env.namespace);
        if SystemTables::is_home(home) {
            return describe_system(self.providers.system.columns(home, &table)?);
        }
        let table = super::context::find_table(env, namespace.as_deref(), &table);
        let span = name.0.first().and_then(|part| part.as_ident()).map(|ident| ident.span);
        match (table, span) {
            (Ok(table), _) => describe_table(table),
            (Err(error), Some(span)) => Err(error.at_span(text, span)),
            (Err(error), None) => Err(error),
        }
    }

    /// SQL to an execution plan for one execution. The logical plan before `bind` is what could be kept.
    fn plan(&self, query: ast::Statement, env: &RequestEnv, text: &str) -> Result<Arc<dyn ExecutionPlan>, SqlError> {
        let logical = self.logical(query, env).and_then(|plan| bind(plan, env));
        let physical = logical.and_then(|plan| self.optimize(plan)).and_then(|plan| {
            let planner = self.state.query_planner();
            futures::executor::block_on(planner.create_physical_plan(&plan, &*self.state))
        });
        physical.map_err(|error| from_datafusion(error, text))
    }

    /// An optimized plan of constants only, for one execution.
    fn physical(&self, plan: &LogicalPlan, text: &str) -> Result<Arc<dyn ExecutionPlan>, SqlError> {
        let planner = self.state.query_planner();
        let physical = futures::executor::block_on(planner.create_physical_plan(plan, &*self.state));
        physical.map_err(|error| from_datafusion(error, text))
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

    /// Types coerced; nothing else changed.
    pub(crate) fn analyze(&self, plan: LogicalPlan) -> Result<LogicalPlan, DataFusionError> {
        self.state.analyzer().execute_and_check(plan, self.state.config_options(), |_, _| {})
    }

    fn start(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        env: RequestEnv,
        text: &str,
    ) -> Result<SendableRecordBatchStream, SqlError> {
        // Functions are in the plan already: the context's tables of them stay empty.
        let context = TaskContext::new(
            None,
            String::new(),
            self.state.config().clone().with_extension(Arc::new(env)),
            HashMap::new(),
            HashMap::new(),
            HashMap::new(),
            HashMap::new(),
            self.state.runtime_env().clone(),
        );
        execute_stream(plan, Arc::new(context)).map_err(|error| from_datafusion(error, text))
    }

    /// The batches as the caller sees them: SQL types only, our errors, ended at the deadline.
    fn row_stream(&self, stream: SendableRecordBatchStream, started: Instant, text: Arc<str>) -> RowStream {
        let columns = arrow::output_columns(&stream.schema());
        let schema = arrow::output_schema(&columns);
        let limit = self.options.deadline;
        let deadline = tokio::time::Instant::from(started + limit);
        let shown = columns.clone();
        let batches = futures::stream::unfold(Some(stream), move |stream| {
            let (columns, schema, text) = (shown.clone(), schema.clone(), text.clone());
            async move {
                let mut stream = stream?;
                let batch = match tokio::time::timeout_at(deadline, stream.next()).await {
                    Err(_) => return Some((Err(SqlError::Deadline(limit)), None)),
                    Ok(None) => return None,
                    Ok(Some(batch)) => batch.map_err(|error| from_datafusion(error, &text)),
                };
                match batch.and_then(|batch| arrow::to_output(&columns, &schema, batch)) {
                    Ok(batch) => Some((Ok(batch), Some(stream))),
                    // An error is the end: what follows it would be rows of a broken result.
                    Err(error) => Some((Err(error), None)),
                }
            }
        });
        RowStream { columns, batches: Box::pin(batches) }
    }
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
    settings.catalog.default_catalog = super::information::CATALOG_NAME.to_owned();
    config
}

fn show_tables(namespace: &str) -> Result<ast::Statement, SqlError> {
    internal_query(&format!(
        "SELECT table_schema AS namespace, table_name AS name, table_type AS type FROM information_schema.tables \
         ORDER BY table_schema <> {}, table_schema, table_name",
        ast::Value::SingleQuotedString(namespace.to_owned())
    ))
}

fn show_namespaces() -> Result<ast::Statement, SqlError> {
    internal_query("SELECT schema_name AS name FROM information_schema.schemata ORDER BY schema_name")
}

/// The table of SHOW COLUMNS, where it says nothing more.
pub(crate) fn shown_table(options: &ast::ShowStatementOptions) -> Option<&ast::ObjectName> {
    let only_in = ast::ShowStatementOptions { show_in: None, ..options.clone() };
    let nothing = ast::ShowStatementOptions {
        show_in: None,
        starts_with: None,
        limit: None,
        limit_from: None,
        filter_position: None,
    };
    let shown = options.show_in.as_ref().filter(|shown| shown.parent_type.is_none() && only_in == nothing)?;
    shown.parent_name.as_ref()
}

fn describe_system(columns: &[(&str, Type)]) -> Result<ast::Statement, SqlError> {
    let quote = |text: &str| ast::Value::SingleQuotedString(text.to_owned()).to_string();
    let row = |(name, ty): &(&str, Type)| format!("({}, {})", quote(name), quote(&ty.to_string()));
    let rows: Vec<String> = columns.iter().map(row).collect();
    internal_query(&format!(
        "SELECT column_name, data_type, 'YES' AS is_nullable, CAST(NULL AS TEXT) AS column_default, 'NO' AS is_key \
         FROM (VALUES {}) AS columns (column_name, data_type)",
        rows.join(", ")
    ))
}

fn describe_table(table: &Table) -> Result<ast::Statement, SqlError> {
    let quote = |text: &str| ast::Value::SingleQuotedString(text.to_owned());
    internal_query(&format!(
        "SELECT column_name, data_type, is_nullable, column_default, is_key FROM information_schema.columns \
         WHERE table_schema = {} AND table_name = {} ORDER BY ordinal_position",
        quote(&table.namespace_name),
        quote(&table.name)
    ))
}

/// SQL of our own making, over the catalog alone.
fn internal_query(text: &str) -> Result<ast::Statement, SqlError> {
    let mut statements = statement::parse(text)?;
    let statement = statements.pop().ok_or_else(|| SqlError::Internal("an empty internal query".to_owned()))?;
    Ok(*statement.ast)
}
