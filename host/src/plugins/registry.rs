//! All plugins of the server: compiled modules by hash, rings by namespace, workers.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use sha2::{Digest, Sha256};
use wire::abi::WINDOW_ALIGN;
use wire::{Schema, abi};

use super::engine::{Compiled, Engine};
use super::instance::{CallFault, Instances, Setup, Space};
use super::pipeline::{Row, Runner};
use super::window::{Lease, Mapping, Ring, WorkerPart};
use super::{
    FaultCause, Inspected, Opened, Piped, PipelineId, PluginError, PluginOptions, Rows, Stage, check, params, selftest,
};
use crate::catalog::NamespaceId;
use crate::catalog::Seq;
use crate::telemetry::Metrics;

/// Counters that plugins keep through `metric`, over all plugins: more would make `/metrics` theirs to flood.
const GUEST_METRICS: usize = 512;

/// Where module bytes come from when a hash is not compiled yet.
pub trait ModuleSource: Send + Sync {
    fn wasm(&self, sha256: &str) -> Result<Option<bytes::Bytes>, String>;
}

/// What all workers share.
pub struct Shared {
    pub options: PluginOptions,
    pub engine: Engine,
    pub mapping: Mapping,
    pub metrics: Arc<Metrics>,
    source: Box<dyn ModuleSource>,
    /// Read on the commit path, so it is swapped whole; changed under `rings_change`.
    rings: ArcSwap<HashMap<NamespaceId, Arc<Ring>>>,
    rings_change: Mutex<()>,
    guest_metrics: Mutex<HashSet<(String, String)>>,
    chaos: AtomicU64,
}

impl Shared {
    pub fn chaos(&self) -> u64 {
        self.chaos.load(Ordering::Relaxed)
    }

    /// Adds what a call counted to the plugin's counters.
    pub fn count_guest_metrics(&self, plugin: &str, counted: &mut Vec<(String, f64)>) {
        for (name, value) in counted.drain(..) {
            let key = (plugin.to_owned(), name);
            let mut known = self.guest_metrics.lock().unwrap_or_else(PoisonError::into_inner);
            if !known.contains(&key) && known.len() >= GUEST_METRICS {
                tracing::warn!(target: "plugin", plugin, "metric `{}` is not counted: all plugins together have {GUEST_METRICS}", key.1);
                continue;
            }
            known.insert(key.clone());
            drop(known);
            let labels = vec![("plugin", key.0), ("name", key.1)];
            self.metrics.plugin_metrics.get_or_create(&labels).inc_by(value);
        }
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
        let engine = Engine::new(&options)?;
        let mapping = match selftest::window(&engine) {
            Ok(()) => Mapping::InPlace,
            Err(reason) => {
                tracing::warn!(%reason, "rows cannot be mapped into plugins here; they are copied (guest_bytes_copied counts)");
                Mapping::Copy
            }
        };
        Plugins::with_mapping(options, source, metrics, engine, mapping)
    }

    #[cfg(test)]
    pub fn mapped(
        options: PluginOptions,
        source: Box<dyn ModuleSource>,
        metrics: Arc<Metrics>,
        mapping: Mapping,
    ) -> Result<Plugins, PluginError> {
        let engine = Engine::new(&options)?;
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
        let shared = Shared {
            options,
            engine,
            mapping,
            metrics,
            source,
            rings: ArcSwap::default(),
            rings_change: Mutex::new(()),
            guest_metrics: Mutex::default(),
            chaos: AtomicU64::new(0),
        };
        Ok(Plugins { shared: Arc::new(shared) })
    }

    /// Checks an upload: size, wasmparser limits, manifest, ABI, imports, exports, compiles, and tries an instance (window,
    /// configure with defaults where there are no required parameters).
    pub fn inspect(&self, body: &[u8]) -> Result<Inspected, PluginError> {
        let checked = check::upload(&self.shared.options, body)?;
        let module = self.shared.engine.compile(&checked)?;
        self.try_instance(&module)?;
        Ok(Inspected {
            wasm: checked.wasm,
            sha256: checked.sha256,
            kind: checked.kind,
            abi: abi::ABI,
            manifest: checked.manifest,
        })
    }

