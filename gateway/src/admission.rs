//! One budget of payload bytes for the whole gateway, instead of queues without bound.
//!
//! Before a connection starts a read, or takes in a write's payload, it charges the bytes here; they come back when the
//! reply has been handed to the socket. While the budget is spent, connections stop reading their sockets, which stops
//! their clients. Waiters are served in order of arrival, so a large request is not starved by small ones.

use futures::task::AtomicWaker;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

/// Bytes taken in advance by a busy connection, so that small requests rarely come to the shared lock.
const QUANTUM: u64 = 256 << 10;

struct Waiter {
    need: u64,
    granted: AtomicBool,
    task: AtomicWaker,
}

struct State {
    available: u64,
    queue: VecDeque<Arc<Waiter>>,
}

/// The budget; cheap to clone.
#[derive(Clone)]
pub struct Admission {
    state: Arc<Mutex<State>>,
    total: u64,
}

impl Admission {
    /// A budget of `total` bytes (at least one quantum of 256 KiB).
    #[must_use]
    pub fn new(total: u64) -> Self {
        let total = total.max(QUANTUM);
        Self { state: Arc::new(Mutex::new(State { available: total, queue: VecDeque::new() })), total }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes charged now.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.total - self.lock().available
    }

    /// Whether a connection waits for bytes.
    #[must_use]
    pub fn is_contended(&self) -> bool {
        !self.lock().queue.is_empty()
    }

    /// An account for one connection.
    #[must_use]
    pub fn account(&self) -> Account {
        Account { admission: self.clone(), held: 0, waiter: None }
    }

    /// Returns bytes (maybe none: after a waiter left the queue) and serves those who wait, in order.
    fn give_back(&self, bytes: u64) {
        let mut state = self.lock();
        state.available += bytes;
        while let Some(front) = state.queue.front() {
            if front.need > state.available {
                break;
            }
            let Some(front) = state.queue.pop_front() else { break };
            state.available -= front.need;
            front.granted.store(true, Ordering::Release);
            front.task.wake();
        }
    }
}

/// What one connection holds of the budget. Gives everything back when dropped.
pub struct Account {
    admission: Admission,
    held: u64,
    waiter: Option<Arc<Waiter>>,
}

impl Account {
    /// Ready when the account holds at least `used + need` bytes. A request larger than the whole budget is let in alone.
    ///
    /// `Pending` wakes the task when bytes are granted; if the account's own `used` bytes stand in the way, that they
    /// come back is the caller's to see.
    pub fn poll_charge(&mut self, context: &mut Context<'_>, used: u64, need: u64) -> Poll<()> {
        let total = self.admission.total;
        let wanted = if used == 0 { need.min(total) } else { used.saturating_add(need) };
        if wanted > total {
            return Poll::Pending;
        }
        if self.held >= wanted {
            return Poll::Ready(());
        }
        if let Some(waiter) = &self.waiter {
            waiter.task.register(context.waker());
            if !waiter.granted.load(Ordering::Acquire) {
                return Poll::Pending;
            }
            self.held += waiter.need;
            self.waiter = None;
            return self.poll_charge(context, used, need);
        }
        let missing = wanted - self.held;
        let mut state = self.admission.lock();
        if state.queue.is_empty() {
            for take in [missing + QUANTUM, missing] {
                if state.available >= take {
                    state.available -= take;
                    self.held += take;
                    return Poll::Ready(());
                }
            }
        }
        let waiter = Arc::new(Waiter { need: missing, granted: AtomicBool::new(false), task: AtomicWaker::new() });
        waiter.task.register(context.waker());
        state.queue.push_back(Arc::clone(&waiter));
        self.waiter = Some(waiter);
        Poll::Pending
    }

    /// Whether any connection waits for bytes.
    #[must_use]
    pub fn is_contended(&self) -> bool {
        self.admission.is_contended()
    }

    /// Gives back what is not needed for `used` bytes; an idle account keeps nothing.
    pub fn settle(&mut self, used: u64) {
        if self.waiter.is_some() {
            return;
        }
        let keep = if used == 0 { 0 } else { used + 2 * QUANTUM };
        if self.held > keep {
            let keep = if used == 0 { 0 } else { used + QUANTUM };
            self.admission.give_back(self.held - keep);
            self.held = keep;
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if let Some(waiter) = self.waiter.take() {
            let mut state = self.admission.lock();
            state.queue.retain(|queued| !Arc::ptr_eq(queued, &waiter));
            if waiter.granted.load(Ordering::Acquire) {
                self.held += waiter.need;
            }
        }
        self.admission.give_back(self.held);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    fn charge(account: &mut Account, used: u64, need: u64) -> bool {
        account.poll_charge(&mut Context::from_waker(Waker::noop()), used, need).is_ready()
    }

    #[test]
    fn the_sum_of_all_accounts_never_exceeds_the_budget_and_comes_back() {
        let admission = Admission::new(1 << 20);
        let (mut first, mut second) = (admission.account(), admission.account());
        assert!(charge(&mut first, 0, 700 << 10));
        assert!(!charge(&mut second, 0, 700 << 10));
        assert!(admission.is_contended());
        first.settle(0);
        assert!(charge(&mut second, 0, 700 << 10), "granted when the first settles");
        assert!(admission.used() <= 1 << 20);
        drop((first, second));
        assert_eq!(admission.used(), 0);
    }

    #[test]
    fn a_large_request_in_the_queue_is_not_overtaken() {
        let admission = Admission::new(1 << 20);
        let (mut holder, mut large, mut small) = (admission.account(), admission.account(), admission.account());
        assert!(charge(&mut holder, 0, 600 << 10));
        assert!(!charge(&mut large, 0, 900 << 10));
        assert!(!charge(&mut small, 0, 1 << 10), "the large one is first");
        drop(holder);
        assert!(charge(&mut large, 0, 900 << 10));
        drop(large);
        assert!(charge(&mut small, 0, 1 << 10));
    }

    #[test]
    fn a_waiter_that_leaves_lets_the_next_one_through() {
        let admission = Admission::new(1 << 20);
        let (mut holder, mut large, mut small) = (admission.account(), admission.account(), admission.account());
        assert!(charge(&mut holder, 0, 700 << 10));
        assert!(!charge(&mut large, 0, 900 << 10));
        assert!(!charge(&mut small, 0, 10 << 10));
        drop(large);
        assert!(charge(&mut small, 0, 10 << 10));
        drop((holder, small));
        assert_eq!(admission.used(), 0);
    }

    #[test]
    fn an_account_that_has_the_whole_budget_gets_no_more() {
        let admission = Admission::new(1 << 20);
        let mut account = admission.account();
        assert!(charge(&mut account, 0, 1 << 20));
        assert!(!charge(&mut account, 1 << 20, 1));
        assert!(!admission.is_contended(), "it waits for itself only");
        assert!(charge(&mut account, 1 << 19, 1 << 19));
    }

    #[test]
    fn a_request_larger_than_the_budget_is_served_alone() {
        let admission = Admission::new(1 << 20);
        let mut account = admission.account();
        assert!(charge(&mut account, 0, 32 << 20));
        account.settle(0);
        assert_eq!(admission.used(), 0);
    }
}
