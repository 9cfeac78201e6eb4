//! Applies commands. Pure and deterministic: every replica gets the same state from the same commands.
//!
//! Each handler checks everything first and changes the state last, so that a refused command changes nothing.

use crate::command::{Command, Outcome};
use crate::error::MetaError;
use crate::format;
use crate::name::Name;
use crate::register::{Change, VolumeRegister, Writer, size_is_allowed};
use crate::state::{AckPolicy, DeviceRecord, MetaState, Node, NodeState, Pool, Volume};
use std::sync::Arc;
use xsan_placement::{
    DeviceState, FailureDomain, PlacementError, Shape, assign, assign_with_holes, suggested_pg_count,
};
use xsan_types::{DeviceId, Epoch, NodeId, PoolId, RegisterError, Scheme, SetId, VolumeId};

impl MetaState {
    /// Applies one command.
    ///
    /// # Errors
    /// Why it was refused; the state is unchanged then.
    pub fn apply(&mut self, command: &Command) -> Result<Outcome, MetaError> {
        match command {
            Command::AddNode { name, host, rack, zone } => self.add_node(name, host, rack, zone).map(Outcome::Node),
            Command::AddDevice { device, node, capacity } => self.add_device(*device, *node, *capacity),
            Command::SetNodeState { node, state } => self.set_node_state(*node, *state),
            Command::SetDeviceState { device, state } => self.set_device_state(*device, *state),
            Command::CreatePool { name, scheme, failure_domain, pg_count, ack } => {
                self.create_pool(name, *scheme, *failure_domain, *pg_count, *ack)
            }
            Command::DeletePool { pool } => self.delete_pool(*pool),
            Command::PlanMove { pool, holes_allowed } => self.plan_move(*pool, *holes_allowed),
            Command::FinishMove { pool } => self.end_move(*pool, true),
            Command::CancelMove { pool } => self.end_move(*pool, false),
            Command::PlaceEmptied { pool, map_epoch, device } => self.place_emptied(*pool, *map_epoch, *device),
            Command::RemoveDevice { device } => self.remove_device(*device),
            Command::LoseDevice { device } => self.lose_device(*device),
            Command::CreateVolume { name, pool, size, ack } => self.create_volume(name, *pool, *size, *ack),
            Command::RenameVolume { volume, name } => self.rename_volume(*volume, name),
            Command::SetVolumePolicy { volume, ack } => {
                self.open_volume(*volume)?.ack = *ack;
                Ok(Outcome::Done)
            }
            Command::ChangeRegister { volume, generation, version, token, change } => {
                let digest = format::command_digest(command);
                let writer = Writer { generation: *generation, version: *version, token: *token, digest };
                self.change_register(*volume, writer, Change::Owner(change))
            }
            Command::PinCheckpoint { volume, generation, version, token } => {
                let digest = format::command_digest(command);
                let writer = Writer { generation: *generation, version: *version, token: *token, digest };
                self.change_register(*volume, writer, Change::Pin)
            }
            Command::UnpinCheckpoint { volume, generation, version, token, segment } => {
                let digest = format::command_digest(command);
                let writer = Writer { generation: *generation, version: *version, token: *token, digest };
                self.change_register(*volume, writer, Change::Unpin(*segment))
            }
            Command::ServiceAddress(command) => self.apply_address(command),
            Command::SetAuthority(_)
            | Command::AddToken { .. }
            | Command::RevokeToken { .. }
            | Command::AdmitNode(_)
            | Command::SetNodeAddress { .. }
            | Command::RenameNode { .. }
            | Command::ReportNode { .. }
            | Command::VolumeServed { .. } => self.apply_host(command),
        }
    }

    /// The cluster map changed.
    pub(crate) fn bump_epoch(&mut self) {
        self.epoch = self.epoch.next();
    }

    pub(crate) fn add_node(
        &mut self,
        name: &Name,
        host: &Name,
        rack: &Option<Name>,
        zone: &Option<Name>,
    ) -> Result<NodeId, MetaError> {
        if self.node_named(name.as_str()).is_some() {
            return Err(MetaError::NameTaken);
        }
        let elsewhere = self.nodes.values().find(|node| {
            node.state != NodeState::Removed && node.host == *host && (&node.rack, &node.zone) != (rack, zone)
        });
        if let Some(node) = elsewhere {
            return Err(MetaError::HostElsewhere(node.id));
        }
        let id = self.next_node;
        self.next_node = NodeId(id.0.checked_add(1).ok_or(MetaError::IdsExhausted)?);
        let node = Node {
            id,
            name: name.clone(),
            host: host.clone(),
            rack: rack.clone(),
            zone: zone.clone(),
            state: NodeState::Joining,
        };
        self.nodes.insert(id, node);
        self.bump_epoch();
        Ok(id)
    }

