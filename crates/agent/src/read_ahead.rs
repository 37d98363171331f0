//! Which pages a process is likely to touch next, going by those that it had to wait for.
//!
//! Whoever waits for one page right behind another reads on through what lies behind it: an array,
//! mostly. Each time that it does twice as many pages come with the one that it waits for. As it
//! arrives behind all of them, they were touched too, as far as anybody can tell.

use std::ops::Range;

use medes_pages::PAGE_SIZE;

const PAGE: u64 = PAGE_SIZE as u64;

/// The most pages that come at a time.
const MOST: u64 = 64;

/// How many sequences are followed at once: arrays are read in step with each other.
const SEQUENCES: usize = 8;

/// Pages that a process reads one after the other.
#[derive(Debug)]
struct Sequence {
    /// The page that it is expected to wait for next.
    next: u64,
    /// How many pages came the last time: the one that it waited for, and those right before `next`.
    pages: u64,
}

/// The sequences of one address space.
#[derive(Debug, Default)]
pub(crate) struct ReadAhead {
    /// The one that was followed last comes first.
    sequences: Vec<Sequence>,
}

/// What a process does that waits for a page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Step {
    /// It has come through these, which lie before the page and came unasked.
    pub(crate) passed: Range<u64>,
    /// It is likely to go on to these, which lie behind the page.
    pub(crate) ahead: Range<u64>,
}

impl ReadAhead {
    /// A thread waits for a page.
    pub(crate) fn step(&mut self, page: u64) -> Step {
        let known = self.sequences.iter().position(|sequence| sequence.next == page);
        let before = match known {
            Some(at) => self.sequences.remove(at).pages,
            None => 0,
        };
        let pages = (before * 2).clamp(1, MOST);
        let behind = page.saturating_add(PAGE);
        let next = page.saturating_add(pages * PAGE);
        self.sequences.truncate(SEQUENCES - 1);
        self.sequences.insert(0, Sequence { next, pages });
        let passed = page - before.saturating_sub(1) * PAGE..page;
        Step { passed, ahead: behind..next }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 0x7000_0000;

    fn at(page: u64) -> u64 {
        START + page * PAGE
    }

    /// What is read of `pages` has to be waited for so many times; `passed` holds what is learned
    /// beside.
    fn read(ahead: &mut ReadAhead, pages: Range<u64>, passed: &mut Vec<u64>) -> usize {
        let (mut waits, mut there) = (0, Vec::<Range<u64>>::new());
        for page in pages.map(at) {
            if there.iter().any(|range| range.contains(&page)) {
                continue;
            }
            let step = ahead.step(page);
            passed.extend(step.passed.step_by(PAGE_SIZE));
            there.push(step.ahead);
            waits += 1;
        }
        waits
    }

    #[test]
    fn what_is_read_in_order_comes_ahead() {
        let (mut ahead, mut passed) = (ReadAhead::default(), Vec::new());
        let waits = read(&mut ahead, 0..1000, &mut passed);
        assert!(waits < 24, "{waits}");
        assert!(passed.len() > 900 && passed.is_sorted(), "{} passed", passed.len());
    }

    #[test]
    fn arrays_are_read_in_step() {
        let mut ahead = ReadAhead::default();
        let mut there: Vec<Range<u64>> = Vec::new();
        let mut waits = 0;
        for n in 0..500 {
            for array in [0, 10_000, 20_000] {
                let page = at(array + n);
                if !there.iter().any(|range| range.contains(&page)) {
                    there.push(ahead.step(page).ahead);
                    waits += 1;
                }
            }
        }
        assert!(waits < 3 * 20, "{waits}");
    }

    #[test]
    fn what_is_touched_here_and_there_comes_alone() {
        let mut ahead = ReadAhead::default();
        for n in 0..100 {
            let step = ahead.step(at(n * 37 % 101 * 2));
            assert!(step.ahead.is_empty() && step.passed.is_empty(), "{step:x?}");
        }
        // Nor is the last page there is followed by anything.
        let last = u64::MAX - PAGE + 1;
        ahead.step(last - PAGE);
        assert!(ahead.step(last).ahead.is_empty());
    }

    proptest! {
        #[test]
        fn only_what_came_unasked_was_passed(pages in prop::collection::vec(0..40_u64, 0..200)) {
            let mut ahead = ReadAhead::default();
            let mut unasked: Vec<Range<u64>> = Vec::new();
            for page in pages.into_iter().map(at) {
                let step = ahead.step(page);
                prop_assert!(step.passed.is_empty() || unasked.contains(&step.passed));
                prop_assert_eq!(step.passed.end, page);
                prop_assert_eq!(step.ahead.start, page + PAGE);
                prop_assert!(step.ahead.end - page <= MOST * PAGE);
                prop_assert!(ahead.sequences.len() <= SEQUENCES);
                unasked.push(step.ahead);
            }
        }
    }
}
