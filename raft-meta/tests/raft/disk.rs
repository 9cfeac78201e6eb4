//! A directory whose operations take time, so that a crash can come between any two of them; and one that lies about flushing.

use crate::executor::Dice;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use xsan_env::file::MemoryDirectory;
use xsan_env::runtime::BoxFuture;
use xsan_env::{AppendFile, Directory, Env};

/// Frames up to this size hold no entry worth losing, only term and vote.
const STATE_FRAME_BYTES: usize = 48;

#[derive(Clone)]
pub struct SlowDirectory {
    pub inner: MemoryDirectory,
    pub env: Env,
    pub dice: Arc<Mutex<Dice>>,
    /// Frames without entries are not flushed (canary).
    pub skip_state_flush: bool,
}

impl SlowDirectory {
    /// Mostly fast, sometimes as slow as a busy disk.
    fn pause(&self) -> BoxFuture<'static, ()> {
        let micros = {
            let mut dice = self.dice.lock().unwrap();
            if dice.chance(20) { dice.below(60_000) } else { dice.below(800) }
        };
        self.env.sleep(Duration::from_micros(micros))
    }
}

impl Directory for SlowDirectory {
    fn read(&self, name: &str) -> BoxFuture<'static, io::Result<Option<Vec<u8>>>> {
        self.inner.read(name)
    }

    fn replace_atomic(&self, name: &str, bytes: Vec<u8>) -> BoxFuture<'static, io::Result<()>> {
        let (this, name) = (self.clone(), name.to_owned());
        Box::pin(async move {
            this.pause().await;
            let result = this.inner.replace_atomic(&name, bytes).await;
            this.pause().await;
            result
        })
    }

    fn append(&self, name: &str) -> BoxFuture<'static, io::Result<Box<dyn AppendFile>>> {
        let (this, name) = (self.clone(), name.to_owned());
        Box::pin(async move {
            this.pause().await;
            let file = this.inner.append(&name).await?;
            Ok(Box::new(SlowFile { file, directory: this, last_bytes: 0 }) as Box<dyn AppendFile>)
        })
    }

    fn remove(&self, name: &str) -> BoxFuture<'static, io::Result<()>> {
        let (this, name) = (self.clone(), name.to_owned());
        Box::pin(async move {
            this.pause().await;
            this.inner.remove(&name).await
        })
    }

    fn list(&self) -> BoxFuture<'static, io::Result<Vec<String>>> {
        self.inner.list()
    }
}

struct SlowFile {
    file: Box<dyn AppendFile>,
    directory: SlowDirectory,
    last_bytes: usize,
}

impl AppendFile for SlowFile {
    fn append(&mut self, bytes: Vec<u8>) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.directory.pause().await;
            self.last_bytes = bytes.len();
            self.file.append(bytes).await
        })
    }

    fn sync(&mut self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.directory.pause().await;
            if self.directory.skip_state_flush && self.last_bytes <= STATE_FRAME_BYTES {
                return Ok(());
            }
            let result = self.file.sync().await;
            self.directory.pause().await;
            result
        })
    }

    fn truncate(&mut self, bytes: u64) -> BoxFuture<'_, io::Result<()>> {
        self.file.truncate(bytes)
    }

    fn bytes(&self) -> u64 {
        self.file.bytes()
    }
}
