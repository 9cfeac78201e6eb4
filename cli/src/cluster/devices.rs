//! The devices of a host's daemon: opened at its start, added and given up while it runs.

use super::host::Host;
use super::identity::Identity;
use super::probe::{self, DiskProbe};
use super::settings::{self, Settings};
use super::storage::Storage;
use crate::error::ClusterError;
use raft_meta::{Command, MetaError, MetaState};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use xsan_env::runtime::TaskHandle;
use xsan_env::{BufPool, Disk, Env};
use xsan_node::{DeviceIdentity, Node};
use xsan_types::DeviceId;
use xsan_wire::node::{NodeApi, NodeError};

/// What must be empty on a disk before it becomes a device.
const BLANK_BYTES: usize = 1 << 20;
/// How often a disk that is not there is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The disks that the settings name.
#[derive(Debug, Default)]
pub(super) struct Disks {
    served: BTreeMap<PathBuf, DeviceId>,
    /// Those that cannot be served, and why.
    unopened: BTreeMap<PathBuf, Unopened>,
}

#[derive(Clone, Debug)]
struct Unopened {
    why: String,
    /// There was no disk that could be read: it may appear.
    may_appear: bool,
}

/// Opens the devices that the settings name. One that cannot be opened keeps no other one from being served, nor this host's guests
/// from the volumes: its disk is lost, or returns.
///
/// # Errors
/// A device is another node's, or of another cluster.
pub(super) async fn open_devices(
    storage: &Storage,
    dir: &Path,
    settings: &Settings,
    own: &Identity,
    node: &Node,
) -> Result<(BTreeMap<DeviceId, Arc<dyn Disk>>, Disks), ClusterError> {
    let (mut opened, mut disks) = (BTreeMap::new(), Disks::default());
    for path in settings.device_paths(dir) {
        match open_device(storage, dir, &path, own, node).await {
            Ok((device, disk)) => {
                opened.insert(device, disk);
                disks.served.insert(path, device);
            }
            Err(foreign @ ClusterError::Foreign { .. }) => return Err(foreign),
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "a device cannot be opened: the node runs without it");
                let may_appear = matches!(error, ClusterError::Io { .. });
                disks.unopened.insert(path, Unopened { why: error.to_string(), may_appear });
            }
        }
    }
    Ok((opened, disks))
}

async fn open_device(
    storage: &Storage,
    dir: &Path,
    path: &Path,
    own: &Identity,
    node: &Node,
) -> Result<(DeviceId, Arc<dyn Disk>), ClusterError> {
    let disk = storage.open_disk(path, None).await?;
    match refuse_foreign(&disk, path, own).await? {
        Some(identity) => serve(storage, dir, own, node, (identity.device, disk)).await,
        None => Err(ClusterError::Invalid(format!(
            "{} is no device, or both of its superblocks are damaged: see `xsan debug device`",
            path.display()
        ))),
    }
}

async fn serve(
    storage: &Storage,
    dir: &Path,
    own: &Identity,
    node: &Node,
    (device, disk): (DeviceId, Arc<dyn Disk>),
) -> Result<(DeviceId, Arc<dyn Disk>), ClusterError> {
    // By its id, because disks come and go.
    let opened = (disk, dir.join(format!("index-{device}")));
    let device = storage.add_device(node, &own.node.to_string(), &opened).await?;
    Ok((device, opened.0))
}

/// Another node's device is not served, even of the same cluster: that node may be about to return with it, or with a copy.
async fn refuse_foreign(
    disk: &Arc<dyn Disk>,
    path: &Path,
    own: &Identity,
) -> Result<Option<DeviceIdentity>, ClusterError> {
    let found = Node::identify(disk).await.map_err(ClusterError::io(format!("cannot read {}", path.display())))?;
    let Some((found, _)) = found else { return Ok(None) };
    let owner = match found {
        DeviceIdentity { cluster, .. } if cluster != own.cluster => format!("another cluster ({cluster})"),
        DeviceIdentity { node, .. } if node != own.node => format!("another node ({node})"),
        _ => return Ok(Some(found)),
    };
    Err(ClusterError::Foreign { path: path.to_owned(), owner })
}

/// A disk that holds anything is not touched.
pub(super) async fn refuse_used(buffers: &BufPool, disk: &Arc<dyn Disk>, path: &Path) -> Result<(), ClusterError> {
    let bytes = usize::try_from(disk.geometry().bytes).unwrap_or(usize::MAX).min(BLANK_BYTES);
    let read = disk.read(0, buffers.get(bytes)).await;
    let read = read.map_err(ClusterError::io(format!("cannot read {}", path.display())))?;
    if read.iter().any(|byte| *byte != 0) {
        return Err(ClusterError::Used(path.to_owned()));
    }
    Ok(())
}

/// Disks under watch.
#[derive(Default)]
pub(super) struct Probes(BTreeMap<DeviceId, (Arc<DiskProbe>, TaskHandle)>);

