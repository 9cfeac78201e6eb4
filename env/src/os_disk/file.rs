//! Opening a file or block device for direct I/O, alone.

use crate::disk::Geometry;
use crate::error::{EnvError, file_error};
use crate::runtime::Env;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// How long an open waits for a lock that a handle just dropped still holds: its last requests run out first.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// [`DiskFile::slot`] without a registered descriptor.
pub(crate) const NO_SLOT: u32 = u32::MAX;

/// What to open.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// A file or a raw block device.
    pub path: PathBuf,
    /// Size of the file if it does not exist or is empty (then it is made, sparse); `None` opens only what exists. A block
    /// device keeps its size.
    pub create_bytes: Option<u64>,
}

impl DiskOptions {
    /// Opens what exists.
    #[must_use]
    pub fn existing(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), create_bytes: None }
    }

    /// Makes a file of `bytes` if there is none.
    #[must_use]
    pub fn create(path: impl Into<PathBuf>, bytes: u64) -> Self {
        Self { path: path.into(), create_bytes: Some(bytes) }
    }
}

/// An open disk, locked for this process.
pub(crate) struct DiskFile {
    file: File,
    path: PathBuf,
    geometry: Geometry,
    attachment: u64,
    poisoned: AtomicBool,
    /// Index among the ring's registered descriptors, once the driver has chosen one.
    pub(crate) slot: AtomicU32,
    /// Told that `slot` is free again.
    pub(crate) on_close: OnceLock<Box<dyn Fn(u32) + Send + Sync>>,
}

impl DiskFile {
    pub(crate) async fn open(env: &Env, options: DiskOptions) -> io::Result<Self> {
        let deadline = env.now().after(LOCK_WAIT);
        loop {
            let attempt = options.clone();
            match env.blocking(move || open_locked(attempt)).await {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && env.now() < deadline => {
                    env.sleep(Duration::from_millis(10)).await;
                }
                result => return result,
            }
        }
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub(crate) fn attachment(&self) -> u64 {
        self.attachment
    }

    /// Refuses every later write and flush (P4: a repeated flush may lie).
    pub(crate) fn poison(&self) {
        if !self.poisoned.swap(true, Ordering::AcqRel) {
            tracing::error!(disk = %self.path.display(), "flush failed; the disk takes no more writes");
        }
    }

    pub(crate) fn check_poison(&self) -> io::Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(EnvError::Poisoned { what: self.path.display().to_string() }.into_io());
        }
        Ok(())
    }

    pub(crate) fn error(&self, operation: &'static str, offset: u64, bytes: u64, source: io::Error) -> io::Error {
        EnvError::Disk { operation, disk: self.path.display().to_string(), offset, bytes, source }.into_io()
    }
}

impl Drop for DiskFile {
    fn drop(&mut self) {
        // The ring's table may hold the open file a little longer than we do; the lock must not last that long. No request
        // is in flight any more: each holds the file.
        // SAFETY: the descriptor is open.
        let _ = unsafe { libc::flock(self.descriptor(), libc::LOCK_UN) };
        let slot = *self.slot.get_mut();
        if let (Some(on_close), true) = (self.on_close.get(), slot != NO_SLOT) {
            on_close(slot);
        }
    }
}

fn open_locked(options: DiskOptions) -> io::Result<DiskFile> {
    let DiskOptions { path, create_bytes } = options;
    let fail = |operation| {
        let path = path.clone();
        move |source| file_error(operation, &path, source)
    };
    let is_device = std::fs::metadata(&path).is_ok_and(|found| found.file_type().is_block_device());
    let (file, direct) = open_direct(&path, create_bytes.is_some() && !is_device, is_device)?;
    lock(&file, &path)?;
    let found = file.metadata().map_err(fail("look at"))?;
    let geometry = if found.file_type().is_block_device() {
        device_geometry(&file).map_err(fail("measure"))?
    } else if found.is_file() {
        if let (0, Some(bytes)) = (found.len(), create_bytes) {
            size_new(&file, &path, bytes)?;
        }
        let sector = if direct { file_sector(&file) } else { 512 };
        let bytes = file.metadata().map_err(fail("look at"))?.len();
        Geometry { bytes: bytes / u64::from(sector) * u64::from(sector), sector }
    } else {
        return Err(fail("use as a disk")(io::ErrorKind::InvalidInput.into()));
    };
    if geometry.bytes == 0 || !matches!(geometry.sector, 512 | 1024 | 2048 | 4096) {
        return Err(fail("use as a disk")(io::ErrorKind::InvalidData.into()));
    }
    let attachment = attachment(&found);
    Ok(DiskFile {
        file,
        path,
        geometry,
        attachment,
        poisoned: AtomicBool::new(false),
        slot: AtomicU32::new(NO_SLOT),
        on_close: OnceLock::new(),
    })
}

