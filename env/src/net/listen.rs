//! Where connections come from.

use super::Stream;
use crate::error::{EnvError, file_error};
use std::ffi::CString;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tokio::net::{TcpListener, UnixListener, UnixSocket, UnixStream};
use tokio::sync::{Mutex, mpsc};

/// Connections that may wait for `accept`; more are refused (TCP: delayed) by the kernel.
const BACKLOG: u32 = 1024;

/// Who may connect to a unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixOptions {
    /// Permission bits of the socket file, set before anybody can connect.
    pub mode: u32,
    /// Group of the socket file; `None` keeps the process' group.
    pub group: Option<String>,
}

impl Default for UnixOptions {
    fn default() -> Self {
        Self { mode: 0o600, group: None }
    }
}

/// A listening socket.
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A unix socket; its file goes when the listener does.
    Unix(UnixListener, SocketFile),
    /// Connections made by a [`Dialer`].
    Memory(Mutex<mpsc::Receiver<Stream>>),
}

/// The file of a unix socket; removed at the end, if it is still ours.
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            // Left behind, it is stale, and the next listener removes it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// Connects to a memory listener; cheap to clone.
#[derive(Clone)]
pub struct Dialer {
    sender: mpsc::Sender<Stream>,
    bytes: usize,
}

impl Dialer {
    /// A new connection.
    ///
    /// # Errors
    /// `ConnectionRefused` when the listener is gone.
    pub async fn connect(&self) -> io::Result<Stream> {
        let (ours, theirs) = Stream::memory_pair(self.bytes);
        self.sender.send(theirs).await.map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(ours)
    }
}

impl Listener {
    /// Listens on TCP; port 0 takes a free one. The address can be used again at once after a restart.
    ///
    /// # Errors
    /// Those of the operating system.
    pub async fn tcp(address: SocketAddr) -> io::Result<Self> {
        Ok(Self::Tcp(TcpListener::bind(address).await?))
    }

    /// Listens on a unix socket. Mode and group are in force before the first connection can be made. A socket file
    /// that nobody listens on is removed first.
    ///
    /// # Errors
    /// `AddrInUse` when somebody listens there, `AlreadyExists` when the file is no socket, `NotFound` for an unknown
    /// group, and those of the operating system.
    pub async fn unix(path: impl Into<PathBuf>, options: &UnixOptions) -> io::Result<Self> {
        let path: PathBuf = path.into();
        remove_stale(&path).await?;
        let fail = |operation| move |source| (operation, source);
        let listen = || -> Result<(UnixListener, SocketFile), (&'static str, io::Error)> {
            let group = options.group.as_deref().map(group_id).transpose().map_err(fail("find the group of"))?;
            let socket = UnixSocket::new_stream().map_err(fail("make"))?;
            socket.bind(&path).map_err(fail("bind"))?;
            // From here on the file is removed again if anything fails.
            let identity = identity(&path).map_err(fail("look at"))?;
            let file = SocketFile { path: path.clone(), identity };
            // The group first: were the mode set first, the old group could connect for a moment (it cannot: nobody
            // listens yet; the order costs nothing).
            if let Some(group) = group {
                std::os::unix::fs::chown(&path, None, Some(group)).map_err(fail("set the group of"))?;
            }
            let mode = std::fs::Permissions::from_mode(options.mode & 0o777);
            std::fs::set_permissions(&path, mode).map_err(fail("set the mode of"))?;
            Ok((socket.listen(BACKLOG).map_err(fail("listen on"))?, file))
        };
        let (listener, file) = listen().map_err(|(operation, source)| file_error(operation, &path, source))?;
        Ok(Self::Unix(listener, file))
    }

    /// A listener in memory and the way to connect to it; each direction of a connection holds `bytes`.
    #[must_use]
    pub fn memory(bytes: usize) -> (Self, Dialer) {
        let (sender, receiver) = mpsc::channel(64);
        (Self::Memory(Mutex::new(receiver)), Dialer { sender, bytes })
    }

    /// The next connection. Safe to drop.
    ///
    /// # Errors
    /// Those of the operating system (out of descriptors: wait a little, then go on); a memory listener without any
    /// dialer left says `BrokenPipe`.
    pub async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => Stream::tcp(listener.accept().await?.0),
            Self::Unix(listener, _) => Ok(Stream::unix(listener.accept().await?.0)),
            Self::Memory(receiver) => {
                receiver.lock().await.recv().await.ok_or_else(|| io::ErrorKind::BrokenPipe.into())
            }
        }
    }

    /// The TCP address, with the port the system chose.
    #[must_use]
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            _ => None,
        }
    }

    /// Where it listens, for logs: `tcp:0.0.0.0:10809`, `unix:/run/xsan/nbd.sock`, `memory`.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Tcp(_) => self.tcp_address().map_or_else(|| "tcp:?".into(), |address| format!("tcp:{address}")),
            Self::Unix(_, file) => format!("unix:{}", file.path.display()),
            Self::Memory(_) => "memory".into(),
        }
    }
}

async fn remove_stale(path: &Path) -> io::Result<()> {
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(file_error("look at", path, source)),
    };
    if !found.file_type().is_socket() {
        return Err(file_error("listen on", path, io::ErrorKind::AlreadyExists.into()));
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|source| file_error("remove the stale", path, source))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Somebody listens, or has a full backlog, or does not let us connect: not ours to remove.
        _ => Err(EnvError::File {
            operation: "listen on",
            path: path.to_owned(),
            source: io::ErrorKind::AddrInUse.into(),
        }
        .into_io()),
    }
}

/// Number of a group of the host.
fn group_id(name: &str) -> io::Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut entry = std::mem::MaybeUninit::<libc::group>::uninit();
    let mut found = std::ptr::null_mut();
    let mut room: Vec<libc::c_char> = vec![0; 16 << 10];
    loop {
        // SAFETY: all pointers are valid for the call; `room` has the length that is passed.
        let result = unsafe {
            libc::getgrnam_r(name.as_ptr(), entry.as_mut_ptr(), room.as_mut_ptr(), room.len(), &raw mut found)
        };
        match result {
            0 if found.is_null() => return Err(io::ErrorKind::NotFound.into()),
            // SAFETY: a result of 0 with `found` set means the entry was filled in.
            0 => return Ok(unsafe { entry.assume_init() }.gr_gid),
            libc::ERANGE if room.len() < 1 << 20 => room.resize(room.len() * 2, 0),
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
}
