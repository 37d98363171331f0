//! A userfaultfd of another process: its missing pages are ours to fill.
//!
//! The descriptor belongs to the target's address space, but every `UFFDIO_*` call works from
//! the process that holds it. See the kernel's Documentation/admin-guide/mm/userfaultfd.rst.
//!
//! A thread that waits for a page inside a system call may hold locks of the kernel: of a pipe,
//! for one. Writing to such a pipe, or reading from it, even without blocking, then waits in
//! uninterruptible sleep until the page is there; and the thread itself can be neither frozen
//! nor stopped until then. So whoever serves faults must do nothing else that could wait for the
//! target, and faults must be served while it is being frozen.
//!
//! Closing the last descriptor of a userfaultfd unregisters everything: missing pages then
//! read as zeros. Whoever holds a [`UserFault`] for a process with dropped pages must
//! therefore outlive it, or [`UserFaultOptions::keep_in_target`] must be set.

mod abi;
mod create;
mod events;
mod fill;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

pub(crate) use create::open_device;
pub use create::{CreateError, UserFaultOptions};
pub use events::{Event, FaultKind};
pub use fill::{CopyMode, FillError, Filled};

use crate::mappings::Mappings;
use crate::sys;

/// Features of a userfaultfd (`UFFDIO_API`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UserFaultFeatures(u64);

impl UserFaultFeatures {
    /// Faults tell whether they come from write protection.
    pub const PAGEFAULT_FLAG_WP: Self = Self(1 << 0);
    /// A fork of the process yields a userfaultfd of the child.
    pub const EVENT_FORK: Self = Self(1 << 1);
    /// `mremap` is reported.
    pub const EVENT_REMAP: Self = Self(1 << 2);
    /// `madvise` that drops pages is reported.
    pub const EVENT_REMOVE: Self = Self(1 << 3);
    /// `munmap` is reported.
    pub const EVENT_UNMAP: Self = Self(1 << 6);
    /// Faults tell the thread.
    pub const THREAD_ID: Self = Self(1 << 8);
    /// Faults tell the address to the byte, not to the page (5.18).
    pub const EXACT_ADDRESS: Self = Self(1 << 11);
    /// Pages never touched can be write-protected too (6.4).
    pub const WP_UNPOPULATED: Self = Self(1 << 13);
    /// Write protection is lifted by the kernel and only recorded (6.7).
    pub const WP_ASYNC: Self = Self(1 << 15);
    /// None.
    pub const NONE: Self = Self(0);

    /// What a lazily restored process needs: everything it may do to its address space is
    /// reported.
    pub const EVENTS: Self =
        Self(Self::EVENT_FORK.0 | Self::EVENT_REMAP.0 | Self::EVENT_REMOVE.0 | Self::EVENT_UNMAP.0);
    /// What finding written pages without stopping at them needs.
    pub const TRACK_WRITES: Self =
        Self(Self::PAGEFAULT_FLAG_WP.0 | Self::WP_UNPOPULATED.0 | Self::WP_ASYNC.0);

    /// Features by the kernel's bits.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The kernel's bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Both sets.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// [`Self::EVENTS`], and [`Self::TRACK_WRITES`] where this kernel has all of it.
    pub fn events_and_writes() -> Self {
        match Self::supported() {
            Some(supported) if supported.contains(Self::TRACK_WRITES) => {
                Self::EVENTS.union(Self::TRACK_WRITES)
            }
            _ => Self::EVENTS,
        }
    }

    /// What is in both sets.
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether all of `other` is in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What this kernel offers to this process; `None` if it cannot make a userfaultfd.
    pub fn supported() -> Option<Self> {
        let fd = create::own().ok()?;
        create::handshake(&fd, Self::NONE).ok()
    }
}

/// What is reported for a registered range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegisterMode {
    /// Missing pages.
    Missing,
    /// Missing pages, and pages can be write-protected.
    MissingAndWriteProtect,
    /// Pages can be write-protected. With [`UserFaultFeatures::WP_ASYNC`] any kind of mapping
    /// can be registered so.
    WriteProtect,
}

/// Why a range could not be registered. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
#[error("cannot register {:#x}..{:#x} with userfaultfd: {reason}: {source}", range.start, range.end)]
pub struct RegisterError {
    /// The range.
    pub range: Range<u64>,
    /// What the error number means here.
    pub reason: &'static str,
    /// What the kernel said.
    pub source: io::Error,
}

/// A userfaultfd of another process, held by this one.
#[derive(Debug)]
pub struct UserFault {
    fd: OwnedFd,
    features: UserFaultFeatures,
    /// Registered ranges by address, one per mapping.
    registered: Vec<Range<u64>>,
    /// Ranges registered for write protection alone.
    watched: BTreeMap<u64, u64>,
    /// Events read while waiting for something else.
    queued: VecDeque<Event>,
    /// Number of the descriptor that the target kept.
    target_fd: Option<i32>,
}

