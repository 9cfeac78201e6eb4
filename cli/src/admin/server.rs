//! Serves the admin API.

use super::api::{
    AddDevice, AddedDevice, ApiError, ChangeVolume, CreatePool, CreateToken, CreateVolume, DeleteVolume, Done,
    DrainNode, JoinToken, RemoveDevice, RemovedDevice, RenameNode, SetAddress, StopNode,
};
use super::status::cluster_status;
use crate::cluster::events::Event;
use crate::cluster::{self, Cluster, moves};
use crate::error::ClusterError;
use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, post};
use axum::{Json, Router};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use raft_meta::{AckPolicy, AddressCommand, Command, MetaError, Name, NodeState, Outcome, ServiceAddress};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use xsan_env::net::Listener;
use xsan_placement::DeviceState;
use xsan_types::{BLOCK_BYTES, DeviceId, ErrorKind, NodeId};

/// What requests are answered from.
#[derive(Clone)]
pub struct Admin {
    /// The cluster.
    pub cluster: Arc<dyn Cluster>,
    /// NBD addresses, for people.
    pub nbd: Arc<Vec<String>>,
}

type Answer<T> = Result<Json<T>, Refusal>;

/// An error on its way to a client.
struct Refusal(ClusterError);

impl<E: Into<ClusterError>> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// The name of a kind in the API and in docs/errors.md.
#[must_use]
pub fn kind_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Invalid => "invalid",
        ErrorKind::NotFound => "not_found",
        ErrorKind::Exists => "exists",
        ErrorKind::NoSpace => "no_space",
        ErrorKind::Unavailable => "unavailable",
        ErrorKind::Fenced => "fenced",
        ErrorKind::Corrupt => "corrupt",
        ErrorKind::Closed => "closed",
        _ => "internal",
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let kind = self.0.kind();
        let status = match kind {
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Exists | ErrorKind::Fenced => StatusCode::CONFLICT,
            ErrorKind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            ErrorKind::Unavailable | ErrorKind::Closed => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let error =
            ApiError { kind: kind_name(kind).into(), message: self.0.to_string(), next_step: self.0.next_step() };
        (status, Json(error)).into_response()
    }
}

/// Accepts connections until the task is aborted.
pub async fn serve(admin: Admin, listener: Listener) {
    let env = admin.cluster.env().clone();
    let router = router(admin);
    loop {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "admin socket");
                env.sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        drop(env.spawn("admin connection", async move {
            let served = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            if let Err(error) = served.await {
                tracing::debug!(%error, "admin connection");
            }
        }));
    }
}

fn router(admin: Admin) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/events", get(events))
        .route("/v1/pools", post(create_pool))
        .route("/v1/pools/{name}", axum::routing::delete(delete_pool))
        .route("/v1/volumes", post(create_volume))
        .route("/v1/volumes/{name}", patch(change_volume).delete(delete_volume))
        .route("/v1/volumes/{name}/attach", post(attach_volume))
        .route("/v1/volumes/{name}/standby", post(stand_by))
        .route("/v1/volumes/{name}/address", post(set_address))
        .route("/v1/tokens", post(create_token))
        .route("/v1/nodes/{name}", patch(rename_node).delete(remove_node))
        .route("/v1/nodes/{name}/drain", post(drain_node))
        .route("/v1/devices", post(add_device))
        .route("/v1/devices/{id}", axum::routing::delete(remove_device))
        .route("/v1/nodes/{name}/stop", post(stop_node))
        .route("/v1/nodes/{name}/start", post(start_node))
        .route("/metrics", get(metrics))
        .layer(axum::middleware::from_fn_with_state(admin.clone(), catch_up))
        .with_state(admin)
}

/// Whoever changes something on one node and goes on on another one finds what it did. Without an answer of the metadata the
/// change itself says so.
async fn catch_up(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    if request.method() != axum::http::Method::GET {
        admin.cluster.catch_up().await;
    }
    next.run(request).await
}

async fn status(State(admin): State<Admin>) -> Answer<super::api::ClusterStatus> {
    Ok(Json(cluster_status(&*admin.cluster, &admin.nbd).await))
}

