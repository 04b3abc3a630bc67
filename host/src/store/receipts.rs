//! Receipts of writes that their clients may send again: what was answered, kept in the very batch that wrote.
//!
//! ```text
//! r/{id 32}                  the receipt
//! e/{commit time i64}{id 32} nothing: the receipts in the order they come to their end
//! ```
//!
//! The id is a hash of user and key, made by whoever knows them. A receipt that is too old is as none, also before the
//! retention thread has removed it.

use rocksdb::{DB, Direction, IteratorMode, WriteBatch};
use serde::{Deserialize, Serialize};

use super::{Seq, StoreError, read_error};

pub type ReceiptId = [u8; 32];

/// What a transaction leaves beside its rows, for the case that its client never hears of it.
#[derive(Clone, Debug)]
pub struct Receipt {
    pub id: ReceiptId,
    /// Of the request: another one under the same key is a mistake.
    pub request: [u8; 32],
    /// What is answered; for the layers above to read.
    pub outcome: Vec<u8>,
}

/// A receipt as it is found again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptReceipt {
    #[serde(with = "seq")]
    pub seq: Seq,
    pub committed_at: i64,
    pub request: [u8; 32],
    pub outcome: Vec<u8>,
}

mod seq {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Seq;

    pub(super) fn serialize<S: Serializer>(seq: &Seq, serializer: S) -> Result<S::Ok, S::Error> {
        seq.0.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Seq, D::Error> {
        u64::deserialize(deserializer).map(Seq)
    }
}

const RECEIPTS: &[u8] = b"r/";
const ENDS: &[u8] = b"e/";
const RECORD_VERSION: u8 = 1;
/// Removed in one look of the retention thread: a batch of a few megabytes at most.
const SWEPT: usize = 10_000;

pub(super) fn receipt_key(id: &ReceiptId) -> Vec<u8> {
    [RECEIPTS, id].concat()
}

fn end_key(committed_at: i64, id: &[u8]) -> Vec<u8> {
    [ENDS, &committed_at.to_be_bytes(), id].concat()
}

/// Adds the receipt to the batch of its transaction.
pub(super) fn put(batch: &mut WriteBatch, receipt: &Receipt, seq: Seq, committed_at: i64) -> Result<(), StoreError> {
    let kept = KeptReceipt { seq, committed_at, request: receipt.request, outcome: receipt.outcome.clone() };
    let record = postcard::to_extend(&kept, vec![RECORD_VERSION])
        .map_err(|error| StoreError::Corrupt(format!("a receipt cannot be encoded: {error}")))?;
    batch.put(receipt_key(&receipt.id), record);
    batch.put(end_key(committed_at, &receipt.id), b"");
    Ok(())
}

pub(super) fn decode(record: &[u8]) -> Result<KeptReceipt, StoreError> {
    let bytes = record.strip_prefix(&[RECORD_VERSION]).ok_or_else(damaged)?;
    postcard::from_bytes(bytes).map_err(|_| damaged())
}

fn damaged() -> StoreError {
    StoreError::Corrupt("the receipt of a write cannot be read".to_owned())
}

/// Removes receipts of commits at or before `oldest`. To be called while no receipt is written: one that took the place
/// of an old one under the same id would go with it.
pub(super) fn sweep(db: &DB, oldest: i64, batch: &mut WriteBatch) -> Result<(), StoreError> {
    for entry in db.iterator(IteratorMode::From(ENDS, Direction::Forward)).take(SWEPT) {
        let (key, _) = entry.map_err(read_error)?;
        let Some((time, id)) = key.strip_prefix(ENDS).and_then(|rest| rest.split_first_chunk()) else { break };
        let committed_at = i64::from_be_bytes(*time);
        if committed_at > oldest {
            break;
        }
        let receipt = [RECEIPTS, id].concat();
        if let Some(record) = db.get(&receipt).map_err(read_error)?
            && decode(&record)?.committed_at == committed_at
        {
            batch.delete(receipt);
        }
        batch.delete(key);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_pinned() {
        let kept = KeptReceipt { seq: Seq(300), committed_at: -1, request: [7; 32], outcome: vec![9] };
        let bytes = postcard::to_extend(&kept, vec![RECORD_VERSION]).unwrap();
        let expected = [&[1, 0xac, 0x02, 1][..], &[7; 32], &[1, 9]].concat();
        assert_eq!(bytes, expected);
        assert_eq!(decode(&bytes).unwrap(), kept);
        assert!(decode(&bytes[1..]).is_err() && decode(&[]).is_err());
        assert_eq!(receipt_key(&[3; 32])[..3], *b"r/\x03");
        assert_eq!(end_key(5, &[3; 32])[..11], *b"e/\0\0\0\0\0\0\0\x05\x03");
    }
}
