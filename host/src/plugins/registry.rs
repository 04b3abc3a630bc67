//! All plugins of the server: compiled modules by hash, rings by namespace, workers.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use sha2::{Digest, Sha256};
use wire::abi::{ManifestLine, WINDOW_ALIGN};
use wire::{Schema, abi};

use super::engine::{Compiled, Engine};
use super::instance::{CallFault, Instances, Map, Setup, Space, SpaceKind};
use super::logs::Logs;
use super::meters::{Meter, Meters};
use super::pipeline::{Left, OpenStage, Runner, Unit};
use super::window::{Lease, Mapping, Ring, WorkerPart};
use super::{
    ChangeOutput, Changes, Cut, FaultCause, Input, Inspected, Measured, Opened, Piped, PipedChanges, PipelineId,
    PluginError, PluginOptions, Rows, Stage, StageError, UnitFault, check, params, selftest,
};
use crate::catalog::{NamespaceId, OnError, Semantics, Seq};
use crate::telemetry::Metrics;

/// Where module bytes come from when a hash is not compiled yet, and what else only the store knows.
pub trait ModuleSource: Send + Sync {
    fn wasm(&self, sha256: &str) -> Result<Option<bytes::Bytes>, String>;

    /// What a namespace is called: a label in metrics. Without a name it is its number.
    fn namespace_name(&self, _namespace: NamespaceId) -> Option<String> {
        None
    }

    /// A secret of this store, made once: the key under which compiled modules are kept.
    fn secret(&self) -> Result<[u8; 32], String>;
}

/// What all workers share.
pub struct Shared {
    pub options: PluginOptions,
    pub engine: Engine,
    pub mapping: Mapping,
    pub metrics: Arc<Metrics>,
    pub logs: Arc<Logs>,
    meters: Meters,
    source: Box<dyn ModuleSource>,
    /// Read on the commit path, so it is swapped whole; changed under `rings_change`.
    rings: ArcSwap<HashMap<NamespaceId, Arc<Ring>>>,
    rings_change: Mutex<()>,
    chaos: AtomicU64,
}

impl Shared {
    pub fn chaos(&self) -> u64 {
        self.chaos.load(Ordering::Relaxed)
    }

    /// The namespace's ring, made now where there is none.
    fn ring(&self, namespace: NamespaceId) -> Result<Arc<Ring>, PluginError> {
        let _change = self.rings_change.lock().unwrap_or_else(PoisonError::into_inner);
        let rings = self.rings.load();
        if let Some(ring) = rings.get(&namespace) {
            return Ok(ring.clone());
        }
        let ring = Ring::new(self.options.ring_bytes, self.metrics.ring_bytes.clone()).map_err(|error| {
            PluginError::Host(format!("a ring of {} bytes cannot be made: {error}", self.options.ring_bytes))
        })?;
        let ring = Arc::new(ring);
        let mut changed = HashMap::clone(&rings);
        changed.insert(namespace, ring.clone());
        self.rings.store(Arc::new(changed));
        Ok(ring)
    }

    /// Lets go of the rings that no worker has any more.
    fn sweep_rings(&self) {
        let _change = self.rings_change.lock().unwrap_or_else(PoisonError::into_inner);
        let rings = self.rings.load_full();
        let mut changed = HashMap::clone(&rings);
        drop(rings);
        // Counted are: the map in place, the copy made here, and the workers that map the ring.
        changed.retain(|_, ring| Arc::strong_count(ring) > 2);
        self.rings.store(Arc::new(changed));
    }
}

/// Handle to the plugin side; clones share it.
#[derive(Clone)]
pub struct Plugins {
    shared: Arc<Shared>,
}

