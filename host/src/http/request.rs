//! What clients ask for, out of JSON bodies and query strings, into `db`'s requests. Unknown and unbuilt fields are
//! refused by name.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use axum::extract::{FromRequestParts, Path, Query};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Uri};
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::error::Problem;
use super::several::split;
use crate::catalog::OnError;
use crate::db::{Idempotency, LiveRequest, SqlRequest, StageRequest};
use crate::live::OldMode;
use crate::sql::Param;

/// Deeper JSON is refused before it is parsed.
pub const JSON_DEPTH: usize = 64;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSql<'a> {
    sql: String,
    #[serde(borrow)]
    params: Option<Vec<&'a RawValue>>,
    namespace: Option<String>,
}

/// Parses a JSON document; errors say where.
pub fn parse<'a, T: Deserialize<'a>>(what: &str, text: &'a [u8]) -> Result<T, Problem> {
    let text = std::str::from_utf8(text)
        .map_err(|e| bad_json(format!("{what} is not UTF-8")).with("position", json!(e.valid_up_to())))?;
    if let Some(position) = too_deep(text) {
        return Err(bad_json(format!("{what} is nested deeper than {JSON_DEPTH}")).with("position", json!(position)));
    }
    serde_json::from_str(text).map_err(|error| {
        let position = offset(text, error.line(), error.column());
        bad_json(format!("{what}: {}", json_words(&error.to_string()))).with("position", json!(position))
    })
}

/// What a parser for Rust's types says, in the words of JSON.
pub fn json_words(said: &str) -> Cow<'_, str> {
    // The last one is the parser's own: what was found may be a text with anything in it.
    let Some((found, expected)) = said.rsplit_once(", expected ") else { return said.into() };
    let (expected, place) = expected.split_at(expected.rfind(" at line ").unwrap_or(expected.len()));
    let found = match found {
        "invalid type: sequence" => "invalid type: array",
        "invalid type: map" => "invalid type: object",
        other => other,
    };
    let expected = match expected {
        "a sequence" => "an array",
        "a map" => "an object",
        "u32" | "u64" => "a whole number from 0 on",
        other => other,
    };
    format!("{found}, expected {expected}{place}").into()
}

/// A struct that comes as a JSON object. By itself it would be read from an array as well, its fields by their order.
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(Fields(PhantomData))
    }
}

