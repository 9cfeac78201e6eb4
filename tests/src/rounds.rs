//! Rounds of a test that lets hosts fail at random under clients of one volume, and asks afterwards whether what the clients
//! saw is what one disk could have shown them.

mod clients;
mod power;

pub use power::{PowerLoss, PowerRound, power_round};

use crate::hosts::Hosts;
use crate::linearizable::{Report, Violation, check};
use crate::random::Random;
use clients::Clients;
use futures::FutureExt;
use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

/// A host must be able to come back from anything in this time.
const HEALED_SECONDS: u64 = 60;

/// What happens to the hosts in a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    Quiet,
    /// SIGKILL of the node that serves, and its restart at the end.
    KillServer,
    /// SIGKILL of another node.
    Kill(usize),
    /// SIGKILL of all at once.
    KillAll,
    /// The node that serves stands still for a while.
    FreezeServer(Duration),
    /// Another one does.
    Freeze(usize, Duration),
    /// The volume is moved to a node, whoever uses it.
    Attach(usize),
    /// The node that serves is cut off from all others.
    CutServer(Duration),
    /// The node that serves does not reach one of the others, which still reaches it.
    DeafTo(usize, Duration),
    /// The node that serves hears nothing of one of the others.
    MuteOf(usize, Duration),
    /// A node is cut off from all others.
    CutOff(usize, Duration),
    /// A node's host loses power; it is started again at the end.
    LosePower(usize),
    /// That of the node that serves does.
    ServerLosesPower,
    /// The disks of a node hang.
    HangDisk(usize, Duration),
    /// Those of the node that serves do.
    HangServersDisk(Duration),
    /// A node's disks are full.
    FillDisk(usize, Duration),
    /// A node loses everything, and its host joins again under its old name.
    Wipe(usize),
    /// A node's date changes by so many milliseconds.
    JumpDate(usize, i64),
}

impl Fault {
    /// A few, as a round has them.
    pub fn some(random: &mut Random, hosts: &Hosts) -> Vec<Self> {
        let count = random.between(1, 3);
        (0..count).map(|_| Self::random(random, hosts.count(), hosts.has_network())).collect()
    }

    /// One of the machine below a host, a different one for each `number` in a row, and others beside it.
    pub fn of_machines(number: u64, random: &mut Random, hosts: &Hosts) -> Vec<Self> {
        let count = random.below(3);
        let mut faults: Vec<Self> = (0..count)
            .map(|_| match random.chance(50) {
                true => Self::random(random, hosts.count(), hosts.has_network()),
                false => Self::of_machine(random.next(), random, hosts.count()),
            })
            .collect();
        let at = random.below(count + 1) as usize;
        faults.insert(at, Self::of_machine(number, random, hosts.count()));
        faults
    }

    fn of_machine(number: u64, random: &mut Random, nodes: usize) -> Self {
        let node = 1 + random.below(nodes as u64) as usize;
        let time = Duration::from_millis(random.between(500, 6000));
        match number % 7 {
            0 => Self::Wipe(node),
            1 => Self::ServerLosesPower,
            2 => Self::HangServersDisk(time),
            3 => Self::LosePower(node),
            4 => Self::FillDisk(node, time),
            5 => Self::HangDisk(node, time),
            _ => Self::JumpDate(node, random.between(0, 1_200_000).cast_signed() - 600_000),
        }
    }

    /// Any of them but those of machines, for so many nodes; cuts only where there is a network to cut.
    pub fn random(random: &mut Random, nodes: usize, has_network: bool) -> Self {
        let node = 1 + random.below(nodes as u64) as usize;
        // Longer than the time in which a read is good without being confirmed, and as long as it takes to be down.
        let time = Duration::from_millis(random.between(200, 4500));
        match random.below(if has_network { 20 } else { 12 }) {
            0 => Self::Quiet,
            1..3 => Self::KillServer,
            3..5 => Self::Kill(node),
            5 => Self::KillAll,
            6..9 => Self::FreezeServer(time),
            9 => Self::Freeze(node, time),
            10..12 => Self::Attach(node),
            12..15 => Self::CutServer(time),
            15 => Self::DeafTo(node, time),
            16 => Self::MuteOf(node, time),
            _ => Self::CutOff(node, time),
        }
    }
}

/// What one round came to.
#[derive(Debug)]
pub struct Round {
    /// What was done to the hosts.
    pub faults: Vec<Fault>,
    /// What the clients saw.
    pub report: Report,
    /// The longest time without an answer to any client.
    pub longest_stall: Duration,
    /// How long the hosts needed to be whole again.
    pub healed_in: Duration,
}

/// One round on a volume of its own: clients, faults, healing, and the judgement.
///
/// # Errors
/// What the clients saw contradicts itself.
///
/// # Panics
/// The cluster did not heal, or a command failed.
pub async fn round(
    hosts: &mut Hosts,
    number: u64,
    random: &mut Random,
    faults: Vec<Fault>,
) -> Result<Round, Violation> {
    let volume = format!("round{number}");
    hosts.ok(1, &["volume", "create", &volume, "--size", "129MiB"]);
    let clients = Clients::new(hosts, &volume);
    let running = clients.start(random);
    let mut struck = BTreeSet::new();
    for fault in &faults {
        pause(random.between(100, 900)).await;
        strike(hosts, &volume, fault, &mut struck).await;
    }
    pause(random.between(100, 600)).await;
    // Longer than any pause of a detector or of a lease: some rounds end before that, with the nodes still down.
    if random.chance(30) {
        pause(3500).await;
    }
    clients.end(running).await;
    let healing = Instant::now();
    heal(hosts);
    let healed_in = healing.elapsed();
    for at in [1, 2] {
        clients.read_all(hosts, 1 + (number as usize + at) % hosts.count()).await;
    }
    let report = check(&clients.recorder.history())?;
    hosts.ok(1, &["volume", "delete", &volume, "--yes", "--force"]);
    Ok(Round { faults, report, longest_stall: clients.longest_stall(), healed_in })
}

