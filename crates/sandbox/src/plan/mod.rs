//! The steps that turn a cloned child into a sandbox.
//!
//! The child is cloned from a process with many threads, any of which may hold the allocator's
//! lock at that moment. So everything that needs memory or looks at the host's files happens here,
//! before the clone; the child only walks the finished list (see [`crate::child`]).

mod step;

use std::ffi::{CString, OsStr};
use std::fs;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

pub(crate) use self::step::{HOST, Step};
use crate::error::SandboxError;
use crate::seccomp;
use crate::spec::{CODE_DIR, LAYER_DIR, RlimitResource, SANDBOX_UID, SandboxSpec};

/// The most that mount options may take (one page, with the final zero).
const MOUNT_OPTIONS_MAX: usize = 4095;

const NO_SUID: u64 = libc::MOUNT_ATTR_NOSUID;
const NO_DEV: u64 = libc::MOUNT_ATTR_NODEV;
const NO_EXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY;

/// The descriptors that the child keeps, by their numbers, all above standard error.
pub(crate) struct Descriptors {
    pub stdout: RawFd,
    pub stderr: RawFd,
    /// The socket to the parent.
    pub channel: RawFd,
    /// The version 1 cgroups to join and their open `tasks` files.
    pub v1_tasks: Vec<(PathBuf, RawFd)>,
}

/// All that the child has to do, with the program's arguments and environment.
pub(crate) struct Plan {
    pub steps: Vec<Step>,
    pub args: Vec<CString>,
    pub env: Vec<CString>,
}

impl Plan {
    /// Works out the steps for `spec`. Looks at the mounts' sources, changes nothing, and needs no
    /// privilege.
    ///
    /// # Errors
    /// [`SandboxError::Spec`], or [`SandboxError::Step`] for a source that is not there.
    pub fn build(spec: &SandboxSpec, descriptors: &Descriptors) -> Result<Self, SandboxError> {
        spec.validate()?;
        let mut builder = Builder::default();
        builder.process_state(spec, descriptors);
        builder.root(spec)?;
        builder.user_and_namespaces(spec)?;
        let strings = |list: &[String]| {
            list.iter().map(|s| c_string(OsStr::new(s))).collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            steps: builder.steps,
            args: strings(&spec.process.args)?,
            env: strings(&spec.process.env)?,
        })
    }
}

#[derive(Default)]
struct Builder {
    steps: Vec<Step>,
    /// Directories that exist in the sandbox's own root.
    directories: Vec<PathBuf>,
    /// Where host directories have been shown; nothing can be made below.
    covered: Vec<PathBuf>,
}

impl Builder {
    fn process_state(&mut self, spec: &SandboxSpec, fds: &Descriptors) {
        let mut kept: Vec<RawFd> = fds.v1_tasks.iter().map(|(_, fd)| *fd).collect();
        kept.extend([fds.stdout, fds.stderr, fds.channel]);
        self.steps.push(Step::CloseDescriptors(gaps(&mut kept)));
        self.steps.push(Step::ResetSignals);
        // Before anything that the sandbox should be charged for.
        for (path, tasks) in &fds.v1_tasks {
            self.steps.push(Step::JoinCgroup { path: path.clone(), tasks: *tasks });
        }
        self.steps.push(Step::Descriptor { from: fds.stdout, to: 1 });
        self.steps.push(Step::Descriptor { from: fds.stderr, to: 2 });
        self.steps.push(Step::Session);
        self.steps.push(Step::OrdinaryPriority);
        self.resource_limits(spec);
        self.steps.push(Step::NoGroups);
    }

