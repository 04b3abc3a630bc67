//! One instance of a module: made, given its window, configured, called. Every call has its budget, and nothing it
//! returned is believed before the window is known to be untouched.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;

use wasmtime::{Instance as WasmInstance, Memory, Store, Trap, TypedFunc, WasmBacktrace, WasmParams, WasmResults};
use wire::Schema;
use wire::abi::{ABI, CONFIGURE_BYTES, Configure, Configured, Descriptor, WINDOW_ALIGN, export};
use wire::image::ImageAt;

use super::abi::Made;
use super::engine::Compiled;
use super::guest::{self, Budget, Guest, Misuse, OutOfTime};
use super::health::Waste;
use super::logs::Speaker;
use super::meters::Meter;
use super::registry::Shared;
use super::window::{self, GuestWindow, Mapping, PART_ROWS_AT, Ring, WindowError, WorkerPart};
use super::{FaultCause, Origin, PluginError, abi, check};
use crate::catalog::NamespaceId;
use crate::telemetry::{Gauge, Histogram, one_line};

/// What a guest's allocator may need around the window to align it.
const WINDOW_SLACK: usize = 2 * WINDOW_ALIGN as usize;

/// Looked into for every call: the standard library's hash would cost as much as the call itself.
pub type Map<K, V> = HashMap<K, V, RandomState>;

/// Why a call failed.
#[derive(Clone, Debug)]
pub struct CallFault {
    pub cause: FaultCause,
    /// Not the guest's doing: the machine has no memory or mappings left.
    pub host: bool,
    /// The instance could not be made or configured: no row is to blame.
    pub whole: bool,
    /// The unit did not fit the worker part: nothing was called.
    pub unplaced: bool,
    /// The row of the batch, where the guest named one.
    pub row: Option<usize>,
    /// How long the call took, by the clock on the wall; zero where none failed.
    pub took: Duration,
    /// One line: parts of it are the guest's own words, and it goes to logs and terminals.
    pub message: String,
}

impl CallFault {
    pub fn new(cause: FaultCause, message: impl Into<String>) -> CallFault {
        CallFault::at(cause, None, message)
    }

    /// A fault that this guest, in this call, told of one row.
    pub fn at(cause: FaultCause, row: Option<usize>, message: impl Into<String>) -> CallFault {
        let message = one_line(&message.into()).into_owned();
        CallFault { cause, host: false, whole: false, unplaced: false, row, took: Duration::ZERO, message }
    }

    pub fn host(message: String) -> CallFault {
        CallFault { host: true, whole: true, ..CallFault::new(FaultCause::Memory, message) }
    }

    pub fn unplaced(message: String) -> CallFault {
        CallFault { unplaced: true, ..CallFault::new(FaultCause::Memory, message) }
    }

    /// Whether the instance is in a state that nobody knows. What a guest says through `fail` leaves it as it was.
    pub fn costs_instance(&self) -> bool {
        self.cause != FaultCause::Failed && !self.unplaced
    }

    fn after(self, took: Duration) -> CallFault {
        CallFault { took, ..self }
    }

    fn whole(self) -> CallFault {
        CallFault { whole: true, ..self }
    }

    pub fn of(self, plugin: &str, stage: Option<usize>, index: Option<usize>) -> PluginError {
        if self.host {
            return PluginError::Host(self.message);
        }
        PluginError::Fault { plugin: plugin.to_owned(), stage, cause: self.cause, index, message: self.message }
    }
}

/// A module with parameters for one input: what an instance is configured with.
pub struct Setup {
    pub plugin: Arc<str>,
    pub version: u32,
    /// What its calls are counted in, found here so that no call has to look for it.
    pub meter: Arc<Meter>,
    pub module: Arc<Compiled>,
    /// Of everything below: equal keys share a handle.
    pub key: [u8; 32],
    pub params: Vec<u8>,
    pub params_at: ImageAt,
    pub reads: Vec<u8>,
    /// The input schema as postcard.
    pub input: Vec<u8>,
    /// Where its instance was found the last time.
    pub seat: Cell<Seat>,
}