impl UserFault {
    /// Takes over a userfaultfd whose creation and registrations happened elsewhere, such as
    /// in a process that has exited since and passed the descriptor on.
    pub fn from_parts(
        fd: OwnedFd,
        features: UserFaultFeatures,
        registered: Vec<Range<u64>>,
        target_fd: Option<i32>,
    ) -> Self {
        let mut registered = registered;
        registered.sort_unstable_by_key(|range| range.start);
        let (watched, queued) = (BTreeMap::new(), VecDeque::new());
        Self { fd, features, registered, watched, queued, target_fd }
    }

    /// The descriptor, to be passed to another process.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Features in use.
    pub fn features(&self) -> UserFaultFeatures {
        self.features
    }

    /// The same userfaultfd with ranges registered as another holder of it knows them.
    ///
    /// # Errors
    /// If the descriptor can't be duplicated.
    pub fn duplicate(&self, registered: Vec<Range<u64>>) -> io::Result<Self> {
        let fd = self.fd.try_clone()?;
        Ok(Self::from_parts(fd, self.features, registered, self.target_fd))
    }

    /// Whether writes are found by asking ([`UserFaultFeatures::TRACK_WRITES`]).
    pub fn tracks_writes(&self) -> bool {
        self.features.contains(UserFaultFeatures::TRACK_WRITES)
    }

    /// Ranges registered for missing pages, by address; each is what one call of
    /// [`register`](Self::register) named. Events are not followed.
    pub fn registered(&self) -> &[Range<u64>] {
        &self.registered
    }

    /// Ranges registered for write protection and not for missing pages; each is what one call of
    /// [`register`](Self::register) named. Events are not followed.
    pub fn watched(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.watched.iter().map(|(start, end)| *start..*end)
    }

    /// Number of the descriptor in the target, if the target kept one.
    pub fn target_fd(&self) -> Option<i32> {
        self.target_fd
    }

    /// Registers a range, which should be exactly one mapping: [`copy`](Self::copy) and
    /// [`zeropage`](Self::zeropage) split what they are given at the borders of registered
    /// ranges, since no such call may cross a mapping's.
    ///
    /// # Errors
    /// [`RegisterError`], with the kernel's reason for refusing the mapping.
    pub fn register(&mut self, range: Range<u64>, mode: RegisterMode) -> Result<(), RegisterError> {
        let mode_bits = match mode {
            RegisterMode::Missing => abi::REGISTER_MODE_MISSING,
            RegisterMode::MissingAndWriteProtect => {
                abi::REGISTER_MODE_MISSING | abi::REGISTER_MODE_WP
            }
            RegisterMode::WriteProtect => abi::REGISTER_MODE_WP,
        };
        let mut arg =
            abi::Register { range: abi_range(&range), mode: mode_bits, ..Default::default() };
        // SAFETY: UFFDIO_REGISTER takes a struct uffdio_register, which holds no pointers.
        match unsafe { sys::ioctl(self.fd.as_raw_fd(), abi::UFFDIO_REGISTER, &mut arg) } {
            Ok(_) => {
                if mode == RegisterMode::WriteProtect {
                    self.watched.insert(range.start, range.end);
                } else {
                    self.forget(&range);
                    self.watched.remove(&range.start);
                    let index = self.registered.partition_point(|known| known.start < range.start);
                    self.registered.insert(index, range);
                }
                Ok(())
            }
            Err(source) => {
                let reason = match source.raw_os_error() {
                    Some(libc::EBUSY) => "the program registered it with a userfaultfd of its own",
                    Some(libc::EINVAL) => "not anonymous memory, or not wholly mapped",
                    Some(libc::EPERM) => "memory that can never be written to",
                    Some(libc::ENOMEM) => "no memory, or too many mappings (vm.max_map_count)",
                    Some(libc::ESRCH) => "the process is gone",
                    _ => "refused by the kernel",
                };
                Err(RegisterError { range, reason, source })
            }
        }
    }

    /// Ends the registration of a range: its missing pages then read as zeros, and threads
    /// that wait for one run on.
    ///
    /// # Errors
    /// EINVAL if the range holds a mapping that cannot be registered, ESRCH if the process is
    /// gone, ENOMEM.
    pub fn unregister(&mut self, range: Range<u64>) -> io::Result<()> {
        let mut arg = abi_range(&range);
        // SAFETY: UFFDIO_UNREGISTER takes a struct uffdio_range, which holds no pointers.
        unsafe { sys::ioctl(self.fd.as_raw_fd(), abi::UFFDIO_UNREGISTER, &mut arg) }?;
        self.forget(&range);
        Ok(())
    }

    /// Ends all registrations, as [`unregister`](Self::unregister) does, of a process that has
    /// not run since they were made. One that has may have moved or extended registered
    /// mappings: for it there is [`unregister_process`](Self::unregister_process).
    ///
    /// # Errors
    /// The first error; all ranges are tried. Ranges that the process unmapped meanwhile are
    /// no error.
    pub fn unregister_all(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        for range in std::mem::take(&mut self.registered) {
            if let Err(error) = self.unregister(range.clone())
                && error.raw_os_error() != Some(libc::EINVAL)
            {
                self.registered.push(range);
                result = result.and(Err(error));
            }
        }
        result
    }