/// An object of any members, none of them twice: of two values one would be ignored.
#[derive(Default)]
pub struct Members(pub Map<String, Value>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Map::new();
                while let Some(name) = map.next_key::<String>()? {
                    if members.contains_key(&name) {
                        return Err(Error::custom(format_args!("`{name}` is there twice")));
                    }
                    members.insert(name, map.next_value()?);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

fn bad_json(detail: String) -> Problem {
    Problem::new(400, "bad_json", detail)
}

/// The byte where the nesting becomes too deep.
pub fn too_deep(text: &str) -> Option<usize> {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (position, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > JSON_DEPTH {
            return Some(position);
        }
    }
    None
}

/// Line and column (from 1, in bytes) as a byte offset.
fn offset(text: &str, line: usize, column: usize) -> usize {
    let before: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    (before + column.saturating_sub(1)).min(text.len())
}

/// `POST /v1/sql` as JSON.
pub fn sql_from_json(body: &[u8]) -> Result<SqlRequest, Problem> {
    let Object(raw): Object<RawSql<'_>> = parse(sql_body(body), body)?;
    let params = params(raw.params.as_deref().unwrap_or_default())?;
    Ok(SqlRequest {
        sql: raw.sql,
        params,
        namespace: raw.namespace,
        read_only: false,
        one_result: false,
        idempotency: None,
    })
}

/// What the body is called when it does not parse. SQL itself is sent by mistake: then the name says how it is sent.
fn sql_body(body: &[u8]) -> &'static str {
    match body.trim_ascii_start().first() {
        None | Some(b'{') => "the request body",
        _ => "the request body (a JSON object such as {\"sql\":\"SELECT 1\"}; raw SQL goes as application/sql)",
    }
}

/// `POST /v1/sql` as raw SQL.
pub fn sql_from_text(body: &[u8]) -> Result<SqlRequest, Problem> {
    let sql = std::str::from_utf8(body)
        .map_err(|e| Problem::bad_request("the SQL text is not UTF-8").with("position", json!(e.valid_up_to())))?;
    Ok(SqlRequest {
        sql: sql.to_owned(),
        params: Vec::new(),
        namespace: None,
        read_only: false,
        one_result: false,
        idempotency: None,
    })
}

/// `GET /v1/sql?sql=…`
pub fn sql_from_query(uri: &Uri) -> Result<SqlRequest, Problem> {
    let mut sql = None;
    let mut params = None;
    let mut namespace = None;
    for (name, value) in pairs(uri)? {
        match name.as_str() {
            "sql" => once(&mut sql, "sql", value)?,
            "params" => once(&mut params, "params", value)?,
            "namespace" => once(&mut namespace, "namespace", value)?,
            _ => return Err(unknown_parameter(&name, "sql, params, namespace")),
        }
    }
    let sql = sql.ok_or_else(|| Problem::bad_request("the query parameter `sql` is missing"))?;
    let params = params.as_deref().map(params_text).transpose()?.unwrap_or_default();
    Ok(SqlRequest { sql, params, namespace, read_only: true, one_result: false, idempotency: None })
}

/// The longest key; a UUID has 36 characters.
const IDEMPOTENCY_KEY_BYTES: usize = 255;

/// A header that may be there once.
pub fn one_header<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a HeaderValue>, Problem> {
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    match values.next() {
        Some(_) => Err(Problem::bad_request(format!("the header {name} is there twice"))),
        None => Ok(first),
    }
}

/// The header `Idempotency-Key`, where there is one.
pub fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(key) = one_header(headers, "Idempotency-Key")? else { return Ok(None) };
    let bad = |why: &str| Err(Problem::bad_request(format!("the header Idempotency-Key {why}")));
    match key.to_str().ok().filter(|key| key.bytes().all(|byte| byte.is_ascii_graphic())) {
        Some(key) if (1..=IDEMPOTENCY_KEY_BYTES).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => bad("has 1 to 255 visible ASCII characters; a random UUID is a good one"),
    }
}

/// The key with what it stands for: the same bytes of the same kind are the same request.
pub fn idempotency(key: String, media_type: &str, body: &[u8]) -> Idempotency {
    let mut hash = Sha256::new();
    hash.update((media_type.len() as u64).to_le_bytes());
    hash.update(media_type);
    hash.update(body);
    Idempotency { key, request: hash.finalize().into() }
}

/// The key of a bulk insert with what is known before its body comes; the body is compared while it is read.
pub fn rows_idempotency(key: String, said: &[&str]) -> Idempotency {
    let mut hash = Sha256::new();
    for part in ["rows"].iter().chain(said) {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    Idempotency { key, request: hash.finalize().into() }
}

/// The query string, decoded strictly.
pub fn pairs(uri: &Uri) -> Result<Vec<(String, String)>, Problem> {
    let bad = || Problem::bad_request("the query string is not percent-encoded UTF-8");
    let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri).map_err(|_| bad())?;
    // The decoder puts U+FFFD where bytes were no UTF-8; a client that means the character writes it out.
    let replaced = pairs.iter().any(|(name, value)| name.contains('\u{fffd}') || value.contains('\u{fffd}'));
    let meant = || uri.query().is_some_and(|query| query.to_ascii_lowercase().contains("%ef%bf%bd"));
    if replaced && !meant() { Err(bad()) } else { Ok(pairs) }
}

/// What a path says, as text.
pub struct InPath<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for InPath<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<InPath<T>, Problem> {
        let Path(said) = Path::from_request_parts(parts, state)
            .await
            .map_err(|_| Problem::bad_request("the path is not percent-encoded UTF-8"))?;
        Ok(InPath(said))
    }
}

/// For calls without query parameters.
pub fn no_parameters(uri: &Uri) -> Result<(), Problem> {
    match pairs(uri)?.first() {
        Some((name, _)) => Err(unknown_parameter(name, "none")),
        None => Ok(()),
    }
}

