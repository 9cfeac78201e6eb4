//! A client of the protocol that trusts nothing: it checks every rule a server must keep, in all three styles.
//!
//! For tests, measurements and tools; any number of requests may be under way, answers are sorted out by cookie.
//! [`Negotiation`] is the handshake in raw options, [`Client`] the transmission.

use crate::nbd::proto::{
    CONTEXT_ALLOCATION, CONTEXT_ALLOCATION_ID, EXTENDED_REPLY_MAGIC, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    Reader, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, Style, UnverifiedRequest, chunk, command, command_flag,
    handshake_flag, info, option, option_reply,
};
use std::collections::BTreeMap;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Payload of one reply message that is taken: a read of 32 MiB and its head, or a large map.
const MESSAGE_BYTES_MAX: u64 = (64 << 20) + 64;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The connection.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The server broke a rule of the protocol.
    #[error("the server breaks the protocol: {0}")]
    Protocol(&'static str),
    /// An option was answered with an error.
    #[error("option {option} refused with {kind:#x}: {message}")]
    Refused {
        /// Which option.
        option: u32,
        /// The reply type.
        kind: u32,
        /// The server's words.
        message: String,
    },
    /// A request was answered with an error.
    #[error("request failed with error number {errno}: {message}")]
    Failed {
        /// The error number.
        errno: u32,
        /// The server's words; empty with simple replies.
        message: String,
    },
}

impl ClientError {
    /// The error number of a failed request.
    #[must_use]
    pub fn errno(&self) -> Option<u32> {
        match self {
            Self::Failed { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> xsan_types::ErrorKind {
        use xsan_types::ErrorKind as K;
        match self {
            Self::Io(error) => xsan_env::error::kind(error),
            Self::Protocol(_) => K::Internal,
            Self::Refused { kind: option_reply::ERR_UNKNOWN, .. } => K::NotFound,
            Self::Refused { kind: option_reply::ERR_SHUTDOWN, .. } | Self::Failed { errno: 108, .. } => K::Closed,
            Self::Failed { errno: 28, .. } => K::NoSpace,
            Self::Failed { errno: 5, .. } => K::Unavailable,
            Self::Refused { .. } | Self::Failed { .. } => K::Invalid,
        }
    }
}

type Result<T> = std::result::Result<T, ClientError>;

fn check(holds: bool, rule: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(ClientError::Protocol(rule)) }
}

fn need<T>(value: Option<T>, rule: &'static str) -> Result<T> {
    value.ok_or(ClientError::Protocol(rule))
}

/// One message of the server about an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// See [`option_reply`].
    pub kind: u32,
    /// Its data.
    pub data: Vec<u8>,
}

/// What the server tells of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// Bytes.
    pub size: u64,
    /// See [`crate::nbd::proto::export_flag`].
    pub flags: u16,
    /// Smallest, preferred, largest payload.
    pub block_sizes: Option<(u32, u32, u32)>,
    /// Canonical name, if told.
    pub name: Option<String>,
    /// Description, if told.
    pub description: Option<String>,
}

/// How to connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connect {
    /// Export name.
    pub export: String,
    /// Style to ask for.
    pub style: Style,
    /// Ask for `base:allocation`; needs a style with chunks.
    pub status: bool,
}

impl Connect {
    /// Everything modern: extended headers and the allocation map.
    #[must_use]
    pub fn to(export: &str) -> Self {
        Self { export: export.to_owned(), style: Style::Extended, status: true }
    }

    /// As [`Connect::to`] in another style; simple replies have no map.
    #[must_use]
    pub fn in_style(export: &str, style: Style) -> Self {
        Self { export: export.to_owned(), style, status: style.chunked() }
    }
}

/// Option haggling, option by option.
#[derive(Debug)]
pub struct Negotiation<S> {
    io: S,
    style: Style,
    status: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Negotiation<S> {
    /// Takes the greeting and sends these client flags.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn start(mut io: S, flags: u32) -> Result<Self> {
        check(io.read_u64().await? == INIT_MAGIC, "greeting")?;
        check(io.read_u64().await? == OPTION_MAGIC, "newstyle greeting")?;
        let offered = io.read_u16().await?;
        check(offered & handshake_flag::FIXED_NEWSTYLE != 0, "fixed newstyle")?;
        io.write_u32(flags).await?;
        Ok(Self::resume(io))
    }

