//! One step of making a sandbox, and what it is called when it fails.

use std::ffi::CString;
use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// Where the host's files are seen while the sandbox is made.
pub(crate) const HOST: &str = "/.host";

/// One step, ready to be carried out without allocating. [`fmt::Display`] says what it does.
pub(crate) enum Step {
    /// Closes all descriptors in these inclusive ranges.
    CloseDescriptors(Vec<(u32, u32)>),
    /// Default signal handling, no signal blocked.
    ResetSignals,
    /// Moves the process into the version 1 cgroup whose `tasks` file is open.
    JoinCgroup {
        path: PathBuf,
        tasks: RawFd,
    },
    /// Makes `from` the descriptor `to`.
    Descriptor {
        from: RawFd,
        to: RawFd,
    },
    Session,
    /// The scheduler treats it as any other process, whatever it grants the platform.
    OrdinaryPriority,
    ResourceLimit {
        resource: u32,
        name: &'static str,
        soft: u64,
        hard: u64,
    },
    NoGroups,
    /// Mounts made here stay here, and the host's later ones stay out.
    PrivateMounts,
    /// A new, empty root; the host's appears at [`HOST`].
    NewRoot {
        options: CString,
    },
    Directory {
        path: CString,
        mode: u32,
    },
    File {
        path: CString,
        contents: Vec<u8>,
    },
    Device {
        path: CString,
        major: u32,
        minor: u32,
    },
    Link {
        path: CString,
        target: CString,
    },
    NullStdin,
    Filesystem {
        kind: CString,
        target: CString,
        flags: u64,
        options: CString,
    },
    Bind {
        source: CString,
        target: CString,
        attributes: u64,
    },
    OomScore {
        value: CString,
    },
    LeaveHost,
    SealRoot,
    /// Gives up every privilege on the host by entering a new user namespace.
    UserNamespace,
    /// Waits until the parent has mapped the user.
    AwaitUserMap,
    Namespaces,
    Loopback,
    HostName(CString),
    NoBoundingSet,
    User {
        uid: u32,
    },
    NoCapabilities,
    NoNewPrivileges,
    WorkingDirectory(CString),
    /// The kernel kills the process when the thread that made it dies.
    DieWithParent,
    FixedLayout,
    FilterSystemCalls(&'static [libc::sock_filter]),
    /// Waits for the parent's word to run the program.
    AwaitStart,
    /// Runs the first of the programs that exists.
    Execute {
        programs: Vec<CString>,
        name: String,
    },
}

/// A path in words, without the prefix under which the child sees the host.
fn words(path: &CString) -> std::borrow::Cow<'_, str> {
    let bytes = path.as_bytes();
    String::from_utf8_lossy(bytes.strip_prefix(HOST.as_bytes()).unwrap_or(bytes))
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CloseDescriptors(_) => f.write_str("closing inherited descriptors"),
            Self::ResetSignals => f.write_str("resetting signals"),
            Self::JoinCgroup { path, .. } => write!(f, "joining the cgroup {}", path.display()),
            Self::Descriptor { to, .. } => write!(f, "installing descriptor {to}"),
            Self::Session => f.write_str("starting a session"),
            Self::OrdinaryPriority => f.write_str("setting the scheduling priority"),
            Self::ResourceLimit { name, soft, hard, .. } => {
                write!(f, "setting the resource limit {name} to {soft} (at most {hard})")
            }
            Self::NoGroups => f.write_str("dropping supplementary groups"),
            Self::PrivateMounts => f.write_str("making mounts private"),
            Self::NewRoot { .. } => f.write_str("making a new root"),
            Self::Directory { path, .. } => write!(f, "making the directory {}", words(path)),
            Self::File { path, .. } => write!(f, "making the file {}", words(path)),
            Self::Device { path, .. } => write!(f, "making the device {}", words(path)),
            Self::Link { path, target } => {
                write!(f, "linking {} to {}", words(path), words(target))
            }
            Self::NullStdin => f.write_str("opening /dev/null as standard input"),
            Self::Filesystem { kind, target, .. } => {
                write!(f, "mounting a {} on {}", words(kind), words(target))
            }
            Self::Bind { source, target, .. } => {
                write!(f, "mounting {} on {}", words(source), words(target))
            }
            Self::OomScore { .. } => f.write_str("setting the out-of-memory score"),
            Self::LeaveHost => f.write_str("unmounting the host's root"),
            Self::SealRoot => f.write_str("making the root read-only"),
            Self::UserNamespace => f.write_str("making a user namespace"),
            Self::AwaitUserMap => f.write_str("waiting for the user map"),
            Self::Namespaces => f.write_str("making network, ipc, uts and cgroup namespaces"),
            Self::Loopback => f.write_str("bringing the loopback interface up"),
            Self::HostName(_) => f.write_str("setting the host name"),
            Self::NoBoundingSet => f.write_str("emptying the capability bounding set"),
            Self::User { uid } => write!(f, "becoming user {uid}"),
            Self::NoCapabilities => f.write_str("dropping capabilities"),
            Self::NoNewPrivileges => f.write_str("giving up new privileges"),
            Self::WorkingDirectory(path) => write!(f, "changing to the directory {}", words(path)),
            Self::DieWithParent => f.write_str("asking to be killed with the parent"),
            Self::FixedLayout => f.write_str("turning address randomisation off"),
            Self::FilterSystemCalls(_) => f.write_str("filtering system calls"),
            Self::AwaitStart => f.write_str("waiting for the start"),
            Self::Execute { name, .. } => write!(f, "executing {name}"),
        }
    }
}
