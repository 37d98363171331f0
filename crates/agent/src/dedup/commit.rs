//! The steps that touch the sandbox itself: registering its memory, checking that nobody wrote to
//! it since it was read, dropping it.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use medes_memory::pages::{PageClass, PageRun, PageScanner};
use medes_memory::ranges::without;
use medes_memory::session::{EvictError, Eviction, Freezer, Replacement, Session};
use medes_memory::tracee::SeizeOptions;
use medes_memory::userfault::{RegisterMode, UserFault};
use medes_pages::PAGE_SIZE;
use medes_store::ImageHandle;

use super::batch::{Batch, hash, page_buffer};
use super::standing::{Phase, Standing};
use super::{Counts, DedupError, Hindrance, Operation};
use crate::plan::{MappingKind, MappingPlan, Plan, ProcessPlan};

/// Address space that is dropped between two looks at whether a request wants the sandbox: dropping
/// a page takes a quarter of a microsecond.
const SLICE: u64 = 4 << 20;

/// What is registered of a plan's processes.
pub(super) struct Registered {
    /// For each process the mappings that can be dropped: those that are registered, and those
    /// that will be when they have become anonymous.
    pub(super) ranges: Vec<Vec<Range<u64>>>,
    /// Whether the kernel tells of writes to registered mappings.
    pub(super) tracks_writes: bool,
    /// Whether all of them were write-protected before they were read.
    pub(super) protected: bool,
}

impl Registered {
    /// Whether a range of process `n`, which is a mapping, is registered or will be.
    fn includes(&self, n: usize, range: &Range<u64>) -> bool {
        self.ranges[n].binary_search_by_key(&range.start, |r| r.start).is_ok()
    }

    /// Whether the kernel tells of writes to the pages of a mapping that are read.
    pub(super) fn watches(&self, mapping: &MappingPlan) -> bool {
        self.protected && mapping.kind == MappingKind::Anonymous
    }
}

