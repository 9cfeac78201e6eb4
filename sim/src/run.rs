//! One run: a seed in, a report or a broken promise out.

use crate::executor::{Dice, Executor, Limits};
use crate::link::Canary;
use crate::planner::Planner;
use crate::world::World;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Faults per run.
    pub faults: u64,
    /// A rule that is broken on purpose.
    pub canary: Canary,
    /// Let more fail than the scheme tolerates, and demand nothing but honesty.
    pub beyond: bool,
    /// Tell the story on standard error as it happens.
    pub print: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { faults: 12, canary: Canary::Off, beyond: false, print: false }
    }
}

/// What a run did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Hash of every decision: equal runs have equal hashes.
    pub trace: u64,
    /// Tasks run.
    pub polls: u64,
    /// Simulated time.
    pub time: Duration,
    /// Acknowledged changes.
    pub writes: u64,
    /// Answered reads.
    pub reads: u64,
    /// Answered flushes.
    pub flushes: u64,
    /// Requests of guests that failed.
    pub errors: u64,
    /// Take-overs that were read back.
    pub takeovers: u64,
}

/// A run that broke a promise or did not end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("seed {seed:#x}: {what}")]
pub struct Failure {
    /// The run.
    pub seed: u64,
    /// What broke.
    pub what: String,
    /// Hash of the trace up to there.
    pub trace: u64,
    /// What happened, one line an event.
    pub story: Vec<String>,
}

const LIMITS: Limits = Limits { polls: 60_000_000, time: Duration::from_secs(1_000) };

/// Runs one seed.
///
/// # Errors
/// A promise was broken, a task panicked, or the run does not end.
pub fn simulate(seed: u64, options: Options) -> Result<Report, Box<Failure>> {
    let executor = Executor::new(seed, options.print);
    let running = executor.clone();
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let main = main(running.clone(), seed, options);
        running.run(LIMITS, main)
    }));
    let failure =
        |what: String| Err(Box::new(Failure { seed, what, trace: executor.trace(), story: executor.story() }));
    let result = match ended {
        Ok(Ok(report)) => Ok(Report { trace: executor.trace(), polls: executor.polls(), ..report }),
        Ok(Err(stuck)) => failure(stuck.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            failure(format!("panic: {}", text.unwrap_or_default()))
        }
    };
    // What is left holds the executor: without this it would never go.
    let gone = catch_unwind(AssertUnwindSafe(|| executor.kill_all()));
    match (gone, result) {
        (Err(_), Ok(_)) => failure("panic while the world ended".to_owned()),
        (_, result) => result,
    }
}

async fn main(executor: Executor, seed: u64, options: Options) -> Report {
    let mut dice = Dice::new(seed);
    let world = World::build(&executor, &mut dice, options.canary, options.beyond).await;
    let mut planner = Planner::new(&world, Dice::new(dice.word()));
    planner.run(options.faults).await;
    planner.finish().await;
    let of = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    Report {
        trace: 0,
        polls: 0,
        time: executor.elapsed(),
        writes: of(&world.tally.writes),
        reads: of(&world.tally.reads),
        flushes: of(&world.tally.flushes),
        errors: of(&world.tally.errors),
        takeovers: of(&world.tally.takeovers),
    }
}
