//! What the metadata knows of hosts as members of the cluster (RFC 0005): where they listen, what lets new ones in, and who
//! serves which volume. Changes go through [`crate::MetaState::apply`].

use crate::error::MetaError;
use crate::name::Name;
use crate::state::{MetaState, Node, NodeState};
use crate::{Command, Outcome};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use xsan_types::{Generation, NodeId, VolumeId};

/// Longest address, reason or other text of a host, in bytes.
pub const TEXT_BYTES_MAX: usize = 255;
/// Longest public key.
const KEY_BYTES_MAX: usize = 256;
/// Longest certificate or key of the authority, in bytes.
const PEM_BYTES_MAX: usize = 16 << 10;
/// Most tokens at a time; expired ones go first.
const TOKENS_MAX: usize = 256;

/// All of it. Nodes of a cluster in one process have no record here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hosts {
    /// Of nodes that are not removed.
    pub nodes: BTreeMap<NodeId, HostRecord>,
    /// What signs nodes into the cluster.
    pub authority: Option<Authority>,
    /// Join tokens by number.
    pub tokens: BTreeMap<u64, TokenRecord>,
    /// Who took a volume over last. Fences nothing (the register does), and may be late.
    pub served: BTreeMap<VolumeId, Served>,
}

/// A node as a process on a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Where other nodes reach it, `host:port`.
    pub address: String,
    /// The public half of its key.
    pub public_key: Vec<u8>,
    /// Its replica of the metadata.
    pub replica: u64,
    /// Since when it is in its state, milliseconds since 1970.
    pub since_millis: u64,
    /// Why it is in its state, for people.
    pub reason: String,
}

/// The cluster's certificate authority.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    /// PEM of its certificate; public.
    pub certificate: String,
    /// PEM of its private key; a secret.
    #[serde(serialize_with = "unless_shown")]
    pub key: String,
}

/// A secret goes into the log and not into what people are shown.
fn unless_shown<S: serde::Serializer>(secret: &str, serializer: S) -> Result<S::Ok, S::Error> {
    let shown = if serializer.is_human_readable() { "(secret)" } else { secret };
    serializer.serialize_str(shown)
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

/// What is kept of a join token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// SHA-256 of its secret.
    pub secret_hash: [u8; 32],
    /// When it ends, milliseconds since 1970.
    pub expires_millis: u64,
    /// Nodes it still lets in.
    pub uses_left: u32,
}

/// Who serves a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// The node.
    pub node: NodeId,
    /// Its ownership.
    pub generation: Generation,
}

/// A token as a joiner shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownToken {
    /// Its number.
    pub number: u64,
    /// SHA-256 of the secret that was shown.
    pub secret_hash: [u8; 32],
}

/// A node that wants in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidacy {
    /// What lets it in; `None`: the founder of the cluster lets itself in.
    pub token: Option<ShownToken>,
    /// The wall clock of the node that was asked, milliseconds since 1970.
    pub now_millis: u64,
    /// Its name.
    pub name: Name,
    /// Its machine.
    pub host: Name,
    /// The machine's rack.
    pub rack: Option<Name>,
    /// The rack's zone.
    pub zone: Option<Name>,
    /// Where other nodes reach it.
    pub address: String,
    /// The public half of its key.
    pub public_key: Vec<u8>,
    /// Its replica of the metadata.
    pub replica: u64,
    /// It takes name and devices of the node of that name over, which is down.
    pub replaces: bool,
}

fn bounded(text: &str) -> Result<(), MetaError> {
    if text.len() > TEXT_BYTES_MAX { Err(MetaError::TextTooLong) } else { Ok(()) }
}

