//! What the devices of a [`super::MemoryStore`] hold, and the rules by which it changes.

use super::rows::RowSegment;
use super::{MemoryRegisters, shard_indexes};
use crate::store::{Holes, NewMember, SegmentRead, StoreError};
use std::collections::{BTreeMap, BTreeSet};
use xsan_env::{Buf, BufMut};
use xsan_types::{
    ClosedMember, DeviceId, FlushRequest, Generation, Incarnation, MemberRef, MemberState, OpenReplica, RegisterView,
    Scheme, SealedSegment, SegmentName, SetId, ShardId, ShardIndex, VolumeId, crc32c,
};

/// Open replicas are reserved in pieces of this many bytes; what was never written there is a previous tenant's.
const EXTENT_BYTES: u64 = 1 << 20;
const STALE: u8 = 0xe5;

/// SplitMix64: what a power loss leaves behind must repeat with the seed.
pub(super) struct Random(pub u64);

impl Random {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end.max(1)
    }
}

struct Append {
    offset: u64,
    data: Buf,
    flushed: bool,
}

impl Append {
    fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }
}

#[derive(Default)]
pub(super) struct Replica {
    appends: Vec<Append>,
}

impl Replica {
    /// The length without a gap from 0.
    fn contiguous(&self) -> u64 {
        let mut parts: Vec<_> = self.appends.iter().map(|append| (append.offset, append.end())).collect();
        parts.sort_unstable();
        parts.into_iter().fold(0, |reached, (start, end)| if start <= reached { reached.max(end) } else { reached })
    }

    fn end(&self) -> u64 {
        self.appends.iter().map(Append::end).max().unwrap_or(0)
    }

    fn reserved(&self) -> u64 {
        self.end().next_multiple_of(EXTENT_BYTES)
    }

    fn append(&mut self, segment: SegmentName, offset: u64, data: Buf) {
        let end = offset + data.len() as u64;
        for old in &self.appends {
            let (from, to) = (offset.max(old.offset), end.min(old.end()));
            if from < to {
                let new = &data[(from - offset) as usize..(to - offset) as usize];
                let old = &old.data[(from - old.offset) as usize..(to - old.offset) as usize];
                assert!(new == old, "{segment} is rewritten with other bytes at {from}..{to}");
            }
        }
        if !self.appends.iter().any(|old| old.offset <= offset && old.end() >= end) {
            self.appends.push(Append { offset, data, flushed: false });
        }
    }

    pub(super) fn read(&self, offset: u64, length: u32) -> Buf {
        let end = offset + u64::from(length);
        assert!(end <= self.reserved(), "a read up to {end} of a replica with {} bytes reserved", self.reserved());
        let mut out = BufMut::heap(length as usize);
        out.fill(STALE);
        for append in &self.appends {
            let (from, to) = (offset.max(append.offset), end.min(append.end()));
            if from < to {
                out[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&append.data[(from - append.offset) as usize..(to - append.offset) as usize]);
            }
        }
        out.freeze()
    }

    fn power_loss(&mut self, sector: u64, random: &mut Random) {
        self.appends.retain_mut(|append| {
            if append.flushed {
                return true;
            }
            let sectors = append.data.len() as u64 / sector;
            let kept = match random.below(3) {
                0 => 0,
                1 => random.below(sectors + 1) * sector,
                _ => append.data.len() as u64,
            };
            append.data = append.data.slice(..kept as usize);
            append.flushed = true;
            kept > 0
        });
    }
}

pub(super) struct Member {
    incarnation: Incarnation,
    boot: u64,
    closed: bool,
    pub(super) manifest: Vec<SealedSegment>,
    pub(super) replicas: BTreeMap<SegmentName, Replica>,
}

pub(super) struct Device {
    pub(super) up: bool,
    pub(super) incarnation: Incarnation,
    boot: u64,
    pub(super) members: BTreeMap<(VolumeId, SetId), Member>,
    /// Newest generation a close was seen of, in memory only (P3).
    closed: BTreeMap<VolumeId, Generation>,
}

impl Device {
    pub(super) fn new(incarnation: u64) -> Self {
        Self {
            up: true,
            incarnation: Incarnation(incarnation),
            boot: 0,
            members: BTreeMap::new(),
            closed: BTreeMap::new(),
        }
    }

    pub(super) fn start(&mut self, incarnation: u64) {
        self.up = true;
        self.incarnation = Incarnation(incarnation);
        self.closed.clear();
    }
}

/// A segment with its shards: whole, and where which position lies.
pub(super) struct Sealed {
    pub(super) body: Buf,
    pub(super) shards: BTreeSet<ShardIndex>,
}

