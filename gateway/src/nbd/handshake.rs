//! Option haggling as a state machine without I/O: an option goes in, a [`Step`] comes out.
//!
//! What needs the world (names of exports, opening one, TLS) is a step for the connection to do; it brings the answer
//! back to a `*_reply` call. Owner: the connection's task. Limits on time, count and size of options are the
//! connection's, see [`super::connection`].

use super::proto::{
    CONTEXT_ALLOCATION, CONTEXT_ALLOCATION_ID, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, QUERIES_MAX, Reader,
    STRING_BYTES_MAX, Style, export_flag, handshake_flag, info, option, option_reply, string,
};
use super::request::Rules;
use crate::export::ExportInfo;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Bytes of the server's greeting.
pub const GREETING_BYTES: usize = 18;

/// What the server sends first: fixed newstyle, and no zeroes if the client likes.
#[must_use]
pub fn greeting() -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    bytes[..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).to_be_bytes());
    bytes
}

/// When TLS is needed.
#[derive(Clone, Debug, Default)]
pub enum TlsMode {
    /// STARTTLS is refused.
    #[default]
    Off,
    /// STARTTLS is possible; the named exports are served only after it.
    Selective(Arc<BTreeSet<String>>),
    /// Nothing but STARTTLS and ABORT is answered before it.
    Required,
}

/// Wish to see an export: INFO or GO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoQuery {
    /// Name as sent; empty means the default export.
    pub name: String,
    /// GO: start the transmission after the reply.
    pub go: bool,
    /// Items asked for.
    wants_name: bool,
    wants_description: bool,
}

/// Wish to see or choose metadata contexts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaQuery {
    /// Name as sent; empty means the default export.
    pub name: String,
    /// SET, not LIST.
    pub set: bool,
    /// `base:allocation` is among what matches.
    allocation: bool,
}

/// What to do after an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send this; go on.
    Reply(Vec<u8>),
    /// Send this and close.
    Goodbye(Vec<u8>),
    /// Close: no error can be told.
    Close,
    /// Send this, then do the TLS handshake, then [`Handshake::tls_started`].
    StartTls(Vec<u8>),
    /// Ask for the names, then [`Handshake::list_reply`].
    List,
    /// Look the export up or open it, then [`Handshake::info_reply`].
    Info(InfoQuery),
    /// Open the export, then [`Handshake::export_name_reply`]; close if that fails.
    Export(String),
    /// Look the export up, then [`Handshake::meta_reply`].
    Meta(MetaQuery),
}

/// Longest reason that a client is told: the protocol allows strings of 4096 bytes.
const REASON_CHARS_MAX: usize = 1000;

/// Why an export is not shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Absent {
    /// There is none of that name.
    Unknown,
    /// It cannot be served now, and why.
    Unavailable(String),
    /// The server is stopping.
    Shutdown,
}

/// State of one connection's negotiation.
#[derive(Debug)]
pub struct Handshake {
    tls: TlsMode,
    encrypted: bool,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
    extended: bool,
    /// Export name of the last successful SET_META_CONTEXT that chose `base:allocation`.
    allocation_of: Option<String>,
}

impl Handshake {
    /// A fresh negotiation.
    #[must_use]
    pub fn new(tls: TlsMode) -> Self {
        Self {
            tls,
            encrypted: false,
            fixed: false,
            no_zeroes: false,
            structured: false,
            extended: false,
            allocation_of: None,
        }
    }

    /// Takes the client's flags; `false`: unknown ones, the connection must be closed.
    #[must_use]
    pub fn client_flags(&mut self, flags: u32) -> bool {
        let fixed = u32::from(handshake_flag::FIXED_NEWSTYLE);
        let no_zeroes = u32::from(handshake_flag::NO_ZEROES);
        self.fixed = flags & fixed != 0;
        self.no_zeroes = flags & no_zeroes != 0;
        flags & !(fixed | no_zeroes) == 0
    }

    /// Whether the connection is encrypted.
    #[must_use]
    pub fn encrypted(&self) -> bool {
        self.encrypted
    }

