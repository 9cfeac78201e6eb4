//! The maps that pools work with, made from the metadata and from what nodes say of their devices.

use super::links::Links;
use raft_meta::{MetaState, Node, NodeState};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use xsan_placement::{DeviceState, FailureDomain};
use xsan_pool::{DeviceView, PoolView};
use xsan_types::{DeviceId, NodeId};
use xsan_wire::node::{DeviceStatus, NodeApi};

/// Devices as they were heard of last, and how their nodes are reached.
pub struct Maps {
    own: NodeId,
    storage: Arc<dyn NodeApi>,
    links: Arc<Links>,
    statuses: Mutex<BTreeMap<DeviceId, DeviceStatus>>,
    /// Devices that their nodes, which answer, do not serve.
    absent: Mutex<BTreeSet<DeviceId>>,
}

impl Maps {
    /// Nothing was heard yet. `storage` is this process's own node, called directly.
    #[must_use]
    pub fn new(own: NodeId, storage: Arc<dyn NodeApi>, links: Arc<Links>) -> Self {
        Self { own, storage, links, statuses: Mutex::default(), absent: Mutex::default() }
    }

    /// How a node's devices are reached.
    #[must_use]
    pub fn storage_of(&self, node: NodeId) -> Arc<dyn NodeApi> {
        if node == self.own { Arc::clone(&self.storage) } else { self.links.storage(node) }
    }

    /// The map of one pool.
    #[must_use]
    pub fn pool_view(&self, view: &MetaState, pool: &raft_meta::Pool) -> Arc<PoolView> {
        let statuses = self.statuses.lock().unwrap_or_else(PoisonError::into_inner);
        let absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut devices = BTreeMap::new();
        for device in view.devices.values() {
            let Some(node) = view.node(device.node) else { continue };
            let status = statuses.get(&device.id);
            let seen = DeviceView {
                node: self.storage_of(node.id),
                domain: Arc::from(domain(node, device.id, pool.failure_domain)),
                up: answers(node.state) && !absent.contains(&device.id),
                leaving: device.state == DeviceState::Out,
                sector: status.map_or(512, |status| status.sector),
                free: status.map_or(0, |status| status.capacity.saturating_sub(status.used)),
            };
            devices.insert(device.id, seen);
        }
        let table = super::carry::places(pool).positions.clone();
        let before = pool.next.as_ref().map(|_| pool.table.positions.clone()).unwrap_or_default();
        Arc::new(PoolView { epoch: view.epoch, table, before, devices })
    }

    /// Asks every node that should answer for its devices.
    pub async fn ask(&self, view: &MetaState) {
        let nodes = view.nodes.values().filter(|node| answers(node.state));
        let asked = nodes.map(|node| {
            let answer = self.storage_of(node.id).devices();
            async move { (node.id, answer.await) }
        });
        for (node, answer) in futures::future::join_all(asked).await {
            match answer {
                Ok(devices) => {
                    self.note_absent(view, node, &devices);
                    self.learn(node, devices);
                }
                Err(error) => tracing::debug!(%node, %error, "a node does not tell of its devices"),
            }
        }
    }

    /// Whether a node that answers does not serve all its devices.
    #[must_use]
    pub fn lacks_devices(&self) -> bool {
        !self.absent.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    fn note_absent(&self, view: &MetaState, node: NodeId, served: &[DeviceStatus]) {
        let mut absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        absent.retain(|device| view.devices.contains_key(device));
        for device in view.devices_of(node) {
            if served.iter().any(|status| status.device == device.id) {
                absent.remove(&device.id);
            } else if absent.insert(device.id) {
                tracing::warn!(%node, device = %device.id, "a device is not served by its node");
            }
        }
    }

    fn learn(&self, node: NodeId, devices: Vec<DeviceStatus>) {
        let mut statuses = self.statuses.lock().unwrap_or_else(PoisonError::into_inner);
        for status in devices {
            let before = statuses.insert(status.device, status);
            if before.is_some_and(|before| before.incarnation != status.incarnation) && node != self.own {
                self.links.renew(node);
            }
        }
    }
}

/// Whether a node in this state is asked anything.
#[must_use]
pub fn answers(state: NodeState) -> bool {
    matches!(state, NodeState::Up | NodeState::Suspect | NodeState::Draining)
}

/// What fails together with a device.
fn domain(node: &Node, device: DeviceId, level: FailureDomain) -> String {
    let host = || node.host.to_string();
    match level {
        FailureDomain::Device => device.to_string(),
        FailureDomain::Node => node.id.to_string(),
        FailureDomain::Host => host(),
        FailureDomain::Rack => node.rack.as_ref().map_or_else(host, |rack| format!("rack {rack}")),
        FailureDomain::Zone => node.zone.as_ref().map_or_else(host, |zone| format!("zone {zone}")),
    }
}
