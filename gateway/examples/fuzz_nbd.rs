//! Fuzzes the NBD server: `fuzz_nbd [SECONDS] [SEED]` (default 60 s; CI runs that, `cargo test` a short one).
//!
//! Every round mutates a sound session (handshake and requests, in one of the three styles) by a deterministic dice and
//! gives it to a server over a stream in memory, cut at random places. What must hold: no panic, the connection ends once
//! the bytes do, the budget comes back, the table is empty, and what a witness wrote is still there. On a failure the
//! round's seed is printed; the same seed repeats it.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a program of its own: it makes the runtime and watches the clock"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};
use xsan_env::net::Stream;
use xsan_env::{BufPool, OsRuntime};
use xsan_gateway::client::{Client, Connect, info_data, meta_data};
use xsan_gateway::memory_export::{MemoryExport, MemoryExports};
use xsan_gateway::nbd::proto::{Style, UnverifiedRequest, command, command_flag, option};
use xsan_gateway::{Export, Limits, Peer, Server, Tls, Transport};

const NAME: &str = "vm1";
const SIZE: u64 = 8 << 20;
/// The witness' block lies behind everything the sessions are made to touch; mutated offsets may still hit it.
const WITNESS: &str = "witness";

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

fn push_option(bytes: &mut Vec<u8>, code: u32, data: &[u8]) {
    bytes.extend(b"IHAVEOPT");
    bytes.extend(code.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
    bytes.extend(data);
}

/// A sound session with a random choice of options and requests.
fn session(dice: &mut Dice) -> Vec<u8> {
    let style = [Style::Simple, Style::Structured, Style::Extended][dice.roll(3)];
    let mut bytes = [3u32, 1, 3, 3][dice.roll(4)].to_be_bytes().to_vec();
    for _ in 0..dice.roll(3) {
        match dice.roll(4) {
            0 => push_option(&mut bytes, option::LIST, &[]),
            1 => push_option(&mut bytes, option::INFO, &info_data(NAME, &[1, 2, 3])),
            2 => push_option(&mut bytes, option::STARTTLS, &[]),
            _ => push_option(&mut bytes, 77, &vec![1; dice.roll(300)]),
        }
    }
    match style {
        Style::Simple => {}
        Style::Structured => push_option(&mut bytes, option::STRUCTURED_REPLY, &[]),
        Style::Extended => push_option(&mut bytes, option::EXTENDED_HEADERS, &[]),
    }
    if style.chunked() {
        push_option(&mut bytes, option::LIST_META_CONTEXT, &meta_data(NAME, &["base:"]));
        push_option(&mut bytes, option::SET_META_CONTEXT, &meta_data(NAME, &["base:allocation", "x:y"]));
    }
    if dice.roll(8) == 0 && style != Style::Extended {
        push_option(&mut bytes, option::EXPORT_NAME, NAME.as_bytes());
    } else {
        push_option(&mut bytes, option::GO, &info_data(NAME, &[3]));
    }
    for _ in 0..dice.roll(24) {
        push_request(&mut bytes, style, dice);
    }
    bytes
}

fn push_request(bytes: &mut Vec<u8>, style: Style, dice: &mut Dice) {
    let command = u16::try_from(dice.roll(8)).expect("small");
    let length = [0, 512, 4096, 65536, 100_000 / 512 * 512][dice.roll(5)];
    let offset = dice.word() % SIZE / 512 * 512;
    let mut flags = if dice.roll(3) == 0 { 1 << dice.roll(6) } else { 0 };
    if style == Style::Extended && command == command::WRITE {
        flags |= command_flag::PAYLOAD_LEN;
    }
    let length = if command == command::FLUSH { 0 } else { length };
    let offset = if command == command::FLUSH { 0 } else { offset };
    let request = UnverifiedRequest { flags, command, cookie: dice.word(), offset, length };
    bytes.extend(request.encode(style));
    bytes.resize(bytes.len() + usize::try_from(request.payload_bytes(style)).expect("small"), 0x77);
}

fn mutate(bytes: &mut Vec<u8>, dice: &mut Dice) {
    for _ in 0..dice.roll(6) {
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
                let word = [u64::MAX, 1 << 63, u64::from(u32::MAX), 0, SIZE][dice.roll(5)].to_be_bytes();
                for (byte, new) in bytes[at..].iter_mut().zip(&word[..[1, 2, 4, 8][dice.roll(4)]]) {
                    *byte = *new;
                }
            }
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
}

async fn give(server: &Server, bytes: &[u8], dice: &mut Dice, env: &xsan_env::Env) {
    let (ours, theirs) = Stream::memory_pair(1 << dice.roll(18).max(6));
    let serving = server.clone();
    let task = env.spawn("fuzzed connection", async move {
        let peer = Peer { transport: Transport::Unix, address: "fuzz".into() };
        serving.serve(theirs, peer, &Tls::off()).await;
    });
    let send = async {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (part, tail) = rest.split_at(rest.len().min(1 + dice.roll(5000)));
            rest = tail;
            // The server may have closed on an earlier part.
            if ours.write_all(part).await.is_err() {
                break;
            }
        }
        ours.finish_writing();
    };
    let receive = async {
        let mut waste = [0; 8192];
        while ours.read(&mut waste).await.is_ok_and(|count| count > 0) {}
    };
    tokio::join!(send, receive);
    task.join().await;
}

async fn fuzz(limit: Duration, seed: u64) -> u64 {
    let env = OsRuntime::current();
    let pool = BufPool::new(0, 4 << 20);
    let export = |name: &str| Arc::new(MemoryExport::new(name, SIZE, true, pool.clone())) as Arc<dyn Export>;
    let exports = MemoryExports::new([export(NAME), export(WITNESS)]);
    let limits = Limits { gateway_bytes_max: 2 << 20, requests_max: 16, ..Limits::default() };
    let server = Server::new(env.clone(), pool.clone(), Arc::new(exports), limits);
    let (ours, theirs) = Stream::memory_pair(1 << 16);
    let serving = server.clone();
    drop(env.spawn("witness", async move {
        let peer = Peer { transport: Transport::Unix, address: "witness".into() };
        serving.serve(theirs, peer, &Tls::off()).await;
    }));
    let mut witness = Client::connect(ours, &Connect::to(WITNESS)).await.expect("a sound client is served");
    witness.write(0, &[0x5a; 4096], 0).await.expect("written");
    let end = Instant::now() + limit;
    let mut rounds = 0;
    while Instant::now() < end {
        // Each round by its own seed, so that it can be repeated alone.
        let round = seed.wrapping_add(rounds).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut dice = Dice(round);
        let mut bytes = session(&mut dice);
        mutate(&mut bytes, &mut dice);
        let context = format!("seed {}", seed.wrapping_add(rounds));
        let done = env.timeout(Duration::from_secs(20), give(&server, &bytes, &mut dice, &env)).await;
        assert!(done.is_some(), "{context}: the connection hangs");
        assert_eq!(server.connections(), 1, "{context}: a connection is left over");
        assert_eq!(server.bytes_under_way(), 0, "{context}: bytes are left charged");
        rounds += 1;
        if rounds % 256 == 0 {
            let read = witness.read(0, 4096).await.expect("the witness is still served");
            assert!(read == [0x5a; 4096], "{context}: another export changed");
        }
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
