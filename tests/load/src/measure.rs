//! What a process uses, and how late things are.

use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Pid;

/// User and system CPU seconds of a process so far.
pub fn cpu_seconds(pid: Pid) -> f64 {
    let stat = read(pid, "stat");
    // The name in parentheses may hold anything; what follows its end is numbers, `utime` being the 12th.
    let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).map(|text| text.parse::<u64>().expect("ticks")).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// The process's own share of all its pages (PSS: pages shared with others count in parts), and its page tables.
pub fn memory_bytes(pid: Pid) -> u64 {
    kib(&read(pid, "smaps_rollup"), "Pss:") + kib(&read(pid, "status"), "VmPTE:")
}

/// What a process's thread of this name has had so far: seconds on a core, and seconds that it was ready and had none.
/// `None` where the kernel does not count that.
pub fn thread_seconds(pid: Pid, name: &str) -> Option<(f64, f64)> {
    let folder = format!("/proc/{}/task", pid.as_raw_nonzero());
    let threads = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder}: {error}"));
    // A thread may end while its folder is looked at.
    let mut threads = threads.filter_map(|thread| Some(thread.ok()?.path()));
    let is_named = |path: &PathBuf| std::fs::read_to_string(path.join("comm")).is_ok_and(|found| found.trim() == name);
    let stat = std::fs::read_to_string(threads.find(is_named)?.join("schedstat")).ok()?;
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
