//! Take-over and recovery (P10). Runs at every open: there is no other way to become the owner.

use super::seal::sealed_line;
use super::shared::{Member, ServingSet};
use super::{VolumeConfig, replay};
use crate::error::VolumeError;
use crate::index::{Change, Index, Place};
use crate::segment::footer::footer_bytes;
use crate::segment::{EntryKind, Footer, FooterEntry};
use crate::store::{Check, Holes, SegmentRead};
use futures::future::{join_all, try_join_all};
use replay::{Replayed, Source};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use xsan_env::{Buf, Moment};
use xsan_types::{
    BLOCK_BYTES, BlockRange, ChangeToken, CheckpointRef, ClosedMember, DeviceId, ErrorKind, Generation, JournalSet,
    Lba, MemberRef, MemberState, Register, RegisterChange, RegisterError, RegisterView, SealedSegment, SegmentName,
    SetId, crc32c,
};

/// How long to wait for nodes to come back before the next try, if no change is reported.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Pause before a register write without an answer is repeated.
const REPEAT_AFTER: Duration = Duration::from_millis(100);

/// What a new owner starts with.
pub(super) struct Recovered {
    pub register: Register,
    pub index: Arc<Index>,
    pub set: Arc<ServingSet>,
    pub next_number: u64,
    /// Names the committed checkpoint decides and does not list.
    pub dead: Vec<SegmentName>,
}

/// What the closed members of the registered set say.
#[derive(Default)]
struct Journal {
    members: Vec<(DeviceId, ClosedMember)>,
    /// Members that did not answer and were not needed.
    silent: usize,
    first_close: Moment,
}

struct Recovery<'a> {
    config: &'a VolumeConfig,
    register: Register,
    index: Arc<Index>,
    largest_number: u64,
    deadline: Moment,
    /// The last reason for waiting: told once, not at every look.
    told: Mutex<String>,
}

pub(super) async fn take_over(config: &VolumeConfig) -> Result<Recovered, VolumeError> {
    let register = change(config, Generation(0), 0, RegisterChange::Take).await?;
    let deadline = config.env.now().after(config.tuning.io_timeout);
    let index = Arc::new(Index::new(config.id, Arc::clone(&config.store), Arc::clone(&config.cache)));
    let mut recovery = Recovery { config, largest_number: 0, index, register, deadline, told: Mutex::default() };
    let (journal, found) = recovery.collect().await?;
    let checkpoint = recovery.checkpoint(found).await?;
    let set = recovery.create_set().await?;
    recovery.commit(&set, checkpoint).await?;
    // Another process may still answer reads from what these members confirmed (P8), whatever became of them since.
    if !journal.members.is_empty() {
        let window = config.tuning.read_window.mul_f64(1.02);
        let passed = config.env.now().since(journal.first_close);
        config.env.sleep(window.saturating_sub(passed)).await;
    }
    let dead = if found { recovery.index.take_dead() } else { Vec::new() };
    Ok(Recovered {
        next_number: recovery.largest_number + 1,
        register: recovery.register,
        index: recovery.index,
        set: Arc::new(set),
        dead,
    })
}

/// A register change, repeated until it is answered (C18, H4).
async fn change(
    config: &VolumeConfig,
    generation: Generation,
    version: u64,
    change: RegisterChange,
) -> Result<Register, VolumeError> {
    let token = ChangeToken(config.env.random_u128());
    loop {
        match config.registers.change(config.id, generation, version, token, change.clone()).await {
            Ok(register) => return Ok(register),
            Err(RegisterError::NoAnswer) => config.env.sleep(REPEAT_AFTER).await,
            Err(RegisterError::NewerOwner { current, .. }) => return Err(VolumeError::Fenced(current)),
            Err(error) => return Err(error.into()),
        }
    }
}

