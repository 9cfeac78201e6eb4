//! Addresses of this host's interfaces: looked at, put on for a time, taken off, and announced to the neighbours (RFC 0007).
//!
//! The kernel's own interface, without a program or a library between: three netlink messages (rtnetlink(7)) and three frames (ARP,
//! RFC 826 and 5227; neighbour advertisement, RFC 4861; TCP). Changing anything needs CAP_NET_ADMIN, frames CAP_NET_RAW. All calls
//! are short; only [`who_has`] waits, and belongs on a thread that may.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address; `None`: it has none (loopback, tunnels), and no neighbours to be told anything.
    pub hardware: Option<[u8; 6]>,
    /// It is up and has a carrier.
    pub is_up: bool,
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assigned {
    /// The interface's number.
    pub interface: u32,
    /// The address.
    pub address: IpAddr,
    /// Bits of it that name the subnet.
    pub prefix: u8,
    /// When the kernel will take it off by itself, in whole seconds from now; `None`: never.
    pub valid_for: Option<Duration>,
}

const HEADER_BYTES: usize = 16;
/// The kernel's dumps come in pieces of at most 32 KiB.
const ANSWER_BYTES: usize = 64 << 10;
/// The kernel answers at once; this bounds what a bug would cost.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
const FOR_EVER: u32 = u32::MAX;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const TO_ALL: [u8; 6] = [0xff; 6];

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<File> {
    // SAFETY: no pointers are passed.
    let descriptor = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, open, and nobody else's.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(descriptor) }))
}

