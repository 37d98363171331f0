//! Stopping all threads of a process, and making it run system calls.
//!
//! # One thread
//!
//! The kernel ties a tracee to the *thread* that seized it: every later call must come from
//! the same one, and when that thread ends the kernel lets go of the tracee (or kills it, see
//! below). [`SeizedProcess`] is therefore not `Send`. Give each operation a thread of its own
//! that ends with it: then nothing can stay traced, whatever goes wrong.
//!
//! A `wait` in another thread of the tracer's process may see the stops of a tracee that is
//! also its child, even one that asks for exits only. Nothing here depends on `wait`, so no
//! stop is lost; but a parent that reaps must ignore statuses that are not exits, or wait for
//! the exit on a pidfd first.
//!
//! # Freezers
//!
//! A task frozen by the cgroup v2 freezer stops for ptrace at once and stays stopped. But it
//! cannot run an injected system call while `cgroup.freeze` is 1: resumed, it goes from the
//! ptrace stop straight back to the freezer's trap (`JOBCTL_TRAP_FREEZE` in the kernel's
//! `get_signal`), before any user instruction. So the order of an operation is
//!
//! 1. freeze the cgroup;
//! 2. [`ThreadGroup::seize`] *every* process in it: now all threads are in ptrace stops;
//! 3. thaw the cgroup: nothing runs, since threads in a ptrace stop stay there;
//! 4. inject;
//! 5. freeze the cgroup: tasks in ptrace stops count as frozen, so this is immediate;
//! 6. [`SeizedProcess::detach`]: each thread goes from its ptrace stop to the freezer's trap
//!    without running a user instruction.
//!
//! [`Session`](crate::session::Session) does these steps in this order.
//!
//! A task frozen by the cgroup v1 freezer never reaches a ptrace stop; seizing it times out,
//! or, had a signal stopped it before, would hang, and is refused.
//!
//! # What the process notices
//!
//! Nothing: registers, signal mask and interrupted system calls are restored exactly.
//! A thread is stopped in the kernel's signal-handling loop with the state of its interrupted
//! call in `rax` and `orig_rax`; after injected calls it is led back to the same place with
//! the same state, so that the kernel's own restart rules apply after detaching. Waits that
//! the kernel does not restart by itself are made to (see
//! [`SeizeOptions::restart_interrupted_waits`]): freezing and thawing alone would end them with
//! EINTR. Some calls go on as `restart_syscall`, as after SIGSTOP; a program's seccomp filter has
//! to allow it or the program dies, however it is stopped. Signals stay pending while a thread runs
//! injected calls, except SIGSTOP, which is sent again at the end.
//!
//! # If the tracer dies
//!
//! Before the first injected call nothing is changed, and the death of the tracer lets the
//! process go on as if nothing had happened. From the first injected call until the detach the
//! process is killed with its tracer (`PTRACE_O_EXITKILL`): it might have wrong registers, or
//! lack pages that nobody but the tracer knows of. A [`Session`](crate::session::Session) extends
//! that to all its processes, so that none outlives another.

mod inject;
pub(crate) mod rseq;
mod stop;

use std::fs;
use std::io;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

pub use inject::{InjectError, Scratch};
pub use rseq::RseqArea;

use crate::arch::Registers;
use crate::sys;
use stop::{Stop, Waiter};

/// How a process is seized.
#[derive(Debug, Clone)]
pub struct SeizeOptions {
    /// How long all threads together may take to stop. A thread stops within microseconds
    /// unless it is in uninterruptible sleep.
    pub deadline: Duration,
    /// How long one injected system call may take.
    pub call_deadline: Duration,
    /// Let waits (`epoll_wait`, `semop`, `read` with a socket timeout, ...) that the kernel
    /// would end with EINTR go on instead. A relative timeout then starts anew, so that it may
    /// end late but never early. Default: true.
    pub restart_interrupted_waits: bool,
}

impl Default for SeizeOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(1),
            call_deadline: Duration::from_secs(5),
            restart_interrupted_waits: true,
        }
    }
}

