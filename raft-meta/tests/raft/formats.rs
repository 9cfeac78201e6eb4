//! Stored bytes and messages stay readable: files of every version, sound and damaged, with what must be read from them; and no
//! bytes whatever make a reader panic or believe.
//!
//! Version 1 is still written by this release, so its files are also compared byte by byte with what is written now. A changed
//! layout needs a new version and new files beside the old ones; `XSAN_GOLDEN=write` makes the files of the newest.
#![allow(clippy::disallowed_methods, reason = "writes its own golden files on demand")]

use proptest::prelude::*;
use raft_meta::raft::format::{
    HardState, LogHeader, RAFT_LOG_HEADER_BYTES, decode_raft_log, decode_raft_snapshot, encode_frames, encode_log,
    encode_raft_snapshot,
};
use raft_meta::raft::inspect::{GroupLogItem, inspect_group_log, inspect_group_snapshot};
use raft_meta::raft::machine::Session;
use raft_meta::raft::message::{Agreement, Body, Kind, MESSAGE_BYTES_MAX, decode, encode};
use raft_meta::raft::{
    Configuration, LogEntry, Machine, Member, Message, MessageError, Origin, Payload, ReplicaId, Role, Step,
};
use raft_meta::{Command, FormatError, MetaState, format};
use std::collections::BTreeMap;
use std::path::PathBuf;
use xsan_types::{ClusterId, NodeId};

const CLUSTER: ClusterId = ClusterId(0xc1c1_0000_0000_0000_0000_0000_0000_0001);
const ONE: ReplicaId = ReplicaId(0x0102_0304_0506_0708);
const TWO: ReplicaId = ReplicaId(0xf2);

fn command(index: u64, term: u64) -> LogEntry {
    let name = format!("n{index}").parse().unwrap();
    let add = Command::AddNode { name, host: "h".parse().unwrap(), rack: None, zone: None };
    let origin = Origin { replica: ONE, start: 3, sequence: index };
    LogEntry { index, term, payload: Payload::Command { origin, envelope: format::encode_command(&add) } }
}

fn entries() -> Vec<LogEntry> {
    let steps = vec![
        Step { replica: TWO, node: NodeId(2), role: Role::Voter },
        Step { replica: ReplicaId(0xf3), node: NodeId(3), role: Role::Learner },
        Step { replica: ReplicaId(0xf4), node: NodeId(4), role: Role::Removed },
    ];
    vec![
        LogEntry { index: 11, term: 4, payload: Payload::Empty },
        command(12, 4),
        LogEntry { index: 13, term: 4, payload: Payload::Change(steps) },
        LogEntry { index: 14, term: 4, payload: Payload::Leave },
        command(15, 4),
    ]
}

/// Three frames; the last one replaces the last two entries.
fn log() -> Vec<u8> {
    let header = LogHeader { cluster: CLUSTER, replica: ONE, start: 3, base_index: 10, base_term: 3 };
    let mut bytes = encode_log(&header, &HardState { term: 4, vote: ONE.0, commit: 10 }, &entries()[..1]);
    bytes.extend(encode_frames(2, &HardState { term: 4, vote: ONE.0, commit: 11 }, &entries()[1..]).concat());
    let newer = [LogEntry { index: 14, term: 5, payload: Payload::Empty }];
    bytes.extend(encode_frames(3, &HardState { term: 5, vote: 0, commit: 13 }, &newer).concat());
    bytes
}

fn machine() -> Machine {
    let mut state = MetaState::new(CLUSTER, false);
    let add = Command::AddNode {
        name: "n1".parse().unwrap(),
        host: "h1".parse().unwrap(),
        rack: Some("r1".parse().unwrap()),
        zone: None,
    };
    state.apply(&add).unwrap();
    let mut machine = Machine::new(state);
    (machine.index, machine.term, machine.digest) = (10, 3, 0xd1_9e57);
    machine.configuration = Configuration {
        voters: vec![ONE, TWO],
        learners: vec![ReplicaId(0xf3)],
        outgoing: vec![ONE, ReplicaId(0xf5)],
        learners_next: vec![ReplicaId(0xf5)],
    };
    machine.members =
        BTreeMap::from([(ONE, Member { node: NodeId(1), since: 1 }), (TWO, Member { node: NodeId(2), since: 7 })]);
    machine.sessions = BTreeMap::from([(TWO, Session { start: 2, sequence: 9 })]);
    machine
}

