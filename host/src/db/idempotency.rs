//! `Idempotency-Key`: a write that is sent again is answered as it was the first time, and not done twice.
//!
//! The first time, what is answered is kept in the very batch that writes. Every attempt looks for it first, through
//! the snapshot it plans at: so it finds either no trace of an earlier one, or all of it. Two at the same time meet at
//! the committer, as two writers of one row do, and the one that loses finds the other's receipt. Only what was
//! committed leaves a receipt; a request that was refused wrote nothing, and is tried anew. (A bulk insert has several
//! commits, and each leaves how far it came: [`super::bulk`].)

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{DbError, Identity, SqlAnswer, StatementResult};
use crate::store::snapshot::Snapshot;
use crate::store::{KeptReceipt, Receipt, StoreError};

/// As a client sent it: the key, and a hash of the whole request; of a bulk insert without its body.
#[derive(Clone, Debug)]
pub struct Idempotency {
    pub key: String,
    pub request: [u8; 32],
}

/// What is kept of an answer.
#[derive(Serialize, Deserialize)]
struct Outcome {
    affected: Vec<u64>,
}

impl Idempotency {
    /// The same key of another user is another one.
    fn id(&self, who: &Identity) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update((who.user.len() as u64).to_le_bytes());
        hash.update(who.user.as_bytes());
        hash.update(self.key.as_bytes());
        hash.finalize().into()
    }

    /// What this request left behind before.
    pub(super) fn kept(&self, who: &Identity, snapshot: &Snapshot) -> Result<Option<KeptReceipt>, DbError> {
        match snapshot.receipt(&self.id(who))? {
            Some(kept) if kept.request != self.request => Err(DbError::KeyReused),
            kept => Ok(kept),
        }
    }

    /// The answer that this request was given before.
    pub(super) fn answered(&self, who: &Identity, snapshot: &Snapshot) -> Result<Option<SqlAnswer>, DbError> {
        let Some(kept) = self.kept(who, snapshot)? else { return Ok(None) };
        let outcome: Outcome = postcard::from_bytes(&kept.outcome)
            .map_err(|error| StoreError::Corrupt(format!("the outcome in a receipt: {error}")))?;
        let results =
            outcome.affected.into_iter().map(|affected| StatementResult::Affected { affected, returned: None });
        Ok(Some(SqlAnswer { results: results.collect(), seq: kept.seq, replayed: true }))
    }

    /// What the write has to leave behind.
    pub(super) fn receipt(&self, who: &Identity, affected: &[u64]) -> Result<Receipt, DbError> {
        self.leave(who, &Outcome { affected: affected.to_vec() })
    }

    pub(super) fn leave(&self, who: &Identity, outcome: &impl Serialize) -> Result<Receipt, DbError> {
        let outcome = postcard::to_allocvec(outcome).map_err(|error| DbError::Internal(error.to_string()))?;
        Ok(Receipt { id: self.id(who), request: self.request, outcome })
    }
}