pub(super) struct State {
    pub(super) scheme: Scheme,
    pub(super) sector: u64,
    pub(super) order: Vec<DeviceId>,
    pub(super) devices: BTreeMap<DeviceId, Device>,
    pub(super) segments: BTreeMap<SegmentName, Sealed>,
    /// Every name ever sealed, and the checksum of its bytes: no name is used twice (P1).
    pub(super) sealed_names: BTreeMap<SegmentName, (u64, xsan_types::Crc32c)>,
    pub(super) rows: BTreeMap<SegmentName, RowSegment>,
    pub(super) registers: Option<MemoryRegisters>,
    pub(super) incarnations: u64,
    pub(super) random: Random,
    /// Devices that are being emptied.
    pub(super) leaving: BTreeSet<DeviceId>,
    /// From where on replicas on a device cannot be read.
    pub(super) unreadable: BTreeMap<DeviceId, u64>,
    /// By group and index: where shards of positions that move still are.
    pub(super) before: BTreeMap<(u32, u8), DeviceId>,
    pub(super) epoch: u64,
    /// Calls of `fill_holes`.
    pub(super) fills: u64,
}

impl State {
    pub(super) fn device(&self, device: DeviceId) -> &Device {
        self.devices.get(&device).unwrap_or_else(|| panic!("there is no device {device}"))
    }

    pub(super) fn device_mut(&mut self, device: DeviceId) -> &mut Device {
        self.devices.get_mut(&device).unwrap_or_else(|| panic!("there is no device {device}"))
    }

    /// Placement groups: one per rotation of the devices.
    pub(super) fn groups(&self) -> u32 {
        self.order.len() as u32
    }

    /// Devices of a group's positions.
    pub(super) fn positions(&self, group: u32) -> Vec<DeviceId> {
        (0..self.scheme.width()).map(|i| self.order[(group as usize + i) % self.order.len()]).collect()
    }

    pub(super) fn positions_up(&self, group: u32) -> usize {
        self.positions(group).into_iter().filter(|device| self.device(*device).up).count()
    }

    /// P7: only what a registered checkpoint decides may be trimmed or deleted.
    pub(super) fn check_decided(&self, volume: VolumeId, number: u64) {
        if let Some(border) = self.registers.as_ref().and_then(|registers| registers.border(volume)) {
            assert!(number < border, "segment {number} of {volume} is not decided: the registered border is {border}");
        }
    }

    pub(super) fn create_member(
        &mut self,
        device: DeviceId,
        volume: VolumeId,
        set: SetId,
        manifest: Vec<SealedSegment>,
    ) -> Result<NewMember, StoreError> {
        let sector = self.sector as u32;
        let at = self.device_mut(device);
        if at.closed.get(&volume).is_some_and(|closed| set.generation < *closed) {
            return Err(StoreError::Closed { device });
        }
        let (incarnation, boot) = (at.incarnation, at.boot);
        if let Some(member) = at.members.get(&(volume, set)) {
            let live = !member.closed && member.incarnation == incarnation;
            return if live { Ok(NewMember { incarnation, sector }) } else { Err(StoreError::Closed { device }) };
        }
        let member = Member { incarnation, boot, closed: false, manifest, replicas: BTreeMap::new() };
        at.members.insert((volume, set), member);
        Ok(NewMember { incarnation, sector })
    }

    /// The member, if it takes messages (P3).
    pub(super) fn live(&mut self, member: MemberRef) -> Result<&mut Member, StoreError> {
        let device = member.device;
        let at = self.device_mut(device);
        let current = at.incarnation;
        let found = at.members.get_mut(&(member.volume, member.set)).ok_or(StoreError::NotFound)?;
        if found.closed || found.incarnation != current || member.incarnation != current {
            return Err(StoreError::Closed { device });
        }
        Ok(found)
    }

    pub(super) fn append(
        &mut self,
        member: MemberRef,
        segment: SegmentName,
        offset: u64,
        data: Buf,
    ) -> Result<u64, StoreError> {
        let sector = self.sector;
        assert!(offset.is_multiple_of(sector) && !data.is_empty(), "appends start at a sector and have bytes");
        assert!((data.len() as u64).is_multiple_of(sector), "appends are whole sectors");
        assert_eq!(segment.volume, member.volume, "a member holds its own volume's segments");
        let found = self.live(member)?;
        let listed = found.manifest.iter().any(|line| line.name == segment);
        assert!(!listed, "append to {segment}, which this member knows as sealed");
        let replica = found.replicas.entry(segment).or_default();
        replica.append(segment, offset, data);
        Ok(replica.contiguous())
    }

