//! Fuzzes the wire: `fuzz_wire [SECONDS] [SEED]` (default 60 s; CI runs that, `cargo test` a short one).
//!
//! Every round mutates a sound session by a deterministic dice and gives it, cut at random places, first to the decoder
//! alone, then to a server over a stream in memory, then (as a server's answers) to a client. What must hold: no panic, no
//! hang, nothing decoded that encodes to other bytes, no connection left over, and a witness that is still served. On a failure
//! the round's seed is printed; the same seed repeats it.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a program of its own: it makes the runtime and watches the clock"
)]

use std::future::ready;
use std::io::IoSlice;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use xsan_env::runtime::BoxFuture;
use xsan_env::{BufPool, Env, OsRuntime, Stream};
use xsan_types::{ClusterId, DeviceId, Generation, NodeId, PgId, PoolId, SegmentName, ShardId, VolumeId};
use xsan_wire::codec::{Reader, WireVersion, Writer};
use xsan_wire::frame::{Bounds, Header, Input, Kind, Output};
use xsan_wire::handshake::{Hello, Welcome};
use xsan_wire::message::{NodeAnswer, NodeRequest, operation};
use xsan_wire::node::NodeApi;
use xsan_wire::payload::Payload;
use xsan_wire::{
    Class, Connect, Endpoint, Limits, Peer, PeerInfo, RemoteNode, Server, Service, ServiceError, ServiceId, Services,
};

const CLUSTER: ClusterId = ClusterId(3);
const SEGMENT: SegmentName =
    SegmentName { volume: VolumeId(1), generation: Generation(1), number: 1, pg: PgId { pool: PoolId(1), index: 0 } };
const CLIENT: NodeId = NodeId(1);
const SERVER: NodeId = NodeId(2);

/// xorshift.
struct Dice(u64);

