//! Guests of the volume: they write, zero, trim, flush and read at random places, many of them in the same few, and tell the model.
//! They live in the gateway's process and die with it.

use crate::executor::Dice;
use crate::model::{SECTOR, Ticket, content};
use crate::world::{Gateway, Tally, VOLUME_BYTES, World, read_bytes};
use lsm_block::{AckPolicy, Volume, VolumeError};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use xsan_env::Buf;
use xsan_types::BLOCK_BYTES;

/// The hot part, where guests meet.
const HOT_BYTES: u64 = 128 << 10;

/// Starts the guests of a volume that was taken over.
///
/// Now and then all of them only read: such a gateway learns of its successor by nothing but the confirmation of reads (P8).
pub fn start(world: &Arc<World>, gateway: &Arc<Gateway>, volume: &Arc<Volume>) {
    let reads_only = Dice::new(gateway.env.random()).chance(350);
    for _ in 0..world.shape.guests {
        let guest = Guest {
            world: Arc::clone(world),
            gateway: Arc::clone(gateway),
            volume: Arc::clone(volume),
            dice: Dice::new(gateway.env.random()),
            reads_only,
        };
        drop(gateway.env.spawn("guest", guest.run()));
    }
}

struct Guest {
    world: Arc<World>,
    gateway: Arc<Gateway>,
    volume: Arc<Volume>,
    dice: Dice,
    reads_only: bool,
}

#[derive(Clone, Copy, Debug)]
enum Change {
    Write,
    Zero,
    Trim,
}

impl Guest {
    async fn run(mut self) {
        while !self.world.quiet.load(Ordering::Relaxed) {
            let pause = Duration::from_micros(self.dice.skewed(30_000));
            self.gateway.env.sleep(pause).await;
            let done = match self.dice.below(100) {
                _ if self.reads_only => self.read().await,
                0..=64 => self.change().await,
                65..=74 => self.flush().await,
                75..=98 => self.read().await,
                _ => self.volume.checkpoint().await,
            };
            if let Err(error) = done {
                Tally::count(&self.world.tally.errors);
                let owner = self.gateway.owner.0;
                self.world.executor.note(|| format!("a guest of gateway {owner} is told: {error}"));
                if self.volume.status().health.is_final() {
                    return;
                }
            }
        }
    }

    fn place(&mut self, unit: u64, most: u64) -> (u64, u64) {
        let length = unit * self.dice.between(1, most);
        let room = if self.dice.chance(600) && length < HOT_BYTES { HOT_BYTES } else { VOLUME_BYTES };
        (self.dice.below((room - length) / unit + 1) * unit, length)
    }

    async fn change(&mut self) -> Result<(), VolumeError> {
        let (change, unit, most) = match self.dice.below(20) {
            0..=6 => (Change::Write, SECTOR, 16),
            7..=13 => (Change::Write, BLOCK_BYTES, 16),
            14..=15 => (Change::Write, 64 << 10, 12),
            16 => (Change::Zero, SECTOR, 100),
            17..=18 => (Change::Zero, BLOCK_BYTES, 100),
            _ => (Change::Trim, SECTOR, 400),
        };
        let (offset, length) = self.place(unit, most);
        let fua = self.dice.chance(100);
        // A trim rounds inward to whole blocks.
        let (from, to) = match change {
            Change::Trim => (offset.next_multiple_of(BLOCK_BYTES), (offset + length) / BLOCK_BYTES * BLOCK_BYTES),
            _ => (offset, offset + length),
        };
        let bytes = to.saturating_sub(from);
        let ticket = self.world.model().begin(from, bytes, !matches!(change, Change::Write));
        let done = match change {
            Change::Write => self.volume.write(offset, Buf::copied(&content(offset, length, ticket.stamp)), fua),
            Change::Zero => self.volume.zero(offset, length, fua),
            Change::Trim => self.volume.trim(offset, length, fua),
        };
        done.await?;
        self.acknowledged(ticket, fua || self.world.shape.ack != AckPolicy::Replicated);
        Ok(())
    }

    fn acknowledged(&self, ticket: Ticket, durable: bool) {
        Tally::count(&self.world.tally.writes);
        let judged = self.world.model().acknowledge(ticket, durable);
        if let Err(broken) = judged {
            self.world.executor.fail(format!("gateway {}: {broken}", self.gateway.owner.0));
        }
    }

    async fn flush(&mut self) -> Result<(), VolumeError> {
        let began = self.world.model().flushing();
        self.volume.flush().await?;
        Tally::count(&self.world.tally.flushes);
        self.world.model().flushed(began);
        Ok(())
    }

    async fn read(&mut self) -> Result<(), VolumeError> {
        let (offset, length) = self.place(SECTOR, 256);
        let reading = Reading { world: &self.world, ticket: Some(self.world.model().reading(offset)) };
        let bytes = read_bytes(&self.volume, offset, length).await?;
        Tally::count(&self.world.tally.reads);
        let judged = reading.done(&bytes);
        if let Err(broken) = judged {
            self.world.executor.fail(format!("gateway {}: {broken}", self.gateway.owner.0));
        }
        Ok(())
    }
}

/// A read under way; the model is told when it ends in whatever way.
struct Reading<'a> {
    world: &'a World,
    ticket: Option<crate::model::ReadTicket>,
}

impl Reading<'_> {
    fn done(mut self, bytes: &[u8]) -> Result<(), crate::model::Broken> {
        match self.ticket.take() {
            Some(ticket) => self.world.model().read(&ticket, bytes),
            None => Ok(()),
        }
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.world.model().not_read(&ticket);
        }
    }
}
