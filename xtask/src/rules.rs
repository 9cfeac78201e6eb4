//! Rules on the text of single files.
//!
//! A line that must break a rule says so on itself or on the line above: `tidy-allow(RULE): reason`.

use crate::scrub::{code_only, is_word, words};
use crate::tree::File;
use serde::Deserialize;

/// What a project may set in `xtask/tidy.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    rust_lines_max: usize,
    banned: Vec<Banned>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Banned {
    word: String,
    #[serde(default, rename = "in")]
    paths: Vec<String>,
    #[serde(default)]
    code_only: bool,
    instead: String,
}

/// Crates that may contain `unsafe`: kernels, system calls, and the C libraries that benches compare with.
const UNSAFE_IN: &[&str] = &["erasure/", "env/", "benches/"];
/// Crates that may use the banned calls of clippy.toml, beside tests and examples: see the reasons there.
const BANNED_CALLS_IN: &[&str] =
    &["env/", "xtask/", "tests/", "benches/", "cli/", "sim/src/main.rs", "sim/model/src/main.rs"];
/// Crates that may use fjall, each in one file only, so that the index can be replaced.
const FJALL_IN: &[&str] = &["node/src/", "lsm-block/src/"];
/// Paths of one person's machine. Split, so that this file does not find itself.
const MACHINE_PATHS: &[&str] = &[concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/")];

/// A Rust file in the forms that rules ask for.
struct Source<'a> {
    path: &'a str,
    text: &'a str,
    code: String,
    /// Byte offset where the file's unit tests begin; 0 in a file of tests, its length in one without.
    tests_from: usize,
}

impl<'a> Source<'a> {
    fn new(file: &'a File) -> Self {
        let code = code_only(&file.text);
        let is_test_file = file.path.starts_with("tests/")
            || file.path.contains("/tests/")
            || file.path.ends_with("/tests.rs")
            || file.path.ends_with("_tests.rs");
        // Columns are kept by characters, not bytes, so the offset is taken in the scrubbed text throughout.
        let tests_from = if is_test_file { 0 } else { code.find("#[cfg(test)]").unwrap_or(code.len()) };
        Self { path: &file.path, text: &file.text, code, tests_from }
    }

    fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path.starts_with(place))
    }
}

/// Collects findings of one file, leaving out those that the file argues for.
struct Report<'a> {
    path: &'a str,
    lines: Vec<&'a str>,
    findings: Vec<String>,
}

impl Report<'_> {
    fn add(&mut self, line: usize, rule: &str, message: &str) {
        let marker = format!("tidy-allow({rule}): ");
        let argued = |line: usize| self.lines.get(line).is_some_and(|text| text.contains(&marker));
        let is_argued = argued(line) || line.checked_sub(1).is_some_and(argued);
        if !is_argued {
            self.findings.push(format!("{}:{}: {message} [{rule}]", self.path, line + 1));
        }
    }
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count()
}

/// All findings of all rules.
pub fn check(files: &[File], settings: &Settings) -> Vec<String> {
    let mut findings = Vec::new();
    let mut fjall_files: Vec<(&str, &str)> = Vec::new();
    for file in files {
        let mut report = Report { path: &file.path, lines: file.text.lines().collect(), findings: Vec::new() };
        machine_paths(file, &mut report);
        dead_links(file, files, &mut report);
        let source = file.path.ends_with(".rs").then(|| Source::new(file));
        banned_words(file, source.as_ref(), settings, &mut report);
        if let Some(source) = &source {
            length(source, settings, &mut report);
            stubs(source, &mut report);
            unsafe_code(source, &mut report);
            sleeps(source, &mut report);
            unordered_select(source, &mut report);
            banned_call_exceptions(source, &mut report);
            index_engine(source, &mut report, &mut fjall_files);
        }
        findings.append(&mut report.findings);
    }
    findings
}

fn machine_paths(file: &File, report: &mut Report<'_>) {
    for path in MACHINE_PATHS {
        for (at, _) in file.text.match_indices(path) {
            // `$DIR/...`, `https://host/...` and `a/b/...` are other things than a path from the root.
            let before = file.text[..at].chars().next_back();
            if !before.is_some_and(|c| is_word(c) || ".-})>*~".contains(c)) {
                report.add(line_of(&file.text, at), "machine-path", "absolute path of one machine");
            }
        }
    }
}

