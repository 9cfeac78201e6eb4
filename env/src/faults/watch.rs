//! Follows the files that say what is wrong.
#![allow(unsafe_code)]

use super::Control;
use super::clock::Setting;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::watch;

/// A directory under watch; the watch ends with its value.
pub(super) struct Watch {
    changes: Arc<OwnedFd>,
    number: libc::c_int,
    control: watch::Receiver<Control>,
}

impl Watch {
    /// Begins to follow the files in `dir`.
    pub(super) fn new(dir: &Path) -> io::Result<Self> {
        let (changes, number) = watched(dir)?;
        let changes = Arc::new(changes);
        // Read after the watch has begun: no change is missed.
        let (sender, control) = watch::channel(read(dir));
        let (followed, dir) = (Arc::clone(&changes), dir.to_owned());
        let thread = std::thread::Builder::new().name("xsan-faults".into());
        thread.spawn(move || follow(&followed, &dir, &sender))?;
        Ok(Self { changes, number, control })
    }

    /// What the files say.
    pub(super) fn control(&self) -> &watch::Receiver<Control> {
        &self.control
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Wakes the thread with an event that says so. It fails if the directory, and so the watch, is gone already.
        // SAFETY: the descriptor is open.
        let _ = unsafe { libc::inotify_rm_watch(self.changes.as_raw_fd(), self.number) };
    }
}

fn read(dir: &Path) -> Control {
    let has = |name: &str| dir.join(name).exists();
    let clock = std::fs::read_to_string(dir.join("clock")).unwrap_or_default();
    Control { stall: has("stall"), full: has("full"), lie: has("lie"), clock: Setting::parse(&clock) }
}

fn watched(dir: &Path) -> io::Result<(OwnedFd, libc::c_int)> {
    // SAFETY: no memory is passed.
    let descriptor = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let changes = unsafe { OwnedFd::from_raw_fd(descriptor) };
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes())?;
    let events = libc::IN_CREATE | libc::IN_DELETE | libc::IN_MOVED_TO | libc::IN_MOVED_FROM | libc::IN_CLOSE_WRITE;
    // SAFETY: `path` ends with a zero byte.
    let number = unsafe { libc::inotify_add_watch(changes.as_raw_fd(), path.as_ptr(), events) };
    if number < 0 { Err(io::Error::last_os_error()) } else { Ok((changes, number)) }
}

/// Until the watch ends.
fn follow(changes: &OwnedFd, dir: &Path, control: &watch::Sender<Control>) {
    let mut events = [0_u8; 4096];
    loop {
        // SAFETY: the buffer has as many bytes.
        let got = unsafe { libc::read(changes.as_raw_fd(), events.as_mut_ptr().cast(), events.len()) };
        match usize::try_from(got) {
            Ok(got) if has_ended(&events[..got]) => return,
            Err(_) if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted => return,
            _ => {}
        }
        // Which file it was does not matter: there are few.
        control.send_if_modified(|known| {
            let now = read(dir);
            let is_new = *known != now;
            *known = now;
            is_new
        });
    }
}

/// Whether one of these says that the watch has ended. An event: watch, kind, cookie, length of the name (4 bytes each), name.
fn has_ended(mut events: &[u8]) -> bool {
    while let Some((head, rest)) = events.split_first_chunk::<16>() {
        let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().expect("4 bytes"));
        if word(4) & libc::IN_IGNORED != 0 {
            return true;
        }
        events = rest.get(word(12) as usize..).unwrap_or_default();
    }
    false
}
