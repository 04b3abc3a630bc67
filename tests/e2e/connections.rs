//! Live streams take their connection over from the HTTP library; what else a connection is asked for stays as it is.

use tests::raw::{address, exchange};
use tests::server::ADMIN_TOKEN;
use tests::{Client, Options, PATIENCE, TestServer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// Rows of the large result, and bytes of each: more than a socket has room for.
const ROWS: usize = 4_096;
const BYTES: usize = 4_000;
/// Rows that are written as text; the others are made of them, by doubling.
const FIRST: usize = 32;

const LIVE: &str = "/v1/live?sql=SELECT%20id%20FROM%20t%20WHERE%20id%20%3C%202";

async fn table(server: &TestServer) -> Client {
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, text TEXT)").await;
    let values: Vec<String> = (0..FIRST).map(|id| format!("({id}, repeat('x', {BYTES}))")).collect();
    db.sql(&format!("INSERT INTO t VALUES {}", values.join(", "))).await;
    let mut rows = FIRST;
    while rows < ROWS {
        db.sql(&format!("INSERT INTO t SELECT id + {rows}, text FROM t")).await;
        rows *= 2;
    }
    db
}

fn request(line: &str) -> String {
    format!("{line}\r\nHost: x\r\nAuthorization: Bearer {ADMIN_TOKEN}\r\n\r\n")
}

