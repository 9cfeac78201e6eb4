//! Flips bits in a device file, and takes the damage back.

use crate::random::Random;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes looked at together; one that holds only zeroes is not worth damaging.
const PAGE: usize = 4096;

/// Bits that were flipped, for the way back and for the report.
#[derive(Clone, Debug)]
pub struct Damage {
    path: PathBuf,
    /// Byte offset and the bit's mask.
    pub flips: Vec<(u64, u8)>,
}

impl Damage {
    /// Flips `count` random bits in pages of `range` that hold something.
    ///
    /// # Panics
    /// The file cannot be read and written, or holds nothing there.
    pub fn flip(path: &Path, range: std::ops::Range<u64>, count: usize, random: &mut Random) -> Self {
        let pages = pages_in_use(path, range);
        assert!(!pages.is_empty(), "{} holds nothing there", path.display());
        let mut flips = Vec::with_capacity(count);
        for _ in 0..count {
            let page = pages[random.below(pages.len() as u64) as usize];
            flips.push((page + random.below(PAGE as u64), 1 << random.below(8)));
        }
        let damage = Self { path: path.to_owned(), flips };
        damage.toggle();
        damage
    }

    /// Flips the same bits back.
    pub fn undo(self) {
        self.toggle();
    }

    fn toggle(&self) {
        let file = File::options().read(true).write(true).open(&self.path).expect("the device file");
        for &(offset, mask) in &self.flips {
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset).expect("a byte of the device");
            byte[0] ^= mask;
            file.write_all_at(&byte, offset).expect("a byte of the device");
        }
        file.sync_all().expect("the device file");
    }
}

fn pages_in_use(path: &Path, range: std::ops::Range<u64>) -> Vec<u64> {
    let file = File::open(path).expect("the device file");
    let end = range.end.min(file.metadata().expect("its size").len());
    let mut pages = Vec::new();
    let mut buffer = vec![0; 1 << 20];
    let mut offset = range.start;
    while offset < end {
        let length = (buffer.len() as u64).min(end - offset) as usize;
        file.read_exact_at(&mut buffer[..length], offset).expect("bytes of the device");
        let used = buffer[..length].chunks(PAGE).enumerate().filter(|(_, page)| page.iter().any(|&byte| byte != 0));
        pages.extend(used.map(|(index, _)| offset + (index * PAGE) as u64));
        offset += length as u64;
    }
    pages
}
