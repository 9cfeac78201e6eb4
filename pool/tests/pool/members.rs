//! Journal sets and placement groups are planned well; journal calls reach their device and their answers come back.

use crate::cluster::{Cluster, Dice, device, schemes, segment};
use lsm_block::store::{SegmentStore, StoreError};
use std::collections::BTreeMap;
use xsan_env::Buf;
use xsan_types::{DeviceId, FlushRequest, Generation, Incarnation, MemberRef, RegisterView, Scheme, SetId, VolumeId};
use xsan_wire::node::NodeError;

fn rs42() -> Scheme {
    Scheme::rs(4, 2).unwrap()
}

fn member(number: usize, incarnation: u64) -> MemberRef {
    let set = SetId { generation: Generation(1), number: 1 };
    MemberRef { device: device(number), volume: VolumeId(7), set, incarnation: Incarnation(incarnation) }
}

#[tokio::test]
async fn sets_have_one_member_more_than_may_be_lost_and_are_spread_over_all_devices() {
    for scheme in schemes() {
        let cluster = Cluster::new(scheme, 3);
        let mut carried: BTreeMap<DeviceId, usize> = BTreeMap::new();
        for volume in 0..3000 {
            let set = cluster.pool.plan_set(VolumeId(volume), &[]).unwrap();
            assert_eq!(set.len(), scheme.tolerates() + 1);
            assert_eq!(cluster.pool.set_size(), set.len());
            assert_eq!(set, cluster.pool.plan_set(VolumeId(volume), &[]).unwrap(), "the same plan every time");
            set.iter().for_each(|&device| *carried.entry(device).or_default() += 1);
        }
        let mean = 3000 * (scheme.tolerates() + 1) / cluster.nodes.len();
        assert_eq!(carried.len(), cluster.nodes.len());
        assert!(carried.values().all(|&count| count > mean * 8 / 10 && count < mean * 12 / 10), "{carried:?}");
    }
}

#[tokio::test]
async fn no_two_members_share_a_failure_domain_and_none_is_one_to_avoid() {
    let mut cluster = Cluster::new(rs42(), 2);
    cluster.update(|view| {
        let names = ["a", "a", "a", "b", "b", "c", "c", "d"];
        view.devices.values_mut().zip(names).for_each(|(device, name)| device.domain = name.into());
    });
    let domain = |device: DeviceId| cluster.view.devices[&device].domain.clone();
    for volume in 0..500 {
        let avoid = [device(7), device((volume % 7) as usize)];
        let set = cluster.pool.plan_set(VolumeId(volume), &avoid).unwrap();
        assert!(set.len() == 3 && !set.iter().any(|device| avoid.contains(device)));
        let mut domains: Vec<_> = set.iter().map(|&device| domain(device)).collect();
        domains.sort();
        domains.dedup();
        assert_eq!(domains.len(), 3);
    }
}

#[tokio::test]
async fn sets_shrink_while_domains_are_down_but_never_to_one() {
    let mut cluster = Cluster::new(rs42(), 0);
    for (down, expected) in [(3, Ok(3)), (4, Ok(2)), (5, Err(StoreError::TooFew { found: 1, needed: 2 }))] {
        cluster.take_down(&(0..down).collect::<Vec<_>>());
        assert_eq!(cluster.pool.plan_set(VolumeId(1), &[]).map(|set| set.len()), expected);
        assert_eq!(cluster.pool.set_size(), 3, "what it will grow to again");
        cluster.bring_up_all();
    }
    let mut alone = Cluster::with(rs42(), 0, |config| config.single_member = true);
    alone.take_down(&[0, 1, 2, 3, 4]);
    assert_eq!(alone.pool.plan_set(VolumeId(1), &[]), Ok(vec![device(5)]));
    let copies = Cluster::new(Scheme::replica(1).unwrap(), 0);
    assert_eq!(copies.pool.plan_set(VolumeId(1), &[]), Ok(vec![device(0)]));
}

#[tokio::test]
async fn a_device_that_is_nearly_full_carries_fewer_sets() {
    let mut cluster = Cluster::new(rs42(), 0);
    cluster.update(|view| view.devices.get_mut(&device(2)).unwrap().free = 1 << 30);
    let carries = |volume: &u64| cluster.pool.plan_set(VolumeId(*volume), &[]).unwrap().contains(&device(2));
    assert!((0..1000).filter(carries).count() < 50);
}

#[tokio::test]
async fn groups_are_spread_evenly_and_whole_ones_come_first() {
    let mut cluster = Cluster::new(rs42(), 4);
    let mut groups: BTreeMap<u32, usize> = BTreeMap::new();
    for number in 0..10_000 {
        *groups.entry(cluster.pool.choose_pg(VolumeId(3), number, &[]).index).or_default() += 1;
    }
    assert_eq!(groups.len(), 10);
    assert!(groups.values().all(|&count| (850..1150).contains(&count)), "{groups:?}");
    assert!(cluster.pool.rows_possible());
    // Groups 0..=3 begin at nodes 0..=3; node 9 is part of groups 4..=9.
    cluster.take_down(&[9]);
    assert!((0..1000).all(|number| cluster.pool.choose_pg(VolumeId(3), number, &[]).index < 4));
    assert!(cluster.pool.rows_possible());
    cluster.take_down(&[5]);
    assert!(!cluster.pool.rows_possible());
}

