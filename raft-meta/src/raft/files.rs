//! A replica's files: made, opened, written. Everything here is durable when it returns; after an error nothing more is written
//! with the same handle. Bytes: docs/format/meta.md.

use crate::error::FormatError;
use crate::format::{decode_command, decode_log, decode_snapshot};
use crate::raft::core::Stored;
use crate::raft::entry::{LogEntry, ReplicaId};
use crate::raft::format::{
    HardState, LogHeader, RAFT_LOG_FILE, RAFT_SNAPSHOT_FILE, RaftLog, decode_raft_log, decode_raft_snapshot,
    encode_frames, encode_log, encode_raft_snapshot,
};
use crate::raft::machine::{Configuration, Machine, Member};
use crate::single::{LOG_FILE, SNAPSHOT_FILE};
use crate::state::MetaState;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use xsan_env::{AppendFile, Directory};
use xsan_types::{ClusterId, NodeId};

/// The open log.
pub(crate) struct Files {
    directory: Arc<dyn Directory>,
    header: LogHeader,
    log: Box<dyn AppendFile>,
    frames: u64,
}

impl Files {
    /// Where they are.
    pub(crate) fn directory(&self) -> &Arc<dyn Directory> {
        &self.directory
    }

    /// A leader's snapshot, then a log that starts behind it. A crash in between leaves a log that does not reach or fit the
    /// snapshot; opening starts it anew behind it.
    ///
    /// # Errors
    /// As [`Files::replace`].
    pub(crate) async fn install(
        &mut self,
        snapshot: Arc<[u8]>,
        (base_index, base_term): (u64, u64),
        state: &HardState,
        entries: &[LogEntry],
    ) -> io::Result<()> {
        store_snapshot(Arc::clone(&self.directory), snapshot).await?;
        let header = LogHeader { base_index, base_term, ..self.header };
        self.replace(&header, state, entries).await
    }

    /// Appends and flushes.
    ///
    /// # Errors
    /// The file system's. The log on disk ends where it ended, or somewhere in what should have been added.
    pub(crate) async fn append(&mut self, state: &HardState, entries: &[LogEntry]) -> io::Result<()> {
        for frame in encode_frames(self.frames + 1, state, entries) {
            self.log.append(frame).await?;
            self.log.sync().await?;
            self.frames += 1;
        }
        Ok(())
    }

    /// Puts another log in place of this one.
    ///
    /// # Errors
    /// The file system's. Old or new content, both as a whole; which one is not known.
    pub(crate) async fn replace(
        &mut self,
        header: &LogHeader,
        state: &HardState,
        entries: &[LogEntry],
    ) -> io::Result<()> {
        (self.log, self.frames) = replace_log(&self.directory, header, state, entries).await?;
        self.header = *header;
        Ok(())
    }

    /// Bytes of the log.
    pub(crate) fn bytes(&self) -> u64 {
        self.log.bytes()
    }
}

async fn replace_log(
    directory: &Arc<dyn Directory>,
    header: &LogHeader,
    state: &HardState,
    entries: &[LogEntry],
) -> io::Result<(Box<dyn AppendFile>, u64)> {
    directory.replace_atomic(RAFT_LOG_FILE, encode_log(header, state, entries)).await?;
    let frames = encode_frames(1, state, entries).len() as u64;
    Ok((directory.append(RAFT_LOG_FILE).await?, frames))
}

/// The first replica of a new cluster: the only voter.
///
/// # Errors
/// `Exists` when there is metadata of either kind; `Io`.
pub(crate) async fn create_first(
    directory: &Arc<dyn Directory>,
    replica: ReplicaId,
    node: NodeId,
    genesis: MetaState,
) -> Result<(), FormatError> {
    refuse_existing(directory).await?;
    // Index 1 and not 0: a replica that joins knows nothing, not even who votes, and must take a snapshot first.
    write_new(directory, first_machine(replica, node, genesis, 1), replica).await
}

/// A replica of an existing cluster that knows nothing yet.
///
/// # Errors
/// `Exists` when there is metadata of either kind; `Io`.
pub(crate) async fn create_joining(
    directory: &Arc<dyn Directory>,
    replica: ReplicaId,
    cluster: ClusterId,
) -> Result<(), FormatError> {
    refuse_existing(directory).await?;
    write_new(directory, Machine::new(MetaState::new(cluster, false)), replica).await
}

fn first_machine(replica: ReplicaId, node: NodeId, state: MetaState, index: u64) -> Machine {
    let configuration = Configuration { voters: vec![replica], ..Configuration::default() };
    let members = BTreeMap::from([(replica, Member { node, since: index })]);
    Machine { index, term: 1, configuration, members, ..Machine::new(state) }
}

async fn refuse_existing(directory: &Arc<dyn Directory>) -> Result<(), FormatError> {
    for name in [RAFT_SNAPSHOT_FILE, SNAPSHOT_FILE] {
        if directory.read(name).await?.is_some() {
            return Err(FormatError::Exists);
        }
    }
    match directory.read(RAFT_LOG_FILE).await? {
        // A creation that was cut short wrote nothing but the start of a log. More means that a snapshot is lost.
        Some(bytes) if !is_unused(&decode_raft_log(&bytes)?) => {
            Err(FormatError::SnapshotMissing { file: RAFT_SNAPSHOT_FILE })
        }
        _ => Ok(()),
    }
}

fn is_unused(log: &RaftLog) -> bool {
    log.header.start == 0 && log.frames <= 1 && log.entries.is_empty()
}

