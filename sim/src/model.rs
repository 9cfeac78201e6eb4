//! What may be read: a register per sector, with R7's table for crashes.
//!
//! A write is begun, then acknowledged, then made durable by a flush that began after its acknowledgement. A version may not
//! be read once a write that was begun after the version's acknowledgement is acknowledged itself. After a crash
//! of processes the same holds; after power loss everywhere only durable writes displace older ones. What a taker of the
//! volume reads when it starts is what counts from then on ([`Model::settle`]): recovery makes it durable before it serves
//! (P10), so nothing else may ever come back.

use xsan_env::memory::mix;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// A write as one sector sees it. Times are numbers of the model's own clock.
#[derive(Clone, Copy, Debug)]
struct Version {
    /// 0: zeroes.
    stamp: u64,
    begun: u64,
    acknowledged: Option<u64>,
    durable: bool,
}

#[derive(Clone, Debug, Default)]
struct Sector {
    versions: Vec<Version>,
    /// Writes (by their beginning) that a take-over found missing: they may not be acknowledged any more.
    lost: Vec<u64>,
    /// Every content it ever had, if that is all that is asked.
    ever: Vec<u64>,
}

/// What is known of a volume.
pub struct Model {
    sectors: Vec<Sector>,
    /// More fails than what was promised for: any content that a sector ever had will do, but nothing else.
    honest_only: bool,
    clock: u64,
    /// Reads under way: versions they may still return are kept.
    reads: u64,
    /// A crash of all hosts happened since the last take-over: only durable versions must be there.
    power_lost: bool,
    /// When the last take-over was read.
    settled: u64,
}

/// A change under way.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    /// The content of the write; 0: zeroes.
    pub stamp: u64,
    offset: u64,
    length: u64,
    begun: u64,
}

/// A read under way.
#[derive(Debug)]
pub struct ReadTicket {
    offset: u64,
    began: u64,
}

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("sector at {offset}: {what}")]
pub struct Broken {
    /// Byte offset.
    pub offset: u64,
    /// For people.
    pub what: String,
}

