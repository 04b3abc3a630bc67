//! Pipelines that see changes, and what happens to what a plugin fails on.

use super::*;
use crate::catalog::Semantics;
use wire::{ChangeAt, Op};

/// A commit of changes of `v` (of ids 0, 1, …): its shared section, and where the changes lie.
fn commit(changes: &[(Option<i64>, Option<i64>)]) -> (Vec<u8>, Vec<ChangeAt>) {
    let mut frame = FrameBuilder::new(NS.0, [1; 16], 0);
    let kinds = [Kind::Int, Kind::Text, Kind::Int];
    for (id, (old, new)) in changes.iter().enumerate() {
        let image = |v: &i64| {
            let mut image = ImageBuilder::new(3);
            image.set_int(0, id as i64);
            image.set_bytes(1, b"some text");
            image.set_int(2, *v);
            image.finish()
        };
        let meta = ChangeMeta { table: 1, schema_version: 1, kinds: &kinds };
        let (old, new) = (old.as_ref().map(image), new.as_ref().map(image));
        frame.change(&Scope::Shared, meta, old.as_deref(), new.as_deref()).unwrap();
    }
    let frame = frame.finish().unwrap();
    let view = FrameView::parse(&frame).unwrap();
    let section = view.section(&Scope::Shared).unwrap();
    (section.bytes.to_vec(), section.changes.iter().map(|change| change.at()).collect())
}

/// The fields of change `i`'s descriptor; `$c` is its address.
const AT: &str =
    "(local.set $c (i32.add (i32.add (global.get $w) (local.get $d)) (i32.mul (local.get $i) (i32.const 48))))";

