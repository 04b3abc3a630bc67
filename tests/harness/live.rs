//! A subscription, as an EventSource would hold it.

use std::pin::Pin;
use std::time::Duration;

use futures::{Stream, StreamExt};
use reqwest::{RequestBuilder, Response, Url, header};
use serde_json::Value;
use sse_stream::{Error, Sse, SseByteStream};

use crate::PATIENCE;
use crate::client::Client;
use crate::fold::Fold;

/// What to subscribe to.
#[derive(Clone, Debug, Default)]
pub struct LiveQuery {
    /// None: it is among the options.
    sql: Option<String>,
    /// All of the URL's parameters but `sql`, in order.
    options: Vec<(String, String)>,
}

impl LiveQuery {
    pub fn new(sql: impl Into<String>) -> Self {
        LiveQuery { sql: Some(sql.into()), options: Vec::new() }
    }

    /// Several on one stream: a list of what a single one has in its body.
    pub fn several(queries: &Value) -> Self {
        LiveQuery::default().option("queries", &queries.to_string())
    }

    /// One more stage of the pipeline, such as `late:{"minutes":15}`.
    pub fn plugin(self, stage: &str) -> Self {
        self.option("plugin", stage)
    }

    pub fn params(self, params: &Value) -> Self {
        self.option("params", &params.to_string())
    }

    pub fn option(mut self, name: &str, value: &str) -> Self {
        self.options.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn request(&self, client: &Client, last_id: Option<&str>) -> RequestBuilder {
        let mut url = Url::parse("http://any/v1/live").expect("a URL");
        let sql = self.sql.iter().map(|sql| ("sql", sql));
        url.query_pairs_mut().extend_pairs(sql).extend_pairs(&self.options);
        let path = format!("{}?{}", url.path(), url.query().unwrap_or_default());
        let request = client.get(&path).header(header::ACCEPT, "text/event-stream");
        match last_id {
            Some(id) => request.header("Last-Event-ID", id),
            None => request,
        }
    }
}

impl From<&str> for LiveQuery {
    fn from(sql: &str) -> Self {
        LiveQuery::new(sql)
    }
}

impl From<String> for LiveQuery {
    fn from(sql: String) -> Self {
        LiveQuery::new(sql)
    }
}

/// One event with a name. Comments and `retry` are not events.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub name: String,
    pub id: Option<String>,
    pub data: Value,
}

type Events = Pin<Box<dyn Stream<Item = Result<Sse, Error>> + Send>>;

/// An open subscription with the fold of what it has read.
pub struct Live {
    client: Client,
    query: LiveQuery,
    /// None: disconnected.
    events: Option<Events>,
    pub fold: Fold,
    /// How long the client is to wait before it reconnects, as the server says.
    pub retry: Option<u64>,
}

impl Live {
    pub(crate) async fn open(client: Client, query: LiveQuery) -> Self {
        let mut live = Live { client, query, events: None, fold: Fold::default(), retry: None };
        live.reconnect().await;
        live
    }

    /// Of a response to any request that opens a stream.
    pub(crate) fn of(client: Client, response: Response) -> Self {
        let query = LiveQuery::default();
        let mut live = Live { client, query, events: None, fold: Fold::default(), retry: None };
        live.attach(response);
        live
    }

    /// Connects (again) with the last id; anything but a stream fails the test.
    pub async fn reconnect(&mut self) {
        let response = self.try_reconnect().await.expect("the server answers");
        let status = response.status();
        if status != 200 {
            panic!("{:?} was answered {status}: {}", self.query, response.text().await.unwrap_or_default());
        }
        let content_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        assert!(content_type.is_some_and(|text| text.starts_with("text/event-stream")), "{content_type:?}");
        self.attach(response);
    }

    /// Connects (again) with the last id and returns the answer, whatever it is. See [`Live::attach`].
    pub async fn try_reconnect(&mut self) -> reqwest::Result<Response> {
        self.events = None;
        self.fold.lost();
        let request = self.query.request(&self.client, self.fold.last_id.as_deref());
        // The bound is for the head only: the body has no end.
        match tokio::time::timeout(PATIENCE, request.send()).await {
            Ok(response) => response,
            Err(_) => panic!("no answer to {:?} within {PATIENCE:?}", self.query),
        }
    }

    pub fn attach(&mut self, response: Response) {
        self.events = Some(Box::pin(SseByteStream::new(response.bytes_stream())));
    }

    pub fn disconnect(&mut self) {
        self.events = None;
    }

    pub fn connected(&self) -> bool {
        self.events.is_some()
    }

    /// The next event, folded. None: the stream has ended or broke. A wait of [`PATIENCE`] or an event that cannot
    /// be fails the test.
    pub async fn next_or_end(&mut self) -> Option<Event> {
        let event = match self.read(PATIENCE).await {
            Some(event) => event?,
            None => panic!("no event within {PATIENCE:?} on {:?}; held: {:?}", self.query, self.fold),
        };
        if let Err(fault) = self.fold.apply(&event) {
            panic!("{fault}\non {:?}", self.query);
        }
        Some(event)
    }

    /// The next event, folded; the stream has to go on.
    pub async fn next_event(&mut self) -> Event {
        match self.next_or_end().await {
            Some(event) => event,
            None => panic!("the stream of {:?} ended", self.query),
        }
    }

    /// The next event that is not a sign of life.
    pub async fn next_change(&mut self) -> Event {
        loop {
            let event = self.next_event().await;
            if event.name != "uptodate" {
                return event;
            }
        }
    }

    /// The next event, not folded, if one comes in time. `Some(None)`: the stream has ended or broke.
    pub async fn read(&mut self, patience: Duration) -> Option<Option<Event>> {
        let events = self.events.as_mut().expect("a connected subscription");
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let event = match tokio::time::timeout_at(deadline, events.next()).await.ok()? {
                Some(Ok(event)) => event,
                Some(Err(_)) | None => {
                    self.events = None;
                    return Some(None);
                }
            };
            self.retry = event.retry.or(self.retry);
            let Some(name) = event.event else { continue };
            assert!(name != "open" && name != "error", "{name} is EventSource's own name");
            let data = event.data.unwrap_or_default();
            let data =
                serde_json::from_str(&data).unwrap_or_else(|error| panic!("{error} in the data of {name}: {data}"));
            return Some(Some(Event { name, id: event.id, data }));
        }
    }

    /// Reads up to the next `uptodate`; the events before it.
    pub async fn until_uptodate(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        loop {
            let event = self.next_event().await;
            if event.name == "uptodate" {
                return events;
            }
            events.push(event);
        }
    }

    /// Reads until everything up to the commit `seq` has passed: an `uptodate` at or behind it. The events before it.
    pub async fn until_seq(&mut self, seq: u64) -> Vec<Event> {
        let mut events = Vec::new();
        loop {
            let event = self.next_event().await;
            if event.name != "uptodate" {
                events.push(event);
            } else if event.data["seq"].as_u64().is_some_and(|reached| reached >= seq) {
                return events;
            }
        }
    }
}

/// The seq of an answer to SQL.
pub fn seq(answer: &Value) -> u64 {
    answer["seq"].as_u64().unwrap_or_else(|| panic!("no seq in {answer}"))
}
