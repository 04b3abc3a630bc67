//! What several parts ask of our side: tables of notes, and requests as a client makes them.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, StringArray};
use arrow::record_batch::RecordBatch;
use futures::StreamExt;
use host::db::{LiveRequest, SqlRequest};
use host::sql::{Param, RowConflict};
use host::store::Transaction;

use crate::world::World;

impl World {
    /// Rows for a table (id BIGINT, note TEXT), in one commit.
    pub fn insert(&self, table: &str, ids: Range<i64>, note: &str) {
        let env = self.env("admin");
        let base = env.snapshot.seq();
        let namespace = env.catalog.namespace("main").unwrap().id;
        let rows = self.sql.insert_rows(&env, table, RowConflict::Error, &[batch(ids, note)]).unwrap().writes;
        self.commit(Transaction { namespace, base, rows, catalog: Vec::new(), receipt: None });
    }

    pub fn each_batch(&self, text: &str, mut take: impl FnMut(RecordBatch)) {
        self.runtime.block_on(async {
            let statements = self.sql.parse(text).unwrap();
            let mut stream = self.sql.query(&statements[0], self.env("admin"), false).await.unwrap();
            while let Some(batch) = stream.batches.next().await {
                take(batch.unwrap());
            }
        });
    }
}

/// Rows of a table (id BIGINT, note TEXT).
pub fn batch(ids: Range<i64>, note: &str) -> RecordBatch {
    let notes: StringArray = ids.clone().map(|_| Some(note)).collect();
    let (ids, notes): (ArrayRef, ArrayRef) = (Arc::new(Int64Array::from_iter_values(ids)), Arc::new(notes));
    RecordBatch::try_from_iter([("id", ids), ("note", notes)]).unwrap()
}

pub fn sql_request(sql: impl Into<String>, params: Vec<Param>) -> SqlRequest {
    SqlRequest { sql: sql.into(), params, namespace: None, read_only: false, idempotency: None, one_result: false }
}

/// `snapshot`: whether the present rows come first; `None`: as it is when nothing is said.
pub fn live_request(sql: String, snapshot: Option<bool>) -> LiveRequest {
    LiveRequest { snapshot, ..LiveRequest::new(sql) }
}
