//! Plugins between commit and subscriber: filters, transforms, parameters, refusals, hostile guests, versions.

use serde_json::{Value, json};
use tests::client::expect_problem;
use tests::guest::{Guest, KEEP_ALL, filter, filtering};
use tests::live::seq;
use tests::{Client, LiveQuery, TestServer, plugin};

const COLUMNS: &str =
    "id BIGINT PRIMARY KEY, carrier TEXT NOT NULL, flight INT, origin TEXT, dest TEXT, distance INT, dep_delay DOUBLE";

async fn flights(server: &TestServer) -> Client {
    let db = server.admin();
    db.sql(&format!("CREATE TABLE flights ({COLUMNS})")).await;
    db.sql(
        "INSERT INTO flights VALUES (1, 'UA', 1545, 'EWR', 'IAH', 1400, 2), (2, 'AA', 1141, 'JFK', 'MIA', 1089, 33), \
         (3, 'B6', 725, 'JFK', 'BQN', 1576, NULL)",
    )
    .await;
    db
}

/// Keeps everything, and has this beside its filter.
fn keeping(more: &str) -> Vec<u8> {
    Guest { fields: &(filtering(KEEP_ALL) + more), ..Guest::default() }.bytes()
}

#[tokio::test]
async fn a_filter_and_a_transform_shape_a_stream() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    let late = db.put_plugin("late", plugin("late.wasm")).await;
    assert_eq!((&late["name"], &late["version"], &late["abi"]), (&json!("late"), &json!(1), &json!(1)));
    assert!(late["sha256"].as_str().is_some_and(|hash| hash.len() == 64));
    assert!(
        late["size"].as_u64().is_some_and(|size| size > 0) && late["kinds"].is_array() && late["parameters"].is_array()
    );
    db.put_plugin("local_units", plugin("local_units.wasm")).await;

    let query = LiveQuery::new("SELECT * FROM flights WHERE origin = 'JFK'")
        .plugin(r#"late:{"minutes":30}"#)
        .plugin("local_units");
    let mut live = db.live(query).await;
    let events = live.until_uptodate().await;
    let names: Vec<&str> =
        events[0].data["columns"].as_array().unwrap().iter().filter_map(|c| c["name"].as_str()).collect();
    assert_eq!(names, ["carrier", "flight", "origin", "dest", "km", "delay_class", "dep_delay_minutes"]);
    assert_eq!(events.len(), 2, "snapshot rows go through the same pipeline: {events:?}");
    assert_eq!(
        events[1].data["row"],
        json!({"carrier": "AA", "flight": 1141, "origin": "JFK", "dest": "MIA", "km": 1752.6, "delay_class": "late", "dep_delay_minutes": 33.0})
    );
    assert_eq!(events[1].data["key"], json!({"id": 2}));

    db.sql("UPDATE flights SET dep_delay = 75 WHERE id = 3").await;
    assert_eq!(live.next_change().await.data["row"]["delay_class"], "very late");
    db.sql("UPDATE flights SET dep_delay = 80 WHERE id = 3").await;
    let event = live.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["old"]["dep_delay_minutes"]), ("update", &json!(75.0)));
    // The filter decides: out of the result, though the SQL predicate still holds.
    db.sql("UPDATE flights SET dep_delay = 29.5 WHERE id = 3").await;
    let event = live.next_change().await;
    assert_eq!((event.name.as_str(), &event.data["reason"]), ("delete", &json!("moved_out")));

    // Not a byte of a change was copied into a guest.
    assert_eq!(db.metric("tidegate_guest_bytes_copied_total").await, 0.0);
    assert!(db.metric("tidegate_plugin_calls_total").await > 0.0);
    assert_eq!(db.metric("tidegate_plugin_failures_total").await, 0.0);
}

