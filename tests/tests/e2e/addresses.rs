//! Service addresses: a guest on the network keeps its address, and its disk, whatever host serves it (RFC 0007).

use std::collections::BTreeSet;
use std::time::Duration;
use xsan_tests::{GuestDisk, Hosts, eventually};

/// Where the volume is reached.
const ADDRESS: &str = "10.77.0.50";
/// The host of the guest.
const GUEST: usize = 4;

/// Three hosts, a guest's host beside them, and a volume with an address.
fn cluster() -> Option<Hosts> {
    let hosts = match Hosts::in_network_with(3, 1, "2+1") {
        Ok(hosts) => hosts,
        Err(error) => {
            println!("skipped: no namespaces here: {error}");
            return None;
        }
    };
    hosts.ok(1, &["volume", "create", "vm1", "--size", "64MiB", "--address", &format!("{ADDRESS}/24")]);
    Some(hosts)
}

fn holders(hosts: &Hosts) -> BTreeSet<usize> {
    (1..=3).filter(|&host| hosts.network().addresses(host).iter().any(|found| found == ADDRESS)).collect()
}

/// Waits until one host has the address, says so, and is not `but`.
fn holder(hosts: &Hosts, but: usize) -> usize {
    let mut holder = 0;
    eventually(30, "one host has the address", || {
        let at = (1..=3).find(|&node| node != but && hosts.runs(node)).expect("a node that runs");
        let told = hosts.ok(at, &["volume", "stat", "vm1"]);
        let holders = holders(hosts);
        holder = holders.first().copied().unwrap_or(0);
        let is_told =
            told["address"]["node"].as_str() == Some(&format!("n{holder}")) && told["address"]["fault"].is_null();
        if holders.len() == 1 && holder != but && is_told { Ok(()) } else { Err(format!("{holders:?} {told}")) }
    });
    holder
}

#[test]
fn a_guest_on_the_network_outlives_the_host_that_serves_it() {
    let Some(mut hosts) = cluster() else { return };
    // Nobody asked for the volume: it is served for its address.
    let first = holder(&hosts, 0);
    let mut disk = GuestDisk::open(hosts.network(), GUEST, ADDRESS, "vm1");
    disk.write();
    let writing = disk.keep_writing();
    hosts.kill(first);
    let second = holder(&hosts, first);
    // It goes on: else the end of a write would be waited for in vain.
    let (mut disk, pause, _) = writing.stop();
    println!("the host was killed: a pause of {pause:?}");
    assert!(pause < Duration::from_secs(30), "{pause:?}");
    disk.check();

    hosts.restart(first);
    hosts.wait_until_whole(second, 60);
    assert_eq!(holder(&hosts, 0), second, "a host that returns takes nothing back");
    let writing = disk.keep_writing();
    hosts.ok(first, &["volume", "attach", "vm1"]);
    assert_eq!(holder(&hosts, second), first);
    let (mut disk, pause, _) = writing.stop();
    println!("the volume was moved: a pause of {pause:?}");
    disk.check();

    // A host that ends in order hands over; whoever is chosen is not the one that ends.
    let writing = disk.keep_writing();
    hosts.signal(first, "TERM");
    hosts.reap(first);
    let third = holder(&hosts, first);
    let (mut disk, pause, _) = writing.stop();
    println!("the host was shut down: a pause of {pause:?}, now n{third}");
    disk.check();
    drop(disk);
    hosts.stop();
    assert_eq!(holders(&hosts), BTreeSet::new(), "no address is left behind");
}

#[test]
fn a_frozen_host_loses_the_address_and_does_not_take_it_back() {
    let Some(mut hosts) = cluster() else { return };
    let first = holder(&hosts, 0);
    let mut disk = GuestDisk::open(hosts.network(), GUEST, ADDRESS, "vm1");
    disk.write();
    // Noted before the freeze: who is connected is told that the host is another one.
    let other = first % 3 + 1;
    eventually(10, "the client is noted", || {
        let shown = hosts.ok(other, &["volume", "stat", "vm1"]);
        let is_noted = shown["address"]["clients"].as_array().is_some_and(|noted| noted.len() == 1);
        if is_noted { Ok(()) } else { Err(shown.to_string()) }
    });
    let writing = disk.keep_writing();
    hosts.signal(first, "STOP");
    let second = holder(&hosts, first);
    // The frozen host says nothing to anybody, and the guest waits for the answer of one request: it must learn all the same.
    let (mut disk, pause, _) = writing.stop();
    println!("the host was frozen: a pause of {pause:?}");
    disk.check();
    let writing = disk.keep_writing();
    hosts.signal(first, "CONT");
    hosts.wait_until_whole(second, 60);
    assert_eq!(holder(&hosts, 0), second, "it stays where it is");
    let (mut disk, pause, count) = writing.stop();
    println!("the host went on: {count} writes, at most {pause:?}");
    assert!(pause < Duration::from_secs(3), "clients stay with the new host: {pause:?}");
    disk.check();
    drop(disk);
    hosts.stop();
}

