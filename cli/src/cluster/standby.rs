//! Standby: clients may open a volume here that another node still serves, as QEMU does while a guest migrates (RFC 0008). They read from
//! the owner; the first change moves the volume here.

use super::export::{VolumeExport, export_key, volume_info};
use super::host::Host;
use super::volumes::Attached;
use crate::error::ClusterError;
use lsm_block::Piece;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::OnceCell;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Buf, Moment};
use xsan_gateway::{Export, ExportError, ExportInfo, ReadPiece, StatusExtent, Transport};
use xsan_types::{ErrorKind, VolumeId};

/// How long after the grant a client may come.
pub const OPEN_WITHIN: Duration = Duration::from_secs(600);
/// Largest piece that the owner is asked for.
const READ_BYTES_MAX: u32 = 1 << 20;
/// How long the owner has for a piece.
const READ_WITHIN: Duration = Duration::from_secs(2);
/// How long a read is tried.
const READ_FOR: Duration = Duration::from_secs(60);
/// Until a read is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(250);

/// The right to open a volume here while it is served elsewhere, and to move it here once.
#[derive(Debug)]
pub struct Grant {
    since: Moment,
    is_used: AtomicBool,
}

/// Asks the owner of a volume for bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Read {
    /// Of which.
    pub volume: VolumeId,
    /// From where, in bytes.
    pub offset: u64,
    /// How many, at most 1 MiB.
    pub length: u32,
}

impl Host {
    /// Lets clients open a volume here while another node serves it.
    ///
    /// # Errors
    /// No such volume; no majority answers.
    pub async fn stand_by(&self, name: &str) -> Result<(), ClusterError> {
        let view = self.newest_view().await?;
        let volume = view.volume_named(name).ok_or_else(|| ClusterError::NoVolume(name.to_owned()))?.id;
        tracing::info!(volume = name, "on standby for clients that migrate here");
        let grant = Arc::new(Grant { since: self.env().now(), is_used: AtomicBool::new(false) });
        self.standby.lock().unwrap_or_else(PoisonError::into_inner).insert(volume, grant);
        Ok(())
    }

    fn granted(&self, volume: VolumeId) -> Option<Arc<Grant>> {
        let mut standby = self.standby.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.env().now();
        // Sessions that were let in hold it.
        standby.retain(|_, grant| now.since(grant.since) < OPEN_WITHIN || Arc::strong_count(grant) > 1);
        standby.get(&volume).cloned()
    }

    /// A session on a volume that another node serves, if that was granted.
    pub(super) fn open_on_standby(self: &Arc<Self>, name: &str, transport: Transport) -> Option<Arc<dyn Export>> {
        let view = self.view();
        let volume = view.volume_named(name)?.id;
        let grant = self.granted(volume)?;
        // A flush before the volume is here covers nothing of other connections.
        let info = ExportInfo { multi_conn: false, ..volume_info(&view, name, transport)? };
        let host = Arc::clone(self);
        Some(Arc::new(StandbyExport(Arc::new(Session { host, volume, info, transport, grant, here: OnceCell::new() }))))
    }

    /// Bytes of a volume that this node serves; `None`: it does not, or they cannot be read.
    pub async fn read_here(&self, read: Read) -> Option<Vec<u8>> {
        let attached = self.volumes().serving(read.volume).filter(|_| read.length <= READ_BYTES_MAX)?;
        let pieces = attached.volume.read(read.offset, u64::from(read.length)).await.ok()?;
        let mut bytes = Vec::with_capacity(read.length as usize);
        for piece in pieces {
            match piece {
                Piece::Data(data) => bytes.extend_from_slice(&data),
                Piece::Hole(length) => bytes.resize(bytes.len() + usize::try_from(length).ok()?, 0),
            }
        }
        Some(bytes)
    }

    async fn read_at_owner(&self, volume: VolumeId, offset: u64, length: u32) -> Option<Vec<ReadPiece>> {
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < length {
            let owner = self.other_owner(&self.view(), volume)?;
            let part = (length - done).min(READ_BYTES_MAX);
            let read = Read { volume, offset: offset + u64::from(done), length: part };
            let bytes = self.ask_read(owner, &read, READ_WITHIN).await.filter(|bytes| bytes.len() == part as usize)?;
            pieces.push(ReadPiece::Data(Buf::copied(&bytes)));
            done += part;
        }
        Some(pieces)
    }
}

/// A client's session on a volume that another node served when it was opened.
pub struct StandbyExport(Arc<Session>);

struct Session {
    host: Arc<Host>,
    volume: VolumeId,
    /// As it was opened.
    info: ExportInfo,
    transport: Transport,
    grant: Arc<Grant>,
    /// Set once: it is served here.
    here: OnceCell<VolumeExport>,
}

