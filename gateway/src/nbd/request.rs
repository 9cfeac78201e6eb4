//! From bytes to commands: [`validate`] decides what a request may do, [`Input`] finds requests and payloads in the stream.
//!
//! Both are owned by the connection's task. [`Input`] holds one receive buffer (64 or 256 KiB by load) and at most one
//! payload under way ([`Rules::payload_max`] bytes, charged by the caller before [`Input::begin`]). Small payloads are
//! slices of the receive buffer: no copy, but a slice keeps the whole buffer alive until its request is done.

use super::proto::{
    CONTEXT_ALLOCATION_ID, Errno, Malformed, PAYLOAD_ALWAYS, Reader, Style, UnverifiedRequest, command, command_flag,
};
use xsan_env::{Buf, BufMut, BufPool};

/// What the handshake and the export allow on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// How messages look.
    pub style: Style,
    /// Bytes of the export as told to this client.
    pub size: u64,
    /// Granularity of offsets and lengths in bytes; a power of two.
    pub block_min: u32,
    /// Granularity in bytes at which zeroing needs no read; a power of two.
    pub block_preferred: u32,
    /// Largest payload of a read or write in bytes.
    pub payload_max: u32,
    /// Changes are refused.
    pub read_only: bool,
    /// `base:allocation` was chosen for this export.
    pub status: bool,
}

/// A request that passed [`validate`]; offsets and lengths are inside the export and aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Command {
    Read {
        offset: u64,
        length: u32,
        fragment: bool,
    },
    Write {
        offset: u64,
        length: u32,
        fua: bool,
    },
    Flush,
    Trim {
        offset: u64,
        length: u64,
        fua: bool,
    },
    Cache {
        offset: u64,
        length: u64,
    },
    Zero {
        offset: u64,
        length: u64,
        fua: bool,
        no_hole: bool,
    },
    Status {
        offset: u64,
        length: u64,
        one: bool,
    },
    /// Block status whose length and choice of contexts are in the payload: see [`validate_status_payload`].
    StatusChoice {
        offset: u64,
        one: bool,
    },
    /// Nothing to do: success.
    Nothing,
    /// The client leaves.
    Disconnect,
}

/// Why a request is answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For programs.
    pub errno: Errno,
    /// For people; sent where the reply can carry it.
    pub reason: &'static str,
}

const fn refuse(errno: Errno, reason: &'static str) -> Refusal {
    Refusal { errno, reason }
}

/// Decides what a request may do: the one place where an error number is chosen for a request that never reaches the
/// export. Order: command, flags, permission, range, alignment, size of the answer.
///
/// # Errors
/// The [`Refusal`] to answer with; a payload must still be taken off the stream ([`payload_plan`]).
pub fn validate(request: &UnverifiedRequest, rules: &Rules) -> Result<Command, Refusal> {
    let &UnverifiedRequest { command, offset, length, .. } = request;
    if command == command::DISC {
        return Ok(Command::Disconnect);
    }
    check_flags(request, rules)?;
    let fua = request.has(command_flag::FUA);
    if rules.read_only && matches!(command, command::WRITE | command::TRIM | command::WRITE_ZEROES) {
        return Err(refuse(Errno::Perm, "the export is read-only"));
    }
    match command {
        command::FLUSH if offset == 0 && length == 0 => return Ok(Command::Flush),
        command::FLUSH => return Err(refuse(Errno::Inval, "offset and length of a flush must be zero")),
        command::BLOCK_STATUS if !rules.status => {
            return Err(refuse(Errno::Inval, "no metadata context was selected for this export"));
        }
        command::BLOCK_STATUS if request.has(command_flag::PAYLOAD_LEN) => {
            return validate_status_choice(request);
        }
        _ => {}
    }
    check_range(command, offset, length, rules)?;
    if length == 0 {
        return match command {
            command::BLOCK_STATUS => Err(refuse(Errno::Inval, "block status of no bytes")),
            command::READ => Ok(Command::Read { offset, length: 0, fragment: false }),
            _ => Ok(Command::Nothing),
        };
    }
    let short = || match u32::try_from(length) {
        Ok(length) if length <= rules.payload_max => Ok(length),
        // The document lets EOVERFLOW answer a read that is too long only where replies are chunks.
        _ if command == command::READ && rules.style.chunked() => {
            Err(refuse(Errno::Overflow, "read longer than the largest payload"))
        }
        _ => Err(refuse(Errno::Inval, "longer than the largest payload")),
    };
    Ok(match command {
        command::READ => Command::Read { offset, length: short()?, fragment: !request.has(command_flag::DF) },
        command::WRITE => Command::Write { offset, length: short()?, fua },
        command::TRIM => Command::Trim { offset, length, fua },
        command::CACHE => Command::Cache { offset, length },
        command::WRITE_ZEROES => {
            if request.has(command_flag::FAST_ZERO) && !is_fast(offset, length, rules) {
                return Err(refuse(Errno::NotSup, "zeroes that cut blocks are not faster than a write"));
            }
            Command::Zero { offset, length, fua, no_hole: request.has(command_flag::NO_HOLE) }
        }
        command::BLOCK_STATUS => Command::Status { offset, length, one: request.has(command_flag::REQ_ONE) },
        _ => return Err(refuse(Errno::Inval, "unknown command")),
    })
}