impl Probes {
    /// Watches one more.
    pub(super) fn watch(&mut self, env: &Env, buffers: &BufPool, device: DeviceId, disk: &Arc<dyn Disk>) {
        let probe = Arc::new(DiskProbe::new(env, buffers, disk));
        let task = env.spawn("disk probe", probe::run(Arc::clone(&probe)));
        self.0.insert(device, (probe, task));
    }

    fn forget(&mut self, device: DeviceId) {
        if let Some((_, task)) = self.0.remove(&device) {
            task.abort();
        }
    }

    /// Ends all watching.
    pub(super) fn end(&mut self) {
        std::mem::take(&mut self.0).into_values().for_each(|(_, task)| task.abort());
    }

    /// Age of the oldest request that is out.
    pub(super) fn silent_for(&self) -> Duration {
        self.0.values().map(|(probe, _)| probe.silent_for()).max().unwrap_or_default()
    }
}

/// Looks for disks of the settings that were not there at the start, until all have appeared.
pub(super) async fn look_for_disks(host: Arc<Host>) {
    while !host.awaited().is_empty() {
        host.env().sleep(LOOK_EVERY).await;
        host.serve_appeared().await;
    }
}

impl Host {
    /// Makes a blank disk of this host a device. Asked for again after it was cut short, it goes on.
    ///
    /// # Errors
    /// The disk holds something, is of another node or cluster, or cannot be read.
    pub async fn add_device(&self, path: &Path) -> Result<DeviceId, ClusterError> {
        let path = std::path::absolute(path).map_err(ClusterError::io("device"))?;
        // One at a time: the settings are read, changed and written.
        let _changing = self.changing_devices.lock().await;
        let file = self.dir().join(settings::FILE);
        let mut changed = Settings::read(&file)?;
        let mut paths = changed.device_paths(self.dir());
        if paths.contains(&path) {
            return self.add_again(&path).await;
        }
        let disk = self.storage().open_disk(&path, None).await?;
        let device = self.claim(&disk, &path).await?;
        paths.push(path.clone());
        let before = changed.devices.replace(paths);
        changed.write(&file)?;
        let index = self.dir().join(format!("index-{device}"));
        let opened = (Arc::clone(&disk), index);
        if let Err(error) = self.storage().add_device(self.node(), &self.settings().name, &opened).await {
            changed.devices = before;
            changed.write(&file)?;
            return Err(error);
        }
        self.note_served_disk(&path, device);
        self.watch(device, &disk);
        tracing::info!(%device, path = %path.display(), "a device was added");
        self.make_known(device).await
    }

    /// A device that is in the settings: one that is back, or a new disk where one was lost; what was cut short before the cluster knew
    /// it goes on.
    async fn add_again(&self, path: &Path) -> Result<DeviceId, ClusterError> {
        let served = self.disks.lock().unwrap_or_else(PoisonError::into_inner).served.get(path).copied();
        if let Some(device) = served {
            return match self.view().devices.contains_key(&device) {
                true => Err(ClusterError::Invalid(format!("{} is a device of this node already", path.display()))),
                false => self.make_known(device).await,
            };
        }
        let disk = self.storage().open_disk(path, None).await?;
        let device = match refuse_foreign(&disk, path, self.identity()).await? {
            Some(known) => known.device,
            None => self.claim(&disk, path).await?,
        };
        self.serve_again(path, device, disk).await?;
        if self.view().devices.contains_key(&device) { Ok(device) } else { self.make_known(device).await }
    }

    async fn serve_again(&self, path: &Path, device: DeviceId, disk: Arc<dyn Disk>) -> Result<(), ClusterError> {
        if self.view().is_given_up(device) {
            return Err(MetaError::DeviceLost(device).into());
        }
        let (_, disk) = serve(self.storage(), self.dir(), self.identity(), self.node(), (device, disk)).await?;
        self.note_served_disk(path, device);
        self.watch(device, &disk);
        tracing::info!(%device, path = %path.display(), "a device is served again");
        self.map_changed.notify_one();
        Ok(())
    }

    /// Disks of the settings that were not there when they were looked for.
    fn awaited(&self) -> Vec<PathBuf> {
        let disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        disks.unopened.iter().filter(|(_, disk)| disk.may_appear).map(|(path, _)| path.clone()).collect()
    }

    /// Serves those that are there now. Never one that is blank, or that is another node's.
    async fn serve_appeared(&self) {
        let _changing = self.changing_devices.lock().await;
        for path in self.awaited() {
            let Ok(disk) = self.storage().open_disk(&path, None).await else { continue };
            let outcome = match refuse_foreign(&disk, &path, self.identity()).await {
                Ok(Some(found)) => self.serve_again(&path, found.device, disk).await,
                Ok(None) => Err(ClusterError::Invalid(format!("{} is no device of this node", path.display()))),
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                tracing::warn!(path = %path.display(), %error, "a disk that has appeared is not served");
                let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
                // Not again before somebody says so.
                disks.unopened.insert(path, Unopened { why: error.to_string(), may_appear: false });
            }
        }
    }