impl Plugins {
    pub fn new(
        options: PluginOptions,
        source: Box<dyn ModuleSource>,
        metrics: Arc<Metrics>,
    ) -> Result<Plugins, PluginError> {
        let engine = Engine::new(&options, || source.secret())?;
        let mapping = match selftest::window(&engine) {
            Ok(()) => Mapping::InPlace,
            Err(reason) => {
                tracing::warn!(%reason, "rows cannot be mapped into plugins here; they are copied (guest_bytes_copied counts)");
                Mapping::Copy
            }
        };
        Plugins::with_mapping(options, source, metrics, engine, mapping)
    }

    /// With the window mapped or copied, whatever this machine can do: for tests and benchmarks.
    pub fn mapped(
        options: PluginOptions,
        source: Box<dyn ModuleSource>,
        metrics: Arc<Metrics>,
        mapping: Mapping,
    ) -> Result<Plugins, PluginError> {
        let engine = Engine::new(&options, || source.secret())?;
        Plugins::with_mapping(options, source, metrics, engine, mapping)
    }

    fn with_mapping(
        mut options: PluginOptions,
        source: Box<dyn ModuleSource>,
        metrics: Arc<Metrics>,
        engine: Engine,
        mapping: Mapping,
    ) -> Result<Plugins, PluginError> {
        let whole = |bytes: u32| bytes.max(1).checked_next_multiple_of(WINDOW_ALIGN);
        let too_large =
            || PluginError::Host("plugins.ring_bytes and plugins.worker_bytes are over 2 GiB together".to_owned());
        options.ring_bytes = whole(options.ring_bytes).ok_or_else(too_large)?;
        options.worker_bytes = whole(options.worker_bytes).ok_or_else(too_large)?;
        let window = options.ring_bytes.checked_add(options.worker_bytes);
        if window.is_none_or(|bytes| bytes > i32::MAX as u32) {
            return Err(too_large());
        }
        let chaos = options.drop_instances_seed;
        let shared = Shared {
            options,
            engine,
            mapping,
            meters: Meters::new(metrics.clone()),
            metrics,
            logs: Arc::new(Logs::new(rand::random())),
            source,
            rings: ArcSwap::default(),
            rings_change: Mutex::new(()),
            chaos: AtomicU64::new(chaos),
        };
        Ok(Plugins { shared: Arc::new(shared) })
    }

    /// Checks an upload: size, wasmparser limits, manifest, ABI, imports, exports, compiles, and tries an instance (window,
    /// configure with defaults where there are no required parameters).
    pub fn inspect(&self, body: &[u8]) -> Result<Inspected, PluginError> {
        let checked = check::upload(&self.shared.options, body)?;
        let (module, compile_time) = self.shared.engine.compile(&self.shared.options, &checked)?;
        let instance_bytes = self.try_instance(&module)?;
        Ok(Inspected {
            wasm: checked.wasm,
            sha256: checked.sha256,
            kind: checked.kind,
            abi: abi::ABI,
            manifest: checked.manifest,
            measured: Measured { compile_time, instance_bytes },
        })
    }

    /// Bytes of memory that the instance had beside its window.
    fn try_instance(&self, module: &Arc<Compiled>) -> Result<usize, PluginError> {
        let mut worker = self.throw_away();
        let refused = |fault: CallFault| {
            PluginError::Refused(format!(
                "the module fails when it is tried ({}): {}",
                fault.cause.as_str(),
                fault.message
            ))
        };
        let input = params::declared_schema(&module.manifest);
        if !params::all_have_defaults(&module.manifest) {
            let name: Arc<str> = "upload".into();
            return worker.try_start(&name, module).map_err(refused);
        }
        let setup = setup(&tried("upload"), self.shared.meters.unseen(), module.clone(), &input)?;
        let owner = Owner::shared(NamespaceId(0));
        match worker.configure(&owner, &setup)? {
            // Deliberate: it may need a column it looks up by name. Subscribing will tell.
            Err(fault) if fault.cause == FaultCause::Failed => {
                tracing::debug!("an upload does not take its declared columns alone: {}", fault.message);
            }
            Err(fault) => return Err(refused(fault)),
            Ok(_) => {}
        }
        let bytes = worker.spaces.get(&owner.space()).and_then(|space| worker.instances.own_memory(&setup, space));
        bytes.ok_or_else(|| PluginError::Host("the instance that was tried is not there".to_owned()))
    }