/// Why a process could not be seized. It runs on as before.
#[derive(Debug, thiserror::Error)]
pub enum SeizeError {
    /// No such process, or it exited meanwhile.
    #[error("process {0} is gone")]
    Gone(i32),
    /// The process has exited and waits for its parent; or its main thread has.
    #[error("process {0} is a zombie: its main thread has exited")]
    Zombie(i32),
    /// A debugger, strace or another instance traces it.
    #[error("process {pid} is already traced by {tracer}; end that one first")]
    AlreadyTraced {
        /// The process.
        pid: i32,
        /// The thread that traces it.
        tracer: i32,
    },
    /// The kernel does not allow it.
    #[error("not permitted to trace process {pid}: it needs CAP_SYS_PTRACE over that process")]
    NotPermitted {
        /// The process.
        pid: i32,
    },
    /// It is frozen by the v1 freezer, in which no task reaches a ptrace stop.
    #[error(
        "process {pid} is frozen by the cgroup v1 freezer, in which it cannot be traced; \
         freeze it with cgroup.freeze of a v2 hierarchy"
    )]
    FrozenV1 {
        /// The process.
        pid: i32,
    },
    /// A thread did not stop in time.
    #[error("thread {tid} of process {pid} did not stop within {waited:?} (state {state})")]
    TimedOut {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
        /// Its state as in `/proc/PID/stat`, `D` for uninterruptible sleep.
        state: char,
        /// How long it was waited for.
        waited: Duration,
    },
    /// It kept making threads faster than they could be stopped.
    #[error("process {pid} kept starting threads for {waited:?}")]
    Unstable {
        /// The process.
        pid: i32,
        /// How long it was tried.
        waited: Duration,
    },
    /// Any other failure of a system call.
    #[error("{operation} on process {pid}: {source}")]
    Os {
        /// The process.
        pid: i32,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The threads of one process.
pub struct ThreadGroup;

impl ThreadGroup {
    /// Stops every thread of `pid` and keeps them stopped until the result is dropped.
    ///
    /// Threads that start or exit meanwhile are followed: the process is listed until a
    /// listing shows no thread that is not stopped. The process may be frozen by the cgroup
    /// v2 freezer, or stopped by a signal (which it still is afterwards).
    ///
    /// # Errors
    /// See [`SeizeError`]. Every thread stopped so far is let go, with one exception: a thread
    /// that did not stop in time cannot be detached from; the kernel lets go of it when the
    /// calling OS thread ends.
    pub fn seize(pid: i32, options: &SeizeOptions) -> Result<SeizedProcess, SeizeError> {
        let os = |operation| move |source| SeizeError::Os { pid, operation, source };
        let pidfd = sys::pidfd_open(pid).map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => SeizeError::Gone(pid),
            _ => os("pidfd_open")(error),
        })?;
        let status =
            fs::read_to_string(format!("/proc/{pid}/status")).map_err(|_| SeizeError::Gone(pid))?;
        let parent = sys::status_field(&status, "PPid").and_then(|field| field.parse().ok());
        let mut process = SeizedProcess {
            pid,
            pidfd,
            threads: Vec::new(),
            injection: None,
            scratch: None,
            stopped_by_signal: false,
            parent,
            detached: false,
            options: options.clone(),
            not_send: PhantomData,
        };
        let until = Instant::now() + options.deadline;
        loop {
            let fresh = process.seize_listed()?;
            if !fresh {
                break;
            }
            process.wait_for_stops(until)?;
            if Instant::now() > until {
                return Err(SeizeError::Unstable { pid, waited: options.deadline });
            }
        }
        if options.restart_interrupted_waits {
            process.restart_interrupted_waits().map_err(os("changing registers"))?;
        }
        Ok(process)
    }
}

/// A process whose threads are all stopped by this one.
///
/// Dropping it ends injected work, restores every register and lets the process go. If that
/// is not possible the process is killed: it must not run with another's registers.
pub struct SeizedProcess {
    pid: i32,
    pidfd: OwnedFd,
    threads: Vec<Thread>,
    injection: Option<inject::Injection>,
    /// Memory in the process for injected calls, while it is mapped.
    scratch: Option<Scratch>,
    /// A SIGSTOP came while a thread ran injected calls and is owed to the process.
    stopped_by_signal: bool,
    parent: Option<i32>,
    detached: bool,
    options: SeizeOptions,
    /// ptrace calls must come from the OS thread that seized.
    not_send: PhantomData<*mut ()>,
}

#[derive(Debug, Clone, Copy)]
struct Thread {
    tid: i32,
    stopped: bool,
}

