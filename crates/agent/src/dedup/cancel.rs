//! Taking a sandbox back from a dedup operation.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use medes_memory::priority::{Thread, Urgent};
use medes_memory::session::Thaw;
use parking_lot::{Condvar, Mutex};

/// Asks one dedup operation to give up.
///
/// For most of an operation thawing is all that it takes for the sandbox to run as if nothing had
/// happened. Then whoever asks thaws it, and waits for nobody; the operation hears of it later.
#[derive(Default)]
pub struct Cancel {
    requested: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Lets the sandbox run, for as long as that is all it takes.
    thaw: Option<Thaw>,
    /// What came of it, when somebody else than the operation has done it.
    thawed: Option<io::Result<()>>,
    /// Is told that the sandbox runs.
    tell: Option<Box<dyn FnOnce() + Send>>,
    /// The thread that operates.
    operator: Option<Thread>,
    /// The thread that asked, as long as the operation has something to run.
    urgent: Option<Urgent>,
}

/// The calling thread operates; until this is dropped.
pub(super) struct Operating<'a>(&'a Cancel);

impl Drop for Operating<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        (state.operator, state.urgent) = (None, None);
    }
}

/// How a wait for a request ended.
#[derive(Debug)]
pub(super) enum Waited {
    /// Nobody asked.
    Done,
    /// Somebody asked, and has the sandbox run, or tried.
    Thawed(io::Result<()>),
    /// Somebody asked; it is up to the operation to let the sandbox run.
    Requested,
}

impl Cancel {
    /// Asks for it. When this returns the sandbox may run already.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Release);
        let mut state = self.state.lock();
        if let Some(thaw) = state.thaw.take() {
            state.urgent = Some(Urgent::this_thread());
            let thawed = thaw();
            if thawed.is_ok() {
                state.tell();
            }
            state.thawed = Some(thawed);
        } else if let Some(operator) = &state.operator {
            operator.hurry();
            state.urgent = Some(Urgent::this_thread());
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The calling thread carries out the operation: a request has it come before all others where it
    /// is the one to let the sandbox run.
    pub(super) fn operating(&self) -> Operating<'_> {
        self.state.lock().operator = Some(Thread::this());
        Operating(self)
    }

    /// Whether it was asked for.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }

    /// Has `tell` called, once, as soon as a request has the sandbox run, though the operation has
    /// not returned yet: it has things of its own to put away. It is called on the thread of the
    /// request or of the operation, and may not ask for anything here.
    pub fn when_back(&self, tell: impl FnOnce() + Send + 'static) {
        self.state.lock().tell = Some(Box::new(tell));
    }

    /// From here on a request calls `thaw` itself. Nothing happens if there was one already.
    pub fn arm(&self, thaw: Thaw) {
        let mut state = self.state.lock();
        if !self.is_requested() {
            state.thaw = Some(thaw);
        }
    }

    /// Takes [`Cancel::arm`] back: a request waits for the operation from here on. Returns what
    /// came of it, if there was one in between.
    pub(super) fn disarm(&self) -> Option<io::Result<()>> {
        let mut state = self.state.lock();
        state.thaw = None;
        state.thawed.take()
    }

    /// Nothing of the operation is left that a request would have to come before.
    pub(super) fn calm(&self) {
        self.state.lock().urgent = None;
    }

    /// The operation has the sandbox run because of a request.
    pub(super) fn tell(&self) {
        self.state.lock().tell();
    }

    /// The request, for who looks at it often.
    pub(super) fn flag(&self) -> &AtomicBool {
        &self.requested
    }

    /// Has [`Cancel::wait_until`] look again.
    pub(super) fn nudge(&self) {
        // Whoever waits either has not looked yet or is woken.
        drop(self.state.lock());
        self.changed.notify_all();
    }

    /// Waits until `done` says so or somebody asks, and takes [`Cancel::arm`] back.
    pub(super) fn wait_until(&self, done: impl Fn() -> bool) -> Waited {
        let mut state = self.state.lock();
        loop {
            if let Some(thawed) = state.thawed.take() {
                return Waited::Thawed(thawed);
            }
            if self.is_requested() && state.thaw.is_none() {
                return Waited::Requested;
            }
            if done() {
                state.thaw = None;
                return Waited::Done;
            }
            self.changed.wait(&mut state);
        }
    }
}

impl State {
    fn tell(&mut self) {
        if let Some(tell) = self.tell.take() {
            tell();
        }
    }
}

impl fmt::Debug for Cancel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cancel").field("requested", &self.is_requested()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// One that says whether it told, and what counts its thaws.
    fn telling() -> (Cancel, Arc<AtomicBool>, Arc<AtomicUsize>) {
        let (cancel, told) = (Cancel::default(), Arc::new(AtomicBool::new(false)));
        let tell = Arc::clone(&told);
        cancel.when_back(move || tell.store(true, Ordering::Relaxed));
        (cancel, told, Arc::default())
    }

    fn counting(count: &Arc<AtomicUsize>) -> Thaw {
        let count = Arc::clone(count);
        Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
    }

    #[test]
    fn a_request_thaws_by_itself_and_tells_of_it() {
        let (cancel, told, thawed) = telling();
        cancel.arm(counting(&thawed));
        assert!(!told.load(Ordering::Relaxed));
        cancel.request();
        assert!(told.load(Ordering::Relaxed));
        assert!(matches!(cancel.wait_until(|| true), Waited::Thawed(Ok(()))));
        cancel.request();
        cancel.arm(counting(&thawed));
        assert!(matches!(cancel.wait_until(|| false), Waited::Requested));
        assert_eq!(thawed.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn nobody_thaws_what_was_disarmed() {
        let (cancel, told, thawed) = telling();
        cancel.arm(counting(&thawed));
        assert!(matches!(cancel.wait_until(|| true), Waited::Done));
        cancel.arm(counting(&thawed));
        assert!(cancel.disarm().is_none());
        cancel.request();
        assert!(!told.load(Ordering::Relaxed));
        assert!(matches!(cancel.wait_until(|| false), Waited::Requested));
        cancel.tell();
        assert!(told.load(Ordering::Relaxed));
        assert_eq!(thawed.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_thaw_that_fails_tells_nobody() {
        let cancel = Cancel::default();
        cancel.when_back(|| panic!("it does not run"));
        cancel.arm(Box::new(|| Err(io::ErrorKind::NotFound.into())));
        cancel.request();
        assert!(matches!(cancel.wait_until(|| false), Waited::Thawed(Err(_))));
    }
}