impl Recovery<'_> {
    /// Waits for nodes, until the deadline, or until somebody else has taken the volume: what nodes say then is for that one.
    async fn wait(&self, reason: String) -> Result<(), VolumeError> {
        if self.config.env.now() >= self.deadline {
            tracing::warn!(volume = %self.config.id, %reason, "take-over gives up");
            return Err(VolumeError::TimedOut);
        }
        {
            let mut told = self.told.lock().expect("told lock");
            if *told != reason {
                tracing::info!(volume = %self.config.id, %reason, "take-over waits");
                *told = reason;
            }
        }
        let mut changes = self.config.store.changes();
        self.config.env.timeout(RETRY_AFTER, changes.changed()).await;
        self.still_owner().await
    }

    /// A newer owner may be what is waited for: its members refuse everything from here. Whoever wants the volume at this
    /// node would wait for this take-over as well.
    async fn still_owner(&self) -> Result<(), VolumeError> {
        let read = self.config.registers.read(self.config.id);
        match self.config.env.timeout(RETRY_AFTER, read).await {
            Some(Ok(register)) if register.generation > self.register.generation => {
                Err(VolumeError::Fenced(register.generation))
            }
            // No answer, no news.
            _ => Ok(()),
        }
    }

    /// Steps 2 to 5: what the members have, in the index, and whether there was anything.
    async fn collect(&mut self) -> Result<(Journal, bool), VolumeError> {
        loop {
            self.open_index().await?;
            let journal = match self.register.set.clone() {
                Some(set) => self.close_members(&set).await?,
                None => Journal::default(),
            };
            match self.apply(&journal).await {
                Ok(found) if self.still_say(&journal).await? => return Ok((journal, found)),
                Ok(_) => self.wait("a journal member changed while it was read".to_owned()).await?,
                // Somebody who has not been asked may have what cannot be read.
                Err(error @ VolumeError::ReplicaDamaged { .. }) if journal.silent > 0 => {
                    self.wait(error.to_string()).await?;
                }
                // What the members say now counts: without that one, if another is whole.
                Err(error @ VolumeError::ReplicaGone { .. }) => self.wait(error.to_string()).await?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether the members that were read say now what they said at the close. One that lost power in between has lost what was
    /// not flushed, and another one may have to be waited for.
    async fn still_say(&mut self, journal: &Journal) -> Result<bool, VolumeError> {
        let Some(set) = self.register.set.clone().filter(|_| !journal.members.is_empty()) else { return Ok(true) };
        let again = self.close_members(&set).await?;
        Ok(journal.members.iter().all(|(device, before)| {
            let now = again.members.iter().find(|(other, _)| other == device);
            now.is_some_and(|(_, now)| now == before)
        }))
    }

    async fn open_index(&mut self) -> Result<(), VolumeError> {
        let Some(reference) = self.register.checkpoint else {
            let (store, cache) = (Arc::clone(&self.config.store), Arc::clone(&self.config.cache));
            self.index = Arc::new(Index::new(self.config.id, store, cache));
            return Ok(());
        };
        self.largest_number = self.largest_number.max(reference.border.max(reference.segment.number));
        loop {
            let (store, cache) = (Arc::clone(&self.config.store), Arc::clone(&self.config.cache));
            match Index::open(self.config.id, store, cache, reference).await {
                Ok(index) => {
                    self.index = Arc::new(index);
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Unavailable => self.wait(error.to_string()).await?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Steps 2 and 3: closes the members of the registered set until one whole member, or all that are not lost, have
    /// answered.
    async fn close_members(&mut self, set: &JournalSet) -> Result<Journal, VolumeError> {
        loop {
            let closes = set
                .members
                .iter()
                .map(|member| self.config.store.close(member.device, self.config.id, self.register.generation));
            let answers = join_all(closes).await;
            let mut journal = Journal { first_close: self.config.env.now(), ..Journal::default() };
            let (mut lost, mut silent) = (0, 0);
            for (member, answer) in set.members.iter().zip(answers) {
                match answer {
                    Ok(closed) => match closed.into_iter().find(|closed| closed.set == set.id) {
                        Some(closed) => {
                            journal.members.push((member.device, closed));
                        }
                        // The device does not know the set: lost (C3), not an empty log.
                        None => lost += 1,
                    },
                    Err(error) if error.kind() == ErrorKind::Fenced => {
                        return Err(VolumeError::Fenced(self.register.generation.next()));
                    }
                    Err(error) if error.kind() == ErrorKind::NotFound => lost += 1,
                    Err(_) => silent += 1,
                }
            }
            // The best word first: readers of records ask in this order.
            journal.silent = silent;
            journal.members.sort_by_key(|(_, closed)| std::cmp::Reverse(closed.state));
            let whole = journal.members.first().is_some_and(|(_, closed)| closed.state >= MemberState::Whole);
            if whole {
                return Ok(journal);
            }
            if silent == 0 {
                if journal.members.is_empty() {
                    return Err(VolumeError::JournalLost { lost, members: set.members.len() });
                }
                tracing::warn!(
                    volume = %self.config.id, set = %set.id, lost,
                    "no journal member is whole after power loss: writes that were not flushed may be gone"
                );
                return Ok(journal);
            }
            self.wait(format!("{silent} of {} journal members do not answer", set.members.len())).await?;
        }
    }

    /// Steps 4 and 5: every manifest name, then the open replicas, re-sealed. Answers whether anything was found.
    async fn apply(&mut self, journal: &Journal) -> Result<bool, VolumeError> {
        let mut listed: BTreeMap<u64, SealedSegment> = BTreeMap::new();
        for sealed in journal.members.iter().flat_map(|(_, closed)| &closed.manifest) {
            listed.insert(sealed.name.number, *sealed);
        }
        let border = self.register.checkpoint.map_or(0, |checkpoint| checkpoint.border);
        listed.retain(|&number, _| number >= border);
        for sealed in listed.values() {
            self.largest_number = self.largest_number.max(sealed.name.number);
            let footer = self.read_footer(sealed).await?;
            self.index.apply(&changes_of(&footer));
            // What was missing at its seal may have been filled since; filling a position that is there changes nothing.
            self.index.segment_sealed(*sealed, sealed.missing());
        }
        let open: BTreeSet<SegmentName> = journal
            .members
            .iter()
            .flat_map(|(_, closed)| &closed.replicas)
            .map(|replica| replica.segment)
            .filter(|name| !listed.contains_key(&name.number))
            .collect();
        let mut resealed = Resealer::default();
        let mut by_number: Vec<SegmentName> = open.into_iter().collect();
        by_number.sort_by_key(|name| name.number);
        for name in by_number {
            self.largest_number = self.largest_number.max(name.number);
            let sources: Vec<Source> = journal
                .members
                .iter()
                .filter_map(|(device, closed)| {
                    let replica = closed.replicas.iter().find(|replica| replica.segment == name)?;
                    let (length, complete) = (replica.length, replica.complete);
                    Some(Source { device: *device, set: closed.set, length, complete })
                })
                .collect();
            self.replay_segment(name, sources, &listed, &mut resealed).await?;
        }
        let tail = std::mem::take(&mut resealed);
        if !tail.footer.is_empty() {
            self.reseal(tail).await?;
        }
        Ok(!listed.is_empty() || self.index.delta_bytes() > 0)
    }

    async fn read_footer(&self, sealed: &SealedSegment) -> Result<Footer, VolumeError> {
        loop {
            let read = SegmentRead {
                segment: sealed.name,
                segment_bytes: sealed.bytes,
                offset: sealed.footer_offset,
                length: (sealed.bytes - sealed.footer_offset) as u32,
                check: Check::Whole(sealed.footer_crc),
            };
            match self.config.store.read(read).await {
                Ok(bytes) => {
                    return Footer::decode(&bytes, sealed.name)
                        .map_err(|error| VolumeError::Footer { segment: sealed.name, error });
                }
                // Fewer than k shards: wait, never skip (C11).
                Err(error) if error.kind() == ErrorKind::Unavailable => self.wait(error.to_string()).await?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn replay_segment(
        &mut self,
        name: SegmentName,
        sources: Vec<Source>,
        listed: &BTreeMap<u64, SealedSegment>,
        resealed: &mut Resealer,
    ) -> Result<(), VolumeError> {
        let mut scan = replay::Scan::new(self.config, name, sources);
        loop {
            let Some(Replayed { header, data }) = scan.next().await? else { return Ok(()) };
            let data = match header.rows {
                None => data,
                // The row segment is sealed: its footer told it already.
                Some(rows) if listed.contains_key(&rows.number) => continue,
                Some(rows) => {
                    self.largest_number = self.largest_number.max(rows.number);
                    match self.read_rows(name, &header, rows).await? {
                        Some(data) => data,
                        // Its rows cannot be decoded: the record counts as absent (P9).
                        None => continue,
                    }
                }
            };
            if resealed.would_overflow(&header, self.config.tuning.segment_bytes) {
                let full = std::mem::take(resealed);
                self.reseal(full).await?;
            }
            resealed.push(name.generation, &header, data);
        }
    }

    async fn read_rows(
        &self,
        record: SegmentName,
        header: &crate::segment::RecordHeader,
        rows: crate::segment::RowsRef,
    ) -> Result<Option<Buf>, VolumeError> {
        let row_bytes = self.config.store.data_shards() as u64 * xsan_types::UNIT_BYTES;
        let offset = u64::from(rows.first_block) * BLOCK_BYTES;
        let length = header.crcs.len() as u64 * BLOCK_BYTES;
        let segment = SegmentName { number: rows.number, pg: rows.pg, ..record };
        loop {
            let read = SegmentRead {
                segment,
                segment_bytes: (offset + length).next_multiple_of(row_bytes),
                offset,
                length: length as u32,
                check: Check::Blocks(header.crcs.clone()),
            };
            match self.config.store.read(read).await {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(error) if error.kind() == ErrorKind::Unavailable => self.wait(error.to_string()).await?,
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Seals recovered blocks under this generation, versions kept.
    async fn reseal(&mut self, content: Resealer) -> Result<(), VolumeError> {
        let name = self.new_name();
        let footer = Footer { segment: name, entries: content.footer, crcs: content.crcs };
        let bytes = footer.encode();
        let sealed = sealed_line(&footer, &bytes);
        let mut body = content.body;
        body.push(self.config.buffers.copy_of(&bytes));
        let Holes(holes) = loop {
            match self.config.store.seal(name, body.clone()).await {
                Ok(holes) => break holes,
                Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::NoSpace) => {
                    self.wait(error.to_string()).await?;
                }
                Err(error) => return Err(error.into()),
            }
        };
        self.index.apply(&changes_of(&footer));
        self.index.segment_sealed(sealed, holes);
        Ok(())
    }

    fn new_name(&mut self) -> SegmentName {
        self.largest_number += 1;
        self.name(self.largest_number)
    }

    fn name(&self, number: u64) -> SegmentName {
        SegmentName {
            volume: self.config.id,
            generation: self.register.generation,
            number,
            pg: self.config.store.choose_pg(self.config.id, number, &[]),
        }
    }

    async fn checkpoint(&mut self, found: bool) -> Result<Option<CheckpointRef>, VolumeError> {
        if !found {
            return Ok(self.register.checkpoint);
        }
        let border = self.largest_number + 1;
        self.largest_number = border;
        self.index.freeze();
        loop {
            let mut number = self.largest_number;
            let index = Arc::clone(&self.index);
            let built = {
                let mut names = || {
                    number += 1;
                    self.name(number)
                };
                index.build_checkpoint(border, &mut names).await
            };
            self.largest_number = number;
            match built {
                Ok(reference) => return Ok(Some(reference)),
                Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::NoSpace) => {
                    self.wait(error.to_string()).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A new empty set under this generation (step 5).
    async fn create_set(&mut self) -> Result<ServingSet, VolumeError> {
        let mut number = 0;
        let mut avoid = Vec::new();
        loop {
            number += 1;
            let id = SetId { generation: self.register.generation, number };
            let planned = match self.config.store.plan_set(self.config.id, &avoid) {
                Ok(devices) => devices,
                Err(error) => {
                    avoid.clear();
                    self.wait(error.to_string()).await?;
                    continue;
                }
            };
            let config = self.config;
            let sent = config.env.now();
            let make = planned.iter().map(|&device| async move {
                let made = config.store.create_member(device, config.id, id, Vec::new()).await;
                let made = made.map_err(|error| (device, error))?;
                let at = MemberRef { device, volume: config.id, set: id, incarnation: made.incarnation };
                Ok::<_, (DeviceId, crate::store::StoreError)>(Member {
                    at,
                    sector: made.sector,
                    confirmed: AtomicU64::new(sent.0),
                })
            });
            match try_join_all(make).await {
                Ok(members) => return Ok(ServingSet { id, members }),
                Err((device, error)) => {
                    tracing::warn!(%device, %error, "a journal member could not be made");
                    avoid.push(device);
                }
            }
        }
    }

    /// Step 6: the only commit point. A crash before it changes nothing.
    async fn commit(&mut self, set: &ServingSet, checkpoint: Option<CheckpointRef>) -> Result<(), VolumeError> {
        let replaced = checkpoint != self.register.checkpoint;
        let (generation, version) = (self.register.generation, self.register.version);
        let commit = RegisterChange::Commit { set: set.registered(), checkpoint };
        self.register = change(self.config, generation, version, commit).await?;
        if replaced {
            self.index.install();
        }
        let view = RegisterView { volume: self.config.id, generation, set: Some(set.id), deleted: false };
        // Best effort: a node that misses it frees its old members at the next one.
        let _ = self.config.store.registered(view).await;
        Ok(())
    }
}

/// Index changes that a footer stands for.
fn changes_of(footer: &Footer) -> Vec<Change> {
    let number = footer.segment.number;
    let mut changes = Vec::with_capacity(footer.crcs.len());
    let mut position = 0u32;
    for entry in &footer.entries {
        let version = entry.version;
        match entry.kind {
            EntryKind::Zero => {
                let range = BlockRange { start: entry.lba, count: entry.count };
                changes.push(Change::Zero { range, version, number });
            }
            EntryKind::Data => {
                for i in 0..entry.count {
                    // The decoder checked that the counts add up to the checksums.
                    let crc = footer.crcs[position as usize];
                    let place = Place { number, position, crc };
                    changes.push(Change::Data { lba: Lba(entry.lba.0 + i), version, place });
                    position += 1;
                }
            }
        }
    }
    changes
}

/// Recovered blocks on their way into a new sealed segment.
#[derive(Default)]
struct Resealer {
    body: Vec<Buf>,
    footer: Vec<FooterEntry>,
    crcs: Vec<xsan_types::Crc32c>,
}

impl Resealer {
    fn would_overflow(&self, header: &crate::segment::RecordHeader, segment_bytes: u64) -> bool {
        let blocks = self.crcs.len() + header.crcs.len();
        let footer = footer_bytes(self.footer.len() + header.entries.len(), blocks) as u64;
        !self.footer.is_empty() && blocks as u64 * BLOCK_BYTES + footer > segment_bytes
    }

    fn push(&mut self, generation: Generation, header: &crate::segment::RecordHeader, data: Buf) {
        debug_assert!(data.chunks(BLOCK_BYTES as usize).zip(&header.crcs).all(|(block, &crc)| crc32c(block) == crc));
        if !data.is_empty() {
            self.body.push(data);
        }
        self.crcs.extend_from_slice(&header.crcs);
        self.footer.extend(header.entries.iter().map(|entry| FooterEntry {
            kind: entry.kind,
            lba: entry.lba,
            count: u64::from(entry.count),
            version: xsan_types::Version { generation, sequence: entry.sequence },
        }));
    }
}
