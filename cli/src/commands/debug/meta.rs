//! Log and snapshot of the metadata.

use super::output::line;
use super::{Failure, Output, print, unreadable};
use raft_meta::inspect::{LogReport, SnapshotReport, inspect_log, inspect_snapshot};
use raft_meta::raft::format::{RAFT_LOG_FILE, RAFT_SNAPSHOT_FILE};
use raft_meta::raft::inspect::{GroupLogReport, GroupSnapshotReport, inspect_group_log, inspect_group_snapshot};
use serde::Serialize;
use std::fmt::Display;
use std::io;
use std::path::Path;

/// What a directory of metadata holds. Whatever is there is shown: a file that is missing may be why somebody looks.
#[derive(Serialize)]
struct MetaReport<L, S> {
    log: Option<L>,
    snapshot: Option<S>,
}

pub(super) fn meta(dir: &Path, output: Output) -> Result<(), Failure> {
    let (log, snapshot) = (read(dir, RAFT_LOG_FILE)?, read(dir, RAFT_SNAPSHOT_FILE)?);
    if log.is_some() || snapshot.is_some() {
        let report: MetaReport<GroupLogReport, GroupSnapshotReport> = MetaReport {
            log: log.as_deref().map(inspect_group_log),
            snapshot: snapshot.as_deref().map(inspect_group_snapshot),
        };
        show(output, &report);
        return Ok(());
    }
    // What releases before groups wrote.
    let (log, snapshot) = (read(dir, raft_meta::LOG_FILE)?, read(dir, raft_meta::SNAPSHOT_FILE)?);
    if log.is_none() && snapshot.is_none() {
        return Err(unreadable(&dir.join(RAFT_LOG_FILE), &io::ErrorKind::NotFound.into()));
    }
    let report: MetaReport<LogReport, SnapshotReport> =
        MetaReport { log: log.as_deref().map(inspect_log), snapshot: snapshot.as_deref().map(inspect_snapshot) };
    show(output, &report);
    Ok(())
}

fn read(dir: &Path, name: &str) -> Result<Option<Vec<u8>>, Failure> {
    let path = dir.join(name);
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(&path, &error)),
    }
}

fn show<L: Display + Serialize, S: Display + Serialize>(output: Output, report: &MetaReport<L, S>) {
    print(output, report, || {
        if let Some(snapshot) = &report.snapshot {
            line!("{snapshot}");
        }
        if let Some(log) = &report.log {
            line!("{log}");
        }
    });
}
