//! The tables of the ancestor's memory work (see ARCHITECTURE.md), with both columns measured here, in one run: its way
//! and ours. Nothing is repeated from its text as a measured figure; what it claims stands below a table, marked as
//! that.
//!
//! ```text
//! cargo bench --profile dev --workspace --bench ancestor
//! cargo bench --profile dev --workspace --bench ancestor -- rows families     some parts
//! MINUTES=10 cargo bench --profile dev --workspace --bench ancestor -- soak   as long as the claim needs
//! ```
//!
//! `--profile dev` and `--workspace` take the crates that are compiled already. The parts:
//!
//! - `contexts`: a SessionContext per query, one shared, one per core: memory, and CPU per query.
//! - `rows`: a row cloned per subscriber, and shared bytes.
//! - `scan`: a table collected, and streamed: the most that is held at a time.
//! - `families`: a column family per table, and the families that all tables share: memory, and time to open.
//! - `subscriptions`: bytes a subscription.
//! - `soak`: 1,000 users × 10 queries a second with 10,000 subscriptions: growth a minute.
//!
//! Each part runs in a process of its own: what an allocator or a cache keeps from one shall not show in the next.

mod contexts;
mod families;
mod measure;
mod ours;
mod rows;
mod scan;
mod soak;
mod subscriptions;
#[path = "../common/world.rs"]
mod world;

use std::process::{Command, ExitCode};

#[global_allocator]
static ALLOCATOR: measure::Counting = measure::Counting;

static PARTS: [(&str, fn()); 6] = [
    ("contexts", contexts::run),
    ("rows", rows::run),
    ("scan", scan::run),
    ("families", families::run),
    ("subscriptions", subscriptions::run),
    ("soak", soak::run),
];

/// The first argument of a process that does a part itself.
const HERE: &str = "here";

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    match arguments.split_first() {
        Some((first, rest)) if first == HERE => {
            rest.iter().for_each(|name| part(name)());
            ExitCode::SUCCESS
        }
        Some((first, rest)) if first == families::COLUMN => {
            families::column(rest);
            ExitCode::SUCCESS
        }
        _ => each_alone(&arguments),
    }
}

fn part(name: &str) -> fn() {
    let known = PARTS.iter().find(|(part, _)| *part == name);
    let names: Vec<&str> = PARTS.iter().map(|(part, _)| *part).collect();
    known.unwrap_or_else(|| panic!("there is no part {name:?}; there are: {}", names.join(" "))).1
}

/// The parts asked for, or all.
fn each_alone(asked: &[String]) -> ExitCode {
    asked.iter().for_each(|name| {
        part(name);
    });
    let wanted = PARTS.iter().map(|(name, _)| *name).filter(|name| asked.is_empty() || asked.iter().any(|a| a == name));
    let mut failed = Vec::new();
    for name in wanted {
        let status = Command::new(measure::this_program()).args([HERE, name]).status().expect("this program starts");
        if !status.success() {
            failed.push(name);
        }
    }
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("failed: {}", failed.join(" "));
    ExitCode::FAILURE
}