    /// Ends the registrations of every mapping of `pid`, the process this userfaultfd belongs
    /// to, wherever they are by now.
    ///
    /// A registered mapping stays registered when it grows (a stack, `mremap`) and when it
    /// moves. With a descriptor left in the target, closing this one releases nothing, and a
    /// part forgotten would block the first thread that touches a new page of it.
    ///
    /// # Errors
    /// If the mappings cannot be read, or the first error of unregistering; all are tried.
    pub fn unregister_process(&mut self, pid: i32) -> io::Result<()> {
        // Again as long as some are left: mappings move while they are listed. A program that moves
        // a registered mapping back to where it was cut from, next to one that no longer is, finds
        // that mremap does not take them for one; so this is quick, and the slow look comes last.
        const PASSES: usize = 8;
        for _ in 0..PASSES {
            let mut result = Ok(());
            for mapping in Mappings::read(pid)?.iter().filter(|mapping| mapping.is_anonymous()) {
                // EINVAL: changed since it was read, or never could be registered.
                if let Err(error) = self.unregister(mapping.range())
                    && error.raw_os_error() != Some(libc::EINVAL)
                {
                    result = result.and(Err(error));
                }
            }
            result?;
            let left = Mappings::read_with_flags(pid, &|| false)?;
            if !left.iter().any(|mapping| mapping.flags.userfault_missing) {
                break;
            }
        }
        self.registered.clear();
        Ok(())
    }

    /// Wakes the threads that wait for pages of a range.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn wake(&self, range: Range<u64>) -> io::Result<()> {
        let mut arg = abi_range(&range);
        // SAFETY: UFFDIO_WAKE takes a struct uffdio_range, which holds no pointers.
        unsafe { sys::ioctl(self.fd.as_raw_fd(), abi::UFFDIO_WAKE, &mut arg) }.map(drop)
    }

    /// Write-protects a range, or lifts the protection. The range must be registered with
    /// write protection.
    ///
    /// # Errors
    /// ENOENT if it is not; EAGAIN while the process changes its mappings (read the events).
    pub fn write_protect(&self, range: Range<u64>, protect: bool) -> io::Result<()> {
        let mut arg = abi::WriteProtect {
            range: abi_range(&range),
            mode: if protect { abi::WRITEPROTECT_MODE_WP } else { 0 },
        };
        // SAFETY: UFFDIO_WRITEPROTECT takes a struct uffdio_writeprotect without pointers.
        unsafe { sys::ioctl(self.fd.as_raw_fd(), abi::UFFDIO_WRITEPROTECT, &mut arg) }.map(drop)
    }

    /// Whether all of `range` is registered for missing pages.
    pub fn covers(&self, range: &Range<u64>) -> bool {
        let mut at = range.start;
        let first = self.registered.partition_point(|known| known.end <= at);
        for known in &self.registered[first..] {
            if at >= range.end || known.start > at {
                break;
            }
            at = known.end;
        }
        at >= range.end
    }

    /// Removes `range` from the registered ranges, cutting those it overlaps.
    fn forget(&mut self, range: &Range<u64>) {
        if self.registered.iter().all(|known| known.end <= range.start || known.start >= range.end)
        {
            return;
        }
        self.registered = std::mem::take(&mut self.registered)
            .into_iter()
            .flat_map(|known| {
                let before = known.start..known.end.min(range.start);
                let after = known.start.max(range.end)..known.end;
                [before, after]
            })
            .filter(|part| part.start < part.end)
            .collect();
    }
}

impl AsFd for UserFault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn abi_range(range: &Range<u64>) -> abi::Range {
    abi::Range { start: range.start, len: range.end - range.start }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_ranges(registered: Vec<Range<u64>>) -> UserFault {
        let fd = std::fs::File::open("/dev/null").unwrap().into();
        UserFault::from_parts(fd, UserFaultFeatures::NONE, registered, None)
    }

    #[test]
    fn covers_adjacent_ranges_but_no_gap() {
        let uffd = with_ranges(vec![0x3000..0x5000, 0x1000..0x3000, 0x6000..0x7000]);
        assert!(uffd.covers(&(0x1000..0x5000)));
        assert!(uffd.covers(&(0x2000..0x4000)));
        assert!(!uffd.covers(&(0x2000..0x7000)));
        assert!(!uffd.covers(&(0x0..0x2000)));
        assert!(!uffd.covers(&(0x7000..0x8000)));
    }

    #[test]
    fn forgets_parts() {
        let mut uffd = with_ranges(vec![0x1000..0x5000, 0x6000..0x7000]);
        uffd.forget(&(0x2000..0x3000));
        assert_eq!(uffd.registered(), [0x1000..0x2000, 0x3000..0x5000, 0x6000..0x7000]);
        uffd.forget(&(0x4000..0x8000));
        assert_eq!(uffd.registered(), [0x1000..0x2000, 0x3000..0x4000]);
    }
}
