//! The window: ring and worker part in sealed memfds, mapped into guest memory. The only unsafe memory code of the host.
//!
//! A window is `ring | worker part`, one after the other. The *ring* of a namespace holds the shared sections of recent
//! commits: written once by the commit side, read in place by every instance. The *worker part*, one per worker and
//! namespace, holds what a worker writes for its own calls: descriptors, parameters, rows that are not in the ring.
//! Which calls are made, and with what, is left to [`instance`](super::instance) and [`pipeline`](super::pipeline).
//!
//! # Why this is sound
//!
//! - Both parts are memfds of fixed size: sealed against shrinking and growing, with every page allocated before the
//!   first use, so that no access can end in SIGBUS when the machine is full. The host writes through a shared mapping
//!   of its own; guests get private ones, so nothing a guest does reaches the memfd.
//! - No Rust reference ever covers window bytes, neither in the host's mapping nor in a guest's memory
//!   (`Memory::data`, `read` and `write` would make one and are not used): bytes move by raw pointer copies, after a
//!   bounds check against the mapping or against the memory's present size.
//! - In the host a ring byte is only ever written, by one publisher at a time ([`Book::writing`]), and no Rust code
//!   reads it back through the host's mapping. A worker part belongs to one thread (`&mut`).
//! - A guest is told of ring bytes only under a lease. Bytes are written before their entry becomes visible (the
//!   bookkeeping mutex orders that), and bytes under a lease are not written. A guest that reads elsewhere sees torn
//!   bytes of its own namespace, and nothing that steers the host is read from there: what the host takes from guest
//!   memory is bounds-checked against sizes the host knows, and messages that may lie in the window are read byte by
//!   byte, volatile.
//! - The mapping goes over pages of the guest's linear memory, inside wasmtime's own reservation. The memory never
//!   moves (`memory_may_move(false)`), growing only touches what lies behind its present end, and dropping the store
//!   unmaps the whole reservation, our pages with it; there is nothing for us to unmap and nothing that could be
//!   unmapped twice. The on-demand allocator never hands a reservation to another instance.
//! - A guest sees the window read-only. A guest that writes there faults; the store's signal handler, on the faulting
//!   thread, then makes *this instance's* private pages writable, so that the faulting instruction (in compiled code,
//!   or in wasmtime's own `memory.copy`/`fill`/`init`) completes on a private copy, and leaves a mark. The host looks at
//!   the mark before it believes any result and drops the instance. The handler does one comparison, one atomic swap and
//!   one system call: all async-signal-safe. The pages are mapped writable first and then protected, so that the kernel
//!   has already accounted for the copy when it is needed.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, io};

use crate::telemetry::Gauge;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use rustix::process::Signal;
use wasmtime::unix::StoreExt;
use wasmtime::{AsContext, Memory, Store};
use wire::abi::{CHANGE_DESCRIPTOR_BYTES, DESCRIPTOR_BYTES, Descriptor, MAX_BATCH, WINDOW_ALIGN};

use crate::catalog::Seq;

/// Entries start on a cache line, so that two frames never share one.
const ENTRY_ALIGN: u32 = 64;

/// Where the rows of a worker part begin: behind the descriptors of the largest batch.
pub const PART_ROWS_AT: usize = MAX_BATCH * CHANGE_DESCRIPTOR_BYTES;

