//! The shard index in fjall, the only file that knows it. Writes go to the operating system's buffers: they survive a crash
//! of the process; the device log carries what power loss could take.

use super::{IndexError, IndexResult, ShardIndex, key_of, shard_of};
use crate::format::ShardEntry;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use std::path::PathBuf;
use xsan_env::Env;
use xsan_types::{ShardId, VolumeId};

/// Several nodes share a process: small caches.
const CACHE_BYTES: u64 = 4 << 20;
const MEMTABLE_BYTES: u64 = 4 << 20;
/// Set when the index shows the whole device: one that was cut short while it was filled is filled again.
const MADE: &str = "made";

/// A fjall database in its own directory.
pub struct FjallIndex {
    database: Database,
    shards: Keyspace,
    marks: Keyspace,
    new: bool,
}

fn engine(error: fjall::Error) -> IndexError {
    use std::io::ErrorKind::{OutOfMemory, PermissionDenied, ReadOnlyFilesystem, ResourceBusy, StorageFull, TimedOut};
    let io = match &error {
        fjall::Error::Locked => return IndexError::Unavailable(Box::new(error)),
        fjall::Error::Io(io) | fjall::Error::Storage(fjall::LsmError::Io(io)) => io,
        _ => return IndexError::Engine(Box::new(error)),
    };
    // No room, no rights, no descriptors: nothing that making the index anew would mend.
    let is_system = matches!(
        io.kind(),
        OutOfMemory | PermissionDenied | ReadOnlyFilesystem | ResourceBusy | StorageFull | TimedOut
    ) || matches!(io.raw_os_error(), Some(ENFILE | EMFILE));
    if is_system { IndexError::Unavailable(Box::new(error)) } else { IndexError::Engine(Box::new(error)) }
}

const ENFILE: i32 = 23;
const EMFILE: i32 = 24;

impl FjallIndex {
    /// Opens or makes the index in `directory`.
    ///
    /// # Errors
    /// Those of the engine: move the directory away, and the node fills a new index from the device.
    pub async fn open(env: &Env, directory: PathBuf) -> IndexResult<Self> {
        env.blocking(move || {
            let database =
                Database::builder(&directory).cache_size(CACHE_BYTES).worker_threads(1).open().map_err(engine)?;
            let options = || KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES);
            let shards = database.keyspace("shards", options).map_err(engine)?;
            // A mark of its own tells an index that was made just now from one that is empty.
            let marks = database.keyspace("marks", options).map_err(engine)?;
            let new = marks.get(MADE).map_err(engine)?.is_none();
            Ok(Self { database, shards, marks, new })
        })
        .await
    }

    fn range(
        &self,
        from: std::ops::Bound<Vec<u8>>,
        volume: Option<VolumeId>,
        limit: usize,
    ) -> IndexResult<Vec<(ShardId, ShardEntry)>> {
        let mut found = Vec::new();
        for guard in self.shards.range((from, std::ops::Bound::Unbounded)) {
            if found.len() == limit {
                break;
            }
            let (key, value) = guard.into_inner().map_err(engine)?;
            let shard = shard_of(&key).ok_or(IndexError::Damaged)?;
            if volume.is_some_and(|volume| volume != shard.segment.volume) {
                break;
            }
            found.push((shard, postcard::from_bytes(&value).map_err(|_| IndexError::Damaged)?));
        }
        Ok(found)
    }
}

impl ShardIndex for FjallIndex {
    fn get(&self, shard: ShardId) -> IndexResult<Option<ShardEntry>> {
        match self.shards.get(key_of(shard)).map_err(engine)? {
            Some(value) => postcard::from_bytes(&value).map(Some).map_err(|_| IndexError::Damaged),
            None => Ok(None),
        }
    }

    fn put(&self, shard: ShardId, entry: &ShardEntry) -> IndexResult<()> {
        let value = postcard::to_allocvec(entry).map_err(|_| IndexError::Damaged)?;
        self.shards.insert(key_of(shard), value).map_err(engine)
    }

    fn remove(&self, shards: &[ShardId]) -> IndexResult<()> {
        for shard in shards {
            self.shards.remove(key_of(*shard)).map_err(engine)?;
        }
        Ok(())
    }

    fn page(&self, after: Option<ShardId>, limit: usize) -> IndexResult<Vec<(ShardId, ShardEntry)>> {
        let from = after.map_or(std::ops::Bound::Unbounded, |after| std::ops::Bound::Excluded(key_of(after).to_vec()));
        self.range(from, None, limit)
    }

    fn volume_page(
        &self,
        volume: VolumeId,
        after: Option<ShardId>,
        limit: usize,
    ) -> IndexResult<Vec<(ShardId, ShardEntry)>> {
        let from = match after {
            Some(after) => std::ops::Bound::Excluded(key_of(after).to_vec()),
            None => std::ops::Bound::Included(volume.0.to_be_bytes().to_vec()),
        };
        self.range(from, Some(volume), limit)
    }

    fn persist(&self) -> IndexResult<()> {
        self.database.persist(PersistMode::SyncAll).map_err(engine)
    }

    fn is_new(&self) -> bool {
        self.new
    }

    fn filled(&self) -> IndexResult<()> {
        if self.new {
            self.marks.insert(MADE, [1]).map_err(engine)?;
            self.persist()?;
        }
        Ok(())
    }
}