    async fn make_known(&self, device: DeviceId) -> Result<DeviceId, ClusterError> {
        let mut own = self.node().devices().await.unwrap_or_default().into_iter();
        let status = own.find(|status| status.device == device).ok_or(NodeError::NotFound);
        let capacity = status.map_err(|error| ClusterError::Invalid(format!("device {device}: {error}")))?.capacity;
        self.propose(Command::AddDevice { device, node: self.node_id(), capacity }).await?;
        Ok(device)
    }

    /// Formats a blank disk; one that this node formatted before and never used is taken as it is.
    async fn claim(&self, disk: &Arc<dyn Disk>, path: &Path) -> Result<DeviceId, ClusterError> {
        let found = Node::identify(disk).await;
        let found = found.map_err(ClusterError::io(format!("cannot read {}", path.display())))?;
        let (cluster, node) = (self.identity().cluster, self.node_id());
        match found {
            Some((known, _)) if known.cluster != cluster => Err(ClusterError::Invalid(format!(
                "{} is a device of another cluster ({}): wipe it first if its data is not wanted any more",
                path.display(),
                known.cluster
            ))),
            Some((known, is_new)) if known.node != node || !is_new => Err(ClusterError::Used(path.to_owned())),
            Some((known, _)) => Ok(known.device),
            None => {
                refuse_used(self.buffers(), disk, path).await?;
                let device = DeviceId(self.env().random_u128());
                self.storage().format(disk, DeviceIdentity { cluster, node, device }).await?;
                Ok(device)
            }
        }
    }

    /// Lets devices go that the metadata knew and does not know any more, or that were given up.
    pub(super) fn forget_devices(self: &Arc<Self>, view: &MetaState, known: &mut BTreeSet<DeviceId>) {
        let own = view.devices_of(self.node_id()).map(|device| device.id);
        let own: Vec<DeviceId> = own.filter(|device| !view.is_given_up(*device)).collect();
        let is_gone = |device: &&DeviceId| !own.contains(device);
        let gone: Vec<DeviceId> = known.iter().filter(is_gone).copied().collect();
        known.extend(own);
        for device in gone {
            known.remove(&device);
            let host = Arc::clone(self);
            // Its disk may hang.
            drop(self.env().spawn("removed device", async move {
                if let Err(error) = host.forget_device(device).await {
                    tracing::error!(%device, %error, "a removed device is still in the settings of this node");
                }
            }));
        }
    }

    async fn forget_device(&self, device: DeviceId) -> Result<(), ClusterError> {
        let _changing = self.changing_devices.lock().await;
        self.node().remove_device(device).await;
        self.probes.lock().unwrap_or_else(PoisonError::into_inner).forget(device);
        let file = self.dir().join(settings::FILE);
        let mut changed = Settings::read(&file)?;
        let mut paths = changed.device_paths(self.dir());
        let path = match self.path_of(device) {
            Some(path) => path,
            // Another disk has its place already.
            None if self.unopened().is_empty() => return Ok(()),
            None => {
                return Err(ClusterError::Invalid(format!(
                    "no disk of {} is known to be device {device}: remove its line by hand",
                    file.display()
                )));
            }
        };
        paths.retain(|kept| *kept != path);
        changed.devices = Some(paths);
        changed.write(&file)?;
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        disks.served.remove(&path);
        disks.unopened.remove(&path);
        tracing::info!(%device, "a device was removed; its disk may be wiped and taken out");
        Ok(())
    }

    fn note_served_disk(&self, path: &Path, device: DeviceId) {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        disks.unopened.remove(path);
        disks.served.insert(path.to_owned(), device);
    }

    /// Where a device's disk is or was. Of one that cannot be opened that is known if no other one is missing.
    fn path_of(&self, device: DeviceId) -> Option<PathBuf> {
        let disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((path, _)) = disks.served.iter().find(|(_, served)| **served == device) {
            return Some(path.clone());
        }
        let view = self.view();
        let mut missing = view.devices_of(self.node_id()).filter(|other| !self.node().has_device(other.id));
        match disks.unopened.len() {
            1 if !missing.any(|other| other.id != device) => disks.unopened.keys().next().cloned(),
            _ => None,
        }
    }

    /// Disks of its settings that cannot be served, and why.
    #[must_use]
    pub fn unopened(&self) -> BTreeMap<PathBuf, String> {
        let disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        disks.unopened.iter().map(|(path, disk)| (path.clone(), disk.why.clone())).collect()
    }

    fn watch(&self, device: DeviceId, disk: &Arc<dyn Disk>) {
        self.probes.lock().unwrap_or_else(PoisonError::into_inner).watch(self.env(), self.buffers(), device, disk);
    }

    /// Watches the disks that the node was opened with.
    pub(super) fn watch_all(&self, disks: &BTreeMap<DeviceId, Arc<dyn Disk>>) {
        disks.iter().for_each(|(device, disk)| self.watch(*device, disk));
    }
}
