//! The child's side: carries out a [`Plan`] between the clone and the program.
//!
//! The parent has other threads, so the child's copy of memory may hold locks that nobody will
//! ever release. Nothing here allocates, takes a lock or can panic, and system calls are made
//! directly: some of glibc's wrappers (`setresuid`) signal every thread they believe to exist.

use std::ffi::{CStr, c_char, c_long, c_void};
use std::mem::size_of;
use std::os::fd::RawFd;
use std::ptr::{null, null_mut};

use crate::plan::{HOST, Plan, Step};

/// What the child tells the parent: it waits at a step (`errno` is 0), or a step failed.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Report {
    pub step: u32,
    pub errno: i32,
}

pub(crate) const REPORT_BYTES: usize = size_of::<Report>();

impl Report {
    pub fn to_bytes(self) -> [u8; REPORT_BYTES] {
        let mut bytes = [0; REPORT_BYTES];
        let (step, errno) = bytes.split_at_mut(4);
        step.copy_from_slice(&self.step.to_ne_bytes());
        errno.copy_from_slice(&self.errno.to_ne_bytes());
        bytes
    }

    pub fn from_bytes([a, b, c, d, e, f, g, h]: [u8; REPORT_BYTES]) -> Self {
        Self { step: u32::from_ne_bytes([a, b, c, d]), errno: i32::from_ne_bytes([e, f, g, h]) }
    }
}

/// `argv` and `envp` as the kernel wants them, pointing into a [`Plan`].
pub(crate) struct Vectors {
    args: Vec<*const c_char>,
    env: Vec<*const c_char>,
}

impl Vectors {
    pub fn new(plan: &Plan) -> Self {
        let pointers = |strings: &[std::ffi::CString]| {
            strings.iter().map(|s| s.as_ptr()).chain([null()]).collect()
        };
        Self { args: pointers(&plan.args), env: pointers(&plan.env) }
    }
}

type Outcome = Result<(), i32>;

/// Carries out the plan. Ends in the program, or reports the failed step and exits with 127.
///
/// # Safety
/// To be called in a freshly cloned child with memory of its own. `vectors` was made from `plan`,
/// and `channel` is the child's end of the socket to the parent.
pub(crate) unsafe fn run(plan: &Plan, vectors: &Vectors, channel: RawFd) -> ! {
    for (step, index) in plan.steps.iter().zip(0u32..) {
        // SAFETY: the caller's promise is passed on.
        if let Err(errno) = unsafe { carry_out(step, index, vectors, channel) } {
            send(channel, Report { step: index, errno }).ok();
            break;
        }
    }
    loop {
        // SAFETY: ends the process.
        unsafe { libc::syscall(libc::SYS_exit_group, 127) };
    }
}

/// A raw system call whose arguments are integers, or pointers that are valid for the call. All are
/// widened to whole registers.
macro_rules! call {
    ($number:expr $(, $argument:expr)* $(,)?) => {
        // SAFETY: every pointer given is to a live value of the type that the call wants, and no
        // call here changes memory that Rust believes to be constant.
        answer(unsafe { libc::syscall($number $(, $argument as c_long)*) })
    };
}

fn answer(result: c_long) -> Result<c_long, i32> {
    if result >= 0 {
        return Ok(result);
    }
    // SAFETY: the address of this thread's errno is always valid.
    Err(unsafe { *libc::__errno_location() })
}

fn send(channel: RawFd, report: Report) -> Outcome {
    let bytes = report.to_bytes();
    call!(libc::SYS_write, channel, bytes.as_ptr(), bytes.len()).map(drop)
}

/// Tells the parent that this step is reached and waits for its word. If the parent has gone, so
/// does the child.
fn rendezvous(channel: RawFd, index: u32) -> Outcome {
    send(channel, Report { step: index, errno: 0 })?;
    let mut word = [0u8; 1];
    match call!(libc::SYS_read, channel, word.as_mut_ptr(), word.len())? {
        0 => Err(libc::EPIPE),
        _ => Ok(()),
    }
}

