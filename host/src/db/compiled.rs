//! Live queries as they were compiled, kept for whoever asks the same.
//!
//! When a server comes back, so do its streams, thousands of which ask a few things: the first of them compiles, the
//! others wait for that and share it, and so do those that follow. What is kept is found by all that it was made from,
//! the catalog's version among it, so an ALTER or the activation of a plugin is another question. Who asks is a part of
//! it only where the query says `current_user` or runs again as a whole over rows of a user's own; a filter of a user's
//! own rows is compiled once for all users, and each gets it over theirs.
//!
//! A plugin that does not fit is kept for a while, too: when a bad version is activated, all streams that run through it
//! come at once, and again at each change of the catalog until another one is.

use std::sync::Arc;
use std::time::Instant;

use quick_cache::sync::{Cache, DefaultLifecycle, PlaceholderGuard};
use quick_cache::{DefaultHashBuilder, Weighter};
use sha2::{Digest, Sha256};
use wire::Scope;

use super::adapters::HOST_REST;
use super::fingerprint::Fingerprint;
use super::streams::Shown;
use super::{DbError, Identity, LiveRequest};
use crate::catalog::DEFAULT_NAMESPACE;
use crate::live::GroupSpec;
use crate::plugins::{PluginError, Stage};

/// What is kept altogether, roughly. The groups of open streams hold the larger part of their entries anyway.
const KEPT_BYTES: u64 = 16 << 20;
/// Some of these are in it.
const KEPT: usize = 1_024;
/// One that filters, roughly: names, anchors, constants; and one that is run again, which has a whole plan.
const FILTER_BYTES: u64 = 4 << 10;
const REQUERY_BYTES: u64 = 32 << 10;
/// And of each byte that it was asked in.
const BYTES_PER_BYTE: u64 = 24;

/// A request compiled against one catalog.
#[derive(Clone)]
pub(super) struct Compiled {
    pub spec: Arc<GroupSpec>,
    pub shown: Arc<Shown>,
    /// The version of the catalog that was compiled against.
    pub catalog_version: u64,
    /// The plan's fingerprint, which knows no user.
    pub plan: u64,
    pub whose: Whose,
}

/// For whom it was compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// For everybody of a role alike.
    Everybody,
    /// Over a user's own rows, and the same for every user but for that.
    OwnRows,
    /// For one user alone.
    User,
}

/// The cache. What was compiled is good for ever, because what it was made from never changes; the least used go first.
pub(super) struct CompiledQueries {
    kept: Cache<[u8; 32], Kept, ByWeight>,
}

#[derive(Clone)]
enum Kept {
    Compiled {
        compiled: Compiled,
        weight: u64,
    },
    /// Another one for each user, under a key with the user in it.
    ByUser,
    /// A stage did not fit. That may have been a bad moment of ours, so it is looked at again after this.
    Unfit {
        stage: Box<Stage>,
        error: Box<PluginError>,
        until: Instant,
        weight: u64,
    },
}

type Guard<'a> = PlaceholderGuard<'a, [u8; 32], Kept, ByWeight, DefaultHashBuilder, DefaultLifecycle<[u8; 32], Kept>>;

#[derive(Clone)]
struct ByWeight;

impl Weighter<[u8; 32], Kept> for ByWeight {
    fn weight(&self, _: &[u8; 32], kept: &Kept) -> u64 {
        match kept {
            Kept::Compiled { weight, .. } | Kept::Unfit { weight, .. } => *weight,
            Kept::ByUser => 256,
        }
    }
}

impl CompiledQueries {
    pub(super) fn new() -> CompiledQueries {
        CompiledQueries { kept: Cache::with_weighter(KEPT, KEPT_BYTES, ByWeight) }
    }