/// Memory of the host that guests may be given to read.
struct Region {
    /// Without one (an anonymous region) the bytes can only be copied into guests.
    fd: Option<OwnedFd>,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned by this value alone and tied to no thread.
unsafe impl Send for Region {}
// SAFETY: through `&Region` bytes are only written, in `write`, whose contract excludes two writers at one place.
unsafe impl Sync for Region {}

impl Region {
    /// A sealed memfd of `len` bytes, all allocated.
    fn memfd(name: &str, len: usize) -> io::Result<Region> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 do not know NOEXEC_SEAL; hardened ones accept nothing else.
        let fd = rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL)
            .or_else(|_| rustix::fs::memfd_create(name, flags))?;
        rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, len as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &fd, 0)?
        };
        Region::own(Some(fd), base, len)
    }

    /// Anonymous memory, where memfds or their mapping do not work.
    fn anonymous(len: usize) -> io::Result<Region> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
        };
        Region::own(None, base, len)
    }

    fn own(fd: Option<OwnedFd>, base: *mut c_void, len: usize) -> io::Result<Region> {
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let region = Region { fd, base, len };
        // Rows have no place in a core dump. SAFETY: our own mapping; the advice changes no byte.
        unsafe { rustix::mm::madvise(region.base.as_ptr().cast(), len, Advice::LinuxDontDump)? };
        Ok(region)
    }

    /// # Safety
    /// No other thread may write the same bytes at the same time.
    unsafe fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at <= self.len && bytes.len() <= self.len - at, "write inside the region");
        // SAFETY: in bounds, as just checked; `bytes` is a Rust reference and so never window memory; the caller
        // keeps other writers away.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr().add(at), bytes.len()) };
    }

    /// Puts this region over `at`, privately and for now writable.
    ///
    /// # Safety
    /// `at` must be page-aligned, and `self.len` bytes from there the caller's to replace.
    unsafe fn map_over(&self, at: *mut c_void) -> io::Result<()> {
        let fd = self.fd.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED);
        // SAFETY: the caller's contract.
        unsafe { rustix::mm::mmap(at, self.len, prot, flags, fd, 0)? };
        Ok(())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: our own mapping, unmapped once; mappings in guests are independent of it.
        if let Err(error) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%error, "a window region could not be unmapped");
        }
    }
}

/// The frames of one namespace, oldest overwritten first.
pub struct Ring {
    region: Region,
    book: Mutex<Book>,
    /// Bytes of frames held, over all rings.
    gauge: Gauge,
}

impl Ring {
    /// `len` is a multiple of [`WINDOW_ALIGN`].
    pub fn new(len: u32, gauge: Gauge) -> io::Result<Ring> {
        let region = Region::memfd("tidegate-ring", len as usize)?;
        Ok(Ring { region, book: Mutex::new(Book::new(len)), gauge })
    }

    /// Appends a frame's section and makes it visible under its seq. Where the place it would take is leased, or it is
    /// larger than the ring, it is left out: the caller never waits for a reader.
    pub fn publish(&self, seq: Seq, section: &[u8]) {
        let Ok(len) = u32::try_from(section.len()) else { return };
        let (place, freed) = {
            let mut book = self.book();
            let before = book.held;
            let place = book.reserve(seq, len);
            (place, before - book.held)
        };
        self.gauge.dec_by(freed as i64);
        let Some(offset) = place else { return };
        // SAFETY: `reserve` found the place free of leases and set it aside for us alone until `fill`.
        unsafe { self.region.write(offset as usize, section) };
        self.book().fill(seq, offset, len);
        self.gauge.inc_by(i64::from(len));
    }

    /// Keeps the bytes of a frame as they are until the lease is dropped. `None`: the ring does not have it.
    pub fn lease(self: &Arc<Self>, seq: Seq) -> Option<Lease> {
        let (offset, len) = self.book().lease(seq)?;
        Some(Lease { ring: self.clone(), seq, offset, len })
    }

    pub fn bytes(&self) -> u32 {
        self.region.len as u32
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // The sections under the lock do not panic half way; the book is whole even if a thread died near it.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let held = self.book().held;
        self.gauge.dec_by(held as i64);
    }
}

/// The right to have a frame's bytes read; they do not change while it lives.
pub struct Lease {
    ring: Arc<Ring>,
    seq: Seq,
    /// Where the frame's section starts, from the window's first byte (the ring is the window's front).
    pub offset: u32,
    pub len: u32,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.ring.book().release(self.seq);
    }
}

/// Which frames a ring holds where. Pure bookkeeping, no bytes.
///
/// Entries lie in the ring in the order of their seqs, wrapping around, so whatever is in a new frame's way is always
/// at the front of the queue.
#[derive(Debug)]
struct Book {
    capacity: u32,
    /// Where the next frame is tried.
    head: u32,
    /// A place is set aside whose bytes are being written.
    writing: bool,
    held: u64,
    entries: VecDeque<Entry>,
}

#[derive(Debug)]
struct Entry {
    seq: Seq,
    offset: u32,
    len: u32,
    leases: u32,
}

impl Book {
    fn new(capacity: u32) -> Book {
        Book { capacity, head: 0, writing: false, held: 0, entries: VecDeque::new() }
    }

