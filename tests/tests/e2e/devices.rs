//! Disks that are lost while their node goes on: told, done without, returned or replaced (RFC 0006).

use serde_json::Value;
use std::path::Path;
use std::sync::{Arc, Mutex};
use xsan_tests::load::{Shared, read_all_back, write_some};
use xsan_tests::{Hosts, Ledger, Random, eventually};

const VOLUME_BYTES: u64 = 64 << 20;

async fn read_back(hosts: &Hosts, node: usize, ledger: &Shared, when: &str) {
    let mut guest = hosts.connect(node, "vm1").await.expect("the volume is served");
    read_all_back(&mut guest, ledger, when).await;
}

fn device(hosts: &Hosts, at: usize, id: &str) -> Option<Value> {
    hosts.ok(at, &["device", "list"]).as_array().expect("a list").iter().find(|line| line["id"] == *id).cloned()
}

fn wait_until_missing(hosts: &Hosts, at: usize, id: &str, path: &Path) {
    eventually(30, "the missing device is told of", || {
        let health = hosts.run(at, &["health"]);
        let is_told = ["DEVICE_MISSING", id, &path.to_string_lossy()].iter().all(|words| health.stdout.contains(words));
        let is_missing = device(hosts, at, id).is_some_and(|device| device["missing"] == true);
        if is_told && is_missing && health.code == 3 { Ok(()) } else { Err(format!("{health:?}")) }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_goes_on_without_a_lost_disk_and_takes_it_back_or_another_one() {
    let mut random = Random::of_test();
    let mut hosts = Hosts::started(4);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "65MiB"]);
    let ledger = Arc::new(Mutex::new(Ledger::new(VOLUME_BYTES)));
    write_some(hosts.dir(1), "vm1", &ledger, &mut random, 4, 48 << 20).await;
    let disk = hosts.dir(2).join("device.img");
    let (path, away) = (disk.to_string_lossy().into_owned(), disk.with_extension("away"));
    let lost = hosts.ok(2, &["node", "show", "n2"])["device"].as_str().expect("an id").to_owned();

    hosts.kill(2);
    std::fs::rename(&disk, &away).expect("unplugged");
    hosts.restart(2);
    wait_until_missing(&hosts, 1, &lost, &disk);
    eventually(30, "the node is up without it", || match hosts.state(1, 2) {
        state if state == "up" => Ok(()),
        state => Err(state),
    });
    write_some(hosts.dir(1), "vm1", &ledger, &mut random, 4, 48 << 20).await;
    hosts.ok(2, &["volume", "attach", "vm1"]);
    read_back(&hosts, 2, &ledger, "at the node without a disk").await;
    let refused = hosts.run(2, &["device", "add", &path]);
    assert!(refused.code != 0 && refused.stderr.contains("device.img"), "it is not back yet: {refused:?}");

    std::fs::rename(&away, &disk).expect("plugged in again");
    // That it has appeared need nobody say.
    hosts.wait_until_whole(1, 60);
    write_some(hosts.dir(2), "vm1", &ledger, &mut random, 4, 48 << 20).await;

    // Another disk in its place is touched by nobody who was not told to.
    hosts.kill(2);
    std::fs::rename(&disk, &away).expect("unplugged");
    std::fs::File::create(&disk).and_then(|file| file.set_len(2 << 30)).expect("a blank file");
    hosts.restart(2);
    wait_until_missing(&hosts, 1, &lost, &disk);
    std::fs::rename(&away, &disk).expect("plugged in again");
    assert_eq!(hosts.ok(2, &["device", "add", &path])["device"], *lost, "the device that was away");
    hosts.wait_until_whole(1, 60);
    write_some(hosts.dir(2), "vm1", &ledger, &mut random, 4, 16 << 20).await;

    // This time for good.
    hosts.kill(2);
    std::fs::remove_file(&disk).expect("lost");
    hosts.restart(2);
    wait_until_missing(&hosts, 1, &lost, &disk);
    let other = hosts.dir(2).join("other.img");
    std::fs::File::create(&other).and_then(|file| file.set_len(2 << 30)).expect("a blank file");
    let unconfirmed = hosts.run(2, &["device", "remove", &lost]);
    assert!(unconfirmed.code != 0 && unconfirmed.stderr.contains("--yes"), "it cannot be undone: {unconfirmed:?}");
    let replaced = hosts.ok(2, &["device", "replace", &lost, &other.to_string_lossy(), "--yes"]);
    assert!(device(&hosts, 1, &lost).is_none(), "the cluster has forgotten it");
    let found = device(&hosts, 1, replaced["device"].as_str().expect("an id")).expect("listed");
    assert!(found["used"].as_u64().is_some_and(|used| used > 0), "its share was rebuilt there: {found}");
    hosts.wait_until_whole(1, 60);
    eventually(10, "the node's settings have forgotten it", || {
        let settings = std::fs::read_to_string(hosts.dir(2).join("xsan.toml")).expect("settings");
        if settings.contains("other.img") && !settings.contains("device.img") { Ok(()) } else { Err(settings) }
    });
    write_some(hosts.dir(1), "vm1", &ledger, &mut random, 4, 16 << 20).await;
    hosts.kill(2);
    hosts.restart(2);
    hosts.wait_until_whole(1, 60);
    hosts.kill(3);
    read_back(&hosts, 1, &ledger, "from the new disk").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_disk_under_the_old_ones_name_takes_its_share() {
    let mut random = Random::of_test();
    let mut hosts = Hosts::started(3);
    hosts.ok(1, &["volume", "create", "vm1", "--size", "65MiB"]);
    let ledger = Arc::new(Mutex::new(Ledger::new(VOLUME_BYTES)));
    write_some(hosts.dir(1), "vm1", &ledger, &mut random, 4, 32 << 20).await;
    let disk = hosts.dir(3).join("device.img");
    let lost = hosts.ok(3, &["node", "show", "n3"])["device"].as_str().expect("an id").to_owned();

    hosts.kill(3);
    let file = std::fs::File::create(&disk).expect("another disk");
    file.set_len(2 << 30).expect("a blank one");
    hosts.restart(3);
    wait_until_missing(&hosts, 1, &lost, &disk);
    // Nobody formats a disk that it was not told to.
    let added = hosts.ok(3, &["device", "add", &disk.to_string_lossy()]);
    let new = added["device"].as_str().expect("an id").to_owned();
    assert_ne!(new, lost);
    hosts.ok(3, &["device", "remove", &lost, "--yes"]);
    hosts.wait_until_whole(1, 60);
    assert!(device(&hosts, 1, &lost).is_none(), "the cluster has forgotten it");
    hosts.kill(3);
    hosts.restart(3);
    hosts.wait_until_whole(1, 60);
    assert_eq!(device(&hosts, 1, &new).map(|device| device["missing"].clone()), Some(Value::Bool(false)));
    hosts.kill(2);
    read_back(&hosts, 1, &ledger, "from the new disk").await;
}