    fn try_instance(&self, module: &Arc<Compiled>) -> Result<(), PluginError> {
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
        let setup = setup("upload", module.clone(), "", &input)?;
        match worker.configure(NamespaceId(0), &setup)? {
            // Deliberate: it may need a column it looks up by name. Subscribing will tell.
            Err(fault) if fault.cause == FaultCause::Failed => {
                tracing::debug!("an upload does not take its declared columns alone: {}", fault.message);
                Ok(())
            }
            Err(fault) => Err(refused(fault)),
            Ok(_) => Ok(()),
        }
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

    /// Tries a pipeline on a throw-away instance: parameter errors, missing columns, output schema.
    pub fn check(
        &self,
        namespace: NamespaceId,
        stages: &[Stage],
        input: &Schema,
    ) -> Result<Option<Schema>, PluginError> {
        self.throw_away().open(namespace, stages, input).map(|opened| opened.output)
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

    /// Plugins are pure, so instances may be lost between any two calls. From now on they are, at random: for tests.
    /// 0 ends it.
    pub fn drop_instances_at_random(&self, seed: u64) {
        self.shared.chaos.store(seed, Ordering::Relaxed);
    }
}

/// Owned by one worker thread: its instances, its part of the windows.
pub struct PluginWorker {
    shared: Arc<Shared>,
    with_ring: bool,
    spaces: HashMap<NamespaceId, Space>,
    instances: Instances,
    pipelines: HashMap<PipelineId, Pipeline>,
    next: u64,
}

/// An open pipeline.
struct Pipeline {
    namespace: NamespaceId,
    stages: Vec<Arc<Setup>>,
    transforms: bool,
}

impl PluginWorker {
    fn new(shared: Arc<Shared>, with_ring: bool) -> PluginWorker {
        let instances = Instances::new(shared.clone(), shared.options.instances_per_worker);
        PluginWorker { shared, with_ring, spaces: HashMap::new(), instances, pipelines: HashMap::new(), next: 1 }
    }

    pub fn open(&mut self, namespace: NamespaceId, stages: &[Stage], input: &Schema) -> Result<Opened, PluginError> {
        let mut output = None;
        let mut setups = Vec::with_capacity(stages.len());
        let opened = stages.iter().try_for_each(|stage| {
            let module = self.shared.engine.module(&self.shared.options, &*self.shared.source, &stage.sha256)?;
            let setup = Arc::new(setup(&stage.name, module, &stage.params, output.as_ref().unwrap_or(input))?);
            let configured = self.configure(namespace, &setup)?;
            setups.push(setup.clone());
            if let Some(schema) = configured.map_err(|fault| refused(&setup, fault))? {
                output = Some(schema);
            }
            Ok(())
        });
        let id = PipelineId(self.next);
        self.next += 1;
        self.pipelines.insert(id, Pipeline { namespace, stages: setups, transforms: output.is_some() });
        if let Err(error) = opened {
            self.close(id);
            return Err(error);
        }
        Ok(Opened { id, output })
    }

    /// Runs any number of rows (in batches of ≤ 64 per call) through the pipeline. A fault names the first row that fails alone.
    pub fn run(&mut self, pipeline: PipelineId, rows: Rows<'_>) -> Result<Piped, PluginError> {
        let open = self.pipelines.get(&pipeline);
        let Pipeline { namespace, stages, transforms } =
            open.ok_or_else(|| PluginError::Host(format!("pipeline {} is not open", pipeline.0)))?;
        let space = self.spaces.get_mut(namespace);
        let space = space.ok_or_else(|| PluginError::Host("an open pipeline without a window".to_owned()))?;
        let lease = lease(&self.shared, space, &rows);
        let instances = &mut self.instances;
        let mut runner = Runner { shared: &self.shared, space, instances, base: rows.base, lease, answered: 0 };
        let kept = runner.run(stages, rows.places)?;

        let mut piped = Piped { keep: vec![false; rows.places.len()], output: None };
        for row in &kept {
            piped.keep[row.index()] = true;
        }
        piped.output = transforms.then(|| kept.into_iter().filter_map(Row::into_made).collect());
        Ok(piped)
    }

    pub fn close(&mut self, pipeline: PipelineId) {
        let Some(Pipeline { namespace, stages, .. }) = self.pipelines.remove(&pipeline) else { return };
        let others: Vec<_> = self.pipelines.values().filter(|other| other.namespace == namespace).collect();
        if others.is_empty() {
            self.instances.leave(namespace);
            self.spaces.remove(&namespace);
            if self.with_ring {
                self.shared.sweep_rings();
            }
            return;
        }
        let Some(space) = self.spaces.get(&namespace) else { return };
        for setup in stages {
            if !others.iter().any(|other| other.stages.iter().any(|stage| stage.key == setup.key)) {
                self.instances.release(&setup, space);
            }
        }
    }

    /// The outer error is ours, the inner one the guest's.
    fn configure(
        &mut self,
        namespace: NamespaceId,
        setup: &Setup,
    ) -> Result<Result<Option<Schema>, CallFault>, PluginError> {
        let space = space(&self.shared, &mut self.spaces, self.with_ring, namespace)?;
        let configured = self.instances.get(setup, space).map(|(_, output)| output);
        if let Err(fault) = &configured {
            // A guest that says no to its parameters has not failed.
            if fault.cause != FaultCause::Failed {
                self.shared.metrics.plugin_failures.inc();
                self.instances.forget(setup, namespace);
            }
        }
        Ok(configured)
    }

    /// Only start, ABI and window.
    fn try_start(&mut self, name: &Arc<str>, module: &Compiled) -> Result<(), CallFault> {
        let space = space(&self.shared, &mut self.spaces, self.with_ring, NamespaceId(0))
            .map_err(|error| CallFault::new(FaultCause::Memory, error.to_string()))?;
        super::instance::Instance::new(&self.shared, name, module, space).map(drop)
    }
}

impl Drop for PluginWorker {
    fn drop(&mut self) {
        let namespaces: Vec<_> = self.spaces.keys().copied().collect();
        for namespace in namespaces {
            self.instances.leave(namespace);
        }
        self.spaces.clear();
        if self.with_ring {
            self.shared.sweep_rings();
        }
    }
}

fn space<'a>(
    shared: &Shared,
    spaces: &'a mut HashMap<NamespaceId, Space>,
    with_ring: bool,
    namespace: NamespaceId,
) -> Result<&'a mut Space, PluginError> {
    use std::collections::hash_map::Entry;
    let entry = match spaces.entry(namespace) {
        Entry::Occupied(entry) => return Ok(entry.into_mut()),
        Entry::Vacant(entry) => entry,
    };
    let ring = if with_ring && shared.mapping == Mapping::InPlace {
        Ok(shared.ring(namespace)?)
    } else {
        Err(shared.options.ring_bytes)
    };
    let part = WorkerPart::new(shared.options.worker_bytes, shared.mapping).map_err(|error| {
        PluginError::Host(format!("a worker part of {} bytes cannot be made: {error}", shared.options.worker_bytes))
    })?;
    Ok(entry.insert(Space { namespace, ring, part }))
}

