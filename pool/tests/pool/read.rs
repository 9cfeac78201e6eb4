//! Whatever was sealed comes back, with up to m devices away; with more, the error says what to do.

use crate::cluster::{Cluster, Dice, aligned, device, schemes, segment, unaligned};
use lsm_block::store::{Check, SegmentRead, SegmentStore, StoreError};
use xsan_types::{Crc32c, Scheme};

const LENGTHS: [usize; 8] = [1, 4096, 5000, 65536, 262_144, 300_000, 1_000_000, 3 << 20];

#[tokio::test]
async fn every_range_comes_back_with_up_to_m_devices_away() {
    let mut dice = Dice(1);
    for scheme in schemes() {
        for (number, length) in LENGTHS.into_iter().enumerate() {
            let mut cluster = Cluster::new(scheme, 0);
            let (name, body) = (segment(number as u64), dice.bytes(length));
            assert_eq!(cluster.seal(name, &body).await.unwrap().0, []);
            for away in 0..=scheme.tolerates() {
                let down = dice.choose(away, scheme.width());
                cluster.take_down(&down);
                let why = format!("{scheme} {length} without {down:?}");
                cluster.check_reads(name, &body, &mut dice, 4, &why).await;
                cluster.bring_up_all();
            }
            assert_eq!(cluster.pool.stats().damaged_blocks, 0);
        }
    }
}

#[tokio::test]
async fn bodies_in_any_pieces_give_the_same_shards() {
    let mut dice = Dice(2);
    for scheme in schemes() {
        let cluster = Cluster::new(scheme, 0);
        let body = dice.bytes(1_234_567);
        cluster.seal(segment(1), &body).await.unwrap();
        cluster.pool.seal(segment(2), unaligned(&body, 4096)).await.unwrap();
        cluster.pool.seal(segment(3), body.chunks(40960).map(aligned).collect()).await.unwrap();
        for index in 0..scheme.width() {
            let first = cluster.shard(segment(1), index).unwrap();
            for number in [2, 3] {
                assert!(cluster.shard(segment(number), index).unwrap().bytes == first.bytes, "{scheme} {index}");
            }
        }
    }
}

#[tokio::test]
async fn a_read_inside_one_unit_asks_one_device_once() {
    let cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
    let body = Dice(3).bytes(1 << 20);
    cluster.seal(segment(1), &body).await.unwrap();
    for offset in [0, 4096, 61440, 65536, 3 * 65536 + 8192, (1 << 20) - 4096] {
        let before = cluster.pool.stats();
        let found = cluster.read_blocks(segment(1), &body, offset, 4096).await.unwrap();
        assert!(*found == body[offset..offset + 4096]);
        let after = cluster.pool.stats();
        assert_eq!(after.shard_reads - before.shard_reads, 1);
        assert_eq!(after.shard_read_bytes - before.shard_read_bytes, 4096);
    }
    assert_eq!(cluster.pool.stats().degraded_reads, 0);
    // Whole rows: one read per data shard, not one per unit.
    let before = cluster.pool.stats().shard_reads;
    cluster.read_blocks(segment(1), &body, 0, 1 << 20).await.unwrap();
    assert_eq!(cluster.pool.stats().shard_reads - before, 4);
}

#[tokio::test]
async fn copies_share_the_reads() {
    let cluster = Cluster::new(Scheme::replica(3).unwrap(), 0);
    let body = Dice(4).bytes(4 << 20);
    cluster.seal(segment(1), &body).await.unwrap();
    for block in 0..1024 {
        cluster.read_blocks(segment(1), &body, block * 4096, 4096).await.unwrap();
    }
    for node in &cluster.nodes {
        let reads = node.state().reads;
        assert!((200..500).contains(&reads), "{reads} of 1024 reads");
    }
}