/// Reads until the mark has come.
async fn until(stream: &mut TcpStream, mark: &str) -> String {
    let mut received = Vec::new();
    let reading = async {
        let (mut buffer, mut seen) = ([0; 16 * 1024], 0);
        while !received[seen..].windows(mark.len()).any(|window| window == mark.as_bytes()) {
            // A mark may lie across two pieces.
            seen = received.len().saturating_sub(mark.len());
            let len = stream.read(&mut buffer).await.expect("the connection holds");
            assert!(len > 0, "the server ended the connection: {}", String::from_utf8_lossy(&received));
            received.extend_from_slice(&buffer[..len]);
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("the mark comes");
    String::from_utf8(received).expect("text")
}

/// A client that does not wait for one answer before it asks for the next: the stream must not overtake what the socket
/// had no room for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_comes_behind_the_answer_before_it() {
    let server = TestServer::start().await;
    let db = table(&server).await;
    let mut stream = TcpStream::connect(address(&db)).await.expect("a connection");
    let large = request("GET /v1/sql?sql=SELECT%20*%20FROM%20t%20ORDER%20BY%20id HTTP/1.1");
    let both = format!("{large}{}", request(&format!("GET {LIVE} HTTP/1.1")));
    stream.write_all(both.as_bytes()).await.expect("both are taken");

    let text = until(&mut stream, "event: uptodate").await;
    let second = text.rfind("HTTP/1.1 200").expect("two answers");
    let (first, live) = text.split_at(second);
    assert!(first.starts_with("HTTP/1.1 200") && first.ends_with("\r\n0\r\n\r\n"), "the first answer is whole");
    assert!(first.matches("xxx").count() >= ROWS * BYTES / 3 - ROWS, "with all of its rows");
    for part in ["text/event-stream", "\r\n: hello\n", "event: start", "\"key\":{\"id\":0}", "\"key\":{\"id\":1}"] {
        assert!(live.contains(part), "{part} in {live}");
    }
    // It lives: what is written now arrives.
    db.sql("DELETE FROM t WHERE id = 1").await;
    assert!(until(&mut stream, "event: delete").await.contains("event: delete"));
}

/// The HTTP library reads the next request only when it has sent the answer to the one before, but not where that had a
/// body which its handler left alone: then the answers pile up behind a socket that is full, and the stream's request is
/// read all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_comes_behind_answers_that_are_not_sent() {
    /// Their answers are more than the sockets of both sides have room for.
    const REQUESTS: usize = 60_000;
    // Its client reads nothing for as long as the answers take.
    let options = Options { live: "stall_limit_ms = 600000".into(), ..Options::default() };
    let server = TestServer::with(options).await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, text TEXT)").await;
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4_096).expect("a small one");
    let mut stream = socket.connect(address(&db)).await.expect("a connection");
    let before = "HEAD /healthz HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx";
    let requests = format!("{}{}", before.repeat(REQUESTS), request(&format!("GET {LIVE} HTTP/1.1")));
    let asking = async {
        stream.write_all(requests.as_bytes()).await.expect("all are taken");
        while db.metric("tidegate_subscriptions").await < 1.0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.expect("the stream is opened before anything is read");

    let text = until(&mut stream, "event: uptodate").await;
    let (answers, live) = text.split_at(text.rfind("HTTP/1.1 200").expect("answers"));
    assert_eq!(answers.matches("HTTP/1.1 200").count(), REQUESTS);
    assert!(answers.ends_with("\r\n\r\n") && live.contains("\r\n: hello\n"), "{live}");
    // Had there been nothing to wait for, the connection would be the stream's own.
    assert!(!live.contains("connection: close"), "{live}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_was_used_before_carries_a_stream() {
    let server = TestServer::start().await;
    let db = table(&server).await;
    let mut stream = TcpStream::connect(address(&db)).await.expect("a connection");
    for _ in 0..3 {
        stream.write_all(request("GET /healthz HTTP/1.1").as_bytes()).await.expect("taken");
        assert!(until(&mut stream, "ok\n").await.starts_with("HTTP/1.1 200"));
    }
    stream.write_all(request(&format!("GET {LIVE} HTTP/1.1")).as_bytes()).await.expect("taken");
    until(&mut stream, "event: uptodate").await;
    assert_eq!(db.metric("tidegate_subscriptions").await, 1.0);
    drop(stream);
    let gone = async {
        while db.metric("tidegate_subscriptions").await > 0.0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("who has gone is forgotten");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_versions_and_methods_get_what_is_due() {
    let server = TestServer::start().await;
    let db = table(&server).await;
    // HEAD has no body, so the connection goes on.
    let last = "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let answer =
        exchange(&db, format!("{}{last}", request(&format!("HEAD {LIVE} HTTP/1.1"))).as_bytes(), PATIENCE).await;
    assert_eq!(answer.statuses(), [405, 200], "{}", answer.text);
    assert!(answer.text.contains("allow: GET,POST") && !answer.text.contains("method_not_allowed"), "{}", answer.text);
    // HTTP/1.0 knows no chunks.
    let mut stream = TcpStream::connect(address(&db)).await.expect("a connection");
    stream.write_all(request(&format!("GET {LIVE} HTTP/1.0")).as_bytes()).await.expect("taken");
    let text = until(&mut stream, "event: uptodate").await;
    assert!(!text.to_ascii_lowercase().contains("chunked") && text.contains("\r\n\r\n: hello\n"), "{text}");
    // With chunks a part of the stream stands between their lengths.
    let mut stream = TcpStream::connect(address(&db)).await.expect("a connection");
    stream.write_all(request(&format!("GET {LIVE} HTTP/1.1")).as_bytes()).await.expect("taken");
    let text = until(&mut stream, "event: uptodate").await;
    let (head, mut body) = text.split_once("\r\n\r\n").expect("a head");
    assert!(head.to_ascii_lowercase().contains("transfer-encoding: chunked") && head.contains("date: "), "{head}");
    let mut whole = String::new();
    while let Some((len, rest)) = body.split_once("\r\n") {
        let len = usize::from_str_radix(len, 16).expect("a length");
        let Some(chunk) = rest.get(..len) else { break };
        whole.push_str(chunk);
        let Some(next) = rest.get(len..).and_then(|rest| rest.strip_prefix("\r\n")) else { break };
        body = next;
    }
    assert!(whole.starts_with(": hello\nretry: ") && whole.contains("event: start"), "{whole}");
}
