//! Guests that mean harm, and guests that are just broken: each is cut at its limit, named, and nobody else notices.

use super::*;
use crate::telemetry::thread_cpu;

/// Opens a pipeline of one guest that passed the upload check.
fn open(fixture: &Fixture, worker: &mut PluginWorker, name: &str, wat: &str) -> PipelineId {
    super::open(worker, &[fixture.stage(name, wat, "")]).unwrap().id
}

#[track_caller]
fn fault(result: Result<Piped, PluginError>) -> (FaultCause, Option<usize>, String) {
    match result {
        Err(PluginError::Fault { cause, index, message, .. }) => (cause, index, message),
        other => panic!("expected a fault, got {other:?}"),
    }
}

#[test]
fn a_guest_that_writes_into_its_window_hurts_only_itself() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let honest = open(&fixture, &mut worker, "at_least", &at_least());
    let rows = values(&[5, 15]);
    fixture.plugins.publish(NS, Seq(1), &rows.0);
    let part = "(i32.add (global.get $w) (i32.const 262144))";
    for (what, body) in [
        ("a store into the ring", "(i64.store (global.get $w) (i64.const -1))".to_owned()),
        ("a store into the worker part", format!("(i32.store8 {part} (i32.const 255))")),
        ("a fill over all of it", "(memory.fill (global.get $w) (i32.const 255) (i32.const 327680))".to_owned()),
        (
            "a copy to a place in it",
            "(memory.copy (i32.add (global.get $w) (i32.const 65530)) (i32.const 0) (i32.const 9000))".to_owned(),
        ),
        ("a short copy", "(memory.copy (global.get $w) (i32.const 64) (i32.const 8))".to_owned()),
        ("a copy within it", format!("(memory.copy (global.get $w) {part} (i32.const 100))")),
        ("an init", "(memory.init $seg (global.get $w) (i32.const 0) (i32.const 4))".to_owned()),
    ] {
        let wat = once(&body).replace("(func (export \"tg_abi\")", "(data $seg \"evil\") (func (export \"tg_abi\")");
        let hostile = open(&fixture, &mut worker, "scribbler", &wat);
        for seq in [Some(1), None] {
            let (cause, index, message) = fault(run(&mut worker, hostile, seq, &rows));
            assert_eq!((cause, index), (FaultCause::WindowWrite, Some(0)), "{what}: {message}");
            // The other guest, and a fresh instance of the offender, read the true bytes.
            assert_eq!(run(&mut worker, honest, Some(1), &rows).unwrap().keep, [false, true], "{what}");
            assert_eq!(run(&mut worker, honest, None, &rows).unwrap().keep, [false, true], "{what}");
        }
        worker.close(hostile);
    }
}

#[test]
fn an_offender_starts_again_with_true_bytes() {
    // Writes once, when it sees the value 99; else answers by what it reads.
    let keep = r#"
      (if (i64.eq (call $value (local.get $h) (local.get $d) (local.get $i)) (i64.const 99))
        (then (memory.fill (global.get $w) (i32.const 0) (i32.const 262144))))
      (i64.ge_s (call $value (local.get $h) (local.get $d) (local.get $i)) (i64.const 10))"#;
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let id = open(&fixture, &mut worker, "sometimes", &filter(&[READS_V], keep));
    let (good, bad) = (values(&[5, 15]), values(&[15, 99, 3]));
    fixture.plugins.publish(NS, Seq(1), &good.0);
    fixture.plugins.publish(NS, Seq(2), &bad.0);
    for _ in 0..3 {
        assert_eq!(run(&mut worker, id, Some(1), &good).unwrap().keep, [false, true]);
        let (cause, index, _) = fault(run(&mut worker, id, Some(2), &bad));
        assert_eq!((cause, index), (FaultCause::WindowWrite, Some(1)));
    }
}

#[test]
fn endless_loops_end() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let id = open(&fixture, &mut worker, "loop", &once("(loop $l (br $l))"));
    let cpu = thread_cpu();
    let (cause, index, message) = fault(run(&mut worker, id, None, &values(&[1, 2, 3])));
    assert_eq!((cause, index), (FaultCause::Deadline, Some(0)), "{message}");
    // A limit begins with the first tick that the guest sees, whenever that comes.
    assert!(thread_cpu() - cpu < Duration::from_millis(500), "the batch, then its first row: two limits of 20 ms");

    let forever = "(func $forever (loop $l (br $l))) (start $forever)";
    let initialize = "(func (export \"_initialize\") (loop $l (br $l)))";
    let upload = |wat: &str| fixture.plugins.inspect(wat.as_bytes()).unwrap_err().to_string();
    for hook in [forever, initialize] {
        let message =
            upload(&once("").replace("(func (export \"tg_abi\")", &format!("{hook} (func (export \"tg_abi\")")));
        assert!(message.contains("deadline") && message.contains("100 ms"), "{message}");
    }
    let configure = "(func (export \"tg_configure\") (param i32) (result i64) (loop $l (br $l)) (i64.const 0))";
    let message = upload(&once("").replace(CONFIGURE, configure));
    assert!(message.contains("deadline"), "{message}");
}

