//! The byte stream under a connection: plain, or TLS over it. Made here on both sides, up to and including the first frame.

use crate::config::Endpoint;
use crate::error::ConnectError;
use crate::frame::{Frame, Input, Output};
use crate::join::JOIN_ALPN;
use rustls::server::Acceptor;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, TlsStream};
use xsan_env::Stream;
use xsan_env::runtime::BoxFuture;
use xsan_types::NodeId;

/// Makes connections to one peer. Closures do, too.
pub trait Connect: Send + Sync + 'static {
    /// A new connection; called again whenever the one before was lost, so it may look the address up anew.
    fn connect(&self) -> BoxFuture<'static, io::Result<Stream>>;
}

impl<F> Connect for F
where
    F: Fn() -> BoxFuture<'static, io::Result<Stream>> + Send + Sync + 'static,
{
    fn connect(&self) -> BoxFuture<'static, io::Result<Stream>> {
        self()
    }
}

/// Vectored writes take so many slices at a time.
const SLICES_MAX: usize = 64;
/// Read ahead under TLS: rustls asks for 4 KiB at a time, which would be a system call each.
const AHEAD_BYTES: usize = 64 << 10;

/// A stream as the frames see it.
pub(crate) enum Transport {
    Plain(Stream),
    Tls(Box<TlsStream<ReadAhead>>),
}

/// Who has come.
pub(crate) enum Arrival {
    /// One that speaks frames, with the node that its certificate names.
    Peer(Transport, Option<NodeId>),
    /// A host without a certificate.
    Joiner(Box<TlsStream<ReadAhead>>),
}

impl Transport {
    /// The client's side: TLS if the endpoint has it. The server must be `target`.
    pub(crate) async fn client(endpoint: &Endpoint, stream: Stream, target: NodeId) -> Result<Self, ConnectError> {
        let Some(tls) = &endpoint.tls else { return Ok(Self::Plain(stream)) };
        let name = tls.name_of(target).ok_or_else(|| ConnectError::Tls(io::ErrorKind::InvalidInput.into()))?;
        let connector = TlsConnector::from(Arc::clone(&tls.client));
        let stream = connector.connect(name, ReadAhead::new(stream)).await.map_err(ConnectError::Tls)?;
        Ok(Self::Tls(Box::new(stream.into())))
    }

    /// The server's side: who comes says in the first message of TLS whether it wants to join.
    pub(crate) async fn server(endpoint: &Endpoint, stream: Stream) -> Result<Arrival, ConnectError> {
        let Some(tls) = &endpoint.tls else { return Ok(Arrival::Peer(Self::Plain(stream), None)) };
        let hello = LazyConfigAcceptor::new(Acceptor::default(), ReadAhead::new(stream));
        let start = hello.await.map_err(ConnectError::Tls)?;
        let joins = start.client_hello().alpn().is_some_and(|mut names| names.any(|name| name == JOIN_ALPN));
        let config = if joins { &tls.join } else { &tls.server };
        let stream = start.into_stream(Arc::clone(config)).await.map_err(ConnectError::Tls)?;
        if joins {
            return Ok(Arrival::Joiner(Box::new(stream.into())));
        }
        let node = tls
            .node_of(stream.get_ref().1.peer_certificates())
            .map_err(|error| ConnectError::Tls(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        Ok(Arrival::Peer(Self::Tls(Box::new(stream.into())), Some(node)))
    }

    /// Whether reads are cheap, so that reading exactly what is wanted costs nothing.
    pub(crate) fn is_buffered(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Sends what `output` holds, as far as the stream takes it. `Ready(true)`: some of it; `Ready(false)`: there was nothing.
    /// `unflushed` is kept between calls: bytes may stand in TLS after they left `output`.
    pub(crate) fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        output: &mut Output,
        unflushed: &mut bool,
    ) -> Poll<io::Result<bool>> {
        let mut progress = false;
        while !output.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let count = output.slices(&mut slices);
            match self.poll_write_slices(context, &slices[..count])? {
                Poll::Pending if progress => return Poll::Ready(Ok(true)),
                Poll::Pending => return Poll::Pending,
                Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(sent) => {
                    output.advance(sent);
                    (*unflushed, progress) = (true, true);
                }
            }
        }
        if *unflushed && self.poll_flush_all(context)?.is_ready() {
            *unflushed = false;
        }
        Poll::Ready(Ok(progress))
    }

    fn poll_write_slices(&mut self, context: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Self::Tls(stream) => Pin::new(&mut **stream).poll_write_vectored(context, slices),
        }
    }

    fn poll_flush_all(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(&mut **stream).poll_flush(context),
        }
    }

    /// Reads once into `input`: bytes read, 0 at the end.
    pub(crate) fn poll_receive(&mut self, context: &mut Context<'_>, input: &mut Input) -> Poll<io::Result<usize>> {
        let mut room = ReadBuf::new(input.room());
        match self {
            Self::Plain(stream) => ready!(Pin::new(stream).poll_read(context, &mut room))?,
            Self::Tls(stream) => ready!(Pin::new(&mut **stream).poll_read(context, &mut room))?,
        }
        let count = room.filled().len();
        input.filled(count);
        Poll::Ready(Ok(count))
    }

    /// Sends everything. For the handshake; connections at work interleave it with reading.
    pub(crate) async fn send_all(&mut self, output: &mut Output) -> io::Result<()> {
        let mut unflushed = false;
        while !output.is_empty() || unflushed {
            poll_fn(|context| self.poll_send(context, output, &mut unflushed)).await?;
            if unflushed && output.is_empty() {
                poll_fn(|context| self.poll_flush_all(context)).await?;
                unflushed = false;
            }
        }
        Ok(())
    }

    /// Waits for the next frame. For the handshake.
    pub(crate) async fn receive_frame<'a>(&mut self, input: &'a mut Input) -> Result<Frame<'a>, ConnectError> {
        while !input.has_head()? {
            let count = poll_fn(|context| self.poll_receive(context, input)).await.map_err(ConnectError::Io)?;
            if count == 0 {
                return Err(ConnectError::Ended);
            }
        }
        input.next_frame()?.ok_or(ConnectError::Ended)
    }

    /// Says goodbye to the stream; a peer that does not take it is gone anyway.
    pub(crate) fn poll_shutdown(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(&mut **stream).poll_shutdown(context),
        }
    }
}

/// A stream with a buffer for reading.
pub(crate) struct ReadAhead {
    stream: Stream,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl ReadAhead {
    fn new(stream: Stream) -> Self {
        Self { stream, buffer: vec![0; AHEAD_BYTES], start: 0, end: 0 }
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.start == this.end {
            let mut room = ReadBuf::new(&mut this.buffer);
            ready!(Pin::new(&mut this.stream).poll_read(context, &mut room))?;
            (this.start, this.end) = (0, room.filled().len());
        }
        let count = into.remaining().min(this.end - this.start);
        into.put_slice(&this.buffer[this.start..this.start + count]);
        this.start += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, from)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, from)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
