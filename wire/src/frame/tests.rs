use super::*;
use crate::payload::PIECE_BYTES;
use proptest::prelude::*;
use std::io::IoSlice;
use xsan_env::{Buf, BufPool};

fn pool() -> BufPool {
    BufPool::new(0, 1 << 20)
}

fn request(id: u64) -> Header {
    Header { service: 1, code: 3, deadline_ms: 10_000, id, ..Header::of(Kind::Request) }
}

/// All bytes that an output would write, in writes of at most `step`.
fn drain(output: &mut Output, step: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while !output.is_empty() {
        let mut slices = [IoSlice::new(&[]); 5];
        let count = output.slices(&mut slices);
        let mut sent = 0;
        for slice in &slices[..count] {
            let part = slice.len().min(step - sent);
            bytes.extend_from_slice(&slice[..part]);
            sent += part;
        }
        assert!(sent > 0, "an output that is not empty has something to send");
        output.advance(sent);
    }
    bytes
}

/// What came of each frame: header, fixed part, payload bytes and its pieces' sizes.
type Taken = (Header, Vec<u8>, Vec<u8>, Vec<usize>);

/// Feeds `bytes` in steps of at most `step`.
fn feed(input: &mut Input, mut bytes: &[u8], step: usize) -> Result<Vec<Taken>, FrameError> {
    let mut taken = Vec::new();
    loop {
        while let Some(frame) = input.next_frame()? {
            let pieces = frame.payload.pieces();
            assert!(pieces.iter().all(|piece| (piece.as_ptr() as usize).is_multiple_of(4096)), "aligned memory");
            let sizes = pieces.iter().map(|piece| piece.len()).collect();
            taken.push((frame.header, frame.meta.to_vec(), pieces.concat_bytes(), sizes));
        }
        if bytes.is_empty() {
            return Ok(taken);
        }
        let room = input.room();
        assert!(!room.is_empty(), "there is always room");
        let count = room.len().min(bytes.len()).min(step);
        room[..count].copy_from_slice(&bytes[..count]);
        bytes = &bytes[count..];
        input.filled(count);
    }
}

trait ConcatBytes {
    fn concat_bytes(&self) -> Vec<u8>;
}

impl ConcatBytes for [Buf] {
    fn concat_bytes(&self) -> Vec<u8> {
        self.iter().map(|piece| &**piece).collect::<Vec<_>>().concat()
    }
}

fn pattern(bytes: usize) -> Buf {
    let period: Vec<u8> = (0..251).collect();
    Buf::copied(&period.repeat(bytes / 251 + 1)[..bytes])
}

proptest! {
    #[test]
    fn frames_arrive_as_they_were_sent_however_the_bytes_are_cut(
        frames in prop::collection::vec((0usize..300, prop_oneof![Just(0usize), 1usize..9000, 9000usize..100_000], any::<bool>()), 1..12),
        write_step in 1usize..70_000,
        read_step in 1usize..70_000,
        exact: bool,
    ) {
        let mut output = Output::default();
        for (id, (meta, payload, split)) in frames.iter().enumerate() {
            let whole = pattern(*payload);
            let payload = if *split && *payload > 1 {
                Payload::Pieces(vec![whole.slice(..payload / 2), whole.slice(payload / 2..)])
            } else {
                whole.into()
            };
            prop_assert!(output.push(&request(id as u64), payload, |out| out.resize(out.len() + meta, id as u8)));
        }
        let bytes = drain(&mut output, write_step);
        let mut input = Input::new(pool(), Bounds::PEERS, exact);
        let taken = feed(&mut input, &bytes, read_step).expect("sound");
        prop_assert!(input.is_between_frames());
        prop_assert_eq!(taken.len(), frames.len());
        for (id, ((header, meta, payload, sizes), (meta_bytes, payload_bytes, _))) in taken.iter().zip(&frames).enumerate() {
            prop_assert_eq!(*header, request(id as u64));
            prop_assert_eq!(meta, &vec![id as u8; *meta_bytes]);
            prop_assert_eq!(payload, &pattern(*payload_bytes).to_vec());
            prop_assert!(sizes.len() <= 1);
        }
    }

    #[test]
    fn any_changed_bit_is_noticed(payload in 0usize..5000, at: prop::sample::Index, bit in 0u8..8) {
        let mut output = Output::default();
        output.push(&request(7), pattern(payload).into(), |out| out.extend_from_slice(b"the fixed part"));
        let mut bytes = drain(&mut output, usize::MAX);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let mut input = Input::new(pool(), Bounds::PEERS, false);
        match feed(&mut input, &bytes, usize::MAX) {
            Err(_) => {}
            // A length that claims more: the rest never comes, and the connection dies of silence.
            Ok(taken) => prop_assert!(taken.is_empty() && !input.is_between_frames()),
        }
    }

    #[test]
    fn arbitrary_bytes_neither_panic_nor_make_memory_grow(bytes in prop::collection::vec(any::<u8>(), 0..4000), sound_start: bool) {
        let mut all = if sound_start { [&MAGIC[..], &[LAYOUT, 4, 1, 0]].concat() } else { Vec::new() };
        all.extend(bytes);
        for bounds in [Bounds::HANDSHAKE, Bounds::PEERS] {
            let mut input = Input::new(pool(), bounds, false);
            let _unused = feed(&mut input, &all, 1000);
            prop_assert!(input.memory() <= 256 << 10);
        }
    }
}