/// Whole blocks are zeroed by one record; cut blocks must be read and merged, like a write.
fn is_fast(offset: u64, length: u64, rules: &Rules) -> bool {
    let block = u64::from(rules.block_preferred.max(1));
    offset.is_multiple_of(block) && (length.is_multiple_of(block) || offset + length == rules.size)
}

fn check_flags(request: &UnverifiedRequest, rules: &Rules) -> Result<(), Refusal> {
    use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, PAYLOAD_LEN, REQ_ONE};
    let extended = rules.style == Style::Extended;
    let known = match request.command {
        command::READ if rules.style.chunked() => DF,
        command::READ | command::FLUSH | command::TRIM | command::CACHE => 0,
        command::WRITE if extended => PAYLOAD_LEN,
        command::WRITE => 0,
        command::WRITE_ZEROES => NO_HOLE | FAST_ZERO,
        command::BLOCK_STATUS if extended => REQ_ONE | PAYLOAD_LEN,
        command::BLOCK_STATUS => REQ_ONE,
        _ => return Err(refuse(Errno::Inval, "unknown command")),
    };
    // FUA is fine on every command, also where nothing is written.
    if request.flags & !(known | FUA) != 0 {
        return Err(refuse(Errno::Inval, "flag not known for this command"));
    }
    Ok(())
}

fn check_range(command: u16, offset: u64, length: u64, rules: &Rules) -> Result<(), Refusal> {
    if offset.checked_add(length).is_none_or(|end| end > rules.size) {
        let errno = match command {
            command::WRITE | command::WRITE_ZEROES => Errno::NoSpc,
            _ => Errno::Inval,
        };
        return Err(refuse(errno, "beyond the end of the export"));
    }
    let block = u64::from(rules.block_min.max(1));
    if !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
        return Err(refuse(Errno::Inval, "not aligned to the minimum block size"));
    }
    Ok(())
}

/// Ids of the payload form: one context exists, so one id is the only sound choice; room for a few more keeps the
/// refusal in the answer instead of in the length.
const STATUS_PAYLOAD_MAX: u64 = 8 + 4 * 64;

fn validate_status_choice(request: &UnverifiedRequest) -> Result<Command, Refusal> {
    if request.length < 12 || request.length > STATUS_PAYLOAD_MAX || !request.length.is_multiple_of(4) {
        return Err(refuse(Errno::Inval, "bad payload of a block status request"));
    }
    Ok(Command::StatusChoice { offset: request.offset, one: request.has(command_flag::REQ_ONE) })
}

