//! What plugins said through `log`, in memory for whoever asks: the newest lines of each plugin. The server's own log
//! has them too; this is for those who see no such log, and for one plugin at a time.
//!
//! Everything is bounded: lines and bytes of a plugin, and plugins. Lines are numbered over all plugins, so that a
//! reader who knows the number where it stopped gets what came after it once, and is told when some of that is gone.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::catalog::NamespaceId;

/// Kept of one plugin: enough to see what led to a failure.
const LINES: usize = 1_000;
const BYTES: usize = 256 * 1024;

/// Counted for each line beside its text, so that empty lines are not free.
const LINE_COST: usize = 128;

/// Plugins with lines: with [`BYTES`] each that is 64 MiB at most. Beyond it the one that was silent longest is
/// forgotten.
const PLUGINS: usize = 256;

const _: () = assert!(BYTES / LINE_COST >= LINES, "the count of lines is a bound of its own");

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// Rises with every line of any plugin.
    pub number: u64,
    /// Microseconds since 1970.
    pub at: i64,
    pub level: &'static str,
    pub message: String,
    /// Of the module that said it.
    pub sha256: Arc<str>,
    /// Whose rows it was looking at; `None`: those of shared tables.
    pub user: Option<Arc<str>>,
}

/// Where a reader is. Of no use to another life of the server, which kept nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    life: u64,
    number: u64,
}

/// What a reader gets.
#[derive(Debug, PartialEq, Eq)]
pub struct Page {
    /// Oldest first.
    pub lines: Vec<LogLine>,
    /// What to read after next time.
    pub next: Cursor,
    /// There are more lines after `next` already.
    pub more: bool,
    /// Lines after the reader's cursor are not kept any more.
    pub missed: bool,
}

/// Who logs: an instance's module, and for whom it was made.
pub struct Speaker {
    pub logs: Arc<Logs>,
    pub namespace: NamespaceId,
    pub user: Option<Arc<str>>,
    pub sha256: Arc<str>,
}

pub struct Logs {
    life: u64,
    inner: Mutex<Inner>,
}

/// A plugin: its namespace and name.
type Key = (NamespaceId, Arc<str>);

#[derive(Default)]
struct Inner {
    /// The number of the newest line.
    newest: u64,
    kept: HashMap<Key, Kept>,
    /// The newest line of the plugins that were forgotten.
    forgotten: u64,
}

#[derive(Default)]
struct Kept {
    lines: VecDeque<LogLine>,
    bytes: usize,
    /// The newest line that had to go.
    dropped: u64,
}

impl Speaker {
    pub fn say(&self, plugin: &Arc<str>, level: &'static str, message: &str) {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as i64);
        let (sha256, user) = (self.sha256.clone(), self.user.clone());
        let line = LogLine { number: 0, at, level, message: message.to_owned(), sha256, user };
        self.logs.add(self.namespace, plugin, line);
    }
}

impl Logs {
    /// `life`: a number that no other life of the server has.
    pub fn new(life: u64) -> Logs {
        Logs { life, inner: Mutex::default() }
    }

    fn add(&self, namespace: NamespaceId, plugin: &Arc<str>, line: LogLine) {
        let mut inner = self.inner();
        inner.newest += 1;
        let line = LogLine { number: inner.newest, ..line };
        let key: Key = (namespace, plugin.clone());
        if !inner.kept.contains_key(&key) {
            inner.make_room();
        }
        // What was forgotten may have been lines of this very plugin.
        let dropped = inner.forgotten;
        let kept = inner.kept.entry(key).or_insert_with(|| Kept { dropped, ..Kept::default() });
        kept.bytes += cost(&line);
        kept.lines.push_back(line);
        while kept.lines.len() > LINES || kept.bytes > BYTES {
            let Some(oldest) = kept.lines.pop_front() else { break };
            kept.bytes -= cost(&oldest);
            kept.dropped = oldest.number;
        }
    }

    /// The lines after a cursor, up to `limit`; without one the newest. Only those that `visible` lets the reader see.
    pub fn read(
        &self,
        namespace: NamespaceId,
        plugin: &str,
        after: Option<Cursor>,
        limit: usize,
        visible: impl Fn(&LogLine) -> bool,
    ) -> Page {
        let inner = self.inner();
        let key: Key = (namespace, plugin.into());
        let kept = inner.kept.get(&key);
        let lines = kept.into_iter().flat_map(|kept| &kept.lines).filter(|line| visible(line));
        let end = Cursor { life: self.life, number: inner.newest };
        let Some(after) = after else {
            let mut lines: Vec<LogLine> = lines.rev().take(limit).cloned().collect();
            lines.reverse();
            return Page { lines, next: end, more: false, missed: false };
        };
        let same_life = after.life == self.life;
        let from = if same_life { after.number } else { 0 };
        let mut lines = lines.filter(|line| line.number > from);
        let page: Vec<LogLine> = lines.by_ref().take(limit).cloned().collect();
        let more = lines.next().is_some();
        let next = match more {
            true => Cursor { number: page.last().map_or(from, |line| line.number), ..end },
            false => end,
        };
        let dropped = kept.map_or(inner.forgotten, |kept| kept.dropped);
        Page { lines: page, next, more, missed: !same_life || from < dropped }
    }

