//! What is counted of each plugin: by namespace and name, replay told apart, gone with the plugin.

use reqwest::Method;
use tests::live::seq;
use tests::{Client, LiveQuery, PATIENCE, TestServer};

use crate::failures::{TELL, sour};

/// Instead of failing, `sour` drops the batch that has a `v` below 0.
const DROP: &str = "(return (i64.const 0))";

/// The value of a plugin's series in `main`; `more` are its labels behind the name.
async fn of(db: &Client, plugin: &str, metric: &str, more: &str) -> f64 {
    db.metric(&format!(r#"tidegate_plugin_{metric}{{namespace="main",plugin="{plugin}"{more}}}"#)).await
}

/// Calls and changes of each source.
async fn work(db: &Client, plugin: &str) -> [[f64; 2]; 3] {
    let mut all = [[0.0; 2]; 3];
    for (counts, source) in all.iter_mut().zip(["live", "replay", "snapshot"]) {
        let label = format!(r#",source="{source}""#);
        *counts = [of(db, plugin, "call_seconds_count", &label).await, of(db, plugin, "changes_total", &label).await];
    }
    all
}

async fn verdicts(db: &Client, plugin: &str) -> [f64; 2] {
    let count = async |verdict: &str| of(db, plugin, "verdicts_total", &format!(r#",verdict="{verdict}""#)).await;
    [count("kept").await, count("dropped").await]
}

async fn is_counted(db: &Client, plugin: &str) -> bool {
    db.metrics().await.contains(&format!("plugin=\"{plugin}\""))
}

#[tokio::test]
async fn calls_changes_and_verdicts_are_counted_by_plugin_and_source() {
    let mut server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE t (id BIGINT PRIMARY KEY, v BIGINT)").await;
    db.sql("INSERT INTO t VALUES (1, 1), (2, 2)").await;
    db.put_plugin("picky", sour(DROP, true)).await;
    let rows = serde_json::json!({"rows": [{"v": 1}], "params": {}});
    let tried = db.request(Method::POST, "/v1/plugins/main/picky/try").json(&rows).send().await.unwrap();
    assert_eq!(tried.status(), 200);
    assert!(!is_counted(&db, "picky").await, "uploads and trials are not");

    let mut live = db.live(LiveQuery::new("SELECT id, v FROM t").plugin("picky")).await;
    live.until_uptodate().await;
    assert_eq!(work(&db, "picky").await, [[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]]);
    for values in ["(3, -3)", "(4, 4)", "(5, 5), (6, 6)"] {
        let answer = db.sql(&format!("INSERT INTO t VALUES {values}")).await;
        live.until_seq(seq(&answer)).await;
    }
    assert_eq!(work(&db, "picky").await, [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]);
    assert_eq!(verdicts(&db, "picky").await, [5.0, 1.0]);
    assert!(of(&db, "picky", "call_seconds_sum", r#",source="live""#).await > 0.0);
    assert_eq!(of(&db, "picky", "memory_bytes", "").await, 65_536.0, "one instance, one page beside its window");
    assert_eq!(of(&db, "picky", "output_bytes_total", "").await, 0.0);

    // Another life counts anew. Nobody listens while these are written, so all of them are replayed.
    assert!(server.sigterm().await.success());
    server.restart().await;
    db.sql("INSERT INTO t VALUES (7, 7), (8, 8), (9, 9)").await;
    let last = seq(&db.sql("INSERT INTO t VALUES (10, -10)").await);
    live.reconnect().await;
    live.until_seq(last).await;
    assert_eq!((live.fold.rows.len(), live.fold.resyncs), (8, 0));
    assert_eq!(work(&db, "picky").await, [[0.0, 0.0], [2.0, 4.0], [0.0, 0.0]]);
    assert_eq!(verdicts(&db, "picky").await, [3.0, 1.0]);

    drop(live);
    let gone = async {
        while !db.request(Method::DELETE, "/v1/plugins/picky").send().await.unwrap().status().is_success() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("nobody uses it any more");
    assert!(!is_counted(&db, "picky").await);
}

#[tokio::test]
async fn failures_are_counted_by_plugin_and_cause() {
    let server = TestServer::start().await;
    let db = server.admin();
    for (plugin, fault) in [("teller", TELL), ("trapper", "unreachable")] {
        db.put_plugin(plugin, sour(fault, true)).await;
        db.sql(&format!("CREATE TABLE {plugin} (id BIGINT PRIMARY KEY, v BIGINT)")).await;
        let query = LiveQuery::new(format!("SELECT id FROM {plugin}")).plugin(plugin).option("on_error", "skip");
        let mut live = db.live(query).await;
        live.until_uptodate().await;
        for values in ["(1, 1)", "(2, -1)"] {
            let answer = db.sql(&format!("INSERT INTO {plugin} VALUES {values}")).await;
            live.until_seq(seq(&answer)).await;
        }
    }
    let faults =
        async |plugin: &str, cause: &str| of(&db, plugin, "faults_total", &format!(r#",cause="{cause}""#)).await;
    // One of the batch, one of its row alone.
    assert_eq!((faults("teller", "failed").await, faults("teller", "trap").await), (2.0, 0.0));
    assert_eq!((faults("trapper", "failed").await, faults("trapper", "trap").await), (0.0, 2.0));
    assert_eq!(verdicts(&db, "teller").await, [1.0, 0.0], "a failure is no verdict");
    assert_eq!(of(&db, "teller", "call_seconds_count", r#",source="live""#).await, 3.0, "but it took its time");
}
