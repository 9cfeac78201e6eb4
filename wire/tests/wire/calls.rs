//! A remote node answers as a near one.

use crate::support::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use xsan_types::{DeviceId, Epoch, FlushRequest, Generation, Incarnation, RegisterView, VolumeId};
use xsan_wire::node::{CreateMember, HoldShard, NodeApi, NodeError, PutShard};
use xsan_wire::{Ca, Class, RemoteNode};

const DEVICE: DeviceId = DeviceId(8 << 70);
const VOLUME: VolumeId = VolumeId(1);

/// Makes every call once, large and small, and says what was answered.
async fn every_call(node: &dyn NodeApi) -> Vec<String> {
    let flush = FlushRequest {
        device: DEVICE,
        incarnation: Incarnation(99),
        member: Some(member()),
        replicas: vec![(segment(1), 4096), (segment(2), 8192)],
        shards: vec![(shard(3), 1 << 20)],
    };
    let empty_flush = FlushRequest { member: None, replicas: vec![], shards: vec![], ..flush.clone() };
    let create = CreateMember { device: DEVICE, volume: VOLUME, set: set(), manifest: vec![sealed(1), sealed(2)] };
    let put = |pieces| PutShard { device: DEVICE, shard: shard(4), epoch: Epoch(6), hash: [7; 32], data: pieces };
    let view = RegisterView { volume: VOLUME, generation: Generation(3), set: Some(set()), deleted: true };
    let read = |read: Result<xsan_env::Buf, NodeError>| read.map(|bytes| seen(&[bytes]));
    let mut said = vec![
        format!("{:?}", node.devices().await),
        format!("{:?}", node.create_member(create.clone()).await),
        format!("{:?}", node.create_member(CreateMember { manifest: vec![], ..create }).await),
        format!("{:?}", node.flush(flush).await),
        format!("{:?}", node.flush(empty_flush).await),
        format!("{:?}", node.confirm(member()).await),
        format!("{:?}", node.close(DEVICE, VOLUME, Generation(9)).await),
        format!("{:?}", node.sealed(member(), sealed(5)).await),
        format!("{:?}", node.trim_manifest(member(), 44, vec![41, 43]).await),
        format!("{:?}", node.registered(view).await),
        format!("{:?}", node.registered(RegisterView { set: None, deleted: false, ..view }).await),
        format!("{:?}", node.shard_info(DEVICE, shard(1)).await),
        format!("{:?}", node.verify_shard(DEVICE, shard(1)).await),
        format!(
            "{:?}",
            node.hold_shard(HoldShard { device: DEVICE, shard: shard(1), epoch: Epoch(2), hash: [4; 32] }).await
        ),
        format!("{:?}", node.delete_segments(vec![segment(1), segment(2)]).await),
        format!("{:?}", node.list_shards(DEVICE, VOLUME, Some(shard(1)), 10).await),
        format!("{:?}", node.list_shards(DEVICE, VOLUME, None, u32::MAX).await),
        format!("{:?}", node.finish_shard(DEVICE, Incarnation(9), shard(1), 1 << 20, [3; 32]).await),
    ];
    // From one sector to more than any buffer on the way: small ones are read ahead, large ones straight, the largest in pieces.
    for bytes in [4096, 8192, 65_536, 1 << 20, 3 << 20] {
        let data = || pattern(bytes);
        let length = u32::try_from(bytes).expect("small");
        said.extend([
            format!("{:?}", node.append(member(), segment(1), 4096, data()).await),
            format!("{:?}", node.put_shard(put(vec![data(), data()])).await),
            format!("{:?}", node.repair_shard(DEVICE, shard(1), 8192, data()).await),
            format!("{:?}", node.append_shard(DEVICE, Incarnation(9), shard(1), 0, vec![data(), data()]).await),
            format!("{:?}", read(node.read_replica(DEVICE, VOLUME, set(), segment(1), 512, length).await)),
            format!("{:?}", read(node.read_shard(DEVICE, shard(1), 4096, length).await)),
        ]);
    }
    said
}

