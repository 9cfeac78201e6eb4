//! Service addresses: where a volume is reached on the network, whichever host serves it (RFC 0007). Changes go through
//! [`crate::MetaState::apply`].

use crate::error::MetaError;
use crate::state::MetaState;
use crate::{Outcome, Served};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use xsan_types::{Generation, VolumeId};

/// Longest name of an interface, in bytes: the kernel's bound.
pub const INTERFACE_BYTES_MAX: usize = 15;
/// Clients that are remembered of a volume; a volume has one as a rule, a few with multi-conn.
pub const CLIENTS_MAX: usize = 64;

/// An address that follows a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceAddress {
    /// The address.
    pub address: IpAddr,
    /// Bits of it that name the subnet.
    pub prefix: u8,
    /// The interface it is put on, of that name on every host; `None`: the one whose subnet holds it.
    pub interface: Option<String>,
}

/// What is known of a volume's address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressRecord {
    /// The address.
    pub place: ServiceAddress,
    /// Clients that were connected to it last, as their host noted them: a successor tells them that their connection is gone. A hint.
    pub clients: Vec<SocketAddr>,
    /// The ownership under which they were noted.
    pub noted: Generation,
}

/// A change of addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressCommand {
    /// Gives a volume an address, another one, or none.
    Set {
        /// Which.
        volume: VolumeId,
        /// Its address from now on.
        place: Option<ServiceAddress>,
    },
    /// Notes who is connected. Refused if a newer generation noted, or serves.
    Clients {
        /// Which.
        volume: VolumeId,
        /// The ownership.
        generation: Generation,
        /// At most [`CLIENTS_MAX`].
        clients: Vec<SocketAddr>,
    },
}

/// A text that is no service address, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address with a prefix that a host may have, such as 10.0.0.50/24 or fd00::50/64")]
pub struct NoAddress(String);

impl FromStr for ServiceAddress {
    type Err = NoAddress;

    /// `ADDRESS/PREFIX`; no interface.
    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let wrong = || NoAddress(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address = address.parse().map_err(|_| wrong())?;
        let found = Self { address, prefix: prefix.parse().map_err(|_| wrong())?, interface: None };
        if found.is_usable() { Ok(found) } else { Err(wrong()) }
    }
}

impl fmt::Display for ServiceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl ServiceAddress {
    /// Whether a host may have it: no group, no network's own address, no broadcast.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        let fits = match self.address {
            IpAddr::V4(address) => {
                let host_bits = 32_u8.checked_sub(self.prefix).filter(|_| self.prefix > 0);
                host_bits.is_some_and(|bits| {
                    let mask = if bits >= 32 { u32::MAX } else { (1 << bits) - 1 };
                    let host = u32::from(address) & mask;
                    bits < 2 || (host != 0 && host != mask)
                }) && !address.is_broadcast()
                    && address.octets()[0] != 0
            }
            IpAddr::V6(address) => {
                // Link-local addresses say nothing without an interface, on clients too.
                (1..=128).contains(&self.prefix)
                    && !address.is_unicast_link_local()
                    && address.to_ipv4_mapped().is_none()
            }
        };
        let named = self.interface.as_ref().is_none_or(|name| {
            let good = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
            !name.is_empty() && name.len() <= INTERFACE_BYTES_MAX && name.bytes().all(good)
        });
        fits && named && !self.address.is_unspecified() && !self.address.is_multicast()
    }

    /// Whether `other` lies in the same subnet, by this prefix.
    #[must_use]
    pub fn is_near(&self, other: IpAddr) -> bool {
        match (self.address, other) {
            (IpAddr::V4(one), IpAddr::V4(other)) => {
                (u32::from(one) ^ u32::from(other)).leading_zeros() >= u32::from(self.prefix)
            }
            (IpAddr::V6(one), IpAddr::V6(other)) => {
                (u128::from(one) ^ u128::from(other)).leading_zeros() >= u32::from(self.prefix)
            }
            _ => false,
        }
    }
}