fn give_up_reading_after(socket: &File, patience: Duration) -> io::Result<()> {
    let seconds = libc::time_t::try_from(patience.as_secs()).unwrap_or(libc::time_t::MAX);
    // Zero would mean for ever.
    let micros = libc::suseconds_t::from(i32::try_from(patience.subsec_micros()).unwrap_or(0).max(1));
    let time = libc::timeval { tv_sec: seconds, tv_usec: micros };
    let length = libc::socklen_t::try_from(size_of_val(&time)).expect("a few bytes");
    // SAFETY: the option's value is a timeval of that length, alive during the call; the descriptor is open.
    let result = unsafe {
        let value = (&raw const time).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVTIMEO, value, length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A request to the kernel.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: libc::c_int, fixed: &[u8]) -> Self {
        let flags = u16::try_from(flags | libc::NLM_F_REQUEST).expect("sixteen bits of flags");
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(fixed);
        Self(bytes)
    }

    fn with(mut self, attribute: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).expect("a short attribute");
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&attribute.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Sends it; every answer of one of `kinds` goes to `each` with what follows its header. Ends with the kernel's verdict.
    fn ask(mut self, kind: u16, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let length = u32::try_from(self.0.len()).expect("a short message");
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        let mut socket = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
        give_up_reading_after(&socket, ANSWER_WITHIN)?;
        // Sent to the kernel, which is where an unconnected netlink socket sends to.
        socket.write_all(&self.0)?;
        let mut answer = vec![0; ANSWER_BYTES];
        loop {
            let count = socket.read(&mut answer)?;
            let mut rest = &answer[..count];
            while let Some((found, body, next)) = split_message(rest) {
                match libc::c_int::from(found) {
                    libc::NLMSG_ERROR => return verdict(body),
                    libc::NLMSG_DONE => return Ok(()),
                    _ if found == kind => each(body),
                    _ => {}
                }
                rest = next;
            }
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

fn verdict(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Kind and body of the first message, and what follows it.
fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(HEADER_BYTES..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The attributes behind the `fixed` first bytes of a body.
fn attributes(body: &[u8], fixed: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = body.get(fixed..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        // The upper bits are flags.
        Some((kind & 0x3fff, value))
    })
}

/// The interfaces of this host.
///
/// # Errors
/// The kernel's.
pub fn interfaces() -> io::Result<Vec<Interface>> {
    const FIXED: usize = 16;
    let mut found = Vec::new();
    Message::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &[0; FIXED]).ask(libc::RTM_NEWLINK, |body| {
        found.extend(interface(body));
    })?;
    Ok(found)
}

fn interface(body: &[u8]) -> Option<Interface> {
    let kind = u16::from_ne_bytes(*body.get(2..)?.first_chunk()?);
    let index = u32::from_ne_bytes(*body.get(4..)?.first_chunk()?);
    let flags = u32::from_ne_bytes(*body.get(8..)?.first_chunk()?);
    let wanted = (libc::IFF_UP | libc::IFF_RUNNING).cast_unsigned();
    let (mut name, mut hardware) = (None, None);
    for (attribute, value) in attributes(body, 16) {
        match attribute {
            libc::IFLA_IFNAME => {
                name = std::str::from_utf8(value).ok().map(|name| name.trim_end_matches('\0').to_owned())
            }
            libc::IFLA_ADDRESS if kind == libc::ARPHRD_ETHER => hardware = value.try_into().ok(),
            _ => {}
        }
    }
    Some(Interface { index, name: name?, hardware, is_up: flags & wanted == wanted })
}

/// The addresses of this host.
///
/// # Errors
/// The kernel's.
pub fn assigned() -> io::Result<Vec<Assigned>> {
    let mut found = Vec::new();
    Message::new(libc::RTM_GETADDR, libc::NLM_F_DUMP, &[0; 8]).ask(libc::RTM_NEWADDR, |body| {
        found.extend(assigned_one(body));
    })?;
    Ok(found)
}

fn assigned_one(body: &[u8]) -> Option<Assigned> {
    let prefix = *body.get(1)?;
    let interface = u32::from_ne_bytes(*body.get(4..)?.first_chunk()?);
    let (mut local, mut address, mut valid_for) = (None, None, None);
    for (attribute, value) in attributes(body, 8) {
        match attribute {
            libc::IFA_LOCAL => local = ip(value),
            libc::IFA_ADDRESS => address = ip(value),
            libc::IFA_CACHEINFO => {
                let valid = value.get(4..)?.first_chunk().map(|valid| u32::from_ne_bytes(*valid));
                let ends = valid.filter(|valid| *valid != FOR_EVER);
                valid_for = ends.map(|seconds| Duration::from_secs(seconds.into()));
            }
            _ => {}
        }
    }
    // Of a tunnel the second one is the peer's.
    Some(Assigned { interface, address: local.or(address)?, prefix, valid_for })
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => bytes.first_chunk::<4>().map(|bytes| Ipv4Addr::from(*bytes).into()),
        _ => bytes.first_chunk::<16>().map(|bytes| Ipv6Addr::from(*bytes).into()),
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

fn change(kind: u16, flags: libc::c_int, interface: u32, address: IpAddr, prefix: u8) -> Message {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut fixed = vec![u8::try_from(family).expect("a small number"), prefix, 0, 0];
    fixed.extend_from_slice(&interface.to_ne_bytes());
    let bytes = octets(address);
    Message::new(kind, flags | libc::NLM_F_ACK, &fixed).with(libc::IFA_LOCAL, &bytes).with(libc::IFA_ADDRESS, &bytes)
}

/// Puts an address on an interface for `valid_for` (whole seconds), or makes it last that long from now on. It is not chosen as the
/// source of connections that this host makes. `routed`: other hosts of its subnet are reached through it; else through
/// an address that is there already.
///
/// # Errors
/// The kernel's: `PermissionDenied` without CAP_NET_ADMIN.
pub fn put(interface: u32, address: IpAddr, prefix: u8, valid_for: Duration, routed: bool) -> io::Result<()> {
    let valid = u32::try_from(valid_for.as_secs()).unwrap_or(FOR_EVER).max(1);
    let mut lifetime = [0; 16];
    // The first four are how long it is preferred: not at all.
    lifetime[4..8].copy_from_slice(&valid.to_ne_bytes());
    let route = if routed { 0 } else { libc::IFA_F_NOPREFIXROUTE };
    // Whoever else may have it, it was decided that it is ours.
    let flags: u32 = libc::IFA_F_NODAD | route;
    change(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, interface, address, prefix)
        .with(libc::IFA_CACHEINFO, &lifetime)
        .with(libc::IFA_FLAGS, &flags.to_ne_bytes())
        .ask(0, |_| {})
}

/// Takes an address off an interface; nothing happens if it is not there.
///
/// # Errors
/// The kernel's.
pub fn remove(interface: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
    match change(libc::RTM_DELADDR, 0, interface, address, prefix).ask(0, |_| {}) {
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
        result => result,
    }
}

/// A socket for whole frames of one interface.
fn frames(interface: u32, ethertype: u16) -> io::Result<File> {
    let protocol = ethertype.to_be();
    let socket = socket(libc::AF_PACKET, libc::SOCK_RAW, libc::c_int::from(protocol))?;
    // SAFETY: all bit patterns of this plain C struct are valid, zeroes too.
    let mut place: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    place.sll_family = u16::try_from(libc::AF_PACKET).expect("a small number");
    place.sll_protocol = protocol;
    place.sll_ifindex = i32::try_from(interface).map_err(|_| io::ErrorKind::InvalidInput)?;
    let length = libc::socklen_t::try_from(size_of_val(&place)).expect("a few bytes");
    // SAFETY: the address is a sockaddr_ll of that length, alive during the call; the descriptor is open.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const place).cast(), length) };
    if result == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}

fn frame(to: [u8; 6], from: [u8; 6], ethertype: u16, body: &[u8]) -> Vec<u8> {
    [&to[..], &from, &ethertype.to_be_bytes(), body].concat()
}

/// An ARP request: `sender` asks for `target`.
fn arp_request(hardware: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    // Ethernet, IPv4, their lengths, request.
    let kind = [0, 1, 8, 0, 6, 4, 0, 1];
    frame(
        TO_ALL,
        hardware,
        ETHERTYPE_ARP,
        &[&kind[..], &hardware, &sender.octets(), &[0; 6], &target.octets()].concat(),
    )
}

/// Tells all neighbours that the address is at this interface now: a gratuitous ARP, or an unsolicited neighbour advertisement.
/// Nothing is sent where there are no neighbours.
///
/// # Errors
/// The kernel's: `PermissionDenied` without CAP_NET_RAW.
pub fn announce(interface: &Interface, address: IpAddr) -> io::Result<()> {
    let Some(hardware) = interface.hardware else { return Ok(()) };
    let (ethertype, bytes) = match address {
        IpAddr::V4(address) => (ETHERTYPE_ARP, arp_request(hardware, address, address)),
        IpAddr::V6(address) => (ETHERTYPE_IPV6, advertisement(hardware, address)),
    };
    frames(interface.index, ethertype)?.write_all(&bytes)
}

fn advertisement(hardware: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    let everybody = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // Type, code, checksum; "override what you know".
    let mut icmp = [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &address.octets(), &[2, 1], &hardware].concat();
    let sum = checksum(address.into(), everybody.into(), 58, &icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let length = u16::try_from(icmp.len()).expect("a short message").to_be_bytes();
    // Version 6; next header ICMPv6; hop limit 255: from this link.
    let header = [&[0x60, 0, 0, 0][..], &length, &[58, 255], &address.octets(), &everybody.octets()].concat();
    frame([0x33, 0x33, 0, 0, 0, 1], hardware, ETHERTYPE_IPV6, &[header, icmp].concat())
}

/// The internet checksum over a message and its pseudo header.
fn checksum(from: IpAddr, to: IpAddr, protocol: u8, message: &[u8]) -> u16 {
    let length = u32::try_from(message.len()).expect("a short message").to_be_bytes();
    let bytes = [&octets(from)[..], &octets(to), &length, &[0, 0, 0, protocol], message].concat();
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

/// Asks the neighbours who has `address` (IPv4); the hardware address of who answers within `patience`. The question names no
/// sender (RFC 5227): nobody learns anything from it.
///
/// # Errors
/// The kernel's: `PermissionDenied` without CAP_NET_RAW.
pub fn who_has(interface: &Interface, address: Ipv4Addr, patience: Duration) -> io::Result<Option<[u8; 6]>> {
    let Some(hardware) = interface.hardware else { return Ok(None) };
    let mut socket = frames(interface.index, ETHERTYPE_ARP)?;
    let until = Instant::now() + patience;
    let question = arp_request(hardware, Ipv4Addr::UNSPECIFIED, address);
    let mut answer = [0; 128];
    for round in 1..=3_u32 {
        socket.write_all(&question)?;
        let end = until - patience * (3 - round) / 3;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            give_up_reading_after(&socket, left)?;
            match socket.read(&mut answer) {
                Ok(count) => {
                    if let Some(who) = arp_sender(&answer[..count], address).filter(|who| *who != hardware) {
                        return Ok(Some(who));
                    }
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(None)
}

/// Whoever says in this frame that it has the address.
fn arp_sender(bytes: &[u8], address: Ipv4Addr) -> Option<[u8; 6]> {
    let arp = bytes.get(14..)?;
    let is_it = arp.get(..6)? == [0, 1, 8, 0, 6, 4] && arp.get(14..18)? == address.octets();
    is_it.then(|| arp.get(8..14)?.try_into().ok()).flatten()
}

/// Makes `client` find out that a connection it has with `own`, an address that this host has taken over, is not known here: a
/// segment that fits no connection is answered by its end, and the answer to that is a reset. A connection that is known here, or
/// not there, stays as it is.
///
/// # Errors
/// The kernel's: `PermissionDenied` without CAP_NET_RAW.
pub fn disown(own: SocketAddr, client: SocketAddr) -> io::Result<()> {
    // Ports, sequence, acknowledgement; five words of header, ACK, a window.
    let mut segment =
        [&own.port().to_be_bytes()[..], &client.port().to_be_bytes(), &[0; 8], &[0x50, 0x10, 4, 0, 0, 0, 0, 0]]
            .concat();
    let sum = checksum(own.ip(), client.ip(), 6, &segment);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    let length = u16::try_from(segment.len()).expect("a short segment");
    let (family, header) = match (own.ip(), client.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let start = [0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0];
            let mut header = [&start[..], &from.octets(), &to.octets()].concat();
            // In network order; the checksum is the kernel's work.
            header[2..4].copy_from_slice(&(length + 20).to_be_bytes());
            (libc::AF_INET, header)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let start = [&[0x60, 0, 0, 0][..], &length.to_be_bytes(), &[6, 64]].concat();
            (libc::AF_INET6, [&start[..], &from.octets(), &to.octets()].concat())
        }
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let mut socket = socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    connect(&socket, client.ip())?;
    socket.write_all(&[header, segment].concat())
}

/// Names where a raw socket sends to.
fn connect(socket: &File, to: IpAddr) -> io::Result<()> {
    let result = match to {
        IpAddr::V4(to) => {
            // SAFETY: all bit patterns of this plain C struct are valid, zeroes too.
            let mut place: libc::sockaddr_in = unsafe { std::mem::zeroed() };
            place.sin_family = u16::try_from(libc::AF_INET).expect("a small number");
            place.sin_addr.s_addr = u32::from_ne_bytes(to.octets());
            let length = libc::socklen_t::try_from(size_of_val(&place)).expect("a few bytes");
            // SAFETY: the address is a sockaddr_in of that length, alive during the call; the descriptor is open.
            unsafe { libc::connect(socket.as_raw_fd(), (&raw const place).cast(), length) }
        }
        IpAddr::V6(to) => {
            // SAFETY: all bit patterns of this plain C struct are valid, zeroes too.
            let mut place: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
            place.sin6_family = u16::try_from(libc::AF_INET6).expect("a small number");
            place.sin6_addr.s6_addr = to.octets();
            let length = libc::socklen_t::try_from(size_of_val(&place)).expect("a few bytes");
            // SAFETY: the address is a sockaddr_in6 of that length, alive during the call; the descriptor is open.
            unsafe { libc::connect(socket.as_raw_fd(), (&raw const place).cast(), length) }
        }
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_hosts_interfaces_and_addresses_are_found() {
        let interfaces = interfaces().expect("interfaces");
        let lo = interfaces.iter().find(|interface| interface.name == "lo").expect("a loopback");
        assert_eq!(lo.hardware, None);
        let assigned = assigned().expect("addresses");
        let own = Assigned { interface: lo.index, address: Ipv4Addr::LOCALHOST.into(), prefix: 8, valid_for: None };
        assert!(!lo.is_up || assigned.contains(&own), "{assigned:?}");
    }

    #[test]
    fn frames_are_what_the_standards_say() {
        let (hardware, address) = ([2, 0, 0, 0, 0, 1], Ipv4Addr::new(10, 0, 0, 50));
        let arp = arp_request(hardware, address, address);
        assert_eq!(arp.len(), 42);
        assert_eq!(arp_sender(&arp, address), Some(hardware));
        assert_eq!(arp_sender(&arp, Ipv4Addr::new(10, 0, 0, 51)), None);
        assert_eq!(arp_sender(&arp[..30], address), None);
        let six = advertisement(hardware, "fd00::50".parse().expect("an address"));
        assert_eq!((six.len(), six[54], six[21]), (14 + 40 + 32, 136, 255));
        // A message with its checksum in place sums up to nothing.
        let (from, to) = ("fd00::50".parse().expect("an address"), "ff02::1".parse().expect("an address"));
        assert_eq!(checksum(from, to, 58, &six[54..]), 0);
    }

    #[test]
    fn answers_of_any_shape_are_read_without_harm() {
        let mut seed = 1_u32;
        for length in 0..200 {
            let bytes: Vec<u8> = (0..length)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    seed.to_be_bytes()[0] >> (seed % 5)
                })
                .collect();
            let _ = (split_message(&bytes), interface(&bytes), assigned_one(&bytes));
            let _ = arp_sender(&bytes, Ipv4Addr::LOCALHOST);
        }
    }
}
