//! What can be reached through a server: the node itself, and services that consensus and membership register.

use crate::codec::WireVersion;
use crate::handshake::Class;
use crate::join::JoinService;
use crate::node::NodeApi;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use xsan_env::runtime::BoxFuture;
use xsan_types::NodeId;

/// Which service of a node; travels in every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServiceId(pub u8);

impl ServiceId {
    /// `NodeApi`. (0 is the connection itself.)
    pub const NODE: Self = Self(1);
    /// Consensus messages, proposals and reads of the metadata.
    pub const META: Self = Self(2);
    /// Heartbeats, joining, reports on peers.
    pub const MEMBERSHIP: Self = Self(3);
}

/// The other end of a connection, as the handshake established it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    /// The node; proved by its certificate if the connection has TLS.
    pub node: NodeId,
    /// Number of its process, new at every start.
    pub instance: u64,
    /// What the connection is for.
    pub class: Class,
    /// Version that both speak here.
    pub version: WireVersion,
    /// Where it comes from, for logs.
    pub address: String,
}

/// Why a service does not answer a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceError {
    /// Not an operation of this service: the caller gets `CallError::NotOffered`.
    NotOffered,
    /// The bytes are no request: the caller gets `CallError::Malformed`.
    Malformed,
    /// It cannot answer now: the caller gets `CallError::Unavailable`.
    Unavailable,
}

/// A service whose requests and answers are bytes of its own format, at most `frame::META_BYTES_MAX` each. Failures that
/// its callers should tell apart belong into the answer's bytes.
///
/// Both calls are made in the order in which the messages were sent over one connection, by the connection's task: they
/// return at once and leave work to the future. Messages over different connections have no order.
pub trait Service: Send + Sync + 'static {
    /// Begins a request. The future is driven to its end even if the caller is gone; nobody waits for it any more after
    /// `deadline`.
    fn request(
        &self,
        from: &PeerInfo,
        operation: u16,
        body: &[u8],
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, ServiceError>>;

    /// Takes note of a message that nobody waits for. May be lost, never comes twice.
    fn message(&self, from: &PeerInfo, operation: u16, body: &[u8]);
}

/// Decides who may connect, beyond certificate and cluster: a removed node is not let in.
pub type Admission = Arc<dyn Fn(NodeId) -> bool + Send + Sync>;

/// What a server offers.
#[derive(Clone, Default)]
pub struct Services {
    pub(crate) node: Option<Arc<dyn NodeApi>>,
    pub(crate) others: BTreeMap<u8, Arc<dyn Service>>,
    pub(crate) admission: Option<Admission>,
    pub(crate) join: Option<Arc<dyn JoinService>>,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Services(node: {}, others: {:?})", self.node.is_some(), self.others.keys())
    }
}

impl Services {
    /// None; everybody of the cluster is let in.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Offers a storage node.
    #[must_use]
    pub fn with_node(mut self, node: Arc<dyn NodeApi>) -> Self {
        self.node = Some(node);
        self
    }

    /// Offers another service, in place of one with the same id. [`ServiceId::NODE`] is taken.
    #[must_use]
    pub fn with(mut self, id: ServiceId, service: Arc<dyn Service>) -> Self {
        self.others.insert(id.0, service);
        self
    }

    /// Lets hosts in that have no certificate yet, as far as `service` does; only on endpoints with TLS.
    #[must_use]
    pub fn with_join(mut self, service: Arc<dyn JoinService>) -> Self {
        self.join = Some(service);
        self
    }

    /// Asks `admission` before a node is let in.
    #[must_use]
    pub fn with_admission(mut self, admission: Admission) -> Self {
        self.admission = Some(admission);
        self
    }
}

/// How a request went, in the code of its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// The answer follows.
    Done = 0,
    /// An error of the node follows.
    Failed = 1,
    /// No such service or operation.
    NotOffered = 2,
    /// Not understood.
    Malformed = 3,
    /// Not begun, the server is stopping; or the service cannot answer.
    Unavailable = 4,
    /// The answer is longer than a frame may be.
    TooLarge = 5,
}

impl Status {
    pub(crate) fn from_number(number: u16) -> Option<Self> {
        [Self::Done, Self::Failed, Self::NotOffered, Self::Malformed, Self::Unavailable, Self::TooLarge]
            .into_iter()
            .find(|status| *status as u16 == number)
    }
}

impl From<ServiceError> for Status {
    fn from(error: ServiceError) -> Self {
        match error {
            ServiceError::NotOffered => Self::NotOffered,
            ServiceError::Malformed => Self::Malformed,
            ServiceError::Unavailable => Self::Unavailable,
        }
    }
}