    /// Finds a place and evicts what is in it. `None` leaves the ring alone.
    fn reserve(&mut self, seq: Seq, len: u32) -> Option<u32> {
        let newest = self.entries.back().is_none_or(|entry| entry.seq < seq);
        if len == 0 || len > self.capacity || self.writing || !newest {
            return None;
        }
        let mut start = self.head.next_multiple_of(ENTRY_ALIGN);
        if start > self.capacity - len {
            // What lies behind the head is older than everything at the ring's start: it goes first.
            let head = self.head;
            self.evict_while(|entry| entry.offset >= head)?;
            (self.head, start) = (0, 0);
        }
        self.evict_while(|entry| entry.offset < start + len && start < entry.offset + entry.len)?;
        self.head = start + len;
        self.writing = true;
        Some(start)
    }

    fn evict_while(&mut self, in_the_way: impl Fn(&Entry) -> bool) -> Option<()> {
        while let Some(entry) = self.entries.front().filter(|entry| in_the_way(entry)) {
            if entry.leases > 0 {
                return None;
            }
            self.held -= u64::from(entry.len);
            self.entries.pop_front();
        }
        Some(())
    }

    fn fill(&mut self, seq: Seq, offset: u32, len: u32) {
        self.writing = false;
        self.held += u64::from(len);
        self.entries.push_back(Entry { seq, offset, len, leases: 0 });
    }

    fn lease(&mut self, seq: Seq) -> Option<(u32, u32)> {
        let entry = self.entry(seq)?;
        entry.leases += 1;
        Some((entry.offset, entry.len))
    }

    fn release(&mut self, seq: Seq) {
        if let Some(entry) = self.entry(seq) {
            entry.leases -= 1;
        }
    }

    fn entry(&mut self, seq: Seq) -> Option<&mut Entry> {
        // Nearly always the newest.
        let newest = self.entries.len().checked_sub(1).filter(|newest| self.entries[*newest].seq == seq);
        let i = newest.or_else(|| self.entries.binary_search_by_key(&seq, |entry| entry.seq).ok())?;
        self.entries.get_mut(i)
    }
}

/// What one worker writes for its own calls in one namespace.
pub struct WorkerPart {
    region: Region,
    /// Everything behind this is zero.
    written: usize,
}

/// Wiped at once: no larger buffer of zeros is needed.
const WIPE_BYTES: usize = 4096;

impl WorkerPart {
    /// `len` is a multiple of [`WINDOW_ALIGN`].
    pub fn new(len: u32, mapping: Mapping) -> io::Result<WorkerPart> {
        let region = match mapping {
            Mapping::InPlace => Region::memfd("tidegate-worker", len as usize)?,
            Mapping::Copy => Region::anonymous(len as usize)?,
        };
        Ok(WorkerPart { region, written: 0 })
    }

    /// Zeros again, as it was new.
    pub fn clear(&mut self) {
        let written = self.written;
        for at in (0..written).step_by(WIPE_BYTES) {
            self.write(at, &[0; WIPE_BYTES][..WIPE_BYTES.min(written - at)]);
        }
        self.written = 0;
    }

    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        self.written = self.written.max(at + bytes.len());
        // SAFETY: `&mut self`: nobody else writes this part.
        unsafe { self.region.write(at, bytes) };
    }

    /// Puts descriptors to the front, one behind the other.
    pub fn describe(&mut self, rows: impl ExactSizeIterator<Item = Descriptor>) {
        let count = rows.len();
        assert!(count <= self.region.len / DESCRIPTOR_BYTES, "write inside the region");
        self.written = self.written.max(count * DESCRIPTOR_BYTES);
        let mut to = self.region.base.as_ptr();
        for row in rows.take(count) {
            // SAFETY: in bounds, as there are no more than `count`, whatever the iterator has; `&mut self`: nobody else
            // writes this part. Four numbers of four bytes each, by one instruction.
            unsafe {
                to.cast::<[u32; 4]>().write_unaligned(row.numbers());
                to = to.add(DESCRIPTOR_BYTES);
            }
        }
    }

    pub fn bytes(&self) -> u32 {
        self.region.len as u32
    }
}

/// How guests get to see the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Mapped over their memory: nothing is copied.
    InPlace,
    /// Copied to the same place before each call, where mapping does not work.
    Copy,
}

