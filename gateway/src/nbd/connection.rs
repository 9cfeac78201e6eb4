//! One connection from greeting to end: option haggling, the upgrade to TLS, the place on the export (P12), the
//! transmission, and what must happen after it. Owner: the connection's task.
//!
//! The handshake reads exactly the bytes of one option at a time: nothing sent in clear text can be taken for something
//! that came over TLS. Against abuse it is bounded in time, in options and in bytes ([`crate::Limits`]).

use super::handshake::{Absent, Handshake, InfoQuery, Step, greeting};
use super::proto::{OPTION_HEADER_BYTES, OptionHeader};
use super::request::Rules;
use super::transmission::{End, Transmission};
use crate::export::{Export, ExportInfo, OpenError};
use crate::server::Shared;
use crate::sessions::{Guard, Order};
use crate::tls::Tls;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use xsan_env::Moment;
use xsan_env::runtime::BoxFuture;

/// Option data that is looked at; longer is thrown away and answered with TOO_BIG.
const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Option data that is thrown away; longer is an attack.
const OPTION_BYTES_SKIPPED: u32 = 4 << 20;
/// How long a client in the handshake is still answered (with SHUTDOWN) while the server stops.
const STOPPING_FOR: Duration = Duration::from_millis(250);
/// How long the goodbye of a finished connection may take.
const GOODBYE_FOR: Duration = Duration::from_secs(2);

/// The connection ends here; nothing is left to do for it.
struct Closed;

/// What the haggling led to.
enum Agreed {
    /// Do the TLS handshake, then haggle on.
    StartTls,
    /// Serve this export.
    Serve(Arc<dyn Export>, Rules),
}

/// Serves one connection to its end. Returns when its last request is finished or dropped.
pub(crate) async fn serve<S>(shared: &Arc<Shared>, mut stream: S, tls: &Tls, guard: Guard)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut haggling = Haggling {
        shared,
        guard: &guard,
        state: Handshake::new(tls.mode.clone()),
        deadline: shared.env.now().after(shared.limits.handshake_for),
        options: 0,
    };
    match haggling.greet(&mut stream).await {
        Ok(Agreed::Serve(export, rules)) => transmit(shared, stream, export, rules, &guard).await,
        Ok(Agreed::StartTls) => {
            let Some(acceptor) = &tls.acceptor else { return };
            let left = haggling.deadline.since(shared.env.now());
            let Some(Ok(mut stream)) = shared.env.timeout(left, acceptor.accept(stream)).await else {
                tracing::info!(peer = guard.peer().address, "TLS handshake failed");
                return;
            };
            guard.session().set_encrypted();
            haggling.state.tls_started();
            if let Ok(Agreed::Serve(export, rules)) = haggling.haggle(&mut stream).await {
                transmit(shared, stream, export, rules, &guard).await;
            }
        }
        Err(Closed) => {}
    }
}

