//! What had better stay where it is of a working set.
//!
//! Of one that takes too long to put back, what saves most time for its memory stays. A page that
//! has a patch saves time for decoding it, one that lies alone a call of its own, and one that
//! requests write to need not be encoded anew each time. A page takes the less memory, the larger
//! its patch would be: one that does not compress takes none, and stays in any case.

use std::ops::Range;
use std::time::Duration;

use super::{Member, PAGE, Trial, WorkingSet, share};

/// The share of the target that putting pages back may take without any that stays. The rest is for
/// what else there is to do: reaching the sandbox and letting it run take half a millisecond or more.
const ENOUGH: f64 = 0.6;

/// The share that it may take if some stay: [`ENOUGH`] is not reached again by every change.
const AIM: f64 = 0.5;

/// What putting a page back takes of a processor that is equal to a base page, nanoseconds; this and
/// the next were measured.
const COPIED_NS: u64 = 1600;

/// What it takes longer if a few words have to be patched.
const PATCHED_NS: u64 = 600;

/// What it takes longer still if most of the page has to be decompressed.
const DECOMPRESSED_NS: u64 = 3400;

/// Patches of so many bytes are taken to be of that kind, and smaller ones in proportion.
const LARGE_PATCH: u64 = 1024;

/// What a range takes beside its pages.
pub(super) const RANGE_NS: u64 = 1500;

/// What it is worth that a page that requests write to is not encoded when the sandbox is
/// deduplicated again, if not as much as time that a request waits.
const ENCODED_NS: u64 = 800;

/// A page that takes fewer bytes more than its patch stays in any case.
const NEXT_TO_NOTHING: u64 = PAGE / 16;

/// One of those in so many goes all the same, another one each time: what it holds may be easier to
/// compress by now.
const LEARNED_AGAIN: u64 = 16;

/// What stays of a sandbox that is deduplicated.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Residents {
    /// Ranges of addresses per process, in order.
    pub ranges: Vec<Vec<Range<u64>>>,
    /// The trial that the restore belongs to: what is left out of it is not among them.
    pub trial: Trial,
}

impl Member {
    /// What putting it back takes of a processor, nanoseconds, beside [`RANGE_NS`].
    pub(super) fn work_ns(&self) -> u64 {
        match u64::from(self.patch) {
            0 => COPIED_NS,
            patch => {
                let large = patch.min(LARGE_PATCH);
                COPIED_NS + PATCHED_NS + DECOMPRESSED_NS * large / LARGE_PATCH
            }
        }
    }

    /// The memory that it takes if it stays, bytes.
    fn memory(&self) -> u64 {
        PAGE.saturating_sub(self.patch.into())
    }

    fn is_next_to_nothing(&self) -> bool {
        self.memory() < NEXT_TO_NOTHING
    }

    /// Neighbours that are alike in this are chosen together.
    fn likeness(&self) -> (bool, u16) {
        let patch = match self.patch {
            0 => 0,
            1..256 => 1,
            256..1024 => 2,
            1024..2048 => 3,
            _ if !self.is_next_to_nothing() => 4,
            _ => 5,
        };
        (self.written, patch)
    }
}

/// Pages that lie side by side and are alike.
struct Run {
    process: usize,
    range: Range<u64>,
    likeness: (bool, u16),
    work_ns: u64,
    /// What it is worth that they stay.
    worth_ns: u64,
    memory: u64,
}

impl Run {
    fn pages(&self) -> u64 {
        (self.range.end - self.range.start) / PAGE
    }

    /// What each byte of memory is worth that they take.
    fn worth_of_a_byte(&self) -> f64 {
        self.worth_ns as f64 / self.memory.max(1) as f64
    }

    fn is_next_to_nothing(&self) -> bool {
        self.memory < self.pages() * NEXT_TO_NOTHING
    }
}

impl WorkingSet {
    /// What had better stay of a sandbox that is deduplicated now, for a restore to take no longer
    /// than `target`, and what takes next to no memory. The former takes no more than so many bytes
    /// beside what patches would. A target of zero is none.
    pub fn residents(&mut self, target: Duration, most: u64) -> Residents {
        let trial = self.trial();
        let mut runs = self.runs(trial);
        runs.sort_by(|a, b| b.worth_of_a_byte().total_cmp(&a.worth_of_a_byte()));
        let by_the_clock = |work_ns: u64| work_ns as f64 * self.pace.unwrap_or_default();
        let target_ns = target.as_nanos() as f64;
        let mut work_ns: u64 = runs.iter().map(|run| run.work_ns).sum();
        let is_slow = by_the_clock(work_ns) > target_ns * ENOUGH && !target.is_zero();
        let mut room = most;
        let mut ranges: Vec<Vec<Range<u64>>> = vec![Vec::new(); self.processes.len()];
        for run in runs {
            let mut end = run.range.end;
            if !run.is_next_to_nothing() {
                if !is_slow || by_the_clock(work_ns) <= target_ns * AIM {
                    continue;
                }
                let of_a_page = run.memory / run.pages();
                end = end.min(run.range.start.saturating_add(room / of_a_page * PAGE));
                room -= ((end - run.range.start) / PAGE * of_a_page).min(room);
            }
            if end > run.range.start {
                work_ns -= run.work_ns;
                ranges[run.process].push(run.range.start..end);
            }
        }
        ranges.iter_mut().for_each(|of_process| of_process.sort_unstable_by_key(|r| r.start));
        Residents { ranges, trial }
    }

    /// What a trial puts back if nothing stays.
    fn runs(&self, trial: Trial) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (process, pages) in self.processes.iter().enumerate() {
            // Where the page before ended, and whether requests write to it: a range goes on there.
            let mut before = None;
            for (page, member) in pages {
                let (page, likeness) = (*page, member.likeness());
                let goes = || share(page / PAGE, LEARNED_AGAIN) == trial.number % LEARNED_AGAIN;
                if member.is_left_out(page, trial) || member.is_next_to_nothing() && goes() {
                    continue;
                }
                let joins = |last: &&mut Run| {
                    last.process == process && last.range.end == page && last.likeness == likeness
                };
                if runs.last_mut().filter(joins).is_none() {
                    let (range, work_ns, worth_ns, memory) = (page..page, 0, 0, 0);
                    runs.push(Run { process, range, likeness, work_ns, worth_ns, memory });
                }
                let Some(run) = runs.last_mut() else { continue };
                run.range.end += PAGE;
                let goes_on =
                    before.replace((page + PAGE, member.written)) == Some((page, member.written));
                let work_ns = member.work_ns() + if goes_on { 0 } else { RANGE_NS };
                run.work_ns += work_ns;
                run.worth_ns += work_ns + u64::from(member.written) * ENCODED_NS;
                run.memory += member.memory();
            }
        }
        runs
    }
}
