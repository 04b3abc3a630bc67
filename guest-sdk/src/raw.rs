//! The edge of the sandbox, and the only `unsafe` of the SDK: loads from the window, the host's imports, the guest's
//! exports. Everything above works with checked offsets and never sees an address.
//!
//! Why loads from the window are sound although the host writes there:
//!
//! - The window is memory of this guest's own allocator (`open_window`), never freed, and nothing in the guest
//!   writes to it. Its address went out to the host, so the compiler must assume that calls change its bytes.
//! - The host leases the bytes of a batch to the guest for the time of one call: they do not change before the call
//!   returns, and every reference made here is bound to [`Window`]'s lifetime, which ends with the call.
//! - References are made only over the bytes of one value, never over the whole window: other parts of it may be
//!   written by the host at the same moment.
//! - Every load is checked against the window's length, so a wrong offset ends in a panic of this guest.
//! - Text was checked to be UTF-8 when it entered the database, and a transform's output when the host copied it, so
//!   it is not checked again here. On other targets than wasm32 (tests) it is.

use core::marker::PhantomData;

/// The bytes that rows are read from: the host's window for the time of one call, or a test's buffer.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    base: *const u8,
    len: usize,
    bytes: PhantomData<&'a [u8]>,
}

impl<'a> Window<'a> {
    /// A window over borrowed bytes, for parameters and rows outside the host.
    pub fn over(bytes: &'a [u8]) -> Self {
        Window { base: bytes.as_ptr(), len: bytes.len(), bytes: PhantomData }
    }

    /// `N` bytes at an offset.
    #[inline]
    pub(crate) fn load<const N: usize>(self, offset: u32) -> [u8; N] {
        let at = self.place(offset, N);
        // SAFETY: `place` checked that `N` bytes lie in the window from there; a byte array has no alignment; the
        // bytes are not written while this window lives (see above).
        unsafe { at.cast::<[u8; N]>().read() }
    }

    /// `len` bytes at an offset, in place.
    #[inline]
    pub(crate) fn bytes(self, offset: u32, len: u32) -> &'a [u8] {
        let at = self.place(offset, len as usize);
        // SAFETY: `place` checked that `len` bytes lie in the window from there; they are neither written nor freed
        // while this window lives (see above).
        unsafe { core::slice::from_raw_parts(at, len as usize) }
    }

    /// Text at an offset, in place. Only for columns of kind text.
    #[inline]
    pub(crate) fn text(self, offset: u32, len: u32) -> &'a str {
        let bytes = self.bytes(offset, len);
        #[cfg(target_arch = "wasm32")]
        // SAFETY: the host puts only UTF-8 into columns of kind text (see above).
        let text = unsafe { core::str::from_utf8_unchecked(bytes) };
        #[cfg(not(target_arch = "wasm32"))]
        let text = core::str::from_utf8(bytes).expect("text in an image is UTF-8");
        text
    }

    #[inline]
    fn place(self, offset: u32, len: usize) -> *const u8 {
        let at = offset as usize;
        if len > self.len || at > self.len - len {
            outside();
        }
        self.base.wrapping_add(at)
    }
}

#[cold]
#[inline(never)]
fn outside() -> ! {
    panic!("an offset points outside the window")
}

/// The host's functions. Outside wasm32 they do nothing, so that plugins compile and run natively in tests.
pub(crate) mod host {
    #[cfg(target_arch = "wasm32")]
    mod import {
        #[link(wasm_import_module = "tidegate")]
        unsafe extern "C" {
            pub(super) fn log(level: i32, ptr: *const u8, len: usize);
            pub(super) fn metric(ptr: *const u8, len: usize, value: f64);
            pub(super) fn fail(index: i32, ptr: *const u8, len: usize);
        }
    }

    pub(crate) fn log(level: i32, message: &str) {
        #[cfg(target_arch = "wasm32")]
        // SAFETY: the host reads the bytes of this string during the call and keeps no pointer.
        unsafe {
            import::log(level, message.as_ptr(), message.len());
        }
        let _ = (level, message);
    }

    pub(crate) fn metric(name: &str, value: f64) {
        #[cfg(target_arch = "wasm32")]
        // SAFETY: the host reads the bytes of this string during the call and keeps no pointer.
        unsafe {
            import::metric(name.as_ptr(), name.len(), value);
        }
        let _ = (name, value);
    }