impl MetaState {
    /// Applies a command that is about addresses.
    ///
    /// # Errors
    /// Why it was refused; the state is unchanged then.
    pub(crate) fn apply_address(&mut self, command: &AddressCommand) -> Result<Outcome, MetaError> {
        match command {
            AddressCommand::Set { volume, place } => self.set_address(*volume, place.as_ref()),
            AddressCommand::Clients { volume, generation, clients } => self.note_clients(*volume, *generation, clients),
        }
    }

    fn set_address(&mut self, volume: VolumeId, place: Option<&ServiceAddress>) -> Result<Outcome, MetaError> {
        if self.volume(volume).is_none() {
            return Err(MetaError::NoVolume(volume));
        }
        let Some(place) = place else {
            self.addresses.remove(&volume);
            return Ok(Outcome::Done);
        };
        if !place.is_usable() {
            return Err(MetaError::AddressUnusable);
        }
        let mut others = self.addresses.iter().filter(|(other, _)| **other != volume);
        if let Some((other, _)) = others.find(|(_, record)| record.place.address == place.address) {
            return Err(MetaError::AddressTaken(*other));
        }
        match self.addresses.get_mut(&volume) {
            // Clients stay where they are.
            Some(known) if known.place.address == place.address => known.place = place.clone(),
            _ => {
                let (clients, noted) = (Vec::new(), Generation::default());
                self.addresses.insert(volume, AddressRecord { place: place.clone(), clients, noted });
            }
        }
        Ok(Outcome::Done)
    }

    fn note_clients(
        &mut self,
        volume: VolumeId,
        generation: Generation,
        clients: &[SocketAddr],
    ) -> Result<Outcome, MetaError> {
        if clients.len() > CLIENTS_MAX {
            return Err(MetaError::TextTooLong);
        }
        let served = self.hosts.served.get(&volume).map(|Served { generation, .. }| *generation);
        let record = self.addresses.get_mut(&volume).ok_or(MetaError::NoVolume(volume))?;
        if record.noted > generation || served.is_some_and(|served| served > generation) {
            return Err(MetaError::Outdated);
        }
        record.noted = generation;
        record.clients = clients.to_vec();
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_host_may_have_is_an_address() {
        for good in ["10.0.0.50/24", "10.0.0.0/31", "10.0.0.50/32", "127.0.0.9/8", "fd00::50/64", "2001:db8::1/128"] {
            assert_eq!(good.parse::<ServiceAddress>().expect(good).to_string(), good);
        }
        let bad = [
            "10.0.0.50",
            "10.0.0.0/24",
            "10.0.0.255/24",
            "10.0.0.1/0",
            "10.0.0.1/33",
            "0.0.0.0/8",
            "224.0.0.1/24",
            "255.255.255.255/32",
            "::/64",
            "ff02::1/64",
            "fe80::1/64",
            "fd00::1/129",
            "::ffff:10.0.0.1/120",
            "x/24",
            "",
        ];
        for bad in bad {
            assert!(bad.parse::<ServiceAddress>().is_err(), "{bad}");
        }
        let mut named: ServiceAddress = "10.0.0.50/24".parse().expect("good");
        for (name, good) in [("eth0", true), ("", false), ("a/b", false), ("sixteen-letters-", false)] {
            named.interface = Some(name.to_owned());
            assert_eq!(named.is_usable(), good, "{name}");
        }
    }

    #[test]
    fn a_subnet_is_what_its_prefix_says() {
        let place: ServiceAddress = "10.0.1.50/23".parse().expect("good");
        assert!(place.is_near("10.0.0.1".parse().expect("an address")));
        assert!(!place.is_near("10.0.2.1".parse().expect("an address")));
        assert!(!place.is_near("fd00::1".parse().expect("an address")));
    }
}
