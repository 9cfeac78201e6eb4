//! Service addresses (RFC 0007): puts a volume's address on this host while it serves the volume, takes it off when it does not, and
//! finds a host for volumes that have an address and nobody who serves them. Owner: the daemon, one task of each.
//!
//! The kernel is given each address for [`LEASE`] only and told again every [`TICK`]: a process that is frozen or killed loses its
//! addresses without doing anything. Whoever was late by a lease asks the metadata before it puts an address back.

use super::export::{VolumeExport, export_key, volume_info};
use super::host::Host;
use super::maps::answers;
use super::membership::{Reply, Serve};
use crate::error::ClusterError;
use lsm_block::Health;
use raft_meta::addresses::CLIENTS_MAX;
use raft_meta::{AddressCommand, AddressRecord, Command, Consensus, MetaState, NodeState, Served, ServiceAddress};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Mutex as AsyncMutex, Notify};
use xsan_env::addresses::{self as kernel, Assigned, Interface};
use xsan_env::runtime::{BoxFuture, TaskHandle};
use xsan_env::{Listener, Moment};
use xsan_gateway::tls::Tls;
use xsan_gateway::{Export, ExportInfo, Exports, OpenError, Transport};
use xsan_types::{NodeId, VolumeId};

/// The NBD port of service addresses, if the settings name none.
pub const NBD_PORT: u16 = 10809;
/// How long the kernel keeps an address that nobody renews.
const LEASE: Duration = Duration::from_secs(3);
/// How often addresses are renewed.
const TICK: Duration = Duration::from_millis(500);
/// How long a new address is announced, once a tick: some neighbour may have missed it, some stale host may still have said otherwise.
const ANNOUNCED_FOR: Duration = Duration::from_secs(6);
/// How long after a failure it is tried again.
const AGAIN: Duration = Duration::from_secs(2);
/// How long the newest metadata may take, before an address that was lost stays so.
const NEWEST_FOR: Duration = Duration::from_secs(1);
/// How long a volume has nobody before one is chosen: whoever lets it go may do so for somebody.
const UNSERVED_FOR: Duration = Duration::from_millis(300);
/// How long a node has to say whether it will serve a volume.
const SERVE_WITHIN: Duration = Duration::from_secs(2);
/// How long neighbours have to say that they have an address.
const PROBE_FOR: Duration = Duration::from_millis(600);

/// An address that this host has.
struct Holding {
    place: ServiceAddress,
    interface: Interface,
    listener: Option<TaskHandle>,
    since: Moment,
    renewed: Moment,
    /// The clients that were noted last.
    told: Option<Vec<SocketAddr>>,
    /// Clients of the host before: told that their connections are gone.
    orphans: Vec<SocketAddr>,
}

/// What a node tells of an address. Travels as JSON: fields are added, never changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressReport {
    /// The interface that has it; `None`: this host does not have it.
    pub interface: Option<String>,
    /// The port clients are listened for.
    pub port: u16,
    /// Why it does not have it, or what does not work.
    pub fault: Option<String>,
}

/// The addresses of a host.
#[derive(Default)]
pub struct Addresses {
    /// Held while an address is put on or taken off.
    held: AsyncMutex<BTreeMap<VolumeId, Holding>>,
    told: Mutex<BTreeMap<VolumeId, AddressReport>>,
    /// Something is served, or not any more.
    changed: Notify,
    closing: AtomicBool,
}

impl Addresses {
    /// Something is served here, or not any more.
    pub fn look(&self) {
        self.changed.notify_one();
    }

    /// What is to be told.
    #[must_use]
    pub fn reports(&self) -> BTreeMap<VolumeId, AddressReport> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn tell(&self, volume: VolumeId, report: AddressReport) {
        if let Some(fault) = &report.fault {
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            let known = told.insert(volume, report.clone());
            if known.is_none_or(|known| known.fault.as_ref() != Some(fault)) {
                tracing::warn!(%volume, fault, "the service address of a volume");
            }
            return;
        }
        self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(volume, report);
    }

