//! The map of a pool: which device holds which position, who is up. Swapped as a whole.

use crate::error::PoolError;
use crate::load::Load;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use xsan_types::{DeviceId, Epoch, PgId, PoolId};
use xsan_wire::node::NodeApi;

/// A device as the pool's user knows it.
#[derive(Clone)]
pub struct DeviceView {
    /// The node that serves it. Devices of one node share one handle (same `Arc`).
    pub node: Arc<dyn NodeApi>,
    /// What fails together with it, by any name: two members of a set are never in the same domain.
    pub domain: Arc<str>,
    /// Whether it is believed to answer. Devices that are not up are not asked.
    pub up: bool,
    /// Whether it is being emptied: it carries no new journal members.
    pub leaving: bool,
    /// Logical sector in bytes.
    pub sector: u32,
    /// Free bytes, roughly; 0 when unknown.
    pub free: u64,
}

impl fmt::Debug for DeviceView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceView").field("domain", &self.domain).field("up", &self.up).finish_non_exhaustive()
    }
}

/// The map of one pool under one epoch.
#[derive(Clone, Debug, Default)]
pub struct PoolView {
    /// Version of the cluster map; carried by shard writes.
    pub epoch: Epoch,
    /// Per placement group its devices in the order of the shard index (`placement::PgTable::positions`).
    pub table: Vec<Vec<Option<DeviceId>>>,
    /// While data moves: where it was, in the shape of `table`; else empty. Reads that find nothing at a position's device try this one (P11).
    pub before: Vec<Vec<Option<DeviceId>>>,
    /// All devices of the pool, also those that hold no position.
    pub devices: BTreeMap<DeviceId, DeviceView>,
}

impl PoolView {
    /// Whether an owner has to look at its sets and holes again: anything but free space differs.
    pub(crate) fn differs(&self, other: &Self) -> bool {
        let same_device = |a: &DeviceView, b: &DeviceView| {
            Arc::ptr_eq(&a.node, &b.node)
                && a.up == b.up
                && a.leaving == b.leaving
                && a.domain == b.domain
                && a.sector == b.sector
        };
        self.epoch != other.epoch
            || self.table != other.table
            || self.before != other.before
            || !self.devices.keys().eq(other.devices.keys())
            || !self.devices.values().zip(other.devices.values()).all(|(a, b)| same_device(a, b))
    }
}

/// A device with its load, as every call uses it.
pub(crate) struct Link {
    pub(crate) device: DeviceId,
    pub(crate) node: Arc<dyn NodeApi>,
    pub(crate) domain: Arc<str>,
    pub(crate) up: bool,
    pub(crate) leaving: bool,
    pub(crate) free: u64,
    pub(crate) load: Arc<Load>,
}

/// A [`PoolView`] resolved for quick look-ups.
pub(crate) struct View {
    pub(crate) epoch: Epoch,
    pool: PoolId,
    /// Index into `links` per position.
    groups: Vec<Box<[Option<u32>]>>,
    /// The same where data was, while it moves; else empty.
    before: Vec<Box<[Option<u32>]>>,
    /// Ordered by device.
    links: Vec<Arc<Link>>,
    /// The groups with the most positions up, and how many those have.
    pub(crate) best: Vec<u32>,
    pub(crate) best_up: usize,
    /// Each node once.
    pub(crate) nodes: Vec<Arc<dyn NodeApi>>,
    /// Failure domains that are not leaving, up or not.
    pub(crate) domains: usize,
}

