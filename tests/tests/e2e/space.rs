//! Space that a deleted volume held is free at once; clients are protected from it.

use std::sync::{Arc, Mutex};
use xsan_tests::load::write_some;
use xsan_tests::{Cluster, Ledger, Random, eventually, within};

const WRITTEN: u64 = 256 << 20;
/// What may stay: tombstones and metadata, no data.
const LEFT_OVER: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delete_gives_space_back_at_once() {
    let cluster = Cluster::started();
    let before = cluster.used_bytes();
    cluster.create_volume("big", "1GiB");
    assert!(cluster.used_bytes() <= before + LEFT_OVER, "a volume without data takes no space");

    let mut guest = cluster.guest("big").await;
    let block = vec![0xa5; 4 << 20];
    for offset in (0..WRITTEN).step_by(block.len()) {
        within(60, "a write", guest.write(offset, &block, 0)).await.expect("a write");
    }
    guest.flush().await.expect("a flush");
    let full = cluster.used_bytes();
    assert!(full >= before + WRITTEN * 3 / 2, "{WRITTEN} bytes at 4+2 take half as much again: {before} to {full}");
    assert!(full <= before + WRITTEN * 4, "and not much more: {before} to {full}");

    let refused = cluster.run(&["volume", "delete", "big", "--yes"]);
    assert_eq!(refused.code, 2, "a volume with a client stays: {refused:?}");
    assert!(refused.stderr.contains("--force"), "and the answer says how: {refused:?}");
    assert_eq!(guest.read(0, 4096).await.expect("it serves on"), vec![0xa5; 4096]);

    cluster.ok(&["volume", "delete", "big", "--yes", "--force"]);
    let after = cluster.used_bytes();
    assert!(after <= before + LEFT_OVER, "space is back at once: {before}, {full}, {after}");
    assert!(within(10, "a cut off client is told", guest.read(0, 4096)).await.is_err());
    assert_eq!(cluster.run(&["volume", "stat", "big"]).code, 4);
    assert!(cluster.connect("big").await.is_err(), "the export is gone");

    cluster.create_volume("big", "1GiB");
    let mut guest = cluster.guest("big").await;
    assert_eq!(
        guest.read(0, 1 << 20).await.expect("a read"),
        vec![0; 1 << 20],
        "nothing of the old one shines through"
    );
}

/// A node that was away while a volume was deleted frees it when it returns; a start after a kill frees what was left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_missed_a_delete_frees_it_when_it_returns() {
    let mut random = Random::of_test();
    let mut cluster = Cluster::started();
    let before = cluster.used_bytes();
    cluster.create_volume("vm1", "64MiB");
    let ledger = Arc::new(Mutex::new(Ledger::new(64 << 20)));
    write_some(cluster.dir(), "vm1", &ledger, &mut random, 2, 64 << 20).await;
    cluster.ok(&["node", "stop", "n3", "--crash"]);
    cluster.ok(&["volume", "delete", "vm1", "--yes", "--force"]);
    cluster.kill();
    cluster.start();
    cluster.ok(&["node", "start", "n3"]);
    eventually(20, "n3 frees the deleted volume", || {
        let used = cluster.used_bytes();
        if used <= before + LEFT_OVER { Ok(()) } else { Err(format!("{used} bytes in use, {before} at first")) }
    });
}
