//! Who is up, and what nodes ask of each other beside data: heartbeats, reports, handing volumes over (RFC 0005).

use super::facts::NodeReport;
use super::host::Host;
use super::standby::Read;
use raft_meta::detector::{Beat, Detector, Observed, Options};
use raft_meta::{Command, Consensus, NodeState, ReplicaId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::mpsc;
use xsan_env::Moment;
use xsan_env::runtime::BoxFuture;
use xsan_types::{NodeId, VolumeId};
use xsan_wire::{Class, PeerInfo, Service, ServiceError, ServiceId};

/// How often a node is heard.
pub const BEAT_EVERY: Duration = Duration::from_millis(250);
/// Beats that wait for the leader's task; more are dropped, as messages may be.
const BEATS_MAX: usize = 1024;
/// How long a proposal of the leader may take before it looks again.
const PROPOSAL_FOR: Duration = Duration::from_millis(500);
/// A leader that did not get to look for this long was not running, and did not hear.
const FROZEN_FOR: Duration = Duration::from_millis(900);

const HEARTBEAT: u16 = 1;
const REPORT: u16 = 2;
const RELEASE: u16 = 3;
const RESIZE: u16 = 4;
const SERVE: u16 = 5;
const READ: u16 = 6;

/// What a node says of itself, one way. Bodies of this service are JSON: fields are added, never changed. (But what was read is bytes.)
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Age of the oldest request to its devices, in milliseconds.
    pub disk_silent_millis: u64,
    /// Nodes it cannot reach.
    pub unreachable: Vec<NodeId>,
    /// It is about to end.
    pub leaving: bool,
}

/// Asks a node to let a volume go.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Release {
    /// Which.
    pub volume: VolumeId,
    /// Cut its clients off.
    pub force: bool,
}

/// Asks a node to serve a volume that has an address.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Serve {
    /// Which.
    pub volume: VolumeId,
}

/// Asks the owner for another size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Resize {
    /// Which.
    pub volume: VolumeId,
    /// Bytes.
    pub size: u64,
}

/// What a node answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done, or there was nothing to do.
    Done,
    /// The volume has clients.
    InUse {
        /// How many.
        clients: usize,
    },
    /// It was tried.
    Failed {
        /// Why not.
        message: String,
    },
}

/// A heartbeat with who sent it and when it came.
pub struct Heard {
    from: NodeId,
    instance: u64,
    at: Moment,
    beat: Heartbeat,
}

/// Where heartbeats wait for the leader's task.
pub struct Beats(mpsc::Sender<Heard>);

impl Beats {
    /// A queue and its reader.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<Heard>) {
        let (sender, receiver) = mpsc::channel(BEATS_MAX);
        (Self(sender), receiver)
    }

    fn push(&self, from: NodeId, instance: u64, at: Moment, beat: Heartbeat) {
        // Full: lost, as messages may be.
        self.0.try_send(Heard { from, instance, at, beat }).ok();
    }
}

/// Serves [`ServiceId::MEMBERSHIP`].
pub struct MembershipService(pub Weak<Host>);