    /// Sets every limit, so that soft limits do not depend on how the platform was started. The
    /// platform's hard limits stay: raising them takes a capability that root may lack.
    fn resource_limits(&mut self, spec: &SandboxSpec) {
        let mut limit = |resource, name, soft, hard| {
            self.steps.push(Step::ResourceLimit { resource, name, soft, hard });
        };
        // A program may ask for more stack for the programs it starts; it only moves their layout.
        let stack = spec.layout.stack_limit_bytes;
        limit(libc::RLIMIT_STACK, "stack", stack, hard_limit(libc::RLIMIT_STACK));
        const NONE: u64 = libc::RLIM_INFINITY;
        for (resource, name, soft, hard) in [
            (libc::RLIMIT_CORE, "core", 0, 0),
            (libc::RLIMIT_NOFILE, "nofile", 1024, 4096),
            (libc::RLIMIT_MEMLOCK, "memlock", 64 << 10, 64 << 10),
            (libc::RLIMIT_MSGQUEUE, "msgqueue", 819_200, 819_200),
            (libc::RLIMIT_SIGPENDING, "sigpending", 1024, 1024),
            (libc::RLIMIT_NICE, "nice", 0, 0),
            (libc::RLIMIT_RTPRIO, "rtprio", 0, 0),
            (libc::RLIMIT_AS, "as", NONE, NONE),
            (libc::RLIMIT_CPU, "cpu", NONE, NONE),
            (libc::RLIMIT_DATA, "data", NONE, NONE),
            (libc::RLIMIT_FSIZE, "fsize", NONE, NONE),
            // Processes are counted by the cgroup.
            (libc::RLIMIT_NPROC, "nproc", NONE, NONE),
        ] {
            let most = hard_limit(resource);
            limit(resource, name, soft.min(most), hard.min(most));
        }
        for l in &spec.process.rlimits {
            let (resource, name) = match l.resource {
                RlimitResource::As => (libc::RLIMIT_AS, "as"),
                RlimitResource::Cpu => (libc::RLIMIT_CPU, "cpu"),
                RlimitResource::Fsize => (libc::RLIMIT_FSIZE, "fsize"),
                RlimitResource::Memlock => (libc::RLIMIT_MEMLOCK, "memlock"),
                RlimitResource::Nofile => (libc::RLIMIT_NOFILE, "nofile"),
            };
            limit(resource, name, l.soft, l.hard);
        }
    }

    fn root(&mut self, spec: &SandboxSpec) -> Result<(), SandboxError> {
        self.steps.push(Step::PrivateMounts);
        self.steps.push(Step::NewRoot { options: c"mode=755,size=4m,nr_inodes=4k".into() });
        self.devices(spec)?;
        self.proc(spec)?;
        self.directory(Path::new("/tmp"))?;
        self.tmpfs("/tmp", spec.tmp_size_bytes, 0)?;
        for m in &spec.mounts {
            self.bind(&m.source, &m.target, m.read_only)?;
        }
        for f in &spec.files {
            self.file(&f.path, f.contents.as_bytes().to_vec())?;
        }
        match &spec.code {
            Some(code) => self.bind(code, Path::new(CODE_DIR), true)?,
            None => self.directory(Path::new(CODE_DIR))?,
        }
        self.layers(&spec.layers)?;
        self.steps.push(Step::LeaveHost);
        self.steps.push(Step::SealRoot);
        Ok(())
    }

