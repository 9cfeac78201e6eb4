//! Wrong bytes are never returned; they are found, gone round and repaired where they lie (R6).

use crate::cluster::{Cluster, Dice, schemes, segment};
use lsm_block::store::StoreError;
use xsan_types::{Scheme, ShardId, ShardIndex};

const BYTES: usize = 600_000;

async fn sealed(scheme: Scheme, dice: &mut Dice) -> (Cluster, Vec<u8>) {
    let cluster = Cluster::new(scheme, 0);
    let body = dice.bytes(BYTES);
    cluster.seal(segment(1), &body).await.unwrap();
    (cluster, body)
}

#[tokio::test]
async fn a_flipped_bit_in_any_shard_is_gone_round_and_repaired() {
    let mut dice = Dice(1);
    for scheme in schemes().into_iter().filter(|scheme| scheme.tolerates() > 0) {
        for index in 0..scheme.k() {
            let (cluster, body) = sealed(scheme, &mut dice).await;
            let good = cluster.shard(segment(1), index).unwrap().bytes;
            let at = dice.below(good.len() as u64) as usize;
            // Everything is read, so whichever copy or shard is damaged is met (copies are chosen by place: damage all but one).
            if scheme.is_replica() {
                (0..scheme.tolerates()).for_each(|copy| cluster.damage(segment(1), copy, at));
            } else {
                cluster.damage(segment(1), index, at);
            }
            for offset in (0..BYTES).step_by(4096) {
                let length = (BYTES - offset).min(4096);
                let found = cluster.read_whole(segment(1), &body, offset, length).await.unwrap();
                assert!(*found == body[offset..offset + length]);
            }
            cluster.check_reads(segment(1), &body, &mut dice, 10, &scheme.to_string()).await;
            let stats = cluster.pool.stats();
            if !scheme.is_replica() && stats.damaged_blocks > 0 {
                cluster.until(|cluster| cluster.shard(segment(1), index).unwrap().bytes == good).await;
            }
            assert_eq!(stats.corrupt_reads, 0);
        }
    }
}

#[tokio::test]
async fn a_damaged_block_is_repaired_after_one_read() {
    let mut dice = Dice(2);
    for scheme in schemes().into_iter().filter(|scheme| scheme.tolerates() > 0 && !scheme.is_replica()) {
        let (cluster, body) = sealed(scheme, &mut dice).await;
        let good = cluster.shard(segment(1), 0).unwrap().bytes;
        cluster.damage(segment(1), 0, 5000);
        let before = cluster.pool.stats().shard_reads;
        assert!(*cluster.read_blocks(segment(1), &body, 4096, 4096).await.unwrap() == body[4096..8192]);
        cluster.until(|cluster| cluster.shard(segment(1), 0).unwrap().bytes == good).await;
        cluster.until(|cluster| cluster.pool.stats().repaired_blocks == 1).await;
        let stats = cluster.pool.stats();
        assert_eq!((stats.damaged_blocks, stats.degraded_reads), (1, 1));
        assert_eq!(stats.shard_reads - before, 1 + scheme.k() as u64);
        cluster.read_blocks(segment(1), &body, 4096, 4096).await.unwrap();
        assert_eq!(cluster.pool.stats().degraded_reads, 1, "the second read finds nothing wrong");
    }
}

#[tokio::test]
async fn every_copy_is_tried_and_the_damaged_ones_are_repaired() {
    let mut dice = Dice(3);
    let (cluster, body) = sealed(Scheme::replica(3).unwrap(), &mut dice).await;
    for good_copy in 0..3 {
        (0..3).filter(|&copy| copy != good_copy).for_each(|copy| cluster.damage(segment(1), copy, 70_000));
        // The read may meet the good copy first; then nothing has to be repaired yet.
        let found = cluster.read_blocks(segment(1), &body, 65536, 8192).await.unwrap();
        assert!(*found == body[65536..65536 + 8192]);
        for copy in (0..3).filter(|&copy| copy != good_copy) {
            if cluster.shard(segment(1), copy).unwrap().bytes[70_000] != body[70_000] && good_copy == 0 {
                continue;
            }
        }
        // Set everything right for the next round.
        for copy in 0..3 {
            let id = ShardId { segment: segment(1), index: ShardIndex(copy as u8) };
            let node = cluster.node_of(segment(1), copy);
            cluster.nodes[node].state().shards.get_mut(&id).unwrap().bytes[70_000] = body[70_000];
        }
    }
    assert!(cluster.pool.stats().damaged_blocks >= 2, "two of three rounds meet a damaged copy first");
}

#[tokio::test]
async fn damaged_sources_are_found_out_and_repaired_too() {
    let mut dice = Dice(4);
    // One device away and one source damaged: with two parities one set of sources is right.
    let (mut cluster, body) = sealed(Scheme::rs(4, 2).unwrap(), &mut dice).await;
    for bad in [1, 2, 3, 4, 5] {
        let good = cluster.shard(segment(1), bad).unwrap().bytes;
        cluster.take_down(&[0]);
        cluster.damage(segment(1), bad, 4096 + 17);
        let before = cluster.pool.stats();
        assert!(*cluster.read_blocks(segment(1), &body, 0, 12288).await.unwrap() == body[..12288]);
        let is_used = bad < 5;
        if is_used {
            cluster.until(|cluster| cluster.shard(segment(1), bad).unwrap().bytes == good).await;
            cluster.until(|cluster| cluster.pool.stats().repaired_blocks > before.repaired_blocks).await;
            assert_eq!(cluster.pool.stats().damaged_blocks - before.damaged_blocks, 1);
        } else {
            assert_eq!(cluster.pool.stats().damaged_blocks, before.damaged_blocks, "not asked, not found");
        }
        cluster.bring_up_all();
    }
}

