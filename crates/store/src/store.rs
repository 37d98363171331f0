//! The writer's side of the page store: base snapshots, images, references, accounting.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use medes_core::{DomainId, FunctionId, NodeId, PageRef, SnapshotId};
use medes_pages::{PAGE_SIZE, Page, content_hash};
use parking_lot::Mutex;

use crate::allocator::{Allocator, Extent, OutOfSpace};
use crate::catalogue::{CATALOGUE_PAGES, Catalogue};
use crate::shared::SharedMemory;
use crate::snapshot::{Snapshot, encode_record};

/// Why the store refuses.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No room.
    #[error(transparent)]
    Full(#[from] OutOfSpace),
    /// A base snapshot that an image refers to is not (or no longer) there.
    #[error("the base snapshot {0} is not in the store")]
    NoSnapshot(SnapshotId),
    /// There are as many base snapshots as the catalogue has room for.
    #[error("the page store's catalogue of base snapshots is full: remove functions, or wait")]
    CatalogueFull,
    /// What is to be taken over can't be where it is said to be.
    #[error("an image at page {} of the memory file overlaps something else", .0.start)]
    Overlap(Extent),
    /// Whoever stores an image wants it no more.
    #[error("given up")]
    Stopped,
}

/// Bytes of an image that are written before its writer is asked again whether to go on.
const ASKED: usize = 64 << 10;

/// An image in the store: the opaque content that brings one sandbox's memory back.
///
/// Not freed by itself: [`Store::remove_image`] takes it back.
#[derive(Debug)]
#[must_use]
pub struct ImageHandle {
    extent: Extent,
    snapshots: Vec<SnapshotId>,
}

impl ImageHandle {
    /// Where it lies in the memory file.
    #[must_use]
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// The memory that it takes, bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        u64::from(self.extent.pages) * PAGE_SIZE as u64
    }

    /// The base snapshots that it refers to.
    #[must_use]
    pub fn snapshots(&self) -> &[SnapshotId] {
        &self.snapshots
    }
}

/// What the store holds, bytes unless said otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct StoreUse {
    /// Room in all.
    pub capacity: u64,
    /// Pages of base snapshots, each counted once however many snapshots share it, and the
    /// snapshots' tables.
    pub snapshots: u64,
    /// Images of sandboxes.
    pub images: u64,
    /// Memory beside the file: indexes (an estimate from their capacity).
    pub index: u64,
    /// Number of base snapshots.
    pub snapshot_count: u64,
    /// Number of images.
    pub image_count: u64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Shared {
    pub(crate) slot: u32,
    /// How many snapshot pages are this page.
    pub(crate) references: u32,
    /// A snapshot page with this content; `None` when the snapshot that it named is gone.
    pub(crate) home: Option<PageRef>,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) images: u32,
    pub(crate) retired: bool,
    /// Its place in the catalogue.
    pub(crate) catalogued: u32,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) allocator: Allocator,
    pub(crate) catalogue: Catalogue,
    pub(crate) snapshots: HashMap<SnapshotId, Entry>,
    /// Contents of base pages. One table per domain, so that no domain can feel another's pages.
    pub(crate) contents: HashMap<DomainId, HashMap<u128, Shared>>,
    pub(crate) next_snapshot: u32,
    pub(crate) images: u64,
    pub(crate) image_pages: u64,
}

/// The page store of a node.
#[derive(Debug)]
pub struct Store {
    pub(crate) memory: SharedMemory,
    pub(crate) node: NodeId,
    pub(crate) inner: Mutex<Inner>,
}

impl Store {
    /// An empty store with room for `capacity` bytes. Memory is taken only as it fills.
    ///
    /// # Errors
    /// When the memory file can't be made or mapped.
    pub fn create(node: NodeId, capacity: u64) -> std::io::Result<Self> {
        let pages = u32::try_from(capacity / PAGE_SIZE as u64).unwrap_or(u32::MAX);
        let pages = pages.min(u32::MAX - CATALOGUE_PAGES);
        let memory = SharedMemory::create(pages + CATALOGUE_PAGES)?;
        let inner = Inner {
            allocator: Allocator::new(pages),
            catalogue: Catalogue::create(&memory, pages),
            snapshots: HashMap::new(),
            contents: HashMap::new(),
            next_snapshot: 1,
            images: 0,
            image_pages: 0,
        };
        Ok(Self { memory, node, inner: Mutex::new(inner) })
    }

