//! Relocation of a base page: what turns the pointers of one address space into those of another.
//!
//! Two instances of a program under address space randomisation hold the same data, but for the
//! pointers: those into one mapping all differ by the same whole number of pages. So a patch may
//! begin with a few regions of addresses and the distance each has moved. The decoder adds the
//! distance to each word of the base page that lies in a region, whatever the word is; where that
//! is wrong, the patch of the relocated base corrects it, as any other difference.

use crate::bytes::{Reader, push_number, words, words_mut};
use crate::{DecodeError, PAGE_SIZE, Page};

/// More regions than this hardly ever pay for themselves within one page.
const MAX_REGIONS: usize = 8;

/// Page numbers of user addresses have 35 bits; so have the distances between two, and a sign.
const PAGE_NUMBER_BITS: u32 = 36;

/// A range of addresses that has moved as a whole.
#[derive(Clone, Copy, Default, Debug)]
struct Region {
    /// Page number of the region's first address in the base's address space.
    first: u64,
    /// Pages in the region, at least 1.
    pages: u64,
    /// Bytes that the region has moved by, modulo 2^64; a whole number of pages.
    distance: u64,
    /// Words of the page that the region explains.
    words: u32,
}

impl Region {
    fn last(&self) -> u64 {
        self.first + self.pages - 1
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.first <= other.last() && other.first <= self.last()
    }

    fn include(&mut self, page: u64) {
        let last = self.last().max(page);
        self.first = self.first.min(page);
        self.pages = last - self.first + 1;
        self.words += 1;
    }
}

/// The regions of one page; none is the identity.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Relocation {
    regions: [Region; MAX_REGIONS],
    len: usize,
}

impl Relocation {
    /// The relocation that makes `base` most like `page`, as far as a quick look shows.
    pub(crate) fn between(base: &Page, page: &Page) -> Self {
        let mut found = Self::default();
        for (base, page) in words(base).iter().zip(words(page)) {
            if base == page {
                continue;
            }
            let (base, page) = (u64::from_le_bytes(*base), u64::from_le_bytes(*page));
            if is_pointer(base) && is_pointer(page) && (base ^ page) % PAGE_SIZE as u64 == 0 {
                found.add(base >> 12, page.wrapping_sub(base));
            }
        }
        found.keep_useful();
        found
    }

    fn add(&mut self, page: u64, distance: u64) {
        let regions = &mut self.regions[..self.len];
        if let Some(region) = regions.iter_mut().find(|region| region.distance == distance) {
            region.include(page);
        } else if self.len < MAX_REGIONS {
            self.regions[self.len] = Region { first: page, pages: 1, distance, words: 1 };
            self.len += 1;
        }
    }

    /// Drops regions that cost more than the words they explain, and of two that overlap the one
    /// that explains less.
    fn keep_useful(&mut self) {
        self.regions[..self.len].sort_unstable_by_key(|region| std::cmp::Reverse(region.words));
        let mut len = 0;
        for i in 0..self.len {
            let region = self.regions[i];
            let clear = self.regions[..len].iter().all(|kept| !kept.overlaps(&region));
            if clear && region.words > 1 {
                self.regions[len] = region;
                len += 1;
            }
        }
        self.len = len;
    }

    pub(crate) fn is_identity(&self) -> bool {
        self.len == 0
    }

    /// Writes the relocated `base` to `out`.
    pub(crate) fn apply(&self, base: &Page, out: &mut Page) {
        out.copy_from_slice(base);
        for region in &self.regions[..self.len] {
            let start = region.first << 12;
            for (out, base) in words_mut(out).iter_mut().zip(words(base)) {
                let base = u64::from_le_bytes(*base);
                // Without a comparison, which baseline x86-64 vectors lack for 64 bits: the
                // difference of two numbers below 2^52 is negative just inside the region.
                let inside = (base.wrapping_sub(start) >> 12).wrapping_sub(region.pages) >> 63;
                let moved = region.distance & 0u64.wrapping_sub(inside);
                *out = u64::from_le_bytes(*out).wrapping_add(moved).to_le_bytes();
            }
        }
    }

    /// Appends the table: the number of regions, then for each its first page number, its pages
    /// and its distance in pages, the sign in the lowest bit.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        push_number(out, self.len as u64);
        for region in &self.regions[..self.len] {
            let distance = region.distance.cast_signed() >> 12;
            push_number(out, region.first);
            push_number(out, region.pages);
            push_number(out, (distance << 1 ^ distance >> 63).cast_unsigned());
        }
    }

    /// Reads a table of at least one region.
    pub(crate) fn read(patch: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let len = usize::from(patch.byte()?);
        if len == 0 || len > MAX_REGIONS {
            return Err(DecodeError::Relocation);
        }
        let mut relocation = Self { len, ..Self::default() };
        for region in &mut relocation.regions[..len] {
            let first = patch.number()?;
            let pages = patch.number()?;
            let distance = patch.number()?;
            let limit = 1 << PAGE_NUMBER_BITS;
            if first >= limit || pages == 0 || pages >= limit || distance >= 2 * limit {
                return Err(DecodeError::Relocation);
            }
            let distance = distance >> 1 ^ 0u64.wrapping_sub(distance & 1);
            *region = Region { first, pages, distance: distance << 12, words: 0 };
        }
        Ok(relocation)
    }
}

/// Whether a word can be a user address of a 64-bit process, above the first 4 GiB. The low ones,
/// of programs linked to a fixed address, never move.
fn is_pointer(word: u64) -> bool {
    word >> 47 == 0 && word >> 32 != 0
}
