//! The real world: tokio tasks and timers, the kernel's clocks and randomness. Owner: the process; one per runtime.
#![allow(unsafe_code)]

use crate::runtime::{BoxFuture, Env, Moment, Runtime, TaskHandle};
use std::any::Any;
use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::runtime::Handle;

/// A [`Runtime`] on a tokio runtime; cheap to clone.
#[derive(Clone, Debug)]
pub struct OsRuntime {
    handle: Handle,
    boot_id: u128,
}

impl OsRuntime {
    /// A world on the given tokio runtime, with the host's boot id.
    ///
    /// # Errors
    /// When the kernel does not tell a boot id (no /proc): without one, P3 cannot tell a restart from a power loss.
    pub fn new(handle: Handle) -> io::Result<Self> {
        let boot_id = read_boot_id()?;
        #[cfg(any(test, feature = "faults"))]
        let boot_id = crate::faults::Faults::of_process().map_or(boot_id, |faults| faults.boot_id(boot_id));
        Ok(Self { handle, boot_id })
    }

    /// A world that claims another boot id: tests of what happens after a restart of the host.
    #[must_use]
    pub fn with_boot_id(handle: Handle, boot_id: u128) -> Self {
        Self { handle, boot_id }
    }

    /// The world of the tokio runtime that runs the caller.
    ///
    /// # Panics
    /// Outside a tokio runtime, or when the host has no boot id.
    #[must_use]
    pub fn current() -> Env {
        Self::new(Handle::current()).expect("the host has a boot id").into_env()
    }

    /// The handle on the world.
    #[must_use]
    pub fn into_env(self) -> Env {
        Env::new(Arc::new(self))
    }
}

fn read_boot_id() -> io::Result<u128> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(PATH)
        .map_err(|source| crate::error::file_error("read", std::path::Path::new(PATH), source))?;
    u128::from_str_radix(&text.trim().replace('-', ""), 16).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Nanoseconds of CLOCK_BOOTTIME.
fn boot_time_nanos() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writes; CLOCK_BOOTTIME exists since Linux 2.6.39.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    assert_eq!(result, 0, "CLOCK_BOOTTIME is readable");
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

thread_local! {
    /// Random words fetched together: getrandom is a system call on the C libraries we meet.
    static RANDOM: RefCell<([u64; 32], usize)> = const { RefCell::new(([0; 32], 32)) };
}

fn random_word() -> u64 {
    RANDOM.with_borrow_mut(|(words, used)| {
        if *used == words.len() {
            fill_random(words);
            *used = 0;
        }
        // A word is handed out once: identities and tokens are made of them.
        let word = std::mem::take(&mut words[*used]);
        *used += 1;
        word
    })
}

fn fill_random(words: &mut [u64; 32]) {
    let bytes = size_of_val(words);
    loop {
        // SAFETY: the buffer has `bytes` bytes and any bit pattern is a valid u64.
        let got = unsafe { libc::getrandom(words.as_mut_ptr().cast(), bytes, 0) };
        if usize::try_from(got) == Ok(bytes) {
            return;
        }
        let error = io::Error::last_os_error();
        assert!(got >= 0 || error.kind() == io::ErrorKind::Interrupted, "getrandom: {error}");
    }
}

/// Tells about a task that ends by a panic; tokio would keep it to itself until somebody joins.
struct PanicNote(&'static str);

impl Drop for PanicNote {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(task = self.0, "task panicked");
        }
    }
}

impl Runtime for OsRuntime {
    fn now(&self) -> Moment {
        let nanos = boot_time_nanos();
        #[cfg(any(test, feature = "faults"))]
        let nanos = crate::faults::Faults::of_process().map_or(nanos, |faults| faults.now(nanos));
        Moment(nanos)
    }

    fn wall_millis(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let millis = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        #[cfg(any(test, feature = "faults"))]
        let millis = crate::faults::Faults::of_process().map_or(millis, |faults| faults.wall_millis(millis));
        millis
    }

    fn random(&self) -> u64 {
        random_word()
    }

