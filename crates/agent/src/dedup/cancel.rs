//! Taking a sandbox back from a dedup operation.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

/// Asks one dedup operation to give up, and wakes it if it waits for its workers.
#[derive(Debug, Default)]
pub struct Cancel {
    requested: AtomicBool,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Cancel {
    /// Asks for it.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Release);
        self.nudge();
    }

    /// Whether it was asked for.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }

    /// The request, for who looks at it often.
    pub(super) fn flag(&self) -> &AtomicBool {
        &self.requested
    }

    /// Has [`Cancel::wait_until`] look again.
    pub(super) fn nudge(&self) {
        // Whoever waits either has not looked yet or is woken.
        drop(self.lock.lock());
        self.changed.notify_all();
    }

    /// Waits until `done` says so or somebody cancels; returns whether somebody did.
    pub(super) fn wait_until(&self, done: impl Fn() -> bool) -> bool {
        let mut guard = self.lock.lock();
        loop {
            if self.is_requested() {
                return true;
            }
            if done() {
                return false;
            }
            self.changed.wait(&mut guard);
        }
    }
}
