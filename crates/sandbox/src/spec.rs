//! What a sandbox is made of, in the vocabulary of the OCI runtime specification.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::SandboxError;

/// Where a function's code appears inside the sandbox (as on AWS Lambda).
pub const CODE_DIR: &str = "/var/task";

/// Where a function's layers appear inside the sandbox, merged (as on AWS Lambda).
pub const LAYER_DIR: &str = "/opt";

/// The user and group that the process has inside its user namespace.
pub const SANDBOX_UID: u32 = 1000;

/// Everything that is needed to make one sandbox.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// Names the sandbox and its cgroups: 1 to 64 letters, digits, `-` and `_`.
    pub id: String,
    /// The host name that the process sees.
    pub hostname: String,
    /// Host directories and files shown inside, in this order; see [`Mount::system`].
    pub mounts: Vec<Mount>,
    /// Small files made inside; see [`SmallFile::system`].
    #[serde(default)]
    pub files: Vec<SmallFile>,
    /// The function's code, shown read-only at [`CODE_DIR`].
    pub code: Option<PathBuf>,
    /// The function's layers, merged read-only at [`LAYER_DIR`]; later ones cover earlier ones.
    #[serde(default)]
    pub layers: Vec<PathBuf>,
    /// The size limit of `/tmp`, bytes; `/dev/shm` gets the same. Both are memory charged to the
    /// sandbox.
    pub tmp_size_bytes: u64,
    /// The program.
    pub process: Process,
    /// The host's user and group that [`SANDBOX_UID`] stands for. Give each sandbox one of its
    /// own that no account uses, so that two sandboxes are strangers to each other on the host too.
    pub host_uid: u32,
    /// What the sandbox may use at most.
    pub resources: Resources,
    /// How addresses are chosen.
    pub layout: Layout,
    /// Which system calls are allowed.
    #[serde(default)]
    pub seccomp: Seccomp,
    /// Whether the kernel kills the sandbox, frozen or not, when the *thread* that made it ends
    /// (`PR_SET_PDEATHSIG`).
    #[serde(default)]
    pub die_with_parent: bool,
}

/// A host directory or file shown inside the sandbox.
///
/// The mount is always without set-user-id programs and device files. A source that is itself a
/// symbolic link and keeps its path (`/lib` on a merged-/usr system) becomes the same link inside.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Mount {
    /// The path on the host.
    pub source: PathBuf,
    /// The path inside the sandbox. Missing parents are made, and anybody may pass through them.
    pub target: PathBuf,
    /// Whether writing is refused; host permissions hold in any case.
    #[serde(default = "yes")]
    pub read_only: bool,
}

fn yes() -> bool {
    true
}

/// A small read-only file that exists in the sandbox only.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SmallFile {
    /// The path inside the sandbox.
    pub path: PathBuf,
    /// What it holds.
    pub contents: String,
}

/// The program that runs as the sandbox's first process.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Process {
    /// The program and its arguments. A name without `/` is looked up in the `PATH` of `env`.
    pub args: Vec<String>,
    /// The environment, `NAME=value`.
    pub env: Vec<String>,
    /// The working directory inside the sandbox.
    pub cwd: PathBuf,
    /// Resource limits other than the sandbox's own, which are 1,024 open files (4,096 if the
    /// process asks), 64 KiB of locked memory, no core dumps, and for the rest no limit beyond the
    /// platform's hard ones.
    #[serde(default)]
    pub rlimits: Vec<Rlimit>,
    /// How willing the kernel is to kill the process when the host runs out of memory, 0 to 1000.
    #[serde(default = "default_oom_score_adj")]
    pub oom_score_adj: u16,
}

/// Half-way: sandboxes go before the platform and before the host's own services.
fn default_oom_score_adj() -> u16 {
    500
}

impl Default for Process {
    fn default() -> Self {
        Self {
            args: vec![],
            env: vec![],
            cwd: "/".into(),
            rlimits: vec![],
            oom_score_adj: default_oom_score_adj(),
        }
    }
}

/// One resource limit of the process (`setrlimit(2)`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Rlimit {
    /// Which resource.
    pub resource: RlimitResource,
    /// The limit in force.
    pub soft: u64,
    /// How far the process may raise the soft limit.
    pub hard: u64,
}

/// The resources that [`Rlimit`] can limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RlimitResource {
    /// Address space, bytes.
    As,
    /// Processor time, seconds.
    Cpu,
    /// Size of a written file, bytes.
    Fsize,
    /// Locked memory, bytes.
    Memlock,
    /// Open file descriptors.
    Nofile,
}

/// What a sandbox may use at most; enforced by cgroups.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Resources {
    /// Memory in bytes: private pages, `/tmp`, and the kernel's memory for the sandbox. At the
    /// limit the kernel kills a process of the sandbox.
    pub memory_limit_bytes: u64,
    /// Processes and threads.
    pub pids_max: u32,
    /// Processor time in thousandths of a core; no limit if absent.
    pub cpu_millicores: Option<u32>,
}

