//! The private memory of processes, as it is at one moment.

use anyhow::{Context, Result, ensure};
use medes_memory::mappings::{Mapping, MappingKind, Mappings};
use medes_memory::pages::{PageClass, PageScanner};
use medes_memory::reader::read_pages;
use medes_pages::{PAGE_SIZE, Page, is_zero};
use serde::Serialize;

/// What a region of memory is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The `brk` heap.
    Heap,
    /// The main thread's stack.
    Stack,
    /// Other anonymous memory.
    Anonymous,
    /// Private pages of a file mapping.
    File,
}

/// Pages that lie one after the other in one mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// The address of the first.
    pub start: u64,
    /// How many.
    pub pages: usize,
    /// What they are for.
    pub kind: Kind,
}

/// The private pages of one or more processes, by process and address.
#[derive(Clone, Debug, Default)]
pub struct Dump {
    regions: Vec<Region>,
    pages: Vec<Page>,
}

impl Dump {
    /// Reads the private pages of processes. They should stand still; nothing of them is changed.
    ///
    /// # Errors
    /// If a process is gone or may not be read.
    pub fn of(pids: &[i32]) -> Result<Self> {
        ensure!(!pids.is_empty(), "there is no process to look at");
        let mut dump = Self::default();
        for &pid in pids {
            dump.add(pid).with_context(|| format!("reading the memory of process {pid}"))?;
        }
        Ok(dump)
    }

    fn add(&mut self, pid: i32) -> Result<()> {
        let mappings = Mappings::read(pid)?;
        let mut scanner = PageScanner::open(pid)?;
        let mut runs = Vec::new();
        for mapping in mappings.iter().filter(|m| m.left_resident().is_none()) {
            runs.clear();
            scanner.scan(mapping, &mut runs)?;
            runs.retain(|run| run.class != PageClass::ZeroPage);
            for run in &runs {
                let (start, pages) = (run.start, run.pages as usize);
                self.regions.push(Region { start, pages, kind: kind(mapping) });
            }
            let first = self.pages.len();
            let more: usize = runs.iter().map(|run| run.pages as usize).sum();
            self.pages.resize(first + more, [0; PAGE_SIZE]);
            read_pages(pid, &runs, self.pages[first..].as_flattened_mut())?;
        }
        Ok(())
    }

    /// A dump of pages that come from no process, in one region each.
    #[must_use]
    pub fn from_regions(parts: impl IntoIterator<Item = (u64, Vec<Page>)>) -> Self {
        let mut dump = Self::default();
        for (start, pages) in parts {
            dump.regions.push(Region { start, pages: pages.len(), kind: Kind::Anonymous });
            dump.pages.extend(pages);
        }
        dump
    }

    /// All of several dumps, one after the other.
    pub fn joined<'a>(dumps: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut all = Self::default();
        for dump in dumps {
            all.regions.extend_from_slice(&dump.regions);
            all.pages.extend_from_slice(&dump.pages);
        }
        all
    }

    /// The pages.
    #[must_use]
    pub fn pages(&self) -> &[Page] {
        &self.pages
    }

    /// Bytes in all pages.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.pages.len() * PAGE_SIZE) as u64
    }

    /// The address and kind of each page, in order.
    pub fn places(&self) -> impl Iterator<Item = (u64, Kind)> + '_ {
        self.regions.iter().flat_map(|r| {
            (0..r.pages as u64).map(move |n| (r.start + n * PAGE_SIZE as u64, r.kind))
        })
    }

    /// How many pages are zero.
    #[must_use]
    pub fn zero_pages(&self) -> usize {
        self.pages.iter().filter(|page| is_zero(page)).count()
    }

    /// The longest pieces of memory without a page of zeros or a gap in them.
    pub fn segments(&self) -> impl Iterator<Item = &[u8]> {
        let mut first = 0;
        let regions = self.regions.iter().map(move |region| {
            let pages = first..first + region.pages;
            first = pages.end;
            pages
        });
        regions
            .flat_map(|pages| self.pages[pages].split(is_zero))
            .filter_map(|pages| if pages.is_empty() { None } else { Some(pages.as_flattened()) })
    }
}

fn kind(mapping: &Mapping) -> Kind {
    match mapping.kind {
        MappingKind::Heap => Kind::Heap,
        MappingKind::Stack => Kind::Stack,
        MappingKind::FilePrivate { .. } => Kind::File,
        _ => Kind::Anonymous,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_end_at_gaps_and_zero_pages() {
        let page = |n: u8| [n; PAGE_SIZE];
        let dump = Dump::from_regions([
            (0x1000, vec![page(1), page(2), page(0), page(3)]),
            (0x9000, vec![page(0)]),
            (0xa000, vec![page(4)]),
        ]);
        let segments: Vec<_> = dump.segments().map(|s| (s[0], s.len() / PAGE_SIZE)).collect();
        assert_eq!(segments, [(1, 2), (3, 1), (4, 1)]);
        assert_eq!(dump.zero_pages(), 2);
        assert_eq!(dump.places().map(|(a, _)| a).nth(4), Some(0x9000));
    }

    #[test]
    fn this_process_can_be_read() {
        let mark = vec![0x5a_u8; 3 * PAGE_SIZE];
        let pid = i32::try_from(std::process::id()).expect("a process id");
        let dump = Dump::of(&[pid]).expect("own memory");
        assert!(dump.pages().iter().any(|page| page.iter().all(|b| *b == 0x5a)));
        assert_eq!(dump.places().count(), dump.pages().len());
        assert_eq!(mark.len(), 3 * PAGE_SIZE);
    }
}
