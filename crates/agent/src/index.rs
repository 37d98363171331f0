//! An image opened for reading page by page, in any order.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use medes_core::PageRef;
use medes_pages::{Decoder, PAGE_SIZE, Page};
use medes_store::{Extent, SnapshotRecord, View};

use crate::encode::PageSource;
use crate::error::RestoreError;
use crate::image::{ImageError, PatchUse, Source, Table, check};

/// An image, its table decoded and checked, every base page that it names known to be there.
pub struct ImageIndex {
    view: Arc<View>,
    image: Extent,
    table: Table,
    /// Where the patches begin in the image's bytes.
    patches_at: usize,
    /// Per process and run: where its first patch begins, counted from `patches_at`.
    offsets: Vec<Vec<u32>>,
}

/// Consecutive pages of an image that are copied in one piece.
pub enum Piece<'a> {
    /// They lie in the memory file as they are.
    Stored(&'a [u8]),
    /// They have to be decoded, one by one: patch, and base page if it has one.
    Patched(&'a [PatchUse], &'a [u8]),
}

impl ImageIndex {
    /// Where it lies in the memory file.
    #[must_use]
    pub fn extent(&self) -> Extent {
        self.image
    }

    /// What it is read through.
    pub(crate) fn view(&self) -> Arc<View> {
        Arc::clone(&self.view)
    }

    /// Opens an image.
    ///
    /// # Errors
    /// [`RestoreError`] if it can't be read or names base pages that are not there.
    pub fn open(view: Arc<View>, image: Extent) -> Result<Self, RestoreError> {
        let index = Self::open_again(view, image)?;
        index.check_bases()?;
        Ok(index)
    }

    /// Opens an image that was opened before: its base pages are there for as long as it is.
    ///
    /// # Errors
    /// [`RestoreError`] if it can't be read.
    pub(crate) fn open_again(view: Arc<View>, image: Extent) -> Result<Self, RestoreError> {
        let bytes = view.bytes(image);
        let (table, patches) = Table::decode(bytes)?;
        let patches_at = bytes.len() - patches.len();
        let mut at = 0u32;
        let mut offsets = Vec::with_capacity(table.processes.len());
        for process in &table.processes {
            let mut of_process = Vec::with_capacity(process.runs.len());
            for run in &process.runs {
                of_process.push(at);
                if let Source::Patches(list) = &run.source {
                    at += list.iter().map(|p| u32::from(p.length)).sum::<u32>();
                }
            }
            offsets.push(of_process);
        }
        Ok(Self { view, image, table, patches_at, offsets })
    }