    fn add_device(&mut self, device: DeviceId, node: NodeId, capacity: u64) -> Result<Outcome, MetaError> {
        if self.node(node).is_none() {
            return Err(MetaError::NoNode(node));
        }
        if self.devices.contains_key(&device) {
            return Err(MetaError::DeviceKnown(device));
        }
        if self.removed_devices.contains(&device) {
            return Err(MetaError::DeviceRemoved(device));
        }
        if capacity == 0 {
            return Err(MetaError::NoCapacity);
        }
        self.devices.insert(device, DeviceRecord { id: device, node, capacity, state: DeviceState::In });
        self.settle_draining(node);
        self.bump_epoch();
        Ok(Outcome::Done)
    }

    pub(crate) fn set_node_state(&mut self, id: NodeId, to: NodeState) -> Result<Outcome, MetaError> {
        let from = self.node(id).ok_or(MetaError::NoNode(id))?.state;
        if from == to {
            return Ok(Outcome::Done);
        }
        // Joining is a beginning only; everything else may follow everything else.
        if to == NodeState::Joining {
            return Err(MetaError::Transition { from, to });
        }
        if to == NodeState::Removed {
            if let Some(device) = self.devices_of(id).find(|device| self.is_placed(device.id)) {
                return Err(MetaError::DeviceInUse(device.id));
            }
            self.devices.retain(|_, device| device.node != id);
            self.lost_devices.retain(|device| self.devices.contains_key(device));
            self.hosts.nodes.remove(&id);
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.state = to;
        }
        if to == NodeState::Up {
            self.settle_draining(id);
        }
        self.bump_epoch();
        Ok(Outcome::Done)
    }

    /// A node that is up and whose devices are all out is draining; else it is not.
    fn settle_draining(&mut self, id: NodeId) {
        let states: Vec<DeviceState> = self.devices_of(id).map(|device| device.state).collect();
        let is_out = !states.is_empty() && states.iter().all(|state| *state == DeviceState::Out);
        match self.nodes.get_mut(&id) {
            Some(node) if node.state == NodeState::Up && is_out => node.state = NodeState::Draining,
            Some(node) if node.state == NodeState::Draining && !is_out => node.state = NodeState::Up,
            _ => {}
        }
    }

    fn remove_device(&mut self, id: DeviceId) -> Result<Outcome, MetaError> {
        let node = self.devices.get(&id).ok_or(MetaError::NoDevice(id))?.node;
        // A set that nobody serves now may be all that has a volume's newest writes.
        let mut sets =
            self.volumes.values().filter(|volume| !volume.is_deleted()).filter_map(|v| v.register().set.as_ref());
        if self.is_placed(id) || sets.any(|set| set.members.iter().any(|member| member.device == id)) {
            return Err(MetaError::DeviceInUse(id));
        }
        self.devices.remove(&id);
        self.lost_devices.remove(&id);
        self.removed_devices.insert(id);
        self.settle_draining(node);
        self.bump_epoch();
        Ok(Outcome::Done)
    }

    fn lose_device(&mut self, id: DeviceId) -> Result<Outcome, MetaError> {
        if !self.devices.contains_key(&id) {
            return Err(MetaError::NoDevice(id));
        }
        if !self.lost_devices.insert(id) {
            return Ok(Outcome::Done);
        }
        self.set_device_state(id, DeviceState::Out)?;
        // Also if it was out: what was found before this map may have been found on it.
        self.bump_epoch();
        Ok(Outcome::Done)
    }

    fn place_emptied(&mut self, id: PoolId, map_epoch: Epoch, device: DeviceId) -> Result<Outcome, MetaError> {
        let pool = self.pools.get(&id).ok_or(MetaError::NoPool(id))?;
        if pool.next.is_none() {
            return Err(MetaError::NotMoving);
        }
        if pool.map_epoch != map_epoch {
            return Err(MetaError::Outdated);
        }
        let mut left = self.devices_to_empty(pool);
        if left.remove(&device) {
            self.emptied.entry(id).or_default().insert(device);
        }
        if left.is_empty() { self.end_move(id, true) } else { Ok(Outcome::Done) }
    }

    /// Whether a table, present or planned, names the device.
    fn is_placed(&self, device: DeviceId) -> bool {
        self.pools
            .values()
            .any(|pool| pool.table.holds(device) || pool.next.as_ref().is_some_and(|next| next.holds(device)))
    }

    fn set_device_state(&mut self, id: DeviceId, state: DeviceState) -> Result<Outcome, MetaError> {
        let device = self.devices.get_mut(&id).ok_or(MetaError::NoDevice(id))?;
        if state == DeviceState::In && self.lost_devices.contains(&id) {
            return Err(MetaError::DeviceLost(id));
        }
        if device.state != state {
            device.state = state;
            let node = device.node;
            self.settle_draining(node);
            self.bump_epoch();
        }
        Ok(Outcome::Done)
    }

