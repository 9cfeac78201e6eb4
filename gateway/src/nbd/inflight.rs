//! The operations under way on a connection: a set of futures polled by one task.
//!
//! Unlike `FuturesUnordered` it allocates nothing per operation: slots and their wakers are made once and used again.
//! Bound: the caller admits no more than its limit of requests. Completion order is that of the wake-ups.

use futures::task::AtomicWaker;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

struct Ready {
    slots: Mutex<Vec<u32>>,
    task: AtomicWaker,
}

struct SlotWaker {
    ready: Arc<Ready>,
    index: u32,
    queued: AtomicBool,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.ready.slots.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
            self.ready.task.wake();
        }
    }
}

struct Slot<M, F> {
    waker: Waker,
    state: Arc<SlotWaker>,
    work: Option<(M, F)>,
}

/// Futures with a note `M` each.
pub struct InFlight<M, F> {
    ready: Arc<Ready>,
    slots: Vec<Slot<M, F>>,
    free: Vec<u32>,
    /// Woken slots taken from `ready` and not yet polled.
    batch: Vec<u32>,
}

impl<M, F> Default for InFlight<M, F> {
    fn default() -> Self {
        let ready = Arc::new(Ready { slots: Mutex::new(Vec::new()), task: AtomicWaker::new() });
        Self { ready, slots: Vec::new(), free: Vec::new(), batch: Vec::new() }
    }
}

impl<M, F: Future + Unpin> InFlight<M, F> {
    /// Futures under way.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether none is under way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Polls the future once; if it is not ready it joins the set, else note and result come back at once.
    pub fn start(&mut self, note: M, mut future: F) -> Option<(M, F::Output)> {
        let index = self.free.pop().unwrap_or_else(|| self.grow());
        let slot = &mut self.slots[index as usize];
        debug_assert!(slot.work.is_none());
        match Pin::new(&mut future).poll(&mut Context::from_waker(&slot.waker)) {
            Poll::Ready(result) => {
                self.free.push(index);
                Some((note, result))
            }
            Poll::Pending => {
                slot.work = Some((note, future));
                None
            }
        }
    }

    fn grow(&mut self) -> u32 {
        let index = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        let state = Arc::new(SlotWaker { ready: Arc::clone(&self.ready), index, queued: AtomicBool::new(false) });
        self.slots.push(Slot { waker: Waker::from(Arc::clone(&state)), state, work: None });
        index
    }

    /// The next finished future with its note; `Pending` when none is finished (also when the set is empty).
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<(M, F::Output)> {
        loop {
            if self.batch.is_empty() {
                // Registered before looking: a wake-up in between is not lost.
                self.ready.task.register(context.waker());
                let mut woken = self.ready.slots.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::swap(&mut *woken, &mut self.batch);
                drop(woken);
                if self.batch.is_empty() {
                    return Poll::Pending;
                }
                // First woken, first polled.
                self.batch.reverse();
            }
            while let Some(index) = self.batch.pop() {
                let slot = &mut self.slots[index as usize];
                slot.state.queued.store(false, Ordering::Release);
                let Some((_, future)) = &mut slot.work else { continue };
                if let Poll::Ready(result) = Pin::new(future).poll(&mut Context::from_waker(&slot.waker)) {
                    let note = slot.work.take().map(|(note, _)| note);
                    self.free.push(index);
                    if let Some(note) = note {
                        return Poll::Ready((note, result));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tests make their own runtime")]
mod tests {
    use super::*;
    use futures::channel::oneshot;
    use std::future::poll_fn;
    use xsan_env::runtime::BoxFuture;

    #[tokio::test]
    async fn futures_finish_in_the_order_of_their_wake_ups_and_slots_are_used_again() {
        let mut set: InFlight<u32, BoxFuture<u32>> = InFlight::default();
        for round in 0..3 {
            let (senders, receivers): (Vec<_>, Vec<_>) = (0..8).map(|_| oneshot::channel::<u32>()).unzip();
            for (note, receiver) in (0..).zip(receivers) {
                assert!(set.start(note, Box::pin(async { receiver.await.unwrap_or(0) })).is_none());
            }
            assert_eq!((set.len(), set.slots.len()), (8, 8), "round {round}");
            let waker = Waker::noop();
            assert!(set.poll_next(&mut Context::from_waker(waker)).is_pending());
            for (value, sender) in senders.into_iter().enumerate().rev() {
                sender.send(100 + u32::try_from(value).expect("small")).expect("waiting");
            }
            for expected in (0..8).rev() {
                let got = poll_fn(|context| set.poll_next(context)).await;
                assert_eq!(got, (expected, 100 + expected));
            }
            assert!(set.is_empty());
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_ready_future_never_joins_and_a_wake_up_from_another_thread_arrives() {
        let mut set: InFlight<(), BoxFuture<u32>> = InFlight::default();
        assert_eq!(set.start((), Box::pin(async { 4 })), Some(((), 4)));
        assert!(set.is_empty());
        let (sender, receiver) = oneshot::channel();
        assert!(set.start((), Box::pin(async { receiver.await.unwrap_or(0) })).is_none());
        let env = xsan_env::OsRuntime::current();
        let work = env.spawn("elsewhere", async move { sender.send(5).expect("received") });
        assert_eq!(poll_fn(|context| set.poll_next(context)).await, ((), 5));
        work.join().await;
    }
}
