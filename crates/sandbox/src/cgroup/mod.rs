//! Cgroups: limits, freezing, killing, and what a sandbox is charged for.
//!
//! Each sandbox has one cgroup in the version 2 hierarchy, by which it is frozen and killed. Where
//! a controller (memory, pids, cpu) still belongs to version 1, it has one there too. On a machine
//! with version 2 only, all is in one directory.

mod hierarchy;
mod memory;
mod root;

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};

pub use memory::MemoryReading;
pub use root::CgroupRoot;

use crate::spec::Resources;

/// The period over which processor time is counted, microseconds.
const CPU_PERIOD_US: u64 = 100_000;

/// Why a cgroup operation failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The machine has no version 2 hierarchy.
    #[error(
        "no cgroup version 2 hierarchy is mounted: boot with it, or mount one without controllers \
         (mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified)"
    )]
    NoUnifiedHierarchy,
    /// A controller is in no hierarchy.
    #[error(
        "the cgroup controller {name} is not available: enable it in the kernel (boot parameter \
         cgroup_enable={name}), or in a container delegate it to the container's cgroup"
    )]
    NoController {
        /// The controller.
        name: &'static str,
    },
    /// The name can't be that of a cgroup.
    #[error("{0:?} can't name a cgroup: 1 to 64 letters, digits, hyphens and underscores")]
    BadName(String),
    /// The kernel refused an operation on a cgroup file or directory.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The cgroup did not reach the wanted state in time.
    #[error("the cgroup {} was not {state} after {limit:?}", path.display())]
    Timeout {
        /// The state that was waited for.
        state: &'static str,
        /// The cgroup.
        path: PathBuf,
        /// How long it was given.
        limit: Duration,
    },
}

impl CgroupError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}

/// Reads a whole kernel file.
fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(CgroupError::io("reading", path))
}

/// Writes `value` to an existing kernel file in one call.
fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut f| f.write_all(value.as_bytes()))
        .map_err(CgroupError::io("writing", path))
}

/// Like [`write`], for files that not every kernel has.
fn write_if_present(path: &Path, value: &str) -> Result<(), CgroupError> {
    match write(path, value) {
        Err(CgroupError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Whether this is what the kernel says of a cgroup that is not there, or of a file of it that was
/// opened when it was.
fn is_gone(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Makes a directory, or takes the one that is there.
fn make_dir(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => {
            Err(CgroupError::io("making the cgroup", path)(e))
        }
        _ => Ok(()),
    }
}

/// Removes a cgroup directory if it is there. The kernel says EBUSY until the last dead process
/// is gone from its books, which can be a moment after it was reaped.
fn remove_dir(path: &Path, limit: Duration) -> Result<(), CgroupError> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_micros(50);
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) if e.kind() == ErrorKind::ResourceBusy && Instant::now() < end => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(10));
            }
            Err(e) => return Err(CgroupError::io("removing the cgroup", path)(e)),
        }
    }
}

/// One sandbox's cgroups. Dropping this value changes nothing; see [`Cgroup::remove`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cgroup {
    unified: PathBuf,
    memory: Option<PathBuf>,
    pids: Option<PathBuf>,
    cpu: Option<PathBuf>,
}

