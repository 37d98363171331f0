//! Kernel interfaces that libc does not define, and thin wrappers of the calls used here.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Page size of the only page size supported: 4 KiB.
pub const PAGE_SIZE: u64 = 4096;

/// `si_code >> 8` (and wait status) of a stop made by `PTRACE_INTERRUPT` or a group stop.
pub const PTRACE_EVENT_STOP: i32 = 128;

/// `struct ptrace_rseq_configuration` of linux/ptrace.h.
#[repr(C)]
#[derive(Default, Clone, Copy, Debug)]
pub struct RseqConfiguration {
    pub pointer: u64,
    pub size: u32,
    pub signature: u32,
    pub flags: u32,
    pub pad: u32,
}

/// `struct ptrace_sud_config` of linux/ptrace.h.
#[repr(C)]
#[derive(Default, Clone, Copy, Debug)]
pub struct SyscallUserDispatch {
    pub mode: u64,
    pub selector: u64,
    pub offset: u64,
    pub len: u64,
}

/// A target or target-independent descriptor that names the calling process (6.14 and later).
pub const PIDFD_SELF_THREAD_GROUP: RawFd = -10001;
/// The value the same name had before 6.16.
pub const PIDFD_SELF_THREAD_GROUP_OLD: RawFd = -20000;

/// `madvise` advice: drop pages even of locked mappings (5.18).
pub const MADV_DONTNEED_LOCKED: i32 = 24;
/// `madvise` advice: pages are dropped, and touching them is an error from now on (6.13).
pub const MADV_GUARD_INSTALL: i32 = 102;
/// `madvise` advice: lifts what [`MADV_GUARD_INSTALL`] did; the pages are missing then.
pub const MADV_GUARD_REMOVE: i32 = 103;

/// Runs a system call that returns -1 with errno.
pub fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Opens a descriptor of a process, close-on-exec.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Duplicates descriptor `fd` of the process behind `pidfd` into this one.
pub fn pidfd_getfd(pidfd: &OwnedFd, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes three integers and touches no memory of ours.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })?;
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sends a signal to the process behind `pidfd`.
pub fn pidfd_send_signal(pidfd: &OwnedFd, signal: i32) -> io::Result<()> {
    // SAFETY: no siginfo is passed, so the call reads no memory of ours.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<c_void>(),
            0,
        )
    })
    .map(drop)
}

/// An `ioctl` whose argument is a structure that the kernel reads and writes.
///
/// # Safety
/// `request` must take a pointer to `T`, and any pointer inside `arg` must be valid for what
/// the request does with it.
pub unsafe fn ioctl<T>(fd: RawFd, request: u64, arg: &mut T) -> io::Result<i64> {
    // SAFETY: forwarded to the caller; `arg` is a valid exclusive reference.
    check(i64::from(unsafe { libc::ioctl(fd, request as _, std::ptr::from_mut(arg)) }))
}

/// Whether two processes share one address space (`kcmp`, `KCMP_VM`).
pub fn same_address_space(a: i32, b: i32) -> io::Result<bool> {
    const KCMP_VM: i32 = 1;
    // SAFETY: KCMP_VM takes integers only.
    Ok(check(unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) })? == 0)
}

/// Reads one field of `/proc/PID/status`, without the name and without white space.
pub fn status_field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}
