//! From a request's frame to the running call, and from its outcome to the answer.

use crate::codec::{Reader, WireVersion, Writer};
use crate::frame::{Frame, Header, Kind, Output};
use crate::message::{NodeAnswer, NodeRequest, put_error};
use crate::node::{CreatedMember, DeviceStatus, NodeApi, NodeError, NodeResult, ShardInfo};
use crate::payload::Payload;
use crate::service::{PeerInfo, ServiceError, ServiceId, Services, Status};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Buf, BufPool};
use xsan_types::ClosedMember;

/// A call that runs. The node's own future, without a box around it.
pub(super) enum Running {
    Done(NodeResult<()>),
    Devices(NodeResult<Vec<DeviceStatus>>),
    Created(NodeResult<CreatedMember>),
    Length(NodeResult<u64>),
    Closed(NodeResult<Vec<ClosedMember>>),
    Bytes(NodeResult<Buf>),
    Shard(NodeResult<ShardInfo>),
    Shards(NodeResult<Vec<ShardInfo>>),
    Service(BoxFuture<'static, Result<Vec<u8>, ServiceError>>),
}

/// What a call came to.
pub(super) enum Outcome {
    Node(Result<NodeAnswer, NodeError>),
    Service(Result<Vec<u8>, ServiceError>),
    /// Not begun at all.
    Refused(Status),
}

impl Future for Running {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        macro_rules! node {
            ($future:ident, $wrap:expr) => {
                $future.as_mut().poll(context).map(|outcome| Outcome::Node(outcome.map($wrap)))
            };
        }
        match &mut *self {
            Self::Done(future) => node!(future, |()| NodeAnswer::Done),
            Self::Devices(future) => node!(future, NodeAnswer::Devices),
            Self::Created(future) => node!(future, NodeAnswer::Created),
            Self::Length(future) => node!(future, NodeAnswer::Length),
            Self::Closed(future) => node!(future, NodeAnswer::Closed),
            Self::Bytes(future) => node!(future, NodeAnswer::Bytes),
            Self::Shard(future) => node!(future, NodeAnswer::Shard),
            Self::Shards(future) => node!(future, NodeAnswer::Shards),
            Self::Service(future) => future.as_mut().poll(context).map(Outcome::Service),
        }
    }
}

/// Begins what a request asks for.
///
/// # Errors
/// [`Status`]: nothing was begun; the connection is fine.
pub(super) fn begin(services: &Services, peer: &PeerInfo, frame: Frame<'_>, pool: &BufPool) -> Result<Running, Status> {
    let Header { service, code: operation, deadline_ms, .. } = frame.header;
    if service == ServiceId::NODE.0 {
        let node = services.node.as_ref().ok_or(Status::NotOffered)?;
        let input = Reader::new(frame.meta, peer.version);
        let request = NodeRequest::get(operation, input, frame.payload, pool).map_err(|error| {
            tracing::warn!(node = %peer.node, operation, %error, "a request makes no sense");
            Status::Malformed
        })?;
        return Ok(call(&**node, request.ok_or(Status::NotOffered)?));
    }
    let service = services.others.get(&service).ok_or(Status::NotOffered)?;
    if frame.payload.bytes() > 0 {
        return Err(Status::Malformed);
    }
    let deadline = Duration::from_millis(deadline_ms.into());
    Ok(Running::Service(service.request(peer, operation, frame.meta, deadline)))
}

/// Hands on a one-way message. One to a service that is not here is lost, as any may be.
pub(super) fn message(services: &Services, peer: &PeerInfo, frame: &Frame<'_>) {
    match services.others.get(&frame.header.service) {
        Some(service) => service.message(peer, frame.header.code, frame.meta),
        None => tracing::debug!(node = %peer.node, service = frame.header.service, "a message to nobody"),
    }
}

fn call(node: &dyn NodeApi, request: NodeRequest) -> Running {
    use NodeRequest as Ask;
    match request {
        Ask::Devices => Running::Devices(node.devices()),
        Ask::CreateMember(request) => Running::Created(node.create_member(request)),
        Ask::Append { member, segment, offset, data } => Running::Length(node.append(member, segment, offset, data)),
        Ask::Flush(request) => Running::Done(node.flush(request)),
        Ask::Confirm(member) => Running::Done(node.confirm(member)),
        Ask::Close { device, volume, generation } => Running::Closed(node.close(device, volume, generation)),
        Ask::ReadReplica { device, volume, set, segment, offset, length } => {
            Running::Bytes(node.read_replica(device, volume, set, segment, offset, length))
        }
        Ask::Sealed { member, segment } => Running::Done(node.sealed(member, segment)),
        Ask::TrimManifest { member, border, undecided } => Running::Done(node.trim_manifest(member, border, undecided)),
        Ask::Registered(view) => Running::Done(node.registered(view)),
        Ask::PutShard(request) => Running::Done(node.put_shard(request)),
        Ask::ReadShard { device, shard, offset, length } => {
            Running::Bytes(node.read_shard(device, shard, offset, length))
        }
        Ask::RepairShard { device, shard, offset, data } => {
            Running::Done(node.repair_shard(device, shard, offset, data))
        }
        Ask::ShardInfo { device, shard } => Running::Shard(node.shard_info(device, shard)),
        Ask::VerifyShard { device, shard } => Running::Done(node.verify_shard(device, shard)),
        Ask::DeleteSegments(segments) => Running::Done(node.delete_segments(segments)),
        Ask::ListShards { device, volume, after, limit } => {
            Running::Shards(node.list_shards(device, volume, after, limit))
        }
        Ask::AppendShard { device, incarnation, shard, offset, data } => {
            Running::Length(node.append_shard(device, incarnation, shard, offset, data))
        }
        Ask::HoldShard(request) => Running::Done(node.hold_shard(request)),
        Ask::FinishShard { device, incarnation, shard, bytes, hash } => {
            Running::Done(node.finish_shard(device, incarnation, shard, bytes, hash))
        }
    }
}

/// Queues the answer to request `id` of `service`.
pub(super) fn answer(output: &mut Output, version: WireVersion, service: u8, id: u64, outcome: Outcome) {
    let header = |status: Status| Header { service, code: status as u16, id, ..Header::of(Kind::Answer) };
    let pushed = match outcome {
        Outcome::Node(Ok(mut answer)) => {
            let payload = answer.take_payload();
            output.push(&header(Status::Done), payload, |out| answer.put(&mut Writer::new(out, version)))
        }
        Outcome::Node(Err(error)) => {
            output.push(&header(Status::Failed), Payload::None, |out| put_error(&error, &mut Writer::new(out, version)))
        }
        Outcome::Service(Ok(body)) => {
            output.push(&header(Status::Done), Payload::None, |out| out.extend_from_slice(&body))
        }
        Outcome::Service(Err(error)) => output.push(&header(error.into()), Payload::None, |_| {}),
        Outcome::Refused(status) => output.push(&header(status), Payload::None, |_| {}),
    };
    if !pushed {
        tracing::error!(service, "an answer is longer than a frame may be");
        output.push(&header(Status::TooLarge), Payload::None, |_| {});
    }
}
