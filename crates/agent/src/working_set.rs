//! Which pages a function touches when it runs again, learned from what its sandboxes fault on.
//!
//! A page that a thread has to wait for after a restore belongs to the working set; pages of the
//! working set are put back before the next restore of any of the function's sandboxes lets it
//! run, all of it: waiting for one costs a thread as much as putting ten back, and more while others
//! are being put back. A page that was put back beforehand can't fault, so whether it is still
//! needed is found out by leaving a small share out, another one each time: what nobody touches in
//! two such trials is forgotten. So the set follows a function that changes, in both directions.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use medes_pages::PAGE_SIZE;

const PAGE: u64 = PAGE_SIZE as u64;

/// One page in so many is left out at each restore: a few, for each costs the request a fault.
const SHARE: u64 = 256;

/// A page that was left out this many times without being touched is forgotten.
const TRIALS: u8 = 2;

/// The working set of one function (or of one sandbox, if its addresses are its own).
#[derive(Clone, Debug, Default)]
pub struct WorkingSet {
    /// Per process of the image: pages by address.
    processes: Vec<BTreeMap<u64, Member>>,
    restores: u64,
}

/// What is known of a page of the working set.
#[derive(Clone, Copy, Debug, Default)]
struct Member {
    /// The trials it failed in a row.
    failed: u8,
    /// Whether requests write to it.
    written: bool,
}

/// Pages that are put back beforehand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PrefetchRange {
    /// Their addresses.
    pub range: Range<u64>,
    /// Whether requests write to them: watching for it then costs each of them a fault, and the
    /// answer is known.
    pub written: bool,
}

/// What one restore puts back beforehand, and which trial it makes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Prefetch {
    /// Ranges of addresses per process, in order.
    pub ranges: Vec<Vec<PrefetchRange>>,
    trial: u64,
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
    /// What to put back at the next restore.
    pub fn prefetch(&mut self) -> Prefetch {
        let trial = self.restores % SHARE;
        self.restores += 1;
        let of_process = |pages: &BTreeMap<u64, Member>| {
            joined(pages.iter().filter(|(page, _)| share(**page) != trial))
        };
        Prefetch { ranges: self.processes.iter().map(of_process).collect(), trial }
    }

    /// Pages of a process that a thread had to wait for.
    pub fn touched(&mut self, process: usize, addresses: &[u64]) {
        if self.processes.len() <= process {
            self.processes.resize_with(process + 1, BTreeMap::new);
        }
        for address in addresses {
            self.processes[process].entry(address & !(PAGE - 1)).or_default().failed = 0;
        }
    }

    /// Pages of a process that were written to since a restore.
    pub fn written(&mut self, process: usize, range: Range<u64>) {
        if let Some(pages) = self.processes.get_mut(process) {
            pages.range_mut(range).for_each(|(_, member)| member.written = true);
        }
    }

    /// The first request after the restore is over: pages that were left out and not touched have
    /// failed a trial. `touched` says which were.
    pub fn conclude(&mut self, prefetch: &Prefetch, touched: &[Vec<u64>]) {
        for (process, pages) in self.processes.iter_mut().enumerate() {
            let of_process = touched.get(process).map_or(&[][..], Vec::as_slice);
            let of_process: HashSet<u64> = of_process.iter().map(|a| a & !(PAGE - 1)).collect();
            pages.retain(|page, member| {
                if share(*page) == prefetch.trial && !of_process.contains(page) {
                    member.failed += 1;
                }
                member.failed < TRIALS
            });
        }
    }

    /// How many pages the set has at most.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.processes.iter().map(|pages| pages.len() as u64).sum()
    }
}

/// Pages, in order, as ranges of addresses.
fn joined<'a>(pages: impl Iterator<Item = (&'a u64, &'a Member)>) -> Vec<PrefetchRange> {
    let mut ranges: Vec<PrefetchRange> = Vec::new();
    for (page, Member { written, .. }) in pages {
        match ranges.last_mut() {
            Some(last) if last.range.end == *page && last.written == *written => {
                last.range.end += PAGE;
            }
            _ => ranges.push(PrefetchRange { range: *page..page + PAGE, written: *written }),
        }
    }
    ranges
}

/// Which trial a page is left out in. Spread by multiplication, so that a stretch of addresses
/// is not left out at once.
fn share(page: u64) -> u64 {
    (page / PAGE).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SHARE.trailing_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restore(set: &mut WorkingSet, needs: &[u64]) -> usize {
        let prefetch = set.prefetch();
        let ranges = prefetch.ranges.first().map_or(&[][..], Vec::as_slice);
        let there = |address: u64| ranges.iter().any(|r| r.range.contains(&address));
        let faults: Vec<u64> = needs.iter().copied().filter(|a| !there(*a)).collect();
        set.touched(0, &faults);
        set.conclude(&prefetch, std::slice::from_ref(&faults));
        faults.len()
    }

    #[test]
    fn it_learns_and_follows_change() {
        let mut set = WorkingSet::default();
        let first: Vec<u64> = (0..1000).map(|n| 0x10_0000 + n * PAGE).collect();
        assert_eq!(restore(&mut set, &first), 1000);
        for _ in 0..200 {
            // Only those on trial are waited for.
            assert!(restore(&mut set, &first) < 60);
        }
        assert_eq!(set.pages(), 1000);
        let second: Vec<u64> = (500..1500).map(|n| 0x10_0000 + n * PAGE).collect();
        for _ in 0..(2 * SHARE + 1) {
            restore(&mut set, &second);
        }
        assert_eq!(set.pages(), 1000, "what is no longer touched is forgotten");
    }

    #[test]
    fn written_pages_are_told_from_others() {
        let mut set = WorkingSet::default();
        let addresses: Vec<u64> = (0..64).map(|n| 0x40_0000 + n * PAGE).collect();
        set.touched(0, &addresses);
        set.written(0, 0x40_0000 + 10 * PAGE..0x40_0000 + 12 * PAGE);
        set.written(3, 0..PAGE);
        let ranges = set.prefetch().ranges;
        let written: Vec<_> = ranges[0].iter().filter(|r| r.written).collect();
        assert!((1..=2).contains(&written.len()) && written[0].range.start >= 0x40_a000);
        // Touched once more it is still what it was.
        set.touched(0, &addresses);
        assert!(set.prefetch().ranges[0].iter().any(|r| r.written));
    }

    #[test]
    fn neighbouring_pages_are_one_range() {
        let mut set = WorkingSet::default();
        let addresses: Vec<u64> = (0..64).map(|n| 0x40_0000 + n * PAGE_SIZE as u64).collect();
        set.touched(1, &addresses);
        let ranges = set.prefetch().ranges;
        assert!(ranges[0].is_empty());
        let covered: u64 = ranges[1].iter().map(|r| r.range.end - r.range.start).sum();
        assert!(covered >= 60 * PAGE && ranges[1].len() <= 5, "{ranges:x?}");
    }
}
