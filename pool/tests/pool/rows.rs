//! Rows written straight to their shards are complete when all positions have them, and end as the shards of a seal.

use crate::cluster::{Cluster, Dice, aligned, schemes, segment};
use crate::fake::Stall;
use futures::FutureExt;
use lsm_block::store::{RowWriter, SegmentStore, StoreError, StoreResult};
use std::sync::Arc;
use xsan_env::Buf;
use xsan_types::{Scheme, ShardIndex};
use xsan_wire::node::NodeError;

const UNIT: usize = 65536;
const STALLED: Stall = Stall { reads: false, puts: false, appends: true };

fn rs42() -> Scheme {
    Scheme::rs(4, 2).unwrap()
}

fn row_schemes() -> impl Iterator<Item = Scheme> {
    schemes().into_iter().filter(|scheme| scheme.k() > 1)
}

async fn open(cluster: &Cluster, number: u64) -> Arc<dyn RowWriter> {
    cluster.pool.open_rows(segment(number)).await.unwrap()
}

/// `rows` of a body whose rows have `row` bytes, in aligned pieces of `piece` bytes.
fn rows_of(body: &[u8], row: usize, rows: std::ops::Range<usize>, piece: usize) -> Vec<Buf> {
    body[rows.start * row..rows.end * row].chunks(piece).map(aligned).collect()
}

#[tokio::test]
async fn rows_and_footer_give_the_shards_of_a_seal() {
    let mut dice = Dice(1);
    for scheme in row_schemes() {
        let row = scheme.k() * UNIT;
        for (rows, footer) in [(1, 4096), (5, 20_480), (3, row), (2, row + 40_960), (4, 0), (0, 8192)] {
            let cluster = Cluster::new(scheme, 0);
            let body = dice.bytes(rows * row + footer);
            cluster.seal(segment(1), &body).await.unwrap();
            let writer = open(&cluster, 2).await;
            let mut first = 0;
            while first < rows {
                let next = first + 1 + dice.below((rows - first) as u64) as usize;
                let piece = [4096, 12288, 65536, 1 << 20][dice.below(4) as usize];
                writer.append(first as u64, rows_of(&body, row, first..next, piece)).await.unwrap();
                let written = &body[..next * row];
                cluster.check_reads(segment(2), written, &mut dice, 3, &format!("{scheme} open, {next} rows")).await;
                first = next;
            }
            writer.finish(aligned(&body[rows * row..])).await.unwrap();
            for index in 0..scheme.width() {
                let (sealed, rows) =
                    (cluster.shard(segment(1), index).unwrap(), cluster.shard(segment(2), index).unwrap());
                assert!(sealed.bytes == rows.bytes && sealed.hash == rows.hash && !rows.open, "{scheme} {index}");
            }
            cluster.check_reads(segment(2), &body, &mut dice, 3, "finished").await;
            let stats = cluster.pool.stats();
            assert_eq!((stats.rows_finished, stats.row_bytes), (1, (rows * row) as u64));
        }
    }
}

#[tokio::test]
async fn open_rows_are_read_with_m_devices_away() {
    let mut dice = Dice(2);
    for scheme in row_schemes() {
        let row = scheme.k() * UNIT;
        let mut cluster = Cluster::new(scheme, 0);
        let body = dice.bytes(3 * row);
        open(&cluster, 1).await.append(0, rows_of(&body, row, 0..3, 65536)).await.unwrap();
        cluster.take_down(&dice.choose(scheme.tolerates(), scheme.width()));
        cluster.check_reads(segment(1), &body, &mut dice, 10, "open and degraded").await;
    }
}

#[tokio::test]
async fn writing_rows_reads_nothing_and_copies_no_aligned_data() {
    let cluster = Cluster::new(rs42(), 0);
    let body = Dice(3).bytes(16 * 4 * UNIT);
    let writer = open(&cluster, 1).await;
    for row in 0..16 {
        writer.append(row as u64, rows_of(&body, 4 * UNIT, row..row + 1, 4 * UNIT)).await.unwrap();
    }
    writer.finish(aligned(&[1; 4096])).await.unwrap();
    let stats = cluster.pool.stats();
    assert_eq!(stats.shard_reads, 0);
    assert_eq!(stats.shard_write_bytes, (16 * 6 * UNIT + 6 * 4096) as u64);
}