/// # Safety
/// As [`run`].
unsafe fn carry_out(step: &Step, index: u32, vectors: &Vectors, channel: RawFd) -> Outcome {
    match step {
        Step::CloseDescriptors(ranges) => ranges
            .iter()
            .try_for_each(|(from, to)| call!(libc::SYS_close_range, *from, *to, 0).map(drop)),
        Step::ResetSignals => reset_signals(),
        Step::JoinCgroup { tasks, .. } => {
            call!(libc::SYS_write, *tasks, c"0".as_ptr(), 1usize)?;
            call!(libc::SYS_close, *tasks).map(drop)
        }
        Step::Descriptor { from, to } => move_descriptor(*from, *to),
        Step::Session => call!(libc::SYS_setsid).map(drop),
        Step::OrdinaryPriority => {
            let none = 0i32;
            call!(libc::SYS_sched_setscheduler, 0, libc::SCHED_OTHER, &raw const none)?;
            match call!(libc::SYS_setpriority, libc::PRIO_PROCESS, 0, 0) {
                // From below, which takes a capability that root may lack, and does no harm.
                Ok(_) | Err(libc::EACCES | libc::EPERM) => Ok(()),
                Err(e) => Err(e),
            }
        }
        Step::ResourceLimit { resource, soft, hard, .. } => {
            let limit = libc::rlimit64 { rlim_cur: *soft, rlim_max: *hard };
            let none = null_mut::<libc::rlimit64>();
            call!(libc::SYS_prlimit64, 0, *resource, &raw const limit, none).map(drop)
        }
        Step::NoGroups => call!(libc::SYS_setgroups, 0, null::<libc::gid_t>()).map(drop),
        Step::PrivateMounts => mount(c"none", c"/", c"", libc::MS_REC | libc::MS_PRIVATE, c""),
        Step::NewRoot { options } => new_root(options),
        Step::Directory { path, mode } => {
            call!(libc::SYS_mkdirat, libc::AT_FDCWD, path.as_ptr(), *mode).map(drop)
        }
        Step::File { path, contents } => make_file(path, contents),
        Step::Device { path, major, minor } => {
            let mode = libc::S_IFCHR | 0o666;
            let device = libc::makedev(*major, *minor);
            call!(libc::SYS_mknodat, libc::AT_FDCWD, path.as_ptr(), mode, device).map(drop)
        }
        Step::Link { path, target } => {
            call!(libc::SYS_symlinkat, target.as_ptr(), libc::AT_FDCWD, path.as_ptr()).map(drop)
        }
        Step::NullStdin => {
            let fd = open(c"/dev/null", libc::O_RDONLY)?;
            if fd == 0 { Ok(()) } else { move_descriptor(fd, 0) }
        }
        Step::Filesystem { kind, target, flags, options } => {
            mount(kind, target, kind, *flags, options)
        }
        Step::Bind { source, target, attributes } => {
            mount(source, target, c"", libc::MS_BIND | libc::MS_REC, c"")?;
            set_attributes(target, *attributes, libc::AT_RECURSIVE)
        }
        Step::OomScore { value } => {
            let fd = open(c"/proc/self/oom_score_adj", libc::O_WRONLY)?;
            call!(libc::SYS_write, fd, value.as_ptr(), value.as_bytes().len())?;
            call!(libc::SYS_close, fd).map(drop)
        }
        Step::LeaveHost => {
            let host = host()?;
            call!(libc::SYS_umount2, host.as_ptr(), libc::MNT_DETACH)?;
            call!(libc::SYS_unlinkat, libc::AT_FDCWD, host.as_ptr(), libc::AT_REMOVEDIR).map(drop)
        }
        Step::SealRoot => set_attributes(
            c"/",
            libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC,
            0,
        ),
        Step::UserNamespace => call!(libc::SYS_unshare, libc::CLONE_NEWUSER).map(drop),
        Step::AwaitUserMap | Step::AwaitStart => rendezvous(channel, index),
        Step::Namespaces => call!(
            libc::SYS_unshare,
            libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP
        )
        .map(drop),
        Step::Loopback => loopback_up(),
        Step::HostName(name) => {
            call!(libc::SYS_sethostname, name.as_ptr(), name.as_bytes().len()).map(drop)
        }
        Step::NoBoundingSet => empty_bounding_set(),
        Step::User { uid } => {
            call!(libc::SYS_setresgid, *uid, *uid, *uid)?;
            call!(libc::SYS_setresuid, *uid, *uid, *uid).map(drop)
        }
        Step::NoCapabilities => drop_capabilities(),
        Step::NoNewPrivileges => prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0),
        Step::WorkingDirectory(path) => call!(libc::SYS_chdir, path.as_ptr()).map(drop),
        Step::DieWithParent => prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL.into(), 0),
        Step::FixedLayout => {
            call!(libc::SYS_personality, libc::ADDR_NO_RANDOMIZE as c_long).map(drop)
        }
        Step::FilterSystemCalls(program) => {
            let program =
                libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
            call!(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program).map(drop)
        }
        Step::Execute { programs, .. } => execute(programs, vectors),
    }
}

fn open(path: &CStr, flags: i32) -> Result<RawFd, i32> {
    call!(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0).map(|fd| fd as RawFd)
}

/// Makes `from` the descriptor `to` and closes `from`, which is another one.
fn move_descriptor(from: RawFd, to: RawFd) -> Outcome {
    call!(libc::SYS_dup3, from, to, 0)?;
    call!(libc::SYS_close, from).map(drop)
}

