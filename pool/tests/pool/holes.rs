//! Positions a seal had to leave out are rebuilt, from verified sources only.

use crate::cluster::{Cluster, Dice, device, schemes, segment};
use lsm_block::store::{Holes, SegmentStore, StoreError};
use xsan_types::{Scheme, ShardIndex};

#[tokio::test]
async fn holes_are_filled_with_the_very_bytes_a_seal_would_have_written() {
    let mut dice = Dice(1);
    for scheme in schemes().into_iter().filter(|scheme| scheme.tolerates() > 0) {
        for length in [4096, 100_000, 3_000_000] {
            let mut cluster = Cluster::new(scheme, 0);
            let body = dice.bytes(length);
            cluster.seal(segment(2), &body).await.unwrap();
            cluster.take_down(&dice.choose(scheme.tolerates(), scheme.width()));
            let holes = cluster.seal(segment(1), &body).await.unwrap();
            assert_eq!(holes.0.len(), scheme.tolerates());
            let still = cluster.pool.fill_holes(segment(1), length as u64, holes.clone()).await.unwrap();
            assert_eq!(still, holes, "their devices are away");
            cluster.bring_up_all();
            let still = cluster.pool.fill_holes(segment(1), length as u64, holes).await.unwrap();
            assert_eq!(still, Holes::default());
            for index in 0..scheme.width() {
                let (whole, filled) = (cluster.shard(segment(2), index), cluster.shard(segment(1), index));
                let (whole, filled) = (whole.unwrap(), filled.unwrap());
                assert!(whole.bytes == filled.bytes && whole.hash == filled.hash, "{scheme} {length} {index}");
            }
            assert_eq!(cluster.pool.stats().holes_filled, scheme.tolerates() as u64);
        }
    }
}

#[tokio::test]
async fn a_shard_with_a_wrong_hash_is_never_a_source() {
    let mut cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
    let body = Dice(2).bytes(2_000_000);
    cluster.seal(segment(2), &body).await.unwrap();
    cluster.take_down(&[4]);
    let holes = cluster.seal(segment(1), &body).await.unwrap();
    cluster.bring_up_all();
    cluster.damage(segment(1), 1, 400_000);
    assert_eq!(cluster.pool.fill_holes(segment(1), body.len() as u64, holes).await, Ok(Holes::default()));
    let filled = cluster.shard(segment(1), 4).unwrap();
    assert!(filled.bytes == cluster.shard(segment(2), 4).unwrap().bytes);
    assert_eq!(cluster.pool.stats().bad_sources, 1);
}

#[tokio::test]
async fn too_few_good_sources_are_an_error_and_nothing_is_written() {
    let mut cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
    let body = Dice(3).bytes(2_000_000);
    cluster.take_down(&[0, 5]);
    let holes = cluster.seal(segment(1), &body).await.unwrap();
    cluster.bring_up_all();
    cluster.damage(segment(1), 3, 10);
    let filled = cluster.pool.fill_holes(segment(1), body.len() as u64, holes.clone()).await;
    assert_eq!(filled, Err(StoreError::Corrupt { segment: segment(1), offset: 0 }));
    assert!(cluster.shard(segment(1), 0).is_none() && cluster.shard(segment(1), 5).is_none());
    cluster.take_down(&[2]);
    let filled = cluster.pool.fill_holes(segment(1), body.len() as u64, holes).await;
    assert_eq!(filled, Err(StoreError::TooFew { found: 3, needed: 4 }));
}

#[tokio::test]
async fn a_source_that_fails_on_the_way_is_replaced() {
    for call in 2..6 {
        let mut cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
        let body = Dice(4).bytes(4 << 20);
        cluster.take_down(&[4]);
        let holes = cluster.seal(segment(1), &body).await.unwrap();
        cluster.bring_up_all();
        {
            let mut state = cluster.nodes[2].state();
            state.calls = 0;
            state.fail_call = Some((call, xsan_wire::node::NodeError::Unavailable));
        }
        assert_eq!(cluster.pool.fill_holes(segment(1), body.len() as u64, holes).await, Ok(Holes::default()));
        cluster.take_down(&[0, 1]);
        cluster.check_reads(segment(1), &body, &mut Dice(5), 3, "after filling").await;
    }
}

#[tokio::test]
async fn a_hole_is_filled_on_the_device_that_took_the_position_over() {
    let mut cluster = Cluster::new(Scheme::replica(3).unwrap(), 1);
    let body = Dice(6).bytes(1_000_000);
    cluster.take_down(&[1]);
    let holes = cluster.seal(segment(1), &body).await.unwrap();
    assert_eq!(holes, Holes(vec![ShardIndex(1)]));
    cluster.update(|view| view.table[0][1] = Some(device(3)));
    assert_eq!(cluster.pool.fill_holes(segment(1), body.len() as u64, holes).await, Ok(Holes::default()));
    assert!(cluster.shard(segment(1), 1).unwrap().bytes[..1_000_000] == *body);
    assert_eq!(cluster.node_of(segment(1), 1), 3);
}
