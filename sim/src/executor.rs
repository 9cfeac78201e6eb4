//! One thread, one clock, one seed: every task of every process of the cluster.
//!
//! A ready task is picked at random, not in order of waking; time stands still while a task runs, passes a little between
//! two tasks, and jumps to the next timer when none is ready. Tasks belong to an owner (a process of the simulated cluster); killing
//! the owner drops all of them, each at whatever await it had come to. Every decision goes into the trace hash.
//!
//! The ready set is ordered by task, so that the order in which one task wakes others does not matter.
//! Bounds: as many tasks and timers as the code under test makes; [`Limits`] ends runs that do not end.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use xsan_env::memory::mix;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Env, Moment, Runtime, TaskHandle};

/// A process of the simulated cluster. Never used twice: a process that starts again is another owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner(pub u64);

/// The world itself: disks, links, the planner. It is never killed.
pub const WORLD: Owner = Owner(0);

/// When a run counts as one that does not end.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Polls of tasks.
    pub polls: u64,
    /// Simulated time.
    pub time: Duration,
}

/// Why a run was ended from outside.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stuck {
    /// No task is ready and no timer is set.
    #[error("nothing can run any more; alive: {0:?}")]
    Deadlock(Vec<(u64, &'static str)>),
    /// [`Limits::polls`].
    #[error("{0} polls and no end: a loop that lets no time pass")]
    Polls(u64),
    /// [`Limits::time`].
    #[error("no end within {0:?} of simulated time")]
    Time(Duration),
    /// [`Executor::fail`]: a promise was broken.
    #[error("{0}")]
    Broken(String),
}

/// Pseudo-random numbers from a seed.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Numbers that follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(mix(seed ^ 0x7853_414e))
    }

    /// 64 random bits.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit` (0 for 0).
    pub fn below(&mut self, limit: u64) -> u64 {
        self.word() % limit.max(1)
    }

    /// A number from `least` to `most`.
    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.below(most.saturating_sub(least) + 1)
    }

    /// True `of` times in a thousand.
    pub fn chance(&mut self, of: u64) -> bool {
        self.below(1000) < of
    }

    /// A number that is small most of the time: uniform in scale, up to `most`.
    pub fn skewed(&mut self, most: u64) -> u64 {
        let bits = 64 - most.max(1).leading_zeros();
        let scale = self.below(u64::from(bits) + 1);
        self.below(1 << scale).min(most)
    }
}

struct Task {
    owner: Owner,
    name: &'static str,
    /// Out while the task runs.
    future: Option<BoxFuture<'static, ()>>,
    waker: Waker,
    /// Closed when the task is gone.
    _ended: watch::Sender<()>,
}

#[derive(Default)]
struct Ready(Mutex<BTreeSet<u64>>);

