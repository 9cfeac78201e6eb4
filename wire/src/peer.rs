//! A peer as this process reaches it: one link for each class of traffic, and what can be asked over them.

use crate::config::Endpoint;
use crate::error::CallError;
use crate::handshake::Class;
use crate::link::{Call, Link, LinkState, Waiting};
use crate::payload::Payload;
use crate::service::ServiceId;
use crate::transport::Connect;
use std::fmt;
use std::future::ready;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use xsan_env::runtime::BoxFuture;
use xsan_types::NodeId;

/// A peer. Connections are made by the first call of their class, and again by the first call after a loss. Dropping it
/// closes them; what is unanswered fails.
pub struct Peer {
    pub(crate) endpoint: Endpoint,
    node: NodeId,
    links: [Link; 3],
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Peer({})", self.node)
    }
}

impl Peer {
    /// The node `node`, reached by `connect`. Nothing is connected yet.
    #[must_use]
    pub fn new(endpoint: &Endpoint, node: NodeId, connect: &Arc<dyn Connect>) -> Arc<Self> {
        let links = Class::ALL.map(|class| Link::new(endpoint, node, class, connect));
        Arc::new(Self { endpoint: endpoint.clone(), node, links })
    }

    /// Which node it is.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }

    pub(crate) fn link(&self, class: Class) -> &Link {
        let index = match class {
            Class::Guest => 0,
            Class::Bulk => 1,
            Class::Control => 2,
        };
        &self.links[index]
    }

    /// How the connection of a class fares.
    #[must_use]
    pub fn state(&self, class: Class) -> LinkState {
        self.link(class).state()
    }

    /// Asks a service. Sent at once, in the order of the calls of that class; the future only waits. The outcome is
    /// known within `patience` and a little.
    ///
    /// # Errors
    /// [`CallError`]; with `Unavailable` nothing is known of what was done.
    pub fn request(
        &self,
        class: Class,
        service: ServiceId,
        operation: u16,
        body: &[u8],
        patience: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, CallError>> {
        let (sender, receiver) = oneshot::channel();
        let call = Call {
            service,
            operation,
            payload: Payload::None,
            in_pieces: false,
            answer_bytes: 0,
            patience,
            waiting: Some(Waiting::Service(sender)),
        };
        match self.link(class).call(call, |out| out.extend_from_slice(body)) {
            Ok(()) => Box::pin(async move { receiver.await.unwrap_or(Err(CallError::Unavailable)) }),
            Err(error) => Box::pin(ready(Err(error))),
        }
    }

    /// Sends a message that nobody waits for, in order with the requests of that class. It may be lost.
    ///
    /// # Errors
    /// [`CallError`]: it will certainly not arrive.
    pub fn send(&self, class: Class, service: ServiceId, operation: u16, body: &[u8]) -> Result<(), CallError> {
        let call = Call {
            service,
            operation,
            payload: Payload::None,
            in_pieces: false,
            answer_bytes: 0,
            patience: Duration::ZERO,
            waiting: None,
        };
        self.link(class).call(call, |out| out.extend_from_slice(body))
    }
}
