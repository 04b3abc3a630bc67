//! The check of a module before any of it runs or is compiled: form, size, features, structure, imports, exports,
//! manifest. Every refusal names what is wrong and the limit.

use bytes::Bytes;
use sha2::{Digest, Sha256};
use wasmparser::types::{EntityType, Types, TypesRef};
use wasmparser::{Encoding, Export, FuncType, Import, Parser, Payload, ValType, Validator, WasmFeatures};
use wire::abi::{ABI, MANIFEST_MAX_BYTES, MANIFEST_SECTION, ManifestLine, export, import};
use wire::image::MAX_COLUMNS;

use super::{PluginError, PluginOptions, params};
use crate::catalog::PluginKind;

/// Structure that no honest plugin comes near, and that keeps compiling and instantiating cheap.
const MAX_FUNCTIONS: u32 = 20_000;
const MAX_BODY_BYTES: usize = 128 * 1024;
const MAX_LOCALS: u64 = 2_000;
const MAX_TYPES: u32 = 5_000;
const MAX_IMPORTS: u32 = 16;
const MAX_EXPORTS: u32 = 64;
const MAX_GLOBALS: u32 = 5_000;
const MAX_SEGMENTS: u32 = 5_000;
pub const MAX_TABLES: u32 = 2;

/// What a manifest may list.
const MAX_PARAMS: usize = 64;
const MAX_NAME_BYTES: usize = 128;

pub const WASM_MAGIC: &[u8] = b"\0asm";
const PAGE: u64 = 64 * 1024;

/// What Rust, C, Zig and AssemblyScript compilers emit for plain wasm32. No threads, memory64, GC, exceptions, tail
/// calls, multiple memories, relaxed SIMD: what guests do not need is attack surface and not deterministic.
pub const FEATURES: WasmFeatures = WasmFeatures::MUTABLE_GLOBAL
    .union(WasmFeatures::FLOATS)
    .union(WasmFeatures::SATURATING_FLOAT_TO_INT)
    .union(WasmFeatures::SIGN_EXTENSION)
    .union(WasmFeatures::REFERENCE_TYPES)
    .union(WasmFeatures::MULTI_VALUE)
    .union(WasmFeatures::BULK_MEMORY)
    .union(WasmFeatures::SIMD)
    .union(WasmFeatures::EXTENDED_CONST);

/// A module that passed, not compiled yet.
#[derive(Clone, Debug)]
pub struct Checked {
    pub wasm: Bytes,
    pub sha256: String,
    pub kind: PluginKind,
    pub manifest: Vec<ManifestLine>,
}

/// An upload: wasm, or WAT text that is translated first.
pub fn upload(options: &PluginOptions, body: &[u8]) -> Result<Checked, PluginError> {
    if body.is_empty() {
        return refuse("the upload is empty: send a .wasm module or .wat text");
    }
    // Text is longer than what it says.
    let most = if body.starts_with(WASM_MAGIC) { options.module_bytes } else { 2 * options.module_bytes };
    at_most("the upload", body.len() as u64, "bytes", most as u64, Some("plugins.module_bytes"))?;
    module(options, binary(body)?)
}

/// A module as wasm, translated where it is WAT text.
fn binary(body: &[u8]) -> Result<Bytes, PluginError> {
    if body.starts_with(WASM_MAGIC) {
        return Ok(Bytes::copy_from_slice(body));
    }
    let no_wasm = "no WebAssembly module (it would start with \\0asm)";
    let Ok(text) = std::str::from_utf8(body) else {
        return refuse(format!("{no_wasm}, and no WAT text, which is UTF-8"));
    };
    wat::parse_str(text)
        .map(Bytes::from)
        .map_err(|error| PluginError::Refused(format!("{no_wasm}, and the WAT text does not parse: {error}")))
}

