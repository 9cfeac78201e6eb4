//! Rounds in which all hosts lose power at once under clients: what was flushed is left, and from what is left on the volume is
//! one disk again.

use super::clients::Clients;
use super::{HEALED_SECONDS, pause};
use crate::hosts::Hosts;
use crate::linearizable::{Loss, Report, Survival, Violation, check, survived};
use crate::random::Random;
use std::fmt::{self, Display, Formatter};
use std::time::{Duration, Instant};

/// What one round came to.
#[derive(Debug)]
pub struct PowerRound {
    /// Flushes among a thousand requests, and as many forced writes.
    pub flushes: u64,
    /// What the clients saw before.
    pub before: Report,
    /// What was left.
    pub survival: Survival,
    /// What the clients saw afterwards.
    pub after: Report,
    /// How long the hosts needed to be whole again.
    pub healed_in: Duration,
}

/// What no loss of power explains.
#[derive(Debug)]
pub enum PowerLoss {
    /// Something is gone that was safe.
    Lost(Loss),
    /// What clients saw before, or afterwards, contradicts itself.
    Violation(&'static str, Violation),
}

impl std::error::Error for PowerLoss {}

impl Display for PowerLoss {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(loss) => write!(f, "after the loss of power, {loss}"),
            Self::Violation(when, violation) => write!(f, "{when} the loss of power, {violation}"),
        }
    }
}

/// One round on a volume of its own.
///
/// # Errors
/// Something is gone that was safe, or what clients saw contradicts itself.
///
/// # Panics
/// The cluster did not heal, or a command failed.
pub async fn power_round(hosts: &mut Hosts, number: u64, random: &mut Random) -> Result<PowerRound, PowerLoss> {
    let volume = format!("power{number}");
    hosts.ok(1, &["volume", "create", &volume, "--size", "129MiB"]);
    // Seldom: much is lost. Often: much must be left.
    let flushes = [2, 10, 40, 100][random.below(4) as usize];
    let clients = Clients::new(hosts, &volume).flushing(flushes);
    let all: Vec<usize> = (1..=hosts.count()).collect();
    for &node in &all {
        let nothing_is_left = random.chance(50);
        hosts.machine(node).lose_all(nothing_is_left);
    }
    let running = clients.start(random);
    pause(random.between(800, 4000)).await;
    hosts.kill_at_once();
    for &node in &all {
        hosts.machine(node).lose_power();
    }
    clients.end(running).await;
    let before = clients.recorder.history();
    let report = check(&before).map_err(|violation| PowerLoss::Violation("before", violation))?;

    let healing = Instant::now();
    all.iter().for_each(|&node| hosts.restart(node));
    hosts.wait_until_whole(1, HEALED_SECONDS);
    let healed_in = healing.elapsed();
    let found = clients.look(hosts, 1 + number as usize % all.len()).await;
    let survival = survived(&before, &found).map_err(PowerLoss::Lost)?;

    let others = clients.after(&found);
    let running = others.start(random);
    pause(random.between(300, 900)).await;
    others.end(running).await;
    for at in [1, 2] {
        others.read_all(hosts, 1 + (number as usize + at) % all.len()).await;
    }
    let after = check(&others.recorder.history()).map_err(|violation| PowerLoss::Violation("after", violation))?;
    hosts.ok(1, &["volume", "delete", &volume, "--yes", "--force"]);
    Ok(PowerRound { flushes, before: report, survival, after, healed_in })
}
