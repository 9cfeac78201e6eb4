//! Disk requests through io_uring: one ring per process for all disks, driven by one tokio task.
//!
//! A caller puts its request into a list under a short mutex and wakes the driver task; the task moves the list into the
//! ring, submits all of it with one `io_uring_enter`, reaps what is complete without a system call and wakes the waiting
//! tasks. The ring's descriptor sits in tokio's epoll set, so completions cost no thread of their own.
//!
//! Why a task and not a thread (4 KiB O_DIRECT writes on a virtio disk of a shared two-core VM, CPU of the process per
//! request, best of three; the loads of other users doubled all figures at times, their order stayed):
//!
//! | driver | depth 1 | depth 32 | depth 16 on 3 disks | switches at depth 1 |
//! |---|---|---|---|---|
//! | own thread, `DEFER_TASKRUN`, eventfd | 79 us | 13.4 us | - | 2.4 - 4.8 |
//! | task, submits when woken | 39 - 54 us | 9.9 us | 7.5 us | 0.3 - 1.0 |
//! | task, submits after the ready tasks ran (this one) | 52 us | **6.1 us** | **5.7 us** | 0.3 - 1.0 |
//! | fio, io_uring with registered files and buffers | 64 us | 21 us | - | 1 |
//!
//! Nearly all of it is the doorbell of the virtual device (a VM exit per submission batch, 30 - 40 us at depth 1), which is
//! why batches matter more than anything else here: with more than [`BATCH_FROM`] requests about, a driver that is woken
//! lets the other ready tasks run once before it submits (batches of 30 instead of 1 at depth 32). With fewer it submits
//! at once. `COOP_TASKRUN` spares the interrupt of a running worker per completion; a worker that computes without
//! any system call delays completions, by at most one timer tick.
//!
//! Bounds: [`IN_FLIGHT_MAX`] requests in the kernel; the list behind them is bounded by the callers' own admission.
#![allow(unsafe_code)]

use crate::buf::BufPool;
use crate::os_disk::{DiskFile, NO_SLOT, Next, PUNCH, Request, Step};
use crate::runtime::Env;
use futures::task::AtomicWaker;
use io_uring::types::{Fd, Fixed, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Requests in the kernel at a time.
const IN_FLIGHT_MAX: u32 = 1024;

/// Requests (in flight and just completed) above which a submission waits for the other ready tasks.
const BATCH_FROM: usize = 4;

/// Rounds of submit and reap before the driver lets other tasks run.
const ROUNDS_MAX: usize = 16;

/// Registered descriptors; disks beyond use plain ones.
const SLOTS: u32 = 256;

/// Largest piece of memory the kernel registers as one buffer.
const REGISTERED_BYTES_MAX: usize = 1 << 30;

/// A running driver; cheap to clone. It ends after the last handle is gone and the last request is over.
#[derive(Clone)]
pub(crate) struct Uring(Arc<Owner>);

/// Held by handles only, so that its drop means nobody will add to the queue.
struct Owner(Arc<Shared>);

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    driver: AtomicWaker,
}

#[derive(Default)]
struct Queue {
    requests: Vec<Arc<Request>>,
    /// Slots of closed disks.
    released: Vec<u32>,
    /// The driver has been woken for something in here and has not taken it yet.
    scheduled: bool,
    /// No handle is left.
    closed: bool,
    /// The driver is gone with its runtime; requests are refused.
    gone: bool,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Queue)) {
        let wake = {
            let mut queue = self.queue();
            change(&mut queue);
            !std::mem::replace(&mut queue.scheduled, true)
        };
        if wake {
            self.driver.wake();
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.change(|queue| queue.closed = true);
    }
}

impl Uring {
    /// Makes the ring and starts its task on the tokio runtime of the caller.
    pub(crate) fn start(env: &Env, pool: &BufPool) -> io::Result<Self> {
        let uring = make_ring()?;
        let shared = Arc::new(Shared::default());
        let ring = Ring::new(uring, Arc::clone(&shared), pool)?;
        let descriptor = RingDescriptor(ring.uring.as_raw_fd());
        // SAFETY: `Driver` drops the registration before the ring that owns the descriptor, which never changes.
        let ready = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
        let driver = Driver { ready, ring, completed: 0, yielded: false };
        drop(env.spawn("io-uring", driver));
        Ok(Self(Arc::new(Owner(shared))))
    }