/// What is asked of the events.
#[derive(serde::Deserialize)]
struct EventsQuery {
    /// Only events after this number.
    #[serde(default)]
    after: u64,
    /// Seconds to wait for the first one.
    #[serde(default)]
    wait: u64,
}

async fn events(State(admin): State<Admin>, Query(query): Query<EventsQuery>) -> Answer<Vec<Event>> {
    let patience = Duration::from_secs(query.wait.min(60));
    Ok(Json(admin.cluster.events().after(admin.cluster.env(), query.after, patience).await))
}

async fn metrics(State(admin): State<Admin>) -> String {
    admin.cluster.registry().prometheus()
}

async fn create_pool(State(admin): State<Admin>, Json(request): Json<CreatePool>) -> Answer<Done> {
    let name = request.name.unwrap_or_else(|| free_name(&*admin.cluster, request.scheme));
    cluster::create_pool(&*admin.cluster, &name, request.scheme).await?;
    Ok(Json(Done {}))
}

/// `ec-4-2`, `replica-3`, with a number behind it if it is taken.
fn free_name(cluster: &dyn Cluster, scheme: xsan_types::Scheme) -> String {
    let base = if scheme.is_replica() {
        format!("replica-{}", scheme.width())
    } else {
        format!("ec-{}-{}", scheme.k(), scheme.tolerates())
    };
    let view = cluster.view();
    let numbered = (2..).map(|number| format!("{base}-{number}"));
    std::iter::once(base.clone()).chain(numbered).find(|name| view.pool_named(name).is_none()).expect("endless names")
}

async fn delete_pool(State(admin): State<Admin>, Path(name): Path<String>) -> Answer<Done> {
    cluster::delete_pool(&*admin.cluster, &name).await?;
    Ok(Json(Done {}))
}

async fn create_volume(State(admin): State<Admin>, Json(request): Json<CreateVolume>) -> Answer<Done> {
    let view = admin.cluster.view();
    let pool = match &request.pool {
        Some(name) => view.pool_named(name).ok_or_else(|| ClusterError::NoPool(name.clone()))?,
        None => match view.pool_named("default").or_else(|| view.pools.values().next()) {
            Some(pool) => pool,
            None => return Err(ClusterError::NoPool("default".into()).into()),
        },
    };
    let ack = match request.ack.as_deref() {
        None => None,
        Some("replicated") => Some(AckPolicy::Replicated),
        Some("persisted") => Some(AckPolicy::Persisted),
        Some(other) => {
            return Err(ClusterError::Invalid(format!("ack is replicated or persisted, not {other:?}")).into());
        }
    };
    let size = request.size.checked_next_multiple_of(BLOCK_BYTES).unwrap_or(u64::MAX);
    let name: Name = request.name.parse().map_err(ClusterError::from)?;
    let place = request.address.as_ref().and_then(|asked| service_address(asked).transpose()).transpose()?;
    if let Some(place) = &place {
        admin.cluster.check_address(request.name.clone(), place.clone()).await?;
        refuse_taken(&admin, place)?;
    }
    let made = admin.cluster.propose(Command::CreateVolume { name, pool: pool.id, size, ack }).await?;
    if let (Some(place), Outcome::Volume(volume)) = (place, made) {
        let command = AddressCommand::Set { volume, place: Some(place) };
        admin.cluster.propose(Command::ServiceAddress(command)).await?;
    }
    Ok(Json(Done {}))
}

/// What is asked for, if it is an address.
fn service_address(asked: &SetAddress) -> Result<Option<ServiceAddress>, ClusterError> {
    let Some(text) = &asked.address else { return Ok(None) };
    let mut place: ServiceAddress = text.parse().map_err(|error| ClusterError::Invalid(format!("{error}")))?;
    place.interface.clone_from(&asked.interface);
    if !place.is_usable() {
        let text = format!("{:?} is no name of an interface", place.interface.unwrap_or_default());
        return Err(ClusterError::Invalid(text));
    }
    Ok(Some(place))
}

