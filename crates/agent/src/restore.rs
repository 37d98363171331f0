//! The restore operation: putting a dedup sandbox's pages back.
//!
//! Everything it needs is in the image and in the page store's memory file; nobody is asked. Pages
//! equal to base pages are copied by the kernel straight out of the memory file, run by run;
//! patches are decoded into a small buffer that stays warm. Pages of private file mappings go
//! through `/proc/PID/mem`, since a userfaultfd does not cover them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use medes_memory::pages::{PageClass, PageRun};
use medes_memory::userfault::{CopyMode, FillError, UserFault, UserFaultFeatures};
use medes_memory::writer::{WriteError, write_pages};
use medes_pages::{DecodeError, Decoder, PAGE_SIZE, Page};
use medes_store::{Extent, SnapshotRecord, View};

use crate::image::{ImageError, PatchUse, ProcessTable, Source, Table};

/// Pages decoded before they are copied in one call: enough to make the call cheap, few enough to
/// stay in the processor's cache.
const BATCH: usize = 64;

/// Why a restore failed. The sandbox has part of its pages then, and may not run.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The image can't be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image refers to a base page that is not where it should be.
    #[error("base page {page} of snapshot {snapshot} is not in the page store")]
    NoBasePage {
        /// The snapshot's index in the image.
        snapshot: u16,
        /// The page.
        page: u32,
    },
    /// A patch does not decode.
    #[error("a patch does not decode: {0}")]
    Patch(#[from] DecodeError),
    /// The image has another number of processes than there are userfaultfds.
    #[error("{descriptors} userfaultfds for {processes} processes")]
    Descriptors {
        /// How many userfaultfds were given.
        descriptors: usize,
        /// How many processes the image has.
        processes: usize,
    },
    /// The kernel did not take a page.
    #[error(transparent)]
    Fill(#[from] FillError),
    /// The kernel did not take a page of a private file mapping.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The userfaultfd could not be released.
    #[error("releasing the userfaultfd: {0}")]
    Release(std::io::Error),
}

/// What a restore needs for working, worth keeping from one to the next: memory that was used
/// before is much faster than new memory.
pub struct RestoreBuffers {
    decoder: Decoder,
    pages: Vec<Page>,
}

impl Default for RestoreBuffers {
    fn default() -> Self {
        Self { decoder: Decoder::new(), pages: vec![[0; PAGE_SIZE]; BATCH] }
    }
}

/// What brings one dedup sandbox's memory back: its image and its userfaultfds.
pub struct HeldImage {
    view: Arc<View>,
    image: Extent,
    userfaults: Vec<OwnedFd>,
}

impl HeldImage {
    /// Takes charge of an image, after checking that it can be read and that all base pages it
    /// names are there.
    ///
    /// # Errors
    /// [`RestoreError`] with what is wrong.
    pub fn open(
        view: Arc<View>,
        image: Extent,
        userfaults: Vec<OwnedFd>,
    ) -> Result<Self, RestoreError> {
        let (table, _) = Table::decode(view.bytes(image))?;
        let (descriptors, processes) = (userfaults.len(), table.processes.len());
        if descriptors != processes {
            return Err(RestoreError::Descriptors { descriptors, processes });
        }
        let bases = BasePages::open(&view, &table)?;
        for run in table.processes.iter().flat_map(|p| &p.runs) {
            match &run.source {
                Source::Base { snapshot, page, pages } => {
                    for page in *page..*page + *pages {
                        bases.slot(*snapshot, page)?;
                    }
                }
                Source::Patches(patches) => {
                    for (snapshot, page) in patches.iter().filter_map(|p| p.base) {
                        bases.slot(snapshot, page)?;
                    }
                }
            }
        }
        Ok(Self { view, image, userfaults })
    }

    /// Puts all pages back and releases the userfaultfds. Returns how many pages there were. The
    /// sandbox must be frozen; it may be thawed if this succeeds, and must be killed if not.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn restore(self, buffers: &mut RestoreBuffers) -> Result<u64, RestoreError> {
        let (table, mut patches) = Table::decode(self.view.bytes(self.image))?;
        let bases = BasePages::open(&self.view, &table)?;
        let mut pages = 0;
        for (process, userfault) in table.processes.iter().zip(self.userfaults) {
            let registered = process.registered.iter().map(|(start, len)| *start..start + len);
            let mut userfault = UserFault::from_parts(
                userfault,
                UserFaultFeatures::NONE,
                registered.collect(),
                None,
            );
            pages += fill(process, &userfault, &bases, &mut patches, buffers)?;
            userfault.unregister_all().map_err(RestoreError::Release)?;
        }
        Ok(pages)
    }
}

