//! What a process uses, as the kernel counts it.

use rustix::process::Pid;

/// A line of the process's status that has a number of kB, such as `VmRSS` (what it has) or `VmHWM` (the most it had),
/// in bytes.
pub fn status_bytes(pid: Pid, name: &str) -> u64 {
    let status = read(pid, "status");
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let line = line.unwrap_or_else(|| panic!("no {name} in\n{status}"));
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().expect("a number of kB");
    kib * 1024
}

/// `VmHWM` is from now on the most there was since now.
pub fn forget_peak(pid: Pid) {
    let path = format!("/proc/{}/clear_refs", pid.as_raw_nonzero());
    std::fs::write(&path, "5").unwrap_or_else(|error| panic!("{path}: {error}"));
}

/// User and system CPU seconds so far.
pub fn cpu_seconds(pid: Pid) -> f64 {
    let stat = read(pid, "stat");
    // The name in parentheses may hold anything; what follows its end is numbers, `utime` being the 12th.
    let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).map(|text| text.parse::<u64>().expect("ticks")).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

fn read(pid: Pid, file: &str) -> String {
    let path = format!("/proc/{}/{file}", pid.as_raw_nonzero());
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}
