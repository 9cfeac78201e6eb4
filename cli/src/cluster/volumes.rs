//! The volumes this process serves. A volume is taken over at its first client, shared by all of them, and handed over
//! cleanly when the process stops.

use crate::error::ClusterError;
use lsm_block::index::PageCache;
use lsm_block::{AckPolicy, Registers, SegmentStore, Tuning, Volume, VolumeConfig, VolumeStatus};
use raft_meta::{Consensus, MetaState, RegisterClient};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;
use tokio::sync::{Mutex as AsyncMutex, RwLock as AsyncRwLock, watch};
use xsan_env::runtime::BoxFuture;
use xsan_env::{BufPool, Env};
use xsan_pool::Pool;
use xsan_types::{ChangeToken, Generation, PoolId, Register, RegisterChange, RegisterError, RegisterView, VolumeId};

/// How long a volume may take to be handed over.
const HAND_OVER_FOR: Duration = Duration::from_secs(10);

/// A served volume.
pub struct Attached {
    /// Its identity.
    pub id: VolumeId,
    /// The engine.
    pub volume: Arc<Volume>,
    name: RwLock<String>,
    pinned: AtomicBool,
    moved: AtomicBool,
}

impl Attached {
    /// Its name now.
    #[must_use]
    pub fn name(&self) -> String {
        self.name.read().expect("name lock").clone()
    }

    /// Somebody wants it here: a client elsewhere is no reason to move it.
    pub fn pin(&self) {
        self.pinned.store(true, Ordering::Relaxed);
    }

    /// Another owner has it: clients are to ask elsewhere, whatever their requests fail with here.
    pub fn move_away(&self) {
        self.moved.store(true, Ordering::Relaxed);
    }

    /// Whether another owner has it.
    #[must_use]
    pub fn has_moved(&self) -> bool {
        self.moved.load(Ordering::Relaxed)
    }

    /// Whether somebody wants it here.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.pinned.load(Ordering::Relaxed)
    }
}

/// The registers of raft-meta in the words of `lsm-block`.
struct MetaRegisters(RegisterClient);

impl Registers for MetaRegisters {
    fn read(&self, volume: VolumeId) -> BoxFuture<'static, Result<Register, RegisterError>> {
        self.0.read(volume)
    }

    fn change(
        &self,
        volume: VolumeId,
        generation: Generation,
        version: u64,
        token: ChangeToken,
        change: RegisterChange,
    ) -> BoxFuture<'static, Result<Register, RegisterError>> {
        self.0.change(volume, generation, version, token, change)
    }
}

struct Inner {
    env: Env,
    buffers: BufPool,
    cache: Arc<PageCache>,
    meta: Arc<dyn Consensus>,
    tuning: Tuning,
    pools: RwLock<BTreeMap<PoolId, Arc<Pool>>>,
    attached: Mutex<BTreeMap<VolumeId, Arc<Attached>>>,
    /// One take-over, hand-over or deletion of a volume at a time; a volume that waits for nodes keeps no other one waiting.
    turns: Mutex<BTreeMap<VolumeId, Arc<AsyncMutex<()>>>>,
    /// Held shared by whoever has a turn: what `close` waits for.
    busy: AsyncRwLock<()>,
    /// Set once: no volume is attached any more, and take-overs that run are given up.
    closing: watch::Sender<bool>,
}

/// Volumes of this process; cheap to clone.
#[derive(Clone)]
pub struct VolumeManager(Arc<Inner>);

impl VolumeManager {
    /// No volume is attached yet.
    #[must_use]
    pub fn new(env: Env, buffers: BufPool, cache: Arc<PageCache>, meta: Arc<dyn Consensus>, tuning: Tuning) -> Self {
        Self(Arc::new(Inner {
            env,
            buffers,
            cache,
            meta,
            tuning,
            pools: RwLock::new(BTreeMap::new()),
            attached: Mutex::new(BTreeMap::new()),
            turns: Mutex::new(BTreeMap::new()),
            busy: AsyncRwLock::new(()),
            closing: watch::Sender::new(false),
        }))
    }

    /// The metadata now.
    #[must_use]
    pub fn view(&self) -> Arc<MetaState> {
        self.0.meta.view()
    }

    /// Where volumes of pool `id` keep their segments.
    pub fn add_pool(&self, id: PoolId, pool: Arc<Pool>) {
        self.0.pools.write().expect("pools lock").insert(id, pool);
    }

    /// A pool is gone.
    pub fn remove_pool(&self, id: PoolId) {
        self.0.pools.write().expect("pools lock").remove(&id);
    }

    /// The pools, by id.
    #[must_use]
    pub fn pools(&self) -> BTreeMap<PoolId, Arc<Pool>> {
        self.0.pools.read().expect("pools lock").clone()
    }

