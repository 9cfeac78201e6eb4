//! The gateway as a whole: listeners, connections, shutdown.
//!
//! A [`Server`] is cheap to clone and serves any number of listeners and exports. It owns nothing of a volume: see
//! [`crate::export`].

use crate::admission::Admission;
use crate::export::{Exports, Transport};
use crate::nbd::connection;
use crate::sessions::{ClientInfo, Guard, Order, Peer, Sessions, Turned};
use crate::tls::Tls;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use xsan_env::net::{Listener, Stream};
use xsan_env::{BufPool, Env, TaskHandle};

/// Bounds of the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time; more are closed at once.
    pub connections_max: usize,
    /// Options of one handshake.
    pub options_max: u32,
    /// Time a client has for its handshake.
    pub handshake_for: Duration,
    /// Requests under way on one connection.
    pub requests_max: usize,
    /// Payload bytes under way on one connection; a single larger request still goes.
    pub connection_bytes_max: u64,
    /// Payload bytes under way in the whole gateway.
    pub gateway_bytes_max: u64,
    /// A peer that does not move for so long, in the middle of a message, is closed if others wait for the bytes it holds.
    pub stall_for: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 4096,
            options_max: 4096,
            handshake_for: Duration::from_secs(30),
            requests_max: 256,
            connection_bytes_max: 64 << 20,
            gateway_bytes_max: 256 << 20,
            stall_for: Duration::from_secs(30),
        }
    }
}

pub(crate) struct Shared {
    pub(crate) env: Env,
    pub(crate) pool: BufPool,
    pub(crate) exports: Arc<dyn Exports>,
    pub(crate) limits: Limits,
    pub(crate) admission: Admission,
    sessions: Sessions,
}

/// The gateway; cheap to clone.
#[derive(Clone)]
pub struct Server(Arc<Shared>);

impl Server {
    /// A gateway without listeners. `pool` gives the memory for what is received.
    #[must_use]
    pub fn new(env: Env, pool: BufPool, exports: Arc<dyn Exports>, limits: Limits) -> Self {
        Self(Arc::new(Shared {
            env,
            pool,
            exports,
            limits,
            admission: Admission::new(limits.gateway_bytes_max),
            sessions: Sessions::new(limits.connections_max),
        }))
    }

    /// The same gateway with other exports, for a listener that offers less: connections, bounds and shutdown are shared, so that
    /// P12 holds among all of them.
    #[must_use]
    pub fn with_exports(&self, exports: Arc<dyn Exports>) -> Self {
        let Shared { env, pool, limits, admission, sessions, .. } = &*self.0;
        let (env, pool, limits) = (env.clone(), pool.clone(), *limits);
        Self(Arc::new(Shared { env, pool, exports, limits, admission: admission.clone(), sessions: sessions.clone() }))
    }

    /// Closes the connections on the export with that key that came over TCP, and waits until their requests are finished.
    pub async fn disconnect_remote(&self, key: &str) {
        self.0.sessions.disconnect_from(key, Transport::Tcp).await;
    }

    /// Accepts connections until [`Server::shutdown`] or until the handle is aborted.
    #[must_use = "abort the task to close the listener alone; dropping the handle lets it run"]
    pub fn listen(&self, listener: Listener, tls: Tls) -> TaskHandle {
        let server = self.clone();
        self.0.env.spawn("nbd accept", async move { server.accept_loop(listener, tls).await })
    }

    async fn accept_loop(self, listener: Listener, tls: Tls) {
        let stopping = self.0.sessions.stopping();
        let mut stopping = std::pin::pin!(stopping);
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut stopping => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(stream) => self.start(stream, tls.clone()),
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return,
                Err(error) => {
                    tracing::warn!(%error, listener = listener.describe(), "cannot accept");
                    // Most likely out of descriptors: some time must pass for that to change.
                    self.0.env.sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn start(&self, stream: Stream, tls: Tls) {
        let transport = if stream.is_local() { Transport::Unix } else { Transport::Tcp };
        let peer = Peer { transport, address: stream.peer() };
        let Some(guard) = self.admit(peer) else { return };
        let shared = Arc::clone(&self.0);
        drop(self.0.env.spawn("nbd connection", async move { connection::serve(&shared, stream, &tls, guard).await }));
    }

    fn admit(&self, peer: Peer) -> Option<Guard> {
        match self.0.sessions.admit(peer, self.0.env.now()) {
            Ok(guard) => Some(guard),
            Err(Turned::Full) => {
                tracing::warn!(connections_max = self.0.limits.connections_max, "too many connections: one closed");
                None
            }
            Err(_) => None,
        }
    }

    /// Serves one connection to its end, in the caller's task.
    pub async fn serve<S>(&self, stream: S, peer: Peer, tls: &Tls)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        if let Some(guard) = self.admit(peer) {
            connection::serve(&self.0, stream, tls, guard).await;
        }
    }

    /// The clients of the export with that key ([`crate::Export::key`]), oldest first.
    #[must_use]
    pub fn clients(&self, key: &str) -> Vec<ClientInfo> {
        self.0.sessions.clients(key)
    }

    /// Connections, counting those still in their handshake.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.0.sessions.count()
    }

    /// Payload bytes under way, of at most [`Limits::gateway_bytes_max`].
    #[must_use]
    pub fn bytes_under_way(&self) -> u64 {
        self.0.admission.used()
    }

    /// Closes every connection on the export with that key ([`crate::Export::key`]) and waits until their requests are
    /// finished. Whether a client may come back is up to [`Exports::open`].
    pub async fn disconnect(&self, key: &str) {
        self.0.sessions.disconnect(key).await;
    }

    /// Stops: listeners close, requests under way are finished and answered, later ones are answered with ESHUTDOWN,
    /// and each connection is closed when it has nothing left. What is not finished after `grace` is dropped.
    pub async fn shutdown(&self, grace: Duration) {
        let sessions = &self.0.sessions;
        sessions.order_all(Order::Drain);
        if self.0.env.timeout(grace, sessions.emptied()).await.is_none() {
            tracing::warn!(connections = sessions.count(), "requests unfinished at the end of the grace time: dropped");
            sessions.order_all(Order::Kill);
            sessions.emptied().await;
        }
    }
}