    /// The plugin is gone, and one that is made again under its name is another one.
    pub fn forget(&self, namespace: NamespaceId, plugin: &str) {
        self.inner().forget(&(namespace, plugin.into()));
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn make_room(&mut self) {
        while self.kept.len() >= PLUGINS {
            let newest = |kept: &Kept| kept.lines.back().map_or(0, |line| line.number);
            let silent = self.kept.iter().min_by_key(|(_, kept)| newest(kept)).map(|(key, _)| key.clone());
            let Some(silent) = silent else { return };
            self.forget(&silent);
        }
    }

    fn forget(&mut self, key: &Key) {
        if let Some(kept) = self.kept.remove(key) {
            let newest = kept.lines.back().map_or(kept.dropped, |line| line.number);
            self.forgotten = self.forgotten.max(newest);
        }
    }
}

fn cost(line: &LogLine) -> usize {
    line.message.len() + LINE_COST
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{}", self.life, self.number)
    }
}

impl FromStr for Cursor {
    type Err = ();

    fn from_str(text: &str) -> Result<Cursor, ()> {
        let (life, number) = text.split_once('-').ok_or(())?;
        let life = u64::from_str_radix(life, 16).map_err(|_| ())?;
        Ok(Cursor { life, number: number.parse().map_err(|_| ())? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NS: NamespaceId = NamespaceId(1);

    fn speaker(logs: &Arc<Logs>, user: Option<&str>) -> Speaker {
        Speaker { logs: logs.clone(), namespace: NS, user: user.map(Arc::from), sha256: "ab".into() }
    }

    fn texts(page: &Page) -> Vec<&str> {
        page.lines.iter().map(|line| line.message.as_str()).collect()
    }

    #[test]
    fn a_reader_gets_every_line_once() {
        let logs = Arc::new(Logs::new(7));
        let (all, p) = (speaker(&logs, None), Arc::from("p"));
        let read = |after, limit| logs.read(NS, "p", after, limit, |_| true);
        assert_eq!(read(None, 10), Page { lines: vec![], next: "7-0".parse().unwrap(), more: false, missed: false });
        for text in ["a", "b", "c"] {
            all.say(&p, "info", text);
        }
        all.say(&Arc::from("other"), "info", "not mine");
        assert_eq!(texts(&read(None, 2)), ["b", "c"], "the newest");
        let start = "7-0".parse().ok();
        let first = read(start, 2);
        assert_eq!((texts(&first), first.more, first.missed), (vec!["a", "b"], true, false));
        let second = read(Some(first.next), 2);
        assert_eq!((texts(&second), second.more), (vec!["c"], false));
        assert_eq!(second.next.to_string().parse::<Cursor>(), Ok(second.next));
        assert!(read(Some(second.next), 2).lines.is_empty());
        all.say(&p, "warn", "d");
        assert_eq!(texts(&read(Some(second.next), 2)), ["d"]);
        assert_eq!(read(start, 0).next, start.unwrap(), "who takes nothing stays where it is");
        // A cursor of another life knows nothing of these lines.
        let restarted = read("6-3".parse().ok(), 10);
        assert_eq!((texts(&restarted), restarted.missed), (vec!["a", "b", "c", "d"], true));
        assert!("7".parse::<Cursor>().is_err() && "x-1".parse::<Cursor>().is_err());
    }

    #[test]
    fn a_users_lines_are_for_whom_the_caller_says() {
        let logs = Arc::new(Logs::new(7));
        let p = Arc::from("p");
        speaker(&logs, Some("alice")).say(&p, "info", "hers");
        speaker(&logs, None).say(&p, "info", "everybody's");
        let page = logs.read(NS, "p", None, 10, |line| line.user.is_none());
        assert_eq!(texts(&page), ["everybody's"]);
    }

    #[test]
    fn everything_has_a_bound_and_what_is_missing_is_told() {
        let logs = Arc::new(Logs::new(7));
        let (all, p) = (speaker(&logs, None), Arc::from("p"));
        let start: Cursor = "7-0".parse().unwrap();
        let count = |plugin: &str| {
            let page = logs.read(NS, plugin, Some(start), usize::MAX, |_| true);
            (page.lines.len(), page.missed)
        };
        (0..LINES).for_each(|_| all.say(&p, "info", ""));
        assert_eq!(count("p"), (LINES, false));
        all.say(&p, "info", "");
        assert_eq!(count("p"), (LINES, true));
        (0..10).for_each(|_| all.say(&p, "info", &"x".repeat(BYTES / 4)));
        assert_eq!(count("p"), (3, true));
        all.say(&p, "info", &"x".repeat(BYTES));
        assert_eq!(count("p"), (0, true), "one that is too long is not kept either");

        assert_eq!(count("q"), (0, false));
        all.say(&p, "info", "last");
        for plugin in 0..PLUGINS {
            all.say(&Arc::from(format!("p{plugin}")), "info", "hello");
        }
        assert_eq!((count("p"), count("p0")), ((0, true), (1, false)));
        logs.forget(NS, "p1");
        assert_eq!(count("p1"), (0, true));
    }
}
