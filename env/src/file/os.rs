//! Files of the operating system. Every call is one piece of blocking work.

use super::{AppendFile, Directory, check_name};
use crate::error::{EnvError, file_error};
#[cfg(any(test, feature = "faults"))]
use crate::faults::{self, Faults};
use crate::runtime::{BoxFuture, Env};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A directory of the operating system; cheap to clone.
#[derive(Clone)]
pub struct OsDirectory {
    env: Env,
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    /// One change at a time: two replacements of one name would share their temporary file. Held by blocking work only.
    changing: Mutex<()>,
}

impl OsDirectory {
    /// Opens `path`, made (with its parents, mode 0700) when it does not exist.
    ///
    /// # Errors
    /// Those of the operating system.
    pub async fn open(env: &Env, path: impl Into<PathBuf>) -> io::Result<Self> {
        let path: PathBuf = path.into();
        let inner = Arc::new(Inner { path, changing: Mutex::new(()) });
        let opened = Self { env: env.clone(), inner: Arc::clone(&inner) };
        env.blocking(move || {
            make_directory(&inner.path)?;
            #[cfg(any(test, feature = "faults"))]
            if let Some(faults) = Faults::of_process() {
                faults::take_back(faults, &inner.path)?;
            }
            Ok::<(), io::Error>(())
        })
        .await?;
        Ok(opened)
    }

    /// Where the files lie.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    fn work<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce(&Inner, &str) -> io::Result<T> + Send + 'static,
    ) -> BoxFuture<'static, io::Result<T>> {
        if let Err(error) = check_name(name) {
            return Box::pin(async move { Err(error) });
        }
        let (env, inner, name) = (self.env.clone(), Arc::clone(&self.inner), name.to_owned());
        Box::pin(async move {
            #[cfg(any(test, feature = "faults"))]
            if let Some(faults) = Faults::of_process() {
                faults.pass().await;
            }
            env.blocking(move || work(&inner, &name)).await
        })
    }
}

fn make_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(|source| file_error("create directory", path, source))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
        .map_err(|source| file_error("set mode of", path, source))?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
        _ => Ok(()),
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(|source| file_error("sync", path, source))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let _one = lock(&self.changing);
        let target = self.path.join(name);
        let temporary = self.path.join(format!(".{name}.new"));
        #[cfg(any(test, feature = "faults"))]
        if let Some(faults) = Faults::of_process() {
            faults.room()?;
            faults::forget(faults, &target)?;
        }
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
        written.map_err(|source| file_error("write", &temporary, source))?;
        fs::rename(&temporary, &target).map_err(|source| file_error("rename to", &target, source))?;
        sync_directory(&self.path)
    }

    fn open_append(&self, name: &str) -> io::Result<OpenFile> {
        let _one = lock(&self.changing);
        let path = self.path.join(name);
        let fail = |source| file_error("open", &path, source);
        let existed = path.try_exists().map_err(fail)?;
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path).map_err(fail)?;
        if !existed {
            sync_directory(&self.path)?;
        }
        let bytes = file.metadata().map_err(fail)?.len();
        Ok(OpenFile { file, path, bytes, poisoned: false })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let _one = lock(&self.changing);
        let path = self.path.join(name);
        #[cfg(any(test, feature = "faults"))]
        if let Some(faults) = Faults::of_process() {
            faults::forget(faults, &path)?;
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(file_error("remove", &path, source)),
            Ok(()) => sync_directory(&self.path),
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let fail = |source| file_error("list", &self.path, source);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let is_file = entry.file_type().map_err(fail)?.is_file();
            match entry.file_name().into_string() {
                Ok(name) if is_file && check_name(&name).is_ok() => names.push(name),
                // Left-over temporary files, directories and foreign names are not ours to show.
                _ => {}
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

impl Directory for OsDirectory {
    fn read(&self, name: &str) -> BoxFuture<'static, io::Result<Option<Vec<u8>>>> {
        self.work(name, |inner, name| {
            let path = inner.path.join(name);
            match fs::read(&path) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(file_error("read", &path, source)),
            }
        })
    }

    fn replace_atomic(&self, name: &str, bytes: Vec<u8>) -> BoxFuture<'static, io::Result<()>> {
        self.work(name, move |inner, name| inner.replace(name, &bytes))
    }

    fn append(&self, name: &str) -> BoxFuture<'static, io::Result<Box<dyn AppendFile>>> {
        let opened = self.work(name, Inner::open_append);
        let env = self.env.clone();
        Box::pin(async move {
            let file = opened.await?;
            let (path, bytes) = (file.path.clone(), file.bytes);
            let handle = OsAppendFile { env, path, file: Some(file), bytes };
            #[cfg(any(test, feature = "faults"))]
            if let Some(faults) = Faults::of_process() {
                let path = handle.path.clone();
                return Ok(Box::new(faults::HeldFile::new(faults, Box::new(handle), path)?) as Box<dyn AppendFile>);
            }
            Ok(Box::new(handle) as Box<dyn AppendFile>)
        })
    }

    fn remove(&self, name: &str) -> BoxFuture<'static, io::Result<()>> {
        self.work(name, Inner::remove)
    }

    fn list(&self) -> BoxFuture<'static, io::Result<Vec<String>>> {
        let (env, inner) = (self.env.clone(), Arc::clone(&self.inner));
        Box::pin(async move { env.blocking(move || inner.list()).await })
    }
}

