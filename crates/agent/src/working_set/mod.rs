//! Which pages a function touches when it runs again, learned from what its sandboxes fault on.
//!
//! A page that a thread has to wait for after a restore belongs to the working set; pages of the
//! working set are put back before the next restore of any of the function's sandboxes lets it
//! run, all of it: waiting for one costs a thread as much as putting ten back, and more while others
//! are being put back. A page that was put back beforehand can't fault, so whether it is still
//! needed is found out by leaving it out: a small share each time, another one each time, and what
//! requests used to write to and were seen not to. What nobody touches then is forgotten. So the
//! set follows a function that changes, in both directions. One that does not is left alone: as long
//! as everything is missed that is left out, less and less is.
//!
//! A set that takes too long to put back is not put back whole: part of it stays where it is when a
//! sandbox is deduplicated ([`WorkingSet::residents`]).

mod residents;

use std::collections::HashSet;
use std::ops::Range;
use std::time::Duration;

use medes_pages::PAGE_SIZE;

use residents::RANGE_NS;
pub use residents::Residents;

const PAGE: u64 = PAGE_SIZE as u64;

/// One page in so many is left out at each restore, of a large set one in as many more as it takes for
/// a few: each costs the request a fault.
const SHARE: u64 = 256;

/// Of a large set about so many are left out.
const LEFT_OUT: u64 = 10;

/// When so many pages that were left out were missed, half as many are left out, and so on; each costs
/// the request a fault, some 80 us where an idle processor has to be woken for it.
const SURE: u32 = 8;

/// No more than so many count: an eighth is left out then.
const SUREST: u32 = 8 * SURE - 1;

/// Of the pages that requests write to, whether they still do is looked at for one in so many at each
/// restore: it costs each of them a fault, if a short one.
const WATCHED: u64 = 8;

/// Pages that are looked at together, so that ranges stay in one piece.
const WATCHED_TOGETHER: u64 = 16;

/// A page that was seen not to be written to so often in a row is left out.
const UNWRITTEN: u8 = 2;

/// Fewer pages say nothing of what one takes.
const FEW: u64 = 64;

/// What counts of a restore that was faster than known, and of one that was slower: a busy host makes
/// them slow, nothing makes them fast.
const FASTER: f64 = 0.5;
const SLOWER: f64 = 0.0625;

/// The working set of one function (or of one sandbox, if its addresses are its own).
#[derive(Clone, Debug, Default)]
pub struct WorkingSet {
    /// Per process of the image: pages by address, in order. A restore looks at all of them, which a
    /// tree would have it wait for.
    processes: Vec<Vec<(u64, Member)>>,
    trials: u64,
    /// How many pages that were left out were missed; each that was not halves it.
    missed: u32,
    /// What putting pages back takes by the clock for each nanosecond of a processor that it is
    /// thought to take, once that was seen.
    pace: Option<f64>,
}

/// A dedup of a sandbox and the restore after it, in which some pages are left out to see whether they
/// are needed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Trial {
    /// Counted from 1; 0 is none.
    number: u64,
    /// One page in so many is left out, a power of two.
    share: u64,
}

/// What is known of a page of the working set.
#[derive(Clone, Copy, Debug, Default)]
struct Member {
    /// The last trial that it was left out in.
    left_out: u64,
    /// Whether requests write to it.
    written: bool,
    /// If they do: the last trial in which it was watched whether they still do.
    watched: u64,
    /// How often in a row it was seen that they did not.
    unwritten: u8,
    /// The length of its patch when a sandbox was last deduplicated, bytes; 0 if it had none.
    patch: u16,
}

/// Pages that are put back beforehand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PrefetchRange {
    /// Their addresses.
    pub range: Range<u64>,
    /// Whether requests write to them, so that watching for it would cost each of them a fault.
    pub written: bool,
}

/// What one restore puts back beforehand.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Prefetch {
    /// Ranges of addresses per process, in order.
    pub ranges: Vec<Vec<PrefetchRange>>,
    /// What is there already, per process and in order.
    residents: Vec<Vec<Range<u64>>>,
    /// What putting them back is thought to take of a processor; 0 if nobody knows.
    work_ns: u64,
    /// The trial's number; 0 if there is none.
    trial: u64,
}