/// Where the instance of a setup is, while it is the one of that number; and the setup's handle there.
#[derive(Clone, Copy, Default)]
pub struct Seat {
    place: usize,
    number: u64,
    handle: u32,
}

/// Whose rows a space holds: those of shared tables, or of user tables, one user at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SpaceKind {
    Shared,
    Users,
}

/// The two parts that make the windows of one worker in one namespace. User tables have a space of their own: an
/// instance maps the parts it is made with, so one that serves shared tables can never see a user's row, and one that
/// serves a user sees no part that another user's rows are in while it runs.
pub struct Space {
    pub namespace: NamespaceId,
    /// `Err`: no ring, only its length (throw-away instances, user tables).
    pub ring: Result<Arc<Ring>, u32>,
    pub part: WorkerPart,
    /// Whose rows the part may hold at present.
    owner: Option<Arc<str>>,
    /// Whether it is for live queries: what guests log and count in a trial is nobody else's business.
    live: bool,
}

impl Space {
    pub fn new(namespace: NamespaceId, ring: Result<Arc<Ring>, u32>, part: WorkerPart, live: bool) -> Space {
        Space { namespace, ring, part, owner: None, live }
    }

    /// From here on the part is this user's: what it held of another one is wiped first.
    pub fn enter(&mut self, user: Option<&Arc<str>>) {
        if self.owner.as_ref() != user {
            self.part.clear();
            self.owner = user.cloned();
        }
    }

    /// The user whose rows it is entered for; none where they are everybody's.
    pub fn owner(&self) -> Option<&Arc<str>> {
        self.owner.as_ref()
    }

    fn ring(&self) -> Result<&Ring, u32> {
        self.ring.as_deref().map_err(|len| *len)
    }
}

/// What one call is made with.
pub struct Batch<'a> {
    pub setup: &'a Setup,
    pub origin: Origin,
    /// What [`Instances::get`] gave for the setup.
    pub handle: u32,
    /// How many descriptors stand at the front of the worker part.
    pub rows: usize,
    /// Bytes of the worker part in use.
    pub used: usize,
}

/// A configured handle of a guest.
struct Handle {
    number: u32,
    output: Option<Schema>,
}

pub struct Instance {
    body: Body,
    configure: TypedFunc<u32, u64>,
    release: Option<TypedFunc<u32, ()>>,
    /// `tg_filter` or `tg_transform`.
    run: TypedFunc<(u32, u32, u32), u64>,
    handles: Map<[u8; 32], Handle>,
}

/// An instance without its functions, which are borrowed beside it when they are called.
struct Body {
    shared: Arc<Shared>,
    store: Store<Guest>,
    memory: Memory,
    window: GuestWindow,
    /// What its own memory is a part of, and how much of it: nothing until it is configured.
    weighed_in: Gauge,
    weight: i64,
}

impl Instance {
    pub fn new(
        shared: &Arc<Shared>,
        plugin: &Arc<str>,
        module: &Compiled,
        space: &Space,
    ) -> Result<Instance, CallFault> {
        let window_bytes = space.ring().map_or_else(|bytes| bytes, Ring::bytes) + space.part.bytes();
        let memory_limit = shared.options.memory_bytes + window_bytes as usize + WINDOW_SLACK;
        let speaker = space.live.then(|| Speaker {
            logs: shared.logs.clone(),
            namespace: space.namespace,
            user: space.owner.clone(),
            sha256: module.sha256.clone(),
        });
        let guest = Guest::new(&shared.options, plugin.clone(), memory_limit, speaker);
        let mut store = Store::new(&shared.engine.wasm, guest);
        store.limiter(|guest| guest);
        guest::watch_deadline(&mut store, shared.engine.ticker.state().clone());

        let call = Call { shared, plugin, budget: Budget::init(&shared.options), rows: 0, seconds: None };
        let instance = start(&call, &mut store, module)?;
        let open: TypedFunc<u32, u32> = func(&instance, &mut store, export::WINDOW)?;
        let addr = call.run(&mut store, |store| open.call(store, window_bytes))?;
        let memory = instance
            .get_memory(&mut store, export::MEMORY)
            .ok_or_else(|| CallFault::new(FaultCause::Abi, "the module exports no memory"))?;
        let window = GuestWindow::open(&mut store, memory, addr, space.ring(), &space.part, shared.mapping)
            .map_err(|error| window_fault(error, &store))?;

        let run = if module.kind.is_filter() { export::FILTER } else { export::TRANSFORM };
        let run = func(&instance, &mut store, run)?;
        let configure = func(&instance, &mut store, export::CONFIGURE)?;
        let release = instance.get_func(&mut store, export::RELEASE).is_some();
        let release = release.then(|| func(&instance, &mut store, export::RELEASE)).transpose()?;
        shared.metrics.plugin_instances.inc();
        let shared = shared.clone();
        let body = Body { shared, store, memory, window, weighed_in: Gauge::default(), weight: 0 };
        Ok(Instance { body, configure, release, run, handles: Map::default() })
    }