impl Dice {
    fn word(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn roll(&mut self, sides: usize) -> usize {
        usize::try_from(self.word() % sides.max(1) as u64).expect("small")
    }
}

/// Answers with what it was asked.
struct Echo;

impl Service for Echo {
    fn request(
        &self,
        _: &PeerInfo,
        _: u16,
        body: &[u8],
        _: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, ServiceError>> {
        Box::pin(ready(Ok(body.to_vec())))
    }

    fn message(&self, _: &PeerInfo, _: u16, _: &[u8]) {}
}

fn push(bytes: &mut Vec<u8>, header: Header, payload: Payload, meta: &[u8]) {
    let mut output = Output::default();
    assert!(output.push(&header, payload, |out| out.extend_from_slice(meta)));
    let mut slices = [IoSlice::new(&[]); 8];
    let count = output.slices(&mut slices);
    slices[..count].iter().for_each(|slice| bytes.extend_from_slice(slice));
}

/// What a client says: a hello, then requests to node, echo and nobody.
fn session(dice: &mut Dice) -> Vec<u8> {
    let mut bytes = Vec::new();
    let class = Class::ALL[dice.roll(3)];
    let hello = Hello {
        versions: (1, 1),
        cluster: CLUSTER,
        node: CLIENT,
        instance: 1,
        target: SERVER,
        class,
        link: dice.word(),
    };
    let mut meta = Vec::new();
    hello.put(&mut meta);
    push(&mut bytes, Header::of(Kind::Hello), Payload::None, &meta);
    for id in 0..dice.roll(12) as u64 {
        let kind = [Kind::Request, Kind::Request, Kind::Request, Kind::OneWay, Kind::Ping][dice.roll(5)];
        let header = Header { service: 1, deadline_ms: 1000, id, ..Header::of(kind) };
        let mut request = request(dice);
        let (code, payload) = (request.operation(), request.take_payload());
        let mut meta = Vec::new();
        request.put(&mut Writer::new(&mut meta, WireVersion::V1));
        match dice.roll(4) {
            0 => push(&mut bytes, Header { service: 2, code, ..header }, Payload::None, &meta),
            1 => push(&mut bytes, Header { service: 9, code, ..header }, payload, &meta),
            _ => push(&mut bytes, Header { code, flags: (dice.roll(2)) as u8, ..header }, payload, &meta),
        }
    }
    bytes
}

fn request(dice: &mut Dice) -> NodeRequest {
    let device = DeviceId(u128::from(dice.word()));
    let shard = ShardId { segment: SEGMENT, index: xsan_types::ShardIndex(1) };
    let data = BufPool::new(0, 0).get_zeroed([0, 512, 4096, 70_000][dice.roll(4)]).freeze();
    match dice.roll(6) {
        0 => NodeRequest::Devices,
        1 => NodeRequest::RepairShard { device, shard, offset: dice.word(), data },
        2 => NodeRequest::AppendShard {
            device,
            incarnation: xsan_types::Incarnation(1),
            shard,
            offset: 0,
            data: vec![data],
        },
        3 => NodeRequest::DeleteSegments(vec![SEGMENT; dice.roll(40)]),
        4 => NodeRequest::ListShards { device, volume: VolumeId(1), after: Some(shard), limit: 3 },
        _ => NodeRequest::ReadShard { device, shard, offset: 0, length: 4096 },
    }
}

/// What a server says: a welcome, then answers to whatever was asked.
fn answers(dice: &mut Dice) -> Vec<u8> {
    let mut bytes = Vec::new();
    let welcome = Welcome { version: 1, node: SERVER, instance: 1, requests_max: 16, bytes_max: 1 << 20 };
    let mut meta = Vec::new();
    welcome.put(&mut meta);
    push(&mut bytes, Header::of(Kind::Welcome), Payload::None, &meta);
    for id in 0..dice.roll(6) as u64 {
        let kind = [Kind::Answer, Kind::Answer, Kind::Pong, Kind::Goodbye][dice.roll(4)];
        let header = Header { service: 1, code: dice.roll(7) as u16, id, ..Header::of(kind) };
        let mut meta = Vec::new();
        NodeAnswer::Length(7).put(&mut Writer::new(&mut meta, WireVersion::V1));
        push(&mut bytes, header, Payload::None, &meta);
    }
    bytes
}

fn mutate(bytes: &mut Vec<u8>, dice: &mut Dice) {
    for _ in 0..dice.roll(5) {
        if bytes.is_empty() {
            bytes.push(0);
        }
        let at = dice.roll(bytes.len());
        match dice.roll(6) {
            0 => bytes[at] ^= 1 << dice.roll(8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][dice.roll(5)],
            2 => bytes.truncate(at.max(1)),
            3 => {
                let piece = bytes[at..(at + dice.roll(128)).min(bytes.len())].to_vec();
                let to = dice.roll(bytes.len());
                bytes.splice(to..to, piece);
            }
            4 => drop(bytes.drain(at..(at + dice.roll(40)).min(bytes.len()))),
            _ => {
                let word = [u64::MAX, 1 << 63, u64::from(u32::MAX), 0, 8 << 20][dice.roll(5)].to_le_bytes();
                for (byte, new) in bytes[at..].iter_mut().zip(&word[..[1, 2, 4, 8][dice.roll(4)]]) {
                    *byte = *new;
                }
            }
        }
    }
}

/// The message decoder without the checksums in front of it, which mutated frames hardly ever pass.
fn decode(mut meta: Vec<u8>, dice: &mut Dice, pool: &BufPool) {
    mutate(&mut meta, dice);
    for operation in 0..=operation::HOLD_SHARD + 1 {
        let read = |bytes| NodeRequest::get(operation, Reader::new(bytes, WireVersion::V1), Payload::None, pool);
        if let Ok(Some(request)) = read(&meta) {
            let mut again = Vec::new();
            request.put(&mut Writer::new(&mut again, WireVersion::V1));
            assert_eq!(again, meta, "{request:?} has two spellings");
        }
        let read = NodeAnswer::get(operation, Reader::new(&meta, WireVersion::V1), Payload::None, pool);
        if let Ok(answer) = read {
            let mut again = Vec::new();
            answer.put(&mut Writer::new(&mut again, WireVersion::V1));
            assert_eq!(again, meta, "{answer:?} has two spellings");
        }
    }
}

/// Frames as they are found in the bytes; what they carry goes to the decoder.
fn find_frames(bytes: &[u8], dice: &mut Dice, pool: &BufPool) {
    let mut input = Input::new(pool.clone(), Bounds::PEERS, dice.roll(2) == 0);
    let mut rest = bytes;
    while !rest.is_empty() {
        let room = input.room();
        let count = room.len().min(rest.len()).min(1 + dice.roll(5000));
        room[..count].copy_from_slice(&rest[..count]);
        rest = &rest[count..];
        input.filled(count);
        loop {
            match input.next_frame() {
                Ok(Some(frame)) => decode(frame.meta.to_vec(), dice, pool),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

/// Sends `bytes` in pieces, then ends, and reads until the other side does.
async fn speak(stream: &Stream, bytes: &[u8], dice: &mut Dice) {
    let send = async {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (part, tail) = rest.split_at(rest.len().min(1 + dice.roll(5000)));
            rest = tail;
            // The other side may have hung up on an earlier part.
            if stream.write_all(part).await.is_err() {
                break;
            }
        }
        stream.finish_writing();
    };
    let receive = async {
        let mut waste = [0; 8192];
        while stream.read(&mut waste).await.is_ok_and(|count| count > 0) {}
    };
    tokio::join!(send, receive);
}

/// A client whose server says `bytes`.
async fn mislead(env: &Env, endpoint: &Endpoint, bytes: Vec<u8>, mut dice: Dice) {
    let ended = Arc::new(Mutex::new(None));
    let (task_env, handle, bytes) = (env.clone(), Arc::clone(&ended), Mutex::new(Some(bytes)));
    let connect: Arc<dyn Connect> = Arc::new(move || -> BoxFuture<'static, std::io::Result<Stream>> {
        let (ours, theirs) = Stream::memory_pair(1 << 16);
        let Some(bytes) = bytes.lock().expect("a lock").take() else {
            return Box::pin(ready(Err(std::io::ErrorKind::ConnectionRefused.into())));
        };
        let mut dice = Dice(bytes.len() as u64 + 1);
        *handle.lock().expect("a lock") =
            Some(task_env.spawn("liar", async move { speak(&theirs, &bytes, &mut dice).await }));
        Box::pin(ready(Ok(ours)))
    });
    let remote = RemoteNode::new(Peer::new(endpoint, SERVER, &connect));
    let calls: Vec<_> = (0..1 + dice.roll(5))
        .map(|_| remote.verify_shard(DeviceId(1), ShardId { segment: SEGMENT, index: xsan_types::ShardIndex(1) }))
        .collect();
    for call in calls {
        // Any answer will do, as long as there is one.
        drop(call.await);
    }
    drop(remote);
    let task = ended.lock().expect("a lock").take();
    if let Some(task) = task {
        task.join().await;
    }
}

fn endpoint(env: &Env, node: NodeId, pool: &BufPool) -> Endpoint {
    // A lie that leaves a call without answer must not cost seconds.
    let bulk_silence_for = Duration::from_millis(20);
    let limits = Limits { requests_max: 4, bytes_max: 100_000, bulk_silence_for, ..Limits::default() };
    Endpoint::new(env, pool.clone(), CLUSTER, node).with_limits(limits)
}

async fn fuzz(limit: Duration, seed: u64) -> u64 {
    let env = OsRuntime::current();
    let pool = BufPool::new(0, 4 << 20);
    let (client, own) = (endpoint(&env, CLIENT, &pool), endpoint(&env, SERVER, &pool));
    // Behind the server: a node without devices, reached through a client of nobody.
    let nobody: Arc<dyn Connect> = Arc::new(|| -> BoxFuture<'static, std::io::Result<Stream>> {
        Box::pin(ready(Err(std::io::ErrorKind::ConnectionRefused.into())))
    });
    let node: Arc<dyn NodeApi> = Arc::new(RemoteNode::new(Peer::new(&own, NodeId(9), &nobody)));
    let server = Server::new(&own, Services::new().with_node(node).with(ServiceId::META, Arc::new(Echo)));
    let accepting = server.clone();
    let connect: Arc<dyn Connect> = Arc::new(move || -> BoxFuture<'static, std::io::Result<Stream>> {
        let (ours, theirs) = Stream::memory_pair(1 << 16);
        accepting.accept(theirs);
        Box::pin(ready(Ok(ours)))
    });
    let witness = Peer::new(&client, SERVER, &connect);
    let end = Instant::now() + limit;
    let mut rounds = 0;
    while Instant::now() < end {
        // Each round by its own seed, so that it can be repeated alone.
        let mut dice = Dice(seed.wrapping_add(rounds).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let context = format!("seed {}", seed.wrapping_add(rounds));
        let mut bytes = session(&mut dice);
        find_frames(&bytes, &mut dice, &pool);
        mutate(&mut bytes, &mut dice);
        find_frames(&bytes, &mut dice, &pool);
        let (ours, theirs) = Stream::memory_pair(1 << dice.roll(18).max(6));
        server.accept(theirs);
        let spoken = env.timeout(Duration::from_secs(20), speak(&ours, &bytes, &mut dice)).await;
        assert!(spoken.is_some(), "{context}: the connection hangs");
        let mut bytes = answers(&mut dice);
        mutate(&mut bytes, &mut dice);
        let misled = env.timeout(Duration::from_secs(20), mislead(&env, &client, bytes, dice)).await;
        assert!(misled.is_some(), "{context}: a client hangs");
        let asked = witness.request(Class::Control, ServiceId::META, 1, b"there?", Duration::from_secs(20));
        assert_eq!(asked.await.as_deref(), Ok(&b"there?"[..]), "{context}: the witness is not served");
        rounds += 1;
    }
    while server.connections() > 1 {
        xsan_env::yield_now().await;
    }
    rounds
}

fn main() {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse().expect("a number"));
    let seconds = args.next().unwrap_or(60);
    let seed = args.next().unwrap_or(1);
    let runtime = xsan_env::os::build_runtime(1).expect("a thread");
    let rounds = runtime.block_on(fuzz(Duration::from_secs(seconds), seed));
    println!("{rounds} sessions from seed {seed}: nothing broke");
}

#[test]
fn a_second_of_fuzzing_breaks_nothing() {
    let runtime = xsan_env::os::build_runtime(1).expect("a thread");
    assert!(runtime.block_on(fuzz(Duration::from_secs(1), 42)) > 0);
}
