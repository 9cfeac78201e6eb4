//! Reads the files of a replica for people: tolerant of damage, changes nothing. Behind `xsan debug meta`.

use crate::command::Command;
use crate::error::FormatError;
use crate::format;
use crate::state::MetaState;
use serde::Serialize;
use std::fmt;
use xsan_types::ClusterId;

/// One thing found in a log, in order of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum LogItem {
    /// A command.
    Command {
        /// Its number.
        index: u64,
        /// Where its envelope starts.
        offset: u64,
        /// What it asks.
        command: Command,
    },
    /// A command whose frame is verified but whose envelope this release cannot read.
    Unreadable {
        /// Its number.
        index: u64,
        /// Where its envelope starts.
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
pub struct LogReport {
    /// The cluster, if the header can be read.
    pub cluster: Option<ClusterId>,
    /// What is wrong with the header.
    pub header_fault: Option<String>,
    /// Frames, commands and damage.
    pub items: Vec<LogItem>,
}

/// Decodes as much of a log as can be verified.
#[must_use]
pub fn inspect_log(bytes: &[u8]) -> LogReport {
    let header = format::decode_log_header(bytes);
    let mut items = Vec::new();
    let mut at = format::LOG_HEADER_BYTES.min(bytes.len());
    while at < bytes.len() {
        let frame = format::next_frame(bytes, at);
        let start = frame.as_ref().map_or(bytes.len(), |frame| frame.offset);
        if start > at {
            let (offset, length) = (at as u64, (start - at) as u64);
            items.push(LogItem::Damage { offset, bytes: length, at_end: frame.is_none() });
        }
        let Some(frame) = frame else { break };
        for (index, (offset, envelope)) in (frame.first_index..).zip(&frame.envelopes) {
            let offset = *offset as u64;
            items.push(match format::decode_command(envelope, offset) {
                Ok(command) => LogItem::Command { index, offset, command },
                Err(error) => LogItem::Unreadable { index, offset, reason: error.to_string() },
            });
        }
        at = frame.offset + frame.bytes;
    }
    LogReport {
        cluster: header.as_ref().ok().copied(),
        header_fault: header.err().map(|error| error.to_string()),
        items,
    }
}

/// What a snapshot holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SnapshotReport {
    /// Number of the last command in it.
    pub last_index: Option<u64>,
    /// The state.
    pub state: Option<MetaState>,
    /// Why it cannot be read.
    pub fault: Option<String>,
}

/// Decodes a snapshot. It is one checksummed piece: damaged, nothing of it is shown.
#[must_use]
pub fn inspect_snapshot(bytes: &[u8]) -> SnapshotReport {
    match format::decode_snapshot(bytes) {
        Ok((state, index)) => SnapshotReport { last_index: Some(index), state: Some(state), fault: None },
        Err(error) => SnapshotReport { last_index: None, state: None, fault: Some(fault(&error)) },
    }
}

fn fault(error: &FormatError) -> String {
    error.to_string()
}

impl fmt::Display for LogItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Command { index, offset, command } => write!(f, "{index:>8} @{offset:<8} {command:?}"),
            Self::Unreadable { index, offset, reason } => write!(f, "{index:>8} @{offset:<8} UNREADABLE {reason}"),
            Self::Damage { offset, bytes, at_end: true } => write!(f, "         @{offset:<8} torn tail, {bytes} bytes"),
            Self::Damage { offset, bytes, .. } => write!(f, "         @{offset:<8} DAMAGE, {bytes} bytes"),
        }
    }
}

impl fmt::Display for LogReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.cluster, &self.header_fault) {
            (Some(cluster), _) => writeln!(f, "metadata log of cluster {cluster}")?,
            (None, fault) => writeln!(f, "metadata log: {}", fault.as_deref().unwrap_or("no header"))?,
        }
        self.items.iter().try_for_each(|item| writeln!(f, "{item}"))
    }
}

impl fmt::Display for SnapshotReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(state), Some(index)) = (&self.state, self.last_index) else {
            return writeln!(f, "metadata snapshot: {}", self.fault.as_deref().unwrap_or("unreadable"));
        };
        writeln!(f, "metadata snapshot of cluster {} after command {index}, epoch {}", state.cluster, state.epoch)?;
        for node in state.nodes.values() {
            writeln!(f, "  {} {} on {} {}", node.id, node.name, node.host, node.state)?;
        }
        for device in state.devices.values() {
            let capacity = xsan_types::format_bytes(device.capacity);
            writeln!(f, "  device {} of {} {capacity} {:?}", device.id, device.node, device.state)?;
        }
        for pool in state.pools.values() {
            let groups = pool.table.positions.len();
            let moving = if pool.next.is_some() { ", moving" } else { "" };
            writeln!(
                f,
                "  {} {} {} over {}, {groups} groups{moving}",
                pool.id, pool.name, pool.scheme, pool.failure_domain
            )?;
        }
        for volume in state.volumes.values() {
            let register = volume.register();
            let set = register.set.as_ref().map_or_else(|| "none".to_owned(), |set| set.id.to_string());
            let checkpoint = register.checkpoint.map_or_else(|| "none".to_owned(), |at| at.segment.to_string());
            writeln!(
                f,
                "  {} {} {:?} {} {} version {} set {set} checkpoint {checkpoint} pins {}",
                volume.id,
                volume.name,
                register.state,
                xsan_types::format_bytes(register.size),
                register.generation,
                register.version,
                register.pins.len()
            )?;
        }
        Ok(())
    }
}
