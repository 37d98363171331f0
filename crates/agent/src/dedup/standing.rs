//! The sandbox during an operation: what was done to it so far, and the way back.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use medes_memory::ranges::slices;
use medes_memory::session::{Freezer, Session};
use medes_memory::tracee::SeizeOptions;
use medes_memory::userfault::{UserFault, UserFaultFeatures, UserFaultOptions};

use super::cancel::Waited;
use super::{Cancel, DedupError, Hindrance, Holder};
use crate::view::SpaceView;

/// How far the sandbox is from running as if nothing had happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// It runs.
    Runs,
    /// Frozen. Thawing would end some of its waits, such as `epoll_wait`, with EINTR: its threads
    /// have to be stopped and left once before.
    Frozen,
    /// Frozen, and thawing is enough.
    Restartable,
}

/// A sandbox that is being operated on.
pub(super) struct Standing<'a, F: Freezer> {
    pub(super) freezer: F,
    pub(super) holder: &'a dyn Holder,
    cancel: &'a Cancel,
    /// One for each process, in the plan's order.
    pub(super) userfaults: Vec<UserFault>,
    /// Whether the userfaultfds were made by this operation: nothing is missing yet then.
    pub(super) fresh: bool,
    pub(super) phase: Phase,
    suspended: bool,
}

/// What came of work that a request may interrupt.
pub(super) enum Watched<T> {
    /// It is done.
    Done(T),
    /// Somebody cancelled, and the sandbox runs; what the work came to all the same.
    Cancelled(T),
}

/// Tells that work is over when it is dropped, even by a panic.
struct Done<'a>(&'a AtomicBool, &'a Cancel);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
        self.1.nudge();
    }
}

impl<'a, F: Freezer> Standing<'a, F> {
    pub(super) fn new(freezer: F, holder: &'a dyn Holder, cancel: &'a Cancel) -> Self {
        Self {
            freezer,
            holder,
            cancel,
            userfaults: Vec::new(),
            fresh: true,
            phase: Phase::Runs,
            suspended: false,
        }
    }

    pub(super) fn freeze(&mut self) -> Result<(), DedupError> {
        self.cancel.disarm();
        if self.cancel.is_requested() {
            return Err(DedupError::Cancelled);
        }
        // Even if it fails some may be frozen.
        self.phase = Phase::Frozen;
        Ok(self.freezer.freeze().map_err(Hindrance::Freeze)?)
    }

    /// Has the holder stop serving the sandbox's memory, whose userfaultfds are `known`.
    pub(super) fn suspend(&mut self, known: &[UserFault]) -> Result<Vec<SpaceView>, DedupError> {
        self.fresh = false;
        let views = self.holder.suspend().map_err(Hindrance::Holder)?;
        self.suspended = true;
        if views.len() != known.len() {
            return Err(Hindrance::Changed.into());
        }
        for (userfault, view) in known.iter().zip(&views) {
            let again = userfault.duplicate(view.registered()).map_err(Hindrance::Freeze)?;
            self.userfaults.push(again);
        }
        Ok(views)
    }

    /// Stops the processes once and makes what is left to be done in them: a userfaultfd for each,
    /// if there is none yet. They stay frozen, and thawing is all that it takes from here on.
    pub(super) fn prepare(&mut self, pids: &[i32]) -> Result<(), DedupError> {
        let mut session = Session::open(&mut self.freezer, &SeizeOptions::default())
            .map_err(Hindrance::Session)?;
        if self.cancel.is_requested() {
            return leave(session, &mut self.phase);
        }
        let mut result = Ok(());
        if self.fresh {
            let options = UserFaultOptions {
                features: UserFaultFeatures::events_and_writes(),
                keep_in_target: false,
                without_privilege: false,
            };
            let made = pids.iter().map(|pid| session.userfault(*pid, &options));
            match made.collect::<Result<_, _>>() {
                Ok(userfaults) => self.userfaults = userfaults,
                Err(error) => result = Err(Hindrance::Userfault(error).into()),
            }
        }
        if self.cancel.is_requested() {
            return leave(session, &mut self.phase);
        }
        let closed = session.close();
        // It lacks nothing yet: if it could not be led back, or frozen again, it is dead, or as it
        // was.
        self.phase = if closed.is_ok() { Phase::Restartable } else { Phase::Frozen };
        closed.map_err(Hindrance::Session)?;
        result
    }

