//! How this node reaches the others: addresses, which replica of the metadata runs where, and one peer for each.

use raft_meta::{RaftGroup, RaftTransport, ReplicaId};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::Duration;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Env, Moment, Stream};
use xsan_types::NodeId;
use xsan_wire::config::Endpoint;
use xsan_wire::{
    CallError, Class, Connect, LinkState, NodeApi, Peer, PeerInfo, RemoteNode, Service, ServiceError, ServiceId,
};

/// The only operation of [`ServiceId::META`]: a message between replicas, behind the sender's id.
const RAFT_MESSAGE: u16 = 1;
/// An operation that no service has.
const NOTHING: u16 = 0;

/// How long after the next attempt was due a failed connection still counts.
const FAILED_FOR: Duration = Duration::from_millis(500);

/// Everything known of other nodes' whereabouts.
pub struct Links {
    endpoint: Endpoint,
    book: RwLock<Book>,
    group: OnceLock<RaftGroup>,
    me: Weak<Links>,
}

#[derive(Default)]
struct Book {
    addresses: BTreeMap<NodeId, String>,
    replicas: BTreeMap<ReplicaId, NodeId>,
    peers: BTreeMap<NodeId, Arc<Peer>>,
    /// One handle per node: pools compare them.
    nodes: BTreeMap<NodeId, Arc<dyn NodeApi>>,
}

impl Links {
    /// Nobody is known yet.
    #[must_use]
    pub fn new(endpoint: Endpoint) -> Arc<Self> {
        Arc::new_cyclic(|me| Self { endpoint, book: RwLock::default(), group: OnceLock::new(), me: Weak::clone(me) })
    }

    fn book(&self) -> RwLockReadGuard<'_, Book> {
        self.book.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn book_mut(&self) -> RwLockWriteGuard<'_, Book> {
        self.book.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Messages of other replicas go to `group`.
    pub fn set_group(&self, group: RaftGroup) {
        // Set once, by whoever opened the group.
        let _ = self.group.set(group);
    }

    /// Where a node listens.
    pub fn learn_address(&self, node: NodeId, address: &str) {
        if self.book().addresses.get(&node).is_none_or(|known| known != address) {
            self.book_mut().addresses.insert(node, address.to_owned());
        }
    }

    /// Where a replica runs.
    pub fn learn_replica(&self, replica: ReplicaId, node: NodeId) {
        if self.book().replicas.get(&replica) != Some(&node) {
            self.book_mut().replicas.insert(replica, node);
        }
    }

    /// A node is gone for good: its connections end.
    pub fn forget(&self, node: NodeId) {
        let mut book = self.book_mut();
        book.addresses.remove(&node);
        book.peers.remove(&node);
        book.nodes.remove(&node);
        book.replicas.retain(|_, at| *at != node);
    }

    /// A node, connected to when it is first asked something.
    #[must_use]
    pub fn peer(&self, node: NodeId) -> Arc<Peer> {
        if let Some(peer) = self.book().peers.get(&node) {
            return Arc::clone(peer);
        }
        let mut book = self.book_mut();
        let make = || {
            let links = Weak::clone(&self.me);
            let connect: Arc<dyn Connect> = Arc::new(move || connect(&links, node));
            Peer::new(&self.endpoint, node, &connect)
        };
        Arc::clone(book.peers.entry(node).or_insert_with(make))
    }

    /// The storage node of a peer; always the same handle, until [`Links::renew`].
    #[must_use]
    pub fn storage(&self, node: NodeId) -> Arc<dyn NodeApi> {
        if let Some(storage) = self.book().nodes.get(&node) {
            return Arc::clone(storage);
        }
        let storage: Arc<dyn NodeApi> = Arc::new(RemoteNode::new(self.peer(node)));
        Arc::clone(self.book_mut().nodes.entry(node).or_insert(storage))
    }

    /// The node was started anew: a new handle makes owners look at their sets and holes.
    pub fn renew(&self, node: NodeId) {
        let storage: Arc<dyn NodeApi> = Arc::new(RemoteNode::new(self.peer(node)));
        self.book_mut().nodes.insert(node, storage);
    }

    /// Whether a process answers as `node` where it is known to live.
    pub async fn is_there(&self, env: &Env, node: NodeId, patience: Duration) -> bool {
        let asked = self.peer(node).request(Class::Control, ServiceId::MEMBERSHIP, NOTHING, &[], patience);
        match env.timeout(patience, asked).await {
            Some(Err(CallError::Unavailable)) | None => false,
            // A refusal is an answer as well.
            Some(_) => true,
        }
    }

    /// Nodes whose connections fail at `now`. One that nobody has tried for a while says nothing: it may be back.
    #[must_use]
    pub fn unreachable(&self, now: Moment) -> Vec<NodeId> {
        let fails = |peer: &Peer| {
            Class::ALL.iter().any(|&class| match peer.state(class) {
                LinkState::Down { until, .. } => now < until.after(FAILED_FOR),
                _ => false,
            })
        };
        self.book().peers.iter().filter(|(_, peer)| fails(peer)).map(|(&node, _)| node).collect()
    }
}

fn connect(links: &Weak<Links>, node: NodeId) -> BoxFuture<'static, io::Result<Stream>> {
    let address = links.upgrade().and_then(|links| links.book().addresses.get(&node).cloned());
    Box::pin(async move {
        match address {
            Some(address) => Stream::connect_host(&address).await,
            None => Err(io::Error::new(io::ErrorKind::NotFound, format!("nobody knows where {node} listens"))),
        }
    })
}

/// Messages between replicas over the peers' control connections.
pub struct MetaTransport(pub Arc<Links>);

impl RaftTransport for MetaTransport {
    fn send(&self, to: ReplicaId, message: Vec<u8>) {
        let links = &self.0;
        let Some(node) = links.book().replicas.get(&to).copied() else { return };
        let Some(group) = links.group.get() else { return };
        let body = [&group.replica().0.to_le_bytes()[..], &message].concat();
        // Lost, as messages may be: it is said again.
        let _ = links.peer(node).send(Class::Control, ServiceId::META, RAFT_MESSAGE, &body);
    }
}

/// The other end of [`MetaTransport`].
pub struct MetaService(pub Arc<Links>);

impl Service for MetaService {
    fn request(
        &self,
        _from: &PeerInfo,
        _operation: u16,
        _body: &[u8],
        _deadline: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, ServiceError>> {
        Box::pin(async { Err(ServiceError::NotOffered) })
    }

    fn message(&self, from: &PeerInfo, operation: u16, body: &[u8]) {
        let Some((replica, message)) = body.split_first_chunk::<8>() else { return };
        let (replica, links) = (ReplicaId(u64::from_le_bytes(*replica)), &self.0);
        if operation != RAFT_MESSAGE {
            return;
        }
        // A replica that is known to run elsewhere is not spoken for; an unknown one may be the first to write to us.
        match links.book().replicas.get(&replica) {
            Some(node) if *node != from.node => return,
            _ => {}
        }
        links.learn_replica(replica, from.node);
        if let Some(group) = links.group.get() {
            group.deliver(replica, message.to_vec());
        }
    }
}
