//! Running system calls in a stopped process.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::rseq::CriticalSection;
use super::stop::{self, Stop, Waiter};
use super::{SeizedProcess, is_exited};
use crate::arch::{Registers, SYSCALL_INSTRUCTION};
use crate::mappings::{MappingKind, Mappings};
use crate::sys::{PAGE_SIZE, SyscallUserDispatch};

/// Bytes of the scratch area: a page for structures, and a full vector of 1,024 ranges.
const SCRATCH_SIZE: u64 = PAGE_SIZE + 1024 * 16;

/// Why a system call could not be injected.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// The process has exited.
    #[error("process {0} is gone")]
    Gone(i32),
    /// The call did not come back in time. The thread was led back to where it was.
    #[error(
        "injected system call {nr} in process {pid} did not return within {waited:?}; \
         a frozen cgroup must be thawed for it"
    )]
    TimedOut {
        /// The process.
        pid: i32,
        /// The system call's number.
        nr: i64,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The thread could not be led back to where it was; the process is killed.
    #[error("thread {tid} of process {pid} could not be brought back to its interrupted state")]
    Lost {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
    },
    /// It runs 32-bit code.
    #[error("process {0} runs 32-bit code, into which no calls can be injected")]
    Not64Bit(i32),
    /// No `syscall` instruction was found in its executable mappings.
    #[error("process {0} maps no code with a system call instruction")]
    NoSyscallInstruction(i32),
    /// Its system calls go to a handler of its own (`PR_SET_SYSCALL_USER_DISPATCH`).
    #[error("process {0} dispatches its own system calls (PR_SET_SYSCALL_USER_DISPATCH)")]
    SyscallUserDispatch(i32),
    /// Its seccomp filter cannot be suspended.
    #[error(
        "the seccomp filter of process {pid} cannot be suspended: it needs CAP_SYS_ADMIN, \
         CONFIG_CHECKPOINT_RESTORE, and no seccomp filter on this process: {source}"
    )]
    Seccomp {
        /// The process.
        pid: i32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The injected call returned an error.
    #[error("{call} in process {pid}: {source}")]
    Call {
        /// The process.
        pid: i32,
        /// The system call's name.
        call: &'static str,
        /// What it returned.
        source: io::Error,
    },
    /// Any other failure of a system call of this process.
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

/// Memory in the target for the arguments of injected calls: a shared mapping, so that it can
/// never merge with one of the process's own, nor be taken for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scratch {
    /// Its address in the target.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// A thread that runs injected calls, and all that is needed to lead it back.
pub(super) struct Injection {
    tid: i32,
    saved: Registers,
    signal_mask: u64,
    critical_section: Option<CriticalSection>,
    memory: File,
    syscall_ip: u64,
    /// Whether the thread has been resumed since its registers were saved.
    moved: bool,
}

impl SeizedProcess {
    /// Makes the process run one system call and returns what it returned: a value from -4095
    /// to -1 is an error number.
    ///
    /// The thread stays away from its own code until [`settle`](Self::settle), detach or drop.
    /// All its signals are blocked meanwhile, a seccomp filter is suspended.
    ///
    /// # Errors
    /// See [`InjectError`]. Not for errors of the call itself.
    pub fn inject_syscall(&mut self, nr: i64, args: [u64; 6]) -> Result<i64, InjectError> {
        self.inject_syscall_with(nr, args, &mut || false)
    }

    /// Like [`inject_syscall`](Self::inject_syscall); `meanwhile` runs again and again until
    /// the call returns, and must not block; it says
    /// whether it had something to do. For calls that wait for something the caller does.
    ///
    /// # Errors
    /// As for [`inject_syscall`](Self::inject_syscall).
    pub fn inject_syscall_with(
        &mut self,
        nr: i64,
        args: [u64; 6],
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> Result<i64, InjectError> {
        self.prepare()?;
        let result = self.run(nr, args, meanwhile);
        if result.is_err() {
            // Somewhere in the middle of a call, from where no other can begin.
            self.lead_back()?;
        }
        result
    }

    /// Like [`inject_syscall`](Self::inject_syscall), with an error of the call as an error.
    ///
    /// # Errors
    /// See [`InjectError`]; [`InjectError::Call`] for the call's own.
    pub fn call(
        &mut self,
        name: &'static str,
        nr: i64,
        args: [u64; 6],
    ) -> Result<u64, InjectError> {
        let result = self.inject_syscall(nr, args)?;
        self.checked(name, result)
    }

    pub(crate) fn checked(&self, name: &'static str, result: i64) -> Result<u64, InjectError> {
        if (-4095..0).contains(&result) {
            let source = io::Error::from_raw_os_error(-result as i32);
            return Err(InjectError::Call { pid: self.pid, call: name, source });
        }
        Ok(result as u64)
    }

    /// The scratch area, mapped on first use and unmapped by [`settle`](Self::settle).
    ///
    /// # Errors
    /// See [`InjectError`]; ENOMEM from `mmap` if the process's address space is used up. If it is
    /// not known whether the call was made, the process is killed.
    pub fn scratch(&mut self) -> Result<Scratch, InjectError> {
        self.prepare()?;
        if let Some(scratch) = self.scratch {
            return Ok(scratch);
        }
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
        let args = [0, SCRATCH_SIZE, protection, flags, u64::MAX, 0];
        let mapped = self.call("mmap", libc::SYS_mmap, args);
        if matches!(&mapped, Err(error) if !matches!(error, InjectError::Call { .. })) {
            // Nobody knows whether and where it is mapped, to take it away again.
            self.kill();
        }
        let address = mapped?;
        let scratch = Scratch { address, size: SCRATCH_SIZE };
        self.scratch = Some(scratch);
        Ok(scratch)
    }

    /// Writes to the target's memory, for arguments of injected calls.
    ///
    /// # Errors
    /// [`InjectError::Os`] if the address is not mapped.
    pub fn write_memory(&mut self, address: u64, bytes: &[u8]) -> Result<(), InjectError> {
        self.prepare()?;
        let pid = self.pid;
        self.injection
            .as_ref()
            .expect("prepared above")
            .memory
            .write_all_at(bytes, address)
            .map_err(|source| InjectError::Os { pid, operation: "writing memory", source })
    }

    /// Reads from the target's memory, for results of injected calls.
    ///
    /// # Errors
    /// [`InjectError::Os`] if the address is not mapped.
    pub fn read_memory(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), InjectError> {
        self.prepare()?;
        let pid = self.pid;
        self.injection
            .as_ref()
            .expect("prepared above")
            .memory
            .read_exact_at(bytes, address)
            .map_err(|source| InjectError::Os { pid, operation: "reading memory", source })
    }

    /// Ends injected work: unmaps the scratch area, and leads the thread back to the stop it
    /// was found in, with its registers and its signal mask. Nothing happens if no call was
    /// injected. It works on a frozen process only if no scratch area is mapped.
    ///
    /// # Errors
    /// See [`InjectError`]; after [`InjectError::Lost`] the process must be killed.
    pub fn settle(&mut self) -> Result<(), InjectError> {
        let mut unmapped = Ok(());
        // A second time where the first did not work: what stays mapped stays for good.
        for _ in 0..2 {
            let Some(scratch) = self.scratch else { break };
            let args = [scratch.address, scratch.size, 0, 0, 0, 0];
            unmapped = self.call("munmap", libc::SYS_munmap, args).map(drop);
            if unmapped.is_ok() {
                self.scratch = None;
            }
        }
        self.lead_back()?;
        unmapped
    }

    /// Chooses a thread and makes it ready for injected calls.
    fn prepare(&mut self) -> Result<(), InjectError> {
        if self.injection.is_some() {
            return Ok(());
        }
        let pid = self.pid;
        let os = |operation| {
            move |source: io::Error| match is_exited(&source) {
                true => InjectError::Gone(pid),
                false => InjectError::Os { pid, operation, source },
            }
        };
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .map_err(os("opening its memory"))?;
        let (tid, critical_section) = self.choose_thread(&memory)?;
        let saved = Registers::read(tid).map_err(os("reading registers"))?;
        if !saved.is_native() {
            return Err(InjectError::Not64Bit(pid));
        }
        if dispatches_own_syscalls(tid) {
            return Err(InjectError::SyscallUserDispatch(pid));
        }
        let syscall_ip = find_syscall_instruction(pid, &memory)?;
        let signal_mask = stop::signal_mask(tid).map_err(os("reading the signal mask"))?;
        self.kill_with_tracer();
        self.set_injection_options(tid)?;
        stop::set_signal_mask(tid, u64::MAX).map_err(os("setting the signal mask"))?;
        self.injection = Some(Injection {
            tid,
            saved,
            signal_mask,
            critical_section,
            memory,
            syscall_ip,
            moved: false,
        });
        Ok(())
    }

    /// The first thread outside of any restartable sequence, else any.
    fn choose_thread(&self, memory: &File) -> Result<(i32, Option<CriticalSection>), InjectError> {
        let mut choice = None;
        for thread in &self.threads {
            let section = CriticalSection::of(memory, thread.tid);
            choice = Some((thread.tid, section));
            if section.is_none() {
                break;
            }
        }
        choice.ok_or(InjectError::Gone(self.pid))
    }

    fn set_injection_options(&self, tid: i32) -> Result<(), InjectError> {
        let pid = self.pid;
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
        let filtered = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status"))
            .map_err(|_| InjectError::Gone(pid))?
            .lines()
            .any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() != "0"));
        let result = if filtered {
            stop::set_options(tid, options | libc::PTRACE_O_SUSPEND_SECCOMP)
        } else {
            stop::set_options(tid, options)
        };
        result.map_err(|source| match is_exited(&source) {
            true => InjectError::Gone(pid),
            false if filtered => InjectError::Seccomp { pid, source },
            false => InjectError::Os { pid, operation: "PTRACE_SETOPTIONS", source },
        })
    }

    fn run(
        &mut self,
        nr: i64,
        args: [u64; 6],
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> Result<i64, InjectError> {
        let pid = self.pid;
        let waited = self.options.call_deadline;
        let injection = self.injection.as_mut().expect("prepared by the caller");
        let tid = injection.tid;
        let os = |operation| {
            move |source: io::Error| match is_exited(&source) {
                true => InjectError::Gone(pid),
                false => InjectError::Os { pid, operation, source },
            }
        };
        injection
            .saved
            .with_syscall(injection.syscall_ip, nr, args)
            .write(tid)
            .map_err(os("setting registers"))?;
        injection.moved = true;
        let until = Instant::now() + waited;
        // Two stops: entry and exit.
        for _ in 0..2 {
            stop::resume(libc::PTRACE_SYSCALL, tid, 0).map_err(os("resuming"))?;
            loop {
                match Waiter::until(until).wait(pid, tid, meanwhile) {
                    Some(Stop::Syscall) => break,
                    Some(stop) => {
                        match stop {
                            Stop::Exited => return Err(InjectError::Gone(pid)),
                            Stop::Signal(libc::SIGSTOP) => self.stopped_by_signal = true,
                            _ => {}
                        }
                        stop::resume(libc::PTRACE_SYSCALL, tid, 0).map_err(os("resuming"))?;
                    }
                    None => return Err(InjectError::TimedOut { pid, nr, waited }),
                }
            }
        }
        Ok(Registers::read(tid).map_err(os("reading registers"))?.result())
    }

    /// Brings the injecting thread back to a stop in the kernel's signal loop, where it was
    /// found, with the registers it had.
    ///
    /// From the exit of a system call that is one more resume: with an interrupt pending, the
    /// thread enters the signal loop on its way to user space and stops there, before any
    /// instruction. It gets there with registers that mean nothing to the kernel: no call to
    /// restart, and none to run should it still be at the entry of one. Its own are set in the
    /// loop, from where the kernel's restart rules apply to them.
    ///
    /// Any stop uses up the interrupt, such as the one at the exit of a call that it has ended: what
    /// is not its own is left with another one pending.
    ///
    /// Where that fails the process is killed, even if the kernel says that it is gone: a thread
    /// with registers that are not its own must not be let go.
    fn lead_back(&mut self) -> Result<(), InjectError> {
        let Some(injection) = self.injection.take() else { return Ok(()) };
        self.lead_back_from(&injection).inspect_err(|_| self.kill())
    }

    fn lead_back_from(&mut self, injection: &Injection) -> Result<(), InjectError> {
        let (pid, tid) = (self.pid, injection.tid);
        let lost = |source: io::Error| match is_exited(&source) {
            true => InjectError::Gone(pid),
            false => InjectError::Lost { pid, tid },
        };
        if injection.moved {
            const NO_CALL: i64 = -1;
            let neutral = injection.saved.with_syscall(injection.syscall_ip, NO_CALL, [0; 6]);
            stop::interrupt(tid).map_err(lost)?;
            let until = Instant::now() + self.options.call_deadline;
            loop {
                match Waiter::until(until).wait(pid, tid, &mut || false) {
                    Some(Stop::Event) => break,
                    Some(Stop::Exited) => return Err(InjectError::Gone(pid)),
                    Some(Stop::Signal(libc::SIGSTOP)) => self.stopped_by_signal = true,
                    Some(Stop::Signal(_) | Stop::Syscall) if Instant::now() < until => {}
                    _ => return Err(InjectError::Lost { pid, tid }),
                }
                neutral.write(tid).map_err(lost)?;
                stop::interrupt(tid).map_err(lost)?;
                stop::resume(libc::PTRACE_CONT, tid, 0).map_err(lost)?;
            }
        }
        injection.saved.write(tid).map_err(lost)?;
        if let Some(section) = injection.critical_section {
            section.put_back(&injection.memory).map_err(lost)?;
        }
        stop::set_signal_mask(tid, injection.signal_mask).map_err(lost)
    }
}

/// Whether the thread's system calls would not reach the kernel (since 5.11; the request to
/// ask is younger, 6.4, and older kernels are taken at their users' word).
fn dispatches_own_syscalls(tid: i32) -> bool {
    let mut config = SyscallUserDispatch::default();
    // SAFETY: the request writes as many bytes as the address argument says.
    let result = unsafe {
        libc::ptrace(
            libc::PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG,
            tid,
            size_of::<SyscallUserDispatch>(),
            &mut config,
        )
    };
    result == 0 && config.mode != 0
}

/// The address of a system call instruction in the target: in the vDSO, else in any code.
fn find_syscall_instruction(pid: i32, memory: &File) -> Result<u64, InjectError> {
    if let Some(found) = vdso_base(pid).and_then(|base| search(memory, base..base + VDSO_SIZE)) {
        return Ok(found);
    }
    let mappings = Mappings::read(pid).map_err(|_| InjectError::Gone(pid))?;
    mappings
        .iter()
        .filter(|mapping| mapping.executable && mapping.readable)
        .filter(|mapping| mapping.name == "[vdso]" || mapping.kind != MappingKind::Special)
        .find_map(|mapping| search(memory, mapping.range()))
        .ok_or(InjectError::NoSyscallInstruction(pid))
}

/// Bytes of the vDSO searched: it has two pages of code, the calls are in the first.
const VDSO_SIZE: u64 = 2 * PAGE_SIZE;

/// Where the kernel put the vDSO, from the auxiliary vector. The process may have moved it
/// since, so what is found there has to be looked at.
fn vdso_base(pid: i32) -> Option<u64> {
    let vector = fs::read(format!("/proc/{pid}/auxv")).ok()?;
    vector.chunks_exact(16).find_map(|entry| {
        let (kind, value) = entry.split_at(8);
        let kind = u64::from_ne_bytes(kind.try_into().ok()?);
        (kind == libc::AT_SYSINFO_EHDR)
            .then(|| u64::from_ne_bytes(value.try_into().unwrap_or([0; 8])))
    })
}

fn search(memory: &File, range: Range<u64>) -> Option<u64> {
    const CHUNK: u64 = 64 * 1024;
    let mut chunk = vec![0; CHUNK.min(range.end - range.start) as usize];
    for start in (range.start..range.end).step_by(CHUNK as usize) {
        let bytes = &mut chunk[..(range.end - start).min(CHUNK) as usize];
        // What cannot be read to its end may still hold the instruction at its start.
        let read = memory.read_at(bytes, start).unwrap_or(0);
        let found = bytes[..read]
            .windows(SYSCALL_INSTRUCTION.len())
            .position(|window| window == SYSCALL_INSTRUCTION);
        if let Some(offset) = found {
            return Some(start + offset as u64);
        }
    }
    None
}