    fn forget(&self, volume: VolumeId) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).remove(&volume);
    }
}

/// This host's interfaces and addresses at one moment.
struct Network {
    interfaces: Vec<Interface>,
    assigned: Vec<Assigned>,
    /// The interface that the settings name.
    setting: Option<String>,
}

/// Whether an address was put there by a daemon like this one: nobody else gives one for so short.
fn is_leased(found: &Assigned) -> bool {
    found.valid_for.is_some_and(|left| left <= LEASE)
}

impl Network {
    fn now(setting: Option<&str>) -> Result<Self, String> {
        let failed = |error: std::io::Error| format!("this host's interfaces cannot be read: {error}");
        let (interfaces, assigned) = (kernel::interfaces().map_err(failed)?, kernel::assigned().map_err(failed)?);
        Ok(Self { interfaces, assigned, setting: setting.map(str::to_owned) })
    }

    /// Where an address goes, and whether its subnet is reached through it.
    fn place(&self, place: &ServiceAddress) -> Result<(Interface, bool), String> {
        choose_interface(place, self.setting.as_deref(), &self.interfaces, &self.assigned)
    }
}

fn choose_interface(
    place: &ServiceAddress,
    setting: Option<&str>,
    interfaces: &[Interface],
    assigned: &[Assigned],
) -> Result<(Interface, bool), String> {
    let address = place.address;
    if assigned.iter().any(|found| found.address == address && !is_leased(found)) {
        return Err(format!("{address} is configured on this host: a service address is nobody's own"));
    }
    let is_near = |found: &&Assigned| !is_leased(found) && place.is_near(found.address);
    let interface = match place.interface.as_deref().or(setting) {
        Some(name) => {
            let found = interfaces.iter().find(|interface| interface.name == name);
            found.ok_or_else(|| format!("this host has no interface {name}"))?
        }
        None => {
            let near = assigned.iter().find(is_near).map(|near| near.interface);
            let found = near.and_then(|near| interfaces.iter().find(|interface| interface.index == near));
            found.ok_or_else(|| format!("no interface of this host is in the subnet of {place}"))?
        }
    };
    if !interface.is_up {
        return Err(format!("interface {} is down", interface.name));
    }
    let on_it = |found: &&Assigned| found.interface == interface.index;
    let is_routed = !assigned.iter().filter(is_near).any(|found| on_it(&found));
    Ok((interface.clone(), is_routed))
}

fn refused(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            "the daemon may not change addresses: it needs CAP_NET_ADMIN and CAP_NET_RAW".to_owned()
        }
        _ => format!("the kernel refused the address: {error}"),
    }
}

impl Host {
    fn nbd_port(&self) -> u16 {
        self.settings().nbd.map_or(NBD_PORT, |nbd| nbd.port())
    }

    fn network(&self) -> Result<Network, String> {
        Network::now(self.settings().service_interface.as_deref())
    }

    /// Whether this host could have the address.
    fn can_hold(&self, place: &ServiceAddress) -> Result<(), String> {
        if !may_change_addresses() {
            return Err(refused(&std::io::ErrorKind::PermissionDenied.into()));
        }
        self.network()?.place(place).map(drop)
    }

    /// Looks whether a volume may have an address, as far as it can be seen from this host.
    ///
    /// # Errors
    /// It is somebody else's.
    pub async fn check_address(&self, name: &str, place: ServiceAddress) -> Result<(), ClusterError> {
        let view = self.newest_view().await?;
        let id = view.volume_named(name).map(|volume| volume.id);
        let is_own = |record: &AddressRecord| record.place.address == place.address;
        if id.and_then(|id| view.addresses.get(&id)).is_some_and(is_own) {
            return Ok(());
        }
        let setting = self.settings().service_interface.clone();
        let probed = self.env().blocking(move || {
            let (interface, _) = Network::now(setting.as_deref())?.place(&place)?;
            let IpAddr::V4(address) = place.address else { return Ok(()) };
            match kernel::who_has(&interface, address, PROBE_FOR) {
                Ok(Some(who)) => {
                    let who: Vec<String> = who.iter().map(|byte| format!("{byte:02x}")).collect();
                    Err(format!("{address} is in use on the network of {}: {} has it", interface.name, who.join(":")))
                }
                Ok(None) => Ok(()),
                Err(error) => Err(refused(&error)),
            }
        });
        probed.await.map_err(ClusterError::Invalid)
    }

