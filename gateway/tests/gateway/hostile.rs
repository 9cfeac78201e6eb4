//! Bytes from clients that mean harm or are broken: nothing but their own connection may suffer.

use crate::support::{NAME, STYLES, World};
use proptest::prelude::*;
use xsan_gateway::client::{Request, info_data, meta_data};
use xsan_gateway::nbd::handshake::{Handshake, Step, TlsMode};
use xsan_gateway::nbd::proto::{Style, UnverifiedRequest, option};
use xsan_gateway::nbd::request::{Command, Input, PayloadPlan, Rules, payload_plan, validate};

fn rules(style: Style, size: u64) -> Rules {
    Rules {
        style,
        size,
        block_min: 512,
        block_preferred: 4096,
        payload_max: 32 << 20,
        read_only: false,
        status: style.chunked(),
    }
}

fn any_style() -> impl Strategy<Value = Style> {
    prop_oneof![Just(Style::Simple), Just(Style::Structured), Just(Style::Extended)]
}

fn any_number() -> impl Strategy<Value = u64> {
    let edges =
        [0, 1, 511, 512, 4096, 32 << 20, (32 << 20) + 1, u64::from(u32::MAX), 1 << 40, u64::MAX - 511, u64::MAX];
    prop_oneof![any::<u64>(), prop::sample::select(edges.to_vec()), 0u64..1 << 21]
}

prop_compose! {
    fn any_request()(
        flags in prop_oneof![0u16..64, any::<u16>()],
        command in prop_oneof![0u16..10, any::<u16>()],
        cookie: u64,
        offset in any_number(),
        length in any_number(),
    ) -> UnverifiedRequest {
        UnverifiedRequest { flags, command, cookie, offset, length }
    }
}

proptest! {
    #[test]
    fn an_accepted_request_lies_inside_the_export_and_is_aligned(
        request in any_request(), style in any_style(), read_only: bool, size in 0u64..1 << 42,
    ) {
        let rules = Rules { read_only, ..rules(style, size / 512 * 512) };
        let Ok(command) = validate(&request, &rules) else { return Ok(()) };
        let (offset, length) = match command {
            Command::Read { offset, length, .. } | Command::Write { offset, length, .. } => {
                prop_assert!(length <= rules.payload_max);
                (offset, u64::from(length))
            }
            Command::Trim { offset, length, .. }
            | Command::Cache { offset, length }
            | Command::Zero { offset, length, .. }
            | Command::Status { offset, length, .. } => {
                prop_assert!(length > 0);
                (offset, length)
            }
            Command::Flush | Command::StatusChoice { .. } | Command::Nothing | Command::Disconnect => return Ok(()),
        };
        prop_assert!(offset.checked_add(length).is_some_and(|end| end <= rules.size));
        prop_assert!(offset % 512 == 0 && length % 512 == 0);
        let changes = matches!(command, Command::Write { .. } | Command::Trim { .. } | Command::Zero { .. });
        prop_assert!(!(changes && read_only));
        match payload_plan(&request, true, &rules) {
            PayloadPlan::Keep(bytes) => {
                let write = matches!(command, Command::Write { .. });
                prop_assert_eq!(u64::from(bytes), if write { length } else { 0 });
            }
            other => prop_assert!(false, "accepted requests keep their payload: {:?}", other),
        }
    }

    #[test]
    fn a_stream_of_requests_is_found_however_it_is_cut(
        style in any_style(),
        writes in prop::collection::vec((0usize..90_000, any::<bool>()), 1..12),
        cuts in prop::collection::vec(1usize..70_000, 1..20),
    ) {
        let rules = rules(style, 1 << 30);
        let mut stream = Vec::new();
        let mut expected = Vec::new();
        for (i, (bytes, swallow)) in writes.iter().enumerate() {
            let bytes = bytes / 512 * 512;
            let flags = if style == Style::Extended { 32 } else { 0 };
            // To be swallowed: beyond the end.
            let offset = if *swallow { 1 << 30 } else { 0 };
            let cookie = i as u64;
            let request = UnverifiedRequest { flags, command: 1, cookie, offset, length: bytes as u64 };
            stream.extend(request.encode(style));
            let payload = crate::support::pattern(u8::try_from(i).expect("few"), bytes);
            stream.extend(&payload);
            expected.push((cookie, (!swallow || bytes == 0).then_some(payload)));
        }
        let mut input = Input::new(style, crate::support::pool());
        let mut found = Vec::new();
        let mut waiting: Option<(u64, u32)> = None;
        let (mut rest, mut cuts) = (&stream[..], cuts.iter().cycle());
        loop {
            loop {
                if input.wasting() {
                    break;
                }
                if let Some((cookie, bytes)) = waiting {
                    let Some(payload) = input.payload(bytes) else { break };
                    found.push((cookie, Some(payload.to_vec())));
                    waiting = None;
                    continue;
                }
                let Some(request) = input.header().expect("sound") else { break };
                let plan = payload_plan(&request, validate(&request, &rules).is_ok(), &rules);
                if !input.begin(plan) {
                    break;
                }
                match plan {
                    PayloadPlan::Keep(bytes) => waiting = Some((request.cookie, bytes)),
                    PayloadPlan::Swallow(_) => found.push((request.cookie, None)),
                    PayloadPlan::Close => prop_assert!(false),
                }
            }
            if rest.is_empty() {
                break;
            }
            let room = input.room();
            prop_assert!(!room.is_empty());
            let count = room.len().min(rest.len()).min(*cuts.next().expect("endless"));
            room[..count].copy_from_slice(&rest[..count]);
            input.filled(count);
            rest = &rest[count..];
        }
        // A write of nothing beyond the end is refused too: it has no payload either way.
        for (got, want) in found.iter().zip(&expected) {
            prop_assert_eq!(got.0, want.0);
            let payload = |kept: &Option<Vec<u8>>| kept.clone().unwrap_or_default();
            prop_assert!(payload(&got.1) == payload(&want.1));
        }
        prop_assert_eq!(found.len(), expected.len());
        prop_assert!(input.is_between());
    }

    #[test]
    fn any_option_gets_a_well_formed_step(
        code in prop_oneof![0u32..16, any::<u32>()],
        data in prop::collection::vec(any::<u8>(), 0..200),
        structured: bool, extended: bool, fixed: bool,
    ) {
        let mut state = Handshake::new(TlsMode::Off);
        prop_assert!(state.client_flags(u32::from(fixed)));
        if structured {
            state.option(option::STRUCTURED_REPLY, &[]);
        }
        if extended {
            state.option(option::EXTENDED_HEADERS, &[]);
        }
        if let Step::Reply(bytes) | Step::Goodbye(bytes) = state.option(code, &data) {
            prop_assert!(bytes.len() >= 20);
            prop_assert_eq!(&bytes[8..12], &code.to_be_bytes());
            let length = u32::from_be_bytes(bytes[16..20].try_into().expect("four bytes"));
            prop_assert_eq!(length as usize, bytes.len() - 20);
        }
    }
}