/// Loops where `v` is 99.
fn endless_at_99() -> String {
    let loops = "(if (i64.eq (call $value (local.get $h) (local.get $d) (local.get $i)) (i64.const 99)) (then (loop $l (br $l)))) (i32.const 1)";
    filter(&[MIN, READS_V], loops)
}

/// Each set of parameters had five failures before it rested, and everybody else on the worker waited for all of them.
#[test]
fn endless_loops_with_many_parameters_take_a_share_of_the_worker_and_no_more() {
    const SETS: usize = 40;
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let honest = open(&fixture, &mut worker, "at_least", &at_least());
    let looping: Vec<PipelineId> = (0..SETS)
        .map(|min| {
            let stage = fixture.stage("loop", &endless_at_99(), &format!("{{\"min\":{min}}}"));
            super::open(&mut worker, &[stage]).unwrap().id
        })
        .collect();
    let rows = values(&[5, 99]);
    let (mut failed, mut rest) = (0, 0);
    for id in &looping {
        match run(&mut worker, *id, None, &rows) {
            Err(PluginError::Fault { cause: FaultCause::Deadline, .. }) => failed += 1,
            Err(PluginError::Resting { .. }) => rest += 1,
            other => panic!("{other:?}"),
        }
    }
    // 200 ms of two calls of 20 ms each, and what a busy machine adds.
    assert!(failed + rest == SETS && (1..SETS / 2).contains(&failed), "{failed} failed, {rest} rest");
    // What else is on this worker goes on, and so does the same module on another one.
    assert_eq!(run(&mut worker, honest, None, &rows).unwrap().keep, [false, true]);
    let mut other = fixture.plugins.worker(1);
    let stage = fixture.stage("loop", &endless_at_99(), r#"{"min":1}"#);
    let same = super::open(&mut other, &[stage]).unwrap().id;
    assert_eq!(run(&mut other, same, None, &values(&[5, 15])).unwrap().keep, [true, true]);
}

/// One batch of rows that are skipped one by one took more than a second.
#[test]
fn endless_loops_of_one_batch_end_in_a_rest() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let stage = fixture.stage("loop", &endless_at_99(), "");
    let id = worker.open(Owner::shared(NS), &[stage], &table(), OnError::Skip).unwrap().id;
    let (base, places) = values(&[99; 64]);
    let cut = worker.run(id, Rows { origin: Origin::Live, commit: None, base: &base, places: &places }).unwrap_err();
    assert!(matches!(cut.error, PluginError::Resting { .. }), "{:?}", cut.error);
    // What was found out is kept: those rows cost nothing when it goes on.
    assert!((1..15).contains(&cut.faults.len()), "{} rows", cut.faults.len());
}

/// A batch that takes too long, of rows that do not: nothing was to blame, and yet it counted as time for nothing, so that
/// after some batches the plugin rested, and a result of more never came to its end.
#[test]
fn a_guest_that_is_slow_and_right_never_rests() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    // Half a millisecond a row, or so: one is allowed 20, and so are 64.
    let slow = "(local $j i32) (loop $l (br_if $l (i32.lt_u (local.tee $j (i32.add (local.get $j) (i32.const 1))) (i32.const 800000)))) (i32.const 1)";
    let id = open(&fixture, &mut worker, "slow", &filter(&[READS_V], slow));
    let rows = values(&[1; 64 * 30]);
    assert_eq!(run(&mut worker, id, None, &rows).unwrap().keep, [true; 64 * 30]);
}

