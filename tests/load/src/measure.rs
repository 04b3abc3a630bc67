//! What a process uses, and how late things are.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Pid;

/// The CPU that a process has had so far.
pub struct Cpu {
    /// User and system time of all its threads, in ticks.
    ticks: u64,
    /// Seconds on a core, by the thread's folder; nothing where the kernel does not count that.
    threads: HashMap<PathBuf, f64>,
}

impl Cpu {
    pub fn of(pid: Pid) -> Cpu {
        let stat = read(pid, "stat");
        // The name in parentheses may hold anything; what follows its end is numbers, `utime` being the 12th.
        let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
        let ticks = fields.split_whitespace().skip(11).take(2).map(|text| text.parse::<u64>().expect("ticks")).sum();
        let threads = threads(pid).filter_map(|thread| schedstat(&thread).map(|(on_core, _)| (thread, on_core)));
        Cpu { ticks, threads: threads.collect() }
    }

    /// Seconds from `before` until now. A tick is 10 ms, more than a program that does little has in a whole window, so
    /// the threads' own counts are taken, unless some ended meanwhile and took theirs along.
    pub fn since(&self, before: &Cpu) -> f64 {
        let tick = 1.0 / rustix::param::clock_ticks_per_second() as f64;
        let ticks = self.ticks.saturating_sub(before.ticks) as f64 * tick;
        let spent = |(thread, now): (&PathBuf, &f64)| now - before.threads.get(thread).unwrap_or(&0.0);
        let exact: f64 = self.threads.iter().map(spent).sum();
        // User and system time are each cut off to whole ticks.
        if self.threads.is_empty() || ticks > exact + 2.0 * tick { ticks } else { exact }
    }
}

/// The process's own share of all its pages (PSS: pages shared with others count in parts), and its page tables.
pub fn memory_bytes(pid: Pid) -> u64 {
    kib(&read(pid, "smaps_rollup"), "Pss:") + kib(&read(pid, "status"), "VmPTE:")
}

/// What a process's thread of this name has had so far: seconds on a core, and seconds that it was ready and had none.
/// `None` where the kernel does not count that.
pub fn thread_seconds(pid: Pid, name: &str) -> Option<(f64, f64)> {
    let is_named = |path: &PathBuf| std::fs::read_to_string(path.join("comm")).is_ok_and(|found| found.trim() == name);
    schedstat(&threads(pid).find(is_named)?)
}

/// The folders of a process's threads.
fn threads(pid: Pid) -> impl Iterator<Item = PathBuf> {
    let folder = format!("/proc/{}/task", pid.as_raw_nonzero());
    let threads = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder}: {error}"));
    // A thread may end while its folder is looked at.
    threads.filter_map(|thread| Some(thread.ok()?.path()))
}

/// Seconds on a core, and seconds ready without one.
fn schedstat(thread: &Path) -> Option<(f64, f64)> {
    let stat = std::fs::read_to_string(thread.join("schedstat")).ok()?;
    let mut nanos = stat.split_whitespace().map(|text| text.parse::<u64>().ok());
    Some((nanos.next()?? as f64 / 1e9, nanos.next()?? as f64 / 1e9))
}

fn kib(text: &str, name: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in\n{text}"));
    let number = line.split_whitespace().nth(1).and_then(|text| text.parse::<u64>().ok());
    number.expect("a number of kB") * 1024
}

fn read(pid: Pid, file: &str) -> String {
    let path = format!("/proc/{}/{file}", pid.as_raw_nonzero());
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A bag of durations.
#[derive(Default)]
pub struct Latencies(Vec<Duration>);

impl Latencies {
    pub fn add(&mut self, one: Duration) {
        self.0.push(one);
    }

    /// The duration that this part of all stays under.
    pub fn ms(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let at = (sorted.len() as f64 * part) as usize;
        sorted.get(at.min(sorted.len().saturating_sub(1))).map_or(f64::NAN, |one| one.as_secs_f64() * 1e3)
    }
}