fn dead_links(file: &File, files: &[File], report: &mut Report<'_>) {
    if !file.path.ends_with(".md") {
        return;
    }
    for (at, opening) in file.text.match_indices("](") {
        let target = file.text[at + opening.len()..].split([')', '#', '\n']).next().unwrap_or_default();
        let Some(path) = resolve(&file.path, target) else { continue };
        let folder = format!("{path}/");
        if !files.iter().any(|other| other.path == path || other.path.starts_with(&folder)) {
            report.add(line_of(&file.text, at), "dead-link", &format!("{target} does not exist"));
        }
    }
}

/// The path in the repository that a link in `from` means; `None` for links elsewhere or to the document itself.
fn resolve(from: &str, target: &str) -> Option<String> {
    if target.is_empty() || target.contains(':') || target.contains(char::is_whitespace) {
        return None;
    }
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}

fn banned_words(file: &File, source: Option<&Source<'_>>, settings: &Settings, report: &mut Report<'_>) {
    if file.path == "xtask/tidy.toml" {
        return;
    }
    for banned in &settings.banned {
        let wanted_here = banned.paths.is_empty() || banned.paths.iter().any(|path| file.path.starts_with(path));
        let text = match (banned.code_only, source) {
            _ if !wanted_here => continue,
            (false, _) => &file.text,
            (true, Some(source)) => &source.code,
            (true, None) => continue,
        };
        for at in words(text, &banned.word) {
            let message = format!("`{}`: {}", banned.word, banned.instead);
            report.add(line_of(text, at), "banned-word", &message);
        }
    }
}

fn length(source: &Source<'_>, settings: &Settings, report: &mut Report<'_>) {
    let lines = source.text.lines().count();
    if lines > settings.rust_lines_max {
        let message = format!("{lines} lines, more than {}: split it by operation", settings.rust_lines_max);
        report.add(0, "length", &message);
    }
}

fn stubs(source: &Source<'_>, report: &mut Report<'_>) {
    for stub in ["todo!", "unimplemented!"] {
        for at in words(&source.code, stub) {
            report.add(line_of(&source.code, at), "stub", "a stub is not a feature");
        }
    }
}

fn unsafe_code(source: &Source<'_>, report: &mut Report<'_>) {
    if source.is_in(UNSAFE_IN) {
        return;
    }
    for at in words(&source.code, "unsafe") {
        report.add(line_of(&source.code, at), "unsafe", "unsafe code belongs in erasure or env");
    }
    let is_root = source.path.ends_with("/src/lib.rs")
        || source.path.ends_with("/src/main.rs")
        || source.path.contains("/src/bin/")
        || source.path == "lib.rs";
    if is_root && !source.code.contains("#![forbid(unsafe_code)]") {
        report.add(0, "unsafe", "the root of a crate says `#![forbid(unsafe_code)]`");
    }
}

fn sleeps(source: &Source<'_>, report: &mut Report<'_>) {
    for at in words(&source.code, "thread::sleep").filter(|at| *at >= source.tests_from) {
        report.add(line_of(&source.code, at), "sleep", "a test waits on a condition, it does not sleep for luck");
    }
}

fn unordered_select(source: &Source<'_>, report: &mut Report<'_>) {
    for at in words(&source.code, "select!") {
        let body = source.code[at + "select!".len()..].trim_start();
        let first = body.trim_start_matches(['{', '(', '[']).trim_start();
        if !first.starts_with("biased;") {
            let message = "`select!` without `biased;` polls in random order, which breaks replay from a seed";
            report.add(line_of(&source.code, at), "select", message);
        }
    }
}

fn banned_call_exceptions(source: &Source<'_>, report: &mut Report<'_>) {
    if source.is_in(BANNED_CALLS_IN) || source.path.contains("/examples/") {
        return;
    }
    for lint in ["clippy::disallowed_methods", "clippy::disallowed_types", "clippy::disallowed_macros"] {
        for at in words(&source.code, lint).filter(|at| *at < source.tests_from) {
            let message = "only env, the composition root, tests and tools may use what clippy.toml bans";
            report.add(line_of(&source.code, at), "banned-call", message);
        }
    }
}

fn index_engine<'a>(source: &Source<'a>, report: &mut Report<'_>, seen: &mut Vec<(&'static str, &'a str)>) {
    // A module may carry the engine's name: `mod fjall` and `path::fjall::Type` are not the crate.
    if words(&source.code, "mod fjall").next().is_some() {
        return;
    }
    let is_crate = |at: &usize| !source.code[..*at].ends_with("::");
    let Some(at) = words(&source.code, "fjall").find(is_crate) else { return };
    let line = line_of(&source.code, at);
    let Some(place) = FJALL_IN.iter().find(|place| source.path.starts_with(**place)) else {
        return report.add(line, "fjall", "fjall stays behind a trait, in one file of node or lsm-block");
    };
    match seen.iter().find(|(other, _)| other == place) {
        None => seen.push((*place, source.path)),
        Some((_, first)) => report.add(line, "fjall", &format!("fjall is used in {first} already: one file only")),
    }
}