/// The snapshot comes last: a log without one is a creation that was cut short, and is made anew.
async fn write_new(directory: &Arc<dyn Directory>, machine: Machine, replica: ReplicaId) -> Result<(), FormatError> {
    let (cluster, index, term) = (machine.state.cluster, machine.index, machine.term);
    let header = LogHeader { cluster, replica, start: 0, base_index: index, base_term: term };
    let state = HardState { term, vote: 0, commit: index };
    directory.replace_atomic(RAFT_LOG_FILE, encode_log(&header, &state, &[])).await?;
    directory.replace_atomic(RAFT_SNAPSHOT_FILE, encode_raft_snapshot(&machine)).await?;
    Ok(())
}

/// Opens what is there. The log is written anew on the way: its last frames may lie in the page cache only, left by a process
/// that died before its flush, or whose flush failed; and a start has to be counted before it shows.
///
/// # Errors
/// `Absent` (nothing here: create or join); everything else needs a person, and nothing was changed but the start count.
pub(crate) async fn open(directory: Arc<dyn Directory>) -> Result<(Files, Stored), FormatError> {
    let snapshot = directory.read(RAFT_SNAPSHOT_FILE).await?;
    let log = directory.read(RAFT_LOG_FILE).await?;
    let Some(snapshot) = snapshot else {
        return match log {
            Some(bytes) if !is_unused(&decode_raft_log(&bytes)?) => {
                Err(FormatError::SnapshotMissing { file: RAFT_SNAPSHOT_FILE })
            }
            _ => Err(FormatError::Absent),
        };
    };
    let machine = decode_raft_snapshot(&snapshot)?;
    let log = decode_raft_log(&log.ok_or(FormatError::LogMissing)?)?;
    if log.header.cluster != machine.state.cluster {
        return Err(FormatError::Cluster { log: log.header.cluster, snapshot: machine.state.cluster });
    }
    let (mut header, state, entries) = joined(&machine, log)?;
    header.start += 1;
    let (log, frames) = replace_log(&directory, &header, &state, &entries).await?;
    // Left over from a migration that was cut short.
    remove_single(&directory).await?;
    let base = (header.base_index, header.base_term);
    let stored = Stored { replica: header.replica, start: header.start, machine, base, state, entries };
    Ok((Files { directory, header, log, frames }, stored))
}

/// The log as it continues the snapshot.
fn joined(machine: &Machine, log: RaftLog) -> Result<(LogHeader, HardState, Vec<LogEntry>), FormatError> {
    let RaftLog { mut header, mut state, mut entries, .. } = log;
    if header.base_index > machine.index {
        return Err(FormatError::Gap { found: header.base_index + 1, expected: machine.index + 1 });
    }
    let at = usize::try_from(machine.index - header.base_index).unwrap_or(usize::MAX);
    let term = match at.checked_sub(1) {
        None => Some(header.base_term),
        Some(before) => entries.get(before).map(|entry| entry.term),
    };
    if term != Some(machine.term) {
        // A leader's snapshot was installed, and the process ended before the log was: it goes on behind the snapshot, with
        // nothing. What stood in it is in the snapshot, or was never agreed on.
        (header.base_index, header.base_term) = (machine.index, machine.term);
        entries.clear();
        if state.term < machine.term {
            // It cannot have voted in a term it had not heard of.
            (state.term, state.vote) = (machine.term, 0);
        }
    }
    let last = header.base_index + entries.len() as u64;
    state.commit = state.commit.max(machine.index).min(last);
    Ok((header, state, entries))
}

/// Makes the only voter of what a [`crate::SingleReplica`] left, if there is such a thing and nothing newer. The state, and
/// the number of its last command, go on.
///
/// # Errors
/// Those of opening the old files; they are not touched before the new ones are durable.
pub(crate) async fn migrate_single(
    directory: &Arc<dyn Directory>,
    replica: ReplicaId,
    node: NodeId,
) -> Result<bool, FormatError> {
    if directory.read(RAFT_SNAPSHOT_FILE).await?.is_some() {
        return Ok(false);
    }
    let Some(snapshot) = directory.read(SNAPSHOT_FILE).await? else { return Ok(false) };
    let (mut state, mut index) = decode_snapshot(&snapshot)?;
    let bytes = directory.read(LOG_FILE).await?.ok_or(FormatError::LogMissing)?;
    let log = decode_log(&bytes)?;
    if log.cluster != state.cluster {
        return Err(FormatError::Cluster { log: log.cluster, snapshot: state.cluster });
    }
    for frame in &log.frames {
        if frame.first_index > index + 1 {
            return Err(FormatError::Gap { found: frame.first_index, expected: index + 1 });
        }
        for (number, (offset, envelope)) in (frame.first_index..).zip(&frame.envelopes) {
            if number > index {
                // Refusals are logged too, and are refused again.
                state.apply(&decode_command(envelope, *offset as u64)?).ok();
                index = number;
            }
        }
    }
    write_new(directory, first_machine(replica, node, state, index.max(1)), replica).await?;
    tracing::info!(index, %replica, "the metadata of a single replica goes on as a group of one voter");
    Ok(true)
}

/// The old files must not stay: an older release would open them and go on from there.
async fn remove_single(directory: &Arc<dyn Directory>) -> io::Result<()> {
    for name in [SNAPSHOT_FILE, LOG_FILE] {
        if directory.read(name).await?.is_some() {
            directory.remove(name).await?;
        }
    }
    Ok(())
}

/// Puts a snapshot in place of the old one.
///
/// # Errors
/// The file system's: the old one or the new one is there.
pub(crate) async fn store_snapshot(directory: Arc<dyn Directory>, bytes: Arc<[u8]>) -> io::Result<()> {
    directory.replace_atomic(RAFT_SNAPSHOT_FILE, bytes.to_vec()).await
}
