//! `xsan cluster …`, `xsan node join` and `xsan node run`: a host's way into a cluster, and its daemon.

use super::serve::{Signals, Sockets};
use super::{Failure, Output, output};
use crate::admin::api::{ClusterStatus, CreateToken, Done, JoinToken};
use crate::admin::client::Client;
use crate::cluster::founding::{self, Place};
use crate::cluster::serving::HostExports;
use crate::cluster::settings::{self, NODE_PORT, Settings};
use crate::cluster::{Host, HostOptions};
use crate::error::ClusterError;
use clap::{Args, Subcommand};
use hyper::Method;
use serde::Serialize;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use xsan_env::net::UnixOptions;
use xsan_env::os_disk::Backend;
use xsan_env::{Env, os};
use xsan_gateway::server::{Limits, Server};
use xsan_gateway::tls::Tls;
use xsan_types::parse_bytes;

/// Where a host's node lies, if nobody says otherwise.
const DIR: &str = "/var/lib/xsan";
/// How long what was started has to be up.
const START_FOR: Duration = Duration::from_secs(60);

#[derive(Debug, Subcommand)]
pub(super) enum ClusterCommand {
    /// Make a cluster with this host as its first node, start its daemon and print a token for the others.
    #[command(after_help = "Example, on three hosts:
  h1# xsan cluster init --device /dev/sdb
  h2# xsan node join TOKEN --peer h1 --device /dev/sdb
  h3# xsan node join TOKEN --peer h1 --device /dev/sdb
  h1# xsan pool create --ec 2+1 && xsan volume create vm1 --size 100GiB")]
    Init(Box<NewNode>),
    /// Print a token that lets more hosts in.
    Token {
        /// How long it is good, in minutes.
        #[arg(long, default_value_t = 60)]
        minutes: u64,
        /// How many hosts it lets in.
        #[arg(long, default_value_t = founding::TOKEN_USES)]
        uses: u32,
    },
}

#[derive(Debug, Args)]
pub(super) struct JoinArgs {
    /// What `xsan cluster init` or `xsan cluster token` printed.
    token: founding::TokenText,
    /// Any host of the cluster, HOST or HOST:PORT; several are tried in turn.
    #[arg(long, required = true, value_name = "HOST")]
    peer: Vec<String>,
    /// Take over name and devices of the node of this name, which is down and will not return.
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    node: NewNode,
}

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// The node's settings; the directory they lie in is the node's.
    #[arg(long, default_value = "/var/lib/xsan/xsan.toml")]
    config: PathBuf,
    /// End when stdin ends: for a daemon that must not outlive who started it.
    #[arg(long, hide = true)]
    until_stdin_ends: bool,
}

/// What a new node is like.
#[derive(Debug, Args)]
pub(super) struct NewNode {
    /// A blank block device or file for data; several times for several. Without one, a file in the node's directory.
    #[arg(long, value_name = "PATH")]
    device: Vec<PathBuf>,
    /// The node's directory.
    #[arg(long, default_value = DIR)]
    dir: PathBuf,
    /// The node's name; by default the host's.
    #[arg(long)]
    name: Option<String>,
    /// The machine's name; by default what it calls itself. Nodes of one machine fail together.
    #[arg(long)]
    host: Option<String>,
    /// The machine's rack.
    #[arg(long)]
    rack: Option<String>,
    /// The rack's zone.
    #[arg(long)]
    zone: Option<String>,
    /// Where to listen for other nodes.
    #[arg(long, default_value_t = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), NODE_PORT))]
    listen: SocketAddr,
    /// Where other nodes reach this one, HOST:PORT; by default this host's own address.
    #[arg(long)]
    address: Option<String>,
    /// Serve NBD on this TCP address as well.
    #[arg(long, value_name = "ADDR:PORT")]
    nbd: Option<SocketAddr>,
    /// Size of the file in the node's directory; by default a share of the free space.
    #[arg(long, value_parser = size)]
    device_size: Option<u64>,
    /// Do not start the daemon.
    #[arg(long)]
    no_start: bool,
}

fn size(text: &str) -> Result<u64, String> {
    parse_bytes(text).map_err(|error| error.to_string())
}

/// The result of `cluster init` and `cluster token`.
#[derive(Serialize)]
struct Joined<'a> {
    node: &'a str,
    token: Option<String>,
}

impl RunArgs {
    pub(super) fn workers(&self) -> usize {
        Settings::read(&self.config).map_or(1, |settings| settings.workers.max(1))
    }
}