#[tokio::test]
async fn a_filter_reads_any_numeric_column() {
    let server = TestServer::start().await;
    let db = server.admin();
    db.put_plugin("late", plugin("late.wasm")).await;
    for (n, ty) in ["SMALLINT", "INT", "BIGINT", "REAL", "DOUBLE", "DECIMAL(8, 2)"].iter().enumerate() {
        db.sql(&format!("CREATE TABLE t{n} (id INT PRIMARY KEY, pad TEXT, dep_delay {ty})")).await;
        db.sql(&format!(
            "INSERT INTO t{n} VALUES (1, 'x', 14), (2, 'yy', 15), (3, NULL, -99), (4, '', NULL), (5, 'zzz', 4000)"
        ))
        .await;
        let mut live = db.live(LiveQuery::new(format!("SELECT id FROM t{n}")).plugin("late")).await;
        live.until_uptodate().await;
        let keys: Vec<&str> = live.fold.rows.keys().map(String::as_str).collect();
        assert_eq!(keys, [r#"{"id":2}"#, r#"{"id":5}"#], "{ty}");
        let answer = db.sql(&format!("UPDATE t{n} SET dep_delay = dep_delay + 1")).await;
        live.until_seq(seq(&answer)).await;
        assert_eq!(live.fold.rows.len(), 3, "{ty}: 14 has become 15");
    }
}

#[tokio::test]
async fn a_plugin_written_by_hand_works_as_well() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    let uploaded = db.put_plugin("long_haul", plugin("long_haul.wat")).await;
    assert_eq!(uploaded["parameters"][0]["name"], "miles");
    let mut live = db.live(LiveQuery::new("SELECT id FROM flights").plugin(r#"long_haul:{"miles":1500}"#)).await;
    live.until_uptodate().await;
    assert_eq!(live.fold.rows.len(), 1);
    let values: Vec<String> = (100..300).map(|id| format!("({id}, 'UA', 1, 'EWR', 'X', {}, NULL)", id * 10)).collect();
    let answer = db.sql(&format!("INSERT INTO flights VALUES {}", values.join(", "))).await;
    live.until_seq(seq(&answer)).await;
    assert_eq!(live.fold.rows.len(), 1 + 150, "several batches of one commit");
}

/// One predicate as SQL and as plugins of several languages: one stream. The rows are those of the ABI's vectors among
/// others: NULL, older than the column, exactly at the limit.
#[tokio::test]
async fn one_predicate_in_every_language_gives_one_stream() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    let samples = [
        ("long_haul", Some(plugin("long_haul.wat"))),
        ("long_haul_c", tests::optional_plugin("long_haul_c.wasm")),
        ("long_haul_as", tests::optional_plugin("long_haul_as.wasm")),
    ];
    let mut streams = vec![db.live("SELECT id, distance FROM flights WHERE distance >= 1089").await];
    for (name, module) in samples {
        let Some(module) = module else { continue };
        db.put_plugin(name, module).await;
        for _ in 0..2 {
            let stage = format!("{name}:{{\"miles\":1089}}");
            streams.push(db.live(LiveQuery::new("SELECT id, distance FROM flights").plugin(&stage)).await);
        }
    }
    for live in &mut streams {
        live.until_uptodate().await;
    }
    let values: Vec<String> =
        (0..500).map(|i| format!("({}, 'UA', 1, 'EWR', 'X', {}, NULL)", 100 + i, i * 7 % 2300)).collect();
    db.sql(&format!("INSERT INTO flights VALUES {}", values.join(", "))).await;
    db.sql("UPDATE flights SET distance = NULL WHERE id % 5 = 0").await;
    db.sql("UPDATE flights SET distance = distance + 100 WHERE id % 3 = 0; DELETE FROM flights WHERE id % 7 = 0").await;
    let last = seq(&db.sql("UPDATE flights SET distance = 1089 WHERE id % 11 = 0").await);
    let mut told = Vec::new();
    for live in &mut streams {
        // Everything but the ids, which belong to a stream.
        let events = live.until_seq(last).await;
        told.push(events.into_iter().map(|event| (event.name, event.data)).collect::<Vec<_>>());
    }
    assert!(told[0].len() > 300, "{} events", told[0].len());
    for (stream, events) in told.iter().enumerate() {
        assert!(events == &told[0], "stream {stream} differs");
    }
}

#[tokio::test]
async fn parameters_and_columns_are_checked_at_subscribe_time() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    db.put_plugin("late", plugin("late.wasm")).await;
    db.sql("CREATE TABLE other (id INT PRIMARY KEY, dep_delay TEXT)").await;
    db.sql("CREATE TABLE none (id INT PRIMARY KEY)").await;
    for (table, stage, status, named) in [
        ("flights", r#"late:{"minutes":"soon"}"#, 400, "minutes"),
        ("flights", r#"late:{"minutes":null}"#, 400, "minutes"),
        ("flights", r#"late:{"hours":1}"#, 400, "hours"),
        ("flights", r#"late:[1]"#, 400, "late"),
        ("flights", r#"late:{"minutes":"#, 400, "late"),
        ("flights", "late@7", 404, "late@7"),
        ("flights", "late@sha256:00", 404, "the whole hash is needed"),
        ("flights", "nobody", 404, "nobody"),
        ("other", "late", 400, "dep_delay"),
        ("none", "late", 400, "whatever the SELECT list"),
    ] {
        let query = LiveQuery::new(format!("SELECT id FROM {table}")).plugin(stage);
        let response = query.request(&db, None).send().await.unwrap();
        assert_eq!(response.status(), status, "{table} {stage}");
        let text = response.text().await.unwrap();
        assert!(text.contains(named), "{table} {stage}: {text}");
    }
    // Pinned, and with its default.
    let mut live = db.live(LiveQuery::new("SELECT id FROM flights").plugin("late@1")).await;
    live.until_uptodate().await;
    assert_eq!(live.fold.rows.len(), 1);
}

#[tokio::test]
async fn modules_that_cannot_be_plugins_are_refused_at_upload() {
    let server = TestServer::start().await;
    let db = server.admin();
    let whole = plugin("late.wasm");
    let wasi = br#"(module (import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32))) (memory (export "memory") 1))"#;
    for (what, module) in [
        ("no module", b"hello".to_vec()),
        ("nothing", Vec::new()),
        ("a truncated module", whole[..whole.len() / 2].to_vec()),
        ("broken text", b"(module (func".to_vec()),
        ("another ABI version", Guest { abi: 2, fields: &filtering(KEEP_ALL), ..Guest::default() }.bytes()),
        ("WASI", wasi.to_vec()),
        ("an empty module", b"(module)".to_vec()),
        ("a start that never ends", keeping("(func $s (loop $l (br $l))) (start $s)")),
        ("a start that traps", keeping("(func $s unreachable) (start $s)")),
        ("a memory that is too large", keeping("(memory $big 60000)")),
    ] {
        let problem = expect_problem(db.put_plugin_request("bad", module), 422, "plugin_refused|plugin_failed").await;
        eprintln!("{what}: {}", problem["detail"]);
    }
    let problem = expect_problem(
        db.put_plugin_request("bad", Guest { abi: 2, fields: &filtering(KEEP_ALL), ..Guest::default() }.bytes()),
        422,
        "plugin_refused",
    )
    .await;
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains('1') && detail.contains('2'), "both versions are named: {detail}");
    let missing = db.get("/v1/plugins/bad").send().await.unwrap();
    assert_eq!(missing.status(), 404, "nothing is half installed");
    assert!(db.try_put_plugin("Bad Name", plugin("late.wasm")).await.is_err());
    db.put_plugin("late", plugin("late.wasm")).await;
}

/// One guest that misbehaves at its first row with `dep_delay`, among streams that go on.
async fn hostile(what: &str, body: &str, causes: &[&str]) {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    db.sql("DELETE FROM flights").await;
    db.put_plugin("late", plugin("late.wasm")).await;
    db.put_plugin("bad", filter(body)).await;
    let sql = "SELECT id, dep_delay FROM flights";
    let mut plain = db.live(sql).await;
    let mut good = db.live(LiveQuery::new(sql).plugin("late")).await;
    let mut bad = db.live(LiveQuery::new(sql).plugin("bad")).await;
    for live in [&mut plain, &mut good, &mut bad] {
        live.until_uptodate().await;
    }

    let answer =
        db.sql("INSERT INTO flights VALUES (1, 'UA', 1, 'A', 'B', 1, 50), (2, 'UA', 2, 'A', 'B', 1, 60)").await;
    let event = bad.next_change().await;
    assert_eq!(event.name, "plugin-error", "{what}: {event:?}");
    assert_eq!(event.data["plugin"], "bad", "{what}: {event:?}");
    let cause = event.data["cause"].as_str().unwrap_or_default().to_owned();
    assert!(causes.contains(&cause.as_str()), "{what}: cause {cause}");
    for live in [&mut plain, &mut good] {
        live.until_seq(seq(&answer)).await;
        assert_eq!(live.fold.rows.len(), 2, "{what}: others get all of it");
        assert_eq!(live.fold.rows[r#"{"id":2}"#], json!({"id": 2, "dep_delay": 60.0}), "{what}: and the true bytes");
    }
    // The next commit as well, and the server is well.
    let answer = db.sql("UPDATE flights SET dep_delay = dep_delay + 1").await;
    for live in [&mut plain, &mut good] {
        live.until_seq(seq(&answer)).await;
        assert_eq!(live.fold.rows[r#"{"id":1}"#], json!({"id": 1, "dep_delay": 51.0}), "{what}");
    }
    assert_eq!(db.get("/healthz").send().await.unwrap().status(), 200);
    assert!(db.metric("tidegate_plugin_failures_total").await >= 1.0);

    // Another version, and the stream goes on with nothing lost.
    db.put_plugin("bad", filter(KEEP_ALL)).await;
    loop {
        let event = bad.next_event().await;
        if event.name == "uptodate" && bad.fold.rows.len() == 2 {
            break;
        }
        assert!(["resync", "start", "insert", "uptodate"].contains(&event.name.as_str()), "{what}: {event:?}");
    }
    assert_eq!(bad.fold.rows, plain.fold.rows, "{what}");
}

#[tokio::test]
async fn a_guest_that_never_returns() {
    hostile("an endless loop", "(loop $l (br $l)) (i64.const 0)", &["deadline"]).await;
}

#[tokio::test]
async fn a_guest_that_traps() {
    hostile("unreachable", "unreachable", &["trap"]).await;
}

#[tokio::test]
async fn a_guest_that_recurses_for_ever() {
    let body = "(drop (call $deep (i32.const 1))) (i64.const 0)) (func $deep (param i32) (result i32) (i32.add (i32.const 1) (call $deep (local.get 0)))";
    hostile("deep recursion", body, &["trap", "memory"]).await;
}

#[tokio::test]
async fn a_guest_that_stores_into_the_window() {
    hostile("i32.store", "(i32.store (global.get $window) (i32.const -1)) (i64.const 0)", &["window_write"]).await;
}

#[tokio::test]
async fn a_guest_that_fills_the_window() {
    let body = "(memory.fill (global.get $window) (i32.const 255) (i32.const 131072)) (i64.const 0)";
    hostile("memory.fill", body, &["window_write"]).await;
}

#[tokio::test]
async fn a_guest_that_copies_over_the_window() {
    let body = "(memory.copy (global.get $window) (i32.const 0) (i32.const 65536)) (i64.const 0)";
    hostile("memory.copy", body, &["window_write"]).await;
}

#[tokio::test]
async fn a_guest_that_answers_for_rows_it_was_not_given() {
    hostile("bits beyond n", "(i64.const -1)", &["abi", "output"]).await;
}

#[tokio::test]
async fn a_guest_that_says_that_a_row_failed() {
    hostile("fail", "(call $fail (i32.const 0) (i32.const 0) (i32.const 0)) (i64.const 0)", &["failed"]).await;
}

#[tokio::test]
async fn a_guest_that_reads_beyond_its_memory() {
    hostile("a load beyond the memory", "(i64.load (i32.const -16))", &["trap"]).await;
}

/// Growing to the limit fails inside the guest and is nobody's fault.
#[tokio::test]
async fn a_guest_that_wants_all_memory() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    let body = format!("(loop $l (br_if $l (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) {KEEP_ALL}");
    db.put_plugin("greedy", filter(&body)).await;
    let mut live = db.live(LiveQuery::new("SELECT id FROM flights").plugin("greedy")).await;
    live.until_uptodate().await;
    let answer = db.sql("INSERT INTO flights VALUES (10, 'UA', 1, 'A', 'B', 1, 1)").await;
    live.until_seq(seq(&answer)).await;
    assert_eq!(live.fold.rows.len(), 4);
}

/// A transform whose answer lies outside its memory.
#[tokio::test]
async fn a_transform_with_a_lying_pointer() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    let liar = Guest {
        configure: "(return (i64.const 0xfffffff000000001))",
        // The output schema: one column "x", id 0, BIGINT.
        fields: r#"(data (i32.const 16) "\00\00\00\00")
  (func (export "tg_transform") (param i32 i32 i32) (result i64) (i64.const 0x00001000fffffff0))"#,
        ..Guest::default()
    };
    // Refused as early as the lie shows: at upload, when it is configured, or at its first answer.
    if db.try_put_plugin("liar", liar.bytes()).await.is_ok() {
        let response = LiveQuery::new("SELECT id FROM flights").plugin("liar").request(&db, None).send().await.unwrap();
        assert!(matches!(response.status().as_u16(), 400 | 422), "{}", response.status());
    }
    assert_eq!(db.rows("SELECT count(*) FROM flights").await, json!([[3]]));
}

#[tokio::test]
async fn another_version_of_a_plugin_resyncs_its_streams() {
    let server = TestServer::start().await;
    let db = flights(&server).await;
    db.put_plugin("p", filter("(i64.const 0)")).await;
    let mut live = db.live(LiveQuery::new("SELECT id FROM flights").plugin("p")).await;
    let mut pinned = db.live(LiveQuery::new("SELECT id FROM flights").plugin("p@1")).await;
    live.until_uptodate().await;
    pinned.until_uptodate().await;
    assert!(live.fold.rows.is_empty());

    let same = db.put_plugin("p", filter("(i64.const 0)")).await;
    assert_eq!(same["version"], 1, "the same bytes are the same version");
    let other = db.put_plugin("p", filter(KEEP_ALL)).await;
    assert_eq!(other["version"], 2);
    while live.fold.resyncs == 0 {
        live.next_event().await;
    }
    live.until_uptodate().await;
    assert_eq!(live.fold.rows.len(), 3);
    let answer = db.sql("INSERT INTO flights VALUES (10, 'UA', 1, 'A', 'B', 1, 1)").await;
    pinned.until_seq(seq(&answer)).await;
    assert_eq!((pinned.fold.rows.len(), pinned.fold.resyncs), (0, 0), "a pinned stream keeps its version");
}

#[tokio::test]
async fn plugins_are_listed_and_deleted_and_live_on_disk() {
    let mut server = TestServer::start().await;
    let db = flights(&server).await;
    db.put_plugin("late", plugin("late.wasm")).await;
    db.put_plugin("main/other", filter(KEEP_ALL)).await;
    server.kill9();
    server.restart().await;

    let list: Value = db.get("/v1/plugins").send().await.unwrap().json().await.unwrap();
    let text = list.to_string();
    assert!(text.contains("\"late\"") && text.contains("\"other\""), "{text}");
    let mut live = db.live(LiveQuery::new("SELECT id FROM flights").plugin("late")).await;
    live.until_uptodate().await;
    assert_eq!(live.fold.rows.len(), 1);
    let delete = |name: &str| db.request(reqwest::Method::DELETE, &format!("/v1/plugins/{name}"));
    assert_eq!(delete("late").send().await.unwrap().status(), 409, "in use");
    assert!(delete("other").send().await.unwrap().status().is_success());
    assert_eq!(db.get("/v1/plugins/other").send().await.unwrap().status(), 404);
}