    fn check_bases(&self) -> Result<(), RestoreError> {
        for run in self.table.processes.iter().flat_map(|p| &p.runs) {
            match &run.source {
                Source::Base { snapshot, page, pages } => {
                    let record = self.record(*snapshot)?;
                    for page in *page..*page + *pages {
                        self.slot(&record, *snapshot, page)?;
                    }
                }
                Source::Patches(patches) => {
                    for (snapshot, page) in patches.iter().filter_map(|p| p.base) {
                        self.slot(&self.record(snapshot)?, snapshot, page)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The table.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Calls `found` for the pages that the image has in `range` of process `process`, in order
    /// and in pieces: address, whether they are of a file mapping, content. Addresses are the
    /// image's. A missing page inside the range is zero.
    ///
    /// # Errors
    /// What `found` says, or [`RestoreError`] if the image is broken.
    pub fn for_each(
        &self,
        process: usize,
        range: Range<u64>,
        mut found: impl FnMut(u64, bool, Piece<'_>) -> Result<(), RestoreError>,
    ) -> Result<(), RestoreError> {
        let broken = ImageError::Broken("no such process");
        let runs = &self.table.processes.get(process).ok_or(broken)?.runs;
        let patches = &self.view.bytes(self.image)[self.patches_at..];
        let first = runs.partition_point(|run| run.end() <= range.start);
        for (n, run) in runs.iter().enumerate().skip(first) {
            if run.address >= range.end {
                break;
            }
            let page = PAGE_SIZE as u64;
            let from = ((range.start.max(run.address) - run.address) / page) as u32;
            let to = ((range.end.min(run.end()) - run.address).div_ceil(page)) as u32;
            let address = run.address + u64::from(from) * page;
            match &run.source {
                Source::Base { snapshot, page, .. } => {
                    self.stored(*snapshot, page + from, page + to, |n, content| {
                        let address = address + u64::from(n - page - from) * PAGE_SIZE as u64;
                        found(address, run.file, Piece::Stored(content))
                    })?;
                }
                Source::Patches(list) => {
                    let skipped = &list[..from as usize];
                    let skip: usize = skipped.iter().map(|p| usize::from(p.length)).sum();
                    let bytes = &patches[self.offsets[process][n] as usize + skip..];
                    let list = &list[from as usize..to as usize];
                    found(address, run.file, Piece::Patched(list, bytes))?;
                }
            }
        }
        Ok(())
    }

    /// Calls `found` for the pages that the image has in `range` of process `process`, one by one
    /// and in order: address, source, patch.
    ///
    /// # Errors
    /// What `found` says.
    pub fn for_each_source<'s, E>(
        &'s self,
        process: usize,
        range: Range<u64>,
        mut found: impl FnMut(u64, PageSource, &'s [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(table) = self.table.processes.get(process) else { return Ok(()) };
        let page_ref = |(snapshot, page): (u16, u32)| PageRef {
            snapshot: self.table.snapshots[usize::from(snapshot)].id,
            page,
        };
        let patches = &self.view.bytes(self.image)[self.patches_at..];
        let first = table.runs.partition_point(|run| run.end() <= range.start);
        for (n, run) in table.runs.iter().enumerate().skip(first) {
            if run.address >= range.end {
                break;
            }
            let mut at = self.offsets[process][n] as usize;
            let page = PAGE_SIZE as u64;
            let from = ((range.start.max(run.address) - run.address) / page) as usize;
            let to = ((range.end.min(run.end()) - run.address).div_ceil(page)) as usize;
            if let Source::Patches(list) = &run.source {
                at += list[..from].iter().map(|p| usize::from(p.length)).sum::<usize>();
            }
            for k in from..to {
                let address = run.address + k as u64 * page;
                let (source, patch) = match &run.source {
                    Source::Base { snapshot, page, .. } => {
                        (PageSource::Base(page_ref((*snapshot, page + k as u32))), &[][..])
                    }
                    Source::Patches(list) => {
                        let PatchUse { length, check, base } = list[k];
                        let patch = &patches[at..at + usize::from(length)];
                        at += usize::from(length);
                        let base = base.map(page_ref);
                        match length {
                            0 => (PageSource::Zero, patch),
                            _ => (PageSource::Patch { length, check, base }, patch),
                        }
                    }
                };
                found(address, source, patch)?;
            }
        }
        Ok(())
    }

    /// How long the patch is of each page of a process that is asked for, in the order of addresses: 0
    /// if it needs none, `None` if the image does not have it.
    pub fn patch_lengths(&self, process: usize) -> impl FnMut(u64) -> Option<u16> + '_ {
        let mut runs = self.table.processes.get(process).map_or(&[][..], |table| &table.runs);
        move |address| {
            while let [first, rest @ ..] = runs
                && first.end() <= address
            {
                runs = rest;
            }
            let run = runs.first().filter(|run| run.address <= address)?;
            Some(match &run.source {
                Source::Base { .. } => 0,
                Source::Patches(list) => list[(address - run.address) as usize / PAGE_SIZE].length,
            })
        }
    }

    /// Calls `found` for those of `pages` that the image has, where they lie one after the other from
    /// `address` on: number, source, patch, and whether the image has exactly this content.
    pub fn for_each_known<'s>(
        &'s self,
        process: usize,
        address: u64,
        pages: &[Page],
        decoder: &mut Decoder,
        mut found: impl FnMut(usize, PageSource, &'s [u8], bool),
    ) {
        let mut decoded = [0; PAGE_SIZE];
        let range = address..address + (pages.len() * PAGE_SIZE) as u64;
        let all = self.for_each_source::<Infallible>(process, range, |at, source, patch| {
            let n = (at - address) as usize / PAGE_SIZE;
            let equal = match source {
                PageSource::Zero => false,
                PageSource::Base(base) => self.base_page(base) == Some(&pages[n]),
                PageSource::Patch { base, .. } => {
                    let base = base.and_then(|at| self.base_page(at));
                    decoder.decode(patch, base, &mut decoded).is_ok() && decoded == pages[n]
                }
            };
            found(n, source, patch, equal);
            Ok(())
        });
        let Ok(()) = all;
    }

    /// The content of one of its base pages.
    fn base_page(&self, at: PageRef) -> Option<&Page> {
        let snapshot = self.table.snapshots.iter().position(|used| used.id == at.snapshot)? as u16;
        let record = self.record(snapshot).ok()?;
        Some(self.view.page(self.slot(&record, snapshot, at.page).ok()?))
    }

    /// The first address, `from` or higher, at which the image has a page of a process.
    #[must_use]
    pub fn next_page(&self, process: usize, from: u64) -> Option<u64> {
        let runs = &self.table.processes.get(process)?.runs;
        let first = runs.partition_point(|run| run.end() <= from);
        Some(runs.get(first)?.address.max(from))
    }

    /// The stretches of at least `least` bytes, within the heap of a process, in which the image
    /// has no page of it.
    #[must_use]
    pub fn holes(&self, process: usize, least: u64) -> Vec<Range<u64>> {
        let Some(table) = self.table.processes.get(process) else { return Vec::new() };
        let heap = table.heap.iter().map(|(start, length)| *start..start + length);
        let mut holes: Vec<_> = heap.flat_map(|range| self.gaps(process, range)).collect();
        holes.retain(|hole| hole.end - hole.start >= least);
        holes
    }

    /// The stretches of `range` in which the image has no page of a process.
    #[must_use]
    pub fn gaps(&self, process: usize, range: Range<u64>) -> Vec<Range<u64>> {
        let Some(table) = self.table.processes.get(process) else { return Vec::new() };
        let mut gaps = Vec::new();
        let mut at = range.start;
        let first = table.runs.partition_point(|run| run.end() <= at);
        for run in table.runs[first..].iter().take_while(|run| run.address < range.end) {
            if run.address > at {
                gaps.push(at..run.address);
            }
            at = run.end();
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }

    /// Decodes one page of a [`Piece::Patched`], taking its patch off `patches`.
    ///
    /// # Errors
    /// [`RestoreError`] if the patch does not decode.
    pub fn decode(
        &self,
        patch: &PatchUse,
        patches: &mut &[u8],
        decoder: &mut Decoder,
        page: &mut Page,
    ) -> Result<(), RestoreError> {
        if patch.length == 0 {
            page.fill(0);
            return Ok(());
        }
        let base = match patch.base {
            Some((snapshot, page)) => {
                let slot = self.slot(&self.record(snapshot)?, snapshot, page)?;
                Some(self.view.page(slot))
            }
            None => None,
        };
        let (bytes, rest) = patches
            .split_at_checked(usize::from(patch.length))
            .ok_or(ImageError::Broken("patches beyond the end"))?;
        *patches = rest;
        decoder.decode(bytes, base, page)?;
        if check(page) != patch.check {
            return Err(RestoreError::Corrupt);
        }
        Ok(())
    }

    /// Calls `found` for base pages `from` to `to` in pieces that lie in one piece in the file.
    fn stored(
        &self,
        snapshot: u16,
        from: u32,
        to: u32,
        mut found: impl FnMut(u32, &[u8]) -> Result<(), RestoreError>,
    ) -> Result<(), RestoreError> {
        let record = self.record(snapshot)?;
        let mut page = from;
        while page < to {
            let start = self.slot(&record, snapshot, page)?;
            let mut pages = 1;
            while page + pages < to && self.slot(&record, snapshot, page + pages)? == start + pages
            {
                pages += 1;
            }
            found(page, self.view.bytes(Extent { start, pages }))?;
            page += pages;
        }
        Ok(())
    }

    fn record(&self, snapshot: u16) -> Result<SnapshotRecord<'_>, RestoreError> {
        let broken = ImageError::Broken("a snapshot's table");
        let used = self.table.snapshots.get(usize::from(snapshot)).ok_or(broken.clone())?;
        let end = used.record.start.checked_add(used.record.pages);
        let record = end
            .filter(|end| *end <= self.view.pages())
            .and_then(|_| SnapshotRecord::parse(self.view.bytes(used.record)));
        Ok(record.filter(|r| r.id() == used.id).ok_or(broken)?)
    }

    fn slot(
        &self,
        record: &SnapshotRecord<'_>,
        snapshot: u16,
        page: u32,
    ) -> Result<u32, RestoreError> {
        record
            .slot(page)
            .filter(|slot| *slot < self.view.pages())
            .ok_or(RestoreError::NoBasePage { snapshot, page })
    }
}
