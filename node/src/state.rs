//! The state of a device in memory: members, replicas, open shards. Pure; rebuilt at open from the log.

use crate::format::{Extent, LogRecord, ShardEntry};
use std::collections::BTreeMap;
use xsan_types::{Incarnation, SealedSegment, SegmentName, SetId, ShardId, VolumeId};

/// Space that grows by extents and is filled front to back, in any order of completion.
#[derive(Clone, Debug, Default)]
pub struct Growing {
    /// Where it lies.
    pub extents: Vec<Extent>,
    /// Bytes completed without a gap (P4). Zero after a restart: records prove themselves then.
    pub contiguous: u64,
    /// Completed ranges behind a gap: start → end.
    done: BTreeMap<u64, u64>,
}

impl Growing {
    /// Bytes of its extents.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.extents.iter().map(|extent| extent.bytes).sum()
    }

    /// Counts everything below `contiguous` as complete.
    #[must_use]
    pub fn from(contiguous: u64) -> Self {
        Self { contiguous, ..Self::default() }
    }

    /// Adds extents; ones it has already stay (a record may be read after the snapshot that holds its effect).
    pub fn grow(&mut self, extents: Vec<Extent>) {
        for extent in extents {
            if !self.extents.contains(&extent) {
                self.extents.push(extent);
            }
        }
    }

    /// Notes that `start..end` is on the device.
    pub fn complete(&mut self, start: u64, end: u64) {
        if end <= self.contiguous {
            return;
        }
        let known = self.done.entry(start).or_insert(end);
        *known = (*known).max(end);
        while let Some((&start, &end)) = self.done.first_key_value() {
            if start > self.contiguous {
                break;
            }
            self.contiguous = self.contiguous.max(end);
            self.done.remove(&start);
        }
    }
}

/// Device ranges of `offset..offset + bytes` of something that lies over `extents`; `None` if it reaches beyond.
#[must_use]
pub fn map_range(extents: &[Extent], mut offset: u64, mut bytes: u64) -> Option<Vec<Extent>> {
    let mut pieces = Vec::with_capacity(1);
    for extent in extents {
        if offset >= extent.bytes {
            offset -= extent.bytes;
            continue;
        }
        let here = (extent.bytes - offset).min(bytes);
        if here > 0 {
            pieces.push(Extent { offset: extent.offset + offset, bytes: here });
        }
        bytes -= here;
        offset = 0;
        if bytes == 0 {
            return Some(pieces);
        }
    }
    (bytes == 0).then_some(pieces)
}

/// A journal member (P3).
#[derive(Clone, Debug)]
pub struct Member {
    /// The boot of the host when it was made.
    pub boot: u128,
    /// The process that made it.
    pub incarnation: Incarnation,
    /// One-way.
    pub closed: bool,
    /// Names sealed since the checkpoint.
    pub manifest: Vec<SealedSegment>,
    /// Open replicas.
    pub replicas: BTreeMap<SegmentName, Growing>,
    /// Appends whose device writes run.
    pub in_flight: usize,
}

/// A shard that takes appends (P9).
#[derive(Clone, Debug)]
pub struct OpenShard {
    /// The boot of the host when it was made.
    pub boot: u128,
    /// The process that made it.
    pub incarnation: Incarnation,
    /// Header space, then its bytes.
    pub space: Growing,
    /// Appends whose device writes run, and its finish.
    pub in_flight: usize,
    /// Takes no more appends and no other finish: it is being finished or freed.
    pub finishing: bool,
}

/// Everything but sealed shards.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Members by volume and set.
    pub members: BTreeMap<(VolumeId, SetId), Member>,
    /// Open shards.
    pub open_shards: BTreeMap<ShardId, OpenShard>,
}

/// What a log record means for the shard index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IndexChange {
    /// A sealed shard.
    Put(ShardId, ShardEntry),
    /// Segments are gone.
    Segments(Vec<SegmentName>),
    /// A volume is gone.
    Volume(VolumeId),
    /// Shards are gone.
    Shards(Vec<ShardId>),
}

