//! Making plugins: a new crate, building it, testing it, manifests for other languages.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::Outcome;
use crate::config::Config;
use crate::plugins::check;

const TARGET: &str = "wasm32-unknown-unknown";

/// Where this build's own SDK lies, for programs that run where they were built.
const SDK: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest-sdk");

pub(super) fn new(name: &str, kind: &str, sdk: Option<PathBuf>) -> Outcome {
    let fits = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if !fits || name.len() > 64 {
        return Err(format!("{name:?} cannot name a plugin: a letter first, then a-z, 0-9 and _ (64 at most)"));
    }
    let sdk = match sdk {
        Some(sdk) => sdk,
        None if Path::new(SDK).join("Cargo.toml").is_file() => PathBuf::from(SDK),
        None => return Err("where is guest-sdk? Give its folder with --sdk".to_owned()),
    };
    let sdk = sdk.canonicalize().map_err(|error| format!("--sdk {}: {error}", sdk.display()))?;
    let folder = Path::new(name);
    if folder.exists() {
        return Err(format!("{name} is there already"));
    }
    let write = |file: &str, text: String| {
        let path = folder.join(file);
        std::fs::create_dir_all(path.parent().unwrap_or(folder))
            .and_then(|()| std::fs::write(&path, text))
            .map_err(|error| format!("{}: {error}", path.display()))
    };
    write("Cargo.toml", manifest(name, &sdk))?;
    write("src/lib.rs", source(name, kind))?;
    write(".gitignore", "/target\n*.wasm\n".to_owned())?;
    println!("made {name}: `tidegate plugin test {name}`, then `tidegate plugin push {name}`");
    Ok(())
}

fn manifest(name: &str, sdk: &Path) -> String {
    format!(
        r#"[package]
name = "{name}"
version = "0.1.0"
edition = "2024"

[lib]
crate-type = ["cdylib", "rlib"]

[dependencies]
guest-sdk = {{ path = "{sdk}" }}

[dev-dependencies]
testkit = {{ path = "{sdk}/testkit" }}

# Small, and inlined across crates so that a lazy column costs one load.
[profile.release]
lto = true
codegen-units = 1
panic = "abort"
strip = true

[workspace]
"#,
        sdk = sdk.display()
    )
}

fn source(name: &str, kind: &str) -> String {
    let (body, test) = match kind {
        "transform" => (
            format!(
                r#"#[derive(Output)]
pub struct Made {{
    pub twice: Option<f64>,
}}

/// Shows the amount twice as large.
#[transform]
pub fn {name}(row: &Order) -> Made {{
    Made {{ twice: row.amount.get().map(|amount| amount.to_f64() * 2.0) }}
}}
"#
            ),
            r#"        let answer = plugin.run(&[json!({"amount": 21})]);
        assert_eq!(answer.rows(0), [json!({"twice": 42.0})]);
"#,
        ),
        "change-filter" => (
            format!(
                r#"/// Keeps changes by which the amount rose.
#[filter]
pub fn {name}(change: &Change<Order>) -> bool {{
    let (Some(old), Some(new)) = (change.old(), change.new()) else {{ return false }};
    let amount = |row: &Order| row.amount.get().map_or(0.0, Number::to_f64);
    amount(new) > amount(old)
}}
"#
            ),
            r#"        let answer = plugin.run_changes(&[
            (Some(json!({"amount": 1})), Some(json!({"amount": 2}))),
            (Some(json!({"amount": 2})), Some(json!({"amount": 1}))),
        ]);
        assert_eq!(answer.kept(), [true, false]);
"#,
        ),
        "change-transform" => (
            format!(
                r#"#[derive(Output)]
pub struct Step {{
    pub by: f64,
}}

/// A row for each change of the amount: by how much.
#[transform]
pub fn {name}(change: &Change<Order>) -> Option<Step> {{
    let amount = |row: Option<&Order>| row.and_then(|row| row.amount.get()).map_or(0.0, Number::to_f64);
    let by = amount(change.new()) - amount(change.old());
    (by != 0.0).then_some(Step {{ by }})
}}
"#
            ),
            r#"        let answer = plugin.run_changes(&[
            (Some(json!({"amount": 1})), Some(json!({"amount": 4}))),
            (Some(json!({"amount": 1})), Some(json!({"amount": 1}))),
        ]);
        assert_eq!(answer.rows(0), [json!({"by": 3.0})]);
        assert!(answer.rows(1).is_empty());
"#,
        ),
        _ => (
            format!(
                r#"#[derive(Params)]
pub struct Parameters {{
    /// The least amount to keep.
    #[param(default = 100)]
    pub least: i64,
}}

/// Keeps rows whose amount is large enough.
#[filter]
pub fn {name}(params: &Parameters, row: &Order) -> bool {{
    row.amount.get().is_some_and(|amount| amount >= params.least)
}}
"#
            ),
            r#"        let plugin = plugin.params(json!({"least": 10}));
        let answer = plugin.run(&[json!({"amount": 10}), json!({"amount": 9}), json!({"amount": null})]);
        assert_eq!(answer.kept(), [true, false, false]);
"#,
        ),
    };
    format!(
        r#"//! What this plugin is for.

use guest_sdk::prelude::*;

#[derive(Row)]
pub struct Order<'a> {{
    pub amount: Column<'a, Number>,
}}

{body}
#[cfg(test)]
mod tests {{
    use testkit::{{Plugin, json}};

    /// Built for WebAssembly and run by the server's own engine, with its limits.
    #[test]
    fn it_works_on_the_engine() {{
        let plugin = Plugin::build(env!("CARGO_MANIFEST_DIR")).columns(&[("amount", "DOUBLE")]);
{test}    }}
}}
"#
    )
}