    /// Whether this host is to have the address of a volume now, by what it knows.
    fn should_hold(&self, view: &MetaState, id: VolumeId) -> bool {
        if self.addresses().closing.load(Ordering::Relaxed) || self.is_leaving(id) {
            return false;
        }
        let Some(attached) = self.volumes().serving(id) else { return false };
        let status = attached.volume.status();
        let is_newest = view.volume(id).is_some_and(|volume| volume.register().generation <= status.generation);
        // The journal set is the lease: who reaches its members is the owner, metadata or not. Who reaches neither may be owner no more.
        let is_cut_off =
            matches!(status.health, Health::Waiting { .. }) && self.group().status().borrow().leader.is_none();
        is_newest && !attached.has_moved() && !status.health.is_final() && !is_cut_off
    }

    async fn put_address(
        self: &Arc<Self>,
        id: VolumeId,
        record: &AddressRecord,
        network: &Network,
    ) -> Result<Holding, String> {
        let place = record.place.clone();
        let (interface, is_routed) = network.place(&place)?;
        let put = kernel::put(interface.index, place.address, place.prefix, LEASE, is_routed);
        put.map_err(|error| refused(&error))?;
        let now = self.env().now();
        let listener = match self.listen_at(id, place.address).await {
            Ok(listener) => listener,
            Err(error) => {
                // It expires in any case.
                let _ = kernel::remove(interface.index, place.address, place.prefix);
                return Err(format!("cannot listen on {}: {error}", place.address));
            }
        };
        tracing::info!(volume = %id, address = %place, interface = interface.name, "this host has the service address");
        let generation = self.volumes().serving(id).map(|attached| attached.volume.status().generation);
        // Who is connected to this process needs not be told.
        let is_of_others = generation.is_some_and(|generation| record.noted < generation);
        let orphans = if is_of_others { record.clients.clone() } else { Vec::new() };
        Ok(Holding { place, interface, listener, since: now, renewed: now, told: None, orphans })
    }

    /// Listens for NBD at a service address, where only its volume is served.
    async fn listen_at(self: &Arc<Self>, id: VolumeId, address: IpAddr) -> std::io::Result<Option<TaskHandle>> {
        let Some(gateway) = self.gateway.get() else { return Ok(None) };
        let port = self.nbd_port();
        if self.settings().nbd.is_some_and(|nbd| nbd.ip().is_unspecified() && nbd.is_ipv4() == address.is_ipv4()) {
            // Who listens at all addresses does so here.
            return Ok(None);
        }
        let listener = Listener::tcp(SocketAddr::new(address, port)).await?;
        let exports = Arc::new(OneVolume { host: Arc::clone(self), id });
        Ok(Some(gateway.with_exports(exports).listen(listener, Tls::off())))
    }

    /// Takes the address of a volume off this host. Its clients have been cut off.
    async fn drop_address(&self, id: VolumeId) {
        if let Some(holding) = self.addresses().held.lock().await.remove(&id) {
            self.take_off(id, &holding);
        }
    }

    fn take_off(&self, id: VolumeId, holding: &Holding) {
        if let Some(listener) = &holding.listener {
            listener.abort();
        }
        let Holding { place, interface, .. } = holding;
        match kernel::remove(interface.index, place.address, place.prefix) {
            Ok(()) => tracing::info!(volume = %id, address = %place, "this host gave the service address up"),
            // By itself when the lease ends.
            Err(error) => {
                tracing::warn!(volume = %id, address = %place, %error, "a service address is not taken off yet")
            }
        }
        self.addresses().forget(id);
    }

