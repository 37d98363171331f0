//! Where the base snapshots' tables are, kept in the memory file itself, so that whoever maps the
//! file after its writer has died finds them.
//!
//! The catalogue is an array of 64-bit words in pages of its own behind those that are allocated.
//! Each word is written at once, and after what it points to: there is no moment at which a death
//! of the writer leaves an entry that can't be followed.

use std::sync::atomic::Ordering;

use medes_pages::PAGE_SIZE;

use crate::allocator::Extent;
use crate::shared::SharedMemory;

/// Pages of the catalogue. Memory is taken only for those with entries.
pub(crate) const CATALOGUE_PAGES: u32 = 16;

const WORDS: u32 = CATALOGUE_PAGES * (PAGE_SIZE / 8) as u32;
/// Says that the file is a page store's, and which version's.
const MAGIC: u64 = u64::from_le_bytes(*b"medesst1");
/// The word with the number of the next snapshot.
const NEXT: u32 = 1;
/// The first word with an entry.
const FIRST: u32 = 2;
/// Set in an entry whose snapshot takes no new references.
const RETIRED: u64 = 1 << 63;

/// An entry: where a snapshot's table is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CatalogueEntry {
    /// Its place in the catalogue.
    pub(crate) index: u32,
    /// Where the snapshot's table is.
    pub(crate) record: Extent,
    /// Whether the snapshot was given up.
    pub(crate) retired: bool,
}

/// The writer's side.
#[derive(Debug)]
pub(crate) struct Catalogue {
    first_page: u32,
    /// Places below `end` that are free.
    free: Vec<u32>,
    end: u32,
}

impl Catalogue {
    /// A new catalogue in the pages from `first_page` on.
    pub(crate) fn create(memory: &SharedMemory, first_page: u32) -> Self {
        let catalogue = Self { first_page, free: Vec::new(), end: FIRST };
        catalogue.store(memory, NEXT, 1);
        catalogue.store(memory, 0, MAGIC);
        catalogue
    }

    /// Reads a catalogue back: its entries, and the number of the next snapshot. `None` if there is
    /// none.
    pub(crate) fn open(
        memory: &SharedMemory,
        first_page: u32,
    ) -> std::io::Result<Option<(Self, Vec<CatalogueEntry>, u32)>> {
        // Not through the mapping: reading a page there that was never written would take memory.
        let mut bytes = vec![0; CATALOGUE_PAGES as usize * PAGE_SIZE];
        memory.read(first_page, &mut bytes)?;
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
            .collect();
        let (Ok(next), true) = (u32::try_from(words[NEXT as usize]), words[0] == MAGIC) else {
            return Ok(None);
        };
        let mut entries = Vec::new();
        for (index, word) in (FIRST..).zip(words[FIRST as usize..].iter().copied()) {
            if word != 0 {
                let pages = ((word & !RETIRED) >> 32) as u32;
                let record = Extent { start: word as u32, pages };
                entries.push(CatalogueEntry { index, record, retired: word & RETIRED != 0 });
            }
        }
        let end = entries.last().map_or(FIRST, |entry| entry.index + 1);
        let used = |index: &u32| entries.iter().any(|entry| entry.index == *index);
        let free = (FIRST..end).filter(|index| !used(index)).collect();
        Ok(Some((Self { first_page, free, end }, entries, next)))
    }

    /// The memory that it takes, bytes.
    pub(crate) fn bytes(&self) -> u64 {
        (u64::from(self.end) * 8).next_multiple_of(PAGE_SIZE as u64)
    }

    /// Notes the number of the next snapshot.
    pub(crate) fn set_next(&self, memory: &SharedMemory, number: u32) {
        self.store(memory, NEXT, u64::from(number));
    }

    /// Enters a snapshot whose table is complete; `None` if there is no room.
    pub(crate) fn enter(&mut self, memory: &SharedMemory, record: Extent) -> Option<u32> {
        let index = self.free.pop().or_else(|| {
            let next = (self.end < WORDS).then_some(self.end)?;
            self.end += 1;
            Some(next)
        })?;
        self.store(memory, index, word(record));
        Some(index)
    }

    /// Marks a snapshot as given up.
    pub(crate) fn retire(&self, memory: &SharedMemory, index: u32, record: Extent) {
        self.store(memory, index, word(record) | RETIRED);
    }

    /// Takes a snapshot out, before its pages are freed.
    pub(crate) fn remove(&mut self, memory: &SharedMemory, index: u32) {
        self.store(memory, index, 0);
        self.free.push(index);
    }

    fn store(&self, memory: &SharedMemory, index: u32, word: u64) {
        memory.word(self.first_page, index).store(word.to_le(), Ordering::Release);
    }
}

fn word(record: Extent) -> u64 {
    u64::from(record.start) | u64::from(record.pages) << 32
}
