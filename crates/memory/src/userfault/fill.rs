//! Putting pages into a registered range.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::{UserFault, abi, abi_range};
use crate::sys::{self, PAGE_SIZE};

/// How pages are put back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CopyMode {
    /// Write-protect the pages, so that later writes to them can be found.
    pub write_protect: bool,
    /// Do not wake threads that wait for the pages; [`UserFault::wake`] does so later.
    pub no_wake: bool,
}

/// What became of the pages of a fill.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filled {
    /// Bytes put in.
    pub filled: u64,
    /// Bytes left alone because the page was there already.
    pub present: u64,
}

/// Why pages could not be put in. Those counted are in place.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The process forks or changes its mappings, and waits for its report to be read, or soon
    /// will: read the events, then try the rest again.
    #[error("the process is changing its mappings; its events must be read first")]
    Changing {
        /// What was done.
        done: Filled,
    },
    /// A page is not in a registered mapping.
    #[error("page {address:#x} is not registered with userfaultfd")]
    NotRegistered {
        /// Address of the page.
        address: u64,
        /// What was done.
        done: Filled,
    },
    /// The process is gone.
    #[error("the process is gone")]
    Gone,
    /// Not a whole number of pages.
    #[error("address or size is not a multiple of the page size")]
    Misaligned,
    /// Any other error.
    #[error("page {address:#x}: {source}")]
    Os {
        /// Address of the page.
        address: u64,
        /// What was done.
        done: Filled,
        /// What the kernel said.
        source: io::Error,
    },
}

impl UserFault {
    /// Copies pages into the target (`UFFDIO_COPY`): `source` is the content of the pages from
    /// address `start` on.
    ///
    /// The kernel takes no copy that crosses a mapping's border. So the pages are split at the
    /// borders of registered ranges, and further wherever the kernel finds another border.
    /// Partial copies are continued, pages that are there already are left alone.
    ///
    /// # Errors
    /// See [`FillError`].
    pub fn copy(&self, start: u64, source: &[u8], mode: CopyMode) -> Result<Filled, FillError> {
        let base = source.as_ptr() as u64;
        let mut bits = if mode.no_wake { abi::COPY_MODE_DONTWAKE } else { 0 };
        if mode.write_protect {
            bits |= abi::COPY_MODE_WP;
        }
        self.fill(start..start + source.len() as u64, |part| {
            let mut arg = abi::Copy {
                dst: part.start,
                src: base + (part.start - start),
                len: part.end - part.start,
                mode: bits,
                copy: 0,
            };
            // SAFETY: the kernel reads `len` bytes at `src`, which lie in `source`.
            let result = unsafe { sys::ioctl(self.fd.as_raw_fd(), abi::UFFDIO_COPY, &mut arg) };
            (result.map(drop), arg.copy)
        })
    }

    /// Fills a range with zero pages (`UFFDIO_ZEROPAGE`), split as [`copy`](Self::copy) does.
    ///
    /// # Errors
    /// See [`FillError`].
    pub fn zeropage(&self, range: Range<u64>, no_wake: bool) -> Result<Filled, FillError> {
        let mode = if no_wake { abi::ZEROPAGE_MODE_DONTWAKE } else { 0 };
        self.fill(range, |part| {
            let mut arg = abi::ZeroPage { range: abi_range(&part), mode, zeropage: 0 };
            // SAFETY: UFFDIO_ZEROPAGE takes a struct uffdio_zeropage without pointers.
            let result = unsafe { sys::ioctl(self.fd.as_raw_fd(), abi::UFFDIO_ZEROPAGE, &mut arg) };
            (result.map(drop), arg.zeropage)
        })
    }

    /// Runs `fill_part` over a range until all of it is there; it returns the call's result
    /// and the count that the kernel left in the structure.
    fn fill(
        &self,
        range: Range<u64>,
        mut fill_part: impl FnMut(Range<u64>) -> (io::Result<()>, i64),
    ) -> Result<Filled, FillError> {
        if !range.start.is_multiple_of(PAGE_SIZE) || !range.end.is_multiple_of(PAGE_SIZE) {
            return Err(FillError::Misaligned);
        }
        let mut done = Filled::default();
        let mut at = range.start;
        // Halved where the kernel finds a border that the registered ranges do not tell of.
        let mut longest = u64::MAX;
        let mut transient = 0;
        while at < range.end {
            let border = self.border_after(at).min(range.end);
            let len = (border - at).min(longest);
            let (result, count) = fill_part(at..at + len);
            let error = match result {
                Ok(()) => {
                    done.filled += len;
                    at += len;
                    transient = 0;
                    longest = longest.saturating_mul(2);
                    continue;
                }
                Err(error) => error,
            };
            if count > 0 {
                done.filled += count as u64;
                at += count as u64;
                transient = 0;
                continue;
            }
            let address = at;
            match error.raw_os_error() {
                Some(libc::EEXIST) => {
                    done.present += PAGE_SIZE;
                    at += PAGE_SIZE;
                }
                Some(libc::ENOENT | libc::EINVAL) if len > PAGE_SIZE => {
                    longest = (len / PAGE_SIZE / 2).max(1) * PAGE_SIZE;
                }
                Some(libc::ENOENT) => return Err(FillError::NotRegistered { address, done }),
                // The mappings change, or the page tables did under the kernel's eyes; the
                // latter passes by itself.
                Some(libc::EAGAIN) => {
                    transient += 1;
                    if transient > 16 {
                        return Err(FillError::Changing { done });
                    }
                    std::hint::spin_loop();
                }
                // ENOSPC is what kernels before 5.10 say for a process that exited.
                Some(libc::ESRCH | libc::ENOSPC) => return Err(FillError::Gone),
                _ => return Err(FillError::Os { address, done, source: error }),
            }
        }
        Ok(done)
    }

    /// End of the registered range that holds `address`, or the start of the next.
    fn border_after(&self, address: u64) -> u64 {
        let index = self.registered.partition_point(|known| known.end <= address);
        match self.registered.get(index) {
            Some(range) if range.start <= address => range.end,
            Some(range) => range.start,
            None => u64::MAX,
        }
    }
}