fn fill(
    process: &ProcessTable,
    userfault: &UserFault,
    bases: &BasePages<'_>,
    patches: &mut &[u8],
    buffers: &mut RestoreBuffers,
) -> Result<u64, RestoreError> {
    let put = |address: u64, file: bool, content: &[u8]| -> Result<(), RestoreError> {
        if file {
            let pages = (content.len() / PAGE_SIZE) as u32;
            let run = PageRun { start: address, pages, class: PageClass::FileCow };
            write_pages(process.pid, &[run], content)?;
        } else {
            userfault.copy(address, content, CopyMode::default())?;
        }
        Ok(())
    };
    let mut pages = 0;
    for run in &process.runs {
        pages += u64::from(run.pages());
        match &run.source {
            Source::Base { snapshot, page, pages } => {
                let mut address = run.address;
                let mut page = *page;
                let end = page + pages;
                while page < end {
                    let content = bases.contiguous(*snapshot, page, end)?;
                    put(address, run.file, content)?;
                    address += content.len() as u64;
                    page += (content.len() / PAGE_SIZE) as u32;
                }
            }
            Source::Patches(list) => {
                let mut address = run.address;
                for batch in list.chunks(BATCH) {
                    for (patch, page) in batch.iter().zip(&mut buffers.pages) {
                        decode(patch, patches, bases, &mut buffers.decoder, page)?;
                    }
                    let content = buffers.pages[..batch.len()].as_flattened();
                    put(address, run.file, content)?;
                    address += content.len() as u64;
                }
            }
        }
    }
    Ok(pages)
}

fn decode(
    patch: &PatchUse,
    patches: &mut &[u8],
    bases: &BasePages<'_>,
    decoder: &mut Decoder,
    page: &mut Page,
) -> Result<(), RestoreError> {
    if patch.length == 0 {
        page.fill(0);
        return Ok(());
    }
    let base = patch.base.map(|(snapshot, page)| bases.page(snapshot, page)).transpose()?;
    let (bytes, rest) = patches
        .split_at_checked(usize::from(patch.length))
        .ok_or(ImageError::Broken("patches beyond the end"))?;
    *patches = rest;
    Ok(decoder.decode(bytes, base, page)?)
}

/// The base pages that an image refers to, in the memory file.
struct BasePages<'a> {
    view: &'a View,
    records: Vec<SnapshotRecord<'a>>,
}

impl<'a> BasePages<'a> {
    fn open(view: &'a View, table: &Table) -> Result<Self, ImageError> {
        let record = |used: &crate::image::SnapshotUse| {
            let inside =
                used.record.start.checked_add(used.record.pages).is_some_and(|e| e <= view.pages());
            let record = inside.then(|| SnapshotRecord::parse(view.bytes(used.record))).flatten();
            record.filter(|r| r.id() == used.id).ok_or(ImageError::Broken("a snapshot's table"))
        };
        let records = table.snapshots.iter().map(record).collect::<Result<_, _>>()?;
        Ok(Self { view, records })
    }

    fn slot(&self, snapshot: u16, page: u32) -> Result<u32, RestoreError> {
        let record = self.records.get(usize::from(snapshot));
        record
            .and_then(|r| r.slot(page))
            .filter(|slot| *slot < self.view.pages())
            .ok_or(RestoreError::NoBasePage { snapshot, page })
    }

    fn page(&self, snapshot: u16, page: u32) -> Result<&'a Page, RestoreError> {
        Ok(self.view.page(self.slot(snapshot, page)?))
    }

    /// As many pages from `page` on, before `end`, as lie one after the other in the memory file.
    fn contiguous(&self, snapshot: u16, page: u32, end: u32) -> Result<&'a [u8], RestoreError> {
        let start = self.slot(snapshot, page)?;
        let mut pages = 1;
        while page + pages < end && self.slot(snapshot, page + pages)? == start + pages {
            pages += 1;
        }
        Ok(self.view.bytes(Extent { start, pages }))
    }
}
