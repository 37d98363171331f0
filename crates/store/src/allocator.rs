//! Which pages of the memory file are free: a map of free ranges, coalesced.

use std::collections::BTreeMap;

/// A range of whole pages in the memory file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct Extent {
    /// The first page's number.
    pub start: u32,
    /// How many pages.
    pub pages: u32,
}

impl Extent {
    /// The page after the last.
    #[must_use]
    pub fn end(self) -> u32 {
        self.start + self.pages
    }
}

/// The store is full
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the page store is full: {wanted} pages wanted, {free} free in all")]
pub struct OutOfSpace {
    /// The pages asked for.
    pub wanted: u32,
    /// The pages free, in however many pieces.
    pub free: u32,
}

/// Free ranges by their first page. Ranges never touch: neighbours are joined when one is freed.
#[derive(Debug)]
pub(crate) struct Allocator {
    free: BTreeMap<u32, u32>,
    free_pages: u32,
    capacity: u32,
}

impl Allocator {
    pub(crate) fn new(capacity: u32) -> Self {
        let free = if capacity > 0 { BTreeMap::from([(0, capacity)]) } else { BTreeMap::new() };
        Self { free, free_pages: capacity, capacity }
    }

    pub(crate) fn used_pages(&self) -> u32 {
        self.capacity - self.free_pages
    }

    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// One range of exactly `pages` pages, from the lowest place that has room: low places fill
    /// up first, so that what is freed at the end stays in large pieces.
    pub(crate) fn take(&mut self, pages: u32) -> Result<Extent, OutOfSpace> {
        let fits = self.free.iter().find(|(_, len)| **len >= pages).map(|(s, l)| (*s, *l));
        let (start, len) = fits.ok_or(OutOfSpace { wanted: pages, free: self.free_pages })?;
        self.carve(start, len, pages);
        Ok(Extent { start, pages })
    }

    /// One page, if possible the page `next` (so that pages written one after the other lie one
    /// after the other, and are put back in one piece).
    pub(crate) fn take_page(&mut self, next: u32) -> Result<u32, OutOfSpace> {
        if let Some((&start, &len)) = self.free.range(..=next).next_back()
            && next < start + len
        {
            self.free.remove(&start);
            if next > start {
                self.free.insert(start, next - start);
            }
            if next + 1 < start + len {
                self.free.insert(next + 1, start + len - next - 1);
            }
            self.free_pages -= 1;
            return Ok(next);
        }
        // Somewhere with room to go on.
        let roomy = self.free.iter().find(|(_, len)| **len >= 64);
        let best = roomy.or_else(|| self.free.iter().next()).map(|(s, l)| (*s, *l));
        let (start, len) = best.ok_or(OutOfSpace { wanted: 1, free: 0 })?;
        self.carve(start, len, 1);
        Ok(start)
    }

    /// Takes exactly this range; false, and nothing is taken, if a page of it is not free.
    pub(crate) fn reserve(&mut self, extent: Extent) -> bool {
        if extent.pages == 0 {
            return true;
        }
        let before = self.free.range(..=extent.start).next_back().map(|(s, l)| (*s, *l));
        let Some((start, len)) = before else { return false };
        let (end, wanted) = (u64::from(start) + u64::from(len), u64::from(extent.start));
        if wanted + u64::from(extent.pages) > end {
            return false;
        }
        self.free.remove(&start);
        if extent.start > start {
            self.free.insert(start, extent.start - start);
        }
        if extent.end() < start + len {
            self.free.insert(extent.end(), start + len - extent.end());
        }
        self.free_pages -= extent.pages;
        true
    }

    /// Every free range.
    pub(crate) fn free(&self) -> impl Iterator<Item = Extent> + '_ {
        self.free.iter().map(|(start, pages)| Extent { start: *start, pages: *pages })
    }

    fn carve(&mut self, start: u32, len: u32, pages: u32) {
        self.free.remove(&start);
        if len > pages {
            self.free.insert(start + pages, len - pages);
        }
        self.free_pages -= pages;
    }

    pub(crate) fn give_back(&mut self, extent: Extent) {
        if extent.pages == 0 {
            return;
        }
        debug_assert!(extent.end() <= self.capacity);
        let (mut start, mut len) = (extent.start, extent.pages);
        if let Some((&before, &before_len)) = self.free.range(..extent.start).next_back() {
            debug_assert!(before + before_len <= extent.start, "freed twice");
            if before + before_len == extent.start {
                self.free.remove(&before);
                start = before;
                len += before_len;
            }
        }
        if let Some(&after_len) = self.free.get(&extent.end()) {
            self.free.remove(&extent.end());
            len += after_len;
        }
        self.free.insert(start, len);
        self.free_pages += extent.pages;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is taken and given back, in whatever order: no page is handed out twice, and
        /// the count of free pages is right.
        #[test]
        fn pages_are_handed_out_once(ops in proptest::collection::vec((0u8..5, 1u32..20), 1..200)) {
            let mut allocator = Allocator::new(256);
            let mut held: Vec<Extent> = Vec::new();
            let mut owner = [false; 256];
            let mut next = 0;
            for (kind, n) in ops {
                let got = match kind {
                    0 => allocator.take(n).ok(),
                    1 => allocator.take_page(next).ok().map(|p| Extent { start: p, pages: 1 }),
                    2 => {
                        let wanted = Extent { start: (next + n * 7) % 250, pages: n % 6 + 1 };
                        let is_free = (wanted.start..wanted.end()).all(|p| !owner[p as usize]);
                        prop_assert_eq!(allocator.reserve(wanted), is_free);
                        is_free.then_some(wanted)
                    }
                    _ => {
                        if !held.is_empty() {
                            let e = held.swap_remove(n as usize % held.len());
                            for p in e.start..e.end() {
                                owner[p as usize] = false;
                            }
                            allocator.give_back(e);
                        }
                        None
                    }
                };
                if let Some(e) = got {
                    next = e.end();
                    for p in e.start..e.end() {
                        prop_assert!(!owner[p as usize]);
                        owner[p as usize] = true;
                    }
                    held.push(e);
                }
                let used = owner.iter().filter(|o| **o).count();
                prop_assert_eq!(allocator.used_pages() as usize, used);
            }
            for e in held {
                allocator.give_back(e);
            }
            prop_assert_eq!(allocator.take(256).map(|e| e.start), Ok(0));
        }
    }
}
