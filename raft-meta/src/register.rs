//! The volume register: who may change it, and how (P2).
//!
//! Everything that is safe about a volume hangs on these few rules, so they stand alone, without knowledge of pools or
//! names. The types are those of `xsan_types::register`.

use crate::state::VOLUME_BYTES_MAX;
use serde::{Deserialize, Serialize};
use xsan_types::{
    BLOCK_BYTES, ChangeToken, CheckpointRef, Crc32c, Generation, JournalSet, Register, RegisterChange, RegisterError,
    SEGMENT_BYTES_MAX, SegmentName, SetId, VolumeId, VolumeState,
};

/// Most members of a journal set: f+1 for the widest scheme.
pub const SET_MEMBERS_MAX: usize = 64;
/// Most pins of a volume.
pub const PINS_MAX: usize = 4096;

/// Who writes and what it knows of the register; part of every change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writer {
    /// Its generation.
    pub generation: Generation,
    /// The version it knows.
    pub version: u64,
    /// The number it gave this change, drawn at random.
    pub token: ChangeToken,
    /// Checksum of the whole encoded change: a token used for another change is no repeat.
    pub digest: Crc32c,
}

/// A change of a register: the owner's ([`RegisterChange`]) and those of snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// The owner's changes.
    Owner(&'a RegisterChange),
    /// Holds the registered checkpoint: a snapshot.
    Pin,
    /// Lets the pinned checkpoint with this root go.
    Unpin(SegmentName),
}

/// A register and what is needed to decide changes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRegister {
    register: Register,
    /// The newest journal set ever registered: ids are not used twice, also when a hand-over registered none since.
    newest_set: SetId,
    /// The change that led to `register`: asked again, the answer is `register` (C18, H4).
    last: Option<(ChangeToken, Crc32c)>,
}