#[test]
fn a_payload_that_may_be_kept_in_pieces_is() {
    let mut output = Output::default();
    let bytes = 2 * PIECE_BYTES + 8192;
    let header = Header { flags: FLAG_PIECES, ..request(1) };
    assert!(output.push(&header, pattern(bytes).into(), |_| {}));
    let sent = drain(&mut output, usize::MAX);
    for (exact, step) in [(false, usize::MAX), (true, 16 << 10), (false, 100_000)] {
        let mut input = Input::new(pool(), Bounds::PEERS, exact);
        let taken = feed(&mut input, &sent, step).expect("sound");
        assert_eq!(taken[0].3, [PIECE_BYTES, PIECE_BYTES, 8192]);
        assert_eq!(taken[0].2, pattern(bytes).to_vec());
    }
}

#[test]
fn a_frame_longer_than_allowed_is_refused_before_memory_is_taken_for_it() {
    let mut output = Output::default();
    assert!(output.push(&Header::of(Kind::Hello), Payload::None, |out| out.resize(out.len() + 5000, 0)));
    let bytes = drain(&mut output, usize::MAX);
    let mut input = Input::new(pool(), Bounds::HANDSHAKE, false);
    let refused = feed(&mut input, &bytes[..HEADER_BYTES], usize::MAX);
    assert_eq!(refused, Err(FrameError::TooLarge { meta: 5000, payload: 0 }));
    let mut claims_much = bytes;
    claims_much[24..28].copy_from_slice(&META_BYTES_MAX.to_le_bytes());
    let mut input = Input::new(pool(), Bounds::PEERS, false);
    assert_eq!(feed(&mut input, &claims_much[..HEADER_BYTES], usize::MAX), Ok(Vec::new()));
    assert!(input.memory() <= 256 << 10, "a claim alone takes no memory");
}

#[test]
fn a_frame_longer_than_allowed_is_not_sent() {
    let mut output = Output::default();
    let too_long = META_BYTES_MAX as usize + 1;
    assert!(!output.push(&request(1), Payload::None, |out| out.resize(out.len() + too_long, 0)));
    assert!(output.is_empty() && output.push(&request(2), Payload::None, |_| {}));
    let bytes = drain(&mut output, usize::MAX);
    let taken = feed(&mut Input::new(pool(), Bounds::PEERS, false), &bytes, usize::MAX).expect("sound");
    assert_eq!(taken.iter().map(|frame| frame.0.id).collect::<Vec<_>>(), [2]);
}

#[test]
fn strangers_are_told_apart_by_their_first_bytes() {
    let says = |bytes: &[u8]| feed(&mut Input::new(pool(), Bounds::HANDSHAKE, false), bytes, usize::MAX);
    assert_eq!(says(b"GET / HTTP/1.1"), Err(FrameError::Magic(*b"GET ")));
    assert_eq!(says(b"G"), Err(FrameError::Magic([b'G', 0, 0, 0])));
    assert_eq!(says(&[0x16, 0x03, 0x01, 0x02]), Err(FrameError::Tls));
    assert_eq!(says(b"XSWF\x02"), Err(FrameError::Layout(2)));
    assert_eq!(says(b"XS"), Ok(Vec::new()));
}

#[test]
fn long_messages_leave_no_memory_behind() {
    let mut output = Output::default();
    for id in 0..40 {
        let bytes = if id == 0 { 3 << 20 } else { 10 };
        assert!(output.push(&request(id), pattern(70_000).into(), |out| out.resize(out.len() + bytes, 1)));
    }
    let bytes = drain(&mut output, usize::MAX);
    let mut input = Input::new(pool(), Bounds::PEERS, false);
    assert_eq!(feed(&mut input, &bytes, 60_000).expect("sound").len(), 40);
    assert!(input.memory() <= 256 << 10, "{}", input.memory());
}
