//! What an [`std::io::Error`] of this crate carries inside, and how to read it.
//!
//! Disks, files and sockets speak `io::Result` because that is what the code above composes with; the typed cause with
//! the place (path, offset) is the error's inner value, so that every message names both.

use std::io;
use std::path::PathBuf;
use xsan_types::ErrorKind;

/// The typed cause inside an [`io::Error`] of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnvError {
    /// A disk request failed.
    #[error("{operation} of {bytes} bytes at {offset} on {disk}: {source}")]
    Disk {
        /// `read`, `write`, `flush` or `discard`.
        operation: &'static str,
        /// Path of the disk, or the name of a memory disk.
        disk: String,
        /// First byte of the request.
        offset: u64,
        /// Length of the request.
        bytes: u64,
        /// What the operating system (or the fault plan) said.
        source: io::Error,
    },
    /// A disk request that no disk can serve: outside the disk or not aligned to its sector.
    #[error("{operation} of {bytes} bytes at {offset} refused: the disk has {disk_bytes} bytes in sectors of {sector}")]
    Refused {
        /// `read`, `write` or `discard`.
        operation: &'static str,
        /// First byte of the request.
        offset: u64,
        /// Length of the request.
        bytes: u64,
        /// Size of the disk.
        disk_bytes: u64,
        /// Logical sector of the disk.
        sector: u32,
    },
    /// A flush failed earlier (or a write after which the state is unknown); nothing may be written any more (P4).
    #[error("{what} is poisoned by an earlier failed flush")]
    Poisoned {
        /// Path of the disk or file.
        what: String,
    },
    /// A file or directory operation failed.
    #[error("{operation} {path}: {source}", path = path.display())]
    File {
        /// `open`, `read`, `rename` …
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system (or the fault plan) said.
        source: io::Error,
    },
    /// A name that a directory does not take: empty, hidden, with a separator or longer than 200 bytes.
    #[error("{0:?} is no file name")]
    Name(String),
    /// The device is used by another process (or by another handle of this one).
    #[error("{path} is in use by another process", path = .0.display())]
    InUse(PathBuf),
    /// A handle from before a crash was used after it (memory disks and directories only).
    #[error("the handle on {what} died in a crash")]
    Crashed {
        /// Name of the disk or file.
        what: String,
    },
}

impl EnvError {
    /// Wraps the error so that its [`io::ErrorKind`] stays that of the cause.
    #[must_use]
    pub fn into_io(self) -> io::Error {
        let kind = match &self {
            Self::Disk { source, .. } | Self::File { source, .. } => source.kind(),
            Self::Refused { .. } | Self::Name(_) => io::ErrorKind::InvalidInput,
            Self::InUse(_) => io::ErrorKind::ResourceBusy,
            Self::Poisoned { .. } | Self::Crashed { .. } => io::ErrorKind::Other,
        };
        io::Error::new(kind, self)
    }
}

/// The operating system's number behind an error, if there is one.
#[must_use]
pub fn errno(error: &io::Error) -> Option<i32> {
    if let Some(number) = error.raw_os_error() {
        return Some(number);
    }
    match error.get_ref()?.downcast_ref::<EnvError>()? {
        EnvError::Disk { source, .. } | EnvError::File { source, .. } => errno(source),
        _ => None,
    }
}

/// What the caller can do about an error of a disk, file or socket.
#[must_use]
pub fn kind(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => ErrorKind::NoSpace,
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        io::ErrorKind::AlreadyExists => ErrorKind::Exists,
        io::ErrorKind::InvalidInput | io::ErrorKind::PermissionDenied => ErrorKind::Invalid,
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => ErrorKind::Closed,
        io::ErrorKind::InvalidData => ErrorKind::Corrupt,
        _ => ErrorKind::Unavailable,
    }
}

/// An [`EnvError::File`] as `io::Error`.
pub(crate) fn file_error(operation: &'static str, path: &std::path::Path, source: io::Error) -> io::Error {
    EnvError::File { operation, path: path.to_owned(), source }.into_io()
}
