//! The part of an operation between freezing and detaching, in the one order that is safe.
//!
//! A [`Session`] stops all processes of a group, thaws the group under them (see
//! [`tracee`](crate::tracee) for why), lets calls be injected and pages be dropped, freezes the
//! group again and lets go. A process whose pages were dropped runs no instruction in between
//! and none afterwards, until the caller thaws the group; if that cannot be had, it is killed.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use crate::drop::{self, DropError, Dropped};
use crate::tracee::{InjectError, SeizeError, SeizeOptions, SeizedProcess, ThreadGroup};
use crate::userfault::{CreateError, RegisterError, RegisterMode, UserFault, UserFaultOptions};

/// Thaws a group of processes, from whatever thread.
pub type Thaw = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// A group of processes that can be frozen: a cgroup, in practice.
pub trait Freezer {
    /// Freezes the group and waits until it is frozen. Nothing happens if it is.
    ///
    /// # Errors
    /// If it could not be frozen, or not in reasonable time.
    fn freeze(&mut self) -> io::Result<()>;

    /// Thaws the group. Nothing happens if it is not frozen.
    ///
    /// # Errors
    /// If it could not be thawed.
    fn thaw(&mut self) -> io::Result<()>;

    /// The processes in the group.
    ///
    /// # Errors
    /// If they cannot be listed.
    fn processes(&mut self) -> io::Result<Vec<i32>>;

    /// What [`Freezer::thaw`] does, for somebody else to do; `None` if nobody else can.
    fn thawer(&self) -> Option<Thaw> {
        None
    }
}

impl<F: Freezer + ?Sized> Freezer for &mut F {
    fn freeze(&mut self) -> io::Result<()> {
        (**self).freeze()
    }

    fn thaw(&mut self) -> io::Result<()> {
        (**self).thaw()
    }

    fn processes(&mut self) -> io::Result<Vec<i32>> {
        (**self).processes()
    }

    fn thawer(&self) -> Option<Thaw> {
        (**self).thawer()
    }
}

/// Why a session failed.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A process could not be seized.
    #[error(transparent)]
    Seize(#[from] SeizeError),
    /// A process could not be led back to where it was.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// A process can't reach memory of its own any more; it was killed.
    #[error(transparent)]
    Guarded(DropError),
    /// The group could not be frozen, thawed or listed.
    #[error("{operation} the group of processes: {source}")]
    Freezer {
        /// What was tried.
        operation: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// Processes kept appearing in the frozen group.
    #[error("processes keep entering the frozen group")]
    Unstable,
}

/// Why memory could not be evicted. Registered ranges stay registered, dropped pages dropped;
/// the caller has the content of every page and puts back what it was to drop, unless the process
/// was killed ([`EvictError::is_fatal`]).
#[derive(Debug, thiserror::Error)]
pub enum EvictError {
    /// The process is not in this session.
    #[error("process {0} is not part of this session")]
    NoSuchProcess(i32),
    /// Dropping failed.
    #[error(transparent)]
    Drop(#[from] DropError),
    /// A mapping could not be replaced, or what took its place not be registered: its pages read as
    /// zeros, and the process was killed.
    #[error("replacing {:#x}..{:#x} of process {pid}, which is killed: {why}", range.start, range.end)]
    Replace {
        /// The process.
        pid: i32,
        /// The mapping.
        range: Range<u64>,
        /// What went wrong.
        why: String,
    },
}

impl EvictError {
    /// Whether the process was killed, because its memory can't be had back any more.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Replace { .. } | Self::Drop(DropError::Guarded { .. }))
    }
}

/// What to drop of one process.
#[derive(Debug, Clone, Default)]
pub struct Eviction {
    /// Mappings to register, each wholly. Ranges registered already are left out of it.
    pub register: Vec<Range<u64>>,
    /// Ranges of anonymous memory to drop, within registered mappings; without the pages that
    /// must stay ([`SeizedProcess::rseq_areas`]), and without guard regions of the process's own
    /// ([`drop::is_quiet`]).
    pub anonymous: Vec<Range<u64>>,
    /// Ranges of private file mappings to drop. The caller holds their private pages' content.
    pub file: Vec<Range<u64>>,
    /// Private file mappings to replace by anonymous memory, each wholly, and to register. The
    /// caller holds the content of every page of them.
    pub replace: Vec<Replacement>,
    /// Register for write protection too.
    pub track_writes: bool,
}

/// A mapping that becomes anonymous memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement {
    /// The whole mapping.
    pub range: Range<u64>,
    /// `PROT_READ`, `PROT_WRITE` and `PROT_EXEC`, as the mapping has them.
    pub protection: i32,
}

/// What was dropped.
#[derive(Debug, Default)]
pub struct Evicted {
    /// Anonymous memory.
    pub anonymous: Dropped,
    /// Private file mappings.
    pub file: Dropped,
    /// Mappings that the kernel would not register; their pages are all resident.
    pub left_resident: Vec<RegisterError>,
}

