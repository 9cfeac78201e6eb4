//! Which node serves a volume: taking over, letting go, and what a client is told that asks the wrong node (RFC 0005). Nothing here
//! fences anything: two nodes that both believe in their right are told apart by the register (P2).

use super::host::Host;
use super::maps::answers;
use super::membership::{Release, Reply, Resize};
use super::volumes::Attached;
use crate::cluster::export::{VolumeExport, export_key, volume_info};
use crate::error::ClusterError;
use raft_meta::{Command, Consensus, MetaError, MetaState, Served};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::OwnedMutexGuard;
use xsan_env::Moment;
use xsan_env::runtime::BoxFuture;
use xsan_gateway::{Export, ExportInfo, Exports, OpenError, Transport};
use xsan_types::{ErrorKind, Generation, NodeId, VolumeId};

/// How long another node has to hand a volume over before it is taken without its help.
const RELEASE_FOR: Duration = Duration::from_secs(2);
/// How long a client that opens a volume waits for the word of a node that does not answer: by then it is down.
const SILENCE_MAX: Duration = Duration::from_secs(6);
/// How long a client that is still counted elsewhere is given to be gone: one guest often follows itself.
const LEFT_FOR: Duration = Duration::from_secs(1);
/// How long a volume that was let go is not taken back by itself.
const AWAY_FOR: Duration = Duration::from_secs(5);
/// How often a volume that is moved here is asked for again when another node takes it at the same moment.
const MOVES_MAX: u32 = 10;
/// A resize waits for what is being written.
const RESIZE_FOR: Duration = Duration::from_secs(30);
/// How long a client waits for the newest metadata before it is told that there is none.
const NEWEST_FOR: Duration = Duration::from_secs(5);
/// The note of who serves is worth no longer wait at shutdown.
const NOTE_FOR: Duration = Duration::from_secs(1);

impl Host {
    fn find(&self, view: &MetaState, name: &str) -> Result<VolumeId, ClusterError> {
        view.volume_named(name).map(|volume| volume.id).ok_or_else(|| ClusterError::NoVolume(name.to_owned()))
    }

    /// Who else serves a volume, by the metadata's note, if that node should answer.
    pub(super) fn other_owner(&self, view: &MetaState, volume: VolumeId) -> Option<NodeId> {
        let Served { node, .. } = *view.hosts.served.get(&volume)?;
        let answers = view.node(node).is_some_and(|node| answers(node.state));
        (node != self.node_id() && answers).then_some(node)
    }

    /// Moves a volume here, from wherever it is served. Its clients there are cut off; they find it here. It stays until it is
    /// moved again, or this process ends.
    ///
    /// # Errors
    /// No such volume; why the take-over failed.
    pub async fn attach(&self, name: &str) -> Result<Arc<Attached>, ClusterError> {
        let view = self.newest_view().await?;
        let id = self.find(&view, name)?;
        let attached = self.move_here(id, || true).await?;
        attached.pin();
        Ok(attached)
    }