impl PrefetchRange {
    fn pages(&self) -> u64 {
        (self.range.end - self.range.start) / PAGE
    }
}

/// Adds a page behind all others.
fn push(ranges: &mut Vec<PrefetchRange>, page: u64, written: bool) {
    match ranges.last_mut() {
        Some(last) if last.range.end == page && last.written == written => last.range.end += PAGE,
        _ => ranges.push(PrefetchRange { range: page..page + PAGE, written }),
    }
}

impl Prefetch {
    /// Exactly these ranges, for each process, none of them known to be written to.
    #[must_use]
    pub fn of(ranges: &[Vec<Range<u64>>]) -> Self {
        let unwritten = |range: &Range<u64>| PrefetchRange { range: range.clone(), written: false };
        let of_process = |ranges: &Vec<Range<u64>>| ranges.iter().map(unwritten).collect();
        Self { ranges: ranges.iter().map(of_process).collect(), ..Self::default() }
    }
}

impl WorkingSet {
    /// The next trial.
    pub fn trial(&mut self) -> Trial {
        self.trials += 1;
        let share = (self.pages() / LEFT_OUT).next_power_of_two().max(SHARE);
        let share = share << (1 + self.missed / SURE).ilog2();
        Trial { number: self.trials, share }
    }

    /// What to put back at a restore, beside `residents`, which are there, per process and in order.
    /// Without a trial nothing is left out.
    pub fn prefetch(&mut self, trial: Option<Trial>, residents: &[Vec<Range<u64>>]) -> Prefetch {
        let mut work_ns = 0;
        let of_process = |(n, pages): (usize, &mut Vec<(u64, Member)>)| {
            let mut there = Sweep::over(residents.get(n).map_or(&[], Vec::as_slice));
            let mut ranges: Vec<PrefetchRange> = Vec::new();
            for &mut (page, ref mut member) in pages {
                if there.includes(page) {
                    continue;
                }
                let mut written = member.written;
                if let Some(trial) = trial {
                    if member.is_left_out(page, trial) {
                        member.left_out = trial.number;
                        continue;
                    }
                    if written && is_watched(page, trial) {
                        member.watched = trial.number;
                        written = false;
                    }
                }
                push(&mut ranges, page, written);
                work_ns += member.work_ns();
            }
            work_ns += ranges.len() as u64 * RANGE_NS;
            ranges
        };
        let ranges = self.processes.iter_mut().enumerate().map(of_process).collect();
        Prefetch {
            ranges,
            residents: residents.to_vec(),
            work_ns,
            trial: trial.unwrap_or_default().number,
        }
    }

    /// Putting `prefetch` back, which is this set's, took so long.
    pub fn took(&mut self, prefetch: &Prefetch, time: Duration) {
        let pages: u64 = prefetch.ranges.iter().flatten().map(PrefetchRange::pages).sum();
        if pages < FEW || prefetch.work_ns == 0 {
            return;
        }
        let seen = time.as_nanos() as f64 / prefetch.work_ns as f64;
        let known = self.pace.unwrap_or(seen);
        let weight = if seen < known { FASTER } else { SLOWER };
        self.pace = Some(known + (seen - known) * weight);
    }

    /// A sandbox was deduplicated: `patch` says, asked in the order of addresses, how long the patch is
    /// of a page of a process, 0 if it needs none, `None` if nothing is kept of it.
    pub fn encoded(&mut self, process: usize, mut patch: impl FnMut(u64) -> Option<u16>) {
        for (page, member) in self.processes.get_mut(process).into_iter().flatten() {
            if let Some(patch) = patch(*page) {
                member.patch = patch;
            }
        }
    }

