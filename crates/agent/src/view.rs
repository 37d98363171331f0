//! Where the pages of a partly restored process are now.
//!
//! An image names pages by the addresses that they had when they were dropped. The process runs
//! on before all of them are back, and may move, drop or unmap ranges meanwhile; the kernel tells
//! of each such change through the userfaultfd before it takes effect. An [`AddressView`] follows
//! these changes, so that a page that was dropped by the process itself reads as zeros and not as
//! what it was, and a page that moved is found under its old address.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::plan::Reused;

/// What belongs at an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Belongs {
    /// What the image has for this address.
    Image(u64),
    /// Zeros: the process dropped the page itself.
    Zeros,
    /// Nothing that the image knows of.
    Nothing,
}

/// A piece of address space; the key in the map is its start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Piece {
    end: u64,
    /// The image's address of the first byte; `None` for zeros.
    image: Option<u64>,
}

/// The ranges of one process that are registered with its userfaultfd, and what belongs in them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AddressView {
    pieces: BTreeMap<u64, Piece>,
    changed: bool,
}

/// An [`AddressView`] as it is told to others.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SpaceView {
    /// Registered ranges in order: first address, length, and the image's address of the first
    /// byte, or none where the process dropped what the image has.
    pub pieces: Vec<(u64, u64, Option<u64>)>,
}

impl SpaceView {
    /// All ranges that are registered with the userfaultfd, neighbours joined.
    #[must_use]
    pub fn registered(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (start, length, _) in &self.pieces {
            match ranges.last_mut() {
                Some(last) if last.end == *start => last.end += length,
                _ => ranges.push(*start..start + length),
            }
        }
        ranges
    }

    /// The parts of `range` that belong to the image.
    #[must_use]
    pub fn of_image(&self, range: &Range<u64>) -> Vec<Reused> {
        let first = self.pieces.partition_point(|(start, length, _)| start + length <= range.start);
        let near = self.pieces[first..].iter().take_while(|(start, ..)| *start < range.end);
        let within = |(start, length, origin): &(u64, u64, Option<u64>)| {
            let part = range.start.max(*start)..range.end.min(start + length);
            let origin = (*origin)? + (part.start - start);
            Some(Reused { range: part, origin })
        };
        near.filter_map(within).collect()
    }
}

impl AddressView {
    /// What is told to others.
    #[must_use]
    pub fn export(&self) -> SpaceView {
        let piece = |(start, piece): (&u64, &Piece)| (*start, piece.end - start, piece.image);
        SpaceView { pieces: self.pieces.iter().map(piece).collect() }
    }

    /// The view right after dropping: every page belongs where the image says.
    #[must_use]
    pub fn new(registered: &[Range<u64>]) -> Self {
        let piece = |r: &Range<u64>| (r.start, Piece { end: r.end, image: Some(r.start) });
        Self { pieces: registered.iter().map(piece).collect(), changed: false }
    }

    /// What belongs at `address`.
    #[must_use]
    pub fn at(&self, address: u64) -> Belongs {
        match self.pieces.range(..=address).next_back() {
            Some((start, piece)) if address < piece.end => match piece.image {
                Some(image) => Belongs::Image(image + (address - start)),
                None => Belongs::Zeros,
            },
            _ => Belongs::Nothing,
        }
    }

    /// The part of `range` around `address` in which pages lie as they do in the image, one after
    /// the other; empty if the image has nothing there. For putting back neighbours of a page.
    #[must_use]
    pub fn around(&self, address: u64, range: Range<u64>) -> Range<u64> {
        match self.pieces.range(..=address).next_back() {
            Some((start, piece)) if address < piece.end && piece.image.is_some() => {
                range.start.max(*start)..range.end.min(piece.end)
            }
            _ => address..address,
        }
    }

    /// The parts of `range` that belong to the image, each in one piece.
    #[must_use]
    pub fn parts(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let before = self.pieces.range(..=range.start).next_back().map_or(range.start, |(s, _)| *s);
        self.pieces
            .range(before..range.end)
            .filter(|(_, piece)| piece.image.is_some() && piece.end > range.start)
            .map(|(start, piece)| range.start.max(*start)..range.end.min(piece.end))
            .collect()
    }

