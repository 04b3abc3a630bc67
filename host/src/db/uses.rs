//! Which plugins live streams run through: one in use is not deleted, and one that is being deleted comes into no use.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::DbError;

/// Namespace and name.
type Plugin = (String, String);

#[derive(Default)]
pub(super) struct PluginUses(Mutex<HashMap<Plugin, Use>>);

enum Use {
    /// By so many live streams, at least one.
    Streams(usize),
    Deletion,
}

impl PluginUses {
    /// Counts a stream in, for as long as the answer lives. `None`: it runs through no plugin.
    pub(super) fn enter(self: &Arc<Self>, plugins: Vec<Plugin>) -> Result<Option<Box<InUse>>, DbError> {
        if plugins.is_empty() {
            return Ok(None);
        }
        let mut uses = self.lock();
        let deleted = |plugin: &&Plugin| matches!(uses.get(*plugin), Some(Use::Deletion));
        if let Some((_, name)) = plugins.iter().find(deleted) {
            return Err(DbError::Busy(format!("plugin \"{name}\" is being deleted")));
        }
        for plugin in &plugins {
            if let Use::Streams(count) = uses.entry(plugin.clone()).or_insert(Use::Streams(0)) {
                *count += 1;
            }
        }
        Ok(Some(Box::new(InUse { uses: self.clone(), plugins })))
    }

    /// Refused while a stream runs through it; no stream does, for as long as the answer lives.
    pub(super) fn delete(self: &Arc<Self>, namespace: &str, name: &str) -> Result<InDeletion, DbError> {
        let plugin = (namespace.to_owned(), name.to_owned());
        match self.lock().entry(plugin.clone()) {
            Entry::Vacant(entry) => entry.insert(Use::Deletion),
            Entry::Occupied(entry) => {
                return Err(DbError::InUse(match entry.get() {
                    Use::Streams(count) => format!(
                        "plugin \"{name}\" is used by {count} live stream(s); end them first, or upload another version"
                    ),
                    Use::Deletion => format!("plugin \"{name}\" is being deleted by another request"),
                }));
            }
        };
        Ok(InDeletion { uses: self.clone(), plugin })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Plugin, Use>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream's use of its plugins.
pub(super) struct InUse {
    uses: Arc<PluginUses>,
    plugins: Vec<Plugin>,
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut uses = self.uses.lock();
        for plugin in &self.plugins {
            match uses.get_mut(plugin) {
                Some(Use::Streams(count)) if *count > 1 => *count -= 1,
                _ => drop(uses.remove(plugin)),
            }
        }
    }
}

pub(super) struct InDeletion {
    uses: Arc<PluginUses>,
    plugin: Plugin,
}

impl Drop for InDeletion {
    fn drop(&mut self) {
        self.uses.lock().remove(&self.plugin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plugin(name: &str) -> Plugin {
        ("main".to_owned(), name.to_owned())
    }

    /// They were counted, and then the plugin was dropped in a commit: a stream that began in between was cut off.
    #[test]
    fn what_is_deleted_is_in_no_use_and_comes_into_none() {
        let uses = Arc::new(PluginUses::default());
        let one = uses.enter(vec![plugin("a"), plugin("b"), plugin("a")]).unwrap();
        let other = uses.enter(vec![plugin("b")]).unwrap();
        assert!(matches!(uses.delete("main", "a"), Err(DbError::InUse(_))));
        drop(one);
        let deletion = uses.delete("main", "a").unwrap();
        assert!(matches!(uses.delete("main", "a"), Err(DbError::InUse(_))));
        assert!(matches!(uses.delete("main", "b"), Err(DbError::InUse(_))));
        drop(other);
        assert!(matches!(uses.enter(vec![plugin("b"), plugin("a")]), Err(DbError::Busy(_))));
        drop(uses.delete("main", "b").expect("the refused one is not counted"));
        assert!(uses.delete("other", "a").is_ok());
        drop(deletion);
        drop(uses.enter(vec![plugin("a")]).unwrap());
        assert!(uses.lock().is_empty());
    }
}
