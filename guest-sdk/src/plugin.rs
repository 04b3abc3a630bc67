//! The calls of ABI 1 in safe code: parameters by handle, batches of rows. `#[filter]` and `#[transform]` implement
//! [`Filter`] and [`Transform`] and export [`Plugin`]'s methods; nothing here is for plugin authors.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use wire::ImageBuilder;
use wire::abi::{
    CHANGE_DESCRIPTOR_BYTES, CONFIGURE_BYTES, Configure, Configured, DESCRIPTOR_BYTES, MAX_BATCH, Read, decode_schema,
    encode_schema,
};

pub use wire::abi::ABI;

use crate::change::RawChange;
use crate::output::{self, EachRow, Expansion, Rows};
use crate::params::{ParamValues, Params};
use crate::raw::{Window, host};
use crate::row::{ColumnSpec, Input, Row};

/// What all kinds have: parameters, and the columns they read.
pub trait Describe {
    type Params: Params;
    const READS: &'static [ColumnSpec];
    /// A transform's output columns; empty for a filter.
    const OUTPUT: &'static [(&'static str, wire::Type, bool)] = &[];
}

/// A row filter.
pub trait Filter: Describe {
    fn keep(params: &Self::Params, row: &Row<'_>) -> Result<bool, String>;
}

/// A row transform.
pub trait Transform: Describe {
    fn apply(params: &Self::Params, row: &Row<'_>, image: &mut ImageBuilder) -> Result<(), String>;
}

/// A change filter.
pub trait ChangeFilter: Describe {
    fn keep(params: &Self::Params, change: &RawChange<'_>) -> Result<bool, String>;
}

/// A change transform.
pub trait ChangeTransform: Describe {
    fn expand(params: &Self::Params, change: &RawChange<'_>, row: EachRow<'_>) -> Result<(), String>;
}

/// One parameter set against one input.
struct Setup<P> {
    params: P,
    input: Input,
}

/// A guest's whole state: what is configured, by handle, and the buffers of answers.
pub struct Plugin<P: Describe> {
    setups: Vec<Option<Setup<P::Params>>>,
    schema: Vec<u8>,
    rows: Option<Rows>,
    expansion: Option<Expansion>,
}

impl<P: Describe> Plugin<P> {
    pub const fn new() -> Self {
        Plugin { setups: Vec::new(), schema: Vec::new(), rows: None, expansion: None }
    }

    /// `tg_configure`: the packed [`Configured`], or all bits set after saying why.
    pub fn configure(&mut self, window: Window<'_>, at: u32) -> u64 {
        match self.try_configure(window, at) {
            Ok(configured) => configured.pack(),
            Err(message) => {
                host::fail(-1, &message);
                Configured::FAILED
            }
        }
    }

    fn try_configure(&mut self, window: Window<'_>, at: u32) -> Result<Configured, String> {
        let configure = Configure::from_bytes(window.load::<CONFIGURE_BYTES>(at));
        // The parameters' descriptor is the front of the message.
        let params = ParamValues::read::<P::Params>(window, at)?;
        let schema = decode_schema(window.bytes(configure.schema, configure.schema_len))
            .map_err(|error| alloc::format!("the input schema cannot be read: {error}"))?;
        let reads = resolve::<P>(window, configure)?;
        let schema_address = self.answer_schema()?;
        let handle = self.setups.iter().position(Option::is_none).unwrap_or_else(|| {
            self.setups.push(None);
            self.setups.len() - 1
        });
        self.setups[handle] = Some(Setup { params, input: Input { reads, schema } });
        Ok(Configured { handle: handle as u32, schema: schema_address })
    }

    /// Address of the output schema behind its length; 0 for a filter.
    fn answer_schema(&mut self) -> Result<u32, String> {
        if P::OUTPUT.is_empty() {
            return Ok(0);
        }
        let schema = encode_schema(&output::schema(P::OUTPUT)).map_err(|error| error.to_string())?;
        self.schema.clear();
        self.schema.extend_from_slice(&(schema.len() as u32).to_le_bytes());
        self.schema.extend_from_slice(&schema);
        Ok(self.schema.as_ptr() as usize as u32)
    }

    /// `tg_release`. A handle that is not in use is no mistake worth an instance.
    pub fn release(&mut self, handle: u32) {
        if let Some(setup) = self.setups.get_mut(handle as usize) {
            *setup = None;
        }
    }