    /// All ranges that belong to the image: (where they are now, their address in the image).
    pub fn ranges(&self) -> impl Iterator<Item = (Range<u64>, u64)> + '_ {
        self.pieces.iter().filter_map(|(start, p)| Some((*start..p.end, p.image?)))
    }

    /// Whether the process has moved or unmapped anything, so that the image's addresses are no
    /// longer those of the process. Dropped ranges are no such change.
    #[must_use]
    pub fn has_moved(&self) -> bool {
        self.changed
    }

    /// The process dropped the pages of `range`: they are zeros from now on.
    pub fn remove(&mut self, range: Range<u64>) {
        for (start, piece) in self.cut(range) {
            self.pieces.insert(start, Piece { image: None, ..piece });
        }
    }

    /// `range` is no longer registered with the userfaultfd.
    pub fn forget(&mut self, range: Range<u64>) {
        self.cut(range);
    }

    /// As [`AddressView::forget`], for many ranges in any order.
    pub fn forget_all(&mut self, ranges: &[Range<u64>]) {
        let mut sorted: Vec<_> = ranges.iter().filter(|range| !range.is_empty()).collect();
        sorted.sort_unstable_by_key(|range| range.start);
        let mut gone = sorted.into_iter().peekable();
        let mut rest = Vec::with_capacity(self.pieces.len() + gone.len());
        for (start, piece) in std::mem::take(&mut self.pieces) {
            let mut keep = |part: Range<u64>| {
                let image = piece.image.map(|image| image + (part.start - start));
                rest.push((part.start, Piece { end: part.end, image }));
            };
            let mut at = start;
            while let Some(range) = gone.peek().filter(|range| range.start < piece.end) {
                if range.start > at {
                    keep(at..range.start);
                }
                at = at.max(range.end);
                if range.end > piece.end {
                    // It goes on in the next piece.
                    break;
                }
                gone.next();
            }
            if at < piece.end {
                keep(at..piece.end);
            }
        }
        self.pieces = rest.into_iter().collect();
    }

    /// The process unmapped `range`.
    pub fn unmap(&mut self, range: Range<u64>) {
        if !self.cut(range).is_empty() {
            self.changed = true;
        }
    }

    /// The process moved the `length` bytes at `from` to `to`; what was at `to` is gone.
    pub fn remap(&mut self, from: u64, to: u64, length: u64) {
        let moved = self.cut(from..from.saturating_add(length));
        self.cut(to..to.saturating_add(length));
        for (start, piece) in moved {
            let shift = |address: u64| to + (address - from);
            self.pieces.insert(shift(start), Piece { end: shift(piece.end), image: piece.image });
            self.changed = true;
        }
    }

    /// Takes what lies in `range` out, cutting pieces at its ends, and returns it.
    fn cut(&mut self, range: Range<u64>) -> Vec<(u64, Piece)> {
        self.split(range.start);
        self.split(range.end);
        if range.is_empty() {
            return Vec::new();
        }
        let starts: Vec<u64> = self.pieces.range(range).map(|(start, _)| *start).collect();
        starts.into_iter().filter_map(|s| Some((s, self.pieces.remove(&s)?))).collect()
    }

    fn split(&mut self, at: u64) {
        let Some((&start, &piece)) = self.pieces.range(..at).next_back() else { return };
        if at < piece.end {
            self.pieces.insert(start, Piece { end: at, image: piece.image });
            let image = piece.image.map(|image| image + (at - start));
            self.pieces.insert(at, Piece { end: piece.end, image });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    #[test]
    fn neighbours_end_where_the_image_does() {
        let mut view = AddressView::new(&[0x1000..0x9000, 0x9000..0xa000]);
        view.remove(0x3000..0x4000);
        assert_eq!(view.around(0x5000, 0x0..0x10000), 0x4000..0x9000);
        assert_eq!(view.around(0x3000, 0x0..0x10000), 0x3000..0x3000);
        assert_eq!(view.parts(0x0..0x3000)[0], 0x1000..0x3000);
        assert_eq!(view.parts(0x2000..0x9800), [0x2000..0x3000, 0x4000..0x9000, 0x9000..0x9800]);
        assert!(view.parts(0xa000..0xb000).is_empty());
        assert!(!view.has_moved());
        view.remap(0x4000, 0x20000, 0x2000);
        assert_eq!(view.at(0x21000), Belongs::Image(0x5000));
        assert_eq!(view.at(0x4000), Belongs::Nothing);
        assert!(view.has_moved());
    }

    proptest! {
        /// The view says of every page what a page-by-page model says.
        #[test]
        fn follows_every_change(ops in proptest::collection::vec((0u8..4, 0u64..40, 0u64..40, 1u64..16), 0..30)) {
            let mut view = AddressView::new(&[4 * PAGE..12 * PAGE, 12 * PAGE..20 * PAGE]);
            let mut model: Vec<Belongs> = (0..60)
                .map(|n| if (4..20).contains(&n) { Belongs::Image(n * PAGE) } else { Belongs::Nothing })
                .collect();
            for (kind, a, b, n) in ops {
                let (a, b, n) = (a as usize, b as usize, n as usize);
                match kind {
                    0 => {
                        view.remove(a as u64 * PAGE..(a + n) as u64 * PAGE);
                        for page in &mut model[a..a + n] {
                            if *page != Belongs::Nothing {
                                *page = Belongs::Zeros;
                            }
                        }
                    }
                    1 => {
                        let ranges = [b..b + n / 2, a + 1..a + n, a..a + n / 2 + 1];
                        view.forget_all(&ranges.clone().map(|r| r.start as u64 * PAGE..r.end as u64 * PAGE));
                        for range in ranges.into_iter().filter(|range| !range.is_empty()) {
                            model[range].fill(Belongs::Nothing);
                        }
                    }
                    2 => {
                        view.unmap(a as u64 * PAGE..(a + n) as u64 * PAGE);
                        model[a..a + n].fill(Belongs::Nothing);
                    }
                    _ => {
                        // The kernel never moves a range onto itself.
                        if a + n <= b || b + n <= a {
                            view.remap(a as u64 * PAGE, b as u64 * PAGE, n as u64 * PAGE);
                            let moved = model[a..a + n].to_vec();
                            model[a..a + n].fill(Belongs::Nothing);
                            model[b..b + n].copy_from_slice(&moved);
                        }
                    }
                }
                for (n, expected) in model.iter().enumerate() {
                    prop_assert_eq!(view.at(n as u64 * PAGE), *expected);
                }
                // And what it tells others of a range is the same.
                let mut told = vec![None; model.len()];
                for Reused { range, origin } in view.export().of_image(&(a as u64 * PAGE..(a + n) as u64 * PAGE)) {
                    for page in range.start / PAGE..range.end / PAGE {
                        told[page as usize] = Some(Belongs::Image(origin + page * PAGE - range.start));
                    }
                }
                for (page, belongs) in model.iter().enumerate() {
                    let told = told[page].unwrap_or(Belongs::Nothing);
                    let is_told = (a..a + n).contains(&page) && matches!(belongs, Belongs::Image(_));
                    prop_assert_eq!(told, if is_told { *belongs } else { Belongs::Nothing });
                }
            }
        }
    }
}