    /// The served volume; takes it over if it is not served yet.
    ///
    /// # Errors
    /// `NotFound`, or why the take-over failed.
    pub async fn attach(&self, id: VolumeId) -> Result<Arc<Attached>, ClusterError> {
        let _busy = self.0.busy.read().await;
        let mut closing = self.0.closing.subscribe();
        if *closing.borrow() {
            return Err(ClusterError::Closing);
        }
        let _turn = self.turn(id).lock_owned().await;
        // Another one may have attached, renamed or deleted it meanwhile.
        let view = self.view();
        let record = view.volume(id).ok_or_else(|| ClusterError::NoVolume(id.to_string()))?;
        let name = record.name.as_str();
        if let Some(attached) = self.serving(id) {
            return Ok(attached);
        }
        let pool = self.0.pools.read().expect("pools lock").get(&record.pool).cloned();
        let pool = pool.ok_or(ClusterError::NoPool(record.pool.to_string()))?;
        let ack = match record.ack {
            raft_meta::AckPolicy::Replicated => AckPolicy::Replicated,
            raft_meta::AckPolicy::Persisted => AckPolicy::Persisted,
        };
        let config = VolumeConfig {
            id: record.id,
            env: self.0.env.clone(),
            buffers: self.0.buffers.clone(),
            store: pool as Arc<dyn SegmentStore>,
            registers: Arc::new(MetaRegisters(RegisterClient::new(Arc::clone(&self.0.meta)))),
            cache: Arc::clone(&self.0.cache),
            ack,
            tuning: self.0.tuning,
        };
        let began = self.0.env.now();
        let volume = tokio::select! {
            biased;
            // A take-over may end anywhere: the next owner begins again.
            _ = closing.wait_for(|&closing| closing) => return Err(ClusterError::Closing),
            opened = Volume::open(config) => opened?,
        };
        tracing::info!(volume = name, took = ?self.0.env.now().since(began), "attached");
        let attached = Arc::new(Attached {
            id: record.id,
            volume,
            name: RwLock::new(name.to_owned()),
            pinned: AtomicBool::new(false),
            moved: AtomicBool::new(false),
        });
        self.0.attached.lock().expect("attached lock").insert(record.id, Arc::clone(&attached));
        Ok(attached)
    }

    fn turn(&self, id: VolumeId) -> Arc<AsyncMutex<()>> {
        Arc::clone(self.0.turns.lock().expect("turns lock").entry(id).or_default())
    }

    /// The engine of a volume, if it serves.
    #[must_use]
    pub fn serving(&self, id: VolumeId) -> Option<Arc<Attached>> {
        let mut attached = self.0.attached.lock().expect("attached lock");
        if attached.get(&id).is_some_and(|attached| attached.volume.status().health.is_final()) {
            attached.remove(&id);
        }
        attached.get(&id).cloned()
    }

    /// A volume that has another owner is not served here any more.
    #[must_use]
    pub fn let_go(&self, id: VolumeId) -> Option<Arc<Attached>> {
        self.0.attached.lock().expect("attached lock").remove(&id)
    }

    /// State of every served volume.
    #[must_use]
    pub fn statuses(&self) -> BTreeMap<VolumeId, VolumeStatus> {
        let attached = self.0.attached.lock().expect("attached lock");
        attached.iter().map(|(&id, attached)| (id, attached.volume.status())).collect()
    }

    /// A volume has another name now.
    pub fn renamed(&self, id: VolumeId, name: &str) {
        if let Some(attached) = self.serving(id) {
            name.clone_into(&mut attached.name.write().expect("name lock"));
        }
    }

    /// Hands a served volume over cleanly, so that the next owner needs no recovery. No-op if it is not served.
    ///
    /// # Errors
    /// Those of the volume; it is not served any more all the same.
    pub async fn detach(&self, id: VolumeId) -> Result<(), ClusterError> {
        let _busy = self.0.busy.read().await;
        let _turn = self.turn(id).lock_owned().await;
        let attached = self.0.attached.lock().expect("attached lock").remove(&id);
        match attached {
            Some(attached) => self.hand_over(&attached).await,
            None => Ok(()),
        }
    }

    /// Ends a volume here, cleanly if that is possible in time: too few nodes or no metadata must keep nobody waiting. What
    /// was acknowledged is in the journal either way.
    async fn hand_over(&self, attached: &Attached) -> Result<(), ClusterError> {
        match self.0.env.timeout(HAND_OVER_FOR, attached.volume.close()).await {
            Some(closed) => Ok(closed?),
            None => {
                attached.volume.abandon();
                Err(ClusterError::HandOver(attached.name()))
            }
        }
    }

    /// Retires a volume and frees everything of it on the nodes that are up; the others free it when they return. Its
    /// clients must be gone.
    ///
    /// # Errors
    /// Those of the register (it has snapshots …).
    pub async fn delete(&self, id: VolumeId, pool: PoolId) -> Result<(), ClusterError> {
        let _busy = self.0.busy.read().await;
        let _turn = self.turn(id).lock_owned().await;
        let registers = RegisterClient::new(Arc::clone(&self.0.meta));
        let register = registers.read(id).await?;
        let token = ChangeToken(self.0.env.random_u128());
        let retired =
            registers.change(id, register.generation, register.version, token, RegisterChange::Retire).await?;
        if let Some(attached) = self.0.attached.lock().expect("attached lock").remove(&id) {
            attached.volume.abandon();
        }
        let pool = self.0.pools.read().expect("pools lock").get(&pool).cloned();
        if let Some(pool) = pool {
            let view = RegisterView { volume: id, generation: retired.generation, set: None, deleted: true };
            pool.registered(view).await?;
        }
        self.0.turns.lock().expect("turns lock").remove(&id);
        Ok(())
    }

    /// Hands every volume over and refuses new clients.
    pub async fn close(&self) {
        self.0.closing.send_replace(true);
        let _all = self.0.busy.write().await;
        let attached = std::mem::take(&mut *self.0.attached.lock().expect("attached lock"));
        let closes = attached.into_values().map(|attached| async move {
            let name = attached.name();
            match self.hand_over(&attached).await {
                Ok(()) => tracing::info!(volume = name, "handed over"),
                Err(error) => {
                    tracing::warn!(volume = name, %error, "not handed over cleanly: the next start recovers it")
                }
            }
        });
        futures::future::join_all(closes).await;
    }
}
