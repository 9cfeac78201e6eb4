//! Log and snapshot of the metadata.

use super::output::line;
use super::{Failure, Output, print, unreadable};
use serde::Serialize;
use std::io;
use std::path::Path;

#[derive(Serialize)]
pub(super) struct MetaReport {
    log: raft_meta::inspect::LogReport,
    snapshot: Option<raft_meta::inspect::SnapshotReport>,
}

pub(super) fn meta(dir: &Path, output: Output) -> Result<(), Failure> {
    use raft_meta::inspect::{inspect_log, inspect_snapshot};
    let path = dir.join("meta.log");
    let log = std::fs::read(&path).map_err(|error| unreadable(&path, &error))?;
    let path = dir.join("meta.snapshot");
    let snapshot = match std::fs::read(&path) {
        Ok(bytes) => Some(inspect_snapshot(&bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(unreadable(&path, &error)),
    };
    let report = MetaReport { log: inspect_log(&log), snapshot };
    print(output, &report, || {
        if let Some(snapshot) = &report.snapshot {
            line!("{snapshot}");
        }
        line!("{}", report.log);
    });
    Ok(())
}
