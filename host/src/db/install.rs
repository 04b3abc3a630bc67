//! Plugins come and go: an upload is checked, tried, and becomes active by a commit with a seq.

use std::sync::Arc;

use bytes::Bytes;

use super::audit::Event;
use super::{Db, DbError, Identity, Installed, blocking, now_micros, unknown_namespace};
use crate::catalog::{Catalog, NamespaceId, Plugin};
use crate::config::Role;
use crate::plugins::Inspected;
use crate::sql::Refusal;
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
        may_install(who, "upload", namespace, name)?;
        check_name(name)?;
        if self.inner.store.catalog().namespace(namespace).is_none() {
            return Err(unknown_namespace(namespace));
        }
        let plugins = self.inner.plugins.clone();
        let inspected = blocking(move || plugins.inspect(&body)).await??;
        let measured = Some(inspected.measured);

        for _ in 0..TRIES {
            let snapshot = self.inner.store.snapshot();
            let catalog = snapshot.catalog();
            let Some(found) = catalog.namespace(namespace) else { return Err(unknown_namespace(namespace)) };
            let active = catalog.plugin(namespace, name);
            if let Some(plugin) = active.filter(|plugin| plugin.sha256 == inspected.sha256) {
                let (plugin, seq) = (plugin.clone(), snapshot.seq());
                return Ok(Installed { plugin, seq, unchanged: true, measured });
            }
            let version = catalog.next_plugin_version(namespace, name);
            let plugin = Arc::new(describe(who, (found.id, namespace), name, version, &inspected));
            let write = CatalogWrite::PutPlugin { plugin: plugin.clone(), wasm: inspected.wasm.clone() };
            let said = activation(who, "upload", &plugin);
            match self.catalog_commit(found.id, snapshot.seq(), write, &said).await? {
                Some(seq) => return Ok(Installed { plugin, seq, unchanged: false, measured }),
                None => continue,
            }
        }
        Err(DbError::Conflict)
    }

    /// Makes an earlier version's module the active one again: as a version of its own, because a version's number says
    /// when it was active. Without a number, the version before the one whose module is active, so that going back once
    /// more never leads to what was gone back from.
    pub async fn roll_back(
        &self,
        who: &Identity,
        namespace: &str,
        name: &str,
        version: Option<u32>,
    ) -> Result<Installed, DbError> {
        self.check_open()?;
        may_install(who, "rollback", namespace, name)?;
        for _ in 0..TRIES {
            let snapshot = self.inner.store.snapshot();
            let catalog = snapshot.catalog();
            let versions = versions(catalog, namespace, name)?;
            let target = match version {
                Some(version) => versions.iter().find(|plugin| plugin.version == version),
                None => earlier(versions),
            };
            let (Some(target), Some(active)) = (target, versions.last()) else {
                return Err(DbError::NotFound(nowhere_back(name, version, versions)));
            };
            if target.sha256 == active.sha256 {
                let (plugin, seq) = (active.clone(), snapshot.seq());
                return Ok(Installed { plugin, seq, unchanged: true, measured: None });
            }
            let wasm = self.inner.store.plugin_wasm(&target.sha256)?;
            let wasm = wasm.ok_or_else(|| DbError::Internal(format!("the module {} is not stored", target.sha256)))?;
            let plugin = Arc::new(Plugin {
                version: catalog.next_plugin_version(namespace, name),
                uploaded_at: now_micros(),
                uploaded_by: who.user.to_string(),
                restored: Some(target.upload()),
                ..Plugin::clone(target)
            });
            let write = CatalogWrite::PutPlugin { plugin: plugin.clone(), wasm };
            let said = activation(who, "rollback", &plugin);
            if let Some(seq) = self.catalog_commit(plugin.namespace, snapshot.seq(), write, &said).await? {
                return Ok(Installed { plugin, seq, unchanged: false, measured: None });
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

    /// Removes a plugin with all its versions. Refused while a live query runs through it. In a task: who goes away does
    /// not leave it half removed.
    pub async fn uninstall(&self, who: &Identity, namespace: &str, name: &str) -> Result<Seq, DbError> {
        self.check_open()?;
        may_install(who, "delete", namespace, name)?;
        let (db, who, namespace, name) = (self.clone(), who.clone(), namespace.to_owned(), name.to_owned());
        let task = tokio::spawn(async move { db.remove(&who, &namespace, &name).await });
        task.await.map_err(|error| DbError::Internal(error.to_string()))?
    }

    async fn remove(&self, who: &Identity, namespace: &str, name: &str) -> Result<Seq, DbError> {
        for _ in 0..TRIES {
            let snapshot = self.inner.store.snapshot();
            let Some(plugin) = snapshot.catalog().plugin(namespace, name) else {
                return Err(DbError::NotFound(format!("namespace \"{namespace}\" has no plugin \"{name}\"")));
            };
            let _deletion = self.inner.plugin_uses.delete(namespace, name)?;
            let write = CatalogWrite::DropPlugin { namespace: namespace.to_owned(), name: name.to_owned() };
            let said = Event::done(Some(who), "plugin", "delete", &format!("{namespace}.{name}"));
            if let Some(seq) = self.catalog_commit(plugin.namespace, snapshot.seq(), write, &said).await? {
                self.inner.plugins.forget(plugin.namespace, name);
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
        said: &Event,
    ) -> Result<Option<Seq>, DbError> {
        let transaction = Transaction { namespace, base, rows: Vec::new(), catalog: vec![write], receipt: None };
        match self.inner.store.commit_audited(transaction, vec![said.record()]).await {
            Ok(seq) => Ok(Some(seq)),
            Err(CommitError::Stale) => Ok(None),
            Err(error) => Err(DbError::Commit(error)),
        }
    }
}

fn versions<'c>(catalog: &'c Catalog, namespace: &str, name: &str) -> Result<&'c [Arc<Plugin>], DbError> {
    let found = catalog.namespace(namespace).ok_or_else(|| unknown_namespace(namespace))?;
    found.plugins.get(name).map(Vec::as_slice).ok_or_else(|| {
        let hint = match name.split_once('/') {
            Some((_, name)) => format!("say {name} alone: plugins are taken from the namespace of the request"),
            None if check_name(name).is_err() => "names have a-z, 0-9, _ and - alone".to_owned(),
            None => format!("upload it with PUT /v1/plugins/{namespace}/{name}"),
        };
        DbError::NotFound(format!(
            "namespace \"{namespace}\" has no plugin \"{name}\" (GET /v1/plugins lists those it has); {hint}"
        ))
    })
}

/// The newest version before the upload that is active (again), but for modules that were gone back from since.
fn earlier(versions: &[Arc<Plugin>]) -> Option<&Arc<Plugin>> {
    let base = versions.last()?.upload();
    let left = |module: &Plugin| {
        let mut uploads = versions.iter().filter(|other| other.version >= base && other.restored.is_none());
        uploads.any(|other| other.sha256 == module.sha256)
    };
    versions.iter().rev().find(|plugin| plugin.version < base && !left(plugin))
}

/// Why there is no version to go back to, and what can be done.
fn nowhere_back(name: &str, version: Option<u32>, versions: &[Arc<Plugin>]) -> String {
    let there_are = there_are(versions);
    if let Some(version) = version {
        return format!("plugin \"{name}\" has no version {version}; {there_are}");
    }
    match versions.last().and_then(|active| active.restored) {
        Some(first) => format!(
            "plugin \"{name}\" has no earlier version than {first}, whose module is active; {there_are}: say which \
             (\"version\"), or upload a mended one"
        ),
        None => format!("plugin \"{name}\" has no earlier version to go back to; {there_are}: upload a mended one"),
    }
}

/// The version that `name`, `name@3` or `name@sha256:…` means.
pub(super) fn stored_version(catalog: &Catalog, namespace: &str, asked: &str) -> Result<Arc<Plugin>, DbError> {
    let (name, pin) = match asked.split_once('@') {
        Some((name, pin)) => (name, Some(pin)),
        None => (asked, None),
    };
    let versions = versions(catalog, namespace, name)?;
    let wanted = match pin {
        None => versions.last(),
        Some(pin) => match pin.strip_prefix("sha256:") {
            Some(hash) => versions.iter().rev().find(|plugin| plugin.sha256.eq_ignore_ascii_case(hash)),
            None => {
                let version: u32 = pin.parse().map_err(|_| {
                    DbError::BadRequest(format!("\"{asked}\": after @ comes a version number or sha256:…"))
                })?;
                versions.iter().find(|plugin| plugin.version == version)
            }
        },
    };
    wanted.cloned().ok_or_else(|| {
        let hash = pin.and_then(|pin| pin.strip_prefix("sha256:"));
        let part = match hash {
            Some(hash) if hash.len() != 64 => " (the whole hash is needed, 64 hexadecimal digits)",
            _ => "",
        };
        DbError::NotFound(format!("plugin \"{asked}\": no such version{part}; {}", there_are(versions)))
    })
}

fn there_are(versions: &[Arc<Plugin>]) -> String {
    match versions {
        [only] => format!("there is {} alone", only.version),
        _ => {
            let known: Vec<String> = versions.iter().map(|plugin| plugin.version.to_string()).collect();
            format!("there are {}", known.join(", "))
        }
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
        restored: None,
    }
}

/// Another version is active; by what, and under which number.
fn activation(who: &Identity, what: &'static str, plugin: &Plugin) -> Event {
    let object = format!("{}.{}@{}", plugin.namespace_name, plugin.name, plugin.version);
    Event::done(Some(who), "plugin", what, &object)
}

pub(super) fn may_install(who: &Identity, what: &'static str, namespace: &str, name: &str) -> Result<(), DbError> {
    if who.role == Role::Admin {
        return Ok(());
    }
    let message = "uploading, trying, rolling back and removing plugins needs the role admin".to_owned();
    Err(DbError::Forbidden(Box::new(Refusal { what, object: format!("{namespace}.{name}"), message })))
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