/// The window of one instance.
pub struct GuestWindow {
    /// Address in guest memory.
    pub addr: u32,
    pub len: u32,
    ring_len: u32,
    strike: Option<Arc<Strike>>,
}

#[derive(Debug)]
pub enum WindowError {
    /// The guest's answer to `tg_window` cannot be used.
    Guest(String),
    Host(io::Error),
}

impl fmt::Display for WindowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WindowError::Guest(message) => f.write_str(message),
            WindowError::Host(error) => write!(f, "the window cannot be mapped: {error}"),
        }
    }
}

impl GuestWindow {
    /// Checks the address that a guest set aside and puts the window there. Without a ring (a throw-away instance)
    /// its place reads as zeros.
    pub fn open<T>(
        store: &mut Store<T>,
        memory: Memory,
        addr: u32,
        ring: Result<&Ring, u32>,
        part: &WorkerPart,
        mapping: Mapping,
    ) -> Result<GuestWindow, WindowError> {
        let ring_len = ring.map_or_else(|bytes| bytes, Ring::bytes);
        let len = ring_len + part.bytes();
        let size = memory.data_size(&*store);
        if addr == 0 {
            return Err(WindowError::Guest(format!("tg_window could not set aside {len} bytes (it answered 0)")));
        }
        if !addr.is_multiple_of(WINDOW_ALIGN) {
            return Err(WindowError::Guest(format!(
                "tg_window answered {addr}, which is not a multiple of {WINDOW_ALIGN}"
            )));
        }
        if u64::from(addr) + u64::from(len) > size as u64 {
            return Err(WindowError::Guest(format!(
                "tg_window answered {addr}, but {len} bytes from there do not lie in the memory of {size} bytes"
            )));
        }
        let mut window = GuestWindow { addr, len, ring_len, strike: None };
        if mapping == Mapping::InPlace {
            let strike = map(store, memory, &window, ring.ok(), part).map_err(WindowError::Host)?;
            window.strike = Some(strike);
        }
        Ok(window)
    }

    /// Where the worker part begins, from the window's first byte.
    pub fn part_at(&self) -> u32 {
        self.ring_len
    }

    /// Whether the guest has ever written into its window.
    pub fn was_written(&self) -> bool {
        self.strike.as_ref().is_some_and(|strike| strike.hit.load(Ordering::Acquire))
    }

    pub fn overlaps(&self, addr: u32, len: u32) -> bool {
        let (start, end) = (u64::from(self.addr), u64::from(self.addr) + u64::from(self.len));
        u64::from(addr) < end && start < u64::from(addr) + u64::from(len)
    }

    /// Only where mapping does not work: copies the first `used` bytes of the worker part to the guest.
    pub fn copy_part<T>(&self, store: &mut Store<T>, memory: Memory, part: &WorkerPart, used: usize) {
        assert!(used <= part.region.len && self.part_at() as usize + used <= self.len as usize, "inside the window");
        let at = self.addr as usize + self.part_at() as usize;
        assert!(at + used <= memory.data_size(&*store), "the window lies in the memory, which never shrinks");
        let to = memory.data_ptr(&*store);
        // SAFETY: both ranges are in bounds, as checked; guest memory and the region are different mappings; the
        // guest is not running and `part` has no other writer while we borrow it.
        unsafe { ptr::copy_nonoverlapping(part.region.base.as_ptr(), to.add(at), used) };
    }
}

/// Bytes of guest memory outside the window, copied once. `None`: they do not lie in the memory.
pub fn copy_out<T>(store: &Store<T>, memory: Memory, addr: u32, len: u32) -> Option<Vec<u8>> {
    let (addr, len) = (addr as usize, len as usize);
    if addr.checked_add(len)? > memory.data_size(store) {
        return None;
    }
    let mut out = Vec::with_capacity(len);
    // SAFETY: in bounds, as just checked; the new vector has room for `len` bytes, all of which are written before
    // its length says so. The guest is not running, so nothing changes the bytes meanwhile.
    unsafe {
        ptr::copy_nonoverlapping(memory.data_ptr(store).add(addr), out.as_mut_ptr(), len);
        out.set_len(len);
    }
    Some(out)
}

