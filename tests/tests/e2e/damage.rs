//! Flipped bits on at most as many nodes as the pool survives: right bytes or a clear refusal, never wrong bytes, never a panic.

use serde_json::json;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use xsan_tests::cluster::{outcome, program};
use xsan_tests::damage::Damage;
use xsan_tests::load::{Shared, read_all_back, write_some};
use xsan_tests::{Cluster, Ledger, Outcome, Random, rounds};

const VOLUME_BYTES: u64 = 64 << 20;
const DEVICE_BYTES: u64 = 2 << 30;
/// Bits flipped on a device: about one in every second block, so that a third bad shard anywhere would show.
const FLIPS: usize = 20_000;

/// A cluster whose volume was written and overwritten, ended as told.
struct Written {
    cluster: Cluster,
    ledger: Shared,
    /// First byte of the extent area of the devices.
    area: u64,
}

async fn written(random: &mut Random, cleanly: bool) -> Written {
    let mut cluster = Cluster::started();
    cluster.create_volume("vm1", "64MiB");
    let ledger = Arc::new(Mutex::new(Ledger::new(VOLUME_BYTES)));
    write_some(cluster.dir(), "vm1", &ledger, random, 3, 96 << 20).await;
    let area = DEVICE_BYTES - cluster.status()["nodes"][0]["capacity"].as_u64().expect("capacity");
    if cleanly {
        cluster.stop();
    } else {
        cluster.kill();
    }
    Written { cluster, ledger, area }
}

/// Two different nodes, from 1.
fn two_nodes(random: &mut Random) -> [usize; 2] {
    let first = random.between(1, 6);
    [first as usize, ((first + random.below(5)) % 6 + 1) as usize]
}

async fn assert_all_there(written: &mut Written, about: &str) {
    let mut guest = written.cluster.guest("vm1").await;
    read_all_back(&mut guest, &written.ledger, about).await;
    // Twice: a repair in place must not make it worse.
    read_all_back(&mut guest, &written.ledger, about).await;
}

/// Starts on damaged devices. Either all is served rightly, or the start is refused in words that name the node, and goes well
/// with the damage taken back.
async fn assert_served_or_refused(mut written: Written, damage: Vec<Damage>, nodes: &[usize], about: &str) -> bool {
    let began = written.cluster.log().len();
    match written.cluster.try_start() {
        Ok(_) => {
            assert_all_there(&mut written, about).await;
            true
        }
        Err(status) => {
            let log = written.cluster.log()[began..].to_owned();
            assert!(status.code().is_some_and(|code| code != 101), "{about}: ended with {status}:\n{log}");
            let named = nodes.iter().any(|node| log.contains(&format!("node n{node}")));
            assert!(named && log.contains("xsan:"), "{about}: a refusal names the node:\n{log}");
            println!("{about}: refused: {}", log.lines().rfind(|line| line.starts_with("xsan:")).unwrap_or_default());
            damage.into_iter().for_each(Damage::undo);
            written.cluster.start();
            assert_all_there(&mut written, about).await;
            false
        }
    }
}

