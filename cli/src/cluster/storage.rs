//! A storage node's devices: made, opened, with their shard indexes. The same for a node of `xsan dev` and a host's daemon.

use crate::error::ClusterError;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use xsan_env::os_disk::{DiskOptions, IoDriver};
use xsan_env::{BufPool, Disk, Env};
use xsan_node::{DeviceHandle, DeviceIdentity, FjallIndex, Node, NodeConfig, NodeOpenError};
use xsan_types::{ClusterId, DeviceId, NodeId};

/// Smallest device that is made without being asked for.
const DEVICE_BYTES_MIN: u64 = 1 << 30;

/// A device's disk, and the directory of its index.
pub(super) type OpenDisk = (Arc<dyn Disk>, PathBuf);

/// What opens devices.
pub struct Storage {
    env: Env,
    driver: IoDriver,
    buffers: BufPool,
}

impl Storage {
    /// Devices are reached through `driver`, with memory from `buffers`.
    #[must_use]
    pub fn new(env: &Env, driver: IoDriver, buffers: &BufPool) -> Self {
        Self { env: env.clone(), driver, buffers: buffers.clone() }
    }

    /// `uring` or `threads`.
    #[must_use]
    pub fn backend(&self) -> &'static str {
        self.driver.backend()
    }

    /// Opens a disk; a file of `create_bytes` is made if there is none.
    ///
    /// # Errors
    /// Those of the operating system.
    pub async fn open_disk(&self, path: &Path, create_bytes: Option<u64>) -> Result<Arc<dyn Disk>, ClusterError> {
        let what = format!("cannot open {}", path.display());
        let options = DiskOptions { path: path.to_owned(), create_bytes };
        self.driver.open_disk(options).await.map_err(ClusterError::io(what))
    }

    /// Makes a new disk a device of the cluster.
    ///
    /// # Errors
    /// It is too small, or a device already.
    pub async fn format(&self, disk: &Arc<dyn Disk>, identity: DeviceIdentity) -> Result<(), ClusterError> {
        Node::format(&self.env, disk, identity)
            .await
            .map_err(|error| ClusterError::Node { node: identity.node.to_string(), reason: error.to_string() })
    }

    /// Opens a node that has no device yet.
    ///
    /// # Errors
    /// None that is known.
    pub async fn open_node(&self, cluster: ClusterId, id: NodeId) -> Result<Arc<Node>, ClusterError> {
        let node = Node::open(&self.env, NodeConfig::new(cluster, id, self.buffers.clone()), Vec::new()).await;
        node.map_err(|error| ClusterError::Node { node: id.to_string(), reason: error.to_string() })
    }

    /// Opens a device of a node. A shard index is a view of its device: a damaged one is set aside and filled again.
    ///
    /// # Errors
    /// The device is of another cluster, damaged, or cannot be read.
    pub(super) async fn add_device(&self, node: &Node, name: &str, disk: &OpenDisk) -> Result<DeviceId, ClusterError> {
        let opened = match self.open_device(node, disk).await {
            Err(error) if error.blames_index() => {
                let (_, index) = disk;
                let aside = index.with_extension(format!("damaged-{}", self.env.wall_millis()));
                tracing::warn!(
                    node = name, %error, aside = %aside.display(),
                    "the shard index is damaged: it is set aside and made anew from the device"
                );
                let from = index.clone();
                let moved = self.env.blocking(move || std::fs::rename(from, aside)).await;
                moved.map_err(ClusterError::io(format!("cannot set {} aside", index.display())))?;
                self.open_device(node, disk).await
            }
            opened => opened,
        };
        opened.map_err(|error| ClusterError::Node { node: name.to_owned(), reason: error.to_string() })
    }

    async fn open_device(&self, node: &Node, (disk, index): &OpenDisk) -> Result<DeviceId, NodeOpenError> {
        let index = FjallIndex::open(&self.env, index.clone()).await?;
        node.add_device(DeviceHandle { disk: Arc::clone(disk), index: Box::new(index) }).await
    }
}

/// Bytes of a device file that is made without a size: one of `of` shares of most of the space that is free below `dir`.
///
/// # Errors
/// Those of the operating system.
pub fn share_of_space(dir: &Path, of: usize) -> Result<u64, ClusterError> {
    let free = xsan_env::file::free_bytes(dir).map_err(ClusterError::io("cannot see the free space"))?;
    Ok((free / 10 * 8 / of as u64).max(DEVICE_BYTES_MIN) / (1 << 20) * (1 << 20))
}

/// How long a lock is waited for: a process that was just killed holds it until the kernel has ended its disk requests.
const LOCK_FOR: Duration = Duration::from_secs(3);
const LOCK_AGAIN: Duration = Duration::from_millis(50);

/// Makes a directory and locks it for this process.
///
/// # Errors
/// `Busy`: another process has it.
pub async fn lock_directory(env: &Env, dir: &Path) -> Result<std::fs::File, ClusterError> {
    let until = env.now().after(LOCK_FOR);
    loop {
        let path = dir.to_owned();
        match env.blocking(move || try_lock(&path)).await {
            Ok(lock) => return Ok(lock),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if env.now() >= until {
                    return Err(ClusterError::Busy(dir.to_owned()));
                }
                env.sleep(LOCK_AGAIN).await;
            }
            Err(source) => return Err(ClusterError::Io { what: format!("cannot use {}", dir.display()), source }),
        }
    }
}

fn try_lock(dir: &Path) -> std::io::Result<std::fs::File> {
    std::fs::create_dir_all(dir)?;
    let lock = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(dir.join("lock"))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => Err(std::io::ErrorKind::WouldBlock.into()),
        Err(std::fs::TryLockError::Error(error)) => Err(error),
    }
}
