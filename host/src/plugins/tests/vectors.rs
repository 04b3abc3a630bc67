//! The samples as they are built, in whatever language, against the files that guests test themselves with. Only the
//! bytes of the vector and an engine: a mistake that the host and its wire crate share would show here.

use std::path::PathBuf;

use wasmtime::{Engine, Instance, Linker, Module, Store};

const BATCH: &str = include_str!("../../../../guest-sdk/vectors/batch.txt");
const CHANGES: &str = include_str!("../../../../guest-sdk/vectors/changes.txt");
const WAT: &[u8] = include_bytes!("../../../../plugins/long_haul/long_haul.wat");

/// One exchange with a filter: what its window holds, what it is called with, what it has to answer.
struct Exchange {
    window: Vec<u8>,
    configure: u32,
    descriptors: u32,
    n: u32,
    kept: u64,
}

impl Exchange {
    fn read(vector: &str) -> Exchange {
        let mut exchange = Exchange { window: vec![0xaa; 65_536], configure: 0, descriptors: 0, n: 0, kept: 0 };
        let mut at = 0;
        // The last block of the changes is an output, which no window holds.
        for line in vector.lines().take_while(|line| !line.starts_with("output")) {
            let Some((word, rest)) = line.split_once(' ').filter(|(word, _)| *word != "#") else { continue };
            let words: Vec<&str> = rest.split_whitespace().collect();
            match word {
                "at" => at = words[0].parse().unwrap(),
                "bytes" => {
                    for byte in words {
                        exchange.window[at] = u8::from_str_radix(byte, 16).unwrap();
                        at += 1;
                    }
                }
                "configure" => exchange.configure = words[0].parse().unwrap(),
                "filter" => {
                    exchange.descriptors = words[0].parse().unwrap();
                    exchange.n = words[1].parse().unwrap();
                }
                "kept" => exchange.kept = words[0].parse().unwrap(),
                other => panic!("no such line: {other}"),
            }
        }
        assert!(exchange.n > 0 && exchange.kept > 0, "the vector has an exchange");
        exchange
    }
}

/// A guest with the exchange's window in its memory.
struct Guest {
    store: Store<()>,
    instance: Instance,
}

impl Guest {
    fn new(module: &[u8], exchange: &Exchange) -> Guest {
        let engine = Engine::default();
        let module = Module::new(&engine, wat::parse_bytes(module).unwrap()).unwrap();
        let mut linker = Linker::new(&engine);
        // Nothing in a vector fails or is worth a line in a log: who calls the host has misread it.
        linker.define_unknown_imports_as_traps(&module).unwrap();
        let mut store = Store::new(&engine, ());
        let instance = linker.instantiate(&mut store, &module).unwrap();
        let mut guest = Guest { store, instance };
        if let Ok(initialize) = instance.get_typed_func::<(), ()>(&mut guest.store, "_initialize") {
            initialize.call(&mut guest.store, ()).unwrap();
        }
        let abi = instance.get_typed_func::<(), u32>(&mut guest.store, "tg_abi").unwrap();
        assert_eq!(abi.call(&mut guest.store, ()).unwrap(), 1);
        let window = instance.get_typed_func::<u32, u32>(&mut guest.store, "tg_window").unwrap();
        let address = window.call(&mut guest.store, exchange.window.len() as u32).unwrap();
        assert!(address != 0 && address % 65_536 == 0, "the window is at {address}");
        let memory = instance.get_memory(&mut guest.store, "memory").unwrap();
        memory.write(&mut guest.store, address as usize, &exchange.window).unwrap();
        guest
    }

    fn configure(&mut self, exchange: &Exchange) -> u32 {
        let configure = self.instance.get_typed_func::<u32, u64>(&mut self.store, "tg_configure").unwrap();
        let answer = configure.call(&mut self.store, exchange.configure).unwrap();
        u32::try_from(answer).expect("a filter has a handle and no output schema")
    }

    fn filter(&mut self, handle: u32, descriptors: u32, n: u32) -> u64 {
        let filter = self.instance.get_typed_func::<(u32, u32, u32), u64>(&mut self.store, "tg_filter").unwrap();
        filter.call(&mut self.store, (handle, descriptors, n)).unwrap()
    }
}

/// A module that `tests/run.sh` has built; `None`: nobody has, here.
fn built(file: &str) -> Option<Vec<u8>> {
    let folder = std::env::var_os("TIDEGATE_PLUGINS").map(PathBuf::from);
    let beside = || std::env::current_exe().unwrap().ancestors().nth(3).unwrap().join("plugins");
    let module = std::fs::read(folder.unwrap_or_else(beside).join(file)).ok();
    if module.is_none() {
        eprintln!("{file} was not built and is left out (SAMPLES=\"c assemblyscript\" sh tests/run.sh builds all)");
    }
    module
}

/// Plays the exchange, with two sets of parameters and every smaller batch.
#[track_caller]
fn answers(what: &str, module: &[u8], exchange: &Exchange) {
    let mut guest = Guest::new(module, exchange);
    let handles = [guest.configure(exchange), guest.configure(exchange)];
    assert_ne!(handles[0], handles[1], "{what}: both are in use");
    for handle in handles {
        for n in 1..=exchange.n {
            let kept = guest.filter(handle, exchange.descriptors, n);
            assert_eq!(kept, exchange.kept & ((1 << n) - 1), "{what}, the first {n}");
        }
    }
}

/// `late` is the same filter of another column's name, which no byte of the exchange has to do with.
#[test]
fn samples_in_every_language_answer_the_vector_of_rows() {
    let exchange = Exchange::read(BATCH);
    answers("WAT", WAT, &exchange);
    for file in ["late.wasm", "long_haul_c.wasm", "long_haul_as.wasm"] {
        match built(file) {
            Some(module) => answers(file, &module, &exchange),
            // The repository's scripts build all plugins in Rust, so there it is a mistake.
            None => assert!(file != "late.wasm" || std::env::var_os("TIDEGATE_PLUGINS").is_none(), "{file}"),
        }
    }
}

/// The sample asks another question of the changes: by how much the column rose. Only change 3 does by 1000, from NULL.
#[test]
fn a_sample_reads_the_changes_of_the_vector() {
    let Some(worse) = built("worse.wasm") else { return };
    answers("worse.wasm", &worse, &Exchange { kept: 0b1000, ..Exchange::read(CHANGES) });
}

/// A row that is one mile longer than the vector's gives another answer: the test above can fail.
#[test]
fn another_row_gives_another_answer() {
    let mut longer = Exchange::read(BATCH);
    // Row 1, at 358, has 999 miles.
    let slot = 358 + longer.window[358..].windows(2).position(|bytes| bytes == [0xe7, 0x03]).unwrap();
    longer.window[slot] += 1;
    let mut guest = Guest::new(WAT, &longer);
    let handle = guest.configure(&longer);
    assert_eq!((guest.filter(handle, longer.descriptors, longer.n), longer.kept), (0b11, 0b1));
}
