//! Reads many sockets on one thread of its own, counts the events and notes how late each is. It does not parse events:
//! it looks for the mark that [`stamp`] puts into each of them.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};

use crate::measure::Latencies;

const MARK: &[u8] = b"T=";
/// Nanoseconds since 1970 until the year 2286.
const DIGITS: usize = 19;
const STAMP: usize = MARK.len() + DIGITS;

/// A mark with the present time.
pub fn stamp() -> String {
    format!("T={:0DIGITS$}", now_nanos())
}

fn now_nanos() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64
}

/// A connection that was made, and what it asks for.
type Connection = std::net::TcpStream;

pub struct Reader {
    address: Option<SocketAddr>,
    connections: mpsc::UnboundedSender<Connection>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    events: AtomicU64,
    bytes: AtomicU64,
    latencies: Mutex<Latencies>,
    arrived: Notify,
}

impl Default for Reader {
    fn default() -> Self {
        let (connections, incoming) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared::default());
        let reading = shared.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, accept(incoming, reading));
        });
        Reader { address: None, connections, shared }
    }
}

impl Reader {
    pub fn connect_to(address: SocketAddr) -> Reader {
        Reader { address: Some(address), ..Reader::default() }
    }

    /// Opens connections, each with the request; a request names its host, which is connected to unless another
    /// address was given.
    pub async fn connect(&mut self, count: usize, request: &[u8]) {
        let address = self.address.unwrap_or_else(|| host(request));
        for _ in 0..count {
            let mut stream = TcpStream::connect(address).await.expect("a connection");
            stream.write_all(request).await.expect("the request is taken");
            let stream = stream.into_std().expect("a socket");
            self.connections.send(stream).expect("the reading thread lives");
        }
    }

    pub fn events(&self) -> u64 {
        self.shared.events.load(Ordering::Acquire)
    }

    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Acquire)
    }

    /// Those noted since the last time.
    pub fn latencies(&self) -> Latencies {
        std::mem::take(&mut self.shared.latencies.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until so many events have arrived.
    pub async fn until(&self, events: u64) {
        loop {
            let arrived = self.shared.arrived.notified();
            if self.events() >= events {
                return;
            }
            arrived.await;
        }
    }
}

fn host(request: &[u8]) -> SocketAddr {
    let text = std::str::from_utf8(request).expect("requests are text");
    let host = text.lines().find_map(|line| line.strip_prefix("host: ")).expect("a host");
    host.parse().expect("an address")
}

async fn accept(mut incoming: mpsc::UnboundedReceiver<Connection>, shared: Arc<Shared>) {
    while let Some(stream) = incoming.recv().await {
        let stream = TcpStream::from_std(stream).expect("a socket that does not block");
        tokio::task::spawn_local(read(stream, shared.clone()));
    }
}

async fn read(stream: TcpStream, shared: Arc<Shared>) {
    let mut buffer = vec![0; 4096];
    let mut kept = 0;
    while stream.readable().await.is_ok() {
        let len = match stream.try_read(&mut buffer[kept..]) {
            Ok(0) => return,
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            Err(_) => return,
        };
        shared.bytes.fetch_add(len as u64, Ordering::Relaxed);
        let filled = kept + len;
        let rest = take_marks(&buffer[..filled], &shared);
        buffer.copy_within(rest..filled, 0);
        kept = filled - rest;
    }
}

/// Counts the marks; returns where something begins that may be the front of the next one.
fn take_marks(bytes: &[u8], shared: &Shared) -> usize {
    let (now, mut at, mut found) = (now_nanos(), 0, 0);
    let mut latencies = shared.latencies.lock().unwrap_or_else(PoisonError::into_inner);
    while let Some(mark) = bytes[at..].windows(MARK.len()).position(|two| two == MARK) {
        let from = at + mark;
        let Some(digits) = bytes.get(from + MARK.len()..from + STAMP) else {
            at = from;
            break;
        };
        let sent = digits.iter().fold(0u64, |sent, digit| sent * 10 + u64::from(digit - b'0'));
        latencies.add(Duration::from_nanos(now.saturating_sub(sent)));
        found += 1;
        at = from + STAMP;
    }
    drop(latencies);
    if found > 0 {
        shared.events.fetch_add(found, Ordering::AcqRel);
        shared.arrived.notify_waiters();
    }
    // Without a mark only the last byte can be part of one.
    if bytes[at..].starts_with(MARK) { at } else { at.max(bytes.len().saturating_sub(MARK.len() - 1)) }
}
