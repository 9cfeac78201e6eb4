//! A connected pair of byte streams in memory, with the readiness calls sockets have. Bound: the capacity per direction.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// One end of a memory stream.
pub struct Pipe {
    incoming: Arc<Mutex<Direction>>,
    outgoing: Arc<Mutex<Direction>>,
}

struct Direction {
    bytes: VecDeque<u8>,
    capacity: usize,
    /// The writer will write no more.
    ended: bool,
    /// The reader is gone: writes fail.
    refused: bool,
    waiting: Vec<Waker>,
}

impl Direction {
    fn new(capacity: usize) -> Self {
        Self { bytes: VecDeque::new(), capacity: capacity.max(1), ended: false, refused: false, waiting: Vec::new() }
    }

    fn wait(&mut self, context: &Context<'_>) {
        if !self.waiting.iter().any(|waker| waker.will_wake(context.waker())) {
            self.waiting.push(context.waker().clone());
        }
    }

    fn wake(&mut self) {
        self.waiting.drain(..).for_each(Waker::wake);
    }

    fn is_readable(&self) -> bool {
        !self.bytes.is_empty() || self.ended || self.refused
    }

    fn is_writable(&self) -> bool {
        self.bytes.len() < self.capacity || self.ended || self.refused
    }
}

fn lock(direction: &Mutex<Direction>) -> MutexGuard<'_, Direction> {
    direction.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pipe {
    pub(super) fn pair(capacity: usize) -> (Self, Self) {
        let one = Arc::new(Mutex::new(Direction::new(capacity)));
        let other = Arc::new(Mutex::new(Direction::new(capacity)));
        (Self { incoming: Arc::clone(&one), outgoing: Arc::clone(&other) }, Self { incoming: other, outgoing: one })
    }

    pub(super) fn try_read(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut direction = lock(&self.incoming);
        if direction.refused {
            return Ok(0);
        }
        if direction.bytes.is_empty() {
            return if direction.ended { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        let mut count = 0;
        while count < into.len() && !direction.bytes.is_empty() {
            count += direction.bytes.read(&mut into[count..])?;
        }
        direction.wake();
        Ok(count)
    }

    pub(super) fn try_read_vectored(&self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut total = 0;
        for piece in into.iter_mut().filter(|piece| !piece.is_empty()) {
            match self.try_read(piece) {
                Ok(count) if count == piece.len() => total += count,
                Ok(count) => return Ok(total + count),
                Err(_) if total > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(total)
    }

    pub(super) fn try_write(&self, from: &[u8]) -> io::Result<usize> {
        let mut direction = lock(&self.outgoing);
        if direction.refused || direction.ended {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let count = from.len().min(direction.capacity - direction.bytes.len().min(direction.capacity));
        if count == 0 && !from.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        direction.bytes.extend(&from[..count]);
        direction.wake();
        Ok(count)
    }

    pub(super) fn try_write_vectored(&self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut total = 0;
        for piece in from.iter().filter(|piece| !piece.is_empty()) {
            match self.try_write(piece) {
                Ok(count) if count == piece.len() => total += count,
                Ok(count) => return Ok(total + count),
                Err(_) if total > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(total)
    }

    fn poll_ready(
        direction: &Mutex<Direction>,
        context: &Context<'_>,
        is_ready: impl Fn(&Direction) -> bool,
    ) -> Poll<io::Result<()>> {
        let mut direction = lock(direction);
        if is_ready(&direction) {
            return Poll::Ready(Ok(()));
        }
        direction.wait(context);
        Poll::Pending
    }

    pub(super) async fn readable(&self) -> io::Result<()> {
        poll_fn(|context| Self::poll_ready(&self.incoming, context, Direction::is_readable)).await
    }

    pub(super) async fn writable(&self) -> io::Result<()> {
        poll_fn(|context| Self::poll_ready(&self.outgoing, context, Direction::is_writable)).await
    }

    pub(super) fn finish_writing(&self) {
        let mut direction = lock(&self.outgoing);
        direction.ended = true;
        direction.wake();
    }

    pub(super) fn cut(&self) {
        self.finish_writing();
        let mut direction = lock(&self.incoming);
        direction.refused = true;
        direction.wake();
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.cut();
    }
}

impl AsyncRead for Pipe {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.try_read(into.initialize_unfilled()) {
            Ok(count) => {
                into.advance(count);
                Poll::Ready(Ok(()))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                match Self::poll_ready(&self.incoming, context, Direction::is_readable) {
                    // Something came between the two looks; come again at once.
                    Poll::Ready(_) => context.waker().wake_by_ref(),
                    Poll::Pending => {}
                }
                Poll::Pending
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(from)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.try_write_vectored(from) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                match Self::poll_ready(&self.outgoing, context, Direction::is_writable) {
                    Poll::Ready(_) => context.waker().wake_by_ref(),
                    Poll::Pending => {}
                }
                Poll::Pending
            }
            result => Poll::Ready(result),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finish_writing();
        Poll::Ready(Ok(()))
    }
}
