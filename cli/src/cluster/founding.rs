//! How a host becomes a node: by making a cluster, or by joining one with a token (RFC 0005).
//!
//! Layout of a node's directory: `xsan.toml` (settings), `identity.json` (who it is; without it the directory is of no member), `lock`,
//! `pid`, `meta/` (its replica of the metadata), `device.img` if no device is named, `index-N/` per device, `admin.sock`,
//! `nbd.sock`. `joining.json` holds the key of a host on its way in, so that a join that was cut short can be asked for again.

use super::host::Host;
use super::identity::{Identity, write_secret};
use super::settings::{self, Settings};
use super::storage::{Storage, lock_directory, share_of_space};
use crate::error::ClusterError;
use raft_meta::{
    Authority, Candidacy, Command, Consensus, FormatError, GroupOptions, MetaState, Name, Outcome, RaftGroup,
    RaftTransport, ReplicaId, ShownToken, TokenRecord,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;
use xsan_env::os_disk::{Backend, IoDriver};
use xsan_env::runtime::BoxFuture;
use xsan_env::{BufPool, Disk, Env, Stream};
use xsan_node::DeviceIdentity;
use xsan_types::{ClusterId, DeviceId, NodeId};
use xsan_wire::join::{JoinService, JoinToken};
use xsan_wire::{Ca, NodeKey};

/// How long a token is good, if nobody says otherwise.
pub const TOKEN_FOR: Duration = Duration::from_secs(3600);
/// How many nodes a token lets in, if nobody says otherwise.
pub const TOKEN_USES: u32 = 16;
/// How long the cluster has to let a host in.
const JOIN_FOR: Duration = Duration::from_secs(30);
/// What must be empty on a disk before it becomes a device.
const BLANK_BYTES: usize = 1 << 20;
const JOINING_FILE: &str = "joining.json";

/// Where a new node lies and what its devices are like.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its directory.
    pub dir: PathBuf,
    /// Its settings; written there.
    pub settings: Settings,
    /// Bytes of `device.img`, if no device is named; `None`: a share of the free space.
    pub device_bytes: Option<u64>,
    /// Nodes that share the file system `dir` is on.
    pub sharers: usize,
    /// How disks are reached.
    pub backend: Backend,
}

/// A token as it is typed.
#[derive(Clone, Debug)]
pub struct TokenText(pub JoinToken);

impl std::str::FromStr for TokenText {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.trim().parse().map(Self).map_err(|error: xsan_wire::join::TokenError| error.to_string())
    }
}

/// What a host on its way in must remember.
#[derive(Serialize, Deserialize)]
struct Joining {
    key: String,
    public: Vec<u8>,
}

/// A host's request; `version` 1.
#[derive(Serialize, Deserialize)]
struct JoinRequest {
    version: u32,
    number: u64,
    secret: [u8; 16],
    name: Name,
    host: Name,
    rack: Option<Name>,
    zone: Option<Name>,
    address: String,
    public_key: Vec<u8>,
    replica: u64,
    replaces: bool,
}

/// The answer to it.
#[derive(Serialize, Deserialize)]
enum JoinAnswer {
    Admitted(Admitted),
    Refused { message: String },
}

#[derive(Serialize, Deserialize)]
struct Admitted {
    node: NodeId,
    authority: String,
    certificate: String,
    peers: BTreeMap<NodeId, String>,
    /// Devices that it takes over.
    devices: Vec<DeviceId>,
}

/// A replica that is only made, or is the only one, speaks with nobody.
pub(super) struct Mute;

impl RaftTransport for Mute {
    fn send(&self, _to: ReplicaId, _message: Vec<u8>) {}
}

fn refused(reason: impl std::fmt::Display) -> ClusterError {
    ClusterError::Join(reason.to_string())
}

