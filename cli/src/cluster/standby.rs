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
/// After which time of failures a node that is up, but does not serve the volume, is asked for it: a client of its own that
/// connects again comes first.
const ASK_AFTER: Duration = Duration::from_secs(10);
/// How old a change may be when the volume is here: its client may have lost patience, and have sent it again elsewhere.
const CHANGE_WITHIN: Duration = Duration::from_secs(10);
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
        standby.retain(|_, grant| now.since(grant.since) < OPEN_WITHIN);
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
        let (here, ended) = (OnceCell::new(), AtomicBool::new(false));
        Some(Arc::new(StandbyExport(Arc::new(Session { host, volume, info, transport, grant, here, ended }))))
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

/// A client's session on a volume that another node served when it was opened; dropped when its connection has ended, though its
/// requests may still run.
pub struct StandbyExport(Arc<Session>);

impl Drop for StandbyExport {
    fn drop(&mut self) {
        self.client_left();
    }
}

struct Session {
    host: Arc<Host>,
    volume: VolumeId,
    /// As it was opened.
    info: ExportInfo,
    transport: Transport,
    grant: Arc<Grant>,
    /// Set once: it is served here.
    here: OnceCell<VolumeExport>,
    /// Its connection has ended: the client may be elsewhere, with newer writes.
    ended: AtomicBool,
}

impl Session {
    fn name(&self) -> Result<String, ClusterError> {
        let view = self.host.view();
        let volume = view.volume(self.volume).ok_or_else(|| ClusterError::NoVolume(self.volume.to_string()))?;
        Ok(volume.name.to_string())
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// As for a client that opens it now: never taken from other clients.
    async fn opened(&self) -> Result<&VolumeExport, ClusterError> {
        let open = || async {
            let name = self.name()?;
            self.host.open_volume_for_client(self.volume, &name).await.map(|attached| self.serve(attached))
        };
        self.here.get_or_try_init(open).await
    }

    /// Moves the volume here, from whatever clients it has.
    async fn moved(&self) -> Result<&VolumeExport, ClusterError> {
        if self.grant.is_used.load(Ordering::Relaxed) {
            return self.opened().await;
        }
        let is_wanted = || !self.has_ended();
        let move_here =
            || async { self.host.move_here(self.volume, is_wanted).await.map(|attached| self.serve(attached)) };
        self.here.get_or_try_init(move_here).await
    }

    /// It is served here: the grant has done what it was for.
    fn serve(&self, attached: Arc<Attached>) -> VolumeExport {
        self.grant.is_used.store(true, Ordering::Relaxed);
        let mut standby = self.host.standby.lock().unwrap_or_else(PoisonError::into_inner);
        if standby.get(&self.volume).is_some_and(|grant| Arc::ptr_eq(grant, &self.grant)) {
            standby.remove(&self.volume);
        }
        VolumeExport::new(attached, self.transport)
    }

    /// Where a change that came at `since` is made. One that connects again is told why there is no such place, and sends it again.
    async fn changed(&self, since: Moment) -> Result<&VolumeExport, ExportError> {
        let moved = match self.has_ended() {
            true => Err(ClusterError::Left),
            false => self.moved().await,
        };
        let here = moved.map_err(|error| {
            tracing::warn!(volume = %self.volume, %error, "the volume cannot be moved here");
            ExportError::Moved
        })?;
        let waited = self.host.env().now().since(since);
        if self.has_ended() || waited > CHANGE_WITHIN {
            tracing::warn!(volume = %self.volume, ?waited, "a change that waited for the volume is not made");
            return Err(ExportError::Moved);
        }
        Ok(here)
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Vec<ReadPiece>, ExportError> {
        let env = self.host.env();
        let since = env.now();
        while !self.has_ended() {
            if let Some(pieces) = self.host.read_at_owner(self.volume, offset, length).await {
                return Ok(pieces);
            }
            let failing_for = env.now().since(since);
            let is_served = self.host.other_owner(&self.host.view(), self.volume).is_some();
            if is_served && failing_for < ASK_AFTER {
                env.sleep(RETRY_AFTER).await;
                continue;
            }
            match self.opened().await {
                Ok(here) => return here.read(offset, length).await,
                Err(error) if error.kind() == ErrorKind::NotFound => return Err(ExportError::Moved),
                Err(error) if failing_for > READ_FOR => {
                    tracing::warn!(volume = %self.volume, %error, "a read on standby failed");
                    return Err(ExportError::Io);
                }
                Err(_) => env.sleep(RETRY_AFTER).await,
            }
        }
        Err(ExportError::Moved)
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
        let (session, since) = (Arc::clone(&self.0), self.0.host.env().now());
        Box::pin(async move { change(session.changed(since).await?).await })
    }
}

impl Export for StandbyExport {
    fn key(&self) -> String {
        export_key(self.0.volume)
    }

    fn client_left(&self) {
        self.0.ended.store(true, Ordering::Relaxed);
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