    /// Goes on after an upgrade to TLS: everything negotiated before is forgotten.
    pub fn resume(io: S) -> Self {
        Self { io, style: Style::Simple, status: false }
    }

    /// The stream, for an upgrade to TLS or for bytes that are no option.
    pub fn into_inner(self) -> S {
        self.io
    }

    /// The stream, for bytes that are no option.
    pub fn stream(&mut self) -> &mut S {
        &mut self.io
    }

    /// Sends an option and returns its replies; the last one is the final one.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn option(&mut self, code: u32, data: &[u8]) -> Result<Vec<OptionReply>> {
        self.send_option(code, data).await?;
        let mut replies = Vec::new();
        loop {
            check(self.io.read_u64().await? == OPTION_REPLY_MAGIC, "magic of an option reply")?;
            check(self.io.read_u32().await? == code, "option of an option reply")?;
            let kind = self.io.read_u32().await?;
            let length = self.io.read_u32().await?;
            check(length <= 1 << 20, "length of an option reply")?;
            let mut data = vec![0; length as usize];
            self.io.read_exact(&mut data).await?;
            replies.push(OptionReply { kind, data });
            if kind == option_reply::ACK || kind & 1 << 31 != 0 {
                return Ok(replies);
            }
        }
    }

    /// Sends an option and does not wait.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn send_option(&mut self, code: u32, data: &[u8]) -> Result<()> {
        let mut bytes = Vec::with_capacity(16 + data.len());
        bytes.extend(OPTION_MAGIC.to_be_bytes());
        bytes.extend(code.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(data);
        self.io.write_all(&bytes).await?;
        self.io.flush().await?;
        Ok(())
    }

    /// As [`Negotiation::option`]; an error reply becomes an error.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn must(&mut self, code: u32, data: &[u8]) -> Result<Vec<OptionReply>> {
        let mut replies = self.option(code, data).await?;
        let last = need(replies.pop(), "a final reply")?;
        if last.kind != option_reply::ACK {
            let message = String::from_utf8_lossy(&last.data).into_owned();
            return Err(ClientError::Refused { option: code, kind: last.kind, message });
        }
        check(last.data.is_empty(), "ACK without data")?;
        Ok(replies)
    }

    /// Names and descriptions of the exports.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn list(&mut self) -> Result<Vec<(String, String)>> {
        let replies = self.must(option::LIST, &[]).await?;
        let parse = |reply: &OptionReply| {
            let mut reader = Reader(&reply.data);
            let name = reader.string()?.to_owned();
            Some((name, String::from_utf8(reader.0.to_vec()).ok()?))
        };
        replies.iter().map(|reply| need(parse(reply), "layout of a listed export")).collect()
    }

    /// Asks for a style.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn set_style(&mut self, style: Style) -> Result<()> {
        match style {
            Style::Simple => {}
            Style::Structured => drop(self.must(option::STRUCTURED_REPLY, &[]).await?),
            Style::Extended => drop(self.must(option::EXTENDED_HEADERS, &[]).await?),
        }
        self.style = style;
        Ok(())
    }

    /// Asks for metadata contexts (or lists them); returns ids and names.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn meta(&mut self, code: u32, export: &str, queries: &[&str]) -> Result<Vec<(u32, String)>> {
        let replies = self.must(code, &meta_data(export, queries)).await?;
        let parse = |reply: &OptionReply| {
            let mut reader = Reader(&reply.data);
            let id = reader.u32()?;
            Some((id, String::from_utf8(reader.0.to_vec()).ok()?))
        };
        let contexts: Result<Vec<_>> =
            replies.iter().map(|reply| need(parse(reply), "layout of a metadata context")).collect();
        let contexts = contexts?;
        if code == option::SET_META_CONTEXT {
            self.status = contexts.iter().any(|(id, name)| *id == CONTEXT_ALLOCATION_ID && name == CONTEXT_ALLOCATION);
        }
        Ok(contexts)
    }

    /// Describes an export, with every item asked for.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn info(&mut self, code: u32, export: &str) -> Result<Description> {
        let data = info_data(export, &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE]);
        let replies = self.must(code, &data).await?;
        let mut description = Description::default();
        let mut told = false;
        for reply in &replies {
            check(reply.kind == option_reply::INFO, "only information before the ACK")?;
            told |= need(read_item(&mut description, &reply.data), "layout of an information item")?;
        }
        check(told, "size and flags before the ACK")?;
        Ok(description)
    }

    /// Starts the transmission with GO.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn go(mut self, export: &str) -> Result<Client<S>> {
        let description = self.info(option::GO, export).await?;
        Ok(Client::new(self.io, self.style, self.status, description))
    }

    /// Starts the transmission with EXPORT_NAME. `zeroes`: whether the flags sent allow the server to pad.
    ///
    /// # Errors
    /// [`ClientError`]; the server can only close the connection if it has no such export.
    pub async fn export_name(mut self, export: &str, zeroes: bool) -> Result<Client<S>> {
        self.send_option(option::EXPORT_NAME, export.as_bytes()).await?;
        let description =
            Description { size: self.io.read_u64().await?, flags: self.io.read_u16().await?, ..Description::default() };
        if zeroes {
            let mut padding = [1; 124];
            self.io.read_exact(&mut padding).await?;
            check(padding == [0; 124], "zeroes after the export")?;
        }
        Ok(Client::new(self.io, self.style, self.status, description))
    }
}