pub(super) async fn cluster(command: ClusterCommand, client: Option<Client>, output: Output) -> Result<(), Failure> {
    match command {
        ClusterCommand::Init(node) => init(*node, output).await,
        ClusterCommand::Token { minutes, uses } => {
            let client = client.ok_or_else(super::no_admin)?;
            let request = CreateToken { seconds: minutes.saturating_mul(60), uses };
            let token: JoinToken = client.call(Method::POST, "/v1/tokens", &request).await?;
            match output {
                Output::Json => output::json(&token),
                Output::Text => output::put(&token.token),
            }
            Ok(())
        }
    }
}

async fn init(node: NewNode, output: Output) -> Result<(), Failure> {
    let env = os::OsRuntime::current();
    let place = node.place(None)?;
    let token = founding::found(&env, &place, false, founding::TOKEN_USES).await?;
    if !node.no_start {
        start_daemon(&env, &place.dir, &place.settings.name).await?;
    }
    let text = format!(
        "cluster made; {} is its first node\nlet others in, for an hour:\n  xsan node join {token} --peer {}",
        place.settings.name, place.settings.address
    );
    let joined = Joined { node: &place.settings.name, token: Some(token.to_string()) };
    output::done(output, &joined, &text);
    Ok(())
}

pub(super) async fn join(args: JoinArgs, output: Output) -> Result<(), Failure> {
    let env = os::OsRuntime::current();
    let peers: Vec<String> = args.peer.iter().map(|peer| with_port(peer)).collect();
    let place = args.node.place(peers.first().map(String::as_str))?;
    founding::join(&env, &place, &args.token.0, &peers, args.replace).await?;
    if !args.node.no_start {
        start_daemon(&env, &place.dir, &place.settings.name).await?;
    }
    let name = &place.settings.name;
    output::done(output, &Joined { node: name, token: None }, &format!("{name} is a node of the cluster"));
    Ok(())
}

/// `HOST` alone means the nodes' port.
fn with_port(peer: &str) -> String {
    let has_port = peer
        .rsplit_once(':')
        .is_some_and(|(host, port)| port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']')));
    match (has_port, peer.contains(':') && !peer.starts_with('[')) {
        (true, _) => peer.to_owned(),
        (false, true) => format!("[{peer}]:{NODE_PORT}"),
        (false, false) => format!("{peer}:{NODE_PORT}"),
    }
}

impl NewNode {
    fn place(&self, peer: Option<&str>) -> Result<Place, Failure> {
        let host = self.host.clone().map_or_else(host_name, Ok)?;
        let address = match &self.address {
            Some(address) => with_port(address),
            None => SocketAddr::new(own_address(peer), self.listen.port()).to_string(),
        };
        let settings = Settings {
            name: self.name.clone().unwrap_or_else(|| host.clone()),
            host,
            rack: self.rack.clone(),
            zone: self.zone.clone(),
            listen: self.listen,
            address,
            nbd: self.nbd,
            service_interface: None,
            socket_mode: "660".into(),
            socket_group: None,
            devices: Some(self.device.clone()).filter(|devices| !devices.is_empty()),
            workers: 1,
        };
        let dir = std::path::absolute(&self.dir).map_err(ClusterError::io("directory"))?;
        let device_bytes = self.device_size;
        Ok(Place { dir, settings, device_bytes, sharers: 1, backend: Backend::Auto })
    }
}

fn host_name() -> Result<String, Failure> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(ClusterError::io("host name"))?;
    Ok(name.trim().to_owned())
}

/// The address that this host would use towards `peer`, or towards the world. No packet is sent.
fn own_address(peer: Option<&str>) -> IpAddr {
    let found = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect(peer.unwrap_or("192.0.2.1:9"))?;
        socket.local_addr()
    });
    found.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip())
}

/// Starts the daemon of `dir`: by systemd where its unit is installed, else as a process of its own; waits until its node `name` is
/// up.
async fn start_daemon(env: &Env, dir: &Path, name: &str) -> Result<(), Failure> {
    let by_systemd = dir == Path::new(DIR)
        && Path::new("/run/systemd/system").exists()
        && ["/etc/systemd/system/xsan.service", "/usr/lib/systemd/system/xsan.service"]
            .iter()
            .any(|unit| Path::new(unit).exists());
    if by_systemd {
        let started = tokio::process::Command::new("systemctl").args(["enable", "--now", "xsan"]).status().await;
        let started = started.map_err(ClusterError::io("systemctl"))?;
        if !started.success() {
            return Err(Failure::Usage(
                "systemctl could not start xsan".into(),
                Some("see `journalctl -u xsan`".into()),
            ));
        }
    } else {
        spawn_daemon(dir)?;
    }
    wait_until(env, dir, |status| status.nodes.iter().any(|node| node.name == name && node.state == "up")).await
}