    /// Lets the clients of a volume and its address go, in the order that lets clients know: connections end, then the address is
    /// gone.
    pub(super) async fn give_address_up(&self, id: VolumeId) {
        let listener = self.addresses().held.lock().await.get_mut(&id).and_then(|holding| holding.listener.take());
        if let Some(listener) = listener {
            // Who comes back now is not to be refused by this host.
            listener.abort();
            listener.join().await;
        }
        if let Some(gateway) = self.gateway.get() {
            gateway.disconnect(&export_key(id)).await;
        }
        self.drop_address(id).await;
    }

    /// Gives all addresses up with their volumes, before the gateway ends: their clients shall find them elsewhere.
    pub async fn leave_addresses(&self) {
        let held: Vec<VolumeId> = {
            let held = self.addresses().held.lock().await;
            self.addresses().closing.store(true, Ordering::Relaxed);
            held.keys().copied().collect()
        };
        let leaving = held.into_iter().map(|id| async move {
            self.give_address_up(id).await;
            self.give_volume_up(id).await;
        });
        futures::future::join_all(leaving).await;
    }

    /// One look: who should have what, and does.
    async fn settle_addresses(self: &Arc<Self>, tried: &mut BTreeMap<VolumeId, Moment>) {
        if self.gateway.get().is_none() {
            // Soon.
            return;
        }
        let mut view = self.view();
        let mut held = self.addresses().held.lock().await;
        let is_late = |holding: &Holding| self.env().now().since(holding.renewed) >= LEASE;
        if held.values().any(is_late) {
            // The kernel took it off, and somebody else may have it by now.
            tracing::warn!("this process stood still for longer than its service addresses lasted");
            let newest = self.env().timeout(NEWEST_FOR, self.newest_view()).await;
            let is_known = match newest {
                Some(Ok(newest)) => {
                    view = newest;
                    true
                }
                _ => false,
            };
            let is_owner =
                |id: &VolumeId| view.hosts.served.get(id).is_some_and(|served| served.node == self.node_id());
            let gone: Vec<VolumeId> = held
                .iter()
                .filter(|(id, holding)| is_late(holding) && !(is_known && is_owner(id)))
                .map(|(&id, _)| id)
                .collect();
            for id in gone {
                if let Some(holding) = held.remove(&id) {
                    self.take_off(id, &holding);
                }
            }
            if !is_known {
                return;
            }
        }
        let ids: Vec<VolumeId> = held.keys().copied().collect();
        for id in ids {
            let is_wanted = |holding: &Holding| {
                view.addresses.get(&id).is_some_and(|record| record.place == holding.place)
                    && self.should_hold(&view, id)
            };
            if held.get(&id).is_some_and(is_wanted) {
                continue;
            }
            let Some(holding) = held.remove(&id) else { continue };
            if let Some(listener) = &holding.listener {
                listener.abort();
            }
            if let Some(gateway) = self.gateway.get() {
                // While the address is there they can still be told.
                let key = export_key(id);
                let cut = gateway.disconnect_remote(&key);
                let _ = self.env().timeout(Duration::from_millis(200), cut).await;
            }
            self.take_off(id, &holding);
        }
        tried.retain(|id, at| view.addresses.contains_key(id) && self.env().now().since(*at) < AGAIN);
        for (&id, record) in &view.addresses {
            if held.contains_key(&id) || tried.contains_key(&id) || !self.should_hold(&view, id) {
                continue;
            }
            let put = match self.network() {
                Ok(network) => self.put_address(id, record, &network).await,
                Err(fault) => Err(fault),
            };
            match put {
                Ok(holding) => drop(held.insert(id, holding)),
                Err(fault) => {
                    tried.insert(id, self.env().now());
                    self.addresses().tell(id, AddressReport { fault: Some(fault), ..AddressReport::default() });
                }
            }
        }
        if !held.is_empty() {
            let network = self.network();
            for (&id, holding) in held.iter_mut() {
                self.renew(id, holding, &network);
            }
        }
        let mut told = self.addresses().told.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|id, _| view.addresses.contains_key(id));
    }

    fn renew(&self, id: VolumeId, holding: &mut Holding, network: &Result<Network, String>) {
        let Holding { place, interface, .. } = holding;
        let now = self.env().now();
        let found = network.as_ref().map_err(Clone::clone).and_then(|network| network.place(place));
        let renewed = found.and_then(|(_, is_routed)| {
            let put = kernel::put(interface.index, place.address, place.prefix, LEASE, is_routed);
            put.map_err(|error| refused(&error))
        });
        let is_new = now.since(holding.since) < ANNOUNCED_FOR;
        let announced = if is_new { kernel::announce(interface, place.address) } else { Ok(()) };
        let mut fault = renewed.err();
        if fault.is_none() {
            holding.renewed = now;
            fault = announced.err().map(|error| match error.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    "neighbours are not told: the daemon needs CAP_NET_RAW".to_owned()
                }
                _ => format!("neighbours are not told: {error}"),
            });
        }
        let port = self.nbd_port();
        if is_new {
            for client in &holding.orphans {
                if let Err(error) = kernel::disown(SocketAddr::new(place.address, port), *client) {
                    tracing::debug!(volume = %id, %client, %error, "a client is not told that its connection is gone");
                }
            }
        }
        let interface = Some(interface.name.clone());
        self.addresses().tell(id, AddressReport { interface, port, fault });
        self.note_clients(id, holding);
    }

    /// Notes in the metadata who is connected, for a successor.
    fn note_clients(&self, id: VolumeId, holding: &mut Holding) {
        let (Some(gateway), Some(attached)) = (self.gateway.get(), self.volumes().serving(id)) else { return };
        let connected = gateway.clients(&export_key(id));
        let remote = connected.iter().filter_map(|client| client.peer.address.strip_prefix("tcp:")?.parse().ok());
        let mut clients: Vec<SocketAddr> = remote.take(CLIENTS_MAX).collect();
        if self.env().now().since(holding.since) < ANNOUNCED_FOR {
            // Were this host lost now, they might still not know.
            clients.extend(&holding.orphans);
        }
        clients.sort_unstable();
        clients.dedup();
        clients.truncate(CLIENTS_MAX);
        if holding.told.as_ref() == Some(&clients) {
            return;
        }
        holding.told = Some(clients.clone());
        let generation = attached.volume.status().generation;
        let command = Command::ServiceAddress(AddressCommand::Clients { volume: id, generation, clients });
        let noted = self.group().propose(command);
        drop(self.env().spawn("address clients", async move {
            if let Err(error) = noted.await {
                tracing::debug!(%error, "not noted who is connected");
            }
        }));
    }

    /// Serves a volume because it has an address and nobody else serves it. Answers once it is clear that this node will try.
    pub async fn serve_for_address(self: &Arc<Self>, id: VolumeId) -> Reply {
        let failed = |message: String| Reply::Failed { message };
        if self.addresses().closing.load(Ordering::Relaxed) {
            return failed("this node is about to end".into());
        }
        let newest = self.env().timeout(NEWEST_FOR, self.newest_view()).await;
        let Some(Ok(view)) = newest else { return failed("the metadata does not answer".into()) };
        let (Some(volume), Some(record)) = (view.volume(id), view.addresses.get(&id)) else { return Reply::Done };
        if self.volumes().serving(id).is_some() || self.is_taking(id) || !needs_server(&view, id, Some(self.node_id()))
        {
            return Reply::Done;
        }
        if let Err(fault) = self.can_hold(&record.place) {
            let report = AddressReport { fault: Some(fault.clone()), ..AddressReport::default() };
            self.addresses().tell(id, report);
            if let Some(Served { node, generation }) = view.hosts.served.get(&id).copied()
                && node == self.node_id()
            {
                // An old note of this node's, from before its start, must not keep others from it.
                let _ = self.propose(Command::VolumeServed { volume: id, generation, node: None }).await;
            }
            return failed(fault);
        }
        let (host, name) = (Arc::clone(self), volume.name.as_str().to_owned());
        drop(self.env().spawn("serve for address", async move {
            tracing::info!(volume = name, "served here for its address");
            let known = host.view().hosts.served.get(&id).copied();
            if let Err(error) = host.take_unserved(id, known).await {
                tracing::warn!(volume = name, %error, "cannot serve the volume for its address");
            }
        }));
        Reply::Done
    }
}