/// A module as wasm, an upload or one from the store.
pub fn module(options: &PluginOptions, wasm: Bytes) -> Result<Checked, PluginError> {
    at_most("the module", wasm.len() as u64, "bytes", options.module_bytes as u64, Some("plugins.module_bytes"))?;
    let (outline, types) = outline(options, &wasm)?;
    // The manifest first: of a module for another ABI, that is the thing to say.
    let manifest = parse_manifest(&outline.manifest)?;
    outline.check_imports(types.as_ref())?;
    let filter = outline.check_exports(types.as_ref())?;
    let kind = kind_of(filter, &manifest)?;
    Ok(Checked { sha256: hex(&Sha256::digest(&wasm)), wasm, kind, manifest })
}

/// The module, wasm or WAT text, as wasm with this manifest instead of whatever it had.
pub fn attach(options: &PluginOptions, body: &[u8], manifest: &str) -> Result<Vec<u8>, PluginError> {
    let wasm = binary(body)?;
    let mut out = Vec::with_capacity(wasm.len() + manifest.len() + 32);
    // A section begins where the one before ends, behind the module's head of eight bytes. (How long its own head is
    // nobody knows: lengths may be written with more bytes than they need.)
    let (mut from, mut end) = (0, 8);
    for payload in Parser::new(0).parse_all(&wasm) {
        let payload = payload.map_err(invalid)?;
        let Some((_, content)) = payload.as_section() else { continue };
        if matches!(&payload, Payload::CustomSection(section) if section.name() == MANIFEST_SECTION) {
            out.extend_from_slice(&wasm[from..end]);
            from = content.end;
        }
        end = content.end;
    }
    out.extend_from_slice(&wasm[from..]);
    let content = [&leb(MANIFEST_SECTION.len())[..], MANIFEST_SECTION.as_bytes(), manifest.as_bytes()].concat();
    out.push(0);
    out.extend_from_slice(&leb(content.len()));
    out.extend_from_slice(&content);
    module(options, Bytes::from(out.clone()))?;
    Ok(out)
}

fn leb(mut value: usize) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let byte = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            out.push(byte);
            return out;
        }
        out.push(byte | 0x80);
    }
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

fn refuse<T>(message: impl Into<String>) -> Result<T, PluginError> {
    Err(PluginError::Refused(message.into()))
}

fn invalid(error: wasmparser::BinaryReaderError) -> PluginError {
    PluginError::Refused(format!("the module is not valid WebAssembly as plugins may use it: {error}"))
}

/// `setting` is the configuration key that would raise the limit, where there is one.
fn at_most(what: &str, found: u64, unit: &str, limit: u64, setting: Option<&str>) -> Result<(), PluginError> {
    if found <= limit {
        return Ok(());
    }
    let raise = setting.map(|key| format!("; raise {key}")).unwrap_or_default();
    refuse(format!("{what} has {found} {unit}; at most {limit} are allowed{raise}"))
}

