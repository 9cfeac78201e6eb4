//! One connection of a client to a peer, whether it exists at the moment or not.
//!
//! A call lays its frame out in the *outbox* at once, so requests leave in the order of their calls, and wakes the link's
//! task. The task connects when there is something to send, drains the outbox in vectored writes as far as the server's
//! window allows, and hands answers to who waits. When the connection is lost, everything unanswered fails, sent or not:
//! nobody can know what was done, and whoever asks again begins with a new connection. No reconnecting without a call.

mod connection;
mod outbox;

use crate::codec::WireVersion;
use crate::config::Endpoint;
use crate::error::{CallError, ConnectError};
use crate::frame::{Bounds, FLAG_PIECES, Header, Input, Kind, Output};
use crate::handshake::{Class, Hello, Refusal, Welcome};
use crate::payload::Payload;
use crate::service::ServiceId;
use crate::timer::Timer;
use crate::transport::{Connect, Transport};
use futures::task::AtomicWaker;
pub(crate) use outbox::Waiting;
use outbox::{Outbox, Request};
use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;
use xsan_env::Moment;
use xsan_types::NodeId;

/// An idle connection is looked after by the kernel, so that it costs no timer here.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// How a connection to a peer fares.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum LinkState {
    /// Nobody has asked for it, or it ended in order.
    Idle,
    /// On the way.
    Connecting,
    /// There.
    Up,
    /// The last attempt failed or the connection was lost; calls fail at once until the moment given.
    Down {
        /// When the next call tries again.
        until: Moment,
        /// Why.
        error: Arc<ConnectError>,
    },
}

/// What the task and the callers share.
struct State {
    outbox: Outbox,
    link: LinkState,
    /// Attempts and connections that failed in a row, without any answer in between.
    failures: u32,
    /// The link's task was started.
    running: bool,
    /// The last handle is gone.
    closed: bool,
}

struct Shared {
    endpoint: Endpoint,
    target: NodeId,
    class: Class,
    /// Number of this link, the same for all its connections.
    number: u64,
    connect: Arc<dyn Connect>,
    state: Mutex<State>,
    task: AtomicWaker,
}

/// A link; dropping it closes the connection and fails what waits.
pub(crate) struct Link(Arc<Shared>);

impl Drop for Link {
    fn drop(&mut self) {
        self.0.state().closed = true;
        self.0.task.wake();
    }
}

/// What a caller wants sent.
pub(crate) struct Call {
    pub(crate) service: ServiceId,
    pub(crate) operation: u16,
    pub(crate) payload: Payload,
    pub(crate) in_pieces: bool,
    /// Bulk bytes expected back.
    pub(crate) answer_bytes: u32,
    /// How long the caller waits.
    pub(crate) patience: Duration,
    /// Who waits; `None`: a one-way message.
    pub(crate) waiting: Option<Waiting>,
}

impl Link {
    pub(crate) fn new(endpoint: &Endpoint, target: NodeId, class: Class, connect: &Arc<dyn Connect>) -> Self {
        let state = State {
            outbox: Outbox::new(&endpoint.limits),
            link: LinkState::Idle,
            failures: 0,
            running: false,
            closed: false,
        };
        Self(Arc::new(Shared {
            endpoint: endpoint.clone(),
            target,
            class,
            number: endpoint.env.random(),
            connect: Arc::clone(connect),
            state: Mutex::new(state),
            task: AtomicWaker::new(),
        }))
    }

    pub(crate) fn state(&self) -> LinkState {
        self.0.state().link.clone()
    }

