//! A cluster of processes, one per node, that can be killed, frozen and started again one by one.

use crate::cluster::{Cluster, Guest, Outcome, connect, outcome, program};
use crate::machine::Machine;
use crate::network::Network;
use crate::random::Random;
use crate::wait::eventually;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use xsan_gateway::client::ClientError;

/// How long all nodes may take to be up.
const UP_SECONDS: u64 = 60;

/// `xsan dev --processes` in a directory of its own. Nodes are counted from 1.
pub struct Hosts {
    cluster: Cluster,
    /// Processes that were started here: in place of some that had ended, or on hosts of a network.
    restarted: BTreeMap<usize, Child>,
    network: Option<Network>,
    /// By node, if faults of the machine are made.
    machines: BTreeMap<usize, Machine>,
}

impl Hosts {
    /// `nodes` nodes of 2 GiB, all up, with their default pool.
    #[must_use]
    pub fn started(nodes: usize) -> Self {
        let nodes = nodes.to_string();
        let mut hosts = Self {
            cluster: Cluster::new(&["--processes", "--nodes", &nodes, "--device-size", "2GiB"]),
            restarted: BTreeMap::new(),
            network: None,
            machines: BTreeMap::new(),
        };
        hosts.start();
        hosts
    }

    /// As [`Hosts::started`], of processes that break a rule of the protocol.
    #[must_use]
    pub fn with_broken_rule(nodes: usize, rule: &'static str) -> Self {
        let nodes = nodes.to_string();
        let mut cluster = Cluster::new(&["--processes", "--nodes", &nodes, "--device-size", "2GiB"]);
        cluster.break_rule(rule);
        let mut hosts = Self { cluster, restarted: BTreeMap::new(), network: None, machines: BTreeMap::new() };
        hosts.start();
        hosts
    }

    /// As [`Hosts::with_broken_rule`] (`none`: none of them), on machines whose faults are made, with clocks that differ.
    #[must_use]
    pub fn on_machines(nodes: usize, rule: &'static str, random: &mut Random) -> Self {
        let mut hosts = Self::with_broken_rule(nodes, rule);
        // Made by one process on the real machine; from now on each has its own.
        hosts.stop();
        for node in 1..=nodes {
            let dir = hosts.cluster.dir().join(format!("machine{node}"));
            hosts.machines.insert(node, Machine::new(dir, random.fork()));
            hosts.restart(node);
        }
        hosts.wait_until_whole(1, UP_SECONDS);
        hosts
    }

    /// A cluster whose nodes are on hosts of a network of their own, made with the commands of a person, with a pool of `scheme`.
    ///
    /// # Errors
    /// Namespaces cannot be made here.
    ///
    /// # Panics
    /// A command failed.
    pub fn in_network(nodes: usize, scheme: &str) -> Result<Self, String> {
        Self::in_network_with(nodes, 0, scheme)
    }

    /// As [`Hosts::in_network`], with `others` more hosts on the network that are no nodes.
    ///
    /// # Errors
    /// Namespaces cannot be made here.
    ///
    /// # Panics
    /// A command failed.
    pub fn in_network_with(nodes: usize, others: usize, scheme: &str) -> Result<Self, String> {
        let network = Network::new(nodes + others)?;
        let mut hosts = Self {
            cluster: Cluster::new(&["--processes"]),
            restarted: BTreeMap::new(),
            network: Some(network),
            machines: BTreeMap::new(),
        };
        let mut token = String::new();
        for node in 1..=nodes {
            let made = hosts.make(node, &token);
            assert_eq!(made.code, 0, "n{node}: {made:?}");
            if node == 1 {
                token = made.json()["token"].as_str().expect("a token").to_owned();
            }
            hosts.restart(node);
            hosts.wait_until_up(1, node);
        }
        hosts.ok(1, &["pool", "create", "--ec", scheme]);
        hosts.wait_until_whole(1, UP_SECONDS);
        Ok(hosts)
    }

    fn make(&self, node: usize, token: &str) -> Outcome {
        let network = self.network();
        let (first, address) = (format!("{}:7400", network.address(1)), format!("{}:7400", network.address(node)));
        let mut command = network.on(node, &program());
        command.args(["--output", "json"]);
        match node {
            1 => command.args(["cluster", "init"]),
            _ => command.args(["node", "join", token, "--peer", &first]),
        };
        let (name, host) = (format!("n{node}"), format!("h{node}"));
        command.args(["--name", &name, "--host", &host, "--address", &address, "--dir"]).arg(self.dir(node));
        outcome(command.args(["--device-size", "2GiB", "--no-start"]))
    }

    /// What is between the hosts.
    ///
    /// # Panics
    /// They are processes of one host.
    #[must_use]
    pub fn network(&self) -> &Network {
        self.network.as_ref().expect("made in a network")
    }

    /// What is below a host.
    ///
    /// # Panics
    /// It is the real machine.
    pub fn machine(&mut self, node: usize) -> &mut Machine {
        self.machines.get_mut(&node).expect("faults of the machine are made")
    }