#[tokio::test]
async fn overlapping_appends_complete_when_all_before_them_are_there() {
    let cluster = Cluster::new(rs42(), 0);
    let body = Dice(4).bytes(4 * 4 * UNIT);
    let writer = open(&cluster, 1).await;
    let append = |row: usize| writer.append(row as u64, rows_of(&body, 4 * UNIT, row..row + 1, 65536));
    append(0).await.unwrap();
    cluster.stall(3, STALLED);
    let mut late: Vec<StoreResult<()>> = (1..4).map(append).collect();
    cluster.until(|cluster| cluster.nodes[5].state().shards.values().any(|shard| shard.bytes.len() == 4 * UNIT)).await;
    assert!(late.iter_mut().all(|append| append.now_or_never().is_none()), "position 3 has not answered");
    let lengths = |writer: &Arc<dyn RowWriter>| -> Vec<u64> {
        writer.flush_requests().iter().map(|request| request.shards[0].1).collect()
    };
    assert_eq!(lengths(&writer), [UNIT as u64; 6], "only what is complete may be named in a flush");
    cluster.stall(3, Stall::default());
    for append in late {
        append.await.unwrap();
    }
    assert_eq!(lengths(&writer), [4 * UNIT as u64; 6]);
    let requests = writer.flush_requests();
    for (index, request) in requests.iter().enumerate() {
        assert_eq!(request.device, cluster.nodes[index].device);
        assert_eq!(request.shards[0].0.index, ShardIndex(index as u8));
        assert!(request.member.is_none() && request.replicas.is_empty());
    }
    writer.finish(aligned(&[1; 4096])).await.unwrap();
    assert_eq!(writer.flush_requests(), [], "finished shards are flushed");
}

#[tokio::test]
async fn a_caller_who_leaves_harms_nobody() {
    let cluster = Cluster::new(rs42(), 0);
    let body = Dice(5).bytes(3 * 4 * UNIT);
    let writer = open(&cluster, 1).await;
    drop(writer.append(0, rows_of(&body, 4 * UNIT, 0..1, 4096)));
    drop(writer.append(1, rows_of(&body, 4 * UNIT, 1..2, 4096)));
    writer.append(2, rows_of(&body, 4 * UNIT, 2..3, 4096)).await.unwrap();
    writer.finish(Buf::new()).await.unwrap();
    cluster.check_reads(segment(1), &body, &mut Dice(6), 3, "after dropped appends").await;
}

#[tokio::test]
async fn whatever_fails_fails_the_segment_and_says_it_is_a_device_not_the_owner() {
    let body = Dice(7).bytes(2 * 4 * UNIT);
    for failing in 0..6 {
        for call in 2..=4 {
            let cluster = Cluster::new(rs42(), 0);
            // Calls of a node: devices, append, append, footer, finish.
            cluster.nodes[failing].state().fail_call = Some((call, NodeError::Closed));
            let writer = open(&cluster, 1).await;
            let mut results = Vec::new();
            for row in 0..2 {
                results.push(writer.append(row as u64, rows_of(&body, 4 * UNIT, row..row + 1, 65536)).await);
            }
            results.push(writer.finish(aligned(&[1; 4096])).await);
            let device = cluster.nodes[failing].device;
            let failed_from = call as usize - 2;
            for (at, result) in results.into_iter().enumerate() {
                let expected = if at < failed_from { Ok(()) } else { Err(StoreError::Unavailable { device }) };
                assert_eq!(result, expected, "node {failing} call {call} result {at}");
            }
        }
    }
}

#[tokio::test]
async fn a_restarted_process_and_a_full_device_fail_the_segment() {
    let body = Dice(8).bytes(2 * 4 * UNIT);
    let cluster = Cluster::new(rs42(), 0);
    let writer = open(&cluster, 1).await;
    writer.append(0, rows_of(&body, 4 * UNIT, 0..1, 65536)).await.unwrap();
    cluster.nodes[4].restart();
    let result = writer.append(1, rows_of(&body, 4 * UNIT, 1..2, 65536)).await;
    assert_eq!(result, Err(StoreError::Unavailable { device: cluster.nodes[4].device }));

    let writer = open(&cluster, 2).await;
    cluster.nodes[0].state().is_full = true;
    assert_eq!(writer.append(0, rows_of(&body, 4 * UNIT, 0..1, 65536)).await, Err(StoreError::NoSpace));
}

