//! Serves the admin API.

use super::api::{ApiError, ChangeVolume, CreatePool, CreateVolume, DeleteVolume, Done, StopNode};
use super::status::cluster_status;
use crate::cluster::DevCluster;
use crate::error::ClusterError;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, post};
use axum::{Json, Router};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use raft_meta::{AckPolicy, Command, Name};
use std::sync::Arc;
use xsan_env::net::Listener;
use xsan_gateway::server::Server;
use xsan_types::{BLOCK_BYTES, ErrorKind, VolumeId};

/// What requests are answered from.
#[derive(Clone)]
pub struct Admin {
    /// The cluster.
    pub cluster: Arc<DevCluster>,
    /// Its NBD gateway.
    pub gateway: Server,
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
        .route("/v1/pools", post(create_pool))
        .route("/v1/pools/{name}", axum::routing::delete(delete_pool))
        .route("/v1/volumes", post(create_volume))
        .route("/v1/volumes/{name}", patch(change_volume).delete(delete_volume))
        .route("/v1/nodes/{name}/stop", post(stop_node))
        .route("/v1/nodes/{name}/start", post(start_node))
        .route("/metrics", get(metrics))
        .with_state(admin)
}

async fn status(State(admin): State<Admin>) -> Answer<super::api::ClusterStatus> {
    Ok(Json(cluster_status(&admin.cluster, &admin.gateway, &admin.nbd).await))
}

async fn metrics(State(admin): State<Admin>) -> String {
    admin.cluster.registry().prometheus()
}

async fn create_pool(State(admin): State<Admin>, Json(request): Json<CreatePool>) -> Answer<Done> {
    let name = request.name.unwrap_or_else(|| free_name(&admin.cluster, request.scheme));
    admin.cluster.create_pool(&name, request.scheme).await?;
    Ok(Json(Done {}))
}

/// `ec-4-2`, `replica-3`, with a number behind it if it is taken.
fn free_name(cluster: &DevCluster, scheme: xsan_types::Scheme) -> String {
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
    admin.cluster.delete_pool(&name).await?;
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
    admin.cluster.propose(Command::CreateVolume { name, pool: pool.id, size, ack }).await?;
    Ok(Json(Done {}))
}

fn find_volume(admin: &Admin, name: &str) -> Result<(VolumeId, xsan_types::PoolId, u64), ClusterError> {
    let view = admin.cluster.view();
    let volume = view.volume_named(name).ok_or_else(|| ClusterError::NoVolume(name.to_owned()))?;
    Ok((volume.id, volume.pool, volume.register().size))
}

async fn change_volume(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    Json(request): Json<ChangeVolume>,
) -> Answer<Done> {
    let (id, _, old) = find_volume(&admin, &name)?;
    if let Some(size) = request.size {
        let size = size.checked_next_multiple_of(BLOCK_BYTES).unwrap_or(u64::MAX);
        if size < old && !request.shrink {
            let text = format!("{name:?} has {old} bytes: making it smaller discards what lies beyond; say --shrink");
            return Err(ClusterError::Invalid(text).into());
        }
        let attached = admin.cluster.volumes().attach(&name).await?;
        attached.volume.resize(size).await?;
    }
    if let Some(new) = request.name {
        let new_name: Name = new.parse().map_err(ClusterError::from)?;
        admin.cluster.propose(Command::RenameVolume { volume: id, name: new_name }).await?;
        admin.cluster.volumes().renamed(id, &new);
    }
    Ok(Json(Done {}))
}

async fn delete_volume(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    Json(request): Json<DeleteVolume>,
) -> Answer<Done> {
    let (id, pool, _) = find_volume(&admin, &name)?;
    let clients = admin.gateway.clients(&name).len();
    if clients > 0 && !request.force {
        return Err(ClusterError::InUse { name, clients }.into());
    }
    to_its_end(admin.clone(), async move {
        admin.cluster.volumes().delete(id, pool).await?;
        admin.gateway.disconnect(&name).await;
        Ok(Json(Done {}))
    })
    .await
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
        admin.cluster.stop_node(&name, request.crash).await?;
        Ok(Json(Done {}))
    })
    .await
}

async fn start_node(State(admin): State<Admin>, Path(name): Path<String>) -> Answer<Done> {
    to_its_end(admin.clone(), async move {
        admin.cluster.start_node(&name).await?;
        Ok(Json(Done {}))
    })
    .await
}