impl Ready {
    fn set(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct TaskWaker {
    id: u64,
    ready: Arc<Ready>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.ready.set().insert(self.id);
    }
}

struct State {
    now: u64,
    tasks: BTreeMap<u64, Task>,
    next_task: u64,
    timers: BTreeMap<(u64, u64), Waker>,
    next_timer: u64,
    dice: Dice,
    trace: u64,
    polls: u64,
    story: Option<Vec<String>>,
    print: bool,
    failed: Option<String>,
}

/// The executor; clones share it.
#[derive(Clone)]
pub struct Executor {
    state: Arc<Mutex<State>>,
    ready: Arc<Ready>,
}

impl Executor {
    /// A world that follows from `seed`. With `print` its story goes to standard error as it happens.
    #[must_use]
    pub fn new(seed: u64, print: bool) -> Self {
        let state = State {
            now: BEGINNING,
            tasks: BTreeMap::new(),
            next_task: 1,
            timers: BTreeMap::new(),
            next_timer: 0,
            dice: Dice::new(seed),
            trace: mix(seed),
            polls: 0,
            story: Some(Vec::new()),
            print,
            failed: None,
        };
        Self { state: Arc::new(Mutex::new(state)), ready: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The world as one process sees it. Its random numbers are its own.
    #[must_use]
    pub fn env(&self, owner: Owner, boot_id: u128) -> Env {
        let mut dice = Dice::new(self.state().dice.word() ^ owner.0);
        let clock = if owner == WORLD { Clock::default() } else { Clock::draw(&mut dice) };
        Env::new(Arc::new(Process { executor: self.clone(), owner, boot_id, clock, dice: Mutex::new(dice) }))
    }

    /// Simulated time since the start of the run.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.state().now - BEGINNING)
    }

    /// Hash of everything that was decided and noted so far.
    #[must_use]
    pub fn trace(&self) -> u64 {
        self.state().trace
    }

    /// Tasks run so far.
    #[must_use]
    pub fn polls(&self) -> u64 {
        self.state().polls
    }

    /// An event of the world: goes into the trace hash and into the story.
    pub fn note(&self, event: impl FnOnce() -> String) {
        let mut state = self.state();
        let now = state.now;
        let event = event();
        state.feed_text(&event);
        let line = format!("{:>12.6} {event}", (now - BEGINNING) as f64 / 1e9);
        if state.print {
            eprintln!("{line}");
        }
        if let Some(story) = &mut state.story {
            story.push(line);
        }
    }

    /// Ends the run: a promise was broken. The first one counts.
    pub fn fail(&self, what: impl Into<String>) {
        let what = what.into();
        self.note(|| format!("BROKEN: {what}"));
        self.state().failed.get_or_insert(what);
    }

    /// What was noted, one line an event.
    #[must_use]
    pub fn story(&self) -> Vec<String> {
        self.state().story.clone().unwrap_or_default()
    }

    /// Ends all tasks of a process where they are.
    pub fn kill(&self, owner: Owner) {
        let killed: Vec<Task> = {
            let mut state = self.state();
            let ids: Vec<u64> = state.tasks.iter().filter(|(_, task)| task.owner == owner).map(|(&id, _)| id).collect();
            ids.iter().filter_map(|id| state.tasks.remove(id)).collect()
        };
        // Outside of the lock: what is dropped may wake, spawn or abort.
        drop(killed);
    }

    /// Ends everything, the world included.
    pub fn kill_all(&self) {
        loop {
            let killed = std::mem::take(&mut self.state().tasks);
            if killed.is_empty() {
                return;
            }
            drop(killed);
        }
    }

    /// Runs everything until `main` is done.
    ///
    /// # Errors
    /// The run does not end.
    pub fn run<T: Send + 'static>(
        &self,
        limits: Limits,
        main: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, Stuck> {
        let done: Arc<Mutex<Option<T>>> = Arc::default();
        let result = Arc::clone(&done);
        self.start(
            WORLD,
            "main",
            Box::pin(async move {
                let output = main.await;
                *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(output);
            }),
        );
        loop {
            if let Some(output) = done.lock().unwrap_or_else(PoisonError::into_inner).take() {
                return Ok(output);
            }
            self.step(limits)?;
            if let Some(what) = self.state().failed.clone() {
                return Err(Stuck::Broken(what));
            }
        }
    }

    /// Runs one task, or lets time pass to the next timer.
    fn step(&self, limits: Limits) -> Result<(), Stuck> {
        let (id, mut future, waker) = {
            let mut state = self.state();
            state.fire_timers();
            let Some(id) = self.pick(&mut state) else {
                let Some((&(at, _), _)) = state.timers.first_key_value() else {
                    return Err(Stuck::Deadlock(state.tasks.iter().map(|(&id, task)| (id, task.name)).collect()));
                };
                if at > limits.time.as_nanos() as u64 {
                    return Err(Stuck::Time(limits.time));
                }
                state.now = at;
                return Ok(());
            };
            state.polls += 1;
            if state.polls > limits.polls {
                return Err(Stuck::Polls(limits.polls));
            }
            // CPU time: without it a loop that waits for time to pass would wait for ever.
            state.now += 40 + state.dice.below(200);
            let now = state.now;
            state.feed(now);
            state.feed(id);
            let Some(task) = state.tasks.get_mut(&id) else { return Ok(()) };
            let Some(future) = task.future.take() else { return Ok(()) };
            (id, future, task.waker.clone())
        };
        let ended = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let gone = {
            let mut state = self.state();
            match state.tasks.get_mut(&id) {
                // Killed by itself or by what it called.
                None => (Some(future), None),
                Some(_) if ended => (Some(future), state.tasks.remove(&id)),
                Some(task) => {
                    task.future = Some(future);
                    (None, None)
                }
            }
        };
        drop(gone);
        Ok(())
    }

    fn pick(&self, state: &mut State) -> Option<u64> {
        let mut ready = self.ready.set();
        loop {
            let count = ready.len();
            if count == 0 {
                return None;
            }
            let at = if count == 1 { 0 } else { state.dice.below(count as u64) as usize };
            let id = *ready.iter().nth(at)?;
            ready.remove(&id);
            if state.tasks.contains_key(&id) {
                return Some(id);
            }
        }
    }

    fn start(&self, owner: Owner, name: &'static str, future: BoxFuture<'static, ()>) -> TaskHandle {
        let (ended, mut gone) = watch::channel(());
        let id = {
            let mut state = self.state();
            let id = state.next_task;
            state.next_task += 1;
            state.feed(owner.0);
            state.feed_text(name);
            let waker = Waker::from(Arc::new(TaskWaker { id, ready: Arc::clone(&self.ready) }));
            state.tasks.insert(id, Task { owner, name, future: Some(future), waker, _ended: ended });
            id
        };
        self.ready.set().insert(id);
        let executor = self.clone();
        TaskHandle {
            abort: Box::new(move || {
                let task = executor.state().tasks.remove(&id);
                drop(task);
            }),
            ended: Box::pin(async move { while gone.changed().await.is_ok() {} }),
        }
    }
}

impl State {
    fn feed(&mut self, word: u64) {
        self.trace = mix(self.trace ^ word);
    }

