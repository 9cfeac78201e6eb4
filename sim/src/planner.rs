//! What goes wrong, and when, within the budget ([`crate::budget`]); all hosts together may crash or lose power at any time.

use crate::budget::Budget;
use crate::executor::Dice;
use crate::meta::REPLICAS;
use crate::workload;
use crate::world::{Gateway, Host, Tally, World, read_bytes};
use lsm_block::Volume;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Time after which a volume must be whole again when nothing goes wrong any more.
const HEAL_MAX: Duration = Duration::from_secs(120);
/// What the last check reads at once.
const PIECE_BYTES: u64 = 256 << 10;

/// Plans and commits faults.
pub struct Planner {
    world: Arc<World>,
    dice: Dice,
    budget: Budget,
}

impl Planner {
    /// A planner of the faults of `world`.
    #[must_use]
    pub fn new(world: &Arc<World>, dice: Dice) -> Self {
        let budget = Budget::new(world.shape.scheme.tolerates(), world.beyond);
        Self { world: Arc::clone(world), dice, budget }
    }

    /// Faults, one after the other.
    pub async fn run(&mut self, faults: u64) {
        self.new_gateway();
        self.change_weather();
        for _ in 0..faults {
            let micros =
                if self.dice.chance(400) { self.dice.skewed(1_500_000) } else { self.dice.between(50_000, 2_500_000) };
            let pause = Duration::from_micros(micros);
            self.world.env.sleep(pause).await;
            Tally::count(&self.world.tally.faults);
            self.fault().await;
            self.mourn();
        }
    }

    async fn fault(&mut self) {
        if self.world.beyond && self.dice.chance(400) {
            return self.disaster().await;
        }
        match self.dice.below(100) {
            0..=19 => self.crash_gateway().await,
            20..=27 => self.second_gateway().await,
            28..=33 => self.hand_over().await,
            34..=53 => self.lose_node().await,
            54..=63 => self.heal().await,
            64..=69 => self.restart_everything(false).await,
            70..=78 => self.restart_everything(true).await,
            79..=82 => self.disturb_meta().await,
            83..=88 => self.stall_disk(),
            89..=91 => self.fail_disk(),
            92 => self.replace_disk().await,
            93..=95 => self.rot(),
            _ => self.change_weather(),
        }
    }

    /// The same happens to several disks at once.
    async fn disaster(&mut self) {
        let kind = self.dice.below(4);
        for _ in 0..self.dice.between(1, 4) {
            match kind {
                0 => self.fail_disk(),
                1 => self.replace_disk().await,
                _ => self.rot(),
            }
        }
    }

    fn note(&self, event: &str) {
        self.world.executor.note(|| event.to_owned());
    }

    /// A gateway whose volume stopped by itself is replaced.
    fn mourn(&mut self) {
        let Some(gateway) = self.world.newest_gateway() else { return self.new_gateway() };
        if let Some(volume) = gateway.volume()
            && volume.status().health.is_final()
        {
            self.world.executor.note(|| format!("gateway {}: {:?}", gateway.owner.0, volume.status().health));
            self.world.stop_gateway(&gateway);
            self.new_gateway();
        }
    }

    fn new_gateway(&mut self) {
        let gateway = self.world.start_gateway();
        let (world, serving) = (Arc::clone(&self.world), Arc::clone(&gateway));
        drop(gateway.env.spawn("gateway", async move {
            if let Some(volume) = world.take_over(&serving).await {
                workload::start(&world, &serving, &volume);
            }
        }));
    }

    fn stop_gateways(&self) {
        for gateway in self.world.gateways() {
            self.world.stop_gateway(&gateway);
        }
    }

    async fn crash_gateway(&mut self) {
        self.note("fault: the gateway crashes");
        self.stop_gateways();
        let pause = Duration::from_micros(self.dice.skewed(300_000));
        self.world.env.sleep(pause).await;
        self.new_gateway();
    }

    /// Another gateway takes over while the first one serves on, as far as it can.
    async fn second_gateway(&mut self) {
        self.note("fault: a second gateway takes over");
        let old = self.world.gateways();
        self.new_gateway();
        let micros = if self.dice.chance(500) { self.dice.skewed(2_000_000) } else { self.dice.below(2_000_000) };
        let pause = Duration::from_micros(micros);
        self.world.env.sleep(pause).await;
        for gateway in old {
            self.world.stop_gateway(&gateway);
        }
    }