    /// All machines are well.
    pub fn heal_machines(&self) {
        self.machines.values().for_each(Machine::heal);
    }

    /// Number of nodes.
    #[must_use]
    pub fn count(&self) -> usize {
        (1..).take_while(|&node| self.dir(node).exists()).count()
    }

    fn wait_until_up(&self, at: usize, node: usize) {
        eventually(UP_SECONDS, "a node is up", || match self.state(at, node) {
            state if state == "up" => Ok(()),
            state => Err(format!("n{node}: {state}")),
        });
    }

    /// Starts all processes.
    pub fn start(&mut self) {
        if self.network.is_some() || !self.machines.is_empty() {
            (1..=self.count()).for_each(|node| self.restart(node));
        } else {
            self.cluster.start();
        }
        self.wait_until_whole(1, UP_SECONDS);
    }

    /// SIGTERM to all of them.
    pub fn stop(&mut self) {
        let restarted: Vec<usize> = self.restarted.keys().copied().collect();
        for node in restarted {
            self.signal(node, "TERM");
            let mut child = self.restarted.remove(&node).expect("listed");
            eventually(30, "a node ends after SIGTERM", || match child.try_wait() {
                Ok(Some(_)) => Ok(()),
                other => Err(format!("{other:?}")),
            });
        }
        if self.cluster.is_started() {
            self.cluster.stop();
        }
    }

    /// SIGKILL to all of them at once.
    pub fn kill_all(&mut self) {
        let nodes = (1..).take_while(|&node| self.dir(node).exists());
        let nodes: Vec<usize> = nodes.filter(|&node| self.pid(node).is_some()).collect();
        for node in nodes {
            self.kill(node);
        }
        if self.cluster.is_started() {
            self.cluster.kill();
        }
    }

    /// A node's directory.
    #[must_use]
    pub fn dir(&self, node: usize) -> PathBuf {
        self.cluster.dir().join(format!("n{node}"))
    }

    /// The process of a node, if it runs.
    #[must_use]
    pub fn pid(&self, node: usize) -> Option<u32> {
        let pid = std::fs::read_to_string(self.dir(node).join("pid")).ok()?.trim().parse().ok()?;
        // The number may be another process's by now.
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let config = self.dir(node).join("xsan.toml");
        String::from_utf8_lossy(&command).contains(&*config.to_string_lossy()).then_some(pid)
    }

