//! Volume registers in memory: the rules of P2, with answers that get lost.

use crate::store::Registers;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use xsan_env::runtime::BoxFuture;
use xsan_types::{
    BLOCK_BYTES, ChangeToken, CheckpointRef, Generation, JournalSet, Register, RegisterChange, RegisterError, SetId,
    VolumeId, VolumeState,
};

/// What happens to a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterFault {
    /// It is decided; nobody hears the answer.
    LoseAnswer,
    /// It never arrives.
    LoseRequest,
}

struct Entry {
    register: Register,
    /// The newest set id ever registered: sets only get newer.
    newest_set: SetId,
    /// First answers by token (C18).
    answers: BTreeMap<u128, Result<Register, RegisterError>>,
}

#[derive(Default)]
struct State {
    volumes: BTreeMap<VolumeId, Entry>,
    changes: u64,
    planned: BTreeMap<u64, RegisterFault>,
    down: bool,
}

/// The registers; cheap to clone, all clones are the same.
#[derive(Clone, Default)]
pub struct MemoryRegisters(Arc<Mutex<State>>);

impl MemoryRegisters {
    /// No volumes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a volume.
    ///
    /// # Panics
    /// When the id was used before or the size is not a positive multiple of 4096.
    pub fn create(&self, volume: VolumeId, size: u64) {
        assert!(size > 0 && size.is_multiple_of(BLOCK_BYTES), "a volume size");
        let register = Register {
            version: 1,
            generation: Generation(0),
            state: VolumeState::Open,
            size,
            set: None,
            checkpoint: None,
            pins: Vec::new(),
        };
        let entry = Entry { register, newest_set: SetId::default(), answers: BTreeMap::new() };
        let before = self.state().volumes.insert(volume, entry);
        assert!(before.is_none(), "ids are never used again");
    }

    /// The register now.
    #[must_use]
    pub fn get(&self, volume: VolumeId) -> Option<Register> {
        self.state().volumes.get(&volume).map(|entry| entry.register.clone())
    }

    /// Border of the registered checkpoint; `None` when everything may go (the volume is deleted) or is unknown here.
    #[must_use]
    pub fn border(&self, volume: VolumeId) -> Option<u64> {
        let register = self.get(volume)?;
        match register.state {
            VolumeState::Deleted => None,
            VolumeState::Open => Some(register.checkpoint.map_or(0, |checkpoint| checkpoint.border)),
        }
    }

    /// Plans a fault for the change that is `after` changes away: 0 is the next one.
    pub fn plan(&self, after: u64, fault: RegisterFault) {
        let mut state = self.state();
        let at = state.changes + after;
        state.planned.insert(at, fault);
    }

    /// Changes that were asked for so far, answered or not.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.state().changes
    }

    /// While down nothing is decided and nothing is answered.
    pub fn set_down(&self, down: bool) {
        self.state().down = down;
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().expect("registers lock")
    }
}

/// Decides one change (P2).
fn decide(
    entry: &mut Entry,
    volume: VolumeId,
    generation: Generation,
    version: u64,
    change: RegisterChange,
) -> Result<Register, RegisterError> {
    let register = &entry.register;
    if register.state == VolumeState::Deleted {
        return Err(RegisterError::NotFound);
    }
    if !matches!(change, RegisterChange::Take | RegisterChange::Retire) {
        if register.generation != generation {
            assert!(register.generation > generation, "a writer with a generation that was never given");
            return Err(RegisterError::NewerOwner { current: register.generation, writer: generation });
        }
        if register.version != version {
            return Err(RegisterError::Version { current: register.version, writer: version });
        }
    }
    let mut next = register.clone();
    next.version += 1;
    match change {
        RegisterChange::Take => next.generation = next.generation.next(),
        RegisterChange::Set(set) => {
            if let Some(set) = &set {
                check_set(entry.newest_set, generation, set)?;
                entry.newest_set = set.id;
            }
            next.set = set;
        }
        RegisterChange::Checkpoint(checkpoint) => {
            check_checkpoint(volume, register, &checkpoint)?;
            next.checkpoint = Some(checkpoint);
        }
        RegisterChange::Commit { set, checkpoint } => {
            check_set(entry.newest_set, generation, &set)?;
            match &checkpoint {
                Some(checkpoint) => check_checkpoint(volume, register, checkpoint)?,
                None if register.checkpoint.is_some() => return Err(RegisterError::Invalid),
                None => {}
            }
            entry.newest_set = set.id;
            next.set = Some(set);
            next.checkpoint = checkpoint;
        }
        RegisterChange::Resize(size) => {
            if size == 0 || !size.is_multiple_of(BLOCK_BYTES) {
                return Err(RegisterError::Invalid);
            }
            next.size = size;
        }
        RegisterChange::Retire => {
            if !next.pins.is_empty() {
                return Err(RegisterError::Pinned);
            }
            next.generation = next.generation.next();
            next.state = VolumeState::Deleted;
            next.set = None;
        }
    }
    entry.register = next.clone();
    Ok(next)
}

fn check_set(newest: SetId, generation: Generation, set: &JournalSet) -> Result<(), RegisterError> {
    let mut devices: Vec<_> = set.members.iter().map(|member| member.device).collect();
    devices.sort_unstable();
    devices.dedup();
    let sound =
        set.id > newest && set.id.generation == generation && !devices.is_empty() && devices.len() == set.members.len();
    if sound { Ok(()) } else { Err(RegisterError::Invalid) }
}

fn check_checkpoint(volume: VolumeId, register: &Register, next: &CheckpointRef) -> Result<(), RegisterError> {
    let border = register.checkpoint.map_or(0, |checkpoint| checkpoint.border);
    let sound = next.segment.volume == volume && next.border >= border;
    if sound { Ok(()) } else { Err(RegisterError::Invalid) }
}

impl Registers for MemoryRegisters {
    fn read(&self, volume: VolumeId) -> BoxFuture<'static, Result<Register, RegisterError>> {
        let state = self.state();
        let result = match state.volumes.get(&volume) {
            _ if state.down => Err(RegisterError::NoAnswer),
            Some(entry) => Ok(entry.register.clone()),
            None => Err(RegisterError::NotFound),
        };
        Box::pin(async move { result })
    }

    fn change(
        &self,
        volume: VolumeId,
        generation: Generation,
        version: u64,
        token: ChangeToken,
        change: RegisterChange,
    ) -> BoxFuture<'static, Result<Register, RegisterError>> {
        let mut state = self.state();
        state.changes += 1;
        let at = state.changes - 1;
        let fault = state.planned.remove(&at);
        if state.down || fault == Some(RegisterFault::LoseRequest) {
            return Box::pin(async { Err(RegisterError::NoAnswer) });
        }
        let Some(entry) = state.volumes.get_mut(&volume) else {
            return Box::pin(async { Err(RegisterError::NotFound) });
        };
        let result = match entry.answers.get(&token.0) {
            Some(answer) => answer.clone(),
            None => {
                let answer = decide(entry, volume, generation, version, change);
                entry.answers.insert(token.0, answer.clone());
                answer
            }
        };
        let result = if fault.is_some() { Err(RegisterError::NoAnswer) } else { result };
        Box::pin(async move { result })
    }
}