    pub(crate) fn fail(index: i32, message: &str) {
        #[cfg(target_arch = "wasm32")]
        // SAFETY: the host reads the bytes of this string during the call and keeps no pointer.
        unsafe {
            import::fail(index, message.as_ptr(), message.len());
        }
        let _ = (index, message);
    }
}

#[cfg(target_arch = "wasm32")]
pub use guest::{Shared, open_window, window};

/// What only a guest has: the window's place, and the state behind its exports.
#[cfg(target_arch = "wasm32")]
mod guest {
    use core::cell::RefCell;
    use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

    use super::{PhantomData, Window};

    #[cfg(target_feature = "atomics")]
    compile_error!("a Tidegate plugin has one thread: build it without the `atomics` target feature");

    static BASE: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());
    static LEN: AtomicUsize = AtomicUsize::new(0);

    /// Sets the window's bytes aside for ever; their address, or 0 when there is no memory.
    pub fn open_window(len: u32) -> u32 {
        crate::plugin::report_panics();
        let Ok(layout) = core::alloc::Layout::from_size_align(len as usize, wire::abi::WINDOW_ALIGN as usize) else {
            return 0;
        };
        if layout.size() == 0 {
            return 0;
        }
        // SAFETY: the layout's size is not zero.
        let base = unsafe { alloc::alloc::alloc(layout) };
        if base.is_null() {
            return 0;
        }
        BASE.store(base, Ordering::Relaxed);
        LEN.store(layout.size(), Ordering::Relaxed);
        base as usize as u32
    }

    /// Lends the window to `call`, which can keep nothing of it.
    pub fn window<R>(call: impl for<'a> FnOnce(Window<'a>) -> R) -> R {
        call(Window { base: BASE.load(Ordering::Relaxed), len: LEN.load(Ordering::Relaxed), bytes: PhantomData })
    }

    /// State behind the exports, in a static.
    pub struct Shared<T>(RefCell<T>);

    // SAFETY: a guest has one thread (checked above by target feature); the RefCell catches re-entry.
    unsafe impl<T> Sync for Shared<T> {}

    impl<T> Shared<T> {
        pub const fn new(value: T) -> Self {
            Shared(RefCell::new(value))
        }

        pub fn with<R>(&self, call: impl FnOnce(&mut T) -> R) -> R {
            call(&mut self.0.borrow_mut())
        }
    }
}

/// Writes the guest's exports and its manifest section. Used by `#[filter]` and `#[transform]` only.
#[doc(hidden)]
#[macro_export]
macro_rules! __export {
    ($kind:ident, $plugin:ty, $manifest:expr) => {
        const MANIFEST: &[&[&str]] = $manifest;

        // SAFETY (of the attributes here): the names are Tidegate's; a second plugin in the crate is a compile error.
        #[used]
        #[unsafe(link_section = "tidegate")]
        static SECTION: [u8; $crate::manifest::len(MANIFEST)] = $crate::manifest::join(MANIFEST);

        static PLUGIN: $crate::raw::Shared<$crate::plugin::Plugin<$plugin>> =
            $crate::raw::Shared::new($crate::plugin::Plugin::new());

        #[unsafe(no_mangle)]
        extern "C" fn tg_abi() -> u32 {
            $crate::plugin::ABI
        }

        #[unsafe(no_mangle)]
        extern "C" fn tg_window(len: u32) -> u32 {
            $crate::raw::open_window(len)
        }

        #[unsafe(no_mangle)]
        extern "C" fn tg_configure(configure: u32) -> u64 {
            $crate::raw::window(|window| PLUGIN.with(|plugin| plugin.configure(window, configure)))
        }

        #[unsafe(no_mangle)]
        extern "C" fn tg_release(handle: u32) {
            PLUGIN.with(|plugin| plugin.release(handle));
        }

        $crate::__export!(@$kind);
    };
    (@filter) => { $crate::__export!(@@tg_filter, filter); };
    (@transform) => { $crate::__export!(@@tg_transform, transform); };
    (@change_filter) => { $crate::__export!(@@tg_filter, filter_changes); };
    (@change_transform) => { $crate::__export!(@@tg_transform, transform_changes); };
    (@@$export:ident, $method:ident) => {
        #[unsafe(no_mangle)]
        extern "C" fn $export(handle: u32, descriptors: u32, n: u32) -> u64 {
            $crate::raw::window(|window| PLUGIN.with(|plugin| plugin.$method(window, handle, descriptors, n)))
        }
    };
}
