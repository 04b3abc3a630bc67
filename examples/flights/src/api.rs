//! Three calls of the HTTP interface: SQL, plugin upload, live query.

use reqwest::{Client, RequestBuilder, Response, Url, header};
use serde_json::{Value, json};

use crate::Result;

#[derive(Clone)]
pub struct Api {
    client: Client,
    base: Url,
}

/// One statement with its own parameters, `$1` and up.
pub struct Statement {
    pub sql: String,
    pub params: Vec<Value>,
}

impl Api {
    pub fn new(url: &str, token: &str) -> Result<Self> {
        let mut bearer = header::HeaderValue::from_str(&format!("Bearer {token}"))
            .map_err(|_| "TIDEGATE_ADMIN_TOKEN has characters that no header can carry")?;
        bearer.set_sensitive(true);
        let headers = header::HeaderMap::from_iter([(header::AUTHORIZATION, bearer)]);
        // The server is on this machine: a proxy from the environment would only be in the way.
        let client = Client::builder().default_headers(headers).no_proxy().build()?;
        Ok(Api { client, base: Url::parse(url)? })
    }

    pub async fn sql(&self, sql: &str, params: Vec<Value>) -> Result<Value> {
        let request = self.client.post(self.base.join("/v1/sql")?).json(&json!({"sql": sql, "params": params}));
        Ok(send(request).await?.json().await?)
    }

    /// The rows of a SELECT.
    pub async fn rows(&self, sql: &str) -> Result<Vec<Vec<Value>>> {
        let mut answer = self.sql(sql, Vec::new()).await?;
        let rows = answer["results"][0]["rows"].take();
        serde_json::from_value(rows).map_err(|error| format!("no rows in the answer to {sql:?}: {error}").into())
    }

    /// The one number of a SELECT count(*).
    pub async fn count(&self, sql: &str) -> Result<i64> {
        let rows = self.rows(sql).await?;
        let number = rows.first().and_then(|row| row.first()).and_then(Value::as_i64);
        number.ok_or_else(|| format!("no number in the answer to {sql:?}").into())
    }

    /// Several statements as one request: one transaction, one commit. Their parameters are numbered through.
    pub async fn transaction(&self, statements: &[Statement]) -> Result<()> {
        let (mut texts, mut params) = (Vec::new(), Vec::new());
        for statement in statements {
            texts.push(renumber(&statement.sql, params.len()));
            params.extend(statement.params.iter().cloned());
        }
        self.sql(&texts.join(";\n"), params).await.map(drop)
    }

    /// Uploads a module; returns what it is, for people.
    pub async fn put_plugin(&self, name: &str, module: Vec<u8>) -> Result<String> {
        let url = self.base.join(&format!("/v1/plugins/{name}"))?;
        let request = self.client.put(url).header(header::CONTENT_TYPE, "application/wasm").body(module);
        let answer: Value = send(request).await?.json().await?;
        let kind = answer["kinds"][0].as_str().unwrap_or("?").replace('_', " ");
        Ok(format!("{name} version {}, a {kind}, {} bytes", answer["version"], answer["size"]))
    }

    /// Opens a live query; the body is its event stream.
    pub async fn live(&self, sql: &str, pipeline: &[String]) -> Result<Response> {
        let mut url = self.base.join("/v1/live")?;
        url.query_pairs_mut().append_pair("sql", sql).extend_pairs(pipeline.iter().map(|stage| ("plugin", stage)));
        send(self.client.get(url).header(header::ACCEPT, "text/event-stream")).await
    }
}

/// Sends; an error status becomes an error with what the server said.
async fn send(request: RequestBuilder) -> Result<Response> {
    let response = request.send().await?;
    if response.status().is_success() {
        return Ok(response);
    }
    let (status, place) = (response.status(), response.url().path().to_owned());
    let body = response.text().await?;
    let detail = match serde_json::from_str::<Value>(&body) {
        Ok(problem) => problem["detail"].as_str().unwrap_or(&body).to_owned(),
        Err(_) => body,
    };
    Err(format!("{place} answered {status}: {detail}").into())
}

/// Moves `$1`, `$2`, … up by `by`. The statements of this program have no `$` elsewhere.
fn renumber(sql: &str, by: usize) -> String {
    let mut parts = sql.split('$');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let digits = part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let number = part[..digits].parse::<usize>().map_or(0, |number| number + by);
        out.push_str(&format!("${number}{}", &part[digits..]));
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn parameters_are_numbered_through() {
        assert_eq!(super::renumber("UPDATE t SET a = $1 WHERE b = $12", 3), "UPDATE t SET a = $4 WHERE b = $15");
        assert_eq!(super::renumber("DELETE FROM t", 3), "DELETE FROM t");
    }
}
