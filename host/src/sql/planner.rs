//! Threads with large stacks, for parsing and planning.
//!
//! Planning can be neither awaited nor cancelled, and its recursion follows the statement's shape. So it runs on a few
//! threads of its own: a statement that plans for ever holds one of them, never an async worker.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

use super::SqlError;
use super::error::panicked;

/// Only what is touched costs memory.
const STACK_BYTES: usize = 32 * 1024 * 1024;
/// Statements that may wait for a planning thread.
const QUEUE: usize = 64;

thread_local! {
    static FOLDING: Cell<bool> = const { Cell::new(false) };
}

/// Whether a logical plan is being optimized on this thread: then functions run to be folded into constants, which
/// the optimizer copies and prints over and over. Large ones are better made when the query runs.
pub(crate) fn is_folding() -> bool {
    FOLDING.get()
}

/// Runs `optimize` with [`is_folding`] set.
pub(crate) fn folding<T>(optimize: impl FnOnce() -> T) -> T {
    /// Cleared also when the optimizer panics: the thread goes on.
    struct Clear;
    impl Drop for Clear {
        fn drop(&mut self) {
            FOLDING.set(false);
        }
    }
    FOLDING.set(true);
    let _clear = Clear;
    optimize()
}

type Job = Box<dyn FnOnce() + Send>;

pub(crate) struct Planner {
    jobs: SyncSender<Job>,
}

impl Planner {
    /// The threads end when the planner is dropped and their last job is done.
    pub(crate) fn start() -> Result<Planner, SqlError> {
        let (jobs, queue) = sync_channel::<Job>(QUEUE);
        let queue = Arc::new(Mutex::new(queue));
        let threads = std::thread::available_parallelism().map_or(2, |cores| cores.get()).clamp(2, 8);
        for number in 0..threads {
            let queue = queue.clone();
            std::thread::Builder::new()
                .name(format!("plan-{number}"))
                .stack_size(STACK_BYTES)
                .spawn(move || work(&queue))
                .map_err(|error| SqlError::Internal(format!("cannot start a planning thread: {error}")))?;
        }
        Ok(Planner { jobs })
    }

    pub(crate) async fn run<T, F>(&self, job: F) -> Result<T, SqlError>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, SqlError> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move || {
            // Nobody listens any more when the deadline has passed: then there is no need to start.
            if !answer.is_closed() {
                let _gone = answer.send(caught(job));
            }
        });
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => SqlError::Busy(format!("{QUEUE} statements wait to be planned; try again")),
            TrySendError::Disconnected(_) => SqlError::Internal("the planning threads are gone".to_owned()),
        })?;
        answered.await.map_err(|_| SqlError::Internal("planning was given up".to_owned()))?
    }
}

fn work(queue: &Mutex<Receiver<Job>>) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match job {
            Ok(job) => job(),
            Err(_) => return,
        }
    }
}

/// A panic in DataFusion's planner ends that statement, not the thread.
fn caught<T>(job: impl FnOnce() -> Result<T, SqlError>) -> Result<T, SqlError> {
    catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|cause| Err(panicked(cause)))
}

/// Runs `job` at once, about a text that is `shallow` or not: here, or on a thread made for it.
pub(crate) fn on_fitting_stack<T: Send>(
    shallow: bool,
    job: impl FnOnce() -> Result<T, SqlError> + Send,
) -> Result<T, SqlError> {
    if shallow { caught(job) } else { on_large_stack(job)? }
}

/// Runs `job` at once, on a thread made for it: for the few callers that cannot wait asynchronously.
pub(crate) fn on_large_stack<T: Send>(job: impl FnOnce() -> T + Send) -> Result<T, SqlError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, job);
        let thread = thread.map_err(|error| SqlError::Internal(format!("cannot start a thread: {error}")))?;
        thread.join().map_err(panicked)
    })
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn shallow_texts_stay_on_their_thread_and_others_get_one() {
        let here = thread::current().id();
        let ran_on = |shallow| on_fitting_stack(shallow, || Ok(thread::current().id())).unwrap();
        assert_eq!(ran_on(true), here);
        assert_ne!(ran_on(false), here);
        for shallow in [true, false] {
            let panicked = on_fitting_stack::<()>(shallow, || panic!("a bug")).unwrap_err();
            assert!(matches!(panicked, SqlError::Internal(_)), "{panicked}");
        }
    }
}
