//! What a caller can do about an error.

/// The kind of an error; every library error maps to one through its `kind()`. The table in `docs/errors.md` maps kinds to NBD errno, CLI
/// exit code and retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request itself is wrong; it will be refused again. Correct it.
    Invalid,
    /// What was named does not exist. Check the name.
    NotFound,
    /// What should be made exists already. Choose another name.
    Exists,
    /// No room left. Free or add space; nothing was lost.
    NoSpace,
    /// A part that is needed is away (node down, too few shards). Retry: it may come back.
    Unavailable,
    /// A newer owner exists or the member is closed. Stop for ever; never retry under the same generation.
    Fenced,
    /// Bytes failed verification and could not be had elsewhere. Alert; do not overwrite what is left.
    Corrupt,
    /// The thing is shutting down or closed. Reconnect later.
    Closed,
    /// A bug or an unexpected answer of the operating system. Report it.
    Internal,
}