    /// TLS is up: everything negotiated before it is forgotten.
    pub fn tls_started(&mut self) {
        self.encrypted = true;
        self.structured = false;
        self.extended = false;
        self.allocation_of = None;
    }

    /// Takes a whole option. Untrusted: any bytes are fine here.
    pub fn option(&mut self, code: u32, data: &[u8]) -> Step {
        if !self.fixed && code != option::EXPORT_NAME {
            // Plain newstyle knows no reply to an option.
            return Step::Close;
        }
        if let Some(step) = self.tls_first(code) {
            return step;
        }
        match code {
            option::EXPORT_NAME => self.export_name(data),
            option::ABORT => Step::Goodbye(ack(code)),
            option::LIST if data.is_empty() => Step::List,
            option::STARTTLS => self.start_tls(data),
            option::INFO | option::GO => self.info(code, data),
            option::STRUCTURED_REPLY if data.is_empty() && self.extended => {
                refuse(code, option_reply::ERR_EXT_HEADER_REQD, "extended headers are already in use")
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                Step::Reply(ack(code))
            }
            option::EXTENDED_HEADERS if data.is_empty() => {
                self.extended = true;
                Step::Reply(ack(code))
            }
            option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => {
                refuse(code, option_reply::ERR_INVALID, "this option takes no data")
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta(code, data),
            _ => refuse(code, option_reply::ERR_UNSUP, "unknown option"),
        }
    }

    /// The reply to an option whose data is too long to be looked at; the data has been thrown away.
    #[must_use]
    pub fn too_big(&self, code: u32) -> Step {
        match code {
            _ if !self.fixed => Step::Close,
            option::EXPORT_NAME => Step::Close,
            option::ABORT => Step::Goodbye(ack(code)),
            _ if self.must_encrypt() => refuse(code, option_reply::ERR_TLS_REQD, "TLS is required"),
            option::LIST..=option::EXTENDED_HEADERS => {
                refuse(code, option_reply::ERR_TOO_BIG, "the option is too long")
            }
            _ => refuse(code, option_reply::ERR_UNSUP, "unknown option"),
        }
    }

    /// The reply to any option while the server stops.
    #[must_use]
    pub fn stopping(&self, code: u32) -> Step {
        match code {
            _ if !self.fixed => Step::Close,
            option::EXPORT_NAME => Step::Close,
            option::ABORT => Step::Goodbye(ack(code)),
            _ => refuse(code, option_reply::ERR_SHUTDOWN, "the server is stopping"),
        }
    }

    fn must_encrypt(&self) -> bool {
        !self.encrypted && matches!(self.tls, TlsMode::Required)
    }

    fn only_encrypted(&self, name: &str) -> bool {
        !self.encrypted && matches!(&self.tls, TlsMode::Selective(only) if only.contains(name))
    }

    fn tls_first(&self, code: u32) -> Option<Step> {
        if !self.must_encrypt() || matches!(code, option::STARTTLS | option::ABORT) {
            return None;
        }
        Some(match code {
            option::EXPORT_NAME => Step::Close,
            _ => refuse(code, option_reply::ERR_TLS_REQD, "TLS is required"),
        })
    }

    fn start_tls(&self, data: &[u8]) -> Step {
        let code = option::STARTTLS;
        match self.tls {
            TlsMode::Off => refuse(code, option_reply::ERR_POLICY, "TLS is not offered here"),
            _ if self.encrypted => refuse(code, option_reply::ERR_INVALID, "TLS is already in use"),
            _ if !data.is_empty() => refuse(code, option_reply::ERR_INVALID, "this option takes no data"),
            _ => Step::StartTls(ack(code)),
        }
    }

    fn export_name(&self, data: &[u8]) -> Step {
        // With extended headers only GO may end the haggling.
        match string(data) {
            Some(name) if !self.extended && !self.only_encrypted(name) => Step::Export(name.to_owned()),
            _ => Step::Close,
        }
    }

    fn info(&self, code: u32, data: &[u8]) -> Step {
        let Some(query) = parse_info(code, data) else {
            return refuse(code, option_reply::ERR_INVALID, "malformed option");
        };
        if self.only_encrypted(&query.name) {
            return refuse(code, option_reply::ERR_TLS_REQD, "this export is served over TLS only");
        }
        Step::Info(query)
    }

    fn meta(&mut self, code: u32, data: &[u8]) -> Step {
        if code == option::SET_META_CONTEXT {
            // The last choice is gone even if this one fails.
            self.allocation_of = None;
        }
        if !self.structured && !self.extended {
            return refuse(code, option_reply::ERR_INVALID, "structured replies must be negotiated first");
        }
        match parse_meta(code, data) {
            // TLS_REQD may not answer this option; to a client in clear text the export does not exist.
            Some(query) if self.only_encrypted(&query.name) => {
                refuse(code, option_reply::ERR_UNKNOWN, "no such export")
            }
            Some(query) => Step::Meta(query),
            None => refuse(code, option_reply::ERR_INVALID, "malformed option"),
        }
    }

    /// The answer to LIST: names with descriptions. Names that need TLS are left out before it.
    #[must_use]
    pub fn list_reply(&self, exports: &[(String, String)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, description) in exports.iter().filter(|(name, _)| !self.only_encrypted(name)) {
            let mut data = Vec::with_capacity(4 + name.len() + description.len());
            data.extend(u32::try_from(name.len()).unwrap_or(0).to_be_bytes());
            data.extend(name.as_bytes());
            data.extend(clip(description).as_bytes());
            reply(&mut bytes, option::LIST, option_reply::SERVER, &data);
        }
        reply(&mut bytes, option::LIST, option_reply::ACK, &[]);
        bytes
    }

    /// The answer to INFO and GO.
    #[must_use]
    pub fn info_reply(&self, query: &InfoQuery, found: Result<&ExportInfo, Absent>) -> Vec<u8> {
        let code = if query.go { option::GO } else { option::INFO };
        let mut bytes = Vec::new();
        let export = match found {
            Ok(export) => export,
            Err(Absent::Unknown) => {
                reply(&mut bytes, code, option_reply::ERR_UNKNOWN, b"no such export");
                return bytes;
            }
            Err(Absent::Unavailable(why)) => {
                let why: String = why.chars().take(REASON_CHARS_MAX).collect();
                let text = format!("the export cannot be served now: {why}");
                reply(&mut bytes, code, option_reply::ERR_UNKNOWN, text.as_bytes());
                return bytes;
            }
            Err(Absent::Shutdown) => {
                reply(&mut bytes, code, option_reply::ERR_SHUTDOWN, b"the server is stopping");
                return bytes;
            }
        };
        let mut item = |kind: u16, payload: &[&[u8]]| {
            let data = [&[&kind.to_be_bytes()[..]], payload].concat().concat();
            reply(&mut bytes, code, option_reply::INFO, &data);
        };
        let flags = self.transmission_flags(&query.name, export);
        item(info::EXPORT, &[&export.size.to_be_bytes(), &flags.to_be_bytes()]);
        // Sent unasked as well: the smallest block is larger than the default of one byte.
        item(
            info::BLOCK_SIZE,
            &[
                &export.block_min.to_be_bytes(),
                &export.block_preferred.to_be_bytes(),
                &export.payload_max.to_be_bytes(),
            ],
        );
        if query.wants_name {
            item(info::NAME, &[export.name.as_bytes()]);
        }
        if query.wants_description && !export.description.is_empty() {
            item(info::DESCRIPTION, &[clip(&export.description).as_bytes()]);
        }
        reply(&mut bytes, code, option_reply::ACK, &[]);
        bytes
    }

    /// The answer to EXPORT_NAME.
    #[must_use]
    pub fn export_name_reply(&self, name: &str, export: &ExportInfo) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(134);
        bytes.extend(export.size.to_be_bytes());
        bytes.extend(self.transmission_flags(name, export).to_be_bytes());
        if !self.no_zeroes {
            bytes.extend([0; 124]);
        }
        bytes
    }

