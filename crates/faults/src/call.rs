//! A system call that is about to be made.

use std::io;
use std::os::unix::fs::FileExt;

/// What becomes of a system call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It is carried out.
    Go,
    /// It is not, and returns this error number.
    Fail(i32),
}

/// A system call that is about to be made.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Call {
    /// The thread that makes it.
    pub tid: i32,
    /// Its number.
    pub number: i64,
    /// Its arguments.
    pub args: [u64; 6],
}

/// Offsets of `rax` and `orig_rax` in `struct user_regs_struct`, and of the arguments in order.
const RAX: u64 = 10 * 8;
const ORIG_RAX: u64 = 15 * 8;
const ARGUMENTS: [u64; 6] = [14 * 8, 13 * 8, 12 * 8, 7 * 8, 9 * 8, 8 * 8];

impl Call {
    /// Calls that are never shown: a program's own bookkeeping (its heap, locks, threads' stacks
    /// and ends, clocks, sleep), which either can't fail or ends the program if it does; and
    /// poll(2), which is left to tests for waiting unseen.
    pub const SILENT: [i64; 28] = [
        libc::SYS_futex,
        libc::SYS_brk,
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_mprotect,
        libc::SYS_madvise,
        libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity,
        libc::SYS_nanosleep,
        libc::SYS_clock_nanosleep,
        libc::SYS_clock_gettime,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_set_robust_list,
        libc::SYS_set_tid_address,
        libc::SYS_rseq,
        libc::SYS_gettid,
        libc::SYS_getpid,
        libc::SYS_getrandom,
        libc::SYS_prctl,
        libc::SYS_poll,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_restart_syscall,
        libc::SYS_seccomp,
    ];

    /// The system call that a thread is made to run on somebody's behalf, if this is a
    /// `PTRACE_SETREGS` that sets its registers for one: `rax` names it, and no call counts as
    /// interrupted (`orig_rax` -1). The registers of a thread that was computing look the same, so
    /// this is for threads that were waiting in system calls.
    #[must_use]
    pub fn injects(&self) -> Option<i64> {
        if self.number != libc::SYS_ptrace || self.args[0] != u64::from(libc::PTRACE_SETREGS) {
            return None;
        }
        let memory = std::fs::File::open("/proc/self/mem").ok()?;
        let word = |offset: u64| {
            let mut bytes = [0; 8];
            memory.read_exact_at(&mut bytes, self.args[3] + offset).ok()?;
            Some(u64::from_ne_bytes(bytes))
        };
        let number = word(RAX)? as i64;
        (word(ORIG_RAX)? == u64::MAX && number >= 0).then_some(number)
    }

    /// Puts another call in the place of the one that [`Call::injects`] names: an mmap(2) of more
    /// than there can be, which fails with ENOMEM.
    ///
    /// # Errors
    /// If the registers can't be changed where they are about to be read.
    pub fn spoil_injected(&self) -> io::Result<()> {
        let memory = std::fs::File::options().write(true).open("/proc/self/mem")?;
        let set = |offset: u64, value: u64| {
            memory.write_all_at(&value.to_ne_bytes(), self.args[3] + offset)
        };
        set(RAX, libc::SYS_mmap as u64)?;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u64;
        let arguments = [0, 1 << 62, 0, flags, u64::MAX, 0];
        ARGUMENTS.iter().zip(arguments).try_for_each(|(offset, value)| set(*offset, value))
    }
}