    /// What plugins said through `log`.
    pub fn logs(&self) -> &Logs {
        &self.shared.logs
    }

    /// The plugin is gone, and one that is made again under its name is another one.
    pub fn forget(&self, namespace: NamespaceId, plugin: &str) {
        self.shared.logs.forget(namespace, plugin);
        self.shared.meters.forget(namespace, plugin);
    }

    /// Whether a pipeline of the namespace was ever opened: only then is [`Plugins::publish`] worth finding a section for.
    pub fn has_ring(&self, namespace: NamespaceId) -> bool {
        self.shared.rings.load().contains_key(&namespace)
    }

    /// The commit side: appends a commit's shared section to the namespace's ring, if that namespace has one.
    /// Never waits for a plugin; an occupied slot leaves the ring alone.
    pub fn publish(&self, namespace: NamespaceId, seq: Seq, section: &[u8]) {
        if let Some(ring) = self.shared.rings.load().get(&namespace) {
            ring.publish(seq, section);
        }
    }

    /// Tries a pipeline on a throw-away instance: order of kinds, parameter errors, missing columns, output schema.
    pub fn check(
        &self,
        namespace: NamespaceId,
        stages: &[Stage],
        input: &Schema,
        on_error: OnError,
    ) -> Result<Opened, StageError> {
        self.throw_away().open(Owner::shared(namespace), stages, input, on_error)
    }

    /// The plugin side of one worker thread.
    pub fn worker(&self, index: usize) -> PluginWorker {
        tracing::debug!(index, "plugin worker");
        PluginWorker::new(self.shared.clone(), true)
    }

    /// A worker whose instances have no ring: for trying things.
    pub fn throw_away(&self) -> PluginWorker {
        PluginWorker::new(self.shared.clone(), false)
    }

    /// Forgets the compiled code of all modules but these.
    pub fn sweep_cache(&self, needed: impl Fn(&str) -> bool) {
        self.shared.engine.sweep_cache(needed);
    }

    /// Plugins are pure, so instances may be lost between any two calls. From now on they are, at random: for tests.
    /// 0 ends it.
    pub fn drop_instances_at_random(&self, seed: u64) {
        self.shared.chaos.store(seed, Ordering::Relaxed);
    }
}

/// Whose rows go through a pipeline: those of a namespace's shared tables, or one user's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    pub namespace: NamespaceId,
    pub user: Option<Arc<str>>,
}

impl Owner {
    pub fn shared(namespace: NamespaceId) -> Owner {
        Owner { namespace, user: None }
    }

    pub fn user(namespace: NamespaceId, user: &str) -> Owner {
        Owner { namespace, user: Some(user.into()) }
    }

    fn space(&self) -> (NamespaceId, SpaceKind) {
        let kind = if self.user.is_some() { SpaceKind::Users } else { SpaceKind::Shared };
        (self.namespace, kind)
    }
}

/// Owned by one worker thread: its instances, its part of the windows.
pub struct PluginWorker {
    shared: Arc<Shared>,
    with_ring: bool,
    spaces: Map<(NamespaceId, SpaceKind), Space>,
    instances: Instances,
    pipelines: Map<PipelineId, Pipeline>,
    next: u64,
}

/// An open pipeline.
struct Pipeline {
    owner: Owner,
    stages: Vec<OpenStage>,
    on_error: OnError,
    semantics: Semantics,
    transforms: bool,
}

impl PluginWorker {
    fn new(shared: Arc<Shared>, with_ring: bool) -> PluginWorker {
        let instances = Instances::new(shared.clone(), shared.options.instances_per_worker);
        PluginWorker { shared, with_ring, spaces: Map::default(), instances, pipelines: Map::default(), next: 1 }
    }

