//! Other processes: their descriptors, and their end.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::sys;

/// A process, whoever has its number later.
#[derive(Debug)]
pub struct ProcessHandle {
    pidfd: OwnedFd,
}

impl ProcessHandle {
    /// Opens a process.
    ///
    /// # Errors
    /// ESRCH if there is no such process.
    pub fn open(pid: i32) -> io::Result<Self> {
        Ok(Self { pidfd: sys::pidfd_open(pid)? })
    }

    /// Duplicates one of its descriptors into this process (`pidfd_getfd`, 5.6).
    ///
    /// # Errors
    /// ESRCH if it has ended, EBADF if it has no such descriptor, EPERM if this process may not
    /// trace it.
    pub fn take_descriptor(&self, number: RawFd) -> io::Result<OwnedFd> {
        sys::pidfd_getfd(&self.pidfd, number)
    }

    /// Waits until it has ended with all its threads, so that it traces nobody any more; false if
    /// it has not after `limit`.
    #[must_use]
    pub fn ends_within(&self, limit: Duration) -> bool {
        let mut poll =
            libc::pollfd { fd: self.pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let millis = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one live pollfd.
        unsafe { libc::poll(&mut poll, 1, millis) == 1 }
    }
}