impl VolumeRegister {
    /// The register of a new volume of `size` bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let register = Register {
            version: 0,
            generation: Generation(0),
            state: VolumeState::Open,
            size,
            set: None,
            checkpoint: None,
            pins: Vec::new(),
        };
        Self { register, newest_set: SetId::default(), last: None }
    }

    /// Whether the present generation had a set and gave it up (a clean hand-over): it serves no more.
    #[must_use]
    pub fn is_handed_over(&self) -> bool {
        self.register.set.is_none()
            && self.newest_set.generation == self.register.generation
            && self.newest_set != SetId::default()
    }

    /// The register.
    #[must_use]
    pub fn get(&self) -> &Register {
        &self.register
    }

    /// Decides a change; answers the register after it. A refused change alters nothing.
    ///
    /// A repeat of the change that was made last (same token, same content) is answered as it was the first time. A repeat
    /// of an earlier one is refused: its generation or version is no longer the register's.
    ///
    /// # Errors
    /// `NewerOwner`: the writer stops for ever. `Version`, `NotFound` (deleted), `Pinned`, `Invalid`: see there.
    pub fn change(&mut self, volume: VolumeId, writer: Writer, change: Change<'_>) -> Result<&Register, RegisterError> {
        if self.last == Some((writer.token, writer.digest)) {
            return Ok(&self.register);
        }
        let unconditional = matches!(change, Change::Owner(RegisterChange::Take | RegisterChange::Retire));
        if !unconditional {
            self.check_writer(writer)?;
        }
        if self.register.state == VolumeState::Deleted {
            return Err(RegisterError::NotFound);
        }
        let mut next = self.register.clone();
        next.version = next.version.checked_add(1).ok_or(RegisterError::Invalid)?;
        match change {
            Change::Owner(change) => self.owner_change(volume, change, &mut next)?,
            Change::Pin => pin(&mut next)?,
            Change::Unpin(segment) => unpin(segment, &mut next)?,
        }
        if let Some(set) = &next.set {
            self.newest_set = self.newest_set.max(set.id);
        }
        self.register = next;
        self.last = Some((writer.token, writer.digest));
        Ok(&self.register)
    }

    /// Only the owner of the register's generation, and only if it knows the register as it is.
    fn check_writer(&self, writer: Writer) -> Result<(), RegisterError> {
        let current = self.register.generation;
        if writer.generation < current {
            return Err(RegisterError::NewerOwner { current, writer: writer.generation });
        }
        if writer.generation > current {
            // Generations are given out here: nobody can have a newer one.
            return Err(RegisterError::Invalid);
        }
        if writer.version != self.register.version {
            return Err(RegisterError::Version { current: self.register.version, writer: writer.version });
        }
        Ok(())
    }

    fn owner_change(
        &self,
        volume: VolumeId,
        change: &RegisterChange,
        next: &mut Register,
    ) -> Result<(), RegisterError> {
        match change {
            RegisterChange::Take => next.generation = following(next.generation)?,
            RegisterChange::Set(set) => {
                self.check_owned()?;
                if let Some(set) = set {
                    self.check_set(set)?;
                }
                next.set.clone_from(set);
            }
            RegisterChange::Checkpoint(checkpoint) => {
                self.check_owned()?;
                self.check_checkpoint(volume, checkpoint)?;
                next.checkpoint = Some(*checkpoint);
            }
            RegisterChange::Commit { set, checkpoint } => {
                self.check_owned()?;
                self.check_set(set)?;
                match checkpoint {
                    Some(checkpoint) => self.check_checkpoint(volume, checkpoint)?,
                    // A checkpoint decides names; to forget it would bring deleted ones back.
                    None if self.register.checkpoint.is_some() => return Err(RegisterError::Invalid),
                    None => {}
                }
                next.set = Some(set.clone());
                next.checkpoint = *checkpoint;
            }
            RegisterChange::Resize(bytes) => {
                if !size_is_allowed(*bytes) {
                    return Err(RegisterError::Invalid);
                }
                next.size = *bytes;
            }
            RegisterChange::Retire => {
                if !next.pins.is_empty() {
                    return Err(RegisterError::Pinned);
                }
                next.generation = following(next.generation)?;
                next.state = VolumeState::Deleted;
            }
        }
        Ok(())
    }

    /// Sets and checkpoints are an owner's: somebody must have taken the volume.
    fn check_owned(&self) -> Result<(), RegisterError> {
        if self.register.generation == Generation(0) { Err(RegisterError::Invalid) } else { Ok(()) }
    }

    /// A new set carries the owner's generation and a number that was never used, and has different members.
    fn check_set(&self, set: &JournalSet) -> Result<(), RegisterError> {
        let members = set.members.len();
        let twice = set
            .members
            .iter()
            .enumerate()
            .any(|(at, member)| set.members.iter().skip(at + 1).any(|other| other.device == member.device));
        let dead = set.members.iter().any(|member| member.incarnation.0 == 0);
        let fits = set.id.generation == self.register.generation
            && set.id.number > 0
            && set.id > self.newest_set
            && (1..=SET_MEMBERS_MAX).contains(&members)
            && !twice
            && !dead;
        if fits { Ok(()) } else { Err(RegisterError::Invalid) }
    }

    /// A checkpoint lies in a segment of this volume, written by this or an earlier owner, and decides no fewer names than
    /// the registered one: a name that was decided stays decided (P7: deletes need no fence because of that).
    fn check_checkpoint(&self, volume: VolumeId, checkpoint: &CheckpointRef) -> Result<(), RegisterError> {
        let end = checkpoint.root_offset.checked_add(checkpoint.root_bytes.into());
        let border = self.register.checkpoint.map_or(0, |registered| registered.border);
        let fits = checkpoint.segment.volume == volume
            && checkpoint.segment.generation <= self.register.generation
            && checkpoint.root_bytes > 0
            && end.is_some_and(|end| end <= checkpoint.segment_bytes)
            && checkpoint.segment_bytes <= SEGMENT_BYTES_MAX
            && checkpoint.border >= border;
        if fits { Ok(()) } else { Err(RegisterError::Invalid) }
    }
}

/// Whether a volume may have this many bytes.
#[must_use]
pub fn size_is_allowed(bytes: u64) -> bool {
    bytes > 0 && bytes <= VOLUME_BYTES_MAX && bytes.is_multiple_of(BLOCK_BYTES)
}

fn following(generation: Generation) -> Result<Generation, RegisterError> {
    generation.0.checked_add(1).map(Generation).ok_or(RegisterError::Invalid)
}

fn pin(next: &mut Register) -> Result<(), RegisterError> {
    let Some(checkpoint) = next.checkpoint else { return Err(RegisterError::Invalid) };
    if next.pins.len() >= PINS_MAX || next.pins.contains(&checkpoint) {
        return Err(RegisterError::Invalid);
    }
    next.pins.push(checkpoint);
    Ok(())
}

fn unpin(segment: SegmentName, next: &mut Register) -> Result<(), RegisterError> {
    let before = next.pins.len();
    next.pins.retain(|pin| pin.segment != segment);
    if next.pins.len() < before { Ok(()) } else { Err(RegisterError::Invalid) }
}
