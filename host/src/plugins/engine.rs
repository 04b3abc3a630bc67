//! The engine: what guests may be made of, how they are compiled, and the clock that interrupts them.

use std::collections::{HashMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use wasmtime::{Config, InstancePre, Linker, Module, OptLevel, Strategy, WasmFeatures};
use wire::abi::ManifestLine;

use super::cache::{Cache, KEY_BYTES};
use super::check::{self, Checked};
use super::compiler;
use super::guest::{self, Guest};
use super::health::Health;
use super::{ModuleSource, PluginError, PluginOptions};
use crate::catalog::PluginKind;

/// How often a running guest's clock is looked at. A deadline is kept to one tick.
const TICK: Duration = Duration::from_millis(2);

/// After so many without a call the ticker sleeps.
const QUIET_TICKS: u32 = 50;

/// Modules compiled at once. Compiling cannot be interrupted: one that outlives its limit keeps its place.
const COMPILERS: usize = 2;

/// Compiled modules kept although no pipeline uses them at the moment.
const MODULES_KEPT: usize = 64;

/// Cranelift recurses over what a module nests.
pub const COMPILER_STACK_BYTES: usize = 8 * 1024 * 1024;

/// A module that can be instantiated.
pub struct Compiled {
    /// Of this compiled code in this process: quicker to look up than a hash in text.
    pub id: u64,
    pub sha256: Arc<str>,
    pub kind: PluginKind,
    pub manifest: Vec<ManifestLine>,
    pub health: Health,
    pub pre: InstancePre<Guest>,
}

pub struct Engine {
    pub wasm: wasmtime::Engine,
    linker: Arc<Linker<Guest>>,
    pub ticker: Ticker,
    modules: Mutex<Modules>,
    next: AtomicU64,
    cache: Option<Cache>,
    permits: Arc<Permits>,
    compile_time: Duration,
}

impl Engine {
    /// `secret`: the key of the cache's MACs, where the options name a folder for it.
    pub fn new(
        options: &PluginOptions,
        secret: impl FnOnce() -> Result<[u8; KEY_BYTES], String>,
    ) -> Result<Engine, PluginError> {
        let failed =
            |error: wasmtime::Error| PluginError::Host(format!("the WebAssembly engine cannot start: {error:#}"));
        let wasm = wasmtime::Engine::new(&config(Some(options))).map_err(failed)?;
        let mut linker = Linker::new(&wasm);
        guest::link(&mut linker).map_err(failed)?;
        let ticker =
            Ticker::start(wasm.clone()).map_err(|error| PluginError::Host(format!("no ticker thread: {error}")))?;
        let cache = match &options.cache_dir {
            None => None,
            Some(folder) => {
                let mut hasher = std::hash::DefaultHasher::new();
                wasm.precompile_compatibility_hash().hash(&mut hasher);
                let key = secret().map_err(PluginError::Host)?;
                let cache = Cache::new(folder.clone(), key, hasher.finish()).map_err(|error| {
                    PluginError::Host(format!("the folder {} cannot be made: {error}", folder.display()))
                })?;
                Some(cache)
            }
        };
        Ok(Engine {
            cache,
            wasm,
            linker: Arc::new(linker),
            ticker,
            modules: Mutex::default(),
            next: AtomicU64::default(),
            permits: Arc::new(Permits { free: Mutex::new(COMPILERS), changed: Condvar::new() }),
            compile_time: options.compile_time,
        })
    }

    /// The module of a hash, compiled now where that has not happened yet.
    pub fn module(
        &self,
        options: &PluginOptions,
        source: &dyn ModuleSource,
        sha256: &str,
    ) -> Result<Arc<Compiled>, PluginError> {
        if let Some(module) = self.modules().get(sha256) {
            return Ok(module);
        }
        let wasm = source.wasm(sha256).map_err(PluginError::Host)?;
        let wasm = wasm.ok_or_else(|| PluginError::Host(format!("the module {sha256} is not in the store")))?;
        let checked = check::module(options, wasm)?;
        if checked.sha256 != sha256 {
            return Err(PluginError::Host(format!(
                "the stored module {sha256} is damaged: its hash is {}",
                checked.sha256
            )));
        }
        Ok(self.compile(options, &checked)?.0)
    }

    /// Compiles in a child process where the options name a program for that, else on a thread of its own; either way a
    /// caller waits no longer than the limit. What was compiled before is loaded from the cache. The second: how long it
    /// took, where it was compiled now.
    pub fn compile(
        &self,
        options: &PluginOptions,
        checked: &Checked,
    ) -> Result<(Arc<Compiled>, Option<Duration>), PluginError> {
        let deadline = Instant::now() + self.compile_time;
        if let Some(module) = self.cached(&checked.sha256) {
            return Ok((self.keep(checked, module)?, None));
        }
        let permit = Permits::take(&self.permits, deadline).ok_or_else(|| {
            PluginError::Refused("other modules are being compiled; try again in a moment".to_owned())
        })?;
        // Somebody else may have compiled it while we waited.
        if let Some(module) = self.modules().get(&checked.sha256) {
            return Ok((module, None));
        }
        // From here on: waiting for others is none of the module's time.
        let started = Instant::now();
        let code = match &options.compiler {
            Some(program) => {
                let code = compiler::compile(program, checked.wasm.clone(), deadline);
                drop(permit);
                code.map_err(|error| match error {
                    PluginError::Refused(message) if message.is_empty() => self.too_long(),
                    other => other,
                })?
            }
            None => self.on_a_thread(checked, permit, deadline)?,
        };
        let compile_time = started.elapsed();
        let module = self
            .load(&code)
            .map_err(|error| PluginError::Host(format!("what was compiled just now cannot be loaded: {error:#}")))?;
        if let Some(cache) = &self.cache {
            cache.store(&checked.sha256, &code);
        }
        Ok((self.keep(checked, module)?, Some(compile_time)))
    }

    fn on_a_thread(&self, checked: &Checked, permit: Permit, deadline: Instant) -> Result<Vec<u8>, PluginError> {
        let receive = self.start_compiler(checked, permit)?;
        match receive.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(_) if Instant::now() > deadline => Err(self.too_long()),
            Ok(Ok(code)) => Ok(code),
            Ok(Err(error)) => Err(PluginError::Refused(format!("the module does not compile: {error:#}"))),
            Err(RecvTimeoutError::Timeout) => Err(self.too_long()),
            Err(RecvTimeoutError::Disconnected) => {
                Err(PluginError::Refused("the compiler failed on the module".to_owned()))
            }
        }
    }

    fn too_long(&self) -> PluginError {
        PluginError::Refused(format!(
            "the module takes longer than {} s to compile: make it smaller, or raise plugins.compile_ms",
            self.compile_time.as_secs_f32()
        ))
    }

    fn start_compiler(&self, checked: &Checked, permit: Permit) -> Result<Receiver<CompileResult>, PluginError> {
        let (send, receive) = mpsc::sync_channel(1);
        let (engine, wasm) = (self.wasm.clone(), checked.wasm.clone());
        let job = move || {
            let code = engine.precompile_module(&wasm);
            drop(permit);
            // The caller may have given up.
            let _ = send.send(code);
        };
        let thread = thread::Builder::new().name("plugin-compile".to_owned()).stack_size(COMPILER_STACK_BYTES);
        thread.spawn(job).map_err(|error| PluginError::Host(format!("no thread to compile on: {error}")))?;
        Ok(receive)
    }

    /// Compiled code from the cache, if this very engine can run it.
    fn cached(&self, sha256: &str) -> Option<Module> {
        let code = self.cache.as_ref()?.load(sha256)?;
        self.load(&code)
            .inspect_err(
                |error| tracing::warn!(sha256, %error, "a compiled plugin cannot be loaded; it is compiled again"),
            )
            .ok()
    }

    fn load(&self, code: &[u8]) -> wasmtime::Result<Module> {
        // SAFETY: loading compiled code is running it. These bytes were made by wasmtime: in this process, or in our
        // child, which got the module and nothing else; or they come from the cache, which has checked their MAC in
        // memory, on these very bytes. wasmtime itself checks that they were made by its own version and settings.
        unsafe { Module::deserialize(&self.wasm, code) }
    }

    fn keep(&self, checked: &Checked, module: Module) -> Result<Arc<Compiled>, PluginError> {
        let pre = self.linker.instantiate_pre(&module);
        let pre = pre.map_err(|error| PluginError::Refused(format!("the module cannot be linked: {error:#}")))?;
        let mut modules = self.modules();
        // Somebody else may have loaded it meanwhile: two of them would each know half of its failures.
        if let Some(module) = modules.get(&checked.sha256) {
            return Ok(module);
        }
        let module = Arc::new(Compiled {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            sha256: checked.sha256.as_str().into(),
            kind: checked.kind,
            manifest: checked.manifest.clone(),
            health: Health::default(),
            pre,
        });
        modules.put(module.clone());
        Ok(module)
    }

    /// Forgets the compiled code of all modules but these.
    pub fn sweep_cache(&self, needed: impl Fn(&str) -> bool) {
        if let Some(cache) = &self.cache {
            cache.sweep(needed);
        }
    }

    fn modules(&self) -> MutexGuard<'_, Modules> {
        self.modules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type CompileResult = wasmtime::Result<Vec<u8>>;

/// The work of the compiling child. What a module compiles to does not depend on the limits of the server's options.
pub fn precompile(wasm: &[u8]) -> Result<Vec<u8>, String> {
    let engine = wasmtime::Engine::new(&config(None)).map_err(|error| format!("{error:#}"))?;
    engine.precompile_module(wasm).map_err(|error| format!("{error:#}"))
}

fn config(options: Option<&PluginOptions>) -> Config {
    let mut config = Config::new();
    config
        .strategy(Strategy::Cranelift)
        .cranelift_opt_level(OptLevel::Speed)
        .cranelift_nan_canonicalization(true)
        .epoch_interruption(true)
        .consume_fuel(false)
        // The window's pages stay where they were mapped; the default reservation keeps bounds checks away.
        .memory_may_move(false)
        // One module compiles on one core: the others belong to queries and live streams.
        .parallel_compilation(false)
        .native_unwind_info(false);
    for feature in [
        WasmFeatures::THREADS,
        WasmFeatures::TAIL_CALL,
        WasmFeatures::MULTI_MEMORY,
        WasmFeatures::EXCEPTIONS,
        WasmFeatures::MEMORY64,
        WasmFeatures::RELAXED_SIMD,
        WasmFeatures::FUNCTION_REFERENCES,
        WasmFeatures::GC,
        WasmFeatures::COMPONENT_MODEL,
    ] {
        config.wasm_features(feature, false);
    }
    if let Some(options) = options {
        config.max_wasm_stack(options.stack_bytes);
    }
    config
}

/// Compiled modules by hash: the ones somebody uses, and the last few others.
#[derive(Default)]
struct Modules {
    known: HashMap<Arc<str>, Weak<Compiled>>,
    recent: VecDeque<Arc<Compiled>>,
}

impl Modules {
    fn get(&mut self, sha256: &str) -> Option<Arc<Compiled>> {
        self.known.get(sha256)?.upgrade()
    }

    fn put(&mut self, module: Arc<Compiled>) {
        self.known.insert(module.sha256.clone(), Arc::downgrade(&module));
        self.recent.push_back(module);
        if self.recent.len() > MODULES_KEPT {
            self.recent.pop_front();
            self.known.retain(|_, module| module.strong_count() > 0);
        }
    }
}

/// Places for compilers.
struct Permits {
    free: Mutex<usize>,
    changed: Condvar,
}

struct Permit(Arc<Permits>);

impl Permits {
    fn take(permits: &Arc<Permits>, deadline: Instant) -> Option<Permit> {
        let free = permits.free.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = deadline.saturating_duration_since(Instant::now());
        let (mut free, _) =
            permits.changed.wait_timeout_while(free, wait, |free| *free == 0).unwrap_or_else(PoisonError::into_inner);
        if *free == 0 {
            return None;
        }
        *free -= 1;
        Some(Permit(permits.clone()))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.changed.notify_one();
    }
}

/// The thread that moves the engine's epoch on while guests run, and sleeps when none has run for a while: waking it
/// costs more than most calls.
pub struct Ticker {
    state: Arc<TickerState>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
pub struct TickerState {
    /// Some guest was called since the last tick, or was found running by it.
    used: AtomicBool,
    asleep: AtomicBool,
    stop: AtomicBool,
    /// To be woken.
    thread: OnceLock<Thread>,
}

impl TickerState {
    /// A guest is about to be called, or was found running by a tick: one that was held up for so long that the ticker sleeps
    /// by now wakes it. Mostly the ticker knows that guests run: then nothing is written, which would take the mark away
    /// from other cores that call theirs.
    pub fn keep_awake(&self) {
        if !self.used.load(Ordering::SeqCst) {
            // Either the ticker sees this before it sleeps, or we see that it does.
            self.used.store(true, Ordering::SeqCst);
        }
        if self.asleep.load(Ordering::SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }
}

impl Ticker {
    fn start(engine: wasmtime::Engine) -> std::io::Result<Ticker> {
        let state = Arc::new(TickerState::default());
        let shared = state.clone();
        let thread = thread::Builder::new().name("plugin-clock".to_owned()).spawn(move || tick(&engine, &shared))?;
        state.thread.get_or_init(|| thread.thread().clone());
        Ok(Ticker { state, thread: Some(thread) })
    }

    pub fn state(&self) -> &Arc<TickerState> {
        &self.state
    }
}

fn tick(engine: &wasmtime::Engine, state: &TickerState) {
    let mut quiet = 0;
    while !state.stop.load(Ordering::SeqCst) {
        if state.used.swap(false, Ordering::SeqCst) {
            quiet = 0;
        } else {
            quiet += 1;
        }
        if quiet < QUIET_TICKS {
            // A tick too early only looks at a clock once more.
            thread::park_timeout(TICK);
            engine.increment_epoch();
            continue;
        }
        state.asleep.store(true, Ordering::SeqCst);
        if !state.used.load(Ordering::SeqCst) && !state.stop.load(Ordering::SeqCst) {
            thread::park();
        }
        state.asleep.store(false, Ordering::SeqCst);
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the plugin clock had panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What runs with a guest may hold it up for longer than the ticker stays awake. Then its first look at the clock was the
    /// last one, and its call had no deadline.
    #[test]
    fn a_guest_that_was_held_up_wakes_the_ticker() {
        let ticker = Ticker::start(wasmtime::Engine::new(&config(None)).unwrap()).unwrap();
        let state = ticker.state();
        let given_up = Instant::now() + Duration::from_secs(60);
        for _ in 0..2 {
            while !state.asleep.load(Ordering::SeqCst) {
                assert!(Instant::now() < given_up, "it never sleeps");
                thread::yield_now();
            }
            // It may have slept again before anybody looked.
            while state.asleep.load(Ordering::SeqCst) {
                assert!(Instant::now() < given_up, "nothing wakes it");
                state.keep_awake();
                thread::yield_now();
            }
        }
    }
}
