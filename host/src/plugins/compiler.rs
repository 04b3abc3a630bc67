//! Compiling in a process of its own: what a module makes the compiler do is bounded by the system, and ended without
//! asking. The child is this program again ([`run`] is its whole work): a module on stdin, compiled code on stdout.
//!
//! The child keeps no file, socket or environment of the server; it limits its own CPU time and memory before it looks at
//! the module.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use rustix::process::{Resource, Rlimit, setrlimit};

use super::PluginError;

/// The hidden subcommand of the child.
pub const COMMAND: &str = "compile-module";

/// Address space of a child: a module of the largest size allowed takes far less, with what the allocator reserves.
const MEMORY_BYTES: u64 = 4 << 30;

/// No module within its limits compiles to more.
const CODE_BYTES: u64 = 256 << 20;

/// In front of the answer: code or a message follows.
const CODE: u8 = 0;
const REFUSED: u8 = 1;

/// Compiles in a child, until `deadline` and no longer.
pub fn compile(program: &Path, wasm: bytes::Bytes, deadline: Instant) -> Result<Vec<u8>, PluginError> {
    let host = |what: &str, error: &dyn std::fmt::Display| PluginError::Host(format!("the compiler {what}: {error}"));
    let left = deadline.saturating_duration_since(Instant::now());
    let mut child = Command::new(program)
        .arg(COMMAND)
        .arg(left.as_secs().saturating_add(1).to_string())
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| host("cannot be started", &error))?;
    let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(PluginError::Host("the compiler has no pipes".to_owned()));
    };
    let (send, receive) = mpsc::sync_channel(1);
    let talk = move || {
        // A child that ends early closes its end; its exit says why.
        let _ = stdin.write_all(&wasm);
        drop(stdin);
        let mut answer = Vec::new();
        let read = stdout.take(CODE_BYTES).read_to_end(&mut answer).map(|_| answer);
        let _ = send.send(read);
    };
    let talking = thread::Builder::new().name("plugin-compile".to_owned()).spawn(talk);
    let answer = match &talking {
        Ok(_) => receive.recv_timeout(left),
        Err(error) => {
            let error = host("has no thread to be talked to", error);
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
    };
    if matches!(answer, Err(RecvTimeoutError::Timeout)) {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|error| host("cannot be waited for", &error))?;
    let answer = match answer {
        Err(RecvTimeoutError::Timeout) => return Err(PluginError::Refused(String::new())),
        Err(RecvTimeoutError::Disconnected) => return Err(PluginError::Host("the compiler said nothing".to_owned())),
        Ok(answer) => answer.map_err(|error| host("cannot be read", &error))?,
    };
    match (status.success(), answer.split_first()) {
        (true, Some((&CODE, _))) => {
            let mut answer = answer;
            answer.remove(0);
            Ok(answer)
        }
        (true, Some((&REFUSED, message))) => {
            Err(PluginError::Refused(format!("the module does not compile: {}", String::from_utf8_lossy(message))))
        }
        _ => Err(PluginError::Refused(format!(
            "compiling the module took too much memory or CPU time, and was ended ({status}): make it smaller"
        ))),
    }
}

/// The child: compiles what it reads, within its limits. `seconds` of CPU time is its argument.
pub fn run(seconds: u64) -> ExitCode {
    // A second more than the parent waits on the wall: the parent's message is the better one.
    for (resource, limit) in [(Resource::Cpu, seconds), (Resource::As, MEMORY_BYTES), (Resource::Core, 0)] {
        if setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) }).is_err() {
            return ExitCode::FAILURE;
        }
    }
    let mut wasm = Vec::new();
    if std::io::stdin().lock().read_to_end(&mut wasm).is_err() {
        return ExitCode::FAILURE;
    }
    // Cranelift recurses over what a module nests: a thread with the stack for it.
    let compile = move || super::engine::precompile(&wasm);
    let compiled = thread::Builder::new().stack_size(super::engine::COMPILER_STACK_BYTES).spawn(compile);
    let Ok(Ok(compiled)) = compiled.map(thread::JoinHandle::join) else { return ExitCode::FAILURE };
    let (tag, bytes) = match compiled {
        Ok(code) => (CODE, code),
        Err(message) => (REFUSED, message.into_bytes()),
    };
    let mut out = std::io::stdout().lock();
    match out.write_all(&[tag]).and_then(|()| out.write_all(&bytes)).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
