//! The machines below the hosts fail: power goes, disks hang and fill up, everything is lost; clocks differ. What clients see is
//! what one disk could have shown; after a loss of power of all hosts, one that keeps what was flushed.

use std::time::Instant;
use xsan_tests::linearizable::Survival;
use xsan_tests::rounds::{Fault, power_round, round, unless_stuck};
use xsan_tests::{Hosts, Random};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_see_one_disk_while_hosts_lose_power_or_everything_and_disks_hang_or_fill_up() {
    let mut random = Random::of_test();
    let mut hosts = Hosts::on_machines(4, "none", &mut random);
    let (rounds, mut operations, began) = (xsan_tests::rounds(2), 0, Instant::now());
    // Another fault first in each run.
    let first = random.below(7);
    for number in 1..=rounds {
        let mut own = random.fork();
        let faults = Fault::of_machines(first + number, &mut own, &hosts);
        println!("round {number}: {faults:?}");
        let took = Instant::now();
        let round = round(&mut hosts, number, &mut own, faults).await;
        let round = round.unwrap_or_else(|violation| panic!("round {number}: {violation}"));
        let (took, report) = (took.elapsed(), &round.report);
        let (stall, whole) = (round.longest_stall, round.healed_in);
        println!("round {number}: {took:?}: {report:?}, longest stall {stall:?}, whole in {whole:?}");
        operations += report.writes + report.reads;
    }
    println!("{rounds} rounds in {:?}: {operations} operations", began.elapsed());
    assert!(operations > rounds as usize * 100, "clients that do nothing see nothing");
    hosts.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_hosts_lose_power_at_once_and_every_block_holds_what_was_flushed_or_newer() {
    let mut random = Random::of_test();
    let mut hosts = Hosts::on_machines(4, "none", &mut random);
    let (rounds, mut all, began) = (xsan_tests::rounds(2), Survival::default(), Instant::now());
    for number in 1..=rounds {
        let mut own = random.fork();
        let round = power_round(&mut hosts, number, &mut own).await;
        let round = round.unwrap_or_else(|loss| panic!("round {number}: {loss}"));
        println!("round {number}: {round:?}");
        all.newest += round.survival.newest;
        all.older += round.survival.older;
        all.safe += round.survival.safe;
    }
    println!("{rounds} rounds in {:?}: {all:?}", began.elapsed());
    assert!(all.safe > 0, "without flushes nothing could be lost that must be there");
    hosts.stop();
}

/// How many rounds a broken flush may go unnoticed: some loss of power leaves everything, and some seal flushes.
const NOTICED_WITHIN: u64 = 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_answers_flushes_it_has_not_done_is_noticed() {
    let mut random = Random::of_test();
    let mut hosts = Hosts::on_machines(4, "flush", &mut random);
    for number in 1..=NOTICED_WITHIN {
        let mut own = random.fork();
        match unless_stuck(power_round(&mut hosts, number, &mut own)).await {
            Some(Err(loss)) => {
                println!("noticed in round {number}: {loss}");
                return;
            }
            Some(Ok(_)) => {}
            None => hosts = Hosts::on_machines(4, "flush", &mut random),
        }
    }
    panic!("nobody noticed in {NOTICED_WITHIN} losses of power that flushes are not done");
}