pub fn unknown_parameter(name: &str, known: &str) -> Problem {
    let detail = format!("unknown query parameter `{name}`; this call knows: {known}");
    Problem::new(400, "unknown_parameter", detail)
}

pub fn once(slot: &mut Option<String>, name: &str, value: String) -> Result<(), Problem> {
    match slot.replace(value) {
        Some(_) => Err(Problem::bad_request(format!("the query parameter `{name}` is given twice"))),
        None => Ok(()),
    }
}

fn params_text(text: &str) -> Result<Vec<Param>, Problem> {
    let raw: Vec<&RawValue> = parse("`params` (a JSON array)", text.as_bytes())?;
    params(&raw)
}

fn params(raw: &[&RawValue]) -> Result<Vec<Param>, Problem> {
    raw.iter().enumerate().map(|(index, value)| param(index + 1, value.get())).collect()
}

/// From the text of the JSON value: a parsed number might have lost digits already.
fn param(number: usize, text: &str) -> Result<Param, Problem> {
    let refuse = |why: &str| Problem::new(400, "bad_parameter", format!("parameter ${number}: {why}"));
    match text.as_bytes().first() {
        Some(b'n') => Ok(Param::Null),
        Some(b't') => Ok(Param::Bool(true)),
        Some(b'f') => Ok(Param::Bool(false)),
        Some(b'"') => {
            serde_json::from_str(text).map(Param::Text).map_err(|e| refuse(&format!("the string is not valid: {e}")))
        }
        Some(b'[') => Err(refuse("arrays are not supported; pass JSON as a string")),
        Some(b'{') => Err(refuse("objects are not supported; pass JSON as a string")),
        _ if text.contains(['.', 'e', 'E']) => {
            let value: f64 = text.parse().map_err(|_| refuse("not a number"))?;
            if value.is_finite() { Ok(Param::Float(value)) } else { Err(refuse("the number is too large")) }
        }
        _ => {
            let beyond =
                "the integer does not fit 64 bits; pass it as a string, it is cast to what it is compared with";
            text.parse().map(Param::Int).map_err(|_| refuse(beyond))
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLive<'a> {
    q: Option<String>,
    sql: String,
    #[serde(borrow)]
    params: Option<Vec<&'a RawValue>>,
    namespace: Option<String>,
    pipeline: Option<Vec<Object<RawStage>>>,
    on_error: Option<String>,
    snapshot: Option<bool>,
    old: Option<String>,
    last_event_id: Option<String>,
    last_rows: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStage {
    plugin: String,
    version: Option<RawVersion>,
    #[serde(default)]
    params: Members,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a plugin's `version` is its number, or \"sha256:…\"")]
enum RawVersion {
    Number(u32),
    Text(String),
}

impl RawStage {
    fn check(self) -> StageRequest {
        let plugin = match self.version {
            Some(RawVersion::Number(version)) => format!("{}@{version}", self.plugin),
            Some(RawVersion::Text(version)) => format!("{}@{version}", self.plugin),
            None => self.plugin,
        };
        StageRequest { plugin, params: self.params.0.into() }
    }
}

/// The most live queries on one stream: their positions have to fit into one id.
const MAX_QUERIES: usize = 32;

/// What a stream is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// One or more, in order.
    pub queries: Vec<LiveRequest>,
    /// What their events are marked with, where there may be several.
    pub names: Option<Vec<Value>>,
    /// Where to go on.
    pub position: Option<String>,
}

impl Asked {
    /// Each query with its own position out of the stream's.
    pub fn placed(&self) -> Result<Vec<LiveRequest>, Problem> {
        let positions = match (&self.position, &self.names) {
            (None, _) => vec![None; self.queries.len()],
            (Some(position), None) => vec![Some(position.clone())],
            (Some(position), Some(_)) => split(position, self.queries.len()).ok_or_else(|| {
                Problem::bad_request("the position (Last-Event-ID) is not one of a stream of so many queries")
            })?,
        };
        let placed = |(query, position): (&LiveRequest, _)| LiveRequest { position, ..query.clone() };
        Ok(self.queries.iter().zip(positions).map(placed).collect())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSeveral<'a> {
    #[serde(borrow)]
    queries: Vec<Object<RawLive<'a>>>,
    last_event_id: Option<String>,
}

/// `POST /v1/live` and `POST /v1/auth/ticket`.
pub fn live_from_json(body: &[u8]) -> Result<Asked, Problem> {
    // Looked for first: "missing field `sql`" would not say what is wrong with a list of queries.
    let fields = serde_json::from_slice::<std::collections::HashMap<String, IgnoredAny>>(body);
    if fields.is_ok_and(|fields| fields.contains_key("queries")) {
        let Object(raw): Object<RawSeveral<'_>> = parse("the request body", body)?;
        return several(raw.queries, some_position(raw.last_event_id));
    }
    let Object(mut raw): Object<RawLive<'_>> = parse("the request body", body)?;
    if raw.q.is_some() {
        return Err(Problem::bad_request("`q` names one of several `queries`; a single one has no name"));
    }
    let position = some_position(raw.last_event_id.take());
    Ok(Asked { queries: vec![raw.check()?], names: None, position })
}

fn several(raw: Vec<Object<RawLive<'_>>>, position: Option<String>) -> Result<Asked, Problem> {
    if raw.is_empty() || raw.len() > MAX_QUERIES {
        return Err(Problem::bad_request(format!("`queries` has 1 to {MAX_QUERIES} entries, not {}", raw.len())));
    }
    let (mut queries, mut names) = (Vec::new(), Vec::new());
    for (at, Object(mut raw)) in raw.into_iter().enumerate() {
        if raw.last_event_id.is_some() {
            return Err(Problem::bad_request("`last_event_id` is one for all `queries`: it stands beside them"));
        }
        let name = raw.q.take().map_or_else(|| json!(at), Value::from);
        if names.contains(&name) {
            return Err(Problem::bad_request(format!("two `queries` have the name {name}")));
        }
        names.push(name);
        queries.push(raw.check().map_err(|problem| problem.within(&format!("queries[{at}]")))?);
    }
    Ok(Asked { queries, names: Some(names), position })
}

/// An empty one is none, as in the header: what a client sends that has none yet.
fn some_position(said: Option<String>) -> Option<String> {
    said.filter(|position| !position.is_empty())
}

impl RawLive<'_> {
    fn check(self) -> Result<LiveRequest, Problem> {
        Ok(LiveRequest {
            sql: self.sql,
            params: params(self.params.as_deref().unwrap_or_default())?,
            namespace: self.namespace,
            pipeline: self.pipeline.unwrap_or_default().into_iter().map(|Object(stage)| stage.check()).collect(),
            on_error: on_error(self.on_error.as_deref())?,
            snapshot: self.snapshot,
            last_rows: last_rows(self.last_rows, self.snapshot)?,
            old: old_mode(self.old.as_deref())?,
            position: None,
        })
    }
}

/// `GET /v1/live`: the query (none if only the ticket says it), the ticket, the event id of the query string.
#[derive(Debug)]
pub struct LiveQuery {
    pub request: Option<Asked>,
    pub ticket: Option<String>,
    pub last_event_id: Option<String>,
}

const LIVE_PARAMETERS: &str =
    "sql, params, namespace, plugin, on_error, snapshot, last_rows, old, last_event_id, ticket, queries";

pub fn live_from_query(uri: &Uri) -> Result<LiveQuery, Problem> {
    let mut query = LiveQuery { request: None, ticket: None, last_event_id: None };
    let (mut sql, mut namespace, mut old, mut error, mut snapshot, mut list) = (None, None, None, None, None, None);
    let (mut last, mut queries) = (None, None);
    let mut pipeline = Vec::new();
    for (name, value) in pairs(uri)? {
        match name.as_str() {
            "sql" => once(&mut sql, "sql", value)?,
            "params" => once(&mut list, "params", value)?,
            "namespace" => once(&mut namespace, "namespace", value)?,
            "plugin" => pipeline.push(stage(&value)?),
            "on_error" => once(&mut error, "on_error", value)?,
            "snapshot" => once(&mut snapshot, "snapshot", value)?,
            "old" => once(&mut old, "old", value)?,
            "last_event_id" => once(&mut query.last_event_id, "last_event_id", value)?,
            "ticket" => once(&mut query.ticket, "ticket", value)?,
            "last_rows" => once(&mut last, "last_rows", value)?,
            "queries" => once(&mut queries, "queries", value)?,
            _ => return Err(unknown_parameter(&name, LIVE_PARAMETERS)),
        }
    }
    query.last_event_id = some_position(query.last_event_id);
    let on_error = on_error(error.as_deref())?;
    let options = [&list, &namespace, &old, &error, &snapshot, &last].into_iter().any(Option::is_some);
    let options = options || !pipeline.is_empty();
    if let Some(list) = queries {
        if sql.is_some() || options {
            return Err(Problem::bad_request("with `queries` each entry has its own `sql` and options"));
        }
        let raw: Vec<Object<RawLive<'_>>> = parse("`queries` (a JSON array)", list.as_bytes())?;
        query.request = Some(several(raw, None)?);
        return Ok(query);
    }
    let Some(sql) = sql else {
        if options || query.ticket.is_none() {
            return Err(Problem::bad_request("the query parameter `sql` is missing"));
        }
        return Ok(query);
    };
    let request = LiveRequest {
        sql,
        params: list.as_deref().map(params_text).transpose()?.unwrap_or_default(),
        namespace,
        pipeline,
        on_error,
        snapshot: flag("snapshot", snapshot.as_deref())?,
        last_rows: match last {
            None => None,
            Some(text) => {
                let rows = text
                    .parse()
                    .map_err(|_| Problem::bad_request(format!("`last_rows` is a number of rows, not {text:?}")))?;
                last_rows(Some(rows), snapshot.map(|text| text == "true"))?
            }
        },
        old: old_mode(old.as_deref())?,
        position: None,
    };
    query.request = Some(Asked { queries: vec![request], names: None, position: None });
    Ok(query)
}

/// `name`, `name@3`, `name@sha256:…`, each optionally followed by `:` and a JSON object.
fn stage(text: &str) -> Result<StageRequest, Problem> {
    const PINNED: &str = "@sha256:";
    let skip = text.find(PINNED).filter(|at| !text[..*at].contains(':')).map_or(0, |at| at + PINNED.len());
    let colon = text[skip..].find(':').map(|at| skip + at);
    let (plugin, params) = match colon {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    };
    if plugin.is_empty() {
        return Err(Problem::bad_request("a `plugin` parameter names no plugin"));
    }
    let params = match params {
        Some(json) => {
            let like = r#"a JSON object, as in name:{"minutes":30}"#;
            parse::<Members>(&format!("the parameters of plugin {plugin} ({like})"), json.as_bytes())?
        }
        None => Members::default(),
    };
    Ok(StageRequest { plugin: plugin.to_owned(), params: params.0.into() })
}

fn on_error(value: Option<&str>) -> Result<OnError, Problem> {
    match value {
        None | Some("stop") => Ok(OnError::Stop),
        Some("skip") => Ok(OnError::Skip),
        Some("pass") => Ok(OnError::Pass),
        Some(other) => Err(Problem::bad_request(format!("`on_error` is `stop`, `skip` or `pass`, not {other:?}"))),
    }
}

fn old_mode(value: Option<&str>) -> Result<OldMode, Problem> {
    match value {
        None | Some("changed") => Ok(OldMode::Changed),
        Some("full") => Ok(OldMode::Full),
        Some("none") => Ok(OldMode::None),
        Some(other) => Err(Problem::bad_request(format!("`old` is `changed`, `full` or `none`, not {other:?}"))),
    }
}

/// A snapshot of the last rows and no snapshot contradict each other.
fn last_rows(rows: Option<u64>, snapshot: Option<bool>) -> Result<Option<u64>, Problem> {
    match (rows, snapshot) {
        (Some(0), _) => Err(Problem::bad_request("`last_rows` is 1 or more; say `snapshot=false` for none")),
        (Some(_), Some(false)) => {
            Err(Problem::bad_request("`last_rows` and `snapshot=false` contradict each other: leave one out"))
        }
        (rows, _) => Ok(rows),
    }
}

fn flag(name: &str, value: Option<&str>) -> Result<Option<bool>, Problem> {
    match value {
        None => Ok(None),
        Some("true") => Ok(Some(true)),
        Some("false") => Ok(Some(false)),
        Some(other) => Err(Problem::bad_request(format!("`{name}` is `true` or `false`, not {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detail(problem: Problem) -> String {
        problem.body().to_string()
    }

    #[test]
    fn parameters_keep_their_types_and_digits() {
        let body = br#"{"sql":"x","params":[null,true,1,-9223372036854775808,1.5,1e3,"a\n"]}"#;
        let expect = vec![
            Param::Null,
            Param::Bool(true),
            Param::Int(1),
            Param::Int(i64::MIN),
            Param::Float(1.5),
            Param::Float(1000.0),
            Param::Text("a\n".to_owned()),
        ];
        assert_eq!(sql_from_json(body).ok().unwrap().params, expect);
        for (value, why) in [
            ("9223372036854775808", "64 bits"),
            ("99999999999999999999", "64 bits"),
            ("1e999", "too large"),
            ("[1]", "arrays"),
            ("{}", "objects"),
        ] {
            let body = format!(r#"{{"sql":"x","params":[0,{value}]}}"#);
            let said = detail(sql_from_json(body.as_bytes()).err().unwrap());
            assert!(said.contains(why) && said.contains("$2"), "{value}: {said}");
        }
    }

    #[test]
    fn bad_json_is_told_with_its_place() {
        let deep = format!("{{\"sql\":\"{}\",\"params\":{}", "[".repeat(100), "[".repeat(65));
        for (body, position, why) in [
            ("{\"sql\":1}", 8, "invalid type"),
            ("{\n\"sql\":\"x\",\n\"sqll\":1}", 19, "unknown field `sqll`"),
            ("{}", 1, "missing field `sql`"),
            ("{\"sql\":\"x\"} x", 12, "trailing"),
            ("{\"sql\":\"a\",\"sql\":\"b\"}", 16, "duplicate"),
            ("", 0, "EOF"),
            (deep.as_str(), 182, "nested deeper"),
            ("SELECT 1", 0, "application/sql"),
        ] {
            let problem = sql_from_json(body.as_bytes()).err().unwrap();
            let said = problem.body();
            assert!(said["detail"].as_str().unwrap().contains(why), "{body:.40}: {said}");
            let at = said["position"].as_u64().unwrap();
            assert!(at.abs_diff(position) <= 2, "{body:.40}: {said}");
        }
        assert!(detail(sql_from_json(b"{\"sql\":\"\xff\"}").err().unwrap()).contains("UTF-8"));
    }

    #[test]
    fn queries_by_get() {
        let request = sql_from_query(&"/v1/sql?sql=SELECT%20%241&params=%5B7%5D".parse().unwrap()).ok().unwrap();
        assert!(request.read_only);
        assert_eq!((request.sql.as_str(), request.params), ("SELECT $1", vec![Param::Int(7)]));
        for (uri, why) in [
            ("/v1/sql", "missing"),
            ("/v1/sql?sql=1&sql=2", "twice"),
            ("/v1/sql?sql=1&token=abc", "unknown query parameter `token`"),
            ("/v1/sql?sql=%ff", "UTF-8"),
            ("/v1/sql?sql=1&params=7", "params"),
        ] {
            let said = detail(sql_from_query(&uri.parse().unwrap()).err().unwrap());
            assert!(said.contains(why), "{uri}: {said}");
        }
        assert!(sql_from_query(&"/v1/sql?sql=%EF%BF%BD".parse().unwrap()).is_ok());
    }

    #[test]
    fn stages() {
        for (text, plugin, params) in [
            ("late", "late", "{}"),
            ("late@3", "late@3", "{}"),
            ("late:{\"minutes\":15}", "late", "{\"minutes\":15}"),
            ("late@sha256:ab12", "late@sha256:ab12", "{}"),
            ("late@sha256:ab12:{\"a\":\"b:c\"}", "late@sha256:ab12", "{\"a\":\"b:c\"}"),
            ("late:{\"a\":\"x@sha256:y\"}", "late", "{\"a\":\"x@sha256:y\"}"),
        ] {
            let stage = stage(text).unwrap();
            assert_eq!((stage.plugin.as_str(), stage.params.to_string().as_str()), (plugin, params), "{text}");
        }
        assert!(stage(":{}").is_err() && stage("late:[1]").is_err() && stage("late:").is_err());
    }

    #[test]
    fn the_two_ways_to_ask_for_a_live_query_agree() {
        let uri =
            "/v1/live?sql=S&plugin=a%402:%7B%22x%22:1%7D&plugin=b&old=full&snapshot=false&on_error=skip&params=%5B1%5D";
        let get = live_from_query(&uri.parse().unwrap()).unwrap().request.unwrap();
        let body = br#"{"sql":"S","params":[1],"snapshot":false,"old":"full","on_error":"skip",
                        "pipeline":[{"plugin":"a","version":2,"params":{"x":1}},{"plugin":"b"}]}"#;
        let post = live_from_json(body).unwrap();
        assert_eq!(format!("{get:?}"), format!("{post:?}"));
    }

    #[test]
    fn several_queries_on_one_stream() {
        let list = r#"[{"sql":"A","old":"none"},{"q":"b","sql":"B","last_rows":5}]"#;
        let post = live_from_json(format!(r#"{{"queries":{list}}}"#).as_bytes()).unwrap();
        assert_eq!(post.names, Some(vec![json!(0), json!("b")]));
        assert_eq!((post.queries[0].old, post.queries[1].last_rows), (OldMode::None, Some(5)));
        let encoded: String = list.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let get = live_from_query(&format!("/v1/live?queries={encoded}").parse().unwrap()).unwrap();
        assert_eq!(get.request, Some(post.clone()));

        let at = |position: &str| Asked { position: Some(position.to_owned()), ..post.clone() }.placed();
        let placed = at("e-1-f~_").unwrap();
        assert_eq!((placed[0].position.as_deref(), placed[1].position.as_deref()), (Some("e-1-f"), None));
        assert_eq!(at("e-1-f").unwrap_err().status(), 400);
        assert!(post.placed().unwrap().iter().all(|query| query.position.is_none()));

        let many = format!(r#"{{"queries":[{}]}}"#, vec![r#"{"sql":"S"}"#; MAX_QUERIES + 1].join(","));
        for (body, named) in [
            (r#"{"queries":[]}"#, "1 to 32"),
            (many.as_str(), "1 to 32"),
            (r#"{"queries":[{"sql":"A","last_event_id":"1"}]}"#, "last_event_id"),
            (r#"{"queries":[{"sql":"A","q":"x"},{"sql":"B","q":"x"}]}"#, "\"x\""),
            (r#"{"queries":[{"sql":"A"},{"sql":"B","old":"blue"}]}"#, "queries[1]: `old`"),
            (r#"{"sql":"A","queries":[]}"#, "sql"),
            (r#"{"sql":"A","q":"x"}"#, "`q`"),
        ] {
            let said = detail(live_from_json(body.as_bytes()).unwrap_err());
            assert!(said.replace("\\\"", "\"").contains(named), "{body:.60}: {said}");
        }
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        assert!(live_from_json(br#"{"sql":"S","on_error":"never"}"#).is_err());
        assert!(live_from_query(&"/v1/live".parse().unwrap()).is_err());
        assert!(live_from_query(&"/v1/live?ticket=t&old=full".parse().unwrap()).is_err());
        assert!(live_from_query(&"/v1/live?ticket=t&on_error=skip".parse().unwrap()).is_err());
        let only = live_from_query(&"/v1/live?ticket=t&last_event_id=1".parse().unwrap()).unwrap();
        assert!(only.request.is_none() && only.ticket.is_some() && only.last_event_id.is_some());
    }
}
