//! Journal calls, passed on to the node of the member's device. The node's call starts before ours returns.

use crate::view::{Link, View};
use lsm_block::store::{NewMember, StoreError, StoreResult};
use std::sync::Arc;
use xsan_env::Buf;
use xsan_types::{
    ClosedMember, DeviceId, FlushRequest, Generation, MemberRef, RegisterView, SealedSegment, SegmentName, SetId,
    ShardId, VolumeId,
};
use xsan_wire::node::{CreateMember, NodeApi, NodeError, NodeResult};

/// Shards asked for at once.
const LIST_MAX: u32 = 1024;

/// What a node's refusal means to a volume's owner. A member that is not where it was is as good as closed (P3).
fn member_error(device: DeviceId, error: &NodeError) -> StoreError {
    match error {
        NodeError::Closed | NodeError::NotLive { .. } | NodeError::NotFound => StoreError::Closed { device },
        NodeError::NoSpace => StoreError::NoSpace,
        NodeError::Invalid => StoreError::Internal,
        _ => StoreError::Unavailable { device },
    }
}

/// A refusal that is an answer of its own kind, not a statement about a member.
fn read_error(device: DeviceId, segment: SegmentName, offset: u64, error: &NodeError) -> StoreError {
    match error {
        NodeError::NotFound => StoreError::NotFound,
        NodeError::Corrupt => StoreError::Corrupt { segment, offset },
        other => member_error(device, other),
    }
}

/// Calls the node of `device` and maps its refusals.
fn call<T: Send + 'static, U: Send + 'static>(
    view: &View,
    device: DeviceId,
    start: impl FnOnce(&Link) -> NodeResult<T>,
    map: impl FnOnce(T) -> U + Send + 'static,
) -> StoreResult<U> {
    match view.link(device) {
        Some(link) => {
            let answer = start(link);
            Box::pin(async move { answer.await.map(map).map_err(|error| member_error(device, &error)) })
        }
        None => Box::pin(std::future::ready(Err(StoreError::Unavailable { device }))),
    }
}

pub(crate) fn create_member(
    view: &View,
    device: DeviceId,
    volume: VolumeId,
    set: SetId,
    manifest: Vec<SealedSegment>,
) -> StoreResult<NewMember> {
    let request = CreateMember { device, volume, set, manifest };
    call(
        view,
        device,
        |link| link.node.create_member(request),
        |made| NewMember { incarnation: made.incarnation, sector: made.sector },
    )
}

pub(crate) fn append(view: &View, member: MemberRef, segment: SegmentName, offset: u64, data: Buf) -> StoreResult<u64> {
    call(view, member.device, |link| link.node.append(member, segment, offset, data), |length| length)
}

pub(crate) fn flush(view: &View, request: FlushRequest) -> StoreResult<()> {
    call(view, request.device, |link| link.node.flush(request), |()| ())
}

pub(crate) fn confirm(view: &View, member: MemberRef) -> StoreResult<()> {
    call(view, member.device, |link| link.node.confirm(member), |()| ())
}

pub(crate) fn close(
    view: &View,
    device: DeviceId,
    volume: VolumeId,
    generation: Generation,
) -> StoreResult<Vec<ClosedMember>> {
    let Some(link) = view.link(device) else {
        return Box::pin(std::future::ready(Err(StoreError::Unavailable { device })));
    };
    let answer = link.node.close(device, volume, generation);
    Box::pin(async move {
        answer.await.map_err(|error| match error {
            // The device itself is gone: lost (C3), not refused.
            NodeError::NotFound => StoreError::NotFound,
            error => member_error(device, &error),
        })
    })
}

pub(crate) fn read_replica(
    view: &View,
    device: DeviceId,
    (volume, set): (VolumeId, SetId),
    segment: SegmentName,
    offset: u64,
    length: u32,
) -> StoreResult<Buf> {
    let Some(link) = view.link(device) else {
        return Box::pin(std::future::ready(Err(StoreError::Unavailable { device })));
    };
    let answer = link.node.read_replica(device, volume, set, segment, offset, length);
    Box::pin(async move { answer.await.map_err(|error| read_error(device, segment, offset, &error)) })
}

pub(crate) fn sealed(view: &View, member: MemberRef, segment: SealedSegment) -> StoreResult<()> {
    call(view, member.device, |link| link.node.sealed(member, segment), |()| ())
}

pub(crate) fn trim_manifest(view: &View, member: MemberRef, border: u64, undecided: Vec<u64>) -> StoreResult<()> {
    call(view, member.device, |link| link.node.trim_manifest(member, border, undecided), |()| ())
}

pub(crate) fn list(
    view: &View,
    device: DeviceId,
    volume: VolumeId,
    after: Option<ShardId>,
) -> StoreResult<Vec<ShardId>> {
    let list = |link: &Link| link.node.list_shards(device, volume, after, LIST_MAX);
    call(view, device, list, |page| page.into_iter().map(|info| info.shard).collect())
}

/// Starts a call on every node and waits for all of them. What fails is only noted: none of these calls is owed (P2, P7).
fn tell_all(view: &View, what: &'static str, start: impl Fn(&Arc<dyn NodeApi>) -> NodeResult<()>) -> StoreResult<()> {
    let answers: Vec<NodeResult<()>> = view.nodes.iter().map(start).collect();
    Box::pin(async move {
        for answer in futures::future::join_all(answers).await {
            if let Err(error) = answer {
                tracing::debug!(what, %error, "a node was not told");
            }
        }
        Ok(())
    })
}

pub(crate) fn delete(view: &View, segments: &[SegmentName]) -> StoreResult<()> {
    tell_all(view, "delete", |node| node.delete_segments(segments.to_vec()))
}

pub(crate) fn registered(view: &View, register: RegisterView) -> StoreResult<()> {
    tell_all(view, "registered", |node| node.registered(register))
}
