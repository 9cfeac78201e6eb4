//! From bytes to frames.

use super::{Bounds, FLAG_PIECES, Frame, FrameError, HEADER_BYTES, UnverifiedHeader, check_beginning, head_crc};
use crate::payload::{Incoming, Payload};
use xsan_env::BufPool;

/// Bytes read ahead on a plain socket: many small frames in one system call.
const AHEAD_BYTES: usize = 64 << 10;
/// A payload with at least this much to come is read straight into its own memory; for less, a copy costs less than the
/// system call that it saves. Chosen by reasoning (a copy of 8 KiB from the cache is well under a microsecond), not tuned.
const STRAIGHT_MIN: usize = 8 << 10;

/// Finds frames in a stream. Memory: one buffer of 64 KiB (or the longest fixed part that came), and one payload.
///
/// The owner asks for [`Input::room`], reads into it, says how much with [`Input::filled`], and takes frames with
/// [`Input::next_frame`] until there is none.
pub struct Input {
    pool: BufPool,
    bounds: Bounds,
    /// Payloads are always read straight: reads are cheap because TLS has the bytes in memory already.
    exact: bool,
    buffer: Vec<u8>,
    /// Received and not yet consumed part of the buffer.
    start: usize,
    end: usize,
    /// The frame given out last; consumed when the next one is asked for, because its fixed part lies in the buffer.
    given: usize,
    /// A frame whose head is verified and whose payload is still coming. Its head stays at `start`.
    taking: Option<(UnverifiedHeader, Incoming)>,
}

impl Input {
    /// An input in front of a stream that has not begun. `exact`: read no further than the frame at hand, for streams
    /// where a read is no system call.
    #[must_use]
    pub fn new(pool: BufPool, bounds: Bounds, exact: bool) -> Self {
        let buffer = vec![0; if exact { 4096 } else { AHEAD_BYTES }];
        Self { pool, bounds, exact, buffer, start: 0, end: 0, given: 0, taking: None }
    }

    /// From now on other bounds hold.
    pub fn set_bounds(&mut self, bounds: Bounds) {
        self.bounds = bounds;
    }

    /// Whether it stands between two frames: a stream that ends here ends in order.
    #[must_use]
    pub fn is_between_frames(&self) -> bool {
        self.taking.is_none() && self.start + self.given == self.end
    }

    /// Where the next bytes belong; never empty.
    pub fn room(&mut self) -> &mut [u8] {
        self.consume();
        let straight_min = if self.exact { 1 } else { STRAIGHT_MIN };
        if self.taking.as_ref().is_some_and(|(_, payload)| payload.left() >= straight_min) {
            return self.taking.as_mut().map_or(&mut [], |(_, payload)| payload.room());
        }
        let missing = self.missing();
        if self.buffer.len() > 2 * AHEAD_BYTES && self.end - self.start <= AHEAD_BYTES {
            // A long message has passed.
            self.make_room(0);
            self.buffer.truncate(2 * AHEAD_BYTES);
            self.buffer.shrink_to_fit();
        }
        if self.buffer.len() - self.end < missing {
            self.make_room(missing);
        }
        let end = if self.exact { self.end + missing } else { self.buffer.len().min(self.end + AHEAD_BYTES) };
        &mut self.buffer[self.end..end]
    }

    /// Bytes without which there is no progress, at least 1.
    fn missing(&self) -> usize {
        let have = self.end - self.start;
        let wanted = match &self.taking {
            Some((head, payload)) => HEADER_BYTES + head.meta_bytes as usize + payload.left(),
            None if have < HEADER_BYTES => HEADER_BYTES,
            // `next_frame` has checked it against the bound.
            None => HEADER_BYTES + self.parsed().map_or(0, |head| head.meta_bytes as usize),
        };
        // A fixed part is not believed to be long before its bytes come: memory grows with them.
        wanted.saturating_sub(have).clamp(1, AHEAD_BYTES)
    }

    fn make_room(&mut self, missing: usize) {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let wanted = self.end + missing;
        if wanted > self.buffer.len() {
            self.buffer.resize(wanted.max(self.buffer.len() * 2), 0);
        }
    }

    /// `count` bytes were put into [`Input::room`].
    pub fn filled(&mut self, count: usize) {
        let straight_min = if self.exact { 1 } else { STRAIGHT_MIN };
        match &mut self.taking {
            Some((_, payload)) if payload.left() >= straight_min => payload.filled(count),
            _ => self.end = (self.end + count).min(self.buffer.len()),
        }
    }

    /// Bytes of its own buffer.
    #[cfg(test)]
    pub(crate) fn memory(&self) -> usize {
        self.buffer.capacity()
    }

    /// Throws away what has come.
    pub(crate) fn forget(&mut self) {
        (self.start, self.end, self.given, self.taking) = (0, 0, 0, None);
    }

    fn consume(&mut self) {
        self.start += std::mem::take(&mut self.given);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    fn parsed(&self) -> Option<UnverifiedHeader> {
        let bytes = self.buffer.get(self.start..self.end)?.first_chunk()?;
        UnverifiedHeader::parse(bytes, self.bounds).ok()
    }

    /// Whether the next frame has come, if it is one without payload; else whether its head has.
    ///
    /// # Errors
    /// [`FrameError`]: the stream is of no further use.
    pub(crate) fn has_head(&mut self) -> Result<bool, FrameError> {
        self.consume();
        Ok(self.begin()?.is_some())
    }

    /// The next frame, if all of it is there.
    ///
    /// # Errors
    /// [`FrameError`]: the stream is of no further use.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        self.consume();
        let (head, mut payload) = match self.taking.take() {
            Some(taking) => taking,
            None => match self.begin()? {
                None => return Ok(None),
                Some(head) if head.payload_bytes == 0 => return self.give(head, Payload::None, 0).map(Some),
                Some(head) => {
                    let in_pieces = head.header.flags & FLAG_PIECES != 0;
                    (head, Incoming::new(&self.pool, head.payload_bytes as usize, in_pieces))
                }
            },
        };
        // What came behind the head belongs to the payload first.
        let from = self.start + HEADER_BYTES + head.meta_bytes as usize;
        let taken = payload.copy_from(&self.buffer[from..self.end]);
        if payload.left() > 0 {
            self.end = from;
            self.taking = Some((head, payload));
            return Ok(None);
        }
        self.give(head, payload.finish(), taken).map(Some)
    }

    /// Hands out the frame at the start of the buffer; `behind` bytes of its payload lie behind its head.
    fn give(&mut self, head: UnverifiedHeader, payload: Payload, behind: usize) -> Result<Frame<'_>, FrameError> {
        if payload.crc() != head.payload_crc {
            return Err(FrameError::PayloadDamaged);
        }
        let meta_bytes = head.meta_bytes as usize;
        self.given = HEADER_BYTES + meta_bytes + behind;
        let meta = &self.buffer[self.start + HEADER_BYTES..][..meta_bytes];
        Ok(Frame { header: head.header, meta, payload })
    }

    /// Verifies the head of the next frame, if all of it is there. Memory for the payload is taken only after that.
    fn begin(&self) -> Result<Option<UnverifiedHeader>, FrameError> {
        let bytes = &self.buffer[self.start..self.end];
        check_beginning(bytes)?;
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let head = UnverifiedHeader::parse(header, self.bounds)?;
        let Some(meta) = bytes[HEADER_BYTES..].get(..head.meta_bytes as usize) else { return Ok(None) };
        if head_crc(&header[..super::CRC_AT], meta) != head.head_crc {
            return Err(FrameError::HeadDamaged);
        }
        Ok(Some(head))
    }
}
