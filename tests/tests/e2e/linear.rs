//! What clients see of a volume while hosts are killed, frozen, cut off, and the volume moves, is what one disk could have shown.

use std::time::{Duration, Instant};
use xsan_tests::linearizable::{Recorder, check};
use xsan_tests::rounds::{Fault, round, unless_stuck};
use xsan_tests::{Hosts, Random, eventually};

async fn rounds(mut hosts: Hosts, usual: u64) {
    let mut random = Random::of_test();
    let began = Instant::now();
    let rounds = xsan_tests::rounds(usual);
    let (mut operations, mut unknown, mut appeared) = (0, 0, 0);
    for number in 1..=rounds {
        let mut own = random.fork();
        let faults = Fault::some(&mut own, &hosts);
        let round = round(&mut hosts, number, &mut own, faults).await;
        let round = round.unwrap_or_else(|violation| panic!("round {number}: {violation}"));
        let report = &round.report;
        println!(
            "round {number}: {:?}: {} writes ({} unanswered, {} of them read), {} reads, longest stall {:?}, whole in {:?}",
            round.faults,
            report.writes,
            report.unknown,
            report.appeared,
            report.reads,
            round.longest_stall,
            round.healed_in
        );
        operations += report.writes + report.reads;
        unknown += report.unknown;
        appeared += report.appeared;
    }
    println!(
        "{rounds} rounds in {:?}: {operations} operations, {unknown} unanswered, {appeared} read",
        began.elapsed()
    );
    assert!(operations > rounds as usize * 100, "clients that do nothing see nothing");
    hosts.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_see_one_disk_while_processes_are_killed_frozen_and_volumes_move() {
    rounds(Hosts::started(4), 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_see_one_disk_while_hosts_are_cut_off_from_each_other() {
    match Hosts::in_network(3, "2+1") {
        Ok(hosts) => rounds(hosts, 4).await,
        // What the system refuses is no fault of the program; the other test still runs.
        Err(reason) => println!("not tried: network namespaces cannot be made here: {reason}"),
    }
}

/// How many rounds a broken rule may go unnoticed: in most of them a thawed owner is fenced before it is lied to.
const NOTICED_WITHIN: u64 = 30;

/// The rounds would be worth nothing if they held as well for a program that breaks the protocol.
async fn is_noticed(rule: &'static str, faults: &[Fault]) {
    let mut random = Random::of_test();
    let mut hosts = Hosts::with_broken_rule(4, rule);
    for number in 1..=NOTICED_WITHIN {
        let mut own = random.fork();
        match unless_stuck(round(&mut hosts, number, &mut own, faults.to_vec())).await {
            Some(Err(violation)) => {
                println!("the broken rule {rule} was noticed in round {number}: {violation}");
                return;
            }
            Some(Ok(_)) => {}
            None => hosts = Hosts::with_broken_rule(4, rule),
        }
    }
    panic!("nobody noticed in {NOTICED_WITHIN} rounds that the rule {rule} is broken");
}

const LONG: Duration = Duration::from_millis(4500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_answers_what_it_has_not_got_is_noticed() {
    is_noticed("append", &[Fault::KillServer]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_member_that_takes_appends_is_noticed() {
    is_noticed("closed", &[Fault::FreezeServer(LONG)]).await;
}

/// In random rounds most owners that were replaced learn it from a write before they are asked to read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_nobody_confirms_are_noticed() {
    let hosts = Hosts::with_broken_rule(4, "confirm");
    hosts.ok(1, &["volume", "create", "vm1", "--size", "64MiB"]);
    let recorder = Recorder::new();
    let mut replaced = hosts.connect(1, "vm1").await.expect("served");
    let first = recorder.start_write(1, 0, 1);
    replaced.write(0, &[1; 4096], 0).await.expect("a write");
    recorder.finish_write(first);

    hosts.signal(1, "STOP");
    // Not asked to hand it over: it would do so when it goes on.
    eventually(15, "n1 is down", || if hosts.state(2, 1) == "down" { Ok(()) } else { Err(hosts.state(2, 1)) });
    let mut owner = hosts.connect(2, "vm1").await.expect("served by another node");
    let second = recorder.start_write(2, 0, 2);
    owner.write(0, &[2; 4096], 0).await.expect("a write");
    recorder.finish_write(second);
    hosts.signal(1, "CONT");

    let reading = recorder.start_read(1, 0);
    let stale = replaced.read(0, 4096).await.expect("answered by one who asks nobody whether it may");
    recorder.finish_read(reading, u64::from(stale[0]));
    let violation = check(&recorder.history()).expect_err("what was replaced was read");
    println!("noticed: {violation}");
}
