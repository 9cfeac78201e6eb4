//! The crate graph: who may depend on whom. Source: docs/ARCHITECTURE.md, "Crate graph".

use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// Each crate with the workspace crates its code may use. Tests (dev-dependencies) are free, except that nothing ever
/// depends on the five at the end.
const ALLOWED: &[(&str, &[&str])] = &[
    ("xsan-types", &[]),
    ("xsan-env", &["xsan-types"]),
    // Payloads travel as env's aligned buffers: one buffer from socket to disk, no copy in between.
    ("xsan-wire", &["xsan-types", "xsan-env"]),
    ("xsan-erasure", &["xsan-types"]),
    ("xsan-placement", &["xsan-types"]),
    ("lsm-block", &["xsan-types", "xsan-env"]),
    ("xsan-pool", &["xsan-types", "xsan-env", "xsan-wire", "xsan-erasure", "xsan-placement", "lsm-block"]),
    ("xsan-node", &["xsan-types", "xsan-env", "xsan-wire", "xsan-erasure"]),
    ("raft-meta", &["xsan-types", "xsan-env", "xsan-wire", "xsan-placement"]),
    ("xsan-gateway", &["xsan-types", "xsan-env"]),
    ("xsan-cli", COMPOSED),
    ("xsan-sim", &WITH_CLI),
    // Models of the protocol, not of the code: they must not be able to copy its mistakes.
    ("xsan-model", &[]),
    ("xsan-tests", &WITH_SIM),
    ("xsan-benches", &WITH_SIM),
    ("xtask", &[]),
];

const COMPOSED: &[&str] = &[
    "xsan-types",
    "xsan-env",
    "xsan-wire",
    "xsan-erasure",
    "xsan-placement",
    "lsm-block",
    "xsan-pool",
    "xsan-node",
    "raft-meta",
    "xsan-gateway",
];
const WITH_CLI: [&str; 11] = with(COMPOSED, "xsan-cli");
const WITH_SIM: [&str; 12] = with(&WITH_CLI, "xsan-sim");

/// Crates at the top: nothing may depend on them. The simulator may serve `tests` and `benches`.
const TOP: &[&str] = &["xsan-sim", "xsan-model", "xsan-tests", "xsan-benches", "xtask"];

const fn with<const N: usize>(base: &[&'static str], last: &'static str) -> [&'static str; N] {
    assert!(base.len() + 1 == N);
    let mut all = [last; N];
    let mut i = 0;
    while i < base.len() {
        all[i] = base[i];
        i += 1;
    }
    all
}

/// What `cargo metadata` says, cut down to what matters here.
#[derive(Deserialize)]
pub struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    publish: Option<Vec<String>>,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
    /// Set for dependencies inside of the workspace only.
    path: Option<String>,
}

/// Asks cargo; without dependencies, so it needs neither network nor lock file.
pub fn metadata(root: &Path) -> Result<Metadata, String> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root)
        .output()
        .map_err(|error| format!("run cargo metadata: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("read cargo metadata: {error}"))
}

/// Every edge that is not allowed, every crate the table does not know, every crate of the table that is gone.
pub fn check(metadata: &Metadata) -> Vec<String> {
    let mut findings = Vec::new();
    for package in &metadata.packages {
        let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == package.name) else {
            findings.push(format!("{}: not in the crate graph of xtask/src/graph.rs; decide its edges", package.name));
            continue;
        };
        if package.publish.as_ref().is_none_or(|registries| !registries.is_empty()) {
            findings.push(format!("{}: could be published by accident (`publish.workspace = true`)", package.name));
        }
        for dependency in &package.dependencies {
            if dependency.path.is_none() {
                continue;
            }
            let name = dependency.name.as_str();
            let is_test_only = dependency.kind.as_deref() == Some("dev");
            let is_free = is_test_only && !TOP.contains(&name);
            if !is_free && !allowed.contains(&name) {
                findings.push(format!("{}: may not depend on {name}", package.name));
            }
        }
    }
    for (name, _) in ALLOWED {
        if !metadata.packages.iter().any(|package| package.name == *name) {
            findings.push(format!("{name}: in the crate graph of xtask/src/graph.rs, but not in the workspace"));
        }
    }
    findings
}

