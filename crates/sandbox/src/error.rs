//! What can go wrong with a sandbox.

use std::time::Duration;

use nix::errno::Errno;

use crate::cgroup::CgroupError;
use crate::sandbox::Exit;

/// Why a sandbox could not be made, started, watched or removed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The specification makes no sense.
    #[error("bad sandbox specification: {reason}")]
    Spec {
        /// What is wrong, with the value.
        reason: String,
    },
    /// A cgroup operation failed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// One step of making the sandbox failed, inside it.
    #[error("{step}: {errno}")]
    Step {
        /// The step, in words: "mounting /usr on /usr".
        step: String,
        /// The kernel's answer.
        errno: Errno,
    },
    /// A system call of the platform's own side failed.
    #[error("{action}: {errno}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The first process died before it ran its program.
    #[error(
        "the sandbox's first process died while it was set up ({exit}); \
         a memory limit that is too small does this"
    )]
    Died {
        /// How it ended.
        exit: Exit,
    },
    /// The kernel took too long.
    #[error("{action} took more than {limit:?}")]
    Timeout {
        /// What did not come to an end.
        action: &'static str,
        /// How long it was given.
        limit: Duration,
    },
}

impl SandboxError {
    pub(crate) fn system(action: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::System { action, errno }
    }

    pub(crate) fn io(action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |e| Self::System {
            action,
            errno: Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)),
        }
    }
}
