//! Errors to answers: the one place that decides status, code and what a client is told (RFC 9457 problem documents).
//!
//! Five kinds are kept apart: the client's mistake (400 to 422, told in full), a limit (413, 429, 503 with
//! `Retry-After`), the plugin's fault (422), a failing disk (507, 503), our own bug (500: logged once with its
//! details, which the client does not see).

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::json::document;
use crate::db::DbError;
use crate::plugins::PluginError;
use crate::sql::{Refusal, SqlError};
use crate::store::{CommitError, StoreError};

/// A problem document and its status.
#[derive(Debug)]
pub struct Problem {
    status: StatusCode,
    code: &'static str,
    detail: String,
    /// Members of this problem alone, such as `position`.
    extra: Vec<(&'static str, Value)>,
    /// A header of this problem alone, such as Retry-After.
    header: Option<Box<(HeaderName, HeaderValue)>>,
    /// What was refused, for the audit log. It goes with the response, to whoever knows who asked.
    refusal: Option<Box<Refusal>>,
}

impl Problem {
    pub fn new(status: u16, code: &'static str, detail: impl Into<String>) -> Problem {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Problem { status, code, detail: detail.into(), extra: Vec::new(), header: None, refusal: None }
    }

    pub fn forbidden(refusal: Box<Refusal>) -> Problem {
        let problem = Problem::new(403, "forbidden", refusal.message.clone());
        Problem { refusal: Some(refusal), ..problem }
    }

    pub fn bad_request(detail: impl Into<String>) -> Problem {
        Problem::new(400, "bad_request", detail)
    }

    /// `allow` lists the methods that there are, as the header of that name does. `hint`: what to do.
    pub fn not_allowed(method: &Method, path: &str, allow: HeaderValue, hint: Option<&str>) -> Problem {
        let methods: Vec<&str> = allow.to_str().unwrap_or_default().split(',').map(str::trim).collect();
        let hint = hint.map_or_else(String::new, |hint| format!("; {hint}"));
        let detail = format!("{method} is not possible at {path}; possible are {}{hint}", methods.join(", "));
        Problem::new(405, "method_not_allowed", detail).header(header::ALLOW, allow)
    }

    /// In the contract, but not in this build.
    pub fn not_implemented(what: &str) -> Problem {
        Problem::new(501, "not_implemented", format!("{what} is not built yet in this version of Tidegate"))
    }

    /// For our own bugs; the details are logged where this is made.
    pub fn internal(detail: impl Into<String>) -> Problem {
        Problem::new(500, "internal", detail)
    }

    /// Says first which part of the request it is about.
    pub fn within(mut self, part: &str) -> Problem {
        self.detail = format!("{part}: {}", self.detail);
        self
    }

    /// Says last what to do about it.
    pub fn hinting(mut self, hint: &str) -> Problem {
        self.detail = format!("{}; {hint}", self.detail);
        self
    }

    pub fn with(mut self, name: &'static str, value: Value) -> Problem {
        self.extra.push((name, value));
        self
    }

    pub fn retry_after(self, seconds: u32) -> Problem {
        self.header(header::RETRY_AFTER, HeaderValue::from(seconds))
    }

    fn header(self, name: HeaderName, value: HeaderValue) -> Problem {
        Problem { header: Some(Box::new((name, value))), ..self }
    }

    pub fn status(&self) -> StatusCode {
        self.status
    }

    pub fn refusal(&self) -> Option<&Refusal> {
        self.refusal.as_deref()
    }

    pub fn code(&self) -> &'static str {
        self.code
    }

    /// The document.
    pub fn body(&self) -> Value {
        let mut body = json!({
            "type": format!("urn:tidegate:problem:{}", self.code),
            "title": self.status.canonical_reason().unwrap_or("Error"),
            "status": self.status.as_u16(),
            "detail": self.detail,
            "code": self.code,
        });
        for (name, value) in &self.extra {
            body[*name] = value.clone();
        }
        body
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(document(&self.body())));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(header) = self.header {
            let (name, value) = *header;
            headers.insert(name, value);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"tidegate\""));
        }
        if let Some(refusal) = self.refusal {
            response.extensions_mut().insert(*refusal);
        }
        response
    }
}

