//! A disk with a write cache that power loss takes.
//!
//! Writes go to the disk at once, and before that what they replace goes to a note: `NAME.undo.N` for the writes since the N-th
//! flush began. A flush that has returned removes the notes of all writes that were complete when it began. After a loss of
//! power, opening puts back what the notes hold, but for the sectors that the loss has left: see [`Keep`].

use super::{Faults, lock};
use crate::buf::{Buf, BufMut};
use crate::disk::{Disk, Geometry, IoFuture, ready};
use crate::memory::Keep;
use crate::runtime::Env;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::sync::oneshot;

/// Bytes of a record before what it replaces: number, offset, length, whether the replaced bytes follow (else: zeroes).
const HEAD: usize = 8 + 8 + 4 + 4;
/// Longest write that puts something back.
const PUT_BACK: usize = 1 << 20;

/// A write and what it replaced.
struct Record {
    number: u64,
    offset: u64,
    old: Vec<u8>,
}

impl Record {
    fn encode(&self) -> Vec<u8> {
        let is_zero = self.old.iter().all(|byte| *byte == 0);
        let mut bytes = Vec::with_capacity(HEAD + if is_zero { 0 } else { self.old.len() });
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(self.offset.to_le_bytes());
        bytes.extend((self.old.len() as u32).to_le_bytes());
        bytes.extend(u32::from(!is_zero).to_le_bytes());
        if !is_zero {
            bytes.extend(&self.old);
        }
        bytes
    }

    /// The next record; `None` at the end, or where the process ended in the middle of one: its write had not begun.
    fn decode(bytes: &mut &[u8]) -> Option<Self> {
        let (head, rest) = bytes.split_first_chunk::<HEAD>()?;
        let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
        let half = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes"));
        let (number, offset, length) = (word(0), word(8), half(16) as usize);
        let (old, rest) = match half(20) {
            0 => (vec![0; length], rest),
            _ => (rest.get(..length)?.to_vec(), &rest[length..]),
        };
        *bytes = rest;
        Some(Self { number, offset, old })
    }
}

/// The notes of one disk.
struct Notes {
    /// Without the number of the flush.
    path: PathBuf,
    flush: u64,
    file: Option<File>,
    next: u64,
    /// Writes that are not complete: no flush covers them, so that they are noted anew after each.
    in_flight: BTreeMap<u64, Arc<Vec<u8>>>,
}

impl Notes {
    fn file_of(&self, flush: u64) -> PathBuf {
        self.path.with_extension(format!("undo.{flush}"))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            self.file = Some(OpenOptions::new().create(true).append(true).open(self.file_of(self.flush))?);
        }
        self.file.as_mut().expect("opened above").write_all(bytes)
    }

    fn begin(&mut self, offset: u64, old: Vec<u8>) -> io::Result<u64> {
        let number = self.next;
        self.next += 1;
        let bytes = Arc::new(Record { number, offset, old }.encode());
        self.append(&bytes)?;
        self.in_flight.insert(number, bytes);
        Ok(number)
    }

    /// A flush begins; returns the number below which notes can go when it has returned.
    fn turn(&mut self) -> io::Result<u64> {
        self.flush += 1;
        self.file = None;
        let open: Vec<_> = self.in_flight.values().cloned().collect();
        open.iter().try_for_each(|bytes| self.append(bytes))?;
        Ok(self.flush)
    }
}

/// The numbers of the flushes after which there are notes.
fn noted(path: &Path) -> io::Result<Vec<u64>> {
    let prefix = format!("{}.", path.with_extension("undo").file_name().unwrap_or_default().to_string_lossy());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path.parent().unwrap_or(Path::new(".")))? {
        let name = entry?.file_name();
        found.extend(name.to_string_lossy().strip_prefix(&prefix).and_then(|number| number.parse::<u64>().ok()));
    }
    found.sort_unstable();
    Ok(found)
}

