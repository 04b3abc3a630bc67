//! `/v1/plugins`: upload, list, show, remove.

use std::collections::HashMap;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use serde_json::{Value, json};
use wire::abi::ManifestLine;

use super::auth::Caller;
use super::body::receive;
use super::error::Problem;
use super::json::time;
use super::request::{no_parameters, once, pairs, unknown_parameter};
use super::routes::{App, media_type, wrong_type};
use crate::catalog::{DEFAULT_NAMESPACE, Plugin};

type Names = HashMap<String, String>;
type Answer = Result<(StatusCode, Json<Value>), Problem>;

/// Namespace and name from the path; `/v1/plugins/{name}` means the default namespace.
fn names(path: &Names) -> (&str, &str) {
    let namespace = path.get("namespace").map_or(DEFAULT_NAMESPACE, String::as_str);
    (namespace, path.get("name").map_or("", String::as_str))
}

pub async fn put(
    State(app): State<App>,
    Caller(who): Caller,
    Path(path): Path<Names>,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    no_parameters(&uri)?;
    // Modules and WAT tell themselves apart, so types that clients set unasked are let through.
    let given = media_type(&headers);
    if given.starts_with("multipart/") || given == "application/json" {
        return Err(wrong_type(&given, "the bytes of the .wasm or .wat file as they are, as application/wasm"));
    }
    let received = receive(&headers, body, app.options.plugin_body_bytes, &app.budget).await?;
    let (namespace, name) = names(&path);
    let installed = app.db.install(&who, namespace, name, received.bytes.clone()).await?;
    let mut answer = shown(&installed.plugin, true);
    answer["seq"] = json!(installed.seq.0);
    answer["unchanged"] = json!(installed.unchanged);
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

pub async fn show(State(app): State<App>, Caller(who): Caller, Path(path): Path<Names>, uri: Uri) -> Answer {
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

pub async fn delete(State(app): State<App>, Caller(who): Caller, Path(path): Path<Names>, uri: Uri) -> Answer {
    no_parameters(&uri)?;
    let (namespace, name) = names(&path);
    let seq = app.db.uninstall(&who, namespace, name).await?;
    Ok((StatusCode::OK, Json(json!({"name": name, "namespace": namespace, "seq": seq.0}))))
}

/// `POST …/rollback` and `…/try` are in the contract but not built. With the short path the action is where a name
/// would be.
pub async fn act(Path(path): Path<Names>) -> Problem {
    match path.get("action").or(path.get("name")).map(String::as_str) {
        Some("rollback") => Problem::not_implemented("rolling a plugin back"),
        Some("try") => Problem::not_implemented("trying a plugin without a live query"),
        _ => Problem::new(405, "method_not_allowed", "POST is not possible here; upload a plugin with PUT"),
    }
}

/// A plugin version as clients see it.
fn shown(plugin: &Plugin, active: bool) -> Value {
    let mut uploaded_at = Vec::new();
    let micros = plugin.uploaded_at;
    time::timestamp(micros.div_euclid(1_000_000), micros.rem_euclid(1_000_000) * 1_000, &mut uploaded_at);
    let uploaded_at = String::from_utf8_lossy(&uploaded_at);
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
        "uploaded_at": uploaded_at.trim_matches('"'),
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
    use crate::catalog::{NamespaceId, PluginKind};

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
                ManifestLine::Plugin { abi: 1, name: None, doc: None },
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
