//! Which call does what. Handlers parse, call `db`, shape the answer; nothing is decided here that `db` could decide.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, Version, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::auth::{Auth, Caller};
use super::body::{Budget, Limit, Received, lend, receive};
use super::denials;
use super::error::Problem;
use super::json::Json;
use super::limits::Limits;
use super::request::Asked;
use super::results::{self, Format};
use super::server::MAX_HEADERS;
use super::several::Streams;
use super::stall::paced;
use super::stream::{self, Handover, Subscriber};
use super::tickets::Tickets;
use super::{plugins, request, rows};
use crate::config::{Config, HttpOptions};
use crate::db::{Db, Identity, SqlRequest};
use crate::sql::Refusal;
use crate::telemetry::{Exposition, Metrics};

const LIVE: &str = "/v1/live";

/// Longer URLs are refused; what does not fit belongs into a POST.
const URL_BYTES: usize = 8 * 1024;

/// Everything the calls work with; clones share it.
#[derive(Clone)]
pub struct App(Arc<Shared>);

pub struct Shared {
    pub db: Db,
    pub options: HttpOptions,
    pub metrics: Arc<Metrics>,
    pub(super) auth: Auth,
    pub(super) budget: Budget,
    tickets: Tickets,
    limits: Limits,
    exposition: Exposition,
    heartbeat: Duration,
    /// Set when the server goes down: not ready, no new calls, streams end.
    pub(super) draining: CancellationToken,
    /// Open live streams.
    pub(super) streams: TaskTracker,
}

impl std::ops::Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl App {
    pub fn new(db: Db, config: &Config, admin_token: &str, metrics: Arc<Metrics>, exposition: Exposition) -> App {
        let auth = Auth::new(&config.tokens, admin_token);
        let tickets = Tickets::load(config.http.ticket_ttl, &db, &auth);
        App(Arc::new(Shared {
            db,
            options: config.http.clone(),
            metrics,
            auth,
            budget: Budget::new(config.http.body_total_bytes),
            tickets,
            limits: Limits::new(config.live.max_per_user, config.live.max_per_address),
            exposition,
            heartbeat: config.live.heartbeat,
            draining: CancellationToken::new(),
            streams: TaskTracker::new(),
        }))
    }

    pub(super) async fn body(&self, headers: &HeaderMap, body: Body) -> Result<Received, Problem> {
        let limit = Limit { bytes: self.options.body_bytes, setting: "server.body_bytes" };
        receive(headers, body, limit, &self.budget).await
    }
}

pub fn router(app: App) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/v1/sql", get(sql_get).post(sql_post))
        .route(LIVE, get(live_get).head(not_live).post(live_post).fallback(not_live))
        .route("/v1/auth/ticket", post(ticket))
        .route("/v1/plugins", get(plugins::list))
        .route("/v1/plugins/{name}", get(plugins::show).put(plugins::put).delete(plugins::delete))
        .route(
            "/v1/plugins/{namespace}/{name}",
            get(plugins::show).put(plugins::put).delete(plugins::delete).post(plugins::act),
        )
        .route("/v1/plugins/{namespace}/{name}/{action}", get(plugins::look).post(plugins::act))
        .route("/v1/tables/{namespace}/{table}/rows", post(rows::post))
        .route("/v1/auth/login", post(async || Problem::not_implemented("login with a password")))
        .route("/v1/auth/refresh", post(async || Problem::not_implemented("refreshing a session")))
        .route("/v1/openapi.json", get(async || Problem::not_implemented("the OpenAPI document")))
        .route("/", get(async || Problem::not_implemented("the web console")))
        .fallback(not_found)
        .with_state(app)
}

/// The connection that a request came by.
#[derive(Clone)]
pub struct Peer {
    pub address: std::net::SocketAddr,
    /// Set where the connection would send a live stream itself.
    pub handover: Option<Handover>,
}

