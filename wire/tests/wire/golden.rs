//! The bytes of version 1, frozen. A release that sends other bytes, or reads these otherwise, cannot talk to its
//! neighbours: make a new wire version instead, with a file of its own, and leave this one as it is.

use crate::support::*;
use std::fmt::Write as _;
use std::io::IoSlice;
use xsan_env::{Buf, BufPool};
use xsan_types::{
    ClosedMember, DeviceId, Epoch, FlushRequest, Generation, Incarnation, MemberState, OpenReplica, RegisterView,
    VolumeId,
};
use xsan_wire::codec::{Reader, WireVersion, Writer};
use xsan_wire::frame::{Bounds, FLAG_PIECES, Header, Input, Kind, Output};
use xsan_wire::handshake::{Hello, Welcome};
use xsan_wire::message::{NodeAnswer, NodeRequest, get_error, operation, put_error};
use xsan_wire::node::{CreateMember, CreatedMember, DeviceStatus, HoldShard, NodeError, PutShard, ShardInfo};
use xsan_wire::payload::Payload;
use xsan_wire::{Class, Refusal};

const FROZEN: &str = include_str!("../golden/v1.txt");

/// A frame with its name and what it must be read as.
struct Golden {
    name: String,
    header: Header,
    meta: Vec<u8>,
    payload: Payload,
    said: String,
}

fn requests() -> Vec<NodeRequest> {
    use NodeRequest as Ask;
    let (device, volume) = (DeviceId(0x0102_0304 << 96), VolumeId(1));
    let data = || Buf::copied(b"bulk");
    vec![
        Ask::Devices,
        Ask::CreateMember(CreateMember { device, volume, set: set(), manifest: vec![sealed(1), sealed(2)] }),
        Ask::Append { member: member(), segment: segment(6), offset: 512, data: data() },
        Ask::Flush(FlushRequest {
            device,
            incarnation: Incarnation(99),
            member: Some(member()),
            replicas: vec![(segment(1), 4096)],
            shards: vec![(shard(2), 8192)],
        }),
        Ask::Confirm(member()),
        Ask::Close { device, volume, generation: Generation(12) },
        Ask::ReadReplica { device, volume, set: set(), segment: segment(1), offset: 4096, length: 512 },
        Ask::Sealed { member: member(), segment: sealed(3) },
        Ask::TrimManifest { member: member(), border: 10, undecided: vec![8, 9] },
        Ask::Registered(RegisterView { volume, generation: Generation(4), set: Some(set()), deleted: true }),
        Ask::PutShard(PutShard { device, shard: shard(1), epoch: Epoch(3), hash: [0xab; 32], data: vec![data()] }),
        Ask::ReadShard { device, shard: shard(1), offset: 8192, length: 4096 },
        Ask::RepairShard { device, shard: shard(1), offset: 8192, data: data() },
        Ask::ShardInfo { device, shard: shard(1) },
        Ask::VerifyShard { device, shard: shard(1) },
        Ask::DeleteSegments(vec![segment(1), segment(2)]),
        Ask::ListShards { device, volume, after: Some(shard(1)), limit: 100 },
        Ask::AppendShard { device, incarnation: Incarnation(99), shard: shard(1), offset: 65_536, data: vec![data()] },
        Ask::FinishShard { device, incarnation: Incarnation(99), shard: shard(1), bytes: 65_540, hash: [0xcd; 32] },
        Ask::HoldShard(HoldShard { device, shard: shard(2), epoch: Epoch(4), hash: [0xce; 32] }),
    ]
}

fn answers() -> Vec<(u16, NodeAnswer)> {
    let device = DeviceStatus {
        device: DeviceId(7),
        incarnation: Incarnation(99),
        capacity: 1 << 40,
        used: 1 << 30,
        sector: 512,
        shards: 4,
        members: 5,
        failed: true,
    };
    let info = ShardInfo { shard: shard(1), bytes: 1 << 20, hash: [0xef; 32], open: true };
    let replica = OpenReplica { segment: segment(6), length: 1 << 20, complete: 4096 };
    let closed =
        ClosedMember { set: set(), state: MemberState::Whole, manifest: vec![sealed(1)], replicas: vec![replica] };
    vec![
        (operation::FLUSH, NodeAnswer::Done),
        (operation::DEVICES, NodeAnswer::Devices(vec![device])),
        (operation::CREATE_MEMBER, NodeAnswer::Created(CreatedMember { incarnation: Incarnation(99), sector: 4096 })),
        (operation::APPEND, NodeAnswer::Length(4608)),
        (operation::CLOSE, NodeAnswer::Closed(vec![closed])),
        (operation::READ_SHARD, NodeAnswer::Bytes(Buf::copied(b"bulk"))),
        (operation::SHARD_INFO, NodeAnswer::Shard(info)),
        (operation::LIST_SHARDS, NodeAnswer::Shards(vec![info, info])),
    ]
}

fn laid_out(put: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut bytes = Vec::new();
    put(&mut Writer::new(&mut bytes, WireVersion::V1));
    bytes
}

