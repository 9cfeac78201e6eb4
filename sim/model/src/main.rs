//! Searches a model for a broken promise: `xsan-model --help`.
#![forbid(unsafe_code)]
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tells people how long a search took")]

use std::process::ExitCode;
use std::time::Instant;
use xsan_model::check::{Outcome, Report, Walks, search, walk};
use xsan_model::moves::Moves;
use xsan_model::pins::Pins;
use xsan_model::reconnect::Reconnect;
use xsan_model::rows::Rows;
use xsan_model::rules::{Rule, Ruled, Rules, judge};
use xsan_model::volume::Volume;

const HELP: &str = "\
usage: xsan-model MODEL [WORD...] [OPTION...]
       xsan-model MODEL --needed

Looks through every state of a model of the protocol, nearest first, until a promise breaks; then it tells the story.

  WORD             how often something may happen, such as w=2 take=1, or a flag, such as reads
  --without RULE   take a rule out (may be repeated)
  --states N       stop after N states (default 20000000, about 2 GiB)
  --walks N        N random walks instead
  --steps N        steps of a walk, at most (default 150)
  --seed N         of the walks (default 1)
  --f N            the same as the word f=N
  --needed         every rule once: the promise that breaks without it, and that none breaks with it
";

/// What the command line asks for.
struct Request {
    words: Vec<String>,
    without: Vec<String>,
    states_max: usize,
    walks: Walks,
    needed: bool,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().unwrap_or_default();
    let asked = parse(arguments).and_then(|request| match model.as_str() {
        Volume::NAME => run::<Volume>(&request),
        Moves::NAME => run::<Moves>(&request),
        Rows::NAME => run::<Rows>(&request),
        Pins::NAME => run::<Pins>(&request),
        Reconnect::NAME => run::<Reconnect>(&request),
        "help" | "--help" | "-h" => {
            help();
            Ok(true)
        }
        other => Err(format!("`{other}`: no such model; see --help")),
    });
    match asked {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("xsan-model: {message}");
            ExitCode::from(2)
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Request, String> {
    let walks = Walks { count: 0, steps_max: 150, seed: 1 };
    let mut request = Request { words: Vec::new(), without: Vec::new(), states_max: 20_000_000, walks, needed: false };
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("`{argument}` needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("`{text}`: not a number"));
        match argument.as_str() {
            "--without" => request.without.push(value()?),
            "--states" => request.states_max = size(number(value()?)?)?,
            "--walks" => request.walks.count = number(value()?)?,
            "--steps" => request.walks.steps_max = size(number(value()?)?)?,
            "--seed" => request.walks.seed = number(value()?)?,
            "--f" => request.words.push(format!("f={}", value()?)),
            "--needed" => request.needed = true,
            option if option.starts_with('-') => return Err(format!("`{option}`: no such option; see --help")),
            word => request.words.push(word.to_owned()),
        }
    }
    Ok(request)
}

fn size(number: u64) -> Result<usize, String> {
    usize::try_from(number).map_err(|_| format!("`{number}`: too many"))
}

fn help() {
    print!("{HELP}");
    help_for::<Volume>();
    help_for::<Moves>();
    help_for::<Rows>();
    help_for::<Pins>();
    help_for::<Reconnect>();
}

fn help_for<M: Ruled>() {
    println!("\n{}: {}", M::NAME, M::WORDS);
    for rule in M::Rule::ALL {
        println!("    {:24} {}", rule.name(), rule.says());
    }
}

fn run<M: Ruled>(request: &Request) -> Result<bool, String> {
    if request.needed {
        return show_needed::<M>(request.states_max);
    }
    let mut rules = Rules::all();
    for name in &request.without {
        let rule = M::Rule::ALL.iter().find(|rule| rule.name() == *name);
        rules = rules.without(*rule.ok_or_else(|| format!("`{name}`: not a rule of {}", M::NAME))?);
    }
    let words: Vec<&str> = request.words.iter().map(String::as_str).collect();
    let model = M::build(&words, rules)?;
    let began = Instant::now();
    let report = match request.walks.count {
        0 => search(&model, request.states_max),
        _ => walk(&model, request.walks),
    };
    println!("{} ({:.1} s)", summary(&report), began.elapsed().as_secs_f64());
    Ok(report.story().is_none())
}

fn summary(report: &Report) -> String {
    let Report { states, depth, outcome } = report;
    match outcome {
        Outcome::Complete => format!("no promise breaks: {states} states, all there are, up to {depth} steps deep"),
        Outcome::Unfinished => format!("no promise broke in {states} states, up to {depth} steps deep; there are more"),
        Outcome::Violation(story) => format!("{story}\na promise broke, {states} states"),
    }
}

fn show_needed<M: Ruled>(states_max: usize) -> Result<bool, String> {
    let mut all = true;
    for (rule, words) in M::NEEDED {
        let began = Instant::now();
        let verdict = judge::<M>(*rule, words, states_max)?;
        all &= verdict.is_needed();
        println!("{} ({words})\n  {}", rule.name(), rule.says());
        println!("  without: {}", verdict.without.story().map_or("nothing broke", |story| story.broken));
        println!("  with: {} ({:.1} s)", summary(&verdict.with), began.elapsed().as_secs_f64());
    }
    Ok(all)
}
