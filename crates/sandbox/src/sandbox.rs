//! A sandbox's life as its parent sees it: create, start, wait, destroy.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use serde::{Deserialize, Serialize};

use crate::cgroup::{Cgroup, CgroupRoot};
use crate::child::{self, REPORT_BYTES, Report, Vectors};
use crate::error::SandboxError;
use crate::plan::{Descriptors, Plan, Step};
use crate::spec::{SANDBOX_UID, SandboxSpec};

/// How long making or starting a sandbox may take. It takes milliseconds; only a host that is
/// stuck (a source on a dead network file system) comes near this.
const SET_UP_LIMIT: Duration = Duration::from_secs(30);

/// How long the clean-up of a dropped sandbox may take.
const DROP_LIMIT: Duration = Duration::from_secs(5);

/// How a sandbox's first process ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exit {
    /// It exited with this status.
    Code(i32),
    /// This signal killed it. The kernel's out-of-memory killer uses SIGKILL; whether it was that
    /// one is told by [`crate::MemoryReading::oom_kills`].
    Signal(i32),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(number) => match Signal::try_from(*number) {
                Ok(signal) => write!(f, "killed by {signal}"),
                Err(_) => write!(f, "killed by signal {number}"),
            },
        }
    }
}

/// What every sandbox has, started or not: a first process, namespaces, a cgroup.
///
/// Dropping it kills the sandbox and removes its cgroup; [`Running::destroy`] does so too and
/// tells whether that worked.
#[derive(Debug)]
pub struct Sandbox {
    first: FirstProcess,
    network: OwnedFd,
}

/// A sandbox's first process and its cgroup, which both go when this is dropped.
#[derive(Debug)]
struct FirstProcess {
    id: String,
    pid: i32,
    pidfd: OwnedFd,
    cgroup: Cgroup,
    exit: Mutex<Option<Exit>>,
    removed: bool,
}

/// The child's plan, and the socket by which it tells how far it has come.
struct Progress {
    channel: OwnedFd,
    plan: Plan,
}

/// A sandbox that is complete but for its program.
pub struct Created {
    sandbox: Sandbox,
    progress: Progress,
}

/// A sandbox whose program runs or has ended.
#[derive(Debug)]
pub struct Running {
    sandbox: Sandbox,
}

impl Deref for Created {
    type Target = Sandbox;

    fn deref(&self) -> &Sandbox {
        &self.sandbox
    }
}

impl Deref for Running {
    type Target = Sandbox;

    fn deref(&self) -> &Sandbox {
        &self.sandbox
    }
}

impl fmt::Debug for Created {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Created").field("sandbox", &self.sandbox).finish_non_exhaustive()
    }
}

impl Sandbox {
    /// Makes a sandbox below `root`, everything but its program: when this returns, all
    /// namespaces, mounts and limits are in place, the loopback interface is up, and the first
    /// process, already without privileges, waits for [`Created::start`].
    ///
    /// The process's standard output and error go to `stdout` and `stderr`. No other descriptor of
    /// the caller is passed on. The call blocks for some milliseconds; it may be made from any
    /// thread of a program with many threads. Its cost grows with the caller's private memory,
    /// whose page tables the clone copies.
    ///
    /// # Errors
    /// [`SandboxError::Step`] names the step that failed. Nothing is left behind.
    pub fn create(
        root: &CgroupRoot,
        spec: &SandboxSpec,
        stdout: OwnedFd,
        stderr: OwnedFd,
    ) -> Result<Created, SandboxError> {
        spec.validate()?;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(SandboxError::system("making a socket pair"))?;
        let theirs = above_stdio(theirs)?;
        let stdout = above_stdio(stdout)?;
        let stderr = above_stdio(stderr)?;
        let cgroup = root.create(&spec.id, &spec.resources)?;
        let cloned = cgroup.open_v1_tasks().map_err(SandboxError::from).and_then(|tasks| {
            let tasks = tasks
                .into_iter()
                .map(|(path, fd)| Ok((path, above_stdio(fd)?)))
                .collect::<Result<Vec<_>, SandboxError>>()?;
            let descriptors = Descriptors {
                stdout: stdout.as_raw_fd(),
                stderr: stderr.as_raw_fd(),
                channel: theirs.as_raw_fd(),
                v1_tasks: tasks.iter().map(|(path, fd)| (path.clone(), fd.as_raw_fd())).collect(),
            };
            let plan = Plan::build(spec, &descriptors)?;
            let (pid, pidfd) = clone_child(&plan, theirs.as_raw_fd(), &cgroup)?;
            Ok((plan, pid, pidfd))
        });
        let (plan, pid, pidfd) = match cloned {
            Ok(all) => all,
            Err(e) => {
                cgroup.remove(DROP_LIMIT).ok();
                return Err(e);
            }
        };
        // Now the child alone holds its end, so that its death closes the channel.
        drop(theirs);
        // From here on, leaving early cleans up by dropping this value.
        let first = FirstProcess {
            id: spec.id.clone(),
            pid,
            pidfd,
            cgroup,
            exit: Mutex::new(None),
            removed: false,
        };
        let progress = Progress { channel: ours, plan };
        progress.reach(&first, |step| matches!(step, Step::AwaitUserMap))?;
        map_user(pid, spec.host_uid)?;
        progress.proceed()?;
        progress.reach(&first, |step| matches!(step, Step::AwaitStart))?;
        let network = File::open(format!("/proc/{pid}/ns/net"))
            .map_err(SandboxError::io("opening the network namespace"))?
            .into();
        Ok(Created { sandbox: Self { first, network }, progress })
    }

