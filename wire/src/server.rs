//! The other end: takes connections, tells strangers from peers, and calls the services.

mod dispatch;
mod session;

use crate::config::Endpoint;
use crate::error::ConnectError;
use crate::frame::{Bounds, FrameError, Header, Input, Kind, Output};
use crate::handshake::{Hello, Refusal, Welcome};
use crate::join::{self, JOIN_FOR, JOINS_MAX};
use crate::payload::Payload;
use crate::service::{PeerInfo, Services};
use crate::transport::{Arrival, ReadAhead, Transport};
use futures::task::AtomicWaker;
use std::collections::BTreeMap;
use std::fmt;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};
use tokio_rustls::TlsStream;
use xsan_env::{Listener, Stream};
use xsan_types::NodeId;

/// Pause after a failed accept (out of descriptors): the next one would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a refusal may take to be read.
const REFUSAL_FOR: Duration = Duration::from_secs(1);

/// A client whose host has vanished without a word is noticed by the kernel after about twice this; costs nothing else.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// What connections are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Order {
    Run = 0,
    /// Begin nothing new, answer what was begun, say goodbye.
    Drain = 1,
    /// End now. What was begun still runs to its end, unanswered.
    Cut = 2,
}

/// One connection, from its acceptance on.
#[derive(Default)]
pub(crate) struct Entry {
    /// Grows with every connection.
    number: u64,
    pub(crate) task: AtomicWaker,
    peer: Mutex<Option<PeerInfo>>,
    /// The client's node, process and link.
    link: Mutex<Option<(NodeId, u64, u64)>>,
    cut: AtomicBool,
    /// Begins no more requests.
    quiet: AtomicBool,
}

struct Shared {
    endpoint: Endpoint,
    services: Services,
    order: AtomicU8,
    ordered: Notify,
    sessions: Mutex<Sessions>,
    ended: Notify,
    /// Joiners that may be served now.
    joins: Semaphore,
}

#[derive(Default)]
struct Sessions {
    next: u64,
    entries: BTreeMap<u64, Arc<Entry>>,
}

/// A server; cheap to clone. Bounds: `Limits::connections_max` connections, each with `requests_max` requests and `bytes_max`
/// bytes (twice that if a client does not keep to them, then it is not read from). Dropping all handles ends nothing: see
/// [`Server::stop`].
#[derive(Clone)]
pub struct Server(Arc<Shared>);

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({})", self.0.endpoint.node)
    }
}

impl Server {
    /// A server of `endpoint`'s node.
    #[must_use]
    pub fn new(endpoint: &Endpoint, services: Services) -> Self {
        Self(Arc::new(Shared {
            endpoint: endpoint.clone(),
            services,
            order: AtomicU8::new(Order::Run as u8),
            ordered: Notify::new(),
            sessions: Mutex::default(),
            ended: Notify::new(),
            joins: Semaphore::new(JOINS_MAX),
        }))
    }