    /// The memory file.
    #[must_use]
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// Starts a new base snapshot.
    #[must_use]
    pub fn begin_snapshot(&self, domain: DomainId, function: FunctionId) -> SnapshotBuilder<'_> {
        let mut inner = self.inner.lock();
        let number = inner.next_snapshot;
        inner.next_snapshot += 1;
        inner.catalogue.set_next(&self.memory, inner.next_snapshot);
        let id = SnapshotId { node: self.node, number };
        SnapshotBuilder {
            store: self,
            id,
            domain,
            function,
            slots: vec![],
            places: vec![],
            next: 0,
        }
    }

    /// A base snapshot. It stays as it is for as long as the answer is held.
    #[must_use]
    pub fn snapshot(&self, id: SnapshotId) -> Option<Arc<Snapshot>> {
        let inner = self.inner.lock();
        inner.snapshots.get(&id).filter(|e| !e.retired).map(|e| Arc::clone(&e.snapshot))
    }

    /// The function's base snapshots, oldest first.
    #[must_use]
    pub fn snapshots_of(&self, domain: DomainId, function: FunctionId) -> Vec<Arc<Snapshot>> {
        let inner = self.inner.lock();
        let of = |e: &&Entry| {
            !e.retired && e.snapshot.domain == domain && e.snapshot.function == function
        };
        let mut found: Vec<_> =
            inner.snapshots.values().filter(of).map(|e| Arc::clone(&e.snapshot)).collect();
        found.sort_by_key(|s| s.id);
        found
    }

    /// A base page of the domain with exactly this content.
    #[must_use]
    pub fn equal_page(&self, domain: DomainId, page: &Page) -> Option<PageRef> {
        let hash = content_hash(page);
        let inner = self.inner.lock();
        let shared = inner.contents.get(&domain)?.get(&hash)?;
        let home = shared.home?;
        // A snapshot in the making may still fail, a retired one takes no new references.
        let usable = inner.snapshots.get(&home.snapshot).is_some_and(|e| !e.retired);
        (usable && self.memory.page(shared.slot) == page).then_some(home)
    }

    /// The content of a page of a held snapshot.
    #[must_use]
    pub fn page(&self, snapshot: &Snapshot, page: u32) -> Option<&Page> {
        Some(self.memory.page(snapshot.slot(page)?))
    }

    /// Gives a base snapshot up: no new image may refer to it, and its pages go when the last
    /// image that does is gone. Returns whether there was one.
    pub fn retire_snapshot(&self, id: SnapshotId) -> bool {
        let mut inner = self.inner.lock();
        let found = inner.snapshots.get_mut(&id).map(|entry| {
            entry.retired = true;
            (entry.catalogued, entry.snapshot.record)
        });
        if let Some((index, record)) = found {
            inner.catalogue.retire(&self.memory, index, record);
        }
        self.collect(&mut inner);
        found.is_some()
    }

    /// Frees retired snapshots that nobody refers to or holds any more. Their last holder does not
    /// say so: to be called now and then.
    pub fn free_retired(&self) {
        self.collect(&mut self.inner.lock());
    }

    /// The base snapshots that no image refers to, with their functions, oldest first.
    #[must_use]
    pub fn unreferenced(&self) -> Vec<(SnapshotId, FunctionId)> {
        let inner = self.inner.lock();
        let unused = inner.snapshots.values().filter(|e| !e.retired && e.images == 0);
        let mut found: Vec<_> = unused.map(|e| (e.snapshot.id, e.snapshot.function)).collect();
        found.sort_unstable();
        found
    }

    /// How many images refer to a snapshot.
    #[must_use]
    pub fn references(&self, id: SnapshotId) -> u32 {
        self.inner.lock().snapshots.get(&id).map_or(0, |e| e.images)
    }

    /// Stores an image that refers to `snapshots`.
    ///
    /// # Errors
    /// When there is no room, or a snapshot is gone; nothing is stored then.
    pub fn put_image(
        &self,
        content: &[&[u8]],
        snapshots: &[SnapshotId],
    ) -> Result<ImageHandle, StoreError> {
        self.put_image_while(content, snapshots, || true)
    }

    /// As [`Store::put_image`], for as long as `go_on` says so, which is asked every 64 KiB.
    ///
    /// # Errors
    /// As [`Store::put_image`], and [`StoreError::Stopped`].
    pub fn put_image_while(
        &self,
        content: &[&[u8]],
        snapshots: &[SnapshotId],
        go_on: impl Fn() -> bool,
    ) -> Result<ImageHandle, StoreError> {
        let length: usize = content.iter().map(|c| c.len()).sum();
        let pages = u32::try_from(length.div_ceil(PAGE_SIZE)).unwrap_or(u32::MAX);
        let mut inner = self.inner.lock();
        if let Some(gone) = snapshots.iter().find(|id| !inner.snapshots.contains_key(id)) {
            return Err(StoreError::NoSnapshot(*gone));
        }
        self.collect(&mut inner);
        let extent = inner.allocator.take(pages)?;
        for id in snapshots {
            if let Some(entry) = inner.snapshots.get_mut(id) {
                entry.images += 1;
            }
        }
        inner.images += 1;
        inner.image_pages += u64::from(pages);
        drop(inner);
        let image = ImageHandle { extent, snapshots: snapshots.to_vec() };
        let (mut at, mut asked) = (0, 0);
        for part in content {
            if at - asked >= ASKED {
                asked = at;
                if !go_on() {
                    self.remove_image(image);
                    return Err(StoreError::Stopped);
                }
            }
            self.memory.write(extent, at, part);
            at += part.len();
        }
        Ok(image)
    }

    /// Takes over an image that an earlier writer of this memory file stored. To be called before
    /// anything new is stored.
    ///
    /// # Errors
    /// When a snapshot that it refers to is not there, or its pages can't be its own. Nothing is
    /// changed then.
    pub fn adopt_image(
        &self,
        extent: Extent,
        snapshots: &[SnapshotId],
    ) -> Result<ImageHandle, StoreError> {
        let mut inner = self.inner.lock();
        if let Some(gone) = snapshots.iter().find(|id| !inner.snapshots.contains_key(id)) {
            return Err(StoreError::NoSnapshot(*gone));
        }
        if !inner.allocator.reserve(extent) {
            return Err(StoreError::Overlap(extent));
        }
        for id in snapshots {
            if let Some(entry) = inner.snapshots.get_mut(id) {
                entry.images += 1;
            }
        }
        inner.images += 1;
        inner.image_pages += u64::from(extent.pages);
        Ok(ImageHandle { extent, snapshots: snapshots.to_vec() })
    }

    /// Takes an image back. Nobody may read it any more.
    pub fn remove_image(&self, image: ImageHandle) {
        let mut inner = self.inner.lock();
        for id in &image.snapshots {
            if let Some(entry) = inner.snapshots.get_mut(id) {
                entry.images -= 1;
            }
        }
        inner.images -= 1;
        inner.image_pages -= u64::from(image.extent.pages);
        self.memory.release(image.extent);
        inner.allocator.give_back(image.extent);
        self.collect(&mut inner);
    }

    /// What the store holds.
    #[must_use]
    pub fn usage(&self) -> StoreUse {
        let inner = self.inner.lock();
        let page = PAGE_SIZE as u64;
        let used = u64::from(inner.allocator.used_pages());
        let slots: usize = inner.snapshots.values().map(|e| e.snapshot.slots.capacity()).sum();
        let contents: usize = inner.contents.values().map(HashMap::capacity).sum();
        StoreUse {
            capacity: u64::from(inner.allocator.capacity()) * page,
            snapshots: (used - inner.image_pages) * page,
            images: inner.image_pages * page,
            index: (slots * 4 + contents * (size_of::<(u128, Shared)>() + 1)) as u64
                + inner.catalogue.bytes(),
            snapshot_count: inner.snapshots.len() as u64,
            image_count: inner.images,
        }
    }

    /// The memory that base snapshots of one domain take: their pages, each counted once, and their
    /// tables. All domains together make [`StoreUse::snapshots`].
    #[must_use]
    pub fn snapshot_bytes(&self, domain: DomainId) -> u64 {
        let inner = self.inner.lock();
        let of = inner.snapshots.values().filter(|e| e.snapshot.domain == domain);
        let (mut slots, mut tables) = (HashSet::<u32>::new(), 0);
        for entry in of {
            slots.extend(entry.snapshot.slots.iter().copied());
            tables += u64::from(entry.snapshot.record.pages);
        }
        (slots.len() as u64 + tables) * PAGE_SIZE as u64
    }

    /// Frees retired snapshots that nobody refers to or holds.
    pub(crate) fn collect(&self, inner: &mut Inner) {
        let gone = |e: &Entry| e.retired && e.images == 0 && Arc::strong_count(&e.snapshot) == 1;
        let ids: Vec<SnapshotId> =
            inner.snapshots.iter().filter(|(_, e)| gone(e)).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(entry) = inner.snapshots.remove(&id) {
                inner.catalogue.remove(&self.memory, entry.catalogued);
                self.free_pages(inner, entry.snapshot.domain, id, &entry.snapshot.slots);
                self.memory.release(entry.snapshot.record);
                inner.allocator.give_back(entry.snapshot.record);
            }
        }
    }

    fn free_pages(&self, inner: &mut Inner, domain: DomainId, of: SnapshotId, slots: &[u32]) {
        let Inner { allocator, contents, .. } = inner;
        let table = contents.entry(domain).or_default();
        let mut freed: Vec<u32> = Vec::with_capacity(slots.len());
        for &slot in slots {
            let hash = content_hash(self.memory.page(slot));
            match table.get_mut(&hash).filter(|s| s.slot == slot) {
                Some(shared) if shared.references > 1 => {
                    shared.references -= 1;
                    if shared.home.is_some_and(|h| h.snapshot == of) {
                        shared.home = None;
                    }
                }
                Some(_) => {
                    table.remove(&hash);
                    freed.push(slot);
                }
                // Another content with the same hash came first: this page was never shared.
                None => freed.push(slot),
            }
        }
        if table.is_empty() {
            contents.remove(&domain);
        }
        freed.sort_unstable();
        for run in freed.chunk_by(|a, b| a + 1 == *b) {
            let extent = Extent { start: run[0], pages: run.len() as u32 };
            self.memory.release(extent);
            allocator.give_back(extent);
        }
    }
}

