//! A seal puts a segment on every position that can be reached, and says which could not.

use crate::cluster::{Cluster, Dice, device, schemes, segment};
use crate::fake::Stall;
use lsm_block::store::{Holes, SegmentStore, StoreError};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use xsan_types::{Epoch, Scheme, ShardIndex};
use xsan_wire::node::NodeError;

fn rs42() -> Scheme {
    Scheme::rs(4, 2).unwrap()
}

#[tokio::test]
async fn positions_that_are_down_become_holes_as_long_as_k_are_there() {
    let mut dice = Dice(1);
    for scheme in schemes() {
        let body = dice.bytes(500_000);
        for away in 0..=scheme.tolerates() + 1 {
            let mut cluster = Cluster::new(scheme, 0);
            let mut down = dice.choose(away, scheme.width());
            down.sort_unstable();
            cluster.take_down(&down);
            let sealed = cluster.seal(segment(1), &body).await;
            if away <= scheme.tolerates() {
                let holes: Vec<_> = down.iter().map(|&index| ShardIndex(index as u8)).collect();
                assert_eq!(sealed, Ok(Holes(holes)), "{scheme}");
                assert_eq!(cluster.pool.stats().holes, away as u64);
                cluster.check_reads(segment(1), &body, &mut dice, 3, &scheme.to_string()).await;
            } else {
                let (found, needed) = (scheme.k() - 1, scheme.k());
                assert_eq!(sealed, Err(StoreError::TooFew { found, needed }), "{scheme}");
            }
        }
    }
}

#[tokio::test]
async fn writing_never_reads() {
    for scheme in schemes() {
        let mut cluster = Cluster::new(scheme, 0);
        for number in 0..5 {
            cluster.seal(segment(number), &Dice(number).bytes(777_777)).await.unwrap();
        }
        if scheme.tolerates() > 0 {
            cluster.take_down(&[0]);
            cluster.seal(segment(9), &Dice(9).bytes(777_777)).await.unwrap();
        }
        assert_eq!(cluster.pool.stats().shard_reads, 0);
        assert_eq!(cluster.nodes.iter().map(|node| node.state().reads).sum::<u64>(), 0);
    }
}

#[tokio::test]
async fn any_failing_call_becomes_a_hole_and_the_rest_is_whole() {
    let body = Dice(2).bytes(500_000);
    for failing in 0..6 {
        for error in [NodeError::Unavailable, NodeError::DeviceFailed, NodeError::NoSpace, NodeError::Corrupt] {
            let cluster = Cluster::new(rs42(), 0);
            cluster.nodes[failing].state().fail_call = Some((1, error));
            assert_eq!(cluster.seal(segment(1), &body).await, Ok(Holes(vec![ShardIndex(failing as u8)])));
            cluster.nodes.iter().for_each(|node| node.state().calls = 9);
            cluster.check_reads(segment(1), &body, &mut Dice(3), 2, "after a failure").await;
        }
    }
}

#[tokio::test]
async fn a_full_pool_is_told_apart_from_one_that_is_away() {
    let cluster = Cluster::new(rs42(), 0);
    cluster.nodes.iter().take(3).for_each(|node| node.state().is_full = true);
    assert_eq!(cluster.seal(segment(1), &[1; 4096]).await, Err(StoreError::NoSpace));
}

#[tokio::test]
async fn a_position_whose_device_fails_meanwhile_is_written_to_its_next_device() {
    let mut cluster = Cluster::new(rs42(), 1);
    let body = Dice(4).bytes(500_000);
    cluster.stall(2, Stall { puts: true, ..Stall::default() });
    let sealing = cluster.pool.seal(segment(1), vec![crate::cluster::aligned(&body)]);
    cluster.until(|cluster| cluster.shard(segment(1), 5).is_some()).await;
    cluster.until(|cluster| cluster.shard(segment(1), 2).is_some()).await;
    // The device never answers; the map gives its position to the spare one.
    cluster.update(|view| {
        view.devices.get_mut(&device(2)).unwrap().up = false;
        view.table[0][2] = Some(device(6));
    });
    assert_eq!(sealing.await, Ok(Holes::default()));
    assert!(cluster.shard(segment(1), 2).is_some(), "on the spare device");
    cluster.check_reads(segment(1), &body, &mut Dice(5), 3, "moved").await;
}

