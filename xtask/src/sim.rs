//! `cargo xtask sim`: the simulator of `sim/`, built as it must be to be fast.

use crate::verify::cargo_command;
use std::path::Path;

/// Runs it with the words of the command line; `--hours H` stands for so many seconds.
pub fn sim(root: &Path, words: &[&str]) -> Result<(), String> {
    let mut arguments = vec!["run", "--release", "--quiet", "-p", "xsan-sim", "--"];
    let mut words = words.iter().copied();
    let seconds: String;
    while let Some(word) = words.next() {
        if word == "--hours" {
            let hours: f64 = words.next().and_then(|hours| hours.parse().ok()).ok_or("--hours wants a number")?;
            seconds = ((hours * 3600.0) as u64).to_string();
            arguments.extend(["--seconds", &seconds]);
            arguments.extend(words);
            break;
        }
        arguments.push(word);
    }
    match cargo_command(root, &arguments).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("the simulator ended with {status}")),
        Err(error) => Err(format!("cargo does not run: {error}")),
    }
}