    fn feed_text(&mut self, text: &str) {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in text.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        self.feed(hash);
    }

    fn fire_timers(&mut self) {
        while let Some((&(at, number), _)) = self.timers.first_key_value() {
            if at > self.now {
                return;
            }
            if let Some(waker) = self.timers.remove(&(at, number)) {
                waker.wake();
            }
        }
    }
}

/// A process's clocks: one that runs a little fast or slow, and one of the wall that is set wrong.
#[derive(Clone, Copy, Default)]
struct Clock {
    /// Billionths of a second gained in a second.
    gain: i64,
    wall_offset_millis: u64,
}

/// Two clocks differ by less than the 2 % that a taker waits longer than the read window (P8).
const GAIN_MAX: i64 = 9_900_000;
/// Not zero: code that subtracts from the clock shall be seen to do so.
const BEGINNING: u64 = 1_000_000_000;

impl Clock {
    fn draw(dice: &mut Dice) -> Self {
        let gain = i64::try_from(dice.below(2 * GAIN_MAX as u64 + 1)).unwrap_or(GAIN_MAX) - GAIN_MAX;
        Self { gain, wall_offset_millis: dice.skewed(4_000_000_000) }
    }

    fn local(self, world: u64) -> u64 {
        scale(world, i128::from(self.gain) + 1_000_000_000, 1_000_000_000)
    }

    fn world(self, local: u64) -> u64 {
        // Rounded up: who slept until then sees then.
        scale(local, 1_000_000_000, i128::from(self.gain) + 1_000_000_000).saturating_add(u64::from(self.gain != 0))
    }
}

fn scale(at: u64, by: i128, over: i128) -> u64 {
    let since = i128::from(at.saturating_sub(BEGINNING));
    u64::try_from(since * by / over).unwrap_or(u64::MAX).saturating_add(BEGINNING)
}

/// What one process sees of the world.
struct Process {
    executor: Executor,
    owner: Owner,
    boot_id: u128,
    clock: Clock,
    dice: Mutex<Dice>,
}

impl Runtime for Process {
    fn now(&self) -> Moment {
        Moment(self.clock.local(self.executor.state().now))
    }

    fn wall_millis(&self) -> u64 {
        1_700_000_000_000 + self.clock.wall_offset_millis + self.executor.state().now / 1_000_000
    }

    fn random(&self) -> u64 {
        self.dice.lock().unwrap_or_else(PoisonError::into_inner).word()
    }

    fn boot_id(&self) -> u128 {
        self.boot_id
    }

    fn spawn(&self, name: &'static str, task: BoxFuture<'static, ()>) -> TaskHandle {
        self.executor.start(self.owner, name, task)
    }

    fn sleep_until(&self, at: Moment) -> BoxFuture<'static, ()> {
        Box::pin(Sleep { executor: self.executor.clone(), at: self.clock.world(at.0), timer: None })
    }

    fn blocking(
        &self,
        work: Box<dyn FnOnce() -> Box<dyn Any + Send> + Send>,
    ) -> BoxFuture<'static, Box<dyn Any + Send>> {
        let (done, answer) = oneshot::channel();
        // A task: the work is done even if nobody waits for it, and the process may die before.
        drop(self.spawn(
            "blocking",
            Box::pin(async move {
                // Nobody waits any more: fine.
                let _ = done.send(work());
            }),
        ));
        Box::pin(async move {
            match answer.await {
                Ok(value) => value,
                // The process was killed, and who waits for it as well.
                Err(_) => std::future::pending().await,
            }
        })
    }
}

/// A timer; set when it is first waited for, taken back when it is dropped.
struct Sleep {
    executor: Executor,
    at: u64,
    timer: Option<(u64, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let mut state = this.executor.state();
        if state.now >= this.at {
            return Poll::Ready(());
        }
        let key = *this.timer.get_or_insert_with(|| {
            state.next_timer += 1;
            (this.at, state.next_timer)
        });
        state.timers.insert(key, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.timer {
            let waker = self.executor.state().timers.remove(&key);
            drop(waker);
        }
    }
}
