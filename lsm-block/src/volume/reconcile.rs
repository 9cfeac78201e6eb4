//! Reconcile (P7): asks devices which segments they hold and deletes those that the registered checkpoint decided and does
//! not list. Deletes are sent once and not repeated: a node that was away, or a process that ended, left such names behind.
//!
//! The other way round, a listed segment whose shard is not on the device of its position misses that position: holes that nobody could write down
//! (those of the segment that holds the root, when its writer ended) are found that way, and are filled.
//!
//! Runs once after the start and once after nodes have come back, and again behind the next checkpoint if some names were not
//! decided yet. Bounds: one page of names at a time, and 16 bytes a listed segment.

use super::writer::{Event, Grave, Writer};
use crate::store::StoreError;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::Ordering;
use std::time::Duration;
use xsan_types::{DeviceId, Epoch, SegmentName, ShardId, ShardIndex};

/// Nodes that return together are asked together, and not while they are busy starting.
const RECONCILE_AFTER: Duration = Duration::from_secs(5);

/// How far it is.
#[derive(Default)]
pub(super) struct Reconcile {
    /// The timer, or a page, is under way.
    is_running: bool,
    /// Asked for while it ran.
    again: bool,
    /// Devices not asked yet, the present one first, and the last name it told.
    devices: VecDeque<DeviceId>,
    after: Option<ShardId>,
    /// Names that no checkpoint has decided were seen.
    undecided: bool,
    /// Segments that were listed before the first device was asked, and their positions that were found, as bits.
    held: BTreeMap<u64, u64>,
    /// Devices that have told all their names.
    asked: BTreeSet<DeviceId>,
    /// The map under which it began.
    epoch: Epoch,
}

impl Writer {
    /// Nodes have come back, or the volume has just been opened.
    pub(super) fn reconcile_later(&mut self) {
        if self.reconcile.is_running {
            self.reconcile.again = true;
            return;
        }
        self.reconcile.is_running = true;
        let sleep = self.shared.env.sleep(RECONCILE_AFTER);
        self.events.push(Box::pin(async move {
            sleep.await;
            Event::Reconcile
        }));
    }

    /// A checkpoint was registered: more is decided.
    pub(super) fn reconcile_rest(&mut self) {
        if std::mem::take(&mut self.reconcile.undecided) {
            self.reconcile_later();
        }
    }

    pub(super) fn begin_reconcile(&mut self) {
        self.reconcile.epoch = self.shared.store.map_epoch();
        self.reconcile.devices = self.shared.store.devices().into();
        self.reconcile.after = None;
        self.reconcile.undecided = false;
        // What is sealed from here on may be told in part, and says nothing.
        let listed = self.shared.index.segments();
        self.reconcile.held = listed.into_iter().map(|record| (record.sealed.name.number, 0)).collect();
        self.reconcile.asked.clear();
        self.ask_for_names();
    }

    fn ask_for_names(&mut self) {
        let Some(&device) = self.reconcile.devices.front() else {
            self.reconcile.is_running = false;
            self.note_missing();
            if std::mem::take(&mut self.reconcile.again) {
                self.reconcile_later();
            } else {
                self.shared.unchecked.store(false, Ordering::Release);
            }
            return;
        };
        let page = self.shared.store.list(device, self.shared.id, self.reconcile.after);
        self.events.push(Box::pin(async move { Event::Names(page.await) }));
    }

    /// One page of one device.
    pub(super) fn names_told(&mut self, page: Result<Vec<ShardId>, StoreError>) {
        let asked = self.reconcile.devices.front().copied().unwrap_or_default();
        let told_all = page.as_ref().is_ok_and(Vec::is_empty);
        // A device that does not answer is asked when it comes back.
        let page = page.unwrap_or_default();
        self.reconcile.after = page.last().copied();
        if page.is_empty() && self.reconcile.devices.pop_front().is_some() && told_all {
            self.reconcile.asked.insert(asked);
        }
        self.note_held(asked, &page);
        let mut names: Vec<SegmentName> = page.into_iter().map(|shard| shard.segment).collect();
        names.dedup();
        names.retain(|name| self.is_garbage(name));
        if !names.is_empty() {
            tracing::info!(volume = %self.shared.id, names = names.len(), "segments that were left behind are deleted");
            // Reads that run may have looked such a name up before its checkpoint (R5).
            self.graves.push(Grave { token: self.shared.renew_read_token(), names });
            self.bury();
        }
        self.ask_for_names();
    }

    /// Whether nothing can ever make a name valid again: the registered checkpoint decides it, and nothing lists it.
    fn is_garbage(&mut self, name: &SegmentName) -> bool {
        if name.volume != self.shared.id || name.generation > self.register.generation || !self.register.pins.is_empty()
        {
            return false;
        }
        let number = name.number;
        let is_listed = self.lists(name)
            || self.manifest.iter().any(|sealed| sealed.name == *name)
            || self.segments.contains_key(&number)
            || self.row_segments.contains_key(&number);
        if is_listed {
            return false;
        }
        let is_decided = self.register.checkpoint.is_some_and(|checkpoint| number < checkpoint.border);
        self.reconcile.undecided |= !is_decided;
        is_decided
    }

    fn lists(&self, name: &SegmentName) -> bool {
        self.shared.index.segment(name.number).is_some_and(|record| record.sealed.name == *name)
    }

    fn note_held(&mut self, device: DeviceId, page: &[ShardId]) {
        for shard in page {
            let index = usize::from(shard.index.0);
            // A copy on another device than the position's is of no use, unless it is to be carried from there.
            let (store, pg) = (&self.shared.store, shard.segment.pg);
            let is_in_place = || {
                store.positions(pg).get(index) == Some(&Some(device))
                    || store.positions_before(pg).get(index) == Some(&Some(device))
            };
            if index < 64 && self.lists(&shard.segment) && is_in_place() {
                self.reconcile.held.entry(shard.segment.number).and_modify(|bits| *bits |= 1 << index);
            }
        }
    }

    /// Takes over what the devices told of the positions of listed segments.
    fn note_missing(&mut self) {
        let held = std::mem::take(&mut self.reconcile.held);
        let asked = std::mem::take(&mut self.reconcile.asked);
        let (mut found, mut complete) = (false, true);
        for (number, bits) in held {
            let Some(record) = self.shared.index.segment(number) else { continue };
            let positions = (0..64).zip(self.shared.store.positions(record.sealed.name.pg));
            complete &= positions
                .clone()
                .all(|(index, device)| bits >> index & 1 == 1 || device.is_some_and(|device| asked.contains(&device)));
            let missing: Vec<ShardIndex> = positions
                .filter(|(index, device)| match device {
                    Some(device) if asked.contains(device) => bits >> index & 1 == 0,
                    _ => record.holes.contains(&ShardIndex(*index)),
                })
                .map(|(index, _)| ShardIndex(index))
                .collect();
            if missing != record.holes {
                let name = record.sealed.name;
                tracing::warn!(volume = %self.shared.id, segment = %name, ?missing, known = ?record.holes, "positions are missing");
                found |= !missing.is_empty();
                self.shared.index.set_holes(number, missing);
            }
        }
        if complete {
            self.shared.checked_epoch.store(self.reconcile.epoch.0, Ordering::Release);
        }
        if found {
            self.look_after_holes();
        }
    }
}
