//! Numbers and layouts of the protocol; parsing of untrusted bytes into types, and nothing else.
//!
//! Source: the NBD protocol document of the NetworkBlockDevice project (master of 2026 and its extension for extended
//! headers). All integers are big endian. Nothing here knows a limit that depends on an export: see [`super::request`].

/// First eight bytes a server sends (`NBDMAGIC`).
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of the newstyle handshake and head of every option (`IHAVEOPT`).
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Head of every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Head of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Head of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Head of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Head of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Head of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Longest string of the protocol in bytes (names, queries, messages).
pub const STRING_BYTES_MAX: usize = 4096;
/// Payload that is never too much, whatever an export advertises.
pub const PAYLOAD_ALWAYS: u32 = 32 << 20;
/// Most extents of one block status chunk.
pub const EXTENTS_MAX: usize = 1 << 20;
/// Most queries of a metadata context option that are looked at.
pub const QUERIES_MAX: u32 = 1024;

/// Flags of the server in its greeting and of the client in its answer.
pub mod handshake_flag {
    /// Options other than EXPORT_NAME and replies to them.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// No 124 zero bytes after the answer to EXPORT_NAME.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options.
pub mod option {
    /// Choose an export; no error can be answered.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// Names of the exports.
    pub const LIST: u32 = 3;
    /// Upgrade to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start the transmission.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts are there.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Use 32-byte headers with 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of option replies.
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// A name of LIST.
    pub const SERVER: u32 = 2;
    /// An information item of INFO and GO.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Unknown option.
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    /// Forbidden here.
    pub const ERR_POLICY: u32 = 1 << 31 | 2;
    /// Malformed or out of place.
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = 1 << 31 | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    /// The server is stopping.
    pub const ERR_SHUTDOWN: u32 = 1 << 31 | 7;
    /// The option is too long to look at.
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
    /// Only with extended headers, or not back from them.
    pub const ERR_EXT_HEADER_REQD: u32 = 1 << 31 | 10;
}

/// Information items of INFO and GO.
pub mod info {
    /// Size and transmission flags; always sent.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and largest sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub mod export_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF is understood (with structured or extended replies).
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// FAST_ZERO is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS takes a payload with a choice of contexts (extended headers).
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Commands.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect; has no reply.
    pub const DISC: u16 = 2;
    /// Make completed writes stable.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Read ahead.
    pub const CACHE: u16 = 5;
    /// Write zeroes without sending them.
    pub const WRITE_ZEROES: u16 = 6;
    /// Allocation map.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod command_flag {
    /// Reply only when stable.
    pub const FUA: u16 = 1 << 0;
    /// Zeroes shall keep their space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One content chunk at most.
    pub const DF: u16 = 1 << 2;
    /// One extent per context.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail rather than be slow.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length is that of a payload (extended headers).
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types and the flag of reply chunks.
pub mod chunk {
    /// Flag: last chunk of the reply.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// No content.
    pub const NONE: u16 = 0;
    /// Bytes at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents with 32-bit fields.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents with 64-bit fields.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Error of the whole request.
    pub const ERROR: u16 = 1 << 15 | 1;
    /// Error at an offset.
    pub const ERROR_OFFSET: u16 = 1 << 15 | 2;
}

/// States of `base:allocation`.
pub mod state {
    /// Nothing is stored.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// Name of the only metadata context.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
/// Its number on every connection.
pub const CONTEXT_ALLOCATION_ID: u32 = 1;

/// Error numbers a reply may carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted: a write to a read-only export.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Invalid argument.
    Inval = 22,
    /// No space left, or a write beyond the end.
    NoSpc = 28,
    /// Too large.
    Overflow = 75,
    /// Not supported: a fast zero that would be slow.
    NotSup = 95,
    /// The server is stopping.
    Shutdown = 108,
}

impl From<crate::ExportError> for Errno {
    fn from(error: crate::ExportError) -> Self {
        use crate::ExportError as E;
        match error {
            E::Invalid => Errno::Inval,
            E::NoSpace => Errno::NoSpc,
            E::NotSupported => Errno::NotSup,
            E::ReadOnly => Errno::Perm,
            E::Io => Errno::Io,
            E::Shutdown | E::Moved => Errno::Shutdown,
        }
    }
}

/// How requests and replies look on a connection; fixed by the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests, replies in chunks where they carry content or an error.
    Structured,
    /// 32-byte requests and chunks.
    Extended,
}

impl Style {
    /// Bytes of a request header.
    #[must_use]
    pub fn request_bytes(self) -> usize {
        match self {
            Style::Simple | Style::Structured => 28,
            Style::Extended => 32,
        }
    }

    /// Whether replies may be chunks.
    #[must_use]
    pub fn chunked(self) -> bool {
        self != Style::Simple
    }
}

/// Takes integers and slices off the front of untrusted bytes; `None` when there are too few.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `count` bytes.
    pub fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    /// The next 16 bits.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with its 32-bit length in front; see [`string`] for what is refused.
    pub fn string(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        string(self.bytes(length)?)
    }
}