/// A short message of a guest, which may lie anywhere, also in the ring while it is written. At most `most` bytes are
/// taken. `None`: it does not lie in the memory.
pub fn read_message(context: impl AsContext, memory: Memory, addr: u32, len: u32, most: usize) -> Option<String> {
    let (addr, len) = (addr as usize, len as usize);
    if addr.checked_add(len)? > memory.data_size(&context) {
        return None;
    }
    let base = memory.data_ptr(&context);
    // SAFETY: in bounds, as just checked. Volatile: another thread may be writing these bytes through the memfd, and
    // whatever is read is only shown, never trusted.
    let bytes: Vec<u8> = (0..len.min(most)).map(|i| unsafe { base.add(addr + i).read_volatile() }).collect();
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Where one instance's window is in our address space, and whether the instance wrote there.
#[derive(Debug)]
struct Strike {
    start: usize,
    len: usize,
    hit: AtomicBool,
}

impl Strike {
    /// Called in the signal handler: lets the first write into the window go on, on private pages.
    fn admit(&self, signal: i32, addr: usize) -> bool {
        let inside = addr >= self.start && addr - self.start < self.len;
        if signal != Signal::SEGV.as_raw() || !inside || self.hit.swap(true, Ordering::AcqRel) {
            return false;
        }
        // SAFETY: these pages are this instance's own mapping for as long as its code runs; they become writable for
        // the guest, privately. Only a system call: allowed in a signal handler.
        let writable = unsafe {
            rustix::mm::mprotect(self.start as *mut c_void, self.len, MprotectFlags::READ | MprotectFlags::WRITE)
        };
        writable.is_ok()
    }
}

/// Maps ring and part over the guest's memory; the address was checked.
fn map<T>(
    store: &mut Store<T>,
    memory: Memory,
    window: &GuestWindow,
    ring: Option<&Ring>,
    part: &WorkerPart,
) -> io::Result<Arc<Strike>> {
    let start = memory.data_ptr(&*store).wrapping_add(window.addr as usize);
    if !(start as usize).is_multiple_of(rustix::param::page_size()) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "guest memory is not page-aligned"));
    }
    let (ring_len, len) = (window.ring_len as usize, window.len as usize);
    // SAFETY: `open` checked that the window lies in the guest's memory, whose pages are wasmtime's mapping of this
    // store alone, and which never moves; the guest is not running and no reference covers its memory.
    unsafe {
        match ring {
            Some(ring) => ring.region.map_over(start.cast())?,
            None => {
                let flags = MapFlags::PRIVATE | MapFlags::FIXED;
                rustix::mm::mmap_anonymous(start.cast(), ring_len, ProtFlags::READ | ProtFlags::WRITE, flags)?;
            }
        }
        part.region.map_over(start.add(ring_len).cast())?;
        rustix::mm::mprotect(start.cast(), len, MprotectFlags::READ)?;
        rustix::mm::madvise(start.cast(), len, Advice::LinuxDontDump)?;
        if ring.is_some() {
            // Fills the page tables now instead of fault by fault. Kernels before 5.14 do not know it: no harm.
            let _ = rustix::mm::madvise(start.cast(), len, Advice::LinuxPopulateRead);
        }
    }
    let strike = Arc::new(Strike { start: start as usize, len, hit: AtomicBool::new(false) });
    let handler = strike.clone();
    // SAFETY: the handler is async-signal-safe (see `Strike::admit`): no allocation, no lock, no unwinding. wasmtime
    // hands it the kernel's siginfo, which has an address for the signals that `admit` looks at.
    unsafe { store.set_signal_handler(move |signal, info, _| handler.admit(signal, (*info).si_addr() as usize)) };
    Ok(strike)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Publish(u32),
        Lease(usize),
        Release(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0u32..1500).prop_map(Step::Publish),
            1 => (0usize..8).prop_map(Step::Lease),
            1 => (0usize..8).prop_map(Step::Release),
        ]
    }

    proptest! {
        /// Against bytes: what is leased never changes, what is held is never overlapped, newest frames are there.
        #[test]
        fn the_book_never_overwrites_a_lease(steps in proptest::collection::vec(step(), 1..200)) {
            const CAPACITY: u32 = 4096;
            let mut book = Book::new(CAPACITY);
            let mut bytes = vec![0u64; CAPACITY as usize];
            let mut leased: Vec<(u64, u32, u32)> = Vec::new();
            let mut seq = 0;
            for step in steps {
                match step {
                    Step::Publish(len) => {
                        seq += 1;
                        if let Some(at) = book.reserve(Seq(seq), len) {
                            prop_assert!(book.reserve(Seq(seq + 1), 1).is_none(), "one writer at a time");
                            bytes[at as usize..(at + len) as usize].fill(seq);
                            book.fill(Seq(seq), at, len);
                        } else {
                            prop_assert!(len == 0 || !leased.is_empty(), "only leases are in the way");
                        }
                    }
                    Step::Lease(back) => {
                        if let Some(at) = book.entries.len().checked_sub(back + 1) {
                            let seq = book.entries[at].seq;
                            let (offset, len) = book.lease(seq).unwrap();
                            leased.push((seq.0, offset, len));
                        }
                    }
                    Step::Release(i) if i < leased.len() => {
                        let (seq, ..) = leased.swap_remove(i);
                        book.release(Seq(seq));
                    }
                    Step::Release(_) => {}
                }
                for entry in &book.entries {
                    let held = &bytes[entry.offset as usize..(entry.offset + entry.len) as usize];
                    prop_assert!(held.iter().all(|byte| *byte == entry.seq.0), "frame {} is whole", entry.seq.0);
                }
                for (seq, offset, len) in &leased {
                    prop_assert_eq!(book.entry(Seq(*seq)).map(|entry| (entry.offset, entry.len)), Some((*offset, *len)));
                }
                prop_assert_eq!(book.held, book.entries.iter().map(|entry| u64::from(entry.len)).sum::<u64>());
            }
        }
    }

    #[test]
    fn a_ring_remembers_the_newest_frames() {
        let gauge = Gauge::default();
        let ring = Arc::new(Ring::new(WINDOW_ALIGN, gauge.clone()).unwrap());
        for seq in 1..=100u64 {
            ring.publish(Seq(seq * 2), &[seq as u8; 5000]);
            assert_eq!(gauge.get(), ring.book().held as i64);
        }
        assert!(ring.lease(Seq(199)).is_none() && ring.lease(Seq(2)).is_none());
        let lease = ring.lease(Seq(180)).unwrap();
        ring.publish(Seq(180), b"older");
        ring.publish(Seq(999), &vec![1; 1 << 17]);
        assert!(ring.lease(Seq(999)).is_none(), "larger than the ring");
        assert_eq!(ring.lease(Seq(180)).unwrap().len, 5000, "seqs only rise");
        // The lease is in the way sooner or later; then commits leave the ring alone, and go on when it ends.
        let refused = (201..230u64).filter(|seq| {
            ring.publish(Seq(*seq), &[7; 5000]);
            ring.lease(Seq(*seq)).is_none()
        });
        let refused = refused.count();
        assert!(refused > 0);
        assert!(ring.lease(Seq(180)).is_some());
        drop(lease);
        ring.publish(Seq(300), &[7; 5000]);
        assert!(ring.lease(Seq(300)).is_some());
        drop(ring);
        assert_eq!(gauge.get(), 0);
    }

    #[test]
    fn a_cleared_part_holds_nothing_of_before() {
        let mut part = WorkerPart::new(WINDOW_ALIGN, Mapping::InPlace).unwrap();
        for (at, len) in [(0, 1), (4090, 10), (5000, 9000), (WINDOW_ALIGN as usize - 3, 3)] {
            part.write(at, &vec![0xaa; len]);
            part.clear();
            let mut bytes = vec![1; WINDOW_ALIGN as usize];
            let read = rustix::io::pread(part.region.fd.as_ref().unwrap(), &mut bytes[..], 0).unwrap();
            assert_eq!((read, bytes.iter().position(|byte| *byte != 0)), (bytes.len(), None), "{len} bytes at {at}");
        }
    }

    #[test]
    fn regions_are_sealed() {
        let ring = Ring::new(WINDOW_ALIGN, Gauge::default()).unwrap();
        let fd = ring.region.fd.as_ref().unwrap();
        assert!(rustix::fs::ftruncate(fd, 0).is_err());
        assert!(rustix::fs::ftruncate(fd, 1 << 20).is_err());
    }
}
