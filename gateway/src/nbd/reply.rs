//! From results to bytes: replies of the three styles and the queue of what is still to be sent.
//!
//! Owner: the connection's task. [`Output`] keeps headers inline and payloads as references: nothing that was read is
//! copied. Its length is bounded by what the connection admits (see [`crate::admission`]).

use super::proto::{
    CONTEXT_ALLOCATION_ID, EXTENDED_REPLY_MAGIC, EXTENTS_MAX, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, Style, chunk,
    state,
};
use super::request::Refusal;
use crate::export::{ReadPiece, StatusExtent};
use std::collections::VecDeque;
use std::io::IoSlice;
use xsan_env::Buf;

/// Bytes of headers that share one part: four simple replies, or a chunk's header and what comes before its data.
const INLINE: usize = 64;
/// Slices handed to one vectored write.
pub const SLICES_MAX: usize = 64;
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

enum Part {
    Inline { bytes: [u8; INLINE], len: u8 },
    Owned(Vec<u8>),
    Data(Buf),
    Zeroes(usize),
}

impl Part {
    fn len(&self) -> usize {
        match self {
            Part::Inline { len, .. } => usize::from(*len),
            Part::Owned(bytes) => bytes.len(),
            Part::Data(data) => data.len(),
            Part::Zeroes(count) => *count,
        }
    }
}

/// Bytes on their way to the client, in order.
#[derive(Default)]
pub struct Output {
    parts: VecDeque<Part>,
    /// Sent bytes of the front part.
    sent: usize,
    bytes: usize,
}

impl Output {
    /// Bytes queued and not yet sent.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether everything was sent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Queues a few bytes (at most [`INLINE`]), together with those before them where they fit.
    fn inline(&mut self, head: &[u8]) {
        debug_assert!(head.len() <= INLINE);
        self.bytes += head.len();
        if let Some(Part::Inline { bytes, len }) = self.parts.back_mut() {
            let used = usize::from(*len);
            if let Some(room) = bytes.get_mut(used..used + head.len()) {
                room.copy_from_slice(head);
                *len += u8::try_from(head.len()).unwrap_or(0);
                return;
            }
        }
        let mut bytes = [0; INLINE];
        bytes[..head.len()].copy_from_slice(head);
        self.parts.push_back(Part::Inline { bytes, len: u8::try_from(head.len()).unwrap_or(0) });
    }

    fn push(&mut self, part: Part) {
        if part.len() > 0 {
            self.bytes += part.len();
            self.parts.push_back(part);
        }
    }

    /// Queues ready-made bytes.
    pub fn owned(&mut self, bytes: Vec<u8>) {
        self.push(Part::Owned(bytes));
    }

    /// The front of the queue as slices for one vectored write; returns how many of `slices` were filled.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES_MAX]) -> usize {
        let mut skip = self.sent;
        let mut count = 0;
        for part in &self.parts {
            let mut bytes: &'a [u8] = match part {
                Part::Inline { bytes, len } => &bytes[..usize::from(*len)],
                Part::Owned(bytes) => bytes,
                Part::Data(data) => data,
                Part::Zeroes(total) => {
                    let mut rest = total - skip;
                    while rest > ZEROES.len() && count < SLICES_MAX {
                        slices[count] = IoSlice::new(&ZEROES);
                        count += 1;
                        rest -= ZEROES.len();
                    }
                    skip = 0;
                    &ZEROES[..rest.min(ZEROES.len())]
                }
            };
            bytes = &bytes[skip..];
            skip = 0;
            if count == SLICES_MAX {
                break;
            }
            slices[count] = IoSlice::new(bytes);
            count += 1;
        }
        count
    }

    /// `count` bytes of the front were sent.
    pub fn advance(&mut self, count: usize) {
        self.bytes -= count;
        self.sent += count;
        while let Some(front) = self.parts.front() {
            if self.sent < front.len() {
                break;
            }
            self.sent -= front.len();
            self.parts.pop_front();
        }
    }

    /// All queued bytes; for tests.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut copy = Vec::with_capacity(self.bytes);
        for part in &self.parts {
            match part {
                Part::Inline { bytes, len } => copy.extend_from_slice(&bytes[..usize::from(*len)]),
                Part::Owned(bytes) => copy.extend_from_slice(bytes),
                Part::Data(data) => copy.extend_from_slice(data),
                Part::Zeroes(count) => copy.resize(copy.len() + count, 0),
            }
        }
        copy.drain(..self.sent);
        copy
    }
}

