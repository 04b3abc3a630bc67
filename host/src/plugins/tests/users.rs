//! Rows of user tables: an instance only ever sees what its own user may read, wherever in its memory it looks.

use super::*;

/// What a guest has to search for is told it masked, so that its parameter is not what it finds.
const MASK: i64 = 0x5a5a_5a5a_5a5a_5a5a;

/// A filter that looks at every byte of its memory for the 8 bytes `min ^ MASK`, and keeps rows only if they are nowhere.
fn nosy() -> String {
    let body = format!(
        r#"{CONFIGURE}
  (func (export "tg_filter") (param $h i32) (param $d i32) (param $n i32) (result i64)
      (local $at i32) (local $end i32) (local $needle i64)
    (local.set $needle (i64.xor (call $param (local.get $h)) (i64.const {MASK})))
    (local.set $end (i32.sub (i32.shl (memory.size) (i32.const 16)) (i32.const 8)))
    (loop $next
      (if (i64.eq (i64.load (local.get $at)) (local.get $needle)) (then (return (i64.const 0))))
      (br_if $next (i32.le_u (local.tee $at (i32.add (local.get $at) (i32.const 1))) (local.get $end))))
    (i64.shr_u (i64.const -1) (i64.extend_i32_u (i32.sub (i32.const 64) (local.get $n)))))"#
    );
    guest(&[MIN, READS_V], &body)
}

const ANN: i64 = 0x0061_6e6e_2773_2121;
const BOB: i64 = 0x0062_6f62_2773_2121;

fn seen(fixture: &Fixture) {
    let mut worker = fixture.plugins.worker(0);
    let mut looking_for = |owner: Owner, canary: i64| {
        let stage = fixture.stage("nosy", &nosy(), &format!("{{\"min\":{}}}", canary ^ MASK));
        worker.open(owner, &[stage], &table(), OnError::Stop).unwrap().id
    };
    let (ann, bob) = (|| Owner::user(NS, "ann"), || Owner::user(NS, "bob"));
    let ann_for_bob = looking_for(ann(), BOB);
    let ann_for_ann = looking_for(ann(), ANN);
    let bob_for_ann = looking_for(bob(), ANN);
    let shared_for_ann = looking_for(Owner::shared(NS), ANN);
    let elsewhere_for_ann = looking_for(Owner::user(NamespaceId(2), "ann"), ANN);
    // Rows of ann are many and long, so that parts of them stay behind whatever bob's overwrite.
    let anns = commit(&(0..40).map(|_| (Some(ANN), "x".repeat(300))).collect::<Vec<_>>());
    let bobs = values(&[BOB, 1]);
    for round in 0..4 {
        let mut kept = |id: PipelineId, rows: &(Vec<u8>, Vec<ImageAt>)| {
            let keep = run(&mut worker, id, None, rows).unwrap().keep;
            assert!(keep.iter().all(|kept| *kept == keep[0]), "one answer for all");
            keep[0]
        };
        assert!(!kept(ann_for_ann, &anns), "round {round}: the guest does find what is there");
        assert!(kept(bob_for_ann, &bobs), "round {round}: bob's instance sees ann's rows");
        assert!(kept(ann_for_bob, &anns), "round {round}: ann's instance sees bob's rows");
        assert!(kept(shared_for_ann, &values(&[1])), "round {round}: an instance of shared tables sees ann's rows");
        assert!(kept(elsewhere_for_ann, &values(&[1])), "round {round}: another namespace's instance sees ann's rows");
    }
}

#[test]
fn an_instance_never_sees_another_users_rows() {
    // A generous limit: the guest looks at half a million places a call, and that on a busy machine.
    let options = PluginOptions { batch_time: Duration::from_secs(1), ..options() };
    seen(&Fixture::new(options.clone()));
    seen(&Fixture::copying(options.clone()));
    let losing = Fixture::new(options);
    losing.plugins.drop_instances_at_random(7);
    seen(&losing);
}

#[test]
fn a_users_instances_end_with_their_last_stream() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let mut open = |user: &str, min: i64| {
        let stage = fixture.stage("at_least", &at_least(), &format!("{{\"min\":{min}}}"));
        worker.open(Owner::user(NS, user), &[stage], &table(), OnError::Stop).unwrap().id
    };
    let (one, two, other) = (open("ann", 1), open("ann", 2), open("bob", 1));
    let instances = || fixture.metrics.plugin_instances.get();
    assert_eq!(instances(), 2, "one for each user");
    worker.close(one);
    assert_eq!(instances(), 2);
    worker.close(two);
    assert_eq!(instances(), 1);
    assert_eq!(run(&mut worker, other, None, &values(&[0, 1])).unwrap().keep, [false, true]);
    worker.close(other);
    assert_eq!((instances(), fixture.metrics.ring_bytes.get()), (0, 0));
}