/// All processes of a group, stopped. See the module's description.
pub struct Session<F: Freezer> {
    freezer: F,
    processes: Vec<SeizedProcess>,
    /// Processes that lack pages.
    lacking: Vec<i32>,
    /// For each process that has any, the guard regions that dropping has left.
    guarded: HashMap<i32, Vec<Range<u64>>>,
    closed: bool,
}

/// How many guard regions a process may have before they are lifted: it takes the kernel 0.1 ms.
const GUARDED: usize = 256;

impl<F: Freezer> Session<F> {
    /// Freezes the group, stops every process in it and thaws the group under them. The calling
    /// OS thread should end with the session: see [`on_tracer_thread`].
    ///
    /// # Errors
    /// See [`SessionError`]. The processes are as they were, and frozen.
    pub fn open(mut freezer: F, options: &SeizeOptions) -> Result<Self, SessionError> {
        const LISTINGS: usize = 8;
        let failed = |operation| move |source| SessionError::Freezer { operation, source };
        freezer.freeze().map_err(failed("freezing"))?;
        let mut processes: Vec<SeizedProcess> = Vec::new();
        for listing in 0.. {
            let mut fresh = freezer.processes().map_err(failed("listing"))?;
            fresh.retain(|pid| processes.iter().all(|process| process.pid() != *pid));
            if fresh.is_empty() {
                break;
            }
            if listing == LISTINGS {
                return Err(SessionError::Unstable);
            }
            for pid in fresh {
                match ThreadGroup::seize(pid, options) {
                    Ok(process) => processes.push(process),
                    // Killed since it was listed.
                    Err(SeizeError::Gone(_)) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        freezer.thaw().map_err(failed("thawing"))?;
        let (lacking, guarded) = (Vec::new(), HashMap::new());
        Ok(Self { freezer, processes, lacking, guarded, closed: false })
    }

    /// The stopped processes.
    pub fn processes(&self) -> &[SeizedProcess] {
        &self.processes
    }

    /// One of the stopped processes.
    pub fn process(&mut self, pid: i32) -> Option<&mut SeizedProcess> {
        self.processes.iter_mut().find(|process| process.pid() == pid)
    }

    /// Has all processes killed when the calling thread dies, until they are let go. The calls that
    /// inject something do this by themselves; to be called before somebody else is told that
    /// memory is about to go.
    pub fn kill_with_tracer(&self) {
        self.processes.iter().for_each(SeizedProcess::kill_with_tracer);
    }

    /// Makes a userfaultfd of one of the processes.
    ///
    /// # Errors
    /// See [`CreateError`]; `Gone` if the process is not in this session.
    pub fn userfault(
        &mut self,
        pid: i32,
        options: &UserFaultOptions,
    ) -> Result<UserFault, CreateError> {
        self.kill_with_tracer();
        let process = self.process(pid).ok_or(CreateError::Inject(InjectError::Gone(pid)))?;
        UserFault::create(process, options)
    }

    /// Ends injected work for now: no thread runs, not even to the kernel's own doorstep, where it
    /// may write to the process's memory (rseq(2)), until something is injected again.
    ///
    /// # Errors
    /// [`SessionError::Inject`].
    pub fn settle(&mut self) -> Result<(), SessionError> {
        self.lift().map_err(SessionError::Guarded)?;
        self.processes.iter_mut().try_for_each(SeizedProcess::settle)?;
        Ok(())
    }

    /// Has what was dropped so far be missing: until then reaching for it is an error. Ending injected
    /// work does the same.
    ///
    /// # Errors
    /// [`DropError::Guarded`].
    pub fn lift(&mut self) -> Result<(), DropError> {
        let mut result = Ok(());
        for process in &mut self.processes {
            if let Some(guarded) = self.guarded.remove(&process.pid()) {
                result = result.and(drop::lift(process, &guarded));
            }
        }
        result
    }

    /// Registers mappings and drops pages, in this order. What the kernel does not let be
    /// registered stays resident. What was dropped has yet to be [lifted](Session::lift).
    ///
    /// # Errors
    /// See [`EvictError`].
    pub fn evict(
        &mut self,
        pid: i32,
        userfault: &mut UserFault,
        eviction: &Eviction,
    ) -> Result<Evicted, EvictError> {
        self.kill_with_tracer();
        let process = self
            .processes
            .iter_mut()
            .find(|process| process.pid() == pid)
            .ok_or(EvictError::NoSuchProcess(pid))?;
        let mut evicted = Evicted::default();
        let mode = match eviction.track_writes {
            true => RegisterMode::MissingAndWriteProtect,
            false => RegisterMode::Missing,
        };
        for mapping in &eviction.register {
            if let Err(error) = userfault.register(mapping.clone(), mode) {
                evicted.left_resident.push(error);
            }
        }
        let anonymous: Vec<_> =
            eviction.anonymous.iter().filter(|range| userfault.covers(range)).cloned().collect();
        // From here on the process may lack pages, even if a call fails half way.
        self.lacking.push(pid);
        let guarded = self.guarded.entry(pid).or_default();
        let dropped = drop::drop_pages(process, userfault, &anonymous, guarded);
        if guarded.len() > GUARDED {
            drop::lift(process, &std::mem::take(guarded))?;
        }
        evicted.anonymous = dropped?;
        evicted.file = drop::drop_file_pages(process, &eviction.file)?;
        for Replacement { range, protection } in &eviction.replace {
            let replaced = drop::replace_file_mapping(process, range, *protection)
                .map_err(|error| error.to_string())
                .and_then(|()| {
                    userfault.register(range.clone(), mode).map_err(|error| error.to_string())
                });
            if let Err(why) = replaced {
                process.kill();
                return Err(EvictError::Replace { pid, range: range.clone(), why });
            }
        }
        Ok(evicted)
    }

    /// Ends injected work, freezes the group, and lets go of every process. They stay frozen.
    ///
    /// # Errors
    /// See [`SessionError`]. Processes that lack pages and could not be frozen are killed.
    pub fn close(mut self) -> Result<(), SessionError> {
        self.end()
    }

    /// Ends injected work and lets every process run on, without freezing the group again. If any
    /// of them lacks pages this is [`Session::close`]: they may not run.
    ///
    /// # Errors
    /// See [`SessionError`].
    pub fn resume(mut self) -> Result<(), SessionError> {
        if !self.lacking.is_empty() {
            return self.end();
        }
        self.closed = true;
        self.detach()
    }

    /// Ends injected work and lets every process run on although it may lack pages: somebody brings
    /// them from now on, as they are touched.
    ///
    /// # Errors
    /// See [`SessionError`]. What could not be led back to where it was is killed.
    pub fn run_on(mut self) -> Result<(), SessionError> {
        self.closed = true;
        let settled = self.settle_all();
        settled.and(self.detach())
    }

    /// Ends injected work everywhere; where that fails, kills who lacks pages.
    fn settle_all(&mut self) -> Result<(), SessionError> {
        let mut result = self.lift().map_err(SessionError::Guarded);
        for process in &mut self.processes {
            match process.settle() {
                Ok(()) | Err(InjectError::Gone(_)) => {}
                Err(error) => {
                    tracing::error!(pid = process.pid(), %error, "injected work did not end");
                    if self.lacking.contains(&process.pid()) {
                        process.kill();
                    }
                    result = result.and(Err(error.into()));
                }
            }
        }
        result
    }

    /// Lets go of every process, children first: should we die in between, those that are killed
    /// take along, with their parent, those that were let go already. Where the first one leads a
    /// pid namespace, that is the kernel's own rule.
    fn detach(&mut self) -> Result<(), SessionError> {
        let mut result = Ok(());
        let mut processes = std::mem::take(&mut self.processes);
        let pids: Vec<i32> = processes.iter().map(SeizedProcess::pid).collect();
        processes.sort_by_key(|process| !process.parent().is_some_and(|p| pids.contains(&p)));
        for process in processes {
            match process.detach() {
                Ok(()) | Err(InjectError::Gone(_)) => {}
                Err(error) => result = result.and(Err(error.into())),
            }
        }
        result
    }

    fn end(&mut self) -> Result<(), SessionError> {
        if std::mem::replace(&mut self.closed, true) {
            return Ok(());
        }
        let mut result = self.settle_all();
        if let Err(source) = self.freezer.freeze() {
            for process in &self.processes {
                if self.lacking.contains(&process.pid()) {
                    process.kill();
                }
            }
            result = Err(SessionError::Freezer { operation: "freezing", source });
        }
        result.and(self.detach())
    }
}

impl<F: Freezer> Drop for Session<F> {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "session did not end well");
        }
    }
}

/// Runs `operation` on an OS thread of its own, which ends with it.
///
/// The kernel ties tracees to the thread that seized them and lets go of all of them when it
/// ends, so nothing stays traced whatever happens in `operation`, panics included.
///
/// # Panics
/// As `operation` does; and if there can be no more threads ([`try_on_tracer_thread`] says so
/// instead).
pub fn on_tracer_thread<R: Send>(operation: impl FnOnce() -> R + Send) -> R {
    try_on_tracer_thread(operation).expect("a thread for an operation")
}

/// As [`on_tracer_thread`], for whoever must not panic.
///
/// # Errors
/// If there can be no more threads; nothing was done then.
pub fn try_on_tracer_thread<R: Send>(operation: impl FnOnce() -> R + Send) -> io::Result<R> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, operation)?;
        match thread.join() {
            Ok(result) => Ok(result),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