    pub(super) fn flush(&mut self, request: &FlushRequest) -> Result<(), StoreError> {
        let device = request.device;
        if self.device(device).incarnation != request.incarnation {
            return Err(StoreError::Closed { device });
        }
        if let Some(member) = request.member {
            self.live(member)?;
            for &(segment, length) in &request.replicas {
                let member = self.live(member)?;
                let have = member.replicas.get(&segment).map(Replica::contiguous);
                let sealed = have.is_none() && self.sealed_names.contains_key(&segment);
                assert!(
                    sealed || have.is_some_and(|have| have >= length),
                    "flush of {length} bytes of {segment}, of which {have:?} are complete"
                );
            }
        }
        for &(shard, length) in &request.shards {
            self.check_open_shard(device, shard, length);
        }
        for member in self.device_mut(device).members.values_mut() {
            for append in member.replicas.values_mut().flat_map(|replica| &mut replica.appends) {
                append.flushed = true;
            }
        }
        for rows in self.rows.values_mut() {
            rows.flush(device);
        }
        Ok(())
    }

    pub(super) fn close(
        &mut self,
        device: DeviceId,
        volume: VolumeId,
        generation: Generation,
    ) -> Result<Vec<ClosedMember>, StoreError> {
        let at = self.device_mut(device);
        let newest = at.closed.entry(volume).or_default();
        if generation < *newest {
            return Err(StoreError::Closed { device });
        }
        *newest = generation;
        let (incarnation, boot) = (at.incarnation, at.boot);
        let mut closed = Vec::new();
        for (&(owner, set), member) in at.members.iter_mut().rev() {
            if owner != volume {
                continue;
            }
            member.closed |= set.generation < generation;
            let state = match () {
                () if member.incarnation == incarnation => MemberState::Live,
                () if member.boot == boot => MemberState::Whole,
                () => MemberState::Flushed,
            };
            let open = |(&segment, replica): (&SegmentName, &Replica)| {
                let complete = if state == MemberState::Live { replica.contiguous() } else { 0 };
                OpenReplica { segment, length: replica.reserved(), complete }
            };
            let replicas = member.replicas.iter().map(open).collect();
            closed.push(ClosedMember { set, state, manifest: member.manifest.clone(), replicas });
        }
        Ok(closed)
    }

    pub(super) fn sealed(&mut self, member: MemberRef, segment: SealedSegment) -> Result<(), StoreError> {
        self.live(member)?;
        let name = segment.name;
        let (bytes, _) =
            *self.sealed_names.get(&name).unwrap_or_else(|| panic!("{name} is called sealed without shards"));
        assert_eq!(bytes, segment.bytes, "{name} has another length");
        if let Some(sealed) = self.segments.get(&name) {
            let footer = &sealed.body[segment.footer_offset as usize..];
            assert_eq!(crc32c(footer), segment.footer_crc, "{name} has another footer");
        }
        let member = self.live(member)?;
        if let Some(replica) = member.replicas.remove(&name) {
            assert_eq!(replica.contiguous(), replica.end(), "{name} is sealed before it was acknowledged");
        }
        if !member.manifest.iter().any(|line| line.name == name) {
            member.manifest.push(segment);
        }
        Ok(())
    }

    pub(super) fn registered(&mut self, view: RegisterView) {
        let stale = |set: SetId| match view.set {
            _ if view.deleted => true,
            Some(registered) => set < registered,
            None => set.generation < view.generation,
        };
        for device in self.devices.values_mut().filter(|device| device.up) {
            device.members.retain(|&(volume, set), _| volume != view.volume || !stale(set));
        }
        let oldest = view.set.map_or(view.generation, |set| set.generation);
        self.rows.retain(|name, _| name.volume != view.volume || (!view.deleted && name.generation >= oldest));
        if view.deleted {
            self.segments.retain(|name, _| name.volume != view.volume);
        }
    }

    /// A few at a time, so that owners have to ask again.
    pub(super) fn list(&self, device: DeviceId, volume: VolumeId, after: Option<ShardId>) -> Vec<ShardId> {
        let mut shards: Vec<ShardId> = Vec::new();
        for (&segment, sealed) in self.segments.iter().filter(|(segment, _)| segment.volume == volume) {
            let (group, devices) = (segment.pg.index, self.positions(segment.pg.index));
            let at = |index: u8| self.before.get(&(group, index)).unwrap_or(&devices[usize::from(index)]);
            let here = sealed.shards.iter().filter(|shard| *at(shard.0) == device);
            shards.extend(here.map(|&index| ShardId { segment, index }));
        }
        shards.sort_unstable();
        shards.into_iter().filter(|shard| after.is_none_or(|after| *shard > after)).take(7).collect()
    }

    fn shards_up(&self, segment: SegmentName, sealed: &Sealed) -> usize {
        let devices = self.positions(segment.pg.index);
        sealed.shards.iter().filter(|shard| self.device(devices[usize::from(shard.0)]).up).count()
    }