    fn boot_id(&self) -> u128 {
        self.boot_id
    }

    fn spawn(&self, name: &'static str, task: BoxFuture<'static, ()>) -> TaskHandle {
        let join = self.handle.spawn(async move {
            let _note = PanicNote(name);
            task.await;
        });
        let abort = join.abort_handle();
        TaskHandle {
            abort: Box::new(move || abort.abort()),
            ended: Box::pin(async move {
                // Aborted or panicked (told by `PanicNote`): ended all the same.
                let _ = join.await;
            }),
        }
    }

    fn sleep_until(&self, at: Moment) -> BoxFuture<'static, ()> {
        let wait = at.since(self.now());
        #[cfg(any(test, feature = "faults"))]
        let wait = crate::faults::Faults::of_process().map_or(wait, |faults| faults.real_time(wait));
        let _context = self.handle.enter();
        Box::pin(tokio::time::sleep(wait))
    }

    fn blocking(
        &self,
        work: Box<dyn FnOnce() -> Box<dyn Any + Send> + Send>,
    ) -> BoxFuture<'static, Box<dyn Any + Send>> {
        let join = self.handle.spawn_blocking(work);
        Box::pin(async move {
            match join.await {
                Ok(value) => value,
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                // The runtime shuts down and never started the work; the waiting task is being dropped as well.
                Err(_) => std::future::pending().await,
            }
        })
    }
}

/// A tokio runtime for a daemon or benchmark.
///
/// tokio's intervals (look at the network every 61 tasks, at the global queue as measured by itself) stay: half and twice of
/// each made no difference beyond the noise at 32 disk requests in flight. One worker costs least per request (6 us of
/// CPU against 9 with two at that depth: no thread is woken for another's task); take more for more cores' worth of work.
///
/// # Errors
/// When threads or the reactor cannot be created.
pub fn build_runtime(workers: usize) -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers.max(1))
        .thread_name("xsan-worker")
        .enable_all()
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    #[tokio::test]
    async fn time_passes_while_sleeping_and_random_words_differ() {
        let env = OsRuntime::current();
        let before = env.now();
        env.sleep(Duration::from_millis(5)).await;
        assert!(env.now().since(before) >= Duration::from_millis(5));
        let mut words: Vec<u64> = (0..1000).map(|_| env.random()).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), 1000);
        assert!(env.wall_millis() > 1_700_000_000_000);
        assert_ne!(env.boot_id(), 0);
        assert_eq!(env.boot_id(), OsRuntime::current().boot_id());
    }

    #[tokio::test]
    async fn a_task_runs_without_its_handle_and_ends_when_aborted() {
        let env = OsRuntime::current();
        let (sender, receiver) = tokio::sync::oneshot::channel();
        drop(env.spawn("free", async move { sender.send(7).expect("the test waits") }));
        assert_eq!(receiver.await, Ok(7));
        let stuck = env.spawn("stuck", std::future::pending());
        stuck.abort();
        stuck.join().await;
    }

    #[tokio::test]
    async fn blocking_work_returns_its_value_and_a_timeout_drops_what_is_late() {
        let env = OsRuntime::current();
        assert_eq!(env.blocking(|| 6 * 7).await, 42);
        static DROPPED: AtomicBool = AtomicBool::new(false);
        struct Note;
        impl Drop for Note {
            fn drop(&mut self) {
                DROPPED.store(true, Ordering::Relaxed);
            }
        }
        let late = async {
            let _note = Note;
            std::future::pending::<()>().await;
        };
        assert_eq!(env.timeout(Duration::from_millis(1), late).await, None);
        assert!(DROPPED.load(Ordering::Relaxed));
    }

    #[test]
    fn a_built_runtime_carries_an_env_across_threads() {
        let runtime = build_runtime(2).expect("threads");
        let env = OsRuntime::with_boot_id(runtime.handle().clone(), 9).into_env();
        assert_eq!(env.boot_id(), 9);
        // A sleep may be made outside the runtime.
        let sleep = env.sleep(Duration::from_millis(1));
        runtime.block_on(sleep);
    }
}