    /// Takes connections until [`Server::stop`]. Several listeners may be served at a time.
    pub async fn serve(&self, listener: Listener) {
        let shared = &self.0;
        let address = listener.describe();
        tracing::info!(address, node = %shared.endpoint.node, tls = shared.endpoint.tls.is_some(), "listening for nodes");
        loop {
            // Before looking at the order: one that comes in between is not missed.
            let ordered = shared.ordered.notified();
            if shared.order() > Order::Run {
                return;
            }
            let accepted = tokio::select! {
                biased;
                () = ordered => continue,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(stream) => self.accept(stream),
                // A memory listener whose dialers are gone.
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return,
                Err(error) => {
                    tracing::warn!(address, %error, "cannot take a connection");
                    shared.endpoint.env.sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Serves one connection in a task of its own.
    pub fn accept(&self, stream: Stream) {
        let (number, entry) = {
            let mut sessions = self.0.sessions();
            sessions.next += 1;
            // Strangers in their handshake are bounded, too; peers are refused in words before it comes to this.
            if sessions.entries.len() >= self.0.endpoint.limits.connections_max.saturating_mul(2) {
                tracing::warn!(peer = stream.peer(), "too many connections: hung up on one");
                return;
            }
            let entry = Arc::new(Entry { number: sessions.next, ..Entry::default() });
            let number = sessions.next;
            sessions.entries.insert(number, Arc::clone(&entry));
            (number, entry)
        };
        let place = Place { shared: Arc::clone(&self.0), number };
        drop(self.0.endpoint.env.spawn("wire-session", async move {
            let address = stream.peer();
            if let Err(error) = place.shared.serve_one(stream, &entry).await {
                let cause = std::error::Error::source(&error);
                tracing::info!(peer = address, %error, cause, "connection of a node ended");
            }
            drop(place);
        }));
    }

    /// The peers connected now.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerInfo> {
        let sessions = self.0.sessions();
        sessions.entries.values().filter_map(|entry| entry.peer().clone()).collect()
    }

    /// Connections now, those in their handshake included.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.0.sessions().entries.len()
    }

    /// Cuts all connections of a node: it was removed, or is to begin anew. What it began runs to its end.
    pub fn cut(&self, node: NodeId) {
        for entry in self.0.sessions().entries.values() {
            if entry.peer().as_ref().is_some_and(|peer| peer.node == node) {
                entry.cut.store(true, Ordering::Release);
                entry.task.wake();
            }
        }
    }

    /// Ends in order: takes no more connections, begins no more requests, answers those that were begun. After `limit`
    /// connections are cut; requests that still run then are waited for all the same, unanswered. Returns when no
    /// connection is left.
    pub async fn stop(&self, limit: Duration) {
        self.0.set_order(Order::Drain);
        let env = &self.0.endpoint.env;
        if env.timeout(limit, self.0.all_ended()).await.is_none() {
            self.0.set_order(Order::Cut);
            self.0.all_ended().await;
        }
    }
}

/// Who a stranger has turned out to be.
enum Shaken {
    /// A node that speaks frames.
    Peer(Box<(Transport, Input, PeerInfo)>),
    /// A host that wants to become one, and where it is.
    Joiner(Box<TlsStream<ReadAhead>>, String),
}

/// A connection's place in the table; given back whatever happens to its task.
struct Place {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.sessions().entries.remove(&self.number);
        self.shared.ended.notify_waiters();
    }
}

impl Entry {
    fn peer(&self) -> MutexGuard<'_, Option<PeerInfo>> {
        self.peer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn link(&self) -> MutexGuard<'_, Option<(NodeId, u64, u64)>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody cut this connection alone.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }
}

impl Shared {
    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self) -> Order {
        match self.order.load(Ordering::Acquire) {
            0 => Order::Run,
            1 => Order::Drain,
            _ => Order::Cut,
        }
    }

    fn set_order(&self, order: Order) {
        self.order.fetch_max(order as u8, Ordering::AcqRel);
        self.ordered.notify_waiters();
        for entry in self.sessions().entries.values() {
            entry.task.wake();
        }
    }

    async fn all_ended(&self) {
        loop {
            let ended = self.ended.notified();
            if self.sessions().entries.is_empty() {
                return;
            }
            ended.await;
        }
    }

    /// A connection from its first byte to the end of the last request.
    async fn serve_one(self: &Arc<Self>, stream: Stream, entry: &Arc<Entry>) -> Result<(), ConnectError> {
        let address = stream.peer();
        let limit = self.endpoint.limits.connect_for.saturating_mul(5);
        stream.keep_alive(KEEP_ALIVE);
        let shaken = self.shake(entry, stream, address);
        let shaken = self.until_ordered(entry, self.endpoint.env.timeout(limit, shaken)).await;
        let Some(shaken) = shaken else { return Ok(()) };
        let (transport, input, peer) = match shaken.unwrap_or(Err(ConnectError::Silent))? {
            Shaken::Peer(peer) => *peer,
            Shaken::Joiner(stream, address) => {
                let joined = self.let_join(*stream, address);
                return self.until_ordered(entry, joined).await.unwrap_or(Ok(()));
            }
        };
        tracing::info!(node = %peer.node, class = ?peer.class, address = peer.address, "a node connected");
        *entry.peer() = Some(peer.clone());
        // A removal since the handshake has cut nothing here yet: it finds connections by their peer.
        if !self.admits(peer.node) {
            return Err(ConnectError::Refused(Refusal::NotAdmitted));
        }
        session::run(self, entry, transport, input, peer).await
    }

    /// Runs a handshake; `None`: the server stops, or a newer connection has taken this one's place.
    async fn until_ordered<T>(&self, entry: &Entry, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        poll_fn(|context| {
            entry.task.register(context.waker());
            if self.order() > Order::Run || entry.is_cut() {
                return std::task::Poll::Ready(None);
            }
            work.as_mut().poll(context).map(Some)
        })
        .await
    }

