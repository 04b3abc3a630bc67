//! Threads of their own for the plans of queries.
//!
//! An operator that joins everything with everything, or a function over long texts, may compute for many seconds without
//! coming back to ask whether it should go on: nothing can interrupt it. On a thread that serves HTTP it would hold up
//! everybody who is served there, the sockets of live queries with them. Here it holds up queries alone; who waits for
//! the rows waits elsewhere, and is told at the deadline. What such a plan holds (its memory, its permit) it gives back
//! when it really has ended. What it computes while nobody waits for it counts here.

use std::time::{Duration, Instant};

use ::arrow::record_batch::RecordBatch;
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

use super::SqlError;

/// The batches of a running plan.
pub(crate) type Batches = BoxStream<'static, Result<RecordBatch, SqlError>>;

/// How many batches may be ready before somebody takes them: the next is made while one is written to a socket.
const AHEAD: usize = 1;

pub(crate) struct Runner {
    /// There until it is dropped.
    runtime: Option<Runtime>,
}

impl Runner {
    pub(crate) fn start(threads: usize) -> Result<Runner, SqlError> {
        let runtime = Builder::new_multi_thread().worker_threads(threads).thread_name("query").enable_all().build();
        let runtime = runtime.map_err(|error| SqlError::Internal(format!("cannot start query threads: {error}")))?;
        Ok(Runner { runtime: Some(runtime) })
    }

    /// Starts a plan on one of the threads, where it makes its batches as they are taken; it ends when nobody wants the
    /// rest, when it has computed for as long as is `left` of its deadline, or when a batch is not taken until `latest`.
    pub(crate) fn run(
        &self,
        deadline: Duration,
        left: Duration,
        latest: Option<Instant>,
        start: impl FnOnce() -> Result<Batches, SqlError> + Send + 'static,
    ) -> Batches {
        let (sender, receiver) = mpsc::channel(AHEAD);
        if let Some(runtime) = &self.runtime {
            runtime.spawn(async move {
                tokio::select! {
                    () = make(deadline, left, latest, start, &sender) => {}
                    () = sender.closed() => {}
                }
            });
        }
        futures::stream::unfold(Some(receiver), |receiver| async move {
            let mut receiver = receiver?;
            match receiver.recv().await {
                Some(Some(batch)) => Some((batch, Some(receiver))),
                Some(None) => None,
                // Without its last word it was given up: what came so far must not be taken for all.
                None => Some((Err(SqlError::Internal("a query was given up midway".to_owned())), None)),
            }
        })
        .boxed()
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        // Without waiting: this may be an async thread, and a plan that cannot be interrupted is not worth waiting for.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Sends all batches, and `None` after the last.
async fn make(
    deadline: Duration,
    mut left: Duration,
    latest: Option<Instant>,
    start: impl FnOnce() -> Result<Batches, SqlError>,
    sender: &mpsc::Sender<Option<Result<RecordBatch, SqlError>>>,
) {
    let mut batches = match start() {
        Ok(batches) => batches,
        Err(error) => futures::stream::iter([Err(error)]).boxed(),
    };
    loop {
        let began = Instant::now();
        let Some(batch) = batches.next().await else { break };
        left = left.saturating_sub(began.elapsed());
        let batch = if left.is_zero() { batch.and(Err(SqlError::Deadline(deadline))) } else { batch };
        let sent = match latest {
            Some(latest) => tokio::time::timeout_at(latest.into(), sender.send(Some(batch))).await,
            None => Ok(sender.send(Some(batch)).await),
        };
        match sent {
            Ok(Ok(())) if !left.is_zero() => {}
            Ok(_) => return,
            Err(_) => {
                // What the plan holds is given back first: who takes nothing may take its time to hear of it, too.
                drop(batches);
                let _ = sender.send(Some(Err(SqlError::Deadline(deadline)))).await;
                return;
            }
        }
    }
    // Nobody to hear it is as good.
    let _ = sender.send(None).await;
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ::arrow::datatypes::Schema;

    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    fn batch() -> Result<RecordBatch, SqlError> {
        Ok(RecordBatch::new_empty(Arc::new(Schema::empty())))
    }

    #[tokio::test]
    async fn what_ends_early_is_not_taken_for_whole() {
        let runner = Runner::start(1).unwrap();
        let whole = runner.run(LONG, LONG, None, || Ok(futures::stream::iter([batch(), batch()]).boxed()));
        let whole: Vec<_> = whole.collect().await;
        assert!(whole.len() == 2 && whole.iter().all(Result::is_ok));
        let failed: Vec<_> =
            runner.run(LONG, LONG, None, || Err(SqlError::Limit("too much".to_owned()))).collect().await;
        assert!(matches!(&failed[..], [Err(SqlError::Limit(_))]));
        let endless = || Ok(futures::stream::iter([batch()]).chain(futures::stream::pending()).boxed());
        let endless = runner.run(LONG, LONG, None, endless);
        drop(runner);
        let cut: Vec<_> = endless.collect().await;
        assert!(matches!(cut.last(), Some(Err(SqlError::Internal(_)))));
    }

    /// Whoever takes the batches waits for none of them, and is told all the same.
    #[tokio::test]
    async fn what_is_computed_counts() {
        let runner = Runner::start(1).unwrap();
        let made = || Ok(futures::stream::repeat_with(batch).boxed());
        let mut batches = runner.run(LONG, Duration::ZERO, None, made);
        assert!(matches!(batches.next().await, Some(Err(SqlError::Deadline(_)))));
        let busy = || {
            let began = Instant::now();
            let slow = futures::stream::repeat_with(move || {
                while began.elapsed() < Duration::from_millis(20) {
                    std::hint::spin_loop();
                }
                batch()
            });
            Ok(slow.boxed())
        };
        let mut batches = runner.run(LONG, Duration::from_millis(10), None, busy);
        assert!(matches!(batches.next().await, Some(Err(SqlError::Deadline(_)))));
    }

    #[tokio::test]
    async fn what_nobody_takes_is_dropped() {
        let runner = Runner::start(1).unwrap();
        let (held, dropped) = tokio::sync::oneshot::channel::<()>();
        let mut batches = runner.run(LONG, LONG, None, move || {
            let endless = futures::stream::repeat_with(move || {
                let _still_here = &held;
                batch()
            });
            Ok(endless.boxed())
        });
        assert!(batches.next().await.is_some());
        drop(batches);
        assert!(dropped.await.is_err());
    }

    #[tokio::test]
    async fn what_is_not_taken_in_time_is_dropped_before_that_is_said() {
        let runner = Runner::start(1).unwrap();
        let (held, dropped) = tokio::sync::oneshot::channel::<()>();
        let mut batches = runner.run(LONG, LONG, Some(Instant::now()), move || {
            let endless = futures::stream::repeat_with(move || {
                let _still_here = &held;
                batch()
            });
            Ok(endless.boxed())
        });
        assert!(dropped.await.is_err());
        assert!(matches!(batches.next().await, Some(Ok(_))));
        assert!(matches!(batches.next().await, Some(Err(SqlError::Deadline(_)))));
    }
}
