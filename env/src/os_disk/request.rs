//! One started disk request: the buffers, how far the kernel got, and the slot its answer arrives in.
//!
//! Ownership: from `start` until `finish` the engine (the io_uring driver or a pool thread) owns `progress`, the buffers
//! and the result; `finish` hands them to the future with one release store. A dropped future leaves the request, and with
//! it the memory the kernel works on, to the engine.
#![allow(unsafe_code)]

use super::DiskFile;
use crate::buf::{Buf, BufMut};
use futures::task::AtomicWaker;
use std::cell::UnsafeCell;
use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

/// Most pieces the kernel takes in one vectored call.
const IOVECS_MAX: usize = 1024;

/// What to do.
pub(crate) enum Body {
    Read(BufMut),
    Write(Buf),
    Gather(Vec<Buf>),
    Flush,
    Discard,
    /// The future took the buffer away.
    Taken,
}

/// The part of the request that has one owner at a time.
struct Inner {
    body: Body,
    iovecs: Vec<libc::iovec>,
    progress: u64,
    result: io::Result<()>,
}

/// A started request.
pub(crate) struct Request {
    pub(crate) file: Arc<DiskFile>,
    offset: u64,
    bytes: u64,
    inner: UnsafeCell<Inner>,
    done: AtomicBool,
    waker: AtomicWaker,
}

// SAFETY: `inner` is touched by the engine alone while `done` is false and by the future alone afterwards; `done` is
// stored with release and loaded with acquire. The iovecs point into buffers the request itself owns.
unsafe impl Send for Request {}
// SAFETY: as above.
unsafe impl Sync for Request {}

/// The next system call of a request.
pub(crate) enum Step {
    Read { start: *mut u8, bytes: u32, offset: u64 },
    Write { start: *const u8, bytes: u32, offset: u64 },
    Gather { iovecs: *const libc::iovec, count: u32, offset: u64 },
    Flush,
    Discard { offset: u64, bytes: u64 },
}

/// Whether a request needs another system call.
#[derive(PartialEq, Eq)]
pub(crate) enum Next {
    Again,
    Over,
}

fn as_u32(bytes: usize) -> u32 {
    // The kernel stops at 2 GiB anyway; the rest follows as after any short transfer.
    u32::try_from(bytes).unwrap_or(1 << 30).min(1 << 30)
}

impl Request {
    pub(crate) fn new(file: &Arc<DiskFile>, offset: u64, bytes: u64, body: Body) -> Arc<Self> {
        let inner = Inner { body, iovecs: Vec::new(), progress: 0, result: Ok(()) };
        Arc::new(Self {
            file: Arc::clone(file),
            offset,
            bytes,
            inner: UnsafeCell::new(inner),
            done: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        })
    }

    /// What the kernel is to do next. The pointers stay valid until `advance` or `finish`.
    ///
    /// # Safety
    /// Only by the engine that owns the request, before `finish`.
    pub(crate) unsafe fn step(&self) -> Step {
        // SAFETY: the caller owns `inner`.
        let inner = unsafe { &mut *self.inner.get() };
        let done = usize::try_from(inner.progress).expect("within a buffer");
        let offset = self.offset + inner.progress;
        match &mut inner.body {
            Body::Read(into) => {
                let left = &mut into[done..];
                Step::Read { start: left.as_mut_ptr(), bytes: as_u32(left.len()), offset }
            }
            Body::Write(from) => {
                let left = &from[done..];
                Step::Write { start: left.as_ptr(), bytes: as_u32(left.len()), offset }
            }
            Body::Gather(pieces) => {
                fill_iovecs(&mut inner.iovecs, pieces, done);
                Step::Gather { iovecs: inner.iovecs.as_ptr(), count: as_u32(inner.iovecs.len()), offset }
            }
            Body::Flush => Step::Flush,
            Body::Discard => Step::Discard { offset: self.offset, bytes: self.bytes },
            Body::Taken => unreachable!("taken only after the end"),
        }
    }

    /// Takes in the kernel's answer: bytes done or a negated errno. `Over` means the result is set and `finish` is due.
    ///
    /// # Safety
    /// Only by the engine that owns the request, before `finish`.
    pub(crate) unsafe fn advance(&self, answer: i32) -> Next {
        // SAFETY: the caller owns `inner`.
        let inner = unsafe { &mut *self.inner.get() };
        if let Ok(bytes) = u64::try_from(answer) {
            inner.progress += bytes;
            let is_transfer = matches!(inner.body, Body::Read(_) | Body::Write(_) | Body::Gather(_));
            if !is_transfer {
                inner.result = self.after_control(&inner.body);
                return Next::Over;
            }
            if inner.progress >= self.bytes {
                return Next::Over;
            }
            if bytes > 0 && inner.progress.is_multiple_of(u64::from(self.file.geometry().sector)) {
                return Next::Again;
            }
            // Nothing moved, or a part of a sector did: the disk is shorter than it was when opened.
            let source = io::Error::from(io::ErrorKind::UnexpectedEof);
            inner.result = Err(self.error(&inner.body, source));
            return Next::Over;
        }
        match -answer {
            libc::EINTR | libc::EAGAIN => return Next::Again,
            // Discards are best effort: not every file system or device can.
            libc::EOPNOTSUPP | libc::ENOSYS if matches!(inner.body, Body::Discard) => {}
            errno => {
                if matches!(inner.body, Body::Flush) {
                    self.file.poison();
                }
                inner.result = Err(self.error(&inner.body, io::Error::from_raw_os_error(errno)));
            }
        }
        Next::Over
    }

