//! Work that runs beside its caller, and work that lets others run.

use futures::FutureExt;
use lsm_block::store::{StoreError, StoreResult};
use std::future::Future;
use tokio::sync::oneshot;
use xsan_env::{Env, TaskHandle, yield_now};

/// Bytes copied, encoded or hashed between two yields: well below 100 us on any machine worth the name.
const TURN_BYTES: usize = 256 << 10;

/// Lets other tasks run after every [`TURN_BYTES`] of work.
#[derive(Default)]
pub(crate) struct Pacer(usize);

impl Pacer {
    /// Counts work that was just done.
    pub(crate) async fn spend(&mut self, bytes: usize) {
        self.0 += bytes;
        if self.0 >= TURN_BYTES {
            self.0 = 0;
            yield_now().await;
        }
    }
}

/// Ends a task when its caller has lost interest.
struct AbortOnDrop(TaskHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Starts `work` as a task of its own, so that its computing never holds up the caller's task. Dropping the answer ends it.
pub(crate) fn run_beside<T: Send + 'static>(
    env: &Env,
    name: &'static str,
    work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> StoreResult<T> {
    let (sender, receiver) = oneshot::channel();
    let task = env.spawn(
        name,
        work.map(|result| {
            // Nobody waits any more: the answer is of no use to anybody.
            let _ = sender.send(result);
        }),
    );
    let guard = AbortOnDrop(task);
    Box::pin(async move {
        let _guard = guard;
        // The task ends without an answer only if it panicked or the runtime goes down.
        receiver.await.unwrap_or(Err(StoreError::Internal))
    })
}
