//! A directory in memory with the operating system's promises and no more: what was not synced may vanish.

use super::{AppendFile, Directory, check_name};
use crate::error::{EnvError, file_error};
use crate::runtime::BoxFuture;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// When a failing operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAt {
    /// Nothing happened.
    Before,
    /// It happened, and the error says it did not (a failed fsync of the directory after the rename).
    After,
}

/// A directory in memory; clones share it. Handles opened before a crash are dead after it.
#[derive(Clone, Default)]
pub struct MemoryDirectory(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    files: BTreeMap<String, Content>,
    /// Number of crashes; a handle from before the last one is dead.
    crashes: u64,
    operations: u64,
    /// Operation number to fail, where and with which errno.
    fault: Option<(u64, FaultAt, i32)>,
}

#[derive(Clone, Default)]
struct Content {
    bytes: Vec<u8>,
    /// What power loss leaves at least.
    synced: Vec<u8>,
}

impl MemoryDirectory {
    /// An empty directory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Operations that changed something (replace, append, sync, truncate, remove, creation) since the start.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// Makes the `nth` changing operation from now (1 = the next) fail with `errno`.
    pub fn fail_nth(&self, nth: u64, at: FaultAt, errno: i32) {
        let mut state = self.state();
        state.fault = Some((state.operations + nth, at, errno));
    }

    /// Takes a planned failure back.
    pub fn heal(&self) {
        self.state().fault = None;
    }

    /// The process dies: open handles are dead, every answered call stays.
    pub fn crash_process(&self) {
        self.state().crashes += 1;
    }

    /// The host loses power: of what was appended and not synced, any prefix (chosen by `seed`) stays.
    pub fn power_off(&self, seed: u64) {
        let mut state = self.state();
        state.crashes += 1;
        let mut seed = seed;
        for content in state.files.values_mut() {
            seed = crate::memory::mix(seed);
            content.lose(seed);
        }
    }

    fn change<T>(&self, work: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.state();
        state.operations += 1;
        let fault = state.fault.filter(|&(nth, _, _)| nth == state.operations);
        match fault {
            Some((_, FaultAt::Before, errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some((_, FaultAt::After, errno)) => work(&mut state).and(Err(io::Error::from_raw_os_error(errno))),
            None => work(&mut state),
        }
    }
}

impl Content {
    fn lose(&mut self, seed: u64) {
        let common = self.bytes.iter().zip(&self.synced).take_while(|(now, then)| now == then).count();
        if common == self.synced.len() {
            // Only grown: any number of the new bytes may have reached the medium.
            let kept = seed % (self.bytes.len() - common + 1) as u64;
            self.bytes.truncate(common + usize::try_from(kept).expect("less than the length"));
        } else if seed.is_multiple_of(2) {
            // Truncated and perhaps appended to again: the old content may be back.
            self.bytes.clone_from(&self.synced);
        }
        self.synced.clone_from(&self.bytes);
    }
}

fn ready<T: Send + 'static>(
    operation: &'static str,
    name: &str,
    result: impl FnOnce() -> io::Result<T>,
) -> BoxFuture<'static, io::Result<T>> {
    let result =
        check_name(name).and_then(|()| result().map_err(|source| file_error(operation, Path::new(name), source)));
    Box::pin(std::future::ready(result))
}

impl Directory for MemoryDirectory {
    fn read(&self, name: &str) -> BoxFuture<'static, io::Result<Option<Vec<u8>>>> {
        ready("read", name, || Ok(self.state().files.get(name).map(|content| content.bytes.clone())))
    }

    fn replace_atomic(&self, name: &str, bytes: Vec<u8>) -> BoxFuture<'static, io::Result<()>> {
        ready("replace", name, || {
            self.change(|state| {
                state.files.insert(name.to_owned(), Content { synced: bytes.clone(), bytes });
                Ok(())
            })
        })
    }

    fn append(&self, name: &str) -> BoxFuture<'static, io::Result<Box<dyn AppendFile>>> {
        ready("open", name, || {
            if !self.state().files.contains_key(name) {
                self.change(|state| {
                    state.files.insert(name.to_owned(), Content::default());
                    Ok(())
                })?;
            }
            let state = self.state();
            let bytes = state.files.get(name).map_or(0, |content| content.bytes.len() as u64);
            let file = MemoryAppendFile {
                directory: self.clone(),
                name: name.to_owned(),
                crashes: state.crashes,
                bytes,
                poisoned: false,
            };
            Ok(Box::new(file) as Box<dyn AppendFile>)
        })
    }

    fn remove(&self, name: &str) -> BoxFuture<'static, io::Result<()>> {
        ready("remove", name, || {
            self.change(|state| {
                state.files.remove(name);
                Ok(())
            })
        })
    }

    fn list(&self) -> BoxFuture<'static, io::Result<Vec<String>>> {
        let names = self.state().files.keys().cloned().collect();
        Box::pin(std::future::ready(Ok(names)))
    }
}

struct MemoryAppendFile {
    directory: MemoryDirectory,
    name: String,
    crashes: u64,
    bytes: u64,
    poisoned: bool,
}

impl MemoryAppendFile {
    fn change(
        &mut self,
        operation: &'static str,
        work: impl FnOnce(&mut Content) -> io::Result<()>,
    ) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(std::future::ready(self.change_now(operation, work)))
    }

    fn change_now(
        &mut self,
        operation: &'static str,
        work: impl FnOnce(&mut Content) -> io::Result<()>,
    ) -> io::Result<()> {
        let what = || self.name.clone();
        if self.poisoned {
            return Err(EnvError::Poisoned { what: what() }.into_io());
        }
        if self.directory.state().crashes != self.crashes {
            return Err(EnvError::Crashed { what: what() }.into_io());
        }
        let result = self.directory.change(|state| {
            let content = state.files.get_mut(&self.name).ok_or(io::ErrorKind::NotFound)?;
            work(content)?;
            Ok(content.bytes.len() as u64)
        });
        match result {
            Ok(bytes) => {
                self.bytes = bytes;
                Ok(())
            }
            Err(source) => Err(file_error(operation, Path::new(&self.name), source)),
        }
    }
}

impl AppendFile for MemoryAppendFile {
    fn append(&mut self, bytes: Vec<u8>) -> BoxFuture<'_, io::Result<()>> {
        let before = self.bytes;
        let result = self.change_now("append to", |content| {
            content.bytes.extend_from_slice(&bytes);
            Ok(())
        });
        if result.is_err() {
            // As on the operating system: the file is cut back to where it was.
            if let Some(content) = self.directory.state().files.get_mut(&self.name) {
                content.bytes.truncate(usize::try_from(before).expect("in memory"));
            }
        }
        Box::pin(std::future::ready(result))
    }

    fn sync(&mut self) -> BoxFuture<'_, io::Result<()>> {
        let result = self.change_now("sync", |content| {
            content.synced.clone_from(&content.bytes);
            Ok(())
        });
        self.poisoned |= result.is_err();
        Box::pin(std::future::ready(result))
    }

    fn truncate(&mut self, bytes: u64) -> BoxFuture<'_, io::Result<()>> {
        self.change("truncate", move |content| {
            let bytes = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
            if bytes > content.bytes.len() {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            content.bytes.truncate(bytes);
            Ok(())
        })
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}