    /// The name given in the specification.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.first.id
    }

    /// The first process, as the caller's pid namespace numbers it. Valid until the process has
    /// ended and its status was taken.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.first.pid
    }

    /// A descriptor for the first process; readable once it has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.first.pidfd.as_fd()
    }

    /// The network namespace; see [`crate::in_network_namespace`].
    #[must_use]
    pub fn net_namespace(&self) -> BorrowedFd<'_> {
        self.network.as_fd()
    }

    /// The sandbox's cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.first.cgroup
    }

    /// How the first process ended; `None` while it runs. When it ends, the kernel kills all other
    /// processes of the sandbox before this tells so.
    ///
    /// # Errors
    /// If the caller is not the process's parent.
    pub fn wait_status(&self) -> Result<Option<Exit>, SandboxError> {
        self.first.wait_status()
    }

    /// Waits up to `limit` for the first process to end.
    ///
    /// # Errors
    /// [`SandboxError::Timeout`], or as [`Sandbox::wait_status`].
    pub fn wait(&self, limit: Duration) -> Result<Exit, SandboxError> {
        self.first.wait(limit)
    }
}

impl Created {
    /// Runs the program. Returns once the kernel has replaced the first process by it.
    ///
    /// # Errors
    /// [`SandboxError::Step`] if the program can't be executed. The sandbox is removed then.
    pub fn start(self) -> Result<Running, SandboxError> {
        self.progress.proceed()?;
        match self.progress.report()? {
            // Executing the program closes the child's end. So does the child's death, which the
            // caller sees as the sandbox's exit.
            None => Ok(Running { sandbox: self.sandbox }),
            Some(report) => Err(self.progress.failure(report)),
        }
    }

    /// Kills the first process and removes everything, waiting up to `limit`.
    ///
    /// # Errors
    /// As [`Running::destroy`].
    pub fn destroy(self, limit: Duration) -> Result<(), SandboxError> {
        self.sandbox.first.remove(limit)
    }
}

impl Running {
    /// Kills every process, frozen or not, and removes everything, waiting up to `limit` in all.
    ///
    /// # Errors
    /// If a process survives (it is in an uninterruptible system call) or the cgroup can't be
    /// removed. It is tried once more then, for a few seconds, before this returns.
    pub fn destroy(self, limit: Duration) -> Result<(), SandboxError> {
        self.sandbox.first.remove(limit)
    }
}

/// How often a dead process that is still traced is looked at.
const TRACED_INTERVAL: Duration = Duration::from_millis(1);

impl FirstProcess {
    fn wait_status(&self) -> Result<Option<Exit>, SandboxError> {
        let mut exit = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        if exit.is_some() {
            return Ok(*exit);
        }
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        *exit = match waitid(Id::PIDFd(self.pidfd.as_fd()), flags) {
            Ok(WaitStatus::Exited(_, code)) => Some(Exit::Code(code)),
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(Exit::Signal(signal as i32)),
            Ok(_) => None,
            Err(errno) => {
                return Err(SandboxError::System {
                    action: "waiting for the sandbox's first process",
                    errno,
                });
            }
        };
        Ok(*exit)
    }

    fn wait(&self, limit: Duration) -> Result<Exit, SandboxError> {
        let end = Instant::now() + limit;
        loop {
            if let Some(exit) = self.wait_status()? {
                return Ok(exit);
            }
            if !readable(self.pidfd.as_fd(), end)? || Instant::now() >= end {
                return Err(SandboxError::Timeout { action: "the end of the sandbox", limit });
            }
            if let Some(exit) = self.wait_status()? {
                return Ok(exit);
            }
            // Dead, and traced by somebody who has to let go of it first.
            std::thread::sleep(TRACED_INTERVAL);
        }
    }

    fn remove(mut self, limit: Duration) -> Result<(), SandboxError> {
        self.try_remove(limit)
    }

    fn try_remove(&mut self, limit: Duration) -> Result<(), SandboxError> {
        let end = Instant::now() + limit;
        let left = || end.saturating_duration_since(Instant::now());
        // A cgroup that somebody else has removed had no processes any more.
        if self.cgroup.path().exists() {
            self.cgroup.order_kill()?;
        }
        // The first process can be reaped once all others of its pid namespace are gone.
        self.wait(left())?;
        self.cgroup.remove(left())?;
        self.removed = true;
        Ok(())
    }
}