/// Whether nobody serves a volume who should answer; `but` does not count.
fn needs_server(view: &MetaState, id: VolumeId, but: Option<NodeId>) -> bool {
    let Some(Served { node, .. }) = view.hosts.served.get(&id) else { return true };
    Some(*node) == but || !view.node(*node).is_some_and(|node| answers(node.state))
}

/// Whether this process has CAP_NET_ADMIN.
fn may_change_addresses() -> bool {
    const NET_ADMIN: u64 = 1 << 12;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    // Not told: then the kernel says so when it is tried.
    effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).is_none_or(|bits| bits & NET_ADMIN != 0)
}

/// Keeps this host's addresses as they should be, until it is aborted.
pub async fn keep(host: Arc<Host>) {
    let mut applied = host.group().subscribe();
    let mut tried = BTreeMap::new();
    let mut served_at = BTreeMap::new();
    remove_leftovers(&host);
    loop {
        applied.borrow_and_update();
        host.settle_addresses(&mut tried).await;
        serve_own(&host, &mut served_at).await;
        let view = host.view();
        let changed = async {
            tokio::select! {
                biased;
                () = host.addresses().changed.notified() => {}
                applied = applied.changed() => if applied.is_err() { std::future::pending::<()>().await },
            }
        };
        if view.addresses.is_empty() && host.addresses().held.lock().await.is_empty() {
            changed.await;
        } else {
            // Either way it is time to look again; not more often than there is something to see.
            let _ = host.env().timeout(TICK, changed).await;
            host.env().sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Volumes with an address that this node serves by the metadata's note, and not in fact: it was started again.
async fn serve_own(host: &Arc<Host>, served_at: &mut BTreeMap<VolumeId, Moment>) {
    let (view, now) = (host.view(), host.env().now());
    served_at.retain(|_, at| now.since(*at) < AGAIN);
    for &id in view.addresses.keys() {
        let is_own = view.hosts.served.get(&id).is_some_and(|served| served.node == host.node_id());
        let is_idle = || host.volumes().serving(id).is_none() && !host.is_taking(id) && !host.is_leaving(id);
        if is_own && is_idle() && !served_at.contains_key(&id) {
            served_at.insert(id, now);
            host.serve_for_address(id).await;
        }
    }
}

/// What a killed predecessor left. (The kernel takes it off, too, within a lease.)
fn remove_leftovers(host: &Host) {
    let (view, Ok(assigned)) = (host.view(), kernel::assigned()) else { return };
    let own = view.node(host.node_id()).map(|node| node.host.clone());
    for (id, record) in &view.addresses {
        // Nodes of one machine share its addresses.
        let is_a_neighbours = view.hosts.served.get(id).is_some_and(|served| {
            served.node != host.node_id() && view.node(served.node).map(|node| node.host.clone()) == own
        });
        let is_it = |found: &&Assigned| is_leased(found) && found.address == record.place.address;
        for found in assigned.iter().filter(is_it).filter(|_| !is_a_neighbours) {
            tracing::info!(volume = %id, address = %record.place, "a service address that was left here is taken off");
            if let Err(error) = kernel::remove(found.interface, found.address, found.prefix) {
                tracing::warn!(volume = %id, address = %record.place, %error, "it is still there");
            }
        }
    }
}

/// While this node leads the metadata: finds somebody for volumes that have an address and nobody who serves them. One decides, so that
/// no two take turns.
pub async fn assign(host: Arc<Host>) {
    let mut applied = host.group().subscribe();
    let mut since: BTreeMap<VolumeId, Moment> = BTreeMap::new();
    let mut asked: BTreeMap<(VolumeId, NodeId), Moment> = BTreeMap::new();
    loop {
        applied.borrow_and_update();
        let (view, now) = (host.view(), host.env().now());
        let leads = host.group().status().borrow().leader == Some(host.group().replica());
        let needs = |id: &VolumeId| leads && needs_server(&view, *id, None);
        since.retain(|id, _| view.addresses.contains_key(id) && needs(id));
        asked.retain(|_, at| now.since(*at) < 2 * AGAIN);
        for &id in view.addresses.keys().filter(|id| needs(id)) {
            let since = *since.entry(id).or_insert(now);
            // One that is down lets nothing go for anybody.
            let is_free = view.hosts.served.contains_key(&id) || now.since(since) >= UNSERVED_FOR;
            let is_asked = asked.iter().any(|((volume, _), at)| *volume == id && now.since(*at) < AGAIN / 2);
            if !is_free || is_asked {
                continue;
            }
            if let Some(node) = choose_server(&view, |node| asked.contains_key(&(id, node))) {
                asked.insert((id, node), now);
                let host = Arc::clone(&host);
                drop(host.clone().env().spawn("ask to serve", async move { ask_to_serve(&host, id, node).await }));
            }
        }
        let changed = async {
            if applied.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        match since.is_empty() {
            // Who comes to lead looks at once: its first entry is applied.
            true => changed.await,
            false => drop(host.env().timeout(UNSERVED_FOR, changed).await),
        }
    }
}

async fn ask_to_serve(host: &Arc<Host>, id: VolumeId, node: NodeId) {
    tracing::info!(volume = %id, %node, "nobody serves a volume that has an address: a node is asked to");
    let answer = if node == host.node_id() {
        Some(host.serve_for_address(id).await)
    } else {
        host.ask_serve(node, &Serve { volume: id }, SERVE_WITHIN).await
    };
    if answer != Some(Reply::Done) {
        tracing::warn!(volume = %id, %node, ?answer, "a node does not serve a volume for its address");
    }
}

/// The node that is up and serves least; one that was asked of late only if there is no other.
fn choose_server(view: &MetaState, was_asked: impl Fn(NodeId) -> bool) -> Option<NodeId> {
    let serves = |node: NodeId| view.hosts.served.values().filter(|served| served.node == node).count();
    let up = view.nodes.values().filter(|node| matches!(node.state, NodeState::Up | NodeState::Draining));
    up.map(|node| (was_asked(node.id), node.state != NodeState::Up, serves(node.id), node.id)).min().map(|best| best.3)
}

/// What is served at a volume's address: that volume, while it is served here. A client that comes here to a volume that has moved
/// must not bring it back.
struct OneVolume {
    host: Arc<Host>,
    id: VolumeId,
}

impl OneVolume {
    fn name(&self) -> Option<String> {
        self.host.view().volume(self.id).map(|volume| volume.name.as_str().to_owned())
    }
}

impl Exports for OneVolume {
    fn list(&self) -> BoxFuture<'static, Vec<(String, String)>> {
        let names = self.name().map(|name| (name, String::new())).into_iter().collect();
        Box::pin(std::future::ready(names))
    }

    fn info(&self, name: &str, transport: Transport) -> BoxFuture<'static, Option<ExportInfo>> {
        let is_it = self.name().as_deref() == Some(name);
        let info = is_it.then(|| volume_info(&self.host.view(), name, transport)).flatten();
        Box::pin(std::future::ready(info))
    }

    fn open(&self, name: &str, transport: Transport) -> BoxFuture<'static, Result<Arc<dyn Export>, OpenError>> {
        // Never on standby: the address is where the volume is.
        let served = self.host.volumes().serving(self.id).filter(|_| !self.host.is_leaving(self.id));
        let opened = match served {
            _ if self.name().as_deref() != Some(name) => Err(OpenError::NotFound),
            Some(attached) => Ok(Arc::new(VolumeExport::new(attached, transport)) as Arc<dyn Export>),
            None => Err(OpenError::Unavailable("the volume has moved, and its address with it: connect again".into())),
        };
        Box::pin(std::future::ready(opened))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(index: u32, name: &str) -> Interface {
        Interface { index, name: name.into(), hardware: Some([2, 0, 0, 0, 0, 1]), is_up: true }
    }

    fn assigned(interface: u32, address: &str, is_leased: bool) -> Assigned {
        let valid_for = is_leased.then_some(LEASE);
        Assigned { interface, address: address.parse().expect("an address"), prefix: 24, valid_for }
    }

    #[test]
    fn an_address_goes_where_its_subnet_is_or_where_it_is_told() {
        let interfaces =
            [interface(1, "eth0"), interface(2, "eth1"), Interface { is_up: false, ..interface(3, "eth2") }];
        let found = [assigned(1, "10.0.0.1", false), assigned(2, "10.0.1.1", false), assigned(1, "10.0.3.9", true)];
        let place: ServiceAddress = "10.0.1.50/24".parse().expect("good");
        let choose = |place: &ServiceAddress, setting: Option<&str>| {
            choose_interface(place, setting, &interfaces, &found).map(|(interface, routed)| (interface.name, routed))
        };
        assert_eq!(choose(&place, None), Ok(("eth1".into(), false)));
        // What is told comes first; nothing there leads to the subnet then.
        assert_eq!(choose(&place, Some("eth0")), Ok(("eth0".into(), true)));
        let told = ServiceAddress { interface: Some("eth1".into()), ..place.clone() };
        assert_eq!(choose(&told, Some("eth0")), Ok(("eth1".into(), false)));
        for (text, setting, why) in [
            ("10.0.2.50/24", None, "subnet"),
            // Another volume's address makes no subnet.
            ("10.0.3.50/24", None, "subnet"),
            ("10.0.1.50/24", Some("eth9"), "no interface eth9"),
            ("10.0.1.50/24", Some("eth2"), "is down"),
            ("10.0.1.1/24", None, "configured on this host"),
        ] {
            let error = choose(&text.parse().expect("good"), setting).expect_err(text);
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn the_node_that_serves_least_and_was_not_asked_is_chosen() {
        let mut view = MetaState::new(xsan_types::ClusterId(1), true);
        assert_eq!(choose_server(&view, |_| false), None);
        for number in 1..=3 {
            let name: raft_meta::Name = format!("n{number}").parse().expect("a name");
            view.apply(&Command::AddNode { name: name.clone(), host: name, rack: None, zone: None }).expect("added");
            view.apply(&Command::SetNodeState { node: NodeId(number), state: NodeState::Up }).expect("up");
        }
        assert_eq!(choose_server(&view, |_| false), Some(NodeId(1)));
        view.hosts.served.insert(VolumeId(1), Served { node: NodeId(1), generation: Default::default() });
        assert_eq!(choose_server(&view, |_| false), Some(NodeId(2)));
        assert_eq!(choose_server(&view, |node| node == NodeId(2)), Some(NodeId(3)));
        assert!(!needs_server(&view, VolumeId(1), None));
        view.apply(&Command::SetNodeState { node: NodeId(1), state: NodeState::Down }).expect("down");
        assert!(needs_server(&view, VolumeId(1), None), "its server is down");
        assert!(needs_server(&view, VolumeId(2), None), "it never had one");
        assert_eq!(choose_server(&view, |_| true), Some(NodeId(2)), "better one that was asked than none");
    }
}
