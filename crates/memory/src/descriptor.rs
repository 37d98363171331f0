//! Taking descriptors out of other processes.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use crate::sys;

/// Duplicates descriptor `number` of process `pid` into this process (`pidfd_getfd`, 5.6).
///
/// # Errors
/// ESRCH if there is no such process, EBADF if it has no such descriptor, EPERM if this process
/// may not trace it.
pub fn take_descriptor(pid: i32, number: RawFd) -> io::Result<OwnedFd> {
    sys::pidfd_getfd(&sys::pidfd_open(pid)?, number)
}
