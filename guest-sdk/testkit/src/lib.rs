//! A plugin in ordinary `#[test]`s, on the very engine that the server runs it on, with its limits: the tests drive the
//! `tidegate` program (`plugin exec --stdio`), so nobody compiles the server for them.
//!
//! ```no_run
//! use testkit::{Plugin, json};
//!
//! let plugin = Plugin::build(env!("CARGO_MANIFEST_DIR")).columns(&[("dep_delay", "DOUBLE")]);
//! let answer = plugin.params(json!({"minutes": 15})).run(&[json!({"dep_delay": 20}), json!({"dep_delay": null})]);
//! assert_eq!(answer.kept(), [true, false]);
//! ```
//!
//! The program is `tidegate` in the path, or what `TIDEGATE_BIN` names. Everything here panics when it cannot go on:
//! these are tests.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

pub use serde_json::{Value, json};

/// A plugin's module with what its rows have and its parameters are.
#[derive(Clone, Debug)]
pub struct Plugin {
    module: PathBuf,
    columns: Option<Value>,
    params: Value,
}

/// Crates that this process has built: tests of one crate run side by side, and one build is enough.
static BUILT: Mutex<Option<HashMap<PathBuf, PathBuf>>> = Mutex::new(None);

impl Plugin {
    /// Builds the crate in a folder for WebAssembly.
    pub fn build(folder: impl AsRef<Path>) -> Plugin {
        let folder = folder.as_ref().to_owned();
        let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
        let built = built.get_or_insert_default();
        let module = built.entry(folder).or_insert_with_key(|folder| {
            let output = tidegate().args(["plugin", "build", "--json"]).arg(folder).stderr(Stdio::inherit()).output();
            let output = output.unwrap_or_else(|error| panic!("{}: {error}", program().display()));
            assert!(output.status.success(), "the plugin in {} does not build", folder.display());
            let told: Value = serde_json::from_slice(&output.stdout).expect("tidegate says where the module is");
            PathBuf::from(told["module"].as_str().expect("a path"))
        });
        Plugin::module(&*module)
    }

    /// A module that is there: `.wasm` or `.wat`.
    pub fn module(path: impl AsRef<Path>) -> Plugin {
        Plugin { module: path.as_ref().to_owned(), columns: None, params: json!({}) }
    }

    /// Names and SQL types of the columns that rows have; without them the rows have those that the plugin reads. Those
    /// know no more than the manifest does: a DATE, TIME or TIMESTAMP is a BIGINT there, so rows with such text need this.
    /// In rows, values are as in the server's JSON: a BYTEA is a string of base64.
    pub fn columns(mut self, columns: &[(&str, &str)]) -> Plugin {
        let columns = columns.iter().map(|(name, ty)| json!({"name": name, "type": ty}));
        self.columns = Some(columns.collect());
        self
    }

    pub fn params(mut self, params: Value) -> Plugin {
        self.params = params;
        self
    }

    /// Runs rows through a plugin that sees rows.
    pub fn run(&self, rows: &[Value]) -> Answer {
        self.ask(json!({"rows": rows}))
    }

    /// Runs changes through a plugin that sees changes: the row before and after.
    pub fn run_changes(&self, changes: &[(Option<Value>, Option<Value>)]) -> Answer {
        let (old, new): (Vec<_>, Vec<_>) = changes.iter().cloned().unzip();
        self.ask(json!({"old": old, "rows": new}))
    }

    fn ask(&self, mut request: Value) -> Answer {
        match self.try_ask(&mut request) {
            Ok(answer) => answer,
            Err(problem) => panic!("{}: {problem}", self.module.display()),
        }
    }

    /// Runs rows through a plugin that should refuse them, its parameters or its columns; what it says.
    pub fn refusal(&self, rows: &[Value]) -> String {
        match self.try_ask(&mut json!({"rows": rows})) {
            Ok(answer) => panic!("{} did not refuse: {answer:?}", self.module.display()),
            Err(problem) => problem,
        }
    }

    fn try_ask(&self, request: &mut Value) -> Result<Answer, String> {
        request["module"] = json!(self.module.display().to_string());
        request["params"] = self.params.clone();
        if let Some(columns) = &self.columns {
            request["columns"] = columns.clone();
        }
        let mut child = tidegate()
            .args(["plugin", "exec", "--stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program().display()));
        let mut stdin = child.stdin.take().expect("a pipe");
        writeln!(stdin, "{request}").expect("tidegate reads its request");
        drop(stdin);
        let output = child.wait_with_output().expect("tidegate ends");
        let value: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("{error} in what tidegate answered: {}", String::from_utf8_lossy(&output.stdout))
        });
        match value.get("problem") {
            Some(problem) => Err(problem["detail"].as_str().unwrap_or_default().to_owned()),
            None => Ok(Answer(value)),
        }
    }
}

/// What became of each row, or change.
#[derive(Clone, Debug)]
pub struct Answer(Value);

impl Answer {
    /// Of a filter: its verdicts.
    pub fn kept(&self) -> Vec<bool> {
        self.results()
            .iter()
            .map(|result| result["keep"].as_bool().unwrap_or_else(|| panic!("no verdict: {result}")))
            .collect()
    }

    /// Of a transform: what row (or change) `index` was made into.
    pub fn rows(&self, index: usize) -> Vec<Value> {
        let result = &self.results()[index];
        match (&result["row"], &result["rows"]) {
            (Value::Object(_), _) => vec![result["row"].clone()],
            (_, Value::Array(rows)) => rows.clone(),
            _ => panic!("no rows: {result}"),
        }
    }

    /// Cause and message, where row (or change) `index` failed.
    pub fn error(&self, index: usize) -> Option<(&str, &str)> {
        let error = self.results()[index].get("error")?;
        Some((error["cause"].as_str()?, error["message"].as_str()?))
    }

    /// Time of all calls together.
    pub fn elapsed(&self) -> Duration {
        Duration::from_micros(self.0["elapsed_us"].as_u64().unwrap_or(0))
    }

    fn results(&self) -> &[Value] {
        self.0["results"].as_array().map(Vec::as_slice).unwrap_or_default()
    }
}

fn program() -> PathBuf {
    std::env::var_os("TIDEGATE_BIN").map_or_else(|| PathBuf::from("tidegate"), PathBuf::from)
}

fn tidegate() -> Command {
    Command::new(program())
}
