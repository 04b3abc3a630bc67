//! Bytes on a socket, for what no client library would send.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::client::Client;

/// What came back until the server ended the connection.
#[derive(Debug)]
pub struct Answer {
    pub text: String,
    pub took: Duration,
}

impl Answer {
    /// The statuses of the answers, in order.
    pub fn statuses(&self) -> Vec<u16> {
        // An answer follows the body of the one before, which need not end in a line break.
        let answers = self.text.split("HTTP/1.").skip(1);
        answers.filter_map(|answer| answer.split(' ').nth(1)?.parse().ok()).collect()
    }
}

/// Where the client's server is.
pub fn address(client: &Client) -> SocketAddr {
    client.url("").trim_start_matches("http://").parse().expect("an address")
}

/// Sends the bytes on a connection of its own and reads until the server ends it, which it has to within `patience`.
pub async fn exchange(client: &Client, bytes: &[u8], patience: Duration) -> Answer {
    let start = Instant::now();
    let mut stream = TcpStream::connect(address(client)).await.expect("a connection");
    // An error is a server that has seen enough: what it said stands in what is read.
    let _ = stream.write_all(bytes).await;
    let received = read_to_end(&mut stream, patience).await;
    Answer { text: String::from_utf8_lossy(&received).into_owned(), took: start.elapsed() }
}

/// All bytes until the server ends the connection.
pub async fn read_to_end(stream: &mut (impl AsyncReadExt + Unpin), patience: Duration) -> Vec<u8> {
    let mut received = Vec::new();
    let reading = async {
        let mut buffer = [0; 16 * 1024];
        // A reset is an end as well.
        while let Ok(len @ 1..) = stream.read(&mut buffer).await {
            received.extend_from_slice(&buffer[..len]);
        }
    };
    let ended = tokio::time::timeout(patience, reading).await.is_ok();
    assert!(ended, "the server did not end the connection; so far: {}", String::from_utf8_lossy(&received));
    received
}
