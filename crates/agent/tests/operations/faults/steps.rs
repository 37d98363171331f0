//! The steps of an operation, and what can go wrong at each.

use std::cell::RefCell;

use medes_faults::{Call, Verdict};

thread_local! {
    /// The name of the last step at which something was done.
    pub static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// What is done at one step of an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// A system call returns the error of this index in [`errors`].
    Error(usize),
    /// A system call that the sandbox is made to run fails.
    Injected,
    /// The sandbox's processes are killed just before a system call.
    Killed,
    /// The first of the sandbox's processes is killed just before a system call.
    LeaderKilled,
    /// A request arrives just before a system call.
    Cancelled,
}

/// Counts the steps of an operation, and does something at one of them.
pub struct Injector<'a> {
    pub fault: Fault,
    /// At which step; later than all of them for none.
    pub at: u64,
    /// What kills the sandbox, or cancels.
    pub act: &'a dyn Fn(),
    /// Steps so far at which there can be such a fault.
    pub steps: u64,
    /// What was done: the step's name, and how many different errors there are at it.
    pub hit: Option<(String, usize)>,
    last: Option<Call>,
}

impl<'a> Injector<'a> {
    pub fn new(fault: Fault, at: u64, act: &'a dyn Fn()) -> Self {
        Self { fault, at, act, steps: 0, hit: None, last: None }
    }

    pub fn judge(&mut self, call: &Call) -> Verdict {
        // What is asked again and again until the answer is another one is one step.
        if self.last.replace(*call) == Some(*call) {
            return Verdict::Go;
        }
        let is_step = match self.fault {
            Fault::Error(_) => !errors(call).is_empty(),
            Fault::Injected => call.injects().is_some(),
            Fault::Killed | Fault::LeaderKilled | Fault::Cancelled => true,
        };
        if !is_step {
            return Verdict::Go;
        }
        self.steps += 1;
        if self.steps - 1 != self.at {
            return Verdict::Go;
        }
        let errors = errors(call);
        self.hit = Some((name(call), errors.len()));
        LAST.replace(name(call));
        match self.fault {
            Fault::Error(n) => return Verdict::Fail(errors[n.min(errors.len() - 1)]),
            Fault::Injected => call.spoil_injected().expect("registers to spoil"),
            Fault::Killed | Fault::LeaderKilled | Fault::Cancelled => (self.act)(),
        }
        Verdict::Go
    }
}

/// The errors that a system call may return and that say something. Left out are those that only a
/// dead process gives rise to, where nothing but its death can: a living one's userfaultfd never
/// says ESRCH, and a signal to it is never refused. And closing a descriptor does not fail.
#[allow(non_upper_case_globals, reason = "libc names system calls so")]
fn errors(call: &Call) -> &'static [i32] {
    use libc::*;
    match call.number {
        SYS_close | SYS_pidfd_send_signal | SYS_kill | SYS_getppid | SYS_geteuid => &[],
        SYS_ptrace => &[ESRCH, EPERM, EIO],
        SYS_ioctl => match call.args[1] {
            UFFDIO_COPY => &[ENOMEM, EAGAIN, EFAULT],
            UFFDIO_ZEROPAGE => &[ENOMEM, EAGAIN],
            UFFDIO_WRITEPROTECT => &[EAGAIN, ENOMEM],
            UFFDIO_REGISTER => &[ENOMEM, EBUSY, EINVAL],
            UFFDIO_UNREGISTER => &[ENOMEM, EINVAL],
            PAGEMAP_SCAN => &[ENOMEM, EINTR],
            PROCMAP_QUERY => &[ENOTTY, ENOMEM],
            _ => &[EINVAL],
        },
        SYS_read | SYS_pread64 => &[EIO, EINTR, ENOMEM],
        SYS_write | SYS_pwrite64 => &[EIO, EINTR, EBUSY],
        SYS_openat | SYS_open => &[EMFILE, EACCES, ENOMEM],
        SYS_process_vm_readv => &[EFAULT, ENOMEM, EPERM],
        SYS_pidfd_open | SYS_pidfd_getfd | SYS_userfaultfd => &[EMFILE, EPERM],
        SYS_fcntl => &[EMFILE],
        SYS_clone | SYS_clone3 => &[EAGAIN],
        SYS_fallocate => &[EINTR, ENOMEM],
        SYS_kcmp => &[EPERM, ENOSYS],
        SYS_ppoll => &[EINTR, ENOMEM],
        SYS_waitid | SYS_wait4 => &[ECHILD],
        SYS_lseek => &[EINVAL],
        _ => &[ENOMEM],
    }
}

