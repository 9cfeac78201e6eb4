//! What every server of this program has: an NBD gateway and an admin API on sockets of its directory, until a signal ends it.

use super::Failure;
use crate::admin::server::{Admin, serve};
use crate::cluster::Cluster;
use crate::error::ClusterError;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use xsan_env::Env;
use xsan_env::net::{Listener, UnixOptions};
use xsan_env::runtime::TaskHandle;
use xsan_gateway::server::Server;
use xsan_gateway::tls::Tls;

/// How long clients have to finish at shutdown.
const GRACE: Duration = Duration::from_secs(10);

/// Where a server listens.
pub(super) struct Sockets {
    /// `nbd.sock` and `admin.sock` lie here.
    pub dir: PathBuf,
    /// Mode and group of `nbd.sock`.
    pub unix: UnixOptions,
    /// NBD over TCP.
    pub tcp: Option<(SocketAddr, Tls)>,
}

/// A server that listens.
pub(super) struct Serving {
    admin: TaskHandle,
    _listening: Vec<TaskHandle>,
    admin_socket: PathBuf,
    nbd: Vec<String>,
}

impl Sockets {
    pub(super) async fn serve(
        self,
        env: &Env,
        cluster: Arc<dyn Cluster>,
        gateway: &Server,
    ) -> Result<Serving, Failure> {
        let socket = self.dir.join("nbd.sock");
        let listener = Listener::unix(&socket, &self.unix)
            .await
            .map_err(ClusterError::io(format!("cannot listen on {}", socket.display())))?;
        let mut listening = vec![gateway.listen(listener, Tls::off())];
        let mut nbd = vec![format!("nbd+unix:///VOLUME?socket={}", socket.display())];
        if let Some((address, tls)) = self.tcp {
            let what = format!("cannot listen on {address}");
            let listener = Listener::tcp(address).await.map_err(ClusterError::io(what))?;
            listening.push(gateway.listen(listener, tls));
            nbd.push(format!("nbd://{address}/VOLUME"));
        }
        let admin_socket = self.dir.join("admin.sock");
        let owner_only = UnixOptions { mode: 0o600, group: None };
        let what = format!("cannot listen on {}", admin_socket.display());
        let listener = Listener::unix(&admin_socket, &owner_only).await.map_err(ClusterError::io(what))?;
        let admin = Admin { cluster, nbd: Arc::new(nbd.clone()) };
        let admin = env.spawn("admin", serve(admin, listener));
        Ok(Serving { admin, _listening: listening, admin_socket, nbd })
    }
}

impl Serving {
    /// Says where to connect.
    pub(super) fn introduce(&self) {
        println!("      admin  {}", self.admin_socket.display());
        for address in &self.nbd {
            println!("      NBD    {address}");
        }
    }

    /// Lets clients finish what they began.
    pub(super) async fn end(self, gateway: &Server) {
        gateway.shutdown(GRACE).await;
        self.admin.abort();
    }
}

/// SIGTERM and SIGINT.
pub(super) struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    pub(super) fn new() -> Result<Self, ClusterError> {
        use tokio::signal::unix::{SignalKind, signal};
        let failed = || ClusterError::io("signals");
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(failed())?,
            interrupt: signal(SignalKind::interrupt()).map_err(failed())?,
        })
    }

    pub(super) async fn wait(&mut self) {
        tokio::select! {
            biased;
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
