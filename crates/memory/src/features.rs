//! What the running kernel can do, and what to change where it cannot.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use crate::sys::{self, PAGE_SIZE};
use crate::tracee::rseq::kernel_has_rseq;
use crate::userfault::{UserFaultFeatures, open_device};

/// The lowest kernel supported.
pub const LOWEST_KERNEL: (u32, u32) = (5, 15);

/// What the running kernel can do, found by trying.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFeatures {
    /// Release as `uname -r` shows it.
    pub release: String,
    /// Major and minor number of the release.
    pub version: (u32, u32),
    /// This process can make a userfaultfd.
    pub userfaultfd: bool,
    /// `/dev/userfaultfd` can be opened, so that unprivileged processes can be given the right
    /// (6.1).
    pub userfaultfd_device: bool,
    /// Features of userfaultfds.
    pub userfaultfd_features: UserFaultFeatures,
    /// `PAGEMAP_SCAN` (6.7); without it page maps are read whole.
    pub pagemap_scan: bool,
    /// `PROCMAP_QUERY` (6.11).
    pub procmap_query: bool,
    /// A process can drop many ranges of its own in one call (6.14); without it, one call each.
    pub process_madvise_self: bool,
    /// Guard regions, which such a call makes and lifts and the page map tells of (6.15); without
    /// them, the kernel reports each range that is dropped.
    pub guard_regions: bool,
    /// `PTRACE_GET_RSEQ_CONFIGURATION` (5.13), or no restartable sequences at all.
    pub rseq_configuration: bool,
    /// `pidfd_getfd` (5.6).
    pub pidfd_getfd: bool,
    /// Read-only private pages can be written through `/proc/PID/mem`.
    pub forced_writes: bool,
    /// Seccomp filters of other processes can be suspended.
    pub suspend_seccomp: bool,
    /// No security module forbids tracing outright (`kernel.yama.ptrace_scope` below 3).
    pub tracing_allowed: bool,
}

/// Something that the kernel or this process's privileges lack.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} is missing: {remedy}")]
pub struct MissingFeature {
    /// What.
    pub what: &'static str,
    /// What to change.
    pub remedy: &'static str,
    /// Whether nothing works without it, rather than something works less well.
    pub required: bool,
}

impl KernelFeatures {
    /// Asks the kernel. Leaves no trace.
    pub fn probe() -> Self {
        let release = release();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        let mut number = || numbers.next().and_then(Result::ok).unwrap_or(0);
        let version = (number(), number());
        let offered = UserFaultFeatures::supported();
        Self {
            version,
            userfaultfd: offered.is_some(),
            userfaultfd_device: open_device().is_ok(),
            userfaultfd_features: offered.unwrap_or_default(),
            pagemap_scan: crate::pages::scan_supported(),
            procmap_query: procmap_query(),
            process_madvise_self: own_pidfd_for_madvise().is_some(),
            guard_regions: guard_regions(),
            rseq_configuration: version >= (5, 13) || !kernel_has_rseq(),
            pidfd_getfd: pidfd_getfd(),
            forced_writes: forced_writes(),
            suspend_seccomp: suspend_seccomp(),
            tracing_allowed: fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope")
                .map_or(true, |scope| scope.trim() != "3"),
            release,
        }
    }

    /// What is missing, the required first.
    pub fn missing(&self) -> Vec<MissingFeature> {
        let all = [
            (self.version >= LOWEST_KERNEL, "Linux 5.15 or later", "install a newer kernel", true),
            (
                self.userfaultfd,
                "userfaultfd",
                "run as root, on a kernel with CONFIG_USERFAULTFD",
                true,
            ),
            (
                self.userfaultfd_features.contains(UserFaultFeatures::EVENTS),
                "userfaultfd events",
                "run with CAP_SYS_PTRACE in the initial user namespace",
                true,
            ),
            (
                self.tracing_allowed,
                "the right to trace other processes",
                "boot with kernel.yama.ptrace_scope below 3",
                true,
            ),
            (self.pidfd_getfd, "pidfd_getfd", "install Linux 5.6 or later", true),
            (
                self.rseq_configuration,
                "PTRACE_GET_RSEQ_CONFIGURATION",
                "install Linux 5.13 or later",
                true,
            ),
            (
                self.forced_writes,
                "writing to read-only pages through /proc/PID/mem",
                "boot with proc_mem.force_override=always",
                true,
            ),
            (
                self.userfaultfd_device,
                "/dev/userfaultfd",
                "install Linux 6.1 or later; without it unprivileged sandboxes stay warm",
                false,
            ),
            (
                self.suspend_seccomp,
                "suspending seccomp filters",
                "run with CAP_SYS_ADMIN and without a seccomp filter, on a kernel with \
                 CONFIG_CHECKPOINT_RESTORE; without it filtered sandboxes stay warm",
                false,
            ),
            (
                self.pagemap_scan,
                "PAGEMAP_SCAN",
                "install Linux 6.7 or later for faster scans",
                false,
            ),
            (
                self.userfaultfd_features.contains(UserFaultFeatures::TRACK_WRITES),
                "asynchronous write protection",
                "install Linux 6.7 or later for a cheap second dedup",
                false,
            ),
            (
                self.process_madvise_self,
                "process_madvise on oneself",
                "install Linux 6.14 or later for faster dropping",
                false,
            ),
            (
                self.guard_regions,
                "guard regions",
                "install Linux 6.15 or later for faster dropping",
                false,
            ),
        ];
        let mut missing: Vec<_> = all
            .into_iter()
            .filter(|(present, ..)| !present)
            .map(|(_, what, remedy, required)| MissingFeature { what, remedy, required })
            .collect();
        missing.sort_by_key(|feature| !feature.required);
        missing
    }

