//! The machine under a host, as far as its faults are made: see `xsan_env::faults`, which reads what is written here.

use crate::random::Random;
use std::path::{Path, PathBuf};

/// The faults of one host. Its process must be one of the program that has them, with [`Machine::dir`] as `XSAN_FAULTS`.
#[derive(Debug)]
pub struct Machine {
    dir: PathBuf,
    random: Random,
    wall_millis: i64,
    clock: String,
}

impl Machine {
    /// Without faults, but with clocks of its own: any steady time, up to 0.9 % fast or slow (P8 lets two hosts differ by
    /// 2 %), and up to 20 minutes from the others' date.
    #[must_use]
    pub fn new(dir: PathBuf, mut random: Random) -> Self {
        std::fs::create_dir_all(&dir).expect("a directory for faults");
        let offset = random.below(1_000_000_000);
        let rate = random.between(0, 18_000).cast_signed() - 9_000;
        let wall_millis = random.between(0, 2_400_000).cast_signed() - 1_200_000;
        let mut machine = Self { dir, random, wall_millis, clock: format!("{offset} {rate}") };
        machine.jump(0);
        machine.lose_power();
        machine
    }

    /// Where its faults are told.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The next start finds what a loss of power has left. The process must have been killed.
    pub fn lose_power(&mut self) {
        let boot = self.random.next();
        self.tell("boot", Some(&format!("{boot:x}")));
    }

    /// Whether nothing is left of unflushed writes when power is lost; else any sectors are.
    pub fn lose_all(&self, all: bool) {
        self.tell("keep", all.then_some("nothing"));
    }

    /// Whether its disks hang.
    pub fn hang(&self, hangs: bool) {
        self.tell("stall", hangs.then_some(""));
    }

    /// Whether its disks are full.
    pub fn fill(&self, is_full: bool) {
        self.tell("full", is_full.then_some(""));
    }

    /// Whether flushes of its disks are answered without being done.
    pub fn lie(&self, lies: bool) {
        self.tell("lie", lies.then_some(""));
    }

    /// Its date changes by so much.
    pub fn jump(&mut self, millis: i64) {
        self.wall_millis += millis;
        let text = format!("{} {}", self.clock, self.wall_millis);
        self.tell("clock", Some(&text));
    }

    /// Its disks are new ones.
    pub fn forget_disks(&self) {
        // There is nothing to forget before the first start.
        let _ = std::fs::remove_dir_all(self.dir.join("held"));
    }

    /// All is well again.
    pub fn heal(&self) {
        self.hang(false);
        self.fill(false);
        self.lie(false);
    }

    /// Written beside and renamed: the process reads it at any moment.
    fn tell(&self, name: &str, text: Option<&str>) {
        let (file, new) = (self.dir.join(name), self.dir.join("new"));
        match text {
            Some(text) => std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &file)).expect("a fault"),
            // Not there: no fault.
            None => drop(std::fs::remove_file(&file)),
        }
    }
}
