//! A cluster of processes, one per node, that can be killed, frozen and started again one by one.

use crate::cluster::{Cluster, Guest, Outcome, connect, outcome, program};
use crate::wait::eventually;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use xsan_gateway::client::ClientError;

/// How long all nodes may take to be up.
const UP_SECONDS: u64 = 60;

/// `xsan dev --processes` in a directory of its own. Nodes are counted from 1.
pub struct Hosts {
    cluster: Cluster,
    /// Processes that were started here, in place of some that had ended.
    restarted: BTreeMap<usize, Child>,
}

impl Hosts {
    /// `nodes` nodes of 2 GiB, all up, with their default pool.
    #[must_use]
    pub fn started(nodes: usize) -> Self {
        let nodes = nodes.to_string();
        let mut hosts = Self {
            cluster: Cluster::new(&["--processes", "--nodes", &nodes, "--device-size", "2GiB"]),
            restarted: BTreeMap::new(),
        };
        hosts.start();
        hosts
    }

    /// Starts all processes.
    pub fn start(&mut self) {
        self.cluster.start();
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
        self.cluster.stop();
    }

    /// SIGKILL to all of them at once.
    pub fn kill_all(&mut self) {
        let nodes = (1..).take_while(|&node| self.dir(node).exists());
        let nodes: Vec<usize> = nodes.filter(|&node| self.pid(node).is_some()).collect();
        for node in nodes {
            self.kill(node);
        }
        self.cluster.kill();
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
        assert!(self.pid(node).is_none(), "n{node} runs already");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir(node).join("xsan.log"));
        let log = log.expect("the node's log");
        let child = Command::new(program())
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
