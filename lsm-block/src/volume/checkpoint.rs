//! Checkpoints (P7): cut the log, wait until everything before the cut is sealed, build the index, register it, free what
//! it does not list. And the other register writes of a serving owner: size and clean hand-over.

use super::batch::Queued;
use super::shared::{Done, Health, Request, count};
use super::writer::{Event, Grave, Writer, new_name};
use crate::error::VolumeError;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::oneshot;
use xsan_env::runtime::BoxFuture;
use xsan_types::{ChangeToken, CheckpointRef, Register, RegisterChange, RegisterError, RegisterView};

/// Pause after a checkpoint that failed; doubles with every further failure.
pub(super) const CHECKPOINT_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
const CHECKPOINT_PAUSE_MAX: Duration = Duration::from_secs(30);
/// Checkpoints begin at [`crate::Tuning::delta_bytes_max`]; at so many times that, writes wait for one.
const DELTA_TIMES_MAX: usize = 4;

/// How far a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CheckpointStage {
    Idle,
    /// Records before the cut are being acknowledged; then the index is frozen.
    Cutting {
        border: u64,
    },
    /// Segments before the border are being sealed.
    Sealing {
        border: u64,
    },
    /// The index is being built.
    Building {
        border: u64,
    },
    /// The register decides.
    Registering {
        border: u64,
    },
}

impl CheckpointStage {
    pub(super) fn is_idle(self) -> bool {
        self == Self::Idle
    }

    pub(super) fn is_registering(self) -> bool {
        matches!(self, Self::Registering { .. })
    }
}

impl Writer {
    /// Cuts the log. Every batch before the cut lies in a segment below the border, every later one above it, and batches
    /// are acknowledged in order: the index is frozen exactly between the two.
    pub(super) fn begin_checkpoint(&mut self) {
        if !self.checkpoint.is_idle() {
            return;
        }
        self.written_at_checkpoint = self.written_bytes;
        self.cut();
        self.acknowledged_up_to_cut();
    }

    fn cut(&mut self) {
        self.rotate_rows();
        self.rotate();
        self.cut = self.next_number.load(Ordering::Relaxed);
        self.checkpoint = CheckpointStage::Cutting { border: self.cut };
    }

    /// A batch from before the cut was written again, into a newer segment: the cut comes after it.
    pub(super) fn cut_again(&mut self) {
        if matches!(self.checkpoint, CheckpointStage::Cutting { .. }) {
            self.cut();
        }
    }

    /// Called after each acknowledged batch.
    pub(super) fn acknowledged_up_to_cut(&mut self) {
        let CheckpointStage::Cutting { border } = self.checkpoint else { return };
        if self.in_flight.iter().all(|batch| batch.number >= border) {
            self.shared.index.freeze();
            self.checkpoint = CheckpointStage::Sealing { border };
        }
    }

    /// Whether the last failure is long enough ago for another attempt nobody asked for.
    pub(super) fn checkpoint_may_begin(&self) -> bool {
        self.checkpoint_pause == CHECKPOINT_PAUSE || self.shared.env.now() >= self.checkpoint_after
    }

    /// Moves a checkpoint on, or begins one that is due.
    pub(super) fn advance_checkpoint(&mut self) {
        let tuning = &self.shared.tuning;
        let delta_bytes = self.shared.index.delta_bytes();
        self.delta_full = delta_bytes > tuning.delta_bytes_max * DELTA_TIMES_MAX;
        if self.checkpoint.is_idle()
            && self.checkpoint_may_begin()
            && (delta_bytes > tuning.delta_bytes_max || self.bytes_since_checkpoint() > tuning.checkpoint_bytes)
        {
            self.begin_checkpoint();
        }
        let CheckpointStage::Sealing { border } = self.checkpoint else { return };
        // A row segment that failed is sealed under a name above the border, its entries frozen: it must be done as well.
        let unsealed = |number: Option<&u64>| number.is_some_and(|&number| number < border);
        if unsealed(self.segments.keys().next()) || unsealed(self.row_segments.keys().next()) {
            return;
        }
        self.checkpoint = CheckpointStage::Building { border };
        let shared = Arc::clone(&self.shared);
        let set = Arc::clone(&self.set);
        let next_number = Arc::clone(&self.next_number);
        let (done, built) = oneshot::channel();
        self.shared.env.spawn("volume-checkpoint", async move {
            let mut names = || new_name(&shared, &next_number, &set);
            let result = shared.index.build_checkpoint(border, &mut names).await;
            let _ = done.send(result.map_err(VolumeError::from));
        });
        self.events
            .push(Box::pin(async move { Event::CheckpointBuilt(built.await.unwrap_or(Err(VolumeError::Closed))) }));
    }

    pub(super) fn checkpoint_built(&mut self, result: Result<CheckpointRef, VolumeError>) {
        let CheckpointStage::Building { border } = self.checkpoint else { return };
        let reference = match result {
            Ok(reference) => reference,
            Err(error) => return self.checkpoint_failed(&error),
        };
        self.checkpoint = CheckpointStage::Registering { border };
        let change = self.register_change(RegisterChange::Checkpoint(reference));
        self.events.push(Box::pin(async move { Event::CheckpointRegistered(change.await) }));
    }