    /// The setup's handle, made where there is none.
    fn configure(&mut self, setup: &Setup, part: &mut WorkerPart) -> Result<u32, CallFault> {
        if let Some(handle) = self.handles.get(&setup.key) {
            return Ok(handle.number);
        }
        // Plugins of the same bytes share an instance. One that nobody uses any more may have been of a plugin that is
        // gone, and its series with it.
        if self.handles.is_empty() {
            self.body.weigh_in(&setup.meter.memory);
        }
        let used = self.write_configure(setup, part)?;
        let at = self.part_at() + PART_ROWS_AT as u32;
        let configure = &self.configure;
        let packed = self.body.call(setup, None, part, used, |store| configure.call(store, at))?;
        let Some(Configured { handle: number, schema }) = Configured::unpack(packed) else {
            return Err(CallFault::new(
                FaultCause::Failed,
                "tg_configure failed without saying why (it should call `fail`)",
            ));
        };
        if setup.module.kind.is_filter() && schema != 0 {
            let message = format!("tg_configure answered {schema:#x} in its high 32 bits, which are 0 for a filter");
            return Err(CallFault::new(FaultCause::Abi, message));
        }
        let output = (!setup.module.kind.is_filter()).then(|| self.read_schema(schema)).transpose()?;
        self.handles.insert(setup.key, Handle { number, output });
        Ok(number)
    }

    /// Of a transform that is configured: what its rows look like.
    pub fn output_schema(&self, setup: &Setup) -> Option<&Schema> {
        self.handles.get(&setup.key)?.output.as_ref()
    }

    /// The configure message and what it points to, behind one another; the bytes of the part that are used.
    fn write_configure(&self, setup: &Setup, part: &mut WorkerPart) -> Result<usize, CallFault> {
        let base = self.part_at() as usize;
        let params = PART_ROWS_AT + CONFIGURE_BYTES;
        let reads = (params + setup.params.len()).next_multiple_of(4);
        let input = reads + setup.reads.len();
        let end = input + setup.input.len();
        if end > part.bytes() as usize {
            return Err(CallFault::new(
                FaultCause::Memory,
                format!(
                    "parameters and schema take {end} bytes, more than the worker part has ({}; raise plugins.worker_bytes)",
                    part.bytes()
                ),
            ));
        }
        let message = Configure {
            params: Descriptor::new(setup.params_at, (base + params) as u32),
            reads: (base + reads) as u32,
            reads_len: (setup.reads.len() / 4) as u32,
            schema: (base + input) as u32,
            schema_len: setup.input.len() as u32,
        };
        part.write(PART_ROWS_AT, &message.to_bytes());
        part.write(params, &setup.params);
        part.write(reads, &setup.reads);
        part.write(input, &setup.input);
        Ok(end)
    }

    fn read_schema(&self, addr: u32) -> Result<Schema, CallFault> {
        let wrong = |message: String| CallFault::new(FaultCause::Abi, message);
        let head = self.take(addr, 4).map_err(|message| wrong(format!("the output schema's length: {message}")))?;
        let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        if len > abi::SCHEMA_BYTES {
            return Err(wrong(format!("the output schema has {len} bytes; at most {} are allowed", abi::SCHEMA_BYTES)));
        }
        let start = addr.checked_add(4).ok_or_else(|| wrong("the output schema lies outside the memory".to_owned()))?;
        let message = self.take(start, len).map_err(|message| wrong(format!("the output schema: {message}")))?;
        abi::output_schema(&message).map_err(wrong)
    }

