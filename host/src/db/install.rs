//! Plugins come and go: an upload is checked, tried, and becomes active by a commit with a seq.

use std::sync::Arc;

use bytes::Bytes;

use super::{Db, DbError, Identity, Installed, blocking, now_micros, unknown_namespace};
use crate::catalog::{NamespaceId, Plugin};
use crate::config::Role;
use crate::plugins::Inspected;
use crate::store::{CatalogWrite, CommitError, Seq, Transaction};

/// An upload that meets other catalog commits tries again this often.
const TRIES: u32 = 8;

impl Db {
    /// Checks the module, tries an instance of it, and makes it the active version. Nothing changes when it is refused.
    pub async fn install(
        &self,
        who: &Identity,
        namespace: &str,
        name: &str,
        body: Bytes,
    ) -> Result<Installed, DbError> {
        self.check_open()?;
        may_install(who)?;
        check_name(name)?;
        if self.inner.store.catalog().namespace(namespace).is_none() {
            return Err(unknown_namespace(namespace));
        }
        let plugins = self.inner.plugins.clone();
        let inspected = blocking(move || plugins.inspect(&body)).await??;

        for _ in 0..TRIES {
            let snapshot = self.inner.store.snapshot();
            let catalog = snapshot.catalog();
            let Some(found) = catalog.namespace(namespace) else { return Err(unknown_namespace(namespace)) };
            let active = catalog.plugin(namespace, name);
            if let Some(plugin) = active.filter(|plugin| plugin.sha256 == inspected.sha256) {
                return Ok(Installed { plugin: plugin.clone(), seq: snapshot.seq(), unchanged: true });
            }
            let version = active.map_or(1, |plugin| plugin.version + 1);
            let plugin = Arc::new(describe(who, (found.id, namespace), name, version, &inspected));
            let write = CatalogWrite::PutPlugin { plugin: plugin.clone(), wasm: inspected.wasm.clone() };
            match self.catalog_commit(found.id, snapshot.seq(), write).await? {
                Some(seq) => return Ok(Installed { plugin, seq, unchanged: false }),
                None => continue,
            }
        }
        Err(DbError::Conflict)
    }

    /// All versions of all plugins, of one namespace or of all.
    pub fn plugins(&self, _who: &Identity, namespace: Option<&str>) -> Result<Vec<Arc<Plugin>>, DbError> {
        let catalog = self.inner.store.catalog();
        if let Some(name) = namespace
            && catalog.namespace(name).is_none()
        {
            return Err(unknown_namespace(name));
        }
        let wanted = catalog.namespaces().filter(|found| namespace.is_none_or(|name| found.name == name));
        Ok(wanted.flat_map(|found| found.plugins.values().flatten().cloned()).collect())
    }

    /// Removes a plugin with all its versions. Refused while a live query runs through it.
    pub async fn uninstall(&self, who: &Identity, namespace: &str, name: &str) -> Result<Seq, DbError> {
        self.check_open()?;
        may_install(who)?;
        for _ in 0..TRIES {
            let snapshot = self.inner.store.snapshot();
            let Some(plugin) = snapshot.catalog().plugin(namespace, name) else {
                return Err(DbError::NotFound(format!("namespace \"{namespace}\" has no plugin \"{name}\"")));
            };
            let uses = self.plugin_uses(namespace, name);
            if uses > 0 {
                return Err(DbError::InUse(format!(
                    "plugin \"{name}\" is used by {uses} live stream(s); end them first, or upload another version"
                )));
            }
            let write = CatalogWrite::DropPlugin { namespace: namespace.to_owned(), name: name.to_owned() };
            if let Some(seq) = self.catalog_commit(plugin.namespace, snapshot.seq(), write).await? {
                return Ok(seq);
            }
        }
        Err(DbError::Conflict)
    }

    /// `None`: another catalog commit came first.
    async fn catalog_commit(
        &self,
        namespace: NamespaceId,
        base: Seq,
        write: CatalogWrite,
    ) -> Result<Option<Seq>, DbError> {
        let transaction = Transaction { namespace, base, rows: Vec::new(), catalog: vec![write], receipt: None };
        match self.inner.store.commit(transaction).await {
            Ok(seq) => Ok(Some(seq)),
            Err(CommitError::Stale) => Ok(None),
            Err(error) => Err(DbError::Commit(error)),
        }
    }

    fn plugin_uses(&self, namespace: &str, name: &str) -> usize {
        let uses = self.inner.plugin_uses.lock().expect("no panic while counting");
        uses.get(&(namespace.to_owned(), name.to_owned())).copied().unwrap_or(0)
    }
}

fn describe(
    who: &Identity,
    (namespace, namespace_name): (NamespaceId, &str),
    name: &str,
    version: u32,
    inspected: &Inspected,
) -> Plugin {
    Plugin {
        namespace,
        namespace_name: namespace_name.to_owned(),
        name: name.to_owned(),
        version,
        sha256: inspected.sha256.clone(),
        kind: inspected.kind,
        abi: inspected.abi,
        manifest: inspected.manifest.clone(),
        size: inspected.wasm.len() as u64,
        uploaded_at: now_micros(),
        uploaded_by: who.user.to_string(),
    }
}

fn may_install(who: &Identity) -> Result<(), DbError> {
    if who.role == Role::Admin {
        return Ok(());
    }
    Err(DbError::Forbidden("uploading and deleting plugins needs the role admin".into()))
}

/// The name stands in URLs before `@` and `:`.
fn check_name(name: &str) -> Result<(), DbError> {
    let fits = (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-');
    if fits {
        return Ok(());
    }
    Err(DbError::BadRequest(format!("\"{name}\" cannot name a plugin: 1 to 64 of a-z, 0-9, _ and - are allowed")))
}