/// xorshift: enough to mutate, and the same every time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % sides as u64).expect("small")
    }
}

/// A whole sound session in bytes, from client flags to disconnect.
fn session(style: Style) -> Vec<u8> {
    let mut bytes = 3u32.to_be_bytes().to_vec();
    let mut option = |code: u32, data: &[u8]| {
        bytes.extend(b"IHAVEOPT");
        bytes.extend(code.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
        bytes.extend(data);
    };
    option(option::LIST, &[]);
    match style {
        Style::Simple => {}
        Style::Structured => option(option::STRUCTURED_REPLY, &[]),
        Style::Extended => option(option::EXTENDED_HEADERS, &[]),
    }
    if style.chunked() {
        option(option::SET_META_CONTEXT, &meta_data(NAME, &["base:allocation"]));
    }
    option(option::GO, &info_data(NAME, &[1, 3]));
    for (command, length) in [(1, 1024u64), (0, 4096), (6, 8192), (3, 0), (4, 4096), (7, 65536), (5, 512), (2, 0)] {
        let flags = if command == 1 && style == Style::Extended { 32 } else { 0 };
        bytes.extend(UnverifiedRequest { flags, command, cookie: length, offset: 0, length }.encode(style));
        if command == 1 {
            bytes.extend([7; 1024]);
        }
    }
    bytes
}

#[tokio::test]
async fn mutated_sessions_harm_nobody_else() {
    let world = World::new();
    let mut witness = world.connect(Style::Extended).await;
    witness.write(8 << 20, &[0x5a; 4096], 0).await.expect("written");
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for round in 0..600 {
        let mut bytes = session(STYLES[round % 3]);
        for _ in 0..=dice.roll(4) {
            let at = dice.roll(bytes.len());
            match dice.roll(4) {
                0 => bytes[at] ^= 1 << dice.roll(8),
                1 => bytes[at] = [0, 0xff, 0x7f, 0x80][dice.roll(4)],
                2 => bytes.truncate(at.max(1)),
                _ => {
                    let piece = bytes[at..(at + dice.roll(64)).min(bytes.len())].to_vec();
                    let to = dice.roll(bytes.len());
                    bytes.splice(to..to, piece);
                }
            }
        }
        let stream = world.dial();
        let drain = async {
            // The server may close in the middle: then the rest cannot be sent.
            let _: std::io::Result<()> = stream.write_all(&bytes).await;
            stream.finish_writing();
        };
        tokio::join!(drain, crate::support::is_closed(&stream));
        if round % 50 == 0 {
            let reply = witness.call(Request { offset: 8 << 20, length: 4096, ..Request::default() }).await;
            assert!(reply.is_ok_and(|reply| reply.error.is_none()), "round {round}");
        }
    }
    while world.server.connections() > 1 {
        xsan_env::yield_now().await;
    }
    assert_eq!(world.server.bytes_under_way(), 0);
}
