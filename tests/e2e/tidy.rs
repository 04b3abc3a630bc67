//! The arrows between the host's modules, and the one home of each heavy dependency, held by reading the sources.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Module, what it may use of the others, and the heavy crates that live only there.
const RULES: &[(&str, &[&str], &[&str])] = &[
    ("catalog", &[], &[]),
    ("config", &[], &[]),
    ("telemetry", &[], &["prometheus_client", "tracing_subscriber"]),
    ("store", &["catalog", "config", "telemetry"], &["rocksdb"]),
    ("sql", &["catalog", "config", "store", "telemetry"], &["datafusion"]),
    ("plugins", &["catalog", "config", "telemetry"], &["wasmtime", "wasmparser", "wat"]),
    ("live", &["catalog", "config", "store", "telemetry"], &[]),
    ("db", &["catalog", "config", "live", "plugins", "sql", "store", "telemetry"], &[]),
    (
        "http",
        &["catalog", "config", "db", "live", "plugins", "sql", "store", "telemetry"],
        &["hyper", "hyper_util", "axum"],
    ),
    ("cli", &["catalog", "config", "db", "http", "plugins", "telemetry"], &[]),
    ("main", &["cli", "config", "db", "http", "plugins", "telemetry"], &[]),
];

/// The only files where `unsafe` may stand.
const UNSAFE_HOMES: &[&str] = &["plugins/window.rs", "plugins/engine.rs"];

fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../host/src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(&root).unwrap().to_owned(), text));
            }
        }
    }
    assert!(found.len() > 20, "the host's sources are not where this test looks");
    found
}

fn module_of(path: &Path) -> String {
    let first = path.components().next().unwrap().as_os_str().to_string_lossy();
    first.trim_end_matches(".rs").to_owned()
}

/// The lines of code: no comments, and nothing from the file's test module on.
fn code(text: &str) -> impl Iterator<Item = &str> {
    let until = text.find("#[cfg(test)]").unwrap_or(text.len());
    text[..until].lines().map(str::trim).filter(|line| !line.starts_with("//"))
}

fn crate_paths(line: &str) -> impl Iterator<Item = String> + '_ {
    line.match_indices("crate::").map(|(at, found)| {
        let rest = &line[at + found.len()..];
        rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    })
}

#[test]
fn arrows_go_one_way() {
    let modules: BTreeSet<&str> = RULES.iter().map(|rule| rule.0).collect();
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let module = module_of(&path);
        let Some((_, allowed, _)) = RULES.iter().find(|rule| rule.0 == module) else {
            assert_eq!(module, "lib", "{} belongs to no module of the table", path.display());
            continue;
        };
        for line in code(&text) {
            for used in crate_paths(line) {
                if modules.contains(used.as_str()) && used != module && !allowed.contains(&used.as_str()) {
                    wrong.push(format!("{}: {module} may not use {used}: {line}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn heavy_dependencies_have_one_home() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let module = module_of(&path);
        for (home, _, heavy) in RULES {
            for name in heavy.iter().filter(|_| module != *home) {
                for line in code(&text).filter(|line| line.contains(&format!("{name}::"))) {
                    wrong.push(format!("{}: {name} lives in {home}: {line}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_has_few_homes() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if UNSAFE_HOMES.iter().any(|home| path == Path::new(home)) {
            continue;
        }
        let lines = code(&text).filter(|line| line.contains("unsafe {") || line.contains("unsafe fn"));
        wrong.extend(lines.map(|line| format!("{}: {line}", path.display())));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