    /// Queues a frame; `meta` writes its fixed part. Frames leave in the order of these calls.
    ///
    /// # Errors
    /// [`CallError`]: nothing will be sent. Whoever waits is dropped with the call.
    pub(crate) fn call(&self, call: Call, meta: impl FnOnce(&mut Vec<u8>)) -> Result<(), CallError> {
        let shared = &self.0;
        let now = shared.endpoint.env.now();
        let is_request = call.waiting.is_some();
        let header = Header {
            kind: if is_request { Kind::Request } else { Kind::OneWay },
            service: call.service.0,
            flags: if call.in_pieces { FLAG_PIECES } else { 0 },
            code: call.operation,
            deadline_ms: u32::try_from(call.patience.as_millis()).unwrap_or(u32::MAX),
            id: 0,
        };
        // The checksum of the payload before the lock.
        let payload_crc = call.payload.crc();
        let mut state = shared.state();
        if let LinkState::Down { until, .. } = &state.link
            && *until > now
        {
            return Err(CallError::Unavailable);
        }
        let request =
            Request { waiting: call.waiting, deadline: now.after(call.patience), answer_bytes: call.answer_bytes };
        state.outbox.push(header, call.payload, payload_crc, request, meta)?;
        let start = !std::mem::replace(&mut state.running, true);
        drop(state);
        if start {
            let task = Arc::clone(shared);
            drop(shared.endpoint.env.spawn("wire-link", async move { task.run().await }));
        } else {
            shared.task.wake();
        }
        Ok(())
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(self: Arc<Self>) {
        while self.work().await {
            let connected = self.connected().await;
            let end = match connected {
                None => break,
                Some(Ok((transport, input, welcome))) => {
                    self.state().link = LinkState::Up;
                    tracing::info!(node = %self.target, class = ?self.class, version = welcome.version, "connected");
                    connection::run(&self, transport, input, &welcome).await
                }
                Some(Err(error)) => Some(error),
            };
            self.ended(end);
        }
        let failed = {
            let mut state = self.state();
            state.link = LinkState::Idle;
            state.outbox.fail_all()
        };
        drop(failed);
    }

    /// Waits until there is something to send; `false`: nobody can ask any more.
    async fn work(&self) -> bool {
        poll_fn(|context| {
            self.task.register(context.waker());
            let state = self.state();
            if state.closed {
                Poll::Ready(false)
            } else if state.outbox.has_queued() {
                Poll::Ready(true)
            } else {
                Poll::Pending
            }
        })
        .await
    }

    /// Connects, with an eye on the deadlines of those who wait already. `None`: nobody waits any more for anything.
    async fn connected(self: &Arc<Self>) -> Option<Result<(Transport, Input, Welcome), ConnectError>> {
        self.state().link = LinkState::Connecting;
        let env = &self.endpoint.env;
        let mut timer = Timer::new(env);
        let limit = self.endpoint.limits.connect_for;
        let mut connecting = pin!(env.timeout(limit, self.connect()));
        poll_fn(|context| {
            self.task.register(context.waker());
            if self.state().closed {
                return Poll::Ready(None);
            }
            if let Poll::Ready(result) = connecting.as_mut().poll(context) {
                return Poll::Ready(Some(result.unwrap_or(Err(ConnectError::Silent))));
            }
            loop {
                let due = self.state().outbox.earliest();
                if !timer.poll(context, due) {
                    return Poll::Pending;
                }
                let expired = self.state().outbox.expire(env.now());
                drop(expired);
            }
        })
        .await
    }

    async fn connect(&self) -> Result<(Transport, Input, Welcome), ConnectError> {
        let endpoint = &self.endpoint;
        let stream = self.connect.connect().await.map_err(ConnectError::Connect)?;
        stream.keep_alive(KEEP_ALIVE);
        let mut transport = Transport::client(endpoint, stream, self.target).await?;
        let hello = Hello {
            versions: (WireVersion::OLDEST.number(), WireVersion::NEWEST.number()),
            cluster: endpoint.cluster,
            node: endpoint.node,
            instance: endpoint.instance,
            target: self.target,
            class: self.class,
            link: self.number,
        };
        let mut output = Output::default();
        output.push(&Header::of(Kind::Hello), Payload::None, |out| hello.put(out));
        transport.send_all(&mut output).await.map_err(ConnectError::Io)?;
        let mut input = Input::new(endpoint.pool.clone(), Bounds::HANDSHAKE, transport.is_buffered());
        let welcome = {
            let frame = transport.receive_frame(&mut input).await?;
            match frame.header.kind {
                Kind::Welcome => Welcome::get(frame.meta)?,
                Kind::Refusal => return Err(Refusal::get(frame.meta)?.into()),
                _ => return Err(crate::frame::FrameError::Unexpected.into()),
            }
        };
        if welcome.node != self.target {
            return Err(ConnectError::WrongNode { wanted: self.target, found: welcome.node });
        }
        WireVersion::from_number(welcome.version).ok_or(ConnectError::Version(welcome.version))?;
        input.set_bounds(Bounds::PEERS);
        Ok((transport, input, welcome))
    }

    /// The connection is gone, or was not made. `None`: it ended in order.
    fn ended(&self, end: Option<ConnectError>) {
        let failed = {
            let mut state = self.state();
            match end {
                None => {
                    state.link = LinkState::Idle;
                    // The server is leaving: what it did not begin goes over the next connection.
                    state.outbox.fail_sent()
                }
                Some(error) => {
                    self.note(&state, &error);
                    // The first loss costs no wait: a restarted peer is found at once.
                    let wait = self.backoff(state.failures);
                    state.failures = state.failures.saturating_add(1);
                    let until = self.endpoint.env.now().after(wait);
                    state.link = LinkState::Down { until, error: Arc::new(error) };
                    state.outbox.fail_all()
                }
            }
        };
        // Outside of the lock: whoever waits runs now.
        drop(failed);
    }

    fn backoff(&self, failures: u32) -> Duration {
        let limits = &self.endpoint.limits;
        let Some(doublings) = failures.checked_sub(1) else { return Duration::ZERO };
        let wait = limits.backoff_min.saturating_mul(1 << doublings.min(16)).min(limits.backoff_max);
        // Not all clients of a returning node at the same moment.
        wait - wait / 4 * (u32::try_from(self.endpoint.env.random() % 256).unwrap_or(0)) / 256
    }

    /// A refusal is for people and comes once; a lost connection is what connections do.
    fn note(&self, state: &State, error: &ConnectError) {
        let (node, class) = (self.target, self.class);
        let is_wrong = error.kind() == xsan_types::ErrorKind::Invalid || matches!(error, ConnectError::Tls(_));
        if is_wrong && state.failures == 0 {
            let cause = std::error::Error::source(error);
            tracing::warn!(%node, ?class, %error, cause, "the peer cannot be talked to");
        } else {
            tracing::debug!(%node, ?class, %error, failures = state.failures, "no connection");
        }
    }
}
