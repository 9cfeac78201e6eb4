//! One thread, one clock, one seed. A ready task is picked at random; time jumps to the next timer when none is ready.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use tokio::sync::{oneshot, watch};
use xsan_env::memory::mix;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Env, Moment, Runtime, TaskHandle};

/// Pseudo-random numbers from a seed.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.word() % limit.max(1)
    }

    /// True `of` times in a thousand.
    pub fn chance(&mut self, of: u64) -> bool {
        self.below(1000) < of
    }
}

struct Task {
    owner: u64,
    future: Option<BoxFuture<'static, ()>>,
    waker: Waker,
    _ended: watch::Sender<()>,
}

type Ready = Arc<Mutex<BTreeSet<u64>>>;

struct TaskWaker(u64, Ready);

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.1.lock().unwrap().insert(self.0);
    }
}

struct State {
    now: u64,
    tasks: BTreeMap<u64, Task>,
    next: u64,
    timers: BTreeMap<(u64, u64), Waker>,
    dice: Dice,
    trace: u64,
}

/// The executor; clones share it.
#[derive(Clone)]
pub struct Executor {
    state: Arc<Mutex<State>>,
    ready: Ready,
}

impl Executor {
    pub fn new(seed: u64) -> Self {
        let state = State {
            now: 1_000_000_000,
            tasks: BTreeMap::new(),
            next: 0,
            timers: BTreeMap::new(),
            dice: Dice::new(seed),
            trace: mix(seed),
        };
        Self { state: Arc::new(Mutex::new(state)), ready: Ready::default() }
    }

    /// The world as the process `owner` sees it.
    pub fn env(&self, owner: u64) -> Env {
        let seed = self.state.lock().unwrap().dice.word();
        Env::new(Arc::new(Process { executor: self.clone(), owner, dice: Mutex::new(Dice::new(seed)) }))
    }

    pub fn millis(&self) -> u64 {
        self.state.lock().unwrap().now / 1_000_000
    }

    pub fn trace(&self) -> u64 {
        self.state.lock().unwrap().trace
    }

    pub fn note(&self, word: u64) {
        let mut state = self.state.lock().unwrap();
        state.trace = mix(state.trace ^ word);
    }

    /// Ends all tasks of a process where they are.
    pub fn kill(&self, owner: u64) {
        let mut state = self.state.lock().unwrap();
        let ids: Vec<u64> = state.tasks.iter().filter(|(_, task)| task.owner == owner).map(|(id, _)| *id).collect();
        let killed: Vec<Task> = ids.iter().filter_map(|id| state.tasks.remove(id)).collect();
        drop(state);
        drop(killed);
    }

    pub fn kill_all(&self) {
        loop {
            let killed = std::mem::take(&mut self.state.lock().unwrap().tasks);
            if killed.is_empty() {
                return;
            }
            drop(killed);
        }
    }

    /// Runs until `main` is done or `check` finds something wrong after a step.
    pub fn run<T: Send + 'static>(
        &self,
        main: impl Future<Output = T> + Send + 'static,
        mut check: impl FnMut() -> Result<(), String>,
    ) -> Result<T, String> {
        let done = Arc::new(Mutex::new(None));
        let result = Arc::clone(&done);
        drop(self.start(
            0,
            Box::pin(async move {
                let output = main.await;
                *result.lock().unwrap() = Some(output);
            }),
        ));
        loop {
            if let Some(output) = done.lock().unwrap().take() {
                return Ok(output);
            }
            self.step()?;
            check()?;
        }
    }

    fn step(&self) -> Result<(), String> {
        let (id, mut future, waker) = {
            let mut state = self.state.lock().unwrap();
            let now = state.now;
            while let Some((&key, _)) = state.timers.first_key_value().filter(|((at, _), _)| *at <= now) {
                state.timers.remove(&key).unwrap().wake();
            }
            let Some(id) = self.pick(&mut state) else {
                let Some((&(at, _), _)) = state.timers.first_key_value() else {
                    return Err("nothing can run any more".to_owned());
                };
                state.now = at;
                return Ok(());
            };
            state.now += 200 + state.dice.below(1000);
            state.trace = mix(state.trace ^ state.now ^ id << 40);
            let task = state.tasks.get_mut(&id).unwrap();
            let Some(future) = task.future.take() else { return Ok(()) };
            (id, future, task.waker.clone())
        };
        let ended = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let mut state = self.state.lock().unwrap();
        let gone = match state.tasks.get_mut(&id) {
            Some(task) if !ended => {
                task.future = Some(future);
                None
            }
            _ => Some((future, state.tasks.remove(&id))),
        };
        drop(state);
        drop(gone);
        Ok(())
    }

    fn pick(&self, state: &mut State) -> Option<u64> {
        let mut ready = self.ready.lock().unwrap();
        while !ready.is_empty() {
            let at = usize::try_from(state.dice.below(ready.len() as u64)).unwrap();
            let id = *ready.iter().nth(at).unwrap();
            ready.remove(&id);
            if state.tasks.contains_key(&id) {
                return Some(id);
            }
        }
        None
    }

    fn start(&self, owner: u64, future: BoxFuture<'static, ()>) -> TaskHandle {
        let (ended, mut gone) = watch::channel(());
        let mut state = self.state.lock().unwrap();
        state.next += 1;
        let id = state.next;
        let waker = Waker::from(Arc::new(TaskWaker(id, Arc::clone(&self.ready))));
        state.tasks.insert(id, Task { owner, future: Some(future), waker, _ended: ended });
        drop(state);
        self.ready.lock().unwrap().insert(id);
        let executor = self.clone();
        TaskHandle {
            abort: Box::new(move || {
                let task = executor.state.lock().unwrap().tasks.remove(&id);
                drop(task);
            }),
            ended: Box::pin(async move { while gone.changed().await.is_ok() {} }),
        }
    }
}

struct Process {
    executor: Executor,
    owner: u64,
    dice: Mutex<Dice>,
}

impl Runtime for Process {
    fn now(&self) -> Moment {
        Moment(self.executor.state.lock().unwrap().now)
    }

    fn wall_millis(&self) -> u64 {
        0
    }

    fn random(&self) -> u64 {
        self.dice.lock().unwrap().word()
    }

    fn boot_id(&self) -> u128 {
        1
    }

    fn spawn(&self, _: &'static str, task: BoxFuture<'static, ()>) -> TaskHandle {
        self.executor.start(self.owner, task)
    }

    fn sleep_until(&self, at: Moment) -> BoxFuture<'static, ()> {
        Box::pin(Sleep { executor: self.executor.clone(), at: at.0, timer: None })
    }

    fn blocking(
        &self,
        work: Box<dyn FnOnce() -> Box<dyn Any + Send> + Send>,
    ) -> BoxFuture<'static, Box<dyn Any + Send>> {
        let (done, answer) = oneshot::channel();
        drop(self.spawn("blocking", Box::pin(async move { drop(done.send(work())) })));
        Box::pin(async move {
            match answer.await {
                Ok(value) => value,
                Err(_) => std::future::pending().await,
            }
        })
    }
}

struct Sleep {
    executor: Executor,
    at: u64,
    timer: Option<(u64, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let mut state = this.executor.state.lock().unwrap();
        if state.now >= this.at {
            return Poll::Ready(());
        }
        let key = *this.timer.get_or_insert_with(|| {
            state.next += 1;
            (this.at, state.next)
        });
        state.timers.insert(key, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.timer {
            let waker = self.executor.state.lock().unwrap().timers.remove(&key);
            drop(waker);
        }
    }
}
