//! Volumes: huge trims, new sizes, new names.

use std::time::{Duration, Instant};
use xsan_gateway::nbd::proto::command;
use xsan_tests::{Cluster, within};

const TIB: u64 = 1 << 40;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trim_of_16_tib_returns_at_once() {
    let mut cluster = Cluster::started();
    cluster.create_volume("huge", "16TiB");
    let places = [0, 4096, TIB - 512, 7 * TIB + 123 * 4096, 16 * TIB - (128 << 10)];
    let bytes = vec![0x5a; 128 << 10];
    let mut guest = cluster.guest("huge").await;
    assert_eq!(guest.size(), 16 * TIB);
    for zeroing in [command::TRIM, command::WRITE_ZEROES] {
        for place in places {
            guest.write(place, &bytes, 0).await.expect("a write");
        }
        guest.flush().await.expect("a flush");
        for place in places {
            assert_eq!(guest.read(place, bytes.len() as u64).await.expect("a read"), bytes);
        }
        let began = Instant::now();
        within(20, "the trim", guest.command(zeroing, 0, 16 * TIB, 0)).await.expect("the whole volume in one request");
        let took = began.elapsed();
        assert!(took < Duration::from_secs(2), "it took {took:?}");
        for place in places {
            let read = guest.read(place, bytes.len() as u64).await.expect("a read");
            assert!(read.iter().all(|&byte| byte == 0), "zeroes at {place} after command {zeroing}");
        }
        guest.flush().await.expect("a flush");
    }
    let map = guest.block_status(0, 16 * TIB, 0).await.expect("the map");
    let covered: u64 = map.iter().map(|(length, _)| length).sum();
    assert!(map.iter().all(|&(_, state)| state == 3) && covered == 16 * TIB, "one hole of zeroes: {map:?}");

    guest.write(8 * TIB, &bytes, 0).await.expect("a write after it");
    guest.flush().await.expect("a flush");
    cluster.kill();
    cluster.start();
    let mut guest = cluster.guest("huge").await;
    for place in places {
        let read = guest.read(place, bytes.len() as u64).await.expect("a read");
        assert!(read.iter().all(|&byte| byte == 0), "zeroes at {place} after a kill");
    }
    assert_eq!(guest.read(8 * TIB, bytes.len() as u64).await.expect("a read"), bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_name_hides_no_client() {
    let cluster = Cluster::started();
    cluster.create_volume("a", "64MiB");
    let mut guest = cluster.guest("a").await;
    guest.write(0, &[1; 4096], 0).await.expect("a write");
    cluster.ok(&["volume", "rename", "a", "b"]);
    cluster.create_volume("a", "64MiB");
    let mut other = cluster.guest("a").await;
    let clients = |name: &str| cluster.ok(&["volume", "stat", name])["clients"].clone();
    assert_eq!((clients("a"), clients("b")), (1.into(), 1.into()));

    let refused = cluster.run(&["volume", "delete", "b", "--yes"]);
    assert_eq!(refused.code, 2, "its client came under the old name: {refused:?}");
    assert!(refused.stderr.contains("--force"), "and the answer says how: {refused:?}");
    assert_eq!(guest.read(0, 4096).await.expect("it serves on"), vec![1; 4096]);

    cluster.ok(&["volume", "delete", "a", "--yes", "--force"]);
    assert!(within(10, "a cut off client is told", other.read(0, 4096)).await.is_err());
    assert_eq!(guest.read(0, 4096).await.expect("it was not meant"), vec![1; 4096]);
    cluster.ok(&["volume", "delete", "b", "--yes", "--force"]);
    assert!(within(10, "a cut off client is told", guest.read(0, 4096)).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_keeps_its_bytes_under_a_new_size_and_name() {
    let mut cluster = Cluster::started();
    cluster.create_volume("a", "64MiB");
    let bytes: Vec<u8> = (0..1 << 20).map(|at: u32| (at * 7 / 3) as u8).collect();
    let mut guest = cluster.guest("a").await;
    guest.write(1 << 20, &bytes, 0).await.expect("a write");
    guest.write(63 << 20, &bytes, 0).await.expect("a write");
    guest.flush().await.expect("a flush");
    guest.disconnect().await.expect("goodbye");

    cluster.ok(&["volume", "resize", "a", "--size", "128MiB"]);
    cluster.ok(&["volume", "rename", "a", "b"]);
    assert_eq!(cluster.run(&["volume", "stat", "a"]).code, 4);
    assert!(cluster.connect("a").await.is_err(), "the old name is no export");
    let mut guest = cluster.guest("b").await;
    assert_eq!(guest.size(), 128 << 20);
    guest.write(127 << 20, &bytes, 0).await.expect("a write in what is new");
    guest.flush().await.expect("a flush");
    guest.disconnect().await.expect("goodbye");

    cluster.kill();
    cluster.start();
    let stat = cluster.ok(&["volume", "stat", "b"]);
    assert_eq!(stat["size"], 128 << 20);
    let mut guest = cluster.guest("b").await;
    for place in [1 << 20, 63 << 20, 127 << 20] {
        assert_eq!(guest.read(place, 1 << 20).await.expect("a read"), bytes, "at {place}");
    }
    guest.disconnect().await.expect("goodbye");

    let refused = cluster.run(&["volume", "resize", "b", "--size", "32MiB"]);
    assert_eq!(refused.code, 2, "smaller only when asked for: {refused:?}");
    assert!(refused.stderr.contains("--shrink"), "and the answer says how: {refused:?}");
    cluster.ok(&["volume", "resize", "b", "--size", "32MiB", "--shrink"]);
    cluster.ok(&["volume", "resize", "b", "--size", "128MiB"]);
    for killed in [false, true] {
        if killed {
            cluster.kill();
            cluster.start();
        }
        let mut guest = cluster.guest("b").await;
        assert_eq!(guest.read(1 << 20, 1 << 20).await.expect("a read"), bytes);
        for place in [63 << 20, 127 << 20] {
            let read = guest.read(place, 1 << 20).await.expect("a read");
            assert!(read.iter().all(|&byte| byte == 0), "what was cut off stays away, at {place}, killed: {killed}");
        }
    }
}