    /// Pages of a process that a thread had to wait for.
    pub fn touched(&mut self, process: usize, addresses: &[u64]) {
        if self.processes.len() <= process {
            self.processes.resize_with(process + 1, Vec::new);
        }
        let pages = &mut self.processes[process];
        let mut new = Vec::new();
        for page in addresses.iter().map(|address| address & !(PAGE - 1)) {
            let Ok(at) = pages.binary_search_by_key(&page, |(page, _)| *page) else {
                new.push((page, Member::default()));
                continue;
            };
            let member = &mut pages[at].1;
            // It may be read by all and written to by a few: not on trial again before long.
            member.written &= member.unwritten < UNWRITTEN;
            member.unwritten = 0;
        }
        pages.extend(new);
        pages.sort_by_key(|(page, _)| *page);
        pages.dedup_by_key(|(page, _)| *page);
    }

    /// All pages of a process that were written to from a restore until it was deduplicated again,
    /// in order; those among them that `prefetch` did not watch may have been put back only. Of what
    /// had stayed nothing is said.
    pub fn written(&mut self, process: usize, prefetch: &Prefetch, ranges: &[Range<u64>]) {
        let Some(pages) = self.processes.get_mut(process) else { return };
        let mut residents = Sweep::over(prefetch.residents.get(process).map_or(&[], Vec::as_slice));
        let mut ranges = Sweep::over(ranges);
        for (page, member) in pages {
            if residents.includes(*page) {
                continue;
            }
            match (ranges.includes(*page), member.written) {
                (true, true) if member.watched != prefetch.trial => {}
                (true, _) => (member.written, member.unwritten) = (true, 0),
                (false, true) => member.unwritten = member.unwritten.saturating_add(1),
                (false, false) => {}
            }
        }
    }

    /// The first request after the restore is over: pages that were left out and not touched are
    /// forgotten. `touched` says which were.
    pub fn conclude(&mut self, prefetch: &Prefetch, touched: &[Vec<u64>]) {
        if prefetch.trial == 0 {
            return;
        }
        let (mut missed, mut forgotten) = (0_u32, 0_u32);
        for (process, pages) in self.processes.iter_mut().enumerate() {
            let of_process = touched.get(process).map_or(&[][..], Vec::as_slice);
            let of_process: HashSet<u64> = of_process.iter().map(|a| a & !(PAGE - 1)).collect();
            pages.retain(|(page, member)| {
                if member.left_out != prefetch.trial {
                    return true;
                }
                let is_needed = of_process.contains(page);
                if is_needed {
                    missed += 1
                } else {
                    forgotten += 1
                }
                is_needed
            });
        }
        self.missed = (self.missed + missed).min(SUREST).checked_shr(forgotten).unwrap_or(0);
    }

    /// How many pages the set has at most.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.processes.iter().map(|pages| pages.len() as u64).sum()
    }
}

impl Member {
    /// Whether it is left out in a trial.
    fn is_left_out(&self, page: u64, trial: Trial) -> bool {
        let is_due = share(page / PAGE, trial.share) == trial.number % trial.share;
        is_due || self.unwritten >= UNWRITTEN
    }
}

/// Ranges, in order, that addresses are looked for in, in order as well.
struct Sweep<'r>(&'r [Range<u64>]);

impl<'r> Sweep<'r> {
    fn over(ranges: &'r [Range<u64>]) -> Self {
        Self(ranges)
    }

    fn includes(&mut self, address: u64) -> bool {
        while let [first, rest @ ..] = self.0
            && first.end <= address
        {
            self.0 = rest;
        }
        self.0.first().is_some_and(|first| first.start <= address)
    }
}

/// Whether a page that requests write to is watched in a trial.
fn is_watched(page: u64, trial: Trial) -> bool {
    share(page / PAGE / WATCHED_TOGETHER, WATCHED) == trial.number % WATCHED
}

/// Which of `shares`, a power of two, something is in. Spread by multiplication, so that a stretch of
/// addresses is not in one.
fn share(of: u64, shares: u64) -> u64 {
    of.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - shares.trailing_zeros())
}

#[cfg(test)]
mod tests {
    use medes_memory::ranges::near;

    use super::*;