#[tokio::test]
async fn a_rebuilding_read_of_whole_rows_does_not_read_twice_what_it_has() {
    let mut cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
    let body = Dice(5).bytes(1 << 20);
    cluster.seal(segment(1), &body).await.unwrap();
    cluster.take_down(&[1]);
    let before = cluster.pool.stats();
    cluster.read_blocks(segment(1), &body, 0, 1 << 20).await.unwrap();
    let after = cluster.pool.stats();
    assert_eq!(after.shard_reads - before.shard_reads, 4, "three data shards and one parity");
    assert_eq!(after.degraded_reads - before.degraded_reads, 1);
}

#[tokio::test]
async fn a_device_that_fails_without_the_map_knowing_is_gone_round() {
    let mut dice = Dice(6);
    for scheme in schemes().into_iter().filter(|scheme| scheme.tolerates() > 0) {
        let cluster = Cluster::new(scheme, 0);
        let body = dice.bytes(700_000);
        cluster.seal(segment(1), &body).await.unwrap();
        for number in dice.choose(scheme.tolerates(), scheme.width()) {
            cluster.nodes[number].state().is_down = true;
        }
        cluster.check_reads(segment(1), &body, &mut dice, 20, &scheme.to_string()).await;
    }
}

#[tokio::test]
async fn more_than_m_devices_away_is_said_so_and_passes_when_one_returns() {
    for scheme in schemes() {
        let mut cluster = Cluster::new(scheme, 0);
        let body = Dice(7).bytes(1 << 20);
        cluster.seal(segment(1), &body).await.unwrap();
        let away: Vec<usize> = (0..=scheme.tolerates()).collect();
        cluster.take_down(&away);
        let found = cluster.read_blocks(segment(1), &body, 0, 4096).await;
        let k = scheme.k();
        assert_eq!(found.unwrap_err(), StoreError::TooFew { found: k - 1, needed: k }, "{scheme}");
        let found = cluster.read_whole(segment(1), &body, 0, 1 << 20).await;
        assert_eq!(found.unwrap_err(), StoreError::TooFew { found: k - 1, needed: k }, "{scheme}");
        cluster.bring_up_all();
        cluster.take_down(&away[1..]);
        assert!(*cluster.read_blocks(segment(1), &body, 0, 4096).await.unwrap() == body[..4096], "{scheme}");
    }
}

#[tokio::test]
async fn a_segment_that_nobody_has_is_not_found() {
    for scheme in schemes() {
        let cluster = Cluster::new(scheme, 0);
        let body = vec![0; 1 << 20];
        assert_eq!(cluster.read_blocks(segment(9), &body, 0, 4096).await.unwrap_err(), StoreError::NotFound);
        assert_eq!(cluster.read_blocks(segment(9), &body, 0, 1 << 20).await.unwrap_err(), StoreError::NotFound);
    }
}

#[tokio::test]
async fn a_request_that_makes_no_sense_is_refused() {
    let cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
    let body = Dice(8).bytes(1 << 20);
    cluster.seal(segment(1), &body).await.unwrap();
    let read = |offset, length, crcs: usize, segment_bytes| SegmentRead {
        segment: segment(1),
        segment_bytes,
        offset,
        length,
        check: Check::Blocks(vec![Crc32c(0); crcs]),
    };
    for wrong in [
        read(1, 4096, 1, 1 << 20),
        read(0, 4095, 1, 1 << 20),
        read(0, 8192, 1, 1 << 20),
        read(1 << 20, 4096, 1, 1 << 20),
        read(u64::MAX - 4095, 4096, 1, 1 << 20),
        read(0, 4096, 1, 1 << 40),
    ] {
        assert_eq!(cluster.pool.read(wrong).await.unwrap_err(), StoreError::Internal);
    }
    assert_eq!(cluster.pool.read(read(0, 0, 0, 1 << 20)).await.unwrap().len(), 0);
}

#[tokio::test]
async fn holes_of_the_map_are_gone_round() {
    let mut cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
    let body = Dice(9).bytes(1 << 20);
    cluster.seal(segment(1), &body).await.unwrap();
    cluster.update(|view| {
        view.table[0][2] = None;
        view.devices.remove(&device(4));
    });
    let found = cluster.read_blocks(segment(1), &body, 0, 1 << 20).await.unwrap();
    assert!(*found == *body);
}
