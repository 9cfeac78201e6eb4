//! `xsan dev`: the server.

use super::Failure;
use super::processes::{self, Processes};
use super::serve::{Signals, Sockets};
use crate::cluster::{DevCluster, DevOptions};
use crate::error::ClusterError;
use clap::Args;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use xsan_env::net::UnixOptions;
use xsan_env::os;
use xsan_gateway::nbd::handshake::TlsMode;
use xsan_gateway::server::{Limits, Server};
use xsan_gateway::tls::{Tls, server_config};
use xsan_types::parse_bytes;

fn size(text: &str) -> Result<u64, String> {
    parse_bytes(text).map_err(|error| error.to_string())
}

#[derive(Debug, Args)]
#[command(
    after_help = "The directory holds everything: stop the process at any moment, also with SIGKILL, and start it again on the
same directory. Default pool: rs(4,2) with 6 and more nodes, rs(2,2) with 4 or 5, rs(2,1) with 3, two copies with 2."
)]
pub(super) struct DevArgs {
    /// Where the cluster lies; made if it does not exist.
    #[arg(long)]
    dir: PathBuf,
    /// Storage nodes of a new cluster (6 by default).
    #[arg(long)]
    nodes: Option<usize>,
    /// Serve NBD on this TCP address as well, for example 127.0.0.1:10809.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// A process per node, as on hosts of their own: DIR/n1 … with `pid`, `admin.sock`, `nbd.sock` and `xsan.toml` each.
    #[arg(long)]
    processes: bool,
    /// Size of each node's device in a new cluster; by default a share of the free space. Space is taken as it is used.
    #[arg(long, value_parser = size)]
    device_size: Option<u64>,
    /// Threads that serve I/O.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Mode of the NBD socket, octal.
    #[arg(long, default_value = "660", value_parser = octal)]
    socket_mode: u32,
    /// Group of the NBD socket, for example libvirt-qemu.
    #[arg(long)]
    socket_group: Option<String>,
    /// PEM certificate chain: clients on TCP must use TLS.
    #[arg(long, requires = "tls_key", value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// PEM private key of the certificate.
    #[arg(long, requires = "tls_cert", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// PEM certificates of those who sign clients: only their clients are let in.
    #[arg(long, requires = "tls_cert", value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
}

fn octal(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| "an octal mode, for example 660".into())
}

impl DevArgs {
    pub(super) fn workers(&self) -> usize {
        self.workers.max(1)
    }
}

pub(super) async fn run(args: DevArgs) -> Result<(), Failure> {
    if args.processes {
        let nodes = Processes { dir: args.dir, nodes: args.nodes, listen: args.listen, device_bytes: args.device_size };
        return processes::run(nodes).await;
    }
    let env = os::OsRuntime::current();
    let mut signals = Signals::new()?;
    let began = env.now();
    let mut options = DevOptions::new(&args.dir);
    options.nodes = args.nodes;
    options.device_bytes = args.device_size;
    let tls = tls(&args, &env)?;
    let cluster = Arc::new(DevCluster::open(&env, options).await?);
    let exports = Arc::new(cluster.volumes().clone());
    let gateway = Server::new(env.clone(), cluster.buffers().clone(), exports, Limits::default());
    cluster.set_gateway(gateway.clone());
    let sockets = Sockets {
        dir: args.dir.clone(),
        unix: UnixOptions { mode: args.socket_mode, group: args.socket_group.clone() },
        tcp: args.listen.map(|address| (address, tls)),
    };
    let serving = sockets.serve(&env, Arc::<DevCluster>::clone(&cluster), &gateway).await?;
    let seconds = env.now().since(began).as_secs_f64();
    println!("xsan: {} nodes ready in {seconds:.2} s ({})", cluster.nodes().len(), cluster.backend());
    serving.introduce();
    signals.wait().await;
    tracing::info!("shutting down");
    serving.end(&gateway).await;
    cluster.close().await;
    Ok(())
}

fn tls(args: &DevArgs, env: &xsan_env::Env) -> Result<Tls, Failure> {
    let (Some(certificate), Some(key)) = (&args.tls_cert, &args.tls_key) else { return Ok(Tls::off()) };
    let read =
        |path: &PathBuf| std::fs::read(path).map_err(ClusterError::io(format!("cannot read {}", path.display())));
    let (certificate, key) = (read(certificate)?, read(key)?);
    let ca = args.tls_client_ca.as_ref().map(read).transpose()?;
    let config = server_config(env, &certificate, &key, ca.as_deref())
        .map_err(|error| Failure::Usage(format!("TLS: {error}"), None))?;
    Ok(Tls::new(TlsMode::Required, config))
}
