//! Files that are appended to, with a write cache that power loss takes.
//!
//! Every change of a file since its last sync is noted in `NAME.tail`, before it is made: how long the file was, and what a
//! truncation cut off. After a loss of power, opening the directory takes back all changes behind any of them, and leaves any part
//! of the first of those.

use super::Faults;
use crate::file::AppendFile;
use crate::memory::{Keep, mix};
use crate::runtime::BoxFuture;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of a change before what it cut off: the file's length before it, and the number of those bytes.
const HEAD: usize = 8 + 8;

/// A change of a file, as noted.
struct Change {
    before: u64,
    cut: Vec<u8>,
}

fn changes(note: &Path) -> io::Result<Vec<Change>> {
    let bytes = match std::fs::read(note) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        read => read?,
    };
    let (mut rest, mut changes) = (&*bytes, Vec::new());
    while let Some((head, behind)) = rest.split_first_chunk::<HEAD>() {
        let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
        // Cut short: the process ended before it made the change.
        let Some((cut, behind)) = behind.split_at_checked(word(8) as usize) else { break };
        changes.push(Change { before: word(0), cut: cut.to_vec() });
        rest = behind;
    }
    Ok(changes)
}

/// Before the first file of the directory at `path` is read: what power loss takes goes.
pub(crate) fn take_back(faults: &Faults, path: &Path) -> io::Result<()> {
    if faults.lost_power(path)? {
        for entry in std::fs::read_dir(path)? {
            let file = entry?.path();
            let note = faults.note(&file, "tail");
            let changes = changes(&note)?;
            if !changes.is_empty() {
                take_back_of(&file, &changes, faults.keep_of(&file))?;
                std::fs::remove_file(&note)?;
            }
        }
    }
    faults.settled(path)
}

fn take_back_of(path: &Path, changes: &[Change], keep: Keep) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    let (left, torn) = match keep {
        Keep::All => (changes.len(), 0),
        Keep::Nothing => (0, 0),
        Keep::Seed(seed) => (mix(seed) as usize % (changes.len() + 1), mix(seed ^ 1)),
    };
    let found = file.metadata()?.len();
    for (at, change) in changes.iter().enumerate().skip(left).rev() {
        let added = file.metadata()?.len().saturating_sub(change.before);
        // Of the first change that is not there as a whole, some of what it added may be.
        let part = if at == left && added > 0 { torn % added } else { 0 };
        file.set_len(change.before - change.cut.len() as u64 + part)?;
        if !change.cut.is_empty() {
            file.seek(SeekFrom::Start(change.before - change.cut.len() as u64))?;
            file.write_all(&change.cut)?;
        }
    }
    file.sync_all()?;
    let (bytes, changes) = (file.metadata()?.len(), changes.len());
    tracing::warn!(file = %path.display(), changes, found, bytes, "power was lost with these changes unflushed");
    Ok(())
}

/// The file at `path` is replaced or removed, durably: nothing of the old one is worth keeping.
pub(crate) fn forget(faults: &Faults, path: &Path) -> io::Result<()> {
    match std::fs::remove_file(faults.note(path, "tail")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A file whose unflushed changes go with power.
pub(crate) struct HeldFile {
    faults: Arc<Faults>,
    file: Box<dyn AppendFile>,
    path: PathBuf,
    note: File,
}

impl HeldFile {
    /// `file` is the one at `path`.
    pub(crate) fn new(faults: &Arc<Faults>, file: Box<dyn AppendFile>, path: PathBuf) -> io::Result<Self> {
        let note = OpenOptions::new().create(true).append(true).open(faults.note(&path, "tail"))?;
        Ok(Self { faults: Arc::clone(faults), file, path, note })
    }

    fn begin(&mut self, cut: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEAD + cut.len());
        bytes.extend(self.file.bytes().to_le_bytes());
        bytes.extend((cut.len() as u64).to_le_bytes());
        bytes.extend(cut);
        self.note.write_all(&bytes)
    }

    fn behind(&self, bytes: u64) -> io::Result<Vec<u8>> {
        let mut cut = Vec::new();
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(bytes))?;
        file.read_to_end(&mut cut)?;
        Ok(cut)
    }
}

impl AppendFile for HeldFile {
    fn append(&mut self, bytes: Vec<u8>) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.faults.pass().await;
            self.faults.room()?;
            self.begin(&[])?;
            self.file.append(bytes).await
        })
    }

    fn sync(&mut self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.faults.pass().await;
            self.file.sync().await?;
            self.faults.pass().await;
            self.note.set_len(0)
        })
    }

    fn truncate(&mut self, bytes: u64) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.faults.pass().await;
            let cut = self.behind(bytes)?;
            self.begin(&cut)?;
            self.file.truncate(bytes).await
        })
    }

    fn bytes(&self) -> u64 {
        self.file.bytes()
    }
}