/// One request, whole: identity first, so that nothing below sees a credential; then the router.
pub async fn handle(app: &App, router: &Router, request: Request) -> Response {
    let (mut request, unread) = lend(request);
    let started = Instant::now();
    app.metrics.http_requests.inc();
    let address = request.extensions().get::<Peer>().map(|peer| peer.address.ip().to_canonical());
    let token = request.headers().contains_key(header::AUTHORIZATION);
    let header_lines = request.headers().len();
    let ticket = has_ticket(request.uri());
    let who = app.auth.take(request.headers_mut()).map(|who| Identity { address, ..who });
    if let Some(who) = &who {
        request.extensions_mut().insert(who.clone());
    }
    let (method, version) = (request.method().clone(), request.version());
    // Without the query string: it may hold a ticket, or somebody's data.
    let path = request.uri().path().to_owned();
    let mut response = match refuse_early(app, &request, header_lines) {
        Some(problem) => problem.into_response(),
        None => match tower::ServiceExt::oneshot(router.clone(), request).await {
            Ok(response) => in_words(response, &method, &path),
            Err(never) => match never {},
        },
    };
    // At once: whoever goes away meanwhile was refused all the same.
    denials::look(&app.db, &denials::Asked { who: who.as_ref(), address, token, ticket, path: &path }, &mut response);
    unread.discard().await;
    let streamed = response.body().size_hint().exact().is_none();
    let response = if streamed && version == Version::HTTP_2 {
        response.map(|body| paced(body, app.options.stall_limit, app.metrics.http_stalled.clone()))
    } else {
        response
    };
    let (status, elapsed) = (response.status().as_u16(), started.elapsed());
    tracing::debug!(%method, path, status, elapsed_us = elapsed.as_micros() as u64, "request");
    response
}

fn refuse_early(app: &App, request: &Request, header_lines: usize) -> Option<Problem> {
    if header_lines > MAX_HEADERS {
        let detail = format!("the request has {header_lines} header lines; {MAX_HEADERS} are the most");
        return Some(Problem::new(431, "too_many_headers", detail));
    }
    let url = request.uri().path_and_query().map_or(0, |url| url.as_str().len());
    if url > URL_BYTES {
        let detail = format!("the URL is longer than {URL_BYTES} bytes; send the same as a POST with a JSON body");
        return Some(Problem::new(414, "url_too_long", detail));
    }
    // Without a host, or with two, somebody in between may have read another request than this one.
    let hosts = request.headers().get_all(header::HOST).iter().count();
    if hosts > 1 || (hosts == 0 && request.version() == Version::HTTP_11) {
        return Some(Problem::bad_request("a request of HTTP/1.1 has the header Host, once"));
    }
    // A reconnect gets its answer from the live call, in the form that browsers retry.
    let reconnect = request.uri().path() == LIVE && request.method() == Method::GET;
    if app.draining.is_cancelled() && request.uri().path().starts_with("/v1/") && !reconnect {
        return Some(crate::db::DbError::Closed.into());
    }
    None
}

async fn not_found(uri: Uri) -> Problem {
    let detail = format!(
        "there is nothing at {}; there are /v1/sql, /v1/live, /v1/tables/{{namespace}}/{{table}}/rows, /v1/plugins, \
         /v1/plugins/{{namespace}}/{{name}}, /v1/auth/ticket, /healthz, /readyz and /metrics",
        uri.path()
    );
    Problem::new(404, "not_found", detail)
}

/// The router says by a header alone which methods there are at a path; only here is that known.
fn in_words(response: Response, method: &Method, path: &str) -> Response {
    let is_bare = !response.headers().contains_key(header::CONTENT_TYPE);
    match response.headers().get(header::ALLOW) {
        Some(allow) if is_bare && response.status() == StatusCode::METHOD_NOT_ALLOWED => {
            let problem = Problem::not_allowed(method, path, allow.clone(), None).into_response();
            // To HEAD the head is the answer.
            if *method == Method::HEAD { problem.map(|_| Body::empty()) } else { problem }
        }
        _ => response,
    }
}

async fn healthz() -> &'static str {
    "ok\n"
}

async fn readyz(State(app): State<App>) -> Result<&'static str, Problem> {
    if app.draining.is_cancelled() {
        return Err(crate::db::DbError::Closed.into());
    }
    if app.db.ready() {
        Ok("ready\n")
    } else {
        Err(Problem::new(503, "not_ready", "the database does not take requests now").retry_after(1))
    }
}

/// Open to this machine, as scrapers run beside the server; from elsewhere an administrator has to ask.
async fn metrics(
    State(app): State<App>,
    peer: Option<axum::Extension<Peer>>,
    caller: Result<Caller, Problem>,
) -> Result<Response, Problem> {
    let local = peer.is_some_and(|peer| peer.address.ip().to_canonical().is_loopback());
    if !local && caller?.0.role != crate::config::Role::Admin {
        let message = "metrics are for administrators".to_owned();
        return Err(Problem::forbidden(Box::new(Refusal { what: "read", object: "/metrics".to_owned(), message })));
    }
    app.db.refresh_metrics();
    let text = app.exposition.openmetrics().map_err(|_| Problem::internal("the metrics could not be written"))?;
    let content_type = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}

async fn sql_get(
    State(app): State<App>,
    Caller(who): Caller,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let format = Format::accepted(&headers)?;
    execute(&app, &who, request::sql_from_query(&uri)?, format).await
}

