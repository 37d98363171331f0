//! Arithmetic on address ranges.

use std::ops::Range;

/// The parts of `range` outside of `holes`, which are in any order and may overlap.
pub fn without(range: Range<u64>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut inside: Vec<_> =
        holes.iter().filter(|hole| hole.start < range.end && hole.end > range.start).collect();
    inside.sort_unstable_by_key(|hole| hole.start);
    let mut parts = Vec::with_capacity(inside.len() + 1);
    let mut at = range.start;
    for hole in inside {
        if hole.start > at {
            parts.push(at..hole.start);
        }
        at = at.max(hole.end);
    }
    if at < range.end {
        parts.push(at..range.end);
    }
    parts
}

/// Those of `ranges`, which are in order and do not overlap, that have an address in common with
/// `range`.
pub fn near<'r>(ranges: &'r [Range<u64>], range: &Range<u64>) -> &'r [Range<u64>] {
    let first = ranges.partition_point(|other| other.end <= range.start);
    let last = ranges.partition_point(|other| other.start < range.end);
    &ranges[first..last.max(first)]
}

/// The parts of `range` inside of `ranges`, which are in order and do not overlap.
pub fn within(range: &Range<u64>, ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let part = |other: &Range<u64>| range.start.max(other.start)..range.end.min(other.end);
    near(ranges, range).iter().map(part).filter(|part| !part.is_empty()).collect()
}

/// A range in slices of `length`, the last one shorter.
pub fn slices(range: Range<u64>, length: u64) -> impl Iterator<Item = Range<u64>> {
    let starts = (range.start..range.end).step_by(length as usize);
    starts.map(move |start| start..range.end.min(start + length))
}

/// Whether two ranges have an address in common.
pub fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_cut_out() {
        assert!(without(0..10, &[]).into_iter().eq(std::iter::once(0..10)));
        assert_eq!(without(0..10, &[4..5, 2..3]), [0..2, 3..4, 5..10]);
        assert!(without(2..10, &[0..3, 2..5, 9..20]).into_iter().eq(std::iter::once(5..9)));
        assert!(without(2..10, std::slice::from_ref(&(0..10))).is_empty());
    }

    #[test]
    fn what_is_within_and_near_is_found() {
        let ranges = [2..3, 5..8, 8..9, 12..14];
        assert_eq!(near(&ranges, &(3..9)), [5..8, 8..9]);
        assert_eq!(within(&(6..13), &ranges), [6..8, 8..9, 12..13]);
        assert!(within(&(9..12), &ranges).is_empty());
        assert!(within(&(6..6), &ranges).is_empty());
    }

    #[test]
    fn touching_ranges_do_not_overlap() {
        assert!(!overlap(&(0..2), &(2..4)));
        assert!(overlap(&(0..3), &(2..4)));
    }
}
