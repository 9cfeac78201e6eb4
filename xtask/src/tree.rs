//! The files of the repository, as rules see them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One text file: its path from the root with forward slashes, and its content.
pub struct File {
    pub path: String,
    pub text: String,
}

/// The root of the repository: the folder above this crate.
pub fn root() -> Result<PathBuf, String> {
    let manifest = std::env::var("CARGO_MANIFEST_DIR").map_err(|_| "run me as `cargo xtask`".to_owned())?;
    Path::new(&manifest).parent().map(Path::to_path_buf).ok_or_else(|| "this crate has no parent folder".to_owned())
}

/// Every text file that is tracked or would be (not ignored); binary files are left out. Sorted by path.
pub fn files(root: &Path) -> Result<Vec<File>, String> {
    let listing = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .map_err(|error| format!("run git: {error}"))?;
    if !listing.status.success() {
        return Err(format!("git ls-files: {}", String::from_utf8_lossy(&listing.stderr).trim()));
    }
    let mut paths: Vec<String> =
        String::from_utf8_lossy(&listing.stdout).split_terminator('\0').map(str::to_owned).collect();
    paths.sort();
    paths.dedup();
    let mut files = Vec::with_capacity(paths.len());
    for path in paths {
        // A file that was removed but not yet committed is listed and absent; a binary one is not text.
        let Ok(bytes) = fs::read(root.join(&path)) else { continue };
        if let Ok(text) = String::from_utf8(bytes) {
            files.push(File { path, text });
        }
    }
    Ok(files)
}
