//! Content of a memory disk: what can be read, and what would be left after power loss.

use super::faults::Keep;
use crate::buf::Buf;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

const PAGE: u64 = 4096;

type Page = [u8; PAGE as usize];

/// Sparse bytes; what was never written is zero.
#[derive(Default)]
pub(super) struct Pages(BTreeMap<u64, Box<Page>>);

/// The parts of `offset..offset + bytes` by page: page number, offset inside, offset in the request, length.
fn parts(offset: u64, bytes: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == bytes {
            return None;
        }
        let at = offset + done as u64;
        let inside = (at % PAGE) as usize;
        let length = (PAGE as usize - inside).min(bytes - done);
        let part = (at / PAGE, inside, done, length);
        done += length;
        Some(part)
    })
}

impl Pages {
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        for (page, inside, done, length) in parts(offset, into.len()) {
            let into = &mut into[done..done + length];
            match self.0.get(&page) {
                Some(bytes) => into.copy_from_slice(&bytes[inside..inside + length]),
                None => into.fill(0),
            }
        }
    }

    fn write(&mut self, offset: u64, from: &[u8]) {
        for (page, inside, done, length) in parts(offset, from.len()) {
            let bytes = self.0.entry(page).or_insert_with(|| Box::new([0; PAGE as usize]));
            bytes[inside..inside + length].copy_from_slice(&from[done..done + length]);
        }
    }

    pub(super) fn resident_bytes(&self) -> u64 {
        self.0.len() as u64 * PAGE
    }
}

/// A write that no flush has covered yet.
struct Change {
    number: u64,
    offset: u64,
    data: Vec<Buf>,
    /// A flush that should have covered it failed: power loss takes it for certain.
    doomed: bool,
}

/// The medium behind its volatile write cache.
pub(super) struct Media {
    sector: u32,
    current: Pages,
    /// Stable content of the pages that unflushed changes touched; `None` = never written.
    stable: BTreeMap<u64, Option<Box<Page>>>,
    unflushed: Vec<Change>,
    next_change: u64,
    damaged: BTreeSet<u64>,
}

impl Media {
    pub(super) fn new(sector: u32) -> Self {
        Self {
            sector,
            current: Pages::default(),
            stable: BTreeMap::new(),
            unflushed: Vec::new(),
            next_change: 0,
            damaged: BTreeSet::new(),
        }
    }

    pub(super) fn current(&self) -> &Pages {
        &self.current
    }

    /// The number the next completed write gets; a flush that begins now covers all below.
    pub(super) fn next_change(&self) -> u64 {
        self.next_change
    }

    fn sectors(&self, range: Range<u64>) -> Range<u64> {
        range.start / u64::from(self.sector)..range.end.div_ceil(u64::from(self.sector))
    }

    pub(super) fn damage(&mut self, range: Range<u64>) {
        self.damaged.extend(self.sectors(range));
    }

    pub(super) fn is_damaged(&self, range: Range<u64>) -> bool {
        self.damaged.range(self.sectors(range)).next().is_some()
    }

    /// Keeps the stable form of the pages that are about to change.
    fn remember(&mut self, offset: u64, bytes: usize) {
        for (page, ..) in parts(offset, bytes) {
            self.stable.entry(page).or_insert_with(|| self.current.0.get(&page).cloned());
        }
    }

    /// A completed write, unflushed.
    pub(super) fn write(&mut self, offset: u64, data: Vec<Buf>) {
        let mut at = offset;
        for piece in &data {
            self.remember(at, piece.len());
            self.current.write(at, piece);
            at += piece.len() as u64;
        }
        if !self.damaged.is_empty() {
            for sector in self.sectors(offset..at) {
                self.damaged.remove(&sector);
            }
        }
        self.unflushed.push(Change { number: self.next_change, offset, data, doomed: false });
        self.next_change += 1;
    }

