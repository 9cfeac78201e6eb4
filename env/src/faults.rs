//! Faults of the machine under a real process: power loss, disks that hang or are full, clocks that differ. Owner: the process;
//! only in builds with the feature `faults`, which nobody is given.
//!
//! `XSAN_FAULTS` names a directory, one per host. Files in it say what is wrong, and are obeyed as soon as they change:
//!
//! | file | meaning |
//! |---|---|
//! | `boot` | the host's boot id, a number in hexadecimal; read at the start only |
//! | `keep` | what a loss of power leaves of the writes that no flush covered: `nothing`, `all`, else any sectors |
//! | `stall` | while it is there, no request of a disk or file is begun or answered |
//! | `full` | while it is there, disks take no bytes where they hold zeroes (a file without a block there), files none at all |
//! | `lie` | while it is there, flushes of disks are answered and not done: the proof that somebody would notice |
//! | `clock` | `offset rate wall`: the steady clock's offset in ms (grows only while running: that clock never goes back), its rate in millionths more than real, the wall clock's offset in ms |
//!
//! **Power loss** is a SIGKILL and a start under another `boot`: what was not flushed is taken back before anything is read.
//! SIGKILL and a start under the same one is a crash of the process alone, and loses nothing. For that, what a write replaces is
//! noted in `held` beside these files until a flush that began after the write was complete has returned (see `disk`, `files`).
//!
//! Not covered: what is written past this crate. The fjall indexes keep everything, and neither hang nor fill up; a loss of
//! power may leave as much of them. Files that are replaced as a whole are durable when that is answered, and are not noted.

mod clock;
mod disk;
mod files;
#[cfg(test)]
mod tests;
mod watch;

pub(crate) use disk::HeldDisk;
pub(crate) use files::{HeldFile, forget, take_back};

use crate::memory::{Keep, mix};
use clock::{Clock, Setting};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// What the files say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Control {
    stall: bool,
    full: bool,
    lie: bool,
    clock: Setting,
}

/// The faults of one host.
pub struct Faults {
    dir: PathBuf,
    boot: Option<u128>,
    keep: Keep,
    watch: watch::Watch,
    clock: Mutex<Clock>,
}

static PROCESS: OnceLock<Option<Arc<Faults>>> = OnceLock::new();

impl Faults {
    /// Those of this process; `None` without `XSAN_FAULTS`.
    ///
    /// # Panics
    /// It names no directory that can be watched.
    pub fn of_process() -> Option<&'static Arc<Self>> {
        let faults = PROCESS.get_or_init(|| {
            let dir = std::env::var_os("XSAN_FAULTS")?;
            let faults = Self::of(Path::new(&dir)).expect("XSAN_FAULTS names a directory that can be watched");
            tracing::warn!(dir = %faults.dir.display(), boot = ?faults.boot, "this process meets faults that are made");
            Some(faults)
        });
        faults.as_ref()
    }

    /// Those that `dir` tells of.
    fn of(dir: &Path) -> io::Result<Arc<Self>> {
        std::fs::create_dir_all(dir.join("held"))?;
        let boot = std::fs::read_to_string(dir.join("boot")).ok();
        let boot = boot.and_then(|text| u128::from_str_radix(text.trim(), 16).ok());
        let keep = match std::fs::read_to_string(dir.join("keep")).unwrap_or_default().trim() {
            "nothing" => Keep::Nothing,
            "all" => Keep::All,
            _ => Keep::Seed(mix(boot.unwrap_or_default() as u64)),
        };
        let watch = watch::Watch::new(dir)?;
        let clock = Mutex::new(Clock::new(watch.control().borrow().clock));
        Ok(Arc::new(Self { dir: dir.to_owned(), boot, keep, watch, clock }))
    }

    /// The boot id to claim, given the machine's.
    pub(crate) fn boot_id(&self, real: u128) -> u128 {
        self.boot.unwrap_or(real)
    }

    /// The steady clock of this host, given the machine's, in ns.
    pub(crate) fn now(&self, real: u64) -> u64 {
        let setting = self.watch.control().borrow().clock;
        lock(&self.clock).now(real, setting)
    }

    /// How long a time of the host's steady clock is in truth.
    pub(crate) fn real_time(&self, time: Duration) -> Duration {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(self.watch.control().borrow().clock.real_span(nanos))
    }

    /// The wall clock of this host, given the machine's, in ms.
    pub(crate) fn wall_millis(&self, real: u64) -> u64 {
        real.saturating_add_signed(self.watch.control().borrow().clock.wall_millis)
    }

    /// Returns while disks do not hang.
    pub(crate) async fn pass(&self) {
        // An error: the watcher has ended, which it never does while the process runs.
        drop(self.watch.control().clone().wait_for(|control| !control.stall).await);
    }

    /// Refuses to use new space while there is none.
    pub(crate) fn room(&self) -> io::Result<()> {
        if self.watch.control().borrow().full { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
    }

    fn lies(&self) -> bool {
        self.watch.control().borrow().lie
    }

    /// Where something is noted about the file at `path`.
    fn note(&self, path: &Path, kind: &str) -> PathBuf {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let name = path.to_string_lossy().replace('%', "%%").replace('/', "%");
        self.dir.join("held").join(format!("{name}.{kind}"))
    }

    /// Whether the host lost power since this was last asked about `path`. To be followed by [`Faults::settled`] once everything
    /// is taken back.
    fn lost_power(&self, path: &Path) -> io::Result<bool> {
        match std::fs::read_to_string(self.note(path, "boot")) {
            Ok(text) => Ok(text != self.boot_text()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn settled(&self, path: &Path) -> io::Result<()> {
        std::fs::write(self.note(path, "boot"), self.boot_text())
    }

    fn boot_text(&self) -> String {
        format!("{:x}", self.boot.unwrap_or_default())
    }

    /// What power loss leaves of a file's unflushed writes: something else for each.
    fn keep_of(&self, path: &Path) -> Keep {
        let of_path = path.to_string_lossy().bytes().fold(0, |seed, byte| mix(seed ^ u64::from(byte)));
        match self.keep {
            Keep::Seed(seed) => Keep::Seed(seed ^ of_path),
            keep => keep,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