async fn sql_post(
    State(app): State<App>,
    Caller(who): Caller,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    request::no_parameters(&uri)?;
    let format = Format::accepted(&headers)?;
    let key = request::idempotency_key(&headers)?;
    let media_type = media_type(&headers)?;
    let parse = match media_type.as_str() {
        "application/json" => request::sql_from_json,
        "application/sql" => request::sql_from_text,
        other => return Err(wrong_type(other, "application/json, or application/sql for raw SQL")),
    };
    let received = app.body(&headers, body).await?;
    let mut request = parse(&received.bytes)?;
    request.idempotency = key.map(|key| request::idempotency(key, &media_type, &received.bytes));
    drop(received);
    execute(&app, &who, request, format).await
}

async fn execute(app: &App, who: &Identity, request: SqlRequest, format: Format) -> Result<Response, Problem> {
    let request = SqlRequest { one_result: format.holds_one_result(), ..request };
    let started = Instant::now();
    let answer = app.db.execute(who, request).await?;
    let replayed = answer.replayed;
    let reader = denials::Reader { db: app.db.clone(), who: who.clone() };
    let mut response = results::respond(answer, format, started, Some(reader)).await;
    if replayed {
        mark_replayed(&mut response);
    }
    Ok(response)
}

/// Says that it is the answer to an earlier sending of the request.
pub(super) fn mark_replayed(response: &mut Response) {
    response.headers_mut().insert("idempotent-replayed", HeaderValue::from_static("true"));
}

/// Type and subtype in lower case; empty when there is none. What its parameters say is either so or refused.
pub(super) fn media_type(headers: &HeaderMap) -> Result<String, Problem> {
    let value = request::one_header(headers, "Content-Type")?.and_then(|value| value.to_str().ok());
    let value = value.unwrap_or_default().to_ascii_lowercase();
    let mut parts = value.split(';').map(str::trim);
    let name = parts.next().unwrap_or_default();
    let is_text = matches!(name, "application/json" | "application/sql" | "application/x-ndjson");
    for (parameter, value) in parts.filter_map(|part| part.split_once('=')) {
        match (parameter, value.trim_matches('"')) {
            ("charset", charset) if (is_text || name.starts_with("text/")) && charset != "utf-8" => {
                return Err(wrong_type(&format!("{name} in {charset}"), "text in UTF-8"));
            }
            ("header", "absent") if name == "text/csv" => {
                return Err(wrong_type("text/csv without a header", "a first line that names the columns"));
            }
            _ => {}
        }
    }
    Ok(name.to_owned())
}

pub(super) fn wrong_type(given: &str, wanted: &str) -> Problem {
    let given = if given.is_empty() { "none" } else { given };
    Problem::new(415, "unsupported_media_type", format!("the Content-Type is {given}; send {wanted}"))
}

async fn live_bytes(app: &App, headers: &HeaderMap, body: Body) -> Result<Received, Problem> {
    match media_type(headers)?.as_str() {
        "application/json" => app.body(headers, body).await,
        other => Err(wrong_type(other, "application/json")),
    }
}

async fn live_get(
    State(app): State<App>,
    caller: Result<Caller, Problem>,
    peer: Option<axum::Extension<Peer>>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    // Who asks comes first: without identity nothing of the request is looked at but the ticket.
    if caller.is_err() && !has_ticket(&uri) {
        return caller.map(|_| Response::default());
    }
    let query = request::live_from_query(&uri)?;
    let position = last_event_id(&headers)?.or(query.last_event_id);
    let Some(ticket) = query.ticket else {
        let asked = query.request.ok_or_else(|| Problem::bad_request("the query parameter `sql` is missing"))?;
        return subscribe(&app, caller?.0, peer, Asked { position, ..asked }, None).await;
    };
    let redeemed = app.tickets.redeem(&ticket, query.request.as_ref())?;
    let asked = Asked { position, ..redeemed.request.clone() };
    let address = peer.as_ref().map(|peer| peer.address.ip().to_canonical());
    let who = Identity { address, ..redeemed.who.clone() };
    subscribe(&app, who, peer, asked, Some(&redeemed)).await
}

fn has_ticket(uri: &Uri) -> bool {
    let has = || request::pairs(uri).is_ok_and(|pairs| pairs.iter().any(|(name, _)| name == "ticket"));
    uri.path() == LIVE && has()
}

/// HEAD is no way to look at a stream: it would open it, and with a ticket end the connection that has it.
async fn not_live(method: Method) -> Problem {
    Problem::not_allowed(&method, LIVE, HeaderValue::from_static("GET,POST"), None)
}

