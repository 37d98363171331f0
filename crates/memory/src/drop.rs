//! Giving a process's pages back to the kernel.
//!
//! `madvise(MADV_DONTNEED)` works on the caller's own memory only, so the process is made to
//! call it. `process_madvise` on itself (6.13, with a descriptor that needs no opening since
//! 6.14) takes up to 1,024 ranges a call; older kernels take one call a range.
//!
//! With [`EVENT_REMOVE`](crate::userfault::UserFaultFeatures::EVENT_REMOVE) the kernel reports
//! each dropped range and waits until the report is read, so reports are read while the
//! injected call runs. A range costs about 10 us then: pass whole ranges (holes that are not
//! populated cost nothing), not runs of pages. Unregistering them for as long would save that, but
//! whoever else reaches the memory meanwhile (process_vm_readv(2), khugepaged) would fill it with
//! zeros, which stay.

use std::ops::Range;

use crate::features;
use crate::sys::{MADV_DONTNEED_LOCKED, PAGE_SIZE};
use crate::tracee::{InjectError, SeizedProcess};
use crate::userfault::UserFault;

/// Ranges of one vectored call (UIO_MAXIOV).
const MAX_RANGES: usize = 1024;

/// Why pages were not dropped.
#[derive(Debug, thiserror::Error)]
pub enum DropError {
    /// The range is not registered with the userfaultfd: its pages would read as zeros.
    /// Nothing was dropped.
    #[error("{:#x}..{:#x} is not registered with userfaultfd and must not be dropped", range.start, range.end)]
    NotRegistered {
        /// The range.
        range: Range<u64>,
    },
    /// Not a whole number of pages. Nothing was dropped.
    #[error("{:#x}..{:#x} is not made of whole pages", range.start, range.end)]
    Misaligned {
        /// The range.
        range: Range<u64>,
    },
    /// The injected call failed; ranges before the failing one are dropped.
    #[error(transparent)]
    Inject(#[from] InjectError),
}

/// What was dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Bytes of address space given up, populated or not.
    pub bytes: u64,
    /// Injected calls that it took.
    pub calls: u32,
}

/// Drops the pages of ranges that are registered with `userfault`. Locked memory is dropped
/// too where the kernel can (`MADV_DONTNEED_LOCKED`, 5.18).
///
/// # Errors
/// See [`DropError`]. All ranges are checked before the first is dropped.
pub fn drop_pages(
    process: &mut SeizedProcess,
    userfault: &mut UserFault,
    ranges: &[Range<u64>],
) -> Result<Dropped, DropError> {
    if let Some(range) = ranges.iter().find(|range| !userfault.covers(range)) {
        return Err(DropError::NotRegistered { range: range.clone() });
    }
    discard(process, ranges, &mut || {
        // A report of a range that is being dropped says nothing new; the kernel may report
        // it in parts. Errors mean that the process is gone, which the call's end will tell.
        let expected = |removed: &Range<u64>| {
            ranges.iter().any(|range| range.start <= removed.start && removed.end <= range.end)
        };
        userfault.queue_events(expected).unwrap_or(0) > 0
    })
}

/// Drops the pages of private file mappings, which no userfaultfd can cover: they read as the
/// file's content from now on.
///
/// The caller answers for two things: that it holds the content of every private page in
/// `ranges`, and that the process runs no instruction before
/// [`write_pages`](crate::writer::write_pages) has put them back.
///
/// # Errors
/// See [`DropError`].
pub fn drop_file_pages(
    process: &mut SeizedProcess,
    ranges: &[Range<u64>],
) -> Result<Dropped, DropError> {
    discard(process, ranges, &mut || false)
}