impl Model {
    /// A fresh volume: zeroes in `bytes`. `honest_only`: what may be lost is not judged, only what is given.
    #[must_use]
    pub fn new(bytes: u64, honest_only: bool) -> Self {
        let zero = Version { stamp: 0, begun: 0, acknowledged: Some(1), durable: true };
        let sector = Sector { versions: vec![zero], lost: Vec::new(), ever: Vec::new() };
        let sectors = vec![sector; (bytes / SECTOR) as usize];
        Self { sectors, honest_only, clock: 1, reads: 0, power_lost: false, settled: 0 }
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

    /// A write begins; `zeroes`: of zeroes.
    pub fn begin(&mut self, offset: u64, length: u64, zeroes: bool) -> Ticket {
        let begun = self.tick();
        let stamp = if zeroes { 0 } else { begun };
        for sector in &mut self.sectors[range(offset, length)] {
            if self.honest_only {
                sector.ever.push(stamp);
                continue;
            }
            sector.versions.push(Version { stamp, begun, acknowledged: None, durable: false });
        }
        Ticket { stamp, offset, length, begun }
    }

    /// A write is acknowledged; `durable`: it was forced through (FUA).
    ///
    /// # Errors
    /// A take-over has found before that it is not there.
    pub fn acknowledge(&mut self, ticket: Ticket, durable: bool) -> Result<(), Broken> {
        let now = self.tick();
        if self.honest_only {
            return Ok(());
        }
        let reads = self.reads;
        for index in range(ticket.offset, ticket.length) {
            let sector = &mut self.sectors[index];
            if sector.lost.contains(&ticket.begun) {
                let what = format!("write {} is acknowledged after a take-over found it missing", ticket.begun);
                return Err(Broken { offset: index as u64 * SECTOR, what });
            }
            if let Some(version) = sector.versions.iter_mut().find(|version| version.begun == ticket.begun) {
                version.acknowledged.get_or_insert(now);
                version.durable |= durable;
            }
            if reads == 0 {
                sector.prune();
            }
        }
        Ok(())
    }

    /// A flush begins; pass the number to [`Model::flushed`].
    pub fn flushing(&mut self) -> u64 {
        self.tick()
    }

    /// The flush that began then is done: what was acknowledged before is durable.
    pub fn flushed(&mut self, began: u64) {
        let reads = self.reads;
        for sector in &mut self.sectors {
            for version in &mut sector.versions {
                version.durable |= version.acknowledged.is_some_and(|at| at < began);
            }
            if reads == 0 {
                sector.prune();
            }
        }
    }

    /// A read begins.
    pub fn reading(&mut self, offset: u64) -> ReadTicket {
        self.reads += 1;
        ReadTicket { offset, began: self.tick() }
    }

    /// A read failed or its process died.
    pub fn not_read(&mut self, _ticket: &ReadTicket) {
        self.reads -= 1;
    }

    /// A read of a served volume is answered.
    ///
    /// # Errors
    /// A sector it must not return.
    pub fn read(&mut self, ticket: &ReadTicket, bytes: &[u8]) -> Result<(), Broken> {
        self.reads -= 1;
        if self.honest_only {
            return self.honest(ticket.offset, bytes);
        }
        if ticket.began < self.settled {
            // Of the owner before: what it was then is forgotten.
            return Ok(());
        }
        let now = self.tick();
        let first = (ticket.offset / SECTOR) as usize;
        for (index, found) in bytes.chunks(SECTOR as usize).enumerate() {
            let offset = (first + index) as u64 * SECTOR;
            let sector = &mut self.sectors[first + index];
            let version = sector.find(offset, found)?;
            let newer = |other: &Version| other.acknowledged.is_some_and(|at| at < ticket.began);
            let acknowledged = sector.versions[version].acknowledged.unwrap_or(u64::MAX);
            if let Some(newer) = sector.versions.iter().find(|other| newer(other) && other.begun > acknowledged) {
                let what = format!("stale read of {:?}, {newer:?} was acknowledged", sector.versions[version]);
                return Err(Broken { offset, what });
            }
            // It is visible: nothing older may be read from now on. (Of zeroes nobody knows which they are.)
            if sector.versions[version].stamp != 0 {
                sector.versions[version].acknowledged.get_or_insert(now);
            }
        }
        Ok(())
    }

    fn honest(&self, offset: u64, bytes: &[u8]) -> Result<(), Broken> {
        let first = (offset / SECTOR) as usize;
        for (index, found) in bytes.chunks(SECTOR as usize).enumerate() {
            let offset = (first + index) as u64 * SECTOR;
            let stamp = stamp_of(offset, found);
            if !stamp.is_some_and(|stamp| stamp == 0 || self.sectors[first + index].ever.contains(&stamp)) {
                let what = format!("{stamp:?} ({:02x?} ...) was never written there", &found[..16]);
                return Err(Broken { offset, what });
            }
        }
        Ok(())
    }

    /// All hosts lose power: until the next take-over only what is durable must be there.
    pub fn power_loss(&mut self) {
        self.power_lost = true;
    }

    /// What a new owner of the volume reads, all of it: what is there now is what counts.
    ///
    /// # Errors
    /// The first sector that holds what it must not.
    pub fn settle(&mut self, image: &[u8]) -> Result<(), Broken> {
        let now = self.tick();
        if self.honest_only {
            return self.honest(0, image);
        }
        let power_lost = self.power_lost;
        for (index, found) in image.chunks(SECTOR as usize).enumerate() {
            let offset = index as u64 * SECTOR;
            let sector = &mut self.sectors[index];
            let version = sector.versions[sector.find(offset, found)?];
            let survives = |other: &Version| other.acknowledged.is_some() && (other.durable || !power_lost);
            let acknowledged = version.acknowledged.unwrap_or(u64::MAX);
            if let Some(newer) = sector.versions.iter().find(|other| survives(other) && other.begun > acknowledged) {
                let kind = if newer.durable { "flushed" } else { "acknowledged" };
                let after = if power_lost { "power loss" } else { "a crash" };
                let what = format!("found {version:?} after {after}; lost: {newer:?} ({kind})");
                return Err(Broken { offset, what });
            }
            for other in &sector.versions {
                if other.acknowledged.is_none() && other.begun > acknowledged {
                    sector.lost.push(other.begun);
                }
            }
            sector.versions.clear();
            let acknowledged = Some(version.acknowledged.unwrap_or(now));
            sector.versions.push(Version { acknowledged, durable: true, ..version });
        }
        self.power_lost = false;
        self.settled = now;
        Ok(())
    }
}

impl Sector {
    /// Forgets versions that can neither be read nor come back any more.
    fn prune(&mut self) {
        let newest = self.versions.iter().filter(|version| version.durable).map(|version| version.begun).max();
        if let Some(newest) = newest {
            self.versions.retain(|version| version.acknowledged.is_none_or(|at| at > newest));
        }
    }