/// Data of INFO and GO.
#[must_use]
pub fn info_data(export: &str, items: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    data.extend(u32::try_from(export.len()).unwrap_or(u32::MAX).to_be_bytes());
    data.extend(export.as_bytes());
    data.extend(u16::try_from(items.len()).unwrap_or(u16::MAX).to_be_bytes());
    items.iter().for_each(|item| data.extend(item.to_be_bytes()));
    data
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[must_use]
pub fn meta_data(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    let string = |text: &str, data: &mut Vec<u8>| {
        data.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
        data.extend(text.as_bytes());
    };
    string(export, &mut data);
    data.extend(u32::try_from(queries.len()).unwrap_or(u32::MAX).to_be_bytes());
    queries.iter().for_each(|query| string(query, &mut data));
    data
}

/// `Some(true)`: size and flags.
fn read_item(description: &mut Description, data: &[u8]) -> Option<bool> {
    let mut reader = Reader(data);
    match reader.u16()? {
        info::EXPORT => {
            description.size = reader.u64()?;
            description.flags = reader.u16()?;
            return reader.0.is_empty().then_some(true);
        }
        info::BLOCK_SIZE => description.block_sizes = Some((reader.u32()?, reader.u32()?, reader.u32()?)),
        info::NAME => description.name = Some(std::str::from_utf8(reader.0).ok()?.to_owned()),
        info::DESCRIPTION => description.description = Some(std::str::from_utf8(reader.0).ok()?.to_owned()),
        _ => {}
    }
    Some(false)
}

/// A request to send as it is, right or wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request<'a> {
    /// See [`command`].
    pub command: u16,
    /// See [`command_flag`].
    pub flags: u16,
    /// First byte.
    pub offset: u64,
    /// Length field of the header.
    pub length: u64,
    /// Bytes behind the header.
    pub payload: &'a [u8],
}

/// A whole answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// Error number and words.
    pub error: Option<(u32, String)>,
    /// Bytes of a read.
    pub data: Vec<u8>,
    /// Parts a read came in: offset, length, whether it was told as a hole.
    pub parts: Vec<(u64, u64, bool)>,
    /// Runs of an allocation map: length and state.
    pub extents: Vec<(u64, u64)>,
    /// It came as a simple reply.
    pub simple: bool,
}