/// Before a volume is made for it; whoever comes in between is refused by the metadata.
fn refuse_taken(admin: &Admin, place: &ServiceAddress) -> Result<(), ClusterError> {
    let view = admin.cluster.view();
    let taken = view.addresses.iter().find(|(_, record)| record.place.address == place.address);
    taken.map_or(Ok(()), |(volume, _)| Err(MetaError::AddressTaken(*volume).into()))
}

async fn set_address(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    Json(request): Json<SetAddress>,
) -> Answer<Done> {
    let view = admin.cluster.view();
    let volume = view.volume_named(&name).ok_or_else(|| ClusterError::NoVolume(name.clone()))?.id;
    let place = service_address(&request)?;
    if let Some(place) = &place {
        admin.cluster.check_address(name, place.clone()).await?;
    }
    admin.cluster.propose(Command::ServiceAddress(AddressCommand::Set { volume, place })).await?;
    Ok(Json(Done {}))
}

async fn change_volume(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    Json(request): Json<ChangeVolume>,
) -> Answer<Done> {
    let view = admin.cluster.view();
    let volume = view.volume_named(&name).ok_or_else(|| ClusterError::NoVolume(name.clone()))?;
    let (id, old) = (volume.id, volume.register().size);
    if let Some(size) = request.size {
        let size = size.checked_next_multiple_of(BLOCK_BYTES).unwrap_or(u64::MAX);
        if size < old && !request.shrink {
            let text = format!("{name:?} has {old} bytes: making it smaller discards what lies beyond; say --shrink");
            return Err(ClusterError::Invalid(text).into());
        }
        admin.cluster.resize(name, size).await?;
    }
    if let Some(new) = request.name {
        let new_name: Name = new.parse().map_err(ClusterError::from)?;
        admin.cluster.propose(Command::RenameVolume { volume: id, name: new_name }).await?;
        admin.cluster.renamed(id, &new);
    }
    Ok(Json(Done {}))
}

async fn delete_volume(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    Json(request): Json<DeleteVolume>,
) -> Answer<Done> {
    to_its_end(admin.clone(), async move {
        admin.cluster.delete_volume(name, request.force).await?;
        Ok(Json(Done {}))
    })
    .await
}

async fn attach_volume(State(admin): State<Admin>, Path(name): Path<String>) -> Answer<Done> {
    to_its_end(admin.clone(), async move {
        admin.cluster.attach(name).await?;
        Ok(Json(Done {}))
    })
    .await
}

async fn stand_by(State(admin): State<Admin>, Path(name): Path<String>) -> Answer<Done> {
    admin.cluster.stand_by(name).await?;
    Ok(Json(Done {}))
}

async fn create_token(State(admin): State<Admin>, Json(request): Json<CreateToken>) -> Answer<JoinToken> {
    let token = admin.cluster.join_token(Duration::from_secs(request.seconds), request.uses).await?;
    Ok(Json(JoinToken { token }))
}

fn find_node(admin: &Admin, name: &str) -> Result<NodeId, ClusterError> {
    admin.cluster.view().node_named(name).map(|node| node.id).ok_or_else(|| ClusterError::NoNode(name.to_owned()))
}

async fn rename_node(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    Json(request): Json<RenameNode>,
) -> Answer<Done> {
    let node = find_node(&admin, &name)?;
    let name: Name = request.name.parse().map_err(ClusterError::from)?;
    admin.cluster.propose(Command::RenameNode { node, name }).await?;
    Ok(Json(Done {}))
}

async fn remove_node(State(admin): State<Admin>, Path(name): Path<String>) -> Answer<Done> {
    let node = find_node(&admin, &name)?;
    let state = admin.cluster.view().node(node).map(|node| node.state);
    if state.is_some_and(cluster::maps::answers) {
        return Err(ClusterError::Invalid(format!("node {name} is up: stop it before it is removed")).into());
    }
    admin.cluster.propose(Command::SetNodeState { node, state: NodeState::Removed }).await?;
    Ok(Json(Done {}))
}

