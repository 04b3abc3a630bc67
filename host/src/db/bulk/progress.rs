//! `Idempotency-Key` of a bulk insert: a body that is sent again goes on where it was cut off, and is done once.
//!
//! Every commit leaves in its own batch how far it came: the rows, and the bytes that had been read by then with their
//! hash. What becomes one commit depends on how the body arrives, so commits cannot be numbered and compared. Instead a
//! body that comes again is read from its start, the rows that are done are left out, and nothing is written before as
//! many bytes have proved to be the same.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::BulkReport;
use crate::db::{DbError, Idempotency, Identity};
use crate::store::snapshot::Snapshot;
use crate::store::{KeptReceipt, Receipt, StoreError};

/// What a commit leaves behind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Kept {
    rows: u64,
    affected: u64,
    commits: u64,
    /// Bytes of the body that were read; the rows are all in them.
    bytes: u64,
    /// Of these bytes.
    hash: [u8; 32],
    /// That was the whole body.
    complete: bool,
}

/// How far a body has come, and whether it is the one that was begun.
pub(super) struct Progress {
    idempotency: Idempotency,
    /// Of the last commit under this key: an earlier request's, then this one's.
    kept: Option<Kept>,
    /// No earlier request, or the same bytes as far as it came.
    proven: bool,
    bytes: u64,
    hash: Sha256,
}

impl Progress {
    /// Looks for an earlier request; what it has done is where this one begins.
    pub(super) fn find(
        idempotency: Idempotency,
        who: &Identity,
        snapshot: &Snapshot,
    ) -> Result<(Progress, BulkReport), DbError> {
        let receipt = idempotency.kept(who, snapshot)?;
        let kept = receipt.as_ref().map(decode).transpose()?;
        let mut report = BulkReport::default();
        if let Some(kept) = &kept {
            (report.rows, report.affected, report.commits) = (kept.rows, kept.affected, kept.commits);
            report.seq = receipt.map(|receipt| receipt.seq);
        }
        Ok((Progress::after(idempotency, kept), report))
    }

    fn after(idempotency: Idempotency, kept: Option<Kept>) -> Progress {
        let proven = kept.is_none();
        Progress { idempotency, kept, proven, bytes: 0, hash: Sha256::new() }
    }

    pub(super) fn is_proven(&self) -> bool {
        self.proven
    }

    /// Whether all of the body is committed.
    pub(super) fn is_complete(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.complete)
    }

    /// The next bytes of the body.
    pub(super) fn read(&mut self, mut bytes: &[u8]) -> Result<(), DbError> {
        if let Some(kept) = self.kept.as_ref().filter(|_| !self.proven) {
            let left = usize::try_from(kept.bytes - self.bytes).unwrap_or(usize::MAX);
            if let Some((known, rest)) = bytes.split_at_checked(left) {
                self.hash.update(known);
                self.bytes += known.len() as u64;
                let hash: [u8; 32] = self.hash.clone().finalize().into();
                if hash != kept.hash {
                    return Err(DbError::KeyReused);
                }
                self.proven = true;
                bytes = rest;
            }
        }
        if self.proven && self.is_complete() && !bytes.is_empty() {
            return Err(DbError::KeyReused);
        }
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// The body is at its end.
    pub(super) fn end(&mut self) -> Result<(), DbError> {
        self.read(&[])?;
        if self.proven { Ok(()) } else { Err(DbError::KeyReused) }
    }

    /// Refuses to go on when another request with this key has come further meanwhile.
    pub(super) fn check(&self, who: &Identity, snapshot: &Snapshot) -> Result<(), DbError> {
        let found = self.idempotency.kept(who, snapshot)?.as_ref().map(decode).transpose()?;
        if found == self.kept { Ok(()) } else { Err(DbError::KeyInUse) }
    }

    /// What a commit leaves with which the insert has come as far as `report` says.
    pub(super) fn left(&self, report: &BulkReport, complete: bool) -> Kept {
        let BulkReport { rows, affected, commits, .. } = *report;
        Kept { rows, affected, commits, bytes: self.bytes, hash: self.hash.clone().finalize().into(), complete }
    }

    pub(super) fn receipt(&self, who: &Identity, kept: &Kept) -> Result<Receipt, DbError> {
        self.idempotency.leave(who, kept)
    }

    /// It is committed.
    pub(super) fn goes_on_from(&mut self, kept: Kept) {
        self.kept = Some(kept);
    }
}

fn decode(receipt: &KeptReceipt) -> Result<Kept, DbError> {
    postcard::from_bytes(&receipt.outcome)
        .map_err(|error| StoreError::Corrupt(format!("the progress in a receipt: {error}")).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun(kept: Option<Kept>) -> Progress {
        Progress::after(Idempotency { key: "k".to_owned(), request: [0; 32] }, kept)
    }

    fn kept(body: &[u8], complete: bool) -> Kept {
        let mut progress = begun(None);
        progress.read(body).unwrap();
        progress.left(&BulkReport { rows: 3, ..BulkReport::default() }, complete)
    }

    /// Reads the pieces to their end; whether the body was taken for the one that left `kept`.
    fn is_taken(kept: &Kept, pieces: &[&[u8]]) -> bool {
        let mut progress = begun(Some(kept.clone()));
        let taken = pieces.iter().try_for_each(|piece| progress.read(piece)).and_then(|()| progress.end());
        assert!(matches!(taken, Ok(()) | Err(DbError::KeyReused)), "{taken:?}");
        taken.is_ok()
    }

    #[test]
    fn a_body_is_the_same_however_it_is_cut() {
        let body = b"{\"id\":1}\n{\"id\":2}\n";
        let (partial, complete) = (kept(&body[..11], false), kept(body, true));
        for size in 1..=body.len() {
            let pieces: Vec<&[u8]> = body.chunks(size).collect();
            assert!(is_taken(&partial, &pieces) && is_taken(&complete, &pieces), "in pieces of {size}");
        }
        // What comes behind the known part may be anything, behind the whole nothing.
        assert!(is_taken(&partial, &[&body[..11], b"else"]));
        assert!(!is_taken(&complete, &[body, b"x"]));
        // Too short, or another byte anywhere in it.
        assert!(!is_taken(&partial, &[&body[..10]]) && !is_taken(&complete, &[&body[..body.len() - 1]]));
        for at in 0..11 {
            let mut other = body.to_vec();
            other[at] ^= 1;
            assert!(!is_taken(&partial, &[&other[..5], &other[5..]]), "byte {at}");
        }
        let nothing = kept(b"", true);
        assert!(is_taken(&nothing, &[]) && !is_taken(&nothing, &[b"x"]));
    }

    #[test]
    fn nothing_may_be_written_before_the_body_is_proven() {
        let kept = kept(b"abcdef", false);
        let mut progress = begun(Some(kept));
        progress.read(b"abcde").unwrap();
        assert!(!progress.is_proven());
        progress.read(b"fgh").unwrap();
        assert!(progress.is_proven() && !progress.is_complete());
        // As if it had come in one go: what the next commit leaves fits a third sending.
        let next = progress.left(&BulkReport::default(), true);
        assert!(is_taken(&next, &[b"abcdefgh"]));
    }
}
