//! Stops of a single thread: making, waiting for, telling apart, leaving.

use std::io;
use std::time::{Duration, Instant};

use super::thread_state;
use crate::priority;
use crate::sys::{self, PTRACE_EVENT_STOP};

/// What a thread is stopped for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// `PTRACE_INTERRUPT`, or a group stop.
    Event,
    /// Entry to or exit from a system call.
    Syscall,
    /// About to handle this signal.
    Signal(i32),
    /// It has exited.
    Exited,
}

pub(super) fn seize(tid: i32) -> io::Result<()> {
    // SAFETY: PTRACE_SEIZE takes options, here none, and touches no memory of ours.
    sys::check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, tid, 0, 0) }).map(drop)
}

pub(super) fn interrupt(tid: i32) -> io::Result<()> {
    // SAFETY: PTRACE_INTERRUPT ignores address and data.
    sys::check(unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0) }).map(drop)
}

pub(super) fn set_options(tid: i32, options: i32) -> io::Result<()> {
    // SAFETY: PTRACE_SETOPTIONS takes flags and touches no memory of ours.
    let result = unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, tid, 0, i64::from(options)) };
    sys::check(result).map(drop)
}

/// Resumes a stopped thread by `PTRACE_CONT` or `PTRACE_SYSCALL`; `signal` 0 for none.
pub(super) fn resume(request: libc::c_uint, tid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: both requests take a signal number and touch no memory of ours.
    sys::check(unsafe { libc::ptrace(request, tid, 0, i64::from(signal)) }).map(drop)
}

pub(super) fn detach(tid: i32) -> io::Result<()> {
    detach_with(tid, 0)
}

pub(super) fn detach_with(tid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: PTRACE_DETACH takes a signal number and touches no memory of ours.
    sys::check(unsafe { libc::ptrace(libc::PTRACE_DETACH, tid, 0, i64::from(signal)) }).map(drop)
}

/// Takes the exit status of a traced thread that has exited.
pub(super) fn reap(tid: i32) {
    // SAFETY: siginfo_t is plain data, for which zero is a valid value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: waitid writes one siginfo_t.
    unsafe {
        libc::waitid(
            libc::P_PID,
            tid as libc::id_t,
            &mut info,
            libc::WEXITED | libc::WNOHANG | libc::__WALL,
        )
    };
}

/// The blocked signals of a stopped thread.
pub(super) fn signal_mask(tid: i32) -> io::Result<u64> {
    let mut mask = 0u64;
    // SAFETY: PTRACE_GETSIGMASK writes as many bytes as the address argument says.
    sys::check(unsafe { libc::ptrace(libc::PTRACE_GETSIGMASK, tid, size_of::<u64>(), &mut mask) })?;
    Ok(mask)
}

pub(super) fn set_signal_mask(tid: i32, mask: u64) -> io::Result<()> {
    // SAFETY: PTRACE_SETSIGMASK reads as many bytes as the address argument says.
    sys::check(unsafe { libc::ptrace(libc::PTRACE_SETSIGMASK, tid, size_of::<u64>(), &mask) })
        .map(drop)
}

/// The stop a thread is in, or `None` while it runs (or has exited).
///
/// Asked by `PTRACE_GETSIGINFO`, which succeeds in a stop only. A wait would do as well, but
/// its answer could be taken by another thread of this process that waits for children.
fn current(tid: i32) -> io::Result<Option<Stop>> {
    // SAFETY: siginfo_t is plain data, for which zero is a valid value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: PTRACE_GETSIGINFO writes one siginfo_t to the data pointer.
    let result = unsafe { libc::ptrace(libc::PTRACE_GETSIGINFO, tid, 0, &mut info) };
    match sys::check(result) {
        Ok(_) => {}
        Err(error) => {
            return match error.raw_os_error() {
                Some(libc::ESRCH | libc::EINVAL) => Ok(None),
                _ => Err(error),
            };
        }
    }
    const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;
    Ok(Some(match info.si_code {
        SYSCALL_STOP if info.si_signo == libc::SIGTRAP => Stop::Syscall,
        code if code >> 8 == PTRACE_EVENT_STOP => Stop::Event,
        _ => Stop::Signal(info.si_signo),
    }))
}

/// Waits for stops with a deadline, first spinning, then sleeping.
pub(super) struct Waiter {
    until: Instant,
    polls: u32,
}

impl Waiter {
    /// Polls that give way to other tasks but do not sleep: about 100 us.
    const SPINS: u32 = 200;
    const LONGEST_SLEEP: Duration = Duration::from_micros(500);
    /// Polls of a thread that is urgent: it gives way to nobody who is not. What it waits for may
    /// wait for its processor.
    const URGENT_SPINS: u32 = 80;
    /// How long it sleeps then: long enough for another to begin, which shorter ones are not.
    const URGENT_SLEEP: Duration = Duration::from_micros(40);

    pub(super) fn until(until: Instant) -> Self {
        Self { until, polls: 0 }
    }

    /// Waits until the thread is in a stop or has exited; `None` at the deadline. `meanwhile`
    /// runs before every poll; as long as it says that it had something to do, nobody sleeps.
    pub(super) fn wait(
        &mut self,
        pid: i32,
        tid: i32,
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> Option<Stop> {
        loop {
            if meanwhile() {
                // It is waited for at every step: sleeping would cost the steps' number of sleeps.
                self.polls = 0;
            }
            match current(tid) {
                Ok(Some(stop)) => return Some(stop),
                Ok(None) => {}
                Err(_) => return Some(Stop::Exited),
            }
            self.polls += 1;
            if self.polls < Self::SPINS {
                if self.polls >= Self::URGENT_SPINS && priority::is_urgent() {
                    std::thread::sleep(Self::URGENT_SLEEP);
                } else {
                    std::thread::yield_now();
                }
                continue;
            }
            if self.polls % 16 == 8 && matches!(thread_state(pid, tid), None | Some('Z' | 'X')) {
                return Some(Stop::Exited);
            }
            if Instant::now() >= self.until {
                return None;
            }
            let sleep = Duration::from_micros(u64::from(self.polls - Self::SPINS) * 5 + 10);
            std::thread::sleep(sleep.min(Self::LONGEST_SLEEP));
        }
    }
}