    /// The answer to LIST_META_CONTEXT and SET_META_CONTEXT; a successful SET takes effect here. `exists`: there is an
    /// export of that name.
    pub fn meta_reply(&mut self, query: MetaQuery, exists: bool) -> Vec<u8> {
        let code = if query.set { option::SET_META_CONTEXT } else { option::LIST_META_CONTEXT };
        let mut bytes = Vec::new();
        if !exists {
            reply(&mut bytes, code, option_reply::ERR_UNKNOWN, b"no such export");
            return bytes;
        }
        if query.allocation {
            // The id is reserved in a list.
            let id = if query.set { CONTEXT_ALLOCATION_ID } else { 0 };
            let data = [&id.to_be_bytes()[..], CONTEXT_ALLOCATION.as_bytes()].concat();
            reply(&mut bytes, code, option_reply::META_CONTEXT, &data);
        }
        reply(&mut bytes, code, option_reply::ACK, &[]);
        if query.set && query.allocation {
            self.allocation_of = Some(query.name);
        }
        bytes
    }

    fn style(&self) -> Style {
        match (self.extended, self.structured) {
            (true, _) => Style::Extended,
            (false, true) => Style::Structured,
            (false, false) => Style::Simple,
        }
    }

    fn has_status(&self, name: &str) -> bool {
        self.allocation_of.as_deref() == Some(name)
    }