/// `xsan debug` on files of a cluster that does not run.
fn debug(arguments: &[&str], paths: &[PathBuf]) -> Outcome {
    let mut command = Command::new(program());
    outcome(command.args(["--output", "json", "debug"]).args(arguments).args(paths))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn debug_commands_show_what_is_left_and_change_nothing() {
    let mut random = Random::of_test();
    let written = written(&mut random, false).await;
    let devices: Vec<PathBuf> = (1..=6).map(|node| written.cluster.device(node)).collect();
    let [first, index] = [devices[0].clone(), devices[0].with_file_name("index")];
    let meta = written.cluster.dir().join("meta");
    let before = std::fs::read_dir(&index).expect("an index").count();

    let device = debug(&["device"], std::slice::from_ref(&first)).json();
    assert!(device["frames"].as_array().is_some_and(|frames| !frames.is_empty()), "{device}");
    let shards = debug(&["shard", "--verify"], std::slice::from_ref(&first)).json();
    let by_header: Vec<_> = shards.as_array().expect("a list").iter().map(|shard| &shard["shard"]).collect();
    assert!(!by_header.is_empty() && shards[0]["whole"] == true, "{shards}");
    let indexed = debug(&["index"], std::slice::from_ref(&index)).json();
    let indexed = indexed["shards"].as_array().expect("a list");
    assert!(!indexed.is_empty() && indexed.iter().all(|shard| by_header.contains(&&shard["shard"])), "{indexed:?}");
    let segments = debug(&["segment"], &devices).json();
    let of = |name: &str| segments.as_array().expect("a list").iter().filter(|s| s[name] != json!([])).count();
    assert!(of("shards") > 0 && of("replicas") > 0, "sealed and open ones: {segments}");
    let log = debug(&["meta"], std::slice::from_ref(&meta));
    assert!(log.stdout.contains("CreateVolume") && log.stdout.contains("vm1"), "{log:?}");
    assert_eq!(std::fs::read_dir(&index).expect("an index").count(), before);

    // Damage everywhere: what can be read is shown, and nothing ends with a panic.
    for round in 0..6 {
        let all = [0..1 << 20, 1 << 20..written.area, written.area..written.area + (64 << 20)];
        let damage: Vec<Damage> =
            all.iter().map(|range| Damage::flip(&first, range.clone(), 40, &mut random)).collect();
        for command in ["device", "shard", "segment"] {
            let shown = debug(&[command], std::slice::from_ref(&first));
            assert!([0, 2].contains(&shown.code), "round {round}, {command}: {shown:?}");
            assert!(shown.code == 0 || shown.stderr.contains("superblock"), "round {round}, {command}: {shown:?}");
        }
        damage.into_iter().rev().for_each(Damage::undo);
    }
    let file = meta.join("raft.log");
    let mut bytes = std::fs::read(&file).expect("a log");
    for _ in 0..3 {
        let at = random.below(bytes.len() as u64) as usize;
        bytes[at] ^= 1 << random.below(8);
    }
    std::fs::write(&file, bytes).expect("the log is damaged");
    let shown = debug(&["meta"], &[meta]);
    assert_eq!(shown.code, 0, "{shown:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flipped_bits_in_data_are_repaired() {
    let mut random = Random::of_test();
    for round in 0..rounds(10).div_ceil(5) {
        let cleanly = round % 2 == 0;
        let mut written = written(&mut random, cleanly).await;
        let nodes = two_nodes(&mut random);
        let about = format!("data of n{} and n{}, ended cleanly: {cleanly}", nodes[0], nodes[1]);
        println!("{about}");
        for node in nodes {
            let area = written.area..written.area + (512 << 20);
            Damage::flip(&written.cluster.device(node), area, FLIPS, &mut random);
        }
        written.cluster.start();
        assert_all_there(&mut written, &about).await;
        let found = written.cluster.status()["counters"]["corrupt_found"].as_u64();
        assert!(found.is_some_and(|found| found > 0), "{about}: bits were flipped and none was found");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flipped_bits_in_the_log_never_give_wrong_bytes() {
    let mut random = Random::of_test();
    let mut served = 0;
    let total = rounds(10).div_ceil(3);
    for round in 0..total {
        let cleanly = round % 2 == 0;
        let written = written(&mut random, cleanly).await;
        let nodes = two_nodes(&mut random);
        let bits = random.between(1, 4) as usize;
        let about = format!("{bits} bits in the logs of n{} and n{}, ended cleanly: {cleanly}", nodes[0], nodes[1]);
        println!("{about}");
        let log = 1 << 20..written.area;
        let flip = |&node: &usize| Damage::flip(&written.cluster.device(node), log.clone(), bits, &mut random);
        let damage = nodes.iter().map(flip).collect();
        served += u64::from(assert_served_or_refused(written, damage, &nodes, &about).await);
    }
    println!("{served} of {total} were served in spite of the damage");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_in_a_superblock_is_survived_and_in_both_is_refused() {
    let mut random = Random::of_test();
    let mut written = written(&mut random, false).await;
    // The copies lie at 0 and 64 KiB.
    for (node, copy) in [(2, 0), (5, 64 << 10)] {
        Damage::flip(&written.cluster.device(node), copy..copy + 4096, 1, &mut random);
    }
    written.cluster.start();
    assert_all_there(&mut written, "one copy of the superblock is damaged on two nodes").await;
    written.cluster.kill();

    let device = written.cluster.device(3);
    let copies = [0, 64 << 10];
    let damage = copies.map(|copy| Damage::flip(&device, copy..copy + 4096, 1, &mut random)).to_vec();
    let served = assert_served_or_refused(written, damage, &[3], "both copies of the superblock").await;
    assert!(!served, "a device without a superblock cannot be served");
}