    /// As [`Host::attach`]; it stays as long as it has clients here. Nothing is taken from anybody once it is not wanted any more.
    pub(super) async fn move_here(
        &self,
        id: VolumeId,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Arc<Attached>, ClusterError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            match self.move_once(id, &is_wanted).await {
                // A client elsewhere asked for it at the same moment, and its node was quicker: this one was told where it shall be.
                Err(error) if error.kind() == ErrorKind::Fenced && attempts < MOVES_MAX => {
                    tracing::info!(volume = %id, %error, attempts, "another node took it at the same moment");
                    self.newest_view().await?;
                }
                outcome => return outcome,
            }
        }
    }

    async fn move_once(&self, id: VolumeId, is_wanted: impl Fn() -> bool) -> Result<Arc<Attached>, ClusterError> {
        // From here on clients that ask for it here wait for the outcome.
        let taking = Taking::begin(self, id).await;
        if let Some(attached) = self.volumes().serving(id) {
            return Ok(attached);
        }
        if !is_wanted() {
            return Err(ClusterError::Left);
        }
        let owner = self.other_owner(&self.view(), id);
        // Before the other one lets go: its clients ask around at once, and no third node shall take the volume for one of them.
        let generation = self.note_taking(id).await;
        if let Some(owner) = owner {
            match self.ask_release(owner, &Release { volume: id, force: true }, RELEASE_FOR).await {
                Some(Reply::Done) => {}
                // Without its help the volume is recovered, and the other one is fenced.
                answer => tracing::warn!(volume = %id, %owner, ?answer, "taken over without a hand-over"),
            }
        }
        self.take(taking, generation).await
    }

    /// Serves a volume for a client that asks for it here.
    ///
    /// # Errors
    /// No such volume; it is served by another node, for other clients; why the take-over failed.
    pub async fn open_for_client(&self, name: &str) -> Result<Arc<Attached>, ClusterError> {
        if let Some(attached) = self.view().volume_named(name).and_then(|volume| self.volumes().serving(volume.id)) {
            return Ok(attached);
        }
        // By an old view somebody who has been fenced, or cut off, would take the volume from its owner.
        let newest = self.env().timeout(NEWEST_FOR, self.newest_view()).await;
        let view = newest.unwrap_or(Err(MetaError::NoAnswer.into()))?;
        let id = self.find(&view, name)?;
        self.open_volume_for_client(id, name).await
    }

    /// As [`Host::open_for_client`], of a volume that is known; `name` is for people.
    pub(super) async fn open_volume_for_client(&self, id: VolumeId, name: &str) -> Result<Arc<Attached>, ClusterError> {
        if let Some(attached) = self.volumes().serving(id) {
            return Ok(attached);
        }
        let since = self.env().now();
        loop {
            let known = self.ask_owner(id, name, since).await?;
            if let Some(attached) = self.take_unserved(id, known).await? {
                return Ok(attached);
            }
        }
    }

    /// Waits until the volume may be taken for a client that came at `since`: nobody serves it, or whoever did has let it go. Answers
    /// the note of who serves it by which that was found.
    async fn ask_owner(&self, id: VolumeId, name: &str, since: Moment) -> Result<Option<Served>, ClusterError> {
        loop {
            let view = self.view();
            let known = view.hosts.served.get(&id).copied();
            let owner = self.other_owner(&view, id);
            let owner_name = owner.and_then(|owner| view.node(owner)).map(|node| node.name.to_string());
            if self.is_moved_away(&view, id) {
                let node = owner_name.unwrap_or_else(|| "another node".to_owned());
                return Err(ClusterError::ServedElsewhere { name: name.to_owned(), node });
            }
            let (Some(owner), Some(owner_name)) = (owner, owner_name) else { return Ok(known) };
            let release = Release { volume: id, force: false };
            let answer = tokio::select! {
                biased;
                answer = self.ask_release(owner, &release, RELEASE_FOR) => answer,
                // Then nobody needs its word any more.
                () = self.owner_is_gone(id, owner) => return Ok(known),
            };
            match answer {
                Some(Reply::Done) => return Ok(known),
                // A client that has just left is forgotten in a moment.
                Some(Reply::InUse { clients: 1.. }) if self.env().now().since(since) < LEFT_FOR => {
                    let _ = self.env().timeout(Duration::from_millis(50), self.owner_is_gone(id, owner)).await;
                }
                Some(Reply::InUse { .. }) => {
                    return Err(ClusterError::ServedElsewhere { name: name.to_owned(), node: owner_name });
                }
                Some(Reply::Failed { message }) => {
                    tracing::warn!(volume = name, %owner, message, "taken over without a hand-over");
                    return Ok(known);
                }
                None if self.env().now().since(since) > SILENCE_MAX => {
                    return Err(ClusterError::ServedElsewhere { name: name.to_owned(), node: owner_name });
                }
                // It is down soon, or answers again.
                None => {
                    let _ = self.env().timeout(Duration::from_millis(250), self.owner_is_gone(id, owner)).await;
                }
            }
        }
    }

    /// Takes a volume over that nobody serves, for a client or so that it is reached at its address. `known` is the note of who serves it
    /// by which that was found; `None`: another node has taken it since, or is about to.
    ///
    /// # Errors
    /// Why the take-over failed.
    pub(super) async fn take_unserved(
        &self,
        id: VolumeId,
        known: Option<Served>,
    ) -> Result<Option<Arc<Attached>>, ClusterError> {
        let taking = Taking::begin(self, id).await;
        // Whoever had the turn before may have done it.
        if let Some(attached) = self.volumes().serving(id) {
            return Ok(Some(attached));
        }
        let view = self.view();
        let has_another = view.hosts.served.get(&id).copied() != known && self.other_owner(&view, id).is_some();
        if has_another || self.is_moved_away(&view, id) {
            return Ok(None);
        }
        let generation = self.note_taking(id).await;
        self.take(taking, generation).await.map(Some)
    }

    /// Whether it was let go for another node, which has not been noted for long enough to be asked.
    fn is_moved_away(&self, view: &MetaState, id: VolumeId) -> bool {
        let is_unknown = view.hosts.served.get(&id).is_none_or(|served| served.node == self.node_id());
        self.is_leaving(id) && (is_unknown || self.other_owner(view, id).is_some())
    }

    /// Completes when `owner` should not answer any more, or another one serves the volume.
    async fn owner_is_gone(&self, id: VolumeId, owner: NodeId) {
        let mut applied = self.group().subscribe();
        while self.other_owner(&self.view(), id) == Some(owner) && applied.changed().await.is_ok() {}
    }

    /// Notes that the volume will be served here, so that others do not begin the same: recovery may take a while. Answers the
    /// generation that it is noted under.
    async fn note_taking(&self, id: VolumeId) -> Generation {
        self.releasing.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        let generation = self.view().volume(id).map(|volume| volume.register().generation.next()).unwrap_or_default();
        let note = Command::VolumeServed { volume: id, generation, node: Some(self.node_id()) };
        let _ = self.env().timeout(NOTE_FOR, self.group().propose(note)).await;
        generation
    }

    async fn take(&self, taking: Taking<'_>, generation: Generation) -> Result<Arc<Attached>, ClusterError> {
        match self.volumes().attach(taking.volume).await {
            Ok(attached) => {
                self.note_served(&attached, Some(self.node_id()));
                self.addresses().look();
                Ok(attached)
            }
            Err(error) => {
                // Not another's note: one that was quicker may have taken the very generation that was foreseen here.
                let id = taking.volume;
                if self.view().hosts.served.get(&id).is_some_and(|served| served.node == self.node_id()) {
                    let note = Command::VolumeServed { volume: id, generation, node: None };
                    let noted = self.group().propose(note);
                    // Else the next one asks this node, which says so itself.
                    drop(self.env().spawn("not served", async move { drop(noted.await) }));
                }
                Err(error)
            }
        }
    }

    pub(super) fn is_taking(&self, id: VolumeId) -> bool {
        self.taking.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&id)
    }

    /// Notes in the metadata who serves; nobody waits for it.
    fn note_served(&self, attached: &Attached, node: Option<NodeId>) {
        let generation = attached.volume.status().generation;
        let noted = self.group().propose(Command::VolumeServed { volume: attached.id, generation, node });
        drop(self.env().spawn("served", async move {
            if let Err(error) = noted.await {
                tracing::debug!(%error, "not noted who serves the volume");
            }
        }));
    }

    pub(super) fn is_leaving(&self, id: VolumeId) -> bool {
        let mut releasing = self.releasing.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.env().now();
        releasing.retain(|_, since| now.since(*since) < AWAY_FOR);
        releasing.contains_key(&id)
    }

    /// Lets a volume go for another node.
    pub async fn release(&self, id: VolumeId, force: bool) -> Reply {
        let Some(attached) = self.volumes().serving(id) else {
            // It is going to be served here: nobody waits for that to end.
            if self.is_taking(id) {
                if !force {
                    return Reply::InUse { clients: 0 };
                }
                // Nor do others that want it here take it back.
                self.releasing.lock().unwrap_or_else(PoisonError::into_inner).insert(id, self.env().now());
            }
            return Reply::Done;
        };
        let clients = self.clients(id);
        if (clients > 0 || attached.is_pinned()) && !force {
            return Reply::InUse { clients };
        }
        self.releasing.lock().unwrap_or_else(PoisonError::into_inner).insert(id, self.env().now());
        tracing::info!(volume = attached.name(), clients, "handed over to another node");
        // First what is under way, so that clients are told of all that was done for them.
        self.give_address_up(id).await;
        match self.volumes().detach(id).await {
            Ok(()) => {
                // Who asked for it says so next; for the moment between nobody else is to be looked for.
                if !self.view().addresses.contains_key(&id) {
                    self.note_served(&attached, None);
                }
                Reply::Done
            }
            Err(error) => Reply::Failed { message: error.to_string() },
        }
    }

    /// Another size for a volume, wherever it is served.
    ///
    /// # Errors
    /// Its owner refused or does not answer.
    pub async fn resize(&self, name: &str, size: u64) -> Result<(), ClusterError> {
        let view = self.newest_view().await?;
        let id = self.find(&view, name)?;
        let Some(owner) = self.other_owner(&view, id).filter(|_| self.volumes().serving(id).is_none()) else {
            let attached = self.open_for_client(name).await?;
            return Ok(attached.volume.resize(size).await?);
        };
        match self.ask_resize(owner, &Resize { volume: id, size }, RESIZE_FOR).await {
            Some(Reply::Done) => Ok(()),
            Some(Reply::Failed { message }) => Err(ClusterError::Invalid(message)),
            // It let the volume go meanwhile.
            Some(Reply::InUse { .. }) | None => Err(ClusterError::NoAnswer(owner)),
        }
    }

    /// Another size for a volume that this node serves.
    pub async fn resize_here(&self, id: VolumeId, size: u64) -> Reply {
        let Some(attached) = self.volumes().serving(id) else {
            return Reply::Failed { message: "the volume has just moved: ask again".into() };
        };
        match attached.volume.resize(size).await {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Failed { message: error.to_string() },
        }
    }

    /// Removes a volume, wherever it is served.
    ///
    /// # Errors
    /// It has clients, unless `force`; those of the register.
    pub async fn delete_volume(&self, name: &str, force: bool) -> Result<(), ClusterError> {
        let view = self.newest_view().await?;
        let id = self.find(&view, name)?;
        let pool = view.volume(id).map(|volume| volume.pool).ok_or_else(|| ClusterError::NoVolume(name.to_owned()))?;
        let in_use = |clients| ClusterError::InUse { name: name.to_owned(), clients };
        let clients = self.clients(id);
        if clients > 0 && !force {
            return Err(in_use(clients));
        }
        if let Some(owner) = self.other_owner(&view, id) {
            match self.ask_release(owner, &Release { volume: id, force }, RELEASE_FOR).await {
                Some(Reply::InUse { clients: clients @ 1.. }) => return Err(in_use(clients)),
                // It was attached there, and nobody uses it.
                Some(Reply::InUse { .. }) => {
                    self.ask_release(owner, &Release { volume: id, force: true }, RELEASE_FOR).await;
                }
                Some(_) => {}
                // What it serves ends with the register; unasked it is not done to clients that may be there.
                None if force => {}
                None => return Err(ClusterError::NoAnswer(owner)),
            }
        }
        self.volumes().delete(id, pool).await?;
        if let Some(gateway) = self.gateway.get() {
            gateway.disconnect(&export_key(id)).await;
        }
        Ok(())
    }

    /// Cuts the clients of volumes off that have a newer owner or are gone.
    pub async fn fence(self: &Arc<Self>, view: &MetaState) {
        #[cfg(feature = "canary")]
        if super::canary::keeps_replaced_owners() {
            return;
        }
        for (id, status) in self.volumes().statuses() {
            let register = view.volumes.get(&id).map(raft_meta::Volume::register);
            let newer = register.is_some_and(|register| register.generation > status.generation);
            let deleted = view.volume(id).is_none() && view.volumes.contains_key(&id);
            if !(newer || deleted || status.health.is_final()) {
                if let Some(volume) = view.volume(id) {
                    self.volumes().renamed(id, volume.name.as_str());
                }
                continue;
            }
            let Some(attached) = self.volumes().let_go(id) else { continue };
            let host = Arc::clone(self);
            tracing::info!(volume = attached.name(), generation = %status.generation, "another owner has the volume");
            attached.move_away();
            attached.volume.abandon();
            self.addresses().look();
            drop(self.env().spawn("fenced volume", async move {
                if let Some(gateway) = host.gateway.get() {
                    gateway.disconnect(&export_key(id)).await;
                }
            }));
        }
    }

    /// Hands a volume over, to whoever is next.
    pub(super) async fn give_volume_up(&self, id: VolumeId) {
        let Some(attached) = self.volumes().serving(id) else { return };
        if let Err(error) = self.volumes().detach(id).await {
            tracing::warn!(volume = attached.name(), %error, "not handed over");
        }
        let generation = attached.volume.status().generation;
        let note = Command::VolumeServed { volume: id, generation, node: None };
        let _ = self.env().timeout(NOTE_FOR, self.group().propose(note)).await;
    }

    /// Hands every volume over, before the process ends.
    pub(super) async fn give_volumes_up(&self) {
        let served: Vec<Arc<Attached>> =
            self.volumes().statuses().keys().filter_map(|&id| self.volumes().serving(id)).collect();
        self.volumes().close().await;
        let notes = served.iter().map(|attached| {
            let generation = attached.volume.status().generation;
            self.group().propose(Command::VolumeServed { volume: attached.id, generation, node: None })
        });
        // Without them the next owner asks a node that is gone, and finds it down.
        let _ = self.env().timeout(NOTE_FOR, futures::future::join_all(notes)).await;
    }
}