/// The second half of [`validate`] for [`Command::StatusChoice`]: 64-bit length, then context ids.
///
/// # Errors
/// The [`Refusal`] to answer with: unknown or repeated ids, or a range [`validate`] would refuse.
pub fn validate_status_payload(payload: &[u8], offset: u64, one: bool, rules: &Rules) -> Result<Command, Refusal> {
    let mut reader = Reader(payload);
    let bad = refuse(Errno::Inval, "unknown or repeated metadata context id");
    let length = reader.u64().ok_or(bad)?;
    if reader.u32() != Some(CONTEXT_ALLOCATION_ID) || !reader.0.is_empty() {
        return Err(bad);
    }
    check_range(command::BLOCK_STATUS, offset, length, rules)?;
    if length == 0 {
        return Err(refuse(Errno::Inval, "block status of no bytes"));
    }
    Ok(Command::Status { offset, length, one })
}

/// What to do with the payload of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PayloadPlan {
    /// Take so many bytes (maybe none) and run the command.
    Keep(u32),
    /// Take so many bytes off the stream, throw them away, then answer.
    Swallow(u64),
    /// Too much to take: end the connection.
    Close,
}

/// Payload a compact write may have beyond what is allowed and still only be answered with an error.
pub const SWALLOW_MAX: u64 = 2 * PAYLOAD_ALWAYS as u64;

/// Decides about the payload: that of a refused request is swallowed so that the stream stays in step, unless it is
/// large enough to be an attack.
#[must_use]
pub fn payload_plan(request: &UnverifiedRequest, accepted: bool, rules: &Rules) -> PayloadPlan {
    let bytes = request.payload_bytes(rules.style);
    let bound = u64::from(rules.payload_max.max(PAYLOAD_ALWAYS));
    let bound = if rules.style == Style::Extended { bound } else { bound.max(SWALLOW_MAX) };
    match u32::try_from(bytes) {
        Ok(kept) if accepted => PayloadPlan::Keep(kept),
        _ if bytes <= bound => PayloadPlan::Swallow(bytes),
        _ => PayloadPlan::Close,
    }
}

/// Payloads of at least this many bytes are received into their own aligned buffer.
pub const LARGE_PAYLOAD: u32 = 32 << 10;
const BUFFER_LOW: usize = 64 << 10;
const BUFFER_HIGH: usize = 256 << 10;
/// A new buffer is taken when less room than this is left at the end.
const ROOM_MIN: usize = 8 << 10;
/// Most bytes read at once behind a large payload: what comes next is likely a header with another one, and whatever
/// of that payload lands in the receive buffer must be copied.
const AFTER_LARGE: usize = 4 << 10;

enum Taking {
    /// Between requests: the receive buffer.
    Header,
    /// A large payload: so many bytes of the buffer are filled.
    Payload(BufMut, usize),
    /// A payload to throw away: so many bytes to come.
    Waste(u64),
}

/// Finds requests in a stream of bytes. Call [`Input::room`], put bytes there, tell [`Input::filled`], then take what is
/// complete: [`Input::header`], [`Input::begin`], [`Input::payload`].
pub struct Input {
    style: Style,
    pool: BufPool,
    buffer: BufMut,
    /// Filled and not yet consumed part of the buffer.
    start: usize,
    end: usize,
    taking: Taking,
    after_large: bool,
    buffer_bytes: usize,
}

impl Input {
    /// An input without bytes.
    #[must_use]
    pub fn new(style: Style, pool: BufPool) -> Self {
        let buffer = pool.get(BUFFER_LOW);
        Self {
            style,
            pool,
            buffer,
            start: 0,
            end: 0,
            taking: Taking::Header,
            after_large: false,
            buffer_bytes: BUFFER_LOW,
        }
    }

    /// Bytes received and not yet consumed.
    fn pending(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// Where the next bytes belong; never empty while a request or payload is incomplete.
    pub fn room(&mut self) -> &mut [u8] {
        if !matches!(self.taking, Taking::Payload(..)) {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            }
            // The rest of a small request may need more than this: then the next call renews again.
            if self.buffer.len() - self.end < ROOM_MIN {
                self.renew();
            }
        }
        let limit = match &mut self.taking {
            Taking::Payload(payload, filled) => return &mut payload[*filled..],
            Taking::Waste(rest) => usize::try_from(*rest).unwrap_or(usize::MAX),
            Taking::Header if self.after_large => AFTER_LARGE,
            Taking::Header => usize::MAX,
        };
        let end = self.buffer.len().min(self.end.saturating_add(limit));
        &mut self.buffer[self.end..end]
    }