impl Service for MembershipService {
    fn request(
        &self,
        _from: &PeerInfo,
        operation: u16,
        body: &[u8],
        _deadline: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, ServiceError>> {
        let (host, body) = (Weak::clone(&self.0), body.to_vec());
        Box::pin(async move {
            let host = host.upgrade().ok_or(ServiceError::Unavailable)?;
            match operation {
                REPORT => encode(&host.report().await),
                RELEASE => {
                    let release: Release = decode(&body)?;
                    encode(&host.release(release.volume, release.force).await)
                }
                RESIZE => {
                    let resize: Resize = decode(&body)?;
                    encode(&host.resize_here(resize.volume, resize.size).await)
                }
                SERVE => {
                    let serve: Serve = decode(&body)?;
                    encode(&host.serve_for_address(serve.volume).await)
                }
                READ => host.read_here(decode(&body)?).await.ok_or(ServiceError::Unavailable),
                _ => Err(ServiceError::NotOffered),
            }
        })
    }

    fn message(&self, from: &PeerInfo, operation: u16, body: &[u8]) {
        let (Some(host), HEARTBEAT) = (self.0.upgrade(), operation) else { return };
        if let Ok(beat) = decode(body) {
            host.beats.push(from.node, from.instance, host.env().now(), beat);
        }
    }
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, ServiceError> {
    serde_json::from_slice(body).map_err(|_| ServiceError::Malformed)
}

fn encode(answer: &impl Serialize) -> Result<Vec<u8>, ServiceError> {
    serde_json::to_vec(answer).map_err(|_| ServiceError::Unavailable)
}

impl Host {
    async fn ask<T: DeserializeOwned>(
        &self,
        node: NodeId,
        operation: u16,
        body: &impl Serialize,
        patience: Duration,
    ) -> Option<T> {
        let body = serde_json::to_vec(body).ok()?;
        let peer = self.links().peer(node);
        let answer = peer.request(Class::Control, ServiceId::MEMBERSHIP, operation, &body, patience).await;
        answer.ok().and_then(|answer| serde_json::from_slice(&answer).ok())
    }

    /// What a node says of itself; `None`: nothing in time.
    pub async fn report_of(&self, node: NodeId) -> Option<NodeReport> {
        if node == self.node_id() {
            return Some(self.report().await);
        }
        self.ask(node, REPORT, &(), Duration::from_secs(1)).await
    }

    /// Asks a node to let a volume go; `None`: no answer in time.
    pub async fn ask_release(&self, node: NodeId, release: &Release, patience: Duration) -> Option<Reply> {
        self.ask(node, RELEASE, release, patience).await
    }

    /// Asks a node to serve a volume that has an address; `None`: no answer in time.
    pub async fn ask_serve(&self, node: NodeId, serve: &Serve, patience: Duration) -> Option<Reply> {
        self.ask(node, SERVE, serve, patience).await
    }

    /// Asks the owner of a volume for another size; `None`: no answer in time.
    pub async fn ask_resize(&self, node: NodeId, resize: &Resize, patience: Duration) -> Option<Reply> {
        self.ask(node, RESIZE, resize, patience).await
    }

    /// Asks the owner of a volume for bytes; `None`: it has none to give, or no answer in time.
    pub async fn ask_read(&self, node: NodeId, read: &Read, patience: Duration) -> Option<Vec<u8>> {
        let body = serde_json::to_vec(read).ok()?;
        let peer = self.links().peer(node);
        peer.request(Class::Guest, ServiceId::MEMBERSHIP, READ, &body, patience).await.ok()
    }

    /// Tells the leader how this node is.
    pub fn send_beat(&self, leaving: bool) {
        let status = self.group().status().borrow().clone();
        let leader = status.leader.and_then(|leader| status.members.get(&leader)).map(|member| member.node);
        let Some(leader) = leader else { return };
        let mut unreachable = self.links().unreachable(self.env().now());
        // The beat itself disproves it, if it arrives.
        unreachable.retain(|node| *node != leader);
        let disk_silent_millis = u64::try_from(self.disk_silent_for().as_millis()).unwrap_or(u64::MAX);
        let beat = Heartbeat { disk_silent_millis, unreachable, leaving };
        if leader == self.node_id() {
            self.beats.push(leader, self.instance(), self.env().now(), beat);
        } else if let Ok(body) = serde_json::to_vec(&beat) {
            // Lost, as messages may be: the next one follows.
            let _ = self.links().peer(leader).send(Class::Control, ServiceId::MEMBERSHIP, HEARTBEAT, &body);
        }
    }
}

/// Sends heartbeats until it is aborted.
pub async fn beat(host: Arc<Host>) {
    loop {
        host.send_beat(false);
        host.env().sleep(BEAT_EVERY).await;
    }
}

/// While this node's replica leads: judges the others by their heartbeats, and brings new ones into the group.
pub async fn lead(host: Arc<Host>, mut beats: mpsc::Receiver<Heard>) {
    let mut status = host.group().status();
    loop {
        let own = host.group().replica();
        if status.wait_for(|status| status.leader == Some(own)).await.is_err() {
            return;
        }
        tracing::info!("this node leads the metadata group");
        // What came for an earlier lead says nothing of now.
        while beats.try_recv().is_ok() {}
        let (mut looked, mut proposed) = (host.env().now(), 0);
        let mut detector = Detector::new(Options::default(), looked);
        loop {
            let term = match status.borrow_and_update() {
                status if status.leader == Some(own) => status.term,
                _ => break,
            };
            let now = host.env().now();
            if now.since(looked) > FROZEN_FOR + PROPOSAL_FOR * proposed {
                tracing::warn!("this process stood still: others are not judged by the time it missed");
                detector = Detector::new(Options::default(), now);
            }
            looked = now;
            proposed = judge(&host, &mut detector, term).await;
            bring_in(&host).await;
            let pause = detector.next_at().map_or(BEAT_EVERY, |at| at.since(now).min(BEAT_EVERY));
            let first = host.env().timeout(pause.max(Duration::from_millis(5)), beats.recv()).await;
            let mut next = first.flatten();
            while let Some(heard) = next {
                let beat = Beat {
                    instance: heard.instance,
                    disk_silent_for: Duration::from_millis(heard.beat.disk_silent_millis),
                    unreachable: heard.beat.unreachable,
                    leaving: heard.beat.leaving,
                };
                detector.heard(heard.from, beat, heard.at);
                next = beats.try_recv().ok();
            }
        }
        tracing::info!("this node leads no more");
    }
}

/// Answers how many changes were proposed.
async fn judge(host: &Host, detector: &mut Detector, term: u64) -> u32 {
    let (view, now) = (host.view(), host.env().now());
    let observed = view.nodes.values().filter(|node| view.node(node.id).is_some()).map(|node| Observed {
        node: node.id,
        // Being emptied says nothing of whether it answers.
        state: if node.state == NodeState::Draining { NodeState::Up } else { node.state },
        has_device: view.devices_of(node.id).next().is_some(),
    });
    detector.observe(observed, now);
    for node in detector.clones() {
        tracing::error!(%node, "two processes speak for this node in turn: one is a copy of the other's files; stop one");
    }
    let mut proposed = 0;
    for verdict in detector.decide(now) {
        let Some(node) = view.node(verdict.node) else { continue };
        let reason = verdict.reason.to_string();
        tracing::info!(node = %node.name, from = %node.state, to = %verdict.state, reason, "a node changes its state");
        let command = Command::ReportNode {
            node: node.id,
            term,
            from: node.state,
            to: verdict.state,
            now_millis: host.env().wall_millis(),
            reason,
        };
        proposed += 1;
        // Without an answer it is looked at again; a refusal means that somebody was faster.
        let outcome = host.env().timeout(PROPOSAL_FOR, host.group().propose(command)).await;
        if let Some(Err(error)) = outcome {
            tracing::debug!(node = %node.name, %error, "the change of a node's state was refused");
        }
    }
    proposed
}

/// Replicas of nodes that were admitted and are no members yet.
async fn bring_in(host: &Host) {
    let members = host.group().status().borrow().members.clone();
    for (&node, record) in &host.view().hosts.nodes {
        let replica = ReplicaId(record.replica);
        host.links().learn_replica(replica, node);
        if members.contains_key(&replica) {
            continue;
        }
        match host.group().add_learner(replica, node).await {
            Ok(()) => tracing::info!(%node, %replica, "a replica joins the metadata group"),
            // Another change is under way, or the lead is gone: at the next look.
            Err(error) => tracing::debug!(%node, %replica, %error, "a replica cannot join the group now"),
        }
    }
}
