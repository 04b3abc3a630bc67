//! `/v1/plugins`: upload, list, show, remove; what plugins said and failed on, and trials of them.

use std::collections::HashMap;

use arrow::record_batch::RecordBatch;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use serde::Deserialize;
use serde_json::{Value, json};
use wire::abi::ManifestLine;

use super::auth::Caller;
use super::body::{Limit, receive};
use super::error::Problem;
use super::json::{Json, time};
use super::request::{InPath, Members, Object, no_parameters, once, pairs, parse, unknown_parameter};
use super::routes::{App, media_type, wrong_type};
use crate::catalog::{DEFAULT_NAMESPACE, Plugin, PluginKind};
use crate::db::{Identity, PluginErrorEntry, PluginLogs, Replay, Trial, TrialRequest, TrialResult};
use crate::plugins::logs::LogLine;

type Names = HashMap<String, String>;
type Answer = Result<(StatusCode, Json), Problem>;

/// Namespace and name from the path; `/v1/plugins/{name}` means the default namespace.
fn names(path: &Names) -> (&str, &str) {
    let namespace = path.get("namespace").map_or(DEFAULT_NAMESPACE, String::as_str);
    (namespace, path.get("name").map_or("", String::as_str))
}

pub async fn put(
    State(app): State<App>,
    Caller(who): Caller,
    InPath(path): InPath<Names>,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    no_parameters(&uri)?;
    // Modules and WAT tell themselves apart, so types that clients set unasked are let through.
    let given = media_type(&headers)?;
    if given.starts_with("multipart/") || given == "application/json" {
        return Err(wrong_type(&given, "the bytes of the .wasm or .wat file as they are, as application/wasm"));
    }
    let limit = Limit { bytes: app.options.plugin_body_bytes, setting: "server.plugin_body_bytes" };
    let received = receive(&headers, body, limit, &app.budget).await?;
    let (namespace, name) = names(&path);
    let installed = app.db.install(&who, namespace, name, received.bytes.clone()).await?;
    let mut answer = shown(&installed.plugin, true);
    answer["seq"] = json!(installed.seq.0);
    answer["unchanged"] = json!(installed.unchanged);
    if let Some(measured) = installed.measured {
        answer["compile_ms"] = json!(measured.compile_time.map(|time| tenths(time.as_secs_f64() * 1e3)));
        answer["instance_bytes"] = json!(measured.instance_bytes);
    }
    let status = if installed.unchanged { StatusCode::OK } else { StatusCode::CREATED };
    Ok((status, Json(answer)))
}

pub async fn list(State(app): State<App>, Caller(who): Caller, uri: Uri) -> Answer {
    let mut namespace = None;
    for (name, value) in pairs(&uri)? {
        match name.as_str() {
            "namespace" => once(&mut namespace, "namespace", value)?,
            _ => return Err(unknown_parameter(&name, "namespace")),
        }
    }
    let plugins = app.db.plugins(&who, namespace.as_deref())?;
    let newest = |plugin: &Plugin| {
        let same = |other: &&std::sync::Arc<Plugin>| other.namespace == plugin.namespace && other.name == plugin.name;
        plugins.iter().filter(same).all(|other| other.version <= plugin.version)
    };
    let plugins: Vec<Value> = plugins.iter().map(|plugin| shown(plugin, newest(plugin))).collect();
    Ok((StatusCode::OK, Json(json!({"plugins": plugins}))))
}

/// With the short path of [`look`], what to look at stands where a name would. So a plugin with that name is not shown
/// here, but in the list alone.
pub async fn show(State(app): State<App>, Caller(who): Caller, InPath(path): InPath<Names>, uri: Uri) -> Answer {
    if let (Some(name), Some(action @ ("errors" | "logs"))) =
        (path.get("namespace"), path.get("name").map(String::as_str))
    {
        return look_at(&app, who, (DEFAULT_NAMESPACE, name), action, &uri).await;
    }
    no_parameters(&uri)?;
    let (namespace, name) = names(&path);
    let plugins = app.db.plugins(&who, Some(namespace))?;
    let mut versions: Vec<&Plugin> = plugins.iter().map(AsRef::as_ref).filter(|plugin| plugin.name == name).collect();
    versions.sort_by_key(|plugin| plugin.version);
    let Some(active) = versions.last().map(|plugin| plugin.version) else {
        return Err(Problem::new(404, "not_found", format!("there is no plugin {name} in namespace {namespace}")));
    };
    let versions: Vec<Value> = versions.iter().map(|plugin| shown(plugin, plugin.version == active)).collect();
    let answer = json!({"name": name, "namespace": namespace, "active": active, "versions": versions});
    Ok((StatusCode::OK, Json(answer)))
}