    async fn hand_over(&mut self) {
        let Some(volume) = self.world.newest_gateway().and_then(|gateway| gateway.volume()) else { return };
        self.note("the gateway hands the volume over");
        let patience = Duration::from_micros(self.dice.skewed(4_000_000));
        match self.world.env.timeout(patience, volume.close()).await {
            None => self.note("the hand-over is cut short"),
            Some(Err(error)) => self.world.executor.note(|| format!("the hand-over fails: {error}")),
            Some(Ok(())) => {}
        }
        drop(volume);
        self.stop_gateways();
        self.new_gateway();
    }

    fn draw_host(&mut self) -> usize {
        self.dice.below(self.world.hosts.len() as u64) as usize
    }

    /// A node crashes or its host loses power, within the budget; it comes back by itself or when it is healed.
    async fn lose_node(&mut self) {
        let host = self.draw_host();
        let number = self.world.hosts[host].number;
        let power = self.dice.chance(400) && self.budget.may_damage(number);
        if !self.budget.may_leave(number) {
            return;
        }
        if power {
            self.budget.damaged(number);
        } else {
            self.budget.leaves(number);
        }
        self.world.executor.note(|| format!("fault: n{number} {}", if power { "loses power" } else { "crashes" }));
        self.world.stop_node(&self.world.hosts[host], power);
        let noticed = Duration::from_micros(self.dice.skewed(800_000));
        let back = self.dice.chance(600).then(|| Duration::from_micros(self.dice.skewed(1_500_000)));
        let (world, rotten) = (Arc::clone(&self.world), self.budget.is_rotten(number));
        drop(self.world.env.spawn("fate of a node", async move {
            let host: &Host = &world.hosts[host];
            if let Some(back) = back.filter(|back| *back < noticed) {
                // Back before anybody noticed.
                world.env.sleep(back).await;
                return world.start_node(host, rotten).await;
            }
            world.env.sleep(noticed).await;
            if !world.is_up(host) {
                world.believe(host, false).await;
            }
            if let Some(back) = back {
                world.env.sleep(back).await;
                world.start_node(host, rotten).await;
            }
        }));
    }

    /// A disk does not answer for a while. Nothing is lost.
    fn stall_disk(&mut self) {
        let host = self.draw_host();
        self.world.stall_disk(&self.world.hosts[host]);
        let over = Duration::from_micros(self.dice.skewed(6_000_000));
        let world = Arc::clone(&self.world);
        drop(self.world.env.spawn("end of a stall", async move {
            world.env.sleep(over).await;
            world.mend_disk(&world.hosts[host]);
        }));
    }

    /// A request to a disk fails; after a while somebody starts the node again.
    fn fail_disk(&mut self) {
        let host = self.draw_host();
        let number = self.world.hosts[host].number;
        // A flush that failed leaves a disk behind that does not keep what it says later.
        if !self.budget.may_rot(number) {
            return;
        }
        if self.world.fail_disk(&self.world.hosts[host]) {
            self.budget.rotten(number);
        } else {
            self.budget.damaged(number);
        }
        let restarted = Duration::from_micros(self.dice.skewed(4_000_000));
        let (world, rotten) = (Arc::clone(&self.world), self.budget.is_rotten(number));
        drop(self.world.env.spawn("a failed disk", async move {
            let host: &Host = &world.hosts[host];
            world.env.sleep(restarted).await;
            world.mend_disk(host);
            world.stop_node(host, false);
            world.start_node(host, rotten).await;
        }));
    }

    /// A host loses its disk and returns with an empty one.
    async fn replace_disk(&mut self) {
        let host = self.draw_host();
        let number = self.world.hosts[host].number;
        if !self.budget.may_damage(number) {
            return;
        }
        self.budget.damaged(number);
        let host = &self.world.hosts[host];
        self.world.replace_disk(host).await;
        self.world.start_node(host, self.budget.is_rotten(number)).await;
    }

