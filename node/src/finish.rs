//! Calls that run to their end even if nobody waits: a device write under way must be accounted for before its place can
//! be given to somebody else.

use std::pin::Pin;
use std::task::{Context, Poll};
use xsan_env::Env;
use xsan_env::runtime::BoxFuture;
use xsan_wire::node::NodeError;

/// Runs `inner` on as a task if this is dropped before it is done.
pub(crate) struct Finish<T: Send + 'static> {
    env: Env,
    inner: Option<BoxFuture<'static, T>>,
}

impl<T: Send + 'static> Finish<T> {
    pub(crate) fn boxed(env: &Env, inner: impl Future<Output = T> + Send + 'static) -> BoxFuture<'static, T> {
        Box::pin(Self { env: env.clone(), inner: Some(Box::pin(inner)) })
    }
}

/// Runs `call` as a task of its own. For everything that takes the log's lock or leads a flush: a caller that does not
/// poll for a while must not hold up the others.
pub(crate) fn spawned<T: Send + 'static>(
    env: &Env,
    call: impl Future<Output = Result<T, NodeError>> + Send + 'static,
) -> BoxFuture<'static, Result<T, NodeError>> {
    let (done, outcome) = tokio::sync::oneshot::channel();
    drop(env.spawn("node-call", async move {
        let _ = done.send(call.await);
    }));
    // Without an outcome the world is ending.
    Box::pin(async move { outcome.await.unwrap_or(Err(NodeError::Unavailable)) })
}

impl<T: Send + 'static> Future for Finish<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let inner = self.inner.as_mut().expect("not polled after its end");
        let polled = inner.as_mut().poll(context);
        if polled.is_ready() {
            self.inner = None;
        }
        polled
    }
}

impl<T: Send + 'static> Drop for Finish<T> {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.take() {
            drop(self.env.spawn("node-finish", async move {
                let _ = inner.await;
            }));
        }
    }
}