    /// Forgets whole pages inside the range, also as stable content: a device may have done so at once.
    pub(super) fn discard(&mut self, offset: u64, bytes: u64) {
        let pages = offset.div_ceil(PAGE)..(offset + bytes) / PAGE;
        for page in self.current.0.range(pages.clone()).map(|(&page, _)| page).collect::<Vec<_>>() {
            self.current.0.remove(&page);
        }
        for (_, stable) in self.stable.range_mut(pages) {
            *stable = None;
        }
    }

    /// Everything below `covers` is stable now.
    pub(super) fn flush(&mut self, covers: u64) {
        let stays = |change: &Change| change.number >= covers || change.doomed;
        if !self.unflushed.iter().any(stays) {
            self.unflushed.clear();
            self.stable.clear();
            return;
        }
        let (stay, covered): (Vec<_>, Vec<_>) = std::mem::take(&mut self.unflushed).into_iter().partition(stays);
        for change in covered {
            let mut at = change.offset;
            for piece in &change.data {
                for (page, inside, done, length) in parts(at, piece.len()) {
                    let stable = self.stable.get_mut(&page).expect("remembered when it was written");
                    let bytes = stable.get_or_insert_with(|| Box::new([0; PAGE as usize]));
                    bytes[inside..inside + length].copy_from_slice(&piece[done..done + length]);
                }
                at += piece.len() as u64;
            }
        }
        let touched: BTreeSet<u64> = stay
            .iter()
            .flat_map(|change| parts(change.offset, change.data.iter().map(|piece| piece.len()).sum()))
            .map(|(page, ..)| page)
            .collect();
        self.stable.retain(|page, _| touched.contains(page));
        self.unflushed = stay;
    }

    /// A flush over these changes failed: they can be read, but will never be stable.
    pub(super) fn doom(&mut self, covers: u64) {
        for change in &mut self.unflushed {
            change.doomed |= change.number < covers;
        }
    }

    /// Back to what is stable, and on it what `keep` keeps of the rest.
    pub(super) fn power_off(&mut self, keep: Keep) {
        for (page, stable) in std::mem::take(&mut self.stable) {
            match stable {
                Some(bytes) => self.current.0.insert(page, bytes),
                None => self.current.0.remove(&page),
            };
        }
        let mut keep = keep;
        for change in std::mem::take(&mut self.unflushed) {
            if !change.doomed {
                self.keep_some(change.offset, &change.data, &mut keep, true);
            }
        }
    }

    /// Writes the sectors that `keep` lets stay; `stable` says whether they are beyond loss (else: unflushed).
    pub(super) fn keep_some(&mut self, offset: u64, data: &[Buf], keep: &mut Keep, stable: bool) {
        let mut stays = keep.sectors();
        let sector = self.sector as usize;
        let mut at = offset;
        for piece in data {
            for from in (0..piece.len()).step_by(sector) {
                if stays() {
                    let bytes = piece.slice(from..from + sector);
                    if stable { self.current.write(at, &bytes) } else { self.write(at, vec![bytes]) }
                }
                at += sector as u64;
            }
        }
    }

    fn change_stable(&mut self, offset: u64, change: impl Fn(&mut u8, usize), bytes: usize) {
        for (page, inside, done, length) in parts(offset, bytes) {
            let current = self.current.0.entry(page).or_insert_with(|| Box::new([0; PAGE as usize]));
            (0..length).for_each(|i| change(&mut current[inside + i], done + i));
            if let Some(stable) = self.stable.get_mut(&page) {
                let stable = stable.get_or_insert_with(|| Box::new([0; PAGE as usize]));
                (0..length).for_each(|i| change(&mut stable[inside + i], done + i));
            }
        }
    }

    pub(super) fn flip(&mut self, offset: u64, bit: u8) {
        self.change_stable(offset, |byte, _| *byte ^= 1 << (bit % 8), 1);
    }

    pub(super) fn poke(&mut self, offset: u64, bytes: &[u8]) {
        self.change_stable(offset, |byte, i| *byte = bytes[i], bytes.len());
    }
}