/// How the kernel chooses the process's addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Layout {
    /// Whether each start gets other addresses (the kernel's ASLR). Without it, sandboxes with
    /// equal programs and equal `stack_limit_bytes` have equal addresses, and so equal pages.
    pub randomize: bool,
    /// The soft stack limit. Without randomisation it decides where libraries and other mappings
    /// lie; see [`stack_limit_for`].
    pub stack_limit_bytes: u64,
}

/// The layout that belongs to `seed`: a soft stack limit of 128 MiB to 192 MiB, one of 16,384.
///
/// With `ADDR_NO_RANDOMIZE` the kernel puts the top of the mapping area below the largest stack
/// allowed, but at least 128 MiB below the stack's top (`mmap_base` in the kernel's `mm/util.c` and
/// `arch/x86/mm/mmap.c`). So a soft limit above that moves every library by whole pages, the same
/// way at each start. The program's own image, its heap and the stack do not move.
///
/// glibc also takes this limit as the default stack size of new threads. That is address space
/// only, no memory, and it is why the limit stays small.
#[must_use]
pub fn stack_limit_for(seed: u64) -> u64 {
    const LOWEST: u64 = 128 << 20;
    const PAGE: u64 = 4096;
    // Multiplying by a large odd number lets every bit of the seed count in the top bits.
    let bits = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - 14);
    LOWEST + bits * PAGE
}

impl Layout {
    /// The same addresses for every sandbox started with this seed.
    #[must_use]
    pub fn fixed(seed: u64) -> Self {
        Self { randomize: false, stack_limit_bytes: stack_limit_for(seed) }
    }

    /// Other addresses at each start.
    #[must_use]
    pub fn random() -> Self {
        Self { randomize: true, stack_limit_bytes: 8 << 20 }
    }
}

/// Which system calls the process may make.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Seccomp {
    /// The set of calls.
    pub profile: SeccompProfile,
    /// Whether `io_uring_setup` answers "no such system call". Rings pin memory and run outside
    /// the process, which can then not be deduplicated; Node.js falls back to `epoll`.
    pub deny_io_uring: bool,
}

impl Default for Seccomp {
    fn default() -> Self {
        Self { profile: SeccompProfile::Default, deny_io_uring: true }
    }
}

/// The sets of system calls that [`Seccomp`] can choose.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SeccompProfile {
    /// What language runtimes need, and nothing that reaches beyond the sandbox.
    #[default]
    Default,
    /// Everything that an unprivileged process may do. For code that is trusted.
    Unconfined,
}

impl Mount {
    /// Shows `path` read-only at the same place.
    #[must_use]
    pub fn read_only(path: impl Into<PathBuf>) -> Self {
        let source = path.into();
        Self { target: source.clone(), source, read_only: true }
    }

    /// The parts of the host's system that programs need, as far as this host has them: programs
    /// and libraries, the loader's cache, certificates, the time zone, Java's settings.
    #[must_use]
    pub fn system() -> Vec<Self> {
        const PATHS: [&str; 16] = [
            "/usr",
            "/bin",
            "/sbin",
            "/lib",
            "/lib32",
            "/lib64",
            "/etc/alternatives",
            "/etc/ca-certificates",
            "/etc/java-17-openjdk",
            "/etc/java-21-openjdk",
            "/etc/ld.so.cache",
            "/etc/localtime",
            "/etc/mime.types",
            "/etc/pki",
            "/etc/ssl/certs",
            "/etc/ssl/openssl.cnf",
        ];
        PATHS.iter().filter(|p| Path::new(p).exists()).map(Self::read_only).collect()
    }
}

impl SmallFile {
    /// The files by which programs find out who and where they are: `passwd`, `group`, `hosts`,
    /// `nsswitch.conf`, `resolv.conf` (no servers).
    #[must_use]
    pub fn system(hostname: &str) -> Vec<Self> {
        let uid = SANDBOX_UID;
        let nobody = 65534;
        [
            (
                "/etc/passwd",
                format!(
                    "sandbox:x:{uid}:{uid}::/tmp:/bin/sh\n\
                     nobody:x:{nobody}:{nobody}::/:/usr/sbin/nologin\n"
                ),
            ),
            ("/etc/group", format!("sandbox:x:{uid}:\nnogroup:x:{nobody}:\n")),
            ("/etc/hosts", format!("127.0.0.1 localhost {hostname}\n::1 localhost\n")),
            ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n".into()),
            ("/etc/resolv.conf", String::new()),
        ]
        .into_iter()
        .map(|(path, contents)| Self { path: path.into(), contents })
        .collect()
    }
}

/// Whether `name` may name a cgroup: no path, and no clash with the kernel's own files, all of
/// which have a dot.
pub(crate) fn is_plain_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

