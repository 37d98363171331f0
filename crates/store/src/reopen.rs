//! Taking a page store over from a writer that has died.
//!
//! What the catalogue knows is there; everything else in the file, such as a snapshot or an image
//! that was being written, is free, unless somebody who holds an image says otherwise
//! ([`Store::adopt_image`]).

use std::collections::{BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use medes_core::{NodeId, PageRef};
use medes_pages::content_hash;
use parking_lot::Mutex;

use crate::allocator::{Allocator, Extent};
use crate::catalogue::{CATALOGUE_PAGES, Catalogue};
use crate::shared::SharedMemory;
use crate::snapshot::{Snapshot, SnapshotRecord};
use crate::store::{Entry, Inner, Shared, Store};

/// Why a memory file can't be taken over.
#[derive(Debug, thiserror::Error)]
pub enum ReopenError {
    /// It can't be mapped or read.
    #[error("mapping the page store: {0}")]
    Map(#[from] std::io::Error),
    /// It is no page store's, or another version's.
    #[error("the memory file is not a page store of this version")]
    NotAStore,
    /// What it holds contradicts itself.
    #[error("the page store is corrupt: {0}")]
    Corrupt(&'static str),
}

impl Store {
    /// Takes over the store in a memory file whose writer has died. Images are not in it yet:
    /// [`Store::adopt_image`] each, then call [`Store::release_rest`], and only then store anything
    /// new. Every base page is read once.
    ///
    /// # Errors
    /// [`ReopenError`]. The file is as it was.
    pub fn reopen(node: NodeId, fd: OwnedFd) -> Result<Self, ReopenError> {
        let memory = SharedMemory::open(fd)?;
        let pages = memory.pages().checked_sub(CATALOGUE_PAGES).ok_or(ReopenError::NotAStore)?;
        let opened = Catalogue::open(&memory, pages)?;
        let (catalogue, entries, next_snapshot) = opened.ok_or(ReopenError::NotAStore)?;
        let mut allocator = Allocator::new(pages);
        let mut snapshots = HashMap::new();
        for entry in entries {
            let snapshot = read(&memory, pages, entry.record)?;
            if !allocator.reserve(entry.record) {
                return Err(ReopenError::Corrupt("two tables in one place"));
            }
            let (id, retired) = (snapshot.id, entry.retired);
            let snapshot = Arc::new(snapshot);
            let entry = Entry { snapshot, images: 0, retired, catalogued: entry.index };
            if id.number >= next_snapshot || snapshots.insert(id, entry).is_some() {
                return Err(ReopenError::Corrupt("two snapshots of one number"));
            }
        }
        let slots: BTreeSet<u32> =
            snapshots.values().flat_map(|e| e.snapshot.slots.iter().copied()).collect();
        let slots: Vec<u32> = slots.into_iter().collect();
        for run in slots.chunk_by(|a, b| a + 1 == *b) {
            if !allocator.reserve(Extent { start: run[0], pages: run.len() as u32 }) {
                return Err(ReopenError::Corrupt("a page in the place of a table"));
            }
        }
        let mut inner = Inner {
            allocator,
            catalogue,
            snapshots,
            contents: HashMap::new(),
            next_snapshot,
            images: 0,
            image_pages: 0,
        };
        index_contents(&memory, &mut inner);
        Ok(Self { memory, node, inner: Mutex::new(inner) })
    }

    /// Frees what nobody has adopted, and gives its memory back to the host.
    pub fn release_rest(&self) {
        let mut inner = self.inner.lock();
        self.collect(&mut inner);
        for extent in inner.allocator.free() {
            self.memory.release(extent);
        }
    }

    /// Every base snapshot that takes new references.
    #[must_use]
    pub fn snapshots(&self) -> Vec<Arc<Snapshot>> {
        let inner = self.inner.lock();
        let usable = inner.snapshots.values().filter(|entry| !entry.retired);
        let mut found: Vec<_> = usable.map(|entry| Arc::clone(&entry.snapshot)).collect();
        found.sort_by_key(|snapshot| snapshot.id);
        found
    }
}

fn read(memory: &SharedMemory, pages: u32, record: Extent) -> Result<Snapshot, ReopenError> {
    let inside = record.start.checked_add(record.pages).is_some_and(|end| end <= pages);
    let snapshot = inside
        .then(|| memory.bytes(record))
        .and_then(SnapshotRecord::parse)
        .and_then(|table| table.snapshot(record))
        .ok_or(ReopenError::Corrupt("a snapshot's table"))?;
    if snapshot.slots.iter().any(|slot| *slot >= pages) {
        return Err(ReopenError::Corrupt("a page beyond the end"));
    }
    Ok(snapshot)
}

/// Finds out again which contents there are. In the order in which snapshots were made, so that the
/// same one as before is named for a content that several have.
fn index_contents(memory: &SharedMemory, inner: &mut Inner) {
    let mut all: Vec<&Arc<Snapshot>> = inner.snapshots.values().map(|e| &e.snapshot).collect();
    all.sort_unstable_by_key(|snapshot| snapshot.id);
    for snapshot in all {
        let table = inner.contents.entry(snapshot.domain).or_default();
        for (page, slot) in (0..).zip(snapshot.slots.iter().copied()) {
            let home = Some(PageRef { snapshot: snapshot.id, page });
            let known = table.entry(content_hash(memory.page(slot))).or_insert(Shared {
                slot,
                references: 0,
                home,
            });
            // Another content with the same hash is shared with nobody.
            if known.slot == slot {
                known.references += 1;
            }
        }
    }
}
