//! Registers and instructions of x86_64: everything a second architecture has to supply.

use std::io;

/// The `syscall` instruction.
pub const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// Code segment of 64-bit user code; 0x23 is 32-bit code.
const USER_CS_64: u64 = 0x33;

/// The general registers of a stopped thread.
///
/// Vector and floating-point registers are not here: the kernel keeps them across a system
/// call, and nothing else runs between saving and restoring.
#[derive(Clone, Copy)]
pub struct Registers(libc::user_regs_struct);

impl Registers {
    /// Reads the registers of a thread in a ptrace stop.
    pub fn read(tid: i32) -> io::Result<Self> {
        // SAFETY: user_regs_struct is plain integers, for which zero is a valid value.
        let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        // SAFETY: PTRACE_GETREGS writes one user_regs_struct to the data pointer.
        let result = unsafe { libc::ptrace(libc::PTRACE_GETREGS, tid, 0, &mut regs) };
        crate::sys::check(result).map(|_| Self(regs))
    }

    /// Sets the registers of a thread in a ptrace stop.
    pub fn write(&self, tid: i32) -> io::Result<()> {
        // SAFETY: PTRACE_SETREGS reads one user_regs_struct from the data pointer.
        let result = unsafe { libc::ptrace(libc::PTRACE_SETREGS, tid, 0, &self.0) };
        crate::sys::check(result).map(drop)
    }

    /// Whether the thread runs 64-bit code at this moment.
    pub fn is_native(&self) -> bool {
        self.0.cs == USER_CS_64
    }

    /// The result of the system call that just ended.
    pub fn result(&self) -> i64 {
        self.0.rax as i64
    }

    /// These registers, changed so that the thread runs system call `nr` by the instruction
    /// at `ip`. No system call counts as interrupted (`orig_rax` -1): otherwise the kernel
    /// would apply its restart rules to the new registers.
    pub fn with_syscall(&self, ip: u64, nr: i64, args: [u64; 6]) -> Self {
        let mut regs = self.0;
        regs.rip = ip;
        regs.rax = nr as u64;
        regs.orig_rax = u64::MAX;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        // The trap and direction flags would make the kernel report a step, or matter to it
        // not at all; a clean set leaves nothing to chance.
        regs.eflags &= !0x500;
        Self(regs)
    }

    /// Turns the EINTR of an interrupted wait into a restart; returns whether it did.
    ///
    /// The kernel answers EINTR from a few waiting calls whenever the thread was woken by
    /// anything like a signal, even if no handler will run: by SIGSTOP and SIGCONT
    /// (signal(7)), by the freezer, by `PTRACE_INTERRUPT`. `-ERESTARTNOHAND` in its place means
    /// what the caller of such a wait expects: EINTR if a handler runs, else the wait goes on.
    /// Each of the calls had no effect yet when it returned EINTR.
    pub fn restart_interrupted_wait(&mut self) -> bool {
        const EINTR: i64 = -(libc::EINTR as i64);
        const ERESTARTNOHAND: i64 = -514;
        // libc leaves this one out.
        const IO_PGETEVENTS: i64 = 333;
        const WAITS: [i64; 14] = [
            libc::SYS_epoll_wait,
            libc::SYS_epoll_pwait,
            libc::SYS_epoll_pwait2,
            libc::SYS_semop,
            libc::SYS_semtimedop,
            libc::SYS_rt_sigtimedwait,
            libc::SYS_io_getevents,
            IO_PGETEVENTS,
            libc::SYS_accept,
            libc::SYS_accept4,
            libc::SYS_recvfrom,
            libc::SYS_recvmsg,
            libc::SYS_read,
            libc::SYS_readv,
        ];
        if self.result() != EINTR || !WAITS.contains(&(self.0.orig_rax as i64)) {
            return false;
        }
        self.0.rax = ERESTARTNOHAND as u64;
        true
    }
}