impl MetaState {
    /// Applies a command that is about hosts.
    ///
    /// # Errors
    /// Why it was refused; the state is unchanged then.
    pub(crate) fn apply_host(&mut self, command: &Command) -> Result<Outcome, MetaError> {
        match command {
            Command::SetAuthority(authority) => self.set_authority(authority),
            Command::AddToken { number, token, now_millis } => self.add_token(*number, token, *now_millis),
            Command::RevokeToken { number } => {
                self.hosts.tokens.remove(number).map(|_| Outcome::Done).ok_or(MetaError::TokenUnknown)
            }
            Command::AdmitNode(candidacy) => self.admit(candidacy),
            Command::SetNodeAddress { node, address } => {
                bounded(address)?;
                let record = self.hosts.nodes.get_mut(node).ok_or(MetaError::NoNode(*node))?;
                address.clone_into(&mut record.address);
                Ok(Outcome::Done)
            }
            Command::RenameNode { node, name } => self.rename_node(*node, name),
            Command::ReportNode { node, from, to, now_millis, reason, .. } => {
                bounded(reason)?;
                if self.node(*node).ok_or(MetaError::NoNode(*node))?.state != *from {
                    // Somebody else was faster: what was seen is out of date.
                    return Err(MetaError::Outdated);
                }
                self.set_node_state(*node, *to)?;
                if let Some(record) = self.hosts.nodes.get_mut(node) {
                    record.since_millis = *now_millis;
                    reason.clone_into(&mut record.reason);
                }
                Ok(Outcome::Done)
            }
            Command::VolumeServed { volume, generation, node } => self.volume_served(*volume, *generation, *node),
            _ => unreachable!("not about hosts"),
        }
    }

    fn set_authority(&mut self, authority: &Authority) -> Result<Outcome, MetaError> {
        if authority.certificate.len() > PEM_BYTES_MAX || authority.key.len() > PEM_BYTES_MAX {
            return Err(MetaError::TextTooLong);
        }
        match &self.hosts.authority {
            // Certificates of nodes hang on it: it never changes.
            Some(known) if known != authority => Err(MetaError::AuthorityKnown),
            _ => {
                self.hosts.authority = Some(authority.clone());
                Ok(Outcome::Done)
            }
        }
    }

    fn add_token(&mut self, number: u64, token: &TokenRecord, now_millis: u64) -> Result<Outcome, MetaError> {
        match self.hosts.tokens.get(&number) {
            // A repeat.
            Some(known) if known.secret_hash == token.secret_hash => return Ok(Outcome::Done),
            Some(_) => return Err(MetaError::TokenKnown),
            None => {}
        }
        self.hosts.tokens.retain(|_, known| known.expires_millis > now_millis && known.uses_left > 0);
        if self.hosts.tokens.len() >= TOKENS_MAX {
            return Err(MetaError::TooManyTokens);
        }
        self.hosts.tokens.insert(number, token.clone());
        Ok(Outcome::Done)
    }

    fn admit(&mut self, candidacy: &Candidacy) -> Result<Outcome, MetaError> {
        self.check_candidacy(candidacy)?;
        if let Some(id) = self.admitted_before(candidacy) {
            if let Some(record) = self.hosts.nodes.get_mut(&id) {
                candidacy.address.clone_into(&mut record.address);
                record.replica = candidacy.replica;
            }
            return Ok(Outcome::Node(id));
        }
        let id = match self.node_named(candidacy.name.as_str()).cloned() {
            Some(old) if candidacy.replaces => self.replace_node(&old, candidacy)?,
            _ => {
                let Candidacy { name, host, rack, zone, .. } = candidacy;
                self.add_node(name, host, rack, zone)?
            }
        };
        if let Some(record) = candidacy.token.and_then(|token| self.hosts.tokens.get_mut(&token.number)) {
            record.uses_left -= 1;
        }
        let record = HostRecord {
            address: candidacy.address.clone(),
            public_key: candidacy.public_key.clone(),
            replica: candidacy.replica,
            since_millis: candidacy.now_millis,
            reason: "it joined".into(),
        };
        self.hosts.nodes.insert(id, record);
        Ok(Outcome::Node(id))
    }