impl SandboxSpec {
    /// Checks what the kernel would not, or would only say in a way that is hard to understand.
    ///
    /// # Errors
    /// [`SandboxError::Spec`] with the first thing that is wrong.
    pub fn validate(&self) -> Result<(), SandboxError> {
        let wrong = |reason: String| Err(SandboxError::Spec { reason });
        if !is_plain_name(&self.id) {
            return wrong(format!(
                "the id {:?} is not 1 to 64 letters, digits, hyphens and underscores",
                self.id
            ));
        }
        if self.hostname.is_empty() || self.hostname.len() > 64 {
            return wrong(format!("the host name {:?} is not 1 to 64 bytes", self.hostname));
        }
        if self.host_uid == 0 || self.host_uid == u32::MAX {
            return wrong(format!("host_uid {} is not an unprivileged user", self.host_uid));
        }
        if self.process.args.is_empty() {
            return wrong("process.args is empty: no program to run".into());
        }
        if let Some(bad) = self.process.env.iter().find(|e| !e.contains('=')) {
            return wrong(format!("the environment entry {bad:?} is not of the form NAME=value"));
        }
        if self.process.oom_score_adj > 1000 {
            return wrong(format!(
                "process.oom_score_adj {} is above 1000",
                self.process.oom_score_adj
            ));
        }
        if self.tmp_size_bytes == 0 {
            return wrong("tmp_size_bytes is 0, which the kernel takes for \"no limit\"".into());
        }
        if self.resources.memory_limit_bytes == 0 || self.resources.pids_max == 0 {
            return wrong("a limit of 0 leaves no room for the process itself".into());
        }
        if self.resources.cpu_millicores.is_some_and(|m| m < 10) {
            return wrong("cpu_millicores below 10 is less than the kernel can grant".into());
        }
        let targets = self.mounts.iter().map(|m| &m.target);
        for target in targets.chain(self.files.iter().map(|f| &f.path)) {
            if !is_plain_path(target) {
                return wrong(format!(
                    "the target {} is not an absolute path without '..'",
                    target.display()
                ));
            }
            let reserved = ["/proc", "/sys", "/dev", CODE_DIR, LAYER_DIR];
            if let Some(taken) = reserved.iter().find(|r| target.starts_with(r)) {
                return wrong(format!("the target {} lies in {taken}", target.display()));
            }
        }
        if !self.process.cwd.is_absolute() {
            return wrong(format!(
                "process.cwd {} is not an absolute path",
                self.process.cwd.display()
            ));
        }
        Ok(())
    }
}

/// An absolute path of normal components only, and not `/` itself.
fn is_plain_path(path: &Path) -> bool {
    let mut parts = path.components();
    parts.next() == Some(Component::RootDir)
        && path != Path::new("/")
        && parts.all(|c| matches!(c, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> SandboxSpec {
        SandboxSpec {
            id: "a-1".into(),
            hostname: "a".into(),
            mounts: vec![Mount::read_only("/usr")],
            files: SmallFile::system("a"),
            code: None,
            layers: vec![],
            tmp_size_bytes: 1 << 20,
            process: Process { args: vec!["/bin/true".into()], ..Process::default() },
            host_uid: 100_000,
            resources: Resources {
                memory_limit_bytes: 1 << 26,
                pids_max: 10,
                cpu_millicores: None,
            },
            layout: Layout::fixed(1),
            seccomp: Seccomp::default(),
            die_with_parent: false,
        }
    }

    #[test]
    fn a_sound_specification_survives_its_text_form() {
        spec().validate().unwrap();
        let text = serde_json::to_string(&spec()).unwrap();
        assert_eq!(serde_json::from_str::<SandboxSpec>(&text).unwrap(), spec());
    }

    #[test]
    fn what_could_reach_out_of_the_sandbox_is_refused() {
        let refused = |change: &dyn Fn(&mut SandboxSpec)| {
            let mut s = spec();
            change(&mut s);
            s.validate().unwrap_err().to_string()
        };
        assert!(refused(&|s| s.id = "../x".into()).contains("\"../x\""));
        assert!(refused(&|s| s.id = "cgroup.procs".into()).contains("cgroup.procs"));
        assert!(refused(&|s| s.host_uid = 0).contains("host_uid 0"));
        assert!(refused(&|s| s.mounts[0].target = "/a/../b".into()).contains("/a/../b"));
        assert!(refused(&|s| s.mounts[0].target = "/".into()).contains("target /"));
        assert!(refused(&|s| s.mounts[0].target = "/proc/sys".into()).contains("/proc"));
        assert!(refused(&|s| s.mounts[0].target = "/var/task/x".into()).contains(CODE_DIR));
        assert!(refused(&|s| s.files[0].path = "etc".into()).contains("etc"));
        assert!(refused(&|s| s.process.args.clear()).contains("args"));
        assert!(refused(&|s| s.process.env.push("PATH".into())).contains("PATH"));
        assert!(refused(&|s| s.tmp_size_bytes = 0).contains("tmp_size_bytes"));
    }

    #[test]
    fn layouts_are_whole_pages_in_range_and_spread() {
        let limits: std::collections::HashSet<u64> = (0..1000).map(stack_limit_for).collect();
        assert!(limits.len() > 900);
        for l in limits {
            assert_eq!(l % 4096, 0);
            assert!(((128 << 20)..(192 << 20)).contains(&l), "{l}");
        }
    }
}