impl Session {
    fn name(&self) -> Result<String, ClusterError> {
        let view = self.host.view();
        let volume = view.volume(self.volume).ok_or_else(|| ClusterError::NoVolume(self.volume.to_string()))?;
        Ok(volume.name.to_string())
    }

    /// As for a client that opens it now: never taken from other clients.
    async fn opened(&self) -> Result<&VolumeExport, ClusterError> {
        let open = || async {
            let name = self.name()?;
            self.host.open_for_client(&name).await.map(|attached| self.serve(attached))
        };
        self.here.get_or_try_init(open).await
    }

    /// Moves the volume here, from whatever clients it has.
    async fn moved(&self) -> Result<&VolumeExport, ExportError> {
        let move_here = || async {
            if let Some(attached) = self.host.volumes().serving(self.volume) {
                return Ok(self.serve(attached));
            }
            let name = self.name()?;
            if self.grant.is_used.load(Ordering::Relaxed) {
                return self.host.open_for_client(&name).await.map(|attached| self.serve(attached));
            }
            let attached = self.host.move_here(&name).await?;
            self.grant.is_used.store(true, Ordering::Relaxed);
            let mut standby = self.host.standby.lock().unwrap_or_else(PoisonError::into_inner);
            if standby.get(&self.volume).is_some_and(|grant| Arc::ptr_eq(grant, &self.grant)) {
                standby.remove(&self.volume);
            }
            Ok(self.serve(attached))
        };
        self.here.get_or_try_init(move_here).await.map_err(|error: ClusterError| {
            tracing::warn!(volume = %self.volume, %error, "the volume cannot be moved here");
            // One that connects again is told why, and sends it again.
            ExportError::Moved
        })
    }

    fn serve(&self, attached: Arc<Attached>) -> VolumeExport {
        VolumeExport::new(attached, self.transport)
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Vec<ReadPiece>, ExportError> {
        let since = self.host.env().now();
        loop {
            if let Some(pieces) = self.host.read_at_owner(self.volume, offset, length).await {
                return Ok(pieces);
            }
            match self.opened().await {
                Ok(here) => return here.read(offset, length).await,
                Err(error) if error.kind() == ErrorKind::NotFound => return Err(ExportError::Moved),
                Err(error) if self.host.env().now().since(since) > READ_FOR => {
                    tracing::warn!(volume = %self.volume, %error, "a read on standby failed");
                    return Err(ExportError::Io);
                }
                Err(_) => self.host.env().sleep(RETRY_AFTER).await,
            }
        }
    }
}

type Outcome<T> = BoxFuture<'static, Result<T, ExportError>>;

impl StandbyExport {
    /// What changes something is done here.
    fn change<F>(&self, change: F) -> Outcome<()>
    where
        F: FnOnce(&VolumeExport) -> Outcome<()> + Send + 'static,
    {
        if let Some(here) = self.0.here.get() {
            return change(here);
        }
        let session = Arc::clone(&self.0);
        Box::pin(async move { change(session.moved().await?).await })
    }
}

impl Export for StandbyExport {
    fn key(&self) -> String {
        export_key(self.0.volume)
    }

    fn info(&self) -> ExportInfo {
        self.0.here.get().map_or_else(|| self.0.info.clone(), VolumeExport::info)
    }

    fn read(&self, offset: u64, length: u32) -> Outcome<Vec<ReadPiece>> {
        if let Some(here) = self.0.here.get() {
            return here.read(offset, length);
        }
        let session = Arc::clone(&self.0);
        Box::pin(async move { session.read(offset, length).await })
    }

    fn write(&self, offset: u64, data: Buf, fua: bool) -> Outcome<()> {
        self.change(move |here| here.write(offset, data, fua))
    }

    fn flush(&self) -> Outcome<()> {
        match self.0.here.get() {
            Some(here) => here.flush(),
            // It has changed nothing yet.
            None => Box::pin(std::future::ready(Ok(()))),
        }
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> Outcome<()> {
        self.change(move |here| here.trim(offset, length, fua))
    }

    fn zero(&self, offset: u64, length: u64, fua: bool, no_hole: bool) -> Outcome<()> {
        self.change(move |here| here.zero(offset, length, fua, no_hole))
    }

    fn status(&self, offset: u64, length: u64, extents_max: usize) -> Outcome<Vec<StatusExtent>> {
        match self.0.here.get() {
            Some(here) => here.status(offset, length, extents_max),
            None => Box::pin(std::future::ready(Ok(vec![StatusExtent { length, hole: false, zero: false }]))),
        }
    }
}