    /// `tg_filter`: bit i set = row i is kept.
    pub fn filter(&mut self, window: Window<'_>, handle: u32, descriptors: u32, n: u32) -> u64
    where
        P: Filter,
    {
        let Some(setup) = self.setup(handle, n) else { return 0 };
        let mut kept = 0;
        for i in 0..n {
            let row = Row::at(window, descriptor(descriptors, i), &setup.input);
            match P::keep(&setup.params, &row) {
                Ok(keep) => kept |= u64::from(keep) << i,
                Err(message) => host::fail(i as i32, &message),
            }
        }
        kept
    }

    /// `tg_transform`: address and length of the output.
    pub fn transform(&mut self, window: Window<'_>, handle: u32, descriptors: u32, n: u32) -> u64
    where
        P: Transform,
    {
        let mut rows = self.rows.take().unwrap_or_else(|| Rows::new(P::OUTPUT.len() as u16));
        let Some(setup) = self.setup(handle, n) else { return 0 };
        rows.begin(n as usize);
        for i in 0..n {
            let row = Row::at(window, descriptor(descriptors, i), &setup.input);
            if let Err(message) = rows.row(i as usize, |image| P::apply(&setup.params, &row, image)) {
                host::fail(i as i32, &message);
            }
        }
        let rows = self.rows.insert(rows);
        u64::from(rows.bytes.as_ptr() as usize as u32) | (rows.bytes.len() as u64) << 32
    }

    /// `tg_filter` of a change filter: bit i set = change i is kept.
    pub fn filter_changes(&mut self, window: Window<'_>, handle: u32, descriptors: u32, n: u32) -> u64
    where
        P: ChangeFilter,
    {
        let Some(setup) = self.setup(handle, n) else { return 0 };
        let mut kept = 0;
        for i in 0..n {
            let change = RawChange::at(window, change_descriptor(descriptors, i), &setup.input);
            match P::keep(&setup.params, &change) {
                Ok(keep) => kept |= u64::from(keep) << i,
                Err(message) => host::fail(i as i32, &message),
            }
        }
        kept
    }

    /// `tg_transform` of a change transform: address and length of the output.
    pub fn transform_changes(&mut self, window: Window<'_>, handle: u32, descriptors: u32, n: u32) -> u64
    where
        P: ChangeTransform,
    {
        let mut expansion = self.expansion.take().unwrap_or_else(|| Expansion::new(P::OUTPUT.len() as u16));
        let Some(setup) = self.setup(handle, n) else { return 0 };
        expansion.begin();
        for i in 0..n {
            let change = RawChange::at(window, change_descriptor(descriptors, i), &setup.input);
            if let Err(message) = expansion.change(|row| P::expand(&setup.params, &change, row)) {
                host::fail(i as i32, &message);
            }
        }
        expansion.end();
        let expansion = self.expansion.insert(expansion);
        u64::from(expansion.bytes.as_ptr() as usize as u32) | (expansion.bytes.len() as u64) << 32
    }

    /// What the last transform answered.
    pub fn output(&self) -> &[u8] {
        let rows = self.rows.as_ref().map(|rows| &rows.bytes[..]);
        rows.or(self.expansion.as_ref().map(|expansion| &expansion.bytes[..])).unwrap_or_default()
    }

    fn setup(&self, handle: u32, n: u32) -> Option<&Setup<P::Params>> {
        let setup = self.setups.get(handle as usize).and_then(Option::as_ref);
        if setup.is_none() {
            host::fail(-1, "the handle is not configured");
        } else if n as usize > MAX_BATCH {
            host::fail(-1, "a batch has at most 64 rows");
            return None;
        }
        setup
    }
}

impl<P: Describe> Default for Plugin<P> {
    fn default() -> Self {
        Plugin::new()
    }
}

fn descriptor(descriptors: u32, i: u32) -> u32 {
    descriptors.wrapping_add(i * DESCRIPTOR_BYTES as u32)
}

fn change_descriptor(descriptors: u32, i: u32) -> u32 {
    descriptors.wrapping_add(i * CHANGE_DESCRIPTOR_BYTES as u32)
}

/// The host's answer to the manifest's `column` lines, checked: loads trust the kinds from here on.
fn resolve<P: Describe>(window: Window<'_>, configure: Configure) -> Result<Vec<Read>, String> {
    if configure.reads_len as usize != P::READS.len() {
        return Err(alloc::format!("{} columns were given for {}", configure.reads_len, P::READS.len()));
    }
    let mut reads = Vec::with_capacity(P::READS.len());
    for (i, spec) in P::READS.iter().enumerate() {
        let read = Read::from_bytes(window.load(configure.reads.wrapping_add(i as u32 * 4)));
        spec.check(read)?;
        reads.push(read);
    }
    Ok(reads)
}

/// Says a panic's message before the trap that follows it. Without std there is no hook: the author's panic handler
/// decides.
#[cfg(target_arch = "wasm32")]
pub(crate) fn report_panics() {
    #[cfg(feature = "std")]
    std::panic::set_hook(alloc::boxed::Box::new(|info| host::fail(-1, &info.to_string().replace('\n', " "))));
}
