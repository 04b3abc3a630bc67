//! The point of the window: however many instances read a commit, its bytes are there once.

use super::*;

/// What an instance may cost beside the shared bytes: its touched pages (stack and data of these small guests, the
/// store) and its page tables (a ring of 4 MiB and a part of 1 MiB are three leaves, and a few levels above).
const INSTANCE_BYTES: u64 = 64 * 1024;

const RING: u32 = 4 << 20;

/// Bytes this process uses: its share of every page, and its page tables.
fn used() -> u64 {
    let field = |text: &str, name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    };
    let pss = field(&std::fs::read_to_string("/proc/self/smaps_rollup").unwrap(), "Pss:");
    pss + field(&std::fs::read_to_string("/proc/self/status").unwrap(), "VmPTE:")
}

/// Set in the process that measures: nothing else may allocate there meanwhile.
const ALONE: &str = "TIDEGATE_TEST_ALONE";

#[test]
fn a_hundred_instances_read_the_same_bytes() {
    if std::env::var_os(ALONE).is_some() {
        return measure();
    }
    let (_, module) = module_path!().split_once("::").unwrap();
    let name = format!("{module}::a_hundred_instances_read_the_same_bytes");
    let mut test = std::process::Command::new(std::env::current_exe().unwrap());
    let output = test.args(["--exact", &name, "--nocapture"]).env(ALONE, "1").output().unwrap();
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("100 instances"), "{said}\n{complained}");
    println!("{said}");
}

fn measure() {
    let many = PluginOptions { ring_bytes: RING, worker_bytes: 1 << 20, instances_per_worker: 128, ..options() };
    let fixture = Fixture::new(many);
    // Distinct modules that look at the last byte of each page of a row, and at `v`.
    let stages: Vec<_> = (0..100)
        .map(|i| {
            let keep = format!(
                r#"(local $at i32) (local $end i32) (local $sum i32)
                (local.set $at (i32.add (global.get $w) (i32.load offset=8 (i32.add (i32.add (global.get $w) (local.get $d)) (i32.shl (local.get $i) (i32.const 4))))))
                (local.set $end (i32.add (local.get $at) (i32.const 65536)))
                (loop $page
                  (local.set $sum (i32.add (local.get $sum) (i32.load8_u (local.get $at))))
                  (br_if $page (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 4096))) (local.get $end))))
                (i32.and (i64.ge_s (call $value (local.get $h) (local.get $d) (local.get $i)) (i64.const {i}))
                  (i32.eq (local.get $sum) (i32.const {sum})))"#,
                sum = 16 * u32::from(b'x'),
            );
            fixture.stage(&format!("reader_{i}"), &filter(&[READS_V], &keep), "")
        })
        .collect();
    let mut worker = fixture.plugins.worker(0);
    let open = |worker: &mut PluginWorker, stage: &Stage| super::open(worker, std::slice::from_ref(stage)).unwrap().id;
    // The first one brings the ring and the part.
    let mut pipelines = vec![open(&mut worker, &stages[0])];
    let rows: Vec<_> = (0..32).map(|_| (Some(50), "x".repeat(65536))).collect();
    let rows = commit(&rows);

    let before = used();
    pipelines.extend(stages[1..].iter().map(|stage| open(&mut worker, stage)));
    fixture.plugins.publish(NS, Seq(1), &rows.0);
    for (i, id) in pipelines.iter().enumerate() {
        assert_eq!(run(&mut worker, *id, Some(1), &rows).unwrap().keep, vec![i <= 50; 32]);
    }
    let grown = used().saturating_sub(before);
    assert_eq!(fixture.metrics.plugin_instances.get(), 100);
    assert_eq!((fixture.metrics.guest_bytes_copied.get(), fixture.metrics.ring_misses.get()), (0, 0));
    assert_eq!(fixture.metrics.worker_part_bytes.get(), 0);
    println!("{} bytes of commit, 100 instances: grown by {grown} bytes ({} each)", rows.0.len(), grown / 99);
    assert!(grown < rows.0.len() as u64 + 99 * INSTANCE_BYTES, "grown by {grown}");
    // A copy each would have been this much.
    assert!(grown < 99 * rows.0.len() as u64 / 4);

    let with_instances = used();
    for id in pipelines {
        worker.close(id);
    }
    assert_eq!(fixture.metrics.plugin_instances.get(), 0);
    assert!(used() < with_instances, "closing gives memory back");
    // No mapping of the ring stays behind in memory that was a guest's; only this test's ring has this length.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let left = maps.lines().filter(|line| {
        let range = line.split_whitespace().next().unwrap().split_once('-').unwrap();
        let [start, end] = [range.0, range.1].map(|at| u64::from_str_radix(at, 16).unwrap());
        line.contains("tidegate-ring") && end - start == RING as u64
    });
    assert_eq!(left.count(), 0);
}