fn spawn_daemon(dir: &Path) -> Result<(), Failure> {
    use std::os::unix::process::CommandExt;
    let log = dir.join("xsan.log");
    let open = || std::fs::OpenOptions::new().create(true).append(true).open(&log);
    let what = || ClusterError::io(format!("cannot write {}", log.display()));
    let program = std::env::current_exe().map_err(ClusterError::io("this program"))?;
    std::process::Command::new(program)
        .args(["node", "run", "--config"])
        .arg(dir.join(settings::FILE))
        .stdin(std::process::Stdio::null())
        .stdout(open().map_err(what())?)
        .stderr(open().map_err(what())?)
        .process_group(0)
        .spawn()
        .map_err(ClusterError::io("cannot start the daemon"))?;
    Ok(())
}

/// Until the daemon in `dir` tells of a cluster that is as wanted.
pub(super) async fn wait_until(env: &Env, dir: &Path, wanted: impl Fn(&ClusterStatus) -> bool) -> Result<(), Failure> {
    let client = Client::new(env.clone(), dir.join("admin.sock"));
    let told = async {
        loop {
            match client.call::<ClusterStatus>(Method::GET, "/v1/status", &Done {}).await {
                Ok(status) if wanted(&status) => return,
                _ => env.sleep(Duration::from_millis(50)).await,
            }
        }
    };
    match env.timeout(START_FOR, told).await {
        Some(()) => Ok(()),
        None => {
            let next = format!("see {}", dir.join("xsan.log").display());
            let message = format!("the daemon in {} is not up after {} s", dir.display(), START_FOR.as_secs());
            Err(Failure::Usage(message, Some(next)))
        }
    }
}

pub(super) async fn run(args: RunArgs) -> Result<(), Failure> {
    let env = os::OsRuntime::current();
    let mut signals = Signals::new()?;
    let began = env.now();
    let config = std::path::absolute(&args.config).map_err(ClusterError::io("settings"))?;
    let dir = config.parent().unwrap_or(Path::new("/")).to_owned();
    let settings = Settings::read(&config)?;
    let unix = UnixOptions { mode: settings.mode()?, group: settings.socket_group.clone() };
    let tcp = settings.nbd.map(|address| (address, Tls::off()));
    let host = Host::open(&env, &dir, settings, HostOptions::default()).await?;
    let exports = Arc::new(HostExports(Arc::clone(&host)));
    let gateway = Server::new(env.clone(), host.buffers().clone(), exports, Limits::default());
    host.set_gateway(gateway.clone());
    let sockets = Sockets { dir: dir.clone(), unix, tcp };
    let serving = sockets.serve(&env, Arc::<Host>::clone(&host), &gateway).await?;
    let pid = dir.join("pid");
    std::fs::write(&pid, format!("{}\n", std::process::id())).map_err(ClusterError::io("cannot write the pid"))?;
    let seconds = env.now().since(began).as_secs_f64();
    println!("xsan: node {} ready in {seconds:.2} s ({})", host.settings().name, host.backend());
    serving.introduce();
    let mut replica = host.group().status();
    let stdin = async {
        match args.until_stdin_ends {
            true => stdin_ends(&env).await,
            false => std::future::pending().await,
        }
    };
    let is_faulty = tokio::select! {
        biased;
        () = signals.wait() => false,
        () = stdin => false,
        // What it holds of the metadata cannot be written any more: started anew, it may.
        stopped = replica.wait_for(|status| status.faulty) => stopped.is_ok(),
    };
    tracing::info!(is_faulty, "shutting down");
    // Clients at service addresses go on elsewhere: they are not told that this is the end.
    host.leave_addresses().await;
    serving.end(&gateway).await;
    host.close().await;
    // Gone already if somebody tidied up.
    let _ = std::fs::remove_file(pid);
    if is_faulty {
        let next = "see its log: the disk of its directory failed or is full; what starts it (systemd) starts it again";
        return Err(Failure::Usage("this node's replica of the metadata has stopped".into(), Some(next.into())));
    }
    Ok(())
}

async fn stdin_ends(env: &Env) {
    // An error is an end as well.
    let read = env.blocking(|| std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink()));
    drop(read.await);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_without_a_port_means_the_nodes_port() {
        let cases = [
            ("h1", "h1:7400"),
            ("h1:99", "h1:99"),
            ("10.0.0.1", "10.0.0.1:7400"),
            ("fd00::1", "[fd00::1]:7400"),
            ("[fd00::1]", "[fd00::1]:7400"),
            ("[fd00::1]:99", "[fd00::1]:99"),
        ];
        for (given, meant) in cases {
            assert_eq!(with_port(given), meant, "{given}");
        }
    }
}