fn remove_below(path: &Path, flush: u64) -> io::Result<()> {
    for number in noted(path)?.into_iter().filter(|&number| number < flush) {
        match std::fs::remove_file(path.with_extension(format!("undo.{number}"))) {
            // Another flush was quicker.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn records(path: &Path) -> io::Result<BTreeMap<u64, Record>> {
    let mut records = BTreeMap::new();
    for flush in noted(path)? {
        let bytes = std::fs::read(path.with_extension(format!("undo.{flush}")))?;
        let mut rest = &*bytes;
        while let Some(record) = Record::decode(&mut rest) {
            records.insert(record.number, record);
        }
    }
    Ok(records)
}

/// What must be written to undo all that `keep` does not keep, by sector.
fn lost(records: &BTreeMap<u64, Record>, mut keep: Keep, sector: u64) -> BTreeMap<u64, &[u8]> {
    let (mut left, mut back) = (BTreeSet::new(), BTreeMap::new());
    for record in records.values().rev() {
        let mut stays = keep.sectors();
        for (at, old) in (record.offset / sector..).zip(record.old.chunks(sector as usize)) {
            match stays() {
                // A newer one has stayed: what this one did to the sector does not show.
                _ if left.contains(&at) => {}
                true => drop(left.insert(at)),
                false => drop(back.insert(at, old)),
            }
        }
    }
    back
}

/// Puts back what power loss has taken.
async fn put_back(disk: &dyn Disk, records: &BTreeMap<u64, Record>, keep: Keep) -> io::Result<usize> {
    let sector = u64::from(disk.geometry().sector);
    let back = lost(records, keep, sector);
    let mut run: (u64, Vec<u8>) = (0, Vec::new());
    for (&at, old) in &back {
        let follows = run.0 + run.1.len() as u64 == at * sector;
        if !run.1.is_empty() && (!follows || run.1.len() >= PUT_BACK) {
            disk.write(run.0, Buf::copied(&run.1)).await?;
            run.1.clear();
        }
        if run.1.is_empty() {
            run.0 = at * sector;
        }
        run.1.extend(*old);
    }
    if !run.1.is_empty() {
        disk.write(run.0, Buf::copied(&run.1)).await?;
    }
    disk.flush().await?;
    Ok(back.len())
}

/// A disk that loses unflushed writes with power, hangs, fills up and lies when its host's faults say so.
pub(crate) struct HeldDisk(Arc<Held>);

struct Held {
    env: Env,
    faults: Arc<Faults>,
    disk: Arc<dyn Disk>,
    notes: Mutex<Notes>,
}

impl HeldDisk {
    /// Opens what is behind `disk`, the file at `path`, as power loss has left it.
    pub(crate) async fn open(
        env: &Env,
        faults: &Arc<Faults>,
        disk: Arc<dyn Disk>,
        path: &Path,
    ) -> io::Result<Arc<dyn Disk>> {
        let note = faults.note(path, "undo");
        let records = records(&note)?;
        let mut flush = noted(&note)?.last().map_or(0, |last| last + 1);
        if faults.lost_power(path)? {
            let sectors = put_back(&*disk, &records, faults.keep_of(path)).await?;
            let writes = records.len();
            tracing::warn!(disk = %path.display(), writes, sectors, "power was lost with these writes unflushed");
            remove_below(&note, flush)?;
            flush = 0;
        }
        faults.settled(path)?;
        let next = records.last_key_value().map_or(0, |(last, _)| last + 1);
        let notes = Notes { path: note, flush, file: None, next, in_flight: BTreeMap::new() };
        Ok(Arc::new(Self(Arc::new(Held {
            env: env.clone(),
            faults: Arc::clone(faults),
            disk,
            notes: Mutex::new(notes),
        }))))
    }

    /// Runs a request whether or not it is polled.
    fn start<T: Send + 'static, F>(&self, request: impl FnOnce(Arc<Held>) -> F) -> IoFuture<T>
    where
        F: Future<Output = io::Result<T>> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let (held, request) = (Arc::clone(&self.0), request(Arc::clone(&self.0)));
        drop(self.0.env.spawn("held I/O", async move {
            held.faults.pass().await;
            let result = request.await;
            // What is under way when a disk begins to hang is not answered either.
            held.faults.pass().await;
            // Nobody waits any more, perhaps.
            drop(sender.send(result));
        }));
        Box::pin(async move { receiver.await.unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into())) })
    }
}

impl Held {
    async fn write(&self, offset: u64, data: Vec<Buf>) -> io::Result<()> {
        let bytes = data.iter().map(|piece| piece.len()).sum();
        let old = self.disk.read(offset, BufMut::heap(bytes)).await?;
        if old.iter().all(|byte| *byte == 0) {
            self.faults.room()?;
        }
        let number = lock(&self.notes).begin(offset, old.to_vec())?;
        let written = self.disk.write_vectored(offset, data).await;
        lock(&self.notes).in_flight.remove(&number);
        written
    }

    async fn flush(&self) -> io::Result<()> {
        if self.faults.lies() {
            return Ok(());
        }
        let (below, path) = {
            let mut notes = lock(&self.notes);
            (notes.turn()?, notes.path.clone())
        };
        self.disk.flush().await?;
        remove_below(&path, below)
    }
}

impl Disk for HeldDisk {
    fn geometry(&self) -> Geometry {
        self.0.disk.geometry()
    }

    fn attachment(&self) -> u64 {
        self.0.disk.attachment()
    }

    fn read(&self, offset: u64, into: BufMut) -> IoFuture<BufMut> {
        self.start(|held| async move { held.disk.read(offset, into).await })
    }

    fn write(&self, offset: u64, data: Buf) -> IoFuture<()> {
        self.write_vectored(offset, vec![data])
    }

    fn write_vectored(&self, offset: u64, data: Vec<Buf>) -> IoFuture<()> {
        let bytes = data.iter().map(|piece| piece.len() as u64).sum();
        if let Err(error) = self.geometry().check("write", offset, bytes, data.iter().map(|piece| &**piece)) {
            return ready(Err(error));
        }
        self.start(|held| async move { held.write(offset, data).await })
    }

    fn flush(&self) -> IoFuture<()> {
        self.start(|held| async move { held.flush().await })
    }

    /// Effective at once, as a device may have it: nothing is noted.
    fn discard(&self, offset: u64, bytes: u64) -> IoFuture<()> {
        self.start(|held| async move { held.disk.discard(offset, bytes).await })
    }
}

#[cfg(test)]
pub(super) mod tests_support {
    use super::*;

    pub(in crate::faults) fn two_writes_one_complete_before_a_flush(path: &Path) -> (u64, u64) {
        let mut notes = Notes { path: path.to_owned(), flush: 0, file: None, next: 0, in_flight: BTreeMap::new() };
        let covered = notes.begin(0, vec![1; 512]).expect("noted");
        let open = notes.begin(512, vec![2; 512]).expect("noted");
        notes.in_flight.remove(&covered);
        let below = notes.turn().expect("turned");
        remove_below(path, below).expect("removed");
        (covered, open)
    }

    pub(in crate::faults) fn noted_numbers(path: &Path) -> Vec<u64> {
        records(path).expect("read").into_keys().collect()
    }
}