/// Opens with O_DIRECT, or without it where the file system refuses (with a warning); says which.
fn open_direct(path: &Path, create: bool, is_device: bool) -> io::Result<(File, bool)> {
    // O_EXCL on a block device: refused while it is mounted or otherwise claimed.
    let exclusive = if is_device { libc::O_EXCL } else { 0 };
    let open = |flags| {
        OpenOptions::new().read(true).write(true).create(create).mode(0o600).custom_flags(flags | exclusive).open(path)
    };
    match open(libc::O_DIRECT) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let file = open(0).map_err(|source| file_error("open", path, source))?;
            tracing::warn!(disk = %path.display(), "no direct I/O on this file system; the page cache is used");
            Ok((file, false))
        }
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(EnvError::InUse(path.to_owned()).into_io()),
        Err(source) => Err(file_error("open", path, source)),
    }
}

fn lock(file: &File, path: &Path) -> io::Result<()> {
    // SAFETY: the descriptor is open.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock {
        return Err(EnvError::InUse(path.to_owned()).into_io());
    }
    Err(file_error("lock", path, error))
}

/// Gives a new file its size and makes that and its name durable.
fn size_new(file: &File, path: &Path, bytes: u64) -> io::Result<()> {
    let fail = |source| file_error("size", path, source);
    file.set_len(bytes).map_err(fail)?;
    file.sync_all().map_err(fail)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|directory| directory.sync_all()).map_err(|source| file_error("sync", parent, source))
}

fn device_geometry(file: &File) -> io::Result<Geometry> {
    // linux/fs.h; the C library crate does not have the first one on every target.
    const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
    const BLKSSZGET: libc::c_ulong = 0x1268;
    let (mut bytes, mut sector) = (0u64, 0 as libc::c_int);
    // SAFETY: both requests write one value of these types.
    let results = unsafe {
        [
            libc::ioctl(file.as_raw_fd(), BLKGETSIZE64 as _, &raw mut bytes),
            libc::ioctl(file.as_raw_fd(), BLKSSZGET as _, &raw mut sector),
        ]
    };
    if results != [0, 0] {
        return Err(io::Error::last_os_error());
    }
    let sector = u32::try_from(sector).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(Geometry { bytes: bytes / u64::from(sector.max(1)) * u64::from(sector), sector })
}

/// The kernel's number of the disk's attachment (`diskseq`, since Linux 5.15), of the one below for a file; a partition has its disk's.
/// 0 where the kernel does not tell, as below a file system that is on no single disk.
fn attachment(found: &Metadata) -> u64 {
    let number = if found.file_type().is_block_device() { found.rdev() } else { found.dev() };
    let disk = PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number)));
    let read = |path: PathBuf| std::fs::read_to_string(path).ok()?.trim().parse().ok();
    read(disk.join("diskseq")).or_else(|| read(disk.join("../diskseq"))).unwrap_or_default()
}

/// What direct I/O on this file asks of offsets, lengths and memory; 512 where the kernel does not tell.
fn file_sector(file: &File) -> u32 {
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH asks about the descriptor; `found` is valid for writes.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, found.as_mut_ptr())
    };
    // SAFETY: zeroed is a valid value, and so is what the kernel wrote.
    let found = unsafe { found.assume_init() };
    if result != 0 || found.stx_mask & libc::STATX_DIOALIGN == 0 {
        return 512;
    }
    found.stx_dio_offset_align.max(found.stx_dio_mem_align).max(512)
}
