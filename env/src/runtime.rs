//! Time, randomness and tasks.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// A boxed future that may move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A point on a clock that never jumps and also runs while the host is suspended (CLOCK_BOOTTIME), in nanoseconds. P8
/// measures its read window with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

impl Moment {
    /// Time passed since `earlier`; zero if it lies in the future.
    #[must_use]
    pub fn since(self, earlier: Moment) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// This moment plus `duration`.
    #[must_use]
    pub fn after(self, duration: Duration) -> Moment {
        Moment(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}

/// What a world must offer. Implemented by the operating system ([`crate::os`]) and by the simulator.
pub trait Runtime: Send + Sync + 'static {
    /// The steady clock.
    fn now(&self) -> Moment;
    /// Milliseconds since 1970 by the host's wall clock; for people only, never for decisions.
    fn wall_millis(&self) -> u64;
    /// 64 random bits.
    fn random(&self) -> u64;
    /// Identity of this boot of the host; changes when the machine restarts (P3).
    fn boot_id(&self) -> u128;
    /// Starts a task.
    fn spawn(&self, name: &'static str, task: BoxFuture<'static, ()>) -> TaskHandle;
    /// Completes at `at` or a little later.
    fn sleep_until(&self, at: Moment) -> BoxFuture<'static, ()>;
    /// Runs work that may block or burn CPU for long, away from the tasks.
    fn blocking(
        &self,
        work: Box<dyn FnOnce() -> Box<dyn Any + Send> + Send>,
    ) -> BoxFuture<'static, Box<dyn Any + Send>>;
}

/// Handle on the world; cheap to clone.
#[derive(Clone)]
pub struct Env(Arc<dyn Runtime>);

impl fmt::Debug for Env {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Env")
    }
}

impl Env {
    /// Wraps a world.
    #[must_use]
    pub fn new(runtime: Arc<dyn Runtime>) -> Self {
        Self(runtime)
    }

    /// See [`Runtime::now`].
    #[must_use]
    pub fn now(&self) -> Moment {
        self.0.now()
    }

    /// See [`Runtime::wall_millis`].
    #[must_use]
    pub fn wall_millis(&self) -> u64 {
        self.0.wall_millis()
    }

    /// 64 random bits.
    #[must_use]
    pub fn random(&self) -> u64 {
        self.0.random()
    }

    /// 128 random bits, for identities and tokens.
    #[must_use]
    pub fn random_u128(&self) -> u128 {
        u128::from(self.0.random()) << 64 | u128::from(self.0.random())
    }

    /// See [`Runtime::boot_id`].
    #[must_use]
    pub fn boot_id(&self) -> u128 {
        self.0.boot_id()
    }

    /// Starts a task. Dropping the handle lets it run on.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) -> TaskHandle {
        self.0.spawn(name, Box::pin(task))
    }

    /// Completes after `duration`.
    pub fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        self.0.sleep_until(self.now().after(duration))
    }

    /// Runs `future` for at most `limit`; `None` when the time is up (the future is dropped).
    pub async fn timeout<F: Future>(&self, limit: Duration, future: F) -> Option<F::Output> {
        let mut future = std::pin::pin!(future);
        let mut sleep: Option<BoxFuture<'static, ()>> = None;
        let deadline = self.now().after(limit);
        std::future::poll_fn(move |context| {
            if let Poll::Ready(output) = future.as_mut().poll(context) {
                return Poll::Ready(Some(output));
            }
            // The timer is made only when the future was not ready at once: the hot path pays nothing.
            sleep.get_or_insert_with(|| self.0.sleep_until(deadline)).as_mut().poll(context).map(|()| None)
        })
        .await
    }

    /// Runs work that may block or burn CPU for long, away from the tasks.
    pub async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let done = self.0.blocking(Box::new(move || Box::new(work()) as Box<dyn Any + Send>)).await;
        *done.downcast::<T>().expect("blocking work returns its own type")
    }
}

/// A started task.
pub struct TaskHandle {
    /// Ends the task at its next await.
    pub abort: Box<dyn Fn() + Send + Sync>,
    /// Completes when the task has ended, however it ended.
    pub ended: BoxFuture<'static, ()>,
}

impl TaskHandle {
    /// Ends the task at its next await.
    pub fn abort(&self) {
        (self.abort)();
    }

    /// Waits until the task has ended.
    pub async fn join(self) {
        self.ended.await;
    }
}

/// Lets other tasks run once; for loops that burn CPU between awaits.
pub async fn yield_now() {
    struct Yield(bool);
    impl Future for Yield {
        type Output = ();
        fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
            if self.0 {
                return Poll::Ready(());
            }
            self.0 = true;
            context.waker().wake_by_ref();
            Poll::Pending
        }
    }
    Yield(false).await;
}
