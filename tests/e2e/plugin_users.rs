//! Pipelines on user tables: each user's rows through instances of their own.

use serde_json::json;
use tests::live::seq;
use tests::{LiveQuery, TestServer, plugin};

#[tokio::test]
async fn each_users_rows_go_through_the_pipeline_for_that_user_alone() {
    let mut server = TestServer::start().await;
    let db = server.admin();
    db.sql("CREATE TABLE trips (id INT PRIMARY KEY, dep_delay INT) WITH (type = 'user')").await;
    db.put_plugin("late", plugin("late.wasm")).await;
    db.put_plugin("worse", plugin("worse.wasm")).await;
    let (alice, bob) = (server.client("alice"), server.client("bob"));
    alice.sql("INSERT INTO trips VALUES (1, 20), (2, 3)").await;
    bob.sql("INSERT INTO trips VALUES (1, 50), (3, 60)").await;
    let query = || LiveQuery::new("SELECT * FROM trips").plugin("late");
    let (mut alices, mut bobs) = (alice.live(query()).await, bob.live(query()).await);
    let mut feed = bob.live(LiveQuery::new("SELECT id FROM trips").plugin("worse")).await;
    for live in [&mut alices, &mut bobs, &mut feed] {
        live.until_uptodate().await;
    }
    assert_eq!(alices.fold.rows.values().collect::<Vec<_>>(), [&json!({"id": 1, "dep_delay": 20})]);
    assert_eq!(bobs.fold.rows.len(), 2);
    let (mut last, rounds) = (0, 5);
    for round in 0..rounds {
        alice.sql(&format!("UPDATE trips SET dep_delay = {} WHERE id = 2", 100 + round)).await;
        last = seq(&bob.sql("UPDATE trips SET dep_delay = dep_delay + 10 WHERE id = 3").await);
    }
    alices.until_seq(last).await;
    bobs.until_seq(last).await;
    assert_eq!(alices.fold.rows[r#"{"id":2}"#], json!({"id": 2, "dep_delay": 100 + rounds - 1}));
    assert_eq!((alices.fold.rows.len(), bobs.fold.rows.len()), (2, 2));
    assert_eq!(bobs.fold.rows[r#"{"id":3}"#], json!({"id": 3, "dep_delay": 60 + 10 * rounds}));
    let changes = feed.until_seq(last).await;
    assert_eq!(changes.len(), rounds, "{changes:?}");
    assert_eq!(db.metric("tidegate_guest_bytes_copied_total").await, 0.0);

    // The same after a restart, from the positions they hold.
    server.kill9();
    server.restart().await;
    last = seq(&alice.sql("DELETE FROM trips WHERE id = 1").await);
    for live in [&mut alices, &mut bobs] {
        live.reconnect().await;
        live.until_seq(last).await;
    }
    assert_eq!((alices.fold.rows.len(), bobs.fold.rows.len()), (1, 2));
}
