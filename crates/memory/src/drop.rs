//! Giving a process's pages back to the kernel.
//!
//! `madvise(MADV_DONTNEED)` works on the caller's own memory only, so the process is made to
//! call it. `process_madvise` on itself (6.13, with a descriptor that needs no opening since
//! 6.14) takes up to 1,024 ranges a call; older kernels take one call a range.
//!
//! With [`EVENT_REMOVE`](crate::userfault::UserFaultFeatures::EVENT_REMOVE) the kernel reports
//! each range that `MADV_DONTNEED` drops, and waits until the report is read: 10 to 80 us a range.
//! Making a guard region of it (`MADV_GUARD_INSTALL`) drops its pages as well, and is not reported,
//! nor is lifting it again; that takes 3 us a range and 0.5 us a page. Whoever reaches for the memory
//! in between gets an error, not zeros, so it is the way for anonymous memory where the kernel has it
//! ([`is_quiet`]). (Unregistering the memory for as long would save the reports too, but
//! process_vm_readv(2) or khugepaged could fill it with zeros meanwhile, which stay.)

use std::ops::Range;

use crate::features;
use crate::sys::{MADV_DONTNEED_LOCKED, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE, PAGE_SIZE};
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
    /// Pages were dropped, and touching them may stay an error: the process was killed.
    #[error("pages of process {pid}, which is killed, can't be reached any more: {why}")]
    Guarded {
        /// The process.
        pid: i32,
        /// What went wrong.
        why: String,
    },
}