/// A string of the protocol: UTF-8, no NUL, at most [`STRING_BYTES_MAX`] bytes; else `None`.
#[must_use]
pub fn string(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > STRING_BYTES_MAX || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// Bytes that cannot be the protocol: there is no way to find the next message, the connection must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("wrong magic number {found:#x}")]
pub struct Malformed {
    /// What stood where the magic number belongs.
    pub found: u64,
}

/// Head of an option: 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub code: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

/// Bytes of an [`OptionHeader`].
pub const OPTION_HEADER_BYTES: usize = 16;

impl OptionHeader {
    /// Reads a head.
    ///
    /// # Errors
    /// [`Malformed`]: this is no option; close the connection.
    pub fn parse(bytes: &[u8; OPTION_HEADER_BYTES]) -> Result<Self, Malformed> {
        let mut reader = Reader(bytes);
        let (magic, code, length) = (reader.u64(), reader.u32(), reader.u32());
        match (magic, code, length) {
            (Some(OPTION_MAGIC), Some(code), Some(length)) => Ok(Self { code, length }),
            _ => Err(Malformed { found: magic.unwrap_or(0) }),
        }
    }
}

/// A request header as it came; nothing is checked but the magic number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnverifiedRequest {
    /// Command flags.
    pub flags: u16,
    /// Command number.
    pub command: u16,
    /// The client's name for the request; echoed.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes of the export, or of the payload with `PAYLOAD_LEN`.
    pub length: u64,
}

impl UnverifiedRequest {
    /// Reads a header from the front of `bytes`; `None` while there are fewer than [`Style::request_bytes`].
    ///
    /// # Errors
    /// [`Malformed`]: this is no request; close the connection.
    pub fn parse(style: Style, bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let extended = style == Style::Extended;
        let Some(bytes) = bytes.get(..style.request_bytes()) else { return Ok(None) };
        let mut reader = Reader(bytes);
        let magic = reader.u32().unwrap_or(0);
        if magic != if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC } {
            return Err(Malformed { found: u64::from(magic) });
        }
        let mut read = || {
            Some(Self {
                flags: reader.u16()?,
                command: reader.u16()?,
                cookie: reader.u64()?,
                offset: reader.u64()?,
                length: if extended { reader.u64()? } else { u64::from(reader.u32()?) },
            })
        };
        Ok(read())
    }

    /// Whether flag `bit` of [`command_flag`] is set.
    #[must_use]
    pub fn has(&self, bit: u16) -> bool {
        self.flags & bit != 0
    }

    /// Bytes of payload that follow the header, by the rules of `style`.
    ///
    /// A write always has one. With extended headers its flag must say so, but QEMU (10.0 at least) sends writes without
    /// the flag and with the payload; a write without payload means nothing, so nothing is lost by taking it.
    #[must_use]
    pub fn payload_bytes(&self, style: Style) -> u64 {
        let carries = match style {
            Style::Simple | Style::Structured => self.command == command::WRITE,
            Style::Extended => self.command == command::WRITE || self.has(command_flag::PAYLOAD_LEN),
        };
        if carries { self.length } else { 0 }
    }

    /// The header's bytes; used by clients and tests.
    #[must_use]
    pub fn encode(&self, style: Style) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(32);
        let extended = style == Style::Extended;
        bytes.extend(if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC }.to_be_bytes());
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        if extended {
            bytes.extend(self.length.to_be_bytes());
        } else {
            bytes.extend(u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_what_it_was_in_both_styles() {
        let request =
            UnverifiedRequest { flags: 3, command: 6, cookie: u64::MAX, offset: 1 << 40, length: 0xffff_fe00 };
        for style in [Style::Simple, Style::Structured, Style::Extended] {
            let bytes = request.encode(style);
            assert_eq!(bytes.len(), style.request_bytes());
            assert_eq!(UnverifiedRequest::parse(style, &bytes), Ok(Some(request)));
            assert_eq!(UnverifiedRequest::parse(style, &bytes[..bytes.len() - 1]), Ok(None));
        }
        let compact = request.encode(Style::Simple);
        let mut longer = compact.clone();
        longer.extend([0; 8]);
        assert!(UnverifiedRequest::parse(Style::Extended, &longer).is_err(), "compact is refused after extended");
    }

    #[test]
    fn strings_with_nul_bad_utf8_or_too_long_are_refused() {
        assert_eq!(string(b"vm1"), Some("vm1"));
        assert_eq!(string(b"v\0m"), None);
        assert_eq!(string(&[0xff, 0xfe]), None);
        assert!(string(&[b'a'; STRING_BYTES_MAX]).is_some());
        assert_eq!(string(&[b'a'; STRING_BYTES_MAX + 1]), None);
        assert_eq!(Reader(&[0, 0, 0, 9, b'a']).string(), None);
    }
}
