//! What one change costs in Extism: the plugins of `guest` over the rows of `host/benches/plugins.rs`.
//!
//!   extism-bench                        every case
//!   extism-bench PLUGIN BYTES BATCH     one
//!
//! Prints a line a case: plugin, bytes, batch, nanoseconds a change. The guest lies beside this program.
//!
//! In Extism's favour, rows are encoded before the clock starts, and what comes back is not decoded.

#[path = "../guest/src/rows.rs"]
mod rows;

use std::error::Error;
use std::hint::black_box;
use std::time::{Duration, Instant};

use extism::{FromBytesOwned, Manifest, Plugin, PluginBuilder, Wasm};
use rows::{Departure, Flight, Local};

/// As long as the other sides are measured.
const MEASURED: Duration = Duration::from_millis(300);
const WINDOW: Duration = Duration::from_millis(10);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [] => {
            for plugin in ["late", "local_units"] {
                for bytes in [256, 1024, 16 * 1024, 64 * 1024] {
                    measure(plugin, bytes, 1)?;
                    measure(plugin, bytes, 64)?;
                }
            }
            Ok(())
        }
        [plugin, bytes, batch] => measure(plugin, bytes.parse()?, batch.parse()?),
        _ => Err("usage: extism-bench [PLUGIN BYTES BATCH]".into()),
    }
}

fn measure(name: &str, bytes: usize, batch: usize) -> Result<(), Box<dyn Error>> {
    let mut plugin = plugin()?;
    let pad = "x".repeat(bytes);
    let ids = 0..batch;
    let nanos = match (name, batch) {
        ("late", 1) => {
            let input = postcard::to_stdvec(&departure(0, &pad))?;
            assert!(!plugin.call::<_, bool>("late", &input)?, "a flight on time");
            per_row::<bool>(&mut plugin, "late", &input, batch)?
        }
        ("late", 2..=64) => {
            let input = postcard::to_stdvec(&ids.clone().map(|id| departure(id, &pad)).collect::<Vec<_>>())?;
            let late = ids.fold(0, |kept, id| kept | u64::from(delay(id) >= 15.0) << id);
            assert_eq!(plugin.call::<_, u64>("late_batch", &input)?, late, "who is late");
            per_row::<u64>(&mut plugin, "late_batch", &input, batch)?
        }
        ("local_units", 1) => {
            let input = postcard::to_stdvec(&flight(0, &pad))?;
            assert_eq!(postcard::from_bytes(plugin.call::<_, &[u8]>("local_units", &input)?), Ok(local(0)));
            per_row::<Vec<u8>>(&mut plugin, "local_units", &input, batch)?
        }
        ("local_units", 2..=64) => {
            let input = postcard::to_stdvec(&ids.clone().map(|id| flight(id, &pad)).collect::<Vec<_>>())?;
            let made: Vec<_> = ids.map(local).collect();
            assert_eq!(postcard::from_bytes(plugin.call::<_, &[u8]>("local_units_batch", &input)?), Ok(made));
            per_row::<Vec<u8>>(&mut plugin, "local_units_batch", &input, batch)?
        }
        _ => return Err(format!("no plugin {name} for a batch of {batch}").into()),
    };
    println!("{name} {bytes} {batch} {nanos:.1}");
    Ok(())
}

fn plugin() -> Result<Plugin, Box<dyn Error>> {
    let guest = std::fs::read(std::env::current_exe()?.with_file_name("extism_guest.wasm"))?;
    let settings = [("late_from", "15"), ("very_late_from", "60")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let manifest = Manifest::new([Wasm::data(guest)]).with_config(settings.into_iter());
    // The cache keeps compiled modules in the user's folder; compiling is not measured.
    Ok(PluginBuilder::new(manifest).with_cache_disabled().build()?)
}

fn delay(id: usize) -> f64 {
    (id % 40) as f64
}

fn departure(id: usize, pad: &str) -> Departure<'_> {
    Departure { id: Some(id as i64), dep_delay: Some(delay(id)), pad: Some(pad) }
}

fn flight(id: usize, pad: &str) -> Flight<'_> {
    Flight {
        id: Some(id as i64),
        carrier: Some("UA"),
        flight: Some(1545),
        origin: Some("EWR"),
        dest: Some("IAH"),
        distance: Some(1400.0),
        dep_delay: Some(delay(id)),
        pad: Some(pad),
    }
}

fn local(id: usize) -> Local<'static> {
    Local {
        carrier: Some("UA"),
        flight: Some(1545),
        origin: Some("EWR"),
        dest: Some("IAH"),
        km: Some(2253.1),
        delay_class: if delay(id) >= 15.0 { "late" } else { "on time" },
        dep_delay_minutes: Some(delay(id)),
    }
}

/// Nanoseconds of a row of `input`.
fn per_row<Out: FromBytesOwned>(
    plugin: &mut Plugin,
    function: &str,
    input: &[u8],
    rows: usize,
) -> Result<f64, extism::Error> {
    let mut run =
        |times: usize| (0..times).try_for_each(|_| black_box(plugin.call::<_, Out>(function, input)).map(drop));
    // Warm: the first call makes the instance, later ones fill caches.
    run(100)?;
    let (started, mut best) = (Instant::now(), f64::INFINITY);
    while started.elapsed() < MEASURED {
        let (began, mut rounds) = (Instant::now(), 0);
        while began.elapsed() < WINDOW {
            run(16)?;
            rounds += 16;
        }
        best = best.min(began.elapsed().as_nanos() as f64 / (rounds * rows) as f64);
    }
    Ok(best)
}