/// A base snapshot in the making. Dropped before [`SnapshotBuilder::finish`], it leaves nothing.
#[derive(Debug)]
pub struct SnapshotBuilder<'a> {
    store: &'a Store,
    id: SnapshotId,
    domain: DomainId,
    function: FunctionId,
    slots: Vec<u32>,
    places: Vec<(u64, u32, u32)>,
    next: u32,
}

impl SnapshotBuilder<'_> {
    /// The identity that the snapshot will have.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// Adds the page that lay at `address`; addresses must rise. Returns its index. Content that a
    /// base page of the domain has already is stored once.
    ///
    /// # Errors
    /// When there is no room; the snapshot can still be finished without this page.
    pub fn push(&mut self, address: u64, page: &Page) -> Result<u32, StoreError> {
        let index = self.slots.len() as u32;
        let home = Some(PageRef { snapshot: self.id, page: index });
        let hash = content_hash(page);
        let mut inner = self.store.inner.lock();
        let known = inner.contents.entry(self.domain).or_default().get_mut(&hash);
        let slot = match known {
            Some(shared) if self.store.memory.page(shared.slot) == page => {
                shared.references += 1;
                shared.home = shared.home.or(home);
                shared.slot
            }
            known => {
                let collides = known.is_some();
                let slot = inner.allocator.take_page(self.next)?;
                self.store.memory.write(Extent { start: slot, pages: 1 }, 0, page);
                if !collides {
                    let shared = Shared { slot, references: 1, home };
                    inner.contents.entry(self.domain).or_default().insert(hash, shared);
                }
                self.next = slot + 1;
                slot
            }
        };
        drop(inner);
        self.slots.push(slot);
        match self.places.last_mut() {
            Some((start, pages, _)) if *start + u64::from(*pages) * PAGE_SIZE as u64 == address => {
                *pages += 1;
            }
            _ => self.places.push((address, 1, index)),
        }
        Ok(index)
    }

    /// Completes the snapshot.
    ///
    /// # Errors
    /// When there is no room for its table; nothing of it stays then.
    pub fn finish(mut self) -> Result<Arc<Snapshot>, StoreError> {
        let Self { store, id, domain, function, .. } = self;
        let table = encode_record(id, domain, function, &self.slots, &self.places);
        let mut inner = store.inner.lock();
        let record = inner.allocator.take(table.len().div_ceil(PAGE_SIZE) as u32)?;
        store.memory.write(record, 0, &table);
        let Some(catalogued) = inner.catalogue.enter(&store.memory, record) else {
            store.memory.release(record);
            inner.allocator.give_back(record);
            return Err(StoreError::CatalogueFull);
        };
        let snapshot = Arc::new(Snapshot {
            id,
            domain,
            function,
            slots: std::mem::take(&mut self.slots),
            places: std::mem::take(&mut self.places),
            record,
        });
        let entry =
            Entry { snapshot: Arc::clone(&snapshot), images: 0, retired: false, catalogued };
        inner.snapshots.insert(id, entry);
        Ok(snapshot)
    }
}

impl Drop for SnapshotBuilder<'_> {
    fn drop(&mut self) {
        if !self.slots.is_empty() {
            let mut inner = self.store.inner.lock();
            self.store.free_pages(&mut inner, self.domain, self.id, &self.slots);
        }
    }
}
