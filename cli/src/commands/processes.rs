//! `xsan dev --processes`: a cluster of real processes on this machine, one per node.
//!
//! The processes end with this one: each reads from a pipe that this one holds open.

use super::serve::Signals;
use super::{Failure, host};
use crate::admin::api::{ClusterStatus, CreatePool, Done, JoinToken};
use crate::admin::client::Client;
use crate::cluster::dev::{NODES_DEFAULT, NODES_MAX, default_scheme};
use crate::cluster::founding::{self, Place};
use crate::cluster::identity::Identity;
use crate::cluster::settings::{self, Settings};
use crate::cluster::storage::lock_directory;
use crate::error::ClusterError;
use hyper::Method;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, ChildStdin, Command};
use xsan_env::os_disk::Backend;
use xsan_env::{Env, os};

/// How long a process has to end in order.
const END_FOR: Duration = Duration::from_secs(30);

/// A node's process, and the pipe that keeps it alive: waiting for a child would close its own.
struct Process {
    number: usize,
    child: Child,
    pipe: Option<ChildStdin>,
}

/// What is asked for.
pub(super) struct Processes {
    pub dir: PathBuf,
    pub nodes: Option<usize>,
    pub listen: Option<SocketAddr>,
    pub device_bytes: Option<u64>,
}

pub(super) async fn run(wanted: Processes) -> Result<(), Failure> {
    let env = os::OsRuntime::current();
    let mut signals = Signals::new()?;
    let began = env.now();
    let dir = std::path::absolute(&wanted.dir).map_err(ClusterError::io("directory"))?;
    let _lock = lock_directory(&env, &dir).await?;
    if dir.join("meta").exists() {
        return Err(Failure::Usage(
            format!("{} holds a cluster that runs in one process", dir.display()),
            Some("leave `--processes` out, or name another directory".into()),
        ));
    }
    let members = members(&dir);
    let count = match (members, wanted.nodes) {
        (0, asked) => asked.unwrap_or(NODES_DEFAULT),
        (found, Some(asked)) if asked > found && founded_only(&dir, found) => asked,
        (found, Some(asked)) if asked != found => {
            return Err(ClusterError::NodeCount { dir, found, asked }.into());
        }
        (found, _) => found,
    };
    if !(1..=NODES_MAX).contains(&count) {
        return Err(ClusterError::Invalid(format!("a development cluster has 1 to {NODES_MAX} nodes")).into());
    }
    let mut children = Vec::new();
    let started = tokio::select! {
        biased;
        () = signals.wait() => None,
        made = make(&env, &dir, &wanted, members, count, &mut children) => Some(made),
    };
    match started {
        Some(Ok(())) => {
            let seconds = env.now().since(began).as_secs_f64();
            println!("xsan: {count} processes ready in {seconds:.2} s");
            for number in 1..=count {
                println!("      n{number}  {}", node_dir(&dir, number).display());
            }
            println!("      any of them: xsan --admin {} status", node_dir(&dir, 1).join("admin.sock").display());
            println!("      NBD          nbd+unix:///VOLUME?socket={}", node_dir(&dir, 1).join("nbd.sock").display());
            watch(&mut signals, &mut children).await;
        }
        Some(Err(failure)) => {
            end(&env, children).await;
            return Err(failure);
        }
        None => {}
    }
    tracing::info!("shutting down");
    end(&env, children).await;
    Ok(())
}

fn node_dir(dir: &Path, number: usize) -> PathBuf {
    dir.join(format!("n{number}"))
}

/// Nodes that were made before, without gaps from n1.
fn members(dir: &Path) -> usize {
    (1..=NODES_MAX).take_while(|&number| matches!(Identity::read(&node_dir(dir, number)), Ok(Some(_)))).count()
}

/// Whether the making of the cluster was cut short: its default pool is made when all nodes are up.
fn founded_only(dir: &Path, found: usize) -> bool {
    found > 0 && !dir.join("made").exists()
}