    /// What was compiled for the same request, or what `compile` gives now. Of many who ask at once one compiles. Where
    /// that fails for anything but a plugin that does not fit, or its client goes, the next one tries by itself.
    ///
    /// `catalog` is the version that is visible to the caller before this is called: the answer may have been compiled
    /// against a newer one, never against an older one.
    pub(super) async fn get(
        &self,
        catalog: u64,
        who: &Identity,
        request: &LiveRequest,
        compile: impl Future<Output = Result<Compiled, DbError>>,
    ) -> Result<Compiled, DbError> {
        let asked = asked(catalog, who, request);
        let of_user = || digest(&format!("{asked} of {:?}", who.user));
        let mut found = self.find(&digest(&asked)).await;
        let by_user = matches!(found, Ok(Kept::ByUser));
        if by_user {
            found = self.find(&of_user()).await;
        }
        let guard = match found {
            Ok(Kept::Compiled { compiled, .. }) => return Ok(compiled.over_rows_of(who, request)),
            Ok(Kept::Unfit { stage, error, .. }) => return Err(DbError::Stage { stage, error }),
            Ok(Kept::ByUser) => return Err(DbError::Internal("a user's live query is kept as everybody's".into())),
            Err(guard) => guard,
        };
        let compiled = compile.await;
        // What could not be put there is answered all the same.
        let _ = match &compiled {
            Ok(compiled) if compiled.whose == Whose::User && !by_user => {
                self.kept.insert(of_user(), kept(compiled, &asked));
                guard.insert(Kept::ByUser)
            }
            Ok(compiled) => guard.insert(kept(compiled, &asked)),
            Err(DbError::Stage { stage, error }) => {
                let until = Instant::now() + HOST_REST;
                // Both may quote the request.
                let weight = FILTER_BYTES + BYTES_PER_BYTE * asked.len() as u64;
                guard.insert(Kept::Unfit { stage: stage.clone(), error: error.clone(), until, weight })
            }
            Err(_) => return compiled,
        };
        compiled
    }

    /// What is there and still good, or the right to put it there.
    async fn find(&self, key: &[u8; 32]) -> Result<Kept, Guard<'_>> {
        self.kept.remove_if(key, |kept| matches!(kept, Kept::Unfit { until, .. } if *until <= Instant::now()));
        self.kept.get_value_or_guard_async(key).await
    }
}

fn kept(compiled: &Compiled, asked: &str) -> Kept {
    let own = if compiled.spec.requery.is_some() { REQUERY_BYTES } else { FILTER_BYTES };
    Kept::Compiled { compiled: compiled.clone(), weight: own + BYTES_PER_BYTE * asked.len() as u64 }
}

/// All that compiling looks at but the user. The server's settings never change while it runs.
fn asked(catalog: u64, who: &Identity, request: &LiveRequest) -> String {
    // All fields by name: one that is added has its place here or is left out on purpose. Where a stream begins, and how
    // many rows come first, is none of the query's business; whether it is asked for at all is.
    let LiveRequest { sql, params, namespace, pipeline, on_error, snapshot: _, last_rows, old, position: _ } = request;
    let namespace = namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
    let last_rows = last_rows.is_some();
    format!("{:?}", (catalog, who.role, namespace, sql, params, pipeline, on_error, last_rows, old))
}

fn digest(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

impl Compiled {
    /// Somebody else's plan for this user: the same, over their rows.
    fn over_rows_of(self, who: &Identity, request: &LiveRequest) -> Compiled {
        let scope = Scope::User(who.user.to_string());
        if self.whose != Whose::OwnRows || self.spec.scope == scope {
            return self;
        }
        let theirs = &*self.spec;
        let sources = [(&theirs.table, &scope)].into_iter();
        let fingerprint = Fingerprint::new(self.plan, sources, &theirs.stages, request, theirs.semantics);
        let spec = GroupSpec {
            key: fingerprint.key(),
            live_id: fingerprint.live_id(),
            fingerprint: fingerprint.text(),
            scope,
            ..theirs.clone()
        };
        Compiled { spec: Arc::new(spec), ..self }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;
    use crate::config::Role;
    use crate::db::subscribe::tests::{request, who};

    async fn unfit() -> Result<Compiled, DbError> {
        let stage = Stage { name: "p".to_owned(), version: 1, sha256: String::new(), params: String::new() };
        Err(DbError::Stage { stage: Box::new(stage), error: Box::new(PluginError::Params("no".to_owned())) })
    }

    /// Any user can ask for as many things that do not fit as they like, each as long as a request may be.
    #[tokio::test]
    async fn what_does_not_fit_is_kept_and_weighs_what_its_request_does() {
        let (queries, alice) = (CompiledQueries::new(), who("alice", Role::User));
        let small = request("SELECT id FROM t", None);
        for compile in [unfit().boxed(), async { panic!("it is known") }.boxed()] {
            let error = queries.get(1, &alice, &small, compile).await.err().expect("it does not fit");
            assert!(matches!(error, DbError::Stage { .. }), "{error}");
        }
        const LONG: usize = 100_000;
        for number in 0..1_000 {
            let long = request(&format!("{number}{}", " ".repeat(LONG)), None);
            assert!(queries.get(1, &alice, &long, unfit()).await.is_err());
        }
        assert!(queries.kept.len() * LONG <= KEPT_BYTES as usize, "{} are kept", queries.kept.len());
    }
}
