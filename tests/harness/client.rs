//! One user's HTTP calls.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response, StatusCode, header};
use serde_json::{Value, json};

use crate::PATIENCE;
use crate::live::{Live, LiveQuery};

/// Cheap to clone; follows the server over restarts.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    url: Arc<RwLock<String>>,
    token: Option<String>,
}

/// A call that was not answered with a 2xx.
#[derive(Debug)]
pub struct Failure {
    /// None: no answer at all.
    pub status: Option<u16>,
    /// The problem document, or what else there is to say.
    pub body: Value,
}

impl Client {
    pub(crate) fn new(http: reqwest::Client, url: Arc<RwLock<String>>, token: Option<String>) -> Self {
        Client { http, url, token }
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.url.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A request with this user's token, for tests that need all of it.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, self.url(path));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    pub fn get(&self, path: &str) -> RequestBuilder {
        self.request(Method::GET, path)
    }

    /// Runs SQL; anything but a 2xx fails the test.
    pub async fn sql(&self, sql: &str) -> Value {
        self.sql_params(sql, json!([])).await
    }

    pub async fn sql_params(&self, sql: &str, params: Value) -> Value {
        self.try_sql(sql, params).await.unwrap_or_else(|failure| panic!("{sql}\n{failure:?}"))
    }

    pub async fn try_sql(&self, sql: &str, params: Value) -> Result<Value, Failure> {
        answer(self.request(Method::POST, "/v1/sql").json(&json!({"sql": sql, "params": params}))).await
    }

    /// The rows of the only result, as arrays.
    pub async fn rows(&self, sql: &str) -> Value {
        self.sql(sql).await["results"][0]["rows"].take()
    }

    /// The rows of the only result, as objects.
    pub async fn objects(&self, sql: &str) -> Vec<Value> {
        objects(&self.sql(sql).await["results"][0])
    }

    /// Runs SQL that has to be refused with this status and code; returns the problem document.
    pub async fn expect_error(&self, sql: &str, status: u16, code: &str) -> Value {
        let request = self.request(Method::POST, "/v1/sql").json(&json!({"sql": sql}));
        expect_problem(request, status, code).await
    }

    pub async fn put_plugin(&self, name: &str, module: Vec<u8>) -> Value {
        self.try_put_plugin(name, module).await.unwrap_or_else(|failure| panic!("plugin {name}: {failure:?}"))
    }

    pub async fn try_put_plugin(&self, name: &str, module: Vec<u8>) -> Result<Value, Failure> {
        answer(self.put_plugin_request(name, module)).await
    }

    pub fn put_plugin_request(&self, name: &str, module: Vec<u8>) -> RequestBuilder {
        let request = self.request(Method::PUT, &format!("/v1/plugins/{name}"));
        request.header(header::CONTENT_TYPE, "application/wasm").body(module)
    }

    /// Subscribes; anything but a 200 fails the test.
    pub async fn live(&self, query: impl Into<LiveQuery>) -> Live {
        Live::open(self.clone(), query.into()).await
    }

    /// The stream of a response; it cannot be opened again.
    pub fn attached(&self, response: Response) -> Live {
        assert_eq!(response.status(), 200);
        Live::of(self.clone(), response)
    }

    /// A subscription that has to be refused.
    pub async fn expect_no_live(&self, query: impl Into<LiveQuery>, status: u16, code: &str) -> Value {
        expect_problem(query.into().request(self, None), status, code).await
    }

    /// Everything that is counted.
    pub async fn metrics(&self) -> String {
        let response = self.get("/metrics").timeout(PATIENCE).send().await.expect("/metrics answers");
        response.text().await.expect("/metrics is text")
    }

    /// The value of a metric; one with labels is named with them, in their order.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = self.metrics().await;
        let mut values =
            text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok());
        values.next_back().unwrap_or_else(|| panic!("no metric {name} in\n{text}"))
    }

    /// Waits until the server takes requests, with a bound.
    pub async fn until_ready(&self) {
        let ready = async {
            while !self.get("/readyz").send().await.is_ok_and(|response| response.status() == StatusCode::OK) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, ready).await.expect("/readyz says 200");
    }
}

/// Sends a request that has to be refused, with one of the codes in `code` (`a|b`); returns the problem document after
/// looking at its form.
pub async fn expect_problem(request: RequestBuilder, status: u16, code: &str) -> Value {
    let response = request.timeout(PATIENCE).send().await.expect("an answer");
    let got = response.status().as_u16();
    let content_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let content_type = content_type.unwrap_or_default().to_owned();
    let body = response.text().await.expect("a body");
    assert_eq!(got, status, "status; body: {body}");
    assert!(content_type.starts_with("application/problem+json"), "content type {content_type}; body: {body}");
    assert!(body.ends_with("}\n"), "a document ends its line: {body}");
    let problem: Value = serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error} in {body}"));
    assert!(code.split('|').any(|code| problem["code"] == code), "code {code}; problem: {problem}");
    assert_eq!(problem["status"], status, "status in the document: {problem}");
    for field in ["type", "title", "detail"] {
        assert!(problem[field].as_str().is_some_and(|text| !text.is_empty()), "{field} is missing: {problem}");
    }
    problem
}

/// The rows of one result as objects.
pub fn objects(result: &Value) -> Vec<Value> {
    let columns: Vec<&str> =
        result["columns"].as_array().into_iter().flatten().filter_map(|c| c["name"].as_str()).collect();
    let rows = result["rows"].as_array().unwrap_or_else(|| panic!("no rows in {result}"));
    rows.iter()
        .map(|row| columns.iter().enumerate().map(|(i, name)| ((*name).to_owned(), row[i].clone())).collect())
        .collect()
}

async fn answer(request: RequestBuilder) -> Result<Value, Failure> {
    let lost = |error: reqwest::Error| Failure { status: None, body: json!(error.to_string()) };
    let response: Response = request.timeout(PATIENCE).send().await.map_err(lost)?;
    let status = response.status();
    let text = response.text().await.map_err(lost)?;
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    if status.is_success() { Ok(body) } else { Err(Failure { status: Some(status.as_u16()), body }) }
}
