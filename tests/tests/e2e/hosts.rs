//! A process per node: hosts die, freeze, come back; volumes move; what was flushed is there.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use xsan_tests::load::{Shared, read_all_back, write_some};
use xsan_tests::{Hosts, Ledger, Random, eventually, within};

/// What the ledger watches; the volumes have a little more, for writes by hand.
const VOLUME_BYTES: u64 = 64 << 20;

fn ledger() -> Shared {
    Arc::new(Mutex::new(Ledger::new(VOLUME_BYTES)))
}

/// Until a node serves a client, as a guest's reconnecting client would try.
async fn guest(hosts: &Hosts, node: usize) -> xsan_tests::Guest {
    let connected = async {
        loop {
            match hosts.connect(node, "vm1").await {
                Ok(guest) => return guest,
                // tidy-allow(sleep): the pause between two attempts of a client
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    within(30, "the volume is served", connected).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_outlives_the_host_that_serves_it() {
    let mut random = Random::of_test();
    let mut hosts = Hosts::started(6);
    hosts.ok(3, &["volume", "create", "vm1", "--size", "65MiB"]);
    let ledger = ledger();
    write_some(hosts.dir(2), "vm1", &ledger, &mut random, 3, 32 << 20).await;
    guest(&hosts, 2).await.flush().await.expect("a flush");
    assert_eq!(hosts.server_of(5, "vm1").as_deref(), Some("n2"));

    hosts.kill(2);
    let killed = Instant::now();
    let mut elsewhere = guest(&hosts, 4).await;
    // What was acknowledged is there: no host lost power.
    read_all_back(&mut elsewhere, &ledger, "at n4, after n2 was killed").await;
    println!("served elsewhere after {:?}", killed.elapsed());
    assert_eq!(hosts.state(1, 2), "down");
    let health = hosts.run(3, &["health"]);
    assert!(health.code == 3 && health.stdout.contains("NODE_DOWN") && health.stdout.contains("n2"), "{health:?}");
    let events = hosts.run(6, &["events"]).stdout;
    let told = |kind: &str, what: &str| events.lines().any(|line| line.contains(kind) && line.contains(what));
    assert!(told("node_state", "n2 was suspect and is down"), "{events}");
    assert!(told("volume_served", "vm1 is served by n4"), "{events}");
    drop(elsewhere);
    write_some(hosts.dir(4), "vm1", &ledger, &mut random, 3, 16 << 20).await;

    hosts.restart(2);
    hosts.wait_until_whole(2, 60);
    assert_eq!(hosts.run(1, &["health"]).code, 0);
    let mut back = guest(&hosts, 2).await;
    read_all_back(&mut back, &ledger, "at n2, which is back").await;
    hosts.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_moves_to_another_host_under_its_clients() {
    let mut random = Random::of_test();
    let hosts = Hosts::started(3);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "65MiB"]);
    let ledger = ledger();
    write_some(hosts.dir(1), "vm1", &ledger, &mut random, 2, 16 << 20).await;
    let mut guest_at_1 = guest(&hosts, 1).await;
    // Somebody else's client is no reason to take a volume from a client that works with it.
    let refused = hosts.connect(2, "vm1").await.map(drop).expect_err("served at n1, for a client");
    assert!(refused.to_string().contains("served by n1"), "a person must know where: {refused}");
    guest_at_1.write(VOLUME_BYTES, &[7; 4096], 0).await.expect("n1 still serves");

    hosts.ok(3, &["volume", "attach", "vm1"]);
    let error = guest_at_1.write(VOLUME_BYTES + 4096, &[8; 4096], 0).await.expect_err("its connection has ended");
    assert_eq!(error.errno(), None, "no answer, so that a client that reconnects asks again: {error}");
    assert_eq!(hosts.server_of(1, "vm1").as_deref(), Some("n3"));
    assert!(hosts.connect(1, "vm1").await.is_err(), "it stays where it was attached");
    let mut moved = guest(&hosts, 3).await;
    let read = moved.read(VOLUME_BYTES, 4096).await.expect("a read");
    assert!(read.iter().all(|byte| *byte == 7), "what was acknowledged at n1");
    read_all_back(&mut moved, &ledger, "at n3").await;
}

/// Found by measuring hand-overs: the first node that was asked took the volume by force, from the one that was handing it over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_ask_all_nodes_do_not_spoil_a_hand_over() {
    let mut random = Random::of_test();
    let hosts = Hosts::started(4);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "65MiB"]);
    let ledger = ledger();
    let generation = || hosts.ok(1, &["volume", "stat", "vm1"])["generation"].as_u64().expect("a generation");
    let mut here = 1;
    for there in [2, 3, 4, 1] {
        // So that there is something to seal.
        write_some(hosts.dir(here), "vm1", &ledger, &mut random, 2, 16 << 20).await;
        let mut guest_here = guest(&hosts, here).await;
        let before = generation();
        let others: Vec<usize> = (1..=4).filter(|&node| node != here).collect();
        let dirs: Vec<_> = others.iter().map(|&node| hosts.dir(node)).collect();
        let asking = tokio::spawn(async move {
            // Cut off first: the others are asked while the volume is still being sealed.
            while guest_here.read(0, 4096).await.is_ok() {}
            loop {
                for (dir, node) in dirs.iter().zip(&others) {
                    if xsan_tests::cluster::connect(dir, "vm1").await.is_ok() {
                        return *node;
                    }
                }
            }
        });
        tokio::task::block_in_place(|| hosts.ok(there, &["volume", "attach", "vm1"]));
        assert_eq!(within(20, "the client is let in again", asking).await.expect("no panic"), there);
        assert_eq!(generation(), before + 1, "handed over to n{there} once, and taken by nobody else");
        here = there;
    }
    read_all_back(&mut guest(&hosts, here).await, &ledger, "at the last node").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_host_that_goes_on_is_nobodys_owner_any_more() {
    let mut random = Random::of_test();
    let hosts = Hosts::started(4);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "65MiB"]);
    let ledger = ledger();
    write_some(hosts.dir(2), "vm1", &ledger, &mut random, 2, 16 << 20).await;
    let mut frozen = guest(&hosts, 2).await;

    hosts.signal(2, "STOP");
    eventually(10, "n2 is down", || match hosts.state(1, 2) {
        state if state == "down" => Ok(()),
        state => Err(state),
    });
    let mut successor = guest(&hosts, 3).await;
    successor.write(VOLUME_BYTES, &[9; 4096], 0).await.expect("the successor serves");
    hosts.signal(2, "CONT");
    // Whatever it does with the request, it must not acknowledge what nobody will ever read.
    if frozen.write(VOLUME_BYTES, &[1; 4096], 0).await.is_ok() {
        panic!("a host that lost the volume acknowledged a write");
    }
    assert!(frozen.read(VOLUME_BYTES, 4096).await.is_err(), "nor may it answer a read");
    let read = successor.read(VOLUME_BYTES, 4096).await.expect("a read");
    assert!(read.iter().all(|byte| *byte == 9));
    read_all_back(&mut successor, &ledger, "at n3").await;
    hosts.wait_until_whole(1, 60);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_processes_killed_at_once_lose_nothing_that_was_acknowledged() {
    let mut random = Random::of_test();
    let mut hosts = Hosts::started(4);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "65MiB"]);
    let ledger = ledger();
    for round in 0..2 {
        write_some(hosts.dir(round + 1), "vm1", &ledger, &mut random, 2, 16 << 20).await;
        hosts.kill_all();
        hosts.start();
        let mut guest = guest(&hosts, 4 - round).await;
        read_all_back(&mut guest, &ledger, "after all were killed").await;
    }
    hosts.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_io_waits_and_status_says_why() {
    let mut random = Random::of_test();
    let mut hosts = Hosts::started(3);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "65MiB"]);
    let ledger = ledger();
    write_some(hosts.dir(1), "vm1", &ledger, &mut random, 2, 16 << 20).await;
    let mut guest = guest(&hosts, 1).await;
    hosts.kill(2);
    hosts.kill(3);
    let waiting = tokio::spawn(async move {
        let done = guest.write(VOLUME_BYTES, &[5; 4096], 0).await;
        (guest, done)
    });
    eventually(10, "the cluster says what it waits for", || {
        let health = hosts.run(1, &["health"]);
        let told = health.code == 3 && health.stdout.contains("METADATA_SILENT");
        if told { Ok(()) } else { Err(format!("{health:?}")) }
    });
    assert_eq!(hosts.ok(1, &["status"])["health"], "stalled");
    assert!(!waiting.is_finished(), "one of three is too few to acknowledge");
    hosts.restart(2);
    hosts.restart(3);
    let (mut guest, done) = within(60, "the write goes on", waiting).await.expect("the writer");
    done.expect("the write goes on by itself");
    read_all_back(&mut guest, &ledger, "after two of three were away").await;
    hosts.wait_until_whole(3, 60);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_host_takes_its_old_place_and_gets_its_shards_back() {
    let mut random = Random::of_test();
    let mut hosts = Hosts::started(6);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "65MiB"]);
    let ledger = ledger();
    write_some(hosts.dir(1), "vm1", &ledger, &mut random, 3, 48 << 20).await;
    let mut guest = guest(&hosts, 1).await;
    guest.flush().await.expect("a flush");
    let shards = |hosts: &Hosts| hosts.ok(1, &["node", "show", "n3"])["shards"].as_u64().expect("shards");
    let before = shards(&hosts);
    let (listen, peer) = (hosts.setting(3, "listen"), hosts.setting(1, "address"));
    let token = hosts.ok(1, &["cluster", "token"])["token"].as_str().expect("a token").to_owned();
    let dir = hosts.dir(3);
    let path = dir.to_string_lossy().into_owned();
    let join = |hosts: &Hosts| {
        let place = ["--dir", &path, "--name", "n3", "--host", "localhost", "--listen", &listen, "--address", &listen];
        let how = ["--device-size", "2GiB", "--replace", "--no-start"];
        hosts.run(1, &[&["node", "join", &token, "--peer", &peer][..], &place, &how].concat())
    };

    hosts.kill(3);
    std::fs::remove_dir_all(&dir).expect("wiped");
    let early = join(&hosts);
    assert!(early.code != 0 && early.stderr.contains("not down"), "its old process may still run: {early:?}");
    eventually(10, "n3 is down", || match hosts.state(1, 3) {
        state if state == "down" => Ok(()),
        state => Err(state),
    });
    let joined = join(&hosts);
    assert_eq!(joined.code, 0, "{joined:?}");
    hosts.restart(3);
    hosts.wait_until_whole(1, 60);
    eventually(60, "its shards are back", || match shards(&hosts) {
        now if now >= before && now > 0 => Ok(()),
        now => Err(format!("{now} of {before}")),
    });
    // What it was given back is right: with two others lost, everything is read with its help.
    hosts.kill(2);
    hosts.kill(4);
    read_all_back(&mut guest, &ledger, "with the new n3, without n2 and n4").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_are_answered_by_any_node_and_hosts_are_let_in_by_good_tokens_only() {
    let hosts = Hosts::started(3);
    for (node, volume) in [(1, "a"), (2, "b"), (3, "c")] {
        hosts.ok(node, &["volume", "create", volume, "--size", "1GiB"]);
    }
    for node in 1..=3 {
        let listed = hosts.ok(node, &["volume", "list"]);
        assert_eq!(listed.as_array().map(Vec::len), Some(3), "n{node}: {listed}");
    }
    hosts.ok(2, &["volume", "resize", "a", "--size", "2GiB"]);
    assert_eq!(hosts.ok(3, &["volume", "stat", "a"])["size"], 2_u64 << 30);
    hosts.ok(3, &["volume", "delete", "b", "--yes"]);
    assert_eq!(hosts.run(1, &["volume", "stat", "b"]).code, 4);

    let address = hosts.setting(1, "address");
    let token = hosts.ok(2, &["cluster", "token", "--uses", "1"])["token"].as_str().expect("a token").to_owned();
    let new = hosts.dir(1).with_file_name("new");
    let join = |token: &str, name: &str| {
        let dir = new.join(name);
        let dir = dir.to_string_lossy();
        let fixed = ["--listen", "127.0.0.1:0", "--address", "127.0.0.1:1", "--device-size", "1GiB", "--no-start"];
        let mut arguments = vec!["node", "join", token, "--peer", &address, "--dir", &dir, "--name", name];
        arguments.extend(fixed);
        hosts.run(1, &arguments)
    };
    let taken = join(&token, "n2");
    assert!(taken.code != 0 && taken.stderr.contains("name is taken"), "{taken:?}");
    let mistyped = join(&token[..token.len() - 1], "x1");
    assert!(mistyped.code == 2 && mistyped.stderr.contains("cut short or mistyped"), "{mistyped:?}");
    let foreign = Hosts::started(1);
    let other = foreign.ok(1, &["cluster", "token"])["token"].as_str().expect("a token").to_owned();
    let foreign = join(&other, "x2");
    assert!(foreign.code != 0 && foreign.stderr.contains("not of the cluster"), "{foreign:?}");
    assert_eq!(join(&token, "x3").code, 0);
    let used = join(&token, "x4");
    assert!(used.code != 0 && used.stderr.contains("used as often"), "{used:?}");
    let nodes = hosts.ok(3, &["node", "list"]);
    assert_eq!(nodes.as_array().map(Vec::len), Some(4), "n1 to n3 and x3: {nodes}");
}