async fn make(
    env: &Env,
    dir: &Path,
    wanted: &Processes,
    members: usize,
    count: usize,
    children: &mut Vec<Process>,
) -> Result<(), Failure> {
    let place = |number: usize| -> Result<Place, Failure> {
        Ok(Place {
            dir: node_dir(dir, number),
            settings: new_settings(number, wanted.listen)?,
            device_bytes: wanted.device_bytes,
            sharers: count,
            backend: Backend::Auto,
        })
    };
    let mut token = None;
    if members == 0 {
        token = Some(founding::found(env, &place(1)?, true, u32::try_from(count).unwrap_or(u32::MAX)).await?);
    }
    for number in 1..=members.max(1) {
        children.push(spawn(dir, number)?);
    }
    for number in 1..=members.max(1) {
        host::wait_until(env, &node_dir(dir, number), |_| true).await?;
    }
    let client = Client::new(env.clone(), node_dir(dir, 1).join("admin.sock"));
    if members < count {
        let token = match token {
            Some(token) => token,
            None => {
                let request =
                    crate::admin::api::CreateToken { seconds: 3600, uses: u32::try_from(count).unwrap_or(64) };
                let answer: JoinToken = client.call(Method::POST, "/v1/tokens", &request).await?;
                answer.token.parse().map_err(|error| Failure::Usage(format!("{error}"), None))?
            }
        };
        let peer = Settings::read(&node_dir(dir, 1).join(settings::FILE))?.address;
        for number in members.max(1) + 1..=count {
            founding::join(env, &place(number)?, &token, std::slice::from_ref(&peer), false).await?;
            children.push(spawn(dir, number)?);
        }
    }
    let up = |status: &ClusterStatus| status.nodes.iter().filter(|node| node.state == "up" && node.answers).count();
    host::wait_until(env, &node_dir(dir, 1), |status| up(status) >= count).await?;
    let status: ClusterStatus = client.call(Method::GET, "/v1/status", &Done {}).await?;
    if status.pools.is_empty() && !dir.join("made").exists() {
        let request = CreatePool { name: Some("default".into()), scheme: default_scheme(count) };
        let _: Done = client.call(Method::POST, "/v1/pools", &request).await?;
    }
    std::fs::write(dir.join("made"), "").map_err(ClusterError::io("cannot write"))?;
    Ok(())
}

fn new_settings(number: usize, nbd: Option<SocketAddr>) -> Result<Settings, Failure> {
    // The port is free now; whoever takes it before the node does makes the start fail, and the next one choose again.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(ClusterError::io("a free port"))?;
    let listen = listener.local_addr().map_err(ClusterError::io("a free port"))?;
    Ok(Settings {
        name: format!("n{number}"),
        host: "localhost".into(),
        rack: None,
        zone: None,
        listen,
        address: listen.to_string(),
        nbd: nbd.filter(|_| number == 1),
        service_interface: None,
        socket_mode: "660".into(),
        socket_group: None,
        devices: None,
        workers: 1,
    })
}

fn spawn(dir: &Path, number: usize) -> Result<Process, Failure> {
    let dir = node_dir(dir, number);
    let program = std::env::current_exe().map_err(ClusterError::io("this program"))?;
    let log = dir.join("xsan.log");
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .map_err(ClusterError::io(format!("cannot write {}", log.display())))?;
    let out = log.try_clone().map_err(ClusterError::io("log"))?;
    let mut child = Command::new(program)
        .args(["node", "run", "--until-stdin-ends", "--config"])
        .arg(dir.join(settings::FILE))
        .stdin(Stdio::piped())
        .stdout(out)
        .stderr(log)
        .spawn()
        .map_err(ClusterError::io("cannot start a node"))?;
    let pipe = child.stdin.take();
    Ok(Process { number, child, pipe })
}

/// Until a signal; tells of processes that end before.
async fn watch(signals: &mut Signals, children: &mut Vec<Process>) {
    loop {
        let ends = children.iter_mut().map(|process| {
            let number = process.number;
            Box::pin(async move { (number, process.child.wait().await) })
        });
        let (ended, how) = tokio::select! {
            biased;
            () = signals.wait() => return,
            ((number, how), _, _) = futures::future::select_all(ends) => (number, how),
        };
        let how = how.map_or_else(|error| error.to_string(), |status| status.to_string());
        println!("xsan: n{ended} has ended ({how}); start it again: xsan node run --config DIR/n{ended}/xsan.toml");
        children.retain(|process| process.number != ended);
        if children.is_empty() {
            signals.wait().await;
            return;
        }
    }
}

/// Closes the pipes, and waits.
async fn end(env: &Env, children: Vec<Process>) {
    let ends = children.into_iter().map(|Process { number, mut child, pipe }| async move {
        drop(pipe);
        if env.timeout(END_FOR, child.wait()).await.is_none() {
            tracing::warn!("n{number} does not end: killed");
            // It is gone either way.
            let _ = child.kill().await;
        }
    });
    futures::future::join_all(ends).await;
}
