//! Which pages a function touches when it runs again, learned from what its sandboxes fault on.
//!
//! A page that a thread has to wait for after a restore belongs to the working set; pages of the
//! working set are put back before the next restore of any of the function's sandboxes lets it
//! run, all of it: waiting for one costs a thread as much as putting ten back, and more while others
//! are being put back. A page that was put back beforehand can't fault, so whether it is still
//! needed is found out by leaving it out: a small share each time, another one each time, and what
//! requests used to write to and were seen not to. What nobody touches then is forgotten. So the
//! set follows a function that changes, in both directions.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use medes_pages::PAGE_SIZE;

const PAGE: u64 = PAGE_SIZE as u64;

/// One page in so many is left out at each restore: a few, for each costs the request a fault.
const SHARE: u64 = 256;

/// Of the pages that requests write to, whether they still do is looked at for one in so many at each
/// restore: it costs each of them a fault, if a short one.
const WATCHED: u64 = 8;

/// Pages that are looked at together, so that ranges stay in one piece.
const WATCHED_TOGETHER: u64 = 16;

/// A page that was seen not to be written to so often in a row is left out.
const UNWRITTEN: u8 = 2;

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
    /// The last restore that it was left out of.
    left_out: u64,
    /// Whether requests write to it.
    written: bool,
    /// If they do: the last restore at which it was watched whether they still do.
    watched: u64,
    /// How often in a row it was seen that they did not.
    unwritten: u8,
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
    /// The restore's number, from 1; 0 if it is none of a working set.
    restore: u64,
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
        self.restores += 1;
        let restore = self.restores;
        let of_process = |pages: &mut BTreeMap<u64, Member>| {
            for (page, member) in &mut *pages {
                if share(page / PAGE, SHARE) == restore % SHARE || member.unwritten >= UNWRITTEN {
                    member.left_out = restore;
                }
                let together = page / PAGE / WATCHED_TOGETHER;
                if member.written && share(together, WATCHED) == restore % WATCHED {
                    member.watched = restore;
                }
            }
            joined(pages, restore)
        };
        Prefetch { ranges: self.processes.iter_mut().map(of_process).collect(), restore }
    }

    /// Pages of a process that a thread had to wait for.
    pub fn touched(&mut self, process: usize, addresses: &[u64]) {
        if self.processes.len() <= process {
            self.processes.resize_with(process + 1, BTreeMap::new);
        }
        for address in addresses {
            let member = self.processes[process].entry(address & !(PAGE - 1)).or_default();
            // It may be read by all and written to by a few: not on trial again before long.
            member.written &= member.unwritten < UNWRITTEN;
            member.unwritten = 0;
        }
    }

    /// All pages of a process that were written to from a restore until it was deduplicated again,
    /// in order; those among them that `prefetch` did not watch may have been put back only.
    pub fn written(&mut self, process: usize, prefetch: &Prefetch, ranges: &[Range<u64>]) {
        let Some(pages) = self.processes.get_mut(process) else { return };
        let mut ranges = ranges.iter().peekable();
        for (page, member) in pages {
            while ranges.next_if(|range| range.end <= *page).is_some() {}
            let is_written = ranges.peek().is_some_and(|range| range.start <= *page);
            match (is_written, member.written) {
                (true, true) if member.watched != prefetch.restore => {}
                (true, _) => (member.written, member.unwritten) = (true, 0),
                (false, true) => member.unwritten = member.unwritten.saturating_add(1),
                (false, false) => {}
            }
        }
    }

    /// The first request after the restore is over: pages that were left out and not touched are
    /// forgotten. `touched` says which were.
    pub fn conclude(&mut self, prefetch: &Prefetch, touched: &[Vec<u64>]) {
        for (process, pages) in self.processes.iter_mut().enumerate() {
            let of_process = touched.get(process).map_or(&[][..], Vec::as_slice);
            let of_process: HashSet<u64> = of_process.iter().map(|a| a & !(PAGE - 1)).collect();
            pages.retain(|page, member| {
                let left_out = member.left_out == prefetch.restore && prefetch.restore > 0;
                !left_out || of_process.contains(page)
            });
        }
    }

    /// How many pages the set has at most.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.processes.iter().map(|pages| pages.len() as u64).sum()
    }
}

/// Pages, in order, as ranges of addresses, but those that are left out of a restore.
fn joined(pages: &BTreeMap<u64, Member>, restore: u64) -> Vec<PrefetchRange> {
    let mut ranges: Vec<PrefetchRange> = Vec::new();
    for (page, member) in pages.iter().filter(|(_, member)| member.left_out != restore) {
        let written = member.written && member.watched != restore;
        match ranges.last_mut() {
            Some(last) if last.range.end == *page && last.written == written => {
                last.range.end += PAGE;
            }
            _ => ranges.push(PrefetchRange { range: *page..page + PAGE, written }),
        }
    }
    ranges
}

/// Which of `shares`, a power of two, something is in. Spread by multiplication, so that a stretch of
/// addresses is not in one.
fn share(of: u64, shares: u64) -> u64 {
    of.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - shares.trailing_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One restore and a request that touches and writes to pages. Returns what had to be waited
    /// for.
    fn restore(set: &mut WorkingSet, needs: &[u64], writes: &[Range<u64>]) -> usize {
        let prefetch = set.prefetch();
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
        for _ in 0..=SHARE {
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
            let ranges = set.prefetch().ranges.swap_remove(0);
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
