//! Calls to a server.

use std::io::{Read, Write};
use std::path::PathBuf;

use serde_json::{Value, json};

use super::{LiveQuery, Outcome, Server, Sql, craft};
use crate::catalog::DEFAULT_NAMESPACE;
use crate::http::client::{Answer, Client, Method, encode, next_piece};
use crate::telemetry::one_line;

const JSON: &str = "application/json";

impl Server {
    fn client(&self) -> Result<Client, String> {
        let env = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        // What was typed goes first: the environment may have been set for another server.
        let (token, file) = match (&self.token, &self.token_file) {
            (None, None) => (env("TIDEGATE_TOKEN"), env("TIDEGATE_TOKEN_FILE").map(PathBuf::from)),
            (token, file) => (token.clone(), file.clone()),
        };
        let token = match (token, file) {
            (None, Some(file)) => {
                let text = std::fs::read_to_string(&file);
                let text = text.map_err(|error| format!("the token file {}: {error}", file.display()))?;
                Some(text.trim().to_owned())
            }
            (token, _) => token,
        };
        Client::new(&self.url, token).map_err(|error| error.to_string())
    }

    fn namespace(&self) -> &str {
        self.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE)
    }

    pub(super) fn plugin(&self, name: &str) -> String {
        format!("/v1/plugins/{}/{}", encode(self.namespace()), encode(name))
    }

    pub(super) async fn ask(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: Vec<u8>,
    ) -> Result<Value, String> {
        let answer = self.client()?.call(method, path, content_type, body).await.map_err(|error| error.to_string())?;
        parsed(&answer)
    }

    fn print(&self, answer: &Value, text: impl FnOnce(&Value) -> String) {
        say(&if self.json { answer.to_string() } else { text(answer) });
    }
}

/// To stdout; whoever reads it may have gone, which is no reason to fail loudly: then it is false.
pub(super) fn say(text: &str) -> bool {
    writeln!(std::io::stdout(), "{text}").is_ok()
}

fn parsed(answer: &Answer) -> Result<Value, String> {
    let value: Value = serde_json::from_slice(&answer.body).unwrap_or(Value::Null);
    if answer.is_success() {
        return Ok(value);
    }
    let detail =
        value["detail"].as_str().map_or_else(|| String::from_utf8_lossy(&answer.body).into_owned(), str::to_owned);
    let hint = match answer.status {
        401 => "; give --token or --token-file (or TIDEGATE_TOKEN, TIDEGATE_TOKEN_FILE)",
        _ => "",
    };
    let code = value["code"].as_str().unwrap_or("error");
    Err(format!("{detail} ({code}, status {}){hint}", answer.status))
}

fn json_of(what: &str, text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| format!("{what} is not JSON: {error}"))
}

/// An array, which the server would otherwise ask for by the place in a request that nobody typed.
fn array_of(what: &str, text: &str, like: &str) -> Result<Value, String> {
    match json_of(what, text)? {
        array @ Value::Array(_) => Ok(array),
        _ => Err(format!("{what} has to be a JSON array, such as {like}")),
    }
}

fn object_of(what: &str, text: &str) -> Result<Value, String> {
    match json_of(what, text)? {
        object @ Value::Object(_) => Ok(object),
        _ => Err(format!("{what} has to be a JSON object, such as {{\"minutes\":30}}")),
    }
}

fn rows_text(count: u64) -> String {
    if count == 1 { "1 row".to_owned() } else { format!("{count} rows") }
}

pub(super) async fn sql(args: Sql) -> Outcome {
    let mut text = args.statement;
    if text == "-" {
        text.clear();
        std::io::stdin().read_to_string(&mut text).map_err(|error| format!("stdin cannot be read: {error}"))?;
    }
    let mut request = json!({"sql": text, "params": array_of("--params", &args.params, "[30]")?});
    if let Some(namespace) = &args.server.namespace {
        request["namespace"] = json!(namespace);
    }
    let answer = args.server.ask(Method::POST, "/v1/sql", JSON, request.to_string().into_bytes()).await?;
    args.server.print(&answer, |answer| {
        let results = answer["results"].as_array().cloned().unwrap_or_default();
        results.iter().map(result_text).collect::<Vec<_>>().join("\n\n")
    });
    Ok(())
}