    /// The version of these bytes. Of several writes of zeroes, the one that was acknowledged last, or not at all: it may have come
    /// after all that were acknowledged before, also if it began first.
    fn find(&self, offset: u64, found: &[u8]) -> Result<usize, Broken> {
        let Some(stamp) = stamp_of(offset, found) else {
            let what = format!("garbage {:02x?}, one of {:?} was written", &found[..16], self.versions);
            return Err(Broken { offset, what });
        };
        let equal = self.versions.iter().enumerate().filter(|(_, version)| version.stamp == stamp);
        let last = equal.max_by_key(|&(index, version)| (version.acknowledged.unwrap_or(u64::MAX), index));
        last.map(|(index, _)| index).ok_or_else(|| {
            let what = format!("write {stamp} is found; one of {:?} was expected", self.versions);
            Broken { offset, what }
        })
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

    fn written(model: &mut Model) -> Ticket {
        let ticket = model.begin(0, SECTOR, false);
        model.acknowledge(ticket, false).expect("in time");
        ticket
    }

    #[test]
    fn acknowledged_writes_survive_processes_and_flushed_ones_survive_power() {
        let mut model = Model::new(SECTOR, false);
        let first = written(&mut model);
        let began = model.flushing();
        model.flushed(began);
        let second = written(&mut model);
        let image = |ticket: Ticket| content(0, SECTOR, ticket.stamp);
        assert!(model.settle(&image(first)).is_err(), "acknowledged, and no power was lost");
        model.power_loss();
        assert!(model.settle(&[0; 512]).is_err(), "flushed");
        assert!(model.settle(&image(first)).is_ok(), "the second was not flushed");
        assert!(model.settle(&image(second)).is_err(), "it may not come back");
    }

    #[test]
    fn zeroes_that_began_first_and_ended_last_may_cover_what_came_between() {
        let mut model = Model::new(SECTOR, false);
        let slow = model.begin(0, SECTOR, true);
        let quick = model.begin(0, SECTOR, true);
        model.acknowledge(quick, false).expect("in time");
        written(&mut model);
        let reading = model.reading(0);
        model.acknowledge(slow, false).expect("in time");
        model.read(&reading, &[0; SECTOR as usize]).expect("the slow one came last");
        let mut model = Model::new(SECTOR, false);
        let zeroes = model.begin(0, SECTOR, true);
        model.acknowledge(zeroes, false).expect("in time");
        written(&mut model);
        let reading = model.reading(0);
        assert!(model.read(&reading, &[0; SECTOR as usize]).is_err(), "nothing of zeroes came after it");
    }

    #[test]
    fn what_was_under_way_is_there_or_not_but_not_acknowledged_later() {
        let mut model = Model::new(SECTOR, false);
        let first = written(&mut model);
        let second = model.begin(0, SECTOR, false);
        model.settle(&content(0, SECTOR, first.stamp)).expect("the second may be missing");
        assert!(model.acknowledge(second, false).is_err());
    }

    #[test]
    fn reads_are_never_stale_and_never_go_back() {
        let mut model = Model::new(SECTOR, false);
        let first = written(&mut model);
        let second = model.begin(0, SECTOR, false);
        let ticket = model.reading(0);
        model.read(&ticket, &content(0, SECTOR, second.stamp)).expect("it is being written");
        let ticket = model.reading(0);
        assert!(model.read(&ticket, &content(0, SECTOR, first.stamp)).is_err(), "the newer one was seen");
    }

    #[test]
    fn beyond_what_is_promised_only_what_was_never_written_is_wrong() {
        let mut model = Model::new(2 * SECTOR, true);
        let (first, _second) = (written(&mut model), written(&mut model));
        let image = [content(0, SECTOR, first.stamp), vec![0; 512]].concat();
        model.settle(&image).expect("an old value");
        model.settle(&[0; 1024]).expect("nothing");
        let elsewhere = [vec![0; 512], content(SECTOR, SECTOR, first.stamp)].concat();
        assert!(model.settle(&elsewhere).is_err(), "it was written to the first sector");
        let misplaced = [vec![0; 512], content(0, SECTOR, first.stamp)].concat();
        assert!(model.settle(&misplaced).is_err());
    }

    #[test]
    fn torn_sectors_are_garbage() {
        let mut model = Model::new(SECTOR, false);
        let first = written(&mut model);
        let mut torn = content(0, SECTOR, first.stamp);
        torn[511] ^= 1;
        assert!(model.settle(&torn).is_err());
    }
}
