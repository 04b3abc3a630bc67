//! What is counted: bytes by the allocator, memory and CPU time by the system; and how it is printed.

use std::alloc::{GlobalAlloc, Layout};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use mimalloc::MiMalloc;
use rustix::time::{ClockId, clock_gettime};

/// The server's allocator, with the bytes counted that are allocated now, that were at most, and that ever were.
///
/// RocksDB has an allocator of its own: its memory shows in what the system says, and in what it says itself.
pub struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);
static EVER: AtomicUsize = AtomicUsize::new(0);

fn took(size: usize) {
    let held = HELD.fetch_add(size, Ordering::Relaxed) + size;
    MOST.fetch_max(held, Ordering::Relaxed);
    EVER.fetch_add(size, Ordering::Relaxed);
}

fn gave(size: usize) {
    HELD.fetch_sub(size, Ordering::Relaxed);
}

// SAFETY: every call goes to the server's allocator as it came; only numbers are kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        gave(layout.size());
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // The old and the new place together would be the most that is held, but not every growth moves: the difference
        // says rather too little, and most of that for vectors that rows are collected in.
        match size.checked_sub(layout.size()) {
            Some(more) => took(more),
            None => gave(layout.size() - size),
        }
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.realloc(memory, layout, size) }
    }
}

/// Bytes allocated now.
pub fn held() -> usize {
    HELD.load(Ordering::Relaxed)
}

/// What is made, and the bytes it holds.
pub fn held_by<T>(make: impl FnOnce() -> T) -> (T, usize) {
    let before = held();
    let made = make();
    (made, held().saturating_sub(before))
}

/// What is made, and the most bytes that were held on the way, beyond those held before.
pub fn most_held<T>(make: impl FnOnce() -> T) -> (T, usize) {
    let before = held();
    MOST.store(before, Ordering::Relaxed);
    let made = make();
    (made, MOST.load(Ordering::Relaxed).saturating_sub(before))
}

/// Bytes ever allocated.
pub fn ever_allocated() -> usize {
    EVER.load(Ordering::Relaxed)
}

/// CPU seconds of this process, all threads.
pub fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// What the system says this process has in memory: its part of shared pages only (PSS).
#[derive(Clone, Copy)]
pub struct Resident {
    pub all: usize,
    /// Without the pages of files, such as the program itself.
    pub anonymous: usize,
}

pub fn resident() -> Resident {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").expect("Linux says what is in memory");
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
        line.and_then(|number| number.trim().parse::<usize>().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
            << 10
    };
    Resident { all: value("Pss:"), anonymous: value("Pss_Anon:") }
}

pub fn this_program() -> PathBuf {
    std::env::current_exe().expect("the system says which program this is")
}

pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// For people; powers of ten, so that megabytes here are those of the claims.
pub fn bytes(count: usize) -> String {
    match count {
        0..1_000 => format!("{count} B"),
        1_000..1_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.2} GB", count as f64 / 1e9),
    }
}

/// A title, a head and rows; the first cell of each is its name.
pub struct Table {
    title: String,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(title: impl Into<String>, head: &[&str]) -> Table {
        let first = [""].iter().chain(head).map(|cell| (*cell).to_owned()).collect();
        Table { title: title.into(), rows: vec![first] }
    }

    pub fn row(&mut self, name: impl Into<String>, cells: impl IntoIterator<Item = String>) {
        self.rows.push([name.into()].into_iter().chain(cells).collect());
    }

    /// With what the ancestor's text claims, which was not measured here.
    pub fn print(&self, claims: &[&str]) {
        println!("\n{}", self.title);
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |at: usize| self.rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|at| width(at).unwrap_or_default()).collect();
        for row in &self.rows {
            let cells = row.iter().zip(widths.iter().copied()).enumerate();
            let cells = cells.map(|(at, (cell, width))| match at {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
            println!("  {}", cells.collect::<Vec<_>>().join("  | ").trim_end());
        }
        for claim in claims {
            println!("  The ancestor's claim (not measured here): {claim}");
        }
    }
}