    fn devices(&mut self, spec: &SandboxSpec) -> Result<(), SandboxError> {
        self.directory(Path::new("/dev"))?;
        let nodes =
            [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9)];
        for (name, major, minor) in nodes {
            let path = c_string(OsStr::new(&format!("/dev/{name}")))?;
            self.steps.push(Step::Device { path, major, minor });
        }
        self.steps.push(Step::NullStdin);
        let links = [
            (c"/dev/fd", c"/proc/self/fd"),
            (c"/dev/stdin", c"/proc/self/fd/0"),
            (c"/dev/stdout", c"/proc/self/fd/1"),
            (c"/dev/stderr", c"/proc/self/fd/2"),
        ];
        for (path, target) in links {
            self.steps.push(Step::Link { path: path.into(), target: target.into() });
        }
        self.directory(Path::new("/dev/shm"))?;
        self.tmpfs("/dev/shm", spec.tmp_size_bytes, libc::MS_NOEXEC)
    }

    /// A fresh `/proc` that shows the sandbox's processes only, with the entries about the machine
    /// masked or made read-only that the OCI engines mask by default.
    fn proc(&mut self, spec: &SandboxSpec) -> Result<(), SandboxError> {
        const MASKED: [&str; 12] = [
            "/proc/acpi",
            "/proc/asound",
            "/proc/interrupts",
            "/proc/kcore",
            "/proc/keys",
            "/proc/latency_stats",
            "/proc/sched_debug",
            "/proc/scsi",
            "/proc/sysrq-trigger",
            "/proc/timer_list",
            "/proc/timer_stats",
            "/proc/kmsg",
        ];
        const READ_ONLY_PATHS: [&str; 4] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"];
        self.directory(Path::new("/proc"))?;
        self.steps.push(Step::Filesystem {
            kind: c"proc".into(),
            target: c"/proc".into(),
            flags: libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
            options: c"".into(),
        });
        self.covered.push("/proc".into());
        self.steps.push(Step::OomScore {
            value: c_string(OsStr::new(&spec.process.oom_score_adj.to_string()))?,
        });
        // The same kernel serves the host's /proc, so what is there will be here.
        for path in MASKED {
            let target = c_string(OsStr::new(path))?;
            match fs::metadata(path) {
                Ok(m) if m.is_dir() => self.steps.push(Step::Filesystem {
                    kind: c"tmpfs".into(),
                    target,
                    flags: libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
                    options: c"size=0,mode=555".into(),
                }),
                Ok(_) => self.steps.push(Step::Bind {
                    source: c"/dev/null".into(),
                    target,
                    attributes: NO_SUID | NO_EXEC,
                }),
                Err(_) => {}
            }
        }
        for path in READ_ONLY_PATHS.into_iter().filter(|p| Path::new(p).exists()) {
            let path = c_string(OsStr::new(path))?;
            self.steps.push(Step::Bind {
                source: path.clone(),
                target: path,
                attributes: READ_ONLY | NO_SUID | NO_DEV | NO_EXEC,
            });
        }
        Ok(())
    }

    fn layers(&mut self, layers: &[PathBuf]) -> Result<(), SandboxError> {
        let target = Path::new(LAYER_DIR);
        match layers {
            [] => self.directory(target),
            [one] => self.bind(one, target, true),
            many => {
                self.directory(target)?;
                let mut options = b"lowerdir=".to_vec();
                // The file system wants the topmost first.
                for (i, layer) in many.iter().rev().enumerate() {
                    if i > 0 {
                        options.push(b':');
                    }
                    let path = resolve_fully(layer, target)?;
                    for byte in on_host(&path)?.as_bytes() {
                        if matches!(byte, b'\\' | b':' | b',') {
                            options.push(b'\\');
                        }
                        options.push(*byte);
                    }
                }
                if options.len() > MOUNT_OPTIONS_MAX {
                    return Err(SandboxError::Spec {
                        reason: format!(
                            "the paths of {} layers together exceed {MOUNT_OPTIONS_MAX} bytes: \
                             use shorter paths or merge layers",
                            many.len()
                        ),
                    });
                }
                self.steps.push(Step::Filesystem {
                    kind: c"overlay".into(),
                    target: c_string(target.as_os_str())?,
                    flags: libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV,
                    options: c_string(OsStr::from_bytes(&options))?,
                });
                Ok(())
            }
        }
    }

    fn user_and_namespaces(&mut self, spec: &SandboxSpec) -> Result<(), SandboxError> {
        self.steps.push(Step::UserNamespace);
        self.steps.push(Step::AwaitUserMap);
        // Made now, so that they belong to the sandbox's user namespace and not to the host's.
        self.steps.push(Step::Namespaces);
        self.steps.push(Step::Loopback);
        self.steps.push(Step::HostName(c_string(OsStr::new(&spec.hostname))?));
        self.steps.push(Step::NoBoundingSet);
        self.steps.push(Step::User { uid: SANDBOX_UID });
        self.steps.push(Step::NoCapabilities);
        self.steps.push(Step::NoNewPrivileges);
        self.steps.push(Step::WorkingDirectory(c_string(spec.process.cwd.as_os_str())?));
        if spec.die_with_parent {
            // After the last change of user, which cancels it; before the last word from the
            // parent, without which the child gives up: so a parent that dies early is noticed.
            self.steps.push(Step::DieWithParent);
        }
        if !spec.layout.randomize {
            self.steps.push(Step::FixedLayout);
        }
        if let Some(program) = seccomp::program(&spec.seccomp) {
            self.steps.push(Step::FilterSystemCalls(program));
        }
        self.steps.push(Step::AwaitStart);
        let name = spec.process.args[0].clone();
        self.steps.push(Step::Execute { programs: candidates(&name, &spec.process.env)?, name });
        Ok(())
    }

    /// Makes a directory of the sandbox's own root, and its parents.
    fn directory(&mut self, path: &Path) -> Result<(), SandboxError> {
        let mut missing: Vec<&Path> = path
            .ancestors()
            .take_while(|p| *p != Path::new("/") && !self.directories.iter().any(|d| d == p))
            .collect();
        while let Some(dir) = missing.pop() {
            self.steps.push(Step::Directory { path: c_string(dir.as_os_str())?, mode: 0o755 });
            self.directories.push(dir.into());
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, contents: Vec<u8>) -> Result<(), SandboxError> {
        if let Some(cover) = self.covering(path) {
            return Err(SandboxError::Spec {
                reason: format!(
                    "the file {} lies below {}, which shows the host's files",
                    path.display(),
                    cover.display()
                ),
            });
        }
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        self.steps.push(Step::File { path: c_string(path.as_os_str())?, contents });
        Ok(())
    }

    fn tmpfs(&mut self, target: &str, size: u64, extra_flags: u64) -> Result<(), SandboxError> {
        self.steps.push(Step::Filesystem {
            kind: c"tmpfs".into(),
            target: c_string(OsStr::new(target))?,
            flags: libc::MS_NOSUID | libc::MS_NODEV | extra_flags,
            options: c_string(OsStr::new(&format!("mode=1777,size={size}")))?,
        });
        Ok(())
    }

    fn bind(&mut self, source: &Path, target: &Path, read_only: bool) -> Result<(), SandboxError> {
        let (path, kind) = resolve(source, target)?;
        if kind.is_symlink() && source == target && self.covering(target).is_none() {
            if let Some(parent) = target.parent() {
                self.directory(parent)?;
            }
            self.steps.push(Step::Link {
                path: c_string(target.as_os_str())?,
                target: c_string(path.as_os_str())?,
            });
            return Ok(());
        }
        let path = if kind.is_symlink() { resolve_fully(source, target)? } else { path };
        // Below a host directory the mount point has to exist already.
        if self.covering(target).is_none() {
            if path.is_dir() {
                self.directory(target)?;
            } else {
                self.file(target, Vec::new())?;
            }
        }
        self.covered.push(target.into());
        self.steps.push(Step::Bind {
            source: on_host(&path)?,
            target: c_string(target.as_os_str())?,
            attributes: NO_SUID | NO_DEV | if read_only { READ_ONLY } else { 0 },
        });
        Ok(())
    }

    /// The mount below which `path` lies.
    fn covering(&self, path: &Path) -> Option<&Path> {
        self.covered.iter().find(|c| path.starts_with(c)).map(|c| &**c)
    }
}