    fn create_pool(
        &mut self,
        name: &Name,
        scheme: Scheme,
        failure_domain: Option<FailureDomain>,
        pg_count: Option<u32>,
        ack: AckPolicy,
    ) -> Result<Outcome, MetaError> {
        if self.pool_named(name.as_str()).is_some() {
            return Err(MetaError::NameTaken);
        }
        let failure_domain = match failure_domain {
            Some(FailureDomain::Node) if !self.single_host => FailureDomain::Host,
            Some(domain) => domain,
            None if self.single_host => FailureDomain::Node,
            None => FailureDomain::Host,
        };
        let topology = self.topology()?;
        let device_count = topology.devices().iter().filter(|device| device.takes_data()).count();
        let pg_count = pg_count.unwrap_or_else(|| suggested_pg_count(device_count, scheme.width()));
        let id = self.next_pool;
        let shape = Shape { pool: id, width: scheme.width(), failure_domain, pg_count };
        let table = Arc::new(assign(&topology, shape, None)?);
        self.next_pool = PoolId(id.0.checked_add(1).ok_or(MetaError::IdsExhausted)?);
        self.bump_epoch();
        let (name, map_epoch) = (name.clone(), self.epoch);
        self.pools.insert(id, Pool { id, name, scheme, failure_domain, ack, map_epoch, table, next: None });
        Ok(Outcome::Pool(id))
    }

    fn delete_pool(&mut self, id: PoolId) -> Result<Outcome, MetaError> {
        if !self.pools.contains_key(&id) {
            return Err(MetaError::NoPool(id));
        }
        if let Some(volume) = self.volumes.values().find(|volume| volume.pool == id && !volume.is_deleted()) {
            return Err(MetaError::PoolInUse(volume.id));
        }
        self.pools.remove(&id);
        self.emptied.remove(&id);
        self.bump_epoch();
        Ok(Outcome::Done)
    }