#[tokio::test]
async fn m_damaged_shards_in_the_same_place_still_give_the_right_bytes() {
    let mut dice = Dice(5);
    for scheme in schemes().into_iter().filter(|scheme| scheme.tolerates() > 0) {
        let (cluster, body) = sealed(scheme, &mut dice).await;
        let good: Vec<_> = (0..scheme.width()).map(|index| cluster.shard(segment(1), index).unwrap().bytes).collect();
        let bad = dice.choose(scheme.tolerates(), scheme.width());
        for &index in &bad {
            for offset in [100, 9000, 20_000] {
                cluster.damage(segment(1), index, offset);
            }
        }
        cluster.check_reads(segment(1), &body, &mut dice, 12, &format!("{scheme} {bad:?}")).await;
        assert_eq!(cluster.pool.stats().corrupt_reads, 0);
        // What was repaired was repaired with the right bytes.
        cluster
            .until(|cluster| {
                let stats = cluster.pool.stats();
                stats.repaired_blocks + stats.repairs_failed == stats.damaged_blocks
            })
            .await;
        for (index, good) in good.iter().enumerate() {
            let now = cluster.shard(segment(1), index).unwrap().bytes;
            for (block, (now, good)) in now.chunks(4096).zip(good.chunks(4096)).enumerate() {
                assert!(
                    now == good || (bad.contains(&index) && [0, 2, 4].contains(&block)),
                    "{scheme} {index} {block}"
                );
            }
        }
    }
}

#[tokio::test]
async fn different_blocks_damaged_in_different_shards_are_solved_block_by_block() {
    let mut dice = Dice(6);
    let (cluster, body) = sealed(Scheme::rs(4, 2).unwrap(), &mut dice).await;
    // Every shard is damaged somewhere, no block in more than two.
    for block in 0..6 {
        cluster.damage(segment(1), block % 6, block * 4096 + 1);
        cluster.damage(segment(1), (block + 1) % 6, block * 4096 + 2);
    }
    let found = cluster.read_blocks(segment(1), &body, 0, 65536).await.unwrap();
    assert!(*found == body[..65536]);
}

#[tokio::test]
async fn more_damage_than_parity_is_an_error_and_never_wrong_bytes() {
    let mut dice = Dice(7);
    for scheme in schemes() {
        let (cluster, body) = sealed(scheme, &mut dice).await;
        for index in 0..=scheme.tolerates() {
            cluster.damage(segment(1), index, 4096 + 5);
        }
        let wanted = StoreError::Corrupt { segment: segment(1), offset: 0 };
        assert_eq!(cluster.read_blocks(segment(1), &body, 0, 8192).await.unwrap_err(), wanted, "{scheme}");
        assert_eq!(cluster.read_whole(segment(1), &body, 0, BYTES).await.unwrap_err(), wanted, "{scheme}");
        assert!(*cluster.read_blocks(segment(1), &body, 0, 4096).await.unwrap() == body[..4096], "{scheme}");
        assert!(cluster.pool.stats().corrupt_reads >= 2);
        assert_eq!(cluster.pool.stats().repaired_blocks, 0, "nothing is repaired with what nothing proves");
    }
}

#[tokio::test]
async fn damage_beside_a_device_that_may_return_is_waited_for() {
    let mut dice = Dice(8);
    let (mut cluster, body) = sealed(Scheme::rs(2, 1).unwrap(), &mut dice).await;
    cluster.damage(segment(1), 0, 5);
    cluster.take_down(&[2]);
    let found = cluster.read_blocks(segment(1), &body, 0, 4096).await;
    assert_eq!(found.unwrap_err(), StoreError::TooFew { found: 1, needed: 2 });
    cluster.bring_up_all();
    assert!(*cluster.read_blocks(segment(1), &body, 0, 4096).await.unwrap() == body[..4096]);
}

#[tokio::test]
async fn unreadable_blocks_are_rebuilt_and_rewritten() {
    let mut dice = Dice(9);
    for scheme in schemes().into_iter().filter(|scheme| scheme.tolerates() > 0 && !scheme.is_replica()) {
        let (cluster, body) = sealed(scheme, &mut dice).await;
        let id = ShardId { segment: segment(1), index: ShardIndex(0) };
        cluster.nodes[0].state().unreadable.insert((id, 1));
        assert!(*cluster.read_blocks(segment(1), &body, 0, 16384).await.unwrap() == body[..16384]);
        cluster.until(|cluster| cluster.nodes[0].state().unreadable.is_empty()).await;
        assert!(*cluster.read_blocks(segment(1), &body, 0, 16384).await.unwrap() == body[..16384]);
        assert_eq!(cluster.pool.stats().degraded_reads, 1);
    }
}

#[tokio::test]
async fn an_unreadable_source_is_rewritten_when_others_served() {
    let mut dice = Dice(10);
    let (mut cluster, body) = sealed(Scheme::rs(4, 2).unwrap(), &mut dice).await;
    let id = ShardId { segment: segment(1), index: ShardIndex(2) };
    cluster.nodes[2].state().unreadable.insert((id, 0));
    cluster.take_down(&[0]);
    assert!(*cluster.read_blocks(segment(1), &body, 0, 4096).await.unwrap() == body[..4096]);
    cluster.until(|cluster| cluster.nodes[2].state().unreadable.is_empty()).await;
}
