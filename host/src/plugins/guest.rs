//! What a store carries for its instance: the budget of the call under way, memory limits, and what the guest said
//! through its imports `log`, `metric` and `fail`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use wasmtime::{Caller, Extern, Linker, Memory, ResourceLimiter, Store, UpdateDeadline};
use wire::abi::import;

use super::engine::TickerState;
use super::logs::Speaker;
use super::{PluginOptions, window};
use crate::telemetry::{one_line, thread_cpu};

/// Wall time that a call may take, as a multiple of its CPU time: a busy machine is not the guest's fault, a guest
/// that sleeps in a page fault for ever is nobody else's problem.
const WALL_FACTOR: u32 = 10;

/// What a log line costs beside its bytes, so that a million empty lines end too.
const LOG_LINE_COST: usize = 64;

/// Longest message of `fail` and name of `metric` that are taken.
const FAIL_BYTES: usize = 1024;
const METRIC_NAME_BYTES: usize = 64;

/// Metrics that one call may add to.
const METRICS_PER_CALL: usize = 32;

/// The guest ran out of the time of its call.
#[derive(Debug, thiserror::Error)]
#[error(
    "it ran for more than {} ms of CPU time (or {} ms in all; {} sets the limit)",
    .0.cpu.as_millis(), (.0.cpu * WALL_FACTOR).as_millis(), .0.setting
)]
pub struct OutOfTime(Budget);

/// CPU time that a call may take, and the setting that says so.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    cpu: Duration,
    setting: &'static str,
}

impl Budget {
    /// Of a call that judges rows.
    pub fn batch(options: &PluginOptions) -> Budget {
        Budget { cpu: options.batch_time, setting: "plugins.batch_ms" }
    }

    /// Of one that prepares for that.
    pub fn init(options: &PluginOptions) -> Budget {
        Budget { cpu: options.init_time, setting: "plugins.init_ms" }
    }
}

/// The guest used an import wrongly.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Misuse(String);

fn misuse(message: String) -> wasmtime::Error {
    wasmtime::Error::new(Misuse(message))
}

/// The data of an instance's store.
pub struct Guest {
    /// For logs and metrics: the plugin on whose behalf the present call is made.
    plugin: Arc<str>,
    memory_limit: usize,
    table_limit: usize,
    budget: Budget,
    /// Set at the first tick that finds the call running: a call that is over before never asks for the CPU's time.
    cpu_end: Option<Duration>,
    wall_end: Instant,
    log_limit: usize,
    log_left: usize,
    /// Keeps what is logged; `None` in a trial.
    speaker: Option<Speaker>,
    /// Rows of the present batch; 0 where rows make no sense.
    rows: usize,
    /// The memory limit refused a growth during the present call.
    pub memory_refused: bool,
    /// The first failure that the guest told: a row of the batch or the whole call.
    pub failed: Option<(Option<usize>, String)>,
    pub metrics: Vec<(String, f64)>,
    /// How long the last call took.
    pub took: Duration,
}

impl Guest {
    pub fn new(options: &PluginOptions, plugin: Arc<str>, memory_limit: usize, speaker: Option<Speaker>) -> Guest {
        Guest {
            plugin,
            memory_limit,
            table_limit: options.table_elements,
            budget: Budget::init(options),
            cpu_end: None,
            wall_end: Instant::now(),
            log_limit: options.log_bytes,
            log_left: 0,
            speaker,
            rows: 0,
            memory_refused: false,
            failed: None,
            metrics: Vec::new(),
            took: Duration::ZERO,
        }
    }

    /// Starts the clock of one call.
    pub fn begin(&mut self, plugin: &Arc<str>, budget: Budget, rows: usize, now: Instant) {
        if !Arc::ptr_eq(&self.plugin, plugin) {
            self.plugin = plugin.clone();
        }
        self.budget = budget;
        self.cpu_end = None;
        self.wall_end = now + budget.cpu * WALL_FACTOR;
        self.log_left = self.log_limit;
        self.rows = rows;
        self.memory_refused = false;
        self.failed = None;
        self.metrics.clear();
    }

    /// It serves live queries, and is not tried only.
    pub fn is_live(&self) -> bool {
        self.speaker.is_some()
    }

    fn log(&mut self, level: i32, message: &str) {
        let cost = message.len() + LOG_LINE_COST;
        if self.log_left == 0 {
            return;
        }
        if cost > self.log_left {
            self.log_left = 0;
            if self.is_live() {
                let message = "log limit of a call reached; the rest is dropped";
                tracing::warn!(target: "plugin", plugin = &*self.plugin, "{message}");
                self.keep("warn", message);
            }
            return;
        }
        self.log_left -= cost;
        // The server's log is read by line, and on terminals. What is kept stays as it was said.
        let shown = one_line(message);
        match level {
            // A measurement runs the same rows a thousand times: the server's log is not the place for that.
            _ if !self.is_live() => tracing::debug!(target: "plugin", plugin = &*self.plugin, "in a trial: {shown}"),
            0 => tracing::error!(target: "plugin", plugin = &*self.plugin, "{shown}"),
            1 => tracing::warn!(target: "plugin", plugin = &*self.plugin, "{shown}"),
            2 => tracing::info!(target: "plugin", plugin = &*self.plugin, "{shown}"),
            _ => tracing::debug!(target: "plugin", plugin = &*self.plugin, "{shown}"),
        }
        self.keep(["error", "warn", "info"].get(level as usize).copied().unwrap_or("debug"), message);
    }