fn messages() -> Vec<Message> {
    let kinds = [
        Kind::AppendResponse,
        Kind::RequestVote,
        Kind::RequestVoteResponse,
        Kind::Heartbeat,
        Kind::HeartbeatResponse,
        Kind::TimeoutNow,
        Kind::RequestPreVote,
        Kind::RequestPreVoteResponse,
    ];
    let mut bodies: Vec<Agreement> = kinds
        .iter()
        .map(|kind| Agreement {
            term: 5,
            log_term: 4,
            index: 14,
            commit: 13,
            commit_term: 4,
            reject: true,
            reject_hint: 9,
            context: vec![7; 24],
            ..Agreement::new(*kind)
        })
        .collect();
    let append = Agreement { term: 5, log_term: 3, index: 10, commit: 12, ..Agreement::new(Kind::Append) };
    bodies.push(Agreement { entries: entries(), ..append });
    bodies.push(Agreement { entries: vec![command(0, 0)], ..Agreement::new(Kind::Propose) });
    bodies.push(Agreement { context: vec![1; 24], ..Agreement::new(Kind::ReadIndex) });
    bodies.push(Agreement { term: 5, index: 3, context: vec![1; 24], ..Agreement::new(Kind::ReadIndexResponse) });
    let mut bodies: Vec<Body> = bodies.into_iter().map(Body::Agreement).collect();
    bodies.push(Body::Chunk { term: 5, index: 10, total: 300, offset: 100, bytes: vec![0xab; 200] });
    bodies.push(Body::ChunkAck { index: 10, received: 300 });
    bodies.into_iter().map(|body| Message { cluster: CLUSTER, from: ONE, to: TWO, body }).collect()
}

/// All messages, each behind its length.
fn message_file() -> Vec<u8> {
    let framed = |message: &Message| {
        let bytes = encode(message);
        [u32::try_from(bytes.len()).unwrap().to_le_bytes().to_vec(), bytes].concat()
    };
    messages().iter().flat_map(framed).collect()
}