/// The ring's copy of the rows, where it has one.
fn lease(shared: &Shared, space: &Space, rows: &Rows<'_>) -> Option<Lease> {
    let (Some(seq), Ok(ring)) = (rows.commit, &space.ring) else { return None };
    let lease = ring.lease(seq).filter(|lease| lease.len as usize == rows.base.len());
    if lease.is_none() {
        shared.metrics.ring_misses.inc();
    }
    lease
}

fn setup(plugin: &str, module: Arc<Compiled>, text: &str, input: &Schema) -> Result<Setup, PluginError> {
    let (params, params_at) = params::image(plugin, &module.manifest, text)?;
    let reads = params::reads(plugin, &module.manifest, input)?;
    let input = abi::encode_schema(input).map_err(|error| PluginError::Host(format!("the input schema: {error}")))?;
    let mut hash = Sha256::new();
    for part in [module.sha256.as_bytes(), &params, &reads, &input] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    Ok(Setup { plugin: plugin.into(), module, key: hash.finalize().into(), params, params_at, reads, input })
}

/// A guest that will not be configured says what is wrong with its parameters; everything else is its fault.
fn refused(setup: &Setup, fault: CallFault) -> PluginError {
    match fault.cause {
        FaultCause::Failed => PluginError::Params(format!("plugin {}: {}", setup.plugin, fault.message)),
        _ => fault.of(&setup.plugin, None),
    }
}
