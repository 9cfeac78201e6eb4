//! Lost nodes: two cost nothing, three make I/O wait, none of it costs data.

use std::sync::{Arc, Mutex};
use std::time::Duration;
use xsan_tests::cluster::connect;
use xsan_tests::ledger::content;
use xsan_tests::load::{Shared, read_all_back, write_some};
use xsan_tests::{Cluster, Ledger, Random, eventually, within};

const VOLUME_BYTES: u64 = 64 << 20;

fn ledger() -> Shared {
    Arc::new(Mutex::new(Ledger::new(VOLUME_BYTES)))
}

fn stop(cluster: &Cluster, nodes: &[&str]) {
    for (index, node) in nodes.iter().enumerate() {
        // Both ways to go, in turns.
        let how: &[&str] = if index % 2 == 0 { &["--crash"] } else { &[] };
        cluster.ok(&[&["node", "stop", node], how].concat());
    }
}

fn start(cluster: &Cluster, nodes: &[&str]) {
    for node in nodes {
        cluster.ok(&["node", "start", node]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_lost_nodes_cost_nothing() {
    let mut random = Random::of_test();
    let cluster = Cluster::started();
    cluster.create_volume("vm1", "64MiB");
    let ledger = ledger();
    write_some(cluster.dir(), "vm1", &ledger, &mut random, 3, 64 << 20).await;

    stop(&cluster, &["n2", "n5"]);
    let status = cluster.status();
    assert_eq!(status["health"], "degraded", "{}", status["reasons"]);
    assert!(status["reasons"].as_array().is_some_and(|reasons| !reasons.is_empty()));
    let mut guest = cluster.guest("vm1").await;
    read_all_back(&mut guest, &ledger, "without n2 and n5").await;
    write_some(cluster.dir(), "vm1", &ledger, &mut random, 3, 64 << 20).await;
    guest.flush().await.expect("a flush without n2 and n5");
    read_all_back(&mut guest, &ledger, "written without n2 and n5").await;

    start(&cluster, &["n2", "n5"]);
    cluster.wait_until_whole(60);
    // Every position is there again, so any other two may go.
    stop(&cluster, &["n1", "n4"]);
    read_all_back(&mut guest, &ledger, "without n1 and n4").await;
    write_some(cluster.dir(), "vm1", &ledger, &mut random, 3, 16 << 20).await;
    start(&cluster, &["n1", "n4"]);
    cluster.wait_until_whole(60);
    stop(&cluster, &["n6", "n3"]);
    read_all_back(&mut guest, &ledger, "without n6 and n3").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_come_and_go_under_load_cost_nothing() {
    let mut random = Random::of_test();
    let cluster = Cluster::started();
    cluster.create_volume("vm1", "64MiB");
    let ledger = ledger();
    for round in 0..3 {
        let first = random.between(1, 6);
        let second = (first + random.below(5)) % 6 + 1;
        let nodes = [format!("n{first}"), format!("n{second}")];
        let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
        let writing = {
            let (dir, ledger, mut random) = (cluster.dir(), Arc::clone(&ledger), random.fork());
            tokio::spawn(async move { write_some(dir, "vm1", &ledger, &mut random, 4, 64 << 20).await })
        };
        stop(&cluster, &nodes);
        tokio::time::sleep(Duration::from_millis(random.below(300))).await;
        start(&cluster, &nodes);
        within(120, "the load", writing).await.expect("the load");
        let mut guest = cluster.guest("vm1").await;
        read_all_back(&mut guest, &ledger, &format!("round {round}, {nodes:?} came and went")).await;
        cluster.wait_until_whole(60);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_lost_nodes_make_io_wait_and_resume() {
    let mut random = Random::of_test();
    let cluster = Cluster::started();
    cluster.create_volume("vm1", "64MiB");
    let ledger = ledger();
    write_some(cluster.dir(), "vm1", &ledger, &mut random, 3, 64 << 20).await;
    let mut writer = cluster.guest("vm1").await;
    let mut reader = cluster.guest("vm1").await;
    writer.flush().await.expect("a flush");

    stop(&cluster, &["n1", "n2", "n3"]);
    // Most rows of a 4+2 code miss three of six positions, and three of four journal members may be among the lost.
    let writing = {
        let ledger = Arc::clone(&ledger);
        tokio::spawn(async move {
            let ticket = ledger.lock().expect("ledger").begin(0, 16 << 20, false);
            let bytes = content(0, 16 << 20, ticket.stamp);
            let result = match writer.write(0, &bytes, 0).await {
                Ok(()) => writer.flush().await,
                Err(error) => Err(error),
            };
            if result.is_ok() {
                ledger.lock().expect("ledger").acknowledge(ticket);
            }
            result
        })
    };
    let reading = tokio::spawn(async move { reader.read(32 << 20, 16 << 20).await });

    eventually(20, "status says why I/O waits", || {
        let status = cluster.status();
        let told = status["reasons"].as_array().is_some_and(|reasons| {
            reasons.iter().any(|reason| reason.as_str().is_some_and(|reason| reason.contains("wait")))
        });
        if status["health"] == "stalled" && told { Ok(()) } else { Err(status.to_string()) }
    });
    // Nothing failed, and what needs a lost node did not end.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!(reading.is_finished() && writing.is_finished()), "three lost of 4+2: neither read nor write waits");

    start(&cluster, &["n2"]);
    let read = within(30, "the read ends when a node returns", reading).await.expect("no panic");
    let bytes = read.unwrap_or_else(|error| panic!("a read that waits is no error: {error}"));
    ledger.lock().expect("ledger").check(32 << 20, &bytes).expect("right bytes");
    let written = within(30, "the write ends when a node returns", writing).await.expect("no panic");
    written.unwrap_or_else(|error| panic!("a write that waits is no error: {error}"));
    let mut guest = cluster.guest("vm1").await;
    read_all_back(&mut guest, &ledger, "with n2 back").await;
    assert_eq!(cluster.status()["health"], "degraded");
    start(&cluster, &["n1", "n3"]);
    cluster.wait_until_whole(60);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_waits_for_nodes_keeps_no_other_one_and_no_shutdown_waiting() {
    let mut cluster = Cluster::started();
    cluster.create_volume("coded", "16MiB");
    cluster.ok(&["pool", "create", "mirror", "--replicas", "4"]);
    cluster.ok(&["volume", "create", "mirrored", "--size", "16MiB", "--pool", "mirror"]);
    let bytes = vec![7; 1 << 20];
    for volume in ["coded", "mirrored"] {
        let mut guest = cluster.guest(volume).await;
        guest.write(0, &bytes, 0).await.expect("a write");
        guest.flush().await.expect("a flush");
    }
    cluster.kill();
    cluster.start();
    // Too few to seal what was open with 4+2, enough for four replicas; nothing is attached yet.
    stop(&cluster, &["n1", "n2", "n3"]);
    let dir = cluster.dir();
    let waiting = tokio::spawn(async move { connect(&dir, "coded").await });
    eventually(20, "the take-over of the coded volume has begun", || {
        cluster.log().contains("take-over waits").then_some(()).ok_or_else(|| cluster.log())
    });
    let mut guest = cluster.guest("mirrored").await;
    assert_eq!(guest.read(0, 1 << 20).await.expect("a read"), bytes);
    assert!(!waiting.is_finished(), "the coded volume cannot be served: {:?}", waiting.await.map(|got| got.is_ok()));
    cluster.stop();
    assert!(within(10, "who waited is told", waiting).await.expect("no panic").is_err());
}