async fn transmit<S>(shared: &Arc<Shared>, mut stream: S, export: Arc<dyn Export>, rules: Rules, guard: &Guard)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let session = guard.session();
    tracing::info!(peer = guard.peer().address, style = ?rules.style, "client connected");
    let mut transmission = Transmission::new(&mut stream, shared, export, Arc::clone(session), rules);
    let end = poll_fn(|context| transmission.poll_run(context)).await;
    let mut unfinished = transmission.into_unfinished();
    if end == End::Done {
        // TLS wants a goodbye; a peer that does not take it is gone anyway.
        let _: Option<std::io::Result<()>> = shared.env.timeout(GOODBYE_FOR, stream.shutdown()).await;
    }
    drop(stream);
    tracing::info!(peer = guard.peer().address, ?end, unfinished = unfinished.len(), "client disconnected");
    // P12: the place is free only when nothing of this connection can land any more.
    poll_fn(|context| {
        while unfinished.poll_next(context).is_ready() {}
        if unfinished.is_empty() || session.order(context) == Order::Kill { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

struct Haggling<'a> {
    shared: &'a Arc<Shared>,
    guard: &'a Guard,
    state: Handshake,
    /// The client must be through with its options by then.
    deadline: Moment,
    options: u32,
}

impl Haggling<'_> {
    async fn greet<S: AsyncRead + AsyncWrite + Unpin + Send>(&mut self, stream: &mut S) -> Result<Agreed, Closed> {
        self.send(stream, &greeting()).await?;
        let mut flags = [0; 4];
        self.receive(stream, &mut flags).await?;
        if !self.state.client_flags(u32::from_be_bytes(flags)) {
            return Err(Closed);
        }
        self.haggle(stream).await
    }

    async fn haggle<S: AsyncRead + AsyncWrite + Unpin + Send>(&mut self, stream: &mut S) -> Result<Agreed, Closed> {
        loop {
            let step = self.next_step(stream).await?;
            match step {
                Step::Reply(bytes) => self.send(stream, &bytes).await?,
                Step::Goodbye(bytes) => {
                    self.send(stream, &bytes).await?;
                    // As above: a peer that left without waiting is fine.
                    let _: Option<std::io::Result<()>> = self.shared.env.timeout(GOODBYE_FOR, stream.shutdown()).await;
                    return Err(Closed);
                }
                Step::Close => return Err(Closed),
                Step::StartTls(bytes) => {
                    self.send(stream, &bytes).await?;
                    return Ok(Agreed::StartTls);
                }
                Step::List => {
                    let names = self.shared.exports.list().await;
                    let bytes = self.state.list_reply(&names);
                    self.send(stream, &bytes).await?;
                }
                Step::Meta(query) => {
                    let found = self.look_up(&query.name).await;
                    let bytes = self.state.meta_reply(query, found.is_some());
                    self.send(stream, &bytes).await?;
                }
                Step::Info(query) if query.go => {
                    if let Some(agreed) = self.go(stream, &query).await? {
                        return Ok(agreed);
                    }
                }
                Step::Info(query) => {
                    let found = self.look_up(&query.name).await;
                    let bytes = self.state.info_reply(&query, found.as_ref().ok_or(Absent::Unknown));
                    self.send(stream, &bytes).await?;
                }
                Step::Export(name) => {
                    let Ok((export, info)) = self.open(&name).await? else { return Err(Closed) };
                    let bytes = self.state.export_name_reply(&name, &info);
                    self.send(stream, &bytes).await?;
                    return Ok(Agreed::Serve(export, self.state.rules(&name, &info)));
                }
            }
        }
    }

    /// Receives one option and lets the state machine decide.
    async fn next_step<S: AsyncRead + Unpin + Send>(&mut self, stream: &mut S) -> Result<Step, Closed> {
        self.options += 1;
        if self.options > self.shared.limits.options_max {
            tracing::info!(peer = self.guard.peer().address, "too many options: closed");
            return Err(Closed);
        }
        let mut header = [0; OPTION_HEADER_BYTES];
        self.receive(stream, &mut header).await?;
        let OptionHeader { code, length } = OptionHeader::parse(&header).map_err(|_| Closed)?;
        let stopping = |haggling: &Self| haggling.guard.session().order_now() >= Order::Drain;
        if length > OPTION_BYTES_MAX {
            if length > OPTION_BYTES_SKIPPED {
                return Err(Closed);
            }
            let mut waste = vec![0; OPTION_BYTES_MAX as usize];
            let mut left = length as usize;
            while left > 0 {
                let part = left.min(waste.len());
                self.receive(stream, &mut waste[..part]).await?;
                left -= part;
            }
            return Ok(if stopping(self) { self.state.stopping(code) } else { self.state.too_big(code) });
        }
        let mut data = vec![0; length as usize];
        self.receive(stream, &mut data).await?;
        Ok(if stopping(self) { self.state.stopping(code) } else { self.state.option(code, &data) })
    }

    /// GO: opens the export and takes the place on it; `None`: refused, haggling goes on.
    async fn go<S>(&mut self, stream: &mut S, query: &InfoQuery) -> Result<Option<Agreed>, Closed>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let (export, info) = match self.open(&query.name).await? {
            Ok(found) => found,
            Err(absent) => {
                let bytes = self.state.info_reply(query, Err(absent));
                self.send(stream, &bytes).await?;
                return Ok(None);
            }
        };
        let bytes = self.state.info_reply(query, Ok(&info));
        self.send(stream, &bytes).await?;
        Ok(Some(Agreed::Serve(export, self.state.rules(&query.name, &info))))
    }

    /// Opens an export and waits until this connection may have it.
    async fn open(&self, name: &str) -> Result<Result<(Arc<dyn Export>, ExportInfo), Absent>, Closed> {
        let Some(name) = self.resolve(name).await else { return Ok(Err(Absent::Unknown)) };
        let opened = self.shared.exports.open(&name, self.guard.peer().transport);
        let export = match self.unless_stopping(opened).await {
            Some(Ok(export)) => export,
            Some(Err(OpenError::NotFound)) => return Ok(Err(Absent::Unknown)),
            Some(Err(OpenError::Unavailable(why))) => {
                tracing::info!(export = name, why, "export not opened");
                return Ok(Err(Absent::Unavailable(why)));
            }
            None => return Ok(Err(Absent::Shutdown)),
        };
        let info = export.info();
        if let Err(turned) = self.guard.enter(&export.key(), info.multi_conn).await {
            tracing::info!(export = name, ?turned, "connection closed before it was served");
            return Err(Closed);
        }
        // Looked at again: it may have grown while the old client was waited for.
        let info = ExportInfo { multi_conn: info.multi_conn, ..export.info() };
        Ok(Ok((export, info)))
    }

    /// What `future` gives; `None` as soon as the server stops. (A volume may wait for its nodes for a minute.)
    async fn unless_stopping<T>(&self, mut future: BoxFuture<'_, T>) -> Option<T> {
        let session = self.guard.session();
        poll_fn(|context| match session.order(context) {
            Order::Run => future.as_mut().poll(context).map(Some),
            _ => Poll::Ready(None),
        })
        .await
    }

    async fn look_up(&self, name: &str) -> Option<ExportInfo> {
        let name = self.resolve(name).await?;
        self.shared.exports.info(&name, self.guard.peer().transport).await
    }

    /// The empty name means the default export: the only one there is.
    async fn resolve(&self, name: &str) -> Option<String> {
        if !name.is_empty() {
            return Some(name.to_owned());
        }
        let mut names = self.shared.exports.list().await;
        (names.len() == 1).then(|| names.remove(0).0)
    }

    async fn send<S: AsyncWrite + Unpin + Send>(&self, stream: &mut S, bytes: &[u8]) -> Result<(), Closed> {
        let write = async {
            stream.write_all(bytes).await?;
            stream.flush().await
        };
        match self.bounded(write).await? {
            Ok(()) => Ok(()),
            Err(_) => Err(Closed),
        }
    }

    async fn receive<S: AsyncRead + Unpin + Send>(&self, stream: &mut S, into: &mut [u8]) -> Result<(), Closed> {
        match self.bounded(stream.read_exact(into)).await? {
            Ok(_) => Ok(()),
            Err(_) => Err(Closed),
        }
    }

    /// Runs a step that needs the peer: until the deadline, a cut, or shortly after the server began to stop.
    async fn bounded<T>(&self, step: impl Future<Output = T> + Send) -> Result<T, Closed> {
        let env = &self.shared.env;
        let mut step = pin!(step);
        let mut timer: Option<BoxFuture<'static, ()>> = None;
        let mut stopping: Option<BoxFuture<'static, ()>> = None;
        poll_fn(|context| {
            let order = self.guard.session().order(context);
            if order >= Order::Cut {
                return Poll::Ready(Err(Closed));
            }
            if let Poll::Ready(done) = step.as_mut().poll(context) {
                return Poll::Ready(Ok(done));
            }
            let timer = timer.get_or_insert_with(|| env.sleep(self.deadline.since(env.now())));
            let late = timer.as_mut().poll(context).is_ready();
            let stopped = order == Order::Drain
                && stopping.get_or_insert_with(|| env.sleep(STOPPING_FOR)).as_mut().poll(context).is_ready();
            if late || stopped { Poll::Ready(Err(Closed)) } else { Poll::Pending }
        })
        .await
    }
}
