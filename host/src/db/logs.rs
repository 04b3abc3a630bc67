//! What a plugin said through `log`, for whoever may see it.

use std::collections::HashMap;

use super::{Db, DbError, Identity, unknown_namespace};
use crate::plugins::logs::{Cursor, LogLine};

/// Lines of one answer.
const LIST: usize = 1_000;

/// Some of a plugin's lines, oldest first.
#[derive(Debug)]
pub struct PluginLogs {
    pub lines: Vec<LogLine>,
    /// By hash, the version that said it: of several with the same bytes the newest.
    pub versions: HashMap<String, u32>,
    /// What to ask for next time; it means nothing to anybody else.
    pub next: String,
    /// There are more lines already.
    pub more: bool,
    /// Lines after the one where the caller was are not kept any more.
    pub missed: bool,
}

impl Db {
    /// The lines after `after` (a `next` of before), or the newest ones. What was said over a user's rows is shown to
    /// that user alone.
    pub fn plugin_logs(
        &self,
        who: &Identity,
        namespace: &str,
        plugin: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<PluginLogs, DbError> {
        let catalog = self.inner.store.catalog();
        let found = catalog.namespace(namespace).ok_or_else(|| unknown_namespace(namespace))?;
        let versions = found
            .plugins
            .get(plugin)
            .ok_or_else(|| DbError::NotFound(format!("namespace \"{namespace}\" has no plugin \"{plugin}\"")))?;
        let cursor = |text: &str| {
            let wrong = format!("`after` is what an earlier answer gave as `next`, not {text:?}");
            text.parse::<Cursor>().map_err(|()| DbError::BadRequest(wrong))
        };
        let after = after.map(cursor).transpose()?;
        let visible = |line: &LogLine| line.user.as_deref().is_none_or(|user| user == &*who.user);
        let page = self.inner.plugins.logs().read(found.id, plugin, after, limit.min(LIST), visible);
        Ok(PluginLogs {
            lines: page.lines,
            // Ascending, so that the newest stays.
            versions: versions.iter().map(|version| (version.sha256.clone(), version.version)).collect(),
            next: page.next.to_string(),
            more: page.more,
            missed: page.missed,
        })
    }
}
