//! Drives a real server process from outside, as a client would.
//!
//! - [`server`]: starts the binary on a free port in a directory of its own; kills, stops, restarts it.
//! - [`client`]: one user's HTTP calls; follows the server over restarts.
//! - [`live`]: a subscription: reads events with a bound, reconnects with the last id.
//! - [`fold`]: what the events say the result is now; refuses events that cannot be.
//! - [`alive`]: somebody who goes on working while others do their worst.
//! - [`guest`]: small plugins in text. [`raw`]: bytes on a socket. [`process`]: what the server uses.
//!
//! Everything here panics when the server does not do its part: these are tests. What the server printed is shown when
//! a test fails.

pub mod alive;
pub mod client;
pub mod fold;
pub mod guest;
pub mod live;
pub mod process;
pub mod raw;
pub mod server;

pub use alive::Bystander;
pub use client::{Client, Failure};
pub use fold::Fold;
pub use live::{Event, Live, LiveQuery};
pub use server::{Options, TestServer};

use std::panic::{AssertUnwindSafe, resume_unwind};
use std::time::{Duration, Instant};

use futures::FutureExt;

/// Longer than anything here takes on a busy machine with two cores; a test that waits so long has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Configuration where no plugin is to fail. One that the machine forgets in the middle of a call, for ten times as long as
/// the call may take, fails as well: with the limits of every day that is a fifth of a second.
pub const PATIENT_WITH_PLUGINS: &str = "[plugins]\nbatch_ms = 1000\ninit_ms = 1000\n";

/// The bytes of a built plugin, `late.wasm` or `long_haul.wat`. `tests/run.sh` builds them and says where they are.
pub fn plugin(file: &str) -> Vec<u8> {
    let path = plugin_path(file);
    std::fs::read(&path)
        .unwrap_or_else(|error| panic!("{}: {error}; `sh tests/run.sh` builds the plugins", path.display()))
}

fn plugin_path(file: &str) -> std::path::PathBuf {
    let folder = std::env::var("TIDEGATE_PLUGINS").map(std::path::PathBuf::from).unwrap_or_else(|_| {
        server::target_dir().parent().expect("the profile's folder lies in the target folder").join("plugins")
    });
    folder.join(file)
}

/// The same of a sample whose compiler may not be here.
pub fn optional_plugin(file: &str) -> Option<Vec<u8>> {
    let module = std::fs::read(plugin_path(file)).ok();
    if module.is_none() {
        eprintln!("{file} was not built: its compiler is not here (SAMPLES=\"c assemblyscript\" installs it)");
    }
    module
}

/// How many of something a test takes: what the environment says under this name (`make torture` says more), else `few`.
pub fn size(name: &str, few: usize) -> usize {
    let size = std::env::var(name).map_or(few, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")));
    eprintln!("{name}={size}");
    size
}

/// The first seed of random runs where nobody asks for another. Fixed, so that the same commit passes or fails everywhere
/// alike: who wants to look for new failures says `SEED=random`.
const SEED: u64 = 1;

/// The seed of a random run: `SEED` of the environment (a number, or `random`), else always the same. Printed, so that a
/// failure can be repeated.
pub fn seed() -> u64 {
    let seed = match std::env::var("SEED").as_deref() {
        Ok("random") => rand::random(),
        Ok(text) => text.parse().expect("SEED is a number or `random`"),
        Err(_) => SEED,
    };
    eprintln!("SEED={seed} repeats this run");
    seed
}

/// The seeds of several runs: `few` from [`seed`] on, only that one where `SEED` names it, and with `MINUTES` one after
/// the other until so much time has passed.
pub fn seeds(few: u64) -> impl Iterator<Item = u64> {
    let first = seed();
    let until = std::env::var("MINUTES").ok().map(|text| {
        let minutes: u64 = text.parse().expect("MINUTES is a whole number");
        Instant::now() + Duration::from_secs(60 * minutes)
    });
    let named = std::env::var("SEED").is_ok_and(|seed| seed != "random");
    let runs = match until {
        Some(_) => u64::MAX,
        None if named => 1,
        None => few,
    };
    // At least one, however short the time.
    let goes_on = move |run: &u64| *run == 0 || until.is_none_or(|until| Instant::now() < until);
    (0..runs).take_while(goes_on).map(move |run| first.wrapping_add(run))
}

/// One random run; when it fails, its seed is said.
pub async fn seeded<T>(seed: u64, run: impl Future<Output = T>) -> T {
    AssertUnwindSafe(run).catch_unwind().await.unwrap_or_else(|panic| {
        eprintln!("SEED={seed} failed");
        resume_unwind(panic)
    })
}

/// How much of something a test takes: what the environment's variable `name` says, else `many` where random runs go on
/// for minutes (`make torture`), else `few`.
pub fn amount(name: &str, few: usize, many: usize) -> usize {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")),
        Err(_) if std::env::var_os("MINUTES").is_some() => many,
        Err(_) => few,
    }
}