#[test]
fn every_call_arrives_as_it_was_made_and_is_answered_as_it_was_answered() {
    run(|env| async move {
        let near = Recorder::default();
        let expected = every_call(&near).await;
        let ca = Ca::new(CLUSTER).expect("a CA");
        let (client, server) = (endpoint(&env, CLIENT), endpoint(&env, SERVER));
        let with_tls =
            pair_of(&client.clone().with_tls(tls(&env, &ca, CLIENT)), &server.clone().with_tls(tls(&env, &ca, SERVER)));
        for far in [pair_of(&client, &server), with_tls] {
            assert_eq!(every_call(&far.remote).await, expected);
            assert_eq!(*lock(&far.node.log), *lock(&near.log), "what was asked, in what order, in aligned memory");
            assert_eq!(far.direct.made.load(Ordering::Relaxed), 2, "one connection for guests, one for bulk");
            lock(&far.node.log).clear();
            let bulk = RemoteNode::bulk(Arc::clone(&far.peer));
            assert_eq!(every_call(&bulk).await, expected);
            assert_eq!(far.direct.made.load(Ordering::Relaxed), 2);
            far.server.stop(PATIENCE).await;
        }
    });
}

#[test]
fn every_error_arrives_as_it_was_said() {
    run(|env| async move {
        let far = pair(&env);
        for error in [
            NodeError::Unavailable,
            NodeError::Closed,
            NodeError::NotLive { current: Incarnation(u64::MAX) },
            NodeError::NotFound,
            NodeError::NoSpace,
            NodeError::StaleEpoch { current: Epoch(5) },
            NodeError::Corrupt,
            NodeError::DeviceFailed,
            NodeError::Invalid,
        ] {
            *lock(&far.node.error) = Some(error.clone());
            assert_eq!(far.remote.append(member(), segment(1), 0, pattern(4096)).await, Err(error.clone()));
            assert_eq!(far.remote.devices().await, Err(error));
        }
    });
}

#[test]
fn calls_begin_in_the_order_in_which_they_were_made_even_if_nobody_polls() {
    run(|env| async move {
        let far = pair(&env);
        let calls: Vec<_> =
            (0..200).map(|offset| far.remote.append(member(), segment(1), offset * 512, pattern(512))).collect();
        far.node.begun(200).await;
        let order: Vec<String> = lock(&far.node.log).clone();
        let expected: Vec<String> = (0..200)
            .map(|offset: u64| {
                let (member, segment) = (member(), segment(1));
                format!("append {member:?} {segment:?} {} {}", offset * 512, seen(&[pattern(512)]))
            })
            .collect();
        // A sector is no page: these are not aligned, and arrive so.
        assert_eq!(order, expected);
        for (offset, call) in (0u64..).zip(calls) {
            assert_eq!(call.await, Ok(offset * 512 + 512));
        }
    });
}

#[test]
fn a_client_keeps_to_the_servers_window_and_everything_is_answered() {
    run(|env| async move {
        let narrow = xsan_wire::Limits { requests_max: 3, bytes_max: 100_000, ..patient() };
        let far = pair_of(&endpoint(&env, CLIENT), &endpoint(&env, SERVER).with_limits(narrow));
        far.node.held.send_replace(true);
        let calls: Vec<_> = (0..20).map(|_| far.remote.append(member(), segment(1), 0, pattern(4096))).collect();
        far.node.begun(3).await;
        for _ in 0..1000 {
            xsan_env::yield_now().await;
        }
        assert_eq!(far.node.asked(), 3, "the others wait for their turn");
        far.node.held.send_replace(false);
        for call in calls {
            assert_eq!(call.await, Ok(4096));
        }
        // Larger than the window: alone it goes all the same.
        assert_eq!(far.remote.append(member(), segment(1), 0, pattern(1 << 20)).await, Ok(1 << 20));
        assert!(matches!(far.peer.state(Class::Guest), xsan_wire::LinkState::Up));
    });
}

#[test]
fn more_than_the_queue_holds_is_refused_at_once() {
    run(|env| async move {
        let short = xsan_wire::Limits { queue_requests_max: 10, ..patient() };
        let far = pair_of(&endpoint(&env, CLIENT).with_limits(short), &endpoint(&env, SERVER));
        far.node.held.send_replace(true);
        let mut calls: Vec<_> = (0..12).map(|_| far.remote.confirm(member())).collect();
        assert_eq!(calls.pop().expect("twelve").await, Err(NodeError::Unavailable));
        assert_eq!(calls.pop().expect("eleven").await, Err(NodeError::Unavailable));
        far.node.held.send_replace(false);
        for call in calls {
            assert_eq!(call.await, Ok(()));
        }
    });
}

#[test]
fn what_no_frame_can_hold_is_refused_and_the_connection_goes_on() {
    run(|env| async move {
        let far = pair(&env);
        let names = vec![segment(1); (8 << 20) / 32 + 1];
        assert_eq!(far.remote.delete_segments(names).await, Err(NodeError::Invalid));
        assert_eq!(far.remote.devices().await.map(|devices| devices.len()), Ok(3));
        assert_eq!(far.direct.made.load(Ordering::Relaxed), 1);
    });
}