    /// Where the worker part begins, from the window's first byte.
    pub fn part_at(&self) -> u32 {
        self.body.window.part_at()
    }

    /// Bytes of linear memory beside the window.
    pub fn own_memory(&self) -> usize {
        self.body.own_memory()
    }

    /// Bytes of the guest's memory, outside the window.
    fn take(&self, addr: u32, len: u32) -> Result<Vec<u8>, String> {
        let Body { memory, store, window, .. } = &self.body;
        if window.overlaps(addr, len) {
            return Err(format!("{len} bytes at {addr} lie in the window"));
        }
        window::copy_out(store, *memory, addr, len)
            .ok_or_else(|| format!("{len} bytes at {addr} do not lie in the memory"))
    }

    /// `tg_filter` over the descriptors at the front of the worker part: bit i set = row i is kept.
    pub fn filter(&mut self, batch: &Batch<'_>, part: &WorkerPart) -> Result<u64, CallFault> {
        let kept = self.run(batch, part)?;
        if batch.rows < 64 && kept >> batch.rows != 0 {
            let message = format!("tg_filter set bits beyond the {} rows of its batch ({kept:#x})", batch.rows);
            return Err(self.bad_answer(FaultCause::Abi, message));
        }
        batch.setup.meter.judged(batch.origin, batch.rows, kept.count_ones() as usize);
        Ok(kept)
    }

    /// `tg_transform` of a row transform: one image per row.
    pub fn transform(&mut self, batch: &Batch<'_>, part: &WorkerPart) -> Result<Made, CallFault> {
        let output = self.output(batch, part)?;
        let (schema, most) = (self.transformed(batch.setup)?, self.body.shared.options.output_bytes * abi::RUN_OUTPUTS);
        let made = abi::output_images(&output, batch.rows, schema, most);
        let made = made.map_err(|message| self.bad_answer(FaultCause::Output, message))?;
        batch.setup.meter.judged(batch.origin, batch.rows, made.count());
        batch.setup.meter.answered(output.len());
        Ok(made)
    }

    /// `tg_transform` of a change transform: how many images each change was made into, and these.
    pub fn expand(&mut self, batch: &Batch<'_>, part: &WorkerPart) -> Result<(Vec<u32>, Made), CallFault> {
        let output = self.output(batch, part)?;
        let (schema, most) = (self.transformed(batch.setup)?, self.body.shared.options.output_bytes);
        let made = abi::output_changes(&output, batch.rows, schema, most);
        let (counts, made) = made.map_err(|message| self.bad_answer(FaultCause::Output, message))?;
        let kept = counts.iter().filter(|count| **count > 0).count();
        batch.setup.meter.judged(batch.origin, batch.rows, kept);
        batch.setup.meter.answered(output.len());
        Ok((counts, made))
    }

    /// The bytes that `tg_transform` answers, copied once.
    fn output(&mut self, batch: &Batch<'_>, part: &WorkerPart) -> Result<Vec<u8>, CallFault> {
        let packed = self.run(batch, part)?;
        let (addr, len) = (packed as u32, (packed >> 32) as u32);
        let most = self.body.shared.options.output_bytes;
        if len as usize > most {
            let message =
                format!("tg_transform answered {len} bytes; at most {most} are allowed (plugins.output_bytes)");
            return Err(self.bad_answer(FaultCause::Output, message));
        }
        self.take(addr, len).map_err(|message| self.bad_answer(FaultCause::Output, format!("the output: {message}")))
    }

    /// The call came to its end, and what it answered is none.
    fn bad_answer(&self, cause: FaultCause, message: String) -> CallFault {
        CallFault::new(cause, message).after(self.body.store.data().took)
    }

    fn transformed(&self, setup: &Setup) -> Result<&Schema, CallFault> {
        let schema = self.output_schema(setup);
        schema.ok_or_else(|| CallFault::new(FaultCause::Abi, "a transform without an output schema"))
    }