    fn enough(&self, found: usize) -> Result<(), StoreError> {
        let needed = self.scheme.k();
        if found < needed { Err(StoreError::TooFew { found, needed }) } else { Ok(()) }
    }

    /// Enters a segment's bytes; the same name never has other bytes.
    pub(super) fn enter(&mut self, segment: SegmentName, body: Buf) {
        let facts = (body.len() as u64, crc32c(&body));
        let known = *self.sealed_names.entry(segment).or_insert(facts);
        assert_eq!(known, facts, "{segment} is sealed twice with different bytes");
        self.segments.entry(segment).or_insert_with(|| Sealed { body, shards: BTreeSet::new() });
    }

    pub(super) fn seal(&mut self, segment: SegmentName, body: Buf) -> Result<Holes, StoreError> {
        let all: Vec<_> = shard_indexes(self.scheme.width()).collect();
        let found = self.positions_up(segment.pg.index);
        if found < self.scheme.k() {
            // Less than k shards prove nothing and serve nobody: as good as not there.
            return self.enough(found).map(|()| Holes::default());
        }
        self.enter(segment, body);
        self.fill(segment, &all)
    }

    /// Writes the named positions where the devices are up; answers the rest.
    pub(super) fn fill(&mut self, segment: SegmentName, wanted: &[ShardIndex]) -> Result<Holes, StoreError> {
        let devices = self.positions(segment.pg.index);
        let (up, down): (Vec<_>, Vec<_>) =
            wanted.iter().partition(|shard| self.device(devices[usize::from(shard.0)]).up);
        let sealed = self.segments.get_mut(&segment).ok_or(StoreError::NotFound)?;
        sealed.shards.extend(up);
        Ok(Holes(down.into_iter().filter(|shard| !sealed.shards.contains(shard)).collect()))
    }

    pub(super) fn fill_holes(
        &mut self,
        segment: SegmentName,
        segment_bytes: u64,
        holes: &Holes,
    ) -> Result<Holes, StoreError> {
        self.fills += 1;
        let sealed = self.segments.get(&segment).ok_or(StoreError::NotFound)?;
        assert_eq!(sealed.body.len() as u64, segment_bytes, "{segment} has another length");
        self.enough(self.shards_up(segment, sealed))?;
        self.fill(segment, &holes.0)
    }

    pub(super) fn read(&self, read: &SegmentRead) -> Result<Buf, StoreError> {
        let range = read.offset as usize..read.offset as usize + read.length as usize;
        if let Some(sealed) = self.segments.get(&read.segment) {
            // A reader may still know a row segment without its footer: whole rows lie at the same places either way.
            let rows = read.segment_bytes < sealed.body.len() as u64
                && read.segment_bytes.is_multiple_of(xsan_types::UNIT_BYTES);
            let same = sealed.body.len() as u64 == read.segment_bytes;
            assert!(same || rows, "{} has another length", read.segment);
            self.enough(self.shards_up(read.segment, sealed))?;
            assert!(range.end <= sealed.body.len(), "a read beyond the end of {}", read.segment);
            return Ok(sealed.body.slice(range));
        }
        match self.rows.get(&read.segment) {
            Some(_) => self.read_rows(read),
            None => Err(StoreError::NotFound),
        }
    }

    pub(super) fn delete(&mut self, segment: SegmentName) {
        // Shards on devices that are down would stay as garbage until reconciled; nobody can tell the difference here.
        self.segments.remove(&segment);
        self.rows.remove(&segment);
    }

    pub(super) fn power_loss(&mut self, device: DeviceId) {
        let Self { devices, random, sector, rows, .. } = self;
        let at = devices.get_mut(&device).unwrap_or_else(|| panic!("there is no device {device}"));
        at.up = false;
        at.boot += 1;
        at.closed.clear();
        // No process runs any more, so nothing is live until the next start.
        at.incarnation = Incarnation(0);
        for member in at.members.values_mut() {
            for replica in member.replicas.values_mut() {
                replica.power_loss(*sector, random);
            }
            // The replicas' first appends made them; nothing written means nothing there.
            member.replicas.retain(|_, replica| !replica.appends.is_empty());
        }
        for rows in rows.values_mut() {
            rows.power_loss(device);
        }
    }

    pub(super) fn lose(&mut self, device: DeviceId) {
        self.power_loss(device);
        self.device_mut(device).members.clear();
        let order = self.order.clone();
        let width = self.scheme.width();
        for (name, sealed) in &mut self.segments {
            sealed.shards.retain(|shard| {
                order[(name.pg.index as usize + usize::from(shard.0)) % order.len()] != device
                    || usize::from(shard.0) >= width
            });
        }
        for rows in self.rows.values_mut() {
            rows.lose(device);
        }
    }
}
