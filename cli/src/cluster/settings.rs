//! `xsan.toml`: what a host's daemon is told. Nothing in it is a secret.

use crate::error::ClusterError;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Port of the nodes, if none is named.
pub const NODE_PORT: u16 = 7400;
/// Name of the file in a node's directory.
pub const FILE: &str = "xsan.toml";

/// A host's settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The node's name.
    pub name: String,
    /// The machine's name: nodes of one machine fail together.
    pub host: String,
    /// The machine's rack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rack: Option<String>,
    /// The rack's zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Where nodes are listened for.
    pub listen: SocketAddr,
    /// Where other nodes reach this one, `host:port`.
    pub address: String,
    /// Where NBD is served over TCP; on the unix socket `nbd.sock` in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd: Option<SocketAddr>,
    /// The interface that service addresses are put on, if their volume names none; by default the one in their subnet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_interface: Option<String>,
    /// Mode of the NBD socket, octal.
    #[serde(default = "default_socket_mode")]
    pub socket_mode: String,
    /// Group of the NBD socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_group: Option<String>,
    /// Block devices or files for data; not named: `device.img` in the node's directory. An empty list: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<PathBuf>>,
    /// Threads that serve I/O.
    #[serde(default = "default_workers")]
    pub workers: usize,
}

fn default_socket_mode() -> String {
    "660".into()
}

fn default_workers() -> usize {
    1
}

impl Settings {
    /// Those of `path`, with everything checked that can be checked without the system.
    ///
    /// # Errors
    /// The file cannot be read; what in it is wrong.
    pub fn read(path: &Path) -> Result<Self, ClusterError> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(ClusterError::io(format!("cannot read {}", path.display())))?;
        let wrong = |reason: &dyn std::fmt::Display| ClusterError::Invalid(format!("{}: {reason}", path.display()));
        let settings: Self = toml::from_str(&text).map_err(|error| wrong(&error))?;
        settings.mode().map_err(|error| wrong(&error))?;
        Ok(settings)
    }

    /// Writes them to `path`.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write(&self, path: &Path) -> Result<(), ClusterError> {
        let text = toml::to_string(self).map_err(|error| ClusterError::Invalid(error.to_string()))?;
        let text = format!("# Settings of this node; read when it starts.\n{text}");
        replace(path, text.as_bytes()).map_err(ClusterError::io(format!("cannot write {}", path.display())))
    }

    /// Mode of the NBD socket.
    ///
    /// # Errors
    /// Not an octal mode.
    pub fn mode(&self) -> Result<u32, ClusterError> {
        let mode = u32::from_str_radix(&self.socket_mode, 8).ok().filter(|mode| *mode <= 0o777);
        mode.ok_or_else(|| ClusterError::Invalid(format!("socket_mode {:?} is no octal mode", self.socket_mode)))
    }

    /// The devices of a node in `dir`.
    #[must_use]
    pub fn device_paths(&self, dir: &Path) -> Vec<PathBuf> {
        self.devices.clone().unwrap_or_else(|| vec![dir.join("device.img")])
    }
}

/// A loss of power leaves the old content or the new one: without its devices a node would be another one.
fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let new = path.with_extension("toml.new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    match path.parent() {
        Some(dir) => std::fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_back_and_mistakes_are_named() {
        let dir = tempdir();
        let path = dir.join(FILE);
        let settings = Settings {
            name: "n1".into(),
            host: "h1".into(),
            rack: Some("r1".into()),
            zone: None,
            listen: "127.0.0.1:7400".parse().expect("an address"),
            address: "h1:7400".into(),
            nbd: None,
            service_interface: Some("eth1".into()),
            socket_mode: "660".into(),
            socket_group: None,
            devices: Some(vec!["/dev/sdb".into()]),
            workers: 2,
        };
        settings.write(&path).expect("written");
        assert_eq!(Settings::read(&path).expect("read"), settings);
        let text = std::fs::read_to_string(&path).expect("there");
        for (wrong, told) in [("listten = 1\n", "listten"), ("socket_mode = \"999\"\n", "socket_mode")] {
            let text = if wrong.contains("mode") {
                text.replace("socket_mode = \"660\"\n", wrong)
            } else {
                format!("{wrong}{text}")
            };
            std::fs::write(&path, text).expect("written");
            let error = Settings::read(&path).expect_err("refused").to_string();
            assert!(error.contains(told) && error.contains(FILE), "{error}");
        }
        std::fs::remove_dir_all(dir).expect("removed");
    }

    fn tempdir() -> PathBuf {
        let dir = std::env::temp_dir().join(format!("xsan-settings-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("made");
        dir
    }
}