impl View {
    /// Resolves a map; `loads` gets an entry for every new device.
    pub(crate) fn resolve(
        pool: PoolId,
        width: usize,
        map: &PoolView,
        loads: &mut BTreeMap<DeviceId, Arc<Load>>,
    ) -> Result<Self, PoolError> {
        if map.table.is_empty() {
            return Err(PoolError::NoGroups);
        }
        let mut rows = map.table.iter().chain(&map.before).enumerate();
        if let Some((group, row)) = rows.find(|(_, row)| row.len() != width) {
            return Err(PoolError::Width { group, found: row.len(), expected: width });
        }
        let links: Vec<Arc<Link>> = map
            .devices
            .iter()
            .map(|(&device, view)| {
                Arc::new(Link {
                    device,
                    node: Arc::clone(&view.node),
                    domain: Arc::clone(&view.domain),
                    up: view.up,
                    leaving: view.leaving,
                    free: view.free,
                    load: Arc::clone(loads.entry(device).or_default()),
                })
            })
            .collect();
        let slot = |device: &Option<DeviceId>| {
            let device = (*device)?;
            links.binary_search_by_key(&device, |link| link.device).ok().and_then(|at| u32::try_from(at).ok())
        };
        let resolve = |table: &[Vec<Option<DeviceId>>]| -> Vec<Box<[Option<u32>]>> {
            table.iter().map(|row| row.iter().map(slot).collect()).collect()
        };
        let (groups, before) = (resolve(&map.table), resolve(&map.before));
        let (best_up, best) = best_groups(&groups, &links);
        let mut nodes: Vec<Arc<dyn NodeApi>> = Vec::new();
        for link in &links {
            if !nodes.iter().any(|node| Arc::ptr_eq(node, &link.node)) {
                nodes.push(Arc::clone(&link.node));
            }
        }
        let mut domains: Vec<&str> = links.iter().filter(|link| !link.leaving).map(|link| &*link.domain).collect();
        domains.sort_unstable();
        domains.dedup();
        let domains = domains.len();
        Ok(Self { epoch: map.epoch, pool, groups, before, links, best, best_up, nodes, domains })
    }

    /// Devices, ordered by id.
    pub(crate) fn links(&self) -> &[Arc<Link>] {
        &self.links
    }

    /// A device, up or not.
    pub(crate) fn link(&self, device: DeviceId) -> Option<&Arc<Link>> {
        let at = self.links.binary_search_by_key(&device, |link| link.device).ok()?;
        self.links.get(at)
    }

    /// The device of a position, up or not; nothing for a hole and for groups of other pools.
    pub(crate) fn position(&self, pg: PgId, index: usize) -> Option<&Arc<Link>> {
        if pg.pool != self.pool {
            return None;
        }
        let group = self.groups.get(usize::try_from(pg.index).ok()?)?;
        self.links.get(usize::try_from((*group.get(index)?)?).ok()?)
    }

    /// Where a position was before it moved, if it moves.
    pub(crate) fn position_before(&self, pg: PgId, index: usize) -> Option<&Arc<Link>> {
        if pg.pool != self.pool {
            return None;
        }
        let group = self.before.get(usize::try_from(pg.index).ok()?)?;
        let link = self.links.get(usize::try_from((*group.get(index)?)?).ok()?)?;
        self.position(pg, index).is_none_or(|now| now.device != link.device).then_some(link)
    }

    /// The devices that may have a position's shards and are up: its own, and where it was. The first is asked first.
    pub(crate) fn readable(&self, pg: PgId, index: usize) -> Option<(&Arc<Link>, Option<&Arc<Link>>)> {
        let before = self.position_before(pg, index).filter(|link| link.up);
        match self.up_position(pg, index) {
            Some(link) => Some((link, before)),
            None => before.map(|link| (link, None)),
        }
    }

    /// The device of a position if it is up.
    pub(crate) fn up_position(&self, pg: PgId, index: usize) -> Option<&Arc<Link>> {
        self.position(pg, index).filter(|link| link.up)
    }

    /// How many of a group's positions are held by one of `devices`.
    pub(crate) fn overlap(&self, group: u32, devices: &[DeviceId]) -> usize {
        let Some(group) = self.groups.get(group as usize) else { return 0 };
        let is_one = |slot: &&Option<u32>| {
            slot.and_then(|at| self.links.get(at as usize)).is_some_and(|link| devices.contains(&link.device))
        };
        group.iter().filter(is_one).count()
    }
}

fn best_groups(groups: &[Box<[Option<u32>]>], links: &[Arc<Link>]) -> (usize, Vec<u32>) {
    let is_up = |slot: &&Option<u32>| slot.and_then(|at| links.get(at as usize)).is_some_and(|link| link.up);
    let ups: Vec<usize> = groups.iter().map(|group| group.iter().filter(is_up).count()).collect();
    let most = ups.iter().copied().max().unwrap_or(0);
    (most, (0..).zip(&ups).filter(|&(_, &up)| up == most).map(|(index, _)| index).collect())
}
