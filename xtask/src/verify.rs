//! `cargo xtask verify`: everything that must hold before a change is taken. Never writes to the tree.
//!
//! All steps run even if one fails, so that one run tells all; the cheap ones come first and the tests last, so that
//! the closing lines of the test runner are the closing lines of the log.

use crate::{formats, tidy, tree};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How a step ended.
enum Outcome {
    Passed,
    Failed,
    /// Could not be checked here; says why. Not a failure: the same tree passes on a machine without network.
    Skipped(String),
}

struct Step {
    name: &'static str,
    took: Duration,
    outcome: Outcome,
}

struct Run<'a> {
    root: &'a Path,
    steps: Vec<Step>,
}

impl Run<'_> {
    fn step(&mut self, name: &'static str, work: impl FnOnce(&Path) -> Outcome) {
        println!("\n== {name}");
        let begin = Instant::now();
        let outcome = work(self.root);
        self.steps.push(Step { name, took: begin.elapsed(), outcome });
    }
}

/// Runs all steps. `fast` leaves out what rarely breaks.
///
/// # Errors
/// Names the steps that failed.
pub fn verify(fast: bool) -> Result<(), String> {
    let root = tree::root()?;
    let mut run = Run { root: &root, steps: Vec::new() };
    run.step("format", |root| cargo(root, &["fmt", "--all", "--check"]));
    run.step("tidy", |_| match tidy::tidy() {
        Ok(()) => Outcome::Passed,
        Err(message) => {
            println!("{message}");
            Outcome::Failed
        }
    });
    run.step("lints", |root| cargo(root, &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]));
    // What is in no release: broken rules and faults of the machine.
    run.step("lints of the canary", |root| {
        cargo(
            root,
            &["clippy", "-p", "xsan-cli", "--features", "canary", "--bin", "xsan-canary", "--", "-D", "warnings"],
        )
    });
    if !fast {
        run.step("licences and advisories", licences);
        run.step("documentation", |root| {
            // Built with private items, so links to them resolve.
            let mut doc = cargo_command(root, &["doc", "--workspace", "--no-deps", "--document-private-items"]);
            outcome_of(doc.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links"))
        });
        run.step("documentation tests", |root| cargo(root, &["test", "--workspace", "--doc", "--quiet"]));
    }
    run.step("tests", tests);
    summary(&run.steps)
}

/// Formats the tree and renews the hashes in format documents.
///
/// # Errors
/// When a tool is missing or a file cannot be written.
pub fn fix() -> Result<(), String> {
    let root = tree::root()?;
    if let Outcome::Failed = cargo(&root, &["fmt", "--all"]) {
        return Err("cargo fmt failed".to_owned());
    }
    // Read after formatting, which changes the sources that the hashes are taken from.
    for document in formats::fix(&root, &tree::files(&root)?)? {
        println!("renewed the hashes in {document}");
    }
    Ok(())
}

fn tests(root: &Path) -> Outcome {
    // What the tests of the tests drive.
    let canary = ["build", "--quiet", "-p", "xsan-cli", "--features", "canary", "--bin", "xsan-canary"];
    if let Outcome::Failed = cargo(root, &canary) {
        return Outcome::Failed;
    }
    if installed(root, "nextest") {
        return cargo(root, &["nextest", "run", "--workspace", "--no-fail-fast", "--no-tests", "warn"]);
    }
    println!("cargo-nextest is not installed: using cargo test");
    cargo(root, &["test", "--workspace", "--no-fail-fast", "--lib", "--bins", "--tests"])
}

/// Licences, sources and advisories through cargo-deny. What cannot be checked for want of network (no list of packages, no
/// advisory database) is a warning, what was found is a failure.
fn licences(root: &Path) -> Outcome {
    if !installed(root, "deny") {
        return Outcome::Skipped("cargo-deny is not installed (cargo install --locked cargo-deny)".to_owned());
    }
    let rest = deny(root, &["deny", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"]);
    let fetched = quiet(&mut cargo_command(root, &["deny", "fetch", "db"]));
    let advisories = if fetched {
        deny(root, &["deny", "check", "--hide-inclusion-graph", "advisories"])
    } else {
        println!("warning: the advisory database could not be fetched; trying the cached one");
        deny(root, &["deny", "--offline", "check", "--hide-inclusion-graph", "advisories"])
    };
    match (rest, advisories) {
        (Outcome::Failed, _) | (_, Outcome::Failed) => Outcome::Failed,
        (Outcome::Skipped(why), _) | (_, Outcome::Skipped(why)) => Outcome::Skipped(why),
        (Outcome::Passed, Outcome::Passed) => Outcome::Passed,
    }
}

/// Runs one check of cargo-deny and tells "something was found" from "could not look": only the first ends with a verdict.
fn deny(root: &Path, arguments: &[&str]) -> Outcome {
    println!("cargo {}", arguments.join(" "));
    let output = match cargo_command(root, arguments).output() {
        Ok(output) => output,
        Err(error) => return Outcome::Skipped(format!("cargo-deny did not start: {error}")),
    };
    let text = format!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    print!("{text}");
    if output.status.success() {
        return Outcome::Passed;
    }
    if text.lines().any(|line| line.contains(" FAILED")) {
        return Outcome::Failed;
    }
    let first = text.lines().find(|line| line.contains("ERROR")).unwrap_or("no verdict");
    println!("warning: {}: not checked", arguments.last().unwrap_or(&""));
    Outcome::Skipped(first.chars().skip_while(|c| *c != ']').skip(1).take(90).collect::<String>().trim().to_owned())
}

fn summary(steps: &[Step]) -> Result<(), String> {
    println!("\n== summary");
    for step in steps {
        let word = match &step.outcome {
            Outcome::Passed => "ok".to_owned(),
            Outcome::Failed => "FAILED".to_owned(),
            Outcome::Skipped(why) => format!("skipped: {why}"),
        };
        println!("{:>8.1} s  {:<24} {word}", step.took.as_secs_f64(), step.name);
    }
    let failed: Vec<&str> =
        steps.iter().filter(|step| matches!(step.outcome, Outcome::Failed)).map(|step| step.name).collect();
    if failed.is_empty() { Ok(()) } else { Err(format!("failed: {}", failed.join(", "))) }
}

pub(crate) fn cargo_command(root: &Path, arguments: &[&str]) -> Command {
    // The cargo that started this program, not the first one in PATH.
    let mut command = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()));
    command.args(arguments).current_dir(root).stdin(Stdio::null());
    command
}

fn cargo(root: &Path, arguments: &[&str]) -> Outcome {
    println!("cargo {}", arguments.join(" "));
    outcome_of(&mut cargo_command(root, arguments))
}

fn outcome_of(command: &mut Command) -> Outcome {
    match command.status() {
        Ok(status) if status.success() => Outcome::Passed,
        Ok(_) => Outcome::Failed,
        Err(error) => {
            println!("could not start {}: {error}", command.get_program().to_string_lossy());
            Outcome::Failed
        }
    }
}

fn quiet(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

fn installed(root: &Path, subcommand: &str) -> bool {
    quiet(&mut cargo_command(root, &[subcommand, "--version"]))
}
