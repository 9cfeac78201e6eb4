//! A device that is late costs a read the time its peers need, not its own.

use crate::cluster::{Cluster, Dice, schemes, segment};
use crate::fake::Stall;
use futures::future::join_all;
use lsm_block::store::StoreError;
use xsan_types::Scheme;

const STALLED: Stall = Stall { reads: true, puts: false, appends: false };

#[tokio::test]
async fn a_stalled_device_is_gone_round() {
    for scheme in schemes().into_iter().filter(|scheme| scheme.tolerates() > 0) {
        let cluster = Cluster::new(scheme, 0);
        let body = Dice(1).bytes(1 << 20);
        cluster.seal(segment(1), &body).await.unwrap();
        let stalled: Vec<usize> = (0..scheme.tolerates()).collect();
        stalled.iter().for_each(|&number| cluster.stall(number, STALLED));
        for offset in (0..1 << 20).step_by(65536) {
            let found = cluster.read_blocks(segment(1), &body, offset, 8192).await.unwrap();
            assert!(*found == body[offset..offset + 8192], "{scheme}");
        }
        assert!(*cluster.read_whole(segment(1), &body, 0, 1 << 20).await.unwrap() == *body, "{scheme}");
        let stats = cluster.pool.stats();
        assert!(stats.hedges > 0 && stats.hedge_wins == stats.hedges, "{scheme}: {stats:?}");
        assert_eq!((stats.degraded_reads, stats.damaged_blocks), (0, 0));
    }
}

#[tokio::test]
async fn quick_devices_are_never_hedged() {
    let cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
    let body = Dice(2).bytes(1 << 20);
    cluster.seal(segment(1), &body).await.unwrap();
    cluster.check_reads(segment(1), &body, &mut Dice(3), 100, "quick").await;
    assert_eq!(cluster.pool.stats().hedges, 0);
}

#[tokio::test]
async fn a_late_answer_is_taken_when_nobody_else_has_one() {
    let mut cluster = Cluster::new(Scheme::rs(2, 1).unwrap(), 0);
    let body = Dice(4).bytes(1 << 20);
    cluster.seal(segment(1), &body).await.unwrap();
    cluster.take_down(&[1]);
    cluster.stall(0, STALLED);
    let read = cluster.read_blocks(segment(1), &body, 0, 4096);
    let release = async {
        cluster.until(|cluster| cluster.pool.stats().hedges == 1).await;
        cluster.stall(0, Stall::default());
    };
    let (found, ()) = futures::join!(read, release);
    assert!(*found.unwrap() == body[..4096]);
    assert_eq!(cluster.pool.stats().hedge_wins, 0);
}

#[tokio::test]
async fn a_late_answer_that_is_wrong_is_not_taken_but_repaired() {
    let cluster = Cluster::new(Scheme::rs(2, 1).unwrap(), 0);
    let body = Dice(5).bytes(1 << 20);
    cluster.seal(segment(1), &body).await.unwrap();
    let good = cluster.shard(segment(1), 0).unwrap().bytes;
    cluster.damage(segment(1), 0, 3);
    [0, 2].into_iter().for_each(|number| cluster.stall(number, STALLED));
    let read = cluster.read_blocks(segment(1), &body, 0, 4096);
    let release = async {
        cluster.until(|cluster| cluster.pool.stats().hedges == 1).await;
        cluster.stall(0, Stall::default());
        cluster.until(|cluster| cluster.nodes[2].state().reads == 1).await;
        cluster.stall(2, Stall::default());
    };
    let (found, ()) = futures::join!(read, release);
    assert!(*found.unwrap() == body[..4096]);
    cluster.until(|cluster| cluster.shard(segment(1), 0).unwrap().bytes == good).await;
}

#[tokio::test]
async fn when_everything_is_slow_only_a_part_is_asked_twice() {
    let cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
    let body = Dice(6).bytes(4 << 20);
    cluster.seal(segment(1), &body).await.unwrap();
    (0..6).for_each(|number| cluster.stall(number, STALLED));
    let reads = join_all((0..1000).map(|block| cluster.read_blocks(segment(1), &body, block * 4096, 4096)));
    let release = async {
        cluster.until(|cluster| cluster.pool.stats().hedges >= 64).await;
        let waited = cluster.env.now();
        cluster.until(|cluster| cluster.env.now().since(waited).as_millis() > 30).await;
        // 64 saved up, and a quarter of 1000 at most.
        assert!(cluster.pool.stats().hedges <= 64 + 250, "{:?}", cluster.pool.stats());
        (0..6).for_each(|number| cluster.stall(number, Stall::default()));
    };
    let (found, ()) = futures::join!(reads, release);
    let wrong: Vec<StoreError> = found.into_iter().filter_map(Result::err).collect();
    assert_eq!(wrong, []);
}

#[tokio::test]
async fn a_stalled_device_does_not_hold_up_the_search_for_damage() {
    let cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
    let body = Dice(7).bytes(1 << 20);
    cluster.seal(segment(1), &body).await.unwrap();
    cluster.stall(5, STALLED);
    cluster.damage(segment(1), 0, 3);
    // Five sources at most: the damaged block is rebuilt from four right ones without the stalled device.
    assert!(*cluster.read_blocks(segment(1), &body, 0, 4096).await.unwrap() == body[..4096]);
    cluster.until(|cluster| cluster.pool.stats().repaired_blocks == 1).await;
    cluster.damage(segment(1), 0, 3);
    cluster.damage(segment(1), 1, 3);
    // Now the stalled one would be needed: it may come back, so the owner is told to wait, not that all is lost.
    let found = cluster.read_blocks(segment(1), &body, 0, 4096).await;
    assert_eq!(found.unwrap_err(), StoreError::TooFew { found: 3, needed: 4 });
    cluster.stall(5, Stall::default());
    assert!(*cluster.read_blocks(segment(1), &body, 0, 4096).await.unwrap() == body[..4096]);
}

#[tokio::test]
async fn a_source_that_was_late_is_asked_again_when_the_others_are_not_right() {
    let cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
    let body = Dice(8).bytes(1 << 20);
    cluster.seal(segment(1), &body).await.unwrap();
    [0, 1].into_iter().for_each(|index| cluster.damage(segment(1), index, 3));
    let nodes: Vec<usize> = (0..6).map(|index| cluster.node_of(segment(1), index)).collect();
    nodes[1..].iter().for_each(|&number| cluster.stall(number, STALLED));
    let read = cluster.read_blocks(segment(1), &body, 0, 4096);
    let release = async {
        // All are late, so all are asked; the first four are one too few, since one of them is wrong.
        cluster.until(|cluster| cluster.nodes[nodes[5]].state().reads == 1).await;
        nodes[1..5].iter().for_each(|&number| cluster.stall(number, Stall::default()));
        cluster.until(|cluster| cluster.nodes[nodes[5]].state().reads == 2).await;
        cluster.stall(nodes[5], Stall::default());
    };
    let (found, ()) = futures::join!(read, release);
    assert!(*found.unwrap() == body[..4096]);
    assert_eq!(cluster.pool.stats().corrupt_reads, 0);
}