async fn live_post(
    State(app): State<App>,
    Caller(who): Caller,
    peer: Option<axum::Extension<Peer>>,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    request::no_parameters(&uri)?;
    let mut asked = request::live_from_json(&live_bytes(&app, &headers, body).await?.bytes)?;
    asked.position = last_event_id(&headers)?.or(asked.position);
    subscribe(&app, who, peer, asked, None).await
}

/// An empty one is what EventSource sends when it has none.
fn last_event_id(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = request::one_header(headers, "Last-Event-ID")? else { return Ok(None) };
    let text = value.to_str().map_err(|_| Problem::bad_request("the header Last-Event-ID is not an event id"))?;
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

async fn subscribe(
    app: &App,
    who: Identity,
    peer: Option<axum::Extension<Peer>>,
    asked: Asked,
    ticket: Option<&super::tickets::Redeemed>,
) -> Result<Response, Problem> {
    let address = peer.as_ref().map(|peer| peer.address.ip().to_canonical());
    // Counted before anything is opened: what is turned away has cost nothing.
    let counted = match ticket.and_then(|redeemed| app.tickets.counted(redeemed)) {
        Some(counted) => Ok(counted),
        None => app.limits.open(&who.user, address, asked.queries.len()).map(Arc::new),
    };
    let opened = match counted {
        Ok(counted) => open(app, &who, &asked).await.map(|streams| (counted, streams)),
        Err(problem) => Err(problem),
    };
    let (counted, streams) = match opened {
        Ok(opened) => opened,
        Err(problem) if asked.position.is_some() && matches!(problem.status().as_u16(), 429 | 503) => {
            return Ok(stream::busy(&problem));
        }
        Err(problem) => return Err(problem),
    };
    let subscriber = Subscriber {
        streams,
        heartbeat: app.heartbeat,
        draining: app.draining.clone(),
        ticket: ticket.map(|redeemed| app.tickets.open(redeemed, &counted)).transpose()?,
        metrics: app.metrics.clone(),
        open: app.streams.token(),
        counted,
    };
    Ok(stream::respond(subscriber, peer.and_then(|peer| peer.0.handover)))
}

/// All queries of a stream or none.
async fn open(app: &App, who: &Identity, asked: &Asked) -> Result<Streams, Problem> {
    if app.draining.is_cancelled() {
        return Err(crate::db::DbError::Closed.into());
    }
    let mut streams = Vec::new();
    for (at, request) in asked.placed()?.into_iter().enumerate() {
        let position = request.position.clone();
        let stream = app.db.subscribe(who, request).await.map_err(Problem::from);
        let stream = match &asked.names {
            None => return stream.map(Streams::one),
            Some(_) => stream.map_err(|problem| problem.within(&format!("queries[{at}]")))?,
        };
        streams.push((stream, position));
    }
    let names = asked.names.iter().flatten().cloned();
    Ok(Streams::several(
        streams.into_iter().zip(names).map(|((stream, position), name)| (stream, name, position)).collect(),
    ))
}

async fn ticket(
    State(app): State<App>,
    Caller(who): Caller,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    request::no_parameters(&uri)?;
    let received = live_bytes(&app, &headers, body).await?;
    let request = request::live_from_json(&received.bytes)?;
    let (ticket, written) = app.tickets.issue(&app.auth, who.clone(), request, &received.bytes)?;
    if let Some(written) = written {
        written.await.map_err(|_| Problem::internal("the ticket could not be written down"))?;
    }
    app.db.audit(&who, "ticket", "issue", "");
    let answer = json!({"ticket": ticket, "expires_in_ms": app.tickets.ttl().as_millis() as u64});
    let no_store = [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    Ok((StatusCode::OK, no_store, Json(answer)).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_types() {
        for (given, expect) in [
            ("application/json", "application/json"),
            ("Application/JSON; charset=utf-8", "application/json"),
            ("application/sql", "application/sql"),
        ] {
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_str(given).unwrap())]);
            assert_eq!(media_type(&headers).unwrap(), expect);
        }
        assert_eq!(media_type(&HeaderMap::new()).unwrap(), "");
    }

    #[test]
    fn an_empty_event_id_is_none() {
        let header = |value: &'static str| {
            HeaderMap::from_iter([("last-event-id".parse().unwrap(), HeaderValue::from_static(value))])
        };
        assert_eq!(last_event_id(&HeaderMap::new()).unwrap(), None);
        assert_eq!(last_event_id(&header("")).unwrap(), None);
        assert_eq!(last_event_id(&header("a-1-b")).unwrap(), Some("a-1-b".to_owned()));
    }
}
