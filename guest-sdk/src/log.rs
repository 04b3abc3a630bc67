//! Lines in the host's log, and counters in its metrics. A line allocates its text; a counter allocates nothing.

use core::fmt;

use crate::raw::host;

/// The host's log levels. The numbers are ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Level {
    Error = 0,
    Warn = 1,
    Info = 2,
    Debug = 3,
}

#[doc(hidden)]
pub fn write(level: Level, message: fmt::Arguments<'_>) {
    match message.as_str() {
        Some(message) => host::log(level as i32, message),
        None => host::log(level as i32, &alloc::fmt::format(message)),
    }
}

#[doc(hidden)]
pub fn metric(name: &str, value: f64) {
    host::metric(name, value);
}

/// A line at level error in the host's log, formatted as by `format!`.
#[macro_export]
macro_rules! error {
    ($($message:tt)+) => { $crate::log::write($crate::log::Level::Error, ::core::format_args!($($message)+)) };
}

/// A line at level warn in the host's log, formatted as by `format!`.
#[macro_export]
macro_rules! warn {
    ($($message:tt)+) => { $crate::log::write($crate::log::Level::Warn, ::core::format_args!($($message)+)) };
}

/// A line at level info in the host's log, formatted as by `format!`.
#[macro_export]
macro_rules! info {
    ($($message:tt)+) => { $crate::log::write($crate::log::Level::Info, ::core::format_args!($($message)+)) };
}

/// A line at level debug in the host's log, formatted as by `format!`.
#[macro_export]
macro_rules! debug {
    ($($message:tt)+) => { $crate::log::write($crate::log::Level::Debug, ::core::format_args!($($message)+)) };
}

/// Adds a number to the plugin's counter of that name: `metric!("skipped", 1.0)`.
#[macro_export]
macro_rules! metric {
    ($name:expr, $value:expr) => {
        $crate::log::metric($name, $value)
    };
}
