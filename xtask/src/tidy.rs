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
    let metadata = graph::metadata(&root)?;
    let architecture = files.iter().find(|file| file.path == "docs/ARCHITECTURE.md").map_or("", |file| &file.text);
    let mut findings = graph::check(&metadata);
    findings.extend(graph::check_reasons(&metadata, architecture));
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
