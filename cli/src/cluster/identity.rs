//! Who a node is: cluster, id, certificate and key, in `identity.json` of its directory. A node without it is no member.

use crate::error::ClusterError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use xsan_env::Env;
use xsan_types::{ClusterId, NodeId};
use xsan_wire::Tls;

/// Name of the file in a node's directory.
pub const FILE: &str = "identity.json";

/// A member's identity. The key never leaves the host.
#[derive(Clone, Serialize, Deserialize)]
pub struct Identity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
    /// PEM of the cluster's CA certificate.
    pub authority: String,
    /// PEM of the node's certificate.
    pub certificate: String,
    /// PEM of the node's private key.
    pub key: String,
    /// Where nodes were when this one joined; the metadata knows better as soon as it is there.
    pub peers: BTreeMap<NodeId, String>,
}

impl Identity {
    /// The identity in `dir`; `None`: it is of no member.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(dir: &Path) -> Result<Option<Self>, ClusterError> {
        let path = dir.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ClusterError::io(format!("cannot read {}", path.display()))(error)),
        };
        let identity = serde_json::from_slice(&text);
        identity.map(Some).map_err(|error| ClusterError::Invalid(format!("{}: {error}", path.display())))
    }

    /// Makes the node of `dir` a member, durably.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write(&self, dir: &Path) -> Result<(), ClusterError> {
        write_secret(&dir.join(FILE), &serde_json::to_vec_pretty(self).unwrap_or_default())
    }

    /// Its TLS.
    ///
    /// # Errors
    /// The certificates do not belong together.
    pub fn tls(&self, env: &Env) -> Result<Arc<Tls>, ClusterError> {
        Tls::new(env, self.cluster, &self.authority, &self.certificate, &self.key)
            .map_err(|error| ClusterError::Invalid(format!("{FILE}: {error}")))
    }
}

/// Replaces a file that only its owner may read, durably.
///
/// # Errors
/// The operating system's.
pub fn write_secret(path: &Path, bytes: &[u8]) -> Result<(), ClusterError> {
    let new = path.with_extension("new");
    let write = || {
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        let dir = path.parent().unwrap_or(Path::new("."));
        std::fs::File::open(dir)?.sync_all()
    };
    write().map_err(ClusterError::io(format!("cannot write {}", path.display())))
}