pub async fn delete(State(app): State<App>, Caller(who): Caller, InPath(path): InPath<Names>, uri: Uri) -> Answer {
    no_parameters(&uri)?;
    let (namespace, name) = names(&path);
    let seq = app.db.uninstall(&who, namespace, name).await?;
    Ok((StatusCode::OK, Json(json!({"name": name, "namespace": namespace, "seq": seq.0}))))
}

/// `GET /v1/plugins/{namespace}/{name}/errors?limit=N`: what it failed on while its live queries went on.
/// `…/logs?after=…&limit=N`: what it said.
pub async fn look(State(app): State<App>, Caller(who): Caller, InPath(path): InPath<Names>, uri: Uri) -> Answer {
    let action = path.get("action").map_or("", String::as_str);
    look_at(&app, who, names(&path), action, &uri).await
}

async fn look_at(app: &App, who: Identity, (namespace, name): (&str, &str), action: &str, uri: &Uri) -> Answer {
    let logs = match action {
        "errors" => false,
        "logs" => true,
        _ => return Err(Problem::new(404, "not_found", "of a plugin there are `errors` and `logs` to look at")),
    };
    let (mut limit, mut after) = (None, None);
    for (name, value) in pairs(uri)? {
        match name.as_str() {
            "limit" => once(&mut limit, "limit", value)?,
            "after" if logs => once(&mut after, "after", value)?,
            _ => return Err(unknown_parameter(&name, if logs { "after, limit" } else { "limit" })),
        }
    }
    // Whoever wants to hear only what comes next asks for no line.
    let least = usize::from(!logs);
    let limit = match limit.as_deref() {
        None => ENTRIES,
        Some(text) => text.parse().ok().filter(|limit| (least..=MOST_ENTRIES).contains(limit)).ok_or_else(|| {
            Problem::bad_request(format!("`limit` is a number from {least} to {MOST_ENTRIES}, not {text:?}"))
        })?,
    };
    if logs {
        let logs = app.db.plugin_logs(&who, namespace, name, after.as_deref(), limit)?;
        return Ok((StatusCode::OK, Json(log_answer(&logs))));
    }
    let (db, namespace, name) = (app.db.clone(), namespace.to_owned(), name.to_owned());
    let entries = tokio::task::spawn_blocking(move || db.plugin_errors(&who, &namespace, Some(&name), limit)).await;
    let entries = entries.map_err(|error| Problem::internal(error.to_string()))??;
    let errors = entries.iter().map(failure).collect::<Result<Vec<_>, Problem>>()?;
    Ok((StatusCode::OK, Json(json!({"errors": errors}))))
}

/// Shown where no limit is named.
const ENTRIES: usize = 100;
const MOST_ENTRIES: usize = 1_000;

fn log_answer(logs: &PluginLogs) -> Value {
    let line = |line: &LogLine| {
        json!({
            "number": line.number,
            "at": moment(line.at),
            "level": line.level,
            "message": line.message,
            "version": logs.versions.get(&*line.sha256),
            "sha256": &*line.sha256,
            "user": line.user.as_deref(),
        })
    };
    let lines: Vec<Value> = logs.lines.iter().map(line).collect();
    json!({"lines": lines, "next": logs.next, "more": logs.more, "missed": logs.missed})
}

fn failure(entry: &PluginErrorEntry) -> Result<Value, Problem> {
    let object = |batch: &Option<RecordBatch>| match batch {
        None => Ok(Value::Null),
        Some(batch) => Ok::<_, Problem>(objects(batch)?.pop().unwrap_or_default()),
    };
    Ok(json!({
        "number": entry.number,
        "namespace": entry.namespace,
        "plugin": entry.plugin,
        "version": entry.version,
        "sha256": entry.sha256,
        "table": entry.table,
        "user": entry.user,
        "live_id": entry.live_id,
        "seq": entry.seq.0,
        "at": moment(entry.at),
        "cause": entry.cause,
        "message": entry.message,
        "action": entry.action,
        "old": object(&entry.old)?,
        "row": object(&entry.row)?,
    }))
}