struct OpenFile {
    file: File,
    path: PathBuf,
    bytes: u64,
    poisoned: bool,
}

impl OpenFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Err(source) = self.file.write_all(bytes) {
            // Whole or not at all: a torn record would otherwise sit in front of the next one.
            self.poisoned = self.file.set_len(self.bytes).is_err();
            return Err(file_error("append to", &self.path, source));
        }
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data().map_err(|source| {
            self.poisoned = true;
            file_error("sync", &self.path, source)
        })
    }

    fn truncate(&mut self, bytes: u64) -> io::Result<()> {
        if bytes > self.bytes {
            return Err(file_error("truncate", &self.path, io::ErrorKind::InvalidInput.into()));
        }
        self.file.set_len(bytes).map_err(|source| file_error("truncate", &self.path, source))?;
        self.bytes = bytes;
        Ok(())
    }
}

struct OsAppendFile {
    env: Env,
    path: PathBuf,
    /// Away while a call runs; a call that is dropped half-way never brings it back, which is the poison.
    file: Option<OpenFile>,
    bytes: u64,
}

impl OsAppendFile {
    fn work(
        &mut self,
        work: impl FnOnce(&mut OpenFile) -> io::Result<()> + Send + 'static,
    ) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let file = self.file.take().filter(|file| !file.poisoned);
            let Some(mut file) = file else {
                return Err(EnvError::Poisoned { what: self.path.display().to_string() }.into_io());
            };
            let (file, result) = self
                .env
                .blocking(move || {
                    let result = work(&mut file);
                    (file, result)
                })
                .await;
            self.bytes = file.bytes;
            self.file = Some(file);
            result
        })
    }
}

impl AppendFile for OsAppendFile {
    fn append(&mut self, bytes: Vec<u8>) -> BoxFuture<'_, io::Result<()>> {
        self.work(move |file| file.append(&bytes))
    }

    fn sync(&mut self) -> BoxFuture<'_, io::Result<()>> {
        self.work(OpenFile::sync)
    }

    fn truncate(&mut self, bytes: u64) -> BoxFuture<'_, io::Result<()>> {
        self.work(move |file| file.truncate(bytes))
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Bytes that may still be written to the file system that holds `path`.
///
/// # Errors
/// Those of the operating system.
#[allow(unsafe_code)]
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: all-zero bytes are a valid `statvfs`: it holds plain numbers.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` ends with a zero byte and `stat` is writable for the length of the call.
    if unsafe { libc::statvfs(path.as_ptr(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.f_bavail * stat.f_frsize)
}
