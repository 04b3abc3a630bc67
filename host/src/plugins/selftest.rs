//! Tries at start whether the window works on this machine: a guest has to see what the host writes, and a guest that
//! writes (by a store, by a bulk operation) has to be found out without reaching the host's bytes.

use crate::telemetry::Gauge;
use wasmtime::{Linker, Module, Store, TypedFunc};
use wire::abi::WINDOW_ALIGN;

use super::engine::Engine;
use super::window::{GuestWindow, Mapping, Ring, WindowError, WorkerPart};
use crate::catalog::Seq;

/// The smallest guest with a window: its second page and the one behind that.
const GUEST: &str = r#"(module
  (memory (export "memory") 3)
  (func (export "peek") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "poke") (param i32) (i32.store8 (local.get 0) (i32.const 255)))
  (func (export "fill") (param i32) (memory.fill (local.get 0) (i32.const 255) (i32.const 70000))))"#;

const AT: u32 = WINDOW_ALIGN;

/// Why the window cannot be mapped, if it cannot.
pub fn window(engine: &Engine) -> Result<(), String> {
    let said = |error: wasmtime::Error| format!("{error:#}");
    let module = wat::parse_str(GUEST).map_err(|error| error.to_string())?;
    let module = Module::new(&engine.wasm, module).map_err(said)?;
    let ring = Ring::new(WINDOW_ALIGN, Gauge::default()).map_err(|error| format!("no ring: {error}"))?;
    let mut part =
        WorkerPart::new(WINDOW_ALIGN, Mapping::InPlace).map_err(|error| format!("no worker part: {error}"))?;
    let mut poked = Trial::new(engine, &module, &ring, &part).map_err(|error| error.to_string())?;
    let mut filled = Trial::new(engine, &module, &ring, &part).map_err(|error| error.to_string())?;
    let mut reader = Trial::new(engine, &module, &ring, &part).map_err(|error| error.to_string())?;

    ring.publish(Seq(1), &[7]);
    part.write(5, &[9]);
    let part_at = AT + WINDOW_ALIGN;
    if (reader.peek(AT)?, reader.peek(part_at + 5)?) != (7, 9) {
        return Err("a guest does not see what the host writes".to_owned());
    }
    poked.call("poke", AT)?;
    filled.call("fill", AT)?;
    if !poked.window.was_written() || !filled.window.was_written() || reader.window.was_written() {
        return Err("a guest that writes is not found out".to_owned());
    }
    if (reader.peek(AT)?, reader.peek(part_at + 5)?) != (7, 9) {
        return Err("a guest's write reached the host".to_owned());
    }
    Ok(())
}

struct Trial {
    store: Store<()>,
    instance: wasmtime::Instance,
    window: GuestWindow,
}

impl Trial {
    fn new(engine: &Engine, module: &Module, ring: &Ring, part: &WorkerPart) -> Result<Trial, WindowError> {
        let mut store = Store::new(&engine.wasm, ());
        store.set_epoch_deadline(u64::from(u32::MAX));
        let failed = |message: String| WindowError::Guest(message);
        let instance =
            Linker::new(&engine.wasm).instantiate(&mut store, module).map_err(|error| failed(format!("{error:#}")))?;
        let memory = instance.get_memory(&mut store, "memory").ok_or_else(|| failed("no memory".to_owned()))?;
        let window = GuestWindow::open(&mut store, memory, AT, Ok(ring), part, Mapping::InPlace)?;
        Ok(Trial { store, instance, window })
    }

    fn peek(&mut self, at: u32) -> Result<u32, String> {
        let peek: Result<TypedFunc<u32, u32>, _> = self.instance.get_typed_func(&mut self.store, "peek");
        peek.and_then(|peek| peek.call(&mut self.store, at)).map_err(|error| format!("{error:#}"))
    }

    fn call(&mut self, name: &str, at: u32) -> Result<(), String> {
        let function: Result<TypedFunc<u32, ()>, _> = self.instance.get_typed_func(&mut self.store, name);
        function.and_then(|function| function.call(&mut self.store, at)).map_err(|error| format!("{error:#}"))
    }
}
