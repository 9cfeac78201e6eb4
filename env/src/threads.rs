//! Disk requests on a pool of threads: for kernels and containers that forbid io_uring. About 6 us of CPU per 4 KiB
//! request and one thread switch each way; the meaning is that of the ring.
#![allow(unsafe_code)]

use crate::os_disk::Request;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Threads per driver: enough to keep a few devices busy, few enough to be cheap.
const THREADS: usize = 8;

/// A running pool; cheap to clone. The threads end after the last handle is gone and the queue is empty.
#[derive(Clone)]
pub(crate) struct Threads(Arc<Owner>);

/// Held by handles only, so that its drop means nobody will add to the queue.
struct Owner(Arc<Shared>);

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    added: Condvar,
}

#[derive(Default)]
struct Queue {
    requests: VecDeque<Arc<Request>>,
    idle: usize,
    closed: bool,
}

fn lock(shared: &Shared) -> MutexGuard<'_, Queue> {
    shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Threads {
    pub(crate) fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let owner = Self(Arc::new(Owner(Arc::clone(&shared))));
        for _ in 0..THREADS {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("xsan-disk".into()).spawn(move || serve(&shared))?;
        }
        Ok(owner)
    }

    pub(crate) fn submit(&self, request: Arc<Request>) {
        let shared = &self.0.0;
        let wake = {
            let mut queue = lock(shared);
            queue.requests.push_back(request);
            queue.idle > 0
        };
        if wake {
            shared.added.notify_one();
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        lock(&self.0).closed = true;
        self.0.added.notify_all();
    }
}

fn serve(shared: &Shared) {
    let mut queue = lock(shared);
    loop {
        if let Some(request) = queue.requests.pop_front() {
            drop(queue);
            // SAFETY: the queue handed the request to this thread alone.
            unsafe { request.run_blocking() };
            drop(request);
            queue = lock(shared);
        } else if queue.closed {
            return;
        } else {
            queue.idle += 1;
            queue = shared.added.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}