#[derive(Default)]
struct Outline {
    manifest: Vec<u8>,
    functions: u32,
    segments: u32,
    elements: u64,
    imports: Vec<ImportName>,
    exports: Vec<(String, Export<'static>)>,
    has_memory: bool,
}

struct ImportName {
    module: String,
    name: String,
    ty: wasmparser::TypeRef,
}

/// Reads the module section by section; each is held to its limits before the validator works on it.
fn outline(options: &PluginOptions, wasm: &[u8]) -> Result<(Outline, Types), PluginError> {
    let mut outline = Outline::default();
    let mut types = None;
    let mut validator = Validator::new_with_features(FEATURES);
    for payload in Parser::new(0).parse_all(wasm) {
        let payload = payload.map_err(invalid)?;
        outline.limit(options, &payload)?;
        match validator.payload(&payload).map_err(invalid)? {
            wasmparser::ValidPayload::Func(function, body) => {
                let mut function = function.into_validator(Default::default());
                function.validate(&body).map_err(invalid)?;
            }
            wasmparser::ValidPayload::End(end) => types = Some(end),
            _ => {}
        }
    }
    let types = types.ok_or_else(|| PluginError::Refused("the module ends too early".to_owned()))?;
    Ok((outline, types))
}

impl Outline {
    fn limit(&mut self, options: &PluginOptions, payload: &Payload<'_>) -> Result<(), PluginError> {
        match payload {
            Payload::Version { encoding: Encoding::Component, .. } => {
                refuse("this is a component; plugins are core modules (build for wasm32-unknown-unknown)")
            }
            Payload::TypeSection(section) => {
                at_most("the module", section.count().into(), "types", MAX_TYPES.into(), None)
            }
            Payload::ImportSection(section) => {
                at_most("the module", section.count().into(), "imports", MAX_IMPORTS.into(), None)?;
                for import in section.clone().into_imports() {
                    let Import { module, name, ty } = import.map_err(invalid)?;
                    self.imports.push(ImportName { module: module.to_owned(), name: name.to_owned(), ty });
                }
                Ok(())
            }
            Payload::FunctionSection(section) => {
                self.functions = section.count();
                at_most("the module", self.functions.into(), "functions", MAX_FUNCTIONS.into(), None)
            }
            Payload::GlobalSection(section) => {
                at_most("the module", section.count().into(), "globals", MAX_GLOBALS.into(), None)
            }
            Payload::ExportSection(section) => {
                at_most("the module", section.count().into(), "exports", MAX_EXPORTS.into(), None)?;
                for export in section.clone() {
                    let export = export.map_err(invalid)?;
                    self.exports.push((export.name.to_owned(), Export { name: "", ..export }));
                }
                Ok(())
            }
            Payload::TableSection(section) => self.limit_tables(options, section),
            Payload::MemorySection(section) => self.limit_memory(options, section),
            Payload::ElementSection(section) => self.limit_elements(options, section),
            Payload::DataSection(section) => self.count_segments(section.count()),
            Payload::CodeSectionEntry(body) => limit_body(body),
            Payload::CustomSection(section) if section.name() == MANIFEST_SECTION => {
                self.manifest.extend_from_slice(section.data());
                at_most("the manifest", self.manifest.len() as u64, "bytes", MANIFEST_MAX_BYTES as u64, None)
            }
            _ => Ok(()),
        }
    }

    fn limit_tables(
        &self,
        options: &PluginOptions,
        section: &wasmparser::TableSectionReader<'_>,
    ) -> Result<(), PluginError> {
        at_most("the module", section.count().into(), "tables", MAX_TABLES.into(), None)?;
        for table in section.clone() {
            let initial = table.map_err(invalid)?.ty.initial;
            at_most("a table", initial, "elements", options.table_elements as u64, Some("plugins.table_elements"))?;
        }
        Ok(())
    }

    fn limit_memory(
        &mut self,
        options: &PluginOptions,
        section: &wasmparser::MemorySectionReader<'_>,
    ) -> Result<(), PluginError> {
        at_most("the module", section.count().into(), "memories", 1, None)?;
        for memory in section.clone() {
            let bytes = memory.map_err(invalid)?.initial.saturating_mul(PAGE);
            at_most("the declared memory", bytes, "bytes", options.memory_bytes as u64, Some("plugins.memory_bytes"))?;
            self.has_memory = true;
        }
        Ok(())
    }

    fn limit_elements(
        &mut self,
        options: &PluginOptions,
        section: &wasmparser::ElementSectionReader<'_>,
    ) -> Result<(), PluginError> {
        self.count_segments(section.count())?;
        for element in section.clone() {
            self.elements += match element.map_err(invalid)?.items {
                wasmparser::ElementItems::Functions(items) => u64::from(items.count()),
                wasmparser::ElementItems::Expressions(_, items) => u64::from(items.count()),
            };
        }
        at_most(
            "the element segments",
            self.elements,
            "elements",
            options.table_elements as u64,
            Some("plugins.table_elements"),
        )
    }

    fn count_segments(&mut self, count: u32) -> Result<(), PluginError> {
        self.segments = self.segments.saturating_add(count);
        at_most("the module", self.segments.into(), "data and element segments", MAX_SEGMENTS.into(), None)
    }

