//! What must agree before a stream is resumed, and what makes two live queries one group.

use std::sync::Arc;

use sha2::{Digest, Sha256};
use wire::Scope;

use super::{LiveRequest, StageRequest};
use crate::catalog::{Semantics, Table};
use crate::plugins::Stage;

/// In a position: 32 bits of the plan's SHA-256, the table's id, its schema version, 32 bits of the pipeline's SHA-256.
pub(super) struct Fingerprint {
    plan: [u8; 32],
    schema: [u8; 32],
    table: u32,
    schema_version: u32,
    pipeline: [u8; 32],
    /// Of the group alone, not in positions.
    asked: Vec<u8>,
}

impl Fingerprint {
    pub(super) fn new<'a>(
        plan: u64,
        sources: impl Iterator<Item = (&'a Arc<Table>, &'a Scope)>,
        stages: &[Stage],
        request: &LiveRequest,
        semantics: Semantics,
    ) -> Self {
        let (mut query, mut schema) = (Sha256::new(), Sha256::new());
        query.update(plan.to_le_bytes());
        query.update(format!("{:?} {:?} {semantics:?}", request.old, request.on_error));
        let (mut table, mut schema_version) = (0_u32, 0_u32);
        for (source, scope) in sources {
            query.update(format!(" {scope:?}"));
            schema.update(source.id.0.to_le_bytes());
            schema.update(source.schema_version.to_le_bytes());
            // Of one table its own numbers; of several something that differs when one of theirs does.
            table = table.wrapping_mul(0x9e37_79b9).wrapping_add(source.id.0);
            schema_version = schema_version.wrapping_mul(0x9e37_79b9).wrapping_add(source.schema_version);
        }
        let mut pipeline = Sha256::new();
        for stage in stages {
            // Length-prefixed, so that no two pipelines spell the same bytes.
            for part in stage.runs() {
                pipeline.update((part.len() as u64).to_le_bytes());
                pipeline.update(part.as_bytes());
            }
            // A feed goes on over versions. Its plugins and their parameters are then part of what was asked.
            if semantics == Semantics::Feed {
                for part in [&stage.name, &stage.params] {
                    query.update((part.len() as u64).to_le_bytes());
                    query.update(part.as_bytes());
                }
            }
        }
        Fingerprint {
            plan: query.finalize().into(),
            schema: schema.finalize().into(),
            table,
            schema_version,
            pipeline: pipeline.finalize().into(),
            asked: Vec::new(),
        }
    }

    /// Groups apart what asked for the same versions in other words: a group that looks its plugins up again, as it is
    /// pinned or not, can only do so for all of its streams alike.
    pub(super) fn asked_as(mut self, pipeline: &[StageRequest]) -> Self {
        for StageRequest { plugin, .. } in pipeline {
            self.asked.extend((plugin.len() as u64).to_le_bytes());
            self.asked.extend(plugin.bytes());
        }
        self
    }

    pub(super) fn text(&self) -> String {
        let Fingerprint { table, schema_version, .. } = self;
        format!("{}.{table:x}.{schema_version:x}.{}", hex(&self.plan[..4]), hex(&self.pipeline[..4]))
    }

    /// What two texts have in common. The table comes before the plan: after an ALTER the same `SELECT *` is another
    /// plan, and that is no mistake of the client. Texts of other builds have another number of parts: what they mean
    /// is not known, and a new snapshot is right in any case.
    pub(super) fn compare(theirs: &str, ours: &str) -> Same {
        let parts = |text: &str| <[String; 4]>::try_from(text.split('.').map(str::to_owned).collect::<Vec<_>>());
        let (Ok(theirs), Ok(ours)) = (parts(theirs), parts(ours)) else { return Same::OtherSchema };
        match [0, 1, 2, 3].map(|part| theirs[part] == ours[part]) {
            [_, false, ..] => Same::OtherQuery,
            [_, _, false, _] => Same::OtherSchema,
            [false, ..] => Same::OtherQuery,
            [.., false] => Same::OtherPipeline,
            [true, true, true, true] => Same::All,
        }
    }

    /// Equal only for equal groups: all bits of all parts.
    pub(super) fn key(&self) -> Vec<u8> {
        [&self.plan[..], &self.schema[..], &self.pipeline[..], &self.asked[..]].concat()
    }

    pub(super) fn live_id(&self) -> String {
        hex(&Sha256::digest(self.key())[..8])
    }
}

/// How far two fingerprints agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Same {
    All,
    OtherQuery,
    OtherSchema,
    OtherPipeline,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_told_apart() {
        for (theirs, same) in [
            ("aa.1.2.cc", Same::All),
            ("ab.1.2.cc", Same::OtherQuery),
            ("aa.2.2.cc", Same::OtherQuery),
            ("aa.1.1.cc", Same::OtherSchema),
            ("ab.1.1.cd", Same::OtherSchema),
            ("aa.1.2.cd", Same::OtherPipeline),
            ("aa.12.cc", Same::OtherSchema),
        ] {
            assert_eq!(Fingerprint::compare(theirs, "aa.1.2.cc"), same, "{theirs}");
        }
    }
}