/// Makes a cluster whose first node lies in `place`, and a token for others. `single_host`: all nodes will be on this host, and
/// count as failure domains.
///
/// # Errors
/// The directory is a member's; a device is not blank; the operating system's.
pub async fn found(env: &Env, place: &Place, single_host: bool, uses: u32) -> Result<JoinToken, ClusterError> {
    let _lock = begin(env, place).await?;
    // A cluster whose making was cut short has no member.
    discard(&place.dir.join("meta"))?;
    let cluster = ClusterId(env.random_u128());
    let (ca, key) = (Ca::new(cluster).map_err(refused)?, NodeKey::new().map_err(refused)?);
    let genesis = MetaState::new(cluster, single_host);
    let files = Arc::new(meta_directory(env, &place.dir).await?);
    let node = NodeId(1);
    let group = RaftGroup::create(env, files, Arc::new(Mute), GroupOptions::default(), node, genesis).await?;
    let authority = Authority { certificate: ca.certificate_pem().to_owned(), key: ca.key_pem() };
    let certificate = ca.issue(node, key.public()).map_err(refused)?;
    let Named { name, host, rack, zone } = named(&place.settings)?;
    let candidacy = Candidacy {
        token: None,
        now_millis: env.wall_millis(),
        name,
        host,
        rack,
        zone,
        address: place.settings.address.clone(),
        public_key: key.public().to_vec(),
        replica: group.replica().0,
        replaces: false,
    };
    group.propose(Command::SetAuthority(authority)).await?;
    let Outcome::Node(admitted) = group.propose(Command::AdmitNode(candidacy)).await? else {
        return Err(ClusterError::Invalid("the metadata answered another command".into()));
    };
    assert_eq!(admitted, node, "the first node of a cluster");
    format_devices(env, place, cluster, node, &[]).await?;
    let token = new_token(env, &group, cluster, TOKEN_FOR, uses).await?;
    group.close().await;
    let identity = Identity {
        cluster,
        node,
        authority: ca.certificate_pem().to_owned(),
        certificate,
        key: key.pem(),
        peers: BTreeMap::new(),
    };
    place.settings.write(&place.dir.join(settings::FILE))?;
    identity.write(&place.dir)?;
    Ok(token)
}

/// Makes a token.
///
/// # Errors
/// No majority of the metadata answers.
pub async fn new_token(
    env: &Env,
    consensus: &dyn Consensus,
    cluster: ClusterId,
    good_for: Duration,
    uses: u32,
) -> Result<JoinToken, ClusterError> {
    let view = consensus.view();
    let Some(authority) = &view.hosts.authority else {
        return Err(ClusterError::Invalid("a cluster inside one process lets no hosts in".into()));
    };
    let token = JoinToken::new(cluster, &authority.certificate, env.random()).map_err(refused)?;
    let now_millis = env.wall_millis();
    let expires_millis = now_millis.saturating_add(u64::try_from(good_for.as_millis()).unwrap_or(u64::MAX));
    let record = TokenRecord { secret_hash: token.secret_hash(), expires_millis, uses_left: uses };
    consensus.propose(Command::AddToken { number: token.number(), token: record, now_millis }).await?;
    Ok(token)
}

/// Makes `place` a node of the cluster that `token` is of; any of `peers` may let it in. With `replaces` it takes over from the
/// node of its name, which is down.
///
/// # Errors
/// The directory is a member's; nobody answers; the cluster refuses; a device is not blank.
pub async fn join(
    env: &Env,
    place: &Place,
    token: &JoinToken,
    peers: &[String],
    replaces: bool,
) -> Result<NodeId, ClusterError> {
    let _lock = begin(env, place).await?;
    let joining = joining_key(&place.dir)?;
    let cluster = token.cluster();
    let replica = joining_replica(env, &place.dir, cluster).await?;
    let Named { name, host, rack, zone } = named(&place.settings)?;
    let request = JoinRequest {
        version: 1,
        number: token.number(),
        secret: token.secret(),
        name,
        host,
        rack,
        zone,
        address: place.settings.address.clone(),
        public_key: joining.public,
        replica: replica.0,
        replaces,
    };
    let admitted = ask_peers(env, token, peers, &request).await?;
    format_devices(env, place, cluster, admitted.node, &admitted.devices).await?;
    let identity = Identity {
        cluster,
        node: admitted.node,
        authority: admitted.authority,
        certificate: admitted.certificate,
        key: joining.key,
        peers: admitted.peers,
    };
    // Certificate and key are looked at before this host counts as a member.
    identity.tls(env)?;
    place.settings.write(&place.dir.join(settings::FILE))?;
    identity.write(&place.dir)?;
    discard(&place.dir.join(JOINING_FILE))?;
    Ok(admitted.node)
}