struct Pending {
    command: u16,
    offset: u64,
    length: u64,
    reply: Reply,
}

/// A connection in its transmission phase.
pub struct Client<S> {
    io: S,
    style: Style,
    status: bool,
    description: Description,
    cookie: u64,
    pending: BTreeMap<u64, Pending>,
    done: BTreeMap<u64, Reply>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    fn new(io: S, style: Style, status: bool, description: Description) -> Self {
        Self { io, style, status, description, cookie: 1 << 60, pending: BTreeMap::new(), done: BTreeMap::new() }
    }

    /// Handshake in one go.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn connect(io: S, how: &Connect) -> Result<Self> {
        let flags = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        let mut negotiation = Negotiation::start(io, flags).await?;
        negotiation.set_style(how.style).await?;
        if how.status {
            negotiation.meta(option::SET_META_CONTEXT, &how.export, &[CONTEXT_ALLOCATION]).await?;
        }
        negotiation.go(&how.export).await
    }

    /// What the server told of the export.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Bytes of the export.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.description.size
    }

    /// The stream, for bytes that are no request.
    pub fn stream(&mut self) -> &mut S {
        &mut self.io
    }

    /// Whether the server granted `base:allocation`.
    #[must_use]
    pub fn has_status(&self) -> bool {
        self.status
    }

    /// Sends a request and returns its cookie; the answer comes with [`Client::wait`].
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn send(&mut self, request: Request<'_>) -> Result<u64> {
        self.cookie += 1;
        let cookie = self.cookie;
        let Request { command, flags, offset, length, payload } = request;
        let mut bytes = UnverifiedRequest { flags, command, cookie, offset, length }.encode(self.style);
        // What the answer is about: in the payload form of block status the payload says it.
        let covered = match payload.first_chunk() {
            Some(covered) if command == command::BLOCK_STATUS => u64::from_be_bytes(*covered),
            _ => length,
        };
        self.pending.insert(cookie, Pending { command, offset, length: covered, reply: Reply::default() });
        if payload.len() <= 4096 {
            bytes.extend(payload);
            self.io.write_all(&bytes).await?;
        } else {
            self.io.write_all(&bytes).await?;
            self.io.write_all(payload).await?;
        }
        self.io.flush().await?;
        Ok(cookie)
    }

    /// Waits for the answer to a request; answers to others that come before are kept.
    ///
    /// # Errors
    /// [`ClientError`], but not an error number: that is in the [`Reply`].
    pub async fn wait(&mut self, cookie: u64) -> Result<Reply> {
        loop {
            if let Some(reply) = self.done.remove(&cookie) {
                return Ok(reply);
            }
            check(self.pending.contains_key(&cookie), "wait for a request that was sent")?;
            self.receive().await?;
        }
    }

    /// Waits for the next complete answer, whichever it is.
    ///
    /// # Errors
    /// As [`Client::wait`].
    pub async fn wait_any(&mut self) -> Result<(u64, Reply)> {
        loop {
            if let Some(found) = self.done.pop_first() {
                return Ok(found);
            }
            self.receive().await?;
        }
    }

    /// Sends and waits.
    ///
    /// # Errors
    /// As [`Client::wait`].
    pub async fn call(&mut self, request: Request<'_>) -> Result<Reply> {
        let cookie = self.send(request).await?;
        self.wait(cookie).await
    }

    async fn succeed(&mut self, request: Request<'_>) -> Result<Reply> {
        let mut reply = self.call(request).await?;
        match reply.error.take() {
            Some((errno, message)) => Err(ClientError::Failed { errno, message }),
            None => Ok(reply),
        }
    }

    /// Reads.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn read(&mut self, offset: u64, length: u64) -> Result<Vec<u8>> {
        Ok(self.succeed(Request { command: command::READ, offset, length, ..Request::default() }).await?.data)
    }

    /// Writes; `flags`: [`command_flag::FUA`] or none.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn write(&mut self, offset: u64, payload: &[u8], flags: u16) -> Result<()> {
        let request = self.write_request(offset, payload, flags);
        self.succeed(request).await.map(drop)
    }

    /// A write as this connection's style wants it.
    #[must_use]
    pub fn write_request<'a>(&self, offset: u64, payload: &'a [u8], flags: u16) -> Request<'a> {
        let flags = if self.style == Style::Extended { flags | command_flag::PAYLOAD_LEN } else { flags };
        Request { command: command::WRITE, flags, offset, length: payload.len() as u64, payload }
    }

    /// Any command without payload: FLUSH, TRIM, CACHE, WRITE_ZEROES.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn command(&mut self, command: u16, offset: u64, length: u64, flags: u16) -> Result<()> {
        self.succeed(Request { command, flags, offset, length, payload: &[] }).await.map(drop)
    }

    /// Makes what was written stable.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn flush(&mut self) -> Result<()> {
        self.command(command::FLUSH, 0, 0, 0).await
    }

    /// The allocation map: runs of length and state.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn block_status(&mut self, offset: u64, length: u64, flags: u16) -> Result<Vec<(u64, u64)>> {
        let request = Request { command: command::BLOCK_STATUS, flags, offset, length, payload: &[] };
        Ok(self.succeed(request).await?.extents)
    }

    /// Says goodbye and waits until the server has closed.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn disconnect(mut self) -> Result<()> {
        self.send(Request { command: command::DISC, ..Request::default() }).await?;
        check(self.io.read(&mut [0; 1]).await? == 0, "nothing but the end after a disconnect")
    }

    /// Receives one message.
    async fn receive(&mut self) -> Result<()> {
        match (self.io.read_u32().await?, self.style) {
            (SIMPLE_REPLY_MAGIC, Style::Simple | Style::Structured) => self.receive_simple().await,
            (STRUCTURED_REPLY_MAGIC, Style::Structured) | (EXTENDED_REPLY_MAGIC, Style::Extended) => {
                self.receive_chunk().await
            }
            _ => Err(ClientError::Protocol("magic of a reply")),
        }
    }

    async fn receive_simple(&mut self) -> Result<()> {
        let error = self.io.read_u32().await?;
        let cookie = self.io.read_u64().await?;
        let mut pending = need(self.pending.remove(&cookie), "cookie of a reply")?;
        check(self.style == Style::Simple || pending.command != command::READ, "reads are answered in chunks")?;
        check(pending.command != command::BLOCK_STATUS || error != 0, "a map comes in chunks")?;
        pending.reply.simple = true;
        if error != 0 {
            pending.reply.error = Some((error, String::new()));
        } else if pending.command == command::READ {
            pending.reply.data = vec![0; usize::try_from(pending.length).unwrap_or(0)];
            self.io.read_exact(&mut pending.reply.data).await?;
            pending.reply.parts.push((pending.offset, pending.length, false));
        }
        self.done.insert(cookie, pending.reply);
        Ok(())
    }

    async fn receive_chunk(&mut self) -> Result<()> {
        let extended = self.style == Style::Extended;
        let flags = self.io.read_u16().await?;
        let kind = self.io.read_u16().await?;
        let cookie = self.io.read_u64().await?;
        let offset = if extended { Some(self.io.read_u64().await?) } else { None };
        let length = if extended { self.io.read_u64().await? } else { u64::from(self.io.read_u32().await?) };
        check(length <= MESSAGE_BYTES_MAX, "length of a chunk")?;
        check(flags & !chunk::FLAG_DONE == 0, "flags of a chunk")?;
        let mut payload = vec![0; usize::try_from(length).unwrap_or(0)];
        self.io.read_exact(&mut payload).await?;
        let pending = need(self.pending.get_mut(&cookie), "cookie of a chunk")?;
        check(offset.is_none_or(|offset| offset == pending.offset), "offset of an extended reply")?;
        pending.take(kind, &payload, extended)?;
        if flags & chunk::FLAG_DONE != 0 {
            if let Some(pending) = self.pending.remove(&cookie) {
                self.done.insert(cookie, pending.finish()?);
            }
        } else {
            check(kind != chunk::NONE, "an empty chunk is the last")?;
        }
        Ok(())
    }
}