    fn run(&mut self, batch: &Batch<'_>, part: &WorkerPart) -> Result<u64, CallFault> {
        let arguments = (batch.handle, self.part_at(), batch.rows as u32);
        let run = &self.run;
        let answer = self.body.call(batch.setup, Some(batch), part, batch.used, |store| run.call(store, arguments))?;
        self.body.shared.metrics.plugin_calls.inc();
        self.body.shared.metrics.plugin_rows.inc_by(batch.rows as u64);
        Ok(answer)
    }

    /// Gives a handle back. A guest that fails here is no good any more.
    pub fn release(&mut self, setup: &Setup, part: &WorkerPart) -> Result<(), CallFault> {
        let Some(handle) = self.handles.remove(&setup.key) else { return Ok(()) };
        let Some(release) = &self.release else { return Ok(()) };
        self.body.call(setup, None, part, 0, |store| release.call(store, handle.number))
    }
}

impl Body {
    /// With a batch: a call that judges it; else one that prepares for that.
    fn call<R>(
        &mut self,
        setup: &Setup,
        batch: Option<&Batch<'_>>,
        part: &WorkerPart,
        used: usize,
        call: impl FnOnce(&mut Store<Guest>) -> wasmtime::Result<R>,
    ) -> Result<R, CallFault> {
        if self.shared.mapping == Mapping::Copy {
            self.window.copy_part(&mut self.store, self.memory, part, used);
            self.shared.metrics.guest_bytes_copied.inc_by(used as u64);
        }
        let options = &self.shared.options;
        let (budget, rows, seconds) = match batch {
            Some(batch) => (Budget::batch(options), batch.rows, Some(setup.meter.seconds(batch.origin))),
            None => (Budget::init(options), 0, None),
        };
        let answer =
            Call { shared: &self.shared, plugin: &setup.plugin, budget, rows, seconds }.run(&mut self.store, call);
        self.weigh();
        if self.window.was_written() {
            let message = "it wrote into its window, which is for reading only";
            return Err(CallFault::new(FaultCause::WindowWrite, message).after(self.store.data().took));
        }
        let answer = answer?;
        let guest = self.store.data_mut();
        if let Some((row, message)) = guest.failed.take() {
            return Err(CallFault::at(FaultCause::Failed, row, message).after(guest.took));
        }
        if guest.is_live() {
            setup.meter.count(setup.version, &mut guest.metrics);
        }
        Ok(answer)
    }

    fn own_memory(&self) -> usize {
        self.memory.data_size(&self.store).saturating_sub(self.window.len as usize)
    }

    /// From here on its memory is a part of this.
    fn weigh_in(&mut self, gauge: &Gauge) {
        self.weighed_in.dec_by(self.weight);
        self.weighed_in = gauge.clone();
        self.weighed_in.inc_by(self.weight);
    }

    /// Its memory may have grown.
    fn weigh(&mut self) {
        let weight = self.own_memory() as i64;
        if weight != self.weight {
            self.weighed_in.inc_by(weight - self.weight);
            self.weight = weight;
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        self.weighed_in.dec_by(self.weight);
        self.shared.metrics.plugin_instances.dec();
    }
}

/// Instantiates (which runs `start`), initializes, and asks for the ABI version before anything else.
fn start(call: &Call<'_>, store: &mut Store<Guest>, module: &Compiled) -> Result<WasmInstance, CallFault> {
    let instance = call.run(store, |store| module.pre.instantiate(store))?;
    if instance.get_func(&mut *store, export::INITIALIZE).is_some() {
        let initialize: TypedFunc<(), ()> = func(&instance, store, export::INITIALIZE)?;
        call.run(store, |store| initialize.call(store, ()))?;
    }
    let abi: TypedFunc<(), u32> = func(&instance, store, export::ABI)?;
    let found = call.run(store, |store| abi.call(store, ()))?;
    if found != ABI {
        return Err(CallFault::new(FaultCause::Abi, check::wrong_abi(i64::from(found))));
    }
    Ok(instance)
}

fn window_fault(error: WindowError, store: &Store<Guest>) -> CallFault {
    let refused = if store.data().memory_refused { "; its memory limit refused to grow for it" } else { "" };
    match error {
        WindowError::Guest(message) => CallFault::new(FaultCause::Abi, format!("{message}{refused}")),
        WindowError::Host(_) => CallFault::host(error.to_string()),
    }
}

fn func<P: WasmParams, R: WasmResults>(
    instance: &WasmInstance,
    store: &mut Store<Guest>,
    name: &str,
) -> Result<TypedFunc<P, R>, CallFault> {
    instance
        .get_typed_func(store, name)
        .map_err(|error| CallFault::new(FaultCause::Abi, format!("export `{name}`: {error}")))
}

/// One call into a guest with its budget.
struct Call<'a> {
    shared: &'a Shared,
    plugin: &'a Arc<str>,
    budget: Budget,
    rows: usize,
    /// Where its time is told, beside the sum over all plugins.
    seconds: Option<&'a Histogram>,
}