#[tokio::test]
async fn copies_go_where_their_members_are() {
    let cluster = Cluster::new(Scheme::replica(3).unwrap(), 5);
    for number in 0..100 {
        let members = [device(5), device(6), device(7)];
        assert_eq!(cluster.pool.choose_pg(VolumeId(1), number, &members).index, 5);
    }
    let rs = Cluster::new(rs42(), 5);
    let members = [device(5), device(6), device(7)];
    assert!((0..100).any(|number| rs.pool.choose_pg(VolumeId(1), number, &members).index != 5));
}

#[tokio::test]
async fn journal_calls_reach_their_device_and_refusals_say_what_they_mean() {
    let cluster = Cluster::new(rs42(), 0);
    let set = SetId { generation: Generation(1), number: 1 };
    let made = cluster.pool.create_member(device(2), VolumeId(7), set, Vec::new()).await.unwrap();
    assert_eq!((made.incarnation, made.sector), (Incarnation(1), 4096));
    let append = |incarnation| cluster.pool.append(member(2, incarnation), segment(1), 8192, Buf::copied(&[0; 4096]));
    assert_eq!(append(1).await, Ok(12288));
    assert_eq!(append(2).await, Err(StoreError::Closed { device: device(2) }), "another process");
    for (refusal, meaning) in [
        (NodeError::Unavailable, StoreError::Unavailable { device: device(2) }),
        (NodeError::DeviceFailed, StoreError::Unavailable { device: device(2) }),
        (NodeError::Closed, StoreError::Closed { device: device(2) }),
        (NodeError::NotFound, StoreError::Closed { device: device(2) }),
        (NodeError::NoSpace, StoreError::NoSpace),
        (NodeError::Invalid, StoreError::Internal),
    ] {
        let at = cluster.nodes[2].state().calls + 1;
        cluster.nodes[2].state().fail_call = Some((at, refusal));
        assert_eq!(append(1).await, Err(meaning));
    }
    let read = cluster.pool.read_replica(device(2), VolumeId(7), set, segment(1), 0, 4096).await;
    assert_eq!(read.unwrap_err(), StoreError::NotFound, "not there is not the same as closed for a reader");
    let unknown = device(99);
    let gone = cluster.pool.confirm(MemberRef { device: unknown, ..member(0, 1) }).await;
    assert_eq!(gone, Err(StoreError::Unavailable { device: unknown }));
    let request = FlushRequest {
        device: device(3),
        incarnation: Incarnation(1),
        member: Some(member(3, 1)),
        replicas: vec![(segment(1), 4096)],
        shards: Vec::new(),
    };
    cluster.pool.flush(request.clone()).await.unwrap();
    assert_eq!(cluster.nodes[3].state().flushed, [request]);
}

#[tokio::test]
async fn appends_start_when_called_not_when_waited_for() {
    let cluster = Cluster::new(rs42(), 0);
    let pending = cluster.pool.append(member(1, 1), segment(1), 0, Buf::copied(&[0; 4096]));
    assert_eq!(cluster.nodes[1].state().calls, 1);
    drop(pending);
}

#[tokio::test]
async fn every_node_hears_of_deletes_and_registers_even_if_one_is_deaf() {
    let cluster = Cluster::new(rs42(), 3);
    cluster.seal(segment(1), &Dice(1).bytes(100_000)).await.unwrap();
    cluster.nodes[0].state().is_down = true;
    cluster.pool.delete(vec![segment(1)]).await.unwrap();
    let view = RegisterView { volume: VolumeId(7), generation: Generation(2), set: None, deleted: false };
    cluster.pool.registered(view).await.unwrap();
    for node in &cluster.nodes[1..] {
        let state = node.state();
        assert_eq!((&*state.deleted, &*state.registered), (&[segment(1)][..], &[view][..]));
        assert!(state.shards.is_empty());
    }
}

#[tokio::test]
async fn owners_hear_of_changes_but_not_of_free_space() {
    let mut cluster = Cluster::new(rs42(), 0);
    let mut changes = cluster.pool.changes();
    cluster.take_down(&[1]);
    assert!(changes.has_changed().unwrap());
    changes.borrow_and_update();
    cluster.view.devices.get_mut(&device(0)).unwrap().free = 5;
    cluster.pool.set_view(std::sync::Arc::new(cluster.view.clone())).unwrap();
    assert!(!changes.has_changed().unwrap());
    let mut old = cluster.view.clone();
    old.epoch = xsan_types::Epoch(1);
    cluster.pool.set_view(std::sync::Arc::new(old)).unwrap();
    assert!(!changes.has_changed().unwrap() && cluster.pool.epoch() == cluster.view.epoch, "an older map is no news");
}

#[tokio::test]
async fn a_map_that_does_not_fit_is_refused_and_the_old_one_stays() {
    let mut cluster = Cluster::new(rs42(), 0);
    let good = cluster.view.clone();
    cluster.view.table[1].pop();
    assert!(cluster.pool.set_view(std::sync::Arc::new(cluster.view.clone())).is_err());
    cluster.view.table.clear();
    assert!(cluster.pool.set_view(std::sync::Arc::new(cluster.view.clone())).is_err());
    cluster.view = good;
    cluster.seal(segment(1), &[1; 5000]).await.unwrap();
}