/// Puts empty anonymous memory in the place of a private file mapping, which a userfaultfd can
/// cover then: its pages can come back one by one, like all others.
///
/// The process can't tell but by reading its own mappings: private file mappings only ever hand
/// out the file's content or the process's own copy, and both are put back as pages. Futexes in it
/// are keyed by address already, since their pages were written to.
///
/// The caller answers for what [`drop_file_pages`] asks for, and holds the content of *every* page
/// of the mapping, not only of the private ones. When this fails the process may lack the mapping,
/// and must be killed.
///
/// # Errors
/// See [`DropError`].
pub fn replace_file_mapping(
    process: &mut SeizedProcess,
    range: &Range<u64>,
    protection: i32,
) -> Result<(), DropError> {
    const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let args = [range.start, range.end - range.start, protection as u64, FLAGS as u64, u64::MAX, 0];
    process.call("mmap", libc::SYS_mmap, args)?;
    Ok(())
}

fn discard(
    process: &mut SeizedProcess,
    ranges: &[Range<u64>],
    meanwhile: &mut dyn FnMut() -> bool,
) -> Result<Dropped, DropError> {
    let aligned = |range: &&Range<u64>| {
        range.start.is_multiple_of(PAGE_SIZE)
            && range.end.is_multiple_of(PAGE_SIZE)
            && range.start < range.end
    };
    if let Some(range) = ranges.iter().find(|range| !aligned(range)) {
        return Err(DropError::Misaligned { range: range.clone() });
    }
    let mut dropped = Dropped::default();
    let mut rest = ranges;
    while !rest.is_empty() {
        let done = discard_vector(process, rest, meanwhile, &mut dropped)?;
        rest = &rest[done..];
        // One by one: on kernels that take no vector, and where the vector stopped.
        if let Some(range) = rest.first() {
            discard_one(process, range, meanwhile, &mut dropped)?;
            rest = &rest[1..];
        }
    }
    Ok(dropped)
}

/// Drops leading ranges by one `process_madvise`; returns how many were dropped whole.
fn discard_vector(
    process: &mut SeizedProcess,
    ranges: &[Range<u64>],
    meanwhile: &mut dyn FnMut() -> bool,
    dropped: &mut Dropped,
) -> Result<usize, DropError> {
    let Some(own_pidfd) = features::own_pidfd_for_madvise() else { return Ok(0) };
    if ranges.len() < 2 {
        return Ok(0);
    }
    let batch = &ranges[..ranges.len().min(MAX_RANGES)];
    let scratch = process.scratch()?;
    let vectors: Vec<u8> = batch
        .iter()
        .flat_map(|range| [range.start, range.end - range.start])
        .flat_map(u64::to_ne_bytes)
        .collect();
    process.write_memory(scratch.address + PAGE_SIZE, &vectors)?;
    let result = process.inject_syscall_with(
        libc::SYS_process_madvise,
        [
            i64::from(own_pidfd) as u64,
            scratch.address + PAGE_SIZE,
            batch.len() as u64,
            libc::MADV_DONTNEED as u64,
            0,
            0,
        ],
        meanwhile,
    )?;
    meanwhile();
    dropped.calls += 1;
    let Ok(mut bytes) = u64::try_from(result) else { return Ok(0) };
    let mut whole = 0;
    for range in batch {
        let len = range.end - range.start;
        if bytes < len {
            break;
        }
        bytes -= len;
        dropped.bytes += len;
        whole += 1;
    }
    Ok(whole)
}

fn discard_one(
    process: &mut SeizedProcess,
    range: &Range<u64>,
    meanwhile: &mut dyn FnMut() -> bool,
    dropped: &mut Dropped,
) -> Result<(), DropError> {
    let len = range.end - range.start;
    for advice in [libc::MADV_DONTNEED, MADV_DONTNEED_LOCKED] {
        let args = [range.start, len, advice as u64, 0, 0, 0];
        let result = process.inject_syscall_with(libc::SYS_madvise, args, meanwhile)?;
        meanwhile();
        dropped.calls += 1;
        // EINVAL of the first means locked memory, if anything.
        if advice == libc::MADV_DONTNEED && result == -i64::from(libc::EINVAL) {
            continue;
        }
        process.checked("madvise", result)?;
        dropped.bytes += len;
        break;
    }
    Ok(())
}