impl SeizedProcess {
    /// The process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// A descriptor of the process, for `pidfd_getfd` and the like.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Its threads, all of them stopped.
    pub fn threads(&self) -> impl ExactSizeIterator<Item = i32> + '_ {
        self.threads.iter().map(|thread| thread.tid)
    }

    /// The memory that the kernel touches for each thread on its way back to user space, if the
    /// thread registered it (rseq(2)): it must stay resident. If one of these pages were
    /// missing, the thread would block in the kernel before it reaches the next ptrace stop.
    ///
    /// # Errors
    /// EIO on kernels before 5.13 or without CONFIG_RSEQ; what the kernel reports otherwise.
    pub fn rseq_areas(&self) -> io::Result<Vec<RseqArea>> {
        let memory = fs::File::open(format!("/proc/{}/mem", self.pid))?;
        let mut areas = Vec::with_capacity(self.threads.len());
        for thread in &self.threads {
            areas.extend(rseq::area(&memory, thread.tid)?);
        }
        Ok(areas)
    }

    /// The process that made it, or inherited it; `None` if that could not be read.
    pub fn parent(&self) -> Option<i32> {
        self.parent
    }

    /// Has the process killed when the calling thread dies, until it is let go. Every thread is
    /// marked: the kernel goes through them one by one, and one that it lets go before it kills
    /// another could run in between.
    pub fn kill_with_tracer(&self) {
        if self.injection.is_some() {
            // It is marked, and its injecting thread has more options than this one.
            return;
        }
        for thread in &self.threads {
            // Fails for a thread that is dead.
            let _ = stop::set_options(thread.tid, libc::PTRACE_O_EXITKILL);
        }
    }

    /// Ends injected work and lets go of every thread.
    ///
    /// # Errors
    /// [`InjectError`] if the registers could not be restored; the process was killed then.
    pub fn detach(mut self) -> Result<(), InjectError> {
        self.release()
    }

    /// Seizes the threads not seen before; returns whether there were any.
    fn seize_listed(&mut self) -> Result<bool, SeizeError> {
        let pid = self.pid;
        let tids = list_threads(pid).map_err(|_| SeizeError::Gone(pid))?;
        let known = self.threads.len();
        for tid in tids {
            if self.threads.iter().any(|thread| thread.tid == tid) {
                continue;
            }
            // A signal stops all threads, so the main thread speaks for them.
            if tid == pid && thread_state(pid, tid) == Some('T') && frozen_v1(pid) {
                return Err(SeizeError::FrozenV1 { pid });
            }
            match stop::seize(tid).and_then(|()| stop::interrupt(tid)) {
                Ok(()) => self.threads.push(Thread { tid, stopped: false }),
                // A thread that exits between listing and seizing is no thread any more.
                Err(error) if is_exited(&error) && tid != pid => {}
                Err(error) => match thread_state(pid, tid) {
                    None | Some('X') if tid != pid => {}
                    None | Some('X') => return Err(SeizeError::Gone(pid)),
                    Some('Z') if tid != pid => {}
                    Some('Z') => return Err(SeizeError::Zombie(pid)),
                    Some(_) => return Err(self.seize_refused(tid, error)),
                },
            }
        }
        Ok(self.threads.len() > known)
    }

    fn seize_refused(&self, tid: i32, error: io::Error) -> SeizeError {
        let pid = self.pid;
        if is_exited(&error) {
            return SeizeError::Gone(pid);
        }
        if error.raw_os_error() != Some(libc::EPERM) {
            return SeizeError::Os { pid, operation: "PTRACE_SEIZE", source: error };
        }
        let tracer = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status"))
            .ok()
            .and_then(|status| sys::status_field(&status, "TracerPid")?.parse().ok())
            .unwrap_or(0);
        match tracer {
            0 => SeizeError::NotPermitted { pid },
            tracer => SeizeError::AlreadyTraced { pid, tracer },
        }
    }

    /// Waits until every seized thread is in a stop of `PTRACE_INTERRUPT`'s; forgets those
    /// that exit.
    fn wait_for_stops(&mut self, until: Instant) -> Result<(), SeizeError> {
        let pid = self.pid;
        let mut index = 0;
        while let Some(&Thread { tid, stopped }) = self.threads.get(index) {
            if stopped {
                index += 1;
                continue;
            }
            let mut waiter = Waiter::until(until);
            match waiter.wait(pid, tid, &mut || false) {
                Some(Stop::Event) => {
                    self.threads[index].stopped = true;
                    index += 1;
                }
                // The thread was about to handle a signal: let it set up the handler's frame. This
                // stop may have used up the interrupt.
                Some(Stop::Signal(signal)) => {
                    let _ = stop::interrupt(tid);
                    let _ = stop::resume(libc::PTRACE_CONT, tid, signal);
                }
                Some(Stop::Syscall) => {
                    let _ = stop::interrupt(tid);
                    let _ = stop::resume(libc::PTRACE_CONT, tid, 0);
                }
                Some(Stop::Exited) => {
                    self.reap(tid);
                    if tid == pid {
                        self.threads.remove(index);
                        return Err(match thread_state(pid, pid) {
                            Some('Z') => SeizeError::Zombie(pid),
                            _ => SeizeError::Gone(pid),
                        });
                    }
                    self.threads.remove(index);
                }
                None if frozen_v1(pid) => return Err(SeizeError::FrozenV1 { pid }),
                None => {
                    return Err(SeizeError::TimedOut {
                        pid,
                        tid,
                        state: thread_state(pid, tid).unwrap_or('?'),
                        waited: self.options.deadline,
                    });
                }
            }
        }
        Ok(())
    }

    fn restart_interrupted_waits(&self) -> io::Result<()> {
        for thread in &self.threads {
            let mut registers = match Registers::read(thread.tid) {
                Ok(registers) => registers,
                // Killed meanwhile; whoever injects next finds out.
                Err(error) if is_exited(&error) => continue,
                Err(error) => return Err(error),
            };
            if registers.restart_interrupted_wait()
                && let Err(error) = registers.write(thread.tid)
                && !is_exited(&error)
            {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes the exit status of a tracee that exited, as a tracer must for the process to be
    /// seen as dead by its parent. The main thread's status is its parent's: left alone if the
    /// parent is this process, passed on by the kernel otherwise.
    fn reap(&self, tid: i32) {
        if tid == self.pid && self.parent == Some(std::process::id() as i32) {
            return;
        }
        stop::reap(tid);
    }

    fn release(&mut self) -> Result<(), InjectError> {
        if std::mem::replace(&mut self.detached, true) {
            return Ok(());
        }
        let settled = self.settle();
        if matches!(settled, Err(InjectError::Lost { .. })) {
            self.kill();
        }
        let until = Instant::now() + Duration::from_millis(200);
        for thread in std::mem::take(&mut self.threads) {
            match stop::detach(thread.tid) {
                Ok(()) => {}
                // Not stopped: dead, or one that did not stop in time. A second look for a
                // thread that stopped since.
                Err(_) => {
                    let mut waiter = Waiter::until(until);
                    match waiter.wait(self.pid, thread.tid, &mut || false) {
                        Some(Stop::Exited) => self.reap(thread.tid),
                        Some(Stop::Signal(signal)) => {
                            let _ = stop::detach_with(thread.tid, signal);
                        }
                        Some(_) => {
                            let _ = stop::detach(thread.tid);
                        }
                        None => tracing::warn!(
                            pid = self.pid,
                            tid = thread.tid,
                            "thread could not be detached; it is let go when this thread ends"
                        ),
                    }
                }
            }
        }
        if std::mem::take(&mut self.stopped_by_signal) {
            let _ = sys::pidfd_send_signal(&self.pidfd, libc::SIGSTOP);
        }
        settled
    }

    /// Kills the process: the last resort when its registers or memory cannot be made right.
    pub fn kill(&self) {
        let _ = sys::pidfd_send_signal(&self.pidfd, libc::SIGKILL);
    }
}

impl Drop for SeizedProcess {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::error!(pid = self.pid, %error, "process killed: it could not be let go unharmed");
        }
    }
}

/// ESRCH: the thread has exited, or is exiting.
fn is_exited(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESRCH)
}

fn list_threads(pid: i32) -> io::Result<Vec<i32>> {
    let mut tids = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        if let Some(tid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) {
            tids.push(tid);
        }
    }
    Ok(tids)
}

/// The state letter of a thread, `None` if it is gone.
fn thread_state(pid: i32, tid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    // The name may hold anything, parentheses too; the state follows its end.
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Whether the process is in a cgroup that the v1 freezer holds frozen.
fn frozen_v1(pid: i32) -> bool {
    let Ok(groups) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else { return false };
    groups
        .lines()
        .filter_map(|line| line.split_once(':')?.1.strip_prefix("freezer:"))
        .filter_map(|path| {
            fs::read_to_string(format!("/sys/fs/cgroup/freezer{path}/freezer.state")).ok()
        })
        .any(|state| state.trim() != "THAWED")
}