/// Every dependency from outside that has no line of reason in `architecture` (the text of docs/ARCHITECTURE.md).
pub fn check_reasons(metadata: &Metadata, architecture: &str) -> Vec<String> {
    let table = architecture.split_once("\n## Dependencies\n").map_or("", |(_, table)| table);
    let reasoned: BTreeSet<&str> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split_once(" |"))
        .map(|(name, _)| name.trim_matches('`'))
        .collect();
    let used: BTreeSet<&str> = metadata
        .packages
        .iter()
        .flat_map(|package| &package.dependencies)
        .filter(|dependency| dependency.path.is_none())
        .map(|dependency| dependency.name.as_str())
        .collect();
    used.difference(&reasoned)
        .map(|name| format!("docs/ARCHITECTURE.md: no reason given for the dependency {name}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{ALLOWED, Metadata, TOP, check, check_reasons};

    fn workspace(extra: &str) -> Metadata {
        let mut packages: Vec<String> = ALLOWED
            .iter()
            .filter(|(name, _)| !extra.contains(&format!("\"name\":\"{name}\",\"publish\"")))
            .map(|(name, _)| format!(r#"{{"name":"{name}","publish":[],"dependencies":[]}}"#))
            .collect();
        packages.push(extra.to_owned());
        serde_json::from_str(&format!(r#"{{"packages":[{}]}}"#, packages.join(","))).unwrap()
    }

    fn edge(from: &str, to: &str, kind: &str) -> Vec<String> {
        check(&workspace(&format!(
            r#"{{"name":"{from}","publish":[],"dependencies":[{{"name":"{to}","kind":{kind},"path":"x"}}]}}"#
        )))
    }

    #[test]
    fn an_edge_that_is_not_in_the_table_is_found() {
        assert_eq!(edge("lsm-block", "xsan-pool", "null"), ["lsm-block: may not depend on xsan-pool"]);
        assert_eq!(edge("xsan-types", "xsan-env", "\"build\""), ["xsan-types: may not depend on xsan-env"]);
        assert!(edge("xsan-pool", "lsm-block", "null").is_empty());
    }

    #[test]
    fn tests_are_free_but_nobody_uses_the_top() {
        assert!(edge("lsm-block", "xsan-pool", "\"dev\"").is_empty());
        for top in TOP {
            assert_eq!(edge("xsan-node", top, "\"dev\""), [format!("xsan-node: may not depend on {top}")]);
        }
        assert!(edge("xsan-tests", "xsan-sim", "\"dev\"").is_empty());
    }

    #[test]
    fn an_unknown_crate_and_a_missing_one_are_found() {
        let metadata: Metadata =
            serde_json::from_str(r#"{"packages":[{"name":"x","publish":[],"dependencies":[]}]}"#).unwrap();
        let findings = check(&metadata);
        assert!(findings[0].starts_with("x: not in the crate graph"));
        assert_eq!(findings.len(), 1 + ALLOWED.len());
    }

    #[test]
    fn the_table_has_no_cycle() {
        // Each crate uses only crates that come before it.
        for (position, (name, uses)) in ALLOWED.iter().enumerate() {
            for used in *uses {
                let found = ALLOWED.iter().position(|(other, _)| other == used).unwrap();
                assert!(found < position, "{name} uses {used}, which comes later");
            }
        }
    }

    #[test]
    fn a_dependency_without_a_reason_is_found() {
        let metadata: Metadata = serde_json::from_str(
            r#"{"packages":[{"name":"x","publish":[],"dependencies":[
                {"name":"blake3","kind":null,"path":null}, {"name":"quux","kind":"dev","path":null}]}]}"#,
        )
        .unwrap();
        let architecture = "| quux |\n\n## Dependencies\n| Crate | Why |\n|---|---|\n| blake3 | hash |\n";
        let findings = check_reasons(&metadata, architecture);
        assert_eq!(findings, ["docs/ARCHITECTURE.md: no reason given for the dependency quux"]);
    }
}