fn mount(source: &CStr, target: &CStr, kind: &CStr, flags: u64, options: &CStr) -> Outcome {
    let options: *const c_void = options.as_ptr().cast();
    call!(libc::SYS_mount, source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, options)
        .map(drop)
}

fn set_attributes(target: &CStr, attributes: u64, flags: i32) -> Outcome {
    let set = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    call!(
        libc::SYS_mount_setattr,
        libc::AT_FDCWD,
        target.as_ptr(),
        flags,
        &raw const set,
        size_of::<libc::mount_attr>()
    )
    .map(drop)
}

/// The signals that the clone left alone are those that the parent ignores (Rust programs ignore
/// SIGPIPE); programs expect otherwise.
fn reset_signals() -> Outcome {
    // A kernel sigaction of zeros is the default action.
    let default = [0u64; 4];
    for signal in 1..=64 {
        let old = null_mut::<c_void>();
        match call!(libc::SYS_rt_sigaction, signal, default.as_ptr(), old, size_of::<u64>()) {
            // SIGKILL and SIGSTOP.
            Ok(_) | Err(libc::EINVAL) => {}
            Err(e) => return Err(e),
        }
    }
    let none = 0u64;
    let old = null_mut::<u64>();
    call!(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, old, size_of::<u64>())
        .map(drop)
}

/// [`HOST`] as the kernel wants it.
fn host() -> Result<&'static CStr, i32> {
    const WITH_ZERO: &CStr = c"/.host";
    if WITH_ZERO.to_bytes() == HOST.as_bytes() { Ok(WITH_ZERO) } else { Err(libc::EINVAL) }
}

/// Mounts an empty file system, makes it the root, and puts the old root below it. The mount point
/// only serves for a moment; `/proc` is a directory that every host has.
fn new_root(options: &CStr) -> Outcome {
    call!(libc::SYS_umask, 0)?;
    mount(c"tmpfs", c"/proc", c"tmpfs", libc::MS_NOSUID, options)?;
    call!(libc::SYS_chdir, c"/proc".as_ptr())?;
    call!(libc::SYS_mkdirat, libc::AT_FDCWD, c".host".as_ptr(), 0o700)?;
    call!(libc::SYS_pivot_root, c".".as_ptr(), c".host".as_ptr())?;
    call!(libc::SYS_chdir, c"/".as_ptr())?;
    Ok(())
}

fn make_file(path: &CStr, contents: &[u8]) -> Outcome {
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC;
    let fd = call!(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0o444)?;
    let mut rest = contents;
    while !rest.is_empty() {
        let written = call!(libc::SYS_write, fd, rest.as_ptr(), rest.len())?;
        rest = rest.get(written as usize..).unwrap_or_default();
    }
    call!(libc::SYS_close, fd).map(drop)
}

fn loopback_up() -> Outcome {
    let fd = call!(libc::SYS_socket, libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0)?;
    // SAFETY: an interface request is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    call!(libc::SYS_ioctl, fd, libc::SIOCSIFFLAGS, &raw const request)?;
    call!(libc::SYS_close, fd).map(drop)
}

fn prctl(option: i32, a: c_long, b: c_long) -> Outcome {
    call!(libc::SYS_prctl, option, a, b, 0, 0).map(drop)
}

fn empty_bounding_set() -> Outcome {
    for capability in 0..64 {
        match prctl(libc::PR_CAPBSET_DROP, capability, 0) {
            Ok(()) => {}
            // Past the last one that this kernel knows.
            Err(libc::EINVAL) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn drop_capabilities() -> Outcome {
    /// `struct __user_cap_header_struct` of version 3, for the calling thread.
    const HEADER: [u32; 2] = [0x2008_0522, 0];
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL.into(), 0)?;
    let none = [0u32; 6];
    call!(libc::SYS_capset, HEADER.as_ptr(), none.as_ptr()).map(drop)
}

/// Runs the first candidate that is there. A candidate that may not be run counts only if no
/// other is found, as in a shell.
fn execute(programs: &[std::ffi::CString], vectors: &Vectors) -> Outcome {
    call!(libc::SYS_umask, 0o022)?;
    let mut error = libc::ENOENT;
    for program in programs {
        let result =
            call!(libc::SYS_execve, program.as_ptr(), vectors.args.as_ptr(), vectors.env.as_ptr());
        match result {
            Ok(_) => return Ok(()),
            Err(libc::ENOENT | libc::ENOTDIR) => {}
            Err(libc::EACCES) => error = libc::EACCES,
            Err(e) => return Err(e),
        }
    }
    Err(error)
}
