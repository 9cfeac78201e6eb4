//! Data moves off nodes and devices while guests write, and nothing is less safe for it (P11, RFC 0006).

use std::sync::{Arc, Mutex};
use xsan_tests::load::{Shared, read_all_back, write_some};
use xsan_tests::{Hosts, Ledger, Random, eventually};

const VOLUME_BYTES: u64 = 64 << 20;

fn ledger() -> Shared {
    Arc::new(Mutex::new(Ledger::new(VOLUME_BYTES)))
}

/// What a node's devices hold.
fn shards_on(hosts: &Hosts, at: usize, node: usize) -> u64 {
    hosts.ok(at, &["node", "show", &format!("n{node}")])["shards"].as_u64().expect("a number")
}

async fn read_back(hosts: &Hosts, node: usize, ledger: &Shared, when: &str) {
    let mut guest = hosts.connect(node, "vm1").await.expect("the volume is served");
    read_all_back(&mut guest, ledger, when).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_node_can_be_unplugged_without_loss_of_redundancy() {
    let mut random = Random::of_test();
    // 4+2 over seven nodes: one can be spared, and with five voters two more may be lost.
    let mut hosts = Hosts::started(7);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "65MiB"]);
    let ledger = ledger();
    write_some(hosts.dir(1), "vm1", &ledger, &mut random, 4, 48 << 20).await;
    eventually(10, "shards on n7", || if shards_on(&hosts, 1, 7) > 0 { Ok(()) } else { Err("none".into()) });

    let drained = std::thread::scope(|scope| {
        let drained = scope.spawn(|| hosts.run(2, &["node", "drain", "n7"]));
        let writes = write_some(hosts.dir(1), "vm1", &ledger, &mut random, 4, 48 << 20);
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(writes));
        drained.join().expect("the command ends")
    });
    assert_eq!(drained.code, 0, "{drained:?}");
    assert_eq!(hosts.state(1, 7), "draining");
    read_back(&hosts, 1, &ledger, "when n7 was drained").await;
    eventually(60, "n7 holds nothing", || match hosts.ok(1, &["node", "show", "n7"]) {
        node if node["shards"] == 0 && node["members"] == 0 => Ok(()),
        node => Err(format!("{} shards, {} members", node["shards"], node["members"])),
    });
    hosts.wait_until_whole(1, 30);
    let refused = hosts.run(1, &["node", "remove", "n7", "--yes"]);
    assert!(refused.code == 2 && refused.stderr.contains("up"), "{refused:?}");

    hosts.kill(7);
    eventually(15, "n7 is down", || if hosts.state(1, 7) == "down" { Ok(()) } else { Err("not yet".into()) });
    hosts.ok(1, &["node", "remove", "n7", "--yes"]);
    hosts.wait_until_whole(1, 30);
    // As many may be lost as before.
    hosts.kill(3);
    hosts.kill(4);
    read_back(&hosts, 1, &ledger, "without n7, and two more").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_node_held_is_rebuilt_elsewhere_when_it_is_drained() {
    let mut random = Random::of_test();
    let mut hosts = Hosts::started(7);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "65MiB"]);
    let ledger = ledger();
    write_some(hosts.dir(1), "vm1", &ledger, &mut random, 4, 48 << 20).await;
    hosts.kill(7);
    eventually(15, "n7 is down", || if hosts.state(1, 7) == "down" { Ok(()) } else { Err("not yet".into()) });
    let refused = hosts.run(1, &["node", "remove", "n7", "--yes"]);
    assert!(refused.code == 2 && refused.stderr.contains("drain"), "it holds data: {refused:?}");
    hosts.ok(1, &["node", "drain", "n7"]);
    hosts.ok(1, &["node", "remove", "n7", "--yes"]);
    hosts.wait_until_whole(1, 30);
    hosts.kill(3);
    hosts.kill(4);
    read_back(&hosts, 1, &ledger, "without n7, and two more").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_is_replaced_under_load_and_a_new_one_gets_its_share() {
    let mut random = Random::of_test();
    let mut hosts = Hosts::started(6);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "65MiB"]);
    let ledger = ledger();
    write_some(hosts.dir(1), "vm1", &ledger, &mut random, 4, 48 << 20).await;
    let alone = hosts.run(1, &["node", "drain", "n2"]);
    assert!(alone.code == 2 && alone.stderr.contains("add hosts"), "nothing is left to drain to: {alone:?}");

    let dir = hosts.dir(2);
    let blank = |name: &str| {
        let path = dir.join(name);
        std::fs::File::create(&path).and_then(|file| file.set_len(2 << 30)).expect("a blank file");
        path.to_string_lossy().into_owned()
    };
    let old = hosts.ok(2, &["node", "show", "n2"])["device"].as_str().expect("an id").to_owned();
    let path = blank("second.img");
    let added = hosts.ok(2, &["device", "replace", &old[..12], &path]);
    let new = added["device"].as_str().expect("an id").to_owned();
    let listed = hosts.ok(1, &["device", "list"]);
    let ids: Vec<&str> = listed.as_array().expect("a list").iter().filter_map(|line| line["id"].as_str()).collect();
    assert!(ids.contains(&&*new) && !ids.contains(&&*old), "{listed}");
    let again = hosts.run(2, &["device", "add", &path]);
    assert!(again.code == 2 && again.stderr.contains("already"), "{again:?}");
    let used = hosts.run(2, &["device", "add", &dir.join("device.img").to_string_lossy()]);
    assert!(used.code == 5, "the old disk is not blank: {used:?}");
    read_back(&hosts, 1, &ledger, "with another device").await;

    // The new set of devices is that of the settings, too.
    hosts.kill(2);
    hosts.restart(2);
    hosts.wait_until_whole(1, 60);
    let third = hosts.ok(2, &["device", "add", &blank("third.img")])["device"].as_str().expect("an id").to_owned();
    write_some(hosts.dir(1), "vm1", &ledger, &mut random, 4, 48 << 20).await;
    eventually(60, "the new device has data", || {
        let listed = hosts.ok(2, &["device", "list"]);
        let used = listed.as_array().into_iter().flatten().find(|line| line["id"] == *third).map(|line| &line["used"]);
        if used.and_then(serde_json::Value::as_u64).unwrap_or(0) > 0 { Ok(()) } else { Err(listed.to_string()) }
    });
    hosts.wait_until_whole(1, 60);
    // n1 serves; of the others only n2 is left.
    hosts.kill(3);
    hosts.kill(4);
    read_back(&hosts, 1, &ledger, "from the new devices").await;
}
