//! The project's own chores: `cargo xtask verify | tidy | fix | sim`.
//!
//! One entry point, the same on a desk and in CI. `verify` and `tidy` never write to the tree; `fix` does.
#![forbid(unsafe_code)]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a tool for people: it runs on the real machine only, never in the simulator"
)]

mod formats;
mod graph;
mod rules;
mod scrub;
mod sha256;
mod sim;
mod tidy;
mod tree;
mod verify;

use std::process::ExitCode;

const HELP: &str = "\
usage: cargo xtask COMMAND

  verify [--fast]   everything that must hold before a change is taken: formatting, tidy, lints, documentation,
                    licences and advisories, tests. Never writes to the tree. --fast leaves out documentation,
                    licences and documentation tests.
  tidy              only the rules of the tree: crate graph, format documents, sizes, banned words and calls.
  sim [OPTIONS]     hunts for seeds that break a promise, or tells the story of one (`sim --help`; also --hours H).
  fix               what can be repaired without thought: formatting and the hashes in format documents.
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["verify"] => verify::verify(false),
        ["verify", "--fast"] => verify::verify(true),
        ["tidy"] => tidy::tidy(),
        ["fix"] => verify::fix(),
        ["sim", rest @ ..] => tree::root().and_then(|root| sim::sim(&root, rest)),
        ["help" | "--help" | "-h"] => {
            print!("{HELP}");
            Ok(())
        }
        _ => Err(format!("unknown command `{}`\n\n{HELP}", words.join(" "))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}
