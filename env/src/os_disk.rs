//! Disks of the operating system: a file or a raw block device under O_DIRECT.
//!
//! An [`IoDriver`] (one per process) runs the requests of all its disks: through io_uring, or where that is forbidden
//! through a pool of threads. Bound: the callers' own admission; at most 1024 requests are in the kernel, the others wait
//! in the driver's list.
#![allow(unsafe_code)]

mod file;
mod request;

pub use file::DiskOptions;
pub(crate) use file::{DiskFile, NO_SLOT};
pub(crate) use request::{Next, PUNCH, Request, Step};

use crate::buf::{Buf, BufMut, BufPool};
use crate::disk::{Disk, Geometry, IoFuture, ready};
use crate::runtime::Env;
use crate::threads::Threads;
use crate::uring::Uring;
use request::{Body, DoneFuture, ReadFuture};
use std::io;
use std::sync::Arc;

/// How requests reach the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// io_uring where the kernel allows it, else threads (with one warning). `XSAN_IO_BACKEND` (`uring`, `threads`)
    /// decides instead if it is set.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// A pool of threads that read and write.
    Threads,
}

/// Runs the requests of all disks opened through it; cheap to clone. It ends when the last clone and the last disk are gone.
#[derive(Clone)]
pub struct IoDriver {
    env: Env,
    engine: Engine,
}

#[derive(Clone)]
pub(crate) enum Engine {
    Uring(Uring),
    Threads(Threads),
}

impl Engine {
    fn start(&self, request: Arc<Request>) {
        match self {
            Self::Uring(uring) => uring.submit(request),
            Self::Threads(threads) => threads.submit(request),
        }
    }
}

impl IoDriver {
    /// Starts a driver; to be called inside the tokio runtime that `env` stands for. The arena of `pool` is registered
    /// with the kernel if the memlock limit allows it (else one warning, and a little more CPU per request).
    ///
    /// # Errors
    /// When the wanted backend cannot be had.
    pub fn start(env: &Env, pool: &BufPool, backend: Backend) -> io::Result<Self> {
        let engine = match forced(backend, std::env::var("XSAN_IO_BACKEND").ok().as_deref())? {
            Backend::Threads => Engine::Threads(Threads::start()?),
            Backend::Uring => Engine::Uring(Uring::start(env, pool)?),
            Backend::Auto => match Uring::start(env, pool) {
                Ok(uring) => Engine::Uring(uring),
                Err(error) => {
                    tracing::warn!(%error, "io_uring cannot be used; disks go through threads and cost more CPU");
                    Engine::Threads(Threads::start()?)
                }
            },
        };
        Ok(Self { env: env.clone(), engine })
    }

    /// `uring` or `threads`.
    #[must_use]
    pub fn backend(&self) -> &'static str {
        match self.engine {
            Engine::Uring(_) => "uring",
            Engine::Threads(_) => "threads",
        }
    }

    /// Opens a disk for this process alone.
    ///
    /// # Errors
    /// `ResourceBusy` when another process (or another handle of this one) has it, `NotFound` without `create_bytes`,
    /// and those of the operating system.
    pub async fn open_disk(&self, options: DiskOptions) -> io::Result<Arc<dyn Disk>> {
        #[cfg(any(test, feature = "faults"))]
        let path = options.path.clone();
        let file = DiskFile::open(&self.env, options).await?;
        let disk: Arc<dyn Disk> = Arc::new(OsDisk { file: Arc::new(file), engine: self.engine.clone() });
        #[cfg(any(test, feature = "faults"))]
        if let Some(faults) = crate::faults::Faults::of_process() {
            return crate::faults::HeldDisk::open(&self.env, faults, disk, &path).await;
        }
        Ok(disk)
    }
}

/// The backend to use, given the value of `XSAN_IO_BACKEND`.
fn forced(backend: Backend, variable: Option<&str>) -> io::Result<Backend> {
    match (backend, variable) {
        (Backend::Auto, Some("uring")) => Ok(Backend::Uring),
        (Backend::Auto, Some("threads")) => Ok(Backend::Threads),
        (Backend::Auto, Some(other)) if !other.is_empty() => {
            let text = format!("XSAN_IO_BACKEND is {other:?}, not `uring` or `threads`");
            Err(io::Error::new(io::ErrorKind::InvalidInput, text))
        }
        (backend, _) => Ok(backend),
    }
}

/// An opened disk.
struct OsDisk {
    file: Arc<DiskFile>,
    engine: Engine,
}

impl OsDisk {
    fn start(&self, offset: u64, bytes: u64, body: Body) -> Arc<Request> {
        let request = Request::new(&self.file, offset, bytes, body);
        self.engine.start(Arc::clone(&request));
        request
    }

    fn write_body(&self, offset: u64, bytes: u64, body: Body) -> IoFuture<()> {
        if let Err(error) = self.file.check_poison() {
            return ready(Err(error));
        }
        Box::pin(DoneFuture(self.start(offset, bytes, body)))
    }
}

impl Disk for OsDisk {
    fn geometry(&self) -> Geometry {
        self.file.geometry()
    }

    fn attachment(&self) -> u64 {
        self.file.attachment()
    }

    fn read(&self, offset: u64, into: BufMut) -> IoFuture<BufMut> {
        let bytes = into.len() as u64;
        if let Err(error) = self.file.geometry().check("read", offset, bytes, std::iter::once(&*into)) {
            return ready(Err(error));
        }
        Box::pin(ReadFuture(self.start(offset, bytes, Body::Read(into))))
    }

    fn write(&self, offset: u64, data: Buf) -> IoFuture<()> {
        let bytes = data.len() as u64;
        if let Err(error) = self.file.geometry().check("write", offset, bytes, std::iter::once(&*data)) {
            return ready(Err(error));
        }
        self.write_body(offset, bytes, Body::Write(data))
    }

    fn write_vectored(&self, offset: u64, mut data: Vec<Buf>) -> IoFuture<()> {
        let bytes = data.iter().map(|piece| piece.len() as u64).sum();
        if let Err(error) = self.file.geometry().check("write", offset, bytes, data.iter().map(|piece| &**piece)) {
            return ready(Err(error));
        }
        let body = if data.len() == 1 { Body::Write(data.swap_remove(0)) } else { Body::Gather(data) };
        self.write_body(offset, bytes, body)
    }

    fn flush(&self) -> IoFuture<()> {
        self.write_body(0, 0, Body::Flush)
    }

    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<()> {
        if let Err(error) = self.file.geometry().check("discard", offset, bytes, std::iter::empty()) {
            return ready(Err(error));
        }
        self.write_body(offset, bytes, Body::Discard)
    }
}

#[cfg(test)]
mod tests;
