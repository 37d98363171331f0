//! Leaving a process's memory to the kernel's own means: swap, and same-page merging.
//!
//! The platform needs neither. They are what it is measured against.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use crate::mappings::Mappings;
use crate::pages::{PageClass, PageRun, PageScanner};
use crate::sys;
use crate::tracee::{InjectError, SeizeError, SeizeOptions, ThreadGroup};

/// The most ranges that one call takes (`UIO_MAXIOV`).
const MOST_RANGES: usize = 1024;

/// Why a process's pages could not be left to same-page merging.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// It can't be stopped.
    #[error(transparent)]
    Seize(#[from] SeizeError),
    /// It can't be made to ask for it, or the kernel refuses (it knows this since Linux 6.4).
    #[error(transparent)]
    Inject(#[from] InjectError),
}

/// The pages that a process has for itself: anonymous ones, and those of private file mappings that
/// it has written to.
///
/// # Errors
/// If the process is gone or can't be looked at.
pub fn own_pages(pid: i32) -> io::Result<Vec<Range<u64>>> {
    let mut scanner = PageScanner::open(pid)?;
    let mut runs = Vec::new();
    for mapping in Mappings::read(pid)? {
        if mapping.is_anonymous() || mapping.is_file_private() {
            scanner.scan(&mapping, &mut runs)?;
        }
    }
    runs.retain(|run| matches!(run.class, PageClass::Anonymous | PageClass::FileCow));
    Ok(runs.iter().map(PageRun::range).collect())
}

/// Has the kernel write the pages of `ranges` of a process to swap, as far as there is room: the
/// process may be frozen. Pages that other processes map as well stay.
///
/// # Errors
/// What the kernel says (`process_madvise(2)` with `MADV_PAGEOUT`, since Linux 5.10).
pub fn page_out(pid: i32, ranges: &[Range<u64>]) -> io::Result<()> {
    let pidfd = sys::pidfd_open(pid)?;
    for chunk in ranges.chunks(MOST_RANGES) {
        let mut left: Vec<libc::iovec> = chunk
            .iter()
            .map(|r| libc::iovec {
                iov_base: r.start as *mut _,
                iov_len: (r.end - r.start) as usize,
            })
            .collect();
        // The kernel may do less than it was asked for and says how many bytes it went over.
        while !left.is_empty() {
            // SAFETY: the vector is valid for the call; the addresses in it are another process's
            // and are not followed here, and paging out changes no content.
            let done = unsafe {
                libc::syscall(
                    libc::SYS_process_madvise,
                    pidfd.as_raw_fd(),
                    left.as_ptr(),
                    left.len(),
                    libc::MADV_PAGEOUT,
                    0,
                )
            };
            let mut done = sys::check(done)? as usize;
            if done == 0 {
                return Ok(());
            }
            while let Some(first) = left.first_mut() {
                if first.iov_len > done {
                    first.iov_base = (first.iov_base as usize + done) as *mut _;
                    first.iov_len -= done;
                    break;
                }
                done -= first.iov_len;
                left.remove(0);
            }
        }
    }
    Ok(())
}

/// Lets the kernel merge equal pages of a process's private anonymous memory with others'
/// (`PR_SET_MEMORY_MERGE`), as if the process had asked for it.
///
/// # Errors
/// [`MergeError`]; the process runs on as before.
pub fn allow_merging(pid: i32) -> Result<(), MergeError> {
    let mut process = ThreadGroup::seize(pid, &SeizeOptions::default())?;
    let result = process.call(
        "prctl(PR_SET_MEMORY_MERGE)",
        libc::SYS_prctl,
        [libc::PR_SET_MEMORY_MERGE as u64, 1, 0, 0, 0, 0],
    );
    process.detach()?;
    result?;
    Ok(())
}