    /// A flush that was under way when another one failed proves nothing either.
    fn after_control(&self, body: &Body) -> io::Result<()> {
        if matches!(body, Body::Flush) { self.file.check_poison() } else { Ok(()) }
    }

    fn error(&self, body: &Body, source: io::Error) -> io::Error {
        let operation = match body {
            Body::Read(_) => "read",
            Body::Write(_) | Body::Gather(_) => "write",
            Body::Flush => "flush",
            Body::Discard | Body::Taken => "discard",
        };
        self.file.error(operation, self.offset, self.bytes, source)
    }

    /// Hands the request to its future and wakes it.
    ///
    /// # Safety
    /// Only by the engine that owns the request, once; the engine touches it no more.
    pub(crate) unsafe fn finish(&self) {
        self.done.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Ends a request that no engine will run.
    ///
    /// # Safety
    /// As [`Request::finish`].
    pub(crate) unsafe fn refuse(&self, source: io::Error) {
        // SAFETY: the caller owns `inner`.
        let inner = unsafe { &mut *self.inner.get() };
        inner.result = Err(self.error(&inner.body, source));
        // SAFETY: as our own contract.
        unsafe { self.finish() }
    }

    /// Runs the request with plain blocking calls.
    ///
    /// # Safety
    /// Only by the engine that owns the request, once.
    pub(crate) unsafe fn run_blocking(&self) {
        let descriptor = self.file.descriptor();
        loop {
            // SAFETY: we own the request and end the step before the next one.
            let next = unsafe {
                let answer = call(descriptor, &self.step());
                self.advance(answer)
            };
            if next == Next::Over {
                // SAFETY: once, at the end.
                unsafe { self.finish() };
                return;
            }
        }
    }

    fn poll_done(&self, context: &Context<'_>) -> bool {
        if self.done.load(Ordering::Acquire) {
            return true;
        }
        self.waker.register(context.waker());
        self.done.load(Ordering::Acquire)
    }
}

fn fill_iovecs(iovecs: &mut Vec<libc::iovec>, pieces: &[Buf], mut skip: usize) {
    iovecs.clear();
    for piece in pieces {
        if skip >= piece.len() {
            skip -= piece.len();
            continue;
        }
        let left = &piece[skip..];
        skip = 0;
        iovecs.push(libc::iovec { iov_base: left.as_ptr().cast_mut().cast(), iov_len: left.len() });
        if iovecs.len() == IOVECS_MAX {
            return;
        }
    }
}

/// How to give a range back: the same call frees blocks of a file and unmaps those of a device.
pub(crate) const PUNCH: libc::c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

fn signed(offset: u64) -> libc::off_t {
    libc::off_t::try_from(offset).expect("inside a disk")
}

/// One blocking system call; its answer as io_uring gives it.
///
/// # Safety
/// The pointers of `step` are valid and the buffers owned by the caller for the whole call.
unsafe fn call(descriptor: RawFd, step: &Step) -> i32 {
    // SAFETY: by the contract of this function; the descriptor is open as long as the request's file is.
    let result = unsafe {
        match *step {
            Step::Read { start, bytes, offset } => {
                libc::pread(descriptor, start.cast(), bytes as usize, signed(offset))
            }
            Step::Write { start, bytes, offset } => {
                libc::pwrite(descriptor, start.cast(), bytes as usize, signed(offset))
            }
            Step::Gather { iovecs, count, offset } => {
                libc::pwritev(descriptor, iovecs, count.cast_signed(), signed(offset))
            }
            Step::Flush => libc::fdatasync(descriptor) as libc::ssize_t,
            Step::Discard { offset, bytes } => {
                libc::fallocate(descriptor, PUNCH, signed(offset), signed(bytes)) as libc::ssize_t
            }
        }
    };
    if result >= 0 {
        return i32::try_from(result).expect("at most 2 GiB in one call");
    }
    -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// Completes with the filled buffer.
pub(crate) struct ReadFuture(pub(crate) Arc<Request>);

impl Future for ReadFuture {
    type Output = io::Result<BufMut>;
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if !self.0.poll_done(context) {
            return Poll::Pending;
        }
        // SAFETY: `done` was seen, so the engine is through, and this is the only future of the request.
        let inner = unsafe { &mut *self.0.inner.get() };
        let result = std::mem::replace(&mut inner.result, Ok(()));
        match std::mem::replace(&mut inner.body, Body::Taken) {
            Body::Read(into) => Poll::Ready(result.map(|()| into)),
            _ => panic!("a read is polled after its end"),
        }
    }
}

/// Completes when the request is over.
pub(crate) struct DoneFuture(pub(crate) Arc<Request>);

impl Future for DoneFuture {
    type Output = io::Result<()>;
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if !self.0.poll_done(context) {
            return Poll::Pending;
        }
        // SAFETY: as in `ReadFuture`.
        let inner = unsafe { &mut *self.0.inner.get() };
        // The buffers go back to their pool now, not when the future is dropped.
        inner.body = Body::Taken;
        Poll::Ready(std::mem::replace(&mut inner.result, Ok(())))
    }
}