impl Drop for FirstProcess {
    fn drop(&mut self) {
        if self.removed {
            return;
        }
        if let Err(error) = self.try_remove(DROP_LIMIT) {
            tracing::warn!(sandbox = self.id, %error, "could not remove the sandbox");
        }
    }
}

impl Progress {
    fn proceed(&self) -> Result<(), SandboxError> {
        match send(self.channel.as_raw_fd(), &[1], MsgFlags::MSG_NOSIGNAL) {
            // A dead child: its report or its exit tells why.
            Ok(_) | Err(Errno::EPIPE) => Ok(()),
            Err(errno) => Err(SandboxError::System { action: "telling the child to go on", errno }),
        }
    }

    /// Waits until the child has reached the step that `wanted` accepts.
    fn reach(
        &self,
        first: &FirstProcess,
        wanted: impl Fn(&Step) -> bool,
    ) -> Result<(), SandboxError> {
        let Some(report) = self.report()? else {
            return Err(SandboxError::Died { exit: first.wait(DROP_LIMIT)? });
        };
        match self.plan.steps.get(report.step as usize) {
            Some(step) if report.errno == 0 && wanted(step) => Ok(()),
            _ => Err(self.failure(report)),
        }
    }

    /// The child's next report; `None` if it has closed its end.
    fn report(&self) -> Result<Option<Report>, SandboxError> {
        if !readable(self.channel.as_fd(), Instant::now() + SET_UP_LIMIT)? {
            return Err(SandboxError::Timeout {
                action: "setting the sandbox up",
                limit: SET_UP_LIMIT,
            });
        }
        let mut bytes = [0; REPORT_BYTES];
        match recv(self.channel.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
            Ok(REPORT_BYTES) => Ok(Some(Report::from_bytes(bytes))),
            Ok(_) | Err(Errno::ECONNRESET) => Ok(None),
            Err(errno) => Err(SandboxError::System { action: "hearing from the child", errno }),
        }
    }

    fn failure(&self, report: Report) -> SandboxError {
        let step = self.plan.steps.get(report.step as usize);
        SandboxError::Step {
            step: step.map_or_else(|| "making the sandbox".into(), ToString::to_string),
            errno: Errno::from_raw(report.errno),
        }
    }
}

/// Waits until `fd` can be read or `end` has come; tells which.
fn readable(fd: BorrowedFd<'_>, end: Instant) -> Result<bool, SandboxError> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        // Rounded up, so that a wait of less than a millisecond does not spin.
        let millis = left.as_micros().div_ceil(1000);
        let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) if Instant::now() >= end => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(SandboxError::System { action: "polling", errno }),
        }
    }
}

/// Moves a descriptor out of the way of those that the child replaces.
fn above_stdio(fd: OwnedFd) -> Result<OwnedFd, SandboxError> {
    if fd.as_raw_fd() > libc::STDERR_FILENO {
        return Ok(fd);
    }
    let moved: RawFd = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(libc::STDERR_FILENO + 1))
        .map_err(SandboxError::system("moving a descriptor"))?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(moved) })
}

/// Lets [`SANDBOX_UID`] inside stand for `host_uid` outside, for user and group, and nothing else.
fn map_user(pid: i32, host_uid: u32) -> Result<(), SandboxError> {
    let map = format!("{SANDBOX_UID} {host_uid} 1\n");
    let write = |file: &str, text: &str| -> io::Result<()> {
        fs::write(format!("/proc/{pid}/{file}"), text)
    };
    write("setgroups", "deny")
        .and_then(|()| write("gid_map", &map))
        .and_then(|()| write("uid_map", &map))
        .map_err(SandboxError::io("mapping the sandbox's user"))
}

/// `struct clone_args` of clone3(2), first version that knows cgroups.
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Clones the child, which carries out `plan`, into new pid and mount namespaces and the cgroup.
fn clone_child(
    plan: &Plan,
    channel: RawFd,
    cgroup: &Cgroup,
) -> Result<(i32, OwnedFd), SandboxError> {
    let vectors = Vectors::new(plan);
    let cgroup = cgroup.open()?;
    let mut pidfd: RawFd = -1;
    let args = CloneArgs {
        flags: (libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_PIDFD) as u64
            | CLONE_CLEAR_SIGHAND
            | CLONE_INTO_CGROUP,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArgs::default()
    };
    // A signal that arrives in the child before its handlers are gone would run one of ours there.
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))
        .map_err(SandboxError::system("blocking signals"))?;
    // SAFETY: without CLONE_VM this is a fork: the child returns on a copy of this stack, in memory
    // of its own, and goes straight into code that is safe there.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    if pid == 0 {
        // SAFETY: this is the cloned child; `vectors` was made from `plan`.
        unsafe { child::run(plan, &vectors, channel) }
    }
    let errno = Errno::last();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)
        .map_err(SandboxError::system("restoring signals"))?;
    if pid < 0 {
        return Err(SandboxError::System { action: "cloning the sandbox's first process", errno });
    }
    // SAFETY: clone3 has stored a new descriptor there, which is ours alone.
    Ok((pid as i32, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}
