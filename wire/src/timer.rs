//! One timer for all deadlines of a connection.

use std::task::Context;
use std::time::Duration;
use xsan_env::runtime::BoxFuture;
use xsan_env::{Env, Moment};

/// Fires at the earliest of many moments. Set again only when an earlier one comes, or after it fired: requests that are
/// answered in time touch no timer at all.
pub(crate) struct Timer {
    env: Env,
    armed: Option<(Moment, BoxFuture<'static, ()>)>,
}

impl Timer {
    pub(crate) fn new(env: &Env) -> Self {
        Self { env: env.clone(), armed: None }
    }

    /// `true` once at `due` or a little later; else the task is woken then. `None`: nothing is due.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>, due: Option<Moment>) -> bool {
        let Some(due) = due else {
            self.armed = None;
            return false;
        };
        if self.armed.as_ref().is_none_or(|(at, _)| *at > due) {
            let left: Duration = due.since(self.env.now());
            self.armed = Some((due, self.env.sleep(left)));
        }
        let fired = self.armed.as_mut().is_some_and(|(_, sleep)| sleep.as_mut().poll(context).is_ready());
        if fired {
            self.armed = None;
        }
        fired
    }
}