async fn drain_node(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    Json(request): Json<DrainNode>,
) -> Answer<Done> {
    let node = find_node(&admin, &name)?;
    let devices: BTreeSet<DeviceId> = admin.cluster.view().devices_of(node).map(|device| device.id).collect();
    if !request.cancel {
        moves::check_without(&admin.cluster.facts().await, &devices)?;
    }
    let state = if request.cancel { DeviceState::In } else { DeviceState::Out };
    for device in devices {
        admin.cluster.propose(Command::SetDeviceState { device, state }).await?;
    }
    Ok(Json(Done {}))
}

fn find_device(admin: &Admin, id: &str) -> Result<DeviceId, ClusterError> {
    let view = admin.cluster.view();
    // The beginning of an id is enough where it is the only one.
    let mut named = view.devices.keys().filter(|device| device.to_string().starts_with(id));
    match (named.next(), named.next()) {
        (Some(device), None) if !id.is_empty() => Ok(*device),
        (Some(_), Some(_)) => Err(ClusterError::Invalid(format!("several devices begin with {id:?}: name more of it"))),
        _ => Err(ClusterError::NoDevice(id.to_owned())),
    }
}

async fn add_device(State(admin): State<Admin>, Json(request): Json<AddDevice>) -> Answer<AddedDevice> {
    let replaced = request.replaces.as_deref().map(|id| find_device(&admin, id)).transpose()?;
    let (done, added) = tokio::sync::oneshot::channel();
    let cluster = Arc::clone(&admin.cluster);
    // A client that hangs up must not leave it half done.
    drop(admin.cluster.env().spawn("add device", async move {
        let _ = done.send(cluster.add_device(request.path).await);
    }));
    let device = added.await.map_err(|_| ClusterError::Closing)??;
    if let Some(replaced) = replaced {
        moves::check_without(&admin.cluster.facts().await, &BTreeSet::from([replaced]))?;
        admin.cluster.propose(Command::SetDeviceState { device: replaced, state: DeviceState::Out }).await?;
    }
    Ok(Json(AddedDevice { device: device.to_string() }))
}

async fn remove_device(
    State(admin): State<Admin>,
    Path(id): Path<String>,
    Json(request): Json<RemoveDevice>,
) -> Answer<RemovedDevice> {
    let device = find_device(&admin, &id)?;
    match admin.cluster.propose(Command::RemoveDevice { device }).await {
        Ok(_) => Ok(Json(RemovedDevice::Removed)),
        Err(ClusterError::Meta(MetaError::DeviceInUse(_))) => {
            let facts = admin.cluster.facts().await;
            moves::check_without(&facts, &BTreeSet::from([device]))?;
            if request.lost && !facts.view.lost_devices.contains(&device) {
                if !facts.is_missing(device) {
                    let text = format!("device {device} is served by its node: remove it without `lost`");
                    return Err(ClusterError::Invalid(text).into());
                }
                admin.cluster.propose(Command::LoseDevice { device }).await?;
            } else {
                admin.cluster.propose(Command::SetDeviceState { device, state: DeviceState::Out }).await?;
            }
            Ok(Json(RemovedDevice::Leaving))
        }
        Err(error) => Err(error.into()),
    }
}

/// Runs a change of several steps as a task: a client that hangs up must not leave it half done.
async fn to_its_end(admin: Admin, change: impl Future<Output = Answer<Done>> + Send + 'static) -> Answer<Done> {
    let (done, outcome) = tokio::sync::oneshot::channel();
    drop(admin.cluster.env().spawn("admin-change", async move {
        let _ = done.send(change.await);
    }));
    match outcome.await {
        Ok(answer) => answer,
        Err(_) => Err(ClusterError::Invalid("the change ended without an answer".into()).into()),
    }
}

async fn stop_node(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    Json(request): Json<StopNode>,
) -> Answer<Done> {
    to_its_end(admin.clone(), async move {
        admin.cluster.stop_node(name, request.crash).await?;
        Ok(Json(Done {}))
    })
    .await
}

async fn start_node(State(admin): State<Admin>, Path(name): Path<String>) -> Answer<Done> {
    to_its_end(admin.clone(), async move {
        admin.cluster.start_node(name).await?;
        Ok(Json(Done {}))
    })
    .await
}
