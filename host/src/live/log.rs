//! Reading the change log in bounded pieces: for a worker behind the commits in memory, and for a subscriber behind its
//! group's tail.

use bytes::Bytes;

use crate::catalog::NamespaceId;
use crate::store::snapshot::{LogScan, Snapshot};
use crate::store::{Seq, Store, StoreError};

/// Commits of one piece. Live work goes between pieces, so a piece is a matter of milliseconds.
const PIECE_COMMITS: usize = 256;

#[derive(Clone, Debug)]
pub(super) struct LoggedCommit {
    pub seq: Seq,
    pub namespace: NamespaceId,
    pub frame: Bytes,
}

#[derive(Debug)]
pub(super) struct LogPiece {
    pub commits: Vec<LoggedCommit>,
    /// All commits of the namespaces up to here are in this piece or were before it.
    pub end: Seq,
}

/// The next commits of `namespaces` after `after` and up to `until`, in seq order: at least one if there is one, then
/// until about `bytes` are read. [`StoreError::Expired`] where the log no longer has all that follows `after`.
pub(super) fn read_piece(
    store: &Store,
    namespaces: impl IntoIterator<Item = NamespaceId>,
    after: Seq,
    until: Option<Seq>,
    bytes: usize,
) -> Result<LogPiece, StoreError> {
    // Read before the snapshot is taken, so that the snapshot has all of it; what is later waits for its sync.
    let durable = store.durable();
    let until = until.map_or(durable, |until| until.min(durable));
    let piece = read(&store.snapshot(), namespaces, after, until, bytes);
    // Asked after reading, and the store raises its floor before it trims: what went meanwhile cannot have made a
    // silent hole in the piece.
    let floor = store.log_floor();
    if after < floor {
        return Err(StoreError::Expired { position: after, floor });
    }
    piece
}

fn read(
    snapshot: &Snapshot,
    namespaces: impl IntoIterator<Item = NamespaceId>,
    after: Seq,
    until: Seq,
    bytes: usize,
) -> Result<LogPiece, StoreError> {
    let end = until.min(snapshot.seq()).max(after);
    let mut merged = Merged::start(snapshot, namespaces, after)?;
    let (mut commits, mut read) = (Vec::new(), 0);
    while let Some(commit) = merged.next()? {
        if commit.seq > end {
            break;
        }
        let seq = commit.seq;
        read += commit.frame.len();
        commits.push(commit);
        if read >= bytes || commits.len() >= PIECE_COMMITS {
            return Ok(LogPiece { commits, end: seq });
        }
    }
    Ok(LogPiece { commits, end })
}

/// The logs of several namespaces in one order.
struct Merged {
    scans: Vec<Ahead>,
}

/// One namespace's log, read one commit ahead.
struct Ahead {
    scan: LogScan,
    namespace: NamespaceId,
    next: Option<(Seq, Bytes)>,
}

impl Merged {
    fn start(
        snapshot: &Snapshot,
        namespaces: impl IntoIterator<Item = NamespaceId>,
        after: Seq,
    ) -> Result<Self, StoreError> {
        let mut scans = Vec::new();
        for namespace in namespaces {
            let mut scan = snapshot.log(namespace, after);
            let next = scan.next_commit()?;
            scans.push(Ahead { scan, namespace, next });
        }
        Ok(Merged { scans })
    }

    fn next(&mut self) -> Result<Option<LoggedCommit>, StoreError> {
        let waiting = self.scans.iter_mut().filter(|ahead| ahead.next.is_some());
        let Some(first) = waiting.min_by_key(|ahead| ahead.next.as_ref().map(|(seq, _)| *seq)) else {
            return Ok(None);
        };
        let after = first.scan.next_commit()?;
        let taken = std::mem::replace(&mut first.next, after);
        Ok(taken.map(|(seq, frame)| LoggedCommit { seq, namespace: first.namespace, frame }))
    }
}