    /// One restore and a request that touches and writes to pages. Returns what had to be waited
    /// for.
    fn restore(set: &mut WorkingSet, needs: &[u64], writes: &[Range<u64>]) -> usize {
        let trial = set.trial();
        let prefetch = set.prefetch(Some(trial), &[]);
        let ranges = prefetch.ranges.first().map_or(&[][..], Vec::as_slice);
        let there = |address: u64| ranges.iter().any(|r| r.range.contains(&address));
        let faults: Vec<u64> = needs.iter().copied().filter(|a| !there(*a)).collect();
        set.touched(0, &faults);
        set.conclude(&prefetch, std::slice::from_ref(&faults));
        // What is put back without being watched counts as written to.
        let unwatched = ranges.iter().filter(|r| r.written).map(|r| r.range.clone());
        let mut written: Vec<u64> =
            unwatched.chain(writes.iter().cloned()).flat_map(pages).collect();
        written.sort_unstable();
        written.dedup();
        let written: Vec<_> = written.into_iter().map(|page| page..page + PAGE).collect();
        set.written(0, &prefetch, &written);
        faults.len()
    }

    fn pages(range: Range<u64>) -> impl Iterator<Item = u64> {
        range.step_by(PAGE_SIZE)
    }

    #[test]
    fn it_learns_and_follows_change() {
        let mut set = WorkingSet::default();
        let first: Vec<u64> = (0..1000).map(|n| 0x10_0000 + n * PAGE).collect();
        assert_eq!(restore(&mut set, &first, &[]), 1000);
        for _ in 0..200 {
            // Only those on trial are waited for.
            assert!(restore(&mut set, &first, &[]) < 60);
        }
        assert_eq!(set.pages(), 1000);
        let second: Vec<u64> = (500..1500).map(|n| 0x10_0000 + n * PAGE).collect();
        for _ in 0..=3 * SHARE {
            restore(&mut set, &second, &[]);
        }
        assert_eq!(set.pages(), 1000, "what is no longer touched is forgotten");
    }

    #[test]
    fn written_pages_are_told_from_others() {
        let mut set = WorkingSet::default();
        let addresses: Vec<u64> = pages(0x40_0000..0x48_0000).collect();
        let written = 0x41_0000..0x43_0000;
        restore(&mut set, &addresses, std::slice::from_ref(&written));
        set.written(3, &Prefetch::default(), std::slice::from_ref(&written));
        let told = |set: &mut WorkingSet| -> usize {
            let trial = set.trial();
            let ranges = set.prefetch(Some(trial), &[]).ranges.swap_remove(0);
            let told = ranges.into_iter().filter(|range| range.written).map(|r| r.range);
            told.inspect(|r| assert!(written.start <= r.start && r.end <= written.end))
                .map(|r| pages(r).count())
                .sum()
        };
        let all: usize = (0..WATCHED).map(|_| told(&mut set)).sum();
        // Each is watched once, and some are left out.
        assert!((7 * 32 - 8..=7 * 32).contains(&all), "{all}");
        // Touched once more it is still what it was.
        set.touched(0, &addresses);
        assert!((0..2).any(|_| told(&mut set) > 0));
    }

    #[test]
    fn what_is_written_no_more_is_left_out_once_and_then_forgotten() {
        let mut set = WorkingSet::default();
        let (all, half) = (0x40_0000..0x48_0000, 0x40_0000..0x44_0000);
        let needed: Vec<u64> = pages(all.clone()).collect();
        restore(&mut set, &needed, std::slice::from_ref(&all));
        assert_eq!(set.pages(), 128);
        // Of what is not written to any more, the last sixteen are read all the same.
        let needed: Vec<u64> = pages(half.clone()).chain(pages(0x47_0000..all.end)).collect();
        let rounds = u64::from(UNWRITTEN) * WATCHED + 2;
        let faults: usize =
            (0..rounds).map(|_| restore(&mut set, &needed, std::slice::from_ref(&half))).sum();
        assert_eq!(set.pages(), 80, "what nobody touched is forgotten");
        assert!((16..=40).contains(&faults), "what is read is left out once: {faults} faults");
        let faults: usize =
            (0..rounds).map(|_| restore(&mut set, &needed, std::slice::from_ref(&half))).sum();
        assert!(faults < 16, "and not again: {faults} faults");
    }

