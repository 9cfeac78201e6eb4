//! `xsan-sim`: hunts for seeds that break a promise, or tells the story of one.
#![forbid(unsafe_code)]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a tool for people: measures real time around the runs, not inside of them"
)]

use std::process::ExitCode;
use std::time::{Duration, Instant};
use xsan_sim::{Options, simulate};

/// A long hunt says how far it is.
const TELL_EVERY: Duration = Duration::from_secs(60);

const HELP: &str = "\
xsan-sim: a cluster in one thread from one seed

  --seeds N        run N seeds (default 100)
  --seconds S      ... or for S seconds
  --from SEED      first seed (default: 1)
  --seed SEED      run this seed alone
  --trace          tell its story
  --logs           with the logs of the code under test (filter: XSAN_LOG)
  --faults N       faults per seed (default 12)
  --beyond         let more fail than the scheme tolerates, and demand nothing but honesty
  --keep-going     do not stop at the first failure
";

struct Arguments {
    seeds: u64,
    seconds: Option<u64>,
    from: u64,
    seed: Option<u64>,
    logs: bool,
    keep_going: bool,
    options: Options,
}

fn number(text: Option<String>) -> Result<u64, String> {
    let text = text.ok_or("a number is missing")?;
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| format!("`{text}`: {error}"))
}

fn parse() -> Result<Arguments, String> {
    let mut arguments = Arguments {
        seeds: 100,
        seconds: None,
        from: 1,
        seed: None,
        logs: false,
        keep_going: false,
        options: Options::default(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--seeds" => arguments.seeds = number(words.next())?,
            "--seconds" => arguments.seconds = Some(number(words.next())?),
            "--from" => arguments.from = number(words.next())?,
            "--seed" => arguments.seed = Some(number(words.next())?),
            "--faults" => arguments.options.faults = number(words.next())?,
            "--beyond" => arguments.options.beyond = true,
            "--trace" => arguments.options.print = true,
            "--logs" => arguments.logs = true,
            "--keep-going" => arguments.keep_going = true,
            _ => return Err(format!("unknown `{word}`\n\n{HELP}")),
        }
    }
    Ok(arguments)
}

/// The fewest faults with which the seed still fails: one run is the beginning of another with more.
fn least_faults(seed: u64, options: Options) -> u64 {
    let quiet = Options { print: false, ..options };
    (0..options.faults).find(|&faults| simulate(seed, Options { faults, ..quiet }).is_err()).unwrap_or(options.faults)
}

fn main() -> ExitCode {
    if std::env::args().any(|word| word == "--help" || word == "-h") {
        print!("{HELP}");
        return ExitCode::SUCCESS;
    }
    let arguments = match parse() {
        Ok(arguments) => arguments,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    if arguments.logs {
        let filter = tracing_subscriber::EnvFilter::try_from_env("XSAN_LOG")
            .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("debug"));
        tracing_subscriber::fmt().with_env_filter(filter).without_time().with_writer(std::io::stderr).init();
    }
    if !arguments.options.print {
        // A panic of the code under test is a result, told once.
        std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    }
    let began = Instant::now();
    let mut told = began;
    let (mut runs, mut failures, mut writes, mut errors) = (0_u64, 0_u64, 0_u64, 0_u64);
    let (first, count) = arguments.seed.map_or((arguments.from, arguments.seeds), |seed| (seed, 1));
    let limit = arguments.seconds.map(Duration::from_secs);
    for seed in first.. {
        let over = match limit {
            Some(limit) => began.elapsed() >= limit,
            None => seed - first >= count,
        };
        if over {
            break;
        }
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            let rate = runs as f64 * 3600.0 / began.elapsed().as_secs_f64();
            eprintln!("{runs} seeds, {failures} failed, {writes} writes, {rate:.0} seeds an hour; next {seed:#x}");
        }
        runs += 1;
        match simulate(seed, arguments.options) {
            Ok(report) => {
                writes += report.writes;
                errors += report.errors;
                if arguments.seed.is_some() {
                    println!("{report:?}");
                }
            }
            Err(failure) => {
                failures += 1;
                println!(
                    "FAILED {failure}\n  again: xsan-sim --seed {seed:#x} --faults {}{} --trace",
                    least_faults(seed, arguments.options),
                    if arguments.options.beyond { " --beyond" } else { "" }
                );
                if !arguments.keep_going {
                    break;
                }
            }
        }
    }
    let took = began.elapsed();
    println!("{runs} seeds, {failures} failed, {writes} writes, {errors} guest errors, {took:.1?}");
    if failures > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
