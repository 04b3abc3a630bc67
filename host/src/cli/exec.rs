//! Plugins on the very engine and limits, without a server: one JSON object a line in, one a line out.
//!
//! A request is `{"module":"path.wasm","columns":[{"name","type"}]?,"params":{…}?,"rows":[{…}]?,"old":[{…}]?,
//! "measure":true?}`, the answer what `POST /v1/plugins/{namespace}/{name}/try` answers, or `{"problem":{…}}`. Without
//! `columns` the rows have those that the plugin reads.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use wire::{ColumnDecl, Schema, Type};

use super::Outcome;
use crate::catalog::{NamespaceId, Stage};
use crate::config::Config;
use crate::db::trial::{self, Input, TrialRequest};
use crate::http::error::Problem;
use crate::http::plugins::trial_answer;
use crate::plugins::{ModuleSource, Plugins};
use crate::telemetry::Metrics;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    module: String,
    columns: Option<Vec<Column>>,
    #[serde(default)]
    params: Map<String, Value>,
    #[serde(default)]
    rows: Vec<Option<Map<String, Value>>>,
    #[serde(default)]
    old: Vec<Option<Map<String, Value>>>,
    #[serde(default)]
    measure: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Column {
    name: String,
    r#type: String,
}

/// The modules that this run has seen.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<HashMap<String, Bytes>>>);

impl ModuleSource for Seen {
    fn wasm(&self, sha256: &str) -> Result<Option<Bytes>, String> {
        Ok(self.0.lock().map_err(|error| error.to_string())?.get(sha256).cloned())
    }

    fn secret(&self) -> Result<[u8; 32], String> {
        Err("nothing is kept here".to_owned())
    }
}

pub(super) fn stdio() -> Outcome {
    let seen = Seen::default();
    let options = Config::new(Path::new(".")).plugins;
    let plugins = Plugins::new(options, Box::new(seen.clone()), Arc::new(Metrics::default()));
    let plugins = plugins.map_err(|error| error.to_string())?;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| format!("stdin cannot be read: {error}"))?;
        if line.trim().is_empty() {
            continue;
        }
        let answer = answer(&plugins, &seen, &line).unwrap_or_else(|problem| json!({"problem": problem.body()}));
        // Whoever asked may have gone.
        if writeln!(out, "{answer}").and_then(|()| out.flush()).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

fn answer(plugins: &Plugins, seen: &Seen, line: &str) -> Result<Value, Problem> {
    let request: Request =
        serde_json::from_str(line).map_err(|error| Problem::bad_request(format!("the request: {error}")))?;
    let module = std::fs::read(&request.module)
        .map_err(|error| Problem::bad_request(format!("the module {}: {error}", request.module)))?;
    let inspected = plugins.inspect(&module).map_err(crate::db::DbError::from)?;
    if let Ok(mut known) = seen.0.lock() {
        known.insert(inspected.sha256.clone(), inspected.wasm.clone());
    }
    let input = match &request.columns {
        None => Input::Declared("say `columns` (in a test: `.columns(&[(\"name\", \"TYPE\")])`)"),
        Some(columns) => Input::Columns(schema(columns)?),
    };
    let name = Path::new(&request.module).file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let stage = Stage {
        name: name.unwrap_or_default(),
        version: 1,
        sha256: inspected.sha256,
        params: Value::from(request.params).to_string(),
    };
    let trial_request = TrialRequest {
        plugin: stage.name.clone(),
        params: Value::Null,
        table: None,
        rows: request.rows,
        old: request.old,
        measure: request.measure,
    };
    let trial =
        trial::run(plugins, NamespaceId(1), &stage, &inspected.manifest, inspected.kind, input, &trial_request)?;
    trial_answer(&trial)
}

fn schema(columns: &[Column]) -> Result<Schema, Problem> {
    let declare = |(id, column): (usize, &Column)| {
        let id = u16::try_from(id).map_err(|_| Problem::bad_request("too many columns"))?;
        let ty = sql_type(&column.r#type)
            .ok_or_else(|| Problem::bad_request(format!("column {}: {} is no type", column.name, column.r#type)))?;
        Ok(ColumnDecl { id, name: column.name.clone(), ty, nullable: true, key: false })
    };
    let columns = columns.iter().enumerate().map(declare).collect::<Result<_, Problem>>()?;
    Ok(Schema { columns })
}

/// The type that prints as this.
fn sql_type(text: &str) -> Option<Type> {
    let text = text.trim().to_ascii_uppercase();
    if let Some(found) = Type::PLAIN.into_iter().find(|ty| ty.to_string() == text) {
        return Some(found);
    }
    let (precision, scale) = text.strip_prefix("DECIMAL(")?.strip_suffix(')')?.split_once(',')?;
    Some(Type::Decimal { precision: precision.trim().parse().ok()?, scale: scale.trim().parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_read_as_they_are_printed() {
        for ty in [Type::Boolean, Type::Timestamp, Type::Decimal { precision: 9, scale: 2 }] {
            assert_eq!(sql_type(&ty.to_string()), Some(ty));
        }
        assert_eq!(sql_type("decimal(9, 2)"), Some(Type::Decimal { precision: 9, scale: 2 }));
        assert_eq!(sql_type("STRING"), None);
    }
}