    pub fn open(
        &mut self,
        owner: Owner,
        stages: &[Stage],
        input: &Schema,
        on_error: OnError,
    ) -> Result<Opened, StageError> {
        let mut pipeline = Pipeline {
            owner,
            stages: Vec::with_capacity(stages.len()),
            on_error,
            semantics: Semantics::Map,
            transforms: false,
        };
        let mut output = None;
        let opened = stages.iter().enumerate().try_for_each(|(number, stage)| {
            self.open_stage(&mut pipeline, stage, output.as_ref().unwrap_or(input))
                .map(|schema| output = schema.or(output.take()))
                .map_err(|error| StageError { stage: number, error })
        });
        let id = PipelineId(self.next);
        self.next += 1;
        pipeline.transforms = output.is_some();
        let semantics = pipeline.semantics;
        self.pipelines.insert(id, pipeline);
        if let Err(error) = opened {
            self.close(id);
            return Err(error);
        }
        Ok(Opened { id, output, semantics })
    }

    /// Configures one more stage of a pipeline; its output schema, for a transform.
    fn open_stage(
        &mut self,
        pipeline: &mut Pipeline,
        stage: &Stage,
        input: &Schema,
    ) -> Result<Option<Schema>, PluginError> {
        let module = self.shared.engine.module(&self.shared.options, &*self.shared.source, &stage.sha256)?;
        fits(pipeline, &stage.name, &module)?;
        if module.kind.sees_changes() {
            pipeline.semantics = Semantics::Feed;
        }
        let meter = self.meter(pipeline.owner.namespace, &stage.name);
        let setup = setup(stage, meter, module, input)?;
        let configured = self.configure(&pipeline.owner, &setup)?;
        let schema = configured.as_ref().ok().and_then(Option::as_ref);
        let kinds = schema.map(|schema| schema.columns.iter().map(|column| column.ty.kind()).collect());
        let configured = configured.map_err(|fault| refused(&setup, pipeline.stages.len(), fault));
        pipeline.stages.push(OpenStage { setup, kinds: kinds.unwrap_or_default() });
        configured
    }

    fn meter(&self, namespace: NamespaceId, plugin: &str) -> Arc<Meter> {
        if !self.with_ring {
            return self.shared.meters.unseen();
        }
        let name = || self.shared.source.namespace_name(namespace).unwrap_or_else(|| namespace.0.to_string());
        self.shared.meters.of(namespace, plugin, name)
    }

    /// Runs any number of rows (in batches of ≤ 64 per call) through a pipeline of row kinds. An error names the first row
    /// that fails alone.
    pub fn run(&mut self, pipeline: PipelineId, rows: Rows<'_>) -> Result<Piped, Cut> {
        let count = rows.places.len();
        let (left, transforms, faults) =
            self.through(pipeline, Semantics::Map, &rows, |runner, stages| runner.rows(stages, rows.places))?;
        let kept = match left {
            Left::Kept(keep) => return Ok(Piped { keep, output: None, faults }),
            Left::Units(kept) => kept,
        };
        let mut piped = Piped { keep: vec![false; count], output: None, faults };
        for row in &kept {
            piped.keep[row.index()] = true;
        }
        piped.output = transforms.then(|| kept.into_iter().filter_map(|row| row.into_made()?.1).collect());
        Ok(piped)
    }

    /// The same with changes, for a pipeline with a change kind.
    pub fn run_changes(&mut self, pipeline: PipelineId, changes: Changes<'_>) -> Result<PipedChanges, Cut> {
        let (units, _, faults) =
            self.through(pipeline, Semantics::Feed, &changes, |runner, stages| runner.changes(stages, changes.places))?;
        let output = |unit: Unit| {
            let index = unit.index();
            unit.into_made().map(|(op, image)| ChangeOutput { index, op, image })
        };
        Ok(PipedChanges { outputs: units.into_iter().filter_map(output).collect(), faults })
    }