impl Pending {
    fn take(&mut self, kind: u16, payload: &[u8], extended: bool) -> Result<()> {
        let mut reader = Reader(payload);
        match kind {
            chunk::NONE => check(payload.is_empty(), "an empty chunk has no payload"),
            chunk::OFFSET_DATA => {
                let offset = need(reader.u64(), "layout of a data chunk")?;
                self.part(offset, reader.0.len() as u64, Some(reader.0))
            }
            chunk::OFFSET_HOLE => {
                let hole = need(reader.u64().zip(reader.u32()), "layout of a hole chunk")?;
                check(reader.0.is_empty(), "layout of a hole chunk")?;
                self.part(hole.0, u64::from(hole.1), None)
            }
            chunk::BLOCK_STATUS if !extended => self.map(payload, false),
            chunk::BLOCK_STATUS_EXT if extended => self.map(payload, true),
            chunk::ERROR | chunk::ERROR_OFFSET => {
                let (errno, length) = need(reader.u32().zip(reader.u16()), "layout of an error chunk")?;
                check(errno != 0, "an error has a number")?;
                let words = need(reader.bytes(usize::from(length)), "words of an error chunk")?;
                check(reader.0.len() == if kind == chunk::ERROR { 0 } else { 8 }, "layout of an error chunk")?;
                self.reply.error = Some((errno, String::from_utf8_lossy(words).into_owned()));
                Ok(())
            }
            _ => Err(ClientError::Protocol("type of a chunk")),
        }
    }

