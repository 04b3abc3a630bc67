//! A power cut: the server dies, and its disk has nothing but what was synced. Acknowledged writes are there afterwards,
//! and no event was sent of any that are not.
//!
//! The disk is an image with ext4 in it. What programs write to files that are mounted from it waits in the kernel's
//! memory until somebody syncs (or for an hour); so a copy of the image is the disk as a cut would leave it, and the next
//! life of the server is on the copy. Two more runs acknowledge before they sync: they have to lose something, or the rig
//! is no power cut.
//!
//! It mounts, so it needs root: `POWER_CUTS=20 sh tests/run.sh power_cut` (`make torture` does that). Without the
//! variable, or without root, it says so and does nothing.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::process::getuid;
use tempfile::TempDir;
use tests::{Options, TestServer};

use crate::durability::{check, controls, lived, prepare};

/// Sparse: it takes what is written to it.
const IMAGE_BYTES: u64 = 2 << 30;

/// Acknowledged writes of a life before the cut, at the most.
const MOST_WRITES: usize = 150;

/// A disk whose power can be cut.
struct Disk {
    folder: TempDir,
    /// Of the present image: each cut makes another.
    number: usize,
}

impl Disk {
    fn new() -> Disk {
        let folder = tempfile::Builder::new().prefix("tidegate-power-cut-").tempdir().expect("a temporary folder");
        let disk = Disk { folder, number: 0 };
        let image = File::create(disk.image()).expect("an image");
        image.set_len(IMAGE_BYTES).expect("a sparse file");
        run("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), &disk.image()]);
        std::fs::create_dir(disk.root()).expect("a folder to mount at");
        disk.mount();
        disk
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join(format!("image-{}", self.number))
    }

    /// Where its files are.
    fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    fn mount(&self) {
        // Nothing is written out by time: an hour is longer than any life here.
        run("mount", &["-o".as_ref(), "loop,commit=3600".as_ref(), &self.image(), &self.root()]);
    }

    /// Everything that was not synced is lost. Nobody may have a file open.
    fn cut(&mut self) {
        let before = self.image();
        self.number += 1;
        run("cp", &["--sparse=always".as_ref(), &before, &self.image()]);
        run("umount", &[&self.root()]);
        std::fs::remove_file(&before).expect("the image before is no longer needed");
        self.mount();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Where it fails there is nothing better to do than to leave it mounted.
        let _ = Command::new("umount").arg(self.root()).status();
    }
}

fn run(program: &str, args: &[&Path]) {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// How many cuts are asked for, where they can be made.
fn cuts() -> Option<usize> {
    let Ok(cuts) = std::env::var("POWER_CUTS") else {
        eprintln!("skipped: POWER_CUTS says how many power cuts there are to be, and is not set");
        return None;
    };
    if !getuid().is_root() {
        eprintln!("skipped: a power cut takes a file system of its own, and only root may mount one");
        return None;
    }
    Some(cuts.parse().expect("POWER_CUTS is a number"))
}

fn options(disk: &Disk, durability: &str) -> Options {
    // Those that sync later do so after a while: the cut comes before.
    let later = if durability == "sync" { "" } else { "sync_interval_ms = 5000\n" };
    let config = format!("[storage]\ndurability = \"{durability}\"\n{later}");
    Options { config, data_at: Some(disk.root().join("data")), ..Options::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_outlasts_a_power_cut() {
    let Some(cuts) = cuts() else { return };
    let mut random = StdRng::seed_from_u64(tests::seed());
    let lives: Vec<usize> = (0..cuts).map(|_| random.random_range(1..=MOST_WRITES)).collect();
    let mut disk = Disk::new();
    let server = TestServer::with(options(&disk, "sync")).await;
    prepare(&server).await;
    let history = lived(server, &lives, || tokio::task::block_in_place(|| disk.cut())).await;
    check(&history).unwrap();
    controls(&history);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_before_its_sync_is_lost_or_this_is_no_power_cut() {
    if cuts().is_none() {
        return;
    }
    for durability in ["os", "interval"] {
        let mut disk = Disk::new();
        let mut server = TestServer::with(options(&disk, durability)).await;
        prepare(&server).await;
        // What ends in order has synced: the tables are there whatever is lost of their rows.
        assert!(server.sigterm().await.success());
        server.restart().await;
        let history = lived(server, &[MOST_WRITES], || tokio::task::block_in_place(|| disk.cut())).await;
        let verdict = check(&history);
        assert!(verdict.is_err(), "durability {durability:?}, and nothing that was acknowledged was lost");
        eprintln!("control, durability {durability:?}: {}", verdict.unwrap_err());
    }
}