/// Whether dropping anonymous memory is not reported. Ranges are best made of nothing but pages that
/// are there then, where else a hole costs less than one more range.
#[must_use]
pub fn is_quiet() -> bool {
    features::guard_regions()
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
/// too where the kernel can (`MADV_DONTNEED_LOCKED`, 5.18). Where dropping [is quiet](is_quiet), ranges
/// that are guard regions now are added to `guarded`: until they are [lifted](lift) reaching for them is
/// an error. Guard regions of the process's own are lifted with them.
///
/// # Errors
/// See [`DropError`]. All ranges are checked before the first is dropped.
pub fn drop_pages(
    process: &mut SeizedProcess,
    userfault: &mut UserFault,
    ranges: &[Range<u64>],
    guarded: &mut Vec<Range<u64>>,
) -> Result<Dropped, DropError> {
    check_aligned(ranges)?;
    if let Some(range) = ranges.iter().find(|range| !userfault.covers(range)) {
        return Err(DropError::NotRegistered { range: range.clone() });
    }
    let mut dropped = Dropped::default();
    let done = match is_quiet() {
        true => discard_quietly(process, ranges, guarded, &mut dropped)?,
        false => 0,
    };
    discard(process, &ranges[done..], &mut dropped, &mut || {
        // A report of a range that is being dropped says nothing new; the kernel may report
        // it in parts. Errors mean that the process is gone, which the call's end will tell.
        let expected = |removed: &Range<u64>| {
            ranges.iter().any(|range| range.start <= removed.start && removed.end <= range.end)
        };
        userfault.queue_events(expected).unwrap_or(0) > 0
    })?;
    Ok(dropped)
}

/// Lifts guard regions that [`drop_pages`] has made: their pages are missing from then on.
///
/// # Errors
/// [`DropError::Guarded`].
pub fn lift(process: &mut SeizedProcess, guarded: &[Range<u64>]) -> Result<(), DropError> {
    for batch in guarded.chunks(MAX_RANGES) {
        let lifted = Vector::write(process, batch)
            .and_then(|vector| vector.advise(process, MADV_GUARD_REMOVE, &mut || false));
        let why = match lifted {
            Ok(lifted) if lifted == bytes(batch) as i64 => continue,
            Ok(lifted) => format!("lifting guard regions returned {lifted}"),
            // Even if it is said to be gone.
            Err(error) => error.to_string(),
        };
        process.kill();
        return Err(DropError::Guarded { pid: process.pid(), why });
    }
    Ok(())
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
    check_aligned(ranges)?;
    let mut dropped = Dropped::default();
    discard(process, ranges, &mut dropped, &mut || false)?;
    Ok(dropped)
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

fn check_aligned(ranges: &[Range<u64>]) -> Result<(), DropError> {
    let aligned = |range: &&Range<u64>| {
        range.start.is_multiple_of(PAGE_SIZE)
            && range.end.is_multiple_of(PAGE_SIZE)
            && range.start < range.end
    };
    match ranges.iter().find(|range| !aligned(range)) {
        Some(range) => Err(DropError::Misaligned { range: range.clone() }),
        None => Ok(()),
    }
}

/// Drops leading ranges by making guard regions of them, added to `guarded`; returns how many. It ends
/// early at memory that can't be one: locked memory.
fn discard_quietly(
    process: &mut SeizedProcess,
    ranges: &[Range<u64>],
    guarded: &mut Vec<Range<u64>>,
    dropped: &mut Dropped,
) -> Result<usize, DropError> {
    let mut done = 0;
    for batch in ranges.chunks(MAX_RANGES) {
        let vector = Vector::write(process, batch)?;
        let made = vector.advise(process, MADV_GUARD_INSTALL, &mut || false).inspect_err(|_| {
            // Nobody knows which.
            guarded.extend_from_slice(batch);
        })?;
        dropped.calls += 1;
        let whole = leading(batch, made);
        dropped.bytes += bytes(&batch[..whole]);
        // One more may be half done.
        guarded.extend_from_slice(&batch[..batch.len().min(whole + 1)]);
        done += whole;
        if whole < batch.len() {
            break;
        }
    }
    Ok(done)
}

fn discard(
    process: &mut SeizedProcess,
    ranges: &[Range<u64>],
    dropped: &mut Dropped,
    meanwhile: &mut dyn FnMut() -> bool,
) -> Result<(), DropError> {
    let mut rest = ranges;
    while !rest.is_empty() {
        let done = discard_vector(process, rest, meanwhile, dropped)?;
        rest = &rest[done..];
        // One by one: on kernels that take no vector, and where the vector stopped.
        if let Some(range) = rest.first() {
            discard_one(process, range, meanwhile, dropped)?;
            rest = &rest[1..];
        }
    }
    Ok(())
}

/// Drops leading ranges by one `process_madvise`; returns how many were dropped whole.
fn discard_vector(
    process: &mut SeizedProcess,
    ranges: &[Range<u64>],
    meanwhile: &mut dyn FnMut() -> bool,
    dropped: &mut Dropped,
) -> Result<usize, DropError> {
    if ranges.len() < 2 || features::own_pidfd_for_madvise().is_none() {
        return Ok(0);
    }
    let batch = &ranges[..ranges.len().min(MAX_RANGES)];
    let result = Vector::write(process, batch)?.advise(process, libc::MADV_DONTNEED, meanwhile)?;
    meanwhile();
    dropped.calls += 1;
    let whole = leading(batch, result);
    dropped.bytes += bytes(&batch[..whole]);
    Ok(whole)
}

/// Ranges in the process's scratch area, for `process_madvise`.
#[derive(Clone, Copy)]
struct Vector {
    address: u64,
    count: usize,
}

impl Vector {
    fn write(process: &mut SeizedProcess, batch: &[Range<u64>]) -> Result<Self, InjectError> {
        let address = process.scratch()?.address + PAGE_SIZE;
        let vectors: Vec<u8> = batch
            .iter()
            .flat_map(|range| [range.start, range.end - range.start])
            .flat_map(u64::to_ne_bytes)
            .collect();
        process.write_memory(address, &vectors)?;
        Ok(Self { address, count: batch.len() })
    }

    /// Advises the kernel on all ranges; returns what the call did.
    fn advise(
        self,
        process: &mut SeizedProcess,
        advice: i32,
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> Result<i64, InjectError> {
        let Some(own_pidfd) = features::own_pidfd_for_madvise() else {
            return Ok(-i64::from(libc::EBADF));
        };
        let Self { address, count } = self;
        let args = [i64::from(own_pidfd) as u64, address, count as u64, advice as u64, 0, 0];
        process.inject_syscall_with(libc::SYS_process_madvise, args, meanwhile)
    }
}

/// How many leading ranges the first bytes of all hold whole, if a call returned their number; none
/// if it returned an error.
fn leading(batch: &[Range<u64>], result: i64) -> usize {
    let Ok(mut rest) = u64::try_from(result) else { return 0 };
    let is_whole = |range: &&Range<u64>| {
        let whole = rest.checked_sub(range.end - range.start);
        rest = whole.unwrap_or(0);
        whole.is_some()
    };
    batch.iter().take_while(is_whole).count()
}

fn bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
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