impl Call<'_> {
    fn run<R>(
        &self,
        store: &mut Store<Guest>,
        call: impl FnOnce(&mut Store<Guest>) -> wasmtime::Result<R>,
    ) -> Result<R, CallFault> {
        let started = Instant::now();
        store.data_mut().begin(self.plugin, self.budget, self.rows, started);
        store.set_epoch_deadline(1);
        self.shared.engine.ticker.state().keep_awake();
        let answer = call(store);
        let elapsed = started.elapsed();
        self.shared.metrics.plugin_nanos.inc_by(elapsed.as_nanos() as u64);
        if let Some(seconds) = self.seconds {
            seconds.observe(elapsed.as_secs_f64());
        }
        store.data_mut().took = elapsed;
        answer.map_err(|error| fault(&error, store.data()).after(elapsed))
    }
}

/// Tells the causes apart and says them in one line.
fn fault(error: &wasmtime::Error, guest: &Guest) -> CallFault {
    if let Some(late) = error.downcast_ref::<OutOfTime>() {
        return CallFault::new(FaultCause::Deadline, late.to_string());
    }
    let told = error.downcast_ref::<Trap>().map(Trap::to_string);
    let told = told.or_else(|| error.downcast_ref::<Misuse>().map(Misuse::to_string));
    let Some(mut message) = told.or_else(|| guest.memory_refused.then(|| error.root_cause().to_string())) else {
        return CallFault::host(format!("an instance cannot run: {error:#}"));
    };
    let frames = error.downcast_ref::<WasmBacktrace>().map_or(&[][..], WasmBacktrace::frames);
    if let Some(name) = frames.first().and_then(|frame| frame.func_name()) {
        message = format!("{message} (in {name})");
    }
    // A panicking guest says why through `fail` before it traps.
    if let Some((_, said)) = &guest.failed {
        message = format!("{said}: {message}");
    }
    if guest.memory_refused {
        return CallFault::new(
            FaultCause::Memory,
            format!("its memory limit (plugins.memory_bytes) was reached: {message}"),
        );
    }
    CallFault::new(FaultCause::Trap, message)
}

/// Which instance: of what compiled module, for whose rows.
type Key<'a> = (u64, NamespaceId, Option<&'a Arc<str>>);

/// An instance at its place.
struct Seated {
    /// No other one ever has it; 0 is none.
    number: u64,
    module: u64,
    namespace: NamespaceId,
    owner: Option<Arc<str>>,
    /// When it was used last, by [`Instances::clock`].
    used: u64,
    instance: Instance,
}

/// The instances of one worker: at most so many, the longest unused goes first. There are few: they are looked for one by
/// one, and hardly ever, since a setup knows where its own was.
pub struct Instances {
    shared: Arc<Shared>,
    limit: usize,
    clock: u64,
    random: u64,
    seated: Vec<Seated>,
    /// What their calls have taken of the worker's time for nothing.
    pub waste: Waste,
}

impl Instances {
    pub fn new(shared: Arc<Shared>, limit: usize) -> Instances {
        Instances { shared, limit: limit.max(1), clock: 0, random: 0, seated: Vec::new(), waste: Waste::default() }
    }

