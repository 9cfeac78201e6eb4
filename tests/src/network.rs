//! A network of hosts: a namespace each, all on one bridge, and ways to lose what is sent on it.

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

/// A hardware address that nobody has: what is sent there reaches nobody, and nobody is told.
const NOBODY: &str = "02:00:00:00:00:fe";

static NUMBER: AtomicU64 = AtomicU64::new(0);

/// Namespaces of its own, which go with it. Hosts are counted from 1.
#[derive(Debug)]
pub struct Network {
    prefix: String,
    hosts: usize,
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output().map_err(|error| format!("ip: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}

impl Network {
    /// `hosts` hosts that reach each other.
    ///
    /// # Errors
    /// This process may not make namespaces, or there is no `ip`.
    pub fn new(hosts: usize) -> Result<Self, String> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Names of interfaces are short.
        let network = Self { prefix: format!("xt{}n{number}", std::process::id()), hosts };
        let switch = network.switch();
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "br0", "up"])?;
        for host in 1..=hosts {
            let (space, port) = (network.space(host), format!("p{host}"));
            let address = format!("{}/24", network.address(host));
            ip(&["netns", "add", &space])?;
            ip(&["-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &space])?;
            ip(&["-n", &switch, "link", "set", &port, "master", "br0", "up"])?;
            ip(&["-n", &space, "addr", "add", &address, "dev", "eth0"])?;
            ip(&["-n", &space, "link", "set", "eth0", "up"])?;
            ip(&["-n", &space, "link", "set", "lo", "up"])?;
        }
        Ok(network)
    }

    fn switch(&self) -> String {
        format!("{}-sw", self.prefix)
    }

    fn space(&self, host: usize) -> String {
        format!("{}-h{host}", self.prefix)
    }

    /// Hosts.
    #[must_use]
    pub fn hosts(&self) -> usize {
        self.hosts
    }

    /// A host's address.
    #[must_use]
    pub fn address(&self, host: usize) -> String {
        format!("10.77.0.{host}")
    }

    /// The addresses that a host's network interface has now.
    #[must_use]
    pub fn addresses(&self, host: usize) -> Vec<String> {
        let output = Command::new("ip").args(["-n", &self.space(host), "-o", "addr", "show", "dev", "eth0"]).output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        // Number, name, family, address with its prefix.
        let address = |line: &str| Some(line.split_whitespace().nth(3)?.split('/').next()?.to_owned());
        text.lines().filter_map(address).collect()
    }

    /// A command that runs on a host; its arguments are still to be added.
    #[must_use]
    pub fn on(&self, host: usize, program: &std::path::Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.space(host)]).arg(program);
        command
    }

    /// What `from` sends to `to` is lost from now on; the other direction is left as it is.
    ///
    /// # Panics
    /// The system refuses.
    pub fn cut(&self, from: usize, to: usize) {
        let (space, address) = (self.space(from), self.address(to));
        let lost =
            ip(&["-n", &space, "neigh", "replace", &address, "lladdr", NOBODY, "dev", "eth0", "nud", "permanent"]);
        lost.expect("a neighbour that is nobody");
    }

    /// Nothing passes between two groups any more.
    pub fn split(&self, one: &[usize], other: &[usize]) {
        for &a in one {
            for &b in other {
                self.cut(a, b);
                self.cut(b, a);
            }
        }
    }

    /// All reach each other again.
    pub fn heal(&self) {
        for from in 1..=self.hosts {
            for to in (1..=self.hosts).filter(|&to| to != from) {
                // Nothing to delete where nothing was cut.
                drop(ip(&["-n", &self.space(from), "neigh", "del", &self.address(to), "dev", "eth0"]));
            }
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for space in (1..=self.hosts).map(|host| self.space(host)).chain([self.switch()]) {
            // Interfaces go with their namespaces.
            drop(ip(&["netns", "del", &space]));
        }
    }
}