const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
const PAGEMAP_SCAN: u64 = 0xc060_6610;
const PROCMAP_QUERY: u64 = 0xc068_6611;

/// What a step is called in a report.
#[allow(non_upper_case_globals, reason = "libc names system calls so")]
fn name(call: &Call) -> String {
    use libc::*;
    if let Some(number) = call.injects() {
        return format!("injected {}", name_of(number));
    }
    match call.number {
        SYS_ptrace => match call.args[0] as u32 {
            PTRACE_SEIZE => "PTRACE_SEIZE".into(),
            PTRACE_INTERRUPT => "PTRACE_INTERRUPT".into(),
            PTRACE_SETOPTIONS => "PTRACE_SETOPTIONS".into(),
            PTRACE_GETREGS => "PTRACE_GETREGS".into(),
            PTRACE_SETREGS => "PTRACE_SETREGS".into(),
            PTRACE_GETSIGINFO => "PTRACE_GETSIGINFO".into(),
            PTRACE_GETSIGMASK => "PTRACE_GETSIGMASK".into(),
            PTRACE_SETSIGMASK => "PTRACE_SETSIGMASK".into(),
            PTRACE_GET_RSEQ_CONFIGURATION => "PTRACE_GET_RSEQ_CONFIGURATION".into(),
            PTRACE_SYSCALL => "PTRACE_SYSCALL".into(),
            PTRACE_CONT => "PTRACE_CONT".into(),
            PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG => "PTRACE_GET_SYSCALL_USER_DISPATCH".into(),
            PTRACE_DETACH => "PTRACE_DETACH".into(),
            other => format!("ptrace {other:#x}"),
        },
        SYS_ioctl => match call.args[1] {
            UFFDIO_API => "UFFDIO_API".into(),
            UFFDIO_REGISTER => "UFFDIO_REGISTER".into(),
            UFFDIO_UNREGISTER => "UFFDIO_UNREGISTER".into(),
            UFFDIO_WAKE => "UFFDIO_WAKE".into(),
            UFFDIO_COPY => "UFFDIO_COPY".into(),
            UFFDIO_ZEROPAGE => "UFFDIO_ZEROPAGE".into(),
            UFFDIO_WRITEPROTECT => "UFFDIO_WRITEPROTECT".into(),
            PAGEMAP_SCAN => "PAGEMAP_SCAN".into(),
            PROCMAP_QUERY => "PROCMAP_QUERY".into(),
            other => format!("ioctl {other:#x}"),
        },
        SYS_read | SYS_write | SYS_pread64 | SYS_pwrite64 => {
            let file = std::fs::read_link(format!("/proc/thread-self/fd/{}", call.args[0]));
            let file = file.unwrap_or_default();
            let file = file.file_name().unwrap_or_default().to_string_lossy();
            format!("{} {file}", name_of(call.number))
        }
        number => name_of(number),
    }
}

fn name_of(number: i64) -> String {
    let name = match number {
        libc::SYS_read => "read",
        libc::SYS_write => "write",
        libc::SYS_pread64 => "pread",
        libc::SYS_pwrite64 => "pwrite",
        libc::SYS_openat => "openat",
        libc::SYS_close => "close",
        libc::SYS_fcntl => "fcntl",
        libc::SYS_statx => "statx",
        libc::SYS_lseek => "lseek",
        libc::SYS_getdents64 => "getdents",
        libc::SYS_ppoll => "ppoll",
        libc::SYS_mmap => "mmap",
        libc::SYS_munmap => "munmap",
        libc::SYS_madvise => "madvise",
        libc::SYS_process_madvise => "process_madvise",
        libc::SYS_process_vm_readv => "process_vm_readv",
        libc::SYS_pidfd_open => "pidfd_open",
        libc::SYS_pidfd_getfd => "pidfd_getfd",
        libc::SYS_userfaultfd => "userfaultfd",
        libc::SYS_clone3 => "clone3",
        libc::SYS_clone => "clone",
        libc::SYS_kcmp => "kcmp",
        libc::SYS_waitid => "waitid",
        libc::SYS_fallocate => "fallocate",
        libc::SYS_setpriority => "setpriority",
        libc::SYS_sched_setscheduler => "sched_setscheduler",
        libc::SYS_ioctl => "ioctl",
        libc::SYS_readlink => "readlink",
        libc::SYS_newfstatat => "fstatat",
        _ => return format!("call {number}"),
    };
    name.into()
}