#[test]
fn a_busy_machine_is_not_the_guests_fault() {
    let body = "(local $i i32) (loop $l (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 3000000))))";
    // What it takes where nothing limits it, measured here: some 10 ms.
    let fixture = Fixture::new(PluginOptions { batch_time: Duration::from_secs(1), ..options() });
    let mut worker = fixture.plugins.worker(0);
    let id = open(&fixture, &mut worker, "busy", &once(body));
    let cpu = thread_cpu();
    run(&mut worker, id, None, &values(&[1])).unwrap();
    let takes = thread_cpu() - cpu;
    // Five times that, while other threads take the cores.
    let fixture = Fixture::new(PluginOptions { batch_time: Duration::from_millis(50).max(5 * takes), ..options() });
    let mut worker = fixture.plugins.worker(0);
    let id = open(&fixture, &mut worker, "busy", &once(body));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    std::hint::spin_loop()
                }
            });
        }
        // Judged when the other threads have been told to end: a panic before would wait for them for ever.
        let runs: Vec<_> = (0..20).map(|_| run(&mut worker, id, None, &values(&[1]))).collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        for run in runs {
            run.unwrap();
        }
    });
}

#[test]
fn memory_stack_and_pointers_have_limits() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let grow = "(loop $l (br_if $l (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))";
    for (what, body, cause, expected) in [
        (
            "memory.grow to the limit, then unreachable",
            format!("{grow} unreachable"),
            FaultCause::Memory,
            "plugins.memory_bytes",
        ),
        ("recursion", "(call $deep)".to_owned(), FaultCause::Trap, "call stack exhausted"),
        ("recursion with imports", "(call $deep_log)".to_owned(), FaultCause::Trap, "call stack exhausted"),
        ("a load outside", "(drop (i32.load (i32.const -4)))".to_owned(), FaultCause::Trap, "out of bounds"),
        ("unreachable", "unreachable".to_owned(), FaultCause::Trap, "unreachable"),
        (
            "a log pointer outside",
            "(call $log (i32.const 0) (i32.const -8) (i32.const 100))".to_owned(),
            FaultCause::Trap,
            "log: 100 bytes at",
        ),
        (
            "a fail index outside",
            "(call $fail (i32.const 9) (i32.const 0) (i32.const 1))".to_owned(),
            FaultCause::Trap,
            "row 9 of a batch of 1",
        ),
    ] {
        let more = "(func $deep (call $deep)) (func $deep_log (call $log (i32.const 3) (i32.const 0) (i32.const 1)) (call $deep_log))";
        let wat = once(&body).replace("(func (export \"tg_abi\")", &format!("{more} (func (export \"tg_abi\")"));
        let id = open(&fixture, &mut worker, "hostile", &wat);
        let (found, index, message) = fault(run(&mut worker, id, None, &values(&[1])));
        assert_eq!((found, index), (cause, Some(0)), "{what}: {message}");
        assert!(message.contains(expected), "{what}: {message}");
        worker.close(id);
    }
    // Growing to the limit alone is no fault.
    let id = open(&fixture, &mut worker, "grow", &once(grow));
    run(&mut worker, id, None, &values(&[1])).unwrap();
}

#[test]
fn wrong_answers_are_refused() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let rows = values(&[1, 2, 3]);

    let beyond = guest(
        &[],
        &format!("{CONFIGURE} (func (export \"tg_filter\") (param i32 i32 i32) (result i64) (i64.const 16))"),
    );
    let id = open(&fixture, &mut worker, "beyond", &beyond);
    let (cause, _, message) = fault(run(&mut worker, id, None, &rows));
    assert_eq!(cause, FaultCause::Abi, "{message}");
    assert!(message.contains("bits beyond the 1 rows"), "{message}");

    let window = "(i64.or (i64.extend_i32_u (global.get $w)) (i64.const 0x2000000000))";
    for (what, answer, expected) in [
        ("too long", "(i64.const 0x7fffffff00000000)", "at most 1048576 are allowed (plugins.output_bytes)"),
        ("outside", "(i64.const 0x00000040fffffff0)", "do not lie in the memory"),
        ("in the window", window, "lie in the window"),
        ("too short", "(i64.const 0x0000000f00008000)", "too few for 1 descriptors"),
        ("nonsense", "(i64.const 0x0000002000000040)", "output row 0: it has"),
        ("nothing", "(i64.const 0)", "too few for 1 descriptors"),
    ] {
        let id = open(&fixture, &mut worker, "liar", &plus(Some(answer)));
        let (cause, index, message) = fault(run(&mut worker, id, None, &rows));
        assert_eq!((cause, index), (FaultCause::Output, Some(0)), "{what}: {message}");
        assert!(message.contains(expected), "{what}: {message}");
        worker.close(id);
    }
}