impl From<DbError> for Problem {
    fn from(error: DbError) -> Problem {
        match error {
            DbError::Sql(error) => error.into(),
            DbError::Conflict => Problem::new(409, "conflict", error.to_string()),
            DbError::Commit(error) => error.into(),
            DbError::Store(error) => error.into(),
            DbError::Plugin(error) => error.into(),
            DbError::Stage { error, .. } => (*error).into(),
            DbError::NotFound(detail) => Problem::new(404, "not_found", detail),
            DbError::SeveralResults(_) => Problem::new(406, "several_results", error.to_string()),
            DbError::BadRequest(detail) => Problem::bad_request(detail),
            DbError::Forbidden(refusal) => Problem::forbidden(refusal),
            DbError::Gone(detail) => Problem::new(410, "killed", detail),
            DbError::TooMany(detail) => Problem::new(429, "too_many", detail).retry_after(5),
            DbError::Busy(detail) => Problem::new(503, "busy", detail).retry_after(5),
            DbError::KeyReused => Problem::new(422, "idempotency_key_reused", error.to_string()),
            DbError::KeyInUse => Problem::new(409, "idempotency_key_in_use", error.to_string()).retry_after(1),
            DbError::InUse(detail) => Problem::new(409, "in_use", detail),
            DbError::Internal(_) => server_fault(&error.to_string()),
            DbError::Closed => Problem::new(503, "closing", error.to_string()).retry_after(2),
        }
    }
}

impl From<SqlError> for Problem {
    fn from(error: SqlError) -> Problem {
        let detail = error.to_string();
        match error {
            SqlError::Invalid { code, position, .. } => Problem::new(400, code, detail).at(position),
            SqlError::Unsupported { position, .. } => Problem::new(400, "unsupported", detail).at(position),
            SqlError::Constraint { code: "duplicate_key", .. } => Problem::new(409, "duplicate_key", detail),
            SqlError::Constraint { code, .. } => Problem::new(400, code, detail),
            SqlError::Forbidden(refusal) => Problem::forbidden(refusal),
            SqlError::Limit(_) => Problem::new(400, "limit", detail),
            SqlError::Busy(_) => Problem::new(503, "busy", detail).retry_after(1),
            SqlError::Deadline(_) => Problem::new(504, "deadline", detail),
            SqlError::Store(error) => error.into(),
            SqlError::Internal(_) => server_fault(&detail),
        }
    }
}