#[test]
fn without_rights_the_volume_is_served_and_health_says_what_the_address_lacks() {
    let Some(mut hosts) = cluster() else { return };
    let able = holder(&hosts, 0);
    let unable: Vec<usize> = (1..=3).filter(|node| *node != able).collect();
    for &node in &unable {
        hosts.kill(node);
        hosts.restart_without_rights(node);
        hosts.wait_until_whole(able, 60);
    }
    assert_eq!(holder(&hosts, 0), able);
    hosts.kill(able);
    eventually(30, "health says which rights are missing", || {
        let health = hosts.run(unable[0], &["health"]);
        let is_told = ["ADDRESS_FAULT", "vm1", "CAP_NET_ADMIN"].iter().all(|words| health.stdout.contains(words));
        if health.code == 3 && is_told { Ok(()) } else { Err(format!("{health:?}")) }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut local = hosts.connect(unable[1], "vm1").await.expect("served on the socket");
        local.write(0, &[7; 4096], 0).await.expect("a write");
    });
    // Its own lease was not renewed; there is nothing left of it when it returns, and it can.
    hosts.restart(able);
    eventually(30, "it has started", || match hosts.run(able, &["status"]) {
        told if told.code == 0 => Ok(()),
        told => Err(told.stderr),
    });
    hosts.ok(able, &["volume", "attach", "vm1"]);
    assert_eq!(holder(&hosts, 0), able);
    hosts.stop();
}

#[test]
fn a_daemon_that_is_killed_and_started_again_at_once_goes_on_with_its_address() {
    let Some(mut hosts) = cluster() else { return };
    let first = holder(&hosts, 0);
    let mut disk = GuestDisk::open(hosts.network(), GUEST, ADDRESS, "vm1");
    disk.write();
    let writing = disk.keep_writing();
    hosts.kill(first);
    hosts.restart(first);
    let (mut disk, pause, _) = writing.stop();
    println!("killed and started again: a pause of {pause:?}");
    disk.check();
    let holder = holder(&hosts, 0);
    println!("n{first} was killed, n{holder} has the address");
    drop(disk);
    hosts.stop();
    assert_eq!(holders(&hosts), BTreeSet::new(), "no address is left behind");
}

#[test]
fn an_address_that_is_somebody_elses_is_refused() {
    let Some(mut hosts) = cluster() else { return };
    holder(&hosts, 0);
    let refuse = |arguments: &[&str], why: &str| {
        let refused = hosts.run(2, &[&["volume"], arguments].concat());
        assert!(refused.code != 0 && refused.stderr.contains(why), "{arguments:?}: {refused:?}");
    };
    refuse(&["create", "vm2", "--size", "1GiB", "--address", "10.77.0.50/24"], "10.77.0.50");
    refuse(&["create", "vm2", "--size", "1GiB", "--address", "10.77.0.0/24"], "no address");
    assert_eq!(hosts.run(1, &["volume", "stat", "vm2"]).code, 4, "nothing was made");
    // The guest's host has it, and says so on the network.
    refuse(&["set-address", "vm1", "10.77.0.4/24"], "in use");
    refuse(&["set-address", "vm1", "10.77.0.2/24"], "configured on this host");
    refuse(&["set-address", "vm1", "10.99.0.2/24"], "subnet");
    refuse(&["set-address", "vm1", "10.77.0.60/24", "--interface", "eth7"], "eth7");
    let told = hosts.ok(3, &["volume", "stat", "vm1"]);
    assert_eq!(told["address"]["address"], "10.77.0.50/24", "nothing changed");
    hosts.ok(3, &["volume", "set-address", "vm1", "10.77.0.60/24"]);
    eventually(10, "the new address is there, the old one gone", || {
        let found: Vec<String> = (1..=3).flat_map(|host| hosts.network().addresses(host)).collect();
        let has = |address: &str| found.iter().any(|found| found == address);
        if has("10.77.0.60") && !has(ADDRESS) { Ok(()) } else { Err(format!("{found:?}")) }
    });
    let mut disk = GuestDisk::open(hosts.network(), GUEST, "10.77.0.60", "vm1");
    disk.write();
    disk.check();
    drop(disk);
    hosts.ok(3, &["volume", "set-address", "vm1", "--none"]);
    eventually(10, "no address is left", || {
        let found: Vec<String> = (1..=3).flat_map(|host| hosts.network().addresses(host)).collect();
        if found.iter().any(|found| found == "10.77.0.60") { Err(format!("{found:?}")) } else { Ok(()) }
    });
    hosts.stop();
}