impl Operation<'_> {
    /// Registers the plan's mappings; from here on the kernel remembers who writes to them, if it
    /// can. Where it can they lack nothing yet even if pages should be missing, so that a sandbox
    /// that is let run again need not be waited for.
    pub(super) fn register(
        &self,
        userfaults: &mut [UserFault],
        fresh: bool,
        plan: &Plan,
    ) -> Result<Registered, DedupError> {
        if userfaults.len() != plan.processes.len() {
            return Err(Hindrance::Changed.into());
        }
        let mut ranges = Vec::with_capacity(plan.processes.len());
        let tracks_writes = userfaults.iter().all(UserFault::tracks_writes);
        let mode = match tracks_writes {
            true => RegisterMode::WriteProtect,
            false => RegisterMode::Missing,
        };
        let protected = fresh && tracks_writes;
        for (process, userfault) in plan.processes.iter().zip(userfaults) {
            let mut of_process = Vec::new();
            for mapping in &process.mappings {
                self.check_cancelled()?;
                let range = mapping.start..mapping.end;
                match mapping.kind {
                    // Registered when it has become anonymous.
                    MappingKind::Replaced(_) => of_process.push(range),
                    MappingKind::File => {}
                    MappingKind::Anonymous if userfault.covers(&range) => of_process.push(range),
                    MappingKind::Anonymous => match userfault.register(range.clone(), mode) {
                        Ok(()) => {
                            if protected {
                                protect(userfault, mapping).map_err(Hindrance::Protect)?;
                            }
                            of_process.push(range);
                        }
                        // What is away can't stay.
                        Err(error) if !mapping.reused.is_empty() => {
                            return Err(Hindrance::Register(error).into());
                        }
                        Err(error) => tracing::debug!(%error, "a mapping stays resident"),
                    },
                }
            }
            ranges.push(of_process);
        }
        Ok(Registered { ranges, tracks_writes, protected })
    }

    /// Hands the image and the userfaultfds over and drops the pages, after checking that they are
    /// as they were read. On an error the image is still the caller's to remove.
    pub(super) fn commit<F: Freezer>(
        &self,
        standing: &mut Standing<'_, F>,
        plan: &Plan,
        registered: &Registered,
        read: (&[Batch], &[Option<u64>]),
        image: &ImageHandle,
        counts: &mut Counts,
    ) -> Result<(), DedupError> {
        self.check_cancelled()?;
        let holder = standing.holder;
        let mut session = Session::open(&mut standing.freezer, &SeizeOptions::default())
            .map_err(Hindrance::Session)?;
        let userfaults = &mut standing.userfaults;
        let ready = self
            .verify(&session, plan, registered, read)
            .and_then(|()| watch_missing(plan, registered, userfaults))
            .and_then(|()| kept_pages(&mut session, plan));
        let descriptors: Vec<BorrowedFd<'_>> = userfaults.iter().map(AsFd::as_fd).collect();
        let held = ready
            // A sandbox that the holder believes to be away may not run on.
            .inspect(|_| session.kill_with_tracer())
            .and_then(|kept| {
                let held = holder.hold(image, &descriptors, &plan.written());
                held.map_err(Hindrance::Holder)?;
                Ok(kept)
            })
            .and_then(|kept| {
                self.check_cancelled().inspect_err(|_| holder.release())?;
                Ok(kept)
            });
        let kept = match held {
            Ok(kept) => kept,
            Err(error) => {
                let ended = session.resume();
                standing.phase = Phase::Runs;
                return Err(match ended {
                    Ok(()) => error,
                    Err(closing) => DedupError::Lost(format!("{error}; then: {closing}")),
                });
            }
        };
        counts.kept = kept.iter().flatten().map(|r| (r.end - r.start) / PAGE_SIZE as u64).sum();
        // From here on pages are missing.
        let dropped = self.drop_all(&mut session, plan, &kept, &mut standing.userfaults);
        let closed = session.close();
        if let Err(error @ EvictError::Replace { .. }) = &dropped {
            return Err(DedupError::Lost(error.to_string()));
        }
        if let Err(error) = &dropped {
            tracing::warn!(%error, "dropping pages failed; they are put back");
            // The holder puts the pages back and thaws; those still there are left alone.
            let back = closed.map_err(|error| error.to_string()).and_then(|()| holder.put_back());
            if let Err(why) = back {
                return Err(DedupError::Lost(format!("{error}; then: {why}")));
            }
            standing.runs_again();
            return Err(DedupError::StaysWarm(Hindrance::Holder(error.to_string())));
        }
        closed.map_err(|error| DedupError::Lost(error.to_string()))
    }

    /// Whether the sandbox's memory is still what was read.
    fn verify<F: Freezer>(
        &self,
        session: &Session<F>,
        plan: &Plan,
        registered: &Registered,
        (batches, hashes): (&[Batch], &[Option<u64>]),
    ) -> Result<(), DedupError> {
        let mut pids: Vec<i32> = session.processes().iter().map(|p| p.pid()).collect();
        pids.sort_unstable();
        if !pids.iter().copied().eq(plan.processes.iter().map(|p| p.pid)) {
            return Err(Hindrance::Changed.into());
        }
        let mut written = Vec::new();
        for (n, process) in plan.processes.iter().enumerate() {
            let mut scanner = PageScanner::open(process.pid).map_err(Hindrance::Look)?;
            let mut scan = |range: Range<u64>| {
                let found = scanner.scan_written(range, PageClass::Anonymous, false, &mut written);
                found.map_err(Hindrance::Look)
            };
            for mapping in &process.mappings {
                let range = mapping.start..mapping.end;
                if registered.watches(mapping) && registered.includes(n, &range) {
                    mapping.runs.iter().try_for_each(|run| scan(run.range()))?;
                }
                for reused in &mapping.reused {
                    scan(reused.range.clone())?;
                }
            }
        }
        if !written.is_empty() {
            return Err(Hindrance::Changed.into());
        }
        let mut buffer = page_buffer();
        for (batch, expected) in batches.iter().zip(hashes) {
            self.check_cancelled()?;
            if let Some(expected) = expected
                && hash(batch.read(&mut buffer)?) != *expected
            {
                return Err(Hindrance::Changed.into());
            }
        }
        Ok(())
    }

    /// Drops every page that the image can bring back, but those that the kernel itself touches,
    /// and those that are left when a request comes.
    fn drop_all<F: Freezer>(
        &self,
        session: &mut Session<F>,
        plan: &Plan,
        kept: &[Vec<Range<u64>>],
        userfaults: &mut [UserFault],
    ) -> Result<(), EvictError> {
        for ((process, userfault), kept) in plan.processes.iter().zip(userfaults).zip(kept) {
            let track_writes = userfault.tracks_writes();
            // What changes a mapping is done for all or none: an image names what came of it.
            let mut first = Eviction { track_writes, ..Eviction::default() };
            let mut anonymous = Vec::new();
            for mapping in &process.mappings {
                let range = mapping.start..mapping.end;
                match mapping.kind {
                    MappingKind::Anonymous => anonymous.extend(without(range, kept)),
                    MappingKind::Replaced(protection) => {
                        first.replace.push(Replacement { range, protection });
                    }
                    MappingKind::File => {
                        let runs = mapping.runs.iter().map(PageRun::range);
                        first.file.extend(runs.flat_map(|r| without(r, kept)));
                    }
                }
            }
            session.evict(process.pid, userfault, &first)?;
            for slice in slices(&anonymous) {
                if self.cancel.is_requested() {
                    // Whatever is still there when the rest is brought back is left alone.
                    return Ok(());
                }
                let eviction =
                    Eviction { anonymous: slice.to_vec(), track_writes, ..Eviction::default() };
                session.evict(process.pid, userfault, &eviction)?;
            }
        }
        Ok(())
    }
}