    /// Whether a host shows what lets it in. Its name and place are looked at when it is admitted; nothing changes here.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn check_candidacy(&self, candidacy: &Candidacy) -> Result<(), MetaError> {
        bounded(&candidacy.address)?;
        if candidacy.public_key.len() > KEY_BYTES_MAX {
            return Err(MetaError::TextTooLong);
        }
        let Some(id) = self.admitted_before(candidacy) else { return self.check_token(candidacy) };
        // Everybody may know a name and a public key.
        self.shown_token(candidacy)?;
        let is_joining = self.node(id).is_some_and(|node| node.state == NodeState::Joining);
        let is_same = self
            .hosts
            .nodes
            .get(&id)
            .is_some_and(|record| record.address == candidacy.address && record.replica == candidacy.replica);
        // Once it was up, it tells itself where it is, and others count on its replica.
        if is_joining || is_same { Ok(()) } else { Err(MetaError::NameTaken) }
    }

    /// The node that an earlier copy of the same request made: its answer was lost.
    fn admitted_before(&self, candidacy: &Candidacy) -> Option<NodeId> {
        let known = self.node_named(candidacy.name.as_str())?;
        let record = self.hosts.nodes.get(&known.id)?;
        (record.public_key == candidacy.public_key).then_some(known.id)
    }

    /// What is kept of the token that was shown, be it still good or not; `None`: the founder shows none.
    fn shown_token(&self, candidacy: &Candidacy) -> Result<Option<&TokenRecord>, MetaError> {
        let Some(shown) = candidacy.token else { return Ok(None) };
        let known = self.hosts.tokens.get(&shown.number).filter(|known| known.secret_hash == shown.secret_hash);
        known.map(Some).ok_or(MetaError::TokenUnknown)
    }

    fn check_token(&self, candidacy: &Candidacy) -> Result<(), MetaError> {
        let Some(known) = self.shown_token(candidacy)? else { return Ok(()) };
        if known.expires_millis <= candidacy.now_millis {
            return Err(MetaError::TokenExpired);
        }
        if known.uses_left == 0 {
            return Err(MetaError::TokenUsedUp);
        }
        Ok(())
    }

    /// The new node has the old one's place in the tree, its name and its devices; the old one's id is not let in again.
    fn replace_node(&mut self, old: &Node, candidacy: &Candidacy) -> Result<NodeId, MetaError> {
        if old.state != NodeState::Down {
            return Err(MetaError::NotDown(old.id));
        }
        // Elsewhere in the tree, two positions of a group could share a failure domain.
        if (&old.host, &old.rack, &old.zone) != (&candidacy.host, &candidacy.rack, &candidacy.zone) {
            return Err(MetaError::HostElsewhere(old.id));
        }
        let id = self.next_node;
        self.next_node = NodeId(id.0.checked_add(1).ok_or(MetaError::IdsExhausted)?);
        if let Some(node) = self.nodes.get_mut(&old.id) {
            node.state = NodeState::Removed;
        }
        self.hosts.nodes.remove(&old.id);
        self.nodes.insert(id, Node { id, state: NodeState::Joining, ..old.clone() });
        for device in self.devices.values_mut().filter(|device| device.node == old.id) {
            device.node = id;
        }
        self.bump_epoch();
        Ok(id)
    }

    fn rename_node(&mut self, id: NodeId, name: &Name) -> Result<Outcome, MetaError> {
        if self.node_named(name.as_str()).is_some_and(|node| node.id != id) {
            return Err(MetaError::NameTaken);
        }
        let node = self.nodes.get_mut(&id).filter(|node| node.state != NodeState::Removed);
        name.clone_into(&mut node.ok_or(MetaError::NoNode(id))?.name);
        Ok(Outcome::Done)
    }

    fn volume_served(
        &mut self,
        volume: VolumeId,
        generation: Generation,
        node: Option<NodeId>,
    ) -> Result<Outcome, MetaError> {
        if self.volume(volume).is_none() {
            return Err(MetaError::NoVolume(volume));
        }
        if self.hosts.served.get(&volume).is_some_and(|served| served.generation > generation) {
            return Err(MetaError::Outdated);
        }
        match node {
            Some(node) => self.hosts.served.insert(volume, Served { node, generation }),
            None => self.hosts.served.remove(&volume),
        };
        Ok(Outcome::Done)
    }
}