impl Cgroup {
    /// The cgroup's directory in the version 2 hierarchy.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.unified
    }

    /// All directories, version 2 first, each once.
    fn dirs(&self) -> Vec<&Path> {
        let mut all = vec![&*self.unified];
        for dir in [&self.memory, &self.pids, &self.cpu].into_iter().flatten() {
            if !all.contains(&&**dir) {
                all.push(dir);
            }
        }
        all
    }

    /// Sets the limits, also while processes run.
    ///
    /// # Errors
    /// If the kernel refuses, for example because more memory is in use than the new limit and
    /// can't be given back.
    pub fn set_resources(&self, resources: &Resources) -> Result<(), CgroupError> {
        self.set_memory_limit(resources.memory_limit_bytes)?;
        let pids = self.pids.as_ref().unwrap_or(&self.unified);
        write(&pids.join("pids.max"), &resources.pids_max.to_string())?;
        self.set_cpu_limit(resources.cpu_millicores)
    }

    /// Sets the memory limit, bytes. Swap is never used beyond it.
    ///
    /// # Errors
    /// As [`Cgroup::set_resources`].
    pub fn set_memory_limit(&self, bytes: u64) -> Result<(), CgroupError> {
        let bytes = bytes.to_string();
        let Some(dir) = &self.memory else {
            write_if_present(&self.unified.join("memory.swap.max"), "0")?;
            return write(&self.unified.join("memory.max"), &bytes);
        };
        // Version 1 keeps "memory" at most "memory and swap" all the time, so which of the two
        // must come first depends on whether the limit grows.
        let limit = dir.join("memory.limit_in_bytes");
        let first = write(&limit, &bytes);
        write_if_present(&dir.join("memory.memsw.limit_in_bytes"), &bytes)?;
        first.or_else(|_| write(&limit, &bytes))
    }

    /// Sets or lifts the limit of processor time, thousandths of a core.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_cpu_limit(&self, millicores: Option<u32>) -> Result<(), CgroupError> {
        let quota = millicores.map(|m| u64::from(m) * CPU_PERIOD_US / 1000);
        match (&self.cpu, quota) {
            (None, Some(q)) => {
                write(&self.unified.join("cpu.max"), &format!("{q} {CPU_PERIOD_US}"))
            }
            (None, None) => write(&self.unified.join("cpu.max"), "max"),
            (Some(dir), Some(q)) => {
                write(&dir.join("cpu.cfs_period_us"), &CPU_PERIOD_US.to_string())?;
                write(&dir.join("cpu.cfs_quota_us"), &q.to_string())
            }
            (Some(dir), None) => write(&dir.join("cpu.cfs_quota_us"), "-1"),
        }
    }

    /// What the sandbox is charged for.
    ///
    /// # Errors
    /// If the cgroup is gone.
    pub fn memory(&self) -> Result<MemoryReading, CgroupError> {
        match &self.memory {
            None => MemoryReading::read_v2(&self.unified),
            Some(dir) => MemoryReading::read_v1(dir),
        }
    }

    /// The processes in the cgroup, by their numbers in the reader's pid namespace. A process
    /// that is being born or dying may be missing.
    ///
    /// # Errors
    /// If the cgroup is gone.
    pub fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let text = read(&self.unified.join("cgroup.procs"))?;
        Ok(text.lines().filter_map(|l| l.parse().ok()).filter(|pid| *pid > 0).collect())
    }

    /// Stops every process where it stands; those that fork meanwhile are stopped with their
    /// children. Returns when all are stopped. Frozen processes can be traced and killed.
    ///
    /// # Errors
    /// [`CgroupError::Timeout`] if a process would not stop within `limit` (it is in an
    /// uninterruptible system call). The sandbox is thawed again in that case.
    pub fn freeze(&self, limit: Duration) -> Result<(), CgroupError> {
        write(&self.unified.join("cgroup.freeze"), "1")?;
        let frozen = self.wait_for("frozen", 1, "frozen", limit);
        if frozen.is_err() {
            self.thaw()?;
        }
        frozen
    }

    /// Lets the processes go on.
    ///
    /// # Errors
    /// If the cgroup is gone.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        write(&self.unified.join("cgroup.freeze"), "0")
    }

    /// Whether [`Cgroup::freeze`] was asked for and not taken back, whether or not every process is
    /// stopped by now.
    ///
    /// # Errors
    /// If the cgroup is gone.
    pub fn is_to_be_frozen(&self) -> Result<bool, CgroupError> {
        Ok(read(&self.unified.join("cgroup.freeze"))?.trim() == "1")
    }

    /// Whether every process is stopped by [`Cgroup::freeze`].
    ///
    /// # Errors
    /// If the cgroup is gone.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        let events = read(&self.unified.join("cgroup.events"))?;
        Ok(memory::field(&events, "frozen") == Some(1))
    }

    /// Kills every process, frozen or not, and waits until none is left. A cgroup that is gone, or
    /// goes meanwhile, has none.
    ///
    /// # Errors
    /// [`CgroupError::Timeout`] if one survives `limit` (it is in an uninterruptible system call).
    pub fn kill(&self, limit: Duration) -> Result<(), CgroupError> {
        let killed = self.order_kill();
        match killed.and_then(|()| self.wait_for("populated", 0, "empty", limit)) {
            Err(CgroupError::Io { source, .. }) if is_gone(&source) => Ok(()),
            other => other,
        }
    }

    /// Kills every process, frozen or not, without waiting for their end.
    ///
    /// # Errors
    /// If the cgroup is gone.
    pub fn order_kill(&self) -> Result<(), CgroupError> {
        write(&self.unified.join("cgroup.kill"), "1")
    }

    /// Opens the file that has every process killed when `1` is written to it, for somebody else
    /// to do that.
    ///
    /// # Errors
    /// If the cgroup is gone.
    pub fn kill_file(&self) -> Result<OwnedFd, CgroupError> {
        let path = self.unified.join("cgroup.kill");
        let file = OpenOptions::new().write(true).open(&path);
        file.map(OwnedFd::from).map_err(CgroupError::io("opening", &path))
    }

    /// Removes the cgroup, which must be empty, waiting up to `limit` for the kernel to forget
    /// processes that have died. What is already gone is no error.
    ///
    /// # Errors
    /// If processes are left.
    pub fn remove(&self, limit: Duration) -> Result<(), CgroupError> {
        self.dirs().into_iter().try_for_each(|dir| remove_dir(dir, limit))
    }

    /// Waits until `key` in `cgroup.events` has the value `want`.
    fn wait_for(
        &self,
        key: &str,
        want: u64,
        state: &'static str,
        limit: Duration,
    ) -> Result<(), CgroupError> {
        let path = self.unified.join("cgroup.events");
        let end = Instant::now() + limit;
        let mut file = File::open(&path).map_err(CgroupError::io("opening", &path))?;
        let mut text = String::new();
        // The kernel notifies of changes, but holds back those that follow another within 10 ms.
        let mut pause = Duration::from_micros(50);
        loop {
            // Reading first arms the notification: a change after this read wakes the poll.
            text.clear();
            file.rewind()
                .and_then(|()| file.read_to_string(&mut text))
                .map_err(CgroupError::io("reading", &path))?;
            if memory::field(&text, key) == Some(want) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CgroupError::Timeout { state, path: self.unified.clone(), limit });
            }
            let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
            match ppoll(&mut fds, Some(pause.min(left).into()), None) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(CgroupError::io("watching", &path)(e.into())),
            }
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }

    /// Opens the directory for `CLONE_INTO_CGROUP`.
    pub(crate) fn open(&self) -> Result<OwnedFd, CgroupError> {
        File::open(&self.unified)
            .map(OwnedFd::from)
            .map_err(CgroupError::io("opening the cgroup", &self.unified))
    }

    /// Opens the `tasks` file of each version 1 cgroup. A thread that writes `0` there moves
    /// itself; unlike moving another process, that takes no lock that waits for all processors.
    pub(crate) fn open_v1_tasks(&self) -> Result<Vec<(PathBuf, OwnedFd)>, CgroupError> {
        self.dirs()
            .into_iter()
            .skip(1)
            .map(|dir| {
                let file = OpenOptions::new()
                    .write(true)
                    .open(dir.join("tasks"))
                    .map_err(CgroupError::io("opening the cgroup", dir))?;
                Ok((dir.to_path_buf(), file.into()))
            })
            .collect()
    }
}