    fn rot(&mut self) {
        let host = self.draw_host();
        let number = self.world.hosts[host].number;
        if !self.budget.may_rot(number) {
            return;
        }
        self.budget.rotten(number);
        if self.dice.chance(400) {
            self.world.lie_disk(&self.world.hosts[host]);
        } else {
            self.world.rot(&self.world.hosts[host]);
        }
    }

    /// Some replicas of the metadata end or lose power, or do not hear each other for a while: what it answered, it keeps.
    async fn disturb_meta(&mut self) {
        let pause = Duration::from_micros(self.dice.skewed(4_000_000));
        if self.dice.chance(300) {
            for _ in 0..self.dice.between(1, 4) {
                let (from, to) = (self.dice.below(REPLICAS as u64), self.dice.below(REPLICAS as u64));
                self.world.executor.note(|| format!("fault: replica {from} of the metadata is not heard by {to}"));
                self.world.meta.cut(from as usize, to as usize);
            }
        } else {
            let power = self.dice.chance(300);
            let (first, count) = (self.dice.below(REPLICAS as u64), 1 + self.dice.skewed(2));
            for at in first..first + count {
                let at = at as usize % REPLICAS;
                self.world.executor.note(|| format!("fault: replica {at} of the metadata crashes (power: {power})"));
                self.world.stop_meta_replica(at, power);
            }
        }
        let world = Arc::clone(&self.world);
        drop(self.world.env.spawn("the metadata comes back", async move {
            world.env.sleep(pause).await;
            world.start_meta().await;
        }));
    }

    /// All processes end, or all hosts lose power; they come back in any order.
    async fn restart_everything(&mut self, power: bool) {
        self.note(if power { "fault: all power goes" } else { "fault: all processes crash" });
        self.stop_gateways();
        self.world.stop_meta(power);
        for host in &self.world.hosts {
            self.world.stop_node(host, power);
        }
        if power {
            self.world.model().power_loss();
        }
        self.world.start_meta().await;
        // Who was away before may stay away for longer.
        let mut hosts: Vec<usize> = (0..self.world.hosts.len()).collect();
        let early = self.dice.below(hosts.len() as u64 + 1);
        // Beside a rotten disk the take-over waits for all others: none of them may miss what it seals.
        let early = if self.budget.has_rotten() { hosts.len() as u64 } else { early };
        for started in 0..hosts.len() {
            let host = hosts.swap_remove(self.dice.below(hosts.len() as u64) as usize);
            let number = self.world.hosts[host].number;
            let stays_away = self.budget.is_touched(number) && self.dice.chance(300) && self.budget.may_leave(number);
            if started as u64 == early {
                self.new_gateway();
            }
            // The take-over seals without the hosts that come later than the gateway.
            if started as u64 >= early {
                self.budget.leaves(number);
            }
            if stays_away {
                continue;
            }
            self.world.start_node(&self.world.hosts[host], self.budget.is_rotten(number)).await;
            let pause = Duration::from_micros(self.dice.skewed(100_000));
            self.world.env.sleep(pause).await;
        }
        if self.world.newest_gateway().is_none() {
            self.new_gateway();
        }
    }

    fn change_weather(&mut self) {
        let bad = self.dice.chance(500);
        let mut draw = |most: u64| if bad { self.dice.skewed(most) } else { 0 };
        let weather = &self.world.weather;
        weather.lost_request.store(draw(8), Ordering::Relaxed);
        weather.lost_answer.store(draw(8), Ordering::Relaxed);
        weather.late_request.store(draw(8), Ordering::Relaxed);
        weather.slow_request.store(draw(8), Ordering::Relaxed);
        let delay = [20, 200, 2_000, 20_000][self.dice.below(4) as usize];
        weather.delay_us.store(delay, Ordering::Relaxed);
        self.world.executor.note(|| format!("weather: {weather:?}"));
    }

    async fn start_nodes(&self) {
        for host in &self.world.hosts {
            self.world.mend_disk(host);
            self.world.start_node(host, self.budget.is_rotten(host.number)).await;
        }
    }

    /// All hosts come back, and the volume gets all its redundancy back, or does not in time.
    async fn heal(&mut self) {
        self.start_nodes().await;
        let patience = Duration::from_micros(self.dice.skewed(8_000_000));
        let world = Arc::clone(&self.world);
        if world.env.timeout(patience, self.whole()).await.is_some() {
            self.note("all is whole again");
            self.budget.healed();
        }
    }

