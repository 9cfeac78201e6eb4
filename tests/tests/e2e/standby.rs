//! Guests that migrate: their disk is open on two hosts for a while (RFC 0008).

use std::time::Duration;
use xsan_gateway::nbd::proto::command;
use xsan_tests::cluster::Guest;
use xsan_tests::{Hosts, eventually};

const MIB: u64 = 1 << 20;

async fn open(hosts: &Hosts, node: usize) -> Guest {
    hosts.connect(node, "vm1").await.expect("let in")
}

async fn refused(hosts: &Hosts, node: usize) -> String {
    hosts.connect(node, "vm1").await.map(drop).expect_err("served elsewhere").to_string()
}

fn cluster() -> Hosts {
    let hosts = Hosts::started(3);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "64MiB"]);
    hosts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_migrates_reads_what_its_source_wrote_and_moves_its_disk_with_its_first_write() {
    let hosts = cluster();
    let mut source = open(&hosts, 1).await;
    source.write(0, &[1; 4096], 0).await.expect("a write");
    assert!(refused(&hosts, 2).await.contains("served by n1"), "nobody asked for standby");
    hosts.ok(2, &["volume", "attach", "vm1", "--standby"]);

    let mut target = open(&hosts, 2).await;
    for round in 2..20_u8 {
        source.write(0, &[round; 4096], 0).await.expect("the source goes on");
        assert!(target.read(0, 4096).await.expect("a read").iter().all(|byte| *byte == round), "round {round}");
    }
    source.write(9 * MIB, &[9; 4 << 20], 0).await.expect("a write");
    let read = target.read(8 * MIB, 8 * MIB).await.expect("more than the owner is asked for at once");
    let expected = |offset: usize| if (1 << 20..5 << 20).contains(&offset) { 9 } else { 0 };
    assert!(read.iter().enumerate().all(|(offset, byte)| *byte == expected(offset)));
    target.flush().await.expect("a flush");
    assert_eq!(hosts.server_of(3, "vm1").as_deref(), Some("n1"), "reads and flushes move nothing");
    assert!(refused(&hosts, 3).await.contains("served by n1"), "the grant is of n2 alone");
    source.write(4096, &[20; 4096], 0).await.expect("the source was not disturbed");

    target.write(8192, &[21; 4096], 0).await.expect("the first write");
    assert_eq!(hosts.server_of(3, "vm1").as_deref(), Some("n2"));
    let cut = source.write(0, &[22; 4096], 0).await.expect_err("its connection has ended");
    assert_eq!(cut.errno(), None, "no answer: {cut}");
    assert!(refused(&hosts, 1).await.contains("served by n2"), "the source cannot take it back from its guest");
    for (offset, byte) in [(0, 19), (4096, 20), (8192, 21)] {
        let read = target.read(offset, 4096).await.expect("a read");
        assert!(read.iter().all(|found| *found == byte), "{offset}: {} instead of {byte}", read[0]);
    }

    // Used up: the way back needs another grant.
    hosts.ok(1, &["volume", "attach", "vm1", "--standby"]);
    let mut back = open(&hosts, 1).await;
    back.command(command::TRIM, 0, 4096, 0).await.expect("a trim is a change as well");
    assert_eq!(hosts.server_of(3, "vm1").as_deref(), Some("n1"));
    assert!(refused(&hosts, 2).await.contains("served by n1"), "the first grant is used up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_dies_leaves_the_disk_to_the_guest_on_standby() {
    let mut hosts = cluster();
    let mut source = open(&hosts, 1).await;
    source.write(0, &[1; 4096], 0).await.expect("a write");
    hosts.ok(2, &["volume", "attach", "vm1", "--standby"]);
    let mut target = open(&hosts, 2).await;
    assert!(target.read(0, 4096).await.expect("a read").iter().all(|byte| *byte == 1));
    hosts.kill(1);
    // Asked of a dead node first; answered when it is known to be down.
    assert!(target.read(0, 4096).await.expect("a read").iter().all(|byte| *byte == 1));
    target.write(0, &[2; 4096], 0).await.expect("a write");
    assert_eq!(hosts.server_of(3, "vm1").as_deref(), Some("n2"));
    hosts.restart(1);
    hosts.wait_until_whole(2, 60);
    assert!(target.read(0, 4096).await.expect("a read").iter().all(|byte| *byte == 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_guest_on_standby_asked_for_before_it_left_is_not_done_after_it() {
    let hosts = cluster();
    let mut source = open(&hosts, 1).await;
    source.write(0, &[1; 4096], 0).await.expect("a write");
    hosts.ok(2, &["volume", "attach", "vm1", "--standby"]);
    let mut target = open(&hosts, 2).await;
    assert!(target.read(0, 4096).await.expect("a read").iter().all(|byte| *byte == 1));
    // So that the move takes a while.
    hosts.signal(1, "STOP");
    let asked = tokio::time::timeout(Duration::from_millis(500), target.write(0, &[2; 4096], 0)).await;
    assert!(asked.is_err(), "the source does not answer");
    drop(target);
    hosts.signal(1, "CONT");
    let mut next = None;
    for node in [2, 1].into_iter().cycle().take(600) {
        match hosts.connect(node, "vm1").await {
            Ok(guest) => {
                next = Some(guest);
                break;
            }
            // tidy-allow(sleep): the pause between two attempts of a client
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    let mut next = next.expect("served again within 30 s");
    assert!(next.read(0, 4096).await.expect("a read").iter().all(|byte| *byte == 1), "done for nobody");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_is_given_up_leaves_the_disk_where_it_is() {
    let hosts = cluster();
    let mut source = open(&hosts, 1).await;
    hosts.ok(2, &["volume", "attach", "vm1", "--standby"]);
    let mut target = open(&hosts, 2).await;
    assert!(target.read(0, 4096).await.expect("a read").iter().all(|byte| *byte == 0));
    target.disconnect().await.expect("it ends");
    source.write(0, &[1; 4096], 0).await.expect("the source goes on");
    assert_eq!(hosts.server_of(2, "vm1").as_deref(), Some("n1"));
    drop(source);
    // Nobody uses it any more: whoever comes first is served.
    eventually(10, "the source's client is forgotten", || {
        let clients = hosts.ok(1, &["volume", "stat", "vm1"])["clients"].as_u64();
        if clients == Some(0) { Ok(()) } else { Err(format!("{clients:?}")) }
    });
    let read = open(&hosts, 3).await.read(0, 4096).await.expect("a read");
    assert!(read.iter().all(|byte| *byte == 1));
    assert_eq!(hosts.server_of(1, "vm1").as_deref(), Some("n3"));
}

#[test]
fn standby_for_what_does_not_exist_is_refused() {
    let hosts = Hosts::started(3);
    let outcome = hosts.run(1, &["volume", "attach", "vm9", "--standby"]);
    assert_eq!(outcome.code, 4, "{outcome:?}");
    assert!(outcome.stderr.contains("vm9"), "{outcome:?}");
}
