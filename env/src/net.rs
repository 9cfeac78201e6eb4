//! Sockets: TCP, unix sockets and pipes in memory behind one type, so that a server runs on all three alike.
//!
//! A [`Stream`] can be used in two ways: shared (`&self`: `try_read`, `read`, `write_all_vectored` …, one reader and
//! one writer at a time, what the hot paths use), or owned through `AsyncRead + AsyncWrite` (what TLS and HTTP want).
#![allow(unsafe_code)]

mod listen;
mod pipe;

pub use listen::{Dialer, Listener, UnixOptions};
pub use pipe::Pipe;

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// Send buffer asked for on unix sockets (the kernel caps it at `net.core.wmem_max`): a whole large reply fits. Measured
/// against the default of 208 KiB: 78 instead of 95 us of CPU per 256 KiB reply, 270 instead of 340 us per 1 MiB reply.
const UNIX_SEND_BYTES: libc::c_int = 4 << 20;

/// A connected byte stream.
pub enum Stream {
    /// TCP, without Nagle's delay.
    Tcp(TcpStream),
    /// A unix socket.
    Unix(UnixStream),
    /// One end of a pipe in memory.
    Memory(Pipe),
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({})", self.peer())
    }
}

/// Calls the method on whichever stream it is.
macro_rules! each {
    ($stream:expr, $inner:ident => $call:expr) => {
        match $stream {
            Stream::Tcp($inner) => $call,
            Stream::Unix($inner) => $call,
            Stream::Memory($inner) => $call,
        }
    };
}

impl Stream {
    /// Connects over TCP.
    ///
    /// # Errors
    /// Those of the operating system.
    pub async fn connect_tcp(address: SocketAddr) -> io::Result<Self> {
        Self::tcp(TcpStream::connect(address).await?)
    }

    /// Connects over TCP to `host:port`, looked up anew at every call.
    ///
    /// # Errors
    /// Those of the operating system, with the address.
    pub async fn connect_host(address: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await;
        Self::tcp(stream.map_err(|e| io::Error::new(e.kind(), format!("{address}: {e}")))?)
    }

    /// Connects to a unix socket.
    ///
    /// # Errors
    /// Those of the operating system, with the path.
    pub async fn connect_unix(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        let stream = UnixStream::connect(path).await.map_err(|e| crate::error::file_error("connect to", path, e))?;
        Ok(Self::unix(stream))
    }

    /// Two connected ends; each direction holds up to `bytes`.
    #[must_use]
    pub fn memory_pair(bytes: usize) -> (Self, Self) {
        let (one, other) = Pipe::pair(bytes);
        (Self::Memory(one), Self::Memory(other))
    }

    fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(stream))
    }

    fn unix(stream: UnixStream) -> Self {
        let bytes = UNIX_SEND_BYTES;
        let length = libc::socklen_t::try_from(size_of_val(&bytes)).expect("four bytes");
        // A refusal leaves the default size: slower, not wrong.
        // SAFETY: the option's value is a C int of that length, alive during the call.
        let _ = unsafe {
            let value = (&raw const bytes).cast();
            libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, value, length)
        };
        Self::Unix(stream)
    }

    /// Who is at the other end, for logs and `list connections`: `tcp:10.0.0.7:41234`, `unix:pid=12,uid=0`, `memory`.
    #[must_use]
    pub fn peer(&self) -> String {
        match self {
            Self::Tcp(stream) => stream.peer_addr().map_or_else(|_| "tcp:?".into(), |address| format!("tcp:{address}")),
            Self::Unix(stream) => match stream.peer_cred() {
                Ok(peer) => format!("unix:pid={},uid={}", peer.pid().unwrap_or_default(), peer.uid()),
                Err(_) => "unix:?".into(),
            },
            Self::Memory(_) => "memory".into(),
        }
    }

    /// Whether both ends are on this host, so that a dead peer is noticed at once (P12).
    #[must_use]
    pub fn is_local(&self) -> bool {
        !matches!(self, Self::Tcp(_))
    }

    /// The socket's descriptor, for options; memory pipes have none.
    #[must_use]
    pub fn descriptor(&self) -> Option<RawFd> {
        match self {
            Self::Tcp(stream) => Some(stream.as_raw_fd()),
            Self::Unix(stream) => Some(stream.as_raw_fd()),
            Self::Memory(_) => None,
        }
    }

    /// Reads what is there; 0 is the end.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; else those of the connection.
    pub fn try_read(&self, into: &mut [u8]) -> io::Result<usize> {
        each!(self, inner => inner.try_read(into))
    }

    /// As [`Stream::try_read`], into several buffers.
    ///
    /// # Errors
    /// As there.
    pub fn try_read_vectored(&self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        each!(self, inner => inner.try_read_vectored(into))
    }

    /// Writes as much as fits.
    ///
    /// # Errors
    /// `WouldBlock` when nothing fits; else those of the connection.
    pub fn try_write(&self, from: &[u8]) -> io::Result<usize> {
        each!(self, inner => inner.try_write(from))
    }

    /// As [`Stream::try_write`], from several buffers (at most 1024 count).
    ///
    /// # Errors
    /// As there.
    pub fn try_write_vectored(&self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        each!(self, inner => inner.try_write_vectored(&from[..from.len().min(1024)]))
    }

    /// Waits until there may be something to read (data, the end or an error).
    ///
    /// # Errors
    /// When the runtime shuts down.
    pub async fn readable(&self) -> io::Result<()> {
        each!(self, inner => inner.readable().await)
    }

    /// Waits until there may be room to write.
    ///
    /// # Errors
    /// When the runtime shuts down.
    pub async fn writable(&self) -> io::Result<()> {
        each!(self, inner => inner.writable().await)
    }

    /// Reads at least one byte; 0 is the end. Safe to drop: nothing is lost.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.try_read(into) {
                Err(error) if is_retry(&error) => self.readable().await?,
                result => return result,
            }
        }
    }

    /// Fills `into`. Not safe to drop half-way.
    ///
    /// # Errors
    /// `UnexpectedEof` at the end; those of the connection.
    pub async fn read_exact(&self, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let got = self.read(into).await?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            into = &mut into[got..];
        }
        Ok(())
    }

    /// Writes all of `from`. Not safe to drop half-way.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn write_all(&self, from: &[u8]) -> io::Result<()> {
        self.write_all_vectored(&mut [IoSlice::new(from)]).await
    }

    /// Writes all of all buffers, in order. Not safe to drop half-way. The slices are used up.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn write_all_vectored(&self, mut from: &mut [IoSlice<'_>]) -> io::Result<()> {
        // Leading empty buffers would make a write of nothing look like a closed connection.
        IoSlice::advance_slices(&mut from, 0);
        while !from.is_empty() {
            match self.try_write_vectored(from) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => IoSlice::advance_slices(&mut from, count),
                Err(error) if is_retry(&error) => self.writable().await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Lets the kernel look for a peer that has vanished without a word: after `idle` without traffic, then five times at a
    /// fifth of that; then reads and writes fail. Only TCP needs it.
    pub fn keep_alive(&self, idle: std::time::Duration) {
        let Self::Tcp(stream) = self else { return };
        let seconds = libc::c_int::try_from(idle.as_secs()).unwrap_or(libc::c_int::MAX).max(1);
        let length = libc::socklen_t::try_from(size_of_val(&seconds)).expect("four bytes");
        for (level, option, value) in [
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
            (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, seconds),
            (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, (seconds / 5).max(1)),
            (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 5),
        ] {
            // A refusal leaves a dead connection in place for longer: a loss of memory, not of data.
            // SAFETY: each option's value is a C int of that length, alive during the call; the descriptor is open.
            let _ = unsafe { libc::setsockopt(stream.as_raw_fd(), level, option, (&raw const value).cast(), length) };
        }
    }

    /// Ends the connection both ways at once, also for whoever waits on it here: reads end, writes fail (P12).
    pub fn cut(&self) {
        match self {
            Self::Tcp(stream) => shutdown(stream.as_raw_fd(), libc::SHUT_RDWR),
            Self::Unix(stream) => shutdown(stream.as_raw_fd(), libc::SHUT_RDWR),
            Self::Memory(pipe) => pipe.cut(),
        }
    }

    /// Says that nothing more will be written; the other end reads its end.
    pub fn finish_writing(&self) {
        match self {
            Self::Tcp(stream) => shutdown(stream.as_raw_fd(), libc::SHUT_WR),
            Self::Unix(stream) => shutdown(stream.as_raw_fd(), libc::SHUT_WR),
            Self::Memory(pipe) => pipe.finish_writing(),
        }
    }
}

fn is_retry(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn shutdown(descriptor: RawFd, how: libc::c_int) {
    // Fails only when the peer is gone already, which is what the caller wants.
    // SAFETY: the descriptor is open: its stream is borrowed by the caller.
    let _ = unsafe { libc::shutdown(descriptor, how) };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), inner => Pin::new(inner).poll_read(context, into))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), inner => Pin::new(inner).poll_write(context, from))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), inner => Pin::new(inner).poll_write_vectored(context, from))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), inner => Pin::new(inner).poll_shutdown(context))
    }
}

#[cfg(test)]
mod tests;