    fn plan_move(&mut self, id: PoolId, holes_allowed: bool) -> Result<Outcome, MetaError> {
        let pool = self.pools.get(&id).ok_or(MetaError::NoPool(id))?;
        if pool.next.is_some() {
            return Err(MetaError::Moving);
        }
        let least = if holes_allowed { pool.scheme.k() } else { pool.scheme.width() };
        let next = assign_with_holes(&self.topology()?, pool.table.shape(), least, Some(&pool.table))?;
        if next == *pool.table {
            return Ok(Outcome::Done);
        }
        self.bump_epoch();
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.next = Some(Arc::new(next));
            pool.map_epoch = self.epoch;
        }
        Ok(Outcome::Done)
    }

    fn end_move(&mut self, id: PoolId, done: bool) -> Result<Outcome, MetaError> {
        let pool = self.pools.get_mut(&id).ok_or(MetaError::NoPool(id))?;
        let next = pool.next.take().ok_or(MetaError::NotMoving)?;
        self.emptied.remove(&id);
        if done {
            pool.table = next;
        }
        self.epoch = self.epoch.next();
        pool.map_epoch = self.epoch;
        Ok(Outcome::Done)
    }

    fn create_volume(
        &mut self,
        name: &Name,
        pool: PoolId,
        size: u64,
        ack: Option<AckPolicy>,
    ) -> Result<Outcome, MetaError> {
        if self.volume_names.contains_key(name) {
            return Err(MetaError::NameTaken);
        }
        let default = self.pools.get(&pool).ok_or(MetaError::NoPool(pool))?.ack;
        if !size_is_allowed(size) {
            return Err(MetaError::VolumeBytes(size));
        }
        let id = self.next_volume;
        self.next_volume = VolumeId(id.0.checked_add(1).ok_or(MetaError::IdsExhausted)?);
        let (ack, register) = (ack.unwrap_or(default), VolumeRegister::new(size));
        self.volumes.insert(id, Volume { id, name: name.clone(), pool, ack, register });
        self.volume_names.insert(name.clone(), id);
        Ok(Outcome::Volume(id))
    }

    fn rename_volume(&mut self, id: VolumeId, name: &Name) -> Result<Outcome, MetaError> {
        let taken = self.volume_names.get(name).copied();
        let volume = self.open_volume(id)?;
        match taken {
            Some(other) if other != id => return Err(MetaError::NameTaken),
            Some(_) => return Ok(Outcome::Done),
            None => {}
        }
        let old = std::mem::replace(&mut volume.name, name.clone());
        self.volume_names.remove(&old);
        self.volume_names.insert(name.clone(), id);
        Ok(Outcome::Done)
    }

    fn open_volume(&mut self, id: VolumeId) -> Result<&mut Volume, MetaError> {
        self.volumes.get_mut(&id).filter(|volume| !volume.is_deleted()).ok_or(MetaError::NoVolume(id))
    }

    fn change_register(&mut self, id: VolumeId, writer: Writer, change: Change<'_>) -> Result<Outcome, MetaError> {
        let volume = self.volumes.get_mut(&id).ok_or(RegisterError::NotFound)?;
        let register = volume.register.change(id, writer, change)?.clone();
        if volume.is_deleted() && self.volume_names.get(&volume.name) == Some(&id) {
            self.volume_names.remove(&volume.name);
            self.hosts.served.remove(&id);
            self.addresses.remove(&id);
        }
        Ok(Outcome::Register(register))
    }

    /// Checks what no command can break; for tests and for what comes back from disk.
    ///
    /// # Errors
    /// The first rule that does not hold, in words.
    pub fn check(&self) -> Result<(), BrokenRule> {
        let rule = |holds: bool, broken: BrokenRule| if holds { Ok(()) } else { Err(broken) };
        for (id, node) in &self.nodes {
            rule(*id == node.id && *id < self.next_node, BrokenRule::NodeId(*id))?;
        }
        for (id, device) in &self.devices {
            let served = self.node(device.node).is_some();
            rule(*id == device.id && served && device.capacity > 0, BrokenRule::Device(*id))?;
        }
        for (id, pool) in &self.pools {
            let fits = |table: &xsan_placement::PgTable| {
                table.pool == *id
                    && table.width == pool.scheme.width()
                    && table.failure_domain == pool.failure_domain
                    && table.positions.iter().flatten().flatten().all(|device| self.devices.contains_key(device))
            };
            let tables = fits(&pool.table) && pool.next.as_deref().is_none_or(fits);
            rule(*id == pool.id && *id < self.next_pool && tables, BrokenRule::Pool(*id))?;
        }
        for (id, volume) in &self.volumes {
            let named = self.volume_names.get(&volume.name) == Some(id);
            let register = volume.register();
            let set = register.set.as_ref().map_or(SetId::default(), |set| set.id);
            let holds = *id == volume.id
                && *id < self.next_volume
                && volume.is_deleted() != named
                && (volume.is_deleted() || self.pools.contains_key(&volume.pool))
                && size_is_allowed(register.size)
                && set.generation <= register.generation;
            rule(holds, BrokenRule::Volume(*id))?;
        }
        for (id, emptied) in &self.emptied {
            let moves = self.pools.get(id).is_some_and(|pool| pool.next.is_some());
            rule(moves && emptied.iter().all(|device| self.devices.contains_key(device)), BrokenRule::Pool(*id))?;
        }
        for id in &self.lost_devices {
            let is_out = self.devices.get(id).is_some_and(|device| device.state == DeviceState::Out);
            rule(is_out, BrokenRule::Device(*id))?;
        }
        for id in self.hosts.nodes.keys() {
            rule(self.node(*id).is_some(), BrokenRule::Host(*id))?;
        }
        for (id, record) in &self.addresses {
            let alone =
                self.addresses.values().filter(|other| other.place.address == record.place.address).count() == 1;
            rule(self.volume(*id).is_some() && record.place.is_usable() && alone, BrokenRule::Address(*id))?;
        }
        let open = self.volumes.values().filter(|volume| !volume.is_deleted()).count();
        rule(open == self.volume_names.len(), BrokenRule::Names)?;
        self.topology().map(|_| ()).map_err(BrokenRule::Topology)
    }
}

/// A rule of the state that does not hold: a bug, or damage that no checksum saw.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BrokenRule {
    /// A node's id.
    #[error("{0} is filed under another id or newer than the next one")]
    NodeId(NodeId),
    /// What is known of the host of a node that is not known.
    #[error("{0} has a host and is no node")]
    Host(NodeId),
    /// A device without a node or capacity.
    #[error("device {0} has no node or no capacity, or is lost and not out")]
    Device(DeviceId),
    /// A pool whose tables are of another shape or name unknown devices.
    #[error("the tables of pool {0} do not fit")]
    Pool(PoolId),
    /// A volume whose name, pool, size or generation does not fit.
    #[error("volume {0} does not fit its name, pool or register")]
    Volume(VolumeId),
    /// An address without a volume, of several, or that no host may have.
    #[error("the address of volume {0} does not fit")]
    Address(VolumeId),
    /// A name without a volume.
    #[error("a name leads to no volume")]
    Names,
    /// Nodes and devices form no tree.
    #[error(transparent)]
    Topology(PlacementError),
}