    async fn shake(&self, entry: &Arc<Entry>, stream: Stream, address: String) -> Result<Shaken, ConnectError> {
        let (mut transport, certified) = match Transport::server(&self.endpoint, stream).await? {
            Arrival::Peer(transport, certified) => (transport, certified),
            Arrival::Joiner(stream) => return Ok(Shaken::Joiner(stream, address)),
        };
        let mut input = Input::new(self.endpoint.pool.clone(), Bounds::HANDSHAKE, transport.is_buffered());
        let judged = match transport.receive_frame(&mut input).await {
            Ok(frame) if frame.header.kind == Kind::Hello => {
                self.judge(entry, &Hello::get(frame.meta).ok(), certified, address)
            }
            // A header that only another release could have sent: it can at least be told.
            Err(ConnectError::Frame(FrameError::Layout(_))) => Err(Refusal::version()),
            Ok(_) | Err(ConnectError::Frame(FrameError::Header)) => Err(Refusal::Malformed),
            Err(error) => return Err(error),
        };
        let peer = match judged {
            Ok(peer) => peer,
            Err(refusal) => return Err(self.refuse(transport, refusal).await),
        };
        self.replace_older(entry).await;
        let limits = &self.endpoint.limits;
        let welcome = Welcome {
            version: peer.version.number(),
            node: self.endpoint.node,
            instance: self.endpoint.instance,
            requests_max: limits.requests_max,
            bytes_max: limits.bytes_max,
        };
        let mut output = Output::default();
        output.push(&Header::of(Kind::Welcome), Payload::None, |out| welcome.put(out));
        transport.send_all(&mut output).await.map_err(ConnectError::Io)?;
        input.set_bounds(Bounds::PEERS);
        Ok(Shaken::Peer(Box::new((transport, input, peer))))
    }

    /// One request of a host that has no certificate yet.
    async fn let_join(&self, stream: TlsStream<ReadAhead>, address: String) -> Result<(), ConnectError> {
        let Some(service) = &self.services.join else { return Err(ConnectError::Refused(Refusal::NotAdmitted)) };
        let Ok(_place) = self.joins.try_acquire() else { return Err(ConnectError::Refused(Refusal::Busy)) };
        let served = join::serve(stream, &**service, address);
        let served = self.endpoint.env.timeout(JOIN_FOR, served).await;
        served.unwrap_or(Err(std::io::ErrorKind::TimedOut.into())).map_err(ConnectError::Io)
    }

    fn admits(&self, node: NodeId) -> bool {
        self.services.admission.as_ref().is_none_or(|admission| admission(node))
    }

    fn judge(
        &self,
        entry: &Arc<Entry>,
        hello: &Option<Hello>,
        certified: Option<NodeId>,
        address: String,
    ) -> Result<PeerInfo, Refusal> {
        let Some(hello) = hello else { return Err(Refusal::Malformed) };
        let version = hello.judge(self.endpoint.cluster, self.endpoint.node, certified)?;
        if !self.admits(hello.node) {
            return Err(Refusal::NotAdmitted);
        }
        // This connection is among them.
        if self.sessions().entries.len() > self.endpoint.limits.connections_max {
            return Err(Refusal::Busy);
        }
        *entry.link() = Some((hello.node, hello.instance, hello.link));
        Ok(PeerInfo { node: hello.node, instance: hello.instance, class: hello.class, version, address })
    }

    /// Cuts older connections of the same link and waits until they begin nothing more: a request that was given up
    /// with its connection, and is still on its way there, cannot begin after one that was sent over this connection.
    async fn replace_older(&self, entry: &Arc<Entry>) {
        let link = *entry.link();
        loop {
            let ended = self.ended.notified();
            let is_older = |other: &&Arc<Entry>| {
                other.number < entry.number && *other.link() == link && !other.quiet.load(Ordering::Acquire)
            };
            let older: Vec<Arc<Entry>> = self.sessions().entries.values().filter(is_older).cloned().collect();
            if older.is_empty() {
                return;
            }
            for other in older {
                other.cut.store(true, Ordering::Release);
                other.task.wake();
            }
            ended.await;
        }
    }

    /// A connection begins nothing more.
    pub(crate) fn is_quiet(&self, entry: &Entry) {
        entry.quiet.store(true, Ordering::Release);
        self.ended.notify_waiters();
    }

    /// Tells a stranger why, as far as it listens.
    async fn refuse(&self, mut transport: Transport, refusal: Refusal) -> ConnectError {
        let mut output = Output::default();
        output.push(&Header::of(Kind::Refusal), Payload::None, |out| refusal.put(out));
        let told = async {
            transport.send_all(&mut output).await?;
            poll_fn(|context| transport.poll_shutdown(context)).await?;
            // Until it has hung up: bytes of its that were not read would make the system throw the refusal away.
            let mut waste = Input::new(self.endpoint.pool.clone(), Bounds::HANDSHAKE, false);
            while poll_fn(|context| transport.poll_receive(context, &mut waste)).await? > 0 {
                waste.forget();
            }
            Ok::<(), std::io::Error>(())
        };
        // A stranger that does not listen is not told.
        let _: Option<std::io::Result<()>> = self.endpoint.env.timeout(REFUSAL_FOR, told).await;
        ConnectError::Refused(refusal)
    }
}