    fn check_imports(&self, types: TypesRef<'_>) -> Result<(), PluginError> {
        for ImportName { module, name, ty } in &self.imports {
            let known =
                format!("plugins may import `log`, `metric` and `fail` from `{}` and nothing else", import::MODULE);
            let expected = match (module.as_str(), name.as_str()) {
                (import::MODULE, import::LOG) => (&[ValType::I32, ValType::I32, ValType::I32][..], &[][..]),
                (import::MODULE, import::METRIC) => (&[ValType::I32, ValType::I32, ValType::F64][..], &[][..]),
                (import::MODULE, import::FAIL) => (&[ValType::I32, ValType::I32, ValType::I32][..], &[][..]),
                _ => return refuse(format!("the module imports `{module}.{name}`, which is not there; {known}")),
            };
            let import = Import { module, name, ty: *ty };
            let found = function(types, types.entity_type_from_import(&import));
            check_signature(&format!("import `{module}.{name}`"), found, expected)?;
        }
        Ok(())
    }

    /// Whether it is a filter; else it is a transform.
    fn check_exports(&self, types: TypesRef<'_>) -> Result<bool, PluginError> {
        const I32: ValType = ValType::I32;
        let memory = self
            .exports
            .iter()
            .any(|(name, export)| name == export::MEMORY && export.kind == wasmparser::ExternalKind::Memory);
        if !memory || !self.has_memory {
            return refuse(format!("the module does not export its memory as `{}`", export::MEMORY));
        }
        self.check_export(types, export::ABI, (&[], &[I32]), true)?;
        self.check_export(types, export::WINDOW, (&[I32], &[I32]), true)?;
        self.check_export(types, export::CONFIGURE, (&[I32], &[ValType::I64]), true)?;
        self.check_export(types, export::RELEASE, (&[I32], &[]), false)?;
        self.check_export(types, export::INITIALIZE, (&[], &[]), false)?;
        let run = (&[I32, I32, I32][..], &[ValType::I64][..]);
        let filter = self.check_export(types, export::FILTER, run, false)?;
        let transform = self.check_export(types, export::TRANSFORM, run, false)?;
        match (filter, transform) {
            (true, false) => Ok(true),
            (false, true) => Ok(false),
            (true, true) => refuse(format!(
                "the module exports both `{}` and `{}`; a plugin is one of the two: make two modules of it",
                export::FILTER,
                export::TRANSFORM
            )),
            (false, false) => refuse(format!(
                "the module exports neither `{}` nor `{}`: it has to be one of the two",
                export::FILTER,
                export::TRANSFORM
            )),
        }
    }

    /// Whether the export is there; a wrong signature is refused.
    fn check_export(
        &self,
        types: TypesRef<'_>,
        name: &str,
        expected: Signature<'_>,
        required: bool,
    ) -> Result<bool, PluginError> {
        let Some((_, export)) = self.exports.iter().find(|(found, _)| found == name) else {
            return if required {
                refuse(format!("the module does not export `{name}`, which ABI {ABI} needs"))
            } else {
                Ok(false)
            };
        };
        check_signature(&format!("export `{name}`"), function(types, types.entity_type_from_export(export)), expected)?;
        Ok(true)
    }
}

type Signature<'a> = (&'a [ValType], &'a [ValType]);

fn function<'a>(types: TypesRef<'a>, entity: Option<EntityType>) -> Option<&'a FuncType> {
    match entity? {
        EntityType::Func(id) => Some(types.get(id)?.unwrap_func()),
        _ => None,
    }
}

fn check_signature(what: &str, found: Option<&FuncType>, (params, results): Signature<'_>) -> Result<(), PluginError> {
    let show = |params: &[ValType], results: &[ValType]| {
        let list = |types: &[ValType]| types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        format!("({}) -> ({})", list(params), list(results))
    };
    match found {
        Some(found) if found.params() == params && found.results() == results => Ok(()),
        Some(found) => refuse(format!(
            "{what} is {}; ABI {ABI} has {}",
            show(found.params(), found.results()),
            show(params, results)
        )),
        None => refuse(format!("{what} is not a function; ABI {ABI} has {}", show(params, results))),
    }
}