    /// Completes when the newest gateway serves with all members, no holes, and everything flushed; when guests are quiet, also with
    /// nothing left behind on any host (P7).
    async fn whole(&mut self) {
        loop {
            self.mourn();
            let step = Duration::from_millis(50);
            self.world.env.sleep(step).await;
            if !self.world.hosts.iter().all(|host| self.world.is_up(host)) {
                continue;
            }
            let Some(gateway) = self.world.newest_gateway() else { continue };
            let Some(volume) = gateway.volume() else { continue };
            if volume.flush().await.is_err() || volume.checkpoint().await.is_err() || volume.flush().await.is_err() {
                continue;
            }
            let status = volume.status();
            let is_whole =
                status.segments_with_holes == 0 && !status.unchecked && status.members.len() == status.members_wanted;
            if self.world.meta.disagreement().is_some() {
                continue;
            }
            if is_whole && (!self.world.quiet.load(Ordering::Relaxed) || self.nothing_left_behind(&volume).await) {
                return;
            }
        }
    }

    /// Whether all that hosts hold is listed; what a checkpoint has just decided goes in the background.
    async fn nothing_left_behind(&self, volume: &Volume) -> bool {
        for _ in 0..20 {
            let (held, width) = (self.world.held(), self.world.shape.scheme.width());
            if held.len() == volume.status().segments && held.values().all(|&shards| shards == width) {
                return true;
            }
            self.world.env.sleep(Duration::from_millis(20)).await;
        }
        false
    }

    /// Nothing goes wrong any more: the volume must become whole and hold what it must.
    pub async fn finish(&mut self) {
        self.note("the faults stop");
        self.world.weather.calm();
        for host in &self.world.hosts {
            self.world.mend_disk(host);
        }
        self.world.start_meta().await;
        self.mourn();
        self.start_nodes().await;
        if !self.becomes_whole("after the faults").await && !self.world.beyond {
            return;
        }
        self.world.quiet.store(true, Ordering::Relaxed);
        self.check_all().await;
        // Once more from the disks.
        let power = self.dice.chance(700);
        self.restart_everything(power).await;
        self.start_nodes().await;
        if !self.becomes_whole("after the last restart").await && !self.world.beyond {
            return;
        }
        self.check_all().await;
    }

    /// Whether the volume is whole in time; the run fails if it is not.
    async fn becomes_whole(&mut self, when: &str) -> bool {
        let world = Arc::clone(&self.world);
        if world.env.timeout(HEAL_MAX, self.whole()).await.is_some() {
            return true;
        }
        let status = world.newest_gateway().and_then(|gateway| gateway.volume()).map(|volume| volume.status());
        let width = world.shape.scheme.width();
        let held = world.held();
        let missing: Vec<String> = held
            .iter()
            .filter(|(_, shards)| **shards != width)
            .map(|(name, shards)| format!("{shards} of {name}"))
            .collect();
        let held = held.len();
        world.missing(format!(
            "{when} not whole within {HEAL_MAX:?}: {held} segments held, shards missing: {missing:?}, {status:?}, metadata: {:?}",
            world.meta.disagreement()
        ));
        false
    }

    /// Reads everything, piece by piece: one that cannot be had hides no other one.
    async fn check_all(&mut self) {
        let gateway: Option<Arc<Gateway>> = self.world.newest_gateway();
        let Some(volume) = gateway.and_then(|gateway| gateway.volume()) else { return };
        let bytes = self.world.model().bytes();
        for offset in (0..bytes).step_by(PIECE_BYTES as usize) {
            let ticket = self.world.model().reading(offset);
            match read_bytes(&volume, offset, PIECE_BYTES.min(bytes - offset)).await {
                Ok(image) => {
                    let judged = self.world.model().read(&ticket, &image);
                    if let Err(broken) = judged {
                        self.world.executor.fail(broken.to_string());
                    }
                }
                Err(error) => {
                    self.world.model().not_read(&ticket);
                    self.world.missing(format!("the last read at {offset} fails: {error}"));
                }
            }
        }
    }
}
