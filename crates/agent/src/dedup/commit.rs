//! The steps that touch the sandbox itself: registering its memory, checking that nobody wrote to
//! it since it was read, dropping it.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use medes_memory::pages::{GAP, PageRun, PageScanner};
use medes_memory::ranges::{near, overlap, slices, within, without};
use medes_memory::session::{EvictError, Eviction, Freezer, Replacement, Session};
use medes_memory::tracee::SeizeOptions;
use medes_memory::userfault::{RegisterMode, UserFault};
use medes_pages::PAGE_SIZE;
use medes_store::ImageHandle;

use super::batch::{Batch, hash, page_buffer};
use super::standing::{PROTECTED, Phase, Standing};
use super::{Counts, DedupError, Handover, Hindrance, Operation};
use crate::plan::{MappingKind, MappingPlan, Plan, ProcessPlan};

/// How long the kernel may work between two looks at whether a request wants the sandbox,
/// nanoseconds, going by what its work usually takes.
const STEP_NS: u64 = 150_000;

/// What dropping takes the kernel.
#[derive(Clone, Copy)]
struct Costs {
    /// Dropping a page, nanoseconds.
    page_ns: u64,
    /// Dropping a range, however few pages it has, nanoseconds.
    range_ns: u64,
    /// Whether a hole costs less than one more range.
    joins: bool,
}

/// Where the kernel reports each range.
const REPORTED: Costs = Costs { page_ns: 800, range_ns: 10_000, joins: true };

/// Where it does not ([`medes_memory::drop::is_quiet`]).
const QUIET: Costs = Costs { page_ns: 500, range_ns: 3_000, joins: false };

/// Putting anonymous memory in the place of a file mapping, nanoseconds.
const REPLACE_NS: u64 = 22_000;

/// Pages that are there in the memory that is looked at in one piece for writes: it takes the kernel
/// 0.1 ms.
const LOOKED: u64 = 4096;

