//! How a host becomes a node: by making a cluster, or by joining one with a token (RFC 0005).
//!
//! Layout of a node's directory: `xsan.toml` (settings), `identity.json` (who it is; without it the directory is of no member), `lock`,
//! `pid`, `meta/` (its replica of the metadata), `device.img` if no device is named, `index-DEVICE/` per device, `admin.sock`,
//! `nbd.sock`. `joining.json` holds the key of a host on its way in, so that a join that was cut short can be asked for again.

use super::devices::refuse_used;
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
use xsan_env::{BufPool, Env, Stream};
use xsan_node::DeviceIdentity;
use xsan_types::{ClusterId, DeviceId, ErrorKind, NodeId};
use xsan_wire::join::{JoinService, JoinToken};
use xsan_wire::{Ca, NodeKey};

/// How long a token is good, if nobody says otherwise.
pub const TOKEN_FOR: Duration = Duration::from_secs(3600);
/// How many nodes a token lets in, if nobody says otherwise.
pub const TOKEN_USES: u32 = 16;
/// How long the cluster has to let a host in.
const JOIN_FOR: Duration = Duration::from_secs(30);
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
    Refused {
        message: String,
        /// Another host of the cluster may be able to answer.
        #[serde(default)]
        retry: bool,
    },
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
                Ok(JoinAnswer::Refused { message, retry }) => {
                    last = refused(format!("{peer} refuses: {message}"));
                    if !retry {
                        break;
                    }
                }
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
                    // It is cut off from the majority, or closing: that says nothing about the host.
                    let retry = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Closed);
                    JoinAnswer::Refused { message: error.to_string(), retry }
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
    let node = propose_node(host.group(), candidacy).await?;
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

/// Has the cluster admit a host that shows what lets it in. What anybody could send does not reach the log.
async fn propose_node(consensus: &dyn Consensus, candidacy: Candidacy) -> Result<NodeId, ClusterError> {
    if consensus.view().check_candidacy(&candidacy).is_err() {
        // The token, or the node that it let in, may be younger than what this replica knows.
        consensus.read_barrier().await?;
        consensus.view().check_candidacy(&candidacy)?;
    }
    match consensus.propose(Command::AdmitNode(candidacy)).await? {
        Outcome::Node(node) => Ok(node),
        _ => Err(ClusterError::Invalid("the metadata answered another command".into())),
    }
}