#[tokio::test]
async fn a_device_that_hangs_becomes_a_hole_when_the_map_says_it_is_down() {
    let mut cluster = Cluster::new(rs42(), 0);
    cluster.stall(2, Stall { puts: true, ..Stall::default() });
    let sealing = cluster.pool.seal(segment(1), vec![crate::cluster::aligned(&[7; 100_000])]);
    cluster.until(|cluster| cluster.shard(segment(1), 2).is_some()).await;
    cluster.take_down(&[2]);
    assert_eq!(sealing.await, Ok(Holes(vec![ShardIndex(2)])));
}

#[tokio::test]
async fn a_node_with_a_newer_map_is_written_once_the_map_has_come() {
    let mut cluster = Cluster::new(rs42(), 0);
    cluster.nodes[3].state().epoch = Epoch(2);
    let sealing = cluster.pool.seal(segment(1), vec![crate::cluster::aligned(&[7; 100_000])]);
    cluster.until(|cluster| cluster.nodes[3].state().calls == 1).await;
    cluster.update(|_| {});
    assert_eq!(sealing.await, Ok(Holes::default()));
    assert!(cluster.shard(segment(1), 3).is_some());
}

#[tokio::test]
async fn a_map_that_never_comes_is_not_waited_for_for_ever() {
    let cluster = Cluster::with(rs42(), 0, |config| config.map_wait = Duration::from_millis(5));
    cluster.nodes[3].state().epoch = Epoch(99);
    assert_eq!(cluster.seal(segment(1), &[7; 100_000]).await, Ok(Holes(vec![ShardIndex(3)])));
}

#[tokio::test]
async fn memory_bounds_how_many_segments_are_sealed_at_once() {
    // A shard of 1 MiB in 4 units is 256 KiB: six of them are 1.5 MiB, so two seals fit into 3 MiB.
    let cluster = Cluster::with(rs42(), 0, |config| config.encode_bytes_max = 3 << 20);
    cluster.stall(0, Stall { puts: true, ..Stall::default() });
    let body = Dice(6).bytes(1 << 20);
    let seals: Vec<_> =
        (0..6).map(|number| cluster.pool.seal(segment(number), vec![crate::cluster::aligned(&body)])).collect();
    cluster.until(|cluster| cluster.nodes[0].state().puts_running.len() == 2).await;
    for _ in 0..1000 {
        xsan_env::yield_now().await;
        assert!(cluster.nodes[0].state().puts_running.len() <= 2);
    }
    cluster.stall(0, Stall::default());
    for seal in seals {
        assert_eq!(seal.await, Ok(Holes::default()));
    }
    // A segment larger than the budget runs alone instead of never.
    assert_eq!(cluster.seal(segment(7), &Dice(7).bytes(5 << 20)).await, Ok(Holes::default()));
}

#[tokio::test]
async fn other_tasks_run_while_a_segment_is_encoded() {
    for scheme in [rs42(), Scheme::replica(3).unwrap()] {
        let cluster = Cluster::new(scheme, 0);
        let turns = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&turns);
        // One thread: this task gets a turn only when the seal yields.
        let counter = cluster.env.spawn("counter", async move {
            loop {
                count.fetch_add(1, Ordering::Relaxed);
                xsan_env::yield_now().await;
            }
        });
        cluster.seal(segment(1), &Dice(8).bytes(8 << 20)).await.unwrap();
        counter.abort();
        let turns = turns.load(Ordering::Relaxed);
        assert!(turns >= 32, "{scheme}: {turns} turns in 8 MiB");
    }
}

#[tokio::test]
async fn a_seal_that_nobody_waits_for_any_more_gives_its_memory_back() {
    let cluster = Cluster::with(rs42(), 0, |config| config.encode_bytes_max = 2 << 20);
    cluster.stall(0, Stall { puts: true, ..Stall::default() });
    let sealing = cluster.pool.seal(segment(1), vec![crate::cluster::aligned(&Dice(9).bytes(1 << 20))]);
    cluster.until(|cluster| cluster.nodes[0].state().puts_running.len() == 1).await;
    drop(sealing);
    cluster.stall(0, Stall::default());
    assert_eq!(cluster.seal(segment(2), &Dice(10).bytes(1 << 20)).await, Ok(Holes::default()));
}