#[cfg(test)]
mod tests {
    use super::{Settings, check};
    use crate::tree::File;

    fn findings(files: &[(&str, &str)]) -> Vec<String> {
        let settings: Settings = toml::from_str(
            "rust_lines_max = 30\n[[banned]]\nword = \"FROB\"\ninstead = \"x\"\n\
             [[banned]]\nword = \"anyhow\"\nin = [\"node/src\"]\ncode_only = true\ninstead = \"x\"\n",
        )
        .unwrap();
        let files: Vec<File> =
            files.iter().map(|(path, text)| File { path: (*path).to_owned(), text: (*text).to_owned() }).collect();
        check(&files, &settings)
    }

    /// Runs one file through all rules and returns the names of those that fired.
    fn rules(path: &str, text: &str) -> Vec<String> {
        findings(&[(path, text)])
            .iter()
            .map(|line| line.rsplit_once('[').unwrap().1.trim_end_matches(']').to_owned())
            .collect()
    }

    #[test]
    fn each_rule_finds_what_it_is_for() {
        let home = concat!("cd /ho", "me/me\n");
        let long = "fn f() {}\n".repeat(31);
        let cases: &[(&str, &str, &[&str])] = &[
            ("README.md", home, &["machine-path"]),
            ("README.md", "FROB\n", &["banned-word"]),
            ("docs/a.md", "see [b](../b.md#x)\n", &["dead-link"]),
            ("node/src/a.rs", "use anyhow::Result;", &["banned-word"]),
            ("node/src/a.rs", &long, &["length"]),
            ("node/src/a.rs", "fn f() { todo!() }", &["stub"]),
            ("node/src/a.rs", "fn f() { unsafe { g() } }", &["unsafe"]),
            ("node/src/lib.rs", "//! x", &["unsafe"]),
            ("tests/tests/a.rs", "std::thread::sleep(x)", &["sleep"]),
            ("node/src/a.rs", "#[cfg(test)] mod t { fn f() { std::thread::sleep(x) } }", &["sleep"]),
            ("node/src/a.rs", "tokio::select! { a = b => {} }", &["select"]),
            ("node/src/a.rs", "#![allow(clippy::disallowed_methods)]", &["banned-call"]),
            ("pool/src/a.rs", "use fjall::Keyspace;", &["fjall"]),
        ];
        for (path, text, wanted) in cases {
            assert_eq!(rules(path, text), *wanted, "{path}: {text}");
        }
    }

    #[test]
    fn what_is_fine_stays_quiet() {
        let cases = [
            ("README.md", concat!("https://example.org/ho", "me/x and $DIR/wo", "rk/x\n")),
            ("docs/a.md", "[a](a.md), [a](../docs/a.md#x), [docs](../docs), [x](https://x.org/y), [c](#c)\n"),
            ("node/src/a.rs", "// unsafe todo! anyhow FROBBER\nlet s = \"todo! unsafe\";"),
            ("node/src/lib.rs", "#![forbid(unsafe_code)]"),
            ("erasure/src/kernel.rs", "unsafe { f() }"),
            ("node/src/a.rs", "tokio::select! { biased; a = b => {} }"),
            ("env/src/lib.rs", "#![allow(clippy::disallowed_methods)]"),
            ("node/src/a.rs", "fn f() {}\n#[cfg(test)]\nmod t { #![allow(clippy::disallowed_methods)] }"),
            ("tests/tests/a.rs", "// tidy-allow(sleep): poll interval of a wait on a condition\nthread::sleep(x)"),
        ];
        for (path, text) in cases {
            assert!(rules(path, text).is_empty(), "{path}: {text}: {:?}", rules(path, text));
        }
    }

    #[test]
    fn fjall_lives_in_one_file_of_a_crate() {
        let one = ("node/src/a.rs", "use fjall::A;");
        let other_crate = ("lsm-block/src/a.rs", "use fjall::A;");
        assert!(findings(&[one, other_crate]).is_empty());
        let module = ("node/src/mod.rs", "pub mod fjall;\npub use fjall::Index;");
        let user = ("node/src/b.rs", "pub use index::fjall::Index;");
        assert!(findings(&[one, module, user]).is_empty());
        assert_eq!(findings(&[one, ("node/src/b.rs", "use fjall::B;")]).len(), 1);
    }
}
