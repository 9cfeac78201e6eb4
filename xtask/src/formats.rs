//! Format documents: each byte table carries the hash of the source file it describes, so that neither changes alone.
//!
//! A document says `<!-- source: node/src/format.rs sha256:HEX -->`. Several such lines may stand in one document.

use crate::sha256;
use crate::tree::File;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const OPEN: &str = "<!-- source: ";
const CLOSE: &str = " -->";

/// What one line of a document says about one source file.
#[derive(Clone, Copy)]
struct Claim<'a> {
    source: &'a str,
    hash: &'a str,
}

fn is_format_document(path: &str) -> bool {
    path.starts_with("docs/format/") && path.ends_with(".md")
}

fn claim(line: &str) -> Option<Claim<'_>> {
    let body = line.trim().strip_prefix(OPEN)?.strip_suffix(CLOSE)?;
    let (source, hash) = body.split_once(" sha256:").unwrap_or((body, ""));
    Some(Claim { source: source.trim(), hash: hash.trim() })
}

/// Paths ending in `/format.rs` that a text speaks of.
fn named_sources(text: &str) -> BTreeSet<&str> {
    let of_a_path = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    text.split(|c| !of_a_path(c)).filter(|word| word.ends_with("/format.rs")).collect()
}

fn hash_of(files: &[File], source: &str) -> Option<String> {
    let file = files.iter().find(|file| file.path == source)?;
    Some(sha256::hex(file.text.as_bytes()))
}

/// Documents whose source has changed, is missing, or is named without a hash.
pub fn check(files: &[File]) -> Vec<String> {
    let mut findings = Vec::new();
    for document in files.iter().filter(|file| is_format_document(&file.path)) {
        let mut claimed = BTreeSet::new();
        for (index, line) in document.text.lines().enumerate() {
            let Some(Claim { source, hash }) = claim(line) else { continue };
            claimed.insert(source);
            let place = format!("{}:{}", document.path, index + 1);
            match hash_of(files, source) {
                None => findings.push(format!("{place}: names {source}, which does not exist")),
                Some(found) if found != hash => findings.push(format!(
                    "{place}: {source} has changed: bring the byte table up to date, then `cargo xtask fix`"
                )),
                Some(_) => {}
            }
        }
        for source in named_sources(&document.text) {
            if !claimed.contains(source) {
                let wanted = format!("{OPEN}{source} sha256:{CLOSE}");
                findings.push(format!("{}: speaks of {source} without the line `{wanted}`", document.path));
            }
        }
    }
    findings
}

/// Writes the present hashes into all format documents; returns the documents that changed.
pub fn fix(root: &Path, files: &[File]) -> Result<Vec<String>, String> {
    let mut changed = Vec::new();
    for document in files.iter().filter(|file| is_format_document(&file.path)) {
        let text = with_hashes(files, &document.text);
        if text != document.text {
            fs::write(root.join(&document.path), &text).map_err(|error| format!("write {}: {error}", document.path))?;
            changed.push(document.path.clone());
        }
    }
    Ok(changed)
}

fn with_hashes(files: &[File], text: &str) -> String {
    let renewed = |line: &str| -> String {
        let hash = claim(line).and_then(|claim| Some((claim.source.to_owned(), hash_of(files, claim.source)?)));
        hash.map_or_else(|| line.to_owned(), |(source, hash)| format!("{OPEN}{source} sha256:{hash}{CLOSE}"))
    };
    let mut lines: Vec<String> = text.lines().map(renewed).collect();
    if text.ends_with('\n') {
        lines.push(String::new());
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::{check, with_hashes};
    use crate::tree::File;

    fn file(path: &str, text: &str) -> File {
        File { path: path.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn a_changed_source_is_found_and_fixed() {
        let source = file("node/src/format.rs", "const A: u8 = 1;\n");
        let stale = "# x\n<!-- source: node/src/format.rs sha256:00 -->\n";
        let files = [source, file("docs/format/device.md", stale)];
        assert_eq!(check(&files).len(), 1);

        let fixed = with_hashes(&files, stale);
        let [source, _] = files;
        let files = [source, file("docs/format/device.md", &fixed)];
        assert!(check(&files).is_empty());
        assert_eq!(with_hashes(&files, &fixed), fixed);
    }

    #[test]
    fn a_source_named_without_hash_is_found() {
        let files = [file("node/src/format.rs", ""), file("docs/format/a.md", "Offsets: `node/src/format.rs`.\n")];
        assert_eq!(check(&files).len(), 1);
    }

    #[test]
    fn a_source_that_is_gone_is_found() {
        let files = [file("docs/format/a.md", "<!-- source: gone/src/format.rs sha256:00 -->\n")];
        assert!(check(&files)[0].contains("does not exist"));
    }
}