/// A take-over under way, one at a time of a volume; ends when it is dropped.
struct Taking<'a> {
    host: &'a Host,
    volume: VolumeId,
    turn: Option<OwnedMutexGuard<()>>,
}

impl<'a> Taking<'a> {
    async fn begin(host: &'a Host, volume: VolumeId) -> Self {
        let turn = Arc::clone(host.taking.lock().unwrap_or_else(PoisonError::into_inner).entry(volume).or_default());
        // Made first: whoever is dropped while it waits tidies up as well.
        let mut taking = Self { host, volume, turn: None };
        taking.turn = Some(turn.lock_owned().await);
        taking
    }
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        let mut taking = self.host.taking.lock().unwrap_or_else(PoisonError::into_inner);
        self.turn = None;
        // The map's own: nobody has the turn or waits for it.
        if taking.get(&self.volume).is_some_and(|turn| Arc::strong_count(turn) == 1) {
            taking.remove(&self.volume);
        }
    }
}

/// The volumes of the cluster as this node's NBD clients see them.
pub struct HostExports(pub Arc<Host>);

impl Exports for HostExports {
    fn list(&self) -> BoxFuture<'static, Vec<(String, String)>> {
        self.0.volumes().list()
    }

    fn info(&self, name: &str, transport: Transport) -> BoxFuture<'static, Option<ExportInfo>> {
        let (host, name) = (Arc::clone(&self.0), name.to_owned());
        Box::pin(async move {
            if host.view().volume_named(&name).is_none() {
                // Made elsewhere a moment ago, perhaps; without an answer it is unknown here.
                let _ = host.env().timeout(Duration::from_secs(1), host.newest_view()).await;
            }
            volume_info(&host.view(), &name, transport)
        })
    }

    fn open(&self, name: &str, transport: Transport) -> BoxFuture<'static, Result<Arc<dyn Export>, OpenError>> {
        let (host, name) = (Arc::clone(&self.0), name.to_owned());
        Box::pin(async move {
            match host.open_for_client(&name).await {
                Ok(attached) => Ok(Arc::new(VolumeExport::new(attached, transport)) as Arc<dyn Export>),
                Err(error) if error.kind() == ErrorKind::NotFound => Err(OpenError::NotFound),
                Err(error) => {
                    let elsewhere = matches!(error, ClusterError::ServedElsewhere { .. });
                    if let Some(export) = elsewhere.then(|| host.open_on_standby(&name, transport)).flatten() {
                        return Ok(export);
                    }
                    tracing::warn!(volume = name, %error, "cannot serve the volume");
                    Err(OpenError::Unavailable(error.to_string()))
                }
            }
        })
    }
}
