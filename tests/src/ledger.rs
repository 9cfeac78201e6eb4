//! Remembers what was written, acknowledged and flushed, and judges what is read.
//!
//! Every sector carries the number of the write that made it (its stamp) in bytes that depend on stamp and place, so a
//! misplaced, torn or foreign sector is told from a right one. A sector may hold the value of a write unless a later one,
//! begun after the first was acknowledged, is acknowledged as well: that is a register's rule, for any number of writes at once.

use crate::random::mix;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// A write as one sector sees it. Times are numbers of the ledger's own clock.
#[derive(Clone, Copy, Debug)]
struct Version {
    /// 0: zeroes.
    stamp: u64,
    begun: u64,
    acknowledged: Option<u64>,
}

/// What is known of the first `sectors` of a volume.
pub struct Ledger {
    sectors: Vec<Vec<Version>>,
    clock: u64,
    /// What was acknowledged before this is on stable media.
    flushed: u64,
}

/// A write under way.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    /// Its stamp.
    pub stamp: u64,
    offset: u64,
    length: u64,
    begun: u64,
}

/// A sector that holds what it must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Byte offset.
    pub offset: u64,
    /// What is wrong, for people.
    pub what: String,
}

impl Ledger {
    /// A fresh volume: zeroes in `bytes`.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let zero = Version { stamp: 0, begun: 0, acknowledged: Some(0) };
        Self { sectors: vec![vec![zero]; (bytes / SECTOR) as usize], clock: 0, flushed: 0 }
    }

    /// Bytes it knows of.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.sectors.len() as u64 * SECTOR
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write begins; `zeroes`: it writes zeroes.
    pub fn begin(&mut self, offset: u64, length: u64, zeroes: bool) -> Ticket {
        let begun = self.tick();
        let stamp = if zeroes { 0 } else { begun };
        for sector in &mut self.sectors[range(offset, length)] {
            sector.push(Version { stamp, begun, acknowledged: None });
        }
        Ticket { stamp, offset, length, begun }
    }

    /// A write is acknowledged.
    pub fn acknowledge(&mut self, ticket: Ticket) {
        let now = self.tick();
        for sector in &mut self.sectors[range(ticket.offset, ticket.length)] {
            sector.retain(|version| version.acknowledged.is_none_or(|at| at > ticket.begun));
            if let Some(version) = sector.iter_mut().find(|version| version.begun == ticket.begun) {
                version.acknowledged = Some(now);
            }
        }
    }

    /// A flush begins; pass the number to [`Ledger::flushed`].
    pub fn flushing(&mut self) -> u64 {
        self.tick()
    }

    /// The flush that began then is done.
    pub fn flushed(&mut self, begun: u64) {
        self.flushed = self.flushed.max(begun);
    }

    /// A number that grows with every write begun in the range; `None` while one is under way.
    #[must_use]
    pub fn version(&self, offset: u64, length: u64) -> Option<u64> {
        let versions = || self.sectors[range(offset, length)].iter().flatten();
        let settled = versions().all(|version| version.acknowledged.is_some());
        settled.then(|| versions().map(|version| version.begun).max().unwrap_or(0))
    }

    /// Judges bytes read at `offset` while no write was under way (the process of the writers may have been killed), and
    /// settles on them: what was read once must stay.
    ///
    /// # Errors
    /// The first wrong sector.
    pub fn check(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Wrong> {
        let now = self.tick();
        let first = (offset / SECTOR) as usize;
        for (index, found) in bytes.chunks(SECTOR as usize).enumerate() {
            let offset = (first + index) as u64 * SECTOR;
            let versions = &mut self.sectors[first + index];
            let wrong = |what| Err(Wrong { offset, what });
            let Some(stamp) = stamp_of(offset, found) else {
                return wrong(format!("garbage {:02x?}, one of {versions:?} was written", &found[..16]));
            };
            if !versions.iter().any(|version| version.stamp == stamp) {
                let durable = versions.iter().any(|version| version.acknowledged.is_some_and(|at| at < self.flushed));
                let lost = if durable { "flushed" } else { "acknowledged" };
                return wrong(format!(
                    "write {stamp} is found; {lost} is {versions:?} (flushed up to {})",
                    self.flushed
                ));
            }
            *versions = vec![Version { stamp, begun: now, acknowledged: Some(now) }];
        }
        Ok(())
    }
}

fn range(offset: u64, length: u64) -> std::ops::Range<usize> {
    (offset / SECTOR) as usize..((offset + length) / SECTOR) as usize
}

/// The bytes a write of `length` puts at `offset`.
#[must_use]
pub fn content(offset: u64, length: u64, stamp: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length as usize);
    for sector in 0..length / SECTOR {
        put_sector(&mut bytes, offset + sector * SECTOR, stamp);
    }
    bytes
}

fn put_sector(bytes: &mut Vec<u8>, offset: u64, stamp: u64) {
    if stamp == 0 {
        bytes.resize(bytes.len() + SECTOR as usize, 0);
        return;
    }
    bytes.extend(stamp.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    let mut word = mix(stamp ^ mix(offset));
    for _ in 2..SECTOR / 8 {
        word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23) ^ stamp;
        bytes.extend(word.to_le_bytes());
    }
}

/// The write that made a sector; `None`: none made all of it.
fn stamp_of(offset: u64, found: &[u8]) -> Option<u64> {
    let stamp = u64::from_le_bytes(*found.first_chunk()?);
    let mut expected = Vec::with_capacity(SECTOR as usize);
    put_sector(&mut expected, offset, stamp);
    (found == expected).then_some(stamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledged_write_must_be_there_and_one_under_way_may_be() {
        let mut ledger = Ledger::new(4096);
        let first = ledger.begin(0, 1024, false);
        ledger.acknowledge(first);
        let second = ledger.begin(512, 512, false);
        assert!(ledger.check(0, &[0; 512]).is_err(), "lost");
        assert!(ledger.check(0, &content(0, 512, first.stamp)).is_ok());
        assert!(ledger.check(512, &content(512, 512, second.stamp)).is_ok());
        assert!(ledger.check(512, &content(512, 512, first.stamp)).is_err(), "what was read once must stay");
    }

    #[test]
    fn misplaced_and_torn_sectors_are_garbage() {
        let mut ledger = Ledger::new(4096);
        let ticket = ledger.begin(0, 1024, false);
        ledger.acknowledge(ticket);
        let good = content(0, 1024, ticket.stamp);
        assert!(ledger.check(0, &good[512..]).is_err(), "misplaced");
        let mut torn = good.clone();
        torn[511] ^= 1;
        assert!(ledger.check(0, &torn[..512]).is_err(), "torn");
        assert!(ledger.check(0, &good).is_ok());
    }

    #[test]
    fn of_two_writes_at_once_either_may_stay() {
        for winner in [false, true] {
            let mut ledger = Ledger::new(512);
            let first = ledger.begin(0, 512, false);
            let second = ledger.begin(0, 512, false);
            ledger.acknowledge(first);
            ledger.acknowledge(second);
            let stamp = if winner { first.stamp } else { second.stamp };
            assert!(ledger.check(0, &content(0, 512, stamp)).is_ok());
        }
    }
}
