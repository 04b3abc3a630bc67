//! One client's cursor into a group.

use bytes::Bytes;

use super::PipelineFault;
use crate::store::Seq;

/// Why a subscription ended.
#[derive(Clone, Debug)]
pub enum EndReason {
    /// The group's pipeline failed at a commit; nothing of that commit was sent. `seq` is the last position before it.
    Pipeline {
        fault: PipelineFault,
        seq: Seq,
    },
    /// A row could not be evaluated.
    Program {
        message: String,
        seq: Seq,
    },
    TableDropped,
    /// A plugin of the pipeline has another active version from this seq on.
    PluginChanged {
        name: String,
    },
    PluginDropped {
        name: String,
    },
    Shutdown,
}

/// The next thing for the subscriber.
#[derive(Clone, Debug)]
pub enum Delivery {
    /// Encoded events, whole commits (or pieces of the snapshot); `seq` is the cursor after them.
    Events {
        bytes: Bytes,
        seq: Seq,
    },
    /// Snapshot or catch-up complete at this seq; then also as idle progress at the heartbeat.
    UpToDate(Seq),
    /// The cursor fell behind the log: a snapshot has to follow (`resync`, reason expired).
    Expired,
    End(EndReason),
}

/// One client's cursor. Dropping it leaves the group.
pub struct Subscription {
    // filled by the live module's author
}

impl Subscription {
    /// Waits for the next delivery. Cancel-safe.
    pub async fn next(&mut self) -> Delivery {
        todo!()
    }
}
