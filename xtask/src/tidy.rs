//! `cargo xtask tidy`: all rules of the tree in one pass, in well under a second.

use crate::rules::Settings;
use crate::{formats, graph, rules, tree};
use std::fs;

/// Prints every finding.
///
/// # Errors
/// When there is a finding, or the tree cannot be read.
pub fn tidy() -> Result<(), String> {
    let root = tree::root()?;
    let settings = fs::read_to_string(root.join("xtask/tidy.toml")).map_err(|error| format!("tidy.toml: {error}"))?;
    let settings: Settings = toml::from_str(&settings).map_err(|error| format!("tidy.toml: {error}"))?;
    let files = tree::files(&root)?;
    let mut findings = graph::check(&graph::metadata(&root)?);
    findings.extend(formats::check(&files));
    findings.extend(rules::check(&files, &settings));
    for finding in &findings {
        println!("{finding}");
    }
    match findings.len() {
        0 => Ok(()),
        count => Err(format!("{count} finding{} in {} files", if count == 1 { "" } else { "s" }, files.len())),
    }
}
