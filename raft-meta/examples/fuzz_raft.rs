//! Fuzzes the replicated log: `fuzz_raft [SECONDS] [SEED]` (default 60 s). Readers get mutated bytes; groups of three replicas get
//! each other's messages forged, repeated and lost. What must hold: no panic. A panic's seed is printed before it; the same
//! seed repeats it.
#![forbid(unsafe_code)]
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "a program of its own: it watches the clock")]

use std::time::{Duration, Instant};

#[path = "../tests/raft/hostile.rs"]
mod hostile;

fn main() {
    let argument = |at: usize| std::env::args().nth(at).and_then(|text| text.parse::<u64>().ok());
    let (seconds, first) = (argument(1).unwrap_or(60), argument(2).unwrap_or(1));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut seed = first;
    while Instant::now() < end {
        let round = std::panic::catch_unwind(|| {
            hostile::hostile_life(seed);
            (0..50).for_each(|part| hostile::hostile_bytes(seed * 50 + part));
        });
        if round.is_err() {
            eprintln!("seed {seed}; again: fuzz_raft 1 {seed}");
            std::process::exit(1);
        }
        seed += 1;
    }
    println!("{} rounds in {seconds} s", seed - first);
}
