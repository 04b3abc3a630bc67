//! One quick look at each part: `sh tests/run.sh smoke`.

use reqwest::Method;
use serde_json::json;
use tests::{LiveQuery, TestServer, plugin};

#[tokio::test]
async fn sql_is_answered_and_survives_a_restart() {
    let mut server = TestServer::start().await;
    let admin = server.admin();
    assert_eq!(admin.get("/healthz").send().await.unwrap().status(), 200);
    admin.sql("CREATE TABLE t (id INT PRIMARY KEY, name TEXT)").await;
    admin.sql_params("INSERT INTO t VALUES ($1, $2), (2, 'two')", json!([1, "one"])).await;
    server.kill9();
    server.restart().await;
    assert_eq!(server.admin().rows("SELECT * FROM t ORDER BY id").await, json!([[1, "one"], [2, "two"]]));
}

#[tokio::test]
async fn a_change_reaches_its_subscriber() {
    let server = TestServer::start().await;
    let admin = server.admin();
    admin.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT)").await;
    let mut live = admin.live(LiveQuery::new("SELECT id, n FROM t WHERE n > 1")).await;
    live.until_uptodate().await;
    let answer = admin.sql("INSERT INTO t VALUES (1, 1), (2, 2)").await;
    live.until_seq(tests::live::seq(&answer)).await;
    assert_eq!(live.fold.rows.len(), 1);
}

#[tokio::test]
async fn a_plugin_is_taken() {
    let server = TestServer::start().await;
    let admin = server.admin();
    let answer = admin.put_plugin("late", plugin("late.wasm")).await;
    assert_eq!(answer["version"], 1);
    let listed = admin.request(Method::GET, "/v1/plugins").send().await.unwrap();
    assert_eq!(listed.status(), 200);
}