async fn ask_peers(
    env: &Env,
    token: &JoinToken,
    peers: &[String],
    request: &JoinRequest,
) -> Result<Admitted, ClusterError> {
    let body = serde_json::to_vec(request).map_err(refused)?;
    let mut last = refused("no host of the cluster was named");
    for peer in peers {
        let stream = match env.timeout(JOIN_FOR, Stream::connect_host(peer)).await {
            Some(Ok(stream)) => stream,
            Some(Err(error)) => {
                last = refused(format!("cannot reach {error}"));
                continue;
            }
            None => {
                last = refused(format!("{peer} does not answer"));
                continue;
            }
        };
        match xsan_wire::join::join(env, stream, token, &body, JOIN_FOR).await {
            Ok(answer) => match serde_json::from_slice(&answer) {
                Ok(JoinAnswer::Admitted(admitted)) => return Ok(admitted),
                Ok(JoinAnswer::Refused { message }) => return Err(refused(format!("{peer} refuses: {message}"))),
                Err(error) => last = refused(format!("the answer of {peer} cannot be read: {error}")),
            },
            Err(error) => last = refused(format!("{peer}: {error}")),
        }
    }
    Err(last)
}

/// Lets hosts in that show a token.
pub struct JoinDesk(pub Weak<Host>);

impl JoinService for JoinDesk {
    fn join(&self, request: Vec<u8>, from: String) -> BoxFuture<'static, Vec<u8>> {
        let host = Weak::clone(&self.0);
        Box::pin(async move {
            let admitted = match host.upgrade() {
                Some(host) => admit(&host, &request, &from).await,
                None => Err(ClusterError::Closing),
            };
            let answer = match admitted {
                Ok(admitted) => JoinAnswer::Admitted(admitted),
                Err(error) => {
                    tracing::warn!(from, %error, "a host was not let in");
                    JoinAnswer::Refused { message: error.to_string() }
                }
            };
            serde_json::to_vec(&answer).unwrap_or_default()
        })
    }
}

async fn admit(host: &Host, request: &[u8], from: &str) -> Result<Admitted, ClusterError> {
    let request: JoinRequest = serde_json::from_slice(request)
        .map_err(|error| ClusterError::Invalid(format!("the request cannot be read: {error}")))?;
    let candidacy = Candidacy {
        token: Some(ShownToken { number: request.number, secret_hash: JoinToken::hash_of(&request.secret) }),
        now_millis: host.env().wall_millis(),
        name: request.name,
        host: request.host,
        rack: request.rack,
        zone: request.zone,
        address: request.address,
        public_key: request.public_key.clone(),
        replica: request.replica,
        replaces: request.replaces,
    };
    let Outcome::Node(node) = host.propose(Command::AdmitNode(candidacy)).await? else {
        return Err(ClusterError::Invalid("the metadata answered another command".into()));
    };
    let view = host.view();
    let Some(authority) = &view.hosts.authority else {
        return Err(ClusterError::Invalid("the cluster has no certificate authority".into()));
    };
    let ca = Ca::from_pem(view.cluster, &authority.key, &authority.certificate).map_err(refused)?;
    let certificate = ca.issue(node, &request.public_key).map_err(refused)?;
    let peers = view.hosts.nodes.iter().filter(|&(&id, _)| id != node);
    tracing::info!(%node, from, "a host joins the cluster");
    Ok(Admitted {
        node,
        authority: authority.certificate.clone(),
        certificate,
        peers: peers.map(|(&id, record)| (id, record.address.clone())).collect(),
        devices: view.devices_of(node).map(|device| device.id).collect(),
    })
}

async fn begin(env: &Env, place: &Place) -> Result<std::fs::File, ClusterError> {
    if Identity::read(&place.dir)?.is_some() {
        return Err(ClusterError::Member(place.dir.clone()));
    }
    let lock = lock_directory(env, &place.dir).await?;
    named(&place.settings)?;
    Ok(lock)
}

struct Named {
    name: Name,
    host: Name,
    rack: Option<Name>,
    zone: Option<Name>,
}