/// How far this process may raise a resource limit.
fn hard_limit(resource: u32) -> u64 {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the kernel writes a limit where one is. It fails only for unknown resources, and the
    // attempt to set such a limit will tell.
    unsafe { libc::getrlimit64(resource, &raw mut limit) };
    limit.rlim_max
}

/// What `source` is: for a symbolic link its own target, otherwise its path without links.
fn resolve(source: &Path, target: &Path) -> Result<(PathBuf, fs::FileType), SandboxError> {
    let kind = fs::symlink_metadata(source).map_err(|e| missing(source, target, &e))?.file_type();
    let path = if kind.is_symlink() { fs::read_link(source) } else { fs::canonicalize(source) };
    Ok((path.map_err(|e| missing(source, target, &e))?, kind))
}

fn resolve_fully(source: &Path, target: &Path) -> Result<PathBuf, SandboxError> {
    fs::canonicalize(source).map_err(|e| missing(source, target, &e))
}

fn missing(source: &Path, target: &Path, error: &std::io::Error) -> SandboxError {
    SandboxError::Step {
        step: format!("mounting {} on {}", source.display(), target.display()),
        errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
    }
}

/// The path at which the child sees the host's `path`, which must be free of symbolic links:
/// an absolute one would lead into the new root.
fn on_host(path: &Path) -> Result<CString, SandboxError> {
    let mut full = HOST.as_bytes().to_vec();
    full.extend_from_slice(path.as_os_str().as_bytes());
    c_string(OsStr::from_bytes(&full))
}

fn c_string(s: &OsStr) -> Result<CString, SandboxError> {
    CString::new(s.as_bytes())
        .map_err(|_| SandboxError::Spec { reason: format!("{s:?} contains a zero byte") })
}

/// The ranges of descriptors above standard error that are not in `kept`.
fn gaps(kept: &mut [RawFd]) -> Vec<(u32, u32)> {
    kept.sort_unstable();
    let mut ranges = Vec::with_capacity(kept.len() + 1);
    let mut next = 3u32;
    for fd in kept.iter().filter_map(|fd| u32::try_from(*fd).ok()) {
        if fd > next {
            ranges.push((next, fd - 1));
        }
        next = next.max(fd + 1);
    }
    ranges.push((next, u32::MAX));
    ranges
}

/// The paths at which to look for the program `name`.
fn candidates(name: &str, env: &[String]) -> Result<Vec<CString>, SandboxError> {
    if name.contains('/') {
        return Ok(vec![c_string(OsStr::new(name))?]);
    }
    let path = env.iter().find_map(|e| e.strip_prefix("PATH="));
    path.unwrap_or("/usr/local/bin:/usr/bin:/bin")
        .split(':')
        .map(|dir| c_string(Path::new(dir).join(name).as_os_str()))
        .collect()
}

#[cfg(test)]
mod tests;