    fn checkpoint_failed(&mut self, error: &VolumeError) {
        tracing::warn!(volume = %self.shared.id, %error, "checkpoint failed; it is tried again later");
        self.shared.index.abandon();
        self.checkpoint = CheckpointStage::Idle;
        self.checkpoint_after = self.shared.env.now().after(self.checkpoint_pause);
        let pause = self.shared.env.sleep(self.checkpoint_pause);
        self.checkpoint_pause = (self.checkpoint_pause * 2).min(CHECKPOINT_PAUSE_MAX);
        self.events.push(Box::pin(async move {
            pause.await;
            Event::Nothing
        }));
        for done in self.checkpoint_waiters.drain(..) {
            let _ = done.send(Err(error.clone()));
        }
    }

    /// A conditional change, repeated until it is answered (C18). At most one runs at a time.
    pub(super) fn register_change(
        &self,
        change: RegisterChange,
    ) -> BoxFuture<'static, Result<Register, RegisterError>> {
        let shared = Arc::clone(&self.shared);
        let token = ChangeToken(shared.env.random_u128());
        let (generation, version) = (self.register.generation, self.register.version);
        Box::pin(async move {
            loop {
                match shared.registers.change(shared.id, generation, version, token, change.clone()).await {
                    Err(RegisterError::NoAnswer) if !shared.health.borrow().is_final() => {
                        shared.env.sleep(std::time::Duration::from_millis(100)).await;
                    }
                    answer => return answer,
                }
            }
        })
    }

    pub(super) fn checkpoint_registered(&mut self, result: Result<Register, RegisterError>) {
        let CheckpointStage::Registering { border } = self.checkpoint else { return };
        match result {
            Ok(register) => self.register = register,
            // The writer stops, its index keeps the frozen delta: the stage stays, so that no other checkpoint begins.
            Err(error) if self.fenced(&error) => return,
            Err(error) => return self.checkpoint_failed(&error.into()),
        }
        self.checkpoint_pause = CHECKPOINT_PAUSE;
        count(&self.shared.counters.checkpoints, 1);
        self.shared.index.install();
        self.checkpoint = CheckpointStage::Idle;
        self.manifest.retain(|sealed| sealed.name.number >= border);
        for member in &self.set.members {
            let trim = self.shared.store.trim_manifest(member.at, border, Vec::new());
            self.events.push(Box::pin(async move {
                // Lines that stay are read again at recovery: no harm.
                let _ = trim.await;
                Event::Nothing
            }));
        }
        let mut names = self.shared.index.take_dead();
        names.extend(self.evacuated.extract_if(.., |name| name.number < border));
        self.graves.push(Grave { token: self.shared.renew_read_token(), names });
        self.bury();
        self.reconcile_rest();
        // The checkpoint's own segments may have been sealed with positions missing; nobody else says so.
        self.fill_next_hole();
        for done in self.checkpoint_waiters.drain(..) {
            let _ = done.send(Ok(()));
        }
    }

    /// The last step of a close: nothing is open any more, the checkpoint decides everything. Registers a set without
    /// members and stops (P3, P10).
    pub(super) async fn hand_over(&mut self) {
        let Some(done) = self.closing.take() else { return };
        // From here on nobody is asked at a take-over: no read may be confirmed by the old members any more (P8).
        self.shared.pause_reads(true);
        let result = self.register_change(RegisterChange::Set(None)).await;
        let outcome = match result {
            Ok(register) => {
                // Nobody but this owner can say it of its own generation: in the register it looks like one that has just been taken.
                let generation = register.generation.next();
                let view = RegisterView { volume: self.shared.id, generation, set: None, deleted: false };
                let _ = self.shared.store.registered(view).await;
                Ok(())
            }
            Err(error) if self.fenced(&error) => Err(self.shared.final_error()),
            Err(error) => Err(error.into()),
        };
        self.shared.stop(Health::Closed);
        let _ = done.send(outcome);
    }

    /// The tail of a shrunk volume is discarded ahead of everything that waits.
    pub(super) fn discard_tail(&mut self, zero: Request) {
        self.backlog.push_front(Queued { beyond_end: true, ..Queued::from(zero) });
    }

    /// Registers a size once the tail is discarded, then answers.
    pub(super) fn register_size(
        &mut self,
        size: u64,
        done: Done,
        tail: Option<(u64, oneshot::Receiver<Result<(), VolumeError>>)>,
    ) -> BoxFuture<'static, Event> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            if let Some((old, discarded)) = tail {
                let discarded = discarded.await.unwrap_or(Err(VolumeError::Closed));
                if let Err(error) = discarded {
                    shared.set_size(old);
                    let _ = done.send(Err(error));
                    return Event::Nothing;
                }
            }
            Event::SizeReady { size, done }
        })
    }

    /// Writes the size into the register.
    pub(super) async fn commit_size(&mut self, size: u64, done: Done) {
        let outcome = match self.register_change(RegisterChange::Resize(size)).await {
            Ok(register) => {
                self.register = register;
                self.shared.set_size(size);
                Ok(())
            }
            Err(error) if self.fenced(&error) => Err(self.shared.final_error()),
            Err(error) => Err(error.into()),
        };
        let _ = done.send(outcome);
    }
}