#[test]
fn outputs_of_one_run_are_bounded_together() {
    let fixture = Fixture::new(PluginOptions { output_bytes: 2048, ..options() });
    let mut worker = fixture.plugins.worker(0);
    let id = open(&fixture, &mut worker, "plus", &plus(None));
    run(&mut worker, id, None, &values(&[1; 1000])).unwrap();
    // 12 bytes an image, 64 x 2,048 in all.
    let (cause, _, message) = fault(run(&mut worker, id, None, &values(&vec![1; 11_000])));
    assert_eq!(cause, FaultCause::Output);
    assert!(message.contains("exceeds 131072 bytes"), "{message}");
}

#[test]
fn the_row_that_fails_alone_is_named() {
    let fixture = Fixture::new(options());
    let mut worker = fixture.plugins.worker(0);
    let is =
        |value: i64| format!("(i64.eq (call $value (local.get $h) (local.get $d) (local.get $i)) (i64.const {value}))");
    let keep = format!(
        "(if {} (then unreachable)) (if {} (then (call $fail (local.get $i) (i32.const 8) (i32.const 6)))) (i32.const 1)",
        is(13),
        is(14)
    );
    let wat = filter(&[READS_V], &keep)
        .replace("(func (export \"tg_abi\")", "(data (i32.const 8) \"no\\nway\") (func (export \"tg_abi\")");
    let id = open(&fixture, &mut worker, "picky", &wat);
    for (bad, cause, expected) in [(13, FaultCause::Trap, "unreachable"), (14, FaultCause::Failed, r"no\nway")] {
        let mut rows = vec![1; 150];
        rows[100] = bad;
        rows[120] = bad;
        let (found, index, message) = fault(run(&mut worker, id, None, &values(&rows)));
        assert_eq!((found, index), (cause, Some(100)), "{message}");
        assert!(message.contains(expected), "{message}");
        run(&mut worker, id, None, &values(&[1; 150])).unwrap();
    }
    assert_eq!(fixture.metrics.plugin_failures.get(), 3, "a batch and its row, and one told by the guest");

    // Fails with company only: the rows' own results stand.
    let id =
        open(&fixture, &mut worker, "shy", &once("(if (i32.gt_u (local.get $n) (i32.const 1)) (then unreachable))"));
    assert_eq!(run(&mut worker, id, None, &values(&[1; 70])).unwrap().keep, [true; 70]);
}

#[test]
fn a_window_has_to_be_set_aside_properly() {
    let fixture = Fixture::new(options());
    for (answer, expected) in [
        ("(i32.const 0)", "could not set aside"),
        ("(i32.const 65540)", "not a multiple of 65536"),
        ("(i32.const 131072)", "do not lie in the memory of 131072 bytes"),
        ("(i32.const -65536)", "do not lie in the memory"),
    ] {
        let open = format!("(func (export \"tg_window\") (param i32) (result i32) {answer})");
        let wat = once("");
        let start = wat.find("(func (export \"tg_window\")").unwrap();
        let end = wat.find("(func (export \"tg_release\")").unwrap();
        let wat = format!("{}{open}{}", &wat[..start], &wat[end..]);
        let message = fixture.plugins.inspect(wat.as_bytes()).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_stored_module_that_was_tampered_with_is_not_run() {
    let fixture = Fixture::new(options());
    let mut stage = fixture.unchecked("tampered", &at_least());
    let other = fixture.unchecked("other", &once(""));
    let bytes = fixture.modules.lock().unwrap()[&other.sha256].clone();
    fixture.modules.lock().unwrap().insert(stage.sha256.clone(), bytes);
    let mut worker = fixture.plugins.worker(0);
    let error = super::open(&mut worker, std::slice::from_ref(&stage)).unwrap_err();
    assert!(error.to_string().contains("is damaged"), "{error}");
    stage.sha256 = "00".repeat(32);
    let error = super::open(&mut worker, &[stage]).unwrap_err();
    assert!(error.to_string().contains("not in the store"), "{error}");
}

#[test]
fn deep_nesting_overflows_no_stack_of_ours() {
    let fixture = Fixture::new(PluginOptions { compile_time: Duration::from_secs(15), ..options() });
    let blocks = |n: usize| once(&format!("{} {}", "block ".repeat(n), "end ".repeat(n)));
    let folded = |n: usize| once(&format!("{}{}", "(block ".repeat(n), ")".repeat(n)));
    let sum = |n: usize| once(&format!("(drop {}(i32.const 1){})", "(i32.add (i32.const 1) ".repeat(n), ")".repeat(n)));
    for upload in
        [blocks(40_000), folded(40_000), sum(25_000), "(".repeat(1 << 20), format!("(module {}", "(;".repeat(1 << 20))]
    {
        match fixture.plugins.inspect(upload.as_bytes()) {
            Ok(_) | Err(PluginError::Refused(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}