    /// Moves what is not consumed to the front of a fresh buffer.
    fn renew(&mut self) {
        let mut fresh = self.pool.get(self.buffer_bytes);
        let rest = self.end - self.start;
        fresh[..rest].copy_from_slice(&self.buffer[self.start..self.end]);
        self.buffer = fresh;
        (self.start, self.end) = (0, rest);
        // Back to the small size unless reads keep filling it.
        self.buffer_bytes = BUFFER_LOW;
    }

    /// `count` bytes were put into [`Input::room`].
    pub fn filled(&mut self, count: usize) {
        match &mut self.taking {
            Taking::Payload(_, filled) => *filled += count,
            Taking::Waste(rest) => *rest -= u64::try_from(count).unwrap_or(u64::MAX).min(*rest),
            Taking::Header => {
                self.end += count;
                if self.end - self.start >= BUFFER_LOW / 2 {
                    self.buffer_bytes = BUFFER_HIGH;
                }
            }
        }
    }

    /// The next request's header, if it is there; nothing is consumed.
    ///
    /// # Errors
    /// [`Malformed`]: the stream is lost.
    pub fn header(&self) -> Result<Option<UnverifiedRequest>, Malformed> {
        match self.taking {
            Taking::Header => UnverifiedRequest::parse(self.style, self.pending()),
            _ => Ok(None),
        }
    }

    /// Consumes the header that [`Input::header`] returned and starts on its payload. `false`: a small payload is not
    /// there yet and nothing was consumed; receive more and try again.
    pub fn begin(&mut self, plan: PayloadPlan) -> bool {
        let header = self.style.request_bytes();
        let there = self.end - self.start - header;
        match plan {
            PayloadPlan::Close | PayloadPlan::Keep(0) => self.start += header,
            PayloadPlan::Keep(bytes) if bytes < LARGE_PAYLOAD => {
                if there < bytes as usize {
                    return false;
                }
                self.start += header;
                self.after_large = false;
            }
            PayloadPlan::Keep(bytes) => {
                self.start += header;
                let mut payload = self.pool.get(bytes as usize);
                let have = there.min(bytes as usize);
                payload[..have].copy_from_slice(&self.buffer[self.start..self.start + have]);
                self.start += have;
                self.taking = Taking::Payload(payload, have);
                self.after_large = true;
            }
            PayloadPlan::Swallow(bytes) => {
                self.start += header;
                let have = usize::try_from(bytes).map_or(there, |bytes| bytes.min(there));
                self.start += have;
                self.taking = match bytes - have as u64 {
                    0 => Taking::Header,
                    rest => Taking::Waste(rest),
                };
            }
        }
        true
    }

    /// The payload of the request that [`Input::begin`] started, once it is whole. `bytes`: its length.
    pub fn payload(&mut self, bytes: u32) -> Option<Buf> {
        let bytes = bytes as usize;
        match std::mem::replace(&mut self.taking, Taking::Header) {
            Taking::Header if bytes == 0 => Some(Buf::new()),
            Taking::Header => {
                drop(self.buffer.split_to(self.start));
                let payload = self.buffer.split_to(bytes).freeze();
                self.end -= self.start + bytes;
                self.start = 0;
                Some(payload)
            }
            Taking::Payload(payload, filled) if filled == payload.len() => Some(payload.freeze()),
            unfinished => {
                self.taking = unfinished;
                None
            }
        }
    }

    /// Whether a payload to be thrown away is still coming.
    #[must_use]
    pub fn wasting(&mut self) -> bool {
        match self.taking {
            Taking::Waste(0) => {
                self.taking = Taking::Header;
                false
            }
            Taking::Waste(_) => true,
            _ => false,
        }
    }

    /// Whether nothing of a request has come yet.
    #[must_use]
    pub fn is_between(&self) -> bool {
        matches!(self.taking, Taking::Header) && self.start == self.end
    }
}