fn moment(micros: i64) -> String {
    let mut text = Vec::new();
    time::timestamp(micros.div_euclid(1_000_000), micros.rem_euclid(1_000_000) * 1_000, &mut text);
    String::from_utf8_lossy(&text).trim_matches('"').to_owned()
}

/// `POST …/rollback`, `…/try` and `…/replay`. With the short path the action is where a name would be, and the name where a
/// namespace would.
pub async fn act(
    State(app): State<App>,
    Caller(who): Caller,
    InPath(path): InPath<Names>,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    no_parameters(&uri)?;
    let part = |name: &str| path.get(name).map_or("", String::as_str);
    let (namespace, name, action) = match path.contains_key("action") {
        true => (part("namespace"), part("name"), part("action")),
        false => (DEFAULT_NAMESPACE, part("namespace"), part("name")),
    };
    if !matches!(action, "rollback" | "try" | "replay") {
        let allow = HeaderValue::from_static("GET,HEAD,PUT,DELETE");
        let hint = "upload a plugin with PUT, or POST to its rollback, try or replay";
        return Err(Problem::not_allowed(&Method::POST, uri.path(), allow, Some(hint)));
    }
    let received = app.body(&headers, body).await?;
    if action == "rollback" {
        let Object(RawRollback { version }) = match received.bytes.is_empty() {
            true => Object(RawRollback { version: None }),
            false => parse("the request body", &received.bytes)?,
        };
        let installed = app.db.roll_back(&who, namespace, name, version).await?;
        let mut answer = shown(&installed.plugin, true);
        answer["seq"] = json!(installed.seq.0);
        answer["unchanged"] = json!(installed.unchanged);
        return Ok((StatusCode::OK, Json(answer)));
    }
    if action == "replay" {
        let Object(RawReplay { number }) = parse("the request body", &received.bytes)?;
        let replay = app.db.replay_plugin_error(&who, namespace, name, number).await?;
        return Ok((StatusCode::OK, Json(replay_answer(&replay)?)));
    }
    let Object(raw): Object<RawTrial> = parse("the request body", &received.bytes)?;
    let maps = |rows: Vec<Option<Members>>| rows.into_iter().map(|row| row.map(|Members(map)| map)).collect();
    let request = TrialRequest {
        plugin: name.to_owned(),
        params: raw.params.0.into(),
        table: raw.table,
        rows: maps(raw.rows),
        old: maps(raw.old),
        measure: raw.measure,
    };
    let trial = app.db.try_plugin(&who, namespace, request).await?;
    Ok((StatusCode::OK, Json(trial_answer(&trial)?)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRollback {
    version: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawReplay {
    number: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTrial {
    #[serde(default)]
    params: Members,
    table: Option<String>,
    #[serde(default)]
    rows: Vec<Option<Members>>,
    #[serde(default)]
    old: Vec<Option<Members>>,
    #[serde(default)]
    measure: bool,
}

/// What becomes of the one change now, beside what was noted of it.
fn replay_answer(replay: &Replay) -> Result<Value, Problem> {
    let mut answer = trial_answer(&replay.trial)?;
    let result = answer["results"][0].take();
    if let Some(fields) = answer.as_object_mut() {
        fields.remove("results");
    }
    answer["result"] = result;
    answer["noted"] = failure(&replay.noted)?;
    Ok(answer)
}

pub fn trial_answer(trial: &Trial) -> Result<Value, Problem> {
    let result = |result: &TrialResult| match result {
        TrialResult::Kept(keep) => Ok(json!({"keep": keep})),
        TrialResult::Failed { cause, message } => Ok(json!({"error": {"cause": cause.as_str(), "message": message}})),
        TrialResult::Made(batch) => {
            let mut rows = batch.as_ref().map_or(Ok(Vec::new()), objects)?;
            match trial.kind {
                PluginKind::ChangeTransform => Ok(json!({"rows": rows})),
                _ => Ok(json!({"row": rows.pop()})),
            }
        }
    };
    let results = trial.results.iter().map(result).collect::<Result<Vec<_>, Problem>>()?;
    let columns = trial.output.iter().flat_map(|schema| &schema.columns);
    let columns: Vec<Value> =
        columns.map(|column| json!({"name": column.name, "type": column.ty.to_string()})).collect();
    let mut answer = json!({
        "name": trial.plugin,
        "version": trial.version,
        "kind": trial.kind.as_str(),
        "columns": columns,
        "results": results,
        "elapsed_us": trial.elapsed.as_micros() as u64,
    });
    if let Some(nanos) = trial.nanos_per_change {
        answer["nanos_per_change"] = json!(tenths(nanos));
    }
    Ok(answer)
}

/// Measured times have no more digits than that which mean something.
fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// The rows of a batch as JSON objects.
fn objects(batch: &RecordBatch) -> Result<Vec<Value>, Problem> {
    let rows = super::json::Rows::new(batch).map_err(|error| Problem::internal(error.to_string()))?;
    let object = |row| {
        let mut text = Vec::new();
        rows.object(row, &mut text);
        serde_json::from_slice(&text).map_err(|error| Problem::internal(error.to_string()))
    };
    (0..batch.num_rows()).map(object).collect()
}

/// A plugin version as clients see it.
fn shown(plugin: &Plugin, active: bool) -> Value {
    json!({
        "name": plugin.name,
        "namespace": plugin.namespace_name,
        "version": plugin.version,
        "active": active,
        "sha256": plugin.sha256,
        "kinds": [plugin.kind.as_str()],
        "abi": plugin.abi,
        "parameters": parameters(&plugin.manifest),
        "columns": columns(&plugin.manifest),
        "size": plugin.size,
        "uploaded_at": moment(plugin.uploaded_at),
        "uploaded_by": plugin.uploaded_by,
    })
}

fn parameters(manifest: &[ManifestLine]) -> Vec<Value> {
    let parameter = |line: &ManifestLine| match line {
        ManifestLine::Param { name, r#type, default, doc } => {
            let default: Option<Value> = default.as_deref().and_then(|text| serde_json::from_str(text).ok());
            let required = default.is_none();
            Some(json!({"name": name, "type": r#type, "default": default, "required": required, "doc": doc}))
        }
        _ => None,
    };
    manifest.iter().filter_map(parameter).collect()
}

fn columns(manifest: &[ManifestLine]) -> Vec<Value> {
    let column = |line: &ManifestLine| match line {
        ManifestLine::Column { name, r#type, optional } => {
            Some(json!({"name": name, "type": r#type, "optional": optional}))
        }
        _ => None,
    };
    manifest.iter().filter_map(column).collect()
}

#[cfg(test)]
mod tests {
    use wire::abi::{ColumnType, ParamType};

    use super::*;
    use crate::catalog::NamespaceId;

    #[test]
    fn a_version_is_shown_whole() {
        let plugin = Plugin {
            namespace: NamespaceId(0),
            namespace_name: "main".to_owned(),
            name: "late".to_owned(),
            version: 3,
            sha256: "ab".to_owned(),
            kind: PluginKind::RowFilter,
            abi: 1,
            manifest: vec![
                ManifestLine::Plugin { abi: 1, kind: None, pass: None, name: None, doc: None },
                ManifestLine::Param {
                    name: "minutes".to_owned(),
                    r#type: ParamType::Int,
                    default: Some("15".to_owned()),
                    doc: None,
                },
                ManifestLine::Column { name: "dep_delay".to_owned(), r#type: ColumnType::Number, optional: false },
            ],
            size: 10,
            uploaded_at: 1_357_017_300_000_000,
            uploaded_by: "admin".to_owned(),
            restored: None,
        };
        let expect = json!({
            "name": "late", "namespace": "main", "version": 3, "active": true, "sha256": "ab", "kinds": ["row_filter"],
            "abi": 1, "size": 10, "uploaded_at": "2013-01-01T05:15:00.000000Z", "uploaded_by": "admin",
            "parameters": [{"name": "minutes", "type": "int", "default": 15, "required": false, "doc": null}],
            "columns": [{"name": "dep_delay", "type": "number", "optional": false}],
        });
        assert_eq!(shown(&plugin, true), expect);
    }
}
