//! The one SessionContext of the server, and planning on top of it.

use super::{ChangeSet, DdlPlan, RequestEnv, RowStream, SqlError, SqlOptions, Statement};

/// The SQL engine; one per server.
pub struct Sql {
    // filled by the sql module's author
}

impl Sql {
    pub fn new(_options: SqlOptions) -> Result<Sql, SqlError> {
        todo!()
    }

    /// Token gate, then parse (on a thread with a large stack), then the allow-list of statements.
    pub fn parse(&self, _text: &str) -> Result<Vec<Statement>, SqlError> {
        todo!()
    }

    /// Plans and starts a query; planning runs off the async threads and counts against the deadline.
    pub async fn query(&self, _statement: &Statement, _env: RequestEnv) -> Result<RowStream, SqlError> {
        todo!()
    }

    /// Plans INSERT, UPDATE or DELETE as a SELECT and turns its rows into a change set.
    pub async fn change_set(&self, _statement: &Statement, _env: RequestEnv) -> Result<ChangeSet, SqlError> {
        todo!()
    }

    /// What a DDL statement would write to the catalog.
    pub fn ddl(&self, _statement: &Statement, _env: &RequestEnv) -> Result<DdlPlan, SqlError> {
        todo!()
    }

    /// Compiles a live query: a filter and projection over one table.
    pub fn live(&self, _text: &str, _env: &RequestEnv) -> Result<super::live::LivePlan, SqlError> {
        todo!()
    }

    /// SessionContexts made since start: 1.
    pub fn contexts_created(&self) -> u64 {
        todo!()
    }
}