#[tokio::test]
async fn a_device_that_hangs_fails_the_segment_when_the_map_says_it_is_down() {
    let mut cluster = Cluster::new(rs42(), 0);
    let body = Dice(9).bytes(4 * UNIT);
    let writer = open(&cluster, 1).await;
    cluster.stall(1, STALLED);
    let append = writer.append(0, rows_of(&body, 4 * UNIT, 0..1, 65536));
    cluster.until(|cluster| !cluster.nodes[1].state().shards.is_empty()).await;
    cluster.take_down(&[1]);
    assert_eq!(append.await, Err(StoreError::Unavailable { device: cluster.nodes[1].device }));
}

#[tokio::test]
async fn rows_are_not_opened_where_a_position_is_missing() {
    let mut cluster = Cluster::new(rs42(), 0);
    cluster.take_down(&[5]);
    assert_eq!(cluster.pool.open_rows(segment(1)).await.err(), Some(StoreError::TooFew { found: 5, needed: 6 }));
    assert!(!cluster.pool.rows_possible());
    let copies = Cluster::new(Scheme::replica(3).unwrap(), 0);
    assert!(copies.pool.open_rows(segment(1)).await.is_err() && !copies.pool.rows_possible());
}

#[tokio::test]
async fn appends_out_of_order_or_out_of_shape_are_refused() {
    let cluster = Cluster::new(rs42(), 0);
    let body = Dice(10).bytes(2 * 4 * UNIT);
    let writer = open(&cluster, 1).await;
    let append = |row, data: Vec<Buf>| writer.append(row, data);
    assert_eq!(append(1, vec![aligned(&body[..4 * UNIT])]).await, Err(StoreError::Internal));
    assert_eq!(append(0, vec![aligned(&body[..UNIT])]).await, Err(StoreError::Internal));
    assert_eq!(append(0, crate::cluster::unaligned(&body[..4 * UNIT], 4096)).await, Err(StoreError::Internal));
    assert_eq!(append(0, Vec::new()).await, Err(StoreError::Internal));
    append(0, vec![aligned(&body[..4 * UNIT])]).await.unwrap();
    writer.finish(aligned(&[1; 4096])).await.unwrap();
    assert_eq!(append(1, vec![aligned(&body[4 * UNIT..])]).await, Err(StoreError::Internal), "finished");
}

#[tokio::test]
async fn a_row_that_too_few_positions_have_is_not_there_once_all_have_answered() {
    let mut cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
    let body = Dice(77).bytes(1 << 20);
    cluster.seal(segment(1), &body).await.unwrap();
    for index in 0..3 {
        let number = cluster.node_of(segment(1), index);
        cluster.nodes[number].state().shards.clear();
    }
    // Somebody is away: it may bring what is missing.
    let away = cluster.node_of(segment(1), 5);
    cluster.take_down(&[away]);
    let error = cluster.read_blocks(segment(1), &body, 0, 4096).await.unwrap_err();
    assert!(matches!(error, StoreError::TooFew { .. }), "{error:?}");
    cluster.bring_up_all();
    let error = cluster.read_blocks(segment(1), &body, 0, 4096).await.unwrap_err();
    assert_eq!(error, StoreError::NotFound);
}

/// Found by a simulated cluster: the row reached some positions, one never heard of it, and the volume waited for nodes
/// that were all there.
#[tokio::test]
async fn a_torn_row_is_wrong_not_late_once_all_have_answered() {
    let mut cluster = Cluster::new(Scheme::rs(4, 2).unwrap(), 0);
    let body = Dice(78).bytes(1 << 20);
    cluster.seal(segment(1), &body).await.unwrap();
    for index in 0..3 {
        cluster.damage(segment(1), index, 0);
    }
    let number = cluster.node_of(segment(1), 5);
    cluster.nodes[number].state().shards.clear();
    let error = cluster.read_blocks(segment(1), &body, 0, 4096).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
    cluster.take_down(&[number]);
    let error = cluster.read_blocks(segment(1), &body, 0, 4096).await.unwrap_err();
    assert!(matches!(error, StoreError::TooFew { .. }), "{error:?}");
}