    fn keep(&self, level: &'static str, message: &str) {
        if let Some(speaker) = &self.speaker {
            speaker.say(&self.plugin, level, message);
        }
    }

    fn metric(&mut self, name: String, value: f64) {
        let valid = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.'));
        if name.is_empty() || !valid || !(value.is_finite() && value >= 0.0) {
            self.log(
                1,
                &format!("metric `{name}` ({value}) is not counted: names are letters, digits, _ and ., values ≥ 0"),
            );
            return;
        }
        if let Some((_, sum)) = self.metrics.iter_mut().find(|(known, _)| *known == name) {
            *sum += value;
        } else if self.metrics.len() < METRICS_PER_CALL {
            self.metrics.push((name, value));
        } else {
            self.log(1, &format!("metric `{name}` is not counted: a call has at most {METRICS_PER_CALL}"));
        }
    }
}

/// Called at every tick while the guest runs: wall ticks only ask the thread's CPU clock. The first one starts it, so a
/// call may have up to a tick more than its budget.
pub fn watch_deadline(store: &mut Store<Guest>, ticker: Arc<TickerState>) {
    store.epoch_deadline_callback(move |mut context| {
        ticker.keep_awake();
        let guest = context.data_mut();
        let (cpu, budget) = (thread_cpu(), guest.budget);
        if cpu >= *guest.cpu_end.get_or_insert(cpu + budget.cpu) || Instant::now() >= guest.wall_end {
            return Err(wasmtime::Error::new(OutOfTime(budget)));
        }
        Ok(UpdateDeadline::Continue(1))
    });
}

impl ResourceLimiter for Guest {
    fn memory_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let fits = desired <= self.memory_limit;
        self.memory_refused |= !fits;
        Ok(fits)
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= self.table_limit)
    }

    fn instances(&self) -> usize {
        1
    }

    fn memories(&self) -> usize {
        1
    }

    fn tables(&self) -> usize {
        super::check::MAX_TABLES as usize
    }
}

/// The three imports. A pointer outside the memory traps.
pub fn link(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    linker.func_wrap(
        import::MODULE,
        import::LOG,
        |mut caller: Caller<'_, Guest>, level: i32, ptr: u32, len: u32| {
            let most = caller.data().log_left;
            let message = message(&mut caller, "log", ptr, len, most)?;
            caller.data_mut().log(level, &message);
            wasmtime::Result::Ok(())
        },
    )?;
    linker.func_wrap(
        import::MODULE,
        import::METRIC,
        |mut caller: Caller<'_, Guest>, ptr: u32, len: u32, value: f64| {
            let name = message(&mut caller, "metric", ptr, len, METRIC_NAME_BYTES)?;
            caller.data_mut().metric(name, value);
            wasmtime::Result::Ok(())
        },
    )?;
    linker.func_wrap(
        import::MODULE,
        import::FAIL,
        |mut caller: Caller<'_, Guest>, index: i32, ptr: u32, len: u32| {
            let rows = caller.data().rows;
            let index = match usize::try_from(index) {
                Ok(index) if index < rows => Some(index),
                Ok(_) => return Err(misuse(format!("fail: row {index} of a batch of {rows}"))),
                Err(_) if index == -1 => None,
                Err(_) => return Err(misuse(format!("fail: row {index} (a row of the batch or -1)"))),
            };
            // The first failure of the lowest row is what is told; a failure of the whole call counts before any row.
            if caller.data().failed.as_ref().is_some_and(|(known, _)| *known <= index) {
                return Ok(());
            }
            let text = message(&mut caller, "fail", ptr, len, FAIL_BYTES)?;
            caller.data_mut().failed = Some((index, text));
            Ok(())
        },
    )?;
    Ok(())
}

fn message(caller: &mut Caller<'_, Guest>, import: &str, ptr: u32, len: u32, most: usize) -> wasmtime::Result<String> {
    let memory: Memory = match caller.get_export(wire::abi::export::MEMORY) {
        Some(Extern::Memory(memory)) => memory,
        _ => return Err(misuse("the guest has no memory".to_owned())),
    };
    window::read_message(&*caller, memory, ptr, len, most)
        .ok_or_else(|| misuse(format!("{import}: {len} bytes at {ptr} do not lie in the memory")))
}