    /// Runs `work` on another thread, of low priority. If somebody cancels meanwhile, the sandbox
    /// runs again at once, however long the work takes to notice.
    pub(super) fn watch<T: Send>(
        &mut self,
        work: impl FnOnce() -> T + Send,
    ) -> Result<Watched<T>, DedupError> {
        let (done, cancel) = (AtomicBool::new(false), self.cancel);
        std::thread::scope(|scope| {
            // What is suspended has to be served before it runs.
            if self.phase == Phase::Restartable
                && !self.suspended
                && let Some(thaw) = self.freezer.thawer()
            {
                cancel.arm(thaw);
            }
            let working = std::thread::Builder::new().spawn_scoped(scope, || {
                let _done = Done(&done, cancel);
                // Requests to other sandboxes come first, and so does taking this one back.
                medes_memory::priority::lower_this_thread();
                work()
            });
            let working = working.map_err(|error| {
                cancel.disarm();
                Hindrance::Thread(error)
            })?;
            let (cancelled, back) = match cancel.wait_until(|| done.load(Ordering::Acquire)) {
                Waited::Done => (false, Ok(())),
                Waited::Requested => (true, self.let_go()),
                Waited::Thawed(thawed) => {
                    self.phase = Phase::Runs;
                    let thawed = thawed.map_err(|why| lost("thawing", &why));
                    (true, thawed.and_then(|()| self.let_go()))
                }
            };
            let result = working.join();
            cancel.calm();
            let result = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            back.map(|()| match cancelled {
                true => Watched::Cancelled(result),
                false => Watched::Done(result),
            })
        })
    }

    /// It runs again although some had been dropped: there is nothing left of before that the holder
    /// could serve on.
    pub(super) fn runs_again(&mut self) {
        (self.phase, self.suspended) = (Phase::Runs, false);
        self.tell();
    }

    /// Tells a request, if there is one, that the sandbox runs.
    fn tell(&self) {
        if self.cancel.is_requested() {
            self.cancel.tell();
            // What is left to do comes after whoever was told.
            medes_memory::priority::lower_this_thread();
        }
    }

    /// Lets the sandbox run as if nothing had happened because of `error`, unless it is lost.
    /// Returns what there is to say then.
    pub(super) fn give_up(&mut self, error: DedupError) -> DedupError {
        if let DedupError::Lost(_) = error {
            return error;
        }
        match self.let_go() {
            Ok(()) => error,
            Err(also) => DedupError::Lost(format!("{error}; then: {also}")),
        }
    }

    /// Lets the sandbox run as if nothing had happened.
    pub(super) fn let_go(&mut self) -> Result<(), DedupError> {
        if std::mem::take(&mut self.suspended) {
            self.holder.resume().map_err(|why| lost("serving its memory", &why))?;
        }
        let phase = std::mem::replace(&mut self.phase, Phase::Runs);
        match phase {
            Phase::Runs => Ok(()),
            Phase::Frozen => let_run(&mut self.freezer),
            Phase::Restartable => self.freezer.thaw(),
        }
        .map_err(|why| lost("thawing", &why))?;
        self.tell();
        if self.fresh {
            release(std::mem::take(&mut self.userfaults));
        }
        Ok(())
    }
}

/// A request wants the sandbox: it runs on from where it is stopped.
fn leave<F: Freezer>(session: Session<F>, phase: &mut Phase) -> Result<(), DedupError> {
    let left = session.run_on();
    *phase = if left.is_ok() { Phase::Runs } else { Phase::Frozen };
    left.map_err(Hindrance::Session)?;
    Err(DedupError::Cancelled)
}

fn lost(what: &str, why: &dyn std::fmt::Display) -> DedupError {
    DedupError::Lost(format!("{what} after a failure: {why}"))
}

/// Closes userfaultfds of processes that run and lack nothing. Closing alone would keep them from
/// their memory for as long as it takes to lift all write protection.
pub(super) fn release(userfaults: Vec<UserFault>) {
    let mut events = Vec::new();
    for mut userfault in userfaults {
        if !userfault.tracks_writes() {
            continue;
        }
        let ranges: Vec<_> =
            userfault.watched().chain(userfault.registered().iter().cloned()).collect();
        for range in ranges {
            for slice in slices(range, PROTECTED) {
                // Unmapped by now, maybe; and who unmaps or forks waits until it has been heard.
                let _ = userfault.write_protect(slice, false);
                let _ = userfault.read_events(&mut events);
                events.clear();
            }
        }
    }
}

/// Address space that is write-protected at a time, or no longer, bytes.
pub(super) const PROTECTED: u64 = 4 << 20;

/// Lets a frozen group of processes run as if nothing had happened, from whatever point of an
/// operation that did not get as far as to drop anything. Thawing alone would end some waits.
///
/// Call it on an OS thread that ends with it ([`medes_memory::session::on_tracer_thread`]).
///
/// # Errors
/// When the group can't be thawed.
pub fn let_run<F: Freezer>(freezer: &mut F) -> io::Result<()> {
    match Session::open(&mut *freezer, &SeizeOptions::default()).map(Session::resume) {
        Ok(Ok(())) => {}
        Ok(Err(error)) | Err(error) => tracing::debug!(%error, "a wait may end early"),
    }
    freezer.thaw()
}
