//! What the rest of the system sees of the metadata service, whoever orders the commands.

use crate::command::{Command, Outcome};
use crate::error::MetaError;
use crate::state::MetaState;
use std::sync::Arc;
use tokio::sync::watch;
use xsan_env::runtime::BoxFuture;
use xsan_types::{ChangeToken, Generation, Register, RegisterChange, RegisterError, VolumeId};

/// Orders commands, makes them durable and applies them to the state.
///
/// Futures may be dropped: a proposed command may take effect all the same.
pub trait Consensus: Send + Sync + 'static {
    /// Proposes a command; answered when it is durable and applied (then it is visible in [`Consensus::view`]).
    ///
    /// # Errors
    /// Why it was refused. `NoAnswer`: it may or may not take effect, now or later; repeat it until there is another
    /// answer (register changes: with the same token).
    fn propose(&self, command: Command) -> BoxFuture<'static, Result<Outcome, MetaError>>;

    /// Completes when [`Consensus::view`] holds everything that was answered, to anybody, before this call; the answer is the
    /// number of the last command in it.
    ///
    /// # Errors
    /// `NoAnswer`, `Closed`: the view may be stale.
    fn read_barrier(&self) -> BoxFuture<'static, Result<u64, MetaError>>;

    /// The state as known here; a version that does not change any more. Without a barrier it may be stale (with a single
    /// replica it is not).
    fn view(&self) -> Arc<MetaState>;

    /// Follows the number of the last applied command: look at the view whenever it grows.
    fn subscribe(&self) -> watch::Receiver<u64>;

    /// Writes a snapshot and cuts the log; for tests and for people. It happens by itself as the log grows.
    ///
    /// # Errors
    /// `NoAnswer`: the old log goes on.
    fn snapshot(&self) -> BoxFuture<'static, Result<u64, MetaError>>;
}

/// The volume registers in the words of a volume's owner; implementing `lsm-block`'s `Registers` with it is delegation.
#[derive(Clone)]
pub struct RegisterClient(Arc<dyn Consensus>);

impl RegisterClient {
    /// Registers kept by `consensus`.
    #[must_use]
    pub fn new(consensus: Arc<dyn Consensus>) -> Self {
        Self(consensus)
    }

    /// The register now, that of a deleted volume included.
    pub fn read(&self, volume: VolumeId) -> BoxFuture<'static, Result<Register, RegisterError>> {
        let consensus = Arc::clone(&self.0);
        Box::pin(async move {
            consensus.read_barrier().await.map_err(register_error)?;
            let view = consensus.view();
            view.volumes.get(&volume).map(|volume| volume.register().clone()).ok_or(RegisterError::NotFound)
        })
    }

    /// A conditional change (P2). On `NoAnswer` repeat it with the same token.
    pub fn change(
        &self,
        volume: VolumeId,
        generation: Generation,
        version: u64,
        token: ChangeToken,
        change: RegisterChange,
    ) -> BoxFuture<'static, Result<Register, RegisterError>> {
        let answer = self.0.propose(Command::ChangeRegister { volume, generation, version, token, change });
        Box::pin(async move {
            match answer.await {
                Ok(Outcome::Register(register)) => Ok(register),
                Ok(other) => unreachable!("a register change answered {other:?}"),
                Err(error) => Err(register_error(error)),
            }
        })
    }
}

fn register_error(error: MetaError) -> RegisterError {
    match error {
        MetaError::Register(error) => error,
        MetaError::NoAnswer | MetaError::Closed => RegisterError::NoAnswer,
        // Nothing else refuses a register change, except its size.
        _ => RegisterError::Invalid,
    }
}