async fn begin(env: &Env, place: &Place) -> Result<std::fs::File, ClusterError> {
    let lock = lock_directory(env, &place.dir).await?;
    // Whoever had the lock before may have made it a member's.
    if Identity::read(&place.dir)?.is_some() {
        return Err(ClusterError::Member(place.dir.clone()));
    }
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
        if place.settings.devices.is_none() {
            // Of an earlier attempt: this directory has never been a member's.
            discard(path)?;
        }
        let create = match place.settings.devices.is_none() {
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

#[cfg(test)]
mod tests {
    use super::*;
    use raft_meta::MetaError;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::watch;
    use xsan_env::{Listener, OsRuntime};
    use xsan_wire::{Endpoint, Server, Services, Tls};

    const CLUSTER: ClusterId = ClusterId(0xc1);
    const SECRET: [u8; 32] = [7; 32];

    /// A replica that knows what its group does only after a barrier.
    struct Late {
        view: Mutex<Arc<MetaState>>,
        newest: Arc<MetaState>,
        proposed: AtomicUsize,
    }

    impl Late {
        fn new() -> Self {
            let mut newest = MetaState::new(CLUSTER, true);
            let view = Mutex::new(Arc::new(newest.clone()));
            let token = TokenRecord { secret_hash: SECRET, expires_millis: 1_000, uses_left: 1 };
            newest.apply(&Command::AddToken { number: 1, token, now_millis: 0 }).expect("added");
            Self { view, newest: Arc::new(newest), proposed: AtomicUsize::new(0) }
        }
    }

    impl Consensus for Late {
        fn propose(&self, _: Command) -> BoxFuture<'static, Result<Outcome, MetaError>> {
            self.proposed.fetch_add(1, Ordering::Relaxed);
            Box::pin(async { Ok(Outcome::Node(NodeId(1))) })
        }

        fn read_barrier(&self) -> BoxFuture<'static, Result<u64, MetaError>> {
            *self.view.lock().expect("not poisoned") = Arc::clone(&self.newest);
            Box::pin(async { Ok(1) })
        }

        fn view(&self) -> Arc<MetaState> {
            Arc::clone(&self.view.lock().expect("not poisoned"))
        }

        fn subscribe(&self) -> watch::Receiver<u64> {
            unreachable!("nobody follows it")
        }

        fn snapshot(&self) -> BoxFuture<'static, Result<u64, MetaError>> {
            unreachable!("nobody asks for one")
        }
    }

    fn candidacy(secret_hash: [u8; 32]) -> Candidacy {
        Candidacy {
            token: Some(ShownToken { number: 1, secret_hash }),
            now_millis: 10,
            name: "a".parse().expect("a name"),
            host: "a".parse().expect("a name"),
            rack: None,
            zone: None,
            address: "a:7400".into(),
            public_key: vec![1],
            replica: 5,
            replaces: false,
        }
    }

    #[tokio::test]
    async fn a_token_that_lets_nobody_in_never_reaches_the_log() {
        let group = Late::new();
        let error = propose_node(&group, candidacy([8; 32])).await.expect_err("refused");
        assert_eq!(error.to_string(), MetaError::TokenUnknown.to_string());
        let long = Candidacy { address: "x".repeat(256), ..candidacy(SECRET) };
        let error = propose_node(&group, long).await.expect_err("refused");
        assert_eq!(error.to_string(), MetaError::TextTooLong.to_string());
        assert_eq!(group.proposed.load(Ordering::Relaxed), 0);
        // A token that this replica has not heard of yet is looked for once more.
        let group = Late::new();
        assert_eq!(propose_node(&group, candidacy(SECRET)).await.expect("admitted"), NodeId(1));
        assert_eq!(group.proposed.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn who_waited_for_the_lock_sees_what_was_made_meanwhile() {
        let env = OsRuntime::current();
        let dir = std::env::temp_dir().join(format!("xsan-founding-{}", std::process::id()));
        let settings = Settings {
            name: "n1".into(),
            host: "h1".into(),
            rack: None,
            zone: None,
            listen: "127.0.0.1:7400".parse().expect("an address"),
            address: "h1:7400".into(),
            nbd: None,
            service_interface: None,
            socket_mode: "660".into(),
            socket_group: None,
            devices: None,
            workers: 1,
        };
        let place = Place { dir: dir.clone(), settings, device_bytes: None, sharers: 1, backend: Backend::Auto };
        let lock = begin(&env, &place).await.expect("free");
        let first = async {
            env.sleep(Duration::from_millis(100)).await;
            let identity = Identity {
                cluster: CLUSTER,
                node: NodeId(1),
                authority: String::new(),
                certificate: String::new(),
                key: String::new(),
                peers: BTreeMap::new(),
            };
            identity.write(&dir).expect("written");
            drop(lock);
        };
        let (second, ()) = futures::join!(begin(&env, &place), first);
        assert!(matches!(second, Err(ClusterError::Member(_))), "{second:?}");
        std::fs::remove_dir_all(dir).expect("removed");
    }

    /// Answers every host the same.
    struct Desk(JoinAnswer);

    impl JoinService for Desk {
        fn join(&self, _request: Vec<u8>, _from: String) -> BoxFuture<'static, Vec<u8>> {
            let answer = serde_json::to_vec(&self.0).expect("JSON");
            Box::pin(async move { answer })
        }
    }

    async fn desk(env: &Env, ca: &Ca, answer: JoinAnswer) -> String {
        let (node, key) = (NodeId(1), NodeKey::new().expect("a key"));
        let certificate = ca.issue(node, key.public()).expect("a certificate");
        let tls = Tls::new(env, CLUSTER, ca.certificate_pem(), &certificate, &key.pem()).expect("usable");
        let endpoint = Endpoint::new(env, BufPool::new(0, 4 << 20), CLUSTER, node).with_tls(tls);
        let server = Server::new(&endpoint, Services::new().with_join(Arc::new(Desk(answer))));
        let listener = Listener::tcp("127.0.0.1:0".parse().expect("an address")).await.expect("listening");
        let address = listener.tcp_address().expect("an address").to_string();
        drop(env.spawn("desk", async move { server.serve(listener).await }));
        address
    }

    #[tokio::test]
    async fn a_host_that_cannot_answer_now_does_not_end_a_join() {
        let env = OsRuntime::current();
        let ca = Ca::new(CLUSTER).expect("a CA");
        let token = JoinToken::new(CLUSTER, ca.certificate_pem(), 1).expect("a token");
        let refusal = |retry| JoinAnswer::Refused { message: "no".into(), retry };
        let admitted = Admitted {
            node: NodeId(7),
            authority: String::new(),
            certificate: String::new(),
            peers: BTreeMap::new(),
            devices: Vec::new(),
        };
        let cut_off = desk(&env, &ca, refusal(true)).await;
        let refusing = desk(&env, &ca, refusal(false)).await;
        let open = desk(&env, &ca, JoinAnswer::Admitted(admitted)).await;
        let request = JoinRequest {
            version: 1,
            number: token.number(),
            secret: token.secret(),
            name: "a".parse().expect("a name"),
            host: "a".parse().expect("a name"),
            rack: None,
            zone: None,
            address: "a:7400".into(),
            public_key: vec![1],
            replica: 5,
            replaces: false,
        };
        let ask = async |peers: &[&String]| {
            let peers: Vec<String> = peers.iter().map(|&peer| peer.clone()).collect();
            ask_peers(&env, &token, &peers, &request).await.map(|admitted| admitted.node)
        };
        assert_eq!(ask(&[&cut_off, &open]).await.expect("admitted"), NodeId(7));
        let error = ask(&[&refusing, &open]).await.expect_err("refused").to_string();
        assert!(error.contains(&format!("{refusing} refuses: no")), "{error}");
        let error = ask(&[&cut_off]).await.expect_err("refused").to_string();
        assert!(error.contains(&format!("{cut_off} refuses: no")), "{error}");
        // What a release before says is the last word.
        let before = serde_json::from_str(r#"{"Refused":{"message":"no"}}"#).expect("readable");
        assert!(matches!(before, JoinAnswer::Refused { retry: false, .. }));
    }

    #[tokio::test]
    async fn a_desk_that_closes_says_that_others_may_answer() {
        let answer = JoinDesk(Weak::new()).join(Vec::new(), "somewhere".into()).await;
        let answer = serde_json::from_slice(&answer).expect("readable");
        assert!(matches!(answer, JoinAnswer::Refused { retry: true, .. }));
    }
}