    /// A set of 1,000 pages of which every other one is written to, and putting it back takes 2 ms.
    fn large() -> WorkingSet {
        let mut set = WorkingSet::default();
        let needs: Vec<u64> = pages(0x40_0000..0x40_0000 + 1000 * PAGE).collect();
        let writes = needs.iter().step_by(2).map(|page| *page..page + PAGE);
        restore(&mut set, &needs, &writes.collect::<Vec<_>>());
        let prefetch = set.prefetch(None, &[]);
        set.took(&prefetch, Duration::from_millis(2));
        set
    }

    #[test]
    fn what_takes_too_long_to_put_back_stays() {
        let mut set = large();
        let most = u64::MAX;
        // Putting it back is not all that a restore does.
        assert_eq!(set.residents(Duration::from_millis(4), most).ranges, [[]], "it does not");
        assert_ne!(set.residents(Duration::from_millis(2), most).ranges, [[]]);
        let residents = set.residents(Duration::from_millis(1), most);
        let count = |ranges: &[Range<u64>]| ranges.iter().cloned().flat_map(pages).count();
        // All written to, and of the others as many as it takes.
        assert!((740..760).contains(&count(&residents.ranges[0])), "{residents:x?}");
        let is_written = |page: &u64| (page / PAGE).is_multiple_of(2);
        let stay: Vec<u64> = residents.ranges[0].iter().cloned().flat_map(pages).collect();
        // Some are left out, to see whether they are needed.
        assert!(stay.iter().copied().filter(is_written).count() > 490);
        let few = set.residents(Duration::from_millis(1), 100 * PAGE).ranges;
        assert!(few[0].iter().all(|range| is_written(&range.start)) && count(&few[0]) == 100);
        // A host that is slow for a moment changes little, one that is fast much.
        let prefetch = set.prefetch(None, &[]);
        set.took(&prefetch, Duration::from_millis(4));
        assert!(count(&set.residents(Duration::from_millis(1), most).ranges[0]) < 790);
        set.took(&prefetch, Duration::from_micros(100));
        assert!(count(&set.residents(Duration::from_millis(1), most).ranges[0]) < 590);
    }

    #[test]
    fn what_lies_alone_stays_first() {
        let mut set = WorkingSet::default();
        let together = 0x40_0000..0x40_0000 + 512 * PAGE;
        let alone: Vec<u64> = pages(0x80_0000..0x80_0000 + 512 * PAGE).step_by(2).collect();
        let all: Vec<u64> = pages(together.clone()).chain(alone.iter().copied()).collect();
        restore(&mut set, &all, &[]);
        let prefetch = set.prefetch(None, &[]);
        set.took(&prefetch, Duration::from_millis(2));
        let residents = set.residents(Duration::from_millis(1), 200 * PAGE).ranges;
        let stay: Vec<u64> = residents[0].iter().cloned().flat_map(pages).collect();
        assert!(stay.len() == 200 && stay.iter().all(|page| alone.contains(page)), "{stay:x?}");
        // What is longer than there is room for stays in part.
        let residents = set.residents(Duration::from_micros(100), 600 * PAGE).ranges;
        assert_eq!(residents[0].iter().cloned().flat_map(pages).count(), 600);
    }