impl State {
    /// Applies a record; answers extents that are free from now on and what changes in the shard index.
    pub fn apply(&mut self, record: &LogRecord) -> (Vec<Extent>, Option<IndexChange>) {
        match record.clone() {
            LogRecord::MemberCreated { volume, set, boot, incarnation, manifest } => {
                let member =
                    Member { boot, incarnation, closed: false, manifest, replicas: BTreeMap::new(), in_flight: 0 };
                let old = self.members.insert((volume, set), member);
                (old.map(|old| extents_of(&old)).unwrap_or_default(), None)
            }
            LogRecord::ReplicaGrew { volume, set, segment, extents } => match self.members.get_mut(&(volume, set)) {
                Some(member) => {
                    member.replicas.entry(segment).or_default().grow(extents);
                    (Vec::new(), None)
                }
                None => (extents, None),
            },
            LogRecord::Sealed { volume, set, segment } => {
                let Some(member) = self.members.get_mut(&(volume, set)) else { return (Vec::new(), None) };
                if !member.manifest.iter().any(|line| line.name == segment.name) {
                    member.manifest.push(segment);
                }
                let freed = member.replicas.remove(&segment.name).map(|replica| replica.extents);
                (freed.unwrap_or_default(), None)
            }
            LogRecord::ManifestTrimmed { volume, set, border, undecided } => {
                if let Some(member) = self.members.get_mut(&(volume, set)) {
                    member.manifest.retain(|line| line.name.number >= border || undecided.contains(&line.name.number));
                }
                (Vec::new(), None)
            }
            LogRecord::MemberFreed { volume, set } => {
                let freed = self.members.remove(&(volume, set)).map(|member| extents_of(&member));
                (freed.unwrap_or_default(), None)
            }
            LogRecord::ShardPut { shard, entry } => {
                // Finished in place: its space is the sealed shard's now.
                self.open_shards.remove(&shard);
                (Vec::new(), Some(IndexChange::Put(shard, entry)))
            }
            LogRecord::SegmentsFreed { segments } => {
                let freed = self.free_open_shards(|shard| segments.contains(&shard.segment));
                (freed, Some(IndexChange::Segments(segments)))
            }
            LogRecord::VolumeFreed { volume } => {
                let mut freed = self.free_open_shards(|shard| shard.segment.volume == volume);
                let sets: Vec<_> = self.members.keys().filter(|(of, _)| *of == volume).copied().collect();
                for key in sets {
                    freed.extend(self.members.remove(&key).map(|member| extents_of(&member)).unwrap_or_default());
                }
                (freed, Some(IndexChange::Volume(volume)))
            }
            LogRecord::OpenShardGrew { shard, boot, incarnation, extents } => {
                let space = OpenShard { boot, incarnation, space: Growing::default(), in_flight: 0, finishing: false };
                self.open_shards.entry(shard).or_insert(space).space.grow(extents);
                (Vec::new(), None)
            }
            LogRecord::OpenShardFreed { shard } => (self.free_open_shards(|of| *of == shard), None),
            LogRecord::ShardsFreed { shards } => (Vec::new(), Some(IndexChange::Shards(shards))),
        }
    }

    fn free_open_shards(&mut self, which: impl Fn(&ShardId) -> bool) -> Vec<Extent> {
        let gone: Vec<ShardId> = self.open_shards.keys().filter(|shard| which(shard)).copied().collect();
        gone.iter().filter_map(|shard| self.open_shards.remove(shard)).flat_map(|open| open.space.extents).collect()
    }

    /// Records that make this state out of nothing: what a new log half begins with.
    #[must_use]
    pub fn snapshot(&self) -> Vec<LogRecord> {
        let mut records = Vec::new();
        for (&(volume, set), member) in &self.members {
            let (boot, incarnation, manifest) = (member.boot, member.incarnation, member.manifest.clone());
            records.push(LogRecord::MemberCreated { volume, set, boot, incarnation, manifest });
            for (&segment, replica) in &member.replicas {
                let extents = replica.extents.clone();
                records.push(LogRecord::ReplicaGrew { volume, set, segment, extents });
            }
        }
        for (&shard, open) in &self.open_shards {
            let (boot, incarnation, extents) = (open.boot, open.incarnation, open.space.extents.clone());
            records.push(LogRecord::OpenShardGrew { shard, boot, incarnation, extents });
        }
        records
    }

    /// Extents in use.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        let members = self.members.values().flat_map(|member| member.replicas.values());
        let open = self.open_shards.values().map(|open| &open.space);
        members.chain(open).flat_map(|space| space.extents.iter().copied())
    }
}

fn extents_of(member: &Member) -> Vec<Extent> {
    member.replicas.values().flat_map(|replica| replica.extents.iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_complete_without_a_gap_counts() {
        let mut space = Growing::default();
        space.complete(100, 200);
        assert_eq!(space.contiguous, 0);
        space.complete(0, 50);
        assert_eq!(space.contiguous, 50);
        space.complete(50, 100);
        assert_eq!(space.contiguous, 200);
        space.complete(0, 50);
        assert_eq!(space.contiguous, 200, "a repeat changes nothing");
    }

    #[test]
    fn ranges_map_over_extents() {
        let extents = [Extent { offset: 1000, bytes: 100 }, Extent { offset: 5000, bytes: 100 }];
        assert_eq!(
            map_range(&extents, 50, 100),
            Some(vec![Extent { offset: 1050, bytes: 50 }, Extent { offset: 5000, bytes: 50 }])
        );
        assert_eq!(map_range(&extents, 150, 51), None);
        assert_eq!(map_range(&extents, 100, 100), Some(vec![Extent { offset: 5000, bytes: 100 }]));
    }
}