/// A change filter that keeps updates by which `v` rose by `min` at least, and traps on a `v` of 13.
fn rose() -> String {
    let value = |at: i32| {
        format!(
            "(call $value (local.get $h) (i32.add (local.get $d) (i32.add (i32.mul (local.get $i) (i32.const 48)) (i32.const {at}))) (i32.const 0))"
        )
    };
    let keep = format!(
        r#"(local $c i32) {AT}
      (if (i32.and (i32.ne (i32.load offset=44 (local.get $c)) (i32.const 0)) (i64.eq {new} (i64.const 13))) (then unreachable))
      (if (i32.ne (i32.load (local.get $c)) (i32.const 2)) (then (return (i32.const 0))))
      ;; The bitmap says whether the column changed; there are fewer than eight.
      (if (i32.eqz (i32.and (i32.const 1) (i32.shr_u
          (i32.load8_u (i32.add (global.get $w) (i32.load offset=4 (local.get $c)))) (i32.load (local.get $h)))))
        (then (return (i32.const 0))))
      (i64.ge_s (i64.sub {new} {old}) (call $param (local.get $h)))"#,
        old = value(16),
        new = value(32),
    );
    filter(&[r#"{"plugin":{"abi":1,"kind":"change_filter"}}"#, MIN, READS_V], &keep)
}

/// A change transform to the one column `v`: each row that a change has, the old one first, plus `min`.
fn rows() -> String {
    let output = Schema { columns: vec![column(0, "v", Type::BigInt)] };
    let body = format!(
        r#"(data (i32.const 64) "{schema}")
  (func (export "tg_configure") (param i32) (result i64)
    (i64.or (i64.extend_i32_u (call $setup (local.get 0))) (i64.const {schema_at})))
  (func (export "tg_transform") (param $h i32) (param $d i32) (param $n i32) (result i64)
      (local $i i32) (local $c i32) (local $total i32) (local $rows i32) (local $image i32) (local $side i32)
    ;; The counts: one for each image with columns.
    (block $end (loop $count
      (br_if $end (i32.ge_u (local.get $i) (local.get $n)))
      {AT}
      (local.set $rows (i32.add (i32.ne (i32.load offset=28 (local.get $c)) (i32.const 0))
        (i32.ne (i32.load offset=44 (local.get $c)) (i32.const 0))))
      (i32.store (i32.add (i32.const 32768) (i32.shl (local.get $i) (i32.const 2))) (local.get $rows))
      (local.set $total (i32.add (local.get $total) (local.get $rows)))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br $count)))
    (local.set $rows (i32.const 0))
    (local.set $i (i32.const 0))
    (block $done (loop $change
      (br_if $done (i32.ge_u (local.get $i) (local.get $n)))
      (local.set $side (i32.const 16))
      (loop $each
        {AT}
        (if (i32.load offset=12 (i32.add (local.get $c) (local.get $side))) (then
          ;; 16 bytes an image: the bitmap, at +8 the slot.
          (local.set $image (i32.add (i32.shl (local.get $n) (i32.const 2))
            (i32.shl (i32.add (local.get $total) (local.get $rows)) (i32.const 4))))
          (local.set $c (i32.add (i32.add (i32.const 32768) (i32.shl (local.get $n) (i32.const 2)))
            (i32.shl (local.get $rows) (i32.const 4))))
          (i32.store (local.get $c) (local.get $image))
          (i32.store offset=4 (local.get $c) (i32.add (local.get $image) (i32.const 8)))
          (i32.store offset=8 (local.get $c) (i32.add (local.get $image) (i32.const 16)))
          (i32.store offset=12 (local.get $c) (i32.const 1))
          (i32.store8 (i32.add (i32.const 32768) (local.get $image)) (i32.const 1))
          (i64.store (i32.add (i32.const 32776) (local.get $image)) (i64.add (call $param (local.get $h))
            (call $value (local.get $h) (i32.add (local.get $d)
              (i32.add (i32.mul (local.get $i) (i32.const 48)) (local.get $side))) (i32.const 0))))
          (local.set $rows (i32.add (local.get $rows) (i32.const 1)))))
        (local.set $side (i32.add (local.get $side) (i32.const 16)))
        (br_if $each (i32.le_u (local.get $side) (i32.const 32))))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br $change)))
    (i64.or (i64.const 32768) (i64.shl (i64.extend_i32_u
      (i32.add (i32.shl (local.get $n) (i32.const 2)) (i32.shl (local.get $total) (i32.const 5)))) (i64.const 32))))"#,
        schema = schema_data(&output),
        schema_at = 64u64 << 32,
    );
    guest(&[r#"{"plugin":{"abi":1,"kind":"change_transform"}}"#, MIN, READS_V], &body)
}

fn run_changes(
    worker: &mut PluginWorker,
    id: PipelineId,
    seq: Option<u64>,
    (base, places): &(Vec<u8>, Vec<ChangeAt>),
) -> Result<PipedChanges, PluginError> {
    worker
        .run_changes(id, Changes { origin: Origin::Live, commit: seq.map(Seq), base, places })
        .map_err(|cut| cut.error)
}

/// Index, op and the made `v` of each output.
fn outputs(piped: &PipedChanges) -> Vec<(usize, Op, Option<i64>)> {
    let int = |image: &Bytes| ImageRef::parse(image).unwrap().0.int(0).unwrap();
    piped.outputs.iter().map(|output| (output.index, output.op, output.image.as_ref().map(int))).collect()
}

fn open_as(worker: &mut PluginWorker, stages: &[Stage], on_error: OnError) -> Opened {
    worker.open(Owner::shared(NS), stages, &table(), on_error).unwrap()
}

#[test]
fn changes_are_read_in_place_and_from_the_worker_part() {
    let fixture = Fixture::new(options());
    let stages = [fixture.stage("rose", &rose(), r#"{"min":5}"#)];
    let mut worker = fixture.plugins.worker(0);
    let opened = open_as(&mut worker, &stages, OnError::Stop);
    assert_eq!((opened.output, opened.semantics), (None, Semantics::Feed));
    let changes = commit(&[
        (None, Some(100)),
        (Some(1), Some(6)),
        (Some(1), Some(5)),
        (Some(9), None),
        (Some(7), Some(7)),
        (Some(-9), Some(20)),
    ]);
    fixture.plugins.publish(NS, Seq(4), &changes.0);
    for seq in [Some(4), None] {
        let piped = run_changes(&mut worker, opened.id, seq, &changes).unwrap();
        assert_eq!(outputs(&piped), [(1, Op::Update, None), (5, Op::Update, None)]);
        assert_eq!(fixture.metrics.worker_part_bytes.get() > 0, seq.is_none(), "the ring has the changes");
    }
    assert!(run(&mut worker, opened.id, None, &values(&[1])).is_err(), "rows are not what it sees");
}

#[test]
fn kinds_follow_each_other() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let stage = |name: &str, min: i64| {
        let wat = match name {
            "rose" => rose(),
            "rows" => rows(),
            "plus" => plus(None),
            _ => at_least(),
        };
        fixture.stage(name, &wat, &format!("{{\"min\":{min}}}"))
    };
    let changes =
        commit(&[(None, Some(100)), (Some(1), Some(20)), (Some(20), Some(3)), (Some(30), None), (Some(3), Some(4))]);
    fixture.plugins.publish(NS, Seq(4), &changes.0);
    use Op::{Delete, Insert, Update};
    for (stages, expected) in [
        // A row filter takes rows out of changes: into what it keeps is an insert, out of it a delete.
        (
            vec![stage("at_least", 10), stage("rows", 1)],
            vec![(0, Insert, Some(101)), (1, Insert, Some(21)), (2, Delete, Some(21)), (3, Delete, Some(31))],
        ),
        // A row transform makes both rows anew, and what changed is what it made.
        (vec![stage("plus", 1), stage("rose", 19)], vec![(1, Update, Some(21))]),
        (vec![stage("rose", 1), stage("plus", 2)], vec![(1, Update, Some(22)), (4, Update, Some(6))]),
        // Behind a change transform there are rows.
        (
            vec![stage("rows", 0), stage("at_least", 20), stage("plus", -1)],
            vec![(0, Insert, Some(99)), (1, Update, Some(19)), (2, Update, Some(19)), (3, Delete, Some(29))],
        ),
        (vec![stage("rose", 1000), stage("rows", 0)], vec![]),
    ] {
        let names: Vec<_> = stages.iter().map(|stage| stage.name.clone()).collect();
        let id = open_as(&mut worker, &stages, OnError::Stop).id;
        for seq in [Some(4), None] {
            let piped = run_changes(&mut worker, id, seq, &changes).unwrap();
            assert_eq!(outputs(&piped), expected, "{names:?}");
        }
        worker.close(id);
    }
    let refused = fixture.plugins.check(NS, &[stage("rows", 0), stage("rose", 0)], &table(), OnError::Stop);
    let message = refused.unwrap_err().to_string();
    assert!(message.starts_with("plugin rose sees changes (change_filter), but plugin rows"), "{message}");
}

#[test]
fn what_fails_is_skipped_passed_or_stops_and_is_remembered() {
    let fixture = Fixture::new(PluginOptions { batch_time: Duration::from_secs(1), ..options() });
    let changes = commit(&[(Some(1), Some(9)), (None, Some(13)), (Some(1), Some(8)), (Some(2), Some(13))]);
    let fault = |index, passed| UnitFault { index, stage: 0, cause: FaultCause::Trap, message: String::new(), passed };
    for (on_error, min, kept) in [(OnError::Skip, 1, vec![0, 2]), (OnError::Pass, 2, vec![0, 1, 2, 3])] {
        let mut worker = fixture.plugins.worker(0);
        let stage = fixture.stage("rose", &rose(), &format!("{{\"min\":{min}}}"));
        let id = open_as(&mut worker, &[stage], on_error).id;
        for known in [false, true] {
            let calls = fixture.metrics.plugin_calls.get();
            let mut piped = run_changes(&mut worker, id, None, &changes).unwrap();
            assert_eq!(piped.outputs.iter().map(|output| output.index).collect::<Vec<_>>(), kept, "{on_error:?}");
            piped.faults.iter_mut().for_each(|fault| fault.message.clear());
            let passed = on_error == OnError::Pass;
            assert_eq!(piped.faults, [fault(1, passed), fault(3, passed)]);
            let calls = fixture.metrics.plugin_calls.get() - calls;
            assert_eq!(calls, if known { 1 } else { 2 }, "what is known to fail costs no call");
        }
    }
    let mut worker = fixture.plugins.worker(0);
    let id = open_as(&mut worker, &[fixture.stage("rose", &rose(), r#"{"min":3}"#)], OnError::Stop).id;
    for _ in 0..2 {
        match run_changes(&mut worker, id, None, &changes) {
            Err(PluginError::Fault { stage: Some(0), cause: FaultCause::Trap, index: Some(1), .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    let causes = |cause: &str| {
        let mut labels = labels("rose");
        labels.push(("cause", cause.to_owned()));
        fixture.metrics.plugin_failure_causes.get_or_create(&labels).get()
    };
    assert_eq!((causes("trap"), causes("deadline")), (3 + 3 + 2, 0));
}

#[test]
fn a_plugin_may_forbid_to_pass_and_a_transform_cannot() {
    let fixture = Fixture::new(options());
    let strict = at_least().replace(r#"{\"abi\":1}"#, r#"{\"abi\":1,\"pass\":false}"#);
    let check = |stage: Stage| fixture.plugins.check(NS, &[stage], &table(), OnError::Pass).map(drop);
    assert!(check(fixture.stage("at_least", &at_least(), "")).is_ok());
    let message = check(fixture.stage("strict", &strict, "")).unwrap_err().to_string();
    assert!(message.contains("plugin strict forbids on_error=pass"), "{message}");
    let message = check(fixture.stage("plus", &plus(None), "")).unwrap_err().to_string();
    assert!(message.contains("on_error=pass is for filters, and plugin plus is a row_transform"), "{message}");
}

#[test]
fn a_plugin_that_keeps_failing_rests() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let keep = "(if (i64.lt_s (call $value (local.get $h) (local.get $d) (local.get $i)) (i64.const 0)) (then unreachable)) (i32.const 1)";
    let wat = filter(&[MIN, READS_V], keep);
    let mut open = |min: i64| {
        let stage = fixture.stage("sour", &wat, &format!("{{\"min\":{min}}}"));
        open_as(&mut worker, &[stage], OnError::Skip).id
    };
    let (often, other) = (open(1), open(2));
    let piped = run(&mut worker, often, None, &values(&[-1, 1, -2, -3, -4])).unwrap();
    assert_eq!((piped.keep, piped.faults.len()), (vec![false, true, false, false, false], 4));
    // The fifth in a minute; what is in the same batch is still judged.
    assert_eq!(run(&mut worker, often, None, &values(&[-5, 2])).unwrap().keep, [false, true]);
    match run(&mut worker, often, None, &values(&[3])) {
        Err(PluginError::Resting { plugin, stage: 0, rest }) => {
            assert!(plugin == "sour" && rest <= Duration::from_secs(1));
        }
        other => panic!("{other:?}"),
    }
    // What is known needs no call, and other parameters have not failed.
    assert_eq!(run(&mut worker, often, None, &values(&[-1])).unwrap().keep, [false]);
    assert_eq!(run(&mut worker, other, None, &values(&[3])).unwrap().keep, [true]);
}

/// The rows that had failed before the plugin had to rest were remembered, passed over ever after, and noted nowhere.
#[test]
fn what_failed_before_a_rest_is_told_as_well() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let keep = "(if (i64.lt_s (call $value (local.get $h) (local.get $d) (local.get $i)) (i64.const 0)) (then unreachable)) (i32.const 1)";
    let stage = fixture.stage("sour", &filter(&[MIN, READS_V], keep), "");
    let id = open_as(&mut worker, &[stage], OnError::Skip).id;
    let rows: Vec<i64> = (0..100).map(|row| if row < 6 { -1 - row } else { row }).collect();
    let (base, places) = &values(&rows);
    let cut = worker.run(id, Rows { origin: Origin::Live, commit: None, base, places }).unwrap_err();
    assert!(matches!(cut.error, PluginError::Resting { .. }));
    let told = |faults: Vec<UnitFault>| faults.iter().map(|fault| fault.index).collect::<Vec<_>>();
    assert_eq!(told(cut.faults), [0, 1, 2, 3, 4, 5]);
    // Judged to its end it is told of them again, though none is called again while it rests.
    let piped = run(&mut worker, id, None, &values(&rows[..6])).unwrap();
    assert_eq!(told(piped.faults), [0, 1, 2, 3, 4, 5]);
}

/// A row that is too large for the worker part stopped pipelines that skip what fails, and cost an innocent instance.
#[test]
fn a_row_that_does_not_fit_is_a_failure_of_that_row() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let stage = || fixture.stage("at_least", &at_least(), "");
    let rows = super::commit(&[(Some(40), "x".to_owned()), (Some(41), "x".repeat(70_000)), (Some(42), "x".to_owned())]);
    for (on_error, kept) in [(OnError::Skip, [true, false, true]), (OnError::Pass, [true; 3])] {
        let id = open_as(&mut worker, &[stage()], on_error).id;
        for _ in 0..6 {
            let piped = run(&mut worker, id, None, &rows).unwrap();
            assert_eq!((piped.keep, piped.faults.len()), (kept.to_vec(), 1), "{on_error:?}");
            assert_eq!(piped.faults[0].cause, FaultCause::Memory);
        }
    }
    assert_eq!(fixture.metrics.plugin_instances.get(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Ring, worker part, copied window, instances lost at random: what a feed gives is what the functions give.
    #[test]
    fn a_feed_is_its_function_over_the_changes(
        all in proptest::collection::vec((proptest::option::of(-30i64..12), proptest::option::of(14i64..60)), 0..200),
        min in 0i64..60, plus in -9i64..9, seed in 1u64..,
    ) {
        let all: Vec<_> = all.into_iter().filter(|(old, new)| old.is_some() || new.is_some()).collect();
        let small = PluginOptions { ring_bytes: 64 * 1024, ..options() };
        let fixtures = [Fixture::new(small.clone()), Fixture::new(small.clone()), Fixture::copying(small)];
        fixtures[1].plugins.drop_instances_at_random(seed);
        let mut expected = Vec::new();
        for (index, (old, new)) in all.iter().enumerate() {
            if let (Some(old), Some(new)) = (old, new)
                && new - old >= min
            {
                expected.extend([old, new].map(|v| (index, Op::Update, Some(v + plus))));
            }
        }
        for fixture in &fixtures {
            let mut worker = fixture.plugins.worker(0);
            let stages = [
                fixture.stage("rose", &rose(), &format!("{{\"min\":{min}}}")),
                fixture.stage("rows", &rows(), &format!("{{\"min\":{plus}}}")),
            ];
            let id = open_as(&mut worker, &stages, OnError::Stop).id;
            let commit = if all.is_empty() { (Vec::new(), Vec::new()) } else { commit(&all) };
            fixture.plugins.publish(NS, Seq(1), &commit.0);
            for seq in [Some(1), None] {
                let piped = run_changes(&mut worker, id, seq, &commit).unwrap();
                prop_assert_eq!(outputs(&piped), expected.clone());
            }
        }
    }
}