fn result_text(result: &Value) -> String {
    match (&result["columns"], &result["rows"], result["affected"].as_u64()) {
        (Value::Array(columns), Value::Array(rows), _) => {
            let head = columns.iter().map(|column| column["name"].as_str().unwrap_or_default().to_owned());
            let cells = |row: &Value| row.as_array().into_iter().flatten().map(cell_text).collect::<Vec<_>>();
            let mut table = vec![head.collect::<Vec<_>>()];
            table.extend(rows.iter().map(cells));
            format!("{}\n({})", table_text(&table), rows_text(rows.len() as u64))
        }
        (_, _, Some(affected)) => format!("{} changed", rows_text(affected)),
        _ => result.to_string(),
    }
}

pub(super) fn cell_text(value: &Value) -> String {
    match value {
        Value::Null => "NULL".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The same of what a plugin says: it is not to steer this terminal, nor to look like lines of its own.
fn guest_text(value: &Value) -> String {
    one_line(&cell_text(value)).into_owned()
}

/// As JSON. By itself that writes out the control characters of ASCII, and no others.
fn json_text(value: &Value) -> String {
    one_line(&value.to_string()).into_owned()
}

/// Columns under one another; the first line is the head.
fn table_text(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |cells: &Vec<String>| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let rule = widths.iter().map(|width| "-".repeat(*width)).collect::<Vec<_>>().join("  ");
    let mut text: Vec<String> = lines.iter().map(line).collect();
    text.insert(1.min(text.len()), rule);
    text.join("\n")
}

/// Prints events as they come, until the stream ends.
pub(super) async fn live(args: LiveQuery) -> Outcome {
    let mut path = format!("/v1/live?sql={}", encode(&args.statement));
    for stage in &args.plugin {
        path.push_str(&format!("&plugin={}", encode(stage)));
    }
    for (name, value) in [("on_error", &args.on_error), ("namespace", &args.server.namespace)] {
        if let Some(value) = value {
            path.push_str(&format!("&{name}={}", encode(value)));
        }
    }
    let lost = |error: crate::http::client::ClientError| error.to_string();
    let (status, mut body) = args.server.client()?.open(Method::GET, &path, "", Vec::new()).await.map_err(lost)?;
    let mut text = Vec::new();
    while let Some(piece) = next_piece(&mut body).await.map_err(lost)? {
        text.extend_from_slice(&piece);
        if status != 200 {
            continue;
        }
        // Events end with an empty line; what is behind the last one is still to come.
        while let Some(end) = text.windows(2).position(|two| two == b"\n\n") {
            let event = String::from_utf8_lossy(&text[..end]).into_owned();
            text.drain(..end + 2);
            let Some(line) = event_text(&event, args.server.json) else { continue };
            say(&line);
            if args.once && event.starts_with("event: uptodate") {
                return Ok(());
            }
            if args.once && event.starts_with("event: plugin-error") {
                return Err("a plugin failed, so the present rows cannot be told".to_owned());
            }
        }
    }
    match status {
        200 => Err("the server ended the stream".to_owned()),
        status => parsed(&Answer { status, body: text.into() }).map(drop),
    }
}

/// One event as one line; comments and `retry` are none.
fn event_text(event: &str, as_json: bool) -> Option<String> {
    let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let (name, data) = (field("event")?, field("data").unwrap_or("{}"));
    if !as_json {
        return Some(format!("{name:<12} {}", one_line(data)));
    }
    let data: Value = serde_json::from_str(data).unwrap_or(Value::Null);
    Some(json!({"event": name, "id": field("id"), "data": data}).to_string())
}

pub(super) async fn push(
    module: PathBuf,
    name: Option<String>,
    table: Option<String>,
    params: String,
    server: Server,
) -> Outcome {
    let params = object_of("--params", &params)?;
    let path = if module.is_dir() { craft::build(&module)? } else { module };
    if path.extension().is_none_or(|ending| ending != "wasm" && ending != "wat") {
        let path = path.display();
        return Err(format!(
            "{path} is no module (.wasm, .wat) and no crate's folder; build it first, then push the module"
        ));
    }
    let bytes = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let name = name.or(stem).ok_or("the module has no name; give --name")?;
    let started = std::time::Instant::now();
    let mut answer = server.ask(Method::PUT, &server.plugin(&name), "application/wasm", bytes).await?;
    answer["upload_ms"] = json!(started.elapsed().as_millis() as u64);
    // It is active, so whatever keeps it from being measured is no failure of the push.
    match measured(&server, &name, table.as_deref(), params).await {
        Ok(nanos) => answer["nanos_per_change"] = nanos,
        Err(reason) => {
            answer["nanos_per_change"] = Value::Null;
            answer["not_measured"] = json!(reason);
        }
    }
    server.print(&answer, |plugin| {
        let (cost, upload) = (cost_text(plugin, table.as_deref()), &plugin["upload_ms"]);
        format!("{}\n{cost}\n{}; the upload took {upload} ms", version_text(plugin, ""), since_text(plugin))
    });
    Ok(())
}

/// How long a change takes, by a trial of the server on rows that it makes up; or why that is not known.
async fn measured(server: &Server, name: &str, table: Option<&str>, params: Value) -> Result<Value, String> {
    let mut request = json!({"measure": true, "params": params});
    if let Some(table) = table {
        request["table"] = json!(table);
    }
    let path = format!("{}/try", server.plugin(name));
    let answer = server.ask(Method::POST, &path, JSON, request.to_string().into_bytes()).await;
    let mut answer = answer.map_err(|reason| {
        let hint = if reason.contains("(plugin_params,") { "; give others with --params" } else { "" };
        format!("{reason}{hint}")
    })?;
    if answer["nanos_per_change"].is_number() {
        return Ok(answer["nanos_per_change"].take());
    }
    let results = answer["results"].as_array().into_iter().flatten();
    let failed = results.map(|result| &result["error"]).find(|error| error.is_object());
    Err(match failed {
        Some(error) => {
            format!("it fails on made-up rows ({}: {})", cell_text(&error["cause"]), guest_text(&error["message"]))
        }
        None => "the server does not measure".to_owned(),
    })
}

/// What an upload costs, as the lines below its version.
fn cost_text(plugin: &Value, table: Option<&str>) -> String {
    let compiled = match plugin["compile_ms"].as_f64() {
        Some(millis) => format!("compiled in {millis} ms"),
        None => "had been compiled before".to_owned(),
    };
    let kib = plugin["instance_bytes"].as_u64().unwrap_or(0).div_ceil(1024);
    let rows = table.map_or_else(|| "the columns it reads".to_owned(), |table| format!("the columns of {table}"));
    let time = match plugin["nanos_per_change"].as_f64() {
        Some(nanos) => format!("{nanos} ns a change, in batches of made-up rows with {rows}"),
        None => format!("time per change: not measured: {}", cell_text(&plugin["not_measured"])),
    };
    format!("  {compiled}; an instance has {kib} KiB of memory beside its window\n  {time}")
}

pub(super) async fn try_rows(
    name: String,
    [rows, old, params]: [String; 3],
    table: Option<String>,
    server: Server,
) -> Outcome {
    const LIKE: &str = "[{\"dep_delay\":20}]";
    let (rows, old) = (array_of("--rows", &rows, LIKE)?, array_of("--old", &old, LIKE)?);
    if [&rows, &old].iter().all(|rows| rows.as_array().is_none_or(Vec::is_empty)) {
        return Err(format!("there is no row to try; give some, such as --rows '{LIKE}'"));
    }
    let mut request = json!({"rows": rows, "old": old, "params": object_of("--params", &params)?});
    if let Some(table) = table {
        request["table"] = json!(table);
    }
    let path = format!("{}/try", server.plugin(&name));
    let answer = server.ask(Method::POST, &path, JSON, request.to_string().into_bytes()).await?;
    server.print(&answer, |answer| {
        let results = answer["results"].as_array().cloned().unwrap_or_default();
        let lines = results.iter().enumerate().map(|(index, result)| format!("{index:>4}  {}", json_text(result)));
        let took = format!("{} in {} µs", rows_text(results.len() as u64), answer["elapsed_us"]);
        lines.chain([took]).collect::<Vec<_>>().join("\n")
    });
    Ok(())
}

pub(super) async fn list(server: Server) -> Outcome {
    let query = server.namespace.as_ref().map(|name| format!("?namespace={}", encode(name))).unwrap_or_default();
    let answer = server.ask(Method::GET, &format!("/v1/plugins{query}"), "", Vec::new()).await?;
    server.print(&answer, |answer| {
        let mut lines = vec![["namespace", "name", "version", "kind", "size", "sha256"].map(str::to_owned).to_vec()];
        let plugins = answer["plugins"].as_array().into_iter().flatten();
        for plugin in plugins.filter(|plugin| plugin["active"] == json!(true)) {
            let cells =
                [&plugin["namespace"], &plugin["name"], &plugin["version"], &plugin["kinds"][0], &plugin["size"]];
            let mut line: Vec<String> = cells.map(cell_text).to_vec();
            line.push(cell_text(&plugin["sha256"]).chars().take(12).collect());
            lines.push(line);
        }
        table_text(&lines)
    });
    Ok(())
}

pub(super) async fn show(name: String, server: Server) -> Outcome {
    let answer = server.ask(Method::GET, &server.plugin(&name), "", Vec::new()).await?;
    server.print(&answer, |answer| {
        let versions = answer["versions"].as_array().cloned().unwrap_or_default();
        let text =
            |version: &Value| version_text(version, if version["active"] == json!(true) { " (active)" } else { "" });
        versions.iter().rev().map(text).collect::<Vec<_>>().join("\n\n")
    });
    Ok(())
}

/// `state` stands behind the version's number.
fn version_text(plugin: &Value, state: &str) -> String {
    let list = |name: &str, text: &dyn Fn(&Value) -> String| {
        let entries: Vec<String> = plugin[name].as_array().into_iter().flatten().map(text).collect();
        if entries.is_empty() { "none".to_owned() } else { entries.join(", ") }
    };
    let parameter = |parameter: &Value| {
        let default = if parameter["required"] == json!(true) {
            "required".to_owned()
        } else {
            format!("default {}", json_text(&parameter["default"]))
        };
        format!("{} ({}, {default})", guest_text(&parameter["name"]), cell_text(&parameter["type"]))
    };
    let column = |column: &Value| format!("{} ({})", guest_text(&column["name"]), cell_text(&column["type"]));
    format!(
        "{} version {}{state}: {}, {} bytes, sha256 {}\n  parameters: {}\n  reads: {}",
        cell_text(&plugin["name"]),
        plugin["version"],
        cell_text(&plugin["kinds"][0]),
        plugin["size"],
        cell_text(&plugin["sha256"]),
        list("parameters", &parameter),
        list("columns", &column),
    )
}

pub(super) async fn errors(name: String, server: Server) -> Outcome {
    let answer = server.ask(Method::GET, &format!("{}/errors", server.plugin(&name)), "", Vec::new()).await?;
    server.print(&answer, |answer| {
        let entries = answer["errors"].as_array().cloned().unwrap_or_default();
        if entries.is_empty() {
            return "none".to_owned();
        }
        let line = |entry: &Value| {
            let names = ["number", "at", "table", "seq", "cause", "action", "message"];
            let cells = names.map(|name| guest_text(&entry[name]));
            format!("{}  {}", cells.join("  "), json_text(&entry["row"]))
        };
        entries.iter().map(line).collect::<Vec<_>>().join("\n")
    });
    Ok(())
}

pub(super) async fn replay(name: String, number: u64, server: Server) -> Outcome {
    let path = format!("{}/replay", server.plugin(&name));
    let answer = server.ask(Method::POST, &path, JSON, json!({"number": number}).to_string().into_bytes()).await?;
    server.print(&answer, |answer| {
        let noted = &answer["noted"];
        let said = |entry: &Value| format!("{}: {}", cell_text(&entry["cause"]), guest_text(&entry["message"]));
        let now = match &answer["result"]["error"] {
            Value::Null => json_text(&answer["result"]),
            error => format!("fails still, {}", said(error)),
        };
        format!(
            "noted of version {} at seq {} of {}: {}\nold: {}\nrow: {}\nversion {} now: {now}",
            noted["version"],
            noted["seq"],
            cell_text(&noted["table"]),
            said(noted),
            json_text(&noted["old"]),
            json_text(&noted["row"]),
            answer["version"],
        )
    });
    Ok(())
}

pub(super) async fn rollback(name: String, version: Option<u32>, server: Server) -> Outcome {
    let request = version.map_or_else(|| json!({}), |version| json!({"version": version}));
    let path = format!("{}/rollback", server.plugin(&name));
    let answer = server.ask(Method::POST, &path, JSON, request.to_string().into_bytes()).await;
    // The server names the field of its request.
    let answer = answer.map_err(|reason| reason.replace("(\"version\")", "(--version)"))?;
    let all = server.ask(Method::GET, &server.plugin(&name), "", Vec::new()).await.unwrap_or(Value::Null);
    server.print(&answer, |plugin| {
        let same = same_module(plugin, &all).map(|version| format!("\nits module is that of version {version}"));
        format!("{}{}\n{}", version_text(plugin, ""), same.unwrap_or_default(), since_text(plugin))
    });
    Ok(())
}

/// From when on it is active. Of one that was active before, the server says no more than that.
fn since_text(plugin: &Value) -> String {
    if plugin["unchanged"] == json!(true) {
        return "was active already".to_owned();
    }
    format!("is active from seq {} on", plugin["seq"])
}

/// The earliest of all versions whose module this one has; none when it is the first with it.
fn same_module(plugin: &Value, all: &Value) -> Option<u64> {
    let versions = all["versions"].as_array()?.iter().filter(|other| other["sha256"] == plugin["sha256"]);
    let first = versions.filter_map(|other| other["version"].as_u64()).min()?;
    (Some(first) != plugin["version"].as_u64()).then_some(first)
}

pub(super) async fn remove(name: String, server: Server) -> Outcome {
    let answer = server.ask(Method::DELETE, &server.plugin(&name), "", Vec::new()).await?;
    server.print(&answer, |_| format!("plugin {name} is gone"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_tables() {
        let result = json!({"columns": [{"name": "id"}, {"name": "name"}], "rows": [[1, "a"], [200, null]]});
        assert_eq!(result_text(&result), "id   name\n---  ----\n1    a\n200  NULL\n(2 rows)");
        assert_eq!(result_text(&json!({"affected": 3})), "3 rows changed");
        assert_eq!(result_text(&json!({"affected": 1})), "1 row changed");
    }

    #[test]
    fn what_is_not_of_the_asked_shape_is_said_by_its_option() {
        assert!(array_of("--rows", "{}", "[1]").is_err_and(|said| said.contains("--rows") && said.contains("[1]")));
        assert!(object_of("--params", "25").is_err_and(|said| said.contains("--params")));
        assert!(json_of("--old", "x").is_err_and(|said| said.contains("--old is not JSON")));
    }

    #[test]
    fn a_version_says_whose_module_it_has() {
        let version = |number: u32, sha256: &str| json!({"version": number, "sha256": sha256});
        let all = json!({"versions": [version(1, "a"), version(2, "b"), version(3, "a")]});
        assert_eq!(same_module(&version(3, "a"), &all), Some(1));
        assert_eq!(same_module(&version(2, "b"), &all), None);
        assert_eq!(same_module(&version(3, "a"), &Value::Null), None);
    }

    #[test]
    fn a_push_says_what_it_costs_or_why_that_is_not_known() {
        let plugin = json!({"compile_ms": 12.5, "instance_bytes": 65537, "nanos_per_change": 31.0});
        assert_eq!(
            cost_text(&plugin, Some("flights")),
            "  compiled in 12.5 ms; an instance has 65 KiB of memory beside its window\n  31 ns a change, in batches of \
             made-up rows with the columns of flights"
        );
        let plugin =
            json!({"compile_ms": null, "instance_bytes": 65536, "not_measured": "parameter `dest` is required"});
        assert_eq!(
            cost_text(&plugin, None),
            "  had been compiled before; an instance has 64 KiB of memory beside its window\n  time per change: not \
             measured: parameter `dest` is required"
        );
    }

    #[test]
    fn events_are_lines() {
        let event = "event: insert\nid: a-1-b\ndata: {\"key\":{\"id\":1}}";
        assert_eq!(event_text(event, false).unwrap(), "insert       {\"key\":{\"id\":1}}");
        assert_eq!(event_text(event, true).unwrap(), r#"{"event":"insert","id":"a-1-b","data":{"key":{"id":1}}}"#);
        assert_eq!(event_text(": hello\nretry: 1500", true), None);
    }
}
