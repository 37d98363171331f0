//! Sandboxes: making, limiting, freezing, killing and removing them.
//!
//! A sandbox is one program in namespaces of its own (user, mount, pid, network, ipc, uts, cgroup),
//! on a read-only root with a private `/tmp`, under limits, without any privilege on the host and
//! behind a system call filter. It is described in the vocabulary of the OCI runtime specification
//! ([`SandboxSpec`]) and has its two phases: [`Sandbox::create`] makes everything except the
//! program, [`Created::start`] runs it. Between the two the caller can act inside, for example
//! bind a listener on the sandbox's own loopback ([`in_network_namespace`]).
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use medes_sandbox::{CgroupRoot, Sandbox, SandboxSpec};
//! use std::time::Duration;
//!
//! # let spec: SandboxSpec = unimplemented!();
//! let (stdout_reader, stdout) = std::io::pipe()?;
//! let (stderr_reader, stderr) = std::io::pipe()?;
//! let root = CgroupRoot::new("medes")?;
//! let created = Sandbox::create(&root, &spec, stdout.into(), stderr.into())?;
//! let running = created.start()?;
//! running.cgroup().freeze(Duration::from_secs(1))?;
//! running.cgroup().thaw()?;
//! running.destroy(Duration::from_secs(5))?;
//! # Ok(())
//! # }
//! ```
//!
//! # Who owns what
//!
//! The mount and pid namespaces belong to the host's user namespace, so that nothing inside can
//! ever change a mount; the others belong to the sandbox's. When the last process dies the kernel
//! removes namespaces and mounts. Cgroups stay until [`Running::destroy`], and after a crash until
//! [`CgroupRoot::remove_all`].
//!
//! # The first process
//!
//! The program is process 1 of its pid namespace: when it ends, everything else is killed. Like
//! every init it gets no signal from inside that it does not handle, not even SIGKILL, and it
//! inherits orphans, which count against the limit of processes until it waits for them.
//!
//! # Requirements
//!
//! Linux 5.15 or newer, root, a cgroup version 2 hierarchy (with or without controllers).

mod cgroup;
mod child;
mod error;
mod isolation;
mod netns;
mod plan;
mod sandbox;
mod seccomp;
mod spec;

pub use cgroup::{Cgroup, CgroupError, CgroupRoot, MemoryReading};
pub use error::SandboxError;
pub use isolation::{Isolation, Weakness};
pub use netns::in_network_namespace;
pub use sandbox::{Created, Exit, Running, Sandbox};
pub use spec::{
    CODE_DIR, LAYER_DIR, Layout, Mount, Process, Resources, Rlimit, RlimitResource, SANDBOX_UID,
    SandboxSpec, Seccomp, SeccompProfile, SmallFile, stack_limit_for,
};
