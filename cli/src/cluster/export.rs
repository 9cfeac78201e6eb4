//! A volume as the gateway sees it.

use super::volumes::{Attached, VolumeManager};
use lsm_block::{Piece, VolumeError};
use raft_meta::MetaState;
use std::sync::Arc;
use xsan_env::Buf;
use xsan_env::runtime::BoxFuture;
use xsan_gateway::{Export, ExportError, ExportInfo, Exports, OpenError, ReadPiece, StatusExtent, Transport};
use xsan_types::{BLOCK_BYTES, ErrorKind, SECTOR_BYTES, VolumeId};

/// Largest payload of one request: what every NBD client may send (32 MiB).
const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// One client's session on a volume.
pub struct VolumeExport {
    attached: Arc<Attached>,
    transport: Transport,
}

impl VolumeExport {
    /// A session on a served volume.
    #[must_use]
    pub fn new(attached: Arc<Attached>, transport: Transport) -> Self {
        Self { attached, transport }
    }
}

/// How the gateway knows a volume: by what a new name does not change.
#[must_use]
pub fn export_key(volume: VolumeId) -> String {
    volume.to_string()
}

/// What a client may know of a volume before it opens it.
#[must_use]
pub fn volume_info(view: &MetaState, name: &str, transport: Transport) -> Option<ExportInfo> {
    view.volume_named(name).map(|volume| info(name, volume.register().size, transport))
}

fn info(name: &str, size: u64, transport: Transport) -> ExportInfo {
    ExportInfo {
        name: name.to_owned(),
        description: String::new(),
        size,
        block_min: SECTOR_BYTES as u32,
        block_preferred: BLOCK_BYTES as u32,
        payload_max: PAYLOAD_BYTES_MAX,
        read_only: false,
        // A dead client on a unix socket is noticed at once; on TCP an old connection must be cut first (P12).
        multi_conn: transport == Transport::Unix,
    }
}

/// What a client is told of a volume's error (docs/errors.md).
fn export_error(attached: &Attached, error: &VolumeError) -> ExportError {
    match error.kind() {
        _ if attached.has_moved() => ExportError::Moved,
        ErrorKind::Invalid => ExportError::Invalid,
        ErrorKind::NoSpace => ExportError::NoSpace,
        ErrorKind::Fenced => ExportError::Moved,
        ErrorKind::Closed | ErrorKind::NotFound => ExportError::Shutdown,
        _ => ExportError::Io,
    }
}

type Outcome<T> = BoxFuture<'static, Result<T, ExportError>>;

impl VolumeExport {
    fn told<T: Send + 'static>(
        &self,
        operation: &'static str,
        outcome: BoxFuture<'static, Result<T, VolumeError>>,
    ) -> Outcome<T> {
        let attached = Arc::clone(&self.attached);
        Box::pin(async move {
            outcome.await.map_err(|error| {
                tracing::warn!(operation, %error, "request failed");
                export_error(&attached, &error)
            })
        })
    }
}

impl Export for VolumeExport {
    fn key(&self) -> String {
        export_key(self.attached.id)
    }

    fn info(&self) -> ExportInfo {
        info(&self.attached.name(), self.attached.volume.size(), self.transport)
    }

    fn read(&self, offset: u64, length: u32) -> Outcome<Vec<ReadPiece>> {
        let pieces = self.attached.volume.read(offset, u64::from(length));
        let attached = Arc::clone(&self.attached);
        Box::pin(async move {
            match pieces.await {
                Ok(pieces) => Ok(pieces
                    .into_iter()
                    .map(|piece| match piece {
                        Piece::Data(data) => ReadPiece::Data(data),
                        Piece::Hole(bytes) => ReadPiece::Hole(bytes),
                    })
                    .collect()),
                Err(error) => {
                    tracing::warn!(offset, length, %error, "read failed");
                    Err(export_error(&attached, &error))
                }
            }
        })
    }

    fn write(&self, offset: u64, data: Buf, fua: bool) -> Outcome<()> {
        self.told("write", self.attached.volume.write(offset, data, fua))
    }

    fn flush(&self) -> Outcome<()> {
        self.told("flush", self.attached.volume.flush())
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> Outcome<()> {
        self.told("trim", self.attached.volume.trim(offset, length, fua))
    }

    fn zero(&self, offset: u64, length: u64, fua: bool, _no_hole: bool) -> Outcome<()> {
        self.told("zero", self.attached.volume.zero(offset, length, fua))
    }

    fn status(&self, offset: u64, length: u64, extents_max: usize) -> Outcome<Vec<StatusExtent>> {
        let runs = self.told("block status", self.attached.volume.allocation(offset, length, extents_max));
        Box::pin(async move {
            let mut skip = offset % BLOCK_BYTES;
            let mut left = length;
            let mut extents = Vec::new();
            for run in runs.await? {
                let bytes = (run.blocks * BLOCK_BYTES).saturating_sub(skip).min(left);
                skip = 0;
                left -= bytes;
                if bytes > 0 {
                    extents.push(StatusExtent { length: bytes, hole: run.hole, zero: run.hole });
                }
            }
            Ok(extents)
        })
    }
}

impl Exports for VolumeManager {
    fn list(&self) -> BoxFuture<'static, Vec<(String, String)>> {
        let names = self.view().volume_names.keys().map(|name| (name.as_str().to_owned(), String::new())).collect();
        Box::pin(async move { names })
    }

    fn info(&self, name: &str, transport: Transport) -> BoxFuture<'static, Option<ExportInfo>> {
        let found = volume_info(&self.view(), name, transport);
        Box::pin(async move { found })
    }

    fn open(&self, name: &str, transport: Transport) -> BoxFuture<'static, Result<Arc<dyn Export>, OpenError>> {
        let manager = self.clone();
        let name = name.to_owned();
        Box::pin(async move {
            let Some(id) = manager.view().volume_named(&name).map(|volume| volume.id) else {
                return Err(OpenError::NotFound);
            };
            match manager.attach(id).await {
                Ok(attached) => Ok(Arc::new(VolumeExport::new(attached, transport)) as Arc<dyn Export>),
                Err(error) if error.kind() == ErrorKind::NotFound => Err(OpenError::NotFound),
                Err(error) => {
                    tracing::warn!(volume = name, %error, "cannot serve the volume");
                    Err(OpenError::Unavailable(error.to_string()))
                }
            }
        })
    }
}