fn has_crate(folder: &Path) -> Outcome {
    if folder.join("Cargo.toml").is_file() {
        return Ok(());
    }
    let folder = folder.display();
    Err(format!("{folder} is no crate's folder: it has no Cargo.toml; `tidegate plugin new` makes one that has"))
}

fn no_cargo(error: &std::io::Error) -> String {
    format!("cargo cannot be started ({error}); it has to be in the PATH, and rustup puts it into ~/.cargo/bin")
}

/// Builds a crate; where its module is.
pub(super) fn build(folder: &Path) -> Result<PathBuf, String> {
    has_crate(folder)?;
    let mut cargo = toolchain()?;
    cargo.current_dir(folder).args(["build", "--release", "--lib", "--message-format=json-render-diagnostics"]);
    cargo.args(["--target", TARGET]).stdout(Stdio::piped());
    let output = cargo.spawn().and_then(std::process::Child::wait_with_output).map_err(|error| no_cargo(&error))?;
    if !output.status.success() {
        return Err("the plugin does not build; what the compiler said is above".to_owned());
    }
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    let messages = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let files = messages.filter_map(|message| message["filenames"].as_array().cloned()).flatten();
    let modules = files.filter_map(|file| file.as_str().map(PathBuf::from));
    let modules: Vec<_> = modules.filter(|file| file.extension().is_some_and(|ending| ending == "wasm")).collect();
    // A crate itself comes last, behind what it depends on. A workspace without a crate of its own is all of its members.
    let is_crate = || std::fs::read_to_string(folder.join("Cargo.toml")).is_ok_and(|text| text.contains("[package]"));
    let module = match &modules[..] {
        [] => return Err("the crate made no .wasm: it needs crate-type = [\"cdylib\"]".to_owned()),
        [.., last] if modules.len() == 1 || is_crate() => last,
        several => {
            let names: Vec<_> = several.iter().filter_map(|file| file.file_stem()?.to_str()).collect();
            let (folder, names) = (folder.display(), names.join(", "));
            return Err(format!("{folder} holds several plugins ({names}): give the folder of one"));
        }
    };
    let here = folder.join(module.file_name().unwrap_or_default());
    std::fs::copy(module, &here).map_err(|error| format!("{}: {error}", here.display()))?;
    Ok(here)
}

pub(super) fn report(module: &Path, as_json: bool) {
    let bytes = std::fs::metadata(module).map_or(0, |metadata| metadata.len());
    if as_json {
        println!("{}", json!({"module": module.display().to_string(), "bytes": bytes}));
    } else {
        println!("{}: {bytes} bytes", module.display());
    }
}

/// A cargo that compiles for WebAssembly: one whose compiler has the target, or Debian's, which carries the sources.
fn toolchain() -> Result<Command, String> {
    let prints = |rustc: &str, what: &[&str]| {
        let output = Command::new(rustc).arg("--print").args(what).output().ok()?;
        output.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
    };
    if prints("rustc", &["target-libdir", "--target", TARGET]).is_some_and(|folder| folder.is_dir()) {
        return Ok(Command::new("cargo"));
    }
    let debian = prints("/usr/bin/rustc", &["sysroot"])
        .is_some_and(|sysroot| sysroot.join("lib/rustlib/src/rust/library/Cargo.lock").exists());
    let linker =
        (19..=22).rev().map(|version| format!("wasm-ld-{version}")).chain(["wasm-ld".to_owned()]).find(|name| {
            Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
        });
    match linker.filter(|_| debian) {
        Some(linker) => {
            let mut cargo = Command::new("/usr/bin/cargo");
            cargo.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
            cargo.env("RUSTFLAGS", format!("-Clinker={linker}"));
            cargo.args(["-Zbuild-std=std,panic_abort"]);
            Ok(cargo)
        }
        None => Err(format!(
            "no Rust in the PATH compiles for WebAssembly (rustup puts cargo into ~/.cargo/bin): `rustup target add {TARGET}` \
             brings what is missing; without rustup, Debian's rustc-web cargo-web rust-web-src lld-22 do it as well"
        )),
    }
}

pub(super) fn test(folder: &Path) -> Outcome {
    has_crate(folder)?;
    let program =
        std::env::current_exe().map_err(|error| format!("this program does not know where it is: {error}"))?;
    let status = Command::new("cargo").arg("test").current_dir(folder).env("TIDEGATE_BIN", program).status();
    match status {
        Err(error) => Err(no_cargo(&error)),
        Ok(status) if !status.success() => Err("the tests failed".to_owned()),
        Ok(_) => Ok(()),
    }
}

pub(super) fn attach(module: &Path, manifest: &Path, output: Option<&Path>) -> Outcome {
    let told = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    let wasm = std::fs::read(module).map_err(|error| told(module, error))?;
    let mut text = std::fs::read_to_string(manifest).map_err(|error| told(manifest, error))?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    // The limits of a server with default settings.
    let options = Config::new(Path::new(".")).plugins;
    let attached = check::attach(&options, &wasm, &text).map_err(|error| error.to_string())?;
    // Text stays what its author wrote.
    let binary = module.with_extension("wasm");
    let output = output.unwrap_or(if wasm.starts_with(check::WASM_MAGIC) { module } else { &binary });
    std::fs::write(output, &attached).map_err(|error| told(output, error))?;
    println!("{}: {} bytes, manifest of {} lines", output.display(), attached.len(), text.lines().count());
    Ok(())
}