    /// What is left behind the last stage, whether any transforms, and what failed.
    fn through<At, L>(
        &mut self,
        pipeline: PipelineId,
        semantics: Semantics,
        input: &Input<'_, At>,
        run: impl FnOnce(&mut Runner<'_>, &[OpenStage]) -> Result<L, PluginError>,
    ) -> Result<(L, bool, Vec<UnitFault>), Cut> {
        let host = |message: String| Cut { error: PluginError::Host(message), faults: Vec::new() };
        let open = self.pipelines.get(&pipeline).filter(|open| open.semantics == semantics);
        let open =
            open.ok_or_else(|| host(format!("no pipeline {} is open for {} streams", pipeline.0, semantics.as_str())))?;
        let space = self.spaces.get_mut(&open.owner.space());
        let space = space.ok_or_else(|| host("an open pipeline without a window".to_owned()))?;
        space.enter(open.owner.user.as_ref());
        let lease = lease(&self.shared, space, input.commit, input.base.len());
        let mut runner = Runner {
            shared: &self.shared,
            space,
            instances: &mut self.instances,
            origin: input.origin,
            base: input.base,
            lease,
            on_error: open.on_error,
            counts: self.with_ring,
            answered: 0,
            stage: 0,
            faults: Vec::new(),
        };
        let left = run(&mut runner, &open.stages);
        let faults = runner.faults;
        match left {
            Ok(left) => Ok((left, open.transforms, faults)),
            Err(error) => Err(Cut { error, faults }),
        }
    }

    pub fn close(&mut self, pipeline: PipelineId) {
        let Some(Pipeline { owner, stages, .. }) = self.pipelines.remove(&pipeline) else { return };
        let others = |of: &dyn Fn(&Owner) -> bool| self.pipelines.values().filter(|other| of(&other.owner)).count();
        if others(&|other| *other == owner) == 0 {
            self.instances.leave(owner.namespace, owner.user.as_ref());
        }
        if others(&|other| other.space() == owner.space()) == 0 {
            self.spaces.remove(&owner.space());
            if self.with_ring {
                self.shared.sweep_rings();
            }
            return;
        }
        let Some(space) = self.spaces.get_mut(&owner.space()) else { return };
        space.enter(owner.user.as_ref());
        let same = || self.pipelines.values().filter(|other| other.owner == owner);
        for OpenStage { setup, .. } in stages {
            if !same().any(|other| other.stages.iter().any(|stage| stage.setup.key == setup.key)) {
                self.instances.release(&setup, space);
            }
        }
    }

    /// The outer error is ours, the inner one the guest's.
    fn configure(&mut self, owner: &Owner, setup: &Setup) -> Result<Result<Option<Schema>, CallFault>, PluginError> {
        let space = space(&self.shared, &mut self.spaces, self.with_ring, owner)?;
        let configured = self.instances.get(setup, space).map(|(instance, _)| instance.output_schema(setup).cloned());
        if let Err(fault) = &configured {
            // A guest that says no to its parameters has not failed.
            if fault.cause != FaultCause::Failed {
                self.shared.metrics.plugin_failures.inc();
                setup.meter.failed(fault.cause);
                self.instances.forget(setup, space);
            }
        }
        Ok(configured)
    }

    /// Only start, ABI and window.
    fn try_start(&mut self, name: &Arc<str>, module: &Compiled) -> Result<usize, CallFault> {
        let space = space(&self.shared, &mut self.spaces, self.with_ring, &Owner::shared(NamespaceId(0)))
            .map_err(|error| CallFault::new(FaultCause::Memory, error.to_string()))?;
        super::instance::Instance::new(&self.shared, name, module, space).map(|instance| instance.own_memory())
    }
}

impl Drop for PluginWorker {
    fn drop(&mut self) {
        self.instances.clear();
        self.spaces.clear();
        if self.with_ring {
            self.shared.sweep_rings();
        }
    }
}

/// The owner's space, made where there is none, and entered.
fn space<'a>(
    shared: &Shared,
    spaces: &'a mut Map<(NamespaceId, SpaceKind), Space>,
    with_ring: bool,
    owner: &Owner,
) -> Result<&'a mut Space, PluginError> {
    use std::collections::hash_map::Entry;
    let space = match spaces.entry(owner.space()) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => {
            let (namespace, kind) = *entry.key();
            // Users' rows are never in a ring, and who reads them has no business with the ring's.
            let ring = if with_ring && shared.mapping == Mapping::InPlace && kind == SpaceKind::Shared {
                Ok(shared.ring(namespace)?)
            } else {
                Err(shared.options.ring_bytes)
            };
            let part = WorkerPart::new(shared.options.worker_bytes, shared.mapping).map_err(|error| {
                PluginError::Host(format!(
                    "a worker part of {} bytes cannot be made: {error}",
                    shared.options.worker_bytes
                ))
            })?;
            entry.insert(Space::new(namespace, ring, part, with_ring))
        }
    };
    space.enter(owner.user.as_ref());
    Ok(space)
}

