//! The command line's side of HTTP: one connection a call, plain HTTP, answers whole or as they come.

use std::fmt;

use axum::body::Bytes;
pub use axum::http::Method;
use axum::http::{Request, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Where a server is and who asks.
#[derive(Clone)]
pub struct Client {
    authority: String,
    token: Option<String>,
}

/// An answer: the status, and the body whole.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Bytes,
}

impl Answer {
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// What went wrong before there was an answer.
#[derive(Debug)]
pub struct ClientError(String);

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Client {
    /// `url`: `http://host:port`.
    pub fn new(url: &str, token: Option<String>) -> Result<Client, ClientError> {
        let wrong = |why: &str| ClientError(format!("{url:?} {why}; a server's address is like http://127.0.0.1:8433"));
        let uri: Uri = url.parse().map_err(|_| wrong("is no URL"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => return Err(wrong("is https, which this command does not speak")),
            _ => return Err(wrong("does not begin with http://")),
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(wrong("has a path"));
        }
        let host = uri.host().ok_or_else(|| wrong("names no host"))?;
        let authority = format!("{host}:{}", uri.port_u16().unwrap_or(80));
        Ok(Client { authority, token })
    }

    pub async fn call(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: Vec<u8>,
    ) -> Result<Answer, ClientError> {
        let (status, body) = self.open(method, path, content_type, body).await?;
        let body = body.collect().await.map_err(|error| self.lost(&error))?.to_bytes();
        Ok(Answer { status, body })
    }

    /// The status, and a body that comes in pieces ([`next_piece`]).
    pub async fn open(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: Vec<u8>,
    ) -> Result<(u16, Incoming), ClientError> {
        let stream = TcpStream::connect(&self.authority).await.map_err(|error| {
            ClientError(format!("no server answers at {} ({error}); start one with `tidegate serve`", self.authority))
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.lost(&error))?;
        // Ends with the answer, whose body it carries; what goes wrong is seen there.
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, &self.authority);
        if !content_type.is_empty() {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(|error| ClientError(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(|error| self.lost(&error))?;
        Ok((response.status().as_u16(), response.into_body()))
    }

    fn lost(&self, error: &dyn fmt::Display) -> ClientError {
        ClientError(format!("the connection to {} broke: {error}", self.authority))
    }
}

/// The next bytes of a body; `None` at its end.
pub async fn next_piece(body: &mut Incoming) -> Result<Option<Bytes>, ClientError> {
    loop {
        match body.frame().await {
            None => return Ok(None),
            Some(Err(error)) => return Err(ClientError(format!("the stream broke: {error}"))),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

/// A value as one part of a path or query.
pub fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_before_anything_is_sent() {
        for (url, why) in [
            ("127.0.0.1:8433", "http://"),
            ("https://x", "https"),
            ("http://x/y", "has a path"),
            ("http://", "URL"),
            ("", "URL"),
        ] {
            let error = Client::new(url, None).err().unwrap_or_else(|| panic!("{url} is taken")).to_string();
            assert!(error.contains(why), "{url}: {error}");
        }
        assert_eq!(Client::new("http://localhost:99/", None).ok().unwrap().authority, "localhost:99");
        assert_eq!(encode("a b&c=ü/'"), "a%20b%26c%3D%C3%BC%2F%27");
    }
}
