//! The program with a rule of the protocol broken: see `cluster::canary`.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    xsan_cli::run()
}