/// A round with a program that breaks a rule; `None`: it came to no end. A cluster of liars need not heal: that is no wrong answer to a
/// client, and proves nothing of what looks for one.
pub async fn unless_stuck<T>(round: impl Future<Output = T>) -> Option<T> {
    AssertUnwindSafe(round).catch_unwind().await.ok()
}

async fn pause(millis: u64) {
    // tidy-allow(sleep): how long the load and a fault last is what the round is about
    tokio::time::sleep(Duration::from_millis(millis)).await;
}

/// The node that serves a volume, if one that runs says so; else any.
fn server(hosts: &Hosts, volume: &str) -> usize {
    let told = (1..=hosts.count()).filter(|&node| hosts.runs(node)).find_map(|node| {
        let told = hosts.run(node, &["volume", "stat", volume]);
        let name = (told.code == 0).then(|| told.json()["node"].as_str().map(str::to_owned)).flatten()?;
        name.strip_prefix('n')?.parse().ok()
    });
    told.unwrap_or(1)
}

/// How many hosts may lose more than their process in a round: what the pool tolerates (R7). Others are only killed instead.
const STRUCK_MAX: usize = 2;

/// Lets a fault happen. Nodes that are killed stay so until the round is healed, at most one of them at a time but for all at once.
/// `struck` are those that lost power or more.
async fn strike(hosts: &mut Hosts, volume: &str, fault: &Fault, struck: &mut BTreeSet<usize>) {
    let serving = server(hosts, volume);
    let all: Vec<usize> = (1..=hosts.count()).collect();
    let others = |node: usize| -> Vec<usize> { all.iter().copied().filter(|&other| other != node).collect() };
    match *fault {
        Fault::Quiet => {}
        Fault::KillServer => kill_one(hosts, serving),
        Fault::Kill(node) => kill_one(hosts, node),
        Fault::KillAll => {
            hosts.kill_at_once();
            all.iter().for_each(|&node| hosts.restart(node));
        }
        Fault::FreezeServer(time) => freeze(hosts, serving, time).await,
        Fault::Freeze(node, time) => freeze(hosts, node, time).await,
        // Refused or slow while others are away: that is what the round is about.
        Fault::Attach(node) => drop(hosts.run(node, &["volume", "attach", volume])),
        Fault::CutServer(time) => cut(hosts, |network| network.split(&[serving], &others(serving)), time).await,
        Fault::CutOff(node, time) => cut(hosts, |network| network.split(&[node], &others(node)), time).await,
        Fault::DeafTo(node, time) if node != serving => cut(hosts, |network| network.cut(serving, node), time).await,
        Fault::MuteOf(node, time) if node != serving => cut(hosts, |network| network.cut(node, serving), time).await,
        Fault::DeafTo(..) | Fault::MuteOf(..) => {}
        Fault::ServerLosesPower => lose_power(hosts, serving, struck),
        Fault::LosePower(node) => lose_power(hosts, node, struck),
        Fault::HangServersDisk(time) => hang(hosts, serving, time).await,
        Fault::HangDisk(node, time) => hang(hosts, node, time).await,
        Fault::FillDisk(node, time) => {
            hosts.machine(node).fill(true);
            pause(time.as_millis() as u64).await;
            hosts.machine(node).fill(false);
            // A write that failed has taken its device out for good (docs/errors.md): somebody makes room, and starts the node again.
            kill_one(hosts, node);
        }
        Fault::Wipe(node) => {
            kill_one(hosts, node);
            if may_strike(node, struck) {
                hosts.wipe(node);
            }
        }
        Fault::JumpDate(node, millis) => hosts.machine(node).jump(millis),
    }
}

fn may_strike(node: usize, struck: &mut BTreeSet<usize>) -> bool {
    let may = struck.contains(&node) || struck.len() < STRUCK_MAX;
    if may {
        struck.insert(node);
    }
    may
}

fn lose_power(hosts: &mut Hosts, node: usize, struck: &mut BTreeSet<usize>) {
    kill_one(hosts, node);
    if may_strike(node, struck) {
        hosts.machine(node).lose_power();
    }
}

async fn hang(hosts: &mut Hosts, node: usize, time: Duration) {
    hosts.machine(node).hang(true);
    pause(time.as_millis() as u64).await;
    hosts.machine(node).hang(false);
}

/// One more only if all others run: with two away out of three nothing could be said of the rest.
fn kill_one(hosts: &mut Hosts, node: usize) {
    for gone in (1..=hosts.count()).filter(|&gone| gone != node) {
        if !hosts.runs(gone) {
            hosts.restart(gone);
        }
    }
    if hosts.runs(node) {
        hosts.kill(node);
    }
}

async fn freeze(hosts: &Hosts, node: usize, time: Duration) {
    if hosts.runs(node) {
        hosts.signal(node, "STOP");
        pause(time.as_millis() as u64).await;
        hosts.signal(node, "CONT");
    }
}

async fn cut(hosts: &Hosts, how: impl FnOnce(&crate::Network), time: Duration) {
    how(hosts.network());
    pause(time.as_millis() as u64).await;
    hosts.network().heal();
}

fn heal(hosts: &mut Hosts) {
    hosts.heal_machines();
    for node in 1..=hosts.count() {
        if !hosts.runs(node) {
            hosts.restart(node);
        }
    }
    hosts.wait_until_whole(1, HEALED_SECONDS);
}