/// What is registered of a plan's processes.
pub(super) struct Registered {
    /// For each process the mappings that can be dropped: those that are registered, and those
    /// that will be when they have become anonymous or are dropped.
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
    ///
    /// In a process that was restored before nothing is, for whoever registers waits for the reader of
    /// the mappings' flags: what lacks pages is registered already ([`Operation::register_again`]), and
    /// the rest will be when it is dropped.
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
                    MappingKind::Anonymous if !fresh => of_process.push(range),
                    MappingKind::Anonymous => match userfault.register(range.clone(), mode) {
                        Ok(()) => {
                            if protected {
                                self.protect(userfault, mapping)?;
                            }
                            of_process.push(range);
                        }
                        Err(error) => tracing::debug!(%error, "a mapping stays resident"),
                    },
                }
            }
            ranges.push(of_process);
        }
        Ok(Registered { ranges, tracks_writes, protected })
    }

    /// Registers mappings that lack pages, of which not all is known to be registered: parts have
    /// stayed. The kernel has nothing to do for it, but it has the last word.
    pub(super) fn register_again(
        &self,
        userfaults: &mut [UserFault],
        plan: &Plan,
    ) -> Result<(), DedupError> {
        for (process, userfault) in plan.processes.iter().zip(userfaults) {
            let mode = match userfault.tracks_writes() {
                true => RegisterMode::MissingAndWriteProtect,
                false => RegisterMode::Missing,
            };
            for mapping in process.mappings.iter().filter(|mapping| !mapping.known.is_empty()) {
                self.check_cancelled()?;
                let range = mapping.start..mapping.end;
                if !userfault.covers(&range) {
                    userfault.register(range, mode).map_err(Hindrance::Register)?;
                }
            }
        }
        Ok(())
    }

    /// Hands the image and the userfaultfds over and drops the pages, after checking that they are
    /// as they were read. Returns whether a request has taken the sandbox back meanwhile. On an error
    /// the image is still the caller's to remove.
    pub(super) fn commit<F: Freezer>(
        &self,
        standing: &mut Standing<'_, F>,
        plan: &Plan,
        registered: &Registered,
        read: (&[Batch], &[Option<u64>]),
        image: &ImageHandle,
        counts: &mut Counts,
    ) -> Result<bool, DedupError> {
        self.check_cancelled()?;
        let holder = standing.holder;
        let mut session = Session::open(&mut standing.freezer, &SeizeOptions::default())
            .map_err(Hindrance::Session)?;
        let ready = self
            .verify(&session, plan, registered, read)
            .and_then(|()| kept_pages(&mut session, plan));
        let descriptors: Vec<BorrowedFd<'_>> =
            standing.userfaults.iter().map(AsFd::as_fd).collect();
        let held = ready
            // A sandbox that the holder believes to be away may not run on.
            .inspect(|_| session.kill_with_tracer())
            .and_then(|kept| {
                let handover = Handover {
                    image,
                    userfaults: &descriptors,
                    written: &plan.written(),
                    residents: &plan.residents(),
                };
                holder.hold(&handover).map_err(Hindrance::Holder)?;
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
        let dropped =
            self.drop_all(&mut session, plan, registered, &kept, &mut standing.userfaults);
        if let Ok(left) = &dropped
            && self.cancel.is_requested()
        {
            let mut settled = Ok(());
            let back = holder
                .take_back(left, &mut || settled = session.settle().map_err(text))
                .and(settled)
                .and_then(|()| session.run_on().map_err(text));
            back.map_err(|why| DedupError::Lost(format!("taking it back: {why}")))?;
            standing.runs_again();
            return Ok(true);
        }
        let told = match &dropped {
            Ok(left) if left.iter().any(|ranges| !ranges.is_empty()) => holder.left(left),
            _ => Ok(()),
        };
        if let Err(why) = told {
            return Err(DedupError::Lost(format!("telling the holder what is left: {why}")));
        }
        let closed = session.close();
        if let Err(error) = &dropped
            && error.is_fatal()
        {
            return Err(DedupError::Lost(error.to_string()));
        }
        if let Err(error) = &dropped {
            tracing::warn!(%error, "dropping pages failed; they are put back");
            // The holder puts the pages back and thaws; those still there are left alone.
            let back = closed.map_err(text).and_then(|()| holder.put_back());
            if let Err(why) = back {
                return Err(DedupError::Lost(format!("{error}; then: {why}")));
            }
            standing.runs_again();
            return Err(DedupError::StaysWarm(Hindrance::Holder(error.to_string())));
        }
        closed.map_err(|error| DedupError::Lost(error.to_string()))?;
        Ok(false)
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
        for (n, process) in plan.processes.iter().enumerate() {
            let mut scanner = PageScanner::open(process.pid).map_err(Hindrance::Look)?;
            let unwritten = unwritten(process, |mapping| {
                registered.watches(mapping) && registered.includes(n, &(mapping.start..mapping.end))
            });
            let mut written = Vec::new();
            for look in looks(&unwritten, process) {
                self.check_cancelled()?;
                written.clear();
                scanner.find_written(look, &mut written).map_err(Hindrance::Look)?;
                let is_meant = |range: &Range<u64>| {
                    let at = unwritten.partition_point(|pages| pages.end <= range.start);
                    unwritten.get(at).is_some_and(|pages| overlap(pages, range))
                };
                if written.iter().any(is_meant) {
                    return Err(Hindrance::Changed.into());
                }
            }
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

    /// Write-protects the pages of a mapping that are there: protecting those that are not would
    /// take memory for each.
    fn protect(&self, userfault: &UserFault, mapping: &MappingPlan) -> Result<(), DedupError> {
        for run in &mapping.runs {
            for slice in slices(run.range(), PROTECTED) {
                self.check_cancelled()?;
                userfault.write_protect(slice, true).map_err(Hindrance::Protect)?;
            }
        }
        Ok(())
    }

    /// Drops every page that the image can bring back, but those that the kernel itself touches,
    /// and those that are left when a request comes. Returns for each process the registered pages
    /// that are left: they are not as a restore would expect them. Residents are not among them, nor
    /// is what was away before, which the image brings back.
    fn drop_all<F: Freezer>(
        &self,
        session: &mut Session<F>,
        plan: &Plan,
        registered: &Registered,
        kept: &[Vec<Range<u64>>],
        userfaults: &mut [UserFault],
    ) -> Result<Vec<Vec<Range<u64>>>, EvictError> {
        let costs = if medes_memory::drop::is_quiet() { QUIET } else { REPORTED };
        let mut left = Vec::with_capacity(plan.processes.len());
        for (n, (process, userfault)) in plan.processes.iter().zip(userfaults).enumerate() {
            let mut of_process = Vec::new();
            let is_registered = |range: &Range<u64>| registered.includes(n, range);
            for mut step in steps(process, is_registered, &kept[n], costs) {
                let goes = !self.cancel.is_requested();
                if goes {
                    step.register.retain(|range| !userfault.covers(range));
                    step.track_writes = userfault.tracks_writes();
                    let evicted = session.evict(process.pid, userfault, &step)?;
                    for error in evicted.left_resident {
                        tracing::debug!(%error, "a mapping stays resident");
                    }
                }
                let anonymous = step.anonymous.into_iter();
                let ranges = anonymous.chain(step.replace.into_iter().map(|r| r.range));
                let stay = ranges.filter(|range| !goes || !userfault.covers(range));
                of_process.extend(stay.flat_map(|range| match userfault.covers(&range) {
                    true => there(process, &range),
                    // Nothing of it can be away.
                    false => vec![range],
                }));
            }
            left.push(of_process);
        }
        session.lift()?;
        Ok(left)
    }
}

/// What is there of a range of a process's memory.
fn there(process: &ProcessPlan, range: &Range<u64>) -> Vec<Range<u64>> {
    let after = process.mappings.partition_point(|mapping| mapping.end <= range.start);
    let mappings = process.mappings[after..].iter().take_while(|m| m.start < range.end);
    mappings.flat_map(|mapping| within(range, &mapping.there)).collect()
}

/// The pages of a process that nobody may have written to since they were protected, in order: those
/// that an earlier image brings back, and those that were read of mappings that are `watched`.
fn unwritten(process: &ProcessPlan, watched: impl Fn(&MappingPlan) -> bool) -> Vec<Range<u64>> {
    let of_mapping = |mapping: &MappingPlan| {
        let runs = if watched(mapping) { mapping.runs.as_slice() } else { &[] };
        let reused = mapping.reused.iter().map(|reused| reused.range.clone());
        let mut pages: Vec<_> = runs.iter().map(PageRun::range).chain(reused).collect();
        pages.sort_unstable_by_key(|range| range.start);
        pages
    };
    process.mappings.iter().flat_map(of_mapping).collect()
}

/// Ranges that hold all of `pages`, which are in order, and few pages each that are there: a look for
/// writes takes the kernel as long as those, but some microseconds at least.
fn looks(pages: &[Range<u64>], process: &ProcessPlan) -> Vec<Range<u64>> {
    let mut cuts = Vec::new();
    let mut room = LOOKED;
    for there in process.mappings.iter().flat_map(|mapping| &mapping.there) {
        let mut at = there.start;
        while at < there.end {
            let end = there.end.min(at + room * PAGE_SIZE as u64);
            room -= (end - at) / PAGE_SIZE as u64;
            at = end;
            if room == 0 {
                cuts.push(at);
                room = LOOKED;
            }
        }
    }
    let mut cuts = cuts.into_iter().peekable();
    let mut looks: Vec<Range<u64>> = Vec::new();
    for range in pages {
        match looks.last_mut() {
            Some(last) if range.start - last.end < GAP => last.end = range.end,
            _ => looks.push(range.clone()),
        }
        while let Some(last) = looks.last_mut()
            && let Some(cut) = cuts.next_if(|cut| *cut < last.end)
        {
            if cut > last.start {
                let end = std::mem::replace(&mut last.end, cut);
                looks.push(cut..end);
            }
        }
    }
    looks
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// What is to be dropped of a process, in steps that take the kernel about [`STEP_NS`] each. Of the
/// anonymous mappings those that `is_registered` names.
fn steps(
    process: &ProcessPlan,
    is_registered: impl Fn(&Range<u64>) -> bool,
    kept: &[Range<u64>],
    Costs { page_ns, range_ns, joins }: Costs,
) -> Vec<Eviction> {
    let (mut steps, mut step, mut cost) = (Vec::new(), Eviction::default(), 0);
    for mapping in &process.mappings {
        let range = mapping.start..mapping.end;
        let mut begins = |step: &mut Eviction, costs: u64| {
            if cost > 0 && cost + costs > STEP_NS {
                cost = 0;
                steps.push(std::mem::take(step));
            }
            cost += costs;
        };
        let pages = |mapping: &MappingPlan| -> u64 {
            mapping.runs.iter().map(|run| u64::from(run.pages)).sum()
        };
        match mapping.kind {
            MappingKind::Replaced(protection) => {
                let costs = REPLACE_NS + pages(mapping) * page_ns;
                begins(&mut step, costs);
                step.replace.push(Replacement { range, protection });
            }
            MappingKind::File => {
                let costs = range_ns * mapping.runs.len() as u64 + pages(mapping) * page_ns;
                begins(&mut step, costs);
                let runs = mapping.runs.iter().map(PageRun::range);
                step.file.extend(runs.flat_map(|run| without(run.clone(), near(kept, &run))));
            }
            MappingKind::Anonymous if is_registered(&range) => {
                step.register.push(range);
                for piece in pieces(mapping, (STEP_NS - range_ns) / page_ns, joins) {
                    for part in without(piece.clone(), near(kept, &piece)) {
                        begins(&mut step, range_ns + page_count(&mapping.there, &part) * page_ns);
                        step.anonymous.push(part);
                    }
                }
            }
            MappingKind::Anonymous => {}
        }
    }
    steps.push(step);
    steps
}

/// How many pages there are within `range`.
fn page_count(there: &[Range<u64>], range: &Range<u64>) -> u64 {
    within(range, there).iter().map(|part| (part.end - part.start) / PAGE_SIZE as u64).sum()
}

/// What is there of a mapping in pieces of at most `most` pages. Between the pages of one there is
/// space only if it `joins` them.
fn pieces(mapping: &MappingPlan, most: u64, joins: bool) -> Vec<Range<u64>> {
    let mut pieces: Vec<(Range<u64>, u64)> = Vec::new();
    for range in &mapping.there {
        let mut at = range.start;
        while at < range.end {
            let full =
                |(piece, pages): &(Range<u64>, u64)| *pages == most || !joins && piece.end != at;
            if pieces.last().is_none_or(full) {
                pieces.push((at..at, 0));
            }
            if let Some((piece, pages)) = pieces.last_mut() {
                let end = range.end.min(at + (most - *pages) * PAGE_SIZE as u64);
                *pages += (end - at) / PAGE_SIZE as u64;
                (piece.end, at) = (end, end);
            }
        }
    }
    pieces.into_iter().map(|(piece, _)| piece).collect()
}

/// What stays in each process of the plan: residents, and pages that the kernel itself touches on its
/// threads' way back to user space. Without the kernel's word on those nothing may go.
fn kept_pages<F: Freezer>(
    session: &mut Session<F>,
    plan: &Plan,
) -> Result<Vec<Vec<Range<u64>>>, DedupError> {
    let of_process = |(process, mut kept): (&ProcessPlan, Vec<Range<u64>>)| {
        let seized = session.process(process.pid).ok_or(Hindrance::Changed)?;
        let areas = seized.rseq_areas().map_err(Hindrance::Rseq)?;
        for page in areas.iter().flat_map(|area| area.resident_pages()) {
            kept.extend(without(page.clone(), &kept));
        }
        kept.sort_unstable_by_key(|r| r.start);
        Ok(kept)
    };
    plan.processes.iter().zip(plan.residents()).map(of_process).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plan::Reused;
    use medes_memory::pages::PageClass;

    const PAGE: u64 = PAGE_SIZE as u64;

    fn mapping(kind: MappingKind, start: u64, length: u64, runs: &[(u64, u32)]) -> MappingPlan {
        let class = PageClass::Anonymous;
        let run =
            |(at, pages): &(u64, u32)| PageRun { start: start + at * PAGE, pages: *pages, class };
        MappingPlan {
            start,
            end: start + length * PAGE,
            kind,
            heap: false,
            there: runs.iter().map(|r| run(r).range()).collect(),
            runs: runs.iter().map(run).collect(),
            residents: Vec::new(),
            reused: Vec::new(),
            known: Vec::new(),
        }
    }

    #[test]
    fn steps_hold_everything_once_and_little_at_a_time() {
        let large =
            mapping(MappingKind::Anonymous, 0x1000_0000, 10_000, &[(0, 1000), (5000, 3000)]);
        let mut again = mapping(MappingKind::Anonymous, 0x2000_0000, 700, &[(600, 100)]);
        again.reused = vec![Reused { range: again.start..again.start + 600 * PAGE, origin: 0 }];
        // Of which the rest is still away.
        again.there.insert(0, again.start + 100 * PAGE..again.start + 500 * PAGE);
        let unregistered = mapping(MappingKind::Anonymous, 0x3000_0000, 9, &[(0, 9)]);
        let file = mapping(MappingKind::File, 0x4000_0000, 90, &[(0, 9), (20, 9)]);
        let [whole, rest, not] =
            [&large, &again, &unregistered].map(|mapping| mapping.start..mapping.end);
        let there = [large.there.clone(), again.there.clone()].concat();
        let mut mappings = vec![large, again, unregistered, file];
        let replaced =
            |n: u64| mapping(MappingKind::Replaced(1), 0x5000_0000 + n * PAGE, 1, &[(0, 1)]);
        mappings.extend((0..100).map(replaced));
        let process = ProcessPlan { pid: 1, mappings };
        let kept = whole.start + 5 * PAGE..whole.start + 6 * PAGE;
        let costs = REPORTED;
        let all = steps(&process, |range| *range != not, std::slice::from_ref(&kept), costs);
        let least = ((1000 + 3000 + 500) * costs.page_ns + 100 * REPLACE_NS) / STEP_NS;
        assert!(all.len() as u64 >= least, "{} steps", all.len());
        let mut dropped: Vec<_> = all.iter().flat_map(|step| step.anonymous.clone()).collect();
        dropped.sort_unstable_by_key(|range| range.start);
        let missed: Vec<_> =
            there.iter().flat_map(|range| without(range.clone(), &dropped)).collect();
        assert_eq!(missed, [kept]);
        // What is away is nobody's to leave.
        let mut left: Vec<_> =
            dropped.iter().flat_map(|range| super::there(&process, range)).collect();
        left.retain(|range| rest.contains(&range.start));
        assert!(left.iter().all(|r| there.iter().any(|t| t.start <= r.start && r.end <= t.end)));
        let pages: u64 = left.iter().map(|range| (range.end - range.start) / PAGE).sum();
        assert_eq!(pages, 400 + 100);
        assert!(dropped.windows(2).all(|two| two[0].end <= two[1].start), "{dropped:x?}");
        let registered: Vec<_> = all.iter().flat_map(|step| step.register.clone()).collect();
        assert_eq!(registered, [whole, rest]);
        let replaced: Vec<_> = all.iter().map(|step| step.replace.len()).collect();
        assert_eq!(replaced.iter().sum::<usize>(), 100);
        assert!(replaced.iter().all(|n| *n as u64 <= STEP_NS / REPLACE_NS + 1), "{replaced:?}");
        assert_eq!(all.iter().map(|step| step.file.len()).sum::<usize>(), 2);
    }

    proptest! {
        #[test]
        fn pieces_hold_all_that_is_there(
            gaps in prop::collection::vec((0..20u64, 1..50u32), 0..20),
            most in 1..60u64,
            joins: bool,
        ) {
            let (mut at, mut runs) = (0, Vec::new());
            for (gap, pages) in gaps {
                runs.push((at + gap, pages));
                at += gap + u64::from(pages);
            }
            let mapping = mapping(MappingKind::Anonymous, 0x1000, at + 7, &runs);
            let pieces = pieces(&mapping, most, joins);
            prop_assert!(pieces.windows(2).all(|two| two[0].end <= two[1].start));
            let mut all = 0;
            for range in &pieces {
                let pages = page_count(&mapping.there, range);
                prop_assert!(pages <= most && range.start < range.end);
                prop_assert!(joins || pages * PAGE == range.end - range.start);
                all += pages;
            }
            prop_assert_eq!(all, runs.iter().map(|(_, pages)| u64::from(*pages)).sum::<u64>());
        }

        #[test]
        fn looks_hold_all_pages_and_few_that_are_there(
            pages in prop::collection::vec((0..20_000u64, 1..9000u64), 1..12),
            there in prop::collection::vec((0..300u64, 1..3000u32), 0..12),
        ) {
            let laid_out = |lengths: &[(u64, u64)]| {
                let mut at = 0;
                let place = |(gap, length): &(u64, u64)| {
                    let start = at + gap;
                    at = start + length;
                    start * PAGE..at * PAGE
                };
                lengths.iter().map(place).collect::<Vec<_>>()
            };
            let pages = laid_out(&pages);
            let there: Vec<_> = there.iter().map(|(gap, n)| (*gap, u64::from(*n))).collect();
            let mut mapping = mapping(MappingKind::Anonymous, 0, 1 << 30, &[]);
            mapping.there = laid_out(&there);
            let process = ProcessPlan { pid: 1, mappings: vec![mapping] };
            let looks = looks(&pages, &process);
            prop_assert!(looks.windows(2).all(|two| two[0].end <= two[1].start));
            prop_assert!(pages.iter().all(|range| without(range.clone(), &looks).is_empty()));
            let between = |range: &Range<u64>| without(range.clone(), &pages);
            prop_assert!(looks.iter().flat_map(between).all(|gap| gap.end - gap.start < GAP));
            for look in &looks {
                let held: u64 =
                    super::there(&process, look).iter().map(|range| range.end - range.start).sum();
                prop_assert!(look.start < look.end && held / PAGE <= LOOKED);
            }
        }

        #[test]
        fn slices_are_the_range(start in 0..9u64, pages in 0..50u64, length in 1..20u64) {
            let range = start * PAGE..(start + pages) * PAGE;
            let slices: Vec<_> = slices(range.clone(), length * PAGE).collect();
            let total: u64 = slices.iter().map(|slice| slice.end - slice.start).sum();
            prop_assert_eq!(total, pages * PAGE);
            prop_assert!(slices.iter().all(|s| s.start < s.end && s.end - s.start <= length * PAGE));
            prop_assert!(slices.windows(2).all(|two| two[0].end == two[1].start));
        }
    }
}