fn named(settings: &Settings) -> Result<Named, ClusterError> {
    let optional = |text: &Option<String>| text.as_deref().map(str::parse).transpose();
    Ok(Named {
        name: settings.name.parse()?,
        host: settings.host.parse()?,
        rack: optional(&settings.rack)?,
        zone: optional(&settings.zone)?,
    })
}

/// The key of a host on its way in: made once, so that a second request is recognised as a repeat.
fn joining_key(dir: &Path) -> Result<Joining, ClusterError> {
    let path = dir.join(JOINING_FILE);
    if let Ok(text) = std::fs::read(&path)
        && let Ok(joining) = serde_json::from_slice(&text)
    {
        return Ok(joining);
    }
    let key = NodeKey::new().map_err(refused)?;
    let joining = Joining { key: key.pem(), public: key.public().to_vec() };
    write_secret(&path, &serde_json::to_vec(&joining).unwrap_or_default())?;
    Ok(joining)
}

/// The replica of a host on its way in; one that was made for another cluster is made anew.
async fn joining_replica(env: &Env, dir: &Path, cluster: ClusterId) -> Result<ReplicaId, ClusterError> {
    let join = async || {
        let files = Arc::new(meta_directory(env, dir).await?);
        let joined = RaftGroup::join(env, files, Arc::new(Mute), GroupOptions::default(), cluster).await;
        Ok::<_, ClusterError>(joined)
    };
    let group = match join().await? {
        Err(FormatError::Exists) => {
            discard(&dir.join("meta"))?;
            join().await??
        }
        joined => joined?,
    };
    group.close().await;
    Ok(group.replica())
}

async fn meta_directory(env: &Env, dir: &Path) -> Result<xsan_env::file::OsDirectory, ClusterError> {
    let path = dir.join("meta");
    let files = xsan_env::file::OsDirectory::open(env, &path).await;
    files.map_err(ClusterError::io(format!("cannot open {}", path.display())))
}

fn discard(path: &Path) -> Result<(), ClusterError> {
    let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(ClusterError::io(format!("cannot remove {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

/// Makes the disks of a node devices: under new ids, or under those that it takes over.
async fn format_devices(
    env: &Env,
    place: &Place,
    cluster: ClusterId,
    node: NodeId,
    taken: &[DeviceId],
) -> Result<(), ClusterError> {
    let buffers = BufPool::new(0, 4 << 20);
    let driver = IoDriver::start(env, &buffers, place.backend).map_err(ClusterError::io("disk I/O"))?;
    let storage = Storage::new(env, driver, &buffers);
    let paths = place.settings.device_paths(&place.dir);
    if !taken.is_empty() && taken.len() != paths.len() {
        return Err(ClusterError::Invalid(format!(
            "the node that is replaced has {} device(s), here are {}",
            taken.len(),
            paths.len()
        )));
    }
    for (number, path) in paths.iter().enumerate() {
        if place.settings.devices.is_empty() {
            // Of an earlier attempt: this directory has never been a member's.
            discard(path)?;
        }
        let create = match place.settings.devices.is_empty() {
            true => Some(place.device_bytes.map_or_else(|| share_of_space(&place.dir, place.sharers), Ok)?),
            false => None,
        };
        let device = taken.get(number).copied().unwrap_or_else(|| DeviceId(env.random_u128()));
        let disk = storage.open_disk(path, create).await?;
        refuse_used(&buffers, &disk, path).await?;
        storage.format(&disk, DeviceIdentity { cluster, node, device }).await?;
    }
    Ok(())
}

/// A disk that holds anything is not touched.
async fn refuse_used(buffers: &BufPool, disk: &Arc<dyn Disk>, path: &Path) -> Result<(), ClusterError> {
    let bytes = usize::try_from(disk.geometry().bytes).unwrap_or(usize::MAX).min(BLANK_BYTES);
    let read = disk.read(0, buffers.get(bytes)).await;
    let read = read.map_err(ClusterError::io(format!("cannot read {}", path.display())))?;
    if read.iter().any(|byte| *byte != 0) {
        return Err(ClusterError::Used(path.to_owned()));
    }
    Ok(())
}