impl From<CommitError> for Problem {
    fn from(error: CommitError) -> Problem {
        let detail = error.to_string();
        match error {
            CommitError::Stale => Problem::new(409, "conflict", detail),
            CommitError::TooLarge { .. } => Problem::new(413, "commit_too_large", detail),
            CommitError::Busy => Problem::new(503, "busy", detail).retry_after(1),
            CommitError::Invalid(_) => server_fault(&detail),
            CommitError::Store(error) => error.into(),
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Problem {
        let detail = error.to_string();
        match error {
            StoreError::DiskFull => Problem::new(507, "disk_full", detail),
            StoreError::Failed(_) => {
                tracing::error!(error = %detail, "the store takes no writes");
                let told = "the store failed and takes no writes until the server is restarted; its log says why";
                Problem::new(503, "store_failed", told).retry_after(30)
            }
            StoreError::Expired { .. } => Problem::new(410, "expired", detail),
            StoreError::Open { .. } | StoreError::Locked(_) | StoreError::Corrupt(_) | StoreError::Io(_) => {
                server_fault(&detail)
            }
        }
    }
}

impl From<PluginError> for Problem {
    fn from(error: PluginError) -> Problem {
        let detail = error.to_string();
        match error {
            PluginError::Refused(_) => Problem::new(422, "plugin_refused", detail),
            PluginError::Params(_) => Problem::new(400, "plugin_params", detail),
            PluginError::Unsupported(_) => Problem::new(400, "unsupported", detail),
            PluginError::Fault { plugin, cause, .. } => Problem::new(422, "plugin_failed", detail)
                .with("plugin", json!(plugin))
                .with("cause", json!(cause.as_str())),
            PluginError::Resting { plugin, rest, .. } => Problem::new(503, "plugin_resting", detail)
                .with("plugin", json!(plugin))
                .retry_after(u32::try_from(rest.as_secs()).unwrap_or(u32::MAX).max(1)),
            PluginError::Host(_) => server_fault(&detail),
        }
    }
}

impl Problem {
    fn at(self, position: Option<usize>) -> Problem {
        match position {
            Some(position) => self.with("position", json!(position)),
            None => self,
        }
    }
}

/// Our own fault: the details are for the log, once, here.
fn server_fault(detail: &str) -> Problem {
    tracing::error!(error = %detail, "a request failed on the server's side");
    Problem::internal("the server failed at this request; its log has the details")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(error: DbError, status: u16, code: &str) -> Problem {
        let problem = Problem::from(error);
        assert_eq!((problem.status.as_u16(), problem.code), (status, code), "{problem:?}");
        problem
    }

    #[test]
    fn every_kind_has_its_status() {
        let invalid = SqlError::Invalid { code: "syntax", message: "no".to_owned(), position: Some(7) };
        let problem = check(invalid.into(), 400, "syntax");
        assert_eq!(problem.body()["position"], 7);
        let duplicate = SqlError::Constraint { code: "duplicate_key", message: "twice".to_owned() };
        check(duplicate.into(), 409, "duplicate_key");
        let null = SqlError::Constraint { code: "not_null", message: "null".to_owned() };
        check(null.into(), 400, "not_null");
        check(SqlError::Deadline(std::time::Duration::from_secs(5)).into(), 504, "deadline");
        check(DbError::Commit(CommitError::TooLarge { size: 2, limit: 1 }), 413, "commit_too_large");
        check(DbError::Commit(CommitError::Busy), 503, "busy");
        check(SqlError::Busy("too much".to_owned()).into(), 503, "busy");
        check(DbError::Conflict, 409, "conflict");
        check(DbError::KeyInUse, 409, "idempotency_key_in_use");
        check(DbError::KeyReused, 422, "idempotency_key_reused");
        check(StoreError::DiskFull.into(), 507, "disk_full");
        check(PluginError::Refused("too large".to_owned()).into(), 422, "plugin_refused");
        check(PluginError::Params("minutes".to_owned()).into(), 400, "plugin_params");
        check(DbError::TooMany("streams".to_owned()), 429, "too_many");
        check(DbError::Closed, 503, "closing");
        let refusal = Refusal { what: "write", object: "main.t".to_owned(), message: "no".to_owned() };
        let problem = check(DbError::Forbidden(Box::new(refusal.clone())), 403, "forbidden");
        assert_eq!(problem.within("queries[0]").into_response().extensions().get(), Some(&refusal));
    }

    #[test]
    fn server_faults_are_not_explained_to_clients() {
        let problem = check(StoreError::Corrupt("block 17 of /secret/path".to_owned()).into(), 500, "internal");
        assert!(!problem.body().to_string().contains("secret"));
    }

    #[test]
    fn what_is_possible_instead_is_named() {
        let allow = HeaderValue::from_static("GET,HEAD");
        let problem = Problem::not_allowed(&Method::PUT, "/v1/plugins", allow.clone(), Some("say so"));
        assert_eq!(problem.detail, "PUT is not possible at /v1/plugins; possible are GET, HEAD; say so");
        let response = problem.into_response();
        assert_eq!((response.status().as_u16(), &response.headers()[header::ALLOW]), (405, &allow));
    }

    #[test]
    fn headers_of_problems() {
        let response = Problem::from(DbError::Closed).into_response();
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
        let response = Problem::new(401, "unauthorized", "").into_response();
        assert!(response.headers().contains_key(header::WWW_AUTHENTICATE));
    }
}