    fn part(&mut self, offset: u64, length: u64, data: Option<&[u8]>) -> Result<()> {
        check(self.command == command::READ && length > 0, "content answers a read")?;
        let end = need(offset.checked_add(length), "range of a content chunk")?;
        check(offset >= self.offset && end <= self.offset + self.length, "content inside the request")?;
        let overlaps = |&(start, bytes, _): &(u64, u64, bool)| start < end && offset < start + bytes;
        check(!self.reply.parts.iter().any(overlaps), "content that does not overlap")?;
        self.reply.data.resize(usize::try_from(self.length).unwrap_or(0), 0);
        if let Some(data) = data {
            let start = usize::try_from(offset - self.offset).unwrap_or(0);
            self.reply.data[start..start + data.len()].copy_from_slice(data);
        }
        self.reply.parts.push((offset, length, data.is_none()));
        Ok(())
    }

    fn map(&mut self, payload: &[u8], extended: bool) -> Result<()> {
        check(self.command == command::BLOCK_STATUS, "a map answers block status")?;
        check(self.reply.extents.is_empty(), "one map per context")?;
        let mut reader = Reader(payload);
        check(reader.u32() == Some(CONTEXT_ALLOCATION_ID), "id of the context")?;
        let count = if extended { reader.u32() } else { None };
        let step = if extended { 16 } else { 8 };
        check(!reader.0.is_empty() && reader.0.len().is_multiple_of(step), "layout of a map")?;
        check(count.is_none_or(|count| count as usize == reader.0.len() / step), "count of a map")?;
        let mut next = || {
            if extended {
                return reader.u64().zip(reader.u64());
            }
            reader.u32().map(u64::from).zip(reader.u32().map(u64::from))
        };
        while let Some((length, state)) = next() {
            check(length > 0, "an extent has bytes")?;
            self.reply.extents.push((length, state));
        }
        let but_last: u64 = self.reply.extents.iter().rev().skip(1).map(|(length, _)| length).sum();
        check(but_last < self.length, "only the last extent passes the request")
    }

    fn finish(self) -> Result<Reply> {
        let covered: u64 = self.reply.parts.iter().map(|(_, length, _)| length).sum();
        let complete = self.command != command::READ || self.reply.error.is_some() || covered == self.length;
        check(complete, "a read is answered in full")?;
        let mapped = self.command != command::BLOCK_STATUS || self.reply.error.is_some();
        check(mapped || !self.reply.extents.is_empty(), "a map has an extent")?;
        Ok(self.reply)
    }
}