    /// Sends a signal to a node's process.
    ///
    /// # Panics
    /// It does not run.
    pub fn signal(&self, node: usize, signal: &str) {
        let pid = self.pid(node).unwrap_or_else(|| panic!("n{node} runs"));
        let sent = Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "SIG{signal} to n{node}");
    }

    /// SIGKILL; returns when the process is gone.
    pub fn kill(&mut self, node: usize) {
        self.signal(node, "KILL");
        self.reap(node);
    }

    /// SIGKILL to all that run, before the first is waited for.
    pub fn kill_at_once(&mut self) {
        let nodes: Vec<usize> = (1..=self.count()).filter(|&node| self.runs(node)).collect();
        let pids: Vec<String> = nodes.iter().filter_map(|&node| self.pid(node)).map(|pid| pid.to_string()).collect();
        let sent = Command::new("kill").arg("-KILL").args(&pids).status();
        assert!(sent.is_ok_and(|status| status.success()), "SIGKILL to {pids:?}");
        nodes.into_iter().for_each(|node| self.reap(node));
    }

    /// A killed node's directory is lost with its disks. It joins again under its old name, as soon as the others call it down.
    ///
    /// # Panics
    /// They do not let it in.
    pub fn wipe(&mut self, node: usize) {
        let other = (1..=self.count()).find(|&other| other != node && self.runs(other)).expect("others run");
        let (listen, peer) = (self.setting(node, "listen"), self.setting(other, "address"));
        let dir = self.dir(node);
        let path = dir.to_string_lossy().into_owned();
        for entry in std::fs::read_dir(&dir).expect("a node's directory").flatten() {
            // The log of the test stays.
            if entry.file_name() != "xsan.log" {
                let path = entry.path();
                let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
                removed.expect("wiped");
            }
        }
        self.machine(node).forget_disks();
        let name = format!("n{node}");
        let mut token = None;
        eventually(UP_SECONDS, "a wiped host is let in under its old name", || {
            if token.is_none() {
                let made = self.run(other, &["cluster", "token"]);
                if made.code != 0 {
                    return Err(made.stderr);
                }
                token = made.json()["token"].as_str().map(str::to_owned);
            }
            let token = token.as_deref().expect("a token");
            let place =
                ["--dir", &path, "--name", &name, "--host", "localhost", "--listen", &listen, "--address", &listen];
            let how = ["--device-size", "2GiB", "--replace", "--no-start"];
            let joined = self.run(other, &[&["node", "join", token, "--peer", &peer][..], &place, &how].concat());
            if joined.code == 0 { Ok(()) } else { Err(joined.stderr) }
        });
        self.restart(node);
    }

    /// A setting of a node.
    ///
    /// # Panics
    /// There is none.
    #[must_use]
    pub fn setting(&self, node: usize, name: &str) -> String {
        let text = std::fs::read_to_string(self.dir(node).join("xsan.toml")).expect("settings");
        let value = text.lines().find_map(|line| line.strip_prefix(&format!("{name} = \"")));
        value.unwrap_or_else(|| panic!("{name} in {text}")).trim_end_matches('"').to_owned()
    }

    /// Whether a node's process runs.
    #[must_use]
    pub fn runs(&self, node: usize) -> bool {
        self.pid(node).is_some()
    }

    /// Whether there is a network between the nodes.
    #[must_use]
    pub fn has_network(&self) -> bool {
        self.network.is_some()
    }

    /// Waits for the end of a node that was sent a signal.
    pub fn reap(&mut self, node: usize) {
        if let Some(mut child) = self.restarted.remove(&node) {
            // The end that was asked for.
            let _ = child.wait();
        }
        eventually(10, "a killed node is gone", || match self.pid(node) {
            None => Ok(()),
            Some(pid) => Err(format!("process {pid}")),
        });
    }

    /// Starts a node that has ended, as systemd would.
    pub fn restart(&mut self, node: usize) {
        let mut command = match &self.network {
            Some(network) => network.on(node, &program()),
            None => self.cluster.program_command(),
        };
        if let Some(machine) = self.machines.get(&node) {
            command.env("XSAN_FAULTS", machine.dir());
        }
        self.start_by(node, command);
    }

    /// As [`Hosts::restart`], without the right to change what the network is like.
    ///
    /// # Panics
    /// There is no network.
    pub fn restart_without_rights(&mut self, node: usize) {
        let mut command = self.network().on(node, Path::new("setpriv"));
        command.arg("--bounding-set=-net_admin,-net_raw").arg(program());
        self.start_by(node, command);
    }

    fn start_by(&mut self, node: usize, mut command: Command) {
        assert!(self.pid(node).is_none(), "n{node} runs already");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir(node).join("xsan.log"));
        let log = log.expect("the node's log");
        let child = command
            .args(["node", "run", "--config"])
            .arg(self.dir(node).join("xsan.toml"))
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the node's log"))
            .stderr(log)
            .spawn();
        self.restarted.insert(node, child.expect("the program starts"));
    }

    /// Runs a command against a node.
    #[must_use]
    pub fn run(&self, node: usize, arguments: &[&str]) -> Outcome {
        let mut command = Command::new(program());
        command.arg("--admin").arg(self.dir(node).join("admin.sock")).args(["--output", "json"]).args(arguments);
        outcome(&mut command)
    }

    /// As [`Hosts::run`]; the command must succeed, its JSON is returned.
    ///
    /// # Panics
    /// It failed.
    pub fn ok(&self, node: usize, arguments: &[&str]) -> Value {
        let outcome = self.run(node, arguments);
        assert_eq!(outcome.code, 0, "xsan {arguments:?} at n{node}: {outcome:?}");
        outcome.json()
    }

    /// Waits until a node says that the cluster is whole and has a pool.
    pub fn wait_until_whole(&self, node: usize, seconds: u64) {
        eventually(seconds, "all nodes up, health ok", || {
            let outcome = self.run(node, &["status"]);
            if outcome.code != 0 {
                return Err(outcome.stderr);
            }
            let status = outcome.json();
            let is_made = status["pools"].as_array().is_some_and(|pools| !pools.is_empty());
            if status["health"] == "ok" && is_made { Ok(()) } else { Err(status["reasons"].to_string()) }
        });
    }

    /// A node as another one sees it.
    #[must_use]
    pub fn state(&self, at: usize, node: usize) -> String {
        let outcome = self.run(at, &["node", "show", &format!("n{node}")]);
        if outcome.code == 0 { outcome.json()["state"].as_str().unwrap_or_default().to_owned() } else { outcome.stderr }
    }

    /// Who serves a volume, as `at` sees it.
    #[must_use]
    pub fn server_of(&self, at: usize, volume: &str) -> Option<String> {
        let told = self.ok(at, &["volume", "stat", volume]);
        told["node"].as_str().map(str::to_owned)
    }

    /// Connects to a volume at a node.
    ///
    /// # Errors
    /// Those of the connection and of the handshake.
    pub async fn connect(&self, node: usize, volume: &str) -> Result<Guest, ClientError> {
        connect(&self.dir(node), volume).await
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for (_, mut child) in std::mem::take(&mut self.restarted) {
            // Gone already, perhaps.
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            for node in (1..).take_while(|&node| self.dir(node).exists()) {
                let log = std::fs::read_to_string(self.dir(node).join("xsan.log")).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(25).collect();
                println!("--- the last lines of n{node}");
                tail.iter().rev().for_each(|line| println!("{line}"));
            }
        }
    }
}