    /// Whether everything required is there.
    ///
    /// # Errors
    /// The first thing that is not, with what to change.
    pub fn check(&self) -> Result<(), MissingFeature> {
        match self.missing().into_iter().find(|feature| feature.required) {
            Some(feature) => Err(feature),
            None => Ok(()),
        }
    }
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map(|release| release.trim().to_owned())
        .unwrap_or_default()
}

/// The number by which a process can name itself to `process_madvise`, if the kernel lets a
/// process drop its own pages so.
pub(crate) fn own_pidfd_for_madvise() -> Option<RawFd> {
    static FOUND: OnceLock<Option<RawFd>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let page = OwnPage::map(libc::PROT_READ | libc::PROT_WRITE).ok()?;
        [sys::PIDFD_SELF_THREAD_GROUP, sys::PIDFD_SELF_THREAD_GROUP_OLD]
            .into_iter()
            .find(|&pidfd| page.takes(pidfd, libc::MADV_DONTNEED))
    })
}

/// Whether a process can make guard regions of its own pages so, and lift them, and the page map tells
/// them from pages.
pub(crate) fn guard_regions() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let advice = [sys::MADV_GUARD_INSTALL, sys::MADV_GUARD_REMOVE];
        let taken = |pidfd| {
            let page = OwnPage::map(libc::PROT_READ | libc::PROT_WRITE);
            page.is_ok_and(|page| advice.into_iter().all(|advice| page.takes(pidfd, advice)))
        };
        crate::pages::guards_are_reported() && own_pidfd_for_madvise().is_some_and(taken)
    })
}

/// A private anonymous page of this process, unmapped on drop.
struct OwnPage(*mut u8);

impl OwnPage {
    fn map(protection: i32) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE as usize,
                protection,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(address.cast()))
    }

    /// Whether `process_madvise` takes an advice on the page from the process that `pidfd` names, which
    /// is this one.
    fn takes(&self, pidfd: RawFd, advice: i32) -> bool {
        let vector = libc::iovec { iov_base: self.0.cast(), iov_len: PAGE_SIZE as usize };
        // SAFETY: changes a page that nothing but `self` refers to, and that nobody reads or writes.
        let result =
            unsafe { libc::syscall(libc::SYS_process_madvise, pidfd, &vector, 1, advice, 0) };
        result == PAGE_SIZE as i64
    }
}

impl Drop for OwnPage {
    fn drop(&mut self) {
        // SAFETY: unmaps what `map` mapped; nothing refers to it any more.
        unsafe { libc::munmap(self.0.cast(), PAGE_SIZE as usize) };
    }
}

fn forced_writes() -> bool {
    let Ok(page) = OwnPage::map(libc::PROT_READ) else { return false };
    fs::OpenOptions::new()
        .write(true)
        .open("/proc/self/mem")
        .and_then(|memory| memory.write_all_at(&[1], page.0 as u64))
        .is_ok()
}

fn procmap_query() -> bool {
    /// `_IOWR(PROCFS_IOCTL_MAGIC, 17, struct procmap_query)`.
    const PROCMAP_QUERY: u64 = 0xc068_6611;
    /// `struct procmap_query`: size, flags, address asked for, and the answer.
    #[repr(C)]
    #[derive(Default)]
    struct Query {
        size: u64,
        flags: u64,
        address: u64,
        answer: [u64; 10],
    }
    const COVERING_OR_NEXT: u64 = 0x10;
    let mut query =
        Query { size: size_of::<Query>() as u64, flags: COVERING_OR_NEXT, ..Query::default() };
    fs::File::open("/proc/self/maps").is_ok_and(|maps| {
        // SAFETY: PROCMAP_QUERY takes a struct procmap_query; its name buffers are null.
        unsafe { sys::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &mut query) }.is_ok()
    })
}

fn pidfd_getfd() -> bool {
    let Ok(pidfd) = sys::pidfd_open(std::process::id() as i32) else { return false };
    sys::pidfd_getfd(&pidfd, pidfd.as_raw_fd()).is_ok()
}

/// The kernel wants CAP_SYS_ADMIN and a tracer that is not filtered itself.
fn suspend_seccomp() -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    let Ok(status) = fs::read_to_string("/proc/thread-self/status") else { return false };
    let capable = sys::status_field(&status, "CapEff")
        .and_then(|field| u64::from_str_radix(field, 16).ok())
        .is_some_and(|capabilities| capabilities & (1 << CAP_SYS_ADMIN) != 0);
    capable && sys::status_field(&status, "Seccomp").is_none_or(|mode| mode == "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_agrees_with_the_release() {
        let features = KernelFeatures::probe();
        assert!(features.version >= (5, 0), "{features:?}");
        if features.version >= (6, 7) {
            assert!(features.pagemap_scan);
        }
        if features.version >= (6, 11) {
            assert!(features.procmap_query);
        }
    }

    #[test]
    fn what_is_missing_says_what_to_do() {
        let mut features = KernelFeatures::probe();
        features.version = (4, 19);
        features.pagemap_scan = false;
        let missing = features.missing();
        assert!(missing[0].required);
        assert!(missing.iter().any(|feature| feature.what == "PAGEMAP_SCAN" && !feature.required));
        assert!(features.check().unwrap_err().to_string().contains("5.15"));
    }
}
