//! Who this process is, and its limits: shared by all its connections.

use crate::handshake::Class;
use crate::identity::Tls;
use std::sync::Arc;
use std::time::Duration;
use xsan_env::{BufPool, Env};
use xsan_types::{ClusterId, NodeId};

/// Bounds in time and memory. One value per class where the classes differ.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connecting, TLS and handshake together; for a server: what a stranger is given to become a peer.
    pub connect_for: Duration,
    /// After a failed attempt the next one waits this long, doubled with every failure (and at random up to a quarter less).
    pub backoff_min: Duration,
    /// It never waits longer than this.
    pub backoff_max: Duration,
    /// With requests unanswered: nothing heard for this long means the connection is lost. Half-way a ping asks for a sign of
    /// life. For guest and control connections.
    pub silence_for: Duration,
    /// The same for bulk connections: whole shards may be on their way.
    pub bulk_silence_for: Duration,
    /// Deadline of a node call on a guest connection.
    pub guest_for: Duration,
    /// Deadline of a node call on a bulk connection.
    pub bulk_for: Duration,
    /// Requests of a connection that a server works on at a time; told to the client, who keeps to it.
    pub requests_max: u32,
    /// Bytes of these requests and their answers.
    pub bytes_max: u64,
    /// Requests that a client lets wait for their turn on a connection; more are refused at once.
    pub queue_requests_max: usize,
    /// Bytes of these.
    pub queue_bytes_max: u64,
    /// Connections that a server has at a time, handshakes included; more are refused.
    pub connections_max: usize,
    /// A server gives up a client that takes nothing of what is sent to it for this long.
    pub stall_for: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect_for: Duration::from_secs(1),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(1),
            silence_for: Duration::from_millis(300),
            bulk_silence_for: Duration::from_secs(3),
            guest_for: Duration::from_secs(10),
            bulk_for: Duration::from_secs(60),
            requests_max: 512,
            bytes_max: 32 << 20,
            queue_requests_max: 8192,
            queue_bytes_max: 512 << 20,
            connections_max: 1024,
            stall_for: Duration::from_secs(30),
        }
    }
}

impl Limits {
    pub(crate) fn silence_for(&self, class: Class) -> Duration {
        match class {
            Class::Guest | Class::Control => self.silence_for,
            Class::Bulk => self.bulk_silence_for,
        }
    }

    pub(crate) fn call_for(&self, class: Class) -> Duration {
        match class {
            Class::Guest | Class::Control => self.guest_for,
            Class::Bulk => self.bulk_for,
        }
    }
}

/// This process among the nodes of a cluster. Cheap to clone.
#[derive(Clone)]
pub struct Endpoint {
    pub(crate) env: Env,
    pub(crate) pool: BufPool,
    pub(crate) cluster: ClusterId,
    pub(crate) node: NodeId,
    pub(crate) instance: u64,
    pub(crate) tls: Option<Arc<Tls>>,
    pub(crate) limits: Limits,
}

impl Endpoint {
    /// A node of a cluster, without TLS: for tests, and for networks that are trusted.
    #[must_use]
    pub fn new(env: &Env, pool: BufPool, cluster: ClusterId, node: NodeId) -> Self {
        let instance = env.random();
        Self { env: env.clone(), pool, cluster, node, instance, tls: None, limits: Limits::default() }
    }

    /// All connections of this endpoint are mutual TLS from now on.
    #[must_use]
    pub fn with_tls(mut self, tls: Arc<Tls>) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Other limits.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The node that this is.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Number of this process, new at every start.
    #[must_use]
    pub fn instance(&self) -> u64 {
        self.instance
    }
}
