//! Reads the files of a group's replica for people: tolerant of damage, changes nothing.

use crate::format::decode_command;
use crate::inspect::SnapshotReport;
use crate::raft::entry::{LogEntry, Payload};
use crate::raft::format::{
    RAFT_LOG_HEADER_BYTES, RaftFrame, decode_raft_log_header, decode_raft_snapshot, next_frame_at, raft_frame_at,
};
use serde::Serialize;
use std::fmt;

/// One thing found in a log, in order of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum GroupLogItem {
    /// What one write made durable; its entries follow.
    Frame {
        /// Where it starts.
        offset: u64,
        /// Its number.
        number: u64,
        /// The newest term known with it.
        term: u64,
        /// Who got the vote in that term; 0: nobody.
        vote: u64,
        /// Agreed on up to here.
        commit: u64,
    },
    /// An entry; it replaces an earlier one of its index and what stands behind that.
    Entry {
        /// Its index.
        index: u64,
        /// Its term.
        term: u64,
        /// What it says.
        says: String,
    },
    /// A frame whose checksum holds and whose content this release cannot read.
    Unreadable {
        /// Where it starts.
        offset: u64,
        /// Why.
        reason: String,
    },
    /// Bytes that are no verified frame. At the end of the file: a torn tail, which is harmless.
    Damage {
        /// Where they start.
        offset: u64,
        /// How many.
        bytes: u64,
        /// Nothing verified follows.
        at_end: bool,
    },
}

/// What a log holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GroupLogReport {
    /// Whose it is: cluster, replica, start, base; or what is wrong with the header.
    pub header: String,
    /// Frames, entries and damage.
    pub items: Vec<GroupLogItem>,
}

/// Decodes as much of a log as can be verified.
#[must_use]
pub fn inspect_group_log(bytes: &[u8]) -> GroupLogReport {
    let header = match decode_raft_log_header(bytes) {
        Ok(header) => format!(
            "log of replica {} of cluster {}, start {}, behind entry {} of term {}",
            header.replica, header.cluster, header.start, header.base_index, header.base_term
        ),
        Err(error) => error.to_string(),
    };
    let mut items = Vec::new();
    let mut at = RAFT_LOG_HEADER_BYTES.min(bytes.len());
    while at < bytes.len() {
        let next = next_frame_at(bytes, at);
        let start = next.unwrap_or(bytes.len());
        if start > at {
            let (offset, length) = (at as u64, (start - at) as u64);
            items.push(GroupLogItem::Damage { offset, bytes: length, at_end: next.is_none() });
        }
        at = match raft_frame_at(bytes, start) {
            Ok(Some(frame)) => {
                let end = start + frame.bytes;
                push_frame(&mut items, frame);
                end
            }
            Ok(None) => break,
            Err(error) => {
                items.push(GroupLogItem::Unreadable { offset: start as u64, reason: error.to_string() });
                // Its length is as good as its content: look for the next marker.
                start + 4
            }
        };
    }
    GroupLogReport { header, items }
}

fn push_frame(items: &mut Vec<GroupLogItem>, frame: RaftFrame) {
    let RaftFrame { offset, number, state, entries, .. } = frame;
    let (term, vote, commit) = (state.term, state.vote, state.commit);
    items.push(GroupLogItem::Frame { offset: offset as u64, number, term, vote, commit });
    items.extend(entries.into_iter().map(|entry| {
        let says = says(&entry);
        GroupLogItem::Entry { index: entry.index, term: entry.term, says }
    }));
}

fn says(entry: &LogEntry) -> String {
    match &entry.payload {
        Payload::Empty => "nothing".to_owned(),
        Payload::Leave => "the joint time ends".to_owned(),
        Payload::Change(steps) => format!("members: {steps:?}"),
        Payload::Command { origin, envelope } => {
            let by = format!("{} start {} number {}", origin.replica, origin.start, origin.sequence);
            match decode_command(envelope, entry.index) {
                Ok(command) => format!("{command:?} by {by}"),
                Err(error) => format!("UNREADABLE command by {by}: {error}"),
            }
        }
    }
}

/// What a snapshot holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GroupSnapshotReport {
    /// Index, term, voters, learners and members, in words; nothing if it cannot be read.
    pub members: String,
    /// The state.
    #[serde(flatten)]
    pub state: SnapshotReport,
}

/// Decodes a snapshot. It is one checksummed piece: damaged, nothing of it is shown.
#[must_use]
pub fn inspect_group_snapshot(bytes: &[u8]) -> GroupSnapshotReport {
    match decode_raft_snapshot(bytes) {
        Ok(machine) => {
            let nodes: Vec<String> =
                machine.members.iter().map(|(replica, member)| format!("{replica} on {}", member.node)).collect();
            let members = format!(
                "entry {} of term {}, digest {:016x}; {:?}; members: {}",
                machine.index,
                machine.term,
                machine.digest,
                machine.configuration,
                nodes.join(", ")
            );
            let state = Some(machine.state.as_ref().clone());
            GroupSnapshotReport {
                members,
                state: SnapshotReport { last_index: Some(machine.index), state, fault: None },
            }
        }
        Err(error) => {
            let fault = Some(error.to_string());
            let state = SnapshotReport { last_index: None, state: None, fault };
            GroupSnapshotReport { members: String::new(), state }
        }
    }
}

impl fmt::Display for GroupLogItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frame { offset, number, term, vote, commit } => {
                write!(f, "@{offset:<8} frame {number}: term {term}, vote {vote:016x}, agreed up to {commit}")
            }
            Self::Entry { index, term, says } => write!(f, "{index:>8} term {term} {says}"),
            Self::Unreadable { offset, reason } => write!(f, "@{offset:<8} UNREADABLE {reason}"),
            Self::Damage { offset, bytes, at_end: true } => write!(f, "@{offset:<8} torn tail, {bytes} bytes"),
            Self::Damage { offset, bytes, .. } => write!(f, "@{offset:<8} DAMAGE, {bytes} bytes"),
        }
    }
}

impl fmt::Display for GroupLogReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.header)?;
        self.items.iter().try_for_each(|item| writeln!(f, "{item}"))
    }
}

impl fmt::Display for GroupSnapshotReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.members)?;
        write!(f, "{}", self.state)
    }
}