/// The ring's copy of what is run, where it has one.
fn lease(shared: &Shared, space: &Space, commit: Option<Seq>, bytes: usize) -> Option<Lease> {
    let (Some(seq), Ok(ring)) = (commit, &space.ring) else { return None };
    let lease = ring.lease(seq).filter(|lease| lease.len as usize == bytes);
    if lease.is_none() {
        shared.metrics.ring_misses.inc();
    }
    lease
}

/// Whether a module may be the next stage of a pipeline.
fn fits(pipeline: &Pipeline, name: &str, module: &Compiled) -> Result<(), PluginError> {
    let expanded =
        pipeline.stages.iter().find(|stage| stage.setup.module.kind == crate::catalog::PluginKind::ChangeTransform);
    if let Some(before) = expanded.filter(|_| module.kind.sees_changes()) {
        return Err(PluginError::Params(format!(
            "plugin {name} sees changes ({}), but plugin {} in front of it makes rows of them: put it before that one",
            module.kind.as_str(),
            before.setup.plugin
        )));
    }
    if pipeline.on_error != OnError::Pass {
        return Ok(());
    }
    if !module.kind.is_filter() {
        return Err(PluginError::Params(format!(
            "on_error=pass is for filters, and plugin {name} is a {}: use stop or skip",
            module.kind.as_str()
        )));
    }
    let forbidden = |line: &ManifestLine| matches!(line, ManifestLine::Plugin { pass: Some(false), .. });
    if module.manifest.iter().any(forbidden) {
        return Err(PluginError::Params(format!(
            "plugin {name} forbids on_error=pass: what it cannot judge must not go through; use stop or skip"
        )));
    }
    Ok(())
}

/// An upload that is no version of anything yet.
fn tried(name: &str) -> Stage {
    Stage { name: name.to_owned(), version: 0, sha256: String::new(), params: String::new() }
}

fn setup(stage: &Stage, meter: Arc<Meter>, module: Arc<Compiled>, input: &Schema) -> Result<Setup, PluginError> {
    let (params, params_at) = params::image(&stage.name, &module.manifest, &stage.params)?;
    let reads = params::reads(&stage.name, &module.manifest, input)?;
    let input = abi::encode_schema(input).map_err(|error| PluginError::Host(format!("the input schema: {error}")))?;
    let mut hash = Sha256::new();
    for part in [module.sha256.as_bytes(), &params, &reads, &input] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let (plugin, key) = (stage.name.as_str().into(), hash.finalize().into());
    let seat = Cell::default();
    Ok(Setup { plugin, version: stage.version, meter, module, key, params, params_at, reads, input, seat })
}

/// A guest that will not be configured says what is wrong with its parameters; everything else is its fault.
fn refused(setup: &Setup, stage: usize, fault: CallFault) -> PluginError {
    match fault.cause {
        FaultCause::Failed => PluginError::Params(format!("plugin {}: {}", setup.plugin, fault.message)),
        _ => fault.of(&setup.plugin, Some(stage), None),
    }
}