    #[test]
    fn what_hardly_compresses_stays_in_any_case_and_what_has_patches_first() {
        let mut set = WorkingSet::default();
        let needs: Vec<u64> = pages(0x40_0000..0x40_0000 + 1000 * PAGE).collect();
        restore(&mut set, &needs, &[]);
        set.took(&set.clone().prefetch(None, &[]), Duration::from_millis(2));
        let at = |page: u64| (page - 0x40_0000) / PAGE;
        set.encoded(0, |page| match at(page) {
            0..100 => Some(4097),
            200..300 => Some(30),
            300..400 => Some(2000),
            400..500 => None,
            _ => Some(0),
        });
        let stay = |set: &mut WorkingSet, target, most| -> Vec<u64> {
            let ranges = set.residents(Duration::from_micros(target), most).ranges;
            ranges[0].iter().cloned().flat_map(pages).map(at).collect()
        };
        for target in [0, 10_000] {
            let stay = stay(&mut set, target, u64::MAX);
            assert!(
                (80..100).contains(&stay.len()) && stay.iter().all(|page| *page < 100),
                "{stay:?}"
            );
        }
        let few = stay(&mut set, 1000, 120 * PAGE);
        let of = |range: Range<u64>| few.iter().filter(|page| range.contains(page)).count();
        // Those that would have large patches take half a page each.
        assert!(of(300..400) > 90 && (50..80).contains(&of(200..300)), "{few:?}");
        assert_eq!(of(0..100) + of(200..400), few.len(), "{few:?}");
        // Of what an image does not have nothing new is known.
        set.encoded(0, |_| None);
        set.encoded(1, |_| Some(1));
        let all: HashSet<u64> = (0..16).flat_map(|_| stay(&mut set, 0, 0)).collect();
        assert_eq!(all, (0..100).collect(), "not always the same ones go");
    }

    #[test]
    fn what_is_always_missed_is_left_out_less_and_less() {
        let mut set = WorkingSet::default();
        let needs: Vec<u64> = pages(0x40_0000..0x40_0000 + 2000 * PAGE).collect();
        restore(&mut set, &needs, &[]);
        let waited = |set: &mut WorkingSet, needs: &[u64]| -> usize {
            (0..100).map(|_| restore(set, needs, &[])).sum()
        };
        let (first, second) = (waited(&mut set, &needs), waited(&mut set, &needs));
        assert!(second * 4 < first * 3 && second > 20, "{first}, then {second}");
        // Half of it is needed no more.
        let before = set.pages();
        waited(&mut set, &needs[..1000]);
        assert!(before - set.pages() > 50, "{} pages of {before}", set.pages());
    }

    #[test]
    fn what_stays_is_neither_put_back_nor_judged() {
        let mut set = large();
        for _ in 0..3 * SHARE {
            let residents = set.residents(Duration::from_millis(1), u64::MAX);
            let prefetch = set.prefetch(Some(residents.trial), &residents.ranges);
            let of_both =
                |range: &PrefetchRange| !near(&residents.ranges[0], &range.range).is_empty();
            assert!(!prefetch.ranges[0].iter().any(of_both));
            // What is neither there nor put back is waited for.
            let mut needed: Vec<u64> = pages(0x40_0000..0x40_0000 + 1000 * PAGE).collect();
            let back = prefetch.ranges[0].iter().map(|range| &range.range);
            let there: HashSet<u64> =
                back.chain(&residents.ranges[0]).cloned().flat_map(pages).collect();
            needed.retain(|page| !there.contains(page));
            assert!(needed.len() < 20, "{}", needed.len());
            set.touched(0, &needed);
            set.conclude(&prefetch, &[needed]);
            // Nothing is said of writes to what stays.
            let written = prefetch.ranges[0].iter().map(|range| range.range.clone());
            set.written(0, &prefetch, &written.collect::<Vec<_>>());
        }
        assert_eq!(set.pages(), 1000);
    }

    #[test]
    fn of_a_large_set_few_pages_are_left_out() {
        let mut set = WorkingSet::default();
        let needs: Vec<u64> = pages(0x40_0000..0x40_0000 + 6000 * PAGE).collect();
        restore(&mut set, &needs, &[]);
        let waited: usize = (0..100).map(|_| restore(&mut set, &needs, &[])).sum();
        assert!((1..=1000).contains(&waited), "{waited} in a hundred restores");
    }

    #[test]
    fn neighbouring_pages_are_one_range() {
        let mut set = WorkingSet::default();
        let addresses: Vec<u64> = (0..64).map(|n| 0x40_0000 + n * PAGE_SIZE as u64).collect();
        set.touched(1, &addresses);
        let trial = set.trial();
        let ranges = set.prefetch(Some(trial), &[]).ranges;
        assert!(ranges[0].is_empty());
        let covered: u64 = ranges[1].iter().map(|r| r.range.end - r.range.start).sum();
        assert!(covered >= 60 * PAGE && ranges[1].len() <= 5, "{ranges:x?}");
    }
}