fn handshakes() -> Vec<Golden> {
    let plain = |name: &str, kind, put: &dyn Fn(&mut Vec<u8>), said: String| {
        let mut meta = Vec::new();
        put(&mut meta);
        Golden { name: name.into(), header: Header::of(kind), meta, payload: Payload::None, said }
    };
    let hello = Hello {
        versions: (1, 1),
        cluster: CLUSTER,
        node: CLIENT,
        instance: 0x1122_3344,
        target: SERVER,
        class: Class::Bulk,
        link: 0x7788,
    };
    let welcome = Welcome { version: 1, node: SERVER, instance: 0x5566, requests_max: 512, bytes_max: 32 << 20 };
    let refusal = Refusal::Version(1, 1);
    vec![
        plain("hello", Kind::Hello, &|out| hello.put(out), format!("{hello:?}")),
        plain("welcome", Kind::Welcome, &|out| welcome.put(out), format!("{welcome:?}")),
        plain("refusal", Kind::Refusal, &|out| refusal.put(out), format!("{refusal:?}")),
        plain("ping", Kind::Ping, &|_| {}, String::new()),
        plain("pong", Kind::Pong, &|_| {}, String::new()),
        plain("goodbye", Kind::Goodbye, &|_| {}, String::new()),
    ]
}

fn goldens() -> Vec<Golden> {
    let mut all = handshakes();
    for (id, mut request) in (100..).zip(requests()) {
        let said = format!("{request:?}");
        let flags = if request.takes_pieces() { FLAG_PIECES } else { 0 };
        let header = Header {
            service: 1,
            flags,
            code: request.operation(),
            deadline_ms: 10_000,
            id,
            ..Header::of(Kind::Request)
        };
        let payload = request.take_payload();
        let name = format!("request-{}", request.operation());
        all.push(Golden { name, header, meta: laid_out(|out| request.put(out)), payload, said });
    }
    for (operation, mut answer) in answers() {
        let said = format!("{answer:?}");
        let header = Header { service: 1, id: u64::from(operation), ..Header::of(Kind::Answer) };
        let payload = answer.take_payload();
        let name = format!("answer-{operation}");
        all.push(Golden { name, header, meta: laid_out(|out| answer.put(out)), payload, said });
    }
    let errors = [
        NodeError::Unavailable,
        NodeError::Closed,
        NodeError::NotLive { current: Incarnation(7) },
        NodeError::NotFound,
        NodeError::NoSpace,
        NodeError::StaleEpoch { current: Epoch(8) },
        NodeError::Corrupt,
        NodeError::DeviceFailed,
        NodeError::Invalid,
    ];
    for (id, error) in (0..).zip(errors) {
        let header = Header { service: 1, code: 1, id, ..Header::of(Kind::Answer) };
        let meta = laid_out(|out| put_error(&error, out));
        let said = format!("{error:?}");
        all.push(Golden { name: format!("error-{id}"), header, meta, payload: Payload::None, said });
    }
    all
}

fn frame_bytes(golden: &Golden) -> Vec<u8> {
    let mut output = Output::default();
    assert!(output.push(&golden.header, golden.payload.clone(), |out| out.extend_from_slice(&golden.meta)));
    let mut slices = [IoSlice::new(&[]); 4];
    let count = output.slices(&mut slices);
    slices[..count].iter().flat_map(|slice| slice.iter().copied()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes all");
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits.map(|two| u8::from_str_radix(std::str::from_utf8(two).expect("hex"), 16).expect("hex")).collect()
}

/// The frozen lines: name and bytes.
fn frozen() -> Vec<(&'static str, Vec<u8>)> {
    let lines = FROZEN.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.split_once(' ').expect("name and bytes")).map(|(name, bytes)| (name, unhex(bytes))).collect()
}

#[test]
fn version_1_is_written_as_frozen() {
    let written: String =
        goldens().iter().map(|golden| format!("{} {}\n", golden.name, hex(&frame_bytes(golden)))).collect();
    let expected: String = frozen().iter().map(|(name, bytes)| format!("{name} {}\n", hex(bytes))).collect();
    assert_eq!(written, expected, "the bytes of version 1 have changed; what is written now stands on the left");
}

#[test]
fn version_1_is_read_as_frozen() {
    let pool = BufPool::new(0, 0);
    let frozen = frozen();
    assert_eq!(frozen.len(), goldens().len());
    for ((name, bytes), golden) in frozen.iter().zip(goldens()) {
        let mut input = Input::new(pool.clone(), Bounds::PEERS, false);
        input.room()[..bytes.len()].copy_from_slice(bytes);
        input.filled(bytes.len());
        let frame = input.next_frame().expect("sound").expect("all of it");
        assert_eq!(frame.header, golden.header, "{name}");
        let read = Reader::new(frame.meta, WireVersion::V1);
        let said = match (frame.header.kind, frame.header.code) {
            (Kind::Request, code) => {
                format!("{:?}", NodeRequest::get(code, read, frame.payload, &pool).expect("sound").expect("known"))
            }
            (Kind::Answer, 0) => {
                let operation = u16::try_from(frame.header.id).expect("small");
                format!("{:?}", NodeAnswer::get(operation, read, frame.payload, &pool).expect("sound"))
            }
            (Kind::Answer, _) => format!("{:?}", get_error(read).expect("sound")),
            (Kind::Hello, _) => format!("{:?}", Hello::get(frame.meta).expect("sound")),
            (Kind::Welcome, _) => format!("{:?}", Welcome::get(frame.meta).expect("sound")),
            (Kind::Refusal, _) => format!("{:?}", Refusal::get(frame.meta).expect("sound")),
            _ => String::new(),
        };
        assert_eq!(said, golden.said, "{name}");
    }
}