/// The pages that must stay in each process of the plan, because the kernel itself touches them on
/// its threads' way back to user space. Without the kernel's word on that nothing may go.
fn kept_pages<F: Freezer>(
    session: &mut Session<F>,
    plan: &Plan,
) -> Result<Vec<Vec<Range<u64>>>, DedupError> {
    let of_process = |process: &ProcessPlan| {
        let seized = session.process(process.pid).ok_or(Hindrance::Changed)?;
        let areas = seized.rseq_areas().map_err(Hindrance::Rseq)?;
        let mut kept: Vec<Range<u64>> = areas.iter().flat_map(|a| a.resident_pages()).collect();
        kept.sort_unstable_by_key(|r| r.start);
        Ok(kept)
    };
    plan.processes.iter().map(of_process).collect()
}

/// Registers for missing pages what has been registered for write protection so far.
fn watch_missing(
    plan: &Plan,
    registered: &Registered,
    userfaults: &mut [UserFault],
) -> Result<(), DedupError> {
    for (n, process) in plan.processes.iter().enumerate() {
        for mapping in process.mappings.iter().filter(|m| m.kind == MappingKind::Anonymous) {
            let range = mapping.start..mapping.end;
            if registered.includes(n, &range) && !userfaults[n].covers(&range) {
                let mode = RegisterMode::MissingAndWriteProtect;
                userfaults[n].register(range, mode).map_err(Hindrance::Register)?;
            }
        }
    }
    Ok(())
}

/// Write-protects the pages of a mapping that are there: protecting those that are not would take
/// memory for each.
fn protect(userfault: &UserFault, mapping: &MappingPlan) -> io::Result<()> {
    mapping.runs.iter().try_for_each(|run| userfault.write_protect(run.range(), true))
}

/// Ranges in groups of about [`SLICE`] bytes, none of them cut.
fn slices(ranges: &[Range<u64>]) -> Vec<&[Range<u64>]> {
    let mut slices = Vec::new();
    let (mut from, mut bytes) = (0, 0);
    for (n, range) in ranges.iter().enumerate() {
        bytes += range.end - range.start;
        if bytes >= SLICE {
            slices.push(&ranges[from..=n]);
            (from, bytes) = (n + 1, 0);
        }
    }
    if from < ranges.len() {
        slices.push(&ranges[from..]);
    }
    slices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_hold_every_range_once() {
        let ranges =
            [0..SLICE / 2, SLICE..SLICE + 4096, 2 * SLICE..9 * SLICE, 10 * SLICE..11 * SLICE];
        let slices = slices(&ranges);
        assert_eq!(slices.concat(), ranges);
        assert_eq!(slices.iter().map(|s| s.len()).collect::<Vec<_>>(), [3, 1]);
        let one = std::slice::from_ref(&ranges[0]);
        assert_eq!(super::slices(one), [one]);
        assert!(super::slices(&[]).is_empty());
    }
}
