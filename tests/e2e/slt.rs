//! The SQL scripts under `tests/slt`, over HTTP: statements, their answers and types, and errors with their code and
//! position. Each file has a namespace of its own.
//!
//! The letters of `query`: `B`oolean, `I`nteger of any size, `R`eal and double, deci`N`al, `T`ext, `Y` bytea, `D`ate,
//! `C` time, `P` timestamp, `U`uid, `J`son. An error reads `code: detail @position`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use reqwest::Method;
use serde_json::{Value, json};
use sqllogictest::{ColumnType, DB, DBOutput, Runner, strict_column_validator};
use tests::{Client, Options, PATIENCE, TestServer};
use tokio::runtime::Handle;

/// Fewer would mean that files are not where this looks.
const LEAST_RECORDS: usize = 1_500;

struct Http {
    client: Client,
    namespace: String,
    runtime: Handle,
}

#[derive(Debug)]
struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Letter(char);

impl ColumnType for Letter {
    fn from_char(value: char) -> Option<Self> {
        "BIRNTYDCPUJ".contains(value).then_some(Letter(value))
    }

    fn to_char(&self) -> char {
        self.0
    }
}

fn letter(sql_type: &str) -> Letter {
    Letter(match sql_type.split('(').next().unwrap_or_default() {
        "BOOLEAN" => 'B',
        "SMALLINT" | "INT" | "BIGINT" => 'I',
        "REAL" | "DOUBLE" => 'R',
        "DECIMAL" => 'N',
        "TEXT" => 'T',
        "BYTEA" => 'Y',
        "DATE" => 'D',
        "TIME" => 'C',
        "TIMESTAMP" => 'P',
        "UUID" => 'U',
        "JSON" => 'J',
        other => panic!("the answer has the type {other}, which is none of ours"),
    })
}

fn show(cell: &Value) -> String {
    match cell {
        Value::Null => "NULL".to_owned(),
        Value::String(text) if text.is_empty() => "(empty)".to_owned(),
        Value::String(text) => text.replace('\n', "\\n"),
        other => other.to_string(),
    }
}

impl DB for Http {
    type Error = Refused;
    type ColumnType = Letter;

    fn run(&mut self, sql: &str) -> Result<DBOutput<Letter>, Refused> {
        let body = json!({"sql": sql, "namespace": self.namespace});
        let request = self.client.request(Method::POST, "/v1/sql").json(&body).timeout(PATIENCE);
        let answer: Value = self.runtime.block_on(async {
            let response = request.send().await.map_err(|error| Refused(error.to_string()))?;
            response.json().await.map_err(|error| Refused(error.to_string()))
        })?;
        if let Some(code) = answer["code"].as_str() {
            let position = answer["position"].as_u64().map_or(String::new(), |position| format!(" @{position}"));
            return Err(Refused(format!("{code}: {}{position}", answer["detail"].as_str().unwrap_or_default())));
        }
        let result = &answer["results"][0];
        if let Some(affected) = result["affected"].as_u64() {
            return Ok(DBOutput::StatementComplete(affected));
        }
        let columns = result["columns"].as_array().into_iter().flatten();
        let types = columns.map(|column| letter(column["type"].as_str().unwrap_or_default())).collect();
        let rows = result["rows"].as_array().into_iter().flatten();
        let rows = rows.map(|row| row.as_array().into_iter().flatten().map(show).collect()).collect();
        Ok(DBOutput::Rows { types, rows })
    }
}

fn scripts() -> BTreeMap<String, PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("slt");
    let files = std::fs::read_dir(&folder).expect("tests/slt is there").map(|entry| entry.unwrap().path());
    let scripts = files.filter(|path| path.extension().is_some_and(|ending| ending == "slt"));
    scripts.map(|path| (path.file_stem().unwrap().to_string_lossy().into_owned(), path)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_script_gives_its_answers() {
    let only = std::env::var("SLT").ok();
    // All scripts at once.
    let config = "[sql]\ndeadline_ms = 30000\n".to_owned();
    let server = TestServer::with(Options { config, ..Options::default() }).await;
    let mut running = Vec::new();
    for (name, path) in scripts() {
        if only.as_ref().is_some_and(|only| !name.contains(only)) {
            continue;
        }
        server.admin().sql(&format!("CREATE NAMESPACE {name}")).await;
        let (client, runtime) = (server.admin(), Handle::current());
        running.push(tokio::task::spawn_blocking(move || {
            let mut runner = Runner::new(|| {
                let db = Http { client: client.clone(), namespace: name.clone(), runtime: runtime.clone() };
                std::future::ready(Ok(db))
            });
            runner.with_column_validator(strict_column_validator);
            runner.run_file(&path).map_err(|error| error.display(false).to_string())
        }));
    }
    let mut failures = Vec::new();
    for script in running {
        failures.extend(script.await.expect("the script runs").err());
    }
    assert!(failures.is_empty(), "{}\n(SLT=name runs one file)", failures.join("\n"));
}

#[test]
fn there_are_as_many_records_as_promised() {
    let records: usize = scripts()
        .values()
        .map(|path| {
            let text = std::fs::read_to_string(path).unwrap();
            text.lines().filter(|line| line.starts_with("query ") || line.starts_with("statement ")).count()
        })
        .sum();
    assert!(records >= LEAST_RECORDS, "{records} records");
}