    pub(crate) fn submit(&self, request: Arc<Request>) {
        let mut request = Some(request);
        self.0.0.change(|queue| {
            if !queue.gone {
                queue.requests.extend(request.take());
            }
        });
        if let Some(request) = request {
            // SAFETY: the request was not queued, so nobody else will end it.
            unsafe { request.refuse(io::ErrorKind::BrokenPipe.into()) };
        }
    }
}

fn make_ring() -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_cqsize(2 * IN_FLIGHT_MAX);
    let mut modern = builder.clone();
    // Linux 5.19; older kernels interrupt the submitter instead.
    modern.setup_coop_taskrun().setup_submit_all();
    modern.build(IN_FLIGHT_MAX).or_else(|_| builder.build(IN_FLIGHT_MAX))
}

struct RingDescriptor(RawFd);

impl AsRawFd for RingDescriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// The task. Field order matters: the registration goes before the ring whose descriptor it names.
struct Driver {
    ready: AsyncFd<RingDescriptor>,
    ring: Ring,
    /// Completions of the last round that had any: about as many tasks were woken and may come back with requests.
    completed: usize,
    yielded: bool,
}

impl Driver {
    /// Whether the ready tasks should run before what is queued is submitted.
    fn should_wait(&self) -> bool {
        !self.yielded && self.ring.in_flight + self.completed > BATCH_FROM && self.ring.shared.queue().scheduled
    }
}

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        this.ring.shared.driver.register(context.waker());
        for _ in 0..ROUNDS_MAX {
            let reaped = this.ring.reap();
            if reaped > 0 {
                this.completed = reaped;
            }
            if this.should_wait() {
                this.yielded = true;
                // A task that wakes itself goes behind all that are ready.
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            this.yielded = false;
            this.ring.take();
            let submitted = this.ring.submit();
            if this.ring.is_over() {
                return Poll::Ready(());
            }
            if reaped > 0 || submitted {
                continue;
            }
            match this.ready.poll_read_ready(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(mut guard)) => {
                    // Cleared only when nothing is there: the readiness is told once.
                    if !this.ring.has_completions() {
                        guard.clear_ready();
                    }
                }
                // The runtime is shutting down.
                Poll::Ready(Err(_)) => return Poll::Ready(()),
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

struct Ring {
    uring: IoUring,
    shared: Arc<Shared>,
    /// Swapped with the queue's lists, so that neither side allocates.
    taken: Vec<Arc<Request>>,
    released: Vec<u32>,
    backlog: VecDeque<Arc<Request>>,
    /// Requests in the ring's queues or in the kernel; each is an `Arc` turned into its entry's user data.
    in_flight: usize,
    closed: bool,
    /// Address and length of the registered memory.
    arena: Option<(usize, usize)>,
    gathers_registered: bool,
    slots: Vec<u32>,
    /// The registered memory must outlive the ring.
    _pool: BufPool,
}

impl Ring {
    fn new(uring: IoUring, shared: Arc<Shared>, pool: &BufPool) -> io::Result<Self> {
        let mut probe = Probe::new();
        uring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::ReadFixed::CODE,
            opcode::WriteFixed::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.iter().all(|&code| probe.is_supported(code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let arena = register_arena(&uring, pool);
        let slots = match uring.submitter().register_files_sparse(SLOTS) {
            Ok(()) => (0..SLOTS).rev().collect(),
            // Linux before 5.19; plain descriptors cost a little more per request.
            Err(_) => Vec::new(),
        };
        Ok(Self {
            uring,
            shared,
            taken: Vec::new(),
            released: Vec::new(),
            backlog: VecDeque::new(),
            in_flight: 0,
            closed: false,
            arena,
            gathers_registered: probe.is_supported(opcode::WritevFixed::CODE),
            slots,
            _pool: pool.clone(),
        })
    }

    fn is_over(&self) -> bool {
        self.closed && self.in_flight == 0 && self.backlog.is_empty()
    }

    /// Takes what the callers left.
    fn take(&mut self) {
        {
            let mut queue = self.shared.queue();
            queue.scheduled = false;
            self.closed = queue.closed;
            std::mem::swap(&mut queue.requests, &mut self.taken);
            std::mem::swap(&mut queue.released, &mut self.released);
        }
        for slot in self.released.drain(..) {
            // A slot that cannot be emptied is not used again.
            if self.uring.submitter().register_files_update(slot, &[-1]).is_ok() {
                self.slots.push(slot);
            }
        }
        self.backlog.extend(self.taken.drain(..));
    }

    /// Hands the backlog to the kernel as far as there is room; says whether anything was handed over.
    fn submit(&mut self) -> bool {
        while self.in_flight < IN_FLIGHT_MAX as usize {
            let Some(request) = self.backlog.pop_front() else { break };
            self.register(&request.file);
            let entry = self.entry(&request).user_data(Arc::into_raw(request).expose_provenance() as u64);
            // SAFETY: the buffers belong to the request, and the request to the kernel until its completion is reaped.
            unsafe { self.uring.submission().push(&entry) }.expect("the ring has room for all that may be in flight");
            self.in_flight += 1;
        }
        self.enter()
    }

    fn enter(&mut self) -> bool {
        if self.uring.submission().is_empty() {
            return false;
        }
        loop {
            match self.uring.submit() {
                Ok(_) => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Short of memory, or completions must be reaped first: the entries stay, and the next round tries again.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)) => {
                    return true;
                }
                Err(error) => panic!("io_uring_enter: {error}"),
            }
        }
    }

    fn has_completions(&mut self) -> bool {
        !self.uring.completion().is_empty()
    }

    /// Ends the requests whose completions are there; says how many.
    fn reap(&mut self) -> usize {
        let mut reaped = 0;
        for completion in self.uring.completion() {
            reaped += 1;
            let address = usize::try_from(completion.user_data()).expect("an address");
            // SAFETY: the user data of every entry is an `Arc` given away in `submit`, and each entry completes once.
            let request = unsafe { Arc::from_raw(std::ptr::with_exposed_provenance::<Request>(address)) };
            // SAFETY: the kernel is through with the request, so it is ours again.
            unsafe {
                if request.advance(completion.result()) == Next::Again {
                    self.backlog.push_back(request);
                } else {
                    request.finish();
                }
            }
        }
        self.in_flight -= reaped;
        reaped
    }

    /// Puts the file among the registered ones, at its first request.
    fn register(&mut self, file: &Arc<DiskFile>) {
        if file.slot.load(Ordering::Relaxed) != NO_SLOT || self.slots.is_empty() {
            return;
        }
        let Some(slot) = self.slots.pop() else { return };
        if self.uring.submitter().register_files_update(slot, &[file.descriptor()]).is_err() {
            // Do not try again for every request.
            self.slots.clear();
            return;
        }
        let shared = Arc::clone(&self.shared);
        let on_close = move |slot| shared.change(|queue| queue.released.push(slot));
        assert!(file.on_close.set(Box::new(on_close)).is_ok(), "a disk belongs to one driver");
        file.slot.store(slot, Ordering::Relaxed);
    }

    /// Index of the registered buffer that holds all of this memory.
    fn registered(&self, start: *const u8, bytes: usize) -> Option<u16> {
        let (arena, arena_bytes) = self.arena?;
        let at = start.addr().checked_sub(arena)?;
        let last = at.checked_add(bytes.checked_sub(1)?)?;
        let index = at / REGISTERED_BYTES_MAX;
        let within = last < arena_bytes && last / REGISTERED_BYTES_MAX == index;
        within.then(|| u16::try_from(index).ok()).flatten()
    }

    fn registered_gather(&self, iovecs: *const libc::iovec, count: u32) -> Option<u16> {
        if !self.gathers_registered {
            return None;
        }
        // SAFETY: `Request::step` says so many iovecs are there until the request is advanced.
        let iovecs = unsafe { std::slice::from_raw_parts(iovecs, count as usize) };
        let mut indexes = iovecs.iter().map(|piece| self.registered(piece.iov_base.cast::<u8>(), piece.iov_len));
        let first = indexes.next()??;
        indexes.all(|index| index == Some(first)).then_some(first)
    }

    fn entry(&self, request: &Request) -> squeue::Entry {
        let slot = request.file.slot.load(Ordering::Relaxed);
        let descriptor = request.file.descriptor();
        macro_rules! build {
            ($op:ident($($arg:expr),*) $(.$set:ident($value:expr))*) => {
                if slot == NO_SLOT {
                    opcode::$op::new(Fd(descriptor), $($arg),*)$(.$set($value))*.build()
                } else {
                    opcode::$op::new(Fixed(slot), $($arg),*)$(.$set($value))*.build()
                }
            };
        }
        // SAFETY: the request is ours until it is pushed; nothing moves its buffers afterwards.
        match unsafe { request.step() } {
            Step::Read { start, bytes, offset } => match self.registered(start, bytes as usize) {
                Some(index) => build!(ReadFixed(start, bytes, index).offset(offset)),
                None => build!(Read(start, bytes).offset(offset)),
            },
            Step::Write { start, bytes, offset } => match self.registered(start, bytes as usize) {
                Some(index) => build!(WriteFixed(start, bytes, index).offset(offset)),
                None => build!(Write(start, bytes).offset(offset)),
            },
            Step::Gather { iovecs, count, offset } => match self.registered_gather(iovecs, count) {
                Some(index) => build!(WritevFixed(iovecs, count, index).offset(offset)),
                None => build!(Writev(iovecs, count).offset(offset)),
            },
            Step::Flush => build!(Fsync().flags(FsyncFlags::DATASYNC)),
            Step::Discard { offset, bytes } => build!(Fallocate(bytes).offset(offset).mode(PUNCH)),
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.take();
        self.shared.queue().gone = true;
        // What came between the two lines above.
        self.take();
        loop {
            for request in self.backlog.drain(..) {
                // SAFETY: the kernel does not have it, and the driver is the only one who would end it.
                unsafe { request.refuse(io::ErrorKind::BrokenPipe.into()) };
            }
            if self.in_flight == 0 {
                return;
            }
            // The kernel works on memory that is ours to free: wait until it is done.
            if let Err(error) = self.uring.submit_and_wait(1) {
                let passing = matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY));
                assert!(passing, "io_uring_enter: {error}");
            }
            self.reap();
        }
    }
}

/// Registers the arena, raising the soft memlock limit if that helps; `None` (with a warning) when it cannot be.
fn register_arena(uring: &IoUring, pool: &BufPool) -> Option<(usize, usize)> {
    let (start, bytes) = pool.arena()?;
    let pieces: Vec<libc::iovec> = (0..bytes)
        .step_by(REGISTERED_BYTES_MAX)
        .map(|at| libc::iovec {
            // SAFETY: inside the arena.
            iov_base: unsafe { start.as_ptr().add(at) }.cast(),
            iov_len: REGISTERED_BYTES_MAX.min(bytes - at),
        })
        .collect();
    // SAFETY: the arena lives as long as the pool, and the ring holds the pool.
    let register = || unsafe { uring.submitter().register_buffers(&pieces) };
    let result = register().or_else(|error| {
        raise_memlock_limit();
        register().map_err(|_| error)
    });
    match result {
        Ok(()) => Some((start.as_ptr().addr(), bytes)),
        Err(error) => {
            tracing::warn!(bytes, %error, "I/O memory is not registered with the kernel (raise `ulimit -l`)");
            None
        }
    }
}

fn raise_memlock_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for the calls. A refusal shows in the registration that follows.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit);
        }
    }
}