    /// What the transmission goes by. `name`: the export's name as the client sent it.
    #[must_use]
    pub fn rules(&self, name: &str, export: &ExportInfo) -> Rules {
        Rules {
            style: self.style(),
            size: export.size,
            block_min: export.block_min,
            block_preferred: export.block_preferred,
            payload_max: export.payload_max,
            read_only: export.read_only,
            status: self.has_status(name),
        }
    }

    fn transmission_flags(&self, name: &str, export: &ExportInfo) -> u16 {
        use export_flag as flag;
        let mut flags = flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_TRIM
            | flag::SEND_WRITE_ZEROES
            | flag::SEND_CACHE
            | flag::SEND_FAST_ZERO;
        if export.read_only {
            flags |= flag::READ_ONLY;
            flags &= !(flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO);
        }
        if export.multi_conn {
            flags |= flag::CAN_MULTI_CONN;
        }
        if self.style().chunked() {
            flags |= flag::SEND_DF;
        }
        if self.style() == Style::Extended && self.has_status(name) {
            flags |= flag::BLOCK_STATUS_PAYLOAD;
        }
        flags
    }
}

/// A string cut to the protocol's longest, at a character.
fn clip(text: &str) -> &str {
    let end = (0..=STRING_BYTES_MAX.min(text.len())).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    &text[..end]
}

fn parse_info(code: u32, data: &[u8]) -> Option<InfoQuery> {
    let mut reader = Reader(data);
    let name = reader.string()?.to_owned();
    let count = reader.u16()?;
    if reader.0.len() != usize::from(count) * 2 {
        return None;
    }
    let mut query = InfoQuery { name, go: code == option::GO, wants_name: false, wants_description: false };
    while let Some(item) = reader.u16() {
        query.wants_name |= item == info::NAME;
        query.wants_description |= item == info::DESCRIPTION;
    }
    Some(query)
}

fn parse_meta(code: u32, data: &[u8]) -> Option<MetaQuery> {
    let mut reader = Reader(data);
    let name = reader.string()?.to_owned();
    let count = reader.u32()?;
    let set = code == option::SET_META_CONTEXT;
    if count > QUERIES_MAX {
        return None;
    }
    // No query: a list shows everything, a choice chooses nothing.
    let mut allocation = count == 0 && !set;
    for _ in 0..count {
        let (namespace, leaf) = reader.string()?.split_once(':')?;
        if namespace == "base" {
            allocation |= leaf == "allocation" || (leaf.is_empty() && !set);
        }
    }
    reader.0.is_empty().then_some(MetaQuery { name, set, allocation })
}

fn reply(bytes: &mut Vec<u8>, code: u32, kind: u32, data: &[u8]) {
    bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    bytes.extend(code.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    bytes.extend(data);
}

fn ack(code: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    reply(&mut bytes, code, option_reply::ACK, &[]);
    bytes
}

fn refuse(code: u32, kind: u32, reason: &str) -> Step {
    let mut bytes = Vec::new();
    reply(&mut bytes, code, kind, reason.as_bytes());
    Step::Reply(bytes)
}