fn golden(file: &str, now: impl FnOnce() -> Vec<u8>) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
    if std::env::var_os("XSAN_GOLDEN").is_some_and(|wish| wish == "write") {
        std::fs::write(&path, now()).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn a_log_of_version_1_is_read_and_still_written_alike() {
    let bytes = golden("raft-log-v1.bin", log);
    let read = decode_raft_log(&bytes).unwrap();
    let mut expected = entries()[..3].to_vec();
    expected.push(LogEntry { index: 14, term: 5, payload: Payload::Empty });
    assert_eq!(read.entries, expected, "an entry replaces what stands at its index and behind it");
    assert_eq!(read.state, HardState { term: 5, vote: 0, commit: 13 });
    assert_eq!((read.frames, read.good_bytes, read.header.replica), (3, bytes.len(), ONE));
    assert!(bytes == log(), "the layout of version 1 has changed: make it version 2");
}

#[test]
fn a_snapshot_of_version_1_is_read_as_one_without_hosts() {
    // Of an older release: never made anew.
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/raft-snapshot-v1.bin");
    assert_eq!(decode_raft_snapshot(&std::fs::read(path).unwrap()).unwrap(), machine());
}

#[test]
fn a_snapshot_of_version_2_is_read_as_one_without_moves() {
    // Of an older release: never made anew.
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/raft-snapshot-v2.bin");
    assert_eq!(decode_raft_snapshot(&std::fs::read(path).unwrap()).unwrap(), machine());
}

#[test]
fn a_snapshot_of_version_3_is_read_as_one_without_addresses() {
    // Of an older release: never made anew.
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/raft-snapshot-v3.bin");
    assert_eq!(decode_raft_snapshot(&std::fs::read(path).unwrap()).unwrap(), machine());
}

#[test]
fn a_snapshot_of_version_4_is_read_and_still_written_alike() {
    let bytes = golden("raft-snapshot-v4.bin", || encode_raft_snapshot(&machine()));
    assert_eq!(decode_raft_snapshot(&bytes).unwrap(), machine());
    assert!(bytes == encode_raft_snapshot(&machine()), "the layout of version 4 has changed: make it version 5");
}

#[test]
fn messages_of_version_1_are_read_and_still_written_alike() {
    let bytes = golden("raft-messages-v1.bin", message_file);
    let (mut rest, mut read) = (&bytes[..], Vec::new());
    while let Some((len, tail)) = rest.split_first_chunk::<4>() {
        let (message, tail) = tail.split_at(usize::try_from(u32::from_le_bytes(*len)).unwrap());
        read.push(decode(message).unwrap());
        rest = tail;
    }
    assert_eq!(read, messages());
    assert!(bytes == message_file(), "the layout of version 1 has changed: make it version 2");
}

#[test]
fn a_torn_log_is_read_up_to_the_tear() {
    let torn = || {
        let mut bytes = log();
        bytes.truncate(bytes.len() - 5);
        bytes
    };
    let bytes = golden("raft-log-v1-torn.bin", torn);
    let read = decode_raft_log(&bytes).unwrap();
    assert_eq!((read.frames, read.entries), (2, entries()));
    assert!(read.good_bytes < bytes.len());
}

#[test]
fn a_log_damaged_in_the_middle_is_refused() {
    let damaged = || {
        let mut bytes = log();
        bytes[RAFT_LOG_HEADER_BYTES + 30] ^= 0x10;
        bytes
    };
    let bytes = golden("raft-log-v1-damaged.bin", damaged);
    let error = decode_raft_log(&bytes).unwrap_err();
    assert!(matches!(error, FormatError::Damaged { file: "raft.log", offset: 64 }), "{error}");
}

#[test]
fn people_are_shown_what_a_log_holds_around_damage() {
    let text = inspect_group_log(&log()).to_string();
    for expected in [
        "log of replica 0102030405060708 of cluster c1c1",
        "start 3, behind entry 10 of term 3",
        "frame 3: term 5, vote 0000000000000000, agreed up to 13",
        "15 term 4 AddNode",
        "the joint time ends",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    let mut damaged = log();
    damaged[RAFT_LOG_HEADER_BYTES + 30] ^= 1;
    let report = inspect_group_log(&damaged);
    assert!(matches!(report.items[0], GroupLogItem::Damage { offset: 64, at_end: false, .. }), "{report}");
    assert!(report.to_string().contains("frame 2") && !report.to_string().contains("frame 1"));
    let snapshot = inspect_group_snapshot(&encode_raft_snapshot(&machine())).to_string();
    assert!(snapshot.contains("entry 10 of term 3") && snapshot.contains("node1 n1 on h1"), "{snapshot}");
    assert!(inspect_group_snapshot(b"nothing").state.fault.is_some());
}

#[test]
fn what_a_newer_release_wrote_is_refused_by_name_and_version() {
    let mut bytes = log();
    bytes[8] = 2;
    assert!(matches!(decode_raft_log(&bytes), Err(FormatError::Version { file: "raft.log", found: 2, newest: 1 })));
    let mut bytes = encode_raft_snapshot(&machine());
    bytes[8] = 5;
    let error = decode_raft_snapshot(&bytes).unwrap_err();
    assert!(matches!(error, FormatError::Version { file: "raft.snapshot", found: 5, newest: 4 }));
    let mut bytes = encode(&messages()[0]);
    bytes[0] = 9;
    assert_eq!(decode(&bytes), Err(MessageError::Version { found: 9 }));
}

#[test]
fn every_changed_bit_of_a_snapshot_or_header_is_noticed() {
    let sound = encode_raft_snapshot(&machine());
    for bit in 0..sound.len() * 8 {
        let mut bytes = sound.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(decode_raft_snapshot(&bytes).is_err(), "bit {bit}");
    }
    let sound = log();
    for bit in 0..RAFT_LOG_HEADER_BYTES * 8 {
        let mut bytes = sound.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(decode_raft_log(&bytes).is_err(), "bit {bit}");
    }
}

#[test]
fn a_log_cut_anywhere_gives_the_frames_before_the_cut() {
    let whole = log();
    for length in RAFT_LOG_HEADER_BYTES..=whole.len() {
        let read = decode_raft_log(&whole[..length]).unwrap();
        assert!(read.good_bytes <= length && read.frames <= 3, "{length}");
    }
    for length in 0..RAFT_LOG_HEADER_BYTES {
        assert!(decode_raft_log(&whole[..length]).is_err(), "{length}");
    }
}

#[test]
fn a_message_that_no_replica_sends_is_refused() {
    let sound = |kind| Agreement { term: 5, ..Agreement::new(kind) };
    let bad = [
        // Term 0 is the library's mark of its own process.
        Agreement::new(Kind::Append),
        Agreement { term: 5, entries: vec![command(0, 0)], ..Agreement::new(Kind::Propose) },
        Agreement::new(Kind::Propose),
        // A change of members cannot be slipped in.
        Agreement {
            entries: vec![LogEntry { index: 0, term: 0, payload: Payload::Leave }],
            ..Agreement::new(Kind::Propose)
        },
        Agreement { index: 10, entries: vec![command(12, 5)], ..sound(Kind::Append) },
        Agreement { index: 11, entries: vec![command(12, 6)], ..sound(Kind::Append) },
        Agreement { index: 11, log_term: 5, entries: vec![command(12, 4)], ..sound(Kind::Append) },
        Agreement { entries: entries(), ..sound(Kind::Heartbeat) },
        Agreement { index: u64::MAX, ..sound(Kind::AppendResponse) },
        Agreement { context: vec![0; 65], ..sound(Kind::Heartbeat) },
        Agreement::new(Kind::ReadIndex),
    ];
    for agreement in bad {
        let body = Body::Agreement(agreement);
        let bytes = encode(&Message { cluster: CLUSTER, from: ONE, to: TWO, body: body.clone() });
        assert_eq!(decode(&bytes), Err(MessageError::Malformed), "{body:?}");
    }
    assert_eq!(decode(&vec![1; MESSAGE_BYTES_MAX + 1]), Err(MessageError::Version { found: 257 }));
}

proptest! {
    #[test]
    fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        decode(&bytes).ok();
        decode_raft_log(&bytes).ok();
        decode_raft_snapshot(&bytes).ok();
    }

    #[test]
    fn a_message_with_any_byte_changed_is_refused_or_written_alike(at in any::<prop::sample::Index>(), with in any::<u8>(), which in any::<prop::sample::Index>()) {
        let all = messages();
        let mut bytes = encode(which.get(&all));
        let at = at.index(bytes.len());
        bytes[at] = with;
        if let Ok(message) = decode(&bytes) {
            prop_assert_eq!(encode(&message), bytes);
        }
    }

    #[test]
    fn a_log_with_any_byte_changed_gives_a_prefix_or_is_refused(at in any::<prop::sample::Index>(), with in any::<u8>()) {
        let mut bytes = log();
        let at = at.index(bytes.len());
        bytes[at] = with;
        if let Ok(read) = decode_raft_log(&bytes) {
            let frames = [0, 1, 2, 3];
            prop_assert!(frames.contains(&read.frames));
            prop_assert!(read.entries.iter().zip(10..).all(|(entry, before)| entry.index == before + 1));
        }
    }
}