/// What a reply must repeat of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo {
    /// The client's name for the request.
    pub cookie: u64,
    /// Offset of the request (extended replies repeat it).
    pub offset: u64,
}

/// A small header under construction.
struct Head {
    bytes: [u8; INLINE],
    len: usize,
}

impl Head {
    fn new() -> Self {
        Self { bytes: [0; INLINE], len: 0 }
    }

    fn put<const N: usize>(mut self, value: [u8; N]) -> Self {
        self.bytes[self.len..self.len + N].copy_from_slice(&value);
        self.len += N;
        self
    }

    fn u16(self, value: u16) -> Self {
        self.put(value.to_be_bytes())
    }

    fn u32(self, value: u32) -> Self {
        self.put(value.to_be_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.put(value.to_be_bytes())
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

fn simple(error: u32, cookie: u64) -> Head {
    Head::new().u32(SIMPLE_REPLY_MAGIC).u32(error).u64(cookie)
}

/// Head of a chunk; `payload`: bytes that follow it.
fn chunk_head(style: Style, echo: Echo, last: bool, kind: u16, payload: usize) -> Head {
    let flags = if last { chunk::FLAG_DONE } else { 0 };
    match style {
        Style::Extended => Head::new()
            .u32(EXTENDED_REPLY_MAGIC)
            .u16(flags)
            .u16(kind)
            .u64(echo.cookie)
            .u64(echo.offset)
            .u64(payload as u64),
        Style::Structured | Style::Simple => Head::new()
            .u32(STRUCTURED_REPLY_MAGIC)
            .u16(flags)
            .u16(kind)
            .u64(echo.cookie)
            .u32(u32::try_from(payload).unwrap_or(u32::MAX)),
    }
}

/// Success without content.
pub fn done(output: &mut Output, style: Style, echo: Echo) {
    let head = match style {
        // Shorter than an empty chunk, and allowed for everything but reads.
        Style::Simple | Style::Structured => simple(0, echo.cookie),
        Style::Extended => chunk_head(style, echo, true, chunk::NONE, 0),
    };
    output.inline(head.as_slice());
}

/// An error; with chunks it carries the reason in words.
pub fn error(output: &mut Output, style: Style, echo: Echo, refusal: Refusal) {
    let errno = refusal.errno as u32;
    if style == Style::Simple {
        output.inline(simple(errno, echo.cookie).as_slice());
        return;
    }
    let reason = refusal.reason.as_bytes();
    let length = u16::try_from(reason.len()).unwrap_or(0);
    let head = chunk_head(style, echo, true, chunk::ERROR, 6 + usize::from(length)).u32(errno).u16(length);
    output.inline(head.as_slice());
    output.owned(reason[..usize::from(length)].to_vec());
}

/// A read's content. `fragment`: holes may be told instead of sent, and data may come in several chunks.
///
/// The pieces must add up to `length`: checked by the caller with [`pieces_fit`].
pub fn read(output: &mut Output, style: Style, echo: Echo, length: u32, fragment: bool, pieces: Vec<ReadPiece>) {
    match style {
        Style::Simple => {
            output.inline(simple(0, echo.cookie).as_slice());
            content(output, pieces);
        }
        _ if length == 0 => output.inline(chunk_head(style, echo, true, chunk::NONE, 0).as_slice()),
        _ => read_chunks(output, style, echo, length, fragment, pieces),
    }
}

fn content(output: &mut Output, pieces: impl IntoIterator<Item = ReadPiece>) {
    for piece in pieces {
        match piece {
            ReadPiece::Data(data) => output.push(Part::Data(data)),
            ReadPiece::Hole(bytes) => output.push(Part::Zeroes(usize::try_from(bytes).unwrap_or(0))),
        }
    }
}

fn read_chunks(output: &mut Output, style: Style, echo: Echo, length: u32, fragment: bool, pieces: Vec<ReadPiece>) {
    let all_hole = pieces.iter().all(|piece| matches!(piece, ReadPiece::Hole(_)));
    let any_hole = pieces.iter().any(|piece| matches!(piece, ReadPiece::Hole(_)));
    if all_hole {
        hole_chunk(output, style, echo, true, echo.offset, length);
    } else if !fragment || !any_hole {
        data_head(output, style, echo, true, echo.offset, length as usize);
        content(output, pieces);
    } else {
        fragments(output, style, echo, length, pieces);
    }
}

/// One chunk per run of data or holes; neighbours of a kind are joined.
fn fragments(output: &mut Output, style: Style, echo: Echo, length: u32, pieces: Vec<ReadPiece>) {
    let end = echo.offset + u64::from(length);
    let mut offset = echo.offset;
    let mut pieces = pieces.into_iter().filter(|piece| piece_bytes(piece) > 0).peekable();
    while let Some(first) = pieces.next() {
        let is_hole = matches!(first, ReadPiece::Hole(_));
        let mut bytes = piece_bytes(&first);
        let mut run = vec![first];
        while let Some(next) = pieces.next_if(|next| matches!(next, ReadPiece::Hole(_)) == is_hole) {
            bytes += piece_bytes(&next);
            run.push(next);
        }
        let last = offset + bytes == end;
        if is_hole {
            hole_chunk(output, style, echo, last, offset, u32::try_from(bytes).unwrap_or(u32::MAX));
        } else {
            data_head(output, style, echo, last, offset, usize::try_from(bytes).unwrap_or(0));
            content(output, run);
        }
        offset += bytes;
    }
}

fn hole_chunk(output: &mut Output, style: Style, echo: Echo, last: bool, offset: u64, bytes: u32) {
    output.inline(chunk_head(style, echo, last, chunk::OFFSET_HOLE, 12).u64(offset).u32(bytes).as_slice());
}

fn data_head(output: &mut Output, style: Style, echo: Echo, last: bool, offset: u64, bytes: usize) {
    output.inline(chunk_head(style, echo, last, chunk::OFFSET_DATA, 8 + bytes).u64(offset).as_slice());
}

fn piece_bytes(piece: &ReadPiece) -> u64 {
    match piece {
        ReadPiece::Data(data) => data.len() as u64,
        ReadPiece::Hole(bytes) => *bytes,
    }
}

/// Whether an export's answer to a read has exactly the bytes asked for.
#[must_use]
pub fn pieces_fit(pieces: &[ReadPiece], length: u32) -> bool {
    let total = pieces.iter().try_fold(0u64, |sum, piece| sum.checked_add(piece_bytes(piece)));
    total == Some(u64::from(length))
}

/// An allocation map. `one`: only the first run, cut to the request. `false`: the extents describe nothing, so no reply
/// could be made of them.
pub fn status(output: &mut Output, style: Style, echo: Echo, length: u64, one: bool, extents: &[StatusExtent]) -> bool {
    let runs = merge(extents, length, if one { 1 } else { EXTENTS_MAX });
    if runs.is_empty() {
        return false;
    }
    let mut bytes = Vec::with_capacity(8 + runs.len() * 16);
    bytes.extend(CONTEXT_ALLOCATION_ID.to_be_bytes());
    let kind = if style == Style::Extended {
        bytes.extend(u32::try_from(runs.len()).unwrap_or(0).to_be_bytes());
        for (length, state) in runs {
            bytes.extend(length.to_be_bytes());
            bytes.extend(u64::from(state).to_be_bytes());
        }
        chunk::BLOCK_STATUS_EXT
    } else {
        for (length, state) in runs {
            // A compact request cannot ask for more than 32 bits of length, and runs are cut to the request.
            bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
            bytes.extend(state.to_be_bytes());
        }
        chunk::BLOCK_STATUS
    };
    output.inline(chunk_head(style, echo, true, kind, bytes.len()).as_slice());
    output.owned(bytes);
    true
}

/// Joins neighbours of equal state and cuts everything behind `length` bytes or `count` runs.
fn merge(extents: &[StatusExtent], length: u64, count: usize) -> Vec<(u64, u32)> {
    let mut runs: Vec<(u64, u32)> = Vec::with_capacity(extents.len().min(count));
    let mut left = length;
    for extent in extents {
        let bytes = extent.length.min(left);
        if bytes == 0 {
            continue;
        }
        left -= bytes;
        let state = if extent.hole { state::HOLE } else { 0 } | if extent.zero { state::ZERO } else { 0 };
        let full = runs.len() == count;
        match runs.last_mut() {
            Some((run, before)) if *before == state => *run += bytes,
            _ if full => break,
            _ => runs.push((bytes, state)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    const ECHO: Echo = Echo { cookie: 9, offset: 4096 };

    fn data(byte: u8, bytes: usize) -> ReadPiece {
        ReadPiece::Data(Buf::copied(&vec![byte; bytes]))
    }

    fn gather(output: &mut Output, step: usize) -> Vec<u8> {
        let mut sent = Vec::new();
        while !output.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let count = output.slices(&mut slices);
            let front: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.iter().copied()).take(step).collect();
            assert!(!front.is_empty());
            output.advance(front.len());
            sent.extend(front);
        }
        sent
    }

    #[test]
    fn what_is_sent_in_any_steps_is_what_was_queued() {
        for step in [1, 7, 64, 4096, 70_000, usize::MAX] {
            let mut output = Output::default();
            for cookie in 0..9 {
                done(&mut output, Style::Simple, Echo { cookie, offset: 0 });
            }
            let pieces = vec![data(1, 100), ReadPiece::Hole(200_000), data(2, 5)];
            read(&mut output, Style::Simple, ECHO, 200_105, true, pieces);
            done(&mut output, Style::Extended, ECHO);
            let queued = output.to_vec();
            assert_eq!(queued.len(), output.len());
            assert_eq!(gather(&mut output, step), queued, "step {step}");
        }
    }

    #[test]
    fn many_parts_need_several_writes_and_lose_nothing() {
        let mut output = Output::default();
        for i in 0..200u8 {
            read(&mut output, Style::Simple, ECHO, 3, true, vec![data(i, 3)]);
        }
        read(&mut output, Style::Simple, ECHO, 8 << 20, true, vec![ReadPiece::Hole(8 << 20)]);
        let queued = output.to_vec();
        assert!(gather(&mut output, usize::MAX) == queued);
    }

    #[test]
    fn holes_between_data_become_chunks_and_the_last_one_says_done() {
        let mut output = Output::default();
        let pieces = vec![data(1, 512), data(2, 512), ReadPiece::Hole(512), ReadPiece::Hole(512), data(3, 512)];
        read(&mut output, Style::Structured, ECHO, 2560, true, pieces);
        let bytes = output.to_vec();
        assert_eq!(bytes.len(), (20 + 8 + 1024) + (20 + 12) + (20 + 8 + 512));
        assert_eq!(bytes[4..8], [0, 0, 0, 1], "data, not done");
        assert_eq!(bytes[1052 + 4..1052 + 8], [0, 0, 0, 2], "hole, not done");
        assert_eq!(bytes[1052 + 28..1052 + 32], 1024u32.to_be_bytes(), "joined");
        assert_eq!(bytes[1084 + 4..1084 + 8], [0, 1, 0, 1], "data, done");
        assert_eq!(bytes[1084 + 20..1084 + 28], (4096 + 2048u64).to_be_bytes());
    }

    #[test]
    fn unfragmented_reads_send_their_zeroes_unless_there_is_nothing_else() {
        let mut output = Output::default();
        read(&mut output, Style::Structured, ECHO, 1024, false, vec![ReadPiece::Hole(512), data(7, 512)]);
        assert_eq!(output.len(), 20 + 8 + 1024);
        let mut output = Output::default();
        read(&mut output, Style::Structured, ECHO, 1024, false, vec![ReadPiece::Hole(1024)]);
        assert_eq!(output.len(), 20 + 12);
    }

    #[test]
    fn the_map_is_joined_and_cut_to_the_request() {
        let run = |length, hole| StatusExtent { length, hole, zero: hole };
        let extents = [run(512, false), run(512, false), run(0, true), run(1024, true), run(4096, false)];
        assert_eq!(merge(&extents, 2560, 100), [(1024, 0), (1024, 3), (512, 0)]);
        assert_eq!(merge(&extents, 2560, 1), [(1024, 0)]);
        assert_eq!(merge(&extents, 700, 100), [(700, 0)]);
        assert_eq!(merge(&[run(0, true)], 700, 100), []);
        assert!(pieces_fit(&[ReadPiece::Hole(3), data(0, 4)], 7));
        assert!(!pieces_fit(&[ReadPiece::Hole(u64::MAX), data(0, 4)], 3));
    }
}