fn limit_body(body: &wasmparser::FunctionBody<'_>) -> Result<(), PluginError> {
    at_most("a function's body", body.range().len() as u64, "bytes", MAX_BODY_BYTES as u64, None)?;
    let mut locals = 0u64;
    for group in body.get_locals_reader().map_err(invalid)? {
        locals += u64::from(group.map_err(invalid)?.0);
        at_most("a function", locals, "locals", MAX_LOCALS, None)?;
    }
    Ok(())
}

/// The kind that the manifest says, which has to fit the export; without one the row kind of the export.
fn kind_of(filter: bool, manifest: &[ManifestLine]) -> Result<PluginKind, PluginError> {
    let said = manifest.iter().find_map(|line| match line {
        ManifestLine::Plugin { kind, .. } => *kind,
        _ => None,
    });
    match said {
        None if filter => Ok(PluginKind::RowFilter),
        None => Ok(PluginKind::RowTransform),
        Some(kind) if kind.is_filter() == filter => Ok(kind),
        Some(kind) => refuse(format!(
            "the manifest says that the plugin is a {}, but the module exports `{}`",
            kind.as_str(),
            if filter { export::FILTER } else { export::TRANSFORM }
        )),
    }
}

/// The manifest's lines, checked to be usable.
fn parse_manifest(section: &[u8]) -> Result<Vec<ManifestLine>, PluginError> {
    let Ok(text) = std::str::from_utf8(section) else { return refuse("the manifest is not UTF-8 text") };
    let mut lines: Vec<ManifestLine> = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = i + 1;
        let parsed = serde_json::from_str(line)
            .map_err(|error| PluginError::Refused(format!("line {at} of the manifest: {error}")))?;
        check_line(&lines, &parsed)
            .map_err(|message| PluginError::Refused(format!("line {at} of the manifest: {message}")))?;
        lines.push(parsed);
    }
    let params = lines.iter().filter(|line| matches!(line, ManifestLine::Param { .. })).count();
    at_most("the manifest", params as u64, "parameters", MAX_PARAMS as u64, None)?;
    at_most("the manifest", (lines.len() - params) as u64, "columns", u64::from(MAX_COLUMNS), None)?;
    Ok(lines)
}

fn check_line(earlier: &[ManifestLine], line: &ManifestLine) -> Result<(), String> {
    let name_fits = |name: &str| match name.len() {
        1..=MAX_NAME_BYTES => Ok(()),
        len => Err(format!("a name has 1 to {MAX_NAME_BYTES} bytes, not {len}")),
    };
    match line {
        ManifestLine::Plugin { abi, .. } if *abi != ABI => Err(wrong_abi(i64::from(*abi))),
        ManifestLine::Plugin { .. } if earlier.iter().any(|line| matches!(line, ManifestLine::Plugin { .. })) => {
            Err("a second `plugin` line (is there more than one plugin in the crate?)".to_owned())
        }
        ManifestLine::Plugin { .. } => Ok(()),
        ManifestLine::Param { name, r#type, default, .. } => {
            name_fits(name)?;
            if earlier.iter().any(|line| matches!(line, ManifestLine::Param { name: known, .. } if known == name)) {
                return Err(format!("parameter `{name}` is there twice"));
            }
            default.as_deref().map_or(Ok(()), |default| params::check_default(name, *r#type, default))
        }
        ManifestLine::Column { name, .. } => {
            name_fits(name)?;
            if earlier.iter().any(|line| matches!(line, ManifestLine::Column { name: known, .. } if known == name)) {
                return Err(format!("column `{name}` is there twice"));
            }
            Ok(())
        }
    }
}

/// Says both versions.
pub fn wrong_abi(found: i64) -> String {
    format!(
        "the module is built for plugin ABI {found}; this server speaks ABI {ABI}: rebuild it with an SDK for ABI {ABI}"
    )
}