    /// The instance of a setup's module for whoever the space is entered for, made where there is none, with the setup
    /// configured, and its handle.
    pub fn get(&mut self, setup: &Setup, space: &mut Space) -> Result<(&mut Instance, u32), CallFault> {
        self.drop_at_random(key(setup, space));
        self.clock += 1;
        let seat = setup.seat.get();
        let place = match self.seated.get(seat.place) {
            Some(seated) if seated.number == seat.number => seat.place,
            _ => self.seat(setup, space)?,
        };
        let seated = &mut self.seated[place];
        seated.used = self.clock;
        if seated.number != seat.number {
            let handle = seated.instance.configure(setup, &mut space.part).map_err(CallFault::whole)?;
            setup.seat.set(Seat { place, number: seated.number, handle });
        } else if place != seat.place {
            setup.seat.set(Seat { place, ..seat });
        }
        Ok((&mut seated.instance, setup.seat.get().handle))
    }

    /// The place of a setup's instance, which is made where there is none.
    fn seat(&mut self, setup: &Setup, space: &Space) -> Result<usize, CallFault> {
        if let Some(place) = self.place(key(setup, space)) {
            return Ok(place);
        }
        self.make_room();
        let instance = Instance::new(&self.shared, &setup.plugin, &setup.module, space).map_err(CallFault::whole)?;
        let (module, namespace, owner) = (setup.module.id, space.namespace, space.owner.clone());
        // The clock has moved on since the last one.
        self.seated.push(Seated { number: self.clock, module, namespace, owner, used: self.clock, instance });
        Ok(self.seated.len() - 1)
    }

    fn place(&self, key: Key<'_>) -> Option<usize> {
        self.seated.iter().position(|seated| (seated.module, seated.namespace, seated.owner.as_ref()) == key)
    }

    /// Bytes of memory of the instance of a setup's module, if there is one.
    pub fn own_memory(&self, setup: &Setup, space: &Space) -> Option<usize> {
        let place = self.place(key(setup, space))?;
        Some(self.seated[place].instance.own_memory())
    }

    /// Drops the instance of a setup's module, if there is one.
    pub fn forget(&mut self, setup: &Setup, space: &Space) {
        self.forget_key(key(setup, space));
    }

    fn forget_key(&mut self, key: Key<'_>) {
        if let Some(place) = self.place(key) {
            self.seated.swap_remove(place);
        }
    }

    /// Nobody uses the setup any more. An instance without any is only memory.
    pub fn release(&mut self, setup: &Setup, space: &Space) {
        let Some(place) = self.place(key(setup, space)) else { return };
        let instance = &mut self.seated[place].instance;
        let released = instance.release(setup, &space.part);
        if let Err(fault) = &released {
            tracing::warn!(
                plugin = &*setup.plugin,
                cause = fault.cause.as_str(),
                "tg_release failed: {}",
                fault.message
            );
        }
        if released.is_err() || instance.handles.is_empty() {
            self.seated.swap_remove(place);
        }
    }

    /// All instances of a namespace for one user, or for shared tables: nothing there uses plugins any more.
    pub fn leave(&mut self, namespace: NamespaceId, user: Option<&Arc<str>>) {
        self.seated.retain(|seated| seated.namespace != namespace || seated.owner.as_ref() != user);
    }

    pub fn clear(&mut self) {
        self.seated.clear();
    }

    fn make_room(&mut self) {
        while self.seated.len() >= self.limit {
            let oldest = self.seated.iter().enumerate().min_by_key(|(_, seated)| seated.used).map(|(place, _)| place);
            let Some(oldest) = oldest else { return };
            self.seated.swap_remove(oldest);
        }
    }

    /// Plugins are pure: losing an instance between two calls must change nothing. Tests switch this on to prove it.
    fn drop_at_random(&mut self, key: Key<'_>) {
        let seed = self.shared.chaos();
        if seed == 0 {
            return;
        }
        self.random = if self.random == 0 { seed } else { self.random };
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        if self.random.is_multiple_of(3) {
            self.forget_key(key);
        }
    }
}

fn key<'a>(setup: &Setup, space: &'a Space) -> Key<'a> {
    (setup.module.id, space.namespace, space.owner.as_ref())
}
