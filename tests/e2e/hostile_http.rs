//! HTTP as no client library would send it: malformed, slow, in floods; and values that look like the protocol around them.

use std::time::{Duration, Instant};

use reqwest::{Method, header};
use serde_json::json;
use tests::client::expect_problem;
use tests::fold::canonical;
use tests::live::seq;
use tests::process::{forget_peak, status_bytes};
use tests::raw::{Answer, address, exchange, read_to_end};
use tests::server::ADMIN_TOKEN;
use tests::{Bystander, Client, Options, PATIENCE, TestServer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{interval, timeout};

const SOON: Duration = Duration::from_secs(1);

/// A server that waits a second for a request, no longer.
async fn impatient() -> TestServer {
    let config = format!("[server]\nheader_timeout_ms = {}\n", SOON.as_millis());
    TestServer::with(Options { config, ..Options::default() }).await
}

/// A request line with the headers that every good request has, and more; the empty line is still to come.
fn head(request: &str, more: &str) -> String {
    format!("{request} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN_TOKEN}\r\n{more}")
}

fn post(more: &str, body: &str) -> String {
    head("POST /v1/sql", &format!("Content-Type: application/sql\r\n{more}\r\n{body}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_requests_get_their_status_and_nothing_is_smuggled() {
    /// So that the answer is not followed by a wait for the next request.
    const LAST: &str = "Connection: close\r\n";
    let server = impatient().await;
    let db = server.admin();
    let bystander = Bystander::at(&server).await;
    let good = "8\r\nSELECT 1\r\n0\r\n\r\n";
    let hidden = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    let chunked = "Transfer-Encoding: chunked\r\n";
    let many: String = (0..100).map(|n| format!("A{n}: b\r\n")).collect();
    for (what, request, due) in [
        ("a good one", post(&format!("{chunked}{LAST}"), good), &[200][..]),
        (
            "another length",
            post("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", &format!("0\r\n\r\n{hidden}")),
            &[400],
        ),
        ("two lengths", post("Content-Length: 8\r\nContent-Length: 9\r\n", &format!("SELECT 1{hidden}")), &[400]),
        ("a list of lengths", post("Content-Length: 8, 9\r\n", "SELECT 1"), &[400]),
        ("a length below zero", post("Content-Length: -1\r\n", "SELECT 1"), &[400]),
        ("a length with a sign", post("Content-Length: +8\r\n", "SELECT 1"), &[400]),
        ("a length beyond 64 bits", post("Content-Length: 99999999999999999999\r\n", "SELECT 1"), &[400]),
        ("another encoding", post("Transfer-Encoding: gzip\r\n", "SELECT 1"), &[400]),
        ("chunked and more", post("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", good), &[400]),
        ("no chunk length", post(chunked, "zz\r\nSELECT 1\r\n0\r\n\r\n"), &[400]),
        ("a chunk length beyond 64 bits", post(chunked, "fffffffffffffffff\r\nSELECT 1\r\n0\r\n\r\n"), &[400]),
        (
            "an endless chunk extension",
            post(chunked, &format!("8;{}\r\nSELECT 1\r\n0\r\n\r\n", "a".repeat(100_000))),
            &[400],
        ),
        ("endless trailers", post(chunked, &format!("8\r\nSELECT 1\r\n0\r\n{}\r\n", "X: y\r\n".repeat(5_000))), &[400]),
        ("no host", format!("GET /healthz HTTP/1.1\r\n{LAST}\r\n"), &[400]),
        ("two hosts", format!("GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n{LAST}\r\n"), &[400]),
        ("a space before the colon", "GET /healthz HTTP/1.1\r\nHost : x\r\n\r\n".to_owned(), &[400]),
        ("a folded header", head("GET /healthz", "A: b\r\n c\r\n\r\n"), &[400]),
        ("NUL in a header", head("GET /healthz", "A: b\0c\r\n\r\n"), &[400]),
        ("many headers", head("GET /healthz", &format!("{many}\r\n")), &[431]),
        ("a long header", head("GET /healthz", &format!("A: {}\r\n\r\n", "b".repeat(20_000))), &[431]),
        ("an endless header", head("GET /healthz", &format!("A: {}\r\n\r\n", "b".repeat(1_000_000))), &[431]),
        ("a long URL", head(&format!("GET /v1/sql?sql={}", "a".repeat(9_000)), &format!("{LAST}\r\n")), &[414]),
        // It does not fit into what is read of a head.
        ("a very long URL", head(&format!("GET /v1/sql?sql={}", "a".repeat(70_000)), "\r\n"), &[414, 431]),
        ("another protocol", "\0\x01\x02\x03\r\n\r\n".to_owned(), &[400]),
        ("another version", "GET / HTTP/9.9\r\n\r\n".to_owned(), &[400]),
        ("another method", head("BREW /v1/sql", &format!("{LAST}\r\n")), &[405]),
        ("two identities", head("GET /v1/sql?sql=SELECT+1", &format!("Authorization: Bearer x\r\n{LAST}\r\n")), &[401]),
        (
            "a compressed body",
            post(&format!("Content-Encoding: gzip\r\nContent-Length: 8\r\n{LAST}"), "SELECT 1"),
            &[415],
        ),
        ("a body that waits to be refused", post("Expect: 100-continue\r\nContent-Length: 9999999\r\n", ""), &[413]),
    ] {
        let answer = exchange(&db, request.as_bytes(), PATIENCE).await;
        let statuses = answer.statuses();
        assert!(statuses.len() == 1 && due.contains(&statuses[0]), "{what}: {answer:?}");
    }
    eprintln!("meanwhile: {:?}", bystander.unhurt(&server).await);
}

/// Sends the pieces, one every so often, until the server has enough of it; what it said at the end.
async fn dribble(db: &Client, first: &str, piece: &str, every: Duration) -> Answer {
    let start = Instant::now();
    let stream = TcpStream::connect(address(db)).await.expect("a connection");
    let (mut reading, mut writing) = stream.into_split();
    let (first, piece) = (first.to_owned(), piece.to_owned());
    let sending = tokio::spawn(async move {
        let mut pace = interval(every);
        let mut next = first;
        while writing.write_all(next.as_bytes()).await.is_ok() {
            pace.tick().await;
            next.clone_from(&piece);
        }
    });
    let received = read_to_end(&mut reading, PATIENCE).await;
    sending.abort();
    Answer { text: String::from_utf8_lossy(&received).into_owned(), took: start.elapsed() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_clients_are_cut_and_good_ones_served() {
    // How long a body may be slow before that counts; and what is read of it after the refusal.
    const BODY: Duration = Duration::from_secs(10 + 2);
    // Less than the limit that a server has where nobody says another.
    let margin = Duration::from_secs(8);
    let server = impatient().await;
    let db = server.admin();
    let bystander = Bystander::at(&server).await;
    let tenth = Duration::from_millis(100);
    let half = head("GET /healthz", "A: ");
    let slow_body = post("Content-Length: 100000\r\n", "SELECT 1");
    let (silent, half, headers, body) = tokio::join!(
        exchange(&db, b"", PATIENCE),
        exchange(&db, half.as_bytes(), PATIENCE),
        dribble(&db, &half, "a", tenth),
        dribble(&db, &slow_body, " ", tenth),
    );
    for (what, answer) in [("silent", &silent), ("half a head", &half), ("a head by the byte", &headers)] {
        assert!(answer.took < SOON + margin, "{what}: {answer:?}");
        assert!(answer.statuses().iter().all(|status| *status == 408), "{what}: {answer:?}");
    }
    assert!(body.took < BODY + margin && body.statuses() == [408], "a body by the byte: {body:?}");
    eprintln!("meanwhile: {:?}", bystander.unhurt(&server).await);
}

/// Just enough of HTTP/2 to misuse it.
mod h2 {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RESET: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const WINDOW: u8 = 8;
    pub const CONTINUATION: u8 = 9;
    pub const END_STREAM: u8 = 1;
    pub const END_HEADERS: u8 = 4;

    pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("frames are short").to_be_bytes();
        let mut frame = length[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend_from_slice(payload);
        frame
    }

    /// What a client says first.
    pub fn hello() -> Vec<u8> {
        let mut hello = PREFACE.to_vec();
        hello.extend(frame(SETTINGS, 0, 0, &[]));
        hello
    }

    /// A header as literal text, not to be remembered.
    pub fn literal(name: &str, value: &str) -> Vec<u8> {
        let mut header = vec![0];
        for text in [name, value] {
            header.push(u8::try_from(text.len()).expect("short texts"));
            header.extend_from_slice(text.as_bytes());
        }
        header
    }

    pub fn request(method: &str, path: &str, token: &str) -> Vec<u8> {
        [
            literal(":method", method),
            literal(":scheme", "http"),
            literal(":path", path),
            literal(":authority", "x"),
            literal("authorization", &format!("Bearer {token}")),
            literal("content-type", "application/sql"),
        ]
        .concat()
    }
}

/// Sends one burst after the other until the server ends the connection; the bytes that it took until then.
async fn flood(db: &Client, mut burst: impl FnMut(u32) -> Vec<u8>) -> usize {
    let stream = TcpStream::connect(address(db)).await.expect("a connection");
    let (mut reading, mut writing) = stream.into_split();
    let sending = async {
        let mut sent = 0;
        if writing.write_all(&h2::hello()).await.is_err() {
            return sent;
        }
        for number in 0.. {
            let burst = burst(number);
            if writing.write_all(&burst).await.is_err() {
                break;
            }
            sent += burst.len();
        }
        sent
    };
    // What it says is read, so that it can always say more.
    let draining = async {
        let mut sink = [0; 16 * 1024];
        while let Ok(1..) = reading.read(&mut sink).await {}
    };
    let both = async { tokio::join!(sending, draining).0 };
    timeout(PATIENCE, both).await.expect("the server ends a flood")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_of_http2_frames_are_bounded() {
    use h2::{CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, PRIORITY, RESET, SETTINGS, WINDOW, frame};
    const MEMORY: u64 = 64 << 20;
    let server = impatient().await;
    let db = server.admin();
    let bystander = Bystander::at(&server).await;
    let get = h2::request("GET", "/healthz", ADMIN_TOKEN);
    let post = h2::request("POST", "/v1/sql", ADMIN_TOKEN);
    // A thousand frames a burst.
    let repeated = |frame: Vec<u8>| move |_: u32| frame.repeat(1_000);
    // The first burst begins a request that the others never end.
    let begun =
        |first: Vec<u8>, then: Vec<u8>| move |number: u32| if number == 0 { first.clone() } else { then.repeat(1_000) };
    let resets = |number: u32| -> Vec<u8> {
        let streams = (0..100).map(|at| 2 * (number * 100 + at) + 1);
        let both = |stream| {
            [frame(HEADERS, END_STREAM | END_HEADERS, stream, &get), frame(RESET, 0, stream, &8_u32.to_be_bytes())]
        };
        streams.flat_map(both).flatten().collect()
    };
    let opened = |number: u32| -> Vec<u8> {
        (0..500).flat_map(|at| frame(HEADERS, END_HEADERS, 2 * (number * 500 + at) + 1, &post)).collect()
    };
    // One byte of it stands for a header of 100 bytes.
    let remembered = [&[0x40, 1, b'a', 100][..], &[b'b'; 100]].concat();
    let bomb = [get.as_slice(), &remembered, &[0xbe; 12_000]].concat();
    let header = h2::literal("x-a", &"b".repeat(100));

    let before = status_bytes(server.pid(), "VmRSS");
    forget_peak(server.pid());
    let get_begun = frame(HEADERS, END_STREAM, 1, &get);
    let post_begun = frame(HEADERS, END_HEADERS, 1, &post);
    let took = [
        ("rapid resets", flood(&db, resets).await),
        ("streams without end", flood(&db, opened).await),
        ("continuations", flood(&db, begun(get_begun.clone(), frame(CONTINUATION, 0, 1, &header))).await),
        ("empty continuations", flood(&db, begun(get_begun, frame(CONTINUATION, 0, 1, &[]))).await),
        ("empty data", flood(&db, begun(post_begun, frame(DATA, 0, 1, &[]))).await),
        ("a bomb of headers", flood(&db, repeated(frame(HEADERS, END_STREAM | END_HEADERS, 1, &bomb))).await),
        // These ask for nothing; the server waits for a request no longer than for any other.
        ("pings", flood(&db, repeated(frame(PING, 0, 0, b"12345678"))).await),
        ("settings", flood(&db, repeated(frame(SETTINGS, 0, 0, &[]))).await),
        ("priorities", flood(&db, repeated(frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 1]))).await),
        ("windows", flood(&db, repeated(frame(WINDOW, 0, 0, &[0, 0, 0, 1]))).await),
    ];
    eprintln!("bytes that were taken: {took:?}");
    let grown = status_bytes(server.pid(), "VmHWM").saturating_sub(before);
    assert!(grown < MEMORY, "{grown} bytes");
    eprintln!("meanwhile: {:?}", bystander.unhurt(&server).await);
}

/// HTTP/1.1 counts them before there is a request.
#[tokio::test]
async fn header_lines_are_counted_over_http2_as_well() {
    let server = TestServer::start().await;
    let db = server.admin();
    // Beside `authorization` and `content-type`.
    for (more, due) in [(62, "ok\n"), (63, "too_many_headers")] {
        let mut request = h2::request("GET", "/healthz", ADMIN_TOKEN);
        request.extend((0..more).flat_map(|n| h2::literal(&format!("x-{n}"), "y")));
        let mut stream = TcpStream::connect(address(&db)).await.expect("a connection");
        stream.write_all(&h2::hello()).await.unwrap();
        let frame = h2::frame(h2::HEADERS, h2::END_STREAM | h2::END_HEADERS, 1, &request);
        stream.write_all(&frame).await.unwrap();
        let mut received = Vec::new();
        let answered = async {
            while !String::from_utf8_lossy(&received).contains(due) {
                assert_ne!(stream.read_buf(&mut received).await.unwrap(), 0, "{due}");
            }
        };
        assert!(timeout(PATIENCE, answered).await.is_ok(), "{due}");
    }
}

#[tokio::test]
async fn malformed_bodies_store_nothing() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id INT PRIMARY KEY, v TEXT)").await;
    let deep = format!("{{\"sql\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let params = format!("{{\"sql\":\"SELECT 1\",\"params\":[{}]}}", vec!["1"; 1_001].join(","));
    for (what, body, code) in [
        ("deep JSON", deep.as_bytes(), "bad_json"),
        ("no UTF-8", b"{\"sql\":\"INSERT INTO t VALUES (1, '\xff')\"}", "bad_json"),
        ("half a pair", br#"{"sql":"INSERT INTO t VALUES (1, '\ud800')"}"#, "bad_json"),
        ("a field twice", br#"{"sql":"INSERT INTO t VALUES (1, 'a')","sql":"SELECT 1"}"#, "bad_json"),
        ("an unknown field", br#"{"sql":"INSERT INTO t VALUES (1, 'a')","sq":1}"#, "bad_json"),
        ("more behind it", br#"{"sql":"INSERT INTO t VALUES (1, 'a')"} {}"#, "bad_json"),
        ("a control character", b"{\"sql\":\"INSERT INTO t VALUES (1, '\x01')\"}", "bad_json"),
        ("a number too large", br#"{"sql":"INSERT INTO t VALUES ($1, 'a')","params":[1e999]}"#, "bad_parameter"),
        (
            "an integer too large",
            br#"{"sql":"INSERT INTO t VALUES ($1, 'a')","params":[99999999999999999999]}"#,
            "bad_parameter",
        ),
        ("many parameters", params.as_bytes(), "limit"),
        ("out of range", br#"{"sql":"INSERT INTO t VALUES (1, 'a'), (2147483648, 'b')"}"#, "out_of_range"),
        (
            "out of range behind another",
            br#"{"sql":"INSERT INTO t VALUES (1, 'a'); INSERT INTO t VALUES ($1, 'b')","params":[2147483648]}"#,
            "out_of_range",
        ),
    ] {
        let request = db.request(Method::POST, "/v1/sql").header(header::CONTENT_TYPE, "application/json");
        let problem = expect_problem(request.body(body.to_vec()), 400, code).await;
        assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[0]]), "{what}: {problem}");
    }
    // Rows by the stream: what is malformed at the end keeps nothing of its piece.
    for (format, body, code) in [
        ("application/x-ndjson", &b"{\"id\": 1, \"v\": \"a\"}\n{\"id\": 2, \"v\": \"\xff\"}\n"[..], "bad_json"),
        ("text/csv", b"id,v\n1,a\n2,\"\xff\"\n", "bad_csv"),
        ("application/vnd.apache.arrow.stream", b"\xff\xff\xff\xff\x10\0\0\0not arrow at all", "bad_arrow"),
    ] {
        let request = db.request(Method::POST, "/v1/tables/main/t/rows").header(header::CONTENT_TYPE, format);
        expect_problem(request.body(body.to_vec()), 400, code).await;
        assert_eq!(db.rows("SELECT count(*) FROM t").await, json!([[0]]), "{format}");
    }
    for encoding in ["gzip", "deflate", "br", "zstd", "gzip, gzip"] {
        let request = db.request(Method::POST, "/v1/sql").header(header::CONTENT_ENCODING, encoding);
        let request = request.header(header::CONTENT_TYPE, "application/sql").body(vec![0x1f, 0x8b, 8, 0]);
        expect_problem(request, 415, "unsupported_encoding").await;
    }
}

/// As values, as keys and as names of columns; in the snapshot, live and after a reconnect: one event each, and exact.
#[tokio::test]
async fn values_that_look_like_events_are_values() {
    let values = [
        "a\nid: 9\nevent: closed\ndata: {}\n\n",
        "\r\rdata: 1\r\r",
        "\r\nretry: 1\r\n\r\n: comment",
        "\u{2028}\u{2029}\u{85}\u{feff}",
        "\0\u{1}\u{7f}",
        "\\n \\u000a \" ' </script>",
        "\u{1F6EB}\u{10FFFF}",
        "",
    ];
    let server = TestServer::start().await;
    let db = server.admin();
    let name = "v\nid: 1\u{2028}";
    db.sql("CREATE TABLE t (k TEXT PRIMARY KEY, v TEXT)").await;
    let insert = "INSERT INTO t VALUES ($1, $1)";
    db.sql_params(insert, json!(["in the snapshot"])).await;
    for value in &values[..4] {
        db.sql_params(insert, json!([value])).await;
    }
    let mut live = db.live(format!("SELECT k, v AS \"{name}\" FROM t")).await;
    let snapshot = live.until_uptodate().await;
    assert_eq!(snapshot.iter().filter(|event| event.name == "insert").count(), 5, "{snapshot:?}");
    for (at, value) in values[4..].iter().enumerate() {
        if at == 2 {
            live.disconnect();
        }
        db.sql_params(insert, json!([value])).await;
    }
    live.reconnect().await;
    let last = seq(&db.sql("DELETE FROM t WHERE k = 'in the snapshot'").await);
    live.until_seq(last).await;
    assert_eq!((live.fold.rows.len(), live.fold.resyncs), (values.len(), 0));
    for value in values {
        let key = canonical([("k", &json!(value))].into_iter());
        let row = live.fold.rows.get(&key).unwrap_or_else(|| panic!("{value:?} is not among {:?}", live.fold.rows));
        assert_eq!((&row["k"], &row[name]), (&json!(value), &json!(value)));
    }
}
