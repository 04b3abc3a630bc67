//! What an author gets wrong is said at the line that is wrong: every file of `compile_errors/` has one line with
//! `//~ words`, which the compiler must mark, in an error with those words. Messages may change from compiler to
//! compiler, so nothing more of them is compared.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn mistakes_are_marked_where_they_are() {
    let sdk = Path::new(env!("CARGO_MANIFEST_DIR"));
    let crate_dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("compile_errors");
    let bins = crate_dir.join("src/bin");
    let _old = fs::remove_dir_all(&bins);
    fs::create_dir_all(&bins).unwrap();

    let mut cases = Vec::new();
    for entry in fs::read_dir(sdk.join("tests/compile_errors")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let source = fs::read_to_string(&path).unwrap();
        let marked =
            source.lines().enumerate().find_map(|(at, line)| Some((at, line.split_once("//~ ")?.1.to_owned())));
        let (at, words) = marked.unwrap_or_else(|| panic!("{name} marks no line"));
        fs::write(bins.join(format!("{name}.rs")), format!("{source}\nfn main() {{}}\n")).unwrap();
        cases.push((name, at as u64 + 1, words));
    }
    // One that is right: else a harness in which nothing compiles would pass. Its names are such as generated code has.
    let right = "use guest_sdk::prelude::*;\n#[derive(Params)]\nstruct Parameters {}\n#[derive(Row)]\nstruct Plugin<'a> {\n    \
                 answer: Column<'a, bool>,\n}\n#[filter]\nfn input(_: &Parameters, row: &Plugin) -> bool {\n    \
                 row.answer.get() == Some(true)\n}\nfn main() {}\n";
    fs::write(bins.join("nothing_wrong.rs"), right).unwrap();
    let manifest = format!(
        "[package]\nname = \"compile_errors\"\nedition = \"2024\"\n\n[dependencies]\nguest-sdk = {{ path = {:?} }}\n\n[workspace]\n",
        sdk.display().to_string()
    );
    fs::write(crate_dir.join("Cargo.toml"), manifest).unwrap();
    fs::copy(sdk.join("../Cargo.lock"), crate_dir.join("Cargo.lock")).unwrap();

    let output = Command::new(env!("CARGO"))
        .args(["check", "--offline", "--keep-going", "--message-format=json", "--quiet"])
        .current_dir(&crate_dir)
        .env("CARGO_TARGET_DIR", crate_dir.join("target"))
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let errors: Vec<Value> = said
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["reason"] == "compiler-message" && message["message"]["level"] == "error")
        .collect();
    let of = |name: &str| errors.iter().filter(|error| error["target"]["name"] == name).collect::<Vec<_>>();

    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(of("nothing_wrong").is_empty(), "{:#?}\n{stderr}", of("nothing_wrong"));
    let mut missed = Vec::new();
    for (name, line, words) in &cases {
        if !of(name).iter().any(|error| marks(&error["message"], *line, words)) {
            let rendered: String = of(name).iter().filter_map(|error| error["message"]["rendered"].as_str()).collect();
            missed.push(format!("{name}: no error at line {line} with {words:?}, but:\n{rendered}"));
        }
    }
    assert!(missed.is_empty() && cases.len() > 5, "{}\n{stderr}", missed.join("\n"));
}

/// Whether the error's own place, or where the macro was called, is that line.
fn marks(message: &Value, line: u64, words: &str) -> bool {
    let spans = message["spans"].as_array().map(Vec::as_slice).unwrap_or_default();
    let primary = spans.iter().filter(|span| span["is_primary"] == true);
    let here = primary.clone().any(|span| {
        let place = if span["expansion"].is_null() { span } else { &span["expansion"]["span"] };
        span["line_start"] == line || place["line_start"] == line
    });
    here && message["rendered"].as_str().is_some_and(|rendered| rendered.contains(words))
}
